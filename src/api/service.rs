//! Answers to the calls of `driftd.v1.DriftService`.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::baselines::{self, RecordImage, Unusable};
use super::follow::{Follower, READING};
use super::outbox::{Inbox, PATIENCE, outbox};
use super::peer::Peer;
use super::proto::drift_service_server::DriftService;
use super::{convert, proto};
use crate::baseline::{self, KnownBy, Progress, Proof};
use crate::budget::{self, Pool};
use crate::health::{Backlog, Failure, Health};
use crate::history::{
    self, AlsoIn, Content, Filter, FindingLookup, Lookup, ProbeLookup, SessionFilter,
};
use crate::model::{ContainerId, FindingId, Incarnation, Kind, NamedBy, Session, printable};
use crate::pipeline::{self, ApiRequest, ContainerView, Diff, LookupError};
use crate::respond;
use crate::threads::View;

/// Findings on one page at most, and unless asked otherwise.
const PAGE: usize = 1000;
/// Messages that may wait for a slow client.
const STREAM: usize = 64;
/// How long the pipeline may be too busy to take a question.
const BUSY: Duration = Duration::from_secs(5);
/// How long the history may take to keep a response.
const RECORDED_WITHIN: Duration = Duration::from_secs(10);
const PROGRESS_EVERY: Duration = Duration::from_millis(200);
/// The longest reason that is kept, in bytes.
const MAX_REASON: usize = 4096;
/// Responses told with a finding.
const MAX_RESPONSES: usize = 32;

/// What the service asks.
#[derive(Clone)]
pub struct Backend {
    /// This node's name.
    pub node: String,
    pub questions: Sender<ApiRequest>,
    pub history: history::Reader,
    /// The newest sequence number in the history.
    pub committed: watch::Receiver<u64>,
    pub health: Arc<Health>,
    pub baselines: Arc<baseline::Store>,
    pub recorder: baseline::Recorder,
    pub images: Arc<dyn RecordImage>,
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("node", &self.node).finish_non_exhaustive()
    }
}

#[derive(Clone)]
pub(super) struct Service {
    /// Absent where a history is read without a daemon.
    pub(super) live: Option<Backend>,
    pub(super) history: history::Reader,
    /// The newest sequence number in the history.
    pub(super) committed: watch::Receiver<u64>,
    /// Becomes true when driftd stops.
    pub(super) stopping: watch::Receiver<bool>,
    pub(super) followers: Followers,
}

/// What all followers of the history share.
#[derive(Clone)]
pub(super) struct Followers {
    pool: Arc<Pool>,
    reading: Arc<Semaphore>,
}

impl Default for Followers {
    fn default() -> Followers {
        Followers {
            pool: Pool::new(budget::ALL_FOLLOWERS),
            reading: Arc::new(Semaphore::new(READING)),
        }
    }
}

/// Runs what blocks (a disk) where it holds up no other call.
pub(super) async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Status> {
    tokio::task::spawn_blocking(work).await.map_err(|err| Status::internal(err.to_string()))
}

pub(super) fn history_failed(err: &history::Error) -> Status {
    tracing::error!("the history cannot be read: {err}");
    Status::internal(err.to_string())
}

fn lookup_failed(err: &LookupError) -> Status {
    match err {
        LookupError::Unknown(_) | LookupError::NotWhole(..) | LookupError::UnknownProbe(_) => {
            Status::not_found(err.to_string())
        }
        LookupError::Ambiguous(..) => Status::invalid_argument(err.to_string()),
        LookupError::NotWatched(..) | LookupError::Gone(_) | LookupError::RunGone(_) => {
            Status::failed_precondition(err.to_string())
        }
        LookupError::Stopping => Status::unavailable(err.to_string()),
    }
}

/// The finding, session or probe that a person means.
fn the_one<T>(found: Lookup<T>, what: &str, shown: &str) -> Result<Box<T>, Status> {
    match found {
        Lookup::Found(one) => Ok(one),
        Lookup::Unknown => {
            Err(Status::not_found(format!("no {what} `{shown}` (see: driftd {what}s)")))
        }
        Lookup::Ambiguous(count) => Err(Status::invalid_argument(format!(
            "`{shown}` could be {count} {what}s: write more of the ID"
        ))),
    }
}

/// The beginnings of hexadecimal names, without the name of a hash before them.
fn hexadecimal(what: &str, texts: Vec<String>) -> Result<Vec<String>, Status> {
    let plain = |text: String| {
        let digits = text.split_once(':').map_or(&*text, |(_, digits)| digits).to_ascii_lowercase();
        let is_known = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_known {
            return Ok(digits);
        }
        Err(Status::invalid_argument(format!(
            "`{}` is no {what}: write 8 or more hexadecimal digits of it",
            printable(text.as_bytes())
        )))
    };
    texts.into_iter().map(plain).collect()
}

fn optional_time(
    field: &'static str,
    time: Option<prost_types::Timestamp>,
) -> Result<Option<jiff::Timestamp>, Status> {
    convert::optional_time_from_proto(field, time)
        .map_err(|err| Status::invalid_argument(err.to_string()))
}

impl Service {
    /// What only a running daemon has.
    pub(super) fn backend(&self) -> Result<&Backend, Status> {
        self.live.as_ref().ok_or_else(|| {
            Status::failed_precondition(
                "a history holds what was found, and this is asked of a running driftd",
            )
        })
    }

    /// Asks the pipeline. It is never held up by an asker: the channel is bounded.
    pub(super) async fn ask<T>(
        &self,
        question: impl FnOnce(oneshot::Sender<T>) -> ApiRequest,
    ) -> Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        let questions = &self.backend()?.questions;
        match questions.try_send(question(reply)) {
            Ok(()) => (),
            Err(TrySendError::Full(question)) => {
                let questions = questions.clone();
                unblock(move || questions.send_timeout(question, BUSY)).await?.map_err(|_| {
                    Status::unavailable("driftd is too busy to answer, try again in a moment")
                })?;
            }
            Err(TrySendError::Disconnected(_)) => {
                return Err(lookup_failed(&LookupError::Stopping));
            }
        }
        answer.await.map_err(|_| lookup_failed(&LookupError::Stopping))
    }

    /// Which container a person means: one that is watched, or one that is
    /// gone and left findings or sessions.
    async fn resolve(&self, text: String) -> Result<ContainerId, Status> {
        let live = match self.live {
            Some(_) => {
                self.ask(|reply| ApiRequest::Lookup { container: text.clone(), reply }).await?
            }
            None => Err(LookupError::Unknown(printable(text.as_bytes()))),
        };
        let mut candidates = self.remembered(&text).await?;
        let unknown = match live {
            Ok(container) => {
                candidates.push(container);
                None
            }
            Err(err @ (LookupError::Ambiguous(..) | LookupError::Stopping)) => {
                return Err(lookup_failed(&err));
            }
            Err(err) => Some(err),
        };
        candidates.sort();
        candidates.dedup();
        let is_whole =
            |container: &ContainerId| container.named_by(&text) == Some(NamedBy::WholeId);
        if candidates.iter().any(is_whole) {
            candidates.retain(is_whole);
        }
        match candidates.len() {
            0 => Err(lookup_failed(&match unknown {
                None | Some(LookupError::Unknown(_)) => self.alike(&text).await?,
                Some(told) => told,
            })),
            1 => Ok(candidates.remove(0)),
            several => {
                let text = printable(text.as_bytes());
                Err(lookup_failed(&LookupError::Ambiguous(text, several)))
            }
        }
    }

    /// That a text names no container; which ones begin like it, if some do.
    async fn alike(&self, text: &str) -> Result<LookupError, Status> {
        const MOST: usize = 3;
        let wanted = text.to_owned();
        let alike = self.read(move |reader| reader.containers_beginning_with(&wanted)).await?;
        let alike: Vec<String> = alike.iter().take(MOST).map(ToString::to_string).collect();
        let text = printable(text.as_bytes());
        Ok(match &alike[..] {
            [] => LookupError::Unknown(text),
            some => LookupError::NotWhole(text, some.join(", ")),
        })
    }

    /// The containers of the history that a person names by `text`.
    async fn remembered(&self, text: &str) -> Result<Vec<ContainerId>, Status> {
        let wanted = text.to_owned();
        self.read(move |reader| reader.containers(&wanted)).await
    }

    /// Makes sure that the one container which is there and which `text` names is the one
    /// that is meant: one that is gone may have had this as its whole ID.
    async fn is_meant(&self, text: &str) -> Result<(), Status> {
        let is_whole = |container: &ContainerId| container.named_by(text) == Some(NamedBy::WholeId);
        let container = text.to_owned();
        let live = self.ask(|reply| ApiRequest::Lookup { container, reply }).await?;
        match &live {
            Ok(container) if is_whole(container) => return Ok(()),
            Err(err @ (LookupError::Ambiguous(..) | LookupError::Stopping)) => {
                return Err(lookup_failed(err));
            }
            Ok(_) | Err(_) => (),
        }
        if let Some(gone) = self.remembered(text).await?.iter().find(|gone| is_whole(gone)) {
            return Err(lookup_failed(&LookupError::Gone(gone.to_string())));
        }
        live.map(drop).map_err(|err| lookup_failed(&err))
    }

    /// Who is to be answered: the container that is named, or that of the finding that is.
    async fn target(
        &self,
        container: String,
        finding: String,
    ) -> Result<(String, Option<Box<(FindingId, Incarnation)>>), Status> {
        if finding.is_empty() {
            self.is_meant(&container).await?;
            return Ok((container, None));
        }
        let shown = printable(finding.as_bytes());
        let found = self.read(move |reader| reader.finding(&finding)).await?;
        let finding = the_one(found, "finding", &shown)?;
        let of = finding.container_id().zip(finding.run).ok_or_else(|| {
            Status::failed_precondition(format!(
                "finding {} does not say in which run of a container it was seen: name the \
                 container instead",
                finding.id
            ))
        })?;
        let (id, run) = of;
        if !container.is_empty() && id.named_by(&container).is_none() {
            return Err(Status::invalid_argument(format!(
                "finding {} is of container {id}, and not of `{}`",
                finding.id,
                printable(container.as_bytes())
            )));
        }
        Ok((format!("{}/{}", id.namespace, id.id), Some(Box::new((finding.id, run)))))
    }

    async fn filter(&self, filter: Option<proto::FindingFilter>) -> Result<Filter, Status> {
        let filter = filter.unwrap_or_default();
        let minimum_severity = convert::severity_from_proto(filter.minimum_severity());
        let kinds: Vec<Vec<Kind>> = filter
            .kinds
            .iter()
            .map(|kind| Kind::named_by(kind))
            .collect::<Result<_, _>>()
            .map_err(|err| Status::invalid_argument(err.to_string()))?;
        Ok(Filter {
            container: self.resolve_any(filter.container).await?,
            image: (!filter.image.is_empty()).then_some(filter.image),
            kinds: kinds.concat(),
            minimum_severity,
            since: optional_time("since", filter.since)?,
            until: optional_time("until", filter.until)?,
            content: Content {
                paths: filter.paths,
                hashes: hexadecimal("hash", filter.hashes)?,
                sessions: hexadecimal("session", filter.sessions)?,
                pods: filter.pods,
                pod_namespaces: filter.pod_namespaces,
                labels: filter.labels,
                texts: filter.texts,
            },
        })
    }

    /// The same; empty text means no one.
    async fn resolve_any(&self, text: String) -> Result<Option<ContainerId>, Status> {
        match text {
            text if text.is_empty() => Ok(None),
            text => self.resolve(text).await.map(Some),
        }
    }

    /// Asks the history.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&history::Reader) -> Result<T, history::Error> + Send + 'static,
    ) -> Result<T, Status> {
        let reader = self.history.clone();
        unblock(move || read(&reader)).await?.map_err(|err| history_failed(&err))
    }

    /// How a container differs from its image, when a scan of it is over.
    async fn diff(&self, container: String) -> Result<Diff, Status> {
        self.is_meant(&container).await?;
        self.ask(|reply| ApiRequest::Diff { container, reply })
            .await?
            .map_err(|err| lookup_failed(&err))
    }

    async fn session(&self, text: String) -> Result<Box<Session>, Status> {
        let shown = printable(text.as_bytes());
        let found = self.read(move |reader| reader.session(&text)).await?;
        the_one(found, "session", &shown)
    }
}

/// The status of a daemon whose pipeline does not answer, and why that may be.
fn silent(threads: &[View]) -> pipeline::Status {
    let seconds = BUSY.as_secs();
    let mut problems = vec![format!("the pipeline has not answered for {seconds} s")];
    problems.extend(threads.iter().filter(|thread| thread.is_stuck).map(|thread| {
        let View { name, still, .. } = thread;
        format!("the thread `{name}` has made no progress for {} s", still.as_secs())
    }));
    pipeline::Status {
        started_at: jiff::Timestamp::now(),
        endpoints: Vec::new(),
        containers_watched: 0,
        containers_waiting: 0,
        problems,
        gaps: Vec::new(),
    }
}

fn thread_to_proto(view: &View) -> proto::Thread {
    let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    proto::Thread {
        name: view.name.to_owned(),
        queued: view.depth,
        oldest_milliseconds: milliseconds(view.oldest),
        still_milliseconds: milliseconds(view.still),
        stuck: view.is_stuck,
    }
}

type Stream<T> = ReceiverStream<Result<T, Status>>;

#[tonic::async_trait]
impl DriftService for Service {
    async fn get_status(
        &self,
        _: Request<proto::GetStatusRequest>,
    ) -> Result<Response<proto::GetStatusResponse>, Status> {
        let health = &self.backend()?.health;
        let asked = async {
            let status = self.ask(ApiRequest::Status).await?;
            Ok::<_, Status>((status, self.ask(ApiRequest::Containers).await?))
        };
        let (status, views) = match tokio::time::timeout(BUSY, asked).await {
            Ok(asked) => asked?,
            // What is known without the one thread that knows the rest.
            Err(_) => (silent(&health.threads.views()), Vec::new()),
        };
        let without_baseline =
            views.iter().filter(|view| view.baseline.starts_with("none")).count();
        let (store, reader) = (self.backend()?.baselines.clone(), self.history.clone());
        let (baselines, verified, findings) = unblock(move || {
            let images = store.images();
            let is_verified = |chain_id| store.known_by(chain_id).0 == KnownBy::Verified;
            let verified = images.iter().filter(|image| is_verified(image.chain_id)).count();
            (images.len(), verified, reader.count())
        })
        .await?;
        let queue = self.backend()?.recorder.queue();
        let mut problems = status.problems;
        problems.extend(health.problems());
        problems.extend(self.backend()?.images.problems());
        let backlogs = health.backlogs();
        problems.extend(backlogs.iter().filter(|backlog| backlog.is_late()).map(|backlog| {
            let Backlog { stage, container, waiting, oldest } = backlog;
            let (name, seconds) = (Failure::FindingsDelayed.name(), oldest.as_secs());
            format!(
                "findings of container {container} are delayed by {seconds}s ({name}): \
                 {waiting} waiting in {stage}"
            )
        }));
        let findings = findings.unwrap_or_else(|err| {
            problems.push(err.to_string());
            0
        });
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(proto::GetStatusResponse {
            version: env!("CARGO_PKG_VERSION").into(),
            node: self.backend()?.node.clone(),
            started_at: Some(convert::time_to_proto(status.started_at)),
            complete: problems.is_empty(),
            problems,
            endpoints: status.endpoints.into_iter().map(convert::endpoint_to_proto).collect(),
            containers_watched: status.containers_watched,
            baselines: count(baselines),
            baselines_pending: status
                .containers_waiting
                .saturating_add(count(self.backend()?.recorder.pending())),
            findings,
            gate_answers: health.gate_answers(),
            data_writes: health.data_writes.load(Ordering::Relaxed),
            losses: health
                .losses()
                .into_iter()
                .map(|loss| proto::Loss { name: loss.name, count: loss.count })
                .collect(),
            backlogs: backlogs.into_iter().map(convert::backlog_to_proto).collect(),
            gaps: status.gaps.into_iter().map(convert::gap_to_proto).collect(),
            missing: health
                .missing
                .get()
                .into_iter()
                .flatten()
                .map(|missing| proto::Missing {
                    name: missing.name.clone(),
                    since: missing.since.clone(),
                    meaning: missing.meaning.clone(),
                })
                .collect(),
            baseline_queue: Some(proto::BaselineQueue {
                recording: count(queue.recording),
                waiting: count(queue.waiting),
                oldest_seconds: queue.oldest.map_or(0, |age| age.as_secs()),
                verifying: count(queue.verifying),
            }),
            baselines_verified: count(verified),
            containers_without_baseline: count(without_baseline),
            gate: health.gating.get().map(|gating| proto::Gate {
                mode: gating.mode.to_owned(),
                instead: gating.instead.clone().unwrap_or_default(),
                ignored: health.gate_ignored(),
                copy_ups: health.copy_ups(),
            }),
            threads: health.threads.views().iter().map(thread_to_proto).collect(),
            findings_by_kind: health
                .found()
                .into_iter()
                .map(|(kind, severity, count)| proto::FindingCount {
                    kind: kind.to_owned(),
                    severity: severity.to_owned(),
                    count,
                })
                .collect(),
            left_to_sweeps: health.left_to_sweeps.load(Ordering::Relaxed),
            arguments_unrecorded: health.arguments_unrecorded.load(Ordering::Relaxed),
            arguments_unrecorded_of_host: health
                .arguments_unrecorded_of_host
                .load(Ordering::Relaxed),
        }))
    }

    async fn list_containers(
        &self,
        _: Request<proto::ListContainersRequest>,
    ) -> Result<Response<proto::ListContainersResponse>, Status> {
        let views = self.ask(ApiRequest::Containers).await?;
        let store = self.backend()?.baselines.clone();
        let containers = unblock(move || {
            let container = |view: ContainerView| {
                let chain_id = view.container.chain_id().filter(|_| view.baseline == "ready");
                let known_by = chain_id.map(|chain_id| store.known_by(chain_id).0);
                convert::container_to_proto(view, known_by.map(baselines::known_by_name))
            };
            views.into_iter().map(container).collect()
        });
        Ok(Response::new(proto::ListContainersResponse { containers: containers.await? }))
    }

    async fn diff_container(
        &self,
        request: Request<proto::DiffContainerRequest>,
    ) -> Result<Response<proto::DiffContainerResponse>, Status> {
        let diff = self.diff(request.into_inner().container).await?;
        Ok(Response::new(convert::diff_to_proto(&diff)))
    }

    type StreamDiffStream = Stream<proto::DiffContainerResponse>;

    async fn stream_diff(
        &self,
        request: Request<proto::DiffContainerRequest>,
    ) -> Result<Response<Self::StreamDiffStream>, Status> {
        let diff = self.diff(request.into_inner().container).await?;
        // Whoever reads them one after the other needs few of them ready.
        let (client, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            for message in convert::diff_to_protos(&diff) {
                if client.send(Ok(message)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn list_baselines(
        &self,
        request: Request<proto::ListBaselinesRequest>,
    ) -> Result<Response<proto::ListBaselinesResponse>, Status> {
        let store = self.backend()?.baselines.clone();
        let image = request.into_inner().image;
        let baselines =
            unblock(move || baselines::list(&store, &image)).await?.map_err(Unusable::from)?;
        Ok(Response::new(proto::ListBaselinesResponse { baselines }))
    }

    type ExportBaselineStream = Stream<proto::BaselineFile>;

    async fn export_baseline(
        &self,
        request: Request<proto::ExportBaselineRequest>,
    ) -> Result<Response<Self::ExportBaselineStream>, Status> {
        let image = request.into_inner().image;
        let store = self.backend()?.baselines.clone();
        let baseline = unblock(move || baselines::open(&store, &image)).await??;
        let (client, stream) = mpsc::channel(STREAM);
        tokio::task::spawn_blocking(move || {
            for known in baseline.files() {
                if client.blocking_send(Ok(baselines::file_to_proto(known))).is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type RecordBaselineStream = Stream<proto::RecordBaselineProgress>;

    async fn record_baseline(
        &self,
        request: Request<proto::RecordBaselineRequest>,
    ) -> Result<Response<Self::RecordBaselineStream>, Status> {
        let image = request.into_inner().image;
        let backend = self.backend()?.clone();
        let (client, stream) = mpsc::channel(STREAM);
        tokio::spawn(async move {
            let progress = Arc::new(Progress::default());
            let recording =
                backend.images.record_image(&image, Proof::Later, Arc::clone(&progress));
            let last = tell_progress(recording, &client, || progress_to_proto(&progress)).await;
            let last = match last {
                None => return,
                Some(Err(err)) => Err(Status::failed_precondition(err)),
                Some(Ok(recorded)) => {
                    let store = backend.baselines.clone();
                    let found = unblock(move || {
                        let record = store.find(&recorded.baseline.chain_id().to_string())?;
                        Ok(baselines::baseline_to_proto(&store, record))
                    });
                    match found.await {
                        Ok(Ok(baseline)) => Ok(proto::RecordBaselineProgress {
                            baseline: Some(baseline),
                            ..progress_to_proto(&progress)
                        }),
                        Ok(Err(err)) => Err(Unusable::NotFound(err).into()),
                        Err(status) => Err(status),
                    }
                }
            };
            // The client may be gone; the baseline is recorded all the same.
            let _ = client.send(last).await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type VerifyBaselineStream = Stream<proto::VerifyBaselineProgress>;

    async fn verify_baseline(
        &self,
        request: Request<proto::VerifyBaselineRequest>,
    ) -> Result<Response<Self::VerifyBaselineStream>, Status> {
        self.backend()?;
        let (client, stream) = mpsc::channel(STREAM);
        tokio::spawn(self.clone().verify(request.into_inner(), client));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type DiffBaselinesStream = Stream<proto::BaselineDifference>;

    async fn diff_baselines(
        &self,
        request: Request<proto::DiffBaselinesRequest>,
    ) -> Result<Response<Self::DiffBaselinesStream>, Status> {
        let proto::DiffBaselinesRequest { a, b } = request.into_inner();
        let store = self.backend()?.baselines.clone();
        let (a, b) = unblock(move || {
            Ok::<_, Unusable>((baselines::open(&store, &a)?, baselines::open(&store, &b)?))
        })
        .await??;
        let (client, stream) = mpsc::channel(STREAM);
        tokio::task::spawn_blocking(move || {
            for difference in baseline::diff(&a, &b) {
                let difference = baselines::difference_to_proto(difference);
                if client.blocking_send(Ok(difference)).is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn remove_baseline(
        &self,
        request: Request<proto::RemoveBaselineRequest>,
    ) -> Result<Response<proto::RemoveBaselineResponse>, Status> {
        let image = request.into_inner().image;
        let store = self.backend()?.baselines.clone();
        let record = unblock(move || store.find(&image)).await?.map_err(Unusable::from)?;
        let (reply, answer) = oneshot::channel();
        // Whoever asked may have gone by the time it is done.
        let done = Box::new(move |result| drop(reply.send(result)));
        self.backend()?.recorder.remove(record.chain_id, done);
        answer.await.map_err(|_| stopping())?.map_err(Status::failed_precondition)?;
        Ok(Response::new(proto::RemoveBaselineResponse {
            chain_id: record.chain_id.to_string(),
            names: record.names.into_iter().map(|name| name.name).collect(),
        }))
    }

    async fn prune_baselines(
        &self,
        _: Request<proto::PruneBaselinesRequest>,
    ) -> Result<Response<proto::PruneBaselinesResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        // Whoever asked may have gone by the time it is done.
        self.backend()?.recorder.prune(Box::new(move |result| drop(reply.send(result))));
        let collected = answer.await.map_err(|_| stopping())?.map_err(Status::internal)?;
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Response::new(proto::PruneBaselinesResponse {
            images: count(collected.images),
            layers: count(collected.layers),
            bytes: collected.bytes,
        }))
    }

    async fn list_findings(
        &self,
        request: Request<proto::ListFindingsRequest>,
    ) -> Result<Response<proto::ListFindingsResponse>, Status> {
        let request = request.into_inner();
        let filter = self.filter(request.filter).await?;
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let reader = self.history.clone();
        let page = unblock(move || reader.findings(&filter, after, limit))
            .await?
            .map_err(|err| history_failed(&err))?;
        Ok(Response::new(proto::ListFindingsResponse {
            findings: page.findings.into_iter().map(convert::finding_to_proto).collect(),
            next_page_token: page.next.map(|token| token.to_string()).unwrap_or_default(),
        }))
    }

    async fn get_finding(
        &self,
        request: Request<proto::GetFindingRequest>,
    ) -> Result<Response<proto::GetFindingResponse>, Status> {
        let id = request.into_inner().id;
        let shown = printable(id.as_bytes());
        let reader = self.history.clone();
        let found = unblock(move || {
            let found = reader.finding(&id)?;
            let mut responses = Vec::new();
            let mut also_in = AlsoIn::default();
            if let FindingLookup::Found(finding) = &found {
                if let Some(container) = finding.container_id() {
                    responses = reader.responses(container)?;
                }
                also_in = reader.also_in(finding)?;
            }
            Ok((found, responses, also_in))
        });
        let (found, mut responses, also_in) = found.await?.map_err(|err| history_failed(&err))?;
        let finding = the_one(found, "finding", &shown)?;
        responses.retain(|response| response.requested_at >= finding.first_seen);
        let older = responses.len().saturating_sub(MAX_RESPONSES);
        let responses = responses.into_iter().skip(older);
        Ok(Response::new(proto::GetFindingResponse {
            finding: Some(convert::finding_to_proto(*finding)),
            responses: responses.map(convert::response_to_proto).collect(),
            also_in: Some(convert::also_in_to_proto(&also_in)),
        }))
    }

    async fn list_members(
        &self,
        request: Request<proto::ListMembersRequest>,
    ) -> Result<Response<proto::ListMembersResponse>, Status> {
        let request = request.into_inner();
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let shown = printable(request.finding.as_bytes());
        let (reader, text) = (self.history.clone(), request.finding);
        let found = unblock(move || reader.finding(&text)).await?;
        let id = the_one(found.map_err(|err| history_failed(&err))?, "finding", &shown)?.id;
        let reader = self.history.clone();
        let page = unblock(move || reader.members(id, after, limit))
            .await?
            .map_err(|err| history_failed(&err))?;
        Ok(Response::new(proto::ListMembersResponse {
            members: page.members.iter().map(convert::member_to_proto).collect(),
            next_page_token: page.next.map(|token| token.to_string()).unwrap_or_default(),
            finding: id.to_string(),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<proto::ListSessionsRequest>,
    ) -> Result<Response<proto::ListSessionsResponse>, Status> {
        let request = request.into_inner();
        let filter = request.filter.unwrap_or_default();
        let filter = SessionFilter {
            state: convert::state_from_proto(filter.state()),
            since: optional_time("since", filter.since)?,
            until: optional_time("until", filter.until)?,
            container: self.resolve_any(filter.container).await?,
        };
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let page = self.read(move |reader| reader.sessions(&filter, after, limit)).await?;
        Ok(Response::new(proto::ListSessionsResponse {
            sessions: page.sessions.into_iter().map(convert::session_to_proto).collect(),
            next_page_token: page.next.map(|token| token.to_string()).unwrap_or_default(),
        }))
    }

    async fn get_session(
        &self,
        request: Request<proto::GetSessionRequest>,
    ) -> Result<Response<proto::GetSessionResponse>, Status> {
        let session = self.session(request.into_inner().id).await?;
        let mut ids: Vec<FindingId> = session.finding.into_iter().collect();
        ids.extend(session.findings.iter().filter(|id| Some(**id) != session.finding));
        let findings = self.read(move |reader| reader.findings_of(&ids)).await?;
        Ok(Response::new(proto::GetSessionResponse {
            session: Some(convert::session_to_proto(*session)),
            findings: findings.into_iter().map(convert::finding_to_proto).collect(),
        }))
    }

    async fn list_commands(
        &self,
        request: Request<proto::ListCommandsRequest>,
    ) -> Result<Response<proto::ListCommandsResponse>, Status> {
        let request = request.into_inner();
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let id = self.session(request.session).await?.id;
        let page = self.read(move |reader| reader.commands(id, after, limit)).await?;
        Ok(Response::new(proto::ListCommandsResponse {
            commands: page.commands.into_iter().map(convert::command_to_proto).collect(),
            next_page_token: page.next.map(|token| token.to_string()).unwrap_or_default(),
            session: id.to_string(),
        }))
    }

    async fn get_timeline(
        &self,
        request: Request<proto::GetTimelineRequest>,
    ) -> Result<Response<proto::GetTimelineResponse>, Status> {
        let request = request.into_inner();
        let since = optional_time("since", request.since)?;
        let until = optional_time("until", request.until)?;
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let container = self.resolve(request.container).await?;
        let of = container.clone();
        let page =
            self.read(move |reader| reader.timeline(&of, since, until, after, limit)).await?;
        Ok(Response::new(proto::GetTimelineResponse {
            entries: page.entries.into_iter().map(convert::timeline_entry_to_proto).collect(),
            next_page_token: page.next.map(|token| token.to_string()).unwrap_or_default(),
            namespace: container.namespace.to_string(),
            container: container.id.to_string(),
        }))
    }

    async fn list_probes(
        &self,
        request: Request<proto::ListProbesRequest>,
    ) -> Result<Response<proto::ListProbesResponse>, Status> {
        let container = self.resolve_any(request.into_inner().container).await?;
        let probes = self.read(move |reader| reader.probes(container.as_ref())).await?;
        Ok(Response::new(proto::ListProbesResponse {
            probes: probes.into_iter().map(convert::probe_to_proto).collect(),
        }))
    }

    async fn set_probe(
        &self,
        request: Request<proto::SetProbeRequest>,
    ) -> Result<Response<proto::SetProbeResponse>, Status> {
        let proto::SetProbeRequest { probe: text, reported } = request.into_inner();
        let shown = printable(text.as_bytes());
        let found = self.read(move |reader| reader.probe(&text)).await?;
        let id = the_one(found, "probe", &shown)?.id;
        let probe = self
            .ask(|reply| ApiRequest::SetProbe { probe: id, reported, reply })
            .await?
            .map_err(|err| lookup_failed(&err))?;
        let what = if reported { "reported" } else { "counted" };
        self.wait_until_kept(&format!("probe {id} is {what}"), move |reader| {
            let kept = reader.probe(&id.to_string())?;
            Ok(matches!(kept, ProbeLookup::Found(kept) if kept.reported == reported))
        })
        .await?;
        Ok(Response::new(proto::SetProbeResponse { probe: Some(convert::probe_to_proto(probe)) }))
    }

    type FollowFindingsStream = Inbox;

    async fn follow_findings(
        &self,
        request: Request<proto::FollowFindingsRequest>,
    ) -> Result<Response<Self::FollowFindingsStream>, Status> {
        let request = request.into_inner();
        let filter = self.filter(request.filter).await?;
        let cursor = request.after_cursor.unwrap_or_default();
        let (client, stream) = outbox(&self.followers.pool, cursor, PATIENCE);
        let follower = Follower {
            reading: Arc::clone(&self.followers.reading),
            reader: self.history.clone(),
            filter,
            sessions: request.sessions,
            committed: self.committed.clone(),
            stopping: self.stopping.clone(),
            client,
        };
        tokio::spawn(follower.run(request.after_cursor));
        Ok(Response::new(stream))
    }

    async fn respond(
        &self,
        request: Request<proto::RespondRequest>,
    ) -> Result<Response<proto::RespondResponse>, Status> {
        let requested_by = request
            .extensions()
            .get::<Peer>()
            .map(ToString::to_string)
            .ok_or_else(|| Status::permission_denied("it is not known who is asking"))?;
        let request = request.into_inner();
        let action = convert::action_from_proto(request.action()).ok_or_else(|| {
            Status::invalid_argument("the action is missing: kill, pause or resume")
        })?;
        let reason = request.reason.trim().to_owned();
        if reason.is_empty() || reason.len() > MAX_REASON {
            return Err(Status::invalid_argument(format!(
                "a response needs a reason, of at most {MAX_REASON} bytes: it is kept in the history"
            )));
        }
        let no_restart = request.no_restart;
        if no_restart && action != respond::Action::Kill {
            return Err(Status::invalid_argument("only a kill can be without a restart"));
        }
        let (container, cause) = self.target(request.container, request.finding).await?;
        let response = self
            .ask(|reply| ApiRequest::Respond {
                container,
                cause,
                action,
                reason,
                requested_by,
                no_restart,
                reply,
            })
            .await?
            .map_err(|err| lookup_failed(&err))?;
        self.wait_until_recorded(&response).await?;
        Ok(Response::new(proto::RespondResponse {
            namespace: response.container.namespace.to_string(),
            container: response.container.id.to_string(),
            outcome: Some(convert::outcome_to_proto(response.outcome)),
        }))
    }
}

impl Service {
    async fn wait_until_recorded(&self, response: &respond::Response) -> Result<(), Status> {
        let (container, requested_at) = (response.container.clone(), response.requested_at);
        self.wait_until_kept(&response.outcome.message, move |reader| {
            let kept = reader.responses(&container)?;
            Ok(kept.iter().any(|kept| kept.requested_at == requested_at))
        })
        .await
    }

    /// Whoever is told of something finds it in the history, whatever happens to
    /// driftd next. `done` says what was done, for when that cannot be kept.
    async fn wait_until_kept(
        &self,
        done: &str,
        is_kept: impl Fn(&history::Reader) -> Result<bool, history::Error> + Clone + Send + 'static,
    ) -> Result<(), Status> {
        let mut committed = self.committed.clone();
        let kept = async {
            loop {
                committed.mark_unchanged();
                if self.read(is_kept.clone()).await? {
                    return Ok(());
                }
                if committed.changed().await.is_err() {
                    return Err(stopping());
                }
            }
        };
        tokio::time::timeout(RECORDED_WITHIN, kept).await.unwrap_or_else(|_| {
            Err(Status::data_loss(format!(
                "{done} (but the history could not keep it; see: driftd status)"
            )))
        })
    }
}

fn stopping() -> Status {
    Status::unavailable("driftd is stopping")
}

pub(super) fn progress_to_proto(progress: &Progress) -> proto::RecordBaselineProgress {
    proto::RecordBaselineProgress {
        files_done: progress.files_done.load(Ordering::Relaxed),
        bytes_done: progress.bytes_done.load(Ordering::Relaxed),
        layers_done: progress.layers_done.load(Ordering::Relaxed),
        layers_total: progress.layers_total.load(Ordering::Relaxed),
        baseline: None,
    }
}

/// Waits for the work and tells the client how far it is. `None` when the client
/// has gone.
pub(super) async fn tell_progress<T, M>(
    mut work: Pin<Box<dyn Future<Output = T> + Send + '_>>,
    client: &mpsc::Sender<Result<M, Status>>,
    now: impl Fn() -> M,
) -> Option<T> {
    let mut ticks = tokio::time::interval(PROGRESS_EVERY);
    loop {
        tokio::select! {
            done = &mut work => return Some(done),
            _ = ticks.tick() => client.send(Ok(now())).await.ok()?,
        }
    }
}
/// Where a page begins; at the beginning without a token.
fn page_token<T>(token: &str) -> Result<Option<T>, Status>
where
    T: std::str::FromStr<Err = history::BadPageToken>,
{
    if token.is_empty() {
        return Ok(None);
    }
    let malformed = |err: history::BadPageToken| Status::invalid_argument(err.to_string());
    token.parse().map(Some).map_err(malformed)
}

/// How long a page may be.
fn page_limit(asked: u32) -> usize {
    match asked {
        0 => PAGE,
        size => usize::try_from(size).unwrap_or(PAGE).min(PAGE),
    }
}
