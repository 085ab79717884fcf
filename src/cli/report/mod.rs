//! `driftd report`: an incident for people who were not there, as HTML, Markdown or JSON.
//!
//! `target.rs` finds out what is meant, `gather.rs` reads it, and `collect.rs` keeps what is
//! listed (`model.rs`). `page.rs` says it in words, which `html.rs` and `markdown.rs` render.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::ValueEnum;

use self::gather::{Wanted, gather};
use super::client::{Server, talk};
use super::exit::Exit;
use super::output::write;
use super::when::{self, When, zone};

mod axis;
mod collect;
mod drawing;
mod events;
mod found;
mod gather;
mod html;
mod json;
mod markdown;
mod model;
mod page;
mod phrase;
mod target;

#[derive(Debug, clap::Args)]
pub(super) struct Report {
    /// A container's whole ID, NAMESPACE/ID, or 8 or more digits of a hexadecimal ID; or the
    /// ID of a session or of a case of evidence, or the beginning of it
    #[arg(value_name = "CONTAINER|SESSION|CASE")]
    target: String,
    /// The form of the report [default: by the name of FILE, else html]
    #[arg(short = 'o', long, value_name = "FORMAT")]
    format: Option<Form>,
    /// Only what lasted beyond this time: 2h, yesterday, 2026-11-27, 14:30, RFC 3339
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = when::parse)]
    since: Option<When>,
    /// Only what began before this time
    #[arg(long, value_name = "TIME", allow_hyphen_values = true, value_parser = when::parse)]
    until: Option<When>,
    /// List at most this many findings, the worst first (0: all)
    #[arg(long, value_name = "NUMBER", default_value_t = 200)]
    limit: usize,
    /// Write the report into this file, and not to stdout; a new file is for its owner only
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Form {
    /// One page for a browser and for printing
    Html,
    /// Markdown, for tickets and wikis
    #[value(alias = "markdown")]
    Md,
    /// One JSON document, driftd.report/v1
    Json,
}

impl Form {
    /// The form that the ending of a file's name stands for.
    fn of_name(file: &Path) -> Option<Form> {
        match file.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "html" | "htm" => Some(Form::Html),
            "md" | "markdown" => Some(Form::Md),
            "json" => Some(Form::Json),
            _ => None,
        }
    }
}

impl Report {
    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        // Other commands name the form with `--output`.
        if let Some(file) = &self.output
            && file.to_str().is_some_and(|name| Form::from_str(name, true).is_ok())
        {
            let name = file.display();
            eprintln!(
                "error: --output names a file: for the form, write -o {name}; for a file of that name, --output ./{name}"
            );
            return Ok(Exit::Usage);
        }
        let of_name = self.output.as_deref().and_then(Form::of_name);
        let form = self.format.or(of_name).unwrap_or(Form::Html);
        let time =
            |when: Option<&When>| when.map(When::timestamp).transpose().map_err(anyhow::Error::msg);
        let (since, until) = (time(self.since.as_ref())?, time(self.until.as_ref())?);
        if let (Some(since), Some(until)) = (since, until)
            && since > until
        {
            eprintln!("error: --since is later than --until: nothing lies between them");
            return Ok(Exit::Usage);
        }
        let most_findings = if self.limit == 0 { usize::MAX } else { self.limit };
        let wanted = Wanted { since, until, most_findings };
        let report = talk(server, |mut client| async move {
            let target = target::resolve(&mut client, &self.target).await?;
            gather(client, server, target, wanted).await
        })?;
        let text = render(&report, form)?;
        match &self.output {
            None => write(text.as_bytes())?,
            Some(file) => write_file(file, &text)
                .with_context(|| format!("cannot write the report into {}", file.display()))?,
        }
        Ok(Exit::Clean)
    }
}

fn render(report: &model::Report, form: Form) -> anyhow::Result<String> {
    match form {
        Form::Html => html::html(&page::page(report, &zone())),
        Form::Md => Ok(markdown::markdown(&page::page(report, &zone()))),
        Form::Json => json::json(report),
    }
}

/// Command lines may hold passwords, so a new file is readable by its owner only. The file may
/// be a pipe or a device, so it is not replaced.
fn write_file(file: &Path, text: &str) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(file)?;
    file.write_all(text.as_bytes())?;
    file.flush()
}
