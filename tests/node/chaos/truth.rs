//! What really happened in a container, and what its history may and must report about it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// What happened to one path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) path: String,
    /// It was executed: the kind of the finding, and how often.
    pub(crate) ran: Option<(&'static str, u64)>,
    /// It exists to the end: the kind that a scan reports.
    pub(crate) lies: Option<&'static str>,
    /// It existed for a moment: the kinds that a scan may have reported.
    pub(crate) passed: &'static [&'static str],
    /// The content of the file that ran or exists, where that is known.
    pub(crate) blake3: Option<String>,
}

/// Whether a daemon that watches must have seen an execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    Sure,
    /// It did not run, or was killed before it had reported what it knew.
    Unsure,
}

/// The times in which driftd did not watch.
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

/// One finding, with the fields that are compared.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Reported {
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

/// Compares the findings about one container's files with what really happened to them.
pub(crate) fn compare(claims: &[(Claim, Sight)], reported: &[Reported]) -> Verdict {
    let mut verdict = Verdict::default();
    let mut by_path: BTreeMap<&str, Vec<&Reported>> = BTreeMap::new();
    for reported in reported {
        by_path.entry(&reported.path).or_default().push(reported);
    }
    let mut known = BTreeSet::new();
    for (claim, sight) in claims {
        known.insert(claim.path.as_str());
        let reported = by_path.get(claim.path.as_str()).map(Vec::as_slice).unwrap_or_default();
        judge(claim, *sight, reported, &mut verdict);
    }
    for (path, reported) in by_path {
        if !known.contains(path) {
            verdict
                .wrong
                .push(format!("no action made {path}, and it was reported as {reported:?}"));
        }
    }
    verdict
}

fn judge(claim: &Claim, sight: Sight, reported: &[&Reported], verdict: &mut Verdict) {
    let Claim { path, ran, lies, passed, blake3 } = claim;
    let of =
        |kind: &str| reported.iter().filter(|reported| reported.kind == kind).collect::<Vec<_>>();
    for one in reported {
        let is_known = ran.is_some_and(|(kind, _)| kind == one.kind)
            || lies.is_some_and(|kind| kind == one.kind)
            || passed.contains(&one.kind.as_str());
        if !is_known {
            verdict.wrong.push(format!("{path} was reported as {one:?}, it is {claim:?}"));
        }
    }
    for kind in ran.map(|(kind, _)| kind).into_iter().chain(*lies) {
        let of_kind = of(kind);
        if of_kind.len() > 1 && !passed.contains(&kind) {
            verdict.wrong.push(format!("{path} was reported twice: {of_kind:?}"));
        }
        for one in of_kind {
            if let (Some(expected), Some(actual)) = (blake3, &one.blake3)
                && expected != actual
                && !passed.contains(&kind)
            {
                verdict
                    .wrong
                    .push(format!("{path} was reported with a content it never had: {one:?}"));
            }
        }
    }
    match (ran, lies, sight) {
        (Some((kind, times)), _, Sight::Sure) => {
            let counted: u64 = of(kind).iter().map(|one| one.count).sum();
            if counted < *times {
                verdict.missing.push(format!("{path} ran {times} times: {kind}, not {reported:?}"));
            }
            if counted > *times {
                verdict
                    .wrong
                    .push(format!("{path} ran {times} times, and was reported as {reported:?}"));
            }
        }
        (Some((kind, times)), lies, Sight::Unsure) => {
            let counted: u64 = of(kind).iter().map(|one| one.count).sum();
            if counted > *times {
                verdict
                    .wrong
                    .push(format!("{path} ran {times} times, and was reported as {reported:?}"));
            }
            if let Some(lies) = lies
                && of(kind).is_empty()
                && of(lies).is_empty()
            {
                verdict.missing.push(format!("{path} exists: {kind} or {lies}"));
            }
        }
        (None, Some(kind), _) => {
            if of(kind).is_empty() {
                verdict.missing.push(format!("{path} exists: {kind}, not {reported:?}"));
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

fn reported(kind: &str, path: &str, count: u64) -> Reported {
    Reported { kind: kind.into(), path: path.into(), count, blake3: Some("a".into()) }
}

/// How many things are missing and how many wrong.
#[track_caller]
fn check(claims: &[(Claim, Sight)], all_reported: &[Reported], missing: usize, wrong: usize) {
    let verdict = compare(claims, all_reported);
    assert_eq!((verdict.missing.len(), verdict.wrong.len()), (missing, wrong), "{verdict:#?}");
}

pub(crate) fn by_value() {
    use Sight::{Sure, Unsure};
    let dropped = || claim("/x", DROPPED);

    // What was seen must be there, as often as it ran.
    check(&[(dropped(), Sure)], &[reported("exec.new", "/x", 2)], 0, 0);
    check(&[(dropped(), Sure)], &[reported("exec.new", "/x", 1)], 1, 0);
    check(&[(dropped(), Sure)], &[reported("exec.new", "/x", 3)], 0, 1);
    check(&[(dropped(), Sure)], &[], 1, 0);
    // A scan may have come between.
    check(
        &[(dropped(), Sure)],
        &[reported("file.added", "/x", 1), reported("exec.new", "/x", 2)],
        0,
        0,
    );
    check(&[(dropped(), Sure)], &[reported("file.added", "/x", 1)], 1, 0);
    // A file that was not seen to run still exists.
    check(&[(dropped(), Unsure)], &[reported("file.added", "/x", 1)], 0, 0);
    check(&[(dropped(), Unsure)], &[reported("exec.new", "/x", 1)], 0, 0);
    check(&[(dropped(), Unsure)], &[], 1, 0);
    check(&[(dropped(), Unsure)], &[reported("exec.new", "/x", 9)], 0, 1);
    // A file that is gone and was not seen to run cannot be reported.
    let gone = || Claim { lies: None, passed: &["file.added"], ..dropped() };
    check(&[(gone(), Unsure)], &[], 0, 0);
    check(&[(gone(), Sure)], &[], 1, 0);
    check(&[(gone(), Unsure)], &[reported("file.added", "/x", 1)], 0, 0);
    // Another kind, another path, the same twice, another content.
    check(&[(dropped(), Unsure)], &[reported("exec.modified", "/x", 1)], 1, 1);
    check(&[], &[reported("exec.new", "/y", 1)], 0, 1);
    let twice = [reported("exec.new", "/x", 1), reported("exec.new", "/x", 1)];
    check(&[(dropped(), Sure)], &twice, 0, 1);
    let other = Claim { blake3: Some("b".into()), ..dropped() };
    check(&[(other, Sure)], &[reported("exec.new", "/x", 2)], 0, 1);
    // What is no drift is not reported.
    let silent = Claim { path: "/x".into(), ..Claim::default() };
    check(&[(silent.clone(), Sure)], &[], 0, 0);
    check(&[(silent, Sure)], &[reported("file.added", "/x", 1)], 0, 1);

    // What touches such a time was perhaps not seen.
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
