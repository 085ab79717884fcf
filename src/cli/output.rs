//! Prints replies: tables for people, JSON and YAML for programs.
//!
//! Owns the output formats and everything that is written to stdout. Text that a container
//! may have chosen is escaped here, so that it cannot drive a terminal.

use std::fmt;
use std::io::{self, IsTerminal as _, Write as _};

use clap::builder::PossibleValue;
use comfy_table::{Cell, Color, ColumnConstraint, ContentArrangement, Width, presets};
use jiff::Timestamp;
use serde::Serialize;
use unicode_width::UnicodeWidthStr as _;

use super::when::zone;
use crate::model::{Severity, is_printable, printable};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// The same keys and values as JSON
    Yaml,
    /// A table of the named values
    Columns(&'static [Column]),
}

impl Format {
    /// Whether people read the output, and not a program.
    pub(super) fn is_for_people(self) -> bool {
        matches!(self, Format::Table | Format::Wide)
    }

    /// Whether items can be printed one by one, in a stream without an end.
    pub(super) fn is_endless(self) -> bool {
        !matches!(self, Format::Json | Format::Columns(_))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Table => "table",
            Format::Wide => "wide",
            Format::Json => "json",
            Format::Jsonl => "jsonl",
            Format::Yaml => "yaml",
            Format::Columns(_) => CUSTOM,
        })
    }
}

const CUSTOM: &str = "custom-columns";

/// A column that the user has named: its heading, and the path of its value in JSON.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Column {
    heading: String,
    path: Vec<String>,
}

impl Column {
    /// Reads `HEADING:.key.key`. A dot within a key is written `\\.`.
    fn parse(text: &str) -> Result<Column, String> {
        let wrong = || format!("`{text}` is no column such as PATH:.file.path");
        let (heading, path) = text.split_once(':').ok_or_else(wrong)?;
        let mut keys = vec![String::new()];
        let mut characters = path.strip_prefix('.').unwrap_or(path).chars();
        while let Some(character) = characters.next() {
            match character {
                '.' => keys.push(String::new()),
                '[' => keys.push(String::new()),
                ']' => (),
                '\\' => keys.last_mut().ok_or_else(wrong)?.extend(characters.next()),
                other => keys.last_mut().ok_or_else(wrong)?.push(other),
            }
        }
        if heading.is_empty() || keys.iter().any(String::is_empty) {
            return Err(wrong());
        }
        Ok(Column { heading: heading.to_owned(), path: keys })
    }

    fn value(&self, json: &serde_json::Value) -> String {
        let found = self.path.iter().try_fold(json, |value, key| match value {
            serde_json::Value::Array(all) => all.get(key.parse::<usize>().ok()?),
            value => value.get(key),
        });
        match found {
            None | Some(serde_json::Value::Null) => "<none>".to_owned(),
            Some(serde_json::Value::String(text)) => safe(text),
            Some(other) => safe(&other.to_string()),
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct FormatParser;

impl clap::builder::ValueParserFactory for Format {
    type Parser = FormatParser;

    fn value_parser() -> FormatParser {
        FormatParser
    }
}

impl clap::builder::TypedValueParser for FormatParser {
    type Value = Format;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<Format, clap::Error> {
        use clap::error::{ContextKind, ContextValue, ErrorKind};
        let text = value.to_string_lossy();
        Ok(match text.to_ascii_lowercase().as_str() {
            "table" => Format::Table,
            "wide" => Format::Wide,
            "json" => Format::Json,
            "jsonl" => Format::Jsonl,
            "yaml" => Format::Yaml,
            _ => {
                let columns = text.split_once('=').filter(|(name, _)| *name == CUSTOM);
                let reason = match columns {
                    Some((_, list)) => {
                        match list.split(',').map(Column::parse).collect::<Result<Vec<_>, _>>() {
                            // Leaked, because it is parsed once and used until the end.
                            Ok(columns) => return Ok(Format::Columns(Box::leak(columns.into()))),
                            Err(reason) => reason,
                        }
                    }
                    None => "known: table, wide, json, jsonl, yaml, \
                             custom-columns=HEADING:.key.key,…"
                        .to_owned(),
                };
                let mut error = clap::Error::new(ErrorKind::ValueValidation).with_cmd(command);
                let name = argument.map(ToString::to_string).unwrap_or_default();
                error.insert(ContextKind::InvalidArg, ContextValue::String(name));
                error.insert(
                    ContextKind::InvalidValue,
                    ContextValue::String(format!("{text} ({reason})")),
                );
                return Err(error);
            }
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(
            [
                PossibleValue::new("table").help("Columns that fit the terminal"),
                PossibleValue::new("wide").help("More columns"),
                PossibleValue::new("json").help("One JSON document"),
                PossibleValue::new("jsonl").help("One JSON object per line"),
                PossibleValue::new("yaml").help("The keys and values of JSON, as YAML"),
                PossibleValue::new("custom-columns=…")
                    .help("A table of HEADING:.key.key, by the keys of JSON, separated by commas"),
            ]
            .into_iter(),
        ))
    }
}

/// The option of commands that print one item.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Output {
    /// How to print the result
    #[arg(short = 'o', long = "output", default_value_t, value_name = "FORMAT")]
    pub(super) format: Format,
}

/// The options of every listing.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Listing {
    /// How to print the list
    #[arg(short, long, default_value_t, value_name = "FORMAT")]
    pub(super) output: Format,
    /// Print IDs and columns in full length
    #[arg(long)]
    pub(super) no_trunc: bool,
    /// Print only what names each line
    #[arg(short, long)]
    pub(super) quiet: bool,
}

impl Listing {
    /// Whether people read the list, and not a program.
    pub(super) fn is_for_people(&self) -> bool {
        self.output.is_for_people() && !self.quiet
    }

    /// Notes on stderr why a list for people is empty.
    pub(super) fn note_if_empty(&self, printed: usize, note: &str) {
        if printed == 0 && self.is_for_people() {
            eprintln!("{note}");
        }
    }
}

/// A type that is printed as a list.
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

/// How a table is drawn, apart from the data.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) wide: bool,
    pub(super) no_trunc: bool,
    pub(super) colour: bool,
    /// The terminal's width; `None` if the table need not fit one.
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

    /// An ID, shortened unless the whole is wanted.
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

/// The first 12 digits of a long hexadecimal ID; other IDs whole.
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
    let mut printer = Printer::new(listing);
    printer.page(items)?;
    printer.end::<T>()
}

/// Prints a listing page by page, and holds no more of it than a page.
pub(super) struct Printer {
    listing: Listing,
    style: Style,
    /// How wide the columns are so far, where there is no terminal to fit.
    widths: Vec<usize>,
    pub(super) printed: usize,
}

impl Printer {
    pub(super) fn new(listing: &Listing) -> Printer {
        let style = Style::of_stdout(listing);
        Printer { listing: *listing, style, widths: Vec::new(), printed: 0 }
    }

    pub(super) fn page<T: Listed>(&mut self, items: &[T]) -> anyhow::Result<()> {
        let mut text = String::new();
        match self.listing.output {
            _ if self.listing.quiet => {
                for item in items {
                    text.push_str(&item.name());
                    text.push('\n');
                }
            }
            Format::Table | Format::Wide => {
                let header = self.printed == 0;
                text = draw(items, &self.style, &mut self.widths, header);
            }
            Format::Json | Format::Jsonl | Format::Yaml | Format::Columns(_) => {
                for item in items {
                    self.item(&item.json(), &mut text)?;
                }
            }
        }
        // A table without rows has a header all the same; `end` prints it.
        if !items.is_empty() {
            write(text.as_bytes())?;
        }
        if self.listing.quiet || self.listing.output.is_for_people() {
            self.printed += items.len();
        }
        Ok(())
    }

    /// Adds one item in a format for programs.
    pub(super) fn item<T: Serialize>(&mut self, item: &T, text: &mut String) -> anyhow::Result<()> {
        match self.listing.output {
            Format::Json => {
                text.push_str(if self.printed == 0 { "[\n  " } else { ",\n  " });
                // Within a string, a line break is written as an escape.
                let json = harmless(&serde_json::to_string_pretty(item)?);
                text.push_str(&json.replace('\n', "\n  "));
            }
            Format::Jsonl => text.push_str(&json_line(item)?),
            Format::Yaml => text.push_str(&yaml(&[item])?),
            Format::Columns(columns) => {
                let json = serde_json::to_value(item)?;
                let row: Vec<Field> =
                    columns.iter().map(|column| column.value(&json).into()).collect();
                let header: Vec<&str> =
                    columns.iter().map(|column| column.heading.as_str()).collect();
                let header = (self.printed == 0).then_some(&header[..]);
                text.push_str(&draw_piped(header, &[row], &mut self.widths, false));
            }
            Format::Table | Format::Wide => (),
        }
        self.printed += 1;
        Ok(())
    }

    pub(super) fn end<T: Listed>(self) -> anyhow::Result<()> {
        let text = match self.listing.output {
            _ if self.listing.quiet => String::new(),
            Format::Table | Format::Wide if self.printed == 0 => {
                draw::<T>(&[], &self.style, &mut Vec::new(), true)
            }
            _ => self.end_of_items(),
        };
        write(text.as_bytes())?;
        Ok(())
    }

    /// What closes a document.
    pub(super) fn end_of_items(&self) -> String {
        match (self.listing.output, self.printed) {
            _ if self.listing.quiet => String::new(),
            (Format::Json | Format::Yaml, 0) => "[]\n".to_owned(),
            (Format::Json, _) => "\n]\n".to_owned(),
            (_, _) => String::new(),
        }
    }
}

/// A list in a format for programs, as one text.
pub(super) fn items<T: Serialize>(items: &[T], format: Format) -> anyhow::Result<String> {
    let listing = Listing { output: format, no_trunc: false, quiet: false };
    let mut printer = Printer::new(&listing);
    let mut text = String::new();
    for item in items {
        printer.item(item, &mut text)?;
    }
    Ok(text + &printer.end_of_items())
}

/// YAML with the keys and values of JSON, safe for a terminal as in [`harmless`].
pub(super) fn yaml<T: Serialize + ?Sized>(item: &T) -> anyhow::Result<String> {
    let yaml = serde_saphyr::to_string(&Quoted(&serde_json::to_value(item)?))?;
    let mut text = String::with_capacity(yaml.len());
    for character in yaml.chars() {
        match character {
            '\n' => text.push(character),
            // Only text in double quotes holds them: see `Quoted`.
            _ if !is_printable(character) => {
                text.push_str(&format!("\\U{:08x}", u32::from(character)));
            }
            _ => text.push(character),
        }
    }
    Ok(text)
}

/// JSON whose strings are in double quotes where they need escapes.
struct Quoted<'a>(&'a serde_json::Value);

impl Serialize for Quoted<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let text = |text: &String, serializer: S| match text.chars().all(is_printable) {
            true => serializer.serialize_str(text),
            false => serde_saphyr::DoubleQuoted(text).serialize(serializer),
        };
        match self.0 {
            serde_json::Value::String(value) => text(value, serializer),
            serde_json::Value::Array(values) => serializer.collect_seq(values.iter().map(Quoted)),
            serde_json::Value::Object(values) => {
                let keys: Vec<_> = values
                    .iter()
                    .map(|(key, value)| (serde_json::Value::String(key.clone()), value))
                    .collect();
                serializer.collect_map(keys.iter().map(|(key, value)| (Quoted(key), Quoted(value))))
            }
            other => other.serialize(serializer),
        }
    }
}

/// The same JSON, safe for a terminal: characters that drive a terminal, or reorder or hide
/// text, are escaped.
pub(super) fn harmless(json: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(json.len());
    for character in json.chars() {
        if character == '\n' || is_printable(character) {
            text.push(character);
            continue;
        }
        // JSON holds such characters in strings only.
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

/// Prints one item in a format for programs, or as the text for people.
pub(super) fn one<T: Serialize>(
    item: &T,
    format: Format,
    text_for_people: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = match format {
        Format::Table | Format::Wide => text_for_people(),
        Format::Json => harmless(&serde_json::to_string_pretty(item)?) + "\n",
        Format::Jsonl => json_line(item)?,
        Format::Yaml => yaml(item)?,
        Format::Columns(_) => {
            let listing = Listing { output: format, no_trunc: false, quiet: false };
            let mut text = String::new();
            Printer::new(&listing).item(item, &mut text)?;
            text
        }
    };
    write(text.as_bytes())?;
    Ok(())
}

/// Columns that are shortened on a narrow terminal. The others stay whole, because people
/// search for their values.
const FLEXIBLE: [&str; 7] =
    ["PATH", "PATH/PROCESS", "COMMAND", "IMAGE", "POD", "BASELINE", "PROBLEM"];

/// No column is made narrower than this.
const READABLE: u16 = 22;

/// A longer cell does not widen its column, where there is no terminal to fit.
const WIDEST: usize = 64;

#[cfg(test)]
pub(super) fn table<T: Listed>(items: &[T], style: &Style) -> String {
    draw(items, style, &mut Vec::new(), true)
}

fn draw<T: Listed>(
    items: &[T],
    style: &Style,
    widths: &mut Vec<usize>,
    with_header: bool,
) -> String {
    let header = T::header(style.wide);
    let rows: Vec<Vec<Field>> = items.iter().map(|item| item.row(style)).collect();
    match style.width {
        Some(width) => draw_to_fit(&header, rows, style, width, with_header),
        None => draw_piped(with_header.then_some(&header[..]), &rows, widths, style.colour),
    }
}

impl Field {
    fn text(&self) -> String {
        match self {
            Field::Text(text) if text.is_empty() => "-".to_owned(),
            Field::Text(text) => text.clone(),
            Field::Severity(None) => "-".to_owned(),
            Field::Severity(Some(severity)) => severity.name().to_uppercase(),
        }
    }
}

/// A table of aligned columns, each as wide as its cells need.
fn draw_piped(
    header: Option<&[&str]>,
    rows: &[Vec<Field>],
    widths: &mut Vec<usize>,
    colour: bool,
) -> String {
    let texts: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(Field::text).collect()).collect();
    let mut widen = |cells: &mut dyn Iterator<Item = &str>| {
        for (index, cell) in cells.enumerate() {
            if widths.len() <= index {
                widths.push(0);
            }
            let needed = cell.width();
            if needed <= WIDEST {
                widths[index] = widths[index].max(needed);
            }
        }
    };
    widen(&mut header.unwrap_or_default().iter().copied());
    for row in &texts {
        widen(&mut row.iter().map(String::as_str));
    }
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = (&str, Option<Severity>)>| {
        let mut line = String::new();
        for (index, (cell, severity)) in cells.enumerate() {
            match severity {
                Some(severity) => line.push_str(&coloured(severity, cell.to_owned(), colour)),
                None => line.push_str(cell),
            }
            let free = widths.get(index).map_or(0, |width| width.saturating_sub(cell.width()));
            line.extend(std::iter::repeat_n(' ', free + 2));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    };
    if let Some(header) = header {
        line(&mut header.iter().map(|cell| (*cell, None)));
    }
    for (row, cells) in rows.iter().zip(&texts) {
        let severities = row.iter().map(|field| match field {
            Field::Severity(severity) => *severity,
            Field::Text(_) => None,
        });
        line(&mut cells.iter().map(String::as_str).zip(severities));
    }
    text
}

/// Text in the colour of a severity.
pub(super) fn coloured(severity: Severity, text: String, colour: bool) -> String {
    match (colour, severity) {
        (true, Severity::Critical | Severity::High) => format!("\x1b[31m{text}\x1b[0m"),
        (true, Severity::Medium) => format!("\x1b[33m{text}\x1b[0m"),
        (true, Severity::Low) => format!("\x1b[36m{text}\x1b[0m"),
        (true, Severity::Info) | (false, _) => text,
    }
}

/// The columns for which a terminal has room. The first column, those that are shortened and
/// the last one, an ID, are left out last.
fn columns_that_fit(header: &[&str], rows: &[Vec<Field>], width: usize) -> Vec<usize> {
    let needed = |index: usize| {
        let content =
            rows.iter().filter_map(|row| row.get(index)).map(|field| field.text().width());
        let content = content.chain([header[index].width()]).max().unwrap_or(0);
        let is_flexible = FLEXIBLE.contains(&header[index]);
        2 + if is_flexible { content.min(usize::from(READABLE)) } else { content }
    };
    let mut columns: Vec<usize> = (0..header.len()).collect();
    let last = header.len().saturating_sub(1);
    loop {
        let total: usize = columns.iter().map(|index| needed(*index)).sum();
        let spare = columns.iter().rposition(|index| {
            *index != 0 && *index != last && !FLEXIBLE.contains(&header[*index])
        });
        let spare = spare.or_else(|| {
            let flexible = |index: &usize| FLEXIBLE.contains(&header[*index]);
            let several = columns.iter().filter(|index| flexible(index)).count() > 1;
            columns.iter().rposition(|index| several && *index != 0 && flexible(index))
        });
        match spare {
            Some(spare) if total > width => drop(columns.remove(spare)),
            _ => return columns,
        }
    }
}

fn draw_to_fit(
    header: &[&str],
    rows: Vec<Vec<Field>>,
    style: &Style,
    width: u16,
    with_header: bool,
) -> String {
    let columns = columns_that_fit(header, &rows, usize::from(width));
    let mut table = comfy_table::Table::new();
    // `style` has decided on colour and width.
    table.force_no_tty();
    if style.colour {
        table.enforce_styling();
    }
    table.load_style(presets::NOTHING);
    if with_header {
        table.set_header(columns.iter().map(|index| header[*index]));
    }
    table.set_content_arrangement(ContentArrangement::Dynamic).set_width(width);
    table.set_truncation_indicator("…");
    for fields in rows {
        let mut fields: Vec<Option<Field>> = fields.into_iter().map(Some).collect();
        let cells: Vec<Cell> = columns
            .iter()
            .filter_map(|index| fields.get_mut(*index).and_then(Option::take))
            .map(|field| cell(field, style))
            .collect();
        let mut row = comfy_table::Row::from(cells);
        row.max_height(1);
        table.add_row(row);
    }
    let is_narrow = usize::from(width) < columns.len() * usize::from(READABLE);
    for (column, index) in table.column_iter_mut().zip(&columns) {
        column.set_padding((0, 2));
        column.set_constraint(match FLEXIBLE.contains(&header[*index]) {
            true if is_narrow => ColumnConstraint::LowerBoundary(Width::Fixed(4)),
            true => ColumnConstraint::LowerBoundary(Width::Fixed(READABLE)),
            false => ColumnConstraint::ContentWidth,
        });
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

/// Text that a container may have chosen, safe for a terminal. Text that was escaped before
/// stays as it is.
pub(super) fn safe(text: &str) -> String {
    printable(text.as_bytes()).replace("\\\\", "\\")
}

/// How long ago `then` was, in one unit.
pub(super) fn age(now: Timestamp, then: Timestamp) -> String {
    format!("{} ago", span(now, then))
}

/// The time from `start` to `end`, in one unit.
pub(super) fn span(end: Timestamp, start: Timestamp) -> String {
    let seconds = end.duration_since(start).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// A time of day for people, in UTC unless they have asked for local time.
pub(super) fn time(time: Timestamp) -> String {
    time.to_zoned(zone()).strftime("%Y-%m-%d %H:%M:%S %Z").to_string()
}

/// The same without the date.
pub(super) fn clock(time: Timestamp) -> String {
    time.to_zoned(zone()).strftime("%H:%M:%S %Z").to_string()
}

/// Bytes in the unit that fits.
pub(super) fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harmless_json_has_the_same_meaning() {
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
    fn ages_are_written_in_one_unit() {
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
