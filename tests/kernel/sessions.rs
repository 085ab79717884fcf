//! Sessions: processes that enter a running container.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use driftd::model::{Entry, Fact, FileFact, Observation, SessionFact, Source};
use driftd::watch::{SensorCommand, SensorEvent};

use crate::common::wait_for;
use crate::container::{BUSYBOX, Container, Family, descendants};
use crate::executable;
use crate::node::{Node, path};

#[test]
fn sessions_are_reported_once_and_before_their_executions() {
    let container = Container::with(&["unshare", "--pid", "--fork"], "", false);
    let pid = container.pid.to_string();
    let merged = container.merged();
    let enter = |words: &[&str]| {
        let mut command = Command::new("nsenter");
        command.args(["--pid", "--target", &pid, "chroot"]).arg(&merged).args(words);
        Family(command.stdin(Stdio::null()).spawn().unwrap())
    };
    let opened = |observation: &Observation| match &observation.fact {
        Fact::Session(SessionFact::Opened { opening }) => {
            Some((observation.source, opening.process.clone()))
        }
        _ => None,
    };
    // A session that was open before driftd started.
    let early = enter(&["/bin/sleep", "3601"]);
    let early_pid = wait_for("the early session", || {
        descendants(early.0.id()).into_iter().find(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line == b"/bin/sleep\x003601\0")
        })
    });
    let mut node = Node::start();
    let id = container.id.clone();
    node.send(SensorCommand::Attach { container: id, pid: container.pid, rootfs: None });
    let (source, process) = node.until_observed("the early session", opened);
    assert_eq!((source, process.identity.pid), (Source::Scan, early_pid));
    node.received.clear();

    container.drop_program("/tmp/busybox");
    symlink("busybox", container.merged().join("tmp/sh")).unwrap();
    let late = enter(&["/tmp/sh", "-c", "/bin/true; /tmp/sh -c /bin/true; exec /bin/sleep 3602"]);
    let mut executions = 0;
    node.until_observed("its two programs", |observation| {
        executions +=
            usize::from(matches!(observation.fact, Fact::File(FileFact::Executed { .. })));
        (executions == 2).then_some(())
    });
    let order: Vec<&str> = node
        .received
        .iter()
        .filter_map(|report| match report {
            SensorEvent::Observed(Observation {
                fact: Fact::Session(SessionFact::Opened { .. }),
                ..
            }) => Some("session"),
            SensorEvent::Observed(Observation {
                fact: Fact::File(FileFact::Executed { .. }),
                ..
            }) => Some("executed"),
            _ => None,
        })
        .collect();
    assert_eq!(order, ["session", "executed", "executed"]);
    let (source, process) = node.until_observed("the late session", opened);
    // Reported from the execution record of the host's `chroot`, or from the gate event
    // that follows.
    assert!(matches!(source, Source::Gate | Source::Trace), "{source:?}");
    assert_eq!(process.tty, None);
    assert_eq!(process.ancestors.last().map(|last| last.identity.pid), Some(late.0.id()));
}

#[test]
fn typing_into_the_terminal_of_init_opens_an_attach_session() {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).unwrap();
    unlockpt(&master).unwrap();
    let terminal = || Stdio::from(ioctl_tiocgptpeer(&master, flags).unwrap());
    let container =
        Container::reading(terminal(), |_| (), &["unshare", "--pid", "--fork"], "", false);
    let mut node = Node::start();
    node.attach(&container);
    let id = container.id.clone();
    node.send(SensorCommand::Terminal { container: id, input: None, is_handed_on: true });
    let reader = Family(container.command(&["/bin/cat"]).stdin(terminal()).spawn().unwrap());
    container.drop_program("/tmp/true");
    container.shell("/tmp/true");
    node.until_executed(&path("/tmp/true"));
    let attached = |report: &SensorEvent| match report {
        SensorEvent::Observed(Observation {
            fact: Fact::Session(SessionFact::Opened { opening }),
            ..
        }) => (opening.entry == Entry::Attach).then(|| (opening.root, opening.process.clone())),
        _ => None,
    };
    assert_eq!(node.received.iter().find_map(attached), None, "nothing was typed yet");
    rustix::io::write(&master, b"hello\n").unwrap();
    let (root, init) = node.until("the attach session", attached);
    assert_eq!(init.identity.pid, container.pid);
    assert!(root.start_time >= init.identity.start_time, "{root:?} {init:?}");
    drop(reader);
}

#[test]
fn h03_a_process_that_a_runtime_brought_in_is_a_session_by_its_origin() {
    let container = Container::with(&["unshare", "--pid", "--fork"], "", false);
    // The name of runc's process until it executes the session's command.
    let runtime = container.dir.path().join("runc:[2:INIT]");
    executable::write(&runtime, &fs::read(BUSYBOX).unwrap()).unwrap();
    let mut node = Node::start();
    node.attach(&container);
    let mut command = Command::new(runtime);
    command.arg0("chroot").arg(container.merged()).args(["/bin/sleep", "3600"]);
    let child = Family(command.stdin(Stdio::null()).spawn().unwrap());
    let process = node.until_observed("the session", |observation| match &observation.fact {
        Fact::Session(SessionFact::Opened { opening }) => Some(opening.process.clone()),
        _ => None,
    });
    assert_eq!(process.identity.pid, child.0.id());
    assert_eq!(process.argv, Some(vec!["/bin/sleep".into(), "3600".into()]));
}
