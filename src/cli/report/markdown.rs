//! A report as Markdown (CommonMark with GitHub's tables).
//!
//! Pure. Text that others have chosen stands in code spans, in which nothing is markup. It
//! cannot end its span, its cell or its line.

use std::fmt::Write as _;

use super::page::Page;
use super::phrase::{Part, Phrase, Row};

pub(super) fn markdown(page: &Page) -> String {
    let mut out = Document(String::new());
    out.heading(1, &say(&page.title));
    out.paragraph(&say(&page.about));
    let tile =
        |tile: &super::page::Tile| format!("**{}** {}", plain(&tile.value), plain(&tile.label));
    out.paragraph(&page.tiles.iter().map(tile).collect::<Vec<_>>().join(" · "));
    out.heading(2, "In short");
    out.list(&page.summary);
    what_happened(&mut out, page);
    who_came_in(&mut out, page);
    what_was_found(&mut out, page);
    what_was_answered(&mut out, page);
    what_was_not_seen(&mut out, page);
    out.heading(2, "The container");
    out.rows(&page.container);
    out.heading(2, "About this report");
    out.rows(&page.made);
    out.paragraph(
        "Text in `this type` was chosen by a container, an image, a user or a rule. A character \
         that cannot be shown is written as `\\n`, `\\u{HEX}` or `\\xHH`; so is a vertical bar, as \
         `\\x7c`.",
    );
    out.0
}

fn what_happened(out: &mut Document, page: &Page) {
    out.heading(2, "What happened");
    let Some(drawing) = &page.drawing else {
        out.paragraph("Nothing is recorded for this time.");
        return;
    };
    out.paragraph(&plain(
        &drawing.description.replace(" The table of events has the same in words.", ""),
    ));
    let row = |event: &super::events::EventText| {
        vec![plain(&event.at.text), plain(event.class), say(&event.what)]
    };
    out.table(&["Time", "Type", "Event"], page.events.list.iter().map(row));
    if page.events.left_out > 0 {
        out.paragraph(&format!(
            "Left out: {}, those of low severity first; the lists below have them.",
            page.events.left_out
        ));
    }
}

fn who_came_in(out: &mut Document, page: &Page) {
    out.heading(2, "Who came in");
    out.note(page.sessions.note.as_ref());
    for session in &page.sessions.list {
        out.heading(3, &format!("Session: {}", say(&session.title)));
        out.paragraph(&plain(&session.sentence));
        out.rows(&session.rows);
        out.paragraph(&plain(&session.commands_note));
        if !session.commands.is_empty() {
            let row = |command: &super::page::CommandText| {
                let number = command.number.to_string();
                vec![number, plain(&command.at.text), say(&command.command), plain(&command.end)]
            };
            out.table(&["#", "Started", "Command", "End"], session.commands.iter().map(row));
        }
    }
}

fn what_was_found(out: &mut Document, page: &Page) {
    out.heading(2, "What was found");
    out.note(page.findings.note.as_ref());
    for finding in &page.findings.list {
        let severity = finding.severity.to_uppercase();
        let kind = plain(finding.kind);
        out.heading(3, &format!("{severity} {kind} {}", say(&finding.subject)));
        out.paragraph(&plain(finding.sentence));
        out.rows(&finding.rows);
    }
}

fn what_was_answered(out: &mut Document, page: &Page) {
    out.heading(2, "What was answered");
    out.note(page.responses.note.as_ref());
    if !page.responses.list.is_empty() {
        let row = |response: &super::page::ResponseText| {
            vec![
                plain(&response.at.text),
                say(&response.what),
                plain(response.result),
                say(&response.message),
                say(&response.asked_by),
                say(&response.reason),
            ]
        };
        let header = ["Time", "Response", "Result", "Message", "Asked by", "Reason"];
        out.table(&header, page.responses.list.iter().map(row));
    }
    if !page.rules.is_empty() {
        out.paragraph("Rules that the findings name:");
        let row = |rule: &super::page::RuleText| {
            let (findings, accepted) = (rule.findings.to_string(), rule.accepted.to_string());
            vec![say(&rule.id), findings, accepted, say(&rule.effect), say(&rule.reason)]
        };
        let header = ["Rule", "Findings", "Accepted", "Effect", "Reason"];
        out.table(&header, page.rules.iter().map(row));
    }
}

fn what_was_not_seen(out: &mut Document, page: &Page) {
    out.heading(2, "What was not seen");
    if !page.gaps.is_empty() {
        let row = |gap: &super::page::GapText| {
            let (from, until) = (plain(&gap.at.text), plain(&gap.until));
            vec![from, until, say(&gap.what), plain(gap.place), say(&gap.detail)]
        };
        out.table(&["From", "Until", "Gap", "Where", "Detail"], page.gaps.iter().map(row));
    }
    out.list(&page.unseen);
}

struct Document(String);

impl Document {
    fn add(&mut self, text: &str) {
        self.0.push_str(text);
        self.0.push('\n');
    }

    fn heading(&mut self, level: usize, text: &str) {
        if !self.0.is_empty() {
            self.0.push('\n');
        }
        self.add(&format!("{} {text}", "#".repeat(level)));
    }

    fn paragraph(&mut self, text: &str) {
        self.add(&format!("\n{text}"));
    }

    fn note(&mut self, note: Option<&Phrase>) {
        if let Some(note) = note {
            self.paragraph(&say(note));
        }
    }

    fn list(&mut self, phrases: &[Phrase]) {
        self.0.push('\n');
        for phrase in phrases {
            self.add(&format!("- {}", say(phrase)));
        }
    }

    fn rows(&mut self, rows: &[Row]) {
        let row = |(label, lines): &Row| {
            let lines: Vec<String> = lines.iter().map(say).collect();
            vec![plain(label), lines.join("; ")]
        };
        self.table(&["", ""], rows.iter().map(row));
    }

    fn table(&mut self, header: &[&str], rows: impl Iterator<Item = Vec<String>>) {
        self.add(&format!("\n| {} |", header.join(" | ")));
        self.add(&format!("|{}", " --- |".repeat(header.len())));
        for cells in rows {
            self.add(&format!("| {} |", cells.join(" | ")));
        }
    }
}

fn say(phrase: &Phrase) -> String {
    let part = |part: &Part| match part {
        Part::Own(text) => plain(text),
        Part::Quoted(text) => code(text),
        Part::Link { id, .. } => code(id),
    };
    phrase.parts.iter().map(part).collect()
}

/// The report's own words. Names of ours may hold characters that are markup elsewhere.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for character in text.chars() {
        if "\\`*_[]<|".contains(character) {
            plain.push('\\');
        }
        plain.push(character);
    }
    plain
}

/// A code span: it begins and ends with more backticks than the text has in a row. Readers of
/// tables do not agree on how a vertical bar is escaped, so there is none.
fn code(text: &str) -> String {
    let text = text.replace('|', "\\x7c");
    if text.chars().all(|one| one == ' ') {
        return format!("({} spaces)", text.len());
    }
    let longest = text.split(|one| one != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest + 1);
    let mut code = String::new();
    // A space at each end is taken off again, if the text has others.
    let needs_space = text.starts_with(['`', ' ']) || text.ends_with(['`', ' ']);
    let space = if needs_space { " " } else { "" };
    write!(code, "{fence}{space}{text}{space}{fence}").expect("writing to a String cannot fail");
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_leave_its_code_span() {
        assert_eq!(code("/tmp/x"), "`/tmp/x`");
        assert_eq!(code("a`b"), "``a`b``");
        assert_eq!(code("``` | <script>"), "```` ``` \\x7c <script> ````");
        assert_eq!(code("\\"), "`\\`");
        assert_eq!(code(" x "), "`  x  `");
        assert_eq!(code("  "), "(2 spaces)");
        assert_eq!(code(""), "(0 spaces)");
    }

    proptest::proptest! {
        #[test]
        fn a_code_span_holds_no_fence_of_its_own(text in "[`| a\\\\]{1,12}") {
            let span = code(&text);
            proptest::prop_assert!(!span.contains('|'));
            if let Some(rest) = span.strip_prefix('`') {
                let fence = 1 + rest.len() - rest.trim_start_matches('`').len();
                let inner = &span[fence..span.len() - fence];
                let runs = inner.split(|one| one != '`').map(str::len);
                proptest::prop_assert!(runs.into_iter().all(|run| run < fence), "{span}");
                proptest::prop_assert!(!inner.starts_with('`') && !inner.ends_with('`'));
            }
        }
    }
}
