//! Writes findings and their members.
//!
//! Only the newest revision of a finding is kept, and one record that refers to it.

use rusqlite::{Connection, params};

use super::row::{Row, store_labels};
use crate::history::record::MemberChange;
use crate::history::sql::sql_integer;
use crate::model::{Finding, FindingId};

pub(super) fn store_finding(
    connection: &Connection,
    finding: &Finding,
    text: &str,
) -> rusqlite::Result<()> {
    let id = finding.id.to_string();
    let container = finding.container_id();
    let evidence = finding.container.as_ref();
    let labels = evidence.map(|one| store_labels(connection, one)).transpose()?.flatten();
    connection
        .prepare_cached(
            "INSERT INTO finding (id, revision, namespace, container, image,
                 manifest_digest, kind, severity, first_seen, last_seen, count, json,
                 labels)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)
             ON CONFLICT (id) DO UPDATE SET
                 revision = excluded.revision, image = excluded.image,
                 manifest_digest = excluded.manifest_digest,
                 severity = excluded.severity, first_seen = excluded.first_seen,
                 last_seen = excluded.last_seen, count = excluded.count,
                 json = excluded.json, labels = excluded.labels",
        )?
        .execute(params![
            id,
            sql_integer(finding.revision),
            container.map(|container| &container.namespace),
            container.map(|container| &container.id),
            finding.image.name,
            finding.image.manifest_digest.map(|digest| digest.to_string()),
            finding.kind.name(),
            finding.severity as i64 + 1,
            finding.first_seen.as_microsecond(),
            finding.last_seen.as_microsecond(),
            sql_integer(finding.count),
            text,
            labels,
        ])?;
    connection
        .prepare_cached("DELETE FROM record WHERE type = 'finding' AND finding = ?1")?
        .execute([&id])?;
    let row = Row { finding: Some(&id), container, ..Row::of("finding", finding.last_seen) };
    row.insert(connection)
}

pub(super) fn store_member(
    connection: &Connection,
    finding: FindingId,
    change: &MemberChange,
) -> rusqlite::Result<()> {
    let finding = finding.to_string();
    match change {
        MemberChange::Seen(member) => connection
            .prepare_cached(
                "INSERT INTO member (finding, path, kind, blake3, first_seen, last_seen, removed)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (finding, path) DO UPDATE SET
                     kind = excluded.kind, blake3 = excluded.blake3,
                     last_seen = excluded.last_seen, removed = excluded.removed",
            )?
            .execute(params![
                finding,
                member.path.as_bytes(),
                member.kind.name(),
                member.blake3.map(|hash| hash.to_string()),
                member.first_seen.as_microsecond(),
                member.last_seen.as_microsecond(),
                member.removed,
            ])?,
        MemberChange::Gone { path, at } => {
            let is_over_disk = connection.db_name(2).is_ok_and(|name| name == "disk");
            if is_over_disk {
                connection
                    .prepare_cached(
                        "INSERT OR IGNORE INTO main.member
                         SELECT * FROM disk.member WHERE finding = ?1 AND path = ?2",
                    )?
                    .execute(params![finding, path.as_bytes()])?;
            }
            connection.prepare_cached(
                "UPDATE member SET removed = 1, last_seen = ?3 WHERE finding = ?1 AND path = ?2",
            )?
            .execute(params![finding, path.as_bytes(), at.as_microsecond()])?
        }
    };
    Ok(())
}
