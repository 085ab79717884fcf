//! The stop of the daemon as a list of stages. Each stage has a deadline, and counts what it
//! leaves undone.
//!
//! A stage that does not end in time is left running, and the next one begins: neither the
//! next stage nor systemd must wait for what it waits for (a disk, a container's runtime).
//! `daemon::STOP` has the stages and their deadlines.

use std::fmt;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::harness::Left;

/// One stage.
pub struct Stage {
    pub name: &'static str,
    pub within: Duration,
    /// Does the work. Should end by the deadline, its argument.
    pub run: Box<dyn FnOnce(Instant) + Send>,
    /// Counts what is left undone, after the stage has ended or its deadline has passed.
    pub left: Box<dyn Fn() -> Vec<Left>>,
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage").field("name", &self.name).field("within", &self.within).finish()
    }
}

/// The result of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub name: &'static str,
    pub is_in_time: bool,
    pub left: Vec<Left>,
}

/// Runs the stages one after the other, and logs what each of them leaves.
pub fn run(stages: Vec<Stage>) -> Vec<Outcome> {
    stages.into_iter().map(run_one).collect()
}

fn run_one(stage: Stage) -> Outcome {
    let Stage { name, within, run, left } = stage;
    let began = Instant::now();
    let deadline = began + within;
    let (ended, end) = bounded::<()>(0);
    let thread = std::thread::Builder::new().name("stop".into()).spawn(move || {
        let _ended = ended;
        run(deadline);
    });
    // If no thread can be started, the stage does not run, and counts as not ended.
    let is_in_time =
        thread.is_ok() && end.recv_timeout(within) == Err(RecvTimeoutError::Disconnected);
    let left = left();
    let took = began.elapsed();
    let rest: Vec<String> =
        left.iter().map(|left| format!("{} {}", left.count, left.what)).collect();
    if is_in_time && rest.is_empty() {
        tracing::info!(stage = name, ?took, "a stage of the stop is done");
    } else {
        tracing::warn!(
            stage = name,
            ?took,
            in_time = is_in_time,
            left = if rest.is_empty() { "nothing".to_owned() } else { rest.join(", ") },
            "a stage of the stop leaves something undone"
        );
    }
    Outcome { name, is_in_time, left }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn stages_run_in_their_order_and_one_that_hangs_is_left_behind_with_its_count() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let stage = |name: &'static str, within: Duration, hangs: bool, count: u64| {
            let order = order.clone();
            Stage {
                name,
                within,
                run: Box::new(move |deadline| {
                    assert!(deadline <= Instant::now() + within);
                    order.lock().unwrap().push(name);
                    if hangs {
                        std::thread::park();
                    }
                }),
                left: Box::new(move || {
                    (count > 0).then_some(Left { what: "items", count }).into_iter().collect()
                }),
            }
        };
        let long = Duration::from_secs(30);
        let stages = vec![
            stage("first", long, false, 0),
            stage("hangs", Duration::from_millis(20), true, 7),
            stage("last", long, false, 3),
        ];
        let outcomes = run(stages);
        let items = |count| vec![Left { what: "items", count }];
        assert_eq!(
            outcomes,
            [
                Outcome { name: "first", is_in_time: true, left: Vec::new() },
                Outcome { name: "hangs", is_in_time: false, left: items(7) },
                Outcome { name: "last", is_in_time: true, left: items(3) },
            ]
        );
        assert_eq!(*order.lock().unwrap(), ["first", "hangs", "last"]);
    }
}
