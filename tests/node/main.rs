//! The daemon on a real node: a containerd of the tests' own, real containers,
//! and the scenarios of drift and of ordinary life by their names.
//!
//! Needs root, fanotify, containerd and runc; `make setup` installs what is
//! missing. Nothing is skipped when something is not there: the run fails and
//! says what to do.

mod answers;
mod budget;
mod chaos;
mod check;
mod checkpoint;
mod code;
mod corpus;
mod cri;
mod deeds;
mod docker;
mod door;
mod drift;
mod edges;
mod executable;
mod fair;
mod fileless;
mod fuse;
mod gate;
mod groups;
mod honest;
mod hostile;
mod image;
mod incarnations;
mod life;
mod node;
mod ordinary;
mod pods;
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
mod together;
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
const TRIALS_AT_ONCE: usize = 2;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(TRIALS_AT_ONCE);
    if !arguments.list
        && let Err(err) = prerequisites()
    {
        eprintln!("the node tests cannot run: {err:#}");
        return ExitCode::FAILURE;
    }
    tear_down_when_interrupted();
    let trials = [
        drift::trials(),
        fair::trials(),
        fileless::trials(),
        ordinary::trials(),
        quiet::trials(),
        answers::trials(),
        incarnations::trials(),
        code::trials(),
        sources::trials(),
        together::trials(),
        proof::trials(),
        restarts::trials(),
        recording::trials(),
        pods::trials(),
        sessions::trials(),
        start::trials(),
        threads::trials(),
        docker::trials(),
        trouble::trials(),
        volumes::trials(),
        writers::trials(),
        chaos::trials(),
        corpus::trials(),
        gate::trials(),
        check::trials(),
        checkpoint::trials(),
        hostile::trials(),
        life::trials(),
        door::trials(),
        budget::trials(),
        deeds::trials(),
        groups::trials(),
        unit::trials(),
        vm::trials(),
        honest::trials(),
        edges::trials(),
        small::trials(),
    ];
    let conclusion = libtest_mimic::run(&arguments, trials.into_iter().flatten().collect());
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
    for program in
        ["script", "setcap", "setpriv", "b3sum", "docker-registry", "skopeo", "tar", "strip"]
    {
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

/// The node that most trials share; it starts when the first one asks for it.
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

/// A trial on the shared node.
fn trial(name: &'static str, test: fn(&Node) -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || second::chance(name, || run(shared, test)))
}

/// A trial on a node of its own, because it breaks or restarts something.
/// `settings` are added to driftd's.
fn trial_alone(
    name: &'static str,
    settings: &'static str,
    test: fn(&Node) -> anyhow::Result<()>,
) -> Trial {
    trial_on(name, Setup { driftd: settings, ..Setup::default() }, test)
}

/// A trial on a node of its own that differs from the usual one.
fn trial_on(name: &'static str, setup: Setup, test: fn(&Node) -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || second::chance(name, || run(|| Node::start(setup), test)))
}

/// A trial on a node whose containerd has no image yet, and whose driftd the trial
/// starts by itself.
fn trial_of_recording(name: &'static str, test: fn(&Node) -> anyhow::Result<()>) -> Trial {
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

/// A trial that needs no node at all.
fn trial_without_node(name: &'static str, test: fn() -> anyhow::Result<()>) -> Trial {
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

/// Runs a test and adds the node's logs to its failure: before what went wrong, which
/// stands last, where a reader of a long output looks first.
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

/// Whoever is second waits: an interrupted run ends when it is torn down.
static TEARING_DOWN: Mutex<()> = Mutex::new(());

fn tear_down() -> MutexGuard<'static, ()> {
    let guard = lock(&TEARING_DOWN);
    node::tear_down_everything();
    lock(&SHARED).take();
    registry::stop();
    node::remove_bench();
    guard
}

/// Ctrl-C leaves nothing behind either.
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
