//! The shipped unit, as systemd itself reads it.

use std::path::PathBuf;
use std::process::{Command, Output};

use tempfile::TempDir;

/// How much systemd thinks is left open to the service, in tenths. A daemon that
/// needs fanotify and /proc as they are cannot be at zero; it must not grow.
const EXPOSURE: &str = "47";

const UNIT: &str = include_str!("../systemd/driftd.service");

/// The unit with the program that was just built, because systemd looks whether
/// it is there.
fn unit() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("driftd.service");
    let installed = "ExecStart=/usr/bin/driftd run";
    assert!(UNIT.contains(installed));
    let built = format!("ExecStart={} run", env!("CARGO_BIN_EXE_driftd"));
    std::fs::write(&file, UNIT.replace(installed, &built)).unwrap();
    (directory, file)
}

fn systemd_analyze(arguments: &[&str]) -> Output {
    let (_directory, unit) = unit();
    Command::new("systemd-analyze")
        .args(arguments)
        .arg(unit)
        .output()
        .expect("cannot run systemd-analyze (run: make setup)")
}

fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn the_unit_is_understood_whole() {
    let output = systemd_analyze(&["verify", "--man=no"]);
    assert!(output.status.success(), "{}", said(&output));
    // An unknown setting is told, and no error. A system call that is newer than this
    // systemd is ignored, and driftd does without it.
    let newer = "Failed to parse system call, ignoring: listmount";
    let said = said(&output);
    let mut others = said.lines().filter(|line| !line.contains(newer));
    assert!(!others.any(|line| line.contains("driftd.service:")), "{said}");
}

#[test]
fn the_unit_leaves_no_more_open_than_it_did() {
    let threshold = format!("--threshold={EXPOSURE}");
    let output = systemd_analyze(&["security", "--offline=true", &threshold]);
    assert!(output.status.success(), "{}", said(&output));
}

#[test]
fn the_unit_runs_no_directive_that_hides_containers() {
    for hidden in [
        "ProtectSystem=",
        "PrivateTmp=",
        "ProtectProc=",
        "ProcSubset=",
        "PrivateMounts=",
        "ProtectHome=",
        "PrivateDevices=",
        "RootDirectory=",
        "ReadOnlyPaths=",
        "InaccessiblePaths=",
        "ProtectKernelTunables=",
        "ProtectControlGroups=",
    ] {
        assert!(!UNIT.lines().any(|line| line.starts_with(hidden)), "{hidden} is set");
    }
}

/// Its filter answers ENOSYS to every openat2 (systemd 252 and 257), without which
/// driftd opens no file of a container.
#[test]
fn u01_the_unit_lets_openat2_through() {
    assert!(!UNIT.lines().any(|line| line.starts_with("RestrictSUIDSGID=")));
}

#[test]
fn u08_the_unit_comes_back_however_it_ended() {
    assert!(UNIT.lines().any(|line| line == "Restart=always"));
}

#[test]
fn the_unit_lets_the_second_pair_of_eyes_see() {
    let allowed = |setting: &str, wanted: &str| {
        UNIT.lines()
            .filter_map(|line| line.strip_prefix(setting))
            .any(|values| values.split_ascii_whitespace().any(|value| value == wanted))
    };
    for call in ["perf_event_open", "fsopen", "fsconfig", "fsmount", "listmount"] {
        assert!(allowed("SystemCallFilter=", call), "{call} is not allowed");
    }
    assert!(allowed("RestrictAddressFamilies=", "AF_NETLINK"));
}
