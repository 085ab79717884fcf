//! The one thread that makes baselines, and the pool that hashes for it.
//!
//! A layer is recorded once, from its directory or else from its blob.
//! [`verify`](super::verify)'s thread reads what proves it; this thread keeps the
//! result. Only this thread writes to the store. It judges no container.
//!
//! `queue` is the handle that other rooms use, `worker` the thread. `recording` reads
//! layers, `comparisons` requests what proves them, and `proofs` keeps the results.

mod comparisons;
mod proofs;
mod queue;
mod recording;
mod report;
mod worker;

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};

pub use queue::{Answer, Done, Queue, RecordRequest, Recorder};

use super::store::Store;
use super::types::{BaselineEvent, Blobs};
use super::verify::{Agenda, Verifier};
use crate::config;
use crate::health::{Failure, Health};
use queue::{QUEUE, Shared, lock};
use worker::{Inbox, Worker};

impl Recorder {
    /// Starts the threads.
    pub fn start(
        store: Arc<Store>,
        settings: &config::Baseline,
        blobs: Arc<dyn Blobs>,
        events: Sender<BaselineEvent>,
        health: Arc<Health>,
    ) -> Recorder {
        let (urgent, urgent_jobs) = bounded(QUEUE);
        let (requests, requested) = bounded(QUEUE);
        let (outcome, outcomes) = bounded(0);
        let (running, stopped) = bounded(0);
        let agenda = Arc::new(Agenda::default());
        let verifier = Verifier::new(
            Arc::clone(&agenda),
            Arc::clone(&store),
            Arc::clone(&blobs),
            settings,
            outcome,
            stopped.clone(),
        );
        let shared = Arc::new(Shared {
            store,
            health,
            urgent,
            requests,
            agenda,
            urgency: Arc::default(),
            jobs: Default::default(),
            turned_away: Mutex::default(),
            interruption: Default::default(),
            running: Mutex::new(Some(running)),
            threads: Mutex::default(),
        });
        let inbox = Inbox { urgent: urgent_jobs, requests: requested, outcomes, stopped };
        let worker = Worker::new(Arc::clone(&shared), inbox, events, blobs, settings);
        let threads = vec![
            spawn("recorder", Arc::clone(&shared.health), move || worker.run()),
            spawn("verifier", Arc::clone(&shared.health), move || verifier.run()),
        ];
        *lock(&shared.threads) = threads;
        show_queues(&shared);
        Recorder { shared }
    }
}

fn spawn(
    name: &'static str,
    health: Arc<Health>,
    run: impl FnOnce() + Send + 'static,
) -> JoinHandle<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            let _report = PanicReport { name, health };
            run();
        })
        .expect("a thread can be started when the daemon starts")
}

/// Shows how much waits for each thread.
fn show_queues(shared: &Arc<Shared>) {
    let threads = &shared.health.threads;
    // Weak, because the threads wait for the end of what is shared.
    let weak = Arc::downgrade(shared);
    let jobs = move || weak.upgrade().map_or(0, |shared| shared.jobs.len());
    threads.show_queue("recorder", Box::new(jobs));
    let agenda = Arc::downgrade(&shared.agenda);
    let layers = move || agenda.upgrade().map_or(0, |agenda| agenda.len());
    threads.show_queue("verifier", Box::new(layers));
}

/// Reports a thread that has ended by a panic. The process goes on: an image may be the
/// reason, and a new process would read the same image.
struct PanicReport {
    name: &'static str,
    health: Arc<Health>,
}

impl Drop for PanicReport {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { name, health } = self;
            let detail =
                format!("the thread `{name}` has panicked: no baseline is recorded or verified");
            let _ = health.record(Failure::ThreadStuck);
            health.begin(Failure::ThreadStuck, &detail);
            tracing::error!(thread = *name, "{detail}");
        }
    }
}

#[cfg(test)]
mod tests;
