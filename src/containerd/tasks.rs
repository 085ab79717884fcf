//! Tasks: the running side of a container, and what can be done to it.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use containerd_client::services::v1::{
    GetContainerRequest, GetRequest, KillRequest, ListTasksRequest, PauseTaskRequest,
    ResumeTaskRequest, WaitRequest,
};
use containerd_client::types::v1::{Process, Status as State};
use tonic::Status;

use super::connection::{Namespace, found, interrupted, words};
use crate::model::Task;

/// How long a killed task may take to be gone before that is reported.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
const SIGKILL: u32 = 9;

fn task_of(process: &Process) -> Option<Task> {
    let input = PathBuf::from(&process.stdin);
    // It may also be the address of something that is no file.
    let terminal_input = Some(input).filter(|input| process.terminal && input.is_absolute());
    let task = |paused| Some(Task { pid: process.pid, paused, terminal_input });
    match process.status() {
        State::Created | State::Running => task(false),
        State::Paused | State::Pausing => task(true),
        State::Stopped => None,
        // A shim that could not be asked in time; the process is not known to be gone.
        State::Unknown if process.pid != 0 => task(false),
        State::Unknown => None,
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

/// Kills every process of the container; what happened, in words.
pub(super) async fn kill(namespace: &Namespace, container: &str) -> Result<String, Status> {
    let Some(task) = get(namespace, container).await? else {
        return Ok("it was not running: there was nothing to kill".into());
    };
    // Asked for before: afterwards the owner may have removed the record.
    let sequel = sequel(namespace, container).await?;
    let request = KillRequest {
        container_id: container.into(),
        exec_id: String::new(),
        signal: SIGKILL,
        all: true,
    };
    if found(namespace.tasks().kill(request).await)?.is_none() {
        return Ok("it ended by itself just before the kill".into());
    }
    let wait = WaitRequest { container_id: container.into(), exec_id: String::new() };
    let mut tasks = namespace.tasks();
    let ended = match tokio::time::timeout(KILL_PATIENCE, tasks.wait(wait)).await {
        Ok(Ok(response)) => {
            format!("killed (pid {}, exit status {})", task.pid, response.into_inner().exit_status)
        }
        Ok(Err(status)) if interrupted(&status) => {
            format!(
                "SIGKILL was sent to all its processes (init is pid {}), but the connection to \
                 containerd was lost before their end was seen: {}",
                task.pid,
                words(&status)
            )
        }
        // Its owner has already cleared it away.
        Ok(Err(_)) => format!("killed (pid {})", task.pid),
        Err(_) => format!(
            "SIGKILL was sent to all its processes, but init (pid {}) is still there after {} s",
            task.pid,
            KILL_PATIENCE.as_secs()
        ),
    };
    Ok(ended + sequel)
}

/// What will follow a kill.
async fn sequel(namespace: &Namespace, container: &str) -> Result<&'static str, Status> {
    let request = GetContainerRequest { id: container.into() };
    let record = found(namespace.containers().get(request).await)?
        .and_then(|response| response.into_inner().container);
    let Some(record) = record else { return Ok("") };
    let label = |name: &str| record.labels.get(name).map(String::as_str);
    let restarts = label("containerd.io/restart.status") == Some("running")
        && label("containerd.io/restart.policy") != Some("no")
        && label("containerd.io/restart.explicitly-stopped") != Some("true");
    Ok(if restarts {
        "; containerd's restart monitor will start it again with the same files, so the drift \
         stays: remove its restart policy first"
    } else if &*namespace.name == "moby" {
        "; if it has a restart policy, Docker will start it again with the same files, so the \
         drift stays (docker update --restart=no)"
    } else if label("io.cri-containerd.kind") == Some("container") {
        "; the kubelet may start a new container from the image in its place"
    } else {
        ""
    })
}

/// Freezes the container; what happened, in words.
pub(super) async fn pause(namespace: &Namespace, container: &str) -> Result<String, Status> {
    match get(namespace, container).await? {
        None => Ok("it was not running: there was nothing to pause".into()),
        Some(Task { paused: true, .. }) => Ok("it was paused already".into()),
        Some(Task { pid, paused: false, .. }) => {
            namespace.tasks().pause(PauseTaskRequest { container_id: container.into() }).await?;
            Ok(format!("paused (pid {pid})"))
        }
    }
}

/// Thaws the container; what happened, in words.
pub(super) async fn resume(namespace: &Namespace, container: &str) -> Result<String, Status> {
    match get(namespace, container).await? {
        None => Ok("it was not running: there was nothing to resume".into()),
        Some(Task { paused: false, .. }) => Ok("it was not paused".into()),
        Some(Task { pid, paused: true, .. }) => {
            namespace.tasks().resume(ResumeTaskRequest { container_id: container.into() }).await?;
            Ok(format!("resumed (pid {pid})"))
        }
    }
}
