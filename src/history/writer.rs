//! The thread that writes.
//!
//! A record that comes after a pause is committed at once; under load, commits
//! are [`COMMIT_SPACING`] apart and hold up to [`BATCH`] records. Of a finding
//! that was revised several times in one batch the last revision is stored, and
//! of every finding only the newest revision is kept, so that a program that
//! runs a thousand times a second cannot fill the disk. So it is with sessions and
//! probes.
//!
//! When a commit fails (the disk is full, or gone), the history goes on in memory
//! ([`super::memory`]): readers and followers get what is new, and all of it is written
//! when the disk has room again. What the memory has no room for is dropped as in a file
//! that is full. Where even that fails, the batch is kept and tried again. New records
//! join it, up to [`PENDING`]; beyond that the oldest are dropped, gaps first, and a gap
//! of its own says how many. Responses are never dropped: they tell what driftd did, and
//! nothing else does.
//!
//! The file is bounded in bytes. When it is full, rows are dropped of the container that
//! takes the most: the least severe first, and of these the oldest. Responses stay.
//!
//! When the file is removed or replaced while driftd runs, a new one is begun, and the
//! pipeline is asked for everything that it still knows.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension as _, params};
use tokio::sync::watch;

use super::memory::{self, Disk, Overlay};
use super::{
    Beat, Error, History, MemberChange, NOT_OPEN, Reader, Record, StateLock, identity_of, json,
    open,
};
use crate::health::{Failure, Health};
use crate::model::finding::ContainerEvidence;
use crate::model::{Command, ContainerId, FindingId, Probe, ProbeId, Session, SessionId, Severity};
use crate::threads::{self, Left, Role, Threads};

/// Records that may wait in the channel; the pipeline blocks beyond that.
const CHANNEL: usize = 1024;
/// Most records in one commit.
const BATCH: usize = 1000;
/// Least time between two commits, unless a batch is full.
const COMMIT_SPACING: Duration = Duration::from_millis(100);
/// Most records kept in memory while the disk cannot be written.
const PENDING: usize = 20_000;
/// The same for what is new of aggregated findings' files.
const PENDING_MEMBERS: usize = 100_000;
/// The same for commands of sessions.
const PENDING_COMMANDS: usize = 20_000;
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_LAST: Duration = Duration::from_secs(10);
/// How often a commit is tried when driftd stops.
const TRIES_AT_STOP: u32 = 3;
const PRUNE_EVERY: Duration = Duration::from_secs(60 * 60);
/// Most records one transaction prunes: new records never wait long behind it.
const PRUNE_STEP: usize = 500;
/// The same while the history is full: more than one commit can add.
const SHRINK_STEP: usize = 4 * BATCH;
/// Most containers that are tried for something to drop.
const SHRINK_FROM: usize = 64;
/// How often it is asked whether the file is still there.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it is noted that all was told and kept.
const BEAT_EVERY: Duration = Duration::from_secs(5);

/// The running history.
#[derive(Debug)]
pub struct Writer {
    records: Sender<Record>,
    committed: watch::Receiver<u64>,
    begun: Receiver<()>,
    reader: Reader,
    /// With whether all that was seen was told.
    stop: Sender<bool>,
    threads: Threads,
    unwritten: Arc<AtomicU64>,
    keep: Arc<Mutex<Keep>>,
}

/// The name of the writing thread.
const THREAD: &str = "history";

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// How long, after something was last seen.
    pub retention: Duration,
    /// How many bytes the file may take.
    pub max_bytes: u64,
}

impl From<Duration> for Keep {
    /// Without a bound in bytes.
    fn from(retention: Duration) -> Keep {
        Keep { retention, max_bytes: u64::MAX }
    }
}

impl History {
    /// Starts the writing thread. What is more than is to be kept is forgotten, now and
    /// while it runs.
    pub fn start(self, keep: impl Into<Keep>, health: Arc<Health>) -> Writer {
        let (records, incoming) = bounded(CHANNEL);
        let (begun_sender, begun) = bounded(1);
        let (stop, stopping) = bounded(1);
        let (memory, problem) = self.kept_in_memory.unzip();
        let newest = newest_seq(memory.as_ref().unwrap_or(&self.connection)).unwrap_or(0);
        let (committed_sender, committed) = watch::channel(newest);
        let reader = Reader::new(self.path.clone(), self.generation.clone(), self.memory.clone());
        let threads = health.threads.clone();
        let depth = threads::depth_of(&incoming);
        let unwritten = Arc::new(AtomicU64::new(0));
        let keep = Arc::new(Mutex::new(keep.into()));
        let mut writing = Writing {
            memory,
            overlay: self.memory,
            connection: self.connection,
            identity: self.identity,
            generation: self.generation,
            begun: begun_sender,
            path: self.path,
            _lock: self.lock,
            beat: self.beat,
            next_beat: Instant::now(),
            incoming,
            stopping,
            committed: committed_sender,
            health,
            keep: keep.clone(),
            pending: Pending::default(),
            unwritten: unwritten.clone(),
            last_commit: None,
            retry: None,
            next_prune: Instant::now(),
            next_look: Instant::now() + LOOK_EVERY,
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
    /// Where the pipeline puts records. Blocks when the history cannot follow.
    pub fn records(&self) -> Sender<Record> {
        self.records.clone()
    }

    /// The newest committed sequence number.
    pub fn committed(&self) -> watch::Receiver<u64> {
        self.committed.clone()
    }

    /// Something comes whenever a new file was begun: what is known is wanted again.
    pub fn begun(&self) -> Receiver<()> {
        self.begun.clone()
    }

    pub fn reader(&self) -> Reader {
        self.reader.clone()
    }

    /// How much is kept from now on.
    pub fn keeper(&self) -> impl Fn(Keep) + Send + 'static {
        let keep = self.keep.clone();
        move |new| *keep.lock().unwrap_or_else(PoisonError::into_inner) = new
    }

    /// Writes what was handed over and ends the thread.
    pub fn stop(self) {
        self.stop_after(true);
    }

    /// The same, with whether all that was seen has been handed over.
    pub fn stop_after(self, is_all: bool) {
        // The thread may have ended already; then there is nobody to tell.
        let _ = self.stop.try_send(is_all);
        while !self.threads.wait_for_end(&[THREAD], Instant::now() + RETRY_LAST).is_empty() {}
        self.threads.forget(&[THREAD]);
    }

    /// What was handed over and is not written, also after a stop.
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

struct Writing {
    /// What is written to while the disk cannot be.
    memory: Option<Connection>,
    /// The same, for readers.
    overlay: memory::Shared,
    connection: Connection,
    /// Device and inode of the file that is open.
    identity: (u64, u64),
    /// Which file readers are to read.
    generation: Arc<AtomicU64>,
    begun: Sender<()>,
    path: PathBuf,
    _lock: StateLock,
    beat: Beat,
    next_beat: Instant,
    incoming: Receiver<Record>,
    stopping: Receiver<bool>,
    committed: watch::Sender<u64>,
    health: Arc<Health>,
    keep: Arc<Mutex<Keep>>,
    pending: Pending,
    /// How many records `pending` holds, for others to see.
    unwritten: Arc<AtomicU64>,
    last_commit: Option<Instant>,
    /// When to try again after a failed commit, and how long to wait after that.
    retry: Option<(Instant, Duration)>,
    next_prune: Instant,
    next_look: Instant,
    /// Containers of which something was dropped since the history became full. `None`
    /// while it is not.
    shrinking: Option<HashSet<ContainerId>>,
}

enum Turn {
    Due,
    Received,
    /// With whether all that was seen was handed over.
    Stop(bool),
}

impl Writing {
    fn run(mut self) {
        loop {
            match self.wait() {
                Turn::Received => (),
                Turn::Due if self.memory.is_some() => {
                    // Without this the thread never waits: its file is not looked at now.
                    self.next_look = Instant::now() + LOOK_EVERY;
                    if !self.pending.is_empty() {
                        self.commit_to_memory();
                    }
                    self.shrink();
                    if self.retry.is_none_or(|(at, _)| at <= Instant::now()) {
                        self.return_to_disk();
                    }
                }
                Turn::Due => {
                    self.look();
                    let is_due = self.retry.is_none_or(|(at, _)| at <= Instant::now());
                    if is_due && !self.pending.is_empty() {
                        self.commit();
                    }
                    // After a commit too, so that no load keeps old records for ever.
                    if self.retry.is_none() {
                        self.shrink();
                    }
                    if self.retry.is_none() && self.next_prune <= Instant::now() {
                        self.prune();
                    }
                }
                Turn::Stop(is_all) => return self.finish(is_all),
            }
            self.beat();
        }
    }

    /// Waits for a record, for the time at which something is to be done, or for the end.
    fn wait(&mut self) -> Turn {
        let due = self.due();
        let is_writable = self.retry.is_none() || self.memory.is_some();
        let full = self.pending.is_batch() && is_writable;
        if full || due <= Instant::now() && self.incoming.is_empty() {
            return self.stopping.try_recv().map_or(Turn::Due, Turn::Stop);
        }
        let received = threads::idle(|| {
            select! {
                recv(self.incoming) -> record => record.map_err(|_| Turn::Stop(true)),
                recv(self.stopping) -> is_all => Err(Turn::Stop(is_all.unwrap_or(true))),
                default(due.saturating_duration_since(Instant::now())) => Err(Turn::Due),
            }
        });
        match received {
            Ok(record) => {
                threads::took();
                self.take(record);
                Turn::Received
            }
            Err(turn) => turn,
        }
    }

    fn due(&self) -> Instant {
        if self.memory.is_some() {
            let written = match self.last_commit {
                _ if self.pending.is_empty() => self.next_look,
                Some(last) => last + COMMIT_SPACING,
                None => Instant::now(),
            };
            return self.retry.map_or(written, |(at, _)| written.min(at));
        }
        let write = match (self.retry, self.last_commit) {
            _ if self.pending.is_empty() => self.next_prune,
            (Some((at, _)), _) => at,
            (None, Some(last)) => last + COMMIT_SPACING,
            (None, None) => Instant::now(),
        };
        if self.shrinking.is_some() && self.retry.is_none() {
            return Instant::now();
        }
        write.min(self.next_look)
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
        self.last_commit = Some(Instant::now());
        match self.pending.write(&mut self.connection) {
            Ok(newest) => {
                if self.retry.take().is_some() {
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

    /// The disk was not written: it is tried again, after longer and longer.
    fn failed(&mut self, problem: &str) {
        // Reaction::Retry.
        let _reaction = self.health.record(Failure::HistoryWrite);
        let pause = self.retry.map_or(RETRY_FIRST, |(_, pause)| pause);
        self.retry = Some((Instant::now() + pause, (pause * 2).min(RETRY_LAST)));
        let waiting = self.waiting();
        tracing::error!(
            history = %self.path.display(),
            waiting,
            "cannot write the history to its disk, trying again in {pause:?}: {problem}"
        );
        let detail = format!(
            "the history cannot be written to its disk, {waiting} records wait in memory: {problem}"
        );
        self.health.begin(Failure::HistoryWrite, &detail);
    }

    /// How many records are not on the disk.
    fn waiting(&self) -> u64 {
        self.memory.as_ref().map_or(0, Overlay::count) + self.pending.len() as u64
    }

    fn go_on_in_memory(&mut self) {
        let newest = newest_seq(&self.connection).unwrap_or(*self.committed.borrow());
        let overlay = Overlay::new(&self.path, Disk::Open);
        match overlay.begin(newest, &self.path) {
            Ok(memory) => {
                tracing::warn!("the history goes on in memory until its disk can be written");
                self.memory = Some(memory);
                self.overlay.set(Some(overlay));
                self.generation.fetch_add(1, Ordering::Release);
                self.shrinking = None;
                self.commit_to_memory();
            }
            Err(err) => tracing::error!("the history cannot go on in memory: {err}"),
        }
    }

    fn commit_to_memory(&mut self) {
        self.last_commit = Some(Instant::now());
        let Some(memory) = &mut self.memory else { return };
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

    /// Writes what is in memory to the disk, if there is room again.
    fn return_to_disk(&mut self) {
        let Some(overlay) = self.overlay.get() else { return };
        let opened = if self.identity == NOT_OPEN {
            open(&self.path).map(|(connection, identity)| {
                (self.connection, self.identity) = (connection, identity);
            })
        } else if identity_of(&self.path).is_ok_and(|found| found == self.identity) {
            Ok(())
        } else {
            let _reaction = self.health.record(Failure::HistoryGone);
            self.begin().inspect(|()| {
                let _ = self.begun.try_send(());
            })
        };
        let poured = opened
            .map_err(|err| err.with_source())
            .and_then(|()| overlay.pour(&mut self.connection).map_err(|err| err.to_string()));
        match poured {
            Ok(newest) => {
                tracing::info!(
                    records = self.waiting(),
                    "the history can be written again: what was in memory is on the disk"
                );
                self.memory = None;
                self.overlay.set(None);
                self.generation.fetch_add(1, Ordering::Release);
                self.retry = None;
                self.shrinking = None;
                self.health.end(Failure::HistoryWrite);
                self.unwritten.store(self.pending.len() as u64, Ordering::Relaxed);
                self.committed.send_replace(newest);
            }
            Err(problem) => self.failed(&problem),
        }
    }

    /// Begins a new file if the one that is open is not the one at its path any more.
    fn look(&mut self) {
        if Instant::now() < self.next_look && self.pending.is_empty() {
            return;
        }
        self.next_look = Instant::now() + LOOK_EVERY;
        if identity_of(&self.path).is_ok_and(|found| found == self.identity) {
            return;
        }
        let _reaction = self.health.record(Failure::HistoryGone);
        let path = self.path.display().to_string();
        match self.begin() {
            Ok(()) => {
                tracing::error!("the history {path} was removed or replaced: a new one is begun");
                self.health.end(Failure::HistoryGone);
                self.shrinking = None;
                // One that was sent before will do.
                let _ = self.begun.try_send(());
            }
            Err(err) => {
                let problem = format!("the history {path} is gone, and none can be begun: {err}");
                tracing::error!("{problem}");
                self.health.begin(Failure::HistoryGone, &problem);
                // Nothing is written into a file that nobody will find.
                self.retry = Some((self.next_look, RETRY_FIRST));
            }
        }
    }

    fn begin(&mut self) -> Result<(), Error> {
        let newest = *self.committed.borrow();
        // The old one is closed first: SQLite removes its side files by their names.
        let none = Connection::open_in_memory().map_err(Error::sql("open", &self.path))?;
        drop(std::mem::replace(&mut self.connection, none));
        if !self.path.exists() {
            for suffix in ["-wal", "-shm"] {
                let mut name = self.path.clone().into_os_string();
                name.push(suffix);
                match std::fs::remove_file(&name) {
                    Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::io("remove", Path::new(&name))(err));
                    }
                    Ok(()) | Err(_) => (),
                }
            }
        }
        let (mut connection, identity) = open(&self.path)?;
        let failed = Error::sql("begin", &self.path);
        let mut begun = || -> rusqlite::Result<()> {
            let transaction = connection.transaction()?;
            // Numbers that were given are not given again: followers read on.
            if newest_seq(&transaction)? < newest {
                transaction.execute("DELETE FROM sqlite_sequence WHERE name = 'record'", [])?;
                transaction.execute(
                    "INSERT INTO sqlite_sequence (name, seq) VALUES ('record', ?1)",
                    [sql_integer(newest)],
                )?;
                transaction.execute(
                    "UPDATE pruned SET through = max(through, ?1)",
                    [sql_integer(newest)],
                )?;
            }
            let gap = Record::Gap {
                name: Failure::HistoryGone.name().into(),
                container: None,
                detail: "the history's file was removed or replaced: what is still known is \
                         written again"
                    .into(),
                at: Timestamp::now(),
                until: None,
            };
            store(&transaction, &gap)?;
            transaction.commit()
        };
        begun().map_err(failed)?;
        let newest = newest_seq(&connection).map_err(Error::sql("read", &self.path))?;
        (self.connection, self.identity) = (connection, identity);
        self.retry = None;
        self.generation.fetch_add(1, Ordering::Release);
        self.committed.send_replace(newest);
        Ok(())
    }

    /// Notes until when all that was seen is told and kept.
    fn beat(&mut self) {
        if self.next_beat <= Instant::now() && self.waiting() == 0 {
            self.next_beat = Instant::now() + BEAT_EVERY;
            let backlogs = self.health.backlogs();
            let waits = backlogs.first().map_or(Duration::ZERO, |first| first.oldest);
            self.beat.set(std::time::SystemTime::now() - waits);
        }
    }

    fn finish(mut self, is_all: bool) {
        self.write_the_rest();
        if is_all {
            self.next_beat = Instant::now();
            self.beat();
        }
        if self.memory.is_none() {
            // Readers may close it last, who write nothing. A file without side files can be
            // read on a full disk.
            let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
            let _ = self.connection.query_row(checkpoint, [], |_| Ok(()));
        }
    }

    fn write_the_rest(&mut self) {
        while let Ok(record) = self.incoming.try_recv() {
            self.take(record);
        }
        for _ in 0..TRIES_AT_STOP {
            if self.memory.is_some() {
                self.return_to_disk();
            }
            if self.memory.is_none() {
                if self.pending.is_empty() {
                    return;
                }
                self.look();
                self.commit();
            }
            if let Some((at, _)) = self.retry {
                let pause = at.saturating_duration_since(Instant::now());
                threads::idle(|| std::thread::sleep(pause));
            }
        }
        let lost = self.waiting();
        if lost > 0 {
            tracing::error!(lost, "records were lost: no write succeeded");
            // What driftd did is told at least here.
            for response in self.pending.responses() {
                tracing::error!(response = %json::shown(response), "a response was not kept");
            }
            for response in self.memory.iter().flat_map(responses_in) {
                tracing::error!(response, "a response was not kept");
            }
        }
    }

    fn keep(&self) -> Keep {
        *self.keep.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets some of what is too old; comes again at once while there is more.
    fn prune(&mut self) {
        let retention = self.keep().retention;
        let pruned = prune_step(&mut self.connection, retention);
        if let Ok(pruned @ 1..) = pruned {
            // Of a directory that was copied to be read, this may be all that there is.
            tracing::info!(
                history = %self.path.display(),
                records = pruned,
                ?retention,
                "records that are older than the retention are dropped (to read an old history \
                 whole: driftd --history FILE findings)"
            );
        }
        match pruned {
            Ok(pruned) if pruned == PRUNE_STEP => (),
            Ok(_) => {
                self.next_prune = Instant::now() + PRUNE_EVERY;
                if self.shrinking.is_none() {
                    self.health.end(Failure::HistoryFull);
                }
            }
            Err(err) => {
                let _reaction = self.health.record(Failure::HistoryWrite);
                tracing::error!(history = %self.path.display(), "cannot prune the history: {err}");
                self.next_prune = Instant::now() + PRUNE_EVERY;
            }
        }
    }

    /// Drops some of what is too much, once the history is full until it is well below
    /// that.
    fn shrink(&mut self) {
        let most = self.keep().max_bytes;
        let most = self.memory.as_ref().map_or(most, |_| most.min(memory::MAX_BYTES));
        let connection = self.memory.as_mut().unwrap_or(&mut self.connection);
        let limit = if self.shrinking.is_some() { most - most / 8 } else { most };
        let excess = match bytes_of(connection) {
            Ok(bytes) if bytes <= limit => {
                self.shrinking = None;
                return;
            }
            Ok(bytes) => bytes - (most - most / 8),
            Err(err) => {
                tracing::error!("cannot ask how large the history is: {err}");
                return;
            }
        };
        let told = self.shrinking.get_or_insert_default();
        let _reaction = self.health.record(Failure::HistoryFull);
        match shrink_step(connection, told, excess, most) {
            Ok(Some(newest)) => {
                let problem = format!(
                    "the history is full (history.max_bytes is {most}): what is old or not severe \
                     was dropped"
                );
                self.health.begin(Failure::HistoryFull, &problem);
                self.next_prune = Instant::now() + PRUNE_EVERY;
                self.committed.send_replace(newest);
            }
            Ok(None) => {
                let problem = format!(
                    "the history is full (history.max_bytes is {most}), and nothing in it may be \
                     dropped"
                );
                tracing::error!("{problem}");
                self.health.begin(Failure::HistoryFull, &problem);
                self.shrinking = None;
            }
            Err(err) => {
                let _reaction = self.health.record(Failure::HistoryWrite);
                tracing::error!(history = %self.path.display(), "cannot shrink the history: {err}");
                self.shrinking = None;
            }
        }
    }
}

/// What is told again and again: its newest revision stands for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Revised {
    Finding(FindingId),
    Session(SessionId),
    Probe(ProbeId),
}

impl Revised {
    fn by(record: &Record) -> Option<Revised> {
        match record {
            Record::Finding(finding) | Record::Aggregate { finding, .. } => {
                Some(Revised::Finding(finding.id))
            }
            Record::Session { session, .. } => Some(Revised::Session(session.id)),
            Record::Probe(probe) => Some(Revised::Probe(probe.id)),
            Record::Response(_) | Record::Gap { .. } => None,
        }
    }
}

/// Records that are not committed yet, in order; one per finding, session and probe.
#[derive(Debug, Default)]
struct Pending {
    /// `None` where a later revision of the same finding follows.
    records: VecDeque<Option<Record>>,
    /// How many records were ever removed from the front.
    removed: usize,
    /// Position in `records`, counted from the very first.
    newest: HashMap<Revised, usize>,
    held: usize,
    /// How many of them are responses, for which there is always room.
    responses: usize,
    /// What is new of the files of findings that are held, in order.
    members: Vec<(FindingId, MemberChange)>,
    /// What sessions have run, in order.
    commands: Vec<Command>,
    /// Records dropped for want of memory, and when the first one was.
    dropped: Option<(u64, Timestamp)>,
}

impl Pending {
    fn len(&self) -> usize {
        self.held
    }

    fn is_empty(&self) -> bool {
        self.held == 0
    }

    fn responses(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().flatten().filter(|record| matches!(record, Record::Response(_)))
    }

    /// Whether this is enough for one commit.
    fn is_batch(&self) -> bool {
        self.held >= BATCH || self.members.len() >= 4 * BATCH || self.commands.len() >= 4 * BATCH
    }

    /// Adds a record. `Some(n)` when that made room by dropping the `n`th one.
    fn push(&mut self, record: Record) -> Option<u64> {
        let (record, lost) = match record {
            Record::Aggregate { finding, changes } => {
                let room = PENDING_MEMBERS.saturating_sub(self.members.len());
                let lost = changes.len().saturating_sub(room);
                let id = finding.id;
                self.members.extend(changes.into_iter().take(room).map(|change| (id, change)));
                (Record::Finding(finding), lost)
            }
            Record::Session { session, commands } => {
                let room = PENDING_COMMANDS.saturating_sub(self.commands.len());
                let lost = commands.len().saturating_sub(room);
                self.commands.extend(commands.into_iter().take(room));
                (Record::Session { session, commands: Vec::new() }, lost)
            }
            record @ (Record::Finding(_)
            | Record::Probe(_)
            | Record::Response(_)
            | Record::Gap { .. }) => (record, 0),
        };
        let dropped = self.push_one(record);
        // A file or a command that is not kept is a record that is dropped.
        if lost > 0 { Some(self.count_dropped(lost as u64)) } else { dropped }
    }

    fn push_one(&mut self, record: Record) -> Option<u64> {
        if let Some(revised) = Revised::by(&record) {
            let position = self.removed + self.records.len();
            if let Some(earlier) = self.newest.insert(revised, position) {
                self.records[earlier - self.removed] = None;
                self.held -= 1;
            }
        }
        self.responses += usize::from(matches!(record, Record::Response(_)));
        self.records.push_back(Some(record));
        self.held += 1;
        self.trim();
        (self.held - self.responses > PENDING).then(|| self.drop_one())
    }

    fn trim(&mut self) {
        while self.records.front().is_some_and(Option::is_none) {
            self.records.pop_front();
            self.removed += 1;
        }
        // A finding that is revised over and over behind a record that stays.
        if self.records.len() > 2 * PENDING.max(self.held) {
            self.records.retain(Option::is_some);
            self.removed = 0;
            self.newest.clear();
            for (position, record) in self.records.iter().enumerate() {
                if let Some(revised) = record.as_ref().and_then(Revised::by) {
                    self.newest.insert(revised, position);
                }
            }
        }
    }

    fn drop_one(&mut self) -> u64 {
        let is_gap = |record: &Option<Record>| matches!(record, Some(Record::Gap { .. }));
        let is_droppable =
            |record: &Option<Record>| !matches!(record, None | Some(Record::Response(_)));
        let victim = self
            .records
            .iter()
            .position(is_gap)
            .or_else(|| self.records.iter().position(is_droppable))
            .expect("more records are held than may be");
        if let Some(revised) = self.records[victim].take().as_ref().and_then(Revised::by) {
            self.newest.remove(&revised);
        }
        self.held -= 1;
        self.trim();
        self.count_dropped(1)
    }

    fn count_dropped(&mut self, lost: u64) -> u64 {
        let (count, _) = self.dropped.get_or_insert_with(|| (0, Timestamp::now()));
        *count += lost;
        *count
    }

    /// Writes everything in one transaction; hands back the newest sequence number.
    fn write(&self, connection: &mut Connection) -> rusqlite::Result<u64> {
        let transaction = connection.transaction()?;
        if let Some((count, at)) = self.dropped {
            store(
                &transaction,
                &Record::Gap {
                    name: Failure::HistoryWrite.name().into(),
                    container: None,
                    detail: format!(
                        "{count} records were dropped while the history was not writable"
                    ),
                    at,
                    until: None,
                },
            )?;
        }
        for record in self.records.iter().flatten() {
            store(&transaction, record)?;
        }
        for (finding, change) in &self.members {
            store_member(&transaction, *finding, change)?;
        }
        for command in &self.commands {
            store_command(&transaction, command)?;
        }
        let newest = newest_seq(&transaction)?;
        transaction.commit()?;
        Ok(newest)
    }
}

fn unwritable(err: serde_json::Error) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(Box::new(err))
}

/// Keeps a container's labels, and names them.
fn store_labels(
    connection: &Connection,
    container: &ContainerEvidence,
) -> rusqlite::Result<Option<String>> {
    if container.labels.is_empty() {
        return Ok(None);
    }
    let (name, text) = json::labels(&container.labels).map_err(unwritable)?;
    connection
        .prepare_cached(
            "INSERT OR IGNORE INTO labels (namespace, container, id, json) VALUES (?1, ?2, ?3, ?4)",
        )?
        .execute(params![container.id.namespace, container.id.id, name, text])?;
    Ok(Some(name))
}

fn store(connection: &Connection, record: &Record) -> rusqlite::Result<()> {
    let text = json::text(record).map_err(unwritable)?;
    match record {
        Record::Finding(finding) | Record::Aggregate { finding, .. } => {
            let id = finding.id.to_string();
            let container = finding.container_id();
            let evidence = finding.container.as_ref();
            let labels = evidence.map(|one| store_labels(connection, one)).transpose()?.flatten();
            connection
                .prepare_cached(
                    "INSERT INTO finding (id, revision, namespace, container, image,
                         manifest_digest, kind, severity, first_seen, last_seen, count, json,
                         labels)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
                     ON CONFLICT (id) DO UPDATE SET
                         revision = excluded.revision, image = excluded.image,
                         manifest_digest = excluded.manifest_digest,
                         severity = excluded.severity, first_seen = excluded.first_seen,
                         last_seen = excluded.last_seen, count = excluded.count,
                         json = excluded.json, labels = excluded.labels",
                )?
                .execute(params![
                    id,
                    sql_integer(finding.revision),
                    container.map(|container| &container.namespace),
                    container.map(|container| &container.id),
                    finding.image.name,
                    finding.image.manifest_digest.map(|digest| digest.to_string()),
                    finding.kind.name(),
                    finding.severity as i64 + 1,
                    finding.first_seen.as_microsecond(),
                    finding.last_seen.as_microsecond(),
                    sql_integer(finding.count),
                    text,
                    labels,
                ])?;
            connection
                .prepare_cached("DELETE FROM record WHERE type = 'finding' AND finding = ?1")?
                .execute([&id])?;
            let row =
                Row { finding: Some(&id), container, ..Row::of("finding", finding.last_seen) };
            row.insert(connection)
        }
        Record::Session { session, .. } => store_session(connection, session, &text),
        Record::Probe(probe) => store_probe(connection, probe, &text),
        Record::Response(response) => {
            let finding = response.finding.map(|id| id.to_string());
            let row = Row {
                finding: finding.as_deref(),
                container: Some(&response.container),
                json: Some(&text),
                ..Row::of("response", response.outcome.at)
            };
            row.insert(connection)
        }
        Record::Gap { container, at, .. } => {
            let container = container.as_ref();
            Row { container, json: Some(&text), ..Row::of("gap", *at) }.insert(connection)
        }
    }
}

fn store_session(connection: &Connection, session: &Session, text: &str) -> rusqlite::Result<()> {
    let id = session.id.to_string();
    let container = &session.container.id;
    // Its own times cannot say when it was told: nobody may have seen its end.
    let now = Timestamp::now();
    let labels = store_labels(connection, &session.container)?;
    connection
        .prepare_cached(
            "INSERT INTO session (id, revision, namespace, container, state, started_at,
                 ended_at, changed_at, json, labels)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
             ON CONFLICT (id) DO UPDATE SET
                 revision = excluded.revision, state = excluded.state,
                 started_at = excluded.started_at, ended_at = excluded.ended_at,
                 changed_at = excluded.changed_at, json = excluded.json,
                 labels = excluded.labels",
        )?
        .execute(params![
            id,
            sql_integer(session.revision),
            container.namespace,
            container.id,
            session.state.name(),
            session.started_at.as_microsecond(),
            session.ended_at.map(Timestamp::as_microsecond),
            now.as_microsecond(),
            text,
            labels,
        ])?;
    connection
        .prepare_cached("DELETE FROM record WHERE type = 'session' AND session = ?1")?
        .execute([&id])?;
    Row { session: Some(&id), container: Some(container), ..Row::of("session", now) }
        .insert(connection)
}

/// Of a session that is not kept, commands are not kept either.
fn store_command(connection: &Connection, command: &Command) -> rusqlite::Result<()> {
    let text = serde_json::to_string(command).map_err(unwritable)?;
    connection
        .prepare_cached(
            "INSERT INTO command (session, number, namespace, container, started_at, json)
             SELECT id, ?2, namespace, container, ?3, ?4 FROM session WHERE id = ?1
             ON CONFLICT (session, number) DO UPDATE SET
                 started_at = excluded.started_at, json = excluded.json",
        )?
        .execute(params![
            command.session.to_string(),
            sql_integer(command.number),
            command.started_at.as_microsecond(),
            text,
        ])?;
    Ok(())
}

fn store_probe(connection: &Connection, probe: &Probe, text: &str) -> rusqlite::Result<()> {
    let container = &probe.container.id;
    let labels = store_labels(connection, &probe.container)?;
    connection
        .prepare_cached(
            "INSERT INTO probe (id, namespace, container, last_seen, json, labels)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (id) DO UPDATE SET last_seen = excluded.last_seen, json = excluded.json,
                 labels = excluded.labels",
        )?
        .execute(params![
            probe.id.to_string(),
            container.namespace,
            container.id,
            probe.last_seen.as_microsecond(),
            text,
            labels,
        ])?;
    Ok(())
}

fn store_member(
    connection: &Connection,
    finding: FindingId,
    change: &MemberChange,
) -> rusqlite::Result<()> {
    let finding = finding.to_string();
    match change {
        MemberChange::Seen(member) => connection
            .prepare_cached(
                "INSERT INTO member (finding, path, kind, blake3, first_seen, last_seen, removed)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (finding, path) DO UPDATE SET
                     kind = excluded.kind, blake3 = excluded.blake3,
                     last_seen = excluded.last_seen, removed = excluded.removed",
            )?
            .execute(params![
                finding,
                member.path.as_bytes(),
                member.kind.name(),
                member.blake3.map(|hash| hash.to_string()),
                member.first_seen.as_microsecond(),
                member.last_seen.as_microsecond(),
                member.removed,
            ])?,
        MemberChange::Gone { path, at } => {
            let is_over_disk = connection.db_name(2).is_ok_and(|name| name == "disk");
            if is_over_disk {
                connection
                    .prepare_cached(
                        "INSERT OR IGNORE INTO main.member
                         SELECT * FROM disk.member WHERE finding = ?1 AND path = ?2",
                    )?
                    .execute(params![finding, path.as_bytes()])?;
            }
            connection.prepare_cached(
                "UPDATE member SET removed = 1, last_seen = ?3 WHERE finding = ?1 AND path = ?2",
            )?
            .execute(params![finding, path.as_bytes(), at.as_microsecond()])?
        }
    };
    Ok(())
}

/// One row of the table `record`.
struct Row<'a> {
    at: Timestamp,
    kind: &'a str,
    finding: Option<&'a str>,
    session: Option<&'a str>,
    container: Option<&'a ContainerId>,
    json: Option<&'a str>,
}

impl<'a> Row<'a> {
    fn of(kind: &'a str, at: Timestamp) -> Row<'a> {
        Row { at, kind, finding: None, session: None, container: None, json: None }
    }

    fn insert(&self, connection: &Connection) -> rusqlite::Result<()> {
        connection
            .prepare_cached(
                "INSERT INTO record (at, type, finding, session, namespace, container, json)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
            )?
            .execute(params![
                self.at.as_microsecond(),
                self.kind,
                self.finding,
                self.session,
                self.container.map(|id| &id.namespace),
                self.container.map(|id| &id.id),
                self.json,
            ])?;
        Ok(())
    }
}

/// SQLite's integers are signed; no counter of ours gets that far.
pub(super) fn sql_integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Counts a record that is a new finding.
fn counted(record: Record, health: &Health) -> Record {
    if let Record::Finding(finding) | Record::Aggregate { finding, .. } = &record
        && finding.revision == 1
    {
        health.count_finding(finding.kind.name(), finding.severity.name());
    }
    record
}

/// The newest sequence number ever given, even if its record is gone.
pub(super) fn newest_seq(connection: &Connection) -> rusqlite::Result<u64> {
    let newest: Option<i64> = connection
        .prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'record'")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(newest.and_then(|seq| u64::try_from(seq).ok()).unwrap_or(0))
}

/// Forgets up to [`PRUNE_STEP`] records older than `retention`, with their findings
/// and sessions, and as many probes, and says how many of the one or of the other. A
/// session that is open stays.
fn prune_step(connection: &mut Connection, retention: Duration) -> rusqlite::Result<usize> {
    let now = Timestamp::now().as_microsecond();
    let cutoff = now.saturating_sub(i64::try_from(retention.as_micros()).unwrap_or(i64::MAX));
    let transaction = connection.transaction()?;
    let old: Vec<(i64, String, Option<String>, Option<String>)> = transaction
        .prepare_cached(
            "SELECT record.seq, record.type, record.finding, record.session FROM record
             LEFT JOIN session ON record.type = 'session' AND session.id = record.session
             WHERE record.at < ?1 AND (session.state IS NULL OR session.state = 'closed')
             ORDER BY record.at LIMIT ?2",
        )?
        .query_map(params![cutoff, PRUNE_STEP as i64], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        })?
        .collect::<rusqlite::Result<_>>()?;
    for (seq, kind, finding, session) in &old {
        match kind.as_str() {
            "finding" => forget_finding(&transaction, finding.as_deref())?,
            "session" => forget_session(&transaction, session.as_deref())?,
            _ => (),
        }
        transaction.prepare_cached("DELETE FROM record WHERE seq = ?1")?.execute([seq])?;
    }
    let probes = transaction
        .prepare_cached(
            "DELETE FROM probe WHERE id IN
                 (SELECT id FROM probe WHERE last_seen < ?1 ORDER BY last_seen LIMIT ?2)",
        )?
        .execute(params![cutoff, PRUNE_STEP as i64])?;
    if let Some(through) = old.iter().map(|(seq, ..)| seq).max() {
        transaction.execute("UPDATE pruned SET through = max(through, ?1)", [through])?;
    }
    if !old.is_empty() {
        forget_labels(&transaction)?;
    }
    transaction.commit()?;
    if !old.is_empty() || probes > 0 {
        give_back(connection)?;
    }
    Ok(old.len().max(probes))
}

/// Gives what is free in the file back to the disk.
fn give_back(connection: &Connection) -> rusqlite::Result<()> {
    // Steps through the result: each row frees one page.
    let mut vacuum = connection.prepare_cached("PRAGMA incremental_vacuum(4096)")?;
    let mut pages = vacuum.query([])?;
    while pages.next()?.is_some() {}
    Ok(())
}

fn forget_finding(connection: &Connection, id: Option<&str>) -> rusqlite::Result<()> {
    // While the finding is there it is known whose the files are.
    connection.prepare_cached("DELETE FROM member WHERE finding = ?1")?.execute([id])?;
    connection.prepare_cached("DELETE FROM finding WHERE id = ?1")?.execute([id])?;
    Ok(())
}

fn forget_session(connection: &Connection, id: Option<&str>) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM command WHERE session = ?1")?.execute([id])?;
    connection.prepare_cached("DELETE FROM session WHERE id = ?1")?.execute([id])?;
    Ok(())
}

/// Drops the record of a finding or a session, and hands back its number.
fn forget_record(connection: &Connection, what: &str, id: &str) -> rusqlite::Result<i64> {
    let seq: Option<i64> = connection
        .prepare_cached(&format!(
            "DELETE FROM record WHERE type = '{what}' AND {what} = ?1 RETURNING seq"
        ))?
        .query_row([id], |row| row.get(0))
        .optional()?;
    Ok(seq.unwrap_or_default())
}

/// Labels go with everything else of their container.
fn forget_labels(connection: &Connection) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM held WHERE bytes <= 0")?.execute([])?;
    connection
        .prepare_cached(
            "DELETE FROM labels WHERE NOT EXISTS
                 (SELECT 1 FROM held WHERE held.container = labels.container
                      AND held.namespace = labels.namespace)
             AND NOT EXISTS
                 (SELECT 1 FROM probe WHERE probe.container = labels.container
                      AND probe.namespace = labels.namespace)",
        )?
        .execute([])?;
    Ok(())
}

/// How many bytes of the file are in use.
fn bytes_of(connection: &Connection) -> rusqlite::Result<u64> {
    let pragma = |name: &str| -> rusqlite::Result<u64> {
        let value: i64 = connection
            .prepare_cached(&format!("PRAGMA {name}"))?
            .query_row([], |row| row.get(0))?;
        Ok(value.unsigned_abs())
    };
    let pages = pragma("page_count")?.saturating_sub(pragma("freelist_count")?);
    Ok(pages * pragma("page_size")?)
}

/// The sum of what all containers are counted to hold.
fn held(connection: &Connection) -> rusqlite::Result<u64> {
    let sum: i64 = connection
        .prepare_cached("SELECT coalesce(sum(bytes), 0) FROM held")?
        .query_row([], |row| row.get(0))?;
    Ok(sum.unsigned_abs())
}

/// The responses in a database, as text.
fn responses_in(connection: &Connection) -> Vec<String> {
    let query = connection.prepare("SELECT json FROM main.record WHERE type = 'response'");
    let responses = query.and_then(|mut query| query.query_map([], |row| row.get(0))?.collect());
    responses.unwrap_or_default()
}

/// Drops about `excess` bytes, and up to [`SHRINK_STEP`] rows, of the container that takes
/// the most, and says so once for each in `told`. Hands back the newest sequence number, or `None` if there is
/// nothing that may be dropped.
fn shrink_step(
    connection: &mut Connection,
    told: &mut HashSet<ContainerId>,
    excess: u64,
    max_bytes: u64,
) -> rusqlite::Result<Option<u64>> {
    let transaction = connection.transaction()?;
    // Rows are counted without what pages and indexes take, which is as much again.
    let (bytes, held) = (bytes_of(&transaction)?, held(&transaction)?);
    let excess = u64::try_from(u128::from(excess) * u128::from(held) / u128::from(bytes.max(1)))
        .unwrap_or(excess);
    let largest: Vec<(String, String)> = transaction
        .prepare_cached("SELECT namespace, container FROM held ORDER BY bytes DESC LIMIT ?1")?
        .query_map([SHRINK_FROM as i64], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    for (namespace, container) in largest {
        let (dropped, through) = shrink_container(&transaction, &namespace, &container, excess)?;
        if dropped == 0 {
            continue;
        }
        transaction.execute("UPDATE pruned SET through = max(through, ?1)", [through])?;
        forget_labels(&transaction)?;
        let container = ContainerId::new(&namespace, &container);
        if told.insert(container.clone()) {
            let gap = Record::Gap {
                name: Failure::HistoryFull.name().into(),
                container: Some(container).filter(|container| !container.id.is_empty()),
                detail: format!(
                    "the history is full: what is not severe and old is dropped \
                     (history.max_bytes is {max_bytes})"
                ),
                at: Timestamp::now(),
                until: None,
            };
            store(&transaction, &gap)?;
        }
        let newest = newest_seq(&transaction)?;
        transaction.commit()?;
        give_back(connection)?;
        return Ok(Some(newest));
    }
    Ok(None)
}

/// Drops the least severe rows of one container, of these the oldest: how many, and the
/// newest sequence number among them. Sessions that are over count as low. Of no
/// container are gaps and what was found in layers.
fn shrink_container(
    connection: &Connection,
    namespace: &str,
    container: &str,
    excess: u64,
) -> rusqlite::Result<(usize, i64)> {
    const LOW: i64 = Severity::Low as i64 + 1;
    let most = SHRINK_STEP as i64;
    let is_none = container.is_empty();
    if is_none {
        let gaps = "SELECT seq FROM record WHERE type = 'gap' ORDER BY at, seq LIMIT ?1";
        let through: Option<i64> = connection
            .prepare_cached(&format!("SELECT max(seq) FROM ({gaps})"))?
            .query_row([most], |row| row.get(0))?;
        let dropped = connection
            .prepare_cached(&format!("DELETE FROM record WHERE seq IN ({gaps})"))?
            .execute([most])?;
        if dropped > 0 {
            return Ok((dropped, through.unwrap_or_default()));
        }
    }
    let whose = if is_none {
        "container IS NULL AND ?2 = ?2 AND ?1 = ?1"
    } else {
        "container = ?1 AND namespace = ?2"
    };
    let findings: Vec<(String, i64, u64)> = connection
        .prepare_cached(&format!(
            "SELECT id, severity, octet_length(json) + 512 FROM finding WHERE {whose}
             ORDER BY severity, last_seen, id LIMIT ?3"
        ))?
        .query_map(params![container, namespace, most], |row| {
            Ok((row.get(0)?, row.get(1)?, row.get::<_, i64>(2)?.unsigned_abs()))
        })?
        .collect::<rusqlite::Result<_>>()?;
    let lowest = findings.first().map_or(i64::MAX, |(_, severity, _)| *severity);
    let mut freed = 0;
    let mut through = 0;
    let mut dropped = 0;
    if lowest > LOW && !is_none {
        let sessions: Vec<(String, u64)> = connection
            .prepare_cached(
                "SELECT id, octet_length(json) + 512 +
                     (SELECT coalesce(sum(octet_length(json) + 256), 0) FROM command
                      WHERE command.session = session.id)
                 FROM session WHERE container = ?1 AND namespace = ?2
                     AND state = 'closed' ORDER BY coalesce(ended_at, changed_at), id LIMIT ?3",
            )?
            .query_map(params![container, namespace, most / 8], |row| {
                Ok((row.get(0)?, row.get::<_, i64>(1)?.unsigned_abs()))
            })?
            .collect::<rusqlite::Result<_>>()?;
        for (id, bytes) in &sessions {
            if freed >= excess {
                break;
            }
            freed += bytes;
            forget_session(connection, Some(id))?;
            through = forget_record(connection, "session", id)?.max(through);
            dropped += 1;
        }
    }
    if dropped == 0 {
        for (id, _, bytes) in findings.iter().filter(|(_, severity, _)| *severity == lowest) {
            if freed >= excess {
                break;
            }
            freed += bytes;
            forget_finding(connection, Some(id))?;
            through = forget_record(connection, "finding", id)?.max(through);
            dropped += 1;
        }
    }
    Ok((dropped, through))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::finding::MEMBER_SCHEMA;
    use crate::model::{Finding, Kind, Member, Outcome, RootfsPath};
    use crate::respond::Response;

    fn finding(number: usize, revision: u64) -> Record {
        let mut finding: Finding =
            serde_json::from_str(include_str!("../../tests/data/finding.json")).unwrap();
        finding.id.0[..8].copy_from_slice(&(number as u64).to_be_bytes());
        finding.revision = revision;
        Record::Finding(Box::new(finding))
    }

    fn gap(detail: &str) -> Record {
        Record::Gap {
            name: "pipeline_full".into(),
            container: None,
            detail: detail.into(),
            at: Timestamp::UNIX_EPOCH,
            until: None,
        }
    }

    fn held(pending: &Pending) -> Vec<Record> {
        pending.records.iter().flatten().cloned().collect()
    }

    #[test]
    fn a_finding_that_waits_is_replaced_by_its_next_revision() {
        let mut pending = Pending::default();
        for record in [finding(1, 1), finding(2, 1), finding(1, 2), gap("x"), finding(1, 3)] {
            assert_eq!(pending.push(record), None);
        }
        assert_eq!(held(&pending), [finding(2, 1), gap("x"), finding(1, 3)]);
        assert_eq!(pending.len(), 3);
    }

    #[test]
    fn the_files_of_a_finding_that_is_replaced_stay() {
        let mut pending = Pending::default();
        let seen = |path: &str| {
            MemberChange::Seen(Member {
                schema: MEMBER_SCHEMA.into(),
                path: RootfsPath::new(path).unwrap(),
                kind: Kind::FileRelocated,
                blake3: None,
                first_seen: Timestamp::UNIX_EPOCH,
                last_seen: Timestamp::UNIX_EPOCH,
                removed: false,
            })
        };
        let aggregate = |revision, changes| match finding(1, revision) {
            Record::Finding(finding) => Record::Aggregate { finding, changes },
            other => panic!("{other:?}"),
        };
        assert_eq!(pending.push(aggregate(1, vec![seen("/a")])), None);
        assert_eq!(pending.push(aggregate(2, vec![seen("/b")])), None);
        assert_eq!(held(&pending), [finding(1, 2)]);
        assert_eq!(pending.members.len(), 2);
        let flood = (0..PENDING_MEMBERS).map(|number| seen(&format!("/{number}"))).collect();
        assert_eq!(pending.push(aggregate(3, flood)), Some(2), "what does not fit is counted");
        assert_eq!(pending.members.len(), PENDING_MEMBERS);
    }

    #[test]
    fn a_session_that_waits_is_replaced_and_its_commands_stay() {
        let mut pending = Pending::default();
        let sample: Session =
            serde_json::from_str(include_str!("../../tests/data/session.json")).unwrap();
        let command: Command =
            serde_json::from_str(include_str!("../../tests/data/command.json")).unwrap();
        let session = |revision, commands: usize| Record::Session {
            session: Box::new(Session { revision, ..sample.clone() }),
            commands: vec![command.clone(); commands],
        };
        let probe: Box<Probe> =
            serde_json::from_str(include_str!("../../tests/data/probe.json")).unwrap();
        // The finding that tells of a session may have the same ID.
        let mut finding = finding(1, 1);
        if let Record::Finding(finding) = &mut finding {
            finding.id.0 = sample.id.0;
        }
        let records = [session(1, 1), Record::Probe(probe.clone()), finding.clone(), session(2, 2)];
        for record in records {
            assert_eq!(pending.push(record), None);
        }
        assert_eq!(pending.push(Record::Probe(probe.clone())), None);
        assert_eq!(held(&pending), [finding, session(2, 0), Record::Probe(probe)]);
        assert_eq!(pending.commands.len(), 3);
        assert_eq!(pending.push(session(3, PENDING_COMMANDS)), Some(3), "what does not fit");
        assert_eq!(pending.commands.len(), PENDING_COMMANDS);
    }

    #[test]
    fn h17_a_full_memory_drops_no_response() {
        let response = |number: i64| {
            Record::Response(Box::new(Response {
                ticket: 0,
                container: ContainerId::new("default", "web"),
                incarnation: None,
                reason: format!("number {number}"),
                requested_by: "uid 0".into(),
                requested_at: Timestamp::from_second(number).unwrap(),
                finding: None,
                outcome: Outcome {
                    action: "kill".into(),
                    succeeded: true,
                    gone: false,
                    message: "killed".into(),
                    restarter: None,
                    at: Timestamp::from_second(number).unwrap(),
                },
            }))
        };
        let mut pending = Pending::default();
        assert_eq!(pending.push(response(1)), None);
        let flood = PENDING + 500;
        for number in 0..flood {
            pending.push(finding(number, 1));
            pending.push(gap("x"));
        }
        for number in 2..=50 {
            assert_eq!(pending.push(response(number)), None, "there is always room for it");
        }
        let kept: Vec<Record> = pending.responses().cloned().collect();
        assert_eq!(kept, (1..=50).map(response).collect::<Vec<_>>());
        assert_eq!(pending.len(), PENDING + 50);
        // In their place among what is left.
        assert_eq!(held(&pending).first(), Some(&response(1)));
        let mut connection = Connection::open_in_memory().unwrap();
        super::super::schema::prepare(&mut connection, std::path::Path::new("memory")).unwrap();
        pending.write(&mut connection).unwrap();
        let count = "SELECT count(*) FROM record WHERE type = 'response'";
        let written: i64 = connection.query_row(count, [], |row| row.get(0)).unwrap();
        assert_eq!(written, 50, "kept until it can be written");
    }

    #[test]
    fn a_full_memory_drops_gaps_first_then_the_oldest() {
        let mut pending = Pending::default();
        pending.push(finding(0, 1));
        pending.push(gap("x"));
        for number in 1..PENDING - 1 {
            assert_eq!(pending.push(finding(number, 1)), None);
        }
        assert_eq!(pending.push(finding(PENDING, 1)), Some(1));
        assert_eq!(pending.push(finding(PENDING + 1, 1)), Some(2));
        // Known already: nothing more is held.
        assert_eq!(pending.push(finding(PENDING + 1, 2)), None);
        let held = held(&pending);
        assert_eq!(held.len(), PENDING);
        assert_eq!(held.first(), Some(&finding(1, 1)), "the gap went first, then the oldest");
        assert_eq!(held.last(), Some(&finding(PENDING + 1, 2)));
    }

    #[test]
    fn a_finding_revised_for_ever_behind_one_that_stays_takes_no_memory() {
        let mut pending = Pending::default();
        pending.push(gap("stays"));
        for revision in 0..5 * PENDING as u64 {
            pending.push(finding(1, revision));
        }
        assert_eq!(held(&pending), [gap("stays"), finding(1, 5 * PENDING as u64 - 1)]);
        assert!(pending.records.len() <= 2 * PENDING + 1, "{}", pending.records.len());
    }
}
