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
    /// The layers have the diff IDs 1, 2, …
    ///
    /// # Panics
    ///
    /// When a line cannot be understood.
    #[doc(hidden)]
    pub fn from_text(layers: &[&str]) -> ImageBaseline {
        let diff_ids: Vec<DiffId> =
            (1..).take(layers.len()).map(|number: u8| DiffId([number; 32])).collect();
        build(layers, &diff_ids).unwrap_or_else(|problem| panic!("{problem}"))
    }

    /// The same, for a text that may be wrong. A layer's diff ID is made from its text, so
    /// that different images have different chain IDs.
    pub fn parse(layers: &[&str]) -> Result<ImageBaseline, String> {
        let diff_ids: Vec<DiffId> = layers.iter().map(|text| DiffId(blake3_of(text).0)).collect();
        build(layers, &diff_ids)
    }
}

fn build(layers: &[&str], diff_ids: &[DiffId]) -> Result<ImageBaseline, String> {
    let mut directories = BTreeMap::new();
    let layers = layers.iter().zip(diff_ids).map(|(text, diff_id)| {
        let id = LayerId::Diff(*diff_id);
        let bytes = layer::write(id, try_entries(text, &mut directories)?, Vec::new())
            .map_err(|err| format!("layer {id}: {err}"))?;
        let layer = LayerBaseline::from_bytes(bytes)
            .map_err(|err| format!("layer {id} was not read back: {err}"))?;
        Ok((id, Arc::new(layer)))
    });
    let layers = layers.collect::<Result<Vec<_>, String>>()?;
    let chain_id = ChainId::of_layers(diff_ids).last().copied().unwrap_or(ChainId([0; 32]));
    Ok(ImageBaseline::new(chain_id, layers))
}

/// The same for tests: a wrong line is a panic.
#[cfg(test)]
pub(super) fn entries(text: &str, directories: &mut BTreeMap<RootfsPath, u32>) -> Vec<LayerEntry> {
    try_entries(text, directories).unwrap_or_else(|problem| panic!("{problem}"))
}

/// The entries of one layer. `directories` are those of the layers below: a
/// directory that a layer only passes through keeps its mode.
fn try_entries(
    text: &str,
    directories: &mut BTreeMap<RootfsPath, u32>,
) -> Result<Vec<LayerEntry>, String> {
    let mut found: BTreeMap<RootfsPath, LayerEntry> = BTreeMap::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let entry = parse(line).ok_or_else(|| format!("no entry of a layer: `{line}`"))?;
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
    Ok(found.into_values().collect())
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
