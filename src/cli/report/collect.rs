//! Takes the entries of a timeline one after the other, and keeps what a report lists.
//!
//! Pure. Its memory is bounded: it keeps the worst findings and sessions whole, and counts and
//! marks the others.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};

use jiff::Timestamp;

use super::model::{
    Counts, FindingPart, GapMark, MOST_RUNS, Marks, Period, SessionMark, SessionPart,
};
use crate::cli::gap::{self, GapJson};
use crate::history::{Happened, TimelineEntry};
use crate::model::finding::ContainerEvidence;
use crate::model::{
    Finding, FindingId, ImageReference, Incarnation, Session, SessionState, Severity,
};
use crate::respond::Response;

/// How many of each are listed. Findings have an option.
const MOST_SESSIONS: usize = 40;
const MOST_COMMANDS: usize = 100;
const MOST_RESPONSES: usize = 200;
const MOST_GAPS: usize = 200;
/// Names of rules that are counted; containers choose none of them.
const MOST_RULES: usize = 200;

/// Keeps the items that come first by a key. Its memory is at most twice theirs.
struct Best<T, K> {
    kept: Vec<T>,
    most: usize,
    key: fn(&T) -> K,
}

impl<T, K: Ord> Best<T, K> {
    fn new(most: usize, key: fn(&T) -> K) -> Best<T, K> {
        Best { kept: Vec::new(), most, key }
    }

    fn add(&mut self, item: T) {
        self.kept.push(item);
        if self.kept.len() > self.most.saturating_mul(2) {
            self.cut();
        }
    }

    fn cut(&mut self) {
        self.kept.sort_by_key(self.key);
        self.kept.truncate(self.most);
    }

    fn finish(mut self) -> Vec<T> {
        self.cut();
        self.kept
    }
}

/// Which entries a report is about.
#[derive(Debug, Default)]
pub(super) struct Scope {
    /// Only this session, if there is one.
    pub(super) session: Option<Box<Session>>,
    pub(super) since: Option<Timestamp>,
    pub(super) until: Option<Timestamp>,
}

impl Scope {
    /// Whether something that lasted from `start` to `end` is in the period.
    fn covers(&self, start: Timestamp, end: Option<Timestamp>) -> bool {
        self.until.is_none_or(|until| start <= until)
            && self.since.is_none_or(|since| end.is_none_or(|end| end >= since))
    }

    /// Whether something that concerns the whole container happened during the session.
    fn is_during_session(&self, start: Timestamp, end: Option<Timestamp>) -> bool {
        self.session.as_deref().is_none_or(|session| {
            end.is_none_or(|end| end >= session.started_at)
                && end_of(session).is_none_or(|over| start <= over)
        })
    }
}

/// When a session ended; `None` for one that is open. An end that was not seen is not known
/// to be later than the start.
fn end_of(session: &Session) -> Option<Timestamp> {
    match session.state {
        SessionState::Open => None,
        SessionState::Closed => Some(session.ended_at.unwrap_or(session.started_at)),
    }
}

/// What the newest record that names the container says of it.
#[derive(Debug)]
pub(super) struct Named {
    at: Timestamp,
    pub(super) node: String,
    pub(super) container: Option<ContainerEvidence>,
    pub(super) image: ImageReference,
}

/// How many findings name a rule, and how many of these it has accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RuleCount {
    pub(super) findings: u64,
    pub(super) accepted: u64,
}

pub(super) struct Collector {
    scope: Scope,
    counts: Counts,
    marks: Marks,
    findings: Best<Finding, FindingKey>,
    sessions: Best<SessionPart, SessionKey>,
    responses: Best<Response, Reverse<Timestamp>>,
    gaps: Best<GapJson, Reverse<i64>>,
    first: Option<Timestamp>,
    last: Option<Timestamp>,
    named: Option<Named>,
    runtime: Option<String>,
    runs: Vec<Incarnation>,
    generations: Option<(u64, u64)>,
    rules: BTreeMap<String, RuleCount>,
    /// The findings of the session that the report is about.
    own: HashSet<FindingId>,
}

type FindingKey = (Reverse<Severity>, Timestamp, FindingId);
type SessionKey = (bool, Reverse<u64>, Reverse<Timestamp>);

/// The worst first, and of the same severity the first.
fn finding_key(finding: &Finding) -> FindingKey {
    (Reverse(finding.severity), finding.first_seen, finding.id)
}

/// Those that caused findings first, then those in which commands were typed, then the newest.
fn session_key(part: &SessionPart) -> SessionKey {
    let SessionPart { session, .. } = part;
    (session.interactive.is_none(), Reverse(session.findings_total), Reverse(session.started_at))
}

/// The longest first; one that is not over is the longest.
fn gap_key(gap: &GapJson) -> Reverse<i64> {
    let length = |until: Timestamp| until.as_microsecond() - gap.at.as_microsecond();
    Reverse(gap.until.map_or(i64::MAX, length))
}

/// What was collected.
pub(super) struct Collected {
    pub(super) period: Period,
    pub(super) counts: Counts,
    pub(super) marks: Marks,
    pub(super) findings: Vec<FindingPart>,
    pub(super) sessions: Vec<SessionPart>,
    pub(super) responses: Vec<Response>,
    pub(super) gaps: Vec<GapJson>,
    pub(super) named: Option<Named>,
    pub(super) runtime: Option<String>,
    pub(super) runs: Vec<Incarnation>,
    pub(super) generations: Option<(u64, u64)>,
    pub(super) rules: BTreeMap<String, RuleCount>,
}

impl Collector {
    pub(super) fn new(scope: Scope, most_findings: usize) -> Collector {
        let own = scope.session.iter().flat_map(|session| {
            session.findings.iter().copied().chain(session.finding).collect::<Vec<_>>()
        });
        Collector {
            own: own.collect(),
            scope,
            counts: Counts::default(),
            marks: Marks::default(),
            findings: Best::new(most_findings, finding_key),
            sessions: Best::new(MOST_SESSIONS, session_key),
            responses: Best::new(MOST_RESPONSES, |response| Reverse(response.outcome.at)),
            gaps: Best::new(MOST_GAPS, gap_key),
            first: None,
            last: None,
            named: None,
            runtime: None,
            runs: Vec::new(),
            generations: None,
            rules: BTreeMap::new(),
        }
    }

    /// Takes the next entry; `None` for one that only a newer driftd knows.
    pub(super) fn take(&mut self, entry: Option<TimelineEntry>) {
        let Some(TimelineEntry { at, what }) = entry else {
            self.counts.unknown += 1;
            return;
        };
        match what {
            Happened::SessionOpened(session) => {
                let end = end_of(&session);
                self.session(*session, end);
            }
            Happened::Command(command) => {
                let kept = &mut self.sessions.kept;
                // Sessions that are dropped for worse ones lose their commands.
                if let Some(part) =
                    kept.iter_mut().rev().find(|part| part.session.id == command.session)
                {
                    part.commands_kept += 1;
                    if part.commands.len() < MOST_COMMANDS {
                        part.commands.push(*command);
                    }
                    self.saw(at);
                }
            }
            Happened::Finding(finding) => self.finding(*finding),
            Happened::SessionClosed(session) => self.session_closed(at, *session),
            Happened::Response(response) => self.response(at, *response),
            Happened::Gap { name, container, detail, until } => {
                let is_wanted =
                    self.scope.covers(at, until) && self.scope.is_during_session(at, until);
                if is_wanted {
                    self.counts.gaps += 1;
                    self.marks.gaps.push(GapMark { start: at, end: until });
                    self.saw(at);
                    until.into_iter().for_each(|until| self.saw(until));
                    let schema = gap::SCHEMA;
                    self.gaps.add(GapJson { schema, name, at, container, detail, until });
                }
            }
        }
    }

    /// The first and the last record lie within the period.
    fn saw(&mut self, at: Timestamp) {
        let Scope { since, until, .. } = self.scope;
        let at = since.map_or(at, |since| at.max(since));
        let at = until.map_or(at, |until| at.min(until));
        self.first = Some(self.first.map_or(at, |first| first.min(at)));
        self.last = Some(self.last.map_or(at, |last| last.max(at)));
    }

    fn session(&mut self, session: Session, end: Option<Timestamp>) {
        let is_other = self.scope.session.as_ref().is_some_and(|only| only.id != session.id);
        if is_other || !self.scope.covers(session.started_at, end) {
            return;
        }
        let counts = &mut self.counts;
        counts.sessions += 1;
        counts.sessions_open += u64::from(session.state == SessionState::Open);
        counts.sessions_interactive += u64::from(session.interactive.is_some());
        counts.commands = counts.commands.saturating_add(session.commands);
        self.marks.sessions.push(SessionMark { id: session.id, start: session.started_at, end });
        self.saw(session.started_at);
        end.into_iter().for_each(|end| self.saw(end));
        let container = Some(session.container.clone());
        self.name(end.unwrap_or(session.started_at), &session.node, container, &session.image);
        self.sessions.add(SessionPart { session, commands: Vec::new(), commands_kept: 0 });
    }

    /// Where the end was not seen, the time when it was noticed takes its place.
    fn session_closed(&mut self, at: Timestamp, session: Session) {
        if session.ended_at.is_some() {
            return;
        }
        match self.marks.sessions.iter_mut().rev().find(|mark| mark.id == session.id) {
            Some(mark) => {
                mark.end = Some(at);
                self.saw(at);
            }
            // It began before the period.
            None => self.session(session, Some(at)),
        }
    }

    fn finding(&mut self, finding: Finding) {
        let is_own = self.scope.session.as_ref().is_none_or(|session| {
            finding.session == Some(session.id) || self.own.contains(&finding.id)
        });
        if !is_own || !self.scope.covers(finding.first_seen, Some(finding.last_seen)) {
            return;
        }
        self.saw(finding.first_seen);
        self.saw(finding.last_seen);
        self.name(finding.last_seen, &finding.node, finding.container.clone(), &finding.image);
        self.runtime = finding.container_runtime.clone().or(self.runtime.take());
        self.run(finding.run);
        let generation = finding.verdict.policy_generation;
        let (low, high) = self.generations.unwrap_or((generation, generation));
        self.generations = Some((low.min(generation), high.max(generation)));
        self.count_rules(&finding);
        if finding.verdict.is_accept() {
            self.counts.accepted += 1;
            return;
        }
        if self.scope.session.is_some() {
            self.own.insert(finding.id);
        }
        self.counts.findings += 1;
        *self.counts.by_severity.entry(finding.severity).or_default() += 1;
        self.marks.findings.push((finding.first_seen, finding.severity));
        self.findings.add(finding);
    }

    fn count_rules(&mut self, finding: &Finding) {
        let verdict = &finding.verdict;
        let mut names: Vec<&String> = verdict.rules.iter().chain(&verdict.rule).collect();
        names.sort();
        names.dedup();
        for name in names {
            if !self.rules.contains_key(name) && self.rules.len() >= MOST_RULES {
                continue;
            }
            let count = self.rules.entry(name.clone()).or_default();
            count.findings += 1;
            let has_accepted = verdict.is_accept() && verdict.rule.as_ref() == Some(name);
            count.accepted += u64::from(has_accepted);
        }
    }

    fn response(&mut self, at: Timestamp, response: Response) {
        let of_session = self.scope.session.is_none()
            || response.finding.is_some_and(|finding| self.own.contains(&finding))
            || self.scope.is_during_session(at, Some(at));
        if !of_session || !self.scope.covers(at, Some(at)) {
            return;
        }
        self.counts.responses += 1;
        self.marks.responses.push(at);
        self.saw(at);
        self.run(response.incarnation);
        self.responses.add(response);
    }

    fn run(&mut self, run: Option<Incarnation>) {
        let Some(run) = run else { return };
        let is_known =
            |known: &Incarnation| (known.pid, known.start_time) == (run.pid, run.start_time);
        if !self.runs.iter().any(is_known) && self.runs.len() < MOST_RUNS {
            self.runs.push(run);
        }
    }

    fn name(
        &mut self,
        at: Timestamp,
        node: &str,
        container: Option<ContainerEvidence>,
        image: &ImageReference,
    ) {
        if self.named.as_ref().is_none_or(|named| named.at <= at) {
            let (node, image) = (node.to_owned(), image.clone());
            self.named = Some(Named { at, node, container, image });
        }
    }

    pub(super) fn finish(self) -> Collected {
        let mut counts = self.counts;
        let findings = self.findings.finish();
        let (mut sessions, mut responses, mut gaps) =
            (self.sessions.finish(), self.responses.finish(), self.gaps.finish());
        sessions.sort_by_key(|part| (part.session.started_at, part.session.id));
        responses.sort_by_key(|response| response.outcome.at);
        gaps.sort_by_key(|gap| gap.at);
        for severity in Severity::ALL {
            counts.by_severity.entry(*severity).or_default();
        }
        let number = |length: usize| length as u64;
        counts.findings_listed = number(findings.len());
        counts.sessions_listed = number(sessions.len());
        counts.responses_listed = number(responses.len());
        counts.gaps_listed = number(gaps.len());
        counts.commands_listed = sessions.iter().map(|part| number(part.commands.len())).sum();
        let Scope { since, until, .. } = self.scope;
        Collected {
            period: Period { since, until, first: self.first, last: self.last },
            counts,
            marks: self.marks,
            findings: findings
                .into_iter()
                .map(|finding| FindingPart { finding, members: Vec::new() })
                .collect(),
            sessions,
            responses,
            gaps,
            named: self.named,
            runtime: self.runtime,
            runs: self.runs,
            generations: self.generations,
            rules: self.rules,
        }
    }
}
