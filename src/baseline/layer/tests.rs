//! A layer's file, written and read back, whole and damaged. Other tests of this room use
//! the layers that are generated here.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::io::{Cursor, Write as _};

use proptest::prelude::*;

use super::format::{CHECKSUM, FORMATS, KINDS, code_of, header};
use super::read::checksum_and;
use super::write::write_index;
use super::*;
use crate::baseline::blake3_of;
use crate::model::{Blake3Hash, ChainId, DiffId, FileType, Format, LayerId, RootfsPath};

const ID: LayerId = LayerId::Diff(DiffId([7; 32]));

/// Few names, so that layers meet; `a-` and `a!` sort before `a/` byte by byte.
const NAMES: [&str; 5] = ["a", "a-", "b", "a!", "\u{e9}"];

/// All paths that [`any_layer`] can make, but for the root.
pub(in crate::baseline) fn every_path() -> Vec<RootfsPath> {
    let mut paths = vec![RootfsPath::root()];
    for depth in 0..3 {
        let parents: Vec<RootfsPath> = paths
            .iter()
            .filter(|path| path.relative().split(|&byte| byte == b'/').count() >= depth)
            .cloned()
            .collect();
        for parent in parents {
            paths.extend(NAMES.map(|name| parent.join(name.as_bytes()).unwrap()));
        }
    }
    paths.sort();
    paths.dedup();
    paths
}

fn any_path() -> impl Strategy<Value = RootfsPath> {
    proptest::collection::vec(proptest::sample::select(&NAMES[..]), 1..4)
        .prop_map(|names| RootfsPath::new(names.join("/")).unwrap())
}

fn any_entry() -> impl Strategy<Value = LayerEntry> {
    let modes = proptest::sample::select(vec![0o755, 0o644, 0o4755, 0o1777]);
    let words = proptest::sample::select(vec!["x", "y", ""]);
    let extra = proptest::option::of(proptest::collection::vec(any::<u8>(), 0..20));
    (any_path(), 0..9_u8, modes, words, extra, any::<(u32, u32)>()).prop_map(
        |(path, kind, mode, word, extra, (uid, gid))| {
            let plain = FileEntry {
                path: path.clone(),
                file_type: FileType::Directory,
                format: Format::Unknown,
                mode,
                uid,
                gid,
                size: 0,
                blake3: None,
                capability: None,
                link_target: None,
                device: None,
            };
            let device = Some(Device { major: uid, minor: gid });
            match kind {
                0 | 1 => LayerEntry::Whiteout(path),
                2 => LayerEntry::OpaqueDirectory(plain),
                3 => LayerEntry::File(plain),
                4 => LayerEntry::File(FileEntry {
                    file_type: FileType::Symlink,
                    link_target: Some(extra.unwrap_or_default().into()),
                    ..plain
                }),
                5 => LayerEntry::File(FileEntry {
                    file_type: FileType::BlockDevice,
                    device,
                    ..plain
                }),
                6 => LayerEntry::File(FileEntry { file_type: FileType::Fifo, ..plain }),
                _ => LayerEntry::File(FileEntry {
                    file_type: FileType::Regular,
                    format: if word == "x" { Format::Elf } else { Format::Script },
                    size: u64::from(gid) << 8,
                    blake3: Some(blake3_of(word)),
                    capability: extra.map(Into::into),
                    ..plain
                }),
            }
        },
    )
}

/// A layer as a tree: what would lie below something that is no directory is
/// left out, and missing directories are put in.
pub(in crate::baseline) fn any_layer() -> impl Strategy<Value = Vec<LayerEntry>> {
    proptest::collection::vec(any_entry(), 0..12).prop_map(|entries| {
        let directory = |path: RootfsPath| LayerEntry::File(FileEntry::directory(path, 0o755));
        let is_directory = |entry: &LayerEntry| match entry {
            LayerEntry::Whiteout(_) => false,
            LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) => {
                file.file_type == FileType::Directory
            }
        };
        let root = RootfsPath::root();
        let mut tree = BTreeMap::from([(root.clone(), directory(root))]);
        for entry in entries {
            let path = entry.path().clone();
            let above: Vec<_> = std::iter::successors(path.parent(), RootfsPath::parent).collect();
            let blocked =
                above.iter().any(|path| tree.get(path).is_some_and(|known| !is_directory(known)));
            if blocked || tree.keys().any(|known| *known != path && known.is_within(&path)) {
                continue;
            }
            for path in above {
                tree.entry(path.clone()).or_insert_with(|| directory(path));
            }
            tree.insert(path, entry);
        }
        tree.into_values().collect()
    })
}

fn written(entries: &[LayerEntry]) -> Vec<u8> {
    write(ID, entries.to_vec(), Vec::new()).unwrap()
}

fn read_back(layer: &LayerBaseline) -> Vec<LayerEntry> {
    layer.entries().map(Record::to_entry).collect()
}

/// Uses every look-up.
fn look_everything_up(layer: &LayerBaseline) {
    for path in every_path() {
        let _ = layer.get(&path).map(Record::to_entry);
        let _ = layer.below(&path).map(Record::to_entry).count();
    }
    for word in ["x", "y", ""] {
        let _ = layer.with_content(&blake3_of(word)).map(Record::to_entry).count();
    }
    let _ = layer.with_content(&Blake3Hash([0; 32])).count();
    let _ = read_back(layer);
}

fn seal(bytes: &mut [u8]) {
    if let Some(end) = bytes.len().checked_sub(CHECKSUM) {
        let checksum = blake3::hash(&bytes[..end]);
        bytes[end..].copy_from_slice(checksum.as_bytes());
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(entries in any_layer()) {
        let layer = LayerBaseline::from_bytes(written(&entries)).unwrap();
        let mut sorted = entries.clone();
        sorted.sort_by(|a, b| compare_paths(a.path().as_bytes(), b.path().as_bytes()));
        prop_assert_eq!(layer.id(), ID);
        prop_assert_eq!(read_back(&layer), sorted.clone());
        for path in every_path() {
            let expected = sorted.iter().find(|entry| *entry.path() == path).cloned();
            prop_assert_eq!(layer.get(&path).map(Record::to_entry), expected);
            let below: Vec<_> = sorted
                .iter()
                .filter(|entry| *entry.path() != path && entry.path().is_within(&path))
                .cloned()
                .collect();
            prop_assert_eq!(layer.below(&path).map(Record::to_entry).collect::<Vec<_>>(), below);
        }
        for word in ["x", "y", "", "none"] {
            let hash = blake3_of(word);
            let expected: Vec<_> = sorted
                .iter()
                .filter(|entry| matches!(entry, LayerEntry::File(file) if file.blake3 == Some(hash)))
                .cloned()
                .collect();
            let found: Vec<_> = layer.with_content(&hash).map(Record::to_entry).collect();
            prop_assert_eq!(found, expected);
        }
    }

    /// The content index is made in passes, however few fit into one.
    #[test]
    fn the_content_index_is_the_same_in_any_number_of_passes(
        entries in any_layer(), at_once in 1..4_usize,
    ) {
        let whole = written(&entries);
        let layer = LayerBaseline::from_bytes(whole.clone()).unwrap();
        let hashed = u32::try_from(layer.index().len()).unwrap();
        let records = u32::try_from(layer.len()).unwrap();
        let mut out = Cursor::new(whole[..layer.records.end].to_vec());
        write_index(&mut out, records, hashed, at_once).unwrap();
        prop_assert_eq!(out.get_ref(), &whole[..layer.index.end]);
    }

    #[test]
    fn a_checksum_is_the_same_on_one_thread_and_on_two(length in 0..3_000_000_usize) {
        let bytes = vec![7; length];
        prop_assert_eq!(checksum_and(&bytes, || (), || 1), (blake3::hash(&bytes), 1));
    }

    #[test]
    fn a_changed_byte_is_noticed(
        entries in any_layer(), at: proptest::sample::Index, by in 1..=255_u8,
    ) {
        let mut bytes = written(&entries);
        let at = at.index(bytes.len());
        bytes[at] ^= by;
        prop_assert!(LayerBaseline::from_bytes(bytes).is_err());
    }

    #[test]
    fn a_file_cut_short_is_noticed(entries in any_layer(), at: proptest::sample::Index) {
        let mut bytes = written(&entries);
        bytes.truncate(at.index(bytes.len()));
        prop_assert!(LayerBaseline::from_bytes(bytes).is_err());
    }

    /// Bytes that an attacker made to look right must not stop the daemon.
    #[test]
    fn no_look_up_panics_whatever_the_file_holds(
        entries in any_layer(),
        changes in proptest::collection::vec(
            (any::<proptest::sample::Index>(), any::<u8>()), 1..8,
        ),
    ) {
        let mut bytes = written(&entries);
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        seal(&mut bytes);
        if let Ok(layer) = LayerBaseline::from_bytes(bytes) {
            look_everything_up(&layer);
        }
    }

    #[test]
    fn random_bytes_are_no_layer(mut bytes: Vec<u8>) {
        seal(&mut bytes);
        prop_assert!(LayerBaseline::from_bytes(bytes).is_err());
    }
}

#[track_caller]
fn check_order(one: &str, other: &str) {
    assert_eq!(compare_paths(one.as_bytes(), other.as_bytes()), Ordering::Less);
    assert_eq!(compare_paths(other.as_bytes(), one.as_bytes()), Ordering::Greater);
    assert_eq!(compare_paths(one.as_bytes(), one.as_bytes()), Ordering::Equal);
}

#[test]
fn a_directory_is_followed_by_its_subtree() {
    check_order("/", "/a");
    check_order("/a", "/a/b");
    check_order("/a/b", "/a-b");
    check_order("/a/b", "/a!");
    check_order("/a/z", "/ab");
}

fn entries_of(text: &str) -> Vec<LayerEntry> {
    crate::baseline::text::entries(text, &mut BTreeMap::new())
}

#[track_caller]
fn check_refused(entries: Vec<LayerEntry>, expected: &str) {
    let err = write(ID, entries, Vec::new()).unwrap_err();
    assert_eq!(err.to_string(), expected);
}

#[test]
fn entries_that_form_no_tree_are_refused() {
    check_refused(vec![], "it has no root directory");
    check_refused(
        entries_of("/a 644 data x").into_iter().chain(entries_of("/a 644 data y")).collect(),
        "/ is named twice",
    );
    let orphan = |entry: &LayerEntry| entry.path().as_bytes() != b"/a";
    check_refused(
        entries_of("/a/b 644 data x").into_iter().filter(orphan).collect(),
        "/a/b is in a directory that is missing",
    );
    check_refused(
        entries_of("/a 755 dir")
            .into_iter()
            .map(|entry| match entry {
                LayerEntry::File(file) => {
                    LayerEntry::File(FileEntry { blake3: Some(blake3_of("")), ..file })
                }
                other => other,
            })
            .collect(),
        "/ is a regular file without a hash, or has a hash and is no regular file",
    );
    let mut below_a_file = entries_of("/a/b 644 data x");
    below_a_file.retain(orphan);
    below_a_file.extend(entries_of("/a 644 data x").into_iter().filter(|entry| !orphan(entry)));
    check_refused(below_a_file, "/a/b is in a directory that is missing");
}

#[test]
fn entries_that_come_one_by_one_come_in_order() {
    let memory = || Cursor::new(Vec::new());
    let mut writer = Writer::new(ID, memory(), memory()).unwrap();
    let mut entries = entries_of("/a 644 data x\n/b 644 data x");
    entries.swap(1, 2);
    let result = entries.iter().try_for_each(|entry| writer.push(entry));
    assert_eq!(result.unwrap_err().to_string(), "/a comes too late");
}

/// A layer whose checksum two threads share, with every kind of entry.
fn large_layer() -> Vec<u8> {
    let mut text = "opaque /o 755\n- /w\n/l 777 symlink x\n/p 755 elf x cap=raw\n".to_owned();
    for number in 0..8_000 {
        text += &format!("/d{}/file-{number} 644 data {}\n", number % 50, number / 3);
    }
    written(&entries_of(&text))
}

#[test]
fn a_file_that_lost_its_end_is_no_layer() {
    let whole = large_layer();
    assert!(whole.len() > 1 << 19);
    for part in 0..16 {
        let mut cut = whole.clone();
        cut.truncate(whole.len() / 16 * part);
        let err = LayerBaseline::from_bytes(cut).unwrap_err();
        assert_eq!(err, Invalid::Length, "cut at {part}/16");
        let file = tempfile::tempfile().unwrap();
        (&file).write_all(&whole[..whole.len() / 16 * part]).unwrap();
        let err = LayerBaseline::open(&file).unwrap_err();
        assert!(matches!(err, OpenError::Invalid(Invalid::Length)), "cut at {part}/16: {err}");
    }
    LayerBaseline::from_bytes(whole).unwrap();
}

/// A disk that loses the end of a file may leave zeros in its place.
#[test]
fn a_file_whose_end_is_zeros_is_no_layer() {
    let whole = large_layer();
    for part in 1..16 {
        let mut cut = whole.clone();
        cut[whole.len() / 16 * part..].fill(0);
        assert_eq!(LayerBaseline::from_bytes(cut).unwrap_err(), Invalid::Checksum);
    }
}

#[test]
fn a_flipped_bit_is_noticed_wherever_it_is() {
    let whole = large_layer();
    for at in (0..whole.len()).step_by(whole.len() / 64) {
        let mut flipped = whole.clone();
        flipped[at] ^= 0x10;
        LayerBaseline::from_bytes(flipped).unwrap_err();
    }
}

#[test]
fn a_later_version_is_named_as_such() {
    let mut bytes = written(&entries_of("/a 644 data x"));
    bytes[header::VERSION] = 2;
    seal(&mut bytes);
    assert_eq!(LayerBaseline::from_bytes(bytes).unwrap_err(), Invalid::Version(2));
}

#[test]
fn a_layer_without_a_diff_id_keeps_its_name() {
    let id = LayerId::Chain(ChainId([3; 32]));
    let bytes = write(id, entries_of(""), Vec::new()).unwrap();
    assert_eq!(LayerBaseline::from_bytes(bytes).unwrap().id(), id);
}

#[test]
fn every_type_and_format_has_a_code() {
    let types = KINDS.map(|(_, file_type)| match file_type {
        FileType::Regular
        | FileType::Directory
        | FileType::Symlink
        | FileType::CharDevice
        | FileType::BlockDevice
        | FileType::Fifo
        | FileType::Socket => code_of(&KINDS, &file_type),
    });
    assert_eq!(types, [1, 2, 3, 4, 5, 6, 7]);
    let formats = FORMATS.map(|(_, format)| match format {
        Format::Unknown
        | Format::Elf
        | Format::ElfObject
        | Format::Script
        | Format::Data
        | Format::Empty => code_of(&FORMATS, &format),
        Format::KernelModule => unreachable!("first bytes do not show it"),
    });
    assert_eq!(formats, [0, 1, 2, 3, 4, 5]);
}
