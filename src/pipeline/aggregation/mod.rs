//! Which findings are aggregated, so that twenty thousand files are not twenty thousand
//! lines, and none of them is lost.
//!
//! ```text
//! written by a package manager ──────────────> its package.transaction
//! file.relocated ────────────────────────────> one for each content ─ many ─> one
//! file.added, .modified, .removed ─ many ────> one for each directory ─ many ─> one
//! file.privileged, exec.interpreted ─ many ──> one for each directory
//! executed in a root directory of its own ─ many ─> one for each such root
//! exec.relocated, medium ─ many ─────────────> one
//! obeyed or privileged, by a package manager ─> one for each transaction and kind
//! used, as a package manager has brought it ──> one for each transaction and kind
//! run, as the image's linkers have made it ────> one
//! scripts that one archiver has unpacked, and what these write and run ─> one
//! libraries of one directory, by one process ─> one
//! run under a generated name ─────────────────> one for each pattern and program that runs
//!                        it; executed, and high or worse: one for each content
//! anything else, and anything worse than usual ─> a finding of its own
//! ```
//!
//! Files that are only present are aggregated as soon as they are many. An executed file has
//! a finding of its own, unless it has something in common with others that does not depend
//! on a name, or a generated name that means nothing. The severity belongs to what files have
//! in common: nothing is aggregated with something less severe.
//!
//! Each file is counted when it is observed. The first file of an aggregated finding is
//! published at once, the others in batches.

mod code;
mod emit;
mod files;
mod group;
mod packages;
mod put;
mod unpublished;

pub(super) use self::code::is_reported_as_executed;
pub(super) use self::group::Group;
pub(super) use self::packages::{is_untouched, transaction_id};
pub(super) use self::unpublished::Unpublished;
