//! A layer's archive, read into entries.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest as _, Sha256};

use super::layer::{FileEntry, LayerEntry};
use super::{ImageBaseline, Progress};
use crate::model::{Blake3Hash, DiffId, FileType, Format, RootfsPath};

#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub bytes: u64,
    pub entries: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the archive")]
    Read(#[from] std::io::Error),
    #[error("the archive has more than {0}")]
    Limit(String),
}

#[derive(Debug)]
pub struct Stream {
    entries: BTreeMap<RootfsPath, LayerEntry>,
    implied: BTreeSet<RootfsPath>,
    pub blob_sha256: [u8; 32],
    pub blob_bytes: u64,
    pub diff_id: DiffId,
}

pub fn read(
    mut blob: impl Read + Send,
    limits: &Limits,
    _progress: Option<&Progress>,
    stop: &AtomicBool,
) -> Result<Stream, Error> {
    let mut bytes = Vec::new();
    let mut chunk = vec![0; 8192];
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Limit("time".into()));
        }
        match blob.read(&mut chunk)? {
            0 => break,
            n => bytes.extend_from_slice(&chunk[..n]),
        }
        if bytes.len() as u64 > limits.bytes {
            return Err(Error::Limit(format!("{} bytes (baseline.max_layer_bytes)", limits.bytes)));
        }
    }
    let digest: [u8; 32] = Sha256::digest(&bytes).into();
    let mut entries = BTreeMap::new();
    let mut implied = BTreeSet::from([RootfsPath::root()]);
    let mut archive = tar::Archive::new(&bytes[..]);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = RootfsPath::new(format!("/{}", name.trim_end_matches('/'))).unwrap();
        let mut above = path.parent();
        while let Some(parent) = above {
            implied.insert(parent.clone());
            above = parent.parent();
        }
        if let Some(hidden) = path.file_name().strip_prefix(b".wh.") {
            let hidden = path.parent().unwrap().join(hidden).unwrap();
            entries.insert(hidden.clone(), LayerEntry::Whiteout(hidden));
            continue;
        }
        let mut file = FileEntry {
            uid: entry.header().uid()? as u32,
            gid: entry.header().gid()? as u32,
            ..FileEntry::directory(path.clone(), entry.header().mode()? & 0o7777)
        };
        if !entry.header().entry_type().is_dir() {
            let mut content = Vec::new();
            entry.read_to_end(&mut content)?;
            file.file_type = FileType::Regular;
            file.size = content.len() as u64;
            file.format = Format::sniff(&content[..content.len().min(Format::HEAD)]);
            file.blake3 = Some(Blake3Hash(*blake3::hash(&content).as_bytes()));
        }
        entries.insert(path, LayerEntry::File(file));
    }
    implied.retain(|path| !entries.contains_key(path));
    let blob_bytes = bytes.len() as u64;
    Ok(Stream { entries, implied, blob_sha256: digest, blob_bytes, diff_id: DiffId(digest) })
}

impl Stream {
    pub fn settle(self, below: Option<&ImageBaseline>) -> Result<Vec<LayerEntry>, Error> {
        let mut entries: Vec<LayerEntry> = self.entries.into_values().collect();
        for path in self.implied {
            let known = below.and_then(|below| below.get(&path)).map(|known| known.entry);
            let known = known.filter(|known| known.file_type == FileType::Directory);
            entries.push(LayerEntry::File(
                known.unwrap_or_else(|| FileEntry::directory(path, 0o755)),
            ));
        }
        Ok(entries)
    }
}
