//! `driftd baseline record`

use std::path::Path;

use indicatif::HumanCount;
use tokio_stream::StreamExt as _;

use super::{BaselineJson, Output, bar, baseline_json};
use crate::api::proto;
use crate::cli::client::{Client, explain, talk};
use crate::cli::exit::Exit;
use crate::cli::output::{one, safe, size};

#[derive(Debug, clap::Args)]
pub(in crate::cli) struct Record {
    /// An image's name, as containerd has it
    image: String,
    #[command(flatten)]
    output: Output,
}

impl Record {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let baseline = talk(socket, |client| record(client, self.image))?;
        one(&baseline, self.output.output, || summary(&baseline))?;
        Ok(Exit::Clean)
    }
}

fn summary(baseline: &BaselineJson) -> String {
    format!(
        "{}: {} files, {} in {} layers\n",
        safe(baseline.name()),
        HumanCount(baseline.files),
        size(baseline.bytes),
        baseline.layers.len()
    )
}

const BAR: &str = "{spinner} {prefix} {wide_bar} {pos}/{len} layers {msg}";

async fn record(mut client: Client, image: String) -> anyhow::Result<BaselineJson> {
    let bar = bar(BAR).with_prefix(safe(&image));
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
