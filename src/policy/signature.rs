//! The signature of a set of policy files: a list of their SHA-256 hashes, signed by minisign.
//!
//! The list names each file, so that none can be left out, added or taken from another set. Pure,
//! but for the function that reads a file.

use std::collections::BTreeMap;
use std::path::Path;

use minisign_verify::{PublicKey, Signature};
use sha2::{Digest as _, Sha256};

use super::source::{Fault, PolicyFile};
use crate::model::printable;

/// The list, as `sha256sum` writes it, and its signature.
const LIST: &str = "SHA256SUMS";
const SIGNATURE: &str = "SHA256SUMS.minisig";

/// Checks that the files are those of a signed list. Returns the trusted comment of the
/// signature.
pub(super) fn verify(
    key: &str,
    directory: &Path,
    files: &[PolicyFile],
    mut read: impl FnMut(&Path) -> Result<String, Fault>,
) -> Result<String, Fault> {
    let fault = |name: &str, message: String| Fault {
        file: if name.is_empty() { directory.into() } else { directory.join(name) },
        at: None,
        message,
    };
    let key = PublicKey::from_base64(key.trim()).map_err(|err| {
        fault("", format!("the setting policy.public_key is no public key of minisign: {err}"))
    })?;
    let list = read(&directory.join(LIST))?;
    let signature = read(&directory.join(SIGNATURE))?;
    let signature = Signature::decode(&signature)
        .map_err(|err| fault(SIGNATURE, format!("is no signature of minisign: {err}")))?;
    key.verify(list.as_bytes(), &signature, true).map_err(|err| {
        fault(SIGNATURE, format!("does not belong to {LIST} and policy.public_key: {err}"))
    })?;
    let mut listed = BTreeMap::new();
    for (number, line) in list.lines().enumerate() {
        let entry = line.split_once("  ").or_else(|| line.split_once(" *"));
        let (hash, name) = entry.ok_or_else(|| Fault {
            at: Some((number + 1, 1)),
            ..fault(
                LIST,
                "a line is a SHA-256 hash, two spaces and a name (sha256sum *.toml)".to_owned(),
            )
        })?;
        listed.insert(name.strip_prefix("./").unwrap_or(name), hash);
    }
    for PolicyFile { name, text, .. } in files {
        match listed.remove(name.as_str()) {
            Some(hash) if hash.eq_ignore_ascii_case(&hex(text.as_bytes())) => (),
            Some(_) => return Err(fault(name, format!("is not the file that {LIST} names"))),
            None => return Err(fault(name, format!("is not signed: {LIST} does not name it"))),
        }
    }
    match listed.keys().next() {
        Some(name) => Err(fault(LIST, format!("names a file that is not there: {name}"))),
        None => Ok(printable(signature.trusted_comment().as_bytes())),
    }
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
