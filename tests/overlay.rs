//! The merging of layers against the kernel's: random layers are made on disk and
//! mounted as an overlay, and the files shown there are compared with the image's
//! baseline. Needs root, for device nodes, `trusted.` attributes and the mount.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use driftd::baseline::urgency::hashing_pool;
use driftd::baseline::walk::walk;
use driftd::baseline::{
    Device, FileEntry, ImageBaseline, LayerBaseline, LayerEntry, Urgency, layer,
};
use driftd::model::{self, Blake3Hash, ChainId, DiffId, Format, LayerId, RootfsPath};
use proptest::prelude::*;
use rustix::fs::{
    CWD, FileType, Mode, XattrFlags, lgetxattr, major, makedev, minor, mknodat, setxattr,
};

/// Few names, so that layers overlap; `a-` and `a!` sort before `a/` byte by byte.
const NAMES: [&[u8]; 5] = [b"a", b"a-", b"b", b"a!", b"\xff\n"];

#[derive(Clone, Debug)]
enum What {
    Directory,
    Opaque,
    Whiteout,
    File {
        content: &'static str,
        capability: bool,
    },
    /// Another name of an earlier file of the layer, counted back from the last.
    Link(usize),
    Symlink(&'static str),
    Fifo,
    Device(u32),
}

/// What a layer puts at a path. `mode` and `owner` have no meaning for whiteouts,
/// links and symlinks.
#[derive(Clone, Debug)]
struct Put {
    path: Vec<&'static [u8]>,
    what: What,
    mode: u32,
    owner: u32,
}

fn any_put() -> impl Strategy<Value = Put> {
    let path = proptest::collection::vec(proptest::sample::select(&NAMES[..]), 1..4);
    let what = prop_oneof![
        3 => Just(What::Directory),
        2 => Just(What::Opaque),
        3 => Just(What::Whiteout),
        4 => (proptest::sample::select(&["", "x", "#!/bin/sh\n", "\x7fELF"][..]), any::<bool>())
            .prop_map(|(content, capability)| What::File { content, capability }),
        2 => (0..3_usize).prop_map(What::Link),
        2 => proptest::sample::select(&["a", "../b", "/"][..]).prop_map(What::Symlink),
        1 => Just(What::Fifo),
        1 => (1..4_u32).prop_map(What::Device),
    ];
    let mode = proptest::sample::select(&[0o755, 0o644, 0o4755, 0o1777, 0o000][..]);
    (path, what, mode, 0..3_u32).prop_map(|(path, what, mode, owner)| Put {
        path,
        what,
        mode,
        owner,
    })
}

/// A layer: its contents and its root directory.
#[derive(Clone, Debug)]
struct Layer {
    puts: Vec<Put>,
    root_mode: u32,
    root_opaque: bool,
}

fn any_layer() -> impl Strategy<Value = Layer> {
    let puts = proptest::collection::vec(any_put(), 0..10);
    let root_mode = proptest::sample::select(&[0o755, 0o700][..]);
    (puts, root_mode, proptest::bool::weighted(0.1))
        .prop_map(|(puts, root_mode, root_opaque)| Layer { puts, root_mode, root_opaque })
}

const ROOT: &str = "this test must run as root, on a filesystem that can be an overlay's layer";

/// `cap_net_raw` permitted and effective, as setcap(8) writes it.
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn make_opaque(path: &Path) {
    setxattr(path, "trusted.overlay.opaque", b"y", XattrFlags::empty()).expect(ROOT);
}

/// Makes a layer's directory; an entry whose path is taken is left out.
fn unpack(layer: &Layer, directory: &Path) {
    fs::create_dir(directory).unwrap();
    let mut files: Vec<PathBuf> = Vec::new();
    for Put { path, what, mode, owner } in &layer.puts {
        let mut place = directory.to_path_buf();
        let (name, above) = path.split_last().expect("a path has a name");
        for name in above {
            place.push(OsStr::from_bytes(name));
            // The directory, or another file, may exist already.
            let _ = fs::create_dir(&place);
        }
        if !fs::symlink_metadata(&place).is_ok_and(|metadata| metadata.is_dir()) {
            continue;
        }
        place.push(OsStr::from_bytes(name));
        let made = Mode::from_raw_mode(0o600);
        let is_new = fs::symlink_metadata(&place).is_err();
        match what {
            What::Directory | What::Opaque => {
                let _ = fs::create_dir(&place);
                if !fs::symlink_metadata(&place).is_ok_and(|metadata| metadata.is_dir()) {
                    continue;
                }
                if matches!(what, What::Opaque) {
                    make_opaque(&place);
                }
            }
            _ if !is_new => continue,
            What::Whiteout => {
                mknodat(CWD, &place, FileType::CharacterDevice, made, 0).expect(ROOT);
                continue;
            }
            What::File { content, .. } => {
                fs::write(&place, content).unwrap();
                files.push(place.clone());
            }
            What::Link(back) => {
                if let Some(file) = files.iter().rev().nth(*back) {
                    fs::hard_link(file, &place).unwrap();
                }
                continue;
            }
            What::Symlink(target) => {
                symlink(target, &place).unwrap();
                continue;
            }
            What::Fifo => mknodat(CWD, &place, FileType::Fifo, made, 0).unwrap(),
            What::Device(minor) => {
                mknodat(CWD, &place, FileType::CharacterDevice, made, makedev(1, *minor))
                    .expect(ROOT);
            }
        }
        chown(&place, Some(*owner), Some(*owner)).unwrap();
        set_mode(&place, *mode);
        if let What::File { capability: true, .. } = what {
            setxattr(&place, "security.capability", &NET_RAW, XattrFlags::empty()).expect(ROOT);
        }
    }
    set_mode(directory, layer.root_mode);
    if layer.root_opaque {
        make_opaque(directory);
    }
}

/// Unmounts when a case ends, also after a failure.
struct Mount(PathBuf);

impl Mount {
    /// The layers come bottom first, and must be at least two.
    fn overlay(layers: &[PathBuf], place: PathBuf) -> Mount {
        let lower: Vec<&str> =
            layers.iter().rev().map(|layer| layer.to_str().expect("it is UTF-8")).collect();
        let output = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o"])
            .arg(format!("ro,lowerdir={}", lower.join(":")))
            .arg(&place)
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{ROOT}: {stderr}");
        Mount(place)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// Collects the entries shown below a directory, in no order. For a directory that only
/// one layer has, overlayfs lists that layer's whiteouts too, but a lookup of them fails
/// with ENOENT.
fn visible(directory: &Path, path: &RootfsPath, found: &mut Vec<FileEntry>) {
    let place = directory.join(OsStr::from_bytes(path.relative()));
    let metadata = match fs::symlink_metadata(&place) {
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return,
        metadata => metadata.unwrap(),
    };
    let mut entry = FileEntry {
        uid: metadata.uid(),
        gid: metadata.gid(),
        ..FileEntry::directory(path.clone(), metadata.mode() & 0o7777)
    };
    let file_type = metadata.file_type();
    let mut capability = [0; 64];
    if let Ok(length) = lgetxattr(&place, "security.capability", &mut capability[..]) {
        entry.capability = Some(capability[..length].into());
    }
    if file_type.is_file() {
        let content = fs::read(&place).unwrap();
        entry.file_type = model::FileType::Regular;
        entry.size = content.len() as u64;
        entry.format = Format::sniff(&content[..content.len().min(Format::HEAD)]);
        entry.blake3 = Some(Blake3Hash(*blake3::hash(&content).as_bytes()));
    } else if file_type.is_symlink() {
        let target = fs::read_link(&place).unwrap();
        entry.file_type = model::FileType::Symlink;
        entry.size = metadata.size();
        entry.link_target = Some(target.as_os_str().as_bytes().into());
    } else if file_type.is_fifo() {
        entry.file_type = model::FileType::Fifo;
    } else if file_type.is_char_device() {
        entry.file_type = model::FileType::CharDevice;
        let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
        entry.device = Some(Device { major, minor });
    } else {
        assert!(file_type.is_dir(), "{path} is nothing that a layer holds");
        for name in fs::read_dir(&place).unwrap() {
            let path = path.join(name.unwrap().file_name().as_bytes()).unwrap();
            visible(directory, &path, found);
        }
    }
    found.push(entry);
}

/// The entries that a directory walk finds in a layer.
fn walked(pool: &rayon::ThreadPool, directory: &Path) -> Vec<LayerEntry> {
    walk(pool, directory, None, &AtomicBool::new(false)).unwrap().entries
}

/// The files that the kernel shows of the layers, and the files of their baseline.
fn both(layers: &[Layer]) -> (Vec<FileEntry>, Vec<FileEntry>) {
    let scratch = tempfile::tempdir().unwrap();
    let pool = hashing_pool(1, &Arc::new(Urgency::default())).unwrap();
    let mut directories = vec![scratch.path().join("empty")];
    fs::create_dir(&directories[0]).unwrap();
    set_mode(&directories[0], 0o755);
    for (number, layer) in layers.iter().enumerate() {
        let directory = scratch.path().join(number.to_string());
        unpack(layer, &directory);
        directories.push(directory);
    }
    let known = (0_u8..).zip(&directories).map(|(number, directory)| {
        let id = LayerId::Diff(DiffId([number; 32]));
        let bytes = layer::write(id, walked(&pool, directory), Vec::new()).unwrap();
        (id, Arc::new(LayerBaseline::from_bytes(bytes).unwrap()))
    });
    let image = ImageBaseline::new(ChainId([0; 32]), known.collect());

    let place = scratch.path().join("merged");
    fs::create_dir(&place).unwrap();
    let mount = Mount::overlay(&directories, place);
    let mut shown: Vec<FileEntry> = Vec::new();
    visible(&mount.0, &RootfsPath::root(), &mut shown);
    shown.sort_by(|a, b| layer::compare_paths(a.path.as_bytes(), b.path.as_bytes()));
    let expected: Vec<FileEntry> = image.files().map(|known| known.entry).collect();
    for file in &shown {
        assert_eq!(image.get(&file.path).map(|known| known.entry).as_ref(), Some(file));
    }
    (shown, expected)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        max_shrink_iters: 50,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_baseline_has_the_files_that_the_kernel_shows(layers in proptest::collection::vec(any_layer(), 1..5)) {
        let (shown, expected) = both(&layers);
        prop_assert_eq!(expected, shown);
    }
}
