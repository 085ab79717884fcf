//! The named threads of the daemon: one way to start each of them, to see whether it makes
//! progress, to replace it, and to stop it.
//!
//! A thread is *idle* while it waits for its next item, and *busy* from then on. While it
//! waits for another thread it is *blocked*, and only the other thread is checked. Each step
//! of its work is a beat: an item that is finished, or a part of a long item (a large file is
//! hashed, an upper layer is scanned). A thread without a beat for [`STUCK`] is stuck if it
//! is busy, or if it has items and does not take them:
//!
//! - If it only takes items from a queue, another thread takes over that queue. If the stuck
//!   thread ever comes back, it finishes its item and ends.
//! - If it owns state, no thread can replace it. After [`Role::patience`] the daemon ends in
//!   good order, with an error, and systemd starts it again.
//! - If it holds a lock that others need, those are stuck too, and so are their replacements.
//!   When no thread may be replaced any more, the daemon ends as well.
//!
//! A thread that is ready to run and gets no processor is not stuck: a container can use all
//! processors, and must not be able to end the daemon so.
//!
//! The supervisor counts its own turns and not seconds of a clock: the time in which the
//! machine was suspended, or the daemon stopped, makes no thread stuck.
//!
//! `supervisor` decides, `worker` is a thread's own view, `harness` starts and replaces, and
//! `stop` ends the daemon in stages.

mod harness;
pub mod stop;
mod supervisor;
mod worker;

pub use harness::{Event, Left, Threads};
pub use supervisor::{Found, MAX_REPLACED, Role, STUCK, Sample, State, Supervisor, TURN, View};
pub use worker::{
    Depth, about, beat, blocked, depth_of, idle, is_replaced, recv, recv_timeout, took, try_next,
};
