//! A layer's unpacked directory, read into entries.
//!
//! The author of the image chose what is in the directory. So nothing in it is followed:
//! every file is opened by name below a directory that is held open, and the kernel must
//! leave neither the layer nor its filesystem. Anything but a regular file or a directory
//! is never opened.
//!
//! A walk delivers every entry or fails. If an entry vanishes or changes during the walk,
//! this is not the committed layer that it should be, and the walk fails.
//!
//! `directories` visits the directories on one thread, a pool's threads read the `files`,
//! and `order` passes the entries on in the order of paths.

mod attributes;
mod batch;
mod directories;
mod error;
mod files;
mod names;
mod order;
mod reading;
mod walker;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use rustix::fs::{CWD, Mode, OFlags};

pub use error::Error;
pub use reading::{Rate, Reading, Unchanged};

use super::layer::{LayerBaseline, LayerEntry};
use super::types::Progress;
use crate::model::FileTime;
use error::WalkEnd;
use order::BatchQueue;
use reading::last_tick;
use walker::{BOUNDS, Bounds, Walk};

/// All entries of a directory.
#[derive(Debug)]
pub struct Walked {
    /// In the order of paths (see [`crate::baseline::layer::compare_paths`]).
    pub entries: Vec<LayerEntry>,
    pub newest_change: FileTime,
}

/// Reads everything in `directory`, on all threads of `pool`.
///
/// `stop` ends the walk early.
pub fn walk(
    pool: &rayon::ThreadPool,
    directory: &Path,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Walked, Error> {
    collect(|found| walk_to(pool, directory, &Reading::default(), progress, stop, found))
}

/// Like [`walk`], for a layer that has the baseline `known`. A file that has not changed
/// since `since` is not read again: it keeps the baseline's hash. A file has not changed
/// if neither it nor any directory on the way to it has a later ctime. Without `since`
/// all files are read.
///
/// `rate` limits how much is read in a second.
pub fn recheck(
    pool: &rayon::ThreadPool,
    directory: &Path,
    known: &LayerBaseline,
    since: Option<FileTime>,
    rate: Option<&Rate>,
    progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Walked, Error> {
    let unchanged = since.map(|since| Unchanged { layer: known, since });
    collect(|found| walk_to(pool, directory, &Reading { unchanged, rate }, progress, stop, found))
}

fn collect(
    walk: impl FnOnce(&mut dyn FnMut(LayerEntry) -> Result<(), Error>) -> Result<FileTime, Error>,
) -> Result<Walked, Error> {
    let mut entries = Vec::new();
    let newest_change = walk(&mut |entry| {
        entries.push(entry);
        Ok(())
    })?;
    Ok(Walked { entries, newest_change })
}

/// Like [`walk`], but keeps nothing: it passes every entry to `found`, in the order of
/// paths. An error of `found` ends the walk. However many entries there are, no more than
/// some tens of megabytes of them are in memory at once.
///
/// Returns the newest ctime of anything in the directory, itself included, but none later
/// than the beginning of the walk. So a file that is changed after it was read has a later
/// ctime, even if another file was changed after that and read then.
pub fn walk_to<E: From<Error>>(
    pool: &rayon::ThreadPool,
    directory: &Path,
    reading: &Reading<'_>,
    progress: Option<&Progress>,
    stop: &AtomicBool,
    found: &mut dyn FnMut(LayerEntry) -> Result<(), E>,
) -> Result<FileTime, E> {
    walk_within(BOUNDS, pool, directory, reading, progress, stop, found)
}

fn walk_within<E: From<Error>>(
    bounds: Bounds,
    pool: &rayon::ThreadPool,
    directory: &Path,
    reading: &Reading<'_>,
    progress: Option<&Progress>,
    stop: &AtomicBool,
    found: &mut dyn FnMut(LayerEntry) -> Result<(), E>,
) -> Result<FileTime, E> {
    let begin = last_tick();
    // Symlinks on the way to the layer are followed: Docker names layers by symlinks.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, directory, flags, Mode::empty())
        .map_err(|source| Error::Directory { directory: directory.into(), source })?;
    let walk = Walk {
        bounds,
        root,
        directory,
        reading,
        progress,
        stop,
        noatime: AtomicBool::new(true),
        uncached: AtomicBool::new(bounds.dontcache),
        links: Mutex::default(),
        failure: OnceLock::new(),
        ended: AtomicBool::new(false),
    };
    let result = pool.in_place_scope(|scope| {
        let mut order = BatchQueue::new(&walk, found);
        let result = walk.descend(|batch| order.dispatch(scope, batch));
        let result = result.and_then(|()| order.finish());
        // Threads that still read stop at once.
        walk.ended.store(true, Ordering::Relaxed);
        result
    });
    match result {
        Ok(newest) => Ok(newest.min(begin)),
        Err(WalkEnd::Refused(err)) => Err(err),
        Err(WalkEnd::Failed) if stop.load(Ordering::Relaxed) => Err(Error::Stopped.into()),
        Err(WalkEnd::Failed) => {
            Err(walk.failure.into_inner().expect("a walk that has failed keeps the reason").into())
        }
    }
}

#[cfg(test)]
mod tests;
