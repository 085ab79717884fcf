//! Images in a file or a directory: an OCI image layout, or what `docker save` writes.
//! The CLI reads them without containerd, and nothing is unpacked: documents are read and
//! checked, layers are read in place.
//!
//! An attacker may have written the archive. Names are looked up only among its members; a
//! symlink leads from one member to another, and never out of the archive.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::oci::{self, DOCUMENT_LIMIT, Descriptor, Document, brief};
use super::tar::{Fault, Reader, flag};
use super::unpack::{clean, split};
use crate::model::{ChainId, DiffId, ManifestDigest, Sha256Hash, printable};
use crate::sys;

/// Why an archive gives no image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{} is compressed; an archive is read in place (decompress it first: {tool} -dk {})",
        path.display(),
        path.display()
    )]
    Compressed { path: PathBuf, tool: &'static str },
    #[error(
        "{} is neither an OCI image layout nor a `docker save` archive: it has no index.json and no manifest.json",
        path.display()
    )]
    NoImages { path: PathBuf },
    #[error("{}: {name} {reason}", path.display())]
    Bad { path: PathBuf, name: String, reason: String },
}

/// An image, and where its layers are in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveImage {
    /// May be empty: an image need not have a name.
    pub names: Vec<String>,
    /// `docker save` archives of the old layout have no manifests.
    pub manifest_digest: Option<ManifestDigest>,
    /// Bottom first.
    pub layers: Vec<(DiffId, ArchiveBlob)>,
}

impl ArchiveImage {
    /// The identity of all layers together; `None` without layers.
    pub fn chain_id(&self) -> Option<ChainId> {
        let diff_ids: Vec<DiffId> = self.layers.iter().map(|(diff_id, _)| *diff_id).collect();
        ChainId::of_layers(&diff_ids).last().copied()
    }
}

/// A layer's blob in an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveBlob {
    /// Its name in the archive.
    name: Vec<u8>,
    /// The digest that the manifest names; `None` in `docker save` archives of the old layout.
    pub digest: Option<Sha256Hash>,
}

impl fmt::Display for ArchiveBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(&self.name))
    }
}

/// A document whose digest was checked.
struct Blob {
    name: Vec<u8>,
    bytes: Vec<u8>,
}

/// A regular file of the archive.
struct MemberFile {
    size: u64,
    reader: Box<dyn Read + Send>,
}

/// An archive that has been opened.
pub struct Archive {
    path: PathBuf,
    root: Root,
    images: Vec<ArchiveImage>,
}

impl fmt::Debug for Archive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Archive({}, {} images)", self.path.display(), self.images.len())
    }
}

/// Opens an OCI layout (a directory or a tar archive of one) or the archive of
/// `docker save`, and reads the images in it. From an image for many platforms, it takes
/// the one for this machine.
pub fn open(path: &Path) -> Result<Archive, Error> {
    let read = |source| Error::Read { path: path.into(), source };
    let metadata = std::fs::metadata(path).map_err(read)?;
    let root = if metadata.is_dir() {
        Root::Directory(sys::file::open_directory(path).map_err(read)?)
    } else {
        let file = File::open(path).map_err(read)?;
        Root::Tar { members: index(path, &file)?, file: Arc::new(file) }
    };
    let mut archive = Archive { path: path.into(), root, images: Vec::new() };
    archive.images = match archive.document(b"index.json")? {
        Some(bytes) => archive.images_of_index(&bytes)?,
        None => match archive.document(b"manifest.json")? {
            Some(bytes) => archive.images_of_docker(&bytes)?,
            None => return Err(Error::NoImages { path: path.into() }),
        },
    };
    Ok(archive)
}

impl Archive {
    pub fn images(&self) -> &[ArchiveImage] {
        &self.images
    }

    /// A layer's blob, from its first byte on.
    pub fn layer(&self, blob: &ArchiveBlob) -> Result<Box<dyn Read + Send>, Error> {
        match self.member(&blob.name)? {
            Some(file) => Ok(file.reader),
            None => Err(self.bad(&blob.name, "is not there, though the image has it as a layer")),
        }
    }

    fn images_of_index(&self, bytes: &[u8]) -> Result<Vec<ArchiveImage>, Error> {
        let name = b"index.json";
        let entries = match oci::document(bytes) {
            Ok(Document::Index(entries)) => entries,
            Ok(Document::Manifest { .. }) => return Err(self.bad(name, "is no index")),
            Err(reason) => return Err(self.bad(name, reason)),
        };
        // Entries with the same name, or with none, that name a platform are one image.
        let mut groups: BTreeMap<(Option<String>, usize), Vec<Descriptor>> = BTreeMap::new();
        for (number, entry) in entries.into_iter().enumerate() {
            let alone = if entry.platform.is_some() { usize::MAX } else { number };
            groups.entry((name_of(&entry), alone)).or_default().push(entry);
        }
        let mut images: Vec<ArchiveImage> = Vec::new();
        for ((name, _), entries) in groups {
            let Some(mut image) = self.image_of(entries)? else { continue };
            // One image under many names has an entry for each.
            let same = images.iter_mut().find(|other| {
                other.manifest_digest == image.manifest_digest && other.layers == image.layers
            });
            match same {
                Some(same) => same.names.extend(name),
                None => {
                    image.names.extend(name);
                    images.push(image);
                }
            }
        }
        if images.is_empty() {
            let (os, architecture) = oci::host();
            return Err(self.bad(name, format!("has no image for {os}/{architecture}")));
        }
        Ok(images)
    }

    /// The first of these that is an image for this platform and is in the archive; `None`
    /// if they are no images.
    fn image_of(&self, entries: Vec<Descriptor>) -> Result<Option<ArchiveImage>, Error> {
        const INDEX_DEPTH: u32 = 4;
        let mut candidates: Vec<(Descriptor, u32)> = oci::candidates(entries, oci::host())
            .into_iter()
            .rev()
            .map(|entry| (entry, 0))
            .collect();
        let mut missing = None;
        while let Some((candidate, depth)) = candidates.pop() {
            let Some(Blob { name, bytes }) = self.blob(&candidate)? else {
                missing.get_or_insert(candidate.digest);
                continue;
            };
            match oci::document(&bytes).map_err(|reason| self.bad(&name, reason))? {
                Document::Manifest { config, layers } => {
                    return self.image_of_manifest(&candidate, &config, &layers);
                }
                Document::Index(_) if depth == INDEX_DEPTH => {
                    return Err(self.bad(&name, "is nested too deep in other indexes"));
                }
                Document::Index(entries) => {
                    let entries = oci::candidates(entries, oci::host());
                    candidates.extend(entries.into_iter().rev().map(|entry| (entry, depth + 1)));
                }
            }
        }
        match missing {
            Some(digest) => {
                Err(self.bad(digest.as_bytes(), "is not there, though an index names it"))
            }
            None => Ok(None),
        }
    }

    fn image_of_manifest(
        &self,
        manifest: &Descriptor,
        config: &Descriptor,
        layers: &[Descriptor],
    ) -> Result<Option<ArchiveImage>, Error> {
        let Some(Blob { name, bytes }) = self.blob(config)? else {
            return Err(self.bad(
                config.digest.as_bytes(),
                "is not there, though a manifest names it as its config",
            ));
        };
        let Some(diff_ids) = oci::diff_ids(&bytes).map_err(|reason| self.bad(&name, reason))?
        else {
            return Ok(None);
        };
        if diff_ids.len() != layers.len() {
            let reason = format!(
                "names {} layers where its manifest names {}",
                diff_ids.len(),
                layers.len()
            );
            return Err(self.bad(&name, reason));
        }
        let blobs = layers.iter().map(|layer| {
            let digest = self.digest_of(layer)?;
            Ok(ArchiveBlob { name: blob_name(digest), digest: Some(digest) })
        });
        let blobs = blobs.collect::<Result<Vec<_>, Error>>()?;
        Ok(Some(ArchiveImage {
            names: Vec::new(),
            manifest_digest: Some(ManifestDigest(self.digest_of(manifest)?.0)),
            layers: diff_ids.into_iter().zip(blobs).collect(),
        }))
    }

    /// `manifest.json`, the list that `docker save` has always written.
    fn images_of_docker(&self, bytes: &[u8]) -> Result<Vec<ArchiveImage>, Error> {
        let list = b"manifest.json";
        let saved = docker_images(bytes).map_err(|reason| self.bad(list, reason))?;
        let mut images = Vec::new();
        for DockerImage { config, repo_tags, layers } in saved {
            let name = config.as_bytes();
            let Some(bytes) = self.document(name)? else {
                return Err(
                    self.bad(name, "is not there, though manifest.json names it as a config")
                );
            };
            // A config is named by its digest, in both layouts.
            let (_, base) = split(name);
            let hex = base.strip_suffix(b".json").unwrap_or(base);
            let expected = str::from_utf8(hex).ok().and_then(|hex| hex.parse::<Sha256Hash>().ok());
            if let Some(expected) = expected {
                self.check(name, &bytes, expected)?;
            }
            let Some(diff_ids) = oci::diff_ids(&bytes).map_err(|reason| self.bad(name, reason))?
            else {
                return Err(self.bad(name, "is no image's config"));
            };
            if diff_ids.len() != layers.len() {
                let reason = format!(
                    "names {} layers where manifest.json names {}",
                    diff_ids.len(),
                    layers.len()
                );
                return Err(self.bad(name, reason));
            }
            let blobs = layers.into_iter().map(|layer| {
                let digest = layer.strip_prefix("blobs/sha256/").and_then(|hex| hex.parse().ok());
                ArchiveBlob { name: layer.into_bytes(), digest }
            });
            images.push(ArchiveImage {
                names: repo_tags.unwrap_or_default(),
                manifest_digest: None,
                layers: diff_ids.into_iter().zip(blobs).collect(),
            });
        }
        if images.is_empty() {
            return Err(self.bad(list, "names no image"));
        }
        Ok(images)
    }

    /// A blob's name and content, checked against its digest; `None` if it is not
    /// there.
    fn blob(&self, descriptor: &Descriptor) -> Result<Option<Blob>, Error> {
        let digest = self.digest_of(descriptor)?;
        let name = blob_name(digest);
        let Some(bytes) = self.document(&name)? else { return Ok(None) };
        self.check(&name, &bytes, digest)?;
        Ok(Some(Blob { name, bytes }))
    }

    fn check(&self, name: &[u8], bytes: &[u8], expected: Sha256Hash) -> Result<(), Error> {
        let actual = Sha256Hash(Sha256::digest(bytes).into());
        if actual == expected {
            return Ok(());
        }
        Err(self.bad(name, format!("has another digest than its name states: sha256:{actual}")))
    }

    fn digest_of(&self, descriptor: &Descriptor) -> Result<Sha256Hash, Error> {
        let hex = descriptor.digest.strip_prefix("sha256:");
        hex.and_then(|hex| hex.parse().ok()).ok_or_else(|| {
            let digest = brief(&descriptor.digest);
            self.bad(
                digest.as_bytes(),
                "is no digest that can be checked (sha256: and 64 hexadecimal digits)",
            )
        })
    }

    /// The whole of a small file; `None` if it is not there.
    fn document(&self, name: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        let Some(MemberFile { size, reader }) = self.member(name)? else { return Ok(None) };
        let mut bytes = Vec::new();
        if size <= DOCUMENT_LIMIT {
            let read = reader.take(DOCUMENT_LIMIT + 1).read_to_end(&mut bytes);
            read.map_err(|error| self.bad(name, format!("cannot be read: {error}")))?;
        }
        if size > DOCUMENT_LIMIT || bytes.len() as u64 > DOCUMENT_LIMIT {
            return Err(self.bad(name, format!("is larger than {} MiB", DOCUMENT_LIMIT >> 20)));
        }
        Ok(Some(bytes))
    }

    /// A regular file's size and content; `None` if it is not there.
    fn member(&self, name: &[u8]) -> Result<Option<MemberFile>, Error> {
        const MAX_LINKS: u32 = 8;
        let mut name = clean(name);
        if name.starts_with(b"/") || climbs(&name) || name.contains(&0) {
            return Err(self.bad(&name, "is a name outside of the archive"));
        }
        match &self.root {
            Root::Directory(directory) => {
                let (fd, stat) = match sys::file::open_file_beneath(directory, &name) {
                    Ok(opened) => opened,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => {
                        return Err(self.bad(&name, format!("cannot be opened: {error}")));
                    }
                };
                if !stat.is_regular() {
                    return Err(self.bad(&name, "is no regular file"));
                }
                Ok(Some(MemberFile { size: stat.size, reader: Box::new(File::from(fd)) }))
            }
            Root::Tar { file, members } => {
                for _ in 0..MAX_LINKS {
                    match members.get(&name) {
                        None => return Ok(None),
                        Some(Member::Link(target)) => name.clone_from(target),
                        Some(Member::File { at, size }) => {
                            let window = Window { file: Arc::clone(file), at: *at, left: *size };
                            return Ok(Some(MemberFile { size: *size, reader: Box::new(window) }));
                        }
                        Some(Member::Other) => {
                            return Err(self.bad(&name, "is no regular file"));
                        }
                    }
                }
                Err(self.bad(&name, "is a link to a link, too many times"))
            }
        }
    }

    fn bad(&self, name: &[u8], reason: impl Into<String>) -> Error {
        bad(&self.path, name, reason)
    }
}

fn bad(path: &Path, name: &[u8], reason: impl Into<String>) -> Error {
    const SHOWN: usize = 200;
    let name = printable(&name[..name.len().min(SHOWN)]);
    Error::Bad { path: path.into(), name, reason: reason.into() }
}

fn blob_name(digest: Sha256Hash) -> Vec<u8> {
    format!("blobs/sha256/{digest}").into_bytes()
}

/// The name that an index gives an image: the full name from containerd and Docker, only
/// the tag from others.
fn name_of(entry: &Descriptor) -> Option<String> {
    let annotations = entry.annotations.as_ref()?;
    ["io.containerd.image.name", "org.opencontainers.image.ref.name"]
        .iter()
        .find_map(|key| annotations.get(*key))
        .cloned()
}

fn climbs(clean: &[u8]) -> bool {
    clean == b".." || clean.starts_with(b"../")
}

/// One image of `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

fn docker_images(bytes: &[u8]) -> Result<Vec<DockerImage>, String> {
    serde_json::from_slice(bytes).map_err(|err| format!("is no list of images: {err}"))
}

// ---- a tar archive, read in place

enum Root {
    Directory(OwnedFd),
    Tar { file: Arc<File>, members: HashMap<Vec<u8>, Member> },
}

enum Member {
    File {
        at: u64,
        size: u64,
    },
    /// The name of another member.
    Link(Vec<u8>),
    Other,
}

/// A part of a file.
struct Window {
    file: Arc<File>,
    at: u64,
    left: u64,
}

impl Read for Window {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.left).unwrap_or(buffer.len()).min(buffer.len());
        let length = self.file.read_at(&mut buffer[..length], self.at)?;
        self.at += length as u64;
        self.left -= length as u64;
        Ok(length)
    }
}

/// Finds where every file of an archive begins. Contents are passed over, not read.
fn index(path: &Path, file: &File) -> Result<HashMap<Vec<u8>, Member>, Error> {
    /// Images have some dozen layers; each has a file or three.
    const MAX_MEMBERS: usize = 100_000;
    const HEADERS: usize = 4096;

    let read = |source| Error::Read { path: path.into(), source };
    let length = file.metadata().map_err(read)?.len();
    let mut magic = [0; 4];
    if file.read_at(&mut magic, 0).map_err(read)? == magic.len() {
        match magic {
            [0x1f, 0x8b, ..] => return Err(Error::Compressed { path: path.into(), tool: "gzip" }),
            [0x28, 0xb5, 0x2f, 0xfd] => {
                return Err(Error::Compressed { path: path.into(), tool: "zstd" });
            }
            [0xfd, b'7', b'z', b'X'] => {
                return Err(Error::Compressed { path: path.into(), tool: "xz" });
            }
            _ => (),
        }
    }
    let mut members = HashMap::new();
    let mut at = 0;
    loop {
        let left = length.saturating_sub(at);
        let window = Window { file: Arc::new(file.try_clone().map_err(read)?), at, left };
        let mut reader = Reader::new(BufReader::with_capacity(HEADERS, window));
        let header = match reader.next() {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(members),
            Err(fault) => {
                return Err(match fault {
                    Fault::Io(source) => read(source),
                    Fault::Truncated { .. } => bad(path, b"the archive", "is truncated"),
                    Fault::Malformed { why, .. } => {
                        bad(path, b"the archive", format!("cannot be read after byte {at}: {why}"))
                    }
                    Fault::Extension { .. } => {
                        bad(path, b"the archive", "has an extended header that is too large")
                    }
                });
            }
        };
        let begin = at + reader.position();
        let end = begin.checked_add(reader.left());
        let data_end = begin.checked_add(reader.left_of_data());
        let (Some(end), Some(true)) = (end, data_end.map(|end| end <= length)) else {
            return Err(bad(path, &header.name, "is cut short: the archive is truncated"));
        };
        let mut name = clean(&header.name);
        if name.starts_with(b"/") {
            name.remove(0);
        }
        let member = match header.flag {
            flag::PAX_GLOBAL => None,
            flag::REGULAR if !reader.is_sparse() => {
                Some(Member::File { at: begin, size: header.size })
            }
            // A symlink's target is relative to the link's directory.
            flag::SYMLINK => {
                let (directory, _) = split(&name);
                Some(Member::Link(clean(&[directory, &header.link].concat())))
            }
            flag::LINK => Some(Member::Link(clean(&header.link))),
            _ => Some(Member::Other),
        };
        if let Some(member) = member {
            if let Member::Link(target) = &member
                && (header.link.starts_with(b"/") || climbs(target))
            {
                return Err(bad(path, &name, "is a link out of the archive"));
            }
            members.insert(name, member);
        }
        if members.len() > MAX_MEMBERS {
            return Err(bad(path, b"the archive", format!("has more than {MAX_MEMBERS} files")));
        }
        at = end;
    }
}

#[cfg(test)]
mod tests;
