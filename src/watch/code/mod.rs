//! Code that is not executed as a file: libraries, scripts, and what shells are given.
//!
//! It knows `core`, `process` and `files`.

pub(crate) mod given;
pub(crate) mod inspect;
pub(crate) mod interpreters;
pub(crate) mod libraries;
pub(crate) mod scripts;
pub(crate) mod shells;
pub(crate) mod started;
