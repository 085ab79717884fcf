//! Starts every room, and stops them all when the first one ends.
//!
//! The only file that knows all rooms: it opens the channels between them and decides
//! nothing itself. `daemon/stop.rs` has the order of a stop, `daemon/reload.rs` the settings
//! that change while driftd runs.

use std::convert::Infallible;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::Child;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use crossbeam_channel::{Sender, bounded};
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::baseline::{Recorder, Store};
use crate::cli::exit::Exit;
use crate::config::{self, Arm, Config};
use crate::containerd::{Containerd, ContentBlobs, Lane, Urgent};
use crate::evidence::{self, Keeper};
use crate::gate::{self, Gate};
use crate::guardian::{Guardian, Heart};
use crate::health::{Gating, Health, Missing};
use crate::history::{self, History, Keep, Reader, Record};
use crate::hooks::Queue;
use crate::journal;
use crate::model::session::MAX_COMMANDS;
use crate::model::{Command, Session, SessionState};
use crate::pipeline::{self, Inputs, Outputs, State};
use crate::policy::Policy;
use crate::pulse::{Part, Pulse};
use crate::respond::{Response, ResponseRequest};
use crate::sys::capabilities::{self, Capabilities};
use crate::sys::channel::Channel;
use crate::sys::procfs::Handle;
use crate::sys::{memory, pidfd, process};
use crate::threads::{self, Role, Threads};
use crate::watch::{self, Scope, SensorCommand, SensorEvent, Watch};
use crate::{api, respond};

mod reload;
mod rules;
mod stop;

use reload::{Reloading, hangups, keep_of, reload};
use rules::Rules;
use stop::{ApiTask, Followers, PIPELINE, Running};

/// How often freed memory is given back to the kernel.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(60);

/// The daemon, in the foreground, until it is asked to stop. `reread` reads the settings
/// again.
// Long: one step after the other, in the order in which the rooms need each other.
pub fn run(
    config: &Config,
    reread: impl Fn() -> anyhow::Result<Config> + Send + Sync + 'static,
) -> anyhow::Result<Exit> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "driftd run needs root: fanotify and other processes' files are root's (try: sudo)"
    );
    // Before any thread is started.
    process::hold_hangups().context("cannot block SIGHUP")?;
    memory::share_areas();
    let _log = journal::start_log();
    let since = Timestamp::now();
    let health = check_node(config)?;
    let settings = choose_gate(config, &health);
    let Guarded { gate, guardian, gate_ended, guarded_by } = Guarded::start(&settings)?;
    let pulse = gate.pulse.clone();

    let history = History::open(&config.state_dir)?;
    let reader = history.reader();
    let node = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let rules = Rules::new(&config.policy);
    let (policy_reloads, policy_reload_requests) = mpsc::channel(8);
    let (state, gap) = restore(config, &rules, &node, &health, &history)?;
    let baselines = config.state_dir.join("baselines");
    let _claim = Store::claim(&baselines)?;
    let store = Arc::new(Store::open(&baselines, health.clone())?);

    let (sensor_event_sender, sensor_events) = bounded(16_384);
    let watch = start_watch(config, &settings, sensor_event_sender, &health, gate)?;
    guarded_by.1.progress().needs(watch.gate_turns());
    guarded_by.1.progress().needs(health.threads.beats());
    let writer = history.start(keep_of(config), health.clone());
    let keeper = start_keeper(config, &node, writer.reader(), &health)?;
    let logged = *writer.committed().borrow();
    if let Some(gap) = gap {
        let _ = writer.records().send(gap);
    }

    let runtime = async_runtime()?;
    let (baseline_event_sender, baseline_events) = bounded(1024);
    let recorder = Recorder::start(
        store.clone(),
        &config.baseline,
        Arc::new(ContentBlobs::new(runtime.handle().clone())),
        baseline_event_sender,
        health.clone(),
    );

    // When one of these channels is full, the sender keeps the message.
    let (runtime_event_sender, runtime_events) = bounded(256);
    let (request_sender, requests) = bounded(64);
    let (response_sender, responses) = bounded(256);
    let (response_request_sender, response_requests) = mpsc::channel(256);
    let (stop_sender, stop) = bounded::<Infallible>(0);
    let history_begun = writer.begun();
    let (questions, decisions) = watch.questions();
    let inputs = Inputs {
        questions,
        runtime_events,
        sensor_events,
        baseline_events,
        requests,
        responses,
        history_begun,
        stop,
    };
    let outputs = Outputs {
        commands: watch.commands(),
        recorder: recorder.clone(),
        records: writer.records(),
        response_requests: response_request_sender,
        decisions: Some(decisions),
    };
    let pipeline_ended = start_pipeline(state, reader, inputs, outputs, &health.threads)?;
    let (gave_up_sender, gave_up) = mpsc::unbounded_channel();
    health.threads.on_give_up(move |reason| drop(gave_up_sender.send(reason)));

    let hooks = Queue::default();
    let waiting = hooks.clone();
    health.threads.show_queue("hooks", Box::new(move || waiting.waiting()));
    let lane = lane_to(&watch);
    let (end_api, api_ends) = oneshot::channel::<()>();
    let containerd = {
        let _runtime = runtime.enter();
        let recording = recorder.clone();
        Containerd::start_with(
            &config.containerd,
            &runtime_event_sender,
            recording,
            &health,
            Some(&lane),
        )
    };
    drop(runtime_event_sender);

    let serving = Serving {
        backend: api::Backend {
            node,
            requests: request_sender,
            history: writer.reader(),
            committed: writer.committed(),
            health: health.clone(),
            baselines: store,
            recorder: recorder.clone(),
            images: Arc::new(containerd.clone()),
            policy_reloads,
            evidence: keeper.store().clone(),
            hooks: hooks.clone(),
        },
        keeper: keeper.clone(),
        hooks,
        rules,
        policy_reloads: policy_reload_requests,
        containerd: containerd.clone(),
        response_requests,
        response_sender,
        keep: Box::new(writer.keeper()),
        logged,
        since,
        pulse,
        api_ends,
        ends: Ends { guardian, gate: gate_ended, pipeline: pipeline_ended, gave_up },
    };
    let served = runtime.block_on(serve(config, reread, serving));
    let (reason, followers) = match served {
        Ok((reason, followers)) => (reason, Some(followers)),
        Err(err) => (Err(err), None),
    };
    let running = Running {
        watch: Arc::new(watch),
        guarded_by,
        containerd,
        keeper,
        stop_sender,
        recorder,
        writer,
        end_api,
        followers,
    };
    running.stop(runtime.handle(), &health.threads);
    runtime.shutdown_background();
    reason.map(|()| Exit::Clean)
}

/// Checks that driftd can run on this node, and records what the kernel lacks.
fn check_node(config: &Config) -> anyhow::Result<Arc<Health>> {
    let lacking = capabilities::lacking();
    anyhow::ensure!(lacking.is_empty(), "driftd cannot run here: {}", lacking.join("; "));
    create_private(&config.state_dir)?;
    let health = Arc::new(Health::default());
    let capabilities = Capabilities::probe();
    let missing = capabilities.missing().iter().map(|feature| Missing {
        name: feature.name().into(),
        since: feature.since().into(),
        meaning: feature.without().into(),
    });
    let _ = health.missing.set(missing.collect());
    Ok(health)
}

/// The settings of the watchers. They ask for the free gate only on kernels that pass its
/// self-test.
fn choose_gate(config: &Config, health: &Health) -> config::Watch {
    let mut settings = config.watch.clone();
    let mut instead = None;
    if settings.gate == config::Gate::Free
        && let Err(distrust) = watch::try_free_gate(&config.state_dir)
    {
        tracing::warn!("watch.gate is \"ask\" and not \"free\": {distrust}");
        settings.gate = config::Gate::Ask;
        instead = Some(distrust.to_string());
    }
    let _ = health.gating.set(Gating { mode: settings.gate.name(), instead });
    settings
}

/// The gate's process, with all that makes sure that a stuck gate blocks no container.
struct Guarded {
    gate: Gate,
    guardian: Child,
    /// The pidfd of the gate's process.
    gate_ended: OwnedFd,
    guarded_by: (Channel, Heart),
}

impl Guarded {
    /// The guardian starts before anything is marked, so that the gate is guarded from its
    /// first reply to the kernel on.
    fn start(settings: &config::Watch) -> anyhow::Result<Guarded> {
        let program = Path::new(gate::THIS_PROGRAM);
        let gate = Gate::start(program, watch::shards(settings.gate))?;
        let Guardian { child: guardian, channel } =
            Guardian::start(program, &gate.pulse, &gate.child)
                .context("cannot start the guardian")?;
        let heart = Heart::start(gate.pulse.clone(), &gate.child, &guardian)
            .context("cannot start the heart's thread")?;
        let gate_ended = pidfd::open(gate.child.id()).context("cannot watch the gate")?;
        Ok(Guarded { gate, guardian, gate_ended, guarded_by: (channel, heart) })
    }
}

/// The pipeline's state with what the history holds, and the gap since driftd last ran.
fn restore(
    config: &Config,
    rules: &Rules,
    node: &str,
    health: &Arc<Health>,
    history: &History,
) -> anyhow::Result<(State, Option<Record>)> {
    let reader = history.reader();
    // Only those about no container: a container's findings are read when it appears.
    let findings = reader.findings_of_container(None).context("cannot read the history")?;
    let now = Timestamp::now();
    let refused = rules.refused.as_ref().map(ToString::to_string);
    let policy = Policy { refused, ..Policy::of(config, rules.loaded.as_ref()) };
    rules::warn_of_denials(config, &policy);
    let mut state = State::new(node.to_owned(), policy, health.clone(), findings, now);
    let gap = history.last_beat().map(|beat| state.was_not_running(beat, now));
    let sessions = open_sessions(&reader).context("cannot read the history")?;
    let probes = reader.probes(None).context("cannot read the history")?;
    state.remember_sessions(sessions, probes);
    let since = now.checked_sub(config.respond.within).unwrap_or(Timestamp::MIN);
    state.remember_answers(reader.answers_since(since).context("cannot read the history")?);
    Ok((state, gap))
}

/// The sessions that were open when driftd last ran, each with the commands that still ran.
fn open_sessions(reader: &Reader) -> Result<Vec<(Session, Vec<Command>)>, history::Error> {
    let mut sessions = Vec::new();
    for mut session in reader.open_sessions()? {
        if Handle::open_exactly(session.process.identity).is_err() {
            // It ended while driftd did not run.
            session.state = SessionState::Closed;
        }
        let all = usize::try_from(MAX_COMMANDS).unwrap_or(usize::MAX);
        let mut running = reader.commands(session.id, None, all)?.commands;
        running.retain(|command| command.ended_at.is_none());
        sessions.push((session, running));
    }
    Ok(sessions)
}

/// Starts the watchers, before any container is known.
fn start_watch(
    config: &Config,
    settings: &config::Watch,
    reports: Sender<Box<SensorEvent>>,
    health: &Arc<Health>,
    gate: Gate,
) -> anyhow::Result<Watch> {
    let mut watch = Watch::start(settings, reports, health.clone(), gate)?;
    if config.watch.arm == Arm::Strict {
        watch.arm_before_start(&Scope {
            runtimes: config.watch.runtimes.clone(),
            sockets: config.containerd.sockets.clone(),
            exclude_namespaces: config.containerd.exclude_namespaces.clone(),
        })?;
    }
    Ok(watch)
}

/// Opens the store of evidence, and starts the threads that take it.
fn start_keeper(
    config: &Config,
    node: &str,
    reader: Reader,
    health: &Arc<Health>,
) -> anyhow::Result<Keeper> {
    let directory = config.evidence_directory();
    let store = evidence::Store::open(directory, &config.evidence, node, health);
    Keeper::start(Arc::new(store), reader, health)
        .context("cannot start the threads that take evidence")
}

fn async_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("async")
        .enable_all()
        .build()
        .context("cannot start the async runtime")
}

type PipelineEnd = oneshot::Receiver<Result<(), history::Error>>;

/// Starts the pipeline's thread. Returns the receiver of its end.
fn start_pipeline(
    state: State,
    reader: Reader,
    inputs: Inputs,
    outputs: Outputs,
    threads: &Threads,
) -> anyhow::Result<PipelineEnd> {
    let depth = threads::depth_of(&inputs.sensor_events);
    threads.show_queue("containerd", threads::depth_of(&inputs.runtime_events));
    // Weak, so that the channel of the responses closes when the pipeline ends.
    let waiting = outputs.response_requests.downgrade();
    let waiting = move || waiting.upgrade().map_or(0, |to| to.max_capacity() - to.capacity());
    threads.show_queue("respond", Box::new(waiting));
    let (ended_sender, ended) = oneshot::channel();
    let run = move || {
        let _ = ended_sender.send(pipeline::run(state, &reader, &inputs, &outputs));
    };
    // The role of a thread that may wait for a disk: it reads the history.
    threads
        .spawn(PIPELINE, Role::Disk, Some(depth), run)
        .context("cannot start the pipeline's thread")?;
    Ok(ended)
}

/// Sends the start and end of a task to the watchers at once, past the pipeline, which may
/// be waiting for a disk. If their channel is full, the pipeline's own command follows.
fn lane_to(watch: &Watch) -> Lane {
    let commands = watch.commands();
    Arc::new(move |urgent| drop(commands.try_send(command_for(urgent))))
}

fn command_for(urgent: Urgent) -> SensorCommand {
    match urgent {
        Urgent::TaskCreated { container, pid, rootfs } => {
            SensorCommand::Attach { container, pid, rootfs }
        }
        Urgent::TaskExited { container, pid } => {
            SensorCommand::Detach { container, pid: Some(pid) }
        }
    }
}

/// What the async tasks need.
struct Serving {
    backend: api::Backend,
    keeper: Keeper,
    hooks: Queue,
    rules: Rules,
    policy_reloads: mpsc::Receiver<api::PolicyReload>,
    containerd: Containerd,
    response_requests: mpsc::Receiver<ResponseRequest>,
    response_sender: Sender<Response>,
    keep: Box<dyn Fn(Keep) + Send>,
    /// The sequence number up to which earlier runs have logged the history.
    logged: u64,
    /// When this run began.
    since: Timestamp,
    pulse: Arc<Pulse>,
    /// Sent when the API is to end.
    api_ends: oneshot::Receiver<()>,
    ends: Ends,
}

/// Starts the async tasks and waits until the daemon is to stop. Returns the reason, and the
/// tasks that end last.
async fn serve(
    config: &Config,
    reread: impl Fn() -> anyhow::Result<Config> + Send + Sync + 'static,
    serving: Serving,
) -> anyhow::Result<(anyhow::Result<()>, Followers)> {
    let Serving {
        backend,
        keeper,
        hooks,
        rules,
        policy_reloads,
        containerd,
        response_requests,
        response_sender,
        keep,
        logged,
        since,
        pulse,
        api_ends,
        ends,
    } = serving;
    tokio::spawn(respond::run(containerd, keeper, hooks, response_requests, response_sender));
    let listener = api::Listener::bind(&config.socket)?;
    let requests = backend.requests.clone();
    let reloading = Reloading { config: config.clone(), rules, keep, requests, policy_reloads };
    tokio::spawn(reload(hangups()?, reread, reloading));
    let log = journal::follow(backend.history.clone(), backend.committed.clone(), logged, since);
    let log = tokio::spawn(log);
    tokio::spawn(feed_watchdog(pulse));
    tokio::spawn(give_memory_back());
    // Fails without systemd, which is no error.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    tracing::info!(socket = %config.socket.display(), "driftd is watching");

    // It serves until followers have received what was seen before a stop.
    let mut api = tokio::spawn(api::serve(listener, backend, async { drop(api_ends.await) }));
    let reason = ends.first(&mut api).await;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    Ok((reason, (api, log)))
}

/// After a load, most of its memory is freed and used by nothing.
async fn give_memory_back() {
    let mut turns = tokio::time::interval(GIVE_BACK_EVERY);
    loop {
        turns.tick().await;
        // It holds up allocations for milliseconds at most, but not this thread's other tasks.
        let _ = tokio::task::spawn_blocking(memory::give_back).await;
    }
}

/// Everything whose end ends the daemon, besides the API and the signals.
struct Ends {
    guardian: Child,
    gate: OwnedFd,
    pipeline: PipelineEnd,
    /// A thread of the daemon is stuck for good; with the reason.
    gave_up: mpsc::UnboundedReceiver<String>,
}

impl Ends {
    /// Waits for the first end. It is an error unless the daemon was asked to stop.
    async fn first(self, api: &mut ApiTask) -> anyhow::Result<()> {
        let Ends { mut guardian, gate, pipeline, mut gave_up } = self;
        let guardian_ended = tokio::task::spawn_blocking(move || guardian.wait());
        let gate_ended = tokio::task::spawn_blocking(move || pidfd::wait(gate.as_fd()));
        tokio::select! {
            () = asked_to_stop() => Ok(()),
            result = api => match result {
                Ok(result) => result.context("the API server failed"),
                Err(err) => Err(err).context("the API server failed"),
            },
            Some(reason) = gave_up.recv() => Err(anyhow::anyhow!(reason)),
            ended = pipeline => match ended {
                Ok(Err(err)) => Err(err).context("cannot read the history"),
                Ok(Ok(())) | Err(_) => Err(anyhow::anyhow!("the pipeline ended")),
            },
            status = guardian_ended => Err(anyhow::anyhow!(
                "the guardian ended ({status:?}): without it a stuck gate would freeze containers"
            )),
            _ = gate_ended => Err(anyhow::anyhow!(
                "the gate's process ended: without it executions are not seen"
            )),
        }
    }
}

/// Waits for SIGTERM, which systemd sends, or SIGINT, which a terminal sends.
async fn asked_to_stop() {
    let asked = async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            result = tokio::signal::ctrl_c() => result,
        }
    };
    match asked.await {
        Ok(()) => tracing::info!("asked to stop"),
        Err(err) => tracing::error!(%err, "cannot listen for signals; stopping"),
    }
}

/// Notifies systemd's watchdog as long as both the daemon and its gate make progress.
async fn feed_watchdog(pulse: Arc<Pulse>) {
    let Some(limit) = sd_notify::watchdog_enabled() else { return };
    let mut ticks = tokio::time::interval(limit / 3);
    let turns =
        || [Part::Daemon, Part::Gate].map(|part| pulse.turns_of(part).load(Ordering::Relaxed));
    let mut seen = turns();
    loop {
        ticks.tick().await;
        let now = turns();
        if now[0] != seen[0] && now[1] != seen[1] {
            seen = now;
            let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        }
    }
}

/// Creates the state directory for root only: its content reveals what is watched.
fn create_private(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    if made.as_ref().is_err_and(crate::history::is_of_the_disk) {
        // The history reports this, and is kept in memory.
        return Ok(());
    }
    made.with_context(|| format!("cannot create the state directory {}", directory.display()))
}
