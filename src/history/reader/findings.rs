//! Findings: pages of them, one by its ID, those of a container, and where else the content
//! of one was found.
//!
//! Only reads. Members of a finding are in `members`.

use std::collections::HashMap;

use jiff::Timestamp;
use rusqlite::params;

use super::connection::Reader;
use super::filter::{Conditions, Filter, is_named};
use super::pages::{AlsoIn, FindingLookup, FindingsPage, Lookup, PAGE_BYTES, PageToken, RuleHits};
use crate::history::error::Error;
use crate::history::json::{self, FindingText, Kept};
use crate::history::sql::length;
use crate::model::{ContainerId, Finding, FindingId};

/// Most findings of one container that are returned when it appears: the most severe and
/// the newest.
const FINDINGS_OF_CONTAINER: usize = 32 * 1024;
/// Most containers that are named where the same content was found.
const ALSO_IN: usize = 10;

impl Reader {
    /// One page of at most `limit` findings; fewer if they are large.
    pub fn findings(
        &self,
        filter: &Filter,
        after: Option<PageToken>,
        limit: usize,
    ) -> Result<FindingsPage, Error> {
        self.findings_page(filter, after, limit)
    }

    /// The same, as the texts that are stored.
    pub fn stored_findings(
        &self,
        filter: &Filter,
        after: Option<PageToken>,
        limit: usize,
    ) -> Result<FindingsPage<FindingText>, Error> {
        self.findings_page(filter, after, limit)
    }

    fn findings_page<F: Kept>(
        &self,
        filter: &Filter,
        after: Option<PageToken>,
        limit: usize,
    ) -> Result<FindingsPage<F>, Error> {
        let conditions = Conditions::of(filter, &self.images(filter)?);
        let (findings, next) = self.page(conditions, "last_seen", after, limit)?;
        Ok(FindingsPage { findings, next })
    }

    /// The images of findings that the filter's text names. If the text is the whole name of
    /// one, only that one.
    pub(super) fn images(&self, filter: &Filter) -> Result<Vec<String>, Error> {
        let Some(text) = filter.image.as_deref() else { return Ok(Vec::new()) };
        let known: Vec<String> = self.query(|connection| {
            connection
                // Each step finds the next name in the index: images are few, findings many.
                .prepare_cached(
                    "WITH RECURSIVE known (image) AS (
                         SELECT min(image) FROM finding
                         UNION ALL
                         SELECT (SELECT min(image) FROM finding WHERE image > known.image)
                         FROM known WHERE known.image IS NOT NULL
                     )
                     SELECT image FROM known WHERE image IS NOT NULL",
                )
                .and_then(|mut query| query.query_map([], |row| row.get(0))?.collect())
                .map_err(Error::sql("read", &self.path))
        })?;
        if known.iter().any(|name| name == text) {
            return Ok(vec![text.to_owned()]);
        }
        Ok(known.into_iter().filter(|name| is_named(name, text)).collect())
    }

    /// The finding whose ID is `text` or begins with it.
    pub fn finding(&self, text: &str) -> Result<FindingLookup, Error> {
        self.lookup(text)
    }

    /// The same, as the text that is stored.
    pub fn stored_finding(&self, text: &str) -> Result<Lookup<FindingText>, Error> {
        self.lookup(text)
    }

    /// The findings with these IDs that are stored, in this order, as many as fit on a page.
    pub fn findings_of(&self, ids: &[FindingId]) -> Result<Vec<FindingText>, Error> {
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!(
                    "SELECT id, {} FROM finding WHERE id = ?",
                    Finding::column()
                ))
                .map_err(&failed)?;
            let (mut findings, mut bytes) = (Vec::new(), 0);
            for id in ids {
                let mut rows = query.query([id.to_string()]).map_err(&failed)?;
                let Some(row) = rows.next().map_err(&failed)? else { continue };
                findings.push(json::kept(row, 0, 1, &self.path)?);
                bytes += length(row, 1).map_err(&failed)?;
                if bytes > PAGE_BYTES {
                    break;
                }
            }
            Ok(findings)
        })
    }

    /// The newest revision of the findings of a container. `None` selects the findings that
    /// belong to no container.
    pub fn findings_of_container(
        &self,
        container: Option<&ContainerId>,
    ) -> Result<Vec<Finding>, Error> {
        match container {
            None => self.select("finding WHERE container IS NULL ORDER BY id", &[]),
            Some(container) => self.select(
                &format!(
                    "finding WHERE container = ? AND namespace = ?
                     ORDER BY severity DESC, last_seen DESC, id LIMIT {FINDINGS_OF_CONTAINER}"
                ),
                &[&container.id, &container.namespace],
            ),
        }
    }

    /// How often each rule has matched, by the findings that name it.
    pub fn rule_hits(&self) -> Result<HashMap<String, RuleHits>, Error> {
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(
                    "SELECT rule, sum(hits), max(last_seen) FROM (
                         SELECT json ->> '$.verdict.rule' AS rule,
                                json ->> '$.count' AS hits, last_seen
                         FROM finding WHERE json ->> '$.verdict.disposition' = 'accept'
                         UNION ALL
                         SELECT named.value, finding.json ->> '$.count', finding.last_seen
                         FROM finding, json_each(finding.json, '$.verdict.rules') AS named)
                     WHERE rule IS NOT NULL GROUP BY rule",
                )
                .map_err(&failed)?;
            let mut rows = query.query([]).map_err(&failed)?;
            let mut hits = HashMap::new();
            while let Some(row) = rows.next().map_err(&failed)? {
                let number: i64 = row.get(1).map_err(&failed)?;
                let last: i64 = row.get(2).map_err(&failed)?;
                let last = Timestamp::from_microsecond(last).unwrap_or(Timestamp::MIN);
                let rule = row.get(0).map_err(&failed)?;
                hits.insert(rule, RuleHits { hits: number.unsigned_abs(), last });
            }
            Ok(hits)
        })
    }

    /// The number of findings that are stored.
    pub fn count(&self) -> Result<u64, Error> {
        self.query(|connection| {
            connection
                .query_row("SELECT count(*) FROM finding", [], |row| row.get::<_, i64>(0))
                .map(i64::unsigned_abs)
                .map_err(Error::sql("read", &self.path))
        })
    }

    /// The other containers in which the content of a finding's file was found, in a finding
    /// of its own or in a member of one.
    pub fn also_in(&self, finding: &Finding) -> Result<AlsoIn, Error> {
        let Some(content) = finding.file.as_ref().and_then(|file| file.blake3) else {
            return Ok(AlsoIn::default());
        };
        let (namespace, container) =
            finding.container_id().map_or(("", ""), |own| (&*own.namespace, &*own.id));
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            let mut query = connection
                .prepare_cached(&format!(
                    "SELECT namespace, container, count(*) OVER () FROM (
                         SELECT namespace, container, last_seen FROM finding
                         WHERE json_extract(json, '$.file.blake3') = ?1
                             AND container IS NOT NULL
                         UNION ALL
                         SELECT finding.namespace, finding.container, member.last_seen
                         FROM member JOIN finding ON finding.id = member.finding
                         WHERE member.blake3 = ?1 AND finding.container IS NOT NULL)
                     WHERE (namespace, container) <> (?2, ?3)
                     GROUP BY namespace, container
                     ORDER BY max(last_seen) DESC, namespace, container LIMIT {ALSO_IN}"
                ))
                .map_err(&failed)?;
            let mut rows =
                query.query(params![content.to_string(), namespace, container]).map_err(&failed)?;
            let mut also = AlsoIn::default();
            while let Some(row) = rows.next().map_err(&failed)? {
                let text = |column| row.get_ref(column)?.as_str().map_err(rusqlite::Error::from);
                let (namespace, id) = (text(0).map_err(&failed)?, text(1).map_err(&failed)?);
                also.newest.push(ContainerId::new(namespace, id));
                also.containers = row.get(2).map_err(&failed)?;
            }
            Ok(also)
        })
    }
}
