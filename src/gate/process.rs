//! The gate's process: one thread that reads permission events, answers them, and hands the
//! executions to the daemon. It must never wait for a container, a disk or the daemon.

use std::cell::OnceCell;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::outbox::Outbox;
use super::questions::{Question, Questions, Waits};
use super::reads::{Part, Read, Reads};
use super::roots::Roots;
use super::runtimes::{Held, Runtimes};
use super::shards::{CopyUps, Shards};
use super::unchanged::Unchanged;
use super::wire::{
    self, Asked, Calm, Decided, Decision, Hello, MAX_CGROUP, MAX_PACKET, Message, Place, Reply,
    Request,
};
use crate::model::programs::{comes_in, may_be_shim};
use crate::pulse::{self, PATIENCE, Pulse, Silence, TURN};
use crate::sys::channel::{Channel, Packet, close_inherited};
use crate::sys::fanotify::{Answer, Buffer, Event, Group, Incoming, Permission, ReadError};
use crate::sys::procfs::{Handle, Stat, Whereabouts};
use crate::sys::{file, perf, pidfd, process};

/// `/proc/PID/stat`: 52 numbers of at most 20 digits and a name of at most 64 bytes.
pub(super) const MAX_STAT: usize = 1200;

/// The bytes of one read: about a hundred events, each with a descriptor. When the process
/// may open no more descriptors, the kernel denies the execution.
const READ_BYTES: usize = 4 * 1024;

/// How many answered executions wait here when the daemon is slower than the containers.
/// Each has one or two descriptors.
const MAX_PENDING: usize = 4 * 1024;

/// Descriptors for everything else.
const OTHER_DESCRIPTORS: u64 = 512;

/// How many requests are carried out before the groups are read again.
const REQUESTS_IN_A_ROW: usize = 64;

/// Runs until the daemon requests the end, or has ended. Standard input is the channel of
/// requests.
pub fn run() -> anyhow::Result<()> {
    process::leave_stopping_to_the_daemon().context("cannot block signals")?;
    close_inherited();
    let requests = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map(Channel::from)
        .context("cannot keep the channel of requests")?;
    let mut buffer = [0; MAX_PACKET];
    let Packet { bytes, descriptors } = requests
        .receive(&mut buffer, Duration::from_secs(10))
        .context("`driftd gate` is started by driftd itself (see: driftd run)")?;
    let Hello { shards } = wire::decode(bytes).context("the daemon's first packet")?;
    let [memory, executions] = <[OwnedFd; 2]>::try_from(descriptors)
        .ok()
        .context("the daemon's first packet lacks a descriptor")?;
    let executions = Channel::from(executions);
    let pulse = Pulse::share(memory).context("the daemon's memory")?;
    let max_pending = max_pending();
    // Without the privileges for these two, the gate is slower under load, and when memory is
    // short.
    let _ = rustix::process::setpriority_process(None, -10);
    lock_memory();
    let outcome = Group::exec_gate().and_then(|plain| Ok((plain, Shards::new(shards)?)));
    let (plain, groups) = match outcome {
        Ok(groups) => {
            reply(&requests, None)?;
            groups
        }
        Err(err) => {
            reply(&requests, Some(err.errno()))?;
            return Ok(());
        }
    };
    // Made for the first file that is guarded: on most nodes there is none.
    let read_gate = OnceCell::new();
    let process = Process {
        plain: &plain,
        groups: &groups,
        read_gate: &read_gate,
        requests: &requests,
        pulse: &pulse,
        copy_ups: CopyUps::new(groups.groups.len()),
        roots: Roots::default(),
        runtimes: Runtimes::default(),
        unchanged: Unchanged::default(),
        questions: Questions::default(),
        reads: Reads::default(),
        outbox: Outbox::new(executions, max_pending),
        daemon: Silence::default(),
        judged: Instant::now(),
    };
    // Held runtimes are allowed when they are dropped, queued events when the groups close.
    let (ended, mut outbox) = process.serve()?;
    close_at_once(groups.into_groups().chain([plain]).chain(read_gate.into_inner()));
    if ended == Ended::Closed {
        reply(&requests, None)?;
        outbox.drain(&pulse);
    }
    Ok(())
}

/// Closes groups, each in a thread of its own. When the closing of a group begins, the kernel
/// lets all its waiting programs run. Then it removes the group's marks, for tens of
/// milliseconds on a busy machine, and the programs of the next group would wait as long.
fn close_at_once(groups: impl Iterator<Item = Group>) {
    let close = |group| thread::Builder::new().spawn(move || drop(group)).ok();
    let closing: Vec<_> = groups.filter_map(close).collect();
    for thread in closing {
        let _ = thread.join();
    }
}

/// How many executions may wait, by the limit of open descriptors.
fn max_pending() -> usize {
    let allowed = process::raise_descriptors();
    // Descriptors in packets that the daemon has not taken count too.
    let affordable = allowed.saturating_sub(OTHER_DESCRIPTORS) / 4;
    usize::try_from(affordable).unwrap_or(usize::MAX).clamp(16, MAX_PENDING)
}

/// Keeps used pages in memory, so that an answer never waits for a disk.
fn lock_memory() {
    use rustix::mm::{MlockAllFlags, mlockall};
    // With ONFAULT only used pages count, not the whole program.
    let flags = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    if let Err(err) = mlockall(flags) {
        let prefix = process::priority_prefix(4);
        eprintln!("{prefix}driftd gate: its memory cannot be locked ({err}); see: LimitMEMLOCK=");
    }
}

fn reply(requests: &Channel, errno: Option<i32>) -> io::Result<()> {
    let mut buffer = [0; 16];
    requests.try_send(wire::encode(&Reply { errno }, &mut buffer), &[])
}

/// Why the gate ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Closed,
    DaemonGone,
}

/// What can be read: each group is read only then, so that an answer costs few system calls.
struct Ready(Vec<RawFd>);

impl Ready {
    fn has(&self, one: &impl AsFd) -> bool {
        self.0.contains(&one.as_fd().as_raw_fd())
    }
}

struct Process<'groups> {
    /// The group for every execution, for runtimes, and for the first shard's copy-ups. Its
    /// marks are never flushed.
    plain: &'groups Group,
    groups: &'groups Shards,
    /// The group for reads of guarded files.
    read_gate: &'groups OnceCell<Group>,
    requests: &'groups Channel,
    pulse: &'groups Pulse,
    copy_ups: CopyUps,
    roots: Roots,
    runtimes: Runtimes<'groups>,
    unchanged: Unchanged,
    questions: Questions<'groups>,
    reads: Reads,
    outbox: Outbox,
    daemon: Silence,
    judged: Instant,
}

impl<'groups> Process<'groups> {
    fn serve(mut self) -> anyhow::Result<(Ended, Outbox)> {
        let ended = self.answer_until_the_end()?;
        Ok((ended, self.outbox))
    }

    fn answer_until_the_end(&mut self) -> anyhow::Result<Ended> {
        let mut buffer = Buffer::new();
        let groups = self.groups;
        loop {
            let ready = self.wait();
            self.pulse.beat(pulse::Part::Gate);
            // What waits was asked first.
            if ready.has(&self.outbox.channel) {
                self.take_decisions()?;
            }
            self.answer_late()?;
            // Ends of copy-ups before executions: they only allow ignore marks again.
            if let Some(closes) = groups.closes.as_ref().filter(|group| ready.has(*group)) {
                self.read(closes, &mut buffer, Process::closed)?;
            }
            if ready.has(self.plain) {
                self.read(self.plain, &mut buffer, Process::asked_plainly)?;
            }
            if let Some(read_gate) = self.read_gate.get().filter(|group| ready.has(*group)) {
                self.read(read_gate, &mut buffer, Process::reads)?;
            }
            for (shard, group) in (1..).zip(&groups.copy_ups).filter(|(_, group)| ready.has(*group))
            {
                self.read(group, &mut buffer, |this, incoming| this.copies_up(incoming, shard))?;
            }
            for (shard, group) in (0..).zip(&groups.groups).filter(|(_, group)| ready.has(*group)) {
                self.read(group, &mut buffer, |this, incoming| this.asked(incoming, Some(shard)))?;
            }
            let requests = if ready.has(self.requests) { REQUESTS_IN_A_ROW } else { 0 };
            for _ in 0..requests {
                match self.take_request()? {
                    Some(Taken::Done) => (),
                    Some(Taken::Close) => return self.close(&mut buffer),
                    Some(Taken::DaemonGone) => return Ok(Ended::DaemonGone),
                    None => break,
                }
            }
            self.release_late();
            self.outbox.flush(self.pulse);
            self.copy_ups.refresh(self.groups)?;
            if self.judged.elapsed() >= TURN {
                self.judged = Instant::now();
                let turns = self.pulse.turns_of(pulse::Part::Daemon).load(Ordering::Relaxed);
                if self.daemon.turn(turns) >= PATIENCE {
                    let prefix = process::priority_prefix(3);
                    eprintln!("{prefix}driftd gate: the daemon makes no progress; the gate ends");
                    return Ok(Ended::DaemonGone);
                }
            }
        }
    }

    /// Waits until there is something to read, and returns what.
    fn wait(&self) -> Ready {
        let Shards { groups, copy_ups, closes } = self.groups;
        let groups = [self.plain].into_iter().chain(groups).chain(copy_ups).chain(closes);
        let groups = groups.chain(self.read_gate.get());
        let mut fds: Vec<PollFd<'_>> =
            groups.map(|group| PollFd::from_borrowed_fd(group.as_fd(), PollFlags::IN)).collect();
        fds.push(PollFd::from_borrowed_fd(self.requests.as_fd(), PollFlags::IN));
        let is_full = !self.outbox.is_empty();
        let wanted = if is_full { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        fds.push(PollFd::from_borrowed_fd(self.outbox.channel.as_fd(), wanted));
        let late = self.runtimes.due_in().into_iter().chain(self.questions.due_in());
        let timeout = late.min().unwrap_or(TURN).min(TURN);
        let timeout = Timespec::try_from(timeout).expect("a quarter of a second fits");
        // An error here (a signal) only ends the wait early.
        let _ = rustix::event::poll(&mut fds, Some(&timeout));
        let ready = fds.iter().filter(|fd| !(fd.revents() - PollFlags::OUT).is_empty());
        Ready(ready.map(|fd| fd.as_fd().as_raw_fd()).collect())
    }

    /// Reads a group and handles each event. An error ends the process, and then the kernel
    /// lets every program run.
    fn read(
        &mut self,
        group: &'groups Group,
        buffer: &mut Buffer,
        mut take: impl FnMut(&mut Self, Incoming<'groups>) -> io::Result<()>,
    ) -> anyhow::Result<()> {
        match group.read(buffer, READ_BYTES) {
            Ok(incoming) => incoming
                .into_iter()
                .try_for_each(|incoming| take(self, incoming))
                .context("the kernel does not accept an answer"),
            Err(ReadError::Os(err)) => match Errno::from_io_error(&err) {
                Some(Errno::AGAIN | Errno::INTR) => Ok(()),
                Some(Errno::BADF | Errno::INVAL | Errno::FAULT) | None => {
                    Err(err).context("cannot read the kernel's permission events")
                }
                // The event is lost, and so is the container that it belongs to.
                Some(_) => {
                    self.pulse.unreadable().fetch_add(1, Ordering::Relaxed);
                    Ok(())
                }
            },
            Err(ReadError::Malformed(err)) => {
                Err(err).context("cannot decode the kernel's permission events")
            }
        }
    }

    fn closed(&mut self, incoming: Incoming<'groups>) -> io::Result<()> {
        if let Incoming::Notification(event) = incoming {
            self.copy_ups.ended(&event);
        }
        Ok(())
    }

    fn asked_plainly(&mut self, incoming: Incoming<'groups>) -> io::Result<()> {
        let Incoming::Permission(permission) = incoming else {
            return self.asked(incoming, None);
        };
        if permission.event().mask & libc::FAN_OPEN_EXEC_PERM == 0 {
            return self.copies_up(Incoming::Permission(permission), 0);
        }
        if self.runtimes.are_of(permission.event()) {
            return self.hold(permission);
        }
        self.asked(Incoming::Permission(permission), None)
    }

    fn copies_up(&mut self, incoming: Incoming<'groups>, shard: u8) -> io::Result<()> {
        let Incoming::Permission(permission) = incoming else { return Ok(()) };
        let (plain, groups, event) = (self.plain, self.groups, permission.event());
        self.copy_ups.met(plain, groups, self.pulse, shard, event)?;
        allow(permission).map(drop)
    }

    fn asked(&mut self, incoming: Incoming<'groups>, shard: Option<u8>) -> io::Result<()> {
        let permission = match incoming {
            Incoming::Permission(permission) => permission,
            Incoming::Overflow => {
                self.pulse.unreadable().fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            // These groups have no notifications.
            Incoming::Notification(_) => return Ok(()),
        };
        let event = permission.event();
        // Taken before the file is examined: see `shards`.
        let calm = shard.and_then(|shard| self.copy_ups.calm(shard));
        // Only what the kernel has already: no server of a filesystem is asked.
        let stat = file::stat(&event.file).map_err(|err| err.raw_os_error().unwrap_or(libc::EIO));
        // The daemon learns of it by the kernel's records, at once or a moment later.
        let unchanged = stat.as_ref().ok().filter(|stat| self.unchanged.holds(stat));
        if let Some(stat) = unchanged
            && !self.may_come_in()
        {
            return self.allow_unchanged(permission, stat, calm);
        }
        // Reads `/proc` before the answer, because only now the process certainly exists.
        // This file takes no lock that the container could hold (no cred_guard_mutex, no
        // mmap_lock, unlike most files next to it).
        let mut process = [0; MAX_STAT];
        let process = read_stat(event.pid, &mut process);
        // A process can end before the daemon reads it, and only a handle shows how it ended:
        // kept for a runtime on its way in, and for all processes once a session was opened.
        let is_coming_in = comm(process).is_some_and(comes_in);
        if let Some(stat) = unchanged
            && !is_coming_in
        {
            return self.allow_unchanged(permission, stat, calm);
        }
        let is_unchanged = unchanged.is_some();
        let is_wanted = is_coming_in || self.pulse.handles().load(Ordering::Relaxed) != 0;
        let mut handle = if is_wanted { pidfd::open(event.pid).ok() } else { None };
        let whereabouts = match &stat {
            Ok(stat) if !self.roots.hold(stat) => whereabouts(event.pid),
            Ok(_) | Err(_) => None,
        };
        let asked = Asked {
            pid: event.pid,
            at: perf::now(),
            time: wall_clock(),
            stat,
            whereabouts,
            calm,
            waits: None,
        };
        let file = asked.stat.as_ref().ok();
        let waits = match is_unchanged {
            false => self.questions.of(file, asked.whereabouts.as_ref()),
            true => Waits::No,
        };
        let (permission, asked, is_undecided) = match waits {
            Waits::No => (permission, asked, false),
            Waits::NoRoom => (permission, asked, true),
            Waits::Under(container, number) => {
                let turn = (container, number);
                match self.keep(permission, asked, process, &mut handle, turn) {
                    Some((permission, asked)) => (permission, asked, true),
                    None => return Ok(()),
                }
            }
        };
        // Counted first, so that no program runs before it is counted.
        self.pulse.answers().fetch_add(1, Ordering::SeqCst);
        let event = match is_undecided {
            false => allow(permission)?,
            true => self.answer_undecided(permission)?.0,
        };
        let message = Message::Executed { asked, process };
        self.outbox.hand_on(&message, Some(event.file), handle, self.pulse);
        Ok(())
    }

    /// Whether a process may come into a container now. The daemon should see such a process
    /// while it lives.
    fn may_come_in(&self) -> bool {
        let until = self.pulse.runtimes_until().load(Ordering::Relaxed);
        until != 0 && perf::now() < until
    }

    fn allow_unchanged(
        &self,
        permission: Permission<'groups>,
        stat: &file::Stat,
        calm: Option<Calm>,
    ) -> io::Result<()> {
        // Counted first, so that no program runs before it is counted.
        self.pulse.unchanged().fetch_add(1, Ordering::SeqCst);
        let event = allow(permission)?;
        if let Some(calm) = calm
            && self.unchanged.are_ignorable(stat.device, perf::now)
        {
            self.copy_ups.ignore(self.groups, self.pulse, calm, event.file.as_fd());
        }
        Ok(())
    }

    // ---- executions and reads that wait for a decision

    /// Keeps the kernel's question about an execution until it is decided. Returns it if there
    /// is no room.
    fn keep(
        &mut self,
        permission: Permission<'groups>,
        asked: Asked,
        process: &[u8],
        handle: &mut Option<OwnedFd>,
        (container, number): (u64, u64),
    ) -> Option<(Permission<'groups>, Asked)> {
        // The kernel needs the event's own descriptor for the answer.
        let file = permission.event().file.try_clone();
        let (Ok(file), true) = (file, self.outbox.has_room()) else {
            return Some((permission, asked));
        };
        let asked = Asked { waits: Some(number), ..asked };
        let message = Message::Executed { asked, process };
        self.outbox.hand_on(&message, Some(file), handle.take(), self.pulse);
        let question = Question { permission, is_read: false };
        self.questions.wait((container, number), question);
        None
    }

    /// A thread is about to read a guarded file.
    fn reads(&mut self, incoming: Incoming<'groups>) -> io::Result<()> {
        let Incoming::Permission(permission) = incoming else { return Ok(()) };
        let event = permission.event();
        let Event { pid: thread, range, .. } = *event;
        let Ok(stat) = file::stat(&event.file) else { return allow(permission).map(drop) };
        // Some programs read a byte at a time.
        let part = Part::of(thread, &stat, range);
        if self.reads.is_let_through(&part) {
            return allow(permission).map(drop);
        }
        // driftd itself, the host's own processes, and containers in which nothing is denied.
        let whereabouts = whereabouts(thread);
        let container = whereabouts.as_ref().and_then(|it| self.questions.reader(it));
        let Some(container) = container else {
            self.reads.let_through(part);
            return allow(permission).map(drop);
        };
        let mut process = [0; MAX_STAT];
        let Some(process) = Stat::parse(read_stat(thread, &mut process)) else {
            return allow(permission).map(drop);
        };
        let read = Read::of(&process, part);
        match self.reads.decision(&read) {
            Some(Answer::Allow) => {
                self.reads.let_through(part);
                return allow(permission).map(drop);
            }
            Some(Answer::Deny) => return self.deny(permission).map(drop),
            None => (),
        }
        let Waits::Under(container, number) = self.questions.turn_of(container, true) else {
            return self.read_undecided(permission).map(drop);
        };
        let asked = Asked {
            pid: thread,
            at: perf::now(),
            time: wall_clock(),
            stat: Ok(stat),
            whereabouts,
            calm: None,
            waits: Some(number),
        };
        let file = permission.event().file.try_clone();
        let (true, Ok(file)) = (self.outbox.has_room(), file) else {
            return self.read_undecided(permission).map(drop);
        };
        self.outbox.hand_on(&Message::Reads { asked, range }, Some(file), None, self.pulse);
        self.reads.asked(number, read);
        self.questions.wait((container, number), Question { permission, is_read: true });
        Ok(())
    }

    /// A read about which nothing was decided is allowed, whatever the settings say of
    /// executions: most reads are of data. Code is killed when it runs.
    fn read_undecided(&self, permission: Permission<'groups>) -> io::Result<Event> {
        self.pulse.unread().fetch_add(1, Ordering::Relaxed);
        allow(permission)
    }

    /// The kernel asks before this file is read, from now on. If it cannot, the daemon kills
    /// what should have been denied.
    fn guard(&self, file: &OwnedFd) {
        if self.read_gate.get().is_none()
            && let Ok(group) = Group::read_gate()
        {
            let _ = self.read_gate.set(group);
        }
        let outcome = self.read_gate.get().map(|group| group.guard(file.as_fd()));
        let counter = match outcome {
            Some(Ok(())) => self.pulse.guarded(),
            Some(Err(_)) | None => self.pulse.unguarded(),
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn take_decisions(&mut self) -> io::Result<()> {
        let mut buffer = [0; MAX_PACKET];
        for _ in 0..REQUESTS_IN_A_ROW {
            // An end of this channel shows in the other one, too.
            let Ok(packet) = self.outbox.channel.try_receive(&mut buffer) else { break };
            let Decided { number, decision } = wire::decode(packet.bytes)?;
            // It may have been answered because it waited too long.
            let Some(question) = self.questions.take(number) else { continue };
            let answer = match decision {
                Decision::Allow => Some(Answer::Allow),
                Decision::Deny => Some(Answer::Deny),
                Decision::None => None,
            };
            self.answered(number, question, answer)?;
        }
        Ok(())
    }

    fn answer_late(&mut self) -> io::Result<()> {
        while let Some((number, question)) = self.questions.take_late() {
            self.answered(number, question, None)?;
        }
        Ok(())
    }

    /// Answers what has waited, and reports that to the daemon.
    fn answered(
        &mut self,
        number: u64,
        question: Question<'groups>,
        with: Option<Answer>,
    ) -> io::Result<()> {
        let Question { permission, is_read } = question;
        let at = perf::now();
        match is_read {
            true => self.reads.answered(number, with),
            false => _ = self.pulse.answers().fetch_add(1, Ordering::SeqCst),
        }
        let (_, denied) = match with {
            Some(Answer::Allow) => (allow(permission)?, false),
            Some(Answer::Deny) => (self.deny(permission)?, true),
            None if is_read => (self.read_undecided(permission)?, false),
            None => self.answer_undecided(permission)?,
        };
        let message = Message::Answered { number, denied, at, is_read };
        self.outbox.hand_on(&message, None, None, self.pulse);
        Ok(())
    }

    /// The answer to an execution about which nothing was decided, and whether it was denied.
    fn answer_undecided(&self, permission: Permission<'groups>) -> io::Result<(Event, bool)> {
        self.pulse.undecided().fetch_add(1, Ordering::Relaxed);
        match self.questions.denies_undecided() {
            true => Ok((self.deny(permission)?, true)),
            false => Ok((allow(permission)?, false)),
        }
    }

    fn deny(&self, permission: Permission<'groups>) -> io::Result<Event> {
        self.pulse.denied().fetch_add(1, Ordering::Relaxed);
        answer(permission, Answer::Deny)
    }

    /// Holds a runtime if a shim executes it, by the shim's name. The daemon checks more.
    fn hold(&mut self, permission: Permission<'groups>) -> io::Result<()> {
        let mut process = [0; MAX_STAT];
        let process = read_stat(permission.event().pid, &mut process);
        if !comm(process).is_some_and(may_be_shim) {
            return allow(permission).map(drop);
        }
        let number = self.runtimes.next_number();
        let message = Message::Runtime { number, process };
        let has_room = self.runtimes.has_room();
        if !has_room || !self.outbox.hand_on(&message, None, None, self.pulse) {
            self.pulse.late().fetch_add(1, Ordering::Relaxed);
            return allow(permission).map(drop);
        }
        self.runtimes.hold(Held { number, permission, since: Instant::now() });
        Ok(())
    }

    fn release_late(&mut self) {
        // They are allowed when they are dropped.
        let late = self.runtimes.take_late().count();
        self.pulse.late().fetch_add(late as u64, Ordering::Relaxed);
    }

    // ---- requests

    fn take_request(&mut self) -> io::Result<Option<Taken>> {
        let mut buffer = [0; MAX_PACKET];
        let Packet { bytes, descriptors } = match self.requests.try_receive(&mut buffer) {
            Ok(packet) => packet,
            Err(err) => match err.kind() {
                io::ErrorKind::WouldBlock => return Ok(None),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                    return Ok(Some(Taken::DaemonGone));
                }
                _ => return Err(err),
            },
        };
        let request: Request = wire::decode(bytes)?;
        if request == Request::Close {
            return Ok(Some(Taken::Close));
        }
        let is_replied_to = request.is_replied_to();
        let done = self.carry_out(request, &descriptors);
        // Closed before the reply: they keep mounts busy, and after the reply the daemon takes
        // them for closed.
        drop(descriptors);
        if is_replied_to {
            let errno = done.err().map(|err| err.raw_os_error().unwrap_or(libc::EINVAL));
            reply(self.requests, errno)?;
        }
        Ok(Some(Taken::Done))
    }

    fn carry_out(&mut self, request: Request, descriptors: &[OwnedFd]) -> io::Result<()> {
        const MASK: u64 = libc::FAN_OPEN_EXEC_PERM;
        let first = || descriptors.first().ok_or(io::Error::from(io::ErrorKind::InvalidInput));
        let (plain, groups) = (self.plain, self.groups);
        match request {
            Request::MarkRoot(place) => {
                let group = match place {
                    Place::Plain => Some(plain),
                    Place::Shard(shard) => groups.groups.get(usize::from(shard)),
                };
                let group = group.ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
                let root = file::stat(first()?)?;
                // The number may have been another container's.
                self.unchanged.forget(root.device);
                self.roots.insert(&root);
                group.mark_filesystem_of(first()?.as_fd(), MASK)
            }
            Request::MarkFilesystem => {
                self.roots.remove(&file::stat(first()?)?);
                plain.mark_filesystem_of(first()?.as_fd(), MASK)
            }
            Request::MarkMount => {
                self.roots.remove(&file::stat(first()?)?);
                plain.mark_mount_of(first()?.as_fd(), MASK)
            }
            Request::MarkRuntime => {
                let runtime = first()?;
                let stat = file::stat(runtime)?;
                self.runtimes.add(&stat);
                plain.mark_file(runtime.as_fd(), MASK)
            }
            Request::Meet { shard } => self.copy_ups.meet(plain, groups, shard, first()?),
            Request::Leave { shard } => self.copy_ups.leave(plain, groups, shard, descriptors),
            Request::Forget { shard } => self.copy_ups.forget(groups, shard),
            Request::Ignore(calm) => {
                self.copy_ups.ignore(groups, self.pulse, calm, first()?.as_fd());
                Ok(())
            }
            Request::Release { number } => {
                if let Some(held) = self.runtimes.take(number) {
                    allow(held.permission)?;
                }
                Ok(())
            }
            Request::Enforce(enforced) => {
                self.questions.enforce(enforced);
                Ok(())
            }
            Request::Unchanged { file, ignorable_from } => {
                self.unchanged.add(file, ignorable_from);
                Ok(())
            }
            Request::ForgetUnchanged { device } => {
                self.unchanged.forget(device);
                Ok(())
            }
            Request::Guard => {
                self.guard(first()?);
                Ok(())
            }
            Request::EnforceNoMore { device } => {
                self.questions.enforce_no_more(device);
                Ok(())
            }
            Request::Close => Ok(()),
        }
    }

    /// Answers the events that have come until now, once: containers that never stop
    /// executing programs must not delay a stop.
    fn close(&mut self, buffer: &mut Buffer) -> anyhow::Result<Ended> {
        let (plain, groups) = (self.plain, self.groups);
        self.read(plain, buffer, Process::asked_plainly)?;
        for (shard, group) in (0..).zip(&groups.groups) {
            self.read(group, buffer, |this, incoming| this.asked(incoming, Some(shard)))?;
        }
        // A stop lets everything run, and what ran is handed over.
        while let Some((number, question)) = self.questions.take_first() {
            self.answered(number, question, Some(Answer::Allow))?;
        }
        Ok(Ended::Closed)
    }
}

enum Taken {
    Done,
    Close,
    DaemonGone,
}

fn allow(permission: Permission<'_>) -> io::Result<Event> {
    answer(permission, Answer::Allow)
}

fn answer(permission: Permission<'_>, with: Answer) -> io::Result<Event> {
    let (event, answered) = permission.answer(with);
    match answered {
        // ENOENT: the process was killed while it waited.
        Err(err) if err.raw_os_error() != Some(libc::ENOENT) => Err(err),
        Ok(()) | Err(_) => Ok(event),
    }
}

/// In nanoseconds since 1970.
fn wall_clock() -> i64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

/// The process's `/proc/PID/stat`; empty if it cannot be read.
fn read_stat(pid: u32, buffer: &mut [u8; MAX_STAT]) -> &[u8] {
    let read = std::fs::File::open(format!("/proc/{pid}/stat"))
        .and_then(|mut file| file.read(&mut buffer[..]))
        .unwrap_or(0);
    &buffer[..read]
}

/// The namespaces and the control group of a process. To read them takes no lock that a
/// container could hold.
fn whereabouts(pid: u32) -> Option<Whereabouts> {
    let mut whereabouts = Handle::open(pid).ok()?.whereabouts();
    whereabouts.cgroup = whereabouts.cgroup.filter(|cgroup| cgroup.len() <= MAX_CGROUP);
    Some(whereabouts)
}

/// The name of a process, from its `/proc/PID/stat`.
fn comm(stat: &[u8]) -> Option<&[u8]> {
    let open = stat.iter().position(|&byte| byte == b'(')?;
    let close = stat.iter().rposition(|&byte| byte == b')')?;
    stat.get(open + 1..close)
}
