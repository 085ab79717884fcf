//! What container runtimes are called for, by their own arguments: a session's command
//! may be over before anybody can look at it, or have become another program.
//!
//! A runtime takes some milliseconds to prepare what it executes. It is looked at when
//! the kernel records that it was called, or at the latest when the gate is asked.

use std::collections::{HashMap, VecDeque};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::model::{ProcessIdentity, printable};
use crate::sys::file;
use crate::sys::procfs::{self, Handle};
use crate::watch::core::watched::Watched;

const MAX_DOCUMENT: u64 = 1 << 20;
const MAX_ARGUMENTS: usize = 128;
/// Calls that are remembered, and for how long.
const MAX_CALLS: usize = 1024;
const KEPT: Duration = Duration::from_secs(60);
/// How long what it prepares may take to begin.
const BEGINS_WITHIN: Duration = Duration::from_secs(5);

/// The calls of lately, by the runtimes' pids.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    calls: HashMap<u32, (Instant, Call)>,
    /// Runtimes whose call was read when what they execute was seen: the record of their
    /// own start may be read after that, and must not be taken for another's.
    answered: VecDeque<ProcessIdentity>,
}

/// One call of a runtime.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    runtime: ProcessIdentity,
    arguments: Vec<Vec<u8>>,
    /// The arguments in the document that they name.
    document: Option<Vec<String>>,
}

/// What a runtime was asked to execute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) argv: Vec<String>,
    /// The runtime had ended, and this is the only call that can be meant.
    pub(crate) is_guess: bool,
}

impl Calls {
    pub(crate) fn keep(&mut self, call: Call) {
        if self.answered.contains(&call.runtime) {
            return;
        }
        if self.calls.len() >= MAX_CALLS {
            self.calls.retain(|_, (since, _)| since.elapsed() < KEPT);
        }
        if self.calls.len() < MAX_CALLS {
            self.calls.insert(call.runtime.pid, (Instant::now(), call));
        }
    }

    /// The only call that can be meant, where the runtime has ended and nobody knows
    /// which it was.
    fn take_only(&mut self, id: &[u8]) -> Option<Call> {
        let is_meant = |(since, call): &(Instant, Call)| {
            since.elapsed() < BEGINS_WITHIN && call.arguments.iter().any(|argument| argument == id)
        };
        let mut meant = self.calls.iter().filter(|(_, call)| is_meant(call)).map(|(pid, _)| *pid);
        let only = meant.next().filter(|_| meant.next().is_none())?;
        self.take(only)
    }

    fn take(&mut self, pid: u32) -> Option<Call> {
        self.calls.remove(&pid).filter(|(since, _)| since.elapsed() < KEPT).map(|(_, call)| call)
    }

    /// The call of the runtime that has this number now, or had it last.
    fn of(&mut self, pid: u32) -> Option<Call> {
        let living = Handle::open(pid).ok().map(|handle| handle.identity());
        let is_its = |call: &Call| living.is_none_or(|living| living == call.runtime);
        if let Some(call) = self.take(pid).filter(is_its) {
            return Some(call);
        }
        let call = read(pid)?;
        self.answer(call.runtime);
        Some(call)
    }

    fn answer(&mut self, runtime: ProcessIdentity) {
        if self.answered.len() == MAX_CALLS {
            self.answered.pop_front();
        }
        self.answered.push_back(runtime);
    }
}

/// What a runtime was asked to execute in a container. `is_by_runtime`: the process was
/// a runtime's just now; then it need not be known any more which one's.
pub(crate) fn asked_for(
    calls: &mut Calls,
    pid: u32,
    watched: &Watched,
    is_by_runtime: bool,
) -> Option<Asked> {
    let id = watched.container.id.as_bytes();
    let known = calls.of(pid);
    let is_guess = known.is_none();
    let call = match known {
        None if is_by_runtime => calls.take_only(id),
        known => known,
    }?;
    let argv = match in_arguments(&call.arguments, Some(id))? {
        AskedFor::Command(command) => command.iter().map(|argument| printable(argument)).collect(),
        AskedFor::Document(_) => call.document?,
    };
    Some(Asked { argv, is_guess })
}

/// Looks at a runtime that was called. Nobody else's word is taken: it must live in
/// the host's mount namespace, and be root's, since it names a file to be read.
pub(crate) fn read(pid: u32) -> Option<Call> {
    let handle = Handle::open(pid).ok()?;
    let is_hosts = handle.mount_namespace().is_ok_and(procfs::is_host_mount_namespace);
    if !is_hosts || handle.uid().ok()? != 0 {
        return None;
    }
    let arguments = handle.arguments().ok()??;
    let document = match in_arguments(&arguments, None)? {
        AskedFor::Command(_) => None,
        AskedFor::Document(path) => read_document(&path),
    };
    Some(Call { runtime: handle.identity(), arguments, document })
}

fn read_document(path: &[u8]) -> Option<Vec<String>> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let document = file::read_regular(path, MAX_DOCUMENT).ok()?;
    let document: ProcessDocument = serde_json::from_slice(&document).ok()?;
    let arguments = document.args.into_iter().take(MAX_ARGUMENTS);
    Some(arguments.map(|argument| printable(argument.as_bytes())).collect())
}

/// A process as the OCI runtime specification describes one.
#[derive(serde::Deserialize)]
struct ProcessDocument {
    #[serde(default)]
    args: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
enum AskedFor {
    Command(Vec<Vec<u8>>),
    Document(Vec<u8>),
}

/// `runc exec [OPTIONS] ID COMMAND...` or `runc exec --process FILE ... ID`. Without
/// the ID it is not known where the command begins, only that there may be one.
fn in_arguments(arguments: &[Vec<u8>], id: Option<&[u8]>) -> Option<AskedFor> {
    let exec = arguments.iter().position(|argument| argument == b"exec")?;
    let rest = &arguments[exec + 1..];
    let named = |(index, argument): (usize, &Vec<u8>)| {
        let value = argument.strip_prefix(b"--process=").map(<[u8]>::to_vec);
        let is_option = argument == b"--process" || argument == b"-p";
        value.or_else(|| rest.get(index + 1).filter(|_| is_option).cloned())
    };
    let at = match id {
        Some(id) => rest.iter().position(|argument| argument == id)?,
        None => rest.len(),
    };
    if let Some(document) = rest[..at].iter().enumerate().find_map(named) {
        return Some(AskedFor::Document(document));
    }
    if id.is_none() {
        return Some(AskedFor::Command(Vec::new()));
    }
    let command = rest[at + 1..].strip_prefix(&[b"--".to_vec()]).unwrap_or(&rest[at + 1..]);
    (!command.is_empty()).then(|| AskedFor::Command(command.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_says_what_it_was_asked_for() {
        let check = |line: &str, expected: Option<AskedFor>| {
            let words: Vec<Vec<u8>> = line.split(' ').map(Into::into).collect();
            assert_eq!(in_arguments(&words, Some(b"c1")), expected, "{line}");
        };
        let command =
            |line: &str| Some(AskedFor::Command(line.split(' ').map(Into::into).collect()));
        let document = |path: &str| Some(AskedFor::Document(path.into()));
        check("runc --root /x exec -t c1 sh -c x", command("sh -c x"));
        check("runc exec c1 -- ls c1", command("ls c1"));
        check("runc exec --process /tmp/p1 --detach c1", document("/tmp/p1"));
        check("runc --log x exec --detach --process=/tmp/p2 c1", document("/tmp/p2"));
        check("runc exec c2 ls", None);
        check("runc exec c1", None);
        check("runc init", None);
    }

    #[test]
    fn calls_are_remembered_and_bounded() {
        let call = |pid, id: &str| {
            let runtime = ProcessIdentity { pid, start_time: 5 };
            Call { runtime, arguments: vec![id.into()], document: None }
        };
        let mut calls = Calls::default();
        for pid in 0..4000 {
            calls.keep(call(pid, "c1"));
        }
        assert_eq!(calls.calls.len(), MAX_CALLS);
        assert!(calls.take(7).is_some());
        assert!(calls.take(7).is_none(), "a pid is used again");
        for pid in 0..4000 {
            calls.answer(call(pid, "c1").runtime);
        }
        assert_eq!(calls.answered.len(), MAX_CALLS);

        let mut calls = Calls::default();
        calls.keep(call(1, "c1"));
        calls.keep(call(2, "c2"));
        assert!(calls.take_only(b"c1").is_some());
        assert!(calls.take_only(b"c1").is_none());
        calls.keep(call(3, "c2"));
        assert!(calls.take_only(b"c2").is_none(), "it could be either");
    }

    #[test]
    fn a_call_is_used_once_and_of_its_own_runtime() {
        let pid = std::process::id();
        let this = Handle::open(pid).unwrap().identity();
        let call = |start_time| {
            let runtime = ProcessIdentity { pid, start_time };
            Call { runtime, arguments: vec!["c1".into()], document: None }
        };
        let mut calls = Calls::default();
        calls.keep(call(this.start_time));
        assert!(calls.of(pid).is_some());
        // This process is no runtime, and another one had its number.
        calls.keep(call(this.start_time - 1));
        assert!(calls.of(pid).is_none());
        // What was read already is recorded late.
        calls.answer(this);
        calls.keep(call(this.start_time));
        assert!(calls.take_only(b"c1").is_none());
    }
}
