//! Rules against the published example of a finding, one key after the other; the order of rules;
//! files with faults; and what holds for any rules.

use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::config::{PolicyFiles, Respond};
use crate::model::{Finding, Interactive, RootfsPath, Session, SessionId};

fn finding() -> Finding {
    let mut finding: Finding =
        serde_json::from_str(include_str!("../../tests/data/finding.json")).unwrap();
    finding.session = None;
    finding
}

fn session() -> Session {
    serde_json::from_str(include_str!("../../tests/data/session.json")).unwrap()
}

fn now() -> Timestamp {
    "2026-11-29T12:00:00Z".parse().unwrap()
}

fn file(name: &str, text: &str) -> PolicyFile {
    PolicyFile::new(name, text)
}

fn loaded(text: &str) -> Loaded {
    parse(Path::new("/p"), vec![file("a.toml", text)]).unwrap_or_else(|err| panic!("{err}"))
}

/// A rule with these conditions.
fn rule(id: &str, head: &str, conditions: &str) -> String {
    format!("[[rule]]\nid = \"{id}\"\nreason = \"a test\"\n{head}\n[rule.match]\n{conditions}\n")
}

const ACCEPT: &str = "effect = \"accept\"\nexpires = \"never\"";
const REPORT: &str = "effect = \"report\"";

fn policy(text: &str) -> Policy {
    Policy { enforce: Enforce::On, ..Policy::of(&Config::default(), Some(&loaded(text))) }
}

fn subject(finding: &Finding) -> Subject<'_> {
    Subject {
        finding,
        severity: finding.severity,
        session: None,
        may_be_of_session: false,
        is_unproven: false,
    }
}

fn decide(text: &str, finding: &Finding) -> Decision {
    policy(text).decide(&subject(finding), now())
}

fn accepts(text: &str, finding: &Finding) -> bool {
    decide(text, finding).verdict.disposition == Disposition::Accept
}

/// Whether an exception with these conditions accepts the example.
#[track_caller]
fn check(conditions: &str, expected: bool) {
    assert_eq!(accepts(&rule("x", ACCEPT, conditions), &finding()), expected, "{conditions}");
}

#[test]
fn each_key_matches_what_it_names_and_nothing_else() {
    check("kind = [\"exec.*\"]", true);
    check("kind = [\"file.*\", \"exec.modified\"]", true);
    check("kind = [\"exec.new\"]", false);
    check("severity = \"critical\"", true);
    check("severity = \">=high\"", true);
    check("severity = \"<=high\"", false);
    check("image = [\"registry.example/shop\"]", true);
    check("image = [\"registry.example/shop:1.4\"]", true);
    check("image = [\"registry.example/shop:1.5\"]", false);
    check("image = [\"registry.example/*\"]", true);
    check("image = [\"shop\"]", false);
    check(&format!("image = [\"sha256:{}\"]", "1".repeat(64)), true);
    check(&format!("image = [\"sha256:{}\"]", "2".repeat(64)), false);
    check("path = [\"/usr/**\"]", true);
    check("path = [\"/usr/*\"]", false);
    check("path = [\"/opt/**\", \"/usr/bin/curl\"]", true);
    check(&format!("content = [\"blake3:{}\"]", "3".repeat(64)), true);
    check(&format!("content = [\"sha256:{}\"]", "4".repeat(64)), true);
    check(&format!("content = [\"sha256:{}\"]", "3".repeat(64)), false);
    check("ancestor = { path = \"/bin/sh\", from_image = true }", true);
    check("ancestor = { path = \"/bin/bash\" }", false);
    check("ancestor = { path = \"/usr/bin/containerd-shim-runc-v2\" }", true);
    check("ancestor = { path = \"/usr/bin/containerd-shim-runc-v2\", from_image = true }", false);
    check("writer = { path = \"/usr/bin/npm\", from_image = true }", true);
    check("writer = { path = \"/usr/bin/pip\" }", false);
    check("filesystem = [\"overlay\", \"tmpfs\"]", true);
    check("filesystem = [\"volume\"]", false);
    check("container = [\"4f1c*\"]", true);
    check("container = [\"web-*\"]", false);
    check("namespace = [\"k8s.io\"]", true);
    check("namespace = [\"default\"]", false);
    check("pod_namespace = [\"pro*\"]", true);
    check("pod_namespace = [\"ci-*\"]", false);
    check("pod = [\"shop-*\"]", true);
    check("pod = [\"web-*\"]", false);
    check("label = { app = \"shop\" }", true);
    check("label = { app = \"web\" }", false);
    check("label = { team = \"*shop\" }", false);
    check("runtime = [\"io.containerd.runc.*\"]", true);
    check("runtime = [\"io.containerd.kata.v2\"]", false);
    check("argv = [\"curl -s *\"]", true);
    check("argv = [\"wget *\"]", false);
    check("user = [0, 1000]", true);
    check("user = [1000]", false);
    check("within = \"13s\"", true);
    check("within = \"12s\"", false);
    check("session = \"none\"", true);
    check("session = \"any\"\nkind = [\"exec.*\"]", true);
    check("session = \"interactive\"", false);
    check("entry = [\"runtime_exec\"]", false);
    check("requester = [\"*a*\"]", false);
    check("kind = [\"exec.*\"]\npath = [\"/opt/**\"]", false);
    check("everything = true", true);
}

#[test]
fn what_a_person_did_is_accepted_only_by_a_rule_that_says_so() {
    let mut session = session();
    session.interactive = Some(Interactive::Terminal);
    session.requested_by = Some("alice@example".to_owned());
    let mut drift = finding();
    drift.session = Some(session.id);
    let decide = |conditions: &str, session: Option<&Session>, may_be_of_session| {
        let text = rule("x", ACCEPT, conditions);
        let subject = Subject { session, may_be_of_session, ..subject(&drift) };
        policy(&text).decide(&subject, now()).verdict.disposition == Disposition::Accept
    };
    assert!(!decide("kind = [\"exec.*\"]", Some(&session), false));
    assert!(!decide("kind = [\"exec.*\"]", None, false), "a session that is not known any more");
    assert!(!decide("everything = true", Some(&session), false));
    assert!(decide("kind = [\"exec.*\"]\nsession = \"any\"", Some(&session), false));
    assert!(decide("session = \"interactive\"", Some(&session), false));
    assert!(!decide("session = \"interactive\"", None, false));
    assert!(decide("session = \"any\"\nrequester = [\"alice@*\"]", Some(&session), false));
    assert!(!decide("session = \"any\"\nrequester = [\"bob@*\"]", Some(&session), false));
    let entry = format!("session = \"any\"\nentry = [\"{}\"]", session.entry.name());
    assert!(decide(&entry, Some(&session), false));
    assert!(!decide("session = \"any\"\nentry = [\"attach\"]", Some(&session), false));

    drift.session = None::<SessionId>;
    let decide = |may_be_of_session| {
        let text = rule("x", ACCEPT, "kind = [\"exec.*\"]");
        let subject = Subject { may_be_of_session, ..subject(&drift) };
        policy(&text).decide(&subject, now()).verdict.disposition == Disposition::Accept
    };
    assert!(decide(false));
    assert!(!decide(true), "it is not known who did it");
}

#[test]
fn what_is_not_known_meets_no_condition() {
    let mut bare = finding();
    (bare.file, bare.process, bare.writer, bare.from_image) = (None, None, None, None);
    (bare.container, bare.after_start_milliseconds, bare.container_runtime) = (None, None, None);
    bare.image = crate::model::ImageReference::default();
    for conditions in [
        "image = [\"registry.example/shop\"]",
        "path = [\"/usr/**\"]",
        "filesystem = [\"overlay\"]",
        "ancestor = { path = \"/bin/sh\" }",
        "writer = { path = \"/usr/bin/npm\" }",
        "container = [\"4f1c*\"]",
        "namespace = [\"k8s.io\"]",
        "pod = [\"shop-*\"]",
        "label = { app = \"shop\" }",
        "runtime = [\"io.*\"]",
        "argv = [\"curl*\"]",
        "user = [0]",
        "within = \"1h\"",
    ] {
        assert!(!accepts(&rule("x", ACCEPT, conditions), &bare), "{conditions}");
    }
    assert!(accepts(&rule("x", ACCEPT, "kind = [\"exec.*\"]"), &bare));
}

#[test]
fn the_first_exception_that_matches_is_named_and_a_pinned_rule_stands_above_all() {
    let first = rule("first", ACCEPT, "path = [\"/opt/**\"]");
    let second = rule("second", ACCEPT, "kind = [\"exec.*\"]");
    let third = rule("third", ACCEPT, "path = [\"/usr/**\"]");
    let kill = rule("kill", "effect = \"report\"\nanswer = [\"kill\"]", "kind = [\"exec.*\"]");
    let decision = decide(&[first, second, third, kill].concat(), &finding());
    assert_eq!(decision.verdict.rule.as_deref(), Some("second"));
    assert_eq!(decision.verdict.disposition, Disposition::Accept);
    assert_eq!(decision.verdict.rules, Vec::<String>::new());

    let accept = rule("accept", ACCEPT, "kind = [\"exec.*\"]");
    let pinned = "effect = \"report\"\nanswer = [\"kill\"]\npinned = true";
    let pinned = rule("hashes", pinned, &format!("content = [\"blake3:{}\"]", "3".repeat(64)));
    let decision = decide(&(accept.clone() + &pinned), &finding());
    assert_eq!(decision.verdict.disposition, Disposition::Kill);
    assert_eq!(decision.verdict.rule.as_deref(), Some("hashes"));
    let mut other = finding();
    other.file.as_mut().unwrap().blake3 = None;
    assert!(accepts(&(accept + &pinned), &other));
}

#[test]
fn every_matching_rule_counts_and_the_strongest_severity_wins() {
    let severity = |id, name| {
        rule(id, &format!("effect = \"severity\"\nseverity = \"{name}\""), "kind = [\"exec.*\"]")
    };
    let text =
        severity("low", "low") + &severity("medium", "medium") + &rule("r", REPORT, "user = [0]");
    let Decision { verdict, severity } = decide(&text, &finding());
    assert_eq!(severity, Severity::Medium, "a rule may lower it, never silently");
    assert_eq!(verdict.unchanged_severity, Some(Severity::Critical));
    assert_eq!(verdict.rule.as_deref(), Some("medium"));
    assert_eq!(verdict.rules, ["low", "medium", "r"]);
    assert_eq!(verdict.disposition, Disposition::Report);
    // The condition is about the severity that the finding has without rules.
    let chain = rule("a", "effect = \"severity\"\nseverity = \"low\"", "severity = \"critical\"")
        + &rule("b", ACCEPT, "severity = \"<=low\"");
    assert_eq!(decide(&chain, &finding()).severity, Severity::Low);
}

#[test]
fn an_answer_is_carried_out_only_if_answers_are_switched_on() {
    let kill = rule("kill", "effect = \"report\"\nanswer = [\"kill\"]", "kind = [\"exec.*\"]");
    for (enforce, disposition, action, dry_run) in [
        (Enforce::Off, Disposition::Report, None, false),
        (Enforce::DryRun, Disposition::Report, Some("kill"), true),
        (Enforce::On, Disposition::Kill, Some("kill"), false),
    ] {
        let policy = Policy { enforce, ..policy(&kill) };
        let verdict = policy.decide(&subject(&finding()), now()).verdict;
        assert_eq!(verdict.disposition, disposition, "{enforce:?}");
        assert_eq!((verdict.action.as_deref(), verdict.dry_run), (action, dry_run), "{enforce:?}");
    }
    assert_eq!(Config::default().policy.enforce, Enforce::DryRun);
}

#[test]
fn out_of_the_box_it_only_reports() {
    let policy = Policy::of(&Config::default(), None);
    for kind in Kind::ALL {
        let mut finding = finding();
        (finding.kind, finding.severity) = (*kind, kind.severity());
        let decision = policy.decide(&subject(&finding), now());
        assert_eq!(decision, Decision { verdict: policy.report(), severity: kind.severity() });
        assert_eq!(decision.verdict.disposition, Disposition::Report, "{kind}");
    }
}

#[test]
fn the_setting_kill_on_is_a_rule_that_is_always_enforced() {
    let respond = Respond { kill_on: [Kind::ExecModified].into(), ..Respond::default() };
    let config = Config { respond, ..Config::default() };
    let accept = rule("accept", ACCEPT, "path = [\"/usr/**\"]");
    for enforce in [Enforce::Off, Enforce::DryRun, Enforce::On] {
        let policy = Policy { enforce, generation: 3, ..Policy::of(&config, None) };
        let verdict = policy.decide(&subject(&finding()), now()).verdict;
        assert_eq!(verdict.disposition, Disposition::Kill, "{enforce:?}");
        assert_eq!(verdict.rule.as_deref(), Some("respond.kill_on"));
        assert_eq!((verdict.policy_generation, verdict.dry_run), (3, false));
        assert!(policy.may_answer(Kind::ExecModified, now()));
        assert!(!policy.may_answer(Kind::ExecNew, now()));
        let mut other = finding();
        other.kind = Kind::FileAdded;
        let verdict = policy.decide(&subject(&other), now()).verdict;
        assert_eq!(verdict.disposition, Disposition::Report);
    }
    let policy = Policy::of(&config, Some(&loaded(&accept)));
    let verdict = policy.decide(&subject(&finding()), now()).verdict;
    assert_eq!(verdict.disposition, Disposition::Accept, "an exception comes first");
}

#[test]
fn a_rule_ends_at_the_second() {
    for (expires, end) in [
        ("2027-03-01", "2027-03-01T00:00:00Z"),
        ("2027-03-01T10:00:00+02:00", "2027-03-01T08:00:00Z"),
        ("\"2027-03-01\"", "2027-03-01T00:00:00Z"),
    ] {
        let head = format!("effect = \"accept\"\nexpires = {expires}");
        let policy = policy(&rule("x", &head, "kind = [\"exec.*\"]"));
        let end: Timestamp = end.parse().unwrap();
        let at = |at| policy.decide(&subject(&finding()), at).verdict.disposition;
        let just_before = end - SignedDuration::from_nanos(1);
        assert_eq!(at(just_before), Disposition::Accept, "{expires}");
        assert_eq!(at(end), Disposition::Report, "{expires}");
    }
}

#[test]
fn explain_names_the_first_condition_that_fails() {
    let text = [
        rule("no", ACCEPT, "kind = [\"exec.*\"]\npath = [\"/opt/**\"]"),
        rule("yes", ACCEPT, "kind = [\"exec.*\"]"),
        rule("late", ACCEPT, "path = [\"/usr/**\"]"),
        rule("old", "effect = \"accept\"\nexpires = 2026-01-01", "path = [\"/usr/**\"]"),
        rule("loud", REPORT, "user = [0]"),
    ];
    let loaded = loaded(&text.concat());
    let finding = finding();
    let subject = subject(&finding);
    let reasons: Vec<(String, Reason)> = loaded
        .rules
        .explain(&subject, now())
        .map(|(rule, reason)| (rule.id.to_string(), reason))
        .collect();
    let end = "2026-01-01T00:00:00Z".parse().unwrap();
    let expected = [
        ("no", Reason::Fails { key: "path", actual: "/usr/bin/curl".to_owned() }),
        ("yes", Reason::Matches),
        ("late", Reason::Overridden("yes".into())),
        ("old", Reason::Expired(end)),
        ("loud", Reason::Overridden("yes".into())),
    ];
    assert_eq!(reasons, expected.map(|(id, reason)| (id.to_owned(), reason)));
}

/// The faults of one file, as they are printed.
fn faults(text: &str) -> String {
    match parse(Path::new("/p"), vec![file("a.toml", text)]) {
        Ok(_) => panic!("accepted: {text}"),
        Err(refused) => refused.to_string(),
    }
}

#[track_caller]
fn check_fault(text: &str, expected: &str) {
    let found = faults(text);
    assert!(found.contains(expected), "{found:?} has no {expected:?}");
    assert!(found.starts_with("/p/a.toml:"), "{found}");
}

#[test]
fn a_fault_is_named_with_its_file_line_and_column() {
    let kind = "kind = [\"exec.*\"]";
    check_fault("[[rule]]\nid = \"x\"\n", "/p/a.toml:1:1: missing field `reason`");
    check_fault(
        &rule("x", "effect = \"accept\"", kind),
        "a.toml:1:1: rule `x`: `expires` is missing",
    );
    check_fault(&rule("x", ACCEPT, "paths = [\"/a\"]"), "a.toml:7:1: unknown field `paths`");
    check_fault(&rule("x", ACCEPT, "path = \"/a\""), "a.toml:7:8: invalid type: string");
    check_fault(&rule("x", "effect = \"drop\"", kind), "a.toml:4:10: unknown variant `drop`");
    check_fault(&rule("x y", ACCEPT, kind), "`id` has 1 to 64 letters");
    check_fault(&rule("respond.kill_on", ACCEPT, kind), "stands for the setting");
    check_fault(
        &rule("x", &format!("{ACCEPT}\nanswer = [\"kill\"]"), kind),
        "`answer` does not go",
    );
    check_fault(&rule("x", &format!("{ACCEPT}\npinned = true"), kind), "`pinned` is for rules");
    check_fault(&rule("x", &format!("{ACCEPT}\nseverity = \"low\""), kind), "`severity` needs");
    check_fault(&rule("x", "effect = \"severity\"", kind), "`severity` is missing");
    check_fault(
        &rule("x", "effect = \"severity\"\nseverity = \"worst\"", kind),
        "`worst` is no severity",
    );
    check_fault(&rule("x", "effect = \"accept\"\nexpires = \"soon\"", kind), "`expires` is a date");
    check_fault(
        &rule("x", "effect = \"accept\"\nexpires = 2027-03-01T10:00:00", kind),
        "`expires` is a date",
    );
    check_fault(&rule("x", ACCEPT, ""), "`match` is empty");
    check_fault(&rule("x", REPORT, ""), "`match` is empty");
    check_fault(
        &rule("x", ACCEPT, "session = \"any\"\npath = [\"/**\"]"),
        "`/**` matches everything",
    );
    check_fault(&rule("x", ACCEPT, "image = [\"*\"]"), "`*` matches everything");
    check_fault(&rule("x", ACCEPT, "kind = [\"exek.*\"]"), "`kind`: `exek.*` is no finding kind");
    check_fault(
        &rule("x", ACCEPT, "path = [\"usr\"]"),
        "`path`: the pattern `usr` starts with neither",
    );
    check_fault(&rule("x", ACCEPT, "path = [\"/[\"]"), "`path`: the pattern `/[` is wrong");
    check_fault(&rule("x", ACCEPT, "pod = [\"[\"]"), "`pod`: the pattern `[` is wrong");
    check_fault(&rule("x", ACCEPT, "content = [\"md5:00\"]"), "`content`: `md5:00` is neither");
    check_fault(&rule("x", ACCEPT, "within = \"soon\""), "`within`: `soon` is no duration");
    check_fault(&rule("x", ACCEPT, "filesystem = [\"nfs\"]"), "`filesystem`: `nfs` is none of");
    check_fault(&rule("x", ACCEPT, "entry = [\"window\"]"), "`entry`: `window` is none of");
    check_fault("version = \"1\"\nrules = 3\n", "a.toml:2:1: unknown field `rules`");
    check_fault("[[rule]\n", "a.toml:1:");
    // All faults are named, and what comes from the file is safe to print.
    let two = rule("a", ACCEPT, "pod = [\"[\"]") + &rule("b", ACCEPT, "pod = [\"\\u001b[\"]");
    let found = faults(&two);
    assert_eq!(found.lines().count(), 2, "{found}");
    assert!(!found.contains('\u{1b}') && found.contains("a.toml:8:1: rule `b`"), "{found}");
}

#[test]
fn one_id_is_one_rule_in_all_files_together() {
    let one = rule("x", ACCEPT, "kind = [\"exec.*\"]");
    let files = vec![file("a.toml", &one), file("b.toml", &one)];
    let refused = parse(Path::new("/p"), files).unwrap_err().to_string();
    assert_eq!(refused, "/p/b.toml:1:1: the id `x` is taken: see /p/a.toml:1");
    let versions = vec![file("a.toml", "version = \"1\""), file("b.toml", "version = \"2\"")];
    let refused = parse(Path::new("/p"), versions).unwrap_err().to_string();
    assert!(refused.contains("another file has a `version`"), "{refused}");
}

#[test]
fn a_set_has_a_version_and_a_hash_of_all_its_files() {
    let text = format!("version = \"2026.11\"\n{}", rule("x", ACCEPT, "kind = [\"exec.*\"]"));
    let of = |files: Vec<PolicyFile>| parse(Path::new("/p"), files).unwrap();
    let one = of(vec![file("a.toml", &text)]);
    assert_eq!(one.version.as_deref(), Some("2026.11"));
    let digest = one.digest.clone().unwrap();
    assert!(digest.starts_with("blake3:") && digest.len() == 71, "{digest}");
    assert_eq!(of(vec![file("a.toml", &text)]).digest, Some(digest.clone()));
    assert_ne!(of(vec![file("b.toml", &text)]).digest, Some(digest.clone()));
    assert_ne!(of(vec![file("a.toml", &(text + " "))]).digest, Some(digest));
    assert_eq!(of(Vec::new()).digest, None);
}

#[test]
fn too_many_rules_are_refused_with_a_number() {
    let one = |number: usize| rule(&format!("r{number}"), REPORT, "user = [0]");
    let many: String = (0..=MAX_RULES).map(one).collect();
    check_fault(&many, "there are 20001 rules, and at most 20000 may be");
    let most: String = (0..10_000).map(one).collect();
    assert_eq!(loaded(&most).rules.rules().len(), 10_000);
}

#[test]
fn files_that_cannot_be_trusted_or_read_are_refused() {
    use std::os::unix::fs::PermissionsExt as _;

    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let text = rule("x", ACCEPT, "kind = [\"exec.*\"]");
    let read = |directory: &Path, owners| read(&PolicyFiles::of(directory), owners);
    let none = read(&path("none"), Owners::Own).unwrap();
    assert!(!none.has_directory && none.rules.is_empty());
    let empty = read(directory.path(), Owners::Own).unwrap();
    assert!(empty.has_directory && empty.rules.is_empty());
    std::fs::write(path("a.toml"), &text).unwrap();
    std::fs::write(path("b.txt"), "no policy").unwrap();
    std::fs::write(path(".c.toml"), "no policy").unwrap();
    assert_eq!(read(directory.path(), Owners::Own).unwrap().rules.rules().len(), 1);

    let set_mode = |mode| {
        std::fs::set_permissions(path("a.toml"), std::fs::Permissions::from_mode(mode)).unwrap();
    };
    set_mode(0o666);
    let refused = read(directory.path(), Owners::Own).unwrap_err().to_string();
    assert!(refused.contains("others than root may write to it"), "{refused}");
    read(directory.path(), Owners::Any).unwrap();
    set_mode(0o644);

    // A FIFO would hold up the process that opens it.
    let fifo = std::process::Command::new("mkfifo").arg(path("d.toml")).status().unwrap();
    assert!(fifo.success());
    let refused = read(directory.path(), Owners::Any).unwrap_err().to_string();
    assert!(refused.contains("d.toml: cannot be read: it is no regular file"), "{refused}");
    std::fs::remove_file(path("d.toml")).unwrap();

    std::fs::File::create(path("e.toml")).unwrap().set_len(50 << 20).unwrap();
    let refused = read(directory.path(), Owners::Any).unwrap_err().to_string();
    assert!(refused.contains("e.toml: cannot be read: the policy files have more"), "{refused}");
    std::fs::write(path("e.toml"), b"\xff").unwrap();
    let refused = read(directory.path(), Owners::Any).unwrap_err().to_string();
    assert!(refused.contains("e.toml: cannot be read"), "{refused}");
}

#[test]
fn a_program_that_has_written_what_it_uses_is_known_and_an_interpreter_is_not_asked() {
    use crate::model::{Process, ProcessIdentity};

    let process = |pid: u32, exe: &str| {
        let mut process = finding().process.unwrap();
        process.identity = ProcessIdentity { pid, start_time: 1 };
        process.exe = Some(exe.to_owned());
        process
    };
    let accepts_with = |user: Process, writer: Process, unchanged: &[u32]| {
        let mut finding = finding();
        finding.kind = Kind::LibraryLoaded;
        (finding.process, finding.writer) = (Some(user), Some(writer));
        let unchanged = unchanged.iter().map(|&pid| ProcessIdentity { pid, start_time: 1 });
        finding.from_image = Some(unchanged.collect());
        accepts(&rule("x", ACCEPT, "self_written = true"), &finding)
    };
    let app = |pid| process(pid, "/usr/bin/app");
    assert!(accepts_with(app(7), app(7), &[7]));
    assert!(accepts_with(app(7), app(8), &[7, 8]), "an earlier run of it");
    assert!(!accepts_with(app(7), app(8), &[7]), "a changed program");
    assert!(!accepts_with(app(7), process(8, "/bin/cp"), &[7, 8]));
    for interpreter in ["/usr/bin/python3.11", "/bin/sh", "/bin/busybox", "/usr/bin/java"] {
        assert!(!accepts_with(process(7, interpreter), process(7, interpreter), &[7]));
    }
    // The process of an execution is the new program: its parent has executed it.
    let mut executed = finding();
    executed.kind = Kind::ExecNew;
    let mut new = process(9, "/opt/app/new");
    new.ancestors[0].identity = ProcessIdentity { pid: 7, start_time: 1 };
    new.ancestors[0].exe = Some("/usr/bin/app".to_owned());
    (executed.process, executed.writer) = (Some(new), Some(app(7)));
    executed.from_image = Some(vec![ProcessIdentity { pid: 7, start_time: 1 }]);
    let itself = rule("x", ACCEPT, "self_written = true");
    assert!(accepts(&itself, &executed));
    executed.writer = Some(process(7, "/opt/app/new"));
    assert!(!accepts(&itself, &executed));
}

/// A profile with one rule.
fn profile(id: &str, more: &str, match_: &str) -> String {
    format!(
        "about = \"tests\"\n[[rule]]\nid = \"{id}\"\nreason = \"r\"\nexpires = \"never\"\n{more}\n\
         [rule.match]\n{match_}\n"
    )
}

#[test]
fn profiles_come_after_the_files_and_are_exceptions_outside_of_sessions_only() {
    let directory = tempfile::tempdir().unwrap();
    let baselines = directory.path().join("baselines");
    std::fs::create_dir(&baselines).unwrap();
    let write = |name: &str, text: &str| std::fs::write(baselines.join(name), text).unwrap();
    let exception = "effect = \"accept\"\nreproduce = \"run it\"";
    write("npm.toml", &profile("npm.modules", exception, "kind = [\"library.loaded\"]"));
    write("apt.toml", &profile("apt.files", exception, "kind = [\"file.added\"]"));
    std::fs::write(directory.path().join("a.toml"), rule("own", ACCEPT, "kind = [\"exec.new\"]"))
        .unwrap();
    let from = |profiles: &[&str]| PolicyFiles {
        profiles: profiles.iter().map(|name| (*name).to_owned()).collect(),
        profile_dir: baselines.clone(),
        ..PolicyFiles::of(directory.path())
    };
    assert_eq!(profile_names(&baselines).unwrap(), ["apt", "npm"]);
    let loaded = read(&from(&["npm"]), Owners::Own).unwrap();
    let ids: Vec<&str> = loaded.rules.rules().iter().map(|rule| &*rule.id).collect();
    assert_eq!(ids, ["own", "npm.modules"]);
    let profiles = loaded.files.iter().filter_map(|file| file.profile.as_deref());
    assert_eq!(profiles.collect::<Vec<_>>(), ["npm"]);
    let digest = |profiles: &[&str]| read(&from(profiles), Owners::Own).unwrap().digest;
    assert_ne!(digest(&["npm"]), digest(&[]));

    let refused = |profile: &str| read(&from(&[profile]), Owners::Own).unwrap_err().to_string();
    assert!(refused("yarn").contains("there is no profile `yarn`: apt, npm"));
    assert!(refused("../a").contains("there is no profile `../a`"));
    for (more, match_, expected) in [
        ("effect = \"report\"\nreproduce = \"x\"", "user = [0]", "a profile has exceptions only"),
        ("effect = \"accept\"", "user = [0]", "`reproduce` is missing"),
        (exception, "user = [0]\nsession = \"any\"", "does not accept what happened in sessions"),
    ] {
        write("bad.toml", &profile("bad.x", more, match_));
        assert!(refused("bad").contains(expected), "{}", refused("bad"));
    }
    write("bad.toml", &profile("other.x", exception, "user = [0]"));
    assert!(refused("bad").contains("begins with `bad.`"));
    write("bad.toml", &profile("bad.x", exception, "user = [0]").replace("about", "version"));
    assert!(refused("bad").contains("a profile has no `version`"));
}

#[test]
fn a_container_asks_by_a_label_for_a_profile_that_the_node_allows() {
    let directory = tempfile::tempdir().unwrap();
    let exception = "effect = \"accept\"\nreproduce = \"run it\"";
    for name in ["npm", "pip"] {
        let text = profile(&format!("{name}.all"), exception, "kind = [\"exec.*\"]");
        std::fs::write(directory.path().join(format!("{name}.toml")), text).unwrap();
    }
    let from = |profiles: &[&str], container_profiles: &[&str]| {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        let from = PolicyFiles {
            profiles: names(profiles),
            container_profiles: names(container_profiles),
            profile_dir: directory.path().into(),
            ..PolicyFiles::of(&directory.path().join("none"))
        };
        Policy::rehearsed(&read(&from, Owners::Own).unwrap())
    };
    let labelled = |label: Option<&str>| {
        let mut finding = finding();
        let container = finding.container.as_mut().unwrap();
        let labels = label.map(|label| ("driftd.io/profile".to_owned(), label.to_owned()));
        container.labels = labels.into_iter().collect::<std::collections::BTreeMap<_, _>>().into();
        finding
    };
    let accepts = |policy: &Policy, label: Option<&str>| {
        let finding = labelled(label);
        policy.decide(&subject(&finding), now()).verdict.is_accept()
    };
    let policy = from(&[], &["npm"]);
    for (label, expected) in [
        (Some("npm"), true),
        (Some("pip,npm"), true),
        (Some("npm,pip"), true),
        (Some("apt,npm,pip"), true),
        (Some("pip"), false),
        (Some("npm2"), false),
        (None, false),
    ] {
        assert_eq!(accepts(&policy, label), expected, "{label:?}");
    }
    // By default a container may ask for nothing; and what holds for all needs no label.
    assert!(!accepts(&from(&[], &[]), Some("npm")));
    assert!(accepts(&from(&["npm"], &["npm"]), None));
}

#[test]
fn with_a_key_only_a_signed_set_is_taken_and_no_file_may_be_left_out_or_added() {
    let directory = tempfile::tempdir().unwrap();
    let keys = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    let sign = |names: &[&str]| {
        let mut list = String::new();
        for name in names {
            let text = std::fs::read(directory.path().join(name)).unwrap();
            let hash: String = <sha2::Sha256 as sha2::Digest>::digest(&text)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            list += &format!("{hash}  {name}\n");
        }
        let comment = Some("set 7");
        let signature =
            minisign::sign(None, &keys.sk, list.as_bytes(), comment, None).unwrap().into_string();
        write("SHA256SUMS", &list);
        write("SHA256SUMS.minisig", &signature);
    };
    let from =
        |key: &str| PolicyFiles { public_key: key.to_owned(), ..PolicyFiles::of(directory.path()) };
    let key = keys.pk.to_base64();
    let refused = || read(&from(&key), Owners::Own).unwrap_err().to_string();
    write("a.toml", &rule("a", ACCEPT, "kind = [\"exec.new\"]"));
    write("b.toml", &rule("b", ACCEPT, "kind = [\"exec.new\"]"));
    assert!(refused().contains("SHA256SUMS: cannot be read"), "{}", refused());
    sign(&["a.toml", "b.toml"]);
    let loaded = read(&from(&key), Owners::Own).unwrap();
    assert_eq!((loaded.rules.rules().len(), loaded.signed.as_deref()), (2, Some("set 7")));
    // Without a key, no signature is needed.
    assert_eq!(read(&from(""), Owners::Own).unwrap().signed, None);

    write("c.toml", &rule("c", ACCEPT, "kind = [\"exec.new\"]"));
    assert!(refused().contains("c.toml: is not signed"), "{}", refused());
    sign(&["a.toml", "b.toml", "c.toml"]);
    std::fs::remove_file(directory.path().join("c.toml")).unwrap();
    assert!(refused().contains("names a file that is not there: c.toml"), "{}", refused());
    sign(&["a.toml", "b.toml"]);
    write("b.toml", &rule("b", REPORT, "kind = [\"exec.new\"]"));
    assert!(refused().contains("b.toml: is not the file that SHA256SUMS names"), "{}", refused());
    let list = std::fs::read_to_string(directory.path().join("SHA256SUMS")).unwrap();
    write("SHA256SUMS", &list.replace("b.toml", "d.toml"));
    assert!(refused().contains("does not belong to SHA256SUMS"), "{}", refused());
    sign(&["a.toml", "b.toml"]);
    let other = minisign::KeyPair::generate_unencrypted_keypair().unwrap().pk.to_base64();
    let refused = |key: &str| read(&from(key), Owners::Own).unwrap_err().to_string();
    assert!(refused(&other).contains("does not belong to SHA256SUMS and policy.public_key"));
    assert!(refused("abc").contains("policy.public_key is no public key of minisign"));
}

mod suggestions {
    use super::super::suggest::{By, Selected, Suggestion, suggest};
    use super::*;
    use crate::model::{Ancestor, Member, Process, ProcessIdentity, RootfsPath, finding};

    fn sample() -> Finding {
        let mut sample: Finding =
            serde_json::from_str(include_str!("../../tests/data/finding.json")).unwrap();
        (sample.session, sample.writer) = (None, None);
        sample
    }

    fn process(pid: u32, exe: &str, above: Option<(u32, &str)>) -> Process {
        let identity = |pid| ProcessIdentity { pid, start_time: 1 };
        let ancestors = above.into_iter().map(|(pid, exe)| Ancestor {
            identity: identity(pid),
            exe: Some(exe.to_owned()),
            argv: None,
            is_proven_inside: false,
        });
        Process {
            identity: identity(pid),
            exe: Some(exe.to_owned()),
            argv: None,
            uid: Some(0),
            tty: None,
            root: None,
            ancestors: ancestors.collect(),
        }
    }

    fn member(finding: &Finding, path: &str, content: u8) -> Member {
        Member {
            schema: finding::MEMBER_SCHEMA.to_owned(),
            path: RootfsPath::new(path).unwrap(),
            kind: finding.kind,
            blake3: Some(crate::model::Blake3Hash([content; 32])),
            first_seen: finding.first_seen,
            last_seen: finding.last_seen,
            removed: false,
        }
    }

    fn suggested(selected: &[Selected]) -> (Suggestion, Policy) {
        let suggestion = suggest(selected, "2026-11-30T12:00:00Z".parse().unwrap());
        let mut text = String::new();
        for proposed in &suggestion.rules {
            let mut proposed = proposed.clone();
            "tried".clone_into(&mut proposed.rule.reason);
            text += &proposed.to_toml().unwrap();
        }
        let loaded = parse(Path::new("/p"), vec![file("s.toml", &text)]).unwrap();
        (suggestion, Policy::rehearsed(&loaded))
    }

    fn accepts(policy: &Policy, finding: &Finding) -> bool {
        let severity = finding.severity;
        let subject = Subject {
            finding,
            severity,
            session: None,
            may_be_of_session: false,
            is_unproven: false,
        };
        policy.decide(&subject, Timestamp::now()).verdict.is_accept()
    }

    #[test]
    fn a_content_is_accepted_in_its_image_and_no_other_content_is() {
        let one = sample();
        let (suggestion, policy) =
            suggested(&[Selected { finding: one.clone(), members: Vec::new() }]);
        assert_eq!(suggestion.rules.len(), 1);
        assert_eq!(suggestion.rules[0].by, By::Content);
        assert!(suggestion.rules[0].to_toml().unwrap().contains("expires = 2027-02-28"));
        assert!(accepts(&policy, &one));
        let mut other = one.clone();
        other.file.as_mut().unwrap().blake3 = Some(crate::model::Blake3Hash([9; 32]));
        assert!(!accepts(&policy, &other));
        let mut elsewhere = one;
        elsewhere.image.manifest_digest = None;
        assert!(!accepts(&policy, &elsewhere));
    }

    #[test]
    fn many_contents_are_accepted_by_the_images_program_and_by_their_generated_names() {
        let mut steps = sample();
        (steps.kind, steps.files) = (Kind::ExecInterpreted, Some(30));
        let runner = process(70, "/bin/sh", Some((60, "/bin/runner")));
        steps.process = Some(runner);
        steps.from_image = Some(vec![ProcessIdentity { pid: 60, start_time: 1 }]);
        let path = |number: u8| format!("/home/runner/_temp/{number}.sh");
        let members: Vec<Member> =
            (0..30).map(|number| member(&steps, &path(number), number)).collect();
        steps.file.as_mut().unwrap().path = members[0].path.clone();
        let (suggestion, policy) = suggested(&[Selected { finding: steps.clone(), members }]);
        assert_eq!(suggestion.rules.len(), 1, "{suggestion:#?}");
        assert_eq!(suggestion.rules[0].by, By::Program);
        let text = suggestion.rules[0].to_toml().unwrap();
        assert!(text.contains("/home/runner/_temp/*.sh"), "{text}");
        let at = |path: &str, kind| {
            let mut other = steps.clone();
            other.kind = kind;
            let file = other.file.as_mut().unwrap();
            (file.path, file.blake3) = (RootfsPath::new(path).unwrap(), None);
            other
        };
        assert!(accepts(&policy, &at("/home/runner/_temp/99.sh", Kind::ExecInterpreted)));
        assert!(!accepts(&policy, &at("/home/runner/_temp/99.sh", Kind::ExecNew)));
        assert!(!accepts(&policy, &at("/home/runner/_temp/99", Kind::ExecInterpreted)));
        assert!(!accepts(&policy, &at("/tmp/99.sh", Kind::ExecInterpreted)));
        let mut by_other = at("/home/runner/_temp/99.sh", Kind::ExecInterpreted);
        by_other.from_image = Some(Vec::new());
        assert!(!accepts(&policy, &by_other), "a runner that is not the image's");
    }

    #[test]
    fn what_happened_in_a_session_is_never_proposed() {
        let mut by_hand = sample();
        by_hand.session = Some("00112233445566778899aabbccddeeff".parse().unwrap());
        let (suggestion, _) = suggested(&[Selected { finding: by_hand, members: Vec::new() }]);
        assert!(suggestion.rules.is_empty());
        assert_eq!(suggestion.left[0].1, "it happened in a session");
    }

    #[test]
    fn hostile_names_are_text_and_no_patterns() {
        let mut hostile = sample();
        hostile.image.manifest_digest = None;
        hostile.from_image = None;
        let name = "/tmp/x[a]*\"\n{b,c}";
        hostile.file.as_mut().unwrap().path = RootfsPath::new(name).unwrap();
        let (suggestion, policy) =
            suggested(&[Selected { finding: hostile.clone(), members: Vec::new() }]);
        assert_eq!(suggestion.rules[0].by, By::Path);
        assert!(accepts(&policy, &hostile));
        hostile.file.as_mut().unwrap().path = RootfsPath::new("/tmp/xaother").unwrap();
        assert!(!accepts(&policy, &hostile));
    }
}

#[test]
fn the_schema_names_each_key() {
    let schema = schema().to_string();
    for key in ["version", "reason", "expires", "pod_namespace", "from_image", "within"] {
        assert!(schema.contains(&format!("\"{key}\"")), "{key}");
    }
    assert!(schema.contains("\"additionalProperties\":false"), "an unknown key is a fault");
}

/// Conditions, as many as rules of people have.
fn some_conditions() -> impl Strategy<Value = String> {
    let kind = prop::sample::select(vec!["", "kind = [\"exec.*\"]\n", "kind = [\"file.added\"]\n"]);
    let path = prop::sample::select(vec![
        "",
        "path = [\"/opt/**\"]\n",
        "path = [\"/opt/a\", \"/tmp/*\"]\n",
        "path = [\"/usr/bin/*\"]\n",
    ]);
    let image = prop::sample::select(vec![
        "",
        "image = [\"registry.example/*\"]\n",
        "image = [\"nginx\", \"registry.example/shop\"]\n",
    ]);
    let content = prop::sample::select(vec![
        String::new(),
        format!("content = [\"blake3:{}\"]\n", "7".repeat(64)),
    ]);
    let user = prop::sample::select(vec!["", "user = [0]\n"]);
    (kind, path, image, content, user).prop_map(|(kind, path, image, content, user)| {
        format!("everything = true\n{kind}{path}{image}{content}{user}")
    })
}

fn some_rule() -> impl Strategy<Value = (String, String)> {
    let head = prop::sample::select(vec![
        ACCEPT,
        REPORT,
        "effect = \"severity\"\nseverity = \"low\"",
        "effect = \"report\"\nanswer = [\"kill\"]",
        "effect = \"report\"\npinned = true",
    ]);
    (head, some_conditions()).prop_map(|(head, conditions)| (head.to_owned(), conditions))
}

fn some_finding() -> impl Strategy<Value = Finding> {
    let kind = prop::sample::select(vec![Kind::ExecNew, Kind::FileAdded, Kind::LibraryLoaded]);
    let path = prop::sample::select(vec!["/opt/a", "/opt/b/c", "/tmp/x", "/usr/bin/curl"]);
    let image =
        prop::sample::select(vec!["docker.io/library/nginx:1", "registry.example/shop:1.4"]);
    let content = prop::sample::select(vec!["3", "7"]);
    let user = prop::option::of(0_u32..2);
    (kind, path, image, content, user).prop_map(|(kind, path, image, content, user)| {
        let mut finding = finding();
        (finding.kind, finding.severity) = (kind, kind.severity());
        finding.image.name = Some(image.to_owned());
        let file = finding.file.as_mut().unwrap();
        file.path = RootfsPath::new(path).unwrap();
        file.blake3 = Some(content.repeat(64).parse().unwrap());
        finding.process.as_mut().unwrap().uid = user;
        finding
    })
}

fn text_of(rules: &[(String, String)], first: usize) -> String {
    let one = |(number, (head, conditions)): (usize, &(String, String))| {
        rule(&format!("r{}", first + number), head, conditions)
    };
    rules.iter().enumerate().map(one).collect()
}

proptest! {
    /// The index leaves out no rule that matches.
    #[test]
    fn the_index_decides_as_a_look_at_every_rule_does(
        rules in prop::collection::vec(some_rule(), 0..12),
        finding in some_finding(),
    ) {
        let loaded = loaded(&text_of(&rules, 0));
        let subject = subject(&finding);
        let matched = loaded.rules.decide(&subject, now());
        let named: Vec<Arc<str>> = loaded
            .rules
            .explain(&subject, now())
            .filter(|(_, reason)| *reason == Reason::Matches)
            .map(|(rule, _)| Arc::clone(&rule.id))
            .collect();
        let found: Vec<Arc<str>> = matched.accepted_by.into_iter().chain(matched.rules).collect();
        prop_assert_eq!(found, named);
    }

    /// One exception more changes the decision about nothing that it does not match.
    #[test]
    fn an_exception_hides_nothing_outside_of_its_match(
        rules in prop::collection::vec(some_rule(), 0..8),
        conditions in some_conditions(),
        at in 0_usize..8,
        finding in some_finding(),
    ) {
        let before = policy(&text_of(&rules, 0));
        let exception = (ACCEPT.to_owned(), conditions);
        let (first, rest) = rules.split_at(at.min(rules.len()));
        let text = text_of(first, 0)
            + &rule("added", &exception.0, &exception.1)
            + &text_of(rest, first.len());
        let after = policy(&text);
        let subject = subject(&finding);
        let alone = accepts(&rule("added", &exception.0, &exception.1), &finding);
        let (one, other) = (before.decide(&subject, now()), after.decide(&subject, now()));
        if !alone {
            prop_assert_eq!(one, other);
        } else if other.verdict.rule.as_deref() != Some("added") {
            // A pinned rule or an earlier exception comes first.
            prop_assert_eq!(one, other);
        }
    }

    /// Where at most one rule matches, the order of the files makes no difference.
    #[test]
    fn the_order_of_files_means_nothing_where_no_rules_overlap(
        rules in prop::collection::vec(some_rule(), 1..6),
        finding in some_finding(),
    ) {
        let files: Vec<PolicyFile> = rules
            .iter()
            .enumerate()
            .map(|(number, one)| file(&format!("{number}.toml"), &text_of(std::slice::from_ref(one), number)))
            .collect();
        let decide = |files: Vec<PolicyFile>| {
            parse(Path::new("/p"), files).unwrap().rules.decide(&subject(&finding), now())
        };
        let matching = files.iter().filter(|one| {
            let one = decide(vec![(*one).clone()]);
            one != Matched::default()
        });
        if matching.count() <= 1 {
            let backwards: Vec<PolicyFile> = files.iter().rev().cloned().collect();
            prop_assert_eq!(decide(files), decide(backwards));
        }
    }
}

#[test]
fn denial_is_for_what_is_run_and_by_what_is_known_before() {
    let fault = |answer: &str, conditions: &str| {
        let text = rule("x", &format!("{REPORT}\nanswer = [\"{answer}\"]"), conditions);
        parse(Path::new("/p"), vec![file("a.toml", &text)]).err().map(|err| err.to_string())
    };
    assert_eq!(fault("deny", "kind = [\"exec.*\"]"), None);
    assert_eq!(fault("deny", "path = [\"/tmp/**\"]"), None);
    assert_eq!(fault("kill-process", "argv = [\"curl *\"]"), None);
    for (conditions, expected) in [
        ("argv = [\"curl *\"]", "`deny` does not go with `argv`"),
        ("kind = [\"file.*\"]", "`deny` is for code that is run"),
    ] {
        let fault = fault("deny", conditions).expect(conditions);
        assert!(fault.contains(expected), "{fault}");
    }
    let text = rule("x", &format!("{ACCEPT}\nenforce = \"on\""), "path = [\"/tmp/**\"]");
    let fault = parse(Path::new("/p"), vec![file("a.toml", &text)]).unwrap_err().to_string();
    assert!(fault.contains("`enforce` is for rules with answers"), "{fault}");
}

#[test]
fn a_rule_may_be_enforced_or_rehearsed_by_itself_and_the_node_can_switch_all_off() {
    for (node, of_rule, expected) in [
        (Enforce::DryRun, "on", Some(false)),
        (Enforce::On, "dry-run", Some(true)),
        (Enforce::On, "off", None),
        (Enforce::Off, "on", None),
    ] {
        let head = format!("{REPORT}\nanswer = [\"kill\"]\nenforce = \"{of_rule}\"");
        let rules = loaded(&rule("x", &head, "kind = [\"exec.*\"]"));
        let policy = Policy { enforce: node, ..Policy::of(&Config::default(), Some(&rules)) };
        let verdict = policy.decide(&subject(&finding()), now()).verdict;
        let dry_run = verdict.answers.first().map(|answer| answer.dry_run);
        assert_eq!(dry_run, expected, "{node:?} {of_rule}");
    }
}

#[test]
fn an_exception_for_a_content_accepts_nothing_whose_content_is_not_proven() {
    let drift = finding();
    let blake3 = drift.file.as_ref().and_then(|file| file.blake3).expect("the example has one");
    let content = format!("content = [\"blake3:{blake3}\"]");
    let unproven = |text: &str| {
        let subject = Subject { is_unproven: true, ..subject(&drift) };
        policy(text).decide(&subject, now()).verdict
    };
    let exception = rule("x", ACCEPT, &content);
    assert!(accepts(&exception, &drift));
    assert_eq!(unproven(&exception).disposition, Disposition::Report);
    // What is known to be bad is answered in doubt.
    let kill = rule("x", &format!("{REPORT}\nanswer = [\"kill\"]"), &content);
    assert_eq!(unproven(&kill).disposition, Disposition::Kill);
    let path = rule("x", ACCEPT, "path = [\"/**\"]\neverything = true");
    assert_eq!(unproven(&path).disposition, Disposition::Accept);
}

#[test]
fn a_hook_is_named_by_the_rule_that_asks_for_it() {
    let fault = |text: &str| {
        let files = vec![PolicyFile::new("a.toml", rule("h", text, "kind = [\"exec.*\"]"))];
        parse("".as_ref(), files).map(drop).unwrap_err().to_string()
    };
    let missing = fault("effect = \"report\"\nanswer = [\"hook\"]");
    assert!(missing.contains("`hook` is missing: which hook of the settings"), "{missing}");
    let alone = fault("effect = \"report\"\nanswer = [\"kill\"]\nhook = \"page\"");
    assert!(alone.contains("`hook` needs `answer = [\"hook\"]`"), "{alone}");

    let hook = |id: &str, name: &str| {
        let effect =
            format!("effect = \"report\"\nanswer = [\"hook\", \"kill\"]\nhook = \"{name}\"");
        rule(id, &effect, "kind = [\"exec.*\"]")
    };
    for (enforce, disposition, dry_run) in
        [(Enforce::DryRun, Disposition::Report, true), (Enforce::On, Disposition::Kill, false)]
    {
        let policy = Policy { enforce, ..policy(&(hook("a", "page") + &hook("b", "ticket"))) };
        let verdict = policy.decide(&subject(&finding()), now()).verdict;
        let answers: Vec<(&str, &str, Option<&str>, bool)> = verdict
            .answers
            .iter()
            .map(|one| (one.action.name(), &*one.rule, one.hook.as_deref(), one.dry_run))
            .collect();
        let expected = [
            ("hook", "a", Some("page"), dry_run),
            ("hook", "b", Some("ticket"), dry_run),
            ("kill", "a", None, dry_run),
            ("kill", "b", None, dry_run),
        ];
        assert_eq!(answers, expected);
        assert_eq!(verdict.disposition, disposition);
    }
}

#[test]
fn a_rule_with_a_hook_that_the_settings_do_not_have_is_a_fault_with_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let text = rule(
        "h",
        "effect = \"report\"\nanswer = [\"hook\"]\nhook = \"pgae\"",
        "kind = [\"exec.*\"]",
    );
    std::fs::write(directory.path().join("10.toml"), text).unwrap();
    let mut from = PolicyFiles::of(directory.path());
    let without_settings = super::read(&from, Owners::Any).unwrap();
    assert_eq!(without_settings.rules.rules()[0].hook.as_deref(), Some("pgae"));
    from.hooks = Some(["page".to_owned()].into());
    let fault = super::read(&from, Owners::Any).unwrap_err().to_string();
    assert!(fault.contains("10.toml:1:1: rule `h`: the settings have no hook `pgae`"), "{fault}");
    assert!(fault.contains("there is: page"), "{fault}");
    from.hooks = Some(["pgae".to_owned()].into());
    assert_eq!(super::read(&from, Owners::Any).map(drop), Ok(()));
}
