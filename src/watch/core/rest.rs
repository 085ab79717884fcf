//! The rest of a thread that would otherwise wake up for each of many events, and an end of it
//! for those that wait for the thread.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use crate::sys::perf;

const AWAKE: Duration = Duration::from_secs(1);
/// What another thread waits for comes within milliseconds.
const AWAKE_FOR_OTHERS: Duration = Duration::from_millis(10);

#[derive(Debug)]
pub(crate) struct Rest {
    is_resting: AtomicBool,
    hurry: OwnedFd,
    /// By the clock of the kernel's records.
    awake_until: AtomicU64,
}

impl Rest {
    pub(crate) fn new() -> io::Result<Rest> {
        let hurry = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Rest { is_resting: AtomicBool::new(false), hurry, awake_until: AtomicU64::new(0) })
    }

    /// The thread does not rest for a while: what is seen may end soon, and more of it may come.
    pub(crate) fn stay_awake(&self) {
        self.stay_awake_for(AWAKE);
    }

    fn stay_awake_for(&self, lasting: Duration) {
        let lasting = u64::try_from(lasting.as_nanos()).unwrap_or(u64::MAX);
        self.awake_until.fetch_max(perf::now().saturating_add(lasting), Ordering::Relaxed);
    }

    pub(crate) fn may_rest(&self) -> bool {
        perf::now() >= self.awake_until.load(Ordering::Relaxed)
    }

    /// Rests for so long, unless another thread ends the rest. Then the thread stays awake for a
    /// moment.
    pub(crate) fn rest(&self, at_most: Duration) {
        self.is_resting.store(true, Ordering::SeqCst);
        let mut fds = [PollFd::from_borrowed_fd(self.hurry.as_fd(), PollFlags::IN)];
        let at_most = Timespec::try_from(at_most).ok();
        // An error here (a signal) only ends the rest early.
        let _ = rustix::event::poll(&mut fds, at_most.as_ref());
        self.is_resting.store(false, Ordering::SeqCst);
        if !fds[0].revents().is_empty() {
            self.stay_awake_for(AWAKE_FOR_OTHERS);
            // Only this thread reads it. If that fails, the next rest is short.
            let _ = rustix::io::read(&self.hurry, &mut [0; 8]);
        }
    }

    /// Ends the rest, if there is one.
    pub(crate) fn hurry(&self) {
        if self.is_resting.load(Ordering::SeqCst) {
            // If it is full, it is readable already.
            let _ = rustix::io::write(&self.hurry, &1_u64.to_ne_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rest_ends_when_another_thread_waits() {
        const LONG: Duration = Duration::from_secs(600);
        let rest = Rest::new().unwrap();
        // No thread rests: nothing is left for the next rest.
        rest.hurry();
        rest.rest(Duration::from_millis(1));
        assert!(rest.may_rest());
        std::thread::scope(|scope| {
            let resting = scope.spawn(|| rest.rest(LONG));
            while !resting.is_finished() {
                rest.hurry();
                std::thread::yield_now();
            }
            resting.join().unwrap();
        });
        rest.stay_awake_for(LONG);
        assert!(!rest.may_rest());
    }
}
