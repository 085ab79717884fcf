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
use super::signature;
use super::text::FileText;
use crate::config::PolicyFiles;
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
    /// What the files say that they are for.
    pub about: Vec<String>,
    /// Whether the directory of the policy files is there.
    pub has_directory: bool,
    /// What the signature of the policy files says; `None` if none is needed.
    pub signed: Option<String>,
}

impl Loaded {
    /// The profiles that are switched on.
    pub fn profiles(&self) -> impl Iterator<Item = &str> {
        self.files.iter().filter_map(|file| file.profile.as_deref())
    }

    /// Whether the directory has policy files.
    pub fn has_files(&self) -> bool {
        self.files.iter().any(|file| file.profile.is_none())
    }
}

/// One policy file as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyFile {
    /// Without the directory. The whole path, if it is a profile.
    pub name: String,
    pub text: String,
    /// The name of the profile.
    pub profile: Option<String>,
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

/// Which users may have written the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// For a check by hand.
    Any,
    /// Root, or the user that runs driftd: rules of others would be exceptions for others.
    Own,
}

/// Reads all `*.toml` of the directory, in the order of their names, and then the profiles
/// that are switched on.
pub fn read(from: &PolicyFiles, owners: Owners) -> Result<Loaded, Refused> {
    let mut reading = Reading { owners, bytes: 0, faults: Vec::new() };
    let own = reading.directory(&from.dir);
    let (has_directory, mut files) = (own.is_some(), own.unwrap_or_default());
    let mut signed = None;
    if !from.public_key.is_empty() && has_directory {
        match signature::verify(&from.public_key, &from.dir, &files, |path| reading.text(path)) {
            Ok(comment) => signed = Some(comment),
            Err(fault) => reading.faults.push(fault),
        }
    }
    for profile in &from.profiles {
        files.extend(reading.profile(&from.profile_dir, profile));
    }
    if !reading.faults.is_empty() {
        return Err(Refused(reading.faults));
    }
    Ok(Loaded { has_directory, signed, ..parse(&from.dir, files)? })
}

/// The files of these profiles.
pub fn read_profiles(directory: &Path, profiles: &[String]) -> Result<Vec<PolicyFile>, Refused> {
    let mut reading = Reading { owners: Owners::Any, bytes: 0, faults: Vec::new() };
    let files = profiles.iter().filter_map(|profile| reading.profile(directory, profile)).collect();
    if reading.faults.is_empty() { Ok(files) } else { Err(Refused(reading.faults)) }
}

/// The names of the profiles of a directory, in their order.
pub fn profile_names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = paths_of(directory)?
        .iter()
        .filter_map(|path| path.file_stem()?.to_str().map(str::to_owned))
        .filter(|name| is_profile_name(name))
        .collect();
    names.dedup();
    Ok(names)
}

fn is_profile_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    !name.is_empty() && name.bytes().all(is_plain)
}

/// The files of a directory that can be policy files, in the order of their names.
fn paths_of(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().as_encoded_bytes();
        if name.ends_with(b".toml") && !name.starts_with(b".") {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

/// Files that are being read, all within one limit.
struct Reading {
    owners: Owners,
    bytes: u64,
    faults: Vec<Fault>,
}

impl Reading {
    /// The policy files of a directory; `None` if it is not there.
    fn directory(&mut self, directory: &Path) -> Option<Vec<PolicyFile>> {
        let paths = match paths_of(directory) {
            Ok(paths) => paths,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return None,
            Err(err) => {
                self.faults.push(unreadable(directory, &err));
                return Some(Vec::new());
            }
        };
        if paths.len() > MAX_FILES {
            let message =
                format!("has {} policy files, and at most {MAX_FILES} may be", paths.len());
            self.faults.push(Fault { file: directory.into(), at: None, message });
            return Some(Vec::new());
        }
        let mut files = Vec::new();
        for path in paths {
            match self.text(&path) {
                Ok(text) => {
                    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
                    files.push(PolicyFile { name: printable(name), text, profile: None });
                }
                Err(fault) => self.faults.push(fault),
            }
        }
        Some(files)
    }

    fn profile(&mut self, directory: &Path, profile: &str) -> Option<PolicyFile> {
        let path = directory.join(format!("{profile}.toml"));
        if !is_profile_name(profile) || !path.is_file() {
            let message = match profile_names(directory) {
                Ok(names) => format!("there is no profile `{profile}`: {}", names.join(", ")),
                Err(err) => format!("there is no profile `{profile}`: {err}"),
            };
            self.faults.push(Fault { file: directory.into(), at: None, message });
            return None;
        }
        match self.text(&path) {
            Ok(text) => {
                let name = printable(path.as_os_str().as_encoded_bytes());
                Some(PolicyFile { name, text, profile: Some(profile.to_owned()) })
            }
            Err(fault) => {
                self.faults.push(fault);
                None
            }
        }
    }

    fn text(&mut self, path: &Path) -> Result<String, Fault> {
        let text = open(path, self.owners).and_then(|file| read_whole(file, MAX_FILE - self.bytes));
        let text = text.map_err(|err| unreadable(path, &err))?;
        self.bytes += text.len() as u64;
        Ok(text)
    }
}

fn unreadable(file: &Path, err: &io::Error) -> Fault {
    Fault { file: file.into(), at: None, message: format!("cannot be read: {err}") }
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
    let mut all_about = Vec::new();
    let mut hash = blake3::Hasher::new();
    // Where each rule stands.
    let mut places: Vec<(PathBuf, (usize, usize))> = Vec::new();
    for PolicyFile { name, text, profile } in &files {
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
        match (&version, &parsed.version) {
            (_, None) => (),
            (None, named) => version.clone_from(named),
            (Some(_), Some(_)) => {
                faults.push(fault(Some((1, 1)), "another file has a `version` already".to_owned()));
            }
        }
        if parsed.version.is_some() && profile.is_some() {
            faults.push(fault(Some((1, 1)), "a profile has no `version`".to_owned()));
        }
        match parsed.about {
            Some(about) => all_about.push(printable(about.as_bytes())),
            None if profile.is_some() => {
                faults.push(fault(Some((1, 1)), "`about` is missing: what is it for?".to_owned()));
            }
            None => (),
        }
        for rule in parsed.rule {
            let at = lines.position(rule.span().start);
            let place = Place { file: Arc::clone(&shown), line: at.0 };
            let text = rule.into_inner();
            let id = printable(text.id.as_bytes());
            match Rule::new(text, place, profile.as_deref()) {
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
            Ok(Loaded {
                rules,
                version,
                digest,
                files: files.into(),
                about: all_about,
                has_directory: true,
                signed: None,
            })
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
