//! Makes one set of rules of the texts of policy files. Pure.
//!
//! All files together are one set: with one fault in any of them, none is taken.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::rule::{Place, Rule};
use super::set::{MAX_RULES, RuleSet};
use super::source::{Fault, PolicyFile, Refused};
use super::text::FileText;
use crate::model::printable;

/// A set of rules as it was read.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub rules: RuleSet,
    /// The name that a file gives to this state of the rules.
    pub version: Option<String>,
    /// The hash of all files, their names included.
    pub digest: Option<String>,
    pub files: Arc<[PolicyFile]>,
    /// What the files say that they are for.
    pub about: Vec<String>,
    /// Whether the directory of the policy files is there.
    pub has_directory: bool,
    /// What the signature of the policy files says; `None` if none is needed.
    pub signed: Option<String>,
}

impl Loaded {
    /// Whether the directory has policy files.
    pub fn has_files(&self) -> bool {
        self.files.iter().any(|file| file.profile.is_none())
    }
}

/// Makes one set of the texts of all files. `directory` is for messages only.
pub fn parse(directory: &Path, files: Vec<PolicyFile>) -> Result<Loaded, Refused> {
    let mut parsed = Parsed::default();
    for file in &files {
        parsed.add(directory, file);
        if parsed.rules.len() > MAX_RULES {
            break;
        }
    }
    let Parsed { rules, places, mut faults, version, about, hash } = parsed;
    let made = RuleSet::new(rules).map_err(|(number, message)| {
        let place = places.get(number).or(places.last());
        let (file, at) =
            place.map_or((directory.to_owned(), None), |(file, at)| (file.clone(), Some(*at)));
        Fault { file, at, message }
    });
    match made {
        Ok(rules) if faults.is_empty() => {
            let digest =
                (!files.is_empty()).then(|| format!("blake3:{}", hash.finalize().to_hex()));
            let files = files.into();
            Ok(Loaded { rules, version, digest, files, about, has_directory: true, signed: None })
        }
        Ok(_) => Err(Refused(faults)),
        Err(fault) => {
            faults.push(fault);
            Err(Refused(faults))
        }
    }
}

/// What the files so far say.
#[derive(Default)]
struct Parsed {
    rules: Vec<Rule>,
    /// Where each rule stands.
    places: Vec<(PathBuf, (usize, usize))>,
    faults: Vec<Fault>,
    version: Option<String>,
    about: Vec<String>,
    hash: blake3::Hasher,
}

impl Parsed {
    fn add(&mut self, directory: &Path, file: &PolicyFile) {
        let PolicyFile { name, text, profile, by_label } = file;
        let how = if *by_label { "by label" } else { "" };
        for part in [name, text, how] {
            self.hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        let path = directory.join(name);
        let fault = |at, message: &str| Fault { file: path.clone(), at, message: message.into() };
        let at_begin = |message: &str| fault(Some((1, 1)), message);
        let lines = Lines::of(text);
        let parsed: FileText = match toml::from_str(text) {
            Ok(parsed) => parsed,
            Err(err) => {
                let at = err.span().map(|span| lines.position(span.start));
                self.faults.push(fault(at, err.message()));
                return;
            }
        };
        match (parsed.version, profile) {
            (None, _) => (),
            (Some(_), Some(_)) => self.faults.push(at_begin("a profile has no `version`")),
            (Some(_), None) if self.version.is_some() => {
                self.faults.push(at_begin("another file has a `version` already"));
            }
            (named, None) => self.version = named,
        }
        match (parsed.about, profile) {
            (Some(about), _) => self.about.push(printable(about.as_bytes())),
            (None, Some(_)) => {
                self.faults.push(at_begin("`about` is missing: what is it for?"));
            }
            (None, None) => (),
        }
        let shown: Arc<str> = path.display().to_string().into();
        for rule in parsed.rule {
            let at = lines.position(rule.span().start);
            let place = Place { file: Arc::clone(&shown), line: at.0 };
            let text = rule.into_inner();
            let id = printable(text.id.as_bytes());
            match Rule::new(text, place, profile.as_deref()) {
                Ok(mut rule) => {
                    if let Some(profile) = profile.as_ref().filter(|_| *by_label) {
                        rule.asked_by_label(profile);
                    }
                    self.rules.push(rule);
                    self.places.push((path.clone(), at));
                }
                Err(message) => {
                    self.faults.push(fault(Some(at), &format!("rule `{id}`: {message}")));
                }
            }
        }
    }
}

/// Where the lines of a text begin: a large file has many rules, and each has its place.
struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl Lines<'_> {
    fn of(text: &str) -> Lines<'_> {
        let ends = text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n');
        let starts = std::iter::once(0).chain(ends.map(|(at, _)| at + 1)).collect();
        Lines { text, starts }
    }

    /// The line and the column of a byte, both from 1.
    fn position(&self, at: usize) -> (usize, usize) {
        let line = self.starts.partition_point(|start| *start <= at).max(1);
        let before = self.text.get(self.starts[line - 1]..at).unwrap_or_default();
        (line, before.chars().count() + 1)
    }
}
