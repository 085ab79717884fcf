//! The axis of time of a drawing: which time stands where, and which times have a label.
//!
//! Pure. An incident takes minutes, and days may lie around it. So the axis shortens long times
//! in which nothing happened, and shows where it does.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// A time in which nothing happened is shortened if it is at least this long,
const LEAST_QUIET: i64 = 2 * 60 * SECOND;
/// at least this part of what is not shortened,
const PART_OF_ALL: i64 = 5;
/// and longer than so many of the shortest times between two events: events at a steady pace
/// are drawn to scale.
const TIMES_SHORTEST: i64 = 8;
/// So many are shortened at most.
const MOST_BREAKS: usize = 5;
/// The width of one that is shortened.
const BREAK: i32 = 46;
/// The least width of what lies between two of them.
const LEAST_WIDTH: i32 = 60;
/// The least distance between two labels.
const LABEL: i32 = 84;

const SECOND: i64 = 1_000_000;
const DAY: i64 = 86_400;
/// Distances between labels, in seconds.
const STEPS: [i64; 20] = [
    1,
    2,
    5,
    10,
    15,
    30,
    60,
    120,
    300,
    600,
    900,
    1800,
    3600,
    7200,
    10_800,
    21_600,
    43_200,
    DAY,
    7 * DAY,
    30 * DAY,
];

/// A time that is drawn to scale, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    from: i64,
    to: i64,
    x: i32,
    width: i32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    segments: Vec<Segment>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tick {
    pub(super) x: i32,
    pub(super) time: String,
    /// On the first label of a day.
    pub(super) date: Option<String>,
}

/// A time that is shortened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Break {
    pub(super) x: i32,
    pub(super) width: i32,
    pub(super) label: String,
}

impl Axis {
    /// An axis from `x` on that shows all of `times`; `None` without any.
    pub(super) fn of(mut times: Vec<Timestamp>, x: i32, width: i32) -> Option<Axis> {
        times.sort_unstable();
        times.dedup();
        let times: Vec<i64> = times.into_iter().map(Timestamp::as_microsecond).collect();
        let (first, last) = (*times.first()?, *times.last()?);
        let mut ends = quiet(&times);
        ends.sort_unstable();
        let mut segments = Vec::new();
        let mut from = first;
        for (before, after) in ends {
            segments.push(Segment { from, to: before, x: 0, width: 0 });
            from = after;
        }
        segments.push(Segment { from, to: last, x: 0, width: 0 });
        lay_out(&mut segments, x, width);
        Some(Axis { segments })
    }

    pub(super) fn x(&self, time: Timestamp) -> i32 {
        let time = time.as_microsecond();
        let mut before: Option<&Segment> = None;
        for segment in &self.segments {
            if time < segment.from {
                return match before {
                    None => segment.x,
                    Some(before) => {
                        scale(time, (before.to, segment.from), (before.x + before.width, segment.x))
                    }
                };
            }
            if time <= segment.to {
                let to = segment.x + segment.width;
                return match segment.from == segment.to {
                    true => segment.x + segment.width / 2,
                    false => scale(time, (segment.from, segment.to), (segment.x, to)),
                };
            }
            before = Some(segment);
        }
        before.map_or(0, |last| last.x + last.width)
    }

    pub(super) fn breaks(&self) -> Vec<Break> {
        self.segments
            .windows(2)
            .map(|pair| Break {
                x: pair[0].x + pair[0].width,
                width: pair[1].x - pair[0].x - pair[0].width,
                label: length((pair[1].from - pair[0].to) / SECOND),
            })
            .collect()
    }

    pub(super) fn ticks(&self, zone: &TimeZone) -> Vec<Tick> {
        let mut ticks: Vec<Tick> = Vec::new();
        let mut day = String::new();
        for segment in &self.segments {
            for time in labelled(segment, zone) {
                let Ok(at) = Timestamp::from_microsecond(time) else { continue };
                let zoned = at.to_zoned(zone.clone());
                let date = zoned.strftime("%Y-%m-%d").to_string();
                let is_new = date != day;
                day.clone_from(&date);
                ticks.push(Tick {
                    x: self.x(at),
                    time: zoned.strftime("%H:%M:%S").to_string(),
                    date: is_new.then_some(date),
                });
            }
        }
        ticks
    }
}

/// The longest times without an event, as long as they are a large part of the rest.
fn quiet(times: &[i64]) -> Vec<(i64, i64)> {
    let mut lengths: Vec<(i64, i64)> = times.windows(2).map(|pair| (pair[0], pair[1])).collect();
    lengths.sort_by_key(|(before, after)| std::cmp::Reverse(after - before));
    let shortest = lengths.last().map_or(0, |(before, after)| after - before);
    let mut rest = times[times.len() - 1] - times[0];
    let mut cut = Vec::new();
    for (before, after) in lengths.into_iter().take(MOST_BREAKS) {
        let length = after - before;
        let is_short = length < LEAST_QUIET
            || length.saturating_mul(PART_OF_ALL) < rest
            || length / TIMES_SHORTEST < shortest;
        if is_short {
            break;
        }
        rest -= length;
        cut.push((before, after));
    }
    cut
}

/// Gives each segment its least width, and divides the rest by how long they last.
fn lay_out(segments: &mut [Segment], x: i32, width: i32) {
    let number = i32::try_from(segments.len()).unwrap_or(1);
    let spare = (width - (number - 1) * BREAK - number * LEAST_WIDTH).max(0);
    let all: i64 = segments.iter().map(|segment| segment.to - segment.from).sum();
    let mut x = x;
    for segment in segments {
        let share = match all {
            0 => spare / number,
            _ => scale(segment.to - segment.from, (0, all), (0, spare)),
        };
        (segment.x, segment.width) = (x, LEAST_WIDTH + share);
        x += segment.width + BREAK;
    }
}

/// Maps `value` from one range to the other.
fn scale(value: i64, from: (i64, i64), to: (i32, i32)) -> i32 {
    let (value, length) = (i128::from(value - from.0), i128::from(from.1 - from.0).max(1));
    let mapped = value * i128::from(to.1 - to.0) / length;
    to.0 + i32::try_from(mapped).unwrap_or_default()
}

/// The times of a segment that have a label: its first, and round ones.
fn labelled(segment: &Segment, zone: &TimeZone) -> Vec<i64> {
    let mut times = vec![segment.from];
    let seconds = (segment.to - segment.from) / SECOND;
    let fits =
        |step: &&i64| seconds > 0 && scale(**step, (0, seconds), (0, segment.width)) >= LABEL;
    let Some(step) = STEPS.iter().find(fits) else { return times };
    // Round in the zone that is shown.
    let offset = Timestamp::from_microsecond(segment.from)
        .map_or(0, |at| i64::from(zone.to_offset(at).seconds()));
    let least = scale_back(LABEL, segment);
    let local = segment.from / SECOND + offset;
    let mut next = (local.div_euclid(*step) + 1) * step;
    while (next - offset) * SECOND <= segment.to {
        let time = (next - offset) * SECOND;
        if time - segment.from >= least {
            times.push(time);
        }
        next += step;
    }
    times
}

/// How long a part of a segment of this width lasts.
fn scale_back(width: i32, segment: &Segment) -> i64 {
    let length = i128::from(segment.to - segment.from) * i128::from(width);
    i64::try_from(length / i128::from(segment.width.max(1))).unwrap_or(i64::MAX)
}

/// A length of time in one unit.
pub(super) fn length(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / DAY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_795_000_000 + seconds).unwrap()
    }

    fn axis(seconds: &[i64]) -> Axis {
        Axis::of(seconds.iter().copied().map(at).collect(), 100, 800).unwrap()
    }

    #[test]
    fn what_happens_together_is_drawn_to_scale() {
        let axis = axis(&[0, 60, 120, 200]);
        assert_eq!(axis.breaks(), []);
        assert_eq!([0, 50, 100, 200].map(|second| axis.x(at(second))), [100, 300, 500, 900]);
        // Outside of the axis: at its ends.
        assert_eq!((axis.x(at(-9)), axis.x(at(999))), (100, 900));
        let even: Vec<i64> = (0..10).map(|hour| hour * 3600).collect();
        assert_eq!(self::axis(&even).breaks(), []);
    }

    #[test]
    fn a_long_quiet_time_is_shortened() {
        let axis = axis(&[0, 30, 60, 864_000, 864_030]);
        let breaks = axis.breaks();
        assert_eq!(breaks.len(), 1);
        assert_eq!((breaks[0].label.as_str(), breaks[0].width), ("9 d", BREAK));
        assert_eq!(axis.x(at(60)), breaks[0].x);
        assert_eq!(axis.x(at(864_000)), breaks[0].x + BREAK);
        let middle = axis.x(at(432_000));
        assert!(breaks[0].x < middle && middle < breaks[0].x + BREAK);
        assert_eq!(axis.x(at(864_030)), 899, "to the end of the drawing");
    }

    #[test]
    fn single_moments_have_room() {
        assert_eq!(axis(&[5]).x(at(5)), 500);
        let far = axis(&[0, 86_400, 86_460, 172_800]);
        assert_eq!(far.breaks().len(), 2);
        let xs = [0, 86_400, 172_800].map(|second| far.x(at(second)));
        assert!(xs[1] - xs[0] > 70 && xs[2] - xs[1] > 70, "{xs:?}");
        assert!(far.x(at(86_460)) - xs[1] > LABEL, "a minute among days");
        let many: Vec<i64> = (0..20).map(|day| day * day * 100_000).collect();
        assert!(axis(&many).breaks().len() <= MOST_BREAKS);
    }

    #[test]
    fn labels_are_round_in_the_zone_and_do_not_touch() {
        for seconds in [1, 7, 60, 600, 4000, 90_000, 40 * DAY] {
            let steps: Vec<i64> = (0..=20).map(|step| step * seconds / 20).collect();
            let ticks = axis(&steps).ticks(&TimeZone::UTC);
            assert!(ticks.windows(2).all(|two| two[1].x - two[0].x >= LABEL - 1), "{ticks:?}");
            assert!(ticks[0].date.is_some());
        }
        let zone = TimeZone::fixed(jiff::tz::Offset::from_seconds(1800).unwrap());
        let ticks = axis(&[0, 3600, 7200, 10_800]).ticks(&zone);
        let is_round = |tick: &Tick| ["00:00", "30:00"].iter().any(|end| tick.time.ends_with(end));
        assert!(ticks.len() > 3 && ticks[1..].iter().all(is_round), "{ticks:?}");
        assert!(Axis::of(Vec::new(), 0, 100).is_none());
    }
}
