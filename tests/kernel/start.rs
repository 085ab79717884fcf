//! Attaching to containers that have not started yet, and to processes that are none.

use std::fs;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};

use driftd::model::ContainerId;
use driftd::watch::{SensorCommand, SensorEvent, Trust};

use crate::common::wait_for;
use crate::container::{BUSYBOX, Container, Family, hash_of};
use crate::executions::{begin_late, compile_loader};
use crate::node::{Node, path, summary};
use crate::{executable, kernel_version};

#[test]
fn a_process_outside_any_container_is_not_attached_and_the_reason_is_reported() {
    let mut node = Node::start();
    let mut refusal = |pid| {
        let id = ContainerId::new("test", "none");
        node.send(SensorCommand::Attach { container: id, pid, rootfs: None });
        let reason = node.until("the refusal", |report| match report {
            SensorEvent::NotAttached { reason, .. } => Some(reason.clone()),
            _ => None,
        });
        node.received.clear();
        reason
    };
    let reason = refusal(std::process::id());
    assert!(reason.contains("not an overlay") || reason.contains("the host's own"), "{reason}");
    assert_eq!(refusal(0), "its init process 0 is gone");
}

/// A process that has a container's root and still runs a program of the host, like a
/// runtime before it starts the entry point.
struct Waiting {
    pid: u32,
    resume: std::io::PipeWriter,
    started: std::thread::JoinHandle<Child>,
}

impl Waiting {
    #[allow(unsafe_code, reason = "it waits between fork and exec, like a runtime")]
    fn to_become(container: &Container, program: &str) -> Waiting {
        let (pid_reader, pid_writer) = std::io::pipe().unwrap();
        let (wait, resume) = std::io::pipe().unwrap();
        let mut command = Command::new(program);
        command.arg("3600").stdin(Stdio::null());
        let merged = container.merged();
        let become_it = move || {
            rustix::process::chroot(&merged)?;
            std::env::set_current_dir("/")?;
            let pid = rustix::process::getpid().as_raw_nonzero().get();
            rustix::io::write(&pid_writer, &pid.to_ne_bytes())?;
            rustix::io::read(&wait, &mut [0_u8])?;
            Ok(())
        };
        // SAFETY: between fork and exec it only makes system calls and uses its own memory.
        unsafe { command.pre_exec(become_it) };
        let started = std::thread::spawn(move || command.spawn().unwrap());
        let mut pid = [0; 4];
        rustix::io::read(&pid_reader, &mut pid).unwrap();
        Waiting { pid: u32::try_from(i32::from_ne_bytes(pid)).unwrap(), resume, started }
    }

    fn resume(self) -> Family {
        rustix::io::write(&self.resume, b".").unwrap();
        Family(self.started.join().unwrap())
    }
}

#[test]
fn a_container_not_yet_started_is_armed_before_its_entry_point() {
    let container = Container::start();
    let blake3 = container.drop_program("/tmp/sleep");
    let init = Waiting::to_become(&container, "/tmp/sleep");
    let mut node = Node::start();
    let id = container.id.clone();
    node.send(SensorCommand::Attach { container: id, pid: init.pid, rootfs: None });
    let before_start = node.until("the container to be attached", |report| match report {
        SensorEvent::Attached { before_start, .. } => Some(*before_start),
        _ => None,
    });
    assert!(before_start);
    let _init = init.resume();
    assert_eq!(node.until_executed(&path("/tmp/sleep")).state.blake3(), Some(blake3));
    let scan = node.unrequested_scan(&container.id);
    assert_eq!(scan.names(), ["/tmp/sleep"]);
    let received = node.received.iter().map(summary);
    let sessions: Vec<String> = received.filter(|line| line.starts_with("session")).collect();
    assert_eq!(sessions, <[String; 0]>::default(), "init is no session");
    node.assert_no_loss();
}

/// execve(2) opens its file early, and the kernel does much before the process runs that
/// program.
#[test]
fn an_entry_point_opened_before_the_marks_is_reported() {
    // Before Linux 6.8 the kernel copied the arguments before it asked the gate. For a
    // script it asks about the interpreter, before anything of the script has run.
    let is_late = kernel_version() >= (6, 8);
    for (name, content, is_named) in [
        ("/tmp/sleep", fs::read(BUSYBOX).unwrap(), is_late),
        ("/tmp/entry", b"#!/bin/sh\nexec /bin/sleep 3600\n".to_vec(), false),
    ] {
        let container = Container::start();
        let loader = compile_loader(container.dir.path());
        let inside = container.merged().join(&name[1..]);
        executable::write(&inside, &content).unwrap();
        let mut init = Command::new(loader);
        init.args(["late".as_ref(), container.merged().as_os_str(), name.as_ref()]);
        let (init, mut resume) = begin_late(&mut init);

        let mut node = Node::start();
        node.watchers.attach(&container.id, init.0.id(), Trust::UpTo(container.recorded));
        let before_start = node.until("the container to be attached", |report| match report {
            SensorEvent::Attached { before_start, .. } => Some(*before_start),
            _ => None,
        });
        assert!(before_start, "init does not run that program yet");
        resume.write_all(b"\n").unwrap();
        let executed = node.until_executed(&path(name));
        assert_eq!(executed.state.blake3(), Some(hash_of(&inside)));
        container.drop_program("/tmp/true");
        container.shell("/tmp/true");
        node.until_executed(&path("/tmp/true"));
        let named =
            node.received.iter().filter(|report| matches!(report, SensorEvent::Unarmed { .. }));
        assert_eq!(named.count(), usize::from(is_named), "for {name}");
        let times = node.executed_paths().iter().filter(|path| *path == name).count();
        assert_eq!(times, 1, "{name}");
    }
}

#[test]
fn h03_an_init_with_a_runtimes_name_counts_as_started() {
    let container = Container::start();
    let init = container.merged().join("tmp/runc:[2:INIT]");
    executable::write(&init, b"#!/bin/sh\nread line\nexec /bin/sleep 3600\n").unwrap();
    let mut init = container.command(&["/tmp/runc:[2:INIT]"]);
    let init = Family(init.stdin(Stdio::piped()).spawn().unwrap());
    let pid = init.0.id();
    wait_for("the init", || {
        let comm = fs::read(format!("/proc/{pid}/comm")).unwrap();
        (comm == b"runc:[2:INIT]\n").then_some(())
    });
    let mut node = Node::start();
    node.send(SensorCommand::Attach { container: container.id.clone(), pid, rootfs: None });
    let before_start = node.until("the container to be attached", |report| match report {
        SensorEvent::Attached { before_start, .. } => Some(*before_start),
        _ => None,
    });
    assert!(!before_start, "its program is the container's own");
}
