//! Where baselines come from: the directories that a snapshotter has unpacked,
//! the blobs of the content store, archives. Whatever the source and however a
//! layer is packed, the baseline is the same, and it equals the image.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use libtest_mimic::Trial;
use serde_json::Value;

use crate::image::{Digests, Image, Layer, Packing};
use crate::node::{Node, Setup, known_as, talk, wait_for};
use crate::programs::{find, machine_files};
use crate::{registry, test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("any_packing_from_any_source_is_one_baseline", "", every_packing),
        test_alone("a_real_image_is_one_baseline_from_any_source", "", real_image),
        test("an_image_pulled_from_a_registry_is_proved", pulled),
        test("an_image_that_was_not_unpacked_is_recorded_from_its_blobs", not_unpacked),
        test("an_index_stands_for_the_image_of_this_machine", index),
    ]
}

// ---- images with everything that an archive can have

/// A name of `length` bytes.
fn long(letter: &str, length: usize) -> String {
    letter.repeat(length)
}

/// A path of almost 4,096 bytes, which is the limit, through directories without an entry of
/// their own.
fn deep() -> String {
    format!("/deep{}/file", format!("/{}", long("d", 99)).repeat(37))
}

/// A layer whose content, and so its digest, `mark` makes its own.
fn odd_bottom(mark: &str, scratch: &Path) -> anyhow::Result<Layer> {
    let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let layer = Layer::new()
        .directory("/etc", 0o755)
        .file("/packing", 0o644, mark.as_bytes())
        .file("/etc/empty", 0o600, b"")
        .file("/etc/twice", 0o644, b"the first one")
        .file("/etc/twice", 0o640, b"the one that counts")
        .directory("/usr", 0o755)
        .directory("/usr/bin", 0o755)
        .file("/usr/bin/tool", 0o4755, b"\x7fELF and so on")
        .hard_link("/usr/bin/tool-by-another-name", "/usr/bin/tool")
        .hard_link("/etc/tool-elsewhere", "/usr/bin/tool")
        .symlink("/usr/bin/link", "../../etc/twice")
        .symlink("/usr/bin/far", &long("f/", 150))
        .directory("/dev", 0o755)
        .character_device("/dev/null", 1, 3)
        .fifo("/dev/pipe", 0o622)
        // Longer than a header has room for.
        .directory(format!("/{}", long("n", 200)), 0o755)
        .file(format!("/{}/{}", long("n", 200), long("m", 200)), 0o644, b"GNU long name")
        .hard_link(
            format!("/{}/{}", long("n", 200), long("l", 200)),
            format!("/{}/{}", long("n", 200), long("m", 200)),
        )
        .pax_file(&format!("/pax/{}", long("p", 250)), 0o644, b"PAX long name", &[])
        .pax_file(
            "/pax/owned",
            0o644,
            b"more than seven octal digits",
            &[("uid", b"3000000"), ("gid", b"3000001"), ("mtime", b"1500000000.25")],
        )
        .pax_file(
            "/pax/ping",
            0o755,
            b"\x7fELF with a capability",
            &[("SCHILY.xattr.security.capability", &capability)],
        )
        .pax_file("/pax/noted", 0o644, b"a note", &[("SCHILY.xattr.user.note", b"hello")])
        // Names that are bytes.
        .directory("/odd", 0o755)
        .file(b"/odd/\xff\xfe not UTF-8", 0o644, b"bytes")
        .file("/odd/new\nline", 0o644, b"line")
        .file("/odd/back\\slash", 0o644, b"slash")
        .file("/odd/\x1b[31mred", 0o644, b"red")
        .file("/odd/ leading and trailing ", 0o644, b"spaces")
        // Directories without an entry.
        .file("/implied/a/b/c/file", 0o644, b"implied")
        .file(deep(), 0o644, b"deep")
        .directory("/var", 0o755)
        .directory("/var/cache", 0o750)
        .directory("/var/spool", 0o1777)
        // For the layer above.
        .directory("/opt", 0o755)
        .directory("/opt/gone", 0o755)
        .file("/opt/gone/before", 0o644, b"hidden")
        .file("/opt/gone/after", 0o644, b"hidden")
        .file("/opt/gone/again", 0o644, b"replaced")
        .file("/opt/gone/stays", 0o644, b"stays")
        .directory("/opt/marked-before", 0o755)
        .file("/opt/marked-before/old", 0o644, b"hidden")
        .directory("/opt/marked-after", 0o755)
        .file("/opt/marked-after/old", 0o644, b"hidden")
        .directory("/opt/becomes-a-file", 0o755)
        .file("/opt/becomes-a-file/old", 0o644, b"hidden")
        .file("/opt/becomes-a-directory", 0o644, b"hidden");
    let sparse = sparse_files(scratch)?;
    layer
        .tree_packed_by_tar(&sparse.join("pax"), &["--sparse", "--format=posix"])?
        .tree_packed_by_tar(
            &sparse.join("pax-0.1"),
            &["--sparse", "--format=posix", "--sparse-version=0.1"],
        )
}

fn odd_top(mark: &str) -> Layer {
    Layer::new()
        .file("/packing", 0o644, format!("{mark}, again").as_bytes())
        .whiteout("/opt/gone/before")
        .file("/opt/gone/new", 0o644, b"new")
        .whiteout("/opt/gone/after")
        .whiteout("/opt/gone/never-was")
        .whiteout("/opt/gone/again")
        .file("/opt/gone/again", 0o644, b"the replacement")
        .directory("/opt/marked-before", 0o755)
        .opaque("/opt/marked-before")
        .file("/opt/marked-before/new", 0o644, b"new")
        .directory("/opt/marked-after", 0o700)
        .file("/opt/marked-after/new", 0o644, b"new")
        .opaque("/opt/marked-after")
        .file("/opt/becomes-a-file", 0o644, b"a file")
        .directory("/opt/becomes-a-directory", 0o755)
        .file("/opt/becomes-a-directory/new", 0o644, b"new")
        // In directories that only the layer below has, and in new ones.
        .file("/var/cache/file", 0o644, b"below a directory with a mode of its own")
        .file("/var/spool/new/file", 0o644, b"below a new directory")
        .file("/etc/twice", 0o644, b"once more")
}

/// Files with holes: at the beginning, in the middle, at the end, and of holes only. As PAX,
/// because containerd refuses GNU's own format for them.
fn sparse_files(scratch: &Path) -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::FileExt as _;
    let directory = scratch.join("sparse");
    for format in ["pax", "pax-0.1"] {
        let below = directory.join(format).join("sparse").join(format);
        fs::create_dir_all(&below)?;
        let make = |name: &str, size: u64, data: &[u64]| -> anyhow::Result<()> {
            let file = fs::File::create(below.join(name))?;
            file.set_len(size)?;
            for offset in data {
                file.write_all_at(format!("data at {offset}").as_bytes(), *offset)?;
            }
            Ok(())
        };
        make("begins-with-a-hole", 300_000, &[200_000])?;
        make("ends-with-a-hole", 300_000, &[0, 100_000])?;
        // More pieces than a header has room for.
        let pieces: Vec<u64> = (0..20).map(|piece| piece * 65_536).collect();
        make("many-holes", 2_000_000, &pieces)?;
        make("nothing-but-a-hole", 1_000_000, &[])?;
    }
    Ok(directory)
}

// ---- comparing

/// An image's file, its name and its digests.
struct Archive {
    file: PathBuf,
    name: String,
    digests: Digests,
}

fn every_packing(node: &Node) -> anyhow::Result<()> {
    let archives: Vec<Archive> = Packing::ALL
        .iter()
        .map(|packing| {
            let name = format!("registry.test/odd-{}:1", packing.name());
            let file = node.path(&format!("{}.tar", packing.name()));
            let digests = Image::new(&name)
                .layer(odd_bottom(packing.name(), node.directory.path())?, *packing)
                .layer(odd_top(packing.name()), *packing)
                .write(&file)?;
            Ok(Archive { file, name, digests })
        })
        .collect::<anyhow::Result<_>>()?;
    let trees = same_from_every_source(node, &archives)?;

    // The trees are right, and not all wrong in the same way.
    for (archive, files) in archives.iter().zip(trees) {
        let has = |path: &str| files.contains_key(path.as_bytes());
        let name = &archive.name;
        for hidden in [
            "/opt/gone/before",
            "/opt/gone/after",
            "/opt/marked-before/old",
            "/opt/marked-after/old",
            "/opt/becomes-a-file/old",
        ] {
            ensure!(!has(hidden), "{name} still has {hidden}");
        }
        let deep = deep();
        for there in [
            "/opt/gone/stays",
            "/opt/gone/again",
            "/opt/marked-before/new",
            "/opt/marked-after/new",
            "/opt/becomes-a-file",
            "/opt/becomes-a-directory/new",
            "/sparse/pax/many-holes",
            "/sparse/pax-0.1/many-holes",
            "/odd/new\nline",
            deep.as_str(),
        ] {
            ensure!(has(there), "{name} lacks {there:?}");
        }
        ensure!(
            files.contains_key(&b"/odd/\xff\xfe not UTF-8"[..]),
            "{name} lacks a name of bytes"
        );
        let content_of = |path: &str| files.get(path.as_bytes()).map(String::as_str);
        let hash_of = |content: &[u8]| blake3::hash(content).to_hex().to_string();
        assert_eq!(content_of("/etc/twice"), Some(&*hash_of(b"once more")), "{name}");
        assert_eq!(content_of("/opt/gone/again"), Some(&*hash_of(b"the replacement")), "{name}");
    }
    Ok(())
}

/// Programs and libraries of this machine's own distribution; with
/// `DRIFTD_REAL_IMAGE`, the root filesystem in that tar file as well.
fn real_image(node: &Node) -> anyhow::Result<()> {
    let files = machine_files()?;
    let top = Layer::new().directory("/srv", 0o755).file("/srv/app", 0o755, b"#!/bin/sh\n");
    let mut layers = vec![("machine", files, top)];
    if let Some(root) = std::env::var_os("DRIFTD_REAL_IMAGE") {
        let archive = fs::read(&root).with_context(|| format!("cannot read {}", root.display()))?;
        let top = Layer::new().whiteout("/etc/passwd").file("/etc/motd", 0o644, b"hello\n");
        layers.push(("distribution", Layer::of_archive(&archive)?, top));
    }
    let archives: Vec<Archive> = layers
        .into_iter()
        .map(|(name, files, top)| {
            let file = node.path(&format!("{name}.tar"));
            let name = format!("registry.test/{name}:1");
            let digests = Image::new(&name)
                .layer(files, Packing::Gzip)
                .layer(top, Packing::Zstd)
                .write(&file)?;
            Ok(Archive { file, name, digests })
        })
        .collect::<anyhow::Result<_>>()?;
    let trees = same_from_every_source(node, &archives)?;
    for (archive, files) in archives.iter().zip(trees) {
        ensure!(files.len() > 500, "{} has only {} files", archive.name, files.len());
    }
    Ok(())
}

/// Records the images from all sources, compares every byte of the baselines, and
/// compares them with what `b3sum` reads in the mounted images. Returns the files of each
/// image with their hashes.
fn same_from_every_source(
    from_directories: &Node,
    archives: &[Archive],
) -> anyhow::Result<Vec<BTreeMap<Vec<u8>, String>>> {
    for archive in archives {
        from_directories.import(&archive.file)?;
    }

    // A snapshotter that keeps no directories of single layers.
    let from_blobs = Node::with_containerd(Setup::default())?;
    // containerd 2 unpacks by itself only for the snapshotters of its settings.
    let knows_local = from_blobs.ctr(&["images", "import", "--help"])?.contains("--local");
    let by_ctr: &[&str] = if knows_local { &["--local"] } else { &[] };
    for archive in archives {
        let file = archive.file.to_string_lossy();
        let import = [&["images", "import", "--snapshotter", "native"], by_ctr, &[&*file]];
        from_blobs.ctr(&import.concat())?;
    }
    from_blobs.start_driftd()?;

    let mut trees = Vec::new();
    for archive in archives {
        let name = &archive.name;
        for node in [from_directories, &*from_blobs] {
            node.wait_until_known_as(name, "verified").with_context(|| node.logs())?;
        }
        for diff_id in &archive.digests.diff_ids {
            ensure!(
                layer_in(&from_directories.store(), diff_id)?
                    == layer_in(&from_blobs.store(), diff_id)?,
                "directory and blob differ about layer {diff_id} of {name}\n{}",
                first_difference(from_directories, &from_blobs, name)?
            );
        }
        let exported = |node: &Node| -> anyhow::Result<Vec<u8>> {
            let output = node.driftd(&["baseline", "export", name])?;
            ensure!(output.status.success(), "{}", talk(&output));
            Ok(output.stdout)
        };
        ensure!(
            exported(from_directories)? == exported(&from_blobs)?,
            "the exports of {name} differ"
        );
        trees.push(export_equals_mount(from_directories, name)?);
    }

    for archive in archives {
        let name = &archive.name;
        let store = from_directories.record_archive(&archive.file)?;
        for diff_id in &archive.digests.diff_ids {
            ensure!(
                layer_in(&store, diff_id)? == layer_in(&from_directories.store(), diff_id)?,
                "directory and archive differ about layer {diff_id} of {name}"
            );
        }
    }
    Ok(trees)
}

/// The file in which a layer's baseline is kept.
pub(crate) fn layer_in(store: &Path, diff_id: &str) -> anyhow::Result<Vec<u8>> {
    let hex = diff_id.trim_start_matches("sha256:");
    let file = store.join("layers").join(format!("{hex}.layer"));
    fs::read(&file).with_context(|| format!("no {}", file.display()))
}

/// The first line in which two nodes' exports of an image differ, for a message.
fn first_difference(a: &Node, b: &Node, image: &str) -> anyhow::Result<String> {
    let of =
        |node: &Node| -> anyhow::Result<Vec<Value>> { node.answer(&["baseline", "export", image]) };
    let (a, b) = (of(a)?, of(b)?);
    let differing = a.iter().zip(&b).find(|(a, b)| a != b);
    Ok(match differing {
        Some((a, b)) => format!("{a}\n{b}"),
        None => format!("no file differs; {} and {} files", a.len(), b.len()),
    })
}

/// Compares `baseline export` with what `b3sum` reads in the mounted image, and returns the
/// files with their hashes.
pub(crate) fn export_equals_mount(
    node: &Node,
    image: &str,
) -> anyhow::Result<BTreeMap<Vec<u8>, String>> {
    let exported: BTreeMap<Vec<u8>, String> = node
        .answer(&["baseline", "export", image])?
        .iter()
        .filter_map(|file| Some((file, file["blake3"].as_str()?)))
        .map(|(file, hash)| Ok((path_of(file)?, hash.to_owned())))
        .collect::<anyhow::Result<_>>()?;
    let mounted = tempfile::Builder::new().prefix("mounted.").tempdir_in(node.directory.path())?;
    let target = mounted.path().to_string_lossy();
    node.ctr(&["images", "mount", image, &target])?;
    let read = hash_tree(mounted.path());
    node.ctr(&["images", "unmount", "--rm", &target])?;
    let read = read?;
    let differing: Vec<String> = exported
        .keys()
        .chain(read.keys())
        .filter(|path| exported.get(*path) != read.get(*path))
        .map(|path| String::from_utf8_lossy(path).into_owned())
        .take(10)
        .collect();
    ensure!(differing.is_empty(), "{image}: driftd and b3sum differ about {differing:?}");
    Ok(read)
}

/// A path in driftd's JSON, which has its bytes when it is not text.
fn path_of(file: &Value) -> anyhow::Result<Vec<u8>> {
    if let Some(bytes) = file["path_bytes"].as_str() {
        return Ok(base64::engine::general_purpose::STANDARD.decode(bytes)?);
    }
    Ok(file["path"].as_str().context("a file has a path")?.as_bytes().to_vec())
}

/// Regular files below `root` with their hashes, as `find` and `b3sum` see them.
fn hash_tree(root: &Path) -> anyhow::Result<BTreeMap<Vec<u8>, String>> {
    let found = Command::new("find").arg(root).args(["-type", "f", "-print0"]).output()?;
    ensure!(found.status.success(), "{}", talk(&found));
    let files: Vec<&[u8]> =
        found.stdout.split(|byte| *byte == 0).filter(|file| !file.is_empty()).collect();
    let mut hashes = BTreeMap::new();
    for files in files.chunks(200) {
        let names = files.iter().map(|file| OsStr::from_bytes(file));
        let output = Command::new(find("b3sum")?).arg("--no-names").args(names).output()?;
        ensure!(output.status.success(), "{}", talk(&output));
        let lines = str::from_utf8(&output.stdout)?.lines();
        for (file, hash) in files.iter().zip(lines) {
            let path = file.strip_prefix(root.as_os_str().as_bytes()).context("below the root")?;
            hashes.insert(path.to_vec(), hash.to_owned());
        }
    }
    assert_eq!(hashes.len(), files.len());
    Ok(hashes)
}

// ---- how an image arrives

fn pulled(node: &Node) -> anyhow::Result<()> {
    let file = node.path("pulled.tar");
    Image::new("registry.test/pulled:1")
        .layer(Layer::new().file("/bin/lower", 0o755, b"#!/bin/sh\necho 1\n"), Packing::Gzip)
        .layer(Layer::new().file("/bin/upper", 0o755, b"#!/bin/sh\necho 2\n"), Packing::Zstd)
        .write(&file)?;
    let name = registry::publish(&file, "shop/pulled:1")?;
    node.ctr(&["images", "pull", "--plain-http", &name])?;
    let baseline = node.wait_until_known_as(&name, "verified")?;
    assert_eq!(baseline["files"], 2, "{baseline:#}");
    Ok(())
}

fn not_unpacked(node: &Node) -> anyhow::Result<()> {
    let name = "registry.test/not-unpacked:1";
    let file = node.path("not-unpacked.tar");
    Image::new(name)
        .layer(Layer::new().file("/bin/one", 0o755, b"#!/bin/sh\necho packed\n"), Packing::Gzip)
        .layer(Layer::new().file("/etc/two", 0o644, b"two, packed"), Packing::Zstd)
        .write(&file)?;
    node.ctr(&["images", "import", "--no-unpack", &file.to_string_lossy()])?;
    // driftd waits for an unpack for a while, but not when a client asks for the baseline.
    let recorded = node.driftd(&["baseline", "record", name])?;
    ensure!(recorded.status.success(), "{}", talk(&recorded));
    node.wait_until_known_as(name, "verified")?;

    // Unpacked later, it is the same baseline, and it is not recorded again.
    let before = node.baseline_of(name)?.context("it was recorded")?["recorded_at"].clone();
    let files = export_equals_mount(node, name)?;
    assert_eq!(files.len(), 2);
    let after = node.baseline_of(name)?.context("it was recorded")?;
    assert_eq!(after["recorded_at"], before, "{after:#}");
    Ok(())
}

fn index(node: &Node) -> anyhow::Result<()> {
    let name = "registry.test/of-many-platforms:1";
    let file = node.path("index.tar");
    let digests = Image::new(name)
        .with_index()
        .layer(Layer::new().file("/bin/one", 0o755, b"#!/bin/sh\necho indexed\n"), Packing::Gzip)
        .write(&file)?;
    node.import(&file)?;
    node.wait_until_known_as(name, "verified")?;
    let baseline = node.baseline_of(name)?.context("it was recorded")?;
    assert_eq!(baseline["manifest_digest"], digests.manifest.as_str(), "{baseline:#}");
    ensure!(known_as(&baseline, "verified"), "{baseline:#}");
    let problems = node.status()?["problems"].clone();
    ensure!(
        !problems.to_string().contains("of-many-platforms"),
        "the provenance is taken for an image: {problems:#}"
    );
    // When the tag moves, the name moves with it; the layers stay known.
    let moved = Image::new(name)
        .layer(Layer::new().file("/bin/one", 0o755, b"#!/bin/sh\necho moved\n"), Packing::Gzip)
        .write(&file)?;
    node.import(&file)?;
    wait_for("the tag to move", || {
        let baseline = node.baseline_of(name)?;
        Ok(baseline.filter(|one| one["manifest_digest"] == moved.manifest.as_str()).map(drop))
    })
}
