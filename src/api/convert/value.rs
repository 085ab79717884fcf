//! The small values that every message is made of: times, texts, names.
//!
//! Owns [`Malformed`], the error of all conversions from proto.

use std::time::Duration;

use jiff::Timestamp;

use crate::model::ContainerId;

/// A message that this version of driftd cannot read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` is missing or not understood{detail} (is the other side another version?)")]
pub struct Malformed {
    field: &'static str,
    detail: String,
}

pub(super) fn missing(field: &'static str) -> Malformed {
    Malformed { field, detail: String::new() }
}

pub(super) fn malformed<E: std::fmt::Display>(field: &'static str) -> impl Fn(E) -> Malformed {
    move |err| Malformed { field, detail: format!(": {err}") }
}

pub fn time_to_proto(time: Timestamp) -> prost_types::Timestamp {
    let nanoseconds = time.as_nanosecond();
    // Both quotient and remainder fit: jiff's times end in the year 9999.
    prost_types::Timestamp {
        seconds: i64::try_from(nanoseconds.div_euclid(1_000_000_000)).unwrap_or(i64::MAX),
        nanos: i32::try_from(nanoseconds.rem_euclid(1_000_000_000)).unwrap_or(0),
    }
}

pub fn time_from_proto(
    field: &'static str,
    time: Option<prost_types::Timestamp>,
) -> Result<Timestamp, Malformed> {
    let time = time.ok_or_else(|| missing(field))?;
    Timestamp::new(time.seconds, time.nanos).map_err(malformed(field))
}

pub fn optional_time_from_proto(
    field: &'static str,
    time: Option<prost_types::Timestamp>,
) -> Result<Option<Timestamp>, Malformed> {
    match time {
        None => Ok(None),
        some => time_from_proto(field, some).map(Some),
    }
}

/// The value that has this name.
pub(super) fn named<T: Copy>(all: &[T], name: fn(T) -> &'static str, wanted: &str) -> Option<T> {
    all.iter().copied().find(|one| name(*one) == wanted)
}

/// A container's namespace and ID; both empty for none.
pub(super) fn names(container: Option<ContainerId>) -> (String, String) {
    container.map(|id| (id.namespace.to_string(), id.id.to_string())).unwrap_or_default()
}

pub(super) fn parsed<T>(field: &'static str, text: Option<String>) -> Result<Option<T>, Malformed>
where
    T: std::str::FromStr,
    T::Err: std::fmt::Display,
{
    text.map(|text| text.parse().map_err(malformed(field))).transpose()
}

/// `None` for empty text: in proto, a name that is absent is empty.
pub(super) fn filled(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// A count, or the largest that fits.
pub(crate) fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A time span in milliseconds, or the longest that fits.
pub(super) fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
