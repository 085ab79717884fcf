//! The sockets of containerd: whether each one is connected, and was listed since. Only if all
//! of them are, all containers are known. Pure values; `node` changes them.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

#[derive(Debug, Default)]
pub(super) struct Endpoints {
    /// Why a socket is not connected; `None` if it is.
    lost: BTreeMap<Arc<str>, Option<String>>,
    /// Connected, and not listed since.
    unlisted: HashSet<Arc<str>>,
}

impl Endpoints {
    pub(super) fn connected(&mut self, endpoint: Arc<str>) {
        self.unlisted.insert(endpoint.clone());
        self.lost.insert(endpoint, None);
    }

    /// True if the socket was connected until now.
    pub(super) fn disconnected(&mut self, endpoint: Arc<str>, reason: String) -> bool {
        self.lost.insert(endpoint, Some(reason)) == Some(None)
    }

    /// True if this is the first listing since the socket was connected.
    pub(super) fn listed(&mut self, endpoint: &str) -> bool {
        self.unlisted.remove(endpoint)
    }

    /// Whether every containerd is connected and listed.
    pub(super) fn is_whole(&self) -> bool {
        self.unlisted.is_empty() && self.lost.values().all(Option::is_none)
    }

    /// The sockets, each with the reason why it is not connected.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, Option<&String>)> {
        self.lost.iter().map(|(socket, lost)| (&**socket, lost.as_ref()))
    }
}
