//! A virtual machine (`scripts/virtual-machine`): commands in it, and the tests that need a
//! whole boot.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use jiff::Timestamp;
use libtest_mimic::Trial;

use crate::node::wait_within;
use crate::programs::WORKBENCH;
use crate::test_without_node;
use crate::unit::{Machine, patience};

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test_without_node(
            "u13_the_installed_unit_watches_from_boot_on_and_reports_the_time_of_a_reboot",
            reboot,
        )
        .with_ignored_flag(true),
    ]
}

/// The Debian release whose kernel is booted, if the machines are virtual ones.
pub(crate) fn kernel() -> Option<OsString> {
    std::env::var_os("DRIFTD_MACHINE_KERNEL")
}

/// Without /dev/kvm, the processor is emulated, and the machine has other work.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// The service in a virtual machine that runs commands.
pub(crate) struct Control {
    lines: RefCell<BufReader<UnixStream>>,
    /// Where the machine finds commands, and leaves what they print.
    directory: PathBuf,
    count: Cell<u32>,
}

impl Control {
    pub(crate) fn connect(directory: &Path) -> Option<Control> {
        let stream = UnixStream::connect(directory.join("control")).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        Some(Control {
            lines: RefCell::new(BufReader::new(stream)),
            directory: directory.join("share/run"),
            count: Cell::new(0),
        })
    }

    fn line(&self) -> anyhow::Result<String> {
        let mut line = String::new();
        let length = self.lines.borrow_mut().read_line(&mut line);
        ensure!(length.context("the machine does not answer")? > 0, "the machine ended");
        Ok(line.trim().to_owned())
    }

    fn begin(&self, commands: &str) -> anyhow::Result<String> {
        self.count.set(self.count.get() + 1);
        let name = self.count.get().to_string();
        fs::write(self.directory.join(&name), commands)?;
        writeln!(self.lines.borrow_mut().get_mut(), "{name}")?;
        Ok(name)
    }

    /// Waits until the machine has booted.
    pub(crate) fn booted(&self) -> anyhow::Result<()> {
        while !self.line()?.starts_with("boot ") {}
        Ok(())
    }

    pub(crate) fn run(&self, commands: &str) -> anyhow::Result<Output> {
        let name = self.begin(commands)?;
        let answer = self.line()?;
        let status = answer.strip_prefix(&format!("{name} ")).with_context(|| answer.clone())?;
        Ok(Output {
            status: ExitStatus::from_raw(status.parse::<i32>()? << 8),
            stdout: fs::read(self.directory.join(format!("{name}.out")))?,
            stderr: fs::read(self.directory.join(format!("{name}.err")))?,
        })
    }

    /// Runs commands with which the machine ends, and waits until it has booted again.
    fn reboot(&self, commands: &str) -> anyhow::Result<()> {
        self.begin(commands)?;
        self.booted()
    }
}

/// A unit with the kubelet's name that starts a container. The container drifts as soon as it
/// runs.
const KUBELET: &str = r#"
cat > /etc/systemd/system/kubelet.service <<'UNIT'
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh /usr/local/sbin/pod
[Install]
WantedBy=multi-user.target
UNIT
cat > /usr/local/sbin/pod <<'POD'
exec 3> /run/before-kubelet
systemctl is-active containerd driftd >&3
driftd status; echo "$?" >&3
ctr run -d --cpu-shares 0 --mount type=bind,src=/share/drops,dst=/.control,options=rbind:ro \
    IMAGE "pod-$(cat /proc/sys/kernel/random/boot_id)" \
    /bin/sh -c 'cp /.control/y /tmp/y; /tmp/y 300; exec /bin/sleep 100000'
POD
systemctl daemon-reload
systemctl enable kubelet
"#;

fn reboot() -> anyhow::Result<()> {
    ensure!(kernel().is_some(), "only a virtual machine boots (run: make test-systemd-vm)");
    let machine = Machine::installed("reboot")?;
    machine.container("web")?;
    machine.exec_ok("web", "cp /.control/x /tmp/x; /tmp/x 300")?;
    found(&machine, "web", "exec.new", "/tmp/x")?;
    machine.sh(&KUBELET.replace("IMAGE", WORKBENCH))?;

    // The second one as if the power had failed.
    for (ending, program) in [("systemctl reboot", "z"), ("echo b > /proc/sysrq-trigger", "v")] {
        rebooted(&machine, ending, program)
            .with_context(|| format!("{ending}{}", machine.logs()))?;
    }
    Ok(())
}

/// Ends the machine, and makes sure of what is reported after its boot. `program` is one
/// that was not executed before: another file with its content is no finding of its own.
fn rebooted(machine: &Machine, ending: &str, program: &str) -> anyhow::Result<()> {
    let now = || -> anyhow::Result<Timestamp> {
        Ok(Timestamp::from_second(machine.sh("date +%s")?.trim().parse()?)?)
    };
    let ended = now()?;
    machine.control()?.reboot(ending)?;
    machine.up()?;
    let booted = machine.sh("sed -n 's/^btime //p' /proc/stat")?;
    let booted = Timestamp::from_second(booted.trim().parse()?)?;

    // driftd starts after containerd, and before the unit that starts containers. (A machine
    // whose processor is emulated may be so slow that the guardian replaces driftd afterwards.
    // Then the times of its start are those of the second one.)
    let before = machine.sh("cat /run/before-kubelet")?;
    let is_up = ["active\nactive\n0\n", "active\nactive\n1\n"].contains(&before.as_str());
    ensure!(is_up, "containerd, driftd and the code of driftd status: {before}");

    // The container that started with the boot is watched.
    let pod = machine.sh("echo pod-$(cat /proc/sys/kernel/random/boot_id)")?;
    let pod = pod.trim();
    machine.watched(pod)?;
    reported_at_boot(machine, pod)?;

    // The gap covers the time from the end to the boot.
    let status = machine.lines("driftd status -o jsonl")?;
    let gaps = status[0]["gaps"].as_array().context("no gaps")?;
    let time = |gap: &serde_json::Value, key: &str| gap[key].as_str()?.parse::<Timestamp>().ok();
    let is_covered = gaps.iter().filter(|gap| gap["name"] == "not_running").any(|gap| {
        let (Some(since), Some(until)) = (time(gap, "at"), time(gap, "until")) else {
            return false;
        };
        // The record of a heartbeat may be so late.
        ended - jiff::SignedDuration::from_secs(60) < since && since <= booted && booted <= until
    });
    ensure!(is_covered, "ended at {ended}, booted at {booted}: {gaps:#?}");

    // Earlier findings are kept, and the earlier container can be started again.
    found(machine, "web", "exec.new", "/tmp/x")?;
    let known = machine.lines("driftd containers -o jsonl")?;
    let is_watched = known.iter().any(|one| one["id"] == "web" && one["watched"] == true);
    ensure!(!is_watched, "a container that ended with the machine is watched: {known:#?}");
    machine.sh("mkdir -p /tmp/volume; ctr task start -d web")?;
    machine.watched("web")?;
    let file = format!("/tmp/{program}");
    machine.exec_ok("web", &format!("cp /.control/{program} {file}; {file} 300"))?;
    found(machine, "web", "exec.new", &file)
}

/// Waits for the drift at boot. If the program ran before driftd watched the container, the
/// finding of its file says so.
fn reported_at_boot(machine: &Machine, pod: &str) -> anyhow::Result<()> {
    wait_within(patience(), "what the container did at boot", || {
        let found = machine.lines(&format!("driftd findings --container {pod} -o jsonl"))?;
        let is_reported = found.iter().any(|finding| {
            let detail = finding["detail"].as_str().unwrap_or_default();
            let is_added = finding["kind"] == "file.added" && detail.contains("may have run");
            finding["file"]["path"] == "/tmp/y" && (finding["kind"] == "exec.new" || is_added)
        });
        Ok(is_reported.then_some(()))
    })
}

fn found(machine: &Machine, id: &str, kind: &str, path: &str) -> anyhow::Result<()> {
    wait_within(patience(), &format!("{kind} {path} in {id}"), || {
        let found = machine.lines(&format!("driftd findings --container {id} -o jsonl"))?;
        let is_found =
            found.iter().any(|finding| finding["kind"] == kind && finding["file"]["path"] == path);
        Ok(is_found.then_some(()))
    })
    .with_context(|| machine.logs())
}
