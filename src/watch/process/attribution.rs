//! Decides the owner of an execution: an execution belongs to the container of its process,
//! and a file to the container in whose root it lies. If these differ, the execution is a
//! finding of the process's container.
//!
//! The container of a process is decided in this order: by descent (the kernel's record of
//! each birth), by the control group in the kernel's record, by the process's namespaces. A
//! process can join namespaces and, with the rights, control groups; it cannot change its
//! parent by birth. The name of a process decides nothing.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::describe::Caller;
use super::reach;
use super::shared::Processes;
use crate::model::ContainerId;
use crate::sys::door::Held;
use crate::sys::file::{self, Stat};
use crate::sys::perf::Mapped;
use crate::sys::procfs::{self, Handle};
use crate::watch::core::table::Table;
use crate::watch::core::watched::Watched;

/// The container that an execution is reported for.
#[derive(Clone, Debug)]
pub(crate) struct Attribution {
    pub(crate) watched: Arc<Watched>,
    /// The container in whose root the program lies, if that is another one.
    pub(crate) file_of: Option<Arc<Watched>>,
}

impl Attribution {
    /// `actor` is the container of the process, `owner` that of the file.
    pub(crate) fn new(
        actor: Option<Arc<Watched>>,
        owner: Option<Arc<Watched>>,
        is_within: impl FnOnce(&Watched, &Arc<Watched>) -> bool,
    ) -> Option<Attribution> {
        Some(match (actor, owner) {
            // A host process that runs a container's file.
            (None, owner) => Attribution { watched: owner?, file_of: None },
            (Some(actor), None) => Attribution { watched: actor, file_of: None },
            (Some(actor), Some(owner)) if Arc::ptr_eq(&actor, &owner) => {
                Attribution { watched: actor, file_of: None }
            }
            // A container manager in a container enters one of its own containers.
            (Some(actor), Some(owner)) if is_within(&owner, &actor) => {
                Attribution { watched: owner, file_of: None }
            }
            (Some(actor), owner) => Attribution { watched: actor, file_of: owner },
        })
    }
}

/// Whether a container was created by a process of another one: for the inner container, the
/// outer one is like the host.
pub(crate) fn is_within(table: &Table, inner: &Watched, outer: &Arc<Watched>) -> bool {
    let Ok(init) = procfs::read_stat(inner.init.pid) else { return false };
    init.identity == inner.init
        && procfs::chain(init.parent)
            .iter()
            .any(|parent| table.of_process(parent).is_some_and(|it| Arc::ptr_eq(&it, outer)))
}

/// Whether a file in the root of `owner` belongs to another container from the view of
/// `actor`.
pub(crate) fn is_apart(shared: &Processes, actor: &Arc<Watched>, owner: &Arc<Watched>) -> bool {
    !Arc::ptr_eq(actor, owner)
        && actor.container != owner.container
        && !is_within(&shared.table, owner, actor)
}

/// Whether a process that the gate saw executing a file of `owner` belongs to another
/// container. Then the trace reports the execution, for that container.
pub(crate) fn is_of_another(shared: &Processes, owner: &Arc<Watched>, caller: &Caller) -> bool {
    caller.stat.as_ref().is_some_and(|stat| other_than(shared, owner, stat).is_some())
}

/// The container of a process that the gate saw, if it is another one than `owner`: a process
/// can enter another container's mount namespace.
pub(crate) fn other_than(
    shared: &Processes,
    owner: &Arc<Watched>,
    process: &procfs::Stat,
) -> Option<Arc<Watched>> {
    if !shared.records_executions() {
        return None;
    }
    let identity = process.identity;
    let born = |identity| shared.births().home_of(identity).cloned();
    let lives = |identity| shared.table.of_process(&Handle::open_exactly(identity).ok()?);
    let actor = born(identity).or_else(|| {
        // The parent's pid alone could be that of any container's process by now.
        let parent = procfs::read_stat(process.parent).ok().map(|parent| parent.identity);
        let parent = parent.filter(|parent| parent.start_time <= identity.start_time);
        parent.and_then(born).or_else(|| lives(identity)).or_else(|| parent.and_then(lives))
    });
    actor.filter(|actor| is_apart(shared, actor, owner))
}

/// The container in whose root a process's program lies.
pub(crate) fn runs_file_of(shared: &Processes, handle: &Handle) -> Option<ContainerId> {
    let exe = file::stat(handle.open_exe().ok()?).ok()?;
    Some(shared.table.owner(&exe)?.container.clone())
}

/// Opens a program in another container's root, by the process that runs it or by its name
/// there, so that it can be examined.
pub(crate) fn open_program(
    owner: &Watched,
    handle: Option<&Handle>,
    mapped: Option<&Mapped>,
) -> Option<Held> {
    let is_it = |stat: &Stat| match mapped {
        Some(mapped) => (mapped.device, mapped.inode) == (stat.device, stat.inode),
        None => stat.device == owner.device,
    };
    let checked = |fd: OwnedFd| {
        let stat = file::stat(&fd).ok()?;
        is_it(&stat).then_some(Held { fd, stat })
    };
    let by_process = || checked(handle?.open_exe().ok()?);
    let by_name = || {
        let name = &*mapped?.name;
        let init = Handle::open_exactly(owner.init).ok()?;
        checked(reach::open_in(owner, &init, name)?)
    };
    by_process().or_else(by_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::core::table::tests::watched;

    #[test]
    fn x13_an_execution_belongs_to_its_process_and_the_file_may_belong_to_another_container() {
        let (a, b) = (Arc::new(watched("a", 1)), Arc::new(watched("b", 2)));
        let check =
            |actor: Option<&Arc<Watched>>, owner: Option<&Arc<Watched>>, within, expected| {
                let attributed = Attribution::new(actor.cloned(), owner.cloned(), |_, _| within);
                let id = |watched: &Arc<Watched>| watched.container.id.to_string();
                let found = attributed.map(|it| (id(&it.watched), it.file_of.as_ref().map(id)));
                let expected: Option<(&str, Option<&str>)> = expected;
                let expected = expected.map(|(it, of)| (it.to_owned(), of.map(ToOwned::to_owned)));
                assert_eq!(found, expected);
            };
        check(Some(&a), Some(&b), false, Some(("a", Some("b"))));
        check(Some(&a), Some(&a), false, Some(("a", None)));
        // A host process, on its way into the container or for a purpose of its own.
        check(None, Some(&b), false, Some(("b", None)));
        check(Some(&a), None, false, Some(("a", None)));
        check(None, None, false, None);
        // A runtime that runs in `a` enters one of its own containers.
        check(Some(&a), Some(&b), true, Some(("b", None)));
    }
}
