//! `driftd findings`

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, Server, explain, follow, talk};
use super::containers::pod;
use super::exit::Exit;
pub(super) use super::output::coloured;
use super::output::{
    Field, Format, Listed, Listing, Printer, Style, age, json_line, safe, short, write,
};
use super::when::{self, When};
use crate::api::{convert, proto};
use crate::model::{Finding, Kind, Process, Severity};

/// Findings asked for at once.
const PAGE: u32 = 1000;
/// Rows of a table, unless the user asks for another number.
const ROWS: usize = 1000;

/// How many rows to print: the number asked for (0 is all), else [`ROWS`] for people.
pub(super) fn rows(asked: Option<usize>, for_people: bool) -> usize {
    match asked {
        Some(0) => usize::MAX,
        Some(limit) => limit,
        None if for_people => ROWS,
        None => usize::MAX,
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Findings {
    #[command(flatten)]
    filter: Filter,
    /// Keep printing what is found, oldest first, until interrupted
    #[arg(long, conflicts_with_all = ["limit", "page", "exit_code"])]
    follow: bool,
    /// With --follow: only what comes after this cursor (0: everything kept), or `latest`
    #[arg(long, value_name = "CURSOR", requires = "follow", default_value = "0")]
    after: After,
    /// Print at most this many, the newest (0: all) [default: 1000 in a table, all otherwise]
    #[arg(long, value_name = "NUMBER")]
    limit: Option<usize>,
    /// Go on behind an earlier page, by the token that it ended with
    #[arg(long, value_name = "TOKEN")]
    page: Option<String>,
    /// Exit with 1 when anything is listed
    #[arg(long)]
    exit_code: bool,
    #[command(flatten)]
    listing: Listing,
}

/// Where following begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    Cursor(u64),
    /// Only what comes.
    Latest,
}

impl std::str::FromStr for After {
    type Err = String;

    fn from_str(text: &str) -> Result<After, String> {
        match text {
            text if text.eq_ignore_ascii_case("latest") => Ok(After::Latest),
            text => text
                .parse()
                .map(After::Cursor)
                .map_err(|_| "neither a cursor, a whole number, nor `latest`".to_owned()),
        }
    }
}

impl After {
    pub(super) fn to_proto(self) -> Option<u64> {
        match self {
            After::Cursor(cursor) => Some(cursor),
            After::Latest => None,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Filter {
    /// Only of this container: its whole ID, NAMESPACE/ID, or 8 or more digits of a hexadecimal ID
    #[arg(short, long, value_name = "CONTAINER")]
    container: Option<String>,
    /// Only of this image: a name, whole or its end (nginx, team/shop:1.4), or a manifest digest
    #[arg(long, value_name = "IMAGE")]
    image: Option<String>,
    /// Only of these kinds: names or patterns such as exec.*, separated by commas
    #[arg(long, value_name = "KIND", value_delimiter = ',', value_parser = KindsParser)]
    kind: Vec<Kinds>,
    /// Only of this severity and above
    #[arg(long, value_name = "SEVERITY", ignore_case = true, value_parser = severity_parser())]
    severity: Option<Severity>,
    /// Only what was last seen after this time: 2h, yesterday, 2026-11-27, 14:30, RFC 3339
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = when::parse)]
    since: Option<When>,
    /// Only what was first seen before this time
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = when::parse)]
    until: Option<When>,
    /// Only about this path or what is below it; `*` and `?` stand for any text (may be repeated)
    #[arg(long, value_name = "PATH")]
    path: Vec<String>,
    /// Only about this content: 8 or more digits of a BLAKE3 or SHA-256 hash (may be repeated)
    #[arg(long, value_name = "HASH")]
    hash: Vec<String>,
    /// Only of this session: its ID or 8 or more digits of it (may be repeated)
    #[arg(long, value_name = "SESSION")]
    session: Vec<String>,
    /// Only of this pod: NAME or NAMESPACE/NAME, `*` and `?` stand for any text (may be repeated)
    #[arg(long, value_name = "POD")]
    pod: Vec<String>,
    /// Only of pods in this namespace of Kubernetes (may be repeated)
    #[arg(long, value_name = "NAMESPACE")]
    pod_namespace: Vec<String>,
    /// Only of containers that have this label: KEY or KEY=VALUE (if repeated: all of them)
    #[arg(short, long, value_name = "LABEL")]
    label: Vec<String>,
    /// Only those that hold this text anywhere, in any case (if repeated: all of them)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    text: Vec<String>,
}

/// What one name or pattern stands for.
#[derive(Clone, Debug)]
struct Kinds(Vec<Kind>);

/// Reads names and patterns, and offers the names to shells.
#[derive(Clone, Debug)]
struct KindsParser;

impl clap::builder::TypedValueParser for KindsParser {
    type Value = Kinds;

    fn parse_ref(
        &self,
        command: &clap::Command,
        argument: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<Kinds, clap::Error> {
        let read = |text: &str| Kind::named_by(text).map(Kinds).map_err(|err| err.to_string());
        clap::builder::TypedValueParser::parse_ref(&read, command, argument, value)
    }

    fn possible_values(
        &self,
    ) -> Option<Box<dyn Iterator<Item = clap::builder::PossibleValue> + '_>> {
        Some(Box::new(Kind::ALL.iter().map(|kind| clap::builder::PossibleValue::new(kind.name()))))
    }
}

fn severity_parser() -> impl clap::builder::TypedValueParser<Value = Severity> {
    PossibleValuesParser::new(Severity::ALL.iter().map(|severity| severity.name())).map(|name| {
        name.to_ascii_lowercase().parse().expect("clap lets only names of severities through")
    })
}

impl Filter {
    pub(super) fn to_proto(&self) -> anyhow::Result<proto::FindingFilter> {
        let kinds = self.kind.iter().flat_map(|Kinds(kinds)| kinds);
        Ok(proto::FindingFilter {
            container: self.container.clone().unwrap_or_default(),
            image: self.image.clone().unwrap_or_default(),
            kinds: kinds.map(|kind| kind.name().to_owned()).collect(),
            minimum_severity: self
                .severity
                .map_or(proto::Severity::Unspecified, convert::severity_to_proto)
                .into(),
            since: when::to_proto(self.since.as_ref())?,
            until: when::to_proto(self.until.as_ref())?,
            paths: self.path.clone(),
            hashes: self.hash.clone(),
            sessions: self.session.clone(),
            pods: self.pod.clone(),
            pod_namespaces: self.pod_namespace.clone(),
            labels: self.label.clone(),
            texts: self.text.clone(),
        })
    }
}

impl Findings {
    pub(super) fn is_following(&self) -> bool {
        self.follow
    }

    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        if self.follow {
            if !self.listing.output.is_endless() {
                eprintln!("error: a stream never ends: use -o jsonl with --follow");
                return Ok(Exit::Usage);
            }
            return self.follow(server);
        }
        let filter = self.filter.to_proto()?;
        let is_any = talk(server, |client| self.print(client, filter))?;
        Ok(if self.exit_code && is_any { Exit::Drift } else { Exit::Clean })
    }

    /// Prints each page as it comes, and says whether there was anything.
    async fn print(
        &self,
        mut client: Client,
        filter: proto::FindingFilter,
    ) -> anyhow::Result<bool> {
        let for_people = self.listing.output.is_for_people() && !self.listing.quiet;
        let limit = rows(self.limit, for_people);
        let mut printer = Printer::new(&self.listing);
        let mut request = proto::ListFindingsRequest {
            filter: Some(filter),
            page_size: 0,
            page_token: self.page.clone().unwrap_or_default(),
        };
        let more = loop {
            let left = limit.saturating_sub(printer.printed);
            request.page_size = u32::try_from(left).unwrap_or(PAGE).min(PAGE);
            let page = client.list_findings(request.clone()).await.map_err(explain)?.into_inner();
            let findings: Vec<Finding> = page
                .findings
                .into_iter()
                .map(convert::finding_from_proto)
                .collect::<Result<_, _>>()?;
            printer.page(&findings)?;
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() || printer.printed >= limit {
                break request.page_token;
            }
        };
        let printed = printer.printed;
        printer.end::<Finding>()?;
        if !more.is_empty() && self.listing.output.is_for_people() {
            let told = more_findings(printed, &more);
            match for_people {
                true => write(told.as_bytes())?,
                false => eprint!("{told}"),
            }
        } else if !more.is_empty() {
            eprintln!("there are more (go on with: --page {more})");
        }
        if printed == 0 && for_people {
            eprintln!("nothing was found (is the view complete? see: driftd status)");
        }
        Ok(printed > 0)
    }

    fn follow(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let request = proto::FollowFindingsRequest {
            filter: Some(self.filter.to_proto()?),
            after_cursor: self.after.to_proto(),
            sessions: false,
        };
        let colour = super::output::colour();
        follow(server, request, |cursor, event| {
            use proto::follow_findings_response::Event;
            match event {
                Event::Finding(finding) => {
                    let finding = convert::finding_from_proto(finding)?;
                    let text = match self.listing.output {
                        _ if self.listing.quiet => format!("{}\n", finding.id),
                        Format::Table | Format::Wide => {
                            line(&finding, self.listing.no_trunc, colour)
                        }
                        format => told(&finding, cursor, format)?,
                    };
                    write(text.as_bytes())?;
                }
                Event::Gap(gap) => tell_gap(&gap, cursor, &self.listing)?,
                // Not asked for.
                Event::Session(_) => (),
            }
            Ok(())
        })
    }
}

/// The last line of a table that does not hold all.
pub(super) fn more_findings(printed: usize, token: &str) -> String {
    format!(
        "… the newest {printed} are shown, and there are more: --limit NUMBER shows more, \
         --limit 0 all, --page {token} the next ones\n"
    )
}

/// An event of a followed history, with the cursor to go on with.
#[derive(Serialize)]
struct Told<'a, T> {
    #[serde(flatten)]
    what: &'a T,
    /// A value for `--after`: everything up to here was reported.
    cursor: u64,
}

pub(super) fn told<T: Serialize>(what: &T, cursor: u64, format: Format) -> anyhow::Result<String> {
    let told = Told { what, cursor };
    match format {
        Format::Yaml => Ok(format!("---\n{}", super::output::yaml(&told)?)),
        _ => json_line(&told),
    }
}

/// Says that something is missing here.
pub(super) fn tell_gap(gap: &proto::Gap, cursor: u64, listing: &Listing) -> anyhow::Result<()> {
    if !listing.output.is_for_people() && !listing.quiet {
        write(told(&gap_json(gap)?, cursor, listing.output)?.as_bytes())?;
    }
    eprintln!(
        "gap{}: {}{}: {}",
        if gap.until.is_some() { " over" } else { "" },
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
            restarter: None,
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
}
