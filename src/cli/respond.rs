//! `driftd respond`: kills, pauses or resumes a container, kills one of its processes, runs a
//! hook, and lets rules answer again that were stopped.
//!
//! Sends the request and prints the outcome. Decides nothing: the daemon checks the container,
//! the run and the reason.

use std::path::Path;

use clap::Subcommand;
use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, call, explain, talk};
use super::exit::Exit;
use super::output::{Output, one, safe, time};
use crate::api::{convert, proto};
use crate::model::{ContainerId, Outcome};
use crate::respond::Action;

#[derive(Debug, Subcommand)]
pub(super) enum Respond {
    /// Kill every process of a container
    Kill {
        #[command(flatten)]
        target: Target,
        /// Keep the container stopped, if the restart monitor of containerd or Docker would start
        /// it again: set the label containerd.io/restart.status=stopped, or Docker's restart
        /// policy "no", first
        #[arg(long)]
        no_restart: bool,
    },
    /// Kill one process of a container
    KillProcess {
        #[command(flatten)]
        target: Target,
        /// Its pid on the host [default: the process of the finding]
        #[arg(long, required_unless_present = "finding", value_parser = clap::value_parser!(u32).range(2..))]
        pid: Option<u32>,
    },
    /// Freeze a container, so that nothing in it runs
    Pause(Target),
    /// Thaw a paused container
    Resume(Target),
    /// Run a hook of the settings for a finding
    Hook {
        /// The hook, by its name in the settings
        name: String,
        /// The finding that the program gets. Refused if that run of its container is over
        #[arg(long, value_name = "ID")]
        finding: String,
        /// Why: the history keeps it
        #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        reason: String,
        #[command(flatten)]
        output: Output,
    },
    /// Let a rule answer again that was stopped, because it would have answered in too many
    /// containers
    ResumeAnswers {
        /// The rule [default: all that are stopped]
        rule: Option<String>,
        /// Why: the history keeps it
        #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
        reason: String,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Target {
    /// A container's whole ID, NAMESPACE/ID, or 8 or more digits of a hexadecimal ID
    #[arg(required_unless_present = "finding")]
    container: Option<String>,
    /// Respond to this finding, and refuse if that run of its container is over
    #[arg(long, value_name = "ID")]
    finding: Option<String>,
    /// Why: the history keeps it
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    reason: String,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
pub(super) struct ResponseJson {
    schema: &'static str,
    container: ContainerId,
    reason: String,
    pub(super) outcome: Outcome,
}

/// A rule whose answers are stopped.
#[derive(Serialize)]
pub(super) struct StoppedRuleJson {
    pub(super) rule: String,
    pub(super) since: Timestamp,
    /// The container in which it would have answered next.
    pub(super) container: ContainerId,
    pub(super) reason: String,
}

pub(super) fn stopped_rule_json(stopped: proto::StoppedRule) -> anyhow::Result<StoppedRuleJson> {
    let proto::StoppedRule { rule, since, namespace, container, reason } = stopped;
    let since = convert::time_from_proto("stopped_rule.since", since)?;
    Ok(StoppedRuleJson { rule, since, container: ContainerId::new(&namespace, &container), reason })
}

#[derive(Serialize)]
struct ResumedJson {
    schema: &'static str,
    /// The rules that answer again.
    resumed: Vec<StoppedRuleJson>,
}

impl Respond {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let mut hook = String::new();
        let (action, target, no_restart, pid) = match self {
            Respond::Hook { name, finding, reason, output } => {
                hook = name;
                let target = Target { container: None, finding: Some(finding), reason, output };
                (Action::Hook, target, false, None)
            }
            Respond::Kill { target, no_restart } => (Action::Kill, target, no_restart, None),
            Respond::KillProcess { target, pid } => (Action::KillProcess, target, false, pid),
            Respond::Pause(target) => (Action::Pause, target, false, None),
            Respond::Resume(target) => (Action::Resume, target, false, None),
            Respond::ResumeAnswers { rule, reason, output } => {
                return resume_answers(socket, rule, reason, &output);
            }
        };
        let request = proto::RespondRequest {
            container: target.container.unwrap_or_default(),
            finding: target.finding.unwrap_or_default(),
            action: convert::action_to_proto(action).into(),
            reason: target.reason,
            no_restart,
            pid: pid.unwrap_or_default(),
            hook,
        };
        let json = talk(socket, |client| send(client, request))?;
        one(&json, target.output.format, || text(&json))?;
        Ok(if json.outcome.succeeded { Exit::Clean } else { Exit::Failed })
    }
}

/// Sends a request for a response, and returns the outcome.
pub(super) async fn send(
    mut client: Client,
    request: proto::RespondRequest,
) -> anyhow::Result<ResponseJson> {
    let reason = request.reason.clone();
    let response = client.respond(request).await.map_err(explain)?.into_inner();
    let outcome = response.outcome.ok_or_else(|| anyhow::anyhow!("driftd returned no outcome"))?;
    Ok(ResponseJson {
        schema: "driftd.response/v1",
        container: ContainerId::new(&response.namespace, &response.container),
        reason,
        outcome: convert::outcome_from_proto(outcome)?,
    })
}

fn resume_answers(
    socket: &Path,
    rule: Option<String>,
    reason: String,
    output: &Output,
) -> anyhow::Result<Exit> {
    let request = proto::ResumeAnswersRequest { rule: rule.unwrap_or_default(), reason };
    let resumed = call(socket, request, Client::resume_answers)?.resumed;
    let resumed = resumed.into_iter().map(stopped_rule_json).collect::<anyhow::Result<_>>()?;
    let result = ResumedJson { schema: "driftd.resumed/v1", resumed };
    one(&result, output.format, || {
        if result.resumed.is_empty() {
            return "no rule is stopped\n".to_owned();
        }
        let line = |one: &StoppedRuleJson| {
            format!("rule {} answers again (stopped since {})\n", safe(&one.rule), time(one.since))
        };
        result.resumed.iter().map(line).collect()
    })?;
    Ok(Exit::Clean)
}

/// The outcome in one line.
pub(super) fn text(response: &ResponseJson) -> String {
    let result = if response.outcome.succeeded { "done" } else { "FAILED" };
    format!(
        "{} {}: {result}: {}\n",
        safe(&response.outcome.action),
        response.container,
        safe(&response.outcome.message)
    )
}
