//! Mount and pid namespaces: of a process, and of the host.
//!
//! A namespace is identified by the inode of its file. `watch` decides by them in which
//! container a process is.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use super::error::into_io;
use super::handle::Handle;

/// What shows to which container a process belongs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whereabouts {
    pub mount_namespace: Option<u64>,
    pub pid_namespace: Option<u64>,
    /// Its path in the unified hierarchy.
    pub cgroup: Option<Vec<u8>>,
}

impl Handle {
    /// The inode of its pid namespace, which identifies the namespace.
    pub fn pid_namespace(&self) -> io::Result<u64> {
        self.namespace("ns/pid")
    }

    /// The inode of its mount namespace, which identifies the namespace.
    pub fn mount_namespace(&self) -> io::Result<u64> {
        self.namespace("ns/mnt")
    }

    /// Its namespaces and its control group, as far as they can be read.
    pub fn whereabouts(&self) -> Whereabouts {
        Whereabouts {
            mount_namespace: self.mount_namespace().ok(),
            pid_namespace: self.pid_namespace().ok(),
            cgroup: self.cgroup().ok(),
        }
    }

    /// The kernel's names of its namespaces, such as `net:[4026531840]`.
    pub fn namespaces(&self) -> Vec<String> {
        const KINDS: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];
        let pid = self.identity().pid;
        let link = |kind| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
        let names = KINDS.iter().filter_map(link);
        let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        self.if_still_there(names).unwrap_or_default()
    }

    /// The inode of its network namespace, which identifies the namespace.
    pub fn network_namespace(&self) -> io::Result<u64> {
        self.namespace("ns/net")
    }

    fn namespace(&self, link: &str) -> io::Result<u64> {
        let file = self.process.open_relative(link).map_err(into_io)?;
        Ok(file.metadata()?.ino())
    }
}

/// Whether this is the mount namespace of the host's init, or driftd's.
pub fn is_host_mount_namespace(namespace: u64) -> bool {
    host_mount_namespaces().contains(&namespace)
}

/// Whether this is the pid namespace of the host's init, or driftd's.
pub fn is_host_pid_namespace(namespace: u64) -> bool {
    static HOST: OnceLock<Vec<u64>> = OnceLock::new();
    let host = HOST.get_or_init(|| {
        [1, std::process::id()]
            .into_iter()
            .filter_map(|pid| Handle::open(pid).and_then(|host| host.pid_namespace()).ok())
            .collect()
    });
    host.contains(&namespace)
}

/// The mount namespace of a process, by its pid alone: a hint, because the pid can be another
/// process's by now.
pub fn mount_namespace_of(pid: u32) -> io::Result<u64> {
    namespace_of(pid, "mnt")
}

/// The same for its pid namespace.
pub fn pid_namespace_of(pid: u32) -> io::Result<u64> {
    namespace_of(pid, "pid")
}

fn namespace_of(pid: u32, kind: &str) -> io::Result<u64> {
    Ok(std::fs::metadata(format!("/proc/{pid}/ns/{kind}"))?.ino())
}

pub(super) fn host_mount_namespaces() -> &'static [u64] {
    static HOST: OnceLock<Vec<u64>> = OnceLock::new();
    HOST.get_or_init(|| {
        [1, std::process::id()]
            .into_iter()
            .filter_map(|pid| Handle::open(pid).and_then(|host| host.mount_namespace()).ok())
            .collect()
    })
}
