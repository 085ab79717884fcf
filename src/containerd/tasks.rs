//! Tasks: the running side of a container, and the responses to it: kill, pause and resume.
//!
//! A response is meant for one run of a container. It is carried out only while a handle of that
//! run's init shows that the run has not ended. Whether to respond is decided elsewhere.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::{
    Container as Record, GetRequest, KillRequest, ListTasksRequest, PauseTaskRequest,
    ResumeTaskRequest,
};
use containerd_client::types::v1::{Process, Status as State};
use tonic::Status;

use super::connection::{Namespace, found, words};
use super::restarts::{self, KilledContainer, Version};
use super::spec::{self, Spec};
use super::{containers, docker, engine};
use crate::model::{Incarnation, Restarter, Task};
use crate::sys::freezer::{Freezers, Stillness};
use crate::sys::pidfd;
use crate::sys::procfs::{self, Handle};

/// How long a killed task may take to be gone before that is reported.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// How long an init that was killed by its handle may take to end before containerd is asked to
/// kill it too. containerd thaws a frozen container first.
const HANDLE_PATIENCE: Duration = Duration::from_millis(500);
/// How long containerd may take to report its version.
const VERSION_PATIENCE: Duration = Duration::from_secs(1);
/// How long it may take to find out what follows a kill.
const SEQUEL_PATIENCE: Duration = Duration::from_secs(2);
/// Longer than runc waits for a group to freeze (10 s; it answers a while after that).
const PAUSE_PATIENCE: Duration = Duration::from_secs(12);
/// How long a group may take to freeze before its state is reported.
const FREEZE_PATIENCE: Duration = Duration::from_millis(500);
const SIGKILL: u32 = 9;

fn task_of(process: &Process) -> Option<Task> {
    let input = PathBuf::from(&process.stdin);
    // The address of something that is no file is possible too.
    let terminal_input = Some(input).filter(|input| process.terminal && input.is_absolute());
    let start_time = procfs::read_stat(process.pid).ok().map(|stat| stat.identity.start_time);
    let task = |paused| Some(Task { pid: process.pid, start_time, paused, terminal_input });
    match process.status() {
        // A task that is restored from a checkpoint has no process until it is started.
        _ if process.pid == 0 => None,
        State::Created | State::Running => task(false),
        State::Paused | State::Pausing => task(true),
        State::Stopped => None,
        // The shim did not answer in time. The process is not known to be gone.
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

/// The outcome of a kill or a pause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Killed {
    /// What happened and what follows, as a text.
    pub message: String,
    /// What starts the container again, or may.
    pub restarter: Option<Restarter>,
    /// Whether anything was done: it may have been so already.
    pub changed: bool,
}

/// Why a response was not carried out.
#[derive(Debug)]
pub(super) enum Refused {
    /// The run that was meant is over. Nothing was done.
    Gone(String),
    /// The run is there, and the response failed.
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
/// containerd takes a name, and by the time it reads the name, that may be another container's.
/// While the process behind the handle lives, containerd gives neither the ID nor the task to
/// another container. So the handle is opened and compared first. Then containerd is asked what
/// it has under the name, and the handle is checked last.
pub(super) struct Run<'a> {
    namespace: &'a Namespace,
    container: &'a str,
    meant: Incarnation,
    init: OwnedFd,
}

impl<'a> Run<'a> {
    pub(super) fn hold(
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
        // Read by pid, and before the handle shows whether its process still has that pid.
        let found = procfs::read_stat(pid).map_err(|_| ended(pid))?.identity.start_time;
        if meant.start_time.is_some_and(|start_time| start_time != found) {
            return Err(ended(pid));
        }
        run.is_there()?;
        Ok(run)
    }

    pub(super) fn is_there(&self) -> Result<(), Refused> {
        if pidfd::has_ended(self.init.as_fd()) { Err(ended(self.meant.pid)) } else { Ok(()) }
    }

    /// The record and the task that containerd has under the container's name, if they are those
    /// of this run.
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

/// Checks that the container does not run, where no run of it was known.
async fn check_not_running(namespace: &Namespace, container: &str) -> Result<(), Refused> {
    match get(namespace, container).await? {
        None => Ok(()),
        Some(task) => Err(restarted(&task)),
    }
}

/// How a container is kept stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KeptStopped {
    /// Nothing would start it again that driftd can keep from it.
    No,
    /// By a label for containerd's restart monitor.
    ByLabel,
    /// By Docker, which has no restart policy for it any more.
    ByDocker,
}

impl KeptStopped {
    /// What was done, as the beginning of a clause.
    fn what(self) -> Option<String> {
        match self {
            KeptStopped::No => None,
            KeptStopped::ByLabel => Some(format!("{}={}", restarts::STATUS, restarts::STOPPED)),
            KeptStopped::ByDocker => Some("Docker's restart policy \"no\"".to_owned()),
        }
    }
}

/// Kills every process of a run. `None` stands for a container without a known run. With Docker's
/// socket, the container is first kept stopped.
pub(super) async fn kill(
    namespace: &Namespace,
    container: &str,
    meant: Option<Incarnation>,
    stay_stopped: Option<&Path>,
) -> Result<Killed, Refused> {
    let Some(meant) = meant else {
        check_not_running(namespace, container).await?;
        let message = "it was not running: there was nothing to kill".into();
        return Ok(Killed { message, restarter: None, changed: false });
    };
    let run = Run::hold(namespace, container, meant)?;
    let (record, _) = run.confirm().await?;
    let kept = match stay_stopped {
        Some(docker) => run.keep_stopped(&record, docker).await?,
        None => KeptStopped::No,
    };
    match (run.kill().await, kept.what()) {
        (Ok(()), _) => (),
        // The restart monitor itself ends a container that is to be stopped.
        (Err(Refused::Gone(_)), Some(_)) if kept == KeptStopped::ByLabel => (),
        (Err(Refused::Failed(why)), Some(what)) => {
            return Err(Refused::Failed(format!("{why}; {what} was set first, and stays")));
        }
        (Err(refused), _) => return Err(refused),
    }
    let killed = format!("killed (pid {})", meant.pid);
    if let Some(what) = kept.what() {
        let by = match kept {
            KeptStopped::ByDocker => "Docker",
            KeptStopped::ByLabel | KeptStopped::No => "containerd's restart monitor",
        };
        let message = format!("{killed}; {what} was set first, so that {by} leaves it stopped");
        return Ok(Killed { message, restarter: None, changed: true });
    }
    // The kill is done; finding out what follows must not delay the outcome for long.
    let sequel = tokio::time::timeout(SEQUEL_PATIENCE, run.sequel(&record)).await;
    Ok(match sequel.unwrap_or_default() {
        None => Killed { message: killed, restarter: None, changed: true },
        Some((restarter, text)) => {
            // driftd can change only what the restart monitor and Docker do.
            let without =
                if stay_stopped.is_some() { "; --no-restart has changed nothing" } else { "" };
            let message = format!("{killed}; {text}{without}");
            Killed { message, restarter: Some(restarter), changed: true }
        }
    })
}

impl Run<'_> {
    async fn kill(&self) -> Result<(), Refused> {
        let pid = self.meant.pid;
        // The kernel ends every process of a pid namespace together with its first process. The
        // handle can never mean another process.
        let is_first = Handle::open(pid).is_ok_and(|init| init.is_first_in_pid_namespace());
        let by_handle = is_first && {
            self.is_there()?;
            pidfd::kill(self.init.as_fd()).is_ok()
        };
        if by_handle && self.ends_within(HANDLE_PATIENCE).await {
            return Ok(());
        }
        match self.kill_by_containerd().await {
            // It has ended meanwhile, by our signal.
            Err(Refused::Gone(_)) if by_handle => (),
            Err(refused) if !by_handle => return Err(refused),
            Ok(()) | Err(_) => (),
        }
        if !self.ends_within(KILL_PATIENCE).await {
            return Err(Refused::Failed(format!(
                "SIGKILL was sent to all its processes, but init (pid {pid}) is still there after \
                 {} s",
                KILL_PATIENCE.as_secs()
            )));
        }
        Ok(())
    }

    /// What is known of the container after a kill.
    async fn known<'a>(&'a self, record: &'a Record) -> KilledContainer<'a> {
        let has_monitor = record.labels.contains_key(restarts::STATUS);
        let version = match has_monitor {
            true => self.namespace.version(VERSION_PATIENCE).await.ok(),
            false => None,
        };
        KilledContainer {
            namespace: &self.namespace.name,
            id: self.container,
            labels: &record.labels,
            version: version.and_then(|answer| Version::parse(&answer.version)),
            docker: None,
        }
    }

    /// What starts the container again, with a text for administrators.
    async fn sequel(&self, record: &Record) -> Option<(Restarter, String)> {
        let policy = self.dockers_policy(record).await;
        let docker = policy.as_ref().map(|policy| policy.as_deref());
        KilledContainer { docker, ..self.known(record).await }.sequel()
    }

    /// The restart policy of a container of Docker's, if it can be read.
    async fn dockers_policy(&self, record: &Record) -> Option<Option<String>> {
        let is_dockers = containers::is_dockers(record) || &*self.namespace.name == "moby";
        if !is_dockers {
            return None;
        }
        let spec = record.spec.as_ref().map(|spec| Spec::parse(&spec.value));
        let (id, root) = (record.id.clone(), spec.and_then(|spec| spec.root));
        let read = move || docker::restart_policy(&id, &root?);
        Some(tokio::task::spawn_blocking(read).await.ok().flatten())
    }

    /// Makes containerd's restart monitor, or Docker, leave the container stopped. If neither
    /// would start it again, nothing is changed.
    async fn keep_stopped(&self, record: &Record, docker: &Path) -> Result<KeptStopped, Refused> {
        match self.dockers_policy(record).await {
            Some(Some(policy)) if matches!(&*policy, "" | "no") => return Ok(KeptStopped::No),
            // Also if it could not be read.
            Some(_) => {
                self.is_there()?;
                let done = engine::leave_stopped(docker, self.container).await;
                return done.map(|()| KeptStopped::ByDocker).map_err(|why| {
                    Refused::Failed(format!(
                        "its restart policy could not be changed ({why}), so that Docker would \
                         start it again; nothing was done"
                    ))
                });
            }
            None => (),
        }
        if self.known(record).await.by_monitor().is_none() {
            return Ok(KeptStopped::No);
        }
        self.is_there()?;
        let (label, value) = (restarts::STATUS, restarts::STOPPED);
        containers::set_label(self.namespace, self.container, label, value).await.map_err(
            |status| {
                Refused::Failed(format!(
                    "its label {label} could not be set ({}), so that it would be started again; \
                     nothing was done",
                    words(&status)
                ))
            },
        )?;
        Ok(KeptStopped::ByLabel)
    }

    /// The control groups by which the container is frozen.
    fn freezers(&self, record: &Record) -> Result<Freezers, FreezerError> {
        let spec = record.spec.as_ref().map(|spec| Spec::parse(&spec.value)).unwrap_or_default();
        let runtime = record.runtime.clone().unwrap_or_default();
        let options = runtime.options.map(|options| options.value).unwrap_or_default();
        if spec::own_kernel(&runtime.name, &options).is_some() {
            return Err(FreezerError::OwnKernel);
        }
        let init = Handle::open(self.meant.pid)?;
        let freezers = Freezers::of(&init, |path| spec.own_cgroup(self.container, path));
        // The directory of /proc was opened by the pid, so the run is checked once more.
        self.is_there().map_err(|_| FreezerError::Ended)?;
        Ok(freezers?)
    }
}

/// Why the state of a container's control groups is not known.
#[derive(Debug, thiserror::Error)]
enum FreezerError {
    #[error("its programs run on a kernel of their own")]
    OwnKernel,
    #[error("its init has ended")]
    Ended,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Waits until the processes are frozen, for at most `patience`. Returns the last state.
async fn still_within(freezers: &Freezers, patience: Duration) -> io::Result<Stillness> {
    const STEP: Duration = Duration::from_millis(5);
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let found = freezers.stillness()?;
        if found == Stillness::Frozen || tokio::time::Instant::now() >= deadline {
            return Ok(found);
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Freezes a run.
pub(super) async fn pause(
    namespace: &Namespace,
    container: &str,
    meant: Option<Incarnation>,
) -> Result<Killed, Refused> {
    let done = |changed| move |message| Killed { message, restarter: None, changed };
    let Some(meant) = meant else {
        check_not_running(namespace, container).await?;
        return Err(Refused::Failed("it is not running: there is nothing to pause".into()));
    };
    let run = Run::hold(namespace, container, meant)?;
    let (record, task) = run.confirm().await?;
    let freezers = run.freezers(&record);
    let settled = async |patience| match &freezers {
        Ok(freezers) => still_within(freezers, patience).await.ok(),
        Err(_) => None,
    };
    let before = settled(Duration::ZERO).await;
    if task.paused || before.is_some_and(Stillness::is_ordered) {
        let already = of_paused_already(task.paused, before).map(done(false));
        return already.map_err(Refused::Failed);
    }
    let request = PauseTaskRequest { container_id: container.into() };
    let mut tasks = namespace.tasks();
    let response = tokio::time::timeout(PAUSE_PATIENCE, tasks.pause(request)).await;
    // A pause cannot be requested by handle. If the run has ended meanwhile, containerd may have
    // paused a later one under the same name; that one is resumed.
    if let Err(gone) = run.is_there() {
        if let Ok(Some(Task { pid, paused: true, .. })) = get(namespace, container).await
            && pid != meant.pid
        {
            let request = ResumeTaskRequest { container_id: container.into() };
            namespace.tasks().resume(request).await?;
        }
        return Err(gone);
    }
    let failed = match response {
        Ok(Ok(_)) => None,
        Ok(Err(status)) => Some((words(&status), Refused::Containerd(status))),
        Err(_) => {
            let late = format!("containerd did not answer within {} s", PAUSE_PATIENCE.as_secs());
            let refused = Refused::Failed(format!("{late}; the pause may still happen"));
            Some((late, refused))
        }
    };
    let after = settled(FREEZE_PATIENCE).await;
    let Some((reason, refused)) = failed else {
        return of_paused(meant.pid, after).map(done(true)).map_err(Refused::Failed);
    };
    Err(match half_paused(&reason, after) {
        Some(text) => Refused::Failed(text),
        None => refused,
    })
}

/// The message for a container that was paused before, by containerd or by its group alone.
fn of_paused_already(by_containerd: bool, found: Option<Stillness>) -> Result<String, String> {
    let message = if by_containerd {
        "it was paused already"
    } else {
        "its control group was ordered to freeze already, though containerd reports that it runs: \
         `driftd respond resume` thaws it"
    };
    of_still(message.to_owned(), found)
}

/// The message for a pause that containerd reports as done.
fn of_paused(pid: u32, found: Option<Stillness>) -> Result<String, String> {
    of_still(format!("paused (pid {pid})"), found)
}

/// The message for a paused container, if its control group confirms the pause.
fn of_still(message: String, found: Option<Stillness>) -> Result<String, String> {
    match found {
        Some(Stillness::Freezing) => Ok(message
            + "; not yet frozen: a process of it waits in the kernel, and is frozen when it \
               returns from there"),
        Some(Stillness::Running) => {
            Err("containerd reports that it is paused, but its control group is not frozen: \
                 resume it, then pause it again"
                .to_owned())
        }
        // If its group is not known, only containerd's report is left.
        Some(Stillness::Frozen | Stillness::FrozenFromAbove) | None => Ok(message),
    }
}

/// The message for a pause that has failed, if its control group freezes all the same.
fn half_paused(reason: &str, found: Option<Stillness>) -> Option<String> {
    let how = match found? {
        Stillness::Frozen => "its control group is frozen",
        Stillness::Freezing => {
            "its control group freezes, and a process that waits in the kernel is frozen when it \
             returns from there"
        }
        Stillness::Running | Stillness::FrozenFromAbove => return None,
    };
    Some(format!(
        "half paused: containerd failed ({reason}), but {how}; `driftd respond resume` thaws it"
    ))
}

/// Thaws a run. Returns what happened, as a text.
pub(super) async fn resume(
    namespace: &Namespace,
    container: &str,
    meant: Option<Incarnation>,
) -> Result<String, Refused> {
    let Some(meant) = meant else {
        check_not_running(namespace, container).await?;
        return Err(Refused::Failed("it is not running: there is nothing to resume".into()));
    };
    let run = Run::hold(namespace, container, meant)?;
    let (record, task) = run.confirm().await?;
    let mut refused = None;
    if task.paused {
        // A frozen run does not end by itself, so the name is its own until it is thawed.
        let request = ResumeTaskRequest { container_id: container.into() };
        refused = namespace.tasks().resume(request).await.err();
    }
    let is_done = task.paused && refused.is_none();
    let found = run.freezers(&record).and_then(|freezers| {
        let (found, is_ordered) = (freezers.stillness()?, freezers.is_ordered()?);
        Ok((freezers, found, is_ordered))
    });
    match (found, refused) {
        (Ok((freezers, _, true)), refused) => {
            run.is_there()?;
            let failed = |reason: String| {
                Refused::Failed(format!(
                    "its control group is frozen and cannot be thawed: {reason}"
                ))
            };
            freezers.thaw().map_err(|err| failed(err.to_string()))?;
            if freezers.is_ordered().map_err(|err| failed(err.to_string()))? {
                return Err(failed("it was frozen again".into()));
            }
            let though = match refused {
                Some(status) => format!("containerd refused ({})", words(&status)),
                None if is_done => "containerd reported it as resumed".into(),
                None => "containerd reported that it runs".into(),
            };
            Ok(format!("thawed (pid {}): its control group was frozen, though {though}", meant.pid))
        }
        (_, Some(status)) => Err(status.into()),
        (Ok((_, Stillness::FrozenFromAbove, _)), None) => Err(Refused::Failed(
            "a control group above the container's own is frozen, and driftd thaws no other than \
             that"
                .into(),
        )),
        _ if is_done => Ok(format!("resumed (pid {})", meant.pid)),
        (Ok(_), None) => Ok("it was not paused".into()),
        (Err(reason), None) => Ok(format!(
            "containerd reports that it was not paused; its control group could not be read: \
             {reason}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d03_a_pause_is_reported_by_its_control_group_and_not_by_the_runtime() {
        use Stillness::{Freezing, Frozen, FrozenFromAbove, Running};
        let done = |found| of_paused(7, found);
        assert_eq!(done(Some(Frozen)).unwrap(), "paused (pid 7)");
        assert_eq!(done(None).unwrap(), "paused (pid 7)", "only containerd's report is left");
        assert!(done(Some(Freezing)).unwrap().starts_with("paused (pid 7); not yet frozen: "));
        assert!(done(Some(Running)).unwrap_err().contains("is not frozen"));
        let failed = |found| half_paused("timeout of 10s reached", found);
        assert_eq!(failed(None), None);
        assert_eq!(failed(Some(Running)), None, "only the failure is reported");
        assert_eq!(failed(Some(FrozenFromAbove)), None);
        for (found, how) in [(Frozen, "is frozen"), (Freezing, "freezes")] {
            let text = failed(Some(found)).unwrap();
            for part in ["half paused", "timeout of 10s reached", how, "driftd respond resume"] {
                assert!(text.contains(part), "{part} is missing: {text}");
            }
        }
        let already = of_paused_already;
        assert_eq!(already(true, Some(Frozen)).unwrap(), "it was paused already");
        assert!(already(false, Some(Frozen)).unwrap().contains("driftd respond resume"));
        assert!(already(true, Some(Freezing)).unwrap().contains("not yet frozen"));
        assert!(
            already(true, Some(Running)).unwrap_err().contains("is not frozen"),
            "thawed by hand"
        );
    }
}
