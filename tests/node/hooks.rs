//! Hooks on a real node: a rule runs a program whose effect is seen, and what goes wrong with
//! one is recorded with its reason.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Child;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Node, end, spawn_daemon, tail, talk, wait_for, wait_within};
use crate::unit::{Machine, patience};
use crate::{test_alone, test_without_node};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("a_rule_runs_a_hook_whose_effect_is_seen", SETTINGS, runs),
        test_alone("what_goes_wrong_with_a_hook_is_recorded", SETTINGS, goes_wrong),
        test_alone("a_hook_recreates_a_container_from_its_image", SETTINGS, recreates),
        test_without_node("the_installed_unit_of_hooks_has_the_network_and_few_rights", unit),
    ]
}

const SETTINGS: &str = r#"
[policy]
dir = "{node}/policy.d"
enforce = "on"
[hooks.keep]
program = "/bin/sh"
arguments = ["-c", "cat >{node}/input; env >{node}/environment; printf 'kept\\033[31m'"]
counts = false
[hooks.fails]
program = "/bin/sh"
arguments = ["-c", "echo broken >&2; exit 3"]
counts = false
[hooks.hangs]
program = "/bin/sh"
arguments = ["-c", "sleep 600 & sleep 600"]
timeout = "500ms"
counts = false
[hooks.missing]
program = "{node}/no-such-program"
counts = false
[hooks.alone]
program = "/bin/true"
wait = "1s"
counts = false
[hooks.long]
program = "/bin/sh"
arguments = ["-c", "echo $$ $DRIFTD_FINDING >>{node}/long; exec sleep 600"]
timeout = "10m"
counts = false
[hooks.recreate]
program = "{node}/containerd-recreate"
arguments = ["--address", "{node}/containerd.sock"]
timeout = "2m"
"#;

/// `driftd hooks`, which ends with this.
struct Runner<'a> {
    node: &'a Node,
    child: Child,
}

impl Drop for Runner<'_> {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

impl<'a> Runner<'a> {
    fn start(node: &'a Node) -> anyhow::Result<Runner<'a>> {
        let log = node.path("hooks.log");
        let _ = fs::remove_file(&log);
        let child = spawn_daemon(&mut node.driftd_command(&["hooks"]), &log)?;
        let runner = Runner { node, child };
        wait_for("the runner to be connected", || {
            Ok(tail(&log).contains("connected to driftd").then_some(()))
        })?;
        Ok(runner)
    }

    /// `kill -9`: it reports nothing.
    fn crash(mut self) -> anyhow::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn log(&self) -> String {
        tail(&self.node.path("hooks.log"))
    }
}

/// Puts one rule in force, which runs a hook.
fn rule(node: &Node, hook: &str) -> anyhow::Result<()> {
    let directory = node.path("policy.d");
    fs::create_dir_all(&directory)?;
    fs::write(
        directory.join("10.toml"),
        format!(
            "[[rule]]\nid = \"of-{hook}\"\nreason = \"a test\"\neffect = \"report\"\n\
             answer = [\"hook\"]\nhook = \"{hook}\"\n[rule.match]\nkind = [\"exec.new\"]\n"
        ),
    )?;
    let reload = node.driftd(&["policy", "reload"])?;
    ensure!(reload.status.success(), "{}", talk(&reload));
    Ok(())
}

/// Runs a new program, and returns its finding when a hook has an outcome.
fn outcome(container: &Container<'_>, path: &str) -> anyhow::Result<Value> {
    container.begin(&format!("cp /.control/x {path}; {path}")).map(drop)?;
    outcome_of(container, path)
}

fn outcome_of(container: &Container<'_>, path: &str) -> anyhow::Result<Value> {
    wait_for("the outcome of a hook", || {
        let findings = container.findings()?;
        let is_it = |one: &Value| one["file"]["path"] == path && one["outcome"]["action"] == "hook";
        Ok(findings.into_iter().find(is_it))
    })
}

fn message(finding: &Value) -> &str {
    finding["outcome"]["message"].as_str().unwrap_or_default()
}

fn runs(node: &Node) -> anyhow::Result<()> {
    let runner = Runner::start(node)?;
    rule(node, "keep")?;
    let container = node.container()?;
    container.lay_payload("x")?;
    let finding = outcome(&container, "/tmp/x")?;
    ensure!(finding["outcome"]["succeeded"] == true, "{finding}\n{}", runner.log());
    // What it has written is escaped.
    let expected = "hook keep: exit status 0; it wrote: kept\\u{1b}[31m";
    ensure!(message(&finding) == expected, "{}", message(&finding));
    let input: Value = serde_json::from_str(&fs::read_to_string(node.path("input"))?)?;
    ensure!(input["schema"] == "driftd.hook/v1" && input["hook"] == "keep", "{input}");
    ensure!(input["rule"] == "of-keep" && input["finding"]["id"] == finding["id"], "{input}");
    ensure!(input["finding"]["schema"] == "driftd.finding/v1", "{input}");
    ensure!(input["request"]["container"]["id"] == *container.id, "{input}");
    let environment = fs::read_to_string(node.path("environment"))?;
    let mut names: Vec<&str> =
        environment.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
    names.retain(|name| !["PWD", "SHLVL", "_", "OLDPWD"].contains(name));
    names.sort_unstable();
    let expected = [
        "DRIFTD_CONTAINER",
        "DRIFTD_FINDING",
        "DRIFTD_HOOK",
        "DRIFTD_NAMESPACE",
        "DRIFTD_RULE",
        "PATH",
    ];
    ensure!(names == expected, "{environment}");
    let timeline = node.answer(&["timeline", &container.id])?;
    let kept = timeline.iter().find(|entry| entry["response"]["outcome"]["action"] == "hook");
    ensure!(kept.is_some(), "{timeline:#?}");

    // The same once more is no other finding.
    fs::remove_file(node.path("input"))?;
    container.sh("/tmp/x")?;
    container.counted("exec.new", 2)?;
    ensure!(!node.path("input").exists(), "it has run twice");

    // By hand.
    let id = finding["id"].as_str().context("no ID")?;
    let by_hand =
        |hook: &str| node.driftd(&["respond", "hook", hook, "--finding", id, "--reason", "a test"]);
    let output = by_hand("keep")?;
    ensure!(output.status.success(), "{}", talk(&output));
    let input: Value = serde_json::from_str(&fs::read_to_string(node.path("input"))?)?;
    ensure!(input["rule"].is_null() && input["request"]["reason"] == "a test", "{input}");
    let output = by_hand("other")?;
    ensure!(output.status.code() == Some(2), "{}", talk(&output));
    ensure!(talk(&output).contains("the settings have no hook `other`"), "{}", talk(&output));

    let known = &node.status()?["hooks"];
    ensure!(known["runner"].as_str().is_some_and(|it| it.starts_with("uid 0 pid")), "{known:#}");
    // There is one runner.
    let second = node.driftd(&["hooks"])?;
    ensure!(second.status.code() == Some(2), "{}", talk(&second));
    ensure!(talk(&second).contains("another runner is connected (uid 0 pid"), "{}", talk(&second));

    // It stays when the daemon goes, and goes on with the next one.
    node.stop_driftd()?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    wait_for("the runner to come back", || {
        Ok((runner.log().matches("connected to driftd").count() == 2).then_some(()))
    })?;
    let finding = outcome(&container, "/tmp/y")?;
    ensure!(finding["outcome"]["succeeded"] == true, "{finding}");
    Ok(())
}

fn goes_wrong(node: &Node) -> anyhow::Result<()> {
    let check = node
        .driftd_command(&["run", "--check", "--config"])
        .arg(node.path("driftd.toml"))
        .output()?;
    ensure!(check.status.code() == Some(64), "{}", talk(&check));
    ensure!(talk(&check).contains("hooks.missing.program: "), "{}", talk(&check));

    let container = node.container()?;
    container.lay_payload("x")?;
    rule(node, "alone")?;
    let finding = outcome(&container, "/tmp/no-runner")?;
    ensure!(finding["outcome"]["succeeded"] == false, "{finding}");
    let expected = "hook alone: not run: no runner is connected (start it: systemctl enable --now \
                    driftd-hooks)";
    ensure!(message(&finding) == expected, "{}", message(&finding));

    let runner = Runner::start(node)?;
    for (hook, expected) in [
        ("fails", "hook fails: exit status 3; it wrote: broken"),
        ("hangs", "hook hangs: killed after 0.5 s (timeout); what it has done is not known"),
        ("missing", "No such file or directory"),
    ] {
        let container = node.container()?;
        container.lay_payload("x")?;
        rule(node, hook)?;
        let finding = outcome(&container, &format!("/tmp/{hook}"))?;
        ensure!(finding["outcome"]["succeeded"] == false, "{finding}");
        ensure!(message(&finding).contains(expected), "{}\n{}", message(&finding), runner.log());
    }

    rule(node, "long")?;
    let other = node.container()?;
    other.lay_payload("x")?;
    other.begin("cp /.control/x /tmp/x; /tmp/x").map(drop)?;
    let pid = wait_for("the hook to run", || {
        let text = fs::read_to_string(node.path("long")).unwrap_or_default();
        Ok(text.split_once(' ').and_then(|(pid, _)| pid.parse::<i32>().ok()))
    })?;
    runner.crash()?;
    let finding = outcome_of(&other, "/tmp/x")?;
    let expected = "hook long: driftd hooks ended while it ran; what it has done is not known";
    ensure!(message(&finding) == expected, "{}", message(&finding));
    // Outside of the unit, whose control group ends as a whole, the program goes on.
    end_program(pid)?;
    // It is not marked `retry`: the next runner gets it no more. What comes later it gets, and
    // the hooks of one container keep their order.
    fs::remove_file(node.path("long"))?;
    let runner = Runner::start(node)?;
    other.sh("/tmp/x")?;
    other.begin("cp /.control/x /tmp/y; /tmp/y").map(drop)?;
    let asked = wait_for("the hook of the other finding", || {
        let text = fs::read_to_string(node.path("long")).unwrap_or_default();
        Ok(text.ends_with('\n').then_some(text))
    })?;
    // A hook may be quicker than the history.
    let later = wait_for("both findings", || {
        let findings = other.findings()?;
        let of = |path: &str| findings.iter().find(|one| one["file"]["path"] == path);
        let has_run_twice = of("/tmp/x").is_some_and(|one| one["count"] == 2);
        let later = of("/tmp/y").and_then(|one| one["id"].as_str());
        Ok(later.filter(|_| has_run_twice).map(str::to_owned))
    })?;
    ensure!(asked.lines().all(|line| line.ends_with(&later)), "{asked}");

    // A runner that is asked to stop ends what it runs, and reports that.
    drop(runner);
    let finding = outcome_of(&other, "/tmp/y")?;
    let expected = "hook long: killed because driftd hooks was stopped; what it has done is not \
                    known";
    ensure!(message(&finding) == expected, "{}", message(&finding));
    Ok(())
}

/// Ends the program of a hook, which the runner has left.
fn end_program(pid: i32) -> anyhow::Result<()> {
    let arguments = fs::read(format!("/proc/{pid}/cmdline"))?;
    ensure!(arguments == b"sleep\x00600\x00", "{pid} is another process");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    Ok(())
}

fn recreates(node: &Node) -> anyhow::Result<()> {
    let script = "contrib/hooks/containerd-recreate/containerd-recreate";
    let program = node.path("containerd-recreate");
    fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(script), &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let runner = Runner::start(node)?;
    let container = node.container_with(&["--label", "team=a b's \"$HOME\"", "--env", "X=y z"])?;
    container.lay_payload("x")?;
    let (before, info) = (container.init()?, info_of(&container)?);
    rule(node, "recreate")?;
    container.begin("cp /.control/x /tmp/x; /tmp/x; sleep 600").map(drop)?;
    let finding = outcome_of(&container, "/tmp/x")?;
    ensure!(finding["outcome"]["succeeded"] == true, "{finding}\n{}", runner.log());
    ensure!(message(&finding).contains("recreated from "), "{}", message(&finding));
    ensure!(container.init()? != before, "it is the same run");
    let upper = node.upperdir(&container.id)?;
    ensure!(!upper.join("tmp/x").exists(), "the layer is a fresh one");
    let again = info_of(&container)?;
    for key in ["Image", "Labels", "Snapshotter"] {
        ensure!(info[key] == again[key], "{key}: {info:#}\n{again:#}");
    }
    for key in ["args", "cwd", "capabilities", "user", "env"] {
        let [one, other] = [&info, &again].map(|info| &info["Spec"]["process"][key]);
        ensure!(one == other, "{key}: {one:#}\n{other:#}");
    }
    ensure!(info["Spec"]["mounts"] == again["Spec"]["mounts"], "{info:#}\n{again:#}");
    let cgroup = |info: &Value| info["Spec"]["linux"]["cgroupsPath"].clone();
    ensure!(cgroup(&info) == cgroup(&again), "{info:#}\n{again:#}");
    // driftd watches the new one.
    container.wait_until_watched()?;
    Ok(())
}

fn info_of(container: &Container<'_>) -> anyhow::Result<Value> {
    let info = container.node.ctr(&["containers", "info", &container.id])?;
    Ok(serde_json::from_str(&info)?)
}

/// The shipped unit, in a machine of its own.
fn unit() -> anyhow::Result<()> {
    let machine = Machine::installed("hooks")?;
    let state = machine.sh("systemctl is-enabled driftd-hooks || true")?;
    ensure!(state == "disabled\n", "installed, and off: {state}");
    machine.container("c")?;
    machine.sh(r#"cat >>/etc/driftd/driftd.toml <<'END'
[hooks.send]
program = "/bin/sh"
arguments = ["-c", "id -u; touch /etc/x || touch /var/x || socat -u STDIN TCP:127.0.0.1:4711"]
user = "daemon"
[hooks.recreate]
program = "/usr/local/libexec/driftd/containerd-recreate"
END
mkdir -p /etc/driftd/policy.d /etc/systemd/system/driftd-hooks.service.d
cat >/etc/driftd/policy.d/10.toml <<'END'
[[rule]]
id = "send"
reason = "a test"
effect = "report"
answer = ["hook"]
hook = "send"
enforce = "on"
[rule.match]
path = ["/tmp/x"]
[[rule]]
id = "recreate"
reason = "a test"
effect = "report"
answer = ["hook"]
hook = "recreate"
enforce = "on"
[rule.match]
path = ["/tmp/y"]
END
cat >/etc/systemd/system/driftd-hooks.service.d/recreate.conf <<'END'
[Service]
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_OVERRIDE
SystemCallFilter=@mount
ReadWritePaths=/var/lib/containerd
END
systemd-run --quiet --unit listener socat -u TCP-LISTEN:4711,bind=127.0.0.1 CREATE:/run/received
systemctl daemon-reload
systemctl reload driftd
systemctl enable --now driftd-hooks"#)?;
    let outcome = |path: &str| {
        wait_within(patience(), "the outcome of a hook", || {
            let findings = machine.lines("driftd findings -o jsonl")?;
            let is_it =
                |one: &Value| one["file"]["path"] == path && one["outcome"]["action"] == "hook";
            Ok(findings.into_iter().find(is_it))
        })
        .with_context(|| machine.logs())
    };
    machine.exec("c", "cp /.control/x /tmp/x; /tmp/x")?;
    let finding = outcome("/tmp/x")?;
    ensure!(finding["outcome"]["succeeded"] == true, "{finding}{}", machine.logs());
    ensure!(message(&finding).contains("it wrote: 1\\n"), "as the user daemon: {finding}");
    let received: Value = serde_json::from_str(&machine.sh("cat /run/received")?)?;
    ensure!(received["schema"] == "driftd.hook/v1", "{received}");

    let pid = || machine.sh("ctr task ls | awk '$1 == \"c\" { print $2 }'");
    let before = pid()?;
    machine.exec("c", "cp /.control/y /tmp/y; /tmp/y")?;
    let finding = outcome("/tmp/y")?;
    ensure!(finding["outcome"]["succeeded"] == true, "{finding}{}", machine.logs());
    ensure!(pid()? != before && !before.is_empty(), "it is the same run");
    machine.watched("c")
}
