//! The parts of a file that hold data, and those that are holes (lseek(2), SEEK_DATA).

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// The next part with data at or after `from`: its begin and its end. `None` if only a hole
/// follows, or nothing. Where the filesystem reports no holes, all is data.
pub fn next_data(file: BorrowedFd<'_>, from: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    if from >= size {
        return Ok(None);
    }
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(data) => {
            let data = data.max(from);
            let hole = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap_or(size);
            // A write in between can move both.
            Ok((data < size).then(|| (data, hole.max(data + 1).min(size))))
        }
        Err(Errno::NXIO) => Ok(None),
        Err(_) => Ok(Some((from, size))),
    }
}

/// Reads a part of a file. Returns how many bytes there were.
pub fn read_at(file: BorrowedFd<'_>, bytes: &mut [u8], at: u64) -> io::Result<usize> {
    Ok(rustix::io::retry_on_intr(|| rustix::io::pread(file, &mut *bytes, at))?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn holes_are_skipped_and_data_is_found_behind_them() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 30).unwrap();
        let next = |from| next_data(file.as_fd(), from, 10 << 30).unwrap();
        assert_eq!(next(0), None);
        file.write_all_at(b"x", 9 << 30).unwrap();
        let (begin, end) = next(0).unwrap();
        assert!(begin <= 9 << 30 && end > 9 << 30 && end - begin <= 1 << 21, "{begin} {end}");
        assert_eq!(next(end), None);
        assert_eq!(next(10 << 30), None);
        let mut bytes = [0; 4];
        assert_eq!(read_at(file.as_fd(), &mut bytes, 9 << 30).unwrap(), 4);
        assert_eq!(&bytes, b"x\0\0\0");
    }
}
