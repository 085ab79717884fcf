//! A small process that ends a gate or a daemon that makes no progress, and the daemon's part
//! of it (`Heart`).
//!
//! While a gate is open and does not answer, every exec in every watched container waits.
//! Once the gate's process has ended, the kernel lets all of them run. So a gate without
//! progress is worse than none, and so is a gate whose daemon makes no progress: its
//! executions are lost. The guardian reads the counters that the three processes share
//! (`pulse`). When the gate's or the daemon's stands still, the guardian ends the gate first,
//! which frees the node whatever the daemon waits for, and then the daemon.
//!
//! When its channel closes, the daemon has ended by itself, and so does the guardian.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, pidfd_send_signal};

use crate::pulse::{GUARDIANS_PATIENCE, PATIENCE, Part, Pulse, Silence, TURN};
use crate::sys::channel::Channel;
use crate::sys::{pidfd, process};

/// How long the first packet may take.
const START: Duration = Duration::from_secs(10);

/// A running guardian.
#[derive(Debug)]
pub struct Guardian {
    pub child: Child,
    /// The guardian ends when this is dropped.
    pub channel: Channel,
}

impl Guardian {
    /// Starts the guardian of this process and of its gate.
    pub fn start(program: &Path, pulse: &Pulse, gate: &Child) -> io::Result<Guardian> {
        let (channel, its_channel) = Channel::pair()?;
        let child = Command::new(program)
            .arg("guardian")
            .env_clear()
            .envs(process::journal())
            .stdin(Stdio::from(OwnedFd::from(its_channel)))
            .stdout(Stdio::null())
            .spawn()?;
        // This process has not waited for the gate, so the pid is still the gate's.
        let handles = [pidfd::open(std::process::id())?, pidfd::open(gate.id())?];
        let [daemon, gate] = handles.each_ref().map(OwnedFd::as_fd);
        channel.send(b"watch", &[pulse.as_fd(), daemon, gate], START)?;
        // The end of a guardian that has never counted would not be noticed.
        let deadline = Instant::now() + START;
        while pulse.turns_of(Part::Guardian).load(Ordering::Relaxed) == 0 {
            if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not start to count"));
            }
            thread::sleep(Duration::from_millis(1));
        }
        Ok(Guardian { child, channel })
    }
}

/// Why the guardian ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The channel was closed: the daemon has ended, or is stopping in good order.
    DaemonGone,
    /// This process made no progress, and the gate and the daemon were ended.
    Killed(Part),
}

/// Runs the guardian.
pub fn run() -> io::Result<Ended> {
    process::leave_stopping_to_the_daemon()?;
    let channel = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let channel = Channel::from(channel);
    let mut buffer = [0; 16];
    let descriptors = channel.receive(&mut buffer, START)?.descriptors;
    let Ok([memory, daemon, gate]) = <[OwnedFd; 3]>::try_from(descriptors) else {
        let message = "`driftd guardian` is started by driftd itself (see: driftd run)";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    };
    let pulse = Pulse::share(memory)?;
    pulse.beat(Part::Guardian);
    let turn = Timespec::try_from(TURN).expect("a quarter of a second fits");
    let mut silences = [(Part::Gate, Silence::default()), (Part::Daemon, Silence::default())];
    loop {
        let mut fds = [PollFd::new(&channel, PollFlags::IN)];
        match poll(&mut fds, Some(&turn)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => (),
            Ok(_) => return Ok(Ended::DaemonGone),
            Err(err) => return Err(err.into()),
        }
        pulse.beat(Part::Guardian);
        for (part, silence) in &mut silences {
            let turns = pulse.turns_of(*part).load(Ordering::Relaxed);
            if silence.turn(turns) >= GUARDIANS_PATIENCE {
                return Ok(end(*part, daemon.as_fd(), gate.as_fd()));
            }
        }
    }
}

/// Ends the gate, so that the node is free, and then the daemon, so that it is started
/// again.
fn end(silent: Part, daemon: BorrowedFd<'_>, gate: BorrowedFd<'_>) -> Ended {
    // An error means that the process has ended already. The signals come before the message,
    // because standard error may be what blocks.
    let _ = pidfd_send_signal(gate, Signal::KILL);
    let _ = pidfd_send_signal(daemon, Signal::KILL);
    let name = match silent {
        Part::Gate => "gate",
        Part::Daemon => "daemon",
        Part::Guardian => "guardian",
    };
    eprintln!(
        "{}driftd guardian: the {name} made no progress for {} s; killed the gate and the daemon, \
         so that the kernel lets waiting programs run",
        process::priority_prefix(3),
        (TURN * GUARDIANS_PATIENCE).as_secs_f32(),
    );
    Ended::Killed(silent)
}

/// The daemon's part: it counts while its threads make progress, and ends a gate or a
/// guardian that makes none. The daemon ends when its gate or guardian has ended.
#[derive(Debug)]
pub struct Heart {
    progress: Arc<Progress>,
    stop: Arc<AtomicBool>,
}

/// The counters that have to grow while the daemon makes progress.
#[derive(Debug, Default)]
pub struct Progress(Mutex<Vec<(Arc<AtomicU64>, u64)>>);

impl Progress {
    /// From now on, the daemon makes progress only while this counter grows too.
    pub fn needs(&self, counter: Arc<AtomicU64>) {
        let seen = counter.load(Ordering::Relaxed);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((counter, seen));
    }

    /// Whether all of them have grown since this was last true.
    fn is_made(&self) -> bool {
        let mut counters = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let have_moved =
            counters.iter().all(|(counter, seen)| counter.load(Ordering::Relaxed) != *seen);
        if have_moved {
            for (counter, seen) in counters.iter_mut() {
                *seen = counter.load(Ordering::Relaxed);
            }
        }
        have_moved
    }
}

impl Heart {
    /// Starts to beat.
    pub fn start(pulse: Arc<Pulse>, gate: &Child, guardian: &Child) -> io::Result<Heart> {
        let (progress, stop) = (Arc::new(Progress::default()), Arc::new(AtomicBool::new(false)));
        let heart = Heart { progress: progress.clone(), stop: stop.clone() };
        // This process has not waited for them, so the pids are still theirs.
        let mut others = [
            (Part::Gate, pidfd::open(gate.id())?, Silence::default()),
            (Part::Guardian, pidfd::open(guardian.id())?, Silence::default()),
        ];
        thread::Builder::new().name("heart".into()).spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                if progress.is_made() {
                    pulse.beat(Part::Daemon);
                }
                for (part, process, silence) in &mut others {
                    let turns = pulse.turns_of(*part).load(Ordering::Relaxed);
                    // Only once: the process may have ended by itself.
                    if silence.turn(turns) == PATIENCE {
                        let _ = pidfd_send_signal(&*process, Signal::KILL);
                        tracing::error!("the {part:?} makes no progress and was killed");
                    }
                }
                thread::sleep(TURN);
            }
        })?;
        Ok(heart)
    }

    pub fn progress(&self) -> &Progress {
        &self.progress
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemon_makes_progress_while_every_counter_moves() {
        let progress = Progress::default();
        assert!(progress.is_made(), "nothing is needed yet");
        let [one, other] = [0, 0].map(|_| Arc::new(AtomicU64::new(0)));
        progress.needs(one.clone());
        progress.needs(other.clone());
        assert!(!progress.is_made());
        one.fetch_add(1, Ordering::Relaxed);
        assert!(!progress.is_made());
        other.fetch_add(5, Ordering::Relaxed);
        assert!(progress.is_made());
        assert!(!progress.is_made(), "both have to move again");
    }
}
