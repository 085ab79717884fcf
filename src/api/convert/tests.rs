//! Each message comes back from proto as it was.
//!
//! The samples are the files in `tests/data`, which are the published examples of the JSON.
//! Names are tried one by one, so that a new one cannot be forgotten.

use jiff::Timestamp;
use prost::Message as _;

use super::*;
use crate::api::proto;
use crate::history::{FindingText, Happened, TimelineEntry};
use crate::model::{
    Command, ContainerId, Entry, Exit, FileType, Finding, ImageReference, Incarnation, Interactive,
    Kind, Outcome, Probe, ProbeSource, RootfsPath, Session, SessionState, Severity,
};
use crate::pipeline::{Diff, Difference, DifferenceKind};
use crate::respond::Response;

fn sample() -> Finding {
    serde_json::from_str(include_str!("../../../tests/data/finding.json")).unwrap()
}

fn stored(finding: &Finding) -> FindingText {
    FindingText(serde_json::to_string(finding).unwrap())
}

/// As JSON it comes back as it was, and as a message it has each value of the JSON.
#[track_caller]
fn check(finding: &Finding) {
    let wire = stored_finding_to_proto(stored(finding), true).unwrap().encode_to_vec();
    let read = proto::Finding::decode(&wire[..]).unwrap();
    assert_eq!(finding_from_proto(read).as_ref(), Ok(finding));

    let message = stored_finding_to_proto(stored(finding), false).unwrap();
    assert_eq!(message, finding_to_proto(finding.clone()));
    let shown = format!("{message:?}");
    let mut left = vec![("", serde_json::to_value(finding).unwrap())];
    let mut keys = Vec::new();
    while let Some((key, value)) = left.pop() {
        let expected = match value {
            serde_json::Value::Object(values) => {
                for (key, value) in values {
                    keys.push(key.clone());
                    left.push((String::leak(key), value));
                }
                continue;
            }
            serde_json::Value::Array(values) => {
                left.extend(values.into_iter().map(|value| (key, value)));
                continue;
            }
            serde_json::Value::Null => continue,
            // The message has them in other forms: no schema, times, and bytes for a path.
            _ if matches!(key, "schema" | "first_seen" | "last_seen" | "at" | "created_at") => {
                continue;
            }
            serde_json::Value::String(_) if key == "path" || key.ends_with("_bytes") => continue,
            serde_json::Value::String(text) if key == "severity" => {
                format!("severity: {}{}", text[..1].to_uppercase(), &text[1..])
            }
            // In memory, what a process says is escaped.
            serde_json::Value::String(text) if matches!(key, "exe" | "argv" | "root") => {
                format!("{:?}", crate::model::printable(text.as_bytes()))
            }
            serde_json::Value::String(text) => format!("{text:?}"),
            other => other.to_string(),
        };
        assert!(shown.contains(&expected), "`{key}` is not in the message: {shown}");
    }
    assert!(keys.len() > 60, "{keys:?}");
}

#[test]
fn h15_a_diff_of_any_size_comes_in_messages_that_can_be_read() {
    let differences: Vec<Difference> = (0..20_000)
        .map(|number| Difference {
            path: RootfsPath::new(format!("/{number:05}{}", "x".repeat(4000))).unwrap(),
            change: DifferenceKind::Added,
            finding: None,
        })
        .collect();
    let container = ContainerId::new("default", "c1");
    let diff = Diff { container, differences, incomplete: false };
    let one = diff_to_proto(&diff);
    assert!(one.encoded_len() < 64 << 20 && one.incomplete, "{}", one.encoded_len());
    assert!(one.differences.len() > 8000);
    let mut all = Vec::new();
    for page in diff_to_protos(&diff) {
        assert!(page.encoded_len() < 2 << 20 && !page.incomplete);
        all.extend(page.differences);
    }
    let expected: Vec<_> = diff.differences.iter().map(difference_to_proto).collect();
    assert_eq!(all, expected);
    let small = Diff { differences: diff.differences[..3].to_vec(), ..diff.clone() };
    assert!(!diff_to_proto(&small).incomplete);
    let none = Diff { differences: Vec::new(), incomplete: true, ..diff };
    assert_eq!(diff_to_protos(&none).map(|page| page.incomplete).collect::<Vec<_>>(), [true]);
}

#[test]
fn a_finding_survives_the_wire() {
    let full = sample();
    check(&full);

    let mut bare = full.clone();
    (bare.file, bare.expected, bare.process) = (None, None, None);
    (bare.session, bare.outcome) = (None, None);
    bare.container.as_mut().unwrap().pod = None;
    bare.image = ImageReference::default();
    check(&bare);

    let mut of_a_layer = full.clone();
    (of_a_layer.container, of_a_layer.attack) = (None, None);
    of_a_layer.detail = Some("the layer's directory".into());
    check(&of_a_layer);

    let mut responded = full.clone();
    responded.outcome = Some(Outcome {
        action: "kill".into(),
        succeeded: false,
        gone: true,
        message: "no such task".into(),
        restarter: None,
        at: Timestamp::new(-1, -5).unwrap(),
    });
    responded.story = Some(responded.id);
    responded.run = Some(Incarnation { pid: 7, start_time: Some(700), created_at: None });
    responded.transaction = Some(responded.id);
    responded.files = Some(3);
    responded.invoked_as = Some("/bin/x".into());
    check(&responded);

    // Unknown arguments are not the same as no arguments.
    let mut without_arguments = full;
    without_arguments.process.as_mut().unwrap().argv = Some(vec![]);
    check(&without_arguments);
    without_arguments.process.as_mut().unwrap().argv = None;
    check(&without_arguments);
}

#[test]
fn names_that_are_not_utf8_survive_the_wire_and_json() {
    let mut finding = sample();
    let odd = RootfsPath::new(b"/tmp/\xff\x1b[2J\n\\x".as_slice()).unwrap();
    finding.file.as_mut().unwrap().path = odd.clone();
    finding.expected.as_mut().unwrap().path = odd;
    check(&finding);
    let json = serde_json::to_string(&finding).unwrap();
    assert_eq!(serde_json::from_str::<Finding>(&json).unwrap(), finding);
}

#[test]
fn every_name_survives_the_wire() {
    for kind in Kind::ALL {
        for severity in Severity::ALL {
            let mut finding = sample();
            (finding.kind, finding.severity) = (*kind, *severity);
            check(&finding);
        }
    }
    for file_type in [
        FileType::Regular,
        FileType::Directory,
        FileType::Symlink,
        FileType::CharDevice,
        FileType::BlockDevice,
        FileType::Fifo,
        FileType::Socket,
    ] {
        let json = serde_json::to_value(file_type).unwrap();
        assert_eq!(json, file_type_name(file_type));
        let mut finding = sample();
        finding.file.as_mut().unwrap().file_type = file_type;
        check(&finding);
    }
}

fn session() -> Session {
    serde_json::from_str(include_str!("../../../tests/data/session.json")).unwrap()
}

fn command() -> Command {
    serde_json::from_str(include_str!("../../../tests/data/command.json")).unwrap()
}

#[track_caller]
fn check_entry(what: Happened) {
    let at = "2026-11-20T10:00:00.25Z".parse().unwrap();
    let entry = TimelineEntry { at, what: what.clone() };
    let what = match what {
        Happened::SessionOpened(session) => Happened::SessionOpened(session),
        Happened::Command(command) => Happened::Command(command),
        Happened::Finding(finding) => Happened::Finding(Box::new(stored(&finding))),
        Happened::SessionClosed(session) => Happened::SessionClosed(session),
        Happened::Response(response) => Happened::Response(response),
        Happened::Gap { name, container, detail, until } => {
            Happened::Gap { name, container, detail, until }
        }
    };
    let message = timeline_entry_to_proto(TimelineEntry { at, what }, true).unwrap();
    let read = proto::TimelineEntry::decode(&message.encode_to_vec()[..]).unwrap();
    assert_eq!(timeline_entry_from_proto(read), Ok(Some(entry)));
}

#[test]
fn a_session_survives_the_wire_and_json() {
    let text = include_str!("../../../tests/data/session.json");
    let json: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_value(session()).unwrap(), json, "its schema");
    check_entry(Happened::SessionOpened(Box::new(session())));
    let mut bare = session();
    bare.state = SessionState::Open;
    (bare.client, bare.exec_id, bare.interactive) = (None, None, None);
    (bare.login, bare.requested_by, bare.ended_at, bare.exit) = (None, None, None, None);
    (bare.finding, bare.findings, bare.host) = (None, vec![], vec![]);
    (bare.container.pod, bare.image) = (None, ImageReference::default());
    check_entry(Happened::SessionClosed(Box::new(bare)));
    for entry in Entry::ALL {
        check_entry(Happened::SessionOpened(Box::new(Session { entry: *entry, ..session() })));
    }
    for how in Interactive::ALL {
        let interactive = Some(*how);
        check_entry(Happened::SessionOpened(Box::new(Session { interactive, ..session() })));
    }
    let odd = proto::Session { entry: "window".into(), ..session_to_proto(session()) };
    let err = session_from_proto(odd).unwrap_err().to_string();
    assert!(err.starts_with("`session.entry` is missing or not understood"), "{err}");
}

#[test]
fn commands_and_probes_survive_the_wire_and_json() {
    let json: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/data/command.json")).unwrap();
    assert_eq!(serde_json::to_value(command()).unwrap(), json, "its schema");
    check_entry(Happened::Command(Box::new(command())));
    let mut running = command();
    (running.exe, running.argv, running.ended_at) = (None, None, None);
    running.exit = Some(Exit { code: Some(-1), signal: None });
    check_entry(Happened::Command(Box::new(running)));

    let text = include_str!("../../../tests/data/probe.json");
    let probe: Probe = serde_json::from_str(text).unwrap();
    let json: serde_json::Value = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_value(&probe).unwrap(), json, "its schema");
    for source in ProbeSource::ALL {
        let probe =
            Probe { source: *source, interval_milliseconds: None, reported: true, ..probe.clone() };
        assert_eq!(probe_from_proto(probe_to_proto(probe.clone())), Ok(probe));
    }
    assert_eq!(probe_from_proto(probe_to_proto(probe.clone())), Ok(probe));
}

#[test]
fn every_entry_of_a_timeline_survives_the_wire() {
    let at = "2026-11-20T10:00:00Z".parse().unwrap();
    check_entry(Happened::Finding(Box::new(sample())));
    let whole = Incarnation { pid: 7, start_time: Some(u64::MAX), created_at: Some(at) };
    let bare = Incarnation { start_time: None, created_at: None, ..whole };
    for (finding, incarnation) in
        [(None, None), (Some(sample().id), Some(whole)), (None, Some(bare))]
    {
        check_entry(Happened::Response(Box::new(Response {
            process: None,
            pod: None,
            image: None,
            case: None,
            changed: true,
            ticket: 0,
            incarnation,
            container: ContainerId::new("default", "web"),
            reason: "a\u{1b}b".into(),
            requested_by: "uid 0".into(),
            requested_at: at,
            finding,
            outcome: Outcome {
                action: "kill".into(),
                succeeded: true,
                gone: false,
                message: "killed".into(),
                restarter: None,
                at,
            },
        })));
    }
    for (container, until) in [(None, None), (Some(ContainerId::new("default", "web")), Some(at))] {
        let (name, detail) = ("pipeline_full".to_owned(), "7".to_owned());
        check_entry(Happened::Gap { name, container, detail, until });
    }
    let newer = proto::TimelineEntry { at: Some(time_to_proto(at)), what: None };
    assert_eq!(timeline_entry_from_proto(newer), Ok(None));
}

#[test]
fn a_message_that_is_not_understood_names_the_field() {
    let odd = FindingText(stored(&sample()).0.replace("exec.modified", "exec.odd"));
    let message = stored_finding_to_proto(odd.clone(), true).unwrap();
    let err = finding_from_proto(message).unwrap_err().to_string();
    assert!(err.starts_with("`finding.json` is missing or not understood: "), "{err}");
    assert!(err.contains("exec.odd"), "{err}");
    let err = stored_finding_to_proto(odd, false).unwrap_err().to_string();
    assert!(err.contains("exec.odd"), "{err}");
    // An older daemon does not know that JSON was requested.
    let err = finding_from_proto(finding_to_proto(sample())).unwrap_err().to_string();
    assert!(err.contains("is the other side another version?"), "{err}");
}

#[test]
fn a_difference_survives_the_wire() {
    for change in [
        DifferenceKind::Added,
        DifferenceKind::Modified,
        DifferenceKind::Removed,
        DifferenceKind::Metadata,
        DifferenceKind::Relocated,
    ] {
        for finding in [None, Some((Kind::FileAdded, Severity::Low))] {
            let path = RootfsPath::new(b"/\xfe").unwrap();
            let difference = Difference { path, change, finding };
            let message = difference_to_proto(&difference);
            assert_eq!(difference_from_proto(&message), Ok(difference));
        }
    }
}
