//! The processes of a container: what the kernel shows of each, and its program.
//!
//! A process is held by its directory in `/proc`, so that a pid that is used again mixes no two.
//! What takes locks of a process's memory is read with patience (`sys::errand`). No memory is
//! read.

use std::collections::HashMap;

use serde::Serialize;

use super::draft::{Cut, Draft};
use super::entry::Entry;
use super::files::Files;
use super::redact::{Variable, variables};
use crate::model::{Incarnation, ProcessIdentity, printable};
use crate::sys::procfs::{self, Descriptor, Handle, SocketEntry, Whereabouts};

/// How many processes are described, and how many of their descriptors.
pub(super) const MOST: usize = 256;
const MOST_DESCRIPTORS: usize = 1024;
/// How many network namespaces are read.
const MOST_NETWORKS: usize = 16;
const MAX_COMMAND_LINE: u64 = 128 << 10;
const MAX_ENVIRONMENT: u64 = 256 << 10;
const MAX_MAPS: u64 = 1 << 20;

/// What is kept of a process.
pub(super) struct KeptProcess {
    /// Its program, unless that is the image's.
    pub(super) program: Option<Entry>,
}

/// What is described of one process. A published JSON schema (docs/evidence.md).
// Long: one field for each key.
#[derive(Debug, Serialize)]
struct ProcessJson {
    #[serde(flatten)]
    identity: ProcessIdentity,
    /// Its pid in its own pid namespace.
    own_pid: Option<u32>,
    parent: u32,
    name: String,
    state: String,
    /// Where its program is, with the kernel's ` (deleted)`.
    exe: Option<String>,
    working_directory: Option<String>,
    root: Option<String>,
    namespaces: Vec<String>,
    descriptors: Vec<DescriptorJson>,
    descriptors_left_out: bool,
    /// Null if it could not be read.
    environment: Option<Vec<Variable>>,
    /// The texts beside this one that are not whole, because they are too long, and those that
    /// could not be read.
    texts_cut: Vec<&'static str>,
    texts_unread: Vec<&'static str>,
    /// It ended, or became another program, while it was read.
    changed: Option<&'static str>,
    program: Option<Entry>,
}

#[derive(Debug, Serialize)]
struct DescriptorJson {
    number: u32,
    /// The kernel's name of what is open.
    target: String,
    socket: Option<SocketJson>,
}

#[derive(Debug, Serialize)]
struct SocketJson {
    family: &'static str,
    local: String,
    remote: Option<String>,
    listens: bool,
}

/// Holds the init of a run; `None` if it has ended.
pub(super) fn init_of(run: Incarnation) -> Option<Handle> {
    match run.start_time {
        Some(start_time) => Handle::open_exactly(ProcessIdentity { pid: run.pid, start_time }).ok(),
        None => Handle::open(run.pid).ok(),
    }
}

/// The process that is meant, if it is there and belongs to the container.
pub(super) fn meant(own: &Whereabouts, process: ProcessIdentity) -> Option<ProcessIdentity> {
    let handle = Handle::open(process.pid).ok()?;
    let is_it = process.may_be(handle.identity()) && belongs(own, &handle.whereabouts());
    is_it.then(|| handle.identity())
}

/// The processes of a container, the oldest first.
pub(super) fn all_of(own: &Whereabouts) -> Vec<ProcessIdentity> {
    let mut all = Vec::new();
    for pid in procfs::all().unwrap_or_default() {
        let Ok(handle) = Handle::open(pid) else { continue };
        if belongs(own, &handle.whereabouts()) {
            all.push(handle.identity());
        }
    }
    all.sort_unstable_by_key(|process| (process.start_time, process.pid));
    all
}

/// Whether a process belongs to the container of an init: by its control group, or because it
/// has joined the container's mounts from outside.
fn belongs(init: &Whereabouts, process: &Whereabouts) -> bool {
    let is_below = |own: &Vec<u8>| {
        let path = process.cgroup.as_ref().and_then(|path| path.strip_prefix(&own[..]));
        own.len() > 1 && path.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
    };
    let is_of_host = |mounts: u64| procfs::is_host_mount_namespace(mounts);
    init.cgroup.as_ref().is_some_and(is_below)
        || init
            .mount_namespace
            .is_some_and(|own| !is_of_host(own) && process.mount_namespace == Some(own))
}

/// The sockets of network namespaces, each read once.
#[derive(Default)]
pub(super) struct Networks(HashMap<u64, HashMap<u64, SocketEntry>>);

impl Networks {
    fn of(&mut self, process: &Handle) -> Option<&HashMap<u64, SocketEntry>> {
        let namespace = process.network_namespace().ok()?;
        if self.0.len() >= MOST_NETWORKS && !self.0.contains_key(&namespace) {
            return None;
        }
        Some(self.0.entry(namespace).or_insert_with(|| process.sockets()))
    }
}

/// Takes one process. `None` if it is kept already, or has ended.
pub(super) fn take(
    draft: &mut Draft,
    identity: ProcessIdentity,
    files: &mut Files,
    networks: &mut Networks,
    environment: bool,
) -> Result<Option<KeptProcess>, Cut> {
    let name = |file: &str| format!("processes/{}-{}/{file}", identity.pid, identity.start_time);
    if draft.has(&name("process.json")) {
        return Ok(None);
    }
    draft.check_time()?;
    let Ok(process) = Handle::open_exactly(identity) else { return Ok(None) };
    let process = &process;
    let before = process.stat().ok();
    // What ends soonest comes first: the program, then what the kernel shows.
    let program = files.take_program(draft, process)?;
    let texts = [
        ("cmdline", process.command_line(MAX_COMMAND_LINE).ok(), MAX_COMMAND_LINE),
        ("maps", process.maps(MAX_MAPS).ok(), MAX_MAPS),
        ("status", process.status().ok(), u64::MAX),
        ("cgroup", process.groups().ok(), u64::MAX),
    ];
    let variables_text = process.environment(MAX_ENVIRONMENT).ok();
    let (descriptors, descriptors_left_out) = descriptors(process, networks);
    let is_cut = |text: &Vec<u8>, most: u64| text.len() as u64 >= most;
    let texts_cut = texts
        .iter()
        .filter(|(_, text, most)| text.as_ref().is_some_and(|text| is_cut(text, *most)));
    let texts_unread = texts.iter().filter(|(_, text, _)| text.is_none());
    let text = |bytes: Vec<u8>| printable(&bytes);
    let first = before.as_ref().unwrap_or(process.first_stat());
    let mut json = ProcessJson {
        identity,
        own_pid: process.own_number(),
        parent: first.parent,
        name: printable(&first.comm),
        state: printable(&[first.state]),
        exe: process.exe().ok().map(text),
        working_directory: process.cwd().ok().map(text),
        root: process.root().ok().map(text),
        namespaces: process.namespaces(),
        descriptors,
        descriptors_left_out,
        environment: variables_text.as_deref().map(variables),
        texts_cut: texts_cut.map(|(name, ..)| *name).collect(),
        texts_unread: texts_unread.map(|(name, ..)| *name).collect(),
        changed: None,
        program: program.clone(),
    };
    json.changed = match (before, process.stat().ok()) {
        (_, None) => Some("it ended while it was read"),
        (_, Some(after)) if after.has_ended() => Some("it ended while it was read"),
        (Some(before), Some(after)) if before.area != after.area => {
            Some("it became another program while it was read")
        }
        _ => None,
    };
    for (file, text, _) in texts {
        if let Some(text) = text {
            draft.put(&name(file), &text)?;
        }
    }
    if let Some(text) = variables_text.filter(|_| environment) {
        draft.put(&name("environ"), &text)?;
    }
    // Last: a process with this file is whole.
    draft.put_json(&name("process.json"), &json)?;
    Ok(Some(KeptProcess { program }))
}

fn descriptors(process: &Handle, networks: &mut Networks) -> (Vec<DescriptorJson>, bool) {
    let mut numbers = process.descriptors(MOST_DESCRIPTORS + 1).unwrap_or_default();
    let are_more = numbers.len() > MOST_DESCRIPTORS;
    numbers.truncate(MOST_DESCRIPTORS);
    numbers.sort_unstable();
    let describe = |number: u32| {
        let target = process.descriptor_name(number).ok()?;
        let socket = match target.starts_with(b"socket:[") {
            true => socket_of(process, number, networks),
            false => None,
        };
        Some(DescriptorJson { number, target: printable(&target), socket })
    };
    (numbers.into_iter().filter_map(describe).collect(), are_more)
}

fn socket_of(process: &Handle, number: u32, networks: &mut Networks) -> Option<SocketJson> {
    let Ok(Descriptor::Socket(inode)) = process.descriptor(number) else { return None };
    let SocketEntry { family, local, remote, listens } = networks.of(process)?.get(&inode)?.clone();
    Some(SocketJson { family, local: printable(&local), remote, listens })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_belongs_by_its_group_or_by_mounts_that_are_not_the_hosts() {
        let at = |mounts, cgroup: &str| Whereabouts {
            mount_namespace: Some(mounts),
            pid_namespace: Some(1),
            cgroup: Some(cgroup.as_bytes().to_vec()),
        };
        let init = at(7, "/pods/a");
        assert!(belongs(&init, &at(8, "/pods/a")) && belongs(&init, &at(8, "/pods/a/b")));
        assert!(belongs(&init, &at(7, "/user.slice")), "it came in from outside");
        for other in ["/pods/ab", "/pods", "/", ""] {
            assert!(!belongs(&init, &at(8, other)), "{other}");
        }
        assert!(!belongs(&at(7, "/"), &at(8, "/x")), "the root of the hierarchy is no container");
        let host = Handle::open(std::process::id()).unwrap().mount_namespace().unwrap();
        assert!(!belongs(&at(host, "/"), &at(host, "/x")));
    }
}
