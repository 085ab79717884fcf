//! The hashes of a file's content, computed one slice at a time. A hash in progress is a
//! value: it can be put aside while another file has its turn.
//!
//! BLAKE3 hashes segments of a file and merges their chaining values as a tree. The chaining
//! value of a segment of zeros depends only on its position, so it is kept, and a hole need
//! not be hashed again. SHA-256 is a chain and would have to process each zero, so a file
//! with large holes has no SHA-256.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};

use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root,
};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::Digest as _;

use crate::model::{Blake3Hash, Sha256Hash};

/// Both hashes of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hashes {
    pub blake3: Blake3Hash,
    /// `None` for a file whose holes are longer than [`MAX_HOLES`] together.
    pub sha256: Option<Sha256Hash>,
}

/// The result of hashing a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hashed {
    Whole(Hashes),
    /// The file is longer than the limit.
    TooLong,
}

/// A file with more bytes than this in holes has no SHA-256.
pub const MAX_HOLES: u64 = 16 << 20;

/// The size of a leaf in the tree of segments: a power of two of BLAKE3's chunks. A file
/// with a few bytes in each segment costs at most a sixteenth of its blocks' size too much.
const SEGMENT: usize = 64 * 1024;
const READ: usize = 2 * SEGMENT;

/// How many chaining values of zeros are kept (64 GiB of segments). Beyond them, zeros are
/// hashed each time.
const MAX_KNOWN_ZEROS: usize = 1 << 20;

/// The cost of using a kept chaining value, in hashed bytes.
const MERGE: u64 = 64;

/// Chaining values of segments of zeros, by the segment's number.
static ZEROS: Mutex<Vec<Option<ChainingValue>>> = Mutex::new(Vec::new());

/// A hash in progress. Reads from the file's start, whatever the descriptor's position is,
/// and changes that position. The file is read into a buffer and not mapped, because a
/// container could truncate a mapped file during the read.
#[derive(Clone, Debug)]
pub struct Hashing {
    limit: u64,
    offset: u64,
    /// The end of a hole that begins at `offset`.
    hole_until: u64,
    /// The end of the data after that hole.
    data_until: u64,
    /// Chaining values of the tree's left parts, from the largest to the smallest.
    parts: Vec<ChainingValue>,
    /// How many segments are in `parts`.
    complete: u64,
    segment: Segment,
    sha256: Option<sha2::Sha256>,
    holes: u64,
    cost: u64,
}

/// The current segment. Whether it is the file's last one shows only at the next read.
#[derive(Clone, Debug)]
enum Segment {
    Open { hasher: Box<blake3::Hasher>, filled: usize },
    Whole(ChainingValue),
}

impl Segment {
    fn at(number: u64) -> Segment {
        let mut hasher = Box::new(blake3::Hasher::new());
        hasher.set_input_offset(number * SEGMENT as u64);
        Segment::Open { hasher, filled: 0 }
    }

    fn filled(&self) -> usize {
        match self {
            Segment::Open { filled, .. } => *filled,
            Segment::Whole(_) => SEGMENT,
        }
    }

    fn chaining_value(&self) -> ChainingValue {
        match self {
            Segment::Open { hasher, .. } => hasher.finalize_non_root(),
            Segment::Whole(value) => *value,
        }
    }
}

impl Hashing {
    pub fn new(limit: u64) -> Hashing {
        Hashing {
            limit,
            offset: 0,
            hole_until: 0,
            data_until: 0,
            parts: Vec::new(),
            complete: 0,
            segment: Segment::at(0),
            sha256: Some(sha2::Sha256::new()),
            holes: 0,
            cost: 0,
        }
    }

    /// How many bytes were read or hashed so far. Skipped holes do not count.
    pub fn cost(&self) -> u64 {
        self.cost
    }

    /// Continues for a slice of about `slice` bytes. `None` if there is more to do.
    pub fn step(&mut self, file: BorrowedFd<'_>, slice: u64) -> io::Result<Option<Hashed>> {
        let until = self.cost.saturating_add(slice.max(1));
        let mut buffer = None;
        while self.cost < until {
            if self.offset >= self.data_until.max(self.hole_until) && !self.find(file)? {
                return Ok(Some(Hashed::Whole(self.finish())));
            }
            if self.offset < self.hole_until {
                let zeros = usize::try_from(self.hole_until - self.offset).unwrap_or(usize::MAX);
                self.skip(zeros.min(SEGMENT - self.segment.filled() % SEGMENT));
            } else {
                let buffer = buffer.get_or_insert_with(|| vec![0; READ]);
                let left = usize::try_from(self.data_until - self.offset).unwrap_or(usize::MAX);
                let wanted = &mut buffer[..left.min(READ)];
                let read = rustix::io::retry_on_intr(|| {
                    rustix::io::pread(file, &mut *wanted, self.offset)
                })?;
                if read == 0 {
                    // The file was truncated, or its filesystem does not report holes.
                    return Ok(Some(Hashed::Whole(self.finish())));
                }
                self.take(&buffer[..read]);
            }
            if self.offset > self.limit {
                return Ok(Some(Hashed::TooLong));
            }
        }
        Ok(None)
    }

    /// Finds the next hole and the data after it. Returns false at the end of the file.
    fn find(&mut self, file: BorrowedFd<'_>) -> io::Result<bool> {
        let is_more = self.find_next(file)?;
        self.holes += self.hole_until.saturating_sub(self.offset);
        if self.holes > MAX_HOLES {
            self.sha256 = None;
        }
        Ok(is_more)
    }

    fn find_next(&mut self, file: BorrowedFd<'_>) -> io::Result<bool> {
        match rustix::fs::seek(file, SeekFrom::Data(self.offset)) {
            Ok(data) => {
                let data = data.max(self.offset);
                let hole = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap_or(u64::MAX);
                self.hole_until = data;
                // A write in between shows in the file's time of change.
                self.data_until = hole.max(data + 1);
                Ok(true)
            }
            // No data any more.
            Err(Errno::NXIO) => {
                let size = super::file::stat(file)?.size;
                self.hole_until = size;
                self.data_until = size;
                Ok(size > self.offset)
            }
            // The filesystem does not report holes.
            Err(_) => {
                self.hole_until = self.offset;
                self.data_until = u64::MAX;
                Ok(true)
            }
        }
    }

    fn take(&mut self, mut bytes: &[u8]) {
        if let Some(sha256) = &mut self.sha256 {
            sha256.update(bytes);
        }
        self.offset += bytes.len() as u64;
        self.cost += bytes.len() as u64;
        while !bytes.is_empty() {
            self.begin_segment();
            let Segment::Open { hasher, filled } = &mut self.segment else {
                unreachable!("a whole segment was completed")
            };
            let (now, rest) = bytes.split_at(bytes.len().min(SEGMENT - *filled));
            hasher.update(now);
            *filled += now.len();
            bytes = rest;
        }
    }

    /// Adds the zeros of a hole, at most as many as the segment has room for.
    fn skip(&mut self, zeros: usize) {
        static ZERO: [u8; SEGMENT] = [0; SEGMENT];
        self.begin_segment();
        let number = self.complete;
        let is_whole = self.segment.filled() == 0 && zeros == SEGMENT;
        // The first segment may be the root, which has no chaining value.
        if !is_whole || number == 0 || self.sha256.is_some() {
            return self.take(&ZERO[..zeros]);
        }
        self.offset += zeros as u64;
        self.cost += MERGE;
        if let Some(known) = known_zeros(number) {
            self.segment = Segment::Whole(known);
            return;
        }
        self.cost += zeros as u64;
        if let Segment::Open { hasher, .. } = &mut self.segment {
            hasher.update(&ZERO);
        }
        let value = self.segment.chaining_value();
        self.segment = Segment::Whole(value);
        remember_zeros(number, value);
    }

    /// Begins a new segment if the current one is full, which so is not the last one.
    fn begin_segment(&mut self) {
        if self.segment.filled() < SEGMENT {
            return;
        }
        let mut value = self.segment.chaining_value();
        self.complete += 1;
        let mut parts = self.complete;
        while parts.is_multiple_of(2) {
            let left = self.parts.pop().expect("one for each bit of the number of segments");
            value = merge_subtrees_non_root(&left, &value, Mode::Hash);
            parts /= 2;
        }
        self.parts.push(value);
        self.segment = Segment::at(self.complete);
    }

    fn finish(&mut self) -> Hashes {
        let blake3 = match (&self.segment, self.parts.split_first()) {
            (Segment::Open { hasher, .. }, None) => hasher.finalize(),
            (segment, Some((root, others))) => {
                let right = others.iter().rev().fold(segment.chaining_value(), |right, left| {
                    merge_subtrees_non_root(left, &right, Mode::Hash)
                });
                merge_subtrees_root(root, &right, Mode::Hash)
            }
            (Segment::Whole(_), None) => unreachable!("the first segment is hashed"),
        };
        Hashes {
            blake3: Blake3Hash(*blake3.as_bytes()),
            sha256: self.sha256.take().map(|sha256| Sha256Hash(sha256.finalize().into())),
        }
    }
}

fn known_zeros(number: u64) -> Option<ChainingValue> {
    let zeros = ZEROS.lock().unwrap_or_else(PoisonError::into_inner);
    *zeros.get(usize::try_from(number).ok()?)?
}

fn remember_zeros(number: u64, value: ChainingValue) {
    let Ok(number) = usize::try_from(number) else { return };
    if number >= MAX_KNOWN_ZEROS {
        return;
    }
    let mut zeros = ZEROS.lock().unwrap_or_else(PoisonError::into_inner);
    if zeros.len() <= number {
        zeros.resize(number + 1, None);
    }
    zeros[number] = Some(value);
}

/// Hashes a regular file in one go. `None` if it is longer than `limit`.
pub fn hash(file: BorrowedFd<'_>, limit: u64) -> io::Result<Option<Hashes>> {
    let mut hashing = Hashing::new(limit);
    loop {
        match hashing.step(file, u64::MAX)? {
            Some(Hashed::Whole(hashes)) => return Ok(Some(hashes)),
            Some(Hashed::TooLong) => return Ok(None),
            None => (),
        }
    }
}

/// Both hashes of these bytes.
pub fn hash_bytes(bytes: &[u8]) -> Hashes {
    Hashes {
        blake3: Blake3Hash(*blake3::hash(bytes).as_bytes()),
        sha256: Some(Sha256Hash(sha2::Sha256::digest(bytes).into())),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::FileExt as _;

    use proptest::prelude::*;

    use super::*;

    fn plain(content: &[u8], holes: u64) -> Hashes {
        let sha256 = Sha256Hash(sha2::Sha256::digest(content).into());
        Hashes {
            blake3: Blake3Hash(*blake3::hash(content).as_bytes()),
            sha256: (holes <= MAX_HOLES).then_some(sha256),
        }
    }

    /// A file of this length with data at these places and holes elsewhere.
    fn sparse(len: u64, data: &[(u64, Vec<u8>)]) -> (File, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        let mut content = vec![0; usize::try_from(len).unwrap()];
        for (offset, bytes) in data {
            let start = usize::try_from(*offset).unwrap().min(content.len());
            let bytes = &bytes[..bytes.len().min(content.len() - start)];
            file.write_all_at(bytes, *offset).unwrap();
            content[start..start + bytes.len()].copy_from_slice(bytes);
        }
        (file, content)
    }

    fn in_slices(file: &File, limit: u64, slice: u64) -> (Hashed, u64) {
        let mut hashing = Hashing::new(limit);
        let mut steps = 0;
        loop {
            let before = hashing.cost();
            steps += 1;
            let outcome = hashing.step(file.as_fd(), slice).unwrap();
            assert!(hashing.cost() - before <= slice + READ as u64 + MERGE, "a slice is bounded");
            // It can be put aside, and another one goes on from there.
            let aside = hashing.clone();
            hashing = aside;
            if let Some(hashed) = outcome {
                assert!(steps <= 2 + hashing.cost() / slice.max(1), "each slice goes on");
                return (hashed, hashing.cost());
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn x10_holes_are_hashed_as_the_zeros_that_are_read_from_them(
            len in 0_u64..(3 << 20),
            data in prop::collection::vec(
                (0_u64..(3 << 20), prop::collection::vec(any::<u8>(), 0..5000)), 0..6),
            slice in 1_u64..(1 << 20),
        ) {
            let (file, content) = sparse(len, &data);
            let (hashed, _) = in_slices(&file, len, slice);
            prop_assert_eq!(hashed, Hashed::Whole(plain(&content, 0)));
        }

        #[test]
        fn x10_a_large_hole_costs_no_reading_and_its_blake3_is_the_same(
            before in 0_u64..200_000, after in 0_u64..200_000, hole in (17_u64 << 20)..(24 << 20),
        ) {
            let data = |len: u64| (0..len).map(|n| n.to_le_bytes()[0] | 1).collect::<Vec<u8>>();
            let len = before + hole + after;
            let places = [(0, data(before)), (before + hole, data(after))];
            let (file, content) = sparse(len, &places);
            let (first, _) = in_slices(&file, len, 1 << 20);
            prop_assert_eq!(first, Hashed::Whole(plain(&content, hole)));
        }
    }

    #[test]
    fn lengths_at_the_edges_of_segments_and_subtrees() {
        let segment = SEGMENT as u64;
        for len in [0, 1, 1023, 1024, 1025, segment - 1, segment, segment + 1]
            .into_iter()
            .chain((2..=9).flat_map(|n| [n * segment - 1, n * segment, n * segment + 1]))
        {
            let bytes: Vec<u8> = (0..len).map(|n| (n % 251).to_le_bytes()[0]).collect();
            for data in [vec![(0, bytes.clone())], vec![]] {
                let (file, content) = sparse(len, &data);
                let expected = Hashed::Whole(plain(&content, 0));
                assert_eq!(in_slices(&file, len, 100_000).0, expected, "{len}");
                if len > 0 {
                    assert_eq!(in_slices(&file, len - 1, u64::MAX / 2).0, Hashed::TooLong, "{len}");
                }
            }
        }
    }

    #[test]
    fn x10_a_second_giant_of_zeros_is_known() {
        let giant = 200 << 20;
        let (file, content) = sparse(giant, &[(0, b"\x7fELF".to_vec())]);
        let expected = Hashed::Whole(plain(&content, giant - 4096));
        assert_eq!(in_slices(&file, giant, 4 << 20).0, expected);
        let (again, cost) = in_slices(&file, giant, 4 << 20);
        assert_eq!(again, expected);
        assert!(cost < 1 << 20, "{cost} bytes were hashed");
    }
}
