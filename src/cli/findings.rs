//! `driftd findings`

use std::path::Path;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use jiff::Timestamp;
use serde::Serialize;
use tokio_stream::StreamExt as _;

use super::client::{Client, explain, talk};
use super::containers::pod;
use super::exit::Exit;
use super::output::{
    Field, Format, Listed, Listing, Style, age, json_line, list, safe, short, write,
};
use crate::api::{convert, proto};
use crate::config::parse_duration;
use crate::model::{Finding, Kind, Process, Severity};

/// Findings asked for at once.
const PAGE: u32 = 1000;

#[derive(Debug, clap::Args)]
pub(super) struct Findings {
    #[command(flatten)]
    filter: Filter,
    /// Keep printing what is found, oldest first, until interrupted
    #[arg(long, conflicts_with_all = ["limit", "exit_code"])]
    follow: bool,
    /// With --follow: only what comes after this cursor (0: everything kept)
    #[arg(long, value_name = "CURSOR", requires = "follow", default_value_t = 0)]
    after: u64,
    /// Print at most this many, the newest
    #[arg(long, value_name = "NUMBER")]
    limit: Option<usize>,
    /// Exit with 1 when anything is listed
    #[arg(long)]
    exit_code: bool,
    #[command(flatten)]
    listing: Listing,
}

#[derive(Debug, clap::Args)]
struct Filter {
    /// Only of this container: its whole ID, NAMESPACE/ID, or 8 or more digits of a hexadecimal ID
    #[arg(long, value_name = "CONTAINER")]
    container: Option<String>,
    /// Only of this image: a name or a manifest digest
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// Only of this kind (may be repeated)
    #[arg(long, value_name = "KIND", value_parser = kind_parser())]
    kind: Vec<Kind>,
    /// Only of this severity and above
    #[arg(long, value_name = "SEVERITY", value_parser = severity_parser())]
    severity: Option<Severity>,
    /// Only what was last seen after this time (RFC 3339), or in this span back from now
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Only what was first seen before this time (RFC 3339), or before this span back from now
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<Timestamp>,
}

fn kind_parser() -> impl clap::builder::TypedValueParser<Value = Kind> {
    PossibleValuesParser::new(Kind::ALL.iter().map(|kind| kind.name()))
        .map(|name| name.parse().expect("clap lets only names of kinds through"))
}

fn severity_parser() -> impl clap::builder::TypedValueParser<Value = Severity> {
    PossibleValuesParser::new(Severity::ALL.iter().map(|severity| severity.name()))
        .map(|name| name.parse().expect("clap lets only names of severities through"))
}

/// A point in time: written out, or as a span back from now.
pub(super) fn parse_time(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let span = parse_duration(text).map_err(|_| {
        "neither a time such as 2026-11-20T10:00:00Z nor a span such as 2h".to_owned()
    })?;
    Timestamp::now().checked_sub(span).map_err(|err| err.to_string())
}

impl Filter {
    fn to_proto(&self) -> proto::FindingFilter {
        proto::FindingFilter {
            container: self.container.clone().unwrap_or_default(),
            image: self.image.clone().unwrap_or_default(),
            kinds: self.kind.iter().map(|kind| kind.name().to_owned()).collect(),
            minimum_severity: self
                .severity
                .map_or(proto::Severity::Unspecified, convert::severity_to_proto)
                .into(),
            since: self.since.map(convert::time_to_proto),
            until: self.until.map(convert::time_to_proto),
        }
    }
}

impl Findings {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        if self.follow {
            if self.listing.output == Format::Json {
                eprintln!("error: a stream never ends: use -o jsonl with --follow");
                return Ok(Exit::Usage);
            }
            return talk(socket, |client| self.follow(client));
        }
        let findings = talk(socket, |client| fetch(client, self.filter.to_proto(), self.limit))?;
        list(&findings, &self.listing)?;
        if findings.is_empty() && self.listing.output == Format::Table && !self.listing.quiet {
            eprintln!("nothing was found (is the view complete? see: driftd status)");
        }
        Ok(if self.exit_code && !findings.is_empty() { Exit::Drift } else { Exit::Clean })
    }

    async fn follow(self, mut client: Client) -> anyhow::Result<Exit> {
        let request = proto::FollowFindingsRequest {
            filter: Some(self.filter.to_proto()),
            after_cursor: Some(self.after),
            sessions: false,
        };
        let mut stream = client.follow_findings(request).await.map_err(explain)?.into_inner();
        let mut cursor = self.after;
        let colour = super::output::colour();
        while let Some(message) = stream.next().await {
            let message = message.map_err(explain)?;
            cursor = cursor.max(message.cursor);
            use proto::follow_findings_response::Event;
            match message.event {
                Some(Event::Finding(finding)) => {
                    let finding = convert::finding_from_proto(finding)?;
                    let text = match self.listing.output {
                        _ if self.listing.quiet => format!("{}\n", finding.id),
                        Format::Jsonl => json_line(&finding)?,
                        Format::Table | Format::Wide | Format::Json => {
                            line(&finding, self.listing.no_trunc, colour)
                        }
                    };
                    write(text.as_bytes())?;
                }
                Some(Event::Gap(gap)) => tell_gap(&gap, &self.listing)?,
                // Not asked for, or of a newer driftd; the cursor has moved all the same.
                Some(Event::Session(_)) | None => (),
            }
        }
        anyhow::bail!(
            "driftd has stopped (when it runs again, go on with: driftd findings --follow \
             --after {cursor})"
        )
    }
}

/// Says that something is missing here.
pub(super) fn tell_gap(gap: &proto::Gap, listing: &Listing) -> anyhow::Result<()> {
    if listing.output == Format::Jsonl && !listing.quiet {
        write(json_line(&gap_json(gap)?)?.as_bytes())?;
    }
    eprintln!(
        "gap{}: {}{}: {}",
        if gap.until.is_some() { " made up for" } else { "" },
        safe(&gap.name),
        match gap.container.as_str() {
            "" => String::new(),
            id => format!(" in {}/{}", safe(&gap.namespace), safe(id)),
        },
        safe(&gap.detail)
    );
    Ok(())
}

#[derive(Serialize)]
pub(super) struct GapJson {
    pub(super) schema: &'static str,
    pub(super) name: String,
    pub(super) at: Timestamp,
    pub(super) container: Option<crate::model::ContainerId>,
    pub(super) detail: String,
    pub(super) until: Option<Timestamp>,
}

pub(super) fn gap_json(gap: &proto::Gap) -> anyhow::Result<GapJson> {
    Ok(GapJson {
        schema: "driftd.gap/v1",
        name: gap.name.clone(),
        at: convert::time_from_proto("gap.at", gap.at)?,
        container: (!gap.container.is_empty())
            .then(|| crate::model::ContainerId::new(&gap.namespace, &gap.container)),
        detail: gap.detail.clone(),
        until: convert::optional_time_from_proto("gap.until", gap.until)?,
    })
}

async fn fetch(
    mut client: Client,
    filter: proto::FindingFilter,
    limit: Option<usize>,
) -> anyhow::Result<Vec<Finding>> {
    let limit = limit.unwrap_or(usize::MAX);
    let mut findings = Vec::new();
    let mut page_token = String::new();
    while findings.len() < limit {
        let left = u32::try_from(limit - findings.len()).unwrap_or(PAGE).min(PAGE);
        let request = proto::ListFindingsRequest {
            filter: Some(filter.clone()),
            page_size: left,
            page_token,
        };
        let page = client.list_findings(request).await.map_err(explain)?.into_inner();
        for finding in page.findings {
            findings.push(convert::finding_from_proto(finding)?);
        }
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    Ok(findings)
}

/// What a finding is about: a file, or what was run.
pub(super) fn subject(finding: &Finding) -> String {
    match (&finding.file, &finding.process) {
        (Some(file), _) => format!("{}{}", file.path, of_files(finding)),
        (None, Some(process)) => format!("{}{}", command_line(process), of_files(finding)),
        (None, None) => safe(finding.detail.as_deref().unwrap_or_default()),
    }
}

/// How many files an aggregated finding stands for, behind what it names.
fn of_files(finding: &Finding) -> String {
    match finding.files {
        None => String::new(),
        Some(1) => " (1 file)".to_owned(),
        Some(files) => format!(" ({files} files)"),
    }
}

pub(super) fn command_line(process: &Process) -> String {
    match (&process.argv, &process.exe) {
        (Some(argv), _) if !argv.is_empty() => quoted(argv),
        (_, Some(exe)) => safe(exe),
        (_, None) => format!("pid {}", process.identity.pid),
    }
}

/// Arguments such that it can be seen where one ends.
pub(super) fn quoted(argv: &[String]) -> String {
    let quote = |argument: &String| {
        let argument = safe(argument);
        let plain =
            |character: char| character.is_alphanumeric() || "%+,-./:=@_".contains(character);
        if !argument.is_empty() && argument.chars().all(plain) {
            argument
        } else {
            format!("'{}'", argument.replace('\'', "'\\''"))
        }
    };
    argv.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// Text that says a severity, in its colour if there is any.
pub(super) fn coloured(severity: Severity, text: String, colour: bool) -> String {
    match (colour, severity) {
        (true, Severity::Critical | Severity::High) => format!("\x1b[31m{text}\x1b[0m"),
        (true, Severity::Medium) => format!("\x1b[33m{text}\x1b[0m"),
        (true, Severity::Low) => format!("\x1b[36m{text}\x1b[0m"),
        (true, Severity::Info) | (false, _) => text,
    }
}

fn line(finding: &Finding, no_trunc: bool, colour: bool) -> String {
    let severity = format!("{:<8}", finding.severity.name().to_uppercase());
    let severity = coloured(finding.severity, severity, colour);
    let id = |id: String| if no_trunc { id } else { short(&id) };
    format!(
        "{} {severity} {:<19} {} {} x{} {}\n",
        super::output::time(finding.last_seen),
        finding.kind,
        match finding.container_id() {
            Some(container) => {
                format!("{}/{}", safe(&container.namespace), id(safe(&container.id)))
            }
            None => "-".to_owned(),
        },
        subject(finding),
        finding.count,
        id(finding.id.to_string()),
    )
}

impl Listed for Finding {
    type Json<'a> = &'a Finding;

    fn json(&self) -> &Finding {
        self
    }

    fn name(&self) -> String {
        self.id.to_string()
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header =
            vec!["SEVERITY", "KIND", "CONTAINER", "PATH/PROCESS", "COUNT", "LAST SEEN"];
        if wide {
            header.extend(["POD", "IMAGE", "USER", "TTY", "SESSION", "VERDICT", "OUTCOME"]);
        }
        header.push("ID");
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let mut row: Vec<Field> = vec![
            Field::Severity(Some(self.severity)),
            self.kind.name().into(),
            self.container_id().map(|container| style.id(&container.id)).unwrap_or_default().into(),
            subject(self).into(),
            self.count.to_string().into(),
            age(style.now, self.last_seen).into(),
        ];
        if style.wide {
            let process = self.process.as_ref();
            let user = process.and_then(|process| process.uid);
            row.extend([
                Field::from(pod(self
                    .container
                    .as_ref()
                    .and_then(|container| container.pod.as_ref()))),
                safe(self.image.name.as_deref().unwrap_or_default()).into(),
                user.map(|uid| uid.to_string()).unwrap_or_default().into(),
                process
                    .and_then(|process| process.tty.as_deref())
                    .map(safe)
                    .unwrap_or_default()
                    .into(),
                self.session.map(|id| style.id(&id.to_string())).unwrap_or_default().into(),
                self.verdict.disposition.name().into(),
                self.outcome
                    .as_ref()
                    .map(|outcome| {
                        let result = if outcome.succeeded { "done" } else { "FAILED" };
                        format!("{} {result}", safe(&outcome.action))
                    })
                    .unwrap_or_default()
                    .into(),
            ]);
        }
        row.push(style.id(&self.id.to_string()).into());
        row
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::output::table;
    use crate::model::{Outcome, ProcessIdentity, RootfsPath};

    pub(in crate::cli) fn sample() -> Finding {
        serde_json::from_str(include_str!("../../tests/data/finding.json")).unwrap()
    }

    /// Somebody entered with a terminal; a file with a hostile name, answered.
    pub(in crate::cli) fn samples() -> Vec<Finding> {
        let mut session = sample();
        (session.kind, session.severity) = (Kind::SessionInteractive, Severity::Medium);
        (session.file, session.expected, session.session) = (None, None, None);
        session.id = "ffeeddccbbaa99887766554433221100".parse().unwrap();
        session.process = Some(Process {
            identity: ProcessIdentity { pid: 4200, start_time: 987_000 },
            exe: Some("/bin/sh".into()),
            argv: Some(vec!["sh".into(), "-c".into(), "echo it's".into()]),
            uid: Some(1000),
            tty: Some("pts/0".into()),
            root: None,
            ancestors: vec![],
        });

        let mut hostile = sample();
        (hostile.kind, hostile.severity) = (Kind::FileAdded, Severity::Low);
        hostile.id = "abcdef00000000000000000000000000".parse().unwrap();
        let container = hostile.container.as_mut().unwrap();
        container.id = crate::model::ContainerId::new("default", "web\u{1b}[31m");
        (container.pod, hostile.expected, hostile.process) = (None, None, None);
        hostile.image = crate::model::ImageReference::default();
        let file = hostile.file.as_mut().unwrap();
        file.path = RootfsPath::new(b"/tmp/\x1b[2J\xff\n.sh".as_slice()).unwrap();
        hostile.outcome = Some(Outcome {
            action: "kill".into(),
            succeeded: false,
            gone: false,
            message: "no such task".into(),
            at: hostile.last_seen,
        });
        vec![sample(), session, hostile]
    }

    fn style(wide: bool) -> Style {
        Style {
            wide,
            no_trunc: false,
            colour: false,
            width: None,
            now: "2026-11-20T10:08:30Z".parse().unwrap(),
        }
    }

    #[test]
    fn findings_as_people_see_them() {
        insta::assert_snapshot!(table(&samples(), &style(false)));
        insta::assert_snapshot!(table(&samples(), &style(true)));
        let narrow = Style { width: Some(140), ..style(true) };
        insta::assert_snapshot!(table(&samples(), &narrow));
        let lines: String = samples().iter().map(|finding| line(finding, false, false)).collect();
        insta::assert_snapshot!(lines);
    }

    #[test]
    fn colour_never_stands_alone() {
        let plain = table(&samples(), &style(false));
        let coloured = table(&samples(), &Style { colour: true, ..style(false) });
        assert!(coloured.contains("\x1b["), "{coloured}");
        for severity in ["CRITICAL", "MEDIUM", "LOW"] {
            assert!(plain.contains(severity) && coloured.contains(severity), "{coloured}");
        }
        assert!(!plain.contains('\x1b'), "{plain}");
    }

    #[test]
    fn json_of_a_finding_is_its_schema() {
        let text = include_str!("../../tests/data/finding.json");
        let expected: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(sample().json()).unwrap(), expected);
    }

    #[test]
    fn times_are_points_or_spans_back_from_now() {
        assert_eq!(
            parse_time("2026-11-20T11:00:00+01:00"),
            "2026-11-20T10:00:00Z".parse().map_err(|_| String::new())
        );
        let hour = Timestamp::now().duration_since(parse_time("1h").unwrap());
        assert!((3599..3610).contains(&hour.as_secs()), "{hour:?}");
        assert!(parse_time("yesterday").is_err_and(|err| err.contains("2h")));
    }
}
