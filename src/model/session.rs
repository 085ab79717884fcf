//! Sessions: how a process came into a container, what was run there, and how it ended.
//!
//! The serde forms of [`Session`], [`Command`] and [`Probe`] are published JSON schemas, and
//! the form that the history stores: keys are never renamed.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::container::{ContainerEvidence, ContainerId, ImageReference};
use super::declared_probe::ProbeSource;
use super::id::{FindingId, ProbeId, SessionId};
use super::process::{Ancestor, Process, ProcessIdentity};

/// The session schema's name, in every session's JSON.
pub const SESSION_SCHEMA: &str = "driftd.session/v1";
/// The command schema's name, in every command's JSON.
pub const COMMAND_SCHEMA: &str = "driftd.command/v1";
/// The probe schema's name, in every probe's JSON.
pub const PROBE_SCHEMA: &str = "driftd.probe/v1";

impl SessionId {
    /// `root` is the process that came in. For an attach session it is the client outside;
    /// if the client is not visible, init's pid and the time when the attachment was
    /// noticed.
    pub fn new(container: &ContainerId, root: ProcessIdentity) -> SessionId {
        let (pid, start_time) = (root.pid.to_le_bytes(), root.start_time.to_le_bytes());
        SessionId::of(&[
            b"session",
            container.namespace.as_bytes(),
            container.id.as_bytes(),
            &pid,
            &start_time,
        ])
    }
}

impl ProbeId {
    pub fn new(container: &ContainerId, argv: &[String]) -> ProbeId {
        let names = [b"probe", container.namespace.as_bytes(), container.id.as_bytes()];
        let parts: Vec<&[u8]> =
            names.into_iter().chain(argv.iter().map(String::as_bytes)).collect();
        ProbeId::of(&parts)
    }
}

/// How a session came into its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// The shim of its runtime executed a program: `kubectl exec`, `docker exec`,
    /// `ctr task exec`, a probe.
    RuntimeExec,
    /// A container runtime was run by hand: `runc exec`.
    RuntimeDirect,
    /// A process of the host has joined its namespaces: `nsenter`.
    Namespace,
    /// A container was started in this container's pid namespace: `kubectl debug`.
    SharedPidNamespace,
    /// A client was connected to the terminal of its init: `kubectl attach`,
    /// `docker attach`, `ctr task attach`.
    Attach,
    /// From inside: a shell whose input and output are a connection.
    ReverseShell,
}

impl Entry {
    pub const ALL: &'static [Entry] = &[
        Entry::RuntimeExec,
        Entry::RuntimeDirect,
        Entry::Namespace,
        Entry::SharedPidNamespace,
        Entry::Attach,
        Entry::ReverseShell,
    ];

    /// The same word as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Entry::RuntimeExec => "runtime_exec",
            Entry::RuntimeDirect => "runtime_direct",
            Entry::Namespace => "namespace",
            Entry::SharedPidNamespace => "shared_pid_namespace",
            Entry::Attach => "attach",
            Entry::ReverseShell => "reverse_shell",
        }
    }
}

/// Why a session is taken for one in which commands are typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interactive {
    /// It began with a controlling terminal.
    Terminal,
    /// One of its processes opened a terminal later.
    TerminalLater,
    /// Its input and output are one connection.
    Socket,
}

impl Interactive {
    pub const ALL: &'static [Interactive] =
        &[Interactive::Terminal, Interactive::TerminalLater, Interactive::Socket];

    /// The same word as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Interactive::Terminal => "terminal",
            Interactive::TerminalLater => "terminal_later",
            Interactive::Socket => "socket",
        }
    }
}

/// The login on the host that a process descends from (`/proc/PID/loginuid` and
/// `/proc/PID/sessionid`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Login {
    pub uid: u32,
    /// The audit session's number; null if the kernel gives none.
    pub audit_session: Option<u32>,
}

/// How a process ended (wait(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Its exit code; null if a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it, if one did.
    pub signal: Option<i32>,
}

impl Exit {
    /// From the status of wait(2).
    pub fn from_wait_status(status: i32) -> Exit {
        match status & 0x7f {
            0 => Exit { code: Some((status >> 8) & 0xff), signal: None },
            signal => Exit { code: None, signal: Some(signal) },
        }
    }

    /// From a status as shells and container runtimes report it: 128 and the signal's
    /// number if a signal ended the process.
    pub fn from_shell_status(status: u32) -> Exit {
        match i32::try_from(status) {
            Ok(status @ 129..=192) => Exit { code: None, signal: Some(status - 128) },
            status => Exit { code: Some(status.unwrap_or(255)), signal: None },
        }
    }
}

/// What is known of a session when it opens.
#[derive(Clone, Debug, PartialEq)]
pub struct Opening {
    /// The process that came in; it identifies the session. See [`SessionId::new`].
    pub root: ProcessIdentity,
    pub entry: Entry,
    pub interactive: Option<Interactive>,
    /// Its first process, whose ancestors end with the first one outside. For an attach
    /// session the client, or init if the client is not visible.
    pub process: Process,
    /// The host's processes above the first one outside, nearest first.
    pub host: Vec<Ancestor>,
    pub login: Option<Login>,
    /// The requester's name, which an admission webhook put into its environment.
    pub requested_by: Option<String>,
    /// The other container whose pid namespace it shares, for
    /// [`Entry::SharedPidNamespace`]: then `process` is the first process of a container of
    /// its own.
    pub beside: Option<ContainerId>,
}

/// One program that was run in a session.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub process: ProcessIdentity,
    pub exe: Option<String>,
    pub argv: Option<Vec<String>>,
    /// Its controlling terminal, if it has one.
    pub tty: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionState {
    Open,
    Closed,
}

impl SessionState {
    /// The same word as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            SessionState::Open => "open",
            SessionState::Closed => "closed",
        }
    }
}

/// How many of a session's commands, and of its findings, are listed. The rest is counted.
pub const MAX_COMMANDS: u64 = 512;
pub const MAX_SESSION_FINDINGS: usize = 256;

/// A process that came into a container from outside, or a reverse shell, with its
/// descendants.
///
/// Absent means null in JSON, never a missing key.
// Long: the published schema, one field for each key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Always [`SESSION_SCHEMA`].
    pub schema: String,
    pub id: SessionId,
    /// 1 when first reported, one more each time it is reported again.
    pub revision: u64,
    pub state: SessionState,
    pub node: String,
    /// The container manager: `containerd`.
    pub runtime: String,
    pub container: ContainerEvidence,
    pub image: ImageReference,
    pub entry: Entry,
    /// The client that requested it, if that is known: `cri`, `docker`, `containerd`.
    pub client: Option<String>,
    /// The runtime's ID of the execution.
    pub exec_id: Option<String>,
    /// Null for one without a terminal or a connection.
    pub interactive: Option<Interactive>,
    pub process: Process,
    pub host: Vec<Ancestor>,
    pub login: Option<Login>,
    pub requested_by: Option<String>,
    /// What saw it: `gate`, `trace`, `change` for an attach session, or `scan` for a session
    /// that was there before.
    pub discovered: String,
    pub started_at: Timestamp,
    /// Null while it is open, and if its end was not seen.
    pub ended_at: Option<Timestamp>,
    /// How its first process ended; null if that was not seen.
    pub exit: Option<Exit>,
    /// How many programs it has run; the first [`MAX_COMMANDS`] are listed.
    pub commands: u64,
    /// The finding about the session itself; null while it may be a probe.
    pub finding: Option<FindingId>,
    /// The findings that it caused, oldest first: the first [`MAX_SESSION_FINDINGS`].
    pub findings: Vec<FindingId>,
    pub findings_total: u64,
}

/// One program that a session has run.
///
/// Absent means null in JSON, never a missing key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Always [`COMMAND_SCHEMA`].
    pub schema: String,
    pub session: SessionId,
    /// Commands are numbered in the order of their start, from 1 on.
    pub number: u64,
    #[serde(flatten)]
    pub process: ProcessIdentity,
    /// `None` if the process had ended before it was read.
    #[serde(flatten, with = "super::text::exe")]
    pub exe: Option<String>,
    #[serde(flatten, with = "super::text::argv")]
    pub argv: Option<Vec<String>>,
    pub started_at: Timestamp,
    /// Null while it runs, and if its end was not seen.
    pub ended_at: Option<Timestamp>,
    pub exit: Option<Exit>,
}

/// A command that a runtime runs in a container again and again: counted and not reported.
///
/// Absent means null in JSON, never a missing key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Always [`PROBE_SCHEMA`].
    pub schema: String,
    pub id: ProbeId,
    pub container: ContainerEvidence,
    pub image: ImageReference,
    #[serde(flatten, with = "super::text::argv")]
    pub argv: Vec<String>,
    pub source: ProbeSource,
    /// The time between two runs; null if that was not learned.
    pub interval_milliseconds: Option<u64>,
    pub count: u64,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// An administrator has decided that it is reported all the same.
    pub reported: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_a_code_or_a_signal() {
        let code = |code| Exit { code: Some(code), signal: None };
        let signal = |signal| Exit { code: None, signal: Some(signal) };
        assert_eq!(Exit::from_wait_status(3 << 8), code(3));
        assert_eq!(Exit::from_wait_status(9), signal(9));
        assert_eq!(Exit::from_wait_status(0x80 | 11), signal(11), "with a core");
        assert_eq!(Exit::from_shell_status(0), code(0));
        assert_eq!(Exit::from_shell_status(137), signal(9));
        assert_eq!(Exit::from_shell_status(255), code(255));
    }

    #[test]
    fn the_same_process_is_the_same_session() {
        let container = ContainerId::new("default", "c1");
        let id = |pid, start_time| SessionId::new(&container, ProcessIdentity { pid, start_time });
        assert_eq!(id(7, 9), id(7, 9));
        assert_ne!(id(7, 9), id(7, 10));
        let text = id(7, 9).to_string();
        assert_eq!(text.parse(), Ok(id(7, 9)));
        let err = "7".parse::<SessionId>().unwrap_err().to_string();
        assert!(err.contains("no session") && err.contains("driftd sessions"), "{err}");
    }

    #[test]
    fn words_are_the_same_in_json_and_in_tables() {
        for entry in Entry::ALL {
            assert_eq!(serde_json::to_value(entry).unwrap(), entry.name());
        }
        for interactive in Interactive::ALL {
            assert_eq!(serde_json::to_value(interactive).unwrap(), interactive.name());
        }
        for source in ProbeSource::ALL {
            assert_eq!(serde_json::to_value(source).unwrap(), source.name());
        }
        for state in [SessionState::Open, SessionState::Closed] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }
}
