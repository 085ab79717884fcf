//! `driftd replay`: plays a text file as if it were a node. It needs no daemon and no
//! root. The language belongs to `replay`; this prints what happens.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use jiff::Timestamp;

use super::exit::Exit;
use super::output;
use crate::model::{Disposition, printable};
use crate::replay::{Happened, Script, play};

#[derive(Debug, clap::Args)]
pub(super) struct Replay {
    /// The file to play; `-` for standard input (see docs/replay.md)
    file: PathBuf,
    /// Print each revision of a finding as JSON, one on a line, and nothing else
    #[arg(long)]
    json: bool,
}

impl Replay {
    pub(super) fn run(self) -> anyhow::Result<Exit> {
        let name = self.file.display();
        let text = read(&self.file).with_context(|| format!("cannot read {name}"))?;
        let mut out = String::new();
        let mut each = |at: Timestamp, happened: &Happened| {
            out += &if self.json { json(happened) } else { line(at, happened) };
        };
        let played = Script::parse(&text).and_then(|script| play(&script, &mut each));
        output::write(out.as_bytes())?;
        match played {
            Ok(unmet) => {
                for wrong in &unmet {
                    eprintln!("{name}: {wrong}");
                }
                Ok(if unmet.is_empty() { Exit::Clean } else { Exit::Drift })
            }
            Err(wrong) => {
                eprintln!("error: {name}: {wrong}");
                Ok(Exit::Usage)
            }
        }
    }
}

fn read(file: &Path) -> std::io::Result<String> {
    if file == Path::new("-") {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text)?;
        return Ok(text);
    }
    std::fs::read_to_string(file)
}

fn json(happened: &Happened) -> String {
    match happened {
        Happened::Finding(finding) => {
            let mut line = serde_json::to_string(finding).unwrap_or_default();
            line.push('\n');
            line
        }
        Happened::Response(_) | Happened::Loss { .. } | Happened::Session { .. } => String::new(),
    }
}

fn line(at: Timestamp, happened: &Happened) -> String {
    let mut line = format!("{at} ");
    let written = match happened {
        Happened::Finding(finding) => {
            let container = finding.container_id().map(ToString::to_string).unwrap_or_default();
            let file = finding.file.as_ref().map(|file| format!(" {}", file.path));
            writeln!(
                line,
                "finding  {} {} {container}{} (seen {} times{})",
                finding.severity,
                finding.kind,
                file.unwrap_or_default(),
                finding.count,
                match (&finding.verdict.disposition, &finding.verdict.rule) {
                    (Disposition::Accept, Some(rule)) => format!(", accepted by {rule}"),
                    _ => String::new(),
                }
            )
        }
        Happened::Response(response) => {
            let done = if response.outcome.succeeded { "done" } else { "failed" };
            let message = printable(response.outcome.message.as_bytes());
            let action = &response.outcome.action;
            writeln!(line, "response {action} {} {done}: {message}", response.container)
        }
        Happened::Loss { name, detail } => {
            writeln!(line, "loss     {name}: {}", printable(detail.as_bytes()))
        }
        Happened::Session { container, entry, is_open } => {
            let state = if *is_open { "open" } else { "closed" };
            writeln!(line, "session  {entry} {container} {state}")
        }
    };
    // Writing into a string cannot fail.
    let _ = written;
    line
}
