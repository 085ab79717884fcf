//! Looks again at a program that was read before it ran.
//!
//! The kernel protects a program from writers only once it runs. On a busy machine the file may
//! be read after the gate's answer and before that moment, and changed in between. What runs is
//! what its process has as its program: that is compared, and read again if it has changed. It
//! reports nothing.

use std::os::fd::{AsFd as _, OwnedFd};

use super::described::{Described, LARGE, Progress};
use crate::model::{Content, CouldChange, Filesystem};
use crate::sys::door::Ground;
use crate::sys::file::{self, Stat};
use crate::sys::procfs::Handle;
use crate::watch::files::shared::Files;
use crate::watch::files::{state, upper};

/// Compares what was read of an execution with what runs.
pub(crate) fn look(shared: &Files, described: &mut Described) {
    // A file of the image's layers is judged anew when it has changed.
    if described.layer_file.is_some() || described.times > 1 {
        return;
    }
    match program(described) {
        Some((exe, now)) if upper::has_changed(&described.stat, &now) => {
            read_again(shared, described, &exe, &now);
        }
        Some(_) => (),
        None => compare(shared, described),
    }
}

/// The program of the process, if it is this file.
fn program(described: &Described) -> Option<(OwnedFd, Stat)> {
    let process = described.seen.as_ref()?.identity;
    let exe = Handle::open_exactly(process).ok()?.open_exe().ok()?;
    let now = file::stat(&exe).ok()?;
    let is_it = (now.device, now.inode) == (described.stat.device, described.stat.inode);
    is_it.then_some((exe, now))
}

fn read_again(shared: &Files, described: &mut Described, exe: &OwnedFd, now: &Stat) {
    let Described { holder, filesystem, path, progress, could_change, .. } = described;
    let Progress::Done(known, _) = progress else { return };
    let is_on_overlay = *filesystem == Filesystem::Overlay;
    // The gate has marks on local filesystems only.
    let local = if is_on_overlay { holder.local() } else { Ground::Disk.local() };
    let max_hash_bytes = shared.settings.max_hash_bytes.min(LARGE);
    let read = state::state_of(exe.as_fd(), now, local, max_hash_bytes);
    let is_stable = file::stat(exe).is_ok_and(|then| !upper::has_changed(now, &then));
    // A mapping that was made before it ran can change it still.
    let has_writer = is_on_overlay && upper::has_writer(holder, path, now);
    if matches!(read.content, Content::Hashed { .. }) && is_stable {
        (known.content, known.format, known.size) = (read.content, read.format, read.size);
    } else {
        *could_change = (*could_change).max(Some(CouldChange::Unproven));
    }
    if has_writer {
        *could_change = Some(CouldChange::HadWriter);
    }
}

/// The process has ended, or it is the interpreter of a script: compares the file itself.
fn compare(shared: &Files, described: &mut Described) {
    let Described { holder, filesystem, path, stat, writer_check, could_change, .. } = described;
    if *filesystem != Filesystem::Overlay || could_change.is_none_or(CouldChange::is_possible) {
        return;
    }
    let now = upper::upper(holder, path, stat).and_then(|fd| file::stat(fd).ok());
    if let Some(now) = now.filter(|now| upper::has_changed(stat, now)) {
        *could_change = Some(writer_check.could_change(shared, holder, path, stat, &now));
    }
}
