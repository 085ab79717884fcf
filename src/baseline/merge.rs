//! The layers of an image as one tree, merged at each look-up the way overlayfs does it:
//! nothing is copied out of the layers' files.
//!
//! From the top down, the first layer that names a path decides. A layer hides what the
//! layers below hold at a path by a whiteout or by anything but a directory, and inside an
//! opaque directory; each covers the subtree.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::layer::{
    AT_A_TIME, FileEntry, LayerBaseline, LayerEntry, Record, compare_paths, is_below,
};
use crate::model::file::is_program;
use crate::model::{Blake3Hash, ChainId, FileType, LayerId, RootfsPath};

/// An entry of an image, and the layer it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownBaseline {
    pub entry: FileEntry,
    pub layer: LayerId,
}

/// How much an image holds: its regular files, as a container sees them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub files: u64,
    pub bytes: u64,
}

/// The files of an image, as its layers record them.
pub struct ImageBaseline {
    chain_id: ChainId,
    /// Bottom first.
    layers: Vec<(LayerId, Arc<LayerBaseline>)>,
    totals: OnceLock<Totals>,
}

impl fmt::Debug for ImageBaseline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ImageBaseline({}, {} layers)", self.chain_id, self.layers.len())
    }
}

/// What one layer holds at a path, and whether it hides the layers below there.
enum InLayer<'a> {
    /// Nothing: the next layer down decides.
    Nothing,
    /// Nothing, and it hides the layers below.
    Hidden,
    /// An entry.
    Entry(Record<'a>),
}

/// What the layers above leave of one layer at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    Nothing,
    /// A directory above stands at the path and is merged with this layer's: what
    /// lies below it can be seen, its owner and mode cannot.
    Below,
    All,
}

impl ImageBaseline {
    /// The layers come bottom first.
    pub fn new(chain_id: ChainId, layers: Vec<(LayerId, Arc<LayerBaseline>)>) -> ImageBaseline {
        ImageBaseline { chain_id, layers, totals: OnceLock::new() }
    }

    pub fn chain_id(&self) -> ChainId {
        self.chain_id
    }

    /// Bottom first.
    pub fn layers(&self) -> Vec<LayerId> {
        self.layers.iter().map(|(id, _)| *id).collect()
    }

    /// Bottom first.
    pub(super) fn layer_baselines(&self) -> impl DoubleEndedIterator<Item = &LayerBaseline> {
        self.layers.iter().map(|(_, layer)| &**layer)
    }

    /// What the image holds at `path`.
    pub fn get(&self, path: &RootfsPath) -> Option<KnownBaseline> {
        let (number, record) = self.find(path.as_bytes())?;
        self.known(number, record)
    }

    /// How much the layers above leave visible of `layer` at `path`; `Nothing` if it is no
    /// layer of this image.
    pub fn shown_of(&self, layer: LayerId, path: &RootfsPath) -> Shown {
        let mut shown = Shown::All;
        for (id, above) in self.layers.iter().rev() {
            if *id == layer {
                return shown;
            }
            match look_up(above, path.as_bytes()) {
                InLayer::Nothing => (),
                InLayer::Entry(record)
                    if record.file_type() == Some(FileType::Directory)
                        && !record.is_opaque()
                        && !hides_inside(above, path.as_bytes()) =>
                {
                    shown = Shown::Below;
                }
                InLayer::Entry(_) | InLayer::Hidden => return Shown::Nothing,
            }
        }
        Shown::Nothing
    }

    /// The files with this content that can be seen, in the order of paths.
    pub fn with_content(&self, hash: &Blake3Hash, limit: usize) -> Vec<KnownBaseline> {
        let mut found: Vec<(usize, Record<'_>)> = Vec::new();
        for (number, (_, layer)) in self.layers.iter().enumerate() {
            // A layer's own files are in order already: its first `limit` visible ones are
            // enough.
            let visible = layer
                .with_content(hash)
                .filter(|record| self.find(record.path()).is_some_and(|(top, _)| top == number));
            found.extend(visible.take(limit).map(|record| (number, record)));
        }
        found.sort_by(|(_, a), (_, b)| compare_paths(a.path(), b.path()));
        found
            .into_iter()
            .take(limit)
            .filter_map(|(number, record)| self.known(number, record))
            .collect()
    }

    /// Whether a program lies below `directory` (or is `directory` itself).
    pub fn has_program_below(&self, directory: &RootfsPath) -> bool {
        let program = |record: Record<'_>| {
            record.file_type() == Some(FileType::Regular)
                && is_program(record.format(), record.mode())
        };
        self.find(directory.as_bytes()).is_some_and(|(_, record)| program(record))
            || self.merge(directory.as_bytes()).any(|(_, record)| program(record))
    }

    /// The entries below `directory` whose name is wanted.
    pub fn named_below<'a>(
        &'a self,
        directory: &'a RootfsPath,
        is_wanted: impl Fn(&[u8]) -> bool + 'a,
    ) -> impl Iterator<Item = KnownBaseline> + 'a {
        let name = |path: &[u8]| path.rsplit(|&byte| byte == b'/').next().map(<[u8]>::to_vec);
        self.merge(directory.as_bytes())
            .filter(move |(_, record)| name(record.path()).is_some_and(|name| is_wanted(&name)))
            .filter_map(|(number, record)| self.known(number, record))
    }

    /// Everything the image holds, directories included, in the order of paths
    /// (see [`compare_paths`]): a directory is followed by what it holds.
    pub fn files(&self) -> impl Iterator<Item = KnownBaseline> + '_ {
        let root = self.find(b"/");
        root.into_iter()
            .chain(self.merge(b"/"))
            .filter_map(|(number, record)| self.known(number, record))
    }

    pub fn totals(&self) -> Totals {
        *self.totals.get_or_init(|| {
            let mut totals = Totals::default();
            for (number, (_, record)) in self.merge(b"/").enumerate() {
                if number % AT_A_TIME == AT_A_TIME - 1 {
                    self.forget();
                }
                if record.file_type() == Some(FileType::Regular) {
                    totals.files += 1;
                    totals.bytes = totals.bytes.saturating_add(record.size());
                }
            }
            self.forget();
            totals
        })
    }

    fn forget(&self) {
        self.layers.iter().for_each(|(_, layer)| layer.forget());
    }

    fn known(&self, number: usize, record: Record<'_>) -> Option<KnownBaseline> {
        match record.to_entry() {
            LayerEntry::File(entry) | LayerEntry::OpaqueDirectory(entry) => {
                Some(KnownBaseline { entry, layer: self.layers[number].0 })
            }
            LayerEntry::Whiteout(_) => None,
        }
    }

    /// The entry that can be seen at `path`, and its layer's number.
    fn find(&self, path: &[u8]) -> Option<(usize, Record<'_>)> {
        for (number, (_, layer)) in self.layers.iter().enumerate().rev() {
            match look_up(layer, path) {
                InLayer::Nothing => (),
                InLayer::Hidden => return None,
                InLayer::Entry(record) => return Some((number, record)),
            }
        }
        None
    }

    /// All that can be seen below `directory`, in the order of paths.
    fn merge(&self, directory: &[u8]) -> Merge<'_> {
        // The lowest layer of which anything can be seen below `directory`.
        let mut floor = self.layers.len();
        for (number, (_, layer)) in self.layers.iter().enumerate().rev() {
            match look_up(layer, directory) {
                InLayer::Nothing => floor = number,
                InLayer::Entry(record) if record.file_type() == Some(FileType::Directory) => {
                    floor = number;
                    if hides_below(record) {
                        break;
                    }
                }
                InLayer::Entry(_) | InLayer::Hidden => break,
            }
            if hides_inside(layer, directory) {
                break;
            }
        }
        let mut heads = BinaryHeap::with_capacity(self.layers.len() - floor);
        for (number, (_, layer)) in self.layers.iter().enumerate().skip(floor) {
            heads.extend(Head::next(number, layer, layer.range_below(directory)));
        }
        Merge { heads, covers: Vec::new() }
    }
}

/// What one layer holds at `path`.
fn look_up<'a>(layer: &'a LayerBaseline, path: &[u8]) -> InLayer<'a> {
    let entry = layer.find(path).and_then(|number| layer.record(number));
    match entry {
        Some(record) if record.file_type().is_none() => InLayer::Hidden,
        Some(record) => InLayer::Entry(record),
        None if hides_inside(layer, path) => InLayer::Hidden,
        None => InLayer::Nothing,
    }
}

/// Whether an ancestor of `path` in this layer hides what the layers below have
/// there.
fn hides_inside(layer: &LayerBaseline, path: &[u8]) -> bool {
    let ends = path.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    let ancestors =
        std::iter::once(&b"/"[..]).filter(|_| path.len() > 1).chain(ends.map(|end| &path[..end]));
    for ancestor in ancestors {
        // A layer that does not hold a directory holds nothing below it either.
        let Some(record) = layer.find(ancestor).and_then(|number| layer.record(number)) else {
            return false;
        };
        if record.file_type() != Some(FileType::Directory) || hides_below(record) {
            return true;
        }
    }
    false
}

/// The next entry of one layer.
struct Head<'a> {
    record: Record<'a>,
    number: usize,
    layer: &'a LayerBaseline,
    rest: Range<usize>,
}

impl<'a> Head<'a> {
    fn next(
        number: usize,
        layer: &'a LayerBaseline,
        mut range: Range<usize>,
    ) -> Option<Reverse<Head<'a>>> {
        let record = layer.record(range.next()?)?;
        Some(Reverse(Head { record, number, layer, rest: range }))
    }
}

/// By path, and the upper layer first.
impl Ord for Head<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        compare_paths(self.record.path(), other.record.path()).then(other.number.cmp(&self.number))
    }
}

impl PartialOrd for Head<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Head<'_> {}

/// Goes through the layers in parallel, in the order of paths.
struct Merge<'a> {
    heads: BinaryHeap<Reverse<Head<'a>>>,
    /// The paths that lead to the current one, each with the lowest layer that can be seen
    /// below it.
    covers: Vec<(&'a [u8], usize)>,
}

impl<'a> Merge<'a> {
    /// The next entry in order, whether or not it can be seen.
    fn pop(&mut self) -> Option<(usize, Record<'a>)> {
        let Reverse(Head { record, number, layer, rest }) = self.heads.pop()?;
        self.heads.extend(Head::next(number, layer, rest));
        Some((number, record))
    }
}

impl<'a> Iterator for Merge<'a> {
    type Item = (usize, Record<'a>);

    fn next(&mut self) -> Option<(usize, Record<'a>)> {
        loop {
            let (number, top) = self.pop()?;
            let path = top.path();
            while self.covers.last().is_some_and(|(cover, _)| !is_below(path, cover)) {
                self.covers.pop();
            }
            let visible = self.covers.last().map_or(0, |(_, floor)| *floor);

            // The layers at this path come one after the other, from the top.
            let mut floor = floor_below(visible, number, top);
            while let Some(Reverse(head)) = self.heads.peek()
                && head.record.path() == path
            {
                let Some((lower, record)) = self.pop() else { break };
                if lower >= floor {
                    floor = floor_below(floor, lower, record);
                }
            }
            if floor > visible {
                self.covers.push((path, floor));
            }
            if number >= visible && top.file_type().is_some() {
                return Some((number, top));
            }
        }
    }
}

/// Whether a directory hides what the layers below have in it. A layer's root never does:
/// overlayfs merges the roots when it mounts the layers.
fn hides_below(record: Record<'_>) -> bool {
    record.is_opaque() && record.path() != b"/"
}

/// The lowest layer that can be seen below `record`, which is of layer
/// `number`, when it was `floor` before.
fn floor_below(floor: usize, number: usize, record: Record<'_>) -> usize {
    match record.file_type() {
        _ if number < floor => floor,
        Some(FileType::Directory) if hides_below(record) => number,
        Some(FileType::Directory) => floor,
        // It is no directory, so its own layer has nothing below it either.
        Some(_) | None => number + 1,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::baseline::layer;
    use crate::baseline::layer::tests::{any_layer, every_path};
    use crate::model::DiffId;

    fn path(text: &str) -> RootfsPath {
        RootfsPath::new(text).unwrap()
    }

    #[test]
    fn a_layer_shows_what_no_layer_above_hides() {
        let image = ImageBaseline::from_text(&[
            "/bin/ls 755 elf ls\n/etc/motd 644 data hello\n/opt/a 755 elf a\n/var/x 755 elf x",
            "/bin/cat 755 elf cat\n- /etc/motd\nopaque /opt 755",
            "/bin/ls 755 elf other",
        ]);
        let layers = image.layers();
        let check = |number: usize, name: &str, expected: Shown| {
            assert_eq!(image.shown_of(layers[number], &path(name)), expected, "{number} {name}");
        };
        check(0, "/bin/ls", Shown::Nothing);
        check(1, "/bin/ls", Shown::Nothing);
        check(2, "/bin/ls", Shown::All);
        check(0, "/bin/cat", Shown::Nothing);
        check(0, "/bin/new", Shown::All);
        check(0, "/bin", Shown::Below);
        check(2, "/bin", Shown::All);
        check(0, "/etc/motd", Shown::Nothing);
        check(0, "/opt/a", Shown::Nothing);
        check(0, "/opt", Shown::Nothing);
        check(1, "/opt", Shown::All);
        check(0, "/var/x", Shown::All);
        let stranger = LayerId::Diff(DiffId([9; 32]));
        assert_eq!(image.shown_of(stranger, &path("/var/x")), Shown::Nothing);
    }

    /// The paths an image holds, its directories left out.
    fn names(image: &ImageBaseline) -> Vec<String> {
        let files = image.files().filter(|known| known.entry.file_type != FileType::Directory);
        files.map(|known| known.entry.path.to_string()).collect()
    }

    #[track_caller]
    fn check(layers: &[&str], expected: &[&str]) {
        let image = ImageBaseline::from_text(layers);
        assert_eq!(names(&image), expected);
        for known in image.files() {
            assert_eq!(image.get(&known.entry.path), Some(known));
        }
    }

    #[test]
    fn the_upper_layer_wins() {
        let image = ImageBaseline::from_text(&["/bin/ls 755 elf old", "/bin/ls 755 elf new"]);
        let known = image.get(&path("/bin/ls")).unwrap();
        assert_eq!(known.entry.blake3, Some(crate::baseline::blake3_of("new")));
        assert_eq!(known.layer, image.layers()[1]);
        assert_eq!(image.totals(), Totals { files: 1, bytes: 3 });
    }

    #[test]
    fn a_whiteout_hides_a_path_and_all_below_it() {
        check(&["/a/b 644 data x\n/a-b 644 data x\n/c 644 data x", "- /a"], &["/a-b", "/c"]);
    }

    #[test]
    fn an_opaque_directory_hides_what_is_below_it_in_lower_layers_only() {
        check(
            &["/a/old/x 644 data x\n/b 644 data x", "opaque /a 755\n/a/new 644 data x"],
            &["/a/new", "/b"],
        );
    }

    #[test]
    fn an_opaque_root_hides_nothing() {
        check(&["/a/b 644 data x", "opaque / 755\n/c 644 data x"], &["/a/b", "/c"]);
    }

    #[test]
    fn what_a_whiteout_hid_stays_hidden_when_the_directory_comes_back() {
        check(&["/a/b/c 644 data x", "- /a", "/a/d 644 data x"], &["/a/d"]);
    }

    #[test]
    fn a_file_over_a_directory_hides_the_subtree() {
        check(&["/a/b/c 644 data x", "/a/b 644 data y"], &["/a/b"]);
        check(&["/a/b/c 644 data x", "/a 777 symlink z", "/a/d 644 data x"], &["/a/d"]);
    }

    #[test]
    fn a_directory_over_a_file_hides_the_file() {
        check(&["/a 644 data x", "/a/b 644 data y"], &["/a/b"]);
    }

    #[test]
    fn content_is_found_only_where_it_can_be_seen() {
        let image = ImageBaseline::from_text(&[
            "/bin/a 755 elf same\n/bin/b 755 elf same\n/bin/c 755 elf same\n/x 755 elf same",
            "- /bin/b\n/bin/c 755 elf other\n/a 755 elf same",
        ]);
        let paths = |limit| -> Vec<String> {
            let found = image.with_content(&crate::baseline::blake3_of("same"), limit);
            found.iter().map(|known| known.entry.path.to_string()).collect()
        };
        assert_eq!(paths(10), ["/a", "/bin/a", "/x"]);
        assert_eq!(paths(2), ["/a", "/bin/a"]);
        assert_eq!(image.with_content(&crate::baseline::blake3_of("none"), 10), []);
    }

    #[test]
    fn a_program_below_a_directory_counts_only_if_it_can_be_seen() {
        let image = ImageBaseline::from_text(&[
            "/usr/bin/ls 755 elf x\n/etc/x 755 data x\n/opt/tool/run 755 script x",
            "- /opt/tool/run\n/srv/a 644 script x",
        ]);
        let has = |text| image.has_program_below(&path(text));
        assert!(has("/") && has("/usr") && has("/usr/bin") && has("/usr/bin/ls"));
        assert!(!has("/etc") && !has("/opt") && !has("/srv") && !has("/none") && !has("/us"));
    }

    /// What overlayfs shows, computed the slow way: each layer is laid over those below it.
    fn model(layers: &[Vec<LayerEntry>]) -> Vec<(usize, FileEntry)> {
        let mut shown: BTreeMap<RootfsPath, (usize, FileEntry)> = BTreeMap::new();
        for (number, entries) in layers.iter().enumerate() {
            // In the order of paths, so that what an entry hides is of lower layers.
            let mut entries: Vec<&LayerEntry> = entries.iter().collect();
            entries.sort_by_key(|entry| entry.path().clone());
            for entry in entries {
                let path = entry.path();
                let (shows, merges) = match entry {
                    LayerEntry::Whiteout(_) => (None, false),
                    LayerEntry::OpaqueDirectory(file) => (Some(file), false),
                    LayerEntry::File(file) => (Some(file), file.file_type == FileType::Directory),
                };
                if !merges {
                    shown.retain(|known, _| !known.is_within(path));
                }
                if let Some(file) = shows {
                    shown.insert(path.clone(), (number, file.clone()));
                }
            }
        }
        let mut shown: Vec<_> = shown.into_values().collect();
        shown.sort_by(|(_, a), (_, b)| compare_paths(a.path.as_bytes(), b.path.as_bytes()));
        shown
    }

    proptest! {
        #[test]
        fn merging_shows_what_overlayfs_would(
            layers in proptest::collection::vec(any_layer(), 0..5),
        ) {
            let id = |number: usize| LayerId::Diff(DiffId([u8::try_from(number).unwrap(); 32]));
            let known = |(number, entry): &(usize, FileEntry)| KnownBaseline {
                entry: entry.clone(),
                layer: id(*number),
            };
            let image = ImageBaseline::new(
                ChainId([0; 32]),
                layers.iter().enumerate().map(|(number, entries)| {
                    let bytes = layer::write(id(number), entries.clone(), Vec::new()).unwrap();
                    (id(number), Arc::new(LayerBaseline::from_bytes(bytes).unwrap()))
                }).collect(),
            );
            let shown = model(&layers);

            let all: Vec<KnownBaseline> = shown.iter().map(known).collect();
            prop_assert_eq!(image.files().collect::<Vec<_>>(), all.clone());
            for path in every_path() {
                let expected = all.iter().find(|known| known.entry.path == path).cloned();
                prop_assert_eq!(image.get(&path), expected);
                let programs = all.iter().any(|known| {
                    known.entry.file_type == FileType::Regular
                        && is_program(known.entry.format, known.entry.mode)
                        && known.entry.path.is_within(&path)
                });
                prop_assert_eq!(image.has_program_below(&path), programs, "{}", path);
            }
            for word in ["x", "y", "", "none"] {
                let hash = crate::baseline::blake3_of(word);
                let expected: Vec<KnownBaseline> =
                    all.iter().filter(|known| known.entry.blake3 == Some(hash)).cloned().collect();
                prop_assert_eq!(&image.with_content(&hash, usize::MAX), &expected);
                prop_assert_eq!(&image.with_content(&hash, 1)[..], &expected[..expected.len().min(1)]);
            }
            let files: Vec<_> =
                all.iter().filter(|known| known.entry.file_type == FileType::Regular).collect();
            let totals = Totals {
                files: files.len() as u64,
                bytes: files.iter().map(|known| known.entry.size).sum(),
            };
            prop_assert_eq!(image.totals(), totals);
        }
    }
}
