//! Processes as the watchers know them: their descriptions, their descent, their
//! arguments, and to which session or container they belong.
//!
//! It knows `core` alone.

pub(crate) mod activity;
pub(crate) mod arguments;
pub(crate) mod births;
pub(crate) mod deeds;
pub(crate) mod describe;
pub(crate) mod membership;
pub(crate) mod named;
pub(crate) mod outside;
pub(crate) mod reach;
pub(crate) mod recorded;
pub(crate) mod records;
pub(crate) mod roots;
pub(crate) mod seen;
pub(crate) mod shared;
