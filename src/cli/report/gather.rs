//! Reads what a report needs: the timeline page by page, and what only a daemon knows.
//!
//! Decides nothing: `collect.rs` keeps or drops what comes.

use std::collections::BTreeMap;

use jiff::Timestamp;
use tokio::time::timeout;
use tonic::{Code, Response, Status};

use super::collect::{Collected, Collector, Named, RuleCount, Scope};
use super::model::{Identity, Made, Now, PolicyUsed, Report, RuleUsed, SCHEMA, View};
use super::target::{PATIENCE, Target};
use crate::api::convert::{self, timeline_entry_from_proto};
use crate::api::proto;
use crate::cli::client::{Client, Server, explain};
use crate::cli::pages::{fetch_pages, page};
use crate::cli::policy::policy_json;
use crate::model::{ContainerId, Labels};

/// For how many aggregated findings, and how many of the files of each, names are fetched.
const MOST_AGGREGATES: usize = 20;
const MOST_MEMBERS: u32 = 10;

/// What the user has asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) since: Option<Timestamp>,
    pub(super) until: Option<Timestamp>,
    pub(super) most_findings: usize,
}

pub(super) async fn gather(
    mut client: Client,
    server: Server<'_>,
    target: Target,
    wanted: Wanted,
) -> anyhow::Result<Report> {
    let id = target.container().clone();
    let (session, case_id) = match target {
        Target::Container(_) => (None, None),
        Target::Session(session) => (Some(session), None),
        Target::Case { id, .. } => (None, Some(id)),
    };
    let session_id = session.as_ref().map(|session| session.id);
    let scope = Scope { session, since: wanted.since, until: wanted.until };
    let mut collected = collect(&mut client, &id, scope, wanted.most_findings).await?;
    add_members(&mut client, &mut collected).await?;
    let mut late = Vec::new();
    let status = client.get_status(proto::GetStatusRequest {});
    let status = from_daemon("its status", status, &mut late).await?;
    let list = client.list_containers(proto::ListContainersRequest {});
    let list = from_daemon("what it watches", list, &mut late).await?;
    let policy = client.get_policy(proto::GetPolicyRequest {});
    let policy = from_daemon("its rules", policy, &mut late).await?;
    let containers = list.map(|list| list.containers).unwrap_or_default();
    let now =
        containers.into_iter().find(|one| (&*one.namespace, &*one.id) == (&*id.namespace, &*id.id));
    let node = collected.named.as_ref().map(|named| named.node.clone());
    let (from, path) = match server {
        Server::Daemon(socket) => ("daemon", socket),
        Server::History(file) => ("history", file),
    };
    let made = Made {
        at: Timestamp::now(),
        by: env!("CARGO_PKG_VERSION").to_owned(),
        from,
        path: path.display().to_string(),
        node: status.as_ref().map(|status| status.node.clone()).or(node),
        daemon: status.as_ref().map(|status| status.version.clone()),
    };
    Ok(Report {
        schema: SCHEMA,
        made,
        session_id,
        case_id,
        period: collected.period,
        policy: policy_used(collected.generations, &collected.rules, policy)?,
        view: view(status, &late)?,
        container: identity(id, &mut collected, now)?,
        counts: collected.counts,
        listed: collected.findings.iter().map(|part| part.finding.id).collect(),
        sessions: collected.sessions,
        findings: collected.findings,
        responses: collected.responses.into_iter().map(Into::into).collect(),
        gaps: collected.gaps,
        marks: collected.marks,
    })
}

/// A reply that only a daemon can give; `None` from a history, from an older daemon, and from
/// one that is too busy. A report must not wait for a daemon that is stuck: `late` names what
/// is missing.
async fn from_daemon<T>(
    what: &'static str,
    reply: impl Future<Output = Result<Response<T>, Status>>,
    late: &mut Vec<&'static str>,
) -> anyhow::Result<Option<T>> {
    let is_no_daemon = |code| matches!(code, Code::FailedPrecondition | Code::Unimplemented);
    match timeout(PATIENCE, reply).await {
        Ok(Ok(reply)) => Ok(Some(reply.into_inner())),
        Ok(Err(status)) if is_no_daemon(status.code()) => Ok(None),
        Ok(Err(status)) => Err(explain(status)),
        Err(_) => {
            late.push(what);
            Ok(None)
        }
    }
}

/// Reads the timeline from its first entry on: what began before the period may have lasted
/// into it.
async fn collect(
    client: &mut Client,
    id: &ContainerId,
    scope: Scope,
    most_findings: usize,
) -> anyhow::Result<Collected> {
    let until = scope.until.map(convert::time_to_proto);
    let mut collector = Collector::new(scope, most_findings);
    let fetch = async |page_size, page_token| {
        let request = proto::GetTimelineRequest {
            container: format!("{}/{}", id.namespace, id.id),
            since: None,
            until,
            page_size,
            page_token,
            as_json: true,
        };
        let found = client.get_timeline(request).await.map_err(explain)?.into_inner();
        page(found.entries, found.next_page_token, timeline_entry_from_proto)
    };
    let take = |entries: Vec<_>| {
        entries.into_iter().for_each(|entry| collector.take(entry));
        Ok(())
    };
    fetch_pages(String::new(), usize::MAX, fetch, take).await?;
    Ok(collector.finish())
}

/// Names the first files of the worst aggregated findings.
async fn add_members(client: &mut Client, collected: &mut Collected) -> anyhow::Result<()> {
    let aggregates = collected.findings.iter_mut().filter(|part| part.finding.files.is_some());
    for part in aggregates.take(MOST_AGGREGATES) {
        let request = proto::ListMembersRequest {
            finding: part.finding.id.to_string(),
            page_size: MOST_MEMBERS,
            page_token: String::new(),
        };
        match client.list_members(request).await {
            Ok(reply) => {
                let members = reply.into_inner().members.into_iter();
                part.members = members.map(convert::member_from_proto).collect::<Result<_, _>>()?;
            }
            // The history has dropped the finding meanwhile.
            Err(status) if status.code() == Code::NotFound => (),
            Err(status) => return Err(explain(status)),
        }
    }
    Ok(())
}

/// The container as the records name it and, if the daemon knows it now, as it is.
fn identity(
    id: ContainerId,
    collected: &mut Collected,
    now: Option<proto::Container>,
) -> anyhow::Result<Identity> {
    let recorded = collected.named.take();
    let mut runtime = collected.runtime.take();
    let (now, current) = match now {
        None => (None, None),
        Some(container) => {
            let labels: BTreeMap<String, String> = container.labels.into_iter().collect();
            let image = convert::image_from_proto(container.image.unwrap_or_default())?;
            let pod = container.pod.map(convert::pod_from_proto);
            runtime = runtime.or(Some(container.runtime).filter(|name| !name.is_empty()));
            let given = |text: String| (!text.is_empty()).then_some(text);
            let now = Now {
                state: match (container.pid, container.paused) {
                    (0, _) => "stopped",
                    (_, true) => "paused",
                    (_, false) => "running",
                },
                pid: (container.pid != 0).then_some(container.pid),
                image: image.clone(),
                snapshotter: container.snapshotter,
                baseline: container.baseline,
                known_by: given(container.known_by),
                watched: container.watched,
                problem: given(container.problem),
            };
            (Some(now), Some((labels.into(), pod, image)))
        }
    };
    // What was recorded then comes first: a later container may have the same ID.
    let (labels, pod, image) = match recorded {
        Some(Named { container: Some(container), image, .. }) => {
            (container.labels, container.pod, image)
        }
        Some(Named { container: None, image, .. }) => (Labels::default(), None, image),
        None => current.unwrap_or_default(),
    };
    let runs = std::mem::take(&mut collected.runs);
    Ok(Identity { id, labels, pod, image, runtime, runs, now })
}

fn policy_used(
    generations: Option<(u64, u64)>,
    counts: &BTreeMap<String, RuleCount>,
    policy: Option<proto::GetPolicyResponse>,
) -> anyhow::Result<PolicyUsed> {
    let policy = policy.unwrap_or_default();
    let known = |id: &str| policy.rules.iter().find(|rule| rule.id == id);
    let rules = counts
        .iter()
        .map(|(id, count)| RuleUsed {
            id: id.clone(),
            findings: count.findings,
            accepted: count.accepted,
            effect: known(id).map(|rule| rule.effect.clone()),
            reason: known(id).map(|rule| rule.reason.clone()),
            owner: known(id).and_then(|rule| rule.owner.clone()),
        })
        .collect();
    Ok(PolicyUsed {
        first_generation: generations.map(|(first, _)| first),
        last_generation: generations.map(|(_, last)| last),
        rules,
        now: policy.status.map(policy_json).transpose()?,
    })
}

fn view(status: Option<proto::GetStatusResponse>, late: &[&str]) -> anyhow::Result<View> {
    let late = late.iter().map(|what| format!("the daemon has not answered in time: {what}"));
    let late: Vec<String> = late.collect();
    let Some(status) = status else {
        let complete = (!late.is_empty()).then_some(false);
        return Ok(View { complete, problems: late, ..View::default() });
    };
    let losses = status.losses.into_iter().filter(|loss| loss.count > 0);
    Ok(View {
        complete: Some(status.complete && late.is_empty()),
        problems: status.problems.into_iter().chain(late).collect(),
        losses: losses.map(|loss| (loss.name, loss.count)).collect(),
        daemon_started_at: convert::optional_time_from_proto("started_at", status.started_at)?,
    })
}
