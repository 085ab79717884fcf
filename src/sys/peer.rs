//! The groups of the process at the other end of a Unix socket: unix(7), `SO_PEERGROUPS`.
//!
//! `api` checks by them whether a client is in its group.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// The supplementary groups of the process that connected, at that time.
pub fn groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<libc::gid_t> = vec![0; 64];
    loop {
        let room = groups.len() * size_of::<libc::gid_t>();
        let mut length = libc::socklen_t::try_from(room).map_err(io::Error::other)?;
        // SAFETY: `groups` has `length` bytes and lives during the call, which writes no more
        // than that, and stores in `length` how many bytes it has written, or needs.
        let done = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let count = length as usize / size_of::<libc::gid_t>();
        if done == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let err = io::Error::last_os_error();
        // The kernel allows 65,536 of them.
        if err.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(err);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_groups_of_the_other_end_are_read() {
        let (one, _other) = UnixStream::pair().unwrap();
        let found = groups(one.as_fd()).unwrap();
        let mine: Vec<u32> =
            nix::unistd::getgroups().unwrap().into_iter().map(nix::unistd::Gid::as_raw).collect();
        assert_eq!(found, mine);
        let file = std::fs::File::open("/dev/null").unwrap();
        groups(file.as_fd()).unwrap_err();
    }
}
