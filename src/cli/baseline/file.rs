//! One file of an image, as JSON and as text.
//!
//! `diff`, `export` and `verify` print the same keys and the same texts.

use base64::Engine as _;
use serde::Serialize;

use crate::api::proto;
use crate::cli::output::size;
use crate::model::finding::{hex, octal};
use crate::model::{RootfsPath, printable};

#[derive(Debug, Serialize)]
pub(super) struct FileJson {
    #[serde(flatten)]
    pub(super) path: RootfsPath,
    pub(super) file_type: String,
    #[serde(rename = "type")]
    pub(super) format: String,
    pub(super) mode: String,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) capability: Option<String>,
    pub(super) blake3: Option<String>,
    pub(super) link_target: Option<String>,
    /// In base64, if the target is not UTF-8.
    pub(super) link_target_bytes: Option<String>,
    pub(super) device: Option<DeviceJson>,
    /// Null where all files are of one layer.
    pub(super) layer: Option<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct DeviceJson {
    major: u32,
    minor: u32,
}

pub(super) fn file_json(file: proto::BaselineFile) -> anyhow::Result<FileJson> {
    let (link_target, link_target_bytes) = match str::from_utf8(&file.link_target) {
        Ok("") => (None, None),
        Ok(text) => (Some(text.to_owned()), None),
        Err(_) => (
            Some(printable(&file.link_target)),
            Some(base64::engine::general_purpose::STANDARD.encode(&file.link_target)),
        ),
    };
    Ok(FileJson {
        path: RootfsPath::new(file.path)?,
        file_type: file.file_type,
        format: file.format,
        mode: octal(file.mode),
        uid: file.uid,
        gid: file.gid,
        size: file.size,
        capability: (!file.capability.is_empty()).then(|| hex(&file.capability)),
        blake3: (!file.blake3.is_empty()).then_some(file.blake3),
        link_target,
        link_target_bytes,
        device: file.device.map(|proto::Device { major, minor }| DeviceJson { major, minor }),
        layer: (!file.layer.is_empty()).then_some(file.layer),
    })
}

/// The differences between two files as text: `content, mode 0755 -> 4755`.
pub(super) fn what_differs(a: &FileJson, b: &FileJson) -> String {
    let mut words = Vec::new();
    let mut word = |name: &str, a: &str, b: &str| {
        if a != b {
            words.push(format!("{name} {a} -> {b}"));
        }
    };
    word("type", &a.file_type, &b.file_type);
    if a.file_type == b.file_type {
        let quoted =
            |target: &Option<String>| printable(target.as_deref().unwrap_or("").as_bytes());
        if (&a.link_target, &a.link_target_bytes) != (&b.link_target, &b.link_target_bytes) {
            word("target", &quoted(&a.link_target), &quoted(&b.link_target));
        }
        let device = |device: &Option<DeviceJson>| match device {
            Some(DeviceJson { major, minor }) => format!("{major}:{minor}"),
            None => "none".to_owned(),
        };
        word("device", &device(&a.device), &device(&b.device));
    }
    word("mode", &a.mode, &b.mode);
    word("owner", &format!("{}:{}", a.uid, a.gid), &format!("{}:{}", b.uid, b.gid));
    let capability = |file: &FileJson| file.capability.clone().unwrap_or("none".into());
    word("capability", &capability(a), &capability(b));
    if a.file_type == b.file_type && a.blake3 != b.blake3 {
        let sizes = match a.size == b.size {
            true => size(a.size),
            false => format!("{} -> {}", size(a.size), size(b.size)),
        };
        words.insert(0, format!("content ({sizes})"));
    }
    words.join(", ")
}

/// A file as text: `regular, mode 0755, owner 0:0, 1.2 KiB`.
pub(super) fn in_words(file: &FileJson) -> String {
    let mut words = vec![
        file.file_type.clone(),
        format!("mode {}", file.mode),
        format!("owner {}:{}", file.uid, file.gid),
    ];
    if file.blake3.is_some() {
        words.push(size(file.size));
    }
    if let Some(target) = &file.link_target {
        words.push(format!("to {}", printable(target.as_bytes())));
    }
    words.join(", ")
}
