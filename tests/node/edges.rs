//! Unusual surroundings: layers that a process serves, mounts in namespaces of their own, a
//! process in another container's mount namespace, and memory that runs out.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::mount::{UnmountFlags, unmount};
use serde_json::Value;

use crate::door::{driftd_ends, wait_until_reported};
use crate::gate::{Processes, held_up, is_there, stop, watches_again};
use crate::image::Layer;
use crate::node::{Container, Node, bench, only, wait_for, wait_within};
use crate::sessions::init;
use crate::{executable, programs, test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("x01_layers_that_a_process_serves_block_no_process", "", x01_served_layers),
        test_alone("x01_no_program_waits_when_driftd_runs_out_of_memory", "", x01_memory),
        test("x13_a_program_in_another_mount_namespace_is_a_finding_of_its_caller", x13_entered),
        test("x05_programs_on_mounts_over_watched_paths_are_reported", x05_covered),
    ]
}

// ---- layers on FUSE

/// The usual image and one layer more, which a process serves.
const SERVED: &str = "docker.io/driftd/served:1";

/// A snapshot's directory on which a process serves one file, as FUSE snapshotters do.
/// When it is dropped, a process that waits for it goes on with an error.
struct ServedLayer {
    server: Child,
    directory: PathBuf,
    log: PathBuf,
}

impl ServedLayer {
    /// Serves the layer that holds the file `/served`, to every process except driftd.
    fn mount(node: &Node) -> anyhow::Result<ServedLayer> {
        let snapshots = node.path("root/io.containerd.snapshotter.v1.overlayfs/snapshots");
        let directory = fs::read_dir(&snapshots)?
            .filter_map(|snapshot| Some(snapshot.ok()?.path().join("fs")))
            .find(|directory| directory.join("served").exists())
            .context("the layer is not unpacked")?;
        let (program, source) = (node.path("serve-layer"), node.path("served"));
        executable::write(&program, bench()?.payload.fuse_server())?;
        fs::copy(directory.join("served"), &source)?;
        let log = node.path("served.log");
        let server = Command::new(&program)
            .arg("drop")
            .arg(&directory)
            .arg(&log)
            .arg(format!("served={}", source.display()))
            .stdin(Stdio::null())
            .spawn()?;
        let layer = ServedLayer { server, directory, log };
        let line = format!(" {} ", layer.directory.display());
        wait_for("the layer to be served", || {
            let mounts = fs::read_to_string("/proc/self/mountinfo")?;
            let is_there =
                mounts.lines().any(|mount| mount.contains(&line) && mount.contains(" - fuse "));
            Ok(is_there.then_some(()))
        })?;
        Ok(layer)
    }

    /// Requests that were left unanswered, each with the name of its process.
    fn unanswered(&self) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines().map(ToOwned::to_owned).collect()
    }

    fn stop_answering(&self) -> anyhow::Result<()> {
        Ok(kill(Pid::from_raw(self.server.id().try_into()?), Signal::SIGUSR2)?)
    }

    fn driftd_asked_nothing(&self) -> anyhow::Result<()> {
        let asked: Vec<_> =
            self.unanswered().into_iter().filter(|line| line.ends_with(" driftd")).collect();
        ensure!(asked.is_empty(), "driftd asked: {asked:?}");
        Ok(())
    }
}

impl Drop for ServedLayer {
    fn drop(&mut self) {
        // With the server, its connection ends.
        let _ = self.server.kill();
        let _ = self.server.wait();
        let _ = unmount(&self.directory, UnmountFlags::DETACH);
    }
}

fn x01_served_layers(node: &Node) -> anyhow::Result<()> {
    let payload = &bench()?.payload;
    let mut layers = programs::workbench(payload)?;
    layers.push(Layer::new().file("/served", 0o755, &payload.marked("served")));
    node.import_layers(SERVED, layers)?;
    node.wait_until_known_as(SERVED, "verified")
        .or_else(|_| node.wait_until_known_as(SERVED, "recorded"))?;
    let neighbour = node.container()?;
    let layer = ServedLayer::mount(node)?;
    let container = node.container_of(SERVED)?;
    container.lay_payload("x")?;
    // The image's own programs are silent. Dropped or changed ones are reported with a hash.
    container.sh("/served; /usr/bin/app; /bin/ls /; bash -c 'true; /usr/bin/app'
        sh /docker-entrypoint.d/10-x.sh
        cp /.control/x /tmp/x; /tmp/x
        echo more >> /usr/sbin/nginx; /usr/sbin/nginx
        echo 'sleep 0.5' > /tmp/i.sh; sh /tmp/i.sh
        cd /tmp; printf '#!/bin/sh\\nsleep 0.5\\n' > s; chmod +x s; ./s")?;
    let expected = [
        ("exec.new", "/tmp/x"),
        ("exec.modified", "/usr/sbin/nginx"),
        ("exec.interpreted", "/tmp/i.sh"),
        ("exec.script", "/tmp/s"),
    ];
    let findings = wait_until_reported(&container, &expected)?;
    for (kind, _) in &expected {
        ensure!(only(&findings, kind)?["file"]["blake3"].is_string(), "{findings:#?}");
    }
    container.diff()?;
    layer.driftd_asked_nothing()?;
    let is_run = |one: &&Value| one["kind"].as_str().is_some_and(|kind| kind.starts_with("exec."));
    let findings = container.findings()?;
    assert_eq!(findings.iter().filter(is_run).count(), expected.len(), "{findings:#?}");
    // What driftd cannot see is named for as long as the container exists.
    let status = node.status()?;
    ensure!(status["complete"] == false, "{status:#}");
    ensure!(status.to_string().contains(&layer.directory.display().to_string()), "{status:#}");
    assert_eq!(node.losses("foreign_layers")?, 1);

    // Now the server hangs, and a program of its layer with it.
    layer.stop_answering()?;
    let _waits = container.begin("/served")?;
    wait_within(Duration::from_secs(5), "a request", || {
        Ok((!layer.unanswered().is_empty()).then_some(()))
    })?;
    driftd_ends(node, &neighbour, &|| layer.driftd_asked_nothing())?;
    drop(layer);
    Ok(())
}

// ---- memory

/// A control group of the test's own whose processes get no more memory. When it is dropped,
/// processes that are still in it are moved out.
struct SmallMemory {
    directory: PathBuf,
    out: PathBuf,
    kills: &'static str,
}

impl SmallMemory {
    fn new(node: &Node) -> anyhow::Result<SmallMemory> {
        let name = format!(
            "{}-memory-{}",
            node.path("").file_name().and_then(|name| name.to_str()).context("a name")?,
            node.next_id()
        );
        let (old, new) = (Path::new("/sys/fs/cgroup/memory"), Path::new("/sys/fs/cgroup"));
        let (root, limit, kills) = if old.join("memory.limit_in_bytes").exists() {
            (old, "memory.limit_in_bytes", "memory.oom_control")
        } else {
            let _ = fs::write(new.join("cgroup.subtree_control"), "+memory");
            (new, "memory.max", "memory.events")
        };
        let directory = root.join(name);
        fs::create_dir(&directory).with_context(|| format!("{}", directory.display()))?;
        let group = SmallMemory { directory, out: root.join("cgroup.procs"), kills };
        fs::write(group.directory.join(limit), "65536")
            .context("there is no memory controller to limit memory with")?;
        Ok(group)
    }

    fn take_in(&self, process: Pid) -> anyhow::Result<()> {
        Ok(fs::write(self.directory.join("cgroup.procs"), process.to_string())?)
    }

    /// Whether the kernel has killed one of its processes for memory.
    fn has_killed(&self) -> anyhow::Result<bool> {
        let text = fs::read_to_string(self.directory.join(self.kills))?;
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(count.context("the kernel counts no kills")? != "0")
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        let procs = fs::read_to_string(self.directory.join("cgroup.procs")).unwrap_or_default();
        for process in procs.lines() {
            let _ = fs::write(&self.out, process);
        }
        let _ = fs::remove_dir(&self.directory);
    }
}

fn x01_memory(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    for which in ["gate", "daemon"] {
        let processes = Processes::of(node)?;
        let memory = SmallMemory::new(node)?;
        let victim = if which == "gate" { processes.gate } else { processes.daemon };
        memory.take_in(victim)?;
        // Each execution needs memory: for a descriptor, and for a place in a queue.
        if which == "gate" {
            stop(processes.daemon)?;
        }
        let begun = Instant::now();
        let storm = "i=0; while [ $i -lt 3000 ]; do /usr/bin/tiny; i=$((i + 1)); done";
        let ran = container.begin(storm)?.finish(Duration::from_secs(60));
        if ran.is_err() {
            let _ = [processes.gate, processes.daemon].map(|pid| kill(pid, Signal::SIGKILL));
        }
        ensure!(ran?.status == 0, "a program was refused");
        wait_for("the kernel to kill it", || {
            let _ = node.driftd(&["status"]);
            Ok(memory.has_killed()?.then_some(()))
        })
        .with_context(|| which.to_owned())?;
        wait_for("it to end", || Ok((!is_there(victim)).then_some(())))?;
        eprintln!("{which}: {:?}", begun.elapsed());
        let took = held_up(&container, &processes)?;
        ensure!(took < Duration::from_secs(2), "programs were held up for {took:?}");
        if which == "gate" {
            kill(processes.daemon, Signal::SIGCONT)?;
        }
        drop(memory);
        node.driftd_ended(Duration::from_secs(15))?;
        if which == "daemon" {
            return watches_again(node, &container);
        }
        node.start_driftd()?;
        container.wait_until_watched()?;
    }
    Ok(())
}

// ---- mount namespaces

/// Findings of code that was run.
fn runs(container: &Container<'_>) -> anyhow::Result<Vec<String>> {
    let mut runs: Vec<String> = container
        .findings()?
        .iter()
        .filter_map(|finding| {
            let kind = finding["kind"].as_str().filter(|kind| kind.starts_with("exec."))?;
            Some(format!("{kind} {}", finding["file"]["path"].as_str()?))
        })
        .collect();
    runs.sort();
    Ok(runs)
}

fn x13_entered(node: &Node) -> anyhow::Result<()> {
    let volume = node.path(&format!("volume-{}", node.next_id()));
    fs::create_dir(&volume)?;
    let bind = format!("type=bind,src={},dst=/vol,options=rbind:rw", volume.display());
    let tmpfs = "type=tmpfs,src=tmpfs,dst=/mnt/t,options=rw:mode=1777";
    let owner = node.container_with(&["--mount", &bind, "--mount", tmpfs])?;
    let namespace = format!("pid:/proc/{}/ns/pid", init(&owner)?);
    let caller = node.container_with(&["--privileged", "--with-ns", &namespace])?;
    owner.lay_payload("x")?;
    owner.sh("cp /.control/x /tmp/x; cp /.control/x /mnt/t/x; cp /.control/x /vol/x")?;
    caller.sh("for x in /mnt/t/x /vol/x /tmp/x; do
            /bin/busybox nsenter -t 1 -m $x
            /bin/busybox nsenter -t 1 -m $x 300
        done
        /bin/busybox nsenter -t 1 -m /usr/bin/app")?;
    let expected = ["exec.new /tmp/x", "exec.tmpfs /mnt/t/x", "exec.volume /vol/x"];
    wait_for("the caller's findings", || {
        let runs = runs(&caller)?;
        Ok(expected.iter().all(|one| runs.contains(&(*one).to_owned())).then_some(()))
    })
    .with_context(|| format!("{:#?}\n{:#?}", caller.findings(), owner.findings()))?;
    owner.diff()?;
    caller.diff()?;
    let in_memory = caller.findings()?.into_iter().find(|one| one["kind"] == "exec.tmpfs");
    let detail = in_memory.context("it is there")?["detail"].to_string();
    ensure!(detail.contains(&owner.id), "it does not name the container of the file: {detail}");
    assert_eq!(runs(&owner)?, Vec::<String>::new(), "{:#?}", owner.findings()?);
    Ok(())
}

fn x05_covered(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--cap-add", "CAP_SYS_ADMIN"])?;
    container.lay_payload("x")?;
    container.sh("mkdir -p /tmp/b; cp /.control/x /tmp/b/bound
        cat >/tmp/covered <<'E'
        m() { /bin/busybox mount \"$@\"; }
        m -t tmpfs t /usr/sbin; cp /.control/x /usr/sbin/intmpfs; /usr/sbin/intmpfs; /usr/sbin/intmpfs 500
        m --bind /tmp/b /usr/lib; /usr/lib/bound
        m -t tmpfs t /mnt; mkdir /mnt/u /mnt/w
        m -t overlay -o lowerdir=/app,upperdir=/mnt/u,workdir=/mnt/w o /app
        cp /.control/x /app/inoverlay; /app/inoverlay; /app/inoverlay 500
E
        /bin/busybox unshare -m sh /tmp/covered")?;
    let expected = [
        ("exec.tmpfs", "/usr/sbin/intmpfs"),
        ("exec.new", "/bound"),
        ("exec.new", "/app/inoverlay"),
    ];
    wait_until_reported(&container, &expected).map(drop)
}
