//! Containers and the images they were made from: names, labels, layers, one run of a
//! container, and the user IDs of its user namespace.
//!
//! Values only. `containerd` fills them.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::declared_probe::DeclaredProbe;
use super::digest::{ChainId, DiffId, ManifestDigest};
use super::printable::{printable, shorten};

/// A container's name on this node: containerd's namespace and the container's
/// ID in it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContainerId {
    pub namespace: Arc<str>,
    pub id: Arc<str>,
}

impl ContainerId {
    pub fn new(namespace: &str, id: &str) -> ContainerId {
        ContainerId { namespace: namespace.into(), id: id.into() }
    }
}

/// How a text names a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBy {
    /// Its whole ID, or its namespace and its whole ID.
    WholeId,
    /// The first digits of a generated ID.
    FirstDigits,
}

impl ContainerId {
    /// How `text` names this container: by its ID, by `NAMESPACE/ID`, or by the first
    /// [`FEWEST_DIGITS`] or more digits of an ID that is hexadecimal as a whole. The
    /// beginning of any other ID may be another container's whole name.
    pub fn named_by(&self, text: &str) -> Option<NamedBy> {
        let id = match text.split_once('/') {
            Some((namespace, id)) => Some(id).filter(|_| *self.namespace == *namespace)?,
            None => text,
        };
        if *self.id == *id {
            return Some(NamedBy::WholeId);
        }
        let is_beginning = id.len() >= FEWEST_DIGITS && self.id.starts_with(id);
        (is_beginning && is_hexadecimal(&self.id)).then_some(NamedBy::FirstDigits)
    }
}

/// How many digits of a hexadecimal ID name its container at least.
pub const FEWEST_DIGITS: usize = 8;

fn is_hexadecimal(id: &str) -> bool {
    id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!(
            "{}/{}",
            printable(self.namespace.as_bytes()),
            printable(self.id.as_bytes())
        ))
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One run of one container. A container's ID can be used again, and so can a pid: these
/// fields together with the ID name one run for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Incarnation {
    /// The init process, in the host's pid namespace.
    pub pid: u32,
    /// When init started, in clock ticks after boot; `None` if that was not read.
    pub start_time: Option<u64>,
    /// When the container's record was made; `None` if the record is not known yet.
    pub created_at: Option<Timestamp>,
}

/// A container as its runtime describes it.
// Long: one field for each fact that containerd reports; readers take the value as a
// whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub id: ContainerId,
    /// The containerd socket that knows this container.
    pub endpoint: Arc<str>,
    /// The runtime's name, e.g. `io.containerd.runc.v2`.
    pub runtime: String,
    /// When its record was made. A later container with the same ID has another time.
    pub created_at: Option<Timestamp>,
    pub labels: Labels,
    pub pod: Option<Pod>,
    pub image: ImageReference,
    pub snapshotter: String,
    pub snapshot_key: String,
    /// The layers below the container's own, bottom first: from the parent chain of the
    /// active snapshot. The image's name may mean another image by now.
    pub layers: Vec<Layer>,
    /// Where the container's overlay keeps its files, if it is an overlay.
    pub rootfs: Option<OverlayDirs>,
    /// The running task; `None` for a container that is not running.
    pub task: Option<Task>,
    /// Why there can be no baseline for this container, if that is known already.
    pub no_baseline: Option<String>,
    /// The host's IDs of its users and groups; `None` without a user namespace.
    pub id_map: Option<IdMap>,
    pub entry_point: EntryPoint,
    /// The probes that its specification declares.
    pub probes: Vec<DeclaredProbe>,
}

/// How many labels of one container are kept.
pub const MAX_LABELS: usize = 64;
/// The bytes of all kept labels, names included.
pub const MAX_LABEL_BYTES: usize = 8 << 10;
/// The bytes of one name, and of one value.
const MAX_NAME: usize = 256;
const MAX_VALUE: usize = 1024;
/// A label of driftd's own: how many labels are missing or cut.
const CUT: &str = "driftd.io/cut";
/// The end of a value that is cut.
const MORE: &str = "…";

/// A container's labels. An image can set any number, of any length: this type bounds
/// them. All values that name the container share one copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "BTreeMap<String, String>", into = "BTreeMap<String, String>")]
pub struct Labels(Arc<BTreeMap<String, String>>);

impl Deref for Labels {
    type Target = BTreeMap<String, String>;

    fn deref(&self) -> &BTreeMap<String, String> {
        &self.0
    }
}

impl From<Labels> for BTreeMap<String, String> {
    fn from(labels: Labels) -> BTreeMap<String, String> {
        Arc::unwrap_or_clone(labels.0)
    }
}

impl From<BTreeMap<String, String>> for Labels {
    /// Keeps the labels that driftd and administrators need first, then the shortest. The
    /// label `driftd.io/cut` counts what is cut or left out.
    fn from(labels: BTreeMap<String, String>) -> Labels {
        let bytes = |name: &str, value: &str| name.len() + value.len();
        let all: usize = labels.iter().map(|(name, value)| bytes(name, value)).sum();
        let is_long =
            |(name, value): (&String, &String)| name.len() > MAX_NAME || value.len() > MAX_VALUE;
        if labels.len() <= MAX_LABELS && all <= MAX_LABEL_BYTES && !labels.iter().any(is_long) {
            return Labels(Arc::new(labels));
        }
        let mut in_order: Vec<(String, String)> = labels.into_iter().collect();
        in_order.sort_by_cached_key(|(name, value)| (rank(name), bytes(name, value)));
        let (mut kept, mut room) = (BTreeMap::new(), MAX_LABEL_BYTES - MAX_NAME);
        let (mut left_out, mut cut) = (0_usize, 0_usize);
        for (name, mut value) in in_order {
            if name == CUT {
                continue;
            }
            let is_cut = value.len() > MAX_VALUE;
            if is_cut {
                shorten(&mut value, MAX_VALUE - MORE.len());
                value.push_str(MORE);
            }
            let bytes = bytes(&name, &value);
            if kept.len() == MAX_LABELS - 1 || name.len() > MAX_NAME || bytes > room {
                left_out += 1;
                continue;
            }
            cut += usize::from(is_cut);
            room -= bytes;
            kept.insert(name, value);
        }
        kept.insert(CUT.to_owned(), format!("{left_out} labels left out, {cut} values cut"));
        Labels(Arc::new(kept))
    }
}

/// The order in which labels are kept. An image may set any label, these included.
fn rank(name: &str) -> usize {
    const NEEDED: &[&str] = &[
        "io.cri-containerd.kind",
        "io.kubernetes.container.name",
        "io.kubernetes.pod.name",
        "io.kubernetes.pod.namespace",
        "io.kubernetes.pod.uid",
        "containerd.io/restart.status",
        "containerd.io/restart.policy",
        "nerdctl/namespace",
        "nerdctl/name",
    ];
    NEEDED.iter().position(|needed| *needed == name).unwrap_or(NEEDED.len())
}

/// The command of a container's init, as the specification has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EntryPoint {
    /// The program, as a path or as a name to find in `search`, and its arguments.
    pub arguments: Vec<String>,
    /// The directories of `PATH`.
    pub search: Vec<String>,
    pub directory: String,
}

impl Container {
    /// The identity of all layers together; `None` without layers.
    pub fn chain_id(&self) -> Option<ChainId> {
        self.layers.last().map(|layer| layer.chain_id)
    }
}

/// The Kubernetes names of a container, from the CRI's labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub uid: String,
    /// The container's name in the pod.
    pub container: Option<String>,
}

/// A container, as a finding or a session names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerEvidence {
    #[serde(flatten)]
    pub id: ContainerId,
    pub labels: Labels,
    pub pod: Option<Pod>,
}

/// The image that a container's record names.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageReference {
    pub name: Option<String>,
    pub manifest_digest: Option<ManifestDigest>,
    pub chain_id: Option<ChainId>,
}

/// What names a layer's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerId {
    Diff(DiffId),
    /// The layer has no diff ID, because no image has it (Docker's init layer), or its diff
    /// ID is lost, because the image's config is gone while a container still uses its
    /// snapshots.
    Chain(ChainId),
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LayerId::Diff(diff_id) => write!(f, "{diff_id}"),
            LayerId::Chain(chain_id) => write!(f, "chain-{chain_id}"),
        }
    }
}

/// One layer of a container's rootfs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    pub id: LayerId,
    /// The identity of this layer with all below it: its snapshot's name.
    pub chain_id: ChainId,
    /// The directory into which the snapshotter has unpacked it; `None` if the snapshotter
    /// keeps no directories of single layers.
    pub directory: Option<PathBuf>,
    /// The archive that it was unpacked from, as the image's manifest names it. The content
    /// store may not have it any more.
    pub blob: Option<Blob>,
}

/// A blob in a content store: a layer as it came from the registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Blob {
    /// The containerd socket that has it.
    pub endpoint: Arc<str>,
    pub namespace: Arc<str>,
    /// As the manifest names it: `sha256:…`.
    pub digest: String,
    pub media_type: String,
    /// In bytes, from the manifest.
    pub size: u64,
}

/// An overlay's directories on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayDirs {
    pub upperdir: PathBuf,
    /// Topmost first, as in the mount option.
    pub lowerdirs: Vec<PathBuf>,
}

/// A running task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The init process, in the host's pid namespace.
    pub pid: u32,
    /// When init started, in clock ticks after boot; `None` if init had ended before that
    /// could be read.
    pub start_time: Option<u64>,
    pub paused: bool,
    /// The FIFO on the host that leads to init's terminal, if init has one.
    pub terminal_input: Option<PathBuf>,
}

/// How the users and groups of a user namespace are numbered on the host
/// (user_namespaces(7), `uid_map`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    pub uids: Vec<IdRange>,
    pub gids: Vec<IdRange>,
}

/// A range of consecutive IDs: where it begins inside and on the host, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    pub container: u32,
    pub host: u32,
    pub count: u32,
}

impl IdMap {
    /// The container's ID of the host's user `uid`: the overflow user, if the map does not
    /// have it.
    pub fn uid_to_container(&self, uid: u32) -> u32 {
        to_container(&self.uids, uid)
    }

    pub fn gid_to_container(&self, gid: u32) -> u32 {
        to_container(&self.gids, gid)
    }
}

/// The kernel's default for users and groups alike.
const OVERFLOW_ID: u32 = 65_534;

fn to_container(ranges: &[IdRange], id: u32) -> u32 {
    let found = ranges.iter().find_map(|range| {
        let offset = id.checked_sub(range.host).filter(|offset| *offset < range.count)?;
        range.container.checked_add(offset)
    });
    found.unwrap_or(OVERFLOW_ID)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(number: usize, length: usize) -> BTreeMap<String, String> {
        (0..number).map(|number| (format!("x{number}"), "v".repeat(length))).collect()
    }

    #[test]
    fn x03_an_images_labels_are_bounded_in_number_and_bytes_and_a_cut_is_marked() {
        let few = labels(60, 100);
        assert_eq!(*Labels::from(few.clone()), few);
        let mut many = labels(200, 4000);
        many.insert("io.cri-containerd.kind".into(), "sandbox".into());
        many.insert("team".into(), "shop".into());
        let kept = Labels::from(many);
        let bytes: usize = kept.iter().map(|(name, value)| name.len() + value.len()).sum();
        assert!(kept.len() <= MAX_LABELS && bytes <= MAX_LABEL_BYTES, "{} {bytes}", kept.len());
        assert_eq!(kept["io.cri-containerd.kind"], "sandbox");
        assert_eq!(kept["team"], "shop");
        assert_eq!(kept[CUT], "193 labels left out, 7 values cut");
        assert!(kept["x0"].ends_with(MORE) && kept["x0"].len() <= MAX_VALUE);
        // What is read back is not cut again.
        assert_eq!(Labels::from(BTreeMap::from(kept.clone())), kept);
        let kept = Labels::from(labels(10_000, 1));
        assert_eq!((kept.len(), &*kept[CUT]), (64, "9937 labels left out, 0 values cut"));
        let wide = BTreeMap::from([("wide".to_owned(), "木".repeat(1000))]);
        assert!(Labels::from(wide)["wide"].ends_with("木…"));
        let long = BTreeMap::from([("n".repeat(4000), String::new())]);
        assert_eq!(Labels::from(long)[CUT], "1 labels left out, 0 values cut");
    }

    #[test]
    fn u19_a_container_is_named_by_its_whole_id_or_by_eight_digits_of_a_hexadecimal_one() {
        let check = |id: &str, text: &str, expected| {
            assert_eq!(ContainerId::new("k8s.io", id).named_by(text), expected, "{id} {text}");
        };
        check("web", "web", Some(NamedBy::WholeId));
        check("web", "k8s.io/web", Some(NamedBy::WholeId));
        check("web", "default/web", None);
        check("web-canary", "web", None);
        check("web-canary-1", "web-canary", None);
        let generated = "4f2a90cc1b7de3054f2a90cc1b7de305";
        check(generated, generated, Some(NamedBy::WholeId));
        check(generated, "4f2a90cc", Some(NamedBy::FirstDigits));
        check(generated, "k8s.io/4f2a90cc1b", Some(NamedBy::FirstDigits));
        check(generated, "moby/4f2a90cc1b", None);
        check(generated, "4f2a90c", None);
        check(generated, "4F2A90CC", None);
        check(generated, "", None);
        // A name that begins with digits is a name.
        check("20240101-backup", "20240101", None);
        check("deadbeef-web", "deadbeef", None);
    }

    #[test]
    fn a_hosts_user_is_named_as_the_container_names_it() {
        let range = |container, host, count| IdRange { container, host, count };
        let map = IdMap {
            uids: vec![range(0, 100_000, 65_536), range(70_000, 1000, 1)],
            gids: vec![range(u32::MAX, 5, 2)],
        };
        let check = |uid, expected| assert_eq!(map.uid_to_container(uid), expected, "{uid}");
        check(100_000, 0);
        check(165_535, 65_535);
        check(165_536, OVERFLOW_ID);
        check(1000, 70_000);
        check(0, OVERFLOW_ID);
        assert_eq!(map.gid_to_container(5), u32::MAX);
        assert_eq!(map.gid_to_container(6), OVERFLOW_ID, "no ID is larger");
    }
}
