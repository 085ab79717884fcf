//! Reads the history, on read-only connections of its own: no reader ever waits for the
//! writer, nor the writer for a reader.
//!
//! [`Reader`] has its queries in files by subject: `findings`, `members`, `sessions`,
//! `responses`, `containers`, `timeline`, and `follow` for the records after a cursor. `query`
//! holds what they share, `filter` turns a request's filter into SQL, `pages` holds pages and
//! their tokens.

mod connection;
mod containers;
mod filter;
mod findings;
mod follow;
mod members;
mod pages;
mod query;
mod responses;
mod sessions;
mod timeline;

pub use connection::Reader;
pub use filter::{Content, Filter, SessionFilter};
pub use pages::{
    AlsoIn, BadPageToken, CommandToken, CommandsPage, FindingLookup, FindingsPage, Followed,
    Lookup, MemberToken, MembersPage, PageToken, ProbeLookup, RuleHits, SessionLookup,
    SessionsPage, Stored,
};
pub use timeline::{Happened, TimelineEntry, TimelinePage, TimelineToken};
