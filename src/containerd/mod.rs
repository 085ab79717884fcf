//! What runs on this node, as containerd tells it (async).
//!
//! ```text
//!  socket ── events ──> read ── queue ──> dispatch ──────── outbox ── RuntimeEvent ──> pipeline
//!                                            │ look again      ^
//!                                            ├──> describe ────┘ (containers, tasks, snapshots)
//!                                            └──> images ── RecordRequest ──> baseline's recorder
//! ```
//!
//! # Why nothing is lost
//! containerd replays no event, and `subscribe()` returns only with the first
//! one, so there is no moment at which "subscribed" is known. Therefore a marker
//! of our own is published (an empty event under a topic that only we filter
//! for; it changes nothing in containerd) until it comes back on the stream.
//! From then on the subscription is in place, and only then is everything
//! listed: what happened before the marker is in the list, what happens after
//! it is on the stream, and what is in both is told twice to nobody, because
//! the outbox compares. If the marker does not come back, the list is made all
//! the same and made again with the first event.
//!
//! Events and lists meet in the outbox, which refuses an answer that was asked
//! for before its container's last event. The end of the stream, an error on it
//! or a containerd that does not answer for ten seconds end the connection; the
//! next one starts anew, with a marker and a list. A list is also made when our
//! own queue has overflowed, when an event could not be read, and every minute:
//! shims forget the events of the time in which containerd was down.
//!
//! Execs are different. No list tells of them afterwards and no record changes by
//! them, and health probes make them every few seconds: so nobody waits on their
//! behalf, and those that find a queue half full are counted and dropped
//! (`exec_events_full`). Of a session this takes what the runtime calls it, not
//! the session.

pub mod describe;

mod blobs;
mod connection;
mod containers;
mod cri;
mod docker;
mod endpoint;
mod events;
mod images;
mod manifests;
mod outbox;
mod probes;
mod restarts;
mod snapshots;
mod spec;
mod tasks;

use std::fmt;
use std::sync::Arc;

use crossbeam_channel::Sender;
use jiff::Timestamp;
use tokio::task::AbortHandle;

pub use self::blobs::ContentBlobs;
use self::endpoint::Endpoint;
use self::images::{Ask, Trouble};
use crate::baseline::{ImageName, Progress, Proof, RecordRequest, Recorded, Recorder};
use crate::config;
use crate::health::Health;
use crate::model::{
    ChainId, Container, ContainerId, Exit, Incarnation, LayerId, OverlayDirs, Restarter, printable,
};

/// One change on the node. containerd replays nothing, so after every
/// (re)connection everything is listed anew and [`RuntimeEvent::Listed`] ends the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuntimeEvent {
    Connected {
        endpoint: Arc<str>,
    },
    /// The stream ended or the socket is not there; it is being tried again.
    Disconnected {
        endpoint: Arc<str>,
        reason: String,
    },
    /// A task was created: its init exists and has not yet executed the
    /// container's entry point. Sent before anything else is asked of
    /// containerd, because only milliseconds are left.
    TaskCreated {
        container: ContainerId,
        pid: u32,
        /// From the event itself, when it names an overlay.
        rootfs: Option<OverlayDirs>,
    },
    /// A container's full record: new, or changed.
    Container(Box<Container>),
    /// The init process has ended.
    TaskExited {
        container: ContainerId,
    },
    /// A process that the runtime was asked to execute in a container is there.
    /// The container may be one that was not told of yet.
    ExecStarted {
        container: ContainerId,
        exec_id: String,
        pid: u32,
    },
    /// It has ended.
    ExecExited {
        container: ContainerId,
        exec_id: String,
        pid: u32,
        exit: Exit,
        at: Timestamp,
    },
    /// The container's record is gone.
    Removed {
        container: ContainerId,
    },
    /// Everything this endpoint has was sent; what is not named is gone.
    Listed {
        endpoint: Arc<str>,
        containers: Vec<ContainerId>,
    },
}

/// What whoever marks containers is told at once, on a way of its own: behind the
/// pipeline it would wait for the disk. The pipeline is told as well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Urgent {
    TaskCreated { container: ContainerId, pid: u32, rootfs: Option<OverlayDirs> },
    TaskExited { container: ContainerId, pid: u32 },
}

/// Takes what is urgent, and never waits.
pub type Lane = Arc<dyn Fn(Urgent) + Send + Sync>;

/// Who makes baselines of the images that containerd has.
pub trait Recording: Send + Sync + 'static {
    /// May wait for room.
    fn submit(&self, job: RecordRequest);
    /// Those of `layers` whose directories would have to be read.
    fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId>;
    /// All images that one containerd has now. Must not wait.
    fn image_names(&self, endpoint: &str, listed: Vec<(ImageName, ChainId)>);
    /// There is no image of this name any more. Must not wait.
    fn image_removed(&self, namespace: &str, name: &str);
}

impl Recording for Recorder {
    fn submit(&self, job: RecordRequest) {
        Recorder::submit(self, job);
    }

    fn unrecorded(&self, layers: &[LayerId]) -> Vec<LayerId> {
        Recorder::unrecorded(self, layers)
    }

    fn image_names(&self, endpoint: &str, listed: Vec<(ImageName, ChainId)>) {
        Recorder::image_names(self, endpoint, listed);
    }

    fn image_removed(&self, namespace: &str, name: &str) {
        Recorder::image_removed(self, namespace, name);
    }
}

/// An image without a baseline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageProblem {
    pub endpoint: Arc<str>,
    pub namespace: String,
    pub name: String,
    /// What the reason is about: a blob, or a stack of layers.
    pub digest: String,
    pub reason: String,
}

/// Why something asked of containerd could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no containerd knows the container {0} (see: driftd containers)")]
    UnknownContainer(ContainerId),
    /// The run of a container that was meant is over: nothing was done.
    #[error("gone: {0}")]
    Gone(String),
    #[error("{0}")]
    Failed(String),
    #[error("containerd at {socket} is not connected")]
    NotConnected { socket: String },
    #[error("containerd at {socket} refused: {reason}")]
    Refused { socket: String, reason: String },
    #[error("containerd has no image `{name}` (see: ctr -n NAMESPACE images ls)")]
    UnknownImage { name: String },
    #[error(
        "`{name}` is no container image: it holds something else, such as a signature, an \
         attestation, a chart or a checkpoint, and no container runs it (nothing to record)"
    )]
    NoImage { name: String },
    #[error(
        "the image `{name}` cannot be read: {reason} (pull it again, or start a container of it)"
    )]
    NotUnpacked { name: String, reason: String },
    #[error("the image `{name}` cannot be recorded: {reason} ({digest})")]
    Unresolvable { name: String, digest: String, reason: String },
}

/// What came of a kill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    /// What happened and what follows, in words.
    pub message: String,
    /// What starts the container again, or may.
    pub restarter: Option<Restarter>,
}

/// The containerds of this node. Clones are handles to the same.
#[derive(Clone)]
pub struct Containerd {
    endpoints: Arc<[Arc<Endpoint>]>,
    /// The tasks that follow them.
    following: Arc<[AbortHandle]>,
}

impl fmt::Debug for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.endpoints.iter().map(|endpoint| endpoint.name())).finish()
    }
}

impl Containerd {
    /// Follows every socket of the settings, each in tasks of its own, until the
    /// runtime or the receiver of the changes is gone. Must be called within a
    /// tokio runtime.
    pub fn start(
        settings: &config::Containerd,
        changes: &Sender<RuntimeEvent>,
        recorder: impl Recording,
        health: &Arc<Health>,
    ) -> Containerd {
        Containerd::start_with(settings, changes, recorder, health, None)
    }

    /// The same, with a way for what is urgent.
    pub fn start_with(
        settings: &config::Containerd,
        changes: &Sender<RuntimeEvent>,
        recorder: impl Recording,
        health: &Arc<Health>,
        lane: Option<&Lane>,
    ) -> Containerd {
        let recorder: Arc<dyn Recording> = Arc::new(recorder);
        let endpoints: Arc<[Arc<Endpoint>]> = settings
            .sockets
            .iter()
            .map(|socket| {
                Arc::new(Endpoint::new(
                    socket,
                    &settings.exclude_namespaces,
                    changes.clone(),
                    Arc::clone(&recorder),
                    Arc::clone(health),
                    lane.cloned(),
                ))
            })
            .collect();
        let follow = |endpoint| tokio::spawn(Endpoint::run(endpoint)).abort_handle();
        let following = endpoints.iter().cloned().map(follow).collect();
        Containerd { endpoints, following }
    }

    /// Listens to no event any more. Containers can still be killed and paused.
    pub fn stop_following(&self) {
        self.following.iter().for_each(AbortHandle::abort);
    }

    /// Kills all processes of one run of a container. `None` stands for a container of
    /// which no run is known. With `no_restart` containerd's restart monitor is told first
    /// to leave it stopped, if it would start it again.
    pub async fn kill(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        no_restart: bool,
    ) -> Result<Killed, Error> {
        let (endpoint, namespace) = self.find(container).await?;
        let outcome = tasks::kill(&namespace, &container.id, meant, no_restart).await;
        outcome.map_err(|refused| endpoint.not_answered(refused))
    }

    /// Freezes one run of a container; what happened, in words.
    pub async fn pause(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> Result<String, Error> {
        let (endpoint, namespace) = self.find(container).await?;
        let outcome = tasks::pause(&namespace, &container.id, meant).await;
        outcome.map_err(|refused| endpoint.not_answered(refused))
    }

    /// Thaws one run of a container; what happened, in words.
    pub async fn resume(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> Result<String, Error> {
        let (endpoint, namespace) = self.find(container).await?;
        let outcome = tasks::resume(&namespace, &container.id, meant).await;
        outcome.map_err(|refused| endpoint.not_answered(refused))
    }

    /// Has the image `name` recorded, in whichever namespace it is, and waits
    /// for it. A manifest digest or a chain ID is a name as well. If no image has
    /// the name, a container that was made from it may still have its layers.
    pub async fn record_image(
        &self,
        name: &str,
        proof: Proof,
        progress: Arc<Progress>,
    ) -> Result<Recorded, Error> {
        let ask = Ask { proof, progress: Some(progress), now: true };
        let mut unreachable = None;
        let mut namespaces = Vec::new();
        for endpoint in self.endpoints.iter() {
            match endpoint.namespaces().await {
                Ok(found) => {
                    namespaces.extend(found.into_iter().map(|namespace| (endpoint, namespace)));
                }
                Err(error) => unreachable = Some(error),
            }
        }
        for (endpoint, namespace) in &namespaces {
            match endpoint.images.record_now(namespace, name, ask.clone()).await {
                Ok(recorded) => return Ok(recorded),
                Err(Trouble::Unknown) => (),
                Err(trouble) => return Err(endpoint.trouble(name, trouble)),
            }
        }
        for (endpoint, namespace) in &namespaces {
            let container = endpoint.container_of_image(namespace, name).await;
            let Some(container) = container.map_err(|status| endpoint.refused(&status))? else {
                continue;
            };
            if let Some(reason) = container.no_baseline {
                let (name, digest) = (printable(name.as_bytes()), container.id.to_string());
                return Err(Error::Unresolvable { name, digest, reason });
            }
            let recorded = endpoint.images.record_stack(container.layers, ask).await;
            return recorded.map_err(|trouble| endpoint.trouble(name, trouble));
        }
        Err(unreachable.unwrap_or_else(|| Error::UnknownImage { name: printable(name.as_bytes()) }))
    }

    /// The images that have no baseline, and why.
    pub fn image_problems(&self) -> Vec<ImageProblem> {
        self.endpoints.iter().flat_map(|endpoint| endpoint.images.problems()).collect()
    }

    /// Which containerd has this container.
    async fn find(
        &self,
        container: &ContainerId,
    ) -> Result<(&Endpoint, connection::Namespace), Error> {
        let mut unreachable = None;
        for endpoint in self.endpoints.iter() {
            if endpoint.knows(container).await {
                return Ok((endpoint, endpoint.namespace(&container.namespace)?));
            }
            // It may have been created this very moment, or not be listed yet.
            let asked = match endpoint.namespace(&container.namespace) {
                Ok(namespace) => (containers::get(&namespace, &container.id).await, namespace),
                Err(error) => {
                    unreachable = Some(error);
                    continue;
                }
            };
            match asked {
                (Ok(Some(_)), namespace) => return Ok((endpoint, namespace)),
                (Ok(None), _) => (),
                (Err(status), _) => unreachable = Some(endpoint.refused(&status)),
            }
        }
        Err(unreachable.unwrap_or_else(|| Error::UnknownContainer(container.clone())))
    }
}
