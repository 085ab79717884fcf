//! The conditions of a rule, and whether a finding meets them.
//!
//! Each condition reads the finding (and its session) alone, so that a stored finding is judged
//! as the one that was reported. What is not known meets no condition.

use std::collections::BTreeSet;

use globset::{GlobBuilder, GlobSet};
use jiff::SignedDuration;

use super::images::ImagePattern;
use super::text::{MatchText, ProgramText, SessionText};
use crate::model::{
    Blake3Hash, Entry, Finding, Kind, PathGlobs, Process, ProcessIdentity, RootfsPath, Session,
    Severity, Sha256Hash, bytes_of_printable, programs,
};

/// A finding, with what is known of the session in which it happened.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub finding: &'a Finding,
    /// The severity that its kind and its circumstances give it.
    pub severity: Severity,
    pub session: Option<&'a Session>,
    /// The acting process is not known well enough to say that it acted outside of sessions.
    pub may_be_of_session: bool,
    /// What ran may have had another content than the finding names.
    pub is_unproven: bool,
}

/// One condition. A list holds if any of its values does.
#[derive(Clone, Debug)]
pub(super) enum Condition {
    Kind(Vec<Kind>),
    Severity { least: Severity, most: Severity },
    Image(Vec<ImagePattern>),
    Path(PathGlobs),
    Content(Vec<Content>),
    Ancestor(Program),
    Writer(Program),
    SelfWritten,
    Filesystem(Vec<String>),
    Container(Texts),
    Namespace(Texts),
    PodNamespace(Texts),
    Pod(Texts),
    Label { key: String, value: Texts },
    Runtime(Texts),
    Session(SessionText),
    Entry(Vec<Entry>),
    Requester(Texts),
    Argv(Texts),
    User(Vec<u32>),
    Within(SignedDuration),
}

/// Patterns of text, compiled once.
#[derive(Clone, Debug)]
pub(super) struct Texts(GlobSet);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Content {
    Blake3(Blake3Hash),
    Sha256(Sha256Hash),
}

/// The label by which a container asks for profiles, separated by commas.
const PROFILE_LABEL: &str = "driftd.io/profile";

/// A program that a process runs.
#[derive(Clone, Debug)]
pub(super) struct Program {
    path: PathGlobs,
    from_image: bool,
}

/// Checks the conditions of a rule. Those that cost least come first.
// Long: one step for each key of a rule.
pub(super) fn conditions(text: MatchText, is_exception: bool) -> Result<Vec<Condition>, String> {
    let MatchText {
        everything,
        kind,
        severity,
        image,
        path,
        content,
        ancestor,
        writer,
        self_written,
        filesystem,
        container,
        namespace,
        pod_namespace,
        pod,
        label,
        runtime,
        session,
        entry,
        requester,
        argv,
        user,
        within,
    } = text;
    let mut all = Vec::new();
    let wide = [&path, &image, &container, &namespace, &pod_namespace, &pod, &argv, &runtime]
        .into_iter()
        .flatten()
        .find(|pattern| matches_everything(pattern));
    if let Some(pattern) = wide.filter(|_| !everything) {
        return Err(format!(
            "`{pattern}` matches everything: leave the key out, or set `everything = true`"
        ));
    }
    if !kind.is_empty() {
        let kinds = kind.iter().map(|name| Kind::named_by(name));
        let kinds: Vec<Vec<Kind>> =
            kinds.collect::<Result<_, _>>().map_err(|err| format!("`kind`: {err}"))?;
        all.push(Condition::Kind(kinds.concat()));
    }
    all.extend(severity.as_deref().map(severities).transpose()?);
    if !user.is_empty() {
        all.push(Condition::User(user));
    }
    if let Some(within) = within {
        let within: SignedDuration =
            within.parse().map_err(|_| format!("`within`: `{within}` is no duration like 60s"))?;
        all.push(Condition::Within(within));
    }
    if !filesystem.is_empty() {
        let unknown = filesystem.iter().find(|name| !FILESYSTEMS.contains(&name.as_str()));
        if let Some(unknown) = unknown {
            return Err(format!("`filesystem`: `{unknown}` is none of {}", FILESYSTEMS.join(", ")));
        }
        all.push(Condition::Filesystem(filesystem));
    }
    if !content.is_empty() {
        let content = content.iter().map(|text| hash(text)).collect::<Result<_, _>>()?;
        all.push(Condition::Content(content));
    }
    if !image.is_empty() {
        let image = image.iter().map(|text| ImagePattern::new(text)).collect::<Result<_, _>>()?;
        all.push(Condition::Image(image));
    }
    if !path.is_empty() {
        all.push(Condition::Path(paths("path", path)?));
    }
    let mut texts = |key, patterns: Vec<String>, of: fn(Texts) -> Condition| {
        if !patterns.is_empty() {
            all.push(of(Texts::new(key, &patterns)?));
        }
        Ok::<_, String>(())
    };
    texts("container", container, Condition::Container)?;
    texts("namespace", namespace, Condition::Namespace)?;
    texts("pod_namespace", pod_namespace, Condition::PodNamespace)?;
    texts("pod", pod, Condition::Pod)?;
    texts("runtime", runtime, Condition::Runtime)?;
    texts("requester", requester, Condition::Requester)?;
    texts("argv", argv, Condition::Argv)?;
    for (key, value) in label {
        let value = Texts::new("label", &[value])?;
        all.push(Condition::Label { key, value });
    }
    if !entry.is_empty() {
        let entries = entry.iter().map(|name| {
            let known = Entry::ALL.iter().copied().find(|entry| entry.name() == name);
            known.ok_or_else(|| {
                let names: Vec<&str> = Entry::ALL.iter().map(|entry| entry.name()).collect();
                format!("`entry`: `{name}` is none of {}", names.join(", "))
            })
        });
        all.push(Condition::Entry(entries.collect::<Result<_, _>>()?));
    }
    all.extend(
        ancestor.map(|text| Program::new("ancestor", text)).transpose()?.map(Condition::Ancestor),
    );
    all.extend(writer.map(|text| Program::new("writer", text)).transpose()?.map(Condition::Writer));
    all.extend(self_written.then_some(Condition::SelfWritten));
    if all.is_empty() && session.is_none() && !everything {
        return Err("`match` is empty: the rule would be for every finding. If it is, write \
                    `everything = true`"
            .to_owned());
    }
    match session {
        // What a person did is never accepted by accident.
        None if is_exception => all.push(Condition::Session(SessionText::None)),
        None | Some(SessionText::Any) => (),
        Some(session) => all.push(Condition::Session(session)),
    }
    Ok(all)
}

const FILESYSTEMS: [&str; 6] = ["overlay", "volume", "tmpfs", "anonymous", "container", "layer"];

fn matches_everything(pattern: &str) -> bool {
    !pattern.is_empty() && pattern.bytes().all(|byte| matches!(byte, b'*' | b'/' | b'?'))
}

/// `high`, `>=high` or `<=high`.
fn severities(text: &str) -> Result<Condition, String> {
    let (name, is_least, is_most) = match (text.strip_prefix(">="), text.strip_prefix("<=")) {
        (Some(name), _) => (name, true, false),
        (None, Some(name)) => (name, false, true),
        (None, None) => (text, true, true),
    };
    let severity: Severity = name.trim().parse().map_err(|err| format!("`severity`: {err}"))?;
    Ok(Condition::Severity {
        least: if is_least { severity } else { Severity::Info },
        most: if is_most { severity } else { Severity::Critical },
    })
}

fn hash(text: &str) -> Result<Content, String> {
    let wrong = || format!("`content`: `{text}` is neither `blake3:` nor `sha256:` and 64 digits");
    match text.split_once(':') {
        Some(("blake3", digits)) => digits.parse().map(Content::Blake3).map_err(|_| wrong()),
        Some(("sha256", digits)) => digits.parse().map(Content::Sha256).map_err(|_| wrong()),
        _ => Err(wrong()),
    }
}

fn paths(key: &str, patterns: Vec<String>) -> Result<PathGlobs, String> {
    PathGlobs::new(patterns).map_err(|err| format!("`{key}`: {err}"))
}

impl Texts {
    fn new(key: &str, patterns: &[String]) -> Result<Texts, String> {
        let mut set = GlobSet::builder();
        for pattern in patterns {
            let glob = GlobBuilder::new(pattern).build();
            set.add(
                glob.map_err(|err| format!("`{key}`: the pattern `{pattern}` is wrong: {err}"))?,
            );
        }
        set.build().map(Texts).map_err(|err| format!("`{key}`: the patterns are too much: {err}"))
    }

    fn matches(&self, text: Option<&str>) -> bool {
        text.is_some_and(|text| self.0.is_match(text))
    }
}

impl Program {
    fn new(key: &str, text: ProgramText) -> Result<Program, String> {
        Ok(Program { path: paths(key, vec![text.path])?, from_image: text.from_image })
    }

    /// Whether the process runs it. `unchanged` are the processes that run an unchanged program
    /// of the image.
    fn is_run_by(
        &self,
        exe: Option<&str>,
        process: ProcessIdentity,
        unchanged: Option<&[ProcessIdentity]>,
    ) -> bool {
        let path = exe.and_then(|exe| RootfsPath::new(bytes_of_printable(exe)).ok());
        path.is_some_and(|path| self.path.matches(&path))
            && (!self.from_image || unchanged.is_some_and(|known| known.contains(&process)))
    }
}

impl Condition {
    /// Whether it is about the content of the file.
    pub(super) fn is_of_content(&self) -> bool {
        matches!(self, Condition::Content(_))
    }

    /// Whether it is about the container alone.
    pub(super) fn is_of_container(&self) -> bool {
        matches!(
            self,
            Condition::Image(_)
                | Condition::Container(_)
                | Condition::Namespace(_)
                | Condition::PodNamespace(_)
                | Condition::Pod(_)
                | Condition::Label { .. }
                | Condition::Runtime(_)
        )
    }

    /// The key of the rule.
    pub(super) fn key(&self) -> &'static str {
        match self {
            Condition::Kind(_) => "kind",
            Condition::Severity { .. } => "severity",
            Condition::Image(_) => "image",
            Condition::Path(_) => "path",
            Condition::Content(_) => "content",
            Condition::Ancestor(_) => "ancestor",
            Condition::Writer(_) => "writer",
            Condition::SelfWritten => "self_written",
            Condition::Filesystem(_) => "filesystem",
            Condition::Container(_) => "container",
            Condition::Namespace(_) => "namespace",
            Condition::PodNamespace(_) => "pod_namespace",
            Condition::Pod(_) => "pod",
            Condition::Label { .. } => "label",
            Condition::Runtime(_) => "runtime",
            Condition::Session(_) => "session",
            Condition::Entry(_) => "entry",
            Condition::Requester(_) => "requester",
            Condition::Argv(_) => "argv",
            Condition::User(_) => "user",
            Condition::Within(_) => "within",
        }
    }

    /// The container has the label that asks for a profile.
    pub(super) fn asked_by_label(profile: &str) -> Condition {
        let patterns = [
            profile.to_owned(),
            format!("{profile},*"),
            format!("*,{profile}"),
            format!("*,{profile},*"),
        ];
        // Names of profiles have no characters of patterns.
        let value = Texts::new("profile", &patterns).unwrap_or(Texts(GlobSet::empty()));
        Condition::Label { key: PROFILE_LABEL.to_owned(), value }
    }

    pub(super) fn holds(&self, subject: &Subject<'_>) -> bool {
        let Subject { finding, severity, session, may_be_of_session, .. } = *subject;
        let (container, file) = (finding.container.as_ref(), finding.file.as_ref());
        let pod = container.and_then(|container| container.pod.as_ref());
        let process = finding.process.as_ref();
        let unchanged = finding.from_image.as_deref();
        match self {
            Condition::Kind(kinds) => kinds.contains(&finding.kind),
            Condition::Severity { least, most } => (*least..=*most).contains(&severity),
            Condition::Image(patterns) => {
                patterns.iter().any(|pattern| pattern.matches(&finding.image))
            }
            Condition::Path(paths) => file.is_some_and(|file| paths.matches(&file.path)),
            Condition::Content(contents) => file.is_some_and(|file| {
                let blake3 = file.blake3.map(Content::Blake3);
                let sha256 = file.sha256.map(Content::Sha256);
                blake3.into_iter().chain(sha256).any(|content| contents.contains(&content))
            }),
            Condition::Ancestor(program) => {
                process.into_iter().flat_map(|process| &process.ancestors).any(|ancestor| {
                    program.is_run_by(ancestor.exe.as_deref(), ancestor.identity, unchanged)
                })
            }
            Condition::Writer(program) => writer(finding).is_some_and(|writer| {
                program.is_run_by(writer.exe.as_deref(), writer.identity, unchanged)
            }),
            Condition::SelfWritten => is_self_written(finding),
            Condition::Filesystem(names) => {
                file.is_some_and(|file| names.contains(&file.filesystem))
            }
            Condition::Container(texts) => {
                texts.matches(container.map(|container| &*container.id.id))
            }
            Condition::Namespace(texts) => {
                texts.matches(container.map(|container| &*container.id.namespace))
            }
            Condition::PodNamespace(texts) => texts.matches(pod.map(|pod| &*pod.namespace)),
            Condition::Pod(texts) => texts.matches(pod.map(|pod| &*pod.name)),
            Condition::Label { key, value } => {
                value.matches(container.and_then(|own| own.labels.get(key)).map(String::as_str))
            }
            Condition::Runtime(texts) => texts.matches(finding.container_runtime.as_deref()),
            Condition::Session(SessionText::None) => {
                finding.session.is_none() && !may_be_of_session
            }
            Condition::Session(SessionText::Any) => true,
            Condition::Session(SessionText::Interactive) => {
                session.is_some_and(|session| session.interactive.is_some())
            }
            Condition::Entry(entries) => {
                session.is_some_and(|session| entries.contains(&session.entry))
            }
            Condition::Requester(texts) => {
                texts.matches(session.and_then(|session| session.requested_by.as_deref()))
            }
            Condition::Argv(texts) => {
                let argv = process.and_then(|process| process.argv.as_ref());
                argv.is_some_and(|argv| texts.matches(Some(&argv.join(" "))))
            }
            Condition::User(users) => {
                process.and_then(|process| process.uid).is_some_and(|uid| users.contains(&uid))
            }
            Condition::Within(within) => finding
                .after_start_milliseconds
                .is_some_and(|after| u128::from(after) <= within.unsigned_abs().as_millis()),
        }
    }

    /// What the finding has, for a person who asks why the condition does not hold.
    pub(super) fn actual(&self, subject: &Subject<'_>) -> String {
        let Subject { finding, severity, session, may_be_of_session, .. } = *subject;
        let (container, file) = (finding.container.as_ref(), finding.file.as_ref());
        let pod = container.and_then(|container| container.pod.as_ref());
        let process = finding.process.as_ref();
        let unknown = || "not known".to_owned();
        let text = |text: Option<&str>| text.map_or_else(unknown, ToOwned::to_owned);
        match self {
            Condition::Kind(_) => finding.kind.to_string(),
            Condition::Severity { .. } => severity.to_string(),
            Condition::Image(_) => text(finding.image.name.as_deref()),
            Condition::Path(_) => {
                file.map_or_else(|| "no file".to_owned(), |file| file.path.to_string())
            }
            Condition::Content(_) => file
                .and_then(|file| file.blake3)
                .map_or_else(unknown, |blake3| format!("blake3:{blake3}")),
            Condition::Ancestor(_) => {
                let ancestors = process.map_or(&[][..], |process| &process.ancestors);
                programs_in_words(
                    ancestors.iter().map(|one| (one.exe.as_deref(), one.identity)),
                    finding,
                )
            }
            Condition::Writer(_) | Condition::SelfWritten => programs_in_words(
                writer(finding).iter().map(|one| (one.exe.as_deref(), one.identity)),
                finding,
            ),
            Condition::Filesystem(_) => text(file.map(|file| &*file.filesystem)),
            Condition::Container(_) => text(container.map(|container| &*container.id.id)),
            Condition::Namespace(_) => text(container.map(|container| &*container.id.namespace)),
            Condition::PodNamespace(_) => text(pod.map(|pod| &*pod.namespace)),
            Condition::Pod(_) => text(pod.map(|pod| &*pod.name)),
            Condition::Label { key, .. } => {
                text(container.and_then(|own| own.labels.get(key)).map(String::as_str))
            }
            Condition::Runtime(_) => text(finding.container_runtime.as_deref()),
            Condition::Session(_) => match (finding.session, session) {
                (None, _) if may_be_of_session => {
                    "not known: it may have happened in a session".to_owned()
                }
                (None, _) => "no session".to_owned(),
                (Some(id), None) => format!("session {id}"),
                (Some(id), Some(session)) if session.interactive.is_some() => {
                    format!("interactive session {id}")
                }
                (Some(id), Some(_)) => format!("session {id}, not interactive"),
            },
            Condition::Entry(_) => text(session.map(|session| session.entry.name())),
            Condition::Requester(_) => {
                text(session.and_then(|session| session.requested_by.as_deref()))
            }
            Condition::Argv(_) => {
                let argv = process.and_then(|process| process.argv.as_ref());
                argv.map_or_else(unknown, |argv| argv.join(" "))
            }
            Condition::User(_) => {
                process.and_then(|process| process.uid).map_or_else(unknown, |uid| uid.to_string())
            }
            Condition::Within(_) => finding
                .after_start_milliseconds
                .map_or_else(unknown, |after| format!("{:.1} s", after as f64 / 1000.0)),
        }
    }
}

/// Whether the program that uses a file has written it itself: for a library, the program that
/// loads it; for a program, the one that executes it. It must be the image's own and unchanged.
/// What an interpreter does is decided by its script, which is not known.
fn is_self_written(finding: &Finding) -> bool {
    let unchanged = finding.from_image.as_deref().unwrap_or_default();
    let Some((writer, process)) = finding.writer.as_ref().zip(finding.process.as_ref()) else {
        return false;
    };
    let user = match finding.kind.is_exec() {
        true => process.ancestors.first().map(|parent| (parent.identity, parent.exe.as_deref())),
        false => Some((process.identity, process.exe.as_deref())),
    };
    let Some((user, Some(exe))) = user else { return false };
    let name = exe.rsplit('/').next().unwrap_or_default().as_bytes();
    let is_interpreter = programs::language(programs::without_version(name)).is_some()
        || programs::is_shell(name)
        || programs::is_launcher(name)
        || programs::is_multicall(name);
    writer.exe.as_deref() == Some(exe)
        && !is_interpreter
        && [writer.identity, user].iter().all(|one| unchanged.contains(one))
}

/// The process that wrote the file of a finding. In a finding about writing, that is the acting
/// process.
pub(super) fn writer(finding: &Finding) -> Option<&Process> {
    let is_written = !finding.kind.is_exec() && finding.kind != Kind::LibraryLoaded;
    finding.writer.as_ref().or_else(|| finding.process.as_ref().filter(|_| is_written))
}

fn programs_in_words<'a>(
    programs: impl Iterator<Item = (Option<&'a str>, ProcessIdentity)>,
    finding: &Finding,
) -> String {
    let names: BTreeSet<String> = programs
        .map(|(exe, identity)| {
            let is_unchanged =
                finding.from_image.as_ref().is_some_and(|known| known.contains(&identity));
            let name = exe.unwrap_or("not known");
            format!("{name}{}", if is_unchanged { " (from the image)" } else { "" })
        })
        .collect();
    match names.is_empty() {
        true => "not known".to_owned(),
        false => Vec::from_iter(names).join(", "),
    }
}
