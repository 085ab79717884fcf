//! One process of a container is killed, and no other process of the node.
//!
//! A finding can name a process of the host: a runtime or `docker cp` writes into containers. So
//! the process must belong to the container for certain: by the container's own control group or,
//! where that is not known, by its pid namespace.

use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use super::connection::Namespace;
use super::containers;
use super::spec::Spec;
use super::tasks::{Refused, Run};
use crate::model::{Incarnation, ProcessIdentity};
use crate::sys::pidfd;
use crate::sys::procfs::Handle;

/// How long a killed process may take to end before that is reported.
const PATIENCE: Duration = Duration::from_secs(1);

/// Kills a process of a run. A start time of 0 stands for the process that has the pid now.
/// Returns what happened, as a text.
pub(super) async fn kill(
    namespace: &Namespace,
    container: &str,
    meant: Option<Incarnation>,
    process: ProcessIdentity,
) -> Result<String, Refused> {
    let pid = process.pid;
    let Some(meant) = meant else {
        return Err(Refused::Gone("the container does not run; nothing was done".into()));
    };
    let run = Run::hold(namespace, container, meant)?;
    // The handle is opened first, so that what is read by the pid afterwards is of its process.
    let handle = pidfd::open(pid).map_err(|err| unreadable(pid, &err))?;
    let found = Handle::open(pid).map_err(|err| unreadable(pid, &err))?;
    if ![0, found.identity().start_time].contains(&process.start_time) {
        return Err(ended(pid));
    }
    let init = Handle::open(meant.pid).map_err(|err| unreadable(meant.pid, &err))?;
    run.is_there()?;
    // Another container may have joined the pid namespace: the control group says more.
    let is_member = match is_in_own_group(namespace, container, &found, &init).await? {
        Some(is_member) => is_member,
        None => shares_pid_namespace(&found, &init),
    };
    if !is_member {
        // Final: as long as the process lives, it belongs elsewhere.
        return Err(Refused::Gone(format!(
            "the process {pid} does not belong to the container, as far as its control groups and \
             namespaces show; nothing was done"
        )));
    }
    if pidfd::has_ended(handle.as_fd()) {
        return Err(ended(pid));
    }
    pidfd::kill(handle.as_fd()).map_err(|err| unreadable(pid, &err))?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !pidfd::has_ended(handle.as_fd()) {
        if tokio::time::Instant::now() >= deadline {
            return Ok(format!(
                "SIGKILL was sent to the process {pid}; it ends when it returns from the kernel, \
                 or when its container is thawed"
            ));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(format!("killed the process {pid}"))
}

fn ended(pid: u32) -> Refused {
    Refused::Gone(format!("the process {pid} has ended; nothing was done"))
}

fn unreadable(pid: u32, err: &io::Error) -> Refused {
    if pidfd::is_gone(err) {
        ended(pid)
    } else {
        Refused::Failed(format!("the process {pid} cannot be examined: {err}; nothing was done"))
    }
}

/// Whether both are in the pid namespace that the container has of its own.
fn shares_pid_namespace(process: &Handle, init: &Handle) -> bool {
    let of = |one: &Handle| one.pid_namespace().ok();
    init.is_first_in_pid_namespace() && of(init).is_some() && of(process) == of(init)
}

/// Whether the process is in the control group that the container's specification names. `None`
/// if that group is not known.
async fn is_in_own_group(
    namespace: &Namespace,
    container: &str,
    process: &Handle,
    init: &Handle,
) -> Result<Option<bool>, Refused> {
    let (Ok(of_init), Ok(of_process)) = (init.groups(), process.groups()) else {
        return Ok(None);
    };
    // The usual case needs no question.
    if of_init == of_process && shares_pid_namespace(process, init) {
        return Ok(Some(true));
    }
    let record = containers::get(namespace, container).await?;
    let spec = record.and_then(|record| record.spec).map(|spec| Spec::parse(&spec.value));
    let Some(spec) = spec else { return Ok(None) };
    Ok(is_below(&of_init, &of_process, |path| spec.own_cgroup(container, path)))
}

/// Whether a process is in the container's own group in every hierarchy in which that is known;
/// `None` if it is known in none.
/// Both memberships are texts of `/proc/PID/cgroup`. `own` returns the length of the path of the
/// container's own group in the path of init's group.
fn is_below(
    of_init: &[u8],
    of_process: &[u8],
    own: impl Fn(&[u8]) -> Option<usize>,
) -> Option<bool> {
    let own_groups: Vec<(&[u8], &[u8])> = groups(of_init)
        .filter_map(|(hierarchy, path)| Some((hierarchy, &path[..own(path)?])))
        .collect();
    let is_in = |(hierarchy, group): &(&[u8], &[u8])| {
        let mut of_process = groups(of_process);
        let path = of_process.find(|(one, _)| one == hierarchy).map(|(_, path)| path);
        let below = path.and_then(|path| path.strip_prefix(*group));
        below.is_some_and(|below| below.is_empty() || below.starts_with(b"/"))
    };
    (!own_groups.is_empty()).then(|| own_groups.iter().all(is_in))
}

/// The hierarchies of a membership, each with the path of the group.
fn groups(membership: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    membership.split(|&byte| byte == b'\n').filter_map(|line| {
        let path = line.iter().enumerate().filter(|(_, byte)| **byte == b':').nth(1)?.0 + 1;
        (line.len() > path + 1).then_some((&line[..path], &line[path..]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_of_the_host_or_of_another_container_is_in_no_group_of_this_one() {
        let spec = |path: &str| Spec { cgroups_path: Some(path.to_owned()), ..Spec::default() };
        let check = |spec: &Spec, of_init: &str, of_process: &str| {
            is_below(of_init.as_bytes(), of_process.as_bytes(), |path| spec.own_cgroup("c1", path))
        };
        let plain = spec("/default/c1");
        assert_eq!(Some(true), check(&plain, "0::/default/c1\n", "0::/default/c1\n"));
        assert_eq!(
            Some(true),
            check(&plain, "0::/default/c1/init.scope\n", "0::/default/c1/user/x\n")
        );
        for other in
            ["/default/c10", "/default/c2", "/", "/system.slice/docker.service", "/default"]
        {
            assert_ne!(
                Some(true),
                check(&plain, "0::/default/c1\n", &format!("0::{other}\n")),
                "{other}"
            );
        }
        // A group of that name which another container has made within its own.
        assert_ne!(Some(true), check(&plain, "0::/default/c1\n", "0::/default/c2/default/c1\n"));
        let both = "12:freezer:/default/c1\n0::/default/c1\n";
        assert_ne!(Some(true), check(&plain, both, "12:freezer:/default/c1\n0::/default/c2\n"));
        // The group of the container is not known.
        assert_ne!(Some(true), check(&spec("/elsewhere"), "0::/default/c1\n", "0::/default/c1\n"));
        assert_ne!(Some(true), check(&plain, "0::/\n", "0::/\n"));
        assert_ne!(Some(true), check(&plain, "", ""));
    }
}
