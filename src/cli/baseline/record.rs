//! `driftd baseline record`: has the daemon record an image, or records those of an archive.
//!
//! Owns the options of both. Recording an archive is in `archive.rs`.

use std::path::{Path, PathBuf};

use indicatif::HumanCount;
use tokio_stream::StreamExt as _;

use super::archive::{self, Task};
use super::known::{BaselineJson, baseline_json};
use super::progress::{Bar, Done};
use crate::api::proto;
use crate::cli::client::{Client, explain, talk};
use crate::cli::exit::Exit;
use crate::cli::output::{Output, one, safe, size};
use crate::config::Config;

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Record {
    /// An image's name, as containerd has it
    #[arg(
        value_name = "IMAGE",
        required_unless_present = "from_archive",
        conflicts_with = "from_archive"
    )]
    wanted: Option<String>,
    /// Record the images in an OCI layout (a directory or a tar file) or in what
    /// `docker save` wrote, with no daemon and no containerd
    #[arg(long, value_name = "FILE", requires = "store")]
    from_archive: Option<PathBuf>,
    /// Where to keep the baselines of the archive (not a running daemon's)
    #[arg(long, value_name = "DIRECTORY", requires = "from_archive")]
    store: Option<PathBuf>,
    /// Only the image of this name in the archive
    #[arg(long, value_name = "NAME", requires = "from_archive")]
    image: Option<String>,
    /// Record the archive's image under this name
    #[arg(long, requires = "from_archive")]
    name: Option<String>,
    /// The settings with the limits for layers [default: /etc/driftd/driftd.toml, if
    /// it is there]
    #[arg(long, value_name = "FILE", requires = "from_archive")]
    config: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

impl Record {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let output = self.output.format;
        if let (Some(file), Some(store)) = (&self.from_archive, &self.store) {
            let settings = Config::load(self.config.as_deref())?.baseline;
            let (image, name) = (self.image.as_deref(), self.name.as_deref());
            let baselines = archive::record(&Task { file, store, image, name }, &settings)?;
            one(&baselines, output, || baselines.iter().map(summary).collect())?;
        } else {
            let wanted = self.wanted.unwrap_or_default();
            let baseline = talk(socket, |client| record(client, wanted))?;
            one(&baseline, output, || summary(&baseline))?;
        }
        Ok(Exit::Clean)
    }
}

fn summary(baseline: &BaselineJson) -> String {
    let known_by = match &baseline.known_by {
        Some(known_by) => format!(", {}", safe(known_by)),
        None => String::new(),
    };
    format!(
        "{}: {} files, {} in {} layers{known_by}\n",
        safe(baseline.name()),
        HumanCount(baseline.files),
        size(baseline.bytes),
        baseline.layers.len()
    )
}

async fn record(mut client: Client, image: String) -> anyhow::Result<BaselineJson> {
    let bar = Bar::new();
    bar.set_image(safe(&image));
    let request = proto::RecordBaselineRequest { image };
    let mut stream = client.record_baseline(request).await.map_err(explain)?.into_inner();
    while let Some(progress) = stream.next().await {
        let progress = progress.map_err(explain)?;
        if let Some(baseline) = progress.baseline {
            bar.clear();
            return baseline_json(baseline);
        }
        let done = Done {
            layers: progress.layers_done,
            layers_total: progress.layers_total,
            files: progress.files_done,
            bytes: progress.bytes_done,
        };
        bar.show(&done, "");
    }
    anyhow::bail!("driftd stopped before the baseline was recorded (try again when it runs)")
}
