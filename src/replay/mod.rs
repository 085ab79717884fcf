//! A text file that is played as if it were a node: containers, files, processes and
//! losses go in, findings and responses come out.
//!
//! It owns the file's language ([`script`]) and the node that it describes ([`play`]). It
//! has a clock of its own, needs no root, starts no thread and touches neither containerd
//! nor a disk. It drives the pipeline's [`State`](crate::pipeline::State) and sends
//! responses through the same code as the daemon, to a runtime of its own. docs/replay.md
//! describes the language.

mod play;
mod script;

pub use play::{Happened, Unmet, play};
pub use script::{Script, WrongLine};
