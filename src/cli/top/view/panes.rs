//! The four panes: containers, findings, sessions, losses.

use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style};

use super::paint::Paint;
use crate::cli::containers::ContainerJson;
use crate::cli::describe::{command_line, subject};
use crate::cli::output::{safe, short, span};
use crate::cli::sessions::{entry, user};
use crate::cli::top::known::{Feed, LossLine, count};
use crate::cli::top::state::{Pane, State};
use crate::cli::top::text::{cut_front, fit};
use crate::model::{ContainerId, Finding, Session, Severity};

/// How wide a column is.
#[derive(Clone, Copy)]
enum Column {
    Fixed(usize),
    /// A number, at the right end of its columns.
    Number(usize),
    /// What the others leave, in as many parts.
    Share(usize),
    /// The same. The end of a longer text is shown: it has the ID, or the image's own name.
    End(usize),
}

/// A cell, and the severity in whose colour it is drawn.
struct Cell(String, Option<Severity>);

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell(text.into(), None)
    }
}

struct Table {
    title: String,
    columns: Vec<(&'static str, Column)>,
    rows: Vec<Vec<Cell>>,
    /// Stands in place of rows, if there are none.
    empty: &'static str,
}

/// Columns before a row: the mark of the chosen one.
const MARK: usize = 2;

pub(super) fn draw(state: &State, paint: &mut Paint<'_>, area: Rect) {
    let shares = [5, 7, 4, 4].map(Constraint::Fill);
    let areas: [Rect; 4] = Layout::vertical(shares).areas(area);
    for (pane, area) in Pane::ALL.into_iter().zip(areas) {
        let table = match pane {
            Pane::Containers => containers(state),
            Pane::Findings => findings(state),
            Pane::Sessions => sessions(state),
            Pane::Losses => losses(state),
        };
        draw_table(&table, state.chosen(pane), state.focus == pane, paint, area);
    }
}

fn draw_table(table: &Table, chosen: usize, focus: bool, paint: &mut Paint<'_>, area: Rect) {
    // Title and heading.
    let height = usize::from(area.height.saturating_sub(2)).max(1);
    // A page is shown, so that lines do not move with the chosen one.
    let first = chosen / height * height;
    let total = table.rows.len();
    let last = (first + height).min(total);
    let range =
        if total > height { format!(" {}-{last} of {total}", first + 1) } else { String::new() };
    let title = match focus {
        true => format!("[{}{range}] ", table.title),
        false => format!(" {}{range}  ", table.title),
    };
    let bold = Style::new().add_modifier(Modifier::BOLD);
    paint.line(area, 0, &"─".repeat(usize::from(area.width)), Style::new());
    paint.text(area, 1, 0, &title, if focus { bold } else { Style::new() });
    let widths = widths(&table.columns, usize::from(area.width).saturating_sub(MARK));
    let heading = table.columns.iter().map(|(name, _)| Cell::from(*name)).collect::<Vec<_>>();
    draw_row(&heading, table, &widths, (area, 1), paint);
    paint.mark(area, 1, Style::new().add_modifier(Modifier::DIM));
    if total == 0 {
        paint.line(area, 2, &format!("  {}", table.empty), Style::new());
    }
    let rows = table.rows[first.min(total)..last].iter().zip(first..);
    for ((row, at), line) in rows.zip(2..) {
        draw_row(row, table, &widths, (area, line), paint);
        if at == chosen {
            let mark = if focus { "> " } else { "· " };
            paint.text(area, 0, line, mark, Style::new());
            if focus {
                paint.mark(area, line, Style::new().add_modifier(Modifier::REVERSED));
            }
        }
    }
}

fn draw_row(
    row: &[Cell],
    table: &Table,
    widths: &[usize],
    (area, line): (Rect, u16),
    paint: &mut Paint<'_>,
) {
    let mut at = 2;
    for ((Cell(text, severity), (_, column)), width) in row.iter().zip(&table.columns).zip(widths) {
        let text = match column {
            Column::Number(_) => format!("{text:>width$}"),
            Column::End(_) => cut_front(text, *width),
            Column::Fixed(_) | Column::Share(_) => text.clone(),
        };
        let style = severity.map_or(Style::new(), |severity| paint.of_severity(severity));
        at = paint.text(area, at, line, &fit(&text, *width), style);
        at = paint.text(area, at, line, " ", Style::new());
    }
}

/// How wide each column is, with a space behind each.
fn widths(columns: &[(&str, Column)], width: usize) -> Vec<usize> {
    let fixed = |column: &Column| match column {
        Column::Fixed(width) | Column::Number(width) => *width,
        Column::Share(_) | Column::End(_) => 0,
    };
    let share = |column: &Column| match column {
        Column::Share(share) | Column::End(share) => *share,
        Column::Fixed(_) | Column::Number(_) => 0,
    };
    let taken: usize = columns.iter().map(|(_, column)| fixed(column) + 1).sum();
    let shares: usize = columns.iter().map(|(_, column)| share(column)).sum();
    let free = width.saturating_sub(taken);
    let width = |(_, column): &(&str, Column)| fixed(column) + free * share(column) / shares.max(1);
    columns.iter().map(width).collect()
}

fn name(container: &ContainerId) -> String {
    format!("{}/{}", safe(&container.namespace), short(&safe(&container.id)))
}

/// What stands in an empty pane.
fn empty(feed: &Feed, has_come: bool, nothing: &'static str) -> &'static str {
    match (feed, has_come) {
        (_, true) => nothing,
        (Feed::Lost { .. }, false) => "not known: driftd does not answer",
        (Feed::Waiting | Feed::Live, false) => "reading…",
    }
}

fn containers(state: &State) -> Table {
    let known = &state.known;
    let row = |container: &&ContainerJson| {
        let mut row: Vec<Cell> = vec![
            name(&container.id).into(),
            safe(container.image.name.as_deref().unwrap_or("-")).into(),
            container.state().into(),
        ];
        let view = known.view_of(container);
        let is_seen = matches!(view, "complete" | "-" | "pending");
        row.push(Cell(view.to_owned(), (!is_seen).then_some(Severity::Critical)));
        let counts = Severity::ALL.iter().rev();
        match container.findings_by_severity {
            Some(_) => row.extend(counts.map(|severity| match count(container, *severity) {
                0 => Cell::from("-"),
                count => Cell(count.to_string(), Some(*severity)),
            })),
            // An older daemon counts them together.
            None => row.extend(counts.map(|_| Cell::from("?"))),
        }
        row.push(known.sessions_in(&container.id).into());
        row
    };
    let nothing = match known.all_containers() {
        [] => "there is none",
        _ => "none holds the text",
    };
    Table {
        title: "Containers".into(),
        columns: vec![
            ("CONTAINER", Column::End(1)),
            ("IMAGE", Column::End(1)),
            ("STATE", Column::Fixed(7)),
            ("VIEW", Column::Fixed(11)),
            ("CRIT", Column::Number(4)),
            ("HIGH", Column::Number(4)),
            ("MED", Column::Number(4)),
            ("LOW", Column::Number(4)),
            ("INFO", Column::Number(4)),
            ("OPEN", Column::Number(4)),
        ],
        rows: known.containers().iter().map(row).collect(),
        empty: empty(&known.listed, known.node().is_some(), nothing),
    }
}

fn findings(state: &State) -> Table {
    let known = &state.known;
    let wish = known.wish();
    let mut title = "Findings".to_owned();
    if let Some(floor) = wish.floor {
        title.push_str(&format!(", {floor} and above"));
    }
    if !wish.text.is_empty() {
        title.push_str(&format!(", with \"{}\"", safe(&wish.text)));
    }
    if !wish.container.is_empty() {
        title.push_str(&format!(", of {}", safe(&wish.container)));
    }
    if known.has_more_findings() {
        title.push_str(", the newest");
    }
    let row = |finding: &Finding| -> Vec<Cell> {
        let severity = finding.severity;
        let answer = match &finding.outcome {
            None => "-".to_owned(),
            Some(outcome) if outcome.succeeded => safe(&outcome.action),
            Some(_) => "FAILED".to_owned(),
        };
        vec![
            Cell(severity.name().to_uppercase(), Some(severity)),
            finding.kind.name().into(),
            finding.container_id().map_or("-".to_owned(), |id| short(&safe(&id.id))).into(),
            subject(finding).into(),
            finding.count.to_string().into(),
            span(state.now, finding.last_seen).into(),
            answer.into(),
        ]
    };
    let is_all = wish.floor.is_none() && wish.text.is_empty() && wish.container.is_empty();
    let nothing = match is_all {
        true => "nothing was found",
        false => "nothing that is asked for was found",
    };
    Table {
        title,
        columns: vec![
            ("SEVERITY", Column::Fixed(8)),
            ("KIND", Column::Fixed(19)),
            ("CONTAINER", Column::Fixed(12)),
            ("PATH/PROCESS", Column::Share(1)),
            ("COUNT", Column::Number(5)),
            ("SEEN", Column::Number(4)),
            // Room for `kill-process`, where there is.
            ("ANSWER", Column::Fixed(if state.size.width < 100 { 6 } else { 12 })),
        ],
        rows: known.findings().iter().map(row).collect(),
        empty: empty(&known.followed, known.has_findings(), nothing),
    }
}

fn sessions(state: &State) -> Table {
    let known = &state.known;
    let more = known.node().is_some_and(|node| node.more_sessions);
    let row = |session: &&Session| -> Vec<Cell> {
        vec![
            span(state.now, session.started_at).into(),
            short(&safe(&session.container.id.id)).into(),
            entry(session.entry).into(),
            user(session).into(),
            session.commands.to_string().into(),
            session.findings_total.to_string().into(),
            command_line(&session.process).into(),
        ]
    };
    let nothing = match known.wish().text.as_str() {
        "" => "none is open",
        _ => "none that is open holds the text",
    };
    Table {
        title: format!("Open sessions{}", if more { ", the newest" } else { "" }),
        columns: vec![
            ("FOR", Column::Number(4)),
            ("CONTAINER", Column::Fixed(12)),
            ("ENTRY", Column::Fixed(20)),
            ("USER", Column::Share(1)),
            ("COMMANDS", Column::Number(8)),
            ("FINDINGS", Column::Number(8)),
            ("COMMAND", Column::Share(2)),
        ],
        rows: known.sessions().iter().map(row).collect(),
        empty: empty(&known.listed, known.node().is_some(), nothing),
    }
}

fn losses(state: &State) -> Table {
    let known = &state.known;
    let row = |line: LossLine| -> Vec<Cell> {
        let severity = (line.state == "NOW").then_some(Severity::Critical);
        let name = if line.name.is_empty() { "-".to_owned() } else { line.name };
        vec![Cell(line.state.to_owned(), severity), name.into(), line.text.into()]
    };
    Table {
        title: "Losses: what makes the view incomplete".into(),
        columns: vec![
            ("WHEN", Column::Fixed(5)),
            ("NAME", Column::Fixed(21)),
            ("WHAT", Column::Share(1)),
        ],
        rows: known.losses().into_iter().map(row).collect(),
        empty: empty(&known.polled, known.status().is_some(), "none"),
    }
}
