//! Text of a report: the report's own words, and text that others have chosen.
//!
//! Pure. The two are apart, so that each renderer can show which is which, and text from a
//! container is never taken for the report's words. All of it is safe for a terminal.

use jiff::Timestamp;

use crate::cli::output::{safe, time};

/// Characters of one quoted text that are shown.
const MOST: usize = 700;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The report's own words.
    Own(String),
    /// What a container, an image or a user has chosen.
    Quoted(String),
    /// A finding or session that the report lists, by its ID.
    Link { to: String, id: String },
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Phrase {
    pub(super) parts: Vec<Part>,
}

/// A label with what is said below it.
pub(super) type Row = (&'static str, Vec<Phrase>);

/// A time, for people and for programs.
#[derive(Clone, Debug)]
pub(super) struct At {
    pub(super) text: String,
    pub(super) machine: String,
}

pub(super) fn at(when: Timestamp) -> At {
    At { text: time(when), machine: when.to_string() }
}

/// What became of a response.
pub(super) fn result_of(succeeded: bool, gone: bool) -> &'static str {
    match (succeeded, gone) {
        (true, _) => "done",
        (false, true) => "not done: that run was over",
        (false, false) => "FAILED",
    }
}

/// Begins with the report's own words.
pub(super) fn own(text: impl Into<String>) -> Phrase {
    Phrase::default().own(text)
}

/// Begins with text that others have chosen.
pub(super) fn quoted(text: &str) -> Phrase {
    Phrase::default().quoted(text)
}

impl Phrase {
    pub(super) fn own(mut self, text: impl Into<String>) -> Phrase {
        self.parts.push(Part::Own(text.into()));
        self
    }

    pub(super) fn quoted(mut self, text: &str) -> Phrase {
        if text.is_empty() {
            return self.own("(empty)");
        }
        let text = safe(text);
        let rest = match text.char_indices().nth(MOST) {
            None => String::new(),
            Some((end, _)) => text[end..].to_owned(),
        };
        let shown = text[..text.len() - rest.len()].to_owned();
        self.parts.push(Part::Quoted(shown));
        match rest.chars().count() {
            0 => self,
            more => self.own(format!(" … ({more} characters more)")),
        }
    }

    pub(super) fn link(mut self, to: String, id: String) -> Phrase {
        self.parts.push(Part::Link { to, id });
        self
    }

    pub(super) fn then(mut self, other: Phrase) -> Phrase {
        self.parts.extend(other.parts);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_text_is_printable_and_bounded() {
        assert_eq!(
            quoted("a\u{1b}[2J\n\u{202e}").parts,
            [Part::Quoted("a\\u{1b}[2J\\n\\u{202e}".to_owned())]
        );
        let long = quoted(&"木".repeat(MOST + 3)).parts;
        assert_eq!(
            long,
            [Part::Quoted("木".repeat(MOST)), Part::Own(" … (3 characters more)".to_owned()),]
        );
    }
}
