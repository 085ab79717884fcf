//! Proposes exceptions that accept what an administrator has selected: the fewest, and each as
//! narrow as can be. Pure.
//!
//! By content and image where contents are few and stay the same; otherwise by the unchanged
//! program of the image that has written or run the files; by path alone only where neither is
//! known. What happened in a session is never proposed.

use std::collections::{BTreeMap, BTreeSet};

use globset::escape;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;

use super::condition::writer;
use super::images::whole_name;
use crate::model::{Blake3Hash, Finding, FindingId, Kind, Member, Process, RootfsPath, generated};

/// The most contents of one rule, and the most paths. With more, a pattern says it shorter.
const MAX_CONTENTS: usize = 16;
const MAX_PATHS: usize = 8;
/// When a proposed exception ends: it is to be looked at again.
const DAYS: i64 = 90;

/// A finding that is to be accepted, with its files if it is about several.
#[derive(Clone, Debug)]
pub struct Selected {
    pub finding: Finding,
    pub members: Vec<Member>,
}

/// The exceptions, and what they cannot accept.
#[derive(Clone, Debug, Default)]
pub struct Suggestion {
    pub rules: Vec<Proposed>,
    /// Findings that no exception is proposed for, and why.
    pub left: Vec<(FindingId, &'static str)>,
}

/// One exception.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposed {
    /// What makes a finding match, for the person who has to decide.
    pub by: By,
    pub rule: ProposedRule,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    Content,
    Program,
    Path,
}

/// A rule as a policy file has it. The reason is left to its author.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProposedRule {
    pub id: String,
    pub reason: String,
    pub expires: toml::value::Datetime,
    effect: &'static str,
    #[serde(rename = "match")]
    conditions: Conditions,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Conditions {
    kind: Vec<&'static str>,
    image: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    path: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    content: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ancestor: Option<Program>,
    #[serde(skip_serializing_if = "Option::is_none")]
    writer: Option<Program>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Program {
    path: String,
    from_image: bool,
}

impl Proposed {
    /// The rule as it stands in a policy file.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        #[derive(Serialize)]
        struct File<'a> {
            rule: [&'a ProposedRule; 1],
        }
        toml::to_string(&File { rule: [&self.rule] })
    }
}

/// One file of a finding, or a finding without files.
struct Item<'a> {
    kind: Kind,
    path: Option<&'a RootfsPath>,
    content: Option<Blake3Hash>,
}

/// Proposes exceptions for the selected findings.
pub fn suggest(selected: &[Selected], now: Timestamp) -> Suggestion {
    let mut suggestion = Suggestion::default();
    let mut by_content: BTreeMap<String, (BTreeSet<Kind>, BTreeSet<String>)> = BTreeMap::new();
    let mut by_program: BTreeMap<(Conditions, Kind), Vec<&RootfsPath>> = BTreeMap::new();
    let changing = changing_paths(selected);
    for Selected { finding, members } in selected {
        if let Some(why) = cannot_be_accepted(finding) {
            suggestion.left.push((finding.id, why));
            continue;
        }
        let items = items(finding, members);
        let contents: BTreeSet<_> = items.iter().filter_map(|item| item.content).collect();
        let is_stable = |item: &Item<'_>| {
            let of_path = item.path.filter(|path| changing.contains(*path));
            item.content.is_some() && of_path.is_none()
        };
        let image = finding.image.manifest_digest;
        if let Some(image) = image.filter(|_| contents.len() <= MAX_CONTENTS)
            && items.iter().all(is_stable)
        {
            let (kinds, known) = by_content.entry(image.to_string()).or_default();
            kinds.extend(items.iter().map(|item| item.kind));
            known.extend(contents.iter().map(|content| format!("blake3:{content}")));
            continue;
        }
        let common = conditions_of_program(finding);
        for item in items {
            let paths = by_program.entry((common.clone(), item.kind)).or_default();
            paths.extend(item.path);
        }
    }
    let mut rules: Vec<(By, Conditions)> = Vec::new();
    for (image, (kinds, content)) in by_content {
        let kind = kinds.iter().map(|kind| kind.name()).collect();
        let content: Vec<String> = content.into_iter().collect();
        let of = |content: &[String]| Conditions {
            kind,
            image: vec![image],
            content: content.to_vec(),
            ..Conditions::default()
        };
        rules.push((By::Content, of(&content)));
    }
    // Rules that differ only in their kinds are one.
    let mut merged: BTreeMap<Conditions, BTreeSet<&'static str>> = BTreeMap::new();
    for ((common, kind), paths) in by_program {
        let conditions = Conditions { path: patterns(&paths), ..common };
        merged.entry(conditions).or_default().insert(kind.name());
    }
    for (conditions, kinds) in merged {
        let is_by_program = conditions.ancestor.is_some() || conditions.writer.is_some();
        let by = if is_by_program { By::Program } else { By::Path };
        rules.push((by, Conditions { kind: kinds.into_iter().collect(), ..conditions }));
    }
    suggestion.rules = rules
        .into_iter()
        .map(|(by, conditions)| Proposed { by, rule: rule(conditions, now) })
        .collect();
    suggestion
}

/// Why no exception is proposed for a finding.
fn cannot_be_accepted(finding: &Finding) -> Option<&'static str> {
    if finding.verdict.is_accept() {
        Some("an exception accepts it already")
    } else if finding.session.is_some() {
        Some("it happened in a session")
    } else if finding.container.is_none() || finding.image.name.is_none() {
        Some("it belongs to no container with an image")
    } else if finding.file.is_none() && finding.kind != Kind::PackageTransaction {
        Some("it is about no file")
    } else {
        None
    }
}

/// Paths that have been seen with more than one content.
fn changing_paths(selected: &[Selected]) -> BTreeSet<RootfsPath> {
    let mut contents: BTreeMap<&RootfsPath, BTreeSet<Blake3Hash>> = BTreeMap::new();
    for Selected { finding, members } in selected {
        for item in items(finding, members) {
            if let (Some(path), Some(content)) = (item.path, item.content) {
                contents.entry(path).or_default().insert(content);
            }
        }
    }
    let changing = contents.into_iter().filter(|(_, contents)| contents.len() > 1);
    changing.map(|(path, _)| path.clone()).collect()
}

fn items<'a>(finding: &'a Finding, members: &'a [Member]) -> Vec<Item<'a>> {
    // A transaction is decided about as a whole.
    if finding.kind == Kind::PackageTransaction {
        return vec![Item { kind: finding.kind, path: None, content: None }];
    }
    let file = finding.file.as_ref();
    let one = Item {
        kind: finding.kind,
        path: file.map(|file| &file.path),
        content: file.and_then(|file| file.blake3),
    };
    let of_members = members.iter().map(|member| Item {
        kind: member.kind,
        path: Some(&member.path),
        content: member.blake3,
    });
    if members.is_empty() { vec![one] } else { of_members.collect() }
}

/// The image, and the unchanged program of it that is nearest to what has happened.
fn conditions_of_program(finding: &Finding) -> Conditions {
    let name = finding.image.name.as_deref().map(whole_name).unwrap_or_default();
    let image = vec![escape(&name)];
    let unchanged = finding.from_image.as_deref().unwrap_or_default();
    let program =
        |exe: Option<&str>| exe.map(|exe| Program { path: escape(exe), from_image: true });
    let of_writer = writer(finding)
        .filter(|writer| unchanged.contains(&writer.identity))
        .and_then(|writer| program(writer.exe.as_deref()));
    let of_ancestor = |process: &Process| {
        let own = process.ancestors.iter().find(|one| unchanged.contains(&one.identity))?;
        program(own.exe.as_deref())
    };
    let ancestor = match of_writer {
        Some(_) => None,
        None => finding.process.as_ref().and_then(of_ancestor),
    };
    Conditions { image, writer: of_writer, ancestor, ..Conditions::default() }
}

/// The paths, as few patterns as say it.
fn patterns(paths: &[&RootfsPath]) -> Vec<String> {
    let all: BTreeSet<String> = paths.iter().map(|path| exact(path)).collect();
    if all.len() <= MAX_PATHS {
        return all.into_iter().collect();
    }
    let directories: BTreeSet<String> = paths.iter().map(|path| beside(path)).collect();
    if directories.len() <= MAX_PATHS {
        return directories.into_iter().collect();
    }
    let top = |path: &&RootfsPath| {
        let mut top = RootfsPath::root();
        for name in path.relative().split(|byte| *byte == b'/').take(2) {
            top = top.join(name).unwrap_or(top);
        }
        exact_directory(&top, "**")
    };
    let tops: BTreeSet<String> = paths.iter().map(top).collect();
    tops.into_iter().collect()
}

/// One path, with a star for each part that is generated.
fn exact(path: &RootfsPath) -> String {
    if let Some(pattern) = generated::pattern(path) {
        // Its own text is no pattern; the stars are.
        let parts = pattern.split(|byte| *byte == b'*');
        let parts: Vec<String> = parts.map(|part| escape(&String::from_utf8_lossy(part))).collect();
        return parts.join("*");
    }
    match std::str::from_utf8(path.as_bytes()) {
        Ok(path) => escape(path),
        // TOML has no such text.
        Err(_) => beside(path),
    }
}

/// Everything in the directory of a path.
fn beside(path: &RootfsPath) -> String {
    exact_directory(&path.parent().unwrap_or_else(RootfsPath::root), "*")
}

fn exact_directory(directory: &RootfsPath, rest: &str) -> String {
    format!("{}/{rest}", escape(directory.to_string().trim_end_matches('/')))
}

fn rule(conditions: Conditions, now: Timestamp) -> ProposedRule {
    let image = conditions.image.first().map_or("", String::as_str);
    let last = image.rsplit('/').next().unwrap_or_default();
    let name = match last.starts_with("sha256:") {
        true => "content".to_owned(),
        false => last.chars().filter(char::is_ascii_alphanumeric).take(32).collect(),
    };
    let hash = blake3::hash(format!("{conditions:?}").as_bytes()).to_hex();
    let end = now.to_zoned(TimeZone::UTC).date();
    let end = end.checked_add(jiff::Span::new().days(DAYS)).unwrap_or(end);
    ProposedRule {
        id: format!("{name}-{}", &hash[..8]),
        reason: String::new(),
        expires: toml::value::Datetime {
            date: Some(toml::value::Date {
                year: end.year().unsigned_abs(),
                month: end.month().unsigned_abs(),
                day: end.day().unsigned_abs(),
            }),
            time: None,
            offset: None,
        },
        effect: "accept",
        conditions,
    }
}
