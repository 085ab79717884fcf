//! The names of images: which image a name means, and which names containerd lists.
//!
//! A name belongs to one image of a namespace. Several sockets of containerd may list
//! names; a list removes only the names that its own socket listed before.

use std::collections::HashMap;

use super::error::{Error, FindError};
use super::records::{ImageName, ImageRecord, give_name};
use super::state::{State, Store};
use crate::model::{ChainId, printable};

impl Store {
    /// The image that a text names: by its name (`busybox` is
    /// `docker.io/library/busybox:latest`), its manifest digest, its chain ID, or the
    /// beginning of either.
    pub fn find(&self, text: &str) -> Result<ImageRecord, FindError> {
        let state = self.state();
        let wanted = full_name(text);
        let by_name = |record: &&ImageRecord| {
            record.names.iter().any(|image| image.name == text || full_name(&image.name) == wanted)
        };
        let hex = text.strip_prefix("sha256:").unwrap_or(text).to_ascii_lowercase();
        let is_prefix = hex.len() >= 4 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        let by_digest = |record: &&ImageRecord| {
            let digests = record.names.iter().filter_map(|image| image.manifest_digest);
            let digests = digests.chain(record.manifest_digest).map(|digest| digest.hex());
            is_prefix
                && digests.chain([record.chain_id.hex()]).any(|digest| digest.starts_with(&hex))
        };

        let mut found: Vec<&ImageRecord> = state.records.values().filter(by_name).collect();
        if found.is_empty() {
            found = state.records.values().filter(by_digest).collect();
        }
        let text = printable(text.as_bytes());
        match found[..] {
            [] => Err(FindError::Unknown { text }),
            [record] => Ok(record.clone()),
            _ => Err(FindError::Ambiguous {
                text,
                candidates: found.iter().map(|record| record.chain_id.to_string()).collect(),
            }),
        }
    }

    /// Gives a recorded image a name, and takes it from any other.
    pub fn name_image(&self, chain_id: ChainId, name: &ImageName) -> Result<(), Error> {
        let mut changed = Vec::new();
        for record in self.state().records.values_mut() {
            let before = (record.names.clone(), record.manifest_digest);
            if record.chain_id == chain_id {
                give_name(&mut record.names, name);
                record.unneeded_since = None;
                record.manifest_digest = name.manifest_digest.or(record.manifest_digest);
            } else {
                record.names.retain(|other| !other.is(&name.namespace, &name.name));
            }
            if before != (record.names.clone(), record.manifest_digest) {
                changed.push(record.clone());
            }
        }
        changed.iter().try_for_each(|record| self.write_record(record))
    }

    /// Sets the names that one socket of containerd lists. Names that it listed before
    /// and lists no more are removed.
    pub fn set_names(&self, endpoint: &str, listed: &[(ImageName, ChainId)]) -> Result<(), Error> {
        // If a name is listed twice, the last image has it.
        let owners: HashMap<(&str, &str), (&ImageName, ChainId)> = listed
            .iter()
            .map(|(image, chain_id)| {
                ((image.namespace.as_str(), image.name.as_str()), (image, *chain_id))
            })
            .collect();
        let mut given: HashMap<ChainId, Vec<&ImageName>> = HashMap::new();
        for (image, chain_id) in owners.values() {
            given.entry(*chain_id).or_default().push(image);
        }
        let mut changed = Vec::new();
        {
            let mut state = self.state();
            let State { records, listed_by, .. } = &mut *state;
            for record in records.values_mut() {
                let before = (record.names.clone(), record.manifest_digest);
                record.names.retain(|image| {
                    if owners.contains_key(&(image.namespace.as_str(), image.name.as_str())) {
                        // The image that has it now receives it below.
                        return false;
                    }
                    let key = (image.namespace.clone(), image.name.clone());
                    let is_gone = listed_by.get(&key).is_none_or(|by| by == endpoint);
                    if is_gone {
                        listed_by.remove(&key);
                    }
                    !is_gone
                });
                if let Some(names) = given.get(&record.chain_id) {
                    record.names.extend(names.iter().copied().cloned());
                    record.unneeded_since = None;
                    record.names.sort();
                    let mut digests = record.names.iter().filter_map(|image| image.manifest_digest);
                    // A digest that one of the names still has stays.
                    let is_named = digests.clone().any(|one| Some(one) == record.manifest_digest);
                    if !is_named {
                        record.manifest_digest = digests.next_back().or(record.manifest_digest);
                    }
                }
                if before != (record.names.clone(), record.manifest_digest) {
                    changed.push(record.clone());
                }
            }
            for (image, _) in listed {
                let key = (image.namespace.clone(), image.name.clone());
                listed_by.insert(key, endpoint.to_owned());
            }
        }
        changed.iter().try_for_each(|record| self.write_record(record))
    }

    /// Removes an image's name. Its baseline stays until it is collected.
    pub fn remove_name(&self, namespace: &str, name: &str) -> Result<(), Error> {
        let mut changed = Vec::new();
        {
            let mut state = self.state();
            state.listed_by.remove(&(namespace.to_owned(), name.to_owned()));
            for record in state.records.values_mut() {
                let before = record.names.len();
                record.names.retain(|image| !image.is(namespace, name));
                if record.names.len() != before {
                    changed.push(record.clone());
                }
            }
        }
        changed.iter().try_for_each(|record| self.write_record(record))
    }
}

/// The name in full, as containerd keeps it.
fn full_name(name: &str) -> String {
    let (registry, rest) = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
            (first, rest.to_owned())
        }
        Some(_) => ("docker.io", name.to_owned()),
        None => ("docker.io", format!("library/{name}")),
    };
    let last = rest.rsplit('/').next().unwrap_or_default();
    let tag = if last.contains([':', '@']) { "" } else { ":latest" };
    format!("{registry}/{rest}{tag}")
}
