//! The Unix socket: creates it with its mode and group, and serves the API on it.
//!
//! Makes sure that only one driftd serves a socket. Also answers requests from a history
//! within this program, without a socket ([`without_daemon`]).

use std::fs::{self, DirBuilder, Permissions};
use std::future::Future;
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown,
};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Group;
use tokio::sync::watch;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::codegen::{StdError, http};
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tower::ServiceExt as _;
use tower::util::BoxCloneService;

use super::follow::Followers;
use super::peer::{self, Connection};
use super::proto;
use super::proto::drift_service_server::DriftServiceServer;
use super::service::{Backend, Service};
use crate::history;

/// How long requests may still take when driftd stops.
const GRACE: Duration = Duration::from_secs(5);

/// Why the API cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "another driftd serves {} (stop it first: systemctl stop driftd, or name another socket \
         with --socket)",
        socket.display()
    )]
    InUse { socket: PathBuf },
    #[error("{} is there and is no socket (remove it, or name another with --socket)", path.display())]
    NotASocket { path: PathBuf },
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("the API's server has failed")]
    Server(#[from] tonic::transport::Error),
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io { what, path: path.into(), source }
}

/// The socket, before the API is served on it. Removes the file when dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    name: SocketName,
    /// The group whose members may use the API, as it was when the socket was created.
    group: Option<u32>,
}

/// The name of the socket, with the inode by which it is known to be still ours.
#[derive(Debug)]
struct SocketName {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketName {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.inode);
        if ours {
            // If this fails, the next start removes it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Creates the socket, and its directory if need be. Replaces a socket on which no
    /// process listens any more.
    pub fn bind(path: &Path) -> Result<Listener, Error> {
        if let Some(directory) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(directory)
                .map_err(failed("create the directory", directory))?;
        }
        remove_stale(path)?;
        let socket = UnixListener::bind(path).map_err(|err| match err.kind() {
            io::ErrorKind::AddrInUse => Error::InUse { socket: path.into() },
            _ => failed("listen on", path)(err),
        })?;
        // Until here only root can connect, because the umask removes the others' write bits.
        let group = Group::from_name(peer::GROUP).ok().flatten().map(|group| group.gid.as_raw());
        if let Some(group) = group {
            chown(path, None, Some(group)).map_err(failed("give to the group driftd", path))?;
        }
        fs::set_permissions(path, Permissions::from_mode(0o660))
            .map_err(failed("set the mode of", path))?;
        let found = fs::symlink_metadata(path).map_err(failed("examine", path))?;
        socket.set_nonblocking(true).map_err(failed("listen on", path))?;
        let name = SocketName { path: path.into(), inode: (found.dev(), found.ino()) };
        Ok(Listener { socket, name, group })
    }
}

fn remove_stale(path: &Path) -> Result<(), Error> {
    match fs::symlink_metadata(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(err) => return Err(failed("examine", path)(err)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(Error::NotASocket { path: path.into() });
        }
        Ok(_) => (),
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(Error::InUse { socket: path.into() }),
        Err(err) if err.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the stale socket", path))
        }
        Err(err) => Err(failed("find out whether a driftd serves", path)(err)),
    }
}

/// A connection of any kind that carries requests.
pub type Transport = BoxCloneService<http::Request<Body>, http::Response<Body>, StdError>;

/// Serves a history within this program, without a daemon and a socket.
pub fn without_daemon(history: history::Reader) -> Transport {
    let service = Service {
        live: None,
        history,
        committed: watch::channel(0).1,
        stopping: watch::channel(false).1,
        followers: Followers::default(),
    };
    let server = DriftServiceServer::new(service);
    BoxCloneService::new(
        tower::service_fn(move |request: http::Request<Body>| server.clone().oneshot(request))
            .map_err(|never| match never {}),
    )
}

/// Serves until `shutdown` is done, then gives open requests [`GRACE`] to end.
pub async fn serve(
    listener: Listener,
    backend: Backend,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let Listener { socket, name, group } = listener;
    let socket =
        tokio::net::UnixListener::from_std(socket).map_err(failed("listen on", &name.path))?;
    let (stop, stopping) = watch::channel(false);

    let (health_reporter, health) = tonic_health::server::health_reporter();
    health_reporter.set_serving::<DriftServiceServer<Service>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .expect("the descriptor sets are compiled into this program");
    // Older clients use only this one.
    let reflection_alpha = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1alpha()
        .expect("the descriptor sets are compiled into this program");
    let service = DriftServiceServer::new(Service {
        history: backend.history.clone(),
        committed: backend.committed.clone(),
        live: Some(backend),
        stopping: stopping.clone(),
        followers: Followers::default(),
    });

    let connections = UnixListenerStream::new(socket)
        .map(move |accepted| accepted.map(|stream| Connection::new(stream, group)));
    let mut until = stopping.clone();
    let server = Server::builder()
        .layer(InterceptorLayer::new(peer::check))
        .add_service(health)
        .add_service(reflection)
        .add_service(reflection_alpha)
        .add_service(service)
        .serve_with_incoming_shutdown(connections, async move {
            // An error means that `stop` was dropped, which ends the server as well.
            let _ = until.wait_for(|stopping| *stopping).await;
        });
    let end = async {
        shutdown.await;
        health_reporter.set_not_serving::<DriftServiceServer<Service>>().await;
        stop.send_replace(true);
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        result = server => result.map_err(Error::from),
        () = end => {
            tracing::warn!("some requests did not end in {GRACE:?}");
            Ok(())
        }
    }
}
