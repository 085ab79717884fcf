//! Why a group cannot be made, with the next step for an administrator.
//!
//! Errors cross the socket between the gate and the daemon as numbers of the kernel.

use std::io;

use nix::errno::Errno;

/// Why a group could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this kernel has no fanotify (driftd needs CONFIG_FANOTIFY and Linux 5.6 or newer)")]
    Missing,
    #[error(
        "the kernel refuses fanotify to this process: it must be root in the host's user \
         namespace with CAP_SYS_ADMIN (try: sudo driftd run, or systemctl start driftd)"
    )]
    NotPermitted,
    #[error(
        "the kernel cannot ask before a program runs (driftd needs \
         CONFIG_FANOTIFY_ACCESS_PERMISSIONS and Linux 5.0 or newer)"
    )]
    NoPermissionEvents,
    #[error("{}", too_many())]
    TooMany,
    #[error("cannot make a fanotify group: {0}")]
    Other(#[source] io::Error),
}

/// How many groups a daemon and its gate have together at most.
pub const GROUPS_OF_A_DAEMON: u64 = 8;

/// How many groups one user may have; `None` before Linux 5.13, where it is 128.
pub fn max_user_groups() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/fs/fanotify/max_user_groups").ok()?.trim().parse().ok()
}

fn too_many() -> String {
    let limit = max_user_groups().unwrap_or(128);
    format!(
        "no more fanotify groups can be made: driftd takes up to {GROUPS_OF_A_DAEMON}, and this \
         user may have {limit} in all, those of containers without a user namespace included \
         (try: sysctl fs.fanotify.max_user_groups={}; driftd doctor reports how many are left; \
         or the limit of open files is reached)",
        limit.saturating_mul(2),
    )
}

impl Error {
    /// The error of another process that could not make a group.
    pub fn from_errno(err: io::Error) -> Error {
        match err.raw_os_error() {
            Some(errno) => Error::from_init(Errno::from_raw(errno)),
            None => Error::Other(err),
        }
    }

    /// The kernel's number for the error.
    pub fn errno(&self) -> i32 {
        match self {
            Error::Missing => libc::ENOSYS,
            Error::NotPermitted => libc::EPERM,
            Error::TooMany => libc::EMFILE,
            Error::NoPermissionEvents => libc::EINVAL,
            Error::Other(err) => err.raw_os_error().unwrap_or(libc::EIO),
        }
    }

    pub(super) fn from_init(errno: Errno) -> Error {
        match errno {
            Errno::ENOSYS => Error::Missing,
            Errno::EPERM => Error::NotPermitted,
            Errno::EMFILE | Errno::ENFILE => Error::TooMany,
            errno => Error::Other(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_few_groups_are_an_error_with_the_number_and_the_next_step() {
        let limit = max_user_groups().unwrap_or(128);
        let text = Error::from_init(Errno::EMFILE).to_string();
        for part in [
            "up to 8".to_owned(),
            format!("may have {limit} in all"),
            format!("sysctl fs.fanotify.max_user_groups={}", limit * 2),
        ] {
            assert!(text.contains(&part), "{text}");
        }
    }
}
