//! The command line: starts the daemon, and is its client.
//!
//! One file for each command. Data goes to stdout, notes and errors to stderr. The exit codes
//! are in [`exit`]. Nothing here decides what is drift: the daemon does.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::config::{self, DEFAULT_SOCKET};
use client::Server;
use exit::Exit;
use settings::Settings;

pub mod exit;

mod baseline;
mod client;
mod containers;
mod describe;
mod doctor;
mod evidence;
mod findings;
mod follow;
mod gap;
mod hooks;
mod members;
mod metrics;
mod output;
mod pages;
mod policy;
mod probes;
mod profiles;
mod rehearse;
mod replay;
mod report;
mod respond;
mod sessions;
mod settings;
mod show;
mod status;
mod story;
mod suggest;
mod summary;
mod timeline;
mod top;
mod when;

/// Reports when running containers no longer match their images.
#[derive(Debug, Parser)]
#[command(
    name = "driftd",
    version,
    propagate_version = true,
    max_term_width = 100,
    after_help = "Exit codes: 0 answered, and clean; 1 answered, and there is drift, or the \
                  view is incomplete; 2 could not answer; 64 usage or settings."
)]
pub struct Cli {
    /// The Unix socket of driftd's API [env: DRIFTD_SOCKET]
    #[arg(long, global = true, value_name = "SOCKET")]
    socket: Option<PathBuf>,
    /// Read this history, or the state directory that holds it, without a daemon
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "socket")]
    history: Option<PathBuf>,
    /// Show times, and read those without a zone, in the local time of this machine, not in UTC
    #[arg(long, global = true)]
    local_time: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon in the foreground
    Run(Run),
    /// Check what will work on this node, and what will not
    Doctor(doctor::Doctor),
    /// Show whether the view is complete
    Status(status::Status),
    /// Print counters and gauges in the text format of Prometheus
    Metrics(metrics::Metrics),
    /// Record, prove, compare and export what images hold
    #[command(subcommand)]
    Baseline(baseline::Baseline),
    /// List the containers that are watched
    Containers(containers::Containers),
    /// Show how a container differs from its image right now
    Diff(containers::Diff),
    /// List or follow what was found
    Findings(Box<findings::Findings>),
    /// Count what was found, by kind, severity and container
    Summary(Box<summary::Summary>),
    /// List or follow the sessions in containers: how each began, and for which user
    Sessions(sessions::Sessions),
    /// Show containers, findings, sessions and losses live, and respond to them
    Top(top::Top),
    /// Show what happened in a container, in the order of time
    Timeline(timeline::Timeline),
    /// Show everything about one finding, or about one session with its commands
    Show(show::Show),
    /// List the files that one finding stands for
    Members(members::Members),
    /// Write a report about a container or a session, for people who were not there
    Report(report::Report),
    /// List the commands that run in containers again and again, and whether each is reported
    Probes(probes::Probes),
    /// Check, list and explain the rules that decide what happens to findings
    #[command(subcommand)]
    Policy(policy::Policy),
    /// Respond to drift: kill, pause or resume a container, kill a process, or run a hook
    #[command(subcommand)]
    Respond(respond::Respond),
    /// Take, list, verify and export evidence of containers
    #[command(subcommand)]
    Evidence(evidence::Evidence),
    /// Run the programs of hooks, as the daemon asks for them, until it is stopped
    Hooks(hooks::Hooks),
    /// Play a text file as if it were a node, and show what driftd reports of it
    Replay(replay::Replay),
    /// Print the completions of a shell
    Completions { shell: clap_complete::Shell },
    /// Print the manual page
    Man {
        /// Write the pages of every command into this directory instead
        #[arg(long, value_name = "DIRECTORY")]
        directory: Option<PathBuf>,
    },
    /// Guard the daemon (started by the daemon itself)
    #[command(hide = true)]
    Guardian,
    /// Reply to the kernel's requests (started by the daemon itself)
    #[command(hide = true)]
    Gate,
}

#[derive(Debug, clap::Args)]
struct Run {
    #[command(flatten)]
    settings: Settings,
    /// Only read the settings and the policy files, and report what is wrong with them
    #[arg(long)]
    check: bool,
}

impl Run {
    fn run(self, socket: Option<&Path>) -> anyhow::Result<Exit> {
        let config = self.settings.load(socket)?;
        if self.check {
            let mut faults = crate::hooks::faults(&config.hooks);
            faults.extend(policy::faults(&config.policy));
            faults.iter().for_each(|fault| eprintln!("{fault}"));
            return Ok(if faults.is_empty() { Exit::Clean } else { Exit::Usage });
        }
        let socket = socket.map(Path::to_path_buf);
        let reread = move || self.settings.load(socket.as_deref());
        crate::daemon::run(&config, reread)
    }
}

impl Command {
    /// Whether the command only reads the history.
    fn reads_history(&self) -> bool {
        match self {
            Command::Findings(findings) => !findings.is_following(),
            Command::Sessions(sessions) => !sessions.is_following(),
            Command::Probes(probes) => !probes.is_change(),
            Command::Policy(policy) => policy.reads_history(),
            Command::Timeline(_)
            | Command::Show(_)
            | Command::Members(_)
            | Command::Report(_)
            | Command::Summary(_) => true,
            _ => false,
        }
    }
}

impl Cli {
    /// Reads the command line. Prints help or an error itself, and returns the exit code then.
    pub fn from_command_line() -> Result<Cli, Exit> {
        Cli::try_parse().map_err(|err| {
            // Fails if no process reads the output, and then there is nowhere to report it.
            let _ = err.print();
            if err.use_stderr() { Exit::Usage } else { Exit::Clean }
        })
    }

    pub fn run(self) -> anyhow::Result<Exit> {
        if self.local_time {
            when::use_local_time();
        }
        // clap would show the option in the usage as if it were required.
        let from_environment = || std::env::var_os("DRIFTD_SOCKET").filter(|name| !name.is_empty());
        let socket = self.socket.or_else(|| from_environment().map(PathBuf::from));
        let socket = socket.as_deref();
        let reader = match &self.history {
            Some(_) if !self.command.reads_history() => {
                eprintln!(
                    "error: --history is for findings, sessions, timeline, show, members, report, \
                     probes and summary, and not for what follows or changes"
                );
                return Ok(Exit::Usage);
            }
            Some(file) => Server::History(file),
            None => Server::Daemon(socket.unwrap_or(Path::new(DEFAULT_SOCKET))),
        };
        let server = socket.unwrap_or(Path::new(DEFAULT_SOCKET));
        match self.command {
            Command::Run(run) => run.run(socket),
            Command::Doctor(doctor) => doctor.run(socket),
            Command::Status(status) => status.run(server),
            Command::Metrics(metrics) => metrics.run(server),
            Command::Baseline(baseline) => baseline.run(server),
            Command::Containers(containers) => containers.run(server),
            Command::Diff(diff) => diff.run(server),
            Command::Findings(findings) => findings.run(reader),
            Command::Summary(summary) => summary.run(reader),
            Command::Sessions(sessions) => sessions.run(reader),
            Command::Top(top) => top.run(server),
            Command::Timeline(timeline) => timeline.run(reader),
            Command::Show(show) => show.run(reader),
            Command::Members(members) => members.run(reader),
            Command::Report(report) => report.run(reader),
            Command::Probes(probes) => probes.run(reader),
            Command::Policy(policy) => policy.run(reader),
            Command::Respond(respond) => respond.run(server),
            Command::Evidence(evidence) => evidence.run(server),
            Command::Hooks(hooks) => hooks.run(server),
            Command::Replay(replay) => replay.run(),
            Command::Completions { shell } => completions(shell),
            Command::Man { directory } => man(directory.as_deref()),
            Command::Guardian => Ok(match crate::guardian::run()? {
                crate::guardian::Ended::DaemonGone => Exit::Clean,
                crate::guardian::Ended::Killed(_) => Exit::Failed,
            }),
            Command::Gate => {
                crate::gate::run()?;
                Ok(Exit::Clean)
            }
        }
    }
}

fn completions(shell: clap_complete::Shell) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "driftd", &mut script);
    output::write(&script)?;
    Ok(Exit::Clean)
}

fn man(directory: Option<&Path>) -> anyhow::Result<Exit> {
    match directory {
        Some(directory) => {
            std::fs::create_dir_all(directory)
                .and_then(|()| clap_mangen::generate_to(Cli::command(), directory))
                .with_context(|| format!("cannot write man pages into {}", directory.display()))?;
        }
        None => {
            let mut page = Vec::new();
            clap_mangen::Man::new(Cli::command()).render(&mut page)?;
            output::write(&page)?;
        }
    }
    Ok(Exit::Clean)
}

/// Whether `err` only means that no process reads our output any more.
pub fn is_broken_pipe(err: &anyhow::Error) -> bool {
    err.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|err| err.kind() == io::ErrorKind::BrokenPipe)
            || cause
                .downcast_ref::<serde_json::Error>()
                .is_some_and(|err| err.io_error_kind() == Some(io::ErrorKind::BrokenPipe))
    })
}

/// The exit code for an error.
pub fn exit_of(err: &anyhow::Error) -> Exit {
    match err.downcast_ref::<config::Error>() {
        Some(_) => Exit::Usage,
        None => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
