//! The gate: its permission events, its end, and the kernel's features that it needs.

use std::fs;
use std::os::fd::AsFd as _;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use driftd::health::Health;
use driftd::pulse::Part;
use driftd::sys::fanotify::{self, Answer, Buffer, Decoded, Group, Incoming};
use driftd::watch::Watch;

use crate::common::{start_gate, wait_until};
use crate::container::{Container, Family};
use crate::node::{Node, attached, settings};
use crate::{kernel_release, kernel_version};

#[test]
fn missing_kernel_features_are_detected_and_described() {
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
    // Backported to some kernels, or disabled by the configuration of others.
    assert!(found.has(Feature::ProcessHandles) || version < (5, 15));
    assert!(found.has(Feature::ExecRecords) || found.has(Feature::ProcessEvents));
}

/// An exec that waits at a gate whose events no thread reads.
fn blocked_exec(container: &Container, gate: &Group) -> Child {
    let root = fs::File::open(container.merged()).unwrap();
    gate.mark_filesystem(root.as_fd(), libc::FAN_OPEN_EXEC_PERM).unwrap();
    let mut child = container.command(&["/bin/true"]).stderr(Stdio::null()).spawn().unwrap();
    let mut fds = [rustix::event::PollFd::new(gate, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)), Ok(1), "no exec came");
    assert_eq!(child.try_wait().unwrap(), None, "the exec did not wait");
    child
}

#[test]
fn a_waiting_exec_continues_when_the_gate_is_closed() {
    let container = Container::start();
    let gate = Group::gate().unwrap();
    let mut child = blocked_exec(&container, &gate);
    drop(gate);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_dropped_permission_event_is_answered_with_allow() {
    let container = Container::start();
    let gate = Group::gate().unwrap();
    let mut child = blocked_exec(&container, &gate);
    let incoming = gate.read(&mut Buffer::new(), 4096).unwrap();
    assert!(matches!(incoming[..], [Incoming::Permission(_)]), "{incoming:?}");
    drop(incoming);
    assert!(child.wait().unwrap().success());
}

#[test]
fn deny_reaches_the_program_it_is_meant_for() {
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

/// Reads a file through the container's overlay, while the gate for reads gives this answer.
fn guarded_read(container: &Container, gate: &Group, answer: Answer) -> std::io::Result<Vec<u8>> {
    let path = container.merged().join("guarded");
    let reader = std::thread::spawn(move || {
        let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        (thread, fs::read(path))
    });
    let mut asked = Vec::new();
    let mut buffer = Buffer::new();
    while !reader.is_finished() {
        let mut fds = [rustix::event::PollFd::new(gate, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        rustix::event::poll(&mut fds, Some(&timeout)).unwrap();
        for incoming in gate.read(&mut buffer, 4096).unwrap_or_default() {
            let Incoming::Permission(permission) = incoming else { panic!("{incoming:?}") };
            asked.push((permission.event().pid, permission.event().range));
            permission.answer(answer).1.unwrap();
        }
    }
    let (thread, read) = reader.join().unwrap();
    assert!(!asked.is_empty(), "nothing was asked");
    for (pid, range) in asked {
        assert_eq!(pid, thread, "the thread is named, not its process");
        assert!(range.is_some());
    }
    read
}

#[test]
fn the_reading_of_a_guarded_file_below_an_overlay_waits_and_can_be_denied() {
    let container = Container::start();
    fs::write(container.merged().join("guarded"), "text").unwrap();
    let below = fs::File::open(container.upper().join("guarded")).unwrap();
    let directory = fs::File::open(container.upper()).unwrap();
    let gate = Group::read_gate().unwrap();
    if kernel_version() < (6, 14) {
        assert!(!fanotify::asks_before_reads(directory.as_fd()).unwrap());
        assert_eq!(gate.guard(below.as_fd()).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        return;
    }
    if !fanotify::asks_before_reads(directory.as_fd()).unwrap() {
        // The test's directory is on another filesystem, such as a tmpfs.
        let refused = gate.guard(below.as_fd()).unwrap_err().raw_os_error();
        assert_eq!(refused, Some(libc::EOPNOTSUPP));
        return;
    }
    gate.guard(below.as_fd()).unwrap();
    assert_eq!(guarded_read(&container, &gate, Answer::Allow).unwrap(), b"text");
    let denied = guarded_read(&container, &gate, Answer::Deny).unwrap_err();
    assert_eq!(denied.raw_os_error(), Some(libc::EPERM));
    // Without its gate, everything is read.
    drop(gate);
    assert_eq!(fs::read(container.merged().join("guarded")).unwrap(), b"text");
}

#[test]
fn the_probe_reports_pidfds_as_the_gate_does() {
    assert_eq!(fanotify::probe().unwrap().pidfd, Group::gate().unwrap().reports_pidfd);
}

#[test]
fn a_full_queue_is_an_overflow_and_not_an_event() {
    use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
    let container = Container::start();
    // The feed's own group has an unlimited queue; this one is limited.
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
    // One file per event, because the kernel merges equal events.
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
    // A late event may come while the queue is read.
    assert!(overflows == 1 && decoded.len() > limit, "{overflows} of {}", decoded.len());
}

#[test]
fn programs_waiting_at_the_gate_continue_when_the_watchers_stop() {
    let (container, mut node) = attached();
    let script = "i=0; while [ $i -lt 300 ]; do /bin/true || exit 1; i=$((i+1)); done";
    let mut busy = Family(container.command(&["/bin/sh", "-c", script]).spawn().unwrap());
    wait_until("the gate to be busy", || node.watchers.health.gate_answers() > 20);
    node.watchers.stop();
    assert!(busy.0.wait().unwrap().success());
}

#[test]
fn x09_no_program_waits_for_a_stop_however_much_is_being_hashed() {
    let busy = Container::start();
    let neighbour = Container::start();
    let mut node = Node::start();
    node.attach(&busy);
    node.attach(&neighbour);
    busy.drop_program("/tmp/true");
    // Sparse files, each of which takes seconds to hash.
    busy.shell("i=0; while [ $i -lt 20 ]; do cp /tmp/true /opt/t$i; truncate -s 60M /opt/t$i; i=$((i+1)); done");
    busy.shell("i=0; while [ $i -lt 20 ]; do /opt/t$i; i=$((i+1)); done; true");
    let watchers = node.watchers;
    let ended = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let stopping = std::thread::spawn({
        let ended = ended.clone();
        move || {
            drop(watchers);
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
    // On an idle machine it is a few milliseconds.
    assert!(longest < Duration::from_secs(1), "a program waited for {longest:?}");
}

#[test]
fn the_gate_counts_its_turns_while_idle() {
    let (sender, _reports) = bounded(8);
    let gate = start_gate(&settings());
    let pulse = gate.pulse.clone();
    let watch = Watch::start(&settings(), sender, Arc::new(Health::default()), gate).unwrap();
    let turns = [pulse.turns_of(Part::Gate), &*watch.gate_turns()]
        .map(|turns| turns.load(Ordering::Relaxed) + 3);
    wait_until("three turns", || {
        let now = [pulse.turns_of(Part::Gate), &*watch.gate_turns()]
            .map(|turns| turns.load(Ordering::Relaxed));
        now[0] >= turns[0] && now[1] >= turns[1]
    });
    watch.stop();
}
