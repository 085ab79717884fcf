//! Whether a case is as it was taken: also a copy of it, without a daemon.
//!
//! The manifest and `SHA256SUMS` name every file with its digest, and each of them shows a change
//! of the other. Only a case that is changed as a whole passes; its digest then differs from
//! the one that the history, or an export's statement, has kept.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use super::manifest::{MANIFEST, SUMS};
use super::reading::{digest_of, files_below, hash_file, read_manifest};
use super::sums;
use crate::model::{CaseId, Sha256Hash, printable};
use crate::sys::file::read_regular;

/// The longest `SHA256SUMS`.
const MAX_SUMS: u64 = 64 << 20;
/// How many problems are listed.
const MOST: usize = 100;

/// The result.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// `None` if the manifest cannot be read.
    pub case: Option<CaseId>,
    /// The digest as it is now; `None` without `SHA256SUMS`.
    pub digest: Option<Sha256Hash>,
    /// What is not as it was taken; empty if all is.
    pub problems: Vec<String>,
    pub files: u64,
    pub bytes: u64,
}

/// Verifies the case in a directory. An error only if the directory itself cannot be read.
pub fn verify(directory: &Path) -> io::Result<Verified> {
    let mut result = Verified::default();
    let found = files_below(directory)?;
    let listed = match read_regular(&directory.join(SUMS), MAX_SUMS) {
        Err(err) => Err(format!("{SUMS} cannot be read: {err}")),
        Ok(text) => {
            result.digest = Some(digest_of(&text));
            let text = String::from_utf8(text).map_err(|_| "it is no text".to_owned());
            text.and_then(|text| sums::parse(&text)).map_err(|why| format!("{SUMS}: {why}"))
        }
    };
    let listed = listed.unwrap_or_else(|problem| {
        result.problems.push(problem);
        BTreeMap::new()
    });
    let manifest = match read_manifest(directory) {
        Err(problem) => {
            result.problems.push(problem);
            None
        }
        Ok(manifest) => {
            result.case = Some(manifest.case);
            Some(manifest)
        }
    };
    let mut named: BTreeMap<&str, Sha256Hash> = BTreeMap::new();
    for file in manifest.iter().flat_map(|manifest| &manifest.files) {
        if named.insert(&file.name, file.sha256).is_some() {
            result.problem(format!("{MANIFEST} names {} twice", file.name));
        }
        if found.get(&file.name).is_some_and(|bytes| *bytes != file.bytes) {
            result.problem(format!("{} has another size", file.name));
        }
    }
    if manifest.is_some() && !listed.is_empty() {
        result.compare(&named, &listed);
    }
    for (name, digest) in &listed {
        if !found.contains_key(name) {
            result.problem(format!("{name} is missing"));
            continue;
        }
        match hash_file(&directory.join(name)) {
            Ok((is, bytes)) => {
                result.files += 1;
                result.bytes += bytes;
                if is != *digest {
                    result.problem(format!("{name} was changed"));
                }
            }
            Err(err) => result.problem(format!("{name} cannot be read: {err}")),
        }
    }
    for name in found.keys().filter(|name| *name != SUMS && !listed.contains_key(*name)) {
        result.problem(format!("{} was added", printable(name.as_bytes())));
    }
    Ok(result)
}

impl Verified {
    fn problem(&mut self, problem: String) {
        match self.problems.len() {
            MOST => self.problems.push("and more".to_owned()),
            length if length > MOST => (),
            _ => self.problems.push(problem),
        }
    }

    /// Whether the manifest and the sums name the same.
    fn compare(
        &mut self,
        named: &BTreeMap<&str, Sha256Hash>,
        listed: &BTreeMap<String, Sha256Hash>,
    ) {
        if !listed.contains_key(MANIFEST) {
            self.problem(format!("{SUMS} does not name {MANIFEST}"));
        }
        for (name, digest) in listed.iter().filter(|(name, _)| *name != MANIFEST) {
            match named.get(name.as_str()) {
                None => self.problem(format!("{MANIFEST} does not name {name}")),
                Some(other) if other != digest => {
                    self.problem(format!("{MANIFEST} and {SUMS} differ about {name}"));
                }
                Some(_) => (),
            }
        }
        for name in named.keys().filter(|name| !listed.contains_key(**name)) {
            self.problem(format!("{SUMS} does not name {name}"));
        }
    }
}
