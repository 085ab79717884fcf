//! `driftd timeline`: what happened in one container, one line for each entry.
//!
//! Owns the JSON `driftd.timeline/v1` and the lines for people. An entry of a kind that only a
//! newer driftd knows is left out.

use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, Server, explain, talk};
use super::describe::{command_line, quoted, subject};
use super::exit::Exit;
use super::gap::{self, GapJson};
use super::output::{Format, Listing, Printer, colour, coloured, safe, short, time, write};
use super::pages::{fetch_pages, page};
use super::sessions::{in_short, result};
use super::when::{self, When};
use crate::api::convert::{Malformed, timeline_entry_from_proto};
use crate::api::proto;
use crate::history::{Happened, TimelineEntry};
use crate::model::{
    Command, ContainerId, Finding, FindingId, Incarnation, Outcome, ProcessIdentity, Session,
    SessionId,
};
use crate::respond::Response;

/// How many characters of a command are printed without `--no-trunc`.
const LONG: usize = 160;

#[derive(Debug, clap::Args)]
pub(super) struct Timeline {
    /// A container's whole ID, NAMESPACE/ID, or 8 or more digits of a hexadecimal ID
    container: String,
    /// Only what happened after this time: 2h, yesterday, 2026-11-27, 14:30, RFC 3339
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = when::parse)]
    since: Option<When>,
    /// Only what happened before this time
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = when::parse)]
    until: Option<When>,
    #[command(flatten)]
    listing: Listing,
}

#[derive(Serialize)]
struct EntryJson {
    schema: &'static str,
    at: Timestamp,
    /// Which of the last five keys is not null.
    #[serde(rename = "type")]
    kind: &'static str,
    container: ContainerId,
    /// The session that the entry opens, belongs to or closes.
    session_id: Option<SessionId>,
    session: Option<Session>,
    command: Option<Command>,
    finding: Option<Finding>,
    response: Option<ResponseJson>,
    gap: Option<GapJson>,
}

/// A response as `timeline` and `report` print it.
#[derive(Debug, Serialize)]
pub(super) struct ResponseJson {
    schema: &'static str,
    container: ContainerId,
    pub(super) reason: String,
    pub(super) requested_by: String,
    requested_at: Timestamp,
    pub(super) finding: Option<FindingId>,
    incarnation: Option<Incarnation>,
    /// The process that was meant, if it was one.
    pub(super) process: Option<ProcessIdentity>,
    pub(super) outcome: Outcome,
}

impl From<Response> for ResponseJson {
    fn from(response: Response) -> ResponseJson {
        ResponseJson {
            schema: "driftd.response/v1",
            container: response.container,
            reason: response.reason,
            requested_by: response.requested_by,
            requested_at: response.requested_at,
            finding: response.finding,
            incarnation: response.incarnation,
            process: response.process,
            outcome: response.outcome,
        }
    }
}

impl Timeline {
    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        talk(server, |client| self.print(client))
    }

    /// Prints each page as it comes.
    async fn print(self, mut client: Client) -> anyhow::Result<Exit> {
        let (since, until) =
            (when::to_proto(self.since.as_ref())?, when::to_proto(self.until.as_ref())?);
        let (mut printed, mut printer) = (0, Printer::new(&self.listing));
        let mut container = self.container;
        let fetch = async |page_size, page_token| {
            let request = proto::GetTimelineRequest {
                container: container.clone(),
                since,
                until,
                page_size,
                page_token,
                as_json: true,
            };
            let found = client.get_timeline(request).await.map_err(explain)?.into_inner();
            // From now on the whole ID: a later container may have an ID that begins alike.
            container = format!("{}/{}", found.namespace, found.container);
            let id = ContainerId::new(&found.namespace, &found.container);
            let entry = |entry| Ok::<_, Malformed>((timeline_entry_from_proto(entry)?, id.clone()));
            page(found.entries, found.next_page_token, entry)
        };
        let print = |entries: Vec<(Option<TimelineEntry>, ContainerId)>| -> anyhow::Result<()> {
            let mut text = String::new();
            for (entry, container) in entries {
                // An entry that only a newer driftd knows.
                let Some(entry) = entry else { continue };
                printed += 1;
                match self.listing.output {
                    _ if self.listing.quiet => text += &format!("{}\n", name(&entry)),
                    Format::Table | Format::Wide => {
                        text += &line(&entry, &self.listing, colour());
                    }
                    Format::Json | Format::Jsonl | Format::Yaml | Format::Columns(_) => {
                        printer.item(&json(entry, &container), &mut text)?;
                    }
                }
            }
            Ok(write(text.as_bytes())?)
        };
        fetch_pages(String::new(), usize::MAX, fetch, print).await?;
        write(printer.end_of_items().as_bytes())?;
        let note = "nothing is recorded for that time (is the view complete? see: driftd status)";
        self.listing.note_if_empty(printed, note);
        Ok(Exit::Clean)
    }
}

/// What `-q` prints.
fn name(entry: &TimelineEntry) -> String {
    match &entry.what {
        Happened::SessionOpened(session) | Happened::SessionClosed(session) => {
            session.id.to_string()
        }
        Happened::Command(command) => format!("{}#{}", command.session, command.number),
        Happened::Finding(finding) => finding.id.to_string(),
        Happened::Response(response) => safe(&response.outcome.action),
        Happened::Gap { name, .. } => safe(name),
    }
}

/// One entry in one line. An entry of a session is indented and names the session.
fn line(entry: &TimelineEntry, listing: &Listing, colour: bool) -> String {
    let id = |id: String| if listing.no_trunc { id } else { short(&id) };
    let of = |session: SessionId| format!("  [{}] ", id(session.to_string()));
    let is_wide = listing.output == Format::Wide;
    let what = match &entry.what {
        Happened::SessionOpened(session) => format!(
            "[{}] session opened: {}",
            id(session.id.to_string()),
            cut(in_short(session), listing.no_trunc)
        ),
        Happened::Command(command) => {
            let run = cut(program(command), listing.no_trunc);
            let end = result(command.started_at, command.ended_at, command.exit);
            let end = end.map(|end| format!(" ({end})")).unwrap_or_default();
            let pid = if is_wide { format!(" pid {}", command.process.pid) } else { String::new() };
            format!("{}#{} {run}{end}{pid}", of(command.session), command.number)
        }
        Happened::Finding(finding) => {
            let severity =
                coloured(finding.severity, finding.severity.name().to_uppercase(), colour);
            let by = match (&finding.file, &finding.process) {
                (Some(_), Some(process)) if is_wide => {
                    format!(" by {}", cut(command_line(process), listing.no_trunc))
                }
                (_, _) => String::new(),
            };
            format!(
                "{}{severity} {} {}{by} ({})",
                finding.session.map(of).unwrap_or_default(),
                finding.kind,
                cut(subject(finding), listing.no_trunc),
                id(finding.id.to_string())
            )
        }
        Happened::SessionClosed(session) => format!(
            "[{}] session closed: {}",
            id(session.id.to_string()),
            result(session.started_at, session.ended_at, session.exit)
                .unwrap_or_else(|| "its end was not seen".to_owned())
        ),
        Happened::Response(response) => {
            let Response { outcome, requested_by, reason, .. } = &**response;
            format!(
                "response {} {}: {} (asked by {}, because {})",
                safe(&outcome.action),
                if outcome.succeeded { "done" } else { "FAILED" },
                safe(&outcome.message),
                safe(requested_by),
                safe(reason)
            )
        }
        Happened::Gap { name, container, detail, until } => format!(
            "gap {}{}: {}{}",
            safe(name),
            if container.is_some() { "" } else { " (any container)" },
            safe(detail),
            until.map(|until| format!(" (over at {})", time(until))).unwrap_or_default()
        ),
    };
    format!("{}  {what}\n", time(entry.at))
}

/// The program of a command, as far as it is known.
pub(super) fn program(command: &Command) -> String {
    match (&command.argv, &command.exe) {
        (Some(argv), _) if !argv.is_empty() => quoted(argv),
        (_, Some(exe)) => safe(exe),
        (_, None) => "a program that was gone too soon".to_owned(),
    }
}

/// The text, shortened unless the whole is wanted.
fn cut(text: String, whole: bool) -> String {
    if whole {
        return text;
    }
    match text.char_indices().nth(LONG) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}

fn json(entry: TimelineEntry, container: &ContainerId) -> EntryJson {
    let mut json = EntryJson {
        schema: "driftd.timeline/v1",
        at: entry.at,
        kind: "",
        container: container.clone(),
        session_id: None,
        session: None,
        command: None,
        finding: None,
        response: None,
        gap: None,
    };
    match entry.what {
        Happened::SessionOpened(session) => {
            (json.kind, json.session_id) = ("session_opened", Some(session.id));
            json.session = Some(*session);
        }
        Happened::SessionClosed(session) => {
            (json.kind, json.session_id) = ("session_closed", Some(session.id));
            json.session = Some(*session);
        }
        Happened::Command(command) => {
            (json.kind, json.session_id) = ("command", Some(command.session));
            json.command = Some(*command);
        }
        Happened::Finding(finding) => {
            (json.kind, json.session_id) = ("finding", finding.session);
            json.finding = Some(*finding);
        }
        Happened::Response(response) => {
            json.kind = "response";
            json.response = Some((*response).into());
        }
        Happened::Gap { name, container, detail, until } => {
            json.kind = "gap";
            let schema = gap::SCHEMA;
            json.gap = Some(GapJson { schema, name, at: entry.at, container, detail, until });
        }
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::sessions::tests::{assert_clean, samples};

    fn entries() -> Vec<TimelineEntry> {
        let evil = "\u{1b}[2J\r\u{202e}".to_owned();
        let at: Timestamp = "2026-11-20T10:00:00.25Z".parse().unwrap();
        let command: Command =
            serde_json::from_str(include_str!("../../tests/data/command.json")).unwrap();
        let hostile = Command {
            number: 2,
            argv: Some(vec![evil.clone(), "x".repeat(500)]),
            ended_at: None,
            exit: None,
            ..command.clone()
        };
        let gone = Command { number: 3, argv: None, exe: None, ..command.clone() };
        let finding = crate::cli::findings::tests::sample();
        let mut alone = crate::cli::findings::tests::samples().remove(2);
        alone.session = None;
        let response = Response {
            process: None,
            pod: None,
            image: None,
            case: None,
            changed: true,
            ticket: 0,
            incarnation: None,
            container: ContainerId::new("default", "web"),
            reason: evil.clone(),
            requested_by: evil.clone(),
            requested_at: at,
            finding: None,
            outcome: Outcome {
                action: "kill".into(),
                succeeded: false,
                gone: false,
                message: evil.clone(),
                restarter: None,
                at,
            },
        };
        let gap = |container, until| Happened::Gap {
            name: "pipeline_full".into(),
            container,
            detail: evil.clone(),
            until,
        };
        let mut sessions = samples().into_iter().map(Box::new);
        let mut session = || sessions.next().unwrap();
        let first = session();
        vec![
            Happened::SessionOpened(first.clone()),
            Happened::Command(Box::new(command)),
            Happened::Finding(Box::new(finding)),
            Happened::Command(Box::new(hostile)),
            Happened::Command(Box::new(gone)),
            Happened::SessionClosed(first),
            Happened::SessionOpened(session()),
            Happened::SessionOpened(session()),
            Happened::SessionClosed(samples().pop().map(Box::new).unwrap()),
            Happened::Finding(Box::new(alone)),
            Happened::Response(Box::new(response)),
            gap(None, None),
            gap(Some(ContainerId::new("default", "web")), Some(at)),
        ]
        .into_iter()
        .map(|what| TimelineEntry { at, what })
        .collect()
    }

    fn listing(output: Format) -> Listing {
        Listing { output, no_trunc: false, quiet: false }
    }

    fn lines(listing: &Listing, colour: bool) -> String {
        entries().iter().map(|entry| line(entry, listing, colour)).collect()
    }

    #[test]
    fn a_timeline_as_people_see_it() {
        insta::assert_snapshot!(lines(&listing(Format::Table), false));
        insta::assert_snapshot!(lines(&listing(Format::Wide), false));
        let names: Vec<String> = entries().iter().map(name).collect();
        assert_eq!(names[1], "ffeeddccbbaa99887766554433221100#1");
        assert_clean(&names.join("\n"));
    }

    #[test]
    fn hostile_text_stays_in_its_line() {
        for no_trunc in [false, true] {
            let listing = Listing { no_trunc, ..listing(Format::Wide) };
            let text = lines(&listing, false);
            assert_clean(&text);
            assert_eq!(text.lines().count(), entries().len());
            assert_eq!(text.contains(&"x".repeat(500)), no_trunc);
            // Colour adds nothing that is not in the text.
            let mut coloured = lines(&listing, true);
            assert!(coloured.contains("\u{1b}[31mCRITICAL\u{1b}[0m"), "{coloured}");
            for code in ["\u{1b}[31m", "\u{1b}[36m", "\u{1b}[0m"] {
                coloured = coloured.replace(code, "");
            }
            assert_eq!(coloured, text);
        }
    }

    #[test]
    fn json_of_an_entry_names_its_type_and_session() {
        let container = ContainerId::new("default", "web");
        let all: Vec<serde_json::Value> = entries()
            .into_iter()
            .map(|entry| serde_json::to_value(json(entry, &container)).unwrap())
            .collect();
        for entry in &all {
            assert_eq!(entry["schema"], "driftd.timeline/v1");
            let key = match entry["type"].as_str().unwrap() {
                "session_opened" | "session_closed" => "session",
                other => other,
            };
            for one in ["session", "command", "finding", "response", "gap"] {
                assert_eq!(entry[one].is_null(), one != key, "{entry}");
            }
            assert!(entry[key]["schema"].as_str().unwrap().starts_with("driftd."), "{entry}");
        }
        assert_eq!(all[1]["session_id"], all[0]["session"]["id"]);
    }
}
