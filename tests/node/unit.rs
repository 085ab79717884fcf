//! The product as it is installed: `make install` and the shipped unit, in a machine whose
//! process 1 is a real systemd (`scripts/machine`).
//!
//! The machine has this machine's programs, or those of the root directory that
//! `DRIFTD_MACHINE_ROOT` names (`make test-systemd`). With `DRIFTD_MACHINE_KERNEL` it is a
//! virtual one, and has the kernel of that Debian release (`make test-systemd-vm`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::node::{bench, end, spawn_daemon, talk, wait_for, wait_within};
use crate::programs::{WORKBENCH, compile, find};
use crate::{executable, test_without_node, vm};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_without_node("u01_the_installed_unit_reports_every_step_of_an_attack", attack),
        test_without_node(
            "u08_the_installed_unit_survives_signals_and_reads_its_settings_again",
            signals,
        ),
        test_without_node(
            "u13_the_installed_unit_is_upgraded_and_removed_while_containers_run",
            upgrade,
        ),
        test_without_node("u02_a_run_without_a_must_have_ends_and_names_the_cause", filtered),
        test_without_node("u02_doctor_reports_what_the_running_daemon_lacks", lacking),
        test_without_node("u08_the_installed_unit_replaces_each_process_that_is_stopped", stopped)
            .with_ignored_flag(true),
    ]
}

/// How long systemd may take to start something again, on a busy machine.
pub(crate) fn patience() -> Duration {
    if vm::kernel().is_some() { vm::PATIENCE } else { Duration::from_secs(90) }
}

// ---- the machine

/// A running machine. Dropped, it ends with everything in it.
pub(crate) struct Machine {
    directory: PathBuf,
    script: Child,
    inside: Inside,
}

/// How commands are run in a machine.
enum Inside {
    /// In the namespaces of its process 1, which has this number here.
    Process(i32),
    Control(vm::Control),
}

/// The sources, as the machine sees them.
const INSTALL: &str = "make --no-print-directory -C /src install-files PROGRAM=/share/driftd";

impl Machine {
    /// Boots a machine in which containerd runs and has the tests' image.
    pub(crate) fn boot(name: &str) -> anyhow::Result<Machine> {
        let bench = bench()?;
        let directory = bench.scratch.path().join(format!("machine-{name}"));
        let share = directory.join("share");
        fs::create_dir_all(share.join("drops"))?;
        // Without debugging information: the machine's disk is in memory.
        let strip = Command::new(find("strip")?)
            .arg("-o")
            .arg(share.join("driftd"))
            .arg(&bench.driftd)
            .output()?;
        ensure!(strip.status.success(), "{}", talk(&strip));
        fs::copy(&bench.workbench, share.join("workbench.tar"))?;
        let kernel = vm::kernel();
        let script = if kernel.is_some() { "virtual-machine" } else { "machine" };
        let mut command = Command::new(find("setpriv")?);
        command
            .args(["--pdeathsig", "TERM"])
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts").join(script))
            .arg(&directory)
            .args(std::env::var_os("DRIFTD_MACHINE_ROOT"))
            .args(&kernel);
        let script = spawn_daemon(&mut command, &directory.join("log"))?;
        let mut machine = Machine { directory, script, inside: Inside::Process(0) };
        machine.inside = wait_within(patience(), "the machine's process 1", || {
            if let Some(status) = machine.script.try_wait()? {
                let log = fs::read_to_string(machine.directory.join("log"))?;
                bail!("the machine ended ({status}): {log}");
            }
            if kernel.is_some() {
                return Ok(vm::Control::connect(&machine.directory).map(Inside::Control));
            }
            let pid = fs::read_to_string(machine.directory.join("pid")).ok();
            Ok(pid.map(|pid| pid.trim().parse().map(Inside::Process)).transpose()?)
        })?;
        if let Inside::Control(control) = &machine.inside {
            let console = machine.directory.join("console");
            control.booted().with_context(|| fs::read_to_string(console).unwrap_or_default())?;
        }
        machine.up()?;
        machine.sh("systemctl start containerd")?;
        wait_within(patience(), "containerd", || {
            Ok(machine.run("ctr version")?.status.success().then_some(()))
        })?;
        machine.sh("ctr images import /share/workbench.tar")?;
        Ok(machine)
    }

    /// Boots a machine, and installs driftd and the programs that are executed in containers.
    pub(crate) fn installed(name: &str) -> anyhow::Result<Machine> {
        let machine = Machine::boot(name)?;
        machine.install()?;
        machine.drop_files()?;
        Ok(machine)
    }

    /// Waits until everything has started that starts at boot.
    pub(crate) fn up(&self) -> anyhow::Result<()> {
        wait_within(patience(), "the machine to be up", || {
            let state = self.run("systemctl is-system-running")?;
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            ensure!(state != "degraded", "{}", self.sh("systemctl --failed --no-pager")?);
            Ok((state == "running").then_some(()))
        })
    }

    pub(crate) fn control(&self) -> anyhow::Result<&vm::Control> {
        match &self.inside {
            Inside::Control(control) => Ok(control),
            Inside::Process(_) => bail!("this machine is not a virtual one"),
        }
    }

    /// Runs the commands of README.md under "Install". But the program is built already, and
    /// the machine's user is root and has no sudo.
    pub(crate) fn install(&self) -> anyhow::Result<()> {
        let readme = include_str!("../../README.md");
        let (_, section) = readme.split_once("\n## Install\n").context("no such section")?;
        let (block, _) = section.split_once("\n```\n").context("no such commands")?;
        let lines = block.lines().filter_map(|line| line.strip_prefix("$ "));
        let mut commands = lines.map(|line| line.split('#').next().unwrap_or_default().trim());
        ensure!(commands.next() == Some("make install"), "{block}");
        let printed = self.sh(INSTALL)?;
        let next = next_step(&printed)?;
        let commands: Vec<&str> =
            commands.map(|line| line.strip_prefix("sudo ").unwrap_or(line)).collect();
        ensure!(commands.len() >= 3 && next == commands[..2].join(" && "), "{next}\n{block}");
        for command in commands {
            self.sh(command).with_context(|| self.logs())?;
        }
        self.watching().map(drop)
    }

    /// Waits until the unit runs and answers, and hands back the daemon's pid.
    fn watching(&self) -> anyhow::Result<u32> {
        wait_within(patience(), "driftd to watch", || {
            let active = self.sh("systemctl show -P ActiveState driftd")? == "active\n";
            if !active || !matches!(self.run("driftd status")?.status.code(), Some(0 | 1)) {
                return Ok(None);
            }
            Ok(Some(self.main_pid()?))
        })
        .with_context(|| self.logs())
    }

    /// Makes sure that systemd reports these properties of the unit.
    pub(crate) fn is(&self, expected: &[(&str, &str)]) -> anyhow::Result<()> {
        for (property, expected) in expected {
            let found = self.sh(&format!("systemctl show -P {property} driftd"))?;
            ensure!(found.trim() == *expected, "{property} is {found}{}", self.logs());
        }
        Ok(())
    }

    fn main_pid(&self) -> anyhow::Result<u32> {
        Ok(self.sh("systemctl show -P MainPID driftd")?.trim().parse()?)
    }

    /// The pid of the `daemon`, the `gate` or the `guardian`.
    fn pid_of(&self, process: &str) -> anyhow::Result<u32> {
        let daemon = self.main_pid()?;
        if process == "daemon" {
            return Ok(daemon);
        }
        Ok(self.sh(&format!("pgrep -P {daemon} -f exe.{process}"))?.trim().parse()?)
    }

    fn run(&self, commands: &str) -> anyhow::Result<Output> {
        let pid = match &self.inside {
            Inside::Process(pid) => pid,
            Inside::Control(control) => return control.run(commands),
        };
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        Command::new(find("nsenter")?)
            .args(["--target", &pid.to_string()])
            .args(["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", "--root", "--wd"])
            .args(["env", "-i", path, "HOME=/root", "LC_ALL=C", "sh", "-c", commands])
            .stdin(Stdio::null())
            .output()
            .context("cannot run nsenter")
    }

    /// Runs shell commands that must succeed, and hands back what they printed.
    pub(crate) fn sh(&self, commands: &str) -> anyhow::Result<String> {
        let output = self.run(&format!("set -e\n{commands}"))?;
        ensure!(output.status.success(), "{commands}\nfailed: {}", talk(&output));
        Ok(String::from_utf8(output.stdout)?)
    }

    pub(crate) fn lines(&self, commands: &str) -> anyhow::Result<Vec<Value>> {
        // 1 means that there is drift.
        let output = self.run(commands)?;
        ensure!(matches!(output.status.code(), Some(0 | 1)), "{commands}: {}", talk(&output));
        let text = String::from_utf8(output.stdout)?;
        text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }

    /// Starts a container, and waits until driftd watches it.
    pub(crate) fn container(&self, id: &str) -> anyhow::Result<()> {
        // The unit has a private /tmp. A bind mount of the host's /tmp must be seen.
        self.sh(&format!(
            "mkdir -p /tmp/volume; ctr run -d --cpu-shares 0 \
             --mount type=bind,src=/share/drops,dst=/.control,options=rbind:ro \
             --mount type=tmpfs,src=tmpfs,dst=/mem,options=rw:mode=1777 \
             --mount type=bind,src=/tmp/volume,dst=/volume,options=rbind:rw \
             {WORKBENCH} {id} /bin/sleep 100000"
        ))?;
        self.watched(id)
    }

    pub(crate) fn watched(&self, id: &str) -> anyhow::Result<()> {
        wait_within(patience(), "the container to be watched", || {
            let known = self.lines("driftd containers -o jsonl")?;
            let is_ready = known.iter().any(|container| {
                container["id"] == id
                    && container["watched"] == true
                    && container["baseline"] == "ready"
            });
            Ok(is_ready.then_some(()))
        })
        .with_context(|| self.logs())
    }

    /// Runs commands in a container, from outside.
    pub(crate) fn exec(&self, id: &str, commands: &str) -> anyhow::Result<Output> {
        fs::write(self.directory.join("share/drops/commands"), commands)?;
        let exec = self.directory.join("share/drops/commands").metadata()?;
        let number = std::os::unix::fs::MetadataExt::mtime_nsec(&exec);
        self.run(&format!("ctr task exec --exec-id e{number} {id} /bin/sh -e /.control/commands"))
    }

    /// The same for commands that must succeed.
    pub(crate) fn exec_ok(&self, id: &str, commands: &str) -> anyhow::Result<()> {
        let output = self.exec(id, commands)?;
        ensure!(output.status.success(), "{commands}: {}", talk(&output));
        Ok(())
    }

    pub(crate) fn logs(&self) -> String {
        let journal = self.run("journalctl --no-pager -n 60");
        journal.map(|output| talk(&output)).unwrap_or_default()
    }

    /// Removes a container as its users do. driftd may hold none of its files and mounts.
    fn remove(&self, id: &str) -> anyhow::Result<()> {
        self.sh(&format!("ctr task kill --signal SIGKILL {id}"))?;
        wait_within(patience(), "the task to end", || {
            Ok(self.run(&format!("ctr task rm {id}"))?.status.success().then_some(()))
        })?;
        self.sh(&format!("ctr container rm {id}"))?;
        let rootfs = format!("io.containerd.runtime.v2.task/default/{id}");
        self.sh(&format!("! test -e /run/containerd/{rootfs}"))?;
        // It is not mounted in driftd's mount namespace either.
        self.sh(&format!("! grep -q {rootfs} /proc/{}/mountinfo", self.main_pid()?))?;
        Ok(())
    }

    /// Writes the programs that are executed in containers.
    fn drop_files(&self) -> anyhow::Result<()> {
        let drops = self.directory.join("share/drops");
        for name in ["x", "y", "z", "v"] {
            let content = bench()?.payload.marked(&format!("unit {name}"));
            executable::write(&drops.join(name), &content)?;
        }
        let (source, library) = (self.directory.join("l.c"), drops.join("l.so"));
        fs::write(&source, LIBRARY)?;
        let gcc = Command::new("gcc")
            .args(["-shared", "-fPIC", "-o"])
            .arg(library)
            .arg(source)
            .output()?;
        ensure!(gcc.status.success(), "{}", talk(&gcc));
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Ok(pid) = self.script.id().try_into() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        let ended = wait_for("the machine to end", || Ok(self.script.try_wait()?));
        if ended.is_err() {
            end(&mut self.script);
        }
    }
}

/// The next step that `make install` prints.
fn next_step(printed: &str) -> anyhow::Result<&str> {
    let next = printed.lines().find_map(|line| line.split_once("next: "));
    Ok(next.context("install names no next step")?.1)
}

/// A library for LD_PRELOAD.
const LIBRARY: &str = "int nothing_of_the_image(void) { return 1; }";

// ---- attacks, signals, upgrades

/// The steps of an attack, each with the kind and the path of its finding.
fn steps() -> [(&'static str, &'static str, &'static str); 9] {
    // A virtual machine has its /tmp on its disk.
    let of_volume = if vm::kernel().is_some() { "exec.volume" } else { "exec.tmpfs" };
    [
        ("cp /.control/x /tmp/x; /tmp/x 300", "exec.new", "/tmp/x"),
        ("echo more >> /usr/bin/curl; /usr/bin/curl 300", "exec.modified", "/usr/bin/curl"),
        ("/usr/bin/loader memfd 1 /.control/y 300", "exec.fileless", ""),
        (
            "printf '#!/bin/sh\\nsleep 0.3\\n' > /tmp/s.sh; chmod 755 /tmp/s.sh; /tmp/s.sh",
            "exec.script",
            "/tmp/s.sh",
        ),
        ("cp /.control/z /mem/z; /mem/z 300", "exec.tmpfs", "/mem/z"),
        ("cp /.control/v /volume/v; /volume/v 300", of_volume, "/volume/v"),
        (
            "cp /.control/l.so /tmp/l.so; LD_PRELOAD=/tmp/l.so /bin/ls /",
            "library.loaded",
            "/tmp/l.so",
        ),
        ("mkdir -p /etc/cron.d; echo job > /etc/cron.d/job", "file.persistence", "/etc/cron.d/job"),
        ("cp /bin/busybox /tmp/nc; /tmp/nc true || true", "exec.relocated", "/tmp/nc"),
    ]
}

/// Plays the steps in a container, and waits until each is reported.
fn play(machine: &Machine, id: &str) -> anyhow::Result<()> {
    let steps = steps();
    for (step, _, _) in steps {
        machine.exec_ok(id, step)?;
    }
    let (mut missing, mut found) = (Vec::new(), Vec::new());
    let waited = wait_within(patience(), "every step to be reported", || {
        found = machine.lines(&format!("driftd findings --container {id} -o jsonl"))?;
        let is_reported = |kind: &str, path: &str| {
            found.iter().any(|finding| {
                finding["kind"] == kind && (path.is_empty() || finding["file"]["path"] == path)
            })
        };
        let steps = steps.iter().filter(|(_, kind, path)| !is_reported(kind, path));
        missing = steps.map(|(_, kind, _)| *kind).collect();
        Ok(missing.is_empty().then_some(()))
    });
    let count = steps.len() - missing.len();
    waited.with_context(|| {
        format!("{count} of {} reported; missing {missing:?}\n{found:#?}", steps.len())
    })
}

fn attack() -> anyhow::Result<()> {
    let machine = Machine::installed("attack")?;
    machine.sh("driftd doctor").context("doctor finds something missing")?;

    // A container that starts after driftd is watched, although driftd has a mount namespace of
    // its own.
    machine.container("first")?;
    play(&machine, "first")?;
    ensure!(machine.run("driftd diff first")?.status.code() == Some(1), "no difference is listed");
    // On a busy machine it may have begun before it was watched. A scan makes up for that.
    wait_within(patience(), "a complete view", || {
        Ok((machine.lines("driftd status -o jsonl")?[0]["complete"] == true).then_some(()))
    })
    .with_context(|| machine.logs())?;

    // A container that was there before driftd is watched too. A removed container is gone.
    machine.container("second")?;
    machine.sh("systemctl restart driftd")?;
    machine.watching()?;
    machine.watched("second")?;
    machine.container("third")?;
    play(&machine, "second")?;
    for id in ["first", "second", "third"] {
        machine.remove(id)?;
    }
    journal(&machine)
}

/// Makes sure that a finding is in the journal, with its priority and fields.
fn journal(machine: &Machine) -> anyhow::Result<()> {
    let query = "journalctl -u driftd -o json DRIFTD_KIND=exec.new DRIFTD_CONTAINER=first";
    let entries = wait_within(patience(), "the finding in the journal", || {
        let entries = machine.lines(query)?;
        Ok((!entries.is_empty()).then_some(entries))
    })?;
    let [entry] = entries.as_slice() else { bail!("logged {} times", entries.len()) };
    ensure!(entry["PRIORITY"] == "2" && entry["DRIFTD_PATH"] == "/tmp/x", "{entry:#}");
    ensure!(entry["SYSLOG_IDENTIFIER"] == "driftd", "{entry:#}");
    let message = entry["MESSAGE"].as_str().unwrap_or_default();
    ensure!(message.starts_with("critical exec.new in default/first: /tmp/x"), "{message}");
    let worst = machine.lines("journalctl -u driftd -o json -p err DRIFTD_KIND=exec.script")?;
    ensure!(worst.len() == 2, "{worst:#?}");
    Ok(())
}

const SETTINGS: &str = "/etc/driftd/driftd.toml";

fn signals() -> anyhow::Result<()> {
    let machine = Machine::installed("signals")?;
    machine.container("web")?;
    let first = machine.watching()?;

    // A setting that can change is in force; one that cannot is named.
    machine.sh(&format!(
        "cp {SETTINGS} /root/good
         sed -e 's/^kill_on = .*/kill_on = [\"exec.new\"]/' -e 's/^settle = .*/settle = \"3s\"/' \
         /root/good > {SETTINGS}; systemctl reload driftd"
    ))?;
    logged(
        &machine,
        "changed: respond.kill_on; changed in the file, in force after a restart: \
        watch.settle",
        "4",
    )?;
    // Wrong settings are refused as a whole, by `reload` and by the signal alone.
    machine.sh(&format!("printf 'nonsense = 1\n[respond]\nkill_on = []\n' > {SETTINGS}"))?;
    let refused = machine.run("systemctl reload driftd")?;
    ensure!(!refused.status.success(), "a reload of wrong settings succeeded");
    machine.sh("systemctl kill -s HUP driftd")?;
    logged(&machine, "the old ones stay", "3")?;
    logged(&machine, "nonsense", "3")?;
    ensure!(machine.watching()? == first, "SIGHUP has ended driftd");
    // By the old settings, this program ends its container, and the exec with it.
    let _ = machine.exec("web", "cp /.control/x /tmp/x; /tmp/x 60000")?;
    wait_within(patience(), "the container to be killed", || {
        let tasks = machine.sh("ctr task ls")?;
        Ok(tasks
            .lines()
            .any(|line| line.starts_with("web") && line.contains("STOPPED"))
            .then_some(()))
    })?;
    machine.sh(&format!("cp /root/good {SETTINGS}; systemctl reload driftd; ctr task rm web"))?;
    machine.sh("ctr container rm web")?;
    // A rule is in force when its file is there, and a reload names the fault of another one.
    let rules = |number: u64| {
        wait_within(patience(), "the rules", || {
            let status = machine.lines("driftd status -o jsonl")?;
            Ok(status.first().filter(|one| one["policy"]["rules"] == number).map(drop))
        })
    };
    machine.sh("mkdir /etc/driftd/policy.d; cd /etc/driftd/policy.d
         printf '[[rule]]\nid = \"a\"\nreason = \"b\"\neffect = \"report\"\n\
         [rule.match]\nuser = [0]\n' > a.toml")?;
    rules(1)?;
    machine.sh("echo 'rule = 3' > /etc/driftd/policy.d/b.toml")?;
    let refused = machine.run("systemctl reload driftd")?;
    ensure!(!refused.status.success(), "a reload of wrong rules succeeded");
    logged(&machine, "policy.d/b.toml:1:8", "3")?;
    rules(1)?;
    machine.sh("rm /etc/driftd/policy.d/*; systemctl reload driftd")?;
    rules(0)?;
    machine.container("other")?;
    answers(&machine, "other", rules)?;
    machine.sh("rmdir /etc/driftd/policy.d")?;

    // driftd survives a restart of containerd.
    machine.sh("systemctl restart containerd")?;
    machine.watched("other")?;
    ensure!(machine.watching()? == first, "a restart of containerd has ended driftd");

    // When any of its processes ends or stops, driftd comes back, and containers go on.
    for (process, signal) in [
        ("daemon", "KILL"),
        ("gate", "KILL"),
        ("guardian", "KILL"),
        ("daemon", "TERM"),
        ("daemon", "STOP"),
    ] {
        replaced(&machine, "other", process, signal)?;
    }

    // After a stop it does not come back.
    machine.sh("systemctl stop driftd")?;
    machine.is(&[("ActiveState", "inactive"), ("Result", "success")])?;

    // A restriction by a drop-in is named.
    machine.sh("mkdir -p /etc/systemd/system/driftd.service.d; printf '[Service]\nRestart=no\n\
         RestrictSUIDSGID=yes\n' > /etc/systemd/system/driftd.service.d/x.conf
         systemctl daemon-reload")?;
    let started = machine.run("systemctl start driftd")?;
    ensure!(!started.status.success(), "driftd runs without openat2");
    machine.is(&[("ActiveState", "failed"), ("ExecMainStatus", "2")])?;
    logged(&machine, "RestrictSUIDSGID=", "3")
}

/// What rules do under the unit: they deny a program, take evidence of a process and kill it.
fn answers(
    machine: &Machine,
    id: &str,
    rules: impl Fn(u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    machine.sh("cat > /etc/driftd/policy.d/a.toml <<'END'
[[rule]]
id      = \"deny\"
reason  = \"a test\"
effect  = \"report\"
answer  = [\"deny\"]
enforce = \"on\"
[rule.match]
kind = [\"exec.new\", \"exec.interpreted\"]
[[rule]]
id      = \"keep-and-kill\"
reason  = \"a test\"
effect  = \"report\"
answer  = [\"evidence\", \"kill-process\"]
enforce = \"on\"
[rule.match]
kind = [\"exec.fileless\"]
END
systemctl reload driftd")?;
    rules(2)?;
    wait_within(patience(), "a denial", || {
        let denied = machine.exec(id, "cp /.control/x /tmp/denied; /tmp/denied")?;
        Ok(talk(&denied).contains("not permitted").then_some(()))
    })
    .with_context(|| machine.logs())?;
    // Where the kernel asks before a file is read, the script is not read.
    if talk(&machine.run("driftd doctor")?).contains("fanotify_reads is there") {
        machine.exec(id, "echo 'echo it ran' >/tmp/script")?;
        wait_within(patience(), "a read that is denied", || {
            let ran = machine.exec(id, "sh /tmp/script")?;
            Ok((!talk(&ran).contains("it ran")).then_some(()))
        })?;
        wait_within(patience(), "its finding", || {
            let findings = machine.lines("driftd findings -o jsonl")?;
            let is_it = |one: &Value| {
                one["file"]["path"] == "/tmp/script" && one["outcome"]["action"] == "deny"
            };
            Ok(findings.iter().any(is_it).then_some(()))
        })
        .with_context(|| machine.logs())?;
    }
    let killed = machine.exec(id, "/usr/bin/loader memfd 1 /.control/y 60000")?;
    ensure!(!killed.status.success(), "a program in memory ran to its end: {}", talk(&killed));
    wait_within(patience(), "a case of evidence", || {
        let cases = machine.lines("driftd evidence ls -o jsonl")?;
        let case = cases.iter().find(|case| case["container"]["id"] == id);
        let Some(case) = case.and_then(|case| case["id"].as_str()) else { return Ok(None) };
        Ok(machine.run(&format!("driftd evidence verify {case}"))?.status.success().then_some(()))
    })
    .with_context(|| machine.logs())?;
    machine
        .sh(&format!("driftd report {id} --output /root/report.html; test -s /root/report.html"))?;
    machine.sh("rm /etc/driftd/policy.d/*; systemctl reload driftd")?;
    rules(0)
}

/// Waits until driftd's journal has a line with this text and priority.
fn logged(machine: &Machine, text: &str, priority: &str) -> anyhow::Result<()> {
    wait_within(patience(), &format!("{text:?} in the journal"), || {
        let entries = machine.lines("journalctl -u driftd -o json")?;
        let found = entries.iter().any(|entry| {
            entry["PRIORITY"] == priority
                && entry["MESSAGE"].as_str().is_some_and(|message| message.contains(text))
        });
        Ok(found.then_some(()))
    })
    .with_context(|| machine.logs())
}

/// Sends a signal to one of driftd's processes. Makes sure that the container goes on, and
/// waits until a new daemon watches it.
fn replaced(machine: &Machine, id: &str, process: &str, signal: &str) -> anyhow::Result<()> {
    let old = machine.watching()?;
    machine.sh(&format!("kill -{signal} {}", machine.pid_of(process)?))?;
    // No program waits for longer than the guardian does.
    machine.exec_ok(id, "true").with_context(|| format!("{process}, SIG{signal}"))?;
    wait_within(patience(), "driftd to be started again", || {
        let now = machine.main_pid()?;
        Ok((now != old && now != 0).then_some(()))
    })
    .with_context(|| format!("{process}, SIG{signal}: {}", machine.logs()))?;
    machine.watching()?;
    machine.watched(id)
}

fn stopped() -> anyhow::Result<()> {
    let machine = Machine::installed("stopped")?;
    machine.container("web")?;
    for process in ["daemon", "gate", "guardian"] {
        replaced(&machine, "web", process, "STOP")?;
    }
    play(&machine, "web")
}

/// Finds processes whose program is the installed one, also if it was removed since.
const RUNNING: &str = "ls -l /proc/[0-9]*/exe 2>/dev/null | grep '/usr/local/bin/driftd'";

fn upgrade() -> anyhow::Result<()> {
    let machine = Machine::boot("upgrade")?;
    machine.install()?;
    machine.container("web")?;
    let old = machine.watching()?;
    machine.sh(&format!("echo '# mine' >> {SETTINGS}"))?;

    let printed = machine.sh(INSTALL)?;
    let next = next_step(&printed)?;
    ensure!(next.contains("try-restart"), "{printed}");
    ensure!(machine.main_pid()? == old, "installing has ended the daemon");
    machine.sh(next)?;
    let new = machine.watching()?;
    ensure!(new != old, "the old program still runs");
    let program = machine.sh(&format!("readlink /proc/{new}/exe"))?;
    ensure!(program == "/usr/local/bin/driftd\n", "{program}");
    machine.watched("web")?;
    let kept = machine.sh(&format!("tail -n 1 {SETTINGS}; ls /etc/driftd"))?;
    ensure!(kept == "# mine\ndriftd.toml\ndriftd.toml.new\n", "{kept}");
    let unit = machine.sh("systemctl cat driftd")?;
    ensure!(unit.contains("file:/usr/local/share/doc/driftd/README.md"), "{unit}");
    machine.sh("test -e /usr/local/share/doc/driftd/README.md")?;

    // Units that start containers wait at boot until driftd watches.
    let service = "[Service]\\nExecStart=/bin/true\\n";
    for unit in ["docker", "kubelet", "k3s"] {
        let file = format!("/etc/systemd/system/{unit}.service");
        machine.sh(&format!("printf '{service}' > {file}"))?;
    }
    machine.sh("systemctl daemon-reload")?;
    for unit in ["docker", "kubelet", "k3s"] {
        let after = machine.sh(&format!("systemctl show -P After {unit}"))?;
        ensure!(after.split_whitespace().any(|name| name == "driftd.service"), "{unit}: {after}");
    }

    machine.sh(RUNNING)?;
    machine.sh("make --no-print-directory -C /src uninstall")?;
    machine.is(&[("ActiveState", "inactive"), ("LoadState", "not-found")])?;
    let left = machine.sh("find /usr/local /etc/systemd -name 'driftd*'")?;
    ensure!(left.is_empty(), "{left}");
    ensure!(machine.run(RUNNING)?.status.code() == Some(1), "driftd runs on");
    let tasks = machine.sh("ctr task ls; ls /etc/driftd/driftd.toml /var/lib/driftd/history.db")?;
    ensure!(tasks.contains("RUNNING"), "{tasks}");
    machine.exec_ok("web", "true")
}

// ---- without a machine

/// Executes a program for which some system calls fail: `filter ERRNO CALL... -- PROGRAM...`.
const FILTER: &str = r#"
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    struct sock_filter filter[32] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
    };
    unsigned short length = 1;
    int error = atoi(argv[1]), i;
    for (i = 2; i < argc && strcmp(argv[i], "--") != 0; i++) {
        struct sock_filter test = BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, atoi(argv[i]), 0, 1);
        struct sock_filter fail = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error);
        filter[length++] = test;
        filter[length++] = fail;
    }
    struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    filter[length++] = allow;
    struct sock_fprog program = { length, filter };
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) {
        perror("filter");
        return 1;
    }
    execv(argv[i + 1], argv + i + 1);
    perror(argv[i + 1]);
    return 1;
}
"#;

/// A scratch directory with settings for a daemon that finds no containerd.
struct Bare(tempfile::TempDir);

impl Bare {
    fn new() -> anyhow::Result<Bare> {
        let bare = Bare(tempfile::tempdir_in(bench()?.scratch.path())?);
        let directory = bare.0.path();
        let shown = directory.display();
        fs::write(
            directory.join("driftd.toml"),
            format!(
                "state_dir = \"{shown}/state\"\nsocket = \"{shown}/driftd.sock\"\n\
                 [containerd]\nsockets = [\"{shown}/containerd.sock\"]\n"
            ),
        )?;
        compile(directory, "filter", FILTER)?;
        Ok(bare)
    }

    /// `driftd COMMAND`, for which a system call fails.
    fn without(&self, call: i64, error: i32, command: &str) -> anyhow::Result<Command> {
        let directory = self.0.path();
        let mut filtered = Command::new(directory.join("filter"));
        filtered
            .args([error.to_string(), call.to_string(), "--".to_owned()])
            .arg(&bench()?.driftd)
            .arg(command)
            .arg("--config")
            .arg(directory.join("driftd.toml"))
            .stdin(Stdio::null());
        Ok(filtered)
    }
}

fn filtered() -> anyhow::Result<()> {
    let bare = Bare::new()?;
    let openat2 = nix::libc::SYS_openat2;
    let fanotify = nix::libc::SYS_fanotify_init;
    for (call, error, words) in [
        (openat2, nix::libc::ENOSYS, "the unit's RestrictSUIDSGID= does"),
        (openat2, nix::libc::EPERM, "name openat2 in the unit's SystemCallFilter="),
        (fanotify, nix::libc::EPERM, "name fanotify_init in the unit's SystemCallFilter="),
        (fanotify, nix::libc::ENOSYS, "name fanotify_init in the unit's SystemCallFilter="),
    ] {
        run_is_refused(&mut bare.without(call, error, "run")?, words)
            .with_context(|| format!("call {call} fails with {error}"))?;
        let doctor = bare.without(call, error, "doctor")?.output()?;
        let printed = talk(&doctor);
        ensure!(doctor.status.code() == Some(2) && printed.contains(words), "{printed}");
    }
    let words = "CAP_LEASE (to see who can write to a program while it is executed) (run as root; \
                 in a unit they belong in CapabilityBoundingSet=)";
    let mut run = Command::new(find("setpriv")?);
    run.args(["--bounding-set", "-lease"])
        .arg(&bench()?.driftd)
        .args(["run", "--config"])
        .arg(bare.0.path().join("driftd.toml"))
        .stdin(Stdio::null());
    run_is_refused(&mut run, words)
}

/// Makes sure that this daemon ends with code 2, and prints `words`.
fn run_is_refused(command: &mut Command, words: &str) -> anyhow::Result<()> {
    let mut run = command.stderr(Stdio::piped()).spawn()?;
    let ended = wait_for("run to end", || Ok(run.try_wait()?));
    end(&mut run);
    let printed = talk(&run.wait_with_output()?);
    ensure!(ended?.code() == Some(2) && printed.contains(words), "{printed}");
    Ok(())
}

fn lacking() -> anyhow::Result<()> {
    let bare = Bare::new()?;
    // The kernel's records, which driftd wants but can run without.
    let call = nix::libc::SYS_perf_event_open;
    let mut run = bare.without(call, nix::libc::EPERM, "run")?;
    let mut daemon = spawn_daemon(&mut run, &bare.0.path().join("log"))?;
    let found = wait_for("doctor to ask the daemon", || {
        let doctor = Command::new(&bench()?.driftd)
            .args(["doctor", "-o", "jsonl", "--config"])
            .arg(bare.0.path().join("driftd.toml"))
            .output()?;
        let text = String::from_utf8(doctor.stdout)?;
        let lacking = text.lines().find(|line| line.contains("it lacks perf_exec_records"));
        Ok(lacking.map(str::to_owned))
    });
    kill(Pid::from_raw(daemon.id().try_into()?), Signal::SIGTERM)?;
    wait_for("the daemon to end", || Ok(daemon.try_wait()?))?;
    let found: Value = serde_json::from_str(&found?)?;
    ensure!(found["name"] == "daemon" && found["result"] == "warn", "{found:#}");
    let detail = found["detail"].as_str().unwrap_or_default();
    ensure!(detail.contains("this process has it, so the daemon's unit"), "{detail}");
    Ok(())
}
