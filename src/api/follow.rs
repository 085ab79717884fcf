//! A follower of the history. It reads the database at its client's own pace:
//! a slow client holds up nobody.

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::service::{history_failed, unblock};
use super::{convert, proto};
use crate::history::{Filter, Reader, Record};

/// Records read at once.
const PAGE: usize = 256;

/// How long a client may take for what was committed before driftd stopped.
const LAST_PAGES: Duration = Duration::from_secs(1);

type Message = Result<proto::FollowFindingsResponse, Status>;

pub(super) struct Follower {
    pub(super) reader: Reader,
    pub(super) filter: Filter,
    /// Whether sessions are told too.
    pub(super) sessions: bool,
    pub(super) committed: watch::Receiver<u64>,
    /// Becomes true when driftd stops.
    pub(super) stopping: watch::Receiver<bool>,
    pub(super) client: mpsc::Sender<Message>,
}

impl Follower {
    /// Runs until the client goes or driftd stops. `after`: the cursor to resume
    /// behind; `None` for only what comes.
    pub(super) async fn run(mut self, after: Option<u64>) {
        let mut stopping = self.stopping.clone();
        let client = self.client.clone();
        tokio::select! {
            () = client.closed() => (),
            // The value that this hands back would hold a lock.
            () = async {
                drop(stopping.wait_for(|stopping| *stopping).await);
                // What was committed is told first; it ends by itself after that.
                tokio::time::sleep(LAST_PAGES).await;
            } => (),
            result = self.follow(after) => if let Err(status) = result {
                // The client may be gone; then nobody wants to know.
                let _ = client.send(Err(status)).await;
            },
        }
    }

    async fn follow(&mut self, after: Option<u64>) -> Result<(), Status> {
        // Seen before the history is read, so that no commit in between is missed.
        self.committed.mark_unchanged();
        let reader = self.reader.clone();
        let newest = unblock(move || reader.newest()).await?.map_err(|err| history_failed(&err))?;
        let mut cursor = after.unwrap_or(newest);
        if cursor > newest {
            self.gap(
                0,
                "history_replaced",
                format!("the cursor {cursor} is not from this history, which ends at {newest}"),
            )
            .await?;
            cursor = 0;
        }
        // Whoever begins with the oldest record misses nothing that was pruned before.
        let mut told_pruned = if cursor == 0 { None } else { Some(0) };
        loop {
            let (reader, filter) = (self.reader.clone(), self.filter.clone());
            let page = unblock(move || reader.after(cursor, &filter, PAGE)).await?;
            let page = page.map_err(|err| history_failed(&err))?;
            let told = told_pruned.unwrap_or(page.pruned_through).max(cursor);
            if page.pruned_through > told {
                let detail = format!(
                    "records after {cursor}, up to {} at most, are older than the retention",
                    page.pruned_through
                );
                self.gap(cursor, "history_pruned", detail).await?;
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
                self.send(seq, event).await?;
            }
            cursor = page.cursor;
            if !page.more && self.committed.changed().await.is_err() {
                // The writer has ended: nothing comes any more.
                return Ok(());
            }
        }
    }

    async fn gap(&self, cursor: u64, name: &str, detail: String) -> Result<(), Status> {
        let gap = proto::Gap {
            name: name.into(),
            at: Some(convert::time_to_proto(jiff::Timestamp::now())),
            namespace: String::new(),
            container: String::new(),
            detail,
            until: None,
        };
        self.send(cursor, proto::follow_findings_response::Event::Gap(gap)).await
    }

    async fn send(
        &self,
        cursor: u64,
        event: proto::follow_findings_response::Event,
    ) -> Result<(), Status> {
        self.client
            .send(Ok(proto::FollowFindingsResponse { cursor, event: Some(event) }))
            .await
            .map_err(|_| Status::cancelled("the client has gone"))
    }
}
