//! Scans of the upper layer, and what happens to them at a container's end.

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use driftd::config;
use driftd::health::Failure;
use driftd::model::{Content, FileType, Unhashed};
use driftd::sys::mounts::Notifier;
use driftd::watch::SensorCommand;

use crate::common::{wait_for, wait_until};
use crate::container::{BUSYBOX, Container, hash_of};
use crate::node::{Node, attached, path, settings, summary};

#[test]
fn files_touched_but_not_changed_keep_the_images_content() {
    let (container, mut node) = attached();
    container.shell(
        "chmod 700 /bin/true; touch /bin/busybox; exec 3<>/opt/tool/true; exec 3>&-; \
         cp /etc/config /tmp/config; cat /tmp/config > /etc/config",
    );
    let upper = node.scan(&container);
    assert_eq!(
        upper.names(),
        ["/bin/busybox", "/bin/true", "/etc/config", "/opt/tool/true", "/tmp/config"]
    );
    assert_eq!(upper.same_as_image, ["/bin/busybox", "/bin/true", "/opt/tool/true"]);
    assert_eq!(upper.get("/bin/true").mode, 0o700);
    assert_eq!(upper.get("/tmp/config").content, Content::Unhashed(Unhashed::NotAProgram));
    assert!(upper.complete && upper.absent.is_empty());
    let again = node.scan(&container);
    assert_eq!(again.present, upper.present);
    node.assert_no_loss();
}

#[test]
fn files_hidden_by_the_overlay_are_absent() {
    let (container, mut node) = attached();
    container.shell(
        "mv /bin/true /tmp/moved; rm -r /opt/tool; mkdir /opt/tool; \
         cat /bin/busybox > /opt/tool/new; rm /etc/config; mkdir /etc/config",
    );
    let upper = node.scan(&container);
    assert_eq!(upper.names(), ["/opt/tool/new", "/tmp/moved"]);
    assert_eq!(upper.hidden(), ["/bin/true", "/etc/config", "/opt/tool/readme", "/opt/tool/true"]);
    assert_eq!(upper.get("/tmp/moved").blake3(), Some(hash_of(BUSYBOX)));
    assert!(upper.complete);
    node.assert_no_loss();
}

#[test]
fn hostile_files_neither_hang_nor_mislead_a_scan() {
    let (container, mut node) = attached();
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
    let upper = node.scan(&container);
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
fn marks_keep_no_mount_busy_and_the_last_scan_follows_the_containers_end() {
    let mut container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    container.drop_program("/tmp/true");
    container.shell("/tmp/true");
    node.until_executed(&path("/tmp/true"));
    // By a scan or as a settled change, whichever comes first.
    node.until("the file to be reported", |report| {
        summary(report).contains("present /tmp/true").then_some(())
    });
    node.received.clear();
    container.kill_init();
    container.unmount();
    node.send(SensorCommand::Detach { container: container.id.clone(), pid: None });
    assert_eq!(node.unrequested_scan(&container.id).names(), ["/tmp/true"]);
    let complete = wait_for("the container to be forgotten", || {
        (!node.scan(&container).complete).then_some(false)
    });
    assert!(!complete);
    node.assert_no_loss();
}

/// How many descriptors this process has open on a file name.
fn open_by_name(name: &Path) -> usize {
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .flatten()
        .filter(|entry| fs::read_link(entry.path()).is_ok_and(|target| target == name))
        .count()
}

#[test]
fn files_being_hashed_are_closed_at_once_when_their_container_ends() {
    let mut container = Container::start();
    let settings = config::Watch { max_hash_bytes: 64 << 30, ..settings() };
    let mut node = Node::with(64 * 1024, &settings, Notifier::new());
    node.attach(&container);
    let name = format!("/tmp/huge-{}", std::process::id());
    container.drop_program(&name);
    let huge = container.merged().join(name.trim_start_matches('/'));
    fs::File::options().write(true).open(&huge).unwrap().set_len(10 << 30).unwrap();
    // The kernel shows the name relative to the container's root or to the host's.
    let names = [PathBuf::from(&name), huge.clone()];
    let opened = || names.iter().map(|name| open_by_name(name)).sum::<usize>();
    for _ in 0..3 {
        // Busybox knows no applet of this name and fails.
        container.shell(&format!("{name} || true"));
    }
    wait_until("the hashing to begin", || opened() == 3);
    container.kill_init();
    node.send(SensorCommand::Detach { container: container.id.clone(), pid: None });
    wait_until("the files to be closed", || opened() == 0);
    container.unmount();
    drop(node);
}

#[test]
fn a_flood_of_reports_is_a_named_loss_and_leads_to_a_scan() {
    let container = Container::start();
    let mut node = Node::with_room_for(8);
    node.attach(&container);
    container.drop_program("/tmp/true");
    // No thread reads the reports meanwhile.
    container.shell("i=0; while [ $i -lt 50 ]; do /tmp/true; i=$((i+1)); done");
    wait_until("the loss to be counted", || node.watchers.health.count(Failure::PipelineFull) > 0);
    assert_eq!(node.unrequested_scan(&container.id).names(), ["/tmp/true"]);
}
