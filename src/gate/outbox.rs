//! What the gate hands to the daemon, as fast as the daemon takes it, and never waits for.
//!
//! Owns the channel of executions and the messages that it has no room for yet. `process` makes
//! the messages.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

use super::wire::{self, MAX_PACKET, Message};
use crate::pulse::Pulse;
use crate::sys::channel::Channel;

/// How long the hand-over of answered executions may take after the groups were closed.
const LAST_PACKETS: Duration = Duration::from_secs(2);

/// Messages that the daemon has not taken yet.
pub(super) struct Outbox {
    pub(super) channel: Channel,
    pending: VecDeque<Waiting>,
    max_pending: usize,
}

struct Waiting {
    bytes: Box<[u8]>,
    descriptors: Vec<OwnedFd>,
    is_counted: bool,
}

impl Outbox {
    pub(super) fn new(channel: Channel, max_pending: usize) -> Outbox {
        Outbox { channel, pending: VecDeque::new(), max_pending }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether another message can be handed on.
    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < self.max_pending
    }

    /// Hands a message on, and never waits. Returns false if there was no room for it.
    pub(super) fn hand_on(
        &mut self,
        message: &Message<'_>,
        file: Option<OwnedFd>,
        handle: Option<OwnedFd>,
        pulse: &Pulse,
    ) -> bool {
        let mut buffer = [0; MAX_PACKET];
        let bytes = wire::encode(message, &mut buffer);
        if self.pending.is_empty() {
            let mut both = [file.as_ref(), handle.as_ref()].into_iter().flatten();
            let sent = match (both.next(), both.next()) {
                (None, _) => self.channel.try_send(bytes, &[]),
                (Some(one), None) => self.channel.try_send(bytes, &[one.as_fd()]),
                (Some(one), Some(other)) => {
                    self.channel.try_send(bytes, &[one.as_fd(), other.as_fd()])
                }
            };
            if sent.is_ok() {
                return true;
            }
        }
        if self.pending.len() >= self.max_pending {
            pulse.dropped().fetch_add(u64::from(message.is_counted()), Ordering::Relaxed);
            return false;
        }
        let descriptors = [file, handle].into_iter().flatten().collect();
        let (bytes, is_counted) = (bytes.into(), message.is_counted());
        self.pending.push_back(Waiting { bytes, descriptors, is_counted });
        true
    }

    pub(super) fn flush(&mut self, pulse: &Pulse) {
        while let Some(waiting) = self.pending.front() {
            let descriptors: Vec<_> = waiting.descriptors.iter().map(OwnedFd::as_fd).collect();
            match self.channel.try_send(&waiting.bytes, &descriptors) {
                Ok(()) => drop(self.pending.pop_front()),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return,
                // The daemon has ended, which the other channel shows.
                Err(_) => self.drop_all(pulse),
            }
        }
    }

    /// Hands on the remaining messages, for at most two seconds.
    pub(super) fn drain(&mut self, pulse: &Pulse) {
        let deadline = Instant::now() + LAST_PACKETS;
        self.flush(pulse);
        while !self.pending.is_empty() && Instant::now() < deadline {
            let mut fds = [PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::OUT)];
            let turn = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let _ = rustix::event::poll(&mut fds, Some(&turn));
            self.flush(pulse);
        }
        self.drop_all(pulse);
    }

    fn drop_all(&mut self, pulse: &Pulse) {
        let dropped = self.pending.drain(..).filter(|waiting| waiting.is_counted).count();
        pulse.dropped().fetch_add(dropped as u64, Ordering::Relaxed);
    }
}
