//! Compares a layer's baseline with entries that were found elsewhere: in the layer's
//! directory, or in its blob.
//!
//! Pure. `verify` and `recorder` decide what a difference means.

use std::cmp::Ordering;

use super::layer::{FileEntry, LayerBaseline, LayerEntry, Record, compare_paths};
use super::types::{LayerDifference, MAX_DIFFERENCES};
use crate::model::RootfsPath;

/// The differences between a baseline and what was found, in the order of paths and at
/// most [`MAX_DIFFERENCES`] of them; and how many there are in all.
///
/// `found` may be in any order, and names no path twice. No layer lies below the `bottom`
/// layer of an image. So whiteouts and opaque marks are ignored there: containerd unpacks
/// that layer without them.
pub fn compare(
    expected: &LayerBaseline,
    found: &[LayerEntry],
    bottom: bool,
) -> (Vec<LayerDifference>, u64) {
    let mut sorted: Vec<&LayerEntry> = found.iter().collect();
    sorted.sort_unstable_by(|a, b| compare_paths(a.path().as_bytes(), b.path().as_bytes()));
    let mut comparison = Comparison::new(expected, bottom);
    for entry in sorted {
        comparison.found(entry);
    }
    comparison.finish()
}

/// A comparison with entries that come one by one, in the order of paths.
#[derive(Debug)]
pub struct Comparison<'a> {
    expected: &'a LayerBaseline,
    /// The record that comes next.
    next: usize,
    bottom: bool,
    differences: Vec<LayerDifference>,
    total: u64,
}

impl<'a> Comparison<'a> {
    pub fn new(expected: &'a LayerBaseline, bottom: bool) -> Comparison<'a> {
        Comparison { expected, next: 0, bottom, differences: Vec::new(), total: 0 }
    }

    /// Takes the next entry that was found. Its path must come after all paths before it.
    pub fn found(&mut self, entry: &LayerEntry) {
        if self.bottom && matches!(entry, LayerEntry::Whiteout(_)) {
            return;
        }
        let path = entry.path();
        while let Some(record) = self.expected.record(self.next) {
            match compare_paths(record.path(), path.as_bytes()) {
                Ordering::Less => self.missing(record),
                Ordering::Equal => {
                    self.next += 1;
                    let known = record.to_entry();
                    if self.bottom && matches!(known, LayerEntry::Whiteout(_)) {
                        break;
                    }
                    if !self.is_same(&known, entry) {
                        self.differ(path, Some(known), Some(entry.clone()));
                    }
                    return;
                }
                Ordering::Greater => break,
            }
        }
        self.differ(path, None, Some(entry.clone()));
    }

    /// Ends the comparison; returns the differences and how many there are.
    pub fn finish(mut self) -> (Vec<LayerDifference>, u64) {
        while let Some(record) = self.expected.record(self.next) {
            self.missing(record);
        }
        (self.differences, self.total)
    }

    /// Reports the next record as missing.
    fn missing(&mut self, record: Record<'_>) {
        self.next += 1;
        let known = record.to_entry();
        if !(self.bottom && matches!(known, LayerEntry::Whiteout(_))) {
            self.differ(&known.path().clone(), Some(known), None);
        }
    }

    fn differ(
        &mut self,
        path: &RootfsPath,
        expected: Option<LayerEntry>,
        found: Option<LayerEntry>,
    ) {
        self.total += 1;
        if self.differences.len() < MAX_DIFFERENCES {
            self.differences.push(LayerDifference { path: path.clone(), expected, found });
        }
    }

    fn is_same(&self, known: &LayerEntry, found: &LayerEntry) -> bool {
        match (file_of(known), file_of(found)) {
            (Some(known), Some(found)) if self.bottom => known == found,
            _ => known == found,
        }
    }
}

fn file_of(entry: &LayerEntry) -> Option<&FileEntry> {
    match entry {
        LayerEntry::Whiteout(_) => None,
        LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) => Some(file),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::baseline::layer;
    use crate::baseline::layer::tests::any_layer;
    use crate::model::{DiffId, LayerId};

    fn layer_of(entries: Vec<LayerEntry>) -> LayerBaseline {
        let id = LayerId::Diff(DiffId([1; 32]));
        LayerBaseline::from_bytes(layer::write(id, entries, Vec::new()).unwrap()).unwrap()
    }

    fn entries(text: &str) -> Vec<LayerEntry> {
        crate::baseline::text::entries(text, &mut BTreeMap::new())
    }

    /// The paths that differ, each with `-` for gone, `+` for new and `*` for changed.
    #[track_caller]
    fn check(expected: &str, found: &str, bottom: bool, differences: &[&str]) {
        let (reported, total) = compare(&layer_of(entries(expected)), &entries(found), bottom);
        let reported: Vec<String> = reported
            .iter()
            .map(|difference| {
                let sign = match (&difference.expected, &difference.found) {
                    (Some(_), None) => '-',
                    (None, Some(_)) => '+',
                    (Some(_), Some(_)) => '*',
                    (None, None) => '?',
                };
                format!("{sign}{}", difference.path)
            })
            .collect();
        assert_eq!(reported, differences);
        assert_eq!(total, differences.len() as u64);
    }

    #[test]
    fn what_is_as_it_should_be_is_no_difference() {
        let text = "/bin/ls 755 elf ls\n/bin/sh 777 symlink ls\nopaque /etc 755\n- /var";
        check(text, text, false, &[]);
        check(text, text, true, &[]);
    }

    #[test]
    fn content_mode_capability_type_and_target_differ() {
        check(
            "/a 755 elf x\n/b 755 elf x\n/c 755 elf x\n/d 755 elf x\n/e 777 symlink x\n/f 755 elf x",
            "/a 755 elf y\n/b 4755 elf x\n/c 755 elf x cap=raw\n/d 777 symlink x\n/e 777 symlink y\n/f 755 elf x",
            false,
            &["*/a", "*/b", "*/c", "*/d", "*/e"],
        );
    }

    #[test]
    fn what_is_gone_and_what_is_new_is_reported_in_the_order_of_paths() {
        check(
            "/a/gone 644 data x\n/a-b 644 data x\n/z 644 data x",
            "/a/new 644 data x\n/a-b 644 data x\n/b 644 data x",
            false,
            &["-/a/gone", "+/a/new", "+/b", "-/z"],
        );
    }

    #[test]
    fn a_whiteout_matters_unless_nothing_is_below() {
        check("- /a", "", false, &["-/a"]);
        check("- /a", "", true, &[]);
        check("", "- /a", true, &[]);
        check("- /a\n/b 644 data x", "/a 644 data x\n- /b", false, &["*/a", "*/b"]);
        // Something is where the bottom layer has nothing, and the other way around.
        check("- /a\n/b 644 data x", "/a 644 data x\n- /b", true, &["+/a", "-/b"]);
    }

    #[test]
    fn an_opaque_mark_matters_unless_nothing_is_below() {
        check("opaque /a 755", "/a 755 dir", false, &["*/a"]);
        check("opaque /a 755", "/a 755 dir", true, &[]);
        check("/a 755 dir", "opaque /a 755", true, &[]);
        check("/a 755 dir", "opaque /a 700", true, &["*/a"]);
    }

    #[test]
    fn the_list_of_differences_is_bounded_and_their_number_is_not() {
        let many: String =
            (0..MAX_DIFFERENCES + 5).map(|number| format!("/{number:05} 644 data x\n")).collect();
        let (reported, total) = compare(&layer_of(entries("")), &entries(&many), false);
        assert_eq!((reported.len(), total), (MAX_DIFFERENCES, MAX_DIFFERENCES as u64 + 5));
    }

    proptest! {
        #[test]
        fn every_path_that_differs_is_reported_once(
            expected in any_layer(), mut found in any_layer(), turn in any::<prop::sample::Index>(),
        ) {
            let by_path = |entries: &[LayerEntry]| -> BTreeMap<RootfsPath, LayerEntry> {
                entries.iter().map(|entry| (entry.path().clone(), entry.clone())).collect()
            };
            let (before, after) = (by_path(&expected), by_path(&found));
            let mut paths: Vec<_> = before.keys().chain(after.keys()).cloned().collect();
            paths.sort_by(|a, b| compare_paths(a.as_bytes(), b.as_bytes()));
            paths.dedup();
            let differences: Vec<_> = paths
                .into_iter()
                .map(|path| LayerDifference {
                    expected: before.get(&path).cloned(),
                    found: after.get(&path).cloned(),
                    path,
                })
                .filter(|difference| difference.expected != difference.found)
                .collect();
            let middle = turn.index(found.len());
            found.rotate_left(middle);
            let (reported, total) = compare(&layer_of(expected.clone()), &found, false);
            prop_assert_eq!(total, differences.len() as u64);
            prop_assert_eq!(reported, differences);
            prop_assert_eq!(compare(&layer_of(expected.clone()), &expected, true), (vec![], 0));
        }
    }
}
