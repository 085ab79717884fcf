//! Executions: those that the gate is asked about, and those that only the kernel records.
//!
//! It knows every wing below: `core`, `process`, `files`, `mounts`, `sessions` and `code`.

pub(in crate::watch) mod content;
pub(in crate::watch) mod crowd;
pub(in crate::watch) mod gate;
pub(in crate::watch) mod processes;
pub(in crate::watch) mod take;
pub(in crate::watch) mod trace;
pub(in crate::watch) mod trial;
pub(in crate::watch) mod unproven;
pub(in crate::watch) mod unseen;
pub(in crate::watch) mod writable;
