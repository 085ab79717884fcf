//! A recorded incident in all three forms.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::Value;

use crate::incident::{CONTAINER, SESSION, records};
use crate::program::Recorded;

/// The page without its style sheet, whose hash is in the security policy.
fn without_style(page: &str) -> String {
    let (before, rest) = page.split_once("<style>").unwrap();
    let (_, after) = rest.split_once("</style>").unwrap();
    let (start, rest) = before.split_once("sha256-").unwrap();
    let (_, end) = rest.split_once("&#39;").unwrap();
    format!("{start}sha256-HASH&#39;{end}<style>STYLE</style>{after}")
}

#[test]
fn a_recorded_incident_as_people_read_it() {
    let recorded = Recorded::of(records());
    insta::assert_snapshot!("html", without_style(&recorded.settled(&[CONTAINER])));
    insta::assert_snapshot!("markdown", recorded.settled(&[CONTAINER, "-o", "md"]));
    insta::assert_snapshot!("session", recorded.settled(&[SESSION, "-o", "md"]));
}

#[test]
fn a_recorded_incident_as_programs_read_it() {
    let recorded = Recorded::of(records());
    let mut json: Value =
        serde_json::from_str(&recorded.settled(&[CONTAINER, "-o", "json"])).unwrap();
    assert_eq!(json["schema"], "driftd.report/v1");
    json["made"]["at"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();
    json["made"]["at"] = "TIME".into();
    assert_eq!(json["made"]["by"], env!("CARGO_PKG_VERSION"));
    json["made"]["by"] = "VERSION".into();
    let schemas = |list: &str, key: &str| -> Vec<String> {
        let all = json[list].as_array().unwrap().iter();
        let schema = |one: &Value| {
            if key.is_empty() { one["schema"].clone() } else { one[key]["schema"].clone() }
        };
        all.map(|one| schema(one).as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(schemas("sessions", "session"), ["driftd.session/v1"; 3]);
    assert_eq!(schemas("findings", "finding"), ["driftd.finding/v1"; 6]);
    assert_eq!(schemas("responses", ""), ["driftd.response/v1"; 2]);
    assert_eq!(schemas("gaps", ""), ["driftd.gap/v1"; 3]);
    // What has a schema of its own is compared elsewhere.
    for list in ["sessions", "findings", "responses", "gaps"] {
        let rest = json[list].as_array().unwrap().iter().map(|one| match list {
            "sessions" => one["session"]["id"].clone(),
            "findings" => one["finding"]["id"].clone(),
            _ => one.get("name").or(one["outcome"].get("action")).unwrap().clone(),
        });
        json[list] = rest.collect();
    }
    insta::assert_snapshot!("json", serde_json::to_string_pretty(&json).unwrap());
}

#[test]
fn a_period_holds_what_lasted_into_it() {
    let recorded = Recorded::of(records());
    let report = |arguments: &[&str]| -> Value {
        serde_json::from_str(&recorded.report(&[&[CONTAINER, "-o", "json"], arguments].concat()))
            .unwrap()
    };
    let names = |report: &Value| -> Vec<String> {
        let id = |one: &Value| one["finding"]["file"]["path"].as_str().unwrap_or("-").to_owned();
        report["findings"].as_array().unwrap().iter().map(id).collect()
    };
    let late = report(&["--since", "2026-11-20T10:04:15Z"]);
    // It was seen again after that time.
    assert_eq!(names(&late), ["/tmp/.x"]);
    let counts = |key: &str| late["counts"][key].as_u64().unwrap();
    // The session that was open then, the shell; the gap that was not over then, and the next.
    assert_eq!(["sessions", "gaps", "responses"].map(counts), [2, 2, 1]);
    assert_eq!(late["period"]["first"], "2026-11-20T10:04:15Z");
    let early = report(&["--until", "2026-11-19"]);
    assert_eq!((names(&early).len(), &early["counts"]["sessions"]), (0, &Value::from(1)));
    let nothing = recorded.report(&[CONTAINER, "--until", "2026-11-01", "-o", "md"]);
    for line in ["Nothing is recorded for this time.", "No session was seen.", "Nothing was found."]
    {
        assert!(nothing.contains(line), "{nothing}");
    }
    let nothing = recorded.report(&[CONTAINER, "--until", "2026-11-01"]);
    assert!(!nothing.contains("<svg") && nothing.contains("Nothing was found."), "{nothing}");
    let wrong =
        recorded.run(&["report", CONTAINER, "--since", "2026-11-20", "--until", "2026-11-19"]);
    assert_eq!(wrong.code, 64, "{wrong:?}");
}

#[test]
fn a_session_brings_its_own_findings_and_what_was_done_about_them() {
    let recorded = Recorded::of(records());
    let report: Value = serde_json::from_str(&recorded.report(&[SESSION, "-o", "json"])).unwrap();
    assert_eq!(report["session_id"].as_str().unwrap(), "a1000000000000000000000000000000");
    let counts = |key: &str| report["counts"][key].as_u64().unwrap();
    let keys = ["sessions", "commands", "findings", "accepted", "responses", "gaps"];
    // Not the shell's finding, not the kill after the session, not the gap after it.
    assert_eq!(keys.map(counts), [1, 6, 5, 0, 1, 2]);
    assert_eq!(report["container"]["id"].as_str().unwrap().get(..12), Some(CONTAINER));
}

#[test]
fn what_is_named_must_be_a_container_or_a_session() {
    let recorded = Recorded::of(records());
    let refused = |arguments: &[&str]| {
        let output = recorded.run(&[&["report"], arguments].concat());
        assert_eq!((output.code, output.out.as_str()), (2, ""), "{output:?}");
        output.err
    };
    let finding = refused(&["02020202"]);
    assert!(
        finding.contains("is a finding") && finding.contains("k8s.io/4f1c0a9be2d7"),
        "{finding}"
    );
    assert!(finding.contains("its session: a10000000000"), "{finding}");
    let unknown = refused(&["nowhere\u{1b}[2J"]);
    assert!(unknown.contains("no container") && unknown.contains("no session"), "{unknown}");
    assert!(!unknown.contains('\u{1b}'), "{unknown}");
}

#[test]
fn a_file_has_the_form_of_its_name_and_is_for_its_owner() {
    let recorded = Recorded::of(records());
    for (name, beginning) in
        [("a.html", "<!doctype html>"), ("b.md", "# "), ("c.json", "{"), ("d", "<!doctype")]
    {
        let file = recorded.dir.path().join(name);
        // An older and longer report is replaced.
        if name == "c.json" {
            fs::write(&file, "x".repeat(1 << 20)).unwrap();
        }
        let printed = recorded.report(&[CONTAINER, "--output", file.to_str().unwrap()]);
        assert_eq!(printed, "");
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with(beginning), "{name}: {}", &text[..40]);
        if name == "c.json" {
            serde_json::from_str::<Value>(&text).unwrap();
        } else {
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{name}");
        }
    }
    let stdout = recorded.report(&[CONTAINER, "-o", "md", "--output", "/dev/stdout"]);
    assert!(stdout.starts_with("# Incident report"), "{stdout}");
    let confused = recorded.run(&["report", CONTAINER, "--output", "json"]);
    assert!(confused.code == 64 && confused.err.contains("-o json"), "{confused:?}");
    let missing = recorded.run(&["report", CONTAINER, "--output", "/no/such/directory/x.html"]);
    assert!(missing.code == 2 && missing.err.contains("/no/such/directory"), "{missing:?}");
}

#[test]
fn times_are_local_if_the_user_asks_for_it() {
    let recorded = Recorded::of(records());
    let page = recorded.run_in("IST-5:30", &["--local-time", "report", CONTAINER]);
    assert_eq!((page.code, page.err.as_str()), (0, ""));
    let found = "<time datetime=\"2026-11-20T10:01:30Z\">2026-11-20 15:31:30 IST</time>";
    assert!(page.out.contains(found), "{}", page.out);
    // The drawing has round times of that zone.
    assert!(page.out.contains(">15:31:00</text>") && !page.out.contains("10:01:00"));
    let utc = recorded.run_in("IST-5:30", &["report", CONTAINER]);
    assert!(utc.out.contains(">10:01:00</text>") && !utc.out.contains("IST"));
}
