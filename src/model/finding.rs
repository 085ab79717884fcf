//! Findings: how a container departs from its image. The serde form of
//! [`Finding`] is the published JSON schema `driftd.finding/v1`, and what the
//! history stores.

use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::id::id;
use super::{
    Blake3Hash, ContainerId, FileType, Format, ImageReference, Incarnation, Labels, Pod, Process,
    ProcessIdentity, RootfsPath, SessionId, Sha256Hash,
};

/// The finding schema's name, in every finding's JSON.
pub const SCHEMA: &str = "driftd.finding/v1";

macro_rules! kinds {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $severity:ident, $attack:expr;)*) => {
        /// What a finding says. Names are stable.
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

            /// MITRE ATT&CK for this kind; `None` where nothing was done by anybody.
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
    /// An executed script (`#!`, or text a shell ran), new or modified.
    ExecScript = "exec.script", High, Some(("T1059.004", "TA0002"));
    /// An interpreter of the image was given a script that is not the image's.
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
    /// A file that makes something run later, or lets somebody in: new or changed.
    FilePersistence = "file.persistence", High, Some(("T1546", "TA0003"));
    /// A package manager of the image changed what is installed.
    PackageTransaction = "package.transaction", Medium, Some(("T1072", "TA0002"));
    /// A shell whose input and output are one connection.
    ShellReverse = "shell.reverse", Critical, Some(("T1059.004", "TA0002"));
    /// Somebody or something entered the container, with a terminal.
    SessionInteractive = "session.interactive", Medium, Some(("T1609", "TA0002"));
    /// The same without a terminal.
    SessionExec = "session.exec", Info, Some(("T1609", "TA0002"));
    /// A process of the host's has joined the container's namespaces, past its runtime.
    NamespaceEntered = "namespace.entered", High, Some(("T1611", "TA0004"));
    /// A layer on disk, or its blob, does not hold what the image says.
    BaselineTampered = "baseline.tampered", Critical, Some(("T1525", "TA0003"));
    /// A container that cannot be compared with its image.
    BaselineUnavailable = "baseline.unavailable", Info, None;
}

impl Kind {
    /// The kinds that a name or a pattern such as `exec.*` stands for, in any case.
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

    /// Whether the finding is about a file being run.
    pub fn is_exec(self) -> bool {
        self.name().starts_with("exec.")
    }

    /// Whether the finding says that a program was written or lies there, and no more.
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

/// A word that names no kind, severity or the like.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{word}` is no {what} (known: {known})")]
pub struct UnknownName {
    word: String,
    what: &'static str,
    known: String,
}

impl UnknownName {
    pub(super) fn new(word: &str, what: &'static str, known: &str) -> UnknownName {
        let word = crate::model::printable(word.as_bytes());
        UnknownName { word, what, known: known.to_owned() }
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
                    UnknownName {
                        word: crate::model::printable(word.as_bytes()),
                        what: $what,
                        known: $type::ALL
                            .iter()
                            .map(|one| one.name())
                            .collect::<Vec<_>>()
                            .join(", "),
                    }
                })
            }
        }
    };
}
by_name!(Kind, "finding kind");
by_name!(Severity, "severity");
by_name!(Disposition, "disposition");

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

id! {
    /// A finding's name: the same container, kind, path and content (for a session:
    /// the same process; for a layer: the layer too) always give the same one, so
    /// that a scan after a restart recognises what was told already.
    FindingId, "finding", "driftd findings"
}

/// What, besides container and kind, makes a finding this one.
#[derive(Clone, Debug)]
pub enum Subject<'a> {
    File {
        path: &'a RootfsPath,
        content: Option<Blake3Hash>,
    },
    Process(ProcessIdentity),
    /// Files that are told together: in one directory, with one content, or all of
    /// the kind.
    Group {
        path: Option<&'a RootfsPath>,
        content: Option<Blake3Hash>,
    },
    /// Files that are told together for another reason, which `by` names.
    Common {
        path: Option<&'a RootfsPath>,
        content: Option<Blake3Hash>,
        by: &'a str,
    },
    /// What a layer holds at a path, all that is compared of it: not
    /// its content alone, because an owner or a mode may be what was changed.
    Layer {
        layer: &'a str,
        path: &'a RootfsPath,
        found: &'a [u8],
    },
    /// Why something is not known.
    Reason(&'a str),
    /// What is run, whoever runs it: a probe that comes every few seconds is one
    /// finding with a count.
    Command {
        exe: Option<&'a str>,
        argv: Option<&'a [String]>,
    },
}

impl FindingId {
    /// Without a container, a finding is about a layer that none uses.
    pub fn new(container: Option<&ContainerId>, kind: Kind, subject: &Subject<'_>) -> FindingId {
        let mut parts: Vec<&[u8]> = vec![
            // No container's ID is empty.
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
            // One part more than a file, so that it never is one.
            Subject::Group { path, content } => {
                let path = path.map_or(&b""[..], RootfsPath::as_bytes);
                parts.extend([b"group", path, bytes_of(content)]);
            }
            // And one part more than those.
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

/// How a container departs from its image, with everything known about it.
///
/// Absent means null in JSON, never a missing key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Always [`SCHEMA`].
    pub schema: String,
    pub id: FindingId,
    /// 1 when first told, one more each time it is told again.
    pub revision: u64,
    pub kind: Kind,
    pub severity: Severity,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// How often it was seen.
    pub count: u64,
    /// Who saw it first: `gate`, `trace`, `change` or `scan`; `verify` for what was found
    /// by comparing layers; `baseline` for a baseline that cannot be had.
    pub source: String,
    pub node: String,
    /// The container manager: `containerd`.
    pub runtime: String,
    /// Null for a finding about a layer on disk that no watched container uses.
    pub container: Option<ContainerEvidence>,
    /// The run of the container in which it was seen last.
    #[serde(default)]
    pub run: Option<Incarnation>,
    pub image: ImageReference,
    /// The file as it is; null for sessions, and where a layer has none.
    pub file: Option<FileEvidence>,
    /// The file as the image has it.
    pub expected: Option<Expected>,
    pub process: Option<Process>,
    /// The name under which the file was called, where it differs (a symlink).
    pub invoked_as: Option<String>,
    /// The session in which it was done.
    pub session: Option<SessionId>,
    /// The earlier finding about the same file and content (written, then run).
    pub story: Option<FindingId>,
    /// The package transaction that brought the file.
    pub transaction: Option<FindingId>,
    /// How many files an aggregated finding stands for; null for one about one file.
    pub files: Option<u64>,
    pub verdict: Verdict,
    /// What a response did; null while none was asked for.
    pub outcome: Option<Outcome>,
    pub attack: Option<Attack>,
    /// In words, what the other keys have no room for: why there is no baseline,
    /// what was compared with it. Null for everything else.
    pub detail: Option<String>,
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
    /// What the finding would be if the file had one of its own.
    pub kind: Kind,
    /// What it held when it was last seen; null for what is gone or was not hashed.
    pub blake3: Option<Blake3Hash>,
    pub first_seen: Timestamp,
    pub last_seen: Timestamp,
    /// It was seen to be gone again.
    pub removed: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerEvidence {
    #[serde(flatten)]
    pub id: ContainerId,
    pub labels: Labels,
    pub pod: Option<Pod>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEvidence {
    #[serde(flatten)]
    pub path: RootfsPath,
    pub file_type: FileType,
    /// What the first bytes say it is.
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
    /// Where the image has this path or, for a relocated file, this content.
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

/// What the policy says should be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disposition {
    Report,
    Kill,
}

impl Disposition {
    pub const ALL: &'static [Disposition] = &[Disposition::Report, Disposition::Kill];

    pub fn name(self) -> &'static str {
        match self {
            Disposition::Report => "report",
            Disposition::Kill => "kill",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub disposition: Disposition,
    /// The response this asks for: `kill`; null when only reported.
    pub action: Option<String>,
    /// Which setting decided; null for the default.
    pub rule: Option<String>,
    /// How many times the policy has been replaced since the daemon started.
    pub policy_generation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// `kill`, `pause` or `resume`; `restart` of what nobody asked driftd for: a killed
    /// container was started again.
    pub action: String,
    pub succeeded: bool,
    /// The run of the container that was meant is over: nothing was done.
    #[serde(default)]
    pub gone: bool,
    /// What happened, in words; the error if it failed.
    pub message: String,
    /// What is expected to start the killed container again, or has started it; null if
    /// nothing is known to.
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
        // What an earlier version has told must be recognised.
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
