//! The command line by itself: help, errors, settings, completions, the manual and `doctor`.

use std::fs;
use std::process::Stdio;

use crate::program::{Output, driftd, run};

#[test]
fn every_command_has_help() {
    for command in [
        &["--help"][..],
        &["run", "--help"],
        &["doctor", "--help"],
        &["status", "--help"],
        &["baseline", "--help"],
        &["baseline", "ls", "--help"],
        &["baseline", "show", "--help"],
        &["baseline", "record", "--help"],
        &["baseline", "verify", "--help"],
        &["baseline", "export", "--help"],
        &["baseline", "diff", "--help"],
        &["baseline", "rm", "--help"],
        &["baseline", "prune", "--help"],
        &["metrics", "--help"],
        &["containers", "--help"],
        &["diff", "--help"],
        &["findings", "--help"],
        &["summary", "--help"],
        &["show", "--help"],
        &["sessions", "--help"],
        &["timeline", "--help"],
        &["probes", "--help"],
        &["probes", "report", "--help"],
        &["probes", "count", "--help"],
        &["members", "--help"],
        &["respond", "--help"],
        &["respond", "kill", "--help"],
        &["respond", "hook", "--help"],
        &["hooks", "--help"],
        &["completions", "--help"],
        &["man", "--help"],
        &["--version"],
    ] {
        let output = run(command);
        assert_eq!((output.code, output.err.as_str()), (0, ""), "{command:?}");
        assert!(output.out.contains("driftd"), "{command:?}: {}", output.out);
    }
    assert!(!run(&["--help"]).out.contains("guardian"));
}

#[test]
fn a_wrong_command_line_is_exit_64() {
    for (arguments, hint) in [
        (&[][..], "Usage"),
        (&["frobnicate"], "frobnicate"),
        (&["diff"], "CONTAINER"),
        (&["findings", "--kind", "exec.odd"], "exec.new"),
        (&["findings", "--severity", "terrible"], "critical"),
        (&["findings", "--since", "soonish"], "yesterday"),
        (&["findings", "--kind", "exek.*"], "exec.new"),
        (&["findings", "-o", "custom-columns=PATH"], ".file.path"),
        (&["findings", "--follow", "--after", "newest"], "latest"),
        (&["findings", "--follow", "--exit-code"], "--exit-code"),
        (&["findings", "--follow", "-o", "json"], "jsonl"),
        (&["findings", "-o", "xml"], "jsonl"),
        (&["sessions", "--follow", "-o", "json"], "jsonl"),
        (&["sessions", "--after", "3"], "--follow"),
        (&["sessions", "--until", "soon"], "2h"),
        (&["timeline"], "CONTAINER"),
        (&["probes", "report"], "PROBE"),
        (&["probes", "-c", "web", "count", "ab"], "--container"),
        (&["baseline", "diff", "one"], "OTHER"),
        (&["baseline", "rm"], "IMAGE"),
        (&["baseline", "export", "a", "-o", "spdx"], "cyclonedx"),
        (&["baseline", "verify", "--deep", "--store", "/x"], "--store"),
        (&["respond", "kill", "web"], "--reason"),
        (&["respond", "kill", "web", "--reason", ""], "--reason"),
    ] {
        let output = run(arguments);
        assert_eq!((output.code, output.out.as_str()), (64, ""), "{arguments:?}: {output:?}");
        assert!(output.err.contains(hint), "{arguments:?}: {}", output.err);
    }
}

#[test]
fn wrong_settings_are_exit_64_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("driftd.toml");
    let name = file.to_str().unwrap();

    let output = run(&["run", "--config", name]);
    assert_eq!((output.code, output.out.as_str()), (64, ""));
    assert_eq!(
        output.err,
        format!("error: cannot read the settings {name}: No such file or directory (os error 2)\n")
    );

    fs::write(&file, "[respond]\nkil_on = []\n").unwrap();
    for command in ["run", "doctor"] {
        let output = run(&[command, "--config", name]);
        assert_eq!((output.code, output.out.as_str()), (64, ""));
        let start = format!("error: the settings {name} are wrong: ");
        assert!(output.err.starts_with(&start), "{}", output.err);
        assert!(output.err.contains("kil_on"), "{}", output.err);
    }
}

#[test]
fn an_unreachable_daemon_is_exit_2_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("driftd.sock");
    for arguments in [
        &["status"][..],
        &["containers"],
        &["findings"],
        &["findings", "--follow"],
        &["show", "ab"],
        &["members", "ab"],
        &["sessions"],
        &["sessions", "--follow"],
        &["timeline", "web"],
        &["probes"],
        &["probes", "report", "ab"],
        &["diff", "web"],
        &["baseline", "ls"],
        &["baseline", "record", "x"],
        &["baseline", "verify"],
        &["baseline", "diff", "x", "y"],
        &["baseline", "rm", "x"],
        &["baseline", "prune"],
        &["metrics"],
        &["respond", "kill", "web", "--reason", "x"],
    ] {
        let output = driftd(arguments).arg("--socket").arg(&socket).output().unwrap();
        let output = Output::of(output);
        assert_eq!((output.code, output.out.as_str()), (2, ""), "{arguments:?}");
        assert_eq!(
            output.err,
            format!(
                "error: cannot reach driftd at {} (is the daemon running? try: systemctl status \
                 driftd)\n",
                socket.display()
            )
        );
    }
}

#[test]
fn completions_and_the_manual_are_printed() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert_eq!((output.code, output.err.as_str()), (0, ""));
        assert!(output.out.contains("exec.modified"), "{shell}: kinds are completed");
    }
    let output = run(&["man"]);
    assert_eq!(output.code, 0);
    assert!(output.out.contains(".TH driftd 1"), "{}", output.out);
    let dir = tempfile::tempdir().unwrap();
    let output = run(&["man", "--directory", dir.path().to_str().unwrap()]);
    assert_eq!((output.code, output.out.as_str()), (0, ""));
    assert!(dir.path().join("driftd-respond-kill.1").is_file());
}

#[test]
fn a_closed_pipe_is_no_error() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = driftd(&["completions", "bash"])
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    let output = Output::of(output);
    assert_eq!((output.code, output.err.as_str()), (0, ""));
}

#[test]
fn doctor_reports_what_works_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let nowhere = dir.path().join("containerd.sock");
    let state = dir.path().join("state");
    let arguments = [
        "doctor",
        "--containerd",
        nowhere.to_str().unwrap(),
        "--state-dir",
        state.to_str().unwrap(),
    ];
    let output = run(&arguments);
    assert_eq!((output.code, output.err.as_str()), (2, ""), "{output:?}");
    for line in output.out.lines() {
        assert!(["OK    ", "WARN  ", "FAIL  "].iter().any(|word| line.starts_with(word)), "{line}");
    }
    assert!(output.out.contains(&format!("cannot be reached at {}", nowhere.display())));
    assert!(output.out.contains("history          none yet"), "{}", output.out);
    assert!(!state.exists(), "doctor changes nothing");

    let json = Output::of(driftd(&arguments).args(["-o", "json"]).output().unwrap());
    let checks: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(checks[0]["schema"], "driftd.check/v1");
    assert_eq!(checks[0]["name"], "kernel");
    assert_eq!(checks[0]["result"], "ok");
}

#[test]
fn u15_a_manual_page_is_written_for_every_command_even_into_a_new_directory() {
    let dir = tempfile::tempdir().unwrap();
    let new = dir.path().join("share/man/man1");
    let written = run(&["man", "--directory", new.to_str().unwrap()]);
    assert_eq!((written.code, written.err.as_str()), (0, ""));
    let top = fs::read_to_string(new.join("driftd.1")).unwrap().replace("\\-", "-");
    let named: Vec<&str> =
        top.split_whitespace().filter_map(|word| word.strip_suffix("(1)")).collect();
    assert!(named.len() > 15, "{named:?}");
    for page in named {
        assert!(new.join(format!("{page}.1")).exists(), "{page} is named, but missing");
    }
    assert!(new.join("driftd-findings.1").exists() && new.join("driftd-summary.1").exists());
    // `make install` installs all of them.
    assert!(include_str!("../../Makefile").contains("man --directory $(DESTDIR)$(mandir)"));

    fs::write(dir.path().join("file"), "").unwrap();
    let refused = run(&["man", "--directory", dir.path().join("file/man").to_str().unwrap()]);
    assert!(refused.code == 2 && refused.err.contains("file/man"), "u18: {refused:?}");
}

#[test]
fn u18_usage_shows_no_option_as_required_because_the_environment_sets_it() {
    let mut command = driftd(&["findings", "--no-such-option"]);
    let output = Output::of(command.env("DRIFTD_SOCKET", "/x").output().unwrap());
    assert_eq!(output.code, 64);
    assert!(output.err.contains("Usage: driftd findings [OPTIONS]"), "{}", output.err);
}
