//! A disk that cannot be written: the history goes on in memory, and returns to the disk when
//! it can be written again.
//!
//! Reports the failure to `health`, which shows it in `status`.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::pending::Pending;
use super::writing::Writing;
use crate::health::Failure;

impl Writing {
    /// Notes that the disk was not written. It is tried again, after longer and longer pauses.
    pub(super) fn failed(&mut self, problem: &str) {
        // Reaction::Retry.
        let _reaction = self.health.record(Failure::HistoryWrite);
        let pause = self.schedule.retry_later();
        let waiting = self.waiting();
        tracing::error!(
            history = %self.database.path.display(),
            waiting,
            "cannot write the history to its disk, trying again in {pause:?}: {problem}"
        );
        let detail = format!(
            "the history cannot be written to its disk, {waiting} records wait in memory: {problem}"
        );
        self.health.begin(Failure::HistoryWrite, &detail);
    }

    pub(super) fn go_on_in_memory(&mut self) {
        let committed = *self.committed.borrow();
        match self.database.begin_memory(committed) {
            Ok(()) => {
                tracing::warn!("the history goes on in memory until its disk can be written");
                self.shrinking = None;
                self.commit_to_memory();
            }
            Err(err) => tracing::error!("the history cannot go on in memory: {err}"),
        }
    }

    pub(super) fn commit_to_memory(&mut self) {
        self.schedule.committed(Instant::now());
        let Some(memory) = &mut self.database.memory else { return };
        match self.pending.write(memory) {
            Ok(newest) => {
                self.pending = Pending::default();
                self.committed.send_replace(newest);
            }
            Err(err) => {
                let _reaction = self.health.record(Failure::HistoryWrite);
                tracing::error!("cannot keep the history in memory: {err}");
            }
        }
        self.unwritten.store(self.waiting(), Ordering::Relaxed);
    }

    /// Writes what is in memory to the disk, if there is space again.
    pub(super) fn return_to_disk(&mut self) {
        let Some(overlay) = self.database.overlay.get() else { return };
        let opened = if self.database.is_not_open() {
            self.database.open()
        } else if self.database.is_in_place() {
            Ok(())
        } else {
            let _reaction = self.health.record(Failure::HistoryGone);
            self.begin_file().inspect(|()| {
                let _ = self.begun.try_send(());
            })
        };
        let poured = opened
            .map_err(|err| err.with_source())
            .and_then(|()| overlay.pour(&mut self.database.disk).map_err(|err| err.to_string()));
        match poured {
            Ok(newest) => {
                tracing::info!(
                    records = self.waiting(),
                    "the history can be written again: what was in memory is on the disk"
                );
                self.database.end_memory();
                self.schedule.end_retry();
                self.shrinking = None;
                self.health.end(Failure::HistoryWrite);
                self.unwritten.store(self.pending.len() as u64, Ordering::Relaxed);
                self.committed.send_replace(newest);
            }
            Err(problem) => self.failed(&problem),
        }
    }
}
