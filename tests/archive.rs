//! Layers and images read from archives, compared with the results of other programs
//! on the same bytes: GNU tar's extraction, containerd's unpacking, skopeo's conversions.
//! Needs root (device nodes, owners, capabilities), tar, containerd and skopeo.

use std::ffi::OsStr;
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use driftd::baseline::layer::compare_paths;
use driftd::baseline::stream::{self, Limits};
use driftd::baseline::urgency::{Urgency, hashing_pool};
use driftd::baseline::walk::walk;
use driftd::baseline::{ImageBaseline, LayerBaseline, LayerEntry, archive, layer};
use driftd::model::{ChainId, DiffId, LayerId};
use proptest::prelude::*;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, makedev, mknodat};
use sha2::{Digest as _, Sha256};

fn sorted(mut entries: Vec<LayerEntry>) -> Vec<LayerEntry> {
    entries.sort_by(|a, b| compare_paths(a.path().as_bytes(), b.path().as_bytes()));
    entries
}

fn walked(directory: &Path) -> Vec<LayerEntry> {
    let pool = hashing_pool(2, &Arc::new(Urgency::default())).unwrap();
    sorted(walk(&pool, directory, None, &AtomicBool::new(false)).unwrap().entries)
}

fn streamed(blob: &[u8], below: Option<&ImageBaseline>) -> Result<Vec<LayerEntry>, stream::Error> {
    let limits = Limits { bytes: 1 << 30, entries: 100_000 };
    stream::read(blob, &limits, None, &AtomicBool::new(false))?.settle(below).map(sorted)
}

#[track_caller]
fn assert_same(streamed: &[LayerEntry], walked: &[LayerEntry], of: &str) {
    for (ours, theirs) in streamed.iter().zip(walked) {
        assert_eq!(ours, theirs, "{of}");
    }
    assert_eq!(streamed.len(), walked.len(), "{of}: {streamed:#?}\n{walked:#?}");
}

// --- GNU tar ---

#[derive(Clone, Debug)]
enum Node {
    File { data: Vec<(u32, u8)>, capability: bool },
    Directory,
    Symlink(Vec<u8>),
    HardLink(prop::sample::Index),
    Fifo,
    Device { block: bool, major: u32, minor: u32 },
}

#[derive(Clone, Debug)]
struct Planted {
    directory: prop::sample::Index,
    name: Vec<u8>,
    mode: u32,
    uid: u32,
    gid: u32,
    node: Node,
}

fn any_planted() -> impl Strategy<Value = Planted> {
    let name = prop_oneof![
        4 => "[a-z]{1,8}".prop_map(String::into_bytes),
        1 => "[a-z ]{90,250}".prop_map(String::into_bytes),
        1 => prop::collection::vec(1..=255_u8, 1..20)
            .prop_map(|name| name.into_iter().map(|byte| if byte == b'/' { b'_' } else { byte }).collect()),
    ]
    // A whiteout's name has a meaning to driftd that it lacks to tar.
    .prop_filter("a name that is no whiteout", |name: &Vec<u8>| {
        !name.starts_with(b".wh.") && name != b"." && name != b".."
    });
    let node = prop_oneof![
        5 => (prop::collection::vec((0..70_000_u32, any::<u8>()), 0..5), any::<bool>())
            .prop_map(|(data, capability)| Node::File { data, capability }),
        3 => Just(Node::Directory),
        1 => prop::collection::vec(1..=255_u8, 1..150).prop_map(Node::Symlink),
        2 => any::<prop::sample::Index>().prop_map(Node::HardLink),
        1 => Just(Node::Fifo),
        1 => (any::<bool>(), 1..4096_u32, 0..1_u32 << 18)
            .prop_map(|(block, major, minor)| Node::Device { block, major, minor }),
    ];
    // From 2^21 on, octal digits do not suffice.
    let id = || prop_oneof![Just(0), Just(1000), Just(3_000_000_000_u32)];
    (any::<prop::sample::Index>(), name, 0..0o10000_u32, id(), id(), node).prop_map(
        |(directory, name, mode, uid, gid, node)| Planted { directory, name, mode, uid, gid, node },
    )
}

fn plant(tree: &Path, planted: &[Planted]) {
    let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let mut directories = vec![tree.to_path_buf()];
    let mut files: Vec<PathBuf> = Vec::new();
    for Planted { directory, name, mode, uid, gid, node } in planted {
        let path = directory.get(&directories).join(OsStr::from_bytes(name));
        if path.symlink_metadata().is_ok() || path.as_os_str().len() > 3000 {
            continue;
        }
        match node {
            Node::File { data, .. } => {
                // Runs of one byte; tar treats runs of zeros as holes.
                let content: Vec<u8> = data
                    .iter()
                    .flat_map(|(length, byte)| {
                        std::iter::repeat_n(if byte % 2 == 0 { 0 } else { *byte }, *length as usize)
                    })
                    .collect();
                fs::write(&path, content).unwrap();
            }
            Node::Directory => fs::create_dir(&path).unwrap(),
            Node::Symlink(target) => symlink(OsStr::from_bytes(target), &path).unwrap(),
            Node::HardLink(to) => {
                if files.is_empty() {
                    continue;
                }
                fs::hard_link(to.get(&files), &path).unwrap();
                continue;
            }
            Node::Fifo => mknodat(CWD, &path, FileType::Fifo, Mode::empty(), 0).unwrap(),
            Node::Device { block, major, minor } => {
                let kind = if *block { FileType::BlockDevice } else { FileType::CharacterDevice };
                mknodat(CWD, &path, kind, Mode::empty(), makedev(*major, *minor)).unwrap();
            }
        }
        lchown(&path, Some(*uid), Some(*gid)).unwrap();
        if !matches!(node, Node::Symlink(_)) {
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).unwrap();
        }
        match node {
            Node::Directory => directories.push(path),
            Node::File { .. } => files.push(path),
            Node::Symlink(_) | Node::HardLink(_) | Node::Fifo | Node::Device { .. } => (),
        }
    }
    // GNU tar writes no attributes for a hard link. A link without attributes removes
    // them from the file when containerd unpacks it.
    for Planted { directory, name, node, .. } in planted {
        let path = directory.get(&directories).join(OsStr::from_bytes(name));
        if matches!(node, Node::File { capability: true, .. })
            && path.symlink_metadata().is_ok_and(|file| file.is_file() && file.nlink() == 1)
        {
            lsetxattr(&path, "security.capability", capability, XattrFlags::empty()).unwrap();
        }
    }
}

fn gnu_tar(arguments: &[&str], directory: &Path, archive: &Path) {
    let output = Command::new("tar")
        .args(arguments)
        .arg("--file")
        .arg(archive)
        .arg("--directory")
        .arg(directory)
        .args(if arguments[0] == "--create" { &["."][..] } else { &[] })
        .env("LC_ALL", "C")
        .output()
        .expect("tar cannot be run");
    assert!(
        output.status.success(),
        "tar {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

const PAX: [&str; 4] =
    ["--format=pax", "--xattrs", "--xattrs-include=security.capability", "--numeric-owner"];

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_archive_of_gnu_tar_is_read_as_gnu_tar_extracts_it(
        planted in prop::collection::vec(any_planted(), 0..30),
        how in prop::sample::select(vec![
            vec!["--format=gnu"],
            vec!["--format=gnu", "--sparse", "--hole-detection=raw"],
            PAX.to_vec(),
            [&PAX[..], &["--sparse", "--hole-detection=raw", "--sparse-version=0.0"]].concat(),
            [&PAX[..], &["--sparse", "--hole-detection=raw", "--sparse-version=0.1"]].concat(),
            [&PAX[..], &["--sparse", "--hole-detection=raw", "--sparse-version=1.0"]].concat(),
        ]),
    ) {
        let scratch = tempfile::tempdir().unwrap();
        let (tree, extracted) = (scratch.path().join("tree"), scratch.path().join("extracted"));
        let file = scratch.path().join("layer.tar");
        for directory in [&tree, &extracted] {
            fs::create_dir(directory).unwrap();
        }
        plant(&tree, &planted);
        gnu_tar(&[&["--create"][..], &how].concat(), &tree, &file);
        gnu_tar(&["--extract", "--preserve-permissions", "--same-owner", "--xattrs", "--xattrs-include=*"], &extracted, &file);
        let blob = fs::read(&file).unwrap();
        assert_same(&streamed(&blob, None).unwrap(), &walked(&extracted), &format!("{how:?}"));
    }
}

#[test]
fn a_layer_of_ustar_and_v7_headers_is_read_as_gnu_tar_extracts_it() {
    for format in ["--format=ustar", "--format=v7"] {
        let scratch = tempfile::tempdir().unwrap();
        let (tree, extracted) = (scratch.path().join("tree"), scratch.path().join("extracted"));
        let deep = tree.join("usr/share/doc");
        fs::create_dir_all(&deep).unwrap();
        fs::create_dir(&extracted).unwrap();
        fs::write(deep.join("a"), "content").unwrap();
        fs::hard_link(deep.join("a"), deep.join("b")).unwrap();
        symlink("a", deep.join("c")).unwrap();
        chown(deep.join("a"), Some(1000), Some(1000)).unwrap();
        if format == "--format=ustar" {
            // Too long for the name alone.
            let long = tree.join("d".repeat(90));
            fs::create_dir(&long).unwrap();
            fs::write(long.join("e".repeat(90)), "#!/bin/sh").unwrap();
        }
        let file = scratch.path().join("layer.tar");
        gnu_tar(&["--create", format], &tree, &file);
        gnu_tar(&["--extract", "--preserve-permissions", "--same-owner"], &extracted, &file);
        let blob = fs::read(&file).unwrap();
        assert_same(&streamed(&blob, None).unwrap(), &walked(&extracted), format);
    }
}

// --- containerd ---

/// A containerd for one test.
struct Containerd {
    directory: tempfile::TempDir,
    process: Child,
}

impl Containerd {
    fn start() -> Containerd {
        assert!(nix::unistd::geteuid().is_root(), "containerd needs root");
        let directory = tempfile::Builder::new().prefix("driftd-archive-").tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).display().to_string();
        let settings = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            at("root"),
            at("state"),
            at("containerd.sock"),
            at("opt")
        );
        fs::write(directory.path().join("config.toml"), settings).unwrap();
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let process = Command::new("containerd")
            .arg("-c")
            .arg(directory.path().join("config.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("containerd cannot be started (apt-get install containerd)");
        let containerd = Containerd { directory, process };
        let deadline = Instant::now() + Duration::from_secs(60);
        while let Err(reason) = containerd.ctr(&["version"]) {
            assert!(Instant::now() < deadline, "containerd is not ready: {reason}");
            std::thread::sleep(Duration::from_millis(50));
        }
        containerd
    }

    fn ctr(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new("ctr")
            .arg("--address")
            .arg(self.directory.path().join("containerd.sock"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .expect("ctr cannot be run (apt-get install containerd)");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// The directories of these layers, bottom first, or the reason why containerd does
    /// not unpack them.
    fn unpack(&self, name: &str, layers: &[Vec<u8>]) -> Result<Vec<PathBuf>, String> {
        let file = self.directory.path().join("image.tar");
        fs::write(&file, image_archive(name, layers)).unwrap();
        self.ctr(&["images", "import", file.to_str().unwrap()])?;
        let chain =
            ChainId::of_layers(&layers.iter().map(|layer| diff_id(layer)).collect::<Vec<_>>());
        let top = chain.last().unwrap().to_string();
        let key = format!("view-of-{name}");
        // One command returns the mounts too, because containerd may remove the view at once.
        let mounts = self.ctr(&["snapshots", "view", "--mounts", &key, &top])?;
        let mounts: serde_json::Value = serde_json::from_str(&mounts).unwrap();
        let options = mounts[0]["Options"].as_array().unwrap();
        let lower = options.iter().find_map(|option| option.as_str()?.strip_prefix("lowerdir="));
        let mut directories: Vec<PathBuf> = match lower {
            Some(directories) => directories.split(':').map(PathBuf::from).collect(),
            // A single layer is a bind mount and no overlay.
            None => vec![PathBuf::from(mounts[0]["Source"].as_str().unwrap())],
        };
        directories.reverse();
        assert_eq!(directories.len(), layers.len(), "{mounts}");
        Ok(directories)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn diff_id(layer: &[u8]) -> DiffId {
    DiffId(Sha256::digest(layer).into())
}

fn descriptor(media_type: &str, blob: &[u8]) -> serde_json::Value {
    serde_json::json!({"mediaType": media_type, "digest": diff_id(blob), "size": blob.len()})
}

/// An OCI layout as an archive.
fn image_archive(name: &str, layers: &[Vec<u8>]) -> Vec<u8> {
    const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let diff_ids: Vec<DiffId> = layers.iter().map(|layer| diff_id(layer)).collect();
    let config = serde_json::to_vec(&serde_json::json!({
        "architecture": architecture, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }));
    let config = config.unwrap();
    let blobs: Vec<_> = layers
        .iter()
        .map(|layer| descriptor("application/vnd.oci.image.layer.v1.tar", layer))
        .collect();
    let manifest = serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST, "layers": blobs,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
    }));
    let manifest = manifest.unwrap();
    let mut top = descriptor(MANIFEST, &manifest);
    top["annotations"] = serde_json::json!({
        "io.containerd.image.name": format!("docker.io/test/{name}:1"),
        "org.opencontainers.image.ref.name": "1",
    });
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [top]});
    let mut archive = tar::Builder::new(Vec::new());
    let mut put = |name: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, name, content).unwrap();
    };
    put("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    put("index.json", &serde_json::to_vec(&index).unwrap());
    let mut written = Vec::new();
    for blob in layers.iter().chain([&config, &manifest]) {
        let name = format!("blobs/sha256/{}", diff_id(blob).hex());
        if !written.contains(&name) {
            put(&name, blob);
            written.push(name);
        }
    }
    archive.into_inner().unwrap()
}

/// Archives line by line, in the order of the lines:
///
/// ```text
/// 0 a/b 4755 content        a file           3 null 666 1,3     a device
/// 2 link 777 target         a symlink        6 pipe 600         a FIFO
/// 1 link 644 target         a hard link      5 dir 2755         a directory
/// g name                    a global header  x key=value        for the next entry
/// ```
fn archive_of(lines: &str) -> Vec<u8> {
    let mut archive: Vec<u8> = Vec::new();
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let mut words = line.split(' ');
        let flag = words.next().unwrap().as_bytes()[0];
        let name = words.next().unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::new(flag));
        header.set_uid(0);
        header.set_gid(0);
        let mut content = Vec::new();
        if flag == b'x' || flag == b'g' {
            let record = if flag == b'x' { name } else { "comment=none" };
            let length = (3..6)
                .map(|digits| record.len() + digits)
                .find(|length| record.len() + 2 + length.to_string().len() == *length);
            content = format!("{} {record}\n", length.unwrap()).into_bytes();
        }
        if flag != b'x' {
            // The `tar` crate refuses to write most of these names.
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        }
        let mode = words.next().unwrap_or("644");
        header.set_mode(u32::from_str_radix(mode, 8).unwrap());
        match (flag, words.next()) {
            (b'0', Some(text)) => content = text.as_bytes().to_vec(),
            (b'1' | b'2', Some(target)) => {
                header.as_old_mut().linkname[..target.len()].copy_from_slice(target.as_bytes());
            }
            (b'3' | b'4', Some(numbers)) => {
                let (major, minor) = numbers.split_once(',').unwrap();
                header.set_device_major(major.parse().unwrap()).unwrap();
                header.set_device_minor(minor.parse().unwrap()).unwrap();
            }
            _ => (),
        }
        if let Some(owner) = words.next() {
            header.set_gid(owner.parse().unwrap());
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        archive.extend(header.as_bytes());
        archive.extend(&content);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

const BASE: &str = "
    5 usr/ 755
    5 usr/bin/ 2750 - 100
    0 usr/bin/sh 755 #!shell
    5 var/ 711
    5 var/lib/ 1777
    0 var/lib/old 644 old
    5 etc/ 755
    0 etc/gone 644 gone
    2 bin 777 usr/bin
    0 data 640 data
";

/// Odd layers above [`BASE`].
const ODD: &[&str] = &[
    // Ordinary layers first: they show that the comparison works.
    "5 etc/ 755\n0 etc/new 600 new\n0 etc/.wh.gone 0",
    "0 var/lib/app/file 644 implied\n0 bin/tool 755 own-directory",
    "5 ./ 700\n0 ./usr/bin/x 4755 setuid",
    "5 var/ 755\n5 var/lib/ 755\n0 var/lib/.wh..wh..opq 0\n0 var/lib/new 644 new",
    "0 var/lib/new 644 new\n0 var/lib/.wh..wh..opq 0",
    "0 .wh..wh..opq 0\n0 a 644 only",
    // The last entry of a path wins.
    "0 a 644 one\n0 a 755 two",
    "0 a/b 644 one\n0 a 644 two",
    "0 a 644 one\n5 a/ 700\n0 a/b 644 two",
    "5 a/ 755\n0 a/b 644 one\n5 a/ 700",
    "5 a/ 755\n0 a/.wh..wh..opq 0\n0 a 644 file\n5 a/ 700",
    "0 .wh.data 0\n0 data 644 back",
    "0 .wh.etc 0\n5 etc/ 700",
    "0 a 644 one\n0 a/b 644 below-a-file",
    // Names.
    "0 ../../up 644 one\n0 /absolute 644 two\n0 a/../b//./c 644 three",
    "0 .. 644 root\n0 . 644 root",
    "5 .wh..wh.plnk/ 755\n0 .wh..wh.aufs 644",
    "0 .wh.d/a 644 one",
    "0 a/.wh. 644",
    "0 a/.wh.. 644",
    "0 .wh... 644",
    // Links.
    "0 a 644 one\n1 b 644 a\n0 a 600 two",
    "0 a 644 one\n1 b 4711 a 7",
    "x SCHILY.xattr.security.capability=none\n0 a 644 one",
    "2 l 777 nowhere\n1 m 644 l",
    "5 d/ 755\n1 m 644 d",
    "1 m 644 missing",
    "0 a 644 one\n1 a 644 a",
    "2 l 777 usr\n0 l/x 644 one",
    "2 l 777 /etc\n0 l/x 644 one\n1 y 644 l/x",
    "2 l 777 ../../../x\n0 l/y/z 644 one",
    "5 d/ 755\n2 d/l 777 ../e\n0 d/l/x 644 one",
    "2 a 777 b\n2 b 777 a\n0 a/x 644 one",
    "2 a 777 x/y\n2 x 777 m/n\n5 m/n/q 755\n0 a/f 644 one",
    "5 m/n 755\n2 a 777 x\n2 x 777 m/n\n2 m/n/b 777 ../q\n0 a/b/f 644 one",
    "2 a 777 b\n0 a 644 file",
    "0 d/e/f 644 one\n1 g 644 ./d/../d/e/f",
    // Devices and pipes.
    "3 null 666 1,3\n4 disk 660 8,17\n6 pipe 600",
    "3 data 666 0,0",
    "3 a 666 4096,0\n3 b 666 4097,1",
    "4 a 666 0,0",
    // Directories without an entry.
    "5 s/ 2775 - 100\n0 s/t/u/a 644 one",
    "0 usr/bin/t/a 644 one",
    "0 usr/bin/a 644 one\n5 usr/bin/ 755",
    "0 data/x 644 one",
    // Headers.
    "g a\n0 b 644 one",
    "0 a 644 one\n0 c 644 one\ng a\n0 b 644 one",
    "g .wh.data\n0 b 644 one",
    "x path=long\ng none\n0 b 644 one",
    "x path=long\nx uid=12\n0 b 644 one",
    "x path=\n0 b 644 one",
    "x uid=3000000000\n0 b 644 one",
    "x uid=4294967295\n0 b 644 one",
    "x uid=x\n0 b 644 one",
    "x mtime=1.5\n0 b 644 one",
    "x SCHILY.xattr.trusted.overlay.opaque=y\n5 d/ 755",
    "7 a 644 contiguous",
];

#[test]
fn odd_layers_are_read_as_containerd_unpacks_them() {
    let containerd = Containerd::start();
    let base = archive_of(BASE);
    let [base_directory] = &containerd.unpack("base", std::slice::from_ref(&base)).unwrap()[..]
    else {
        panic!("one layer has one directory")
    };
    let base_entries = streamed(&base, None).unwrap();
    assert_same(&base_entries, &walked(base_directory), "the base");
    let id = LayerId::Diff(diff_id(&base));
    let bytes = layer::write(id, base_entries, Vec::new()).unwrap();
    let below = LayerBaseline::from_bytes(bytes).unwrap();
    let below = ImageBaseline::new(ChainId(diff_id(&base).0), vec![(id, Arc::new(below))]);

    let mut wrong = Vec::new();
    for (number, lines) in ODD.iter().enumerate() {
        let odd = archive_of(lines);
        let ours = streamed(&odd, Some(&below));
        let theirs = containerd.unpack(&format!("odd{number}"), &[base.clone(), odd]);
        match (ours, theirs) {
            (Ok(ours), Ok(directories)) => {
                let theirs = walked(&directories[1]);
                if ours != theirs {
                    wrong.push(format!("{lines}\n  ours: {ours:?}\n  containerd's: {theirs:?}"));
                }
            }
            (Err(_), Err(_)) => (),
            (ours, theirs) => {
                wrong.push(format!("{lines}\n  ours: {ours:?}\n  containerd's: {theirs:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), ODD.len(), wrong.join("\n\n"));
}

// --- skopeo ---

#[test]
fn an_image_converted_by_skopeo_is_the_same_image() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let layers = [archive_of(BASE), archive_of("0 a 644 one"), archive_of("0 b 644 two")];
    fs::write(at("layout.tar"), image_archive("converted", &layers)).unwrap();
    let copy = |from: &str, to: &str| {
        let output = Command::new("skopeo")
            .args(["copy", "--insecure-policy", from, to])
            .current_dir(scratch.path())
            .output()
            .expect("skopeo cannot be run (apt-get install skopeo)");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "skopeo copy {from} {to}: {errors}");
    };
    copy("oci-archive:layout.tar", "oci:layout:1");
    copy("oci-archive:layout.tar", "docker-archive:docker.tar:test/converted:1");
    copy("oci-archive:layout.tar", "oci-archive:copied.tar:1");

    let expected: Vec<DiffId> = layers.iter().map(|layer| diff_id(layer)).collect();
    for (name, names) in [
        ("layout.tar", "docker.io/test/converted:1"),
        ("layout", "1"),
        ("docker.tar", "docker.io/test/converted:1"),
        ("copied.tar", "1"),
    ] {
        let archive = archive::open(&at(name)).unwrap();
        let [image] = archive.images() else { panic!("{name}: {:?}", archive.images()) };
        assert_eq!(image.names, [names], "{name}");
        assert_eq!(image.chain_id(), ChainId::of_layers(&expected).pop(), "{name}");
        for ((found, blob), expected) in image.layers.iter().zip(&expected) {
            assert_eq!(found, expected, "{name}");
            let limits = Limits { bytes: 1 << 20, entries: 100 };
            let reader = archive.layer(blob).unwrap();
            let stream = stream::read(reader, &limits, None, &AtomicBool::new(false)).unwrap();
            assert_eq!(stream.diff_id, *expected, "{name}");
            if let Some(digest) = blob.digest {
                assert_eq!(stream.blob_sha256, digest.0, "{name}");
            }
        }
        let mut whole = Vec::new();
        archive.layer(&image.layers[0].1).unwrap().read_to_end(&mut whole).unwrap();
        assert!(!whole.is_empty());
    }
}
