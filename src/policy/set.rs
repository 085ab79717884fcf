//! All rules in force, compiled once, and the decision about one finding.
//!
//! An index by kind, path, content and image leaves few rules to be looked at. The order of the
//! rules decides only between exceptions: the first that matches is named.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;

use fixedbitset::FixedBitSet;
use globset::{GlobBuilder, GlobSet};
use jiff::Timestamp;

use super::condition::{Condition, Content, Subject};
use super::rule::{Effect, Rule};
use crate::config::Enforce;
use crate::model::{Answer, Kind, Severity};

/// The most rules of one set.
pub const MAX_RULES: usize = 20_000;

/// The rules that are named for one answer to a finding.
const MOST_ASKING: usize = 8;

/// A set of rules.
#[derive(Clone, Debug, Default)]
pub struct RuleSet {
    /// In the order of their files, and within a file from top to bottom.
    rules: Vec<Rule>,
    index: Index,
}

/// What the rules say of one finding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matched {
    /// The exception that accepts it.
    pub accepted_by: Option<Arc<str>>,
    /// The rules that match it, if no exception does.
    pub rules: Vec<Arc<str>>,
    /// The severity that a rule gives it, and the rule.
    pub severity: Option<(Severity, Arc<str>)>,
    /// The answers of those rules, each with the rule that asks for it.
    pub answers: Vec<(Answer, Asked)>,
}

/// The rule that asks for an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub rule: Arc<str>,
    pub always_enforced: bool,
    pub enforce: Option<Enforce>,
    /// Which hook, if the answer is one.
    pub hook: Option<Arc<str>>,
}

/// Why a rule does not match a finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    Matches,
    /// It matches, and another rule comes first: an exception, or a pinned rule.
    Overridden(Arc<str>),
    Expired(Timestamp),
    /// The first condition that does not hold, and what the finding has.
    Fails {
        key: &'static str,
        actual: String,
    },
}

#[derive(Clone, Debug, Default)]
struct Index {
    kinds: Vec<FixedBitSet>,
    paths: Option<ByPath>,
    contents: Option<By<Content>>,
    images: Option<By<String>>,
    pinned: FixedBitSet,
}

/// Rules by a value that they name, and those that name none.
#[derive(Clone, Debug)]
struct By<Key> {
    rules: HashMap<Key, Vec<usize>>,
    others: FixedBitSet,
}

#[derive(Clone, Debug)]
struct ByPath {
    patterns: Arc<GlobSet>,
    /// The rule of each pattern.
    rules: Vec<usize>,
    others: FixedBitSet,
}

impl RuleSet {
    /// The error names the rule that is wrong among all of them.
    pub fn new(rules: Vec<Rule>) -> Result<RuleSet, (usize, String)> {
        if rules.len() > MAX_RULES {
            let many = format!("there are {} rules, and at most {MAX_RULES} may be", rules.len());
            return Err((MAX_RULES, many));
        }
        let mut known: HashMap<&str, usize> = HashMap::new();
        for (number, rule) in rules.iter().enumerate() {
            if let Some(first) = known.insert(&rule.id, number) {
                let first = &rules[first].place;
                let twice =
                    format!("the id `{}` is taken: see {}:{}", rule.id, first.file, first.line);
                return Err((number, twice));
            }
        }
        let index = Index::of(&rules)?;
        Ok(RuleSet { rules, index })
    }

    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Whether a rule may ask for an answer to findings of this kind.
    pub fn may_answer(&self, kind: Kind, now: Timestamp) -> bool {
        self.of_kind(kind).any(|rule| !rule.answers.is_empty() && !rule.is_expired(now))
    }

    /// Rules that may deny something in the container of this finding.
    pub fn may_deny<'a>(
        &'a self,
        subject: &'a Subject<'_>,
        now: Timestamp,
    ) -> impl Iterator<Item = &'a Rule> {
        self.rules.iter().filter(move |rule| {
            let of_container = rule.conditions.iter().filter(|it| it.is_of_container());
            rule.answers.contains(&Answer::Deny)
                && !rule.is_expired(now)
                && of_container.into_iter().all(|condition| condition.holds(subject))
        })
    }

    fn of_kind(&self, kind: Kind) -> impl Iterator<Item = &Rule> {
        let rules = self.index.kinds.get(kind as usize);
        rules.into_iter().flat_map(FixedBitSet::ones).map(|number| &self.rules[number])
    }

    /// What the rules say of a finding.
    pub fn decide(&self, subject: &Subject<'_>, now: Timestamp) -> Matched {
        let mut matched = Matched::default();
        if self.rules.is_empty() {
            return matched;
        }
        let candidates = self.index.candidates(subject);
        let applies = |rule: &Rule| !rule.is_expired(now) && rule.matches(subject);
        let mut pinned = candidates.intersection(&self.index.pinned);
        let is_pinned = pinned.any(|number| applies(&self.rules[number]));
        for number in candidates.ones() {
            let rule = &self.rules[number];
            if rule.is_exception() && is_pinned || !applies(rule) {
                continue;
            }
            match rule.effect {
                Effect::Accept => {
                    let accepted_by = Some(Arc::clone(&rule.id));
                    return Matched { accepted_by, ..Matched::default() };
                }
                Effect::Severity(severity) => {
                    let is_strongest =
                        matched.severity.as_ref().is_none_or(|(known, _)| severity > *known);
                    if is_strongest {
                        matched.severity = Some((severity, Arc::clone(&rule.id)));
                    }
                }
                Effect::Report => (),
            }
            for answer in &rule.answers {
                let always_enforced = rule.always_enforced;
                if *answer == Answer::Deny && !subject.finding.kind.is_run() {
                    continue;
                }
                let hook = rule.hook.clone().filter(|_| *answer == Answer::Hook);
                let same =
                    |(known, asked): &&(Answer, Asked)| known == answer && asked.hook == hook;
                let count = matched.answers.iter().filter(same).count();
                let (rule, enforce) = (Arc::clone(&rule.id), rule.enforce);
                let asked = Asked { rule, always_enforced, enforce, hook };
                // The answers of one rule may be stopped: then another one answers.
                if count < MOST_ASKING || always_enforced {
                    matched.answers.push((*answer, asked));
                }
            }
            matched.rules.push(Arc::clone(&rule.id));
        }
        matched
    }

    /// Every rule, and why it does or does not match the finding.
    pub fn explain<'a>(
        &'a self,
        subject: &'a Subject<'_>,
        now: Timestamp,
    ) -> impl Iterator<Item = (&'a Rule, Reason)> {
        let matches = |rule: &Rule| !rule.is_expired(now) && rule.matches(subject);
        let pinned = self.rules.iter().find(|rule| rule.pinned && matches(rule));
        let accepts = self.rules.iter().find(|rule| rule.is_exception() && matches(rule));
        let first = pinned.or(accepts);
        self.rules.iter().map(move |rule| {
            let failing = rule.failing(subject);
            let reason = match (failing, rule.expires.filter(|_| rule.is_expired(now)), first) {
                (_, Some(end), _) => Reason::Expired(end),
                (Some(condition), ..) => {
                    Reason::Fails { key: condition.key(), actual: condition.actual(subject) }
                }
                (None, None, Some(first))
                    if first.id != rule.id && (rule.is_exception() || pinned.is_none()) =>
                {
                    Reason::Overridden(Arc::clone(&first.id))
                }
                (None, None, _) => Reason::Matches,
            };
            (rule, reason)
        })
    }
}

impl Rule {
    fn matches(&self, subject: &Subject<'_>) -> bool {
        self.failing(subject).is_none()
    }

    /// The first condition that does not hold.
    fn failing(&self, subject: &Subject<'_>) -> Option<&Condition> {
        // Nothing is accepted for a content that was perhaps another one.
        let is_doubtful = |condition: &Condition| {
            subject.is_unproven && self.is_exception() && condition.is_of_content()
        };
        self.conditions.iter().find(|one| is_doubtful(one) || !one.holds(subject))
    }
}

impl Index {
    fn of(rules: &[Rule]) -> Result<Index, (usize, String)> {
        let all = || FixedBitSet::with_capacity(rules.len());
        let mut index = Index {
            kinds: Kind::ALL.iter().map(|_| all()).collect(),
            pinned: all(),
            ..Index::default()
        };
        let mut patterns = GlobSet::builder();
        let mut paths = ByPath { patterns: Arc::default(), rules: Vec::new(), others: all() };
        let mut contents = By { rules: HashMap::new(), others: all() };
        let mut images = By { rules: HashMap::new(), others: all() };
        for (number, rule) in rules.iter().enumerate() {
            index.pinned.set(number, rule.pinned);
            let (mut kinds, mut has_path, mut has_content, mut has_image) =
                (Kind::ALL, false, false, false);
            for condition in &rule.conditions {
                match condition {
                    Condition::Kind(named) => kinds = named,
                    Condition::Path(globs) => {
                        has_path = true;
                        for pattern in Vec::from(globs.clone()) {
                            let glob = GlobBuilder::new(&pattern).literal_separator(true).build();
                            patterns.add(glob.map_err(|err| (number, err.to_string()))?);
                            paths.rules.push(number);
                        }
                    }
                    Condition::Content(named) => {
                        has_content = true;
                        for content in named {
                            contents.rules.entry(*content).or_insert_with(Vec::new).push(number);
                        }
                    }
                    Condition::Image(named) => {
                        let names: Option<Vec<&str>> =
                            named.iter().map(|pattern| pattern.whole_name()).collect();
                        for name in names.iter().flatten() {
                            let of_name = images.rules.entry((*name).to_owned());
                            of_name.or_insert_with(Vec::new).push(number);
                        }
                        has_image = names.is_some();
                    }
                    _ => (),
                }
            }
            kinds.iter().for_each(|kind| index.kinds[*kind as usize].insert(number));
            paths.others.set(number, !has_path);
            contents.others.set(number, !has_content);
            images.others.set(number, !has_image);
        }
        let is_named = |others: &FixedBitSet| !others.is_full();
        if is_named(&paths.others) {
            let built =
                patterns.build().map_err(|err| (0, format!("the paths are too much: {err}")));
            paths.patterns = Arc::new(built?);
            index.paths = Some(paths);
        }
        index.contents = Some(contents).filter(|contents| is_named(&contents.others));
        index.images = Some(images).filter(|images| is_named(&images.others));
        Ok(index)
    }

    /// The rules that may match: none that matches is missing.
    fn candidates(&self, subject: &Subject<'_>) -> FixedBitSet {
        let finding = subject.finding;
        let mut candidates = self.kinds.get(finding.kind as usize).cloned().unwrap_or_default();
        let file = finding.file.as_ref();
        if let Some(ByPath { patterns, rules, others }) = &self.paths {
            let mut these = others.clone();
            if let Some(file) = file {
                let path = Path::new(OsStr::from_bytes(file.path.as_bytes()));
                patterns.matches(path).into_iter().for_each(|at| these.insert(rules[at]));
            }
            candidates.intersect_with(&these);
        }
        if let Some(By { rules, others }) = &self.contents {
            let mut these = others.clone();
            let blake3 = file.and_then(|file| file.blake3).map(Content::Blake3);
            let sha256 = file.and_then(|file| file.sha256).map(Content::Sha256);
            for content in blake3.into_iter().chain(sha256) {
                let named = rules.get(&content).into_iter().flatten();
                named.for_each(|number| these.insert(*number));
            }
            candidates.intersect_with(&these);
        }
        if let Some(By { rules, others }) = &self.images {
            let mut these = others.clone();
            let name = finding.image.name.as_deref().map(super::images::whole_name);
            let named = name.and_then(|name| rules.get(&*name)).into_iter().flatten();
            named.for_each(|number| these.insert(*number));
            candidates.intersect_with(&these);
        }
        candidates
    }
}
