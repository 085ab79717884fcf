//! Responses: kills that the settings request, and responses that clients request.

use super::*;

#[test]
fn a_kill_is_requested_once_for_a_run_and_names_it() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("write c1 /tmp/x evil");
    assert!(node.requests.is_empty());
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/x evil\nexec c1 /tmp/y other");
    assert_eq!(node.requests.len(), 1);
    let request = node.requests.remove(0);
    assert_eq!(request.action, Action::Kill);
    let run = node.findings.iter().find(|finding| finding.kind == Kind::ExecNew).unwrap().id;
    assert_eq!(request.finding, Some(run));
    let created_at = Some(Timestamp::UNIX_EPOCH);
    let meant = Incarnation { pid: 7, start_time: Some(700), created_at };
    assert_eq!(request.incarnation, Some(meant));
    node.give(became(&request, true, false));
    assert_eq!(node.findings.last().unwrap().outcome.as_ref().map(|o| o.succeeded), Some(true));
    node.play("exec c1 /tmp/x evil").wait(1000);
    assert!(node.requests.is_empty(), "it is killed already");
    // It runs again, and the program too.
    node.play("stop c1").init = init(8);
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(container("c1", Some(8))))));
    node.play("exec c1 /tmp/x evil");
    assert_eq!(
        node.requests.iter().map(|one| one.incarnation.unwrap().pid).collect::<Vec<_>>(),
        [8]
    );
}

#[test]
fn h10_a_failed_kill_is_requested_again_while_the_run_is_there_and_each_failure_is_recorded() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    let mut pauses = Vec::new();
    for _ in 0..12 {
        let request = node.requests.pop().expect("it is requested again");
        assert!(node.requests.is_empty());
        node.give(became(&request, false, false));
        let from = node.clock;
        while node.requests.is_empty() {
            // Further sightings make it no faster.
            node.play("exec c1 /tmp/x evil").wait(0);
            assert!(node.clock - from < 1000, "{pauses:?}");
        }
        pauses.push(node.clock - from);
    }
    assert_eq!(node.responses.len(), 12);
    assert!(node.responses.iter().all(|kept| !kept.outcome.succeeded));
    assert!(pauses.is_sorted() && pauses[0] <= 3, "{pauses:?}");
    assert!((300..=303).contains(pauses.last().unwrap()), "bounded in rate: {pauses:?}");
    // The run is gone, and with it the reason.
    let request = node.requests.pop().unwrap();
    node.give(became(&request, false, false));
    node.play("stop c1").wait(1000);
    assert!(node.requests.is_empty() && node.state.response_due().is_none());
    assert_eq!(node.responses.len(), 13);
}

#[test]
fn h10_a_run_that_is_gone_is_not_tried_again_and_a_clock_that_is_set_back_delays_nothing() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil").clock = 1_000_000;
    let request = node.requests.pop().unwrap();
    node.give(became(&request, false, false));
    node.clock = 1;
    node.give(Input::Due);
    let request = node.requests.pop().expect("it is requested again at once");
    node.give(became(&request, false, true));
    assert!(node.findings.last().unwrap().outcome.as_ref().is_some_and(|outcome| outcome.gone));
    node.play("exec c1 /tmp/x evil").wait(1000);
    assert!(node.requests.is_empty());
}

/// The actions of the recorded responses, and the inits of their runs.
fn recorded(node: &Node) -> Vec<(&str, u32)> {
    let named = |one: &Response| one.incarnation.unwrap().pid;
    node.responses.iter().map(|one| (&*one.outcome.action, named(one))).collect()
}

/// Carries out the one kill that is requested.
fn kill(node: &mut Node, succeeded: bool) {
    let request = node.requests.remove(0);
    let Input::Response(mut response) = became(&request, succeeded, false) else { unreachable!() };
    response.outcome.restarter = Some(Restarter::RestartMonitor);
    response.outcome.at = Timestamp::from_second(node.clock).unwrap();
    node.give(Input::Response(response));
}

fn runs_with(node: &mut Node, pid: u32) {
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(container("c1", Some(pid))))));
}

#[test]
fn d01_a_killed_container_that_runs_again_is_recorded_once_with_what_was_to_start_it() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    kill(&mut node, true);
    runs_with(&mut node, 7);
    assert_eq!(recorded(&node), [("kill", 7)], "it is still that run");
    node.play("stop c1");
    assert_eq!(recorded(&node), [("kill", 7)]);
    node.clock += 3;
    runs_with(&mut node, 8);
    runs_with(&mut node, 8);
    node.play("stop c1");
    runs_with(&mut node, 9);
    assert_eq!(recorded(&node), [("kill", 7), ("restart", 8)]);
    let [kill, restart] = &node.responses[..] else { unreachable!() };
    assert_eq!(restart.finding, kill.finding);
    assert_eq!(restart.requested_by, "containerd's restart monitor, as was expected");
    assert_eq!(restart.outcome.restarter, Some(Restarter::RestartMonitor));
    let message = &restart.outcome.message;
    assert!(message.starts_with("started again (pid 8), seen 7.0 s after the kill"), "{message}");
    let last = node.findings.last().unwrap().outcome.as_ref().unwrap();
    assert_eq!(last.action, "kill", "the kill stays the outcome of the finding");
}

#[test]
fn d01_a_restart_that_is_quicker_than_the_response_is_recorded_too() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil\nstop c1");
    let change = RuntimeEvent::TaskCreated { container: id("c1"), pid: 8, rootfs: None };
    node.give(Input::Runtime(change));
    kill(&mut node, true);
    assert_eq!(recorded(&node), [("kill", 7), ("restart", 8)]);
}

#[test]
fn d01_what_was_not_killed_or_is_another_container_has_not_started_again() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    kill(&mut node, false);
    node.play("stop c1");
    runs_with(&mut node, 8);
    assert_eq!(recorded(&node), [("kill", 7)], "it ended by itself");

    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    kill(&mut node, true);
    node.play("stop c1\nremove c1");
    runs_with(&mut node, 8);
    assert_eq!(recorded(&node), [("kill", 7)], "another one has its ID");

    let mut node = killing(&[Kind::ExecNew]);
    node.play("exec c1 /tmp/x evil");
    kill(&mut node, true);
    node.play("stop c1");
    let created_at = Some(Timestamp::from_second(5).unwrap());
    let other = Container { created_at, ..container("c1", Some(8)) };
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(other))));
    assert_eq!(recorded(&node), [("kill", 7)], "another one has its ID");
}

#[test]
fn d01_a_restart_while_driftd_is_stopped_is_recorded_by_the_next_one() {
    let mut before = killing(&[Kind::ExecNew]);
    before.play("exec c1 /tmp/x evil");
    kill(&mut before, true);
    let killed = before.responses.remove(0);
    let mut after = Node::new(Respond::default(), Vec::new());
    after.state.remember_kill(&killed);
    runs_with(&mut after, 8);
    assert_eq!(recorded(&after), [("restart", 8)]);
    let restart = after.responses.remove(0);
    let mut later = Node::new(Respond::default(), Vec::new());
    later.state.remember_kill(&restart);
    runs_with(&mut later, 9);
    assert_eq!(recorded(&later), [], "it was recorded before");
}

#[test]
fn u08_settings_that_were_read_again_decide_from_then_on_and_verdicts_name_them() {
    let mut node = killing(&[]);
    let before = node.state.policy.generation;
    let set = |node: &mut Node, kinds: &[Kind]| {
        let patience = jiff::SignedDuration::from_secs(7);
        let rules = Policy::killing(kinds).rules;
        let policy = Policy { rules, probe_patience: patience, ..Policy::default() };
        node.give(Input::Request(ApiRequest::SetPolicy(Box::new(policy))));
        assert_eq!(node.state.policy.probe_patience, patience);
    };
    node.play("exec c1 /tmp/a evil");
    set(&mut node, &[Kind::ExecNew]);
    assert!(node.requests.is_empty(), "what was decided before is not decided again");
    node.play("exec c1 /tmp/b other");
    assert_eq!(node.requests.len(), 1);
    let verdict = node.findings.last().unwrap().verdict.clone();
    assert_eq!(
        (verdict.rule.as_deref(), verdict.policy_generation),
        (Some("respond.kill_on"), before + 1)
    );

    let mut node = killing(&[]);
    set(&mut node, &[Kind::ExecNew]);
    set(&mut node, &[]);
    node.play("exec c1 /tmp/a evil");
    assert!(node.requests.is_empty());
    assert_eq!(node.findings.last().unwrap().verdict.policy_generation, before + 2);
}

#[test]
fn x11_a_late_observation_of_an_ended_run_requests_no_kill_of_a_later_one() {
    let mut node = killing(&[Kind::ExecNew, Kind::FileAdded, Kind::SessionInteractive]);
    // It ends, and another container gets its ID.
    let mut next = container("c1", Some(8));
    next.created_at = Some(Timestamp::from_second(60).unwrap());
    node.play("stop c1\nremove c1");
    node.give(Input::Runtime(RuntimeEvent::TaskCreated {
        container: id("c1"),
        pid: 8,
        rootfs: None,
    }));
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(next))));
    node.play("baseline\nexec c1 /tmp/big evil\nwrite c1 /tmp/y evil\nsession c1 100 pts/0");
    let kinds: Vec<Kind> = node.findings.iter().map(|finding| finding.kind).collect();
    assert!(kinds.contains(&Kind::ExecNew) && kinds.contains(&Kind::FileAdded), "{kinds:?}");
    assert!(node.requests.is_empty(), "{:?}", node.requests);
    // The new container is killed for what it does itself.
    node.init = init(8);
    node.play("exec c1 /tmp/big evil");
    let created_at = Some(Timestamp::from_second(60).unwrap());
    let meant = Incarnation { pid: 8, start_time: Some(800), created_at };
    assert_eq!(node.requests.iter().map(|one| one.incarnation).collect::<Vec<_>>(), [Some(meant)]);
}

#[test]
fn x11_what_a_container_did_is_judged_by_its_own_image_after_its_id_was_given_away() {
    let mut node = killing(&[Kind::ExecNew]);
    let mut next = container("c1", Some(8));
    next.created_at = Some(Timestamp::from_second(60).unwrap());
    next.labels = BTreeMap::from([("app".to_owned(), "clean".to_owned())]).into();
    next.image.name = Some("other:1".into());
    next.layers[0].chain_id = ChainId([9; 32]);
    node.play("stop c1\nremove c1");
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(next))));
    // `ls` belongs to the former image, and the new image is not known yet.
    node.play("exec c1 /bin/ls ls\nexec c1 /tmp/x evil");
    let reported: Vec<_> =
        node.findings.iter().map(|finding| (finding.kind, &finding.image.name)).collect();
    assert_eq!(reported, [(Kind::ExecNew, &None)]);
    assert!(node.findings[0].container.as_ref().unwrap().labels.is_empty());
    // What the new one does waits for its baseline.
    node.init = init(8);
    node.play("exec c1 /tmp/z evil");
    assert_eq!(node.findings.len(), 1);
    assert!(node.requests.is_empty());
}

#[test]
fn x11_a_container_is_remembered_after_its_last_scan_for_what_comes_later_still() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("stop c1\nremove c1");
    node.give(Input::Sensor(SensorEvent::Scanned {
        container: id("c1"),
        ticket: None,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    assert!(node.state.inventory.get(&id("c1")).is_none());
    let mut next = container("c1", Some(8));
    next.created_at = Some(Timestamp::from_second(60).unwrap());
    next.image.name = Some("other:1".into());
    next.layers[0].chain_id = ChainId([9; 32]);
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(next))));
    node.play("exec c1 /bin/ls ls\nexec c1 /tmp/x evil");
    let reported: Vec<_> =
        node.findings.iter().map(|finding| (finding.kind, &finding.image.name)).collect();
    assert_eq!(reported, [(Kind::ExecNew, &None)]);
    assert_eq!(node.findings[0].run.map(|run| run.pid), Some(7));
    assert!(node.requests.is_empty(), "{:?}", node.requests);
}

#[test]
fn x11_a_run_that_was_seen_before_containerd_reported_it_gets_a_response() {
    let mut node = killing(&[Kind::ExecNew]);
    node.play("stop c1").init = init(8);
    node.play("exec c1 /tmp/x evil");
    let request = node.requests.pop().expect("it runs, although it is not reported yet");
    assert_eq!(request.incarnation.map(|run| (run.pid, run.start_time)), Some((8, Some(800))));
    node.give(Input::Runtime(RuntimeEvent::TaskCreated {
        container: id("c1"),
        pid: 8,
        rootfs: None,
    }));
    // containerd did not know it yet.
    node.give(became(&request, false, false));
    node.wait(2);
    assert_eq!(node.requests.len(), 1);
}

#[test]
fn a_response_needs_no_finding_that_is_kept() {
    let mut node = killing(&[Kind::ExecFileless]);
    let container = id("c1");
    let (finding, kind) = (FindingId([9; 16]), Kind::ExecFileless);
    let mut effects = Vec::new();
    let rule = "respond.kill_on".to_owned();
    let answer =
        model::RuleAnswer { action: model::Answer::Kill, rule, dry_run: false, hook: None };
    let verdict = model::Verdict { answers: vec![answer], ..node.state.policy.report() };
    let actor = Actor { init: Some(init(7)), ..Actor::default() };
    let cause =
        Cause { container: &container, actor, kind, verdict: &verdict, finding, path: None };
    node.state.respond(&cause, Timestamp::UNIX_EPOCH, &mut effects);
    let [Effect::Respond(request)] = &effects[..] else { panic!("{effects:?}") };
    assert_eq!((request.finding, request.incarnation.unwrap().pid), (Some(finding), 7));
}

pub(super) type Reply = oneshot::Receiver<Result<Response, LookupError>>;

impl Node {
    pub(super) fn respond(&mut self, container: &str) -> Reply {
        self.respond_to(container, None)
    }

    fn respond_to(&mut self, container: &str, cause: Option<(FindingId, Incarnation)>) -> Reply {
        let (reply, replied) = oneshot::channel();
        self.give(Input::Request(ApiRequest::Respond {
            container: container.into(),
            cause: cause.map(Box::new),
            process: None,
            action: Action::Pause,
            reason: "a test".into(),
            requested_by: "uid 0".into(),
            no_restart: false,
            environment: false,
            hook: None,
            reply,
        }));
        replied
    }
}

#[test]
fn u19_a_response_takes_a_whole_name_and_refuses_what_is_gone() {
    let mut node = Node::new(Respond::default(), Vec::new());
    node.play("start web\nstart web-canary");
    let mut reply = node.respond("web");
    let request = node.requests.pop().unwrap();
    assert_eq!((&*request.container.id, request.incarnation.unwrap().pid), ("web", 7));
    node.give(became(&request, true, false));
    reply.try_recv().unwrap().unwrap();
    // Its last scan is not over yet, and the name of the other container begins with its own.
    node.play("attached web\nstop web\nremove web");
    let refused = |node: &mut Node, text: &str| {
        let refused = node.respond(text).try_recv().unwrap().unwrap_err();
        assert!(node.requests.is_empty(), "{text}");
        refused
    };
    assert!(matches!(refused(&mut node, "web"), LookupError::Gone(_)));
    node.give(Input::Sensor(SensorEvent::Scanned {
        container: id("web"),
        ticket: None,
        began: Timestamp::UNIX_EPOCH,
        complete: true,
    }));
    let alike = LookupError::NotWhole("web".into(), "default/web-canary".into());
    assert_eq!(refused(&mut node, "web"), alike);
    assert_eq!(refused(&mut node, "db"), LookupError::Unknown("db".into()));
    for text in ["diff", "lookup"] {
        let (reply, mut diff) = oneshot::channel();
        let (reply_to_lookup, mut lookup) = oneshot::channel();
        let container = "web".to_owned();
        if text == "diff" {
            node.give(Input::Request(ApiRequest::Diff { container, reply }));
            assert_eq!(diff.try_recv().unwrap().unwrap_err(), alike);
        } else {
            let reply = reply_to_lookup;
            node.give(Input::Request(ApiRequest::Lookup { container, reply }));
            assert_eq!(lookup.try_recv().unwrap().unwrap_err(), alike);
        }
    }
}

#[test]
fn u19_a_response_to_a_finding_is_refused_when_its_run_is_over() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil");
    let finding = node.findings.last().unwrap();
    let (id, run) = (finding.id, finding.run.expect("a finding names the run it was seen in"));
    assert_eq!((run.pid, run.start_time), (7, Some(700)));
    let mut reply = node.respond_to("default/c1", Some((id, run)));
    let request = node.requests.pop().unwrap();
    assert_eq!((request.finding, request.incarnation), (Some(id), Some(run)));
    node.give(became(&request, true, false));
    reply.try_recv().unwrap().unwrap();
    let finding = node.findings.last().unwrap();
    assert_eq!((finding.id, finding.outcome.is_some()), (id, true));
    // It ends, and the client may still name it.
    node.play("stop c1");
    let refused = |node: &mut Node| {
        let refused = node.respond_to("default/c1", Some((id, run))).try_recv().unwrap();
        assert!(node.requests.is_empty());
        refused.unwrap_err()
    };
    assert_eq!(refused(&mut node), LookupError::RunGone("default/c1".into()));
    node.give(Input::Runtime(RuntimeEvent::Container(Box::new(container("c1", Some(8))))));
    assert_eq!(refused(&mut node), LookupError::RunGone("default/c1".into()));
    // Seen again, it belongs to the current run.
    node.init = init(8);
    node.play("exec c1 /tmp/x evil");
    assert_eq!(node.findings.last().unwrap().run.map(|run| run.pid), Some(8));
}

#[test]
fn out_of_the_box_no_kill_is_ever_requested() {
    let mut node = Node::running();
    node.play("exec c1 /tmp/x evil\nsession c1 100 pts/0");
    assert!(node.requests.is_empty());
}

/// A node that runs containers `c1` to `c5`, with these rules.
pub(super) fn answering(rules: &str) -> Node {
    let mut node = Node::new(Respond::default(), Vec::new());
    let files = vec![PolicyFile::new("a.toml", rules)];
    let loaded = policy::parse("".as_ref(), files).unwrap();
    let enforce = config::Enforce::On;
    node.state.policy = Policy { enforce, ..Policy::of(&config::Config::default(), Some(&loaded)) };
    for number in 1..=5 {
        node.play(&format!("start c{number}\nattached c{number}"));
    }
    node.play("baseline");
    node
}

pub(super) fn rule(id: &str, answers: &str, conditions: &str) -> String {
    format!(
        "[[rule]]\nid = \"{id}\"\nreason = \"r\"\neffect = \"report\"\nanswer = [{answers}]\n\
         [rule.match]\n{conditions}\n"
    )
}

/// The actions of the requests so far, each with its container and its process.
pub(super) fn asked(node: &mut Node) -> Vec<String> {
    let requests = std::mem::take(&mut node.requests);
    let text = |one: &ResponseRequest| {
        let process = one.process.map(|process| format!(" {}", process.pid)).unwrap_or_default();
        format!("{} {}{process}", one.action.name(), one.container.id)
    };
    requests.iter().map(text).collect()
}

#[test]
fn a_rule_that_matches_everything_ends_three_containers_and_no_more_and_says_so() {
    let mut node = answering(&rule("everything", "\"kill\"", "everything = true"));
    for container in ["c1", "c2", "c3", "c4", "c5", "c4"] {
        node.play(&format!("exec {container} /tmp/x evil"));
    }
    assert_eq!(asked(&mut node), ["kill c1", "kill c2", "kill c3"]);
    let stopped = node.state.status().stopped_rules;
    assert_eq!(stopped.iter().map(|one| one.rule.as_str()).collect::<Vec<_>>(), ["everything"]);
    // Each run that is spared is recorded once, and that the rule is stopped.
    let recorded: Vec<(&str, &str, bool)> = node
        .responses
        .iter()
        .map(|one| (&*one.outcome.action, &*one.container.id, one.outcome.succeeded))
        .collect();
    let expected = [("stop-answers", "c4", true), ("kill", "c4", false), ("kill", "c5", false)];
    assert_eq!(recorded, expected);
    let outcome = node.findings.last().unwrap().outcome.clone().unwrap();
    assert!(outcome.message.contains("driftd respond resume-answers everything"), "{outcome:?}");

    // A restart changes nothing.
    let kept: Vec<Response> = node.responses.clone();
    let mut restarted = answering(&rule("everything", "\"kill\"", "everything = true"));
    restarted.state.remember_answers(kept.clone());
    restarted.play("exec c5 /tmp/x evil");
    assert_eq!(asked(&mut restarted), [""; 0]);
    assert_eq!(restarted.state.status().stopped_rules.len(), 1);

    // A user resumes it.
    let (reply, mut replied) = oneshot::channel();
    node.give(Input::Request(ApiRequest::ResumeAnswers {
        rule: Some("everything".into()),
        reason: "the rule was mended".into(),
        requested_by: "uid 0".into(),
        reply,
    }));
    assert_eq!(replied.try_recv().unwrap().len(), 1);
    node.play("exec c4 /tmp/x evil");
    assert_eq!(asked(&mut node), ["kill c4"]);
    let mut restarted = answering(&rule("everything", "\"kill\"", "everything = true"));
    restarted.state.remember_answers(node.responses.clone());
    assert_eq!(restarted.state.status().stopped_rules, []);
}

#[test]
fn kills_before_a_restart_count_for_the_limits() {
    let text = rule("everything", "\"kill\"", "everything = true");
    let mut node = answering(&text);
    for container in ["c1", "c2", "c3"] {
        node.play(&format!("exec {container} /tmp/x evil"));
        let request = node.requests.pop().unwrap();
        node.give(became(&request, true, false));
    }
    let mut restarted = answering(&text);
    restarted.clock = node.clock;
    restarted.state.remember_answers(node.responses.clone());
    restarted.play("exec c4 /tmp/x evil");
    assert_eq!(asked(&mut restarted), [""; 0]);
}

#[test]
fn every_process_is_killed_once_and_only_what_did_it() {
    let mut node = answering(&rule("p", "\"kill-process\"", "kind = [\"exec.*\"]"));
    let run = |pid: u32, path: &str| {
        let mut fact = exec(at(path), "evil");
        if let Fact::File(FileFact::Executed { process: runner, .. }) = &mut fact {
            *runner = Arc::new(process(pid));
        }
        fact
    };
    for pid in [50, 51, 51, 52] {
        node.see(Source::Gate, run(pid, "/tmp/x"));
    }
    node.see(Source::Gate, run(53, "/tmp/y"));
    let pids =
        ["kill-process c1 50", "kill-process c1 51", "kill-process c1 52", "kill-process c1 53"];
    assert_eq!(asked(&mut node), pids);
    assert_eq!(node.findings.last().unwrap().verdict.disposition.name(), "kill-process");
    // What is written is not executed, and another kind.
    node.play("write c1 /tmp/z other");
    assert_eq!(asked(&mut node), [""; 0]);
    // A process that is known from the kernel's records alone has ended, or may be another.
    let recorded = Process { identity: ProcessIdentity { pid: 54, start_time: 0 }, ..process(54) };
    let mut fact = run(54, "/tmp/x");
    if let Fact::File(FileFact::Executed { process: runner, .. }) = &mut fact {
        *runner = Arc::new(recorded);
    }
    node.see(Source::Gate, fact);
    assert_eq!(asked(&mut node), [""; 0]);
}

#[test]
fn very_many_kills_of_processes_are_few_records_and_none_is_lost() {
    let mut node = answering(&rule("p", "\"kill-process\"", "kind = [\"exec.*\"]"));
    for pid in 1000..2000 {
        let mut fact = exec(at("/tmp/x"), "evil");
        if let Fact::File(FileFact::Executed { process: runner, .. }) = &mut fact {
            *runner = Arc::new(process(pid));
        }
        node.see(Source::Gate, fact);
        node.clock -= 1;
        let request = node.requests.pop().expect("each is killed");
        node.give(became(&request, pid % 10 != 0, pid % 10 == 0));
        node.clock -= 1;
    }
    assert_eq!(node.responses.len(), 1);
    node.wait(20);
    let [first, rest] = &node.responses[..] else { panic!("{:#?}", node.responses) };
    assert!(first.outcome.gone, "the process 1000");
    let message = &rest.outcome.message;
    assert!(
        message.contains("900 more processes killed, 99 had ended before, 0 failed"),
        "{message}"
    );
    assert!(rest.outcome.succeeded);
    let outcome = node.findings.last().unwrap().outcome.clone().unwrap();
    assert!(outcome.message.contains("(900 so far)"), "{outcome:?}");
    node.wait(20);
    assert_eq!(node.responses.len(), 2);
}

#[test]
fn answers_are_carried_out_from_the_weakest_to_the_strongest_and_a_pause_again_after_a_resume() {
    let mut node =
        answering(&rule("all", "\"kill\", \"pause\", \"kill-process\"", "kind = [\"exec.new\"]"));
    node.play("exec c1 /tmp/x evil");
    assert_eq!(asked(&mut node), ["kill-process c1 42", "pause c1", "kill c1"]);
    let verdict = &node.findings.last().unwrap().verdict;
    assert_eq!((verdict.action.as_deref(), verdict.disposition.name()), (Some("kill"), "kill"));

    let mut node = answering(&rule("p", "\"pause\"", "kind = [\"exec.new\"]"));
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/y other");
    let request = node.requests.pop().unwrap();
    assert!(node.requests.is_empty(), "it is being paused");
    node.give(became(&request, true, false));
    // What happened before it was frozen is reported afterwards.
    node.play("exec c1 /tmp/z third");
    assert_eq!(asked(&mut node), [""; 0]);
    // A user resumes it, and it goes on.
    let resume = ResponseRequest { action: Action::Resume, ..request };
    node.give(became(&resume, true, false));
    node.play("exec c1 /tmp/z fourth");
    assert_eq!(asked(&mut node), ["pause c1"]);
}

#[test]
fn a_rule_that_is_stopped_silences_no_other_rule() {
    let broad = rule("a-broad", "\"kill\"", "kind = [\"exec.*\"]");
    let narrow = rule("b-narrow", "\"kill\"", "path = [\"/tmp/miner\"]");
    let mut node = answering(&(broad + &narrow));
    for container in ["c1", "c2", "c3", "c4"] {
        node.play(&format!("exec {container} /tmp/x evil"));
    }
    assert_eq!(asked(&mut node), ["kill c1", "kill c2", "kill c3"]);
    // In a container in which the stopped rule was refused, and in another one.
    node.play("exec c4 /tmp/miner miner\nexec c5 /tmp/miner miner");
    let kills: Vec<String> = node.requests.iter().map(|one| one.requested_by.clone()).collect();
    assert_eq!(kills, ["rule b-narrow"; 2]);
    let verdict = &node.findings.last().unwrap().verdict;
    assert_eq!(verdict.answers.len(), 2, "{verdict:?}");
}

#[test]
fn what_has_done_nothing_stops_no_rule_and_that_others_wait_is_no_failure() {
    let mut node = answering(&rule("p", "\"kill-process\"", "kind = [\"exec.new\"]"));
    for container in ["c1", "c2", "c3", "c4", "c5"] {
        node.play(&format!("exec {container} /tmp/x evil"));
        let request = node.requests.pop().expect("each is asked for");
        node.give(became(&request, false, true));
    }
    assert_eq!(node.state.status().stopped_rules, []);
    let mut fact = exec(at("/tmp/y"), "other");
    if let Fact::File(FileFact::Executed { process: runner, .. }) = &mut fact {
        *runner = Arc::new(process(77));
    }
    node.see(Source::Gate, fact);
    for _ in 0..20 {
        let Some(request) = node.requests.pop() else { break };
        let Input::Response(response) = became(&request, false, false) else { unreachable!() };
        let outcome = model::Outcome { message: TOO_MANY.to_owned(), ..response.outcome };
        node.give(Input::Response(Response { outcome, ..response }));
        node.wait(2);
    }
    assert_eq!(node.requests.len(), 1, "it is asked for again within a second, each time");
}

#[test]
fn after_a_restart_the_containers_of_one_pod_count_as_one() {
    let text = rule("r", "\"kill\"", "kind = [\"exec.*\"]");
    let mut node = answering(&text);
    let mut kept = Vec::new();
    for container in ["c1", "c2", "c3"] {
        node.play(&format!("exec {container} /tmp/x evil"));
        let request = node.requests.pop().unwrap();
        let Input::Response(response) = became(&request, true, false) else { unreachable!() };
        kept.push(Response { pod: Some("shop/web-0".into()), ..response });
    }
    let mut restarted = answering(&text);
    restarted.clock = node.clock;
    restarted.state.remember_answers(kept);
    restarted.play("exec c4 /tmp/x evil");
    assert_eq!(asked(&mut restarted), ["kill c4"]);
}

#[test]
fn dry_run_names_every_answer_and_carries_out_none() {
    let mut node = answering(&rule("all", "\"kill-process\", \"kill\"", "kind = [\"exec.new\"]"));
    node.state.policy.enforce = config::Enforce::DryRun;
    node.play("exec c1 /tmp/x evil");
    assert_eq!(asked(&mut node), [""; 0]);
    let verdict = node.findings.last().unwrap().verdict.clone();
    let answers: Vec<(&str, bool)> =
        verdict.answers.iter().map(|one| (one.action.name(), one.dry_run)).collect();
    assert_eq!(answers, [("kill-process", true), ("kill", true)]);
    assert_eq!((verdict.disposition.name(), verdict.dry_run), ("report", true));
}

#[test]
fn evidence_comes_first_once_for_a_run_and_finding_and_is_recorded_before_and_after() {
    let mut node = answering(&rule("e", "\"kill\", \"evidence\"", "kind = [\"exec.*\"]"));
    node.play("exec c1 /tmp/x evil");
    let [evidence, kill] = &node.requests[..] else { panic!("{:?}", node.requests) };
    assert_eq!((evidence.action, kill.action), (Action::Evidence, Action::Kill));
    let order = evidence.evidence.as_deref().unwrap();
    assert_eq!(order.path.as_ref().map(ToString::to_string).as_deref(), Some("/tmp/x"));
    assert!(order.by_rule && !order.environment && order.process.is_some());
    assert_eq!(evidence.finding, kill.finding);
    let begun = node.responses.last().unwrap();
    assert_eq!(begun.outcome.action, "begin-evidence");
    assert!(begun.outcome.message.contains(&order.case.to_string()), "{begun:?}");
    // Seen again at once: the case has it.
    node.play("exec c1 /tmp/x evil");
    assert_eq!(node.requests.len(), 2);
    // Failed evidence is no reason to try it again, nor to hold back the kill.
    let failed = node.requests[0].failed("the store is full".into());
    node.give(Input::Response(failed));
    node.wait(3600);
    let again = node.requests.iter().filter(|one| one.action == Action::Evidence).count();
    assert_eq!(again, 1);
    assert_eq!(node.responses.last().unwrap().outcome.message, "the store is full");
}

#[test]
fn evidence_changes_nothing_so_a_stopped_rule_takes_it_and_it_counts_for_no_limit() {
    let mut node = answering(&rule("e", "\"evidence\", \"kill\"", "kind = [\"exec.*\"]"));
    for container in ["c1", "c2", "c3", "c4", "c5"] {
        node.play(&format!("exec {container} /tmp/x evil"));
    }
    let asked = asked(&mut node);
    let of = |action: &str| asked.iter().filter(|one| one.starts_with(action)).count();
    assert_eq!((of("evidence"), of("kill")), (5, 3), "{asked:?}");
    // One workload that is attacked again and again has a few cases in a while.
    for number in 0..20 {
        node.play(&format!("exec c1 /tmp/y{number} evil{number}"));
    }
    let of_c1 = node.requests.iter().filter(|one| one.action == Action::Evidence).count();
    assert_eq!(of_c1, 3, "and one before");
    let refused = node.responses.iter().filter(|one| !one.outcome.succeeded);
    let refused: Vec<_> = refused.filter(|one| one.outcome.action == "evidence").collect();
    assert_eq!(refused.len(), 1, "recorded once: {refused:#?}");
    assert!(refused[0].outcome.message.contains("4 cases of container default/c1"));
}

/// A node whose rule runs the hook `h`.
fn hooking(settings: &str) -> Node {
    let text = rule("r", "\"hook\"", "kind = [\"exec.new\"]");
    let text = text.replace("[rule.match]", "hook = \"h\"\n[rule.match]");
    let mut node = answering(&text);
    let config = format!("[hooks.h]\nprogram = \"/bin/true\"\n{settings}");
    let hooks = config::Config::parse(&config).unwrap().hooks;
    node.state.policy.hooks =
        hooks.into_iter().map(|(name, hook)| (name, Arc::new(hook))).collect();
    node
}

/// The end of a hook: whether it has succeeded, and whether it may have changed anything.
fn hook_ended(request: &ResponseRequest, succeeded: bool, changed: bool) -> Input {
    let mut response = request.failed("exit status 0".into());
    (response.outcome.succeeded, response.changed) = (succeeded, changed);
    Input::Response(response)
}

#[test]
fn a_hook_that_may_end_a_container_runs_once_for_its_run_and_counts_as_a_kill() {
    let mut node = hooking("");
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/x evil\nexec c1 /tmp/y other");
    let request = node.requests.pop().unwrap();
    assert!(node.requests.is_empty());
    let hook = request.hook.as_deref().unwrap();
    assert_eq!((hook.name.as_str(), hook.rule.as_deref()), ("h", Some("r")));
    assert_eq!(Some(hook.finding.id), request.finding);
    node.give(hook_ended(&request, true, true));
    assert_eq!(node.findings.last().unwrap().outcome.as_ref().unwrap().action, "hook");
    for container in ["c2", "c3", "c4"] {
        node.play(&format!("exec {container} /tmp/x evil"));
    }
    assert_eq!(asked(&mut node), ["hook c2", "hook c3"]);
    assert_eq!(node.state.status().stopped_rules.len(), 1);
    // A restart changes nothing.
    let mut restarted = hooking("");
    restarted.state.remember_answers(node.responses.clone());
    assert_eq!(restarted.state.status().stopped_rules.len(), 1);
}

#[test]
fn a_hook_that_ends_nothing_runs_once_for_each_finding_and_stops_no_rule() {
    let mut node = hooking("counts = false");
    for container in ["c1", "c2", "c3", "c4", "c5"] {
        node.play(&format!("exec {container} /tmp/x evil\nexec {container} /tmp/x evil"));
    }
    assert_eq!(node.requests.len(), 5);
    let request = node.requests.remove(0);
    node.requests.clear();
    node.give(hook_ended(&request, true, true));
    node.play("exec c1 /tmp/x evil\nexec c1 /tmp/y other");
    assert_eq!(asked(&mut node), ["hook c1"], "the other finding");
    assert_eq!(node.state.status().stopped_rules, []);
    // In the next run it is the same finding.
    node.play("stop c1").init = init(8);
    runs_with(&mut node, 8);
    node.play("exec c1 /tmp/x evil");
    assert_eq!(asked(&mut node), [""; 0]);
}

#[test]
fn a_hook_is_asked_for_again_if_it_has_done_nothing_and_not_if_that_is_unknown() {
    for (changed, again) in [(false, 1), (true, 0)] {
        let mut node = hooking("counts = false");
        node.play("exec c1 /tmp/x evil");
        let request = node.requests.pop().unwrap();
        node.give(hook_ended(&request, false, changed));
        node.wait(1000).play("exec c1 /tmp/x evil");
        assert_eq!(node.requests.len(), again, "{changed}");
        assert_eq!(node.responses.len(), 1, "its failure is recorded");
    }
}

#[test]
fn a_flood_of_findings_asks_for_few_hooks_at_once_and_counts_the_others() {
    let mut node = hooking("counts = false");
    for number in 0..40 {
        node.play(&format!("exec c1 /opt/x{number} evil{number}"));
    }
    assert_eq!(node.requests.len(), 16);
    let refused =
        node.responses.iter().filter(|one| one.outcome.message.contains("too many hooks"));
    assert_eq!(refused.count(), 1, "recorded once in a minute");
    assert!(node.state.health.count(Failure::ResponseQueueFull) >= 20);
    node.play("exec c2 /tmp/x evil");
    assert_eq!(node.requests.len(), 17, "another container has its own room");
}
