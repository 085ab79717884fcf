//! The history: what happened on this node, in SQLite.
//!
//! One thread owns the only connection that writes. Records come in through a bounded
//! channel and are committed in groups. Pages and followers receive a record only after
//! its commit: what they have shown survives a `kill -9` and a loss of power.
//!
//! ```text
//! pipeline ─ Record ─> writer ─ commit ─> history.db <─ Reader (read-only connections)
//!                         └──── newest sequence number ──> followers
//! ```
//!
//! docs/history-format.md describes the file's format, so that it can be read with
//! `sqlite3` and without driftd. The history decides nothing: the pipeline hands it finished
//! records, `api` and `journal` read them.

mod error;
mod files;
mod json;
mod memory;
mod open;
mod reader;
mod record;
mod schema;
mod sql;
mod writer;

pub use error::{Error, is_of_the_disk};
pub use files::{FILE, format_of};
pub use json::FindingText;
pub use open::History;
pub use reader::{
    AlsoIn, BadPageToken, CommandToken, CommandsPage, Content, Filter, FindingLookup, FindingsPage,
    Followed, Happened, Lookup, MemberToken, MembersPage, PageToken, ProbeLookup, Reader, RuleHits,
    SessionFilter, SessionLookup, SessionsPage, Stored, TimelineEntry, TimelinePage, TimelineToken,
};
pub use record::{MemberChange, Record};
pub use schema::FORMAT;
pub use writer::{Keep, Writer};
