//! The gate, in a process of its own: `driftd gate`.
//!
//! The kernel asks it before a program runs, and the program waits for the answer. So this
//! process owns every group of permission events, and does nothing that could wait: the only
//! files that it opens by path are in `/proc/PID`, it reads no file of a container, takes no
//! lock, is locked in memory, and answers first. After the answer it hands the execution
//! with the open file to the daemon, and the daemon does everything else.
//!
//! ```text
//!            marks, from descriptors that the daemon has opened
//!  daemon ────────────────── requests ──────────────────> gate <──── kernel: may it run?
//!         <── answered executions, with their files ─────      ────> kernel: yes
//! ```
//!
//! The groups exist as long as this process, and no other process has a descriptor of them.
//! When this process ends, for any reason, the kernel lets all waiting programs run. The
//! guardian ends it when it or the daemon makes no progress, the daemon ends it when the
//! guardian does not act, and it ends itself when the daemon has ended.
//!
//! Where rules may deny, the program waits until the daemon has decided, but never longer than a
//! fixed time: the gate keeps the kernel's question (`questions`) and goes on.
//!
//! The same happens before a file is read that rules may deny as code: a script, or a library
//! (`reads`). The kernel asks only about the files that the daemon has guarded.
//!
//! An unchanged file of an image is answered and not handed on, once the daemon has named it
//! (`unchanged`): the daemon would learn nothing that the kernel's records do not show.
//!
//! `client` is the daemon's side, `process` the gate itself, `wire` the packets between them,
//! and `shards` the free gate.

mod client;
mod outbox;
mod process;
mod questions;
mod reads;
mod roots;
mod runtimes;
mod shards;
mod unchanged;
mod wire;

pub use self::client::{Decisions, Error, Event, Events, Gate, Marks, Stopper, THIS_PROGRAM};
pub use self::process::run;
pub use self::unchanged::{File, Unchanged};
pub use self::wire::{Asked, Calm, Decision, Enforced, Place, Undecided};
