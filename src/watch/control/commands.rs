//! The thread that executes the pipeline's commands: attach, detach, scan, compare, trust, and
//! the rest.
//!
//! Commands come by a channel, marks are placed by `marker`, and scans are requested from
//! `files`. A report for which the pipeline has no room is kept and sent later. This thread
//! must not scan or hash anything: until marks are placed, nothing is seen of a container.

use std::collections::VecDeque;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use jiff::Timestamp;

use super::marker::{self, Marked, Marker, Refusal};
use crate::health::Failure;
use crate::model::{ContainerId, OverlayDirs, RootfsPath, printable};
use crate::sys::procfs::Handle;
use crate::threads;
use crate::watch::core::message::{SensorCommand, SensorEvent};
use crate::watch::core::trust::Verdict;
use crate::watch::core::watched::Watched;
use crate::watch::files::work::ScanRequest;
use crate::watch::sessions::shared::Sessions;

pub(crate) struct Control {
    pub(crate) shared: Arc<Sessions>,
    pub(crate) marker: Arc<Marker>,
    pub(crate) commands: Receiver<SensorCommand>,
    pub(crate) orders: Sender<ScanRequest>,
    /// Reports for which the pipeline had no room. Each answers one of its commands, so there
    /// are never more of them than commands.
    pub(crate) unsent: VecDeque<SensorEvent>,
}

impl Control {
    pub(crate) fn run(mut self) {
        let mut last_check = Instant::now();
        while !self.shared.is_stopping() {
            self.send_unsent();
            match threads::recv_timeout(&self.commands, Duration::from_millis(250)) {
                Ok(SensorCommand::Attach { container, pid, rootfs }) => {
                    self.attach(container, pid, rootfs);
                }
                Ok(SensorCommand::Detach { container, pid }) => self.detach(&container, pid),
                Ok(SensorCommand::Scan { container, ticket }) => self.scan(container, ticket),
                Ok(SensorCommand::Compare { container, ticket, rootfs, entry_point }) => {
                    self.compare(container, ticket, rootfs, entry_point);
                }
                Ok(SensorCommand::Trust { container, trust }) => {
                    if let Some(watched) = self.shared.table.get(&container) {
                        watched.layer_files_mut().set_trust(trust);
                        watched.ask_for_processes();
                        marker::forget(&self.shared, &watched);
                    }
                }
                Ok(SensorCommand::EntryPoint { container, paths }) => {
                    if let Some(watched) = self.shared.table.get(&container) {
                        watched.set_entry_point(paths);
                        watched.ask_for_walk();
                    }
                }
                Ok(SensorCommand::Terminal { container, input, is_handed_on }) => {
                    if let Some(watched) = self.shared.table.get(&container)
                        && let Err(err) = self.listen(&watched, input.as_deref(), is_handed_on)
                    {
                        let input = input.unwrap_or_default();
                        let input = printable(input.as_os_str().as_bytes());
                        tracing::warn!(
                            %container,
                            input,
                            "cannot watch the container's terminal, attach sessions will be \
                             missed: {err}"
                        );
                    }
                }
                Ok(SensorCommand::Enforce { container, undecided }) => {
                    self.marker.enforce(&container, undecided);
                }
                Ok(SensorCommand::Judged { container, file, verdict }) => {
                    if let Some(watched) = self.shared.table.get(&container) {
                        watched.layer_files_mut().judge(&file, verdict);
                        match verdict {
                            Verdict::Image => (),
                            Verdict::Drift | Verdict::Lost => {
                                marker::forget(&self.shared, &watched);
                            }
                        }
                    }
                }
                Err(RecvTimeoutError::Timeout) => (),
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if last_check.elapsed() >= Duration::from_secs(10) {
                last_check = Instant::now();
                self.marker.forget_unannounced();
            }
        }
    }

    /// From now on, clients that attach to the terminal of the container's init are seen.
    fn listen(
        &self,
        watched: &Arc<Watched>,
        input: Option<&Path>,
        is_handed_on: bool,
    ) -> io::Result<()> {
        if is_handed_on {
            self.shared.terminals.listen(watched)?;
        }
        let listen = |input| self.shared.inputs.listen(watched, input, is_handed_on);
        input.map_or(Ok(()), listen)
    }

    fn report(&mut self, report: SensorEvent) {
        self.unsent.push_back(report);
        self.send_unsent();
    }

    fn send_unsent(&mut self) {
        while let Some(report) = self.unsent.pop_front() {
            if let Err(report) = self.shared.try_report(report) {
                self.unsent.push_front(report);
                break;
            }
        }
    }

    fn attach(&mut self, container: ContainerId, pid: u32, rootfs: Option<OverlayDirs>) {
        threads::about(&container);
        let is_outdated = self.shared.table.get(&container).is_some_and(|watched| {
            watched.init.pid != pid
                && Handle::open_exactly(watched.init)
                    .is_ok_and(|init| !init.first_stat().has_ended())
                && !watched.is_unannounced()
        });
        if is_outdated {
            // A newer state of containerd has come by a faster way: the container runs anew
            // already.
            return;
        }
        let marked = self.marker.mark(&container, pid, rootfs);
        if let Some(watched) = self.shared.table.get(&container) {
            watched.set_unannounced(false);
        }
        match marked {
            Ok(Marked { before_start, is_news }) => {
                // Also if the marks were there before: the pipeline may not know that.
                self.report(SensorEvent::Attached { container, pid, before_start });
                if is_news {
                    self.shared.wake_scan();
                }
            }
            Err(refusal) => {
                if let Refusal::MarkRefused(_) = refusal {
                    let _ = self.shared.health.record(Failure::MarkRefused);
                }
                let reason = refusal.to_string();
                self.report(SensorEvent::NotAttached { container, pid, reason });
            }
        }
    }

    fn detach(&self, container: &ContainerId, pid: Option<u32>) {
        let is_another = |watched: Arc<Watched>| pid.is_some_and(|pid| watched.init.pid != pid);
        if self.shared.table.get(container).is_some_and(is_another) {
            return;
        }
        // Then an earlier run has ended. The run that was armed meanwhile goes on, and the
        // command to attach to it is still to come.
        let is_outdated = self.shared.table.get(container).is_some_and(|watched| {
            watched.is_unannounced() && Handle::open_exactly(watched.init).is_ok()
        });
        if !is_outdated {
            self.marker.detach(container);
        }
    }

    fn scan(&mut self, container: ContainerId, ticket: Option<u64>) {
        let ordered = match self.shared.table.get(&container) {
            Some(watched) => self.orders.try_send(ScanRequest::Scan { watched, ticket }).is_ok(),
            None => false,
        };
        if ordered {
            self.shared.wake_scan();
        } else {
            let began = Timestamp::now();
            self.report(SensorEvent::Scanned { container, ticket, began, complete: false });
        }
    }

    fn compare(
        &mut self,
        container: ContainerId,
        ticket: u64,
        rootfs: OverlayDirs,
        entry_point: Vec<RootfsPath>,
    ) {
        let watched = Watched::stopped(container, rootfs, entry_point).map(Arc::new);
        let ordered = watched.is_some_and(|watched| {
            self.orders.try_send(ScanRequest::Compare { watched, ticket }).is_ok()
        });
        if ordered {
            self.shared.wake_scan();
        } else {
            self.report(SensorEvent::Compared {
                ticket,
                observations: Vec::new(),
                end: Some(false),
            });
        }
    }
}
