//! The error for a name that is not among the known ones.
//!
//! Kinds, severities, dispositions and IDs are read from settings, requests and command
//! lines. The error escapes the name, and lists what is known.

use super::printable::printable;

/// A name that stands for no kind, severity, disposition or ID.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{word}` is no {what} (known: {known})")]
pub struct UnknownName {
    word: String,
    what: &'static str,
    known: String,
}

impl UnknownName {
    pub(super) fn new(word: &str, what: &'static str, known: &str) -> UnknownName {
        let word = printable(word.as_bytes());
        UnknownName { word, what, known: known.to_owned() }
    }
}
