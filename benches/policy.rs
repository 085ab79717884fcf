//! What a decision of the policy costs, by the number of rules: with the index, and with a look
//! at every rule (as `driftd policy explain` does it), in one run.
//!
//! `cargo bench --bench policy` prints one small table; medians of some rounds.
#![allow(clippy::print_stdout, reason = "a bench prints its figures")]

use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use driftd::model::Finding;
use driftd::policy::{self, Loaded, PolicyFile, Subject};
use jiff::Timestamp;

const ROUNDS: usize = 9;

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    let is_bench = std::env::args().any(|argument| argument == "--bench");
    let decisions = if is_bench { 2000 } else { 10 };
    let finding: Finding =
        serde_json::from_str(include_str!("../tests/data/finding.json")).expect("a sample");
    println!("{:>8} {:>14} {:>14} {:>8}", "rules", "index", "every rule", "ratio");
    for number in [1, 10, 100, 1000, 10_000] {
        let loaded = rules(number);
        let mut times: Vec<(Duration, Duration)> =
            (0..ROUNDS).map(|_| round(&loaded, &finding, decisions)).collect();
        let mut median = |of: fn(&(Duration, Duration)) -> Duration| {
            times.sort_by_key(of);
            of(&times[ROUNDS / 2]).as_secs_f64() * 1e6 / f64::from(decisions)
        };
        let (index, every) = (median(|times| times.0), median(|times| times.1));
        println!("{number:>8} {index:>11.2} µs {every:>11.2} µs {:>8.3}", index / every);
    }
}

/// One of four rules is for the finding's kind and image, one of a hundred for its path.
fn rules(number: usize) -> Loaded {
    let rule = |at: usize| {
        let image =
            if at.is_multiple_of(4) { "registry.example/shop" } else { "registry.example/other" };
        let path = match at % 100 {
            0 => "/usr/**".to_owned(),
            _ => format!("/opt/plugins-{at}/**"),
        };
        format!(
            "[[rule]]\nid = \"r{at}\"\nreason = \"a bench\"\neffect = \"report\"\n[rule.match]\n\
             kind = [\"exec.*\"]\nimage = [\"{image}\"]\npath = [\"{path}\"]\nuser = [{at}]\n"
        )
    };
    let text: String = (0..number).map(rule).collect();
    let file = PolicyFile::new("bench.toml", text);
    policy::parse(Path::new("/"), vec![file]).expect("the rules are right")
}

fn round(loaded: &Loaded, finding: &Finding, decisions: u32) -> (Duration, Duration) {
    let now = Timestamp::now();
    let severity = finding.severity;
    let subject =
        Subject { finding, severity, session: None, may_be_of_session: false, is_unproven: false };
    let begin = Instant::now();
    for _ in 0..decisions {
        black_box(loaded.rules.decide(black_box(&subject), now));
    }
    let index = begin.elapsed();
    let begin = Instant::now();
    for _ in 0..decisions {
        black_box(loaded.rules.explain(black_box(&subject), now).count());
    }
    (index, begin.elapsed())
}
