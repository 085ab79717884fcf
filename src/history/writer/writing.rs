//! The writing thread: waits for records, commits them in groups, and does the rest of its
//! work when that is due.
//!
//! The subjects are in files of their own: `disk` (a disk that cannot be written), `replaced`
//! (a file that is gone), `retention` and `shrink` (what is too old or too much).

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, Sender, select};
use rusqlite::Connection;
use tokio::sync::watch;

use super::database::Database;
use super::keep::Keep;
use super::pending::Pending;
use super::schedule::Schedule;
use crate::health::{Failure, Health};
use crate::history::files::Heartbeat;
use crate::history::json;
use crate::history::record::Record;
use crate::model::ContainerId;
use crate::threads;

/// How often a commit is tried when driftd stops.
const TRIES_AT_STOP: u32 = 3;

pub(super) struct Writing {
    pub(super) database: Database,
    pub(super) heartbeat: Heartbeat,
    pub(super) incoming: Receiver<Record>,
    /// Carries whether every observation has been handed over.
    pub(super) stopping: Receiver<bool>,
    pub(super) begun: Sender<()>,
    pub(super) committed: watch::Sender<u64>,
    pub(super) health: Arc<Health>,
    pub(super) keep: Arc<Mutex<Keep>>,
    pub(super) pending: Pending,
    /// How many records are not on the disk, for other threads to read.
    pub(super) unwritten: Arc<AtomicU64>,
    pub(super) schedule: Schedule,
    /// Containers whose rows were dropped since the history became full. `None` while it is
    /// not full.
    pub(super) shrinking: Option<HashSet<ContainerId>>,
}

enum Wakeup {
    Due,
    Received,
    /// Carries whether every observation has been handed over.
    Stop(bool),
}

impl Writing {
    pub(super) fn run(mut self) {
        loop {
            match self.wait() {
                Wakeup::Received => (),
                Wakeup::Due if self.database.memory.is_some() => {
                    // Without this the thread would never wait: the file is not checked now.
                    self.schedule.check_file_later();
                    if !self.pending.is_empty() {
                        self.commit_to_memory();
                    }
                    self.shrink();
                    if self.schedule.may_write() {
                        self.return_to_disk();
                    }
                }
                Wakeup::Due => {
                    self.check_file();
                    if self.schedule.may_write() && !self.pending.is_empty() {
                        self.commit();
                    }
                    // Also after a commit: otherwise a steady load would keep old records.
                    if !self.schedule.has_failed() {
                        self.shrink();
                    }
                    if !self.schedule.has_failed() && self.schedule.next_prune <= Instant::now() {
                        self.prune();
                    }
                }
                Wakeup::Stop(is_all) => return self.finish(is_all),
            }
            self.set_heartbeat();
        }
    }

    /// Waits for a record, for the time at which something is due, or for the end.
    fn wait(&mut self) -> Wakeup {
        let due = self.due();
        let is_writable = !self.schedule.has_failed() || self.database.memory.is_some();
        let full = self.pending.is_batch() && is_writable;
        if full || due <= Instant::now() && self.incoming.is_empty() {
            return self.stopping.try_recv().map_or(Wakeup::Due, Wakeup::Stop);
        }
        let received = threads::idle(|| {
            select! {
                recv(self.incoming) -> record => record.map_err(|_| Wakeup::Stop(true)),
                recv(self.stopping) -> is_all => Err(Wakeup::Stop(is_all.unwrap_or(true))),
                default(due.saturating_duration_since(Instant::now())) => Err(Wakeup::Due),
            }
        });
        match received {
            Ok(record) => {
                threads::took();
                self.take(record);
                Wakeup::Received
            }
            Err(wakeup) => wakeup,
        }
    }

    fn due(&self) -> Instant {
        let Schedule { next_prune, next_file_check, .. } = self.schedule;
        let retry = self.schedule.retry_at();
        let after_last = self.schedule.next_commit(self.pending.has_news());
        if self.database.memory.is_some() {
            let write = if self.pending.is_empty() { next_file_check } else { after_last };
            return retry.map_or(write, |at| write.min(at));
        }
        if self.shrinking.is_some() && retry.is_none() {
            return Instant::now();
        }
        let write = match retry {
            _ if self.pending.is_empty() => next_prune,
            Some(at) => at,
            None => after_last,
        };
        write.min(next_file_check)
    }

    fn take(&mut self, record: Record) {
        let dropped = self.pending.push(counted(record, &self.health));
        self.unwritten.store(self.pending.len() as u64, Ordering::Relaxed);
        if let Some(dropped) = dropped {
            let _reaction = self.health.record(Failure::HistoryWrite);
            tracing::error!(dropped, "the history cannot be written and its memory is full");
        }
    }

    fn commit(&mut self) {
        let began = Instant::now();
        let written = self.pending.write(&mut self.database.disk);
        self.schedule.committed(began);
        match written {
            Ok(newest) => {
                if self.schedule.end_retry() {
                    tracing::info!("the history can be written again");
                    self.health.end(Failure::HistoryWrite);
                }
                self.pending = Pending::default();
                self.unwritten.store(0, Ordering::Relaxed);
                self.committed.send_replace(newest);
            }
            Err(err) => {
                self.failed(&err.to_string());
                self.go_on_in_memory();
            }
        }
    }

    /// How many records are not on the disk.
    pub(super) fn waiting(&self) -> u64 {
        self.database.in_memory() + self.pending.len() as u64
    }

    pub(super) fn keep(&self) -> Keep {
        *self.keep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the time until which every observation has been processed and stored.
    fn set_heartbeat(&mut self) {
        if self.heartbeat.is_due() && self.waiting() == 0 {
            let backlogs = self.health.backlogs();
            let waits = backlogs.first().map_or(Duration::ZERO, |first| first.oldest);
            self.heartbeat.set(SystemTime::now() - waits);
        }
    }

    fn finish(mut self, is_all: bool) {
        self.write_the_rest();
        if is_all {
            self.heartbeat.hurry();
            self.set_heartbeat();
        }
        if self.database.memory.is_none() {
            // A reader may be the last to close the file, and readers write nothing. A file
            // without side files can be read while the disk is full.
            let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
            let _ = self.database.disk.query_row(checkpoint, [], |_| Ok(()));
        }
    }

    fn write_the_rest(&mut self) {
        while let Ok(record) = self.incoming.try_recv() {
            self.take(record);
        }
        for _ in 0..TRIES_AT_STOP {
            if self.database.memory.is_some() {
                self.return_to_disk();
            }
            if self.database.memory.is_none() {
                if self.pending.is_empty() {
                    return;
                }
                self.check_file();
                self.commit();
            }
            if let Some(at) = self.schedule.retry_at() {
                let pause = at.saturating_duration_since(Instant::now());
                threads::idle(|| std::thread::sleep(pause));
            }
        }
        let lost = self.waiting();
        if lost > 0 {
            tracing::error!(lost, "records were lost: no write succeeded");
            // The log at least keeps what driftd did.
            for response in self.pending.responses() {
                tracing::error!(response = %json::shown(response), "a response was not kept");
            }
            for response in self.database.memory.iter().flat_map(responses_in) {
                tracing::error!(response, "a response was not kept");
            }
        }
    }
}

/// Counts a record that is a new finding, and not accepted.
fn counted(record: Record, health: &Health) -> Record {
    if let Record::Finding(finding) | Record::Aggregate { finding, .. } = &record
        && finding.revision == 1
        && !finding.verdict.is_accept()
    {
        health.count_finding(finding.kind.name(), finding.severity.name());
    }
    record
}

/// The responses in a database, as text.
fn responses_in(connection: &Connection) -> Vec<String> {
    let query = connection.prepare("SELECT json FROM main.record WHERE type = 'response'");
    let responses = query.and_then(|mut query| query.query_map([], |row| row.get(0))?.collect());
    responses.unwrap_or_default()
}
