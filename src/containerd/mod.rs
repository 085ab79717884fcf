//! What runs on this node, as containerd reports it (async).
//!
//! ```text
//!  socket ── events ──> read ── queue ──> dispatch ──────── outbox ── RuntimeEvent ──> pipeline
//!                                            │ read again      ^
//!                                            ├──> describe ────┘ (containers, tasks, snapshots)
//!                                            └──> images ── RecordRequest ──> baseline's recorder
//! ```
//!
//! # Why nothing is lost
//! containerd replays no event, and `subscribe()` returns only with the first event, so there
//! is no moment at which "subscribed" is known. Therefore driftd publishes a marker of its own
//! (an empty event under a topic that only driftd filters for; it changes nothing in
//! containerd) until the marker comes back on the stream. From then on the subscription is in
//! place, and only then is everything listed. What happened before the marker is in the list,
//! and what happens after it is on the stream. What is in both is reported once, because the
//! outbox compares. If the marker does not come back, the list is made all the same, and made
//! again with the first event.
//!
//! Events and lists meet in the outbox. It refuses an answer of containerd's that was requested
//! before the last event of its container. The end of the stream, an error on it or a
//! containerd that does not answer for ten seconds end the connection; the next one starts anew,
//! with a marker and a list. A list is also made when driftd's own queue has overflowed, when an
//! event could not be read, and every minute: shims forget the events of the time in which
//! containerd was down.
//!
//! Execs are different. No list contains them afterwards, no record changes by them, and health
//! probes make them every few seconds. So nothing waits because of them: when a queue is half
//! full, they are counted and dropped (`exec_events_full`). A session then lacks the name that
//! the runtime gives it; the session itself is seen by other means.

pub mod describe;

mod blobs;
mod changes;
mod connection;
mod containers;
mod cri;
mod docker;
mod endpoint;
mod engine;
mod error;
mod events;
mod images;
mod manifests;
mod outbox;
mod probes;
mod processes;
mod recording;
mod restarts;
mod snapshots;
mod spec;
mod tasks;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crossbeam_channel::Sender;
use tokio::task::AbortHandle;

pub use self::blobs::ContentBlobs;
pub use self::changes::{Lane, RuntimeEvent, Urgent};
use self::endpoint::Endpoint;
pub use self::error::Error;
use self::images::{ImageError, RecordOptions};
pub use self::recording::{ImageProblem, Recording};
pub use self::tasks::Killed;
use crate::baseline::{Progress, Proof, Recorded};
use crate::config;
use crate::health::Health;
use crate::model::{ContainerId, Incarnation, ProcessIdentity, printable};

/// The containerds of this node. Clones are handles to the same.
#[derive(Clone)]
pub struct Containerd {
    endpoints: Arc<[Arc<Endpoint>]>,
    docker_socket: Arc<Path>,
    /// The tasks that follow them.
    following: Arc<[AbortHandle]>,
}

impl fmt::Debug for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.endpoints.iter().map(|endpoint| endpoint.name())).finish()
    }
}

impl Containerd {
    /// Follows every socket of the settings, each in tasks of its own, until the tokio
    /// runtime or the receiver of the changes is gone. Must be called within a tokio
    /// runtime.
    pub fn start(
        settings: &config::Containerd,
        changes: &Sender<RuntimeEvent>,
        recorder: impl Recording,
        health: &Arc<Health>,
    ) -> Containerd {
        Containerd::start_with(settings, changes, recorder, health, None)
    }

    /// The same, with a lane for urgent changes.
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
        let docker_socket = settings.docker_socket.as_path().into();
        Containerd { endpoints, docker_socket, following }
    }

    /// Stops following events. Containers can still be killed and paused.
    pub fn stop_following(&self) {
        self.following.iter().for_each(AbortHandle::abort);
    }

    /// Kills all processes of one run of a container. `None` stands for a container without a
    /// known run. With `no_restart`, containerd's restart monitor or Docker is first ordered to
    /// leave the container stopped, if it would start it again.
    pub async fn kill(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        no_restart: bool,
    ) -> Result<Killed, Error> {
        let (endpoint, namespace) = self.find(container).await?;
        let stay_stopped = no_restart.then_some(&*self.docker_socket);
        let outcome = tasks::kill(&namespace, &container.id, meant, stay_stopped).await;
        outcome.map_err(|refused| endpoint.refused_response(refused))
    }

    /// Kills one process of a run. Returns what happened, as a text.
    pub async fn kill_process(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
        process: ProcessIdentity,
    ) -> Result<String, Error> {
        let (endpoint, namespace) = self.find(container).await?;
        let outcome = processes::kill(&namespace, &container.id, meant, process).await;
        outcome.map_err(|refused| endpoint.refused_response(refused))
    }

    /// Freezes one run of a container.
    pub async fn pause(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> Result<Killed, Error> {
        let (endpoint, namespace) = self.find(container).await?;
        let outcome = tasks::pause(&namespace, &container.id, meant).await;
        outcome.map_err(|refused| endpoint.refused_response(refused))
    }

    /// Thaws one run of a container. Returns what happened, as a text.
    pub async fn resume(
        &self,
        container: &ContainerId,
        meant: Option<Incarnation>,
    ) -> Result<String, Error> {
        let (endpoint, namespace) = self.find(container).await?;
        let outcome = tasks::resume(&namespace, &container.id, meant).await;
        outcome.map_err(|refused| endpoint.refused_response(refused))
    }

    /// The container's OCI runtime specification, as its record has it.
    pub async fn specification(&self, container: &ContainerId) -> Result<Vec<u8>, Error> {
        let (endpoint, namespace) = self.find(container).await?;
        let record = containers::get(&namespace, &container.id).await;
        let record = record.map_err(|status| endpoint.refused(&status))?;
        let specification = record.and_then(|record| record.spec).map(|spec| spec.value);
        specification.ok_or_else(|| Error::UnknownContainer(container.clone()))
    }

    /// Has the image `name` recorded, in any namespace that has it, and waits for that. A
    /// manifest digest or a chain ID is a name as well. If no image has the name, a container
    /// that was made from it may still have its layers.
    pub async fn record_image(
        &self,
        name: &str,
        proof: Proof,
        progress: Arc<Progress>,
    ) -> Result<Recorded, Error> {
        let options = RecordOptions { proof, progress: Some(progress), now: true };
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
            match endpoint.images.record_now(namespace, name, options.clone()).await {
                Ok(recorded) => return Ok(recorded),
                Err(ImageError::Unknown) => (),
                Err(err) => return Err(endpoint.not_recorded(name, err)),
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
            let recorded = endpoint.images.record_stack(container.layers, options).await;
            return recorded.map_err(|err| endpoint.not_recorded(name, err));
        }
        Err(unreachable.unwrap_or_else(|| Error::UnknownImage { name: printable(name.as_bytes()) }))
    }

    /// The images that have no baseline, and why.
    pub fn image_problems(&self) -> Vec<ImageProblem> {
        self.endpoints.iter().flat_map(|endpoint| endpoint.images.problems()).collect()
    }

    /// The containerd that has this container.
    async fn find(
        &self,
        container: &ContainerId,
    ) -> Result<(&Endpoint, connection::Namespace), Error> {
        let mut unreachable = None;
        for endpoint in self.endpoints.iter() {
            if endpoint.knows(container).await {
                return Ok((endpoint, endpoint.namespace(&container.namespace)?));
            }
            // It may have been created just now, or not be listed yet.
            let answer = match endpoint.namespace(&container.namespace) {
                Ok(namespace) => (containers::get(&namespace, &container.id).await, namespace),
                Err(error) => {
                    unreachable = Some(error);
                    continue;
                }
            };
            match answer {
                (Ok(Some(_)), namespace) => return Ok((endpoint, namespace)),
                (Ok(None), _) => (),
                (Err(status), _) => unreachable = Some(endpoint.refused(&status)),
            }
        }
        Err(unreachable.unwrap_or_else(|| Error::UnknownContainer(container.clone())))
    }
}
