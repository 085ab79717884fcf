//! Facts, as they happen: the gate, the change feed, scans.
//!
//! Plain threads, because disks and the kernel block:
//!
//! ```text
//! Command ─> control ── marks ──> kernel
//!     mounts <───┤                  │ exec?                     │ closed after writing
//!                │                  v                           v
//!                │                gate ─> describe ─> content   feed
//!                │                  └───> processes           │ dirty paths
//!                └──── orders ────> scan <────────────────────┤
//!                                    │ └── everyone's Report  │ dirty paths
//!                                    └── marks ──> kernel ─> names
//!
//! kernel ── rings ──> trace ── what the gate was not asked about ──> unseen
//! ```
//!
//! Nobody here waits for the pipeline but the scan thread; the others count what
//! does not fit and ask for a walk of the container ([`Report::Lost`]).

mod acts;
mod arguments;
mod arm;
mod attachments;
mod calls;
mod code;
mod content;
mod control;
mod copyup;
mod crowd;
mod feed;
mod files;
mod gate;
mod interpreters;
mod libraries;
mod lower;
mod mounts;
mod names;
mod packages;
mod process;
mod processes;
mod roots;
mod scan;
mod scripts;
mod sessions;
mod shared;
mod shells;
mod state;
mod table;
mod terminals;
mod trace;
mod trial;
mod trust;
mod unseen;
mod writers;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use jiff::Timestamp;

pub use self::arm::Scope;
pub use self::trace::Executions;
pub use self::trial::{Distrust, try_free_gate};
pub use self::trust::{Trust, Verdict};

use self::copyup::{CopyUps, Free};
use self::gate::{Heart, Pulse};
use self::shared::{LAST_WORDS, Shared};
use self::trace::{Recorder, Trace, TraceConsumer};
use crate::config;
use crate::health::{Failure, Health};
use crate::model::{ContainerId, LayerFile, Observation, OverlayDirs, RootfsPath};
use crate::sys::fanotify::{self, Group, Queue};
use crate::sys::mounts::Notifier;
use crate::threads::{self, Depth, Event, Left, Role};

/// What the pipeline asks of the watchers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Mark the overlay of the container whose init is `pid`, then scan it.
    /// Asking again for the same container and pid only fills in `rootfs`.
    Attach { container: ContainerId, pid: u32, rootfs: Option<OverlayDirs> },
    /// The init process has ended: scan the upperdir a last time, then forget
    /// the container. With a pid, only if that was its init: the container may run
    /// anew by the time that this is read.
    Detach { container: ContainerId, pid: Option<u32> },
    /// Walk the upperdir now. With a ticket, the batches and the end of this
    /// scan carry it.
    Scan { container: ContainerId, ticket: Option<u64> },
    /// From now on, this is how far the files of the image's layers are trusted.
    /// What was judged before counts no more.
    Trust { container: ContainerId, trust: Trust },
    /// These files of the image start the container: what they hold matters, even
    /// where it is no program.
    EntryPoint { container: ContainerId, paths: Vec<RootfsPath> },
    /// Its init may have a terminal. This FIFO leads there, where that is known; with
    /// `is_handed_on`, its manager holds it open for whoever attaches.
    Terminal { container: ContainerId, input: Option<PathBuf>, is_handed_on: bool },
    /// How an executed file of the image's layers was judged.
    Judged { container: ContainerId, file: LayerFile, verdict: Verdict },
}

/// What the watchers tell the pipeline.
#[derive(Debug, Clone)]
#[expect(clippy::large_enum_variant, reason = "nearly every report is an observation")]
pub enum Report {
    Attached {
        container: ContainerId,
        /// The gate was in place before the entry point ran.
        before_start: bool,
    },
    /// The container cannot be watched, or not any more.
    NotAttached {
        container: ContainerId,
        reason: String,
    },
    Observed(Observation),
    /// Some of what a scan found; a scan reports every entry of the upperdir
    /// that is not a plain directory.
    ScanBatch {
        container: ContainerId,
        ticket: Option<u64>,
        observations: Vec<Observation>,
    },
    /// The scan is over.
    Scanned {
        container: ContainerId,
        ticket: Option<u64>,
        began: Timestamp,
        /// Whether the whole upperdir was walked.
        complete: bool,
    },
    /// What was said to be seen no more, and what no walk makes up for, is seen again.
    Over {
        failure: Failure,
        container: Option<ContainerId>,
    },
    /// Something was not seen. `container` is `None` when it may be any of them.
    /// The watchers have already asked themselves for the rescan.
    Lost {
        failure: Failure,
        container: Option<ContainerId>,
        detail: String,
        at: Timestamp,
    },
}

/// Why the watchers cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Fanotify(#[from] fanotify::Error),
    #[error("cannot prepare for being asked before a container's runtime runs: {0}")]
    Arming(#[source] io::Error),
    #[error("cannot make an event descriptor: {0}")]
    Wake(#[source] io::Error),
    #[error("cannot start the thread `{name}`: {source}")]
    Thread { name: &'static str, source: io::Error },
}

/// How many executed files may wait to be described, and then to be hashed.
const CONTENT_QUEUE: usize = 1024;
const LARGE_QUEUE: usize = 64;
const PROCESS_QUEUE: usize = 8 * 1024;
const COMMAND_QUEUE: usize = 1024;
const ORDER_QUEUE: usize = 4 * 1024;
const LIBRARY_QUEUE: usize = 16 * 1024;
const INTERPRETER_QUEUE: usize = 4 * 1024;

/// Descriptors for everything but the content queue: what one read of each group
/// brings, a walk's directories, and the rest of the daemon.
const OTHER_DESCRIPTORS: u64 = 2048;

/// The watchers' threads.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Shared>,
    marker: Arc<control::Marker>,
    commands: Sender<Command>,
    copy_ups_held: Arc<AtomicBool>,
    /// The gates whose marks are taken away first when the watchers stop.
    gates: Vec<Arc<Group>>,
    threads: Vec<&'static str>,
    executions: Executions,
}

impl std::fmt::Debug for control::Marker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Marker")
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

impl Watch {
    /// Starts watching, of nothing yet. The gate writes a byte to `heartbeat`, the
    /// non-blocking end of a pipe, at least every quarter of a second.
    pub fn start(
        settings: &config::Watch,
        reports: Sender<Box<Report>>,
        health: Arc<Health>,
        heartbeat: Option<OwnedFd>,
    ) -> Result<Watch, Error> {
        let notifier = if settings.volumes { Notifier::new() } else { Notifier::polling() };
        Watch::start_with(settings, reports, health, heartbeat, notifier)
    }

    /// The same, told of new mounts by `notifier`.
    pub fn start_with(
        settings: &config::Watch,
        reports: Sender<Box<Report>>,
        health: Arc<Health>,
        heartbeat: Option<OwnedFd>,
        notifier: Notifier,
    ) -> Result<Watch, Error> {
        fanotify::probe()?;
        let gate = Arc::new(match settings.gate {
            config::Gate::Ask | config::Gate::Free => Group::exec_gate()?,
            config::Gate::Notify => Group::exec_feed()?,
        });
        let free = match settings.gate {
            config::Gate::Free => Some(Arc::new(Free::new()?)),
            config::Gate::Ask | config::Gate::Notify => None,
        };
        let queue = if settings.bounded_queue { Queue::Bounded } else { Queue::Unlimited };
        let feed = Arc::new(Group::feed(queue)?);
        let (wake_scan, wake) = bounded(1);
        let (acts, receive_acts) = bounded(COMMAND_QUEUE);
        let shared = Shared::new(settings.clone(), reports, health, wake_scan, acts);
        let shared = Arc::new(shared.map_err(Error::Wake)?);
        let (commands, receive_commands) = bounded(COMMAND_QUEUE);
        let (orders, receive_orders) = bounded(ORDER_QUEUE);
        let content_queue = content_queue();
        let (content, receive_content) = bounded(content_queue);
        let (described, receive_described) = bounded(content_queue);
        let (processes, receive_processes) = bounded(PROCESS_QUEUE);

        let mounts = Arc::new(mounts::Mounts::new(shared.clone(), gate.clone(), notifier)?);
        let marker = Arc::new(control::Marker {
            shared: shared.clone(),
            gate: gate.clone(),
            free: free.clone(),
            feed: feed.clone(),
            mounts: mounts.clone(),
            orders: orders.clone(),
            turn: Mutex::default(),
        });
        let (unseen, receive_unseen) = bounded(PROCESS_QUEUE);
        let (recorder, executions) = Recorder::open();
        match &executions {
            Executions::Recorded => shared.set_records_executions(),
            Executions::Announced { why } => tracing::warn!(
                why,
                "executions outside of marked filesystems are seen only if they last"
            ),
            Executions::Unseen { why } => {
                tracing::warn!(why, "executions outside of marked filesystems are not seen");
            }
        }

        let mut watch = Watch {
            shared: shared.clone(),
            marker: marker.clone(),
            commands,
            copy_ups_held: Arc::default(),
            gates: vec![gate.clone()],
            threads: Vec::new(),
            executions,
        };
        let shards = free.iter().flat_map(|free| &free.shards);
        watch.gates.extend(shards.map(|shard| shard.gate.clone()));
        let scan_orders_depth = threads::depth_of(&receive_orders);
        let scan = scan::Scan::new(shared.clone(), receive_orders, wake);
        let depth = scan_orders_depth;
        watch.spawn("scan", Role::Owner, Some(depth), || scan.run())?;
        let ours = shared.clone();
        let (large, receive_large) = bounded(LARGE_QUEUE);
        watch.consume("content", receive_described, move |queue| {
            content::hash(&ours, queue, &large);
        })?;
        let ours = shared.clone();
        watch.consume("large", receive_large, move |queue| content::hash_large(&ours, queue))?;
        let ours = shared.clone();
        watch.consume("describe", receive_content, move |queue| {
            content::describe(&ours, queue, &described);
        })?;
        let ours = shared.clone();
        watch.consume("processes", receive_processes, move |queue| {
            processes::run(&ours, queue);
        })?;
        let (loadings, receive_loadings) = bounded(LIBRARY_QUEUE);
        let ours = shared.clone();
        watch.consume("libraries", receive_loadings, move |queue| libraries::run(&ours, queue))?;
        let (started, receive_started) = bounded(INTERPRETER_QUEUE);
        let (ours, waiting) = (shared.clone(), interpreters::Waiting::default());
        watch.consume("interpreters", receive_started, move |queue| {
            interpreters::run(&ours, queue, &waiting);
        })?;
        let ours = shared.clone();
        watch.spawn("names", Role::Owner, None, move || ours.names.run(&ours))?;
        let ours = shared.clone();
        watch.spawn("attachments", Role::Owner, None, move || ours.attachments.run(&ours))?;
        let ours = shared.clone();
        watch.spawn("terminals", Role::Owner, None, move || ours.terminals.run(&ours))?;
        let mut pulse = Pulse::default();
        let mut more_gates = Vec::new();
        let mut copy_ups = None;
        if let Some(free) = &free {
            for shard in &free.shards {
                more_gates.push(gate::Gate {
                    group: shard.gate.clone(),
                    shard: Some(shard.clone()),
                    shared: shared.clone(),
                    content: content.clone(),
                    crowd: RefCell::default(),
                    processes: processes.clone(),
                    turns: pulse.of_another(),
                    heart: None,
                });
            }
            let (shared, held) = (shared.clone(), watch.copy_ups_held.clone());
            copy_ups = Some(CopyUps::new(free.clone(), shared, pulse.of_another(), held));
        }
        let ours = shared.clone();
        let depth = threads::depth_of(&receive_acts);
        watch.spawn("sessions", Role::Owner, Some(depth), move || {
            acts::run(&ours, &receive_acts);
        })?;
        let ours = shared.clone();
        watch.consume("unseen", receive_unseen, move |queue| unseen::run(&ours, queue))?;
        if let Some(Recorder::Rings(rings)) = &recorder
            && rings.tell_arguments()
        {
            shared.set_records_arguments();
        }
        if let Some(recorder) = recorder {
            // What else is made of the records.
            let consumers: Vec<Box<dyn TraceConsumer>> = vec![
                Box::new(libraries::Tracing::new(loadings, started)),
                Box::new(packages::Descent::new(processes.clone())),
                Box::new(processes::Entries::new(processes.clone())),
                Box::new(acts::Acts::default()),
            ];
            let trace = Trace::new(shared.clone(), unseen, content_queue, consumers);
            watch.spawn("trace", Role::Owner, None, || trace.run(recorder))?;
        }
        let thread = gate::Gate {
            group: gate.clone(),
            shard: None,
            shared: shared.clone(),
            content,
            crowd: RefCell::default(),
            processes,
            turns: pulse.of_another(),
            heart: Some(Heart { pulse, heartbeat }),
        };
        watch.spawn("gate", Role::Unsupervised, None, || thread.run())?;
        for thread in more_gates {
            watch.spawn("gate", Role::Unsupervised, None, || thread.run())?;
        }
        if let Some(thread) = copy_ups {
            watch.spawn("copy-ups", Role::Unsupervised, None, || thread.run())?;
        }
        let thread =
            feed::Feed { group: feed.clone(), shared: shared.clone(), in_image: HashMap::new() };
        watch.spawn("feed", Role::Owner, None, || thread.run())?;
        watch.spawn("mounts", Role::Owner, None, move || mounts.run())?;
        let supervised = shared.clone();
        watch.spawn("heart", Role::Unsupervised, None, move || supervise(&supervised))?;
        let depth = threads::depth_of(&receive_commands);
        let thread = control::Control {
            shared,
            marker,
            orders,
            commands: receive_commands,
            unsent: VecDeque::new(),
        };
        watch.spawn("control", Role::Owner, Some(depth), || thread.run())?;
        Ok(watch)
    }

    /// From now on, containers are armed before their runtime starts them: what
    /// `watch.arm = "strict"` means.
    pub fn arm_before_start(&mut self, scope: &Scope) -> Result<(), Error> {
        let (calls, receive_calls) = bounded(arm::QUEUE);
        let (done, receive_done) = bounded(2 * arm::QUEUE);
        let wake = arm::waker()?;
        let thread = arm::Arming {
            shared: self.shared.clone(),
            marker: self.marker.clone(),
            scope: scope.clone(),
            calls: receive_calls,
            done,
            wake: wake.clone(),
        };
        self.spawn("arming", Role::Unsupervised, None, || thread.run())?;
        let thread = arm::Arm::new(self.shared.clone(), scope, calls, receive_done, wake)?;
        self.spawn("arm", Role::Unsupervised, None, || thread.run())
    }

    /// On an error, what was started ends by itself when `self` is dropped.
    fn spawn(
        &mut self,
        name: &'static str,
        role: Role,
        depth: Option<Depth>,
        run: impl FnOnce() + Send + 'static,
    ) -> Result<(), Error> {
        let threads = &self.shared.health.threads;
        threads.spawn(name, role, depth, run).map_err(|source| Error::Thread { name, source })?;
        self.threads.push(name);
        Ok(())
    }

    /// The same for a thread that does nothing but take items from a queue.
    fn consume<T: Send + 'static>(
        &mut self,
        name: &'static str,
        queue: Receiver<T>,
        run: impl Fn(&Receiver<T>) + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let threads = &self.shared.health.threads;
        let depth = threads::depth_of(&queue);
        let started = threads.spawn_consumer(name, depth, move || run(&queue));
        started.map_err(|source| Error::Thread { name, source })?;
        self.threads.push(name);
        Ok(())
    }

    /// What is seen of executions besides what the gate sees.
    pub fn executions(&self) -> &Executions {
        &self.executions
    }

    pub fn commands(&self) -> Sender<Command> {
        self.commands.clone()
    }

    /// While this is set, copy-ups wait, as if their thread had been stopped. For
    /// tests only.
    #[doc(hidden)]
    pub fn copy_ups_held(&self) -> Arc<AtomicBool> {
        self.copy_ups_held.clone()
    }

    /// Closes the gate: from here on no exec waits for driftd. Its threads still answer
    /// what waits already.
    pub fn close_gate(&self, deadline: Instant) {
        self.shared.close_marks();
        for gate in &self.gates {
            if let Err(err) = gate.unmark_everything() {
                tracing::warn!("the gate keeps its marks until it is closed: {err}");
            }
        }
        // Whoever was asked for between the last mark and its end is answered by now.
        let mut quiet_turns = 0;
        while quiet_turns < 4 && Instant::now() < deadline {
            let is_quiet = self.gates.iter().all(|gate| !gate.has_events());
            quiet_turns = if is_quiet { quiet_turns + 1 } else { 0 };
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the threads: what they have seen is told before, as far as there is time.
    pub fn drain(&self, deadline: Instant) {
        self.shared.health.threads.begin_end(&self.threads);
        self.shared.stop();
        let running = self.shared.health.threads.wait_for_end(&self.threads, deadline);
        if !running.is_empty() {
            tracing::warn!(threads = running.join(", "), "threads that are stuck are left behind");
        }
    }

    /// What the threads had no time to tell.
    pub fn left(&self) -> Vec<Left> {
        let mut left = self.shared.health.threads.left(&self.threads);
        let untold = self.shared.untold();
        let more = [
            ("items taken and not told", untold),
            ("changed files, which the next start looks at", self.shared.unsettled()),
        ];
        left.extend(
            more.into_iter()
                .filter_map(|(what, count)| (count > 0).then_some(Left { what, count })),
        );
        left
    }

    /// Ends everything: the gate first, so that the kernel allows every exec that waits.
    pub fn stop(self) {
        self.close_gate(Instant::now() + CLOSED_WITHIN);
        self.drain(Instant::now() + LAST_WORDS + Duration::from_secs(1));
    }
}

/// How long the gate may take to be closed.
const CLOSED_WITHIN: Duration = Duration::from_millis(500);

/// Looks after all of the daemon's threads, until the watchers stop.
fn supervise(shared: &Shared) {
    let mut last = Instant::now();
    while !shared.is_stopping() {
        shared.wait_for_stop(threads::TURN);
        let elapsed = last.elapsed();
        last = Instant::now();
        for event in shared.health.threads.supervise(elapsed) {
            match event {
                Event::Stuck { name, still, is_replaced, about } => {
                    let whose = about.map_or(String::new(), |id| {
                        format!(", busy with something of container {id}")
                    });
                    let then = if is_replaced {
                        "another one has taken its place"
                    } else {
                        "driftd ends if this lasts"
                    };
                    let seconds = still.as_secs();
                    let detail = format!(
                        "the thread `{name}` has made no progress for {seconds} s{whose}: {then}"
                    );
                    shared.degrade(Failure::ThreadStuck, None, &detail);
                }
                Event::Recovered => {
                    tracing::info!("every thread makes progress again");
                    shared.restore(Failure::ThreadStuck, None);
                }
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.health.threads.begin_end(&self.threads);
        self.shared.stop();
        // What nobody takes any more is not kept open either.
        self.shared.health.threads.forget(&self.threads);
    }
}

/// How many executed files may wait, given the descriptors that we may open.
fn content_queue() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // The soft limit is for programs that use select(2).
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let allowed = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // With a process's handle while that is described, then without; and the same
    // for what only the trace has seen.
    let affordable = allowed.saturating_sub(OTHER_DESCRIPTORS) / 5;
    usize::try_from(affordable).unwrap_or(usize::MAX).clamp(16, CONTENT_QUEUE)
}
