//! A case while it is written: in a directory with a temporary name, which nothing else uses.
//!
//! All limits meet here: the room, the disk, the deadline. driftd chooses every name, never a
//! container. The two files that describe the case come last; then `store` gives the directory
//! its name. So a case with a name is whole, whatever happened meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::manifest::{Kept, MANIFEST, Manifest, SUMS};
use super::sums;
use crate::model::Sha256Hash;
use crate::respond::Until;
use crate::sys::file::free_bytes;
use crate::threads;

/// What is left free on the disk: the history needs it more.
const LEFT_FREE: u64 = 32 << 20;
/// How many bytes are written between two looks at the disk.
const LOOK_AFTER: u64 = 4 << 20;
/// The part of the time that is left for writing all of it to the disk, and the most of that.
const REST: u32 = 5;
const MOST_REST: Duration = Duration::from_secs(2);
/// With more files than these, the whole filesystem is synced and not each file.
const SYNCED_ONE_BY_ONE: usize = 128;
/// The part of the room that is kept for the list of the files.
const RESERVE: u64 = 10;
/// What each file counts beside its bytes.
const OVERHEAD: u64 = 1024;

/// Why nothing more is kept, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cut(pub(super) String);

impl Cut {
    fn because(reason: &str) -> Cut {
        Cut(reason.to_owned())
    }
}

pub(super) const NO_TIME: &str = "the deadline has come (evidence.deadline)";
pub(super) const NO_DISK: &str = "the disk of the store is nearly full";
pub(super) const NO_ROOM: &str = "a limit of the store is reached (evidence.max_case_bytes, \
                                  evidence.max_bytes)";

/// The limits of one take.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    pub(super) room: u64,
    pub(super) until: Until,
    pub(super) is_stopping: Arc<AtomicBool>,
}

pub(super) struct Draft {
    directory: PathBuf,
    files: BTreeMap<String, Kept>,
    limits: Limits,
    began: Instant,
    left: u64,
    unlooked: u64,
    reserve: u64,
}

/// What was written, before the directory has its name.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) directory: PathBuf,
    pub(super) digest: Sha256Hash,
    pub(super) bytes: u64,
}

impl Draft {
    /// Begins in a new directory, with the files of `before`: the case as it is so far.
    pub(super) fn begin(
        directory: PathBuf,
        limits: Limits,
        before: Option<(&Path, &Manifest)>,
    ) -> io::Result<Draft> {
        DirBuilder::new().mode(0o700).create(&directory)?;
        let reserve = limits.room / RESERVE;
        let left = limits.room - reserve;
        let mut draft = Draft {
            directory,
            files: BTreeMap::new(),
            limits,
            began: Instant::now(),
            left,
            unlooked: LOOK_AFTER,
            reserve,
        };
        if let Some((directory, manifest)) = before {
            for file in &manifest.files {
                let to = draft.place(&file.name)?;
                fs::hard_link(directory.join(&file.name), to)?;
                draft.files.insert(file.name.clone(), file.clone());
            }
        }
        Ok(draft)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    /// Whether there is time to go on.
    pub(super) fn check_time(&self) -> Result<(), Cut> {
        threads::beat();
        if self.limits.is_stopping.load(Ordering::Relaxed) {
            return Err(Cut::because("driftd was stopped"));
        }
        let Some(until) = self.limits.until.get() else { return Ok(()) };
        let all = until.saturating_duration_since(self.began);
        match Instant::now() + (all / REST).min(MOST_REST) < until {
            true => Ok(()),
            false => Err(Cut::because(NO_TIME)),
        }
    }

    /// Takes room for bytes that are about to be written.
    pub(super) fn claim(&mut self, bytes: u64) -> Result<(), Cut> {
        self.check_time()?;
        self.unlooked = self.unlooked.saturating_add(bytes);
        if self.unlooked >= LOOK_AFTER {
            self.unlooked = 0;
            if free_bytes(&self.directory).is_ok_and(|free| free < LEFT_FREE + LOOK_AFTER + bytes) {
                return Err(Cut::because(NO_DISK));
            }
        }
        self.left = self.left.checked_sub(bytes).ok_or_else(|| Cut::because(NO_ROOM))?;
        Ok(())
    }

    /// Takes room for the list of the files, which is kept apart: without it, what was kept of
    /// the files would have no names.
    fn claim_reserved(&mut self, bytes: u64) -> Result<(), Cut> {
        self.reserve = self.reserve.checked_sub(bytes).ok_or_else(|| Cut::because(NO_ROOM))?;
        Ok(())
    }

    /// Returns room that was taken and is not needed.
    pub(super) fn unclaim(&mut self, bytes: u64) {
        self.left = self.left.saturating_add(bytes);
    }

    /// The place of a file, with the directories above it.
    fn place(&self, name: &str) -> io::Result<PathBuf> {
        debug_assert!(sums::is_name(name), "{name}");
        let path = self.directory.join(name);
        if let Some(parent) = path.parent() {
            DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        }
        Ok(path)
    }

    fn create(&self, name: &str) -> Result<File, Cut> {
        let create =
            |path: PathBuf| OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        self.place(name).and_then(create).map_err(|err| failed(&err))
    }

    /// Writes a whole file.
    pub(super) fn put(&mut self, name: &str, bytes: &[u8]) -> Result<(), Cut> {
        if self.has(name) {
            return Ok(());
        }
        self.claim(bytes.len() as u64 + OVERHEAD)?;
        let mut file = self.create(name)?;
        if let Err(err) = file.write_all(bytes) {
            let _ = fs::remove_file(self.directory.join(name));
            return Err(failed(&err));
        }
        self.note(name, bytes.len() as u64, Sha256Hash(Sha256::digest(bytes).into()));
        Ok(())
    }

    pub(super) fn put_json(&mut self, name: &str, value: &impl Serialize) -> Result<(), Cut> {
        let mut text = serde_json::to_vec_pretty(value).map_err(|err| Cut(err.to_string()))?;
        text.push(b'\n');
        self.put(name, &text)
    }

    fn note(&mut self, name: &str, bytes: u64, sha256: Sha256Hash) {
        let name = name.to_owned();
        self.files.insert(name.clone(), Kept { name, bytes, sha256 });
    }

    /// Begins a file of JSON lines.
    pub(super) fn lines(&mut self, name: &str) -> Result<Lines, Cut> {
        self.claim(OVERHEAD)?;
        let file = BufWriter::with_capacity(128 << 10, self.create(name)?);
        Ok(Lines { name: name.to_owned(), file, hash: Sha256::new(), bytes: 0 })
    }

    /// Begins an object: the content of a file of the container.
    pub(super) fn object(&mut self) -> Result<(PathBuf, File), Cut> {
        self.claim(OVERHEAD)?;
        let path = self.place("objects/part").map_err(|err| failed(&err))?;
        // What a copy that has failed has left.
        let _ = fs::remove_file(&path);
        Ok((path, self.create("objects/part")?))
    }

    /// Gives an object the name of its content. What is there already is kept once.
    pub(super) fn name_object(
        &mut self,
        part: &Path,
        digest: Sha256Hash,
        bytes: u64,
    ) -> Result<(), Cut> {
        let name = format!("objects/{}", digest.hex());
        if self.has(&name) {
            self.unclaim(bytes + OVERHEAD);
            return fs::remove_file(part).map_err(|err| failed(&err));
        }
        fs::rename(part, self.directory.join(&name)).map_err(|err| failed(&err))?;
        self.note(&name, bytes, digest);
        Ok(())
    }

    /// Writes the manifest and the sums, and all of it to the disk. `describe` has no limit any
    /// more: a case without a manifest is of no use.
    pub(super) fn finish(
        self,
        describe: impl FnOnce(Vec<Kept>) -> Manifest,
    ) -> io::Result<Finished> {
        let _ = fs::remove_file(self.directory.join("objects/part"));
        let files: Vec<Kept> = self.files.into_values().collect();
        sync(&self.directory, &files)?;
        describe_case(&self.directory, &describe(files))
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }
}

/// Writes the manifest, then the sums, each to the disk.
pub(super) fn describe_case(directory: &Path, manifest: &Manifest) -> io::Result<Finished> {
    let mut text = serde_json::to_vec_pretty(manifest)?;
    text.push(b'\n');
    let mut all: BTreeMap<String, Sha256Hash> =
        manifest.files.iter().map(|file| (file.name.clone(), file.sha256)).collect();
    all.insert(MANIFEST.to_owned(), Sha256Hash(Sha256::digest(&text).into()));
    let sums = sums::text(&all);
    for (name, text) in [(MANIFEST, &text[..]), (SUMS, sums.as_bytes())] {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(directory.join(name))?;
        file.write_all(text)?;
        file.sync_all()?;
    }
    File::open(directory)?.sync_all()?;
    let digest = Sha256Hash(Sha256::digest(sums.as_bytes()).into());
    let bytes = manifest.bytes() + (text.len() + sums.len()) as u64;
    Ok(Finished { directory: directory.to_owned(), digest, bytes })
}

fn sync(directory: &Path, files: &[Kept]) -> io::Result<()> {
    if files.len() > SYNCED_ONE_BY_ONE {
        return crate::sys::file::sync_filesystem(File::open(directory)?);
    }
    let mut directories = BTreeSet::new();
    for file in files {
        let path = directory.join(&file.name);
        File::open(&path)?.sync_all()?;
        // Their names, too.
        directories.extend(
            path.ancestors().skip(1).take_while(|path| *path != directory).map(Path::to_owned),
        );
    }
    directories.iter().try_for_each(|path| File::open(path)?.sync_all())
}

/// A file that grows line by line.
pub(super) struct Lines {
    name: String,
    file: BufWriter<File>,
    hash: Sha256,
    bytes: u64,
}

impl Lines {
    pub(super) fn add(&mut self, draft: &mut Draft, item: &impl Serialize) -> Result<(), Cut> {
        let line = line(item)?;
        draft.claim(line.len() as u64)?;
        self.write(&line)
    }

    /// Adds a line that is needed to understand what is kept already, at once.
    pub(super) fn add_reserved(
        &mut self,
        draft: &mut Draft,
        item: &impl Serialize,
    ) -> Result<(), Cut> {
        let line = line(item)?;
        draft.claim_reserved(line.len() as u64)?;
        self.write(&line)?;
        self.file.flush().map_err(|err| failed(&err))
    }

    fn write(&mut self, line: &[u8]) -> Result<(), Cut> {
        self.file.write_all(line).map_err(|err| failed(&err))?;
        self.hash.update(line);
        self.bytes += line.len() as u64;
        Ok(())
    }

    /// Adds it to the case, even if not all lines had room.
    pub(super) fn end(mut self, draft: &mut Draft) -> Result<(), Cut> {
        let flushed = self.file.flush().map_err(|err| failed(&err));
        if flushed.is_err() {
            // What has reached the file is not known: it is left out.
            let _ = fs::remove_file(draft.directory.join(&self.name));
            return flushed;
        }
        draft.note(&self.name, self.bytes, Sha256Hash(self.hash.finalize().into()));
        Ok(())
    }
}

fn line(item: &impl Serialize) -> Result<Vec<u8>, Cut> {
    let mut line = serde_json::to_vec(item).map_err(|err| Cut(err.to_string()))?;
    line.push(b'\n');
    Ok(line)
}

pub(super) fn failed(err: &io::Error) -> Cut {
    match err.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Cut::because(NO_DISK),
        _ => Cut(format!("the store could not be written: {err}")),
    }
}
