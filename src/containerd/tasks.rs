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

use super::connection::{Namespace, found, words};
use super::restarts::{self, Known, Version};
use super::spec::{self, Spec};
use super::{Killed, containers, docker};
use crate::model::{Incarnation, Restarter, Task};
use crate::sys::freezer::{Freezers, Stillness};
use crate::sys::pidfd;
use crate::sys::procfs::{self, Handle};

/// How long a killed task may take to be gone before that is reported.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// How long an init that was killed by its handle may take to end before containerd is
/// asked to kill it too: it knows how to thaw a frozen one first.
const HANDLE_PATIENCE: Duration = Duration::from_millis(500);
/// How long containerd may take to say its version.
const VERSION_PATIENCE: Duration = Duration::from_secs(1);
/// How long it may take to find out what follows a kill.
const SEQUEL_PATIENCE: Duration = Duration::from_secs(2);
/// Longer than runc waits for a group to freeze (10 s, and it answers some time later).
const PAUSE_PATIENCE: Duration = Duration::from_secs(12);
/// How long a group may take to freeze before its state is reported.
const FREEZE_PATIENCE: Duration = Duration::from_millis(500);
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

/// Kills every process of a run. `None` is a container that was not known to run.
pub(super) async fn kill(
    namespace: &Namespace,
    container: &str,
    meant: Option<Incarnation>,
    no_restart: bool,
) -> Result<Killed, Refused> {
    let Some(meant) = meant else {
        nothing_known(namespace, container).await?;
        let message = "it was not running: there was nothing to kill".into();
        return Ok(Killed { message, restarter: None });
    };
    let run = Run::hold(namespace, container, meant)?;
    let (record, _) = run.confirm().await?;
    let is_kept_stopped = no_restart && run.keep_stopped(&record).await?;
    match run.kill().await {
        Ok(()) => (),
        // The restart monitor ends what is to be stopped.
        Err(Refused::Gone(_)) if is_kept_stopped => (),
        Err(Refused::Failed(why)) if is_kept_stopped => {
            let label = format!("{}={}", restarts::STATUS, restarts::STOPPED);
            return Err(Refused::Failed(format!("{why}; {label} was set first, and stays")));
        }
        Err(refused) => return Err(refused),
    }
    let killed = format!("killed (pid {})", meant.pid);
    if is_kept_stopped {
        let message = format!(
            "{killed}; {}={} was set first, so that containerd's restart monitor leaves it stopped",
            restarts::STATUS,
            restarts::STOPPED
        );
        return Ok(Killed { message, restarter: None });
    }
    // The kill is done, whatever Docker's files and containerd take to answer.
    let sequel = tokio::time::timeout(SEQUEL_PATIENCE, run.sequel(&record)).await;
    Ok(match sequel.unwrap_or_default() {
        None => Killed { message: killed, restarter: None },
        Some((restarter, text)) => {
            // It is the monitor's alone that driftd can change.
            let without = if no_restart { "; --no-restart has changed nothing" } else { "" };
            Killed { message: format!("{killed}; {text}{without}"), restarter: Some(restarter) }
        }
    })
}

impl Run<'_> {
    async fn kill(&self) -> Result<(), Refused> {
        let pid = self.meant.pid;
        // The kernel ends everything in a pid namespace together with its first process, and
        // the handle names that process for good.
        let is_first = Handle::open(pid).is_ok_and(|init| init.is_first_in_pid_namespace());
        let by_handle = is_first && {
            self.is_there()?;
            pidfd::kill(self.init.as_fd()).is_ok()
        };
        if by_handle && self.ends_within(HANDLE_PATIENCE).await {
            return Ok(());
        }
        match self.kill_by_containerd().await {
            // It has ended by our signal meanwhile.
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

    /// What is known of what follows a kill.
    async fn known<'a>(&'a self, record: &'a Record) -> Known<'a> {
        let is_asked = record.labels.contains_key(restarts::STATUS);
        let version = match is_asked {
            true => self.namespace.version(VERSION_PATIENCE).await.ok(),
            false => None,
        };
        Known {
            namespace: &self.namespace.name,
            id: self.container,
            labels: &record.labels,
            version: version.and_then(|answer| Version::parse(&answer.version)),
            docker: None,
        }
    }

    /// What starts the container again, in words.
    async fn sequel(&self, record: &Record) -> Option<(Restarter, String)> {
        let is_dockers = containers::is_dockers(record) || &*self.namespace.name == "moby";
        let policy = if is_dockers {
            let spec = record.spec.as_ref().map(|spec| Spec::parse(&spec.value));
            let (id, root) = (record.id.clone(), spec.and_then(|spec| spec.root));
            let read = move || docker::restart_policy(&id, &root?);
            tokio::task::spawn_blocking(read).await.ok().flatten()
        } else {
            None
        };
        let docker = is_dockers.then_some(policy.as_deref());
        Known { docker, ..self.known(record).await }.sequel()
    }

    /// Has containerd's restart monitor leave the container stopped. False if it would not
    /// start it again: then nothing is changed.
    async fn keep_stopped(&self, record: &Record) -> Result<bool, Refused> {
        if self.known(record).await.by_monitor().is_none() {
            return Ok(false);
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
        Ok(true)
    }

    /// The control groups by which the container is frozen. In words, why they are not known.
    fn freezers(&self, record: &Record) -> Result<Freezers, String> {
        let spec = record.spec.as_ref().map(|spec| Spec::parse(&spec.value)).unwrap_or_default();
        let runtime = record.runtime.clone().unwrap_or_default();
        let options = runtime.options.map(|options| options.value).unwrap_or_default();
        if spec::own_kernel(&runtime.name, &options).is_some() {
            return Err("its programs run on a kernel of their own".into());
        }
        let init = Handle::open(self.meant.pid).map_err(|err| err.to_string())?;
        let freezers = Freezers::of(&init, |path| spec.own_cgroup(self.container, path));
        // The handle of /proc was opened by the pid.
        self.is_there().map_err(|_| "its init has ended".to_owned())?;
        freezers.map_err(|err| err.to_string())
    }
}

/// Waits until the processes are frozen, for at most so long; the last state seen.
async fn still_within(freezers: &Freezers, patience: Duration) -> Result<Stillness, String> {
    const STEP: Duration = Duration::from_millis(5);
    let deadline = tokio::time::Instant::now() + patience;
    loop {
        let found = freezers.stillness().map_err(|err| err.to_string())?;
        if found == Stillness::Frozen || tokio::time::Instant::now() >= deadline {
            return Ok(found);
        }
        tokio::time::sleep(STEP).await;
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
    let (record, task) = run.confirm().await?;
    let freezers = run.freezers(&record);
    let settled = async |patience| match &freezers {
        Ok(freezers) => still_within(freezers, patience).await,
        Err(reason) => Err(reason.clone()),
    };
    let before = settled(Duration::ZERO).await.ok();
    if task.paused || before.is_some_and(Stillness::is_ordered) {
        return of_paused_already(task.paused, before).map_err(Refused::Failed);
    }
    let request = PauseTaskRequest { container_id: container.into() };
    let mut tasks = namespace.tasks();
    let asked = tokio::time::timeout(PAUSE_PATIENCE, tasks.pause(request)).await;
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
    let failed = match asked {
        Ok(Ok(_)) => None,
        Ok(Err(status)) => Some((words(&status), Refused::Containerd(status))),
        Err(_) => {
            let late = format!("containerd did not answer within {} s", PAUSE_PATIENCE.as_secs());
            let refused = Refused::Failed(format!("{late}; the pause may still happen"));
            Some((late, refused))
        }
    };
    let after = settled(FREEZE_PATIENCE).await.ok();
    let Some((reason, refused)) = failed else {
        return of_paused(meant.pid, after).map_err(Refused::Failed);
    };
    Err(match half_paused(&reason, after) {
        Some(text) => Refused::Failed(text),
        None => refused,
    })
}

/// What is said of a container that was paused before, by containerd or by its group alone.
fn of_paused_already(by_containerd: bool, found: Option<Stillness>) -> Result<String, String> {
    let said = if by_containerd {
        "it was paused already"
    } else {
        "its control group was ordered to freeze already, though containerd says that it runs: \
         `driftd respond resume` thaws it"
    };
    of_still(said.to_owned(), found)
}

/// What is said of a pause that containerd calls done.
fn of_paused(pid: u32, found: Option<Stillness>) -> Result<String, String> {
    of_still(format!("paused (pid {pid})"), found)
}

/// What is said of a container that stands still, if its control group says so too.
fn of_still(said: String, found: Option<Stillness>) -> Result<String, String> {
    match found {
        Some(Stillness::Freezing) => Ok(said
            + "; not yet frozen: a process of it waits in the kernel, and stands still when it \
               returns from there"),
        Some(Stillness::Running) => {
            Err("containerd says that it is paused, but its control group \
                                         is not frozen: resume it, then pause it again"
                .to_owned())
        }
        // Where its group is not known, containerd's word is all there is.
        Some(Stillness::Frozen | Stillness::FrozenFromAbove) | None => Ok(said),
    }
}

/// What is said of a pause that has failed, if its control group freezes all the same.
fn half_paused(reason: &str, found: Option<Stillness>) -> Option<String> {
    let how = match found? {
        Stillness::Frozen => "its control group is frozen",
        Stillness::Freezing => {
            "its control group freezes, and a process that waits in the kernel stands still when \
             it returns from there"
        }
        Stillness::Running | Stillness::FrozenFromAbove => return None,
    };
    Some(format!(
        "half paused: containerd failed ({reason}), but {how}; `driftd respond resume` thaws it"
    ))
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
    let (record, task) = run.confirm().await?;
    let mut refused = None;
    if task.paused {
        // What is frozen does not end by itself, so the name is its own until it is thawed.
        let request = ResumeTaskRequest { container_id: container.into() };
        refused = namespace.tasks().resume(request).await.err();
    }
    let is_done = task.paused && refused.is_none();
    let found = run.freezers(&record).and_then(|freezers| {
        let found = freezers.stillness().and_then(|found| Ok((found, freezers.is_ordered()?)));
        let (found, is_ordered) = found.map_err(|err| err.to_string())?;
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
                None if is_done => "containerd called it resumed".into(),
                None => "containerd said that it runs".into(),
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
            "it was not paused, says containerd; its control group could not be read: {reason}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d03_a_pause_is_called_what_its_control_group_says_and_not_what_the_runtime_says() {
        use Stillness::{Freezing, Frozen, FrozenFromAbove, Running};
        let done = |found| of_paused(7, found);
        assert_eq!(done(Some(Frozen)).unwrap(), "paused (pid 7)");
        assert_eq!(done(None).unwrap(), "paused (pid 7)", "containerd's word is all there is");
        assert!(done(Some(Freezing)).unwrap().starts_with("paused (pid 7); not yet frozen: "));
        assert!(done(Some(Running)).unwrap_err().contains("is not frozen"));
        let failed = |found| half_paused("timeout of 10s reached", found);
        assert_eq!(failed(None), None);
        assert_eq!(failed(Some(Running)), None, "the failure is all there is to say");
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
