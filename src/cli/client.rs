//! Sends requests to the daemon or to a history, and explains failures to people.
//!
//! The only place of the command line that connects to the socket. Prints nothing.

use std::future::Future;
use std::io;
use std::path::Path;

use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tower::ServiceExt as _;

use super::output::safe;
use crate::api::Transport;
use crate::api::proto::drift_service_client::DriftServiceClient;

pub(super) type Client = DriftServiceClient<Transport>;

/// Where requests are sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Server<'a> {
    /// The daemon that serves this socket.
    Daemon(&'a Path),
    /// A history, or the state directory that it lies in, without a daemon.
    History(&'a Path),
}

impl<'a> From<&'a Path> for Server<'a> {
    fn from(socket: &'a Path) -> Server<'a> {
        Server::Daemon(socket)
    }
}

/// The largest message that is read, in bytes: a list of differences may be one message.
const MAX_MESSAGE: usize = 64 << 20;

/// Connects and runs `conversation`, which may send any number of requests.
pub(super) fn talk<'a, T, F>(
    server: impl Into<Server<'a>>,
    conversation: impl FnOnce(Client) -> F,
) -> anyhow::Result<T>
where
    F: Future<Output = anyhow::Result<T>>,
{
    let server = server.into();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async { conversation(connect(server).await?).await });
    // Does not wait for a thread that reads stdin or a name service.
    runtime.shutdown_background();
    result
}

/// Connects, sends one request and returns the reply.
pub(super) fn call<'a, Q, A>(
    server: impl Into<Server<'a>>,
    request: Q,
    method: impl AsyncFnOnce(&mut Client, Q) -> Result<tonic::Response<A>, Status>,
) -> anyhow::Result<A> {
    talk(server, |mut client| async move {
        Ok(method(&mut client, request).await.map_err(explain)?.into_inner())
    })
}

pub(super) async fn connect(server: Server<'_>) -> anyhow::Result<Client> {
    let socket = match server {
        Server::Daemon(socket) => socket,
        Server::History(path) => {
            let reader = crate::history::Reader::of_file(path)?;
            let history = crate::api::without_daemon(reader);
            return Ok(DriftServiceClient::new(history).max_decoding_message_size(MAX_MESSAGE));
        }
    };
    // tonic's own error would hide the one of the kernel.
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
        // A page at once: with the usual 64 KiB it comes in many turns.
        .initial_stream_window_size(PAGE_WINDOW)
        .initial_connection_window_size(PAGE_WINDOW)
        .connect()
        .await?;
    let channel = channel.map_err(Into::into).boxed_clone();
    Ok(DriftServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// How many bytes of a reply the daemon may send before the client has read any.
const PAGE_WINDOW: u32 = 4 << 20;

/// Whether the same request would be refused again.
pub(super) fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument | Code::PermissionDenied | Code::Unimplemented | Code::DataLoss
    )
}

/// The error for people. The daemon has worded its message for them already.
#[expect(clippy::needless_pass_by_value, reason = "this is how `map_err` calls it")]
pub(super) fn explain(status: Status) -> anyhow::Error {
    let message = safe(status.message());
    match status.code() {
        Code::NotFound
        | Code::InvalidArgument
        | Code::FailedPrecondition
        | Code::PermissionDenied => anyhow::anyhow!(message),
        Code::Unavailable | Code::Cancelled | Code::Unknown => anyhow::anyhow!(
            "driftd ended during the request: {message} (try: systemctl status driftd)"
        ),
        Code::Unimplemented => anyhow::anyhow!(
            "the running driftd is older than this command and cannot do this (restart it: \
             systemctl restart driftd)"
        ),
        code => anyhow::anyhow!("driftd could not answer: {message} ({code:?})"),
    }
}
