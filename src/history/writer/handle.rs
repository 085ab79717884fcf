//! The running history as other rooms hold it: where records go in, how followers learn of
//! commits, and how the thread is stopped.
//!
//! Starts the writing thread. The work of the thread is in `writing`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use tokio::sync::watch;

use super::database::Database;
use super::keep::Keep;
use super::pending::Pending;
use super::schedule::{RETRY_LAST, Schedule};
use super::writing::Writing;
use crate::health::Health;
use crate::history::open::History;
use crate::history::reader::Reader;
use crate::history::record::Record;
use crate::history::sql::newest_seq;
use crate::threads::{self, Left, Role, Threads};

/// Records that may wait in the channel; the pipeline blocks beyond that.
const CHANNEL: usize = 1024;

/// The name of the writing thread.
const THREAD: &str = "history";

/// The running history.
#[derive(Debug)]
pub struct Writer {
    records: Sender<Record>,
    committed: watch::Receiver<u64>,
    begun: Receiver<()>,
    reader: Reader,
    /// Carries whether every observation has been handed over.
    stop: Sender<bool>,
    threads: Threads,
    unwritten: Arc<AtomicU64>,
    keep: Arc<Mutex<Keep>>,
}

impl History {
    /// Starts the writing thread. It drops what exceeds `keep`, now and while it runs.
    pub fn start(self, keep: impl Into<Keep>, health: Arc<Health>) -> Writer {
        let (records, incoming) = bounded(CHANNEL);
        let (begun_sender, begun) = bounded(1);
        let (stop, stopping) = bounded(1);
        let reader = self.reader();
        let (memory, problem) = self.kept_in_memory.unzip();
        let newest = newest_seq(memory.as_ref().unwrap_or(&self.connection)).unwrap_or(0);
        let (committed_sender, committed) = watch::channel(newest);
        let threads = health.threads.clone();
        let depth = threads::depth_of(&incoming);
        let unwritten = Arc::new(AtomicU64::new(0));
        let keep = Arc::new(Mutex::new(keep.into()));
        let mut writing = Writing {
            database: Database {
                disk: self.connection,
                identity: self.identity,
                path: self.path,
                memory,
                overlay: self.memory,
                generation: self.generation,
                _lock: self.lock,
            },
            heartbeat: self.heartbeat,
            incoming,
            stopping,
            begun: begun_sender,
            committed: committed_sender,
            health,
            keep: keep.clone(),
            pending: Pending::default(),
            unwritten: unwritten.clone(),
            schedule: Schedule::new(),
            shrinking: None,
        };
        if let Some(problem) = problem {
            writing.failed(&problem);
        }
        threads
            .spawn(THREAD, Role::Disk, Some(depth), move || writing.run())
            .expect("a thread can be started while driftd starts");
        Writer { records, committed, begun, reader, stop, threads, unwritten, keep }
    }
}

impl Writer {
    /// Where the pipeline puts records. Blocks while the channel is full.
    pub fn records(&self) -> Sender<Record> {
        self.records.clone()
    }

    /// The newest committed sequence number.
    pub fn committed(&self) -> watch::Receiver<u64> {
        self.committed.clone()
    }

    /// Receives a message whenever a new file was begun. The pipeline then hands over again
    /// everything that it knows.
    pub fn begun(&self) -> Receiver<()> {
        self.begun.clone()
    }

    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }

    /// Changes how much is kept from now on.
    pub fn keeper(&self) -> impl Fn(Keep) + Send + 'static {
        let keep = self.keep.clone();
        move |new| *keep.lock().unwrap_or_else(PoisonError::into_inner) = new
    }

    /// Writes what was handed over and ends the thread.
    pub fn stop(self) {
        self.stop_after(true);
    }

    /// The same. `is_all` is whether every observation has been handed over.
    pub fn stop_after(self, is_all: bool) {
        // The thread may have ended already; then no receiver is left.
        let _ = self.stop.try_send(is_all);
        while !self.threads.wait_for_end(&[THREAD], Instant::now() + RETRY_LAST).is_empty() {}
        self.threads.forget(&[THREAD]);
    }

    /// The records that were handed over and are not written, also after a stop.
    pub fn left(&self) -> impl Fn() -> Vec<Left> + 'static {
        let (threads, unwritten) = (self.threads.clone(), self.unwritten.clone());
        move || {
            let taken = Left { what: "records", count: unwritten.load(Ordering::Relaxed) };
            let mut left = threads.left(&[THREAD]);
            left.extend((taken.count > 0).then_some(taken));
            left
        }
    }
}
