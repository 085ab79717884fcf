//! Processes as the watchers know them: their descriptions, their descent, their
//! arguments, and to which session or container they belong.
//!
//! It knows `core` alone.

pub(in crate::watch) mod arguments;
pub(in crate::watch) mod deeds;
pub(in crate::watch) mod describe;
pub(in crate::watch) mod roots;
