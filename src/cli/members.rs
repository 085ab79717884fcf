//! `driftd members`: lists the files that an aggregated finding stands for.
//!
//! Owns the columns of a member. Talks to the daemon or to a history.

use super::client::{Client, Server, explain, talk};
use super::exit::Exit;
use super::output::{Field, Listed, Listing, Printer, Style, age, short, time};
use super::pages::{fetch_pages, page};
use crate::api::{convert, proto};
use crate::model::Member;

#[derive(Debug, clap::Args)]
pub(super) struct Members {
    /// A finding's ID, or the beginning of it
    finding: String,
    #[command(flatten)]
    listing: Listing,
    /// Print at most this many, sorted by path (0: all)
    #[arg(long, value_name = "NUMBER")]
    limit: Option<usize>,
}

impl Members {
    pub(super) fn run(self, server: Server<'_>) -> anyhow::Result<Exit> {
        talk(server, |client| self.print(client))
    }

    /// Prints each page as it comes.
    async fn print(self, mut client: Client) -> anyhow::Result<Exit> {
        let limit = self.limit.filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        let mut printer = Printer::new(&self.listing);
        let mut finding = self.finding;
        let fetch = async |page_size, page_token| {
            let request =
                proto::ListMembersRequest { finding: finding.clone(), page_size, page_token };
            let found = client.list_members(request).await.map_err(explain)?.into_inner();
            // From now on the whole ID: a later finding may have an ID that begins alike.
            finding = found.finding;
            page(found.members, found.next_page_token, convert::member_from_proto)
        };
        fetch_pages(String::new(), limit, fetch, |members: Vec<Member>| printer.page(&members))
            .await?;
        let printed = printer.printed;
        printer.end::<Member>()?;
        let id = short(&finding);
        let note = format!("this finding is about one thing only (see: driftd show {id})");
        self.listing.note_if_empty(printed, &note);
        Ok(Exit::Clean)
    }
}

impl Listed for Member {
    type Json<'a> = &'a Member;

    fn json(&self) -> &Member {
        self
    }

    fn name(&self) -> String {
        self.path.to_string()
    }

    fn header(wide: bool) -> Vec<&'static str> {
        let mut header = vec!["PATH", "KIND", "STATE", "LAST SEEN"];
        if wide {
            header.extend(["FIRST SEEN", "BLAKE3"]);
        }
        header
    }

    fn row(&self, style: &Style) -> Vec<Field> {
        let mut row: Vec<Field> = vec![
            self.path.to_string().into(),
            self.kind.name().into(),
            if self.removed { "gone" } else { "there" }.into(),
            age(style.now, self.last_seen).into(),
        ];
        if style.wide {
            let blake3 = self.blake3.map(|hash| style.id(&hash.to_string()));
            row.extend([time(self.first_seen).into(), blake3.unwrap_or_default().into()]);
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::output::table;
    use crate::model::finding::MEMBER_SCHEMA;
    use crate::model::{Blake3Hash, Kind, RootfsPath};

    #[test]
    fn members_as_people_see_them() {
        let now = "2026-11-20T10:08:30Z".parse().unwrap();
        let member = |path: &[u8], removed| Member {
            schema: MEMBER_SCHEMA.to_owned(),
            path: RootfsPath::new(path).unwrap(),
            kind: Kind::FileAdded,
            blake3: Some(Blake3Hash([0xab; 32])),
            first_seen: "2026-11-20T10:08:00Z".parse().unwrap(),
            last_seen: "2026-11-20T10:08:20Z".parse().unwrap(),
            removed,
        };
        let members = [member(b"/tmp/a", false), member(b"/tmp/\x1b[2J\xff", true)];
        let style = |wide| Style { wide, no_trunc: false, colour: false, width: None, now };
        assert_eq!(
            table(&members, &style(true)),
            "PATH                KIND        STATE  LAST SEEN  FIRST SEEN               BLAKE3\n\
             /tmp/a              file.added  there  10s ago    2026-11-20 10:08:00 UTC  abababababab\n\
             /tmp/\\u{1b}[2J\\xff  file.added  gone   10s ago    2026-11-20 10:08:00 UTC  abababababab\n"
        );
        let json = serde_json::to_value(members[1].json()).unwrap();
        assert_eq!(json["path"], "/tmp/\\u{1b}[2J\\xff");
        assert_eq!(json["path_bytes"], "L3RtcC8bWzJK/w==");
    }
}
