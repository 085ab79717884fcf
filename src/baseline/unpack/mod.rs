//! The tree that containerd makes of a layer's archive, made in memory: names, owners
//! and hashes, no content.
//!
//! Each rule here is one of containerd's (`pkg/archive` and continuity's `fs.RootPath`), or
//! of the kernel's below it, odd ones included. The root's own entry counts for nothing.
//! A name's `..` ends at the root. A directory over a directory keeps what is in it;
//! anything else over anything replaces it. A parent that is a symlink of the same layer is
//! followed; one of a layer below is not seen. A hard link gives its owner and mode to the
//! file that it names, and removes the file's capabilities if it brings none. Where
//! containerd refuses to unpack, driftd refuses too, and names the path. So it does where
//! containerd's versions differ from each other, or where the result depends on files of
//! the host.
//!
//! In three places more is accepted than containerd unpacks, because other unpackers accept
//! it: hard links to files that come later or that a layer below has, old GNU sparse files,
//! and an entry that comes before its own whiteout, which then removes it.

mod apply;
mod follow;
mod path;
mod refusal;
mod settle;
mod tree;

pub(super) use path::{clean, split};
pub use refusal::MAX_NAMES;
pub(super) use refusal::Refusal;
pub(super) use tree::{Content, Tree};
