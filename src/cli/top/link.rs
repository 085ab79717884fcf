//! The connections to the daemon: its state once a second, the stream of findings, and what a
//! person asks for. Each is made again when it breaks, and reports that.
//!
//! Decides nothing: everything that comes is an input of the state.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::known::KEPT;
use super::message::{Answered, Followed, Input, Node, Poll, Wish};
use crate::api::proto::follow_findings_response::Event;
use crate::api::{convert, proto};
use crate::cli::client::{Client, Server, connect, explain};
use crate::cli::containers::container_json;
use crate::cli::findings::fetch;
use crate::cli::output::safe;
use crate::cli::respond::{send, text};
use crate::cli::show::text_of;
use crate::cli::status::status_json;
use crate::model::{Finding, Session};

/// How often the daemon is asked for its state.
const PERIOD: Duration = Duration::from_secs(1);
/// How long it may take to answer before that is shown.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a response may take.
const PATIENCE_FOR_A_RESPONSE: Duration = Duration::from_secs(60);
/// How long a follower waits before it connects again.
const RECONNECT: Duration = Duration::from_millis(500);
/// The open sessions that are read.
const SESSIONS: u32 = 500;

type News = mpsc::Sender<Input>;

/// What a person asks the daemon for.
pub(super) enum Request {
    Show(String),
    Respond(Box<proto::RespondRequest>),
}

/// Asks for the state of the daemon, again and again.
pub(super) async fn poll(server: Server<'_>, news: News) -> Infallible {
    let mut turns = interval(PERIOD);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut client = None;
    loop {
        turns.tick().await;
        // A little more than the parts of it have.
        let patience = PATIENCE + PERIOD;
        let result = flat(timeout(patience, poll_once(server, &mut client)).await, patience);
        if result.is_err() {
            client = None;
        }
        give(&news, Input::Polled(result)).await;
    }
}

async fn poll_once(server: Server<'_>, client: &mut Option<Client>) -> anyhow::Result<Box<Poll>> {
    let connected = match client.take() {
        Some(connected) => connected,
        None => connect(server).await?,
    };
    let (mut first, second) = (connected.clone(), connected.clone());
    let status = async {
        let status = first.get_status(proto::GetStatusRequest {}).await.map_err(explain)?;
        // The counters are of this moment, whatever the rest takes.
        Ok::<_, anyhow::Error>((Instant::now(), status_json(status.into_inner())?))
    };
    let (status, node) = tokio::join!(status, timeout(PATIENCE, list(second)));
    let (at, status) = status?;
    *client = Some(connected);
    Ok(Box::new(Poll { at, status, node: flat(node, PATIENCE) }))
}

/// What runs on the node.
async fn list(mut client: Client) -> anyhow::Result<Node> {
    let containers = client.list_containers(proto::ListContainersRequest {}).await;
    let containers = containers.map_err(explain)?.into_inner().containers.into_iter();
    let state = proto::SessionState::Open.into();
    let request = proto::ListSessionsRequest {
        filter: Some(proto::SessionFilter { state, ..Default::default() }),
        page_size: SESSIONS,
        page_token: String::new(),
    };
    let sessions = client.list_sessions(request).await.map_err(explain)?.into_inner();
    let more_sessions = !sessions.next_page_token.is_empty();
    let sessions = sessions.sessions.into_iter().map(convert::session_from_proto);
    Ok(Node {
        containers: containers.map(container_json).collect::<anyhow::Result<_>>()?,
        sessions: sessions.collect::<Result<Vec<Session>, _>>()?,
        more_sessions,
    })
}

/// Follows the findings of the newest wish.
pub(super) async fn follow(
    server: Server<'_>,
    mut wishes: watch::Receiver<Wish>,
    news: News,
) -> Infallible {
    loop {
        let wish = wishes.borrow_and_update().clone();
        let ended = tokio::select! {
            ended = follow_once(server, &wish, &news) => ended,
            Ok(()) = wishes.changed() => continue,
        };
        let reason = match ended {
            Ok(()) => "driftd has ended the stream of findings".to_owned(),
            Err(err) => format!("{err:#}"),
        };
        give(&news, Input::Followed(wish.number, Followed::Lost(reason))).await;
        tokio::select! {
            () = sleep(RECONNECT) => (),
            Ok(()) = wishes.changed() => (),
        }
    }
}

/// Returns when the stream has ended. Afterwards it is opened anew and the list is read anew, so
/// nothing is shown that the history does not hold, and nothing is missed.
async fn follow_once(server: Server<'_>, wish: &Wish, news: &News) -> anyhow::Result<()> {
    let mut client = connect(server).await?;
    let filter = wish.to_proto();
    let request = proto::FollowFindingsRequest {
        filter: Some(filter.clone()),
        after_cursor: None,
        sessions: false,
        as_json: true,
    };
    let mut stream = client.follow_findings(request).await.map_err(explain)?.into_inner();
    // The first message has the cursor. What the list lacks comes behind it.
    if stream.message().await.map_err(explain)?.is_none() {
        return Ok(());
    }
    let size = u32::try_from(KEPT).unwrap_or(u32::MAX);
    let page = fetch(&mut client, &filter, size, String::new()).await?;
    let more = !page.next.is_empty();
    give(news, Input::Followed(wish.number, Followed::Listed(page.items, more))).await;
    while let Some(message) = stream.message().await.map_err(explain)? {
        match message.event {
            Some(Event::Finding(finding)) => {
                let finding: Finding = convert::finding_from_proto(finding)?;
                let followed = Followed::Finding(Box::new(finding));
                give(news, Input::Followed(wish.number, followed)).await;
            }
            // Here findings are missing from the stream. The other gaps are in the status.
            Some(Event::Gap(gap))
                if ["history_pruned", "history_replaced", "follower_slow"]
                    .contains(&gap.name.as_str()) =>
            {
                anyhow::bail!("{}: {}", safe(&gap.name), safe(&gap.detail));
            }
            Some(Event::Gap(_) | Event::Session(_)) | None => (),
        }
    }
    Ok(())
}

/// Sends what a person asks for, one after the other.
pub(super) async fn ask(
    server: Server<'_>,
    mut requests: mpsc::Receiver<Request>,
    news: News,
) -> Infallible {
    while let Some(request) = requests.recv().await {
        let input = match request {
            Request::Show(id) => {
                let named = id.clone();
                let text = async { text_of(connect(server).await?, named).await };
                Input::Shown(id, flat(timeout(PATIENCE, text).await, PATIENCE))
            }
            Request::Respond(request) => {
                let answer = async {
                    let json = send(connect(server).await?, *request).await?;
                    let succeeded = json.outcome.succeeded;
                    Ok(Answered { succeeded, text: text(&json).trim_end().to_owned() })
                };
                let patience = PATIENCE_FOR_A_RESPONSE;
                let answered = timeout(patience, answer).await;
                let is_late = answered.is_err();
                let answered = flat(answered, patience).map_err(|reason| match is_late {
                    true => format!("{reason} (what was done is in: driftd timeline)"),
                    false => reason,
                });
                Input::Answered(answered)
            }
        };
        give(&news, input).await;
    }
    std::future::pending().await
}

fn flat<T>(
    result: Result<anyhow::Result<T>, tokio::time::error::Elapsed>,
    patience: Duration,
) -> Result<T, String> {
    match result {
        Ok(result) => result.map_err(|err| format!("{err:#}")),
        Err(_) => Err(format!("driftd has not answered for {} s", patience.as_secs())),
    }
}

/// Hands an input on. This task ends together with the one that takes them.
async fn give(news: &News, input: Input) {
    if news.send(input).await.is_err() {
        std::future::pending::<()>().await;
    }
}
