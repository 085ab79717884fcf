//! Calls to the daemon, and what their failures mean to a person.

use std::future::Future;
use std::io;
use std::path::Path;

use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::output::safe;
use crate::api::proto::drift_service_client::DriftServiceClient;

pub(super) type Client = DriftServiceClient<Channel>;

/// A list of differences is one message.
const MAX_MESSAGE: usize = 64 << 20;

/// Runs a conversation with the daemon behind `socket`.
pub(super) fn talk<T, F>(socket: &Path, conversation: impl FnOnce(Client) -> F) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async { conversation(connect(socket).await?).await });
    // A thread that reads stdin or a name service must not keep us.
    runtime.shutdown_background();
    result
}

async fn connect(socket: &Path) -> anyhow::Result<Client> {
    // tonic's own error would hide what the kernel said.
    if let Err(err) = tokio::net::UnixStream::connect(socket).await {
        let (name, err_text) = (socket.display(), err.to_string());
        return Err(match err.kind() {
            io::ErrorKind::PermissionDenied => anyhow::anyhow!(
                "may not use {name}: only root and members of the group driftd may (try: sudo)"
            ),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => anyhow::anyhow!(
                "cannot reach driftd at {name} (is the daemon running? try: systemctl status driftd)"
            ),
            _ => anyhow::anyhow!(
                "cannot reach driftd at {name}: {err_text} (name its socket with --socket or \
                 DRIFTD_SOCKET)"
            ),
        });
    }
    let channel = Endpoint::try_from(format!("unix:{}", std::path::absolute(socket)?.display()))?
        .connect()
        .await?;
    Ok(DriftServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// What the daemon's refusal means. Its words are for people already.
#[expect(clippy::needless_pass_by_value, reason = "this is how `map_err` calls it")]
pub(super) fn explain(status: Status) -> anyhow::Error {
    let message = safe(status.message());
    match status.code() {
        Code::NotFound
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::PermissionDenied => anyhow::anyhow!(message),
        Code::Unavailable | Code::Cancelled | Code::Unknown => anyhow::anyhow!(
            "driftd went away while it was asked: {message} (try: systemctl status driftd)"
        ),
        Code::Unimplemented => anyhow::anyhow!(
            "the running driftd is older than this command and cannot do this (restart it: \
             systemctl restart driftd)"
        ),
        code => anyhow::anyhow!("driftd could not answer: {message} ({code:?})"),
    }
}
