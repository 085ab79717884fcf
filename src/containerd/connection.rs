//! One connection to a containerd, and what every call on it carries: the namespace and lease
//! headers, a deadline, and room for large responses.
//!
//! Also defines what a failed call means. Its only calls of its own are for the version and for
//! the namespaces.

use std::error::Error as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::services::v1::{ListNamespacesRequest, VersionResponse};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::model::printable;

/// What containerd may send in one message (its own limit).
const MESSAGE_LIMIT: usize = 16 << 20;
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const CALL_DEADLINE: Duration = Duration::from_secs(30);

/// Headers of every call. An interceptor adds them, because containerd-client's
/// `with_namespace!` builds a new request and so drops a lease that was set before.
#[derive(Clone, Debug)]
pub(super) struct Headers {
    namespace: Option<MetadataValue<Ascii>>,
    lease: Option<MetadataValue<Ascii>>,
    deadline: Option<Duration>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(namespace) = &self.namespace {
            request.metadata_mut().insert("containerd-namespace", namespace.clone());
        }
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        if let Some(deadline) = self.deadline {
            request.set_timeout(deadline);
        }
        Ok(request)
    }
}

pub(super) type Service = InterceptedService<Channel, Headers>;

/// Why no connection could be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error("no answer within {} s", CONNECT_DEADLINE.as_secs())]
    TimedOut,
    #[error("{}", innermost(.0))]
    Unreachable(tonic::transport::Error),
    #[error("{}", words(.0))]
    Refused(Status),
}

/// A connection that has answered at least once.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    channel: Channel,
}

impl Connection {
    /// Connects, and makes sure that a containerd answers.
    pub(super) async fn open(socket: &Path) -> Result<Connection, ConnectError> {
        let channel = tokio::time::timeout(CONNECT_DEADLINE, containerd_client::connect(socket))
            .await
            .map_err(|_| ConnectError::TimedOut)?
            .map_err(ConnectError::Unreachable)?;
        let connection = Connection { channel };
        connection.version(CONNECT_DEADLINE).await.map_err(ConnectError::Refused)?;
        Ok(connection)
    }

    pub(super) async fn version(&self, deadline: Duration) -> Result<VersionResponse, Status> {
        version(self.channel.clone(), deadline).await
    }

    /// The names of all containerd namespaces.
    pub(super) async fn namespaces(&self) -> Result<Vec<String>, Status> {
        let headers = Headers { namespace: None, lease: None, deadline: Some(CALL_DEADLINE) };
        let mut client = NamespacesClient::with_interceptor(self.channel.clone(), headers)
            .max_decoding_message_size(MESSAGE_LIMIT);
        let answer = client.list(ListNamespacesRequest::default()).await?.into_inner();
        Ok(answer.namespaces.into_iter().map(|namespace| namespace.name).collect())
    }

    /// For subscribing. Without a deadline, because `subscribe` returns only with the first
    /// event.
    pub(super) fn event_stream(&self) -> EventsClient<Service> {
        let headers = Headers { namespace: None, lease: None, deadline: None };
        EventsClient::with_interceptor(self.channel.clone(), headers)
            .max_decoding_message_size(MESSAGE_LIMIT)
    }

    pub(super) fn namespace(&self, name: &str) -> Result<Namespace, Status> {
        let header = name.parse().map_err(|_| {
            Status::invalid_argument(format!(
                "the namespace `{}` does not fit into a header",
                printable(name.as_bytes())
            ))
        })?;
        Ok(Namespace {
            name: name.into(),
            channel: self.channel.clone(),
            headers: Headers {
                namespace: Some(header),
                lease: None,
                deadline: Some(CALL_DEADLINE),
            },
        })
    }
}

async fn version(channel: Channel, deadline: Duration) -> Result<VersionResponse, Status> {
    let headers = Headers { namespace: None, lease: None, deadline: Some(deadline) };
    let mut client = VersionClient::with_interceptor(channel, headers);
    Ok(client.version(()).await?.into_inner())
}

/// A connection, for calls in one containerd namespace.
#[derive(Clone, Debug)]
pub(super) struct Namespace {
    pub(super) name: Arc<str>,
    channel: Channel,
    headers: Headers,
}

macro_rules! client {
    ($name:ident, $client:ident) => {
        pub(super) fn $name(&self) -> $client<Service> {
            $client::with_interceptor(self.channel.clone(), self.headers.clone())
                .max_decoding_message_size(MESSAGE_LIMIT)
        }
    };
}

impl Namespace {
    client!(containers, ContainersClient);
    client!(content, ContentClient);
    client!(events, EventsClient);
    client!(images, ImagesClient);
    client!(introspection, IntrospectionClient);
    client!(leases, LeasesClient);
    client!(snapshots, SnapshotsClient);
    client!(tasks, TasksClient);

    /// The version of the containerd that has this namespace.
    pub(super) async fn version(&self, deadline: Duration) -> Result<VersionResponse, Status> {
        version(self.channel.clone(), deadline).await
    }

    /// The same namespace, for streams that last as long as their reader needs.
    pub(super) fn without_deadline(mut self) -> Namespace {
        self.headers.deadline = None;
        self
    }

    /// The same namespace. What is created through it belongs to the lease `id`.
    pub(super) fn with_lease(&self, id: &str) -> Result<Namespace, Status> {
        let lease = id
            .parse()
            .map_err(|_| Status::invalid_argument("the lease's ID does not fit into a header"))?;
        let mut leased = self.clone();
        leased.headers.lease = Some(lease);
        Ok(leased)
    }
}

/// The failure of a call as a text for administrators.
pub(super) fn words(status: &Status) -> String {
    if status.message().is_empty() {
        return status.code().description().to_owned();
    }
    printable(status.message().as_bytes())
}

/// Whether the connection failed, rather than containerd refused. Then nothing was learnt
/// about what was requested.
pub(super) fn interrupted(status: &Status) -> bool {
    status.source().is_some()
        || matches!(status.code(), Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded)
}

/// Turns "not found" into `None`.
pub(super) fn found<T>(response: Result<T, Status>) -> Result<Option<T>, Status> {
    match response {
        Ok(value) => Ok(Some(value)),
        Err(status) if status.code() == Code::NotFound => Ok(None),
        Err(status) => Err(status),
    }
}

/// The cause at the bottom: tonic's own text is only "transport error".
fn innermost(err: &dyn std::error::Error) -> String {
    let mut cause = err;
    while let Some(source) = cause.source() {
        cause = source;
    }
    printable(cause.to_string().as_bytes())
}
