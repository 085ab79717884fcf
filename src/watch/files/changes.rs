//! The thread that takes the events of changed names, and notes which paths changed.

use std::collections::HashMap;
use std::time::Duration;

use rustix::io::Errno;

use super::shared::Files;
use super::writers::Writer;
use crate::health::Failure;
use crate::model::Source;
use crate::sys::fanotify::{Buffer, DecodedName, ReadError};
use crate::threads;

/// What comes within this time is read at once: the kernel merges what happens to
/// one name until it is read.
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
                    let detail = format!("a changed name is lost: {err}");
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
    // Whoever unpacks an archive changes thousands of names.
    let mut writers: HashMap<u32, Writer> = HashMap::new();
    for event in events {
        match event {
            DecodedName::Named(named) => {
                let Some((watched, path)) = shared.names.changed(&named) else { continue };
                threads::about(&watched.container);
                let Some(path) = path else {
                    shared.dirty.mark_for_sweep(&watched);
                    continue;
                };
                // Whoever writes is told by the change feed.
                let is_telling = named.mask & (libc::FAN_ATTRIB | libc::FAN_MOVED_TO) != 0
                    && named.mask & libc::FAN_ONDIR == 0;
                let writer = is_telling.then(|| {
                    let found = || shared.writer(&watched, named.pid);
                    writers.entry(named.pid).or_insert_with(found).clone()
                });
                shared.mark_dirty(&watched, path, Source::Change, writer);
            }
            DecodedName::Overflow => shared.lose(
                Failure::KernelQueueOverflow,
                None,
                "the kernel had no memory for a changed name",
            ),
            DecodedName::Nameless { .. } => shared.lose(
                Failure::EventUnreadable,
                None,
                "the kernel could not say which name has changed",
            ),
        }
    }
}
