//! Findings: how a container differs from its image, by kind and severity.
//!
//! The serde form of [`Finding`] is the published JSON schema `driftd.finding/v1`, and the
//! form that the history stores: keys are never renamed. The table of kinds gives each kind
//! its name, default severity and ATT&CK technique. `detect` decides which kind a fact is.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::container::{ContainerId, ImageReference, Incarnation};
use super::digest::{Blake3Hash, Sha256Hash};
use super::file::{FileType, Format};
use super::id::SessionId;
use super::path::RootfsPath;
use super::process::{Process, ProcessIdentity};
use super::unknown::UnknownName;

pub use super::container::ContainerEvidence;
pub use super::id::FindingId;

/// The finding schema's name, in every finding's JSON.
pub const SCHEMA: &str = "driftd.finding/v1";

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $severity:ident, $attack:expr;)*) => {
        /// The kind of drift. Names are stable.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $($(#[$doc])* $variant,)*
        }

        impl Kind {
            pub const ALL: &'static [Kind] = &[$(Kind::$variant,)*];

            pub fn name(self) -> &'static str {
                match self { $(Kind::$variant => $name,)* }
            }

            /// The severity unless a rule of `detect` raises it.
            pub fn severity(self) -> Severity {
                match self { $(Kind::$variant => Severity::$severity,)* }
            }

            /// MITRE ATT&CK for this kind; `None` for a kind that is no action.
            pub fn attack(self) -> Option<Attack> {
                let attack: Option<(&str, &str)> = match self { $(Kind::$variant => $attack,)* };
                attack.map(|(technique, tactic)| Attack {
                    technique: technique.into(),
                    tactic: tactic.into(),
                })
            }
        }
    };
}

kinds! {
    /// Executed; neither its path nor its content is in the image.
    ExecNew = "exec.new", Critical, Some(("T1059", "TA0002"));
    /// Executed; the path is in the image with other content.
    ExecModified = "exec.modified", Critical, Some(("T1554", "TA0003"));
    /// Executed; the content is in the image at another path.
    ExecRelocated = "exec.relocated", Medium, Some(("T1036", "TA0005"));
    /// An executed script (`#!`, or text that a shell ran), new or modified.
    ExecScript = "exec.script", High, Some(("T1059.004", "TA0002"));
    /// An interpreter of the image ran a script that is not the image's.
    ExecInterpreted = "exec.interpreted", Medium, Some(("T1059", "TA0002"));
    /// Executed from memory: a memfd, or a file that never had a name.
    ExecFileless = "exec.fileless", Critical, Some(("T1620", "TA0005"));
    /// Executed from a tmpfs.
    ExecTmpfs = "exec.tmpfs", High, Some(("T1059", "TA0002"));
    /// Executed from a volume or another mount; the content is not in the image.
    ExecVolume = "exec.volume", Medium, Some(("T1059", "TA0002"));
    /// Found running: a program that is not the image's and whose file is gone.
    ExecDeleted = "exec.deleted", High, Some(("T1070.004", "TA0005"));
    /// Code of a file that is not the image's, mapped by a program: a library.
    LibraryLoaded = "library.loaded", High, Some(("T1574.006", "TA0003"));
    /// A new program, not (yet) run.
    FileAdded = "file.added", Low, Some(("T1105", "TA0011"));
    /// A program of the image with other content, not (yet) run.
    FileModified = "file.modified", Medium, Some(("T1554", "TA0003"));
    /// Content of the image at a new path, not run.
    FileRelocated = "file.relocated", Info, Some(("T1036", "TA0005"));
    /// A program of the image that is gone.
    FileRemoved = "file.removed", Low, Some(("T1070.004", "TA0005"));
    /// Setuid, setgid or a file capability that the image does not give.
    FilePrivileged = "file.privileged", High, Some(("T1548.001", "TA0004"));
    /// A file that makes a program run later, or grants access: new or changed.
    FilePersistence = "file.persistence", High, Some(("T1546", "TA0003"));
    /// A package manager of the image changed what is installed.
    PackageTransaction = "package.transaction", Medium, Some(("T1072", "TA0002"));
    /// A shell whose input and output are one connection.
    ShellReverse = "shell.reverse", Critical, Some(("T1059.004", "TA0002"));
    /// A process entered the container from outside, with a terminal.
    SessionInteractive = "session.interactive", Medium, Some(("T1609", "TA0002"));
    /// The same without a terminal.
    SessionExec = "session.exec", Info, Some(("T1609", "TA0002"));
    /// A process of the host has joined the container's namespaces without its runtime.
    NamespaceEntered = "namespace.entered", High, Some(("T1611", "TA0004"));
    /// A layer on disk, or its blob, does not match the image.
    BaselineTampered = "baseline.tampered", Critical, Some(("T1525", "TA0003"));
    /// A container cannot be compared with its image.
    BaselineUnavailable = "baseline.unavailable", Info, None;
}

impl Kind {
    /// The kinds that a name or a pattern such as `exec.*` stands for. Case is ignored.
    pub fn named_by(text: &str) -> Result<Vec<Kind>, UnknownName> {
        let wanted = text.trim().to_ascii_lowercase();
        let is_like = |kind: &&Kind| match wanted.split_once('*') {
            None => kind.name() == wanted,
            Some((start, end)) => {
                let name = kind.name();
                name.len() >= start.len() + end.len()
                    && name.starts_with(start)
                    && name.ends_with(end)
            }
        };
        let kinds: Vec<Kind> = Kind::ALL.iter().filter(is_like).copied().collect();
        match kinds.is_empty() {
            true => text.trim().parse().map(|kind| vec![kind]),
            false => Ok(kinds),
        }
    }

    /// Whether the finding is about the execution of a file.
    pub fn is_exec(self) -> bool {
        self.name().starts_with("exec.")
    }

    /// Whether it is about code that was run in one way or another.
    pub fn is_run(self) -> bool {
        self.is_exec() || self == Kind::LibraryLoaded
    }

    /// Whether the finding is about a program that was written or lies there, and was not
    /// run.
    pub fn is_written(self) -> bool {
        matches!(self, Kind::FileAdded | Kind::FileModified | Kind::FileRelocated)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    Info,
    Low,
    Medium,
    High,
    Critical,
}

impl Severity {
    pub const ALL: &'static [Severity] =
        &[Severity::Info, Severity::Low, Severity::Medium, Severity::High, Severity::Critical];

    pub fn name(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Low => "low",
            Severity::Medium => "medium",
            Severity::High => "high",
            Severity::Critical => "critical",
        }
    }
}

macro_rules! by_name {
    ($type:ident, $what:literal) => {
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $type {
            type Err = UnknownName;
            fn from_str(word: &str) -> Result<$type, UnknownName> {
                $type::ALL.iter().copied().find(|one| one.name() == word).ok_or_else(|| {
                    let known: Vec<&str> = $type::ALL.iter().map(|one| one.name()).collect();
                    UnknownName::new(word, $what, &known.join(", "))
                })
            }
        }
    };
}
by_name!(Kind, "finding kind");
by_name!(Severity, "severity");
by_name!(Disposition, "disposition");
by_name!(Answer, "answer");

impl Serialize for Kind {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Kind, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// MITRE ATT&CK identifiers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attack {
    pub technique: String,
    pub tactic: String,
}

/// What identifies a finding besides its container and kind.
#[derive(Clone, Debug)]
pub enum Subject<'a> {
    File {
        path: &'a RootfsPath,
        content: Option<Blake3Hash>,
    },
    Process(ProcessIdentity),
    /// The members of an aggregated finding: files in one directory, with one content, or
    /// all of the kind.
    Group {
        path: Option<&'a RootfsPath>,
        content: Option<Blake3Hash>,
    },
    /// Members that are aggregated for another reason, which `by` names.
    Common {
        path: Option<&'a RootfsPath>,
        content: Option<Blake3Hash>,
        by: &'a str,
    },
    /// A layer's file at a path. `found` is everything about it that is compared: the
    /// change may be one of its owner or mode alone.
    Layer {
        layer: &'a str,
        path: &'a RootfsPath,
        found: &'a [u8],
    },
    /// Why a container cannot be compared.
    Reason(&'a str),
    /// A command, whichever process runs it: a probe that runs every few seconds is one
    /// finding with a count.
    Command {
        exe: Option<&'a str>,
        argv: Option<&'a [String]>,
    },
}

impl FindingId {
    /// Without a container, the finding is about a layer that no container uses.
    pub fn new(container: Option<&ContainerId>, kind: Kind, subject: &Subject<'_>) -> FindingId {
        let mut parts: Vec<&[u8]> = vec![
            // Empty for no container: a container's ID is never empty.
            container.map_or(b"", |container| container.namespace.as_bytes()),
            container.map_or(b"", |container| container.id.as_bytes()),
            kind.name().as_bytes(),
        ];
        let (pid, start_time);
        match subject {
            Subject::File { path, content } => {
                parts.extend([path.as_bytes(), bytes_of(content)]);
            }
            Subject::Layer { layer, path, found } => {
                parts.extend([layer.as_bytes(), path.as_bytes(), *found]);
            }
            // One part more than a file has, so that the two never collide.
            Subject::Group { path, content } => {
                let path = path.map_or(&b""[..], RootfsPath::as_bytes);
                parts.extend([b"group", path, bytes_of(content)]);
            }
            // One part more than a group has.
            Subject::Common { path, content, by } => {
                let path = path.map_or(&b""[..], RootfsPath::as_bytes);
                parts.extend([b"common", path, bytes_of(content), by.as_bytes()]);
            }
            Subject::Reason(reason) => parts.push(reason.as_bytes()),
            Subject::Command { exe, argv } => {
                parts.push(exe.unwrap_or_default().as_bytes());
                parts.extend(argv.unwrap_or_default().iter().map(String::as_bytes));
            }
            Subject::Process(identity) => {
                pid = identity.pid.to_le_bytes();
                start_time = identity.start_time.to_le_bytes();
                parts.extend([&pid[..], &start_time[..]]);
            }
        }
        FindingId::of(&parts)
    }
}

fn bytes_of(content: &Option<Blake3Hash>) -> &[u8] {
    content.as_ref().map_or(&[], |hash| &hash.0[..])
}

/// One difference between a container and its image, with everything known about it.
///
/// Absent means null in JSON, never a missing key.
// Long: the published schema, one field for each key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Always [`SCHEMA`].
    pub schema: String,
    pub id: FindingId,
    /// 1 when first reported, one more each time it is reported again.
    pub revision: u64,
    pub kind: Kind,
    pub severity: Severity,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// How often it was seen.
    pub count: u64,
    /// What saw it first: `gate`, `trace`, `change` or `scan`; `verify` for a difference
    /// between a layer and its blob; `baseline` for a baseline that is not available.
    pub source: String,
    pub node: String,
    /// The container manager: `containerd`.
    pub runtime: String,
    /// The runtime of the container, such as `io.containerd.runc.v2`; null if unknown.
    #[serde(default)]
    pub container_runtime: Option<String>,
    /// Null for a finding about a layer on disk that no watched container uses.
    pub container: Option<ContainerEvidence>,
    /// The container run in which it was seen last.
    #[serde(default)]
    pub run: Option<Incarnation>,
    pub image: ImageReference,
    /// The file as it is; null for sessions, and if a layer lacks the file.
    pub file: Option<FileEvidence>,
    /// The file as the image has it.
    pub expected: Option<Expected>,
    pub process: Option<Process>,
    /// The process that wrote the file that is used; null if it is not known, or is `process`.
    #[serde(default)]
    pub writer: Option<Process>,
    /// Which of the processes above, and of their ancestors, run an unchanged program of the
    /// image; null if that was not determined.
    #[serde(default)]
    pub from_image: Option<Vec<ProcessIdentity>>,
    /// How long after the start of the container's run it was first seen; null if unknown.
    #[serde(default)]
    pub after_start_milliseconds: Option<u64>,
    /// The name under which the file was executed, if that differs (a symlink).
    pub invoked_as: Option<String>,
    /// The session in which it happened.
    pub session: Option<SessionId>,
    /// The earlier finding about the same file and content (written, then run).
    pub story: Option<FindingId>,
    /// The package transaction that wrote the file.
    pub transaction: Option<FindingId>,
    /// How many files an aggregated finding stands for; null for one about one file.
    pub files: Option<u64>,
    pub verdict: Verdict,
    /// The result of the response; null while no response was requested.
    pub outcome: Option<Outcome>,
    pub attack: Option<Attack>,
    /// A sentence about what has no key of its own, such as why there is no baseline, or
    /// what was compared with it; otherwise null.
    pub detail: Option<String>,
}

impl Verdict {
    /// Whether a response is requested and carried out.
    pub fn is_answered(&self) -> bool {
        self.answers.iter().any(|answer| !answer.dry_run)
    }

    /// Whether evidence is to be taken.
    pub fn wants_evidence(&self) -> bool {
        let is_it = |one: &RuleAnswer| one.action == Answer::Evidence && !one.dry_run;
        self.answers.iter().any(is_it)
    }

    /// Whether an exception expects the finding.
    pub fn is_accept(&self) -> bool {
        self.disposition == Disposition::Accept
    }
}

impl Finding {
    pub fn container_id(&self) -> Option<&ContainerId> {
        self.container.as_ref().map(|container| &container.id)
    }
}

/// The member schema's name, in every member's JSON.
pub const MEMBER_SCHEMA: &str = "driftd.member/v1";

/// One file that an aggregated finding stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Always [`MEMBER_SCHEMA`].
    pub schema: String,
    #[serde(flatten)]
    pub path: RootfsPath,
    /// The kind of the finding that the file alone would have.
    pub kind: Kind,
    /// Its content when it was last seen; null if it was gone or was not hashed.
    pub blake3: Option<Blake3Hash>,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// It was found to be gone again.
    pub removed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEvidence {
    #[serde(flatten)]
    pub path: RootfsPath,
    pub file_type: FileType,
    /// The format, by the first bytes.
    #[serde(rename = "type")]
    pub format: Format,
    /// Octal, four digits.
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    /// The `security.capability` xattr in words, e.g. `cap_net_raw=ep`.
    pub capability: Option<String>,
    pub blake3: Option<Blake3Hash>,
    pub sha256: Option<Sha256Hash>,
    /// Why there is no hash: `size`, `unreadable`, `gone`, `not_regular`, `not_a_program`.
    pub unhashed: Option<String>,
    pub deleted: bool,
    /// `overlay`, `tmpfs`, `volume`, `anonymous` for one that never had a name, or
    /// `container` for one in the root of another container, which `detail` names.
    pub filesystem: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// The image's path: the same path or, for a relocated file, the path of the content.
    #[serde(flatten)]
    pub path: RootfsPath,
    pub blake3: Option<Blake3Hash>,
    pub sha256: Option<Sha256Hash>,
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub capability: Option<String>,
    /// The layer that holds it: its diff ID.
    pub layer: String,
}

/// What the policy decides to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disposition {
    Report,
    /// An exception expects it: it is kept, and left out of listings, streams and responses.
    Accept,
    /// It is reported and answered; this is the strongest of the answers.
    Evidence,
    Hook,
    Deny,
    KillProcess,
    Pause,
    Kill,
}

impl Disposition {
    pub const ALL: &'static [Disposition] = &[
        Disposition::Report,
        Disposition::Accept,
        Disposition::Evidence,
        Disposition::Hook,
        Disposition::Deny,
        Disposition::KillProcess,
        Disposition::Pause,
        Disposition::Kill,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Disposition::Report => "report",
            Disposition::Accept => "accept",
            Disposition::Evidence => "evidence",
            Disposition::Hook => "hook",
            Disposition::Deny => "deny",
            Disposition::KillProcess => "kill-process",
            Disposition::Pause => "pause",
            Disposition::Kill => "kill",
        }
    }
}

/// What driftd does about a finding, in the order of strength.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Evidence is taken. It changes nothing, and comes before all that does.
    Evidence,
    /// A program of the administrator runs.
    Hook,
    /// The program is not executed. What has run nevertheless is killed.
    Deny,
    /// The process that did it is killed.
    KillProcess,
    /// The container is frozen.
    Pause,
    /// The container is killed.
    Kill,
}

impl Answer {
    pub const ALL: &'static [Answer] = &[
        Answer::Evidence,
        Answer::Hook,
        Answer::Deny,
        Answer::KillProcess,
        Answer::Pause,
        Answer::Kill,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Answer::Evidence => "evidence",
            Answer::Hook => "hook",
            Answer::Deny => "deny",
            Answer::KillProcess => "kill-process",
            Answer::Pause => "pause",
            Answer::Kill => "kill",
        }
    }

    /// The disposition of a finding whose strongest answer this is.
    pub fn disposition(self) -> Disposition {
        match self {
            Answer::Evidence => Disposition::Evidence,
            Answer::Hook => Disposition::Hook,
            Answer::Deny => Disposition::Deny,
            Answer::KillProcess => Disposition::KillProcess,
            Answer::Pause => Disposition::Pause,
            Answer::Kill => Disposition::Kill,
        }
    }
}

/// An answer that a rule asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleAnswer {
    pub action: Answer,
    pub rule: String,
    /// It is not carried out, because `policy.enforce` is `dry-run`.
    pub dry_run: bool,
    /// Which hook, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hook: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub disposition: Disposition,
    /// The strongest response that the policy requests: `evidence`, `hook`, `deny`, `kill-process`, `pause` or
    /// `kill`; null if it only reports.
    pub action: Option<String>,
    /// The rule that decided: an exception, the one whose response is requested, or the one
    /// that has changed the severity. Null for the default.
    pub rule: Option<String>,
    /// How many times the policy has been replaced since the daemon started.
    pub policy_generation: u64,
    /// All rules that match. The exception that decided is named in `rule` alone.
    #[serde(default)]
    pub rules: Vec<String>,
    /// The response is not carried out, because `policy.enforce` is `dry-run`.
    #[serde(default)]
    pub dry_run: bool,
    /// The severity that the kind has here without a rule; null if no rule has changed it.
    #[serde(default)]
    pub unchanged_severity: Option<Severity>,
    /// All responses that the policy requests, in the order in which they are carried out.
    #[serde(default)]
    pub answers: Vec<RuleAnswer>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// `evidence`, `deny`, `kill-process`, `kill`, `pause` or `resume`; `restart` if a killed container
    /// was started again, which is no response of driftd; `begin-evidence` before evidence is
    /// taken; `stop-answers` if a rule's answers were stopped, and `resume-answers`.
    pub action: String,
    pub succeeded: bool,
    /// The container run that the response was for is over: nothing was done.
    #[serde(default)]
    pub gone: bool,
    /// What happened; the error if it failed.
    pub message: String,
    /// What is expected to start the killed container again, or has started it; null if
    /// nothing is known to do so.
    #[serde(default)]
    pub restarter: Option<Restarter>,
    pub at: Timestamp,
}

/// What starts a killed container again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Restarter {
    /// containerd's, in the same container.
    RestartMonitor,
    /// In the same container.
    Docker,
    /// Another container in its place.
    Kubelet,
}

impl fmt::Display for Restarter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Restarter::RestartMonitor => "containerd's restart monitor",
            Restarter::Docker => "Docker",
            Restarter::Kubelet => "the kubelet",
        })
    }
}

/// `mode` as JSON and tables show it.
pub fn octal(mode: u32) -> String {
    format!("{mode:04o}")
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u14_kinds_are_named_by_patterns_and_in_any_case() {
        let named = |text| Kind::named_by(text).unwrap();
        assert_eq!(named("EXEC.New"), [Kind::ExecNew]);
        let exec: Vec<Kind> = Kind::ALL.iter().copied().filter(|kind| kind.is_exec()).collect();
        assert_eq!(named("exec.*"), exec);
        assert_eq!(named("*.modified"), [Kind::ExecModified, Kind::FileModified]);
        assert_eq!(named("*"), Kind::ALL);
        let err = Kind::named_by("exek.*").unwrap_err().to_string();
        assert!(err.contains("`exek.*` is no finding kind") && err.contains("exec.new"), "{err}");
    }

    #[test]
    fn names_are_read_back() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(*kind));
        }
        let err = "exec.odd".parse::<Kind>().unwrap_err().to_string();
        assert!(err.starts_with("`exec.odd` is no finding kind (known: exec.new"), "{err}");
    }

    #[test]
    fn the_same_subject_is_the_same_finding() {
        let container = ContainerId::new("default", "c1");
        let path = RootfsPath::new("/tmp/x").unwrap();
        let id = |kind, content| {
            FindingId::new(Some(&container), kind, &Subject::File { path: &path, content })
        };
        let content = Some(Blake3Hash([1; 32]));
        assert_eq!(id(Kind::ExecNew, content), id(Kind::ExecNew, content));
        assert_ne!(id(Kind::ExecNew, content), id(Kind::ExecNew, None));
        assert_ne!(id(Kind::ExecNew, content), id(Kind::FileAdded, content));
        // A finding that an earlier version reported must be recognised.
        assert_eq!(id(Kind::ExecNew, content).to_string(), "1a15ac988593c7794e1297637c2bfef1");
        let group = Subject::Group { path: Some(&path), content };
        assert_ne!(
            FindingId::new(Some(&container), Kind::ExecNew, &group),
            id(Kind::ExecNew, content)
        );
        let id = id(Kind::ExecNew, content);
        assert_eq!(id.to_string().parse(), Ok(id));
    }
}
