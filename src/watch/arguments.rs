//! With what arguments containers' processes have become programs, by the kernel's
//! records: for who asks when the process has ended, and /proc tells nothing.
//!
//! The trace fills it and others ask, mostly within milliseconds. What is asked for
//! is the first execve after a time, so an execve is kept also if its arguments are
//! not known: or those of a later one would be taken for its own.

use std::collections::{HashMap, VecDeque};

/// Bounds for what is kept; the oldest is forgotten.
const MAX_EXECUTIONS: usize = 4 * 1024;
const MAX_BYTES: usize = 4 << 20;

/// Times are of the records' clock.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    executions: HashMap<u32, Vec<Execution>>,
    /// Each of them, by time and process.
    order: VecDeque<(u64, u32)>,
    bytes: usize,
    /// Of what was executed before this, some may be forgotten.
    forgotten: u64,
}

#[derive(Debug)]
struct Execution {
    time: u64,
    /// As /proc/PID/cmdline has them.
    arguments: Option<Box<[u8]>>,
}

impl Execution {
    fn bytes(&self) -> usize {
        self.arguments.as_ref().map_or(0, |arguments| arguments.len())
    }
}

/// What is known of the first execve of a process after a time.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Recorded {
    Arguments(Box<[u8]>),
    Unknown,
    /// There was none, or its record has not been read.
    NotYet,
}

impl Arguments {
    pub(super) fn executed(&mut self, pid: u32, time: u64, arguments: Option<Box<[u8]>>) {
        let execution = Execution { time, arguments };
        self.bytes += execution.bytes();
        self.executions.entry(pid).or_default().push(execution);
        self.order.push_back((time, pid));
        self.keep_bounds();
    }

    /// The arguments of a process's last execve, if that came without.
    pub(super) fn add(&mut self, pid: u32, arguments: Box<[u8]>) {
        let last = self.executions.get_mut(&pid).and_then(|executions| executions.last_mut());
        if let Some(Execution { arguments: unknown @ None, .. }) = last {
            self.bytes += arguments.len();
            *unknown = Some(arguments);
            self.keep_bounds();
        }
    }

    /// Records were lost: nobody knows whether what is kept is the first.
    pub(super) fn forget_all(&mut self, now: u64) {
        *self = Arguments { forgotten: now, ..Arguments::default() };
    }

    /// Of the first execve of a process from `since` on, and not after `until`.
    pub(super) fn of(&self, pid: u32, since: u64, until: u64) -> Recorded {
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
            // Each process's are in order too.
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
    fn the_first_execve_after_a_time_is_told_and_not_a_later_one() {
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
    }

    #[test]
    fn what_may_be_forgotten_is_unknown() {
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
