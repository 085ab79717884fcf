//! Containers: a record, and the layers on which its active snapshot stands.
//!
//! Describes containers for the other rooms. Which change is sent when is the outbox's business.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use containerd_client::services::v1::{
    Container as Record, GetContainerRequest, ListContainersRequest, UpdateContainerRequest,
};
use jiff::Timestamp;
use prost_types::FieldMask;
use sha2::{Digest as _, Sha256};
use tonic::Status;

use super::connection::{Namespace, found, interrupted, words};
use super::images::{Facts, Images};
use super::probes::{self, HealthCheck};
use super::snapshots::{self, DirectoriesError, Shape, Storage, Unavailable};
use super::spec::{self, Spec};
use super::{cri, docker};
use crate::model::{
    ChainId, Container, ContainerId, DeclaredProbe, IdMap, IdRange, ImageReference, Layer, LayerId,
    OverlayDirs, Task, shorten,
};

/// Longer than any name of a registry, a repository and a tag.
const MAX_IMAGE_NAME: usize = 1024;
/// The longest reason for having no baseline, in bytes.
const MAX_REASON: usize = 2048;
/// More layers than any image has (OCI runtimes stop at 127).
const LAYER_LIMIT: usize = 512;

pub(super) async fn list(namespace: &Namespace) -> Result<Vec<Record>, Status> {
    let answer = namespace.containers().list(ListContainersRequest::default()).await?;
    Ok(answer.into_inner().containers)
}

pub(super) async fn get(namespace: &Namespace, id: &str) -> Result<Option<Record>, Status> {
    let request = GetContainerRequest { id: id.into() };
    let answer = found(namespace.containers().get(request).await)?;
    Ok(answer.and_then(|response| response.into_inner().container))
}

/// Sets one label of a container and leaves all else as it is.
pub(super) async fn set_label(
    namespace: &Namespace,
    id: &str,
    name: &str,
    value: &str,
) -> Result<(), Status> {
    let labels = HashMap::from([(name.to_owned(), value.to_owned())]);
    let container = Some(Record { id: id.into(), labels, ..Record::default() });
    let update_mask = Some(FieldMask { paths: vec![format!("labels.{name}")] });
    let request = UpdateContainerRequest { container, update_mask };
    namespace.containers().update(request).await.map(drop)
}

/// When the record was made. This distinguishes a container from a later one of the same ID.
pub(super) fn created_at(record: &Record) -> Option<Timestamp> {
    let created = record.created_at.as_ref()?;
    Timestamp::new(created.seconds, created.nanos).ok()
}

/// The container as driftd's other rooms know it. Only a lost connection is an error: if
/// containerd refuses a call, that becomes the reason for having no baseline.
pub(super) async fn describe(
    namespace: &Namespace,
    endpoint: &Arc<str>,
    record: Record,
    task: Option<Task>,
    images: &Images,
) -> Result<Container, Status> {
    let spec = record.spec.as_ref().map(|spec| Spec::parse(&spec.value)).unwrap_or_default();
    let mut rootfs = match rootfs(namespace, &record, &spec, task.clone(), images).await {
        Ok(rootfs) => rootfs,
        Err(status) if interrupted(&status) => return Err(status),
        Err(status) => {
            Rootfs::without(format!("containerd cannot describe its snapshot: {}", words(&status)))
        }
    };
    let dockers = match spec.root.filter(|_| is_dockers(&record)) {
        Some(root) => {
            let id = record.id.clone();
            let read = tokio::task::spawn_blocking(move || docker::settings(&id, &root));
            Some(read.await.ok().flatten().unwrap_or_default())
        }
        None => None,
    };
    let created_at = created_at(&record);
    let runtime = record.runtime.unwrap_or_default();
    let options = runtime.options.map(|options| options.value).unwrap_or_default();
    if let Some(reason) = spec::own_kernel(&runtime.name, &options) {
        rootfs.layers.clear();
        rootfs.no_baseline = Some(reason);
    }
    let docker_name = dockers.as_ref().and_then(|settings| settings.image.clone());
    let (image, facts) = image(namespace, record.image, docker_name, &rootfs, images).await?;
    let labels: BTreeMap<String, String> = record.labels.into_iter().collect();
    let request = cri::Request::of(&record.extensions);
    let pod = cri::pod(&labels, &request, &spec.annotations);
    let probes = if cri::made(&labels, &request) {
        // Kubernetes runs no image's health check.
        request.before_stop.into_iter().collect()
    } else {
        health_check(&labels, dockers, facts.and_then(|facts| facts.health_check.clone()))
    };
    Ok(Container {
        id: ContainerId::new(&namespace.name, &record.id),
        endpoint: Arc::clone(endpoint),
        runtime: runtime.name,
        created_at,
        pod,
        labels: labels.into(),
        image,
        snapshotter: record.snapshotter,
        snapshot_key: record.snapshot_key,
        layers: rootfs.layers,
        rootfs: rootfs.overlay,
        task,
        no_baseline: rootfs.no_baseline,
        id_map: spec.id_map,
        entry_point: spec.entry_point,
        probes,
    })
}

/// The health check of a container that is not Kubernetes'. `dockers` comes from Docker, if
/// Docker made the container; `image` comes from its image.
fn health_check(
    labels: &BTreeMap<String, String>,
    dockers: Option<docker::Settings>,
    image: HealthCheck,
) -> Vec<DeclaredProbe> {
    let declared = match dockers {
        Some(settings) => settings.health_check.or(image),
        None => {
            // An image may have this label too. Its config may declare the same.
            let label = labels.get(probes::NERDCTL_LABEL);
            let is_nerdctls = labels.contains_key("nerdctl/namespace");
            label.and_then(|label| probes::of_nerdctl(label)).or(image.filter(|_| is_nerdctls))
        }
    };
    declared.unwrap_or_default()
}

/// Whether Docker made this container. The label of an image alone does not show that.
pub(super) fn is_dockers(record: &Record) -> bool {
    record.snapshotter.is_empty() && docker::made(&record.labels)
}

/// The image that a container was made from, identified by the container's layers, with the
/// facts of that image if it is still there.
async fn image(
    namespace: &Namespace,
    recorded: String,
    docker_name: Option<String>,
    rootfs: &Rootfs,
    images: &Images,
) -> Result<(ImageReference, Option<Arc<Facts>>), Status> {
    let mut name = Some(recorded).filter(|name| !name.is_empty());
    let mut full_names: Vec<String> = name.iter().cloned().collect();
    if let Some(docker_name) = docker_name {
        full_names.extend(docker::full_names(&docker_name));
        name = name.or(Some(docker_name));
    }
    let mut facts = None;
    if let Some(chain_id) = rootfs.image_chain {
        for name in &full_names {
            facts = images.facts_of(namespace, name, chain_id).await?;
            if facts.is_some() {
                break;
            }
        }
    }
    let manifest_digest = facts.as_ref().map(|facts| facts.manifest_digest);
    // The author of an archive may give its images any name.
    let name = name.map(|mut name| {
        shorten(&mut name, MAX_IMAGE_NAME);
        name
    });
    Ok((ImageReference { name, manifest_digest, chain_id: rootfs.image_chain }, facts))
}

/// The layers and directories that a container's files consist of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rootfs {
    layers: Vec<Layer>,
    /// The chain of the image, without the layers that its engine has put on top.
    image_chain: Option<ChainId>,
    overlay: Option<OverlayDirs>,
    no_baseline: Option<String>,
}

impl Rootfs {
    fn without(mut reason: String) -> Rootfs {
        shorten(&mut reason, MAX_REASON);
        Rootfs { layers: Vec::new(), image_chain: None, overlay: None, no_baseline: Some(reason) }
    }
}

async fn rootfs(
    namespace: &Namespace,
    record: &Record,
    spec: &Spec,
    task: Option<Task>,
    images: &Images,
) -> Result<Rootfs, Status> {
    if !record.snapshotter.is_empty() && !record.snapshot_key.is_empty() {
        let (snapshotter, key) = (record.snapshotter.as_str(), record.snapshot_key.as_str());
        let Some(shape) = snapshots::mounts(namespace, snapshotter, key).await? else {
            return Ok(Rootfs::without("its snapshot is gone".into()));
        };
        return on_snapshot(namespace, record, spec, snapshotter, key, &shape, images).await;
    }
    if is_dockers(record) {
        return of_docker(namespace, record, spec, task, images).await;
    }
    Ok(Rootfs::without(
        "containerd keeps no snapshot for it: its files are not made of layers that can be \
         compared (started with --rootfs?)"
            .into(),
    ))
}

/// Docker's image store names the snapshot after the container, but the record does not name
/// it. With the classic storage driver there is no snapshot.
async fn of_docker(
    namespace: &Namespace,
    record: &Record,
    spec: &Spec,
    task: Option<Task>,
    images: &Images,
) -> Result<Rootfs, Status> {
    let is_classic = spec.root.as_ref().is_some_and(|root| root.ends_with("merged"));
    if !is_classic {
        let mut snapshotters = snapshots::snapshotters(namespace).await?;
        snapshotters.sort_by_key(|snapshotter| snapshotter != snapshots::DEFAULT_SNAPSHOTTER);
        for snapshotter in snapshotters {
            if let Some(shape) = snapshots::mounts(namespace, &snapshotter, &record.id).await? {
                let key = record.id.as_str();
                return on_snapshot(namespace, record, spec, &snapshotter, key, &shape, images)
                    .await;
            }
        }
    }
    let Some(root) = spec.root.clone() else {
        return Ok(Rootfs::without("Docker does not report where its files are".into()));
    };
    let (id, pid) = (record.id.clone(), task.map(|task| task.pid));
    let stack = tokio::task::spawn_blocking(move || docker::stack(&id, &root, pid)).await;
    Ok(match stack {
        Ok(Ok(docker::Stack { layers, image_chain, dirs })) => {
            Rootfs { layers, image_chain, overlay: Some(dirs), no_baseline: None }
        }
        Ok(Err(err)) => Rootfs::without(err.to_string()),
        Err(err) => Rootfs::without(err.to_string()),
    })
}

async fn on_snapshot(
    namespace: &Namespace,
    record: &Record,
    spec: &Spec,
    snapshotter: &str,
    key: &str,
    shape: &Shape,
    images: &Images,
) -> Result<Rootfs, Status> {
    let overlay = shape.overlay_dirs();
    let id_map = spec.id_map.as_ref();
    let chain = match snapshot_chain(namespace, snapshotter, key, id_map, images).await {
        Ok(chain) if !chain.is_empty() => chain,
        Ok(_) => {
            let reason = "it was started from an image without layers".into();
            return Ok(Rootfs { overlay, ..Rootfs::without(reason) });
        }
        Err(Unavailable::Reason(reason)) => {
            return Ok(Rootfs { overlay, ..Rootfs::without(reason) });
        }
        Err(Unavailable::Call(status)) => return Err(status),
    };
    let image_chain = chain.iter().rev().find_map(|layer| match layer {
        SnapshotLayer::Image(chain_id) => Some(*chain_id),
        SnapshotLayer::Other(_) | SnapshotLayer::Copy => None,
    });
    match layers(namespace, record, snapshotter, shape, &chain, images).await {
        Ok(layers) => Ok(Rootfs { layers, image_chain, overlay, no_baseline: None }),
        Err(Unavailable::Reason(reason)) => {
            let rootfs = Rootfs::without(snapshots::of(snapshotter, &reason));
            Ok(Rootfs { image_chain, overlay, ..rootfs })
        }
        Err(Unavailable::Call(status)) => Err(status),
    }
}

/// One committed snapshot below a container's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SnapshotLayer {
    /// A layer of an image.
    Image(ChainId),
    /// A layer that no image has: Docker's init layer, a committed container.
    Other(ChainId),
    /// A copy of everything below with other owners, for a user namespace. Its content must
    /// equal what is below.
    Copy,
}

/// The snapshots below the active snapshot `key`, bottom first.
async fn snapshot_chain(
    namespace: &Namespace,
    snapshotter: &str,
    key: &str,
    id_map: Option<&IdMap>,
    images: &Images,
) -> Result<Vec<SnapshotLayer>, Unavailable> {
    let unavailable = |reason: &str| Err(Unavailable::Reason(reason.to_owned()));
    let Some(own) = snapshots::info(namespace, snapshotter, key).await? else {
        return unavailable("its snapshot is gone");
    };
    // Topmost first, with the time of creation where the name does not identify the snapshot.
    let mut names: Vec<(String, (i64, i32))> = Vec::new();
    let mut next = own.parent;
    while !next.is_empty() {
        if names.len() == LAYER_LIMIT || names.iter().any(|(name, _)| *name == next) {
            return unavailable(&format!("it stands on more than {LAYER_LIMIT} layers"));
        }
        let chain_id: Option<ChainId> = next.parse().ok();
        let known = chain_id.and_then(|chain_id| images.parent(chain_id));
        let (parent, created) = match known {
            Some(parent) => (parent.map(|id| id.to_string()).unwrap_or_default(), (0, 0)),
            None => match snapshots::info(namespace, snapshotter, &next).await? {
                Some(info) => (info.parent, info.created),
                None => return unavailable("a snapshot below it is gone"),
            },
        };
        if let Some(chain_id) = chain_id.filter(|_| known.is_none()) {
            if parent.is_empty() {
                images.learn_parent(chain_id, None);
            } else if let Ok(parent) = parent.parse() {
                images.learn_parent(chain_id, Some(parent));
            }
        }
        names.push((std::mem::replace(&mut next, parent), created));
    }
    names.reverse();
    Ok(classify(&names, id_map))
}

/// Classifies the snapshots of a stack, bottom first, by their names and the times of their
/// creation.
fn classify(names: &[(String, (i64, i32))], id_map: Option<&IdMap>) -> Vec<SnapshotLayer> {
    let mut below: Option<ChainId> = None;
    let mut below_name = "";
    names
        .iter()
        .map(|(name, (seconds, nanoseconds))| {
            let of_map = below.zip(id_map).map(|(below, map)| copy_name(below, map));
            let is_named_after =
                |below: &str| name.strip_prefix(below).is_some_and(|rest| rest.starts_with('-'));
            let layer = if let Ok(chain_id) = name.parse() {
                if of_map == Some(chain_id) {
                    SnapshotLayer::Copy
                } else {
                    SnapshotLayer::Image(chain_id)
                }
            } else if below.is_some() && is_named_after(below_name) {
                // As containerd 1 names it: CHAIN-UID-GID.
                SnapshotLayer::Copy
            } else {
                // Another snapshot may have had the name before.
                let key = format!("{name} {seconds}.{nanoseconds:09}");
                SnapshotLayer::Other(ChainId::above(below, &key))
            };
            below_name = name;
            match layer {
                SnapshotLayer::Image(chain_id) | SnapshotLayer::Other(chain_id) => {
                    below = Some(chain_id);
                }
                SnapshotLayer::Copy => (),
            }
            layer
        })
        .collect()
}

/// The name that containerd 2 gives to the copy of a stack of layers for a user namespace: a
/// hash of this text.
fn copy_name(below: ChainId, id_map: &IdMap) -> ChainId {
    let ranges = |ranges: &[IdRange]| {
        let mut ranges = ranges.to_vec();
        ranges.sort_by_key(|range| range.container);
        let texts: Vec<String> = ranges
            .iter()
            .map(|IdRange { container, host, count }| {
                format!(r#"{{"containerID":{container},"hostID":{host},"size":{count}}}"#)
            })
            .collect();
        texts.join(",")
    };
    let (uids, gids) = (ranges(&id_map.uids), ranges(&id_map.gids));
    let text = format!(r#"{{"Parent":"{below}","IDMap":{{"UidMap":[{uids}],"GidMap":[{gids}]}}}}"#);
    ChainId(Sha256::digest(text.as_bytes()).into())
}

/// The layers of a chain of snapshots, bottom first.
async fn layers(
    namespace: &Namespace,
    record: &Record,
    snapshotter: &str,
    shape: &Shape,
    chain: &[SnapshotLayer],
    images: &Images,
) -> Result<Vec<Layer>, Unavailable> {
    let is_unknown = |layer: &SnapshotLayer| match layer {
        SnapshotLayer::Image(chain_id) => images.diff_id(*chain_id).is_none(),
        SnapshotLayer::Other(_) | SnapshotLayer::Copy => false,
    };
    if chain.iter().any(is_unknown) {
        // Its image has not been resolved yet, or is gone.
        images.learn_image(namespace, &record.image).await?;
    }
    let directories = match snapshots::storage(snapshotter) {
        Storage::Layers => snapshots::readable_directories(shape, chain.len()).await,
        Storage::Copies => Err(DirectoriesError::NotKept("it keeps whole copies, not layers")),
        Storage::Unreadable(reason) => Err(DirectoriesError::NotKept(reason)),
    };
    let layer = |layer: &SnapshotLayer, directory| {
        let (id, chain_id) = match *layer {
            SnapshotLayer::Image(chain_id) => {
                let diff_id = images.diff_id(chain_id);
                (diff_id.map_or(LayerId::Chain(chain_id), LayerId::Diff), chain_id)
            }
            SnapshotLayer::Other(chain_id) => (LayerId::Chain(chain_id), chain_id),
            SnapshotLayer::Copy => return None,
        };
        let blob = images.blob(&namespace.name, chain_id);
        Some(Layer { id, chain_id, directory, blob })
    };
    match directories {
        Ok(directories) => {
            let pairs = chain.iter().zip(directories);
            Ok(pairs.filter_map(|(one, directory)| layer(one, Some(directory))).collect())
        }
        Err(reason) => {
            let layers = chain.iter().filter_map(|one| layer(one, None)).collect();
            let readable = images.without_directories(namespace, snapshotter, layers).await;
            readable.map_err(|err| match err {
                Unavailable::Reason(missing) => {
                    Unavailable::Reason(format!("{reason}, and {missing}"))
                }
                Unavailable::Call(status) => Unavailable::Call(status),
            })
        }
    }
}

/// A container that was made from the image `name`, or whose layers have this chain ID.
pub(super) async fn of_image(
    namespace: &Namespace,
    endpoint: &Arc<str>,
    name: &str,
    images: &Images,
) -> Result<Option<Container>, Status> {
    let chain_id: Option<ChainId> = name.parse().ok();
    for record in list(namespace).await? {
        if record.image != name && chain_id.is_none() && !is_dockers(&record) {
            continue;
        }
        let container = describe(namespace, endpoint, record, None, images).await?;
        let of_chain = chain_id.is_some()
            && (container.chain_id() == chain_id || container.image.chain_id == chain_id);
        if of_chain || container.image.name.as_deref() == Some(name) {
            return Ok(Some(container));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DiffId, ProbeSource};

    #[test]
    fn the_layers_of_a_container_are_named_whatever_made_it() {
        let chain = ChainId::of_layers(&[DiffId([1; 32]), DiffId([2; 32])]);
        let names: Vec<(String, (i64, i32))> =
            chain.iter().map(|chain_id| (chain_id.to_string(), (0, 0))).collect();
        let with = |name: &str, created| {
            let mut names = names.clone();
            names.push((name.to_owned(), (created, 7)));
            classify(&names, None)
        };
        let image = [SnapshotLayer::Image(chain[0]), SnapshotLayer::Image(chain[1])];
        assert_eq!(classify(&names, None), image);
        // A copy for a user namespace, as containerd 1 names it.
        for copy in [format!("{}-100000-100000", chain[1]), format!("{}-ab01-cd02", chain[1])] {
            assert_eq!(with(&copy, 1), [&image[..], &[SnapshotLayer::Copy]].concat());
        }
        // A copy of something else is none.
        let other = with(&format!("{}-100000-100000", chain[0]), 1);
        assert!(matches!(other[2], SnapshotLayer::Other(_)), "{other:?}");
        let init = with("abc-init", 1);
        let expected = ChainId::above(Some(chain[1]), "abc-init 1.000000007");
        assert_eq!(init[2], SnapshotLayer::Other(expected));
        assert_ne!(init, with("abc-init", 2), "the name was used again");
    }

    #[test]
    fn containerd_2_names_a_copy_for_a_user_namespace_by_a_hash() {
        // As observed on containerd 2.1.9.
        let chain_id = |text: &str| text.parse::<ChainId>().unwrap();
        let bottom =
            chain_id("sha256:ac681225056698c914a74e03f087f104aee9e16ea5bb1fab5915c00c4b226ff4");
        let copy =
            chain_id("sha256:eb15e396fd113c1e0cb71b3be341aa2584a3afe9ab822046d4048923170b99ed");
        let range = |host| vec![IdRange { container: 0, host, count: 65_536 }];
        let map = IdMap { uids: range(100_000), gids: range(200_000) };
        let names = [(bottom.to_string(), (0, 0)), (copy.to_string(), (0, 0))];
        assert_eq!(
            classify(&names, Some(&map)),
            [SnapshotLayer::Image(bottom), SnapshotLayer::Copy]
        );
        let other = IdMap { uids: range(1), ..map };
        assert_eq!(classify(&names, Some(&other))[1], SnapshotLayer::Image(copy));
    }

    #[test]
    fn a_health_check_comes_from_its_engine_label_or_image() {
        let runs = |argv: &str| -> HealthCheck {
            let source = ProbeSource::Healthcheck;
            Some(vec![DeclaredProbe { argv: vec![argv.to_owned()], source }])
        };
        let check = |labels: &[(&str, &str)], dockers: Option<HealthCheck>, expected: &str| {
            let labels: BTreeMap<String, String> =
                labels.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
            let dockers =
                dockers.map(|health_check| docker::Settings { image: None, health_check });
            let found = health_check(&labels, dockers, runs("image"));
            let found: Vec<String> = found.into_iter().flat_map(|probe| probe.argv).collect();
            assert_eq!(found.join(" "), expected, "{labels:?}");
        };
        check(&[], None, "");
        check(&[], Some(None), "image");
        check(&[], Some(Some(Vec::new())), "");
        check(&[], Some(runs("docker")), "docker");
        let label = ("nerdctl/healthcheck", r#"{"Test":["CMD","label"]}"#);
        check(&[label], Some(runs("docker")), "docker");
        check(&[label], None, "label");
        let nerdctls = ("nerdctl/namespace", "default");
        check(&[nerdctls, label], None, "label");
        check(&[nerdctls], None, "image");
        check(&[nerdctls, ("nerdctl/healthcheck", r#"{"Test":["NONE"]}"#)], None, "");
        check(&[nerdctls, ("nerdctl/healthcheck", "?")], None, "image");
    }
}
