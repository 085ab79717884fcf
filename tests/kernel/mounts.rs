//! Filesystems that a container mounts while it runs.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use driftd::health::Failure;
use driftd::model::{Entry, Fact, FileFact, Filesystem, Observation, SessionFact};
use driftd::sys::fanotify::Buffer;
use driftd::sys::mounts::Notifier;
use driftd::sys::procfs;
use driftd::watch::{SensorCommand, SensorEvent};

use crate::common::{patience, run, wait_for, wait_until};
use crate::container::{Container, Family, container_with_mounts};
use crate::node::{Node, path, settings};
use crate::{kernel_release, kernel_version};

impl Node {
    fn executed_elsewhere(&self) -> Vec<(String, Filesystem)> {
        self.received
            .iter()
            .filter_map(|report| match report {
                SensorEvent::Observed(Observation {
                    fact: Fact::File(FileFact::Executed { path, filesystem, .. }),
                    ..
                }) if *filesystem != Filesystem::Overlay => Some((path.to_string(), *filesystem)),
                _ => None,
            })
            .collect()
    }
}

#[test]
fn a11_a_program_on_a_tmpfs_is_reported_by_the_path_the_container_sees() {
    let container = container_with_mounts();
    container.mount_tmpfs("/mnt");
    let mut node = Node::start();
    node.attach(&container);
    container.inside("cp /bin/busybox /mnt/true; echo >> /mnt/true; /mnt/true");
    node.until_executed(&path("/mnt/true"));
    // In another mount namespace and under another root it is the same file.
    let words = ["unshare", "--mount", "chroot"];
    let mnt = container.merged().join("mnt");
    let words = [&words[..], &[mnt.to_str().unwrap(), "/true"]].concat();
    assert!(container.beside(&words).status().unwrap().success());
    // A name that ends like that of a deleted file, and then a deleted file.
    container.inside(
        "cd /mnt; mv true 'true (deleted)'; './true (deleted)'\n\
         exec 7< './true (deleted)'; rm './true (deleted)'; /proc/self/fd/7 2>/dev/null || true",
    );
    node.until_executed(&path("/mnt/true (deleted)"));
    let executed = node.executed_elsewhere();
    let expected = ["/mnt/true", "/mnt/true", "/mnt/true (deleted)"];
    assert_eq!(executed[..3], expected.map(|path| (path.to_string(), Filesystem::Tmpfs)));
    node.assert_no_loss();
}

#[test]
fn a12_a_later_mount_is_marked_at_once_by_mount_events_and_by_polling() {
    let best = Notifier::new();
    assert_eq!(best.is_polling(), kernel_version() < (6, 14), "on {}", kernel_release());
    for notifier in [best, Notifier::polling()] {
        let mut container = container_with_mounts();
        let mut node = Node::with(64 * 1024, &settings(), notifier);
        node.attach(&container);
        for round in 0..20 {
            container.mount_tmpfs("/mnt");
            // The mark has as much time as these commands take.
            let program = format!("/mnt/true{round}");
            container.inside(&format!("cp /bin/busybox {program}; ln -s {program} /tmp/true"));
            container.inside("/tmp/true && rm /tmp/true");
            node.until_executed(&path(&program));
            let point = container.merged().join("mnt");
            let words = ["umount", point.to_str().unwrap()];
            // A thread may just be reading the ended process; x16 limits how often.
            wait_until("the volume to be unmounted", || {
                container.beside(&words).status().unwrap().success()
            });
        }
        let executed = node.executed_elsewhere();
        assert_eq!(executed.len(), 20, "{executed:#?}");
        node.assert_no_loss();
        // No mark keeps the container's mounts busy.
        container.kill_init();
        container.unmount();
        node.send(SensorCommand::Detach { container: container.id.clone(), pid: None });
    }
}

#[test]
fn a_mount_change_is_noticed_within_milliseconds_by_events_and_by_polling() {
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
                let timeout = rustix::event::Timespec::try_from(patience()).unwrap();
                assert_ne!(rustix::event::poll(&mut fds, Some(&timeout)).unwrap(), 0, "{name}");
                jiff::Timestamp::now().as_nanosecond()
            };
            let output = mount.wait_with_output().unwrap();
            let done: i128 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
            delays.push((seen - done) / 1000);
            notifier.take(&mut buffer);
            // The events of this unmount are read here too.
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
        // Often the change is noticed before mount(8) has ended.
        eprintln!("{name}: noticed this many microseconds after mount(8) had ended: {delays:?}");
        assert!(delays[10] < 50_000, "{name}: {delays:?}");
    }
}

#[test]
fn a_fuse_filesystem_is_not_touched() {
    let container = container_with_mounts();
    // A FUSE mount whose server never replies: every access to it blocks.
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
    // mount(8) must have the device under the same descriptor number.
    rustix::io::fcntl_setfd(&device, rustix::io::FdFlags::empty()).unwrap();
    assert!(mount.status().unwrap().success(), "FUSE cannot be mounted");
    // A tmpfs beside it must be marked all the same.
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
fn a_flood_of_mounts_is_bounded_and_reported_once() {
    let container = container_with_mounts();
    let mut node = Node::start();
    node.attach(&container);
    let merged = container.merged();
    let flood = format!(
        "cd {}; mkdir tmp/m; i=0; while [ $i -lt 400 ]; do mkdir tmp/m/$i; mount -t tmpfs none tmp/m/$i; i=$((i+1)); done",
        merged.display()
    );
    assert!(container.beside(&["busybox", "sh", "-c", &flood]).status().unwrap().success());
    node.until("the flood to be reported", |report| match report {
        SensorEvent::Lost { failure: Failure::MountsFull, .. } => Some(()),
        _ => None,
    });
    // The gate still works.
    container.drop_program("/tmp/true");
    container.inside("/tmp/true");
    node.until_executed(&path("/tmp/true"));
    // The first mounts are marked, the last ones are not.
    container.inside("cp /bin/busybox /tmp/m/7/true; /tmp/m/7/true");
    node.until_executed(&path("/tmp/m/7/true"));
    let losses = node
        .received
        .iter()
        .filter(|report| matches!(report, SensorEvent::Lost { failure: Failure::MountsFull, .. }));
    assert_eq!(losses.count(), 1);
}

#[test]
fn repeated_bind_mounts_cost_the_container_and_not_driftd() {
    let container = container_with_mounts();
    let mut node = Node::start();
    node.attach(&container);
    let flood = format!(
        "cd {}; i=0; while [ $i -lt 2000 ]; do mount -o bind . mnt; i=$((i+1)); done",
        container.merged().display()
    );
    let before = thread_time("mounts");
    let start = Instant::now();
    assert!(container.beside(&["busybox", "sh", "-c", &flood]).status().unwrap().success());
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
        let listings = self.watchers.watch().listings_of_mounts(&container.id);
        listings.expect("its mounts are followed")
    }

    #[track_caller]
    fn until_listed(&self, container: &Container, at_least: u64) {
        let listed = || (self.listings(container) >= at_least).then_some(());
        wait_for("its mounts to be listed", listed);
    }

    /// Runs a new program in a directory of the container, and waits for its report.
    #[track_caller]
    fn until_seen_in(&mut self, container: &Container, directory: &str) {
        let program = format!("{directory}/true");
        container.inside(&format!("cp /bin/busybox {program}; echo >> {program}; {program}"));
        self.until_executed(&path(&program));
    }
}

#[test]
fn x14_a_mount_change_lists_the_mounts_of_its_own_container_only() {
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
    let move_mount: Vec<&OsStr> =
        words(&["mount", "--move"]).chain([from.as_os_str(), to.as_os_str()]).collect();
    let unmount: Vec<&OsStr> = words(&["umount"]).chain([to.as_os_str()]).collect();
    let others = node.listings(&second);
    for _ in 0..10 {
        change(&node, &mount);
        // A moved mount is neither a new nor a removed one.
        change(&node, &move_mount);
        change(&node, &unmount);
    }
    // Some changes may be its own: when a directory of the host is removed, copies of
    // its mounts disappear in every mount namespace.
    let others = node.listings(&second) - others;
    assert!(others < 5, "the other container's mounts were listed {others} times");
    // Its own changes are noticed all the same.
    second.mount_tmpfs("/mnt");
    node.until_seen_in(&second, "/mnt");
    node.assert_no_loss();
}

#[test]
fn x14_endless_mounts_in_one_container_cost_a_quiet_one_nothing() {
    let (loud, quiet) = (container_with_mounts(), container_with_mounts());
    let mut node = Node::start();
    node.attach(&loud);
    node.attach(&quiet);
    let running = loud.merged().join("tmp/on");
    fs::write(&running, "").unwrap();
    let flood = format!(
        "cd {}; while [ -e tmp/on ]; do mount -t tmpfs none mnt; umount mnt 2>/dev/null; done",
        loud.merged().display()
    );
    let mut flood = loud.beside(&["busybox", "sh", "-c", &flood]).spawn().unwrap();
    let before = node.listings(&quiet);
    // More than the first burst, so that paced listings are among them.
    node.until_listed(&loud, 50);
    let listed = node.listings(&quiet) - before;
    assert!(listed < 20, "the quiet container's mounts were listed {listed} times");
    // A mount that the quiet container makes meanwhile is marked.
    quiet.mount_tmpfs("/mnt");
    node.until_seen_in(&quiet, "/mnt");
    assert_eq!(flood.try_wait().unwrap(), None, "the flood must still run");
    fs::remove_file(running).unwrap();
    assert!(flood.wait().unwrap().success());
}

#[test]
fn x14_a_directory_marked_for_two_containers_stays_marked_for_the_remaining_one() {
    // The FIFO of one container's terminal lies in the upper layer of another one.
    let mut outer = Container::start();
    let inner = container_with_mounts();
    outer.shell("mkdir /tmp/fifo; cp /bin/true /tmp/fifo/true");
    let fifo = outer.upper().join("tmp/fifo/in");
    run(&[OsStr::new("mkfifo"), fifo.as_os_str()]);
    let mut node = Node::start();
    node.attach(&inner);
    node.attach(&outer);
    node.send(SensorCommand::Terminal {
        container: inner.id.clone(),
        input: Some(fifo.clone()),
        is_handed_on: false,
    });
    node.scan(&outer);
    node.received.clear();
    outer.shell("chmod u+s /tmp/fifo/true");
    node.until_present("/tmp/fifo/true", |state| state.mode == 0o4755);
    outer.kill_init();
    node.detach(&outer.id);
    let mut client = Command::new("sh");
    client.arg("-c").arg("exec 3<> \"$0\"; exec sleep 3600").arg(&fifo).stdin(Stdio::null());
    let client = Family(client.spawn().unwrap());
    let root = node.until_observed("the attach session", |observation| match &observation.fact {
        Fact::Session(SessionFact::Opened { opening }) if opening.entry == Entry::Attach => {
            Some(opening.root)
        }
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
