//! Points in time as people write them, and the time zone in which times are shown.
//!
//! The zone is UTC unless the command line sets the local one. It never changes after that.

use std::str::FromStr;
use std::sync::OnceLock;

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Span, Timestamp, ToSpan as _};

/// The zone of times that are written without one; UTC if it is not set.
static ZONE: OnceLock<TimeZone> = OnceLock::new();

/// Shows and reads times in the time zone of this machine from now on.
pub(super) fn use_local_time() {
    // Fails only if it is set already.
    let _ = ZONE.set(TimeZone::system());
}

pub(super) fn zone() -> TimeZone {
    ZONE.get().cloned().unwrap_or(TimeZone::UTC)
}

/// A point in time as it was written. What it means depends on the zone and on the time now.
#[derive(Clone, Debug)]
pub(super) enum When {
    At(Timestamp),
    /// This long before now.
    Before(Span),
    Now,
    /// The beginning of the day this many days ago.
    DaysAgo(i64),
    Civil(DateTime),
    /// The last time at which a clock showed this.
    Clock(Time),
}

/// Examples of what is accepted, for errors.
pub(super) const EXAMPLES: &str =
    "2h, yesterday, 2026-11-27, 14:30, `2026-11-27 14:30` or 2026-11-27T14:30:00Z";

/// Reads a point in time from the command line.
pub(super) fn parse(text: &str) -> Result<When, String> {
    let text = text.trim();
    let lower = text.to_ascii_lowercase();
    let plain = |error: jiff::Error| error.to_string();
    match lower.as_str() {
        "now" => return Ok(When::Now),
        "today" => return Ok(When::DaysAgo(0)),
        "yesterday" => return Ok(When::DaysAgo(1)),
        _ => (),
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(When::At(time));
    }
    // Unix time, as other programs print it.
    if let Some(seconds) = text.strip_prefix('@') {
        let seconds = seconds.parse().map_err(|_| format!("`{text}` is no Unix time"))?;
        return Timestamp::from_second(seconds).map(When::At).map_err(plain);
    }
    if text.contains(':') || (text.contains('-') && !text.starts_with('-')) {
        if let Ok(time) = Time::from_str(text) {
            return Ok(When::Clock(time));
        }
        if let Ok(time) = DateTime::from_str(text) {
            return Ok(When::Civil(time));
        }
        if let Ok(date) = Date::from_str(text) {
            return Ok(When::Civil(date.into()));
        }
    }
    let span = Span::from_str(text).map_err(|_| format!("no time such as {EXAMPLES}"))?;
    if span.is_zero() {
        return Ok(When::Now);
    }
    // `2h`, `-2h` and `2h ago` are the same.
    Ok(When::Before(span.abs()))
}

impl When {
    pub(super) fn timestamp(&self) -> Result<Timestamp, String> {
        self.at(Timestamp::now(), &zone())
    }

    fn at(&self, now: Timestamp, zone: &TimeZone) -> Result<Timestamp, String> {
        let here = now.to_zoned(zone.clone());
        let zoned = match self {
            When::At(time) => return Ok(*time),
            When::Now => return Ok(now),
            When::Before(span) => here.checked_sub(*span),
            When::DaysAgo(days) => here.checked_sub(days.days()).and_then(|day| day.start_of_day()),
            When::Civil(time) => time.to_zoned(zone.clone()),
            When::Clock(time) => {
                let today = here.date().to_datetime(*time).to_zoned(zone.clone());
                match today {
                    Ok(today) if today.timestamp() > now => here
                        .date()
                        .yesterday()
                        .and_then(|day| day.to_datetime(*time).to_zoned(zone.clone())),
                    other => other,
                }
            }
        };
        zoned.map(|zoned| zoned.timestamp()).map_err(|err| format!("no time: {err}"))
    }
}

/// An optional time in the form of the proto.
pub(super) fn to_proto(when: Option<&When>) -> anyhow::Result<Option<prost_types::Timestamp>> {
    when.map(|when| when.timestamp().map(crate::api::convert::time_to_proto))
        .transpose()
        .map_err(anyhow::Error::msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn u14_times_are_read_as_people_write_them() {
        let now: Timestamp = "2026-11-28T10:15:00Z".parse().unwrap();
        let at = |text: &str, zone: &TimeZone| {
            let when = parse(text).unwrap_or_else(|err| panic!("{text}: {err}"));
            when.at(now, zone).unwrap().to_string()
        };
        for (text, expected) in [
            ("2h", "2026-11-28T08:15:00Z"),
            ("2h ago", "2026-11-28T08:15:00Z"),
            ("-2h", "2026-11-28T08:15:00Z"),
            ("2 hours", "2026-11-28T08:15:00Z"),
            ("1h 30m", "2026-11-28T08:45:00Z"),
            ("1h30m", "2026-11-28T08:45:00Z"),
            ("3d", "2026-11-25T10:15:00Z"),
            ("2w", "2026-11-14T10:15:00Z"),
            ("now", "2026-11-28T10:15:00Z"),
            ("Yesterday", "2026-11-27T00:00:00Z"),
            ("today", "2026-11-28T00:00:00Z"),
            ("2026-11-27", "2026-11-27T00:00:00Z"),
            ("2026-11-27 14:30", "2026-11-27T14:30:00Z"),
            ("2026-11-27T14:30", "2026-11-27T14:30:00Z"),
            ("2026-11-27 14:30:05", "2026-11-27T14:30:05Z"),
            ("2026-11-27T14:30:00+02:00", "2026-11-27T12:30:00Z"),
            ("2026-11-27 14:30:00Z", "2026-11-27T14:30:00Z"),
            ("09:30", "2026-11-28T09:30:00Z"),
            ("14:30", "2026-11-27T14:30:00Z"),
            ("14:30:10", "2026-11-27T14:30:10Z"),
            ("@1000", "1970-01-01T00:16:40Z"),
        ] {
            assert_eq!(at(text, &TimeZone::UTC), expected, "{text}");
        }
        let east = TimeZone::fixed(jiff::tz::offset(2));
        for (text, expected) in [
            ("2h", "2026-11-28T08:15:00Z"),
            ("yesterday", "2026-11-26T22:00:00Z"),
            ("2026-11-27 14:30", "2026-11-27T12:30:00Z"),
            ("12:00", "2026-11-28T10:00:00Z"),
            ("12:30", "2026-11-27T10:30:00Z"),
            ("2026-11-27T14:30:00Z", "2026-11-27T14:30:00Z"),
        ] {
            assert_eq!(at(text, &east), expected, "{text}");
        }
        for text in ["soon", "", "2", "25:00", "2026-13-01", "@x", "2 parsecs"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse("soon").is_err_and(|err| err.contains("2h") && err.contains("yesterday")));
    }
}
