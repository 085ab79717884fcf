//! The process and the session that a change is attributed to, also when they end at once.

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Node, wait_for};
use crate::{sessions, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("w15_a_file_of_a_short_exec_names_its_process_and_session", w15_short),
        test("w05_a_script_that_is_found_by_env_is_one_finding", w05_env),
        test("w17_a_script_without_a_first_line_is_one_finding", w17_bare),
    ]
}

fn w05_env(node: &Node) -> anyhow::Result<()> {
    one_script(node, "#!/usr/bin/env sh\nsleep 1\n", "/bin/sh")
}

fn w17_bare(node: &Node) -> anyhow::Result<()> {
    // busybox's shell executes another shell for it, bash reads it itself.
    one_script(node, "sleep 1\n", "/bin/sh")?;
    one_script(node, "sleep 1\n", "/bin/bash")
}

/// A script that is run by its path is reported once, with the process that ran it.
fn one_script(node: &Node, text: &str, shell: &str) -> anyhow::Result<()> {
    let container = node.container()?;
    container.lay("script", text.as_bytes())?;
    container.sh("mkdir -p /usr/bin; [ -e /usr/bin/env ] || ln -s /bin/busybox /usr/bin/env
        cp /.control/script /tmp/script; chmod +x /tmp/script")?;
    container.sh(&format!("{shell} -c '/tmp/script; :'"))?;
    let findings = wait_for("the script", || {
        let findings = container.findings()?;
        let is_run = findings.iter().any(|one| one["kind"] == "exec.script");
        Ok(is_run.then_some(findings))
    })?;
    drop(findings);
    // By then any later finding has come.
    container.diff()?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    container.diff()?;
    let mut findings = container.findings()?;
    findings.retain(|one| one["kind"].as_str().is_some_and(|kind| kind.starts_with("exec.")));
    let [run] = findings.as_slice() else { anyhow::bail!("{findings:#?}") };
    ensure!(run["kind"] == "exec.script" && run["process"]["exe"].is_string(), "{run:#}");
    Ok(())
}

/// Execs without a terminal, each of which writes one line and ends.
const EXECS: usize = 10;

fn w15_short(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir -p /etc/cron.d")?;
    for number in 0..EXECS {
        let id = format!("job{number}");
        let command = match number % 3 {
            0 => format!("echo '* * * * * root x' > /etc/cron.d/{id}"),
            1 => format!("echo '* * * * * root x' | busybox tee /etc/cron.d/{id}"),
            _ => format!("(echo '* * * * * root x' >> /etc/cron.d/{id})"),
        };
        sessions::run(&container, &["--exec-id", &id], &["/bin/bash", "-c", &command])?;
    }
    let jobs = |container: &Container<'_>| {
        let mut findings = container.findings()?;
        findings.retain(|one| one["kind"] == "file.persistence");
        Ok::<_, anyhow::Error>(findings)
    };
    let findings = wait_for("the jobs", || {
        let findings = jobs(&container)?;
        Ok((findings.len() == EXECS).then_some(findings))
    })?;
    let sessions = node.answer(&["sessions", "-c", &container.id])?;
    for finding in &findings {
        let path = finding["file"]["path"].as_str().context("a path")?;
        let id = path.rsplit('/').next().context("a name")?;
        let process = &finding["process"];
        // The arguments of a process that ends at once may not be recorded.
        ensure!(process["exe"].is_string(), "{finding:#}");
        let session = sessions.iter().find(|session| session["id"] == finding["session"]);
        let session = session.with_context(|| format!("no session: {finding:#}"))?;
        let arguments: &Value = &session["process"]["argv"];
        ensure!(arguments.to_string().contains(id), "{finding:#}\n{session:#}");
    }
    Ok(())
}
