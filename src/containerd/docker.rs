//! Docker's own files, for what containerd does not know of Docker's containers.
//!
//! containerd runs Docker's containers (usually in the namespace `moby`). Docker passes it
//! neither their image nor, with the classic storage driver overlay2, their layers. Docker
//! keeps both in files that only root can write, below a data root to which the container's
//! rootfs leads. They are read with bounds and without trust all the same: data that does not
//! fit together is not used.
//!
//! ```text
//!  <data root>/overlay2/<mount ID>/{merged,diff,lower}   the container
//!             /overlay2/<mount ID>-init/diff             what Docker puts between
//!             /overlay2/<cache ID>/diff                  a layer
//!             /overlay2/l/<short name> -> ../<cache ID>/diff
//!             /image/overlay2/layerdb/mounts/<container>/parent  the topmost chain ID
//!             /image/overlay2/layerdb/sha256/<chain ID>/{cache-id,diff,parent}
//!             /containers/<container>/{config.v2,hostconfig}.json
//! ```

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use serde::Deserialize;

use super::probes::{self, HealthCheck};
use crate::model::{ChainId, DiffId, Layer, LayerId, OverlayDirs, printable};
use crate::sys::overlay;
use crate::sys::procfs::Handle;

/// Set on every container that Docker makes, whatever namespace it uses.
const LABEL: &str = "com.docker/engine.bundle.path";

const CONFIG_LIMIT: u64 = 4 << 20;
const NAME_LIMIT: u64 = 256;
/// The kernel's page: longer lists do not fit into a mount's options.
const LIST_LIMIT: u64 = 4096;
const LAYER_LIMIT: usize = 512;

pub(super) fn made(labels: &std::collections::HashMap<String, String>) -> bool {
    labels.contains_key(LABEL)
}

/// The layers on which a container of the driver overlay2 stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stack {
    /// Bottom first; the topmost is Docker's own.
    pub(super) layers: Vec<Layer>,
    /// The image's part of `layers`.
    pub(super) image_chain: Option<ChainId>,
    pub(super) dirs: OverlayDirs,
}

/// Why the layers of a container are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum StackError {
    #[error(
        "its rootfs {} is not one of Docker's overlay2: other storage drivers keep no layers that \
         can be compared", shown(.0)
    )]
    OtherDriver(PathBuf),
    #[error("Docker's {} cannot be read: {source}", shown(path))]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("Docker names no layers of it")]
    NoLayers,
    #[error("Docker's {} leads to {}", shown(link), shown(target))]
    WrongLink { link: PathBuf, target: PathBuf },
    #[error("its layer {} is not in Docker's store", shown(.0))]
    OutsideStore(PathBuf),
}

/// Reads on which layers the container `id` stands, whose rootfs is mounted at `rootfs`.
/// Blocks.
pub(super) fn stack(id: &str, rootfs: &Path, pid: Option<u32>) -> Result<Stack, StackError> {
    let mount = ContainerMount::of(rootfs)?;
    let upperdir = mount.directory.join("diff");
    // Once the rootfs is mounted, the kernel knows better than Docker.
    let mounted = pid.and_then(|pid| {
        let mountinfo = Handle::open(pid).and_then(|init| init.mountinfo()).ok()?;
        overlay::find_by_upperdir(&mountinfo, &upperdir)
    });
    let named = match mounted {
        Some(mounted) => mounted.dirs.lowerdirs,
        None => {
            let lower = mount.directory.join("lower");
            let list = read(&lower, LIST_LIMIT)
                .map_err(|source| StackError::Unreadable { path: lower, source })?;
            split_lower(&list).map(|name| mount.store.join(name)).collect()
        }
    };
    if named.is_empty() {
        return Err(StackError::NoLayers);
    }
    let mut lowerdirs = Vec::with_capacity(named.len());
    for name in named {
        lowerdirs.push(mount.resolve(&name)?);
    }
    let mut cache_ids = Vec::with_capacity(lowerdirs.len());
    for lowerdir in lowerdirs.iter().rev() {
        cache_ids.push(mount.cache_id(lowerdir)?);
    }
    let known = mount.layers(id).unwrap_or_default();
    let (layers, image_chain) = name_layers(&cache_ids, &known, &mount.id);
    let layers = layers
        .into_iter()
        .zip(lowerdirs.iter().rev())
        .map(|((id, chain_id), directory)| Layer {
            id,
            chain_id,
            directory: Some(directory.clone()),
            // Docker deletes the archives after the unpack.
            blob: None,
        })
        .collect();
    Ok(Stack { layers, image_chain, dirs: OverlayDirs { upperdir, lowerdirs } })
}

/// The directory of a container's mount in Docker's data root.
#[derive(Debug)]
struct ContainerMount {
    /// `<data root>/overlay2`
    store: PathBuf,
    directory: PathBuf,
    id: String,
}

/// A layer as Docker's layer store describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct StoredLayer {
    chain_id: ChainId,
    diff_id: DiffId,
    cache_id: String,
}

impl ContainerMount {
    fn of(rootfs: &Path) -> Result<ContainerMount, StackError> {
        let mount = || {
            let directory = rootfs.parent()?;
            let store = directory.parent()?;
            let is_overlay = rootfs.is_absolute()
                && rootfs.file_name() == Some(OsStr::new("merged"))
                && store.file_name() == Some(OsStr::new("overlay2"));
            is_overlay.then_some(())?;
            Some(ContainerMount {
                store: store.to_owned(),
                directory: directory.to_owned(),
                id: directory.file_name()?.to_str()?.to_owned(),
            })
        };
        mount().ok_or_else(|| StackError::OtherDriver(rootfs.to_owned()))
    }

    /// Follows one of Docker's short names to the layer's directory.
    fn resolve(&self, name: &Path) -> Result<PathBuf, StackError> {
        if name.parent() != Some(&self.store.join("l")) {
            return Ok(name.to_owned());
        }
        let target = std::fs::read_link(name)
            .map_err(|source| StackError::Unreadable { path: name.to_owned(), source })?;
        match link_target(&target) {
            Some(directory) => Ok(self.store.join(directory)),
            None => Err(StackError::WrongLink { link: name.to_owned(), target }),
        }
    }

    fn cache_id(&self, directory: &Path) -> Result<String, StackError> {
        let id = directory.strip_prefix(&self.store).ok().and_then(link_target_name);
        id.ok_or_else(|| StackError::OutsideStore(directory.to_owned()))
    }

    /// The layers of a container's image, bottom first, from the layer store. `None` if that
    /// cannot be read or does not fit together.
    fn layers(&self, container: &str) -> Option<Vec<StoredLayer>> {
        is_name(container).then_some(())?;
        let driver = self.store.file_name()?;
        let database = self.store.parent()?.join("image").join(driver).join("layerdb");
        let text = |path: PathBuf| read(&path, NAME_LIMIT).ok();
        let mut next = text(database.join("mounts").join(container).join("parent"));
        let mut layers = Vec::new();
        while let Some(chain_id) = next {
            let chain_id: ChainId = chain_id.trim().parse().ok()?;
            if layers.len() == LAYER_LIMIT {
                return None;
            }
            let layer = database.join("sha256").join(chain_id.hex());
            layers.push(StoredLayer {
                chain_id,
                diff_id: text(layer.join("diff"))?.trim().parse().ok()?,
                cache_id: text(layer.join("cache-id"))?.trim().to_owned(),
            });
            next = text(layer.join("parent"));
        }
        layers.reverse();
        let diff_ids: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
        let as_computed = ChainId::of_layers(&diff_ids)
            .iter()
            .zip(&layers)
            .all(|(chain_id, layer)| *chain_id == layer.chain_id);
        as_computed.then_some(layers)
    }
}

/// Names a stack of layers, bottom first, by the layer store, if that describes the same
/// directories. Also returns the image's own chain ID.
fn name_layers(
    cache_ids: &[String],
    known: &[StoredLayer],
    mount_id: &str,
) -> (Vec<(LayerId, ChainId)>, Option<ChainId>) {
    let init = format!("{mount_id}-init");
    let is_init = cache_ids.last() == Some(&init);
    let image = &cache_ids[..cache_ids.len() - usize::from(is_init)];
    let is_known = image.len() == known.len()
        && image.iter().zip(known).all(|(cache_id, known)| *cache_id == known.cache_id);
    let mut layers: Vec<(LayerId, ChainId)> = Vec::with_capacity(cache_ids.len());
    if is_known {
        layers.extend(known.iter().map(|known| (LayerId::Diff(known.diff_id), known.chain_id)));
    }
    for cache_id in &cache_ids[layers.len()..] {
        let below = layers.last().map(|(_, chain_id)| *chain_id);
        let chain_id = ChainId::above(below, cache_id);
        layers.push((LayerId::Chain(chain_id), chain_id));
    }
    let image_chain = image.len().checked_sub(1).map(|top| layers[top].1);
    (layers, image_chain)
}

/// The names in a `lower` file: `l/<short name>`, nothing else.
fn split_lower(list: &str) -> impl Iterator<Item = &str> {
    list.trim().split(':').filter(|name| name.strip_prefix("l/").is_some_and(is_name))
}

/// `<cache ID>/diff` of `../<cache ID>/diff`.
fn link_target(target: &Path) -> Option<PathBuf> {
    let mut components = target.components();
    (components.next()? == Component::ParentDir).then_some(())?;
    let directory = components.as_path();
    link_target_name(directory)?;
    Some(directory.to_owned())
}

/// The cache ID in `<cache ID>/diff`.
fn link_target_name(directory: &Path) -> Option<String> {
    let mut components = directory.components();
    let Component::Normal(name) = components.next()? else { return None };
    let name = name.to_str().filter(|name| is_name(name))?;
    (components.as_path() == Path::new("diff")).then(|| name.to_owned())
}

/// Whether the text is one component of a path that leads nowhere else.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
}

/// What Docker's own file states about a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Settings {
    /// The name of the image that it was made from.
    pub(super) image: Option<String>,
    pub(super) health_check: HealthCheck,
}

/// Reads Docker's file about the container `id`. Blocks.
pub(super) fn settings(id: &str, rootfs: &Path) -> Option<Settings> {
    is_name(id).then_some(())?;
    let data_root = data_root(rootfs)?;
    let config = data_root.join("containers").join(id).join("config.v2.json");
    let config = read(&config, CONFIG_LIMIT).ok()?;
    let (image, health_check) = (image_in_config(&config), probes::of_docker(&config));
    Some(Settings { image, health_check })
}

/// The restart policy of the container `id`: its name, which is empty for none. Blocks.
pub(super) fn restart_policy(id: &str, rootfs: &Path) -> Option<String> {
    is_name(id).then_some(())?;
    let directory = data_root(rootfs)?.join("containers").join(id);
    policy_in(&read(&directory.join("hostconfig.json"), CONFIG_LIMIT).ok()?)
}

fn policy_in(text: &str) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Host {
        restart_policy: Policy,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Policy {
        name: String,
        #[serde(default)]
        maximum_retry_count: u32,
    }
    let Policy { name, maximum_retry_count } =
        serde_json::from_str::<Host>(text).ok()?.restart_policy;
    let policy = match maximum_retry_count {
        0 => name,
        most => format!("{name}:{most}"),
    };
    Some(policy).filter(|policy| policy.len() <= 64)
}

/// `<data root>` of `<data root>/overlay2/<mount ID>/merged` and of the image
/// store's `<data root>/rootfs/<snapshotter>/<container>`.
fn data_root(rootfs: &Path) -> Option<&Path> {
    let third = rootfs.parent()?.parent()?;
    let is_classic = rootfs.file_name() == Some(OsStr::new("merged"));
    let is_image_store = third.file_name() == Some(OsStr::new("rootfs"));
    (is_classic || is_image_store).then_some(third.parent()?)
}

fn image_in_config(text: &str) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Container {
        config: Config,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Config {
        image: String,
    }
    let container: Container = serde_json::from_str(text).ok()?;
    Some(container.config.image).filter(|name| !name.is_empty() && name.len() <= 512)
}

/// The names under which containerd's image store may have the image that Docker names `name`.
pub(super) fn full_names(name: &str) -> Vec<String> {
    let last = name.rsplit('/').next().unwrap_or(name);
    let tagged = if last.contains(':') || name.contains('@') {
        name.to_owned()
    } else {
        format!("{name}:latest")
    };
    let mut names = vec![format!("docker.io/{tagged}"), tagged.clone()];
    if !tagged.contains('/') {
        names.insert(0, format!("docker.io/library/{tagged}"));
    }
    names
}

/// Reads a text file, if it is a regular file and small enough.
fn read(path: &Path, limit: u64) -> std::io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let stat = rustix::fs::fstat(&file)?;
    let is_small = u64::try_from(stat.st_size).is_ok_and(|size| size <= limit);
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || !is_small {
        return Err(std::io::ErrorKind::InvalidData.into());
    }
    let mut text = String::new();
    File::from(file).take(limit).read_to_string(&mut text)?;
    Ok(text)
}

fn shown(path: &Path) -> String {
    printable(path.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const CONTAINER: &str = "c0";

    #[test]
    fn d01_dockers_restart_policy_is_read() {
        let long = "x".repeat(100);
        let of = |name: &str, most: u32| {
            format!(
                r#"{{"Binds":null,"RestartPolicy":{{"Name":"{name}","MaximumRetryCount":{most}}}}}"#
            )
        };
        for (text, expected) in [
            (of("always", 0), Some("always")),
            (of("on-failure", 5), Some("on-failure:5")),
            (of("no", 0), Some("no")),
            (of("", 0), Some("")),
            (r#"{"RestartPolicy":{"Name":"always"}}"#.to_owned(), Some("always")),
            ("{}".to_owned(), None),
            (of(&long, 0), None),
        ] {
            assert_eq!(policy_in(&text).as_deref(), expected, "{text}");
        }
        let directory = tempfile::tempdir().unwrap();
        let files = directory.path().join("containers").join(CONTAINER);
        std::fs::create_dir_all(&files).unwrap();
        std::fs::write(files.join("hostconfig.json"), of("always", 0)).unwrap();
        let read = |id, root: &str| restart_policy(id, &directory.path().join(root));
        for root in ["overlay2/abc/merged", "rootfs/overlayfs/c0"] {
            assert_eq!(read(CONTAINER, root).as_deref(), Some("always"));
        }
        assert_eq!(read("../containers/c0", "rootfs/overlayfs/c0"), None);
    }

    /// A data root with one container on two layers.
    fn data_root_of_one() -> (tempfile::TempDir, PathBuf, Vec<DiffId>) {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_owned();
        let diff_ids = vec![DiffId([1; 32]), DiffId([2; 32])];
        let chain = ChainId::of_layers(&diff_ids);
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let database = "image/overlay2/layerdb";
        for (number, (diff_id, chain_id)) in diff_ids.iter().zip(&chain).enumerate() {
            let layer = format!("{database}/sha256/{}", chain_id.hex());
            write(&format!("{layer}/cache-id"), &format!("cache{number}"));
            write(&format!("{layer}/diff"), &diff_id.to_string());
            if number > 0 {
                write(&format!("{layer}/parent"), &chain[number - 1].to_string());
            }
        }
        write(&format!("{database}/mounts/{CONTAINER}/parent"), &chain[1].to_string());
        write("overlay2/m0/lower", "l/C:l/B:l/A");
        std::fs::create_dir_all(root.join("overlay2/l")).unwrap();
        for (name, target) in [("A", "cache0"), ("B", "cache1"), ("C", "m0-init")] {
            symlink(format!("../{target}/diff"), root.join("overlay2/l").join(name)).unwrap();
        }
        write("containers/c0/config.v2.json", r#"{"Config":{"Image":"web:1"},"Name":"/web"}"#);
        (directory, root, diff_ids)
    }

    #[test]
    fn a_classic_containers_layers_are_the_images_and_dockers_own() {
        let (_directory, root, diff_ids) = data_root_of_one();
        let rootfs = root.join("overlay2/m0/merged");
        let stack = stack(CONTAINER, &rootfs, None).unwrap();
        let chain = ChainId::of_layers(&diff_ids);
        let init = ChainId::above(Some(chain[1]), "m0-init");
        let layer = |id, chain_id, name: &str| Layer {
            id,
            chain_id,
            directory: Some(root.join("overlay2").join(name).join("diff")),
            blob: None,
        };
        let layers = vec![
            layer(LayerId::Diff(diff_ids[0]), chain[0], "cache0"),
            layer(LayerId::Diff(diff_ids[1]), chain[1], "cache1"),
            layer(LayerId::Chain(init), init, "m0-init"),
        ];
        let lowerdirs = layers.iter().rev().filter_map(|layer| layer.directory.clone()).collect();
        let upperdir = root.join("overlay2/m0/diff");
        assert_eq!(
            stack,
            Stack {
                layers,
                image_chain: Some(chain[1]),
                dirs: OverlayDirs { upperdir, lowerdirs },
            }
        );
        let settings = settings(CONTAINER, &rootfs);
        assert_eq!(settings, Some(Settings { image: Some("web:1".into()), health_check: None }));
    }

    #[test]
    fn without_the_layer_store_a_layer_is_named_by_its_directory() {
        let (_directory, root, _) = data_root_of_one();
        std::fs::remove_dir_all(root.join("image")).unwrap();
        let stack = stack(CONTAINER, &root.join("overlay2/m0/merged"), None).unwrap();
        let bottom = ChainId::above(None, "cache0");
        let top = ChainId::above(Some(bottom), "cache1");
        let ids: Vec<LayerId> = stack.layers.iter().map(|layer| layer.id).collect();
        let init = ChainId::above(Some(top), "m0-init");
        assert_eq!(ids, [bottom, top, init].map(LayerId::Chain));
        assert_eq!(stack.image_chain, Some(top));
    }

    #[test]
    fn a_layer_store_that_describes_other_directories_is_not_used() {
        let (_directory, root, diff_ids) = data_root_of_one();
        let layer = ChainId::of_layers(&diff_ids)[0].hex();
        let layer = root.join("image/overlay2/layerdb/sha256").join(layer);
        let ids = || {
            let stack = stack(CONTAINER, &root.join("overlay2/m0/merged"), None).unwrap();
            stack.layers.iter().map(|layer| layer.id).collect::<Vec<_>>()
        };
        let bottom = LayerId::Chain(ChainId::above(None, "cache0"));
        assert_eq!(ids()[0], LayerId::Diff(diff_ids[0]));
        std::fs::write(layer.join("cache-id"), "cache7").unwrap();
        assert_eq!(ids()[0], bottom, "another directory");
        std::fs::write(layer.join("cache-id"), "cache0").unwrap();
        std::fs::write(layer.join("diff"), DiffId([9; 32]).to_string()).unwrap();
        assert_eq!(ids()[0], bottom, "another diff ID than the chain ID's");
    }

    #[test]
    fn links_lead_to_layers_and_nowhere_else() {
        let check = |target: &str, expected: Option<&str>| {
            assert_eq!(link_target(Path::new(target)), expected.map(PathBuf::from), "{target}");
        };
        check("../abc/diff", Some("abc/diff"));
        check("../abc-init/diff", Some("abc-init/diff"));
        check("../../etc/diff", None);
        check("/etc/diff", None);
        check("../abc/diff/../../..", None);
        check("../abc", None);
        assert_eq!(split_lower("l/A:../x:/etc:l/..:l/B\n").collect::<Vec<_>>(), ["l/A", "l/B"]);
    }

    #[test]
    fn another_storage_driver_is_named_in_the_error() {
        let check =
            |rootfs: &str| stack(CONTAINER, Path::new(rootfs), None).unwrap_err().to_string();
        assert_eq!(
            check("/var/lib/docker/vfs/dir/abc"),
            "its rootfs /var/lib/docker/vfs/dir/abc is not one of Docker's overlay2: other storage \
             drivers keep no layers that can be compared"
        );
        assert!(check("/d/overlay2/m/merged").starts_with("Docker's /d/overlay2/m/lower cannot"));
    }

    #[test]
    fn an_images_short_name_has_long_ones() {
        let check = |name: &str, first: &str| assert_eq!(full_names(name)[0], first);
        check("nginx", "docker.io/library/nginx:latest");
        check("team/app:2", "docker.io/team/app:2");
        assert!(full_names("localhost:5000/x").contains(&"localhost:5000/x:latest".to_owned()));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_readers_panic(text: String) {
            let _ = (image_in_config(&text), full_names(&text), data_root(Path::new(&text)));
            let _ = (link_target(Path::new(&text)), split_lower(&text).count());
        }
    }
}
