//! Reads that could wait for a process, done by threads that may be left behind.
//!
//! To read a process's arguments, environment or mappings, the kernel takes locks of the
//! process's memory. A container can make another of its processes hold these locks while
//! that process waits for a filesystem of the container's own, and then the reading thread
//! waits as well. (The read itself asks no filesystem: for arguments and environment the
//! kernel reads only anonymous memory, and driftd never reads `/proc/PID/mem`, for which that
//! would be different.) Such a wait ends when driftd is killed, so a thread that is left
//! behind delays nothing else.
//!
//! A few threads may be left behind, and no more than two for one control group: then the
//! processes of that group are not read any more. A process that has made a thread wait is
//! not read again.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};

use crate::model::ProcessIdentity;

/// How long a caller waits. An errand usually takes microseconds.
const PATIENCE: Duration = Duration::from_millis(500);

/// How many threads may be left behind, in total and for one control group.
const MOST: usize = 16;
const MOST_OF_A_GROUP: usize = 2;

/// How many processes to avoid are remembered.
const MOST_AVOIDED: usize = 1024;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Threads {
    idle: Vec<Sender<Job>>,
    /// How many threads are left behind, by control group.
    left_behind: HashMap<Vec<u8>, usize>,
    avoided: HashSet<ProcessIdentity>,
}

const UNDER_WAY: u8 = 0;
const DONE: u8 = 1;
const LEFT_BEHIND: u8 = 2;

/// How often a read was given up.
static GIVEN_UP: AtomicU64 = AtomicU64::new(0);

pub fn given_up() -> u64 {
    GIVEN_UP.load(Ordering::Relaxed)
}

fn threads() -> MutexGuard<'static, Threads> {
    static THREADS: OnceLock<Mutex<Threads>> = OnceLock::new();
    THREADS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner)
}

/// Does `work`, which concerns a process of this control group, and waits at most
/// `PATIENCE` for it.
pub fn run<T: Send + 'static>(
    process: ProcessIdentity,
    group: impl Fn() -> Vec<u8>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<T> {
    let refused = || {
        GIVEN_UP.fetch_add(1, Ordering::Relaxed);
        Err(io::ErrorKind::TimedOut.into())
    };
    let idle = {
        let mut threads = threads();
        if threads.avoided.contains(&process) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Nearly always no thread is left behind, and the group need not be known.
        if !threads.left_behind.is_empty() && !threads.has_room(&group()) {
            return refused();
        }
        threads.idle.pop()
    };
    let thread = match idle {
        Some(thread) => thread,
        None => start()?,
    };
    let state = Arc::new(AtomicU8::new(UNDER_WAY));
    let (send, receive) = bounded(1);
    let (ended, key) = (state.clone(), Arc::new(OnceLock::<Vec<u8>>::new()));
    let owner = key.clone();
    let job = move || {
        let _ = send.send(work());
        if ended.swap(DONE, Ordering::AcqRel) == LEFT_BEHIND
            && let Some(group) = owner.get()
        {
            threads().comes_back(group);
        }
    };
    thread.send(Box::new(job)).map_err(|_| io::ErrorKind::BrokenPipe)?;
    let answer = receive.recv_timeout(PATIENCE).or_else(|_| {
        // The group must be counted and set before the state is LEFT_BEHIND: the thread reads
        // it when it comes back.
        let group = group();
        threads().left_behind.entry(group.clone()).and_modify(|of| *of += 1).or_insert(1);
        let _ = key.set(group.clone());
        if state.swap(LEFT_BEHIND, Ordering::AcqRel) == DONE {
            threads().comes_back(&group);
            return receive.recv();
        }
        let mut threads = threads();
        if threads.avoided.len() >= MOST_AVOIDED {
            threads.avoided.clear();
        }
        threads.avoided.insert(process);
        receive.try_recv().map_err(|_| crossbeam_channel::RecvError)
    });
    match answer {
        Ok(answer) => {
            threads().idle.push(thread);
            Ok(answer)
        }
        Err(_) => refused(),
    }
}

impl Threads {
    fn has_room(&self, group: &[u8]) -> bool {
        self.left_behind.values().sum::<usize>() < MOST
            && self.left_behind.get(group).is_none_or(|of| *of < MOST_OF_A_GROUP)
    }

    fn comes_back(&mut self, group: &[u8]) {
        if let Some(of) = self.left_behind.get_mut(group) {
            *of -= 1;
            if *of == 0 {
                self.left_behind.remove(group);
            }
        }
    }
}

/// Starts a thread, which ends when the sender of its jobs is dropped.
fn start() -> io::Result<Sender<Job>> {
    let (send, receive) = bounded::<Job>(1);
    std::thread::Builder::new().name("errand".into()).stack_size(128 * 1024).spawn(move || {
        for job in receive {
            job();
        }
    })?;
    Ok(send)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32) -> ProcessIdentity {
        ProcessIdentity { pid, start_time: 1 }
    }

    #[test]
    fn x02_a_process_that_makes_a_read_wait_delays_no_other_process() {
        let group = |name: &'static str| move || name.as_bytes().to_vec();
        assert_eq!(run(process(1), group("a"), || 7).unwrap(), 7);
        let gates: Vec<_> = (0..MOST_OF_A_GROUP).map(|_| bounded::<()>(1)).collect();
        for (pid, (_, gate)) in (10..).zip(&gates) {
            let gate = gate.clone();
            let waited = run(process(pid), group("a"), move || _ = gate.recv());
            assert_eq!(waited.unwrap_err().kind(), io::ErrorKind::TimedOut);
            // Once is enough.
            let begun = std::time::Instant::now();
            run(process(pid), group("a"), || ()).unwrap_err();
            assert!(begun.elapsed() < PATIENCE);
        }
        // The group has no thread left, and other groups have.
        run(process(20), group("a"), || ()).unwrap_err();
        assert_eq!(run(process(21), group("b"), || 8).unwrap(), 8);
        assert!(given_up() > 0);
        for (open, _) in &gates {
            open.send(()).unwrap();
        }
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while run(process(22), group("a"), || ()).is_err() {
            assert!(std::time::Instant::now() < deadline, "they did not come back");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
