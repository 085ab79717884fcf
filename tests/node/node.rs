//! One containerd and one driftd in a scratch directory, and the containers in
//! between. Whatever happens in a test, dropping a [`Node`] ends everything it
//! started, by pid, and removes what it made.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use driftd::model::finding::hex;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::cri::{self, Cri};
use crate::image::{self, Digests, Layer};
use crate::programs::{self, PAUSE, Payload, WORKBENCH, find};

/// How long anything that should happen may take on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// `watch.settle` in the tests: how long a written file must be left alone.
pub(crate) const SETTLE: Duration = Duration::from_secs(1);

/// What all nodes of one run share: the scratch directory and the image.
pub(crate) struct Bench {
    pub(crate) scratch: tempfile::TempDir,
    pub(crate) payload: Payload,
    pub(crate) workbench: PathBuf,
    pub(crate) digests: Digests,
    /// A copy of the daemon's program where every user may run it.
    pub(crate) driftd: PathBuf,
}

static BENCH: OnceLock<Result<Bench, String>> = OnceLock::new();

/// The bench, made when a test first asks for it.
pub(crate) fn bench() -> anyhow::Result<&'static Bench> {
    BENCH
        .get_or_init(|| make_bench().map_err(|err| format!("{err:#}")))
        .as_ref()
        .map_err(|err| anyhow::anyhow!("{err}"))
}

/// Removes the bench's directory: a static is never dropped.
pub(crate) fn remove_bench() {
    if let Some(Ok(bench)) = BENCH.get() {
        remove(bench.scratch.path());
    }
}

fn make_bench() -> anyhow::Result<Bench> {
    let scratch = scratch_directory("driftd-node.")?;
    let payload = Payload::compile(scratch.path())?;
    let workbench = scratch.path().join("workbench.tar");
    let digests = programs::write_workbench(&workbench, &payload)?;
    let driftd = scratch.path().join("driftd");
    fs::copy(driftd_program(), &driftd)?;
    Ok(Bench { scratch, payload, workbench, digests, driftd })
}

/// A directory on a filesystem that can be an overlay's upper layer, which an
/// overlay itself (`/tmp` of a build container) cannot.
fn scratch_directory(prefix: &str) -> anyhow::Result<tempfile::TempDir> {
    let candidates = [std::env::temp_dir(), "/var/tmp".into(), "/dev/shm".into()];
    let parent = candidates
        .iter()
        .find(|directory| {
            nix::sys::statfs::statfs(directory.as_path())
                .is_ok_and(|fs| fs.filesystem_type() != nix::sys::statfs::OVERLAYFS_SUPER_MAGIC)
        })
        .context("neither the temporary directory, /var/tmp nor /dev/shm can hold an overlay")?;
    let directory = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?;
    // Tests as another user must be able to reach what lies in here.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    Ok(directory)
}

/// Every node there is, for a run that is interrupted.
static NODES: Mutex<Vec<Weak<Node>>> = Mutex::new(Vec::new());
static STARTED: AtomicU32 = AtomicU32::new(0);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Ends everything that any test has started, and lets nothing start any more.
pub(crate) fn tear_down_everything() {
    INTERRUPTED.store(true, Ordering::SeqCst);
    let nodes = std::mem::take(&mut *lock(&NODES));
    for node in nodes.iter().filter_map(Weak::upgrade) {
        node.tear_down();
        remove(node.directory.path());
    }
}

/// What [`use_program`] was given.
static OTHER_PROGRAM: Mutex<Option<PathBuf>> = Mutex::new(None);

/// From now on, daemon and client are this program; with `None`, the usual one.
#[allow(dead_code, reason = "benches/hostile.rs compares two builds")]
pub(crate) fn use_program(program: Option<PathBuf>) {
    *lock(&OTHER_PROGRAM) = program;
}

/// The driftd under test: this build's, or another one that `DRIFTD_PROGRAM` names.
fn driftd_program() -> PathBuf {
    let other = lock(&OTHER_PROGRAM).clone();
    let other = other.or_else(|| std::env::var_os("DRIFTD_PROGRAM").map(PathBuf::from));
    other.unwrap_or_else(|| env!("CARGO_BIN_EXE_driftd").into())
}

/// How a node differs from the usual one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Setup {
    /// Added to driftd's settings; may open tables of its own.
    pub(crate) driftd: &'static str,
    /// containerd serves Kubernetes, with these settings for what it pulls.
    pub(crate) cri: Option<&'static str>,
    /// Containers are run by a copy of runc, `bin/runc` in the node's directory.
    pub(crate) own_runtime: bool,
    /// A namespace of containerd that driftd leaves alone.
    pub(crate) unwatched: Option<&'static str>,
}

/// A containerd of its own, with a driftd that watches it.
pub(crate) struct Node {
    pub(crate) directory: tempfile::TempDir,
    containerd: Mutex<Option<Child>>,
    driftd: Mutex<Option<Child>>,
    /// containerd's namespace, and the name of the cgroup below which the
    /// containers are: unique, so that two runs at once do not meet.
    pub(crate) namespace: String,
    /// With their namespaces.
    containers: Mutex<Vec<(String, String)>>,
    /// Sandboxes and containers that Kubernetes' interface has made.
    pods: Mutex<Vec<String>>,
    next: AtomicU32,
    /// Torn down: nothing may be started any more.
    ended: AtomicBool,
    is_shared: AtomicBool,
    setup: Setup,
}

/// containerd's namespace for Kubernetes.
pub(crate) const KUBERNETES: &str = "k8s.io";

impl Node {
    /// Starts containerd with the workbench image in it, and driftd.
    pub(crate) fn start(setup: Setup) -> anyhow::Result<Arc<Node>> {
        let node = Node::with_containerd(setup)?;
        node.import(&bench()?.workbench)?;
        node.start_driftd()?;
        Ok(node)
    }

    /// Starts containerd alone, with no image in it.
    pub(crate) fn with_containerd(setup: Setup) -> anyhow::Result<Arc<Node>> {
        let node = Arc::new(Node {
            directory: scratch_directory("driftd-node.")?,
            containerd: Mutex::new(None),
            driftd: Mutex::new(None),
            namespace: format!(
                "driftd-test-{}-{}",
                std::process::id(),
                STARTED.fetch_add(1, Ordering::Relaxed)
            ),
            containers: Mutex::new(Vec::new()),
            pods: Mutex::new(Vec::new()),
            next: AtomicU32::new(1),
            ended: AtomicBool::new(false),
            is_shared: AtomicBool::new(false),
            setup,
        });
        let mut nodes = lock(&NODES);
        ensure!(!INTERRUPTED.load(Ordering::SeqCst), "interrupted");
        nodes.push(Arc::downgrade(&node));
        drop(nodes);
        if setup.own_runtime {
            node.renew_runtime()?;
        }
        node.write_settings(setup.driftd)?;
        node.start_containerd()?;
        Ok(node)
    }

    /// Puts a new copy in the place of the node's own runtime, as an upgrade does.
    pub(crate) fn renew_runtime(&self) -> anyhow::Result<()> {
        fs::create_dir_all(self.path("bin"))?;
        fs::copy(find("runc")?, self.path("bin/runc.new"))?;
        fs::rename(self.path("bin/runc.new"), self.path("bin/runc"))?;
        Ok(())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    // ---- containerd

    /// Starts containerd and waits until it answers.
    pub(crate) fn start_containerd(&self) -> anyhow::Result<()> {
        let config = self.path("containerd.toml");
        let directory = self.directory.path().display();
        let (without, cri) = match self.setup.cri {
            None => (
                r#""io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime","#,
                String::new(),
            ),
            // Negative OOM scores need a capability that not every machine gives.
            Some(images) => (
                "",
                format!(
                    r#"[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
  conf_dir = "{directory}/cni"
  bin_dir = "{directory}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "overlayfs"
  {images}
# The same for containerd 2.
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  {images}
"#
                ),
            ),
        };
        fs::write(
            &config,
            format!(
                r#"version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = [{without}
  "io.containerd.nri.v1.nri", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = "{directory}/containerd.sock"
[ttrpc]
  address = "{directory}/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/opt"
# The restart monitor, in containerd 1 and 2.
[plugins."io.containerd.internal.v1.restart"]
  interval = "2s"
[plugins."io.containerd.monitor.container.v1.restart"]
  interval = "2s"
{cri}"#
            ),
        )?;
        let mut containerd = lock(&self.containerd);
        ensure!(!self.ended.load(Ordering::SeqCst), "interrupted");
        let mut command = Command::new(find("containerd")?);
        if self.setup.own_runtime {
            // Shims have containerd's PATH, and look for the runtime in it.
            let mut path = self.path("bin").into_os_string();
            path.push(":");
            path.push(std::env::var_os("PATH").unwrap_or_default());
            command.env("PATH", path);
        }
        command.arg("--config").arg(&config);
        *containerd = Some(spawn_daemon(&mut command, &self.path("containerd.log"))?);
        drop(containerd);
        wait_for("containerd to answer", || {
            let output = self.ctr_command(&["version"])?.output()?;
            Ok(output.status.success().then_some(()))
        })
    }

    /// Ends containerd as a crash would. Containers go on under their shims.
    pub(crate) fn crash_containerd(&self) -> anyhow::Result<()> {
        self.ensure_alone()?;
        let mut child = lock(&self.containerd).take().context("containerd is not running")?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    pub(crate) fn ctr_command(&self, arguments: &[&str]) -> anyhow::Result<Command> {
        self.ctr_command_in(&self.namespace, arguments)
    }

    fn ctr_command_in(&self, namespace: &str, arguments: &[&str]) -> anyhow::Result<Command> {
        ensure!(lock(&self.containerd).is_some(), "containerd is not running");
        let mut command = Command::new(find("ctr")?);
        command
            .arg("--address")
            .arg(self.path("containerd.sock"))
            .args(["--namespace", namespace])
            .args(arguments)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Runs `ctr` in another of containerd's namespaces.
    pub(crate) fn ctr_in(&self, namespace: &str, arguments: &[&str]) -> anyhow::Result<String> {
        let output =
            self.ctr_command_in(namespace, arguments)?.output().context("cannot run ctr")?;
        ensure!(output.status.success(), "ctr {arguments:?} failed\n{}", talk(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `ctr` and hands back what it printed.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.ctr_in(&self.namespace, arguments)
    }

    pub(crate) fn import(&self, image: &Path) -> anyhow::Result<()> {
        self.ctr(&["images", "import", &image.to_string_lossy()]).map(drop)
    }

    /// Writes a small image of its own and imports it.
    pub(crate) fn import_layers(&self, name: &str, layers: Vec<Layer>) -> anyhow::Result<Digests> {
        // Tests that share a node import at the same time.
        let file = self.path(&format!("image-{}.tar", self.next_id()));
        let digests = image::write(&file, name, layers)?;
        self.import(&file)?;
        std::fs::remove_file(&file)?;
        Ok(digests)
    }

    // ---- driftd

    fn write_settings(&self, more: &str) -> anyhow::Result<()> {
        let directory = self.directory.path().display();
        let more = more.replace("{node}", &directory.to_string());
        let exclude: Vec<&str> = self.setup.unwatched.into_iter().collect();
        // Few tests wait until a command is recognised as a probe.
        let patience = if more.contains("probe_patience") { "" } else { "probe_patience = \"0s\"" };
        let scans = if more.contains("sweep_interval") { "" } else { "sweep_interval = \"1h\"" };
        // The machine's own rules are none of the tests'.
        let policy = if more.contains("[policy]") {
            String::new()
        } else {
            format!("[policy]\ndir = \"{directory}/policy.d\"")
        };
        // `more` may open a table of its own, so it comes last.
        let text = format!(
            r#"state_dir = "{directory}/driftd"
socket = "{directory}/driftd.sock"
{policy}
[containerd]
sockets = ["{directory}/containerd.sock"]
exclude_namespaces = {exclude:?}
docker_socket = "{directory}/docker/docker.sock"
[watch]
settle = "1s"
{scans}
{patience}
{more}
"#
        );
        let file = self.path("driftd.toml");
        fs::write(&file, &text)?;
        let program = driftd_program();
        if program == Path::new(env!("CARGO_BIN_EXE_driftd")) {
            return Ok(());
        }
        // An older build, in a bench, may not know what came later.
        let check =
            Command::new(program).args(["run", "--check", "--config"]).arg(&file).output()?;
        if check.status.code() == Some(64) {
            let is_newer = |line: &&str| !policy.contains(line) && !line.starts_with("docker_");
            let older: Vec<&str> =
                text.lines().filter(|line| line.is_empty() || is_newer(line)).collect();
            fs::write(&file, older.join("\n"))?;
        }
        Ok(())
    }

    /// Starts driftd and waits until it answers.
    pub(crate) fn start_driftd(&self) -> anyhow::Result<()> {
        let mut driftd = lock(&self.driftd);
        ensure!(!self.ended.load(Ordering::SeqCst), "interrupted");
        let mut command = Command::new(driftd_program());
        command.args(["run", "--config"]).arg(self.path("driftd.toml"));
        *driftd = Some(spawn_daemon(&mut command, &self.path("driftd.log"))?);
        drop(driftd);
        wait_for("driftd to answer", || {
            if let Some(status) = lock(&self.driftd).as_mut().and_then(|c| c.try_wait().transpose())
            {
                bail!("driftd ended instead: {}", status?);
            }
            // 1 means that the view is not complete, for example without containerd.
            let answered = matches!(self.driftd(&["status"])?.status.code(), Some(0 | 1));
            Ok(answered.then_some(()))
        })
    }

    /// The daemon's pid.
    pub(crate) fn driftd_pid(&self) -> anyhow::Result<Pid> {
        let guard = lock(&self.driftd);
        let child = guard.as_ref().context("driftd is not running")?;
        Ok(Pid::from_raw(child.id().try_into()?))
    }

    /// Waits until driftd has ended. Returns the signal that ended it, if one did.
    pub(crate) fn driftd_ended(&self, within: Duration) -> anyhow::Result<Option<Signal>> {
        let status = wait_within(within, "driftd to end", || {
            Ok(lock(&self.driftd).as_mut().context("driftd is not running")?.try_wait()?)
        })?;
        lock(&self.driftd).take();
        Ok(status.signal().map(Signal::try_from).transpose()?)
    }

    /// Marks this node as shared by tests: none of them may stop its daemons.
    #[allow(dead_code, reason = "each bench has a node of its own")]
    pub(crate) fn share(&self) {
        self.is_shared.store(true, Ordering::SeqCst);
    }

    fn ensure_alone(&self) -> anyhow::Result<()> {
        let is_shared = self.is_shared.load(Ordering::SeqCst);
        ensure!(!is_shared, "this node is shared with other tests (use test_alone)");
        Ok(())
    }

    /// `kill -9`, and nothing else.
    pub(crate) fn crash_driftd(&self) -> anyhow::Result<()> {
        self.ensure_alone()?;
        kill(self.driftd_pid()?, Signal::SIGKILL)?;
        self.driftd_ended(DEADLINE).map(drop)
    }

    /// Ends driftd as systemd would.
    pub(crate) fn stop_driftd(&self) -> anyhow::Result<()> {
        self.ensure_alone()?;
        kill(self.driftd_pid()?, Signal::SIGTERM)?;
        self.driftd_ended(DEADLINE).map(drop)
    }

    /// A command of driftd's client, not yet run.
    pub(crate) fn driftd_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(driftd_program());
        command.args(arguments).env("DRIFTD_SOCKET", self.path("driftd.sock")).stdin(Stdio::null());
        command
    }

    pub(crate) fn driftd(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        self.driftd_command(arguments).output().context("cannot run driftd")
    }

    /// What `driftd` answers, line by line as JSON.
    pub(crate) fn answer(&self, arguments: &[&str]) -> anyhow::Result<Vec<Value>> {
        let output = self.driftd(&[arguments, &["-o", "jsonl"]].concat())?;
        ensure!(
            matches!(output.status.code(), Some(0 | 1)),
            "driftd {arguments:?} failed: {}\n{}",
            output.status,
            talk(&output)
        );
        String::from_utf8(output.stdout)?
            .lines()
            .map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}")))
            .collect()
    }

    /// The answer of `driftd status`.
    pub(crate) fn status(&self) -> anyhow::Result<Value> {
        let output = self.driftd(&["status", "-o", "json"])?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| format!("`driftd status` gave no JSON\n{}", talk(&output)))
    }

    /// How often `name` was lost since driftd started.
    pub(crate) fn losses(&self, name: &str) -> anyhow::Result<u64> {
        let status = self.status()?;
        let losses = status["losses"].as_array().context("status has no losses")?;
        Ok(losses
            .iter()
            .find(|loss| loss["name"] == name)
            .and_then(|loss| loss["count"].as_u64())
            .unwrap_or(0))
    }

    /// Waits until `driftd status` calls the view complete.
    pub(crate) fn wait_until_complete(&self) -> anyhow::Result<()> {
        let mut problems = Value::Null;
        wait_for("the view to be complete", || {
            let status = self.status()?;
            problems = status["problems"].clone();
            Ok((status["complete"] == true).then_some(()))
        })
        .with_context(|| format!("{problems:#}"))
    }

    // ---- baselines

    /// Where driftd keeps its baselines.
    pub(crate) fn store(&self) -> PathBuf {
        self.path("driftd/baselines")
    }

    /// Records an image from its archive, without a daemon, in a store of its own.
    pub(crate) fn record_archive(&self, file: &Path) -> anyhow::Result<PathBuf> {
        let store = self.path("store-of-archives");
        let recorded = Command::new(driftd_program())
            .args(["baseline", "record", "--from-archive"])
            .arg(file)
            .arg("--store")
            .arg(&store)
            .env("DRIFTD_SOCKET", "/nonexistent")
            .stdin(Stdio::null())
            .output()?;
        ensure!(recorded.status.success(), "{}: {}", file.display(), talk(&recorded));
        Ok(store)
    }

    /// The recorded baseline of an image that has this name now.
    pub(crate) fn baseline_of(&self, image: &str) -> anyhow::Result<Option<Value>> {
        let baselines = self.answer(&["baseline", "ls"])?;
        Ok(baselines
            .into_iter()
            .find(|baseline| baseline["state"] == "ready" && names(baseline).contains(&image)))
    }

    /// Waits until an image's baseline is recorded, and known by this.
    pub(crate) fn wait_until_known_as(&self, image: &str, known_by: &str) -> anyhow::Result<Value> {
        let mut last = None;
        wait_for(&format!("{image} to be {known_by}"), || {
            last = self.baseline_of(image)?;
            Ok(last.clone().filter(|baseline| known_as(baseline, known_by)))
        })
        .with_context(|| format!("last was {last:#?}"))
    }

    /// `driftd baseline verify`: how it ended, and its answer for each image.
    pub(crate) fn verify(&self, arguments: &[&str]) -> anyhow::Result<(i32, Vec<Value>)> {
        let output =
            self.driftd(&[&["baseline", "verify"], arguments, &["-o", "jsonl"]].concat())?;
        let code = output.status.code().context("it was killed")?;
        let answers = str::from_utf8(&output.stdout)?.lines().map(|line| {
            serde_json::from_str(line).with_context(|| format!("no JSON: {}", talk(&output)))
        });
        Ok((code, answers.collect::<anyhow::Result<_>>()?))
    }

    // ---- containers

    /// A container that started before driftd, and a complete view. A container that starts
    /// later may be reported as armed late.
    pub(crate) fn settled_container(&self) -> anyhow::Result<Container<'_>> {
        let container = self.container()?;
        self.stop_driftd()?;
        self.start_driftd()?;
        container.wait_until_watched()?;
        self.wait_until_complete()?;
        Ok(container)
    }

    /// Waits until driftd watches a container by its baseline.
    pub(crate) fn wait_until_watched(&self, id: &str) -> anyhow::Result<()> {
        wait_for(&format!("driftd to watch {id}"), || {
            let known = self.answer(&["containers"])?;
            Ok(known
                .iter()
                .any(|container| {
                    container["id"] == id
                        && container["watched"] == true
                        && container["baseline"] == "ready"
                })
                .then_some(()))
        })
    }

    /// Starts a container of the workbench image and waits until it is watched.
    pub(crate) fn container(&self) -> anyhow::Result<Container<'_>> {
        self.container_of(WORKBENCH)
    }

    pub(crate) fn container_of(&self, image: &str) -> anyhow::Result<Container<'_>> {
        let container = self.unwatched_container_of(image)?;
        container.wait_until_watched()?;
        Ok(container)
    }

    /// The same, in another of containerd's namespaces.
    pub(crate) fn container_in(
        &self,
        namespace: &str,
        image: &str,
    ) -> anyhow::Result<Container<'_>> {
        let container = self.run(namespace, image, &[])?;
        container.wait_until_watched()?;
        Ok(container)
    }

    /// A container that sees the loopback interface of this machine.
    pub(crate) fn container_on_host_network(&self, image: &str) -> anyhow::Result<Container<'_>> {
        let container = self.run(&self.namespace, image, &["--net-host"])?;
        container.wait_until_watched()?;
        Ok(container)
    }

    /// The same, with more of `ctr run`'s options.
    pub(crate) fn container_with(&self, options: &[&str]) -> anyhow::Result<Container<'_>> {
        let container = self.run(&self.namespace, WORKBENCH, options)?;
        container.wait_until_watched()?;
        Ok(container)
    }

    /// Starts a container and does not wait until driftd watches it.
    pub(crate) fn unwatched_container_of(&self, image: &str) -> anyhow::Result<Container<'_>> {
        self.run(&self.namespace, image, &[])
    }

    /// A container of the workbench image whose init is the image's own script.
    pub(crate) fn container_with_entry_point(&self) -> anyhow::Result<Container<'_>> {
        let container = self.run_as(&self.namespace, WORKBENCH, &[], &["/docker-entrypoint.sh"])?;
        container.wait_until_watched()?;
        Ok(container)
    }

    /// The same, in a namespace of its own.
    #[allow(dead_code, reason = "benches/workload.rs compares with such a container")]
    pub(crate) fn unwatched_container_in(
        &self,
        namespace: &str,
        image: &str,
    ) -> anyhow::Result<Container<'_>> {
        self.run(namespace, image, &[])
    }

    /// Starts a container with more of `ctr run`'s options.
    pub(crate) fn run(
        &self,
        namespace: &str,
        image: &str,
        more: &[&str],
    ) -> anyhow::Result<Container<'_>> {
        self.run_as(namespace, image, more, &["/bin/sh", "-c", Control::INIT])
    }

    fn run_as(
        &self,
        namespace: &str,
        image: &str,
        more: &[&str],
        init: &[&str],
    ) -> anyhow::Result<Container<'_>> {
        let id = self.next_id();
        let control = Control::new(self, &id)?;
        lock(&self.containers).push((namespace.to_owned(), id.clone()));
        let fifo = self.path("fifo");
        let mount =
            format!("type=bind,src={},dst=/.control,options=rbind:rw", control.path.display());
        let options = ["run", "-d", "--fifo-dir", &fifo.to_string_lossy(), "--mount", &mount];
        // Whatever the namespace, the cgroup is below this node's.
        let cgroup = format!("/{}/{id}", self.namespace);
        let names = [image, &id];
        let words = [&options[..], more, &["--cgroup", &cgroup], &names, init];
        self.ctr_in(namespace, &words.concat())?;
        Ok(Container { node: self, id, namespace: namespace.to_owned(), control })
    }

    /// Registers a container that the test makes by itself: it ends with the node.
    pub(crate) fn own_container(&self, id: &str) {
        lock(&self.containers).push((self.namespace.clone(), id.to_owned()));
    }

    /// The upper layer of a container's snapshot.
    pub(crate) fn upperdir(&self, id: &str) -> anyhow::Result<PathBuf> {
        let mounts = self.ctr(&["snapshots", "mounts", "/nowhere", id])?;
        let upper = mounts.split("upperdir=").nth(1).context("no overlay")?;
        let end = upper.find([',', ' ', '\n']).unwrap_or(upper.len());
        Ok(upper[..end].into())
    }

    /// Starts a container that the tests do not control: it only runs `command`.
    pub(crate) fn run_plainly(&self, options: &[&str], command: &[&str]) -> anyhow::Result<String> {
        let id = self.next_id();
        self.own_container(&id);
        let cgroup = format!("/{}/{id}", self.namespace);
        let usual = ["run", "-d", "--null-io", "--cgroup", &cgroup];
        self.ctr(&[&usual[..], options, &[WORKBENCH, &id], command].concat())?;
        Ok(id)
    }

    /// A name that nothing else on this node has.
    pub(crate) fn next_id(&self) -> String {
        format!("c{:03}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    // ---- Kubernetes

    /// containerd, as a kubelet speaks to it.
    pub(crate) fn cri(&self) -> Cri {
        Cri::new(self.path("containerd.sock"))
    }

    /// Starts a pod on the host's network with one container, and waits until
    /// the container is watched.
    pub(crate) fn pod_of(&self, image: &str) -> anyhow::Result<(String, Container<'_>)> {
        let name = self.next_id();
        let control = Control::new(self, &name)?;
        // Below the cgroup of this node, like every other container of it.
        let pod = cri::pod(&name, &format!("/{}", self.namespace));
        let sandbox = self.cri().run_pod_sandbox(&pod)?;
        lock(&self.pods).push(sandbox.clone());
        let command = ["/bin/sh", "-c", Control::INIT];
        let container = cri::container(&name, image, &command, &[(&control.path, "/.control")]);
        let id = self.start_in_pod(&sandbox, &pod, &container)?;
        let container = Container { node: self, id, namespace: KUBERNETES.to_owned(), control };
        container.wait_until_watched()?;
        Ok((sandbox, container))
    }

    fn start_in_pod(
        &self,
        sandbox: &str,
        pod: &cri::PodSandboxConfig,
        container: &cri::ContainerConfig,
    ) -> anyhow::Result<String> {
        let id = self.cri().create_container(sandbox, container, pod)?;
        lock(&self.pods).push(id.clone());
        self.cri().start_container(&id)?;
        Ok(id)
    }

    /// Starts a container with a shell and a terminal in a pod, and waits until it is
    /// watched.
    pub(crate) fn shell_in_pod(&self, sandbox: &str, image: &str) -> anyhow::Result<Container<'_>> {
        let name = self.next_id();
        let control = Control::new(self, &name)?;
        let pod = cri::pod(&name, &format!("/{}", self.namespace));
        let shell = cri::container(&name, image, &["/bin/sh"], &[(&control.path, "/.control")]);
        let shell = cri::with_terminal(shell);
        let id = self.start_in_pod(sandbox, &pod, &shell)?;
        let container = Container { node: self, id, namespace: KUBERNETES.to_owned(), control };
        container.wait_until_watched()?;
        Ok(container)
    }

    /// Puts a container with a shell and a terminal beside one of a pod.
    pub(crate) fn debug_container(
        &self,
        sandbox: &str,
        target: &str,
        image: &str,
    ) -> anyhow::Result<String> {
        let name = self.next_id();
        let pod = cri::pod(&name, &format!("/{}", self.namespace));
        let shell = cri::container(&name, image, &["/bin/sh"], &[]);
        let shell = cri::beside(target, shell);
        self.start_in_pod(sandbox, &pod, &shell)
    }

    /// The last lines of both logs, for a test that failed.
    pub(crate) fn logs(&self) -> String {
        ["driftd.log", "containerd.log"]
            .map(|name| format!("---- the end of {name}\n{}\n", tail(&self.path(name))))
            .concat()
    }

    /// Ends and removes everything. What is gone already is no error.
    fn tear_down(&self) {
        self.ended.store(true, Ordering::SeqCst);
        let containers = std::mem::take(&mut *lock(&self.containers));
        let remove = |(namespace, id): &(String, String)| {
            let quietly = |arguments: &[&str]| {
                let done = self.ctr_command_in(namespace, arguments).and_then(|mut command| {
                    Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).status()?)
                });
                done.is_ok_and(|status| status.success())
            };
            quietly(&["task", "resume", id]);
            quietly(&["task", "rm", "--force", id]);
            quietly(&["container", "rm", id]);
        };
        thread::scope(|scope| {
            for some in containers.chunks(containers.len().div_ceil(4).max(1)) {
                scope.spawn(move || some.iter().for_each(remove));
            }
        });
        let pods = std::mem::take(&mut *lock(&self.pods));
        for id in &pods {
            // Refused for a container's ID. A sandbox is removed with its containers.
            let _ = self.cri().remove_pod_sandbox(id);
        }
        for child in [&self.driftd, &self.containerd] {
            if let Some(mut child) = lock(child).take() {
                end(&mut child);
            }
        }
        // A shim outlives its containerd.
        for left in processes_naming(self.directory.path()) {
            let _ = kill(left, Signal::SIGKILL);
        }
        end_cgroups(&self.namespace);
        self.unmount_leftovers();
        for (namespace, id) in &containers {
            self.remove_runtime_leftovers(namespace, id);
        }
        for id in &pods {
            self.remove_runtime_leftovers(KUBERNETES, id);
        }
    }

    /// Removes what runc and shims keep below `/run/containerd`, whatever containerd's settings
    /// are, and leave behind when they are killed.
    pub(crate) fn remove_runtime_leftovers(&self, namespace: &str, id: &str) {
        let name = self.path("containerd.sock").join(namespace).join(id);
        let name = Sha256::digest(name.as_os_str().as_encoded_bytes());
        let _ = fs::remove_file(format!("/run/containerd/s/{}", hex(&name)));
        let runc = Path::new("/run/containerd/runc").join(namespace);
        let _ = fs::remove_dir_all(runc.join(id));
        // A directory that is still in use is not empty, and stays.
        let _ = fs::remove_dir(runc);
        for directory in ["runc", "fifo", "s", ""] {
            let _ = fs::remove_dir(Path::new("/run/containerd").join(directory));
        }
    }

    fn unmount_leftovers(&self) {
        let directory = self.directory.path().as_os_str().to_string_lossy().into_owned();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mut points: Vec<&str> = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(1))
            .filter(|point| point.starts_with(&directory))
            .collect();
        points.reverse();
        for point in points {
            let _ = Command::new("umount").arg("--lazy").arg(point).status();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.tear_down();
    }
}

/// Ends a daemon: SIGTERM, and after ten seconds SIGKILL.
pub(crate) fn end(child: &mut Child) {
    if let Ok(pid) = child.id().try_into() {
        let pid = Pid::from_raw(pid);
        let _ = kill(pid, Signal::SIGTERM);
        let _ = kill(pid, Signal::SIGCONT);
    }
    let ended = wait_within(Duration::from_secs(10), "a daemon to end", || Ok(child.try_wait()?));
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// A follower that never reads.
pub(crate) struct Deaf(Child);

impl Deaf {
    pub(crate) fn start(node: &Node) -> anyhow::Result<Deaf> {
        let mut command = node.driftd_command(&["findings", "--follow", "-o", "jsonl"]);
        Ok(Deaf(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?))
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Processes whose command line names `directory`, which only this node uses: shims, and
/// clients of a daemon that has ended.
fn processes_naming(directory: &Path) -> Vec<Pid> {
    let needle = directory.as_os_str().as_encoded_bytes();
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.windows(needle.len()).any(|window| window == needle))
        })
        .map(Pid::from_raw)
        .collect()
}

/// Removes a directory into which a test may still be writing.
fn remove(directory: &Path) {
    for _ in 0..50 {
        match fs::remove_dir_all(directory) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => {
                thread::sleep(Duration::from_millis(50));
            }
            _ => return,
        }
    }
    eprintln!("could not remove {}", directory.display());
}

/// Ends what is left in the cgroups, and removes them. runc removes a container's cgroup and
/// leaves the namespace's behind; a container whose shim was killed is still in its own.
fn end_cgroups(namespace: &str) {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let roots = hierarchies.map(|entry| entry.path()).chain([PathBuf::from("/sys/fs/cgroup")]);
    let ours: Vec<PathBuf> =
        roots.map(|root| root.join(namespace)).filter(|ours| ours.is_dir()).collect();
    let containers: Vec<PathBuf> = ours
        .iter()
        .flat_map(|ours| fs::read_dir(ours).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    let all_gone = wait_within(Duration::from_secs(5), "containers to end", || {
        let mut alive = false;
        for container in &containers {
            let members = fs::read_to_string(container.join("cgroup.procs")).unwrap_or_default();
            let members = members.lines().filter_map(|line| line.parse().ok());
            // The kernel writes 0 for a process that this pid namespace does not show, and
            // a signal to 0 ends the tests themselves.
            for pid in members.filter(|pid| *pid > 0) {
                alive = true;
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        Ok((!alive).then_some(()))
    });
    if let Err(err) = all_gone {
        eprintln!("{namespace}: {err}");
    }
    for directory in containers.iter().chain(&ours) {
        let _ = fs::remove_dir(directory);
    }
}

/// How the tests control a container's init: by a directory of the host that the container
/// has as `/.control`, and two pipes in it.
pub(crate) struct Control {
    pub(crate) path: PathBuf,
    commands: File,
    done: File,
    next: AtomicU32,
}

impl Control {
    /// The tests' commands run in children of init, because a process from outside would be a
    /// session.
    pub(crate) const INIT: &str = "exec 9>/.control/done; exec </.control/commands; \
        while read -r n; do \
        ( . /.control/command.$n ) </dev/null >/.control/output.$n 2>&1; \
        echo \"$n $?\" >&9; done";

    pub(crate) fn new(node: &Node, name: &str) -> anyhow::Result<Control> {
        let path = node.path(&format!("control-{name}"));
        fs::create_dir(&path)?;
        let (commands, done) = (path.join("commands"), path.join("done"));
        for fifo in [&commands, &done] {
            nix::unistd::mkfifo(fifo, nix::sys::stat::Mode::S_IRWXU)?;
        }
        // Open for both directions, so that neither side ever waits for the other.
        let both = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let (commands, done) = (both(&commands)?, both(&done)?);
        Ok(Control { path, commands, done, next: AtomicU32::new(1) })
    }
}

/// A running container whose init runs the tests' commands.
pub(crate) struct Container<'a> {
    pub(crate) node: &'a Node,
    pub(crate) id: String,
    /// containerd's namespace.
    namespace: String,
    control: Control,
}

/// What a command in a container printed, and how it ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) status: i32,
    pub(crate) output: String,
}

impl<'a> Container<'a> {
    /// A container that the test has started by itself, with [`Control::INIT`].
    pub(crate) fn new(node: &'a Node, id: String, control: Control) -> Container<'a> {
        Container { node, id, namespace: node.namespace.clone(), control }
    }
}

impl Container<'_> {
    /// Lays a file where the container sees it as `/.control/NAME`: what a
    /// scenario would have downloaded.
    pub(crate) fn lay(&self, name: &str, content: &[u8]) -> anyhow::Result<()> {
        let path = self.control.path.join(name);
        fs::write(&path, content)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(())
    }

    /// The path on the host of a file that was laid.
    pub(crate) fn laid(&self, name: &str) -> PathBuf {
        self.control.path.join(name)
    }

    /// Lays a program that no image has, and that differs from every other.
    pub(crate) fn lay_payload(&self, name: &str) -> anyhow::Result<()> {
        let mark = format!("{} {} {name}", self.node.namespace, self.id);
        self.lay(name, &bench()?.payload.marked(&mark))
    }

    /// Drops a program that no image has at `/tmp/NAME`, and runs it.
    pub(crate) fn run_dropped(&self, name: &str) -> anyhow::Result<()> {
        self.lay_payload(name)?;
        self.sh(&format!("cp /.control/{name} /tmp/{name}; /tmp/{name}")).map(drop)
    }

    /// Runs shell commands as a descendant of init.
    pub(crate) fn try_sh(&self, commands: &str) -> anyhow::Result<Ran> {
        self.begin(commands)?.finish(DEADLINE)
    }

    /// Runs shell commands that must succeed, and hands back what they printed.
    pub(crate) fn sh(&self, commands: &str) -> anyhow::Result<String> {
        let ran = self.try_sh(&format!("set -e\n{commands}"))?;
        ensure!(ran.status == 0, "in {}: {commands}\nended with {ran:?}", self.id);
        Ok(ran.output)
    }

    /// Starts shell commands and does not wait for their end.
    pub(crate) fn begin(&self, commands: &str) -> anyhow::Result<Running<'_>> {
        let control = &self.control;
        let number = control.next.fetch_add(1, Ordering::Relaxed);
        fs::write(control.path.join(format!("command.{number}")), commands)?;
        (&control.commands).write_all(format!("{number}\n").as_bytes())?;
        Ok(Running { container: self, number })
    }

    /// The pid of its init, on the host.
    pub(crate) fn init(&self) -> anyhow::Result<i32> {
        let tasks = self.node.ctr_in(&self.namespace, &["task", "ls"])?;
        let mut lines = tasks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let line = lines.find(|line| line.first() == Some(&self.id.as_str()));
        line.and_then(|line| line.get(1)?.parse().ok()).context("its task is not listed")
    }

    pub(crate) fn wait_until_watched(&self) -> anyhow::Result<()> {
        self.node.wait_until_watched(&self.id)
    }

    /// Ends init and waits until the task is gone.
    pub(crate) fn stop(&self) -> anyhow::Result<()> {
        self.node.ctr(&["task", "kill", "--signal", "SIGKILL", &self.id])?;
        wait_for(&format!("{} to end", self.id), || {
            Ok(self.node.ctr(&["task", "delete", &self.id]).ok())
        })
        .map(drop)
    }

    /// Ends the container and removes it with its layer.
    pub(crate) fn remove(&self) -> anyhow::Result<()> {
        self.node.ctr(&["task", "rm", "--force", &self.id])?;
        self.node.ctr(&["container", "rm", &self.id]).map(drop)
    }

    /// Starts init again, on the same layer of its own.
    pub(crate) fn start_again(&self) -> anyhow::Result<()> {
        let fifo = self.node.path("fifo");
        let options = ["task", "start", "-d", "--fifo-dir", &fifo.to_string_lossy()];
        self.node.ctr(&[&options[..], &[&self.id]].concat())?;
        self.wait_until_watched()
    }

    /// Scans the container's own layer now. driftd has judged it when this returns.
    pub(crate) fn diff(&self) -> anyhow::Result<Vec<Value>> {
        self.node.answer(&["diff", &self.id])
    }

    /// This container's findings, oldest first.
    pub(crate) fn findings(&self) -> anyhow::Result<Vec<Value>> {
        let mut findings = self.node.answer(&["findings", "--container", &self.id])?;
        findings.sort_by_key(|finding| finding["first_seen"].as_str().map(str::to_owned));
        Ok(findings)
    }

    /// Waits until driftd has reported exactly `expected`, each as `SEVERITY KIND PATH`, and
    /// makes sure that nothing is added when all is settled.
    pub(crate) fn expect_findings(&self, expected: &[&str]) -> anyhow::Result<Vec<Value>> {
        let mut expected: Vec<String> = expected.iter().map(|line| (*line).to_owned()).collect();
        expected.sort();
        let (mut findings, mut lines) = (Vec::new(), Vec::new());
        let waited = wait_for("the findings", || {
            findings = self.findings()?;
            lines = summaries(&findings);
            Ok((lines == expected).then_some(()))
        });
        if waited.is_err() {
            bail!("{findings:#?}\nreported in {}: {lines:#?}\nexpected: {expected:#?}", self.id);
        }
        thread::sleep(SETTLE + Duration::from_millis(200));
        self.diff()?;
        thread::sleep(Duration::from_millis(400));
        findings = self.findings()?;
        lines = summaries(&findings);
        ensure!(
            lines == expected,
            "{findings:#?}\nreported in {}, once settled: {lines:#?}\nexpected: {expected:#?}",
            self.id
        );
        Ok(findings)
    }

    /// Waits until the only finding of a kind is counted so often. `expect_findings` does not
    /// wait for counts.
    pub(crate) fn counted(&self, kind: &str, times: u64) -> anyhow::Result<()> {
        let mut counted = 0;
        wait_for(&format!("{kind} to be counted {times} times"), || {
            let findings = self.findings()?;
            let mut of_kind = findings.iter().filter(|finding| finding["kind"] == kind);
            counted = of_kind.next().and_then(|one| one["count"].as_u64()).unwrap_or(0);
            ensure!(of_kind.next().is_none(), "more than one {kind} in {findings:#?}");
            Ok((counted >= times).then_some(()))
        })
        .with_context(|| format!("{kind} was counted {counted} times"))?;
        ensure!(counted == times, "{kind} was counted {counted} times, and not {times} times");
        Ok(())
    }

    /// Makes sure that driftd reports nothing, and that it is not blind: a canary that is
    /// dropped afterwards is the only finding.
    pub(crate) fn expect_silence(&self) -> anyhow::Result<()> {
        thread::sleep(SETTLE + Duration::from_millis(200));
        self.diff()?;
        self.run_dropped("canary")?;
        self.expect_findings(&["critical exec.new /tmp/canary"]).map(drop)
    }
}

/// A command that may still be running in a container.
pub(crate) struct Running<'a> {
    container: &'a Container<'a>,
    number: u32,
}

impl Running<'_> {
    pub(crate) fn finish(self, within: Duration) -> anyhow::Result<Ran> {
        let Running { container, number } = self;
        let wanted = format!("{number} ");
        let mut line = String::new();
        let deadline = Instant::now() + within;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "{}: command {number} did not end in {within:?}",
                container.id
            );
            let fd = nix::poll::PollFd::new(
                std::os::fd::AsFd::as_fd(&container.control.done),
                nix::poll::PollFlags::POLLIN,
            );
            let timeout = nix::poll::PollTimeout::try_from(left)?;
            if nix::poll::poll(&mut [fd], timeout)? == 0 {
                continue;
            }
            let mut byte = [0];
            (&container.control.done).read_exact(&mut byte)?;
            if byte[0] != b'\n' {
                line.push(char::from(byte[0]));
                continue;
            }
            if let Some(status) = line.strip_prefix(&wanted) {
                let output = fs::read(container.control.path.join(format!("output.{number}")))?;
                return Ok(Ran {
                    status: status.parse()?,
                    output: String::from_utf8_lossy(&output).into_owned(),
                });
            }
            line.clear();
        }
    }
}

/// Findings as `SEVERITY KIND PATH`, sorted.
pub(crate) fn summaries(findings: &[Value]) -> Vec<String> {
    let word = |value: &Value| value.as_str().unwrap_or("").to_owned();
    let mut lines: Vec<String> = findings
        .iter()
        .map(|finding| {
            let path = &finding["file"]["path"];
            format!("{} {} {}", word(&finding["severity"]), word(&finding["kind"]), word(path))
                .trim_end()
                .to_owned()
        })
        .collect();
    lines.sort();
    lines
}

/// The one finding of this kind.
pub(crate) fn only<'a>(findings: &'a [Value], kind: &str) -> anyhow::Result<&'a Value> {
    let mut of_kind = findings.iter().filter(|finding| finding["kind"] == kind);
    let one = of_kind.next().with_context(|| format!("no {kind} in {findings:#?}"))?;
    ensure!(of_kind.next().is_none(), "more than one {kind} in {findings:#?}");
    Ok(one)
}

/// The names of an image in a line of `driftd baseline ls`.
pub(crate) fn names(baseline: &Value) -> Vec<&str> {
    baseline["names"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

pub(crate) fn known_as(baseline: &Value, known_by: &str) -> bool {
    baseline["known_by"] == known_by
}

/// Repeats `attempt` until it returns a value.
pub(crate) fn wait_for<T>(
    what: &str,
    attempt: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    wait_within(DEADLINE, what, attempt)
}

pub(crate) fn wait_within<T>(
    within: Duration,
    what: &str,
    mut attempt: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(value) = attempt()? {
            return Ok(value);
        }
        ensure!(Instant::now() < deadline, "waited {within:?} for {what} in vain");
        thread::sleep(Duration::from_millis(100));
    }
}

/// What a command printed, on both streams.
pub(crate) fn talk(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Starts a daemon whose output is appended to `log`.
pub(crate) fn spawn_daemon(command: &mut Command, log: &Path) -> anyhow::Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(log)?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().display()))
}

/// The last lines of a log.
pub(crate) fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}

/// Locks also after a panic: a test that panicked has left nothing half done.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
