//! Reads the policy files and the profiles. The only part of the room that touches the disk.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::parse::{Loaded, parse};
use super::signature;
use super::source::{Fault, PolicyFile, Refused};
use crate::config::PolicyFiles;
use crate::model::printable;

/// The largest policy file, and the largest set.
pub const MAX_FILE: u64 = 8 << 20;
const MAX_FILES: usize = 1000;

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
    // What holds for all containers need not be asked for.
    let asked = from.container_profiles.iter().filter(|one| !from.profiles.contains(one));
    for profile in asked {
        let file = reading.profile(&from.profile_dir, profile);
        files.extend(file.map(|file| PolicyFile { by_label: true, ..file }));
    }
    if !reading.faults.is_empty() {
        return Err(Refused(reading.faults));
    }
    let loaded = Loaded { has_directory, signed, ..parse(&from.dir, files)? };
    let faults = unknown_hooks(&loaded, from);
    if faults.is_empty() { Ok(loaded) } else { Err(Refused(faults)) }
}

/// Rules that name a hook which the settings do not have, if the settings are known.
fn unknown_hooks(loaded: &Loaded, from: &PolicyFiles) -> Vec<Fault> {
    let Some(known) = &from.hooks else { return Vec::new() };
    let unknown = loaded.rules.rules().iter().filter_map(|rule| {
        let hook = rule.hook.as_deref().filter(|hook| !known.contains(*hook))?;
        let (id, shown) = (&rule.id, printable(hook.as_bytes()));
        let names = if known.is_empty() {
            "none".to_owned()
        } else {
            known.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
        };
        let message = format!(
            "rule `{id}`: the settings have no hook `{shown}` ([hooks.NAME] in driftd.toml; there \
             is: {names})"
        );
        let file = PathBuf::from(&*rule.place.file);
        Some(Fault { file, at: Some((rule.place.line, 1)), message })
    });
    unknown.collect()
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
                    files.push(PolicyFile::new(printable(name), text));
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
                Some(PolicyFile { name, text, profile: Some(profile.to_owned()), by_label: false })
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
