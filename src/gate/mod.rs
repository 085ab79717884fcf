//! The gate, in a process of its own: `driftd gate`.
//!
//! The kernel asks it before a program runs, and the program waits for the answer. So
//! this process owns every group of permission events, and does nothing that could
//! wait: it opens no file by path but `/proc/PID/stat`, reads no file of a container,
//! takes no lock, is locked in memory, and answers first. What it has answered it hands
//! to the daemon with the open file, and the daemon does everything else.
//!
//! ```text
//!            marks, from descriptors that the daemon has opened
//!  daemon ────────────────── requests ──────────────────> gate <──── kernel: may it run?
//!         <── answered executions, with their files ─────      ────> kernel: yes
//! ```
//!
//! The groups live as long as this process, and no other process has a descriptor of
//! them. When it ends, for whatever reason, the kernel lets everything run that waits.
//! The guardian ends it when it or the daemon makes no progress, the daemon ends it when
//! the guardian does not, and it ends itself when the daemon is gone.

mod client;
mod process;
mod shards;
mod wire;

pub use self::client::{Error, Event, Events, Gate, Marks, Stopper, THIS_PROGRAM};
pub use self::process::run;
pub use self::wire::{Asked, Calm, Place};
