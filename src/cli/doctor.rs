//! `driftd doctor`: checks what will work on this node and what will not.
//!
//! Only reads: it changes nothing on the node. Talks to the kernel, to containerd and, if one
//! runs, to the daemon.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{AccessFlags, Group, access};
use serde::Serialize;

use super::client::{explain, talk};
use super::exit::Exit;
use super::output::{Format, Output, items, safe, size, write};
use super::settings::Settings;
use crate::api::proto;
use crate::containerd::describe::describe;
use crate::history;
use crate::sys::capabilities::{self, Capabilities, Feature};
use crate::sys::fanotify::{GROUPS_OF_A_DAEMON, GroupsLeft, groups_left, max_user_groups};

/// How long containerd or the daemon may take to reply.
const PATIENCE: Duration = Duration::from_secs(5);
/// The oldest kernel with everything that the gate needs.
const OLDEST_KERNEL: (u32, u32) = (5, 6);
/// How many free groups of fanotify are counted at most.
const MANY_GROUPS: u64 = 512;
/// A warning is given below this. Containers without a user namespace use the same groups.
const FEW_GROUPS: u64 = 2 * GROUPS_OF_A_DAEMON;
/// A warning is given below this free space, in bytes.
const LITTLE_SPACE: u64 = 1 << 30;

#[derive(Debug, clap::Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Result {
    Ok,
    /// driftd runs, but something is missing.
    Warn,
    /// driftd cannot do its work.
    Fail,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    schema: &'static str,
    name: &'static str,
    result: Result,
    /// What was found and, if something is missing, what to do.
    detail: String,
}

fn check(name: &'static str, result: Result, detail: impl Into<String>) -> Check {
    Check { schema: "driftd.check/v1", name, result, detail: detail.into() }
}

impl Doctor {
    pub(super) fn run(&self, socket: Option<&Path>) -> anyhow::Result<Exit> {
        let config = self.settings.load(socket)?;
        let mut checks = vec![kernel(), privileges(), fanotify()];
        let found = Capabilities::probe();
        checks.extend(features(&found));
        checks.push(fanotify_groups());
        checks.push(fanotify_queue());
        checks.push(overlay());
        checks.extend(containerds(&config.containerd.sockets)?);
        checks.push(state_dir(&config.state_dir));
        checks.push(history_format(&config.state_dir));
        checks.push(group());
        checks.extend(daemon(&config.socket, &found));
        write(text(&checks, self.output.format)?.as_bytes())?;
        let failed = checks.iter().any(|check| check.result == Result::Fail);
        Ok(if failed { Exit::Failed } else { Exit::Clean })
    }
}

fn text(checks: &[Check], format: Format) -> anyhow::Result<String> {
    match format {
        Format::Json | Format::Jsonl | Format::Yaml | Format::Columns(_) => items(checks, format),
        Format::Table | Format::Wide => Ok(checks
            .iter()
            .map(|check| {
                let result = match check.result {
                    Result::Ok => "OK",
                    Result::Warn => "WARN",
                    Result::Fail => "FAIL",
                };
                format!("{result:<5} {:<16} {}\n", check.name, safe(&check.detail))
            })
            .collect()),
    }
}

fn kernel() -> Check {
    match fs::read_to_string("/proc/sys/kernel/osrelease") {
        Ok(release) => judge_kernel(release.trim()),
        Err(err) => check("kernel", Result::Fail, format!("cannot read its version: {err}")),
    }
}

fn judge_kernel(release: &str) -> Check {
    let (oldest_major, oldest_minor) = OLDEST_KERNEL;
    match capabilities::version_of(release) {
        Some(version) if version >= OLDEST_KERNEL => {
            check("kernel", Result::Ok, format!("Linux {release}"))
        }
        Some(_) => check(
            "kernel",
            Result::Fail,
            format!(
                "Linux {release} is older than {oldest_major}.{oldest_minor} (install a newer kernel)"
            ),
        ),
        None => check("kernel", Result::Warn, format!("`{release}` is no version that is known")),
    }
}

fn privileges() -> Check {
    match capabilities::privileges() {
        Ok(held) => check("capabilities", Result::Ok, held),
        Err(lacking) => check("capabilities", Result::Fail, lacking),
    }
}

fn fanotify() -> Check {
    match capabilities::gate() {
        Ok(found) if found.pidfd => {
            check("fanotify", Result::Ok, "executions can be watched, each with a pidfd")
        }
        Ok(_) => check(
            "fanotify",
            Result::Warn,
            "executions can be watched, but without pidfds: a process that ends at once may go \
             unnamed (pidfds came with Linux 5.15)",
        ),
        Err(lacking) => check("fanotify", Result::Fail, lacking),
    }
}

/// One check for each other feature of the kernel, with what its absence means.
fn features(found: &Capabilities) -> Vec<Check> {
    Feature::ALL
        .into_iter()
        .map(|feature| {
            let name = feature.name();
            let (result, detail) = if found.has(feature) {
                (Result::Ok, format!("{name} is there"))
            } else {
                let result = if feature.is_needed() { Result::Fail } else { Result::Warn };
                let (without, since) = (feature.without(), feature.since());
                let detail = match feature {
                    Feature::OpenBeneath => capabilities::open_beneath().err(),
                    _ => None,
                };
                let plain = || format!("{name} is missing: {without} (it comes with {since})");
                (result, detail.unwrap_or_else(plain))
            };
            check("kernel feature", result, detail)
        })
        .collect()
}

fn fanotify_groups() -> Check {
    let limit = max_user_groups();
    let at_most = limit.unwrap_or(128).min(MANY_GROUPS);
    match groups_left(at_most) {
        Ok(left) => judge_groups(left, limit),
        Err(err) => check(GROUPS, Result::Fail, format!("they cannot be counted: {err}")),
    }
}

const GROUPS: &str = "fanotify groups";

fn judge_groups(left: GroupsLeft, limit: Option<u64>) -> Check {
    // At the limit the count was ended by the limit itself.
    let is_more = left.is_more && limit != Some(left.count);
    let more = if is_more { " or more" } else { "" };
    let all = limit.map(|limit| format!(" of {limit}")).unwrap_or_default();
    let found = format!(
        "{}{more}{all} left for this user; driftd takes up to {GROUPS_OF_A_DAEMON}",
        left.count
    );
    if left.count >= FEW_GROUPS {
        return check(GROUPS, Result::Ok, found);
    }
    let next = match limit {
        Some(_) if is_more => "raise the limit of open files and try again".to_owned(),
        Some(limit) => {
            format!("try: sysctl fs.fanotify.max_user_groups={}", limit.saturating_mul(2).max(128))
        }
        None => "end what uses fanotify: this kernel's limit is built in".to_owned(),
    };
    let use_of_all = "every process of this user and every container without a user namespace \
                      takes from the same ones";
    check(GROUPS, Result::Warn, format!("{found}: {use_of_all} ({next})"))
}

/// How many changes may wait with `watch.bounded_queue`. The number of marks has no limit for
/// driftd.
fn fanotify_queue() -> Check {
    const ENOUGH: u64 = 16_384;
    let name = "max_queued_events";
    let file = format!("/proc/sys/fs/fanotify/{name}");
    let (result, text) = match fs::read_to_string(&file).map(|text| text.trim().parse::<u64>()) {
        Ok(Ok(limit)) if limit >= ENOUGH => (Result::Ok, format!("{name} = {limit}")),
        Ok(Ok(limit)) => {
            let purpose = "a burst of writes beyond it means another scan";
            let next = format!("try: sysctl fs.fanotify.{name}={ENOUGH}");
            (Result::Warn, format!("{name} = {limit}, {purpose} ({next})"))
        }
        Ok(Err(err)) => (Result::Warn, format!("{file}: {err}")),
        // Before Linux 5.13 the limits were built in.
        Err(_) => (Result::Ok, format!("{name} is built in")),
    };
    check("fanotify limit", result, text)
}

fn overlay() -> Check {
    match fs::read_to_string("/proc/filesystems") {
        Ok(all) if all.split_whitespace().any(|word| word == "overlay") => {
            check("overlay", Result::Ok, "the kernel has it")
        }
        Ok(_) => check(
            "overlay",
            Result::Warn,
            "not loaded: only containers on an overlay can be watched (try: modprobe overlay)",
        ),
        Err(err) => check("overlay", Result::Warn, format!("/proc/filesystems: {err}")),
    }
}

fn containerds(sockets: &[PathBuf]) -> anyhow::Result<Vec<Check>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let checks = sockets
        .iter()
        .map(|socket| {
            let shown = socket.display();
            let answer =
                runtime.block_on(async { tokio::time::timeout(PATIENCE, describe(socket)).await });
            match answer {
                Ok(Ok(found)) if found.snapshotters.iter().any(|name| name == "overlayfs") => {
                    check(
                        "containerd",
                        Result::Ok,
                        format!(
                            "{shown}: version {}, snapshotters {}",
                            found.version,
                            found.snapshotters.join(", ")
                        ),
                    )
                }
                Ok(Ok(found)) => check(
                    "containerd",
                    Result::Warn,
                    format!(
                        "{shown}: version {}, without the overlayfs snapshotter (it has: {}): \
                         only containers on an overlay can be watched",
                        found.version,
                        found.snapshotters.join(", ")
                    ),
                ),
                Ok(Err(err)) => check(
                    "containerd",
                    Result::Fail,
                    format!(
                        "cannot be reached at {shown}: {err} (try: systemctl status containerd, or \
                         name its socket with --containerd)"
                    ),
                ),
                Err(_) => check(
                    "containerd",
                    Result::Fail,
                    format!("{shown} does not answer (try: systemctl status containerd)"),
                ),
            }
        })
        .collect();
    runtime.shutdown_background();
    Ok(checks)
}

fn state_dir(state_dir: &Path) -> Check {
    let name = "state directory";
    // A directory that does not exist yet will be created in the nearest one that does.
    let Some(existing) = state_dir.ancestors().find(|directory| directory.exists()) else {
        return check(name, Result::Fail, format!("{} cannot be examined", state_dir.display()));
    };
    let shown = state_dir.display();
    if !existing.is_dir() {
        let detail =
            format!("{} is no directory (name another with --state-dir)", existing.display());
        return check(name, Result::Fail, detail);
    }
    if let Err(err) = access(existing, AccessFlags::W_OK | AccessFlags::X_OK) {
        let detail = format!("{} cannot be written: {err} (run as root)", existing.display());
        return check(name, Result::Fail, detail);
    }
    let suffix = if existing == state_dir { "" } else { ", to be created" };
    match nix::sys::statvfs::statvfs(existing) {
        Ok(disk) => {
            let free = disk.blocks_available().saturating_mul(disk.fragment_size());
            let detail = format!("{shown}{suffix}, {} free", size(free));
            if free < LITTLE_SPACE {
                check(name, Result::Warn, detail + " (make room: the history stops on a full disk)")
            } else {
                check(name, Result::Ok, detail)
            }
        }
        Err(err) => {
            check(name, Result::Warn, format!("{shown}{suffix}, free space unknown: {err}"))
        }
    }
}

fn history_format(state_dir: &Path) -> Check {
    match history::format_of(state_dir) {
        Ok(None) => check("history", Result::Ok, "none yet"),
        Ok(Some(format)) => check("history", Result::Ok, format!("format {format}")),
        Err(err) => {
            let cause = std::error::Error::source(&err);
            let cause = cause.map(|cause| format!(": {cause}")).unwrap_or_default();
            check("history", Result::Fail, format!("{err}{cause}"))
        }
    }
}

fn group() -> Check {
    match Group::from_name("driftd") {
        Ok(Some(_)) => check("group driftd", Result::Ok, "its members may use the API"),
        Ok(None) => check(
            "group driftd",
            Result::Warn,
            "not there: only root may use the API (try: groupadd --system driftd)",
        ),
        Err(err) => check("group driftd", Result::Warn, format!("cannot be looked up: {err}")),
    }
}

/// Whether the daemon replies, and what it lacks: its unit may withhold features that this
/// process has.
fn daemon(socket: &Path, here: &Capabilities) -> Vec<Check> {
    let shown = socket.display();
    if let Err(err) = std::os::unix::net::UnixStream::connect(socket) {
        let detail = format!("does not listen on {shown}: {err} (try: systemctl start driftd)");
        return vec![check(DAEMON, Result::Warn, detail)];
    }
    let asked = talk(socket, |mut client| async move {
        let asked = tokio::time::timeout(PATIENCE, client.get_status(proto::GetStatusRequest {}));
        let answer = asked.await.map_err(|_| anyhow::anyhow!("it does not answer"))?;
        Ok(answer.map_err(explain)?.into_inner())
    });
    match asked {
        Ok(status) => judge_daemon(&shown.to_string(), &status, here),
        Err(err) => vec![check(DAEMON, Result::Fail, format!("{shown}: {err:#}"))],
    }
}

const DAEMON: &str = "daemon";

fn judge_daemon(
    socket: &str,
    status: &proto::GetStatusResponse,
    here: &Capabilities,
) -> Vec<Check> {
    let mut checks = vec![if status.complete {
        check(DAEMON, Result::Ok, format!("runs and listens on {socket}"))
    } else {
        let detail =
            format!("listens on {socket}, and its view is incomplete (see: driftd status)");
        check(DAEMON, Result::Warn, detail)
    }];
    checks.extend(status.missing.iter().map(|missing| {
        let feature = Feature::ALL.into_iter().find(|feature| feature.name() == missing.name);
        let is_needed = feature.is_some_and(Feature::is_needed);
        let cause = if feature.is_some_and(|feature| here.has(feature)) {
            "this process has it, so the daemon's unit or container takes it away; see: systemctl \
             cat driftd"
                .to_owned()
        } else {
            format!("it comes with {}", missing.since)
        };
        let result = if is_needed { Result::Fail } else { Result::Warn };
        let (name, meaning) = (&missing.name, &missing.meaning);
        check(DAEMON, result, format!("it lacks {name}: {meaning} ({cause})"))
    }));
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_judged_by_their_version() {
        for (release, expected) in [
            ("6.18.5", Result::Ok),
            ("5.6.0-2-generic", Result::Ok),
            ("5.4.0-42-generic", Result::Fail),
            ("5.3.18", Result::Fail),
            ("4.19.0", Result::Fail),
            ("odd", Result::Warn),
        ] {
            assert_eq!(judge_kernel(release).result, expected, "{release}");
        }
    }

    #[test]
    fn few_groups_are_a_warning_with_the_next_step() {
        let left = |count, is_more| GroupsLeft { count, is_more };
        let found = judge_groups(left(128, true), Some(128));
        assert_eq!(
            (found.result, &*found.detail),
            (Result::Ok, "128 of 128 left for this user; driftd takes up to 8")
        );
        let found = judge_groups(left(512, true), Some(100_000));
        assert!(found.detail.starts_with("512 or more of 100000 left"), "{found:?}");
        let found = judge_groups(left(15, false), Some(128));
        assert_eq!(found.result, Result::Warn);
        assert!(found.detail.starts_with("15 of 128 left"), "{found:?}");
        assert!(found.detail.ends_with("(try: sysctl fs.fanotify.max_user_groups=256)"));
        let found = judge_groups(left(3, true), Some(128));
        assert!(found.detail.contains("3 or more of 128 left"), "{found:?}");
        assert!(found.detail.contains("open files"), "{found:?}");
        let found = judge_groups(left(0, false), None);
        assert!(found.detail.starts_with("0 left for this user"), "{found:?}");
    }

    #[test]
    fn every_check_shows_its_result_in_a_word() {
        let checks = [
            check("kernel", Result::Ok, "Linux 6.18"),
            check("overlay", Result::Warn, "a\u{1b}[2J"),
            check("history", Result::Fail, "damaged (move it)"),
        ];
        assert_eq!(
            text(&checks, Format::Table).unwrap(),
            "OK    kernel           Linux 6.18\n\
             WARN  overlay          a\\u{1b}[2J\n\
             FAIL  history          damaged (move it)\n"
        );
    }

    #[test]
    fn a_state_directory_that_is_not_there_yet_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        let found = state_dir(&dir.path().join("a/b"));
        assert!(found.detail.contains(", to be created, "), "{found:?}");
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert_eq!(state_dir(&file.join("x")).result, Result::Fail);
    }
}
