-- The schema of a history of format 1.
PRAGMA application_id = 1685218932;
PRAGMA user_version = 1;
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
-- Each index ends with the other columns of the filters, so that rows that do not match
-- are not read: they are large.
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
