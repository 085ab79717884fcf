//! Images as a few lines of text, for the tests of every room.
//!
//! No production code uses this.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::layer::{self, FileEntry, LayerBaseline, LayerEntry};
use super::merge::ImageBaseline;
use crate::model::{Blake3Hash, ChainId, DiffId, FileType, Format, LayerId, RootfsPath};

/// The hash of the content that `word` stands for in [`ImageBaseline::from_text`].
pub fn blake3_of(word: &str) -> Blake3Hash {
    Blake3Hash(*blake3::hash(word.as_bytes()).as_bytes())
}

impl ImageBaseline {
    /// An image of layers written as text, bottom first, for tests. One entry
    /// a line:
    ///
    /// ```text
    /// /usr/bin/ls 755 elf first-version     PATH MODE FORMAT CONTENT
    /// /usr/bin/ping 755 elf ping cap=raw    with a security.capability of these bytes
    /// /etc/rc.local 755 script hello        formats: elf elf_object script data empty
    /// /bin 777 symlink usr/bin              a link and its target
    /// /tmp 1777 dir                         directories above a file need no line
    /// - /etc/motd                           a whiteout
    /// opaque /var/lib 755                   a directory that hides what is below it
    /// ```
    ///
    /// # Panics
    ///
    /// When a line cannot be understood.
    #[doc(hidden)]
    pub fn from_text(layers: &[&str]) -> ImageBaseline {
        let diff_ids: Vec<DiffId> =
            (1..).take(layers.len()).map(|number: u8| DiffId([number; 32])).collect();
        let mut directories = BTreeMap::new();
        let layers = layers.iter().zip(&diff_ids).map(|(text, diff_id)| {
            let id = LayerId::Diff(*diff_id);
            let bytes = layer::write(id, entries(text, &mut directories), Vec::new())
                .unwrap_or_else(|err| panic!("layer {id}: {err}"));
            let layer = LayerBaseline::from_bytes(bytes)
                .unwrap_or_else(|err| panic!("layer {id} was not read back: {err}"));
            (id, Arc::new(layer))
        });
        let layers: Vec<_> = layers.collect();
        let chain_id = ChainId::of_layers(&diff_ids).last().copied().unwrap_or(ChainId([0; 32]));
        ImageBaseline::new(chain_id, layers)
    }
}

/// The entries of one layer. `directories` are those of the layers below: a
/// directory that a layer only passes through keeps its mode.
pub(super) fn entries(text: &str, directories: &mut BTreeMap<RootfsPath, u32>) -> Vec<LayerEntry> {
    let mut found: BTreeMap<RootfsPath, LayerEntry> = BTreeMap::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let entry = parse(line).unwrap_or_else(|| panic!("no entry of a layer: `{line}`"));
        found.insert(entry.path().clone(), entry);
    }
    let mut missing: Vec<RootfsPath> = vec![RootfsPath::root()];
    for path in found.keys() {
        missing.extend(std::iter::successors(path.parent(), RootfsPath::parent));
    }
    for path in missing {
        let mode = directories.get(&path).copied().unwrap_or(0o755);
        let implied = || LayerEntry::File(FileEntry::directory(path.clone(), mode));
        found.entry(path.clone()).or_insert_with(implied);
    }
    for entry in found.values() {
        match entry {
            LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file)
                if file.file_type == FileType::Directory =>
            {
                directories.insert(file.path.clone(), file.mode);
            }
            LayerEntry::File(_) | LayerEntry::OpaqueDirectory(_) | LayerEntry::Whiteout(_) => {
                directories.retain(|path, _| !path.is_within(entry.path()));
            }
        }
    }
    found.into_values().collect()
}

fn parse(line: &str) -> Option<LayerEntry> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let path = |text: &str| RootfsPath::new(text).ok();
    let mode = |text: &str| u32::from_str_radix(text, 8).ok();
    Some(match words[..] {
        ["-", name] => LayerEntry::Whiteout(path(name)?),
        ["opaque", name, bits] => {
            LayerEntry::OpaqueDirectory(FileEntry::directory(path(name)?, mode(bits)?))
        }
        [name, bits, "dir"] => LayerEntry::File(FileEntry::directory(path(name)?, mode(bits)?)),
        [name, bits, "symlink", target] => LayerEntry::File(FileEntry {
            file_type: FileType::Symlink,
            size: target.len() as u64,
            link_target: Some(target.as_bytes().into()),
            ..FileEntry::directory(path(name)?, mode(bits)?)
        }),
        [name, bits, "empty"] => {
            LayerEntry::File(regular(path(name)?, mode(bits)?, Format::Empty, ""))
        }
        [name, bits, format, content] => {
            LayerEntry::File(regular(path(name)?, mode(bits)?, format_named(format)?, content))
        }
        [name, bits, format, content, capability] => LayerEntry::File(FileEntry {
            capability: Some(capability.strip_prefix("cap=")?.as_bytes().into()),
            ..regular(path(name)?, mode(bits)?, format_named(format)?, content)
        }),
        _ => return None,
    })
}

fn format_named(name: &str) -> Option<Format> {
    [Format::Elf, Format::ElfObject, Format::Script, Format::Data, Format::Unknown]
        .into_iter()
        .find(|format| format.name() == name)
}

fn regular(path: RootfsPath, mode: u32, format: Format, content: &str) -> FileEntry {
    FileEntry {
        file_type: FileType::Regular,
        format,
        size: content.len() as u64,
        blake3: Some(blake3_of(content)),
        ..FileEntry::directory(path, mode)
    }
}
