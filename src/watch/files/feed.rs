//! The change feed, on the thread `feed`: the kernel reports each file that was closed after
//! writing.
//!
//! It finds the file's path and writer (`paths`, `writers`), and notes the path in `dirty` if
//! the file may be a program, is sensitive, or replaces a file of the image. It does not hash
//! or judge anything, and keeps no descriptor of a container's file.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::io::Errno;

use super::lower;
use super::paths;
use super::shared::Files;
use super::upper;
use crate::health::Failure;
use crate::model::{Format, ProcessIdentity, RootfsPath, Source};
use crate::sys::fanotify::{Buffer, Event, Group, Incoming, ReadError};
use crate::sys::file;
use crate::threads;
use crate::watch::core::watched::Watched;

/// The most that one read returns: about seven hundred events with a descriptor each.
const READ_BYTES: usize = 16 * 1024;

/// More paths than this are not remembered.
const MAX_KNOWN_PATHS: usize = 16 * 1024;

pub(crate) struct Feed {
    pub(crate) group: Arc<Group>,
    pub(crate) shared: Arc<Files>,
    /// Whether the image has a file at a path, by the init of the container's run: another
    /// run with the same ID may have another image. Kept because this does not change, and
    /// log files are written again and again.
    pub(crate) in_image: HashMap<(ProcessIdentity, RootfsPath), bool>,
}

impl Feed {
    pub(crate) fn run(mut self) {
        // What it knows is asked for within moments. Without CAP_SYS_NICE this thread runs like
        // the others, and writers are unknown more often.
        let _ = rustix::process::setpriority_process(None, -5);
        let group = self.group.clone();
        let mut buffer = Buffer::new();
        // Before anything is written: without the group, each execution would wait in vain.
        self.shared.progress.follows(&group);
        while !self.shared.is_stopping() {
            self.shared.progress.rests();
            self.shared.wait_for(&*group, None);
            self.shared.progress.begins();
            match group.read(&mut buffer, READ_BYTES) {
                Ok(incoming) => {
                    self.shared.progress.has_read(incoming.len());
                    for incoming in incoming {
                        self.take(incoming);
                        self.shared.progress.has_done_one();
                    }
                }
                Err(ReadError::Os(err)) => match Errno::from_io_error(&err) {
                    Some(Errno::AGAIN | Errno::INTR) => (),
                    _ => {
                        let detail = format!("an event of the change feed was lost: {err}");
                        self.shared.lose(Failure::EventUnreadable, None, &detail);
                        // If every read fails from now on, this must not be a busy loop.
                        std::thread::sleep(Duration::from_millis(10));
                    }
                },
                Err(ReadError::Malformed(err)) => {
                    let detail = format!("an event of the change feed cannot be decoded: {err}");
                    self.shared.lose(Failure::EventUnreadable, None, &detail);
                }
            }
        }
    }

    fn take(&mut self, incoming: Incoming<'_>) {
        match incoming {
            Incoming::Notification(Event { file, pid, .. }) => self.written(file, pid),
            Incoming::Overflow => self.shared.lose(
                Failure::KernelQueueOverflow,
                None,
                "the kernel dropped events of the change feed",
            ),
            // Not expected in the notification class. Dropping the event allows the access.
            Incoming::Permission(_) => (),
        }
    }

    fn written(&mut self, file: OwnedFd, pid: u32) {
        let Ok(stat) = file::stat(&file) else { return };
        let Some(watched) = self.shared.table.owner(&stat) else { return };
        if !stat.is_regular() {
            return;
        }
        threads::about(&watched.container);
        let path = match paths::event_path(&watched, &file, &stat, pid, None) {
            Ok(path) => path,
            Err(why) => {
                let detail = format!("the path of a written file cannot be found: {why}");
                self.shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
                return;
            }
        };
        // First: from here on the file can be used.
        let upper = || upper::upper(&watched, &path, &stat);
        self.shared.guards.written(&watched, &file, upper);
        let is_program = file::sniff(file.as_fd()).is_ok_and(may_be_program);
        // Closed early: an open event descriptor keeps the container's superblock alive.
        drop(file);
        if is_program {
            upper::listen_near(&self.shared, &watched, &path);
        }
        if is_program || self.shared.is_sensitive(&watched, &path) {
            let writer = self.shared.writer_to(&watched, pid, &stat);
            self.shared.mark_dirty(&watched, path, Source::Change, Some(writer));
            return;
        }
        self.shared.health.data_writes.fetch_add(1, Ordering::Relaxed);
        self.shared.writer_to_data(&watched, pid, &stat);
        // It may be a program of the image that was overwritten with data.
        if self.is_in_image(&watched, &path) {
            self.shared.mark_dirty(&watched, path, Source::Change, None);
        }
    }

    fn is_in_image(&mut self, watched: &Arc<Watched>, path: &RootfsPath) -> bool {
        let Some(layers) = watched.layers() else { return true };
        let key = (watched.init, path.clone());
        if let Some(known) = self.in_image.get(&key) {
            return *known;
        }
        if self.in_image.len() >= MAX_KNOWN_PATHS {
            self.in_image.clear();
        }
        let is_in_image = lower::holds_file(layers, path);
        self.in_image.insert(key, is_in_image);
        is_in_image
    }
}

/// Whether a file is a program by its first bytes, or would be one with an executable bit. Its
/// mode when it has settled decides.
fn may_be_program(format: Format) -> bool {
    matches!(format, Format::Elf | Format::KernelModule | Format::Script)
}
