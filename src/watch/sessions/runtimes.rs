//! Container runtimes of the host, known by the content of their programs.
//!
//! A runtime runs a copy of itself in memory. This file decides whether a program in memory
//! is such a copy, by comparing hashes with programs of the host. It only reads the host's
//! own files, through `sys::door`. The names of runtimes are in `model::programs`.

use std::collections::HashMap;
use std::os::fd::AsFd as _;

use crate::model::{Blake3Hash, FileState, programs};
use crate::sys::door::{self, Held, View};
use crate::sys::file;
use crate::sys::perf::Mapped;
use crate::sys::procfs::Handle;
use crate::watch::files::state;

/// Where runtimes are installed. A path alone proves nothing: the executed content must be
/// the content found there.
pub(crate) const PLACES: [&str; 5] =
    ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/usr/libexec/crio"];

/// The hashes of programs of the host. Container runtimes execute themselves from a sealed
/// copy in memory, so that no container can overwrite them. The content identifies the copy.
#[derive(Debug, Default)]
pub(crate) struct Runtimes {
    pub(crate) hashes: HashMap<(u64, u64, crate::model::FileTime), Option<Blake3Hash>>,
}

/// Whether a program has the name of a runtime. That is only a reason to check it.
pub(crate) fn is_named_like_a_runtime(file_name: &[u8]) -> bool {
    let name = file_name.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    programs::is_runtime(name)
}

/// Whether a program of this name can enter a container: only a reason to look.
pub(crate) fn may_enter(file_name: &[u8]) -> bool {
    let name = file_name.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
    // Also docker-runc, sysbox-runc and the like.
    let has = |part: &[u8]| name.windows(part.len()).any(|window| window == part);
    programs::is_runtime(name) || programs::is_entrance(name) || has(b"runc") || has(b"crun")
}

impl Runtimes {
    /// Whether a program in memory is the copy of a program of the host: of the program that
    /// its process or the parent ran before, or of an installed runtime.
    pub(crate) fn is_runtimes_own(
        &mut self,
        previous: Option<&Mapped>,
        parent: Option<u32>,
        state: &FileState,
        max: u64,
    ) -> bool {
        let previous = previous.and_then(on_host);
        let Some(content) = state.blake3() else {
            // The file is gone, like its process. That came from outside and ran a program
            // of the host just before.
            return previous.is_some();
        };
        let parents_program = parent.and_then(|parent| {
            let fd = Handle::open(parent).ok()?.open_exe().ok()?;
            let stat = file::stat(&fd).ok()?;
            Some(Held { fd, stat })
        });
        previous
            .into_iter()
            .chain(parents_program)
            .any(|held| self.hash(&held, state.size, max) == Some(content))
            || self.is_installed(state, max)
    }

    /// Whether this is the content of a runtime that is installed on the host.
    pub(crate) fn is_installed(&mut self, state: &FileState, max: u64) -> bool {
        let Some(content) = state.blake3() else { return false };
        PLACES.iter().any(|place| {
            programs::runtimes().any(|name| {
                let Ok(held) = door::on_host(format!("{place}/{name}").as_bytes()) else {
                    return false;
                };
                self.hash(&held, state.size, max) == Some(content)
            })
        })
    }

    /// The hash of a program of the host, if the program has this size.
    pub(crate) fn hash(
        &mut self,
        Held { fd, stat }: &Held,
        size: u64,
        max: u64,
    ) -> Option<Blake3Hash> {
        if stat.size != size || !stat.is_regular() {
            return None;
        }
        let key = (stat.device, stat.inode, stat.changed);
        if let Some(hash) = self.hashes.get(&key) {
            return *hash;
        }
        const MAX_HASHES: usize = 64;
        if self.hashes.len() >= MAX_HASHES {
            self.hashes.clear();
        }
        // No container's view: a file that only a container sees is no program of the host.
        let local = View::of([]).ground(stat).local();
        let hash = state::state_of(fd.as_fd(), stat, local, max).blake3();
        self.hashes.insert(key, hash);
        hash
    }
}

/// Opens a mapped file by its name, if the host has the same file there.
pub(crate) fn on_host(mapped: &Mapped) -> Option<Held> {
    let held = door::on_host(&mapped.name).ok()?;
    ((held.stat.device, held.stat.inode) == (mapped.device, mapped.inode)).then_some(held)
}
