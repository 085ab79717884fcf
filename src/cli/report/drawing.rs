//! The drawing of the time line: which shape stands where. `report.html` draws the shapes.
//!
//! Pure. Each kind of event has a lane. Events that would cover each other are one shape with
//! a number, so that ten thousand of them are drawn as well as ten.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

use super::axis::{Axis, Break, Tick, length};
use super::model::{GapMark, Marks, Report};
use crate::cli::describe::number;
use crate::cli::output::{safe, time};
use crate::cli::sessions::{entry, user};
use crate::model::{Session, Severity};

const WIDTH: i32 = 960;
/// Where the times begin, right of the lanes' names, and how wide they are.
const PLOT: i32 = 144;
const PLOT_WIDTH: i32 = WIDTH - PLOT - 20;
const TOP: i32 = 8;
const LANE: i32 = 30;
/// A row of sessions, and how many there are at most.
const ROW: i32 = 28;
const MOST_ROWS: usize = 6;
/// The times, the days, and how long a shortened time is.
const AXIS: i32 = 56;
/// Responses within this distance are one flag.
const CLOSE: i32 = 18;
/// Half of a flag's width.
const FLAG: i32 = 8;
/// More flags than this have no line across the drawing.
const MOST_LINES: usize = 10;
/// Roughly how wide a character of a session's name is.
const CHARACTER: i32 = 7;
const MOST_CHARACTERS: usize = 28;
/// The least width of a bar, so that it can be seen.
const LEAST: i32 = 4;

#[derive(Debug)]
pub(super) struct Drawing {
    pub(super) width: i32,
    pub(super) height: i32,
    /// Where the lanes end and the axis begins.
    pub(super) bottom: i32,
    pub(super) plot: i32,
    pub(super) right: i32,
    /// What is drawn, in words.
    pub(super) description: String,
    pub(super) lanes: Vec<Lane>,
    pub(super) ticks: Vec<Tick>,
    pub(super) breaks: Vec<Break>,
    pub(super) bars: Vec<Bar>,
    pub(super) dots: Vec<Dot>,
    pub(super) responses: Vec<Flag>,
    /// Whether each flag has a line across all lanes.
    pub(super) has_lines: bool,
    pub(super) gaps: Vec<Bar>,
}

#[derive(Debug)]
pub(super) struct Lane {
    pub(super) name: &'static str,
    pub(super) count: String,
    pub(super) y: i32,
    pub(super) height: i32,
}

#[derive(Debug)]
pub(super) struct Bar {
    pub(super) x: i32,
    pub(super) y: i32,
    pub(super) width: i32,
    pub(super) title: String,
    /// Empty without one.
    pub(super) label: String,
    /// Where the label begins.
    pub(super) text_x: i32,
    /// It goes on at its right end.
    pub(super) is_open: bool,
}

#[derive(Debug)]
pub(super) struct Dot {
    pub(super) x: i32,
    pub(super) y: i32,
    pub(super) r: i32,
    pub(super) severity: &'static str,
    /// Empty for one finding.
    pub(super) count: String,
    pub(super) title: String,
}

#[derive(Debug)]
pub(super) struct Flag {
    pub(super) x: i32,
    pub(super) y: i32,
    pub(super) label: String,
    /// Where the label begins or, near the right edge, ends.
    pub(super) text_x: i32,
    pub(super) anchor: &'static str,
    pub(super) title: String,
}

/// `None` if nothing happened.
pub(super) fn draw(report: &Report, zone: &TimeZone) -> Option<Drawing> {
    let (marks, horizon) = (&report.marks, report.horizon());
    let axis = Axis::of(times(marks, report), PLOT + 8, PLOT_WIDTH - 16)?;
    let mut lanes = Vec::new();
    let mut y = TOP;
    let mut lane = |name, count: String, height| {
        lanes.push(Lane { name, count, y, height });
        y += height;
        y - height
    };
    let mut bars = Vec::new();
    if !marks.sessions.is_empty() {
        let (placed, rows) = place_sessions(report, &axis, horizon);
        let height = i32::try_from(rows).unwrap_or(1) * ROW + 4;
        let drawn = placed.len();
        let count = match marks.sessions.len() {
            all if all > drawn => format!("{drawn} of {all}"),
            all => all.to_string(),
        };
        let top = lane("sessions", count, height);
        bars = placed;
        bars.iter_mut().for_each(|bar| bar.y += top);
    }
    let mut dots = Vec::new();
    for severity in Severity::ALL.iter().rev() {
        let of_severity = marks.findings.iter().filter(|(_, one)| one == severity);
        let times: Vec<Timestamp> = of_severity.map(|(at, _)| *at).collect();
        if !times.is_empty() {
            let y = lane(severity.name(), times.len().to_string(), LANE) + LANE / 2;
            dots.extend(cluster(&times, &axis, *severity, y));
        }
    }
    let mut responses = Vec::new();
    if !marks.responses.is_empty() {
        let y = lane("responses", marks.responses.len().to_string(), LANE) + LANE / 2;
        responses = flags(report, &axis, y);
    }
    let mut gaps = Vec::new();
    if !marks.gaps.is_empty() {
        let y = lane("not seen", marks.gaps.len().to_string(), LANE);
        gaps = merged_gaps(marks, &axis, horizon, y);
    }
    Some(Drawing {
        width: WIDTH,
        height: y + AXIS,
        bottom: y,
        plot: PLOT,
        right: PLOT + PLOT_WIDTH,
        description: description(report, &axis),
        ticks: axis.ticks(zone),
        breaks: axis.breaks(),
        lanes,
        bars,
        dots,
        has_lines: responses.len() <= MOST_LINES,
        responses,
        gaps,
    })
}

/// All times that the axis must show.
fn times(marks: &Marks, report: &Report) -> Vec<Timestamp> {
    let horizon = report.horizon();
    let period = report.period;
    let sessions = marks.sessions.iter().flat_map(|mark| [mark.start, mark.end.unwrap_or(horizon)]);
    let gaps = marks.gaps.iter().flat_map(|mark| [mark.start, mark.end.unwrap_or(horizon)]);
    let findings = marks.findings.iter().map(|(at, _)| *at);
    let times = findings.chain(sessions).chain(gaps).chain(marks.responses.iter().copied());
    // What lasts into the period, or beyond it, is cut at its ends.
    let within = |at: Timestamp| {
        let at = period.since.map_or(at, |since| at.max(since));
        period.until.map_or(at, |until| at.min(until))
    };
    times.map(within).collect()
}

/// Places the bars of sessions in rows, in which they do not cover each other. The sessions
/// that caused most come first, and have room. Where a name has none, the bar is drawn alone.
fn place_sessions(report: &Report, axis: &Axis, horizon: Timestamp) -> (Vec<Bar>, usize) {
    let mut order: Vec<&Session> = report.sessions.iter().map(|part| &part.session).collect();
    order.sort_by_key(|session| {
        (std::cmp::Reverse(session.findings_total), session.started_at, session.id)
    });
    let ends: BTreeMap<_, _> =
        report.marks.sessions.iter().map(|mark| (mark.id, mark.end)).collect();
    let mut rows = Rows::default();
    let mut bars = Vec::new();
    for session in order {
        let end = ends.get(&session.id).copied().flatten();
        let (x, to) = (axis.x(session.started_at), axis.x(end.unwrap_or(horizon)));
        let width = (to - x).max(LEAST);
        let label = label(session);
        let text = i32::try_from(label.width()).unwrap_or(0) * CHARACTER;
        // A name that would leave the drawing begins further left than its bar.
        let from = x.min(PLOT + PLOT_WIDTH - text);
        let named = rows.place(from, (x + width).max(from + text) + CHARACTER);
        let (row, label) = match named {
            Some(row) => (row, label),
            None => match rows.place(x, x + width + LEAST) {
                Some(row) => (row, String::new()),
                None => continue,
            },
        };
        let state = match end {
            None => format!("open since {}", time(session.started_at)),
            Some(end) => format!("{} to {}", time(session.started_at), time(end)),
        };
        bars.push(Bar {
            x,
            y: i32::try_from(row).unwrap_or(0) * ROW,
            width,
            title: format!("{}, {}: {state}", entry(session.entry), user(session)),
            label,
            text_x: from,
            is_open: end.is_none(),
        });
    }
    (bars, rows.0.len())
}

/// What is taken of each row.
#[derive(Default)]
struct Rows(Vec<Vec<(i32, i32)>>);

impl Rows {
    /// Takes a part of the first row that has room; `None` if no row has.
    fn place(&mut self, from: i32, to: i32) -> Option<usize> {
        let is_free =
            |row: &Vec<(i32, i32)>| row.iter().all(|(start, end)| to <= *start || from >= *end);
        let index = match self.0.iter().position(is_free) {
            Some(index) => index,
            None if self.0.len() < MOST_ROWS => {
                self.0.push(Vec::new());
                self.0.len() - 1
            }
            None => return None,
        };
        self.0[index].push((from, to));
        Some(index)
    }
}

/// The user of a session or, where that is not known, how it came in.
fn label(session: &Session) -> String {
    let user = user(session);
    cut(if user.is_empty() { entry(session.entry) } else { &user })
}

/// A name, cut to fit.
fn cut(whole: &str) -> String {
    if whole.width() <= MOST_CHARACTERS {
        return whole.to_owned();
    }
    let mut width = 0;
    let mut label: String = whole
        .chars()
        .take_while(|one| {
            width += one.width().unwrap_or(0);
            width < MOST_CHARACTERS
        })
        .collect();
    label.push('…');
    label
}

/// Findings of one severity that are drawn as one dot.
struct Together {
    /// The places of the first and of the last.
    from: i32,
    to: i32,
    first: Timestamp,
    last: Timestamp,
    count: usize,
}

impl Together {
    fn x(&self) -> i32 {
        i32::midpoint(self.from, self.to)
    }

    fn radius(&self) -> i32 {
        match self.count {
            1 => 6,
            2..10 => 8,
            10..100 => 10,
            _ => 14,
        }
    }
}

/// One dot for all findings of a severity whose dots would touch.
fn cluster(times: &[Timestamp], axis: &Axis, severity: Severity, y: i32) -> Vec<Dot> {
    let mut placed: Vec<(i32, Timestamp)> = times.iter().map(|at| (axis.x(*at), *at)).collect();
    placed.sort_unstable();
    let mut all: Vec<Together> = Vec::new();
    for (x, at) in placed {
        let mut new = Together { from: x, to: x, first: at, last: at, count: 1 };
        while let Some(before) =
            all.pop_if(|before| new.x() - before.x() <= new.radius() + before.radius())
        {
            let count = before.count + new.count;
            new = Together { from: before.from, first: before.first, count, ..new };
        }
        all.push(new);
    }
    let dot = |all: Together| {
        let findings = number(all.count as u64, "finding");
        let (from, to) = (time(all.first), time(all.last));
        Dot {
            x: all.x(),
            y,
            r: all.radius(),
            severity: severity.name(),
            count: match all.count {
                1 => String::new(),
                count @ ..1000 => count.to_string(),
                count @ 1000..10_000 => format!("{}.{}k", count / 1000, count % 1000 / 100),
                count => format!("{}k", count / 1000),
            },
            title: match from == to {
                true => format!("{findings}, {severity}: {from}"),
                false => format!("{findings}, {severity}: {from} to {to}"),
            },
        }
    };
    all.into_iter().map(dot).collect()
}

/// One flag for all responses that lie close together. A label that would cover another one
/// is left out.
fn flags(report: &Report, axis: &Axis, y: i32) -> Vec<Flag> {
    let mut flags: Vec<Flag> = Vec::new();
    for response in &report.responses {
        let outcome = &response.outcome;
        let name = safe(&outcome.action);
        let label = if outcome.succeeded { name } else { format!("{name}, not done") };
        let title = format!("{label}: {}", time(outcome.at));
        let x = axis.x(outcome.at);
        match flags.last_mut() {
            Some(last) if x - last.x < CLOSE => {
                last.title = format!("{}; {title}", last.title);
                if last.label != label && !last.label.ends_with('…') {
                    last.label.push_str(", …");
                }
            }
            _ => flags.push(Flag { x, y, label, text_x: x + 11, anchor: "start", title }),
        }
    }
    place_labels(&mut flags);
    flags
}

/// Puts each label where it covers neither another label nor a flag, or leaves it out.
fn place_labels(flags: &mut [Flag]) {
    let mut covered = PLOT;
    for index in 0..flags.len() {
        let next = flags.get(index + 1).map_or(PLOT + PLOT_WIDTH, |next| next.x - FLAG);
        let flag = &mut flags[index];
        flag.label = cut(&flag.label);
        let text = i32::try_from(flag.label.width()).unwrap_or(0) * CHARACTER;
        if flag.text_x + text > PLOT + PLOT_WIDTH {
            (flag.text_x, flag.anchor) = (flag.x - 11, "end");
        }
        let is_left = flag.anchor == "end";
        let begin = if is_left { flag.text_x - text } else { flag.text_x };
        if begin < covered || (!is_left && begin + text > next) {
            flag.label.clear();
        }
        covered = match flag.label.is_empty() || is_left {
            true => flag.x + FLAG,
            false => begin + text,
        };
    }
}

/// Gaps that are drawn as one.
struct Unseen {
    from: i32,
    to: i32,
    start: Timestamp,
    /// `None` if one of them is not over.
    end: Option<Timestamp>,
    count: u64,
}

/// The times that were not seen. Those that touch in the drawing are one.
fn merged_gaps(marks: &Marks, axis: &Axis, horizon: Timestamp, y: i32) -> Vec<Bar> {
    let mut gaps = marks.gaps.clone();
    gaps.sort_unstable_by_key(|mark| mark.start);
    let mut merged: Vec<Unseen> = Vec::new();
    for GapMark { start, end } in gaps {
        let from = axis.x(start);
        let to = axis.x(end.unwrap_or(horizon)).max(from + LEAST);
        match merged.last_mut() {
            Some(last) if from <= last.to + 2 => {
                last.to = last.to.max(to);
                last.end = last.end.zip(end).map(|(one, other)| one.max(other));
                last.count += 1;
            }
            _ => merged.push(Unseen { from, to, start, end, count: 1 }),
        }
    }
    let bar = |gap: Unseen| {
        let (count, start) = (number(gap.count, "gap"), time(gap.start));
        Bar {
            x: gap.from,
            y,
            width: gap.to - gap.from,
            title: match gap.end {
                None => format!("{count} since {start}, not over"),
                Some(end) => format!("{count}, {start} to {}", time(end)),
            },
            label: String::new(),
            text_x: gap.from,
            is_open: gap.end.is_none(),
        }
    };
    merged.into_iter().map(bar).collect()
}

fn description(report: &Report, axis: &Axis) -> String {
    let counts = &report.counts;
    let severities: Vec<String> = counts
        .by_severity
        .iter()
        .rev()
        .filter(|(_, count)| **count > 0)
        .map(|(severity, count)| format!("{count} {severity}"))
        .collect();
    let findings = match severities.is_empty() {
        true => "no finding".to_owned(),
        false => format!("{} ({})", number(counts.findings, "finding"), severities.join(", ")),
    };
    let range = match (report.period.first, report.period.last) {
        (Some(first), Some(last)) => format!("From {} to {}", time(first), time(last)),
        (_, _) => "In this time".to_owned(),
    };
    let cut: Vec<String> = axis.breaks().into_iter().map(|one| one.label).collect();
    let cut = match cut.is_empty() {
        true => String::new(),
        false => format!(" Times without an event are shortened: {}.", cut.join(", ")),
    };
    format!(
        "{range}: {}, {findings}, {}, {} in the view. The table of events has the same in words.{cut}",
        number(counts.sessions, "session"),
        number(counts.responses, "response"),
        number(counts.gaps, "gap"),
    )
}

/// How long all times together were that the view was incomplete, each moment counted once.
pub(super) fn unseen(report: &Report) -> i64 {
    let horizon = report.horizon();
    let begin = report.period.since.unwrap_or(Timestamp::MIN);
    let range = |mark: &GapMark| {
        let (start, end) = (mark.start.max(begin), mark.end.unwrap_or(horizon).min(horizon));
        (start, end.max(start))
    };
    let mut ranges: Vec<(Timestamp, Timestamp)> = report.marks.gaps.iter().map(range).collect();
    ranges.sort_unstable();
    let (mut all, mut until) = (0, Timestamp::MIN);
    for (start, end) in ranges {
        let start = start.max(until);
        if end > start {
            all += end.duration_since(start).as_secs();
        }
        until = until.max(end);
    }
    all
}

/// That length in words.
pub(super) fn unseen_in_words(report: &Report) -> String {
    let all = length(unseen(report));
    match report.marks.gaps.iter().filter(|mark| mark.end.is_none()).count() {
        0 => format!("{all} in all"),
        1 => format!("{all} in all so far, one not over"),
        open => format!("{all} in all so far, {open} not over"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_795_000_000 + seconds).unwrap()
    }

    /// An axis on which a second is a pixel.
    fn axis() -> Axis {
        Axis::of((0..=800).map(at).collect(), 0, 800).unwrap()
    }

    fn dots(seconds: &[i64]) -> Vec<(i32, String)> {
        let times: Vec<Timestamp> = seconds.iter().copied().map(at).collect();
        let dots = cluster(&times, &axis(), Severity::High, 0);
        dots.into_iter().map(|dot| (dot.x, dot.count)).collect()
    }

    #[test]
    fn findings_whose_dots_would_touch_are_one_dot() {
        let dot = |x, count: &str| (x, count.to_owned());
        assert_eq!(dots(&[10, 40, 700]), [dot(10, ""), dot(40, ""), dot(700, "")]);
        assert_eq!(dots(&[10, 20, 40]), [dot(15, "2"), dot(40, "")]);
        assert_eq!(dots(&[7; 1234]), [dot(7, "1.2k")]);
        assert_eq!(dots(&[7; 56_789]), [dot(7, "56k")]);
        let times = [at(10), at(20)];
        let title = cluster(&times, &axis(), Severity::High, 0).remove(0).title;
        assert_eq!(title, format!("2 findings, high: {} to {}", time(at(10)), time(at(20))));
    }

    proptest::proptest! {
        #[test]
        fn no_dot_covers_another_and_none_is_lost(
            seconds in proptest::collection::vec(0_i64..800, 1..300)
        ) {
            let times: Vec<Timestamp> = seconds.iter().copied().map(at).collect();
            let dots = cluster(&times, &axis(), Severity::Low, 0);
            for pair in dots.windows(2) {
                proptest::prop_assert!(pair[1].x - pair[0].x > pair[1].r + pair[0].r);
            }
            let count = |dot: &Dot| if dot.count.is_empty() { 1 } else { dot.count.parse().unwrap() };
            proptest::prop_assert_eq!(dots.iter().map(count).sum::<usize>(), seconds.len());
        }
    }

    #[test]
    fn gaps_that_touch_are_one_and_last_as_long_as_the_longest() {
        let mark = |start, end: Option<i64>| GapMark { start: at(start), end: end.map(at) };
        let gaps =
            vec![mark(500, None), mark(100, Some(300)), mark(150, Some(200)), mark(301, Some(310))];
        let marks = Marks { gaps, ..Marks::default() };
        let bars: Vec<_> = merged_gaps(&marks, &axis(), at(800), 0)
            .into_iter()
            .map(|bar| (bar.x, bar.width, bar.is_open, bar.title))
            .collect();
        let title = |text: String, from| format!("{text} {}", time(at(from)));
        assert_eq!(
            bars,
            [
                (100, 210, false, title(title("3 gaps,".into(), 100) + " to", 310)),
                (500, 300, true, title("1 gap since".into(), 500) + ", not over"),
            ]
        );
    }

    #[test]
    fn a_long_name_is_cut_by_its_width() {
        assert_eq!(cut("alice@example.org"), "alice@example.org");
        let cut = cut(&"木".repeat(40));
        assert!(cut.ends_with('…') && cut.width() <= MOST_CHARACTERS, "{cut}");
    }
}
