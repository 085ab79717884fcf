//! A layer's file as a disk could return it: any bytes, or a good file with some bytes
//! changed. Both get the right checksum; without it the reader would refuse them at once.
#![no_main]

use std::sync::OnceLock;

use driftd::baseline::layer::{self, Record};
use driftd::baseline::{FileEntry, LayerBaseline, LayerEntry};
use driftd::model::{Blake3Hash, DiffId, FileType, Format, LayerId, RootfsPath};
use libfuzzer_sys::fuzz_target;

const CHECKSUM: usize = 32;

/// A good file, without its checksum.
fn good() -> &'static [u8] {
    static GOOD: OnceLock<Vec<u8>> = OnceLock::new();
    GOOD.get_or_init(|| {
        let entry =
            |path: &str| FileEntry::directory(RootfsPath::new(path).expect("a valid path"), 0o755);
        let file = |path: &str, byte: u8| {
            LayerEntry::File(FileEntry {
                file_type: FileType::Regular,
                format: Format::Data,
                size: 1,
                blake3: Some(Blake3Hash([byte; 32])),
                ..entry(path)
            })
        };
        let entries = vec![
            LayerEntry::File(entry("/")),
            LayerEntry::OpaqueDirectory(entry("/a")),
            file("/a/b", 1),
            file("/a/c", 255),
            LayerEntry::Whiteout(RootfsPath::new("/d").expect("a valid path")),
            LayerEntry::File(FileEntry {
                file_type: FileType::Symlink,
                size: 1,
                link_target: Some((*b"a").into()),
                capability: Some((*b"raw").into()),
                ..entry("/e")
            }),
        ];
        let id = LayerId::Diff(DiffId([7; 32]));
        let mut bytes = layer::write(id, entries, Vec::new()).expect("it is a tree");
        bytes.truncate(bytes.len() - CHECKSUM);
        bytes
    })
}

/// Changes the good file: each change is a position (two bytes) and a byte.
fn changed(changes: &[u8]) -> Vec<u8> {
    let mut bytes = good().to_vec();
    for change in changes.chunks_exact(3) {
        let at = usize::from(u16::from_le_bytes([change[0], change[1]]));
        if let Some(byte) = bytes.get_mut(at) {
            *byte = change[2];
        }
    }
    bytes
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = match data.split_first() {
        Some((0, any)) => any.to_vec(),
        Some((_, changes)) => changed(changes),
        None => return,
    };
    let checksum = *blake3::hash(&bytes).as_bytes();
    bytes.extend(checksum);
    let Ok(layer) = LayerBaseline::from_bytes(bytes) else { return };
    let _ = (layer.id(), layer.len());
    let entries: Vec<_> = layer.entries().map(Record::to_entry).collect();
    for entry in &entries {
        let _ = layer.get(entry.path()).map(Record::to_entry);
        let _ = layer.below(entry.path()).map(Record::to_entry).count();
    }
    for path in ["/", "/a", "/a/b"].map(RootfsPath::new).into_iter().flatten() {
        let _ = (layer.get(&path).map(Record::to_entry), layer.below(&path).count());
    }
    for byte in [0, 1, 255] {
        let _ = layer.with_content(&Blake3Hash([byte; 32])).map(Record::to_entry).count();
    }
});
