//! Records that are not committed yet, in memory.
//!
//! Keeps one revision per finding, session and probe, and drops records when there are too many.
//! Writes all of them in one transaction; when that happens is decided in `writing`.

use std::collections::{HashMap, VecDeque};

use jiff::Timestamp;
use rusqlite::Connection;

use super::findings::store_member;
use super::sessions::store_command;
use super::store::store;
use crate::health::Failure;
use crate::history::record::{MemberChange, Record};
use crate::history::sql::newest_seq;
use crate::model::{Command, FindingId, ProbeId, SessionId};

/// Most records in one commit.
pub(super) const BATCH: usize = 1000;
/// Most records that wait while the disk cannot be written.
const PENDING: usize = 20_000;
/// The same for changes to members.
const PENDING_MEMBERS: usize = 100_000;
/// The same for commands of sessions.
const PENDING_COMMANDS: usize = 20_000;

/// A record that has revisions. Only the newest revision is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Revised {
    Finding(FindingId),
    Session(SessionId),
    Probe(ProbeId),
}

impl Revised {
    fn of(record: &Record) -> Option<Revised> {
        match record {
            Record::Finding(finding) | Record::Aggregate { finding, .. } => {
                Some(Revised::Finding(finding.id))
            }
            Record::Session { session, .. } => Some(Revised::Session(session.id)),
            Record::Probe(probe) => Some(Revised::Probe(probe.id)),
            Record::Response(_) | Record::Gap { .. } => None,
        }
    }
}

/// Whether a reader may wait for this record.
fn is_news(record: &Record) -> bool {
    match record {
        Record::Finding(finding) | Record::Aggregate { finding, .. } => finding.revision == 1,
        Record::Session { session, .. } => session.revision == 1,
        Record::Response(_) | Record::Gap { .. } => true,
        Record::Probe(_) => false,
    }
}

/// Records that are not committed yet, in order; one per finding, session and probe.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// `None` where a later revision of the same finding follows.
    records: VecDeque<Option<Record>>,
    /// How many records were ever removed from the front.
    removed: usize,
    /// Position in `records`, counted from the very first.
    newest: HashMap<Revised, usize>,
    held: usize,
    /// How many of them are responses, for which there is always room.
    responses: usize,
    /// Changes to the members of findings that are held, in order.
    members: Vec<(FindingId, MemberChange)>,
    /// Commands of sessions, in order.
    commands: Vec<Command>,
    /// Something is there that is no revision of what may be known already.
    has_news: bool,
    /// How many records were dropped because the memory was full, and when the first was.
    dropped: Option<(u64, Timestamp)>,
}

impl Pending {
    pub(super) fn len(&self) -> usize {
        self.held
    }

    pub(super) fn is_empty(&self) -> bool {
        self.held == 0
    }

    pub(super) fn has_news(&self) -> bool {
        self.has_news
    }

    pub(super) fn responses(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().flatten().filter(|record| matches!(record, Record::Response(_)))
    }

    /// Whether this is enough for one commit.
    pub(super) fn is_batch(&self) -> bool {
        self.held >= BATCH || self.members.len() >= 4 * BATCH || self.commands.len() >= 4 * BATCH
    }

    /// Adds a record. Returns `Some(n)` if that dropped records: `n` have been dropped so far.
    pub(super) fn push(&mut self, record: Record) -> Option<u64> {
        let (record, lost) = match record {
            Record::Aggregate { finding, changes } => {
                let room = PENDING_MEMBERS.saturating_sub(self.members.len());
                let lost = changes.len().saturating_sub(room);
                let id = finding.id;
                self.members.extend(changes.into_iter().take(room).map(|change| (id, change)));
                (Record::Finding(finding), lost)
            }
            Record::Session { session, commands } => {
                let room = PENDING_COMMANDS.saturating_sub(self.commands.len());
                let lost = commands.len().saturating_sub(room);
                self.commands.extend(commands.into_iter().take(room));
                (Record::Session { session, commands: Vec::new() }, lost)
            }
            record @ (Record::Finding(_)
            | Record::Probe(_)
            | Record::Response(_)
            | Record::Gap { .. }) => (record, 0),
        };
        let dropped = self.push_one(record);
        // A member or a command that is not kept counts as a dropped record.
        if lost > 0 { Some(self.count_dropped(lost as u64)) } else { dropped }
    }

    fn push_one(&mut self, record: Record) -> Option<u64> {
        if let Some(revised) = Revised::of(&record) {
            let position = self.removed + self.records.len();
            if let Some(earlier) = self.newest.insert(revised, position) {
                self.records[earlier - self.removed] = None;
                self.held -= 1;
            }
        }
        self.responses += usize::from(matches!(record, Record::Response(_)));
        self.has_news |= is_news(&record);
        self.records.push_back(Some(record));
        self.held += 1;
        self.trim();
        (self.held - self.responses > PENDING).then(|| self.drop_one())
    }

    fn trim(&mut self) {
        while self.records.front().is_some_and(Option::is_none) {
            self.records.pop_front();
            self.removed += 1;
        }
        // A finding may be revised again and again behind a record that stays.
        if self.records.len() > 2 * PENDING.max(self.held) {
            self.records.retain(Option::is_some);
            self.removed = 0;
            self.newest.clear();
            for (position, record) in self.records.iter().enumerate() {
                if let Some(revised) = record.as_ref().and_then(Revised::of) {
                    self.newest.insert(revised, position);
                }
            }
        }
    }

    fn drop_one(&mut self) -> u64 {
        let is_gap = |record: &Option<Record>| matches!(record, Some(Record::Gap { .. }));
        let is_droppable =
            |record: &Option<Record>| !matches!(record, None | Some(Record::Response(_)));
        let victim = self
            .records
            .iter()
            .position(is_gap)
            .or_else(|| self.records.iter().position(is_droppable))
            .expect("more records are held than may be");
        if let Some(revised) = self.records[victim].take().as_ref().and_then(Revised::of) {
            self.newest.remove(&revised);
        }
        self.held -= 1;
        self.trim();
        self.count_dropped(1)
    }

    fn count_dropped(&mut self, lost: u64) -> u64 {
        let (count, _) = self.dropped.get_or_insert_with(|| (0, Timestamp::now()));
        *count += lost;
        *count
    }

    /// Writes everything in one transaction, and returns the newest sequence number.
    pub(super) fn write(&self, connection: &mut Connection) -> rusqlite::Result<u64> {
        let transaction = connection.transaction()?;
        if let Some((count, at)) = self.dropped {
            store(
                &transaction,
                &Record::Gap {
                    name: Failure::HistoryWrite.name().into(),
                    container: None,
                    detail: format!(
                        "{count} records were dropped while the history was not writable"
                    ),
                    at,
                    until: None,
                },
            )?;
        }
        for record in self.records.iter().flatten() {
            store(&transaction, record)?;
        }
        for (finding, change) in &self.members {
            store_member(&transaction, *finding, change)?;
        }
        for command in &self.commands {
            store_command(&transaction, command)?;
        }
        let newest = newest_seq(&transaction)?;
        transaction.commit()?;
        Ok(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::finding::MEMBER_SCHEMA;
    use crate::model::{ContainerId, Finding, Kind, Member, Outcome, Probe, RootfsPath, Session};
    use crate::respond::Response;

    fn finding(number: usize, revision: u64) -> Record {
        let mut finding: Finding =
            serde_json::from_str(include_str!("../../../tests/data/finding.json")).unwrap();
        finding.id.0[..8].copy_from_slice(&(number as u64).to_be_bytes());
        finding.revision = revision;
        Record::Finding(Box::new(finding))
    }

    fn gap(detail: &str) -> Record {
        Record::Gap {
            name: "pipeline_full".into(),
            container: None,
            detail: detail.into(),
            at: Timestamp::UNIX_EPOCH,
            until: None,
        }
    }

    fn held(pending: &Pending) -> Vec<Record> {
        pending.records.iter().flatten().cloned().collect()
    }

    #[test]
    fn a_finding_that_waits_is_replaced_by_its_next_revision() {
        let mut pending = Pending::default();
        for record in [finding(1, 1), finding(2, 1), finding(1, 2), gap("x"), finding(1, 3)] {
            assert_eq!(pending.push(record), None);
        }
        assert_eq!(held(&pending), [finding(2, 1), gap("x"), finding(1, 3)]);
        assert_eq!(pending.len(), 3);
    }

    #[test]
    fn the_files_of_a_finding_that_is_replaced_stay() {
        let mut pending = Pending::default();
        let seen = |path: &str| {
            MemberChange::Seen(Member {
                schema: MEMBER_SCHEMA.into(),
                path: RootfsPath::new(path).unwrap(),
                kind: Kind::FileRelocated,
                blake3: None,
                first_seen: Timestamp::UNIX_EPOCH,
                last_seen: Timestamp::UNIX_EPOCH,
                removed: false,
            })
        };
        let aggregate = |revision, changes| match finding(1, revision) {
            Record::Finding(finding) => Record::Aggregate { finding, changes },
            other => panic!("{other:?}"),
        };
        assert_eq!(pending.push(aggregate(1, vec![seen("/a")])), None);
        assert_eq!(pending.push(aggregate(2, vec![seen("/b")])), None);
        assert_eq!(held(&pending), [finding(1, 2)]);
        assert_eq!(pending.members.len(), 2);
        let flood = (0..PENDING_MEMBERS).map(|number| seen(&format!("/{number}"))).collect();
        assert_eq!(pending.push(aggregate(3, flood)), Some(2), "what does not fit is counted");
        assert_eq!(pending.members.len(), PENDING_MEMBERS);
    }

    #[test]
    fn a_session_that_waits_is_replaced_and_its_commands_stay() {
        let mut pending = Pending::default();
        let sample: Session =
            serde_json::from_str(include_str!("../../../tests/data/session.json")).unwrap();
        let command: Command =
            serde_json::from_str(include_str!("../../../tests/data/command.json")).unwrap();
        let session = |revision, commands: usize| Record::Session {
            session: Box::new(Session { revision, ..sample.clone() }),
            commands: vec![command.clone(); commands],
        };
        let probe: Box<Probe> =
            serde_json::from_str(include_str!("../../../tests/data/probe.json")).unwrap();
        // The finding that reports a session may have the same ID.
        let mut finding = finding(1, 1);
        if let Record::Finding(finding) = &mut finding {
            finding.id.0 = sample.id.0;
        }
        let records = [session(1, 1), Record::Probe(probe.clone()), finding.clone(), session(2, 2)];
        for record in records {
            assert_eq!(pending.push(record), None);
        }
        assert_eq!(pending.push(Record::Probe(probe.clone())), None);
        assert_eq!(held(&pending), [finding, session(2, 0), Record::Probe(probe)]);
        assert_eq!(pending.commands.len(), 3);
        assert_eq!(pending.push(session(3, PENDING_COMMANDS)), Some(3), "what does not fit");
        assert_eq!(pending.commands.len(), PENDING_COMMANDS);
    }

    #[test]
    fn h17_a_full_memory_drops_no_response() {
        let response = |number: i64| {
            Record::Response(Box::new(Response {
                process: None,
                pod: None,
                image: None,
                case: None,
                changed: true,
                ticket: 0,
                container: ContainerId::new("default", "web"),
                incarnation: None,
                reason: format!("number {number}"),
                requested_by: "uid 0".into(),
                requested_at: Timestamp::from_second(number).unwrap(),
                finding: None,
                outcome: Outcome {
                    action: "kill".into(),
                    succeeded: true,
                    gone: false,
                    message: "killed".into(),
                    restarter: None,
                    at: Timestamp::from_second(number).unwrap(),
                },
            }))
        };
        let mut pending = Pending::default();
        assert_eq!(pending.push(response(1)), None);
        let flood = PENDING + 500;
        for number in 0..flood {
            pending.push(finding(number, 1));
            pending.push(gap("x"));
        }
        for number in 2..=50 {
            assert_eq!(pending.push(response(number)), None, "there is always room for it");
        }
        let kept: Vec<Record> = pending.responses().cloned().collect();
        assert_eq!(kept, (1..=50).map(response).collect::<Vec<_>>());
        assert_eq!(pending.len(), PENDING + 50);
        // In their place among what is left.
        assert_eq!(held(&pending).first(), Some(&response(1)));
        let mut connection = Connection::open_in_memory().unwrap();
        crate::history::schema::prepare(&mut connection, std::path::Path::new("memory")).unwrap();
        pending.write(&mut connection).unwrap();
        let count = "SELECT count(*) FROM record WHERE type = 'response'";
        let written: i64 = connection.query_row(count, [], |row| row.get(0)).unwrap();
        assert_eq!(written, 50, "kept until it can be written");
    }

    #[test]
    fn a_full_memory_drops_gaps_first_then_the_oldest() {
        let mut pending = Pending::default();
        pending.push(finding(0, 1));
        pending.push(gap("x"));
        for number in 1..PENDING - 1 {
            assert_eq!(pending.push(finding(number, 1)), None);
        }
        assert_eq!(pending.push(finding(PENDING, 1)), Some(1));
        assert_eq!(pending.push(finding(PENDING + 1, 1)), Some(2));
        // Known already: nothing more is held.
        assert_eq!(pending.push(finding(PENDING + 1, 2)), None);
        let held = held(&pending);
        assert_eq!(held.len(), PENDING);
        assert_eq!(held.first(), Some(&finding(1, 1)), "the gap went first, then the oldest");
        assert_eq!(held.last(), Some(&finding(PENDING + 1, 2)));
    }

    #[test]
    fn a_finding_revised_for_ever_behind_one_that_stays_takes_no_memory() {
        let mut pending = Pending::default();
        pending.push(gap("stays"));
        for revision in 0..5 * PENDING as u64 {
            pending.push(finding(1, revision));
        }
        assert_eq!(held(&pending), [gap("stays"), finding(1, 5 * PENDING as u64 - 1)]);
        assert!(pending.records.len() <= 2 * PENDING + 1, "{}", pending.records.len());
    }
}
