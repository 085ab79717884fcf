//! What the failures of other rooms mean as a gRPC status.
//!
//! Also runs blocking work on threads where it does not delay other requests.

use tonic::Status;

use super::convert;
use crate::history::{self, Lookup};
use crate::pipeline::LookupError;

/// Runs work that blocks (on a disk) on a thread of its own.
pub(super) async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|err| Status::internal(err.to_string()))
}

pub(super) fn stopping() -> Status {
    Status::unavailable("driftd is stopping")
}

pub(super) fn history_failed(err: &history::Error) -> Status {
    tracing::error!("the history cannot be read: {err}");
    Status::internal(err.to_string())
}

/// A stored text is not what driftd stores.
pub(super) fn unreadable(err: &serde_json::Error) -> Status {
    tracing::error!("the history holds what cannot be read: {err}");
    Status::internal(format!("the history holds what cannot be read: {err}"))
}

pub(super) fn lookup_failed(err: &LookupError) -> Status {
    match err {
        LookupError::Unknown(_)
        | LookupError::NotWhole(..)
        | LookupError::UnknownProbe(_)
        | LookupError::UnknownHook(_) => Status::not_found(err.to_string()),
        LookupError::Ambiguous(..) => Status::invalid_argument(err.to_string()),
        LookupError::NotWatched(..) | LookupError::Gone(_) | LookupError::RunGone(_) => {
            Status::failed_precondition(err.to_string())
        }
        LookupError::Stopping => Status::unavailable(err.to_string()),
    }
}

/// The one finding, session or probe (`what`) that the user has named by `shown`.
pub(super) fn the_one<T>(found: Lookup<T>, what: &str, shown: &str) -> Result<Box<T>, Status> {
    match found {
        Lookup::Found(one) => Ok(one),
        Lookup::Unknown => {
            Err(Status::not_found(format!("no {what} `{shown}` (see: driftd {what}s)")))
        }
        Lookup::Ambiguous(count) => Err(Status::invalid_argument(format!(
            "`{shown}` could be {count} {what}s: write more of the ID"
        ))),
    }
}

pub(super) fn optional_time(
    field: &'static str,
    time: Option<prost_types::Timestamp>,
) -> Result<Option<jiff::Timestamp>, Status> {
    convert::optional_time_from_proto(field, time)
        .map_err(|err| Status::invalid_argument(err.to_string()))
}
