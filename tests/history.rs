//! The history against what can harm it: kills, a full disk, a second driftd, other
//! format versions, damage.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use driftd::health::{Failure, Health};
use driftd::history::{
    self, AlsoIn, Error, Filter, FindingLookup, Happened, History, Keep, MemberChange, ProbeLookup,
    Record, SessionFilter, SessionLookup, Writer,
};
use driftd::model::finding::MEMBER_SCHEMA;
use driftd::model::{
    self, Blake3Hash, ContainerId, Finding, FindingId, Incarnation, Kind, Member, Outcome, Probe,
    Restarter, RootfsPath, Session, SessionId, SessionState, Severity,
};
use driftd::respond::Response;
use jiff::{Timestamp, ToSpan as _};

const KEEP: Keep = Keep { retention: Duration::from_secs(30 * 24 * 60 * 60), max_bytes: 1 << 30 };
/// Long enough for a loaded machine; a passing test never waits this long.
const PATIENCE: Duration = Duration::from_secs(60);

fn sample() -> Finding {
    serde_json::from_str(include_str!("data/finding.json")).unwrap()
}

/// Finding `number` in its first revision, last seen `ago` seconds ago.
fn finding(number: u32, ago: i64) -> Finding {
    let mut finding = sample();
    finding.id.0[..4].copy_from_slice(&number.to_be_bytes());
    finding.revision = 1;
    finding.count = 1;
    finding.last_seen = Timestamp::now() - ago.seconds();
    finding.first_seen = finding.last_seen;
    finding
}

fn id_of(finding: &Finding) -> &ContainerId {
    finding.container_id().unwrap()
}

/// Every kept finding, sorted by ID.
fn all(reader: &history::Reader) -> Result<Vec<Finding>, Error> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = reader.findings(&Filter::default(), after, 100)?;
        all.extend(page.findings);
        after = page.next;
        if after.is_none() {
            all.sort_by_key(|finding| finding.id);
            return Ok(all);
        }
    }
}

fn record(finding: &Finding) -> Record {
    Record::Finding(Box::new(finding.clone()))
}

fn start(state_dir: &Path) -> Writer {
    start_with(state_dir, &Arc::new(Health::default()))
}

fn start_with(state_dir: &Path, health: &Arc<Health>) -> Writer {
    History::open(state_dir).unwrap().start(KEEP, health.clone())
}

/// Sends records and waits until they are committed.
fn write(writer: &Writer, records: Vec<Record>) {
    let marker = format!("written {}", records.len());
    for record in records {
        writer.records().send(record).unwrap();
    }
    let gap = Record::Gap {
        name: "marker".into(),
        container: None,
        detail: marker,
        at: Timestamp::now(),
        until: None,
    };
    writer.records().send(gap.clone()).unwrap();
    wait_for(writer, |records| records.contains(&gap));
}

#[track_caller]
fn wait_for(writer: &Writer, mut seen: impl FnMut(&[Record]) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let all = writer.reader().after(0, &Filter::default(), 1_000_000).unwrap();
        let records: Vec<Record> = all.records.into_iter().map(|(_, record)| record).collect();
        if seen(&records) {
            return;
        }
        assert!(Instant::now() < deadline, "not written in time, there is: {records:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The IDs of all findings, whatever the number of pages.
fn findings(writer: &Writer, filter: &Filter) -> Vec<FindingId> {
    let (mut ids, mut token) = (Vec::new(), None);
    loop {
        let page = writer.reader().findings(filter, token, 1000).unwrap();
        ids.extend(page.findings.iter().map(|finding| finding.id));
        match page.next {
            Some(next) => token = Some(next),
            None => return ids,
        }
    }
}

fn response(container: &ContainerId) -> Response {
    Response {
        process: None,
        pod: None,
        image: None,
        case: None,
        changed: true,
        ticket: 0,
        incarnation: Some(Incarnation {
            pid: 7,
            start_time: Some(700),
            created_at: Some(Timestamp::now()),
        }),
        container: container.clone(),
        reason: "a test \u{1b} requests it".into(),
        requested_by: "uid 0 pid 1 (/bin/sh)".into(),
        requested_at: Timestamp::now(),
        finding: Some(sample().id),
        outcome: Outcome {
            action: "kill".into(),
            succeeded: true,
            gone: false,
            message: "killed".into(),
            restarter: None,
            at: Timestamp::now(),
        },
    }
}

#[test]
fn written_records_are_read_back_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let (first, second) = (finding(1, 10), finding(2, 5));
    let response = response(id_of(&first));
    let gap = Record::Gap {
        name: "pipeline_full".into(),
        container: Some(id_of(&first).clone()),
        detail: "7 observations".into(),
        at: Timestamp::now(),
        until: None,
    };
    write(
        &writer,
        vec![
            record(&first),
            Record::Response(Box::new(response.clone())),
            gap.clone(),
            record(&second),
        ],
    );

    let followed = writer.reader().after(0, &Filter::default(), 4).unwrap();
    assert_eq!(
        followed.records,
        [
            (1, record(&first)),
            (2, Record::Response(Box::new(response.clone()))),
            (3, gap),
            (4, record(&second)),
        ]
    );
    assert_eq!((followed.cursor, followed.more, followed.pruned_through), (4, true, 0));
    assert_eq!(writer.reader().responses(id_of(&first)).unwrap(), [response]);
    assert_eq!(*writer.committed().borrow(), 5);
    writer.stop();

    let history = History::open(dir.path()).unwrap();
    assert_eq!(all(&history.reader()).unwrap(), [first, second]);
    let mode = |name: &str| {
        use std::os::unix::fs::PermissionsExt as _;
        dir.path().join(name).metadata().unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode("history.db"), 0o600);
    assert_eq!(mode("history.db-wal"), 0o600);
}

#[test]
fn d01_the_last_kill_or_restart_of_a_container_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let container = id_of(&sample()).clone();
    let last = || writer.reader().last_kill(&container).unwrap();
    assert_eq!(last(), None);
    let respond = |action: &str, succeeded| {
        let mut response = response(&container);
        (response.outcome.action, response.outcome.succeeded) = (action.into(), succeeded);
        response.outcome.restarter = Some(Restarter::Docker);
        response
    };
    let (killed, restart) = (respond("kill", true), respond("restart", true));
    let of_another = response(&ContainerId::new("elsewhere", &container.id));
    let keep = |one: &Response| {
        write(&writer, vec![Record::Response(Box::new(one.clone()))]);
    };
    for one in [&killed, &respond("kill", false), &respond("pause", true), &of_another] {
        keep(one);
        assert_eq!(last().as_ref(), Some(&killed));
    }
    keep(&restart);
    assert_eq!(last(), Some(restart));
    keep(&killed);
    assert_eq!(last(), Some(killed));
}

#[test]
fn only_the_newest_revision_of_a_finding_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let mut hot = finding(1, 0);
    let other = finding(2, 0);
    write(&writer, vec![record(&hot), record(&other)]);
    for _ in 0..500 {
        hot.revision += 1;
        hot.count += 1;
        writer.records().send(record(&hot)).unwrap();
    }
    write(&writer, vec![]);

    assert_eq!(findings(&writer, &Filter::default()).len(), 2);
    let after = writer.reader().after(3, &Filter::default(), 10).unwrap();
    let records: Vec<Record> = after.records.into_iter().map(|(_, record)| record).collect();
    assert_eq!(records.first(), Some(&record(&hot)), "a follower sees the newest revision, once");
    assert_eq!(records.len(), 2, "and the marker: {records:?}");
    writer.stop();
}

#[test]
fn findings_come_in_pages_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let all: Vec<Finding> = (0..25).map(|number| finding(number, i64::from(number / 3))).collect();
    write(&writer, all.iter().map(record).collect());

    let mut expected = all.clone();
    expected.sort_by_key(|finding| (finding.last_seen.as_microsecond(), finding.id));
    expected.reverse();
    let (mut got, mut token) = (Vec::new(), None);
    loop {
        let page = writer.reader().findings(&Filter::default(), token, 10).unwrap();
        got.extend(page.findings);
        match page.next {
            Some(next) => token = Some(next.to_string().parse().unwrap()),
            None => break,
        }
    }
    assert_eq!(got, expected);
    writer.stop();
}

#[test]
fn every_filter_leaves_out_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let plain = finding(1, 100);
    let mut elsewhere = finding(2, 100);
    elsewhere.container.as_mut().unwrap().id = ContainerId::new("default", "web");
    let mut image = finding(3, 100);
    image.image.name = Some("other:1".into());
    image.image.manifest_digest = None;
    let mut kind = finding(4, 100);
    (kind.kind, kind.severity) = (Kind::FileAdded, Severity::Low);
    let old = finding(5, 5000);
    let mut of_a_layer = finding(6, 100);
    of_a_layer.container = None;
    (of_a_layer.kind, of_a_layer.image.name) = (Kind::BaselineTampered, Some("bare:1".into()));
    of_a_layer.image.manifest_digest = None;
    let every = [&plain, &elsewhere, &image, &kind, &old, &of_a_layer];
    write(&writer, every.map(record).into());

    let check = |filter: Filter, expected: &[&Finding]| {
        let mut expected: Vec<FindingId> = expected.iter().map(|finding| finding.id).collect();
        let mut listed = findings(&writer, &filter);
        let followed = writer.reader().after(0, &filter, 100).unwrap();
        let mut followed: Vec<FindingId> = followed
            .records
            .into_iter()
            .filter_map(|(_, record)| match record {
                Record::Finding(finding) | Record::Aggregate { finding, .. } => Some(finding.id),
                Record::Session { .. }
                | Record::Probe(_)
                | Record::Response(_)
                | Record::Gap { .. } => None,
            })
            .collect();
        expected.sort();
        listed.sort();
        followed.sort();
        assert_eq!(listed, expected, "{filter:?}");
        assert_eq!(followed, expected, "{filter:?}");
    };
    let none = Filter::default();
    check(none.clone(), &every);
    check(Filter { container: Some(id_of(&elsewhere).clone()), ..none.clone() }, &[&elsewhere]);
    check(Filter { image: Some("other:1".into()), ..none.clone() }, &[&image]);
    check(Filter { image: Some("bare:1".into()), ..none.clone() }, &[&of_a_layer]);
    check(Filter { kinds: vec![Kind::BaselineTampered], ..none.clone() }, &[&of_a_layer]);
    let digest = plain.image.manifest_digest.unwrap().to_string();
    check(Filter { image: Some(digest), ..none.clone() }, &[&plain, &elsewhere, &kind, &old]);
    check(Filter { kinds: vec![Kind::FileAdded, Kind::ExecNew], ..none.clone() }, &[&kind]);
    check(
        Filter { minimum_severity: Some(Severity::Medium), ..none.clone() },
        &[&plain, &elsewhere, &image, &old, &of_a_layer],
    );
    let hour_ago = Some(Timestamp::now() - 3600.seconds());
    check(
        Filter { since: hour_ago, ..none.clone() },
        &[&plain, &elsewhere, &image, &kind, &of_a_layer],
    );
    check(Filter { until: hour_ago, ..none }, &[&old]);
    writer.stop();
}

#[test]
fn a_finding_and_a_container_are_found_by_the_beginning_of_their_ids() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let (one, mut other) = (finding(0xab00_0000, 0), finding(0xab10_0000, 0));
    other.container.as_mut().unwrap().id = ContainerId::new("default", "4f");
    write(&writer, vec![record(&one), record(&other)]);

    let reader = writer.reader();
    let found = FindingLookup::Found(Box::new(one.clone()));
    assert_eq!(reader.finding("AB0").unwrap(), found);
    assert_eq!(reader.finding(&one.id.to_string()).unwrap(), found);
    assert_eq!(reader.finding("ab").unwrap(), FindingLookup::Ambiguous(2));
    assert_eq!(reader.finding("ac").unwrap(), FindingLookup::Unknown);
    assert_eq!(reader.finding("%").unwrap(), FindingLookup::Unknown);

    let (long, short) = (id_of(&one).clone(), id_of(&other).clone());
    assert_eq!(reader.containers(&long.id[..8]).unwrap(), std::slice::from_ref(&long));
    assert_eq!(
        reader.containers(&format!("k8s.io/{}", &long.id[..8])).unwrap(),
        std::slice::from_ref(&long)
    );
    assert_eq!(reader.containers(&format!("moby/{}", &long.id[..8])).unwrap(), []);
    assert_eq!(reader.containers(&long.id[..7]).unwrap(), [], "a prefix this short is no match");
    assert_eq!(reader.containers("4f").unwrap(), [short]);
    assert_eq!(reader.containers(&format!("k8s.io/{}", long.id)).unwrap(), [long]);
    assert_eq!(reader.containers("x").unwrap(), []);
    let mut of_a_layer = finding(0xad00_0000, 0);
    of_a_layer.container = None;
    write(&writer, vec![record(&of_a_layer)]);
    assert_eq!(reader.finding("ad").unwrap(), FindingLookup::Found(Box::new(of_a_layer)));
    assert_eq!(reader.containers("").unwrap(), []);
    writer.stop();
}

#[test]
fn retention_removes_old_findings_and_informs_followers() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let old: Vec<Record> = (0..1200).map(|n| record(&finding(n, 40 * 24 * 60 * 60))).collect();
    let young = finding(5000, 0);
    write(&writer, old.into_iter().chain([record(&young)]).collect());
    writer.stop();

    // Retention runs when driftd starts.
    let writer = start(dir.path());
    let deadline = Instant::now() + PATIENCE;
    while findings(&writer, &Filter::default()) != [young.id] {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    let reader = writer.reader();
    let resumed = reader.after(700, &Filter::default(), 10).unwrap();
    assert_eq!(resumed.pruned_through, 1200);
    assert_eq!(resumed.records[0], (1201, record(&young)));
    writer.stop();
}

#[test]
fn the_queries_in_the_format_document_return_rows() {
    let document = include_str!("../docs/history-format.md");
    let (_, rest) = document.split_once("```sql\n").unwrap();
    let (queries, _) = rest.split_once("```").unwrap();

    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let finding = finding(1, 0);
    let seen = MemberChange::Seen(member("/tmp/a", 0));
    let aggregate = Record::Aggregate { finding: Box::new(finding.clone()), changes: vec![seen] };
    write(&writer, vec![aggregate, Record::Response(Box::new(response(id_of(&finding))))]);
    let mut entered = session(0xff, 60);
    entered.id = finding.session.unwrap();
    entered.container.id = id_of(&finding).clone();
    write(&writer, vec![session_record(&entered, &[command(&entered, 1, 50)])]);
    write(&writer, vec![Record::Probe(Box::new(probe(1, "web")))]);
    let database = rusqlite::Connection::open(dir.path().join(history::FILE)).unwrap();
    let mut count = 0;
    for query in queries.split_inclusive(";\n") {
        let rows = database
            .prepare(query)
            .and_then(|mut rows| rows.query_map([], |_| Ok(()))?.collect::<Result<Vec<_>, _>>())
            .unwrap_or_else(|err| panic!("{query}: {err}"));
        assert!(!rows.is_empty(), "{query}");
        count += 1;
    }
    assert_eq!(count, 9);
    writer.stop();
}

// ---- the files of aggregated findings

fn member(path: &str, number: u8) -> Member {
    Member {
        schema: MEMBER_SCHEMA.into(),
        path: RootfsPath::new(path).unwrap(),
        kind: Kind::FileRelocated,
        blake3: (number > 0).then_some(Blake3Hash([number; 32])),
        first_seen: "2026-11-20T10:08:00Z".parse().unwrap(),
        last_seen: "2026-11-20T10:08:00Z".parse().unwrap(),
        removed: false,
    }
}

fn aggregate(finding: &Finding, changes: Vec<MemberChange>) -> Record {
    Record::Aggregate { finding: Box::new(finding.clone()), changes }
}

#[test]
fn other_places_of_the_same_content_are_counted_by_container() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let content = Blake3Hash([0xcd; 32]);
    let holds = |number: u32, container: &str, content: Option<Blake3Hash>| {
        let mut finding = finding(number, i64::from(number));
        finding.container.as_mut().unwrap().id = ContainerId::new("default", container);
        finding.file.as_mut().unwrap().blake3 = content;
        finding
    };
    let own = holds(1, "own", Some(content));
    // Twice in one container, once in the own one, and once as a member of an aggregated
    // finding.
    let group = holds(5, "group", None);
    let same = Member { blake3: Some(content), ..member("/opt/tool", 0) };
    let records = vec![
        record(&own),
        record(&holds(2, "own", Some(content))),
        record(&holds(3, "twice", Some(content))),
        record(&holds(4, "twice", Some(content))),
        aggregate(&group, vec![MemberChange::Seen(same)]),
        record(&holds(6, "another", Some(Blake3Hash([0xce; 32])))),
        record(&holds(7, "unread", None)),
    ];
    write(&writer, records);
    let reader = writer.reader();
    let also = reader.also_in(&own).unwrap();
    let ids = |also: &AlsoIn| -> Vec<String> {
        also.newest.iter().map(|container| container.id.to_string()).collect()
    };
    assert_eq!((also.containers, ids(&also).len()), (2, 2));
    assert_eq!(ids(&also).iter().filter(|id| ["twice", "group"].contains(&&***id)).count(), 2);
    // Content that could not be read equals no other.
    assert_eq!(reader.also_in(&holds(7, "unread", None)).unwrap(), AlsoIn::default());

    let more = (10..40).map(|number| record(&holds(number, &format!("c{number}"), Some(content))));
    write(&writer, more.collect());
    let also = reader.also_in(&own).unwrap();
    assert_eq!((also.containers, ids(&also).len()), (32, 10));
    // The container where it was seen last comes first; the member was seen long ago.
    assert_eq!(ids(&also)[..2], ["twice", "c10"]);
}

#[test]
fn every_file_of_an_aggregated_finding_is_kept_and_listed_in_pages() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let (mut one, other) = (finding(1, 0), finding(2, 0));
    let path = |number: u32| format!("/tmp/t{number:05}");
    let seen = |from: u32, to: u32| {
        (from..to).map(|number| MemberChange::Seen(member(&path(number), 1))).collect()
    };
    write(&writer, vec![aggregate(&one, seen(0, 700)), aggregate(&other, seen(0, 1))]);
    one.revision = 2;
    let gone = MemberChange::Gone {
        path: RootfsPath::new(path(3)).unwrap(),
        at: "2026-11-20T10:09:00Z".parse().unwrap(),
    };
    let changed = MemberChange::Seen(Member {
        last_seen: "2026-11-20T10:10:00Z".parse().unwrap(),
        ..member(&path(4), 2)
    });
    let odd = MemberChange::Seen(member("/tmp/t\x1b\n", 0));
    let mut changes: Vec<MemberChange> = seen(700, 2500);
    changes.extend([gone, changed, odd]);
    write(&writer, vec![aggregate(&one, changes)]);

    let mut members = Vec::new();
    let mut after = None;
    loop {
        let page = writer.reader().members(one.id, after, 1000).unwrap();
        assert!(page.members.len() <= 1000);
        members.extend(page.members);
        // A client returns the token as text.
        let Some(next) = page.next else { break };
        after = Some(next.to_string().parse().unwrap());
    }
    assert_eq!(members.len(), 2501);
    assert!(members.is_sorted_by_key(|member| member.path.clone()));
    let find = |path: &str| {
        let path = RootfsPath::new(path).unwrap();
        members.iter().find(|member| member.path == path).unwrap().clone()
    };
    assert!(find(&path(3)).removed);
    let changed = find(&path(4));
    assert_eq!(changed.blake3, Some(Blake3Hash([2; 32])));
    assert_eq!(changed.first_seen, "2026-11-20T10:08:00Z".parse().unwrap());
    assert_eq!(find("/tmp/t\x1b\n"), member("/tmp/t\x1b\n", 0));
    for bad in ["2f7", "zz", "2f2f", "746d70"] {
        assert!(bad.parse::<history::MemberToken>().is_err(), "{bad}");
    }

    // After a restart, all of them are known.
    writer.stop();
    let history = History::open(dir.path()).unwrap();
    let known = [one.id, other.id].map(|finding| {
        let mut count = 0;
        history.reader().each_member(finding, |_| count += 1).unwrap();
        count
    });
    assert_eq!(known, [2501, 1]);
}

#[test]
fn the_members_of_a_finding_are_removed_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let (old, young) = (finding(1, 40 * 24 * 60 * 60), finding(2, 0));
    let writer = start(dir.path());
    let seen = || vec![MemberChange::Seen(member("/tmp/a", 1))];
    write(&writer, vec![aggregate(&old, seen()), aggregate(&young, seen())]);
    writer.stop();
    let writer = start(dir.path());
    wait_for(&writer, |_| writer.reader().members(old.id, None, 10).unwrap().members.is_empty());
    assert_eq!(writer.reader().members(young.id, None, 10).unwrap().members.len(), 1);
    writer.stop();
}

// ---- sessions

fn session(number: u8, ago: i64) -> Session {
    let mut session: Session = serde_json::from_str(include_str!("data/session.json")).unwrap();
    session.id.0[0] = number;
    session.container.id = ContainerId::new("default", "web");
    session.started_at = Timestamp::now() - ago.seconds();
    (session.revision, session.state) = (1, SessionState::Open);
    (session.ended_at, session.exit) = (None, None);
    session
}

fn command(session: &Session, number: u64, ago: i64) -> model::Command {
    let mut command: model::Command =
        serde_json::from_str(include_str!("data/command.json")).unwrap();
    (command.session, command.number) = (session.id, number);
    command.started_at = Timestamp::now() - ago.seconds();
    (command.ended_at, command.exit) = (None, None);
    command
}

fn probe(number: u8, container: &str) -> Probe {
    let mut probe: Probe = serde_json::from_str(include_str!("data/probe.json")).unwrap();
    probe.id.0[0] = number;
    probe.container.id = ContainerId::new("default", container);
    probe.last_seen = Timestamp::now() - i64::from(number).seconds();
    probe
}

fn session_record(session: &Session, commands: &[model::Command]) -> Record {
    Record::Session { session: Box::new(session.clone()), commands: commands.to_vec() }
}

fn closed(session: &Session, exit: i32) -> Session {
    let mut session = session.clone();
    (session.revision, session.state) = (session.revision + 1, SessionState::Closed);
    session.ended_at = Some(Timestamp::now());
    session.exit = Some(model::Exit { code: Some(exit), signal: None });
    session
}

fn found(session: &Session) -> SessionLookup {
    SessionLookup::Found(Box::new(session.clone()))
}

#[test]
fn a_session_is_kept_with_its_commands_in_its_newest_revision() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let (open, other) = (session(0xa1, 60), session(0xa2, 30));
    let first = command(&open, 1, 50);
    write(
        &writer,
        vec![session_record(&open, std::slice::from_ref(&first)), session_record(&other, &[])],
    );
    let reader = writer.reader();
    assert_eq!(reader.open_sessions().unwrap(), [other.clone(), open.clone()]);

    let mut ended = first.clone();
    ended.ended_at = Some(Timestamp::now());
    ended.exit = Some(model::Exit { code: None, signal: Some(9) });
    let second = command(&open, 2, 40);
    let over = closed(&open, 0);
    write(&writer, vec![session_record(&over, &[ended.clone(), second.clone()])]);

    assert_eq!(reader.session(&over.id.to_string()).unwrap(), found(&over));
    assert_eq!(reader.session("A1").unwrap(), found(&over));
    assert_eq!(reader.session("a").unwrap(), SessionLookup::Ambiguous(2));
    assert_eq!(reader.session("b").unwrap(), SessionLookup::Unknown);
    assert_eq!(reader.open_sessions().unwrap(), std::slice::from_ref(&other));
    let page = reader.commands(over.id, None, 1).unwrap();
    assert_eq!(page.commands, [ended]);
    let next = page.next.unwrap().to_string().parse().unwrap();
    let page = reader.commands(over.id, Some(next), 1).unwrap();
    assert_eq!((page.commands, page.next), (vec![second], None));
    assert_eq!(
        reader.containers(&over.container.id.id).unwrap(),
        std::slice::from_ref(&over.container.id),
        "it has no finding"
    );

    // Followers see the newest revision, once.
    let followed = reader.after(0, &Filter::default(), 10).unwrap();
    let sessions: Vec<&Session> = followed
        .records
        .iter()
        .filter_map(|(_, record)| match record {
            Record::Session { session, commands } if commands.is_empty() => Some(&**session),
            _ => None,
        })
        .collect();
    assert_eq!(sessions, [&other, &over]);
    let elsewhere =
        Filter { container: Some(ContainerId::new("default", "db")), ..Filter::default() };
    let of_others = reader.after(0, &elsewhere, 10).unwrap().records;
    assert!(!of_others.iter().any(|(_, record)| matches!(record, Record::Session { .. })));

    // A starting daemon reads which sessions are open.
    writer.stop();
    let history = History::open(dir.path()).unwrap();
    assert_eq!(history.reader().open_sessions().unwrap(), [other]);
}

#[test]
fn sessions_are_filtered_and_come_in_pages_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let mut all: Vec<Session> =
        (0..25).map(|number| session(number, i64::from(number / 3))).collect();
    let mut old = session(200, 10_000);
    old.container.id = ContainerId::new("default", "db");
    let mut old_end = closed(&old, 1);
    old_end.ended_at = Some(Timestamp::now() - 9_000.seconds());
    let going_on = session(201, 10_000);
    all.extend([old_end.clone(), going_on.clone()]);
    write(&writer, all.iter().map(|session| session_record(session, &[])).collect());

    let list = |filter: &SessionFilter| {
        let (mut ids, mut token) = (Vec::<SessionId>::new(), None);
        loop {
            let page = writer.reader().sessions(filter, token, 10).unwrap();
            ids.extend(page.sessions.iter().map(|session| session.id));
            match page.next {
                Some(next) => token = Some(next.to_string().parse().unwrap()),
                None => return ids,
            }
        }
    };
    let none = SessionFilter::default();
    all.sort_by_key(|session| (session.started_at.as_microsecond(), session.id));
    all.reverse();
    let ids = |sessions: &[&Session]| sessions.iter().map(|one| one.id).collect::<Vec<_>>();
    assert_eq!(list(&none), ids(&all.iter().collect::<Vec<_>>()));
    let db = Some(old.container.id.clone());
    assert_eq!(list(&SessionFilter { container: db, ..none.clone() }), [old.id]);
    let state = Some(SessionState::Closed);
    assert_eq!(list(&SessionFilter { state, ..none.clone() }), [old.id]);
    let hour_ago = Some(Timestamp::now() - 3600.seconds());
    let recent = list(&SessionFilter { since: hour_ago, ..none.clone() });
    assert!(recent.len() == 26 && !recent.contains(&old.id), "an open session counts as recent");
    assert_eq!(list(&SessionFilter { until: hour_ago, ..none }), [going_on.id, old.id]);
    for bad in ["", "x", "1", "1.zz", "1.00"] {
        assert!(bad.parse::<history::PageToken<SessionId>>().is_err(), "{bad}");
    }
    writer.stop();
}

#[test]
fn probes_are_kept_by_their_newest_count() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let (mut web, db) = (probe(1, "web"), probe(2, "db"));
    let kept = |probe: &Probe| Record::Probe(Box::new(probe.clone()));
    write(&writer, vec![kept(&web), kept(&db)]);
    (web.count, web.reported) = (web.count + 1, true);
    write(&writer, vec![kept(&web)]);
    let reader = writer.reader();
    assert_eq!(reader.probes(None).unwrap(), [web.clone(), db.clone()]);
    assert_eq!(reader.probes(Some(&db.container.id)).unwrap(), std::slice::from_ref(&db));
    assert_eq!(reader.probe("01").unwrap(), ProbeLookup::Found(Box::new(web)));
    assert_eq!(reader.probe("0").unwrap(), ProbeLookup::Ambiguous(2));
    assert_eq!(reader.containers(&db.container.id.id.clone()).unwrap(), [db.container.id]);
    writer.stop();
}

#[test]
fn retention_removes_closed_sessions_and_unseen_probes() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let month = 40 * 24 * 60 * 60;
    let (open, over, young) = (session(1, month), session(2, month), session(3, 0));
    let (mut gone, here) = (probe(4, "web"), probe(5, "web"));
    gone.last_seen = Timestamp::now() - month.seconds();
    let records = [&open, &over, &young].map(|one| session_record(one, &[command(one, 1, month)]));
    write(&writer, records.into());
    write(
        &writer,
        vec![session_record(&closed(&over, 0), &[]), session_record(&closed(&young, 0), &[])],
    );
    write(&writer, [&gone, &here].map(|one| Record::Probe(Box::new(one.clone()))).into());
    writer.stop();

    // Their last change is made as old as they are.
    let database = rusqlite::Connection::open(dir.path().join(history::FILE)).unwrap();
    let aged = (Timestamp::now() - month.seconds()).as_microsecond();
    for session in [&open, &over] {
        let id = session.id.to_string();
        let values = rusqlite::params![aged, id];
        database.execute("UPDATE record SET at = ?1 WHERE session = ?2", values).unwrap();
        database.execute("UPDATE session SET changed_at = ?1 WHERE id = ?2", values).unwrap();
    }
    drop(database);
    let writer = start(dir.path());
    let reader = writer.reader();
    wait_for(&writer, |_| reader.session(&over.id.to_string()).unwrap() == SessionLookup::Unknown);
    wait_for(&writer, |_| reader.probes(None).unwrap() == [here.clone()]);
    assert!(reader.commands(over.id, None, 10).unwrap().commands.is_empty());
    assert_eq!(reader.open_sessions().unwrap(), std::slice::from_ref(&open), "it is still open");
    assert_eq!(reader.commands(open.id, None, 10).unwrap().commands.len(), 1);
    assert_eq!(reader.commands(young.id, None, 10).unwrap().commands.len(), 1);
    writer.stop();
}

#[test]
fn a_timeline_lists_all_records_of_a_container_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let web = ContainerId::new("default", "web");
    let over = closed(&session(1, 100), 0);
    // Two commands at the same time, and another session while this one is open.
    let first = command(&over, 1, 90);
    let second = model::Command { number: 2, started_at: first.started_at, ..first.clone() };
    let within = session(2, 80);
    let mut drift = finding(1, 70);
    drift.container.as_mut().unwrap().id = web.clone();
    let response = response(&web);
    let gap = |container: Option<&str>, ago: i64, until| Record::Gap {
        name: "pipeline_full".into(),
        container: container.map(|id| ContainerId::new("default", id)),
        detail: "7 observations".into(),
        at: Timestamp::from_second(over.started_at.as_second() + 100 - ago).unwrap(),
        until,
    };
    let mended = Some(Timestamp::now());
    let mut elsewhere = session(3, 75);
    elsewhere.container.id = ContainerId::new("k8s.io", "web");
    write(
        &writer,
        vec![
            session_record(&over, &[second.clone(), first.clone()]),
            session_record(&within, &[]),
            session_record(&elsewhere, &[command(&elsewhere, 1, 74)]),
            record(&drift),
            record(&finding(2, 60)),
            gap(Some("other"), 55, None),
            gap(Some("web"), 50, None),
            gap(None, 40, None),
            gap(Some("web"), 50, mended),
            Record::Response(Box::new(response.clone())),
        ],
    );

    let reader = writer.reader();
    let list = |since, until, limit| {
        let (mut all, mut token) = (Vec::new(), None);
        loop {
            let page = reader.timeline(&web, since, until, token, limit).unwrap();
            assert!(page.entries.len() <= limit);
            all.extend(page.entries);
            match page.next {
                Some(next) => token = Some(next.to_string().parse().unwrap()),
                None => return all,
            }
        }
    };
    let words = |entries: &[history::TimelineEntry<history::FindingText>]| -> Vec<String> {
        let word = |entry: &history::TimelineEntry<history::FindingText>| match &entry.what {
            Happened::SessionOpened(session) => format!("opened {}", session.id.0[0]),
            Happened::Command(command) => format!("command {}", command.number),
            Happened::Finding(finding) => finding.parse().unwrap().kind.to_string(),
            Happened::SessionClosed(session) => format!("closed {}", session.id.0[0]),
            Happened::Response(response) => response.outcome.action.clone(),
            Happened::Gap { container, until, .. } => {
                let whose = if container.is_some() { "own" } else { "any" };
                format!("gap of {whose}{}", if until.is_some() { ", mended" } else { "" })
            }
        };
        // The last entry is the marker of `write`.
        entries[..entries.len() - 1].iter().map(word).collect()
    };
    let whole = list(None, None, 100);
    assert!(whole.is_sorted_by_key(|entry| entry.at));
    let mut expected = [
        "opened 1",
        "command 1",
        "command 2",
        "opened 2",
        "exec.modified",
        "gap of own, mended",
        "gap of any",
        "kill",
        "closed 1",
    ];
    if response.outcome.at > over.ended_at.unwrap() {
        expected.swap(7, 8);
    }
    assert_eq!(words(&whole), expected);
    for limit in 1..4 {
        assert_eq!(list(None, None, limit), whole, "in pages of {limit}");
    }
    let later = list(Some(Timestamp::now() - 75.seconds()), None, 100);
    assert_eq!(later, whole[4..]);
    let earlier = list(None, Some(Timestamp::now() - 75.seconds()), 100);
    assert_eq!(earlier, whole[..4]);
    for bad in ["", "1", "1.1", "1.9.ab", "1.1.", "1.1.'--", "x.1.ab"] {
        assert!(bad.parse::<history::TimelineToken>().is_err(), "{bad}");
    }
    writer.stop();
}

// ---- kill -9

const APPEND_TO: &str = "DRIFTD_TEST_APPEND_TO";

/// Appends until it is killed. Prints each record once a reader has read it as
/// committed: that is the acknowledgement.
#[test]
#[ignore = "run by no_acknowledged_record_is_lost_to_kill_9 in a separate process"]
fn child_appends_until_it_is_killed() {
    let Some(dir) = std::env::var_os(APPEND_TO) else { return };
    let writer = start(Path::new(&dir));
    let records = writer.records();
    let base = u32::try_from(*writer.committed().borrow()).unwrap() * 1000;
    std::thread::spawn(move || {
        let mut hot = finding(u32::MAX, 0);
        // Revisions continue where the last process stopped.
        hot.revision = u64::from(base);
        for number in 0.. {
            hot.revision += 1;
            hot.last_seen = Timestamp::now();
            records.send(record(&finding(base + number, 0))).unwrap();
            records.send(record(&hot)).unwrap();
            if number % 7 == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    let mut cursor = *writer.committed().borrow();
    let mut out = std::io::stdout().lock();
    loop {
        let followed = writer.reader().after(cursor, &Filter::default(), 1000).unwrap();
        cursor = followed.cursor;
        for (_, record) in followed.records {
            if let Record::Finding(finding) = record {
                writeln!(out, "ack {} {}", finding.id, finding.revision).unwrap();
            }
        }
        out.flush().unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn no_acknowledged_record_is_lost_to_kill_9() {
    const KILLS: u64 = 24;
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged: BTreeMap<FindingId, u64> = BTreeMap::new();
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_appends_until_it_is_killed", "--ignored", "--nocapture"])
            .env(APPEND_TO, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).split(b'\n');
        // Each time it is killed after another number of acknowledgements, at an arbitrary
        // moment of the writer's work.
        let mut left = 1 + (kill * 37) % 211;
        let mut read = |line: Vec<u8>| {
            let line = String::from_utf8(line).unwrap();
            let Some(ack) = line.strip_prefix("ack ") else { return false };
            let (id, revision) = ack.split_once(' ').unwrap();
            acknowledged.insert(id.parse().unwrap(), revision.parse().unwrap());
            true
        };
        while left > 0 {
            let line = lines.next().expect("the child writes until it is killed").unwrap();
            left -= u64::from(read(line));
        }
        std::thread::sleep(Duration::from_micros(kill * 7919 % 30_000));
        child.kill().unwrap();
        child.wait().unwrap();
        let rest: Vec<Vec<u8>> = lines.map(Result::unwrap).collect();
        // The last line of the pipe may be incomplete: then it is no acknowledgement.
        for line in rest.iter().take(rest.len().saturating_sub(1)) {
            read(line.clone());
        }

        // This reads the JSON of every record; an incomplete one would be an error.
        let history = History::open(dir.path()).unwrap();
        let kept: BTreeMap<FindingId, u64> = all(&history.reader())
            .unwrap()
            .iter()
            .map(|finding| (finding.id, finding.revision))
            .collect();
        for (id, revision) in &acknowledged {
            let found = kept.get(id).copied();
            assert!(
                found >= Some(*revision),
                "kill {kill}: {id} is {found:?}, acknowledged {revision}"
            );
        }
    }
    assert!(acknowledged.len() > 100, "{}", acknowledged.len());
    let database = rusqlite::Connection::open(dir.path().join(history::FILE)).unwrap();
    let verdict: String =
        database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
}

// ---- the disk

/// A small filesystem, unmounted at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> SmallDisk {
        run(
            "mount",
            &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", at.to_str().unwrap()],
        );
        SmallDisk(at.into())
    }

    fn grow(&self, size: &str) {
        let options = format!("remount,size={size}");
        run("mount", &["-o", &options, self.0.to_str().unwrap()]);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().unwrap();
    assert!(status.success(), "{program} {arguments:?}: {status} (this test needs root)");
}

#[test]
fn a_full_disk_loses_nothing_and_writing_continues() {
    let dir = tempfile::tempdir().unwrap();
    let disk = SmallDisk::mount(dir.path(), "1m");
    let health = Arc::new(Health::default());
    let writer = start_with(dir.path(), &health);
    let all: Vec<Finding> = (0..2000).map(|number| finding(number, 0)).collect();
    for finding in &all {
        writer.records().send(record(finding)).unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    while health.count(Failure::HistoryWrite) == 0 {
        assert!(Instant::now() < deadline, "2000 findings fit on a disk of 1 MiB");
        std::thread::sleep(Duration::from_millis(5));
    }
    let committed = *writer.committed().borrow();
    let kept = writer.reader().after(0, &Filter::default(), 5000).unwrap();
    assert!(kept.cursor >= committed, "committed records can be read, even from memory");

    disk.grow("64m");
    write(&writer, vec![]);
    let mut expected: Vec<FindingId> = all.iter().map(|finding| finding.id).collect();
    let mut got = findings(&writer, &Filter::default());
    expected.sort();
    got.sort();
    assert_eq!(got, expected);
    writer.stop();
}

/// Fills a disk with a file, until a caller removes that file.
fn fill(dir: &Path) -> PathBuf {
    let path = dir.join("filler");
    let mut file = std::fs::File::create(&path).unwrap();
    while std::io::Write::write_all(&mut file, &[0; 4096]).is_ok() {}
    path
}

/// Waits until the history has no problem any more.
fn wait_until_whole(health: &Health) {
    let deadline = Instant::now() + 2 * PATIENCE;
    while !health.problems().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", health.problems());
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ids(mut findings: Vec<Finding>) -> Vec<FindingId> {
    findings.sort_by_key(|finding| finding.id);
    findings.iter().map(|finding| finding.id).collect()
}

#[test]
fn r28_while_the_disk_is_full_new_records_can_be_read_and_are_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let _disk = SmallDisk::mount(dir.path(), "4m");
    let health = Arc::new(Health::default());
    let writer = start_with(dir.path(), &health);
    let mut old: Vec<Finding> = (0..20).map(|number| finding(number, 50)).collect();
    let seen = |path: &str| MemberChange::Seen(member(path, 1));
    let (kept, member_at) = (old[0].clone(), |path: &str| RootfsPath::new(path).unwrap());
    write(&writer, old.iter().map(record).collect());
    write(&writer, vec![aggregate(&kept, vec![seen("/a"), seen("/b")])]);
    let before = *writer.committed().borrow();

    let filler = fill(dir.path());
    let new: Vec<Finding> = (100..200).map(|number| finding(number, 10)).collect();
    let again = Finding { revision: 7, count: 7, ..old[1].clone() };
    let gone = MemberChange::Gone { path: member_at("/a"), at: Timestamp::now() };
    let session = session(1, 5);
    let mut records: Vec<Record> = new.iter().map(record).collect();
    records.push(record(&again));
    records.push(aggregate(&Finding { revision: 2, ..kept.clone() }, vec![gone, seen("/c")]));
    records.push(session_record(&session, &[command(&session, 1, 5)]));
    write(&writer, records);
    assert!(
        health.count(Failure::HistoryWrite) > 0,
        "the new records must not fit on the full disk"
    );
    assert!(health.problems()[0].contains("memory"), "{:?}", health.problems());

    old[0].revision = 2;
    old[1] = again.clone();
    let expected = ids(old.iter().chain(&new).cloned().collect());
    let whole = |reader: &history::Reader| {
        let mut all = all(reader).unwrap();
        all.sort_by_key(|finding| finding.id);
        assert_eq!(ids(all.clone()), expected);
        assert!(all.contains(&again), "the newest revision is read");
        let members = reader.members(kept.id, None, 10).unwrap().members;
        let members: Vec<(String, bool)> = members
            .into_iter()
            .map(|one| (String::from_utf8(one.path.as_bytes().to_vec()).unwrap(), one.removed))
            .collect();
        let expected = [("/a", true), ("/b", false), ("/c", false)];
        assert_eq!(members, expected.map(|(path, removed)| (path.to_owned(), removed)));
        assert_eq!(reader.commands(session.id, None, 10).unwrap().commands.len(), 1);
        let followed = reader.after(before, &Filter::default(), 1000).unwrap();
        assert!(followed.records.iter().all(|(seq, _)| *seq > before));
        assert_eq!(followed.pruned_through, 0, "no follower misses anything");
        followed.records
    };
    let in_memory = whole(&writer.reader());
    assert_eq!(in_memory.len(), 100 + 2 + 1 + 1, "and the marker");

    std::fs::remove_file(filler).unwrap();
    wait_until_whole(&health);
    assert_eq!(whole(&writer.reader()), in_memory, "the same records by the same numbers");
    writer.stop();
    let history = History::open(dir.path()).unwrap();
    assert_eq!(whole(&history.reader())[..], in_memory[..]);
}

#[test]
fn r28_the_history_in_memory_is_bounded_and_reports_what_it_drops() {
    let dir = tempfile::tempdir().unwrap();
    let _disk = SmallDisk::mount(dir.path(), "1m");
    let health = Arc::new(Health::default());
    let keep = Keep { retention: Duration::from_secs(3600), max_bytes: 2 << 20 };
    let writer = History::open(dir.path()).unwrap().start(keep, health.clone());
    let filler = fill(dir.path());
    for number in 0..3000 {
        writer.records().send(record(&finding(number, 0))).unwrap();
    }
    let deadline = Instant::now() + 2 * PATIENCE;
    while health.count(Failure::HistoryFull) == 0 {
        assert!(Instant::now() < deadline, "{:?}", health.losses());
        std::thread::sleep(Duration::from_millis(5));
    }
    write(&writer, vec![]);
    let gaps = writer.reader().after(0, &Filter::default(), 10_000).unwrap().records;
    let is_named =
        |record: &Record| matches!(record, Record::Gap { name, .. } if name == "history_full");
    assert!(gaps.iter().any(|(_, record)| is_named(record)));
    drop(filler);
    writer.stop();
}

#[test]
fn d07_on_a_full_disk_a_history_is_opened_in_memory_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let _disk = SmallDisk::mount(dir.path(), "1m");
    let (one, other) = (finding(1, 20), finding(2, 10));
    let writer = start(dir.path());
    write(&writer, vec![record(&one)]);
    let before = *writer.committed().borrow();
    writer.stop();

    let filler = fill(dir.path());
    let health = Arc::new(Health::default());
    let writer = start_with(dir.path(), &health);
    assert_eq!(health.problems().len(), 1, "the full disk must be a problem");
    assert_eq!(
        all(&writer.reader()).unwrap(),
        std::slice::from_ref(&one),
        "the old finding is read"
    );
    write(&writer, vec![record(&other)]);
    let both = ids(vec![one, other]);
    assert_eq!(ids(all(&writer.reader()).unwrap()), both);
    let followed = writer.reader().after(before, &Filter::default(), 10).unwrap();
    assert_eq!((followed.records.len(), followed.pruned_through), (2, 0));

    std::fs::remove_file(filler).unwrap();
    wait_until_whole(&health);
    assert_eq!(writer.reader().after(before, &Filter::default(), 10).unwrap(), followed);
    writer.stop();
    assert_eq!(ids(all(&History::open(dir.path()).unwrap().reader()).unwrap()), both);
}

#[test]
fn d07_a_history_that_a_full_disk_prevented_is_completed_later() {
    // The records of a killed daemon are in the write-ahead log.
    let killed = tempfile::tempdir().unwrap();
    let writer = start(killed.path());
    let (one, other) = (finding(1, 200), finding(2, 10));
    write(&writer, vec![record(&one)]);
    let name = |suffix: &str| format!("{}{suffix}", history::FILE);
    let is_empty = [false, true];
    for is_empty in is_empty {
        let dir = tempfile::tempdir().unwrap();
        let _disk = SmallDisk::mount(dir.path(), "2m");
        if !is_empty {
            for name in [name(""), name("-wal")] {
                std::fs::copy(killed.path().join(&name), dir.path().join(&name)).unwrap();
            }
        }
        let filler = fill(dir.path());
        let health = Arc::new(Health::default());
        let again = start_with(dir.path(), &health);
        assert_eq!(health.problems().len(), 1);
        let seen_again = Finding { first_seen: other.first_seen, ..one.clone() };
        write(&again, vec![record(&seen_again), record(&other)]);
        assert_eq!(all(&again.reader()).unwrap().len(), 2);
        std::fs::remove_file(filler).unwrap();
        wait_until_whole(&health);
        let mut found = all(&again.reader()).unwrap();
        found.sort_by_key(|finding| finding.id);
        let (first_seen, count, revision) = if is_empty {
            (seen_again.first_seen, one.count, one.revision)
        } else {
            (one.first_seen, 2 * one.count, one.revision + 1)
        };
        assert_eq!(found, [Finding { first_seen, count, revision, ..one.clone() }, other.clone()]);
        again.stop();
    }
    writer.stop();
}

// ---- bounds in bytes

/// The bytes of the file and of its write-ahead log.
fn size_of(dir: &Path) -> u64 {
    let names = ["", "-wal"].map(|suffix| dir.join(format!("{}{suffix}", history::FILE)));
    names.iter().filter_map(|name| std::fs::metadata(name).ok()).map(|file| file.len()).sum()
}

#[test]
fn x03_a_containers_labels_are_stored_once_and_read_back_with_every_record() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let labels: BTreeMap<String, String> =
        (0..200).map(|number| (format!("label-{number}"), "v".repeat(4000))).collect();
    let all: Vec<Finding> = (0..400)
        .map(|number| {
            let mut finding = finding(number, 0);
            finding.container.as_mut().unwrap().labels = labels.clone().into();
            finding
        })
        .collect();
    let text = serde_json::to_string(&all[0].container.as_ref().unwrap().labels).unwrap();
    assert!(text.len() < 9000 && text.contains("left out"), "{text}");
    let mut came = session(1, 0);
    came.container = all[0].container.clone().unwrap();
    let mut seen = probe(1, "web");
    seen.container = came.container.clone();
    let mut records: Vec<Record> = all.iter().map(record).collect();
    records.extend([session_record(&came, &[]), Record::Probe(Box::new(seen.clone()))]);
    write(&writer, records);
    let bytes = size_of(dir.path());
    assert!(bytes < 400 * 8000, "{} bytes a finding", bytes / 400);

    let reader = writer.reader();
    let container = id_of(&all[0]).clone();
    let mut kept = reader.findings_of_container(Some(&container)).unwrap();
    kept.sort_by_key(|finding| finding.id);
    assert_eq!(kept, all);
    assert_eq!(reader.session(&came.id.to_string()).unwrap(), found(&came));
    assert_eq!(reader.probes(None).unwrap(), [seen]);
    let followed = reader.after(0, &Filter::default(), 1).unwrap().records;
    assert_eq!(followed, [(1, record(&all[0]))]);
    let timeline = reader.timeline(&container, None, None, None, 1000).unwrap().entries;
    let is_that = |what: &Happened<history::FindingText>| matches!(what, Happened::Finding(text) if text.parse().unwrap() == all[7]);
    assert!(timeline.iter().any(|one| is_that(&one.what)));
    writer.stop();
    let database = rusqlite::Connection::open(dir.path().join(history::FILE)).unwrap();
    let count = |sql: &str| database.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(count("SELECT count(*) FROM labels"), 1);
    assert_eq!(count("SELECT max(length(json ->> '$.container.labels')) FROM finding"), 2);
    let shown = count(
        "SELECT min(length(json ->> '$.container.labels')) FROM timeline
                       WHERE type IN ('finding', 'session')",
    );
    assert_eq!(shown, text.chars().count() as i64);
}

#[test]
fn a_full_history_drops_the_noisiest_containers_least_severe_findings_and_no_response() {
    const MOST: u64 = 3 << 20;
    let dir = tempfile::tempdir().unwrap();
    let health = Arc::new(Health::default());
    let keep = Keep { max_bytes: MOST, ..KEEP };
    let writer = History::open(dir.path()).unwrap().start(keep, health.clone());
    let of = |container: &str, number: u32, ago: i64, severity| {
        let mut finding = finding(number, ago);
        finding.container.as_mut().unwrap().id = ContainerId::new("default", container);
        finding.kind = Kind::ExecNew;
        finding.severity = severity;
        finding
    };
    // The findings of the quiet container are the oldest and the least severe.
    let quiet: Vec<Finding> =
        (0..20).map(|number| of("quiet", number, 10_000, Severity::Info)).collect();
    let worst = of("noisy", 50, 9_000, Severity::Critical);
    let kept_response = response(&ContainerId::new("default", "noisy"));
    write(&writer, quiet.iter().chain([&worst]).map(record).collect());
    write(&writer, vec![Record::Response(Box::new(kept_response.clone()))]);
    let over = session(1, 0);
    write(&writer, vec![session_record(&closed(&over, 0), &[])]);
    for number in 100..6000 {
        let flood = of("noisy", number, 6000 - i64::from(number), Severity::Low);
        writer.records().send(record(&flood)).unwrap();
    }
    let pages = || {
        let database = rusqlite::Connection::open(dir.path().join(history::FILE)).unwrap();
        let pragma =
            |name| -> i64 { database.pragma_query_value(None, name, |row| row.get(0)).unwrap() };
        (pragma("page_count") - pragma("freelist_count")).unsigned_abs() * 4096
    };
    let newest = of("noisy", 5999, 1, Severity::Low).id;
    let deadline = Instant::now() + PATIENCE;
    while writer.reader().finding(&newest.to_string()).unwrap() == FindingLookup::Unknown
        || pages() > MOST
    {
        assert!(Instant::now() < deadline, "{} bytes", pages());
        std::thread::sleep(Duration::from_millis(20));
    }
    let reader = writer.reader();
    let kept: Vec<Finding> = all(&reader).unwrap();
    let names = |container: &str| -> Vec<FindingId> {
        let of_it = kept.iter().filter(|one| *id_of(one).id == *container);
        of_it.map(|one| one.id).collect()
    };
    assert_eq!(names("quiet").len(), 20, "no finding of another container is dropped");
    let noisy = names("noisy");
    assert!(noisy.contains(&worst.id), "nor a more severe one");
    assert!(noisy.contains(&newest), "nor the newest");
    assert!(noisy.len() > 200 && noisy.len() < 5000, "{}", noisy.len());
    assert_eq!(reader.responses(&kept_response.container).unwrap(), [kept_response]);
    assert!(health.count(Failure::HistoryFull) > 0);
    assert_eq!(health.problems().len(), 1, "{:?}", health.problems());
    let followed = reader.after(0, &Filter::default(), 10_000).unwrap();
    assert!(followed.pruned_through > 0);
    let gaps = followed.records.iter().filter(|(_, record)| {
        matches!(record, Record::Gap { name, container: Some(container), .. }
            if name == "history_full" && *container.id == *"noisy")
    });
    assert!(gaps.count() >= 1);
    writer.stop();
}

#[test]
fn the_bytes_a_container_holds_are_counted_through_every_change() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let mut finding = finding(1, 0);
    let changes =
        vec![MemberChange::Seen(member("/tmp/a", 0)), MemberChange::Seen(member("/b", 1))];
    write(&writer, vec![aggregate(&finding, changes)]);
    finding.revision = 2;
    finding.detail = Some("longer".repeat(100));
    let mut came = session(1, 0);
    came.container.id = id_of(&finding).clone();
    let run = command(&came, 1, 50);
    write(
        &writer,
        vec![
            record(&finding),
            session_record(&came, std::slice::from_ref(&run)),
            session_record(&came, &[run]),
        ],
    );
    let database = rusqlite::Connection::open(dir.path().join(history::FILE)).unwrap();
    let held = || -> i64 {
        let sql = "SELECT coalesce(sum(bytes), 0) FROM held WHERE container <> ''";
        database.query_row(sql, [], |row| row.get(0)).unwrap()
    };
    let real: i64 = database
        .query_row(
            "SELECT (SELECT sum(octet_length(json) + 512) FROM finding)
                  + (SELECT sum(octet_length(json) + 512) FROM session)
                  + (SELECT sum(octet_length(json) + 256) FROM command)
                  + (SELECT sum(octet_length(path) + 256) FROM member)",
            [],
            |row| row.get(0),
        )
        .unwrap();
    assert_eq!(held(), real);
    writer.stop();
    database.execute("UPDATE record SET at = 0", []).unwrap();
    database.execute("UPDATE session SET state = 'closed'", []).unwrap();
    let writer = start(dir.path());
    let deadline = Instant::now() + PATIENCE;
    while held() != 0 {
        assert!(Instant::now() < deadline, "{}", held());
        std::thread::sleep(Duration::from_millis(5));
    }
    let labels = || -> i64 {
        database.query_row("SELECT count(*) FROM labels", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(labels(), 0, "labels are removed with the last record that names the container");
    writer.stop();
}

// ---- a removed file

#[test]
fn x18_a_removed_history_starts_again_and_asks_for_the_known_findings() {
    for keep_side_files in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let health = Arc::new(Health::default());
        let writer = start_with(dir.path(), &health);
        let (one, other) = (finding(1, 20), finding(2, 10));
        write(&writer, vec![record(&one)]);
        let reader = writer.reader();
        let before = reader.newest().unwrap();
        let path = dir.path().join(history::FILE);
        std::fs::remove_file(&path).unwrap();
        if !keep_side_files {
            for suffix in ["-wal", "-shm"] {
                std::fs::remove_file(dir.path().join(format!("{}{suffix}", history::FILE)))
                    .unwrap();
            }
        }
        writer.begun().recv_timeout(PATIENCE).expect("the writer asks for the known findings");
        assert_eq!(health.count(Failure::HistoryGone), 1);
        assert_eq!(all(&reader).unwrap(), [], "readers read the new history");
        write(&writer, vec![record(&other)]);
        assert_eq!(all(&reader).unwrap(), std::slice::from_ref(&other));
        // A follower continues, and learns what it has missed.
        let followed = reader.after(before, &Filter::default(), 10).unwrap();
        assert_eq!(followed.pruned_through, before);
        let names: Vec<&str> = followed
            .records
            .iter()
            .filter_map(|(_, record)| match record {
                Record::Gap { name, .. } => Some(name.as_str()),
                _ => None,
            })
            .collect();
        assert_eq!(names, ["history_gone", "marker"]);
        assert!(health.problems().is_empty());
        writer.stop();
        assert_eq!(all(&History::open(dir.path()).unwrap().reader()).unwrap(), [other]);
    }
}

#[test]
fn x18_while_no_history_can_be_started_a_problem_is_reported_and_nothing_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let health = Arc::new(Health::default());
    let writer = start_with(&state, &health);
    write(&writer, vec![record(&finding(1, 20))]);
    std::fs::rename(&state, dir.path().join("moved")).unwrap();
    writer.records().send(record(&finding(2, 10))).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while health.problems().is_empty() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    std::fs::create_dir(&state).unwrap();
    let reader = writer.reader();
    while !reader.count().is_ok_and(|count| count == 1) {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    while !health.problems().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", health.problems());
        std::thread::sleep(Duration::from_millis(5));
    }
    writer.stop();
}

// ---- refusals

#[track_caller]
fn refusal(dir: &Path) -> Error {
    History::open(dir).map(|_| ()).unwrap_err()
}

#[test]
fn a_second_driftd_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let err = refusal(dir.path());
    assert!(matches!(err, Error::Locked { .. }), "{err:?}");
    assert_eq!(
        err.to_string(),
        format!(
            "another driftd uses the state directory {} (stop it first: systemctl stop driftd, or \
             name another directory with --state-dir)",
            dir.path().display()
        )
    );
    writer.stop();
    History::open(dir.path()).unwrap();
}

#[test]
fn a_history_of_a_newer_format_is_refused_and_left_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    start(dir.path()).stop();
    let path = dir.path().join(history::FILE);
    rusqlite::Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let before = std::fs::read(&path).unwrap();
    let err = refusal(dir.path());
    assert!(matches!(err, Error::NewerFormat { found: 99, supported: history::FORMAT, .. }));
    assert!(err.to_string().contains("mv "), "{err}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert!(
        history::format_of(dir.path()).is_err_and(|err| matches!(err, Error::NewerFormat { .. }))
    );
}

/// Makes a history of the first format with these findings in it.
fn write_format_1(state_dir: &Path, findings: &[Finding]) {
    let database = rusqlite::Connection::open(state_dir.join(history::FILE)).unwrap();
    database.execute_batch(include_str!("data/history-1.sql")).unwrap();
    for finding in findings {
        let mut json = serde_json::to_value(finding).unwrap();
        // A key that did not exist then.
        assert!(json.as_object_mut().unwrap().remove("detail").is_some());
        let container = id_of(finding);
        let id = finding.id.to_string();
        let last_seen = finding.last_seen.as_microsecond();
        database
            .execute(
                "INSERT INTO finding VALUES (?1, 1, ?2, ?3, ?4, NULL, ?5, 5, ?6, ?6, 1, ?7)",
                rusqlite::params![
                    id,
                    container.namespace,
                    container.id,
                    finding.image.name,
                    finding.kind.name(),
                    last_seen,
                    json.to_string()
                ],
            )
            .unwrap();
        database
            .execute(
                "INSERT INTO record (at, type, finding, namespace, container)
                 VALUES (?1, 'finding', ?2, ?3, ?4)",
                rusqlite::params![last_seen, id, container.namespace, container.id],
            )
            .unwrap();
    }
}

#[test]
fn a_history_of_the_first_format_is_migrated() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (finding(1, 20), finding(2, 10));
    write_format_1(dir.path(), &[one.clone(), other.clone()]);
    assert_eq!(history::format_of(dir.path()).unwrap(), Some(1));

    let history = History::open(dir.path()).unwrap();
    assert_eq!(all(&history.reader()).unwrap(), [one.clone(), other.clone()]);
    let writer = history.start(KEEP, Arc::new(Health::default()));
    let container = Filter { container: Some(id_of(&one).clone()), ..Filter::default() };
    assert_eq!(findings(&writer, &container), [other.id, one.id]);
    let followed = writer.reader().after(1, &Filter::default(), 10).unwrap();
    assert_eq!(followed.records, [(2, record(&other))]);
    let mut of_a_layer = finding(3, 0);
    of_a_layer.container = None;
    write(&writer, vec![record(&of_a_layer)]);
    assert_eq!(findings(&writer, &Filter::default()), [of_a_layer.id, other.id, one.id]);
    let came = session(1, 0);
    write(&writer, vec![session_record(&came, &[])]);
    assert_eq!(writer.reader().session(&came.id.to_string()).unwrap(), found(&came));
    writer.stop();
    assert_eq!(history::format_of(dir.path()).unwrap(), Some(history::FORMAT));
}

#[test]
fn record_numbers_continue_after_a_migration() {
    let dir = tempfile::tempdir().unwrap();
    write_format_1(dir.path(), &[finding(1, 20), finding(2, 10)]);
    let database = rusqlite::Connection::open(dir.path().join(history::FILE)).unwrap();
    database
        .execute_batch(
            "INSERT INTO record (seq, at, type, namespace, container, json)
                 VALUES (5, 1, 'response', 'default', 'web', '{}'), (7, 2, 'gap', NULL, NULL, '{}');
             DELETE FROM record WHERE seq IN (1, 7)",
        )
        .unwrap();
    let rows = |database: &rusqlite::Connection| -> Vec<(i64, String, Option<String>)> {
        let mut query =
            database.prepare("SELECT seq, type, container FROM record ORDER BY seq").unwrap();
        let row = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?, row.get(2)?));
        query.query_map([], row).unwrap().collect::<Result<_, _>>().unwrap()
    };
    let before = rows(&database);
    assert_eq!(before.len(), 2);
    let history = History::open(dir.path()).unwrap();
    assert_eq!(rows(&database), before);
    drop(database);
    let writer =
        history.start(Keep { retention: Duration::MAX, ..KEEP }, Arc::new(Health::default()));
    assert_eq!(*writer.committed().borrow(), 7);
    writer.records().send(record(&finding(3, 0))).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while *writer.committed().borrow() < 8 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    let records = writer.reader().after(7, &Filter::default(), 10).unwrap().records;
    assert!(matches!(records[0], (8, Record::Finding(_))), "{:?}", records[0]);
    writer.stop();
}

#[test]
fn a_damaged_history_is_refused_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(history::FILE);
    std::fs::write(&path, [b'x'; 8192]).unwrap();
    let err = refusal(dir.path());
    assert!(matches!(err, Error::Corrupt { .. }), "{err:?}");
    assert!(err.to_string().contains("move it aside and start again: mkdir "), "{err}");
    assert_eq!(std::fs::read(&path).unwrap(), [b'x'; 8192]);
}

#[test]
fn reported_findings_are_read_by_container() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    let (one, mut second, mut elsewhere, mut nowhere) =
        (finding(1, 0), finding(2, 9), finding(3, 0), finding(4, 0));
    let rename = |finding: &mut Finding, id: ContainerId| {
        finding.container.as_mut().unwrap().id = id;
    };
    let own = id_of(&one).clone();
    rename(&mut second, own.clone());
    rename(&mut elsewhere, ContainerId::new("another", &own.id));
    nowhere.container = None;
    write(&writer, [&one, &second, &elsewhere, &nowhere].map(record).to_vec());
    let reader = writer.reader();
    let ids = |container: Option<&ContainerId>| -> Vec<FindingId> {
        reader.findings_of_container(container).unwrap().iter().map(|finding| finding.id).collect()
    };
    assert_eq!(ids(Some(&own)), [one.id, second.id]);
    assert_eq!(ids(Some(id_of(&elsewhere))), [elsewhere.id], "the same name in another namespace");
    assert_eq!(ids(Some(&ContainerId::new("another", "none"))), []);
    assert_eq!(ids(None), [nowhere.id]);
}

#[test]
fn damage_inside_the_tables_is_found_when_findings_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    write(&writer, (0..200).map(|number| record(&finding(number, 0))).collect());
    writer.stop();
    let path = dir.path().join(history::FILE);
    let database = rusqlite::Connection::open(&path).unwrap();
    database.pragma_update(None, "wal_checkpoint", "TRUNCATE").unwrap();
    drop(database);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    for page in bytes[8192..middle].chunks_mut(4096) {
        page[..512].fill(0xee);
    }
    std::fs::write(&path, bytes).unwrap();
    let err = History::open(dir.path()).and_then(|history| all(&history.reader())).unwrap_err();
    assert!(matches!(err, Error::Corrupt { .. }), "{err:?}");
}

#[test]
fn a_database_of_another_program_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(history::FILE);
    rusqlite::Connection::open(&path).unwrap().execute_batch("CREATE TABLE notes (text)").unwrap();
    let err = refusal(dir.path());
    assert!(matches!(err, Error::Foreign { .. }), "{err:?}");
}

#[test]
fn b32_a_clock_set_back_does_not_reverse_the_history() {
    let dir = tempfile::tempdir().unwrap();
    let writer = start(dir.path());
    // By the clock, each was seen earlier than the one before it.
    for number in 0..5 {
        write(&writer, vec![record(&finding(number, i64::from(number) * 3600))]);
    }
    let followed = writer.reader().after(0, &Filter::default(), 100).unwrap();
    assert!(followed.records.is_sorted_by_key(|(seq, _)| *seq));
    let order: Vec<FindingId> = followed
        .records
        .iter()
        .filter_map(|(_, record)| match record {
            Record::Finding(finding) => Some(finding.id),
            Record::Aggregate { .. }
            | Record::Session { .. }
            | Record::Probe(_)
            | Record::Response(_)
            | Record::Gap { .. } => None,
        })
        .collect();
    let written: Vec<FindingId> = (0..5).map(|number| finding(number, 0).id).collect();
    assert_eq!(order, written);
    // A follower continues from any cursor, whatever the clock shows.
    let middle = followed.records[4].0;
    let rest = writer.reader().after(middle, &Filter::default(), 100).unwrap();
    assert_eq!(rest.records, followed.records[5..]);
    // Pages are ordered by time, and each finding is on exactly one.
    let mut paged = findings(&writer, &Filter::default());
    paged.sort();
    let mut all = written;
    all.sort();
    assert_eq!(paged, all);
    writer.stop();
}
