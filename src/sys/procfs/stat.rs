//! `/proc/PID/stat`: identity, state, parent, terminal and argument area of a process.
//!
//! To read it takes no lock that a container could hold.

use std::io::{self, Read as _};
use std::time::Duration;

use procfs::process::Process;

use super::error::into_io;
use crate::model::ProcessIdentity;

/// Where a program's arguments and environment lie in its memory. Every execve writes them
/// anew, at random addresses: another area means another program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ArgumentArea {
    pub arguments: (u64, u64),
    pub environment: (u64, u64),
}

impl ArgumentArea {
    /// Whether the kernel has written all of it: from then on the new program's arguments
    /// can be read.
    pub fn is_complete(&self) -> bool {
        self.environment.1 != 0
    }
}

/// The fields of `/proc/PID/stat` that driftd uses (proc_pid_stat(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    pub identity: ProcessIdentity,
    pub comm: Box<[u8]>,
    pub state: u8,
    pub parent: u32,
    pub session: u32,
    pub tty_nr: i32,
    pub area: ArgumentArea,
}

impl Stat {
    /// The process has ended, and nothing else is known about it.
    pub fn of_ended(identity: ProcessIdentity, parent: u32) -> Stat {
        let area = ArgumentArea { arguments: (0, 0), environment: (0, 0) };
        let (comm, state) = (Box::default(), b'X');
        Stat { identity, comm, state, parent, session: 0, tty_nr: 0, area }
    }

    pub fn parse(text: &[u8]) -> Option<Stat> {
        // The name can have spaces and parentheses: it ends at the last parenthesis.
        let open = text.iter().position(|&byte| byte == b'(')?;
        let close = text.iter().rposition(|&byte| byte == b')')?;
        let comm = text.get(open + 1..close)?;
        let pid = str::from_utf8(text.get(..open)?).ok()?.trim().parse().ok()?;
        // After the name come fields 3, 4, 5 …
        let mut fields = [None; 50];
        let words = str::from_utf8(text.get(close + 1..)?).ok()?.split_ascii_whitespace();
        fields.iter_mut().zip(words).for_each(|(field, word)| *field = Some(word));
        let field = |number: usize| fields[number - 3];
        let address = |number| field(number).and_then(|field| field.parse().ok()).unwrap_or(0);
        Some(Stat {
            identity: ProcessIdentity { pid, start_time: field(22)?.parse().ok()? },
            comm: comm.into(),
            state: *field(3)?.as_bytes().first()?,
            parent: field(4)?.parse().ok()?,
            session: field(6)?.parse().unwrap_or(0),
            tty_nr: field(7)?.parse().ok()?,
            area: ArgumentArea {
                arguments: (address(48), address(49)),
                environment: (address(50), address(51)),
            },
        })
    }

    pub fn has_ended(&self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }

    /// The controlling terminal's name.
    pub fn tty(&self) -> Option<String> {
        tty_name(self.tty_nr)
    }
}

/// Reads `/proc/PID/stat` by pid alone: only for a process that cannot end meanwhile,
/// because it waits for driftd's response.
pub fn read_stat(pid: u32) -> io::Result<Stat> {
    let mut file = std::fs::File::open(format!("/proc/{pid}/stat"))?;
    // 52 numbers of at most 20 digits and a name of at most 64 bytes.
    let mut text = [0; 2048];
    let len = file.read(&mut text)?;
    Stat::parse(&text[..len]).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Whether a process has threads that run, even if its first thread has ended.
pub fn has_threads(process: ProcessIdentity) -> bool {
    let Ok(stat) = read_stat(process.pid) else { return false };
    let has_others = || {
        let threads = std::fs::read_dir(format!("/proc/{}/task", process.pid));
        threads.is_ok_and(|threads| threads.count() > 1)
    };
    stat.identity == process && (!stat.has_ended() || has_others())
}

/// Whether a thread of this process wants a processor, and for how long it has had one.
pub fn activity(thread: u32) -> Option<(bool, Duration)> {
    let stat = std::fs::read(format!("/proc/self/task/{thread}/stat")).ok()?;
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    let ran = text.split(' ').next()?.parse().ok()?;
    Some((Stat::parse(&stat)?.state == b'R', Duration::from_nanos(ran)))
}

/// How long ago a process started. Start times are rounded down to a clock tick, so the age
/// is rather too long than too short.
pub fn age(process: ProcessIdentity) -> Duration {
    let ticks = rustix::param::clock_ticks_per_second().max(1);
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let up = Duration::try_from(now).unwrap_or_default();
    let (seconds, rest) = (process.start_time / ticks, process.start_time % ticks);
    let since = Duration::from_secs(seconds) + Duration::from_nanos(rest * 1_000_000_000 / ticks);
    up.saturating_sub(since)
}

/// The name of a terminal, from `tty_nr` (proc_pid_stat(5), field 7).
pub fn tty_name(tty_nr: i32) -> Option<String> {
    let number = tty_nr.cast_unsigned();
    let major = (number >> 8) & 0xfff;
    let minor = (number & 0xff) | ((number >> 12) & 0xf_ff00);
    match (major, minor) {
        (0, _) => None,
        (4, 0..=63) => Some(format!("tty{minor}")),
        (4, _) => Some(format!("ttyS{}", minor - 64)),
        (5, 1) => Some("console".into()),
        (136..=143, _) => Some(format!("pts/{}", (major - 136) * 256 + minor)),
        _ => Some(format!("{major}:{minor}")),
    }
}

pub(super) fn stat_of(process: &Process) -> io::Result<Stat> {
    let mut file = process.open_relative("stat").map_err(into_io)?;
    let mut text = [0; 2048];
    let len = file.read(&mut text)?;
    Stat::parse(&text[..len]).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(comm: &[u8], state: &str) -> Vec<u8> {
        let mut text = b"42 (".to_vec();
        text.extend(comm);
        text.extend(format!(") {state} 7 42 42 34817 42 0 ").bytes());
        // Fields 10 to 21, then the start time, then up to field 52.
        text.extend("0 ".repeat(12).bytes());
        text.extend(b"9001 ");
        text.extend((23..=52).map(|number| format!("{number} ")).collect::<String>().bytes());
        text
    }

    #[test]
    fn a_name_cannot_forge_the_fields_behind_it() {
        let comm = b"x) R 1 1 (\xff";
        let expected = Stat {
            identity: ProcessIdentity { pid: 42, start_time: 9001 },
            comm: (*comm).into(),
            state: b'S',
            parent: 7,
            session: 42,
            tty_nr: 34817,
            area: ArgumentArea { arguments: (48, 49), environment: (50, 51) },
        };
        assert_eq!(Stat::parse(&line(comm, "S")), Some(expected));
    }

    #[test]
    fn terminals_are_named() {
        assert_eq!(tty_name(0), None);
        assert_eq!(tty_name(34817), Some("pts/1".into()));
        assert_eq!(tty_name((136 << 8) | 0x2c | (1 << 20)), Some("pts/300".into()));
        assert_eq!(tty_name((4 << 8) | 1), Some("tty1".into()));
        assert_eq!(tty_name((5 << 8) | 1), Some("console".into()));
        assert!(tty_name(i32::MIN).is_none());
        assert!(tty_name(-1).is_some());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_stat_or_none(text: Vec<u8>) {
            let _ = Stat::parse(&text);
        }

        #[test]
        fn any_name_is_read_back(comm in proptest::collection::vec(1u8.., 0..16)) {
            let stat = Stat::parse(&line(&comm, "R")).unwrap();
            proptest::prop_assert_eq!(&*stat.comm, &comm[..]);
        }
    }
}
