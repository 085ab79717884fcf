//! `driftd policy`: checks policy files, lists the rules in force, explains the decision about a
//! finding, and has the files read again.
//!
//! The rules belong to the room `policy`. `check` and `schema` need no daemon.

use std::fmt::Write as _;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, Server, call, explain, talk};
use super::exit::Exit;
use super::output::{Field, Listed, Listing, Output, Style, age, list, one, safe, time, write};
use super::profiles::{ListProfiles, Profiles};
use super::rehearse;
use super::suggest;
use crate::api::{convert, proto};
use crate::config::{Config, PolicyFiles};
use crate::model::{Finding, Session};
use crate::policy::{self, Owners, Reason, Rule, Subject};

#[derive(Debug, clap::Subcommand)]
pub(super) enum Policy {
    /// Check policy files, without a daemon
    Check(Check),
    /// List the rules in force, and how often each has matched
    Ls(Ls),
    /// Show which rules match a finding, and why the others do not
    Explain(Explain),
    /// Show what other rules would have decided about the findings of the history
    Test(rehearse::Test),
    /// Propose exceptions for findings that are expected
    Suggest(Box<suggest::Suggest>),
    /// List the profiles: reviewed exceptions for one runtime or distribution
    Profiles(ListProfiles),
    /// Have the daemon read the policy files again
    Reload(Reload),
    /// Print the JSON Schema of a policy file, for editors
    Schema,
}

#[derive(Debug, clap::Args)]
pub(super) struct Check {
    /// The directory of the files [default: the one in the settings]
    directory: Option<PathBuf>,
    /// The settings that name the directory
    #[arg(long, value_name = "FILE", conflicts_with = "directory")]
    config: Option<PathBuf>,
    #[command(flatten)]
    profiles: Profiles,
}

#[derive(Debug, clap::Args)]
pub(super) struct Ls {
    #[command(flatten)]
    listing: Listing,
}

#[derive(Debug, clap::Args)]
pub(super) struct Explain {
    /// A finding's ID, or the beginning of it
    finding: String,
    /// The rules of this directory, instead of those in force
    #[arg(long, value_name = "DIRECTORY")]
    rules: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub(super) struct Reload {
    #[command(flatten)]
    output: Output,
}

impl Policy {
    /// Whether only the history is read.
    pub(super) fn reads_history(&self) -> bool {
        matches!(self, Policy::Explain(Explain { rules: Some(_), .. }) | Policy::Suggest(_))
    }

    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        match self {
            Policy::Check(check) => check.run(),
            Policy::Ls(ls) => ls.run(server),
            Policy::Explain(explain) => explain.run(server),
            Policy::Test(test) => test.run(server),
            Policy::Suggest(suggest) => suggest.run(server),
            Policy::Profiles(profiles) => profiles.run(),
            Policy::Reload(reload) => {
                let reply = call(server, proto::ReloadPolicyRequest {}, Client::reload_policy)?;
                let status = policy_json(reply.status.unwrap_or_default())?;
                one(&status, reload.output.format, || format!("{}\n", summary(&status)))?;
                Ok(Exit::Clean)
            }
            Policy::Schema => {
                let mut schema = serde_json::to_string_pretty(&policy::schema())?;
                schema.push('\n');
                write(schema.as_bytes())?;
                Ok(Exit::Clean)
            }
        }
    }
}

/// What is wrong with the policy files of the daemon.
pub(super) fn faults(from: &PolicyFiles) -> Option<String> {
    policy::read(from, Owners::Own).err().map(|refused| refused.to_string())
}

impl Check {
    fn run(self) -> anyhow::Result<Exit> {
        let from = match self.directory {
            Some(dir) => self.profiles.with(PolicyFiles::of(&dir)),
            None => self.profiles.with(Config::load(self.config.as_deref())?.policy),
        };
        let shown = safe(&from.dir.to_string_lossy());
        match policy::read(&from, Owners::Any) {
            Ok(loaded) if !loaded.has_directory && from.profiles.is_empty() => {
                eprintln!("error: {shown}: there is no such directory");
                Ok(Exit::Usage)
            }
            Ok(loaded) => {
                let (rules, now) = (loaded.rules.rules(), Timestamp::now());
                let mut text =
                    format!("{shown}: {} rules in {} files\n", rules.len(), loaded.files.len());
                for rule in rules.iter().filter(|rule| rule.is_expired(now)) {
                    let end = rule.expires.map(time).unwrap_or_default();
                    writeln!(
                        text,
                        "{}:{}: rule `{}` has ended ({end}) and does not apply",
                        safe(&rule.place.file),
                        rule.place.line,
                        rule.id
                    )?;
                }
                write(text.as_bytes())?;
                Ok(Exit::Clean)
            }
            Err(refused) => {
                eprintln!("{refused}");
                Ok(Exit::Usage)
            }
        }
    }
}

/// The rules in force, for `status` and `reload`.
#[derive(Debug, Serialize)]
pub(super) struct PolicyJson {
    pub(super) generation: u64,
    /// Null if no file names one.
    pub(super) version: Option<String>,
    /// Null without files.
    pub(super) digest: Option<String>,
    pub(super) enforce: String,
    pub(super) rules: u32,
    /// Why the files as they are now were refused; null if they were not.
    pub(super) refused: Option<String>,
    pub(super) ends: Vec<RuleEndJson>,
    /// The profiles that are switched on.
    pub(super) profiles: Vec<String>,
    /// The trusted comment of the files' signature; null if no signature is needed.
    pub(super) signed: Option<String>,
    /// The profiles that a container may switch on for itself.
    pub(super) container_profiles: Vec<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct RuleEndJson {
    pub(super) id: String,
    pub(super) expires: Timestamp,
    pub(super) expired: bool,
}

pub(super) fn policy_json(status: proto::PolicyStatus) -> anyhow::Result<PolicyJson> {
    let end = |proto::RuleEnd { id, expires, expired }| {
        let expires = convert::time_from_proto("expires", expires)?;
        Ok(RuleEndJson { id, expires, expired })
    };
    Ok(PolicyJson {
        generation: status.generation,
        version: status.version,
        digest: status.digest,
        enforce: status.enforce,
        rules: status.rules,
        refused: status.refused,
        ends: status.ends.into_iter().map(end).collect::<anyhow::Result<_>>()?,
        profiles: status.profiles,
        signed: status.signed,
        container_profiles: status.container_profiles,
    })
}

/// One line about the rules in force.
pub(super) fn summary(status: &PolicyJson) -> String {
    let version = status.version.as_deref().map(|version| format!(", version {}", safe(version)));
    let digest = status
        .digest
        .as_deref()
        .map(|digest| format!(", {}", safe(digest.get(.."blake3:".len() + 12).unwrap_or(digest))));
    let profiles = match status.profiles.as_slice() {
        [] => String::new(),
        profiles => format!(", profiles {}", safe(&profiles.join(" "))),
    };
    let signed = if status.signed.is_some() { ", signed" } else { "" };
    format!(
        "{} rules{}{}{profiles}{signed} (generation {}, enforce = {})",
        status.rules,
        version.unwrap_or_default(),
        digest.unwrap_or_default(),
        status.generation,
        safe(&status.enforce)
    )
}

impl Ls {
    fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let policy = call(server, proto::GetPolicyRequest {}, Client::get_policy)?;
        let rules: Vec<RuleJson> =
            policy.rules.into_iter().map(rule_json).collect::<anyhow::Result<_>>()?;
        list(&rules, &self.listing)?;
        self.listing.note_if_empty(rules.len(), "no rule is in force (see: man driftd-policy)");
        Ok(Exit::Clean)
    }
}

#[derive(Debug, Serialize)]
struct RuleJson {
    schema: &'static str,
    id: String,
    reason: String,
    owner: Option<String>,
    /// Null: never.
    expires: Option<Timestamp>,
    expired: bool,
    effect: String,
    severity: Option<String>,
    answers: Vec<String>,
    /// The hook that it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    hook: Option<String>,
    pinned: bool,
    file: String,
    line: u32,
    hits: u64,
    last_hit: Option<Timestamp>,
}

fn rule_json(rule: proto::PolicyRule) -> anyhow::Result<RuleJson> {
    Ok(RuleJson {
        schema: "driftd.rule/v1",
        expires: convert::optional_time_from_proto("expires", rule.expires)?,
        last_hit: convert::optional_time_from_proto("last_hit", rule.last_hit)?,
        id: rule.id,
        reason: rule.reason,
        owner: rule.owner,
        expired: rule.expired,
        effect: rule.effect,
        severity: rule.severity,
        answers: rule.answers,
        hook: rule.hook,
        pinned: rule.pinned,
        file: rule.file,
        line: rule.line,
        hits: rule.hits,
    })
}

impl Listed for RuleJson {
    type Json<'a> = &'a RuleJson;

    fn json(&self) -> &RuleJson {
        self
    }

    fn name(&self) -> String {
        self.id.clone()
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec!["RULE", "EFFECT", "HITS", "LAST HIT", "ENDS"];
        if wide {
            header.extend(["OWNER", "REASON", "FILE"]);
        }
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let mut effect = match &self.severity {
            Some(severity) => format!("severity {severity}"),
            None => self.effect.clone(),
        };
        for answer in &self.answers {
            effect += &format!(", {answer}");
            if let Some(hook) = self.hook.as_ref().filter(|_| answer == "hook") {
                effect += &format!(" {hook}");
            }
        }
        if self.pinned {
            effect += ", pinned";
        }
        let ends = match self.expires {
            Some(end) if self.expired => format!("ENDED {}", time(end)),
            Some(end) => time(end),
            None => "never".to_owned(),
        };
        let mut row: Vec<Field> = vec![
            safe(&self.id).into(),
            safe(&effect).into(),
            self.hits.to_string().into(),
            self.last_hit.map_or_else(|| "never".to_owned(), |at| age(style.now, at)).into(),
            ends.into(),
        ];
        if style.wide {
            row.extend([
                Field::from(safe(self.owner.as_deref().unwrap_or_default())),
                safe(&self.reason).into(),
                format!("{}:{}", safe(&self.file), self.line).into(),
            ]);
        }
        row
    }
}

/// Each rule, and why it does or does not match.
#[derive(Debug, Serialize)]
struct ExplainedJson {
    schema: &'static str,
    finding: String,
    rules: Vec<ReasonJson>,
}

#[derive(Debug, Serialize)]
struct ReasonJson {
    id: String,
    file: String,
    line: usize,
    /// `matches`, `overridden`, `expired` or `fails`.
    result: &'static str,
    /// The key whose condition does not hold.
    key: Option<&'static str>,
    /// What the finding has there; the rule that comes first; or since when it has ended.
    detail: Option<String>,
}

impl Explain {
    fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let found = talk(server, async |mut client: Client| {
            let request = proto::GetFindingRequest { id: self.finding.clone(), as_json: true };
            let reply = client.get_finding(request).await.map_err(explain)?.into_inner();
            let finding = reply.finding.ok_or_else(|| anyhow::anyhow!("driftd returned none"))?;
            let finding = convert::finding_from_proto(finding)?;
            let session = session_of(&mut client, &finding).await?;
            let loaded = match &self.rules {
                Some(directory) => rehearse::rules_of(directory)?,
                None => rehearse::in_force(&mut client).await?,
            };
            Ok((finding, session, loaded))
        });
        let (finding, session, loaded) = found?;
        let subject = Subject {
            finding: &finding,
            severity: finding.verdict.unchanged_severity.unwrap_or(finding.severity),
            session: session.as_ref(),
            may_be_of_session: false,
            is_unproven: false,
        };
        let explained = ExplainedJson {
            schema: "driftd.explanation/v1",
            finding: finding.id.to_string(),
            rules: loaded.rules.explain(&subject, Timestamp::now()).map(reason_json).collect(),
        };
        one(&explained, self.output.format, || explanation(&explained))?;
        Ok(Exit::Clean)
    }
}

/// The session in which a finding happened, if it is kept.
async fn session_of(client: &mut Client, finding: &Finding) -> anyhow::Result<Option<Session>> {
    let Some(id) = finding.session else { return Ok(None) };
    let request = proto::GetSessionRequest { id: id.to_string(), as_json: true };
    match client.get_session(request).await {
        Ok(reply) => {
            let session = reply.into_inner().session;
            Ok(session.map(convert::session_from_proto).transpose()?)
        }
        Err(status) if status.code() == tonic::Code::NotFound => Ok(None),
        Err(status) => Err(explain(status)),
    }
}

fn reason_json((rule, reason): (&Rule, Reason)) -> ReasonJson {
    let (result, key, detail) = match reason {
        Reason::Matches => ("matches", None, None),
        Reason::Overridden(first) => ("overridden", None, Some(first.to_string())),
        Reason::Expired(end) => ("expired", None, Some(end.to_string())),
        Reason::Fails { key, actual } => ("fails", Some(key), Some(actual)),
    };
    let (file, line) = (rule.place.file.to_string(), rule.place.line);
    ReasonJson { id: rule.id.to_string(), file, line, result, key, detail }
}

fn explanation(explained: &ExplainedJson) -> String {
    if explained.rules.is_empty() {
        return "there is no rule\n".to_owned();
    }
    let width = explained.rules.iter().map(|rule| rule.id.len()).max().unwrap_or_default();
    let mut text = String::new();
    for rule in &explained.rules {
        let detail = safe(rule.detail.as_deref().unwrap_or_default());
        let why = match (rule.result, rule.key) {
            ("fails", Some(key)) => format!("no: `{key}` does not hold, the finding has {detail}"),
            ("overridden", _) => format!("no: the rule {detail} comes first"),
            ("expired", _) => format!("no: it has ended ({detail})"),
            _ => "matches".to_owned(),
        };
        text += &format!("{:<width$}  {why}\n", safe(&rule.id));
    }
    text
}
