//! `driftd findings`: lists or follows what was found.
//!
//! Owns the filter for findings, which `driftd summary` uses as well.

use std::pin::Pin;

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use tonic::Response;

use super::client::{Client, Server, explain, talk};
use super::describe::{pod, subject};
use super::exit::Exit;
use super::follow::{follow, print, print_gap, refuse};
use super::output::{Field, Listed, Listing, Style, age, colour, coloured, safe, short, time};
use super::pages::{OfContainer, Page, Part, page, print_pages};
use super::when::{self, When};
use crate::api::proto::follow_findings_response::Event;
use crate::api::{convert, proto};
use crate::model::{Finding, Kind, Severity};

#[derive(Debug, clap::Args)]
pub(super) struct Findings {
    #[command(flatten)]
    filter: Filter,
    /// Keep printing what is found, oldest first, until interrupted
    #[arg(long, conflicts_with_all = ["limit", "page", "exit_code"])]
    follow: bool,
    #[command(flatten)]
    part: Part,
    /// Exit with 1 when anything is listed
    #[arg(long)]
    exit_code: bool,
    #[command(flatten)]
    listing: Listing,
}

#[derive(Debug, clap::Args)]
pub(super) struct Filter {
    #[command(flatten)]
    container: OfContainer,
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
    /// Only what exceptions accept, which is left out otherwise
    #[arg(long)]
    accepted: bool,
}

/// The kinds that one name or pattern stands for.
#[derive(Clone, Debug)]
struct Kinds(Vec<Kind>);

/// Reads names and patterns. Completions of shells offer the names.
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

pub(super) fn severity_parser() -> impl clap::builder::TypedValueParser<Value = Severity> {
    PossibleValuesParser::new(Severity::ALL.iter().map(|severity| severity.name())).map(|name| {
        name.to_ascii_lowercase().parse().expect("clap lets only names of severities through")
    })
}

impl Filter {
    pub(super) fn to_proto(&self) -> anyhow::Result<proto::FindingFilter> {
        let kinds = self.kind.iter().flat_map(|Kinds(kinds)| kinds);
        Ok(proto::FindingFilter {
            container: self.container.to_proto(),
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
            accepted: self.accepted,
            with_accepted: false,
        })
    }
}

impl Findings {
    pub(super) fn is_following(&self) -> bool {
        self.follow
    }

    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        if self.follow {
            return match refuse(&self.listing) {
                Some(refused) => Ok(refused),
                None => self.follow(server),
            };
        }
        let filter = self.filter.to_proto()?;
        let printed = talk(server, |client| self.print(client, filter))?;
        Ok(if self.exit_code && printed > 0 { Exit::Drift } else { Exit::Clean })
    }

    async fn print(
        &self,
        mut client: Client,
        filter: proto::FindingFilter,
    ) -> anyhow::Result<usize> {
        print_pages(&self.listing, &self.part, NOTHING, async |size, token| {
            fetch(&mut client, &filter, size, token).await
        })
        .await
    }

    fn follow(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let request = proto::FollowFindingsRequest {
            filter: Some(self.filter.to_proto()?),
            after_cursor: self.part.after.to_proto(),
            sessions: false,
            as_json: true,
        };
        let (listing, colour) = (&self.listing, colour());
        follow(server, request, |cursor, event| match event {
            Event::Finding(finding) => {
                let finding = convert::finding_from_proto(finding)?;
                print(&finding, &finding.id.to_string(), cursor, listing, || {
                    line(&finding, listing.no_trunc, colour)
                })
            }
            Event::Gap(gap) => print_gap(&gap, cursor, listing),
            // Not requested.
            Event::Session(_) => Ok(()),
        })
    }
}

/// The note below an empty list of findings.
pub(super) const NOTHING: &str = "nothing was found (is the view complete? see: driftd status)";

/// One page of the findings that a filter selects.
pub(super) async fn fetch(
    client: &mut Client,
    filter: &proto::FindingFilter,
    page_size: u32,
    page_token: String,
) -> anyhow::Result<Page<Finding>> {
    let request = proto::ListFindingsRequest {
        filter: Some(filter.clone()),
        page_size,
        page_token,
        as_json: true,
    };
    let found = client.list_findings(request).await.map_err(explain)?.into_inner();
    page(found.findings, found.next_page_token, convert::finding_from_proto)
}

/// Lists findings page by page. It requests the next page before it returns the last one, so
/// the daemon reads while the client parses.
pub(super) struct Ahead {
    client: Client,
    filter: proto::FindingFilter,
    requested: Option<Requested>,
}

type Reply = Result<proto::ListFindingsResponse, tonic::Status>;
type Requested = Pin<Box<dyn Future<Output = Reply>>>;

impl Ahead {
    pub(super) fn of(client: &Client, filter: proto::FindingFilter) -> Ahead {
        let requested = Ahead::request(client.clone(), &filter, String::new());
        Ahead { client: client.clone(), filter, requested: Some(requested) }
    }

    fn request(mut client: Client, filter: &proto::FindingFilter, page_token: String) -> Requested {
        let filter = Some(filter.clone());
        let request =
            proto::ListFindingsRequest { filter, page_size: 0, page_token, as_json: true };
        Box::pin(async move { client.list_findings(request).await.map(Response::into_inner) })
    }

    /// The findings of the next page; `None` after the last one.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Vec<proto::Finding>>> {
        let Some(requested) = self.requested.take() else { return Ok(None) };
        let page = requested.await.map_err(explain)?;
        if !page.next_page_token.is_empty() {
            let mut next = Ahead::request(self.client.clone(), &self.filter, page.next_page_token);
            // It is sent before the page is parsed.
            let ready = tokio::select! {
                biased;
                reply = &mut next => Some(reply),
                () = tokio::task::yield_now() => None,
            };
            self.requested = Some(match ready {
                Some(reply) => Box::pin(std::future::ready(reply)),
                None => next,
            });
        }
        Ok(Some(page.findings))
    }
}

fn line(finding: &Finding, no_trunc: bool, colour: bool) -> String {
    let severity = format!("{:<8}", finding.severity.name().to_uppercase());
    let severity = coloured(finding.severity, severity, colour);
    let id = |id: String| if no_trunc { id } else { short(&id) };
    format!(
        "{} {severity} {:<19} {} {} x{} {}\n",
        time(finding.last_seen),
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
    use crate::model::{Outcome, Process, ProcessIdentity, RootfsPath};

    pub(in crate::cli) fn sample() -> Finding {
        serde_json::from_str(include_str!("../../tests/data/finding.json")).unwrap()
    }

    /// An interactive session, and a file with a hostile name and a response.
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
