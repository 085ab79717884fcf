//! How one image differs from another, file by file.
//!
//! Pure: it compares two [`ImageBaseline`]s and keeps nothing. The CLI and the API
//! show the result.

use std::cmp::Ordering;
use std::iter::Peekable;

use super::layer::{FileEntry, compare_paths};
use super::merge::{ImageBaseline, KnownBaseline};

/// One path at which two images differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageDifference {
    /// Only the second image has it.
    Added(KnownBaseline),
    /// Only the first image has it.
    Removed(KnownBaseline),
    /// The content, type, link target or device differs.
    Modified(KnownBaseline, KnownBaseline),
    /// Only the mode, owner or capability differs.
    Metadata(KnownBaseline, KnownBaseline),
}

/// The differences between `first` and `second`, in the order of paths. Which layer
/// holds a file is no difference.
pub fn diff<'a>(
    first: &'a ImageBaseline,
    second: &'a ImageBaseline,
) -> impl Iterator<Item = ImageDifference> + 'a {
    Diff { first: first.files().peekable(), second: second.files().peekable() }
}

struct Diff<A: Iterator<Item = KnownBaseline>, B: Iterator<Item = KnownBaseline>> {
    first: Peekable<A>,
    second: Peekable<B>,
}

impl<A: Iterator<Item = KnownBaseline>, B: Iterator<Item = KnownBaseline>> Iterator for Diff<A, B> {
    type Item = ImageDifference;

    fn next(&mut self) -> Option<ImageDifference> {
        loop {
            let order = match (self.first.peek(), self.second.peek()) {
                (None, None) => return None,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(first), Some(second)) => {
                    compare_paths(first.entry.path.as_bytes(), second.entry.path.as_bytes())
                }
            };
            match order {
                Ordering::Less => return self.first.next().map(ImageDifference::Removed),
                Ordering::Greater => return self.second.next().map(ImageDifference::Added),
                Ordering::Equal => {
                    let (first, second) = (self.first.next()?, self.second.next()?);
                    if first.entry == second.entry {
                        continue;
                    }
                    return Some(if same_content(&first.entry, &second.entry) {
                        ImageDifference::Metadata(first, second)
                    } else {
                        ImageDifference::Modified(first, second)
                    });
                }
            }
        }
    }
}

fn same_content(first: &FileEntry, second: &FileEntry) -> bool {
    first.file_type == second.file_type
        && first.blake3 == second.blake3
        && first.link_target == second.link_target
        && first.device == second.device
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(first: &str, second: &str, expected: &[&str]) {
        let (first, second) =
            (&ImageBaseline::from_text(&[first]), ImageBaseline::from_text(&[second]));
        let differences: Vec<String> = diff(first, &second)
            .map(|difference| match difference {
                ImageDifference::Added(known) => format!("added {}", known.entry.path),
                ImageDifference::Removed(known) => format!("removed {}", known.entry.path),
                ImageDifference::Modified(a, b) => {
                    assert_eq!(a.entry.path, b.entry.path);
                    format!("modified {}", a.entry.path)
                }
                ImageDifference::Metadata(a, b) => {
                    assert_eq!(a.entry.path, b.entry.path);
                    format!("metadata {}", a.entry.path)
                }
            })
            .collect();
        assert_eq!(differences, expected);
    }

    #[test]
    fn equal_images_do_not_differ() {
        check("/bin/ls 755 elf ls", "/bin/ls 755 elf ls", &[]);
    }

    #[test]
    fn every_kind_of_difference_is_reported_in_the_order_of_paths() {
        check(
            "/a 644 data x
             /bin 755 dir
             /bin/ls 755 elf ls
             /bin/ping 755 elf ping
             /bin/sh 755 elf sh
             /bin-x 644 data x
             /l 777 symlink a",
            "/a 600 data x
             /bin 755 dir
             /bin/ls 755 elf LS
             /bin/ping 755 elf ping cap=raw
             /bin/zz 755 elf zz
             /bin-x 644 data x
             /l 777 symlink b",
            &[
                "metadata /a",
                "modified /bin/ls",
                "metadata /bin/ping",
                "removed /bin/sh",
                "added /bin/zz",
                "modified /l",
            ],
        );
    }

    #[test]
    fn a_file_that_became_a_directory_is_modified() {
        check("/a 644 data x", "/a/b 644 data x", &["modified /a", "added /a/b"]);
    }

    #[test]
    fn the_layer_that_holds_a_file_makes_no_difference() {
        let one = ImageBaseline::from_text(&["/a 644 data x\n/b 644 data y"]);
        let two = ImageBaseline::from_text(&["/a 644 data x", "/b 644 data y"]);
        assert_eq!(diff(&one, &two).count(), 0);
    }
}
