//! Follows the history of the daemon: `--follow` of findings and sessions.
//!
//! Owns the connection that is made again when the daemon restarts, and how gaps are printed.

use std::str::FromStr;
use std::time::Duration;

use serde::Serialize;

use super::client::{Server, connect, explain, is_final, talk};
use super::exit::Exit;
use super::gap::gap_json;
use super::output::{Format, Listing, json_line, safe, write, yaml};
use crate::api::proto;
use crate::api::proto::follow_findings_response::Event;

/// Where following begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    Cursor(u64),
    /// Only what is recorded from now on.
    Latest,
}

impl FromStr for After {
    type Err = String;

    fn from_str(text: &str) -> Result<After, String> {
        match text {
            text if text.eq_ignore_ascii_case("latest") => Ok(After::Latest),
            text => text
                .parse()
                .map(After::Cursor)
                .map_err(|_| "neither a cursor, a whole number, nor `latest`".to_owned()),
        }
    }
}

impl After {
    pub(super) fn to_proto(self) -> Option<u64> {
        match self {
            After::Cursor(cursor) => Some(cursor),
            After::Latest => None,
        }
    }
}

/// Prints why the format cannot be used with `--follow`, if it cannot.
pub(super) fn refuse(listing: &Listing) -> Option<Exit> {
    if listing.output.is_endless() {
        return None;
    }
    eprintln!("error: a stream never ends: use -o jsonl with --follow");
    Some(Exit::Usage)
}

/// How long a follower waits before it connects again.
const RECONNECT: Duration = Duration::from_millis(250);

/// Follows the history and calls `each` with every event and its cursor. When the daemon
/// stops, waits for it and goes on after the last cursor. Ends with an error only.
pub(super) fn follow(
    server: Server<'_>,
    mut request: proto::FollowFindingsRequest,
    mut each: impl FnMut(u64, Event) -> anyhow::Result<()>,
) -> anyhow::Result<Exit> {
    talk(server, |client| async move {
        let mut stream = client.clone().follow_findings(request.clone()).await.map_err(explain)?;
        loop {
            let stopped = loop {
                match stream.get_mut().message().await {
                    Ok(Some(message)) => {
                        // Also back to 0, if the history was replaced.
                        request.after_cursor = Some(message.cursor);
                        match message.event {
                            Some(event) => each(message.cursor, event)?,
                            // The first message, if the request had no cursor.
                            None => eprintln!("following what comes after {}", message.cursor),
                        }
                    }
                    Ok(None) => break "it has ended the stream".to_owned(),
                    Err(status) if is_final(&status) => return Err(explain(status)),
                    Err(status) => break safe(status.message()),
                }
            };
            let cursor = request.after_cursor;
            eprintln!(
                "driftd has stopped ({stopped}); waiting for it{}",
                cursor.map(|cursor| format!(", to go on after {cursor}")).unwrap_or_default()
            );
            stream = loop {
                tokio::time::sleep(RECONNECT).await;
                let Ok(mut client) = connect(server).await else { continue };
                match client.follow_findings(request.clone()).await {
                    Ok(stream) => break stream,
                    Err(status) if is_final(&status) => return Err(explain(status)),
                    // It may not know its containers yet.
                    Err(_) => (),
                }
            };
            eprintln!("driftd is back");
        }
    })
}

/// An event of a followed history, with the cursor to resume with.
#[derive(Serialize)]
struct Followed<'a, T> {
    #[serde(flatten)]
    event: &'a T,
    /// A value for `--after`: everything up to here was printed.
    cursor: u64,
}

/// Prints one finding or session. `line` is its text for people.
pub(super) fn print<T: Serialize>(
    event: &T,
    id: &str,
    cursor: u64,
    listing: &Listing,
    line: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = match listing.output {
        _ if listing.quiet => format!("{id}\n"),
        Format::Table | Format::Wide => line(),
        format => in_format(event, cursor, format)?,
    };
    write(text.as_bytes())?;
    Ok(())
}

fn in_format<T: Serialize>(event: &T, cursor: u64, format: Format) -> anyhow::Result<String> {
    let followed = Followed { event, cursor };
    match format {
        Format::Yaml => Ok(format!("---\n{}", yaml(&followed)?)),
        _ => json_line(&followed),
    }
}

/// Prints that records are missing here: for programs in the stream, for people on stderr.
pub(super) fn print_gap(gap: &proto::Gap, cursor: u64, listing: &Listing) -> anyhow::Result<()> {
    if !listing.output.is_for_people() && !listing.quiet {
        write(in_format(&gap_json(gap)?, cursor, listing.output)?.as_bytes())?;
    }
    eprintln!(
        "gap{}: {}{}: {}",
        if gap.until.is_some() { " over" } else { "" },
        safe(&gap.name),
        match gap.container.as_str() {
            "" => String::new(),
            id => format!(" in {}/{}", safe(&gap.namespace), safe(id)),
        },
        safe(&gap.detail)
    );
    Ok(())
}
