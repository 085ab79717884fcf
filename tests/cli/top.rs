//! `driftd top` in a terminal: what it shows, and how it leaves the terminal.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZero;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::io::ioctl_fionread;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, OutputModes, Termios, Winsize, tcgetattr, tcsetattr,
    tcsetwinsize,
};

use crate::node::Node;
use crate::program::{Running, wait_until};
use crate::samples::{finding, session};

/// A running `driftd top`, with the master of its terminal.
struct Top {
    child: Running,
    master: File,
    /// Its mode before.
    usual: Mode,
    /// What the terminal shows, and everything that was written to it.
    shown: Arc<Mutex<(vt100::Parser, Vec<u8>)>>,
}

impl Top {
    fn start(node: &Node, variables: &[(&str, &str)]) -> Top {
        let top = Top::unread(node, variables);
        let (mut reader, kept) = (top.master.try_clone().unwrap(), Arc::clone(&top.shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Ends with an error when the last process has closed the terminal.
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                let mut kept = kept.lock().unwrap();
                kept.0.process(&buffer[..count]);
                kept.1.extend_from_slice(&buffer[..count]);
            }
        });
        top
    }

    /// In a terminal that takes only as much output as it can hold.
    fn unread(node: &Node, variables: &[(&str, &str)]) -> Top {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).unwrap();
        unlockpt(&master).unwrap();
        let size = Winsize { ws_row: 30, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&master, size).unwrap();
        let usual = mode(&tcgetattr(&master).unwrap());
        let terminal = || {
            let peer = ioctl_tiocgptpeer(&master, flags).unwrap();
            Stdio::from(peer)
        };
        let (input, output, error) = (terminal(), terminal(), terminal());
        let mut command = node.command(&["top"]);
        command.env("TERM", "xterm").env_remove("NO_COLOR").envs(variables.iter().copied());
        let child = command.stdin(input).stdout(output).stderr(error).spawn().unwrap();
        drop(command);
        let master = File::from(master);
        let [lines, columns] = [30, 100].map(|number| NonZero::new(number).unwrap());
        let parser = vt100::Parser::new(lines, columns, 0);
        let shown = Arc::new(Mutex::new((parser, Vec::new())));
        Top { child: Running(child), master, usual, shown }
    }

    fn child(&mut self) -> &mut Child {
        &mut self.child.0
    }

    /// What the terminal shows now.
    fn text(&self) -> String {
        self.shown.lock().unwrap().0.screen().contents()
    }

    /// Whether the terminal is as shells expect it, but for its mode.
    fn is_left(&self) -> bool {
        let shown = self.shown.lock().unwrap();
        let screen = shown.0.screen();
        !screen.alternate_screen() && !screen.bracketed_paste() && !screen.hide_cursor()
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        let is_there = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until(|| self.text().contains(text));
        }));
        assert!(is_there.is_ok(), "{text:?} was not shown: {}", self.text());
    }

    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    fn mode(&self) -> Mode {
        mode(&tcgetattr(&self.master).unwrap())
    }

    fn signal(&mut self, signal: Signal) {
        let pid = Pid::from_raw(self.child().id().try_into().unwrap());
        kill(pid, signal).unwrap();
    }

    /// Waits for the end, and returns the exit code.
    #[track_caller]
    fn end(&mut self) -> i32 {
        let status = self.child().wait().unwrap();
        status.code().unwrap_or_else(|| panic!("signal {:?}: {}", status.signal(), self.text()))
    }
}

type Mode = (InputModes, OutputModes, LocalModes);

fn mode(termios: &Termios) -> Mode {
    (termios.input_modes, termios.output_modes, termios.local_modes)
}

#[test]
fn top_leaves_the_terminal_as_it_was_however_it_ends() {
    let node = Node::start();
    node.store_findings(&[finding(1, 0)]);
    let signals = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT].map(Some);
    for signal in signals.into_iter().chain([None]) {
        let mut top = Top::start(&node, &[]);
        top.wait_for("/usr/bin/curl");
        assert!(!top.is_left());
        assert_ne!(top.mode(), top.usual);
        match signal {
            Some(signal) => top.signal(signal),
            None => top.press("q"),
        }
        assert_eq!(top.end(), 0, "{signal:?}");
        wait_until(|| top.is_left());
        assert_eq!((top.mode(), top.text().as_str()), (top.usual, ""), "{signal:?}");
    }
}

#[test]
fn top_ends_when_it_is_asked_to_although_the_terminal_takes_no_output() {
    let node = Node::start();
    let mut top = Top::unread(&node, &[]);
    wait_until(|| top.mode() != top.usual);
    // Ctrl-L: the whole screen is drawn anew.
    top.press(&"\u{c}".repeat(500));
    // It waits for the terminal when it has taken no more of these for a while.
    let mut left = None;
    wait_until(|| {
        std::thread::sleep(std::time::Duration::from_millis(200));
        let now = ioctl_fionread(&top.master).unwrap();
        left.replace(now) == Some(now) && now > 0
    });
    top.signal(Signal::SIGTERM);
    assert_eq!(top.end(), 2, "with 0, it has never waited for the terminal");
    assert_eq!(top.mode(), top.usual);
}

#[test]
fn top_takes_the_terminal_again_when_the_shell_continues_it() {
    let node = Node::start();
    node.store_findings(&[finding(1, 0)]);
    let mut top = Top::start(&node, &[]);
    top.wait_for("/usr/bin/curl");
    let raw = top.mode();
    top.signal(Signal::SIGSTOP);
    let mut termios = tcgetattr(&top.master).unwrap();
    (termios.input_modes, termios.output_modes, termios.local_modes) = top.usual;
    tcsetattr(&top.master, OptionalActions::Now, &termios).unwrap();
    top.shown.lock().unwrap().0.process(b"\x1b[?1049l\x1b[2Ja shell");
    assert_eq!(top.text().trim(), "a shell");
    top.signal(Signal::SIGCONT);
    wait_until(|| top.mode() == raw);
    top.wait_for("/usr/bin/curl");
    // Ctrl-L draws over what others have written.
    top.shown.lock().unwrap().0.process(b"\x1b[2Ja message");
    top.press("\u{c}");
    top.wait_for("/usr/bin/curl");
    assert!(!top.text().contains("a message"));
    top.press("q");
    assert_eq!(top.end(), 0);
    assert_eq!(top.mode(), top.usual);
}

#[test]
fn top_responds_only_to_what_was_confirmed_and_shows_the_outcome() {
    let node = Node::start();
    let mut drift = finding(1, 0);
    drift.run =
        Some(driftd::model::Incarnation { pid: 4242, start_time: Some(7), created_at: None });
    node.store_findings(&[drift]);
    let mut top = Top::start(&node, &[]);
    top.wait_for("/usr/bin/curl");
    let responses = || {
        let timeline = node.run(&["timeline", "web", "-o", "jsonl"]);
        timeline.out.lines().filter(|line| line.contains("\"type\":\"response\"")).count()
    };
    top.press("k");
    top.wait_for("Type web to confirm");
    top.press("kill\r");
    top.wait_for("not confirmed: nothing was done");
    assert_eq!(responses(), 0);
    top.press("pweb\r");
    top.wait_for("Type the reason");
    assert_eq!(responses(), 0, "the reason is missing");
    top.press("under investigation\r");
    top.wait_for("as scripted");
    assert_eq!(responses(), 1);
    let timeline = node.run(&["timeline", "web"]).out;
    assert!(timeline.contains("under investigation"), "{timeline}");
    top.press("q");
    assert_eq!(top.end(), 0);
}

#[test]
fn top_says_that_the_daemon_is_away_and_back() {
    let mut node = Node::start();
    node.store_findings(&[finding(1, 0)]);
    node.store_session(&session(1, 60), &[]);
    let mut top = Top::start(&node, &[("NO_COLOR", "1")]);
    top.wait_for("/usr/bin/curl");
    top.wait_for("runtime exec");
    node.stop_server();
    node.writer.take().unwrap().stop();
    top.wait_for("NOT CONNECTED");
    let dir = std::mem::replace(&mut node.dir, tempfile::tempdir().unwrap());
    node.writer = Some(
        driftd::history::History::open(node.dir.path())
            .unwrap()
            .start(crate::node::RETENTION, Arc::default()),
    );
    let node = Node::start_in(dir);
    top.wait_for("driftd is back");
    let mut later = finding(2, 0);
    later.file.as_mut().unwrap().path = driftd::model::RootfsPath::new("/tmp/later").unwrap();
    node.store_findings(&[later]);
    top.wait_for("/tmp/later");
    // Colours are 30 to 37 and 90 to 97, or 38 and 48 with more behind them.
    let text = String::from_utf8_lossy(&top.shown.lock().unwrap().1).into_owned();
    let coloured = text.split("\u{1b}[").skip(1).filter_map(|rest| rest.split_once('m'));
    let codes: Vec<&str> = coloured
        .map(|(codes, _)| codes)
        .filter(|codes| codes.bytes().all(|byte| byte.is_ascii_digit() || byte == b';'))
        .flat_map(|codes| codes.split(';'))
        .collect();
    let is_colour = |code: &&&str| matches!(code.parse::<u8>(), Ok(30..=38 | 40..=48 | 90..=107));
    assert!(codes.iter().find(is_colour).is_none(), "{codes:?}");
    top.press("q");
    assert_eq!(top.end(), 0);
}

#[test]
fn top_without_a_terminal_or_a_daemon_says_what_to_do() {
    let node = Node::start();
    let piped = node.run(&["top"]);
    assert_eq!((piped.code, piped.out.as_str()), (64, ""));
    let named = ["driftd status", "driftd findings --follow"];
    assert!(named.iter().all(|name| piped.err.contains(name)), "{}", piped.err);
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("none.sock");
    let mut top = Top::start(&node, &[("DRIFTD_SOCKET", socket.to_str().unwrap())]);
    top.wait_for("cannot reach driftd at");
    assert_eq!(top.end(), 2);
    let written = String::from_utf8_lossy(&top.shown.lock().unwrap().1).into_owned();
    assert!(!written.contains("\u{1b}[?1049h"), "the screen stays as it is: {written}");
}
