//! Sessions and probes.

use super::*;

#[test]
fn one_session_is_one_finding_and_its_drift_names_it() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0\nsession c1 100 pts/0\nexec c1 /tmp/x evil")
        .expect(&["session.interactive pid 100 x1 r1", "exec.new /tmp/x x1 r1"]);
    assert!(node.findings[0].session.is_some());
    assert_eq!(node.findings[1].session, node.findings[0].session);
    node.play("session c1 200 -").expect(&[
        "session.interactive pid 100 x1 r1",
        "exec.new /tmp/x x1 r1",
        "session.exec pid 200 x1 r1",
    ]);
}

#[test]
fn a_probe_is_one_finding_with_a_count() {
    let mut node = Node::running();
    node.play("session c1 200 -\nsession c1 201 -\nsession c1 202 -\nsession c1 202 -")
        .expect(&["session.exec pid 200 x3 r3"]);
}

/// A node whose sessions are watched for a rhythm.
fn patient() -> Node {
    let mut node = Node::running();
    node.state.policy.probe_patience = jiff::SignedDuration::from_secs(30);
    node
}

fn code(code: i32) -> Option<Exit> {
    Some(Exit { code: Some(code), signal: None })
}

/// A node whose container `c1` declares one probe: `check`.
fn declaring() -> Node {
    let mut node = patient();
    let mut one = container("c1", Some(7));
    let (argv, source) = (texts(&["check"]), ProbeSource::Healthcheck);
    one.probes = vec![DeclaredProbe { argv, source }];
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(one))));
    node
}

#[test]
fn a_session_is_recorded_from_its_opening_to_its_end_with_its_commands_in_order() {
    let mut node = Node::running();
    node.play(
        "session c1 100 pts/0 sh
         exec-started c1 shell 100
         ran c1 100 100 sh
         ran c1 100 101 cp /bin/ls /tmp/x
         ended c1 100 101 0
         ran c1 100 102 /tmp/x
         exec c1 /tmp/x evil
         ended c1 100 102 3
         ran c1 100 103 rm /tmp/x",
    )
    .wait(1);
    let session = node.session(100);
    assert_eq!((session.state, session.commands), (SessionState::Open, 4));
    assert_eq!(session.exec_id.as_deref(), Some("shell"));
    let commands = ["sh: runs", "cp /bin/ls /tmp/x: 0", "/tmp/x: 3", "rm /tmp/x: runs"];
    assert_eq!(node.commands_of(100), commands);
    // The finding and the session name each other.
    let found = node.findings.iter().find(|finding| finding.kind == Kind::ExecNew).unwrap();
    assert_eq!(found.session, Some(session.id));
    assert_eq!(session.findings, [found.id]);
    let own =
        node.findings.iter().find(|finding| finding.kind == Kind::SessionInteractive).unwrap();
    assert_eq!(session.finding, Some(own.id));

    node.play("ended c1 100 103 0\nended c1 100 100 7");
    let session = node.session(100);
    assert_eq!((session.state, session.exit), (SessionState::Closed, code(7)));
    assert!(session.ended_at.unwrap() > session.started_at);
    assert_eq!(node.commands_of(100)[0], "sh: 7");
    // One session is one finding, which lasts as long as the session.
    let own = node
        .findings
        .iter()
        .rev()
        .find(|finding| finding.kind == Kind::SessionInteractive)
        .unwrap();
    assert_eq!((own.count, Some(own.last_seen)), (1, session.ended_at));
}

#[test]
fn a_program_that_becomes_another_one_has_ended_and_the_session_goes_on() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nran c1 100 100 sh\nran c1 100 100 bash").wait(1);
    assert_eq!(node.commands_of(100), ["sh: ended", "bash: runs"]);
    assert_eq!(node.session(100).state, SessionState::Open);
}

#[test]
fn what_a_session_leaves_behind_is_still_its_own() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nended c1 100 100 0\nleft-behind c1 /tmp/x evil 100")
        .wait(1);
    let session = node.session(100);
    assert_eq!((session.state, session.findings_total), (SessionState::Closed, 1));
    assert_eq!(node.findings.last().unwrap().session, Some(session.id));
}

#[test]
fn a_finding_reported_before_its_session_belongs_to_the_session() {
    let mut node = Node::running();
    node.play("left-behind c1 /tmp/x evil 100\nsession c1 100 pts/0 sh");
    assert_eq!(node.session(100).findings, [node.findings[0].id]);
}

#[test]
fn a30_a_process_that_joins_the_namespaces_is_reported_and_twice_with_a_terminal() {
    let mut node = Node::running();
    node.play("entered c1 200 - ls /").expect(&["namespace.entered pid 200 x1 r1"]);
    node.play("entered c1 300 pts/0 sh").expect(&[
        "namespace.entered pid 200 x1 r1",
        "namespace.entered pid 300 x1 r1",
        "session.interactive pid 300 x1 r1",
    ]);
    assert!(node.findings[0].detail.as_ref().unwrap().contains("past its runtime"));
    node.wait(1);
    assert_eq!(node.session(300).finding, Some(node.findings[1].id));
}

#[test]
fn a_terminal_that_is_opened_later_makes_a_session_interactive() {
    let mut node = patient();
    node.play("session c1 100 - python3 -c x\nterminal c1 100 pts/3\nterminal c1 100 pts/4")
        .expect(&["session.interactive pid 100 x1 r1"]);
    let session = node.session(100);
    assert_eq!(session.interactive, Some(Interactive::TerminalLater));
    assert_eq!(session.process.tty.as_deref(), Some("pts/3"));
}

#[test]
fn b15_a_command_at_a_steady_rhythm_is_counted_and_never_reported() {
    let mut node = patient();
    for pid in 200..212 {
        node.play(&format!("session c1 {pid} - pg_isready -q\nended c1 {pid} {pid} 0")).wait(8);
    }
    node.wait(60).expect(&[]);
    let probe = node.probes.last().unwrap();
    assert_eq!((probe.source, probe.count), (ProbeSource::Learned, 12));
    assert_eq!(probe.interval_milliseconds, Some(11_000));
    // Before the probe was recognised, its sessions were like others.
    let reported: HashSet<u32> =
        node.sessions.iter().map(|(session, _)| session.process.identity.pid).collect();
    assert_eq!(reported, (200..204).collect());
}

#[test]
fn b15_a_probe_is_recorded_as_soon_as_it_is_learned() {
    let mut node = patient();
    for pid in 200..205 {
        node.play(&format!("session c1 {pid} - check\nended c1 {pid} {pid} 0"));
    }
    node.wait(1).expect(&[]);
    let probe = node.probes.last().expect("no probe is recorded");
    assert_eq!((probe.source, probe.count), (ProbeSource::Learned, 5));
}

#[test]
fn a29_a_command_that_comes_once_is_reported_when_no_rhythm_has_come() {
    let mut node = patient();
    node.play("session c1 200 - cat /etc/passwd\nended c1 200 200 0").expect(&[]);
    assert_eq!(node.session(200).finding, None);
    node.wait(40).expect(&["session.exec pid 200 x1 r1"]);
    assert_eq!(node.session(200).finding, Some(node.findings[0].id));
    // If driftd is to respond, nothing waits.
    let mut node = patient();
    node.state.policy.rules = Policy::killing(&[Kind::SessionExec]).rules;
    node.play("session c1 200 - cat /etc/passwd").expect(&["session.exec pid 200 x1 r1"]);
    assert_eq!(node.requests.len(), 1);
    // Nor if driftd is not to learn probes.
    let mut node = Node::running();
    for pid in 200..210 {
        node.play(&format!("session c1 {pid} - check\nended c1 {pid} {pid} 0")).wait(8);
    }
    node.expect(&["session.exec pid 200 x10 r10"]);
    assert!(node.probes.is_empty());
}

#[test]
fn a_declared_probe_is_counted_from_the_first_time_on() {
    let mut node = declaring();
    node.play("session c1 200 - check\nran c1 200 200 check").wait(60).expect(&[]);
    assert!(node.sessions.is_empty());
    assert_eq!(node.probes.last().unwrap().count, 1);
    // With other arguments it is no probe.
    node.play("session c1 201 - check --all").wait(60).expect(&["session.exec pid 201 x1 r1"]);
}

#[test]
fn a_probe_that_runs_what_is_not_the_images_is_reported() {
    let mut node = declaring();
    node.play("session c1 100 - check\nran c1 100 100 check\nexec c1 /tmp/x evil").wait(1);
    let kinds: Vec<Kind> = node.findings.iter().map(|finding| finding.kind).collect();
    assert!(kinds.contains(&Kind::SessionExec) && kinds.contains(&Kind::ExecNew), "{kinds:?}");
    let session = node.session(100);
    assert_eq!((session.findings_total, session.commands), (1, 1));
    assert_eq!(node.commands_of(100), ["check: runs"]);
    let own = node.findings.iter().find(|finding| finding.kind == Kind::SessionExec).unwrap();
    assert!(own.detail.as_ref().unwrap().contains("probe"), "{:?}", own.detail);
}

#[test]
fn a_probe_that_is_to_be_reported_is_reported() {
    let mut node = patient();
    for pid in 200..206 {
        node.play(&format!("session c1 {pid} - check\nended c1 {pid} {pid} 0"));
    }
    node.wait(1);
    let id = node.probes.last().unwrap().id;
    let mut effects = Vec::new();
    assert!(node.state.set_probe(id, true, &mut effects).unwrap().reported);
    assert_eq!(effects.len(), 1);
    node.play("session c1 300 - check").wait(60).expect(&["session.exec pid 300 x1 r1"]);
    assert_eq!(node.state.set_probe(model::ProbeId([0; 16]), true, &mut effects), None);
}

#[test]
fn a_session_that_was_open_before_a_restart_goes_on() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nran c1 100 100 sh").wait(1);
    let mut after = Node::new(Respond::default(), node.findings.clone());
    let mut gone = node.session(100).clone();
    gone.process.identity.pid = 99;
    gone.id = model::SessionId::new(&id("c1"), gone.process.identity);
    // Its first process is gone.
    gone.state = SessionState::Closed;
    after.state.remember_sessions(
        vec![(node.session(100).clone(), Vec::new()), (gone, Vec::new())],
        Vec::new(),
    );
    after.play("start c1\nbaseline\nattached c1\nfound c1 100 pts/0 sh").wait(1).expect(&[]);
    after.play("ran c1 100 102 ls\nended c1 100 100 0");
    let session = after.session(100);
    assert_eq!((session.state, session.commands), (SessionState::Closed, 2));
    assert!(session.revision > node.session(100).revision);
    let gone = after.session(99);
    assert_eq!((gone.state, gone.ended_at), (SessionState::Closed, None));
}

/// Each client at the terminal of init has a session of its own. After a restart it is not
/// known whether the client is still there.
#[test]
fn sessions_at_a_terminal_are_distinguished_by_their_time() {
    let mut node = Node::running();
    node.play("came c1 501 1 sh\nran c1 501 102 ls\nended c1 501 501 ?").wait(1);
    node.play("came c1 502 1 sh").wait(1);
    let seen = node.newest_sessions();
    let states: Vec<_> = seen.iter().map(|one| (one.state, one.client.as_deref())).collect();
    let by = Some("containerd");
    assert_eq!(states, [(SessionState::Closed, by), (SessionState::Open, by)]);
    assert!(seen.iter().all(|one| one.process.identity.pid == 1));
    let reported: Vec<_> =
        node.newest().iter().map(|finding| (finding.kind, finding.session)).collect();
    let expected = [0, 1].map(|index| (Kind::SessionInteractive, Some(seen[index].id)));
    assert_eq!(reported, expected);

    let mut after = Node::new(Respond::default(), node.findings.clone());
    after.state.remember_sessions(vec![(seen[1].clone(), Vec::new())], Vec::new());
    after.play("start c1\nbaseline\nattached c1\ncame c1 503 1 sh").wait(9);
    let left = after.newest_sessions().into_iter().find(|one| one.id == seen[1].id).unwrap();
    assert_eq!((left.id, left.state, left.ended_at), (seen[1].id, SessionState::Closed, None));
}

#[test]
fn sessions_end_with_their_container() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh\nran c1 100 100 sh\nstop c1");
    assert_eq!(node.session(100).state, SessionState::Closed);
    assert_eq!(node.commands_of(100), ["sh: ended"]);
}

#[test]
fn the_runtime_reports_how_an_execution_ended_in_any_order() {
    let mut node = Node::running();
    node.play("exec-started c1 one 100\nsession c1 100 - true\nended c1 100 100 ?");
    assert_eq!(node.session(100).exec_id.as_deref(), Some("one"));
    assert_eq!((node.session(100).state, node.session(100).exit), (SessionState::Closed, None));
    node.play("exec-exited c1 one 100 5");
    assert_eq!(node.session(100).exit, code(5));
    // Another execution with the same pid.
    node.play("exec-exited c1 two 100 9").wait(1);
    assert_eq!(node.session(100).exit, code(5));
}

#[test]
fn commands_beyond_those_that_are_listed_are_counted() {
    let mut node = Node::running();
    node.play("session c1 100 pts/0 sh");
    for pid in 1000..1600 {
        node.play(&format!("ran c1 100 {pid} true"));
    }
    node.play("ran-more c1 100 400").wait(1);
    assert_eq!(node.session(100).commands, 1000);
    let listed: usize = node.sessions.iter().map(|(_, commands)| commands.len()).sum();
    assert_eq!(listed, 512);
}

#[test]
fn thousands_of_sessions_are_recorded_and_not_all_remembered() {
    let mut node = Node::running();
    for pid in 1000..4000 {
        node.play(&format!("session c1 {pid} - true {pid}\nended c1 {pid} {pid} 0"));
    }
    let reported: HashSet<_> = node.sessions.iter().map(|(session, _)| session.id).collect();
    assert_eq!(reported.len(), 3000);
    assert!(node.gaps.is_empty());
}
