//! The built program as a test runs it, and the text that it prints.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a test waits for an event that must come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

#[track_caller]
pub(crate) fn wait_until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn driftd(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_driftd"));
    command.args(arguments).env_remove("DRIFTD_SOCKET").stdin(Stdio::null());
    command
}

#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Output {
    pub(crate) fn of(output: std::process::Output) -> Output {
        Output {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

#[track_caller]
pub(crate) fn run(arguments: &[&str]) -> Output {
    Output::of(driftd(arguments).output().unwrap())
}

/// Ends a child that a failed test leaves behind.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
pub(crate) fn assert_clean(text: &str) {
    let is_dirty = |one: char| one != '\n' && one.is_control() || one == '\u{202e}';
    assert!(!text.contains(is_dirty), "{text:?}");
}

/// Replaces dates and times, which differ from run to run.
pub(crate) fn timeless(text: &str) -> String {
    let mut all = String::new();
    for line in settled(text).lines() {
        let words = line.split(' ').map(|word| match word.parse::<jiff::civil::Time>() {
            Ok(_) if word.contains(':') => "TIME",
            _ => match word.parse::<jiff::civil::Date>() {
                Ok(_) => "DATE",
                Err(_) => word,
            },
        });
        all += &words.collect::<Vec<_>>().join(" ");
        all.push('\n');
    }
    all
}

/// Removes ages and other text that differs from run to run.
pub(crate) fn settled(text: &str) -> String {
    let mut lines = String::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let shown: Vec<&str> = words
            .iter()
            .enumerate()
            .map(|(at, word)| match words.get(at + 1) {
                Some(&"ago") => "…",
                _ => *word,
            })
            .collect();
        lines += &match shown.first() {
            Some(&"Recorded") => "Recorded …".to_owned(),
            _ => shown.join(" "),
        };
        lines.push('\n');
    }
    lines
}
