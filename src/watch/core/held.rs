//! Files that the kernel opened for an event and that wait to be read.
//!
//! An open file keeps its mount busy: while a file of an ended container waits in a queue,
//! the container's filesystem cannot be removed. So each item that waits holds its file by a
//! [`Held`]. When the container ends, all of its files are closed at once, whatever queue
//! they are in. The name is kept: by it, the file is found in the upperdir, which keeps
//! nothing of the container busy.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::copy::Copy;
use crate::sys::file;

/// The waiting files of one container.
#[derive(Debug, Default)]
pub(crate) struct HeldFiles(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    files: Vec<Weak<Mutex<File>>>,
    /// The container has ended: no file is held any more.
    is_over: bool,
    /// When this many files are listed, dropped ones are removed from the list.
    prune_at: usize,
}

#[derive(Debug)]
enum File {
    Open(OwnedFd),
    /// A thread is reading it.
    Taken,
    /// Closed, because the container has ended; with its name in the kernel.
    Closed(Option<Vec<u8>>),
    /// Closed, because it was small enough to be copied.
    Copied(Copy),
}

/// One file that waits.
#[derive(Debug)]
pub(crate) struct Held(Arc<Mutex<File>>);

/// A file that has waited, as far as it is still there.
#[derive(Debug)]
pub(crate) enum Left {
    Open(OwnedFd),
    /// Its name in the kernel, if that was known.
    Name(Option<Vec<u8>>),
    Copy(Copy),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one assignment: a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn close(file: &mut File) {
    if let File::Open(fd) = file {
        *file = File::Closed(file::name_of(fd.as_fd()).ok());
    }
}

impl HeldFiles {
    /// Closes all files, and from now on each new one.
    pub(crate) fn close(&self) {
        let mut waiting = lock(&self.0);
        waiting.is_over = true;
        for file in waiting.files.drain(..).filter_map(|file| file.upgrade()) {
            close(&mut lock(&file));
        }
    }

    fn list(&self, file: &Arc<Mutex<File>>) {
        let mut waiting = lock(&self.0);
        if waiting.is_over {
            drop(waiting);
            close(&mut lock(file));
            return;
        }
        if waiting.files.len() >= waiting.prune_at {
            waiting.files.retain(|file| file.strong_count() > 0);
            waiting.prune_at = (2 * waiting.files.len()).max(64);
        }
        waiting.files.push(Arc::downgrade(file));
    }
}

impl Held {
    pub(crate) fn new(files: &HeldFiles, file: OwnedFd) -> Held {
        let file = Arc::new(Mutex::new(File::Open(file)));
        files.list(&file);
        Held(file)
    }

    /// A file that was copied and closed before it had to wait.
    pub(crate) fn of_copy(copy: Copy) -> Held {
        Held(Arc::new(Mutex::new(File::Copied(copy))))
    }

    /// Takes the file to read it. A caller that reads for long must check all the while
    /// whether the container has ended.
    pub(crate) fn take(&self) -> Left {
        let mut file = lock(&self.0);
        match std::mem::replace(&mut *file, File::Taken) {
            File::Open(fd) => Left::Open(fd),
            File::Taken => Left::Name(None),
            File::Closed(name) => Left::Name(name),
            File::Copied(copy) => Left::Copy(copy),
        }
    }

    pub(crate) fn is_copied(&self) -> bool {
        matches!(*lock(&self.0), File::Copied(_))
    }

    /// Replaces the file by a copy.
    pub(crate) fn keep(&self, copy: Copy) {
        *lock(&self.0) = File::Copied(copy);
    }

    /// Returns the file to wait again.
    pub(crate) fn give_back(&self, fd: OwnedFd, is_over: impl FnOnce() -> bool) {
        let mut file = lock(&self.0);
        *file = File::Open(fd);
        // In this order, `HeldFiles::close` either finds the file open or ran before.
        if is_over() {
            close(&mut file);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::core::watched::some_container;

    fn some_file() -> OwnedFd {
        std::fs::File::open("/proc/self/exe").unwrap().into()
    }

    #[test]
    fn a_containers_files_are_closed_when_it_ends_and_only_their_names_stay() {
        let watched = some_container(1);
        let waiting = watched.hold(some_file());
        let taken = watched.hold(some_file());
        let Left::Open(fd) = taken.take() else { panic!("it was closed too soon") };
        watched.detach();
        watched.files.close();
        assert!(matches!(waiting.take(), Left::Name(Some(name)) if name.starts_with(b"/")));
        watched.give_back(&taken, fd);
        assert!(matches!(taken.take(), Left::Name(Some(_))));
        let late = watched.hold(some_file());
        assert!(matches!(late.take(), Left::Name(Some(_))));
    }

    #[test]
    fn files_that_no_longer_wait_are_not_remembered() {
        let watched = some_container(1);
        let kept = watched.hold(some_file());
        for _ in 0..1000 {
            drop(watched.hold(some_file()));
        }
        assert!(lock(&watched.files.0).files.len() <= 128);
        assert!(matches!(kept.take(), Left::Open(_)));
    }
}
