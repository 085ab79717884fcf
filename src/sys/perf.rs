//! The kernel's records of what every process runs and maps: perf_event_open(2).
//!
//! One ring buffer for each processor, into which two events write: the tracepoint
//! `sched:sched_process_exec`, and one that counts nothing and makes the kernel
//! record every mapping of code, every fork and every exit. Nobody waits for whoever
//! reads them: what finds no room is counted by the kernel ([`Record::Lost`]).
//!
//! An execve leaves its records in this order: [`Record::Began`], a
//! [`Record::Mapped`] for the program and another one for its dynamic linker,
//! [`Record::Executed`]. They can be on two processors' rings; their times tell.

use std::fmt;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};

/// One thing that the kernel recorded. Processes are numbered as in the pid
/// namespace of who opened the rings, times are of [`now`]'s clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    /// A process has left its old program: what it maps from here on is the new one.
    Began { pid: u32, time: u64 },
    /// Code was mapped.
    Mapped(Mapped),
    /// A process has become a program.
    Executed(Executed),
    /// A process has made another one. (Threads are not told.)
    Forked { pid: u32, parent: u32, time: u64 },
    /// A process has ended.
    Exited { pid: u32, time: u64 },
    /// There was no room for so many records.
    Lost { count: u64, time: u64 },
}

impl Record {
    pub fn time(&self) -> u64 {
        match self {
            Record::Mapped(Mapped { time, .. })
            | Record::Executed(Executed { time, .. })
            | Record::Began { time, .. }
            | Record::Forked { time, .. }
            | Record::Exited { time, .. }
            | Record::Lost { time, .. } => *time,
        }
    }
}

/// A file, or memory that is none, was mapped for execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    pub pid: u32,
    pub time: u64,
    pub address: u64,
    pub length: u64,
    /// Of the superblock, as in [`super::file::Stat`]; kernels before 6.18 may
    /// tell the file below an overlay's.
    pub device: u64,
    /// 0 for memory that is no file.
    pub inode: u64,
    /// Others that map it see what is written to it (`MAP_SHARED`).
    pub is_shared: bool,
    /// As the process sees it, ` (deleted)` and all.
    pub name: Box<[u8]>,
}

/// A process has become a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    pub pid: u32,
    pub time: u64,
    /// As it was given to execve, so that it can be relative, and a script's name;
    /// `/dev/fd/N` for what was given as a descriptor.
    pub file_name: Box<[u8]>,
    /// The inode of its directory in the hierarchy of control groups that perf
    /// belongs to: the unified one unless it is mounted otherwise. `None` where the
    /// kernel does not tell.
    pub cgroup: Option<u64>,
}

/// Why there are no rings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this kernel has no perf events (CONFIG_PERF_EVENTS)")]
    Missing,
    #[error(
        "the kernel refuses perf events to this process (it needs CAP_PERFMON or \
         CAP_SYS_ADMIN, and a system call filter that lets perf_event_open pass)"
    )]
    NotPermitted,
    #[error("the tracepoint sched:sched_process_exec cannot be found in tracefs: {0}")]
    NoTracepoint(#[source] io::Error),
    #[error("cannot open the kernel's records: {0}")]
    Other(#[source] io::Error),
}

impl From<io::Error> for Error {
    fn from(err: io::Error) -> Error {
        match err.raw_os_error() {
            Some(libc::ENOSYS) => Error::Missing,
            Some(libc::EPERM | libc::EACCES) => Error::NotPermitted,
            _ => Error::Other(err),
        }
    }
}

/// How the records look: decided when the rings are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Executions tell their control group (Linux 5.7).
    pub cgroup: bool,
    /// Where a tracepoint's record says where its file name is.
    pub file_name: usize,
}

/// What was in a ring is not what perf_event_open(2) says; its records cannot be
/// told apart any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a perf record says it is {length} bytes long where {left} bytes are left")]
pub struct Malformed {
    pub length: usize,
    pub left: usize,
}

const RECORD_MMAP: u32 = 1;
const RECORD_LOST: u32 = 2;
const RECORD_COMM: u32 = 3;
const RECORD_EXIT: u32 = 4;
const RECORD_THROTTLE: u32 = 5;
const RECORD_FORK: u32 = 7;
const RECORD_SAMPLE: u32 = 9;
const RECORD_MMAP2: u32 = 10;
const RECORD_LOST_SAMPLES: u32 = 13;

/// `struct perf_event_header`: type, misc, size.
const HEADER: usize = 8;
/// The record of a name's change: the change came by execve.
const MISC_COMM_EXEC: u16 = 1 << 13;
/// A mapping's build ID is told instead of its device and inode.
const MISC_MMAP_BUILD_ID: u16 = 1 << 14;
/// Behind every record that is no sample: pid, tid, time.
const TRAILER: usize = 16;

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

fn text(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Decodes what was in a ring, whole records in the order of their writing. Pure.
/// Records that say nothing of interest are left out. What was decoded before a
/// malformed record is handed over all the same.
pub fn decode(
    mut bytes: &[u8],
    layout: Layout,
    records: &mut Vec<Record>,
) -> Result<(), Malformed> {
    while !bytes.is_empty() {
        let left = bytes.len();
        let length = bytes
            .get(6..)
            .and_then(|rest| rest.first_chunk().copied())
            .map_or(0, u16::from_ne_bytes)
            .into();
        if length < HEADER || length > left {
            return Err(Malformed { length, left });
        }
        let (record, following) = bytes.split_at(length);
        bytes = following;
        let kind = u32_at(record, 0).expect("inside the header");
        let misc = u16::from_ne_bytes([record[4], record[5]]);
        // A record that is too short for what it should hold is passed over: its
        // length is known all the same.
        records.extend(decode_one(kind, misc, &record[HEADER..], layout));
    }
    Ok(())
}

fn decode_one(kind: u32, misc: u16, body: &[u8], layout: Layout) -> Option<Record> {
    if kind == RECORD_SAMPLE {
        return decode_sample(body, layout).map(Record::Executed);
    }
    let (body, trailer) = body.split_at_checked(body.len().checked_sub(TRAILER)?)?;
    let time = u64_at(trailer, 8)?;
    match kind {
        RECORD_MMAP2 => {
            let has_inode = misc & MISC_MMAP_BUILD_ID == 0;
            let (major, minor) = (u32_at(body, 32)?, u32_at(body, 36)?);
            Some(Record::Mapped(Mapped {
                pid: u32_at(body, 0)?,
                time,
                address: u64_at(body, 8)?,
                length: u64_at(body, 16)?,
                device: if has_inode { rustix::fs::makedev(major, minor) } else { 0 },
                inode: if has_inode { u64_at(body, 40)? } else { 0 },
                is_shared: u32_at(body, 60)? & libc::MAP_SHARED.cast_unsigned() != 0,
                name: text(body.get(64..)?).into(),
            }))
        }
        RECORD_COMM if misc & MISC_COMM_EXEC != 0 => {
            Some(Record::Began { pid: u32_at(body, 0)?, time })
        }
        RECORD_FORK | RECORD_EXIT => {
            let (pid, parent) = (u32_at(body, 0)?, u32_at(body, 4)?);
            let (tid, _) = (u32_at(body, 8)?, u32_at(body, 12)?);
            match kind {
                // A thread comes or goes.
                _ if pid != tid => None,
                RECORD_FORK => Some(Record::Forked { pid, parent, time }),
                _ => Some(Record::Exited { pid, time }),
            }
        }
        RECORD_LOST => Some(Record::Lost { count: u64_at(body, 8)?, time }),
        RECORD_LOST_SAMPLES => Some(Record::Lost { count: u64_at(body, 0)?, time }),
        // Records are held back from here on, and nobody counts them.
        RECORD_THROTTLE => Some(Record::Lost { count: 1, time }),
        RECORD_MMAP | RECORD_COMM => None,
        _ => None,
    }
}

fn decode_sample(body: &[u8], layout: Layout) -> Option<Executed> {
    let pid = u32_at(body, 0)?;
    let time = u64_at(body, 8)?;
    let raw_length = u32_at(body, 16)? as usize;
    let (raw, behind) = body.get(20..)?.split_at_checked(raw_length)?;
    // `__data_loc`: the offset in the lower half, the length in the upper one.
    let place = u32_at(raw, layout.file_name)?;
    let (offset, length) = ((place & 0xffff) as usize, (place >> 16) as usize);
    let file_name = text(raw.get(offset..offset + length)?).into();
    let cgroup = if layout.cgroup { Some(u64_at(behind, 0)?) } else { None };
    Some(Executed { pid, time, file_name, cgroup })
}

/// `struct perf_event_attr`, as far as the first version that has all we ask for.
/// The kernel takes what is behind it for zeros.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint_type: u32,
    config_1: u64,
    config_2: u64,
    branch_sample_type: u64,
    sample_registers_user: u64,
    sample_stack_user: u32,
    clock: i32,
    sample_registers_interrupt: u64,
    auxiliary_watermark: u32,
    sample_max_stack: u16,
    reserved: u16,
}

const TYPE_SOFTWARE: u32 = 1;
const TYPE_TRACEPOINT: u32 = 2;
const COUNT_SOFTWARE_DUMMY: u64 = 9;
const SAMPLE_TID: u64 = 1 << 1;
const SAMPLE_TIME: u64 = 1 << 2;
const SAMPLE_RAW: u64 = 1 << 10;
const SAMPLE_CGROUP: u64 = 1 << 21;
const FLAG_DISABLED: u64 = 1;
const FLAG_MMAP: u64 = 1 << 8;
const FLAG_COMM: u64 = 1 << 9;
const FLAG_TASK: u64 = 1 << 13;
const FLAG_SAMPLE_ID_ALL: u64 = 1 << 18;
const FLAG_MMAP2: u64 = 1 << 23;
const FLAG_COMM_EXEC: u64 = 1 << 24;
const FLAG_USE_CLOCK: u64 = 1 << 25;
const OPEN_CLOEXEC: libc::c_ulong = 8;
/// `_IO('$', 0)` and `_IO('$', 5)`.
const IOCTL_ENABLE: libc::c_ulong = 0x2400;
const IOCTL_SET_OUTPUT: libc::c_ulong = 0x2405;

/// `data_head` and `data_tail` in `struct perf_event_mmap_page`.
const DATA_HEAD: usize = 1024;
const DATA_TAIL: usize = 1032;

/// Bytes for records on each processor, tried from the first on: how much is
/// allowed depends on what else of ours is locked in memory
/// (`kernel.perf_event_mlock_kb`). One execve leaves about a kilobyte.
const RING_BYTES: [usize; 3] = [256 << 10, 128 << 10, 64 << 10];

fn open_event(attributes: &Attributes, processor: u32) -> io::Result<OwnedFd> {
    let every_process = -1;
    let no_group = -1;
    // SAFETY: `attributes` lives during the call and says how long it is.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            ptr::from_ref(attributes),
            every_process,
            processor,
            no_group,
            OPEN_CLOEXEC,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened it, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn control(event: BorrowedFd<'_>, request: libc::c_ulong, argument: i32) -> io::Result<()> {
    // SAFETY: both requests take a number and touch no memory of ours.
    let done = unsafe { libc::ioctl(event.as_raw_fd(), request, libc::c_long::from(argument)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One processor's ring.
struct Ring {
    processor: u32,
    executions: OwnedFd,
    /// It writes into the ring of the other; closed, it would not.
    _mappings: OwnedFd,
    /// `struct perf_event_mmap_page`, a page long, then the records.
    memory: ptr::NonNull<u8>,
    page: usize,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and every access to the two
// words that the kernel uses as well is atomic.
unsafe impl Send for Ring {}

impl Ring {
    fn open(processor: u32, tracepoint: Tracepoint, with_cgroup: bool) -> io::Result<Ring> {
        let common = || Attributes {
            size: u32::try_from(size_of::<Attributes>()).expect("a hundred bytes"),
            flags: FLAG_DISABLED | FLAG_SAMPLE_ID_ALL | FLAG_USE_CLOCK,
            clock: libc::CLOCK_MONOTONIC,
            sample_type: SAMPLE_TID | SAMPLE_TIME,
            ..Attributes::default()
        };
        let cgroup = if with_cgroup { SAMPLE_CGROUP } else { 0 };
        let executions = Attributes {
            kind: TYPE_TRACEPOINT,
            config: tracepoint.id,
            sample_period: 1,
            // The reader is woken by executions, and by a ring that is half full.
            wakeup: 1,
            sample_type: common().sample_type | SAMPLE_RAW | cgroup,
            ..common()
        };
        let mappings = Attributes {
            kind: TYPE_SOFTWARE,
            config: COUNT_SOFTWARE_DUMMY,
            flags: common().flags | FLAG_MMAP | FLAG_MMAP2 | FLAG_COMM | FLAG_COMM_EXEC | FLAG_TASK,
            ..common()
        };
        let executions = open_event(&executions, processor)?;
        let mappings = open_event(&mappings, processor)?;
        let page = rustix::param::page_size();
        let mut outcome = Err(io::Error::from(io::ErrorKind::InvalidInput));
        for bytes in RING_BYTES {
            outcome = map(executions.as_fd(), page + bytes).map(|memory| (memory, bytes));
            if outcome.is_ok() {
                break;
            }
        }
        let (memory, bytes) = outcome?;
        let ring = Ring { processor, executions, _mappings: mappings, memory, page, bytes };
        let output = ring.executions.as_raw_fd();
        control(ring._mappings.as_fd(), IOCTL_SET_OUTPUT, output)?;
        control(ring._mappings.as_fd(), IOCTL_ENABLE, 0)?;
        control(ring.executions.as_fd(), IOCTL_ENABLE, 0)?;
        Ok(ring)
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: the first page of the mapping, which lives as long as `self`; both
        // words are eight bytes wide and aligned to eight bytes, and the kernel
        // accesses them as whole words.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().add(offset).cast()) }
    }

    /// Copies what is there to the end of `into` and gives its room back.
    fn take(&self, into: &mut Vec<u8>) {
        let head = self.word(DATA_HEAD).load(Ordering::Acquire);
        let tail = self.word(DATA_TAIL).load(Ordering::Relaxed);
        let size = self.bytes as u64;
        // Both only ever grow, and the kernel does not write over what is not read.
        let length = usize::try_from(head.wrapping_sub(tail).min(size)).expect("a ring's size");
        let start = usize::try_from(tail % size).expect("a ring's size");
        let first = length.min(self.bytes - start);
        for (start, length) in [(start, first), (0, length - first)] {
            // SAFETY: both pieces lie in the mapping's records, and the kernel does
            // not write to what is between tail and head.
            let piece = unsafe {
                let records = self.memory.as_ptr().add(self.page);
                std::slice::from_raw_parts(records.add(start), length)
            };
            into.extend_from_slice(piece);
        }
        self.word(DATA_TAIL).store(head, Ordering::Release);
    }
}

fn map(event: BorrowedFd<'_>, length: usize) -> io::Result<ptr::NonNull<u8>> {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let memory = unsafe {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        libc::mmap(ptr::null_mut(), length, access, kind, event.as_raw_fd(), 0)
    };
    if memory == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    ptr::NonNull::new(memory.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: this mapping was made with this length, and nothing refers to it.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.page + self.bytes) };
    }
}

/// The rings of all processors.
pub struct Rings {
    rings: Vec<Ring>,
    tracepoint: Tracepoint,
    layout: Layout,
    scratch: Vec<u8>,
}

impl fmt::Debug for Rings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rings({})", self.rings.len())
    }
}

impl Rings {
    pub fn open() -> Result<Rings, Error> {
        let tracepoint = Tracepoint::find()?;
        let mut refused = None;
        for cgroup in [true, false] {
            let layout = Layout { cgroup, file_name: tracepoint.file_name };
            let mut rings = Rings { rings: Vec::new(), tracepoint, layout, scratch: Vec::new() };
            match rings.follow_processors() {
                Ok(_) if !rings.rings.is_empty() => return Ok(rings),
                Ok(_) => (),
                Err(err) if err.raw_os_error() == Some(libc::EINVAL) => refused = Some(err),
                Err(err) => return Err(err.into()),
            }
        }
        Err(refused.unwrap_or_else(|| io::ErrorKind::NotFound.into()).into())
    }

    /// Opens a ring for each processor that has come, and closes those of the ones
    /// that have gone. Whether there were any: what ran there meanwhile was not
    /// recorded.
    pub fn follow_processors(&mut self) -> io::Result<bool> {
        let online = online_processors()?;
        let before = self.rings.len();
        self.rings.retain(|ring| online.contains(&ring.processor));
        let mut has_changed = self.rings.len() != before;
        for processor in online {
            if self.rings.iter().any(|ring| ring.processor == processor) {
                continue;
            }
            match Ring::open(processor, self.tracepoint, self.layout.cgroup) {
                Ok(ring) => self.rings.push(ring),
                // It has gone since it was listed.
                Err(err) if err.raw_os_error() == Some(libc::ENODEV) => (),
                Err(err) => return Err(err),
            }
            has_changed = true;
        }
        Ok(has_changed)
    }

    /// Waits until there is something to read; whether a processor may have gone.
    pub fn wait(&self, timeout: std::time::Duration) -> bool {
        let mut events: Vec<PollFd<'_>> = self
            .rings
            .iter()
            .map(|ring| PollFd::from_borrowed_fd(ring.executions.as_fd(), PollFlags::IN))
            .collect();
        let timeout = Timespec::try_from(timeout).ok();
        // An error here (a signal) only means that the turn comes early.
        let _ = rustix::event::poll(&mut events, timeout.as_ref());
        events.iter().any(|event| event.revents().intersects(PollFlags::HUP | PollFlags::ERR))
    }

    /// Reads what is in the rings, one after the other: the records of each are in
    /// order, those of several are not.
    pub fn read(&mut self, records: &mut Vec<Record>) -> Result<(), Malformed> {
        let mut outcome = Ok(());
        for ring in &self.rings {
            self.scratch.clear();
            ring.take(&mut self.scratch);
            outcome = outcome.and(decode(&self.scratch, self.layout, records));
        }
        outcome
    }

    pub fn layout(&self) -> Layout {
        self.layout
    }
}

/// The time by the clock of the records, in nanoseconds.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

fn online_processors() -> io::Result<Vec<u32>> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/online")?;
    parse_processors(text.trim_end()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// `0-3,5`
fn parse_processors(text: &str) -> Option<Vec<u32>> {
    const MOST: u32 = 1 << 16;
    let mut processors = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MOST {
            return None;
        }
        processors.extend(first..=last);
    }
    Some(processors)
}

/// `sched:sched_process_exec`, as this kernel has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tracepoint {
    id: u64,
    file_name: usize,
}

impl Tracepoint {
    fn find() -> Result<Tracepoint, Error> {
        let mut first_error = None;
        for place in ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"] {
            match super::file::open_directory(place).and_then(|place| Tracepoint::read(&place)) {
                Ok(tracepoint) => return Ok(tracepoint),
                Err(err) => _ = first_error.get_or_insert(err),
            }
        }
        // Not mounted: then for ourselves alone, at no place.
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

/// Where a record of the tracepoint says where its file name is:
/// `field:__data_loc char[] filename; offset:8; size:4; signed:0;`
fn parse_format(text: &str) -> Option<usize> {
    let line = text.lines().find(|line| line.contains("__data_loc char[] filename;"))?;
    let offset = line.split(';').find_map(|part| part.trim().strip_prefix("offset:"))?;
    offset.parse().ok().filter(|&offset: &usize| offset < 4096)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAYOUT: Layout = Layout { cgroup: true, file_name: 8 };

    fn record(kind: u32, misc: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_ne_bytes().to_vec();
        bytes.extend(misc.to_ne_bytes());
        bytes.extend(u16::try_from(HEADER + body.len()).unwrap().to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    fn trailer(time: u64) -> Vec<u8> {
        [&words(&[7, 7])[..], &time.to_ne_bytes()].concat()
    }

    fn padded(name: &[u8]) -> Vec<u8> {
        let mut name = name.to_vec();
        name.resize((name.len() / 8 + 1) * 8, 0);
        name
    }

    fn mapped(name: &[u8]) -> Vec<u8> {
        let mut body = words(&[7, 8]);
        body.extend([0x1000_u64, 0x2000, 0].iter().flat_map(|word| word.to_ne_bytes()));
        body.extend(words(&[0, 39]));
        body.extend([99_u64, 1].iter().flat_map(|word| word.to_ne_bytes()));
        body.extend(words(&[5, 2]));
        body.extend(padded(name));
        body.extend(trailer(5));
        record(RECORD_MMAP2, 2, &body)
    }

    fn executed(file_name: &[u8], layout: Layout) -> Vec<u8> {
        let name = padded(file_name);
        let length = u32::try_from(name.len()).unwrap();
        let mut raw = words(&[1, 2, 20 | (length << 16), 7, 7]);
        raw.extend(name);
        // The kernel's own rounding: the length word and the data together.
        raw.resize((raw.len() + 4).next_multiple_of(8) - 4, 0);
        let mut body = words(&[7, 7]);
        body.extend(6_u64.to_ne_bytes());
        body.extend(u32::try_from(raw.len()).unwrap().to_ne_bytes());
        body.extend(raw);
        if layout.cgroup {
            body.extend(4711_u64.to_ne_bytes());
        }
        record(RECORD_SAMPLE, 1, &body)
    }

    fn decoded(bytes: &[u8], layout: Layout) -> Vec<Record> {
        let mut records = Vec::new();
        decode(bytes, layout, &mut records).unwrap();
        records
    }

    #[test]
    fn an_execve_is_read_as_the_kernel_writes_it() {
        let began =
            record(RECORD_COMM, MISC_COMM_EXEC, &[words(&[7, 7, 0, 0]), trailer(4)].concat());
        let bytes = [began, mapped(b"/memfd:a (deleted)"), executed(b"/dev/fd/3", LAYOUT)].concat();
        let expected = [
            Record::Began { pid: 7, time: 4 },
            Record::Mapped(Mapped {
                pid: 7,
                time: 5,
                address: 0x1000,
                length: 0x2000,
                device: rustix::fs::makedev(0, 39),
                inode: 99,
                is_shared: false,
                name: (*b"/memfd:a (deleted)").into(),
            }),
            Record::Executed(Executed {
                pid: 7,
                time: 6,
                file_name: (*b"/dev/fd/3").into(),
                cgroup: Some(4711),
            }),
        ];
        assert_eq!(decoded(&bytes, LAYOUT), expected);
    }

    #[test]
    fn older_kernels_tell_no_control_group() {
        let layout = Layout { cgroup: false, ..LAYOUT };
        let expected = Executed { pid: 7, time: 6, file_name: (*b"/x").into(), cgroup: None };
        assert_eq!(decoded(&executed(b"/x", layout), layout), [Record::Executed(expected)]);
    }

    #[test]
    fn processes_come_and_go_and_threads_are_not_told() {
        let task = |kind, pid, parent, tid| {
            let time = 0_u64.to_ne_bytes();
            let body = [words(&[pid, parent, tid, parent]), time.to_vec(), trailer(9)].concat();
            record(kind, 0, &body)
        };
        let bytes = [
            task(RECORD_FORK, 8, 7, 8),
            task(RECORD_FORK, 8, 8, 9),
            task(RECORD_EXIT, 8, 8, 9),
            task(RECORD_EXIT, 8, 7, 8),
        ];
        let expected =
            [Record::Forked { pid: 8, parent: 7, time: 9 }, Record::Exited { pid: 8, time: 9 }];
        assert_eq!(decoded(&bytes.concat(), LAYOUT), expected);
    }

    #[test]
    fn what_the_kernel_lost_is_told() {
        let body = [1_u64.to_ne_bytes(), 12_u64.to_ne_bytes()].concat();
        let bytes = record(RECORD_LOST, 0, &[body, trailer(3)].concat());
        assert_eq!(decoded(&bytes, LAYOUT), [Record::Lost { count: 12, time: 3 }]);
    }

    #[test]
    fn a_record_that_lies_about_its_length_ends_the_reading() {
        let mut bytes = mapped(b"/x");
        let whole = bytes.len();
        bytes.extend(record(RECORD_EXIT, 0, &[]));
        bytes[whole + 6] = 200;
        let mut records = Vec::new();
        let outcome = decode(&bytes, LAYOUT, &mut records);
        assert_eq!(outcome, Err(Malformed { length: 200, left: 8 }));
        assert_eq!(records.len(), 1);
    }

    #[test]
    fn processors_and_formats_are_read() {
        assert_eq!(parse_processors("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(parse_processors("0"), Some(vec![0]));
        assert_eq!(parse_processors("0-4294967295"), None);
        assert_eq!(parse_processors(""), None);
        let format = "name: sched_process_exec\nID: 299\nformat:\n\
            \tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;\n\n\
            \tfield:__data_loc char[] filename;\toffset:8;\tsize:4;\tsigned:0;\n";
        assert_eq!(parse_format(format), Some(8));
        assert_eq!(parse_format("field:pid_t pid;\toffset:12;"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_records_or_malformed(
            bytes: Vec<u8>, cgroup: bool, file_name in 0..64_usize,
        ) {
            let _ = decode(&bytes, Layout { cgroup, file_name }, &mut Vec::new());
        }

        #[test]
        fn any_body_is_a_record_or_passed_over(
            kind in 0..20_u32, misc: u16, body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let bytes = record(kind, misc, &body);
            let mut records = Vec::new();
            decode(&bytes, LAYOUT, &mut records).unwrap();
            prop_assert!(records.len() <= 1);
        }

        #[test]
        fn any_name_is_read_back(name in proptest::collection::vec(1_u8.., 1..200)) {
            let records = decoded(&[mapped(&name), executed(&name, LAYOUT)].concat(), LAYOUT);
            let [Record::Mapped(mapped), Record::Executed(executed)] = &records[..] else {
                return Err(TestCaseError::fail(format!("{records:?}")));
            };
            prop_assert_eq!((&*mapped.name, &*executed.file_name), (&name[..], &name[..]));
        }
    }

    #[test]
    fn our_own_execve_is_recorded_in_its_order() {
        let mut rings = Rings::open().unwrap_or_else(|err| panic!("{err} (run as root)"));
        let before = now();
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        let mut records = Vec::new();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !records
            .iter()
            .any(|record| matches!(record, Record::Exited { pid: p, .. } if *p == pid))
        {
            assert!(std::time::Instant::now() < deadline, "{records:?}");
            rings.wait(std::time::Duration::from_millis(10));
            rings.read(&mut records).unwrap();
        }
        records.sort_by_key(Record::time);
        let index = |wanted: &dyn Fn(&Record) -> bool| records.iter().position(wanted);
        let forked = index(&|record| matches!(record, Record::Forked { pid: p, .. } if *p == pid));
        let began = index(&|record| matches!(record, Record::Began { pid: p, .. } if *p == pid));
        let mapped = index(
            &|record| matches!(record, Record::Mapped(Mapped { pid: p, inode: 1.., .. }) if *p == pid),
        );
        let executed = index(&|record| match record {
            Record::Executed(executed) => {
                executed.pid == pid && *executed.file_name == *b"/bin/true"
            }
            _ => false,
        });
        let exited = index(&|record| matches!(record, Record::Exited { pid: p, .. } if *p == pid));
        let order = [forked, began, mapped, executed, exited];
        assert!(order.iter().all(Option::is_some), "{order:?} of {records:?}");
        assert!(order.is_sorted(), "{order:?} of {records:?}");
        assert!(records[forked.unwrap()].time() >= before);
        assert!(records[exited.unwrap()].time() <= now());
    }
}
