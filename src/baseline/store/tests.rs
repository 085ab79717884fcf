//! The store on a real disk: what survives a restart, what is set aside, what is removed.
//! Needs root: modes and a full tmpfs.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use super::*;
use crate::baseline::blake3_of;
use crate::baseline::layer::{LayerBaseline, LayerEntry};
use crate::baseline::merge::Totals;
use crate::baseline::proof::LayerProof;
use crate::baseline::types::KnownBy;
use crate::health::{Failure, Health};
use crate::model::{ChainId, DiffId, LayerId, ManifestDigest, RootfsPath, printable};

fn diff(number: u8) -> LayerId {
    LayerId::Diff(DiffId([number; 32]))
}

fn chain(number: u8) -> ChainId {
    ChainId([number; 32])
}

fn manifest(number: u8) -> ManifestDigest {
    ManifestDigest([number; 32])
}

fn name(namespace: &str, name: &str, number: u8) -> ImageName {
    ImageName {
        namespace: namespace.into(),
        name: name.into(),
        manifest_digest: Some(manifest(number)),
    }
}

fn entries(text: &str) -> Vec<LayerEntry> {
    crate::baseline::text::entries(text, &mut BTreeMap::new())
}

fn open(directory: &Path) -> Store {
    Store::open(directory, Arc::new(Health::default())).unwrap()
}

/// Two images that share a layer: chain 1 is layer 1, chain 2 layers 1 and 2.
fn two_images(directory: &Path) -> Store {
    let store = open(directory);
    store.write_layer(diff(1), entries("/bin/sh 755 elf sh")).unwrap();
    store.write_layer(diff(2), entries("/bin/ls 755 elf ls")).unwrap();
    let base = name("default", "docker.io/library/busybox:latest", 1);
    store.write_image(chain(1), vec![diff(1)], Some(&base)).unwrap();
    let app = name("default", "ghcr.io/team/app:1.0", 2);
    store.write_image(chain(2), vec![diff(1), diff(2)], Some(&app)).unwrap();
    store
}

/// All files of the store, by their paths in it.
fn files(directory: &Path) -> Vec<String> {
    let mut files = Vec::new();
    for folder in ["layers", "images", "proofs"] {
        for entry in fs::read_dir(directory.join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let hex_at = name.find(|letter: char| letter.is_ascii_digit()).unwrap_or(0);
            let suffix = name.split_once('.').map_or("", |(_, suffix)| suffix);
            files.push(format!("{folder}/{}.{suffix}", &name[..hex_at + 2]));
        }
    }
    files.sort();
    files
}

#[test]
fn what_is_recorded_is_there_after_a_restart() {
    let scratch = tempfile::tempdir().unwrap();
    let before = two_images(scratch.path()).images();
    let store = open(scratch.path());
    assert_eq!(store.images(), before);
    assert_eq!(store.layers_of(chain(2)), Some(vec![diff(1), diff(2)]));
    assert_eq!(before[1].totals, Totals { files: 2, bytes: 4 });

    let image = store.image(chain(2)).unwrap().unwrap();
    let shell = image.get(&RootfsPath::new("/bin/sh").unwrap()).unwrap();
    assert_eq!((shell.entry.blake3, shell.layer), (Some(blake3_of("sh")), diff(1)));
    assert!(Arc::ptr_eq(&image, &store.image(chain(2)).unwrap().unwrap()), "opened once");
    assert!(store.image(chain(3)).unwrap().is_none());
}

#[test]
fn only_root_can_read_the_store() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("baselines");
    two_images(&directory);
    for path in [directory.clone(), directory.join("layers"), directory.join("images")] {
        assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o7777, 0o700);
    }
    for file in fs::read_dir(directory.join("layers")).unwrap() {
        let mode = file.unwrap().metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
    }
}

#[track_caller]
fn check_set_aside(damage: impl Fn(&Path)) {
    let scratch = tempfile::tempdir().unwrap();
    let path = two_images(scratch.path()).layer_path(diff(1));
    damage(&path);
    let health = Arc::new(Health::default());
    let store = Store::open(scratch.path(), Arc::clone(&health)).unwrap();
    assert!(store.image(chain(2)).unwrap().is_none());
    assert_eq!(health.count(Failure::BaselineCorrupt), 1);
    assert!(!store.has_layer(diff(1)).unwrap());
    assert!(store.has_layer(diff(2)).unwrap());
    assert_eq!(
        files(scratch.path()),
        ["images/01.json", "images/02.json", "layers/01.layer.corrupt", "layers/02.layer"]
    );

    store.write_layer(diff(1), entries("/bin/sh 755 elf sh")).unwrap();
    assert!(store.image(chain(2)).unwrap().is_some());
}

#[test]
fn a_corrupt_layer_is_set_aside_and_can_be_recorded_again() {
    check_set_aside(|path| {
        let mut bytes = fs::read(path).unwrap();
        bytes[40] ^= 1;
        fs::write(path, bytes).unwrap();
    });
    check_set_aside(|path| fs::write(path, "").unwrap());
    check_set_aside(|path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    });
}

#[test]
fn a_layer_of_another_version_is_set_aside() {
    check_set_aside(|path| {
        let mut bytes = fs::read(path).unwrap();
        bytes[8] = 99;
        fs::write(path, bytes).unwrap();
    });
}

#[test]
fn a_layer_under_another_layers_name_is_set_aside() {
    check_set_aside(|path| {
        let other = path.with_file_name(format!("{}.layer", "02".repeat(32)));
        fs::copy(other, path).map(drop).unwrap();
    });
}

#[test]
fn a_record_that_cannot_be_read_is_set_aside() {
    let scratch = tempfile::tempdir().unwrap();
    let path = two_images(scratch.path()).image_path(chain(1));
    fs::write(path, "{}").unwrap();
    let health = Arc::new(Health::default());
    let store = Store::open(scratch.path(), Arc::clone(&health)).unwrap();
    let chains: Vec<ChainId> = store.images().iter().map(|record| record.chain_id).collect();
    assert_eq!(chains, [chain(2)]);
    assert_eq!(health.count(Failure::BaselineCorrupt), 1);
}

#[test]
fn what_a_crash_left_half_written_is_removed() {
    let scratch = tempfile::tempdir().unwrap();
    two_images(scratch.path());
    fs::write(scratch.path().join("layers/03.layer.tmp"), "half").unwrap();
    fs::write(scratch.path().join("images/03.json.tmp"), "half").unwrap();
    open(scratch.path());
    assert_eq!(
        files(scratch.path()),
        ["images/01.json", "images/02.json", "layers/01.layer", "layers/02.layer"]
    );
}

/// Unmounts when a test ends, also by a panic.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_reported_and_leaves_nothing_half_written() {
    let scratch = tempfile::tempdir().unwrap();
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
        .arg(scratch.path())
        .status()
        .unwrap();
    assert!(status.success(), "this test must run as root");
    let mount = Mount(scratch.path().into());
    let store = open(&mount.0);
    let many: String = (0..2000).map(|number| format!("/{number} 644 data x\n")).collect();
    let err = store.write_layer(diff(1), entries(&many)).unwrap_err();
    assert!(
        matches!(&err, Error::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull),
        "{err:?}"
    );
    assert!(err.to_string().contains("is the disk full"), "{err}");
    assert_eq!(files(&mount.0), [""; 0]);

    store.write_layer(diff(2), entries("/a 644 data x")).unwrap();
    assert_eq!(files(&mount.0), ["layers/02.layer"]);
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("file");
    fs::write(&file, "").unwrap();
    let err = Store::open(&file, Arc::new(Health::default())).unwrap_err();
    assert!(err.to_string().contains(&file.display().to_string()), "{err}");
}

#[test]
fn an_image_is_found_by_the_names_that_users_type() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    let found = |text: &str| store.find(text).map(|record| record.chain_id);
    for text in [
        "busybox",
        "busybox:latest",
        "library/busybox",
        "docker.io/library/busybox",
        "docker.io/library/busybox:latest",
        "0101",
        "sha256:0101",
        &manifest(1).to_string(),
        &chain(1).to_string(),
        &chain(1).hex(),
    ] {
        assert_eq!(found(text), Ok(chain(1)), "{text}");
    }
    assert_eq!(found("ghcr.io/team/app:1.0"), Ok(chain(2)));
    for text in ["busybox:1.36", "team/app:1.0", "ghcr.io/team/app", "01", "", "0303", "\x1b["] {
        let err = found(text).unwrap_err();
        assert_eq!(err, FindError::Unknown { text: printable(text.as_bytes()) }, "{text}");
    }
}

#[test]
fn a_name_that_means_two_images_is_refused_with_both() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    store.name_image(chain(2), &name("k8s.io", "docker.io/library/busybox:latest", 2)).unwrap();
    assert_eq!(
        store.find("busybox"),
        Err(FindError::Ambiguous {
            text: "busybox".into(),
            candidates: vec![chain(1).to_string(), chain(2).to_string()],
        })
    );
}

/// The names of each recorded chain, as `chain: names`.
fn names(store: &Store) -> Vec<String> {
    let mut lines: Vec<String> = store
        .images()
        .iter()
        .map(|record| {
            let names: Vec<&str> = record.names.iter().map(|image| image.name.as_str()).collect();
            format!("{}: {}", &record.chain_id.hex()[..2], names.join(" "))
        })
        .collect();
    lines.sort();
    lines
}

#[test]
fn a_tag_that_moves_leaves_its_old_image() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    let moved = name("default", "docker.io/library/busybox:latest", 9);
    store.name_image(chain(2), &moved).unwrap();
    let expected = ["01: ", "02: docker.io/library/busybox:latest ghcr.io/team/app:1.0"];
    assert_eq!(names(&store), expected);
    assert_eq!(names(&open(scratch.path())), expected);
    assert_eq!(store.find("busybox").unwrap().manifest_digest, Some(manifest(9)));
}

#[test]
fn h14_thousands_of_names_are_set_in_one_pass_each_with_its_image() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    let name_of = |number: usize| ImageName {
        namespace: "default".into(),
        name: format!("registry.test/{number}:1"),
        manifest_digest: None,
    };
    let list = |shift: usize| -> Vec<(ImageName, ChainId)> {
        let chain_of = |number: usize| chain(u8::try_from((number + shift) % 2 + 1).unwrap());
        (0..5000).map(|number| (name_of(number), chain_of(number))).collect()
    };
    let begun = std::time::Instant::now();
    store.set_names("socket", &list(0)).unwrap();
    store.set_names("socket", &list(1)).unwrap();
    // If each were compared with each, this would take minutes.
    assert!(begun.elapsed() < std::time::Duration::from_secs(10), "{:?}", begun.elapsed());
    let images = store.images();
    assert_eq!(images.iter().map(|image| image.names.len()).sum::<usize>(), 5000);
    let second = images.iter().find(|image| image.chain_id == chain(2)).unwrap();
    assert!(second.names.contains(&name_of(0)) && !second.names.contains(&name_of(1)));
}

#[test]
fn a_list_of_one_socket_changes_no_names_of_another() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    let busybox = name("default", "docker.io/library/busybox:latest", 1);
    let app = name("default", "ghcr.io/team/app:1.0", 2);
    // After a restart it is not known which socket listed these: the first list decides.
    store.set_names("/one.sock", &[(busybox.clone(), chain(1))]).unwrap();
    assert_eq!(names(&store), ["01: docker.io/library/busybox:latest", "02: "]);
    store.set_names("/two.sock", &[(app, chain(2))]).unwrap();
    let both = ["01: docker.io/library/busybox:latest", "02: ghcr.io/team/app:1.0"];
    assert_eq!(names(&store), both);
    store.set_names("/one.sock", &[(busybox, chain(1))]).unwrap();
    assert_eq!(names(&store), both);
    store.set_names("/one.sock", &[]).unwrap();
    assert_eq!(names(&store), ["01: ", "02: ghcr.io/team/app:1.0"]);
}

#[test]
fn a_reader_changes_nothing_and_names_what_is_not_whole() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    fs::write(scratch.path().join("layers/03.layer.tmp"), "half").unwrap();
    let before = files(scratch.path());
    let read = || Store::open_to_read(scratch.path(), Arc::new(Health::default()));
    let reader = read().unwrap();
    assert_eq!(reader.images(), store.images());
    assert!(reader.image(chain(2)).unwrap().is_some());
    drop(reader);

    let path = store.layer_path(diff(1));
    fs::write(&path, "cut").unwrap();
    let err = read().unwrap().image(chain(2)).unwrap_err();
    assert!(err.to_string().contains(&path.display().to_string()), "{err}");
    assert_eq!(files(scratch.path()), before);
}

#[test]
fn one_process_at_a_time_writes() {
    let scratch = tempfile::tempdir().unwrap();
    let directory = scratch.path().join("baselines");
    let claim = Store::claim(&directory).unwrap();
    let err = Store::claim(&directory).unwrap_err();
    assert!(matches!(err, Error::InUse { .. }), "{err:?}");
    drop(claim);
    Store::claim(&directory).unwrap();
}

#[test]
fn a_directory_that_was_there_keeps_its_mode() {
    let scratch = tempfile::tempdir().unwrap();
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let _claim = Store::claim(scratch.path()).unwrap();
    open(scratch.path());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(scratch.path()), 0o1777);
    assert_eq!(mode(&scratch.path().join("layers")), 0o700);
}

#[test]
fn only_what_has_no_name_and_no_user_is_removed() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    let no_containers = HashSet::new();
    assert_eq!(store.collect(&no_containers, Duration::ZERO).unwrap(), Collected::default());

    store.remove_name("default", "ghcr.io/team/app:1.0").unwrap();
    assert_eq!(
        store.collect(&HashSet::from([chain(2)]), Duration::ZERO).unwrap(),
        Collected::default()
    );
    let image = store.image(chain(2)).unwrap();
    assert_eq!(
        store.collect(&no_containers, Duration::ZERO).unwrap(),
        Collected::default(),
        "its baseline is held"
    );
    drop(image);
    let bytes = fs::metadata(store.layer_path(diff(2))).unwrap().len();
    assert_eq!(
        store.collect(&no_containers, Duration::ZERO).unwrap(),
        Collected { images: 1, layers: 1, bytes }
    );
    assert_eq!(files(scratch.path()), ["images/01.json", "layers/01.layer"]);
    assert_eq!(names(&store), ["01: docker.io/library/busybox:latest"]);
    assert!(store.image(chain(1)).unwrap().is_some());
}

fn proof_of(layer: &LayerBaseline) -> LayerProof {
    LayerProof {
        known_by: KnownBy::Verified,
        blob: Some("sha256:00".into()),
        ..LayerProof::new(layer.checksum(), chain(1))
    }
}

#[test]
fn a_proof_belongs_to_one_file_and_is_removed_with_it() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    assert_eq!(store.known_by(chain(2)).0, KnownBy::Snapshot);
    for id in [diff(1), diff(2)] {
        let layer = store.layer(id).unwrap().unwrap();
        store.write_proof(id, proof_of(&layer)).unwrap();
    }
    assert_eq!(store.known_by(chain(2)).0, KnownBy::Verified);
    drop(store);
    let store = open(scratch.path());
    assert_eq!(store.known_by(chain(2)).0, KnownBy::Verified);

    // The same content again is the same file; other content is not.
    store.write_layer(diff(2), entries("/bin/ls 755 elf ls")).unwrap();
    assert_eq!(store.known_by(chain(2)).0, KnownBy::Verified);
    store.write_layer(diff(2), entries("/bin/ls 755 elf other")).unwrap();
    let proofs = vec![(diff(1), KnownBy::Verified, None), (diff(2), KnownBy::Snapshot, None)];
    assert_eq!(store.known_by(chain(2)), (KnownBy::Snapshot, proofs));
    assert_eq!(
        files(scratch.path()),
        [
            "images/01.json",
            "images/02.json",
            "layers/01.layer",
            "layers/02.layer",
            "proofs/01.json"
        ]
    );

    store.remove(chain(1)).unwrap();
    store.remove(chain(2)).unwrap();
    assert_eq!(files(scratch.path()), [""; 0]);
}

#[test]
fn a_proof_of_a_file_that_is_not_there_any_more_is_void() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    let layer = store.layer(diff(1)).unwrap().unwrap();
    store.write_proof(diff(1), proof_of(&layer)).unwrap();
    // As after a crash between the two files.
    drop((layer, store));
    let other = scratch.path().join(format!("layers/{}.layer", "02".repeat(32)));
    fs::copy(other, scratch.path().join(format!("layers/{}.layer", "01".repeat(32)))).unwrap();
    assert_eq!(open(scratch.path()).proof(diff(1)), None);
}

#[test]
fn a_proof_that_cannot_be_read_is_set_aside() {
    let damages: [fn(Vec<u8>) -> Vec<u8>; 3] = [
        |json| json[..json.len() / 2].to_vec(),
        |_| Vec::new(),
        |json| String::from_utf8(json).unwrap().replace("01", "02").into_bytes(),
    ];
    for damage in damages {
        let scratch = tempfile::tempdir().unwrap();
        let store = two_images(scratch.path());
        let layer = store.layer(diff(1)).unwrap().unwrap();
        store.write_proof(diff(1), proof_of(&layer)).unwrap();
        let path = store.proof_path(diff(1));
        fs::write(&path, damage(fs::read(&path).unwrap())).unwrap();
        let health = Arc::new(Health::default());
        let store = Store::open(scratch.path(), Arc::clone(&health)).unwrap();
        assert_eq!(health.count(Failure::BaselineCorrupt), 1);
        assert_eq!(store.proof(diff(1)), None);
        assert!(files(scratch.path()).contains(&"proofs/01.json.corrupt".to_owned()));
        assert!(store.image(chain(2)).unwrap().is_some(), "the baseline is none the worse");
    }
}

#[test]
fn what_is_not_needed_is_kept_for_the_retention_period() {
    let scratch = tempfile::tempdir().unwrap();
    let store = two_images(scratch.path());
    let hour = Duration::from_secs(3600);
    store.remove_name("default", "ghcr.io/team/app:1.0").unwrap();
    let no_containers = HashSet::new();
    assert_eq!(store.collect(&no_containers, hour).unwrap(), Collected::default());
    // The time runs on while driftd does not.
    drop(store);
    let store = open(scratch.path());
    let unneeded = |store: &Store| {
        let records = store.images();
        records.iter().find(|record| record.chain_id == chain(2)).unwrap().unneeded_since
    };
    let since = unneeded(&store).unwrap();
    store.collect(&HashSet::from([chain(2)]), hour).unwrap();
    assert_eq!(unneeded(&store), None, "a container uses it again");
    store.collect(&no_containers, hour).unwrap();
    assert!(unneeded(&store).unwrap() > since);

    store.state().records.get_mut(&chain(2)).unwrap().unneeded_since = Some(since - hour);
    let collected = store.collect(&no_containers, hour).unwrap();
    assert!(matches!(collected, Collected { images: 1, layers: 1, .. }), "{collected:?}");
    // If the clock was set back, nothing is removed early.
    store.remove_name("default", "docker.io/library/busybox:latest").unwrap();
    store.state().records.get_mut(&chain(1)).unwrap().unneeded_since =
        Some(Timestamp::now() + 3 * hour);
    assert_eq!(store.collect(&no_containers, hour).unwrap(), Collected::default());
}
