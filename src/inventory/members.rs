//! The files that aggregated findings of one container count, and which finding counts each of
//! them. A file takes a few bytes, so that a container may have very many. The paths
//! themselves are in the history.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::LazyLock;

use crate::budget::Share;
use crate::model::{Blake3Hash, FileEvidence, Finding, FindingId, Kind, Member, RootfsPath};

/// The finding that counts each file which has no finding of its own. Exactly one finding
/// counts a file: the newest one that it was put into.
#[derive(Debug, Default)]
pub struct Members {
    /// Its key is random, so that no container can choose two paths with one hash.
    hasher: RandomState,
    groups: Vec<FindingId>,
    indexes: HashMap<FindingId, u32>,
    known: HashMap<u64, (u32, Reported)>,
    share: Share,
}

/// How a file became a member. One path can be a member in several ways at once: written,
/// and run in one way or another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Aspect {
    Written,
    Counted(Kind),
    /// Accepted by an exception.
    Accepted(Kind),
}

impl Aspect {
    /// All in which files are accepted.
    pub fn accepted() -> impl Iterator<Item = Aspect> {
        Kind::ALL.iter().copied().map(Aspect::Accepted)
    }

    /// What the files of this aggregated finding have in common.
    pub fn of_finding(finding: &Finding) -> Aspect {
        // A transaction is accepted as a whole.
        let is_accepted = finding.verdict.is_accept() && finding.kind != Kind::PackageTransaction;
        if is_accepted { Aspect::Accepted(finding.kind) } else { Aspect::of(finding.kind) }
    }

    /// What the files of an aggregated finding of this kind have in common.
    pub fn of(kind: Kind) -> Aspect {
        match kind {
            Kind::FileAdded
            | Kind::FileModified
            | Kind::FileRelocated
            | Kind::FileRemoved
            | Kind::PackageTransaction => Aspect::Written,
            kind => Aspect::Counted(kind),
        }
    }
}

/// What was reported of a member: a short hash of its content, or that it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reported(u32);

impl Reported {
    /// The file was there, and is gone.
    pub const GONE: Reported = Reported(0);
    /// The report is that the file is missing.
    pub const REMOVED: Reported = Reported(1);
    const UNHASHED: Reported = Reported(2);

    pub fn content(blake3: Option<Blake3Hash>) -> Reported {
        // A random key: a container that knew it could choose a content with the same number.
        static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        let Some(Blake3Hash(hash)) = blake3 else { return Reported::UNHASHED };
        let [a, b, c, d, ..] = KEY.hash_one(hash).to_le_bytes();
        Reported(u32::from_le_bytes([a, b, c, d]).max(3))
    }

    /// From the file of a finding.
    pub(super) fn of_file(kind: Kind, file: &FileEvidence) -> Reported {
        let is_run = kind.is_exec() || kind == Kind::LibraryLoaded;
        match kind {
            Kind::FileRemoved => Reported::REMOVED,
            _ if file.deleted && !is_run => Reported::GONE,
            _ => Reported::content(file.blake3),
        }
    }

    /// From a member as the history stores it.
    pub(super) fn of_member(member: &Member) -> Reported {
        match member {
            Member { removed: true, .. } => Reported::GONE,
            Member { kind: Kind::FileRemoved, .. } => Reported::REMOVED,
            member => Reported::content(member.blake3),
        }
    }
}

/// The key of a file. All containers use one hasher, so that the members of remembered
/// findings can be hashed before their container appears.
pub(super) fn key(hasher: &RandomState, aspect: Aspect, path: &RootfsPath) -> u64 {
    hasher.hash_one((aspect, path.as_bytes()))
}

impl Members {
    pub(super) fn new(hasher: RandomState, share: Share) -> Members {
        Members { hasher, share, ..Members::default() }
    }

    /// The finding that counts this file, and what it last reported of it.
    pub fn of(&self, aspect: Aspect, path: &RootfsPath) -> Option<(FindingId, Reported)> {
        let (group, reported) = *self.known.get(&key(&self.hasher, aspect, path))?;
        Some((self.groups[group as usize], reported))
    }

    /// False if there is no room for another file.
    pub fn put(
        &mut self,
        aspect: Aspect,
        path: &RootfsPath,
        finding: FindingId,
        reported: Reported,
    ) -> bool {
        self.put_key(key(&self.hasher, aspect, path), finding, reported)
    }

    pub(super) fn put_key(&mut self, key: u64, finding: FindingId, reported: Reported) -> bool {
        if !self.known.contains_key(&key) && !self.share.try_take(1) {
            return false;
        }
        let groups = &mut self.groups;
        let group = *self.indexes.entry(finding).or_insert_with(|| {
            groups.push(finding);
            u32::try_from(groups.len() - 1).expect("there are fewer findings")
        });
        self.known.insert(key, (group, reported));
        true
    }
}
