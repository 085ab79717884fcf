//! The daemon on a real node: a containerd of the tests' own, real containers,
//! and the scenarios of drift and of ordinary life by their names.
//!
//! Needs root, fanotify, containerd and runc; `make setup` installs what is
//! missing. No test is skipped when something is missing: the run fails and
//! names what to install.

mod aggregation;
mod answers;
mod budget;
mod calls;
mod chaos;
mod check;
mod checkpoint;
mod code;
mod commands;
mod corpus;
mod cri;
mod deny;
mod docker;
mod door;
mod drift;
mod edges;
mod evidence;
mod executable;
mod fair;
mod fileless;
mod fuse;
mod gate;
mod groups;
mod honest;
mod hooks;
mod hostile;
mod image;
mod incarnations;
mod life;
mod node;
mod ordinary;
mod owners;
mod pods;
mod policy;
mod profiles;
mod programs;
mod proof;
mod quiet;
mod recording;
mod registry;
mod restarts;
mod second;
mod sessions;
mod small;
mod sources;
mod start;
mod threads;
mod top;
mod trouble;
mod unit;
mod vm;
mod volumes;
mod writers;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard};

use anyhow::Context as _;
use libtest_mimic::{Arguments, Failed, Trial};
use node::{Node, Setup, lock};

/// Containers start and settle; two at a time suit a machine with two processors.
const TESTS_AT_ONCE: usize = 2;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(TESTS_AT_ONCE);
    if !arguments.list
        && let Err(err) = prerequisites()
    {
        eprintln!("the node tests cannot run: {err:#}");
        return ExitCode::FAILURE;
    }
    tear_down_when_interrupted();
    let tests = [
        drift::tests(),
        evidence::tests(),
        fair::tests(),
        fileless::tests(),
        ordinary::tests(),
        quiet::tests(),
        commands::tests(),
        incarnations::tests(),
        code::tests(),
        sources::tests(),
        aggregation::tests(),
        answers::tests(),
        deny::tests(),
        proof::tests(),
        restarts::tests(),
        recording::tests(),
        pods::tests(),
        policy::tests(),
        profiles::tests(),
        sessions::tests(),
        start::tests(),
        threads::tests(),
        top::tests(),
        docker::tests(),
        trouble::tests(),
        volumes::tests(),
        writers::tests(),
        chaos::tests(),
        corpus::tests(),
        gate::tests(),
        check::tests(),
        checkpoint::tests(),
        hostile::tests(),
        life::tests(),
        door::tests(),
        budget::tests(),
        calls::tests(),
        owners::tests(),
        groups::tests(),
        hooks::tests(),
        unit::tests(),
        vm::tests(),
        honest::tests(),
        edges::tests(),
        small::tests(),
    ];
    let conclusion = libtest_mimic::run(&arguments, tests.into_iter().flatten().collect());
    drop(tear_down());
    second::report();
    conclusion.exit_code()
}

fn prerequisites() -> anyhow::Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "not root (run: make test)");
    for program in ["containerd", "containerd-shim-runc-v2", "runc", "ctr", "busybox", "gcc", "ldd"]
    {
        programs::find(program)?;
    }
    for program in [
        "script",
        "setcap",
        "setpriv",
        "b3sum",
        "docker-registry",
        "skopeo",
        "tar",
        "strip",
        "tmux",
    ] {
        programs::find(program)?;
    }
    // The hooks of contrib/.
    for program in ["curl", "jq"] {
        programs::find(program)?;
    }
    // The machines in which the unit is installed.
    for program in ["unshare", "nsenter", "findmnt", "make", "pgrep", "systemctl", "journalctl"] {
        programs::find(program)?;
    }
    nix::sys::fanotify::Fanotify::init(
        nix::sys::fanotify::InitFlags::FAN_CLASS_CONTENT
            | nix::sys::fanotify::InitFlags::FAN_CLOEXEC,
        nix::sys::fanotify::EventFFlags::O_RDONLY,
    )
    .context("this kernel or container does not allow fanotify (CAP_SYS_ADMIN is needed)")?;
    Ok(())
}

/// The node that most tests share; it starts when the first one needs it.
static SHARED: Mutex<Option<Arc<Node>>> = Mutex::new(None);

fn shared() -> anyhow::Result<Arc<Node>> {
    let mut shared = lock(&SHARED);
    if let Some(node) = &*shared {
        return Ok(Arc::clone(node));
    }
    let node = Node::start(Setup::default())?;
    node.share();
    *shared = Some(Arc::clone(&node));
    Ok(node)
}

/// A test on the shared node.
fn test(name: &'static str, test: fn(&Node) -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || second::chance(name, || run(shared, test)))
}

/// A test on a node of its own, because it breaks or restarts something.
/// `settings` are added to driftd's.
fn test_alone(
    name: &'static str,
    settings: &'static str,
    test: fn(&Node) -> anyhow::Result<()>,
) -> Trial {
    test_on(name, Setup { driftd: settings, ..Setup::default() }, test)
}

/// A test on a node of its own that differs from the usual one.
fn test_on(name: &'static str, setup: Setup, test: fn(&Node) -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || second::chance(name, || run(|| Node::start(setup), test)))
}

/// A test on a node whose containerd has no image yet. The test starts driftd itself.
fn test_of_recording(name: &'static str, test: fn(&Node) -> anyhow::Result<()>) -> Trial {
    let node = || Node::with_containerd(Setup::default());
    Trial::test(name, move || second::chance(name, || run(node, test)))
}

/// Runs a test on a node of its own that has no image, and on which driftd has not
/// been started.
fn run_without_driftd(
    setup: Setup,
    test: fn(&Arc<Node>) -> anyhow::Result<()>,
) -> Result<(), Failed> {
    let node = Node::with_containerd(setup).map_err(|err| format!("{err:#}"))?;
    judge(&node, || test(&node))
}

/// A test that needs no node at all.
fn test_without_node(name: &'static str, test: fn() -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || {
        second::chance(name, || test().map_err(|err| format!("{err:#}").into()))
    })
}

fn run(
    node: impl FnOnce() -> anyhow::Result<Arc<Node>>,
    test: fn(&Node) -> anyhow::Result<()>,
) -> Result<(), Failed> {
    let node = node().map_err(|err| format!("{err:#}"))?;
    judge(&node, || test(&node))
}

/// Runs a test and adds the node's logs to its failure. The error itself comes last: there
/// it is found first in a long output.
fn judge(node: &Node, test: impl FnOnce() -> anyhow::Result<()>) -> Result<(), Failed> {
    match catch_unwind(AssertUnwindSafe(test)) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(err)) => Err(format!("{}{err:#}", node.logs()).into()),
        Err(panic) => {
            eprintln!("{}", node.logs());
            resume_unwind(panic)
        }
    }
}

/// Held while everything is torn down: an interrupted run does not end before that.
static TEARING_DOWN: Mutex<()> = Mutex::new(());

fn tear_down() -> MutexGuard<'static, ()> {
    let guard = lock(&TEARING_DOWN);
    node::tear_down_everything();
    lock(&SHARED).take();
    registry::stop();
    node::remove_bench();
    guard
}

/// Ctrl-C leaves nothing behind.
fn tear_down_when_interrupted() {
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let Ok(runtime) = runtime else { return };
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let (Ok(mut interrupt), Ok(mut terminate)) =
                (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
            else {
                return;
            };
            tokio::select! {
                _ = interrupt.recv() => (),
                _ = terminate.recv() => (),
            }
            let _guard = tear_down();
            std::process::exit(130);
        });
    });
}
