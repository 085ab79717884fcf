//! What lies over the panes: a finding whole, the help, and the question before a response.

use ratatui::layout::{Position, Rect};
use ratatui::style::{Modifier, Style};

use super::paint::Paint;
use crate::cli::output::short;
use crate::cli::top::question::Question;
use crate::cli::top::state::{Opened, Subject};
use crate::cli::top::text::{cut, end, width, wrap};
use crate::respond::Action;

/// Fits the smallest terminal.
const HELP: &str = "\
Tab, Right, Left    the next pane, the one before
Down, Up, PageDown  the next line, the one before, ten lines; also j and K
Home, End           the first line, and stay there; the last one
Enter               a finding, session or loss whole; a container's findings
/                   only what holds a text
s                   only findings of a higher severity; at last all again
Esc                 closes, or removes the message, or the filter
p, r, k             pause, resume or kill the container
x                   kill the process of the finding
q, Ctrl-C           quit

A response is sent only after a word and a reason were typed. For a finding or
session it is refused if that run of the container is over.

VIEW  complete: all that happens in the container is seen; pending: its
      baseline is not ready. OPEN: how many sessions are open in it.
NOW   makes the view incomplete. COUNT: lost since driftd was started.
OVER  was lost before. docs/operating.md explains each name.";

pub(super) fn draw_help(paint: &mut Paint<'_>, area: Rect) {
    title(paint, area, "Keys (any other key closes this)");
    let lines = wrap(HELP, usize::from(area.width));
    for (line, at) in lines.iter().zip(1..) {
        paint.line(area, at, line, Style::new());
    }
}

fn title(paint: &mut Paint<'_>, area: Rect, text: &str) {
    paint.line(area, 0, &"─".repeat(usize::from(area.width)), Style::new());
    paint.text(area, 1, 0, &format!("[{text}] "), Style::new().add_modifier(Modifier::BOLD));
}

pub(super) fn draw_opened(opened: &Opened, paint: &mut Paint<'_>, area: Rect) {
    let what = match opened.what {
        Subject::Finding(_) => "Finding",
        Subject::Session(_) => "Session",
        Subject::Loss => "Loss",
    };
    let id = short(&opened.id);
    let (text, style) = match &opened.text {
        None => ("reading…", Style::new()),
        Some(Ok(text)) => (text.as_str(), Style::new()),
        Some(Err(error)) => (error.as_str(), paint.bad()),
    };
    let lines = wrap(text, usize::from(area.width));
    let height = usize::from(area.height.saturating_sub(1));
    let last = (opened.scroll + height).min(lines.len());
    let range = match lines.len() > height {
        true => format!(", lines {}-{last} of {}", opened.scroll + 1, lines.len()),
        false => String::new(),
    };
    title(paint, area, &format!("{what} {id}{range} (Esc closes)"));
    for (line, at) in lines.iter().skip(opened.scroll).zip(1..) {
        paint.line(area, at, line, style);
    }
}

fn sentence(action: Action) -> &'static str {
    match action {
        Action::Evidence => "Take evidence of the container",
        Action::Hook => "Run a hook for the container",
        Action::Kill => "Kill every process of the container",
        Action::KillProcess => "Kill one process of the container",
        Action::Pause => "Freeze the container, so that nothing in it runs",
        Action::Resume => "Thaw the container",
    }
}

/// Draws the question, and returns where the cursor is.
pub(super) fn draw_question(question: &Question, paint: &mut Paint<'_>, area: Rect) -> Position {
    let target = question.target();
    let columns = usize::from(area.width).saturating_sub(4);
    let mut lines = wrap(&format!("{} {}", sentence(question.action()), target.container), columns);
    // The beginning says what it is; a long command line must not push the word away.
    lines.extend(wrap(&cut(&target.about, 4 * columns), columns));
    lines.push(String::new());
    let label = match question.is_confirmed() {
        true => "Reason: ".to_owned(),
        false => {
            lines.push(format!("Type {} to confirm.", question.word()));
            "Confirm: ".to_owned()
        }
    };
    if question.is_confirmed() {
        lines.push("Type the reason. The history keeps it.".to_owned());
    }
    let room = columns.saturating_sub(width(&label) + 1);
    lines.push(format!("{label}{}", end(question.typed(), room)));
    let height = u16::try_from(lines.len()).unwrap_or(u16::MAX).saturating_add(2);
    let height = height.min(area.height);
    let y = area.y + (area.height - height) / 2;
    let place = Rect { y, height, ..area };
    paint.clear(place);
    title(paint, place, question.action().name());
    paint.line(place, height - 1, &"─".repeat(usize::from(area.width)), Style::new());
    let inner = Rect { x: place.x + 2, width: place.width.saturating_sub(4), ..place };
    let mut cursor = Position::new(inner.x, inner.y);
    for (line, at) in lines.iter().zip(1..height.saturating_sub(1)) {
        let column = paint.text(inner, 0, at, line, Style::new());
        cursor = Position::new(inner.x + column, inner.y + at);
    }
    cursor
}
