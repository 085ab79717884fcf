//! The thread `names`: reads the events of changed names and notes the changed paths.
//!
//! Events of terminal FIFOs go to `inputs`; `names` finds the path of all others. The paths
//! go to `dirty`, with the writer where only this event names it. No file is examined here:
//! the thread `scan` does that when the path has settled.

use std::collections::HashMap;
use std::time::Duration;

use rustix::io::Errno;

use super::shared::Files;
use super::writers::Writer;
use crate::health::Failure;
use crate::model::Source;
use crate::sys::fanotify::{Buffer, DecodedName, ReadError};
use crate::threads;

/// Pause between reads. Until an event is read, the kernel merges later events of the same
/// name into it.
const REST: Duration = Duration::from_millis(20);

/// Takes events until the watchers stop.
pub(crate) fn run(shared: &Files) {
    let Some(group) = shared.names.group() else { return };
    let mut buffer = Buffer::new();
    while !shared.is_stopping() {
        shared.wait_for(&*group, None);
        loop {
            match group.read_names(&mut buffer) {
                Ok(events) => take(shared, shared.inputs.take(shared, events)),
                Err(ReadError::Os(err)) if Errno::from_io_error(&err) == Some(Errno::AGAIN) => {
                    break;
                }
                Err(err) => {
                    let detail = format!("an event of a changed name was lost: {err}");
                    shared.lose(Failure::EventUnreadable, None, &detail);
                    break;
                }
            }
            if shared.is_stopping() {
                return;
            }
        }
        threads::idle(|| std::thread::sleep(REST));
    }
}

fn take(shared: &Files, events: Vec<DecodedName>) {
    // A process that unpacks an archive changes thousands of names: describe it once.
    let mut writers: HashMap<u32, Writer> = HashMap::new();
    for event in events {
        match event {
            DecodedName::Named(named) => {
                let Some((watched, path)) = shared.names.changed(&named) else { continue };
                threads::about(&watched.container);
                let Some(path) = path else {
                    shared.dirty.mark_for_scan(&watched);
                    continue;
                };
                // The change feed reports the writers of content. It does not report those of
                // links, which have none.
                let is_file = named.mask & libc::FAN_ONDIR == 0;
                let is_changed = named.mask & (libc::FAN_ATTRIB | libc::FAN_MOVED_TO) != 0;
                let is_created = named.mask & libc::FAN_CREATE != 0;
                let by = (is_file && (is_changed || is_created)).then(|| {
                    let found = || shared.writer(&watched, named.pid);
                    writers.entry(named.pid).or_insert_with(found).clone()
                });
                let (writer, creator) = if is_changed { (by, None) } else { (None, by) };
                shared.mark_dirty(&watched, path.clone(), Source::Change, writer);
                if let Some(creator) = creator {
                    shared.dirty.created_by(&watched.container, &path, creator);
                }
            }
            DecodedName::Overflow => shared.lose(
                Failure::KernelQueueOverflow,
                None,
                "the kernel had no memory for a changed name",
            ),
            DecodedName::Nameless { .. } => shared.lose(
                Failure::EventUnreadable,
                None,
                "the kernel reported a change without the name that changed",
            ),
        }
    }
}
