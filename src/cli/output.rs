//! How answers are printed: tables for people, JSON for programs.

use std::io::{self, IsTerminal as _, Write as _};

use clap::ValueEnum;
use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Width, presets};
use jiff::Timestamp;
use serde::Serialize;

use crate::model::{Severity, printable};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Columns that fit the terminal
    #[default]
    Table,
    /// More columns
    Wide,
    /// One JSON document
    Json,
    /// One JSON object per line
    Jsonl,
}

/// What every listing can be asked.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Listing {
    /// How to print the answer
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(super) output: Format,
    /// Print IDs and columns in full length
    #[arg(long)]
    pub(super) no_trunc: bool,
    /// Print only what names each line
    #[arg(short, long)]
    pub(super) quiet: bool,
}

/// One kind of thing that is listed.
pub(super) trait Listed {
    type Json<'a>: Serialize
    where
        Self: 'a;

    fn json(&self) -> Self::Json<'_>;
    /// What `-q` prints.
    fn name(&self) -> String;
    fn header(wide: bool) -> Vec<&'static str>;
    fn row(&self, style: &Style) -> Vec<Field>;
}

#[derive(Clone, Debug)]
pub(super) enum Field {
    Text(String),
    Severity(Option<Severity>),
}

impl<T: Into<String>> From<T> for Field {
    fn from(text: T) -> Field {
        Field::Text(text.into())
    }
}

/// How a table is drawn: everything that is not in the data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) wide: bool,
    pub(super) no_trunc: bool,
    pub(super) colour: bool,
    /// The terminal's width; `None` when there is no need to fit.
    pub(super) width: Option<u16>,
    pub(super) now: Timestamp,
}

impl Style {
    fn of_stdout(listing: &Listing) -> Style {
        let fits = !listing.no_trunc && io::stdout().is_terminal();
        Style {
            wide: listing.output == Format::Wide,
            no_trunc: listing.no_trunc,
            colour: colour(),
            width: if fits { comfy_table::Table::new().width() } else { None },
            now: Timestamp::now(),
        }
    }

    /// An ID in the length that people read.
    pub(super) fn id(&self, id: &str) -> String {
        let id = safe(id);
        if self.no_trunc { id } else { short(&id) }
    }
}

/// Whether stdout may be coloured (see no-color.org).
pub(super) fn colour() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    io::stdout().is_terminal()
        && !set("NO_COLOR")
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Long hexadecimal IDs are told apart by their beginning.
pub(super) fn short(id: &str) -> String {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    if hex.len() >= 32 && hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        hex[..12].to_owned()
    } else {
        id.to_owned()
    }
}

/// Prints a listing to stdout.
pub(super) fn list<T: Listed>(items: &[T], listing: &Listing) -> anyhow::Result<()> {
    let mut text = String::new();
    match listing.output {
        _ if listing.quiet => {
            for item in items {
                text.push_str(&item.name());
                text.push('\n');
            }
        }
        Format::Table | Format::Wide => text = table(items, &Style::of_stdout(listing)),
        Format::Json => {
            let all: Vec<T::Json<'_>> = items.iter().map(Listed::json).collect();
            text = harmless(&serde_json::to_string_pretty(&all)?);
            text.push('\n');
        }
        Format::Jsonl => {
            for item in items {
                text.push_str(&json_line(&item.json())?);
            }
        }
    }
    write(text.as_bytes())?;
    Ok(())
}

/// JSON that says the same and may be looked at: what reorders or hides text, or
/// drives a terminal, is written as its number.
pub(super) fn harmless(json: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        if character.is_ascii() && character != '\x7f' || character.is_alphanumeric() {
            text.push(character);
            continue;
        }
        // Only strings hold anything else.
        for unit in character.encode_utf16(&mut [0; 2]) {
            write!(text, "\\u{unit:04x}").expect("writing to a String cannot fail");
        }
    }
    text
}

pub(super) fn json_line<T: Serialize>(item: &T) -> anyhow::Result<String> {
    let mut line = harmless(&serde_json::to_string(item)?);
    line.push('\n');
    Ok(line)
}

/// Prints one thing as JSON, or as the text that `person` makes of it.
pub(super) fn one<T: Serialize>(
    item: &T,
    format: Format,
    person: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = match format {
        Format::Table | Format::Wide => person(),
        Format::Json => harmless(&serde_json::to_string_pretty(item)?) + "\n",
        Format::Jsonl => json_line(item)?,
    };
    write(text.as_bytes())?;
    Ok(())
}

/// Columns that are shortened when the terminal is narrow; the others are what
/// one looks for.
const FLEXIBLE: [&str; 7] =
    ["PATH", "PATH/PROCESS", "COMMAND", "IMAGE", "POD", "BASELINE", "PROBLEM"];

/// No column is made narrower than this.
const READABLE: u16 = 22;

pub(super) fn table<T: Listed>(items: &[T], style: &Style) -> String {
    let mut table = comfy_table::Table::new();
    // Colour and width are decided by `style`, not found out again.
    table.force_no_tty();
    if style.colour {
        table.enforce_styling();
    }
    table.load_style(presets::NOTHING).set_header(T::header(style.wide));
    match style.width {
        Some(width) => {
            table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
            table.set_truncation_indicator("…");
        }
        None => {
            table.set_content_arrangement(ContentArrangement::Disabled);
        }
    }
    for item in items {
        let cells: Vec<Cell> =
            item.row(style).into_iter().map(|field| cell(field, style)).collect();
        let mut row = comfy_table::Row::from(cells);
        if style.width.is_some() {
            row.max_height(1);
        }
        table.add_row(row);
    }
    for (column, name) in table.column_iter_mut().zip(T::header(style.wide)) {
        column.set_padding((0, 2));
        if style.width.is_some() {
            column.set_constraint(if FLEXIBLE.contains(&name) {
                ColumnConstraint::LowerBoundary(Width::Fixed(READABLE))
            } else {
                ColumnConstraint::ContentWidth
            });
        }
    }
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn cell(field: Field, style: &Style) -> Cell {
    match field {
        Field::Text(text) => Cell::new(if text.is_empty() { "-".to_owned() } else { text }),
        Field::Severity(None) => Cell::new("-"),
        Field::Severity(Some(severity)) => {
            let cell = Cell::new(severity.name().to_uppercase());
            let colour = match severity {
                Severity::Critical | Severity::High => Color::Red,
                Severity::Medium => Color::Yellow,
                Severity::Low => Color::Cyan,
                Severity::Info => return cell,
            };
            if style.colour { cell.fg(colour) } else { cell }
        }
    }
}

/// Writes data to stdout, whole.
pub(super) fn write(text: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text)?;
    out.flush()
}

/// Text that a container may have chosen, fit for a terminal. Text that was made
/// printable before stays as it is.
pub(super) fn safe(text: &str) -> String {
    printable(text.as_bytes()).replace("\\\\", "\\")
}

/// How long ago that was, in one unit.
pub(super) fn age(now: Timestamp, then: Timestamp) -> String {
    format!("{} ago", span(now, then))
}

/// How long it was from `start` to `end`, in one unit.
pub(super) fn span(end: Timestamp, start: Timestamp) -> String {
    let seconds = end.duration_since(start).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A time of day for people, in UTC.
pub(super) fn time(time: Timestamp) -> String {
    time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// Bytes in the unit that fits.
pub(super) fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_that_is_looked_at_says_the_same() {
        for text in ["plain", "größe", "\u{202e}back", "\u{9b}31m", "\x7f", "\u{1f600}", "a\n\"\\"]
        {
            let json = serde_json::to_string(text).unwrap();
            let shown = harmless(&json);
            assert_eq!(serde_json::from_str::<String>(&shown).unwrap(), text);
            assert!(!shown.contains(|c: char| c.is_control() || c == '\u{202e}'), "{shown:?}");
        }
        assert_eq!(harmless("größe"), "größe");
    }

    #[test]
    fn ages_are_told_in_one_unit() {
        let then = Timestamp::UNIX_EPOCH;
        let check = |seconds, expected| {
            assert_eq!(age(Timestamp::from_second(seconds).unwrap(), then), expected);
        };
        check(-5, "0s ago");
        check(59, "59s ago");
        check(60, "1m ago");
        check(3 * 3600, "3h ago");
        check(47 * 3600, "47h ago");
        check(3 * 86_400, "3d ago");
    }

    #[test]
    fn hostile_text_is_escaped_once() {
        assert_eq!(safe("a\u{1b}[2J"), "a\\u{1b}[2J");
        assert_eq!(safe("a\\u{1b}[2J"), "a\\u{1b}[2J");
        assert_eq!(safe("tab\tbell\u{7}\u{202e}"), "tab\\tbell\\u{7}\\u{202e}");
    }

    #[test]
    fn only_hexadecimal_ids_are_shortened() {
        assert_eq!(short("00112233445566778899aabbccddeeff"), "001122334455");
        assert_eq!(short(&format!("sha256:{}", "ab".repeat(32))), "abababababab");
        assert_eq!(short("a-container-with-a-very-long-name-of-its-own"), {
            "a-container-with-a-very-long-name-of-its-own"
        });
    }
}
