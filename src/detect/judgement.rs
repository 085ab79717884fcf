//! What a fact means: how the container differs from its image, and what is wrong with that.
//! Types only; the pipeline makes findings of them.

use crate::baseline::KnownBaseline;
use crate::model::{Kind, Severity};

/// How one path of a container differs from its image, drift or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Added,
    /// Other content, or data, whose content is not compared.
    Modified,
    Removed,
    /// Same content; mode, owner, time or an attribute differ.
    Metadata,
    /// Content of the image at a new path.
    Relocated,
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Judgement {
    pub kind: Kind,
    pub severity: Severity,
    /// What the image has instead: at the path or, for relocated content, where
    /// the content belongs.
    pub expected: Option<KnownBaseline>,
}

impl Judgement {
    /// A judgement with the usual severity of its kind.
    pub(super) fn of(kind: Kind, expected: Option<KnownBaseline>) -> Judgement {
        Judgement { kind, severity: kind.severity(), expected }
    }
}

/// How one fact is judged.
#[derive(Clone, Debug)]
pub struct Assessment {
    pub change: Change,
    /// Empty when the difference is no drift.
    pub judgements: Vec<Judgement>,
}
