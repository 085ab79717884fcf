//! `driftd baseline verify`: whether the recorded baselines are true.
//!
//! The daemon compares them with blobs and directories; this prints the result. Without a
//! daemon, only checksums are checked.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use tokio_stream::StreamExt as _;

use super::file::{FileJson, file_json, in_words, what_differs};
use super::known::baseline_json;
use super::progress::{Bar, Done};
use super::source::Source;
use crate::api::proto;
use crate::api::proto::layer_entry::Entry;
use crate::api::proto::witness::State;
use crate::cli::client::{Client, explain, talk};
use crate::cli::exit::Exit;
use crate::cli::output::{Format, items, safe, write};
use crate::model::RootfsPath;

/// Differences of one layer that are shown to people.
const SHOWN: usize = 20;

#[derive(Debug, Serialize)]
struct VerificationJson {
    schema: &'static str,
    image: String,
    chain_id: Option<String>,
    result: Verdict,
    /// Why the image could not be verified.
    error: Option<String>,
    known_by: Option<String>,
    layers: Vec<LayerJson>,
}

#[derive(Debug, Serialize)]
struct LayerJson {
    layer: String,
    result: Verdict,
    known_by: String,
    blob: WitnessJson,
    directory: WitnessJson,
    /// At most 1000; the witnesses have the totals.
    differences: Vec<DifferenceJson>,
}

/// From the best to the worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Same,
    /// There was nothing to compare with.
    Unproved,
    Failed,
    Differs,
}

#[derive(Debug, Serialize)]
struct WitnessJson {
    state: &'static str,
    differences: u64,
    reason: Option<String>,
}

#[derive(Debug, Serialize)]
struct DifferenceJson {
    change: &'static str,
    #[serde(flatten)]
    path: RootfsPath,
    expected: Option<EntryJson>,
    found: Option<EntryJson>,
}

#[derive(Debug, Serialize)]
struct EntryJson {
    /// Hides what the layers below hold at this path.
    whiteout: bool,
    /// Hides what the layers below hold in this directory.
    opaque: bool,
    /// Null for a whiteout.
    #[serde(flatten)]
    file: Option<FileJson>,
}

/// Has the daemon verify one image, or all, and prints the results.
pub(super) fn run(
    socket: &Path,
    image: Option<String>,
    deep: bool,
    output: Format,
) -> anyhow::Result<Exit> {
    let request = proto::VerifyBaselineRequest { image: image.unwrap_or_default(), deep };
    let results = talk(socket, |client| verify(client, request))?;
    let results = results.into_iter().map(|result| verification(result, deep));
    print(&results.collect::<anyhow::Result<Vec<_>>>()?, output)
}

/// Verifies a directory of baselines without a daemon. There is nothing to compare with but
/// the checksums of its files, and what was verified before.
pub(super) fn stored(source: &Source, image: &str, output: Format) -> anyhow::Result<Exit> {
    let mut results = Vec::new();
    for baseline in source.list(image)? {
        let baseline = baseline_json(baseline)?;
        let error = (baseline.state != "ready").then(|| baseline.state.clone());
        let not_asked = || WitnessJson { state: "not_asked", differences: 0, reason: None };
        let layers: Vec<LayerJson> = baseline
            .proofs
            .iter()
            .map(|proof| LayerJson {
                layer: proof.layer.clone(),
                result: if proof.is_verified() { Verdict::Same } else { Verdict::Unproved },
                known_by: proof.known_by.clone(),
                blob: WitnessJson { reason: proof.reason.clone(), ..not_asked() },
                directory: not_asked(),
                differences: Vec::new(),
            })
            .collect();
        results.push(VerificationJson {
            schema: SCHEMA,
            image: baseline.name().to_owned(),
            result: overall(error.as_deref(), &layers),
            chain_id: Some(baseline.chain_id),
            error,
            known_by: baseline.known_by,
            layers,
        });
    }
    print(&results, output)
}

async fn verify(
    mut client: Client,
    request: proto::VerifyBaselineRequest,
) -> anyhow::Result<Vec<proto::VerifyBaselineResult>> {
    let bar = Bar::new();
    let mut stream = client.verify_baseline(request).await.map_err(explain)?.into_inner();
    let mut results = Vec::new();
    let mut expected = 0;
    while let Some(progress) = stream.next().await {
        let progress = progress.map_err(explain)?;
        expected = progress.images_total;
        bar.set_image(safe(&progress.image));
        let done = Done {
            layers: progress.layers_done,
            layers_total: progress.layers_total,
            files: progress.files_done,
            bytes: progress.bytes_done,
        };
        let number = progress.images_done.saturating_add(1).min(expected);
        bar.show(&done, &format!(", image {number} of {expected}"));
        results.extend(progress.result);
    }
    bar.clear();
    let missing = usize::try_from(expected)? - results.len().min(usize::try_from(expected)?);
    anyhow::ensure!(
        missing == 0,
        "driftd stopped before {missing} images were verified (try again when it runs)"
    );
    Ok(results)
}

const SCHEMA: &str = "driftd.baseline_verification/v1";

fn verification(
    result: proto::VerifyBaselineResult,
    deep: bool,
) -> anyhow::Result<VerificationJson> {
    let proto::VerifyBaselineResult { image, baseline, layers, error } = result;
    let error = (!error.is_empty()).then_some(error);
    let layers: Vec<LayerJson> =
        layers.into_iter().map(|report| layer(report, deep)).collect::<anyhow::Result<_>>()?;
    let baseline = baseline.map(baseline_json).transpose()?;
    Ok(VerificationJson {
        schema: SCHEMA,
        image,
        result: overall(error.as_deref(), &layers),
        error,
        known_by: baseline.as_ref().and_then(|baseline| baseline.known_by.clone()),
        chain_id: baseline.map(|baseline| baseline.chain_id),
        layers,
    })
}

fn overall(error: Option<&str>, layers: &[LayerJson]) -> Verdict {
    let worst = layers.iter().map(|layer| layer.result).max().unwrap_or(Verdict::Same);
    if error.is_some() { worst.max(Verdict::Failed) } else { worst }
}

fn layer(report: proto::LayerReport, deep: bool) -> anyhow::Result<LayerJson> {
    let proto::LayerReport { layer, known_by, blob, directory, differences } = report;
    let (blob, directory) = (witness(blob), witness(directory));
    let one_is = |state| blob.state == state || directory.state == state;
    // With `deep`, earlier proofs do not count.
    let is_proved = one_is("same") || (!deep && known_by == "verified");
    let result = match (one_is("differs"), is_proved) {
        (true, _) => Verdict::Differs,
        (false, true) => Verdict::Same,
        (false, false) => Verdict::Unproved,
    };
    let differences = differences.into_iter().map(difference).collect::<anyhow::Result<_>>()?;
    Ok(LayerJson { layer, result, known_by, blob, directory, differences })
}

fn witness(witness: Option<proto::Witness>) -> WitnessJson {
    let witness = witness.unwrap_or_default();
    let state = match witness.state() {
        State::NotAsked | State::Unspecified => "not_asked",
        State::Same => "same",
        State::Differs => "differs",
        State::Unavailable => "unavailable",
    };
    let reason = (!witness.reason.is_empty()).then_some(witness.reason);
    WitnessJson { state, differences: witness.differences, reason }
}

fn difference(difference: proto::LayerDifference) -> anyhow::Result<DifferenceJson> {
    let expected = difference.expected.and_then(|entry| entry.entry).map(entry).transpose()?;
    let found = difference.found.and_then(|entry| entry.entry).map(entry).transpose()?;
    Ok(DifferenceJson {
        change: match (&expected, &found) {
            (None, _) => "added",
            (_, None) => "removed",
            (Some(_), Some(_)) => "modified",
        },
        path: RootfsPath::new(difference.path)?,
        expected,
        found,
    })
}

fn entry(entry: Entry) -> anyhow::Result<EntryJson> {
    Ok(match entry {
        Entry::Whiteout(proto::Whiteout {}) => {
            EntryJson { whiteout: true, opaque: false, file: None }
        }
        Entry::File(file) => {
            EntryJson { whiteout: false, opaque: false, file: Some(file_json(file)?) }
        }
        Entry::OpaqueDirectory(file) => {
            EntryJson { whiteout: false, opaque: true, file: Some(file_json(file)?) }
        }
    })
}

fn print(results: &[VerificationJson], output: Format) -> anyhow::Result<Exit> {
    let mut text = String::new();
    match output {
        Format::Table | Format::Wide => {
            for result in results {
                describe(&mut text, result);
            }
        }
        Format::Json | Format::Jsonl | Format::Yaml | Format::Columns(_) => {
            text = items(results, output)?;
        }
    }
    write(text.as_bytes())?;
    Ok(match results.iter().map(|result| result.result).max().unwrap_or(Verdict::Same) {
        Verdict::Same => Exit::Clean,
        Verdict::Unproved | Verdict::Failed => Exit::Failed,
        Verdict::Differs => Exit::Drift,
    })
}

fn describe(text: &mut String, result: &VerificationJson) {
    let verdict = match (result.result, result.known_by.as_deref()) {
        (Verdict::Same, Some("verified")) => "verified",
        (Verdict::Same, _) => "unchanged (but not verified)",
        (Verdict::Unproved, _) => "NOT VERIFIED",
        (Verdict::Failed, _) => "FAILED",
        (Verdict::Differs, _) => "DIFFERS",
    };
    let mut line = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    line(&format!("{}: {verdict}", safe(&result.image)));
    if let Some(error) = &result.error {
        line(&format!("  {}", safe(error)));
    }
    for layer in &result.layers {
        line(&format!("  {}  {}", safe(&layer.layer), safe(&layer.known_by)));
        for (name, witness) in [("blob", &layer.blob), ("directory", &layer.directory)] {
            if let Some(words) = witness_in_words(name, witness) {
                line(&format!("    {words}"));
            }
        }
        for difference in layer.differences.iter().take(SHOWN) {
            line(&format!("    {}", difference_in_words(difference)));
        }
        let all = layer.blob.differences.saturating_add(layer.directory.differences);
        let shown = layer.differences.len().min(SHOWN) as u64;
        if all > shown {
            line(&format!("    … and {} more (-o json)", all - shown));
        }
    }
}

fn witness_in_words(name: &str, witness: &WitnessJson) -> Option<String> {
    let reason = witness.reason.as_deref().map(safe);
    let mut words = String::new();
    match (witness.state, reason) {
        ("same", _) => write!(words, "{name}: the same"),
        ("differs", _) if witness.differences == 1 => write!(words, "{name}: differs in one place"),
        ("differs", _) => write!(words, "{name}: differs in {} places", witness.differences),
        ("unavailable", Some(reason)) => write!(words, "{name}: not compared: {reason}"),
        (_, Some(reason)) => write!(words, "{name}: {reason}"),
        (_, None) => return None,
    }
    .expect("writing to a String cannot fail");
    Some(words)
}

fn difference_in_words(difference: &DifferenceJson) -> String {
    let DifferenceJson { change, path, expected, found } = difference;
    let one = |entry: &EntryJson| match &entry.file {
        None => "whiteout".to_owned(),
        Some(file) if entry.opaque => format!("opaque {}", in_words(file)),
        Some(file) => in_words(file),
    };
    let what = match (expected, found) {
        (Some(expected), Some(found)) => match (&expected.file, &found.file) {
            (Some(a), Some(b)) if expected.opaque == found.opaque => what_differs(a, b),
            (_, _) => format!("{} -> {}", one(expected), one(found)),
        },
        (Some(entry), None) | (None, Some(entry)) => one(entry),
        (None, None) => String::new(),
    };
    format!("{change:<9} {path}  {}", safe(&what))
}
