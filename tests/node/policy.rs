//! Rules on a real node: what they accept is kept and not listed, an attack beside it is
//! reported, a changed file is in force at once, and a set with a fault is refused as a whole.

use std::fs;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Node, wait_for};
use crate::{sessions, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_alone("an_exception_is_in_force_at_once_and_hides_nothing_beside_it", "", exceptions),
        test_alone("a_set_with_a_fault_is_refused_as_a_whole", "", faults),
        test_alone("with_a_key_only_a_signed_set_is_in_force", signed_settings(), signed),
        test_alone("suggested_exceptions_silence_a_runner_and_no_attack_in_it", "", suggested),
        test_alone(
            "a_rule_kills_only_if_answers_are_switched_on",
            "[policy]\ndir = \"{node}/policy.d\"\nenforce = \"on\"",
            kills,
        ),
    ]
}

const PLUGINS: &str = r#"
version = "2026.11"
[[rule]]
id      = "app-plugins"
reason  = "installs its plugins at start"
expires = "never"
effect  = "accept"
[rule.match]
kind = ["exec.*", "file.added"]
path = ["/opt/plugins/**"]
"#;

/// An exception for what a shell of the image runs.
const AGENT: &str = r#"
[[rule]]
id      = "agent"
reason  = "the entry point runs what it has downloaded"
expires = "never"
effect  = "accept"
[rule.match]
path     = ["/opt/agent/**"]
ancestor = { path = "/bin/sh", from_image = true }
"#;

/// Writes a policy file as an editor does: a new file takes the place of the old one.
fn write(node: &Node, name: &str, text: &str) -> anyhow::Result<()> {
    let directory = node.path("policy.d");
    fs::create_dir_all(&directory)?;
    let new = directory.join(".new");
    fs::write(&new, text)?;
    Ok(fs::rename(new, directory.join(name))?)
}

fn wait_for_policy(
    node: &Node,
    what: &str,
    is_it: impl Fn(&Value) -> bool,
) -> anyhow::Result<Value> {
    wait_for(what, || Ok(Some(node.status()?["policy"].clone()).filter(&is_it)))
        .with_context(|| format!("{:#}", node.status().unwrap_or_default()["policy"]))
}

fn accepted(container: &Container<'_>) -> anyhow::Result<Vec<Value>> {
    container.node.answer(&["findings", "--accepted", "--container", &container.id])
}

/// Waits until a finding of this kind is accepted, counted so often.
fn wait_for_accepted(container: &Container<'_>, kind: &str, count: u64) -> anyhow::Result<Value> {
    wait_for(&format!("an accepted {kind}, counted {count} times"), || {
        let findings = accepted(container)?;
        let mut of_plugins =
            findings.into_iter().filter(|one| one["verdict"]["rule"] == "app-plugins");
        Ok(of_plugins.find(|one| one["kind"] == kind && one["count"] == count))
    })
    .with_context(|| {
        let reported = container.findings().unwrap_or_default();
        let why =
            |one: &Value| container.node.answer(&["policy", "explain", one["id"].as_str()?]).ok();
        let why: Vec<_> = reported.iter().filter_map(why).collect();
        format!("accepted: {:#?}\nreported: {reported:#?}\n{why:#?}", accepted(container))
    })
}

fn exceptions(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay_payload("x")?;
    container
        .sh("mkdir -p /opt/plugins; cp /.control/x /opt/plugins/before; /opt/plugins/before")?;
    container.expect_findings(&["critical exec.new /opt/plugins/before"])?;

    // The directory is made while driftd runs.
    write(node, "10-app.toml", PLUGINS)?;
    let policy = wait_for_policy(node, "the rule", |policy| policy["rules"] == 1)?;
    ensure!(policy["version"] == "2026.11" && policy["refused"].is_null(), "{policy:#}");
    container.lay_payload("y")?;
    container.lay_payload("z")?;
    container.sh("cp /.control/y /opt/plugins/y; cp /.control/z /opt/plugins/z
         /opt/plugins/y; /opt/plugins/y; /opt/plugins/z")?;
    let executed = wait_for_accepted(&container, "exec.new", 3)?;
    let verdict = &executed["verdict"];
    ensure!(verdict["disposition"] == "accept" && verdict["rule"] == "app-plugins", "{executed:#}");
    let id = executed["id"].as_str().context("no ID")?;
    let members = node.answer(&["members", id])?;
    ensure!(members.len() == 2, "{members:#?}");

    // An attack beside it, and the same content elsewhere.
    container.run_dropped("evil")?;
    container.sh("cp /.control/y /tmp/y; /tmp/y")?;
    container.expect_findings(&[
        "critical exec.new /opt/plugins/before",
        "critical exec.new /tmp/evil",
        "critical exec.new /tmp/y",
    ])?;

    // What a person does is not accepted.
    sessions::run(&container, &["--exec-id", "by-hand"], &["/opt/plugins/z"])?;
    wait_for("what was done in the session", || {
        let findings = container.findings()?;
        let done = findings.iter().any(|one| {
            one["kind"] == "exec.new"
                && one["file"]["path"] == "/opt/plugins/z"
                && !one["session"].is_null()
        });
        Ok(done.then_some(()))
    })
    .with_context(|| format!("{:#?}", container.findings()))?;

    // By what runs it: a shell of the image, and not a copy of one.
    write(node, "20-agent.toml", AGENT)?;
    wait_for_policy(node, "the second rule", |policy| policy["rules"] == 2)?;
    container.lay_payload("agent")?;
    container.sh("mkdir -p /opt/agent; cp /.control/agent /opt/agent/a; /opt/agent/a 500")?;
    let by_shell = wait_for("what the shell runs", || {
        let all = accepted(&container)?;
        Ok(all.into_iter().find(|one| {
            one["kind"] == "exec.new" && one["verdict"]["rule"] == "agent" && one["count"] == 1
        }))
    })?;
    ensure!(by_shell["from_image"].as_array().is_some_and(|own| !own.is_empty()), "{by_shell:#}");
    fs::remove_file(node.path("policy.d/20-agent.toml"))?;
    wait_for_policy(node, "one rule", |policy| policy["rules"] == 1)?;

    let rules = node.answer(&["policy", "ls"])?;
    ensure!(rules.len() == 1 && rules[0]["hits"].as_u64() >= Some(3), "{rules:#?}");
    let explained = node.driftd(&["policy", "explain", id])?;
    let text = String::from_utf8(explained.stdout)?;
    ensure!(text.contains("app-plugins  matches"), "{text}");

    // What was accepted is so after a restart, too.
    node.stop_driftd()?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    container.sh("/opt/plugins/y")?;
    wait_for_accepted(&container, "exec.new", 4)?;
    fs::remove_file(node.path("policy.d/10-app.toml"))?;
    wait_for_policy(node, "no rule", |policy| policy["rules"] == 0)?;
    container.sh("/opt/plugins/y")?;
    wait_for("the finding that no exception covers", || {
        let findings = container.findings()?;
        Ok(findings.iter().any(|one| one["file"]["path"] == "/opt/plugins/y").then_some(()))
    })
}

fn faults(node: &Node) -> anyhow::Result<()> {
    write(node, "10-app.toml", PLUGINS)?;
    wait_for_policy(node, "the rule", |policy| policy["rules"] == 1)?;
    write(node, "20-team.toml", "[[rule]]\nid = \"no\u{1b}[2J\"\n")?;
    let policy = wait_for_policy(node, "the refusal", |policy| !policy["refused"].is_null())?;
    let refused = policy["refused"].as_str().context("no text")?;
    ensure!(refused.contains("20-team.toml:") && policy["rules"] == 1, "{policy:#}");
    let shown = node.driftd(&["status"])?;
    let shown = String::from_utf8(shown.stdout)?;
    ensure!(shown.contains("REFUSED") && !shown.contains('\u{1b}'), "{shown}");
    let reload = node.driftd(&["policy", "reload"])?;
    let message = String::from_utf8(reload.stderr)?;
    ensure!(reload.status.code() == Some(2) && message.contains("20-team.toml:"), "{message}");
    let directory = node.path("policy.d").display().to_string();
    let check = node.driftd(&["policy", "check", &directory])?;
    ensure!(check.status.code() == Some(64), "{check:?}");

    // The rules before stay.
    let container = node.container()?;
    container.lay_payload("x")?;
    container.sh("mkdir -p /opt/plugins; cp /.control/x /opt/plugins/x; /opt/plugins/x")?;
    wait_for_accepted(&container, "exec.new", 1)?;

    // Also if the whole directory vanishes.
    fs::remove_file(node.path("policy.d/20-team.toml"))?;
    wait_for_policy(node, "the good set", |policy| policy["refused"].is_null())?;
    fs::rename(node.path("policy.d"), node.path("elsewhere"))?;
    let policy = wait_for_policy(node, "the refusal", |policy| !policy["refused"].is_null())?;
    ensure!(policy["rules"] == 1, "{policy:#}");
    fs::rename(node.path("elsewhere"), node.path("policy.d"))?;
    wait_for_policy(node, "the directory", |policy| policy["refused"].is_null())?;

    // A start with a fault reports everything.
    write(node, "20-team.toml", "rule = 3")?;
    node.stop_driftd()?;
    node.start_driftd()?;
    let policy = node.status()?["policy"].clone();
    ensure!(policy["rules"] == 0 && !policy["refused"].is_null(), "{policy:#}");
    container.wait_until_watched()?;
    container.sh("/opt/plugins/x")?;
    wait_for("the finding", || Ok((!container.findings()?.is_empty()).then_some(())))
}

/// The key of the set in `signed`.
fn keys() -> &'static minisign::KeyPair {
    static KEYS: std::sync::OnceLock<minisign::KeyPair> = std::sync::OnceLock::new();
    KEYS.get_or_init(|| {
        minisign::KeyPair::generate_unencrypted_keypair().expect("the machine has random numbers")
    })
}

fn signed_settings() -> &'static str {
    let key = keys().pk.to_base64();
    format!("[policy]\ndir = \"{{node}}/policy.d\"\npublic_key = \"{key}\"").leak()
}

/// Lists the policy files and signs the list, as an administrator does with `sha256sum` and
/// `minisign`.
fn sign(node: &Node, comment: &str) -> anyhow::Result<()> {
    let listed = std::process::Command::new("sh")
        .args(["-c", "sha256sum *.toml"])
        .current_dir(node.path("policy.d"))
        .output()?
        .stdout;
    let signature = minisign::sign(None, &keys().sk, listed.as_slice(), Some(comment), None)?;
    write(node, "SHA256SUMS", &String::from_utf8(listed)?)?;
    write(node, "SHA256SUMS.minisig", &signature.into_string())
}

fn signed(node: &Node) -> anyhow::Result<()> {
    write(node, "10-app.toml", PLUGINS)?;
    let is_refused = |policy: &Value, why: &str| {
        policy["refused"].as_str().is_some_and(|refused| refused.contains(why))
    };
    let policy = wait_for_policy(node, "the refusal", |policy| is_refused(policy, "SHA256SUMS"))?;
    ensure!(policy["rules"] == 0, "{policy:#}");
    sign(node, "set 1")?;
    let policy = wait_for_policy(node, "the signed set", |policy| policy["rules"] == 1)?;
    ensure!(policy["signed"] == "set 1" && policy["refused"].is_null(), "{policy:#}");
    // A file that the key did not sign changes nothing.
    write(node, "20-agent.toml", AGENT)?;
    let policy =
        wait_for_policy(node, "the refusal", |policy| is_refused(policy, "is not signed"))?;
    ensure!(policy["rules"] == 1 && policy["signed"] == "set 1", "{policy:#}");
    sign(node, "set 2")?;
    let policy = wait_for_policy(node, "the second set", |policy| policy["rules"] == 2)?;
    ensure!(policy["signed"] == "set 2", "{policy:#}");
    Ok(())
}

/// A CI runner: each step is a script of its own.
const STEPS: &str = "mkdir -p /home/runner/_work/_temp
for number in $(seq FROM TO); do
    step=/home/runner/_work/_temp/$number.sh
    echo \"sleep 0.1; echo $number\" >$step
    sh -e $step
    rm $step
done";

fn suggested(node: &Node) -> anyhow::Result<()> {
    let steps = |from: &str, to: &str| STEPS.replace("FROM", from).replace("TO", to);
    let runner = node.container()?;
    runner.sh(&steps("1", "24"))?;
    wait_for("the steps", || {
        let findings = runner.findings()?;
        Ok((findings.iter().any(|one| one["files"].as_u64() >= Some(24))).then_some(()))
    })
    .with_context(|| format!("{:#?}", runner.findings()))?;
    // A person in the container is no part of what is expected.
    runner.lay_payload("tool")?;
    runner.sh("cp /.control/tool /tmp/tool")?;
    sessions::run(&runner, &["--exec-id", "by-hand"], &["/tmp/tool"])?;
    wait_for("what the person ran", || {
        let findings = runner.findings()?;
        let by_hand = |one: &Value| one["kind"] == "exec.new" && !one["session"].is_null();
        Ok(findings.iter().any(by_hand).then_some(()))
    })?;

    let output = node.driftd(&["policy", "suggest", "--container", &runner.id])?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(text.contains("it happened in a session") && !text.contains("ALSO"), "{text}");
    let scripts = text.contains("\"/home/runner/_work/_temp/*.sh\"");
    ensure!(scripts && text.contains("from_image = true"), "{text}");
    // Without a reason, it is no policy file.
    write(node, "10-runner.toml", &text)?;
    wait_for_policy(node, "the refusal", |policy| {
        policy["refused"].as_str().is_some_and(|why| why.contains("`reason` is empty"))
    })?;
    let text = text.replace("reason = \"\"", "reason = \"the runner's steps\"");
    write(node, "10-runner.toml", &text)?;
    wait_for_policy(node, "the rules", |policy| {
        policy["refused"].is_null() && policy["rules"].as_u64() >= Some(1)
    })?;

    let other = node.container()?;
    other.sh(&steps("31", "54"))?;
    wait_for("the accepted steps", || {
        let all = accepted(&other)?;
        Ok(all.iter().any(|one| one["count"].as_u64() >= Some(24)).then_some(()))
    })
    .with_context(|| format!("{:#?}\n{text}", other.findings()))?;
    let reported = other.findings()?;
    ensure!(reported.is_empty(), "{reported:#?}");
    other.lay_payload("evil")?;
    other
        .sh("cp /.control/evil /home/runner/_work/_temp/999.sh; /home/runner/_work/_temp/999.sh
         echo 'sleep 0.1' >/tmp/evil.sh; sh /tmp/evil.sh")?;
    other
        .expect_findings(&[
            "critical exec.new /home/runner/_work/_temp/999.sh",
            "medium exec.interpreted /tmp/evil.sh",
        ])
        .map(drop)
}

const EVIL: &str = r#"
[[rule]]
id     = "evil"
reason = "a known attack"
effect = "report"
answer = ["kill"]
[rule.match]
kind = ["exec.*"]
path = ["/tmp/evil*"]
"#;

fn kills(node: &Node) -> anyhow::Result<()> {
    write(node, "10-evil.toml", EVIL)?;
    wait_for_policy(node, "the rule", |policy| policy["rules"] == 1)?;
    let container = node.container()?;
    container.run_dropped("other")?;
    container.expect_findings(&["critical exec.new /tmp/other"])?;
    container.lay_payload("evil")?;
    let _killed = container.begin("cp /.control/evil /tmp/evil; /tmp/evil")?;
    let killed = wait_for("the kill", || {
        let findings = container.findings()?;
        let killed = findings.into_iter().find(|one| one["outcome"]["succeeded"] == true);
        Ok(killed)
    })?;
    let verdict = &killed["verdict"];
    ensure!(killed["file"]["path"] == "/tmp/evil" && verdict["rule"] == "evil", "{killed:#}");
    ensure!(verdict["disposition"] == "kill" && verdict["dry_run"] == false, "{killed:#}");
    let timeline = node.answer(&["timeline", &container.id])?;
    let response = timeline.iter().find(|entry| entry["type"] == "response");
    let requested_by = &response.context("no response")?["response"]["requested_by"];
    ensure!(requested_by == "rule evil", "{requested_by}");
    Ok(())
}
