//! What was decided a moment ago about reads of guarded files: a program reads a file in many
//! small parts, and is asked about once.
//!
//! Only a table: nothing here reads, opens or answers anything. `process` answers.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::unchanged::File;
use crate::sys::fanotify::{Answer, Range};
use crate::sys::file;
use crate::sys::procfs::{ArgumentArea, Stat};

/// How long a decision counts.
const MOMENT: Duration = Duration::from_secs(1);

/// How long a thread that reads a file again and again is not looked at. Meanwhile it could
/// become another program: that one is killed if it may not read the file.
const INSTANT: Duration = Duration::from_millis(20);

/// How many are remembered. Then all are forgotten, and asked about again.
const MOST: usize = 4 * 1024;

/// A thread reads a part of a file, whatever it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Part {
    thread: u32,
    file: File,
    /// Nothing but its header: what is decided about the rest does not count for it.
    is_head: bool,
}

impl Part {
    pub(super) fn of(thread: u32, file: &file::Stat, range: Option<Range>) -> Part {
        Part { thread, file: File::of(file), is_head: range.is_none_or(Range::is_head) }
    }
}

/// The same, by the program that the thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Read {
    part: Part,
    /// The thread's: its number is used again.
    start_time: u64,
    /// Another execve has another one.
    program: ArgumentArea,
}

impl Read {
    pub(super) fn of(stat: &Stat, part: Part) -> Read {
        Read { part, start_time: stat.identity.start_time, program: stat.area }
    }
}

#[derive(Debug, Default)]
pub(super) struct Reads {
    /// By the number under which they wait.
    asked: HashMap<u64, Read>,
    decided: HashMap<Read, (Answer, Instant)>,
    let_through: HashMap<Part, Instant>,
}

impl Reads {
    pub(super) fn asked(&mut self, number: u64, read: Read) {
        self.asked.insert(number, read);
    }

    /// A question was answered; without a decision it is asked again.
    pub(super) fn answered(&mut self, number: u64, decided: Option<Answer>) {
        let Some((read, answer)) = self.asked.remove(&number).zip(decided) else { return };
        if self.decided.len() >= MOST {
            self.decided.clear();
        }
        self.decided.insert(read, (answer, Instant::now()));
    }

    pub(super) fn let_through(&mut self, part: Part) {
        if self.let_through.len() >= MOST {
            self.let_through.clear();
        }
        self.let_through.insert(part, Instant::now());
    }

    pub(super) fn is_let_through(&self, part: &Part) -> bool {
        self.let_through.get(part).is_some_and(|at| at.elapsed() < INSTANT)
    }

    pub(super) fn decision(&self, read: &Read) -> Option<Answer> {
        let (answer, at) = self.decided.get(read)?;
        (at.elapsed() < MOMENT).then_some(*answer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FileTime, FileType, ProcessIdentity};

    fn file(inode: u64, changed: i64) -> file::Stat {
        let time = FileTime { seconds: changed, nanoseconds: 0 };
        file::Stat {
            device: 1,
            inode,
            born: None,
            changed: time,
            modified: time,
            file_type: FileType::Regular,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 1,
            links: 1,
            node: (0, 0),
            mount: None,
        }
    }

    fn process(pid: u32, arguments: u64) -> Stat {
        Stat {
            identity: ProcessIdentity { pid, start_time: 1 },
            comm: Box::default(),
            state: b'R',
            parent: 1,
            session: 1,
            tty_nr: 0,
            area: ArgumentArea { arguments: (arguments, 1), environment: (1, 1) },
        }
    }

    #[test]
    fn a_decision_counts_for_this_program_and_this_content_alone() {
        let head = Some(Range { offset: 0, length: 4096 });
        let whole = Some(Range { offset: 0, length: 131_072 });
        let read_by = |pid: u32, arguments: u64, file: file::Stat, range| {
            Read::of(&process(pid, arguments), Part::of(pid, &file, range))
        };
        let read = read_by(7, 5, file(3, 9), head);
        let mut reads = Reads::default();
        reads.asked(1, read);
        assert_eq!(reads.decision(&read), None);
        reads.answered(1, Some(Answer::Deny));
        assert_eq!(reads.decision(&read), Some(Answer::Deny));
        for other in [
            read_by(8, 5, file(3, 9), head),
            // It has executed another program.
            read_by(7, 6, file(3, 9), head),
            read_by(7, 5, file(4, 9), head),
            read_by(7, 5, file(3, 10), head),
            // To copy a library is not to load it.
            read_by(7, 5, file(3, 9), whole),
        ] {
            assert_eq!(reads.decision(&other), None, "{other:?}");
        }
    }

    #[test]
    fn what_was_not_decided_is_asked_again_and_the_table_is_bounded() {
        let mut reads = Reads::default();
        let read = |inode| Read::of(&process(7, 5), Part::of(7, &file(inode, 9), None));
        reads.asked(1, read(0));
        reads.answered(1, None);
        assert_eq!(reads.decision(&read(0)), None);
        for number in 0..10_000 {
            reads.asked(number, read(number));
            reads.answered(number, Some(Answer::Allow));
        }
        assert!(reads.decided.len() <= MOST && reads.asked.is_empty());
        assert_eq!(reads.decision(&read(9_999)), Some(Answer::Allow));
    }
}
