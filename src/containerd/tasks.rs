//! Tasks: the running side of a container, and what can be done to it.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use containerd_client::services::v1::{
    Container as Record, GetRequest, KillRequest, ListTasksRequest, PauseTaskRequest,
    ResumeTaskRequest,
};
use containerd_client::types::v1::{Process, Status as State};
use tonic::Status;

use super::connection::{Namespace, found};
use super::containers;
use crate::model::{Incarnation, Task};
use crate::sys::pidfd;
use crate::sys::procfs::{self, Handle};

/// How long a killed task may take to be gone before that is reported.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// How long an init that was killed by its handle may take to end before containerd is
/// asked to kill it too: it knows how to thaw a frozen one first.
const HANDLE_PATIENCE: Duration = Duration::from_millis(500);
const SIGKILL: u32 = 9;

fn task_of(process: &Process) -> Option<Task> {
    let input = PathBuf::from(&process.stdin);
    // It may also be the address of something that is no file.
    let terminal_input = Some(input).filter(|input| process.terminal && input.is_absolute());
    let start_time = procfs::read_stat(process.pid).ok().map(|stat| stat.identity.start_time);
    let task = |paused| Some(Task { pid: process.pid, start_time, paused, terminal_input });
    match process.status() {
        // A task that is restored from a checkpoint has no process until it is started.
        _ if process.pid == 0 => None,
        State::Created | State::Running => task(false),
        State::Paused | State::Pausing => task(true),
        State::Stopped => None,
        // A shim that could not be asked in time; the process is not known to be gone.
        State::Unknown => task(false),
    }
}

/// The running tasks of a namespace, by container.
pub(super) async fn list(namespace: &Namespace) -> Result<HashMap<String, Task>, Status> {
    let answer = namespace.tasks().list(ListTasksRequest::default()).await?.into_inner();
    Ok(answer
        .tasks
        .into_iter()
        .filter_map(|process| task_of(&process).map(|task| (process.id, task)))
        .collect())
}

/// The container's running task.
pub(super) async fn get(namespace: &Namespace, container: &str) -> Result<Option<Task>, Status> {
    let request = GetRequest { container_id: container.into(), exec_id: String::new() };
    let answer = found(namespace.tasks().get(request).await)?;
    Ok(answer
        .and_then(|response| response.into_inner().process)
        .and_then(|process| task_of(&process)))
}

/// Why an answer was not carried out.
#[derive(Debug)]
pub(super) enum Refused {
    /// The run that was meant is over. Nothing was done.
    Gone(String),
    /// It is there, and the answer failed.
    Failed(String),
    Containerd(Status),
}

impl From<Status> for Refused {
    fn from(status: Status) -> Refused {
        Refused::Containerd(status)
    }
}

/// One run of a container, held by a handle of its init process.
///
/// containerd takes a name, and the name may be another container's by the time it is
/// read. While the process behind the handle lives, containerd gives neither the ID nor
/// the task to anybody else. So the handle is opened and compared first, then containerd
/// is asked what it has under the name, and the handle is looked at last.
struct Run<'a> {
    namespace: &'a Namespace,
    container: &'a str,
    meant: Incarnation,
    init: OwnedFd,
}

impl<'a> Run<'a> {
    fn hold(
        namespace: &'a Namespace,
        container: &'a str,
        meant: Incarnation,
    ) -> Result<Run<'a>, Refused> {
        let pid = meant.pid;
        let init = pidfd::open(pid).map_err(|err| {
            if pidfd::is_gone(&err) {
                ended(pid)
            } else {
                Refused::Failed(format!("no handle of its init process (pid {pid}): {err}"))
            }
        })?;
        let run = Run { namespace, container, meant, init };
        // By pid, but before the handle is asked whether its process still has that pid.
        let found = procfs::read_stat(pid).map_err(|_| ended(pid))?.identity.start_time;
        if meant.start_time.is_some_and(|start_time| start_time != found) {
            return Err(ended(pid));
        }
        run.is_there()?;
        Ok(run)
    }

    fn is_there(&self) -> Result<(), Refused> {
        if pidfd::has_ended(self.init.as_fd()) { Err(ended(self.meant.pid)) } else { Ok(()) }
    }

    /// What containerd has under the container's name, if that is this run.
    async fn confirm(&self) -> Result<(Record, Task), Refused> {
        let Some(record) = containers::get(self.namespace, self.container).await? else {
            return Err(Refused::Gone("its container was removed; nothing was done".into()));
        };
        let created_at = containers::created_at(&record);
        if self.meant.created_at.is_some_and(|meant| created_at.is_some_and(|is| is != meant)) {
            return Err(Refused::Gone("another container has its ID now; nothing was done".into()));
        }
        let Some(task) = get(self.namespace, self.container).await? else {
            self.is_there()?;
            return Err(Refused::Failed("containerd does not know its task".into()));
        };
        if task.pid != self.meant.pid {
            return Err(restarted(&task));
        }
        self.is_there()?;
        Ok((record, task))
    }

    /// Whether its init has ended within that time.
    async fn ends_within(&self, patience: Duration) -> bool {
        const STEP: Duration = Duration::from_millis(5);
        let deadline = tokio::time::Instant::now() + patience;
        while !pidfd::has_ended(self.init.as_fd()) {
            if tokio::time::Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(STEP).await;
        }
        true
    }

    async fn kill_by_containerd(&self) -> Result<(), Refused> {
        let request = KillRequest {
            container_id: self.container.into(),
            exec_id: String::new(),
            signal: SIGKILL,
            all: true,
        };
        self.is_there()?;
        match found(self.namespace.tasks().kill(request).await) {
            Ok(Some(_)) => Ok(()),
            Ok(None) => {
                self.is_there()?;
                Err(Refused::Failed("containerd does not know its task".into()))
            }
            Err(status) => Err(status.into()),
        }
    }
}

fn ended(pid: u32) -> Refused {
    Refused::Gone(format!("the run whose init was pid {pid} has ended; nothing was done"))
}

fn restarted(task: &Task) -> Refused {
    Refused::Gone(format!(
        "it was started again meanwhile (init is pid {}); nothing was done",
        task.pid
    ))
}

/// What to say where no run was known to be answered.
async fn nothing_known(namespace: &Namespace, container: &str) -> Result<(), Refused> {
    match get(namespace, container).await? {
        None => Ok(()),
        Some(task) => Err(restarted(&task)),
    }
}

/// Kills every process of a run; what happened, in words. `None` is a container that was
/// not known to run.
pub(super) async fn kill(
    namespace: &Namespace,
    container: &str,
    meant: Option<Incarnation>,
) -> Result<String, Refused> {
    let Some(meant) = meant else {
        nothing_known(namespace, container).await?;
        return Ok("it was not running: there was nothing to kill".into());
    };
    let run = Run::hold(namespace, container, meant)?;
    let (record, _) = run.confirm().await?;
    // The kernel ends everything in a pid namespace together with its first process, and
    // the handle names that process for good.
    let is_first = Handle::open(meant.pid).is_ok_and(|init| init.is_first_in_pid_namespace());
    let by_handle = is_first && {
        run.is_there()?;
        pidfd::kill(run.init.as_fd()).is_ok()
    };
    let has_ended = by_handle && run.ends_within(HANDLE_PATIENCE).await;
    if !has_ended {
        match run.kill_by_containerd().await {
            // It has ended by our signal meanwhile.
            Err(Refused::Gone(_)) if by_handle => (),
            Err(refused) if !by_handle => return Err(refused),
            Ok(()) | Err(_) => (),
        }
        if !run.ends_within(KILL_PATIENCE).await {
            return Err(Refused::Failed(format!(
                "SIGKILL was sent to all its processes, but init (pid {}) is still there after \
                 {} s",
                meant.pid,
                KILL_PATIENCE.as_secs()
            )));
        }
    }
    Ok(format!("killed (pid {})", meant.pid) + sequel(namespace, &record))
}

/// What will follow a kill.
fn sequel(namespace: &Namespace, record: &Record) -> &'static str {
    let label = |name: &str| record.labels.get(name).map(String::as_str);
    let restarts = label("containerd.io/restart.status") == Some("running")
        && label("containerd.io/restart.policy") != Some("no")
        && label("containerd.io/restart.explicitly-stopped") != Some("true");
    if restarts {
        "; containerd's restart monitor will start it again with the same files, so the drift \
         stays: remove its restart policy first"
    } else if &*namespace.name == "moby" {
        "; if it has a restart policy, Docker will start it again with the same files, so the \
         drift stays (docker update --restart=no)"
    } else if label("io.cri-containerd.kind") == Some("container") {
        "; the kubelet may start a new container from the image in its place"
    } else {
        ""
    }
}

/// Freezes a run; what happened, in words.
pub(super) async fn pause(
    namespace: &Namespace,
    container: &str,
    meant: Option<Incarnation>,
) -> Result<String, Refused> {
    let Some(meant) = meant else {
        nothing_known(namespace, container).await?;
        return Err(Refused::Failed("it is not running: there is nothing to pause".into()));
    };
    let run = Run::hold(namespace, container, meant)?;
    let (_, task) = run.confirm().await?;
    if task.paused {
        return Ok("it was paused already".into());
    }
    let request = PauseTaskRequest { container_id: container.into() };
    let paused = namespace.tasks().pause(request).await;
    // There is no handle for this: if the run has ended meanwhile, containerd may have
    // found a later one under the name.
    if let Err(gone) = run.is_there() {
        if let Ok(Some(Task { pid, paused: true, .. })) = get(namespace, container).await
            && pid != meant.pid
        {
            let request = ResumeTaskRequest { container_id: container.into() };
            namespace.tasks().resume(request).await?;
        }
        return Err(gone);
    }
    paused?;
    Ok(format!("paused (pid {})", meant.pid))
}

/// Thaws a run; what happened, in words.
pub(super) async fn resume(
    namespace: &Namespace,
    container: &str,
    meant: Option<Incarnation>,
) -> Result<String, Refused> {
    let Some(meant) = meant else {
        nothing_known(namespace, container).await?;
        return Err(Refused::Failed("it is not running: there is nothing to resume".into()));
    };
    let run = Run::hold(namespace, container, meant)?;
    let (_, task) = run.confirm().await?;
    if !task.paused {
        return Ok("it was not paused".into());
    }
    // What is frozen does not end by itself, so the name is its own until it is thawed.
    namespace.tasks().resume(ResumeTaskRequest { container_id: container.into() }).await?;
    Ok(format!("resumed (pid {})", meant.pid))
}
