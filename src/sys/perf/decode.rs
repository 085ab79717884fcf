//! Decodes what the kernel wrote into a ring (perf_event_open(2)). Pure: bytes in, records
//! out.

use super::record::{Executed, Mapped, Record};
use crate::sys::stack::{self, Word};

/// The layout of the records, fixed when the rings are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Records of executions have the control group (Linux 5.7).
    pub cgroup: bool,
    /// The offset of the field with the file name's place, in the tracepoint's record.
    pub file_name: usize,
}

/// The bytes do not follow perf_event_open(2): the limits of the records are not known any
/// more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a perf record has a length of {length} bytes, and {left} bytes are left")]
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
/// In the record of a changed name: an execve changed it.
const MISC_COMM_EXEC: u16 = 1 << 13;
/// The record has a mapping's build ID instead of its device and inode.
const MISC_MMAP_BUILD_ID: u16 = 1 << 14;
/// `enum perf_sample_regs_abi`.
const ABI_32: u64 = 1;
const ABI_64: u64 = 2;
/// After every record that is not a sample: pid, tid, time.
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

/// Decodes the bytes of a ring: whole records, in the order in which they were written.
/// Records that driftd does not need are left out. On an error, `records` has what was
/// decoded before the malformed record.
pub fn decode(bytes: &[u8], layout: Layout, records: &mut Vec<Record>) -> Result<(), Malformed> {
    // A record that is too short for its fields is skipped, because its length is known.
    split(bytes, |kind, misc, body| records.extend(decode_one(kind, misc, body, layout)))
}

/// Decodes the bytes of a ring of arguments, and returns how many records were lost.
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

/// Calls `take` for each record, with its type, its `misc` and what follows the header.
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
                // A thread begins or ends.
                _ if pid != tid => None,
                RECORD_FORK => Some(Record::Forked { pid, parent, time }),
                _ => Some(Record::Exited { pid, time }),
            }
        }
        RECORD_LOST => Some(Record::Lost { count: u64_at(body, 8)?, time }),
        RECORD_LOST_SAMPLES => Some(Record::Lost { count: u64_at(body, 0)?, time }),
        // The kernel holds back records from here on, and does not count them.
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

/// A sample of the arguments' event: pid, tid, time, the ABI, one register, and the copy of
/// the stack.
fn decode_stack(body: &[u8]) -> Option<Record> {
    let pid = u32_at(body, 0)?;
    let time = u64_at(body, 8)?;
    let word = match u64_at(body, 16)? {
        ABI_32 => Word::Four,
        ABI_64 => Word::Eight,
        // A kernel thread has no user stack.
        _ => return None,
    };
    let pointer = u64_at(body, 24)?;
    let size = usize::try_from(u64_at(body, 32)?).ok()?;
    let (copy, behind) = body.get(40..)?.split_at_checked(size)?;
    // `size` was reserved; the copy ends where the process has no page.
    let copied = usize::try_from(u64_at(behind, 0)?).ok()?;
    let arguments = stack::arguments(copy.get(..copied)?, pointer, word)?.into();
    Some(Record::Arguments { pid, time, arguments })
}

#[cfg(test)]
mod tests;
