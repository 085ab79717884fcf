//! Containers that run again, images that change under their name or are removed, and
//! ordinary work meanwhile.

use std::fs;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;

use crate::image::Layer;
use crate::node::{Node, bench, only, wait_for};
use crate::{programs, test};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("a03_a_multicall_program_under_another_name_is_relocated", a03_applet),
        test("a44_a_container_that_runs_again_keeps_its_history", a44_again),
        test("a44_an_image_under_the_same_name_is_another_baseline", a44_same_tag),
        test("b29_hooks_of_a_clone_are_only_recorded", b29_clone),
        test("b30_other_images_come_and_go_in_silence", b30_other_images),
    ]
}

fn a03_applet(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("cp /bin/busybox /tmp/nc; /tmp/nc --help || true")?;
    let findings = container.expect_findings(&["high exec.relocated /tmp/nc"])?;
    let relocated = only(&findings, "exec.relocated")?;
    assert_eq!(relocated["expected"]["blake3"], relocated["file"]["blake3"], "{relocated:#}");
    Ok(())
}

fn a44_again(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.run_dropped("x")?;
    // A scan while the execution is being described would report the file too.
    container.expect_findings(&["critical exec.new /tmp/x"])?;
    container.sh("rm /usr/bin/wget")?;
    container.diff()?;
    let expected = ["critical exec.new /tmp/x", "low file.removed /usr/bin/wget"];
    let before = container.expect_findings(&expected)?;

    let fifo = node.path("fifo");
    node.ctr(&["task", "rm", "--force", &container.id])?;
    wait_for("driftd to see it stopped", || {
        let known = node.answer(&["containers"])?;
        let is_watched = known
            .iter()
            .any(|known| known["id"] == container.id.as_str() && known["watched"] == true);
        Ok((!is_watched).then_some(()))
    })?;
    node.ctr(&["task", "start", "-d", "--fifo-dir", &fifo.to_string_lossy(), &container.id])?;
    container.wait_until_watched()?;
    container.sh("/tmp/x")?;
    container.counted("exec.new", 2)?;
    let after = container.expect_findings(&expected)?;
    let (old, new) = (only(&before, "exec.new")?, only(&after, "exec.new")?);
    assert_eq!(old["id"], new["id"], "{new:#}");
    assert_eq!(new["count"], 2, "{new:#}");
    assert_eq!(only(&before, "file.removed")?, only(&after, "file.removed")?);
    Ok(())
}

/// A layer with a shell and a few commands.
fn shell() -> anyhow::Result<Layer> {
    let mut layer = Layer::new();
    for directory in ["/bin", "/dev", "/etc", "/proc", "/run", "/sys", "/app", "/.control"] {
        layer = layer.directory(directory, 0o755);
    }
    layer = layer.directory("/tmp", 0o1777);
    layer = layer.file("/bin/busybox", 0o755, &fs::read(programs::find("busybox")?)?);
    for applet in ["sh", "cp", "rm"] {
        layer = layer.hard_link(format!("/bin/{applet}"), "/bin/busybox");
    }
    Ok(layer)
}

fn a44_same_tag(node: &Node) -> anyhow::Result<()> {
    const IMAGE: &str = "registry.test/updated:1";
    let payload = &bench()?.payload;
    let version = |version: &str| {
        Layer::new().file("/app/tool", 0o755, &payload.marked(&format!("tool {version}")))
    };
    let first = node.import_layers(IMAGE, vec![shell()?, version("1")])?;
    let old = node.container_of(IMAGE)?;
    let second = node.import_layers(IMAGE, vec![shell()?, version("2")])?;
    ensure!(first.manifest != second.manifest, "both images are the same");
    let new = node.container_of(IMAGE)?;
    // Each is judged by the image it was made from.
    let tool = payload.marked("tool 2");
    for container in [&old, &new] {
        container.lay("tool", &tool)?;
        container.sh("/app/tool; cp /.control/tool /app/tool; /app/tool")?;
    }
    old.expect_findings(&["critical exec.modified /app/tool"])?;
    new.expect_silence()
}

fn b29_clone(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir -p /app/clone/.git/hooks; cd /app/clone; echo text > README\n\
         for hook in pre-commit update; do\n\
         printf '#!/bin/sh\\n: %s\\n' $hook > .git/hooks/$hook.sample\n\
         chmod +x .git/hooks/$hook.sample; done")?;
    container
        .expect_findings(&[
            "low file.added /app/clone/.git/hooks/pre-commit.sample",
            "low file.added /app/clone/.git/hooks/update.sample",
        ])
        .map(drop)
}

fn b30_other_images(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let payload = &bench()?.payload;
    for round in 0..4 {
        let image = format!("registry.test/passing:{round}");
        let mut layer = Layer::new().directory("/app", 0o755);
        for number in 0..20 {
            let mark = format!("{round} {number}");
            layer = layer.file(format!("/app/{number}"), 0o755, &payload.marked(&mark));
        }
        let file = node.path(&format!("passing-{round}.tar"));
        crate::image::write(&file, &image, vec![layer])?;
        node.import(&file)?;
        container.sh("/usr/bin/app; echo work >> /var/log/app.log")?;
        node.ctr(&["images", "rm", "--sync", &image])?;
    }
    // Threads that read layers have a lower priority than the containers.
    let daemon = node.driftd_pid()?;
    let mut urgent = Vec::new();
    for thread in fs::read_dir(format!("/proc/{daemon}/task"))? {
        let stat = fs::read_to_string(thread?.path().join("stat"));
        // A thread without work ends after a while.
        let Ok(stat) = stat else { continue };
        let (name, rest) = stat.rsplit_once(')').context("no name")?;
        let name = name.split_once('(').context("no name")?.1;
        let nice: i32 = rest.split_whitespace().nth(16).context("no nice value")?.parse()?;
        if nice < 0 {
            urgent.push(name.to_owned());
        }
    }
    ensure!(
        urgent.iter().all(|name| [
            "gate",
            "take",
            "closings",
            "describe",
            "processes",
            "trace",
            "feed",
            "unseen",
            "mounts",
            "errand"
        ]
        .iter()
        .any(|usual| name.starts_with(usual))),
        "more urgent than the containers' own work: {urgent:?}"
    );
    container.expect_silence()
}
