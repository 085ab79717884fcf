//! The built program, reading a history that a test has written.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use driftd::history::{History, Keep, Record};
use tempfile::TempDir;

/// Older than any record of a test.
const KEEP: Keep =
    Keep { retention: Duration::from_secs(100 * 365 * 24 * 3600), max_bytes: 1 << 30 };

#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// A history on the disk.
pub(crate) struct Recorded {
    pub(crate) dir: TempDir,
}

impl Recorded {
    pub(crate) fn of(records: impl IntoIterator<Item = Record>) -> Recorded {
        let dir = tempfile::tempdir().unwrap();
        let history = History::open(&dir.path().join("state")).unwrap();
        let writer = history.start(KEEP, Arc::default());
        let (sender, mut count) = (writer.records(), 0);
        for record in records {
            sender.send(record).unwrap();
            count += 1;
        }
        assert!(count > 0);
        drop(sender);
        writer.stop();
        Recorded { dir }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    #[track_caller]
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.run_in("UTC0", arguments)
    }

    /// Runs the program on a machine in another time zone.
    #[track_caller]
    pub(crate) fn run_in(&self, zone: &str, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_driftd"));
        command.env("TZ", zone);
        command.arg("--history").arg(self.path()).args(arguments);
        let output = command.env_remove("DRIFTD_SOCKET").stdin(Stdio::null()).output().unwrap();
        Output {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The report on standard output.
    #[track_caller]
    pub(crate) fn report(&self, arguments: &[&str]) -> String {
        let output = self.run(&[&["report"], arguments].concat());
        assert_eq!((output.code, output.err.as_str()), (0, ""), "{arguments:?}");
        output.out
    }

    /// The same without what differs from run to run.
    #[track_caller]
    pub(crate) fn settled(&self, arguments: &[&str]) -> String {
        settle(&self.report(arguments), self.dir.path())
    }
}

fn settle(text: &str, dir: &Path) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let text = text.replace(dir.to_str().unwrap(), "DIRECTORY");
    let made_by = format!(" by driftd {version}");
    let text = match text.split_once(&made_by) {
        Some((before, after)) => {
            let time = "2026-11-20 10:00:00 UTC".len();
            format!("{}TIME by driftd VERSION{after}", &before[..before.len() - time])
        }
        None => text,
    };
    text.replace(&format!("driftd {version}\""), "driftd VERSION\"")
}
