//! From an observation to a judgement: the fact is compared with the image, and what is wrong
//! becomes evidence for a finding.
//!
//! `detect` decides; this file chooses the baseline that it decides by, keeps observations
//! that cannot be judged yet, and hands session facts on to `sessions`.

use std::sync::Arc;

use jiff::Timestamp;

use super::commands::send_verdict;
use super::evidence::Evidence;
use super::messages::Effect;
use super::state::State;
use crate::baseline::ImageBaseline;
use crate::detect::{self, Assessment, Sensitive};
use crate::health::Failure;
use crate::inventory::{BaselineState, Entry};
use crate::model::{
    Answer, Blake3Hash, ContainerId, Fact, FileFact, FileTime, FileType, FindingId, Kind,
    Observation, Process, RootfsPath, Script, SessionFact, Severity, bytes_of_printable,
};
use crate::policy::Policy;
use crate::watch::Verdict;

/// Details of findings.
const IN_LAYER: &str =
    "it lies in a layer of the image on this node's disk, not in the container's own layer";
const BY_MOUNT: &str = "something was mounted there while the container ran";
const BY_LINKER: &str = "it was run as an argument of the dynamic linker";
const BY_PIPE: &str = "its text came through a pipe";
/// A library that a program of the image contains in packed form.
const EXTRACTED: &str = "the program of the image that loads it has written it itself, into a \
     temporary directory or one of its own, as programs do that bring libraries along packed";
const GENERATED: &str = "executable code in a file that is no library: programs generate such \
     code for themselves";

impl State {
    /// Turns one fact into findings.
    pub(super) fn judge(
        &mut self,
        observation: &Observation,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let is_of_former =
            self.inventory.get(container).is_some_and(|entry| entry.is_of_former(observation.init));
        // An observation of the container that had this ID before is judged by the image of
        // that container.
        let swap = |state: &mut State| {
            state.inventory.get_mut(container).into_iter().for_each(Entry::swap_with_former);
        };
        if is_of_former {
            swap(self);
        }
        self.judge_current(observation, now, effects);
        if is_of_former {
            swap(self);
        }
    }

    /// Judges by the baseline that the entry has.
    fn judge_current(
        &mut self,
        observation: &Observation,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        // An unknown container has gone, or was armed by the call of its runtime before the
        // event of containerd arrived.
        if self.inventory.get(&observation.container).is_none() {
            let lost = self.unannounced.keep(observation, now);
            self.not_judged(lost, "containerd has not reported the container", now, effects);
            return;
        }
        match &observation.fact {
            Fact::Session(fact) => self.session_fact(observation, fact, now, effects),
            Fact::PackageManager { process } => {
                if let Some(baseline) = self.baseline_for(observation, now, effects) {
                    let at = observation.at;
                    self.package_manager(&observation.container, process, &baseline, at);
                }
            }
            Fact::File(fact) => {
                if let Some(baseline) = self.baseline_for(observation, now, effects) {
                    self.file_fact(observation, fact, &baseline, now, effects);
                }
            }
        }
    }

    /// The baseline to judge by. Without one, the observation waits until it is ready.
    fn baseline_for(
        &mut self,
        observation: &Observation,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) -> Option<Arc<ImageBaseline>> {
        let entry = self.inventory.get_mut(&observation.container)?;
        match &entry.baseline.state {
            BaselineState::Ready(baseline) => Some(baseline.clone()),
            BaselineState::None(_) => None,
            BaselineState::Unknown | BaselineState::Pending(_) | BaselineState::Failed(..) => {
                let lost = entry.backlog.push(observation.clone());
                self.not_judged(lost, "its baseline is not ready", now, effects);
                None
            }
        }
    }

    fn file_fact(
        &mut self,
        observation: &Observation,
        fact: &FileFact,
        baseline: &ImageBaseline,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(entry) = self.inventory.get(&observation.container) else { return };
        let sensitive = sensitive(&self.policy, entry, observation);
        let assessment = detect::assess(baseline, sensitive, fact);
        let is_image = assessment.judgements.is_empty();
        let verdict = if is_image { Verdict::Image } else { Verdict::Drift };
        send_verdict(observation, verdict, effects);
        self.emit_file_fact(observation, fact, assessment, baseline, now, effects);
    }

    fn session_fact(
        &mut self,
        observation: &Observation,
        fact: &SessionFact,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        match fact {
            SessionFact::Opened { opening } => {
                self.session_opened(observation, opening, now, effects);
            }
            SessionFact::Ran { root, run } => self.session_ran(observation, *root, run, now),
            SessionFact::RanMore { root, times } => {
                self.session_ran_more(&observation.container, *root, *times, now);
            }
            SessionFact::Interactive { root, interactive, tty } => {
                let terminal = (*interactive, tty.as_deref());
                self.session_interactive(observation, *root, terminal, now, effects);
            }
            SessionFact::ProcessEnded { root, process, exit } => {
                let ended = (*process, *exit);
                self.session_process_ended(observation, *root, ended, now, effects);
            }
            SessionFact::ReverseShell { process, direct, evidence } => {
                self.reverse_shell(observation, process, *direct, evidence, now, effects);
            }
        }
    }

    fn reverse_shell(
        &mut self,
        observation: &Observation,
        process: &Process,
        direct: bool,
        evidence: &str,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        // The process may execute further programs: it stays one reverse shell.
        if self.is_reverse_shell(&observation.container, process.identity) {
            return;
        }
        let assessment = detect::reverse_shell(direct);
        let evidence =
            Evidence { process: Some(process), detail: Some(evidence), ..Evidence::default() };
        let subject = evidence.subject();
        let id = FindingId::new(Some(&observation.container), Kind::ShellReverse, &subject);
        self.reverse_shell_opened(observation, process, direct, id, now, effects);
        self.emit(observation, &assessment, &evidence, now, effects);
    }

    /// Collects the evidence of a fact about a file, and emits its judgements.
    fn emit_file_fact(
        &mut self,
        observation: &Observation,
        fact: &FileFact,
        assessment: Assessment,
        baseline: &ImageBaseline,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let container = &observation.container;
        let evidence = match fact {
            FileFact::Executed { .. } => executed(fact).unwrap_or_default(),
            FileFact::Loaded { .. } => {
                return self.emit_loaded(observation, fact, assessment, baseline, now, effects);
            }
            FileFact::Interpreted { script, .. } => {
                let run = interpreted(fact).unwrap_or_default();
                return self.emit_script(observation, &assessment, script, run, now, effects);
            }
            FileFact::Present { path, state, lower, writer, changed } => {
                self.mark_deleted(container, path, state.blake3(), false, effects);
                Evidence {
                    path: Some(path),
                    state: Some(state),
                    lower: lower.as_ref(),
                    process: writer.as_deref(),
                    changed: changed.and_then(FileTime::timestamp),
                    detail: (state.file_type == FileType::Directory).then_some(BY_MOUNT),
                    ..Evidence::default()
                }
            }
            FileFact::Absent { path, writer } => {
                self.mark_deleted(container, path, None, true, effects);
                self.mark_gone(observation, path, now);
                Evidence { path: Some(path), process: writer.as_deref(), ..Evidence::default() }
            }
        };
        self.emit(observation, &assessment, &evidence, now, effects);
    }

    fn emit_loaded(
        &mut self,
        observation: &Observation,
        fact: &FileFact,
        mut assessment: Assessment,
        baseline: &ImageBaseline,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let Some(evidence) = self.loaded(observation, fact, &mut assessment, baseline) else {
            return;
        };
        self.emit(observation, &assessment, &evidence, now, effects);
    }

    /// The evidence of a library that is loaded. The assessment of one that its program has
    /// unpacked itself is changed.
    pub(super) fn loaded<'a>(
        &self,
        observation: &Observation,
        fact: &'a FileFact,
        assessment: &mut Assessment,
        baseline: &ImageBaseline,
    ) -> Option<Evidence<'a>> {
        let FileFact::Loaded {
            path,
            filesystem,
            state,
            lower,
            process,
            by_linker,
            is_shared,
            writer,
            ..
        } = fact
        else {
            return None;
        };
        let is_extracted =
            self.is_extracted(observation, baseline, process, path, state.blake3(), writer);
        if is_extracted {
            for judgement in &mut assessment.judgements {
                judgement.severity = judgement.severity.min(Severity::Info);
            }
        }
        let is_generated = detect::is_generated(baseline, path, *filesystem, state, *is_shared);
        let detail = match (is_extracted, by_linker) {
            _ if is_generated => Some(GENERATED),
            (true, _) => Some(EXTRACTED),
            (false, true) => Some(BY_LINKER),
            (false, false) => None,
        };
        Some(Evidence {
            path: Some(path),
            filesystem: *filesystem,
            state: Some(state),
            lower: lower.as_ref(),
            process: Some(process),
            writer: writer.as_deref(),
            detail,
            ..Evidence::default()
        })
    }

    /// Whether a program of the image has written the library that it loads. Not in a
    /// session, and not if the program itself is drift.
    fn is_extracted(
        &self,
        observation: &Observation,
        baseline: &ImageBaseline,
        process: &Process,
        path: &RootfsPath,
        content: Option<Blake3Hash>,
        writer: &Option<Arc<Process>>,
    ) -> bool {
        let container = &observation.container;
        let Some(entry) = self.inventory.get(container) else { return false };
        let added = entry.findings.about_content(path, content);
        let mut added = added.filter(|finding| finding.kind == Kind::FileAdded);
        let writer =
            writer.as_deref().or_else(|| added.find_map(|finding| finding.process.as_ref()));
        writer.is_some_and(|writer| detect::is_extracted_by_itself(baseline, path, process, writer))
            && self.sessions.of(container, observation.session, Some(process)).is_none()
            && !runs_drift(entry, process)
    }

    fn emit_script(
        &mut self,
        observation: &Observation,
        assessment: &Assessment,
        script: &Script,
        run: Evidence<'_>,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        let detail;
        let evidence = match script {
            Script::File { path, state, .. } => {
                let is_denied = observation.is_denied();
                if !is_denied && self.is_reported_as_script(observation, path, state.blake3()) {
                    return;
                }
                run
            }
            Script::Pipe { from } => {
                if self.is_piped_by_unpacked(observation, &run) {
                    return;
                }
                detail = match from {
                    Some(from) => format!("{BY_PIPE} from {from}"),
                    None => BY_PIPE.to_owned(),
                };
                Evidence { detail: Some(&detail), ..run }
            }
        };
        self.emit(observation, assessment, &evidence, now, effects);
    }

    /// Whether the text comes from a script that was unpacked here, and whose finding reports
    /// what the script runs. What a person types does not.
    fn is_piped_by_unpacked(&self, observation: &Observation, run: &Evidence<'_>) -> bool {
        let container = &observation.container;
        let Some(entry) = self.inventory.get(container) else { return false };
        run.process.is_some_and(|process| {
            process.tty.is_none()
                && !self.sessions.is_interactive(container, observation.session, process)
                && entry.writers.unpacking_above(process).is_some()
        })
    }

    /// Whether a finding reports that this content was executed as a script. That finding
    /// covers its interpreter, unless the execution was denied: then this is another run.
    fn is_reported_as_script(
        &self,
        observation: &Observation,
        path: &RootfsPath,
        content: Option<Blake3Hash>,
    ) -> bool {
        let Some(entry) = self.inventory.get(&observation.container) else { return false };
        let mut about = entry.findings.about_content(path, content);
        content.is_some()
            && observation.file_of.is_none()
            && about.any(|finding| {
                let outcome = finding.outcome.as_ref().map(|outcome| outcome.action.as_str());
                finding.kind == Kind::ExecScript && outcome != Some(Answer::Deny.name())
            })
    }

    /// Observations that waited have no room.
    fn not_judged(
        &mut self,
        lost: Vec<Observation>,
        awaited: &str,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        for observation in lost {
            send_verdict(&observation, Verdict::Lost, effects);
            let _ = self.health.record(Failure::BaselineBacklogFull);
            let detail = format!("{awaited}, and more observations wait than may wait");
            let container = Some(observation.container);
            self.lost(Failure::BaselineBacklogFull, container, detail, now, effects);
        }
    }

    /// Judges what was observed of a container before containerd announced it.
    pub(super) fn announced(
        &mut self,
        container: &ContainerId,
        now: Timestamp,
        effects: &mut Vec<Effect>,
    ) {
        for observation in self.unannounced.take(container) {
            self.judge(&observation, now, effects);
        }
    }
}

/// The evidence of a script that an interpreter was given, and of its file if it has one.
pub(super) fn interpreted(fact: &FileFact) -> Option<Evidence<'_>> {
    let FileFact::Interpreted { script, process, writer, .. } = fact else { return None };
    let (process, writer) = (Some(&**process), writer.as_deref());
    let run = Evidence { process, writer, ..Evidence::default() };
    Some(match script {
        Script::File { path, filesystem, state, lower } => Evidence {
            path: Some(path),
            filesystem: *filesystem,
            state: Some(state),
            lower: lower.as_ref(),
            ..run
        },
        Script::Pipe { .. } => run,
    })
}

/// The evidence of an execution.
pub(super) fn executed(fact: &FileFact) -> Option<Evidence<'_>> {
    let FileFact::Executed {
        path,
        filesystem,
        state,
        lower,
        process,
        invoked_as,
        layer_file,
        writer,
        ..
    } = fact
    else {
        return None;
    };
    Some(Evidence {
        path: Some(path),
        filesystem: *filesystem,
        state: Some(state),
        lower: lower.as_ref(),
        process: Some(process),
        writer: writer.as_deref(),
        invoked_as: invoked_as.as_deref(),
        detail: layer_file.is_some().then_some(IN_LAYER),
        ..Evidence::default()
    })
}

/// What matters of an observation although its content may be the image's.
pub(super) fn sensitive<'a>(
    policy: &'a Policy,
    entry: &'a Entry,
    observation: &'a Observation,
) -> Sensitive<'a> {
    Sensitive {
        persistence: &policy.persistence,
        entry_point: &entry.baseline.entry_point,
        reached_as: observation.reached_as.as_ref(),
    }
}

/// Whether a process runs a program that was reported as drift itself.
fn runs_drift(entry: &Entry, process: &Process) -> bool {
    let exe = process.exe.as_deref().map(bytes_of_printable);
    let exe = exe.and_then(|exe| RootfsPath::new(exe).ok());
    exe.is_none_or(|exe| entry.findings.about(&exe).any(|finding| finding.kind.is_exec()))
}
