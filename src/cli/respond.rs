//! `driftd respond`: kills, pauses or resumes a container.
//!
//! Sends the request and prints the outcome. Decides nothing: the daemon checks the container,
//! the run and the reason.

use std::path::Path;

use clap::Subcommand;
use serde::Serialize;

use super::client::{Client, call};
use super::exit::Exit;
use super::output::{Output, one, safe};
use crate::api::{convert, proto};
use crate::model::{ContainerId, Outcome};
use crate::respond::Action;

#[derive(Debug, Subcommand)]
pub(super) enum Respond {
    /// Kill every process of a container
    Kill {
        #[command(flatten)]
        target: Target,
        /// Set the label containerd.io/restart.status=stopped first, if the restart monitor
        /// of containerd would start the container again
        #[arg(long)]
        no_restart: bool,
    },
    /// Freeze a container, so that nothing in it runs
    Pause(Target),
    /// Thaw a paused container
    Resume(Target),
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
struct ResponseJson {
    schema: &'static str,
    container: ContainerId,
    reason: String,
    outcome: Outcome,
}

impl Respond {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let (action, target, no_restart) = match self {
            Respond::Kill { target, no_restart } => (Action::Kill, target, no_restart),
            Respond::Pause(target) => (Action::Pause, target, false),
            Respond::Resume(target) => (Action::Resume, target, false),
        };
        let request = proto::RespondRequest {
            container: target.container.unwrap_or_default(),
            finding: target.finding.unwrap_or_default(),
            action: convert::action_to_proto(action).into(),
            reason: target.reason.clone(),
            no_restart,
        };
        let response = call(socket, request, Client::respond)?;
        let outcome =
            response.outcome.ok_or_else(|| anyhow::anyhow!("driftd returned no outcome"))?;
        let json = ResponseJson {
            schema: "driftd.response/v1",
            container: ContainerId::new(&response.namespace, &response.container),
            reason: target.reason,
            outcome: convert::outcome_from_proto(outcome)?,
        };
        one(&json, target.output.format, || text(&json))?;
        Ok(if json.outcome.succeeded { Exit::Clean } else { Exit::Failed })
    }
}

fn text(response: &ResponseJson) -> String {
    let result = if response.outcome.succeeded { "done" } else { "FAILED" };
    format!(
        "{} {}: {result}: {}\n",
        safe(&response.outcome.action),
        response.container,
        safe(&response.outcome.message)
    )
}
