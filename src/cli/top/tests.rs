//! The state and the view of `driftd top`, by value: inputs go in, effects and a screen come out.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use jiff::{Timestamp, ToSpan as _};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::Color;

use super::known::{Feed, KEPT};
use super::message::{Answered, Effect, Followed, Input, Node, Poll, Wish};
use super::size::Size;
use super::state::{Pane, State};
use super::view;
use crate::api::{convert, proto};
use crate::cli::containers::container_json;
use crate::cli::findings::tests::samples as findings;
use crate::cli::sessions::tests::{assert_clean, samples as sessions};
use crate::cli::status::status_json;
use crate::model::{ContainerId, Finding, FindingId, Incarnation, Session, Severity};

const NOW: &str = "2026-11-20T10:08:30Z";
const WEB: &str = "4f1c0a9be2d7c3f8a5b60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn state() -> State {
    State::new(Size { width: 100, height: 30 }, now(), None)
}

/// A container with as many critical findings.
fn container(id: &str, critical: u64) -> proto::Container {
    let count = |severity: proto::Severity, count| proto::SeverityCount {
        severity: severity.into(),
        count,
    };
    proto::Container {
        namespace: "default".into(),
        id: id.into(),
        image: Some(proto::Image { name: "shop:1.4".into(), ..Default::default() }),
        pid: 4242,
        baseline: "ready".into(),
        watched: true,
        findings: critical,
        findings_by_severity: (critical > 0)
            .then(|| count(proto::Severity::Critical, critical))
            .into_iter()
            .collect(),
        ..Default::default()
    }
}

fn status() -> proto::GetStatusResponse {
    proto::GetStatusResponse {
        version: "0.1.0".into(),
        node: "node-1".into(),
        started_at: Some(convert::time_to_proto(now() - 3.hours())),
        complete: true,
        containers_watched: 2,
        findings: 3,
        gate_answers: 1000,
        gate: Some(proto::Gate { mode: "ask".into(), ..Default::default() }),
        ..Default::default()
    }
}

fn gap(container: &str, until: Option<Timestamp>) -> proto::Gap {
    proto::Gap {
        name: "trace_lost".into(),
        at: Some(convert::time_to_proto(now() - 2.minutes())),
        namespace: if container.is_empty() { "" } else { "default" }.into(),
        container: container.into(),
        detail: "the kernel\u{1b}[2J dropped records".into(),
        until: until.map(convert::time_to_proto),
    }
}

fn poll(status: proto::GetStatusResponse, containers: Vec<proto::Container>) -> Box<Poll> {
    Box::new(Poll {
        at: Instant::now(),
        status: status_json(status).unwrap(),
        node: Ok(Node {
            containers: containers.into_iter().map(|one| container_json(one).unwrap()).collect(),
            sessions: Vec::new(),
            more_sessions: false,
        }),
    })
}

/// A state that has everything: also texts that drive a terminal, in every place.
fn full() -> State {
    let mut state = state();
    let [modified, session, hostile]: [Finding; 3] = findings().try_into().unwrap();
    let evil = "web\u{1b}[31m";
    let mut stopped = container(evil, 0);
    (stopped.pid, stopped.watched) = (0, false);
    stopped.image = Some(proto::Image { name: "\u{202e}evil\n:1".into(), ..Default::default() });
    let mut unwatched = container("pay", 0);
    (unwatched.watched, unwatched.problem) = (false, "no marks".into());
    let mut old = container("old", 0);
    (old.findings, old.baseline) = (7, "none: not an overlay".into());
    let mut lossy = status();
    (lossy.complete, lossy.problems) = (
        false,
        vec![
            "the view of container default/web is incomplete since 10:06 (trace_lost): \u{1b}[2J"
                .into(),
            "not connected to /run/a.sock: refused".into(),
        ],
    );
    lossy.losses = vec![proto::Loss { name: "trace_lost".into(), count: 3 }];
    lossy.gaps = vec![gap("web", None), gap("", Some(now() - 1.minutes()))];
    let containers = vec![stopped, container("web", 0), old, unwatched, container(WEB, 12)];
    let mut poll = poll(lossy, containers);
    let [_, mut open, mut hidden]: [Session; 3] = sessions().try_into().unwrap();
    open.container.id = ContainerId::new("default", "web");
    hidden.container.id = ContainerId::new("default", evil);
    poll.node.as_mut().unwrap().sessions = vec![open, hidden];
    state.handle(Input::Polled(Ok(poll)));
    let listed = Followed::Listed(vec![session, hostile, modified], false);
    state.handle(Input::Followed(0, listed));
    state
}

fn screen_of(state: &State, colour: bool) -> Terminal<TestBackend> {
    let Size { width, height } = state.size;
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view::draw(state, colour, frame)).unwrap();
    terminal
}

fn shown(state: &State) -> String {
    let terminal = screen_of(state, false);
    let buffer = terminal.backend().buffer();
    let width = usize::from(state.size.width);
    let lines = buffer.content().chunks(width).map(|line| {
        let line: String = line.iter().map(ratatui::buffer::Cell::symbol).collect();
        line.trim_end().to_owned() + "\n"
    });
    let text: String = lines.collect();
    assert_clean(&text);
    text
}

fn press(state: &mut State, code: KeyCode) -> Option<Effect> {
    state.handle(Input::Key(KeyEvent::new(code, KeyModifiers::NONE)))
}

fn key(state: &mut State, character: char) -> Option<Effect> {
    press(state, KeyCode::Char(character))
}

/// Types a line and presses Enter; no key of it may have an effect but the last.
#[track_caller]
fn enter(state: &mut State, text: &str) -> Option<Effect> {
    for character in text.chars() {
        assert_eq!(key(state, character), None);
    }
    press(state, KeyCode::Enter)
}

fn numbered(number: u8, seconds: i64) -> Finding {
    let mut finding = findings().remove(0);
    finding.id = FindingId([number; 16]);
    finding.last_seen = now() - seconds.seconds();
    finding
}

fn ids(state: &State) -> Vec<u8> {
    state.known.findings().iter().map(|one| one.id.0[0]).collect()
}

#[test]
fn everything_is_shown_and_nothing_of_it_drives_the_terminal() {
    let mut state = full();
    insta::assert_snapshot!("whole", shown(&state));
    state.handle(Input::Resized { width: 80, height: 24 });
    insta::assert_snapshot!("smallest", shown(&state));
    for focus in [Pane::Containers, Pane::Sessions, Pane::Losses] {
        state.focus = focus;
        assert_clean(&shown(&state));
    }
    press(&mut state, KeyCode::Enter);
    assert_eq!(key(&mut state, '?'), None);
    let help = shown(&state);
    assert!(help.contains("OVER  was lost before"), "all of it fits: {help}");
    insta::assert_snapshot!("help", help);
    assert_eq!(key(&mut state, 'k'), None);
    assert!(!state.help && state.question.is_none());
    assert!(shown(&state).contains("[Loss trace_lost"), "what was open before is open again");
    // Any size is drawn, and too small ones say so.
    for (width, height) in [(79, 24), (80, 23), (60, 200)] {
        state.handle(Input::Resized { width, height });
        assert!(shown(&state).starts_with("driftd top needs 80x24; this is"));
    }
    for (width, height) in [(0, 0), (1, 1), (300, 90), (1000, 24)] {
        state.handle(Input::Resized { width, height });
        screen_of(&state, true);
    }
}

#[test]
fn before_anything_has_come_nothing_is_claimed() {
    let mut state = state();
    insta::assert_snapshot!("waiting", shown(&state));
    state.handle(Input::Polled(Err("cannot reach driftd at /run/x\u{1b}[2J".into())));
    state.handle(Input::Followed(0, Followed::Lost("cannot reach driftd".into())));
    let text = shown(&state);
    let lost = "NOT CONNECTED for 0s: cannot reach driftd at /run/x\\u{1b}[2J";
    assert!(text.contains(lost) && text.contains("View UNKNOWN"), "{text}");
    assert!(text.contains("not known: driftd does not answer"), "{text}");
    assert!(!text.contains("nothing was found") && !text.contains("complete:"), "{text}");
    state.handle(Input::Polled(Ok(poll(status(), vec![]))));
    state.handle(Input::Followed(0, Followed::Listed(vec![], false)));
    let text = shown(&state);
    assert!(text.contains("View complete") && text.contains("nothing was found"), "{text}");
    assert!(text.contains("there is none") && text.contains("none is open"), "{text}");
}

#[test]
fn a_daemon_that_restarts_is_missed_and_what_was_known_stays_marked_as_such() {
    let mut state = full();
    let later = now() + 12.seconds();
    state.handle(Input::Polled(Err("cannot reach driftd".into())));
    state.handle(Input::Followed(0, Followed::Lost("driftd has ended the stream".into())));
    // A finding of a stream that has ended would be one of another connection.
    state.handle(Input::Time(later));
    let text = shown(&state);
    assert!(text.contains("View UNKNOWN"), "{text}");
    assert!(text.contains("NOT CONNECTED for 12s: cannot reach driftd"), "{text}");
    assert!(text.contains("/usr/bin/curl"), "{text}");
    let mut renewed = status();
    renewed.started_at = Some(convert::time_to_proto(later));
    state.handle(Input::Polled(Ok(poll(renewed, vec![]))));
    assert!(matches!(state.known.followed, Feed::Lost { .. }));
    let text = shown(&state);
    let findings = "FINDINGS NOT CURRENT for 12s: driftd has ended the stream";
    assert!(text.contains(findings) && text.contains("View complete"), "{text}");
    state.handle(Input::Followed(0, Followed::Listed(vec![numbered(9, 0)], false)));
    let text = shown(&state);
    assert!(text.contains("driftd is back after 12s: it was started anew"), "{text}");
    assert!(!text.contains("NOT C"), "{text}");
    assert_eq!(ids(&state), [9], "only what the history holds now");
}

#[test]
fn a_daemon_that_is_stuck_is_no_other_daemon_and_its_status_is_shown() {
    let mut state = full();
    let containers = state.known.containers().len();
    let mut stuck = status();
    stuck.started_at = Some(convert::time_to_proto(now()));
    (stuck.complete, stuck.problems) = (false, vec!["the pipeline has not answered".into()]);
    let mut poll_of_stuck = poll(stuck, vec![]);
    poll_of_stuck.node = Err("driftd is busy".into());
    state.handle(Input::Polled(Ok(poll_of_stuck)));
    let text = shown(&state);
    assert!(text.contains("CONTAINERS NOT CURRENT for 0s: driftd is busy"), "{text}");
    assert!(text.contains("the pipeline has not answered"), "{text}");
    assert_eq!((state.known.containers().len(), state.known.rate()), (containers, None));
    state.handle(Input::Polled(Ok(poll(status(), vec![]))));
    assert_eq!(state.note, None, "it was the same daemon all the time");
    assert!(!shown(&state).contains("NOT CURRENT"));
}

#[test]
fn the_gates_rate_needs_two_counts_of_one_daemon() {
    let mut state = state();
    let begin = Instant::now();
    let mut give = |milliseconds, answers, started: Timestamp| {
        let mut status = status();
        (status.gate_answers, status.started_at) = (answers, Some(convert::time_to_proto(started)));
        let mut poll = poll(status, vec![]);
        poll.at = begin + Duration::from_millis(milliseconds);
        state.handle(Input::Polled(Ok(poll)));
        state.known.rate()
    };
    let (first, second) = (now() - 3.hours(), now());
    assert_eq!(give(0, 1000, first), None);
    assert_eq!(give(2000, 1025, first), Some(12.5));
    assert_eq!(give(3000, 1025, first), Some(0.0));
    assert_eq!(give(3010, 1026, first), None, "too short a time says nothing");
    assert_eq!(give(4000, 5, second), None, "another daemon counts from 0");
    assert_eq!(give(5000, 4, second), None, "a count never falls");
    assert_eq!(give(6000, 14, second), Some(10.0));
    state.handle(Input::Polled(Err("gone".into())));
    assert_eq!(state.known.rate(), None);
}

#[test]
fn findings_are_the_newest_of_the_list_and_the_stream_and_each_once() {
    let mut state = state();
    let give = |state: &mut State, finding| {
        state.handle(Input::Followed(0, Followed::Finding(Box::new(finding))))
    };
    give(&mut state, numbered(1, 0));
    assert!(!state.known.has_findings(), "the stream alone is no list");
    let listed = vec![numbered(3, 30), numbered(2, 20), numbered(1, 10)];
    state.handle(Input::Followed(0, Followed::Listed(listed, false)));
    assert_eq!(ids(&state), [1, 2, 3]);
    // A new revision moves up; an older one, which the list has overtaken, is nothing.
    give(&mut state, Finding { revision: 3, count: 9, ..numbered(3, 5) });
    give(&mut state, Finding { revision: 1, ..numbered(2, 0) });
    give(&mut state, numbered(4, 7));
    assert_eq!(ids(&state), [3, 4, 1, 2]);
    assert_eq!(state.known.findings()[0].count, 9);
    // What comes for an earlier wish is not shown under the newer one.
    let Some(Effect::Follow(wish)) = key(&mut state, 's') else { panic!("no wish") };
    assert_eq!(wish, Wish { number: 1, floor: Some(Severity::Low), ..Wish::default() });
    give(&mut state, numbered(5, 0));
    state.handle(Input::Followed(0, Followed::Listed(vec![numbered(6, 0)], false)));
    assert!(!state.known.has_findings());
    assert!(shown(&state).contains("Findings, low and above"));
    state.handle(Input::Followed(1, Followed::Listed(vec![numbered(7, 0)], true)));
    assert_eq!(ids(&state), [7]);
    assert!(shown(&state).contains("Findings, low and above, the newest"));
}

#[test]
fn the_findings_that_are_kept_are_bounded() {
    let mut state = state();
    state.handle(Input::Followed(0, Followed::Listed(vec![], false)));
    for number in 0..KEPT + 50 {
        let mut finding = numbered(1, 0);
        finding.id.0[..8].copy_from_slice(&number.to_be_bytes());
        finding.last_seen = now() + i64::try_from(number).unwrap().seconds();
        state.handle(Input::Followed(0, Followed::Finding(Box::new(finding))));
    }
    assert_eq!(state.known.findings().len(), KEPT);
    assert!(state.known.has_more_findings());
    let oldest = state.known.findings().last().unwrap();
    assert_eq!(oldest.last_seen, now() + 50.seconds());
}

#[test]
fn a_chosen_finding_stays_chosen_and_the_first_line_stays_the_newest() {
    let mut state = state();
    let listed = vec![numbered(1, 10), numbered(2, 20), numbered(3, 30)];
    state.handle(Input::Followed(0, Followed::Listed(listed, false)));
    let give = |state: &mut State, finding| {
        state.handle(Input::Followed(0, Followed::Finding(Box::new(finding))))
    };
    give(&mut state, numbered(4, 5));
    assert_eq!(state.chosen(Pane::Findings), 0, "it follows the newest");
    press(&mut state, KeyCode::Down);
    press(&mut state, KeyCode::Down);
    assert_eq!((state.chosen(Pane::Findings), ids(&state)[2]), (2, 2));
    give(&mut state, numbered(5, 0));
    assert_eq!((state.chosen(Pane::Findings), ids(&state)[3]), (3, 2));
    let opened = press(&mut state, KeyCode::Enter);
    assert_eq!(opened, Some(Effect::Show(FindingId([2; 16]).to_string())));
    press(&mut state, KeyCode::Esc);
    press(&mut state, KeyCode::Home);
    give(&mut state, numbered(6, 0));
    assert_eq!(state.chosen(Pane::Findings), 0);
    press(&mut state, KeyCode::End);
    assert_eq!(state.chosen(Pane::Findings), 5);
    state.handle(Input::Followed(0, Followed::Listed(vec![numbered(9, 0)], false)));
    assert_eq!(state.chosen(Pane::Findings), 0, "what was chosen has gone");
}

#[test]
fn panes_are_reached_by_tab_and_a_containers_findings_by_enter() {
    let mut state = full();
    let mut focus = |code| {
        press(&mut state, code);
        state.focus
    };
    assert_eq!(focus(KeyCode::Tab), Pane::Sessions);
    assert_eq!(focus(KeyCode::Right), Pane::Losses);
    assert_eq!(focus(KeyCode::Tab), Pane::Containers);
    assert_eq!(focus(KeyCode::BackTab), Pane::Losses);
    assert_eq!(press(&mut state, KeyCode::Enter), None, "a loss is known whole");
    let text = shown(&state);
    assert!(text.contains("[Loss trace_lost (Esc closes)]"), "{text}");
    assert!(text.contains("the view of container default/web is incomplete since 10:06"), "{text}");
    assert_eq!(key(&mut state, 'k'), None);
    assert!(state.question.is_none());
    press(&mut state, KeyCode::Esc);
    press(&mut state, KeyCode::Esc);
    press(&mut state, KeyCode::Tab);
    // The first one has the most severe findings.
    let container = format!("default/{WEB}");
    let wish = Wish { number: 1, container, ..Wish::default() };
    assert_eq!(press(&mut state, KeyCode::Enter), Some(Effect::Follow(wish)));
    assert_eq!(state.focus, Pane::Findings);
    assert!(shown(&state).contains(&format!("Findings, of default/{}", &WEB[..8])));
    let all = Wish { number: 2, ..Wish::default() };
    assert_eq!(press(&mut state, KeyCode::Esc), Some(Effect::Follow(all)));
    assert_eq!(press(&mut state, KeyCode::Esc), None);
}

#[test]
fn the_chosen_loss_stays_chosen_although_its_count_changes() {
    let mut state = full();
    state.focus = Pane::Losses;
    let mut lossy = status();
    lossy.problems = vec!["delayed by 11s".into(), "delayed by 11s".into()];
    let mut chosen = |count| {
        lossy.losses = vec![proto::Loss { name: "trace_lost".into(), count }];
        state.handle(Input::Polled(Ok(poll(lossy.clone(), vec![]))));
        press(&mut state, KeyCode::Down);
        state.chosen(Pane::Losses)
    };
    assert_eq!((chosen(1), chosen(2), chosen(3)), (1, 2, 2));
}

#[test]
fn a_gap_whose_cause_is_over_is_not_over_before_the_daemon_says_so() {
    let mut state = state();
    let mut lossy = status();
    lossy.gaps = vec![gap("web", Some(now())), gap("pay", Some(now()))];
    let since = now() - 2.minutes();
    lossy.problems = vec![format!(
        "the view of container default/web is incomplete since {since} (trace_lost): lost"
    )];
    state.handle(Input::Polled(Ok(poll(lossy, vec![]))));
    let lines: Vec<(&str, bool)> = state
        .known
        .losses()
        .into_iter()
        .map(|line| (line.state, line.text.contains("default/web")))
        .collect();
    assert_eq!(lines, [("NOW", true), ("OVER", false)]);
}

#[test]
fn a_filter_is_typed_and_selects_findings_at_the_daemon_and_the_rest_here() {
    let mut state = full();
    key(&mut state, '/');
    // These are no commands while a text is typed.
    assert_eq!(
        enter(&mut state, "qkx"),
        Some(Effect::Follow(Wish { number: 1, text: "qkx".into(), ..Wish::default() }))
    );
    assert!(state.question.is_none());
    assert!(state.known.containers().is_empty() && state.known.sessions().is_empty());
    state.handle(Input::Followed(1, Followed::Listed(vec![], false)));
    let text = shown(&state);
    assert!(text.contains("none holds the text"), "{text}");
    assert!(text.contains("nothing that is asked for was found"), "{text}");
    assert!(text.contains("none that is open holds the text"), "{text}");
    key(&mut state, '/');
    state.handle(Input::Pasted("\u{1b}[2J\n".into()));
    let text = shown(&state);
    assert!(text.contains("that hold: qkx[2J"), "{text}");
    assert_eq!(press(&mut state, KeyCode::Esc), None);
    assert_eq!(state.known.wish().text, "qkx", "Escape leaves it as it was");
    key(&mut state, '/');
    state.handle(Input::Key(KeyEvent::new(KeyCode::Char('u'), KeyModifiers::CONTROL)));
    let Some(Effect::Follow(wish)) = enter(&mut state, "PAY") else { panic!("no wish") };
    assert_eq!(wish.to_proto().texts, ["PAY"]);
    let names: Vec<_> = state.known.containers().iter().map(|one| one.id.to_string()).collect();
    assert_eq!(names, ["default/pay"]);
    assert_eq!(Wish::default().to_proto(), proto::FindingFilter::default());
}

#[test]
fn the_floor_rises_by_one_and_falls_to_none() {
    let mut state = state();
    let floors: Vec<Option<Severity>> = (0..5)
        .map(|_| {
            key(&mut state, 's');
            state.known.wish().floor
        })
        .collect();
    let [low, medium, high, critical] =
        [Severity::Low, Severity::Medium, Severity::High, Severity::Critical];
    assert_eq!(floors, [Some(low), Some(medium), Some(high), Some(critical), None]);
}

#[test]
fn a_finding_is_shown_whole_and_scrolled() {
    let mut state = full();
    state.handle(Input::Resized { width: 80, height: 24 });
    let Some(Effect::Show(id)) = press(&mut state, KeyCode::Enter) else { panic!("not opened") };
    assert!(shown(&state).contains("reading…"));
    let lines: String = (1..=40).map(|number| format!("line {number} \u{1b}[2J\n")).collect();
    state.handle(Input::Shown("another".into(), Ok("not this".into())));
    state.handle(Input::Shown(id.clone(), Ok(lines)));
    insta::assert_snapshot!("opened", shown(&state));
    for _ in 0..100 {
        press(&mut state, KeyCode::PageDown);
    }
    let text = shown(&state);
    assert!(text.contains("line 40 ") && text.contains("lines 22-40 of 40"), "{text}");
    press(&mut state, KeyCode::Up);
    assert!(shown(&state).contains("lines 21-39 of 40"));
    press(&mut state, KeyCode::Home);
    assert!(shown(&state).contains("lines 1-19 of 40"));
    // A larger terminal leaves no empty lines behind the last one.
    press(&mut state, KeyCode::End);
    state.handle(Input::Resized { width: 80, height: 100 });
    assert!(shown(&state).contains("line 1 "));
    // It is read again when it has changed.
    let mut changed = state.known.findings()[0].clone();
    changed.revision += 1;
    let changed = Input::Followed(0, Followed::Finding(Box::new(changed)));
    assert_eq!(state.handle(changed), Some(Effect::Show(id.clone())));
    state.handle(Input::Shown(id, Err("no finding \u{1b}[2J".into())));
    assert!(shown(&state).contains("no finding"));
    press(&mut state, KeyCode::Esc);
    assert!(state.opened.is_none());
    assert_eq!(key(&mut state, 'q'), Some(Effect::Quit));
}

#[test]
fn nothing_is_answered_without_the_word_and_a_reason() {
    let mut state = full();
    let at = state.known.findings().iter().position(|one| one.file.is_some()).unwrap();
    (0..at).for_each(|_| drop(press(&mut state, KeyCode::Down)));
    let finding = state.known.findings()[at].clone();
    for (wrong, end) in
        [("y", KeyCode::Enter), ("4f1c0a9be2d", KeyCode::Enter), ("4f1c0a9be2d7", KeyCode::Esc)]
    {
        assert_eq!(key(&mut state, 'k'), None);
        assert!(state.question.is_some());
        for character in wrong.chars() {
            assert_eq!(key(&mut state, character), None);
        }
        assert_eq!(press(&mut state, end), None);
        assert!(state.question.is_none(), "{wrong}");
        assert!(shown(&state).contains("nothing was done"), "{wrong}");
    }
    key(&mut state, 'k');
    insta::assert_snapshot!("question", shown(&state));
    assert_eq!(enter(&mut state, "4f1c0a9be2d7"), None);
    assert_eq!(press(&mut state, KeyCode::Enter), None, "a reason is missing");
    for character in "a miner".chars() {
        key(&mut state, character);
    }
    insta::assert_snapshot!("reason", shown(&state));
    let expected = proto::RespondRequest {
        finding: finding.id.to_string(),
        action: proto::Action::Kill.into(),
        reason: "a miner".into(),
        ..Default::default()
    };
    let sent = press(&mut state, KeyCode::Enter);
    assert_eq!(sent, Some(Effect::Respond(Box::new(expected))));
    assert!(shown(&state).contains("driftd is asked for it"));
    assert_eq!(press(&mut state, KeyCode::Enter), Some(Effect::Show(finding.id.to_string())));
    assert_eq!(key(&mut state, 'q'), None);
    assert!(shown(&state).contains("! driftd has not answered yet: once more quits"));
    let text = "kill k8s.io/4f1c: done: killed".to_owned();
    state.handle(Input::Answered(Ok(Answered { succeeded: true, text: text.clone() })));
    assert!(shown(&state).contains(&text));
    // The daemon's words are shown whole, and escaped.
    let refused = "this client may read, and may not respond to anything on this node: only root \
                   and members of the group driftd may do that (uid 1000\u{1b}[2J), and now it ends";
    state.handle(Input::Answered(Err(refused.into())));
    insta::assert_snapshot!("refused", shown(&state));
    assert_eq!(key(&mut state, 'q'), Some(Effect::Quit), "there is an outcome");
    key(&mut state, 'k');
    enter(&mut state, "4f1c0a9be2d7");
    assert!(matches!(enter(&mut state, "again"), Some(Effect::Respond(_))));
    assert_eq!((key(&mut state, 'q'), key(&mut state, 'q')), (None, Some(Effect::Quit)));
}

#[test]
fn each_key_asks_for_its_own_action_and_for_what_is_chosen() {
    let mut state = full();
    let mut asked = |focus, character| {
        state.focus = focus;
        (state.question, state.note) = (None, None);
        assert_eq!(key(&mut state, character), None);
        let name = |id: &ContainerId| id.to_string().chars().take(12).collect::<String>();
        match &state.question {
            Some(question) => {
                format!("{} {}", question.action().name(), name(&question.target().container))
            }
            None => state.note.clone().unwrap().text,
        }
    };
    assert_eq!(asked(Pane::Containers, 'p'), "pause default/4f1c");
    assert_eq!(asked(Pane::Containers, 'r'), "resume default/4f1c");
    assert_eq!(asked(Pane::Containers, 'k'), "kill default/4f1c");
    let no_process = "choose a finding that names a process: x kills that process";
    assert_eq!(asked(Pane::Containers, 'x'), no_process);
    assert_eq!(asked(Pane::Sessions, 'x'), no_process);
    assert_eq!(
        asked(Pane::Sessions, 'k'),
        "no finding names this session's run: choose the container"
    );
    assert_eq!(asked(Pane::Findings, 'x'), "kill-process k8s.io/4f1c0");
    let nothing = "choose a container, a finding or a session first";
    assert_eq!(asked(Pane::Losses, 'k'), nothing);
    let mut empty = self::state();
    key(&mut empty, 'k');
    assert_eq!(empty.note.unwrap().text, nothing);
}

#[test]
fn a_question_about_a_container_ends_when_the_container_is_another() {
    let mut state = full();
    state.focus = Pane::Containers;
    for containers in [vec![], vec![proto::Container { pid: 5, ..container(WEB, 12) }]] {
        state.handle(Input::Polled(Ok(poll(status(), vec![container(WEB, 12)]))));
        key(&mut state, 'k');
        state.handle(Input::Polled(Ok(poll(status(), vec![container(WEB, 13)]))));
        assert!(state.question.is_some(), "it is the same run");
        state.handle(Input::Polled(Ok(poll(status(), containers))));
        assert!(state.question.is_none());
        assert!(shown(&state).contains("ended or was started again: nothing was done"));
    }
    // Nor is it answered while the daemon does not say what runs.
    state.handle(Input::Polled(Ok(poll(status(), vec![container(WEB, 12)]))));
    key(&mut state, 'k');
    assert_eq!(enter(&mut state, "4f1c0a9be2d7"), None);
    state.handle(Input::Polled(Err("cannot reach driftd".into())));
    assert_eq!(enter(&mut state, "a miner"), None);
    assert!(state.question.is_none());
    assert!(shown(&state).contains("! the containers are not current: nothing was done"));
    state.handle(Input::Polled(Ok(poll(status(), vec![]))));
    let text = shown(&state);
    assert!(text.contains("nothing was done; driftd is back after 0s"), "{text}");
    // A finding names its run, and the daemon refuses when that is over.
    state.focus = Pane::Findings;
    let run = Some(Incarnation { pid: 4242, start_time: Some(7), created_at: None });
    let finding = Finding { run, ..numbered(1, 0) };
    state.handle(Input::Followed(0, Followed::Listed(vec![finding], false)));
    key(&mut state, 'k');
    state.handle(Input::Polled(Ok(poll(status(), vec![]))));
    assert!(state.question.is_some());
}

#[test]
fn what_cannot_be_seen_cannot_be_confirmed() {
    let mut state = full();
    key(&mut state, 'k');
    state.handle(Input::Resized { width: 60, height: 24 });
    assert_eq!(enter(&mut state, "4f1c0a9be2d7"), None);
    state.handle(Input::Resized { width: 80, height: 24 });
    let question = state.question.as_ref().unwrap();
    assert_eq!((question.typed(), question.is_confirmed()), ("", false));
    state.handle(Input::Resized { width: 60, height: 24 });
    assert_eq!(key(&mut state, 'q'), Some(Effect::Quit));
    let control = |code| Input::Key(KeyEvent::new(KeyCode::Char(code), KeyModifiers::CONTROL));
    assert_eq!(state.handle(control('c')), Some(Effect::Quit));
    assert_eq!(state.handle(control('z')), Some(Effect::Suspend));
    assert_eq!(state.handle(control('k')), None);
}

#[test]
fn colour_only_repeats_words() {
    let state = full();
    let colours = |colour| {
        let terminal = screen_of(&state, colour);
        let cells = terminal.backend().buffer().content();
        cells.iter().filter(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset).count()
    };
    assert_eq!(colours(false), 0);
    assert!(colours(true) > 20);
}

fn late(oldest_milliseconds: u64) -> proto::Backlog {
    proto::Backlog {
        container: "default/web".into(),
        stage: "content".into(),
        waiting: 1,
        oldest_milliseconds,
    }
}

#[test]
fn the_view_of_a_container_is_what_is_known_of_it() {
    let view = |change: fn(&mut proto::GetStatusResponse, &mut proto::Container)| {
        let (mut status, mut container) = (status(), container("web", 0));
        change(&mut status, &mut container);
        let mut state = state();
        state.handle(Input::Polled(Ok(poll(status, vec![container]))));
        state.known.view_of(&state.known.all_containers()[0])
    };
    assert_eq!(view(|_, _| ()), "complete");
    assert_eq!(view(|_, one| one.pid = 0), "-");
    assert_eq!(view(|_, one| one.watched = false), "NOT WATCHED");
    assert_eq!(view(|_, one| one.baseline = "none: no overlay".into()), "NO BASELINE");
    assert_eq!(view(|_, one| one.baseline = "pending".into()), "pending");
    assert_eq!(view(|_, one| one.incomplete = vec!["armed_late".into()]), "INCOMPLETE");
    assert_eq!(view(|status, _| status.gaps = vec![gap("web", None)]), "INCOMPLETE");
    assert_eq!(view(|status, _| status.gaps = vec![gap("", None)]), "INCOMPLETE");
    assert_eq!(view(|status, _| status.gaps = vec![gap("other", None)]), "complete");
    assert_eq!(view(|status, _| status.gaps = vec![gap("web", Some(now()))]), "complete");
    assert_eq!(view(|status, _| status.endpoints = vec![proto::Endpoint::default()]), "INCOMPLETE");
    assert_eq!(view(|status, _| status.backlogs = vec![late(10_000)]), "INCOMPLETE");
    assert_eq!(view(|status, _| status.backlogs = vec![late(9_999)]), "complete");
}

#[test]
fn containers_are_in_the_order_of_their_worst_findings_and_count_their_sessions() {
    let state = full();
    let names: HashMap<String, String> = state
        .known
        .containers()
        .iter()
        .map(|one| (one.id.id.to_string(), state.known.sessions_in(&one.id)))
        .collect();
    assert_eq!(names["web"], "1");
    assert_eq!(names[WEB], "0");
    let order: Vec<String> =
        state.known.containers().iter().map(|one| one.id.id.chars().take(4).collect()).collect();
    assert_eq!(order, ["4f1c", "old", "pay", "web", "web\u{1b}"]);
}
