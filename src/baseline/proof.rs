//! How far a layer's baseline is proved, and which directories equal it.
//!
//! Values only, and their JSON: the store keeps them in `proofs/`, the recorder changes
//! them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::layer::{LayerEntry, parse_layer_id};
use super::types::{KnownBy, LayerDifference};
use crate::model::{Blake3Hash, ChainId, FileTime, FileType, LayerId, printable};

/// What is known of one layer's baseline besides its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerProof {
    /// The checksum of the layer's file. The proof is valid for this file only.
    pub checksum: Blake3Hash,
    /// The stack whose top layer it was when it was recorded. Directories that its archive
    /// only implies have the owner and mode that this stack gives them.
    pub recorded_in: ChainId,
    /// Whether the file has the whiteouts and opaque marks of the layer. The directory of an
    /// image's bottom layer has none: containerd unpacks it without them.
    pub hides: bool,
    pub known_by: KnownBy,
    /// The digest of the blob that proved it.
    pub blob: Option<String>,
    pub verified_at: Option<Timestamp>,
    /// Why it is not verified, for people.
    pub not_verified: Option<String>,
    /// Directories that were found equal to the file.
    pub directories: Vec<Checked>,
}

/// A directory whose content was compared with a layer's file and equals it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    pub path: PathBuf,
    /// The newest ctime of anything in it.
    pub newest_change: FileTime,
    /// When all of it was last read; the moment before the first file was.
    pub checked_at: Timestamp,
    /// When nothing in it was newer than `newest_change`, except files that were read then:
    /// the moment before the first file was examined.
    pub unchanged_at: Timestamp,
}

impl LayerProof {
    pub fn new(checksum: Blake3Hash, recorded_in: ChainId) -> LayerProof {
        LayerProof {
            checksum,
            recorded_in,
            hides: true,
            known_by: KnownBy::Snapshot,
            blob: None,
            verified_at: None,
            not_verified: None,
            directories: Vec::new(),
        }
    }

    pub fn directory(&self, path: &Path) -> Option<&Checked> {
        self.directories.iter().find(|directory| directory.path == path)
    }

    /// Replaces what was known of that directory.
    pub fn set_directory(&mut self, checked: Checked) {
        self.forget_directory(&checked.path);
        self.directories.push(checked);
    }

    pub fn forget_directory(&mut self, path: &Path) {
        self.directories.retain(|directory| directory.path != path);
    }
}

/// The kernel stamps files with the time of its last tick: at 100 Hz, up to 10 ms
/// ago. Twice that, to be sure.
const TICK: Duration = Duration::from_millis(20);

impl Checked {
    /// A change that was not compared has this ctime or a later one.
    pub fn seen_until(&self) -> FileTime {
        file_time(self.unchanged_at.saturating_sub(TICK).unwrap_or(Timestamp::MIN))
    }
}

/// The time up to which several directories together equal the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Since {
    pub time: FileTime,
    /// The newest change in any of them. If it is later than `time`, a directory that was
    /// not compared since keeps `time` back.
    pub newest: FileTime,
}

/// `None` if one of them was never compared, or if there are none.
pub fn unchanged_since<'a>(
    directories: impl IntoIterator<Item = Option<&'a Checked>>,
) -> Option<Since> {
    let mut since: Option<Since> = None;
    let mut seen_until: Option<FileTime> = None;
    for directory in directories {
        let directory = directory?;
        let seen = directory.seen_until();
        let seen = seen_until.map_or(seen, |until| until.min(seen));
        let newest = since
            .map_or(directory.newest_change, |since| since.newest.max(directory.newest_change));
        seen_until = Some(seen);
        since = Some(Since { time: newest.min(seen), newest });
    }
    since
}

fn file_time(time: Timestamp) -> FileTime {
    let nanoseconds = time.as_nanosecond();
    let second = 1_000_000_000;
    FileTime {
        // A timestamp is within ten thousand years.
        seconds: i64::try_from(nanoseconds.div_euclid(second)).unwrap_or(i64::MIN),
        nanoseconds: u32::try_from(nanoseconds.rem_euclid(second)).unwrap_or(0),
    }
}

/// Whether two entries differ in nothing but the owner and mode of a directory.
///
/// A directory that an archive only implies has these from the layers below. So in another
/// stack than the recorded one, they may differ.
pub fn may_be_implied(difference: &LayerDifference) -> bool {
    let (Some(LayerEntry::File(expected)), Some(LayerEntry::File(found))) =
        (&difference.expected, &difference.found)
    else {
        return false;
    };
    let mut adjusted = found.clone();
    (adjusted.mode, adjusted.uid, adjusted.gid) = (expected.mode, expected.uid, expected.gid);
    expected.file_type == FileType::Directory && adjusted == *expected
}

// ---- proofs/*.json

const SCHEMA: &str = "driftd.proof/v1";

#[derive(Serialize, Deserialize)]
struct ProofJson {
    schema: String,
    layer: String,
    checksum: Blake3Hash,
    recorded_in: ChainId,
    hides: bool,
    known_by: KnownBy,
    blob: Option<String>,
    verified_at: Option<Timestamp>,
    not_verified: Option<String>,
    directories: Vec<Checked>,
}

/// A proof as JSON. Directories whose paths are no UTF-8 are left out: they are compared
/// again.
pub(super) fn to_json(id: LayerId, proof: &LayerProof) -> Vec<u8> {
    let directories =
        proof.directories.iter().filter(|directory| directory.path.to_str().is_some());
    let json = ProofJson {
        schema: SCHEMA.into(),
        layer: id.to_string(),
        checksum: proof.checksum,
        recorded_in: proof.recorded_in,
        hides: proof.hides,
        known_by: proof.known_by,
        blob: proof.blob.clone(),
        verified_at: proof.verified_at,
        not_verified: proof.not_verified.clone(),
        directories: directories.cloned().collect(),
    };
    serde_json::to_vec_pretty(&json).expect("only text is a key, and every path is text")
}

pub(super) fn from_json(json: &[u8]) -> Result<(LayerId, LayerProof), String> {
    let json: ProofJson = serde_json::from_slice(json).map_err(|err| err.to_string())?;
    if json.schema != SCHEMA {
        let schema = printable(json.schema.as_bytes());
        return Err(format!("its schema is {schema}; this driftd knows {SCHEMA}"));
    }
    let id = parse_layer_id(&json.layer)
        .ok_or_else(|| format!("`{}` is no layer", printable(json.layer.as_bytes())))?;
    let proof = LayerProof {
        checksum: json.checksum,
        recorded_in: json.recorded_in,
        hides: json.hides,
        known_by: json.known_by,
        blob: json.blob,
        verified_at: json.verified_at,
        not_verified: json.not_verified,
        directories: json.directories,
    };
    Ok((id, proof))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::baseline::{FileEntry, blake3_of};
    use crate::model::{DiffId, RootfsPath};

    fn at(seconds: i64, nanoseconds: u32) -> FileTime {
        FileTime { seconds, nanoseconds }
    }

    fn checked(newest: i64, compared: i64) -> Checked {
        let compared = Timestamp::from_second(compared).unwrap();
        Checked {
            path: "/layer".into(),
            newest_change: at(newest, 0),
            checked_at: compared,
            unchanged_at: compared,
        }
    }

    #[track_caller]
    fn check(layers: &[Checked], time: FileTime, newest: FileTime) {
        assert_eq!(unchanged_since(layers.iter().map(Some)), Some(Since { time, newest }));
    }

    #[test]
    fn layers_read_after_all_were_unpacked_share_the_newest_change() {
        let layers = [checked(10, 100), checked(30, 101), checked(20, 102)];
        check(&layers, at(30, 0), at(30, 0));
    }

    #[test]
    fn a_layer_read_before_another_was_unpacked_is_trusted_only_until_then() {
        check(&[checked(10, 100), checked(200, 201)], at(99, 980_000_000), at(200, 0));
        check(&[checked(200, 201), checked(10, 100)], at(99, 980_000_000), at(200, 0));
    }

    #[test]
    fn a_change_in_the_tick_of_the_reading_is_not_taken_for_seen() {
        let mut fresh = checked(100, 100);
        check(&[fresh.clone()], at(99, 980_000_000), at(100, 0));
        fresh.unchanged_at += TICK;
        check(&[fresh], at(100, 0), at(100, 0));
    }

    #[test]
    fn one_layer_that_was_not_compared_leaves_the_time_open() {
        assert_eq!(unchanged_since([Some(&checked(1, 100)), None]), None);
        assert_eq!(unchanged_since([]), None);
    }

    #[test]
    fn only_a_directorys_owner_and_mode_may_be_the_stacks() {
        let path = RootfsPath::new("/a").unwrap();
        let directory = FileEntry::directory(path.clone(), 0o755);
        let difference = |expected: &FileEntry, found: &FileEntry| LayerDifference {
            path: path.clone(),
            expected: Some(LayerEntry::File(expected.clone())),
            found: Some(LayerEntry::File(found.clone())),
        };
        let other = FileEntry { mode: 0o700, uid: 7, gid: 7, ..directory.clone() };
        assert!(may_be_implied(&difference(&directory, &other)));
        let file = FileEntry { file_type: FileType::Regular, ..directory.clone() };
        assert!(!may_be_implied(&difference(&directory, &file)));
        let changed = FileEntry { mode: 0o700, ..file.clone() };
        assert!(!may_be_implied(&difference(&file, &changed)));
        let gone = LayerDifference { found: None, ..difference(&directory, &other) };
        assert!(!may_be_implied(&gone));
    }

    #[test]
    fn a_proof_survives_its_own_text() {
        use std::os::unix::ffi::OsStrExt as _;
        let id = LayerId::Diff(DiffId([1; 32]));
        let mut proof = LayerProof {
            known_by: KnownBy::Verified,
            blob: Some("sha256:00".into()),
            verified_at: Some(Timestamp::from_second(5).unwrap()),
            directories: vec![checked(1, 2)],
            ..LayerProof::new(blake3_of("layer"), ChainId([2; 32]))
        };
        assert_eq!(from_json(&to_json(id, &proof)), Ok((id, proof.clone())));
        let odd = std::ffi::OsStr::from_bytes(b"/\xff");
        proof.set_directory(Checked { path: odd.into(), ..checked(1, 2) });
        let (_, read) = from_json(&to_json(id, &proof)).unwrap();
        assert_eq!(read.directories, [checked(1, 2)]);
        from_json(b"{}").unwrap_err();
    }
}
