//! What a finding is made of: the observed file and process, and what the image has instead,
//! in the form that findings have. Pure: no finding is made here.

use jiff::Timestamp;

use crate::baseline::{FileEntry, KnownBaseline};
use crate::detect::Judgement;
use crate::model::finding::{Subject, octal};
use crate::model::{
    Blake3Hash, Content, CouldChange, Expected, FileEvidence, FileState, Filesystem, IdMap,
    LowerTwin, Observation, Process, RootfsPath, Verdict, capability_in_words,
};

/// One judgement of an observation, which becomes a finding or a part of one.
#[derive(Clone, Copy)]
pub(super) struct Emission<'a> {
    pub(super) observation: &'a Observation,
    pub(super) judgement: &'a Judgement,
    pub(super) evidence: &'a Evidence<'a>,
    /// What the policy decides about it.
    pub(super) verdict: &'a Verdict,
    pub(super) now: Timestamp,
}

/// What was observed, for a finding.
#[derive(Clone, Copy)]
pub(super) struct Evidence<'a> {
    pub(super) path: Option<&'a RootfsPath>,
    pub(super) filesystem: Filesystem,
    pub(super) state: Option<&'a FileState>,
    pub(super) lower: Option<&'a LowerTwin>,
    pub(super) process: Option<&'a Process>,
    /// The process that wrote the file, if it is known and is not `process`.
    pub(super) writer: Option<&'a Process>,
    pub(super) invoked_as: Option<&'a str>,
    /// When the file last changed, by its own times.
    pub(super) changed: Option<Timestamp>,
    pub(super) detail: Option<&'a str>,
}

impl Default for Evidence<'_> {
    fn default() -> Self {
        Evidence {
            path: None,
            filesystem: Filesystem::Overlay,
            state: None,
            lower: None,
            process: None,
            writer: None,
            invoked_as: None,
            changed: None,
            detail: None,
        }
    }
}

impl Evidence<'_> {
    pub(super) fn content(&self) -> Option<Blake3Hash> {
        self.state.and_then(FileState::blake3)
    }

    /// Whether the file could change between its execution and the moment it was read.
    pub(super) fn could_change(&self) -> CouldChange {
        self.state.map(|state| state.could_change).unwrap_or_default()
    }

    /// What makes the finding different from others of its kind.
    pub(super) fn subject(&self) -> Subject<'_> {
        match (self.path, self.process) {
            (Some(path), _) => Subject::File { path, content: self.content() },
            (None, Some(process)) => {
                Subject::Command { exe: process.exe.as_deref(), argv: process.argv.as_deref() }
            }
            (None, None) => Subject::Reason(self.detail.unwrap_or_default()),
        }
    }
}

/// The file as it was observed. Its owners are as the container and its image name them.
pub(super) fn file_evidence(
    path: &RootfsPath,
    filesystem: Filesystem,
    state: &FileState,
    id_map: Option<&IdMap>,
) -> FileEvidence {
    let (blake3, sha256, unhashed) = match state.content {
        Content::Hashed { blake3, sha256 } => (Some(blake3), sha256, None),
        Content::Unhashed(reason) => (None, None, Some(reason.name().to_owned())),
    };
    FileEvidence {
        path: path.clone(),
        file_type: state.file_type,
        format: state.format,
        mode: octal(state.mode),
        uid: id_map.map_or(state.uid, |map| map.uid_to_container(state.uid)),
        gid: id_map.map_or(state.gid, |map| map.gid_to_container(state.gid)),
        size: state.size,
        capability: state.capability.as_deref().map(capability_in_words),
        blake3,
        sha256,
        unhashed,
        deleted: state.deleted,
        filesystem: filesystem.name().to_owned(),
    }
}

/// A file that is gone, as the image has it.
pub(super) fn removed_evidence(path: &RootfsPath, known: &KnownBaseline) -> FileEvidence {
    FileEvidence {
        path: path.clone(),
        blake3: None,
        deleted: true,
        ..entry_evidence(&known.entry, "overlay")
    }
}

/// A file of a layer or of an image.
pub(super) fn entry_evidence(entry: &FileEntry, filesystem: &str) -> FileEvidence {
    FileEvidence {
        path: entry.path.clone(),
        file_type: entry.file_type,
        format: entry.format,
        mode: octal(entry.mode),
        uid: entry.uid,
        gid: entry.gid,
        size: entry.size,
        capability: entry.capability.as_deref().map(capability_in_words),
        blake3: entry.blake3,
        sha256: None,
        unhashed: None,
        deleted: false,
        filesystem: filesystem.to_owned(),
    }
}

/// What the image has instead.
pub(super) fn expected(
    known: &KnownBaseline,
    lower: Option<&LowerTwin>,
    state: Option<&FileState>,
) -> Expected {
    // A baseline has no SHA-256. A file with the expected BLAKE3 shows it.
    let sha256 = known.entry.blake3.and_then(|blake3| {
        lower.filter(|twin| twin.blake3 == blake3).and_then(|twin| twin.sha256).or_else(|| {
            match state.map(|state| state.content) {
                Some(Content::Hashed { blake3: actual, sha256 }) if actual == blake3 => sha256,
                _ => None,
            }
        })
    });
    Expected {
        path: known.entry.path.clone(),
        blake3: known.entry.blake3,
        sha256,
        mode: octal(known.entry.mode),
        uid: known.entry.uid,
        gid: known.entry.gid,
        size: known.entry.size,
        capability: known.entry.capability.as_deref().map(capability_in_words),
        layer: known.layer.to_string(),
    }
}
