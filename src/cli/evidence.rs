//! `driftd evidence`: takes evidence of a container, and lists, shows, verifies, exports and removes
//! cases.
//!
//! The daemon takes and keeps them. Only `verify` reads a directory itself: a copy of a case, where
//! no daemon need be.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Subcommand;
use jiff::Timestamp;
use serde::Serialize;

use super::client::{Client, call, explain, talk};
use super::exit::Exit;
use super::output::{Field, Listed, Listing, Output, Style, age, list, one, safe, time};
use crate::api::{convert, proto};
use crate::evidence::{Manifest, Verified, verify};
use crate::model::{ContainerId, Outcome};

#[derive(Debug, Subcommand)]
pub(super) enum Evidence {
    /// Take evidence of a container: drifted files, processes, and what is known of them
    Take(Take),
    /// List the cases that are kept
    Ls(Listing),
    /// Show what a case holds, and what is missing from it
    Show(Of),
    /// Check that a case is as it was taken
    Verify(Verify),
    /// Write a case into one file: a tar, compressed by zstd, with an in-toto statement
    Export(Export),
    /// Remove a case for good
    Rm(Of),
}

#[derive(Debug, clap::Args)]
pub(super) struct Take {
    /// A container's whole ID, NAMESPACE/ID, or 8 or more digits of a hexadecimal ID
    #[arg(required_unless_present = "finding")]
    container: Option<String>,
    /// Take evidence of this finding, and refuse if that run of its container is over
    #[arg(long, value_name = "ID")]
    finding: Option<String>,
    /// Why: the history and the case keep it
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "requested by a user",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    reason: String,
    /// Keep the values of environment variables, too: they hold secrets
    #[arg(long)]
    environment: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub(super) struct Of {
    /// A case's ID, or the beginning of it
    case: String,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub(super) struct Verify {
    /// A case's ID, or the beginning of it; or the directory of a case, such as an unpacked one
    #[arg(value_name = "CASE|DIRECTORY")]
    case: String,
    /// The digest that the case had, for a directory: `driftd evidence take` and the timeline show
    /// it
    #[arg(long, value_name = "SHA256")]
    digest: Option<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub(super) struct Export {
    /// A case's ID, or the beginning of it
    case: String,
    /// The file to write; it must not be there
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Serialize)]
struct TakenJson {
    schema: &'static str,
    container: ContainerId,
    /// Null if nothing was kept.
    case: Option<String>,
    /// The SHA-256 of the case's `SHA256SUMS`.
    digest: Option<String>,
    outcome: Outcome,
}

#[derive(Serialize)]
struct CaseJson {
    schema: &'static str,
    id: String,
    /// Null if the case is damaged.
    container: Option<ContainerId>,
    finding: Option<String>,
    reason: String,
    requested_by: String,
    began_at: Option<Timestamp>,
    taken_at: Option<Timestamp>,
    takes: u32,
    files: u64,
    processes: u64,
    bytes: u64,
    /// What is missing; empty for a whole case.
    cut: Vec<String>,
    /// Why the manifest cannot be read; null if it can.
    damaged: Option<String>,
}

#[derive(Serialize)]
struct VerifiedJson {
    schema: &'static str,
    case: Option<String>,
    /// Whether it is as it was taken.
    as_taken: bool,
    problems: Vec<String>,
    digest: Option<String>,
    /// The digest that the history, or the user, has kept; null if there is none.
    recorded: Option<String>,
    files: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct RemovedJson {
    schema: &'static str,
    id: String,
    bytes: u64,
}

impl Evidence {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        match self {
            Evidence::Take(take) => take.run(socket),
            Evidence::Ls(listing) => ls(socket, &listing),
            Evidence::Show(of) => show(socket, of),
            Evidence::Verify(verify) => verify.run(socket),
            Evidence::Export(export) => export.run(socket),
            Evidence::Rm(of) => remove(socket, of),
        }
    }
}

impl Take {
    fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let request = proto::TakeEvidenceRequest {
            container: self.container.unwrap_or_default(),
            finding: self.finding.unwrap_or_default(),
            reason: self.reason,
            environment: self.environment,
        };
        let reply = call(socket, request, Client::take_evidence)?;
        let outcome = reply.outcome.ok_or_else(|| anyhow::anyhow!("driftd returned no outcome"))?;
        let (case, digest) = reply.case.map(|case| (case.id, case.digest)).unzip();
        let json = TakenJson {
            schema: "driftd.evidence_taken/v1",
            container: ContainerId::new(&reply.namespace, &reply.container),
            case,
            digest,
            outcome: convert::outcome_from_proto(outcome)?,
        };
        one(&json, self.output.format, || {
            let result = if json.outcome.succeeded { "taken" } else { "FAILED" };
            let message = safe(&json.outcome.message);
            let mut text = format!("evidence of {}: {result}: {message}\n", json.container);
            if let Some(digest) = &json.digest {
                text += &format!("digest sha256:{}\n", safe(digest));
            }
            text
        })?;
        Ok(if json.outcome.succeeded { Exit::Clean } else { Exit::Failed })
    }
}

fn case_json(case: proto::EvidenceCase) -> anyhow::Result<CaseJson> {
    let proto::EvidenceCase {
        id,
        namespace,
        container,
        finding,
        reason,
        requested_by,
        began_at,
        taken_at,
        takes,
        files,
        processes,
        bytes,
        cut,
        damaged,
    } = case;
    Ok(CaseJson {
        schema: "driftd.evidence_case/v1",
        id,
        container: (!container.is_empty()).then(|| ContainerId::new(&namespace, &container)),
        finding,
        reason,
        requested_by,
        began_at: convert::optional_time_from_proto("began_at", began_at)?,
        taken_at: convert::optional_time_from_proto("taken_at", taken_at)?,
        takes,
        files,
        processes,
        bytes,
        cut,
        damaged: (!damaged.is_empty()).then_some(damaged),
    })
}

impl Listed for CaseJson {
    type Json<'a> = &'a CaseJson;

    fn json(&self) -> &CaseJson {
        self
    }

    fn name(&self) -> String {
        safe(&self.id)
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec!["CASE", "CONTAINER", "TAKEN", "FILES", "PROCESSES", "SIZE", "STATE"];
        if wide {
            header.extend(["FINDING", "REQUESTED BY", "REASON"]);
        }
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let state = match (&self.damaged, &self.cut[..]) {
            (Some(_), _) => "DAMAGED",
            (None, []) => "whole",
            (None, _) => "cut",
        };
        let none = || "-".to_owned();
        let container = self.container.as_ref().map_or_else(none, |container| {
            format!("{}/{}", safe(&container.namespace), style.id(&container.id))
        });
        let mut row: Vec<Field> = vec![
            style.id(&self.id).into(),
            container.into(),
            self.taken_at.map_or_else(none, |at| age(style.now, at)).into(),
            self.files.to_string().into(),
            self.processes.to_string().into(),
            size(self.bytes).into(),
            state.into(),
        ];
        if style.wide {
            let finding = self.finding.as_deref().map_or_else(none, |finding| style.id(finding));
            row.push(finding.into());
            row.extend([safe(&self.requested_by).into(), safe(&self.reason).into()]);
        }
        row
    }
}

/// Bytes as people read them.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut at = 0;
    let mut left = bytes / 1024;
    while left >= 1024 && at + 1 < UNITS.len() {
        left /= 1024;
        at += 1;
    }
    if bytes < 1024 { format!("{bytes} B") } else { format!("{left} {}", UNITS[at]) }
}

fn ls(socket: &Path, listing: &Listing) -> anyhow::Result<Exit> {
    let cases = call(socket, proto::ListEvidenceRequest {}, Client::list_evidence)?.cases;
    let cases: Vec<CaseJson> = cases.into_iter().map(case_json).collect::<anyhow::Result<_>>()?;
    list(&cases, listing)?;
    listing.note_if_empty(cases.len(), "no evidence is kept");
    let is_damaged = cases.iter().any(|case| case.damaged.is_some());
    Ok(if is_damaged { Exit::Drift } else { Exit::Clean })
}

fn show(socket: &Path, of: Of) -> anyhow::Result<Exit> {
    let request = proto::GetEvidenceRequest { case: of.case };
    let reply = call(socket, request, Client::get_evidence)?;
    let manifest: Manifest = serde_json::from_str(&reply.manifest_json)
        .context("the manifest is damaged (see: driftd evidence verify)")?;
    let bytes = reply.case.map_or(0, |case| case.bytes);
    one(&manifest, of.output.format, || text(&manifest, bytes))?;
    Ok(Exit::Clean)
}

fn text(manifest: &Manifest, bytes: u64) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        writeln!(text, "{label:<12}{value}").expect("writing to a String cannot fail");
    };
    line("Case", &manifest.case.to_string());
    line("Container", &format!("{} on {}", manifest.container, safe(&manifest.node)));
    if let Some(run) = &manifest.run {
        line("Run", &format!("pid {}", run.pid));
    }
    if let Some(finding) = &manifest.finding {
        let kind = manifest.kind.map_or_else(String::new, |kind| format!(" ({kind})"));
        line("Finding", &format!("{finding}{kind}"));
    }
    line("Size", &format!("{} in {} files", size(bytes), manifest.files.len()));
    for take in &manifest.takes {
        let counts = &take.counts;
        line("Taken", &format!("{}, for {}", time(take.ended_at), safe(&take.requested_by)));
        line("", &safe(&take.reason));
        line(
            "",
            &format!(
                "{} of {} files, {} of {} processes, {} findings, {} sessions{}{}",
                counts.files_kept,
                counts.files_listed,
                counts.processes_kept,
                counts.processes_found,
                counts.findings,
                counts.sessions,
                if take.environment { ", with environments" } else { "" },
                if take.frozen { ", frozen meanwhile" } else { "" },
            ),
        );
        if counts.files_cut + counts.files_unstable > 0 {
            let (cut, unstable) = (counts.files_cut, counts.files_unstable);
            line("", &format!("{cut} files cut, {unstable} changed while they were read"));
        }
        for cut in &take.cut {
            line("Cut", &safe(cut));
        }
    }
    text
}

impl Verify {
    fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let directory = Path::new(&self.case);
        let is_directory = self.case.contains('/') || directory.is_dir();
        let json = if is_directory {
            let verified = verify(directory)
                .with_context(|| format!("cannot read the directory {}", safe(&self.case)))?;
            of_directory(verified, self.digest)
        } else {
            anyhow::ensure!(
                self.digest.is_none(),
                "--digest is for a directory: the history has the digests of cases"
            );
            let request = proto::VerifyEvidenceRequest { case: self.case };
            let reply = call(socket, request, Client::verify_evidence)?;
            let proto::VerifyEvidenceResponse { id, digest, problems, recorded, files, bytes } =
                reply;
            VerifiedJson {
                schema: VERIFIED,
                case: Some(id),
                as_taken: problems.is_empty(),
                problems,
                digest: (!digest.is_empty()).then_some(digest),
                recorded,
                files,
                bytes,
            }
        };
        one(&json, self.output.format, || verified_text(&json))?;
        Ok(if json.as_taken { Exit::Clean } else { Exit::Drift })
    }
}

const VERIFIED: &str = "driftd.evidence_verified/v1";

fn of_directory(verified: Verified, recorded: Option<String>) -> VerifiedJson {
    let Verified { case, digest, mut problems, files, bytes } = verified;
    let digest = digest.map(|digest| digest.to_string());
    let recorded = recorded.map(|text| text.trim_start_matches("sha256:").to_ascii_lowercase());
    if recorded.is_some() && recorded != digest {
        problems.push("it has another digest".to_owned());
    }
    VerifiedJson {
        schema: VERIFIED,
        case: case.map(|case| case.to_string()),
        as_taken: problems.is_empty(),
        problems,
        digest,
        recorded,
        files,
        bytes,
    }
}

fn verified_text(json: &VerifiedJson) -> String {
    let case = json.case.as_deref().unwrap_or("?");
    let mut text = match json.as_taken {
        true => format!(
            "case {}: as it was taken ({} files, {})\n",
            safe(case),
            json.files,
            size(json.bytes)
        ),
        false => format!("case {}: NOT as it was taken\n", safe(case)),
    };
    for problem in &json.problems {
        text += &format!("- {}\n", safe(problem));
    }
    match (&json.recorded, &json.digest) {
        (Some(recorded), _) if json.as_taken => {
            text += &format!("digest sha256:{}, as it was recorded\n", safe(recorded));
        }
        (Some(recorded), digest) => {
            let digest = digest.as_deref().unwrap_or("none");
            text += &format!("digest {}, recorded {}\n", safe(digest), safe(recorded));
        }
        (None, Some(digest)) => {
            text += &format!(
                "digest sha256:{}; compare it with the recorded one, which is not known here\n",
                safe(digest)
            );
        }
        (None, None) => (),
    }
    text
}

impl Export {
    fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let Export { case, out } = self;
        let shown = out.display().to_string();
        anyhow::ensure!(
            out.symlink_metadata().is_err(),
            "{} is there already (name another file)",
            safe(&shown)
        );
        let mut part = out.clone().into_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)
            .with_context(|| format!("cannot write {}", safe(&part.display().to_string())))?;
        let written = receive(socket, case, file)
            .and_then(|bytes| Ok(std::fs::rename(&part, &out).map(|()| bytes)?));
        if written.is_err() {
            let _ = std::fs::remove_file(&part);
        }
        let bytes = written.with_context(|| format!("cannot write {}", safe(&shown)))?;
        eprintln!("{} ({}) holds secrets: only you may read it", safe(&shown), size(bytes));
        Ok(Exit::Clean)
    }
}

/// Writes the archive as it comes. Returns how many bytes it has.
fn receive(socket: &Path, case: String, mut file: File) -> anyhow::Result<u64> {
    talk(socket, |mut client| async move {
        let request = proto::ExportEvidenceRequest { case };
        let mut stream = client.export_evidence(request).await.map_err(explain)?.into_inner();
        let mut bytes = 0;
        while let Some(part) = stream.message().await.map_err(explain)? {
            file.write_all(&part.data)?;
            bytes += part.data.len() as u64;
        }
        file.sync_all()?;
        Ok(bytes)
    })
}

fn remove(socket: &Path, of: Of) -> anyhow::Result<Exit> {
    let request = proto::RemoveEvidenceRequest { case: of.case };
    let proto::RemoveEvidenceResponse { id, bytes } =
        call(socket, request, Client::remove_evidence)?;
    let json = RemovedJson { schema: "driftd.evidence_removed/v1", id, bytes };
    one(&json, of.output.format, || {
        format!("case {} was removed ({})\n", safe(&json.id), size(json.bytes))
    })?;
    Ok(Exit::Clean)
}
