//! Runs one program: its input, its time, its end, and the last that it writes.
//!
//! One loop over its descriptors. Nothing that the program does or leaves behind makes it wait
//! longer than the program may run.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::unistd::User;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use super::call::{End, Ended, MAX_OUTPUT, Order};
use super::program::check;
use crate::sys::pidfd;

/// Runs the program of an order. `stop` is a descriptor whose other end is closed when the runner
/// is to stop.
pub fn execute(order: &Order, stop: BorrowedFd<'_>) -> Ended {
    match begin(order).and_then(|child| Running::new(child, order)) {
        Ok(running) => running.finish(order.timeout, stop),
        Err(why) => End::NotStarted(why).into(),
    }
}

fn begin(order: &Order) -> Result<Child, String> {
    check(&order.program)?;
    let mut command = Command::new(&order.program);
    command
        .args(&order.arguments)
        .env_clear()
        .envs(&order.environment)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // The group is killed as a whole.
        .process_group(0);
    // Where systemd has put what LoadCredential= names.
    if let Some(directory) = std::env::var_os("CREDENTIALS_DIRECTORY") {
        command.env("CREDENTIALS_DIRECTORY", directory);
    }
    if let Some(user) = &order.user {
        become_user(&mut command, user)?;
    }
    command.spawn().map_err(|err| format!("{} cannot be started: {err}", order.program.display()))
}

/// Only root may become another user. The supplementary groups of root are dropped.
fn become_user(command: &mut Command, name: &str) -> Result<(), String> {
    let found = User::from_name(name).map_err(|err| format!("the user {name}: {err}"))?;
    let user = found.ok_or_else(|| format!("there is no user {name}"))?;
    let own = nix::unistd::geteuid();
    if !own.is_root() {
        let is_own = user.uid == own;
        return is_own.then_some(()).ok_or_else(|| {
            format!("driftd hooks runs as uid {own}, and only root may become the user {name}")
        });
    }
    command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    Ok(())
}

/// A program that runs, with the ends of its pipes. None of them ever blocks.
struct Running<'a> {
    child: Child,
    handle: OwnedFd,
    /// What it has not read yet.
    input: &'a [u8],
    stdin: Option<OwnedFd>,
    outputs: [Option<OwnedFd>; 2],
    output: Vec<u8>,
}

impl<'a> Running<'a> {
    fn new(mut child: Child, order: &'a Order) -> Result<Running<'a>, String> {
        let pipes = pidfd::open(child.id()).and_then(|handle| {
            let stdin: Option<OwnedFd> = child.stdin.take().map(Into::into);
            let outputs: [Option<OwnedFd>; 2] =
                [child.stdout.take().map(Into::into), child.stderr.take().map(Into::into)];
            for pipe in stdin.iter().chain(outputs.iter().flatten()) {
                rustix::io::ioctl_fionbio(pipe, true)?;
            }
            Ok((handle, stdin, outputs))
        });
        match pipes {
            Ok((handle, stdin, outputs)) => {
                let (input, output) = (order.input.as_slice(), Vec::new());
                Ok(Running { child, handle, input, stdin, outputs, output })
            }
            Err(err) => {
                // It is ours and has not been waited for: its pid is its own.
                let _ = child.kill();
                let _ = child.wait();
                Err(format!("{} cannot be watched: {err}", order.program.display()))
            }
        }
    }

    /// Waits until it has ended, or ends it.
    fn finish(mut self, timeout: Duration, stop: BorrowedFd<'_>) -> Ended {
        let deadline = Instant::now() + timeout;
        let killed = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Some(End::TimedOut);
            }
            match self.turn(left, stop) {
                Turn::Ended => break None,
                Turn::Stop => break Some(End::Stopped),
                Turn::GoOn => (),
            }
        };
        // Before it is waited for: until then no other group can have its number.
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // An error means that all of them have ended.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
        let status = self.child.wait();
        self.read();
        let end = killed.unwrap_or_else(|| match status {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => End::Exited(code),
                (None, signal) => End::Signal(signal.unwrap_or_default()),
            },
            Err(_) => End::NoReport,
        });
        Ended { end, output: self.output }
    }

    /// Waits for the next thing to do, and does it.
    fn turn(&mut self, left: Duration, stop: BorrowedFd<'_>) -> Turn {
        let mut fds = vec![
            PollFd::new(&self.handle, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        fds.extend(self.stdin.iter().map(|pipe| PollFd::new(pipe, PollFlags::OUT)));
        fds.extend(self.outputs.iter().flatten().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        let left = Timespec::try_from(left).ok();
        // A signal that interrupts it changes nothing.
        let _ = rustix::event::poll(&mut fds, left.as_ref());
        let [has_ended, stops] = [0, 1].map(|at: usize| !fds[at].revents().is_empty());
        if has_ended {
            return Turn::Ended;
        }
        if stops {
            return Turn::Stop;
        }
        self.write();
        self.read();
        Turn::GoOn
    }

    /// Writes what the pipe takes. It is closed when all is written, or when the program has
    /// closed its end.
    fn write(&mut self) {
        let Some(pipe) = &self.stdin else { return };
        match rustix::io::write(pipe, self.input) {
            Ok(written) => self.input = &self.input[written..],
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => self.input = &[],
        }
        if self.input.is_empty() {
            self.stdin = None;
        }
    }

    /// Reads what is there, once: a program that never stops to write must not keep the loop
    /// from looking at its time.
    fn read(&mut self) {
        let mut buffer = [0; 1 << 16];
        for pipe in &mut self.outputs {
            let Some(open) = pipe else { continue };
            match rustix::io::read(open.as_fd(), &mut buffer) {
                Ok(0) => *pipe = None,
                Ok(count) => self.output.extend_from_slice(&buffer[..count]),
                Err(Errno::AGAIN | Errno::INTR) => (),
                Err(_) => *pipe = None,
            }
            let surplus = self.output.len().saturating_sub(MAX_OUTPUT);
            self.output.drain(..surplus);
        }
    }
}

/// What has happened while a program ran.
enum Turn {
    Ended,
    Stop,
    GoOn,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(script: &str) -> Order {
        Order {
            hook: "h".into(),
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            environment: [("PATH".into(), "/usr/bin:/bin".into()), ("X".into(), "y".into())].into(),
            input: b"{\"a\":1}\n".to_vec(),
            timeout: Duration::from_secs(20),
            user: None,
        }
    }

    fn run(order: &Order) -> (End, String) {
        let (stop, _open) = std::io::pipe().unwrap();
        let ended = execute(order, stop.as_fd());
        (ended.end, String::from_utf8(ended.output).unwrap())
    }

    #[test]
    fn a_program_gets_its_input_and_a_clean_environment_and_its_end_is_known() {
        let (end, output) = run(&order("cat; env | grep -v ^PWD= | grep -v ^_= | sort; exit 3"));
        assert_eq!(end, End::Exited(3));
        assert_eq!(output, "{\"a\":1}\nPATH=/usr/bin:/bin\nX=y\n");
        assert_eq!(run(&order("kill -9 $$")).0, End::Signal(9));
    }

    #[test]
    fn a_program_that_reads_no_input_or_writes_without_end_is_held_up_by_nothing() {
        let mut large = order("exit 0");
        large.input = vec![b'x'; 4 << 20];
        assert_eq!(run(&large).0, End::Exited(0));
        large.arguments[1] = "wc -c".into();
        assert_eq!(run(&large), (End::Exited(0), "4194304\n".to_owned()));
        let (end, output) = run(&order("head -c 3000000 /dev/zero | tr '\\0' a; printf end"));
        assert_eq!((end, output.len()), (End::Exited(0), MAX_OUTPUT));
        assert!(output.ends_with("aaaend"));
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_what_it_has_started() {
        let mut hangs = order("sleep 600 & echo $!; sleep 600");
        hangs.timeout = Duration::from_millis(500);
        let (end, output) = run(&hangs);
        assert_eq!(end, End::TimedOut);
        let child: u32 = output.trim().parse().unwrap();
        // It is another process's child, which may take a moment to wait for it.
        let ends = Instant::now() + Duration::from_secs(10);
        let is_gone = || pidfd::open(child).map_or(true, |one| pidfd::has_ended(one.as_fd()));
        while !is_gone() {
            assert!(Instant::now() < ends, "the child of the program runs");
            std::thread::yield_now();
        }
        let mut writes = order("yes");
        writes.timeout = Duration::from_millis(300);
        assert_eq!(run(&writes).0, End::TimedOut);
    }

    #[test]
    fn what_a_program_leaves_behind_does_not_hold_up_its_end() {
        let began = Instant::now();
        // It has left the group, and keeps the pipes open.
        let (end, output) = run(&order("setsid sleep 8 & echo done"));
        assert_eq!((end, output.as_str()), (End::Exited(0), "done\n"));
        assert!(began.elapsed() < Duration::from_secs(7));
    }

    #[test]
    fn a_runner_that_stops_kills_what_it_runs() {
        let (stop, open) = std::io::pipe().unwrap();
        drop(open);
        assert_eq!(execute(&order("sleep 600"), stop.as_fd()).end, End::Stopped);
    }

    #[test]
    fn what_cannot_be_run_says_why() {
        let why = |order: &Order| match run(order).0 {
            End::NotStarted(why) => why,
            end => panic!("{end:?}"),
        };
        assert!(why(&Order { program: "/no/such".into(), ..order("") }).contains("No such file"));
        let of_user = Order { user: Some("no-such-user".into()), ..order("") };
        assert_eq!(why(&of_user), "there is no user no-such-user");
        let of_user = Order { user: Some("daemon".into()), ..order("id -u; id -G") };
        if rustix::process::geteuid().is_root() {
            let (end, output) = run(&of_user);
            assert_eq!(end, End::Exited(0));
            assert!(!output.split_whitespace().any(|id| id == "0"), "{output}");
        } else {
            assert!(why(&of_user).contains("only root may become the user daemon"));
        }
    }
}
