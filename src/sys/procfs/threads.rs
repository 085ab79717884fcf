//! What is known of a thread that waits in the kernel.

use std::io;

use super::handle::Handle;
use super::status::field;

/// execve(2) and execveat(2), and their numbers for 32-bit programs on x86-64 and arm64. A
/// native system call with one of the latter reads no file.
const EXECS: [libc::c_long; 5] = [libc::SYS_execve, libc::SYS_execveat, 11, 358, 387];

/// The process of a thread.
pub fn process_of(thread: u32) -> io::Result<u32> {
    let status = Handle::open(thread)?.status()?;
    let process = field(&status, "Tgid:").and_then(|number| number.parse().ok());
    process.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Whether a thread that waits in the kernel has called execve(2). `false` if that cannot be
/// read.
pub fn is_in_execve(thread: u32) -> bool {
    let read = Handle::open(thread).and_then(|handle| handle.read_memory("syscall", 256));
    read.is_ok_and(|text| is_execve(&text))
}

/// By the text of `/proc/PID/syscall`, which begins with the number of the system call.
fn is_execve(text: &[u8]) -> bool {
    let number = text.split(u8::is_ascii_whitespace).next().unwrap_or_default();
    let number = str::from_utf8(number).ok().and_then(|number| number.parse().ok());
    number.is_some_and(|number: libc::c_long| EXECS.contains(&number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_call_of_a_waiting_thread_is_known() {
        let execve = format!("{} 0x7ffd 0x1 0x0 0x0 0x0 0x0 0x7ffd 0x7f\n", libc::SYS_execve);
        assert!(is_execve(execve.as_bytes()));
        let read = format!("{} 0x3 0x7ffd 0x340 0x0 0x0 0x0 0x7ffd 0x7f\n", libc::SYS_read);
        assert!(!is_execve(read.as_bytes()));
        assert!(!is_execve(b"running\n"));
        assert!(!is_execve(b""));
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
        assert!(!is_in_execve(here));
    }
}
