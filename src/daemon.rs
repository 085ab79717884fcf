//! Starts every room, and stops them all when the first one ends.
//!
//! Nothing here is clever on purpose: this file is the map of what runs.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::bounded;
use jiff::Timestamp;
use tokio::signal::unix::{SignalKind, signal};

use crate::baseline::{Recorder, Store};
use crate::cli::exit::Exit;
use crate::config::{self, Arm, Config};
use crate::containerd::{Containerd, ContentBlobs, Lane, Urgent};
use crate::gate::{self, Gate};
use crate::guardian::{Guardian, Heart};
use crate::health::{Failure, Gating, Health, Missing};
use crate::history::{History, Keep, Record, Writer};
use crate::journal;
use crate::model::SessionState;
use crate::model::session::MAX_COMMANDS;
use crate::pipeline::{self, ApiRequest, Inputs, Outputs, State};
use crate::policy::Policy;
use crate::pulse::{Part, Pulse};
use crate::sys::capabilities::{self, Capabilities};
use crate::sys::channel::Channel;
use crate::sys::procfs::Handle;
use crate::sys::{pidfd, process};
use crate::threads::stop::{self, Stage};
use crate::threads::{self, Left, Role, Threads};
use crate::watch::{self, LEFT_TO_THE_START, Scope, SensorCommand, Watch};
use crate::{api, respond};

/// The order in which a stop ends everything, each stage with how long it may take: the
/// gate, so that the kernel answers by itself from there on, and then from left to right,
/// so that what was seen is still judged, kept and told. systemd's own limit is longer
/// (`TimeoutStopSec=`), so that we, not it, choose.
const STOP: [(&str, Duration); 7] = [
    ("gate", Duration::from_millis(500)),
    ("containerd", Duration::from_millis(500)),
    ("watchers", Duration::from_millis(4500)),
    ("pipeline", Duration::from_millis(4000)),
    ("baselines", Duration::from_millis(1000)),
    ("history", Duration::from_millis(3000)),
    ("followers", Duration::from_millis(1500)),
];

/// The daemon, in the foreground, until it is asked to stop. `reread` reads the settings
/// again.
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
    let _log = journal::start_log();
    let since = Timestamp::now();
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
    let now = Timestamp::now();
    let mut state = State::new(node.clone(), Policy::of(config), health.clone(), findings, now);
    let gap = history.last_beat().map(|beat| state.was_not_running(beat, now));
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
    heart.progress().needs(health.threads.beats());
    if config.watch.arm == Arm::Strict {
        watch.arm_before_start(&Scope {
            runtimes: config.watch.runtimes.clone(),
            sockets: config.containerd.sockets.clone(),
            exclude_namespaces: config.containerd.exclude_namespaces.clone(),
        })?;
    }
    let writer = history.start(keep_of(config), health.clone());
    let logged = *writer.committed().borrow();
    if let Some(gap) = gap {
        let _ = writer.records().send(gap);
    }

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
    let history_begun = writer.begun();
    let inputs = Inputs { changes, reports, news, questions, responses, history_begun, stop };
    let outputs = Outputs {
        commands: watch.commands(),
        recorder: recorder.clone(),
        records: writer.records(),
        orders: order_sender,
    };
    let (pipeline_ended_sender, pipeline_ended) = tokio::sync::oneshot::channel();
    let depth = threads::depth_of(&inputs.reports);
    health.threads.show_queue("containerd", threads::depth_of(&inputs.changes));
    // Weak, so that the orders end with the pipeline.
    let waiting = outputs.orders.downgrade();
    let waiting = move || waiting.upgrade().map_or(0, |to| to.max_capacity() - to.capacity());
    health.threads.show_queue("respond", Box::new(waiting));
    // It waits for the history's disk as well.
    let run_pipeline = move || {
        let _ = pipeline_ended_sender.send(pipeline::run(state, &reader, &inputs, &outputs));
    };
    health
        .threads
        .spawn(PIPELINE, Role::Disk, Some(depth), run_pipeline)
        .context("cannot start the pipeline's thread")?;
    let (gave_up_sender, mut gave_up) = tokio::sync::mpsc::unbounded_channel();
    health.threads.on_give_up(move |reason| drop(gave_up_sender.send(reason)));

    // Who marks containers is told of them at once: the pipeline may wait for the disk.
    let commands = watch.commands();
    // Without room, the pipeline's own command marks it.
    let lane: Lane = Arc::new(move |urgent| drop(commands.try_send(command_for(urgent))));
    let (end_api, api_ends) = tokio::sync::oneshot::channel::<()>();
    let containerd = {
        let _runtime = runtime.enter();
        let recording = recorder.clone();
        Containerd::start_with(&config.containerd, &change_sender, recording, &health, Some(&lane))
    };
    drop(change_sender);

    let served = runtime.block_on(async {
        tokio::spawn(respond::run(containerd.clone(), orders, response_sender));
        let listener = api::Listener::bind(&config.socket)?;
        let reloading = Reloading {
            config: config.clone(),
            keep: Box::new(writer.keeper()),
            questions: question_sender.clone(),
        };
        tokio::spawn(reload_when_asked(hangups()?, reread, reloading));
        let log = journal::follow(writer.reader(), writer.committed(), logged, since);
        let log = tokio::spawn(log);
        let backend = api::Backend {
            node,
            questions: question_sender,
            history: writer.reader(),
            committed: writer.committed(),
            health: health.clone(),
            baselines: store,
            recorder: recorder.clone(),
            images: Arc::new(containerd.clone()),
        };
        tokio::spawn(feed_watchdog(pulse));
        // Without systemd there is nobody to tell, which is no error.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        tracing::info!(socket = %config.socket.display(), "driftd is watching");

        let guardian_ended = tokio::task::spawn_blocking(move || guardian.wait());
        let gate_ended = tokio::task::spawn_blocking(move || pidfd::wait(gate_ended.as_fd()));
        // It goes on until what was seen before a stop is told to its followers.
        let mut api = tokio::spawn(api::serve(listener, backend, async { drop(api_ends.await) }));
        let reason = tokio::select! {
            () = asked_to_stop() => Ok(()),
            result = &mut api => match result {
                Ok(result) => result.context("the API server failed"),
                Err(err) => Err(err).context("the API server failed"),
            },
            Some(reason) = gave_up.recv() => Err(anyhow::anyhow!(reason)),
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
        anyhow::Ok((reason, (api, log)))
    });
    let (reason, followers) = match served {
        Ok((reason, followers)) => (reason, Some(followers)),
        Err(err) => (Err(err), None),
    };
    stop::run(stages(
        Running {
            watch: Arc::new(watch),
            watched_by: (guarding, heart),
            containerd,
            stop_sender,
            recorder,
            writer,
            end_api,
            followers,
        },
        runtime.handle(),
        &health.threads,
    ));
    runtime.shutdown_background();
    reason.map(|()| Exit::Clean)
}

/// The name of the pipeline's thread.
const PIPELINE: &str = "pipeline";

/// What is there to be stopped.
struct Running {
    watch: Arc<Watch>,
    /// The guardian's channel and the heart, needed as long as the gate is open.
    watched_by: (Channel, Heart),
    containerd: Containerd,
    stop_sender: crossbeam_channel::Sender<std::convert::Infallible>,
    recorder: Recorder,
    writer: Writer,
    end_api: tokio::sync::oneshot::Sender<()>,
    followers: Option<(ApiTask, tokio::task::JoinHandle<()>)>,
}

type ApiTask = tokio::task::JoinHandle<Result<(), api::Error>>;

/// What each stage of a stop does, and what it leaves undone.
fn stages(running: Running, runtime: &tokio::runtime::Handle, threads: &Threads) -> Vec<Stage> {
    type Work = (Box<dyn FnOnce(Instant) + Send>, Box<dyn Fn() -> Vec<Left>>);
    let Running {
        watch,
        watched_by,
        containerd,
        stop_sender,
        recorder,
        writer,
        end_api,
        followers,
    } = running;
    let nothing = || Vec::new();
    let unwritten = writer.left();
    let (gate, watchers, drained, unreported) =
        (watch.clone(), watch.clone(), watch.clone(), watch);
    let (end_of_pipeline, pipeline, runtime) = (threads.clone(), threads.clone(), runtime.clone());
    let (of_pipeline, began) = (threads.clone(), Timestamp::now());
    let works: [Work; STOP.len()] = [
        (
            Box::new(move |_| {
                gate.close_gate();
                drop(watched_by);
            }),
            Box::new(nothing),
        ),
        (Box::new(move |_| containerd.stop_following()), Box::new(nothing)),
        (Box::new(move |deadline| watchers.drain(deadline)), Box::new(move || drained.left())),
        (
            Box::new(move |deadline| {
                drop(stop_sender);
                end_of_pipeline.wait_for_end(&[PIPELINE], deadline);
            }),
            Box::new(move || pipeline.left(&[PIPELINE])),
        ),
        (Box::new(move |_| recorder.stop()), Box::new(nothing)),
        (
            Box::new(move |_| {
                let mut left = unreported.left();
                left.extend(of_pipeline.left(&[PIPELINE]));
                let is_all = left.iter().all(|left| left.count == 0);
                if let Some(gap) = left_by_a_stop(began, &left) {
                    let _ = writer.records().try_send(gap);
                }
                writer.stop_after(is_all);
            }),
            Box::new(unwritten),
        ),
        (
            Box::new(move |_| {
                let _ = end_api.send(());
                if let Some((api, log)) = followers {
                    // The history has ended, and with that the log ends by itself.
                    runtime.block_on(async {
                        let served = async {
                            if !api.is_finished() {
                                let _ = api.await;
                            }
                        };
                        let _ = tokio::join!(served, log);
                    });
                }
            }),
            Box::new(nothing),
        ),
    ];
    let stage = |((name, within), (run, left)): (_, Work)| Stage { name, within, run, left };
    STOP.into_iter().zip(works).map(stage).collect()
}

/// What a stop that began at `began` had no time for, and no start finds again.
fn left_by_a_stop(began: Timestamp, left: &[Left]) -> Option<Record> {
    let left = left.iter().filter(|left| left.count > 0 && left.what != LEFT_TO_THE_START);
    let left: Vec<String> = left.map(|Left { what, count }| format!("{count} {what}")).collect();
    (!left.is_empty()).then(|| Record::Gap {
        name: Failure::NotRunning.name().into(),
        container: None,
        detail: format!("a stop had no time for all that was seen: {}", left.join(", ")),
        at: began,
        until: Some(Timestamp::now()),
    })
}

/// What is asked of the watchers when containerd tells of a task.
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

/// SIGHUP: `systemctl reload`, or a terminal that is closed. Both mean the same here.
fn hangups() -> anyhow::Result<tokio::signal::unix::Signal> {
    let hangups = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    process::take_hangups().context("cannot listen for SIGHUP")?;
    Ok(hangups)
}

/// What settings are given to that may change while driftd runs.
struct Reloading {
    config: Config,
    keep: Box<dyn Fn(Keep) + Send>,
    questions: crossbeam_channel::Sender<ApiRequest>,
}

/// Reads the settings again at each SIGHUP. A wrong file is refused whole.
async fn reload_when_asked(
    mut hangups: tokio::signal::unix::Signal,
    reread: impl Fn() -> anyhow::Result<Config>,
    mut now: Reloading,
) {
    use sd_notify::NotifyState;
    while hangups.recv().await.is_some() {
        let _ = sd_notify::notify(&[NotifyState::Reloading]);
        let status = match reread() {
            Err(err) => {
                tracing::error!("the settings were not read again, the old ones stay: {err:#}");
                "the last reload failed: the old settings stay (see the log)".to_owned()
            }
            Ok(new) => apply(&mut now, &new).await,
        };
        let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
    }
}

/// Applies what can be applied, and reports in words what came of it.
async fn apply(now: &mut Reloading, new: &Config) -> String {
    let config::Reloaded { config, applied, at_restart } = now.config.reloaded(new);
    // With what is in force and not with the new file: only some of that applies.
    let mut policy = Some(Box::new(Policy::of(&config)));
    // The pipeline may be waiting for a disk; a worker of the runtime must not.
    while let Some(asked) = policy.take() {
        match now.questions.try_send(ApiRequest::SetPolicy(asked)) {
            Ok(()) => (),
            Err(crossbeam_channel::TrySendError::Full(ApiRequest::SetPolicy(asked))) => {
                policy = Some(asked);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(_) => return "driftd is stopping".to_owned(),
        }
    }
    (now.keep)(keep_of(&config));
    now.config = config;
    let names = |names: &[String]| match names {
        [] => "nothing".to_owned(),
        names => names.join(", "),
    };
    let mut status = format!("the settings were read again; changed: {}", names(&applied));
    if at_restart.is_empty() {
        tracing::info!("{status}");
    } else {
        status +=
            &format!("; changed in the file, in force after a restart: {}", names(&at_restart));
        tracing::warn!("{status}");
    }
    status
}

fn keep_of(config: &Config) -> Keep {
    Keep { retention: config.history.retention, max_bytes: config.history.max_bytes }
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

/// Baselines and findings tell an attacker what is watched: they are root's.
fn create_private(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory);
    if made.as_ref().is_err_and(crate::history::is_of_the_disk) {
        // The history says it, and is kept in memory.
        return Ok(());
    }
    made.with_context(|| format!("cannot create the state directory {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_a_gap_for_what_no_start_finds_again() {
        let left = |what, count| Left { what, count };
        let gap = |left: &[Left]| left_by_a_stop(Timestamp::UNIX_EPOCH, left);
        assert_eq!(gap(&[left("items taken and not told", 0), left(LEFT_TO_THE_START, 3)]), None);
        let Some(Record::Gap { name, detail, .. }) = gap(&[left("executions", 2)]) else {
            panic!("no gap")
        };
        assert_eq!(name, "not_running");
        assert!(detail.ends_with(": 2 executions"), "{detail}");
    }

    #[test]
    fn a_stop_closes_the_gate_first_and_ends_before_systemd_loses_patience() {
        let names = STOP.map(|(name, _)| name);
        let expected =
            ["gate", "containerd", "watchers", "pipeline", "baselines", "history", "followers"];
        assert_eq!(names, expected);
        let longest: Duration = STOP.iter().map(|(_, within)| *within).sum();
        let unit = include_str!("../systemd/driftd.service");
        let limit = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec="));
        let limit = limit.and_then(|limit| limit.strip_suffix('s')).unwrap();
        assert!(longest + Duration::from_secs(3) < Duration::from_secs(limit.parse().unwrap()));
        // The pipeline's own limit leaves time for what it says last.
        let (_, within) = STOP.into_iter().find(|(name, _)| *name == PIPELINE).unwrap();
        assert!(pipeline::DRAIN_WITHIN < within);
    }
}
