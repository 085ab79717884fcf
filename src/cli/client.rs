//! Calls to the daemon, and what their failures mean to a person.

use std::future::Future;
use std::io;
use std::path::Path;
use std::time::Duration;

use tonic::transport::Endpoint;
use tonic::{Code, Status};
use tower::ServiceExt as _;

use super::exit::Exit;
use super::output::safe;
use crate::api::proto::drift_service_client::DriftServiceClient;
use crate::api::proto::follow_findings_response::Event;
use crate::api::{Transport, proto};

pub(super) type Client = DriftServiceClient<Transport>;

/// What answers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Server<'a> {
    /// The daemon behind this socket.
    Daemon(&'a Path),
    /// A history, or the state directory that it lies in, without a daemon.
    History(&'a Path),
}

impl<'a> From<&'a Path> for Server<'a> {
    fn from(socket: &'a Path) -> Server<'a> {
        Server::Daemon(socket)
    }
}

/// A list of differences is one message.
const MAX_MESSAGE: usize = 64 << 20;

/// Runs a conversation with the daemon, or with a history.
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
    // A thread that reads stdin or a name service must not keep us.
    runtime.shutdown_background();
    result
}

async fn connect(server: Server<'_>) -> anyhow::Result<Client> {
    let socket = match server {
        Server::Daemon(socket) => socket,
        Server::History(path) => {
            let reader = crate::history::Reader::of_file(path)?;
            let calls = crate::api::without_daemon(reader);
            return Ok(DriftServiceClient::new(calls).max_decoding_message_size(MAX_MESSAGE));
        }
    };
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
    let channel = channel.map_err(Into::into).boxed_clone();
    Ok(DriftServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE))
}

/// How long a follower waits before it connects again.
const RECONNECT: Duration = Duration::from_millis(250);

/// Follows the history and calls `each` with every event and its cursor. When the daemon
/// stops, waits for it and goes on after the last cursor. Ends with an error only.
pub(super) fn follow(
    server: Server<'_>,
    mut request: proto::FollowFindingsRequest,
    mut each: impl FnMut(u64, Event) -> anyhow::Result<()>,
) -> anyhow::Result<Exit> {
    talk(server, |client| async move {
        let mut stream = client.clone().follow_findings(request.clone()).await.map_err(explain)?;
        loop {
            let stopped = loop {
                match stream.get_mut().message().await {
                    Ok(Some(message)) => {
                        // Also back to 0, if the history was replaced.
                        request.after_cursor = Some(message.cursor);
                        match message.event {
                            Some(event) => each(message.cursor, event)?,
                            // Where a stream begins that was asked for without a cursor.
                            None => eprintln!("following what comes after {}", message.cursor),
                        }
                    }
                    Ok(None) => break "it has ended the stream".to_owned(),
                    Err(status) if is_final(&status) => return Err(explain(status)),
                    Err(status) => break safe(status.message()),
                }
            };
            let cursor = request.after_cursor;
            eprintln!(
                "driftd has stopped ({stopped}); waiting for it{}",
                cursor.map(|cursor| format!(", to go on after {cursor}")).unwrap_or_default()
            );
            stream = loop {
                tokio::time::sleep(RECONNECT).await;
                let Ok(mut client) = connect(server).await else { continue };
                match client.follow_findings(request.clone()).await {
                    Ok(stream) => break stream,
                    Err(status) if is_final(&status) => return Err(explain(status)),
                    // It may not know its containers yet.
                    Err(_) => (),
                }
            };
            eprintln!("driftd is back");
        }
    })
}

/// Whether asking again would be refused again.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument | Code::PermissionDenied | Code::Unimplemented | Code::DataLoss
    )
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
