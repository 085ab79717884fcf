//! Small pieces of SQL that the reader, the writer and the memory share: sequence numbers,
//! integers and the length of a text. Queries about one subject do not belong here.

use rusqlite::{Connection, OptionalExtension as _, Row};

/// SQLite's integers are signed; no counter of ours gets that far.
pub(super) fn sql_integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The newest sequence number ever given, even if its record is gone.
pub(super) fn newest_seq(connection: &Connection) -> rusqlite::Result<u64> {
    let newest: Option<i64> = connection
        .prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'record'")?
        .query_row([], |row| row.get(0))
        .optional()?;
    Ok(newest.and_then(|seq| u64::try_from(seq).ok()).unwrap_or(0))
}

/// The length of the text in a column, in bytes.
pub(super) fn length(row: &Row<'_>, column: usize) -> rusqlite::Result<usize> {
    Ok(row.get_ref(column)?.as_str()?.len())
}
