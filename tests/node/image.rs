//! Writes container images: OCI layouts in one tar file, for `ctr images import`.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use driftd::model::finding::hex;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// A layer being written: entries in the order in which they are added.
pub(crate) struct Layer {
    tar: Builder<Vec<u8>>,
}

impl Layer {
    pub(crate) fn new() -> Layer {
        Layer { tar: Builder::new(Vec::new()) }
    }

    fn entry(mut self, kind: EntryType, path: &str, mode: u32, content: &[u8]) -> Layer {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(content.len() as u64);
        self.tar
            .append_data(&mut header, path.trim_start_matches('/'), content)
            .expect("a Vec can always be written");
        self
    }

    pub(crate) fn directory(self, path: &str, mode: u32) -> Layer {
        self.entry(EntryType::Directory, path, mode, b"")
    }

    pub(crate) fn file(self, path: &str, mode: u32, content: &[u8]) -> Layer {
        self.entry(EntryType::Regular, path, mode, content)
    }

    /// A program of this machine, under its own path, with its mode.
    pub(crate) fn host_file(self, path: &Path) -> io::Result<Layer> {
        let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
        let content = fs::read(path)?;
        Ok(self.file(&path.to_string_lossy(), mode, &content))
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Layer {
        self.link(EntryType::Symlink, path, target)
    }

    pub(crate) fn hard_link(self, path: &str, target: &str) -> Layer {
        self.link(EntryType::Link, path, target.trim_start_matches('/'))
    }

    fn link(mut self, kind: EntryType, path: &str, target: &str) -> Layer {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        // A hard link's header is applied to the file that it links to.
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_600_000_000);
        header.set_size(0);
        self.tar
            .append_link(&mut header, path.trim_start_matches('/'), target)
            .expect("a Vec can always be written");
        self
    }

    /// Hides what the layers below have at `path`.
    pub(crate) fn whiteout(self, path: &str) -> Layer {
        let (directory, name) = path.rsplit_once('/').expect("paths start with a slash");
        self.file(&format!("{directory}/.wh.{name}"), 0o644, b"")
    }

    /// Hides everything that the layers below have in `directory`.
    pub(crate) fn opaque(self, directory: &str) -> Layer {
        self.file(&format!("{directory}/.wh..wh..opq"), 0o644, b"")
    }

    fn finish(self) -> Vec<u8> {
        self.tar.into_inner().expect("a Vec can always be written")
    }
}

/// Where an image's parts lie in containerd's content store.
pub(crate) struct Digests {
    pub(crate) manifest: String,
    pub(crate) config: String,
}

/// Writes the image `name` made of `layers` (bottom first) to `file`.
pub(crate) fn write(file: &Path, name: &str, layers: Vec<Layer>) -> io::Result<Digests> {
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

    let layers: Vec<Value> = layers
        .into_iter()
        .map(|layer| blob("application/vnd.oci.image.layer.v1.tar", &layer.finish()))
        .collect::<io::Result<_>>()?;
    let diff_ids: Vec<&Value> = layers.iter().map(|layer| &layer["digest"]).collect();
    let config = blob(
        "application/vnd.oci.image.config.v1+json",
        &json!({
            "architecture": architecture(),
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["/bin/sh"],
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        })
        .to_string()
        .into_bytes(),
    )?;
    let mut manifest = blob(
        "application/vnd.oci.image.manifest.v1+json",
        &json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        })
        .to_string()
        .into_bytes(),
    )?;
    manifest["annotations"] = json!({ "io.containerd.image.name": name });
    let digests = Digests { manifest: text(&manifest["digest"]), config: text(&config["digest"]) };

    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    append(&mut archive, "index.json", index.to_string().as_bytes())?;
    append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    archive.into_inner()?.sync_all()?;
    Ok(digests)
}

fn append(archive: &mut Builder<fs::File>, path: &str, content: &[u8]) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content)
}

fn text(value: &Value) -> String {
    value.as_str().expect("a digest is text").to_owned()
}

/// This machine's architecture in the words of OCI.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
