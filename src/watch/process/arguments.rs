//! Remembers the recent executions of containers' processes and their arguments, by the
//! kernel's records: for processes that have ended, because /proc no longer shows them.
//!
//! The trace fills it; other threads ask, mostly within milliseconds. They ask for the first
//! execve after a time. So an execve is kept even if its arguments are not known: otherwise
//! the arguments of a later one would be taken for its own. It reads nothing itself, and what
//! it keeps is bounded.

use std::collections::{HashMap, VecDeque};

use crate::model::printable;
use crate::sys::{file, procfs};

/// Bounds; the oldest executions are forgotten.
const MAX_EXECUTIONS: usize = 4 * 1024;
const MAX_BYTES: usize = 4 << 20;
const MAX_EARLY: usize = 256;

/// All times are of the clock of the kernel's records.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    executions: HashMap<u32, Vec<Execution>>,
    /// The executions in order: time and process.
    order: VecDeque<(u64, u32)>,
    bytes: usize,
    /// For an execve whose record has not been read: when the gate was asked, and what was
    /// read of the process.
    early: HashMap<u32, (u64, Box<ReadProgram>)>,
    /// Executions before this time may be forgotten.
    forgotten: u64,
}

#[derive(Debug)]
struct Execution {
    time: u64,
    /// The path that was given to execve.
    name: Box<[u8]>,
    /// The file that was mapped first: for a script, its interpreter.
    program: Box<[u8]>,
    /// In the format of /proc/PID/cmdline.
    arguments: Option<Box<[u8]>>,
    /// What was read from /proc, if `arguments` is not known.
    found: Option<Box<ReadProgram>>,
}

/// The program that a process ran, as far as it is recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) exe: Option<String>,
    pub(crate) argv: Option<Vec<String>>,
}

/// The program of a process, as read from /proc.
#[derive(Debug)]
pub(crate) struct ReadProgram {
    pub(crate) exe: Option<String>,
    pub(crate) argv: Vec<String>,
}

impl ReadProgram {
    fn bytes(&self) -> usize {
        self.exe.iter().chain(&self.argv).map(|text| size_of::<String>() + text.len()).sum()
    }
}

impl Execution {
    fn bytes(&self) -> usize {
        self.name.len()
            + self.program.len()
            + self.arguments.as_ref().map_or(0, |arguments| arguments.len())
            + self.found.as_ref().map_or(0, |found| found.bytes())
    }
}

/// The recorded arguments of the first execve of a process after a time.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Recorded {
    Arguments(Box<[u8]>),
    Unknown,
    /// There was no execve, or its record has not been read.
    NotYet,
}

impl Arguments {
    pub(crate) fn executed(&mut self, pid: u32, time: u64, arguments: Option<Box<[u8]>>) {
        let early = self.early.remove(&pid).filter(|(asked, _)| *asked <= time);
        let found = early.map(|(_, found)| found).filter(|_| arguments.is_none());
        let (name, program) = (Box::default(), Box::default());
        let execution = Execution { time, name, program, arguments, found };
        self.bytes += execution.bytes();
        self.executions.entry(pid).or_default().push(execution);
        self.order.push_back((time, pid));
        self.keep_bounds();
    }

    /// Adds the path of a process's last execve, and the program that it runs.
    pub(crate) fn named(&mut self, pid: u32, name: &[u8], program: &[u8]) {
        let last = self.executions.get_mut(&pid).and_then(|executions| executions.last_mut());
        if let Some(execution) = last {
            self.bytes += name.len() + program.len();
            execution.name = name.into();
            execution.program = program.into();
            self.keep_bounds();
        }
    }

    /// The path of the first execve of a process from `since` on, and not after `until`.
    pub(crate) fn name_of(&self, pid: u32, since: u64, until: u64) -> Option<Box<[u8]>> {
        let mut executions = self.executions.get(&pid)?.iter();
        let first = executions.find(|execution| execution.time >= since)?;
        let is_it = since > self.forgotten && first.time <= until && !first.name.is_empty();
        is_it.then(|| first.name.clone())
    }

    /// Whether a process has executed once since this time, and no more.
    pub(crate) fn is_last(&self, pid: u32, since: u64) -> bool {
        let executions = self.executions.get(&pid).into_iter().flatten();
        since > self.forgotten && executions.filter(|one| one.time >= since).count() == 1
    }

    /// The program that a process ran at this time, with its arguments.
    pub(crate) fn running(&self, pid: u32, at: u64) -> Option<Program> {
        let mut executions = self.executions.get(&pid)?.iter().rev();
        let last = executions.find(|execution| execution.time <= at)?;
        let program = last.program.strip_suffix(file::DELETED).unwrap_or(&last.program);
        let exe = (!program.is_empty()).then(|| printable(program));
        let recorded = last.arguments.as_deref().and_then(procfs::split_arguments);
        let recorded =
            recorded.map(|argv| argv.iter().map(|argument| printable(argument)).collect());
        let found = || last.found.as_ref().map(|found| found.argv.clone());
        let argv = recorded.or_else(found);
        let exe = exe.or_else(|| last.found.as_ref()?.exe.clone());
        Some(Program { exe, argv })
    }

    /// Adds the arguments of a process's last execve, if its record had none.
    pub(crate) fn add(&mut self, pid: u32, arguments: Box<[u8]>) {
        let last = self.executions.get_mut(&pid).and_then(|executions| executions.last_mut());
        if let Some(Execution { arguments: unknown @ None, .. }) = last {
            self.bytes += arguments.len();
            *unknown = Some(arguments);
            self.keep_bounds();
        }
    }

    /// Adds what was read of a process after the gate was asked about it.
    pub(crate) fn found(&mut self, pid: u32, asked: u64, read: ReadProgram) {
        let executions = self.executions.get_mut(&pid).into_iter().flatten();
        match executions.into_iter().find(|execution| execution.time >= asked) {
            Some(execution @ Execution { arguments: None, found: None, .. }) => {
                self.bytes += read.bytes();
                execution.found = Some(Box::new(read));
                self.keep_bounds();
            }
            Some(_) => (),
            None => {
                if self.early.len() >= MAX_EARLY {
                    self.early.clear();
                }
                self.early.insert(pid, (asked, Box::new(read)));
            }
        }
    }

    /// What was read of a process after its execve at this time.
    pub(crate) fn found_of(&self, pid: u32, time: u64) -> Option<&ReadProgram> {
        let execution = self.executions.get(&pid)?.iter().find(|one| one.time == time)?;
        execution.found.as_deref()
    }

    /// Records were lost: a kept execve may not be the first after a time any more.
    pub(crate) fn forget_all(&mut self, now: u64) {
        *self = Arguments { forgotten: now, ..Arguments::default() };
    }

    /// The arguments of the first execve of a process from `since` on, and not after `until`.
    pub(crate) fn of(&self, pid: u32, since: u64, until: u64) -> Recorded {
        if since <= self.forgotten {
            return Recorded::Unknown;
        }
        let mut executions = self.executions.get(&pid).into_iter().flatten();
        match executions.find(|execution| execution.time >= since) {
            Some(execution) if execution.time > until => Recorded::Unknown,
            Some(Execution { arguments: Some(arguments), .. }) => {
                Recorded::Arguments(arguments.clone())
            }
            Some(Execution { arguments: None, .. }) => Recorded::Unknown,
            None => Recorded::NotYet,
        }
    }

    fn keep_bounds(&mut self) {
        while (self.order.len() > MAX_EXECUTIONS || self.bytes > MAX_BYTES)
            && let Some((time, pid)) = self.order.pop_front()
        {
            self.forgotten = time;
            // The executions of each process are in order too.
            if let Some(executions) = self.executions.get_mut(&pid) {
                self.bytes -= executions.remove(0).bytes();
                if executions.is_empty() {
                    self.executions.remove(&pid);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Option<Box<[u8]>> {
        Some(text.as_bytes().into())
    }

    #[track_caller]
    fn check(kept: &Arguments, pid: u32, since: u64, expected: &str) {
        let found = match kept.of(pid, since, since + 100) {
            Recorded::Arguments(arguments) => String::from_utf8(arguments.into()).unwrap(),
            other @ (Recorded::Unknown | Recorded::NotYet) => format!("{other:?}"),
        };
        assert_eq!(found, expected);
    }

    #[test]
    fn w15_the_program_of_an_ended_process_is_known() {
        let mut kept = Arguments::default();
        kept.executed(7, 10, text("bash\0-c\0x"));
        kept.named(7, b"bash", b"/bin/bash");
        kept.executed(7, 20, None);
        kept.named(7, b"/tmp/x", b"/tmp/x (deleted)");
        let argv = ["bash", "-c", "x"].map(ToOwned::to_owned).to_vec();
        let bash = Program { exe: Some("/bin/bash".into()), argv: Some(argv) };
        assert_eq!(kept.running(7, 9), None);
        assert_eq!(kept.running(7, 15), Some(bash));
        let other = Program { exe: Some("/tmp/x".into()), argv: None };
        assert_eq!(kept.running(7, 25), Some(other));
        assert_eq!(kept.running(8, 25), None);
    }

    #[test]
    fn the_first_execve_after_a_time_is_returned_and_not_a_later_one() {
        let mut kept = Arguments::default();
        kept.executed(7, 10, text("a"));
        kept.executed(7, 20, None);
        kept.executed(7, 30, text("c"));
        kept.executed(8, 40, None);
        check(&kept, 7, 5, "a");
        check(&kept, 7, 11, "Unknown");
        check(&kept, 7, 21, "c");
        check(&kept, 7, 31, "NotYet");
        check(&kept, 9, 5, "NotYet");
        assert_eq!(kept.of(7, 21, 29), Recorded::Unknown);
        kept.add(7, text("x").unwrap());
        check(&kept, 7, 21, "c");
        kept.add(8, text("d").unwrap());
        check(&kept, 8, 31, "d");
        assert_eq!([5, 21, 31].map(|since| kept.is_last(7, since)), [false, true, false]);
    }

    #[test]
    fn what_was_read_belongs_to_the_first_execve_after_the_request() {
        let read = |argv: &str| ReadProgram { exe: None, argv: vec![argv.to_owned()] };
        let of = |kept: &Arguments, pid, time| Some(kept.found_of(pid, time)?.argv.concat());
        let mut kept = Arguments::default();
        // Read before the record, and after it.
        kept.found(7, 5, read("a"));
        kept.executed(7, 10, None);
        kept.executed(7, 20, None);
        kept.found(7, 15, read("b"));
        assert_eq!(of(&kept, 7, 10).as_deref(), Some("a"));
        assert_eq!(of(&kept, 7, 20).as_deref(), Some("b"));
        assert_eq!(of(&kept, 7, 15), None);
        // The request came after the execve: what was read belongs to another execve.
        kept.found(8, 30, read("c"));
        kept.executed(8, 25, None);
        assert_eq!(of(&kept, 8, 25), None);
        // The kernel's record is preferred.
        kept.executed(9, 40, text("d"));
        kept.found(9, 35, read("e"));
        assert_eq!(of(&kept, 9, 40), None);
        for pid in 100..1_000 {
            kept.found(pid, 1, read("x"));
        }
        assert!(kept.early.len() <= MAX_EARLY);
    }

    #[test]
    fn executions_that_may_be_forgotten_are_unknown() {
        let mut kept = Arguments::default();
        let all = u32::try_from(MAX_EXECUTIONS).unwrap();
        for pid in 1..=all {
            kept.executed(pid, pid.into(), text("a"));
        }
        check(&kept, 1, 1, "a");
        kept.executed(1, 10_000, text("b"));
        check(&kept, 1, 1, "Unknown");
        check(&kept, 2, 2, "a");
        assert_eq!((kept.order.len(), kept.bytes), (MAX_EXECUTIONS, MAX_EXECUTIONS));
        kept.executed(2, 10_001, Some(vec![0; MAX_BYTES].into()));
        assert_eq!((kept.order.len(), kept.bytes), (1, MAX_BYTES));
        kept.forget_all(20_000);
        check(&kept, 2, 10_001, "Unknown");
        assert!(kept.executions.is_empty());
    }
}
