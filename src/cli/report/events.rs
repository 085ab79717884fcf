//! The events of a report in the order of time, in words: what the drawing shows.
//!
//! Pure. Where there are many, those of low severity are left out first.

use jiff::Timestamp;

use super::found::{self, subject};
use super::model::Report;
use super::phrase::{At, Phrase, at, own, result_of};
use crate::cli::describe::number;
use crate::cli::output::{short, time};
use crate::cli::sessions::{entry, result, user};
use crate::model::{Kind, Session};

/// How many events are listed.
const MOST: usize = 60;
/// More findings of one kind than this, one right after the other, are one event.
const MOST_ALIKE: usize = 3;

#[derive(Debug)]
pub(super) struct Events {
    pub(super) list: Vec<EventText>,
    pub(super) left_out: usize,
}

#[derive(Debug)]
pub(super) struct EventText {
    pub(super) at: At,
    /// A class of the page: a severity, `session`, `response` or `gap`.
    pub(super) class: &'static str,
    pub(super) what: Phrase,
}

/// An event, with its rank: the highest are left out first.
struct Event {
    rank: u8,
    at: Timestamp,
    class: &'static str,
    /// The kind of a finding.
    kind: Option<Kind>,
    what: Phrase,
}

pub(super) fn events(report: &Report) -> Events {
    let mut all: Vec<Event> = Vec::new();
    for part in &report.sessions {
        add_session(&mut all, &part.session);
    }
    for part in &report.findings {
        let finding = &part.finding;
        let what = own(format!("{} ", finding.kind.name()))
            .then(subject(finding))
            .own(" (")
            .then(found::link(finding.id, report))
            .own(")");
        all.push(Event {
            rank: 4 - finding.severity as u8,
            at: finding.first_seen,
            class: finding.severity.name(),
            kind: Some(finding.kind),
            what,
        });
    }
    for response in &report.responses {
        let outcome = &response.outcome;
        let what = own("response ")
            .quoted(&outcome.action)
            .own(format!(" {}: ", result_of(outcome.succeeded, outcome.gone)))
            .quoted(&outcome.message)
            .own(", asked by ")
            .quoted(&response.requested_by);
        all.push(Event { rank: 0, at: outcome.at, class: "response", kind: None, what });
    }
    for gap in &report.gaps {
        let until = match gap.until {
            Some(until) => format!(", over at {}", time(until)),
            None => ", not over".to_owned(),
        };
        let what = own("gap in the view: ").quoted(&gap.name).own(until);
        all.push(Event { rank: 1, at: gap.at, class: "gap", kind: None, what });
    }
    all.sort_by_key(|event| event.at);
    let mut all = together(all);
    let total = all.len();
    all.sort_by_key(|event| (event.rank, event.at));
    all.truncate(MOST);
    all.sort_by_key(|event| event.at);
    let text = |event: Event| EventText { at: at(event.at), class: event.class, what: event.what };
    Events { left_out: total - all.len(), list: all.into_iter().map(text).collect() }
}

/// Makes one event of many findings of one kind that follow each other.
fn together(all: Vec<Event>) -> Vec<Event> {
    let mut runs: Vec<Vec<Event>> = Vec::new();
    for event in all {
        match runs.last_mut() {
            Some(run)
                if event.kind.is_some()
                    && (run[0].kind, run[0].class) == (event.kind, event.class) =>
            {
                run.push(event);
            }
            _ => runs.push(vec![event]),
        }
    }
    let mut all = Vec::new();
    for mut run in runs {
        if run.len() > MOST_ALIKE {
            let (more, last) = (run.len() - 1, run[run.len() - 1].at);
            run.truncate(1);
            let what = std::mem::take(&mut run[0].what);
            run[0].what = what.own(format!(" and {more} more until {}", time(last)));
        }
        all.append(&mut run);
    }
    all
}

fn add_session(all: &mut Vec<Event>, session: &Session) {
    let id = session.id.to_string();
    let link = || Phrase::default().link(format!("session-{id}"), short(&id));
    let rank = if session.interactive.is_some() || session.findings_total > 0 { 1 } else { 3 };
    let mut what = own(format!("session opened: {}", entry(session.entry)));
    let user = user(session);
    if !user.is_empty() {
        what = what.own(", ").quoted(&user);
    }
    let what = what.own(" (").then(link()).own(")");
    all.push(Event { rank, at: session.started_at, class: "session", kind: None, what });
    if let Some(ended_at) = session.ended_at {
        let how = result(session.started_at, session.ended_at, session.exit).unwrap_or_default();
        let commands = number(session.commands, "command");
        let what = own(format!("session closed: {how}, {commands} (")).then(link()).own(")");
        all.push(Event { rank, at: ended_at, class: "session", kind: None, what });
    }
}
