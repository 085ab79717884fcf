//! The containers that the history knows, by a text that an administrator types.
//!
//! Only containers with a finding, a session or a probe are found. Those that run now are known
//! to the pipeline.

use rusqlite::params_from_iter;

use super::connection::Reader;
use crate::history::error::Error;
use crate::model::ContainerId;

impl Reader {
    /// Every container with a finding, a session or a probe that `text` names; see
    /// [`ContainerId::named_by`]. If `text` is a whole ID, only the containers with that ID.
    pub fn containers(&self, text: &str) -> Result<Vec<ContainerId>, Error> {
        let whole = match text.split_once('/') {
            Some((namespace, id)) => {
                self.select_containers("container = ?1 AND namespace = ?2", &[id, namespace])?
            }
            None => self.select_containers("container = ?1", &[text])?,
        };
        if !whole.is_empty() {
            return Ok(whole);
        }
        let mut found = self.containers_beginning_with(text)?;
        found.retain(|container| container.named_by(text).is_some());
        Ok(found)
    }

    /// The containers whose ID begins with `text`. See [`Reader::containers`] for those that
    /// `text` names.
    pub fn containers_beginning_with(&self, text: &str) -> Result<Vec<ContainerId>, Error> {
        let (condition, id, namespace) = match text.split_once('/') {
            Some((namespace, id)) => ("AND namespace = ?3", id, Some(namespace)),
            None => ("", text, None),
        };
        if id.is_empty() {
            return Ok(Vec::new());
        }
        // The greatest character there is: the end of all texts that begin with `id`.
        let end = format!("{id}{}", char::MAX);
        let values: Vec<&str> = [id, &end].into_iter().chain(namespace).collect();
        self.select_containers(&format!("container BETWEEN ?1 AND ?2 {condition}"), &values)
    }

    fn select_containers(
        &self,
        condition: &str,
        values: &[&str],
    ) -> Result<Vec<ContainerId>, Error> {
        self.query(|connection| {
            let failed = Error::sql("read", &self.path);
            connection
                .prepare_cached(&format!(
                    "SELECT namespace, container FROM finding WHERE {condition}
                     UNION SELECT namespace, container FROM session WHERE {condition}
                     UNION SELECT namespace, container FROM probe WHERE {condition}
                     ORDER BY namespace, container LIMIT 1000"
                ))
                .and_then(|mut query| {
                    query
                        .query_map(params_from_iter(values), |row| {
                            Ok(ContainerId::new(
                                &row.get::<_, String>(0)?,
                                &row.get::<_, String>(1)?,
                            ))
                        })?
                        .collect()
                })
                .map_err(&failed)
        })
    }
}
