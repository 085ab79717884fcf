//! `driftd policy test`: what other rules would have decided about the findings of the history.
//!
//! Fetches the findings and decides here; nothing on the node changes. Both sets are applied as
//! they are now: the rules in force may be younger than a finding.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, Server, explain, talk};
use super::describe::subject as about;
use super::exit::Exit;
use super::findings::Ahead;
use super::output::{Output, one, safe, short, time};
use super::pages::{OfContainer, fetch_all, page};
use super::profiles::Profiles;
use super::when::{self, When};
use crate::api::{convert, proto};
use crate::config::PolicyFiles;
use crate::model::{
    ContainerId, Disposition, Finding, Kind, Member, Session, SessionId, Severity, Verdict,
};
use crate::policy::{self, Decision, Loaded, Owners, Policy, PolicyFile, Subject};

/// Changed decisions that are shown to people.
const MOST_SHOWN: usize = 30;

#[derive(Debug, clap::Args)]
pub(super) struct Test {
    /// The directory of the other rules [default: the rules in force, with the profiles]
    #[arg(required_unless_present = "names")]
    directory: Option<PathBuf>,
    #[command(flatten)]
    profiles: Profiles,
    /// Only findings that were last seen after this time
    #[arg(long, value_name = "TIME", default_value = "7d", allow_hyphen_values = true, value_parser = when::parse)]
    since: When,
    #[command(flatten)]
    container: OfContainer,
    #[command(flatten)]
    output: Output,
}

/// What the rules of a directory would have decided.
#[derive(Debug, Default, Serialize)]
struct RehearsalJson {
    schema: &'static str,
    since: Option<Timestamp>,
    /// How many findings were looked at.
    findings: u64,
    in_force: CountsJson,
    tested: CountsJson,
    /// The findings about which the two sets differ, the newest first.
    changed: Vec<ChangedJson>,
}

/// The decisions of one set of rules.
#[derive(Debug, Default, Serialize)]
struct CountsJson {
    rules: usize,
    reported: u64,
    accepted: u64,
    /// For which a kill would be asked, whatever `policy.enforce` is.
    answered: u64,
    /// By rule: how many findings each has decided.
    by_rule: BTreeMap<String, u64>,
}

#[derive(Debug, Serialize)]
struct ChangedJson {
    finding: String,
    kind: Kind,
    container: Option<ContainerId>,
    subject: String,
    in_force: DecisionJson,
    tested: DecisionJson,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize)]
struct DecisionJson {
    disposition: Option<Disposition>,
    severity: Option<Severity>,
    rule: Option<String>,
    action: Option<String>,
    /// How many of an aggregated finding's files would be accepted; null for one file.
    accepted_files: Option<u64>,
    files: Option<u64>,
}

impl Test {
    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let Test { directory, profiles, since, container, output } = self;
        let since = when::to_proto(Some(&since))?;
        let profiles = policy::read_profiles(&profiles.profile_dir, &profiles.names)?;
        let result = talk(server, async |mut client: Client| {
            let in_force = in_force(&mut client).await?;
            let files = match &directory {
                Some(directory) => rules_of(directory)?.files,
                None => in_force.files.clone(),
            };
            let files = with_profiles(&files, profiles);
            let tested = policy::parse(directory.as_deref().unwrap_or(Path::new("")), files)?;
            let sets =
                Sets { in_force: Policy::rehearsed(&in_force), tested: Policy::rehearsed(&tested) };
            rehearse(&mut client, &sets, container.to_proto(), since).await
        })?;
        one(&result, output.format, || text(&result))?;
        Ok(Exit::Clean)
    }
}

/// The files with these profiles for all containers. One that is there already, perhaps only for
/// containers that ask for it, gives way.
fn with_profiles(files: &[PolicyFile], profiles: Vec<PolicyFile>) -> Vec<PolicyFile> {
    let is_tried =
        |file: &PolicyFile| profiles.iter().any(|profile| profile.profile == file.profile);
    let others: Vec<PolicyFile> = files.iter().filter(|file| !is_tried(file)).cloned().collect();
    others.into_iter().chain(profiles).collect()
}

/// The rules of a directory.
pub(super) fn rules_of(directory: &Path) -> anyhow::Result<Loaded> {
    let loaded = policy::read(&PolicyFiles::of(directory), Owners::Any)?;
    anyhow::ensure!(loaded.has_directory, "{}: there is no such directory", directory.display());
    Ok(loaded)
}

/// The rules in force, made of the files as the daemon has read them.
pub(super) async fn in_force(client: &mut Client) -> anyhow::Result<Loaded> {
    let request = proto::GetPolicyRequest {};
    let files = client.get_policy(request).await.map_err(explain)?.into_inner().files;
    let files = files.into_iter().map(convert::policy_file_from_proto);
    Ok(policy::parse(Path::new(""), files.collect())?)
}

struct Sets {
    in_force: Policy,
    tested: Policy,
}

async fn rehearse(
    client: &mut Client,
    sets: &Sets,
    container: String,
    since: Option<prost_types::Timestamp>,
) -> anyhow::Result<RehearsalJson> {
    let sessions = sessions(client, &container).await?;
    let mut result = RehearsalJson {
        schema: "driftd.rehearsal/v1",
        since: convert::optional_time_from_proto("since", since)?,
        ..RehearsalJson::default()
    };
    result.in_force.rules = sets.in_force.rules.rules().len();
    result.tested.rules = sets.tested.rules.rules().len();
    let filter = proto::FindingFilter {
        container: container.clone(),
        since,
        with_accepted: true,
        ..proto::FindingFilter::default()
    };
    let mut pages = Ahead::of(client, filter);
    while let Some(findings) = pages.next().await? {
        for finding in findings {
            let finding = convert::finding_from_proto(finding)?;
            let members = match finding.files {
                Some(_) => fetch_members(client, &finding).await?,
                None => Vec::new(),
            };
            let session = finding.session.and_then(|id| sessions.get(&id));
            result.add(sets, &finding, &members, session);
        }
    }
    Ok(result)
}

async fn sessions(
    client: &mut Client,
    container: &str,
) -> anyhow::Result<HashMap<SessionId, Session>> {
    let fetch = async |page_size, page_token| {
        let filter = proto::SessionFilter {
            container: container.to_owned(),
            ..proto::SessionFilter::default()
        };
        let request = proto::ListSessionsRequest { filter: Some(filter), page_size, page_token };
        let found = client.list_sessions(request).await.map_err(explain)?.into_inner();
        page(found.sessions, found.next_page_token, convert::session_from_proto)
    };
    let sessions: Vec<Session> = fetch_all(fetch).await?;
    Ok(sessions.into_iter().map(|session| (session.id, session)).collect())
}

/// The files of an aggregated finding.
pub(super) async fn fetch_members(
    client: &mut Client,
    finding: &Finding,
) -> anyhow::Result<Vec<Member>> {
    let finding = finding.id.to_string();
    let fetch = async |page_size, page_token| {
        let request = proto::ListMembersRequest { finding: finding.clone(), page_size, page_token };
        let found = client.list_members(request).await.map_err(explain)?.into_inner();
        page(found.members, found.next_page_token, convert::member_from_proto)
    };
    fetch_all(fetch).await
}

impl RehearsalJson {
    fn add(
        &mut self,
        sets: &Sets,
        finding: &Finding,
        members: &[Member],
        session: Option<&Session>,
    ) {
        self.findings += 1;
        let before = decide(&sets.in_force, finding, members, session);
        let after = decide(&sets.tested, finding, members, session);
        self.in_force.add(&before);
        self.tested.add(&after);
        if before != after {
            self.changed.push(ChangedJson {
                finding: finding.id.to_string(),
                kind: finding.kind,
                container: finding.container_id().cloned(),
                subject: about(finding),
                in_force: before,
                tested: after,
            });
        }
    }
}

impl CountsJson {
    fn add(&mut self, decision: &DecisionJson) {
        match decision.disposition {
            Some(Disposition::Accept) => self.accepted += 1,
            _ => self.reported += 1,
        }
        self.answered += u64::from(decision.action.is_some());
        if let Some(rule) = &decision.rule {
            *self.by_rule.entry(rule.clone()).or_default() += 1;
        }
    }
}

/// The decisions about a finding: one for each of its files, if they are known one by one.
fn decisions(
    policy: &Policy,
    finding: &Finding,
    members: &[Member],
    session: Option<&Session>,
) -> Vec<Decision> {
    let severity = finding.verdict.unchanged_severity.unwrap_or(finding.severity);
    let of = |finding: &Finding| {
        let subject =
            Subject { finding, severity, session, may_be_of_session: false, is_unproven: false };
        policy.decide(&subject, Timestamp::now())
    };
    if members.is_empty() || finding.kind == Kind::PackageTransaction {
        return vec![of(finding)];
    }
    let mut one = finding.clone();
    let of_member = |member: &Member| {
        one.kind = member.kind;
        if let Some(file) = &mut one.file {
            (file.path, file.blake3, file.sha256) = (member.path.clone(), member.blake3, None);
        }
        of(&one)
    };
    members.iter().map(of_member).collect()
}

/// How many files of a finding would be accepted: 1 for a whole finding without files.
pub(super) fn accepted_files(policy: &Policy, finding: &Finding, members: &[Member]) -> usize {
    let decisions = decisions(policy, finding, members, None);
    let is_whole = decisions.len() == 1;
    let accepted = decisions.iter().filter(|decision| decision.verdict.is_accept()).count();
    if is_whole { accepted * members.len().max(1) } else { accepted }
}

/// The decision about a finding. One about several files is accepted if each of them is.
fn decide(
    policy: &Policy,
    finding: &Finding,
    members: &[Member],
    session: Option<&Session>,
) -> DecisionJson {
    let decisions = decisions(policy, finding, members, session);
    let accepted = decisions.iter().filter(|one| one.verdict.is_accept()).count() as u64;
    let files = decisions.len() as u64;
    let is_listed = !members.is_empty() && finding.kind != Kind::PackageTransaction;
    let last = decisions.iter().rfind(|one| !one.verdict.is_accept()).or(decisions.last());
    let Some(Decision { verdict, severity }) = last.cloned() else {
        return DecisionJson::default();
    };
    let Verdict { disposition, rule, action, .. } = verdict;
    DecisionJson {
        disposition: Some(disposition),
        severity: Some(severity),
        rule,
        action,
        accepted_files: is_listed.then_some(accepted),
        files: is_listed.then_some(files),
    }
}

fn text(result: &RehearsalJson) -> String {
    let mut text = format!(
        "{} findings since {}\n\n",
        result.findings,
        result.since.map(time).unwrap_or_default()
    );
    let mut line = |name: &str, before: String, after: String| {
        writeln!(text, "{name:<10} {before:>10} {after:>10}")
            .expect("writing to a String cannot fail");
    };
    line("", "in force".to_owned(), "tested".to_owned());
    let (before, after) = (&result.in_force, &result.tested);
    for (name, before, after) in [
        ("rules", before.rules as u64, after.rules as u64),
        ("reported", before.reported, after.reported),
        ("accepted", before.accepted, after.accepted),
        ("answered", before.answered, after.answered),
    ] {
        line(name, before.to_string(), after.to_string());
    }
    if result.changed.is_empty() {
        return text + "\nno finding would have another decision\n";
    }
    text += "\n";
    for changed in result.changed.iter().take(MOST_SHOWN) {
        let (before, after) = (describe(&changed.in_force), describe(&changed.tested));
        let (id, kind) = (short(&changed.finding), changed.kind);
        text += &format!("{id}  {kind:<19}  {before} -> {after}  {}\n", changed.subject);
    }
    if result.changed.len() > MOST_SHOWN {
        text += &format!("and {} more (-o json)\n", result.changed.len() - MOST_SHOWN);
    }
    text
}

fn describe(decision: &DecisionJson) -> String {
    let rule = decision.rule.as_deref().map(|rule| format!(" by {}", safe(rule)));
    let rule = rule.unwrap_or_default();
    match (decision.disposition, decision.accepted_files.zip(decision.files)) {
        (Some(Disposition::Accept), _) => format!("accepted{rule}"),
        (_, Some((accepted, files))) if accepted > 0 => {
            format!("{accepted} of {files} files accepted")
        }
        _ => {
            let severity = decision.severity.map(Severity::name).unwrap_or_default();
            let action = decision.action.as_deref().map(|action| format!(", {action}"));
            format!("{severity}{}{rule}", action.unwrap_or_default())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_that_containers_may_ask_for_is_tried_on_all_of_them() {
        let profile = |by_label| PolicyFile {
            profile: Some("pip".to_owned()),
            by_label,
            ..PolicyFile::new("pip.toml", "")
        };
        let own = PolicyFile::new("10-app.toml", "");
        let in_force = [own.clone(), profile(true)];
        assert_eq!(with_profiles(&in_force, vec![profile(false)]), [own, profile(false)]);
        assert_eq!(with_profiles(&in_force, Vec::new()), in_force);
    }
}
