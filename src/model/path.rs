//! Paths inside a container, and their form in JSON.
//!
//! A [`RootfsPath`] is normalised by its text alone. It does not follow links and does not
//! ask a filesystem; `sys::door` and `watch` do that.

use std::fmt;

use base64::Engine as _;
use serde::{Deserialize, Serialize};

use super::printable::printable;

/// A path inside a container's root filesystem: absolute, normalised, and not
/// necessarily UTF-8.
///
/// An upperdir has `usr/bin/ls`, fanotify reports `/usr/bin/ls`: both become the same
/// value.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "PathJson", try_from = "PathJson")]
pub struct RootfsPath {
    // Invariant: starts with `/`, has no empty, `.` or `..` component, no NUL,
    // and ends with `/` only if it is the root.
    bytes: Box<[u8]>,
}

/// Why bytes cannot be a path inside a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostilePath {
    #[error("the path climbs with `..`")]
    Climbs,
    #[error("the path holds a NUL byte")]
    HasNul,
    #[error("`path_bytes` is not base64")]
    NotBase64,
}

impl RootfsPath {
    /// Normalises `raw`, which may lack the leading slash.
    pub fn new(raw: impl AsRef<[u8]>) -> Result<RootfsPath, HostilePath> {
        let raw = raw.as_ref();
        let mut bytes = Vec::with_capacity(raw.len() + 1);
        for component in raw.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => (),
                b".." => return Err(HostilePath::Climbs),
                name if name.contains(&0) => return Err(HostilePath::HasNul),
                name => {
                    bytes.push(b'/');
                    bytes.extend_from_slice(name);
                }
            }
        }
        if bytes.is_empty() {
            bytes.push(b'/');
        }
        Ok(RootfsPath { bytes: bytes.into() })
    }

    pub fn root() -> RootfsPath {
        RootfsPath { bytes: Box::new(*b"/") }
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The path without its leading slash, for look-ups below a directory's fd.
    /// Empty for the root.
    pub fn relative(&self) -> &[u8] {
        &self.bytes[1..]
    }

    /// The last component; empty for the root.
    pub fn file_name(&self) -> &[u8] {
        let start = self.bytes.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
        &self.bytes[start..]
    }

    /// The directory that holds this path; `None` for the root.
    pub fn parent(&self) -> Option<RootfsPath> {
        if self.bytes.len() == 1 {
            return None;
        }
        let slash = self.bytes.iter().rposition(|&byte| byte == b'/')?;
        Some(RootfsPath { bytes: self.bytes[..slash.max(1)].into() })
    }

    /// This directory's entry `name`, which must be one plain component.
    pub fn join(&self, name: &[u8]) -> Result<RootfsPath, HostilePath> {
        let mut raw = self.bytes.to_vec();
        raw.push(b'/');
        raw.extend_from_slice(name);
        RootfsPath::new(raw)
    }

    /// The target of a symlink at this path, by its text alone.
    pub fn resolve(&self, target: &[u8]) -> Option<RootfsPath> {
        let base = if target.starts_with(b"/") { RootfsPath::root() } else { self.parent()? };
        target.split(|&byte| byte == b'/').try_fold(base, |at, component| match component {
            b"" | b"." => Some(at),
            b".." => Some(at.parent().unwrap_or_else(RootfsPath::root)),
            name => at.join(name).ok(),
        })
    }

    /// Whether `self` is `directory` or lies below it.
    pub fn is_within(&self, directory: &RootfsPath) -> bool {
        if directory.bytes.len() == 1 {
            return true;
        }
        self.bytes
            .strip_prefix(&directory.bytes[..])
            .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }
}

/// Escaped: a file name that an attacker chose can neither move the cursor nor pass for
/// another file's name.
impl fmt::Display for RootfsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&printable(&self.bytes))
    }
}

impl fmt::Debug for RootfsPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// A path in JSON: text, and the bytes in base64 if the path is not UTF-8.
#[derive(Serialize, Deserialize)]
struct PathJson {
    path: String,
    #[serde(default)]
    path_bytes: Option<String>,
}

impl From<RootfsPath> for PathJson {
    fn from(path: RootfsPath) -> PathJson {
        match str::from_utf8(&path.bytes) {
            Ok(text) => PathJson { path: text.to_owned(), path_bytes: None },
            Err(_) => PathJson {
                path: printable(&path.bytes),
                path_bytes: Some(base64::engine::general_purpose::STANDARD.encode(&path.bytes)),
            },
        }
    }
}

impl TryFrom<PathJson> for RootfsPath {
    type Error = HostilePath;

    fn try_from(json: PathJson) -> Result<RootfsPath, HostilePath> {
        match json.path_bytes {
            None => RootfsPath::new(json.path),
            Some(encoded) => RootfsPath::new(
                base64::engine::general_purpose::STANDARD
                    .decode(encoded)
                    .map_err(|_| HostilePath::NotBase64)?,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(raw: &str, expected: &str) {
        assert_eq!(RootfsPath::new(raw).unwrap().as_bytes(), expected.as_bytes(), "{raw:?}");
    }

    #[test]
    fn every_spelling_becomes_one_path() {
        check("usr/bin/ls", "/usr/bin/ls");
        check("./usr//bin/./ls", "/usr/bin/ls");
        check("/usr/bin/ls/", "/usr/bin/ls");
        check("", "/");
        check("/", "/");
    }

    #[test]
    fn a_path_that_climbs_is_refused() {
        assert_eq!(RootfsPath::new("/a/../b"), Err(HostilePath::Climbs));
        assert_eq!(RootfsPath::new("a\0b"), Err(HostilePath::HasNul));
    }

    #[test]
    fn names_cannot_move_the_cursor_or_hide() {
        let path = RootfsPath::new(b"/tmp/\x1b[2J\xff\xe2\x80\xaea\\".as_slice()).unwrap();
        assert_eq!(path.to_string(), "/tmp/\\u{1b}[2J\\xff\\u{202e}a\\\\");
    }

    #[test]
    fn parent_and_name() {
        let path = RootfsPath::new("/usr/bin/ls").unwrap();
        assert_eq!(path.file_name(), b"ls");
        assert_eq!(path.parent(), Some(RootfsPath::new("/usr/bin").unwrap()));
        assert_eq!(RootfsPath::new("/usr").unwrap().parent(), Some(RootfsPath::root()));
        assert_eq!(RootfsPath::root().parent(), None);
        assert!(path.is_within(&RootfsPath::new("/usr").unwrap()));
        assert!(!path.is_within(&RootfsPath::new("/us").unwrap()));
    }

    proptest::proptest! {
        #[test]
        fn normalising_twice_changes_nothing(raw: Vec<u8>) {
            if let Ok(once) = RootfsPath::new(&raw) {
                proptest::prop_assert_eq!(RootfsPath::new(once.as_bytes()), Ok(once));
            }
        }

        #[test]
        fn json_keeps_every_byte(raw: Vec<u8>) {
            if let Ok(path) = RootfsPath::new(&raw) {
                let json = serde_json::to_string(&path).unwrap();
                proptest::prop_assert_eq!(serde_json::from_str::<RootfsPath>(&json).unwrap(), path);
            }
        }
    }
}
