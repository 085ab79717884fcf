//! Programs on the filesystems of a container other than its root: in memory, on volumes, in
//! directories of the host, on filesystems that the container mounts itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;

use crate::node::{Container, Node, bench, only, wait_for};
use crate::{executable, programs, test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("a11_program_in_shared_memory_is_tmpfs", a11_shared_memory),
        test("a11_program_on_a_tmpfs_volume_is_tmpfs", a11_tmpfs_volume),
        test("a11_program_of_the_image_copied_to_tmpfs_is_relocated", a11_copy),
        test("a12_tmpfs_that_a_container_mounts_is_marked", a12_own_mount),
        test("a13_program_in_a_directory_of_the_host_is_volume", a13_host_directory),
        test("a13_program_on_a_volume_of_its_own_is_volume", a13_own_filesystem),
        test("a13_the_hosts_own_programs_are_drift_of_no_container", a13_host_runs_it),
        test("a13_two_containers_with_one_volume_are_kept_apart", a13_shared_volume),
        test("a42_program_in_another_root_and_user_namespace_is_new", a42_other_root),
        test("a43_program_on_an_overlay_that_a_container_mounts", a43_own_overlay),
        test("b07_sockets_pipes_and_pid_files_on_volumes", b07_volumes),
        test("b17_mounts_that_the_runtime_manages", b17_managed_mounts),
        test("b_program_of_the_image_by_a_bind_mount_is_silent", b_bind_mount),
        test("a_thousand_executions_on_tmpfs_are_all_counted", a_thousand_on_tmpfs),
        test("a_thousand_executions_on_a_volume_are_all_counted", a_thousand_on_a_volume),
        test("a_container_is_removed_while_its_program_is_examined", removed_at_once),
        test_alone(
            "volumes_are_not_watched_when_that_is_off",
            "volumes = false",
            volumes_can_be_off,
        ),
    ]
}

const SHARED_MEMORY: &str = "type=tmpfs,src=tmpfs,dst=/vol,options=rw:nosuid:mode=1777";

/// A directory of the host, on the filesystem that the host runs from.
fn host_directory(node: &Node, name: &str) -> anyhow::Result<(PathBuf, String)> {
    let directory = node.path(name);
    fs::create_dir(&directory)?;
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", directory.display());
    Ok((directory, mount))
}

/// A volume with a filesystem of its own.
struct Volume {
    directory: PathBuf,
    /// For `ctr run --mount`.
    mount: String,
}

impl Volume {
    fn make(node: &Node) -> anyhow::Result<Volume> {
        let name = format!("volume-{}", node.next_id());
        let (file, directory) = (node.path(&format!("{name}.ext4")), node.path(&name));
        fs::create_dir(&directory)?;
        fs::File::create(&file)?.set_len(64 << 20)?;
        succeed(Command::new(programs::find("mkfs.ext4")?).arg("-q").arg(&file))?;
        succeed(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&directory))
            .context("this kernel must have loop devices")?;
        let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", directory.display());
        Ok(Volume { directory, mount })
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.directory).status();
    }
}

fn succeed(command: &mut Command) -> anyhow::Result<()> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", crate::node::talk(&output));
    Ok(())
}

fn lay_on_host(path: &Path, mark: &str) -> anyhow::Result<()> {
    Ok(executable::write(path, &bench()?.payload.marked(mark))?)
}

fn a11_shared_memory(node: &Node) -> anyhow::Result<()> {
    // containerd mounts it without execution; Kubernetes allows execution there.
    let mount = "type=tmpfs,src=shm,dst=/dev/shm,options=rw:nosuid:mode=1777";
    let container = node.container_with(&["--mount", mount])?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /dev/shm/x && /dev/shm/x")?;
    let findings = container.expect_findings(&["high exec.tmpfs /dev/shm/x"])?;
    let run = only(&findings, "exec.tmpfs")?;
    assert_eq!((&run["count"], &run["expected"]), (&1.into(), &serde_json::Value::Null));
    ensure!(run["file"]["blake3"].as_str().is_some_and(|hash| hash.len() == 64), "{run:#}");
    ensure!(run["process"]["pid"].as_u64() > Some(0), "{run:#}");
    Ok(())
}

fn a11_tmpfs_volume(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--mount", SHARED_MEMORY])?;
    container.lay_payload("x")?;
    // Long enough to be examined after it was deleted.
    container.sh("cp /.control/x /vol/x; /vol/x 1000 & sleep 0.2; rm /vol/x; wait")?;
    let findings = container.expect_findings(&["high exec.tmpfs /vol/x"])?;
    assert_eq!(only(&findings, "exec.tmpfs")?["file"]["type"], "elf");
    Ok(())
}

fn a11_copy(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--mount", SHARED_MEMORY])?;
    container.sh("cp /bin/ls /vol/ls; /vol/ls / >/dev/null")?;
    let findings = container.expect_findings(&["medium exec.relocated /vol/ls"])?;
    assert_eq!(only(&findings, "exec.relocated")?["expected"]["path"], "/bin/ls");
    Ok(())
}

fn a12_own_mount(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--privileged"])?;
    container.lay_payload("x")?;
    container.sh("mkdir -p /mnt; /bin/busybox mount -t tmpfs t /mnt\n\
         cp /.control/x /mnt/x; sleep 0.3; /mnt/x\n\
         until /bin/busybox umount /mnt; do sleep 0.1; done; /bin/busybox mount -t tmpfs t /mnt\n\
         cp /.control/x /mnt/y; sleep 0.3; /mnt/y")?;
    container.expect_findings(&["high exec.tmpfs /mnt/x", "high exec.tmpfs /mnt/y"]).map(drop)
}

fn a13_host_directory(node: &Node) -> anyhow::Result<()> {
    let (_, mount) = host_directory(node, "a13")?;
    let container = node.container_with(&["--mount", &mount])?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /data/x; /data/x; cp /bin/ls /data/ls; /data/ls / >/dev/null")?;
    let findings = container
        .expect_findings(&["medium exec.volume /data/x", "medium exec.relocated /data/ls"])?;
    assert_eq!(only(&findings, "exec.relocated")?["expected"]["path"], "/bin/ls");
    Ok(())
}

fn a13_own_filesystem(node: &Node) -> anyhow::Result<()> {
    let volume = Volume::make(node)?;
    let container = node.container_with(&["--mount", &volume.mount])?;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /data/x; /data/x; cp /bin/ls /data/ls; /data/ls / >/dev/null")?;
    container
        .expect_findings(&["medium exec.volume /data/x", "medium exec.relocated /data/ls"])
        .map(drop)
}

fn a13_host_runs_it(node: &Node) -> anyhow::Result<()> {
    let volume = Volume::make(node)?;
    let (directory, _) = host_directory(node, "a13-host")?;
    let shared = format!("type=bind,src={},dst=/host,options=rbind:rw", directory.display());
    let container = node.container_with(&["--mount", &volume.mount, "--mount", &shared])?;
    for directory in [&volume.directory, &directory] {
        let program = directory.join("hosts");
        lay_on_host(&program, "the host's own")?;
        succeed(&mut Command::new(&program))?;
        // A service of the host may have a mount namespace of its own.
        succeed(Command::new("unshare").arg("--mount").arg(&program))?;
    }
    container.expect_silence()
}

fn a13_shared_volume(node: &Node) -> anyhow::Result<()> {
    let volume = Volume::make(node)?;
    let one = node.container_with(&["--mount", &volume.mount])?;
    let other = node.container_with(&["--mount", &volume.mount])?;
    one.lay_payload("x")?;
    one.sh("cp /.control/x /data/x; /data/x")?;
    one.expect_findings(&["medium exec.volume /data/x"])?;
    other.expect_silence()?;
    other.sh("/data/x")?;
    other.expect_findings(&["critical exec.new /tmp/canary", "medium exec.volume /data/x"])?;
    assert_eq!(only(&one.findings()?, "exec.volume")?["count"], 1);
    Ok(())
}

fn a42_other_root(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--privileged"])?;
    container.lay_payload("x")?;
    container.sh("mkdir -p /tmp/alpine/bin /tmp/alpine/proc\n\
         cp /bin/busybox /tmp/alpine/bin/busybox; printf x >> /tmp/alpine/bin/busybox\n\
         cp /.control/x /tmp/alpine/bin/x\n\
         /bin/busybox unshare -Urm /bin/busybox chroot /tmp/alpine /bin/busybox sh -c '/bin/x'")?;
    container
        .expect_findings(&[
            "critical exec.new /tmp/alpine/bin/busybox",
            "critical exec.new /tmp/alpine/bin/x",
        ])
        .map(drop)
}

fn a43_own_overlay(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--privileged", "--mount", SHARED_MEMORY])?;
    container.lay_payload("x")?;
    container.sh("mkdir -p /vol/upper /vol/work /tmp/merged\n\
         /bin/busybox mount -t overlay -o lowerdir=/,upperdir=/vol/upper,workdir=/vol/work o /tmp/merged\n\
         sleep 0.3\n\
         /tmp/merged/bin/ls / >/dev/null\n\
         cp /.control/x /tmp/merged/x; /tmp/merged/x")?;
    // The image's own content is silent. The other program is reported twice: in memory, by the
    // gate below the overlay, and on an overlay without a mark, by the kernel's record.
    let findings = wait_for("both", || {
        let findings = container.findings()?;
        Ok((findings.len() >= 2).then_some(findings))
    })?;
    // Below the overlay, the file's name is known only while the process lives.
    let below = only(&findings, "exec.tmpfs")?["file"]["path"].clone();
    anyhow::ensure!(below == "/x" || below == "/tmp/merged/x", "{findings:#?}");
    let below = format!("high exec.tmpfs {}", below.as_str().unwrap_or("?"));
    let findings =
        container.expect_findings(&[below.as_str(), "medium exec.volume /tmp/merged/x"])?;
    assert_eq!(only(&findings, "exec.tmpfs")?["count"], 1);
    Ok(())
}

fn silent(container: &Container<'_>, commands: &str) -> anyhow::Result<()> {
    container.sh(commands)?;
    container.expect_silence()
}

fn b07_volumes(node: &Node) -> anyhow::Result<()> {
    let (_, mount) = host_directory(node, "b07")?;
    let container = node.container_with(&["--mount", &mount, "--mount", SHARED_MEMORY])?;
    silent(
        &container,
        "for d in /data /vol /run; do /usr/bin/app 1 $d/app.sock; mkfifo $d/queue\n\
         echo $$ > $d/app.pid; cp /bin/ls $d/not-run; done",
    )
}

fn b17_managed_mounts(node: &Node) -> anyhow::Result<()> {
    let (directory, mount) = host_directory(node, "b17")?;
    let mut arguments = vec!["--mount".to_owned(), mount];
    for name in ["hosts", "resolv.conf", "hostname"] {
        let file = node.path(&format!("b17-{name}"));
        fs::write(&file, "127.0.0.1 localhost\n")?;
        arguments.push("--mount".into());
        arguments
            .push(format!("type=bind,src={},dst=/etc/{name},options=rbind:rw", file.display()));
    }
    let swap = |version: &str| -> anyhow::Result<()> {
        fs::create_dir(directory.join(version))?;
        fs::write(directory.join(version).join("token"), version)?;
        std::os::unix::fs::symlink(version, directory.join("..data_tmp"))?;
        Ok(fs::rename(directory.join("..data_tmp"), directory.join("..data"))?)
    };
    swap("..1")?;
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let container = node.container_with(&arguments)?;
    container.sh("cat /etc/hosts /etc/resolv.conf /etc/hostname /data/..data/token")?;
    swap("..2")?;
    silent(&container, "cat /data/..data/token; echo '::1 me' >> /etc/hosts")
}

fn b_bind_mount(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--privileged"])?;
    silent(
        &container,
        "mkdir -p /mnt/bin; /bin/busybox mount --bind /bin /mnt/bin; /mnt/bin/ls / >/dev/null",
    )
}

fn a_thousand(container: &Container<'_>, at: &str, finding: &str) -> anyhow::Result<()> {
    container.lay_payload("x")?;
    container
        .begin(&format!(
            "cp /.control/x {at}; i=0\nwhile [ $i -lt 1000 ]; do {at}; i=$((i+1)); done"
        ))?
        .finish(Duration::from_secs(120))?;
    let kind = finding.split(' ').nth(1).context("no kind")?;
    container.counted(kind, 1000)?;
    container.expect_findings(&[&format!("{finding} {at}")]).map(drop)
}

fn a_thousand_on_tmpfs(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--mount", SHARED_MEMORY])?;
    a_thousand(&container, "/vol/x", "high exec.tmpfs")
}

fn a_thousand_on_a_volume(node: &Node) -> anyhow::Result<()> {
    let volume = Volume::make(node)?;
    let container = node.container_with(&["--mount", &volume.mount])?;
    a_thousand(&container, "/data/x", "medium exec.volume")
}

fn removed_at_once(node: &Node) -> anyhow::Result<()> {
    let volume = Volume::make(node)?;
    let container = node.container_with(&["--mount", &volume.mount, "--mount", SHARED_MEMORY])?;
    container.lay_payload("x")?;
    // Many different programs, each of which is hashed, so that some still wait.
    container.sh("i=0; while [ $i -lt 40 ]; do for d in /vol /data; do cp /.control/x $d/x$i\n\
         echo $i >> $d/x$i; $d/x$i; done; i=$((i+1)); done")?;
    container.remove()?;
    // Not lazily: it fails when the volume is busy. Queued files may still be open, and must
    // soon be closed.
    succeed(Command::new("umount").arg(&volume.directory))?;
    wait_for("the volume's device to be released", || {
        let output = Command::new("losetup").arg("--list").arg("--output=BACK-FILE").output()?;
        let list = String::from_utf8_lossy(&output.stdout).into_owned();
        let file = volume.directory.with_extension("ext4");
        Ok((!list.contains(&*file.to_string_lossy())).then_some(()))
    })
}

fn volumes_can_be_off(node: &Node) -> anyhow::Result<()> {
    let container = node.container_with(&["--mount", SHARED_MEMORY])?;
    container.lay_payload("x")?;
    silent(&container, "cp /.control/x /vol/x; /vol/x")
}
