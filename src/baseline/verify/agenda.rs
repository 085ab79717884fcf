//! The verifier's agenda: which comparison is next, and when it may be made.
//!
//! Requested tasks go first, also before recordings. All others wait while layers are
//! recorded.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::task::{AGAIN, CLASSES, REQUESTED, Task};

/// The tasks of the verifier, and when it may do them.
#[derive(Default)]
pub(crate) struct Agenda {
    state: Mutex<State>,
    changed: Condvar,
    /// Ends the current comparison: because the daemon stops, or because another task is
    /// more urgent.
    pub(super) interrupt: AtomicBool,
}

#[derive(Default)]
struct State {
    tasks: [VecDeque<Task>; CLASSES],
    /// The task that is being done.
    current: Option<Task>,
    /// How many recordings are going on.
    recordings: usize,
    stopped: bool,
}

impl Agenda {
    /// Adds a task, unless it is in the agenda already.
    pub(crate) fn add(&self, task: Task) {
        let mut state = self.state();
        let class = task.class();
        let is_it = |other: &Task| {
            (&other.layer.id, other.layer.chain_id, &other.with, other.ticket)
                == (&task.layer.id, task.layer.chain_id, &task.with, task.ticket)
        };
        if state.current.iter().chain(&state.tasks[class]).any(is_it) {
            return;
        }
        let current = state.current.as_ref().map(Task::class);
        if current.is_some_and(|current| match class {
            REQUESTED => current != REQUESTED,
            _ => current == AGAIN && class < AGAIN,
        }) {
            self.interrupt.store(true, Ordering::Relaxed);
        }
        state.tasks[class].push_back(task);
        self.changed.notify_all();
    }

    /// Adds a task that has to be done once more.
    pub(crate) fn add_again(&self, task: Task) {
        self.state().tasks[task.class()].push_back(task);
        self.changed.notify_all();
    }

    /// How many tasks are not done yet, the current one included.
    pub(crate) fn len(&self) -> usize {
        let state = self.state();
        state.tasks.iter().map(VecDeque::len).sum::<usize>() + usize::from(state.current.is_some())
    }

    pub(crate) fn recording_begins(&self) {
        self.state().recordings += 1;
    }

    pub(crate) fn recording_ends(&self) {
        self.state().recordings -= 1;
        self.changed.notify_all();
    }

    pub(crate) fn stop(&self) {
        self.state().stopped = true;
        self.interrupt.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Waits for the next task that may be done; `None` if the daemon stops.
    pub(super) fn next(&self) -> Option<Task> {
        let mut state = self.state();
        loop {
            if state.stopped {
                return None;
            }
            let classes = if state.recordings == 0 { CLASSES } else { REQUESTED + 1 };
            if let Some(task) = state.tasks[..classes].iter_mut().find_map(VecDeque::pop_front) {
                self.interrupt.store(false, Ordering::Relaxed);
                state.current = Some(task.clone());
                return Some(task);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The current task was interrupted: it is the next of its class.
    pub(super) fn put_back(&self, task: Task) {
        let mut state = self.state();
        state.current = None;
        state.tasks[task.class()].push_front(task);
    }

    /// The current task is over.
    pub(super) fn done(&self) {
        self.state().current = None;
    }

    /// Waits while layers are recorded, unless a job waits for the current task.
    pub(super) fn wait_for_recordings(&self) -> io::Result<()> {
        let mut state = self.state();
        loop {
            if self.interrupt.load(Ordering::Relaxed) {
                return Err(io::Error::other("interrupted"));
            }
            let requested = state.current.as_ref().is_some_and(|task| task.ticket.is_some());
            if requested || state.recordings == 0 {
                return Ok(());
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change leaves the state whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Agenda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Agenda({} tasks)", self.len())
    }
}
