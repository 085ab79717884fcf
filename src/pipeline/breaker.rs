//! How much rules may answer by themselves: a rule that is wrong, or a bad deployment, must not
//! end a whole node.
//!
//! Two limits. A rule that would answer in more containers than it may is *stopped*: it only
//! reports until a user resumes it. And a container, an image and the node may be killed or
//! paused so often within a time; beyond that, one answer is refused, and the rule goes on.
//!
//! Containers of one pod count as one, and so does a container that is started again: a workload
//! that is attacked again and again after each kill stops no rule that protects others.
//!
//! Pure. `responses` asks before it requests anything.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use jiff::Timestamp;

use crate::model::ContainerId;
use crate::policy::AnswerLimits;

/// Answers that are remembered. Each limit is far below.
const MOST_REMEMBERED: usize = 4096;

/// An answer of a rule.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// Its number, by which it is taken back.
    pub(super) number: u64,
    pub(super) rule: String,
    pub(super) container: ContainerId,
    /// Its pod, as `NAMESPACE/NAME`.
    pub(super) pod: Option<String>,
    pub(super) image: Option<String>,
    /// The answer ends or freezes the whole container, not one process of it.
    pub(super) is_whole: bool,
}

impl Asked {
    /// What counts as one container.
    fn workload(&self) -> String {
        match &self.pod {
            Some(pod) => format!("pod {pod}"),
            None => format!("container {}", self.container),
        }
    }
}

/// A rule whose answers are stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoppedRule {
    pub rule: String,
    pub since: Timestamp,
    /// The container in which it would have answered next.
    pub container: ContainerId,
    pub reason: String,
}

/// Why an answer is not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The answers of its rule are stopped; true if that is so from now on.
    Stopped(StoppedRule, bool),
    /// A limit is reached; the rule goes on.
    Limit(String),
}

#[derive(Debug, Default)]
pub(super) struct Breaker {
    /// The answers of the last time, oldest first.
    answers: VecDeque<(Timestamp, Asked)>,
    stopped: BTreeMap<String, StoppedRule>,
}

impl Breaker {
    /// Whether an answer may be carried out. If so, it counts.
    pub(super) fn permit(
        &mut self,
        asked: Asked,
        limits: AnswerLimits,
        now: Timestamp,
    ) -> Result<(), Refusal> {
        if let Some(stopped) = self.stopped.get(&asked.rule) {
            return Err(Refusal::Stopped(stopped.clone(), false));
        }
        self.forget_before(limits, now);
        let workload = asked.workload();
        let of_rule: BTreeSet<String> = self
            .answers
            .iter()
            .filter(|(_, one)| one.rule == asked.rule)
            .map(|(_, one)| one.workload())
            .collect();
        let minutes = limits.within.as_secs_f64() / 60.0;
        if !of_rule.contains(&workload) && of_rule.len() >= limits.containers_of_rule {
            let before: Vec<String> = of_rule.into_iter().take(8).collect();
            let stopped = StoppedRule {
                rule: asked.rule.clone(),
                since: now,
                container: asked.container.clone(),
                reason: format!(
                    "it has answered in {} containers within {minutes:.0} min ({}), and would \
                     answer in {workload}",
                    before.len(),
                    before.join(", ")
                ),
            };
            self.stopped.insert(asked.rule, stopped.clone());
            return Err(Refusal::Stopped(stopped, true));
        }
        if asked.is_whole {
            let whole = || self.answers.iter().map(|(_, one)| one).filter(|one| one.is_whole);
            let of_container = whole().filter(|one| one.workload() == workload).count();
            let of_image = whole().filter(|one| one.image.is_some() && one.image == asked.image);
            let reached = [
                (of_container, limits.of_container, workload.clone(), "respond.max_of_container"),
                (of_image.count(), limits.of_image, "its image".into(), "respond.max_of_image"),
                (whole().count(), limits.of_node, "this node".into(), "respond.max_of_node"),
            ];
            if let Some((count, _, what, setting)) =
                reached.into_iter().find(|(count, most, ..)| count >= most)
            {
                return Err(Refusal::Limit(format!(
                    "rules have killed or paused {what} {count} times within {minutes:.0} min, \
                     and may no more often ({setting})"
                )));
            }
        }
        self.remember(now, asked);
        Ok(())
    }

    /// Counts an answer that was carried out, perhaps before driftd was started.
    pub(super) fn remember(&mut self, at: Timestamp, asked: Asked) {
        // One process after the other is killed: only that it happened there counts.
        let is_known = |(_, one): &(Timestamp, Asked)| {
            !one.is_whole && one.rule == asked.rule && one.container == asked.container
        };
        if !asked.is_whole {
            self.answers.retain(|one| !is_known(one));
        }
        if self.answers.len() >= MOST_REMEMBERED {
            self.answers.pop_front();
        }
        self.answers.push_back((at, asked));
    }

    /// An answer has done nothing: the process had ended, or the container was paused already.
    pub(super) fn take_back(&mut self, number: u64) {
        self.answers.retain(|(_, one)| one.number != number);
    }

    fn forget_before(&mut self, limits: AnswerLimits, now: Timestamp) {
        let begin = now.checked_sub(limits.within).unwrap_or(Timestamp::MIN);
        // A clock that was set back leaves answers of the future: they end with the others.
        self.answers.retain(|(at, _)| {
            *at > begin && *at <= now.saturating_add(limits.within).unwrap_or(Timestamp::MAX)
        });
    }

    /// Stops a rule that was stopped before driftd was started.
    pub(super) fn stop(&mut self, stopped: StoppedRule) {
        self.stopped.insert(stopped.rule.clone(), stopped);
    }

    /// Lets a rule answer again, or all of them. What they have done before no longer counts.
    /// Returns those that were stopped.
    pub(super) fn resume(&mut self, rule: Option<&str>) -> Vec<StoppedRule> {
        let is_meant = |name: &str| rule.is_none_or(|rule| rule == name);
        let (resumed, others) = std::mem::take(&mut self.stopped)
            .into_iter()
            .partition(|(name, _): &(String, StoppedRule)| is_meant(name));
        let resumed: BTreeMap<String, StoppedRule> = resumed;
        self.stopped = others;
        self.answers.retain(|(_, one)| !resumed.contains_key(&one.rule));
        resumed.into_values().collect()
    }

    pub(super) fn stopped(&self) -> impl Iterator<Item = &StoppedRule> {
        self.stopped.values()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const LIMITS: AnswerLimits = AnswerLimits {
        containers_of_rule: 3,
        of_container: 2,
        of_image: 4,
        of_node: 6,
        within: Duration::from_secs(600),
    };

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn asked(rule: &str, container: &str) -> Asked {
        Asked {
            number: 0,
            rule: rule.into(),
            container: ContainerId::new("default", container),
            pod: None,
            image: None,
            is_whole: true,
        }
    }

    #[test]
    fn a_rule_that_matches_everything_ends_three_containers_until_a_user_resumes_it() {
        let mut breaker = Breaker::default();
        for container in ["a", "b", "c"] {
            assert_eq!(breaker.permit(asked("bad", container), LIMITS, at(1)), Ok(()));
        }
        let Err(Refusal::Stopped(stopped, true)) = breaker.permit(asked("bad", "d"), LIMITS, at(2))
        else {
            panic!("the fourth is refused")
        };
        assert!(stopped.reason.contains("3 containers within 10 min"), "{}", stopped.reason);
        // Not even in a container in which it may have answered, and not when time has passed.
        for (container, second) in [("a", 3), ("e", 10_000)] {
            let refused = breaker.permit(asked("bad", container), LIMITS, at(second));
            assert_eq!(refused, Err(Refusal::Stopped(stopped.clone(), false)));
        }
        // Another rule goes on.
        assert_eq!(breaker.permit(asked("good", "d"), LIMITS, at(10_001)), Ok(()));
        assert_eq!(breaker.stopped().collect::<Vec<_>>(), [&stopped]);
        assert_eq!(breaker.resume(Some("good")), []);
        assert_eq!(breaker.resume(Some("bad")), [stopped]);
        assert_eq!(breaker.permit(asked("bad", "d"), LIMITS, at(10_002)), Ok(()));
    }

    #[test]
    fn time_that_passes_frees_a_rule_that_was_not_stopped() {
        let mut breaker = Breaker::default();
        for number in 0..20 {
            let permitted =
                breaker.permit(asked("r", &number.to_string()), LIMITS, at(number * 201));
            assert_eq!(permitted, Ok(()), "{number}");
        }
    }

    #[test]
    fn a_workload_that_comes_back_stops_no_rule_but_is_not_killed_for_ever() {
        let mut breaker = Breaker::default();
        let of_pod = |container: &str| Asked {
            pod: Some("shop/web-0".into()),
            image: Some("web".into()),
            ..asked("r", container)
        };
        assert_eq!(breaker.permit(of_pod("a"), LIMITS, at(1)), Ok(()));
        assert_eq!(breaker.permit(of_pod("b"), LIMITS, at(2)), Ok(()));
        let refused = breaker.permit(of_pod("c"), LIMITS, at(3));
        let Err(Refusal::Limit(text)) = refused else { panic!("{refused:?}") };
        assert!(text.contains("pod shop/web-0 2 times"), "{text}");
        assert_eq!(breaker.stopped().count(), 0);
        assert_eq!(breaker.permit(of_pod("d"), LIMITS, at(602)), Ok(()), "the time has passed");
    }

    #[test]
    fn an_image_and_the_node_have_limits_of_their_own() {
        let mut breaker = Breaker::default();
        let of = |number: i64, image: &str| Asked {
            image: Some(image.into()),
            ..asked(&format!("r{}", number / 3), &number.to_string())
        };
        for number in 0..4 {
            assert_eq!(breaker.permit(of(number, "web"), LIMITS, at(number)), Ok(()));
        }
        let refused = breaker.permit(of(4, "web"), LIMITS, at(4));
        assert!(matches!(&refused, Err(Refusal::Limit(text)) if text.contains("its image")));
        for number in 4..6 {
            assert_eq!(breaker.permit(of(number, "other"), LIMITS, at(number)), Ok(()));
        }
        let refused = breaker.permit(of(7, "third"), LIMITS, at(7));
        assert!(matches!(&refused, Err(Refusal::Limit(text)) if text.contains("this node")));
    }

    #[test]
    fn processes_are_killed_one_after_the_other_and_a_rule_that_kills_them_everywhere_is_stopped() {
        let mut breaker = Breaker::default();
        let process = |container: &str| Asked { is_whole: false, ..asked("p", container) };
        for number in 0..5000 {
            assert_eq!(breaker.permit(process("a"), LIMITS, at(number / 100)), Ok(()));
        }
        assert_eq!(breaker.answers.len(), 1);
        assert_eq!(breaker.permit(process("b"), LIMITS, at(51)), Ok(()));
        assert_eq!(breaker.permit(process("c"), LIMITS, at(52)), Ok(()));
        assert!(matches!(
            breaker.permit(process("d"), LIMITS, at(53)),
            Err(Refusal::Stopped(_, true))
        ));
    }

    #[test]
    fn what_has_done_nothing_does_not_count() {
        let mut breaker = Breaker::default();
        for number in 1..20 {
            let asked = Asked { number, ..asked("r", &number.to_string()) };
            assert_eq!(breaker.permit(asked, LIMITS, at(1)), Ok(()));
            breaker.take_back(number);
        }
        assert_eq!(breaker.answers.len(), 0);
    }

    #[test]
    fn a_clock_that_is_set_back_neither_blocks_nor_forgets_for_ever() {
        let mut breaker = Breaker::default();
        assert_eq!(breaker.permit(asked("r", "a"), LIMITS, at(1_000_000)), Ok(()));
        for container in ["b", "c", "d"] {
            assert_eq!(breaker.permit(asked("r", container), LIMITS, at(5)), Ok(()));
        }
    }
}
