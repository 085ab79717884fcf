//! `driftd summary`: counts what was found, by kind, severity and container.
//!
//! Fetches all findings that the filter selects and counts them here; the daemon has no such
//! request.

use std::collections::BTreeMap;

use serde::Serialize;

use super::client::{Client, Server, talk};
use super::exit::Exit;
use super::findings::{Filter, NOTHING, fetch};
use super::output::{Field, Listed, Listing, Style, age, list, safe};
use super::pages::fetch_pages;
use crate::api::proto;
use crate::model::{ContainerId, Finding, Kind, Severity};

#[derive(Debug, clap::Args)]
pub(super) struct Summary {
    #[command(flatten)]
    filter: Filter,
    #[command(flatten)]
    listing: Listing,
}

/// How many findings of one kind and severity one container has.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct SummaryJson {
    schema: &'static str,
    severity: Severity,
    kind: Kind,
    /// Null for findings about no container.
    container: Option<ContainerId>,
    image: Option<String>,
    findings: u64,
    /// How often the findings were seen.
    count: u64,
    last_seen: jiff::Timestamp,
}

type Key = (std::cmp::Reverse<Severity>, Kind, Option<ContainerId>);

/// Adds a finding to the counts.
fn add(counts: &mut BTreeMap<Key, SummaryJson>, finding: &Finding) {
    let container = finding.container_id().cloned();
    let key = (std::cmp::Reverse(finding.severity), finding.kind, container.clone());
    let entry = counts.entry(key).or_insert_with(|| SummaryJson {
        schema: "driftd.summary/v1",
        severity: finding.severity,
        kind: finding.kind,
        container,
        image: finding.image.name.clone(),
        findings: 0,
        count: 0,
        last_seen: finding.last_seen,
    });
    entry.findings += 1;
    entry.count = entry.count.saturating_add(finding.count);
    entry.last_seen = entry.last_seen.max(finding.last_seen);
}

impl Summary {
    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        let filter = self.filter.to_proto()?;
        let counts = talk(server, |client| count(client, filter))?;
        let counts: Vec<SummaryJson> = counts.into_values().collect();
        list(&counts, &self.listing)?;
        self.listing.note_if_empty(counts.len(), NOTHING);
        Ok(Exit::Clean)
    }
}

async fn count(
    mut client: Client,
    filter: proto::FindingFilter,
) -> anyhow::Result<BTreeMap<Key, SummaryJson>> {
    let mut counts = BTreeMap::new();
    let fetch = async |size, token| fetch(&mut client, &filter, size, token).await;
    let add_all = |findings: Vec<Finding>| {
        findings.iter().for_each(|finding| add(&mut counts, finding));
        Ok(())
    };
    fetch_pages(String::new(), usize::MAX, fetch, add_all).await?;
    Ok(counts)
}

impl Listed for SummaryJson {
    type Json<'a> = &'a SummaryJson;

    fn json(&self) -> &SummaryJson {
        self
    }

    fn name(&self) -> String {
        self.kind.name().to_owned()
    }

    fn header(_wide: bool) -> Vec<&'static str> {
        vec!["SEVERITY", "KIND", "CONTAINER", "IMAGE", "COUNT", "LAST SEEN", "FINDINGS"]
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let container = self.container.as_ref().map(|container| style.id(&container.id));
        vec![
            Field::Severity(Some(self.severity)),
            self.kind.name().into(),
            container.unwrap_or_default().into(),
            safe(self.image.as_deref().unwrap_or_default()).into(),
            self.count.to_string().into(),
            age(style.now, self.last_seen).into(),
            self.findings.to_string().into(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_counts_by_severity_kind_and_container() {
        let one = crate::cli::findings::tests::sample();
        let mut worse = one.clone();
        (worse.kind, worse.severity) = (Kind::FileAdded, Severity::Low);
        let mut counts = BTreeMap::new();
        for finding in [&worse, &one, &one] {
            add(&mut counts, finding);
        }
        let counts: Vec<SummaryJson> = counts.into_values().collect();
        assert_eq!((counts[0].severity, counts[0].findings), (Severity::Critical, 2));
        assert_eq!((counts[0].count, counts[0].kind), (2 * one.count, one.kind));
        assert_eq!((counts[1].severity, counts[1].findings), (Severity::Low, 1));
    }
}
