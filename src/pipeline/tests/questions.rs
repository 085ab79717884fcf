//! Executions that wait for a decision: what is denied, what is allowed, and what comes of it.

use super::responses::{answering, asked, rule};
use super::*;
use crate::watch::{Decision, Question, Undecided};

impl Node {
    /// The decision about an execution, and nothing else that follows from it.
    fn decide(&mut self, line: &str) -> Decision {
        let Input::Sensor(SensorEvent::Observed(observation)) = self.input(line) else {
            panic!("{line}: no observation")
        };
        let mut effects = Vec::new();
        let question = Question { number: 9, observation };
        let now = Timestamp::from_second(self.clock + 1).unwrap();
        self.state.handle(Input::Question(Box::new(question)), now, &mut effects);
        match effects[..] {
            [Effect::Decide { number: 9, decision }] => decision,
            ref other => panic!("{other:?}"),
        }
    }

    /// The kernel has refused an execution.
    fn was_denied(&mut self, line: &str) {
        let Input::Sensor(SensorEvent::Observed(mut observation)) = self.input(line) else {
            panic!("{line}: no observation")
        };
        observation.set_denied();
        self.give(Input::Sensor(SensorEvent::Observed(observation)));
    }

    /// Whether the executions of a container wait, by the last command about it.
    fn waits(&self, container: &str) -> Option<Option<Undecided>> {
        self.commands.iter().rev().find_map(|command| match command {
            SensorCommand::Enforce { container: of, undecided } if *of == id(container) => {
                Some(*undecided)
            }
            _ => None,
        })
    }
}

fn denying(conditions: &str) -> Node {
    answering(&rule("no", "\"deny\"", conditions))
}

#[test]
fn what_a_rule_denies_is_denied_and_reported_with_its_number_when_the_kernel_has_refused_it() {
    let mut node = denying("kind = [\"exec.*\"]\npath = [\"/tmp/**\"]");
    assert_eq!(node.decide("exec c1 /tmp/x evil"), Decision::Deny);
    assert_eq!(node.decide("exec c1 /opt/x evil"), Decision::Allow);
    assert!(node.findings.is_empty() && node.responses.is_empty(), "nothing has happened yet");
    for _ in 0..3 {
        node.was_denied("exec c1 /tmp/x evil");
    }
    assert_eq!(asked(&mut node), [""; 0]);
    let finding = node.findings.last().unwrap();
    assert_eq!((finding.kind, finding.count), (Kind::ExecNew, 3));
    assert_eq!(finding.verdict.disposition.name(), "deny");
    let outcome = finding.outcome.as_ref().unwrap();
    assert_eq!(outcome.action, "deny");
    assert!(outcome.message.contains("EPERM") && outcome.message.contains("(3 so far)"));
    // One record at once, and one of the rest.
    assert_eq!(node.responses.len(), 1);
    node.wait(20);
    assert_eq!(node.responses.len(), 2);
    assert!(node.responses[1].outcome.message.contains("2 more executions denied"));
    assert_eq!(node.responses[1].requested_by, "rule no");
}

#[test]
fn what_runs_although_a_rule_denies_it_is_killed_and_what_is_written_is_not_answered() {
    let mut node = denying("severity = \">=low\"");
    node.play("exec c1 /tmp/x evil");
    assert_eq!(asked(&mut node), ["kill-process c1 42"]);
    node.play("write c1 /tmp/y other");
    assert_eq!(asked(&mut node), [""; 0]);
    assert!(node.findings.last().unwrap().verdict.answers.is_empty());
}

#[test]
fn an_exception_and_a_rehearsal_deny_nothing() {
    let accepted = rule("no", "\"deny\"", "kind = [\"exec.*\"]")
        + "[[rule]]\nid = \"yes\"\nreason = \"r\"\neffect = \"accept\"\nexpires = \"never\"\n\
           [rule.match]\npath = [\"/opt/**\"]\n";
    let mut node = answering(&accepted);
    assert_eq!(node.decide("exec c1 /opt/x evil"), Decision::Allow);
    assert_eq!(node.decide("exec c1 /tmp/x evil"), Decision::Deny);
    for (enforce, expected) in [
        (config::Enforce::On, Decision::Deny),
        (config::Enforce::DryRun, Decision::Allow),
        (config::Enforce::Off, Decision::Allow),
    ] {
        let mut node = denying("kind = [\"exec.*\"]");
        node.state.policy.enforce = enforce;
        assert_eq!(node.decide("exec c1 /tmp/x evil"), expected, "{enforce:?}");
    }
}

#[test]
fn the_reading_of_a_script_or_a_library_is_decided_like_an_execution() {
    for (rule, script, library) in [
        ("kind = [\"exec.interpreted\"]", Decision::Deny, Decision::Allow),
        ("kind = [\"library.*\"]", Decision::Allow, Decision::Deny),
        ("kind = [\"exec.new\"]", Decision::Allow, Decision::Allow),
        ("severity = \">=medium\"", Decision::Deny, Decision::Deny),
    ] {
        let mut node = denying(rule);
        assert_eq!(node.decide("interpret c1 /tmp/x evil"), script, "{rule}");
        assert_eq!(node.decide("load c1 /tmp/x evil"), library, "{rule}");
    }
    let mut node = denying("severity = \">=medium\"");
    node.was_denied("interpret c1 /tmp/x evil");
    node.was_denied("load c1 /tmp/y evil");
    assert_eq!(asked(&mut node), [""; 0], "what was denied is not killed");
    let kinds: Vec<Kind> = node.newest().iter().map(|finding| finding.kind).collect();
    assert_eq!(kinds, [Kind::ExecInterpreted, Kind::LibraryLoaded]);
    for finding in node.newest() {
        assert_eq!(finding.outcome.as_ref().unwrap().action, "deny");
    }
}

#[test]
fn a_script_whose_execution_was_denied_is_still_denied_to_an_interpreter() {
    let mut node = denying("kind = [\"exec.*\"]");
    let script = |node: &Node| {
        let mut input = node.input("exec c1 /tmp/x evil");
        if let Input::Sensor(SensorEvent::Observed(observation)) = &mut input
            && let Fact::File(FileFact::Executed { state, .. }) = &mut observation.fact
        {
            state.format = Format::Script;
            observation.set_denied();
        }
        input
    };
    let denied = script(&node);
    node.give(denied);
    assert_eq!(node.decide("interpret c1 /tmp/x evil"), Decision::Deny);
    // Where it ran nevertheless, its process is killed.
    node.play("interpret c1 /tmp/x evil");
    assert_eq!(asked(&mut node), ["kill-process c1 42"]);
}

#[test]
fn without_a_baseline_the_setting_decides() {
    for (on_unknown, expected) in [(false, Decision::Allow), (true, Decision::Deny)] {
        let mut node = denying("kind = [\"exec.*\"]");
        node.state.policy.deny.on_unknown = on_unknown;
        // The seventh container is not known at all.
        assert_eq!(node.decide("exec c7 /tmp/x evil"), expected);
        assert_eq!(node.decide("exec c1 /tmp/x evil"), Decision::Deny);
    }
}

#[test]
fn executions_wait_only_where_a_rule_may_deny_and_follow_the_rules_in_force() {
    let node = denying("kind = [\"exec.*\"]\ncontainer = [\"c2\"]");
    let undecided = Undecided {
        after: node.state.policy.deny.deadline,
        deny: node.state.policy.deny.on_timeout,
    };
    assert_eq!(node.waits("c2"), Some(Some(undecided)));
    assert_eq!(node.waits("c1"), None, "nothing was ever sent");
    // Another condition may hold for what is not known yet.
    let mut node = denying("kind = [\"exec.*\"]\npath = [\"/tmp/**\"]\nuser = [0]");
    assert_eq!(node.waits("c1"), Some(Some(undecided)));
    let policy = Policy { enforce: config::Enforce::DryRun, ..node.state.policy.clone() };
    node.give(Input::Request(ApiRequest::SetPolicy(Box::new(policy))));
    assert_eq!(node.waits("c1"), Some(None));
    let sent = node.commands.len();
    let policy = Box::new(node.state.policy.clone());
    node.give(Input::Request(ApiRequest::SetPolicy(policy)));
    assert_eq!(node.commands.len(), sent, "nothing has changed");
}

#[test]
fn a_container_may_report_only_or_enforce_where_the_node_allows_that() {
    let mut node = denying("kind = [\"exec.*\"]");
    let label = |node: &mut Node, mode: &str| {
        let mut container = container("c1", Some(7));
        let mode = ("driftd.io/mode".to_owned(), mode.to_owned());
        container.labels = std::collections::BTreeMap::from([mode]).into();
        node.give(Input::Runtime(RuntimeEvent::Container(Box::new(container))));
    };
    label(&mut node, "report");
    assert_eq!(node.decide("exec c1 /tmp/x evil"), Decision::Deny, "labels do not count");
    node.state.policy.container_modes = vec![config::ContainerMode::Report];
    assert_eq!(node.decide("exec c1 /tmp/x evil"), Decision::Allow);
    assert_eq!(node.decide("exec c2 /tmp/x evil"), Decision::Deny);
    label(&mut node, "enforce");
    node.state.policy.enforce = config::Enforce::DryRun;
    assert_eq!(node.decide("exec c1 /tmp/x evil"), Decision::Allow, "only `report` is allowed");
    node.state.policy.container_modes.push(config::ContainerMode::Enforce);
    assert_eq!(node.decide("exec c1 /tmp/x evil"), Decision::Deny);
    node.state.policy.enforce = config::Enforce::Off;
    assert_eq!(node.decide("exec c1 /tmp/x evil"), Decision::Allow);
}

#[test]
fn denials_end_nothing_and_stop_no_rule() {
    let mut node = answering(&rule("no", "\"deny\"", "kind = [\"exec.*\"]"));
    for number in 1..=5 {
        node.was_denied(&format!("exec c{number} /tmp/x evil"));
    }
    assert!(node.state.status().stopped_rules.is_empty());
    let responses = std::mem::take(&mut node.responses);
    assert_eq!(responses.len(), 5);
    let mut restarted = denying("kind = [\"exec.*\"]");
    restarted.state.remember_answers(responses);
    restarted.play("exec c1 /tmp/x evil\nexec c2 /tmp/x evil\nexec c3 /tmp/x evil");
    assert_eq!(asked(&mut restarted).len(), 3);
}

#[test]
fn the_finding_of_a_denial_names_what_ran_instead_once() {
    let mut node = denying("kind = [\"exec.*\"]");
    let instead = |denied: &str, instead: &str| {
        let (denied, instead) = (at(denied), instead.to_owned());
        Input::Sensor(SensorEvent::RanInstead { container: id("c1"), denied, instead })
    };
    node.give(instead("/opt/bin/ls", "/bin/ls"));
    assert!(node.findings.is_empty());
    node.was_denied("exec c1 /opt/bin/ls evil");
    let before = node.findings.len();
    node.give(instead("/opt/bin/other", "/bin/other"));
    assert_eq!(node.findings.len(), before);
    node.give(instead("/opt/bin/ls", "/bin/ls"));
    node.give(instead("/opt/bin/ls", "/sbin/ls"));
    assert_eq!(node.findings.len(), before + 1);
    let detail = node.findings.last().unwrap().detail.clone();
    assert_eq!(detail.as_deref(), Some("after the denial, the process ran `/bin/ls` instead"));
}
