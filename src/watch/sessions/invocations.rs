//! Runtime invocations: what container runtimes were started to execute, by their own
//! arguments. A session's command may have ended before driftd can read it, or may have
//! executed another program.
//!
//! A runtime takes some milliseconds to prepare an execution. Its arguments are read when
//! the kernel records its start, or at the latest when the gate is asked about the command.
//! This file does not decide what opens a session: `opening` does.

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
/// How many invocations are kept, and for how long.
const MAX_INVOCATIONS: usize = 1024;
const KEPT: Duration = Duration::from_secs(60);
/// The command begins within this time after the invocation.
const BEGINS_WITHIN: Duration = Duration::from_secs(5);

/// The latest invocations, by the pid of the runtime.
#[derive(Debug, Default)]
pub(crate) struct Invocations {
    invocations: HashMap<u32, (Instant, Invocation)>,
    /// Runtimes whose invocation was read when their command was seen. The record of their
    /// own start may be read after that, and must not count as another invocation.
    already_read: VecDeque<ProcessIdentity>,
}

/// One invocation of a runtime.
#[derive(Clone, Debug)]
pub(crate) struct Invocation {
    runtime: ProcessIdentity,
    arguments: Vec<Vec<u8>>,
    /// The command in the process document that `arguments` name.
    document: Option<Vec<String>>,
}

/// What a runtime was asked to execute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) argv: Vec<String>,
    /// The runtime had ended, and this is the only invocation that matches.
    pub(crate) is_guess: bool,
}

impl Invocations {
    pub(crate) fn keep(&mut self, invocation: Invocation) {
        if self.already_read.contains(&invocation.runtime) {
            return;
        }
        if self.invocations.len() >= MAX_INVOCATIONS {
            self.invocations.retain(|_, (since, _)| since.elapsed() < KEPT);
        }
        if self.invocations.len() < MAX_INVOCATIONS {
            self.invocations.insert(invocation.runtime.pid, (Instant::now(), invocation));
        }
    }

    /// The only recent invocation for this container, for a runtime that has ended and whose
    /// pid is not known. `None` if several match.
    fn take_only(&mut self, id: &[u8]) -> Option<Invocation> {
        let matches = |(since, invocation): &(Instant, Invocation)| {
            since.elapsed() < BEGINS_WITHIN
                && invocation.arguments.iter().any(|argument| argument == id)
        };
        let mut matching = self
            .invocations
            .iter()
            .filter(|(_, invocation)| matches(invocation))
            .map(|(pid, _)| *pid);
        let only = matching.next().filter(|_| matching.next().is_none())?;
        self.take(only)
    }

    fn take(&mut self, pid: u32) -> Option<Invocation> {
        self.invocations
            .remove(&pid)
            .filter(|(since, _)| since.elapsed() < KEPT)
            .map(|(_, invocation)| invocation)
    }

    /// The invocation of the runtime that has this pid now, or had it last.
    fn of(&mut self, pid: u32) -> Option<Invocation> {
        let living = Handle::open(pid).ok().map(|handle| handle.identity());
        let is_its =
            |invocation: &Invocation| living.is_none_or(|living| living == invocation.runtime);
        if let Some(invocation) = self.take(pid).filter(is_its) {
            return Some(invocation);
        }
        let invocation = read(pid)?;
        self.note_read(invocation.runtime);
        Some(invocation)
    }

    fn note_read(&mut self, runtime: ProcessIdentity) {
        if self.already_read.len() == MAX_INVOCATIONS {
            self.already_read.pop_front();
        }
        self.already_read.push_back(runtime);
    }
}

/// What a runtime was asked to execute in a container. `pid` is the runtime's.
/// `is_by_runtime`: a runtime has just started the process; then the invocation may also be
/// found without the runtime's pid.
pub(crate) fn asked_for(
    invocations: &mut Invocations,
    pid: u32,
    watched: &Watched,
    is_by_runtime: bool,
) -> Option<Asked> {
    let id = watched.container.id.as_bytes();
    let known = invocations.of(pid);
    let is_guess = known.is_none();
    let invocation = match known {
        None if is_by_runtime => invocations.take_only(id),
        known => known,
    }?;
    let argv = match in_arguments(&invocation.arguments, Some(id))? {
        AskedFor::Command(command) => command.iter().map(|argument| printable(argument)).collect(),
        AskedFor::Document(_) => invocation.document?,
    };
    Some(Asked { argv, is_guess })
}

/// Reads the invocation of a runtime. The arguments name a file that driftd then reads.
/// Therefore the runtime must be in the host's mount namespace and run as root.
pub(crate) fn read(pid: u32) -> Option<Invocation> {
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
    Some(Invocation { runtime: handle.identity(), arguments, document })
}

fn read_document(path: &[u8]) -> Option<Vec<String>> {
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let document = file::read_regular(path, MAX_DOCUMENT).ok()?;
    let document: ProcessDocument = serde_json::from_slice(&document).ok()?;
    let arguments = document.args.into_iter().take(MAX_ARGUMENTS);
    Some(arguments.map(|argument| printable(argument.as_bytes())).collect())
}

/// A process document of the OCI runtime specification.
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

/// Parses `runc exec [OPTIONS] ID COMMAND...` or `runc exec --process FILE ... ID`. Without
/// the ID it is unknown where the command begins, only that there may be one.
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
    fn the_arguments_of_a_runtime_show_its_command() {
        let check = |line: &str, expected: Option<AskedFor>| {
            let arguments: Vec<Vec<u8>> = line.split(' ').map(Into::into).collect();
            assert_eq!(in_arguments(&arguments, Some(b"c1")), expected, "{line}");
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
    fn invocations_are_kept_and_bounded() {
        let invocation = |pid, id: &str| {
            let runtime = ProcessIdentity { pid, start_time: 5 };
            Invocation { runtime, arguments: vec![id.into()], document: None }
        };
        let mut invocations = Invocations::default();
        for pid in 0..4000 {
            invocations.keep(invocation(pid, "c1"));
        }
        assert_eq!(invocations.invocations.len(), MAX_INVOCATIONS);
        assert!(invocations.take(7).is_some());
        assert!(invocations.take(7).is_none(), "a pid can be reused");
        for pid in 0..4000 {
            invocations.note_read(invocation(pid, "c1").runtime);
        }
        assert_eq!(invocations.already_read.len(), MAX_INVOCATIONS);

        let mut invocations = Invocations::default();
        invocations.keep(invocation(1, "c1"));
        invocations.keep(invocation(2, "c2"));
        assert!(invocations.take_only(b"c1").is_some());
        assert!(invocations.take_only(b"c1").is_none());
        invocations.keep(invocation(3, "c2"));
        assert!(invocations.take_only(b"c2").is_none(), "both match");
    }

    #[test]
    fn an_invocation_is_used_once_and_belongs_to_its_own_runtime() {
        let pid = std::process::id();
        let this = Handle::open(pid).unwrap().identity();
        let invocation = |start_time| {
            let runtime = ProcessIdentity { pid, start_time };
            Invocation { runtime, arguments: vec!["c1".into()], document: None }
        };
        let mut invocations = Invocations::default();
        invocations.keep(invocation(this.start_time));
        assert!(invocations.of(pid).is_some());
        // This process is no runtime, and another process had its pid before.
        invocations.keep(invocation(this.start_time - 1));
        assert!(invocations.of(pid).is_none());
        // The record of an invocation that was read already arrives late.
        invocations.note_read(this);
        invocations.keep(invocation(this.start_time));
        assert!(invocations.take_only(b"c1").is_none());
    }
}
