//! How a session came in, and which processes and which user stand behind it.
//!
//! `opening` calls [`opening`] when it has found a session. The facts are gathered while the
//! first process may be exiting: what /proc no longer shows comes from the kernel's records.
//! [`Evidence`] decides the kind of entry from them, and names of programs do not count.

use super::inside;
use super::shared::Sessions;
use crate::model::{
    Ancestor, ContainerId, Entry, Interactive, Opening, Process, ProcessIdentity, printable,
};
use crate::sys::procfs::{self, Handle};
use crate::watch::core::watched::Watched;
use crate::watch::process::describe;
use crate::watch::process::roots::{Arrived, Maker};

/// What is known of how a runtime has started a process, beside what /proc shows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ByRuntime {
    /// A runtime on the host was invoked to execute something in this container.
    pub(crate) was_invoked: bool,
    /// As it was when the process was judged, or by the kernel's record if it had ended.
    pub(crate) is_in_control_group: Option<bool>,
    /// When the gate was asked about it, by the clock of the records.
    pub(crate) asked: Option<u64>,
}

/// What is reported of a session's opening, gathered while its first process may be exiting.
pub(crate) fn opening(
    shared: &Sessions,
    watched: &Watched,
    mut process: Process,
    by_runtime: ByRuntime,
) -> Opening {
    let identity = process.identity;
    let handle = Handle::open_exactly(identity).ok();
    let has_terminal = process.tty.is_some()
        || handle.as_ref().is_some_and(|handle| handle.is_terminal(0) == Some(true));
    let shim = procfs::read_stat(watched.init.pid).ok().map(|init| init.parent);
    let parent = process.ancestors.last().map(|outermost| outermost.identity.pid);
    let parent = parent.or_else(|| Some(handle.as_ref()?.first_stat().parent));
    let mut chain = parent.map(procfs::chain).unwrap_or_default();
    if !is_whole(&chain)
        && let Some(reaper) = handle.as_ref().and_then(|handle| handle.stat().ok())
    {
        // Its parent has ended, and the kernel has given it another parent.
        chain = procfs::chain(reaper.parent);
    }
    // The kernel's records show parents that have ended.
    let recorded = if is_whole(&chain) {
        None
    } else {
        let since = by_runtime.asked.unwrap_or_default();
        shared.roots().arrival(&watched.container, identity.pid, since).cloned()
    };
    let makers = recorded.as_ref().map(|arrived| &*arrived.makers).unwrap_or_default();
    let is_shim = |pid| Some(pid) == shim;
    let evidence = Evidence {
        is_by_runtime: by_runtime.was_invoked,
        is_child_of_shim: chain.iter().any(|one| is_shim(one.identity().pid))
            || makers.iter().any(|maker| is_shim(maker.pid)),
        is_parent_gone: !is_whole(&chain) && (makers.is_empty() || shim.is_none()),
        is_in_control_group: handle
            .as_ref()
            .and_then(|one| inside::is_in_control_group(one, watched))
            .or(by_runtime.is_in_control_group)
            .or(recorded.as_ref().and_then(Arrived::in_control_group)),
    };
    let beside = if identity == watched.init { beside(shared, watched) } else { None };
    let entry = if beside.is_some() { Entry::SharedPidNamespace } else { evidence.entry() };
    let host = if makers.is_empty() {
        chain.iter().map(describe::ancestor).collect()
    } else {
        made_by(makers)
    };
    let host = above(process.ancestors.last_mut(), host);
    let variables = &shared.settings.requester_variables;
    let requested_by = requester(variables, process.argv.as_deref().unwrap_or_default())
        .or_else(|| Some(printable(&handle.as_ref()?.variable(variables)?)));
    Opening {
        root: identity,
        entry,
        interactive: has_terminal.then_some(Interactive::Terminal),
        host,
        login: handle.as_ref().and_then(Handle::login),
        requested_by,
        beside,
        process,
    }
}

/// The parents above `last`, the outermost ancestor that is already described. `last` may be
/// among `parents`. If it had ended when it was described, they may still hold its program.
pub(crate) fn above(last: Option<&mut Ancestor>, mut parents: Vec<Ancestor>) -> Vec<Ancestor> {
    let Some(last) = last else { return parents };
    let is_last = |parent: &Ancestor| parent.identity.pid == last.identity.pid;
    if let Some(place) = parents.iter().position(is_last) {
        let known = parents.drain(..=place).next_back();
        if last.exe.is_none()
            && let Some(known) = known
        {
            (last.exe, last.argv) = (known.exe, known.argv);
        }
    }
    parents
}

/// The parents of a process by the kernel's records, followed by the parents of the last of
/// them by /proc: the records end at a process that is older than they are.
pub(crate) fn made_by(makers: &[Maker]) -> Vec<Ancestor> {
    let by_record = |maker: &Maker| {
        let living = Handle::open(maker.pid).ok().map(|handle| describe::ancestor(&handle));
        let exe = maker.exe.as_deref().map(printable);
        // The pid may have been reused.
        living.filter(|living| living.exe == exe || exe.is_none()).unwrap_or(Ancestor {
            identity: ProcessIdentity { pid: maker.pid, start_time: 0 },
            exe,
            argv: None,
            is_proven_inside: false,
        })
    };
    let above = makers.last().and_then(|last| procfs::read_stat(last.pid).ok());
    let above = above.map(|last| procfs::chain(last.parent)).unwrap_or_default();
    makers.iter().map(by_record).chain(above.iter().map(describe::ancestor)).collect()
}

/// The user that requested a session whose command is `env NAME=VALUE COMMAND`. Webhooks
/// name the user by putting that before the requested command.
pub(crate) fn requester(variables: &[String], argv: &[String]) -> Option<String> {
    let (program, rest) = argv.split_first()?;
    if program.rsplit('/').next() != Some("env") {
        return None;
    }
    let mut assignments = rest.iter().map_while(|argument| argument.split_once('='));
    assignments
        .find_map(|(name, value)| variables.iter().any(|known| known == name).then_some(value))
        .map(ToOwned::to_owned)
}

/// Whether a chain of parents leads to the host's first process. The kernel no longer shows
/// the parent of a process that is exiting.
pub(crate) fn is_whole(chain: &[Handle]) -> bool {
    chain.last().is_some_and(|last| last.identity().pid == 1)
}

/// The other container into whose pid namespace this one was put.
pub(crate) fn beside(shared: &Sessions, watched: &Watched) -> Option<ContainerId> {
    let namespace = watched.pid_namespace?;
    if watched.has_own_pid_namespace() || procfs::is_host_pid_namespace(namespace) {
        return None;
    }
    Some(shared.table.first_in_pid_namespace(namespace)?.container.clone())
}

/// What decides how a session came in. Names are no evidence. The ancestors of a process and
/// the place where its runtime has put it are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Evidence {
    pub(crate) is_by_runtime: bool,
    /// It descends from the process that started the container's init.
    pub(crate) is_child_of_shim: bool,
    /// Nothing is known of its parent: typical of a process that a shim executes and that
    /// ends at once.
    pub(crate) is_parent_gone: bool,
    pub(crate) is_in_control_group: Option<bool>,
}

impl Evidence {
    pub(crate) fn entry(self) -> Entry {
        match self {
            Evidence { is_in_control_group: Some(false), .. } => Entry::Namespace,
            Evidence { is_child_of_shim: true, .. } => Entry::RuntimeExec,
            // A shim does not wait for the runtime's command. A process that invokes a
            // runtime directly does, and so the parent would still be there.
            Evidence { is_parent_gone: true, is_in_control_group: Some(true), .. }
            | Evidence { is_parent_gone: true, is_by_runtime: true, .. } => Entry::RuntimeExec,
            Evidence { is_by_runtime: true, .. } => Entry::RuntimeDirect,
            // A runtime puts what it executes into the container's control group.
            Evidence { is_in_control_group: Some(true), .. } => Entry::RuntimeDirect,
            Evidence { is_in_control_group: None, .. } => Entry::Namespace,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evidence_decides_how_a_session_came_in() {
        let none = Evidence {
            is_by_runtime: false,
            is_child_of_shim: false,
            is_parent_gone: false,
            is_in_control_group: None,
        };
        let check = |evidence: Evidence, expected| assert_eq!(evidence.entry(), expected);
        let inside = Some(true);
        let shim = Evidence { is_child_of_shim: true, is_in_control_group: inside, ..none };
        check(shim, Entry::RuntimeExec);
        check(Evidence { is_by_runtime: true, ..shim }, Entry::RuntimeExec);
        let by_hand = Evidence { is_by_runtime: true, is_in_control_group: inside, ..none };
        check(by_hand, Entry::RuntimeDirect);
        check(Evidence { is_by_runtime: false, ..by_hand }, Entry::RuntimeDirect);
        // It ended before anything but the gate's own facts could be read.
        let short = Evidence { is_by_runtime: true, is_parent_gone: true, ..none };
        check(short, Entry::RuntimeExec);
        let recorded = Evidence { is_parent_gone: true, is_in_control_group: inside, ..none };
        check(recorded, Entry::RuntimeExec);
        // Whatever its name is, no runtime has put it there.
        let outside = Some(false);
        check(Evidence { is_in_control_group: outside, ..none }, Entry::Namespace);
        check(Evidence { is_in_control_group: outside, ..by_hand }, Entry::Namespace);
        check(none, Entry::Namespace);
    }

    #[test]
    fn a_command_that_a_webhook_has_changed_names_the_requesting_user() {
        let variables = ["SPO_EXEC_REQUEST_UID".to_owned(), "ASKED_BY".to_owned()];
        let of = |argv: &str| {
            let argv: Vec<String> = argv.split(' ').map(str::to_owned).collect();
            requester(&variables, &argv)
        };
        assert_eq!(of("env SPO_EXEC_REQUEST_UID=7f3 sh -i").as_deref(), Some("7f3"));
        assert_eq!(of("/usr/bin/env A=1 ASKED_BY=a=b sh").as_deref(), Some("a=b"));
        assert_eq!(of("env sh ASKED_BY=x"), None, "an argument of another program");
        assert_eq!(of("sh ASKED_BY=x"), None);
        assert_eq!(requester(&variables, &[]), None);
    }

    #[test]
    fn the_parents_above_are_all_but_those_described_already() {
        let one = |pid: u32, exe: Option<&str>| Ancestor {
            identity: ProcessIdentity { pid, start_time: 1 },
            exe: exe.map(ToOwned::to_owned),
            argv: None,
            is_proven_inside: false,
        };
        let (runc, shim) = (|| one(9, Some("runc")), || one(5, Some("shim")));
        let check = |known: Option<Ancestor>, parents: &[Ancestor], expected: &[Ancestor]| {
            let mut known = known;
            assert_eq!(above(known.as_mut(), parents.to_vec()), expected);
            known
        };
        check(None, &[shim()], &[shim()]);
        check(Some(runc()), &[runc(), shim()], &[shim()]);
        // It has ended, and its child has another parent now.
        check(Some(one(9, None)), &[shim()], &[shim()]);
        let known = check(Some(one(9, None)), &[runc(), shim()], &[shim()]);
        assert_eq!(known, Some(runc()));
    }
}
