//! Reads the policy files. The only part of the room that touches the disk.
//!
//! All files together are one set: with one fault in any of them, none is taken.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::rule::{Place, Rule};
use super::set::{MAX_RULES, RuleSet};
use super::text::FileText;
use crate::model::printable;

/// The largest policy file, and the largest set.
pub const MAX_FILE: u64 = 8 << 20;
const MAX_FILES: usize = 1000;
/// Faults that are reported at once.
const MAX_FAULTS: usize = 20;

/// A set of rules as it was read.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub rules: RuleSet,
    /// The name that a file gives to this state of the rules.
    pub version: Option<String>,
    /// The hash of all files, their names included.
    pub digest: Option<String>,
    pub files: Arc<[PolicyFile]>,
}

/// One policy file as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyFile {
    /// Without the directory.
    pub name: String,
    pub text: String,
}

/// What is wrong with a policy file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub file: PathBuf,
    /// Line and column, both from 1.
    pub at: Option<(usize, usize)>,
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(self.file.as_os_str().as_encoded_bytes()))?;
        if let Some((line, column)) = self.at {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", printable(self.message.as_bytes()))
    }
}

/// Why a set of rules is refused: all faults that were found, one at least.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", lines(.0))]
pub struct Refused(pub Vec<Fault>);

fn lines(faults: &[Fault]) -> String {
    let mut lines: Vec<String> = faults.iter().take(MAX_FAULTS).map(Fault::to_string).collect();
    if faults.len() > MAX_FAULTS {
        lines.push(format!("and {} more faults", faults.len() - MAX_FAULTS));
    }
    lines.join("\n")
}

/// Who may have written the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// For a check by hand.
    Any,
    /// Root, or the user that runs driftd: rules of others would be exceptions for others.
    Own,
}

/// Reads all `*.toml` of a directory, in the order of their names. `None` if the directory is
/// not there.
pub fn read(directory: &Path, owners: Owners) -> Result<Option<Loaded>, Refused> {
    let failed = |file: &Path, err: &io::Error| {
        Refused(vec![Fault {
            file: file.into(),
            at: None,
            message: format!("cannot be read: {err}"),
        }])
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(err) => return Err(failed(directory, &err)),
    };
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let path = entry.map_err(|err| failed(directory, &err))?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.ends_with(b".toml") && !name.starts_with(b".") {
            paths.push(path);
        }
    }
    if paths.len() > MAX_FILES {
        let message = format!("has {} policy files, and at most {MAX_FILES} may be", paths.len());
        return Err(Refused(vec![Fault { file: directory.into(), at: None, message }]));
    }
    paths.sort();
    let (mut files, mut faults, mut bytes) = (Vec::new(), Vec::new(), 0);
    for path in paths {
        let text = open(&path, owners).and_then(|file| read_whole(file, MAX_FILE - bytes));
        match text {
            Ok(text) => {
                bytes += text.len() as u64;
                let name = path.file_name().unwrap_or_default().as_encoded_bytes();
                files.push(PolicyFile { name: printable(name), text });
            }
            Err(err) => faults.extend(failed(&path, &err).0),
        }
    }
    if faults.is_empty() { parse(directory, files).map(Some) } else { Err(Refused(faults)) }
}

/// Opens a policy file. Never waits: what is no regular file may have that name.
fn open(path: &Path, owners: Owners) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let is_own = metadata.uid() == 0 || metadata.uid() == rustix::process::geteuid().as_raw();
    if owners == Owners::Own && (!is_own || metadata.mode() & 0o022 != 0) {
        return Err(io::Error::other("others than root may write to it (chown root, chmod go-w)"));
    }
    Ok(file)
}

fn read_whole(file: File, most: u64) -> io::Result<String> {
    let mut text = String::new();
    file.take(most + 1).read_to_string(&mut text)?;
    if text.len() as u64 > most {
        return Err(io::Error::other(format!(
            "the policy files have more than {} MiB together",
            MAX_FILE >> 20
        )));
    }
    Ok(text)
}

/// Makes one set of the texts of all files. `directory` is for messages only.
pub fn parse(directory: &Path, files: Vec<PolicyFile>) -> Result<Loaded, Refused> {
    let (mut rules, mut faults) = (Vec::new(), Vec::new());
    let mut version: Option<String> = None;
    let mut hash = blake3::Hasher::new();
    // Where each rule stands.
    let mut places: Vec<(PathBuf, (usize, usize))> = Vec::new();
    for PolicyFile { name, text } in &files {
        for part in [name, text] {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        let file = directory.join(name);
        let shown: Arc<str> = file.display().to_string().into();
        let fault = |at, message| Fault { file: file.clone(), at, message };
        let lines = Lines::of(text);
        let parsed: FileText = match toml::from_str(text) {
            Ok(parsed) => parsed,
            Err(err) => {
                let at = err.span().map(|span| lines.position(span.start));
                faults.push(fault(at, err.message().to_owned()));
                continue;
            }
        };
        match (&version, parsed.version) {
            (_, None) => (),
            (None, named) => version = named,
            (Some(_), Some(_)) => {
                faults.push(fault(Some((1, 1)), "another file has a `version` already".to_owned()));
            }
        }
        for rule in parsed.rule {
            let at = lines.position(rule.span().start);
            let place = Place { file: Arc::clone(&shown), line: at.0 };
            let text = rule.into_inner();
            let id = printable(text.id.as_bytes());
            match Rule::new(text, place) {
                Ok(rule) => {
                    rules.push(rule);
                    places.push((file.clone(), at));
                }
                Err(message) => faults.push(fault(Some(at), format!("rule `{id}`: {message}"))),
            }
        }
        if rules.len() > MAX_RULES {
            break;
        }
    }
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
            Ok(Loaded { rules, version, digest, files: files.into() })
        }
        Ok(_) => Err(Refused(faults)),
        Err(fault) => {
            faults.push(fault);
            Err(Refused(faults))
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
