//! All cases: a directory for each, by its ID, which only root may read.
//!
//! A case is written under a temporary name (`draft`) and gets its own name when it is whole. What
//! is added to a case replaces it as a whole. So after a crash each case is as it was before or
//! after. What was written of a case that was just begun is kept, and marked as cut.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::draft::{self, Draft, Finished, Limits};
use super::manifest::{Counts, Kept, MANIFEST, Manifest, SCHEMA, SUMS, Take};
use super::quota::Quota;
use super::reading::{MAX_MANIFEST, files_below, hash_file, read_manifest};
use super::sums;
use crate::config;
use crate::health::{Failure, Health};
use crate::model::{CaseId, ContainerId, FindingId, Incarnation, Kind, printable};
use crate::respond::{Frozen, Task};
use crate::sys::file::read_regular;

/// Beginnings of names that are no cases.
const DRAFT: &str = ".draft-";
const REPLACED: &str = ".old-";
const REMOVED: &str = ".removed-";
const FROZEN: &str = ".frozen-";
/// The file of a take that says who has asked for it. It is written first.
const REQUEST: &str = "request.json";
/// The longest request that is read.
const MAX_REQUEST: u64 = 1 << 20;
/// How often one case is added to at most, by rules and users together.
const MOST_TAKES: usize = 32;
/// How many digits of an ID name a case at least.
const FEWEST_DIGITS: usize = 4;

/// A case as it is listed.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    pub id: CaseId,
    /// Without the list of its files. The error is why it cannot be read.
    pub manifest: Result<Arc<Manifest>, String>,
    pub files: u64,
    pub processes: u64,
    pub bytes: u64,
}

/// How full the store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub cases: u64,
    pub bytes: u64,
    pub max_bytes: u64,
}

/// Why no case is meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    #[error("no case `{0}` is kept (see: driftd evidence ls)")]
    Unknown(String),
    #[error("`{0}` could be {1} cases: write more of the ID")]
    Ambiguous(String, usize),
}

/// Who has asked for a take, and of what. A published JSON schema (docs/evidence.md).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Request {
    case: CaseId,
    container: ContainerId,
    workload: String,
    run: Option<Incarnation>,
    finding: Option<FindingId>,
    kind: Option<Kind>,
    reason: String,
    requested_by: String,
    requested_at: Timestamp,
    by_rule: bool,
    environment: bool,
    frozen: bool,
}

#[derive(Debug)]
pub struct Store {
    directory: PathBuf,
    settings: config::Evidence,
    node: String,
    cases: Mutex<BTreeMap<CaseId, Case>>,
    /// Cases that are being added to.
    busy: Mutex<HashSet<CaseId>>,
}

/// A take that has begun.
pub(super) struct Begun {
    pub(super) draft: Draft,
    pub(super) number: u32,
    /// The case as it was before.
    pub(super) before: Option<Manifest>,
    pub(super) request: Request,
}

impl Store {
    /// Opens the store, and brings what a crash has left in order. Never fails: a store that
    /// cannot be used refuses what it is asked for.
    pub fn open(
        directory: PathBuf,
        settings: &config::Evidence,
        node: &str,
        health: &Health,
    ) -> Store {
        let store = Store {
            directory,
            settings: settings.clone(),
            node: node.to_owned(),
            cases: Mutex::default(),
            busy: Mutex::default(),
        };
        if let Err(err) = store.open_all() {
            let _ = health.record(Failure::EvidenceFailed);
            let detail = format!("no evidence can be kept in {}: {err}", store.directory.display());
            tracing::error!("{detail}");
            health.begin(Failure::EvidenceFailed, &detail);
        }
        store
    }

    fn open_all(&self) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)?;
        let names = || -> io::Result<Vec<String>> {
            let entries = fs::read_dir(&self.directory)?;
            Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
        };
        // What was replaced comes back before it is known whether a draft is all there is.
        for prefix in [REMOVED, REPLACED, DRAFT] {
            for name in names()?.iter().filter(|name| name.starts_with(prefix)) {
                if let Err(err) = self.recover(name, prefix) {
                    tracing::warn!("{name} in the store of evidence: {err}");
                }
            }
        }
        let mut cases = self.cases();
        for id in names()?.iter().filter_map(|name| name.parse().ok()) {
            cases.insert(id, self.read_case(id));
        }
        Ok(())
    }

    fn recover(&self, name: &str, prefix: &str) -> io::Result<()> {
        let path = self.directory.join(name);
        let id: CaseId = match name[prefix.len()..].parse() {
            Ok(id) => id,
            Err(_) => return Ok(()),
        };
        let own = self.path(id);
        let is_there = own.join(SUMS).exists();
        match prefix {
            REPLACED if !is_there => fs::rename(&path, &own),
            DRAFT if !is_there && !own.exists() => match rescue(&path, id, &self.node) {
                Ok(()) => fs::rename(&path, &own),
                Err(err) => {
                    tracing::warn!("case {id} had not begun when driftd ended: {err}");
                    fs::remove_dir_all(&path)
                }
            },
            _ => fs::remove_dir_all(&path),
        }
    }

    fn cases(&self) -> MutexGuard<'_, BTreeMap<CaseId, Case>> {
        self.cases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn busy(&self) -> MutexGuard<'_, HashSet<CaseId>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn settings(&self) -> &config::Evidence {
        &self.settings
    }

    pub fn path(&self, id: CaseId) -> PathBuf {
        self.directory.join(id.to_string())
    }

    fn read_case(&self, id: CaseId) -> Case {
        let directory = self.path(id);
        match read_manifest(&directory) {
            Ok(manifest) => case_of(manifest),
            Err(err) => Case {
                id,
                manifest: Err(err),
                files: 0,
                processes: 0,
                bytes: files_below(&directory).map_or(0, |files| files.values().sum()),
            },
        }
    }

    /// All cases, those that were added to last first.
    pub fn list(&self) -> Vec<Case> {
        let mut cases: Vec<Case> = self.cases().values().cloned().collect();
        cases.sort_by_key(|case| std::cmp::Reverse((case.taken_at(), case.id)));
        cases
    }

    pub fn usage(&self) -> Usage {
        let cases = self.cases();
        let bytes = cases.values().map(|case| case.bytes).sum();
        Usage { cases: cases.len() as u64, bytes, max_bytes: self.settings.max_bytes }
    }

    /// The case that a text names: its ID, or the first digits of it.
    pub fn find(&self, text: &str) -> Result<Case, FindError> {
        let cases = self.cases();
        let shown = || printable(text.as_bytes());
        let is_meant = |case: &&Case| case.id.to_string().starts_with(text);
        let named: Vec<&Case> = match text.len() >= FEWEST_DIGITS {
            true => cases.values().filter(is_meant).collect(),
            false => Vec::new(),
        };
        match named[..] {
            [] => Err(FindError::Unknown(shown())),
            [case] => Ok(case.clone()),
            ref several => Err(FindError::Ambiguous(shown(), several.len())),
        }
    }

    /// The text of a case's manifest, as it is kept.
    pub fn manifest_text(&self, id: CaseId) -> io::Result<String> {
        let text = read_regular(&self.path(id).join(MANIFEST), MAX_MANIFEST)?;
        String::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    /// Begins a take. The error is for people.
    pub(super) fn begin(&self, task: &Task, limits: &Limits) -> Result<Begun, String> {
        let id = task.order.case;
        let room = self.quota(id, &task.order.workload).room(task.order.by_rule)?;
        if !self.busy().insert(id) {
            return Err(format!("the case {id} is being added to already"));
        }
        let begun = self.begin_draft(task, &Limits { room, ..limits.clone() });
        if begun.is_err() {
            self.busy().remove(&id);
        }
        begun
    }

    fn begin_draft(&self, task: &Task, limits: &Limits) -> Result<Begun, String> {
        let id = task.order.case;
        let own = self.path(id);
        let before = match own.exists() {
            true => Some(read_manifest(&own)?),
            false => None,
        };
        let number = before.as_ref().map_or(0, |before| before.takes.len());
        if number >= MOST_TAKES {
            return Err(format!("the case {id} was added to {number} times, and is not any more"));
        }
        let failed =
            |err: io::Error| format!("{} (in {})", draft::failed(&err).0, self.directory.display());
        // It may have been away when driftd was started.
        let store = DirBuilder::new().recursive(true).mode(0o700).create(&self.directory);
        store.map_err(failed)?;
        let directory = self.directory.join(format!("{DRAFT}{id}"));
        match fs::remove_dir_all(&directory) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => return Err(failed(err)),
            _ => (),
        }
        let parts = before.as_ref().map(|before| (own.as_path(), before));
        let begun = Draft::begin(directory.clone(), limits.clone(), parts).map_err(failed);
        let number = u32::try_from(number + 1).unwrap_or(u32::MAX);
        let request = request_of(task);
        let begun = begun.and_then(|mut draft| {
            let name = format!("takes/{number:04}/{REQUEST}");
            draft.put_json(&name, &request).map_err(|cut| cut.0)?;
            Ok(draft)
        });
        match begun {
            Ok(draft) => Ok(Begun { draft, number, before, request }),
            Err(err) => {
                let _ = fs::remove_dir_all(directory);
                Err(err)
            }
        }
    }

    fn quota(&self, id: CaseId, workload: &str) -> Quota {
        let cases = self.cases();
        let is_of_workload = |case: &&Case| {
            case.manifest.as_ref().is_ok_and(|manifest| manifest.workload == workload)
        };
        Quota {
            of_all: self.settings.max_bytes,
            of_case: self.settings.max_case_bytes,
            used: cases.values().map(|case| case.bytes).sum(),
            by_workload: cases.values().filter(is_of_workload).map(|case| case.bytes).sum(),
            by_case: cases.get(&id).map_or(0, |case| case.bytes),
        }
    }

    /// Ends a take: writes what describes the case, and gives it its name.
    pub(super) fn end(
        &self,
        begun: Begun,
        counts: Counts,
        cut: Vec<String>,
    ) -> Result<Finished, String> {
        let Begun { draft, number, before, request } = begun;
        let (id, directory) = (request.case, draft.directory().to_owned());
        let take = take_of(&request, number, counts, cut);
        let mut takes = before.map(|before| before.takes).unwrap_or_default();
        takes.push(take);
        let describe = |files| manifest_of(&request, &self.node, takes, files);
        let named = draft.finish(describe).and_then(|finished| {
            self.name(id, &finished.directory)?;
            Ok(finished)
        });
        self.busy().remove(&id);
        match named {
            Ok(finished) => {
                let case = self.read_case(id);
                self.cases().insert(id, case);
                Ok(finished)
            }
            Err(err) => {
                let _ = fs::remove_dir_all(directory);
                Err(format!("what was taken could not be kept: {}", draft::failed(&err).0))
            }
        }
    }

    /// Gives a directory the name of its case, in the place of the case as it was.
    fn name(&self, id: CaseId, directory: &Path) -> io::Result<()> {
        let own = self.path(id);
        let replaced = self.directory.join(format!("{REPLACED}{id}"));
        let has_former = own.exists();
        if has_former {
            fs::rename(&own, &replaced)?;
        }
        if let Err(err) = fs::rename(directory, &own) {
            if has_former {
                fs::rename(&replaced, &own)?;
            }
            return Err(err);
        }
        self.sync()?;
        if has_former {
            fs::remove_dir_all(&replaced)?;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }

    /// Removes a case. Returns how many bytes it took.
    pub fn remove(&self, id: CaseId) -> io::Result<u64> {
        if self.busy().contains(&id) {
            return Err(io::Error::other("it is being added to (try again in a moment)"));
        }
        let Some(case) = self.cases().remove(&id) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        // Out of sight at once, so that a crash leaves no half of it.
        let removed = self.directory.join(format!("{REMOVED}{id}"));
        fs::rename(self.path(id), &removed)?;
        fs::remove_dir_all(removed)?;
        Ok(case.bytes)
    }

    /// Removes the cases that are older than they are kept.
    pub(super) fn expire(&self, now: Timestamp) {
        let retention = self.settings.retention;
        let Ok(retention) = SignedDuration::try_from(retention) else { return };
        if retention.is_zero() {
            return;
        }
        let is_old =
            |case: &Case| case.taken_at().is_some_and(|at| now.duration_since(at) > retention);
        for case in self.list().into_iter().filter(is_old) {
            match self.remove(case.id) {
                Ok(_) => tracing::info!(
                    "case {} was removed: it is older than evidence.retention",
                    case.id
                ),
                Err(err) => tracing::warn!("case {} cannot be removed: {err}", case.id),
            }
        }
    }

    fn frozen_path(&self, frozen: &Frozen) -> PathBuf {
        let Frozen { container, run } = frozen;
        let id = CaseId::new(container, Some(*run), None, None);
        self.directory.join(format!("{FROZEN}{id}"))
    }

    /// Remembers that a run is frozen for its evidence.
    pub(super) fn freezes(&self, frozen: &Frozen) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(self.frozen_path(frozen))?;
        file.write_all(&serde_json::to_vec(frozen)?)?;
        file.sync_all()?;
        self.sync()
    }

    pub(super) fn has_thawed(&self, frozen: &Frozen) {
        if let Err(err) = fs::remove_file(self.frozen_path(frozen)) {
            tracing::warn!("a note in the store of evidence cannot be removed: {err}");
        }
    }

    pub(super) fn left_frozen(&self) -> Vec<Frozen> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let notes = entries
            .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(FROZEN.as_bytes()));
        let read = |entry: fs::DirEntry| {
            serde_json::from_slice(&read_regular(&entry.path(), MAX_REQUEST).ok()?).ok()
        };
        notes.filter_map(read).collect()
    }
}

impl Case {
    /// When it was added to last.
    pub fn taken_at(&self) -> Option<Timestamp> {
        self.manifest.as_ref().ok()?.takes.last().map(|take| take.ended_at)
    }

    /// When it was begun.
    pub fn began_at(&self) -> Option<Timestamp> {
        self.manifest.as_ref().ok()?.takes.first().map(|take| take.requested_at)
    }
}

fn case_of(mut manifest: Manifest) -> Case {
    // What describes the case is not in its own list.
    let described: usize = manifest.files.iter().map(|file| 200 + 2 * file.name.len()).sum();
    let (files, processes) = (manifest.files.len() as u64, manifest.processes());
    let bytes = manifest.bytes() + described as u64 + (4 << 10);
    manifest.files = Vec::new();
    Case { id: manifest.case, manifest: Ok(Arc::new(manifest)), files, processes, bytes }
}

fn request_of(task: &Task) -> Request {
    let Task { request, order, is_frozen, .. } = task;
    Request {
        case: order.case,
        container: request.container.clone(),
        workload: order.workload.clone(),
        run: request.incarnation,
        finding: request.finding,
        kind: order.kind,
        reason: request.reason.clone(),
        requested_by: request.requested_by.clone(),
        requested_at: request.requested_at,
        by_rule: order.by_rule,
        environment: order.environment,
        frozen: *is_frozen,
    }
}

fn take_of(request: &Request, number: u32, counts: Counts, cut: Vec<String>) -> Take {
    Take {
        number,
        driftd: env!("CARGO_PKG_VERSION").to_owned(),
        reason: request.reason.clone(),
        requested_by: request.requested_by.clone(),
        requested_at: request.requested_at,
        ended_at: Timestamp::now(),
        by_rule: request.by_rule,
        environment: request.environment,
        frozen: request.frozen,
        counts,
        cut,
    }
}

fn manifest_of(request: &Request, node: &str, takes: Vec<Take>, files: Vec<Kept>) -> Manifest {
    Manifest {
        schema: SCHEMA.to_owned(),
        case: request.case,
        node: node.to_owned(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        container: request.container.clone(),
        workload: request.workload.clone(),
        run: request.run,
        finding: request.finding,
        kind: request.kind,
        takes,
        files,
    }
}

/// Makes a case of what was written when driftd ended: whole files, marked as cut.
fn rescue(directory: &Path, id: CaseId, node: &str) -> io::Result<()> {
    let path = directory.join(format!("takes/0001/{REQUEST}"));
    let request: Request = serde_json::from_slice(&read_regular(&path, MAX_REQUEST)?)?;
    if request.case != id {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let _ = fs::remove_file(directory.join("objects/part"));
    let mut files = Vec::new();
    for name in files_below(directory)?.into_keys() {
        let path = directory.join(&name);
        if !sums::is_name(&name) || [MANIFEST, SUMS].contains(&name.as_str()) {
            fs::remove_file(path)?;
            continue;
        }
        if name.ends_with(".jsonl") {
            cut_to_lines(&path)?;
        }
        let (sha256, bytes) = hash_file(&path)?;
        // The name of an object is its content.
        if name.strip_prefix("objects/").is_some_and(|object| object != sha256.hex()) {
            fs::remove_file(path)?;
            continue;
        }
        files.push(Kept { name, bytes, sha256 });
    }
    let of_objects = files.iter().filter(|file| file.name.starts_with("objects/")).count() as u64;
    let counts = Counts { files_kept: of_objects, ..Counts::default() };
    let cut = vec!["driftd ended while it was taken".to_owned()];
    let takes = vec![take_of(&request, 1, counts, cut)];
    draft::describe_case(directory, &manifest_of(&request, node, takes, files)).map(drop)
}

/// Takes off a line that was not written to its end.
fn cut_to_lines(path: &Path) -> io::Result<()> {
    let text = fs::read(path)?;
    let end = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    if end < text.len() {
        OpenOptions::new().write(true).open(path)?.set_len(end as u64)?;
    }
    Ok(())
}
