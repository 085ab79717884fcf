//! Examines the changed paths of a container that have settled, and reports what they hold.
//!
//! It runs on the thread `scan`, a slice at a time. It takes paths from `dirty`, reads them with
//! `entry`, and adds the writer. New directories are left to a walk. It reports facts; it
//! does not judge them.

use std::io;
use std::time::Instant;

use jiff::Timestamp;

use super::dirty::Settled;
use super::entry::{self, Examined, Found, Place, Slice};
use super::lower;
use super::shared::Files;
use super::walk;
use super::work::Work;
use crate::health::Failure;
use crate::model::{ContainerId, Fact, FileFact, FileType, RootfsPath};

/// The most new directories of one container that are walked one by one.
pub(crate) const MAX_BELOW: usize = 1024;

/// Examines settled paths of a container until the slice is over.
pub(crate) fn settle(shared: &Files, container: &ContainerId, work: &mut Work, slice: &mut Slice) {
    // Not kept for later slices: the path of a directory may lead elsewhere then.
    let mut place: Option<Place> = None;
    while !slice.is_over() && !shared.is_stopping() {
        if let Some((settled, mut reading)) = work.reading.take() {
            match reading.step(shared, slice) {
                None => work.reading = Some((settled, reading)),
                Some(found) => report_settled(shared, work, settled, Ok(Some(found)), true),
            }
            continue;
        }
        let Some(settled) = work.taken.pop_front() else {
            work.taken = shared.dirty.take_settled(container, Instant::now()).into();
            if work.taken.is_empty() {
                work.has_settled = false;
                return;
            }
            continue;
        };
        let Settled { watched, path, .. } = &settled;
        let Some(layers) = watched.layers() else {
            shared.dirty.done(container, path);
            continue;
        };
        let parent = path.parent().unwrap_or_else(RootfsPath::root);
        // The paths are sorted, so one directory often serves several.
        let opened = match place.take().filter(|place| place.is(watched, &parent)) {
            Some(place) => Ok(place),
            None => Place::open(watched, layers, parent),
        };
        let examined = opened.and_then(|opened| {
            let place = place.insert(opened);
            place.guard(shared, path);
            place.examine(shared, layers, path)
        });
        let in_image = place.as_ref().is_none_or(|place| place.in_image);
        match examined {
            Ok(Some(Examined::Reading(reading))) => work.reading = Some((settled, reading)),
            Ok(Some(Examined::Found(found))) => {
                report_settled(shared, work, settled, Ok(Some(found)), in_image);
            }
            Ok(None) => report_settled(shared, work, settled, Ok(None), in_image),
            Err(err) => report_settled(shared, work, settled, Err(err), in_image),
        }
    }
}

/// Reports what was found at a path that had settled.
pub(crate) fn report_settled(
    shared: &Files,
    work: &mut Work,
    settled: Settled,
    found: io::Result<Option<Found>>,
    in_image: bool,
) {
    let Settled { watched, path, writer, source } = settled;
    shared.dirty.done(&watched.container, &path);
    let Some(layers) = watched.layers() else { return };
    let writer = writer.and_then(|writer| shared.process_of(&watched, writer));
    let report = |fact| shared.observe_patiently(&watched, Timestamp::now(), source, fact);
    match found {
        Ok(Some(Found::Entry { stat, state, lower })) => {
            if stat.file_type != FileType::Symlink {
                watched.ways.forget(&path);
            }
            if walk::matters(shared, &watched, &path, &state, lower.as_ref()) {
                let changed = Some(stat.changed);
                let writer = writer.or_else(|| shared.writer_of_file(&watched, &stat));
                report(Fact::File(FileFact::Present { path, state, lower, writer, changed }));
            }
        }
        // It is unknown whether the container or its runtime removed it.
        Ok(Some(Found::Whiteout) | None) if watched.is_detaching() => (),
        Ok(Some(Found::Whiteout)) => {
            watched.ways.forget(&path);
            report(Fact::File(FileFact::Absent { path, writer }));
        }
        // The image's own file is visible: it was executed before the layers of the image were
        // known.
        Ok(None) if in_image && lower::holds(layers, &path) => (),
        Ok(None) if layers.is_cut_off() && entry::open_merged(&watched, &path).is_ok() => (),
        Ok(None) => {
            watched.ways.forget(&path);
            report(Fact::File(FileFact::Absent { path, writer }));
        }
        Ok(Some(Found::Directory)) => {
            watched.ways.forget(&path);
            if work.below.len() < MAX_BELOW {
                // Walked after all paths that are reported by themselves, so that nothing is
                // reported twice.
                work.below.push_back((watched, path));
            } else {
                watched.ask_for_walk();
            }
        }
        Err(_) if watched.is_detaching() || shared.is_stopping() => (),
        Err(err) => {
            let detail = format!("the changed file {path} cannot be examined: {err}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
        }
    }
}
