//! Pages of a list: where one begins, and how long it may be.
//!
//! The history owns the meaning of a token; here it is only text.

use tonic::Status;

use crate::history::BadPageToken;

/// The longest page, and the usual one.
const PAGE: usize = 1000;

/// Where a page begins; `None` without a token: at the beginning.
pub(super) fn page_token<T>(token: &str) -> Result<Option<T>, Status>
where
    T: std::str::FromStr<Err = BadPageToken>,
{
    if token.is_empty() {
        return Ok(None);
    }
    let malformed = |err: BadPageToken| Status::invalid_argument(err.to_string());
    token.parse().map(Some).map_err(malformed)
}

/// The token of the next page; empty after the last one.
pub(super) fn next_page_token<T: ToString>(next: Option<T>) -> String {
    next.map(|token| token.to_string()).unwrap_or_default()
}

/// How many items a page may have; 0 stands for the usual number.
pub(super) fn page_limit(wanted: u32) -> usize {
    match wanted {
        0 => PAGE,
        size => usize::try_from(size).unwrap_or(PAGE).min(PAGE),
    }
}
