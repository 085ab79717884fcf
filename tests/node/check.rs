//! Time of check: programs whose bytes when they were executed differ from their bytes when
//! driftd reads them.

use std::fs;
use std::process::Command;
use std::sync::Mutex;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;

use crate::image::Layer;
use crate::node::{Container, Node, lock, summaries, wait_for};
use crate::{programs, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("x04_a_program_that_is_changed_back_is_still_modified", x04_changed_back),
        test("x04_a_program_that_is_touched_between_executions_is_silent", x04_touched),
    ]
}

const IMAGE: &str = "registry.test/raced:1";

/// Writes the byte behind `MARK=`, G in the image.
const TOOL: &str = "/app/tool";

fn compile(node: &Node, source: &str, options: &[&str]) -> anyhow::Result<Vec<u8>> {
    let program = node.path(&format!("{}-{source}", node.next_id()));
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/");
    let status = Command::new("gcc")
        .args(["-static", "-O1", "-s"])
        .args(options)
        .arg("-o")
        .args([program.as_os_str(), format!("{directory}{source}").as_ref()])
        .status()
        .context("cannot run gcc (run: make setup)")?;
    ensure!(status.success(), "gcc failed (run: make setup)");
    Ok(fs::read(program)?)
}

/// One at a time: the archive has one name.
static IMPORTING: Mutex<()> = Mutex::new(());

fn container(node: &Node) -> anyhow::Result<Container<'_>> {
    let importing = lock(&IMPORTING);
    let mut layer = Layer::new();
    for directory in ["/bin", "/dev", "/etc", "/proc", "/run", "/sys", "/app", "/.control"] {
        layer = layer.directory(directory, 0o755);
    }
    layer = layer.directory("/tmp", 0o1777);
    layer = layer.file("/bin/busybox", 0o755, &fs::read(programs::find("busybox")?)?);
    for applet in ["chown", "cp", "sh", "touch", "true"] {
        layer = layer.hard_link(format!("/bin/{applet}"), "/bin/busybox");
    }
    layer = layer.file("/bin/racer", 0o755, &compile(node, "racer.c", &[])?).file(
        TOOL,
        0o755,
        &compile(node, "tool.c", &["-nostdlib"])?,
    );
    node.import_layers(IMAGE, vec![layer])?;
    drop(importing);
    node.container_of(IMAGE)
}

fn x04_changed_back(node: &Node) -> anyhow::Result<()> {
    let container = container(node)?;
    // Other programs keep the threads that hash busy.
    let ran = container.sh(&format!(
        "chown 1000 {TOOL}; touch /bin/busybox; for i in 1 2 3 4 5 6 7 8 9 10; do /bin/true; done\n\
         racer held 10 {TOOL} /tmp/other"
    ))?;
    ensure!(ran.matches(" E").count() == 10, "it did not run as other bytes: {ran}");
    let expected = [format!("critical exec.modified {TOOL}")];
    // One for each content that was read.
    wait_for("ten executions", || {
        let findings = container.findings()?;
        let reported: u64 = findings.iter().filter_map(|finding| finding["count"].as_u64()).sum();
        Ok((reported == 10).then_some(()))
    })?;
    for finding in container.findings()? {
        ensure!(summaries(std::slice::from_ref(&finding)) == expected, "{finding:#}");
        let detail = finding["detail"].as_str().unwrap_or_default();
        ensure!(detail.contains("could change"), "{finding:#}");
    }
    Ok(())
}

fn x04_touched(node: &Node) -> anyhow::Result<()> {
    let container = container(node)?;
    // A reader of /proc keeps the program of an ended process busy for a moment.
    let opening = format!("until (: 5<>{TOOL}) 2>/dev/null; do :; done");
    for _ in 0..2 {
        for change in [format!("touch {TOOL}"), format!("chown 0:0 {TOOL}"), opening.clone()] {
            let ran = container.sh(&format!("{change}; {TOOL} 3>&1"))?;
            ensure!(ran == "G", "it did not run: {ran}");
            // The next change comes after this execution was examined.
            container.diff()?;
        }
    }
    container.expect_silence()
}
