//! How often rules may ask for evidence.
//!
//! Evidence changes nothing in a container, so the limits for answers that do (`breaker`) do not
//! apply. But it takes time and room, and a container chooses how often it is attacked: so a
//! workload has a few cases in a while, and one case is added to a few times.
//!
//! Pure. `case_requests` asks before it requests anything.

use std::collections::{HashMap, VecDeque};

use jiff::{SignedDuration, Timestamp};

use crate::model::CaseId;

/// How long a case is left alone after it was added to.
const AGAIN: SignedDuration = SignedDuration::from_secs(60);
/// How often one case is added to.
const MOST_TIMES: u32 = 8;
/// How many cases one workload, and all together, may begin within a time.
const MOST_OF_WORKLOAD: usize = 4;
const MOST_OF_NODE: usize = 32;
const WITHIN: SignedDuration = SignedDuration::from_mins(10);
/// How long a case is remembered here.
const REMEMBERED: SignedDuration = SignedDuration::from_hours(1);

/// The cases that rules have begun.
#[derive(Debug, Default)]
pub(super) struct Cases {
    begun: VecDeque<Begun>,
    /// When it was last recorded that a workload gets no further case.
    refused: HashMap<String, Timestamp>,
}

#[derive(Debug)]
struct Begun {
    case: CaseId,
    workload: String,
    at: Timestamp,
    last: Timestamp,
    times: u32,
}

/// Whether evidence is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Permit {
    Take,
    /// The case has what there is, or has been added to often enough.
    Known,
    Refused(String),
    /// The same as was recorded a moment ago.
    RefusedAgain,
}

impl Cases {
    pub(super) fn permit(&mut self, case: CaseId, workload: &str, now: Timestamp) -> Permit {
        // After a clock was set back, what it shows is as old as it seems.
        let is_within = |at: Timestamp, time| now.duration_since(at).abs() < time;
        self.begun.retain(|one| is_within(one.last, REMEMBERED));
        self.refused.retain(|_, at| is_within(*at, AGAIN));
        if let Some(known) = self.begun.iter_mut().find(|one| one.case == case) {
            if is_within(known.last, AGAIN) {
                return Permit::Known;
            }
            // It is remembered for as long as it is seen.
            known.last = now;
            if known.times >= MOST_TIMES {
                return Permit::Known;
            }
            known.times += 1;
            return Permit::Take;
        }
        let recent = || self.begun.iter().filter(|one| is_within(one.at, WITHIN));
        let of_workload = recent().filter(|one| one.workload == workload).count();
        let minutes = WITHIN.as_mins();
        let reached = [
            (of_workload, MOST_OF_WORKLOAD, workload),
            (recent().count(), MOST_OF_NODE, "this node"),
        ];
        if let Some((_, most, what)) = reached.into_iter().find(|(count, most, _)| count >= most) {
            if self.refused.insert(workload.to_owned(), now).is_some() {
                return Permit::RefusedAgain;
            }
            return Permit::Refused(format!(
                "not carried out: rules have begun {most} cases of {what} within {minutes} min, \
                 and begin no more (driftd evidence take does)"
            ));
        }
        let workload = workload.to_owned();
        self.begun.push_back(Begun { case, workload, at: now, last: now, times: 1 });
        Permit::Take
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn case(number: u8) -> CaseId {
        CaseId([number; 16])
    }

    #[test]
    fn a_case_is_added_to_after_a_while_and_not_for_ever() {
        let mut cases = Cases::default();
        assert_eq!(cases.permit(case(1), "a", at(0)), Permit::Take);
        assert_eq!(cases.permit(case(1), "a", at(59)), Permit::Known);
        let taken =
            (1..100).filter(|minute| cases.permit(case(1), "a", at(minute * 61)) == Permit::Take);
        assert_eq!(taken.count(), 7);
    }

    #[test]
    fn a_workload_that_is_attacked_again_and_again_takes_no_case_from_another() {
        let mut cases = Cases::default();
        for number in 0..4 {
            assert_eq!(cases.permit(case(number), "a", at(number.into())), Permit::Take);
        }
        let refused = cases.permit(case(4), "a", at(5));
        let Permit::Refused(why) = refused else { panic!("{refused:?}") };
        assert!(why.contains("4 cases of a within 10 min"), "{why}");
        assert_eq!(cases.permit(case(5), "a", at(6)), Permit::RefusedAgain, "recorded once");
        assert_eq!(cases.permit(case(6), "b", at(7)), Permit::Take);
        assert_eq!(cases.permit(case(7), "a", at(700)), Permit::Take, "the time has passed");
        for number in 10..200 {
            let _ = cases.permit(case(number), &number.to_string(), at(701));
        }
        assert_eq!(cases.begun.len(), 6 + 31, "the node has a limit, too");
    }

    #[test]
    fn a_clock_that_is_set_back_blocks_nothing_for_long() {
        let mut cases = Cases::default();
        for number in 0..4 {
            assert_eq!(cases.permit(case(number), "a", at(1_000_000)), Permit::Take);
        }
        assert_eq!(cases.permit(case(9), "a", at(5)), Permit::Take);
    }
}
