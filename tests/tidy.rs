//! The architecture as a test: which room may use which, and what may happen in one
//! place only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each room with the rooms that it may use. An addition here is an architecture change;
/// give the reason in ARCHITECTURE.md.
const MAY_USE: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("budget", &["model"]),
    ("sys", &["model"]),
    ("pulse", &["sys"]),
    ("threads", &["model", "sys"]),
    ("health", &["pulse", "threads"]),
    ("gate", &["model", "pulse", "sys"]),
    ("config", &["model"]),
    ("policy", &["config", "model"]),
    ("baseline", &["config", "health", "model", "sys"]),
    ("containerd", &["baseline", "config", "health", "model", "sys"]),
    ("watch", &["config", "gate", "health", "model", "pulse", "sys", "threads"]),
    ("detect", &["baseline", "model"]),
    ("inventory", &["baseline", "budget", "model"]),
    ("history", &["health", "model", "respond", "threads"]),
    ("hooks", &["config", "model", "sys"]),
    ("respond", &["containerd", "hooks", "model"]),
    ("evidence", &["config", "health", "history", "model", "respond", "sys", "threads"]),
    (
        "replay",
        &[
            "baseline",
            "config",
            "containerd",
            "health",
            "history",
            "model",
            "pipeline",
            "policy",
            "respond",
            "watch",
        ],
    ),
    (
        "pipeline",
        &[
            "baseline",
            "budget",
            "containerd",
            "detect",
            "health",
            "history",
            "inventory",
            "model",
            "policy",
            "respond",
            "threads",
            "watch",
        ],
    ),
    (
        "api",
        &[
            "baseline",
            "budget",
            "containerd",
            "evidence",
            "health",
            "history",
            "hooks",
            "model",
            "pipeline",
            "policy",
            "respond",
            "sys",
            "threads",
        ],
    ),
    (
        "cli",
        &[
            "api",
            "baseline",
            "config",
            "containerd",
            "daemon",
            "evidence",
            "gate",
            "guardian",
            "health",
            "history",
            "hooks",
            "model",
            "pipeline",
            "policy",
            "replay",
            "respond",
            "sys",
        ],
    ),
    ("guardian", &["pulse", "sys"]),
    ("journal", &["history", "model", "sys"]),
];

/// The same between the wings of `watch`: from the bottom up, each knows only those below it.
const WINGS: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("process", &["core"]),
    ("files", &["core", "process"]),
    ("mounts", &["core", "files", "process"]),
    ("sessions", &["core", "files", "process"]),
    ("code", &["core", "files", "process"]),
    ("exec", &["code", "core", "files", "mounts", "process", "sessions"]),
    ("control", &["core", "exec", "files", "mounts", "process", "sessions"]),
];

/// These connect the rooms and may use all of them.
const WIRING: &[&str] = &["daemon", "lib", "main"];

/// The rooms that wait for sockets. Disks and the kernel are read by plain threads.
const ASYNC: &[&str] =
    &["api", "cli", "containerd", "daemon", "hooks", "journal", "main", "respond"];

struct Source {
    room: String,
    file: PathBuf,
    /// Without comments and without test modules.
    code: String,
}

fn sources() -> Vec<Source> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut directories = vec![src.clone()];
    let mut sources = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let tests_only = path.file_stem().is_some_and(|stem| stem == "tests");
            if path.extension().is_none_or(|extension| extension != "rs") || tests_only {
                continue;
            }
            let file = path.strip_prefix(&src).unwrap().to_path_buf();
            let first = file.components().next().unwrap();
            let room = Path::new(&first).file_stem().unwrap().to_str().unwrap().to_owned();
            let code = code_of(&fs::read_to_string(&path).unwrap());
            sources.push(Source { room, file, code });
        }
    }
    assert!(sources.len() > 20, "only {} files were found", sources.len());
    sources
}

fn code_of(text: &str) -> String {
    let production = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    production
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// The rooms that `code` names: `crate::room`, `crate::{room, other::Thing}`.
fn rooms_named_in(code: &str) -> BTreeSet<String> {
    named_behind("crate::", code)
}

/// What `code` names right behind `path`.
fn named_behind(path: &str, code: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        text.trim_start()
            .chars()
            .take_while(|character| character.is_alphanumeric() || *character == '_')
            .collect()
    };
    let mut rooms = BTreeSet::new();
    for rest in code.split(path).skip(1) {
        let Some(group) = rest.strip_prefix('{') else {
            rooms.insert(word(rest));
            continue;
        };
        // The names at depth one of `{a, b::{c, d}, e}`.
        let mut depth = 1;
        rooms.insert(word(group));
        for (index, character) in group.char_indices() {
            match character {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => {
                    rooms.insert(word(&group[index + 1..]));
                }
                _ => (),
            }
            if depth == 0 {
                break;
            }
        }
    }
    rooms.retain(|room| !room.is_empty());
    rooms
}

#[test]
fn rooms_use_only_the_rooms_they_may() {
    let mut wrong = Vec::new();
    for Source { room, file, code } in sources() {
        if WIRING.contains(&room.as_str()) {
            continue;
        }
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == room) else {
            wrong.push(format!("src/{room} is not in the table of tests/tidy.rs"));
            continue;
        };
        for used in rooms_named_in(&code) {
            let is_room =
                MAY_USE.iter().any(|(name, _)| *name == used) || WIRING.contains(&used.as_str());
            if is_room && used != room && !allowed.contains(&used.as_str()) {
                wrong.push(format!(
                    "src/{} uses crate::{used}, which ARCHITECTURE.md does not allow",
                    file.display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn wings_of_watch_only_know_the_wings_below() {
    let mut wrong = Vec::new();
    for Source { room, file, code } in sources() {
        let parts: Vec<&str> = file.iter().map(|part| part.to_str().unwrap()).collect();
        let [_, wing, _, ..] = parts[..] else { continue };
        if room != "watch" {
            continue;
        }
        let Some((_, allowed)) = WINGS.iter().find(|(name, _)| *name == wing) else {
            wrong.push(format!("src/watch/{wing} is not in the table of tests/tidy.rs"));
            continue;
        };
        let mut used = named_behind("crate::watch::", &code);
        used.extend(named_behind("super::super::", &code));
        used.retain(|used| used != wing && !allowed.contains(&used.as_str()));
        wrong.extend(used.iter().map(|used| format!("src/{} uses {used}", file.display())));
        // Whatever `watch` itself holds is for the rest of the daemon.
        if code.contains("crate::watch;") || code.contains("crate::watch,") {
            wrong.push(format!("src/{} uses watch as a whole", file.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (index, (wing, allowed)) in WINGS.iter().enumerate() {
        let below = &WINGS[..index];
        let is_below = |used: &&str| below.iter().any(|(name, _)| name == used);
        assert!(allowed.iter().all(is_below), "{wing} knows a wing that is not below it");
    }
}

#[track_caller]
fn assert_only_in(what: &str, rooms: &[&str], is_there: impl Fn(&str) -> bool) {
    let elsewhere: Vec<String> = sources()
        .iter()
        .filter(|source| !rooms.contains(&source.room.as_str()) && is_there(&source.code))
        .map(|source| format!("src/{}", source.file.display()))
        .collect();
    assert!(elsewhere.is_empty(), "{what} belongs in {rooms:?}, and is in {elsewhere:?}");
}

#[test]
fn only_sys_is_unsafe() {
    assert_only_in("unsafe code", &["sys"], |code| {
        code.contains("unsafe {") || code.contains("unsafe fn") || code.contains("unsafe impl")
    });
}

#[test]
fn only_rooms_with_sockets_are_async() {
    assert_only_in("async code", ASYNC, |code| {
        code.contains("async fn") || code.contains(".await")
    });
}

#[test]
fn only_the_client_prints() {
    assert_only_in("printing", &["cli"], |code| {
        // Standard error is for messages, and any room may use it before the process ends.
        let code = code.replace("eprintln!", "").replace("eprint!", "");
        ["println!", "print!", "stdout()"].iter().any(|word| code.contains(word))
    });
}

#[test]
fn only_the_history_knows_sqlite() {
    assert_only_in("rusqlite", &["history"], |code| code.contains("rusqlite"));
}

#[test]
fn generated_messages_stay_in_their_rooms() {
    assert_only_in("containerd's proto", &["containerd"], |code| {
        code.contains("containerd_client::")
    });
    assert_only_in("our proto", &["api", "cli"], |code| code.contains("api::v1"));
}

/// Calls that access a filesystem. Where a container can make such a call block, only the
/// door may make it (`sys::door`, and `sys::file` by descriptor).
const ASKS: &[&str] = &[
    "File::open",
    "OpenOptions",
    "Dir::read_from",
    "canonicalize(",
    ".exists()",
    ".is_dir()",
    ".is_file()",
    "fs::copy",
    "fs::metadata",
    "fs::open",
    "fs::read(",
    "fs::read_to_string",
    "fs::statx",
    "fs::access",
    "fstat(",
    "getxattr",
    "is_in_memory(",
    "is_overlay(",
    "is_remote(",
    "listxattr",
    "openat",
    "read_dir",
    "read_link",
    "readlinkat",
    "statfs",
    "symlink_metadata",
    "try_exists",
];

/// Files that may use such a call directly, and why.
const MAY_ASK: &[(&str, &str, &str)] = &[
    ("arm.rs", "canonicalize(", "sockets of the host's runtimes"),
    ("arm.rs", "read_dir", "bundles of the host's runtimes"),
    ("copyup.rs", "OpenOptions", "driftd's own file in a work directory of containerd's"),
    ("copyup.rs", "is_remote(", "directories of containerd's"),
    ("entry.rs", "readlinkat", "a link of an upper layer, in a directory that is held"),
    ("find.rs", "is_in_memory(", "a file on a filesystem that carries driftd's marks"),
    ("find.rs", "is_overlay(", "a file on a filesystem that carries driftd's marks"),
    ("lower.rs", "Dir::read_from", "a directory below an image's layer, held already"),
    ("lower.rs", "readlinkat", "a link of an image's layer, in a directory that is held"),
    ("self_test.rs", "OpenOptions", "driftd's own files"),
    ("self_test.rs", "fs::", "driftd's own files"),
];

#[test]
fn x01_the_watch_room_accesses_filesystems_only_through_the_door() {
    let mut wrong = Vec::new();
    for Source { room, file, code } in sources() {
        let name = file.file_name().unwrap().to_str().unwrap();
        if room != "watch" {
            continue;
        }
        for ask in ASKS.iter().filter(|ask| code.contains(**ask)) {
            let may = MAY_ASK.iter().any(|(file, way, _)| *file == name && ask.contains(*way));
            if !may {
                wrong.push(format!("src/{}: {ask}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "not through sys::door: {wrong:#?}");
    // In `sys`, one place reopens a held file, and none reads the memory of a process.
    let asks = |code: &str, what: &str| code.contains(what);
    for Source { room, file, code } in sources() {
        if room == "sys" {
            assert!(!asks(&code, "/mem\"") && !asks(&code, ".mem()"), "{}", file.display());
            let reopens = asks(&code, "fs::open(&path");
            assert!(!reopens || file.ends_with("door.rs"), "{}", file.display());
        }
    }
}

/// The files of `evidence` that reach what a container has; the others have driftd's own files.
const TAKES: &[&str] = &["copy.rs", "files.rs", "layer.rs", "processes.rs"];

#[test]
fn evidence_is_taken_only_through_the_door() {
    let mut found = 0;
    for Source { room, file, code } in sources() {
        let name = file.file_name().unwrap().to_str().unwrap();
        if room != "evidence" || !TAKES.contains(&name) {
            continue;
        }
        found += 1;
        let asks: Vec<&&str> = ASKS.iter().filter(|ask| code.contains(**ask)).collect();
        assert!(asks.is_empty(), "src/{}: {asks:?}, not through sys::door", file.display());
    }
    assert_eq!(found, TAKES.len());
}

#[test]
fn rooms_in_use_groups_are_found() {
    let code = "use crate::{api, guardian::{self, Heart}, respond};\ncrate::model::Kind";
    let rooms: Vec<String> = rooms_named_in(code).into_iter().collect();
    assert_eq!(rooms, ["api", "guardian", "model", "respond"]);
}

/// Scenarios that have a test with their id in its name: attacks, and ordinary work that
/// driftd must not report.
const SCENARIOS: &[(char, std::ops::RangeInclusive<u32>)] = &[
    ('a', 1..=29),
    ('a', 32..=47),
    ('b', 1..=14),
    ('b', 16..=23),
    ('b', 25..=25),
    ('b', 29..=30),
    ('b', 32..=32),
];

/// The scenarios with a test, each with the files of its tests:
/// `fn a07_script` and `test("b14_...", ...)`.
fn tested_scenarios() -> BTreeMap<String, BTreeSet<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut directories = vec![root.join("tests"), root.join("src")];
    let mut tested: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            if path.extension().is_none_or(|extension| extension != "rs") {
                continue;
            }
            let text = fs::read_to_string(&path).unwrap();
            let file = path.strip_prefix(root).unwrap().display().to_string();
            for name in text.split("fn ").chain(text.split('"')).skip(1).filter_map(scenario) {
                tested.entry(name).or_default().insert(file.clone());
            }
        }
    }
    tested
}

/// `a07` of `a07_script`.
fn scenario(text: &str) -> Option<String> {
    let id = text.get(..4)?;
    let is_id = id.starts_with(['a', 'b'])
        && id.ends_with('_')
        && id[1..3].bytes().all(|byte| byte.is_ascii_digit());
    is_id.then(|| id[..3].to_owned())
}

#[test]
fn every_scenario_has_a_test_named_for_it() {
    let tested = tested_scenarios();
    let missing: Vec<String> = SCENARIOS
        .iter()
        .flat_map(|(group, numbers)| {
            numbers.clone().map(move |number| format!("{group}{number:02}"))
        })
        .filter(|id| !tested.contains_key(id))
        .collect();
    assert!(missing.is_empty(), "no test is named for {missing:?}; there are {tested:#?}");
    assert_eq!(scenario("a07_script()"), Some("a07".to_owned()));
    assert_eq!(scenario("all_scenarios()"), None);
}
