//! What driftd keeps of one event for the next: a namespace's number, the process that wrote
//! a file, the package transaction that brought it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::aggregation::{INSTALL, installer_layers, package};
use crate::image::Layer;
use crate::node::{Container, Node, bench, only, summaries, wait_for};
use crate::programs;
use crate::{test, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("w02_a_namespace_number_that_is_reused_belongs_to_no_container", namespaces),
        test("w12_a_finding_names_the_process_and_the_transaction", complete),
        test_alone(
            "w12_a_writer_that_executed_nothing_is_named_by_its_parents_program",
            "",
            forked,
        ),
        test("w12_a_program_that_is_overwritten_and_run_at_once_has_no_former_writer", overwritten),
        test("w18_a_kernel_module_is_reported_and_an_object_file_is_not", modules),
        test("r13_drivers_that_the_runtime_binds_are_a_few_findings", drivers),
    ]
}

fn namespaces(node: &Node) -> anyhow::Result<()> {
    // Other processes on this machine may get the numbers.
    let ended = (0..5).find_map(|_| is_reused(node).transpose());
    let ended = ended.context("no number of a namespace was reused")??;
    // When this is reported, all earlier records have been read.
    let other = node.container()?;
    other.run_dropped("x")?;
    other.expect_findings(&["critical exec.new /tmp/x"])?;
    let findings = ended.findings()?;
    ensure!(findings.is_empty(), "{findings:#?}");
    let sessions = node.answer(&["sessions", "-c", &ended.id])?;
    ensure!(sessions.is_empty(), "{sessions:#?}");
    Ok(())
}

/// Ends a container's init, and makes namespaces at once. Returns the container if one of them
/// has a number that the container had.
fn is_reused(node: &Node) -> anyhow::Result<Option<Container<'_>>> {
    let container = node.container()?;
    let init = container.init()?;
    let names = ["mnt", "pid"].map(|kind| fs::read_link(format!("/proc/{init}/ns/{kind}")));
    kill(Pid::from_raw(init), Signal::SIGKILL)?;
    // They are made while init ends and before containerd reports it. Each lives long enough to
    // be examined.
    let given = "readlink /proc/self/ns/mnt /proc/self/ns/pid; sleep 0.5";
    let others = (0..24).map(|_| {
        let mut command = Command::new("unshare");
        command.args(["-m", "-p", "-f", "sh", "-c", given]).stdout(Stdio::piped()).spawn()
    });
    let mut is_same = false;
    for other in others.collect::<Result<Vec<_>, _>>()? {
        let given = String::from_utf8(other.wait_with_output()?.stdout)?;
        let has = |name: &std::io::Result<std::path::PathBuf>| {
            name.as_ref().is_ok_and(|name| given.lines().any(|line| Path::new(line) == name))
        };
        is_same |= names.iter().any(has);
    }
    Ok(is_same.then_some(container))
}

/// Maps each of its arguments as the dynamic linker does a library.
const MAPPER: &str = r#"
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        int fd = open(argv[i], O_RDONLY);
        if (fd < 0 || mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) == MAP_FAILED)
            return 1;
        close(fd);
    }
    usleep(400000);
    return 0;
}
"#;

fn mapper() -> anyhow::Result<Layer> {
    let program = programs::compile(bench()?.scratch.path(), "mapper", MAPPER)?;
    Ok(Layer::new().file("/usr/bin/mapper", 0o755, &program))
}

const INSTALLER: &str = "registry.test/installer:2";

fn complete(node: &Node) -> anyhow::Result<()> {
    let mut layers = installer_layers()?;
    layers.push(mapper()?);
    node.import_layers(INSTALLER, layers)?;
    let container = node.container_of(INSTALLER)?;
    let mark =
        |what: &str| [programs::tiny_program(), format!("{} {what}", container.id).into()].concat();
    let libraries = ["one", "two", "three"].map(|name| format!("/usr/lib/nmap/lib{name}.so"));
    let mut files: Vec<(&str, Vec<u8>)> =
        libraries.iter().map(|path| (path.as_str(), mark(path))).collect();
    files.push(("/usr/bin/nmap", mark("nmap")));
    container.lay("nmap.deb", &package(&container, &files)?)?;
    // Each is loaded by a process of its own, and at once.
    let [one, two, three] = &libraries;
    container.sh(&format!(
        "{INSTALL}\n/usr/bin/mapper {one}; /usr/bin/mapper {two} & /usr/bin/mapper {three}\n\
         wait; /usr/bin/nmap; /usr/bin/nmap-helper"
    ))?;
    // Besides: files that a short process and a shell write, and that run later.
    container.lay_payload("x")?;
    container
        .sh("cp /.control/x /tmp/x; printf '#!/bin/sh\\nsleep 0.3\\n' > /tmp/s; chmod +x /tmp/s")?;
    let is_reported = |findings: &[Value], kind: &str, path: &str| {
        findings.iter().any(|one| one["kind"] == kind && one["file"]["path"] == path)
    };
    wait_for("what was written", || {
        let findings = container.findings()?;
        let all =
            ["/tmp/x", "/tmp/s"].iter().all(|path| is_reported(&findings, "file.added", path));
        Ok(all.then_some(()))
    })?;
    container.sh("/tmp/x; /tmp/s")?;
    let findings = wait_for("what was run", || {
        container.diff()?;
        let findings = container.findings()?;
        let all = is_reported(&findings, "exec.new", "/tmp/x")
            && is_reported(&findings, "exec.script", "/tmp/s")
            && findings.iter().any(|one| one["kind"] == "library.loaded");
        Ok(all.then_some(findings))
    })?;
    let lines = summaries(&findings);
    let transaction = &only(&findings, "package.transaction")?["id"];
    let lacks = |what: &str, is_without: &dyn Fn(&Value) -> bool| -> Vec<String> {
        let lacking = findings.iter().filter(|one| is_without(one));
        lacking.map(|one| format!("no {what}: {one:#}")).collect()
    };
    let mut lacking = lacks("program", &|one| !one["process"]["exe"].is_string());
    lacking.extend(lacks("arguments", &|one| !one["process"]["argv"].is_array()));
    lacking.extend(lacks("transaction", &|one| {
        let path = one["file"]["path"].as_str().unwrap_or_default();
        let is_brought = one["kind"] != "package.transaction" && path.contains("nmap");
        is_brought && one["transaction"] != *transaction
    }));
    lacking.extend(lacks("story", &|one| {
        let is_run = one["kind"].as_str().is_some_and(|kind| kind.starts_with("exec."));
        let path = one["file"]["path"].as_str().unwrap_or_default();
        is_run && path.starts_with("/tmp/") && one["story"].is_null()
    }));
    ensure!(lacking.is_empty(), "{} lacking of {lines:#?}\n{}", lacking.len(), lacking.join("\n"));
    let loaded: u64 = findings
        .iter()
        .filter(|one| one["kind"] == "library.loaded")
        .map(|one| one["files"].as_u64().unwrap_or(1))
        .sum();
    ensure!(loaded == 3, "{loaded} libraries of {lines:#?}");
    Ok(())
}

/// Each program is written by `cp`, overwritten in place by `cat`, and run within the
/// millisecond. The event of the second writer may not have been read by then.
fn overwritten(node: &Node) -> anyhow::Result<()> {
    const TIMES: usize = 40;
    let container = node.container()?;
    container.lay_payload("first")?;
    for number in 0..TIMES {
        container.lay_payload(&format!("second{number}"))?;
    }
    container.sh(&format!(
        "for number in $(seq 0 {}); do
             cp /.control/first /opt/program$number
             cat /.control/second$number >/opt/program$number
             /opt/program$number
         done",
        TIMES - 1
    ))?;
    let executed = wait_for("the executions", || {
        let mut findings = container.findings()?;
        findings.retain(|one| one["kind"] == "exec.new");
        Ok((findings.len() == TIMES).then_some(findings))
    })?;
    let writers: Vec<Option<&str>> =
        executed.iter().map(|one| one["writer"]["exe"].as_str()).collect();
    let is_former = |writer: &&Option<&str>| writer.is_some_and(|exe| exe.ends_with("/cp"));
    let former = writers.iter().filter(is_former).count();
    let known = writers.iter().flatten().count();
    eprintln!("of {TIMES} writers, {known} are known");
    ensure!(former == 0, "{former} of {TIMES} have the former writer: {writers:?}");
    ensure!(known > TIMES / 2, "only {known} of {TIMES} writers are known: {writers:?}");
    Ok(())
}

/// Forks of a shell that ran before driftd did; they execute nothing and end at once.
fn forked(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    node.stop_driftd()?;
    node.start_driftd()?;
    container.wait_until_watched()?;
    container.sh("i=0; while [ $i -lt 12 ]; do\n\
         ( printf '\\177ELF\\2\\1\\1\\0\\0\\0\\0\\0\\0\\0\\0\\0\\2\\0\\76\\0' > /tmp/x$i ) &\n\
         i=$((i+1)); done; wait")?;
    let written = wait_for("all of them", || {
        let mut findings = container.findings()?;
        findings.retain(|one| one["kind"] == "file.added");
        Ok((findings.len() == 12).then_some(findings))
    })?;
    for finding in written {
        let process = &finding["process"];
        ensure!(process["exe"].as_str().is_some_and(|exe| exe.starts_with("/bin/")), "{finding:#}");
        ensure!(process["argv"].is_array(), "{finding:#}");
    }
    Ok(())
}

fn modules(node: &Node) -> anyhow::Result<()> {
    let container = node.container()?;
    let module = "__attribute__((section(\".gnu.linkonce.this_module\"))) char this[1024] = {1};";
    for (name, text) in [("module", module), ("object", "int main(void) { return 0; }")] {
        container.lay(name, &object(name, text)?)?;
    }
    container.sh(
        "cp /.control/module /tmp/x.ko; cp /.control/module /tmp/unnamed\n\
         cp /.control/object /tmp/main.o; cp /.control/object /tmp/main.ko; chmod 755 /tmp/main.ko",
    )?;
    container
        .expect_findings(&["low file.added /tmp/unnamed", "low file.added /tmp/x.ko"])
        .map(drop)
}

/// An object file as the compiler of this machine writes it.
fn object(name: &str, text: &str) -> anyhow::Result<Vec<u8>> {
    let scratch = bench()?.scratch.path();
    let [source, object] = ["c", "o"].map(|end| scratch.join(format!("w18-{name}.{end}")));
    fs::write(&source, text)?;
    let status = Command::new("gcc").arg("-c").arg("-o").arg(&object).arg(&source).status()?;
    ensure!(status.success(), "gcc -c failed");
    Ok(fs::read(object)?)
}

const DRIVEN: &str = "registry.test/driven:1";

fn drivers(node: &Node) -> anyhow::Result<()> {
    let mut layers = programs::workbench(&bench()?.payload)?;
    layers.push(mapper()?);
    node.import_layers(DRIVEN, layers)?;
    let directory = node.path("drivers");
    fs::create_dir_all(&directory)?;
    let mut options = Vec::new();
    let mut libraries = Vec::new();
    for number in 0..12 {
        let name = ["cuda", "nvml", "ptx", "gl"][number % 4];
        let name = format!("lib{name}.so.{}", number / 4);
        let library = [programs::tiny_program(), name.clone().into()].concat();
        options.push((directory.join(&name), format!("/usr/lib/{name}"), library));
        libraries.push(format!("/usr/lib/{name}"));
    }
    let smi = bench()?.payload.marked("smi");
    options.push((directory.join("smi"), "/usr/bin/smi".to_owned(), smi));
    let mut mounts = Vec::new();
    for (from, to, content) in options {
        fs::write(&from, content)?;
        fs::set_permissions(&from, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        mounts.push("--mount".to_owned());
        mounts.push(format!("type=bind,src={},dst={to},options=rbind:ro", from.display()));
    }
    let mounts: Vec<&str> = mounts.iter().map(String::as_str).collect();
    let container = node.run(&node.namespace, DRIVEN, &mounts)?;
    container.wait_until_watched()?;
    // As a program and its workers load them.
    let mapped = libraries.join(" ");
    container.sh(&format!(
        "/usr/bin/smi; /usr/bin/mapper {mapped} & /usr/bin/mapper {mapped} & /usr/bin/mapper {mapped}\n\
         wait"
    ))?;
    container.lay_payload("evil")?;
    container.sh("cat /.control/evil > /tmp/evil.so; /usr/bin/mapper /tmp/evil.so")?;
    let findings = wait_for("the library of another process", || {
        let findings = container.findings()?;
        let is_reported = findings.iter().any(|one| one["file"]["path"] == "/tmp/evil.so");
        Ok(is_reported.then_some(findings))
    })?;
    let loud: Vec<String> =
        summaries(&findings).into_iter().filter(|line| !line.starts_with("info ")).collect();
    // The program, the attack, and one line for each process that was the first to load a library.
    ensure!(loud.len() <= 5, "{findings:#?}");
    let high: Vec<&String> = loud.iter().filter(|line| line.starts_with("high ")).collect();
    ensure!(high == ["high library.loaded /tmp/evil.so"], "{loud:#?}");
    // No file of it is lost.
    let files = |kind: &str| -> u64 {
        let of_kind = findings.iter().filter(|one| one["kind"] == kind);
        of_kind.map(|one| one["files"].as_u64().unwrap_or(1)).sum()
    };
    ensure!(files("library.loaded") == 13 && files("exec.volume") == 1, "{findings:#?}");
    Ok(())
}
