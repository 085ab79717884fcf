//! Members: the files that an aggregated finding stands for.
//!
//! Only reads. The pipeline reads them when a container appears, `api` reads pages of them.

use std::path::Path;

use jiff::Timestamp;
use rusqlite::{Row, params};

use super::connection::Reader;
use super::pages::{MemberToken, MembersPage, PAGE_BYTES};
use crate::history::error::Error;
use crate::model::finding::MEMBER_SCHEMA;
use crate::model::{FindingId, Member, RootfsPath};

impl Reader {
    /// Calls `each` with every member of a finding.
    pub fn each_member(
        &self,
        finding: FindingId,
        mut each: impl FnMut(Member),
    ) -> Result<(), Error> {
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!("SELECT {MEMBER} FROM member WHERE finding = ?"))
                .map_err(&failed)?;
            let mut rows = query.query([finding.to_string()]).map_err(&failed)?;
            while let Some(row) = rows.next().map_err(&failed)? {
                each(member(row, &self.path)?);
            }
            Ok(())
        })
    }

    /// One page of at most `limit` members of a finding; fewer if their paths are long.
    pub fn members(
        &self,
        finding: FindingId,
        after: Option<MemberToken>,
        limit: usize,
    ) -> Result<MembersPage, Error> {
        let after = after.map_or(Vec::new(), |token| token.0.as_bytes().to_vec());
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!(
                    "SELECT {MEMBER} FROM member WHERE finding = ? AND path > ?
                     ORDER BY path LIMIT ?"
                ))
                .map_err(&failed)?;
            let most = i64::try_from(limit.saturating_add(1)).unwrap_or(i64::MAX);
            let mut rows =
                query.query(params![finding.to_string(), after, most]).map_err(&failed)?;
            let mut members: Vec<Member> = Vec::new();
            let mut bytes = 0;
            while let Some(row) = rows.next().map_err(&failed)? {
                if members.len() == limit || bytes > PAGE_BYTES {
                    let next = members.last().map(|last| MemberToken(last.path.clone()));
                    return Ok(MembersPage { members, next });
                }
                let member = member(row, &self.path)?;
                bytes += member.path.as_bytes().len() + 128;
                members.push(member);
            }
            Ok(MembersPage { members, next: None })
        })
    }
}

/// The columns that [`member`] reads, from the first on.
const MEMBER: &str = "path, kind, blake3, first_seen, last_seen, removed";

fn member(row: &Row<'_>, path: &Path) -> Result<Member, Error> {
    let failed = Error::sql("read", path);
    let corrupt =
        |what: &str| Error::Corrupt { path: path.into(), detail: format!("a member's {what}") };
    let time = |column| -> Result<Timestamp, Error> {
        Timestamp::from_microsecond(row.get(column).map_err(&failed)?).map_err(|_| corrupt("time"))
    };
    let kind: String = row.get(1).map_err(&failed)?;
    let blake3: Option<String> = row.get(2).map_err(&failed)?;
    Ok(Member {
        schema: MEMBER_SCHEMA.to_owned(),
        path: RootfsPath::new(row.get::<_, Vec<u8>>(0).map_err(&failed)?)
            .map_err(|_| corrupt("path"))?,
        kind: kind.parse().map_err(|_| corrupt("kind"))?,
        blake3: blake3.map(|hash| hash.parse()).transpose().map_err(|_| corrupt("content"))?,
        first_seen: time(3)?,
        last_seen: time(4)?,
        removed: row.get(5).map_err(&failed)?,
    })
}
