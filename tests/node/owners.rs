//! Which container owns an execution or a change: programs in another container's root,
//! persistence paths that are reached through links and mounts, and process names, which a
//! process chooses itself.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::image::Layer;
use crate::node::{Container, Node, bench, only, wait_for};
use crate::sessions::{self, init};
use crate::{programs, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("x13_a_program_in_another_containers_root_is_a_finding_of_its_caller", x13_root),
        test("x13_a_process_from_the_host_stays_a_session_of_the_container", x13_from_the_host),
        test(
            "x05_a_program_on_a_volume_in_a_mount_namespace_of_its_own_is_reported",
            x05_hidden_volume,
        ),
        test("x15_a_way_around_a_persistence_path_is_reported", x15_ways),
        test("h03_a_process_name_opens_no_session_and_hides_none", h03_names),
    ]
}

/// The usual image and one program more.
const OTHER: &str = "docker.io/driftd/other:1";

/// The owner, a container of an image that has `/usr/bin/nmap` and `/opt/scan.sh`, and the
/// caller, a container of the usual image in the owner's pid namespace (its init is 1 there).
fn two(node: &Node) -> anyhow::Result<(Container<'_>, Container<'_>)> {
    let payload = &bench()?.payload;
    let mut layers = programs::workbench(payload)?;
    let script = "#!/bin/sh\necho scanned\nsleep 1\n";
    layers.push(Layer::new().file("/usr/bin/nmap", 0o755, &payload.marked("nmap")).file(
        "/opt/scan.sh",
        0o755,
        script.as_bytes(),
    ));
    node.import_layers(OTHER, layers)?;
    let owner = node.container_of(OTHER)?;
    let namespace = format!("pid:/proc/{}/ns/pid", init(&owner)?);
    let caller = node.container_with(&["--with-ns", &namespace])?;
    Ok((owner, caller))
}

/// Findings of code that was run.
fn runs(container: &Container<'_>) -> anyhow::Result<Vec<Value>> {
    let mut findings = container.findings()?;
    let is_run = |kind: &str| kind.starts_with("exec.") || kind == "library.loaded";
    findings.retain(|finding| finding["kind"].as_str().is_some_and(is_run));
    Ok(findings)
}

fn x13_root(node: &Node) -> anyhow::Result<()> {
    let (owner, caller) = two(node)?;
    owner.lay_payload("x")?;
    owner.sh("cp /.control/x /tmp/x; /usr/bin/nmap; /opt/scan.sh")?;
    owner.expect_findings(&["low file.added /tmp/x"])?;

    caller.sh("/proc/1/root/usr/bin/nmap")?;
    caller.sh("/proc/1/root/tmp/x; sh /proc/1/root/opt/scan.sh")?;
    caller.sh("busybox chroot /proc/1/root /bin/sh -c '/usr/bin/nmap; :'")?;
    let findings = caller.expect_findings(&[
        "critical exec.new /tmp/x",
        "critical exec.new /usr/bin/nmap",
        // The caller itself: it was started in the owner's pid namespace.
        "info session.exec",
        "medium exec.interpreted /opt/scan.sh",
        "medium exec.relocated /bin/sh",
    ])?;
    for finding in findings.iter().filter(|finding| finding["kind"] != "session.exec") {
        let file = &finding["file"];
        assert_eq!(file["filesystem"], "container", "{finding:#}");
        let detail = finding["detail"].as_str().context("the container of the file")?;
        ensure!(detail.contains(&owner.id), "{finding:#}");
        ensure!(file["blake3"].is_string(), "{finding:#}");
    }
    let nmap = findings.iter().find(|finding| finding["file"]["path"] == "/usr/bin/nmap");
    assert_eq!(nmap.context("nmap")?["count"], 2);
    // The owner ran only its own image's programs, and the caller's executions are not its own.
    owner.expect_findings(&["low file.added /tmp/x"]).map(drop)
}

fn x13_from_the_host(node: &Node) -> anyhow::Result<()> {
    let (owner, caller) = two(node)?;
    sessions::run(&owner, &["--exec-id", "one"], &["/usr/bin/nmap"])?;
    sessions::run(&caller, &["--exec-id", "two"], &["/bin/true"])?;
    // The host runs a container's program by its path.
    let root = PathBuf::from(format!("/proc/{}/root", init(&owner)?));
    let status = Command::new(root.join("usr/bin/nmap")).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "{status}");
    wait_for("the sessions", || {
        let of = |container: &Container<'_>| {
            let sessions = node.answer(&["sessions", "-c", &container.id])?;
            let by_runtime = |session: &&Value| session["entry"] == "runtime_exec";
            Ok::<_, anyhow::Error>(sessions.iter().filter(by_runtime).count())
        };
        // The caller's init is a session too, of another kind.
        Ok((of(&owner)? == 1 && of(&caller)? == 1).then_some(()))
    })?;
    // A canary in each: no other execution is reported.
    for container in [&owner, &caller] {
        container.diff()?;
        container.run_dropped("canary")?;
        let reported = wait_for("the canary", || {
            let reported = runs(container)?;
            Ok((!reported.is_empty()).then_some(reported))
        })?;
        assert_eq!(reported.len(), 1, "{reported:#?}");
        assert_eq!(only(&reported, "exec.new")?["file"]["path"], "/tmp/canary");
    }
    Ok(())
}

fn x05_hidden_volume(node: &Node) -> anyhow::Result<()> {
    let directory = node.path(&format!("volume-{}", node.next_id()));
    std::fs::create_dir(&directory)?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", directory.display());
    let container = node.container_with(&["--mount", &mount])?;
    container.lay_payload("dropped")?;
    container.sh("cp /.control/dropped /data/dropped; mkdir -p /mnt/b
        busybox unshare -Urm sh -c 'busybox mount --bind /data /mnt/b && : >/data/bound; sleep 4' &
        hidden=$!
        while [ ! -e /data/bound ]; do sleep 0.1; done
        /proc/$hidden/root/mnt/b/dropped")?;
    // Short-lived and on a mount without a mark: reported by its record, alive or gone.
    let findings = wait_for("the finding", || {
        let findings = container.findings()?;
        Ok((!findings.is_empty()).then_some(findings))
    })?;
    let run = only(&findings, "exec.volume")?;
    assert_eq!(run["severity"], "medium", "{run:#}");
    let path = run["file"]["path"].as_str().context("a path")?;
    ensure!(path.ends_with("/dropped"), "{run:#}");
    // The runtime enters from that filesystem too, and is drift of no container.
    sessions::run(&container, &["--exec-id", "in"], &["/bin/true"])?;
    container.diff()?;
    assert_eq!(runs(&container)?.len(), 1, "{:#?}", container.findings()?);
    Ok(())
}

fn x15_ways(node: &Node) -> anyhow::Result<()> {
    // The directory becomes a link.
    let container = node.container()?;
    container.sh("mkdir -p /etc/cron.d /tmp/cr; rm -r /etc/cron.d
        ln -s /tmp/cr /etc/cron.d; echo job > /etc/cron.d/a")?;
    let findings = container.expect_findings(&[
        "high file.persistence /etc/cron.d",
        "high file.persistence /tmp/cr/a",
    ])?;
    let job = findings.iter().find(|finding| finding["file"]["path"] == "/tmp/cr/a");
    let detail = job.context("the job")?["detail"].as_str().context("a detail")?;
    ensure!(detail.contains("/etc/cron.d/a"), "{findings:#?}");

    // A file that is there already, a link to a link, a directory that is renamed into place,
    // a hard link, and a link above the path.
    let container = node.container()?;
    container.sh("mkdir -p /root /tmp/k /tmp/prepared /tmp/home/app /etc/cron.daily
        echo key > /tmp/k/authorized_keys; echo job > /tmp/prepared/p; echo job > /tmp/job
        echo x > /tmp/home/app/.bashrc; sleep 2
        ln -s /tmp/k /tmp/k2; ln -s ../tmp/k2 /root/.ssh
        mv /tmp/prepared /etc/profile.d
        ln /tmp/job /etc/cron.daily/job
        ln -s /tmp/home /home")?;
    container.expect_findings(&[
        "high file.persistence /etc/cron.daily/job",
        "high file.persistence /etc/profile.d/p",
        "high file.persistence /home",
        "high file.persistence /root/.ssh",
        "high file.persistence /tmp/home/app/.bashrc",
        "high file.persistence /tmp/k/authorized_keys",
        "high file.persistence /tmp/k2",
    ])?;

    // Links at other paths, and links to watched files and directories.
    let container = node.container()?;
    container.sh("mkdir -p /tmp/cr /srv; ln -s /tmp/cr /srv/cron.d; echo data > /srv/cron.d/a
        ln -s /etc/passwd /tmp/users; ln -s /usr/bin /tmp/bin; ln -s . /tmp/here
        echo data > /tmp/here/b")?;
    container.expect_silence()
}

fn h03_names(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    // A process that lives on, one that ends at once, and one whose parent ends.
    container.sh("for name in 'runc:[x' 'runc:[2:INIT]' crun youki; do
            sh -c \"printf '$name' > /proc/self/comm; exec sleep 1\" &
            i=0
            while [ $i -lt 30 ]; do
                sh -c \"printf '$name' > /proc/self/comm; exec /bin/true\"
                (sh -c \"printf '$name' > /proc/self/comm; exec /bin/true\" &)
                i=$((i + 1))
            done
        done; wait")?;
    // A real session, which also ends at once, and one that takes such a name.
    sessions::run(&container, &["--exec-id", "short"], &["/bin/true"])?;
    let named = "printf 'runc:[2:INIT]' > /proc/self/comm; exec /bin/sleep 1";
    sessions::run(&container, &["--exec-id", "named"], &["/bin/sh", "-c", named])?;
    let mut sessions = Vec::new();
    wait_for("the two sessions", || {
        sessions = node.answer(&["sessions", "-c", &container.id])?;
        let ids = ["short", "named"].map(|id| sessions.iter().any(|one| one["exec_id"] == id));
        Ok((ids == [true; 2]).then_some(()))
    })
    .with_context(|| format!("{sessions:#?}"))?;
    container.diff()?;
    let sessions = node.answer(&["sessions", "-c", &container.id])?;
    assert_eq!(sessions.len(), 2, "{sessions:#?}");
    for session in &sessions {
        assert_eq!(session["entry"], "runtime_exec", "{session:#}");
    }
    Ok(())
}
