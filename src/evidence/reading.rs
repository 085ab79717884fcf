//! How the files of a case are read back: by the store, and to verify a case.
//!
//! A copy of a case may come from anywhere: no link is followed, and only regular files are opened.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::manifest::{MANIFEST, Manifest, SCHEMA};
use super::sums;
use crate::model::{Sha256Hash, printable};
use crate::sys::file::{open_host_file, read_regular};
use crate::threads;

/// The longest manifest that is read.
pub(super) const MAX_MANIFEST: u64 = 64 << 20;

/// Reads the manifest of a case. The error is for people.
pub(super) fn read_manifest(directory: &Path) -> Result<Manifest, String> {
    let path = directory.join(MANIFEST);
    let text = read_regular(&path, MAX_MANIFEST)
        .map_err(|err| format!("{MANIFEST} cannot be read: {err}"))?;
    let manifest: Manifest = serde_json::from_slice(&text)
        .map_err(|err| format!("{MANIFEST} is not driftd's: {err}"))?;
    if manifest.schema != SCHEMA {
        return Err(format!("{MANIFEST} has another schema than {SCHEMA}"));
    }
    if let Some(wrong) = manifest.files.iter().find(|file| !sums::is_name(&file.name)) {
        let shown = printable(wrong.name.as_bytes());
        return Err(format!("{MANIFEST} names `{shown}`, which is no name in a case"));
    }
    Ok(manifest)
}

/// The digest of a case: of its sums.
pub(super) fn digest_of(sums: &[u8]) -> Sha256Hash {
    Sha256Hash(Sha256::digest(sums).into())
}

/// The regular files below a directory with their sizes, by their paths from there. Anything else
/// has the size of nothing, so that it is found to be different; no link is followed.
pub(super) fn files_below(directory: &Path) -> io::Result<BTreeMap<String, u64>> {
    const MAX_DEPTH: usize = 8;
    let mut files = BTreeMap::new();
    let mut waiting = vec![(directory.to_owned(), String::new(), 0)];
    while let Some((path, prefix, depth)) = waiting.pop() {
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            let name = printable(entry.file_name().as_bytes());
            let name = format!("{prefix}{name}");
            let found = entry.file_type()?;
            if found.is_dir() && depth < MAX_DEPTH {
                waiting.push((entry.path(), format!("{name}/"), depth + 1));
            } else if found.is_file() {
                files.insert(name, entry.metadata()?.len());
            } else {
                files.insert(name, u64::MAX);
            }
        }
    }
    Ok(files)
}

/// The digest of a regular file, and how many bytes it has.
pub(super) fn hash_file(path: &Path) -> io::Result<(Sha256Hash, u64)> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut file = File::from(open_host_file(path)?);
    let mut buffer = vec![0; 256 << 10];
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok((Sha256Hash(hash.finalize().into()), bytes));
        }
        threads::beat();
        hash.update(&buffer[..read]);
        bytes += read as u64;
    }
}
