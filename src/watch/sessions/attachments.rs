//! Attach sessions: a client attaches to the terminal of a container's init by opening the
//! FIFO that leads to it, after the runtime has opened it.
//!
//! The FIFO and its directory are on the host. driftd has a mark on the directory. A client
//! that attaches through a process which has the FIFO open already is found by `terminals`.
//!
//! The marks are in the fanotify group of `names`. The thread `names` reads that group and
//! passes the events of FIFOs on to this one. A directory that both use has one mark, with
//! the events of both.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::model::{
    Ancestor, Entry, Fact, Interactive, Login, Opening, Process, ProcessIdentity, SessionFact,
    Source,
};
use crate::sys::fanotify::Named;
use crate::sys::procfs::{self, Handle};
use crate::watch::files::shared::Files;
use crate::watch::process::activity::{Activity, Event};
use crate::watch::process::describe;
use crate::watch::process::roots::Arrival;

/// An idle thread checks this often whether it is to end.
const TURN: Duration = Duration::from_millis(500);

/// The process that starts a container opens its input within this time.
const START: Duration = Duration::from_secs(10);

/// Reports attach sessions until the watchers stop.
pub(crate) fn run(shared: &Files) {
    while !shared.is_stopping() {
        if let Some(named) = shared.inputs.next(TURN) {
            client_opened_input(shared, &named);
        }
    }
}

fn client_opened_input(shared: &Files, named: &Named) {
    let Some((watched, is_handed_on)) = shared.inputs.of(named) else { return };
    let shim = procfs::read_stat(watched.init.pid).ok().map(|init| init.parent);
    if Some(named.pid) == shim {
        return;
    }
    let Ok(client) = Handle::open(named.pid) else { return };
    let root = client.identity();
    if has_started(root, watched.init, procfs::age(watched.init)) {
        return;
    }
    // A person has a terminal. A manager that has restarted and opens the FIFO again has
    // none.
    if is_handed_on && client.first_stat().tty().is_none() {
        return;
    }
    if shared.roots().is_open(root) {
        return;
    }
    let process = describe::as_it_is(&client, &watched);
    let chain = procfs::chain(client.first_stat().parent);
    let known = process.ancestors.len();
    let host = chain.iter().skip(known).map(describe::ancestor).collect();
    let fact = opened(root, process, host, client.login());
    shared.note_session(&watched);
    let at = Timestamp::now();
    if shared.observe(&watched, at, Source::Change, fact) && shared.open_root(&watched, root) {
        let arrival = Arrival { session: root, at, ticks: procfs::ticks_since_boot() };
        shared.came_to_terminal(&watched, arrival);
        let owned = watched.clone();
        let event = Event::Opened { watched: owned, root, is_interactive: true, process: None };
        shared.note_activity(&watched, Activity::Event(event));
    }
}

/// Whether a process may have started the container: it is older than the container's init,
/// and that has just begun. On a busy node such a process opens the input after the mark
/// was placed.
fn has_started(client: ProcessIdentity, init: ProcessIdentity, age: Duration) -> bool {
    client.start_time <= init.start_time && age < START
}

/// The fact that a client has attached to the terminal of a container's init.
pub(crate) fn opened(
    root: ProcessIdentity,
    process: Process,
    host: Vec<Ancestor>,
    login: Option<Login>,
) -> Fact {
    let opening = Opening {
        root,
        entry: Entry::Attach,
        interactive: Some(Interactive::Terminal),
        process,
        host,
        login,
        requested_by: None,
        beside: None,
    };
    Fact::Session(SessionFact::Opened { opening: Arc::new(opening) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_that_starts_a_container_does_not_attach_to_it() {
        let process = |start_time| ProcessIdentity { pid: 1, start_time };
        let (before, init, after) = (process(999_990), process(1_000_000), process(1_000_010));
        let seconds = Duration::from_secs;
        assert!(has_started(before, init, seconds(0)));
        assert!(has_started(before, init, seconds(9)));
        // A client that was started long before the container can attach as well.
        assert!(!has_started(before, init, seconds(11)));
        assert!(!has_started(after, init, seconds(1)));
    }
}
