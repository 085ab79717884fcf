//! Facts, as they happen: the gate, the change feed, scans.
//!
//! Plain threads, because disks and the kernel block:
//!
//! ```text
//! SensorCommand ─> control ── marks ──> gate's process, kernel
//!     mounts <───────┤                  │ executed                  │ closed after writing
//!                    │                  v                           v
//!                    │        gate ─> take ─> describe ─> content   feed
//!                    │                  └───> processes             │ dirty paths
//!                    └──── requests ────> scan <────────────────────┤
//!                                          │ └── every SensorEvent  │ dirty paths
//!                                          └── marks ──> kernel ─> names
//!
//! kernel ── rings ──> trace ── what the gate was not asked about ──> unseen
//! ```
//!
//! Nobody here waits for the pipeline but the scan thread; the others count what
//! does not fit and ask for a walk of the container ([`SensorEvent::Lost`]).

mod code;
mod control;
mod core;
mod exec;
mod files;
mod mounts;
mod process;
mod sessions;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

pub use self::control::arm::Scope;
pub use self::core::message::{Error, SensorCommand, SensorEvent};
pub use self::core::trust::{Trust, Verdict};
pub use self::exec::recorder::Executions;
pub use self::exec::trial::{Distrust, try_free_gate};

use self::code::libraries::Loading;
use self::code::started::Started;
use self::code::{interpreters, libraries};
use self::control::marker::Marker;
use self::control::{arm, commands};
use self::core::copyup::Free;
use self::core::fair;
use self::core::shared::{Core, LAST_WORDS};
use self::exec::described::Described;
use self::exec::gate::Arrivals;
use self::exec::recorder::Recorder;
use self::exec::shared::Exec;
use self::exec::take::{Entrance, Take, Taken};
use self::exec::trace::Trace;
use self::exec::unseen::Unseen;
use self::exec::{content, gate, processes, take, unseen};
use self::files::shared::Files;
use self::files::{changes, feed, packages, scan};
use self::mounts::marking;
use self::mounts::marks::ExecMarks;
use self::process::activity::Act;
use self::process::records::TraceConsumer;
use self::process::seen::Seen;
use self::process::shared::Processes;
use self::sessions::shared::Sessions;
use self::sessions::{acts, attachments};
use crate::config;
use crate::gate::{Events, Gate, Marks, Stopper};
use crate::health::{Backlogs, Failure, Health};
use crate::model::ContainerId;
use crate::pulse::Pulse;
use crate::sys::fanotify::{self, Group, Queue};
use crate::sys::mounts::Notifier;
use crate::threads::{self, Depth, Event, Left, Role};

/// What of [`Watch::left`] is not lost.
pub const LEFT_TO_THE_START: &str = "changed files, which the next start looks at";

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
    shared: Arc<Exec>,
    marker: Arc<Marker>,
    commands: Sender<SensorCommand>,
    threads: Vec<&'static str>,
    executions: Executions,
    gate: std::process::Child,
    stopper: Stopper,
    /// Until a thread takes the calls of runtimes, the gate holds none.
    calls: Option<Receiver<gate::Call>>,
    gate_turns: Arc<AtomicU64>,
}

impl std::fmt::Debug for Marker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Marker")
    }
}

impl std::fmt::Debug for Exec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Exec")
    }
}

impl Watch {
    /// Starts watching, of nothing yet. `gate` was started with [`shards`].
    pub fn start(
        settings: &config::Watch,
        reports: Sender<Box<SensorEvent>>,
        health: Arc<Health>,
        gate: Gate,
    ) -> Result<Watch, Error> {
        let notifier = if settings.volumes { Notifier::new() } else { Notifier::polling() };
        Watch::start_with(settings, reports, health, gate, notifier)
    }

    /// The same, notified of new mounts by `notifier`.
    pub fn start_with(
        settings: &config::Watch,
        reports: Sender<Box<SensorEvent>>,
        health: Arc<Health>,
        gate: Gate,
        notifier: Notifier,
    ) -> Result<Watch, Error> {
        fanotify::probe()?;
        let Gate { child, marks: gate_marks, events, pulse } = gate;
        let _ = health.pulse.set(pulse.clone());
        let (marks, exec_feed) = exec_marks(settings.gate, &gate_marks)?;
        let free = (settings.gate == config::Gate::Free)
            .then(|| Arc::new(Free::new(gate_marks.clone(), shards(settings.gate))));
        let queue = if settings.bounded_queue { Queue::Bounded } else { Queue::Unlimited };
        let feed = Arc::new(Group::feed(queue)?);
        let (wake_scan, wake) = bounded(1);
        let (acts, receive_acts) = bounded(COMMAND_QUEUE);
        let core = Core::new(settings.clone(), reports, health, wake_scan);
        let processes = Processes::new(Arc::new(core.map_err(Error::Wake)?), acts);
        let files = Arc::new(Files::new(Arc::new(processes)));
        let shared = Arc::new(Exec::new(Arc::new(Sessions::new(files.clone()))));
        let (commands, receive_commands) = bounded(COMMAND_QUEUE);
        let (orders, receive_orders) = bounded(ORDER_QUEUE);
        let queues = Queues::new(files.clone());

        let mounts =
            Arc::new(marking::Mounts::new(files.processes.clone(), marks.clone(), notifier)?);
        let marker = Arc::new(Marker {
            shared: files.clone(),
            marks,
            free,
            feed: feed.clone(),
            mounts: mounts.clone(),
            orders: orders.clone(),
            turn: Mutex::default(),
        });
        let (recorder, executions) = Recorder::open();
        note_executions(&shared, &executions);

        let (calls, receive_calls) = bounded(arm::QUEUE);
        let mut watch = Watch {
            shared: shared.clone(),
            marker: marker.clone(),
            commands,
            threads: Vec::new(),
            executions,
            gate: child,
            stopper: gate_marks.stopper(),
            calls: Some(receive_calls),
            gate_turns: Arc::default(),
        };
        shared.set_stages(queues.stages());
        let asked = Arc::downgrade(&files);
        let backlogs = move || asked.upgrade().map(|files| files.backlogs()).unwrap_or_default();
        let _ = shared.health.backlogs.set(Backlogs(Box::new(backlogs)));
        let depth = threads::depth_of(&receive_orders);
        let scan = scan::Scan::new(files.clone(), receive_orders, wake);
        watch.spawn("scan", Role::Owner, Some(depth), || scan.run())?;
        watch.start_consumers(&queues)?;
        watch.start_listeners(receive_acts)?;
        watch.start_trace(&queues, recorder)?;
        watch.start_gate(&queues, &gate_marks, &pulse, (events, calls), exec_feed)?;
        drop(queues);
        let thread = feed::Feed { group: feed, shared: files, in_image: HashMap::new() };
        watch.spawn("feed", Role::Owner, None, || thread.run())?;
        watch.spawn("mounts", Role::Owner, None, move || mounts.run())?;
        let supervised = shared.clone();
        watch.spawn("supervisor", Role::Unsupervised, None, move || supervise(&supervised))?;
        let depth = threads::depth_of(&receive_commands);
        let thread = commands::Control {
            shared: shared.sessions.clone(),
            marker,
            orders,
            commands: receive_commands,
            unsent: VecDeque::new(),
        };
        watch.spawn("control", Role::Owner, Some(depth), || thread.run())?;
        Ok(watch)
    }

    /// The threads that do nothing but take items from queues.
    fn start_consumers(&mut self, queues: &Queues) -> Result<(), Error> {
        let (ours, large) = (self.shared.clone(), queues.large.0.clone());
        self.consume("content", queues.described.1.clone(), move |queue| {
            content::hash(&ours, queue, &large);
        })?;
        let ours = self.shared.clone();
        self.consume("large", queues.large.1.clone(), move |queue| {
            content::hash_large(&ours, queue);
        })?;
        let (ours, described) = (self.shared.clone(), queues.described.0.clone());
        self.consume("describe", queues.taken.clone(), move |queue| {
            content::describe(&ours, queue, &described);
        })?;
        let take = queues.take.again();
        self.consume("take", take.arrived(), move |_| take.again().run())?;
        let ours = self.shared.clone();
        self.consume("processes", queues.processes.1.clone(), move |queue| {
            processes::run(&ours, queue);
        })?;
        let ours = self.shared.clone();
        self.consume("libraries", queues.loadings.1.clone(), move |queue| {
            libraries::run(&ours, queue);
        })?;
        let (ours, waiting) = (self.shared.clone(), interpreters::Waiting::default());
        self.consume("interpreters", queues.started.1.clone(), move |queue| {
            interpreters::run(&ours, queue, &waiting);
        })
    }

    /// The threads that listen to the kernel for files and sessions.
    fn start_listeners(&mut self, acts: Receiver<Box<Act>>) -> Result<(), Error> {
        let ours = self.shared.clone();
        self.spawn("names", Role::Owner, None, move || changes::run(&ours))?;
        let ours = self.shared.clone();
        self.spawn("attachments", Role::Owner, None, move || attachments::run(&ours))?;
        let ours = self.shared.clone();
        self.spawn("closings", Role::Owner, None, move || ours.closings.run(&ours))?;
        let ours = self.shared.clone();
        self.spawn("terminals", Role::Owner, None, move || ours.terminals.run(&ours))?;
        let ours = self.shared.clone();
        let depth = threads::depth_of(&acts);
        self.spawn("sessions", Role::Owner, Some(depth), move || acts::run(&ours, &acts))
    }

    /// The threads of what only the kernel records.
    fn start_trace(&mut self, queues: &Queues, recorder: Option<Recorder>) -> Result<(), Error> {
        let ours = self.shared.clone();
        self.consume("unseen", queues.unseen.1.clone(), move |queue| unseen::run(&ours, queue))?;
        if let Some(Recorder::Rings(rings)) = &recorder
            && rings.has_arguments()
        {
            self.shared.set_records_arguments();
        }
        let Some(recorder) = recorder else { return Ok(()) };
        let processes = &queues.processes.0;
        // What else is made of the records.
        let consumers: Vec<Box<dyn TraceConsumer>> = vec![
            Box::new(libraries::Tracing::new(queues.loadings.0.clone(), queues.started.0.clone())),
            Box::new(packages::Descent::new(processes.clone())),
            Box::new(processes::Entries::new(processes.clone())),
            Box::new(acts::Acts::default()),
        ];
        let (unseen, proven) = (queues.unseen.0.clone(), queues.described.0.clone());
        let trace = Trace::new(self.shared.clone(), unseen, proven, queues.limit, consumers);
        self.spawn("trace", Role::Owner, None, || trace.run(recorder))
    }

    /// The threads of what the gate hands on.
    fn start_gate(
        &mut self,
        queues: &Queues,
        marks: &Marks,
        pulse: &Arc<Pulse>,
        (events, calls): (Events, Sender<gate::Call>),
        exec_feed: Option<Arc<Group>>,
    ) -> Result<(), Error> {
        let shared = self.shared.clone();
        let arrivals = || Arrivals {
            shared: shared.clone(),
            marks: marks.clone(),
            pulse: pulse.clone(),
            content: queues.content.clone(),
            crowd: RefCell::default(),
            processes: queues.processes.0.clone(),
        };
        let thread = gate::Gate {
            arrivals: arrivals(),
            events,
            calls,
            turns: self.gate_turns.clone(),
            losses: gate::Losses::default(),
        };
        self.spawn("gate", Role::Owner, None, || thread.run())?;
        if let Some(group) = exec_feed {
            let thread = gate::Feed { arrivals: arrivals(), group };
            self.spawn("executions", Role::Owner, None, || thread.run())?;
        }
        Ok(())
    }

    /// From now on, containers are armed before their runtime starts them: what
    /// `watch.arm = "strict"` means.
    pub fn arm_before_start(&mut self, scope: &Scope) -> Result<(), Error> {
        let Some(calls) = self.calls.take() else { return Ok(()) };
        let (core, marker) = (self.shared.core.clone(), self.marker.clone());
        let depth = threads::depth_of(&calls);
        let thread = arm::Arming::new(core, marker, self.stopper.marks(), scope, calls)?;
        self.spawn("arming", Role::Owner, Some(depth), || thread.run())
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
    fn consume<T: fair::Owned + Send + 'static>(
        &mut self,
        name: &'static str,
        queue: fair::Receiver<T>,
        run: impl Fn(&fair::Receiver<T>) + Send + Sync + 'static,
    ) -> Result<(), Error> {
        let threads = &self.shared.health.threads;
        let depth = queue.depth();
        let started = threads.spawn_consumer(name, depth, move || run(&queue));
        started.map_err(|source| Error::Thread { name, source })?;
        self.threads.push(name);
        Ok(())
    }

    /// What is seen of executions besides what the gate sees.
    pub fn executions(&self) -> &Executions {
        &self.executions
    }

    pub fn commands(&self) -> Sender<SensorCommand> {
        self.commands.clone()
    }

    /// The process of the gate.
    pub fn gate(&self) -> &std::process::Child {
        &self.gate
    }

    /// Turns of the thread that takes what the gate hands on: while they stand still,
    /// nothing is seen of what is executed.
    pub fn gate_turns(&self) -> Arc<AtomicU64> {
        self.gate_turns.clone()
    }

    /// How often a container's mounts have been listed; `None` if they are not followed.
    pub fn listings_of_mounts(&self, container: &ContainerId) -> Option<u64> {
        self.marker.mounts.listings(container)
    }

    /// Closes the gate: the kernel lets everything run from then on.
    pub fn close_gate(&self) {
        if self.shared.is_gate_closed.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Err(err) = self.stopper.close() {
            // Ended already, or to be ended: either way the kernel opens it. Nobody has
            // waited for it, so that its pid is its own.
            tracing::debug!("the gate could not be closed and is ended: {err}");
            let gate = rustix::process::Pid::from_child(&self.gate);
            let _ = rustix::process::kill_process(gate, rustix::process::Signal::KILL);
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
            ("executions answered and not taken from the gate", self.shared.untaken()),
            (LEFT_TO_THE_START, self.shared.dirty.unsettled()),
        ];
        left.extend(
            more.into_iter()
                .filter_map(|(what, count)| (count > 0).then_some(Left { what, count })),
        );
        left
    }

    /// Ends everything: the gate first, so that the kernel allows every exec that waits.
    pub fn stop(self) {
        self.close_gate();
        self.drain(Instant::now() + LAST_WORDS + Duration::from_secs(1));
    }
}

/// How long the gate's process may take to end once nobody takes anything from it.
const GATE_ENDS_WITHIN: Duration = Duration::from_secs(2);

/// How many groups of the gate ask about an unchanged file only once. More would spare
/// containers one another's copy-ups, and a daemon more of its user's groups
/// (`GROUPS_OF_A_DAEMON`).
pub fn shards(gate: config::Gate) -> u8 {
    match gate {
        config::Gate::Free => 1,
        config::Gate::Ask | config::Gate::Notify => 0,
    }
}

/// Looks after all of the daemon's threads, until the watchers stop.
fn supervise(shared: &Core) {
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
        self.close_gate();
        self.shared.health.threads.begin_end(&self.threads);
        self.shared.stop();
        // What nobody takes any more is not kept open either.
        self.shared.health.threads.forget(&self.threads);
        // It ends when what it has answered is handed over.
        let deadline = Instant::now() + GATE_ENDS_WITHIN;
        while matches!(self.gate.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                let _ = self.gate.kill();
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// A queue, both ends of it.
type Ends<T> = (fair::Sender<T>, fair::Receiver<T>);

/// The queues by which executions and code pass from thread to thread. Each thread has its
/// own ends of them: a receiver ends when all senders are gone, so that this is dropped when
/// the threads have begun.
struct Queues {
    limit: usize,
    take: Take,
    content: Entrance,
    taken: fair::Receiver<Taken>,
    described: Ends<Described>,
    large: Ends<Described>,
    processes: Ends<Box<Seen>>,
    unseen: Ends<Box<Unseen>>,
    loadings: Ends<Box<Loading>>,
    started: Ends<Box<Started>>,
}

impl Queues {
    fn new(files: Arc<Files>) -> Queues {
        let limit = content_queue();
        let (take, content, taken) = take::new(files, limit);
        Queues {
            limit,
            take,
            content,
            taken,
            described: fair::channel(limit),
            large: fair::channel(LARGE_QUEUE),
            processes: fair::channel(PROCESS_QUEUE),
            unseen: fair::channel(PROCESS_QUEUE),
            loadings: fair::channel(LIBRARY_QUEUE),
            started: fair::channel(INTERPRETER_QUEUE),
        }
    }

    /// Where executions and code wait.
    fn stages(&self) -> Vec<(&'static str, Arc<dyn fair::Waits>)> {
        vec![
            ("take", self.take.waits()),
            ("describe", self.taken.waits()),
            ("content", self.described.1.waits()),
            ("large", self.large.1.waits()),
            ("processes", self.processes.1.waits()),
            ("unseen", self.unseen.1.waits()),
            ("libraries", self.loadings.1.waits()),
            ("interpreters", self.started.1.waits()),
        ]
    }
}

/// Where executions are seen, and the group that reports them if the gate is not asked.
fn exec_marks(gate: config::Gate, marks: &Marks) -> Result<(ExecMarks, Option<Arc<Group>>), Error> {
    match gate {
        config::Gate::Ask | config::Gate::Free => Ok((ExecMarks::Gate(marks.clone()), None)),
        config::Gate::Notify => {
            let group = Arc::new(Group::exec_feed()?);
            Ok((ExecMarks::Feed(group.clone()), Some(group)))
        }
    }
}

/// Notes what the kernel records here, and warns of what is missed.
fn note_executions(shared: &Exec, executions: &Executions) {
    match executions {
        Executions::Recorded => shared.set_records_executions(),
        Executions::Announced { why } => tracing::warn!(
            why,
            "executions outside of marked filesystems are seen only if they last"
        ),
        Executions::Unseen { why } => {
            tracing::warn!(why, "executions outside of marked filesystems are not seen");
        }
    }
}

/// How many executed files may wait, given the descriptors that we may open.
fn content_queue() -> usize {
    let allowed = crate::sys::process::raise_descriptors();
    // With a process's handle until that is described, then without: in the three queues
    // before that, in one of which the upper layer's file is open as well, and in one
    // behind; and two for what only the trace has seen.
    let affordable = allowed.saturating_sub(OTHER_DESCRIPTORS) / 10;
    usize::try_from(affordable).unwrap_or(usize::MAX).clamp(16, CONTENT_QUEUE)
}
