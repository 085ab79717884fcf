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
//!
//! A third event, in a ring of its own, copies the stack of each new program as the
//! kernel has just written it: its arguments, whatever becomes of it. It is a help
//! that everything else does without: where it cannot be had, or its ring is full,
//! there is no [`Record::Arguments`] and nothing is lost.

use std::fmt;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::stack::{self, Word};

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
    /// With what arguments a process has become a program, one behind the other as
    /// /proc/PID/cmdline has them. Told at about the time of its [`Record::Executed`],
    /// before or after it, and not of every one.
    Arguments { pid: u32, time: u64, arguments: Box<[u8]> },
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
            | Record::Arguments { time, .. }
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
/// `enum perf_sample_regs_abi`.
const ABI_32: u64 = 1;
const ABI_64: u64 = 2;
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
pub fn decode(bytes: &[u8], layout: Layout, records: &mut Vec<Record>) -> Result<(), Malformed> {
    // A record that is too short for what it should hold is passed over: its
    // length is known all the same.
    split(bytes, |kind, misc, body| records.extend(decode_one(kind, misc, body, layout)))
}

/// Decodes what was in a ring of arguments, and says how many records were lost.
/// Pure.
pub fn decode_arguments(bytes: &[u8], records: &mut Vec<Record>) -> Result<u64, Malformed> {
    let mut lost = 0_u64;
    split(bytes, |kind, _, body| match kind {
        RECORD_SAMPLE => records.extend(decode_stack(body)),
        RECORD_LOST => lost = lost.saturating_add(u64_at(body, 8).unwrap_or(1)),
        RECORD_LOST_SAMPLES => lost = lost.saturating_add(u64_at(body, 0).unwrap_or(1)),
        _ => (),
    })?;
    Ok(lost)
}

/// Calls for each record, with its type, its `misc` and what is behind the header.
fn split(mut bytes: &[u8], mut take: impl FnMut(u32, u16, &[u8])) -> Result<(), Malformed> {
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
        take(kind, misc, &record[HEADER..]);
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

/// A sample of the arguments' event: pid, tid, time, the ABI and one register, the
/// stack's copy.
fn decode_stack(body: &[u8]) -> Option<Record> {
    let pid = u32_at(body, 0)?;
    let time = u64_at(body, 8)?;
    let word = match u64_at(body, 16)? {
        ABI_32 => Word::Four,
        ABI_64 => Word::Eight,
        // A thread of the kernel's.
        _ => return None,
    };
    let pointer = u64_at(body, 24)?;
    let size = usize::try_from(u64_at(body, 32)?).ok()?;
    let (copy, behind) = body.get(40..)?.split_at_checked(size)?;
    // Room was made for all of it; the copying ends where the process has no page.
    let copied = usize::try_from(u64_at(behind, 0)?).ok()?;
    let arguments = stack::arguments(copy.get(..copied)?, pointer, word)?.into();
    Some(Record::Arguments { pid, time, arguments })
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
const SAMPLE_REGISTERS_USER: u64 = 1 << 12;
const SAMPLE_STACK_USER: u64 = 1 << 13;
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

/// The number of the stack pointer among the registers that perf knows
/// (`asm/perf_regs.h`).
const STACK_POINTER: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(7)
} else if cfg!(target_arch = "aarch64") {
    Some(31)
} else if cfg!(target_arch = "riscv64") {
    Some(2)
} else {
    None
};

/// How much of a new program's stack is copied. On x86-64 up to 8 KiB lie between the
/// stack pointer and the arguments, by chance; elsewhere up to a page.
const STACK_BYTES: u32 = 12 << 10;

/// Bytes for arguments on each processor: some forty executions, tried from the first
/// on like the others. On all of them together no more than the bound, unless there
/// are very many.
const ARGUMENT_RING_BYTES: [usize; 4] = [512 << 10, 256 << 10, 128 << 10, 64 << 10];
const MAX_ARGUMENT_RINGS_BYTES: usize = 16 << 20;

fn argument_ring_sizes(processors: usize) -> impl Iterator<Item = usize> {
    let [.., least] = ARGUMENT_RING_BYTES;
    ARGUMENT_RING_BYTES.into_iter().filter(move |&bytes| {
        bytes == least || bytes.saturating_mul(processors) <= MAX_ARGUMENT_RINGS_BYTES
    })
}

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

/// The memory that an event's records are written to.
struct Buffer {
    /// `struct perf_event_mmap_page`, a page long, then the records.
    memory: ptr::NonNull<u8>,
    page: usize,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone, and every access to the two
// words that the kernel uses as well is atomic.
unsafe impl Send for Buffer {}

impl Buffer {
    /// Of the first of these sizes that the kernel allows.
    fn map(event: BorrowedFd<'_>, sizes: impl IntoIterator<Item = usize>) -> io::Result<Buffer> {
        let page = rustix::param::page_size();
        let mut outcome = Err(io::Error::from(io::ErrorKind::InvalidInput));
        for bytes in sizes {
            outcome = map(event, page + bytes).map(|memory| Buffer { memory, page, bytes });
            if outcome.is_ok() {
                break;
            }
        }
        outcome
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

/// One processor's ring.
struct Ring {
    processor: u32,
    executions: OwnedFd,
    /// It writes into the ring of the other; closed, it would not.
    _mappings: OwnedFd,
    buffer: Buffer,
    /// The third event, if it can be had.
    arguments: Option<(OwnedFd, Buffer)>,
}

fn common_attributes() -> Attributes {
    Attributes {
        size: u32::try_from(size_of::<Attributes>()).expect("a hundred bytes"),
        flags: FLAG_DISABLED | FLAG_SAMPLE_ID_ALL | FLAG_USE_CLOCK,
        clock: libc::CLOCK_MONOTONIC,
        sample_type: SAMPLE_TID | SAMPLE_TIME,
        ..Attributes::default()
    }
}

impl Ring {
    fn open(processor: u32, tracepoint: Tracepoint, with_cgroup: bool) -> io::Result<Ring> {
        let common = common_attributes;
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
        let buffer = Buffer::map(executions.as_fd(), RING_BYTES)?;
        control(mappings.as_fd(), IOCTL_SET_OUTPUT, executions.as_raw_fd())?;
        control(mappings.as_fd(), IOCTL_ENABLE, 0)?;
        control(executions.as_fd(), IOCTL_ENABLE, 0)?;
        Ok(Ring { processor, executions, _mappings: mappings, buffer, arguments: None })
    }

    /// Opens the third event as well: after the first, so that the kernel writes the
    /// arguments before it wakes the reader.
    fn open_arguments(&mut self, tracepoint: Tracepoint, processors: usize) -> io::Result<()> {
        let stack_pointer = STACK_POINTER.ok_or(io::ErrorKind::Unsupported)?;
        let common = common_attributes();
        // It wakes nobody: whoever reads is woken by the execution itself.
        let attributes = Attributes {
            kind: TYPE_TRACEPOINT,
            config: tracepoint.id,
            sample_period: 1,
            sample_type: common.sample_type | SAMPLE_REGISTERS_USER | SAMPLE_STACK_USER,
            sample_registers_user: 1 << stack_pointer,
            sample_stack_user: STACK_BYTES,
            ..common
        };
        let event = open_event(&attributes, self.processor)?;
        let buffer = Buffer::map(event.as_fd(), argument_ring_sizes(processors))?;
        control(event.as_fd(), IOCTL_ENABLE, 0)?;
        self.arguments = Some((event, buffer));
        Ok(())
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

impl Drop for Buffer {
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
    lost_arguments: u64,
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
            let mut rings = Rings {
                rings: Vec::new(),
                tracepoint,
                layout,
                lost_arguments: 0,
                scratch: Vec::new(),
            };
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
        let processors = online.len();
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
        if has_changed {
            // Last: what may be locked in memory is for the others first.
            for ring in self.rings.iter_mut().filter(|ring| ring.arguments.is_none()) {
                let _ = ring.open_arguments(self.tracepoint, processors);
            }
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
        for ring in &mut self.rings {
            self.scratch.clear();
            ring.buffer.take(&mut self.scratch);
            outcome = outcome.and(decode(&self.scratch, self.layout, records));
            // What else is copied with them, the environment, stays here.
            let Some((_, arguments)) = &ring.arguments else { continue };
            self.scratch.clear();
            arguments.take(&mut self.scratch);
            match decode_arguments(&self.scratch, records) {
                Ok(lost) => self.lost_arguments = self.lost_arguments.saturating_add(lost),
                Err(_) => ring.arguments = None,
            }
        }
        outcome
    }

    /// Whether there are [`Record::Arguments`] of every processor.
    pub fn tell_arguments(&self) -> bool {
        self.rings.iter().all(|ring| ring.arguments.is_some())
    }

    /// How many records of arguments found no room.
    pub fn lost_arguments(&self) -> u64 {
        self.lost_arguments
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

    /// A new program's stack, whose arguments lie `gap` bytes above what points to them.
    fn started(gap: usize, copied: usize) -> Vec<u8> {
        const POINTER: u64 = 0x7ffc_0000_1230;
        let address = POINTER + 32 + gap as u64;
        let mut copy: Vec<u8> =
            [2, address, address + 3, 0].iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
        copy.resize(copy.len() + gap, 0);
        copy.extend(b"ls\0-l\0");
        copy.resize(copy.len().next_multiple_of(8), 0);
        let mut body = words(&[7, 8]);
        let size = copy.len() as u64;
        body.extend([6, ABI_64, POINTER, size].iter().flat_map(|word| word.to_ne_bytes()));
        body.extend(copy);
        body.extend((copied as u64).to_ne_bytes());
        record(RECORD_SAMPLE, 2, &body)
    }

    #[track_caller]
    fn check_arguments(bytes: &[u8], expected: &[Record]) {
        let mut records = Vec::new();
        assert_eq!(decode_arguments(bytes, &mut records), Ok(0));
        assert_eq!(records, expected);
    }

    #[test]
    fn arguments_are_told_only_if_all_of_them_were_copied() {
        let told = Record::Arguments { pid: 7, time: 6, arguments: (*b"ls\0-l\0").into() };
        check_arguments(&started(1000, 32 + 1000 + 6), std::slice::from_ref(&told));
        check_arguments(&started(1000, 32 + 1000 + 5), &[]);
        check_arguments(&started(1000, 0), &[]);
        // More than there is.
        check_arguments(&started(0, 4096), &[]);
        let mut kernels = started(0, 38);
        kernels[HEADER + 16] = 0;
        check_arguments(&[kernels, started(0, 38)].concat(), &[told]);
    }

    #[test]
    fn arguments_that_found_no_room_are_counted_and_are_no_loss() {
        let body = [1_u64.to_ne_bytes(), 12_u64.to_ne_bytes()].concat();
        let bytes = record(RECORD_LOST, 0, &[body, trailer(3)].concat());
        let mut records = Vec::new();
        assert_eq!(decode_arguments(&bytes, &mut records), Ok(12));
        assert_eq!(records, []);
    }

    #[test]
    fn rings_for_arguments_are_bounded_over_all_processors() {
        let largest = |processors| argument_ring_sizes(processors).next();
        assert_eq!(largest(1), Some(512 << 10));
        assert_eq!(largest(32), Some(512 << 10));
        assert_eq!(largest(33), Some(256 << 10));
        assert_eq!(largest(256), Some(64 << 10));
        assert_eq!(largest(8192), Some(64 << 10));
        assert_eq!(argument_ring_sizes(2).count(), ARGUMENT_RING_BYTES.len());
    }

    proptest! {
        #[test]
        fn any_bytes_are_arguments_or_malformed(bytes: Vec<u8>) {
            let _ = decode_arguments(&bytes, &mut Vec::new());
        }

        #[test]
        fn any_sample_is_arguments_or_passed_over(
            body in proptest::collection::vec(any::<u8>(), 0..300), size in 0..300_u64,
        ) {
            let mut body = body;
            if let Some(place) = body.get_mut(32..40) {
                place.copy_from_slice(&size.to_ne_bytes());
            }
            if let Some(place) = body.get_mut(16..24) {
                place.copy_from_slice(&ABI_64.to_ne_bytes());
            }
            let bytes = record(RECORD_SAMPLE, 0, &body);
            decode_arguments(&bytes, &mut Vec::new()).unwrap();
        }

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

    #[test]
    fn the_arguments_of_what_ends_at_once_are_recorded() {
        let mut rings = Rings::open().unwrap_or_else(|err| panic!("{err} (run as root)"));
        assert!(rings.tell_arguments());
        let expected = *b"/bin/true\0one\0\0two words\0";
        // Not of each: chance may leave a page between the stack pointer and the
        // arguments that nothing has been written to.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let mut records = Vec::new();
        let mut is_told = false;
        while !is_told {
            assert!(std::time::Instant::now() < deadline, "{records:?}");
            let mut command = std::process::Command::new("/bin/true");
            let mut child = command.args(["one", "", "two words"]).env_clear().spawn().unwrap();
            child.wait().unwrap();
            records.clear();
            rings.read(&mut records).unwrap();
            is_told = records.iter().any(|record| {
                matches!(record, Record::Arguments { pid, arguments, .. }
                    if *pid == child.id() && **arguments == expected)
            });
        }
    }
}
