//! Docker, with both of its kinds of storage: its own overlay2, of which containerd knows
//! nothing, and containerd's snapshots. `make test-docker` unpacks two versions of it and
//! runs these tests; without that they are shown as ignored.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{
    Container, Control, Node, Setup, bench, end, lock, spawn_daemon, tail, talk, wait_for,
};
use crate::programs::WORKBENCH;
use crate::run_without_driftd;
use crate::sessions::User;

/// The directory with the `sbin/dockerd` and the `bin/docker` to be used.
const WHERE: &str = "DRIFTD_TEST_DOCKER";

pub(crate) fn tests() -> Vec<Trial> {
    let test = |name, test: fn(&Arc<Node>) -> anyhow::Result<()>| {
        Trial::test(name, move || run_without_driftd(Setup::default(), test))
            .with_ignored_flag(true)
    };
    vec![
        test("docker_with_overlay2_is_watched", |node| watched(node, Storage::Overlay2)),
        test("docker_with_overlay2_separates_users_from_health_checks", |node| {
            users(node, Storage::Overlay2)
        }),
        // These need Docker 23 or later.
        test("docker_with_containerds_images_separates_users_from_health_checks", |node| {
            users(node, Storage::Images)
        }),
        test("docker_with_containerds_images_is_watched", |node| watched(node, Storage::Images)),
        test("docker_with_overlay2_leaves_a_killed_container_stopped", stopped),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Storage {
    Overlay2,
    Images,
}

/// A Docker daemon on a node's containerd.
struct Docker {
    node: Arc<Node>,
    programs: PathBuf,
    daemon: Mutex<Option<Child>>,
}

impl Docker {
    fn start(node: &Arc<Node>, storage: Storage) -> anyhow::Result<Docker> {
        let programs: PathBuf = std::env::var_os(WHERE)
            .with_context(|| {
                format!("{WHERE} does not say where Docker is (run: make test-docker)")
            })?
            .into();
        for program in ["sbin/dockerd", "bin/docker"] {
            let program = programs.join(program);
            ensure!(program.is_file(), "no {} (run: make test-docker)", program.display());
        }
        let directory = node.path("docker");
        fs::create_dir(&directory)?;
        let at = |name: &str| directory.join(name).display().to_string();
        let mut settings = serde_json::json!({
            "features": { "containerd-snapshotter": storage == Storage::Images },
            "data-root": at("root"),
            "exec-root": at("exec"),
            "pidfile": at("pid"),
            "hosts": [format!("unix://{}", at("docker.sock"))],
            "containerd": node.path("containerd.sock"),
            "bridge": "none",
            "iptables": false,
            "userland-proxy": false,
            "cgroup-parent": format!("/{}", node.namespace),
        });
        if storage == Storage::Overlay2 {
            settings["storage-driver"] = "overlay2".into();
        }
        let file = directory.join("daemon.json");
        fs::write(&file, settings.to_string())?;
        let mut command = Command::new(programs.join("sbin/dockerd"));
        command.arg("--config-file").arg(&file);
        let daemon = spawn_daemon(&mut command, &node.path("docker.log"))?;
        let docker = Docker { node: Arc::clone(node), programs, daemon: Mutex::new(Some(daemon)) };
        wait_for("dockerd to answer", || {
            if let Some(status) = lock(&docker.daemon).as_mut().context("started")?.try_wait()? {
                anyhow::bail!("dockerd ended: {status}\n{}", tail(&node.path("docker.log")));
            }
            Ok(docker.docker(&["version"]).is_ok().then_some(()))
        })?;
        Ok(docker)
    }

    fn docker(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = Command::new(self.programs.join("bin/docker"))
            .arg("--host")
            .arg(format!("unix://{}", self.node.path("docker/docker.sock").display()))
            .args(arguments)
            .env("DOCKER_CONFIG", self.node.path("docker/client"))
            .stdin(Stdio::null())
            .output()?;
        ensure!(
            output.status.success(),
            "docker {arguments:?} failed\n{}\n{}",
            talk(&output),
            tail(&self.node.path("docker.log"))
        );
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts a container whose init runs the tests' commands.
    fn run(&self, image: &str) -> anyhow::Result<Container<'_>> {
        self.run_with(&[], image)
    }

    fn run_with(&self, more: &[&str], image: &str) -> anyhow::Result<Container<'_>> {
        self.start_with(more, &[image, "/bin/sh", "-c", Control::INIT])
    }

    fn start_with(&self, more: &[&str], command: &[&str]) -> anyhow::Result<Container<'_>> {
        let control = Control::new(&self.node, &self.node.next_id())?;
        let mount = format!("{}:/.control", control.path.display());
        let options = ["run", "--detach", "--network", "none", "--volume", &mount];
        let id = self.docker(&[&options[..], more, command].concat())?;
        Ok(Container::new(&self.node, id, control))
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if let Ok(containers) = self.docker(&["ps", "--all", "--quiet", "--no-trunc"]) {
            for container in containers.lines() {
                let _ = self.docker(&["rm", "--force", container]);
                self.node.remove_runtime_leftovers("moby", container);
            }
        }
        if let Some(mut daemon) = lock(&self.daemon).take() {
            end(&mut daemon);
        }
    }
}

fn watched(node: &Arc<Node>, storage: Storage) -> anyhow::Result<()> {
    let docker = Docker::start(node, storage)?;
    docker.docker(&["load", "--input", path(&bench()?.workbench)?])?;
    let driver = docker.docker(&["info", "--format", "{{json .DriverStatus}} {{.Driver}}"])?;
    let uses_images = driver.contains("io.containerd.snapshotter");
    ensure!(uses_images == (storage == Storage::Images), "Docker uses another storage: {driver}");
    node.start_driftd()?;

    let container = docker.run(WORKBENCH)?;
    container.wait_until_watched()?;
    let known = node.answer(&["containers"])?;
    let this = known.iter().find(|one| one["id"] == container.id.as_str());
    let this = this.with_context(|| format!("{} is not in {known:#?}", container.id))?;
    assert_eq!(this["namespace"], "moby", "{this:#}");
    assert_eq!(this["problem"], Value::Null, "{this:#}");

    // The files that Docker itself adds to the container are no drift.
    container.sh("cat /etc/hosts /etc/hostname /etc/resolv.conf; /usr/bin/app")?;
    container.expect_findings(&[])?;

    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x; /tmp/x\n\
         cat /.control/x > /usr/bin/curl; /usr/bin/curl; cp /bin/ls /bin/.cache-ls; /bin/.cache-ls")?;
    container.expect_findings(&[
        "critical exec.new /tmp/x",
        "critical exec.modified /usr/bin/curl",
        "medium exec.relocated /bin/.cache-ls",
    ])?;

    // A restart of driftd in the middle of it finds the same container again.
    node.stop_driftd()?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    let second = docker.run(WORKBENCH)?;
    second.wait_until_watched()?;
    second.expect_silence()
}

/// The container's own health check is counted, and a user is a session.
fn users(node: &Arc<Node>, storage: Storage) -> anyhow::Result<()> {
    let docker = Docker::start(node, storage)?;
    docker.docker(&["load", "--input", path(&bench()?.workbench)?])?;
    node.start_driftd()?;
    let check = ["--health-cmd", "/bin/cat /etc/passwd", "--health-interval", "1s"];
    let container = docker.run_with(&check, WORKBENCH)?;
    container.wait_until_watched()?;
    let counted = || -> anyhow::Result<u64> {
        let probes = node.answer(&["probes", "-c", &container.id])?;
        let own = probes.iter().find(|probe| probe["source"] == "healthcheck");
        Ok(own.and_then(|probe| probe["count"].as_u64()).unwrap_or(0))
    };
    wait_for("the health check to be counted", || Ok((counted()? >= 3).then_some(())))?;
    assert_eq!(container.findings()?, Vec::<Value>::new());
    assert_eq!(node.answer(&["sessions", "-c", &container.id])?, Vec::<Value>::new());

    let client = format!(
        "{} --host unix://{}",
        docker.programs.join("bin/docker").display(),
        node.path("docker/docker.sock").display(),
    );
    let mut user = User::at(&format!("{client} exec -it {} /bin/sh", container.id))?;
    user.types("/bin/ls /\nexit 4\n")?;
    user.leaves()?;
    let session = wait_for("the session's end", || {
        let sessions = node.answer(&["sessions", "-c", &container.id])?;
        ensure!(sessions.len() < 2, "{sessions:#?}");
        let is_whole =
            |session: &Value| session["state"] == "closed" && session["exec_id"].is_string();
        Ok(sessions.into_iter().find(is_whole))
    })?;
    assert_eq!((&session["client"], &session["entry"]), (&"docker".into(), &"runtime_exec".into()));
    assert_eq!(
        (&session["interactive"], &session["exit"]["code"]),
        (&"terminal".into(), &4.into())
    );
    ensure!(session["exec_id"].is_string(), "{session:#}");
    container.expect_findings(&["medium session.interactive"])?;

    // A user who types at the terminal of init is a session, although Docker opens nothing.
    let shell = docker.start_with(&["--interactive", "--tty"], &[WORKBENCH, "/bin/sh"])?;
    shell.wait_until_watched()?;
    assert_eq!(node.answer(&["sessions", "-c", &shell.id])?, Vec::<Value>::new());
    let mut user = User::at(&format!("{client} attach {}", shell.id))?;
    user.types("/bin/ls /\n")?;
    let session = wait_for("the attached session", || {
        let sessions = node.answer(&["sessions", "-c", &shell.id])?;
        ensure!(sessions.len() < 2, "{sessions:#?}");
        Ok(sessions.into_iter().find(|session| session["commands"] == 1))
    })?;
    assert_eq!(
        (&session["client"], &session["entry"], &session["interactive"]),
        (&"docker".into(), &"attach".into(), &"terminal".into())
    );
    let findings = shell.expect_findings(&["medium session.interactive"])?;
    assert_eq!(findings[0]["session"], session["id"]);
    Ok(())
}

/// Docker starts a killed container again by its policy, and not after `--no-restart`.
fn stopped(node: &Arc<Node>) -> anyhow::Result<()> {
    let docker = Docker::start(node, Storage::Overlay2)?;
    docker.docker(&["load", "--input", path(&bench()?.workbench)?])?;
    node.start_driftd()?;
    let container = docker.run_with(&["--restart", "always"], WORKBENCH)?;
    container.wait_until_watched()?;
    let state = |format: &str| docker.docker(&["inspect", "--format", format, &container.id]);
    let kill = |more: &[&str]| -> anyhow::Result<Value> {
        let kill = ["respond", "kill", &container.id, "--reason", "a test"];
        let answer = node.answer(&[&kill[..], more].concat())?;
        answer.into_iter().next().context("no response")
    };
    let first = state("{{.State.Pid}}")?;
    let response = kill(&[])?;
    ensure!(response["outcome"]["restarter"] == "docker", "{response:#}");
    wait_for("Docker to start it again", || {
        let now = state("{{.State.Running}} {{.State.Pid}}")?;
        Ok((now.starts_with("true") && now != format!("true {first}")).then_some(()))
    })?;
    container.wait_until_watched()?;

    let response = kill(&["--no-restart"])?;
    let message = response["outcome"]["message"].as_str().unwrap_or_default();
    ensure!(message.contains("so that Docker leaves it stopped"), "{response:#}");
    ensure!(response["outcome"]["restarter"].is_null(), "{response:#}");
    wait_for("Docker to know that it has ended", || {
        Ok((state("{{.State.Status}}")? == "exited").then_some(()))
    })?;
    ensure!(state("{{.HostConfig.RestartPolicy.Name}}")? == "no");
    // Docker waits a moment longer before each start in a row, and then would start it again.
    std::thread::sleep(std::time::Duration::from_secs(3));
    ensure!(state("{{.State.Status}}")? == "exited");
    Ok(())
}

fn path(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a scratch directory is UTF-8")
}
