//! `driftd baseline diff`: the differences between two images.
//!
//! Owns the JSON of a difference and its columns. The comparison is made by the daemon or, for
//! a directory of baselines, by `baseline::diff`.

use serde::Serialize;

use super::file::{FileJson, file_json, in_words, what_differs};
use super::source::Source;
use crate::api::proto;
use crate::api::proto::difference::Change;
use crate::cli::exit::Exit;
use crate::cli::output::{Field, Listed, Listing, Style, list, safe};
use crate::model::RootfsPath;

#[derive(Debug, Serialize)]
struct DifferenceJson {
    schema: &'static str,
    change: &'static str,
    #[serde(flatten)]
    path: RootfsPath,
    /// Null for an added file.
    a: Option<FileJson>,
    /// Null for a removed file.
    b: Option<FileJson>,
}

const CHANGES: [&str; 4] = ["added", "removed", "modified", "metadata"];

fn difference_json(difference: proto::BaselineDifference) -> anyhow::Result<DifferenceJson> {
    let change = match difference.change() {
        Change::Added => CHANGES[0],
        Change::Removed => CHANGES[1],
        Change::Modified => CHANGES[2],
        Change::Metadata => CHANGES[3],
        Change::Relocated | Change::Unspecified => {
            anyhow::bail!(
                "driftd sent a kind of change that this command does not know (update it)"
            )
        }
    };
    Ok(DifferenceJson {
        schema: "driftd.baseline_difference/v1",
        change,
        path: RootfsPath::new(difference.path)?,
        a: difference.a.map(file_json).transpose()?,
        b: difference.b.map(file_json).transpose()?,
    })
}

/// Prints the differences from image `a` to image `b`.
pub(super) fn run(source: &Source, a: &str, b: &str, listing: &Listing) -> anyhow::Result<Exit> {
    let differences = source.differences(a, b)?;
    let differences: Vec<DifferenceJson> =
        differences.into_iter().map(difference_json).collect::<anyhow::Result<_>>()?;
    list(&differences, listing)?;
    eprintln!("{}", summary(a, b, &differences));
    Ok(if differences.is_empty() { Exit::Clean } else { Exit::Drift })
}

fn summary(a: &str, b: &str, differences: &[DifferenceJson]) -> String {
    let (a, b) = (safe(a), safe(b));
    if differences.is_empty() {
        return format!("{a} and {b} hold the same files");
    }
    let counts: Vec<String> = CHANGES
        .iter()
        .map(|change| (change, differences.iter().filter(|one| one.change == *change).count()))
        .filter(|(_, count)| *count > 0)
        .map(|(change, count)| format!("{count} {change}"))
        .collect();
    format!("from {a} to {b}: {}", counts.join(", "))
}

impl Listed for DifferenceJson {
    type Json<'a> = &'a DifferenceJson;

    fn json(&self) -> &DifferenceJson {
        self
    }

    fn name(&self) -> String {
        self.path.to_string()
    }

    fn header(_wide: bool) -> Vec<&'static str> {
        vec!["CHANGE", "PATH", "WHAT"]
    }

    fn row(&self, _style: &Style) -> Vec<Field> {
        let what = match (&self.a, &self.b) {
            (Some(a), Some(b)) => what_differs(a, b),
            (Some(one), None) | (None, Some(one)) => in_words(one),
            (None, None) => String::new(),
        };
        vec![self.change.into(), self.path.to_string().into(), safe(&what).into()]
    }
}
