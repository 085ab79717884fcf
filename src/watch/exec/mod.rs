//! Executions: those that the gate is asked about, and those that only the kernel records.
//!
//! It uses every wing below: `core`, `process`, `files`, `mounts`, `sessions` and `code`. Only
//! `control` and `watch` itself use it.

pub(crate) mod again;
pub(crate) mod content;
pub(crate) mod described;
pub(crate) mod evidence;
pub(crate) mod examine;
pub(crate) mod execution;
pub(crate) mod gate;
pub(crate) mod known;
pub(crate) mod late;
pub(crate) mod observed;
pub(crate) mod processes;
pub(crate) mod questions;
pub(crate) mod recorder;
pub(crate) mod repeats;
pub(crate) mod running;
pub(crate) mod self_test;
pub(crate) mod shared;
pub(crate) mod take;
pub(crate) mod trace;
pub(crate) mod unproven;
pub(crate) mod unseen;
pub(crate) mod writable;
