//! Code that is not executed as a file: libraries, scripts, and the input of shells.
//!
//! `libraries` takes the trace's records and passes interpreters on as `started`;
//! `interpreters` checks those. `scripts` and `shells` decide by value, `given` finds a
//! script as its interpreter does, and `inspect` reads files. `reads` says what a guarded file
//! is read for.
//!
//! It knows `core`, `process` and `files`.

pub(crate) mod given;
pub(crate) mod inspect;
pub(crate) mod interpreters;
pub(crate) mod libraries;
pub(crate) mod reads;
pub(crate) mod scripts;
pub(crate) mod shells;
pub(crate) mod started;
