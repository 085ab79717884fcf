//! Containers: a record, and the layers its active snapshot stands on.

use std::collections::BTreeMap;
use std::sync::Arc;

use containerd_client::services::v1::{
    Container as Record, GetContainerRequest, ListContainersRequest,
};
use tonic::Status;

use super::connection::{Namespace, found, interrupted, words};
use super::images::Images;
use super::snapshots::{self, Shape};
use crate::model::{
    ChainId, Container, ContainerId, ImageReference, Layer, LayerId, OverlayDirs, Pod, Task,
    printable,
};

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

/// The container as driftd's other rooms know it. Only a lost connection is an
/// error: what containerd refuses becomes the reason for having no baseline.
pub(super) async fn describe(
    namespace: &Namespace,
    endpoint: &Arc<str>,
    record: Record,
    task: Option<Task>,
    images: &Images,
) -> Result<Container, Status> {
    let rootfs = match rootfs(namespace, &record, images).await {
        Ok(rootfs) => rootfs,
        Err(status) if interrupted(&status) => return Err(status),
        Err(status) => {
            Rootfs::without(format!("containerd cannot tell its snapshot: {}", words(&status)))
        }
    };
    let chain_id = rootfs.layers.last().map(|layer| layer.chain_id);
    let manifest_digest = match chain_id {
        Some(chain_id) if !record.image.is_empty() => {
            images.manifest_of(namespace, &record.image, chain_id).await?
        }
        Some(_) | None => None,
    };
    let labels: BTreeMap<String, String> = record.labels.into_iter().collect();
    Ok(Container {
        id: ContainerId::new(&namespace.name, &record.id),
        endpoint: Arc::clone(endpoint),
        runtime: record.runtime.map(|runtime| runtime.name).unwrap_or_default(),
        pod: pod(&labels),
        labels,
        image: ImageReference {
            name: Some(record.image).filter(|name| !name.is_empty()),
            manifest_digest,
            chain_id,
        },
        snapshotter: record.snapshotter,
        snapshot_key: record.snapshot_key,
        layers: rootfs.layers,
        rootfs: rootfs.overlay,
        task,
        no_baseline: rootfs.no_baseline,
    })
}

/// Kubernetes' name for the container. The CRI plugin marks its own; an image's
/// labels alone must not make a pod of a plain container.
fn pod(labels: &BTreeMap<String, String>) -> Option<Pod> {
    let label = |name: &str| labels.get(name).cloned();
    label("io.cri-containerd.kind")?;
    Some(Pod {
        namespace: label("io.kubernetes.pod.namespace")?,
        name: label("io.kubernetes.pod.name")?,
        uid: label("io.kubernetes.pod.uid").unwrap_or_default(),
        container: label("io.kubernetes.container.name"),
    })
}

/// What a container's files are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rootfs {
    layers: Vec<Layer>,
    overlay: Option<OverlayDirs>,
    no_baseline: Option<String>,
}

impl Rootfs {
    fn without(reason: String) -> Rootfs {
        Rootfs { layers: Vec::new(), overlay: None, no_baseline: Some(reason) }
    }
}

async fn rootfs(namespace: &Namespace, record: &Record, images: &Images) -> Result<Rootfs, Status> {
    let is_docker = record.snapshotter.is_empty() && &*namespace.name == "moby";
    // Docker's image store names the snapshot after the container and does not
    // say so in the record.
    let (snapshotter, key) = if is_docker {
        ("overlayfs", record.id.as_str())
    } else {
        (record.snapshotter.as_str(), record.snapshot_key.as_str())
    };
    if snapshotter.is_empty() || key.is_empty() {
        return Ok(Rootfs::without(
            "containerd keeps no snapshot for it: its files are not made of layers that can be \
             compared (started with --rootfs?)"
                .into(),
        ));
    }
    let Some(shape) = snapshots::mounts(namespace, snapshotter, key).await? else {
        return Ok(Rootfs::without(if is_docker {
            "Docker's own storage driver is not supported yet: containerd does not know its layers"
                .into()
        } else {
            "its snapshot is gone".into()
        }));
    };
    let overlay = match &shape {
        Shape::Overlay { upperdir: Some(upperdir), lowerdirs } => {
            Some(OverlayDirs { upperdir: upperdir.clone(), lowerdirs: lowerdirs.clone() })
        }
        Shape::Overlay { upperdir: None, .. } | Shape::Bind(_) | Shape::Other(_) => None,
    };
    let layers = match stack(namespace, snapshotter, key, images).await? {
        Ok(chain) => layers(namespace, record, snapshotter, &shape, &chain, images).await?,
        Err(reason) => Err(reason),
    };
    Ok(match layers {
        Ok(layers) => Rootfs { layers, overlay, no_baseline: None },
        Err(reason) => Rootfs { layers: Vec::new(), overlay, no_baseline: Some(reason) },
    })
}

/// The chain IDs below the active snapshot `key`, bottom first.
async fn stack(
    namespace: &Namespace,
    snapshotter: &str,
    key: &str,
    images: &Images,
) -> Result<Result<Vec<ChainId>, String>, Status> {
    let mut chain: Vec<ChainId> = Vec::new();
    let Some(mut next) = snapshots::parent(namespace, snapshotter, key).await? else {
        return Ok(Err("its snapshot is gone".into()));
    };
    while !next.is_empty() {
        let Ok(chain_id) = next.parse::<ChainId>() else {
            return Ok(Err(format!(
                "it stands on the snapshot `{}`, which is no layer of an image (Docker's init \
                 layer, or layers copied for a user namespace): not supported yet",
                printable(next.as_bytes())
            )));
        };
        if chain.len() == LAYER_LIMIT || chain.contains(&chain_id) {
            return Ok(Err(format!("it stands on more than {LAYER_LIMIT} layers")));
        }
        chain.push(chain_id);
        next = match images.parent(chain_id) {
            Some(parent) => parent.map(|parent| parent.to_string()).unwrap_or_default(),
            None => match snapshots::parent(namespace, snapshotter, &next).await? {
                Some(parent) => {
                    if parent.is_empty() {
                        images.learn_parent(chain_id, None);
                    } else if let Ok(parent) = parent.parse() {
                        images.learn_parent(chain_id, Some(parent));
                    }
                    parent
                }
                None => return Ok(Err("a snapshot below it is gone".into())),
            },
        };
    }
    chain.reverse();
    Ok(Ok(chain))
}

async fn layers(
    namespace: &Namespace,
    record: &Record,
    snapshotter: &str,
    shape: &Shape,
    chain: &[ChainId],
    images: &Images,
) -> Result<Result<Vec<Layer>, String>, Status> {
    if chain.is_empty() {
        return Ok(Err("it was started from an image without layers".into()));
    }
    let directories = match snapshots::layer_directories(shape, chain.len(), snapshotter) {
        Ok(directories) => directories,
        Err(reason) => return Ok(Err(reason)),
    };
    if chain.iter().any(|&chain_id| images.diff_id(chain_id).is_none()) {
        // Its image has not been looked at yet, or is gone.
        images.look_at(namespace, &record.image).await?;
    }
    Ok(Ok(chain
        .iter()
        .zip(directories)
        .map(|(&chain_id, directory)| Layer {
            id: images.diff_id(chain_id).map_or(LayerId::Chain(chain_id), LayerId::Diff),
            chain_id,
            directory: Some(directory),
            blob: None,
        })
        .collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_images_labels_make_no_pod() {
        let mut labels: BTreeMap<String, String> = [
            ("io.kubernetes.pod.name", "web-1"),
            ("io.kubernetes.pod.namespace", "shop"),
            ("io.kubernetes.pod.uid", "u"),
            ("io.kubernetes.container.name", "nginx"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        assert_eq!(pod(&labels), None);
        labels.insert("io.cri-containerd.kind".into(), "container".into());
        assert_eq!(
            pod(&labels),
            Some(Pod {
                namespace: "shop".into(),
                name: "web-1".into(),
                uid: "u".into(),
                container: Some("nginx".into()),
            })
        );
    }
}
