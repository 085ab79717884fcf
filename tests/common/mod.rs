//! What the tests of the watchers share: waiting, overlays, and a driftd without a
//! pipeline, whose reports a test reads.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use driftd::config;
use driftd::gate::Gate;
use driftd::health::Health;
use driftd::model::{ContainerId, FileTime};
use driftd::sys::mounts::Notifier;
use driftd::watch::{self, SensorCommand, SensorEvent, Trust, Watch};

/// Whether this is a virtual machine of `make test-kernels` with an emulated processor.
pub(crate) fn is_emulated() -> bool {
    std::env::var_os("DRIFTD_TEST_KERNEL").is_some()
}

/// How long a test waits for an event that must come.
pub(crate) fn patience() -> Duration {
    Duration::from_secs(if is_emulated() { 300 } else { 30 })
}

#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut find: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(found) = find() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[track_caller]
pub(crate) fn wait_until(what: &str, mut is_there: impl FnMut() -> bool) {
    wait_for(what, || is_there().then_some(()));
}

#[track_caller]
pub(crate) fn run<S: AsRef<OsStr> + Debug>(words: &[S]) {
    let output = Command::new(&words[0])
        .args(&words[1..])
        .output()
        .unwrap_or_else(|err| panic!("cannot run {words:?}: {err} (try: make setup)"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?} failed: {stderr}");
}

pub(crate) fn require_root() {
    assert!(rustix::process::geteuid().is_root(), "these tests mount overlays: run them as root");
}

/// Mounts an overlay of one layer on `merged`. The directories `upper` and `work` lie
/// below `own`.
#[track_caller]
pub(crate) fn mount_overlay(lower: &Path, own: &Path, merged: &Path, more_options: &str) {
    let [upper, work] = ["upper", "work"].map(|name| own.join(name));
    let [lower, upper, work] = [lower, &upper, &work].map(Path::display);
    let mut options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    if !more_options.is_empty() {
        options = format!("{options},{more_options}");
    }
    let words = ["mount", "-t", "overlay", "overlay", "-o", &options].map(OsStr::new);
    run(&[&words[..], &[merged.as_os_str()]].concat());
}

/// A file's ctime.
pub(crate) fn changed(path: &Path) -> FileTime {
    let metadata = fs::symlink_metadata(path).unwrap();
    let nanoseconds = u32::try_from(metadata.ctime_nsec()).unwrap();
    FileTime { seconds: metadata.ctime(), nanoseconds }
}

/// Starts the gate's process from the built program.
pub(crate) fn start_gate(settings: &config::Watch) -> Gate {
    Gate::start(Path::new(env!("CARGO_BIN_EXE_driftd")), watch::shards(settings.gate))
        .unwrap_or_else(|err| panic!("the gate cannot start: {err}"))
}

/// The watchers, and the channel on which they report.
pub(crate) struct Watchers {
    watch: Option<Watch>,
    pub(crate) reports: Receiver<Box<SensorEvent>>,
    #[allow(dead_code, reason = "tests/check.rs does not read it")]
    pub(crate) health: Arc<Health>,
}

impl Watchers {
    /// The channel has room for `reports` reports.
    pub(crate) fn start(settings: &config::Watch, reports: usize, notifier: Notifier) -> Watchers {
        let (sender, reports) = bounded(reports);
        let health = Arc::new(Health::default());
        let gate = start_gate(settings);
        let watch = Watch::start_with(settings, sender, health.clone(), gate, notifier)
            .unwrap_or_else(|err| panic!("the watchers cannot start: {err}"));
        Watchers { watch: Some(watch), reports, health }
    }

    pub(crate) fn watch(&self) -> &Watch {
        self.watch.as_ref().expect("the watchers run")
    }

    pub(crate) fn send(&self, command: SensorCommand) {
        self.watch().commands().send(command).unwrap();
    }

    /// Asks for a container to be attached and trusted; a report follows when it is done.
    pub(crate) fn attach(&self, container: &ContainerId, pid: u32, trust: Trust) {
        let container = container.clone();
        self.send(SensorCommand::Attach { container: container.clone(), pid, rootfs: None });
        self.send(SensorCommand::Trust { container, trust });
    }

    pub(crate) fn stop(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.stop();
        }
    }
}

impl Drop for Watchers {
    fn drop(&mut self) {
        self.stop();
    }
}
