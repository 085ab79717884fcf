//! Describes processes: their programs and arguments, their descent, and the session and the
//! container to which they belong.
//!
//! It uses only `core`. The wings above fill it from the kernel's records and the gate's
//! events, and ask it.

pub(crate) mod activity;
pub(crate) mod arguments;
pub(crate) mod attribution;
pub(crate) mod births;
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
