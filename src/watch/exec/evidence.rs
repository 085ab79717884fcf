//! The judgement of a recorded execution, by the evidence that was gathered for it.
//!
//! Pure: it opens nothing and reads no state. `examine` gathers the evidence and acts on the
//! judgement.

use crate::model::Filesystem;
use crate::sys::file;
use crate::sys::perf::Mapped;

/// Whether an execution is to be reported, and where its file lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Judged {
    /// The gate reports it, or it is no program of a container.
    Known,
    Unseen(Filesystem),
}

/// The evidence for one execution.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Evidence<'a> {
    pub(crate) mapped: Option<&'a Mapped>,
    pub(crate) is_mapped_marked: bool,
    /// `None` if the process is gone, or runs something else by now.
    pub(crate) exe: Option<Exe>,
    pub(crate) memfd_device: Option<u64>,
    /// The kernel may report the device of the file below an overlay, and the container's
    /// layers are on this device.
    pub(crate) is_mapped_below: bool,
    /// The parent of the process is in no container. A process that is gone may then have
    /// been on its way into one.
    pub(crate) is_parent_outside: bool,
    /// The kind of filesystem that is mounted with this device where the process lives or
    /// lived.
    pub(crate) mounted: Option<Filesystem>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Exe {
    pub(crate) device: u64,
    pub(crate) links: u32,
    pub(crate) is_marked: bool,
    pub(crate) is_on_tmpfs: bool,
    /// The process sees the host's files: it is on its way into the container.
    pub(crate) is_host: bool,
}

/// Whether the kernel has given this name to a file of memfd_create(2). A container can give a
/// file in its root directory such a name too, but only one that claims to be deleted.
pub(crate) fn is_memfd_name(name: &[u8]) -> bool {
    name.starts_with(b"/memfd:") && name.ends_with(file::DELETED)
}

pub(crate) fn judge(evidence: &Evidence<'_>) -> Judged {
    if evidence.is_mapped_marked {
        return Judged::Known;
    }
    let name = evidence.mapped.map(|mapped| &*mapped.name).unwrap_or_default();
    let is_memfd = |device: Option<u64>| device.is_some() && device == evidence.memfd_device;
    if let Some(exe) = evidence.exe {
        return if exe.is_marked {
            Judged::Known
        } else if is_memfd(Some(exe.device)) || is_memfd_name(name) {
            // Also on the way into the container: its content shows whether it is the
            // runtime's.
            Judged::Unseen(Filesystem::Anonymous)
        } else if exe.is_host {
            Judged::Known
        } else if exe.links == 0 && (name.is_empty() || name.ends_with(file::DELETED)) {
            Judged::Unseen(Filesystem::Anonymous)
        } else if exe.is_on_tmpfs {
            Judged::Unseen(Filesystem::Tmpfs)
        } else {
            Judged::Unseen(Filesystem::Volume)
        };
    }
    match evidence.mapped {
        // Nothing is known of it but that it was executed.
        None => Judged::Known,
        Some(mapped) if is_memfd(Some(mapped.device)) || is_memfd_name(name) => {
            Judged::Unseen(Filesystem::Anonymous)
        }
        Some(_) if evidence.is_mapped_below || evidence.is_parent_outside => Judged::Known,
        Some(_) if name.ends_with(file::DELETED) => Judged::Unseen(Filesystem::Anonymous),
        Some(_) => Judged::Unseen(evidence.mounted.unwrap_or(Filesystem::Volume)),
    }
}

/// The kind of filesystem that is mounted with this device.
pub(crate) fn mounted(mountinfo: &[u8], device: u64) -> Option<Filesystem> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let device = format!("{major}:{minor}").into_bytes();
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        if fields.nth(2)? != device {
            return None;
        }
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some(match kind {
            b"tmpfs" | b"ramfs" => Filesystem::Tmpfs,
            _ => Filesystem::Volume,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMFD: u64 = 1;

    fn mapped(device: u64, name: &str) -> Mapped {
        let name = name.as_bytes().into();
        Mapped { pid: 7, time: 0, address: 0, length: 0, device, inode: 9, is_shared: false, name }
    }

    fn exe(device: u64) -> Exe {
        Exe { device, links: 1, is_marked: false, is_on_tmpfs: false, is_host: false }
    }

    fn evidence(mapped: &Mapped) -> Evidence<'_> {
        Evidence {
            mapped: Some(mapped),
            is_mapped_marked: false,
            exe: None,
            memfd_device: Some(MEMFD),
            is_mapped_below: false,
            is_parent_outside: false,
            mounted: None,
        }
    }

    #[track_caller]
    fn check(evidence: Evidence<'_>, expected: Option<Filesystem>) {
        assert_eq!(judge(&evidence), expected.map_or(Judged::Known, Judged::Unseen));
    }

    #[test]
    fn the_gate_reports_what_is_marked() {
        let program = mapped(40, "/bin/x");
        check(Evidence { is_mapped_marked: true, ..evidence(&program) }, None);
        // A mount of the host's directory that carries a mark of its own.
        let marked = Exe { is_marked: true, ..exe(40) };
        check(Evidence { exe: Some(marked), ..evidence(&program) }, None);
    }

    #[test]
    fn a_memfd_is_anonymous_alive_or_gone_and_wherever_it_comes_from() {
        let program = mapped(MEMFD, "/memfd:a (deleted)");
        let anonymous = Some(Filesystem::Anonymous);
        check(evidence(&program), anonymous);
        check(Evidence { exe: Some(exe(MEMFD)), ..evidence(&program) }, anonymous);
        // Its content decides whether it is the runtime's, and not its name.
        let host = Exe { is_host: true, ..exe(MEMFD) };
        check(Evidence { exe: Some(host), ..evidence(&program) }, anonymous);
        check(Evidence { is_parent_outside: true, ..evidence(&program) }, anonymous);
        // A memfd with huge pages is on another device.
        check(evidence(&mapped(12, "/memfd:a (deleted)")), anonymous);
        // The record of its mapping was lost.
        let unmapped = Evidence { mapped: None, exe: Some(exe(MEMFD)), ..evidence(&program) };
        check(unmapped, anonymous);
    }

    #[test]
    fn what_never_had_a_name_is_anonymous_and_what_lost_it_later_is_not() {
        let nameless = mapped(40, "/vol/#12 (deleted)");
        let gone = Exe { links: 0, ..exe(40) };
        check(evidence(&nameless), Some(Filesystem::Anonymous));
        check(Evidence { exe: Some(gone), ..evidence(&nameless) }, Some(Filesystem::Anonymous));
        let named = mapped(40, "/vol/x");
        check(Evidence { exe: Some(gone), ..evidence(&named) }, Some(Filesystem::Volume));
        // Only its name claims that it was deleted.
        let lying = Evidence { exe: Some(exe(40)), ..evidence(&nameless) };
        check(lying, Some(Filesystem::Volume));
    }

    #[test]
    fn other_filesystems_are_reported_as_what_they_are() {
        let program = mapped(40, "/mnt/x");
        let memory = Exe { is_on_tmpfs: true, ..exe(40) };
        check(Evidence { exe: Some(memory), ..evidence(&program) }, Some(Filesystem::Tmpfs));
        check(Evidence { exe: Some(exe(40)), ..evidence(&program) }, Some(Filesystem::Volume));
        let mounted = Some(Filesystem::Tmpfs);
        check(Evidence { mounted, ..evidence(&program) }, mounted);
        check(evidence(&program), Some(Filesystem::Volume));
    }

    #[test]
    fn a_process_on_its_way_into_a_container_runs_programs_of_the_host() {
        let runtime = mapped(40, "/usr/sbin/runc");
        let host = Exe { is_host: true, ..exe(40) };
        check(Evidence { exe: Some(host), ..evidence(&runtime) }, None);
        check(Evidence { is_parent_outside: true, ..evidence(&runtime) }, None);
    }

    #[test]
    fn on_older_kernels_the_file_below_an_overlay_is_the_overlays() {
        let below = mapped(40, "/bin/x");
        let overlays = Exe { is_marked: true, ..exe(50) };
        let old = Evidence { is_mapped_below: true, ..evidence(&below) };
        check(Evidence { exe: Some(overlays), ..old }, None);
        // The process is gone: on that filesystem the file was the overlay's.
        check(old, None);
        // While the process lives, a volume on the same filesystem can be distinguished.
        check(Evidence { exe: Some(exe(40)), ..old }, Some(Filesystem::Volume));
    }

    #[test]
    fn what_is_mounted_is_found_by_its_device() {
        let mountinfo = b"1 0 0:40 / / rw - overlay overlay rw\n\
            2 1 0:41 / /dev/shm rw shared:1 - tmpfs shm rw\n3 1 8:1 /x /x rw - ext4 /dev/sda rw";
        let device = |major, minor| rustix::fs::makedev(major, minor);
        assert_eq!(mounted(mountinfo, device(0, 41)), Some(Filesystem::Tmpfs));
        assert_eq!(mounted(mountinfo, device(8, 1)), Some(Filesystem::Volume));
        assert_eq!(mounted(mountinfo, device(8, 2)), None);
    }
}
