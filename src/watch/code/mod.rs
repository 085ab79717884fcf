//! Code that is not executed as a file: libraries, scripts, and what shells are given.
//!
//! It knows `core`, `process` and `files`.

pub(in crate::watch) mod given;
pub(in crate::watch) mod inspect;
pub(in crate::watch) mod interpreters;
pub(in crate::watch) mod libraries;
pub(in crate::watch) mod scripts;
pub(in crate::watch) mod shells;
