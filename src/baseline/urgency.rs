//! How urgent the reading of layers is: not at all, until a container waits.
//!
//! It sets the priorities of the threads that read and hash. It does not decide what is
//! read.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys::priority::{self, Disk, Thread};

/// The nice value of hashing while no container waits.
const NICE: i32 = 10;

/// The priority of the threads that read layers, of all of them at once.
#[derive(Debug, Default)]
pub struct Urgency(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    raised: bool,
    threads: Vec<Thread>,
}

impl Urgency {
    /// A container waits: the threads get the usual priority.
    pub fn raise(&self) {
        self.set(true);
    }

    /// No container waits: the threads take the processor and disk time that is left over.
    pub fn lower(&self) {
        self.set(false);
    }

    fn set(&self, raised: bool) {
        let mut state = self.state();
        if state.raised != raised {
            state.raised = raised;
            state.threads.iter().for_each(|thread| apply(*thread, raised));
        }
    }

    /// The calling thread follows from now on, until it [leaves](Urgency::leave).
    pub fn join(&self) {
        let mut state = self.state();
        let thread = priority::current();
        apply(thread, state.raised);
        state.threads.push(thread);
    }

    /// Call it before a thread that has joined ends: another thread may get its number.
    pub fn leave(&self) {
        let thread = priority::current();
        self.state().threads.retain(|joined| *joined != thread);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Best effort: a baseline does not depend on the priority of the thread that makes it.
fn apply(thread: Thread, raised: bool) {
    let (nice, disk) = if raised { (0, Disk::Usual) } else { (NICE, Disk::Idle) };
    if let Err(err) = priority::set(thread, nice, disk) {
        tracing::debug!("a hashing thread keeps its priority: {err}");
    }
}

/// The threads that read and hash; 0 means one per processor.
pub fn hashing_pool(
    threads: usize,
    urgency: &Arc<Urgency>,
) -> Result<rayon::ThreadPool, rayon::ThreadPoolBuildError> {
    let (joining, leaving) = (Arc::clone(urgency), Arc::clone(urgency));
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|number| format!("hash-{number}"))
        .start_handler(move |_| joining.join())
        .exit_handler(move |_| leaving.leave())
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nice value and the disk's class and level of every thread of a pool.
    fn priorities(pool: &rayon::ThreadPool) -> Vec<(i32, String)> {
        pool.broadcast(|_| {
            let thread = rustix::thread::gettid();
            let nice = rustix::process::getpriority_process(Some(thread)).unwrap();
            let number = thread.as_raw_nonzero().to_string();
            let disk = std::process::Command::new("ionice").args(["-p", &number]).output();
            let disk = disk.expect("ionice is in util-linux, which scripts/setup installs");
            (nice, String::from_utf8(disk.stdout).unwrap().trim().to_owned())
        })
    }

    /// Needs root, to become more urgent again.
    #[test]
    fn threads_are_as_urgent_as_was_last_set() {
        let urgency = Arc::new(Urgency::default());
        let pool = hashing_pool(2, &urgency).unwrap();
        let low = (NICE, "idle".to_owned());
        let usual = (0, "best-effort: prio 4".to_owned());
        assert_eq!(priorities(&pool), [low.clone(), low.clone()]);
        urgency.raise();
        assert_eq!(priorities(&pool), [usual.clone(), usual.clone()]);
        let late = hashing_pool(1, &urgency).unwrap();
        assert_eq!(priorities(&late), [usual]);
        urgency.lower();
        assert_eq!(priorities(&pool), [low.clone(), low.clone()]);
        assert_eq!(priorities(&late), [low]);
    }
}
