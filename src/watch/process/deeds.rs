//! Whose deed it is: an execution belongs to the container of its process, and a file
//! to the container in whose root it lies. Where these differ, it is a finding of the
//! container that acts.
//!
//! What decides, in this order: descent (the kernel's record of each birth), the control
//! group in the kernel's record, the process's namespaces. A process can join namespaces
//! and, with the rights, control groups; it cannot change who made it. What a process
//! calls itself decides nothing.

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

/// Which container an execution is reported for.
#[derive(Clone, Debug)]
pub(crate) struct Deed {
    pub(crate) watched: Arc<Watched>,
    /// The container in whose root the program lies, where that is another one.
    pub(crate) file_of: Option<Arc<Watched>>,
}

impl Deed {
    /// `actor` is the container of the process, `owner` that of the file.
    pub(crate) fn new(
        actor: Option<Arc<Watched>>,
        owner: Option<Arc<Watched>>,
        is_within: impl FnOnce(&Watched, &Arc<Watched>) -> bool,
    ) -> Option<Deed> {
        Some(match (actor, owner) {
            // A process of the host's that runs a container's file.
            (None, owner) => Deed { watched: owner?, file_of: None },
            (Some(actor), None) => Deed { watched: actor, file_of: None },
            (Some(actor), Some(owner)) if Arc::ptr_eq(&actor, &owner) => {
                Deed { watched: actor, file_of: None }
            }
            // A container manager in a container comes into one of its own.
            (Some(actor), Some(owner)) if is_within(&owner, &actor) => {
                Deed { watched: owner, file_of: None }
            }
            (Some(actor), owner) => Deed { watched: actor, file_of: owner },
        })
    }
}

/// Whether a container was made by a process of another one: for it, that one is what
/// the host is for others.
pub(crate) fn is_within(table: &Table, inner: &Watched, outer: &Arc<Watched>) -> bool {
    let Ok(init) = procfs::read_stat(inner.init.pid) else { return false };
    init.identity == inner.init
        && procfs::chain(init.parent)
            .iter()
            .any(|parent| table.of_process(parent).is_some_and(|it| Arc::ptr_eq(&it, outer)))
}

/// Whether a file in the root of `owner` is another container's for `actor`.
pub(crate) fn is_apart(shared: &Processes, actor: &Arc<Watched>, owner: &Arc<Watched>) -> bool {
    !Arc::ptr_eq(actor, owner)
        && actor.container != owner.container
        && !is_within(&shared.table, owner, actor)
}

/// Whether a process that the gate saw executing a file of `owner` is of another
/// container. Then the trace reports the execution, for that one.
pub(crate) fn is_of_another(shared: &Processes, owner: &Arc<Watched>, caller: &Caller) -> bool {
    caller.stat.as_ref().is_some_and(|stat| other_than(shared, owner, stat).is_some())
}

/// The container of a process that the gate saw, where that is another one than `owner`:
/// a process can enter another container's mount namespace.
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
        // By its number alone it could be a process of any container by now.
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

/// A program in another container's root, by the process that runs it or by its name
/// there: to ask what it is.
pub(crate) fn open_program(
    owner: &Watched,
    handle: Option<&Handle>,
    mapped: Option<&Mapped>,
) -> Option<Held> {
    let is_it = |stat: &Stat| match mapped {
        Some(mapped) => (mapped.device, mapped.inode) == (stat.device, stat.inode),
        None => stat.device == owner.device,
    };
    let looked_at = |fd: OwnedFd| {
        let stat = file::stat(&fd).ok()?;
        is_it(&stat).then_some(Held { fd, stat })
    };
    let by_process = || looked_at(handle?.open_exe().ok()?);
    let by_name = || {
        let name = &*mapped?.name;
        let init = Handle::open_exactly(owner.init).ok()?;
        looked_at(reach::open_in(owner, &init, name)?)
    };
    by_process().or_else(by_name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::core::table::tests::watched;

    #[test]
    fn x13_an_execution_is_its_processs_and_the_file_may_be_anothers() {
        let (a, b) = (Arc::new(watched("a", 1)), Arc::new(watched("b", 2)));
        let check =
            |actor: Option<&Arc<Watched>>, owner: Option<&Arc<Watched>>, within, expected| {
                let deed = Deed::new(actor.cloned(), owner.cloned(), |_, _| within);
                let id = |watched: &Arc<Watched>| watched.container.id.to_string();
                let found = deed.map(|deed| (id(&deed.watched), deed.file_of.as_ref().map(id)));
                let expected: Option<(&str, Option<&str>)> = expected;
                let expected = expected.map(|(it, of)| (it.to_owned(), of.map(ToOwned::to_owned)));
                assert_eq!(found, expected);
            };
        check(Some(&a), Some(&b), false, Some(("a", Some("b"))));
        check(Some(&a), Some(&a), false, Some(("a", None)));
        // The host's, on its way in or for its own ends.
        check(None, Some(&b), false, Some(("b", None)));
        check(Some(&a), None, false, Some(("a", None)));
        check(None, None, false, None);
        // A runtime that runs in `a` comes into a container of its own.
        check(Some(&a), Some(&b), true, Some(("b", None)));
    }
}
