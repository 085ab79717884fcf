//! The watchers as a test uses them: commands, waiting for reports, and the results of scans.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use driftd::config;
use driftd::model::{
    Blake3Hash, ContainerId, Fact, FileFact, FileState, LayerFile, Observation, Process,
    RootfsPath, SessionFact,
};
use driftd::sys::mounts::Notifier;
use driftd::watch::{SensorCommand, SensorEvent, Trust, Verdict};

use crate::common::{Watchers, patience};
use crate::container::Container;

pub(crate) fn path(text: &str) -> RootfsPath {
    RootfsPath::new(text).unwrap()
}

/// With these settings a scan starts only on request, or after an execution.
pub(crate) fn settings() -> config::Watch {
    config::Watch {
        settle: Duration::from_millis(100),
        sweep_interval: Duration::from_secs(3600),
        max_hash_bytes: 64 << 20,
        ..config::Watch::default()
    }
}

/// The watchers, and everything they have reported.
pub(crate) struct Node {
    pub(crate) watchers: Watchers,
    pub(crate) received: Vec<SensorEvent>,
    next_ticket: u64,
}

impl Node {
    pub(crate) fn start() -> Node {
        Node::with_room_for(64 * 1024)
    }

    pub(crate) fn with_room_for(reports: usize) -> Node {
        Node::with(reports, &settings(), Notifier::new())
    }

    pub(crate) fn with(reports: usize, settings: &config::Watch, notifier: Notifier) -> Node {
        let watchers = Watchers::start(settings, reports, notifier);
        Node { watchers, received: Vec::new(), next_ticket: 0 }
    }

    pub(crate) fn send(&self, command: SensorCommand) {
        self.watchers.send(command);
    }

    /// Attaches, waits for the first scan, and drops the reports so far. Returns whether
    /// the container was attached before its entry point ran.
    pub(crate) fn attach(&mut self, container: &Container) -> bool {
        self.attach_with(container, Trust::UpTo(container.recorded))
    }

    pub(crate) fn attach_with(&mut self, container: &Container, trust: Trust) -> bool {
        let id = container.id.clone();
        self.watchers.attach(&id, container.pid, trust);
        let before_start = self.until("the container to be attached", |report| match report {
            SensorEvent::Attached { container, before_start, .. } if *container == id => {
                Some(*before_start)
            }
            SensorEvent::NotAttached { reason, .. } => panic!("not attached: {reason}"),
            _ => None,
        });
        self.until("the first scan", |report| match report {
            SensorEvent::Scanned { container, complete: true, .. } if *container == id => Some(()),
            _ => None,
        });
        // Commands are carried out in order: after this scan the trust is in force.
        self.scan(container);
        self.received.clear();
        before_start
    }

    /// Runs a program of the image, and returns as which layer file it was reported.
    /// `None` if it was not reported.
    #[track_caller]
    pub(crate) fn reported_as(
        &mut self,
        container: &Container,
        program: &str,
    ) -> Option<(LayerFile, Blake3Hash)> {
        self.received.clear();
        // Executions in sequence are reported in the same sequence.
        container.shell(&format!("{program}; /tmp/true"));
        self.until_executed(&path("/tmp/true"));
        let mut reported = self.received.iter().filter_map(|report| match report {
            SensorEvent::Observed(Observation {
                fact:
                    Fact::File(FileFact::Executed { path: executed, state, layer_file, lower, .. }),
                ..
            }) if *executed == path(program) => {
                assert_eq!(*lower, None, "a layer file has no lower file");
                Some((layer_file.expect("it is a layer file"), state.blake3().unwrap()))
            }
            _ => None,
        });
        let first = reported.next();
        assert_eq!(reported.next(), None, "it ran once");
        first
    }

    /// Sends a verdict, and waits until it is in force: commands are carried out in order.
    pub(crate) fn judge(&mut self, container: &Container, file: LayerFile, verdict: Verdict) {
        self.send(SensorCommand::Judged { container: container.id.clone(), file, verdict });
        self.scan(container);
    }

    /// Searches the reports received so far, and then those that still come.
    #[track_caller]
    pub(crate) fn until<T>(
        &mut self,
        what: &str,
        mut find: impl FnMut(&SensorEvent) -> Option<T>,
    ) -> T {
        if let Some(found) = self.received.iter().find_map(&mut find) {
            return found;
        }
        let deadline = Instant::now() + patience();
        loop {
            let Ok(report) = self.watchers.reports.recv_deadline(deadline).map(|report| *report)
            else {
                let received: Vec<String> = self.received.iter().map(summary).collect();
                panic!("waited in vain for {what}; received: {received:#?}");
            };
            let found = find(&report);
            self.received.push(report);
            if let Some(found) = found {
                return found;
            }
        }
    }

    #[track_caller]
    pub(crate) fn until_observed<T>(
        &mut self,
        what: &str,
        mut find: impl FnMut(&Observation) -> Option<T>,
    ) -> T {
        self.until(what, |report| match report {
            SensorEvent::Observed(observation) => find(observation),
            _ => None,
        })
    }

    #[track_caller]
    pub(crate) fn until_executed(&mut self, wanted: &RootfsPath) -> Executed {
        self.until_observed(&format!("{wanted} to be executed"), |observation| {
            match &observation.fact {
                Fact::File(FileFact::Executed { path, state, process, invoked_as, .. })
                    if path == wanted =>
                {
                    Some(Executed {
                        state: state.clone(),
                        process: process.clone(),
                        invoked_as: invoked_as.clone(),
                    })
                }
                _ => None,
            }
        })
    }

    pub(crate) fn executed_paths(&self) -> Vec<String> {
        self.received
            .iter()
            .filter_map(|report| match report {
                SensorEvent::Observed(Observation {
                    fact: Fact::File(FileFact::Executed { path, .. }),
                    ..
                }) => Some(path.to_string()),
                _ => None,
            })
            .collect()
    }

    /// Detaches a container whose init has ended, drops the reports so far, and waits for
    /// the last scan.
    #[track_caller]
    pub(crate) fn detach(&mut self, id: &ContainerId) {
        self.received.clear();
        self.send(SensorCommand::Detach { container: id.clone(), pid: None });
        self.until("the last scan", |report| match report {
            SensorEvent::Scanned { container, .. } if container == id => Some(()),
            _ => None,
        });
    }

    /// Requests a scan, and returns what the upperdir holds and what it hides.
    #[track_caller]
    pub(crate) fn scan(&mut self, container: &Container) -> Upper {
        self.next_ticket += 1;
        let ticket = Some(self.next_ticket);
        self.send(SensorCommand::Scan { container: container.id.clone(), ticket });
        let complete = self.until("the scan to end", |report| match report {
            SensorEvent::Scanned { ticket: this, complete, .. } if *this == ticket => {
                Some(*complete)
            }
            _ => None,
        });
        let mut upper = Upper { complete, ..Upper::default() };
        for report in &self.received {
            if let SensorEvent::ScanBatch { ticket: this, observations, .. } = report
                && *this == ticket
            {
                observations.iter().for_each(|observation| upper.take(observation));
            }
        }
        upper
    }

    /// Waits for scans without a ticket until one has found something.
    #[track_caller]
    pub(crate) fn unrequested_scan(&mut self, id: &ContainerId) -> Upper {
        let mut upper = Upper::default();
        self.until("a scan without a ticket", |report| match report {
            SensorEvent::ScanBatch { container, ticket: None, observations } if container == id => {
                observations.iter().for_each(|observation| upper.take(observation));
                None
            }
            SensorEvent::Scanned { container, ticket: None, .. } if container == id => {
                (!upper.present.is_empty()).then_some(())
            }
            _ => None,
        });
        upper
    }

    #[track_caller]
    pub(crate) fn assert_no_loss(&self) {
        assert_eq!(self.watchers.health.losses(), []);
    }
}

/// Reports of changes, without a requested scan.
impl Node {
    /// Waits until `wanted` is reported as present in the state that `is_it` accepts.
    #[track_caller]
    pub(crate) fn until_present(
        &mut self,
        wanted: &str,
        is_it: impl Fn(&FileState) -> bool,
    ) -> FileState {
        let wanted = path(wanted);
        self.until(&format!("{wanted} to be reported"), |report| {
            facts(report).find_map(|fact| match fact {
                Fact::File(FileFact::Present { path, state, .. })
                    if *path == wanted && is_it(state) =>
                {
                    Some(state.clone())
                }
                _ => None,
            })
        })
    }

    #[track_caller]
    pub(crate) fn until_absent(&mut self, wanted: &str) {
        let wanted = path(wanted);
        self.until(&format!("{wanted} to be gone"), |report| {
            facts(report).find_map(|fact| match fact {
                Fact::File(FileFact::Absent { path, .. }) if *path == wanted => Some(()),
                _ => None,
            })
        });
    }

    /// The paths reported as absent so far.
    pub(crate) fn absent_paths(&self) -> Vec<String> {
        let mut paths: Vec<String> = self
            .received
            .iter()
            .flat_map(facts)
            .filter_map(|fact| match fact {
                Fact::File(FileFact::Absent { path, .. }) => Some(path.to_string()),
                _ => None,
            })
            .collect();
        paths.sort();
        paths.dedup();
        paths
    }
}

/// A report in one line, without processes: their ancestors differ per machine.
pub(crate) fn summary(report: &SensorEvent) -> String {
    let fact = |fact: &Fact| match fact {
        Fact::File(FileFact::Executed { path, invoked_as, .. }) => {
            format!("executed {path} as {invoked_as:?}")
        }
        Fact::File(FileFact::Loaded { path, .. }) => format!("loaded {path}"),
        Fact::File(FileFact::Interpreted { script, .. }) => format!("interpreted {script:?}"),
        Fact::Session(SessionFact::ReverseShell { evidence, .. }) => {
            format!("reverse shell: {evidence}")
        }
        Fact::File(FileFact::Present { path, state, lower, writer, .. }) => {
            let (lower, writer) = (lower.is_some(), writer.is_some());
            format!("present {path} {state:?} lower={lower} writer={writer}")
        }
        Fact::File(FileFact::Absent { path, .. }) => format!("absent {path}"),
        Fact::Session(SessionFact::Opened { opening }) => {
            format!("session {:?}", opening.process.argv)
        }
        Fact::Session(SessionFact::Ran { run, .. }) => format!("ran {:?}", run.argv),
        Fact::Session(SessionFact::RanMore { .. }) => "ran more".to_owned(),
        Fact::Session(SessionFact::Interactive { .. }) => "interactive".to_owned(),
        Fact::Session(SessionFact::ProcessEnded { .. }) => "ended".to_owned(),
        Fact::PackageManager { process } => format!("package manager {:?}", process.argv),
    };
    match report {
        SensorEvent::Observed(observation) => fact(&observation.fact),
        SensorEvent::ScanBatch { ticket, observations, .. } => {
            let facts: Vec<String> = observations.iter().map(|seen| fact(&seen.fact)).collect();
            format!("batch {ticket:?} {facts:?}")
        }
        SensorEvent::Attached { .. }
        | SensorEvent::NotAttached { .. }
        | SensorEvent::Unarmed { .. }
        | SensorEvent::Scanned { .. }
        | SensorEvent::Compared { .. }
        | SensorEvent::Over { .. }
        | SensorEvent::RanInstead { .. }
        | SensorEvent::Lost { .. } => format!("{report:?}"),
    }
}

pub(crate) fn facts(report: &SensorEvent) -> impl Iterator<Item = &Fact> {
    let (one, several) = match report {
        SensorEvent::Observed(observation) => (Some(observation), &[][..]),
        SensorEvent::ScanBatch { observations, .. } => (None, &observations[..]),
        SensorEvent::Attached { .. }
        | SensorEvent::NotAttached { .. }
        | SensorEvent::Unarmed { .. }
        | SensorEvent::Scanned { .. }
        | SensorEvent::Compared { .. }
        | SensorEvent::Over { .. }
        | SensorEvent::RanInstead { .. }
        | SensorEvent::Lost { .. } => (None, &[][..]),
    };
    one.into_iter().chain(several).map(|observation| &observation.fact)
}

pub(crate) struct Executed {
    pub(crate) state: FileState,
    pub(crate) process: Arc<Process>,
    pub(crate) invoked_as: Option<String>,
}

/// What a scan reported.
#[derive(Default)]
pub(crate) struct Upper {
    pub(crate) present: BTreeMap<RootfsPath, FileState>,
    pub(crate) absent: BTreeSet<String>,
    pub(crate) same_as_image: Vec<String>,
    pub(crate) complete: bool,
}

impl Upper {
    pub(crate) fn take(&mut self, observation: &Observation) {
        match &observation.fact {
            Fact::File(FileFact::Present { path, state, lower, .. }) => {
                if lower.is_some_and(|lower| Some(lower.blake3) == state.blake3()) {
                    self.same_as_image.push(path.to_string());
                    self.same_as_image.sort();
                }
                self.present.insert(path.clone(), state.clone());
            }
            Fact::File(FileFact::Absent { path, .. }) => {
                self.absent.insert(path.to_string());
            }
            other => panic!("a scan reported {other:?}"),
        }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.present.keys().map(ToString::to_string).collect()
    }

    pub(crate) fn hidden(&self) -> Vec<&str> {
        self.absent.iter().map(String::as_str).collect()
    }

    #[track_caller]
    pub(crate) fn get(&self, wanted: &str) -> &FileState {
        self.present.get(&path(wanted)).unwrap_or_else(|| panic!("no {wanted}: {:?}", self.names()))
    }
}

/// A container without a namespace of its own, and a node that watches it.
pub(crate) fn attached() -> (Container, Node) {
    let container = Container::start();
    let mut node = Node::start();
    node.attach(&container);
    (container, node)
}
