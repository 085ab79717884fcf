//! What the threads share about executions: the files that the gate was asked about, and the
//! executions that the kernel has not recorded yet.
//!
//! Owns these tables and their locks. It must not read records or judge files: `trace`,
//! `content` and `processes` do. Through `Deref` it carries what every wing below shares.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::described::Described;
use super::late::Late;
use super::observed::Observed;
use super::unproven::Unproven;
use crate::watch::sessions::opening::Openings;
use crate::watch::sessions::shared::Sessions;

/// Processes whose executions have no record from the kernel yet, and files that one of
/// them may have tried to execute.
const MAX_ASKED: usize = 4 * 1024;
const MAX_ASKED_OF_ONE: usize = 16;

/// What is known of executions, for all containers.
pub(crate) struct Exec {
    pub(crate) sessions: Arc<Sessions>,
    openings: Mutex<Openings>,
    /// Files on other filesystems about which the gate was asked, by the pid of the process
    /// that executes them. The kernel's records come later, and the same execution must not
    /// be reported again.
    asked: Mutex<HashMap<u32, Vec<Asked>>>,
    unproven: Mutex<Unproven<Described>>,
    late: Mutex<Late<Described>>,
    observed: Mutex<Observed>,
    /// Executions that the gate has answered and that have been taken from it.
    pub(crate) gate_taken: AtomicU64,
    /// The gate's process has been requested to end.
    pub(crate) is_gate_closed: AtomicBool,
}

/// A file about which the gate was asked.
#[derive(Clone, Copy, Debug)]
struct Asked {
    file: (u64, u64),
    /// When, by the clock of the kernel's records.
    at: u64,
}

impl Deref for Exec {
    type Target = Sessions;

    fn deref(&self) -> &Sessions {
        &self.sessions
    }
}

impl Exec {
    pub(crate) fn new(sessions: Arc<Sessions>) -> Exec {
        Exec {
            sessions,
            openings: Mutex::default(),
            asked: Mutex::default(),
            unproven: Mutex::default(),
            late: Mutex::default(),
            observed: Mutex::default(),
            gate_taken: AtomicU64::new(0),
            is_gate_closed: AtomicBool::new(false),
        }
    }

    /// From now on the kernel records every execution.
    pub(crate) fn set_records_executions(&self) {
        drop(self.unproven().forget_all(crate::sys::perf::now()));
        self.set_records();
    }

    /// The processes that were judged as the first of their sessions.
    pub(crate) fn openings(&self) -> MutexGuard<'_, Openings> {
        self.openings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the gate was asked about a file (device and inode) at that time. Its
    /// execution is reported by the gate.
    pub(crate) fn note_asked(&self, pid: u32, file: (u64, u64), at: u64) {
        let mut asked = self.asked();
        if asked.len() >= MAX_ASKED && !asked.contains_key(&pid) {
            // To report an execution twice is better than to miss it.
            asked.clear();
        }
        let files = asked.entry(pid).or_default();
        if files.len() < MAX_ASKED_OF_ONE {
            files.push(Asked { file, at });
        }
    }

    /// Waits for a moment until everything that the gate has answered by now is taken from
    /// it. So it is known before the kernel's record of the same execution is examined.
    pub(crate) fn wait_for_gate(&self) {
        let Some(pulse) = self.health.pulse.get() else { return };
        let answered = pulse.answers().load(Ordering::SeqCst);
        self.wait_until(|| {
            let lost = pulse.dropped().load(Ordering::Relaxed);
            self.gate_taken.load(Ordering::Acquire) + lost >= answered
        });
    }

    /// How many of the executions that the gate has answered were not taken from it.
    pub(crate) fn untaken(&self) -> u64 {
        let Some(pulse) = self.health.pulse.get() else { return 0 };
        let answered = pulse.answers().load(Ordering::SeqCst);
        let lost = pulse.dropped().load(Ordering::Relaxed);
        answered.saturating_sub(self.gate_taken.load(Ordering::Acquire) + lost)
    }

    /// The files that the gate was asked about between a process's last execve and this time,
    /// by the clock of the kernel's records. A later event belongs to a later execve.
    pub(crate) fn take_asked(&self, pid: u32, until: u64) -> Vec<(u64, u64)> {
        let mut asked = self.asked();
        let Some(files) = asked.get_mut(&pid) else { return Vec::new() };
        let taken = files.extract_if(.., |asked| asked.at <= until).map(|asked| asked.file);
        let taken = taken.collect();
        if files.is_empty() {
            asked.remove(&pid);
        }
        taken
    }

    fn asked(&self) -> MutexGuard<'_, HashMap<u32, Vec<Asked>>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of executions that wait for a decision.
    pub(crate) fn observed(&self) -> MutexGuard<'_, Observed> {
        self.observed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The executions that wait for the change feed.
    pub(crate) fn late(&self) -> MutexGuard<'_, Late<Described>> {
        // A change is one insert or removal: a panic leaves nothing half done.
        self.late.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Executions that wait for the kernel's record.
    pub(crate) fn unproven(&self) -> MutexGuard<'_, Unproven<Described>> {
        self.unproven.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
