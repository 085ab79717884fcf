//! `driftd top` in a real terminal, on a real node: the terminal is tmux.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;

use crate::node::{Node, talk, wait_for};
use crate::{programs, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![test_alone(
        "top_shows_findings_and_answers_only_when_confirmed",
        "",
        shows_findings_and_answers,
    )]
}

/// A tmux of the test's own, with one window. Dropping it ends what runs there.
struct Tmux {
    socket: PathBuf,
}

impl Tmux {
    /// Runs a shell's command in a window of 100 columns and 30 lines.
    fn start(node: &Node, command: &str) -> anyhow::Result<Tmux> {
        let tmux = Tmux { socket: node.path("tmux.sock") };
        let size = ["new-session", "-d", "-x", "100", "-y", "30"];
        tmux.run(&[&size[..], &[command]].concat())?;
        Ok(tmux)
    }

    fn run(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(programs::find("tmux")?);
        command.args(["-u", "-f", "/dev/null", "-S"]).arg(&self.socket).args(arguments);
        // Not a window of the tmux in which the tests may run.
        let output = command.env_remove("TMUX").env("LC_ALL", "C.UTF-8").output()?;
        ensure!(output.status.success(), "tmux {arguments:?}: {}", talk(&output));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn screen(&self) -> anyhow::Result<String> {
        self.run(&["capture-pane", "-p"])
    }

    /// Waits until the screen shows a text, and returns the screen.
    fn wait_for(&self, text: &str) -> anyhow::Result<String> {
        let mut last = String::new();
        wait_for(&format!("{text:?} on the screen"), || {
            last = self.screen()?;
            Ok(last.contains(text).then(|| last.clone()))
        })
        .with_context(|| format!("the screen is\n{last}"))
    }

    fn key(&self, name: &str) -> anyhow::Result<()> {
        self.run(&["send-keys", name]).map(drop)
    }

    fn enter(&self, text: &str) -> anyhow::Result<()> {
        self.run(&["send-keys", "-l", text])?;
        self.key("Enter")
    }

    /// One of tmux's values about the terminal.
    fn value(&self, name: &str) -> anyhow::Result<String> {
        let text = self.run(&["display-message", "-p", &format!("#{{{name}}}")])?;
        Ok(text.trim().to_owned())
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let _ = self.run(&["kill-server"]);
    }
}

fn shows_findings_and_answers(node: &Node) -> anyhow::Result<()> {
    let container = node.settled_container()?;
    let id = &container.id;
    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/dropped; /tmp/dropped")?;
    container.expect_findings(&["critical exec.new /tmp/dropped"])?;

    let (program, socket) = (node.driftd_command(&[]), node.path("driftd.sock"));
    let command = format!(
        "{} --socket {} top; echo \"it ended with $?\"; stty -a; exec sleep 600",
        program.get_program().display(),
        socket.display()
    );
    let tmux = Tmux::start(node, &command)?;
    let screen = tmux.wait_for("/tmp/dropped")?;
    ensure!(screen.contains("CRITICAL exec.new"), "{screen}");
    let screen = tmux.wait_for("View complete")?;
    let line = screen.lines().find(|line| line.contains("running complete"));
    let line = line.with_context(|| format!("the container is not shown\n{screen}"))?;
    ensure!(line.contains(id) && line.contains("/workbench:1"), "{line}");
    ensure!(tmux.value("alternate_on")? == "1");

    // What is found while it runs is shown by itself.
    container.sh("cp /.control/x /tmp/later; /tmp/later")?;
    tmux.wait_for("/tmp/later")?;

    // The newest one, whole.
    tmux.key("Enter")?;
    let screen = tmux.wait_for("A program was executed that is not in the image.")?;
    ensure!(screen.contains("/tmp/later") && screen.contains("Esc closes"), "{screen}");

    tmux.key("k")?;
    let screen = tmux.wait_for(&format!("Type {id} to confirm"))?;
    ensure!(screen.contains("Kill every process of the container"), "{screen}");
    tmux.enter("yes")?;
    tmux.wait_for("not confirmed: nothing was done")?;
    container.sh("true").context("the container runs on")?;
    ensure!(responses(node, id)?.is_empty());

    tmux.key("k")?;
    tmux.wait_for(&format!("Type {id} to confirm"))?;
    tmux.enter(id)?;
    tmux.wait_for("Type the reason")?;
    container.sh("true").context("the container runs until there is a reason")?;
    tmux.enter("ran a dropped program")?;
    tmux.wait_for("done: killed")?;
    wait_for("the container to be killed", || {
        let tasks = node.ctr(&["task", "ls"])?;
        let line = tasks.lines().find(|line| line.split_whitespace().next() == Some(id.as_str()));
        Ok(line.is_none_or(|line| !line.contains("RUNNING")).then_some(()))
    })?;
    let responses = responses(node, id)?;
    ensure!(responses.len() == 1, "{responses:#?}");
    let response = &responses[0]["response"];
    ensure!(response["reason"] == "ran a dropped program", "{response:#}");
    ensure!(response["outcome"]["action"] == "kill", "{response:#}");
    // It was asked for with the finding, which names that run.
    ensure!(response["finding"].is_string(), "{response:#}");

    tmux.key("q")?;
    let screen = tmux.wait_for("it ended with 0")?;
    let screen = if screen.contains("icanon") { screen } else { tmux.wait_for("icanon")? };
    let words: Vec<&str> = screen.split([' ', '\n', ';']).collect();
    let is_usual = ["icanon", "echo", "isig", "opost", "icrnl"].map(|word| words.contains(&word));
    ensure!(!is_usual.contains(&false), "{screen}");
    ensure!(tmux.value("alternate_on")? == "0" && tmux.value("cursor_flag")? == "1");
    Ok(())
}

/// The responses to a container, as the history keeps them.
fn responses(node: &Node, id: &str) -> anyhow::Result<Vec<serde_json::Value>> {
    let timeline = node.answer(&["timeline", id])?;
    Ok(timeline.into_iter().filter(|entry| entry["type"] == "response").collect())
}
