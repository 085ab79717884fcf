//! The rhythm at which commands come: a command with a steady rhythm is run by a machine.
//! Pure, and bounded. `probes` decides what follows from a rhythm.

use std::collections::{HashMap, VecDeque};

use jiff::{SignedDuration, Timestamp};

/// How many times the same arguments must come at a steady rhythm to be a probe.
const TIMES: usize = 5;
/// Commands whose rhythm is watched at once, of one container.
const MAX_CADENCES: usize = 256;
/// How far an interval may be from the middle one: a part of it, and on a busy
/// machine this much in any case.
const TOLERANCE_PART: i128 = 4;
const TOLERANCE: SignedDuration = SignedDuration::from_millis(250);
/// A command that comes faster than this is no probe but a loop.
const SHORTEST: SignedDuration = SignedDuration::from_millis(50);

/// When the commands of one container came, by their arguments.
#[derive(Debug, Default)]
pub(super) struct Cadences {
    times: HashMap<Vec<String>, VecDeque<Timestamp>>,
}

impl Cadences {
    /// Notes that a command came. Returns the rhythm that it has now.
    pub(super) fn came(&mut self, argv: &[String], at: Timestamp) -> Rhythm {
        if !self.times.contains_key(argv) && self.times.len() >= MAX_CADENCES {
            let oldest = self.times.iter().min_by_key(|(_, times)| times.back().copied());
            if let Some(oldest) = oldest.map(|(argv, _)| argv.clone()) {
                self.times.remove(&oldest);
            }
        }
        let times = self.times.entry(argv.to_vec()).or_default();
        if times.len() == TIMES {
            times.pop_front();
        }
        times.push_back(at);
        let Some(interval) = steady(times) else { return Rhythm::None };
        if times.len() < TIMES { Rhythm::Perhaps(interval) } else { Rhythm::Steady(interval) }
    }

    pub(super) fn forget(&mut self, argv: &[String]) {
        self.times.remove(argv);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rhythm {
    /// It came once, or irregularly.
    None,
    /// It came at this interval, but too few times to be sure.
    Perhaps(SignedDuration),
    Steady(SignedDuration),
}

/// The interval at which these times follow each other.
fn steady(times: &VecDeque<Timestamp>) -> Option<SignedDuration> {
    let mut intervals: Vec<SignedDuration> = times
        .iter()
        .zip(times.iter().skip(1))
        .map(|(one, next)| next.duration_since(*one))
        .collect();
    intervals.sort();
    let middle = *intervals.get(intervals.len() / 2)?;
    let tolerance = SignedDuration::from_nanos_i128(middle.as_nanos() / TOLERANCE_PART);
    let tolerance = tolerance.max(TOLERANCE);
    let is_steady = intervals.iter().all(|interval| (*interval - middle).abs() <= tolerance);
    (is_steady && middle >= SHORTEST).then_some(middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rhythm of a command that has come at these milliseconds.
    #[track_caller]
    fn check(milliseconds: &[i64], expected: Rhythm) {
        let mut cadences = Cadences::default();
        let argv = ["pg_isready".to_owned()];
        let mut rhythm = Rhythm::None;
        for at in milliseconds {
            rhythm = cadences.came(&argv, Timestamp::from_millisecond(*at).unwrap());
        }
        assert_eq!(rhythm, expected, "{milliseconds:?}");
    }

    #[test]
    fn the_same_arguments_at_a_steady_rhythm_are_a_probe() {
        let seconds = SignedDuration::from_secs;
        check(&[0], Rhythm::None);
        check(&[0, 10_000, 20_100], Rhythm::Perhaps(SignedDuration::from_millis(10_100)));
        check(&[0, 10_000, 20_000, 30_000, 40_000], Rhythm::Steady(seconds(10)));
        // On a busy machine.
        let often = Rhythm::Steady(SignedDuration::from_millis(260));
        check(&[0, 200, 460, 900, 1160], often);
        // After a pause the rhythm is another one, until there are enough times again.
        check(&[0, 10_000, 20_000, 30_000, 400_000], Rhythm::None);
        check(&[0, 9, 500_000, 510_000, 520_000, 530_000, 540_000], Rhythm::Steady(seconds(10)));
    }

    #[test]
    fn a_command_that_comes_irregularly_or_in_a_loop_is_no_probe() {
        check(&[0, 1000, 9000, 12_000, 40_000], Rhythm::None);
        check(&[0, 5, 10, 15, 20, 25], Rhythm::None);
        // A clock that was set back.
        check(&[50_000, 40_000, 30_000, 20_000, 10_000], Rhythm::None);
    }

    #[test]
    fn many_commands_are_forgotten_and_not_kept() {
        let mut cadences = Cadences::default();
        for number in 0..1000 {
            let at = Timestamp::from_second(number).unwrap();
            cadences.came(&[number.to_string()], at);
        }
        assert_eq!(cadences.times.len(), MAX_CADENCES);
    }
}
