//! Starts every room, and stops them all when the first one ends.
//!
//! Nothing here is clever on purpose: this file is the map of what runs.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use crossbeam_channel::bounded;
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};
use tracing_appender::non_blocking::WorkerGuard;

use crate::baseline::{Recorder, Store};
use crate::cli::exit::Exit;
use crate::config::{self, Arm, Config};
use crate::containerd::{Containerd, ContentBlobs};
use crate::gate::{self, Gate};
use crate::guardian::{Guardian, Heart};
use crate::health::{Gating, Health, Missing};
use crate::history::History;
use crate::model::SessionState;
use crate::model::session::MAX_COMMANDS;
use crate::pipeline::{self, Inputs, Outputs, State};
use crate::policy::Policy;
use crate::pulse::{Part, Pulse};
use crate::sys::capabilities::Capabilities;
use crate::sys::pidfd;
use crate::sys::procfs::Handle;
use crate::watch::{self, Scope, Watch};
use crate::{api, respond};

/// systemd's own limit is longer (`TimeoutStopSec=`), so that we, not it, choose.
const GRACE: Duration = Duration::from_secs(10);

/// The daemon, in the foreground, until it is asked to stop.
pub fn run(config: &Config) -> anyhow::Result<Exit> {
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "driftd run needs root: fanotify and other processes' files are root's (try: sudo)"
    );
    let _log = start_log();
    create_private(&config.state_dir)?;
    let health = Arc::new(Health::default());
    let capabilities = Capabilities::probe();
    let missing = capabilities.missing().iter().map(|feature| Missing {
        name: feature.name().into(),
        since: feature.since().into(),
        meaning: feature.without().into(),
    });
    let _ = health.missing.set(missing.collect());

    let settings = settle_the_gate(config, &health);
    let program = Path::new(gate::THIS_PROGRAM);
    let gate = Gate::start(program, watch::shards(settings.gate))?;
    let pulse = gate.pulse.clone();
    // Before anything is marked: from its first answer on, the gate is watched.
    let Guardian { child: mut guardian, channel: guarding } =
        Guardian::start(program, &pulse, &gate.child).context("cannot start the guardian")?;
    let heart = Heart::start(pulse.clone(), &gate.child, &guardian)
        .context("cannot start the heart's thread")?;
    let gate_ended = pidfd::open(gate.child.id()).context("cannot watch the gate")?;

    let history = History::open(&config.state_dir)?;
    let reader = history.reader();
    // What was told of containers is read when those show up.
    let findings = reader.told_of(None).context("cannot read the history")?;
    let node = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let policy = Policy {
        generation: 1,
        respond: config.respond.clone(),
        persistence: config.watch.persistence.clone(),
        probe_patience: config.watch.probe_patience.try_into().unwrap_or_default(),
    };
    let mut state = State::new(node.clone(), policy, health.clone(), findings, Timestamp::now());
    let mut sessions = Vec::new();
    for mut session in reader.open_sessions().context("cannot read the history")? {
        if Handle::open_exactly(session.process.identity).is_err() {
            // It ended while nobody looked.
            session.state = SessionState::Closed;
        }
        let all = usize::try_from(MAX_COMMANDS).unwrap_or(usize::MAX);
        let listed = reader.commands(session.id, None, all).context("cannot read the history")?;
        let mut running = listed.commands;
        running.retain(|command| command.ended_at.is_none());
        sessions.push((session, running));
    }
    let probes = reader.probes(None).context("cannot read the history")?;
    state.remember_sessions(sessions, probes);
    let baselines = config.state_dir.join("baselines");
    let _claim = Store::claim(&baselines)?;
    let store = Arc::new(Store::open(&baselines, health.clone())?);

    let (report_sender, reports) = bounded(16_384);
    let mut watch = Watch::start(&settings, report_sender, health.clone(), gate)?;
    heart.progress().needs(watch.gate_turns());
    if config.watch.arm == Arm::Strict {
        watch.arm_before_start(&Scope {
            runtimes: config.watch.runtimes.clone(),
            sockets: config.containerd.sockets.clone(),
            exclude_namespaces: config.containerd.exclude_namespaces.clone(),
        })?;
    }
    let writer = history.start(config.history.retention, health.clone());

    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("async")
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;

    let (news_sender, news) = bounded(1024);
    let recorder = Recorder::start(
        store.clone(),
        &config.baseline,
        Arc::new(ContentBlobs::new(runtime.handle().clone())),
        news_sender,
        health.clone(),
    );

    // What finds no room waits with its sender.
    let (change_sender, changes) = bounded(256);
    let (question_sender, questions) = bounded(64);
    let (response_sender, responses) = bounded(256);
    let (order_sender, orders) = tokio::sync::mpsc::channel(256);
    let (stop_sender, stop) = bounded(0);
    let inputs = Inputs { changes, reports, news, questions, responses, stop };
    let outputs = Outputs {
        commands: watch.commands(),
        recorder: recorder.clone(),
        records: writer.records(),
        orders: order_sender,
    };
    let (pipeline_ended_sender, pipeline_ended) = tokio::sync::oneshot::channel();
    let pipeline = thread::Builder::new()
        .name("pipeline".into())
        .spawn(move || {
            // Dropped when the loop panics.
            let ended: tokio::sync::oneshot::Sender<_> = pipeline_ended_sender;
            let _ = ended.send(pipeline::run(state, &reader, &inputs, &outputs));
        })
        .context("cannot start the pipeline's thread")?;

    let reason = runtime.block_on(async {
        let containerd =
            Containerd::start(&config.containerd, &change_sender, recorder.clone(), &health);
        tokio::spawn(respond::run(containerd.clone(), orders, response_sender));
        let listener = api::Listener::bind(&config.socket)?;
        let backend = api::Backend {
            node,
            questions: question_sender,
            history: writer.reader(),
            committed: writer.committed(),
            health: health.clone(),
            baselines: store,
            recorder: recorder.clone(),
            images: Arc::new(containerd),
        };
        tokio::spawn(feed_watchdog(pulse));
        // Without systemd there is nobody to tell, which is no error.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        tracing::info!(socket = %config.socket.display(), "driftd is watching");

        let guardian_ended = tokio::task::spawn_blocking(move || guardian.wait());
        let gate_ended = tokio::task::spawn_blocking(move || pidfd::wait(gate_ended.as_fd()));
        let reason = tokio::select! {
            result = api::serve(listener, backend, asked_to_stop()) => result.context("the API server failed"),
            ended = pipeline_ended => match ended {
                Ok(Err(err)) => Err(err).context("cannot read the history"),
                Ok(Ok(())) | Err(_) => Err(anyhow::anyhow!("the pipeline ended")),
            },
            status = guardian_ended => Err(anyhow::anyhow!(
                "the guardian ended ({status:?}): without it a stuck gate would freeze containers"
            )),
            _ = gate_ended => Err(anyhow::anyhow!(
                "the gate's process ended: without it executions are not seen"
            )),
        };
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        reason
    });

    // The gate first: from here on the kernel answers by itself. Then from left to
    // right, so that what was seen is still judged and kept.
    let stopped = thread::spawn(move || {
        watch.close_gate();
        // The guardian and the heart are needed as long as the gate is open.
        drop((guarding, heart));
        watch.stop();
        drop(stop_sender);
        let _ = pipeline.join();
        recorder.stop();
        writer.stop();
    });
    let deadline = std::time::Instant::now() + GRACE;
    while !stopped.is_finished() && std::time::Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    if !stopped.is_finished() {
        tracing::warn!(grace = ?GRACE, "gave up waiting for the history to be written");
    }
    runtime.shutdown_background();
    reason.map(|()| Exit::Clean)
}

/// The free gate is only for kernels that can be relied upon for it.
fn settle_the_gate(config: &Config, health: &Health) -> config::Watch {
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

/// systemd asks with SIGTERM, a person at a terminal with SIGINT.
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

/// Reports to systemd's watchdog as long as the daemon and its gate make progress.
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

/// The log goes to standard error, where systemd takes it. `DRIFTD_LOG` chooses
/// what is logged, in tracing's filter syntax. A thread of its own writes it,
/// until the guard is dropped: whoever reads standard error may be waiting for us.
fn start_log() -> WorkerGuard {
    use std::io::IsTerminal as _;
    use tracing_subscriber::EnvFilter;
    use tracing_subscriber::filter::LevelFilter;
    let filter = EnvFilter::builder()
        .with_default_directive(LevelFilter::INFO.into())
        .with_env_var("DRIFTD_LOG")
        .from_env_lossy();
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    let log = tracing_subscriber::fmt()
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal())
        .with_env_filter(filter);
    // The journal has its own clock.
    if std::env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().init();
    } else {
        log.init();
    }
    guard
}

/// Baselines and findings tell an attacker what is watched: they are root's.
fn create_private(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("cannot create the state directory {}", directory.display()))
}
