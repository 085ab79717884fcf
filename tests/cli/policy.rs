//! Checking, listing and explaining rules, and what exceptions accept.

use std::fs;

use driftd::history::{MemberChange, Record};
use driftd::model::finding::MEMBER_SCHEMA;
use driftd::model::{Disposition, Finding, Kind, Member, RootfsPath};

use crate::findings::fill;
use crate::node::{Node, RULES};
use crate::program::{self, assert_clean};
use crate::samples::{finding, sample};

#[test]
fn policy_files_are_checked_without_a_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let shown = directory.path().to_str().unwrap();
    let check = || program::run(&["policy", "check", shown]);
    assert_eq!((check().code, check().out), (0, format!("{shown}: 0 rules in 0 files\n")));
    let file = directory.path().join("10-app.toml");
    fs::write(&file, RULES).unwrap();
    assert_eq!((check().code, check().out), (0, format!("{shown}: 2 rules in 1 files\n")));

    fs::write(&file, RULES.replace("\"never\"", "2026-01-01")).unwrap();
    let ended = check();
    assert_eq!(ended.code, 0);
    assert!(
        ended.out.contains("10-app.toml:4: rule `app-plugins` has ended (2026-01-01"),
        "{ended:?}"
    );

    fs::write(&file, RULES.replace("reason  = \"installs its plugins at start\"\n", "")).unwrap();
    let wrong = check();
    assert_eq!((wrong.code, wrong.out.as_str()), (64, ""));
    assert_eq!(wrong.err, format!("{shown}/10-app.toml:4:1: missing field `reason`\n"));

    fs::write(&file, "rule = \"\u{1b}[2J\"").unwrap();
    let hostile = check();
    assert_eq!(hostile.code, 64);
    assert_clean(&hostile.err);
    let missing = program::run(&["policy", "check", "/no/such"]);
    assert_eq!(
        (missing.code, missing.err.as_str()),
        (64, "error: /no/such: there is no such directory\n")
    );
}

#[test]
fn the_rules_in_force_are_listed_with_their_hits() {
    let node = Node::start();
    let mut plugin = finding(1, 60);
    plugin.verdict.disposition = Disposition::Accept;
    plugin.verdict.rule = Some("app-plugins".to_owned());
    plugin.count = 7;
    let mut curl = finding(2, 10);
    curl.verdict.rules = vec!["curl".to_owned(), "gone".to_owned()];
    curl.count = 2;
    node.store_findings(&[plugin.clone(), curl.clone()]);

    let rules = node.run(&["policy", "ls", "-o", "jsonl"]);
    assert_eq!(rules.code, 0, "{rules:?}");
    let rules: Vec<serde_json::Value> =
        rules.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let hits: Vec<_> =
        rules.iter().map(|rule| (rule["id"].as_str(), rule["hits"].as_u64())).collect();
    assert_eq!(hits, [(Some("app-plugins"), Some(7)), (Some("curl"), Some(2))]);
    assert_eq!(rules[1]["answers"], serde_json::json!(["kill"]));
    assert!(rules[0]["file"].as_str().unwrap().ends_with("/10-app.toml"), "{rules:?}");
    let table = node.run(&["policy", "ls", "-o", "wide"]);
    assert!(
        table.out.contains("severity critical, kill") && table.out.contains("team-shop"),
        "{table:?}"
    );

    // What is accepted is not in the usual list, and alone in the other one.
    let ids = |arguments: &[&str]| {
        let output = node.run(&[&["findings", "-q"], arguments].concat());
        output.out.lines().map(str::to_owned).collect::<Vec<String>>()
    };
    let id = |finding: &Finding| vec![finding.id.to_string()];
    assert_eq!(ids(&[]), id(&curl));
    assert_eq!(ids(&["--accepted"]), id(&plugin));
    let reload = node.run(&["policy", "reload"]);
    assert_eq!(reload.code, 0, "{reload:?}");
    assert!(reload.out.starts_with("2 rules, version 2026.11, blake3:"), "{reload:?}");
}

#[test]
fn a_finding_is_explained_rule_by_rule() {
    let node = Node::start();
    let curl = sample();
    node.store_findings(std::slice::from_ref(&curl));
    let explained = node.run(&["policy", "explain", &curl.id.to_string()]);
    assert_eq!(
        (explained.code, explained.out.as_str()),
        (
            0,
            "app-plugins  no: `path` does not hold, the finding has /usr/bin/curl\n\
             curl         matches\n"
        )
    );
    let directory = tempfile::tempdir().unwrap();
    let other = RULES.replace("/usr/bin/curl", "/usr/bin/wget");
    fs::write(directory.path().join("a.toml"), other).unwrap();
    let rules = directory.path().to_str().unwrap();
    let id = curl.id.to_string();
    let explained = node.run(&["policy", "explain", &id, "--rules", rules, "-o", "json"]);
    let explained: serde_json::Value = serde_json::from_str(&explained.out).unwrap();
    assert_eq!(explained["rules"][1]["result"], "fails");
    assert_eq!(explained["rules"][1]["key"], "path");
}

#[test]
fn other_rules_are_tried_on_what_the_history_holds() {
    let node = Node::start();
    let (mut plugin, mut other) = (finding(1, 60), finding(2, 10));
    plugin.file.as_mut().unwrap().path = RootfsPath::new("/opt/plugins/a").unwrap();
    plugin.verdict.disposition = Disposition::Accept;
    plugin.verdict.rule = Some("app-plugins".to_owned());
    other.file.as_mut().unwrap().path = RootfsPath::new("/opt/other/a").unwrap();
    for one in [&mut plugin, &mut other] {
        (one.kind, one.session) = (Kind::ExecNew, None);
    }
    // A finding stands for three files. The tested rules accept two of them.
    let mut many = finding(3, 30);
    (many.kind, many.files, many.session) = (Kind::FileAdded, Some(3), None);
    let seen = |path: &str| {
        MemberChange::Seen(Member {
            schema: MEMBER_SCHEMA.to_owned(),
            path: RootfsPath::new(path).unwrap(),
            kind: Kind::FileAdded,
            blake3: None,
            first_seen: many.first_seen,
            last_seen: many.last_seen,
            removed: false,
        })
    };
    let changes = vec![seen("/opt/other/b"), seen("/opt/other/c"), seen("/tmp/d")];
    let record = Record::Aggregate { finding: Box::new(many.clone()), changes };
    node.writer.as_ref().unwrap().records().send(record).unwrap();
    node.store_findings(&[plugin.clone(), other.clone()]);

    let directory = tempfile::tempdir().unwrap();
    let rules = RULES
        .replace("kind = [\"exec.*\", \"library.loaded\"]\n", "")
        .replace("/opt/plugins/", "/opt/other/");
    fs::write(directory.path().join("a.toml"), rules).unwrap();
    let path = directory.path().to_str().unwrap();
    let tested = node.run(&["policy", "test", path, "-o", "json"]);
    assert_eq!((tested.code, tested.err.as_str()), (0, ""));
    let tested: serde_json::Value = serde_json::from_str(&tested.out).unwrap();
    assert_eq!(tested["findings"], 3);
    assert_eq!(
        (&tested["in_force"]["accepted"], &tested["tested"]["accepted"]),
        (&1.into(), &1.into())
    );
    let changed = tested["changed"].as_array().unwrap();
    let of = |id: &Finding| {
        changed
            .iter()
            .find(|one| one["finding"] == id.id.to_string())
            .unwrap_or_else(|| panic!("{changed:#?}"))
    };
    assert_eq!(of(&plugin)["in_force"]["disposition"], "accept");
    assert_eq!(of(&plugin)["tested"]["disposition"], "report");
    assert_eq!(of(&other)["tested"]["rule"], "app-plugins");
    let partly = &of(&many)["tested"];
    assert_eq!(
        (&partly["disposition"], &partly["accepted_files"], &partly["files"]),
        (&"report".into(), &2.into(), &3.into())
    );
    let text = node.run(&["policy", "test", path]).out;
    assert!(
        text.contains("2 of 3 files accepted") && text.contains("accepted by app-plugins"),
        "{text}"
    );
    let same = node.run(&["policy", "test", path, "--since", "1s"]);
    assert!(same.out.contains("no finding would have another decision"), "{same:?}");
}

#[test]
fn profiles_are_listed_checked_and_tried_before_they_are_switched_on() {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/baselines");
    let listed = program::run(&["policy", "profiles", shipped, "-o", "jsonl"]);
    assert_eq!(listed.code, 0, "{listed:?}");
    let listed: Vec<serde_json::Value> =
        listed.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> = listed.iter().filter_map(|one| one["name"].as_str()).collect();
    let readme = fs::read_to_string(format!("{shipped}/README.md")).unwrap();
    for (name, profile) in names.iter().zip(&listed) {
        assert!(profile["fault"].is_null() && profile["about"].is_string(), "{profile:#}");
        assert!(!profile["rules"].as_array().unwrap().is_empty(), "{profile:#}");
        assert!(readme.contains(&format!("`{name}`")), "{name} is not in the README");
    }
    assert_eq!((names.first(), names.len()), (Some(&"apk"), 11));

    let directory = tempfile::tempdir().unwrap();
    let rules = directory.path().to_str().unwrap();
    let with = |command: &str, profile: &str| {
        let options = ["--profile", profile, "--profile-dir", shipped];
        [&["policy", command, rules], &options[..]]
            .concat()
            .iter()
            .map(|one| (*one).to_owned())
            .collect::<Vec<String>>()
    };
    let run = |arguments: Vec<String>| {
        program::run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    assert_eq!(run(with("check", "pip")).out, format!("{rules}: 2 rules in 1 files\n"));
    let unknown = run(with("check", "yarn"));
    assert_eq!(unknown.code, 64);
    assert!(unknown.err.contains("there is no profile `yarn`: apk, apt,"), "{unknown:?}");

    // The rules in force, and this profile: nothing on the node changes.
    let node = Node::start();
    let mut library = finding(1, 60);
    (library.kind, library.session, library.container) =
        (Kind::ExecRelocated, None, sample().container);
    library.severity = driftd::model::Severity::Medium;
    library.file.as_mut().unwrap().path = RootfsPath::new("/usr/sbin/uptime").unwrap();
    node.store_findings(std::slice::from_ref(&library));
    let tried = ["policy", "test", "--profile", "busybox-install", "--profile-dir", shipped];
    let tried = node.run(&[&tried[..], &["-o", "json"]].concat());
    let tried: serde_json::Value = serde_json::from_str(&tried.out).unwrap();
    assert_eq!(tried["changed"][0]["tested"]["rule"], "busybox-install.applets", "{tried:#}");
    assert_eq!((&tried["in_force"]["rules"], &tried["tested"]["rules"]), (&2.into(), &3.into()));
}

#[test]
fn exceptions_are_suggested_for_what_is_selected_and_tried_on_everything_else() {
    let node = Node::start();
    let (mut expected, mut same, mut by_hand) = (finding(1, 60), finding(2, 30), finding(3, 10));
    for (number, one) in [&mut expected, &mut same, &mut by_hand].into_iter().enumerate() {
        (one.kind, one.session) = (Kind::ExecNew, None);
        one.file.as_mut().unwrap().path =
            RootfsPath::new(format!("/opt/\u{1b}[2J{number}")).unwrap();
    }
    by_hand.session = sample().session;
    by_hand.session.get_or_insert("00112233445566778899aabbccddeeff".parse().unwrap());
    node.store_findings(&[expected.clone(), same.clone(), by_hand.clone()]);
    let (id, by_hand) = (expected.id.to_string(), by_hand.id.to_string());
    let suggested = node.run(&["policy", "suggest", &id, &by_hand]);
    assert_eq!((suggested.code, suggested.err.as_str()), (0, ""), "{suggested:?}");
    assert_clean(&suggested.out);
    let text = &suggested.out;
    assert!(text.starts_with("# 1 of 2 findings would be accepted by 1 exceptions."), "{text}");
    assert!(text.contains("it happened in a session"), "{text}");
    // It has the same content.
    assert!(text.contains("# ALSO ACCEPTED, though not selected: "), "{text}");
    let directory = tempfile::tempdir().unwrap();
    let check = |text: &str| {
        fs::write(directory.path().join("a.toml"), text).unwrap();
        program::run(&["policy", "check", directory.path().to_str().unwrap()])
    };
    assert_eq!(check(text).code, 64, "a reason is to be filled in");
    assert_eq!(check(&text.replace("reason = \"\"", "reason = \"r\"")).code, 0);
    assert_eq!(node.run(&["policy", "suggest", "ffff"]).code, 2);
}

#[test]
#[ignore = "it inserts 200,000 findings, which takes a minute; prints how long a rehearsal takes"]
fn rules_are_tried_on_a_long_history() {
    let node = Node::start();
    fill(&node, 200_000);
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("a.toml"), RULES.replace("/usr/bin/curl", "/usr/**")).unwrap();
    let path = directory.path().to_str().unwrap();
    let timed = |arguments: &[&str]| {
        let begun = std::time::Instant::now();
        let output = node.run(arguments);
        assert_eq!(output.code, 0, "{output:?}");
        (output.out, begun.elapsed())
    };
    let (listed, listing) = timed(&["findings", "-o", "jsonl", "--limit", "0"]);
    let (tested, testing) = timed(&["policy", "test", path, "--since", "2000-01-01", "-o", "json"]);
    let tested: serde_json::Value = serde_json::from_str(&tested).unwrap();
    assert_eq!(tested["findings"].as_u64(), Some(listed.lines().count() as u64));
    eprintln!("{} findings: listed in {listing:?}, tried in {testing:?}", tested["findings"]);
}

#[test]
fn the_status_comes_without_the_rules_if_the_pipeline_does_not_reply() {
    let node = Node::stalled();
    let status = node.run(&["status", "-o", "json"]);
    assert_eq!(status.code, 1, "{status:?}");
    let status: serde_json::Value = serde_json::from_str(&status.out).unwrap();
    assert!(status["policy"].is_null() && status["complete"] == false, "{status:#}");
    let problems = status["problems"].to_string();
    assert!(problems.contains("the pipeline has not answered"), "{problems}");
}

#[test]
fn the_schema_is_one_document() {
    let schema = program::run(&["policy", "schema"]);
    let schema: serde_json::Value = serde_json::from_str(&schema.out).unwrap();
    assert_eq!(schema["title"], "A policy file of driftd");
}
