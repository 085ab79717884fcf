//! What is known of a thread that waits in the kernel.

use std::io;
use std::time::{Duration, Instant};

use super::handle::Handle;
use super::status::field;

/// execve(2) and execveat(2), and their numbers for 32-bit programs on x86-64 and arm64. A
/// native system call with one of the latter reads no file.
const EXECS: [i64; 5] = [libc::SYS_execve, libc::SYS_execveat, 11, 358, 387];

/// read(2) and pread(2), and the same for 32-bit programs.
const READS: [i64; 4] = [libc::SYS_read, libc::SYS_pread64, 3, 180];

/// The system call in which a thread reads a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadCall {
    /// The kernel reads the program that the thread is about to become.
    Execve,
    /// At most so many bytes, with read(2) or pread(2).
    Read(u64),
    Other,
}

/// The process of a thread.
pub fn process_of(thread: u32) -> io::Result<u32> {
    let status = Handle::open(thread)?.status()?;
    let process = field(&status, "Tgid:").and_then(|number| number.parse().ok());
    process.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// How long a thread may take to go to sleep, after the kernel has asked about it. Others wait
/// meanwhile.
const PATIENCE: Duration = Duration::from_millis(5);

/// The system call of a thread that waits in the kernel, or is about to. An error if that
/// cannot be read.
pub fn read_call(thread: u32) -> io::Result<ReadCall> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = Handle::open(thread)?.read_memory("syscall", 256)?;
        match call_of(&text) {
            Some(call) => return Ok(call),
            // The kernel asks before the thread sleeps. Until then it is `running`.
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            None => return Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

/// By the text of `/proc/PID/syscall`: the number of the system call and six arguments in
/// hexadecimal digits.
fn call_of(text: &[u8]) -> Option<ReadCall> {
    let mut words = str::from_utf8(text).ok()?.split_ascii_whitespace();
    let number: i64 = words.next()?.parse().ok()?;
    if EXECS.contains(&number) {
        return Some(ReadCall::Execve);
    }
    let length = words.nth(2)?.strip_prefix("0x")?;
    let length = u64::from_str_radix(length, 16).ok()?;
    Some(if READS.contains(&number) { ReadCall::Read(length) } else { ReadCall::Other })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_call_of_a_waiting_thread_is_known() {
        let text = |call: i64| format!("{call} 0x3 0x7ffd 0x340 0x0 0x0 0x0 0x7ffd 0x7f\n");
        let call = |call: i64| call_of(text(call).as_bytes());
        assert_eq!(call(libc::SYS_execve), Some(ReadCall::Execve));
        assert_eq!(call(libc::SYS_read), Some(ReadCall::Read(832)));
        assert_eq!(call(libc::SYS_mmap), Some(ReadCall::Other));
        for unknown in [&b"running\n"[..], b"-1 0x0 0x0\n", b""] {
            assert_eq!(call_of(unknown), None);
        }
    }

    #[test]
    fn a_thread_leads_to_its_process() {
        let here = std::process::id();
        let other = std::thread::spawn(|| {
            let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
            (thread, process_of(thread).unwrap())
        });
        let (thread, process) = other.join().unwrap();
        assert_ne!(thread, here);
        assert_eq!(process, here);
        // A thread that sleeps has called something.
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let (number, its_number) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            number.send(rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()).unwrap();
            let _ = receiver.recv();
        });
        assert_eq!(read_call(its_number.recv().unwrap()).unwrap(), ReadCall::Other);
        drop(sender);
        sleeper.join().unwrap();
    }
}
