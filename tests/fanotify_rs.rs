//! Executable evidence for docs/adr/0003: why driftd does not read fanotify
//! events with fanotify-rs 0.3.1. Its `read_event` closes the event's descriptor
//! before it returns. The next event then gets the same number, and the number is how the
//! kernel identifies the event that an answer is for.
//!
//! If this fails, upstream is fixed: reconsider the decision.
//!
//! Needs root and a static busybox (`make setup`), and fails without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fanotify::high_level::{Event, Fanotify, FanotifyMode};
use fanotify::low_level::FAN_OPEN_EXEC_PERM;

const PATIENCE: Duration = Duration::from_secs(30);

/// Ends a process that a failed test leaves behind.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program(dir: &Path, name: &str) -> PathBuf {
    // busybox chooses its applet by its file name, so the name stays.
    fs::create_dir(dir.join(name)).unwrap();
    let path = dir.join(name).join("busybox");
    fs::copy("/bin/busybox", &path).expect("/bin/busybox is missing (try: make setup)");
    path
}

/// Runs `program` from a shell that passes on its success, so that no thread of this
/// process waits for the exec.
fn start(program: &Path) -> Running {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "\"$0\" true && exit 0; exit 1"]).arg(program);
    Running(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

fn next_event(group: &Fanotify) -> Event {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(event) = group.read_event().into_iter().next() {
            return event;
        }
        assert!(Instant::now() < deadline, "no exec came");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn fanotify_rs_gives_two_pending_events_the_same_number() {
    assert!(rustix::process::geteuid().is_root(), "fanotify needs root: run this as root");
    let dir = tempfile::tempdir().unwrap();
    let first = program(dir.path(), "first");
    let second = program(dir.path(), "second");
    let group = Fanotify::new_nonblocking(FanotifyMode::CONTENT).unwrap();
    for path in [&first, &second] {
        group.add_path(FAN_OPEN_EXEC_PERM, path).unwrap();
    }

    let mut first_running = start(&first);
    let first_event = next_event(&group);
    let mut second_running = start(&second);
    let second_event = next_event(&group);
    assert_eq!(Path::new(&first_event.path), first);
    assert_eq!(Path::new(&second_event.path), second);
    assert_eq!(
        first_event.fd, second_event.fd,
        "each pending event has its own number: fanotify-rs can be considered again"
    );

    // Closing the group lets both programs run.
    drop(group);
    for running in [&mut first_running, &mut second_running] {
        assert!(running.0.wait().unwrap().success());
    }
}
