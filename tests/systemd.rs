//! The shipped units, as systemd itself reads them.

use std::path::PathBuf;
use std::process::{Command, Output};

use tempfile::TempDir;

/// systemd's exposure level of the service, in tenths. A daemon that needs fanotify and an
/// unrestricted /proc cannot have zero; the level must not grow.
const EXPOSURE: &str = "39";
/// That of the runner of hooks, which has the network.
const EXPOSURE_OF_HOOKS: &str = "26";

const UNIT: &str = include_str!("../systemd/driftd.service");
const HOOKS: &str = include_str!("../systemd/driftd-hooks.service");
const UNITS: [(&str, &str); 2] = [("driftd.service", UNIT), ("driftd-hooks.service", HOOKS)];

/// A unit with the built program, because systemd checks that the program exists.
fn unit((name, text): (&str, &str)) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join(name);
    let installed = "=/usr/bin/driftd ";
    assert!(text.contains(installed));
    let built = format!("={} ", env!("CARGO_BIN_EXE_driftd"));
    std::fs::write(&file, text.replace(installed, &built)).unwrap();
    (directory, file)
}

fn systemd_analyze(arguments: &[&str], of: (&str, &str)) -> Output {
    let (_directory, unit) = unit(of);
    Command::new("systemd-analyze")
        .args(arguments)
        .arg(unit)
        .output()
        .expect("cannot run systemd-analyze (run: make setup)")
}

fn text_of(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn systemd_understands_every_line_of_the_unit() {
    for unit in UNITS {
        let output = systemd_analyze(&["verify", "--man=no"], unit);
        assert!(output.status.success(), "{}", text_of(&output));
        // An unknown setting is a warning and no error. systemd ignores a system call that it
        // does not know yet, and driftd works without it.
        let newer = "Failed to parse system call, ignoring: listmount";
        let text = text_of(&output);
        let mut others = text.lines().filter(|line| !line.contains(newer));
        let name = format!("{}:", unit.0);
        assert!(!others.any(|line| line.contains(&name)), "{text}");
    }
}

#[test]
fn the_units_exposure_has_not_grown() {
    for (unit, exposure) in UNITS.into_iter().zip([EXPOSURE, EXPOSURE_OF_HOOKS]) {
        let threshold = format!("--threshold={exposure}");
        let output = systemd_analyze(&["security", "--offline=true", &threshold], unit);
        assert!(output.status.success(), "{}", text_of(&output));
    }
}

#[test]
fn u01_the_unit_sets_nothing_that_hides_containers_or_disables_openat2() {
    for hidden in [
        // Its filter makes every openat2 fail with ENOSYS (systemd 252 and 257). Without
        // openat2 driftd opens no file of a container.
        "RestrictSUIDSGID=",
        "ProtectProc=",
        "ProcSubset=",
        "PrivateMounts=",
        "MountFlags=",
        "PrivateDevices=",
        "PrivateUsers=",
        "RootDirectory=",
        "InaccessiblePaths=",
        "ProtectKernelTunables=",
        "ProtectControlGroups=",
    ] {
        assert!(!UNIT.lines().any(|line| line.starts_with(hidden)), "{hidden} is set");
    }
}

#[test]
fn u17_the_unit_always_restarts_and_starts_before_container_engines() {
    let lines: Vec<&str> = UNIT.lines().collect();
    assert!(lines.contains(&"Restart=always"));
    assert!(lines.contains(&"ExecReload=/bin/kill -HUP $MAINPID"));
    let before = lines.iter().find_map(|line| line.strip_prefix("Before=")).unwrap();
    for unit in ["docker.service", "kubelet.service", "k3s.service"] {
        assert!(before.split(' ').any(|known| known == unit), "{unit} starts first");
    }
}

#[test]
fn the_unit_allows_the_execution_records_and_mount_listings() {
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
