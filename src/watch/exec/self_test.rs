//! The self-test of the free gate: whether this kernel can be relied upon for it. The version
//! is not enough; the test runs on an overlay of its own that no other process sees.
//!
//! For each kind of copy-up it executes a file of the lower layer and expects an event. (The
//! file is no program, but the kernel asks before it reads the file.) It ignores the file,
//! and expects none for the next execution. It changes the file: the copy-up must be seen
//! before it begins. Then it executes the file once more: the kernel must ask.
//!
//! Owns its directory, mount and groups, and removes them. It must not touch the gate's.
//! The daemon calls it before it opens the free gate.

use std::fs::{self, OpenOptions};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded, unbounded};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::sys::fanotify::{self, Answer, Buffer, Group, Incoming, Permission, Queue};
use crate::sys::file;
use crate::sys::overlay::{self, CopyUp};

/// Why this kernel, or this machine's state directory, does not support the free gate.
#[derive(Debug, thiserror::Error)]
pub enum Distrust {
    #[error("no overlay could be mounted for the self-test: {0}")]
    NoOverlay(#[source] io::Error),
    #[error(transparent)]
    NoGroup(#[from] fanotify::Error),
    #[error("the kernel refuses a mark that the self-test needs: {0}")]
    MarkRefused(#[source] io::Error),
    #[error("an execution caused no permission event")]
    ExecUnseen,
    #[error("an execution caused a permission event although its file was ignored")]
    NotIgnored,
    #[error("a copy-up ({0}) was not seen before it began")]
    CopyUpUnseen(&'static str),
    #[error("the end of a copy-up ({0}) was not reported")]
    EndUnseen(&'static str),
    #[error("the self-test failed: {0}")]
    Broken(#[source] io::Error),
}

/// How long an event may take to arrive.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Saw {
    Exec,
    CopyUp(CopyUp),
    End,
}

/// Tests the free gate, in a new directory in `scratch`.
pub fn try_free_gate(scratch: &Path) -> Result<(), Distrust> {
    let directory = scratch.join("gate-trial");
    // An interrupted self-test may have left it.
    let _ = fs::remove_dir_all(&directory);
    let outcome = try_in(&directory);
    let _ = fs::remove_dir_all(&directory);
    outcome
}

/// The name of a way to copy a file up, and the change that causes it.
type Change = (&'static str, fn(&Path) -> io::Result<()>);

const CHANGES: [Change; 4] = [
    ("open for writing", |path| {
        // Without writing anything.
        OpenOptions::new().read(true).write(true).open(path).map(drop)
    }),
    ("chmod", |path| fs::set_permissions(path, fs::Permissions::from_mode(0o700))),
    ("link", |path| fs::hard_link(path, path.with_extension("link"))),
    ("truncate", |path| {
        OpenOptions::new().write(true).custom_flags(libc::O_TRUNC).open(path).map(drop)
    }),
];

fn try_in(directory: &Path) -> Result<(), Distrust> {
    let [lower, upper, work] = ["lower", "upper", "work"].map(|name| directory.join(name));
    for made in [&lower, &upper, &work] {
        fs::create_dir_all(made).map_err(Distrust::Broken)?;
    }
    for number in 0..CHANGES.len() {
        let path = lower.join(number.to_string());
        fs::write(&path, "no program\n")
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
            .map_err(Distrust::Broken)?;
    }
    let mount = overlay::mount_unseen(&lower, &upper, &work).map_err(Distrust::NoOverlay)?;
    let witness = Witness::start(&mount, &work.join("work"))?;
    let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
    for (number, (name, change)) in CHANGES.iter().enumerate() {
        let path = root.join(number.to_string());
        execute(&path).map_err(Distrust::Broken)?;
        witness.expect(Saw::Exec).ok_or(Distrust::ExecUnseen)?;
        execute(&path).map_err(Distrust::Broken)?;
        if witness.saw_anything() {
            return Err(Distrust::NotIgnored);
        }
        change(&path).map_err(Distrust::Broken)?;
        witness.expect(Saw::CopyUp(CopyUp::Begins)).ok_or(Distrust::CopyUpUnseen(name))?;
        witness.expect(Saw::End).ok_or(Distrust::EndUnseen(name))?;
        execute(&path).map_err(Distrust::Broken)?;
        witness.expect(Saw::Exec).ok_or(Distrust::ExecUnseen)?;
    }
    Ok(())
}

/// Executes a file that is no program: the kernel asks, and then refuses to run it.
fn execute(path: &Path) -> io::Result<()> {
    let outcome =
        Command::new(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    match outcome {
        // ETXTBSY: a file that was open for writing is closed a moment later.
        Err(err) if matches!(err.raw_os_error(), Some(libc::ENOEXEC | libc::ETXTBSY)) => Ok(()),
        Err(err) => Err(err),
        Ok(mut child) => child.wait().map(drop),
    }
}

/// Allows each permission event, ignores each executed file, and reports what it saw.
struct Witness {
    seen: Receiver<Saw>,
    /// When this is dropped, the thread ends and closes the groups.
    _stop: Sender<()>,
}

impl Witness {
    fn start(mount: &OwnedFd, work: &Path) -> Result<Witness, Distrust> {
        let groups = [Group::gate()?, Group::copy_up_gate()?, Group::feed(Queue::Unlimited)?];
        let [gate, copy_ups, closes] = &groups;
        let work = file::open_directory(work).map_err(Distrust::Broken)?;
        closes
            .mark_children(work.as_fd(), libc::FAN_CLOSE_WRITE)
            .and_then(|()| copy_ups.mark_children(work.as_fd(), libc::FAN_OPEN_PERM))
            .and_then(|()| gate.mark_filesystem(mount.as_fd(), libc::FAN_OPEN_EXEC_PERM))
            .map_err(Distrust::MarkRefused)?;
        let (sender, seen) = unbounded();
        let (stop, stopped) = bounded(0);
        // The thread is not joined, in case the kernel blocks it: it owns the groups.
        thread::Builder::new()
            .name("gate-self-test".into())
            .spawn(move || {
                let mut buffer = Buffer::new();
                while stopped.try_recv() == Err(TryRecvError::Empty) {
                    let mut fds = groups
                        .each_ref()
                        .map(|group| PollFd::from_borrowed_fd(group.as_fd(), PollFlags::IN));
                    let turn = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
                    let _ = rustix::event::poll(&mut fds, Some(&turn));
                    for group in &groups {
                        for incoming in group.read(&mut buffer, 4096).unwrap_or_default() {
                            let saw = match incoming {
                                Incoming::Permission(permission) => {
                                    Some(answer(&groups, permission))
                                }
                                Incoming::Notification(_) => Some(Saw::End),
                                Incoming::Overflow => None,
                            };
                            saw.and_then(|saw| sender.send(saw).ok());
                        }
                    }
                }
            })
            .map_err(Distrust::Broken)?;
        Ok(Witness { seen, _stop: stop })
    }

    /// Waits until `wanted` is seen, and drops whatever else is seen meanwhile.
    fn expect(&self, wanted: Saw) -> Option<()> {
        let deadline = Instant::now() + PATIENCE;
        while let Ok(saw) = self.seen.recv_deadline(deadline) {
            if saw == wanted {
                return Some(());
            }
        }
        None
    }

    fn saw_anything(&self) -> bool {
        !self.seen.is_empty()
    }
}

fn answer([gate, _, _]: &[Group; 3], permission: Permission<'_>) -> Saw {
    let event = permission.event();
    let saw = if event.mask & libc::FAN_OPEN_EXEC_PERM != 0 {
        let _ = gate.ignore(event.file.as_fd(), libc::FAN_OPEN_EXEC_PERM);
        Saw::Exec
    } else {
        let _ = gate.flush();
        let what =
            file::stat(&event.file).and_then(|stat| overlay::copy_up(event.file.as_fd(), &stat));
        Saw::CopyUp(what.unwrap_or(CopyUp::Named))
    };
    let _ = permission.answer(Answer::Allow);
    saw
}
