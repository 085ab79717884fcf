//! The unchanged files of images, whose executions are not looked at: where they are kept.
//!
//! The gate's process keeps them where the kernel asks, and this process where the kernel only
//! reports. `exec::gate` decides which files they are.

use std::sync::{Mutex, PoisonError};

use crate::gate::{self, File, Marks};
use crate::sys::file::Stat;

#[derive(Debug)]
pub(crate) enum Unchanged {
    InGate(Marks),
    Here(Mutex<gate::Unchanged>),
}

impl Unchanged {
    /// From now on, executions of this file are not handed on until it changes.
    /// `ignorable_from`: see [`Residence::ignorable_from`](super::copyup::Residence).
    pub(crate) fn add(&self, file: File, ignorable_from: Option<u64>) {
        match self {
            Unchanged::InGate(marks) => marks.is_unchanged(file, ignorable_from),
            Unchanged::Here(files) => lock(files).add(file, None),
        }
    }

    /// When this returns, the executions of all files are handed on again in the container with
    /// this device.
    pub(crate) fn forget(&self, device: u64) {
        match self {
            // An error means that the gate has ended: then nothing is handed on any more.
            Unchanged::InGate(marks) => drop(marks.forget_unchanged(device)),
            Unchanged::Here(files) => lock(files).forget(device),
        }
    }

    /// Whether this process keeps the file. What the gate keeps, it does not hand on.
    pub(crate) fn holds(&self, stat: &Stat) -> bool {
        match self {
            Unchanged::InGate(_) => false,
            Unchanged::Here(files) => lock(files).holds(stat),
        }
    }
}

fn lock(files: &Mutex<gate::Unchanged>) -> std::sync::MutexGuard<'_, gate::Unchanged> {
    // After a panic, a file is at most handed on once more.
    files.lock().unwrap_or_else(PoisonError::into_inner)
}
