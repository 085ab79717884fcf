//! Who has changed what, also of processes that end at once.

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::node::{Container, Node, wait_for};
use crate::trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![trial("w15_what_a_short_exec_wrote_names_its_process_and_session", w15_short)]
}

/// Execs without a terminal, each of which writes one line and ends.
const EXECS: usize = 10;

fn w15_short(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir -p /etc/cron.d")?;
    let fifo = node.path("fifo").display().to_string();
    for number in 0..EXECS {
        let id = format!("job{number}");
        let command = match number % 3 {
            0 => format!("echo '* * * * * root x' > /etc/cron.d/{id}"),
            1 => format!("echo '* * * * * root x' | busybox tee /etc/cron.d/{id}"),
            _ => format!("(echo '* * * * * root x' >> /etc/cron.d/{id})"),
        };
        let exec = ["task", "exec", "--fifo-dir", &fifo, "--exec-id", &id, &container.id];
        node.ctr(&[&exec[..], &["/bin/bash", "-c", &command]].concat())?;
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
        ensure!(process["exe"].is_string() && process["argv"].is_array(), "{finding:#}");
        let above = format!("{process}");
        ensure!(above.contains(id), "it names what was run: {finding:#}");
        let session = sessions.iter().find(|session| session["id"] == finding["session"]);
        let session = session.with_context(|| format!("no session: {finding:#}"))?;
        let asked_for: &Value = &session["process"]["argv"];
        ensure!(asked_for.to_string().contains(id), "{finding:#}\n{session:#}");
    }
    Ok(())
}
