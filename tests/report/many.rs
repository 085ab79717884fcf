//! A container with ten thousand findings.

use serde_json::Value;

use crate::incident::{CONTAINER, many};
use crate::program::Recorded;

#[test]
fn ten_thousand_findings_are_counted_and_the_worst_are_listed() {
    let recorded = Recorded::of(many(10_000));
    let page = recorded.report(&[CONTAINER]);
    assert!(page.len() < 1_000_000, "{} bytes", page.len());
    assert_eq!(page.matches("<article class=\"card critical\"").count(), 200);
    assert_eq!(page.matches("<article").count(), 200);
    let dots = page.matches("<circle").count();
    assert!((5..400).contains(&dots), "{dots} dots");
    assert!(page.contains("Listed are 200 of 10000 findings, the worst first."), "no note");

    // The command that the page names lists all of them.
    let (_, command) = page.split_once("All of them: <code>driftd ").unwrap();
    let (command, _) = command.split_once("</code>").unwrap();
    let words: Vec<&str> = command.split(' ').chain(["-q", "--limit", "0"]).collect();
    assert_eq!(recorded.run(&words).out.lines().count(), 10_000);

    let json: Value =
        serde_json::from_str(&recorded.report(&[CONTAINER, "-o", "json", "--limit", "7"])).unwrap();
    assert_eq!(json["counts"]["findings"], 10_000);
    assert_eq!(json["counts"]["by_severity"]["critical"], 2000);
    let listed: Vec<&str> = json["findings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["finding"]["file"]["path"].as_str().unwrap())
        .collect();
    let expected: Vec<String> =
        (0..7).map(|index| format!("/srv/file-{:05}", 4 + 5 * index)).collect();
    assert_eq!(listed, expected, "the first of the worst");
    let all = recorded.report(&[CONTAINER, "-o", "md", "--limit", "0"]);
    assert_eq!(all.lines().filter(|line| line.starts_with("### ")).count(), 10_000);
}
