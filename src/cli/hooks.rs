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

use tokio::signal::unix::{SignalKind, signal};
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
        let (mut terminate, mut interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let result = tokio::select! {
            _ = terminate.recv() => Ok(Exit::Clean),
            _ = interrupt.recv() => Ok(Exit::Clean),
            ended = self.run_all(socket, &mut running) => ended,
        };
        // They are killed, and each end is reported.
        running.stop = None;
        while running.tasks.join_next().await.is_some() {}
        result
    }

    /// Runs what the daemon asks for. Ends with an error only.
    async fn run_all(&self, socket: &Path, running: &mut Running) -> anyhow::Result<Exit> {
        let request = proto::RunHooksRequest { at_once: self.at_once };
        let (mut was_connected, mut is_waiting) = (false, false);
        loop {
            let why = match connect(Server::Daemon(socket)).await {
                Err(err) => err.to_string(),
                Ok(mut client) => match client.run_hooks(request).await {
                    Ok(stream) => {
                        eprintln!("connected to driftd at {}", socket.display());
                        (was_connected, is_waiting) = (true, false);
                        running.follow(&client, stream.into_inner()).await
                    }
                    // After a restart of driftd, another runner may have been quicker.
                    Err(status) if is_final(&status) || is_refused(&status, was_connected) => {
                        return Err(explain(status));
                    }
                    Err(status) => safe(status.message()),
                },
            };
            if !is_waiting {
                eprintln!("waiting for driftd: {why}");
                is_waiting = true;
            }
            tokio::time::sleep(RECONNECT).await;
        }
    }
}

fn is_refused(status: &tonic::Status, was_connected: bool) -> bool {
    status.code() == Code::FailedPrecondition && !was_connected
}

impl Running {
    /// Starts what comes from the daemon. Returns why nothing comes any more.
    async fn follow(
        &mut self,
        client: &Client,
        mut stream: tonic::Streaming<proto::HookRun>,
    ) -> String {
        loop {
            // Those that have ended need no place.
            while self.tasks.try_join_next().is_some() {}
            match stream.message().await {
                Ok(Some(run)) => {
                    let (client, stopped) = (client.clone(), Arc::clone(&self.stopped));
                    self.tasks.spawn_local(run_one(client, run, stopped));
                }
                Ok(None) => return "it has ended the stream".to_owned(),
                Err(status) => return safe(status.message()),
            }
        }
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
