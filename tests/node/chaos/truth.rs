//! What really happened in a container, kept beside it, and what a history may and
//! must say of it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// What became of one path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) path: String,
    /// It was executed: the kind that this is told as, and how often.
    pub(crate) ran: Option<(&'static str, u64)>,
    /// It lies there to the end: what a walk tells.
    pub(crate) lies: Option<&'static str>,
    /// It was there for a moment: what a walk may have told.
    pub(crate) passed: &'static [&'static str],
    /// The content of what was run and of what lies there, where that is known.
    pub(crate) blake3: Option<String>,
}

/// Whether a daemon that watches must have seen an execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    Sure,
    /// It was dead, or was killed before it had told what it knew.
    Unsure,
}

/// When nobody watched.
#[derive(Debug, Default)]
pub(crate) struct Blindness {
    windows: Vec<(Instant, Instant)>,
}

impl Blindness {
    pub(crate) fn add(&mut self, from: Instant, to: Instant) {
        self.windows.push((from, to));
    }

    pub(crate) fn sight(&self, began: Instant, ended: Instant) -> Sight {
        let is_blind = self.windows.iter().any(|&(from, to)| began <= to && ended >= from);
        if is_blind { Sight::Unsure } else { Sight::Sure }
    }
}

/// One finding, as far as the truth has something to say about it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Told {
    pub(crate) kind: String,
    pub(crate) path: String,
    pub(crate) count: u64,
    pub(crate) blake3: Option<String>,
}

/// How a history differs from the truth.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// May still come.
    pub(crate) missing: Vec<String>,
    /// Will not become right by waiting.
    pub(crate) wrong: Vec<String>,
}

impl Verdict {
    pub(crate) fn is_good(&self) -> bool {
        *self == Verdict::default()
    }
}

/// Compares what was told of one container's files with what is known of them.
pub(crate) fn compare(claims: &[(Claim, Sight)], told: &[Told]) -> Verdict {
    let mut verdict = Verdict::default();
    let mut by_path: BTreeMap<&str, Vec<&Told>> = BTreeMap::new();
    for told in told {
        by_path.entry(&told.path).or_default().push(told);
    }
    let mut known = BTreeSet::new();
    for (claim, sight) in claims {
        known.insert(claim.path.as_str());
        let told = by_path.get(claim.path.as_str()).map(Vec::as_slice).unwrap_or_default();
        judge(claim, *sight, told, &mut verdict);
    }
    for (path, told) in by_path {
        if !known.contains(path) {
            verdict.wrong.push(format!("nobody made {path}, and it was told as {told:?}"));
        }
    }
    verdict
}

fn judge(claim: &Claim, sight: Sight, told: &[&Told], verdict: &mut Verdict) {
    let Claim { path, ran, lies, passed, blake3 } = claim;
    let of = |kind: &str| told.iter().filter(|told| told.kind == kind).collect::<Vec<_>>();
    for one in told {
        let is_known = ran.is_some_and(|(kind, _)| kind == one.kind)
            || lies.is_some_and(|kind| kind == one.kind)
            || passed.contains(&one.kind.as_str());
        if !is_known {
            verdict.wrong.push(format!("{path} was told as {one:?}, it is {claim:?}"));
        }
    }
    for kind in ran.map(|(kind, _)| kind).into_iter().chain(*lies) {
        let of_kind = of(kind);
        if of_kind.len() > 1 && !passed.contains(&kind) {
            verdict.wrong.push(format!("{path} was told twice: {of_kind:?}"));
        }
        for one in of_kind {
            if let (Some(expected), Some(actual)) = (blake3, &one.blake3)
                && expected != actual
                && !passed.contains(&kind)
            {
                verdict.wrong.push(format!("{path} was told with a content it never had: {one:?}"));
            }
        }
    }
    match (ran, lies, sight) {
        (Some((kind, times)), _, Sight::Sure) => {
            let counted: u64 = of(kind).iter().map(|one| one.count).sum();
            if counted < *times {
                verdict.missing.push(format!("{path} ran {times} times: {kind}, not {told:?}"));
            }
            if counted > *times {
                verdict.wrong.push(format!("{path} ran {times} times, and was told as {told:?}"));
            }
        }
        (Some((kind, times)), lies, Sight::Unsure) => {
            let counted: u64 = of(kind).iter().map(|one| one.count).sum();
            if counted > *times {
                verdict.wrong.push(format!("{path} ran {times} times, and was told as {told:?}"));
            }
            if let Some(lies) = lies
                && of(kind).is_empty()
                && of(lies).is_empty()
            {
                verdict.missing.push(format!("{path} lies there: {kind} or {lies}"));
            }
        }
        (None, Some(kind), _) => {
            if of(kind).is_empty() {
                verdict.missing.push(format!("{path} lies there: {kind}, not {told:?}"));
            }
        }
        (None, None, _) => (),
    }
}

// ---- the rules above, by value

const DROPPED: Claim = Claim {
    path: String::new(),
    ran: Some(("exec.new", 2)),
    lies: Some("file.added"),
    passed: &[],
    blake3: None,
};

fn claim(path: &str, like: Claim) -> Claim {
    Claim { path: path.into(), ..like }
}

fn told(kind: &str, path: &str, count: u64) -> Told {
    Told { kind: kind.into(), path: path.into(), count, blake3: Some("a".into()) }
}

/// How many things are missing and how many wrong.
#[track_caller]
fn check(claims: &[(Claim, Sight)], all_told: &[Told], missing: usize, wrong: usize) {
    let verdict = compare(claims, all_told);
    assert_eq!((verdict.missing.len(), verdict.wrong.len()), (missing, wrong), "{verdict:#?}");
}

pub(crate) fn by_value() {
    use Sight::{Sure, Unsure};
    let dropped = || claim("/x", DROPPED);

    // What was seen must be there, as often as it ran.
    check(&[(dropped(), Sure)], &[told("exec.new", "/x", 2)], 0, 0);
    check(&[(dropped(), Sure)], &[told("exec.new", "/x", 1)], 1, 0);
    check(&[(dropped(), Sure)], &[told("exec.new", "/x", 3)], 0, 1);
    check(&[(dropped(), Sure)], &[], 1, 0);
    // A walk may have come between.
    check(&[(dropped(), Sure)], &[told("file.added", "/x", 1), told("exec.new", "/x", 2)], 0, 0);
    check(&[(dropped(), Sure)], &[told("file.added", "/x", 1)], 1, 0);
    // What nobody saw run still lies there.
    check(&[(dropped(), Unsure)], &[told("file.added", "/x", 1)], 0, 0);
    check(&[(dropped(), Unsure)], &[told("exec.new", "/x", 1)], 0, 0);
    check(&[(dropped(), Unsure)], &[], 1, 0);
    check(&[(dropped(), Unsure)], &[told("exec.new", "/x", 9)], 0, 1);
    // Gone, and nobody saw it: nobody can know.
    let gone = || Claim { lies: None, passed: &["file.added"], ..dropped() };
    check(&[(gone(), Unsure)], &[], 0, 0);
    check(&[(gone(), Sure)], &[], 1, 0);
    check(&[(gone(), Unsure)], &[told("file.added", "/x", 1)], 0, 0);
    // Another kind, another path, the same twice, another content.
    check(&[(dropped(), Unsure)], &[told("exec.modified", "/x", 1)], 1, 1);
    check(&[], &[told("exec.new", "/y", 1)], 0, 1);
    let twice = [told("exec.new", "/x", 1), told("exec.new", "/x", 1)];
    check(&[(dropped(), Sure)], &twice, 0, 1);
    let other = Claim { blake3: Some("b".into()), ..dropped() };
    check(&[(other, Sure)], &[told("exec.new", "/x", 2)], 0, 1);
    // What is no drift is told as nothing.
    let silent = Claim { path: "/x".into(), ..Claim::default() };
    check(&[(silent.clone(), Sure)], &[], 0, 0);
    check(&[(silent, Sure)], &[told("file.added", "/x", 1)], 0, 1);

    // Whatever touches a window was perhaps not seen.
    let now = Instant::now();
    let at = |seconds| now + Duration::from_secs(seconds);
    let mut blindness = Blindness::default();
    blindness.add(at(10), at(20));
    assert_eq!(blindness.sight(at(1), at(9)), Sure);
    assert_eq!(blindness.sight(at(9), at(11)), Unsure);
    assert_eq!(blindness.sight(at(12), at(13)), Unsure);
    assert_eq!(blindness.sight(at(9), at(30)), Unsure);
    assert_eq!(blindness.sight(at(21), at(30)), Sure);
}
