//! The stop of the daemon: what ends in which order, and how long each part may take.
//!
//! Records a gap for what a stop had no time for. Does not decide when the daemon stops.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use jiff::Timestamp;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::api;
use crate::baseline::Recorder;
use crate::containerd::Containerd;
use crate::evidence::Keeper;
use crate::guardian::Heart;
use crate::health::Failure;
use crate::history::{Record, Writer};
use crate::sys::channel::Channel;
use crate::threads::stop::{self, Stage};
use crate::threads::{Left, Threads};
use crate::watch::{LEFT_TO_THE_START, Watch};

/// The stages of a stop, in order, each with how long it may take. The gate is first, so that
/// the kernel decides by itself from then on. The others follow the direction in which data
/// flows, so that what was seen is still judged, kept and sent. systemd's own limit
/// (`TimeoutStopSec=`) is longer, so that it never ends the daemon before this does.
const STOP: [(&str, Duration); 7] = [
    ("gate", Duration::from_millis(500)),
    ("containerd", Duration::from_millis(500)),
    ("watchers", Duration::from_millis(4500)),
    ("pipeline", Duration::from_millis(4000)),
    ("baselines", Duration::from_millis(1000)),
    ("history", Duration::from_millis(3000)),
    ("followers", Duration::from_millis(1500)),
];

/// The name of the pipeline's thread.
pub(super) const PIPELINE: &str = "pipeline";

/// Owns everything that a stop ends.
pub(super) struct Running {
    pub(super) watch: Arc<Watch>,
    /// The guardian's channel and the heart, needed as long as the gate is open.
    pub(super) guarded_by: (Channel, Heart),
    pub(super) containerd: Containerd,
    pub(super) keeper: Keeper,
    /// The pipeline ends when this is dropped.
    pub(super) stop_sender: Sender<Infallible>,
    pub(super) recorder: Recorder,
    pub(super) writer: Writer,
    pub(super) end_api: oneshot::Sender<()>,
    pub(super) followers: Option<Followers>,
}

/// The tasks that send what the history holds: the API's, and the log's.
pub(super) type Followers = (ApiTask, JoinHandle<()>);

pub(super) type ApiTask = JoinHandle<Result<(), api::Error>>;

impl Running {
    pub(super) fn stop(self, runtime: &Handle, threads: &Threads) {
        stop::run(stages(self, runtime, threads));
    }
}

/// The work of each stage, and what is left after it.
fn stages(running: Running, runtime: &Handle, threads: &Threads) -> Vec<Stage> {
    type Work = (Box<dyn FnOnce(Instant) + Send>, Box<dyn Fn() -> Vec<Left>>);
    let Running {
        watch,
        guarded_by,
        containerd,
        keeper,
        stop_sender,
        recorder,
        writer,
        end_api,
        followers,
    } = running;
    let nothing = || Vec::new();
    let unwritten = writer.left();
    let (gate, watchers, drained, unreported) =
        (watch.clone(), watch.clone(), watch.clone(), watch);
    let (end_of_pipeline, pipeline, runtime) = (threads.clone(), threads.clone(), runtime.clone());
    let (at_the_end, began) = (threads.clone(), Timestamp::now());
    let works: [Work; STOP.len()] = [
        (
            Box::new(move |_| {
                gate.close_gate();
                drop(guarded_by);
            }),
            Box::new(nothing),
        ),
        (
            Box::new(move |_| {
                containerd.stop_following();
                keeper.stop();
            }),
            Box::new(nothing),
        ),
        (Box::new(move |deadline| watchers.drain(deadline)), Box::new(move || drained.left())),
        (
            Box::new(move |deadline| {
                drop(stop_sender);
                end_of_pipeline.wait_for_end(&[PIPELINE], deadline);
            }),
            Box::new(move || pipeline.left(&[PIPELINE])),
        ),
        (Box::new(move |_| recorder.stop()), Box::new(nothing)),
        (
            Box::new(move |_| {
                let mut left = unreported.left();
                left.extend(at_the_end.left(&[PIPELINE]));
                let is_all = left.iter().all(|left| left.count == 0);
                if let Some(gap) = left_by_a_stop(began, &left) {
                    let _ = writer.records().try_send(gap);
                }
                writer.stop_after(is_all);
            }),
            Box::new(unwritten),
        ),
        (
            Box::new(move |_| {
                let _ = end_api.send(());
                if let Some((api, log)) = followers {
                    // The history has ended, so the task of the log ends by itself.
                    runtime.block_on(async {
                        let served = async {
                            if !api.is_finished() {
                                let _ = api.await;
                            }
                        };
                        let _ = tokio::join!(served, log);
                    });
                }
            }),
            Box::new(nothing),
        ),
    ];
    let stage = |((name, within), (run, left)): (_, Work)| Stage { name, within, run, left };
    STOP.into_iter().zip(works).map(stage).collect()
}

/// The gap for what a stop had no time for and the next start does not find again.
fn left_by_a_stop(began: Timestamp, left: &[Left]) -> Option<Record> {
    let left = left.iter().filter(|left| left.count > 0 && left.what != LEFT_TO_THE_START);
    let left: Vec<String> = left.map(|Left { what, count }| format!("{count} {what}")).collect();
    (!left.is_empty()).then(|| Record::Gap {
        name: Failure::NotRunning.name().into(),
        container: None,
        detail: format!("a stop had no time for all that was seen: {}", left.join(", ")),
        at: began,
        until: Some(Timestamp::now()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline;

    #[test]
    fn a_stop_is_a_gap_for_what_the_next_start_does_not_find() {
        let left = |what, count| Left { what, count };
        let gap = |left: &[Left]| left_by_a_stop(Timestamp::UNIX_EPOCH, left);
        assert_eq!(
            gap(&[left("items taken and not reported", 0), left(LEFT_TO_THE_START, 3)]),
            None
        );
        let Some(Record::Gap { name, detail, .. }) = gap(&[left("executions", 2)]) else {
            panic!("no gap")
        };
        assert_eq!(name, "not_running");
        assert!(detail.ends_with(": 2 executions"), "{detail}");
    }

    #[test]
    fn a_stop_closes_the_gate_first_and_ends_before_the_limit_of_systemd() {
        let names = STOP.map(|(name, _)| name);
        let expected =
            ["gate", "containerd", "watchers", "pipeline", "baselines", "history", "followers"];
        assert_eq!(names, expected);
        let longest: Duration = STOP.iter().map(|(_, within)| *within).sum();
        let unit = include_str!("../../systemd/driftd.service");
        let limit = unit.lines().find_map(|line| line.strip_prefix("TimeoutStopSec="));
        let limit = limit.and_then(|limit| limit.strip_suffix('s')).unwrap();
        assert!(longest + Duration::from_secs(3) < Duration::from_secs(limit.parse().unwrap()));
        // The pipeline's own limit leaves time for its last records.
        let (_, within) = STOP.into_iter().find(|(name, _)| *name == PIPELINE).unwrap();
        assert!(pipeline::DRAIN_WITHIN < within);
    }
}
