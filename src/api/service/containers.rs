//! Containers: which one a request names, how it differs from its image, what happened in it.
//!
//! Asks the pipeline about live containers, and the history about those that have ended. A
//! diff or a response must never reach another container than the one that the user means.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::backend::Service;
use super::paging::{next_page_token, page_limit, page_token};
use crate::api::failure::{lookup_failed, optional_time, unblock, unreadable};
use crate::api::{baselines, convert, proto};
use crate::model::{ContainerId, NamedBy, printable};
use crate::pipeline::{ApiRequest, ContainerView, Diff, LookupError};

/// Containers that an error names because their IDs begin with the text of the request.
const ALIKE: usize = 3;

impl Service {
    pub(super) async fn list_containers(&self) -> Result<proto::ListContainersResponse, Status> {
        let views = self.ask(ApiRequest::Containers).await?;
        let store = self.store()?;
        let containers = unblock(move || {
            let container = |view: ContainerView| {
                let chain_id = view.container.chain_id().filter(|_| view.baseline == "ready");
                let known_by = chain_id.map(|chain_id| store.known_by(chain_id).0);
                convert::container_to_proto(view, known_by.map(baselines::known_by_name))
            };
            views.into_iter().map(container).collect()
        });
        Ok(proto::ListContainersResponse { containers: containers.await? })
    }

    /// How a container differs from its image, after a new scan of it.
    pub(super) async fn diff_container(&self, container: String) -> Result<Diff, Status> {
        self.check_is_meant(&container).await?;
        self.ask_for(|reply| ApiRequest::Diff { container, reply }).await
    }

    pub(super) async fn stream_diff(
        &self,
        container: String,
    ) -> Result<ReceiverStream<Result<proto::DiffContainerResponse, Status>>, Status> {
        let diff = self.diff_container(container).await?;
        // The client reads one message after the other, so one in advance is enough.
        let (client, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            for message in convert::diff_to_protos(&diff) {
                if client.send(Ok(message)).await.is_err() {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(stream))
    }

    pub(super) async fn timeline(
        &self,
        request: proto::GetTimelineRequest,
    ) -> Result<proto::GetTimelineResponse, Status> {
        let since = optional_time("since", request.since)?;
        let until = optional_time("until", request.until)?;
        let after = page_token(&request.page_token)?;
        let limit = page_limit(request.page_size);
        let container = self.resolve(request.container).await?;
        let id = container.clone();
        let page =
            self.read(move |reader| reader.timeline(&id, since, until, after, limit)).await?;
        let entries = page.entries.into_iter();
        let entries = entries.map(|entry| convert::timeline_entry_to_proto(entry, request.as_json));
        Ok(proto::GetTimelineResponse {
            entries: entries.collect::<Result<_, _>>().map_err(|err| unreadable(&err))?,
            next_page_token: next_page_token(page.next),
            namespace: container.namespace.to_string(),
            container: container.id.to_string(),
        })
    }

    /// The container that `text` names; `None` for empty text.
    pub(super) async fn resolve_any(&self, text: String) -> Result<Option<ContainerId>, Status> {
        match text {
            text if text.is_empty() => Ok(None),
            text => self.resolve(text).await.map(Some),
        }
    }

    /// The container that `text` names: a watched one, or one that has ended and left
    /// findings or sessions in the history.
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
        let is_whole = |container: &ContainerId| is_whole_id(container, &text);
        if candidates.iter().any(is_whole) {
            candidates.retain(is_whole);
        }
        match candidates.len() {
            0 => Err(lookup_failed(&match unknown {
                None | Some(LookupError::Unknown(_)) => self.unknown(&text).await?,
                Some(other) => other,
            })),
            1 => Ok(candidates.remove(0)),
            several => {
                let text = printable(text.as_bytes());
                Err(lookup_failed(&LookupError::Ambiguous(text, several)))
            }
        }
    }

    /// The error for a text that names no container, with the containers that begin with it.
    async fn unknown(&self, text: &str) -> Result<LookupError, Status> {
        let wanted = text.to_owned();
        let alike = self.read(move |reader| reader.containers_beginning_with(&wanted)).await?;
        let alike: Vec<String> = alike.iter().take(ALIKE).map(ToString::to_string).collect();
        let text = printable(text.as_bytes());
        Ok(match &alike[..] {
            [] => LookupError::Unknown(text),
            some => LookupError::NotWhole(text, some.join(", ")),
        })
    }

    /// The containers of the history that `text` names.
    async fn remembered(&self, text: &str) -> Result<Vec<ContainerId>, Status> {
        let wanted = text.to_owned();
        self.read(move |reader| reader.containers(&wanted)).await
    }

    /// Checks that the live container which `text` names is the one that the user means.
    /// Refuses if `text` is the whole ID of a container that has ended.
    pub(super) async fn check_is_meant(&self, text: &str) -> Result<(), Status> {
        let container = text.to_owned();
        let live = self.ask(|reply| ApiRequest::Lookup { container, reply }).await?;
        match &live {
            Ok(container) if is_whole_id(container, text) => return Ok(()),
            Err(err @ (LookupError::Ambiguous(..) | LookupError::Stopping)) => {
                return Err(lookup_failed(err));
            }
            Ok(_) | Err(_) => (),
        }
        let remembered = self.remembered(text).await?;
        if let Some(gone) = remembered.iter().find(|gone| is_whole_id(gone, text)) {
            return Err(lookup_failed(&LookupError::Gone(gone.to_string())));
        }
        live.map(drop).map_err(|err| lookup_failed(&err))
    }
}

fn is_whole_id(container: &ContainerId, text: &str) -> bool {
    container.named_by(text) == Some(NamedBy::WholeId)
}
