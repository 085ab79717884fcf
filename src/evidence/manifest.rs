//! The manifest of a case: what was taken, when and why, and every file with its digest.
//!
//! A published JSON schema (docs/evidence.md): keys are never renamed. Values only.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::model::{CaseId, ContainerId, FindingId, Incarnation, Kind, Sha256Hash};

/// The manifest's schema, in every manifest.
pub const SCHEMA: &str = "driftd.evidence/v1";
/// The names of the two files that describe a case.
pub const MANIFEST: &str = "manifest.json";
pub const SUMS: &str = "SHA256SUMS";

/// What a case holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always [`SCHEMA`].
    pub schema: String,
    pub case: CaseId,
    pub node: String,
    pub kernel: String,
    pub container: ContainerId,
    /// What shares one limit: its pod, or the container.
    pub workload: String,
    pub run: Option<Incarnation>,
    pub finding: Option<FindingId>,
    pub kind: Option<Kind>,
    /// Each time that something was added, the first one included.
    pub takes: Vec<Take>,
    /// All files but the two that describe the case, by name.
    pub files: Vec<Kept>,
}

/// One time at which evidence was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Take {
    pub number: u32,
    pub driftd: String,
    pub reason: String,
    pub requested_by: String,
    pub requested_at: Timestamp,
    pub ended_at: Timestamp,
    /// A rule has asked for it, and no user.
    pub by_rule: bool,
    /// The values of environment variables were kept.
    pub environment: bool,
    /// The container was frozen meanwhile.
    pub frozen: bool,
    pub counts: Counts,
    /// What is missing because of a limit or a failure, in words.
    pub cut: Vec<String>,
}

/// How much was taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Files of the container that are listed, and those whose content is kept.
    pub files_listed: u64,
    pub files_kept: u64,
    /// Those of them that are not whole, and those that changed while they were read.
    pub files_cut: u64,
    pub files_unstable: u64,
    pub processes_found: u64,
    pub processes_kept: u64,
    pub findings: u64,
    pub sessions: u64,
}

/// A file of the case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    pub name: String,
    pub bytes: u64,
    pub sha256: Sha256Hash,
}

impl Manifest {
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// What is missing, of all takes, each text once.
    pub fn cut(&self) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        for cut in self.takes.iter().flat_map(|take| &take.cut) {
            if !all.contains(cut) {
                all.push(cut.clone());
            }
        }
        all
    }

    /// The directories of processes.
    pub fn processes(&self) -> u64 {
        let is_one = |file: &&Kept| {
            file.name.starts_with("processes/") && file.name.ends_with("/process.json")
        };
        self.files.iter().filter(is_one).count() as u64
    }
}

/// What a take has kept, for people.
pub fn summary(counts: &Counts, bytes: u64, cut: &[String]) -> String {
    let Counts { files_kept, processes_kept, findings, .. } = counts;
    let mut text = format!(
        "{files_kept} files, {processes_kept} processes and {findings} findings are kept ({bytes} \
         bytes)"
    );
    match cut {
        [] => (),
        [one] => text += &format!("; cut: {one}"),
        [one, ..] => text += &format!("; cut: {one}, and {} more reasons", cut.len() - 1),
    }
    text
}
