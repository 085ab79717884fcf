//! The tables, and the migrations from older formats.
//!
//! A migration that was released never changes. The writer prepares its connection here; no
//! other file creates a table.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;

use super::error::Error;

/// The newest format this driftd writes and reads.
pub const FORMAT: i64 = MIGRATIONS.len() as i64;

/// `PRAGMA application_id`: "drft".
const APPLICATION_ID: i64 = 0x6472_6674;

/// The SQL that leads from format N to N + 1. An entry that was released never changes.
const MIGRATIONS: &[&str] = &[
    "
    CREATE TABLE finding (
        id              TEXT PRIMARY KEY,
        revision        INTEGER NOT NULL,
        namespace       TEXT NOT NULL,
        container       TEXT NOT NULL,
        image           TEXT,
        manifest_digest TEXT,
        kind            TEXT NOT NULL,
        severity        INTEGER NOT NULL CHECK (severity BETWEEN 1 AND 5),
        first_seen      INTEGER NOT NULL,
        last_seen       INTEGER NOT NULL,
        count           INTEGER NOT NULL,
        json            TEXT NOT NULL CHECK (json_valid(json))
    ) STRICT;
    -- Each ends with what else is filtered by, so that rows that do not match are
    -- not read: they are large.
    CREATE INDEX finding_by_time ON finding
        (last_seen, id, first_seen, severity, kind);
    CREATE INDEX finding_by_container ON finding
        (container, namespace, last_seen, id, first_seen, severity, kind);
    CREATE INDEX finding_by_kind ON finding
        (kind, last_seen, id, first_seen);
    CREATE INDEX finding_by_image ON finding
        (image, last_seen, id, first_seen, severity, kind);
    CREATE INDEX finding_by_digest ON finding
        (manifest_digest, last_seen, id, first_seen, severity, kind);

    CREATE TABLE record (
        seq       INTEGER PRIMARY KEY AUTOINCREMENT,
        at        INTEGER NOT NULL,
        type      TEXT NOT NULL CHECK (type IN ('finding', 'response', 'gap')),
        finding   TEXT,
        namespace TEXT,
        container TEXT,
        json      TEXT CHECK (json IS NULL OR json_valid(json)),
        CHECK ((type = 'finding') = (json IS NULL)),
        CHECK (type <> 'finding' OR finding IS NOT NULL)
    ) STRICT;
    CREATE UNIQUE INDEX record_of_finding   ON record (finding) WHERE type = 'finding';
    CREATE        INDEX record_of_response  ON record (container, namespace, seq)
                                               WHERE type = 'response';
    CREATE        INDEX record_by_time      ON record (at);

    CREATE TABLE pruned (
        one     INTEGER PRIMARY KEY CHECK (one = 1),
        through INTEGER NOT NULL
    ) STRICT;
    INSERT INTO pruned VALUES (1, 0);

    CREATE VIEW timeline AS
        SELECT record.seq,
               strftime('%Y-%m-%dT%H:%M:%fZ', record.at / 1e6, 'unixepoch') AS at,
               record.type, record.namespace, record.container,
               finding.kind, finding.severity, record.finding,
               coalesce(record.json, finding.json) AS json
        FROM record
        LEFT JOIN finding ON finding.id = record.finding AND record.type = 'finding';
",
    "
    -- A finding may be about a layer on disk, and so of no container.
    DROP VIEW timeline;
    CREATE TABLE finding_2 (
        id              TEXT PRIMARY KEY,
        revision        INTEGER NOT NULL,
        namespace       TEXT,
        container       TEXT,
        image           TEXT,
        manifest_digest TEXT,
        kind            TEXT NOT NULL,
        severity        INTEGER NOT NULL CHECK (severity BETWEEN 1 AND 5),
        first_seen      INTEGER NOT NULL,
        last_seen       INTEGER NOT NULL,
        count           INTEGER NOT NULL,
        json            TEXT NOT NULL CHECK (json_valid(json)),
        CHECK ((namespace IS NULL) = (container IS NULL))
    ) STRICT;
    INSERT INTO finding_2 SELECT
        id, revision, namespace, container, image, manifest_digest, kind, severity,
        first_seen, last_seen, count, json
        FROM finding;
    DROP TABLE finding;
    ALTER TABLE finding_2 RENAME TO finding;
    -- Each ends with what else is filtered by, so that rows that do not match are
    -- not read: they are large.
    CREATE INDEX finding_by_time ON finding
        (last_seen, id, first_seen, severity, kind);
    CREATE INDEX finding_by_container ON finding
        (container, namespace, last_seen, id, first_seen, severity, kind);
    CREATE INDEX finding_by_kind ON finding
        (kind, last_seen, id, first_seen);
    CREATE INDEX finding_by_image ON finding
        (image, last_seen, id, first_seen, severity, kind);
    CREATE INDEX finding_by_digest ON finding
        (manifest_digest, last_seen, id, first_seen, severity, kind);

    CREATE VIEW timeline AS
        SELECT record.seq,
               strftime('%Y-%m-%dT%H:%M:%fZ', record.at / 1e6, 'unixepoch') AS at,
               record.type, record.namespace, record.container,
               finding.kind, finding.severity, record.finding,
               coalesce(record.json, finding.json) AS json
        FROM record
        LEFT JOIN finding ON finding.id = record.finding AND record.type = 'finding';
",
    "
    -- The files that an aggregated finding stands for.
    CREATE TABLE member (
        finding    TEXT NOT NULL,
        path       BLOB NOT NULL,
        kind       TEXT NOT NULL,
        blake3     TEXT,
        first_seen INTEGER NOT NULL,
        last_seen  INTEGER NOT NULL,
        removed    INTEGER NOT NULL CHECK (removed IN (0, 1)),
        PRIMARY KEY (finding, path)
    ) STRICT, WITHOUT ROWID;
",
    "
    -- Sessions in containers, what was run in them, and what runs again and again.
    CREATE TABLE session (
        id         TEXT PRIMARY KEY,
        revision   INTEGER NOT NULL,
        namespace  TEXT NOT NULL,
        container  TEXT NOT NULL,
        state      TEXT NOT NULL CHECK (state IN ('open', 'closed')),
        started_at INTEGER NOT NULL,
        ended_at   INTEGER,
        changed_at INTEGER NOT NULL,
        json       TEXT NOT NULL CHECK (json_valid(json))
    ) STRICT;
    CREATE INDEX session_by_time ON session
        (started_at, id, state, coalesce(ended_at, changed_at));
    CREATE INDEX session_by_container ON session
        (container, namespace, started_at, id, state, coalesce(ended_at, changed_at));
    CREATE INDEX session_by_end ON session
        (container, namespace, coalesce(ended_at, changed_at), id) WHERE state = 'closed';
    CREATE INDEX session_open ON session (started_at, id) WHERE state = 'open';

    CREATE TABLE command (
        session    TEXT NOT NULL,
        number     INTEGER NOT NULL,
        namespace  TEXT NOT NULL,
        container  TEXT NOT NULL,
        started_at INTEGER NOT NULL,
        json       TEXT NOT NULL CHECK (json_valid(json)),
        PRIMARY KEY (session, number)
    ) STRICT;
    CREATE INDEX command_by_container ON command
        (container, namespace, started_at, session, number);

    CREATE TABLE probe (
        id         TEXT PRIMARY KEY,
        namespace  TEXT NOT NULL,
        container  TEXT NOT NULL,
        last_seen  INTEGER NOT NULL,
        json       TEXT NOT NULL CHECK (json_valid(json))
    ) STRICT;
    CREATE INDEX probe_by_time      ON probe (last_seen, id);
    CREATE INDEX probe_by_container ON probe (container, namespace, last_seen, id);

    -- A container's timeline is in the order in which things were first seen.
    CREATE INDEX finding_by_first_seen ON finding (container, namespace, first_seen, id);

    -- Followers receive sessions too: a record may be one.
    DROP VIEW timeline;
    CREATE TABLE record_4 (
        seq       INTEGER PRIMARY KEY AUTOINCREMENT,
        at        INTEGER NOT NULL,
        type      TEXT NOT NULL CHECK (type IN ('finding', 'session', 'response', 'gap')),
        finding   TEXT,
        session   TEXT,
        namespace TEXT,
        container TEXT,
        json      TEXT CHECK (json IS NULL OR json_valid(json)),
        CHECK ((type IN ('finding', 'session')) = (json IS NULL)),
        CHECK (type <> 'finding' OR finding IS NOT NULL),
        CHECK ((type = 'session') = (session IS NOT NULL))
    ) STRICT;
    INSERT INTO record_4 (seq, at, type, finding, namespace, container, json)
        SELECT seq, at, type, finding, namespace, container, json FROM record;
    -- A number that was given is never given again, though its record may be gone.
    DELETE FROM sqlite_sequence WHERE name = 'record_4';
    INSERT INTO sqlite_sequence SELECT 'record_4', seq FROM sqlite_sequence WHERE name = 'record';
    DROP TABLE record;
    ALTER TABLE record_4 RENAME TO record;
    CREATE UNIQUE INDEX record_of_finding   ON record (finding) WHERE type = 'finding';
    CREATE UNIQUE INDEX record_of_session   ON record (session) WHERE type = 'session';
    CREATE        INDEX record_of_response  ON record (container, namespace, seq)
                                               WHERE type = 'response';
    CREATE        INDEX record_of_gap       ON record (at, seq) WHERE type = 'gap';
    CREATE        INDEX record_by_time      ON record (at);

    CREATE VIEW timeline AS
        SELECT record.seq,
               strftime('%Y-%m-%dT%H:%M:%fZ', record.at / 1e6, 'unixepoch') AS at,
               record.type, record.namespace, record.container,
               finding.kind, finding.severity, record.finding, record.session,
               coalesce(record.json, finding.json, session.json) AS json
        FROM record
        LEFT JOIN finding ON finding.id = record.finding AND record.type = 'finding'
        LEFT JOIN session ON session.id = record.session AND record.type = 'session';
",
    "
    -- A container's labels, once for all that names it. A row of an earlier format has
    -- them in its JSON, and no reference.
    CREATE TABLE labels (
        namespace TEXT NOT NULL,
        container TEXT NOT NULL,
        id        TEXT NOT NULL,
        json      TEXT NOT NULL CHECK (json_valid(json)),
        PRIMARY KEY (container, namespace, id)
    ) STRICT, WITHOUT ROWID;
    ALTER TABLE finding ADD COLUMN labels TEXT;
    ALTER TABLE session ADD COLUMN labels TEXT;
    ALTER TABLE probe   ADD COLUMN labels TEXT;

    -- What is dropped first when the history is full.
    CREATE INDEX finding_by_severity ON finding (container, namespace, severity, last_seen, id);

    -- About how many bytes each container's rows take. What is of no container counts
    -- under empty names.
    CREATE TABLE held (
        namespace TEXT NOT NULL,
        container TEXT NOT NULL,
        bytes     INTEGER NOT NULL,
        PRIMARY KEY (container, namespace)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX held_by_bytes ON held (bytes);
    INSERT INTO held SELECT namespace, container, sum(bytes) FROM (
        SELECT coalesce(namespace, '') AS namespace, coalesce(container, '') AS container,
               octet_length(json) + 512 AS bytes FROM finding
        UNION ALL
        SELECT namespace, container, octet_length(json) + 512 FROM session
        UNION ALL
        SELECT namespace, container, octet_length(json) + 256 FROM command
        UNION ALL
        SELECT coalesce(finding.namespace, ''), coalesce(finding.container, ''),
               octet_length(member.path) + 256
        FROM member JOIN finding ON finding.id = member.finding
        UNION ALL
        SELECT '', '', octet_length(json) + 128 FROM record WHERE type = 'gap'
    ) GROUP BY namespace, container;

    CREATE TRIGGER finding_added AFTER INSERT ON finding BEGIN
        INSERT INTO held VALUES (coalesce(new.namespace, ''), coalesce(new.container, ''),
                                 octet_length(new.json) + 512)
        ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes;
    END;
    CREATE TRIGGER finding_changed AFTER UPDATE OF json ON finding BEGIN
        UPDATE held SET bytes = bytes + octet_length(new.json) - octet_length(old.json)
        WHERE container = coalesce(new.container, '') AND namespace = coalesce(new.namespace, '');
    END;
    CREATE TRIGGER finding_dropped AFTER DELETE ON finding BEGIN
        UPDATE held SET bytes = bytes - octet_length(old.json) - 512
        WHERE container = coalesce(old.container, '') AND namespace = coalesce(old.namespace, '');
    END;
    CREATE TRIGGER session_added AFTER INSERT ON session BEGIN
        INSERT INTO held VALUES (new.namespace, new.container, octet_length(new.json) + 512)
        ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes;
    END;
    CREATE TRIGGER session_changed AFTER UPDATE OF json ON session BEGIN
        UPDATE held SET bytes = bytes + octet_length(new.json) - octet_length(old.json)
        WHERE container = new.container AND namespace = new.namespace;
    END;
    CREATE TRIGGER session_dropped AFTER DELETE ON session BEGIN
        UPDATE held SET bytes = bytes - octet_length(old.json) - 512
        WHERE container = old.container AND namespace = old.namespace;
    END;
    CREATE TRIGGER command_added AFTER INSERT ON command BEGIN
        INSERT INTO held VALUES (new.namespace, new.container, octet_length(new.json) + 256)
        ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes;
    END;
    CREATE TRIGGER command_changed AFTER UPDATE OF json ON command BEGIN
        UPDATE held SET bytes = bytes + octet_length(new.json) - octet_length(old.json)
        WHERE container = new.container AND namespace = new.namespace;
    END;
    CREATE TRIGGER command_dropped AFTER DELETE ON command BEGIN
        UPDATE held SET bytes = bytes - octet_length(old.json) - 256
        WHERE container = old.container AND namespace = old.namespace;
    END;
    CREATE TRIGGER member_added AFTER INSERT ON member BEGIN
        UPDATE held SET bytes = bytes + octet_length(new.path) + 256
        WHERE (container, namespace) = (SELECT coalesce(container, ''), coalesce(namespace, '')
                                        FROM finding WHERE id = new.finding);
    END;
    CREATE TRIGGER member_dropped AFTER DELETE ON member BEGIN
        UPDATE held SET bytes = bytes - octet_length(old.path) - 256
        WHERE (container, namespace) = (SELECT coalesce(container, ''), coalesce(namespace, '')
                                        FROM finding WHERE id = old.finding);
    END;
    CREATE TRIGGER gap_added AFTER INSERT ON record WHEN new.type = 'gap' BEGIN
        INSERT INTO held VALUES ('', '', octet_length(new.json) + 128)
        ON CONFLICT DO UPDATE SET bytes = bytes + excluded.bytes;
    END;
    CREATE TRIGGER gap_dropped AFTER DELETE ON record WHEN old.type = 'gap' BEGIN
        UPDATE held SET bytes = bytes - octet_length(old.json) - 128
        WHERE container = '' AND namespace = '';
    END;

    DROP VIEW timeline;
    CREATE VIEW timeline AS
        SELECT record.seq,
               strftime('%Y-%m-%dT%H:%M:%fZ', record.at / 1e6, 'unixepoch') AS at,
               record.type, record.namespace, record.container,
               finding.kind, finding.severity, record.finding, record.session,
               CASE WHEN labels.json IS NULL
                   THEN coalesce(record.json, finding.json, session.json)
                   ELSE json_set(coalesce(finding.json, session.json), '$.container.labels',
                                 json(labels.json))
               END AS json
        FROM record
        LEFT JOIN finding ON finding.id = record.finding AND record.type = 'finding'
        LEFT JOIN session ON session.id = record.session AND record.type = 'session'
        LEFT JOIN labels ON labels.container = record.container
            AND labels.namespace = record.namespace
            AND labels.id = coalesce(finding.labels, session.labels);
",
    "
    -- In which containers the same content was found.
    CREATE INDEX finding_by_content ON finding
        (json_extract(json, '$.file.blake3'), container, namespace, last_seen)
        WHERE container IS NOT NULL;
    CREATE INDEX member_by_content ON member (blake3, finding, last_seen)
        WHERE blake3 IS NOT NULL;
",
];

/// The JSON of a row as it is published, with its container's labels.
pub(super) fn whole_json(table: &str) -> String {
    format!(
        "CASE WHEN {table}.labels IS NULL THEN {table}.json
         ELSE json_set({table}.json, '$.container.labels', json(coalesce(
             (SELECT labels.json FROM labels
              WHERE labels.container = {table}.container
                  AND labels.namespace = {table}.namespace AND labels.id = {table}.labels),
             '{{}}'))) END"
    )
}

/// The format of the file. Refuses a file of another program, and a newer format.
pub(super) fn check(connection: &Connection, path: &Path) -> Result<i64, Error> {
    let failed = Error::sql("read", path);
    let pragma = |name| -> Result<i64, Error> {
        connection.pragma_query_value(None, name, |row| row.get(0)).map_err(&failed)
    };
    let found = pragma("user_version")?;
    let tables: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))
        .map_err(&failed)?;
    if tables > 0 && pragma("application_id")? != APPLICATION_ID {
        return Err(Error::Foreign { path: path.into() });
    }
    if found > FORMAT {
        return Err(Error::NewerFormat { path: path.into(), found, supported: FORMAT });
    }
    Ok(found)
}

/// Prepares `connection` for writing: checked, durable, in the newest format.
pub(super) fn prepare(connection: &mut Connection, path: &Path) -> Result<(), Error> {
    let found = check(connection, path)?;
    let failed = Error::sql("prepare", path);

    connection.busy_timeout(Duration::from_secs(5)).map_err(&failed)?;
    let set = |name: &str, value: &str| {
        connection.pragma_update_and_check(None, name, value, |_| Ok(())).or_else(
            // A pragma that returns no row has been set all the same.
            |err| match err {
                rusqlite::Error::QueryReturnedNoRows => Ok(()),
                other => Err(other),
            },
        )
    };
    // Must be set before the first table is created. With it, space that retention frees
    // goes back to the disk.
    set("auto_vacuum", "INCREMENTAL").map_err(&failed)?;
    set("journal_mode", "WAL").map_err(&failed)?;
    // In WAL, only FULL makes each commit durable against a loss of power.
    set("synchronous", "FULL").map_err(&failed)?;
    set("journal_size_limit", "16777216").map_err(&failed)?;
    set("trusted_schema", "OFF").map_err(&failed)?;

    if found == FORMAT {
        // Writing nothing here lets the history be opened on a full disk.
        return Ok(());
    }
    let transaction = connection.transaction().map_err(&failed)?;
    let done = usize::try_from(found).unwrap_or(0);
    for migration in &MIGRATIONS[done.min(MIGRATIONS.len())..] {
        transaction.execute_batch(migration).map_err(&failed)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID).map_err(&failed)?;
    transaction.pragma_update(None, "user_version", FORMAT).map_err(&failed)?;
    transaction.commit().map_err(&failed)
}
