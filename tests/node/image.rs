//! Writes container images: OCI layouts in one tar file, for `ctr images import`.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use driftd::model::finding::hex;
use flate2::GzBuilder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// Every time in a test's image: some day in 2020.
const MTIME: u64 = 1_600_000_000;

/// A layer being written: entries in the order in which they are added.
pub(crate) struct Layer {
    tar: Builder<Vec<u8>>,
    /// Where each entry begins in the archive.
    starts: Vec<usize>,
}

impl Layer {
    pub(crate) fn new() -> Layer {
        Layer { tar: Builder::new(Vec::new()), starts: Vec::new() }
    }

    /// The content of an archive that another program has packed.
    pub(crate) fn of_archive(archive: &[u8]) -> io::Result<Layer> {
        let mut layer = Layer::new();
        layer.begin();
        layer.tar.get_mut().extend_from_slice(without_end(archive)?);
        Ok(layer)
    }

    fn header(kind: EntryType, mode: u32, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(MTIME);
        header.set_size(size);
        header
    }

    fn begin(&mut self) {
        self.starts.push(self.tar.get_ref().len());
    }

    /// A path of more than 100 bytes becomes a GNU long name.
    fn entry(
        mut self,
        kind: EntryType,
        path: impl AsRef<[u8]>,
        mode: u32,
        content: &[u8],
    ) -> Layer {
        self.begin();
        let mut header = Layer::header(kind, mode, content.len() as u64);
        self.tar
            .append_data(&mut header, relative(path.as_ref()), content)
            .expect("a Vec can always be written");
        self
    }

    pub(crate) fn directory(self, path: impl AsRef<[u8]>, mode: u32) -> Layer {
        self.entry(EntryType::Directory, path, mode, b"")
    }

    pub(crate) fn file(self, path: impl AsRef<[u8]>, mode: u32, content: &[u8]) -> Layer {
        self.entry(EntryType::Regular, path, mode, content)
    }

    pub(crate) fn fifo(self, path: impl AsRef<[u8]>, mode: u32) -> Layer {
        self.entry(EntryType::Fifo, path, mode, b"")
    }

    /// A program of this machine, under its own path, with its mode.
    pub(crate) fn host_file(self, path: &Path) -> io::Result<Layer> {
        let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
        let content = fs::read(path)?;
        Ok(self.file(path.as_os_str().as_bytes(), mode, &content))
    }

    pub(crate) fn symlink(self, path: impl AsRef<[u8]>, target: &str) -> Layer {
        self.link(EntryType::Symlink, path.as_ref(), target.as_bytes())
    }

    pub(crate) fn hard_link(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Layer {
        let target = target.as_ref();
        self.link(EntryType::Link, path.as_ref(), target.strip_prefix(b"/").unwrap_or(target))
    }

    fn link(mut self, kind: EntryType, path: &[u8], target: &[u8]) -> Layer {
        self.begin();
        // A hard link's header is applied to the file that it links to.
        let mut header = Layer::header(kind, 0o755, 0);
        self.tar
            .append_link(&mut header, relative(path), std::ffi::OsStr::from_bytes(target))
            .expect("a Vec can always be written");
        self
    }

    pub(crate) fn character_device(mut self, path: &str, major: u32, minor: u32) -> Layer {
        self.begin();
        let mut header = Layer::header(EntryType::Char, 0o620, 0);
        header.set_device_major(major).expect("GNU headers have devices");
        header.set_device_minor(minor).expect("GNU headers have devices");
        self.tar
            .append_data(&mut header, relative(path.as_bytes()), io::empty())
            .expect("a Vec can always be written");
        self
    }

    /// A file whose owner, path and extended attributes are PAX records.
    pub(crate) fn pax_file(
        mut self,
        path: &str,
        mode: u32,
        content: &[u8],
        records: &[(&str, &[u8])],
    ) -> Layer {
        self.begin();
        let mut pax = Vec::new();
        let path = path.trim_start_matches('/');
        for (key, value) in [("path", path.as_bytes())].iter().chain(records) {
            pax.extend(pax_record(key, value));
        }
        let mut header = Layer::header(EntryType::XHeader, 0o644, pax.len() as u64);
        self.tar
            .append_data(&mut header, "PaxHeaders.0/file", &pax[..])
            .expect("a Vec can always be written");
        let mut header = Layer::header(EntryType::Regular, mode, content.len() as u64);
        // The name in the header differs: the record is valid.
        self.tar
            .append_data(&mut header, "short-name", content)
            .expect("a Vec can always be written");
        self
    }

    /// Everything below a directory, packed by GNU tar.
    pub(crate) fn tree_packed_by_tar(
        self,
        directory: &Path,
        options: &[&str],
    ) -> anyhow::Result<Layer> {
        let found = Command::new("find")
            .arg(directory)
            .args(["-mindepth", "1", "-printf", "%P\\0"])
            .output()
            .context("cannot run find")?;
        self.packed_by_tar(directory, &found.stdout, options)
    }

    /// Files in a directory, packed by GNU tar. Each name ends with a zero byte.
    pub(crate) fn packed_by_tar(
        mut self,
        directory: &Path,
        names: &[u8],
        options: &[&str],
    ) -> anyhow::Result<Layer> {
        let mut list = tempfile::NamedTempFile::new()?;
        list.write_all(names)?;
        let output = Command::new("tar")
            .args(["--create", "--numeric-owner", "--owner=0", "--group=0", "--no-recursion"])
            .args(options)
            .arg("--directory")
            .arg(directory)
            .arg("--null")
            .arg("--files-from")
            .arg(list.path())
            .output()
            .context("cannot run tar")?;
        ensure!(output.status.success(), "tar failed: {}", String::from_utf8_lossy(&output.stderr));
        self.begin();
        self.tar.get_mut().extend_from_slice(without_end(&output.stdout)?);
        Ok(self)
    }

    /// Hides what the layers below have at `path`.
    pub(crate) fn whiteout(self, path: &str) -> Layer {
        let (directory, name) = path.rsplit_once('/').expect("paths start with a slash");
        self.file(format!("{directory}/.wh.{name}"), 0o644, b"")
    }

    /// Hides everything that the layers below have in `directory`.
    pub(crate) fn opaque(self, directory: &str) -> Layer {
        self.file(format!("{directory}/.wh..wh..opq"), 0o644, b"")
    }

    /// The archive, and where each entry begins in it.
    fn finish(self) -> (Vec<u8>, Vec<usize>) {
        (self.tar.into_inner().expect("a Vec can always be written"), self.starts)
    }
}

/// An archive without the blocks of zeros that end it.
fn without_end(archive: &[u8]) -> io::Result<&[u8]> {
    let mut end = 0;
    for entry in tar::Archive::new(archive).entries()?.raw(true) {
        let entry = entry?;
        let size = entry.header().entry_size()?;
        end = entry.raw_file_position() + size.next_multiple_of(512);
    }
    let end = usize::try_from(end).expect("an archive in memory");
    archive.get(..end).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// A path as archives have it, without its slash.
fn relative(path: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(path)))
}

/// `LENGTH KEY=VALUE`, where the length counts itself.
fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length = rest + length.to_string().len();
    }
    let mut record = format!("{length} {key}=").into_bytes();
    record.extend_from_slice(value);
    record.push(b'\n');
    record
}

/// How the archives of an image's layers are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    /// Several gzip members, cut anywhere.
    GzipMembers,
    /// A gzip member for each entry, with a landmark, a table of contents and a
    /// footer, as lazily pulled images have them.
    Estargz,
    Zstd,
    /// Several zstd frames, and frames that a reader skips between and after them.
    ZstdChunked,
}

impl Packing {
    pub(crate) const ALL: [Packing; 6] = [
        Packing::Plain,
        Packing::Gzip,
        Packing::GzipMembers,
        Packing::Estargz,
        Packing::Zstd,
        Packing::ZstdChunked,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Packing::Plain => "plain",
            Packing::Gzip => "gzip",
            Packing::GzipMembers => "gzip-members",
            Packing::Estargz => "estargz",
            Packing::Zstd => "zstd",
            Packing::ZstdChunked => "zstd-chunked",
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
            Packing::Gzip | Packing::GzipMembers | Packing::Estargz => {
                "application/vnd.oci.image.layer.v1.tar+gzip"
            }
            Packing::Zstd | Packing::ZstdChunked => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    /// The blob of a layer, and the SHA-256 of what is in it.
    fn pack(self, mut layer: Layer) -> io::Result<(Vec<u8>, String)> {
        if self == Packing::Estargz {
            layer = layer.file("/.no.prefetch.landmark", 0o644, &[0xf]);
            let contents = json!({ "version": 1, "entries": [] }).to_string();
            layer = layer.file("/stargz.index.json", 0o644, contents.as_bytes());
        }
        let (archive, starts) = layer.finish();
        let diff_id = format!("sha256:{}", hex(&Sha256::digest(&archive)));
        let blob = match self {
            Packing::Plain => archive,
            Packing::Gzip => gzip(&archive)?,
            Packing::GzipMembers => archive
                .chunks(archive.len().div_ceil(3))
                .map(gzip)
                .collect::<io::Result<Vec<_>>>()?
                .concat(),
            Packing::Estargz => {
                let ends = starts.iter().skip(1).copied().chain([archive.len()]);
                let mut members = starts
                    .iter()
                    .zip(ends)
                    .map(|(start, end)| gzip(&archive[*start..end]))
                    .collect::<io::Result<Vec<_>>>()?;
                let footer = GzBuilder::new().extra(*b"SG\x16\x000000000000000000STARGZ");
                members.push(footer.write(Vec::new(), flate2::Compression::none()).finish()?);
                members.concat()
            }
            Packing::Zstd => zstd::encode_all(&archive[..], 1)?,
            Packing::ZstdChunked => {
                let mut frames = Vec::new();
                for chunk in archive.chunks(archive.len().div_ceil(3)) {
                    frames.extend(zstd::encode_all(chunk, 1)?);
                    frames.extend(skippable(b"something else"));
                }
                frames.extend(skippable(&[0; 64]));
                frames
            }
        };
        Ok((blob, diff_id))
    }
}

fn gzip(content: &[u8]) -> io::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content)?;
    encoder.finish()
}

/// A zstd frame that a reader skips.
fn skippable(content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).expect("a short content");
    [&0x184d_2a50_u32.to_le_bytes(), &length.to_le_bytes(), content].concat()
}

/// The digests that name an image's parts in containerd's content store.
#[derive(Clone, Debug)]
pub(crate) struct Digests {
    pub(crate) manifest: String,
    pub(crate) config: String,
    /// The digests of the layers' blobs, bottom first.
    pub(crate) layers: Vec<String>,
    /// The digests of what is in the blobs.
    pub(crate) diff_ids: Vec<String>,
}

/// An image being written.
pub(crate) struct Image {
    name: String,
    layers: Vec<(Layer, Packing)>,
    /// Wrapped in an index, between another platform and a provenance.
    index: bool,
    command: Vec<String>,
}

impl Image {
    pub(crate) fn new(name: &str) -> Image {
        let command = vec!["/bin/sh".to_owned()];
        Image { name: name.to_owned(), layers: Vec::new(), index: false, command }
    }

    pub(crate) fn command(mut self, command: &[&str]) -> Image {
        self.command = command.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Layers are added bottom first.
    pub(crate) fn layer(mut self, layer: Layer, packing: Packing) -> Image {
        self.layers.push((layer, packing));
        self
    }

    pub(crate) fn with_index(mut self) -> Image {
        self.index = true;
        self
    }

    /// Writes an OCI layout in one tar file.
    pub(crate) fn write(self, file: &Path) -> io::Result<Digests> {
        let mut archive = Builder::new(fs::File::create(file)?);
        let mut blob = |media_type: &str, content: &[u8]| -> io::Result<Value> {
            let digest = hex(&Sha256::digest(content));
            append(&mut archive, &format!("blobs/sha256/{digest}"), content)?;
            Ok(json!({
                "mediaType": media_type,
                "digest": format!("sha256:{digest}"),
                "size": content.len(),
            }))
        };

        let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
        for (layer, packing) in self.layers {
            let (content, diff_id) = packing.pack(layer)?;
            layers.push(blob(packing.media_type(), &content)?);
            diff_ids.push(diff_id);
        }
        let config = blob(
            "application/vnd.oci.image.config.v1+json",
            &json!({
                "architecture": architecture(),
                "os": "linux",
                "config": {
                    "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                    "Cmd": self.command,
                },
                "rootfs": { "type": "layers", "diff_ids": diff_ids },
            })
            .to_string()
            .into_bytes(),
        )?;
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = blob(
            manifest_type,
            &json!({
                "schemaVersion": 2,
                "mediaType": manifest_type,
                "config": config,
                "layers": layers,
            })
            .to_string()
            .into_bytes(),
        )?;
        let digest_of = |value: &Value| value["digest"].as_str().expect("text").to_owned();
        let digests = Digests {
            manifest: digest_of(&manifest),
            config: digest_of(&config),
            layers: layers.iter().map(digest_of).collect(),
            diff_ids,
        };

        let mut top = manifest;
        if self.index {
            let platform = |mut entry: Value, os: &str, architecture: &str| {
                entry["platform"] = json!({ "os": os, "architecture": architecture });
                entry
            };
            let statement = blob("application/vnd.in-toto+json", b"{}")?;
            let empty = blob("application/vnd.oci.image.config.v1+json", b"{}")?;
            let provenance = blob(
                manifest_type,
                &json!({
                    "schemaVersion": 2, "mediaType": manifest_type,
                    "config": empty, "layers": [statement],
                })
                .to_string()
                .into_bytes(),
            )?;
            let mut provenance = platform(provenance, "unknown", "unknown");
            provenance["annotations"] =
                json!({ "vnd.docker.reference.type": "attestation-manifest" });
            // This one was not pulled, so its blob is absent.
            let elsewhere = json!({
                "mediaType": manifest_type, "size": 2,
                "digest": format!("sha256:{}", hex(&Sha256::digest(b"elsewhere"))),
            });
            let index_type = "application/vnd.oci.image.index.v1+json";
            top = blob(
                index_type,
                &json!({
                    "schemaVersion": 2,
                    "mediaType": index_type,
                    "manifests": [
                        provenance,
                        platform(elsewhere, "linux", "s390x"),
                        platform(top, "linux", architecture()),
                    ],
                })
                .to_string()
                .into_bytes(),
            )?;
        }
        top["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": self.name,
        });

        // For `docker load` of versions that do not know the layout.
        let file_of = |digest: &String| format!("blobs/{}", digest.replace(':', "/"));
        let docker = json!([{
            "Config": file_of(&digests.config),
            "RepoTags": [self.name],
            "Layers": digests.layers.iter().map(file_of).collect::<Vec<_>>(),
        }]);
        append(&mut archive, "manifest.json", docker.to_string().as_bytes())?;
        let index = json!({ "schemaVersion": 2, "manifests": [top] });
        append(&mut archive, "index.json", index.to_string().as_bytes())?;
        append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.into_inner()?.sync_all()?;
        Ok(digests)
    }
}

/// Writes the image `name` made of `layers` (bottom first) to `file`.
pub(crate) fn write(file: &Path, name: &str, layers: Vec<Layer>) -> io::Result<Digests> {
    layers
        .into_iter()
        .fold(Image::new(name), |image, layer| image.layer(layer, Packing::Plain))
        .write(file)
}

fn append(archive: &mut Builder<fs::File>, path: &str, content: &[u8]) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content)
}

/// This machine's architecture in the words of OCI.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
