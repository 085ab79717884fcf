//! The tracepoint `sched:sched_process_exec`, found in tracefs: its number, and where its
//! records have the file name.

use std::io;
use std::os::fd::OwnedFd;

use super::error::Error;
use crate::sys::file;

/// `sched:sched_process_exec`, as this kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tracepoint {
    pub(super) id: u64,
    pub(super) file_name: usize,
}

impl Tracepoint {
    pub(super) fn find() -> Result<Tracepoint, Error> {
        let mut first_error = None;
        for place in ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"] {
            match file::open_directory(place).and_then(|place| Tracepoint::read(&place)) {
                Ok(tracepoint) => return Ok(tracepoint),
                Err(err) => _ = first_error.get_or_insert(err),
            }
        }
        // Not mounted: mount it for this process alone, without a mount point.
        mount_tracefs()
            .and_then(|tracefs| Tracepoint::read(&tracefs))
            .map_err(|err| Error::NoTracepoint(first_error.unwrap_or(err)))
    }

    fn read(tracefs: &OwnedFd) -> io::Result<Tracepoint> {
        let read = |name: &str| {
            let path = format!("events/sched/sched_process_exec/{name}");
            let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
            let fd = rustix::fs::openat(tracefs, path, flags, rustix::fs::Mode::empty())?;
            io::read_to_string(std::fs::File::from(fd))
        };
        let id = read("id")?.trim_end().parse().ok();
        let file_name = parse_format(&read("format")?);
        id.zip(file_name)
            .map(|(id, file_name)| Tracepoint { id, file_name })
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

fn mount_tracefs() -> io::Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let context = rustix::mount::fsopen("tracefs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_RDONLY;
    Ok(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// The offset of the file name's place in a record of the tracepoint:
/// `field:__data_loc char[] filename; offset:8; size:4; signed:0;`
fn parse_format(text: &str) -> Option<usize> {
    let line = text.lines().find(|line| line.contains("__data_loc char[] filename;"))?;
    let offset = line.split(';').find_map(|part| part.trim().strip_prefix("offset:"))?;
    offset.parse().ok().filter(|&offset: &usize| offset < 4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_of_the_file_name_is_read() {
        let format = "name: sched_process_exec\nID: 299\nformat:\n\
            \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n\
            \tfield:__data_loc char[] filename;\toffset:8;\tsize:4;\tsigned:0;\n";
        assert_eq!(parse_format(format), Some(8));
        assert_eq!(parse_format("field:pid_t pid;\toffset:12;"), None);
    }
}
