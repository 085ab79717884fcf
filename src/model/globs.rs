//! Patterns of paths in a container, compiled once.
//!
//! The settings have them (`watch.persistence`); `detect` and `watch` match
//! paths of a container against them. Nothing here resolves a link.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;

use globset::{GlobBuilder, GlobSet};
use serde::{Deserialize, Serialize};

use super::path::RootfsPath;

/// Shell patterns of whole paths: `*` and `?` stay within one directory, `**`
/// does not.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(into = "Vec<String>", try_from = "Vec<String>")]
pub struct PathGlobs {
    patterns: Vec<String>,
    compiled: Arc<GlobSet>,
    /// The directories above the matching paths, as far as the patterns name them.
    above: Arc<GlobSet>,
}

impl PathGlobs {
    /// The error names the pattern and the fault.
    pub fn new(patterns: Vec<String>) -> Result<PathGlobs, String> {
        let mut set = GlobSet::builder();
        let mut above = GlobSet::builder();
        for pattern in &patterns {
            if !pattern.starts_with('/') && !pattern.starts_with("**/") {
                return Err(format!("the pattern `{pattern}` starts with neither `/` nor `**/`"));
            }
            let glob = GlobBuilder::new(pattern).literal_separator(true).build();
            set.add(glob.map_err(|err| format!("the pattern `{pattern}` is wrong: {err}"))?);
            for directory in directories_above(pattern) {
                // Cut inside of brackets, it may be no pattern.
                if let Ok(glob) = GlobBuilder::new(directory).literal_separator(true).build() {
                    above.add(glob);
                }
            }
        }
        let compiled = set.build().map_err(|err| format!("the patterns are too much: {err}"))?;
        let above = above.build().map_err(|err| format!("the patterns are too much: {err}"))?;
        Ok(PathGlobs { patterns, compiled: Arc::new(compiled), above: Arc::new(above) })
    }

    /// Whether the patterns name this path as a directory above matching paths: `/etc` and
    /// `/etc/cron.d` for `/etc/cron.d/*`.
    pub fn leads_to(&self, path: &RootfsPath) -> bool {
        self.above.is_match(Path::new(OsStr::from_bytes(path.as_bytes())))
    }

    /// The paths that the patterns name without a wildcard, and the directories above
    /// matching paths that are named without one.
    pub fn literal(&self) -> BTreeSet<String> {
        let all = self.patterns.iter().flat_map(|pattern| {
            directories_above(pattern).chain(std::iter::once(pattern.as_str()))
        });
        all.filter(|path| path.starts_with('/') && !path.contains(['*', '?', '[', '{', '\\']))
            .map(str::to_owned)
            .collect()
    }

    pub fn matches(&self, path: &RootfsPath) -> bool {
        self.compiled.is_match(Path::new(OsStr::from_bytes(path.as_bytes())))
    }
}

/// Every beginning of a pattern that ends before a `/`, except `**`, which names no
/// directory.
fn directories_above(pattern: &str) -> impl Iterator<Item = &str> {
    pattern
        .char_indices()
        .filter(|(_, character)| *character == '/')
        .map(|(at, _)| &pattern[..at])
        .filter(|directory| !matches!(*directory, "" | "**" | "/**"))
}

impl PartialEq for PathGlobs {
    fn eq(&self, other: &PathGlobs) -> bool {
        self.patterns == other.patterns
    }
}

impl From<PathGlobs> for Vec<String> {
    fn from(globs: PathGlobs) -> Vec<String> {
        globs.patterns
    }
}

impl TryFrom<Vec<String>> for PathGlobs {
    type Error = String;

    fn try_from(patterns: Vec<String>) -> Result<PathGlobs, String> {
        PathGlobs::new(patterns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(pattern: &str, path: &[u8], expected: bool) {
        let globs = PathGlobs::new(vec![pattern.to_owned()]).unwrap();
        assert_eq!(globs.matches(&RootfsPath::new(path).unwrap()), expected, "{pattern} {path:?}");
    }

    #[test]
    fn a_star_stays_in_its_directory() {
        check("/etc/cron.d/*", b"/etc/cron.d/a", true);
        check("/etc/cron.d/*", b"/etc/cron.d/a/b", false);
        check("/etc/cron.*/**", b"/etc/cron.daily/a/b", true);
        check("/etc/cron.*/**", b"/etc/crontab", false);
        check("/home/*/.bashrc", b"/home/a/.bashrc", true);
        check("/home/*/.bashrc", b"/home/a/b/.bashrc", false);
        check("**/.ssh/authorized_keys", b"/root/.ssh/authorized_keys", true);
        check("**/.ssh/authorized_keys", b"/.ssh/authorized_keys", true);
        check("/etc/passwd", b"/srv/etc/passwd", false);
    }

    #[test]
    fn x15_the_directories_above_are_known() {
        let globs = ["/etc/cron.*/**", "/home/*/.bashrc", "**/.ssh/rc", "/etc/{a/b,c}/d"];
        let globs = PathGlobs::new(globs.map(str::to_owned).into()).unwrap();
        let leads = |path: &str| globs.leads_to(&RootfsPath::new(path).unwrap());
        for above in ["/etc", "/etc/cron.d", "/home", "/home/a", "/.ssh", "/root/.ssh"] {
            assert!(leads(above), "{above}");
        }
        for other in ["/", "/etc/crontab", "/home/a/b", "/root", "/tmp", "/tmp/etc"] {
            assert!(!leads(other), "{other}");
        }
    }

    #[test]
    fn names_need_not_be_text() {
        check("/etc/cron.d/*", b"/etc/cron.d/\xff\n", true);
    }

    #[test]
    fn a_pattern_that_cannot_match_is_refused_by_name() {
        for pattern in ["etc/passwd", "/etc/[", ""] {
            let err = PathGlobs::new(vec![pattern.to_owned()]).unwrap_err();
            assert!(err.contains(&format!("`{pattern}`")), "{err}");
        }
    }
}
