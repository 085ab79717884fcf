//! `driftd policy suggest`: proposes exceptions for findings that are expected.
//!
//! The room `policy` proposes them. This file fetches the findings, tries the proposal on all of
//! them, and prints it as a policy file.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use jiff::Timestamp;

use super::client::{Client, Server, explain, talk};
use super::describe::subject;
use super::exit::Exit;
use super::findings::{Filter, fetch};
use super::output::{safe, short, write};
use super::pages::{fetch_all, fetch_pages};
use super::rehearse::{accepted_files, fetch_members};
use crate::api::{convert, proto};
use crate::model::{Finding, FindingId, Kind};
use crate::policy::suggest::{By, Proposed, Selected, Suggestion, suggest};
use crate::policy::{self, Policy, PolicyFile};

/// Other findings that are named, if the exceptions would accept them too.
const MOST_NAMED: usize = 10;

#[derive(Debug, clap::Args)]
pub(super) struct Suggest {
    /// The findings that are expected: IDs, or the beginnings of them [default: all that the options select]
    findings: Vec<String>,
    #[command(flatten)]
    filter: Filter,
}

impl Suggest {
    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let text = talk(server, async |mut client: Client| {
            let selected = self.select(&mut client).await?;
            let suggestion = suggest(&selected, Timestamp::now());
            let policy = tried(&suggestion.rules)?;
            let beside = beside(&mut client, &selected, &policy).await?;
            render(&suggestion, &policy, &selected, &beside)
        })?;
        write(text.as_bytes())?;
        Ok(Exit::Clean)
    }

    /// The findings that are to be accepted.
    async fn select(&self, client: &mut Client) -> anyhow::Result<Vec<Selected>> {
        let wanted = match self.findings.as_slice() {
            [] => {
                let filter = self.filter.to_proto()?;
                fetch_all(async |size, token| fetch(client, &filter, size, token).await).await?
            }
            ids => {
                let mut wanted = Vec::new();
                for id in ids {
                    let request = proto::GetFindingRequest { id: id.clone(), as_json: true };
                    let reply = client.get_finding(request).await.map_err(explain)?.into_inner();
                    let finding = reply.finding;
                    let finding =
                        finding.ok_or_else(|| anyhow::anyhow!("driftd returned no finding"))?;
                    wanted.push(convert::finding_from_proto(finding)?);
                }
                wanted
            }
        };
        let mut selected = Vec::new();
        for finding in wanted {
            selected.push(with_members(client, finding).await?);
        }
        Ok(selected)
    }
}

/// The other findings that the exceptions would accept, at least in part. The history may be
/// long: only those are kept that may be such.
async fn beside(
    client: &mut Client,
    selected: &[Selected],
    policy: &Policy,
) -> anyhow::Result<Vec<Finding>> {
    let known: BTreeSet<FindingId> = selected.iter().map(|one| one.finding.id).collect();
    let kinds: Vec<Kind> = selected.iter().map(|one| one.finding.kind).collect();
    let mut candidates: Vec<Finding> = Vec::new();
    let filter = proto::FindingFilter::default();
    let fetch = async |size, token| fetch(client, &filter, size, token).await;
    let keep = |page: Vec<Finding>| {
        candidates.extend(page.into_iter().filter(|finding| {
            let is_one = accepted_files(policy, finding, &[]) > 0;
            let has_one = finding.files.is_some() && kinds.contains(&finding.kind);
            !known.contains(&finding.id) && (is_one || has_one)
        }));
        Ok(())
    };
    fetch_pages(String::new(), usize::MAX, fetch, keep).await?;
    let mut beside = Vec::new();
    for finding in candidates {
        let Selected { finding, members } = with_members(client, finding).await?;
        if accepted_files(policy, &finding, &members) > 0 {
            beside.push(finding);
        }
    }
    Ok(beside)
}

async fn with_members(client: &mut Client, finding: Finding) -> anyhow::Result<Selected> {
    let members = match finding.files {
        Some(_) => fetch_members(client, &finding).await?,
        None => Vec::new(),
    };
    Ok(Selected { finding, members })
}

/// The policy file, with what it would do to the findings that are kept.
fn render(
    suggestion: &Suggestion,
    policy: &Policy,
    selected: &[Selected],
    beside: &[Finding],
) -> anyhow::Result<String> {
    let Suggestion { rules, left } = suggestion;
    let (accepted, not): (Vec<&Selected>, Vec<&Selected>) =
        selected.iter().partition(|selected| is_accepted(policy, selected));
    let mut text = format!(
        "# {} of {} findings would be accepted by {} exceptions. Fill in each `reason`: without\n\
         # one, driftd refuses the file.\n",
        accepted.len(),
        selected.len(),
        rules.len()
    );
    for Selected { finding, .. } in not {
        let why = left.iter().find(|(id, _)| *id == finding.id);
        let why = why.map_or("no exception matches all of its files", |(_, why)| *why);
        writeln!(text, "# Not accepted: {}: {why}", line(finding))?;
    }
    for finding in beside.iter().take(MOST_NAMED) {
        writeln!(text, "# ALSO ACCEPTED, though not selected: {}", line(finding))?;
    }
    if beside.len() > MOST_NAMED {
        writeln!(text, "# and {} more", beside.len() - MOST_NAMED)?;
    }
    for proposed in rules {
        let by = match proposed.by {
            By::Content => "These contents, in this image.",
            By::Program => "What this unchanged program of the image writes or runs.",
            By::Path => "BY PATH ALONE: anything that is put there is accepted.",
        };
        write!(text, "\n# {by}\n{}", proposed.to_toml()?)?;
    }
    Ok(text)
}

/// The proposed rules in force, as they would be.
fn tried(rules: &[Proposed]) -> anyhow::Result<Policy> {
    let mut text = String::new();
    for proposed in rules {
        let mut proposed = proposed.clone();
        "a trial".clone_into(&mut proposed.rule.reason);
        text += &proposed.to_toml()?;
    }
    let file = PolicyFile::new("suggested.toml", text);
    Ok(Policy::rehearsed(&policy::parse(Path::new(""), vec![file])?))
}

fn is_accepted(policy: &Policy, Selected { finding, members }: &Selected) -> bool {
    accepted_files(policy, finding, members) == members.len().max(1)
}

fn line(finding: &Finding) -> String {
    let id = short(&finding.id.to_string());
    let severity = finding.severity;
    let text = format!("{id} {severity} {} {}", finding.kind, subject(finding));
    // A comment has one line.
    safe(&text)
}
