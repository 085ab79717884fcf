//! Hooks: the stream of those that a runner is to run, and how each has ended.
//!
//! Connects a runner with the queue. Who may be a runner, `peer` checks as for every request.

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::backend::Service;
use super::baselines::STREAM;
use crate::api::{convert, proto};
use crate::hooks::Connection;

/// Hooks that a runner may run at the same time.
const MAX_AT_ONCE: u32 = 64;

type Orders = ReceiverStream<Result<proto::HookRun, Status>>;

impl Service {
    /// `client`: the runner, for the message to a second one.
    pub(super) fn run_hooks(
        &self,
        request: proto::RunHooksRequest,
        client: String,
    ) -> Result<Orders, Status> {
        let proto::RunHooksRequest { at_once } = request;
        if !(1..=MAX_AT_ONCE).contains(&at_once) {
            return Err(Status::invalid_argument(format!("at_once is not 1 to {MAX_AT_ONCE}")));
        }
        let at_once = usize::try_from(at_once).unwrap_or(1);
        let hooks = &self.backend()?.hooks;
        let connection = hooks
            .connect(at_once, client.clone())
            .map_err(|busy| Status::failed_precondition(busy.to_string()))?;
        tracing::info!(client, "a runner of hooks is connected");
        let (runner, orders) = mpsc::channel(STREAM);
        let stopping = self.stopping.clone();
        tokio::spawn(async move {
            hand_on(connection, runner, stopping).await;
            tracing::info!(client, "the runner of hooks is gone");
        });
        Ok(ReceiverStream::new(orders))
    }

    pub(super) fn end_hook(
        &self,
        request: proto::EndHookRequest,
    ) -> Result<proto::EndHookResponse, Status> {
        let number = request.number;
        let ended = convert::ended_from_proto(request)
            .ok_or_else(|| Status::invalid_argument("how the hook has ended is missing"))?;
        if self.backend()?.hooks.ended(number, ended) {
            Ok(proto::EndHookResponse {})
        } else {
            Err(Status::not_found(format!("the end of the hook {number} is not waited for")))
        }
    }
}

/// Sends orders until the runner is gone or the daemon stops.
async fn hand_on(
    mut connection: Connection,
    runner: mpsc::Sender<Result<proto::HookRun, Status>>,
    mut stopping: watch::Receiver<bool>,
) {
    let stops = async {
        // Dropped at once, because the returned value holds a lock.
        drop(stopping.wait_for(|stopping| *stopping).await);
    };
    let orders = async {
        while let Some((number, order)) = connection.orders.recv().await {
            if runner.send(Ok(convert::order_to_proto(number, order))).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = runner.closed() => (),
        () = stops => (),
        () = orders => (),
    }
}
