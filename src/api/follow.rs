//! A follower of the history. It reads the database at its client's own pace:
//! a slow client holds up nobody. One that does not read at all is told of a gap, and
//! its stream ends.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tonic::Status;

use super::outbox::{Outbox, PATIENCE, Refused};
use super::service::{history_failed, unblock};
use super::{convert, proto};
use crate::history::{Filter, Reader, Record};

/// Records, and bytes of their JSON, that are read at once.
const PAGE: usize = 256;
const PAGE_BYTES: usize = 64 << 10;
/// Followers that read at the same time. Each has a connection with a cache, and a
/// commit wakes all of them.
pub(super) const READING: usize = 4;

/// How long a client may take for what was committed before driftd stopped.
const LAST_PAGES: Duration = Duration::from_secs(1);

/// Why following ends.
enum End {
    Refused(Refused),
    Failed(Status),
}

impl From<Refused> for End {
    fn from(refused: Refused) -> End {
        End::Refused(refused)
    }
}

impl From<Status> for End {
    fn from(status: Status) -> End {
        End::Failed(status)
    }
}

pub(super) struct Follower {
    pub(super) reader: Reader,
    pub(super) filter: Filter,
    /// Whether sessions are told too.
    pub(super) sessions: bool,
    pub(super) committed: watch::Receiver<u64>,
    /// Becomes true when driftd stops.
    pub(super) stopping: watch::Receiver<bool>,
    /// Shared by all followers: who reads holds one.
    pub(super) reading: Arc<Semaphore>,
    pub(super) client: Outbox,
}

impl Follower {
    /// Runs until the client goes or driftd stops. `after`: the cursor to resume
    /// behind; `None` for only what comes.
    pub(super) async fn run(self, after: Option<u64>) {
        let mut stopping = self.stopping.clone();
        let result = tokio::select! {
            () = self.client.gone() => return,
            // The value that this hands back would hold a lock.
            () = async {
                drop(stopping.wait_for(|stopping| *stopping).await);
                // What was committed is told first; it ends by itself after that.
                tokio::time::sleep(LAST_PAGES).await;
            } => return,
            result = self.follow(after) => result,
        };
        match result {
            Ok(()) | Err(End::Refused(Refused::Gone)) => (),
            Err(End::Refused(Refused::Slow { cursor })) => {
                let detail = format!(
                    "nothing was read for {PATIENCE:?}: what waited is dropped and the stream \
                     ends (go on with the cursor {cursor})"
                );
                self.client.end_with(Ok(gap(cursor, "follower_slow", detail)));
            }
            Err(End::Failed(status)) => self.client.fail(status),
        }
    }

    async fn follow(&self, after: Option<u64>) -> Result<(), End> {
        // Seen before the history is read, so that no commit in between is missed.
        let mut committed = self.committed.clone();
        committed.mark_unchanged();
        let reader = self.reader.clone();
        let newest = unblock(move || reader.newest()).await?.map_err(|err| history_failed(&err))?;
        let mut cursor = after.unwrap_or(newest);
        if cursor > newest {
            let detail =
                format!("the cursor {cursor} is not from this history, which ends at {newest}");
            self.client.send(gap(0, "history_replaced", detail)).await?;
            cursor = 0;
        }
        if after.is_none() {
            // Where it begins, for a client that is cut off before anything happens.
            self.client.send(proto::FollowFindingsResponse { cursor, event: None }).await?;
        }
        // Whoever begins with the oldest record misses nothing that was pruned before.
        let mut told_pruned = if cursor == 0 { None } else { Some(0) };
        loop {
            let (reader, filter) = (self.reader.clone(), self.filter.clone());
            let turn = self.reading.acquire().await;
            let page =
                unblock(move || reader.page_after(cursor, &filter, PAGE, PAGE_BYTES)).await?;
            drop(turn);
            let page = page.map_err(|err| history_failed(&err))?;
            let told = told_pruned.unwrap_or(page.pruned_through).max(cursor);
            if page.pruned_through > told {
                let detail = format!(
                    "records after {cursor}, up to {} at most, are older than the retention, or \
                     were dropped because the history was full or removed",
                    page.pruned_through
                );
                self.client.send(gap(cursor, "history_pruned", detail)).await?;
            }
            told_pruned = Some(page.pruned_through);
            for (seq, record) in page.records {
                let event = match record {
                    Record::Finding(finding) | Record::Aggregate { finding, .. } => {
                        proto::follow_findings_response::Event::Finding(convert::finding_to_proto(
                            *finding,
                        ))
                    }
                    Record::Session { session, .. } if self.sessions => {
                        proto::follow_findings_response::Event::Session(convert::session_to_proto(
                            *session,
                        ))
                    }
                    Record::Gap { name, container, detail, at, until } => {
                        let (namespace, container) = convert::names(container);
                        proto::follow_findings_response::Event::Gap(proto::Gap {
                            name,
                            at: Some(convert::time_to_proto(at)),
                            namespace,
                            container,
                            detail,
                            until: until.map(convert::time_to_proto),
                        })
                    }
                    // The finding's next revision carries the outcome.
                    Record::Response(_) | Record::Session { .. } | Record::Probe(_) => continue,
                };
                let message = proto::FollowFindingsResponse { cursor: seq, event: Some(event) };
                self.client.send(message).await?;
            }
            cursor = page.cursor;
            if !page.more && committed.changed().await.is_err() {
                // The writer has ended: nothing comes any more.
                return Ok(());
            }
        }
    }
}

fn gap(cursor: u64, name: &str, detail: String) -> proto::FollowFindingsResponse {
    let gap = proto::Gap {
        name: name.into(),
        at: Some(convert::time_to_proto(jiff::Timestamp::now())),
        namespace: String::new(),
        container: String::new(),
        detail,
        until: None,
    };
    let event = Some(proto::follow_findings_response::Event::Gap(gap));
    proto::FollowFindingsResponse { cursor, event }
}
