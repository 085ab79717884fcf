//! Facts about processes, from `/proc`, as bytes.
//!
//! A container chooses the name, the arguments and the mounts of a process, and none of
//! them need be UTF-8. The procfs crate holds `/proc/PID` open, so that a pid that is used
//! again cannot mix two processes. Its parsers of `stat`, `status`, `cmdline` and
//! `mountinfo` need UTF-8 and fail on hostile names, so this folder reads those fields.
//!
//! A process that has ended is an `Err` or a `None`, never a panic.

mod ancestors;
mod cgroups;
mod connections;
mod descriptors;
mod error;
mod handle;
mod mappings;
mod namespaces;
mod stat;
mod status;
mod threads;
mod time;

pub use ancestors::{all, ancestors, chain};
pub(super) use cgroups::hierarchy_mount;
pub use connections::{Connection, SocketEntry};
pub use descriptors::Descriptor;
pub use handle::{Handle, MAX_ARGUMENT_BYTES, MAX_ARGUMENTS, split_arguments};
pub use mappings::Mapping;
pub use namespaces::{
    Whereabouts, is_host_mount_namespace, is_host_pid_namespace, mount_namespace_of,
    pid_namespace_of,
};
pub use stat::{ArgumentArea, Stat, activity, age, has_threads, read_stat, tty_name};
pub use threads::{ReadCall, process_of, read_call};
pub use time::{ticks_in, ticks_since_boot, time_of_ticks};

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;
    use crate::sys::file;

    #[test]
    fn our_own_facts_are_read() {
        let me = Handle::open(std::process::id()).unwrap();
        assert_eq!(me.exe().unwrap(), std::env::current_exe().unwrap().into_os_string().into_vec());
        let arguments: Vec<Vec<u8>> =
            std::env::args_os().map(OsStringExt::into_vec).take(MAX_ARGUMENTS).collect();
        assert_eq!(me.arguments().unwrap(), Some(arguments));
        assert_eq!(me.uid().unwrap(), rustix::process::geteuid().as_raw());
        let (started, now) = (me.identity().start_time, ticks_since_boot());
        assert!(started <= now && now - started < 100 * 3600, "{started} and {now}");
        let parent = rustix::process::getppid().unwrap().as_raw_nonzero().get();
        let chain = ancestors(me.first_stat(), None);
        assert_eq!(chain[0].identity().pid, u32::try_from(parent).unwrap());
    }

    #[test]
    fn our_own_code_and_descriptors_are_found() {
        let me = Handle::open(std::process::id()).unwrap();
        let (own, device) = {
            let stat = file::stat_path("/proc/self/exe").unwrap();
            (stat.inode, stat.device)
        };
        let mapped = me.mapped_code().unwrap();
        let own = mapped.iter().find(|one| (one.inode, one.device) == (own, device)).unwrap();
        let file = me.open_mapped(own.start, own.end).unwrap();
        assert_eq!(file::stat(&file).unwrap().inode, own.inode);
        let (_reader, writer) = std::io::pipe().unwrap();
        let writer = u32::try_from(std::os::fd::AsRawFd::as_raw_fd(&writer)).unwrap();
        assert!(matches!(me.descriptor(writer).unwrap(), Descriptor::Pipe { .. }));
        assert_eq!(me.access(writer).unwrap(), (false, true));
        assert!(me.descriptors(4096).unwrap().contains(&writer));
    }
}
