//! One perf event: its attributes, perf_event_open(2), and the requests to it.
//!
//! `ring` decides which events a processor has.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::ptr;

/// `struct perf_event_attr` up to its first version that has every field used here. The
/// kernel takes the fields after it for zeros.
// Long: the fields and their order are the kernel's.
#[repr(C)]
#[derive(Default)]
pub(super) struct Attributes {
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

/// The number of the stack pointer among perf's registers (`asm/perf_regs.h`).
const STACK_POINTER: Option<u32> = if cfg!(target_arch = "x86_64") {
    Some(7)
} else if cfg!(target_arch = "aarch64") {
    Some(31)
} else if cfg!(target_arch = "riscv64") {
    Some(2)
} else {
    None
};

/// How much of a new program's stack is copied. On x86-64 up to 8 KiB, at random, lie
/// between the stack pointer and the arguments; elsewhere up to a page.
const STACK_BYTES: u32 = 12 << 10;

impl Attributes {
    /// What all events have in common.
    fn common() -> Attributes {
        Attributes {
            size: u32::try_from(size_of::<Attributes>()).expect("a hundred bytes"),
            flags: FLAG_DISABLED | FLAG_SAMPLE_ID_ALL | FLAG_USE_CLOCK,
            clock: libc::CLOCK_MONOTONIC,
            sample_type: SAMPLE_TID | SAMPLE_TIME,
            ..Attributes::default()
        }
    }

    /// Records each execution at this tracepoint.
    pub(super) fn of_executions(tracepoint: u64, with_cgroup: bool) -> Attributes {
        let cgroup = if with_cgroup { SAMPLE_CGROUP } else { 0 };
        let common = Attributes::common();
        Attributes {
            kind: TYPE_TRACEPOINT,
            config: tracepoint,
            sample_period: 1,
            // The reader wakes up for an execution, and for a ring that is half full.
            wakeup: 1,
            sample_type: common.sample_type | SAMPLE_RAW | cgroup,
            ..common
        }
    }

    /// Records each mapping of code, each fork and each exit.
    pub(super) fn of_mappings() -> Attributes {
        let common = Attributes::common();
        Attributes {
            kind: TYPE_SOFTWARE,
            config: COUNT_SOFTWARE_DUMMY,
            flags: common.flags | FLAG_MMAP | FLAG_MMAP2 | FLAG_COMM | FLAG_COMM_EXEC | FLAG_TASK,
            ..common
        }
    }

    /// Copies the stack of each new program at this tracepoint. Never wakes the reader: the
    /// record of the execution itself does. `None` on other processors than those above.
    pub(super) fn of_arguments(tracepoint: u64) -> Option<Attributes> {
        let common = Attributes::common();
        Some(Attributes {
            kind: TYPE_TRACEPOINT,
            config: tracepoint,
            sample_period: 1,
            sample_type: common.sample_type | SAMPLE_REGISTERS_USER | SAMPLE_STACK_USER,
            sample_registers_user: 1 << STACK_POINTER?,
            sample_stack_user: STACK_BYTES,
            ..common
        })
    }
}

pub(super) fn open(attributes: &Attributes, processor: u32) -> io::Result<OwnedFd> {
    let every_process = -1;
    let no_group = -1;
    // SAFETY: `attributes` lives during the call, and its field `size` is its length.
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
    // SAFETY: the kernel has just opened `fd` for this call, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn enable(event: BorrowedFd<'_>) -> io::Result<()> {
    control(event, IOCTL_ENABLE, 0)
}

/// From now on `event` writes into the ring of `other`.
pub(super) fn redirect(event: BorrowedFd<'_>, other: BorrowedFd<'_>) -> io::Result<()> {
    control(event, IOCTL_SET_OUTPUT, other.as_raw_fd())
}

fn control(event: BorrowedFd<'_>, request: libc::c_ulong, argument: i32) -> io::Result<()> {
    // SAFETY: both requests take a number and touch no memory of this process.
    let done = unsafe { libc::ioctl(event.as_raw_fd(), request, libc::c_long::from(argument)) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
