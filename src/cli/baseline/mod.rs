//! `driftd baseline`

use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;

use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde::Serialize;
use tokio_stream::StreamExt as _;

use super::client::{Client, explain, talk};
use super::exit::Exit;
use super::output::{Field, Format, Listed, Listing, Style, age, json_line, list, one, safe, size};
use crate::api::{convert, proto};
use crate::model::RootfsPath;
use crate::model::finding::{hex, octal};

#[derive(Debug, Subcommand)]
pub(super) enum Baseline {
    /// List the images whose baseline is known
    Ls {
        #[command(flatten)]
        listing: Listing,
    },
    /// Show one image's baseline
    Show {
        #[command(flatten)]
        image: Image,
        /// How to print the answer
        #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
        output: Format,
    },
    /// Record an image's baseline now (what is known already costs nothing)
    Record {
        #[command(flatten)]
        image: Image,
        /// How to print the answer
        #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
        output: Format,
    },
    /// Print every file of an image, sorted by path
    Export {
        #[command(flatten)]
        image: Image,
        /// How to print the files
        #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
        output: ExportFormat,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Image {
    /// An image's name, manifest digest or chain ID
    image: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum ExportFormat {
    /// Hashes of regular files, for `b3sum --check` in a root filesystem
    #[default]
    B3sum,
    /// One JSON object per line: every file with all that is known of it
    Jsonl,
}

#[derive(Serialize)]
struct BaselineJson {
    schema: &'static str,
    chain_id: String,
    names: Vec<String>,
    manifest_digest: Option<String>,
    /// Bottom first.
    layers: Vec<String>,
    recorded_at: Timestamp,
    files: u64,
    bytes: u64,
    state: String,
}

fn baseline_json(baseline: proto::Baseline) -> anyhow::Result<BaselineJson> {
    Ok(BaselineJson {
        schema: "driftd.baseline/v1",
        chain_id: baseline.chain_id,
        names: baseline.names,
        manifest_digest: (!baseline.manifest_digest.is_empty()).then_some(baseline.manifest_digest),
        layers: baseline.layers,
        recorded_at: convert::time_from_proto("recorded_at", baseline.recorded_at)?,
        files: baseline.files,
        bytes: baseline.bytes,
        state: baseline.state,
    })
}

impl Baseline {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        match self {
            Baseline::Ls { listing } => {
                list(&fetch(socket, String::new())?, &listing)?;
                Ok(Exit::Clean)
            }
            Baseline::Show { image, output } => show(socket, image.image, output),
            Baseline::Record { image, output } => {
                let baseline = talk(socket, |client| record(client, image.image))?;
                one(&baseline, output, || {
                    let name = baseline.names.first().unwrap_or(&baseline.chain_id);
                    format!(
                        "{}: {} files, {} in {} layers\n",
                        safe(name),
                        HumanCount(baseline.files),
                        size(baseline.bytes),
                        baseline.layers.len()
                    )
                })?;
                Ok(Exit::Clean)
            }
            Baseline::Export { image, output } => {
                talk(socket, |client| export(client, image.image, output))
            }
        }
    }
}

/// All baselines, or the one that `image` names.
fn fetch(socket: &Path, image: String) -> anyhow::Result<Vec<BaselineJson>> {
    let baselines = talk(socket, |mut client| async move {
        let request = proto::ListBaselinesRequest { image };
        Ok(client.list_baselines(request).await.map_err(explain)?.into_inner().baselines)
    })?;
    baselines.into_iter().map(baseline_json).collect()
}

fn show(socket: &Path, image: String, output: Format) -> anyhow::Result<Exit> {
    anyhow::ensure!(!image.is_empty(), "name an image (see: driftd baseline ls)");
    let found = fetch(socket, image)?;
    let baseline = found.first().context("driftd gave no baseline")?;
    one(baseline, output, || text(baseline))?;
    Ok(Exit::Clean)
}

fn text(baseline: &BaselineJson) -> String {
    use std::fmt::Write as _;
    let mut text = String::new();
    let mut line = |label: &str, value: &str| {
        writeln!(text, "{label:<10} {value}").expect("writing to a String cannot fail");
    };
    for name in &baseline.names {
        line("Image", &safe(name));
    }
    if let Some(digest) = &baseline.manifest_digest {
        line("Manifest", &safe(digest));
    }
    line("Chain ID", &safe(&baseline.chain_id));
    line("State", &safe(&baseline.state));
    line("Recorded", &super::output::time(baseline.recorded_at));
    line("Files", &format!("{}, {}", HumanCount(baseline.files), size(baseline.bytes)));
    for (index, layer) in baseline.layers.iter().enumerate() {
        line(if index == 0 { "Layers" } else { "" }, &safe(layer));
    }
    text
}

async fn record(mut client: Client, image: String) -> anyhow::Result<BaselineJson> {
    let bar = if io::stderr().is_terminal() {
        let style =
            ProgressStyle::with_template("{spinner} {prefix} {wide_bar} {pos}/{len} layers {msg}")
                .expect("the template is written correctly");
        ProgressBar::new(0).with_style(style).with_prefix(safe(&image))
    } else {
        ProgressBar::hidden()
    };
    let request = proto::RecordBaselineRequest { image };
    let mut stream = client.record_baseline(request).await.map_err(explain)?.into_inner();
    while let Some(progress) = stream.next().await {
        let progress = progress.map_err(explain)?;
        if let Some(baseline) = progress.baseline {
            bar.finish_and_clear();
            return baseline_json(baseline);
        }
        bar.set_length(progress.layers_total.into());
        bar.set_position(progress.layers_done.into());
        bar.set_message(format!(
            "{} files, {}",
            HumanCount(progress.files_done),
            size(progress.bytes_done)
        ));
        bar.tick();
    }
    anyhow::bail!("driftd stopped before the baseline was recorded (try again when it runs)")
}

#[derive(Serialize)]
struct FileJson {
    schema: &'static str,
    #[serde(flatten)]
    path: RootfsPath,
    file_type: String,
    #[serde(rename = "type")]
    format: String,
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
    capability: Option<String>,
    blake3: Option<String>,
    layer: String,
}

async fn export(mut client: Client, image: String, format: ExportFormat) -> anyhow::Result<Exit> {
    let request = proto::ExportBaselineRequest { image };
    let mut stream = client.export_baseline(request).await.map_err(explain)?.into_inner();
    let mut out = io::BufWriter::new(io::stdout());
    let mut left_out = 0_u64;
    while let Some(file) = stream.next().await {
        let file = file.map_err(explain)?;
        match format {
            ExportFormat::Jsonl => out.write_all(json_line(&file_json(file)?)?.as_bytes())?,
            ExportFormat::B3sum if file.blake3.is_empty() => (),
            ExportFormat::B3sum => match b3sum_line(&file.path, &file.blake3) {
                Some(line) => out.write_all(line.as_bytes())?,
                None => left_out += 1,
            },
        }
    }
    out.flush()?;
    if left_out > 0 {
        eprintln!(
            "warning: {left_out} files were left out, because b3sum cannot check names that are \
             not UTF-8 (use -o jsonl)"
        );
    }
    Ok(Exit::Clean)
}

fn file_json(file: proto::BaselineFile) -> anyhow::Result<FileJson> {
    Ok(FileJson {
        schema: "driftd.baseline_file/v1",
        path: RootfsPath::new(file.path)?,
        file_type: file.file_type,
        format: file.format,
        mode: octal(file.mode),
        uid: file.uid,
        gid: file.gid,
        size: file.size,
        capability: (!file.capability.is_empty()).then(|| hex(&file.capability)),
        blake3: (!file.blake3.is_empty()).then_some(file.blake3),
        layer: file.layer,
    })
}

/// A line as `b3sum` itself prints it, so that `b3sum --check` reads it back;
/// `None` for a name that it could not.
fn b3sum_line(path: &[u8], blake3: &str) -> Option<String> {
    let path = str::from_utf8(path).ok()?;
    if path.contains(char::REPLACEMENT_CHARACTER) {
        return None;
    }
    let (mark, path) = if path.contains(['\\', '\n', '\r']) {
        let path = path.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r");
        ("\\", path)
    } else {
        ("", path.to_owned())
    };
    Some(format!("{mark}{blake3}  .{path}\n"))
}

impl Listed for BaselineJson {
    type Json<'a> = &'a BaselineJson;

    fn json(&self) -> &BaselineJson {
        self
    }

    fn name(&self) -> String {
        safe(&self.chain_id)
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec!["IMAGE", "FILES", "SIZE", "LAYERS", "STATE", "RECORDED", "CHAIN ID"];
        if wide {
            header.push("MANIFEST DIGEST");
        }
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let mut row: Vec<Field> = vec![
            safe(self.names.first().map_or("-", String::as_str)).into(),
            self.files.to_string().into(),
            size(self.bytes).into(),
            self.layers.len().to_string().into(),
            safe(&self.state).into(),
            age(style.now, self.recorded_at).into(),
            style.id(&self.chain_id).into(),
        ];
        if style.wide {
            row.push(style.id(self.manifest_digest.as_deref().unwrap_or("-")).into());
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_of_b3sum() {
        let check = |path: &[u8], expected: Option<&str>| {
            assert_eq!(b3sum_line(path, "ab").as_deref(), expected, "{path:?}");
        };
        check(b"/usr/bin/ls", Some("ab  ./usr/bin/ls\n"));
        check(b"/a\\b\nc\rd", Some("\\ab  ./a\\\\b\\nc\\rd\n"));
        check("/ü".as_bytes(), Some("ab  ./ü\n"));
        check(b"/\xff", None);
        check("/\u{fffd}".as_bytes(), None);
    }
}
