//! Processes and their ancestors.
//!
//! Arguments that are not known differ from no arguments: the message `Arguments` is absent.
//! Findings and sessions use these functions.

use crate::api::proto;
use crate::model::{Ancestor, Process, ProcessIdentity};

pub(super) fn process_to_proto(process: Process) -> proto::Process {
    proto::Process {
        pid: process.identity.pid,
        start_time: process.identity.start_time,
        exe: process.exe,
        argv: process.argv.map(|values| proto::Arguments { values }),
        uid: process.uid,
        tty: process.tty,
        root: process.root,
        ancestors: process.ancestors.into_iter().map(ancestor_to_proto).collect(),
    }
}

pub(super) fn process_from_proto(process: proto::Process) -> Process {
    Process {
        identity: ProcessIdentity { pid: process.pid, start_time: process.start_time },
        exe: process.exe,
        argv: process.argv.map(|argv| argv.values),
        uid: process.uid,
        tty: process.tty,
        root: process.root,
        ancestors: process.ancestors.into_iter().map(ancestor_from_proto).collect(),
    }
}

pub(super) fn identity_from_proto(identity: proto::ProcessIdentity) -> ProcessIdentity {
    ProcessIdentity { pid: identity.pid, start_time: identity.start_time }
}

pub(super) fn identity_to_proto(identity: ProcessIdentity) -> proto::ProcessIdentity {
    proto::ProcessIdentity { pid: identity.pid, start_time: identity.start_time }
}

pub(super) fn ancestor_to_proto(ancestor: Ancestor) -> proto::Ancestor {
    proto::Ancestor {
        pid: ancestor.identity.pid,
        start_time: ancestor.identity.start_time,
        exe: ancestor.exe,
        argv: ancestor.argv.map(|values| proto::Arguments { values }),
    }
}

pub(super) fn ancestor_from_proto(ancestor: proto::Ancestor) -> Ancestor {
    Ancestor {
        identity: ProcessIdentity { pid: ancestor.pid, start_time: ancestor.start_time },
        exe: ancestor.exe,
        argv: ancestor.argv.map(|argv| argv.values),
        is_proven_inside: false,
    }
}
