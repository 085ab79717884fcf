//! Snapshots: the directories that a snapshotter has made of a stack of layers, and the views
//! and leases that keep them while they are read.
//!
//! Decides which snapshotters have directories that may be read. The files in them are read by
//! `baseline`.

use std::path::PathBuf;
use std::sync::Arc;

use containerd_client::services::v1::snapshots::{
    MountsRequest, RemoveSnapshotRequest, StatSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{
    CreateRequest, DeleteRequest, ListRequest, ListResourcesRequest, PluginsRequest,
};
use containerd_client::types::Mount;
use tonic::{Code, Status};

use super::connection::{Namespace, found, words};
use crate::model::{ChainId, OverlayDirs, printable};
use crate::sys::overlay;
use crate::sys::procfs::Handle;

/// The snapshotter that is asked first: containerd's default.
pub(super) const DEFAULT_SNAPSHOTTER: &str = "overlayfs";

/// The mount that a snapshotter describes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Overlay {
        /// `None` for a view.
        upperdir: Option<PathBuf>,
        /// Topmost first.
        lowerdirs: Vec<PathBuf>,
    },
    /// One directory.
    Bind(PathBuf),
    /// Something else, as a text.
    Other(String),
}

/// Reads mounts. Options that are not known do not matter here: `uidmap=`, `index=off`,
/// `volatile` and what later kernels bring.
pub(super) fn shape(mounts: &[Mount]) -> Shape {
    let mount = match mounts {
        [mount] => mount,
        [] => return Shape::Other("no mount at all".into()),
        several => {
            let types: Vec<_> =
                several.iter().map(|mount| printable(mount.r#type.as_bytes())).collect();
            return Shape::Other(format!("several mounts ({})", types.join(", ")));
        }
    };
    match mount.r#type.as_str() {
        "overlay" => {
            let mut upperdir = None;
            let mut lowerdirs = Vec::new();
            for option in &mount.options {
                match option.split_once('=') {
                    Some(("upperdir", value)) => upperdir = Some(unescape(value)),
                    Some(("lowerdir", value)) => lowerdirs.extend(split_lowerdirs(value)),
                    Some(("lowerdir+", value)) => lowerdirs.push(PathBuf::from(value)),
                    Some(_) | None => (),
                }
            }
            let absolute = |path: &PathBuf| path.is_absolute();
            if lowerdirs.is_empty() || !lowerdirs.iter().chain(&upperdir).all(absolute) {
                return Shape::Other("an overlay without absolute directories".into());
            }
            Shape::Overlay { upperdir, lowerdirs }
        }
        "bind" => Shape::Bind(mount.source.clone().into()),
        other => Shape::Other(format!("a mount of type `{}`", printable(other.as_bytes()))),
    }
}

/// The overlay of a container, if these mounts are one that it can write to.
pub(super) fn overlay_dirs(mounts: &[Mount]) -> Option<OverlayDirs> {
    shape(mounts).overlay_dirs()
}

impl Shape {
    pub(super) fn overlay_dirs(&self) -> Option<OverlayDirs> {
        match self {
            Shape::Overlay { upperdir: Some(upperdir), lowerdirs } => {
                Some(OverlayDirs { upperdir: upperdir.clone(), lowerdirs: lowerdirs.clone() })
            }
            Shape::Overlay { upperdir: None, .. } | Shape::Bind(_) | Shape::Other(_) => None,
        }
    }
}

/// Splits `lowerdir`'s value at colons; overlayfs reads `\:` as a colon in a name.
fn split_lowerdirs(value: &str) -> Vec<PathBuf> {
    let mut directories = vec![String::new()];
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        let directory = directories.last_mut().expect("there is always one");
        match character {
            '\\' => directory.extend(characters.next()),
            ':' => directories.push(String::new()),
            _ => directory.push(character),
        }
    }
    directories.into_iter().filter(|text| !text.is_empty()).map(PathBuf::from).collect()
}

fn unescape(value: &str) -> PathBuf {
    let mut text = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => text.extend(characters.next()),
            _ => text.push(character),
        }
    }
    text.into()
}

/// What a snapshotter keeps of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// A directory for each layer.
    Layers,
    /// A directory for each stack of layers, with everything in it.
    Copies,
    /// Nothing that can be read, and why.
    Unreadable(&'static str),
}

/// Judges by the snapshotter's name. Taking a view to find out would copy the image with some
/// snapshotters, and fetch it with others.
pub(super) fn storage(snapshotter: &str) -> Storage {
    const LAZY: &[&str] = &["cvmfs", "gcfs", "nydus", "overlaybd", "soci", "starlight", "stargz"];
    match snapshotter {
        "native" => Storage::Copies,
        "btrfs" | "zfs" | "devmapper" | "blockfile" => {
            Storage::Unreadable("it keeps volumes, not directories")
        }
        "erofs" => Storage::Unreadable("it keeps EROFS images, not directories"),
        _ if LAZY.iter().any(|lazy| snapshotter.contains(lazy)) => Storage::Unreadable(
            "it fetches a file when it is first read, and reading them all would fetch them all",
        ),
        _ => Storage::Layers,
    }
}

/// Why something cannot be had from the snapshotters: a reason, or a call that failed.
#[derive(Debug)]
pub(super) enum Unavailable {
    Reason(String),
    Call(Status),
}

impl From<Status> for Unavailable {
    fn from(status: Status) -> Unavailable {
        Unavailable::Call(status)
    }
}

/// Why the directories of a stack of layers cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum DirectoriesError {
    #[error("its overlay has {found} lower directories for {layers} layers")]
    OtherCount { found: usize, layers: usize },
    #[error("it gives one directory, not an overlay")]
    OneDirectory,
    #[error("it gives {0}")]
    NoOverlay(String),
    #[error(
        "its directory {} is a FUSE mount, which may fetch what is read",
        printable(.0.as_os_str().as_encoded_bytes())
    )]
    Lazy(PathBuf),
    #[error("the mounts cannot be read: {0}")]
    Mounts(std::io::Error),
    #[error("{0}")]
    Stopping(tokio::task::JoinError),
    #[error("{0}")]
    NotKept(&'static str),
}

/// The directories of a stack of layers, bottom first, if they can be read.
pub(super) async fn readable_directories(
    shape: &Shape,
    layers: usize,
) -> Result<Vec<PathBuf>, DirectoriesError> {
    let directories = layer_directories(shape, layers)?;
    let mountinfo = tokio::task::spawn_blocking(|| {
        Handle::open(std::process::id()).and_then(|myself| myself.mountinfo())
    });
    let mountinfo = mountinfo.await.map_err(DirectoriesError::Stopping)?;
    let mountinfo = mountinfo.map_err(DirectoriesError::Mounts)?;
    match lazy_directory(&directories, &mountinfo) {
        Some(directory) => Err(DirectoriesError::Lazy(directory)),
        None => Ok(directories),
    }
}

/// The directories of a stack of layers, bottom first, from a mount made of it. An error if
/// there is not one directory per layer.
fn layer_directories(shape: &Shape, layers: usize) -> Result<Vec<PathBuf>, DirectoriesError> {
    match shape {
        Shape::Overlay { lowerdirs, .. } if lowerdirs.len() == layers => {
            Ok(lowerdirs.iter().rev().cloned().collect())
        }
        Shape::Overlay { lowerdirs, .. } => {
            Err(DirectoriesError::OtherCount { found: lowerdirs.len(), layers })
        }
        // With overlayfs, the view of a single layer is a bind of that layer.
        Shape::Bind(source) if layers == 1 => Ok(vec![source.clone()]),
        Shape::Bind(_) => Err(DirectoriesError::OneDirectory),
        Shape::Other(what) => Err(DirectoriesError::NoOverlay(what.clone())),
    }
}

/// A directory that must not be read, because it is on a FUSE mount: that may fetch what is
/// read, or hang. `mountinfo` is that of a process that sees the directories.
fn lazy_directory(directories: &[PathBuf], mountinfo: &[u8]) -> Option<PathBuf> {
    let fuse = overlay::fuse_mount_points(mountinfo);
    let lazy = |directory: &&PathBuf| fuse.iter().any(|mount| directory.starts_with(mount));
    directories.iter().find(lazy).cloned()
}

/// Puts the snapshotter's name before a reason.
pub(super) fn of(snapshotter: &str, reason: &str) -> String {
    format!("snapshotter {}: {reason}", printable(snapshotter.as_bytes()))
}

pub(super) async fn mounts(
    namespace: &Namespace,
    snapshotter: &str,
    key: &str,
) -> Result<Option<Shape>, Status> {
    let request = MountsRequest { snapshotter: snapshotter.into(), key: key.into() };
    let answer = found(namespace.snapshots().mounts(request).await)?;
    Ok(answer.map(|response| shape(&response.into_inner().mounts)))
}

/// A snapshot as its snapshotter describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Info {
    /// The name of the snapshot below; empty if there is none.
    pub(super) parent: String,
    /// In seconds and nanoseconds. It identifies the snapshot, because a name can be used
    /// again.
    pub(super) created: (i64, i32),
}

/// `None` if there is no snapshot `key`.
pub(super) async fn info(
    namespace: &Namespace,
    snapshotter: &str,
    key: &str,
) -> Result<Option<Info>, Status> {
    let request = StatSnapshotRequest { snapshotter: snapshotter.into(), key: key.into() };
    let answer = found(namespace.snapshots().stat(request).await)?;
    Ok(answer.and_then(|response| response.into_inner().info).map(|info| {
        let created = info.created_at.unwrap_or_default();
        Info { parent: info.parent, created: (created.seconds, created.nanos) }
    }))
}

/// The snapshotters that work on this containerd, sorted.
pub(super) async fn snapshotters(namespace: &Namespace) -> Result<Vec<String>, Status> {
    let request = PluginsRequest { filters: vec!["type==io.containerd.snapshotter.v1".into()] };
    let plugins = namespace.introspection().plugins(request).await?.into_inner().plugins;
    let mut names: Vec<String> = plugins
        .into_iter()
        .filter(|plugin| plugin.init_err.is_none())
        .map(|plugin| plugin.id)
        .collect();
    names.sort();
    Ok(names)
}

async fn is_unpacked(
    namespace: &Namespace,
    snapshotter: &str,
    chain_id: ChainId,
) -> Result<bool, Status> {
    use containerd_client::services::v1::snapshots::Kind;
    let request =
        StatSnapshotRequest { snapshotter: snapshotter.into(), key: chain_id.to_string() };
    let answer = match found(namespace.snapshots().stat(request).await) {
        // This containerd has no such snapshotter.
        Err(status) if status.code() == Code::InvalidArgument => return Ok(false),
        answer => answer?,
    };
    Ok(answer
        .and_then(|response| response.into_inner().info)
        .is_some_and(|info| info.kind() == Kind::Committed))
}

/// The snapshotter that holds these layers, preferably one that keeps directories. `None` while
/// none does. The snapshotters themselves are asked, because the label on the config blob that
/// names the snapshotter is set only after the event of the last layer's commit.
pub(super) async fn unpacked_by(
    namespace: &Namespace,
    chain_id: ChainId,
) -> Result<Option<String>, Status> {
    if is_unpacked(namespace, DEFAULT_SNAPSHOTTER, chain_id).await? {
        return Ok(Some(DEFAULT_SNAPSHOTTER.into()));
    }
    let mut others = snapshotters(namespace).await?;
    others.retain(|snapshotter| snapshotter != DEFAULT_SNAPSHOTTER);
    others.sort_by_key(|snapshotter| match storage(snapshotter) {
        Storage::Layers => 0,
        Storage::Copies => 1,
        Storage::Unreadable(_) => 2,
    });
    for snapshotter in others {
        if is_unpacked(namespace, &snapshotter, chain_id).await? {
            return Ok(Some(snapshotter));
        }
    }
    Ok(None)
}

/// The IDs of our leases in use. A lease that is named after this process and is not in here is
/// left over from a driftd that ended.
#[derive(Debug, Default)]
pub(super) struct HeldLeases {
    ids: std::sync::Mutex<std::collections::HashSet<String>>,
    count: std::sync::atomic::AtomicU64,
}

/// The names of our leases and views begin with this, followed by the pid of the process.
const PREFIX: &str = "driftd-view-";
/// Longer than it takes to read any image twice. After that, containerd's garbage collector
/// removes what a driftd that ended has left.
const LEASE_HOURS: i64 = 6;

impl HeldLeases {
    fn ids(&self) -> std::sync::MutexGuard<'_, std::collections::HashSet<String>> {
        self.ids.lock().expect("no holder of this lock panics")
    }

    fn new_id(&self) -> String {
        let number = self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let id = format!(
            "{PREFIX}{}-{}-{number}",
            std::process::id(),
            jiff::Timestamp::now().as_millisecond()
        );
        self.ids().insert(id.clone());
        id
    }

    /// Whether a lease is left over from a driftd that ended.
    fn is_stale(&self, id: &str) -> bool {
        let Some(rest) = id.strip_prefix(PREFIX) else { return false };
        if self.ids().contains(id) {
            return false;
        }
        match rest.split('-').next().and_then(|pid| pid.parse::<u32>().ok()) {
            Some(pid) if pid == std::process::id() => true,
            // If the pid is another process's by now, this only delays: the lease expires.
            Some(pid) => !std::path::Path::new(&format!("/proc/{pid}")).exists(),
            None => false,
        }
    }
}

/// A read-only view of a stack of layers. It keeps their directories while they are read, and
/// is given back with [`View::release`].
#[derive(Debug)]
pub(super) struct View {
    namespace: Namespace,
    snapshotter: String,
    /// The ID of the lease, and the name of the view.
    id: String,
    held: Arc<HeldLeases>,
    pub(super) shape: Shape,
}

impl View {
    /// `None` if the layers are not unpacked (any more).
    pub(super) async fn take(
        namespace: &Namespace,
        snapshotter: &str,
        chain_id: ChainId,
        held: &Arc<HeldLeases>,
    ) -> Result<Option<View>, Status> {
        let id = held.new_id();
        let expires = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(LEASE_HOURS);
        let lease = CreateRequest {
            id: id.clone(),
            labels: [("containerd.io/gc.expire".to_owned(), expires.to_string())].into(),
        };
        let mut view = View {
            namespace: namespace.clone(),
            snapshotter: snapshotter.into(),
            id: id.clone(),
            held: Arc::clone(held),
            shape: Shape::Other("nothing yet".into()),
        };
        let request = ViewSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: id.clone(),
            parent: chain_id.to_string(),
            labels: [].into(),
        };
        let answer = match namespace.leases().create(lease).await {
            Ok(_) => match namespace.with_lease(&id) {
                Ok(leased) => leased.snapshots().view(request).await,
                Err(status) => Err(status),
            },
            Err(status) => Err(status),
        };
        match found(answer) {
            Ok(Some(response)) => {
                view.shape = shape(&response.into_inner().mounts);
                Ok(Some(view))
            }
            Ok(None) => {
                view.release().await;
                Ok(None)
            }
            Err(status) => {
                view.release().await;
                Err(status)
            }
        }
    }

    pub(super) async fn release(self) {
        remove_view(&self.namespace, &self.snapshotter, &self.id).await;
        remove_lease(&self.namespace, &self.id).await;
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // Whether or not it was removed from containerd: it is not in use any more.
        self.held.ids().remove(&self.id);
    }
}

async fn remove_view(namespace: &Namespace, snapshotter: &str, key: &str) {
    let request = RemoveSnapshotRequest { snapshotter: snapshotter.into(), key: key.into() };
    if let Err(status) = found(namespace.snapshots().remove(request).await) {
        tracing::debug!(key, reason = words(&status), "a view stays until its lease expires");
    }
}

async fn remove_lease(namespace: &Namespace, id: &str) {
    let request = DeleteRequest { id: id.into(), sync: false };
    if let Err(status) = found(namespace.leases().delete(request).await) {
        tracing::debug!(id, reason = words(&status), "a lease stays until it expires");
    }
}

/// Removes what an earlier driftd has left behind in this namespace.
pub(super) async fn remove_stale_views(
    namespace: &Namespace,
    held: &HeldLeases,
) -> Result<(), Status> {
    let request = ListRequest { filters: vec![format!("id~=\"^{PREFIX}\"")] };
    let leases = namespace.leases().list(request).await?.into_inner().leases;
    for lease in leases.into_iter().filter(|lease| held.is_stale(&lease.id)) {
        tracing::info!(namespace = %namespace.name, lease = lease.id, "removing a stale view");
        let request = ListResourcesRequest { id: lease.id.clone() };
        let resources = namespace.leases().list_resources(request).await?.into_inner().resources;
        for resource in resources {
            if let Some(snapshotter) = resource.r#type.strip_prefix("snapshots/") {
                remove_view(namespace, snapshotter, &resource.id).await;
            }
        }
        remove_lease(namespace, &lease.id).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            r#type: kind.into(),
            source: source.into(),
            target: String::new(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
        }
    }

    fn paths(paths: &[&str]) -> Vec<PathBuf> {
        paths.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn an_overlay_keeps_its_order_and_its_colons() {
        let options = &[
            "index=off",
            "userxattr",
            "uidmap=0:100000:65536",
            "workdir=/s/9/work",
            "upperdir=/s/9/f\\:s",
            "lowerdir=/s/2/f\\:s:/s/1/b\\\\s",
        ];
        assert_eq!(
            shape(&[mount("overlay", "overlay", options)]),
            Shape::Overlay {
                upperdir: Some("/s/9/f:s".into()),
                lowerdirs: paths(&["/s/2/f:s", "/s/1/b\\s"]),
            }
        );
    }

    #[test]
    fn lowerdirs_may_come_one_by_one() {
        let options = &["lowerdir+=/s/2:x", "lowerdir+=/s/1", "datadir+=/d"];
        assert_eq!(
            shape(&[mount("overlay", "overlay", options)]),
            Shape::Overlay { upperdir: None, lowerdirs: paths(&["/s/2:x", "/s/1"]) }
        );
    }

    #[test]
    fn layers_are_named_bottom_first() {
        let view = Shape::Overlay { upperdir: None, lowerdirs: paths(&["/3", "/2", "/1"]) };
        assert_eq!(layer_directories(&view, 3).unwrap(), paths(&["/1", "/2", "/3"]));
        assert_eq!(
            layer_directories(&view, 2).unwrap_err().to_string(),
            "its overlay has 3 lower directories for 2 layers"
        );
    }

    #[test]
    fn a_view_of_one_layer_is_a_bind() {
        let bind = shape(&[mount("bind", "/s/1/fs", &["ro", "rbind"])]);
        assert_eq!(bind, Shape::Bind("/s/1/fs".into()));
        assert_eq!(layer_directories(&bind, 1).unwrap(), paths(&["/s/1/fs"]));
        assert_eq!(
            layer_directories(&bind, 2).unwrap_err().to_string(),
            "it gives one directory, not an overlay"
        );
    }

    #[test]
    fn a_mount_that_is_no_overlay_has_a_reason() {
        let erofs = [mount("erofs", "/a", &[]), mount("format/mkdir/overlay", "overlay", &[])];
        let shape = shape(&erofs);
        assert_eq!(overlay_dirs(&erofs), None);
        assert_eq!(
            of("other", &layer_directories(&shape, 1).unwrap_err().to_string()),
            "snapshotter other: it gives several mounts (erofs, format/mkdir/overlay)"
        );
    }

    #[test]
    fn snapshotters_that_keep_no_directories_are_known_by_name() {
        assert_eq!(storage("overlayfs"), Storage::Layers);
        assert_eq!(storage("fuse-overlayfs"), Storage::Layers);
        assert_eq!(storage("native"), Storage::Copies);
        let none = [
            "btrfs",
            "zfs",
            "devmapper",
            "blockfile",
            "erofs",
            "stargz",
            "nydus",
            "nydus-fs",
            "soci",
            "overlaybd",
            "gcfs",
            "cvmfs-snapshotter",
        ];
        for name in none {
            assert!(matches!(storage(name), Storage::Unreadable(_)), "{name}");
        }
    }

    #[test]
    fn a_directory_below_a_fuse_mount_is_not_read() {
        let mountinfo = b"2 1 0:50 / /s/2/fs rw - fuse.rawBridge stargz rw\n";
        assert_eq!(lazy_directory(&paths(&["/s/1/fs", "/s/2/fsx"]), mountinfo), None);
        let lazy = lazy_directory(&paths(&["/s/1/fs", "/s/2/fs"]), mountinfo).unwrap();
        assert_eq!(
            DirectoriesError::Lazy(lazy).to_string(),
            "its directory /s/2/fs is a FUSE mount, which may fetch what is read"
        );
    }

    #[test]
    fn a_relative_directory_is_refused() {
        let overlay = mount("overlay", "overlay", &["lowerdir=l/ABC:l/DEF", "upperdir=/u"]);
        assert_eq!(overlay_dirs(&[overlay]), None);
    }

    #[test]
    fn only_what_a_dead_driftd_left_is_stale() {
        let held = HeldLeases::default();
        let own = held.new_id();
        assert!(!held.is_stale(&own));
        held.ids().remove(&own);
        assert!(held.is_stale(&own), "{own}");
        assert!(!held.is_stale("driftd-view-1-0-0"), "pid 1 is alive");
        assert!(held.is_stale("driftd-view-4194999-0-0"));
        assert!(!held.is_stale("of-another-program"));
    }

    proptest::proptest! {
        #[test]
        fn directories_survive_escaping(names in proptest::collection::vec("/[a-z:\\\\]{1,8}", 1..5)) {
            let value: Vec<String> = names
                .iter()
                .map(|name| name.replace('\\', "\\\\").replace(':', "\\:"))
                .collect();
            let split = split_lowerdirs(&value.join(":"));
            proptest::prop_assert_eq!(split, names.iter().map(PathBuf::from).collect::<Vec<_>>());
        }
    }
}
