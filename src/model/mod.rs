//! The nouns of driftd: what a file, a container, a process, an observation and a finding
//! are, and the programs that driftd knows by name.
//!
//! Values only: no I/O, no clock, no other room. The serde forms of findings, members,
//! sessions, commands and probes are published JSON schemas, which the history stores too.

mod capability;
pub mod container;
mod declared_probe;
pub mod digest;
pub mod file;
pub mod finding;
pub mod generated;
pub mod globs;
mod id;
pub mod observation;
mod package_manager;
pub mod path;
mod printable;
pub mod process;
pub mod programs;
pub mod session;
mod text;
mod unknown;

pub use capability::capability_in_words;
pub use container::{
    Blob, Container, ContainerId, EntryPoint, IdMap, IdRange, ImageReference, Incarnation, Labels,
    Layer, LayerId, NamedBy, OverlayDirs, Pod, Task,
};
pub use declared_probe::{DeclaredProbe, ProbeSource};
pub use digest::{Blake3Hash, ChainId, DiffId, ManifestDigest, Sha256Hash};
pub use file::{Content, CouldChange, FileState, FileTime, FileType, Filesystem, Format, Unhashed};
pub use finding::{
    Answer, Attack, Disposition, Expected, FileEvidence, Finding, Kind, Member, Outcome, Restarter,
    RuleAnswer, Severity, Verdict,
};
pub use globs::PathGlobs;
pub use id::{CaseId, FindingId, ProbeId, SessionId};
pub use observation::{
    Fact, FileFact, LayerFile, LowerTwin, Observation, Script, SessionFact, Source,
};
pub use package_manager::{PackageManager, may_be_package_manager, package_manager};
pub use path::{HostilePath, RootfsPath};
pub use printable::{bytes_of_printable, is_printable, printable, shorten};
pub use process::{Ancestor, Process, ProcessIdentity};
pub use programs::is_linker;
pub use session::{
    Command, Entry, Exit, Interactive, Login, Opening, Probe, Run, Session, SessionState,
};
