//! Draws the state of `driftd top`. Pure: a state goes in, a buffer comes out.
//!
//! Two lines above the panes, two below. Colour repeats what a word says already.

mod over;
mod paint;
mod panes;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Position, Rect};
use ratatui::style::{Modifier, Style};

use super::known::{Feed, Lost};
use super::size::{ABOVE, BELOW, LEAST, Size};
use super::state::{Note, State};
use super::text::{cut, end, width, wrap};
use crate::cli::output::{clock, safe, span};
use paint::Paint;

/// The keys, in the last line.
const KEYS: &str = "q quit  ? help  Tab pane  Enter open  / filter  s severity  p r k x respond";

pub(super) fn draw(state: &State, colour: bool, frame: &mut Frame<'_>) {
    let area = frame.area();
    let mut paint = Paint::new(frame.buffer_mut(), colour);
    // A new size may be drawn before the state knows it.
    let size = Size { width: area.width, height: area.height };
    if size.is_too_small() {
        let Size { width, height } = size;
        let text = format!(
            "driftd top needs {}x{}; this is {width}x{height} (q quits)",
            LEAST.width, LEAST.height
        );
        paint.line(area, 0, &text, Style::new());
        return;
    }
    let layout = Layout::vertical([
        Constraint::Length(ABOVE),
        Constraint::Fill(1),
        Constraint::Length(BELOW),
    ]);
    let [above, middle, below] = layout.areas(area);
    draw_above(state, &mut paint, above);
    match &state.opened {
        _ if state.help => over::draw_help(&mut paint, middle),
        None => panes::draw(state, &mut paint, middle),
        Some(opened) => over::draw_opened(opened, &mut paint, middle),
    }
    let mut cursor = draw_below(state, &mut paint, below);
    if let (Some(note), None) = (&state.note, &state.filter) {
        draw_note(note, &mut paint, area);
    }
    if let Some(question) = &state.question {
        cursor = Some(over::draw_question(question, &mut paint, middle));
    }
    if let Some(cursor) = cursor {
        frame.set_cursor_position(cursor);
    }
}

/// Whether the view is complete and the daemon is there.
fn draw_above(state: &State, paint: &mut Paint<'_>, area: Rect) {
    let known = &state.known;
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let (view, style) = match (&known.polled, known.status()) {
        (Feed::Live, Some(status)) if status.complete => ("View complete".to_owned(), paint.good()),
        (Feed::Live, Some(status)) => {
            (format!("View INCOMPLETE ({})", status.problems.len()), paint.bad())
        }
        (_, _) => ("View UNKNOWN".to_owned(), paint.bad()),
    };
    let gate = known.status().and_then(|status| status.gate.as_ref());
    let mode = gate.map(|gate| format!(" ({})", safe(&gate.mode))).unwrap_or_default();
    let rate = known.rate().map_or("-".to_owned(), |rate| format!("{rate:.1}"));
    let at = paint.text(area, 0, 0, "driftd top  ", bold);
    let at = paint.text(area, at, 0, &view, style);
    let gate = format!("  gate{mode} {rate} executions/s  {}", clock(state.now));
    paint.text(area, at, 0, &gate, Style::new());
    let (text, style) = match (known.lost(), known.status()) {
        (Some(Lost { what, reason, since }), _) => {
            let text = format!("{what} for {}: {}", span(state.now, since), safe(reason));
            (text, paint.bad())
        }
        (None, Some(status)) => {
            let (version, node) = (safe(&status.version), safe(&status.node));
            let text = format!(
                "driftd {version} on {node}, up {}: {} containers watched, {} findings kept",
                span(state.now, status.started_at),
                status.containers_watched,
                status.findings
            );
            (text, Style::new())
        }
        (None, None) => ("waiting for driftd".to_owned(), Style::new()),
    };
    paint.line(area, 1, &text, style);
}

/// What is being typed, and the keys. Returns where the cursor is.
fn draw_below(state: &State, paint: &mut Paint<'_>, area: Rect) -> Option<Position> {
    let keys = match (&state.question, &state.filter) {
        (Some(_), _) => "Enter goes on  Esc: nothing is done",
        (None, Some(_)) => "Enter filters (empty: all)  Esc leaves the filter as it was",
        (None, None) => KEYS,
    };
    paint.line(area, 1, keys, Style::new().add_modifier(Modifier::REVERSED));
    if let Some(filter) = &state.filter {
        let label = "Findings, containers and sessions that hold: ";
        let room = usize::from(area.width).saturating_sub(width(label) + 1);
        let text = format!("{label}{}", end(filter.text(), room));
        let at = paint.text(area, 0, 0, &text, Style::new());
        return Some(Position::new(area.x + at, area.y));
    }
    None
}

/// Lines that a message may take.
const NOTE: usize = 6;

/// The message, whole: from the line above the keys upwards.
fn draw_note(note: &Note, paint: &mut Paint<'_>, area: Rect) {
    let style = if note.is_error { paint.bad() } else { paint.good() };
    let text = if note.is_error { format!("! {}", note.text) } else { note.text.clone() };
    let columns = usize::from(area.width);
    let lines = wrap(&cut(&text, columns * NOTE / 2), columns);
    let height = u16::try_from(lines.len()).unwrap_or(1).min(area.height.saturating_sub(1));
    let place = Rect { y: (area.bottom() - 1).saturating_sub(height), height, ..area };
    paint.clear(place);
    for (line, at) in lines.iter().zip(0..) {
        paint.line(place, at, line, style);
    }
}
