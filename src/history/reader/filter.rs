//! Filters, and the SQL conditions that they stand for. Pure.
//!
//! `api` fills in the filters, the queries of the reader use the conditions. Values go into
//! placeholders only, never into the text of a condition.

use jiff::Timestamp;
use rusqlite::types::Value;

use crate::model::{ContainerId, Kind, SessionState, Severity};

/// Selects findings. The default selects all that are reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub container: Option<ContainerId>,
    /// An image's name or manifest digest.
    pub image: Option<String>,
    /// Any of these kinds; empty means every kind.
    pub kinds: Vec<Kind>,
    pub minimum_severity: Option<Severity>,
    /// Last seen at or after this time.
    pub since: Option<Timestamp>,
    /// First seen at or before this time.
    pub until: Option<Timestamp>,
    /// Only those that an exception accepts. Without this, only the others.
    pub accepted: bool,
    /// All, whether exceptions have accepted them or not.
    pub with_accepted: bool,
    pub content: Content,
}

/// What a finding must contain: one of the paths, one of the hashes, one of the sessions,
/// one of the pods and one of the namespaces, but all of the labels and all of the texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Content {
    /// A path, or a directory above it; `*` and `?` stand for any text.
    pub paths: Vec<String>,
    /// Beginnings of hashes.
    pub hashes: Vec<String>,
    /// Beginnings of IDs.
    pub sessions: Vec<String>,
    /// NAME or NAMESPACE/NAME; `*` and `?` stand for any text.
    pub pods: Vec<String>,
    pub pod_namespaces: Vec<String>,
    /// KEY or KEY=VALUE.
    pub labels: Vec<String>,
    pub texts: Vec<String>,
}

/// Selects sessions. The default selects all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SessionFilter {
    pub container: Option<ContainerId>,
    pub state: Option<SessionState>,
    /// Open at or after this time.
    pub since: Option<Timestamp>,
    /// Started at or before this time.
    pub until: Option<Timestamp>,
}

/// The pattern of a text with `*` or `?` for SQLite's GLOB; `None` for a text without them.
fn pattern(text: &str) -> Option<String> {
    text.contains(['*', '?']).then(|| text.replace('[', "[[]"))
}

/// The manifest digests that begin like `text`, if it is the beginning of one.
fn digest_range(text: &str) -> Option<(String, String)> {
    let digits = text.strip_prefix("sha256:")?.to_ascii_lowercase();
    let is_digest = digits.len() >= 8 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    // `g` sorts after every hexadecimal digit.
    is_digest.then(|| (format!("sha256:{digits}"), format!("sha256:{digits}g")))
}

/// Whether `text` is the name of an image, or the last components of it. A text without a
/// tag matches any tag.
pub(super) fn is_named(name: &str, text: &str) -> bool {
    let untagged = |name: &'_ str| -> usize {
        let last = name.rfind('/').map_or(0, |slash| slash + 1);
        name[last..].find(':').map_or(name.len(), |colon| last + colon)
    };
    let mut name = name;
    if !text.contains('@') {
        name = name.split_once('@').map_or(name, |(name, _)| name);
        if untagged(text) == text.len() {
            name = &name[..untagged(name)];
        }
    }
    let ends = |name: &str| {
        name.strip_suffix(text).is_some_and(|rest| rest.is_empty() || rest.ends_with('/'))
    };
    // As Docker abbreviates it.
    let short = name.strip_prefix("docker.io/library/").map(|rest| format!("docker.io/{rest}"));
    !text.is_empty() && (ends(name) || short.is_some_and(|short| ends(&short)))
}

/// Parts of a WHERE clause with the values of their placeholders.
#[derive(Debug, Default)]
pub(super) struct Conditions {
    parts: Vec<String>,
    pub(super) values: Vec<Value>,
}

impl Conditions {
    /// `images`: the names that the filter's image stands for.
    pub(super) fn of(filter: &Filter, images: &[String]) -> Conditions {
        let mut all = Conditions::default();
        if let Some(container) = &filter.container {
            all.add("finding.container = ?", [Value::Text(container.id.to_string())]);
            all.add("finding.namespace = ?", [Value::Text(container.namespace.to_string())]);
        }
        if let Some(image) = &filter.image {
            match digest_range(image) {
                Some((first, beyond)) => all.add(
                    "(finding.manifest_digest >= ? AND finding.manifest_digest < ?)",
                    [Value::Text(first), Value::Text(beyond)],
                ),
                None => all.add_in("finding.image", images.iter().map(String::as_str)),
            }
        }
        if !filter.kinds.is_empty() {
            all.add_in("finding.kind", filter.kinds.iter().map(|kind| kind.name()));
        }
        if let Some(severity) = filter.minimum_severity {
            all.add("finding.severity >= ?", [Value::Integer(severity as i64 + 1)]);
        }
        if let Some(since) = filter.since {
            all.add("finding.last_seen >= ?", [Value::Integer(since.as_microsecond())]);
        }
        if let Some(until) = filter.until {
            all.add("finding.first_seen <= ?", [Value::Integer(until.as_microsecond())]);
        }
        if !filter.with_accepted {
            let is = if filter.accepted { "=" } else { "<>" };
            let disposition = "json_extract(finding.json, '$.verdict.disposition')";
            all.add(&format!("coalesce({disposition}, '') {is} 'accept'"), []);
        }
        all.add_content(&filter.content);
        all
    }

    fn add_content(&mut self, content: &Content) {
        const POD_NAMESPACE: &str = "json_extract(finding.json, '$.container.pod.namespace')";
        self.add_any(&content.paths, path_condition);
        self.add_any(&content.hashes, |hash| {
            let begins = |column: &str| format!("substr({column}, 1, length(?1)) = ?1");
            let parts = [
                begins("json_extract(finding.json, '$.file.blake3')"),
                begins("json_extract(finding.json, '$.file.sha256')"),
                member_condition(&begins("blake3")),
            ];
            let part = format!("({})", parts.join(" OR ")).replace("?1", "?");
            (part, vec![text(hash); 6])
        });
        self.add_any(&content.sessions, |session| {
            (
                "substr(json_extract(finding.json, '$.session'), 1, length(?)) = ?".to_owned(),
                vec![text(session), text(session)],
            )
        });
        self.add_any(&content.pods, |pod| {
            const POD: &str = "json_extract(finding.json, '$.container.pod.name')";
            let of = if pod.contains('/') {
                format!("{POD_NAMESPACE} || '/' || {POD}")
            } else {
                POD.to_owned()
            };
            match pattern(pod) {
                Some(pattern) => (format!("{of} GLOB ?"), vec![text(&pattern)]),
                None => (format!("{of} = ?"), vec![text(pod)]),
            }
        });
        self.add_any(&content.pod_namespaces, |namespace| {
            (format!("{POD_NAMESPACE} = ?"), vec![text(namespace)])
        });
        for label in &content.labels {
            self.add_label(label);
        }
        for wanted in &content.texts {
            self.add_text(wanted);
        }
    }

    fn add_label(&mut self, label: &str) {
        let (key, value) = match label.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (label, None),
        };
        let values = [Some(key), value].into_iter().flatten().map(text);
        self.add(
            &format!(
                "EXISTS (SELECT 1 FROM json_each(coalesce(
                     (SELECT labels.json FROM labels
                      WHERE labels.container = finding.container
                          AND labels.namespace = finding.namespace
                          AND labels.id = finding.labels),
                     json_extract(finding.json, '$.container.labels'), '{{}}'))
                 WHERE key = ? {})",
                if value.is_some() { "AND value = ?" } else { "" }
            ),
            values,
        );
    }

    fn add_text(&mut self, wanted: &str) {
        // Values only: the same keys are in every finding. Arguments are also searched as a
        // shell command has them, joined by spaces.
        self.add(
            &format!(
                "(EXISTS (SELECT 1 FROM json_tree(finding.json)
                          WHERE atom IS NOT NULL AND key IS NOT 'schema'
                              AND instr(lower(atom), lower(?)) > 0)
                  OR instr(lower((SELECT group_concat(value, ' ')
                                  FROM json_each(finding.json, '$.process.argv'))),
                           lower(?)) > 0
                  OR {})",
                member_condition("instr(lower(CAST(path AS TEXT)), lower(?)) > 0")
            ),
            vec![text(wanted); 3],
        );
    }

    /// Requires that one of `wanted` is met.
    fn add_any(
        &mut self,
        wanted: &[String],
        mut condition: impl FnMut(&str) -> (String, Vec<Value>),
    ) {
        if wanted.is_empty() {
            return;
        }
        let (parts, values): (Vec<String>, Vec<Vec<Value>>) =
            wanted.iter().map(|one| condition(one)).unzip();
        self.add(&format!("({})", parts.join(" OR ")), values.into_iter().flatten());
    }

    fn add_in<'a>(&mut self, column: &str, values: impl Iterator<Item = &'a str>) {
        let values: Vec<Value> = values.map(|value| Value::Text(value.to_owned())).collect();
        let placeholders = vec!["?"; values.len()].join(", ");
        self.add(&format!("{column} IN ({placeholders})"), values);
    }

    pub(super) fn of_sessions(filter: &SessionFilter) -> Conditions {
        let mut all = Conditions::default();
        if let Some(container) = &filter.container {
            all.add("container = ?", [Value::Text(container.id.to_string())]);
            all.add("namespace = ?", [Value::Text(container.namespace.to_string())]);
        }
        if let Some(state) = filter.state {
            all.add("state = ?", [Value::Text(state.name().into())]);
        }
        if let Some(since) = filter.since {
            all.add(
                "(state = 'open' OR coalesce(ended_at, changed_at) >= ?)",
                [Value::Integer(since.as_microsecond())],
            );
        }
        if let Some(until) = filter.until {
            all.add("started_at <= ?", [Value::Integer(until.as_microsecond())]);
        }
        all
    }

    pub(super) fn add(&mut self, part: &str, values: impl IntoIterator<Item = Value>) {
        self.parts.push(part.to_owned());
        self.values.extend(values);
    }

    pub(super) fn joined(&self) -> String {
        self.parts.join(" AND ")
    }

    pub(super) fn sql(&self) -> String {
        if self.parts.is_empty() { String::new() } else { format!("WHERE {}", self.joined()) }
    }
}

fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

/// That a member of the finding meets `part`.
fn member_condition(part: &str) -> String {
    format!("EXISTS (SELECT 1 FROM member WHERE finding = finding.id AND {part})")
}

/// That the finding's file, or a member, is at `path` or below it.
fn path_condition(path: &str) -> (String, Vec<Value>) {
    const PATH: &str = "coalesce(json_extract(finding.json, '$.file.path'), \
                        json_extract(finding.json, '$.expected.path'))";
    if let Some(pattern) = pattern(path) {
        return (
            format!("({PATH} GLOB ? OR {})", member_condition("CAST(path AS TEXT) GLOB ?")),
            vec![text(&pattern), text(&pattern)],
        );
    }
    let path = path.trim_end_matches('/');
    // `0` follows `/`.
    let (below, beyond) = (format!("{path}/"), format!("{path}0"));
    let inside = |column: &str| format!("({column} = ? OR ({column} >= ? AND {column} < ?))");
    let blob = |text: &str| Value::Blob(text.as_bytes().to_vec());
    (
        format!("({} OR {})", inside(PATH), member_condition(&inside("path"))),
        vec![text(path), text(&below), text(&beyond), blob(path), blob(&below), blob(&beyond)],
    )
}

#[cfg(test)]
mod tests {
    use super::is_named;

    #[test]
    fn u14_an_image_is_found_by_the_end_of_its_name() {
        let nginx = "docker.io/library/nginx:1.25";
        for text in ["nginx", "nginx:1.25", "library/nginx", "docker.io/nginx", nginx] {
            assert!(is_named(nginx, text), "{text}");
        }
        for text in ["", "ginx", "nginx:1", "nginx:1.2", "/nginx", "nginx/", "other/nginx", "1.25"]
        {
            assert!(!is_named(nginx, text), "{text}");
        }
        assert!(is_named("registry.example:5000/team/shop:1.4", "shop"));
        assert!(is_named("registry.example:5000/team/shop", "team/shop"));
        assert!(is_named("registry.example/shop:1@sha256:00ff", "shop:1"));
        assert!(is_named("registry.example/shop:1@sha256:00ff", "shop:1@sha256:00ff"));
        assert!(!is_named("registry.example/shop:1@sha256:00ff", "shop:1@sha256:00"));
    }
}
