//! Checks the client of every request: root and the group `driftd` may use the API.
//!
//! The socket's mode already admits no others. This checks again, with the credentials that
//! the kernel recorded when the client connected. It does not query the user database, which
//! may be slow and would delay requests.

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;
use tonic::{Request, Status};

use crate::model::printable;
use crate::sys::peer;

/// The group whose members may use the API, besides root.
pub(super) const GROUP: &str = "driftd";

/// The process at the other end of the socket, when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    uid: u32,
    pid: Option<i32>,
}

impl Peer {
    #[cfg(test)]
    pub(super) fn of(uid: u32) -> Peer {
        Peer { uid, pid: None }
    }

    pub(super) fn is_root(&self) -> bool {
        self.uid == 0
    }
}

/// The text for a response's `requested_by`. The executable is a hint only: the process may
/// have executed another one since.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}", self.uid)?;
        let Some(pid) = self.pid else { return Ok(()) };
        write!(f, " pid {pid}")?;
        match std::fs::read_link(format!("/proc/{pid}/exe")) {
            Ok(exe) => write!(f, " ({})", printable(exe.as_os_str().as_bytes())),
            Err(_) => Ok(()),
        }
    }
}

/// What the kernel recorded about the client when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Credentials {
    peer: Peer,
    is_member: bool,
}

/// A connection to the socket.
pub(super) struct Connection {
    stream: UnixStream,
    /// The group whose members may use the API, if it exists.
    group: Option<u32>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, group: Option<u32>) -> Connection {
        Connection { stream, group }
    }
}

impl Connected for Connection {
    type ConnectInfo = Option<Credentials>;

    fn connect_info(&self) -> Option<Credentials> {
        let kernels = self.stream.peer_cred().ok()?;
        let groups = peer::groups(self.stream.as_fd()).unwrap_or_default();
        let is_member =
            self.group.is_some_and(|group| kernels.gid() == group || groups.contains(&group));
        Some(Credentials { peer: Peer { uid: kernels.uid(), pid: kernels.pid() }, is_member })
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Lets root and the group through, and leaves a [`Peer`] with the request.
pub(super) fn check(mut request: Request<()>) -> Result<Request<()>, Status> {
    let credentials = request.extensions().get::<Option<Credentials>>().copied().flatten();
    let Credentials { peer, is_member } = credentials
        .ok_or_else(|| Status::permission_denied("the kernel has no credentials of the client"))?;
    if peer.uid != 0 && !is_member {
        return Err(Status::permission_denied(format!(
            "uid {} may not use driftd: only root and members of the group {GROUP} may \
             (try: sudo, or usermod -aG {GROUP} USER)",
            peer.uid
        )));
    }
    request.extensions_mut().insert(peer);
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_admitted(uid: u32, is_member: bool) -> bool {
        let mut request = Request::new(());
        let credentials = Credentials { peer: Peer { uid, pid: None }, is_member };
        request.extensions_mut().insert(Some(credentials));
        check(request).is_ok()
    }

    #[test]
    fn root_and_members_of_the_group_are_admitted() {
        assert!(is_admitted(0, false) && is_admitted(1000, true) && !is_admitted(1000, false));
    }

    #[tokio::test]
    async fn h13_a_member_is_known_by_the_groups_that_its_process_has() {
        let connected = |group| {
            let (stream, other) = UnixStream::pair().unwrap();
            (Connection::new(stream, group).connect_info().unwrap(), other)
        };
        let mine = nix::unistd::getgid().as_raw();
        let supplementary = nix::unistd::getgroups().unwrap();
        assert!(connected(Some(mine)).0.is_member);
        for group in &supplementary {
            assert!(connected(Some(group.as_raw())).0.is_member, "{group}");
        }
        let foreign = (1..)
            .find(|gid| *gid != mine && !supplementary.iter().any(|group| group.as_raw() == *gid));
        assert!(!connected(foreign).0.is_member && !connected(None).0.is_member);
    }

    #[test]
    fn a_request_without_credentials_is_refused() {
        let status = check(Request::new(())).unwrap_err();
        assert_eq!(status.code(), tonic::Code::PermissionDenied);
    }

    #[test]
    fn only_uid_0_is_root() {
        assert!(Peer::of(0).is_root() && !Peer::of(1000).is_root());
    }

    #[test]
    fn a_client_is_named_with_its_program() {
        let peer = Peer { uid: 0, pid: Some(std::process::id().cast_signed()) };
        let exe = std::env::current_exe().unwrap();
        let pid = std::process::id();
        assert_eq!(peer.to_string(), format!("uid 0 pid {pid} ({})", exe.display()));
    }
}
