//! `driftd baseline`: what images hold, as driftd has recorded it.
//!
//! Owns the subcommands and the short ones among them; the others have a file each.

use std::path::Path;

use clap::Subcommand;
use serde::Serialize;

use self::export::ExportFormat;
use self::known::{baseline_json, named, text};
use self::source::Source;
use super::client::{Client, call};
use super::exit::Exit;
use super::output::{Format, Listing, Output, list, one, safe, size, write};
use crate::api::proto;

mod archive;
mod diff;
mod export;
mod file;
mod known;
mod progress;
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
    /// Record an image's baseline now (layers that are recorded already take no time)
    Record(record::Record),
    /// Compare baselines with the images' blobs and with the unpacked layers on the disk
    #[command(after_help = "Exit codes: 0 nothing differs; 1 something differs; \
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
    /// Show the differences between two images
    #[command(after_help = "Exit codes: 0 they hold the same files; 1 they differ; \
                            2 could not answer.")]
    Diff {
        /// An image's name, manifest digest or chain ID
        #[arg(value_name = "IMAGE")]
        a: String,
        /// The image to compare it with
        #[arg(value_name = "OTHER")]
        b: String,
        #[command(flatten)]
        from: source::Reading,
        #[command(flatten)]
        listing: Listing,
    },
    /// Remove an image's baseline, unless a container uses it
    Rm {
        #[command(flatten)]
        image: Image,
    },
    /// Remove the baselines that no image and no container needs
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
                one(&baseline, output.format, || text(&baseline))?;
                Ok(Exit::Clean)
            }
            Baseline::Record(record) => record.run(socket),
            Baseline::Verify { image, deep, from, output } => match from.open(socket)? {
                Source::Daemon(socket) => verify::run(&socket, image, deep, output.format),
                store @ Source::Store(_) => {
                    verify::stored(&store, image.as_deref().unwrap_or(""), output.format)
                }
            },
            Baseline::Export { image, from, output } => {
                export::run(&from.open(socket)?, &image.image, output)
            }
            Baseline::Diff { a, b, from, listing } => {
                diff::run(&from.open(socket)?, &a, &b, &listing)
            }
            Baseline::Rm { image } => remove(socket, image.image),
            Baseline::Prune { output } => prune(socket, output.format),
        }
    }
}

fn remove(socket: &Path, image: String) -> anyhow::Result<Exit> {
    anyhow::ensure!(!image.is_empty(), "name an image (see: driftd baseline ls)");
    let request = proto::RemoveBaselineRequest { image };
    let removed = call(socket, request, Client::remove_baseline)?;
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
    let pruned = call(socket, proto::PruneBaselinesRequest {}, Client::prune_baselines)?;
    let proto::PruneBaselinesResponse { images, layers, bytes } = pruned;
    let pruned = PrunedJson { schema: "driftd.pruned/v1", images, layers, bytes };
    one(&pruned, output, || {
        format!("forgot {images} images and {layers} layers, {} on disk\n", size(bytes))
    })?;
    Ok(Exit::Clean)
}
