//! What the running kernel offers, and which privileges driftd has. Each feature is tried: a
//! version does not show what was backported to a kernel, or left out of it.
//!
//! `doctor` and `run` report what is missing.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use caps::{CapSet, Capability};
use nix::errno::Errno;
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags};

use super::{connector, fanotify, file, perf};

/// A feature that not every kernel has, the most needed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Feature {
    /// fanotify's permission events.
    PermissionEvents,
    /// openat2(2).
    OpenBeneath,
    /// The mount in statx(2).
    MountOfFile,
    /// A handle on the process in each event of the gate.
    ProcessHandles,
    /// Directory and name in events.
    NamedEvents,
    /// perf's records of every exec and mapping.
    ExecRecords,
    /// The proc connector.
    ProcessEvents,
    /// Events of the files below an overlay's.
    OverlayHandles,
    /// Events of mounts that come and go.
    MountEvents,
    /// Events before a file is read.
    ReadEvents,
    /// The sysctl `vm.memfd_noexec`.
    MemfdNoexec,
}

impl Feature {
    pub const ALL: [Feature; 11] = [
        Feature::PermissionEvents,
        Feature::OpenBeneath,
        Feature::MountOfFile,
        Feature::ProcessHandles,
        Feature::NamedEvents,
        Feature::ExecRecords,
        Feature::ProcessEvents,
        Feature::OverlayHandles,
        Feature::MountEvents,
        Feature::ReadEvents,
        Feature::MemfdNoexec,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Feature::PermissionEvents => "permission_events",
            Feature::OpenBeneath => "openat2",
            Feature::MountOfFile => "statx_mount_id",
            Feature::ProcessHandles => "fanotify_pidfd",
            Feature::NamedEvents => "fanotify_names",
            Feature::ExecRecords => "perf_exec_records",
            Feature::ProcessEvents => "proc_connector",
            Feature::OverlayHandles => "handle_fid",
            Feature::MountEvents => "fanotify_mounts",
            Feature::ReadEvents => "fanotify_reads",
            Feature::MemfdNoexec => "memfd_noexec",
        }
    }

    /// The kernel and settings that have it.
    pub fn since(self) -> &'static str {
        match self {
            Feature::PermissionEvents => "Linux 5.0 with CONFIG_FANOTIFY_ACCESS_PERMISSIONS",
            Feature::OpenBeneath => "Linux 5.6",
            Feature::MountOfFile => "Linux 5.8",
            Feature::ProcessHandles => "Linux 5.15 or 5.10.220",
            Feature::NamedEvents => "Linux 5.9",
            Feature::ExecRecords => {
                "CONFIG_PERF_EVENTS and tracefs, with CAP_PERFMON or CAP_SYS_ADMIN"
            }
            Feature::ProcessEvents => "CONFIG_PROC_EVENTS, and CAP_NET_ADMIN before Linux 6.6",
            Feature::OverlayHandles => "Linux 6.6",
            Feature::MountEvents => "Linux 6.14",
            Feature::ReadEvents => "Linux 6.14, where the filesystem is ext4, XFS or Btrfs",
            Feature::MemfdNoexec => "Linux 6.3",
        }
    }

    /// What driftd cannot do without it.
    pub fn without(self) -> &'static str {
        match self {
            Feature::PermissionEvents => {
                "driftd cannot run: the kernel does not ask before a program runs"
            }
            Feature::OpenBeneath => {
                "driftd cannot run: a container's files cannot be opened safely"
            }
            Feature::MountOfFile => {
                "containers whose layers are on several filesystems are recognised by their \
                 processes alone"
            }
            Feature::ProcessHandles => {
                "a program that ends at once may be reported without its process"
            }
            Feature::NamedEvents => {
                "renames, removals and chmod are found by scans, up to watch.sweep_interval later"
            }
            Feature::ExecRecords => {
                "programs run from memory, and libraries, are seen only while they run"
            }
            Feature::ProcessEvents => {
                "without the records of perf, programs run from memory would not be seen"
            }
            Feature::OverlayHandles => {
                "a program run from an overlay within a container may be seen only by the \
                 kernel's records"
            }
            Feature::MountEvents => {
                "a filesystem that is mounted in a container is noticed a moment later"
            }
            Feature::ReadEvents => {
                "a rule that denies cannot keep an interpreter from reading a script, or a \
                 program from loading a library: such processes are killed instead"
            }
            Feature::MemfdNoexec => "programs in memory can be reported, but not forbidden",
        }
    }

    /// Whether driftd cannot run without it.
    pub fn is_needed(self) -> bool {
        match self {
            Feature::PermissionEvents | Feature::OpenBeneath => true,
            Feature::MountOfFile
            | Feature::ProcessHandles
            | Feature::NamedEvents
            | Feature::ExecRecords
            | Feature::ProcessEvents
            | Feature::OverlayHandles
            | Feature::MountEvents
            | Feature::ReadEvents
            | Feature::MemfdNoexec => false,
        }
    }

    fn is_there(self) -> bool {
        match self {
            Feature::PermissionEvents => fanotify::probe().is_ok(),
            Feature::OpenBeneath => open_beneath().is_ok(),
            Feature::MountOfFile => file::stat_path("/").is_ok_and(|stat| stat.mount.is_some()),
            Feature::ProcessHandles => fanotify::probe().is_ok_and(|found| found.pidfd),
            Feature::NamedEvents => {
                has_group(u64::from(libc::FAN_REPORT_DIR_FID | libc::FAN_REPORT_NAME))
            }
            Feature::ExecRecords => perf::Rings::open().is_ok(),
            Feature::ProcessEvents => connector::Connector::open().is_ok(),
            Feature::OverlayHandles => takes_handle_fid(),
            Feature::MountEvents => has_group(FAN_REPORT_MNT),
            Feature::ReadEvents => has_read_events(),
            Feature::MemfdNoexec => std::path::Path::new("/proc/sys/vm/memfd_noexec").exists(),
        }
    }
}

/// The privileges that driftd needs, each with its purpose.
const PRIVILEGES: [(Capability, &str); 4] = [
    (Capability::CAP_SYS_ADMIN, "to watch executions with fanotify"),
    (Capability::CAP_SYS_PTRACE, "to read the processes of containers"),
    (Capability::CAP_DAC_READ_SEARCH, "to read the layers of images and containers"),
    (Capability::CAP_LEASE, "to see who can write to a program while it is executed"),
];

/// Everything that driftd cannot run without and that is missing here: one sentence each,
/// with the likely cause and the next step.
pub fn lacking() -> Vec<String> {
    let found = [privileges().map(drop), gate().map(drop), open_beneath()];
    found.into_iter().filter_map(Result::err).collect()
}

/// The privileges that driftd needs; the error names those that are missing.
pub fn privileges() -> Result<String, String> {
    let held = caps::read(None, CapSet::Effective)
        .map_err(|err| format!("the process's capabilities cannot be read: {err}"))?;
    let missing: Vec<String> = PRIVILEGES
        .iter()
        .filter(|(capability, _)| !held.contains(capability))
        .map(|(capability, purpose)| format!("{capability} ({purpose})"))
        .collect();
    if missing.is_empty() {
        return Ok(PRIVILEGES.map(|(capability, _)| capability.to_string()).join(", "));
    }
    Err(format!(
        "capabilities are missing: {} (run as root; in a unit they belong in \
         CapabilityBoundingSet=)",
        missing.join(", ")
    ))
}

/// Whether the kernel asks before a program runs.
pub fn gate() -> Result<fanotify::Capabilities, String> {
    fanotify::probe().map_err(|err| {
        let errno = match err {
            fanotify::Error::Missing => libc::ENOSYS,
            fanotify::Error::NotPermitted => libc::EPERM,
            _ => return format!("fanotify: {err}"),
        };
        let is_known = std::path::Path::new("/proc/sys/fs/fanotify").exists();
        match by_a_filter("fanotify_init", errno, is_known, is_filtered()) {
            Some(filter) => format!("fanotify: {err}; or {filter}"),
            None => format!("fanotify: {err}"),
        }
    })
}

/// Whether a container's files can be opened without leaving its root.
pub fn open_beneath() -> Result<(), String> {
    let opened = file::open_directory("/").and_then(|root| file::open_path_beneath(root, b"proc"));
    let Some(errno @ (libc::ENOSYS | libc::EPERM)) = opened.err().and_then(|e| e.raw_os_error())
    else {
        return Ok(());
    };
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let is_known = version_of(&release).is_none_or(|version| version >= (5, 6));
    let cause = by_a_filter("openat2", errno, is_known, is_filtered())
        .unwrap_or_else(|| format!("Linux {release} is older than 5.6 (install a newer kernel)"));
    Err(format!("openat2 is missing: {}; {cause}", Feature::OpenBeneath.without()))
}

/// The likely cause of a system call's failure, if that is a filter of system calls.
fn by_a_filter(call: &str, errno: i32, kernel_has_it: bool, is_filtered: bool) -> Option<String> {
    if !is_filtered && !kernel_has_it {
        return None;
    }
    let known = if is_filtered { "" } else { "probably " };
    match errno {
        libc::ENOSYS if call == "openat2" => Some(format!(
            "{known}a filter of system calls answers ENOSYS: the unit's RestrictSUIDSGID= does \
             (take it out; see: systemctl cat driftd), and so does an old container runtime \
             (libseccomp before 2.5)"
        )),
        libc::ENOSYS | libc::EPERM if kernel_has_it => Some(format!(
            "{known}a filter of system calls refuses it (name {call} in the unit's \
             SystemCallFilter=, see: systemctl cat driftd; or in the container's seccomp profile)"
        )),
        _ => None,
    }
}

/// Whether a filter of system calls is in force for this process.
fn is_filtered() -> bool {
    std::fs::read_to_string("/proc/self/status")
        .is_ok_and(|status| status.lines().any(|line| line == "Seccomp:\t2"))
}

/// The first two numbers of a kernel's release.
pub fn version_of(release: &str) -> Option<(u32, u32)> {
    let mut numbers =
        release.split(|character: char| !character.is_ascii_digit()).map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Not yet in libc.
const FAN_REPORT_MNT: u64 = 0x4000;
const AT_HANDLE_FID: libc::c_int = 0x200;

/// Where the layers of containers usually are; the nearest directory that exists is tried.
const LAYERS: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots";

/// Whether the kernel asks before a file of a container's layer is read.
fn has_read_events() -> bool {
    let nearest = std::path::Path::new(LAYERS).ancestors();
    let directory = nearest.filter_map(|path| file::open_directory(path).ok()).next();
    let asks = |directory: std::os::fd::OwnedFd| fanotify::asks_before_reads(directory.as_fd());
    directory.is_some_and(|directory| asks(directory).unwrap_or(false))
}

/// Whether the kernel accepts these flags of fanotify_init(2), together with the class of
/// notifications.
fn has_group(flags: u64) -> bool {
    let Ok(flags) = u32::try_from(flags) else { return false };
    let flags =
        InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::from_bits_retain(flags);
    match Fanotify::init(flags, EventFFlags::empty()) {
        Ok(_) => true,
        // The limit of groups is reached. The kernel checks the flags first.
        Err(errno) => errno == Errno::EMFILE,
    }
}

/// Whether name_to_handle_at(2) gives handles that only identify a file.
fn takes_handle_fid() -> bool {
    #[repr(C)]
    struct Handle {
        length: libc::c_uint,
        kind: libc::c_int,
        bytes: [u8; 128],
    }
    let Ok(root) = file::open_directory("/proc/self") else { return false };
    let mut handle = Handle { length: 128, kind: 0, bytes: [0; 128] };
    let mut mount: libc::c_int = 0;
    // SAFETY: `handle` has room for `length` bytes after its first two fields, the name is a
    // C string, and `handle`, the name and `mount` live until after the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            root.as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH | AT_HANDLE_FID,
        )
    };
    // A kernel that does not know the flag returns EINVAL for every file.
    result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL)
}

/// The result of trying every feature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    missing: Vec<Feature>,
}

impl Capabilities {
    pub fn probe() -> Capabilities {
        let missing = Feature::ALL.into_iter().filter(|feature| !feature.is_there()).collect();
        Capabilities { missing }
    }

    pub fn has(&self, feature: Feature) -> bool {
        !self.missing.contains(&feature)
    }

    /// What the kernel lacks.
    pub fn missing(&self) -> &[Feature] {
        &self.missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u02_what_answers_in_the_kernels_place_is_named() {
        let by = |errno, kernel_has_it, is_filtered| {
            by_a_filter("openat2", errno, kernel_has_it, is_filtered).unwrap_or_default()
        };
        let found = by(libc::ENOSYS, true, true);
        assert!(found.starts_with("a filter") && found.contains("RestrictSUIDSGID="), "{found}");
        let found = by(libc::ENOSYS, true, false);
        assert!(found.starts_with("probably a filter"), "{found}");
        assert!(by(libc::EPERM, true, true).contains("name openat2 in the unit's"));
        assert_eq!(by(libc::ENOSYS, false, false), "", "the kernel is too old");
    }

    #[test]
    fn u02_this_machine_has_what_openat2_needs() {
        assert_eq!(open_beneath(), Ok(()));
    }

    #[test]
    fn the_version_of_a_kernel_is_read() {
        assert_eq!(version_of("6.18.5"), Some((6, 18)));
        assert_eq!(version_of("5.6.0-2-generic"), Some((5, 6)));
        assert_eq!(version_of("odd"), None);
    }

    #[test]
    fn every_feature_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = Feature::ALL.map(Feature::name).into();
        assert_eq!(names.len(), Feature::ALL.len());
    }
}
