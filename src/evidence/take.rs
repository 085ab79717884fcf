//! One take: everything of one container, in the order in which it is lost.
//!
//! Processes end, so the one that the finding names comes first, then its file; then what the
//! history knows, the other processes, and the other drifted files. A limit or the deadline ends a
//! take at any point. What was kept until then is a whole case, which says what is missing.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::Value;

use super::draft::{Cut, Draft, Lines};
use super::entry::{Entry, Why};
use super::files::Files;
use super::manifest::{Counts, Manifest};
use super::processes::{self, MOST, Networks};
use super::story::Story;
use super::{layer, redact};
use crate::history::Reader;
use crate::model::{
    Container, ContainerId, FindingId, Incarnation, Pod, ProcessIdentity, RootfsPath, printable,
};
use crate::respond::Task;
use crate::sys::procfs::{Handle, Whereabouts};

/// How many drifted files are read.
const MOST_FILES: usize = 20_000;

/// What a take has found. `draft` has what it has kept.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) counts: Counts,
    pub(super) cut: Vec<String>,
}

/// What is known of the container. A published JSON schema (docs/evidence.md).
#[derive(Serialize)]
struct ContainerJson<'a> {
    container: &'a ContainerId,
    runtime: &'a str,
    created_at: Option<Timestamp>,
    labels: &'a std::collections::BTreeMap<String, String>,
    pod: Option<&'a Pod>,
    image: Option<&'a str>,
    manifest_digest: Option<String>,
    layers: Vec<String>,
    snapshotter: &'a str,
    snapshot_key: &'a str,
    run: Option<Incarnation>,
    /// Null if it could not be read.
    specification: Option<Value>,
}

/// Takes evidence into a draft. `number` counts the takes of the case.
pub(super) fn take(
    draft: &mut Draft,
    task: &Task,
    reader: &Reader,
    number: u32,
    max_file: u64,
    earlier: Vec<Entry>,
) -> Outcome {
    let init = task.request.incarnation.and_then(processes::init_of);
    let own = init.as_ref().map(Handle::whereabouts);
    let directory = format!("takes/{number:04}");
    let list = match draft.lines(&format!("{directory}/files.jsonl")) {
        Ok(list) => list,
        Err(Cut(why)) => return Outcome { cut: vec![why], ..Outcome::default() },
    };
    let mut taking = Taking {
        task,
        reader,
        directory,
        list,
        files: Files::of(&task.order.container, init, max_file, earlier),
        networks: Networks::default(),
        outcome: Outcome::default(),
    };
    if task.request.incarnation.is_some() && own.is_none() {
        taking.cut("the run had ended before: no process was left");
    }
    if let Err(Cut(why)) = taking.all(draft, own.as_ref()) {
        taking.cut(&why);
    }
    let Taking { list, mut outcome, .. } = taking;
    if let Err(Cut(why)) = list.end(draft) {
        outcome.cut.push(why);
    }
    outcome
}

struct Taking<'a> {
    task: &'a Task,
    reader: &'a Reader,
    /// Where the texts of this take are.
    directory: String,
    files: Files,
    networks: Networks,
    list: Lines,
    outcome: Outcome,
}

impl Taking<'_> {
    fn cut(&mut self, why: &str) {
        let cut = &mut self.outcome.cut;
        if cut.len() < 16 && !cut.iter().any(|known| known == why) {
            cut.push(why.to_owned());
        }
    }

    fn name(&self, file: &str) -> String {
        format!("{}/{file}", self.directory)
    }

    fn all(&mut self, draft: &mut Draft, own: Option<&Whereabouts>) -> Result<(), Cut> {
        let order = &self.task.order;
        // Before anything else: it may end at any moment.
        if let (Some(own), Some(process)) = (own, order.process)
            && let Some(process) = processes::meant(own, process)
        {
            self.process(draft, process)?;
        }
        let mut taken = HashSet::new();
        if let Some(path) = order.path.clone() {
            taken.insert(path.clone());
            self.file(draft, path, self.task.request.finding)?;
        }
        self.container(draft)?;
        let processes = own.map(processes::all_of).unwrap_or_default();
        self.outcome.counts.processes_found = processes.len() as u64;
        let container = &self.task.request.container;
        let story = Story::read(self.reader, container, self.task.request.finding);
        story.missing.iter().for_each(|why| self.cut(why));
        self.outcome.counts.findings = story.findings();
        self.outcome.counts.sessions = story.sessions();
        let drifted = story.write(draft, self.reader, &self.directory)?;
        if story.is_short.get() {
            self.cut("findings stand for more files than are listed");
        }
        self.processes(draft, &processes, &story.processes())?;
        if let Some(upper) = self.files.upper() {
            let name = format!("{}/layer.jsonl", self.directory);
            let missing = layer::list(draft, upper, &name)?;
            missing.iter().for_each(|why| self.cut(why));
        } else {
            self.cut("the container's own layer is not known, or must not be asked");
        }
        self.drifted(draft, drifted, &taken)
    }

    fn processes(
        &mut self,
        draft: &mut Draft,
        all: &[ProcessIdentity],
        named: &HashSet<ProcessIdentity>,
    ) -> Result<(), Cut> {
        let (first, rest): (Vec<_>, Vec<&ProcessIdentity>) =
            all.iter().partition(|one| named.contains(one));
        for process in first.into_iter().chain(rest).take(MOST) {
            self.process(draft, *process)?;
        }
        if all.len() > MOST {
            self.cut(&format!("there are more than {MOST} processes"));
        }
        Ok(())
    }

    fn process(&mut self, draft: &mut Draft, process: ProcessIdentity) -> Result<(), Cut> {
        let environment = self.task.order.environment;
        let files = &mut self.files;
        let kept = processes::take(draft, process, files, &mut self.networks, environment)?;
        if let Some(kept) = kept {
            self.outcome.counts.processes_kept += 1;
            if let Some(program) = kept.program {
                self.note(draft, &program)?;
            }
        }
        Ok(())
    }

    fn drifted(
        &mut self,
        draft: &mut Draft,
        files: Vec<(RootfsPath, FindingId)>,
        taken: &HashSet<RootfsPath>,
    ) -> Result<(), Cut> {
        if files.len() > MOST_FILES {
            let more = files.len() - MOST_FILES;
            self.cut(&format!(
                "there are {more} drifted files more than are read ({MOST_FILES}); findings.jsonl \
                 and members.jsonl name them"
            ));
        }
        let files = files.into_iter().take(MOST_FILES).filter(|(path, _)| !taken.contains(path));
        for (path, finding) in files {
            self.file(draft, path, Some(finding))?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        draft: &mut Draft,
        path: RootfsPath,
        finding: Option<FindingId>,
    ) -> Result<(), Cut> {
        let mut entry = Entry { finding, ..Entry::new(path, Why::Finding) };
        let ended = self.files.take(draft, &mut entry);
        if let Err(Cut(why)) = &ended
            && entry.object.is_none()
        {
            entry.not_taken = Some(why.clone());
        }
        self.note(draft, &entry)?;
        ended
    }

    /// Adds a file to the list, as soon as it is kept.
    fn note(&mut self, draft: &mut Draft, entry: &Entry) -> Result<(), Cut> {
        let counts = &mut self.outcome.counts;
        counts.files_listed += 1;
        counts.files_kept += u64::from(entry.object.is_some());
        counts.files_cut += u64::from(entry.cut.is_some());
        counts.files_unstable += u64::from(entry.unstable);
        self.list.add_reserved(draft, entry)
    }

    fn container(&mut self, draft: &mut Draft) -> Result<(), Cut> {
        let Container { id, runtime, created_at, labels, pod, image, layers, snapshotter, .. } =
            &*self.task.order.container;
        let specification = match &self.task.specification {
            Err(why) => {
                self.cut(&format!("the container's specification is not known: {why}"));
                None
            }
            Ok(text) => match serde_json::from_slice(text) {
                Ok(mut document) => {
                    if !self.task.order.environment {
                        redact::specification(&mut document);
                    }
                    Some(document)
                }
                Err(err) => {
                    self.cut(&format!("the container's specification is no JSON: {err}"));
                    None
                }
            },
        };
        let json = ContainerJson {
            container: id,
            runtime,
            created_at: *created_at,
            labels,
            pod: pod.as_ref(),
            image: image.name.as_deref(),
            manifest_digest: image.manifest_digest.map(|digest| digest.to_string()),
            layers: layers.iter().map(|layer| layer.id.to_string()).collect(),
            snapshotter,
            snapshot_key: &self.task.order.container.snapshot_key,
            run: self.task.request.incarnation,
            specification,
        };
        draft.put_json(&self.name("container.json"), &json)?;
        match self.files.mountinfo() {
            Some(mounts) => draft.put(&self.name("mountinfo"), &mounts),
            None => Ok(()),
        }
    }
}

/// The longest list of files that is read again.
const MAX_LIST: u64 = 32 << 20;

/// What earlier takes of a case have kept.
pub(super) fn earlier(directory: &Path, manifest: &Manifest) -> Vec<Entry> {
    let lists = manifest.files.iter().filter(|file| file.name.ends_with("/files.jsonl"));
    let texts = lists.filter(|file| file.bytes <= MAX_LIST).filter_map(|file| {
        fs::read(directory.join(&file.name))
            .map_err(|err: io::Error| tracing::warn!("{}: {err}", printable(file.name.as_bytes())))
            .ok()
    });
    texts
        .flat_map(|text| {
            let lines = text.split(|&byte| byte == b'\n');
            lines.filter_map(|line| serde_json::from_slice(line).ok()).collect::<Vec<Entry>>()
        })
        .collect()
}
