//! Libraries: code that a program maps, and that is not known to be the image's.
//!
//! The kernel records every executable mapping ([`crate::sys::perf`]). Nearly all of them
//! are the image's own libraries, which one check of the container's own layer shows: the
//! name is not there, and the image has a file with this inode. The rest is hashed and
//! reported. All of that happens on the thread `libraries`, behind a channel that never makes
//! the trace wait.
//!
//! [`Tracing`] takes the trace's records. It also passes interpreters on to `interpreters`,
//! and reads no file itself. `inspect` examines the files.
//!
//! ```text
//! trace ── Loading ──> the name is not in the upper layer, and the image has it ──> done
//!                      otherwise: its content, from the layer, or from the process
//!                      while that lives ──> FileFact::Loaded
//! ```

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::TrySendError;
use jiff::Timestamp;

use super::inspect::{self, Code, Upper};
use super::scripts::{self, Runs};
use super::started::Started;
use crate::health::Failure;
use crate::model::{
    ContainerId, Content, Fact, FileFact, Filesystem, Format, Process, ProcessIdentity, RootfsPath,
    Source, printable,
};
use crate::sys::door::{Ground, View};
use crate::sys::perf::{Executed, Mapped};
use crate::sys::procfs::{self, Handle};
use crate::watch::core::fair::{self, Owned, Receiver, Sender};
use crate::watch::core::shared::Next;
use crate::watch::core::watched::Watched;
use crate::watch::files::progress::{self, Backlog};
use crate::watch::files::shared::Files;
use crate::watch::process::arguments::Recorded;
use crate::watch::process::named;
use crate::watch::process::records::{self, TraceConsumer};
use crate::watch::process::shared::Processes;
use crate::watch::process::{attribution, describe, reach};

/// Code that a process of a container has mapped, other than by its execve.
#[derive(Clone, Debug)]
pub(crate) struct Loading {
    pub(crate) watched: Arc<Watched>,
    pub(crate) mapped: Mapped,
    pub(crate) at: Timestamp,
    pub(crate) program: Program,
    /// The first code since its execve.
    pub(crate) is_first: bool,
}

impl Owned for Loading {
    fn owner(&self) -> &ContainerId {
        &self.watched.container
    }
}

/// What a process runs, as its execve was recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Program {
    /// When its execve ended. 0 if that was not recorded.
    pub(crate) since: u64,
    /// The program's own file, links resolved, as the process sees it.
    pub(crate) file: Option<Arc<[u8]>>,
}

impl Program {
    /// Whether it is a dynamic linker, which runs another program that it is given.
    fn is_linker(&self) -> bool {
        self.file.as_deref().is_some_and(scripts::is_linker)
    }
}

/// What the processes of containers run, by the kernel's records in their order.
#[derive(Debug, Default)]
struct Programs {
    running: HashMap<u32, Running>,
}

#[derive(Clone, Debug)]
struct Running {
    program: Program,
    has_loaded: bool,
}

/// More processes than this are not remembered.
const MAX_PROGRAMS: usize = 64 * 1024;

impl Programs {
    fn executed(&mut self, pid: u32, time: u64, file: Option<&[u8]>) -> &Program {
        if self.running.len() >= MAX_PROGRAMS {
            self.running.clear();
        }
        let program = Program { since: time, file: file.map(Into::into) };
        let running = Running { program, has_loaded: false };
        &self.running.entry(pid).insert_entry(running).into_mut().program
    }

    /// The program of a process that loads code, and whether it is its first code.
    fn loads(&mut self, pid: u32) -> (Program, bool) {
        match self.running.get_mut(&pid) {
            Some(running) => {
                let is_first = !std::mem::replace(&mut running.has_loaded, true);
                (running.program.clone(), is_first)
            }
            // Executed before driftd recorded, or a child that continues its parent's program.
            None => (Program::default(), false),
        }
    }
}

/// Passes on the trace's records, without ever waiting.
#[derive(Debug)]
pub(crate) struct Tracing {
    programs: Programs,
    loadings: Sender<Box<Loading>>,
    started: Sender<Box<Started>>,
}

impl Tracing {
    pub(crate) fn new(loadings: Sender<Box<Loading>>, started: Sender<Box<Started>>) -> Tracing {
        Tracing { programs: Programs::default(), loadings, started }
    }
}

/// What an interpreter runs, by its recorded arguments. `None` if these do not show it;
/// `Some(None)` if the program is no interpreter.
fn recorded_runs(
    shared: &Processes,
    pid: u32,
    executed: u64,
    program: &[u8],
) -> Option<Option<Runs>> {
    let Recorded::Arguments(arguments) = shared.arguments().of(pid, executed, executed) else {
        return None;
    };
    let arguments = procfs::split_arguments(&arguments)?;
    // A multi-call program may have any name.
    let interpreter = scripts::interpreter(program, &arguments)
        .or_else(|| scripts::interpreter(b"busybox", &arguments));
    Some(interpreter.map(|(language, rest)| scripts::runs(language, rest)))
}

impl TraceConsumer for Tracing {
    fn executed(
        &mut self,
        shared: &Processes,
        watched: &Arc<Watched>,
        executed: &Executed,
        program: Option<&Mapped>,
    ) {
        let Executed { pid, time, file_name, .. } = executed;
        let file = program.map(|program| &*program.name);
        let is_multicall =
            program.is_some_and(|program| watched.is_multicall(program.device, program.inode));
        let program = self.programs.executed(*pid, *time, file);
        let may_interpret = is_multicall
            || match &program.file {
                Some(file) => scripts::may_interpret(file) || scripts::may_interpret(file_name),
                None => true,
            };
        if !may_interpret {
            return;
        }
        let name = program.file.as_deref().unwrap_or(file_name);
        match recorded_runs(shared, *pid, *time, name) {
            Some(None) => return,
            Some(Some(Runs::Inline)) => (),
            // It may end soon, and only the process leads to its script.
            None | Some(Some(Runs::File(_) | Runs::Input)) => {
                shared.rest_of_trace.stay_awake();
            }
        }
        let started = Started {
            watched: watched.clone(),
            pid: *pid,
            file: program.file.clone(),
            exec_name: file_name.clone(),
            executed: *time,
            at: records::time_of(*time),
        };
        if let Err(TrySendError::Full(dropped)) = self.started.try_send(Box::new(started)) {
            let detail = "too many interpreters wait to be checked";
            shared.lose(Failure::CodeQueueFull, Some(&dropped.watched), detail);
        }
    }

    fn mapped(&mut self, shared: &Processes, watched: &Arc<Watched>, mapped: &Mapped) {
        if mapped.inode == 0 {
            return;
        }
        let (program, is_first) = self.programs.loads(mapped.pid);
        let loading = Loading {
            watched: watched.clone(),
            at: records::time_of(mapped.time),
            mapped: mapped.clone(),
            program,
            is_first,
        };
        if let Err(TrySendError::Full(dropped)) = self.loadings.try_send(Box::new(loading)) {
            let detail = "too many libraries wait to be checked";
            shared.lose(Failure::CodeQueueFull, Some(&dropped.watched), detail);
        }
    }

    fn exited(&mut self, _: &Processes, pid: u32, _: u64) {
        self.programs.running.remove(&pid);
    }

    fn lost(&mut self) {
        self.programs.running.clear();
    }
}

/// How many mappings of one container that may not be the image's are examined in a second.
const BUDGET: u32 = 2000;

/// No more pairs of a process and its library are remembered as reported.
const MAX_REPORTED: usize = 16 * 1024;

/// How long a file waits for its writer, which the change feed may not have reported yet.
const WAIT_FOR_WRITER: Duration = Duration::from_millis(100);

/// How often code that waits for the change feed is checked.
const STEP: Duration = Duration::from_millis(5);

/// A file by the init of its container's run and its name. Devices and IDs are used again.
type Named = (ProcessIdentity, Box<[u8]>);

/// Code that waits for its writer to be known.
#[derive(Debug)]
struct Waiting {
    since: Instant,
    /// What the change feed has to read before.
    backlog: Backlog,
    loading: Loading,
    examined: Examined,
    process: Option<Process>,
}

impl Waiting {
    fn is_due(&self, shared: &Files) -> bool {
        let waited = self.since.elapsed();
        waited >= progress::PATIENCE
            || waited >= WAIT_FOR_WRITER && shared.progress.has_reached(self.backlog)
    }
}

#[derive(Debug, Default)]
struct Libraries {
    /// Files of the image, by container: the layers do not change under it.
    in_image: HashMap<Named, Option<(u64, u64)>>,
    reported: HashSet<(u32, u64, u64, u64)>,
    budgets: HashMap<u64, (Instant, u32)>,
    waiting: VecDeque<Waiting>,
}

/// More names than this are not remembered.
const MAX_NAMES: usize = 16 * 1024;

/// How often containers are checked for a request to scan their processes.
const CHECK_EVERY: Duration = Duration::from_millis(250);

/// How many mappings are taken at once. Each file of the image is checked once for all.
const BATCH: usize = 512;

pub(crate) fn run(shared: &Files, loadings: &Receiver<Box<Loading>>) {
    let mut libraries = Libraries::default();
    let mut last_check = Instant::now();
    let mut pass: Option<Pass> = None;
    let mut is_last = false;
    loop {
        if last_check.elapsed() >= CHECK_EVERY && !shared.is_stopping() {
            last_check = Instant::now();
            for watched in shared.table.all() {
                watched.learn_multicall(multicall);
            }
            if pass.is_none() {
                pass = Pass::begin(shared);
            }
        }
        let mut patience = match libraries.waiting.front() {
            Some(first) => WAIT_FOR_WRITER.saturating_sub(first.since.elapsed()).max(STEP),
            None => CHECK_EVERY,
        };
        if let Some(going) = pass.as_mut().filter(|_| !shared.is_stopping()) {
            let rest = shared.rest();
            if rest.is_zero() {
                let used = fair::processor_time();
                let is_over = going.step(shared, &mut libraries);
                shared.spend(fair::processor_time().saturating_sub(used));
                pass.take_if(|_| is_over);
            }
            patience = patience.min(rest);
        }
        match shared.next_within(loadings, patience) {
            Next::Item(first) => {
                // A check covers the same file in all mappings that were recorded before it.
                let mut image = HashSet::new();
                let rest = std::iter::from_fn(|| loadings.recv_timeout(Duration::ZERO).ok());
                for loading in std::iter::once(first).chain(rest.take(BATCH)) {
                    let Mapped { device, inode, name, .. } = &loading.mapped;
                    let key = (*device, *inode, name.clone());
                    if image.contains(&key) {
                        continue;
                    }
                    if libraries.take(shared, *loading) {
                        image.insert(key);
                    }
                }
            }
            Next::Nothing => (),
            Next::End => is_last = true,
        }
        // At the end, mappings do not wait for their writers.
        let is_due = |first: &Waiting| is_last || first.is_due(shared);
        while libraries.waiting.front().is_some_and(is_due)
            && let Some(first) = libraries.waiting.pop_front()
        {
            let Waiting { backlog, loading, examined, process, .. } = first;
            let is_read = shared.progress.has_reached(backlog);
            let writer = || examined.writer_read(shared, &loading.watched);
            let writer = is_read.then(writer).flatten();
            report(shared, &loading, examined, process, writer, Source::Trace);
        }
        if is_last {
            return;
        }
    }
}

/// One scan of all processes, for all containers whose loaded code is to be scanned. It
/// proceeds in slices, so that code that is loaded meanwhile does not wait.
struct Pass {
    /// By pid and mount namespace: the namespaces of each process are read once.
    wanted: HashMap<(u64, Option<u64>), Vec<Arc<Watched>>>,
    pids: std::vec::IntoIter<u32>,
}

impl Pass {
    fn begin(shared: &Files) -> Option<Pass> {
        let mut wanted: HashMap<_, Vec<Arc<Watched>>> = HashMap::new();
        for watched in shared.table.all() {
            if watched.take_code_scan()
                && watched.has_namespaces()
                && let Some(namespace) = watched.pid_namespace
            {
                wanted.entry((namespace, watched.mount_namespace)).or_default().push(watched);
            }
        }
        if wanted.is_empty() {
            return None;
        }
        Some(Pass { wanted, pids: procfs::all().ok()?.into_iter() })
    }

    /// Scans some processes. True when all have been scanned.
    fn step(&mut self, shared: &Files, libraries: &mut Libraries) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < fair::SLICE {
            let Some(pid) = self.pids.next() else { return true };
            let Ok(handle) = Handle::open(pid) else { continue };
            let Ok(pid_namespace) = handle.pid_namespace() else { continue };
            let place = (pid_namespace, handle.mount_namespace().ok());
            for watched in self.wanted.get(&place).into_iter().flatten() {
                libraries.scan(shared, watched, &handle);
            }
        }
        false
    }
}

impl Libraries {
    /// Checks one mapping. True if it is the image's own.
    fn take(&mut self, shared: &Files, loading: Loading) -> bool {
        let Loading { watched, mapped, program, .. } = &loading;
        let reported = (mapped.pid, program.since, mapped.device, mapped.inode);
        if self.reported.contains(&reported) {
            return false;
        }
        let place = self.place(watched, mapped);
        let place = match place {
            Place::Image => return true,
            Place::NoFile => return false,
            place => place,
        };
        if !self.is_within_budget(watched) {
            shared.lose(
                Failure::CodeQueueFull,
                Some(watched),
                "more libraries were loaded than are checked",
            );
            return false;
        }
        let handle = Handle::open(mapped.pid).ok();
        let Some(examined) = examine(shared, watched, mapped, handle.as_ref(), place) else {
            return false;
        };
        let code = &examined.code;
        if code.file_of.is_some()
            && code.file_of
                == handle.as_ref().and_then(|handle| attribution::runs_file_of(shared, handle))
        {
            // The process runs a program of that container. That is reported, and the
            // libraries that belong to it are not.
            return false;
        }
        if self.reported.len() >= MAX_REPORTED {
            self.reported.clear();
        }
        self.reported.insert(reported);
        let process = handle.map(|handle| describe::as_it_is(&handle, watched));
        let backlog = shared.progress.backlog();
        let writer = examined.writer(shared, watched, Duration::ZERO);
        if code.filesystem == Filesystem::Overlay && writer.is_none() {
            let since = Instant::now();
            self.waiting.push_back(Waiting { since, backlog, loading, examined, process });
        } else {
            report(shared, &loading, examined, process, writer, Source::Trace);
        }
        false
    }

    fn is_within_budget(&mut self, watched: &Watched) -> bool {
        let now = Instant::now();
        if self.budgets.len() > 4096 {
            self.budgets.clear();
        }
        let (since, spent) = self.budgets.entry(watched.device).or_insert((now, 0));
        if since.elapsed() >= Duration::from_secs(1) {
            (*since, *spent) = (now, 0);
        }
        *spent += 1;
        *spent <= BUDGET
    }

    /// Where a mapped file lies, as far as its name and its inode show.
    fn place(&mut self, watched: &Arc<Watched>, mapped: &Mapped) -> Place {
        if inspect::memfd_name(mapped.device, &mapped.name).is_some() {
            // A compiler at run time writes code through one mapping and runs it through
            // another: these are shared mappings. A library's is not.
            return if mapped.is_shared { Place::NoFile } else { Place::Elsewhere };
        }
        let Ok(path) = RootfsPath::new(&mapped.name) else { return Place::NoFile };
        // Before Linux 6.18 a record can name the file below the overlay. A container can also
        // have volumes on the layers' filesystem, so only that very file is accepted.
        let is_below = mapped.device != watched.device;
        if is_below && !watched.layers().is_some_and(|layers| layers.is_on(mapped.device)) {
            return Place::Elsewhere;
        }
        let is_mapped =
            |device, inode| inode == mapped.inode && (!is_below || device == mapped.device);
        match inspect::upper(watched, &path) {
            Upper::File { fd, stat } if is_mapped(stat.device, stat.inode) => {
                Place::Upper(path, fd, stat)
            }
            Upper::File { .. } | Upper::Hidden | Upper::Unknown if is_below => Place::Elsewhere,
            Upper::File { fd, stat } => Place::PerhapsUpper(path, fd, stat),
            // The lower layers are not read.
            Upper::Absent if watched.has_foreign_layers() && is_below => Place::Elsewhere,
            Upper::Absent if watched.has_foreign_layers() => Place::Image,
            Upper::Hidden | Upper::Unknown => Place::Unclear,
            Upper::Absent => {
                if self.in_image.len() >= MAX_NAMES {
                    self.in_image.clear();
                }
                let key = (watched.init, mapped.name.clone());
                let known = self
                    .in_image
                    .entry(key)
                    .or_insert_with(|| inspect::image_inode(watched, &path));
                match known {
                    Some((device, inode)) if is_mapped(*device, *inode) => Place::Image,
                    _ if is_below => Place::Elsewhere,
                    _ => Place::Unclear,
                }
            }
        }
    }

    /// Reports what a process of the container has loaded by now: before driftd recorded, or
    /// without a record.
    fn scan(&mut self, shared: &Files, watched: &Arc<Watched>, handle: &Handle) {
        let Ok(mappings) = handle.mapped_code() else { return };
        let pid = handle.identity().pid;
        let program = handle.exe_identity().ok();
        let mut seen = HashSet::new();
        for mapping in mappings {
            if program == Some((mapping.device, mapping.inode))
                || !seen.insert((mapping.device, mapping.inode))
            {
                continue;
            }
            let mapped = Mapped {
                pid,
                time: 0,
                address: mapping.start,
                length: mapping.end - mapping.start,
                device: mapping.device,
                inode: mapping.inode,
                is_shared: mapping.is_shared,
                name: mapping.name.into(),
            };
            let place = self.place(watched, &mapped);
            if matches!(place, Place::Image | Place::NoFile) {
                continue;
            }
            let Some(examined) = examine(shared, watched, &mapped, Some(handle), place) else {
                continue;
            };
            let process = Some(describe::as_it_is(handle, watched));
            let loading = Loading {
                watched: watched.clone(),
                mapped,
                at: Timestamp::now(),
                program: Program::default(),
                is_first: false,
            };
            let writer = examined.writer(shared, watched, WAIT_FOR_WRITER);
            report(shared, &loading, examined, process, writer, Source::Scan);
        }
    }
}

/// Where a mapped file lies.
#[derive(Debug)]
enum Place {
    Image,
    /// It is no library.
    NoFile,
    /// In the container's own layer, under its name.
    Upper(RootfsPath, std::os::fd::OwnedFd, crate::sys::file::Stat),
    /// The same, unless another file has taken its name since.
    PerhapsUpper(RootfsPath, std::os::fd::OwnedFd, crate::sys::file::Stat),
    /// On the container's overlay. Only the process's own view shows more.
    Unclear,
    /// Not on the container's overlay.
    Elsewhere,
}

/// A mapped file, and its metadata, which identifies it when its name is gone.
#[derive(Debug)]
struct Examined {
    code: Code,
    stat: Option<crate::sys::file::Stat>,
}

impl Examined {
    /// The writer of the file. Waits so long for the change feed, which knows it.
    fn writer(
        &self,
        shared: &Files,
        watched: &Watched,
        patience: Duration,
    ) -> Option<Arc<Process>> {
        let stat = self.stat_on_overlay()?;
        shared.writer_of_used(watched, &self.code.path, stat, patience)
    }

    /// The same, where the change feed has read enough.
    fn writer_read(&self, shared: &Files, watched: &Watched) -> Option<Arc<Process>> {
        shared.writer_read(watched, &self.code.path, self.stat_on_overlay()?)
    }

    fn stat_on_overlay(&self) -> Option<&crate::sys::file::Stat> {
        self.stat.as_ref().filter(|_| self.code.filesystem == Filesystem::Overlay)
    }
}

/// What a mapped file holds; `None` if it is the image's own after all.
fn examine(
    shared: &Files,
    watched: &Arc<Watched>,
    mapped: &Mapped,
    handle: Option<&Handle>,
    place: Place,
) -> Option<Examined> {
    let of_upper = |path, fd: &_, stat: crate::sys::file::Stat| {
        Some(Examined {
            code: inspect::of_upper(shared, watched, path, fd, &stat),
            stat: Some(stat),
        })
    };
    let of_descriptor = |handle, fd: &_| {
        let code = is_library(inspect::of_descriptor(shared, watched, handle, fd)?)?;
        Some(Examined { code, stat: crate::sys::file::stat(fd).ok() })
    };
    if let Place::Upper(path, fd, stat) = place {
        return of_upper(path, &fd, stat);
    }
    // Opens the file itself, as long as the process has it mapped.
    let end = mapped.address.saturating_add(mapped.length);
    if let Some(handle) = handle
        && let Ok(fd) = handle.open_mapped(mapped.address, end)
    {
        return of_descriptor(Some(handle), &fd);
    }
    if let Place::PerhapsUpper(path, fd, stat) = place {
        return of_upper(path, &fd, stat);
    }
    // The process is gone. Others may still see the file by its name.
    let name = mapped.name.strip_suffix(b" (deleted)").unwrap_or(&mapped.name);
    let init = Handle::open_exactly(watched.init).ok();
    for viewer in [handle, init.as_ref()].into_iter().flatten() {
        let Some(fd) = reach::open_in(watched, viewer, name) else { continue };
        let is_same = crate::sys::file::stat(&fd)
            .is_ok_and(|stat| (stat.device, stat.inode) == (mapped.device, mapped.inode));
        if is_same {
            return of_descriptor(Some(viewer), &fd);
        }
    }
    let filesystem = if mapped.device == watched.device {
        Filesystem::Overlay
    } else if inspect::memfd_name(mapped.device, &mapped.name).is_some() {
        Filesystem::Anonymous
    } else {
        match View::of([&init?]).ground_of_device(mapped.device) {
            Some(Ground::Memory) => Filesystem::Tmpfs,
            // It lies in a mount namespace that the process made, or it is a library that
            // the runtime loaded on its way in, from a filesystem of the host of which the
            // container has a part.
            Some(Ground::Disk | Ground::Kernel | Ground::Process | Ground::Foreign) | None => {
                return None;
            }
        }
    };
    let code = inspect::gone(RootfsPath::new(name).ok()?, filesystem);
    Some(Examined { code, stat: None })
}

/// Excludes what a program compiles into its own memory: that is no library.
fn is_library(code: Code) -> Option<Code> {
    let is_other = code.filesystem == Filesystem::Anonymous
        && matches!(code.state.content, Content::Hashed { .. })
        && code.state.format != Format::Elf;
    (!is_other).then_some(code)
}

fn report(
    shared: &Files,
    loading: &Loading,
    examined: Examined,
    process: Option<Process>,
    writer: Option<Arc<Process>>,
    source: Source,
) {
    let Loading { watched, mapped, at, program, is_first } = loading;
    let Code { path, filesystem, state, lower, file_of } = examined.code;
    let process = process.unwrap_or_else(|| Process {
        identity: ProcessIdentity { pid: mapped.pid, start_time: 0 },
        exe: program.file.as_deref().map(printable),
        argv: None,
        uid: None,
        tty: None,
        root: None,
        ancestors: Vec::new(),
    });
    let read_at = records::ticks_of(mapped.time).saturating_add(1);
    let process = shared.complete_if_ended(named::Named { pid: mapped.pid, read_at }, process);
    let by_linker = *is_first && program.is_linker();
    let fact = Fact::File(FileFact::Loaded {
        path,
        filesystem,
        state,
        lower,
        process: Arc::new(process),
        by_linker,
        is_shared: mapped.is_shared,
        writer,
        denied: false,
    });
    shared.observe_file_of(watched, file_of, *at, source, fact);
}

/// The inodes of the image's multi-call programs.
fn multicall(watched: &Watched) -> Vec<u64> {
    let paths = ["/bin/busybox", "/usr/bin/busybox", "/bin/toybox", "/usr/bin/toybox"];
    let inodes = paths.iter().filter_map(|path| {
        inspect::image_inode(watched, &RootfsPath::new(path).ok()?).map(|(_, inode)| inode)
    });
    inodes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::OverlayDirs;
    use crate::sys::overlay;
    use crate::watch::core::layers::Layers;
    use crate::watch::core::watched::some_container;

    #[test]
    fn a16_a_program_given_to_the_dynamic_linker_is_the_first_code_it_maps() {
        let mut programs = Programs::default();
        let linker = b"/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2".as_slice();
        let linker = programs.executed(7, 1, Some(linker)).clone();
        assert!(linker.is_linker());
        assert_eq!(programs.loads(7), (linker.clone(), true));
        assert_eq!(programs.loads(7), (linker, false));
        assert!(!programs.executed(7, 2, Some(b"/usr/bin/ls")).is_linker());
        assert!(programs.loads(7).1);
        assert_eq!(programs.loads(8), (Program::default(), false));
    }

    #[test]
    fn before_linux_6_18_a_library_is_known_by_the_file_below_the_overlay() {
        let scratch = tempfile::tempdir().unwrap();
        for file in ["lower/lib/own.so", "upper/tmp/l.so", "volume/l.so"] {
            let file = scratch.path().join(file);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(&file, file.as_os_str().as_encoded_bytes()).unwrap();
        }
        let watched = Arc::new(some_container(1));
        let dirs = OverlayDirs {
            lowerdirs: vec![scratch.path().join("lower")],
            upperdir: scratch.path().join("upper"),
        };
        let redirects = overlay::redirects_by_default();
        let mount =
            overlay::Mount { dirs, userxattr: false, redirects, workdir: None, is_exported: false };
        watched.set_layers(Layers::new(mount).unwrap());

        let mut libraries = Libraries::default();
        let mut place = |file: &str, name: &str| {
            let stat = crate::sys::file::stat_path(scratch.path().join(file)).unwrap();
            assert_ne!(stat.device, watched.device);
            let mapped = Mapped {
                pid: 7,
                time: 1,
                address: 0,
                length: 4096,
                device: stat.device,
                inode: stat.inode,
                is_shared: false,
                name: name.as_bytes().into(),
            };
            libraries.place(&watched, &mapped)
        };
        assert!(matches!(place("lower/lib/own.so", "/lib/own.so"), Place::Image));
        assert!(matches!(place("upper/tmp/l.so", "/tmp/l.so"), Place::Upper(..)));
        // A volume on the layers' filesystem may be mounted over them.
        for name in ["/tmp/l.so", "/lib/own.so", "/volume/l.so"] {
            assert!(matches!(place("volume/l.so", name), Place::Elsewhere), "{name}");
        }
    }

    #[test]
    fn the_number_of_remembered_processes_is_bounded() {
        let mut programs = Programs::default();
        for pid in 0..3 * u32::try_from(MAX_PROGRAMS).unwrap() {
            programs.executed(pid, 1, None);
            assert!(programs.running.len() <= MAX_PROGRAMS);
        }
    }
}
