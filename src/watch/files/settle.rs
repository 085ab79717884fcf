//! Checks the changed paths of a container that have settled.

use std::io;
use std::time::Instant;

use jiff::Timestamp;

use super::dirty::Settled;
use super::entry::{self, Found, Look, Place, Slice};
use super::lower;
use super::shared::Files;
use super::walk;
use super::work::Work;
use crate::health::Failure;
use crate::model::{ContainerId, Fact, FileType, RootfsPath};

/// New directories of one container that are walked one by one.
pub(crate) const MAX_BELOW: usize = 1024;

/// Looks at some of a container's paths that have settled.
pub(crate) fn settle(shared: &Files, container: &ContainerId, work: &mut Work, slice: &mut Slice) {
    // Not kept: what a name of a directory leads to may change.
    let mut place: Option<Place> = None;
    while !slice.is_over() && !shared.is_stopping() {
        if let Some((settled, mut reading)) = work.reading.take() {
            match reading.step(shared, slice) {
                None => work.reading = Some((settled, reading)),
                Some(found) => tell_settled(shared, work, settled, Ok(Some(found)), true),
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
        // Neighbours follow each other.
        let opened = match place.take().filter(|place| place.is(watched, &parent)) {
            Some(place) => Ok(place),
            None => Place::open(watched, layers, parent),
        };
        let looked = opened.and_then(|opened| place.insert(opened).look(shared, layers, path));
        let in_image = place.as_ref().is_none_or(|place| place.in_image);
        match looked {
            Ok(Some(Look::Reading(reading))) => work.reading = Some((settled, reading)),
            Ok(Some(Look::Found(found))) => {
                tell_settled(shared, work, settled, Ok(Some(found)), in_image);
            }
            Ok(None) => tell_settled(shared, work, settled, Ok(None), in_image),
            Err(err) => tell_settled(shared, work, settled, Err(err), in_image),
        }
    }
}

/// Reports what was found at a path that had settled.
pub(crate) fn tell_settled(
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
    let tell = |fact| shared.observe_patiently(&watched, Timestamp::now(), source, fact);
    match found {
        Ok(Some(Found::Entry { stat, state, lower })) => {
            if stat.file_type != FileType::Symlink {
                watched.ways.forget(&path);
            }
            if walk::matters(shared, &watched, &path, &state, lower.as_ref()) {
                let writer = writer.or_else(|| shared.last_writer(&watched, &stat));
                tell(Fact::Present { path, state, lower, writer });
            }
        }
        // Whether the container or its owner removed it cannot be told.
        Ok(Some(Found::Whiteout) | None) if watched.is_detaching() => (),
        Ok(Some(Found::Whiteout)) => {
            watched.ways.forget(&path);
            tell(Fact::Absent { path, writer });
        }
        // The image's own file shows through: executed before it was known
        // which files are the image's.
        Ok(None) if in_image && lower::holds(layers, &path) => (),
        Ok(None) if layers.is_cut_off() && entry::open_merged(&watched, &path).is_ok() => (),
        Ok(None) => {
            watched.ways.forget(&path);
            tell(Fact::Absent { path, writer });
        }
        Ok(Some(Found::Directory)) => {
            watched.ways.forget(&path);
            if work.below.len() < MAX_BELOW {
                // Walked behind everything that is told by itself, so that nothing is told
                // twice.
                work.below.push_back((watched, path));
            } else {
                watched.ask_for_walk();
            }
        }
        Err(_) if watched.is_detaching() || shared.is_stopping() => (),
        Err(err) => {
            let detail = format!("the changed file {path} cannot be looked at: {err}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
        }
    }
}
