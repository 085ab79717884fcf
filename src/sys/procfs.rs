//! Facts about processes, from /proc, as bytes.
//!
//! A process's name, arguments and mounts are chosen by the container and need
//! not be UTF-8. The procfs crate holds /proc/PID open for us, so that a pid
//! used again cannot mix two processes, and reads what is numbers (auxv). Its
//! parsers of `stat`, `status`, `cmdline` and `mountinfo` want UTF-8 and fail on
//! hostile names, so those few fields are read here.
//!
//! A process that has vanished is an `Err` or a `None`, never a surprise.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::{self, Read as _};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use procfs::process::Process;

use serde::{Deserialize, Serialize};

use crate::model::{Exit, FileType, Login, ProcessIdentity};

/// Bounds for what a process may make us read.
pub const MAX_ARGUMENTS: usize = 128;
pub const MAX_ARGUMENT_BYTES: usize = 4 * 1024;
const MAX_CMDLINE_BYTES: u64 = 64 * 1024;
const MAX_ENVIRONMENT_BYTES: u64 = 256 * 1024;
const MAX_VALUE_BYTES: usize = 512;
const MAX_ANCESTORS: usize = 32;
/// A network namespace may have any number of connections, and a process any
/// number of mappings.
const MAX_TABLE_BYTES: u64 = 8 << 20;

/// Where a program's arguments and environment lie in its memory. The kernel
/// writes it anew, at random addresses, in every execve: a changed area means
/// that another program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArgumentArea {
    pub arguments: (u64, u64),
    pub environment: (u64, u64),
}

impl ArgumentArea {
    /// The kernel has written all of it: execve is past the point where the new
    /// program's arguments can be read.
    pub fn is_complete(&self) -> bool {
        self.environment.1 != 0
    }
}

/// What /proc/PID/stat says (proc_pid_stat(5)).
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
    pub fn parse(text: &[u8]) -> Option<Stat> {
        // The name may hold spaces and parentheses: it ends at the last one.
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

/// One read of /proc/PID/stat by pid alone: only where the process cannot end
/// meanwhile, because it waits for our answer.
pub fn read_stat(pid: u32) -> io::Result<Stat> {
    let mut file = std::fs::File::open(format!("/proc/{pid}/stat"))?;
    // 52 numbers of at most 20 digits and a name of at most 64 bytes.
    let mut text = [0; 2048];
    let len = file.read(&mut text)?;
    Stat::parse(&text[..len]).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Whether threads of a process go on, also where its first one has ended.
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

/// For how long a process has been there, to the clock tick before its start: rather
/// too long than too short.
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

/// By what it is known whose a process is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whereabouts {
    pub mount_namespace: Option<u64>,
    pub pid_namespace: Option<u64>,
    /// Its path in the unified hierarchy.
    pub cgroup: Option<Vec<u8>>,
}

/// One process, held by its directory in /proc.
pub struct Handle {
    process: Process,
    /// As read when the handle was made.
    stat: Stat,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({})", self.process.pid)
    }
}

impl Handle {
    pub fn open(pid: u32) -> io::Result<Handle> {
        let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::NotFound)?;
        if pid == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        let process = Process::new(pid).map_err(into_io)?;
        let stat = stat_of(&process)?;
        Ok(Handle { process, stat })
    }

    /// Only if it still is this process.
    pub fn open_exactly(identity: ProcessIdentity) -> io::Result<Handle> {
        let handle = Handle::open(identity.pid)?;
        if handle.stat.identity == identity {
            Ok(handle)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    pub fn identity(&self) -> ProcessIdentity {
        self.stat.identity
    }

    /// As it was when the handle was made.
    pub fn first_stat(&self) -> &Stat {
        &self.stat
    }

    /// As it is now.
    pub fn stat(&self) -> io::Result<Stat> {
        stat_of(&self.process)
    }

    /// One of its files, followed if it is a link of the kernel's own.
    pub(super) fn open_file(&self, name: &str) -> io::Result<std::fs::File> {
        self.process.open_relative(name).map_err(into_io)
    }

    fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.process.open_relative(name).map_err(into_io)?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The executable's path, ` (deleted)` and all.
    pub fn exe(&self) -> io::Result<Vec<u8>> {
        let path = self.process.exe().map_err(into_io)?;
        Ok(path.into_os_string().into_vec())
    }

    /// The executable's device and inode.
    pub fn exe_identity(&self) -> io::Result<(u64, u64)> {
        let stat = super::file::stat_path(format!("/proc/{}/exe", self.process.pid))?;
        Ok((stat.device, stat.inode))
    }

    /// Reads one of its files of which already the opening takes locks of its memory.
    fn read_memory(&self, name: &'static str, limit: u64) -> io::Result<Vec<u8>> {
        self.patiently(move |pid| {
            let mut bytes = Vec::new();
            std::fs::File::open(format!("/proc/{pid}/{name}"))?
                .take(limit)
                .read_to_end(&mut bytes)?;
            Ok(bytes)
        })
        .and_then(|bytes| self.if_still_there(bytes))
    }

    /// The pid is this process's as long as its directory answers.
    fn if_still_there<T>(&self, found: T) -> io::Result<T> {
        self.stat().map(|_| found)
    }

    /// Does what takes locks of its memory; an error if those are held for long.
    fn patiently<T: Send + 'static>(
        &self,
        work: impl FnOnce(i32) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let pid = self.process.pid;
        let group = || self.read("cgroup", 64 * 1024).unwrap_or_default();
        super::errand::run(self.identity(), group, move || work(pid))?
    }

    /// Each argument; `None` for a process that has ended or has none.
    pub fn arguments(&self) -> io::Result<Option<Vec<Vec<u8>>>> {
        // To open it asks for nothing, and by then it is this process's.
        let file = self.process.open_relative("cmdline").map_err(into_io)?;
        let cmdline = self.patiently(move |_| {
            let mut bytes = Vec::new();
            file.take(MAX_CMDLINE_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        })?;
        Ok(split_arguments(&cmdline))
    }

    /// The effective user ID: with whose rights it acts.
    pub fn uid(&self) -> io::Result<u32> {
        let status = self.read("status", 16 * 1024)?;
        parse_uid(&status).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The login that it descends from: whose, and the audit session's number. `None`
    /// if it descends from none, or the kernel keeps no audit of logins.
    pub fn login(&self) -> Option<Login> {
        let number = |name| -> Option<u32> {
            let text = self.read(name, 32).ok()?;
            let number = str::from_utf8(&text).ok()?.trim_end().parse().ok()?;
            // What was never set is -1.
            Some(number).filter(|number| *number != u32::MAX)
        };
        Some(Login { uid: number("loginuid")?, audit_session: number("sessionid") })
    }

    /// The first of these variables that is in the environment it began with.
    pub fn variable(&self, names: &[String]) -> Option<Vec<u8>> {
        let environment = self.read_memory("environ", MAX_ENVIRONMENT_BYTES).ok()?;
        names.iter().find_map(|name| {
            let mut variables = environment.split(|&byte| byte == 0);
            let value =
                variables.find_map(|one| one.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
            Some(value[..value.len().min(MAX_VALUE_BYTES)].to_vec())
        })
    }

    /// How it ended, while nobody has waited for it yet (proc_pid_stat(5), field 52).
    pub fn exit(&self) -> Option<Exit> {
        let text = self.read("stat", 2048).ok()?;
        let fields = &text[text.iter().rposition(|&byte| byte == b')')? + 1..];
        let fields: Vec<&str> = str::from_utf8(fields).ok()?.split_ascii_whitespace().collect();
        // Behind the name comes field 3.
        let is_over = matches!(*fields.first()?, "Z" | "X" | "x");
        is_over.then(|| fields.get(52 - 3)?.parse().ok()).flatten().map(Exit::from_wait_status)
    }

    /// Its working directory, as it is called from our root.
    pub fn working_directory(&self) -> io::Result<PathBuf> {
        self.process.cwd().map_err(into_io)
    }

    /// Names the pid namespace this process is in.
    pub fn pid_namespace(&self) -> io::Result<u64> {
        self.namespace("ns/pid")
    }

    /// How its own pid namespace calls it (proc_pid_status(5), `NSpid`).
    pub fn own_number(&self) -> Option<u32> {
        let status = self.read("status", 16 * 1024).ok()?;
        field(&status, "NSpid:")?.split_ascii_whitespace().next_back()?.parse().ok()
    }

    pub fn is_first_in_pid_namespace(&self) -> bool {
        self.own_number() == Some(1)
    }

    /// Names the mount namespace this process is in.
    pub fn mount_namespace(&self) -> io::Result<u64> {
        self.namespace("ns/mnt")
    }

    /// Whether its root directory is the host's own: it is on its way into a container,
    /// or was called there by its runtime, and runs the host's programs.
    pub fn has_host_root(&self) -> bool {
        let identity =
            |path: &Path| crate::sys::file::stat_path(path).map(|at| (at.device, at.inode));
        identity(&self.root_path())
            .is_ok_and(|root| identity(Path::new("/")).is_ok_and(|host| host == root))
    }

    /// Its control groups, a line for each hierarchy.
    pub(super) fn groups(&self) -> io::Result<Vec<u8>> {
        self.read("cgroup", 64 * 1024)
    }

    /// The path of its control group in the unified hierarchy, as the host sees it.
    pub fn cgroup(&self) -> io::Result<Vec<u8>> {
        let groups = self.groups()?;
        groups
            .split(|&byte| byte == b'\n')
            .find_map(|line| line.strip_prefix(b"0::"))
            .map(<[u8]>::to_vec)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Its namespaces and its control group, as far as they can be read.
    pub fn whereabouts(&self) -> Whereabouts {
        Whereabouts {
            mount_namespace: self.mount_namespace().ok(),
            pid_namespace: self.pid_namespace().ok(),
            cgroup: self.cgroup().ok(),
        }
    }

    /// The inode of its control group's directory in the hierarchy that perf goes
    /// by: the unified one, unless perf has one of its own. `None` if it is in the
    /// root of it, or nobody has mounted it here.
    pub fn perf_cgroup(&self) -> Option<u64> {
        use std::os::unix::ffi::OsStrExt as _;
        use std::os::unix::fs::MetadataExt as _;
        // Both are the host's words, not the container's.
        let groups = self.groups().ok()?;
        let (is_unified, path) = perf_cgroup_path(&groups)?;
        let mountinfo = Handle::open(std::process::id()).ok()?.mountinfo().ok()?;
        let controller = (!is_unified).then_some(&b"perf_event"[..]);
        let mut directory = hierarchy_mount(&mountinfo, controller)?;
        directory.extend(&path);
        std::fs::metadata(std::ffi::OsStr::from_bytes(&directory)).ok().map(|found| found.ino())
    }

    /// Opens its program: whatever it was started from, with or without a name. Only
    /// to ask what it is; `door::reopen` reads it.
    pub fn open_exe(&self) -> io::Result<OwnedFd> {
        self.open_link("exe")
    }

    /// Opens what it has open as `number`, only to ask what it is.
    pub fn open_descriptor(&self, number: u32) -> io::Result<OwnedFd> {
        self.open_link(&format!("fd/{number}"))
    }

    /// Opens its root directory, as a place to look from. Keep it only for a moment: it
    /// keeps a container's mount busy.
    pub fn open_root(&self) -> io::Result<OwnedFd> {
        self.open_link("root")
    }

    /// Opens its working directory, where its relative paths begin.
    pub fn open_working_directory(&self) -> io::Result<OwnedFd> {
        self.open_link("cwd")
    }

    fn namespace(&self, link: &str) -> io::Result<u64> {
        use std::os::unix::fs::MetadataExt as _;
        let file = self.process.open_relative(link).map_err(into_io)?;
        Ok(file.metadata()?.ino())
    }

    /// Where its relative paths begin, as the kernel names that to us.
    pub fn cwd(&self) -> io::Result<Vec<u8>> {
        Ok(self.process.cwd().map_err(into_io)?.into_os_string().into_vec())
    }

    /// What one of its descriptors is, without opening it.
    pub fn descriptor(&self, number: u32) -> io::Result<Descriptor> {
        use std::os::unix::ffi::OsStrExt as _;
        let path = format!("/proc/{}/fd/{number}", self.process.pid);
        let link = std::fs::read_link(&path)?;
        Ok(match Descriptor::parse(link.as_os_str().as_bytes()) {
            Some(descriptor) => descriptor,
            // What the kernel knows of it is enough: a filesystem of somebody's own
            // must not be asked.
            None => self.named_descriptor(number, &super::file::stat_path(&path)?),
        })
    }

    /// A descriptor of something that has a name in a filesystem.
    fn named_descriptor(&self, number: u32, stat: &super::file::Stat) -> Descriptor {
        let terminal = terminal_number(stat.node);
        match stat.file_type {
            FileType::Fifo => Descriptor::Pipe { device: stat.device, inode: stat.inode },
            FileType::CharDevice if stat.node == PTMX => {
                self.terminal_of(number).map_or(Descriptor::Other, Descriptor::TerminalMaster)
            }
            FileType::CharDevice => terminal.map_or(Descriptor::Other, Descriptor::Terminal),
            _ => Descriptor::Other,
        }
    }

    /// The number of the terminal that is reached by this descriptor of /dev/ptmx
    /// (Linux 4.14).
    fn terminal_of(&self, number: u32) -> Option<u32> {
        let info = self.read(&format!("fdinfo/{number}"), 4096).ok()?;
        field(&info, "tty-index:")?.parse().ok()
    }

    /// Whether one of its descriptors is a terminal. `None` if it has no such one.
    pub fn is_terminal(&self, number: u32) -> Option<bool> {
        use std::os::unix::ffi::OsStrExt as _;
        let link = std::fs::read_link(format!("/proc/{}/fd/{number}", self.process.pid)).ok()?;
        let name = link.as_os_str().as_bytes();
        Some(name.starts_with(b"/dev/pts/") || name == b"/dev/console")
    }

    /// Opens the file that is mapped there, only to ask what it is.
    pub fn open_mapped(&self, start: u64, end: u64) -> io::Result<OwnedFd> {
        self.patiently(move |pid| {
            super::door::open_link(&format!("/proc/{pid}/map_files/{start:x}-{end:x}"))
        })
        .and_then(|file| self.if_still_there(file))
    }

    /// Follows one link of the kernel's own in /proc/PID.
    fn open_link(&self, name: &str) -> io::Result<OwnedFd> {
        let path = format!("/proc/{}/{name}", self.process.pid);
        let fd = super::door::open_link(&path)?;
        // The pid is this process's as long as its directory answers.
        self.stat()?;
        Ok(fd)
    }

    /// Its descriptors' numbers, not more than `limit`.
    pub fn descriptors(&self, limit: usize) -> io::Result<Vec<u32>> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.process.pid))?;
        Ok(entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .take(limit)
            .collect())
    }

    /// What the kernel calls what it has open as `number`.
    pub fn descriptor_name(&self, number: u32) -> io::Result<Vec<u8>> {
        let link = std::fs::read_link(format!("/proc/{}/fd/{number}", self.process.pid))?;
        Ok(link.into_os_string().into_vec())
    }

    /// Whether a descriptor can be read from, and written to. By the link's own mode: for
    /// fdinfo the kernel would ask what is open there.
    pub fn access(&self, number: u32) -> io::Result<(bool, bool)> {
        use std::os::unix::fs::MetadataExt as _;
        let link = std::fs::symlink_metadata(format!("/proc/{}/fd/{number}", self.process.pid))?;
        Ok((link.mode() & 0o400 != 0, link.mode() & 0o200 != 0))
    }

    /// The connections in its network namespace, by the socket's inode.
    pub fn connections(&self) -> HashMap<u64, Connection> {
        let tables = ["net/tcp", "net/tcp6", "net/udp", "net/udp6"];
        let tables = tables.iter().filter_map(|table| self.read(table, MAX_TABLE_BYTES).ok());
        let sockets: Vec<Socket> = tables.flat_map(|table| parse_sockets(&table)).collect();
        let listening: HashSet<u16> =
            sockets.iter().filter(|socket| socket.listens).map(|socket| socket.port).collect();
        let connected = sockets.into_iter().filter_map(|socket| {
            let (remote, is_accepted) = (socket.remote?, listening.contains(&socket.port));
            Some((socket.inode, Connection { remote: remote.to_string(), is_accepted }))
        });
        connected.collect()
    }

    /// What it has mapped as code from files.
    pub fn mapped_code(&self) -> io::Result<Vec<Mapping>> {
        let maps = self.read_memory("maps", MAX_TABLE_BYTES)?;
        Ok(maps.split(|&byte| byte == b'\n').filter_map(Mapping::parse).collect())
    }

    /// Its root directory, as the root of its mount namespace sees it: `/` unless it
    /// has changed it (chroot).
    pub fn root(&self) -> io::Result<Vec<u8>> {
        Ok(self.process.root().map_err(into_io)?.into_os_string().into_vec())
    }

    /// Where its program's file is reached from here, whatever its name leads to now.
    pub fn exe_path(&self) -> PathBuf {
        format!("/proc/{}/exe", self.process.pid).into()
    }

    pub fn mountinfo(&self) -> io::Result<Vec<u8>> {
        self.read("mountinfo", 16 << 20)
    }

    /// Where this process's root directory is reached from here.
    pub fn root_path(&self) -> PathBuf {
        format!("/proc/{}/root", self.process.pid).into()
    }
}

/// What a descriptor refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Descriptor {
    /// By its inode, of any family.
    Socket(u64),
    /// A pipe, or a FIFO.
    Pipe {
        device: u64,
        inode: u64,
    },
    /// A pseudo-terminal, by its number in its own instance of devpts.
    Terminal(u32),
    /// The other side of one, which whoever types into it holds.
    TerminalMaster(u32),
    Other,
}

/// A socket with another end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Address and port of the other end.
    pub remote: String,
    /// Its own port is one on which somebody here listens.
    pub is_accepted: bool,
}

/// `/dev/ptmx`, and the numbers of what it makes (Documentation/admin-guide/devices.txt).
const PTMX: (u32, u32) = (5, 2);

fn terminal_number((major, minor): (u32, u32)) -> Option<u32> {
    // 256 of each of eight numbers once; today all are minor numbers of the first.
    (136..=143).contains(&major).then(|| (major - 136) * 256 + minor)
}

/// What a line of `/proc/PID/fdinfo` says.
fn field<'a>(info: &'a [u8], name: &str) -> Option<&'a str> {
    let mut lines = info.split(|&byte| byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(name.as_bytes()))?;
    Some(str::from_utf8(value).ok()?.trim())
}

impl Descriptor {
    /// Reads the link of a descriptor; `None` for something that has a name in a
    /// filesystem, or in none.
    fn parse(link: &[u8]) -> Option<Descriptor> {
        // Such a text is no absolute path, so nobody else can have it.
        let number = |prefix: &[u8]| {
            str::from_utf8(link.strip_prefix(prefix)?.strip_suffix(b"]")?).ok()?.parse().ok()
        };
        if let Some(inode) = number(b"socket:[") {
            return Some(Descriptor::Socket(inode));
        }
        // Pipes without a name are all of one filesystem.
        number(b"pipe:[").map(|inode| Descriptor::Pipe { device: 0, inode })
    }
}

/// One line of /proc/PID/maps: code that is mapped from a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    pub is_shared: bool,
    pub device: u64,
    pub inode: u64,
    /// As the kernel names it to us, ` (deleted)` and all.
    pub name: Vec<u8>,
}

impl Mapping {
    fn parse(line: &[u8]) -> Option<Mapping> {
        // ADDRESSES PERMISSIONS OFFSET DEVICE INODE, spaces, NAME
        let mut fields = line.splitn(6, |&byte| byte == b' ');
        let mut field = || fields.next().and_then(|field| str::from_utf8(field).ok());
        let (start, end) = field()?.split_once('-')?;
        let permissions = field()?.as_bytes();
        let _offset = field()?;
        let (major, minor) = field()?.split_once(':')?;
        let inode = field()?.parse().ok().filter(|inode| *inode != 0)?;
        let hexadecimal = |text| u32::from_str_radix(text, 16).ok();
        if permissions.get(2) != Some(&b'x') {
            return None;
        }
        Some(Mapping {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            is_shared: permissions.get(3) == Some(&b's'),
            device: rustix::fs::makedev(hexadecimal(major)?, hexadecimal(minor)?),
            inode,
            name: unescape_newlines(fields.next()?.trim_ascii_start()),
        })
    }
}

/// In maps only a newline is escaped.
fn unescape_newlines(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&byte, after)) = rest.split_first() {
        if let Some(behind) = rest.strip_prefix(br"\012") {
            plain.push(b'\n');
            rest = behind;
        } else {
            plain.push(byte);
            rest = after;
        }
    }
    plain
}

/// A line of /proc/PID/net/tcp and its like.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    inode: u64,
    port: u16,
    listens: bool,
    remote: Option<SocketAddr>,
}

fn parse_sockets(table: &[u8]) -> Vec<Socket> {
    /// `TCP_LISTEN`; no socket of UDP is in this state.
    const LISTENS: &str = "0A";
    let lines = table.split(|&byte| byte == b'\n').skip(1);
    let parsed = lines.filter_map(|line| {
        let fields: Vec<&str> = str::from_utf8(line).ok()?.split_ascii_whitespace().collect();
        // sl local remote st queues timer retransmits uid timeout inode
        let (_, own) = fields.get(1)?.split_once(':')?;
        let (address, port) = fields.get(2)?.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        let inode = fields.get(9)?.parse().ok().filter(|inode| *inode != 0)?;
        let words: Option<Vec<u32>> = (0..address.len() / 8)
            .map(|word| u32::from_str_radix(address.get(word * 8..word * 8 + 8)?, 16).ok())
            .collect();
        // Each word is printed as the machine holds it, and it holds the network's order.
        let bytes: Vec<u8> = words?.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let address: IpAddr = match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes).ok()?.into(),
            16 => <[u8; 16]>::try_from(bytes).ok()?.into(),
            _ => return None,
        };
        Some(Socket {
            inode,
            port: u16::from_str_radix(own, 16).ok()?,
            listens: fields.get(3) == Some(&LISTENS),
            remote: (port != 0).then(|| SocketAddr::new(address.to_canonical(), port)),
        })
    });
    parsed.collect()
}

fn stat_of(process: &Process) -> io::Result<Stat> {
    let mut file = process.open_relative("stat").map_err(into_io)?;
    let mut text = [0; 2048];
    let len = file.read(&mut text)?;
    Stat::parse(&text[..len]).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn into_io(err: procfs::ProcError) -> io::Error {
    match err {
        procfs::ProcError::Io(err, _) => err,
        procfs::ProcError::NotFound(_) => io::ErrorKind::NotFound.into(),
        procfs::ProcError::PermissionDenied(_) => io::ErrorKind::PermissionDenied.into(),
        other => io::Error::other(other.to_string()),
    }
}

/// Each argument of what /proc/PID/cmdline says, bounded.
pub fn split_arguments(cmdline: &[u8]) -> Option<Vec<Vec<u8>>> {
    if cmdline.is_empty() {
        return None;
    }
    let cmdline = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
    let arguments = cmdline
        .split(|&byte| byte == 0)
        .take(MAX_ARGUMENTS)
        .map(|argument| argument[..argument.len().min(MAX_ARGUMENT_BYTES)].to_vec());
    Some(arguments.collect())
}

fn parse_uid(status: &[u8]) -> Option<u32> {
    // The name, which comes first, cannot fake a line: the kernel escapes it.
    let line = status.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"Uid:"))?;
    // Real, effective, saved, filesystem.
    str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// The parents of a process, nearest first, up to and including the first one
/// outside `pid_namespace`, or, for containers that share the host's, in the
/// mount namespace of the host's init or our own: what is above is the host's
/// business. A parent is
/// younger than its child only if its pid has been used again, so there the chain
/// ends.
pub fn ancestors(stat: &Stat, pid_namespace: Option<u64>) -> Vec<Handle> {
    let host = host_mount_namespaces();
    let mut chain: Vec<Handle> = Vec::new();
    let mut child_start_time = stat.identity.start_time;
    let mut parent = stat.parent;
    while chain.len() < MAX_ANCESTORS {
        let Ok(handle) = Handle::open(parent) else { break };
        let stat = handle.first_stat();
        if stat.identity.start_time > child_start_time {
            break;
        }
        child_start_time = stat.identity.start_time;
        parent = stat.parent;
        let is_outside = (pid_namespace.is_some() && handle.pid_namespace().ok() != pid_namespace)
            || handle.mount_namespace().is_ok_and(|namespace| host.contains(&namespace));
        chain.push(handle);
        if is_outside {
            break;
        }
    }
    chain
}

/// A process and its parents on the host, nearest first; what began after its child
/// has another's pid, and ends the chain.
pub fn chain(pid: u32) -> Vec<Handle> {
    let mut chain: Vec<Handle> = Vec::new();
    let (mut next, mut started) = (pid, u64::MAX);
    while chain.len() < MAX_ANCESTORS
        && let Ok(handle) = Handle::open(next)
        && handle.identity().start_time <= started
    {
        started = handle.identity().start_time;
        next = handle.first_stat().parent;
        chain.push(handle);
    }
    chain
}

/// Whether this is the mount namespace of the host, or our own.
pub fn is_host_mount_namespace(namespace: u64) -> bool {
    host_mount_namespaces().contains(&namespace)
}

/// Whether this is the pid namespace of the host, or our own.
pub fn is_host_pid_namespace(namespace: u64) -> bool {
    static HOST: OnceLock<Vec<u64>> = OnceLock::new();
    let host = HOST.get_or_init(|| {
        [1, std::process::id()]
            .into_iter()
            .filter_map(|pid| Handle::open(pid).and_then(|host| host.pid_namespace()).ok())
            .collect()
    });
    host.contains(&namespace)
}

/// Names the mount namespace of a process by its pid alone: a hint, since the pid
/// may be another process's by now.
pub fn mount_namespace_of(pid: u32) -> io::Result<u64> {
    namespace_of(pid, "mnt")
}

/// The same for its pid namespace.
pub fn pid_namespace_of(pid: u32) -> io::Result<u64> {
    namespace_of(pid, "pid")
}

fn namespace_of(pid: u32, kind: &str) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;
    Ok(std::fs::metadata(format!("/proc/{pid}/ns/{kind}"))?.ino())
}

/// A process's group in perf's hierarchy, and whether that is the unified one;
/// `None` for its root, which is everybody's.
fn perf_cgroup_path(groups: &[u8]) -> Option<(bool, Vec<u8>)> {
    let mut found = None;
    for line in groups.split(|&byte| byte == b'\n') {
        let mut fields = line.splitn(3, |&byte| byte == b':');
        let (Some(number), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if controllers.split(|&byte| byte == b',').any(|name| name == b"perf_event") {
            found = Some((false, path.to_vec()));
            break;
        }
        if number == b"0" && controllers.is_empty() {
            found = Some((true, path.to_vec()));
        }
    }
    found.filter(|(_, path)| path.len() > 1)
}

/// Where the hierarchy of a controller of cgroup v1, or else the unified one, is mounted as
/// a whole.
pub(super) fn hierarchy_mount(mountinfo: &[u8], controller: Option<&[u8]>) -> Option<Vec<u8>> {
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let words: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let separator = words.iter().position(|word| *word == b"-")?;
        let (root, mount_point) = (words.get(3)?, words.get(4)?);
        let kind = *words.get(separator + 1)?;
        let options = words.get(separator + 3)?;
        let is_it = match controller {
            None => kind == b"cgroup2",
            Some(controller) => {
                kind == b"cgroup"
                    && options.split(|&byte| byte == b',').any(|option| option == controller)
            }
        };
        (is_it && *root == b"/").then(|| mount_point.to_vec())
    })
}

fn host_mount_namespaces() -> &'static [u64] {
    static HOST: OnceLock<Vec<u64>> = OnceLock::new();
    HOST.get_or_init(|| {
        [1, std::process::id()]
            .into_iter()
            .filter_map(|pid| Handle::open(pid).and_then(|host| host.mount_namespace()).ok())
            .collect()
    })
}

/// The time as processes' start times are told.
pub fn ticks_since_boot() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let per_second = rustix::param::clock_ticks_per_second();
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or_default();
    seconds * per_second + nanoseconds * per_second / 1_000_000_000
}

/// How long so many clock ticks last.
pub fn time_of_ticks(ticks: u64) -> Duration {
    let per_second = rustix::param::clock_ticks_per_second();
    Duration::from_secs(ticks / per_second)
        + Duration::from_nanos(ticks % per_second * 1_000_000_000 / per_second)
}

/// How many clock ticks a time lasts.
pub fn ticks_in(time: Duration) -> u64 {
    let per_second = rustix::param::clock_ticks_per_second();
    time.as_secs() * per_second + u64::from(time.subsec_nanos()) * per_second / 1_000_000_000
}

/// Every process there is. One that ends meanwhile is left out.
pub fn all() -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for process in procfs::process::all_processes().map_err(into_io)?.flatten() {
        pids.extend(u32::try_from(process.pid));
    }
    Ok(pids)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

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

    #[test]
    fn arguments_are_bounded_and_need_not_be_text() {
        assert_eq!(split_arguments(b""), None);
        let expected = vec![b"sh".to_vec(), b"\xff".to_vec(), b"".to_vec()];
        assert_eq!(split_arguments(b"sh\0\xff\0\0"), Some(expected));
        let many = split_arguments(&b"a\0".repeat(1000)).unwrap();
        assert_eq!(many.len(), MAX_ARGUMENTS);
        assert_eq!(split_arguments(&[b'a'; 9000]).unwrap()[0].len(), MAX_ARGUMENT_BYTES);
    }

    #[test]
    fn perfs_control_group_is_the_unified_one_unless_it_has_its_own() {
        let unified = b"3:cpuset:/\n0::/system.slice/x:y.scope\n";
        assert_eq!(perf_cgroup_path(unified), Some((true, b"/system.slice/x:y.scope".to_vec())));
        let own = b"0::/unified\n4:cpu,perf_event:/pods/a\n";
        assert_eq!(perf_cgroup_path(own), Some((false, b"/pods/a".to_vec())));
        assert_eq!(perf_cgroup_path(b"0::/\n"), None);
        let mountinfo = b"41 31 0:38 / /sys/fs/cgroup rw shared:1 - cgroup2 cgroup2 rw\n\
            42 31 0:39 / /sys/fs/cgroup/perf rw - cgroup cgroup rw,cpu,perf_event\n";
        assert_eq!(hierarchy_mount(mountinfo, None), Some(b"/sys/fs/cgroup".to_vec()));
        assert_eq!(
            hierarchy_mount(mountinfo, Some(b"perf_event")),
            Some(b"/sys/fs/cgroup/perf".to_vec())
        );
        assert_eq!(hierarchy_mount(b"", None), None);
    }

    #[test]
    fn our_own_facts_are_read() {
        let me = Handle::open(std::process::id()).unwrap();
        assert_eq!(me.exe().unwrap(), std::env::current_exe().unwrap().into_os_string().into_vec());
        let arguments: Vec<Vec<u8>> =
            std::env::args_os().map(OsStringExt::into_vec).take(MAX_ARGUMENTS).collect();
        assert_eq!(me.arguments().unwrap(), Some(arguments));
        assert_eq!(me.uid().unwrap(), rustix::process::geteuid().as_raw());
        let (started, now) = (me.identity().start_time, ticks_since_boot());
        assert!(started <= now && now - started < 100 * 3600, "{started} and {now}");
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get();
        let chain = ancestors(me.first_stat(), None);
        assert_eq!(chain[0].identity().pid, u32::try_from(parent).unwrap());
    }

    #[test]
    fn a_process_that_is_gone_is_an_error_and_no_surprise() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let handle = Handle::open(child.id()).unwrap();
        child.wait().unwrap();
        assert_eq!(handle.exe().ok(), None);
        assert_eq!(handle.stat().ok(), None);
        assert!(Handle::open_exactly(handle.identity()).ok().is_none());
        assert!(Handle::open(0).ok().is_none());
    }

    #[test]
    fn descriptors_are_known_by_their_links() {
        assert_eq!(Descriptor::parse(b"socket:[17]"), Some(Descriptor::Socket(17)));
        let pipe = Descriptor::Pipe { device: 0, inode: 18 };
        assert_eq!(Descriptor::parse(b"pipe:[18]"), Some(pipe));
        assert_eq!(Descriptor::parse(b"/tmp/socket:[17]"), None);
        assert_eq!(Descriptor::parse(b"anon_inode:[eventfd]"), None);
    }

    #[test]
    fn connections_are_read_from_the_kernels_tables() {
        let table = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            \x20  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0\n\
            \x20  1: 0100007F:A1B2 0100007F:115C 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0\n";
        let told = |table: &[u8]| {
            let sockets = parse_sockets(table).into_iter();
            sockets
                .map(|Socket { inode, port, listens, remote }| {
                    (inode, port, listens, remote.map(|remote| remote.to_string()))
                })
                .collect::<Vec<_>>()
        };
        let to = |remote: &str| Some(remote.to_owned());
        let expected = [(11, 8080, true, None), (12, 0xa1b2, false, to("127.0.0.1:4444"))];
        assert_eq!(told(table), expected);
        let table = b"  sl  local_address remote_address st\n\
            \x20  0: 00000000000000000000000001000000:1 B80D0120000000000000000001000000:01BB 01 0:0 00:0 0 0 0 13 1\n\
            \x20  1: 0000000000000000FFFF00000100007F:1 0000000000000000FFFF00000100007F:115C 01 0:0 00:0 0 0 0 14 1\n";
        let expected =
            [(13, 1, false, to("[2001:db8::1]:443")), (14, 1, false, to("127.0.0.1:4444"))];
        assert_eq!(told(table), expected);
    }

    #[test]
    fn mapped_code_is_read_and_nothing_else() {
        let parse = |line: &str| Mapping::parse(line.as_bytes());
        let expected = Mapping {
            start: 0x7f00,
            end: 0x8000,
            is_shared: false,
            device: rustix::fs::makedev(0, 0x27),
            inode: 99,
            name: b"/tmp/a b.so\n (deleted)".to_vec(),
        };
        let line = "7f00-8000 r-xp 00001000 00:27 99        /tmp/a b.so\\012 (deleted)";
        assert_eq!(parse(line), Some(expected));
        assert_eq!(parse("7f00-8000 rw-p 00001000 00:27 99   /tmp/a.so"), None);
        assert_eq!(parse("7f00-8000 r-xp 00000000 00:00 0    [vdso]"), None);
        assert_eq!(parse(""), None);
    }

    #[test]
    fn our_own_code_and_descriptors_are_found() {
        let me = Handle::open(std::process::id()).unwrap();
        let (own, device) = {
            let stat = super::super::file::stat_path("/proc/self/exe").unwrap();
            (stat.inode, stat.device)
        };
        let mapped = me.mapped_code().unwrap();
        let own = mapped.iter().find(|one| (one.inode, one.device) == (own, device)).unwrap();
        let file = me.open_mapped(own.start, own.end).unwrap();
        assert_eq!(super::super::file::stat(&file).unwrap().inode, own.inode);
        let (_reader, writer) = std::io::pipe().unwrap();
        let writer = u32::try_from(std::os::fd::AsRawFd::as_raw_fd(&writer)).unwrap();
        assert!(matches!(me.descriptor(writer).unwrap(), Descriptor::Pipe { .. }));
        assert_eq!(me.access(writer).unwrap(), (false, true));
        assert!(me.descriptors(4096).unwrap().contains(&writer));
    }

    #[test]
    fn a_connection_of_our_own_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = std::net::TcpStream::connect(address).unwrap();
        let me = Handle::open(std::process::id()).unwrap();
        let number = u32::try_from(std::os::fd::AsRawFd::as_raw_fd(&stream)).unwrap();
        let Descriptor::Socket(inode) = me.descriptor(number).unwrap() else { panic!() };
        let expected = Connection { remote: address.to_string(), is_accepted: false };
        assert_eq!(me.connections().get(&inode), Some(&expected));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_tables_or_none(text: Vec<u8>) {
            let _ = Mapping::parse(&text);
            let _ = parse_sockets(&text);
            let _ = Descriptor::parse(&text);
        }

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
