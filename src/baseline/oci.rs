//! OCI documents: indexes, manifests and image configs, decoded. Pure.
//!
//! The bytes come from registries, so nothing in them is trusted. `archive` and containerd's
//! room read the documents and check their digests.

use serde::Deserialize;

use crate::model::{DiffId, printable};

/// Larger documents are refused (containerd itself stops at 8 MiB).
pub const DOCUMENT_LIMIT: u64 = 8 << 20;

/// A reference to a document or blob, from an image's target or an index's entry.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    #[serde(default)]
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
    #[serde(default)]
    pub annotations: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

/// The document that an image's target refers to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    Index(Vec<Descriptor>),
    Manifest {
        config: Descriptor,
        /// Bottom first.
        layers: Vec<Descriptor>,
    },
}

/// Whether a media type is that of an index or a manifest. An index may also name what
/// is neither, such as a checkpoint's archive. Old registries name no type.
pub fn is_document(media_type: &str) -> bool {
    matches!(
        media_type.split(';').next().unwrap_or_default().trim(),
        "" | "application/vnd.oci.image.index.v1+json"
            | "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
            | "application/vnd.docker.distribution.manifest.v2+json"
            | "application/vnd.docker.distribution.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v1+prettyjws"
    )
}

/// Whether an index has entries, but no manifest among them: a checkpoint's archives.
pub fn holds_no_image(index: &[Descriptor]) -> bool {
    !index.is_empty() && !index.iter().any(|entry| is_document(&entry.media_type))
}

impl Descriptor {
    /// Whether this is a layer's archive. A signature's image calls its payload a layer.
    pub fn is_layer(&self) -> bool {
        self.media_type.is_empty()
            || self.media_type.contains(".tar")
            || self.media_type.contains("image.layer.")
            || self.media_type.contains("image.rootfs.")
    }
}

/// Decodes an index or a manifest, in OCI's or Docker's format; the error is text.
pub fn document(bytes: &[u8]) -> Result<Document, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Either {
        #[serde(default)]
        manifests: Option<Vec<Descriptor>>,
        #[serde(default)]
        config: Option<Descriptor>,
        #[serde(default)]
        layers: Option<Vec<Descriptor>>,
        #[serde(default)]
        fs_layers: Option<serde_json::Value>,
    }
    let either: Either =
        serde_json::from_slice(bytes).map_err(|err| format!("is not a manifest: {err}"))?;
    match either {
        // Two readers could take it for two different images (CVE-2021-41190).
        Either { manifests: Some(_), config: Some(_), .. } => {
            Err("is an index and a manifest at the same time".into())
        }
        Either { manifests: Some(manifests), .. } => Ok(Document::Index(manifests)),
        Either { config: Some(config), layers, .. } => {
            Ok(Document::Manifest { config, layers: layers.unwrap_or_default() })
        }
        Either { fs_layers: Some(_), .. } => {
            Err("is a manifest of the old schema 1, which has no diff IDs".into())
        }
        Either { .. } => Err("is neither an index nor a manifest".into()),
    }
}

/// The diff IDs of an image config, bottom first; `None` if it is the config of
/// something else than an image (a chart, a signature, a policy).
pub fn diff_ids(bytes: &[u8]) -> Result<Option<Vec<DiffId>>, String> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        rootfs: Option<RootFs>,
    }
    #[derive(Deserialize)]
    struct RootFs {
        #[serde(default)]
        diff_ids: Option<Vec<String>>,
    }
    let config: Config =
        serde_json::from_slice(bytes).map_err(|err| format!("is not an image config: {err}"))?;
    let Some(texts) = config.rootfs.and_then(|rootfs| rootfs.diff_ids) else { return Ok(None) };
    let parsed: Result<Vec<DiffId>, _> = texts.iter().map(|text| text.parse()).collect();
    parsed.map(Some).map_err(|err| format!("has a bad layer list: {err}"))
}

/// This node's platform, by its OCI names.
pub fn host() -> (&'static str, &'static str) {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
        "powerpc64" => "ppc64",
        "loongarch64" => "loong64",
        other => other,
    };
    (std::env::consts::OS, architecture)
}

/// The entries of an index that may be this node's image, best first. The one whose blobs
/// exist is the one that containerd took.
pub fn candidates(index: Vec<Descriptor>, host: (&str, &str)) -> Vec<Descriptor> {
    const MANY: usize = 16;
    let is_image = |entry: &Descriptor| is_document(&entry.media_type) && !is_attestation(entry);
    let mut images: Vec<Descriptor> = index.into_iter().filter(is_image).collect();
    if images.len() == 1 {
        // With one image there is no choice. An image of another architecture can be run
        // on purpose.
        return images;
    }
    let rank = |entry: &Descriptor| match &entry.platform {
        Some(platform) if (&*platform.os, &*platform.architecture) == host => {
            variant_rank(&platform.architecture, &platform.variant)
        }
        Some(_) => None,
        None => Some(100),
    };
    images.retain(|entry| rank(entry).is_some());
    images.sort_by_key(|entry| rank(entry));
    images.truncate(MANY);
    images
}

/// Smaller is better. Newer variants of a processor run older code, so any may
/// have been chosen; the plain one is the most likely.
fn variant_rank(architecture: &str, variant: &str) -> Option<u32> {
    let version: Option<u32> = variant.strip_prefix('v').and_then(|number| number.parse().ok());
    Some(match (architecture, version) {
        (_, None) => 0,
        ("arm64", Some(8)) | ("amd64", Some(1)) => 1,
        // v7, then v6, v5; v8 is for 64-bit processors.
        ("arm", Some(version)) => 20_u32.saturating_sub(version),
        (_, Some(version)) => 20_u32.saturating_add(version),
    })
}

/// BuildKit adds provenance to the index as if it were one more platform.
fn is_attestation(entry: &Descriptor) -> bool {
    entry
        .platform
        .as_ref()
        .is_some_and(|platform| platform.os == "unknown" && platform.architecture == "unknown")
        || entry.annotations.as_ref().is_some_and(|annotations| {
            annotations.get("vnd.docker.reference.type").map(String::as_str)
                == Some("attestation-manifest")
        })
}

/// Text from an image, short enough for a message.
pub fn brief(digest: &str) -> String {
    const LENGTH: usize = 80;
    printable(digest.as_bytes()).chars().take(LENGTH).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(entries: &str) -> Vec<Descriptor> {
        match document(format!(r#"{{"schemaVersion":2,"manifests":[{entries}]}}"#).as_bytes()) {
            Ok(Document::Index(entries)) => entries,
            other => panic!("{other:?}"),
        }
    }

    /// An index of `os/arch[/variant]` entries; the expected order by position.
    #[track_caller]
    fn check(platforms: &[&str], host: (&str, &str), expected: &[usize]) {
        let entries: Vec<String> = platforms
            .iter()
            .enumerate()
            .map(|(position, platform)| {
                let mut words = platform.split('/');
                let mut word = || words.next().unwrap_or_default();
                match word() {
                    "-" => format!(r#"{{"digest":"{position}"}}"#),
                    os => format!(
                        r#"{{"digest":"{position}","platform":{{"os":"{os}","architecture":"{}","variant":"{}"}}}}"#,
                        word(),
                        word()
                    ),
                }
            })
            .collect();
        let chosen: Vec<usize> = candidates(index(&entries.join(",")), host)
            .iter()
            .map(|entry| entry.digest.parse().unwrap())
            .collect();
        assert_eq!(chosen, expected, "{platforms:?}");
    }

    #[test]
    fn the_hosts_platform_is_chosen() {
        let amd64 = ("linux", "amd64");
        check(&["linux/arm64/v8", "linux/amd64", "windows/amd64"], amd64, &[1]);
        check(&["linux/amd64/v3", "linux/amd64"], amd64, &[1, 0]);
        check(&["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], ("linux", "arm"), &[1, 2, 0]);
        check(&["linux/s390x", "linux/arm64"], amd64, &[]);
    }

    #[test]
    fn attestations_are_no_images() {
        let amd64 = ("linux", "amd64");
        check(&["unknown/unknown", "linux/amd64", "unknown/unknown"], amd64, &[1]);
        check(&["unknown/unknown", "linux/arm64"], amd64, &[1]);
        let entries = index(
            r#"{"digest":"a","annotations":{"vnd.docker.reference.type":"attestation-manifest"}}"#,
        );
        assert_eq!(candidates(entries, amd64), []);
    }

    #[test]
    fn d06_what_is_neither_a_manifest_nor_an_index_is_no_image() {
        let manifest = r#"{"digest":"m","mediaType":"application/vnd.oci.image.manifest.v1+json"}"#;
        let criu = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
        let archive = format!(r#"{{"digest":"c","mediaType":"{criu}"}}"#);
        let chosen = candidates(index(&format!("{archive},{manifest}")), ("linux", "amd64"));
        assert_eq!(chosen.iter().map(|one| &*one.digest).collect::<Vec<_>>(), ["m"]);
        assert!(holds_no_image(&index(&archive)));
        assert!(!holds_no_image(&index(&format!("{archive},{manifest}"))));
        assert!(!holds_no_image(&index("")));
        assert!(!holds_no_image(&index(r#"{"digest":"untyped"}"#)));
    }

    #[test]
    fn d08_a_signatures_payload_is_no_layer() {
        let of = |media_type: &str| Descriptor {
            media_type: media_type.into(),
            digest: "a".into(),
            size: 1,
            platform: None,
            annotations: None,
        };
        assert!(!of("application/vnd.dev.cosign.simplesigning.v1+json").is_layer());
        assert!(!of("application/vnd.in-toto+json").is_layer());
        for layer in [
            "",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.nondistributable.v1.tar",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ] {
            assert!(of(layer).is_layer(), "{layer}");
        }
    }

    #[test]
    fn an_entry_without_a_platform_comes_last() {
        check(&["-", "linux/amd64"], ("linux", "amd64"), &[1, 0]);
        check(&["-"], ("linux", "amd64"), &[0]);
    }

    #[test]
    fn documents_that_two_readers_could_read_differently_are_refused() {
        let both = br#"{"manifests":[],"config":{"digest":"a"}}"#;
        assert_eq!(document(both).unwrap_err(), "is an index and a manifest at the same time");
        assert_eq!(document(b"{}").unwrap_err(), "is neither an index nor a manifest");
        assert!(document(b"{\"fsLayers\":[]}").unwrap_err().contains("schema 1"));
        assert!(document(b"\xff").unwrap_err().starts_with("is not a manifest"));
    }

    #[test]
    fn a_config_names_its_layers() {
        let one = DiffId([0x11; 32]);
        let config = format!(r#"{{"rootfs":{{"type":"layers","diff_ids":["{one}"]}}}}"#);
        assert_eq!(diff_ids(config.as_bytes()), Ok(Some(vec![one])));
        assert_eq!(diff_ids(b"{}"), Ok(None), "a chart is no image");
        assert_eq!(
            diff_ids(br#"{"rootfs":{"diff_ids":["sha512:00"]}}"#).unwrap_err(),
            "has a bad layer list: `sha512:00` is not a diff ID (sha256: and 64 hexadecimal digits)"
        );
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoders_panic(bytes: Vec<u8>) {
            let _ = (document(&bytes), diff_ids(&bytes));
        }
    }
}
