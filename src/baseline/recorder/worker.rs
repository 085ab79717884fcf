//! The recorder's thread: what it owns, what it waits for, and the events it sends.
//!
//! It carries requests out one after the other. What takes long is elsewhere: layers are
//! read in `recording`, comparisons are made by the verifier's thread.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, select, select_biased};
use jiff::Timestamp;

use super::queue::{Done, RecordRequest, Request, STOPPING, Shared, Submitted, lock, refuse};
use crate::baseline::causes::with_causes;
use crate::baseline::merge::ImageBaseline;
use crate::baseline::proof::{Checked, LayerProof, unchanged_since};
use crate::baseline::stream::Limits;
use crate::baseline::types::{BaselineEvent, Blobs, LayerReport, Progress, Proof};
use crate::baseline::verify::{Outcome, limits};
use crate::config;
use crate::model::{Blob, ChainId, ContainerId, FileTime, Layer, LayerId, printable};

/// How often baselines that nothing needs are removed.
const COLLECT: Duration = Duration::from_secs(60 * 60);

/// How long after a failure a container's baseline is tried again. The wait doubles with
/// each failure, up to the longest.
const RETRY: Duration = Duration::from_secs(5);
const LONGEST_RETRY: Duration = Duration::from_secs(10 * 60);

/// What reaches the thread.
pub(super) struct Inbox {
    pub(super) urgent: Receiver<Submitted>,
    pub(super) requests: Receiver<Request>,
    pub(super) outcomes: Receiver<Outcome>,
    pub(super) stopped: Receiver<Infallible>,
}

/// A container that has requested a baseline.
pub(super) struct User {
    pub(super) chain_id: ChainId,
    pub(super) layers: Vec<Layer>,
}

/// A container's job that failed, to be tried again.
struct Retry {
    at: Instant,
    wait: Duration,
    layers: Vec<Layer>,
}

/// The containers that need baselines.
#[derive(Default)]
pub(super) struct Containers {
    pub(super) users: HashMap<ContainerId, User>,
    retries: HashMap<ContainerId, Retry>,
    /// The chains that containers used when that was last known for all of them.
    in_use: Option<HashSet<ChainId>>,
}

impl Containers {
    pub(super) fn of_chain(&self, chain_id: ChainId) -> impl Iterator<Item = &User> {
        self.users.values().filter(move |user| user.chain_id == chain_id)
    }

    /// The chains whose baselines must not be removed, as far as is known.
    fn in_use(&self) -> HashSet<ChainId> {
        let users = self.users.values().map(|user| user.chain_id);
        self.in_use.iter().flatten().copied().chain(users).collect()
    }

    /// Keeps a container whose job was carried out. `waited`: how long it waited before
    /// this attempt, if it is not the first.
    pub(super) fn keep(
        &mut self,
        container: &ContainerId,
        layers: &[Layer],
        failed: bool,
        waited: Option<Duration>,
    ) {
        let Some(top) = layers.last() else { return };
        self.retries.remove(container);
        if failed {
            let wait = waited.map_or(RETRY, |waited| (waited * 2).min(LONGEST_RETRY));
            let retry = Retry { at: Instant::now() + wait, wait, layers: layers.to_vec() };
            self.retries.insert(container.clone(), retry);
        }
        let user = User { chain_id: top.chain_id, layers: layers.to_vec() };
        self.users.insert(container.clone(), user);
    }
}

/// A job that waits for comparisons of its layers.
pub(super) struct PendingJob {
    pub(super) chain_id: ChainId,
    pub(super) layers: Vec<LayerReport>,
    /// How many comparisons each layer still waits for.
    pub(super) open: Vec<usize>,
    pub(super) progress: Option<Arc<Progress>>,
    pub(super) done: Option<Done>,
}

/// Which comparisons are waited for, and which are of no use.
#[derive(Default)]
pub(super) struct Comparisons {
    /// By ticket.
    pub(super) pending: HashMap<u64, PendingJob>,
    /// Blobs that were read and do not have the content they should have.
    pub(super) wrong_blobs: HashSet<Blob>,
    /// Directories that differ from their layer or cannot be read. They are compared again
    /// on request, periodically, or after a restart, but not otherwise.
    pub(super) given_up: HashSet<(LayerId, PathBuf)>,
    /// When directories last had their turn to be compared again.
    pub(super) rechecked: HashMap<(LayerId, PathBuf), Timestamp>,
}

/// What the thread owns.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) inbox: Inbox,
    events: Sender<BaselineEvent>,
    pub(super) settings: config::Baseline,
    pub(super) limits: Limits,
    pub(super) blobs: Arc<dyn Blobs>,
    pub(super) containers: Containers,
    pub(super) comparisons: Comparisons,
    /// The time that the last `Ready` event of each chain had.
    reported_since: HashMap<ChainId, Option<FileTime>>,
    next_collection: Instant,
    pub(super) next_recheck: Instant,
    /// Kept only while there is work, so that an idle node has no such threads.
    pub(super) pool: Option<rayon::ThreadPool>,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        inbox: Inbox,
        events: Sender<BaselineEvent>,
        blobs: Arc<dyn Blobs>,
        settings: &config::Baseline,
    ) -> Worker {
        let now = Instant::now();
        Worker {
            shared,
            inbox,
            events,
            settings: settings.clone(),
            limits: limits(settings),
            blobs,
            containers: Containers::default(),
            comparisons: Comparisons::default(),
            reported_since: HashMap::new(),
            next_collection: now + COLLECT,
            next_recheck: now,
            pool: None,
        }
    }

    pub(super) fn run(mut self) {
        self.shared.urgency.join();
        while !self.shared.interruption.is_stopped() {
            self.send_turned_away();
            if self.inbox.urgent.is_empty() && self.inbox.requests.is_empty() {
                self.pool = None;
            }
            let alarm = at(self.next_alarm());
            select_biased! {
                recv(self.inbox.stopped) -> _ => break,
                recv(self.inbox.urgent) -> job => match job {
                    Ok(job) => self.record(job, None),
                    Err(_) => break,
                },
                recv(self.inbox.outcomes) -> outcome => match outcome {
                    Ok(outcome) => self.keep(outcome),
                    Err(_) => break,
                },
                recv(alarm) -> _ => self.on_time(),
                recv(self.inbox.requests) -> request => match request {
                    Ok(request) => self.carry_out(request),
                    Err(_) => break,
                },
            }
        }
        let jobs = self.inbox.urgent.try_iter().map(Request::Record);
        for request in jobs.chain(self.inbox.requests.try_iter()) {
            refuse(request, STOPPING);
        }
        for done in self.comparisons.pending.drain().filter_map(|(_, job)| job.done) {
            done(Err(STOPPING.into()));
        }
        self.shared.jobs.clear();
        self.shared.urgency.leave();
    }

    fn carry_out(&mut self, request: Request) {
        let store = Arc::clone(&self.shared.store);
        let result = match request {
            Request::Record(job) => return self.record(job, None),
            Request::SetNames { endpoint, listed } => store.set_names(&endpoint, &listed),
            Request::ImageRemoved { namespace, name } => store.remove_name(&namespace, &name),
            Request::Collect { in_use } => {
                self.set_in_use(in_use);
                return self.collect();
            }
            Request::Remove { chain_id, done } => {
                let user = self.containers.users.iter().find(|(_, user)| user.chain_id == chain_id);
                return done(match user {
                    Some((container, _)) => Err(format!("the container {container} uses it")),
                    None => store.remove(chain_id).map_err(|err| with_causes(&err)),
                });
            }
            Request::Prune { done } => {
                let collected = store.collect(&self.containers.in_use(), Duration::ZERO);
                return done(collected.map_err(|err| with_causes(&err)));
            }
        };
        if let Err(err) = result {
            // The disk is behind the memory then, until the same image changes again or
            // the next list comes.
            tracing::warn!("{}", with_causes(&err));
        }
    }

    /// Forgets containers that are gone, and what was kept for them.
    fn set_in_use(&mut self, in_use: HashSet<ChainId>) {
        let Containers { users, retries, .. } = &mut self.containers;
        users.retain(|_, user| in_use.contains(&user.chain_id));
        retries.retain(|container, _| users.contains_key(container));
        self.reported_since.retain(|chain_id, _| in_use.contains(chain_id));
        let layers: HashSet<LayerId> =
            users.values().flat_map(|user| &user.layers).map(|layer| layer.id).collect();
        self.comparisons.given_up.retain(|(id, path)| layers.contains(id) && path.exists());
        self.containers.in_use = Some(in_use);
    }

    // ---- by the clock

    fn next_alarm(&self) -> Instant {
        let retries = self.containers.retries.values().map(|retry| retry.at);
        let recheck = (!self.settings.recheck_period.is_zero()).then_some(self.next_recheck);
        retries.chain(recheck).fold(self.next_collection, Instant::min)
    }

    fn on_time(&mut self) {
        let now = Instant::now();
        let due = |(container, retry): (&ContainerId, &Retry)| {
            (retry.at <= now).then(|| container.clone())
        };
        let due: Vec<ContainerId> = self.containers.retries.iter().filter_map(due).collect();
        for container in due {
            let Some(Retry { wait, layers, .. }) = self.containers.retries.remove(&container)
            else {
                continue;
            };
            let ticket = self.shared.jobs.add();
            let job = RecordRequest {
                image: None,
                container: Some(container),
                layers,
                proof: Proof::Later,
                progress: None,
                done: None,
            };
            self.record(Submitted { job: Box::new(job), ticket }, Some(wait));
        }
        if self.next_collection <= now {
            self.next_collection = now + COLLECT;
            if self.containers.in_use.is_some() {
                self.collect();
            }
        }
        if !self.settings.recheck_period.is_zero() && self.next_recheck <= now {
            self.recheck(now);
        }
    }

    fn collect(&self) {
        match self.shared.store.collect(&self.containers.in_use(), self.settings.retention) {
            Ok(collected) if collected.images + collected.layers > 0 => tracing::info!(
                images = collected.images,
                layers = collected.layers,
                "removed baselines that no image and no container uses"
            ),
            Ok(_) => (),
            Err(err) => tracing::warn!("{}", with_causes(&err)),
        }
    }

    pub(super) fn write_proof(&self, id: LayerId, proof: LayerProof) {
        if let Err(err) = self.shared.store.write_proof(id, proof) {
            // It stays in memory. After a restart the layer is proved again.
            tracing::warn!("{}", with_causes(&err));
        }
    }

    // ---- events

    /// The time up to which all directories that containers have of a chain equal its
    /// baseline.
    fn unchanged_since(&self, chain_id: ChainId) -> Option<FileTime> {
        let store = &self.shared.store;
        let checked: Vec<Option<Checked>> = self
            .containers
            .of_chain(chain_id)
            .flat_map(|user| &user.layers)
            .map(|layer| {
                let proof = store.proof(layer.id)?;
                proof.directory(directory_of(layer)?).cloned()
            })
            .collect();
        unchanged_since(checked.iter().map(Option::as_ref)).map(|since| since.time)
    }

    pub(super) fn send_ready(&mut self, chain_id: ChainId, baseline: Arc<ImageBaseline>) {
        let unchanged_since = self.unchanged_since(chain_id);
        self.reported_since.insert(chain_id, unchanged_since);
        self.send(BaselineEvent::Ready { chain_id, baseline, unchanged_since });
    }

    /// Sends `Ready` again if the time up to which the directories are known has changed.
    pub(super) fn send_changed_since(&mut self, chain_id: ChainId) {
        let reported = self.reported_since.get(&chain_id);
        if reported.is_some_and(|reported| *reported != self.unchanged_since(chain_id))
            && let Ok(Some(baseline)) = self.shared.store.image(chain_id)
        {
            self.send_ready(chain_id, baseline);
        }
    }

    fn send_turned_away(&self) {
        let turned_away = std::mem::take(&mut *lock(&self.shared.turned_away));
        for (chain_id, reason) in turned_away {
            self.send(BaselineEvent::Failed { chain_id, reason });
        }
    }

    /// Waits for the pipeline, but not when the daemon stops.
    pub(super) fn send(&self, event: BaselineEvent) {
        select! {
            // An error: the pipeline has ended, and nothing receives events any more.
            send(self.events, event) -> _ => (),
            recv(self.inbox.stopped) -> _ => (),
        }
    }
}

/// The directory in which the layer is unpacked, if it is.
pub(super) fn directory_of(layer: &Layer) -> Option<&Path> {
    layer.directory.as_deref().filter(|directory| !directory.as_os_str().is_empty())
}

pub(super) fn directory_name(path: &Path) -> String {
    format!("the directory {}", printable(path.as_os_str().as_bytes()))
}
