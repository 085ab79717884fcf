//! What driftd knows of a container: its findings with their files, its sessions with their
//! commands, and the responses to it. Read from the history.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::Serialize;

use super::draft::{Cut, Draft};
use crate::history::{Filter, Lookup, Reader, SessionFilter};
use crate::model::{
    ContainerId, Finding, FindingId, Member, Outcome, ProcessIdentity, RootfsPath, Session,
    Severity,
};
use crate::respond::Response;

/// How much of the history is kept with a case.
const MOST_FINDINGS: usize = 2000;
const PAGE: usize = 500;
const MOST_MEMBERS: usize = 100_000;
/// The bytes of these, in memory: containers choose how long arguments and paths are.
const MAX_BYTES: usize = 32 << 20;
const MOST_SESSIONS: usize = 64;
const MOST_COMMANDS: usize = 512;
const MOST_RESPONSES: usize = 256;
/// How long the history may take to store the finding that asks for the evidence.
const STORED_WITHIN: Duration = Duration::from_millis(500);
const STEP: Duration = Duration::from_millis(10);

/// What is known of a container.
#[derive(Default)]
pub(super) struct Story {
    findings: Vec<Finding>,
    sessions: Vec<Session>,
    responses: Vec<Response>,
    /// What is missing, in words.
    pub(super) missing: Vec<String>,
    /// Not all members of findings were read.
    pub(super) is_short: std::cell::Cell<bool>,
}

/// The lines of `members.jsonl` and `responses.jsonl`. Published JSON schemas.
#[derive(Serialize)]
struct MemberLine<'a> {
    finding: FindingId,
    #[serde(flatten)]
    member: &'a Member,
}

#[derive(Serialize)]
struct ResponseLine<'a> {
    reason: &'a str,
    requested_by: &'a str,
    requested_at: Timestamp,
    finding: Option<FindingId>,
    outcome: &'a Outcome,
}

impl Story {
    /// Reads what there is. The history commits a finding a moment after it asks for evidence.
    pub(super) fn read(
        reader: &Reader,
        container: &ContainerId,
        finding: Option<FindingId>,
    ) -> Story {
        let mut story = Story::default();
        if let Some(finding) = finding {
            wait_for(reader, finding);
        }
        if let Err(err) = story.read_all(reader, container, finding) {
            story.missing.push(format!("the history cannot be read: {err}"));
        }
        story
    }

    fn read_all(
        &mut self,
        reader: &Reader,
        container: &ContainerId,
        finding: Option<FindingId>,
    ) -> Result<(), crate::history::Error> {
        let meant: Vec<FindingId> = finding.into_iter().collect();
        for text in reader.findings_of(&meant)? {
            self.findings.extend(text.parse());
        }
        // The severe ones first: a flood of others must not push them out.
        for minimum_severity in [Some(Severity::High), None] {
            let container = Some(container.clone());
            let filter = Filter { container, minimum_severity, ..Filter::default() };
            self.read_pages(reader, &filter)?;
        }
        let filter =
            SessionFilter { container: Some(container.clone()), ..SessionFilter::default() };
        self.sessions = reader.sessions(&filter, None, MOST_SESSIONS)?.sessions;
        self.responses = reader.responses(container)?;
        let old = self.responses.len().saturating_sub(MOST_RESPONSES);
        self.responses.drain(..old);
        self.sort();
        Ok(())
    }

    /// Adds the newest findings that are not there yet.
    fn read_pages(
        &mut self,
        reader: &Reader,
        filter: &Filter,
    ) -> Result<(), crate::history::Error> {
        let mut known: HashSet<FindingId> = self.findings.iter().map(|one| one.id).collect();
        let most = self.findings.len() + MOST_FINDINGS / 2;
        let (mut after, mut bytes) = (None, 0);
        loop {
            let page = reader.stored_findings(filter, after, PAGE)?;
            for text in &page.findings {
                bytes += text.0.len();
                let Ok(finding) = text.parse() else { continue };
                if known.insert(finding.id) {
                    self.findings.push(finding);
                }
            }
            after = page.next;
            if after.is_none() {
                return Ok(());
            }
            if self.findings.len() >= most || bytes >= MAX_BYTES / 2 {
                let kept = self.findings.len();
                self.missing.push(format!("there are more findings than the {kept} that are kept"));
                return Ok(());
            }
        }
    }

    /// The finding that asks for it first, then those of its session, then the most severe.
    fn sort(&mut self) {
        let session = self.findings.first().and_then(|first| first.session);
        if let Some((_, others)) = self.findings.split_first_mut() {
            others.sort_by_key(|one| {
                let is_of_session = session.is_some() && one.session == session;
                (!is_of_session, std::cmp::Reverse(one.severity))
            });
        }
    }

    pub(super) fn findings(&self) -> u64 {
        self.findings.len() as u64
    }

    pub(super) fn sessions(&self) -> u64 {
        self.sessions.len() as u64
    }

    /// The processes that findings name.
    pub(super) fn processes(&self) -> HashSet<ProcessIdentity> {
        let of_finding = |one: &Finding| {
            let both = one.process.iter().chain(&one.writer);
            let all = both.flat_map(|process| {
                let above = process.ancestors.iter().map(|ancestor| ancestor.identity);
                std::iter::once(process.identity).chain(above)
            });
            all.collect::<Vec<_>>()
        };
        self.findings.iter().flat_map(of_finding).collect()
    }

    /// Writes it into the case. Returns the files that findings are about, each once.
    pub(super) fn write(
        &self,
        draft: &mut Draft,
        reader: &Reader,
        directory: &str,
    ) -> Result<Vec<(RootfsPath, FindingId)>, Cut> {
        let mut lines = draft.lines(&format!("{directory}/findings.jsonl"))?;
        let ended = self.findings.iter().try_for_each(|one| lines.add(draft, one));
        lines.end(draft)?;
        ended?;
        let mut lines = draft.lines(&format!("{directory}/sessions.jsonl"))?;
        let ended = self.sessions.iter().try_for_each(|one| lines.add(draft, one));
        lines.end(draft)?;
        ended?;
        self.write_commands(draft, reader, directory)?;
        let mut lines = draft.lines(&format!("{directory}/responses.jsonl"))?;
        let ended = self.responses.iter().try_for_each(|one| {
            let Response { reason, requested_by, requested_at, finding, outcome, .. } = one;
            let (requested_at, finding) = (*requested_at, *finding);
            lines.add(draft, &ResponseLine { reason, requested_by, requested_at, finding, outcome })
        });
        lines.end(draft)?;
        ended?;
        self.write_members(draft, reader, directory)
    }

    fn write_commands(
        &self,
        draft: &mut Draft,
        reader: &Reader,
        directory: &str,
    ) -> Result<(), Cut> {
        let mut lines = draft.lines(&format!("{directory}/commands.jsonl"))?;
        let mut ended = Ok(());
        for session in &self.sessions {
            let Ok(page) = reader.commands(session.id, None, MOST_COMMANDS) else { continue };
            ended = page.commands.iter().try_for_each(|one| lines.add(draft, one));
            if ended.is_err() {
                break;
            }
        }
        lines.end(draft)?;
        ended
    }

    fn write_members(
        &self,
        draft: &mut Draft,
        reader: &Reader,
        directory: &str,
    ) -> Result<Vec<(RootfsPath, FindingId)>, Cut> {
        let mut lines = draft.lines(&format!("{directory}/members.jsonl"))?;
        let (mut seen, mut files) = (HashSet::new(), Vec::new());
        let (mut ended, mut left, mut bytes) = (Ok(()), MOST_MEMBERS, MAX_BYTES);
        for finding in &self.findings {
            // What lies in the root of another container is that one's. What has no name is kept
            // with its process.
            let is_own = |name: &str| !matches!(name, "container" | "anonymous");
            let own = finding.file.as_ref().filter(|file| is_own(&file.filesystem));
            if let Some(file) = own
                && finding.files.is_none()
                && seen.insert(file.path.clone())
            {
                files.push((file.path.clone(), finding.id));
            }
            if finding.files.is_none() || left == 0 {
                continue;
            }
            let _ = reader.each_member(finding.id, |member| {
                if left == 0 || ended.is_err() {
                    return;
                }
                bytes = bytes.saturating_sub(member.path.as_bytes().len());
                left = if bytes == 0 { 0 } else { left - 1 };
                ended = lines.add(draft, &MemberLine { finding: finding.id, member: &member });
                if seen.insert(member.path.clone()) {
                    files.push((member.path, finding.id));
                }
            });
        }
        if left == 0 {
            self.is_short.set(true);
        }
        lines.end(draft)?;
        ended.map(|()| files)
    }
}

fn wait_for(reader: &Reader, finding: FindingId) {
    let deadline = Instant::now() + STORED_WITHIN;
    while Instant::now() < deadline {
        if matches!(reader.stored_finding(&finding.to_string()), Ok(Lookup::Found(_))) {
            return;
        }
        std::thread::sleep(STEP);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::health::Health;
    use crate::history::{History, Keep, Record};

    #[test]
    fn a_flood_of_findings_pushes_out_none_that_is_severe() {
        let directory = tempfile::tempdir().unwrap();
        let history = History::open(directory.path()).unwrap();
        let keep = Keep { retention: Duration::from_secs(1 << 30), max_bytes: 1 << 30 };
        let writer = history.start(keep, Arc::new(Health::default()));
        let text = include_str!("../../tests/data/finding.json");
        let sample: Finding = serde_json::from_str(text).unwrap();
        let container = sample.container_id().unwrap().clone();
        let number = |number: u16, severity| {
            let mut id = [0; 16];
            id[..2].copy_from_slice(&number.to_be_bytes());
            let at = sample.last_seen + jiff::SignedDuration::from_secs(number.into());
            Finding { id: FindingId(id), severity, first_seen: at, last_seen: at, ..sample.clone() }
        };
        let (severe, last) = (number(1, Severity::Critical), number(3000, Severity::Low));
        let all = (2..3000).map(|one| number(one, Severity::Low));
        for finding in [severe.clone()].into_iter().chain(all).chain([last.clone()]) {
            writer.records().send(Record::Finding(Box::new(finding))).unwrap();
        }
        let reader = writer.reader();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !matches!(reader.finding(&last.id.to_string()), Ok(Lookup::Found(_))) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(STEP);
        }
        let asked = number(17, Severity::Low).id;
        let story = Story::read(&reader, &container, Some(asked));
        let ids: Vec<FindingId> = story.findings.iter().map(|one| one.id).collect();
        assert_eq!(ids[0], asked, "the one that asks for it is first");
        assert!(ids.contains(&severe.id) && ids.contains(&last.id));
        assert!((1000..MOST_FINDINGS).contains(&ids.len()), "{}", ids.len());
        let distinct: HashSet<&FindingId> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
        assert_eq!(story.missing.len(), 1, "{:?}", story.missing);
    }
}
