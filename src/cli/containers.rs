//! `driftd containers` and `driftd diff`: the watched containers, and how one differs from its
//! image.
//!
//! Owns the JSON and the columns of both. The daemon scans the container for `diff`.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

use super::client::{Client, call, explain, talk};
use super::describe::pod;
use super::exit::Exit;
use super::output::{Field, Listed, Listing, Style, list, safe};
use crate::api::{convert, proto};
use crate::model::{ContainerId, ImageReference, Kind, Pod, RootfsPath, Severity};
use crate::pipeline::DifferenceKind;

#[derive(Debug, clap::Args)]
pub(super) struct Containers {
    #[command(flatten)]
    listing: Listing,
}

// Long: each field is a key of the published JSON.
#[derive(Debug, Serialize)]
pub(super) struct ContainerJson {
    schema: &'static str,
    #[serde(flatten)]
    pub(super) id: ContainerId,
    runtime: String,
    snapshotter: String,
    pub(super) image: ImageReference,
    pub(super) pod: Option<Pod>,
    labels: BTreeMap<String, String>,
    /// Null if the container is not running.
    pub(super) pid: Option<u32>,
    pub(super) paused: bool,
    pub(super) baseline: String,
    /// Null without a baseline.
    known_by: Option<String>,
    pub(super) watched: bool,
    armed_before_start: bool,
    problem: Option<String>,
    pub(super) findings: u64,
    /// Null from an older daemon.
    pub(super) findings_by_severity: Option<BTreeMap<Severity, u64>>,
    /// The losses that make the view of it incomplete now.
    pub(super) incomplete: Vec<String>,
}

impl Containers {
    pub(super) fn run(&self, socket: &Path) -> anyhow::Result<Exit> {
        let request = proto::ListContainersRequest {};
        let reply = call(socket, request, Client::list_containers)?;
        let containers: Vec<ContainerJson> =
            reply.containers.into_iter().map(container_json).collect::<anyhow::Result<_>>()?;
        list(&containers, &self.listing)?;
        Ok(Exit::Clean)
    }
}

pub(super) fn container_json(container: proto::Container) -> anyhow::Result<ContainerJson> {
    let by_severity: BTreeMap<Severity, u64> = container
        .findings_by_severity
        .iter()
        .filter_map(|one| Some((convert::severity_from_proto(one.severity())?, one.count)))
        .collect();
    Ok(ContainerJson {
        schema: "driftd.container/v1",
        id: ContainerId::new(&container.namespace, &container.id),
        runtime: container.runtime,
        snapshotter: container.snapshotter,
        image: convert::image_from_proto(container.image.unwrap_or_default())?,
        pod: container.pod.map(convert::pod_from_proto),
        labels: container.labels.into_iter().collect(),
        pid: (container.pid != 0).then_some(container.pid),
        paused: container.paused,
        baseline: container.baseline,
        known_by: (!container.known_by.is_empty()).then_some(container.known_by),
        watched: container.watched,
        armed_before_start: container.armed_before_start,
        problem: (!container.problem.is_empty()).then_some(container.problem),
        // Only an older daemon has findings and no severities.
        findings_by_severity: (container.findings == 0 || !by_severity.is_empty())
            .then_some(by_severity),
        findings: container.findings,
        incomplete: container.incomplete,
    })
}

impl ContainerJson {
    pub(super) fn state(&self) -> &'static str {
        match (self.pid, self.paused) {
            (None, _) => "stopped",
            (Some(_), true) => "paused",
            (Some(_), false) => "running",
        }
    }
}

impl Listed for ContainerJson {
    type Json<'a> = &'a ContainerJson;

    fn json(&self) -> &ContainerJson {
        self
    }

    fn name(&self) -> String {
        self.id.to_string()
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec!["NAMESPACE", "CONTAINER", "IMAGE", "STATE", "BASELINE", "WATCHED"];
        if wide {
            header.extend(["KNOWN BY", "POD", "PID", "RUNTIME", "SNAPSHOTTER", "PROBLEM"]);
        }
        header.push("FINDINGS");
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let watched = match (self.watched, self.armed_before_start) {
            (false, _) => "NO",
            (true, true) => "before start",
            (true, false) => "since found",
        };
        let mut row: Vec<Field> = vec![
            safe(&self.id.namespace).into(),
            style.id(&self.id.id).into(),
            safe(self.image.name.as_deref().unwrap_or("-")).into(),
            self.state().into(),
            safe(&self.baseline).into(),
            watched.into(),
        ];
        if style.wide {
            row.extend([
                Field::from(safe(self.known_by.as_deref().unwrap_or("-"))),
                pod(self.pod.as_ref()).into(),
                self.pid.map(|pid| pid.to_string()).unwrap_or_default().into(),
                safe(&self.runtime).into(),
                safe(&self.snapshotter).into(),
                safe(self.problem.as_deref().unwrap_or("-")).into(),
            ]);
        }
        row.push(self.findings.to_string().into());
        row
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct Diff {
    /// A container's whole ID, NAMESPACE/ID, or 8 or more digits of a hexadecimal ID
    container: String,
    /// Print only what is drift, and not what may differ
    #[arg(long)]
    drift_only: bool,
    #[command(flatten)]
    listing: Listing,
}

#[derive(Serialize)]
struct DifferenceJson {
    schema: &'static str,
    container: ContainerId,
    change: &'static str,
    #[serde(flatten)]
    path: RootfsPath,
    /// Null when the difference is no drift.
    kind: Option<Kind>,
    severity: Option<Severity>,
}

impl Diff {
    pub(super) fn run(self, socket: &Path) -> anyhow::Result<Exit> {
        let request = proto::DiffContainerRequest { container: self.container };
        let diff = talk(socket, |client| fetch(client, request))?;
        let container = ContainerId::new(&diff.namespace, &diff.id);
        let mut differences: Vec<DifferenceJson> = diff
            .differences
            .iter()
            .map(|difference| difference_json(&container, difference))
            .collect::<anyhow::Result<_>>()?;
        let all = differences.len();
        if self.drift_only {
            differences.retain(|difference| difference.kind.is_some());
        }
        list(&differences, &self.listing)?;

        let drift = differences.iter().filter(|difference| difference.kind.is_some()).count();
        eprintln!("{container}: {all} differences, {drift} of them drift");
        if diff.incomplete {
            eprintln!(
                "warning: the container's own layer could not be read whole (see: driftd status)"
            );
        }
        Ok(match (drift, diff.incomplete) {
            (0, false) => Exit::Clean,
            // The part that was read has no drift, which proves nothing about the rest.
            (0, true) => Exit::Failed,
            (_, _) => Exit::Drift,
        })
    }
}

/// All differences, from as many messages as it takes.
async fn fetch(
    mut client: Client,
    request: proto::DiffContainerRequest,
) -> anyhow::Result<proto::DiffContainerResponse> {
    let mut pages = match client.stream_diff(request.clone()).await {
        Ok(pages) => pages.into_inner(),
        // An older daemon.
        Err(status) if status.code() == tonic::Code::Unimplemented => {
            return Ok(client.diff_container(request).await.map_err(explain)?.into_inner());
        }
        Err(status) => return Err(explain(status)),
    };
    let mut all = proto::DiffContainerResponse::default();
    while let Some(page) = pages.message().await.map_err(explain)? {
        let proto::DiffContainerResponse { namespace, id, differences, incomplete } = page;
        all.differences.extend(differences);
        (all.namespace, all.id, all.incomplete) = (namespace, id, incomplete);
    }
    Ok(all)
}

fn difference_json(
    container: &ContainerId,
    difference: &proto::Difference,
) -> anyhow::Result<DifferenceJson> {
    let difference = convert::difference_from_proto(difference)?;
    Ok(DifferenceJson {
        schema: "driftd.difference/v1",
        container: container.clone(),
        change: change_name(difference.change),
        path: difference.path,
        kind: difference.finding.map(|(kind, _)| kind),
        severity: difference.finding.map(|(_, severity)| severity),
    })
}

fn change_name(change: DifferenceKind) -> &'static str {
    match change {
        DifferenceKind::Added => "added",
        DifferenceKind::Modified => "modified",
        DifferenceKind::Removed => "removed",
        DifferenceKind::Metadata => "metadata",
        DifferenceKind::Relocated => "relocated",
    }
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
        vec!["CHANGE", "SEVERITY", "KIND", "PATH"]
    }

    fn row(&self, _style: &Style) -> Vec<Field> {
        vec![
            self.change.into(),
            Field::Severity(self.severity),
            self.kind.map_or("-", Kind::name).into(),
            self.path.to_string().into(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::output::table;

    fn sample(id: &str) -> ContainerJson {
        ContainerJson {
            schema: "driftd.container/v1",
            id: ContainerId::new("k8s.io", id),
            runtime: "io.containerd.runc.v2".into(),
            snapshotter: "overlayfs".into(),
            image: ImageReference {
                name: Some("registry.example/shop:1.4".into()),
                ..ImageReference::default()
            },
            pod: Some(Pod {
                namespace: "prod".into(),
                name: "shop-7d9f".into(),
                uid: "u".into(),
                container: Some("web".into()),
            }),
            labels: BTreeMap::from([("app".into(), "shop".into())]),
            pid: Some(4242),
            paused: false,
            baseline: "ready".into(),
            known_by: Some("verified".into()),
            watched: true,
            armed_before_start: true,
            problem: None,
            findings: 2,
            findings_by_severity: Some(BTreeMap::from([(Severity::High, 2)])),
            incomplete: vec!["armed_late".into()],
        }
    }

    fn style(wide: bool) -> Style {
        Style {
            wide,
            no_trunc: false,
            colour: false,
            width: None,
            now: jiff::Timestamp::UNIX_EPOCH,
        }
    }

    #[test]
    fn containers_as_people_see_them() {
        let mut stopped = sample("web\u{1b}[2J");
        (stopped.pid, stopped.watched, stopped.pod) = (None, false, None);
        stopped.image.name = None;
        stopped.baseline = "none: not an overlay".into();
        stopped.known_by = None;
        stopped.problem = Some("stopped before it was found".into());
        let containers = [sample(&"4f1c".repeat(16)), stopped];
        insta::assert_snapshot!(table(&containers, &style(false)));
        insta::assert_snapshot!(table(&containers, &style(true)));
        insta::assert_snapshot!(serde_json::to_string_pretty(&containers[1]).unwrap());
    }

    #[test]
    fn differences_as_people_see_them() {
        let difference = |path: &[u8], change, kind: Option<Kind>| DifferenceJson {
            schema: "driftd.difference/v1",
            container: ContainerId::new("default", "web"),
            change: change_name(change),
            path: RootfsPath::new(path).unwrap(),
            kind,
            severity: kind.map(Kind::severity),
        };
        let differences = [
            difference(b"/bin/sh", DifferenceKind::Metadata, None),
            difference(b"/tmp/\xffx", DifferenceKind::Added, Some(Kind::FileAdded)),
            difference(b"/usr/bin/curl", DifferenceKind::Modified, Some(Kind::FileModified)),
        ];
        insta::assert_snapshot!(table(&differences, &style(false)));
        insta::assert_snapshot!(serde_json::to_string(&differences[1]).unwrap());
    }
}
