//! The messages that wait for one follower of the history.
//!
//! Their bytes are limited for each follower and for all followers together. A follower that
//! reads nothing for too long loses what waits for it, and its stream ends.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use prost::Message as _;
use tokio::sync::Notify;
use tokio_stream::Stream;
use tonic::Status;

use super::proto::FollowFindingsResponse;
use crate::budget::{self, Pool, Share};

/// How long a follower may read nothing while more waits for it than may wait.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// The sender's end.
#[derive(Debug)]
pub(super) struct Outbox {
    shared: Arc<Shared>,
    patience: Duration,
}

/// The client's end: the stream that gRPC sends.
#[derive(Debug)]
pub(crate) struct Inbox(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Notified when the client has read something or has disconnected.
    read: Notify,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<(usize, Result<FollowFindingsResponse, Status>)>,
    share: Share,
    /// How many messages the client has read, and the cursor of the last one.
    taken: u64,
    cursor: u64,
    waker: Option<Waker>,
    /// Nothing more will be queued.
    is_closed: bool,
    /// The client has disconnected.
    has_gone: bool,
}

/// Why a message was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Gone,
    /// The client has read nothing for too long. `cursor` is that of the last message it read.
    Slow {
        cursor: u64,
    },
}

/// Both ends, for a follower that has read up to `cursor` before.
pub(super) fn outbox(pool: &Arc<Pool>, cursor: u64, patience: Duration) -> (Outbox, Inbox) {
    let state = State {
        queue: VecDeque::new(),
        share: pool.share(budget::FOLLOWER),
        taken: 0,
        cursor,
        waker: None,
        is_closed: false,
        has_gone: false,
    };
    let shared = Arc::new(Shared { state: Mutex::new(state), read: Notify::new() });
    (Outbox { shared: Arc::clone(&shared), patience }, Inbox(shared))
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, bytes: usize, message: Result<FollowFindingsResponse, Status>) {
        self.share.take(bytes);
        self.queue.push_back((bytes, message));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn clear(&mut self) {
        self.queue = VecDeque::new();
        self.share.give_back(self.share.used());
    }
}

impl Outbox {
    /// Waits for room, as long as the client reads. One message always has room.
    pub(super) async fn send(&self, message: FollowFindingsResponse) -> Result<(), Refused> {
        let bytes = message.encoded_len() + size_of::<FollowFindingsResponse>();
        let mut message = Some(message);
        loop {
            // Registered before the state is read, so that no notification is missed.
            let read = self.shared.read.notified();
            let before = {
                let mut state = self.shared.state();
                if state.has_gone {
                    return Err(Refused::Gone);
                }
                if state.queue.is_empty() || state.share.has_room(bytes) {
                    if let Some(message) = message.take() {
                        state.push(bytes, Ok(message));
                    }
                    return Ok(());
                }
                state.taken
            };
            // Other followers free room in the pool without a notification, hence the timeout.
            let deadline = tokio::time::Instant::now() + self.patience;
            let _ = tokio::time::timeout_at(deadline, read).await;
            let state = self.shared.state();
            let is_slow = state.taken == before && tokio::time::Instant::now() >= deadline;
            if is_slow && !state.queue.is_empty() && !state.has_gone {
                return Err(Refused::Slow { cursor: state.cursor });
            }
        }
    }

    /// Drops the waiting messages and ends the stream with `message`.
    pub(super) fn end_with(&self, message: Result<FollowFindingsResponse, Status>) {
        let mut state = self.shared.state();
        state.clear();
        state.is_closed = true;
        state.push(0, message);
    }

    /// Ends the stream with `status`, after the waiting messages.
    pub(super) fn fail(&self, status: Status) {
        let mut state = self.shared.state();
        state.is_closed = true;
        state.push(0, Err(status));
    }

    /// Returns when the client has disconnected.
    pub(super) async fn gone(&self) {
        loop {
            let read = self.shared.read.notified();
            if self.shared.state().has_gone {
                return;
            }
            read.await;
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.is_closed = true;
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }
}

impl Stream for Inbox {
    type Item = Result<FollowFindingsResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.state();
        match state.queue.pop_front() {
            Some((bytes, message)) => {
                state.share.give_back(bytes);
                state.taken += 1;
                if let Ok(message) = &message {
                    state.cursor = message.cursor;
                }
                drop(state);
                self.0.read.notify_waiters();
                Poll::Ready(Some(message))
            }
            None if state.is_closed => Poll::Ready(None),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.has_gone = true;
        state.clear();
        drop(state);
        self.0.read.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::proto::{Gap, follow_findings_response::Event};
    use tokio_stream::StreamExt as _;

    fn message(cursor: u64, bytes: usize) -> FollowFindingsResponse {
        let event = Event::Gap(Gap { detail: "x".repeat(bytes), ..Gap::default() });
        FollowFindingsResponse { cursor, event: Some(event) }
    }

    #[tokio::test]
    async fn x17_a_follower_that_does_not_read_holds_a_bounded_number_of_bytes_and_is_closed() {
        let pool = Pool::new(budget::ALL_FOLLOWERS);
        let mut followers = Vec::new();
        for _ in 0..150 {
            let (out, inbox) = outbox(&pool, 7, Duration::from_millis(5));
            let mut cursor = 100;
            let refused = loop {
                cursor += 1;
                if let Err(refused) = out.send(message(cursor, 8000)).await {
                    break refused;
                }
                assert!(cursor < 200, "it never ends");
            };
            assert_eq!(refused, Refused::Slow { cursor: 7 });
            followers.push((out, inbox));
        }
        assert!(pool.used() < 2 * budget::ALL_FOLLOWERS, "{}", pool.used());
        // One that reads is served all the same.
        let (out, mut inbox) = outbox(&pool, 0, PATIENCE);
        for cursor in 1..50 {
            let (sent, got) = tokio::join!(out.send(message(cursor, 8000)), inbox.next());
            assert_eq!((sent, got.unwrap().unwrap().cursor), (Ok(()), cursor));
        }
        for (out, _) in &followers {
            out.end_with(Ok(message(7, 0)));
        }
        assert_eq!(pool.used(), 0, "what they held is given back");
        let (out, mut inbox) = followers.remove(0);
        drop(out);
        assert_eq!(inbox.next().await.unwrap().unwrap().cursor, 7);
        assert!(inbox.next().await.is_none());
    }

    #[tokio::test]
    async fn a_slow_reader_that_reads_is_waited_for() {
        let (out, mut inbox) = outbox(&Pool::new(budget::ALL_FOLLOWERS), 0, WAIT);
        const WAIT: Duration = Duration::from_millis(500);
        let reading = async {
            let mut cursors = Vec::new();
            while let Some(message) = inbox.next().await {
                cursors.push(message.unwrap().cursor);
                tokio::time::sleep(WAIT / 20).await;
            }
            cursors
        };
        let writing = async {
            for cursor in 1..=20 {
                out.send(message(cursor, 100_000)).await.unwrap();
            }
            drop(out);
        };
        let (cursors, ()) = tokio::join!(reading, writing);
        assert_eq!(cursors, (1..=20).collect::<Vec<_>>());
    }
}
