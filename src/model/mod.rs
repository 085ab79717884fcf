//! The nouns of driftd: what a file, a container, a process, an observation and
//! a finding are. No I/O, no clock, and nothing here depends on another room.

mod capability;
pub mod container;
pub mod digest;
pub mod file;
pub mod finding;
pub mod globs;
mod id;
pub mod observation;
pub mod path;
pub mod process;
pub mod session;
mod text;

pub use capability::capability_in_words;
pub use container::{
    Blob, Container, ContainerId, EntryPoint, IdMap, IdRange, ImageReference, Incarnation, Labels,
    Layer, LayerId, NamedBy, OverlayDirs, Pod, Task,
};
pub use digest::{Blake3Hash, ChainId, DiffId, ManifestDigest, Sha256Hash};
pub use file::{Content, FileState, FileTime, FileType, Filesystem, Format, Unhashed};
pub use finding::{
    Attack, Disposition, Expected, FileEvidence, Finding, FindingId, Kind, Member, Outcome,
    Restarter, Severity, Verdict,
};
pub use globs::PathGlobs;
pub use observation::{Fact, LayerFile, LowerTwin, Observation, Script, Source};
pub use path::{HostilePath, RootfsPath, bytes_of_printable, is_printable, printable};
pub use process::{
    Ancestor, PackageManager, Process, ProcessIdentity, is_linker, may_be_package_manager,
    package_manager,
};
pub use session::{
    Command, DeclaredProbe, Entry, Exit, Interactive, Login, Opening, Probe, ProbeId, ProbeSource,
    Run, Session, SessionId, SessionState,
};

/// Cuts text to at most this many bytes, between two characters.
pub fn shorten(text: &mut String, most: usize) {
    let mut end = most.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}
