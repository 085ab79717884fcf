//! Who is asking. The socket's mode keeps strangers out; this checks again, on
//! every call, by what the kernel says of the other end.

use std::fmt;
use std::os::unix::ffi::OsStrExt as _;

use nix::unistd::{Gid, Group, Uid, User};
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use crate::model::printable;

/// Members of this group may ask, besides root.
pub(super) const GROUP: &str = "driftd";

/// The process at the other end of the socket, when it connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peer {
    uid: u32,
    pid: Option<i32>,
}

/// As a response's `requested_by`. The executable is a hint: the process may
/// have changed since.
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

/// Lets root and the group through, and leaves a [`Peer`] with the request.
pub(super) fn check(mut request: Request<()>) -> Result<Request<()>, Status> {
    let credentials = request
        .extensions()
        .get::<UdsConnectInfo>()
        .and_then(|info| info.peer_cred)
        .ok_or_else(|| Status::permission_denied("the kernel does not say who is asking"))?;
    let uid = Uid::from_raw(credentials.uid());
    if !uid.is_root() && !is_member(uid, Gid::from_raw(credentials.gid())) {
        return Err(Status::permission_denied(format!(
            "uid {uid} may not ask driftd: only root and members of the group {GROUP} may \
             (try: sudo, or usermod -aG {GROUP} USER)"
        )));
    }
    request.extensions_mut().insert(Peer { uid: uid.as_raw(), pid: credentials.pid() });
    Ok(request)
}

fn is_member(uid: Uid, gid: Gid) -> bool {
    let Ok(Some(group)) = Group::from_name(GROUP) else { return false };
    let name = User::from_uid(uid).ok().flatten().map(|user| user.name);
    belongs(gid, name.as_deref(), &group)
}

fn belongs(gid: Gid, name: Option<&str>, group: &Group) -> bool {
    group.gid == gid || name.is_some_and(|name| group.mem.iter().any(|member| member == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_counts_whether_primary_or_supplementary() {
        let mut group = Group::from_gid(Gid::from_raw(0)).unwrap().unwrap();
        group.gid = Gid::from_raw(990);
        group.mem = vec!["ann".into()];
        assert!(belongs(Gid::from_raw(990), None, &group));
        assert!(belongs(Gid::from_raw(1000), Some("ann"), &group));
        assert!(!belongs(Gid::from_raw(1000), Some("bob"), &group));
        assert!(!belongs(Gid::from_raw(1000), None, &group));
    }

    #[test]
    fn a_call_without_credentials_is_refused() {
        let status = check(Request::new(())).unwrap_err();
        assert_eq!(status.code(), tonic::Code::PermissionDenied);
    }

    #[test]
    fn a_requester_is_named_with_its_program() {
        let peer = Peer { uid: 0, pid: Some(std::process::id().cast_signed()) };
        let exe = std::env::current_exe().unwrap();
        let pid = std::process::id();
        assert_eq!(peer.to_string(), format!("uid 0 pid {pid} ({})", exe.display()));
    }
}
