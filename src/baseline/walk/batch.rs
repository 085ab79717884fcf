//! The units of work that the walk hands to the pool's threads, and what comes back.

use super::reading::Moment;
use crate::baseline::layer::LayerEntry;
use crate::model::{FileTime, RootfsPath};

/// How many files one thread takes at a time.
pub(super) const BATCH: usize = 32;

/// Something to be read, or handed on, in its turn.
pub(super) enum Item {
    /// A directory that was read already, with its ctime.
    Directory { entry: LayerEntry, changed: FileTime },
    /// Anything but a directory. `unchanged`: no directory on the way to it has changed
    /// since the baseline was equal.
    File { path: RootfsPath, regular: bool, unchanged: bool },
    /// The end of a directory: all that is in it comes before this.
    End { path: RootfsPath, before: Moment },
}

/// The items that one thread takes at a time.
#[derive(Default)]
pub(super) struct Batch {
    pub(super) items: Vec<Item>,
    /// About how much memory its entries take.
    pub(super) cost: usize,
}

impl Batch {
    pub(super) fn push(&mut self, item: Item) {
        let path = match &item {
            Item::Directory { entry, .. } => entry.path(),
            Item::File { path, .. } | Item::End { path, .. } => path,
        };
        self.cost += size_of::<LayerEntry>() + size_of::<Item>() + path.as_bytes().len();
        self.items.push(item);
    }
}

/// The result of reading a batch.
#[derive(Default)]
pub(super) struct BatchResult {
    pub(super) entries: Vec<LayerEntry>,
    /// Directories that end in it, and their state when they were listed.
    pub(super) ends: Vec<(RootfsPath, Moment)>,
    pub(super) newest_change: Option<FileTime>,
}
