//! Follows the history for one client and sends it each new record.
//!
//! Reads the database at the client's own pace, so that a slow client delays nothing else. A
//! client that does not read at all gets a gap as its last event, and its stream ends.
//! Talks to the history's reader and to the client's `outbox`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tonic::Status;

use super::failure::{history_failed, unblock, unreadable};
use super::outbox::{Outbox, PATIENCE, Refused};
use super::proto::follow_findings_response::Event;
use super::{convert, proto};
use crate::budget::{self, Pool};
use crate::history::{Filter, Reader, Record, Stored};

/// Records, and bytes of their JSON, that are read at once.
const PAGE: usize = 256;
const PAGE_BYTES: usize = 64 << 10;
/// Followers that read at the same time. Each has a connection with a cache, and a
/// commit wakes all of them.
const READING: usize = 4;
/// How long a client may take for what was committed before driftd stopped.
const LAST_PAGES: Duration = Duration::from_secs(1);

/// What all followers of the history share.
#[derive(Clone)]
pub(crate) struct Followers {
    pub(super) pool: Arc<Pool>,
    pub(super) reading: Arc<Semaphore>,
}

impl Default for Followers {
    fn default() -> Followers {
        Followers {
            pool: Pool::new(budget::ALL_FOLLOWERS),
            reading: Arc::new(Semaphore::new(READING)),
        }
    }
}

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
    /// Whether sessions are sent as well.
    pub(super) sessions: bool,
    /// Whether findings are sent as the text that is stored.
    pub(super) as_json: bool,
    pub(super) committed: watch::Receiver<u64>,
    /// Becomes true when driftd stops.
    pub(super) stopping: watch::Receiver<bool>,
    /// Shared by all followers: each takes a permit for each read.
    pub(super) reading: Arc<Semaphore>,
    pub(super) client: Outbox,
}

impl Follower {
    /// Runs until the client disconnects or driftd stops. Sends what is newer than the cursor
    /// `after`; `None`: only what is committed from now on.
    pub(super) async fn run(self, after: Option<u64>) {
        let mut stopping = self.stopping.clone();
        let result = tokio::select! {
            () = self.client.gone() => return,
            () = async {
                // Dropped at once, because the returned value holds a lock.
                drop(stopping.wait_for(|stopping| *stopping).await);
                // Time for the records that are committed already.
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
        // Marked before the history is read, so that no commit in between is missed.
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
            // The cursor to resume with, if the connection breaks before the first event.
            self.client.send(proto::FollowFindingsResponse { cursor, event: None }).await?;
        }
        // A client that begins with the oldest record misses nothing that was pruned before.
        let mut reported_pruned = if cursor == 0 { None } else { Some(0) };
        loop {
            let (reader, filter) = (self.reader.clone(), self.filter.clone());
            let turn = self.reading.acquire().await;
            let page =
                unblock(move || reader.stored_after(cursor, &filter, PAGE, PAGE_BYTES)).await?;
            drop(turn);
            let page = page.map_err(|err| history_failed(&err))?;
            let reported = reported_pruned.unwrap_or(page.pruned_through).max(cursor);
            if page.pruned_through > reported {
                let detail = format!(
                    "records after {cursor}, up to {} at most, are older than the retention, or \
                     were dropped because the history was full or removed",
                    page.pruned_through
                );
                self.client.send(gap(cursor, "history_pruned", detail)).await?;
            }
            reported_pruned = Some(page.pruned_through);
            for (seq, record) in page.records {
                let Some(event) = self.event(record)? else { continue };
                let message = proto::FollowFindingsResponse { cursor: seq, event: Some(event) };
                self.client.send(message).await?;
            }
            cursor = page.cursor;
            if !page.more && committed.changed().await.is_err() {
                // The writer has ended, so there are no more records.
                return Ok(());
            }
        }
    }

    /// The event for a record; `None` if the client does not receive such records.
    fn event(&self, record: Stored) -> Result<Option<Event>, Status> {
        Ok(match record {
            Stored::Finding(text) => {
                let finding = convert::stored_finding_to_proto(text, self.as_json);
                Some(Event::Finding(finding.map_err(|err| unreadable(&err))?))
            }
            Stored::Other(Record::Session { session, .. }) if self.sessions => {
                Some(Event::Session(convert::session_to_proto(*session)))
            }
            Stored::Other(Record::Gap { name, container, detail, at, until }) => {
                Some(Event::Gap(convert::gap(name, container, detail, at, until)))
            }
            // A response's outcome is in the finding's next revision.
            Stored::Other(_) => None,
        })
    }
}

fn gap(cursor: u64, name: &str, detail: String) -> proto::FollowFindingsResponse {
    let gap = convert::gap(name.into(), None, detail, jiff::Timestamp::now(), None);
    proto::FollowFindingsResponse { cursor, event: Some(Event::Gap(gap)) }
}
