//! Reports of changed files, names and permissions, without a scan.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use driftd::model::{Blake3Hash, Fact, FileFact, FileType, Format, Source};
use driftd::watch::SensorEvent;

use crate::common::{is_emulated, run, wait_until};
use crate::container::{BUSYBOX, Container, Family, hash_of};
use crate::node::{Node, attached, facts, path};

#[test]
fn a_written_program_is_reported_with_its_writer_once_it_has_settled() {
    let (container, mut node) = attached();
    container.shell("cat /bin/busybox > /tmp/program");
    let (state, source) =
        node.until_observed("the written program", |observation| match &observation.fact {
            Fact::File(FileFact::Present { path, state, .. })
                if path.to_string() == "/tmp/program" =>
            {
                Some((state.clone(), observation.source))
            }
            _ => None,
        });
    assert_eq!(state.blake3(), Some(hash_of(BUSYBOX)));
    // In an emulated machine the first scan may still run and report it.
    assert!(source == Source::Change || is_emulated() && source == Source::Scan, "{source:?}");

    // Here the shell itself writes, and keeps running.
    let program = r"\177ELF\002\001\001\000\000\000\000\000\000\000\000\000\002\000";
    let script = format!("printf '{program}' > /tmp/written; /bin/sleep 30; true");
    let child = Family(container.command(&["/bin/sh", "-c", &script]).spawn().unwrap());
    let writer =
        node.until_observed("what the shell has written", |observation| match &observation.fact {
            Fact::File(FileFact::Present { path, writer, .. })
                if path.to_string() == "/tmp/written" =>
            {
                Some(writer.clone())
            }
            _ => None,
        });
    assert_eq!(writer.map(|writer| writer.identity.pid), Some(child.0.id()));
    node.assert_no_loss();
}

#[test]
fn data_writes_are_counted_and_a_program_overwritten_with_data_is_reported() {
    let (container, mut node) = attached();
    container.shell(
        "echo data > /tmp/log; echo broken > /bin/true; echo '#!' > /tmp/gone; rm /tmp/gone",
    );
    let mut present = BTreeMap::new();
    let mut absent = BTreeSet::new();
    node.until_observed("both changes", |observation| {
        match &observation.fact {
            Fact::File(FileFact::Present { path, state, lower, .. }) => {
                present.insert(path.to_string(), (state.format, lower.is_some()));
            }
            Fact::File(FileFact::Absent { path, .. }) => {
                absent.insert(path.to_string());
            }
            _ => (),
        }
        (present.len() + absent.len() >= 2).then_some(())
    });
    assert_eq!(present, BTreeMap::from([("/bin/true".to_owned(), (Format::Data, true))]));
    assert_eq!(absent, BTreeSet::from(["/tmp/gone".to_owned()]));
    assert_eq!(node.watchers.health.data_writes.load(Ordering::Relaxed), 2);
}

#[test]
fn x11_an_image_is_not_asked_for_the_files_of_an_earlier_image_under_the_same_id() {
    let (mut container, mut node) = attached();
    let id = container.id.clone();
    let data_writes = |node: &Node| node.watchers.health.data_writes.load(Ordering::Relaxed);
    // This image has no such file.
    container.shell("echo data > /opt/tool/extra");
    wait_until("the write to be counted", || data_writes(&node) == 1);
    container.kill_init();
    node.detach(&id);
    let with_extra = |lower: &Path| {
        fs::copy(BUSYBOX, lower.join("opt/tool/extra")).unwrap();
    };
    let mut next = Container::of_image(with_extra, &[], "", false);
    next.id = id;
    node.attach(&next);
    next.shell("echo data > /opt/tool/extra");
    let state = node.until_present("/opt/tool/extra", |_| true);
    assert_eq!(state.format, Format::Data);
}

#[test]
fn a24_chmod_is_reported_without_a_scan() {
    let (container, mut node) = attached();
    container.shell("chmod u+s /bin/true; sleep 1");
    let state = node.until_present("/bin/true", |state| state.mode == 0o4755);
    assert_eq!(state.blake3(), Some(hash_of(BUSYBOX)), "its content is the image's");
    node.assert_no_loss();
}

#[test]
fn every_way_to_give_permissions_is_reported() {
    let (container, mut node) = attached();
    let merged = container.merged();
    container.shell("cp /bin/true /tmp/a; mkdir /tmp/d");
    node.until_present("/tmp/a", |_| true);
    // By descriptor.
    let file = fs::File::open(merged.join("tmp/a")).unwrap();
    file.set_permissions(fs::Permissions::from_mode(0o4755)).unwrap();
    node.until_present("/tmp/a", |state| state.mode == 0o4755);
    // Another name for it, and a name in a directory that is new.
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
fn a22_rename_and_removal_are_reported_without_a_scan() {
    let (container, mut node) = attached();
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
fn new_directories_are_marked() {
    let (container, mut node) = attached();
    container.shell("mkdir -p /tmp/a/b/c; cp /bin/true /tmp/a/b/c/x");
    node.until_present("/tmp/a/b/c/x", |_| true);
    node.received.clear();
    container.shell("chmod 4755 /tmp/a/b/c/x");
    node.until_present("/tmp/a/b/c/x", |state| state.mode == 0o4755);
    node.assert_no_loss();
}

#[test]
fn a_moved_directory_is_reported_by_its_new_paths() {
    let (container, mut node) = attached();
    container.shell("mkdir -p /tmp/a/b /tmp/k; cp /bin/true /tmp/a/b/x; cp /bin/true /tmp/k/x");
    node.until_present("/tmp/a/b/x", |_| true);
    node.until_present("/tmp/k/x", |_| true);
    container.shell("mv /tmp/a /tmp/moved");
    node.until_present("/tmp/moved/b/x", |_| true);
    node.received.clear();
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
    node.received.clear();
    container.shell("chmod 2755 /tmp/k/x");
    node.until_present("/tmp/k/x", |state| state.mode == 0o2755);
    assert!(!node.received.iter().flat_map(facts).any(
        |fact| matches!(fact, Fact::File(FileFact::Present { path: present, .. }) if *present == path("/tmp/moved/b/x"))
    ));
    node.assert_no_loss();
}

#[test]
fn both_files_of_an_exchange_are_reported() {
    let (container, mut node) = attached();
    let blake3 = container.drop_program("/tmp/x");
    node.until_present("/tmp/x", |_| true);
    node.received.clear();
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
fn an_image_program_that_becomes_a_symlink_is_reported() {
    let (container, mut node) = attached();
    container.shell("/bin/busybox ln -sf /tmp/x /opt/tool/true");
    node.until_present("/opt/tool/true", |state| state.file_type == FileType::Symlink);
    container
        .shell("/bin/busybox ln -sf /tmp/y /bin/cat; /bin/busybox mkfifo /tmp/f; mkdir /mnt/d");
    node.assert_no_loss();
}

#[test]
fn every_way_to_write_is_reported() {
    let (container, mut node) = attached();
    let merged = container.merged();
    let first = container.drop_program("/tmp/x");
    node.until_present("/tmp/x", |state| state.blake3() == Some(first));
    let check = |node: &mut Node, what: &str| {
        let now = hash_of(merged.join("tmp/x"));
        eprintln!("{what}");
        node.until_present("/tmp/x", |state| state.blake3() == Some(now));
    };
    // By path there is no descriptor to close. A file of the image is copied up, which
    // is reported; a file copied up before is found by a scan only.
    let truncate = |name: &str| {
        let name = std::ffi::CString::new(merged.join(name).as_os_str().as_bytes()).unwrap();
        nix::unistd::truncate(name.as_c_str(), 4096).unwrap();
    };
    truncate("opt/tool/true");
    node.until_present("/opt/tool/true", |state| state.size == 4096);
    truncate("tmp/x");
    let upper = node.scan(&container);
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
fn changes_beyond_the_limit_are_left_to_a_scan_and_delay_no_other_container() {
    // It runs before the watchers start, so no mark precedes its start.
    let other = Container::start();
    let (container, mut node) = attached();
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
            .any(|fact| matches!(fact, Fact::File(FileFact::Present { path: present, .. }) if *present == path("/bin/true")))
            .then_some(())
            .filter(|()| is_others)
    });
    let waited = start.elapsed();
    assert!(
        waited < Duration::from_secs(10),
        "{waited:?} for a change beside a flood of {flood:?}"
    );
    let mut present = BTreeSet::new();
    node.until("all of the flood", |report| {
        for fact in facts(report) {
            if let Fact::File(FileFact::Present { path, .. }) = fact {
                present.insert(path.clone());
            }
        }
        (present.len() >= 20_000).then_some(())
    });
    assert!(node.watchers.health.left_to_sweeps.load(Ordering::Relaxed) > 0);
    node.assert_no_loss();
}

#[test]
fn no_mark_is_left_once_a_container_has_ended() {
    let (mut container, mut node) = attached();
    container.shell("mkdir -p /tmp/a/b");
    container.drop_program("/tmp/a/b/x");
    node.until_present("/tmp/a/b/x", |_| true);
    container.kill_init();
    node.detach(&container.id);
    container.unmount();
    node.received.clear();
    // No mark of driftd is left on the directory when its owner removes it.
    let marks = || {
        let mut marks = 0;
        for entry in fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
            let info = fs::read_to_string(entry.path()).unwrap_or_default();
            let inode = format!("ino:{:x} ", fs::metadata(container.upper()).unwrap().ino());
            marks += info.lines().filter(|line| line.contains(&inode)).count();
        }
        marks
    };
    wait_until("the marks to go", || marks() == 0);
    fs::remove_dir_all(container.upper()).unwrap();
    node.assert_no_loss();
}

#[test]
fn a34_data_on_a_watched_path_is_hashed_and_so_is_a_symlinks_target() {
    let (container, mut node) = attached();
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
    assert_eq!(node.scan(&container).get("/etc/data").blake3(), None);
    node.assert_no_loss();
}
