//! Watches running containers and reports facts: executions, changed files, sessions, scans.
//!
//! This file starts the threads, connects them by queues and ends them. It decides nothing:
//! that is for the wings. The pipeline sends [`SensorCommand`]s and receives
//! [`SensorEvent`]s. The threads are plain ones, because disks and the kernel block:
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
//! Only the scan thread waits for the pipeline. The others count what does not fit and ask
//! for a scan of the container ([`SensorEvent::Lost`]).

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
pub use self::core::message::{Error, Question, SensorCommand, SensorEvent};
pub use self::core::trust::{Trust, Verdict};
pub use self::exec::recorder::Executions;
pub use self::exec::self_test::{Distrust, try_free_gate};

use self::code::libraries::Loading;
use self::code::started::Started;
use self::code::{interpreters, libraries};
use self::control::marker::Marker;
use self::control::{arm, commands};
use self::core::copyup::Free;
use self::core::fair;
use self::core::shared::{Core, STOP_GRACE};
use self::core::unchanged::Unchanged;
use self::exec::described::Described;
use self::exec::gate::Arrivals;
use self::exec::questions::{self, Asking};
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
use self::process::activity::Activity;
use self::process::records::TraceConsumer;
use self::process::seen::Seen;
use self::process::shared::Processes;
use self::sessions::shared::Sessions;
use self::sessions::{attachments, follow};
use crate::config;
pub use crate::gate::{Decision, Decisions, Undecided};
use crate::gate::{Events, Gate, Marks, Stopper};
use crate::health::{Backlogs, Failure, Health};
use crate::model::ContainerId;
use crate::pulse::Pulse;
use crate::sys::fanotify::{self, Group, Queue};
use crate::sys::mounts::Notifier;
use crate::threads::{self, Depth, Event, Left, Role};

/// The entry of [`Watch::left`] that is not a loss.
pub const LEFT_TO_THE_START: &str = "changed files, which the next start checks";

/// Executed files that may wait to be described, and then to be hashed.
const CONTENT_QUEUE: usize = 1024;
const LARGE_QUEUE: usize = 64;
const PROCESS_QUEUE: usize = 8 * 1024;
const COMMAND_QUEUE: usize = 1024;
const QUESTION_QUEUE: usize = 1024;
const ORDER_QUEUE: usize = 4 * 1024;
const LIBRARY_QUEUE: usize = 16 * 1024;
const INTERPRETER_QUEUE: usize = 4 * 1024;

/// Descriptors for everything except the content queue: the events of one read of each
/// group, the directories of a scan, and the rest of the daemon.
const OTHER_DESCRIPTORS: u64 = 2048;

/// The threads that watch.
#[derive(Debug)]
pub struct Watch {
    shared: Arc<Exec>,
    marker: Arc<Marker>,
    commands: Sender<SensorCommand>,
    threads: Vec<&'static str>,
    executions: Executions,
    gate: std::process::Child,
    stopper: Stopper,
    /// The gate holds no runtime invocation until a thread takes them.
    invocations: Option<Receiver<gate::Invocation>>,
    questions: Receiver<Box<Question>>,
    decisions: Decisions,
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
    /// Starts the threads. No container is watched yet. `gate` was started with [`shards`].
    pub fn start(
        settings: &config::Watch,
        reports: Sender<Box<SensorEvent>>,
        health: Arc<Health>,
        gate: Gate,
    ) -> Result<Watch, Error> {
        let notifier = if settings.volumes { Notifier::new() } else { Notifier::polling() };
        Watch::start_with(settings, reports, health, gate, notifier)
    }

    // Long: one line for each queue, each value that threads share, and each thread.
    /// Like [`start`](Watch::start); `notifier` reports new mounts.
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
        let (activity, receive_activity) = bounded(COMMAND_QUEUE);
        let core = Core::new(settings.clone(), reports, health, wake_scan);
        let processes = Processes::new(Arc::new(core.map_err(Error::Wake)?), activity);
        let files = Arc::new(Files::new(Arc::new(processes)));
        let shared = Arc::new(Exec::new(Arc::new(Sessions::new(files.clone()))));
        let (commands, receive_commands) = bounded(COMMAND_QUEUE);
        let (orders, receive_orders) = bounded(ORDER_QUEUE);
        let (ask, questions) = bounded(QUESTION_QUEUE);
        let queues = Queues::new(files.clone(), ask);

        if let ExecMarks::Gate(marks) = &marks {
            files.guards.set_marks(marks.clone());
        }
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

        let (invocations, receive_invocations) = bounded(arm::QUEUE);
        let mut watch = Watch {
            shared: shared.clone(),
            marker: marker.clone(),
            commands,
            threads: Vec::new(),
            executions,
            gate: child,
            stopper: gate_marks.stopper(),
            invocations: Some(receive_invocations),
            questions,
            decisions: events.decisions(),
            gate_turns: Arc::default(),
        };
        shared.set_unchanged(match settings.gate {
            config::Gate::Ask | config::Gate::Free => Unchanged::InGate(gate_marks.clone()),
            config::Gate::Notify => Unchanged::Here(Mutex::default()),
        });
        shared.set_stages(queues.stages());
        let asked = Arc::downgrade(&files);
        let backlogs = move || asked.upgrade().map(|files| files.backlogs()).unwrap_or_default();
        let _ = shared.health.backlogs.set(Backlogs(Box::new(backlogs)));
        let depth = threads::depth_of(&receive_orders);
        let scan = scan::Scan::new(files.clone(), receive_orders, wake);
        watch.spawn("scan", Role::Owner, Some(depth), || scan.run())?;
        watch.start_consumers(&queues)?;
        watch.start_listeners(receive_activity)?;
        watch.start_trace(&queues, recorder)?;
        watch.start_gate(&queues, &gate_marks, &pulse, (events, invocations), exec_feed)?;
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

    /// Starts the threads that only take items from queues.
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

    /// Starts the threads that receive the kernel's events about files and sessions.
    fn start_listeners(&mut self, activity: Receiver<Box<Activity>>) -> Result<(), Error> {
        let ours = self.shared.clone();
        self.spawn("names", Role::Owner, None, move || changes::run(&ours))?;
        let ours = self.shared.clone();
        self.spawn("attachments", Role::Owner, None, move || attachments::run(&ours))?;
        let ours = self.shared.clone();
        self.spawn("closings", Role::Owner, None, move || ours.closings.run(&ours))?;
        let ours = self.shared.clone();
        self.spawn("terminals", Role::Owner, None, move || ours.terminals.run(&ours))?;
        let ours = self.shared.clone();
        let depth = threads::depth_of(&activity);
        self.spawn("sessions", Role::Owner, Some(depth), move || follow::run(&ours, &activity))
    }

    /// Starts the threads that read the kernel's records.
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
        let consumers: Vec<Box<dyn TraceConsumer>> = vec![
            Box::new(libraries::Tracing::new(queues.loadings.0.clone(), queues.started.0.clone())),
            Box::new(packages::Descent::new(processes.clone())),
            Box::new(processes::Entries::new(processes.clone())),
            Box::new(follow::SessionActivity::default()),
        ];
        let (unseen, proven) = (queues.unseen.0.clone(), queues.described.0.clone());
        let trace = Trace::new(self.shared.clone(), unseen, proven, queues.limit, consumers);
        self.spawn("trace", Role::Owner, None, || trace.run(recorder))
    }

    /// Starts the threads that take what the gate hands over.
    fn start_gate(
        &mut self,
        queues: &Queues,
        marks: &Marks,
        pulse: &Arc<Pulse>,
        (events, invocations): (Events, Sender<gate::Invocation>),
        exec_feed: Option<Arc<Group>>,
    ) -> Result<(), Error> {
        let decisions = events.decisions();
        let (ours, to, answer) = (self.shared.clone(), queues.questions.clone(), decisions.clone());
        self.consume("questions", queues.asking.1.clone(), move |queue| {
            questions::run(&ours, queue, &answer, &to);
        })?;
        let shared = self.shared.clone();
        let arrivals = || Arrivals {
            shared: shared.clone(),
            marks: marks.clone(),
            pulse: pulse.clone(),
            content: queues.content.clone(),
            repeats: RefCell::default(),
            processes: queues.processes.0.clone(),
        };
        let thread = gate::Gate {
            arrivals: arrivals(),
            events,
            invocations,
            waiting: gate::Waiting::new(queues.asking.0.clone(), decisions),
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

    /// From now on, containers are armed before their runtime starts them
    /// (`watch.arm = "strict"`).
    pub fn arm_before_start(&mut self, scope: &Scope) -> Result<(), Error> {
        let Some(invocations) = self.invocations.take() else { return Ok(()) };
        let (core, marker) = (self.shared.core.clone(), self.marker.clone());
        let depth = threads::depth_of(&invocations);
        let thread = arm::Arming::new(core, marker, self.stopper.marks(), scope, invocations)?;
        self.spawn("arming", Role::Owner, Some(depth), || thread.run())
    }

    /// Starts a thread. After an error, the threads that run end when `self` is dropped.
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

    /// Starts a thread that only takes items from a queue.
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

    /// How executions are seen that the gate does not see.
    pub fn executions(&self) -> &Executions {
        &self.executions
    }

    pub fn commands(&self) -> Sender<SensorCommand> {
        self.commands.clone()
    }

    /// The executions that wait for a decision, and where it is sent.
    pub fn questions(&self) -> (Receiver<Box<Question>>, Decisions) {
        (self.questions.clone(), self.decisions.clone())
    }

    /// The gate's process.
    pub fn gate(&self) -> &std::process::Child {
        &self.gate
    }

    /// Counts the turns of the thread that takes what the gate hands over. While the count
    /// stands still, no execution is seen.
    pub fn gate_turns(&self) -> Arc<AtomicU64> {
        self.gate_turns.clone()
    }

    /// How often a container's mounts have been listed; `None` if they are not followed.
    pub fn listings_of_mounts(&self, container: &ContainerId) -> Option<u64> {
        self.marker.mounts.listings(container)
    }

    /// Closes the gate: from then on, the kernel allows every execution.
    pub fn close_gate(&self) {
        if self.shared.is_gate_closed.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Err(err) = self.stopper.close() {
            // The gate has ended already, or is ended now. Both make the kernel allow every
            // execution. Its exit was not reaped, so its pid cannot be another process's.
            tracing::debug!("cannot close the gate, ending its process: {err}");
            let gate = rustix::process::Pid::from_child(&self.gate);
            let _ = rustix::process::kill_process(gate, rustix::process::Signal::KILL);
        }
    }

    /// Ends the threads. They report what they have seen before, as far as there is time.
    pub fn drain(&self, deadline: Instant) {
        self.shared.health.threads.begin_end(&self.threads);
        self.shared.stop();
        let running = self.shared.health.threads.wait_for_end(&self.threads, deadline);
        if !running.is_empty() {
            tracing::warn!(threads = running.join(", "), "stopping without threads that are stuck");
        }
    }

    /// What the threads had no time to report.
    pub fn left(&self) -> Vec<Left> {
        let mut left = self.shared.health.threads.left(&self.threads);
        let more = [
            ("items taken and not reported", self.shared.unreported()),
            ("executions that the gate allowed and that were not taken", self.shared.untaken()),
            (LEFT_TO_THE_START, self.shared.dirty.unsettled()),
        ];
        left.extend(
            more.into_iter()
                .filter_map(|(what, count)| (count > 0).then_some(Left { what, count })),
        );
        left
    }

    /// Ends everything, the gate first: then the kernel allows every execution that waits.
    pub fn stop(self) {
        self.close_gate();
        self.drain(Instant::now() + STOP_GRACE + Duration::from_secs(1));
    }
}

/// How long the gate's process may take to end when nothing is taken from it any more.
const GATE_ENDS_WITHIN: Duration = Duration::from_secs(2);

/// How many groups of the gate ask about an unchanged file only once. With more, a copy-up
/// would affect fewer other containers, but the daemon would use more of the groups that its
/// user may have (`GROUPS_OF_A_DAEMON`).
pub fn shards(gate: config::Gate) -> u8 {
    match gate {
        config::Gate::Free => 1,
        config::Gate::Ask | config::Gate::Notify => 0,
    }
}

/// Supervises all threads of the daemon until the watchers stop.
fn supervise(shared: &Core) {
    let mut last = Instant::now();
    while !shared.is_stopping() {
        shared.wait_for_stop(threads::TURN);
        let elapsed = last.elapsed();
        last = Instant::now();
        for event in shared.health.threads.supervise(elapsed) {
            match event {
                Event::Stuck { name, still, is_replaced, about } => {
                    let busy =
                        about.map_or(String::new(), |id| format!(", at work for container {id}"));
                    let then = if is_replaced {
                        "a new thread has taken its place"
                    } else {
                        "driftd ends if this lasts"
                    };
                    let seconds = still.as_secs();
                    let detail = format!(
                        "the thread `{name}` has made no progress for {seconds} s{busy}: {then}"
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
        // This releases the queues too, and closes the files that wait in them.
        self.shared.health.threads.forget(&self.threads);
        // The gate's process ends when it has handed over what it has answered.
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

/// Both ends of a queue.
type Ends<T> = (fair::Sender<T>, fair::Receiver<T>);

/// The queues by which executions and code pass from thread to thread. Each thread has its
/// own ends. A receiver ends when all senders are gone, so this value is dropped as soon as
/// the threads have begun.
struct Queues {
    limit: usize,
    take: Take,
    content: Entrance,
    taken: fair::Receiver<Taken>,
    described: Ends<Described>,
    large: Ends<Described>,
    processes: Ends<Box<Seen>>,
    asking: Ends<Asking>,
    questions: Sender<Box<Question>>,
    unseen: Ends<Box<Unseen>>,
    loadings: Ends<Box<Loading>>,
    started: Ends<Box<Started>>,
}

impl Queues {
    fn new(files: Arc<Files>, questions: Sender<Box<Question>>) -> Queues {
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
            asking: fair::channel(limit),
            questions,
            unseen: fair::channel(PROCESS_QUEUE),
            loadings: fair::channel(LIBRARY_QUEUE),
            started: fair::channel(INTERPRETER_QUEUE),
        }
    }

    /// The places where executions and code wait, by name.
    fn stages(&self) -> Vec<(&'static str, Arc<dyn fair::Waits>)> {
        vec![
            ("take", self.take.waits()),
            ("describe", self.taken.waits()),
            ("content", self.described.1.waits()),
            ("large", self.large.1.waits()),
            ("processes", self.processes.1.waits()),
            ("questions", self.asking.1.waits()),
            ("unseen", self.unseen.1.waits()),
            ("libraries", self.loadings.1.waits()),
            ("interpreters", self.started.1.waits()),
        ]
    }
}

/// Where marks for executions are placed, and the group that reports executions if the gate
/// is not asked.
fn exec_marks(gate: config::Gate, marks: &Marks) -> Result<(ExecMarks, Option<Arc<Group>>), Error> {
    match gate {
        config::Gate::Ask | config::Gate::Free => Ok((ExecMarks::Gate(marks.clone()), None)),
        config::Gate::Notify => {
            let group = Arc::new(Group::exec_feed()?);
            Ok((ExecMarks::Feed(group.clone()), Some(group)))
        }
    }
}

/// Notes which executions this kernel records, and warns if some are missed.
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

/// How many executed files may wait, given the descriptors that the daemon may open.
fn content_queue() -> usize {
    let allowed = crate::sys::process::raise_descriptors();
    // An execution holds its file, and the handle of its process until that is described:
    // in three queues before the description (in one of them, the upper layer's file is open
    // too), and in one queue after it. Two more are for what only the trace has seen.
    let affordable = allowed.saturating_sub(OTHER_DESCRIPTORS) / 10;
    usize::try_from(affordable).unwrap_or(usize::MAX).clamp(16, CONTENT_QUEUE)
}
