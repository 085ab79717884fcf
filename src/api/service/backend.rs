//! What every request needs: the pipeline, the history, the baselines.
//!
//! Does not know any message but the requests to the pipeline.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

use crate::api::baselines::RecordImage;
use crate::api::failure::{history_failed, lookup_failed, stopping, unblock};
use crate::api::follow::Followers;
use crate::baseline;
use crate::evidence;
use crate::health::Health;
use crate::history;
use crate::hooks::Queue;
use crate::pipeline::{ApiRequest, LookupError};
use crate::policy;

/// How long the pipeline may be too busy to take a request.
pub(super) const BUSY: Duration = Duration::from_secs(5);
/// How long the history may take to keep what a request has changed.
const KEPT_WITHIN: Duration = Duration::from_secs(10);

/// What only a running daemon has.
#[derive(Clone)]
pub struct Backend {
    /// This node's name.
    pub node: String,
    pub requests: Sender<ApiRequest>,
    pub history: history::Reader,
    /// The newest sequence number in the history.
    pub committed: watch::Receiver<u64>,
    pub health: Arc<Health>,
    pub baselines: Arc<baseline::Store>,
    pub recorder: baseline::Recorder,
    pub images: Arc<dyn RecordImage>,
    /// Requests to read the policy files again.
    pub policy_reloads: mpsc::Sender<PolicyReload>,
    pub evidence: Arc<evidence::Store>,
    /// Where hooks wait for a runner.
    pub hooks: Queue,
}

/// The client that waits until the policy files were read again.
pub type PolicyReload = oneshot::Sender<Result<(), policy::Refused>>;

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("node", &self.node).finish_non_exhaustive()
    }
}

#[derive(Clone)]
pub(crate) struct Service {
    /// `None` if a history is read without a daemon.
    pub(crate) live: Option<Backend>,
    pub(crate) history: history::Reader,
    /// The newest sequence number in the history.
    pub(crate) committed: watch::Receiver<u64>,
    /// Becomes true when driftd stops.
    pub(crate) stopping: watch::Receiver<bool>,
    pub(crate) followers: Followers,
}

impl Service {
    pub(super) fn backend(&self) -> Result<&Backend, Status> {
        self.live.as_ref().ok_or_else(|| {
            Status::failed_precondition(
                "a history holds what was found, and only a running driftd can do this",
            )
        })
    }

    pub(super) fn store(&self) -> Result<Arc<baseline::Store>, Status> {
        Ok(Arc::clone(&self.backend()?.baselines))
    }

    /// Sends a request to the pipeline and waits for the reply. The channel is bounded, so
    /// that clients cannot hold up the pipeline.
    pub(super) async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<T>) -> ApiRequest,
    ) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        let requests = &self.backend()?.requests;
        match requests.try_send(request(reply)) {
            Ok(()) => (),
            Err(TrySendError::Full(request)) => {
                let requests = requests.clone();
                unblock(move || requests.send_timeout(request, BUSY)).await?.map_err(|_| {
                    Status::unavailable("driftd is too busy to answer, try again in a moment")
                })?;
            }
            Err(TrySendError::Disconnected(_)) => {
                return Err(lookup_failed(&LookupError::Stopping));
            }
        }
        answer.await.map_err(|_| lookup_failed(&LookupError::Stopping))
    }

    /// The same for requests that the pipeline may refuse.
    pub(super) async fn ask_for<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, LookupError>>) -> ApiRequest,
    ) -> Result<T, Status> {
        self.ask(request).await?.map_err(|err| lookup_failed(&err))
    }

    /// Reads the history, on a thread that may block.
    pub(super) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&history::Reader) -> Result<T, history::Error> + Send + 'static,
    ) -> Result<T, Status> {
        let reader = self.history.clone();
        unblock(move || read(&reader)).await?.map_err(|err| history_failed(&err))
    }

    /// Waits until the history has kept a change. After that a client that has received the
    /// reply finds the change in the history, even if driftd is killed. `done` describes the
    /// change, for the error if it cannot be kept.
    pub(super) async fn wait_until_kept(
        &self,
        done: &str,
        is_kept: impl Fn(&history::Reader) -> Result<bool, history::Error> + Clone + Send + 'static,
    ) -> Result<(), Status> {
        let mut committed = self.committed.clone();
        let kept = async {
            loop {
                committed.mark_unchanged();
                if self.read(is_kept.clone()).await? {
                    return Ok(());
                }
                if committed.changed().await.is_err() {
                    return Err(stopping());
                }
            }
        };
        tokio::time::timeout(KEPT_WITHIN, kept).await.unwrap_or_else(|_| {
            Err(Status::data_loss(format!(
                "{done} (but the history could not keep it; see: driftd status)"
            )))
        })
    }
}
