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
    Finding, FindingId, ImageReference, Incarnation, Kind, Session, SessionState, Severity,
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
    findings: Best<(u64, Finding), FindingKey>,
    /// How many findings of each kind and severity have come.
    of_kind: BTreeMap<(Severity, Kind), u64>,
    sessions: Best<SessionPart, SessionKey>,
    responses: Best<Response, Reverse<Timestamp>>,
    gaps: Best<GapJson, Reverse<i64>>,
    period: Period,
    named: Option<Named>,
    runtime: Option<String>,
    runs: Vec<Incarnation>,
    generations: Option<(u64, u64)>,
    rules: BTreeMap<String, RuleCount>,
    /// The findings of the session that the report is about.
    own: HashSet<FindingId>,
}

type FindingKey = (Reverse<Severity>, u64, Timestamp, FindingId);
type SessionKey = (bool, bool, Reverse<u64>, Reverse<Timestamp>);

/// The worst first. A flood of one kind leaves room for the others of its severity: the first
/// of each kind come before the second ones.
fn finding_key((number, finding): &(u64, Finding)) -> FindingKey {
    (Reverse(finding.severity), *number, finding.first_seen, finding.id)
}

/// Those that caused findings first, then those in which commands were typed, then the newest.
fn session_key(part: &SessionPart) -> SessionKey {
    let session = &part.session;
    (
        session.findings_total == 0,
        session.interactive.is_none(),
        Reverse(session.findings_total),
        Reverse(session.started_at),
    )
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
        let Scope { since, until, .. } = scope;
        let period = Period { since, until, first: None, last: None };
        Collector {
            own: own.collect(),
            scope,
            counts: Counts::default(),
            marks: Marks::default(),
            findings: Best::new(most_findings, finding_key),
            of_kind: BTreeMap::new(),
            sessions: Best::new(MOST_SESSIONS, session_key),
            responses: Best::new(MOST_RESPONSES, |response| Reverse(response.outcome.at)),
            gaps: Best::new(MOST_GAPS, gap_key),
            period,
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
        let Period { since, until, first, last } = &mut self.period;
        let at = since.map_or(at, |since| at.max(since));
        let at = until.map_or(at, |until| at.min(until));
        *first = Some(first.map_or(at, |first| first.min(at)));
        *last = Some(last.map_or(at, |last| last.max(at)));
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
        // What was answered is listed before everything else of its severity.
        let number = match finding.outcome {
            Some(_) => 0,
            None => {
                let of_kind = self.of_kind.entry((finding.severity, finding.kind)).or_default();
                *of_kind += 1;
                *of_kind
            }
        };
        self.findings.add((number, finding));
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
        let mut findings = self.findings.finish();
        findings.sort_by_key(|(_, finding)| {
            (Reverse(finding.severity), finding.first_seen, finding.id)
        });
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
        Collected {
            period: self.period,
            counts,
            marks: self.marks,
            findings: findings
                .into_iter()
                .map(|(_, finding)| FindingPart { finding, members: Vec::new() })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{findings, sessions};
    use crate::model::{Command, Disposition, SessionId};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_795_000_000 + seconds).unwrap()
    }

    fn entry(at: Timestamp, what: Happened) -> Option<TimelineEntry> {
        Some(TimelineEntry { at, what })
    }

    fn finding(number: u8, kind: Kind, seconds: i64) -> Finding {
        let mut finding = findings::tests::sample();
        finding.id = FindingId([number; 16]);
        (finding.kind, finding.severity) = (kind, Severity::Critical);
        (finding.first_seen, finding.last_seen) = (at(seconds), at(seconds));
        finding
    }

    fn session(number: u16, seconds: i64) -> Session {
        let mut session = sessions::tests::sample();
        session.id = SessionId([0; 16]);
        session.id.0[..2].copy_from_slice(&number.to_be_bytes());
        (session.started_at, session.ended_at) = (at(seconds), Some(at(seconds + 10)));
        (session.findings, session.findings_total) = (Vec::new(), 0);
        session
    }

    fn collect(scope: Scope, most: usize, entries: Vec<Option<TimelineEntry>>) -> Collected {
        let mut collector = Collector::new(scope, most);
        entries.into_iter().for_each(|entry| collector.take(entry));
        collector.finish()
    }

    fn found(finding: Finding) -> Option<TimelineEntry> {
        entry(finding.first_seen, Happened::Finding(Box::new(finding)))
    }

    #[test]
    fn a_flood_of_one_kind_leaves_room_for_the_others() {
        let mut entries: Vec<_> =
            (0..200).map(|number| found(finding(number, Kind::ExecNew, number.into()))).collect();
        entries.push(found(finding(201, Kind::ShellReverse, 300)));
        let mut killed = finding(202, Kind::ExecNew, 400);
        killed.outcome = findings::tests::samples().remove(2).outcome;
        assert!(killed.outcome.is_some());
        entries.push(found(killed));
        let collected = collect(Scope::default(), 5, entries);
        let listed: Vec<u8> = collected.findings.iter().map(|part| part.finding.id.0[0]).collect();
        assert_eq!(listed, [0, 1, 2, 201, 202], "the first, and what stands out, in their order");
        assert_eq!((collected.counts.findings, collected.counts.findings_listed), (202, 5));
        assert_eq!(collected.marks.findings.len(), 202);
    }

    #[test]
    fn what_exceptions_accept_is_counted_and_left_out() {
        let mut accepted = finding(1, Kind::ExecNew, 0);
        accepted.verdict.disposition = Disposition::Accept;
        accepted.verdict.rule = Some("plugins".into());
        let mut other = finding(2, Kind::ExecNew, 1);
        other.verdict.rules = vec!["plugins".into(), "curl".into()];
        other.verdict.policy_generation = 7;
        let collected = collect(Scope::default(), 5, vec![found(accepted), found(other)]);
        assert_eq!((collected.counts.findings, collected.counts.accepted), (1, 1));
        let rules: Vec<_> = collected
            .rules
            .iter()
            .map(|(name, count)| (name.as_str(), count.findings, count.accepted))
            .collect();
        assert_eq!(rules, [("curl", 1, 0), ("plugins", 2, 1)]);
        assert_eq!(collected.generations, Some((0, 7)));
    }

    #[test]
    fn sessions_and_their_commands_are_bounded() {
        let sample: Command =
            serde_json::from_str(include_str!("../../../tests/data/command.json")).unwrap();
        let mut entries = Vec::new();
        for number in 0..1000_u16 {
            let mut one = session(number, number.into());
            one.findings_total = u64::from(number % 25 == 0);
            let id = one.id;
            entries.push(entry(one.started_at, Happened::SessionOpened(Box::new(one))));
            for index in 1..=150 {
                let command = Command { session: id, number: index, ..sample.clone() };
                entries.push(entry(at(number.into()), Happened::Command(Box::new(command))));
            }
        }
        entries.push(None);
        let collected = collect(Scope::default(), 5, entries);
        assert_eq!((collected.counts.sessions, collected.counts.unknown), (1000, 1));
        assert_eq!(collected.sessions.len(), MOST_SESSIONS);
        for (index, part) in collected.sessions.iter().enumerate() {
            let number = u16::try_from(index * 25).unwrap().to_be_bytes();
            assert_eq!(part.session.id.0[..2], number, "those with findings, in their order");
            assert_eq!((part.commands.len(), part.commands_kept), (MOST_COMMANDS, 150));
        }
    }

    #[test]
    fn an_end_that_was_only_noticed_is_an_end() {
        let mut unseen = session(1, 0);
        unseen.ended_at = None;
        let entries = || {
            vec![
                entry(at(0), Happened::SessionOpened(Box::new(unseen.clone()))),
                entry(at(60), Happened::SessionClosed(Box::new(unseen.clone()))),
            ]
        };
        let since = |seconds| Scope { since: Some(at(seconds)), ..Scope::default() };
        for scope in [Scope::default(), since(30)] {
            let collected = collect(scope, 5, entries());
            let mark = SessionMark { id: unseen.id, start: at(0), end: Some(at(60)) };
            assert_eq!(collected.marks.sessions, [mark]);
            assert_eq!(collected.counts.sessions, 1);
        }
        let later = collect(since(90), 5, entries());
        assert_eq!((later.counts.sessions, later.period.first), (0, None));
    }

    #[test]
    fn a_gap_belongs_to_a_session_that_it_overlaps() {
        let only = session(1, 100);
        let gap = |from: i64, until: Option<i64>| {
            entry(
                at(from),
                Happened::Gap {
                    name: format!("from {from}"),
                    container: None,
                    detail: String::new(),
                    until: until.map(at),
                },
            )
        };
        let entries = vec![
            gap(0, Some(99)),
            gap(0, Some(101)),
            gap(105, None),
            gap(50, None),
            gap(111, None),
        ];
        let scope = Scope { session: Some(Box::new(only)), ..Scope::default() };
        let collected = collect(scope, 5, entries);
        let names: Vec<_> =
            collected.gaps.iter().map(|gap| (gap.name.as_str(), gap.until)).collect();
        let expected = [("from 0", Some(at(101))), ("from 50", None), ("from 105", None)];
        assert_eq!(names, expected);
        assert_eq!(collected.period.last, Some(at(105)));
    }
}
