//! `driftd hooks`: runs the programs of hooks, as the daemon asks for them.
//!
//! A process of its own, because the daemon's unit has no network and may write almost nothing.
//! Owns the connection, which is made again when the daemon restarts. The room `hooks` runs the
//! programs.

use std::io::{PipeReader, PipeWriter};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::{JoinSet, LocalSet};
use tonic::Code;

use super::client::{Client, Server, connect, explain, is_final};
use super::exit::Exit;
use super::output::safe;
use crate::api::{convert, proto};
use crate::hooks;

/// How long the runner waits before it connects again.
const RECONNECT: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(super) struct Hooks {
    /// How many hooks run at the same time, each in another container
    #[arg(long, value_name = "NUMBER", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    at_once: u32,
}

/// The programs that run. What is dropped of `stop` ends them.
struct Running {
    tasks: JoinSet<()>,
    stop: Option<PipeWriter>,
    stopped: Arc<PipeReader>,
}

/// The signals that ask the runner to stop.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        let terminate = signal(SignalKind::terminate())?;
        Ok(Signals { terminate, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => (),
            _ = self.interrupt.recv() => (),
        }
    }
}

/// A connection to the daemon: each message is a program to run.
type Orders = (Client, tonic::Streaming<proto::HookRun>);

impl Hooks {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(LocalSet::new().run_until(self.serve(socket)));
        runtime.shutdown_background();
        result
    }

    async fn serve(self, socket: &Path) -> anyhow::Result<Exit> {
        let (stopped, stop) = std::io::pipe()?;
        let mut running =
            Running { tasks: JoinSet::new(), stop: Some(stop), stopped: Arc::new(stopped) };
        let result = self.run_all(socket, &mut running).await;
        running.end().await;
        result.map(|()| Exit::Clean)
    }

    /// Runs what the daemon asks for, until a signal comes.
    async fn run_all(&self, socket: &Path, running: &mut Running) -> anyhow::Result<()> {
        let mut signals = Signals::new()?;
        let (mut was_connected, mut is_waiting) = (false, false);
        loop {
            let connected = tokio::select! {
                () = signals.any() => return Ok(()),
                connected = self.connect(socket, was_connected) => connected?,
            };
            let why = match connected {
                Ok(orders) => {
                    eprintln!("connected to driftd at {}", socket.display());
                    (was_connected, is_waiting) = (true, false);
                    match running.follow(orders, &mut signals).await {
                        Some(why) => why,
                        None => return Ok(()),
                    }
                }
                Err(why) => why,
            };
            if !is_waiting {
                eprintln!("waiting for driftd: {why}");
                is_waiting = true;
            }
            tokio::select! {
                () = signals.any() => return Ok(()),
                () = tokio::time::sleep(RECONNECT) => (),
            }
        }
    }

    /// The inner error says why there is no connection yet. The outer one is final.
    async fn connect(
        &self,
        socket: &Path,
        was_connected: bool,
    ) -> anyhow::Result<Result<Orders, String>> {
        let mut client = match connect(Server::Daemon(socket)).await {
            Ok(client) => client,
            Err(err) => return Ok(Err(err.to_string())),
        };
        match client.run_hooks(proto::RunHooksRequest { at_once: self.at_once }).await {
            Ok(stream) => Ok(Ok((client, stream.into_inner()))),
            Err(status) => {
                // After a restart of driftd, another runner may have been quicker.
                let is_refused = status.code() == Code::FailedPrecondition && !was_connected;
                if is_final(&status) || is_refused {
                    return Err(explain(status));
                }
                Ok(Err(safe(status.message())))
            }
        }
    }
}

impl Running {
    /// Starts what comes from the daemon. Returns why nothing comes any more; `None` when a
    /// signal has come.
    async fn follow(
        &mut self,
        (client, mut stream): Orders,
        signals: &mut Signals,
    ) -> Option<String> {
        loop {
            // Those that have ended need no place.
            while self.tasks.try_join_next().is_some() {}
            let message = tokio::select! {
                () = signals.any() => {
                    // While the stream is open, the daemon takes what is reported.
                    self.end().await;
                    return None;
                }
                message = stream.message() => message,
            };
            match message {
                Ok(Some(run)) => {
                    let (client, stopped) = (client.clone(), Arc::clone(&self.stopped));
                    self.tasks.spawn_local(run_one(client, run, stopped));
                }
                Ok(None) => return Some("it has ended the stream".to_owned()),
                Err(status) => return Some(safe(status.message())),
            }
        }
    }

    /// Kills all that runs, and reports each end.
    async fn end(&mut self) {
        self.stop = None;
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Runs one program and reports how it has ended.
async fn run_one(mut client: Client, run: proto::HookRun, stopped: Arc<PipeReader>) {
    let (number, order) = convert::order_from_proto(run);
    let (hook, timeout) = (safe(&order.hook), order.timeout);
    let container = ["DRIFTD_NAMESPACE", "DRIFTD_CONTAINER"]
        .map(|name| safe(order.environment.get(name).map_or("", String::as_str)))
        .join("/");
    let ended = tokio::task::spawn_blocking(move || hooks::execute(&order, stopped.as_fd())).await;
    let ended = ended.unwrap_or_else(|err| hooks::End::NotStarted(err.to_string()).into());
    eprintln!("hook {hook} for {container}: {}", ended.message(timeout));
    if let Err(status) = client.end_hook(convert::ended_to_proto(number, ended)).await {
        eprintln!("driftd does not know the end of hook {hook}: {}", safe(status.message()));
    }
}
