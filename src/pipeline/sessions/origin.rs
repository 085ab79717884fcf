//! Finds how a session came into its container, and which client asked for it. The sources are
//! containerd and the record of the container. Pure.

use crate::model::{Container, ContainerId, Entry, Opening};

/// The manager of a container that only containerd itself manages.
pub(in crate::pipeline) const CONTAINERD: &str = "containerd";

/// The software that manages a container, as far as it is known before the record of the
/// container arrives.
pub(in crate::pipeline) fn manager(
    id: &ContainerId,
    container: Option<&Container>,
) -> &'static str {
    let is_cri =
        container.is_some_and(|container| container.labels.contains_key("io.cri-containerd.kind"));
    match &*id.namespace {
        "k8s.io" => "cri",
        "moby" => "docker",
        _ if is_cri => "cri",
        _ => CONTAINERD,
    }
}

/// The client of a session, if it can be known: a process of the shim, and input that the
/// manager forwards, come from the manager.
pub(super) fn client(
    id: &ContainerId,
    container: Option<&Container>,
    opening: &Opening,
) -> Option<String> {
    let is_by_manager = match opening.entry {
        Entry::RuntimeExec => true,
        Entry::Attach => opening.root != opening.process.identity,
        Entry::RuntimeDirect
        | Entry::Namespace
        | Entry::SharedPidNamespace
        | Entry::ReverseShell => false,
    };
    is_by_manager.then(|| manager(id, container).to_owned())
}

/// The detail of a finding about a session that did not come through containerd.
pub(super) fn describe(entry: Entry) -> Option<&'static str> {
    match entry {
        Entry::RuntimeExec | Entry::ReverseShell => None,
        Entry::RuntimeDirect => Some("a container runtime was run by hand, past containerd"),
        Entry::Namespace => {
            Some("a process of the host's joined the container's namespaces, past its runtime")
        }
        Entry::SharedPidNamespace => {
            Some("this container was put into the pid namespace of another one")
        }
        Entry::Attach => Some("a client was connected to the terminal of its first process"),
    }
}
