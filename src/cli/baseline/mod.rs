//! `driftd baseline`

use std::io::{self, IsTerminal as _};
use std::path::Path;

use anyhow::Context as _;
use clap::Subcommand;
use indicatif::{HumanCount, ProgressBar, ProgressStyle};
use jiff::Timestamp;
use serde::Serialize;

use self::export::ExportFormat;
use self::source::Source;
use super::client::{explain, talk};
use super::exit::Exit;
use super::output::{Field, Format, Listed, Listing, Style, age, list, one, safe, size, write};
use crate::api::{convert, proto};

mod archive;
mod diff;
mod export;
mod file;
mod record;
mod source;
mod verify;

#[derive(Debug, Subcommand)]
pub(super) enum Baseline {
    /// List the images whose baseline is known
    Ls {
        #[command(flatten)]
        from: source::Reading,
        #[command(flatten)]
        listing: Listing,
    },
    /// Show one image's baseline
    Show {
        #[command(flatten)]
        image: Image,
        #[command(flatten)]
        from: source::Reading,
        #[command(flatten)]
        output: Output,
    },
    /// Record an image's baseline now (what is known already costs nothing)
    Record(record::Record),
    /// Compare baselines with the images' blobs, and with what lies on the disk
    #[command(after_help = "Exit codes: 0 all is as the baselines say; 1 something differs; \
                            2 something could not be compared.")]
    Verify {
        /// An image's name, manifest digest or chain ID [default: all images]
        image: Option<String>,
        /// Read all blobs again, and hash the layers' directories again
        #[arg(long, conflicts_with = "store")]
        deep: bool,
        #[command(flatten)]
        from: source::Reading,
        #[command(flatten)]
        output: Output,
    },
    /// Print every file of an image, sorted by path
    Export {
        #[command(flatten)]
        image: Image,
        #[command(flatten)]
        from: source::Reading,
        /// How to print the files
        #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
        output: ExportFormat,
    },
    /// Show what makes one image another
    #[command(after_help = "Exit codes: 0 they hold the same files; 1 they differ; \
                            2 could not answer.")]
    Diff {
        /// An image's name, manifest digest or chain ID
        #[arg(value_name = "IMAGE")]
        a: String,
        /// The image that it is compared with
        #[arg(value_name = "OTHER")]
        b: String,
        #[command(flatten)]
        from: source::Reading,
        #[command(flatten)]
        listing: Listing,
    },
    /// Forget an image's baseline, unless a container uses it
    Rm {
        #[command(flatten)]
        image: Image,
    },
    /// Forget the baselines that no image and no container needs
    Prune {
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Image {
    /// An image's name, manifest digest or chain ID
    image: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct Output {
    /// How to print the answer
    #[arg(short, long, default_value_t, value_name = "FORMAT")]
    output: Format,
}

#[derive(Debug, Serialize)]
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
    /// Null when it is not recorded.
    known_by: Option<String>,
    /// When the last of its layers was verified; null unless all are.
    verified_at: Option<Timestamp>,
    /// How each layer is known, bottom first.
    proofs: Vec<ProofJson>,
}

#[derive(Debug, Serialize)]
struct ProofJson {
    layer: String,
    known_by: String,
    /// Why it is not verified, if somebody has tried.
    reason: Option<String>,
    verified_at: Option<Timestamp>,
}

impl ProofJson {
    fn is_verified(&self) -> bool {
        self.known_by == "verified"
    }
}

impl BaselineJson {
    /// What a person calls it.
    fn name(&self) -> &str {
        self.names.first().unwrap_or(&self.chain_id)
    }
}

fn baseline_json(baseline: proto::Baseline) -> anyhow::Result<BaselineJson> {
    let time = |field, time: Option<prost_types::Timestamp>| match time {
        None => Ok(None),
        some => convert::time_from_proto(field, some).map(Some),
    };
    let proofs = baseline.layers.iter().zip(baseline.proofs).map(|(layer, proof)| {
        Ok(ProofJson {
            layer: layer.clone(),
            known_by: proof.known_by,
            reason: (!proof.reason.is_empty()).then_some(proof.reason),
            verified_at: time("proofs.verified_at", proof.verified_at)?,
        })
    });
    Ok(BaselineJson {
        schema: "driftd.baseline/v1",
        proofs: proofs.collect::<anyhow::Result<_>>()?,
        chain_id: baseline.chain_id,
        names: baseline.names,
        manifest_digest: (!baseline.manifest_digest.is_empty()).then_some(baseline.manifest_digest),
        layers: baseline.layers,
        recorded_at: convert::time_from_proto("recorded_at", baseline.recorded_at)?,
        files: baseline.files,
        bytes: baseline.bytes,
        state: baseline.state,
        known_by: (!baseline.known_by.is_empty()).then_some(baseline.known_by),
        verified_at: time("verified_at", baseline.verified_at)?,
    })
}

impl Baseline {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        match self {
            Baseline::Ls { from, listing } => {
                let baselines = from.open(socket)?.list("")?.into_iter().map(baseline_json);
                list(&baselines.collect::<anyhow::Result<Vec<_>>>()?, &listing)?;
                Ok(Exit::Clean)
            }
            Baseline::Show { image, from, output } => {
                let baseline = named(&from.open(socket)?, &image.image)?;
                one(&baseline, output.output, || text(&baseline))?;
                Ok(Exit::Clean)
            }
            Baseline::Record(record) => record.run(socket),
            Baseline::Verify { image, deep, from, output } => match from.open(socket)? {
                Source::Daemon(socket) => verify::run(&socket, image, deep, output.output),
                store @ Source::Store(_) => {
                    verify::stored(&store, image.as_deref().unwrap_or(""), output.output)
                }
            },
            Baseline::Export { image, from, output } => {
                export::run(&from.open(socket)?, &image.image, output)
            }
            Baseline::Diff { a, b, from, listing } => {
                diff::run(&from.open(socket)?, &a, &b, &listing)
            }
            Baseline::Rm { image } => remove(socket, image.image),
            Baseline::Prune { output } => prune(socket, output.output),
        }
    }
}

/// The one baseline that somebody means.
fn named(source: &Source, image: &str) -> anyhow::Result<BaselineJson> {
    anyhow::ensure!(!image.is_empty(), "name an image (see: driftd baseline ls)");
    let found = source.list(image)?.into_iter().next();
    baseline_json(found.context("driftd gave no baseline")?)
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
    let known_by = match (baseline.known_by.as_deref(), baseline.verified_at) {
        (Some("snapshot"), _) => {
            "snapshot: read from what was unpacked, not (wholly) compared with the image's blobs"
                .to_owned()
        }
        (Some("verified"), Some(at)) => {
            format!("verified: compared with the image's blobs at {}", super::output::time(at))
        }
        (Some("verified"), None) => "verified: compared with the image's blobs".to_owned(),
        (known_by, _) => safe(known_by.unwrap_or("-")),
    };
    line("Known by", &known_by);
    line("Recorded", &super::output::time(baseline.recorded_at));
    line("Files", &format!("{}, {}", HumanCount(baseline.files), size(baseline.bytes)));
    for (index, proof) in baseline.proofs.iter().enumerate() {
        let label = if index == 0 { "Layers" } else { "" };
        line(label, &format!("{}  {}", safe(&proof.layer), safe(&proof.known_by)));
        if let Some(reason) = &proof.reason {
            line("", &format!("  {}", safe(reason)));
        }
    }
    text
}

fn remove(socket: &Path, image: String) -> anyhow::Result<Exit> {
    anyhow::ensure!(!image.is_empty(), "name an image (see: driftd baseline ls)");
    let removed = talk(socket, |mut client| async move {
        let request = proto::RemoveBaselineRequest { image };
        Ok(client.remove_baseline(request).await.map_err(explain)?.into_inner())
    })?;
    write(format!("{}\n", safe(&removed.chain_id)).as_bytes())?;
    for name in &removed.names {
        eprintln!(
            "{} is still an image of containerd's: it is recorded again when it is next used",
            safe(name)
        );
    }
    Ok(Exit::Clean)
}

#[derive(Debug, Serialize)]
struct PrunedJson {
    schema: &'static str,
    images: u32,
    layers: u32,
    bytes: u64,
}

fn prune(socket: &Path, output: Format) -> anyhow::Result<Exit> {
    let pruned = talk(socket, |mut client| async move {
        let request = proto::PruneBaselinesRequest {};
        Ok(client.prune_baselines(request).await.map_err(explain)?.into_inner())
    })?;
    let proto::PruneBaselinesResponse { images, layers, bytes } = pruned;
    let pruned = PrunedJson { schema: "driftd.pruned/v1", images, layers, bytes };
    one(&pruned, output, || {
        format!("forgot {images} images and {layers} layers, {} on disk\n", size(bytes))
    })?;
    Ok(Exit::Clean)
}

/// A progress bar, for a person.
fn bar(template: &str) -> ProgressBar {
    if io::stderr().is_terminal() {
        let style =
            ProgressStyle::with_template(template).expect("the template is written correctly");
        ProgressBar::new(0).with_style(style)
    } else {
        ProgressBar::hidden()
    }
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
        let mut header =
            vec!["IMAGE", "FILES", "SIZE", "LAYERS", "STATE", "KNOWN BY", "RECORDED", "CHAIN ID"];
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
            safe(self.known_by.as_deref().unwrap_or("-")).into(),
            age(style.now, self.recorded_at).into(),
            style.id(&self.chain_id).into(),
        ];
        if style.wide {
            row.push(style.id(self.manifest_digest.as_deref().unwrap_or("-")).into());
        }
        row
    }
}
