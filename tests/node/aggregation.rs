//! Floods and package managers: which files become members of one finding, that none of them
//! is lost, and that important ones still have a finding of their own.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::budget::resident;
use crate::image::Layer;
use crate::node::{Container, Node, bench, end, only, wait_for, wait_within};
use crate::programs::{self, TINY};
use crate::{test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("a26_installing_a_package_is_one_transaction", a26_package),
        test("a27_installing_with_pip_is_one_transaction", a27_pip),
        test("a37_a_flood_of_new_programs_is_reported_one_by_one", a37_build),
        test_alone("a39_twenty_thousand_copies_hide_nothing", "", a39_copies),
        test_alone("a_storm_of_executions_freezes_nothing_and_is_counted", "", storm),
        test_alone("a_hundred_thousand_scripts_freeze_nothing_and_are_counted", "", scripts),
        test(
            "a42_programs_of_a_foreign_root_are_reported_as_members_of_one_finding",
            a42_foreign_root,
        ),
        test("b02_looking_for_updates_is_no_transaction", b02_update),
        test("b22_installing_busybox_is_silent_or_one_finding", b22_busybox),
        test_alone("a_package_manager_hides_no_program_beside_it", "", beside),
    ]
}

fn members(node: &Node, finding: &Value) -> anyhow::Result<BTreeSet<String>> {
    let id = finding["id"].as_str().context("a finding without an ID")?;
    let members = node.answer(&["members", id])?;
    Ok(members.iter().filter_map(|one| one["path"].as_str().map(str::to_owned)).collect())
}

fn wait_for_files(container: &Container<'_>, kind: &str, files: u64) -> anyhow::Result<Value> {
    let mut last = Vec::new();
    let found = wait_within(Duration::from_secs(120), &format!("{kind} of {files} files"), || {
        last = container.findings()?;
        Ok(last.iter().find(|one| one["kind"] == kind && one["files"] == files).cloned())
    });
    found.with_context(|| {
        let lines = last
            .iter()
            .map(|one| format!("{} {} {}", one["kind"], one["file"]["path"], one["files"]));
        lines.collect::<Vec<String>>().join("\n")
    })
}

fn resident_kib(node: &Node) -> anyhow::Result<u64> {
    Ok(resident(node)? >> 10)
}

/// An archive of programs, each with its path.
fn archive(programs: impl IntoIterator<Item = (String, Vec<u8>)>) -> anyhow::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for (path, program) in programs {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(program.len() as u64);
        archive.append_data(&mut header, path, &program[..])?;
    }
    Ok(archive.into_inner()?)
}

const COPIES: u32 = 20_000;

fn a39_copies(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let copies = (0..COPIES).map(|number| (format!("t{number}"), programs::tiny_program()));
    container.lay("copies.tar", &archive(copies)?)?;
    container.lay_payload("x")?;
    let before = resident_kib(node)?;
    let mut follower = node
        .driftd_command(&["findings", "--follow", "-o", "jsonl", "--container", &container.id])
        .stdout(Stdio::piped())
        .spawn()?;
    let stream = BufReader::new(follower.stdout.take().context("no stdout")?);
    container.sh("/bin/busybox tar xf /.control/copies.tar -C /tmp")?;
    let started = Instant::now();
    container.sh("cp /.control/x /tmp/x; /tmp/x")?;
    let mut is_reported = None;
    for line in stream.lines() {
        if line?.contains("\"exec.new\"") {
            is_reported = Some(started.elapsed());
            break;
        }
    }
    end(&mut follower);
    let is_reported = is_reported.context("the stream ended without exec.new")?;

    let relocated = wait_for_files(&container, "file.relocated", u64::from(COPIES))?;
    let after = resident_kib(node)?;
    eprintln!(
        "a39: exec to finding {is_reported:?} (with the way to and from the shell), \
         RSS {before} KiB before, {after} KiB after"
    );
    ensure!(
        is_reported < Duration::from_secs(5),
        "the execution was reported after {is_reported:?}"
    );
    let reported = |container: &Container<'_>| {
        let findings = container.findings()?;
        let kinds: Vec<&str> = findings.iter().filter_map(|one| one["kind"].as_str()).collect();
        ensure!(kinds.len() == 2, "{kinds:?}");
        only(&findings, "exec.new")?;
        let copies = only(&findings, "file.relocated")?;
        ensure!(copies["files"] == COPIES, "{copies:#}");
        anyhow::Ok(())
    };
    container.diff()?;
    reported(&container)?;
    ensure!(members(node, &relocated)?.len() == COPIES as usize, "some cannot be listed");

    // After a restart everything is found again, and nothing is reported again.
    node.stop_driftd()?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    container.diff()?;
    container.sh(&format!("cat {TINY} > /tmp/more; chmod +x /tmp/more"))?;
    wait_for_files(&container, "file.relocated", u64::from(COPIES) + 1)?;
    ensure!(members(node, &relocated)?.len() == COPIES as usize + 1, "some cannot be listed");
    ensure!(container.findings()?.len() == 2, "{:#?}", container.findings()?);
    Ok(())
}

fn a37_build(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let programs = (0..300).map(|number| {
        let mark = format!("{} {number}", container.id);
        let program = [programs::tiny_program(), mark.into()].concat();
        (format!("go-build{number}/exe/x"), program)
    });
    container.lay("build.tar", &archive(programs)?)?;
    container.sh("/bin/busybox tar xf /.control/build.tar -C /tmp\n\
         for program in /tmp/go-build*/exe/x; do $program; done")?;
    wait_for("300 executions", || {
        let findings = container.findings()?;
        Ok((findings.iter().filter(|one| one["kind"] == "exec.new").count() == 300).then_some(()))
    })?;
    container.diff()?;
    let findings = container.findings()?;
    ensure!(
        findings.iter().all(|one| one["kind"] != "file.added" || one["file"]["path"].is_string())
    );
    let written = findings.iter().filter(|one| one["kind"] == "file.added");
    // Files that settled before they were run.
    ensure!(written.count() <= 256 + 65, "{}", findings.len());
    Ok(())
}

/// How much more memory a flood may take, and how soon drift of another container must be
/// reported meanwhile, on a busy machine. Neither may grow with the flood.
const MORE_KIB: u64 = 128 * 1024;
const BESIDE: Duration = Duration::from_secs(20);

/// How soon drift of another container is reported during a flood.
fn is_reported_beside(other: &Container<'_>) -> anyhow::Result<Duration> {
    other.lay_payload("x")?;
    let began = Instant::now();
    other.sh("cp /.control/x /tmp/x; /tmp/x")?;
    wait_within(BESIDE, "what happens beside the flood", || {
        Ok(other.findings()?.iter().any(|one| one["kind"] == "exec.new").then_some(()))
    })?;
    Ok(began.elapsed())
}

/// The losses, by which the view is incomplete.
fn losses(node: &Node) -> anyhow::Result<Vec<Value>> {
    Ok(node.status()?["losses"].as_array().cloned().unwrap_or_default())
}

fn storm(node: &Node) -> anyhow::Result<()> {
    let (container, other) = (node.container()?, node.container()?);
    container.lay_payload("x")?;
    container.sh("cp /.control/x /tmp/x")?;
    let before = resident_kib(node)?;
    let flood = container.begin("/usr/bin/loader storm 6 24 /tmp/x")?;
    let beside = is_reported_beside(&other)?;
    let ran = flood.finish(Duration::from_secs(120))?;
    let executed: u64 = ran.output.trim().parse().with_context(|| ran.output.clone())?;
    let mut counted = 0;
    let all = wait_for("every execution", || {
        let findings = container.findings()?;
        let found = findings.iter().find(|one| one["kind"] == "exec.new");
        counted = found.map_or(0, |one| one["count"].as_u64().unwrap_or(0));
        Ok((counted >= executed).then_some(()))
    });
    let (losses, after) = (losses(node)?, resident_kib(node)?);
    eprintln!(
        "storm: {counted} of {executed} executions, beside it after {beside:?}, \
         RSS {before} KiB before, {after} KiB after, losses {losses:?}"
    );
    // Fewer may be reported only if a loss is named.
    ensure!(counted <= executed && (all.is_ok() || !losses.is_empty()), "{losses:?}");
    ensure!(after < before + MORE_KIB, "{after} KiB");
    ensure!(container.findings()?.len() == 1, "{:#?}", container.findings()?);
    Ok(())
}

fn scripts(node: &Node) -> anyhow::Result<()> {
    const COUNT: u64 = 100_000;
    let (container, other) = (node.container()?, node.container()?);
    let before = resident_kib(node)?;
    let flood =
        container.begin(&format!("mkdir /tmp/s; /usr/bin/loader scripts {COUNT} /tmp/s"))?;
    let beside = is_reported_beside(&other)?;
    let ran = flood.finish(Duration::from_secs(120))?;
    let took =
        Duration::from_micros(ran.output.trim().parse().with_context(|| ran.output.clone())?);
    let number = |finding: &Value| finding["files"].as_u64().unwrap_or(1);
    let mut counted = 0;
    let all = wait_within(Duration::from_secs(120), "every script", || {
        container.diff()?;
        counted = container.findings()?.iter().map(number).sum();
        Ok((counted >= COUNT).then_some(()))
    });
    let (status, after) = (node.status()?, resident_kib(node)?);
    eprintln!(
        "scripts: {counted} of {COUNT} made in {took:?}, beside it after {beside:?}, \
         RSS {before} KiB before, {after} KiB after, {} left to scans, losses {}",
        status["left_to_sweeps"], status["losses"]
    );
    all?;
    ensure!(counted == COUNT, "{counted} scripts");
    ensure!(after < before + MORE_KIB, "{after} KiB");
    let findings = container.findings()?;
    ensure!(findings.len() < 64 && findings.iter().all(|one| one["kind"] == "file.added"));
    Ok(())
}

fn a42_foreign_root(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let payload = &bench()?.payload;
    let programs = (0..40).map(|number| {
        let mark = format!("{} root {number}", container.id);
        (format!("alpine/bin/p{number}"), payload.marked(&mark))
    });
    container.lay("alpine.tar", &archive(programs)?)?;
    container.sh("/bin/busybox tar xf /.control/alpine.tar -C /tmp\n\
         i=0; while [ $i -lt 40 ]; do /bin/busybox chroot /tmp/alpine /bin/p$i 30; i=$((i+1)); done")?;
    let mut kinds = Vec::new();
    wait_for("the executions of a foreign root", || {
        let findings = container.findings()?;
        kinds = findings
            .iter()
            .filter(|one| one["kind"] == "exec.new")
            .map(|one| one["files"].as_u64().unwrap_or(1))
            .collect();
        Ok((kinds.iter().sum::<u64>() == 40).then_some(()))
    })
    .with_context(|| format!("{kinds:?}"))?;
    // A program that has ended before its root could be read has a finding of its own.
    ensure!(kinds.len() < 40, "all have findings of their own: {kinds:?}");
    Ok(())
}

/// Programs of this machine that install packages, and what they need.
const PACKAGE_PROGRAMS: &[&str] =
    &["dpkg", "dpkg-deb", "dpkg-split", "dpkg-query", "tar", "apt-get", "apt-cache"];

const INSTALLER: &str = "registry.test/installer:1";

/// A container whose image can install packages.
fn installer(node: &Node) -> anyhow::Result<Container<'_>> {
    if !node.ctr(&["images", "ls", "-q"])?.lines().any(|name| name == INSTALLER) {
        node.import_layers(INSTALLER, installer_layers()?)?;
    }
    node.container_of(INSTALLER)
}

/// The layers of an image that can install packages.
pub(crate) fn installer_layers() -> anyhow::Result<Vec<Layer>> {
    let layer = Layer::new()
        .directory("/var/lib", 0o755)
        .directory("/var/lib/dpkg", 0o755)
        .directory("/var/lib/dpkg/info", 0o755)
        .directory("/var/lib/dpkg/updates", 0o755)
        .directory("/var/lib/dpkg/triggers", 0o755)
        .file("/var/lib/dpkg/status", 0o644, b"");
    let mut layers = programs::workbench(&bench()?.payload)?;
    layers
        .push(programs::with_programs(layer, PACKAGE_PROGRAMS, |name| format!("/usr/bin/{name}"))?);
    Ok(layers)
}

/// Builds a package with these files, and with a script that copies a program of
/// the image after the installation.
pub(crate) fn package(
    container: &Container<'_>,
    files: &[(&str, Vec<u8>)],
) -> anyhow::Result<Vec<u8>> {
    use std::os::unix::fs::PermissionsExt as _;
    let scratch = tempfile::tempdir()?;
    let tree = scratch.path().join("tree");
    let write = |path: &Path, content: &[u8], mode: u32| {
        fs::create_dir_all(path.parent().context("a file without a directory")?)?;
        fs::write(path, content)?;
        anyhow::Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
    };
    for (path, content) in files {
        write(&tree.join(path.trim_start_matches('/')), content, 0o755)?;
    }
    let control = format!(
        "Package: nmap\nVersion: 1.{}\nArchitecture: all\nMaintainer: tests <tests@localhost>\n\
         Description: a package of the tests\n",
        container.id.trim_start_matches(char::is_alphabetic)
    );
    write(&tree.join("DEBIAN/control"), control.as_bytes(), 0o644)?;
    let script = b"#!/bin/bash\n/bin/cp /usr/bin/tiny /usr/bin/nmap-helper\n\
        ( printf '\\177ELF\\2\\1\\1\\0\\0\\0\\0\\0\\0\\0\\0\\0\\2\\0\\76\\0' > /usr/bin/nmap-shell )\n\
        [ ! -e /.control/passwd ] || /usr/sbin/useradd write /.control/passwd /etc/passwd\n";
    write(&tree.join("DEBIAN/postinst"), script, 0o755)?;
    fs::set_permissions(&tree, fs::Permissions::from_mode(0o755))?;
    let file = scratch.path().join("nmap.deb");
    let output = Command::new("dpkg-deb")
        .args(["--root-owner-group", "-Znone", "--build"])
        .arg(&tree)
        .arg(&file)
        .output()
        .context("cannot run dpkg-deb (run: make setup)")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut bytes = Vec::new();
    fs::File::open(&file)?.read_to_end(&mut bytes)?;
    Ok(bytes)
}

pub(crate) const INSTALL: &str = "export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
     /usr/bin/dpkg --force-bad-path --force-depends -i /.control/nmap.deb";

fn a26_package(node: &Node) -> anyhow::Result<()> {
    let container = installer(node)?;
    let mark =
        |what: &str| [programs::tiny_program(), format!("{} {what}", container.id).into()].concat();
    let names: Vec<String> = (0..60).map(|number| format!("/usr/lib/nmap/tool{number}")).collect();
    let mut files: Vec<(&str, Vec<u8>)> =
        names.iter().map(|name| (name.as_str(), mark(name))).collect();
    files.push(("/usr/bin/nmap", mark("nmap")));
    container.lay("nmap.deb", &package(&container, &files)?)?;
    container.sh(&format!("{INSTALL}\n/usr/bin/nmap"))?;
    wait_for("the transaction", || {
        let findings = container.findings()?;
        let transaction = findings.iter().find(|one| one["kind"] == "package.transaction");
        Ok(transaction.is_some_and(|one| one["files"].as_u64() >= Some(61)).then_some(()))
    })?;
    container.diff()?;
    std::thread::sleep(Duration::from_millis(1500));
    let findings = container.findings()?;
    let transaction = only(&findings, "package.transaction")?;
    let listed = members(node, transaction)?;
    let missing: Vec<&(&str, Vec<u8>)> =
        files.iter().filter(|(path, _)| !listed.contains(*path)).collect();
    let alone: Vec<String> = findings
        .iter()
        .filter(|one| one["kind"] != "package.transaction")
        .map(|one| format!("{} {}", one["kind"], one["file"]["path"]))
        .collect();
    eprintln!(
        "a26: {} files in the transaction, {} of the package missing, alone: {alone:?}",
        transaction["files"],
        missing.len()
    );
    ensure!(missing.is_empty(), "not in the transaction: {}\n{alone:#?}", missing.len());
    assert_eq!(transaction["severity"], "medium");
    assert_eq!(transaction["process"]["exe"], "/usr/bin/dpkg", "{transaction:#}");
    ensure!(listed.contains("/var/lib/dpkg/info/nmap.postinst"), "{listed:?}");
    for written in ["/usr/bin/nmap-helper", "/usr/bin/nmap-shell"] {
        ensure!(listed.contains(written), "{written} of a script: {listed:?}\n{alone:?}");
    }
    let run = only(&findings, "exec.new")?;
    assert_eq!(run["file"]["path"], "/usr/bin/nmap");
    assert_eq!(run["transaction"], transaction["id"], "{run:#}");
    ensure!(findings.len() == 2, "{alone:?}");
    Ok(())
}

/// A package of one module and one program, which is what most are.
const WHEEL: &str = r#"
import zipfile
wheel = zipfile.ZipFile("/tmp/tool-1.0-py3-none-any.whl", "w")
about = "tool-1.0.dist-info/"
files = {
    "tool.py": "def main():\n    print('ran')\n",
    about + "METADATA": "Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n",
    about + "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    about + "entry_points.txt": "[console_scripts]\ntool = tool:main\n",
}
for name, content in files.items():
    wheel.writestr(name, content)
wheel.writestr(about + "RECORD", "".join(name + ",,\n" for name in [*files, about + "RECORD"]))
wheel.close()
"#;

const PIP_IMAGE: &str = "registry.test/pip:1";

fn a27_pip(node: &Node) -> anyhow::Result<()> {
    let mut layers = programs::workbench(&bench()?.payload)?;
    layers.push(programs::python()?);
    node.import_layers(PIP_IMAGE, layers)?;
    let container = node.container_of(PIP_IMAGE)?;
    container.lay("wheel.py", WHEEL.as_bytes())?;
    // As an argument: a script file would be reported.
    container.sh("/usr/bin/python3 -c \"$(cat /.control/wheel.py)\"")?;
    let ran =
        container.sh("export PYTHONPATH=$(echo /usr/share/python-wheels/pip-*.whl) HOME=/tmp\n\
         /usr/bin/python3 -m pip install --no-index --no-cache-dir --target /opt/tool \
         --root-user-action ignore /tmp/tool-1.0-py3-none-any.whl\n\
         PYTHONPATH=/opt/tool /opt/tool/bin/tool")?;
    ensure!(ran.ends_with("ran\n"), "{ran}");
    wait_for("the program's run and where it comes from", || {
        let findings = container.findings()?;
        let is_there = |kind: &str| findings.iter().any(|one| one["kind"] == kind);
        Ok((is_there("exec.script") && is_there("package.transaction")).then_some(()))
    })?;
    container.diff()?;
    let findings = container.findings()?;
    let transaction = only(&findings, "package.transaction")?;
    assert_eq!(transaction["severity"], "medium");
    let listed = members(node, transaction)?;
    ensure!(listed.contains("/opt/tool/bin/tool"), "{listed:?}");
    // Also the temporary path at which pip writes it first.
    ensure!(listed.iter().all(|path| path.ends_with("/bin/tool")), "{listed:?}");
    assert_eq!(only(&findings, "exec.script")?["file"]["path"], "/opt/tool/bin/tool");
    wait_for("the link between both", || {
        let findings = container.findings()?;
        Ok((only(&findings, "exec.script")?["transaction"] == transaction["id"]).then_some(()))
    })?;
    ensure!(container.findings()?.len() == 2, "{findings:#?}");
    Ok(())
}

/// A file that another process writes while a package manager runs has a finding of its own.
fn beside(node: &Node) -> anyhow::Result<()> {
    let container = installer(node)?;
    let tool = [programs::tiny_program(), container.id.clone().into_bytes()].concat();
    container.lay("nmap.deb", &package(&container, &[("/usr/bin/nmap", tool)])?)?;
    container.lay_payload("x")?;
    container.sh(&format!(
        "( {INSTALL} ) & i=0\n\
         while [ $i -lt 20 ]; do cat /.control/x > /usr/bin/x$i; chmod +x /usr/bin/x$i; i=$((i+1)); done\n\
         wait"
    ))?;
    container.diff()?;
    std::thread::sleep(Duration::from_millis(2500));
    container.diff()?;
    wait_for("all of it to be reported", || {
        let findings = container.findings()?;
        let count = |kind: &str| findings.iter().filter(|one| one["kind"] == kind).count();
        Ok((count("file.added") >= 20 && count("package.transaction") > 0).then_some(()))
    })?;
    let findings = container.findings()?;
    let transaction = only(&findings, "package.transaction")?;
    let listed = members(node, transaction)?;
    ensure!(listed.iter().all(|path| !path.starts_with("/usr/bin/x")), "{listed:?}");
    let alone = findings.iter().filter(|one| one["kind"] == "file.added").count();
    ensure!(alone == 20, "{alone} findings of their own: {findings:#?}");
    Ok(())
}

fn b02_update(node: &Node) -> anyhow::Result<()> {
    let container = installer(node)?;
    container.sh("export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
         mkdir -p /etc/apt/apt.conf.d /etc/apt/preferences.d /etc/apt/sources.list.d \
         /var/lib/apt/lists/partial /var/cache/apt/archives/partial /usr/lib/apt/methods\n\
         mkdir -p /tmp/repository; : > /tmp/repository/Packages\n\
         dpkg-query -l || true; dpkg --audit || true; apt-cache gencaches || true\n\
         apt-get update || true")?;
    container.expect_silence()
}

fn b22_busybox(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh("mkdir /opt/links; /bin/busybox --install -s /opt/links; /bin/ls /")?;
    container.expect_silence()?;

    let container = node.container()?;
    container.sh("mkdir /opt/applets; /bin/busybox --install /opt/applets; /bin/ls /")?;
    let count = container.sh("/bin/ls /opt/applets | /bin/busybox wc -l")?;
    let count: u64 = count.trim().parse()?;
    container.diff()?;
    let relocated = wait_for_files(&container, "file.relocated", count)?;
    assert_eq!(relocated["severity"], "info");
    let findings = container.findings()?;
    ensure!(findings.len() == 1, "{findings:#?}");
    ensure!(members(node, &relocated)?.len() as u64 == count, "some cannot be listed");
    Ok(())
}
