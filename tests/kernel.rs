//! The watchers against the real kernel: overlays mounted here, programs run in
//! them, and what the gate, the change feed and the walks say of it.
//!
//! Needs root, fanotify and a static busybox (`make setup`), and fails without.

#[path = "node/executable.rs"]
mod executable;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use driftd::config;
use driftd::gate::Gate;
use driftd::health::{Failure, Health};
use driftd::model::{
    Blake3Hash, ContainerId, Content, Entry, Fact, FileState, FileTime, FileType, Filesystem,
    Format, LayerFile, Observation, Process, RootfsPath, Source, Unhashed,
};
use driftd::pulse::Part;
use driftd::sys::fanotify::{self, Answer, Buffer, Decoded, Group, Incoming};
use driftd::sys::mounts::Notifier;
use driftd::sys::procfs;
use driftd::watch::{self, SensorCommand, SensorEvent, Trust, Verdict, Watch};

const PATIENCE: Duration = Duration::from_secs(30);
/// In an emulated machine, where all is slow.
const MUCH_PATIENCE: Duration = Duration::from_secs(300);

/// Whether this is a machine of `make test-kernels`, whose processor is a program.
fn is_emulated() -> bool {
    std::env::var_os("DRIFTD_TEST_KERNEL").is_some()
}

fn patience() -> Duration {
    if is_emulated() { MUCH_PATIENCE } else { PATIENCE }
}
const BUSYBOX: &str = "/bin/busybox";

/// An overlay with a small image, and a process that has it as its root.
struct Container {
    dir: tempfile::TempDir,
    init: Option<Child>,
    /// The process in it, which may be a descendant of `init`.
    pid: u32,
    id: ContainerId,
    mounts: Vec<PathBuf>,
    /// The newest change in the image, as who recorded it would have seen it.
    recorded: FileTime,
}

fn run<S: AsRef<OsStr> + std::fmt::Debug>(words: &[S]) {
    let output = Command::new(&words[0])
        .args(&words[1..])
        .output()
        .unwrap_or_else(|err| panic!("cannot run {words:?}: {err} (try: make setup)"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?} failed: {stderr}");
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

impl Container {
    fn start() -> Container {
        Container::with(&[], "", false)
    }

    /// `launch` comes before the command that starts the container's init.
    fn with(launch: &[&str], mount_options: &str, upper_on_tmpfs: bool) -> Container {
        Container::of_image(|_| (), launch, mount_options, upper_on_tmpfs)
    }

    /// `change` is made to the image after it was recorded and before there is a
    /// container of it.
    fn of_image(
        change: impl Fn(&Path),
        launch: &[&str],
        mount_options: &str,
        upper_on_tmpfs: bool,
    ) -> Container {
        Container::reading(Stdio::null(), change, launch, mount_options, upper_on_tmpfs)
    }

    /// `input` is what its init has open as its standard input.
    fn reading(
        input: Stdio,
        change: impl Fn(&Path),
        launch: &[&str],
        mount_options: &str,
        upper_on_tmpfs: bool,
    ) -> Container {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests mount overlays: run them as root"
        );
        assert!(Path::new(BUSYBOX).exists(), "{BUSYBOX} is missing (try: make setup)");
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let lower = at("lower");
        for name in ["bin", "tmp", "etc", "mnt", "opt/tool"] {
            fs::create_dir_all(lower.join(name)).unwrap();
        }
        fs::copy(BUSYBOX, lower.join("bin/busybox")).unwrap();
        for applet in ["sh", "sleep", "cat", "mv", "rm", "chmod", "touch", "cp", "mkdir"] {
            symlink("busybox", lower.join("bin").join(applet)).unwrap();
        }
        fs::copy(BUSYBOX, lower.join("bin/true")).unwrap();
        fs::copy(BUSYBOX, lower.join("opt/tool/true")).unwrap();
        fs::write(lower.join("opt/tool/readme"), "read me").unwrap();
        fs::write(lower.join("etc/config"), "setting").unwrap();
        // Times of files are as coarse as the kernel's clock tick; a real image
        // is older than its containers by more than that.
        std::thread::sleep(Duration::from_millis(30));
        let recorded = newest_change(&lower);
        change(&lower);
        std::thread::sleep(Duration::from_millis(30));
        let id = ContainerId::new("test", dir.path().file_name().unwrap().to_str().unwrap());
        let own = at("own");
        fs::create_dir(&own).unwrap();
        let mut mounts = Vec::new();
        if upper_on_tmpfs {
            run(&[
                OsStr::new("mount"),
                "-t".as_ref(),
                "tmpfs".as_ref(),
                "none".as_ref(),
                own.as_ref(),
            ]);
            mounts.push(own);
        }
        for name in ["own/upper", "own/work", "merged"] {
            fs::create_dir(at(name)).unwrap();
        }
        let mut options = OsString::from("lowerdir=");
        options.push(&lower);
        options.push(",upperdir=");
        options.push(at("own/upper"));
        options.push(",workdir=");
        options.push(at("own/work"));
        options.push(mount_options);
        let merged = at("merged");
        run(&[
            OsStr::new("mount"),
            "-t".as_ref(),
            "overlay".as_ref(),
            "overlay".as_ref(),
            "-o".as_ref(),
            &options,
            merged.as_ref(),
        ]);
        mounts.insert(0, merged.clone());
        let mut container = Container { dir, init: None, pid: 0, id, mounts, recorded };
        let mut words: Vec<&OsStr> = launch.iter().map(OsStr::new).collect();
        words.extend([OsStr::new("chroot"), merged.as_os_str()]);
        words.extend(["/bin/sleep", "3600"].map(OsStr::new));
        let init = Command::new(words[0]).args(&words[1..]).stdin(input).spawn().unwrap();
        let child = init.id();
        container.init = Some(init);
        container.pid = wait_for("the container's init", || {
            descendants(child).into_iter().find(|pid| {
                fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line == b"/bin/sleep\x003600\0")
            })
        });
        container
    }

    fn merged(&self) -> PathBuf {
        self.dir.path().join("merged")
    }

    /// The image's only layer.
    fn lower(&self) -> PathBuf {
        self.dir.path().join("lower")
    }

    fn upper(&self) -> PathBuf {
        self.dir.path().join("own/upper")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("chroot");
        command.arg(self.merged()).args(words).stdin(Stdio::null());
        command
    }

    #[track_caller]
    fn shell(&self, script: &str) {
        let output = self.command(&["/bin/sh", "-c", script]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{script}` failed: {stderr}");
    }

    /// Adds a program to the container's own layer: busybox with something
    /// behind it that the image does not hold.
    fn drop_program(&self, path: &str) -> Blake3Hash {
        let target = self.merged().join(path.trim_start_matches('/'));
        let mut content = fs::read(BUSYBOX).unwrap();
        content.extend(path.bytes());
        executable::write(&target, &content).unwrap();
        Blake3Hash(*blake3::hash(&content).as_bytes())
    }

    fn kill_init(&mut self) {
        if let Some(mut init) = self.init.take() {
            if self.pid != 0 {
                kill(self.pid);
            }
            let _ = init.kill();
            let _ = init.wait();
        }
    }

    /// Unmounts everything, and fails if something stays busy for a second:
    /// whoever closes a file takes it from its table a moment before it gives
    /// back the mount. Runtimes try longer (containerd: 50 times in 2.5 s).
    fn unmount(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(1);
        for mount in self.mounts.drain(..) {
            let unmount = || rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::empty());
            while let Err(err) = unmount() {
                let may_pass = err == rustix::io::Errno::BUSY && Instant::now() < deadline;
                assert!(may_pass, "cannot unmount {}: {err}", mount.display());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.kill_init();
        for mount in &self.mounts {
            let status = Command::new("umount").arg("-l").arg(mount).status();
            if !status.is_ok_and(|status| status.success()) {
                eprintln!("{} is left mounted", mount.display());
            }
        }
    }
}

/// The newest ctime in a directory.
fn newest_change(directory: &Path) -> FileTime {
    let mut newest = changed(directory);
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let is_directory = fs::symlink_metadata(&path).unwrap().is_dir();
        newest = newest.max(if is_directory { newest_change(&path) } else { changed(&path) });
    }
    newest
}

fn changed(path: &Path) -> FileTime {
    let metadata = fs::symlink_metadata(path).unwrap();
    let nanoseconds = u32::try_from(metadata.ctime_nsec()).unwrap();
    FileTime { seconds: metadata.ctime(), nanoseconds }
}

/// Changes a file where it lies, without changing its length or its inode.
fn flip_a_byte(path: &Path) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let at = file.metadata().unwrap().len() - 1;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

fn descendants(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(pid) = all.get(next).copied() {
        next += 1;
        let children =
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        all.extend(children.split_ascii_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
    }
    all
}

/// A process with its children, which must not outlive the test.
struct Family(Child);

impl Drop for Family {
    fn drop(&mut self) {
        for pid in descendants(self.0.id()) {
            kill(pid);
        }
        let _ = self.0.wait();
    }
}

#[track_caller]
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease").unwrap()
}

fn kernel_version() -> (u32, u32) {
    let release = kernel_release();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap())
}

fn hash_of(path: impl AsRef<Path>) -> Blake3Hash {
    Blake3Hash(*blake3::hash(&fs::read(path).unwrap()).as_bytes())
}

fn path(text: &str) -> RootfsPath {
    RootfsPath::new(text).unwrap()
}

/// Walks only when asked for, or after an exec.
fn settings() -> config::Watch {
    config::Watch {
        settle: Duration::from_millis(100),
        sweep_interval: Duration::from_secs(3600),
        max_hash_bytes: 64 << 20,
        ..config::Watch::default()
    }
}

/// The gate's process, of the program that is installed.
fn start_gate(settings: &config::Watch) -> Gate {
    Gate::start(Path::new(env!("CARGO_BIN_EXE_driftd")), watch::shards(settings.gate))
        .unwrap_or_else(|err| panic!("the gate cannot start: {err}"))
}

/// The watchers, and everything they have told.
struct Node {
    watch: Option<Watch>,
    reports: Receiver<Box<SensorEvent>>,
    told: Vec<SensorEvent>,
    health: Arc<Health>,
    next_ticket: u64,
}

impl Node {
    fn start() -> Node {
        Node::with_room_for(64 * 1024)
    }

    fn with_room_for(reports: usize) -> Node {
        Node::with(reports, &settings())
    }

    fn with(reports: usize, settings: &config::Watch) -> Node {
        let (sender, reports) = bounded(reports);
        let health = Arc::new(Health::default());
        let watch = Watch::start(settings, sender, health.clone(), start_gate(settings))
            .unwrap_or_else(|err| panic!("the watchers cannot start: {err}"));
        Node { watch: Some(watch), reports, told: Vec::new(), health, next_ticket: 0 }
    }

    fn order(&self, order: SensorCommand) {
        self.watch.as_ref().unwrap().commands().send(order).unwrap();
    }

    /// Attaches, waits for the first walk, and forgets what was told so far.
    fn attach(&mut self, container: &Container) -> bool {
        self.attach_with(container, Trust::UpTo(container.recorded))
    }

    fn attach_with(&mut self, container: &Container, trust: Trust) -> bool {
        let id = container.id.clone();
        self.order(SensorCommand::Attach {
            container: id.clone(),
            pid: container.pid,
            rootfs: None,
        });
        self.order(SensorCommand::Trust { container: id.clone(), trust });
        let before_start = self.until("the container to be attached", |report| match report {
            SensorEvent::Attached { container, before_start, .. } if *container == id => {
                Some(*before_start)
            }
            SensorEvent::NotAttached { reason, .. } => panic!("not attached: {reason}"),
            _ => None,
        });
        self.until("the first walk", |report| match report {
            SensorEvent::Scanned { container, complete: true, .. } if *container == id => Some(()),
            _ => None,
        });
        // Orders are carried out one after the other: by now it is trusted.
        self.walk(container);
        self.told.clear();
        before_start
    }

    /// Runs a program, and says as which file of the layers it was told, if it was
    /// told at all.
    #[track_caller]
    fn told_of(&mut self, container: &Container, program: &str) -> Option<(LayerFile, Blake3Hash)> {
        self.told.clear();
        // What is executed one after the other is told one after the other.
        container.shell(&format!("{program}; /tmp/true"));
        self.until_executed(&path("/tmp/true"));
        let mut told = self.told.iter().filter_map(|report| match report {
            SensorEvent::Observed(Observation {
                fact: Fact::Executed { path: told, state, layer_file, lower, .. },
                ..
            }) if *told == path(program) => {
                assert_eq!(*lower, None, "a file of a layer is its own twin");
                Some((layer_file.expect("it is not the container's own"), state.blake3().unwrap()))
            }
            _ => None,
        });
        let first = told.next();
        assert_eq!(told.next(), None, "it was run once");
        first
    }

    /// Until the judgement is known: orders are carried out one after the other.
    fn judge(&mut self, container: &Container, file: LayerFile, verdict: Verdict) {
        self.order(SensorCommand::Judged { container: container.id.clone(), file, verdict });
        self.walk(container);
    }

    /// Looks through what was told, and what is told from now on.
    #[track_caller]
    fn until<T>(&mut self, what: &str, mut look: impl FnMut(&SensorEvent) -> Option<T>) -> T {
        if let Some(found) = self.told.iter().find_map(&mut look) {
            return found;
        }
        let deadline = Instant::now() + patience();
        loop {
            let Ok(report) = self.reports.recv_deadline(deadline).map(|report| *report) else {
                let told: Vec<String> = self.told.iter().map(summary).collect();
                panic!("waited in vain for {what}; told: {told:#?}");
            };
            let found = look(&report);
            self.told.push(report);
            if let Some(found) = found {
                return found;
            }
        }
    }

    #[track_caller]
    fn until_observed<T>(
        &mut self,
        what: &str,
        mut look: impl FnMut(&Observation) -> Option<T>,
    ) -> T {
        self.until(what, |report| match report {
            SensorEvent::Observed(observation) => look(observation),
            _ => None,
        })
    }

    #[track_caller]
    fn until_executed(&mut self, wanted: &RootfsPath) -> Executed {
        self.until_observed(&format!("{wanted} to be executed"), |observation| {
            match &observation.fact {
                Fact::Executed { path, state, process, invoked_as, .. } if path == wanted => {
                    Some(Executed {
                        state: state.clone(),
                        process: process.clone(),
                        invoked_as: invoked_as.clone(),
                    })
                }
                _ => None,
            }
        })
    }

    fn executed_paths(&self) -> Vec<String> {
        self.told
            .iter()
            .filter_map(|report| match report {
                SensorEvent::Observed(Observation {
                    fact: Fact::Executed { path, .. }, ..
                }) => Some(path.to_string()),
                _ => None,
            })
            .collect()
    }

    /// Orders a walk: what the upperdir holds, and what it hides.
    #[track_caller]
    fn walk(&mut self, container: &Container) -> Upper {
        self.next_ticket += 1;
        let ticket = Some(self.next_ticket);
        self.order(SensorCommand::Scan { container: container.id.clone(), ticket });
        let complete = self.until("the walk to end", |report| match report {
            SensorEvent::Scanned { ticket: this, complete, .. } if *this == ticket => {
                Some(*complete)
            }
            _ => None,
        });
        let mut upper = Upper { complete, ..Upper::default() };
        for report in &self.told {
            if let SensorEvent::ScanBatch { ticket: this, observations, .. } = report
                && *this == ticket
            {
                observations.iter().for_each(|observation| upper.take(observation));
            }
        }
        upper
    }

    /// Waits for walks without a ticket until one has found something.
    #[track_caller]
    fn unordered_walk(&mut self, id: &ContainerId) -> Upper {
        let mut upper = Upper::default();
        self.until("a walk", |report| match report {
            SensorEvent::ScanBatch { container, ticket: None, observations } if container == id => {
                observations.iter().for_each(|observation| upper.take(observation));
                None
            }
            SensorEvent::Scanned { container, ticket: None, .. } if container == id => {
                (!upper.present.is_empty()).then_some(())
            }
            _ => None,
        });
        upper
    }

    #[track_caller]
    fn assert_no_loss(&self) {
        assert_eq!(self.health.losses(), []);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(watch) = self.watch.take() {
            watch.stop();
        }
    }
}

/// A report in a line. Without the processes: their ancestors are the machine's.
fn summary(report: &SensorEvent) -> String {
    let fact = |fact: &Fact| match fact {
        Fact::Executed { path, invoked_as, .. } => format!("executed {path} as {invoked_as:?}"),
        Fact::Loaded { path, .. } => format!("loaded {path}"),
        Fact::Interpreted { script, .. } => format!("interpreted {script:?}"),
        Fact::ReverseShell { evidence, .. } => format!("reverse shell: {evidence}"),
        Fact::Present { path, state, lower, writer } => {
            let (lower, writer) = (lower.is_some(), writer.is_some());
            format!("present {path} {state:?} lower={lower} writer={writer}")
        }
        Fact::Absent { path, .. } => format!("absent {path}"),
        Fact::SessionOpened { opening } => format!("session {:?}", opening.process.argv),
        Fact::SessionRan { run, .. } => format!("ran {:?}", run.argv),
        Fact::SessionRanMore { .. } => "ran more".to_owned(),
        Fact::SessionInteractive { .. } => "interactive".to_owned(),
        Fact::SessionProcessEnded { .. } => "ended".to_owned(),
        Fact::PackageManager { process } => format!("package manager {:?}", process.argv),
    };
    match report {
        SensorEvent::Observed(observation) => fact(&observation.fact),
        SensorEvent::ScanBatch { ticket, observations, .. } => {
            let facts: Vec<String> = observations.iter().map(|seen| fact(&seen.fact)).collect();
            format!("batch {ticket:?} {facts:?}")
        }
        SensorEvent::Attached { .. }
        | SensorEvent::NotAttached { .. }
        | SensorEvent::Unarmed { .. }
        | SensorEvent::Scanned { .. }
        | SensorEvent::Compared { .. }
        | SensorEvent::Over { .. }
        | SensorEvent::Lost { .. } => format!("{report:?}"),
    }
}

struct Executed {
    state: FileState,
    process: Arc<Process>,
    invoked_as: Option<String>,
}

/// What a walk told.
#[derive(Default)]
struct Upper {
    present: BTreeMap<RootfsPath, FileState>,
    absent: BTreeSet<String>,
    same_as_image: Vec<String>,
    complete: bool,
}

impl Upper {
    fn take(&mut self, observation: &Observation) {
        match &observation.fact {
            Fact::Present { path, state, lower, .. } => {
                if lower.is_some_and(|lower| Some(lower.blake3) == state.blake3()) {
                    self.same_as_image.push(path.to_string());
                    self.same_as_image.sort();
                }
                self.present.insert(path.clone(), state.clone());
            }
            Fact::Absent { path, .. } => {
                self.absent.insert(path.to_string());
            }
            other @ (Fact::Executed { .. }
            | Fact::Loaded { .. }
            | Fact::Interpreted { .. }
            | Fact::ReverseShell { .. }
            | Fact::SessionOpened { .. }
            | Fact::SessionRan { .. }
            | Fact::SessionRanMore { .. }
            | Fact::SessionInteractive { .. }
            | Fact::SessionProcessEnded { .. }
            | Fact::PackageManager { .. }) => panic!("a walk told {other:?}"),
        }
    }

    fn names(&self) -> Vec<String> {
        self.present.keys().map(ToString::to_string).collect()
    }

    fn hidden(&self) -> Vec<&str> {
        self.absent.iter().map(String::as_str).collect()
    }

    #[track_caller]
    fn get(&self, wanted: &str) -> &FileState {
        self.present.get(&path(wanted)).unwrap_or_else(|| panic!("no {wanted}: {:?}", self.names()))
    }
}

#[test]
fn a_dropped_program_is_seen_with_its_path_and_hash_and_the_image_is_silent() {
    let container = Container::start();
    let mut node = Node::start();
    assert!(!node.attach(&container), "its entry point has long been running");
    let blake3 = container.drop_program("/tmp/true");
    container.shell("/bin/true; /bin/cat /etc/config; /tmp/true an argument; /bin/true");
    let Executed { state, .. } = node.until_executed(&path("/tmp/true"));
    assert_eq!(state.blake3(), Some(blake3));
    assert_eq!((state.format, state.mode, state.deleted), (Format::Elf, 0o755, false));
    let blake3 = container.drop_program("/tmp/sleep");
    // Long enough that it is there to be described, however late that is.
    container.shell("/tmp/sleep 2");
    let Executed { state, process, invoked_as } = node.until_executed(&path("/tmp/sleep"));
    assert_eq!(state.blake3(), Some(blake3));
    assert_eq!((invoked_as, process.uid), (None, Some(0)));
    // The shell is outside already, being in the host's mount namespace.
    assert_eq!(process.ancestors.len(), 1);
    assert_eq!(node.executed_paths(), ["/tmp/true", "/tmp/sleep"], "the image's own are silent");
    node.assert_no_loss();
}

#[test]
fn a38_a_layer_changed_before_its_container_was_made_is_told_when_executed() {
    let change = |lower: &Path| flip_a_byte(&lower.join("bin/true"));
    let container = Container::of_image(change, &[], "", false);
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    let (file, blake3) = node.findings_of_container(&container, "/bin/true").unwrap();
    assert_eq!(blake3, hash_of(container.lower().join("bin/true")));
    assert_ne!(blake3, hash_of(BUSYBOX));
    assert_eq!(file.changed, changed(&container.lower().join("bin/true")));
    assert_eq!(node.findings_of_container(&container, "/opt/tool/true"), None, "it was left alone");
    // Drift is told as often as it runs.
    node.judge(&container, file, Verdict::Drift);
    assert_eq!(node.findings_of_container(&container, "/bin/true"), Some((file, blake3)));
    // It is not in the upper layer, and no walk says so.
    assert_eq!(node.walk(&container).names(), ["/tmp/true"]);
    node.assert_no_loss();
}

#[test]
fn a38_a_layer_changed_under_a_running_container_is_told_when_executed() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    assert_eq!(node.findings_of_container(&container, "/bin/true"), None);
    flip_a_byte(&container.lower().join("bin/true"));
    let (_, blake3) = node.findings_of_container(&container, "/bin/true").unwrap();
    assert_eq!(blake3, hash_of(container.lower().join("bin/true")));
    assert_eq!(node.walk(&container).names(), ["/tmp/true"]);
    node.assert_no_loss();
}

#[test]
fn a_layers_file_that_was_touched_and_not_changed_is_hashed_once() {
    let change = |lower: &Path| {
        let program = lower.join("bin/true");
        fs::set_permissions(&program, fs::metadata(&program).unwrap().permissions()).unwrap();
    };
    let container = Container::of_image(change, &[], "", false);
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    let told = node.findings_of_container(&container, "/bin/true").unwrap();
    assert_eq!(told.1, hash_of(BUSYBOX));
    assert_eq!(node.findings_of_container(&container, "/bin/true"), None, "its judgement is not there yet");
    // As long as the touch may not be the last within its tick of the clock, a
    // judgement does not count for long.
    wait_for("the judgement to stay", || {
        node.judge(&container, told.0, Verdict::Image);
        match node.findings_of_container(&container, "/bin/true") {
            Some(again) => {
                assert_eq!(again, told);
                None
            }
            None => {
                node.judge(&container, told.0, Verdict::Image);
                node.findings_of_container(&container, "/bin/true").is_none().then_some(())
            }
        }
    });
    // With another baseline, or another time, it counts no more.
    node.order(SensorCommand::Trust { container: container.id.clone(), trust: Trust::Unknown });
    node.walk(&container);
    assert_eq!(node.findings_of_container(&container, "/bin/true"), Some(told));
    node.assert_no_loss();
}

#[test]
fn while_a_baseline_may_come_every_program_of_the_image_is_told_once() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach_with(&container, Trust::Unknown);
    container.drop_program("/tmp/true");
    assert_eq!(node.findings_of_container(&container, "/bin/true").map(|told| told.1), Some(hash_of(BUSYBOX)));
    assert_eq!(node.findings_of_container(&container, "/bin/true"), None);
    node.assert_no_loss();
}

#[test]
fn without_a_baseline_no_program_of_the_image_is_told() {
    let change = |lower: &Path| flip_a_byte(&lower.join("bin/true"));
    let container = Container::of_image(change, &[], "", false);
    let mut node = Node::start();
    node.attach_with(&container, Trust::NoBaseline);
    container.drop_program("/tmp/true");
    assert_eq!(node.findings_of_container(&container, "/bin/true"), None);
    node.assert_no_loss();
}

#[test]
fn the_arguments_told_are_the_new_programs_and_not_its_callers() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/busybox");
    for name in ["sh", "sleep"] {
        symlink("busybox", container.merged().join("tmp").join(name)).unwrap();
    }
    // The caller is the same file: only the arguments differ.
    let child = container.command(&["/tmp/sh", "-c", "exec /tmp/sleep 30"]).spawn().unwrap();
    let child = Family(child);
    let (process, invoked_as) =
        node.until_observed("the second program", |observation| match &observation.fact {
            Fact::Executed { process, invoked_as, .. }
                if invoked_as.as_deref() == Some("/tmp/sleep") =>
            {
                Some((process.clone(), invoked_as.clone()))
            }
            _ => None,
        });
    assert_eq!(process.argv, Some(vec!["/tmp/sleep".into(), "30".into()]));
    assert!(process.exe.as_deref().is_some_and(|exe| exe.ends_with("/tmp/busybox")));
    assert_eq!(process.identity.pid, child.0.id());
    assert_eq!(invoked_as.as_deref(), Some("/tmp/sleep"));
    // The first may be described after the second has begun: then both say so.
    let mut executions = 0;
    node.until_observed("both executions", |observation| {
        executions += u32::from(matches!(observation.fact, Fact::Executed { .. }));
        (executions == 2).then_some(())
    });
    assert_eq!(node.executed_paths(), ["/tmp/busybox", "/tmp/busybox"]);
    node.assert_no_loss();
}

#[test]
fn a_script_is_told_by_its_own_path_and_with_its_interpreters_arguments() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    let script = container.merged().join("tmp/script");
    executable::write(&script, b"#!/bin/sh\nexec /bin/sleep 30\n").unwrap();
    let _child = Family(container.command(&["/tmp/script", "now"]).spawn().unwrap());
    let executed = node.until_executed(&path("/tmp/script"));
    assert_eq!(executed.state.format, Format::Script);
    assert_eq!(executed.state.blake3(), Some(hash_of(&script)));
    assert_eq!(node.executed_paths(), ["/tmp/script"]);
}

#[test]
fn a_thousand_executions_are_all_counted() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    let blake3 = container.drop_program("/tmp/true");
    container.shell("i=0; while [ $i -lt 1000 ]; do /tmp/true; i=$((i+1)); done");
    let mut executed = 0;
    node.until_observed("a thousand executions", |observation| match &observation.fact {
        Fact::Executed { path, state, .. } => {
            assert_eq!((path.to_string().as_str(), state.blake3()), ("/tmp/true", Some(blake3)));
            // Where many wait, those of one file and one parent are reported as one.
            executed += observation.times();
            assert!(executed <= 1000, "{executed} of 1000 executions");
            (executed == 1000).then_some(())
        }
        _ => None,
    });
    node.assert_no_loss();
    assert!(node.health.gate_answers() >= 1000);
}

/// An environment with which what execve(2) writes on the stack begins just below a
/// page's end. On x86-64 a page that nothing has been written to may lie between the
/// arguments and the stack pointer, and no copy of the stack goes beyond: the more
/// often, the less of its page is left by the arguments, the environment and the name.
fn environment(words: &[&str]) -> Vec<(&'static str, String)> {
    const PAGE: usize = 4096;
    let search = std::env::var("PATH").unwrap();
    let length = |text: &str| text.len() + 1;
    let used = words.iter().map(|word| length(word)).sum::<usize>()
        + length(words[0])
        + length("PATH=") + search.len()
        + length("FILL=")
        // Behind the name of the program.
        + size_of::<u64>();
    let filler = (2 * PAGE + 1).checked_sub(used).expect("a short PATH");
    vec![("PATH", search), ("FILL", "x".repeat(filler % PAGE))]
}

#[test]
fn programs_that_end_at_once_are_told_with_their_arguments() {
    // Fewer at a time than wait without being counted as one.
    const TURN: usize = 40;
    const TURNS: usize = 25;
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    let mut told = 0;
    for turn in 0..TURNS {
        let mut expected = BTreeMap::new();
        for number in 0..TURN {
            let number = format!("{:04}", turn * TURN + number);
            let words = ["/tmp/true", "", "number", &number];
            let mut command = container.command(&words);
            let mut child = command.env_clear().envs(environment(&words)).spawn().unwrap();
            expected.insert(child.id(), words.map(str::to_owned).to_vec());
            assert!(child.wait().unwrap().success());
        }
        node.told.clear();
        let mut seen = 0;
        node.until_observed("all executions", |observation| match &observation.fact {
            Fact::Executed { process, .. } => {
                if let Some(argv) = &process.argv {
                    assert_eq!(*argv, expected[&process.identity.pid]);
                    told += 1;
                }
                seen += 1;
                (seen == TURN).then_some(())
            }
            _ => None,
        });
    }
    let count = TURNS * TURN;
    eprintln!("{told} of {count} were told with their arguments");
    let least = if is_emulated() { count / 2 } else { count * 97 / 100 };
    assert!(told >= least, "{told} of {count}");
    node.assert_no_loss();
}

/// Runs programs in every way that leaves no name behind.
fn compile_loader(directory: &Path) -> PathBuf {
    let (source, program) = (directory.join("loader.c"), directory.join("loader"));
    fs::write(&source, include_str!("data/loader.c")).unwrap();
    run(&[
        OsStr::new("gcc"),
        "-static".as_ref(),
        "-Os".as_ref(),
        "-o".as_ref(),
        program.as_ref(),
        source.as_ref(),
    ]);
    program
}

#[test]
fn a10_a_thousand_memfds_are_a_thousand_observations() {
    let (container, mut node) = with_loader();
    // It runs for less than a millisecond.
    container.inside("/tmp/loader memfd 1000 /tmp/loader exit");
    let (mut hashed, mut with_arguments) = (0, 0);
    let wanted = path("/memfd:a");
    let expected = hash_of(container.merged().join("tmp/loader"));
    let deadline = Instant::now() + 4 * PATIENCE;
    let mut count = 0;
    while count < 1000 {
        let Ok(report) = node.reports.recv_deadline(deadline) else {
            // Emulated processors do not quite agree on the time, by which the records
            // of several are put in order.
            assert!(is_emulated() && count >= 990, "{count} of 1000, {hashed} hashed");
            break;
        };
        let report = *report;
        if let SensorEvent::Observed(Observation {
            source,
            fact: Fact::Executed { path, filesystem, state, running, process, .. },
            ..
        }) = &report
            && *path == wanted
        {
            if let Some(argv) = &process.argv {
                assert_eq!(*argv, ["a", "exit"]);
                with_arguments += 1;
            }
            assert_eq!(
                (*source, *filesystem, *running, state.deleted),
                (Source::Trace, Filesystem::Anonymous, false, true)
            );
            match state.content {
                Content::Hashed { blake3, .. } => {
                    assert_eq!(blake3, expected);
                    hashed += 1;
                }
                Content::Unhashed(why) => assert_eq!(why, Unhashed::Gone),
            }
            count += 1;
        }
        node.told.push(report);
    }
    eprintln!("{hashed} of {count} memfds were hashed, {with_arguments} have arguments");
    // How many it is, the length of the environment decides.
    assert!(with_arguments > count / 4, "{with_arguments} of {count}");
    node.walk(&container);
    let told = node.executed_paths();
    assert_eq!(told.iter().filter(|path| *path == "/memfd:a").count(), count);
    node.assert_no_loss();
}

/// A container with a dropped loader, and a node that watches it.
fn with_loader() -> (Container, Node) {
    let container = Container::start();
    let loader = compile_loader(container.dir.path());
    let mut node = Node::start();
    node.attach(&container);
    let program = fs::read(&loader).unwrap();
    executable::write(&container.merged().join("tmp/loader"), &program).unwrap();
    (container, node)
}

/// Starts a loader whose execve waits for an argument, until a line is written to it.
fn begin_late(loader: &mut Command) -> (Family, ChildStdin) {
    let mut loader = loader.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let go_on = loader.stdin.take().unwrap();
    let mut said = [0; 6];
    loader.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"asked\n");
    (Family(loader), go_on)
}

impl Container {
    /// What the loader prints.
    #[track_caller]
    fn loader(&self, arguments: &[&str]) -> String {
        let output = self.command(&[&["/tmp/loader"], arguments].concat()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Node {
    /// How often a program was executed, of those before another one that is executed now.
    #[track_caller]
    fn times_of(&mut self, container: &Container, program: &str) -> usize {
        container.drop_program("/tmp/true");
        container.shell("/tmp/true");
        self.until_executed(&path("/tmp/true"));
        self.executed_paths().iter().filter(|path| *path == program).count()
    }
}

#[test]
fn d04_a_program_that_is_only_checked_is_a_new_file_and_no_execution() {
    let (container, mut node) = with_loader();
    for name in ["/tmp/checked", "/tmp/script"] {
        container.drop_program(name);
    }
    executable::write(&container.merged().join("tmp/script"), b"#!/bin/sh\nexit 0\n").unwrap();
    let has_check = kernel_version() >= (6, 14);
    let expected = if has_check { "0" } else { "22" };
    assert_eq!(container.loader(&["check", "/tmp/checked"]), expected);
    assert_eq!(container.loader(&["check", "/tmp/script"]), expected);
    assert_eq!(node.times_of(&container, "/tmp/checked"), 0);
    assert_eq!(node.times_of(&container, "/tmp/script"), 0);
    node.until_present("/tmp/checked", |state| state.mode == 0o755);
    node.until_present("/tmp/script", |state| state.mode == 0o755);
    // What was checked before is executed now.
    container.shell("/tmp/checked true; /tmp/script");
    node.until_executed(&path("/tmp/checked"));
    node.until_executed(&path("/tmp/script"));
    node.assert_no_loss();
}

#[test]
fn d04_a_program_that_the_kernel_does_not_run_is_a_new_file_and_no_execution() {
    let (container, mut node) = with_loader();
    let mut program = fs::read(BUSYBOX).unwrap();
    // e_machine: none.
    program[18..20].copy_from_slice(&[0, 0]);
    executable::write(&container.merged().join("tmp/foreign"), &program).unwrap();
    executable::write(&container.merged().join("tmp/script"), b"#!/none\n").unwrap();
    assert_eq!(container.loader(&["try", "/tmp/foreign"]), libc::ENOEXEC.to_string());
    assert_eq!(container.loader(&["try", "/tmp/script"]), libc::ENOENT.to_string());
    assert_eq!(node.times_of(&container, "/tmp/foreign"), 0);
    assert_eq!(node.times_of(&container, "/tmp/script"), 0);
    node.until_present("/tmp/foreign", |state| state.mode == 0o755);
    node.assert_no_loss();
}

#[test]
fn d04_an_execve_that_takes_its_time_is_reported_also_when_the_first_thread_has_ended() {
    let (container, mut node) = with_loader();
    container.drop_program("/tmp/sleep");
    let mut loader = container.command(&["/tmp/loader", "late-thread", "/tmp/sleep"]);
    let (_loader, mut go_on) = begin_late(&mut loader);
    // Longer than what waits for a record that is not read.
    std::thread::sleep(Duration::from_millis(1500));
    go_on.write_all(b"\n").unwrap();
    let executed = node.until_executed(&path("/tmp/sleep"));
    assert_eq!(executed.state.blake3(), Some(hash_of(container.merged().join("tmp/sleep"))));
    assert_eq!(executed.invoked_as.as_deref(), None);
    node.assert_no_loss();
}

/// Processor time of fork and exec with and without the rings, which is nearly the
/// same on a busy machine. Prints what it found.
#[test]
#[ignore = "measures, and takes a minute"]
fn what_the_rings_cost_an_execve() {
    use nix::sys::resource::{UsageWho, getrusage};
    use nix::sys::time::TimeValLike as _;
    const ROUNDS: usize = 20;
    const EXECUTIONS: i32 = 1000;
    let directory = tempfile::tempdir().unwrap();
    let loader = compile_loader(directory.path());
    let used = || {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
        usage.user_time().num_microseconds() + usage.system_time().num_microseconds()
    };
    let round = || {
        let before = used();
        let mut command = Command::new(&loader);
        command.args(["memfd", &EXECUTIONS.to_string()]).arg(&loader).arg("exit");
        assert!(command.status().unwrap().success());
        (used() - before) / i64::from(EXECUTIONS)
    };
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        without.push(round());
        let node = Node::start();
        with.push(round());
        drop(node);
    }
    for (name, times) in [("without", &mut without), ("with", &mut with)] {
        times.sort_unstable();
        eprintln!("{name}: min {} median {} us of processor time", times[0], times[ROUNDS / 2]);
    }
}

#[test]
fn what_changes_no_content_is_present_with_the_images_content() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.shell(
        "chmod 700 /bin/true; touch /bin/busybox; exec 3<>/opt/tool/true; exec 3>&-; \
         cp /etc/config /tmp/config; cat /tmp/config > /etc/config",
    );
    let upper = node.walk(&container);
    assert_eq!(
        upper.names(),
        ["/bin/busybox", "/bin/true", "/etc/config", "/opt/tool/true", "/tmp/config"]
    );
    assert_eq!(upper.same_as_image, ["/bin/busybox", "/bin/true", "/opt/tool/true"]);
    assert_eq!(upper.get("/bin/true").mode, 0o700);
    assert_eq!(upper.get("/tmp/config").content, Content::Unhashed(Unhashed::NotAProgram));
    assert!(upper.complete && upper.absent.is_empty());
    let again = node.walk(&container);
    assert_eq!(again.present, upper.present);
    node.assert_no_loss();
}

#[test]
fn what_the_overlay_hides_is_absent() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.shell(
        "mv /bin/true /tmp/moved; rm -r /opt/tool; mkdir /opt/tool; \
         cat /bin/busybox > /opt/tool/new; rm /etc/config; mkdir /etc/config",
    );
    let upper = node.walk(&container);
    assert_eq!(upper.names(), ["/opt/tool/new", "/tmp/moved"]);
    assert_eq!(upper.hidden(), ["/bin/true", "/etc/config", "/opt/tool/readme", "/opt/tool/true"]);
    assert_eq!(upper.get("/tmp/moved").blake3(), Some(hash_of(BUSYBOX)));
    assert!(upper.complete);
    node.assert_no_loss();
}

#[test]
fn hostile_files_neither_hang_nor_mislead_a_walk() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.shell("chmod 755 /tmp");
    let tmp = container.upper().join("tmp");
    nix::unistd::mkfifo(&tmp.join("ls"), nix::sys::stat::Mode::from_bits_truncate(0o755)).unwrap();
    symlink("/", tmp.join("root")).unwrap();
    symlink("root", tmp.join("loop")).unwrap();
    let mut sparse = fs::File::create(tmp.join("sparse")).unwrap();
    sparse.write_all(b"#!/bin/sh\n").unwrap();
    sparse.set_len(10 << 30).unwrap();
    sparse.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(tmp.join(OsStr::from_bytes(b"\xff\x1b[2J")), "\x7fELF").unwrap();
    let upper = node.walk(&container);
    assert_eq!(
        upper.names(),
        ["/tmp/loop", "/tmp/ls", "/tmp/root", "/tmp/sparse", "/tmp/\\xff\\u{1b}[2J"]
    );
    assert_eq!(upper.get("/tmp/ls").file_type, FileType::Fifo);
    assert_eq!(upper.get("/tmp/root").file_type, FileType::Symlink);
    assert_eq!(upper.get("/tmp/sparse").content, Content::Unhashed(Unhashed::Size));
    assert!(upper.complete);
    node.assert_no_loss();
}

#[test]
fn a_name_that_is_not_utf8_is_executed_and_told_whole() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    let name = OsStr::from_bytes(b"/tmp/ev\xffil (deleted)");
    let target = container.merged().join(OsStr::from_bytes(&name.as_bytes()[1..]));
    executable::write(&target, &fs::read(BUSYBOX).unwrap()).unwrap();
    // busybox knows no such applet, but it has been executed by then.
    container.command(&[]).arg(name).output().unwrap();
    let executed = node.until_executed(&RootfsPath::new(name.as_bytes()).unwrap());
    assert!(!executed.state.deleted);
    node.assert_no_loss();
}

#[test]
fn a_deleted_program_is_told_as_deleted() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    let blake3 = container.drop_program("/tmp/program");
    let name = container.merged().join("tmp/program");
    let file = fs::File::open(&name).unwrap();
    fs::remove_file(&name).unwrap();
    let open = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    Command::new(open).output().unwrap();
    let executed = node.until_executed(&path("/tmp/program"));
    assert_eq!((executed.state.deleted, executed.state.blake3()), (true, Some(blake3)));
}

#[test]
fn a_program_reached_through_a_bind_mount_is_told_by_its_own_path() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    let script = "mount --bind \"$0/tmp\" \"$0/mnt\" && chroot \"$0\" /mnt/true; sleep 1";
    run(&[
        OsStr::new("unshare"),
        "--mount".as_ref(),
        "sh".as_ref(),
        "-c".as_ref(),
        script.as_ref(),
        container.merged().as_ref(),
    ]);
    let told = node.until_observed("the program", |observation| match &observation.fact {
        Fact::Executed { path, .. } => Some(path.to_string()),
        _ => None,
    });
    assert_eq!(told, "/tmp/true");
}

/// A container with a mount namespace of its own, and a pid namespace by which its
/// processes are known.
fn container_with_mounts() -> Container {
    Container::with(&["unshare", "--mount", "--pid", "--fork"], "", false)
}

impl Container {
    /// A command in the container's namespaces, its root still the host's.
    fn beside(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--target", &self.pid.to_string()]).args(words);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a script in the container's namespaces, below its root.
    #[track_caller]
    fn inside(&self, script: &str) {
        let merged = self.merged();
        let words = ["chroot", merged.to_str().unwrap(), "/bin/sh", "-c", script];
        let output = self.beside(&words).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{script}` failed: {stderr}");
    }

    /// Mounts a tmpfs where only the container sees it.
    #[track_caller]
    fn mount_tmpfs(&self, at: &str) {
        let point = self.merged().join(at.trim_start_matches('/'));
        let words = ["mount", "-t", "tmpfs", "none", point.to_str().unwrap()];
        let output = self.beside(&words).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Node {
    fn with_notifier(notifier: Notifier) -> Node {
        let (sender, reports) = bounded(64 * 1024);
        let health = Arc::new(Health::default());
        let watch = Watch::start_with(
            &settings(),
            sender,
            health.clone(),
            start_gate(&settings()),
            notifier,
        )
        .unwrap_or_else(|err| panic!("the watchers cannot start: {err}"));
        Node { watch: Some(watch), reports, told: Vec::new(), health, next_ticket: 0 }
    }

    fn executed_elsewhere(&self) -> Vec<(String, Filesystem)> {
        self.told
            .iter()
            .filter_map(|report| match report {
                SensorEvent::Observed(Observation {
                    fact: Fact::Executed { path, filesystem, .. },
                    ..
                }) if *filesystem != Filesystem::Overlay => Some((path.to_string(), *filesystem)),
                _ => None,
            })
            .collect()
    }
}

#[test]
fn a11_a_program_on_a_tmpfs_is_told_as_the_container_sees_it() {
    let container = container_with_mounts();
    container.mount_tmpfs("/mnt");
    let mut node = Node::start();
    node.attach(&container);
    container.inside("cp /bin/busybox /mnt/true; echo >> /mnt/true; /mnt/true");
    node.until_executed(&path("/mnt/true"));
    // In a mount namespace of its own, and under another root, it is the same file.
    let words = ["unshare", "--mount", "chroot"];
    let mnt = container.merged().join("mnt");
    let words = [&words[..], &[mnt.to_str().unwrap(), "/true"]].concat();
    assert!(container.beside(&words).status().unwrap().success());
    // Deleted, with a name that says so falsely.
    container.inside(
        "cd /mnt; mv true 'true (deleted)'; './true (deleted)'\n\
         exec 7< './true (deleted)'; rm './true (deleted)'; /proc/self/fd/7 2>/dev/null || true",
    );
    node.until_executed(&path("/mnt/true (deleted)"));
    let told = node.executed_elsewhere();
    let expected = ["/mnt/true", "/mnt/true", "/mnt/true (deleted)"];
    assert_eq!(told[..3], expected.map(|path| (path.to_string(), Filesystem::Tmpfs)));
    node.assert_no_loss();
}

#[test]
fn a12_a_mount_made_later_is_marked_at_once_however_the_kernel_tells_of_it() {
    let best = Notifier::new();
    assert_eq!(best.is_polling(), kernel_version() < (6, 14), "on {}", kernel_release());
    for notifier in [best, Notifier::polling()] {
        let mut container = container_with_mounts();
        let mut node = Node::with_notifier(notifier);
        node.attach(&container);
        for round in 0..20 {
            container.mount_tmpfs("/mnt");
            // As long as the commands take that every program needs to get there.
            let program = format!("/mnt/true{round}");
            container.inside(&format!("cp /bin/busybox {program}; ln -s {program} /tmp/true"));
            container.inside("/tmp/true && rm /tmp/true");
            node.until_executed(&path(&program));
            let point = container.merged().join("mnt");
            let words = ["umount", point.to_str().unwrap()];
            assert!(container.beside(&words).status().unwrap().success(), "the volume is busy");
        }
        let told = node.executed_elsewhere();
        assert_eq!(told.len(), 20, "{told:#?}");
        node.assert_no_loss();
        // Nothing of it is kept.
        container.kill_init();
        container.unmount();
        node.order(SensorCommand::Detach { container: container.id.clone(), pid: None });
    }
}

#[test]
fn a_change_of_mounts_is_told_within_milliseconds_either_way() {
    for (name, notifier) in [("events", Notifier::new()), ("polling", Notifier::polling())] {
        let container = container_with_mounts();
        let init = procfs::Handle::open(container.pid).unwrap();
        let listener = notifier.listen(&init).unwrap();
        let mut buffer = Buffer::new();
        let mut delays = Vec::new();
        for _ in 0..20 {
            let point = container.merged().join("mnt");
            let mut mount = container.beside(&[
                "sh",
                "-c",
                &format!("mount -t tmpfs none {}; date +%s%N", point.display()),
            ]);
            let mount = mount.stdout(Stdio::piped()).spawn().unwrap();
            let seen = {
                let fds = listener.poll_fds();
                let mut fds: Vec<rustix::event::PollFd<'_>> = match fds {
                    Some(fds) => fds.into(),
                    None => notifier
                        .group()
                        .into_iter()
                        .map(|fd| {
                            rustix::event::PollFd::from_borrowed_fd(
                                fd,
                                rustix::event::PollFlags::IN,
                            )
                        })
                        .collect(),
                };
                let timeout = rustix::event::Timespec::try_from(PATIENCE).unwrap();
                assert_ne!(rustix::event::poll(&mut fds, Some(&timeout)).unwrap(), 0, "{name}");
                jiff::Timestamp::now().as_nanosecond()
            };
            let output = mount.wait_with_output().unwrap();
            let done: i128 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
            delays.push((seen - done) / 1000);
            notifier.take(&mut buffer);
            // What the listener says of the unmounting is taken with it.
            assert!(
                container.beside(&["umount", point.to_str().unwrap()]).status().unwrap().success()
            );
            std::thread::sleep(Duration::from_millis(5));
            notifier.take(&mut buffer);
            if let Some(mut fds) = listener.poll_fds() {
                let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
                let _ = rustix::event::poll(&mut fds, Some(&now));
            }
        }
        delays.sort_unstable();
        // Before the command that mounted had ended, as often as not.
        eprintln!("{name}: seen so many microseconds after mount(8) had ended: {delays:?}");
        assert!(delays[10] < 50_000, "{name}: {delays:?}");
    }
}

#[test]
fn a_filesystem_that_a_process_answers_for_is_not_touched() {
    let container = container_with_mounts();
    // A FUSE mount whose server never answers: whoever asks it anything waits.
    let device =
        fs::File::options().read(true).write(true).open("/dev/fuse").unwrap_or_else(|err| {
            panic!("this kernel must have FUSE: {err}");
        });
    let mut node = Node::start();
    node.attach(&container);
    let point = container.merged().join("mnt");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let mut mount = Command::new("nsenter");
    mount.args(["--mount", "--target", &container.pid.to_string(), "mount", "-i", "-t", "fuse"]);
    mount.args(["-o", &options, "silent"]).arg(&point).stdin(Stdio::null());
    // Whoever mounts must have it under the same number.
    rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::empty()).unwrap();
    assert!(mount.status().unwrap().success(), "FUSE cannot be mounted");
    // A tmpfs below it, and one beside it that is to be marked all the same.
    container.shell("mkdir /opt/beside");
    container.mount_tmpfs("/opt/beside");
    container.inside("cp /bin/busybox /opt/beside/true; /opt/beside/true");
    node.until_executed(&path("/opt/beside/true"));
    container.drop_program("/tmp/true");
    container.inside("/tmp/true");
    node.until_executed(&path("/tmp/true"));
    node.assert_no_loss();
    drop(device);
}

#[test]
fn a_storm_of_mounts_is_bounded_and_named_once() {
    let container = container_with_mounts();
    let mut node = Node::start();
    node.attach(&container);
    let merged = container.merged();
    let storm = format!(
        "cd {}; mkdir tmp/m; i=0; while [ $i -lt 400 ]; do mkdir tmp/m/$i; mount -t tmpfs none tmp/m/$i; i=$((i+1)); done",
        merged.display()
    );
    assert!(container.beside(&["busybox", "sh", "-c", &storm]).status().unwrap().success());
    node.until("the storm to be told", |report| match report {
        SensorEvent::Lost { failure: Failure::MountsFull, .. } => Some(()),
        _ => None,
    });
    // The gate is as quick as ever.
    container.drop_program("/tmp/true");
    container.inside("/tmp/true");
    node.until_executed(&path("/tmp/true"));
    // The last ones are not marked, the first ones are.
    container.inside("cp /bin/busybox /tmp/m/7/true; /tmp/m/7/true");
    node.until_executed(&path("/tmp/m/7/true"));
    let told = node
        .told
        .iter()
        .filter(|report| matches!(report, SensorEvent::Lost { failure: Failure::MountsFull, .. }));
    assert_eq!(told.count(), 1);
}

#[test]
fn binding_its_own_root_again_and_again_costs_a_container_and_not_driftd() {
    let container = container_with_mounts();
    let mut node = Node::start();
    node.attach(&container);
    let storm = format!(
        "cd {}; i=0; while [ $i -lt 2000 ]; do mount -o bind . mnt; i=$((i+1)); done",
        container.merged().display()
    );
    let before = thread_time("mounts");
    let start = Instant::now();
    assert!(container.beside(&["busybox", "sh", "-c", &storm]).status().unwrap().success());
    let took = start.elapsed();
    let cost = thread_time("mounts") - before;
    eprintln!("2,000 mounts in {took:?} cost the mounts thread {cost:?}");
    assert!(cost < took / 5, "it cost {cost:?} of {took:?}");
    container.drop_program("/tmp/true");
    container.inside("/tmp/true");
    node.until_executed(&path("/tmp/true"));
    node.assert_no_loss();
}

impl Node {
    fn listings(&self, container: &Container) -> u64 {
        let listings = self.watch.as_ref().unwrap().listings_of_mounts(&container.id);
        listings.expect("its mounts are followed")
    }

    #[track_caller]
    fn until_listed(&self, container: &Container, at_least: u64) {
        let listed = || (self.listings(container) >= at_least).then_some(());
        wait_for("its mounts to be listed", listed);
    }

    /// Runs a program of its own from a directory of the container.
    #[track_caller]
    fn until_seen_in(&mut self, container: &Container, directory: &str) {
        let program = format!("{directory}/true");
        container.inside(&format!("cp /bin/busybox {program}; echo >> {program}; {program}"));
        self.until_executed(&path(&program));
    }
}

#[test]
fn x14_a_change_of_mounts_is_the_one_containers_and_no_others() {
    let (first, second) = (container_with_mounts(), container_with_mounts());
    let mut node = Node::start();
    node.attach(&first);
    node.attach(&second);
    first.shell("mkdir /tmp/there");
    let [from, to] = ["mnt", "tmp/there"].map(|at| first.merged().join(at));
    let change = |node: &Node, words: &[&OsStr]| {
        let before = node.listings(&first);
        let words: Vec<&str> = words.iter().map(|word| word.to_str().unwrap()).collect();
        assert!(first.beside(&words).status().unwrap().success());
        node.until_listed(&first, before + 1);
    };
    let words = |words: &'static [&str]| words.iter().map(OsStr::new);
    let mount: Vec<&OsStr> =
        words(&["mount", "-t", "tmpfs", "none"]).chain([from.as_os_str()]).collect();
    let travel: Vec<&OsStr> =
        words(&["mount", "--move"]).chain([from.as_os_str(), to.as_os_str()]).collect();
    let unmount: Vec<&OsStr> = words(&["umount"]).chain([to.as_os_str()]).collect();
    let others = node.listings(&second);
    for _ in 0..10 {
        change(&node, &mount);
        // One that moves neither comes nor goes.
        change(&node, &travel);
        change(&node, &unmount);
    }
    // It may have some of its own: a directory of the host that is removed takes the
    // copies of its mounts away, everywhere.
    let others = node.listings(&second) - others;
    assert!(others < 5, "the other one's mounts were listed {others} times");
    // Its own changes are seen all the same.
    second.mount_tmpfs("/mnt");
    node.until_seen_in(&second, "/mnt");
    node.assert_no_loss();
}

#[test]
fn x14_a_container_that_mounts_without_end_costs_a_quiet_one_nothing() {
    let (loud, quiet) = (container_with_mounts(), container_with_mounts());
    let mut node = Node::start();
    node.attach(&loud);
    node.attach(&quiet);
    let goes_on = loud.merged().join("tmp/on");
    fs::write(&goes_on, "").unwrap();
    let flood = format!(
        "cd {}; while [ -e tmp/on ]; do mount -t tmpfs none mnt; umount mnt 2>/dev/null; done",
        loud.merged().display()
    );
    let mut flood = loud.beside(&["busybox", "sh", "-c", &flood]).spawn().unwrap();
    let before = node.listings(&quiet);
    // As many as come at once, and then some of those that are paced.
    node.until_listed(&loud, 50);
    let listed = node.listings(&quiet) - before;
    assert!(listed < 20, "the quiet one's mounts were listed {listed} times");
    // What the quiet one mounts meanwhile is marked.
    quiet.mount_tmpfs("/mnt");
    node.until_seen_in(&quiet, "/mnt");
    assert_eq!(flood.try_wait().unwrap(), None, "the flood has ended by itself");
    fs::remove_file(goes_on).unwrap();
    assert!(flood.wait().unwrap().success());
}

#[test]
fn x14_a_directory_that_two_listen_to_keeps_the_mark_of_the_one_that_goes_on() {
    // The FIFO of one container's terminal lies in the upper layer of another one.
    let mut outer = Container::start();
    let inner = container_with_mounts();
    outer.shell("mkdir /tmp/fifo; cp /bin/true /tmp/fifo/true");
    let fifo = outer.upper().join("tmp/fifo/in");
    run(&[OsStr::new("mkfifo"), fifo.as_os_str()]);
    let mut node = Node::start();
    node.attach(&inner);
    node.attach(&outer);
    node.order(SensorCommand::Terminal {
        container: inner.id.clone(),
        input: Some(fifo.clone()),
        is_handed_on: false,
    });
    node.walk(&outer);
    node.told.clear();
    outer.shell("chmod u+s /tmp/fifo/true");
    node.until_present("/tmp/fifo/true", |state| state.mode == 0o4755);
    let id = outer.id.clone();
    outer.kill_init();
    node.told.clear();
    node.order(SensorCommand::Detach { container: id.clone(), pid: None });
    node.until("the last walk", |report| match report {
        SensorEvent::Scanned { container, .. } if *container == id => Some(()),
        _ => None,
    });
    let mut client = Command::new("sh");
    client.arg("-c").arg("exec 3<> \"$0\"; exec sleep 3600").arg(&fifo).stdin(Stdio::null());
    let client = Family(client.spawn().unwrap());
    let root = node.until_observed("who attaches", |observation| match &observation.fact {
        Fact::SessionOpened { opening } if opening.entry == Entry::Attach => Some(opening.root),
        _ => None,
    });
    assert_eq!(root.pid, client.0.id());
}

/// The processor time of this process's threads with this name.
fn thread_time(name: &str) -> Duration {
    let mut ticks = 0_u64;
    for task in fs::read_dir("/proc/self/task").unwrap().flatten() {
        let Ok(stat) = fs::read_to_string(task.path().join("stat")) else { continue };
        let (head, rest) = stat.rsplit_once(") ").unwrap();
        if head.ends_with(&format!("({name}")) {
            let fields: Vec<&str> = rest.split(' ').collect();
            ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    Duration::from_millis(ticks * 10)
}

#[test]
fn a_written_program_is_told_when_it_has_settled_and_by_whom() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.shell("cat /bin/busybox > /tmp/program");
    let (state, source) =
        node.until_observed("the written program", |observation| match &observation.fact {
            Fact::Present { path, state, .. } if path.to_string() == "/tmp/program" => {
                Some((state.clone(), observation.source))
            }
            _ => None,
        });
    assert_eq!(state.blake3(), Some(hash_of(BUSYBOX)));
    // The walk that begins a container's watch may take long enough to come by.
    assert!(source == Source::Change || is_emulated() && source == Source::Scan, "{source:?}");

    // The shell itself writes here, and lives on.
    let program = r"\177ELF\002\001\001\000\000\000\000\000\000\000\000\000\002\000";
    let script = format!("printf '{program}' > /tmp/written; /bin/sleep 30; true");
    let child = Family(container.command(&["/bin/sh", "-c", &script]).spawn().unwrap());
    let writer =
        node.until_observed("what the shell has written", |observation| match &observation.fact {
            Fact::Present { path, writer, .. } if path.to_string() == "/tmp/written" => {
                Some(writer.clone())
            }
            _ => None,
        });
    assert_eq!(writer.map(|writer| writer.identity.pid), Some(child.0.id()));
    node.assert_no_loss();
}

#[test]
fn data_is_counted_and_a_program_overwritten_with_data_is_told() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.shell(
        "echo data > /tmp/log; echo broken > /bin/true; echo '#!' > /tmp/gone; rm /tmp/gone",
    );
    let mut present = BTreeMap::new();
    let mut absent = BTreeSet::new();
    node.until_observed("both changes", |observation| {
        match &observation.fact {
            Fact::Present { path, state, lower, .. } => {
                present.insert(path.to_string(), (state.format, lower.is_some()));
            }
            Fact::Absent { path, .. } => {
                absent.insert(path.to_string());
            }
            Fact::Executed { .. }
            | Fact::Loaded { .. }
            | Fact::Interpreted { .. }
            | Fact::ReverseShell { .. }
            | Fact::SessionOpened { .. }
            | Fact::SessionRan { .. }
            | Fact::SessionRanMore { .. }
            | Fact::SessionInteractive { .. }
            | Fact::SessionProcessEnded { .. }
            | Fact::PackageManager { .. } => (),
        }
        (present.len() + absent.len() >= 2).then_some(())
    });
    assert_eq!(present, BTreeMap::from([("/bin/true".to_owned(), (Format::Data, true))]));
    assert_eq!(absent, BTreeSet::from(["/tmp/gone".to_owned()]));
    assert_eq!(node.health.data_writes.load(Ordering::Relaxed), 2);
}

#[test]
fn a_metadata_only_copy_is_hashed_through_the_merged_view() {
    let container = Container::with(&[], ",metacopy=on", false);
    let mut node = Node::start();
    node.attach(&container);
    container.shell("chmod 700 /bin/true");
    let raw = fs::metadata(container.upper().join("bin/true")).unwrap();
    let stored = raw.blocks() * 512;
    assert!(stored < raw.size(), "the kernel copied the content, so this would prove nothing");
    let upper = node.walk(&container);
    assert_eq!(upper.same_as_image, ["/bin/true"]);
    assert_eq!(upper.get("/bin/true").mode, 0o700);
    node.assert_no_loss();
}

#[test]
fn layers_on_two_filesystems_are_recognised_by_their_mount() {
    let container = Container::with(&[], "", true);
    let mut node = Node::start();
    node.attach(&container);
    let blake3 = container.drop_program("/tmp/true");
    container.shell("/bin/true; /tmp/true");
    assert_eq!(node.until_executed(&path("/tmp/true")).state.blake3(), Some(blake3));
    if keeps_births(&container.upper()) {
        assert_eq!(node.executed_paths(), ["/tmp/true"]);
    } else {
        // Before Linux 6.5 a tmpfs keeps no births: whose a file is can then not be
        // told by its times, and every program is compared by its content: init's too.
        let mut executed = node.executed_paths();
        executed.dedup();
        assert_eq!(executed, ["/bin/busybox", "/bin/true", "/tmp/true"]);
    }
    assert_eq!(node.walk(&container).names(), ["/tmp/true"]);
}

/// Whether a filesystem tells when a file was made.
fn keeps_births(path: &Path) -> bool {
    driftd::sys::file::stat_path(path).unwrap().born.is_some()
}

#[test]
fn sessions_are_told_once_and_before_what_they_do() {
    let container = Container::with(&["unshare", "--pid", "--fork"], "", false);
    let pid = container.pid.to_string();
    let merged = container.merged();
    let enter = |words: &[&str]| {
        let mut command = Command::new("nsenter");
        command.args(["--pid", "--target", &pid, "chroot"]).arg(&merged).args(words);
        Family(command.stdin(Stdio::null()).spawn().unwrap())
    };
    let told = |observation: &Observation| match &observation.fact {
        Fact::SessionOpened { opening } => Some((observation.source, opening.process.clone())),
        _ => None,
    };
    // A session that was open before driftd came.
    let early = enter(&["/bin/sleep", "3601"]);
    let early_pid = wait_for("the early session", || {
        descendants(early.0.id()).into_iter().find(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line == b"/bin/sleep\x003601\0")
        })
    });
    let mut node = Node::start();
    let id = container.id.clone();
    node.order(SensorCommand::Attach { container: id, pid: container.pid, rootfs: None });
    let (source, process) = node.until_observed("the early session", told);
    assert_eq!((source, process.identity.pid), (Source::Scan, early_pid));
    node.told.clear();

    container.drop_program("/tmp/busybox");
    symlink("busybox", container.merged().join("tmp/sh")).unwrap();
    let late = enter(&["/tmp/sh", "-c", "/bin/true; /tmp/sh -c /bin/true; exec /bin/sleep 3602"]);
    let mut executions = 0;
    node.until_observed("its two programs", |observation| {
        executions += usize::from(matches!(observation.fact, Fact::Executed { .. }));
        (executions == 2).then_some(())
    });
    let order: Vec<&str> = node
        .told
        .iter()
        .filter_map(|report| match report {
            SensorEvent::Observed(Observation { fact: Fact::SessionOpened { .. }, .. }) => {
                Some("session")
            }
            SensorEvent::Observed(Observation { fact: Fact::Executed { .. }, .. }) => {
                Some("executed")
            }
            _ => None,
        })
        .collect();
    assert_eq!(order, ["session", "executed", "executed"]);
    let (source, process) = node.until_observed("the late session", told);
    // By the record of `chroot`, the host's own, or when the gate is asked behind it.
    assert!(matches!(source, Source::Gate | Source::Trace), "{source:?}");
    assert_eq!(process.tty, None);
    assert_eq!(process.ancestors.last().map(|last| last.identity.pid), Some(late.0.id()));
}

#[test]
fn what_is_typed_into_the_terminal_of_init_is_heard_where_it_is_read() {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    unlockpt(&master).unwrap();
    let terminal = || Stdio::from(ioctl_tiocgptpeer(&master, flags).unwrap());
    let container =
        Container::reading(terminal(), |_| (), &["unshare", "--pid", "--fork"], "", false);
    let mut node = Node::start();
    node.attach(&container);
    let id = container.id.clone();
    node.order(SensorCommand::Terminal { container: id, input: None, is_handed_on: true });
    let reader = Family(container.command(&["/bin/cat"]).stdin(terminal()).spawn().unwrap());
    container.drop_program("/tmp/true");
    container.shell("/tmp/true");
    node.until_executed(&path("/tmp/true"));
    let came = |report: &SensorEvent| match report {
        SensorEvent::Observed(Observation { fact: Fact::SessionOpened { opening }, .. }) => {
            (opening.entry == Entry::Attach).then(|| (opening.root, opening.process.clone()))
        }
        _ => None,
    };
    assert_eq!(node.told.iter().find_map(came), None, "nobody has typed");
    rustix::io::write(&master, b"hello\n").unwrap();
    let (root, init) = node.until("who types", came);
    assert_eq!(init.identity.pid, container.pid);
    assert!(root.start_time >= init.identity.start_time, "{root:?} {init:?}");
    drop(reader);
}

#[test]
fn h03_a_runtimes_init_is_a_session_by_where_it_comes_from() {
    let container = Container::with(&["unshare", "--pid", "--fork"], "", false);
    // What runc calls itself until it becomes the session's command.
    let runtime = container.dir.path().join("runc:[2:INIT]");
    executable::write(&runtime, &fs::read(BUSYBOX).unwrap()).unwrap();
    let mut node = Node::start();
    node.attach(&container);
    let mut command = Command::new(runtime);
    command.arg0("chroot").arg(container.merged()).args(["/bin/sleep", "3600"]);
    let child = Family(command.stdin(Stdio::null()).spawn().unwrap());
    let process = node.until_observed("the session", |observation| match &observation.fact {
        Fact::SessionOpened { opening } => Some(opening.process.clone()),
        _ => None,
    });
    assert_eq!(process.identity.pid, child.0.id());
    assert_eq!(process.argv, Some(vec!["/bin/sleep".into(), "3600".into()]));
}

#[test]
fn the_marks_keep_no_mount_busy_and_the_last_walk_comes_after_the_end() {
    let mut container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    container.shell("/tmp/true");
    node.until_executed(&path("/tmp/true"));
    // By a walk, or as a change that has settled, whichever comes first.
    node.until("the file to be reported", |report| {
        summary(report).contains("present /tmp/true").then_some(())
    });
    node.told.clear();
    container.kill_init();
    container.unmount();
    node.order(SensorCommand::Detach { container: container.id.clone(), pid: None });
    assert_eq!(node.unordered_walk(&container.id).names(), ["/tmp/true"]);
    let complete = wait_for("the container to be forgotten", || {
        (!node.walk(&container).complete).then_some(false)
    });
    assert!(!complete);
    node.assert_no_loss();
}

/// Files that this process has open by this name, whoever opened them.
fn open_by_name(name: &Path) -> usize {
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == name))
        .count()
}

#[test]
fn what_is_being_hashed_is_let_go_at_once_when_its_container_ends() {
    let mut container = Container::start();
    let settings = config::Watch { max_hash_bytes: 64 << 30, ..settings() };
    let mut node = Node::with(64 * 1024, &settings);
    node.attach(&container);
    let name = format!("/tmp/huge-{}", std::process::id());
    container.drop_program(&name);
    let huge = container.merged().join(name.trim_start_matches('/'));
    fs::File::options().write(true).open(&huge).unwrap().set_len(10 << 30).unwrap();
    // The kernel calls it so from within the container's root and from without.
    let names = [PathBuf::from(&name), huge.clone()];
    let opened = || names.iter().map(|name| open_by_name(name)).sum::<usize>();
    for _ in 0..3 {
        // It is busybox by another name, which says that it does not know itself.
        container.shell(&format!("{name} || true"));
    }
    wait_for("its hashing", || (opened() == 3).then_some(()));
    container.kill_init();
    node.order(SensorCommand::Detach { container: container.id.clone(), pid: None });
    wait_for("its files to be let go", || (opened() == 0).then_some(()));
    container.unmount();
    drop(node);
}

#[test]
fn what_the_kernel_lacks_is_known_and_said() {
    use driftd::sys::capabilities::{Capabilities, Feature};
    let found = Capabilities::probe();
    for feature in found.missing() {
        eprintln!("no {}: {} ({})", feature.name(), feature.without(), feature.since());
    }
    let (version, release) = (kernel_version(), kernel_release());
    let expected = |feature, since| {
        assert_eq!(found.has(feature), version >= since, "{feature:?} on {release}");
    };
    expected(Feature::PermissionEvents, (5, 0));
    expected(Feature::OpenBeneath, (5, 6));
    expected(Feature::MountOfFile, (5, 8));
    expected(Feature::NamedEvents, (5, 9));
    expected(Feature::OverlayHandles, (6, 5));
    expected(Feature::MountEvents, (6, 14));
    expected(Feature::MemfdNoexec, (6, 3));
    // Ported back to some, or left out by a configuration.
    assert!(found.has(Feature::ProcessHandles) || version < (5, 15));
    assert!(found.has(Feature::ExecRecords) || found.has(Feature::ProcessEvents));
}

#[test]
fn what_is_no_container_is_not_attached_and_the_reason_is_told() {
    let mut node = Node::start();
    let mut refusal = |pid| {
        let id = ContainerId::new("test", "none");
        node.order(SensorCommand::Attach { container: id, pid, rootfs: None });
        let reason = node.until("the refusal", |report| match report {
            SensorEvent::NotAttached { reason, .. } => Some(reason.clone()),
            _ => None,
        });
        node.told.clear();
        reason
    };
    let reason = refusal(std::process::id());
    assert!(reason.contains("not an overlay") || reason.contains("the host's own"), "{reason}");
    assert_eq!(refusal(0), "its init process 0 is gone");
}

#[test]
fn a_flood_is_a_named_loss_and_ends_in_a_walk() {
    let container = Container::start();
    let mut node = Node::with_room_for(8);
    node.attach(&container);
    container.drop_program("/tmp/true");
    // Nobody reads the reports meanwhile.
    container.shell("i=0; while [ $i -lt 50 ]; do /tmp/true; i=$((i+1)); done");
    wait_for("the loss to be counted", || {
        (node.health.count(Failure::PipelineFull) > 0).then_some(())
    });
    assert_eq!(node.unordered_walk(&container.id).names(), ["/tmp/true"]);
}

/// An exec that waits at a gate that nobody reads.
fn blocked_exec(container: &Container, gate: &Group) -> Child {
    let root = fs::File::open(container.merged()).unwrap();
    gate.mark_filesystem(root.as_fd(), libc::FAN_OPEN_EXEC_PERM).unwrap();
    let mut child = container.command(&["/bin/true"]).stderr(Stdio::null()).spawn().unwrap();
    let mut fds = [rustix::event::PollFd::new(gate, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1), "no exec came");
    assert_eq!(child.try_wait().unwrap(), None, "it did not wait");
    child
}

#[test]
fn an_exec_that_waits_goes_on_when_the_gate_is_gone() {
    let container = Container::start();
    let gate = Group::gate().unwrap();
    let mut child = blocked_exec(&container, &gate);
    drop(gate);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_question_that_is_dropped_is_answered_with_allow() {
    let container = Container::start();
    let gate = Group::gate().unwrap();
    let mut child = blocked_exec(&container, &gate);
    let incoming = gate.read(&mut Buffer::new(), 4096).unwrap();
    assert!(matches!(incoming[..], [Incoming::Permission(_)]), "{incoming:?}");
    drop(incoming);
    assert!(child.wait().unwrap().success());
}

#[test]
fn deny_is_answered_to_the_program_it_is_meant_for() {
    let container = Container::start();
    let gate = Group::gate().unwrap();
    let mut child = blocked_exec(&container, &gate);
    for incoming in gate.read(&mut Buffer::new(), 4096).unwrap() {
        let Incoming::Permission(permission) = incoming else { panic!("{incoming:?}") };
        assert_eq!(permission.event().pid, child.id());
        let (event, answered) = permission.answer(Answer::Deny);
        answered.unwrap();
        assert_eq!(event.pidfd.is_some(), gate.reports_pidfd);
    }
    assert!(!child.wait().unwrap().success());
}

#[test]
fn what_the_kernel_offers_is_probed() {
    assert_eq!(fanotify::probe().unwrap().pidfd, Group::gate().unwrap().reports_pidfd);
}

#[test]
fn a_full_queue_is_an_overflow_and_not_an_event() {
    use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
    let container = Container::start();
    // The feed's own queue has no limit, so this is a group that has one.
    let group = Fanotify::init(
        InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK,
        EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC,
    )
    .unwrap();
    group
        .mark(
            MarkFlags::FAN_MARK_ADD | MarkFlags::FAN_MARK_FILESYSTEM,
            MaskFlags::FAN_CLOSE_WRITE,
            nix::fcntl::AT_FDCWD,
            Some(&container.merged()),
        )
        .unwrap();
    let limit: usize = fs::read_to_string("/proc/sys/fs/fanotify/max_queued_events")
        .map_or(16384, |text| text.trim().parse().unwrap());
    // A file each, because the kernel merges equal events.
    for number in 0..limit + 10 {
        fs::File::create(container.merged().join(format!("tmp/{number}"))).unwrap();
    }
    let mut decoded = Vec::new();
    let mut bytes = vec![0; 4096];
    while let Ok(read) = rustix::io::read(&group, &mut bytes[..]) {
        let (events, outcome) =
            fanotify::decode(&bytes[..read], |fd| nix::unistd::close(fd).unwrap());
        outcome.unwrap();
        decoded.extend(events);
    }
    let overflows = decoded.iter().filter(|event| **event == Decoded::Overflow).count();
    assert_eq!((overflows, decoded.len()), (1, limit + 1));
}

/// A process with a container's root that still runs a program of the host's, as a
/// runtime does until it is told to go on.
struct Waiting {
    pid: u32,
    go_on: std::io::PipeWriter,
    started: std::thread::JoinHandle<Child>,
}

impl Waiting {
    #[allow(unsafe_code, reason = "it stays itself between fork and exec, like a runtime")]
    fn to_become(container: &Container, program: &str) -> Waiting {
        let (told, tell) = std::io::pipe().unwrap();
        let (wait, go_on) = std::io::pipe().unwrap();
        let mut command = Command::new(program);
        command.arg("3600").stdin(Stdio::null());
        let merged = container.merged();
        let become_it = move || {
            rustix::process::chroot(&merged)?;
            std::env::set_current_dir("/")?;
            let pid = rustix::process::getpid().as_raw_nonzero().get();
            rustix::io::write(&tell, &pid.to_ne_bytes())?;
            rustix::io::read(&wait, &mut [0_u8])?;
            Ok(())
        };
        // SAFETY: between fork and exec it makes system calls only; its memory is its own.
        unsafe { command.pre_exec(become_it) };
        let started = std::thread::spawn(move || command.spawn().unwrap());
        let mut pid = [0; 4];
        rustix::io::read(&told, &mut pid).unwrap();
        Waiting { pid: u32::try_from(i32::from_ne_bytes(pid)).unwrap(), go_on, started }
    }

    fn go_on(self) -> Family {
        rustix::io::write(&self.go_on, b".").unwrap();
        Family(self.started.join().unwrap())
    }
}

#[test]
fn a_container_that_has_not_begun_is_armed_before_its_entry_point() {
    let container = Container::start();
    let blake3 = container.drop_program("/tmp/sleep");
    let init = Waiting::to_become(&container, "/tmp/sleep");
    let mut node = Node::start();
    let id = container.id.clone();
    node.order(SensorCommand::Attach { container: id, pid: init.pid, rootfs: None });
    let before_start = node.until("the container to be attached", |report| match report {
        SensorEvent::Attached { before_start, .. } => Some(*before_start),
        _ => None,
    });
    assert!(before_start);
    let _init = init.go_on();
    assert_eq!(node.until_executed(&path("/tmp/sleep")).state.blake3(), Some(blake3));
    let walk = node.unordered_walk(&container.id);
    assert_eq!(walk.names(), ["/tmp/sleep"]);
    let told = node.told.iter().map(summary);
    let sessions: Vec<String> = told.filter(|told| told.starts_with("session")).collect();
    assert_eq!(sessions, <[String; 0]>::default(), "init is no session");
    node.assert_no_loss();
}

/// The kernel opens the file of an execve first, and does much before it is that program.
#[test]
fn an_entry_point_that_was_opened_before_the_marks_is_reported_and_named() {
    // Before Linux 6.8 the arguments came first, and then the gate was asked. It is asked
    // about a script's interpreter, before anything of the script has run.
    let is_late = kernel_version() >= (6, 8);
    for (name, content, is_named) in [
        ("/tmp/sleep", fs::read(BUSYBOX).unwrap(), is_late),
        ("/tmp/entry", b"#!/bin/sh\nexec /bin/sleep 3600\n".to_vec(), false),
    ] {
        let container = Container::start();
        let loader = compile_loader(container.dir.path());
        let inside = container.merged().join(&name[1..]);
        executable::write(&inside, &content).unwrap();
        let mut init = Command::new(loader);
        init.args(["late".as_ref(), container.merged().as_os_str(), name.as_ref()]);
        let (init, mut go_on) = begin_late(&mut init);

        let mut node = Node::start();
        let id = container.id.clone();
        let pid = init.0.id();
        node.order(SensorCommand::Attach { container: id.clone(), pid, rootfs: None });
        let trust = Trust::UpTo(container.recorded);
        node.order(SensorCommand::Trust { container: id, trust });
        let before_start = node.until("the container to be attached", |report| match report {
            SensorEvent::Attached { before_start, .. } => Some(*before_start),
            _ => None,
        });
        assert!(before_start, "init is not that program yet");
        go_on.write_all(b"\n").unwrap();
        let executed = node.until_executed(&path(name));
        assert_eq!(executed.state.blake3(), Some(hash_of(&inside)));
        container.drop_program("/tmp/true");
        container.shell("/tmp/true");
        node.until_executed(&path("/tmp/true"));
        let named = node.told.iter().filter(|told| matches!(told, SensorEvent::Unarmed { .. }));
        assert_eq!(named.count(), usize::from(is_named), "for {name}");
        let times = node.executed_paths().iter().filter(|path| *path == name).count();
        assert_eq!(times, 1, "{name}");
    }
}

#[test]
fn h03_an_init_that_calls_itself_a_runtimes_has_begun() {
    let container = Container::start();
    let init = container.merged().join("tmp/runc:[2:INIT]");
    executable::write(&init, b"#!/bin/sh\nread line\nexec /bin/sleep 3600\n").unwrap();
    let mut init = container.command(&["/tmp/runc:[2:INIT]"]);
    let init = Family(init.stdin(Stdio::piped()).spawn().unwrap());
    let pid = init.0.id();
    wait_for("the init", || {
        let comm = fs::read(format!("/proc/{pid}/comm")).unwrap();
        (comm == b"runc:[2:INIT]\n").then_some(())
    });
    let mut node = Node::start();
    node.order(SensorCommand::Attach { container: container.id.clone(), pid, rootfs: None });
    let before_start = node.until("the container to be attached", |report| match report {
        SensorEvent::Attached { before_start, .. } => Some(*before_start),
        _ => None,
    });
    assert!(!before_start, "its program is the container's own");
}

#[test]
fn x19_a_file_that_looks_older_than_the_layer_is_no_file_of_the_image() {
    // As one looks that was made after the clock was set back.
    let scratch = tempfile::tempdir().unwrap();
    let old = scratch.path().join("old");
    fs::copy(BUSYBOX, &old).unwrap();
    let container = Container::start();
    // A directory of the upper layer, into which the overlay has not looked.
    container.shell("/bin/mkdir /tmp/late");
    let hidden = container.upper().join("tmp/late/true");
    fs::OpenOptions::new().append(true).open(&old).unwrap().write_all(b"other").unwrap();
    fs::rename(&old, &hidden).unwrap();
    let times = |path: &Path| driftd::sys::file::stat_path(path).unwrap().born;
    assert!(times(&hidden) < times(&container.upper()), "a filesystem that keeps births");
    let mut node = Node::start();
    node.attach(&container);
    container.shell("/tmp/late/true");
    let (state, layer_file) =
        node.until_observed("it to be told", |observation| match &observation.fact {
            Fact::Executed { path: told, state, layer_file, .. }
                if *told == path("/tmp/late/true") =>
            {
                Some((state.clone(), *layer_file))
            }
            _ => None,
        });
    assert_eq!(state.blake3(), Some(hash_of(&hidden)));
    assert_eq!(layer_file, None, "it is taken for the container's own");
    // It is said, and once.
    node.walk(&container);
    assert_eq!(node.health.count(Failure::ClockSet), 1);
}

#[test]
fn what_waits_at_the_gate_goes_on_when_the_watchers_stop() {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    let script = "i=0; while [ $i -lt 300 ]; do /bin/true || exit 1; i=$((i+1)); done";
    let mut busy = Family(container.command(&["/bin/sh", "-c", script]).spawn().unwrap());
    wait_for("the gate to be busy", || (node.health.gate_answers() > 20).then_some(()));
    node.watch.take().unwrap().stop();
    assert!(busy.0.wait().unwrap().success());
}

#[test]
fn what_was_executed_before_a_stop_is_told() {
    const PROGRAMS: usize = 200;
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    let lay =
        format!("i=0; while [ $i -lt {PROGRAMS} ]; do cp /tmp/true /opt/t$i; i=$((i+1)); done");
    container.shell(&lay);
    // Busybox does not know these names, and ends.
    let run = format!("i=0; while [ $i -lt {PROGRAMS} ]; do /opt/t$i; i=$((i+1)); done; true");
    container.shell(&run);
    node.watch.take().unwrap().stop();
    let mut told = std::collections::BTreeSet::new();
    for report in node.reports.try_iter() {
        if let SensorEvent::Observed(Observation {
            fact: Fact::Executed { path, state, .. }, ..
        }) = &*report
            && path.to_string().starts_with("/opt/t")
        {
            assert!(state.blake3().is_some(), "{path} was not hashed");
            told.insert(path.to_string());
        }
    }
    assert_eq!(told.len(), PROGRAMS);
}

#[test]
fn x09_nobody_waits_for_a_stop_however_much_is_being_looked_at() {
    let busy = Container::start();
    let neighbour = Container::start();
    let mut node = Node::start();
    node.attach(&busy);
    node.attach(&neighbour);
    busy.drop_program("/tmp/true");
    // Each takes seconds to be hashed, and is mostly a hole.
    busy.shell("i=0; while [ $i -lt 20 ]; do cp /tmp/true /opt/t$i; truncate -s 60M /opt/t$i; i=$((i+1)); done");
    busy.shell("i=0; while [ $i -lt 20 ]; do /opt/t$i; i=$((i+1)); done; true");
    let watch = node.watch.take().unwrap();
    let ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopping = std::thread::spawn({
        let ended = ended.clone();
        move || {
            watch.stop();
            ended.store(true, Ordering::Relaxed);
        }
    });
    let mut longest = Duration::ZERO;
    while !ended.load(Ordering::Relaxed) {
        let began = Instant::now();
        neighbour.shell("/bin/true");
        longest = longest.max(began.elapsed());
    }
    stopping.join().unwrap();
    // On a machine of its own it is some milliseconds.
    assert!(longest < Duration::from_secs(1), "somebody waited for {longest:?}");
}

#[test]
fn the_gate_counts_its_turns_while_nothing_happens() {
    let (sender, _reports) = bounded(8);
    let gate = start_gate(&settings());
    let pulse = gate.pulse.clone();
    let watch = Watch::start(&settings(), sender, Arc::new(Health::default()), gate).unwrap();
    let turns = [pulse.turns_of(Part::Gate), &*watch.gate_turns()]
        .map(|turns| turns.load(Ordering::Relaxed) + 3);
    wait_for("three turns", || {
        let now = [pulse.turns_of(Part::Gate), &*watch.gate_turns()]
            .map(|turns| turns.load(Ordering::Relaxed));
        (now[0] >= turns[0] && now[1] >= turns[1]).then_some(())
    });
    watch.stop();
}

// ---- names and metadata

/// What was told of changes, without a walk having been ordered.
impl Node {
    /// Waits until `path` is told as it is now, and says so in a line.
    #[track_caller]
    fn until_present(&mut self, wanted: &str, is_it: impl Fn(&FileState) -> bool) -> FileState {
        let wanted = path(wanted);
        self.until(&format!("{wanted} to be told"), |report| {
            facts(report).find_map(|fact| match fact {
                Fact::Present { path, state, .. } if *path == wanted && is_it(state) => {
                    Some(state.clone())
                }
                _ => None,
            })
        })
    }

    #[track_caller]
    fn until_absent(&mut self, wanted: &str) {
        let wanted = path(wanted);
        self.until(&format!("{wanted} to be gone"), |report| {
            facts(report).find_map(|fact| match fact {
                Fact::Absent { path, .. } if *path == wanted => Some(()),
                _ => None,
            })
        });
    }

    /// The paths told as absent so far.
    fn absent_paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = self
            .told
            .iter()
            .flat_map(facts)
            .filter_map(|fact| match fact {
                Fact::Absent { path, .. } => Some(path.to_string()),
                _ => None,
            })
            .collect();
        paths.sort();
        paths.dedup();
        paths
    }
}

fn facts(report: &SensorEvent) -> impl Iterator<Item = &Fact> {
    let (one, several) = match report {
        SensorEvent::Observed(observation) => (Some(observation), &[][..]),
        SensorEvent::ScanBatch { observations, .. } => (None, &observations[..]),
        SensorEvent::Attached { .. }
        | SensorEvent::NotAttached { .. }
        | SensorEvent::Unarmed { .. }
        | SensorEvent::Scanned { .. }
        | SensorEvent::Compared { .. }
        | SensorEvent::Over { .. }
        | SensorEvent::Lost { .. } => (None, &[][..]),
    };
    one.into_iter().chain(several).map(|observation| &observation.fact)
}

fn listening() -> (Container, Node) {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    (container, node)
}

#[test]
fn a24_chmod_is_told_without_a_walk_and_by_whom() {
    let (container, mut node) = listening();
    container.shell("chmod u+s /bin/true; sleep 1");
    let state = node.until_present("/bin/true", |state| state.mode == 0o4755);
    assert_eq!(state.blake3(), Some(hash_of(BUSYBOX)), "its content is the image's");
    node.assert_no_loss();
}

#[test]
fn rights_are_told_however_they_are_given() {
    let (container, mut node) = listening();
    let merged = container.merged();
    container.shell("cp /bin/true /tmp/a; mkdir /tmp/d");
    node.until_present("/tmp/a", |_| true);
    // By descriptor.
    let file = fs::File::open(merged.join("tmp/a")).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o4755)).unwrap();
    node.until_present("/tmp/a", |state| state.mode == 0o4755);
    // Another name for it, and a name in a directory that has just been made.
    fs::hard_link(merged.join("tmp/a"), merged.join("tmp/b")).unwrap();
    node.until_present("/tmp/b", |state| state.mode == 0o4755);
    fs::rename(merged.join("tmp/a"), merged.join("tmp/d/c")).unwrap();
    node.until_present("/tmp/d/c", |state| state.mode == 0o4755);
    node.until_absent("/tmp/a");
    // An attribute of an image's file.
    let capability: &[u8] = &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    rustix::fs::setxattr(
        merged.join("opt/tool/true"),
        "security.capability",
        capability,
        rustix::fs::XattrFlags::empty(),
    )
    .unwrap();
    node.until_present("/opt/tool/true", |state| state.capability.as_deref() == Some(capability));
    node.assert_no_loss();
}

#[test]
fn a22_rename_and_removal_are_told_without_a_walk() {
    let (container, mut node) = listening();
    container.shell("mv /bin/true /bin/.t; rm /opt/tool/true");
    node.until_absent("/bin/true");
    node.until_present("/bin/.t", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    node.until_absent("/opt/tool/true");
    // Removed with its directory, by one whiteout.
    container.shell("rm -r /opt/tool");
    node.until_absent("/opt/tool");
    node.assert_no_loss();
}

#[test]
fn directories_are_listened_to_as_they_appear() {
    let (container, mut node) = listening();
    container.shell("mkdir -p /tmp/a/b/c; cp /bin/true /tmp/a/b/c/x");
    node.until_present("/tmp/a/b/c/x", |_| true);
    node.told.clear();
    container.shell("chmod 4755 /tmp/a/b/c/x");
    node.until_present("/tmp/a/b/c/x", |state| state.mode == 0o4755);
    node.assert_no_loss();
}

#[test]
fn a_directory_that_was_moved_has_its_new_paths() {
    let (container, mut node) = listening();
    container.shell("mkdir -p /tmp/a/b /tmp/k; cp /bin/true /tmp/a/b/x; cp /bin/true /tmp/k/x");
    node.until_present("/tmp/a/b/x", |_| true);
    node.until_present("/tmp/k/x", |_| true);
    container.shell("mv /tmp/a /tmp/moved");
    node.until_present("/tmp/moved/b/x", |_| true);
    node.told.clear();
    container.shell("chmod 4755 /tmp/moved/b/x");
    node.until_present("/tmp/moved/b/x", |state| state.mode == 0o4755);
    // Two directories that change places.
    let merged = container.merged();
    rustix::fs::renameat_with(
        rustix::fs::CWD,
        merged.join("tmp/moved/b"),
        rustix::fs::CWD,
        merged.join("tmp/k"),
        rustix::fs::RenameFlags::EXCHANGE,
    )
    .unwrap();
    node.until_present("/tmp/k/x", |state| state.mode == 0o4755);
    node.until_present("/tmp/moved/b/x", |state| state.mode == 0o755);
    node.told.clear();
    container.shell("chmod 2755 /tmp/k/x");
    node.until_present("/tmp/k/x", |state| state.mode == 0o2755);
    assert!(!node.told.iter().flat_map(facts).any(
        |fact| matches!(fact, Fact::Present { path: told, .. } if *told == path("/tmp/moved/b/x"))
    ));
    node.assert_no_loss();
}

#[test]
fn files_that_change_places_are_both_looked_at() {
    let (container, mut node) = listening();
    let blake3 = container.drop_program("/tmp/x");
    node.until_present("/tmp/x", |_| true);
    node.told.clear();
    let merged = container.merged();
    rustix::fs::renameat_with(
        rustix::fs::CWD,
        merged.join("tmp/x"),
        rustix::fs::CWD,
        merged.join("bin/true"),
        rustix::fs::RenameFlags::EXCHANGE,
    )
    .unwrap();
    node.until_present("/bin/true", |state| state.blake3() == Some(blake3));
    node.until_present("/tmp/x", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    node.assert_no_loss();
}

#[test]
fn a_program_of_the_image_becomes_a_symlink() {
    let (container, mut node) = listening();
    container.shell("/bin/busybox ln -sf /tmp/x /opt/tool/true");
    node.until_present("/opt/tool/true", |state| state.file_type == FileType::Symlink);
    container
        .shell("/bin/busybox ln -sf /tmp/y /bin/cat; /bin/busybox mkfifo /tmp/f; mkdir /mnt/d");
    node.assert_no_loss();
}

#[test]
fn every_way_to_write_is_told() {
    let (container, mut node) = listening();
    let merged = container.merged();
    let first = container.drop_program("/tmp/x");
    node.until_present("/tmp/x", |state| state.blake3() == Some(first));
    let check = |node: &mut Node, what: &str| {
        let now = hash_of(merged.join("tmp/x"));
        eprintln!("{what}");
        node.until_present("/tmp/x", |state| state.blake3() == Some(now));
    };
    // By path, with no descriptor to close: an image's file is copied up, which is
    // told; of a file that has been, only a walk tells.
    let truncate = |name: &str| {
        let name = std::ffi::CString::new(merged.join(name).as_os_str().as_bytes()).unwrap();
        nix::unistd::truncate(name.as_c_str(), 4096).unwrap();
    };
    truncate("opt/tool/true");
    node.until_present("/opt/tool/true", |state| state.size == 4096);
    truncate("tmp/x");
    let upper = node.walk(&container);
    assert_eq!(upper.get("/tmp/x").blake3(), Some(hash_of(merged.join("tmp/x"))));
    let file = fs::File::options().read(true).write(true).open(merged.join("tmp/x")).unwrap();
    let source = fs::File::open(merged.join("bin/busybox")).unwrap();
    let (mut from, mut to) = (8192, 4096);
    let copied =
        rustix::fs::copy_file_range(&source, Some(&mut from), &file, Some(&mut to), 8192).unwrap();
    assert_eq!(copied, 8192);
    drop(file);
    check(&mut node, "copy_file_range");
    let writer = container.dir.path().join("writer");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/writer.c");
    run(&[OsStr::new("cc"), "-o".as_ref(), writer.as_ref(), source.as_ref()]);
    for way in ["mmap", "ring"] {
        run(&[writer.as_os_str(), way.as_ref(), merged.join("tmp/x").as_ref()]);
        check(&mut node, way);
    }
    node.assert_no_loss();
}

#[test]
fn more_changes_than_are_waited_for_are_left_to_a_walk_and_to_no_other_container() {
    // It was there before the watchers: nobody can have marked it before its start.
    let other = Container::start();
    let (container, mut node) = listening();
    node.attach(&other);
    let merged = container.merged();
    fs::write(merged.join("tmp/0"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(merged.join("tmp/0"), fs::Permissions::from_mode(0o755)).unwrap();
    let start = Instant::now();
    for number in 1..20_000 {
        fs::hard_link(merged.join("tmp/0"), merged.join(format!("tmp/{number}"))).unwrap();
    }
    let flood = start.elapsed();
    other.shell("chmod u+s /bin/true");
    let start = Instant::now();
    node.until("the other container's change", |report| {
        let is_others = match report {
            SensorEvent::Observed(observation) => observation.container == other.id,
            SensorEvent::ScanBatch { container, .. } => *container == other.id,
            _ => false,
        };
        facts(report)
            .any(|fact| matches!(fact, Fact::Present { path: told, .. } if *told == path("/bin/true")))
            .then_some(())
            .filter(|()| is_others)
    });
    let waited = start.elapsed();
    assert!(
        waited < Duration::from_secs(10),
        "{waited:?} for a change beside a flood of {flood:?}"
    );
    let mut told = BTreeSet::new();
    node.until("all of the flood", |report| {
        for fact in facts(report) {
            if let Fact::Present { path, .. } = fact {
                told.insert(path.clone());
            }
        }
        (told.len() >= 20_000).then_some(())
    });
    assert!(node.health.left_to_sweeps.load(Ordering::Relaxed) > 0);
    node.assert_no_loss();
}

#[test]
fn nothing_is_listened_to_once_a_container_has_ended() {
    let (mut container, mut node) = listening();
    container.shell("mkdir -p /tmp/a/b");
    container.drop_program("/tmp/a/b/x");
    node.until_present("/tmp/a/b/x", |_| true);
    let id = container.id.clone();
    container.kill_init();
    node.told.clear();
    node.order(SensorCommand::Detach { container: id.clone(), pid: None });
    node.until("the last walk", |report| match report {
        SensorEvent::Scanned { container, .. } if *container == id => Some(()),
        _ => None,
    });
    container.unmount();
    node.told.clear();
    // Its owner removes it; whoever looks at the directory finds no mark of ours.
    let marks = || {
        let mut marks = 0;
        for entry in fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
            let info = fs::read_to_string(entry.path()).unwrap_or_default();
            let inode = format!("ino:{:x} ", fs::metadata(container.upper()).unwrap().ino());
            marks += info.lines().filter(|line| line.contains(&inode)).count();
        }
        marks
    };
    wait_for("the marks to go", || (marks() == 0).then_some(()));
    fs::remove_dir_all(container.upper()).unwrap();
    node.assert_no_loss();
}

#[test]
fn a36_a_moved_directory_of_the_image_is_one_absence_and_its_programs_are_told_when_run() {
    let container = Container::with(&[], ",redirect_dir=on", false);
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    container.shell("/opt/tool/true; /tmp/true");
    // By then it is known where the image's program was run.
    node.until_executed(&path("/tmp/true"));
    node.told.clear();
    container.shell("mv /opt/tool /opt/other; /opt/other/true; /bin/true");
    let executed = node.until_executed(&path("/opt/other/true"));
    assert_eq!(executed.state.blake3(), Some(hash_of(BUSYBOX)));
    node.until_absent("/opt/tool");
    let upper = node.walk(&container);
    assert!(upper.complete, "what a moved directory shows is no riddle");
    assert_eq!(upper.hidden(), ["/opt/tool"]);
    assert_eq!(node.absent_paths(), ["/opt/tool"]);
    assert_eq!(node.executed_paths(), ["/opt/other/true"], "the image's own are silent");
    // Back where it was, it is the image's own again.
    node.told.clear();
    container.shell("mv /opt/other /opt/tool; /opt/tool/true; mv /bin/true /opt/true; /opt/true");
    node.until_executed(&path("/opt/true"));
    assert_eq!(node.executed_paths(), ["/opt/true"]);
    node.assert_no_loss();
}

#[test]
fn b09_metadata_only_copies_are_the_images_own_also_after_the_end() {
    let mut container = Container::with(&[], ",metacopy=on", false);
    let mut node = Node::start();
    node.attach(&container);
    container.shell(
        "/bin/busybox chown 7:7 /bin/true /opt/tool/true; /bin/true; mv /opt/tool/true /opt/tool/t",
    );
    node.until_present("/bin/true", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    node.until_present("/opt/tool/t", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    node.told.clear();
    let id = container.id.clone();
    container.kill_init();
    node.order(SensorCommand::Detach { container: id.clone(), pid: None });
    node.until("the last walk", |report| match report {
        SensorEvent::Scanned { container, .. } if *container == id => Some(()),
        _ => None,
    });
    node.until_present("/bin/true", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    node.until_present("/opt/tool/t", |state| state.blake3() == Some(hash_of(BUSYBOX)));
    assert_eq!(node.absent_paths(), ["/opt/tool/true"]);
    node.assert_no_loss();
}

#[test]
fn a34_data_on_a_watched_path_is_hashed_and_so_is_a_symlinks_target() {
    let (container, mut node) = listening();
    container.shell(
        "mkdir -p /etc/cron.d /root/.ssh; echo '* * * * * root /tmp/x' > /etc/cron.d/a\n\
         echo key > /root/.ssh/authorized_keys; /bin/busybox ln -s /tmp/y /etc/profile\n\
         echo data > /etc/data",
    );
    let state = node.until_present("/etc/cron.d/a", |state| state.blake3().is_some());
    assert_eq!(state.format, Format::Data);
    node.until_present("/root/.ssh/authorized_keys", |state| state.blake3().is_some());
    let link = node.until_present("/etc/profile", |state| state.file_type == FileType::Symlink);
    assert_eq!(link.blake3(), Some(Blake3Hash(*blake3::hash(b"/tmp/y").as_bytes())));
    assert_eq!(node.walk(&container).get("/etc/data").blake3(), None);
    node.assert_no_loss();
}
