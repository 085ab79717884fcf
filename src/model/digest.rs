//! Digests. Digests of different things are different types, so that they cannot be mixed.
//! Each type documents what it is the digest of.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::printable::printable;

/// Text that is not a digest of the expected kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {expected}")]
pub struct BadDigest {
    text: String,
    expected: &'static str,
}

fn parse_hex(text: &str, prefix: &str, expected: &'static str) -> Result<[u8; 32], BadDigest> {
    let bad = || BadDigest { text: printable(text.as_bytes()), expected };
    let hex = text.strip_prefix(prefix).ok_or_else(bad)?;
    // `blake3::Hash` serves as a parser of 32 bytes in hexadecimal, whatever their digest.
    blake3::Hash::from_hex(hex).map(|hash| *hash.as_bytes()).map_err(|_| bad())
}

macro_rules! digest {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $expected:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The 64 hexadecimal digits, without any prefix.
            pub fn hex(&self) -> String {
                blake3::Hash::from_bytes(self.0).to_hex().to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = BadDigest;
            fn from_str(text: &str) -> Result<$name, BadDigest> {
                parse_hex(text, $prefix, $expected).map($name)
            }
        }

        impl From<$name> for String {
            fn from(digest: $name) -> String {
                digest.to_string()
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadDigest;
            fn try_from(text: String) -> Result<$name, BadDigest> {
                text.parse()
            }
        }
    };
}

digest!(
    /// The BLAKE3 hash of a file's content: what a baseline compares.
    Blake3Hash, "", "a BLAKE3 hash (64 hexadecimal digits)"
);
digest!(
    /// The SHA-256 of a file's content, for look-ups in threat intelligence.
    Sha256Hash, "", "a SHA-256 hash (64 hexadecimal digits)"
);
digest!(
    /// The SHA-256 of a layer's *uncompressed* tar (OCI image spec, `rootfs.diff_ids`).
    DiffId, "sha256:", "a diff ID (sha256: and 64 hexadecimal digits)"
);
digest!(
    /// The identity of a *stack* of layers (OCI image spec, "Layer ChainID").
    /// containerd names committed snapshots by it.
    ChainId, "sha256:", "a chain ID (sha256: and 64 hexadecimal digits)"
);
digest!(
    /// The SHA-256 of an image's manifest for one platform.
    ManifestDigest, "sha256:", "a manifest digest (sha256: and 64 hexadecimal digits)"
);

impl ChainId {
    /// The chain IDs of a stack of layers, bottom first.
    pub fn of_layers(diff_ids: &[DiffId]) -> Vec<ChainId> {
        let mut chain: Vec<ChainId> = Vec::with_capacity(diff_ids.len());
        for diff_id in diff_ids {
            let next = match chain.last() {
                None => ChainId(diff_id.0),
                Some(parent) => {
                    ChainId(Sha256::digest(format!("{parent} {diff_id}").as_bytes()).into())
                }
            };
            chain.push(next);
        }
        chain
    }

    /// The identity of a stack whose topmost layer has no diff ID and is identified by its
    /// snapshot's `key`.
    pub fn above(parent: Option<ChainId>, key: &str) -> ChainId {
        let key = DiffId(Sha256::digest(key.as_bytes()).into());
        match parent {
            None => ChainId(key.0),
            Some(parent) => ChainId(Sha256::digest(format!("{parent} {key}").as_bytes()).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_its_own_text() {
        let id = DiffId([0xab; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        let err = "sha512:00".parse::<DiffId>().unwrap_err().to_string();
        assert!(err.starts_with("`sha512:00` is not a diff ID"), "{err}");
    }

    #[test]
    fn chain_ids_follow_the_image_specification() {
        // The example is computed by hand: sha256("sha256:00… sha256:11…").
        let chain = ChainId::of_layers(&[DiffId([0; 32]), DiffId([0x11; 32])]);
        assert_eq!(chain[0], ChainId([0; 32]));
        let text = format!("sha256:{} sha256:{}", "00".repeat(32), "11".repeat(32));
        assert_eq!(chain[1], ChainId(Sha256::digest(text.as_bytes()).into()));
    }
}
