//! Whose deed it is: what one container does in another, what is reached on ways around,
//! and what a process only says of itself.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::image::Layer;
use crate::node::{Container, Node, bench, only, wait_for};
use crate::sessions::init;
use crate::{programs, trial};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("x13_what_runs_in_another_containers_root_is_its_callers_finding", x13_root),
        trial("x13_who_comes_from_the_host_stays_a_session_of_the_container", x13_from_the_host),
        trial("x05_a_volume_in_a_mount_namespace_of_its_own_is_told", x05_hidden_volume),
        trial("x15_a_way_around_a_persistence_place_is_told", x15_ways),
        trial("h03_a_name_opens_no_session_and_hides_none", h03_names),
    ]
}

/// The usual image and one program more.
const OTHER: &str = "docker.io/driftd/other:1";

/// A container of an image that has `/usr/bin/nmap` and `/opt/scan.sh`, and one of the
/// usual image in the same pid namespace, in which the first one's init is 1.
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
    owner.told(&["low file.added /tmp/x"])?;

    caller.sh("/proc/1/root/usr/bin/nmap")?;
    caller.sh("/proc/1/root/tmp/x; sh /proc/1/root/opt/scan.sh")?;
    caller.sh("busybox chroot /proc/1/root /bin/sh -c '/usr/bin/nmap; :'")?;
    let findings = caller.told(&[
        "critical exec.new /tmp/x",
        "critical exec.new /usr/bin/nmap",
        // It was put beside the other one.
        "info session.exec",
        "medium exec.interpreted /opt/scan.sh",
        "medium exec.relocated /bin/sh",
    ])?;
    for finding in findings.iter().filter(|finding| finding["kind"] != "session.exec") {
        let file = &finding["file"];
        assert_eq!(file["filesystem"], "container", "{finding:#}");
        let detail = finding["detail"].as_str().context("it says whose file it is")?;
        ensure!(detail.contains(&owner.id), "{finding:#}");
        ensure!(file["blake3"].is_string(), "{finding:#}");
    }
    let nmap = findings.iter().find(|finding| finding["file"]["path"] == "/usr/bin/nmap");
    assert_eq!(nmap.context("nmap")?["count"], 2);
    // What it has done itself is the image's, and what the other one has is no matter.
    owner.told(&["low file.added /tmp/x"]).map(drop)
}

fn x13_from_the_host(node: &Node) -> anyhow::Result<()> {
    let (owner, caller) = two(node)?;
    let fifo = node.path("fifo").display().to_string();
    let exec = ["task", "exec", "--fifo-dir", &fifo, "--exec-id", "one", &owner.id];
    node.ctr(&[&exec[..], &["/usr/bin/nmap"]].concat())?;
    let exec = ["task", "exec", "--fifo-dir", &fifo, "--exec-id", "two", &caller.id];
    node.ctr(&[&exec[..], &["/bin/true"]].concat())?;
    // The host's own look at a container's program.
    let root = PathBuf::from(format!("/proc/{}/root", init(&owner)?));
    let status = Command::new(root.join("usr/bin/nmap")).stdout(Stdio::null()).status()?;
    ensure!(status.success(), "{status}");
    wait_for("the sessions", || {
        let of = |container: &Container<'_>| {
            let sessions = node.answer(&["sessions", "-c", &container.id])?;
            let by_runtime = |session: &&Value| session["entry"] == "runtime_exec";
            Ok::<_, anyhow::Error>(sessions.iter().filter(by_runtime).count())
        };
        // The one that shares a pid namespace is a session of its own.
        Ok((of(&owner)? == 1 && of(&caller)? == 1).then_some(()))
    })?;
    // A canary of each: nothing comes behind.
    for container in [&owner, &caller] {
        container.diff()?;
        container.lay_payload("canary")?;
        container.sh("cp /.control/canary /tmp/canary; /tmp/canary")?;
        let told = wait_for("the canary", || {
            let told = runs(container)?;
            Ok((!told.is_empty()).then_some(told))
        })?;
        assert_eq!(told.len(), 1, "{told:#?}");
        assert_eq!(only(&told, "exec.new")?["file"]["path"], "/tmp/canary");
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
    // Short-lived and without the mark: by its record, alive or gone.
    let findings = wait_for("the finding", || {
        let findings = container.findings()?;
        Ok((!findings.is_empty()).then_some(findings))
    })?;
    let run = only(&findings, "exec.volume")?;
    assert_eq!(run["severity"], "medium", "{run:#}");
    let path = run["file"]["path"].as_str().context("a path")?;
    ensure!(path.ends_with("/dropped"), "{run:#}");
    // The runtime comes in from that filesystem too, and is nobody's drift.
    let fifo = node.path("fifo").display().to_string();
    let exec = ["task", "exec", "--fifo-dir", &fifo, "--exec-id", "in", &container.id];
    node.ctr(&[&exec[..], &["/bin/true"]].concat())?;
    container.diff()?;
    assert_eq!(runs(&container)?.len(), 1, "{:#?}", container.findings()?);
    Ok(())
}

fn x15_ways(node: &Node) -> anyhow::Result<()> {
    // The directory becomes a link.
    let container = node.container()?;
    container.sh("mkdir -p /etc/cron.d /tmp/cr; rm -r /etc/cron.d
        ln -s /tmp/cr /etc/cron.d; echo job > /etc/cron.d/a")?;
    let findings = container
        .told(&["high file.persistence /etc/cron.d", "high file.persistence /tmp/cr/a"])?;
    let job = findings.iter().find(|finding| finding["file"]["path"] == "/tmp/cr/a");
    let detail = job.context("the job")?["detail"].as_str().context("a detail")?;
    ensure!(detail.contains("/etc/cron.d/a"), "{findings:#?}");

    // What lies there already, a link of a link, a directory that is renamed into place,
    // a hard link, and one above.
    let container = node.container()?;
    container.sh("mkdir -p /root /tmp/k /tmp/prepared /tmp/home/app /etc/cron.daily
        echo key > /tmp/k/authorized_keys; echo job > /tmp/prepared/p; echo job > /tmp/job
        echo x > /tmp/home/app/.bashrc; sleep 2
        ln -s /tmp/k /tmp/k2; ln -s ../tmp/k2 /root/.ssh
        mv /tmp/prepared /etc/profile.d
        ln /tmp/job /etc/cron.daily/job
        ln -s /tmp/home /home")?;
    container.told(&[
        "high file.persistence /etc/cron.daily/job",
        "high file.persistence /etc/profile.d/p",
        "high file.persistence /home",
        "high file.persistence /root/.ssh",
        "high file.persistence /tmp/home/app/.bashrc",
        "high file.persistence /tmp/k/authorized_keys",
        "high file.persistence /tmp/k2",
    ])?;

    // Links elsewhere, into such places too, and one that goes again.
    let container = node.container()?;
    container.sh("mkdir -p /tmp/cr /srv; ln -s /tmp/cr /srv/cron.d; echo data > /srv/cron.d/a
        ln -s /etc/passwd /tmp/users; ln -s /usr/bin /tmp/bin; ln -s . /tmp/here
        echo data > /tmp/here/b")?;
    container.told_nothing()
}

fn h03_names(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let fifo = node.path("fifo").display().to_string();
    // Alive, gone at once, and without a living parent.
    container.sh("for name in 'runc:[x' 'runc:[2:INIT]' crun youki; do
            sh -c \"printf '$name' > /proc/self/comm; exec sleep 1\" &
            i=0
            while [ $i -lt 30 ]; do
                sh -c \"printf '$name' > /proc/self/comm; exec /bin/true\"
                (sh -c \"printf '$name' > /proc/self/comm; exec /bin/true\" &)
                i=$((i + 1))
            done
        done; wait")?;
    // A real one, which is over at once too, and one that takes such a name.
    let exec = ["task", "exec", "--fifo-dir", &fifo, "--exec-id"];
    node.ctr(&[&exec[..], &["short", &container.id, "/bin/true"]].concat())?;
    let named = "printf 'runc:[2:INIT]' > /proc/self/comm; exec /bin/sleep 1";
    node.ctr(&[&exec[..], &["named", &container.id, "/bin/sh", "-c", named]].concat())?;
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
