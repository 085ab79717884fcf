//! What the daemon has reported so far, and how much of it still holds. Pure.
//!
//! Nothing is made up here: a list that was not received is absent, and what was received
//! before the daemon stopped answering is kept together with that reason.

use std::cmp::Reverse;
use std::time::Instant;

use jiff::Timestamp;

use super::message::{Followed, Node, Poll, Wish};
use crate::cli::containers::ContainerJson;
use crate::cli::describe::pod;
use crate::cli::gap::GapJson;
use crate::cli::output::safe;
use crate::cli::sessions::in_short;
use crate::cli::status::StatusJson;
use crate::health::{Failure, LATE};
use crate::model::{ContainerId, Finding, Session, Severity};

/// Findings that are kept, the newest.
pub(super) const KEPT: usize = 500;

/// Whether a source of news is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Feed {
    /// Nothing has come yet.
    #[default]
    Waiting,
    Live,
    Lost {
        reason: String,
        since: Timestamp,
    },
}

/// What was received.
#[derive(Default)]
pub(super) struct Known {
    /// The status.
    pub(super) polled: Feed,
    /// The containers and sessions.
    pub(super) listed: Feed,
    /// The findings.
    pub(super) followed: Feed,
    status: Option<StatusJson>,
    node: Option<Node>,
    counted: Option<Counted>,
    /// Executions that the gate was asked about in a second; `None` without two counts of one
    /// daemon.
    rate: Option<f64>,
    wish: Wish,
    /// Newest first; `None` until the findings of the wish are here.
    findings: Option<Vec<Finding>>,
    /// The history has more of them.
    more_findings: bool,
}

/// The gate's counter at one time.
#[derive(Clone, Copy)]
struct Counted {
    /// When the daemon was started that counts.
    started_at: Timestamp,
    at: Instant,
    answers: u64,
}

/// A source that does not answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lost<'a> {
    pub(super) what: &'static str,
    pub(super) reason: &'a str,
    pub(super) since: Timestamp,
}

/// One line about what is missing from the view.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LossLine {
    pub(super) state: &'static str,
    /// The name of the loss; empty for a problem that is none.
    pub(super) name: String,
    pub(super) text: String,
}

impl Known {
    pub(super) fn status(&self) -> Option<&StatusJson> {
        self.status.as_ref()
    }

    pub(super) fn node(&self) -> Option<&Node> {
        self.node.as_ref()
    }

    pub(super) fn rate(&self) -> Option<f64> {
        self.rate
    }

    pub(super) fn wish(&self) -> &Wish {
        &self.wish
    }

    /// The most important part of what is shown that is not what the daemon says now.
    pub(super) fn lost(&self) -> Option<Lost<'_>> {
        let feeds = [
            ("NOT CONNECTED", &self.polled),
            ("CONTAINERS NOT CURRENT", &self.listed),
            ("FINDINGS NOT CURRENT", &self.followed),
        ];
        feeds.into_iter().find_map(|(what, feed)| match feed {
            Feed::Lost { reason, since } => Some(Lost { what, reason, since: *since }),
            Feed::Waiting | Feed::Live => None,
        })
    }

    /// Takes the daemon's state. Returns a note if it has answered again.
    pub(super) fn take_poll(
        &mut self,
        result: Result<Box<Poll>, String>,
        now: Timestamp,
    ) -> Option<String> {
        self.rate = None;
        let Poll { at, status, node } = match result {
            Ok(poll) => *poll,
            Err(reason) => {
                lose(&mut self.listed, reason.clone(), now);
                lose(&mut self.polled, reason, now);
                return None;
            }
        };
        let back = match &self.polled {
            Feed::Lost { since, .. } => {
                let seconds = now.duration_since(*since).as_secs().max(0);
                Some(format!("driftd is back after {seconds}s"))
            }
            Feed::Live | Feed::Waiting => None,
        };
        let counted = Counted { started_at: status.started_at, at, answers: status.gate_answers };
        (self.polled, self.status) = (Feed::Live, Some(status));
        match node {
            // The status of a daemon that is stuck does not know when it was started.
            Err(reason) => {
                lose(&mut self.listed, reason, now);
                back
            }
            Ok(node) => {
                (self.listed, self.node) = (Feed::Live, Some(node));
                let before = self.counted.replace(counted);
                let is_another = before.is_some_and(|one| one.started_at != counted.started_at);
                self.rate = before.filter(|_| !is_another).and_then(|one| rate(one, counted));
                match (back, is_another) {
                    (Some(back), true) => Some(format!("{back}: it was started anew")),
                    (None, true) => Some("driftd was started anew".to_owned()),
                    (back, false) => back,
                }
            }
        }
    }

    pub(super) fn take_followed(&mut self, wish: u64, followed: Followed, now: Timestamp) {
        if wish != self.wish.number {
            return;
        }
        match followed {
            Followed::Lost(reason) => lose(&mut self.followed, reason, now),
            Followed::Listed(findings, more) => {
                (self.followed, self.more_findings) = (Feed::Live, more);
                self.findings = Some(Vec::new());
                for finding in findings {
                    self.put(finding);
                }
            }
            Followed::Finding(finding) => self.put(*finding),
        }
    }

    /// The findings that were received are others now.
    pub(super) fn wish_for(&mut self, wish: Wish) {
        (self.findings, self.more_findings) = (None, false);
        self.wish = wish;
    }

    fn put(&mut self, finding: Finding) {
        let Some(findings) = &mut self.findings else { return };
        // The list and the stream may both have it.
        if let Some(at) = findings.iter().position(|one| one.id == finding.id) {
            if findings[at].revision > finding.revision {
                return;
            }
            findings.remove(at);
        }
        let place = |one: &Finding| (Reverse(one.last_seen), one.id);
        let at = findings.partition_point(|one| place(one) < place(&finding));
        findings.insert(at, finding);
        if findings.len() > KEPT {
            findings.truncate(KEPT);
            self.more_findings = true;
        }
    }

    pub(super) fn findings(&self) -> &[Finding] {
        self.findings.as_deref().unwrap_or_default()
    }

    /// Whether the findings were received; without that, an empty list says nothing.
    pub(super) fn has_findings(&self) -> bool {
        self.findings.is_some()
    }

    pub(super) fn has_more_findings(&self) -> bool {
        self.more_findings
    }

    pub(super) fn all_containers(&self) -> &[ContainerJson] {
        self.node().map(|node| &*node.containers).unwrap_or_default()
    }

    /// The containers that the text of the wish selects: first those with the most severe
    /// findings, then those whose view is incomplete, then by name.
    pub(super) fn containers(&self) -> Vec<&ContainerJson> {
        let mut containers: Vec<&ContainerJson> = self
            .all_containers()
            .iter()
            .filter(|one| {
                let image = one.image.name.as_deref().unwrap_or_default();
                self.selects(&[&one.id.to_string(), &safe(image), &pod(one.pod.as_ref())])
            })
            .collect();
        containers.sort_by_cached_key(|one| {
            let worst = Severity::ALL.iter().rev().map(|severity| count(one, *severity));
            let worst: Vec<u64> = worst.collect();
            let is_seen = matches!(self.view_of(one), "complete" | "-");
            (Reverse(worst), Reverse(one.findings), is_seen, one.id.clone())
        });
        containers
    }

    /// The open sessions that the text of the wish selects.
    pub(super) fn sessions(&self) -> Vec<&Session> {
        let sessions = self.node().map(|node| &*node.sessions).unwrap_or_default();
        let selected =
            |one: &&Session| self.selects(&[&one.container.id.to_string(), &in_short(one)]);
        sessions.iter().filter(selected).collect()
    }

    fn selects(&self, texts: &[&str]) -> bool {
        let wanted = self.wish.text.to_lowercase();
        texts.iter().any(|text| text.to_lowercase().contains(&wanted))
    }

    /// How many sessions are open in a container; with a `+` if not all were read.
    pub(super) fn sessions_in(&self, container: &ContainerId) -> String {
        let Some(node) = self.node() else { return "-".to_owned() };
        let is_in = |session: &&Session| session.container.id == *container;
        let more = if node.more_sessions { "+" } else { "" };
        format!("{}{more}", node.sessions.iter().filter(is_in).count())
    }

    /// Whether everything that happens in a container is seen, in one or two words.
    pub(super) fn view_of(&self, container: &ContainerJson) -> &'static str {
        let Some(status) = self.status() else { return "-" };
        // From an older daemon, which names no losses of a container.
        let is_open = |gap: &GapJson| {
            gap.until.is_none() && gap.container.as_ref().is_none_or(|id| *id == container.id)
        };
        let id = format!("{}/{}", container.id.namespace, container.id.id);
        let is_late = status.backlogs.iter().any(|one| {
            one.container == id && u128::from(one.oldest_milliseconds) >= LATE.as_millis()
        });
        let is_cut_off = status.endpoints.iter().any(|endpoint| !endpoint.connected);
        match &*container.baseline {
            // Nothing runs that could be seen.
            _ if container.pid.is_none() => "-",
            _ if !container.watched => "NOT WATCHED",
            baseline if baseline.starts_with("none") => "NO BASELINE",
            _ if !container.incomplete.is_empty() || is_late || is_cut_off => "INCOMPLETE",
            _ if status.gaps.iter().any(is_open) => "INCOMPLETE",
            "pending" => "pending",
            _ => "complete",
        }
    }

    /// What makes the view incomplete now, what was lost since the daemon's start, and the
    /// times that are over.
    pub(super) fn losses(&self) -> Vec<LossLine> {
        let Some(status) = self.status() else { return Vec::new() };
        let now = status.problems.iter().map(|problem| LossLine {
            state: "NOW",
            name: name_in(problem),
            text: safe(problem),
        });
        let counted = status.losses.iter().map(|loss| LossLine {
            state: "COUNT",
            name: safe(&loss.name),
            text: format!("{} times since driftd was started", loss.count),
        });
        // The cause of a gap may be over, and what was not seen may still have to be found.
        let is_open = |gap: &GapJson| {
            let open = format!(" incomplete since {} ({})", gap.at, gap.name);
            let whose =
                gap.container.as_ref().map_or("every container".into(), ToString::to_string);
            status.problems.iter().any(|one| one.contains(&open) && one.contains(&whose))
        };
        let over = status.gaps.iter().filter(|gap| !is_open(gap)).filter_map(|gap| {
            let until = gap.until?;
            let whose = gap.container.as_ref().map_or("every container".into(), safe_id);
            let detail = safe(&gap.detail);
            Some(LossLine {
                state: "OVER",
                name: safe(&gap.name),
                text: format!("{whose}, from {} to {until}: {detail}", gap.at),
            })
        });
        now.chain(counted).chain(over).collect()
    }
}

fn safe_id(container: &ContainerId) -> String {
    safe(&container.to_string())
}

fn lose(feed: &mut Feed, reason: String, now: Timestamp) {
    let since = match feed {
        Feed::Lost { since, .. } => *since,
        Feed::Waiting | Feed::Live => now,
    };
    *feed = Feed::Lost { reason, since };
}

/// How many findings of a severity a container has; 0 if the daemon does not count them so.
pub(super) fn count(container: &ContainerJson, severity: Severity) -> u64 {
    let counts = container.findings_by_severity.as_ref();
    counts.and_then(|counts| counts.get(&severity)).copied().unwrap_or_default()
}

fn rate(before: Counted, after: Counted) -> Option<f64> {
    let seconds = interval(before.at, after.at)?;
    let asked = after.answers.checked_sub(before.answers)?;
    #[expect(clippy::cast_precision_loss, reason = "a rate is shown with one decimal")]
    Some(asked as f64 / seconds)
}

/// Too short a time gives no rate.
fn interval(before: Instant, after: Instant) -> Option<f64> {
    let seconds = after.checked_duration_since(before)?.as_secs_f64();
    (seconds >= 0.1).then_some(seconds)
}

/// The name of the loss that a problem is about: the daemon writes it in parentheses.
fn name_in(problem: &str) -> String {
    let is_named = |name: &&str| problem.contains(&format!("({name})"));
    Failure::ALL.map(Failure::name).into_iter().find(is_named).unwrap_or_default().to_owned()
}
