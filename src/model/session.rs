//! Sessions: who came into a container, how, and what was done there. The serde
//! forms of [`Session`], [`Command`] and [`Probe`] are published JSON schemas, and
//! what the history stores.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::finding::ContainerEvidence;
use super::id::id;
use super::{Ancestor, ContainerId, FindingId, ImageReference, Process, ProcessIdentity};

/// The session schema's name, in every session's JSON.
pub const SESSION_SCHEMA: &str = "driftd.session/v1";
/// The command schema's name, in every command's JSON.
pub const COMMAND_SCHEMA: &str = "driftd.command/v1";
/// The probe schema's name, in every probe's JSON.
pub const PROBE_SCHEMA: &str = "driftd.probe/v1";

id! {
    /// A session's name: the same container and process always give the same one, so
    /// that a restart recognises a session that goes on.
    SessionId, "session", "driftd sessions"
}

id! {
    /// A probe's name: the same container and arguments always give the same one.
    ProbeId, "probe", "driftd probes"
}

impl SessionId {
    /// `root` is the process that came in; of an attachment, the client outside, or of
    /// one that nobody sees, init's pid and when it was noticed.
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
    /// Its runtime's shim was asked to execute something: `kubectl exec`,
    /// `docker exec`, `ctr task exec`, a probe.
    RuntimeExec,
    /// A container runtime was run by hand: `runc exec`.
    RuntimeDirect,
    /// A process of the host's has joined its namespaces: `nsenter`.
    Namespace,
    /// A container that was put into this one's pid namespace: `kubectl debug`.
    SharedPidNamespace,
    /// Somebody was connected to the terminal of its init: `kubectl attach`,
    /// `docker attach`, `ctr task attach`.
    Attach,
    /// From within: a shell whose input and output are a connection.
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

/// Why a session is taken for that of a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Interactive {
    /// It began with a controlling terminal.
    Terminal,
    /// A process of it opened a terminal later.
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
    /// The audit session's number; null where the kernel numbers none.
    pub audit_session: Option<u32>,
}

/// How a process ended (wait(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// What it returned; null if a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

impl Exit {
    /// From a status as wait(2) gives it.
    pub fn from_wait_status(status: i32) -> Exit {
        match status & 0x7f {
            0 => Exit { code: Some((status >> 8) & 0xff), signal: None },
            signal => Exit { code: None, signal: Some(signal) },
        }
    }

    /// From a status as shells and container runtimes tell it: of whoever was ended
    /// by a signal, 128 and the signal's number.
    pub fn from_shell_status(status: u32) -> Exit {
        match i32::try_from(status) {
            Ok(status @ 129..=192) => Exit { code: None, signal: Some(status - 128) },
            status => Exit { code: Some(status.unwrap_or(255)), signal: None },
        }
    }
}

/// What is seen of a session when it opens.
#[derive(Clone, Debug, PartialEq)]
pub struct Opening {
    /// What it is known by: the process that came in. See [`SessionId::new`].
    pub root: ProcessIdentity,
    pub entry: Entry,
    pub interactive: Option<Interactive>,
    /// Its first process; its ancestors end with the first one outside. Of an attachment
    /// the client, or init where that is not seen.
    pub process: Process,
    /// The host's processes above that, nearest first.
    pub host: Vec<Ancestor>,
    pub login: Option<Login>,
    /// What an admission webhook has put into its environment.
    pub requested_by: Option<String>,
    /// The container that it was put beside, in whose pid namespace it is: then
    /// `process` is the first one of a container of its own.
    pub beside: Option<ContainerId>,
}

/// One program that was run in a session.
#[derive(Clone, Debug, PartialEq)]
pub struct Run {
    pub process: ProcessIdentity,
    pub exe: Option<String>,
    pub argv: Option<Vec<String>>,
    /// It has a controlling terminal.
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

/// How many of a session's commands are listed, and of its findings. More are
/// counted.
pub const MAX_COMMANDS: u64 = 512;
pub const MAX_SESSION_FINDINGS: usize = 256;

/// Somebody or something in a container that did not begin there.
///
/// Absent means null in JSON, never a missing key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Always [`SESSION_SCHEMA`].
    pub schema: String,
    pub id: SessionId,
    /// 1 when first told, one more each time it is told again.
    pub revision: u64,
    pub state: SessionState,
    pub node: String,
    /// The container manager: `containerd`.
    pub runtime: String,
    pub container: ContainerEvidence,
    pub image: ImageReference,
    pub entry: Entry,
    /// Whom it is a session of, where that can be known: `cri`, `docker`,
    /// `containerd`.
    pub client: Option<String>,
    /// What the runtime calls it.
    pub exec_id: Option<String>,
    /// Null for one without a terminal or a connection.
    pub interactive: Option<Interactive>,
    pub process: Process,
    pub host: Vec<Ancestor>,
    pub login: Option<Login>,
    pub requested_by: Option<String>,
    /// Who saw it: `gate`, `trace`, `change` for an attachment, or `scan` for one that
    /// was there before.
    pub discovered: String,
    pub started_at: Timestamp,
    /// Null while it is open, and of one whose end nobody saw.
    pub ended_at: Option<Timestamp>,
    /// How its first process ended; null where that could not be seen.
    pub exit: Option<Exit>,
    /// How many programs it has run; the first [`MAX_COMMANDS`] are listed.
    pub commands: u64,
    /// The finding that tells of the session itself; null while it may be a probe.
    pub finding: Option<FindingId>,
    /// What it has caused, oldest first: the first [`MAX_SESSION_FINDINGS`].
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
    /// In the order in which they were begun, from 1 on.
    pub number: u64,
    #[serde(flatten)]
    pub process: ProcessIdentity,
    /// `None` when the process was gone too soon.
    #[serde(flatten, with = "super::text::exe")]
    pub exe: Option<String>,
    #[serde(flatten, with = "super::text::argv")]
    pub argv: Option<Vec<String>>,
    pub started_at: Timestamp,
    /// Null while it runs, and where its end was not seen.
    pub ended_at: Option<Timestamp>,
    pub exit: Option<Exit>,
}

/// By what a command is known for a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeSource {
    /// The image's or the container's health check (Docker, nerdctl).
    Healthcheck,
    /// A hook of the pod's specification.
    LifecycleHook,
    /// The same arguments came at a steady rhythm.
    Learned,
}

impl ProbeSource {
    pub const ALL: &'static [ProbeSource] =
        &[ProbeSource::Healthcheck, ProbeSource::LifecycleHook, ProbeSource::Learned];

    /// The same word as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            ProbeSource::Healthcheck => "healthcheck",
            ProbeSource::LifecycleHook => "lifecycle_hook",
            ProbeSource::Learned => "learned",
        }
    }
}

/// A command that a container's specification declares as a probe of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeclaredProbe {
    pub argv: Vec<String>,
    pub source: ProbeSource,
}

/// A command that is run in a container again and again, by a machine: counted
/// and not reported.
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
    /// How far apart they come; null where that was not learned.
    pub interval_milliseconds: Option<u64>,
    pub count: u64,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// A person has said that it is to be reported all the same.
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
