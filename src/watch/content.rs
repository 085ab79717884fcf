//! Executed files of the container's own layer: who runs them, and what they
//! hold. Hashed by the descriptor that the kernel opened for the event, so that
//! no rename can put another file in its place.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::gate::Execution;
use super::process::{self, Executing};
use super::shared::Shared;
use super::state::{self, Hashing};
use crate::health::Failure;
use crate::model::{Fact, HostilePath, RootfsPath, Source};
use crate::sys::file;

/// How long an execve may take before its arguments are not waited for.
const PATIENCE: Duration = Duration::from_millis(2);
/// The same while nobody else waits.
const PATIENCE_WHEN_IDLE: Duration = Duration::from_millis(25);

pub(super) fn run(shared: &Shared, executions: &Receiver<Execution>) {
    while !shared.is_stopping() {
        match executions.recv_timeout(Duration::from_millis(250)) {
            Ok(execution) => {
                let patience = if executions.is_empty() { PATIENCE_WHEN_IDLE } else { PATIENCE };
                judge(shared, execution, patience);
            }
            Err(RecvTimeoutError::Timeout) => (),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn judge(shared: &Shared, execution: Execution, patience: Duration) {
    let Execution { watched, file, stat, caller, at } = execution;

    // The process first: it may live for a millisecond.
    let executing = {
        // Held until the session is told, so that it is told before what it does.
        let mut sessions = shared.sessions();
        let opens = caller.stat.as_ref().is_some_and(|stat| sessions.opens(stat, &watched));
        if opens {
            let executing = process::after_exec(&caller, &watched, patience);
            let process = Arc::new(executing.process.clone());
            shared.observe(&watched, at, Source::Gate, Fact::SessionOpened { process });
            Some(executing)
        } else {
            None
        }
    };
    let executing = executing.unwrap_or_else(|| process::after_exec(&caller, &watched, patience));
    let Executing { process, exec_name } = executing;

    let path = match event_path(&file, &stat) {
        Ok(path) => path,
        Err(why) => {
            let detail = format!("the path of an executed file cannot be told: {why}");
            shared.lose(Failure::EventUnreadable, Some(&watched), &detail);
            return;
        }
    };
    let state = state::of(file.as_fd(), &stat, Hashing::Always, shared.settings.max_hash_bytes);
    drop(file);
    let lower = watched.layers().and_then(|layers| {
        shared.lower_twins.find(layers, &path, true, shared.settings.max_hash_bytes)
    });
    let is_deleted = state.deleted;
    let fact = Fact::Executed {
        invoked_as: exec_name.and_then(|name| process::invoked_as(&name, &path)),
        path: path.clone(),
        state,
        lower,
        process: Arc::new(process),
    };
    shared.observe(&watched, at, Source::Gate, fact);

    // The overlay's marks do not see renames, removals and chmod; where drift is
    // executed, they are looked for soon.
    if !is_deleted {
        shared.mark_dirty(&watched, path, None);
    }
    shared.mark_for_sweep(&watched);
}

/// The path of an event's file in its container.
pub(super) fn event_path(
    file: &std::os::fd::OwnedFd,
    stat: &file::Stat,
) -> Result<RootfsPath, UnknownPath> {
    let name = file::name_of(file.as_fd())?;
    let mut name = name.as_slice();
    if stat.links == 0 {
        // Only then: a file may be named so.
        name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    }
    if !name.starts_with(b"/") {
        return Err(UnknownPath::NotAbsolute);
    }
    Ok(RootfsPath::new(name)?)
}

#[derive(Debug, thiserror::Error)]
pub(super) enum UnknownPath {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("the kernel gives no absolute path")]
    NotAbsolute,
    #[error(transparent)]
    Hostile(#[from] HostilePath),
}
