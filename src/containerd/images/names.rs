//! The state of each image name: how far its recording is, what it waits for, and when it is
//! tried again.
//!
//! Decides only; `follow` carries out what follows.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::ImageError;
use crate::baseline::Recorded;
use crate::containerd::manifests::Descriptor;
use crate::model::ChainId;

/// When an image that could not be recorded is tried again without an event: at first, and at
/// most.
const FIRST_RETRY: Duration = Duration::from_secs(60);
const LAST_RETRY: Duration = Duration::from_secs(3600);
/// How long an image waits for (more of) its layers to be unpacked, before its archives are
/// read.
pub(super) const UNPACK_PATIENCE: Duration = Duration::from_secs(45);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) namespace: Arc<str>,
    pub(super) name: String,
}

/// How far one image name is.
#[derive(Debug)]
pub(super) struct ImageState {
    pub(super) target: Option<Descriptor>,
    pub(super) last_event: Instant,
    pub(super) readiness: Readiness,
    /// Since when none of the layers that it waits for was unpacked.
    pub(super) waits_since: Instant,
    /// After a failure: how long lists pass it over, and since when.
    retry_pause: Duration,
    failed_at: Instant,
    /// The digest and the reason that were last logged.
    last_warning: Option<(String, String)>,
    /// A task is checking it.
    pub(super) is_being_checked: bool,
    /// The task has to check it once more.
    pub(super) check_again: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Readiness {
    New,
    /// Not unpacked. It is recorded as soon as this chain is there.
    Waiting(ChainId),
    /// Neither unpacked nor readable from its archives. It still waits for this chain.
    Incomplete {
        chain_id: ChainId,
        reason: String,
    },
    Recorded {
        target: String,
    },
    /// A chart or a signature: nothing with which a container could be compared.
    NoImage,
    Problem {
        digest: String,
        reason: String,
    },
}

impl ImageState {
    pub(super) fn new() -> ImageState {
        ImageState {
            target: None,
            last_event: Instant::now(),
            readiness: Readiness::New,
            waits_since: Instant::now(),
            retry_pause: Duration::ZERO,
            failed_at: Instant::now(),
            last_warning: None,
            is_being_checked: false,
            check_again: false,
        }
    }

    pub(super) fn waits_for(&self) -> Option<ChainId> {
        match self.readiness {
            Readiness::Waiting(chain_id) | Readiness::Incomplete { chain_id, .. } => Some(chain_id),
            Readiness::New
            | Readiness::Recorded { .. }
            | Readiness::NoImage
            | Readiness::Problem { .. } => None,
        }
    }

    /// Notes that it waits for its layers. Whether it has done so for long.
    pub(super) fn wait_for(&mut self, chain_id: ChainId) -> bool {
        if self.waits_for() != Some(chain_id) {
            self.readiness = Readiness::Waiting(chain_id);
            self.waits_since = Instant::now();
        }
        self.waits_since.elapsed() >= UNPACK_PATIENCE
    }

    /// Files the target that a list gives, which was requested at `requested`. Whether nothing
    /// is to be done.
    pub(super) fn listed(&mut self, target: Descriptor, requested: Instant) -> bool {
        let same = self.target.as_ref().is_some_and(|known| known.digest == target.digest);
        let settled = match &self.readiness {
            Readiness::Recorded { target: recorded } => *recorded == target.digest,
            Readiness::NoImage => same,
            Readiness::Problem { .. } => same && self.failed_at.elapsed() < self.retry_pause,
            Readiness::New | Readiness::Waiting(_) | Readiness::Incomplete { .. } => false,
        };
        // The target of a later event is newer than that of the list.
        if self.target.is_none() || self.last_event < requested {
            self.target = Some(target);
        }
        settled
    }

    /// Moves to `next`. After a failure, each pause before the next try is longer.
    pub(super) fn move_to(&mut self, next: Readiness) {
        if let Readiness::Problem { .. } = next {
            self.failed_at = Instant::now();
            self.retry_pause = (self.retry_pause * 2).clamp(FIRST_RETRY, LAST_RETRY);
        } else {
            self.retry_pause = Duration::ZERO;
        }
        self.readiness = next;
    }

    /// Whether this warning was not logged before. Each is logged once per image and reason,
    /// however often the image is tried again.
    pub(super) fn is_new_warning(&mut self, digest: &str, reason: &str) -> bool {
        let warning = Some((digest.to_owned(), reason.to_owned()));
        let is_new = self.last_warning != warning;
        self.last_warning = warning;
        is_new
    }

    /// Why it has no baseline, with the digest that the reason is about.
    pub(super) fn problem(&self) -> Option<(String, String)> {
        match &self.readiness {
            Readiness::Problem { digest, reason } => Some((digest.clone(), reason.clone())),
            Readiness::Waiting(chain_id) if !self.is_being_checked => Some((
                chain_id.to_string(),
                "it is not unpacked yet; it will be recorded when it is".into(),
            )),
            Readiness::Incomplete { chain_id, reason } => {
                Some((chain_id.to_string(), reason.clone()))
            }
            Readiness::New
            | Readiness::Waiting(_)
            | Readiness::Recorded { .. }
            | Readiness::NoImage => None,
        }
    }
}

impl Readiness {
    /// What follows from how the recording of `target` went. `None` if the connection failed:
    /// the list after the next connection checks again.
    pub(super) fn after(
        outcome: &Result<Recorded, ImageError>,
        target: &Descriptor,
    ) -> Option<Readiness> {
        Some(match outcome {
            Ok(_) => Readiness::Recorded { target: target.digest.clone() },
            Err(ImageError::Interrupted(_)) => return None,
            Err(ImageError::Unknown | ImageError::NoImage) => Readiness::NoImage,
            Err(ImageError::NotUnpacked { chain_id, reason: None }) => {
                Readiness::Waiting(*chain_id)
            }
            Err(ImageError::NotUnpacked { chain_id, reason: Some(reason) }) => {
                Readiness::Incomplete { chain_id: *chain_id, reason: reason.clone() }
            }
            Err(ImageError::Bad { digest, reason }) => {
                Readiness::Problem { digest: digest.clone(), reason: reason.clone() }
            }
            Err(ImageError::NotRecorded { chain_id, reason }) => {
                Readiness::Problem { digest: chain_id.to_string(), reason: reason.clone() }
            }
        })
    }
}
