//! The language of a replay: text into steps. Pure; it knows nothing of what a step does.
//!
//! One step on each line, its words separated as in a shell. What belongs to an image
//! stands indented below the line that names it.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::str::FromStr;

use jiff::{SignedDuration, Timestamp};

use crate::config::{self, Config};
use crate::health::Failure;
use crate::model::{Answer, Disposition, Entry, Filesystem, Format, Kind, RootfsPath, Severity};
use crate::policy::{self, Loaded, PolicyFile};
use crate::respond::Action;

/// A whole file, understood.
#[derive(Debug)]
pub struct Script {
    /// What the node is called in findings.
    pub(super) node: String,
    pub(super) begins_at: Timestamp,
    pub(super) settings: Config,
    pub(super) rules: Option<Loaded>,
    /// By name; layers from the bottom to the top, as `ImageBaseline::parse` reads them.
    pub(super) images: BTreeMap<String, Vec<String>>,
    pub(super) steps: Vec<Step>,
}

/// A line that cannot be understood, or that does not fit what came before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct WrongLine {
    /// From 1 on.
    pub line: usize,
    pub problem: String,
}

#[derive(Debug)]
pub(super) struct Step {
    pub(super) line: usize,
    pub(super) action: StepAction,
}

#[derive(Debug)]
pub(super) enum StepAction {
    Wait(SignedDuration),
    Connected,
    Disconnected,
    Start(StartStep),
    Stop {
        container: String,
    },
    Remove {
        container: String,
    },
    File(FileStep),
    Deleted {
        container: String,
        path: RootfsPath,
        by: Option<String>,
    },
    Session {
        container: String,
        pid: u32,
        entry: Entry,
        tty: Option<String>,
        requester: Option<String>,
        argv: Vec<String>,
    },
    Ran {
        container: String,
        session: u32,
        pid: u32,
        argv: Vec<String>,
    },
    Ended {
        container: String,
        session: u32,
        pid: u32,
        code: i32,
    },
    ReverseShell {
        container: String,
        pid: u32,
        exe: String,
    },
    Lost {
        failure: Failure,
        container: Option<String>,
    },
    Over {
        failure: Failure,
        container: Option<String>,
    },
    Respond {
        action: Action,
        container: String,
        /// The process that is to be killed.
        pid: Option<u32>,
    },
    Expect(Expectation),
}

/// A container starts.
#[derive(Debug)]
pub(super) struct StartStep {
    pub(super) container: String,
    pub(super) image: String,
    pub(super) pid: Option<u32>,
    pub(super) labels: BTreeMap<String, String>,
    /// Its pod: `NAMESPACE/NAME`.
    pub(super) pod: Option<(String, String)>,
    /// The name of its container runtime.
    pub(super) runtime: Option<String>,
}

/// What happens to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileAction {
    Executed,
    Loaded,
    Interpreted,
    Written,
}

#[derive(Debug)]
pub(super) struct FileStep {
    pub(super) container: String,
    pub(super) action: FileAction,
    pub(super) path: RootfsPath,
    /// A word that stands for what the file holds.
    pub(super) content: String,
    pub(super) format: Format,
    pub(super) mode: u32,
    pub(super) filesystem: Filesystem,
    pub(super) times: u64,
    /// The program of the writer, the loading process, the interpreter or the parent.
    pub(super) by: Option<String>,
    /// The program of the process that wrote the file which is used.
    pub(super) writer: Option<String>,
    /// The user and the command line of the process.
    pub(super) user: Option<u32>,
    pub(super) argv: Option<Vec<String>>,
    pub(super) pid: Option<u32>,
    /// The first process of the session to which the process belongs.
    pub(super) session: Option<u32>,
}

#[derive(Debug)]
pub(super) enum Expectation {
    /// No finding since the last expectation.
    Nothing,
    Finding(Pattern),
    NoFinding(Pattern),
    Response {
        action: &'static str,
        container: String,
        succeeded: bool,
    },
    /// Whether the view is complete.
    Complete(bool),
}

/// Which findings are meant: all that have what is given here.
#[derive(Debug)]
pub(super) struct Pattern {
    pub(super) kind: Kind,
    pub(super) container: Option<String>,
    pub(super) path: Option<RootfsPath>,
    pub(super) severity: Option<Severity>,
    pub(super) count: Option<u64>,
    /// Without it, accepted findings are not meant.
    pub(super) verdict: Option<Disposition>,
    pub(super) rule: Option<String>,
}

impl Script {
    /// Reads a whole file.
    pub fn parse(text: &str) -> Result<Script, WrongLine> {
        let mut script = Script {
            node: "node".into(),
            begins_at: Timestamp::UNIX_EPOCH,
            settings: Config::default(),
            rules: None,
            images: BTreeMap::new(),
            steps: Vec::new(),
        };
        let mut settings = String::new();
        // The image whose files stand on the next indented lines.
        let mut image: Option<String> = None;
        // The text of the policy file that stands on the next indented lines.
        let (mut rules, mut rule_lines) = (String::new(), Vec::new());
        let mut is_policy = false;
        for (number, line) in text.lines().enumerate() {
            let wrong = |problem: String| WrongLine { line: number + 1, problem };
            if line.trim().is_empty() || line.trim_start().starts_with('#') {
                continue;
            }
            if line.starts_with([' ', '\t']) && is_policy {
                rules += &format!("{}\n", line.trim_start());
                rule_lines.push(number + 1);
                continue;
            }
            if line.starts_with([' ', '\t']) {
                let layers = image.as_ref().and_then(|image| script.images.get_mut(image));
                let Some(layers) = layers else {
                    return Err(wrong(
                        "an indented line belongs below an `image` or `policy` line".into(),
                    ));
                };
                match (line.trim(), layers.last_mut()) {
                    ("layer", _) => layers.push(String::new()),
                    (entry, Some(layer)) => *layer += &format!("{entry}\n"),
                    (entry, None) => layers.push(format!("{entry}\n")),
                }
                continue;
            }
            image = None;
            is_policy = false;
            let words = shlex::split(line)
                .ok_or_else(|| wrong("a quotation mark has no partner".into()))?;
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            match words[..] {
                ["node", name] => script.node = name.into(),
                ["time", at] => {
                    script.begins_at = at.parse().map_err(|err| wrong(format!("{at}: {err}")))?;
                }
                ["set", ..] => {
                    let line = line.trim_start();
                    settings += line.strip_prefix("set").unwrap_or(line).trim_start();
                    settings.push('\n');
                    script.settings = Config::parse(&settings).map_err(wrong)?;
                }
                ["policy"] => is_policy = true,
                ["image", name] => {
                    script.images.insert(name.into(), Vec::new());
                    image = Some(name.into());
                }
                _ => {
                    let action = Words::new(&words).and_then(Words::action).map_err(wrong)?;
                    script.steps.push(Step { line: number + 1, action });
                }
            }
        }
        if !rules.is_empty() {
            let file = PolicyFile::new("policy", rules);
            let loaded = policy::parse(Path::new(""), vec![file]);
            let wrong = |refused: policy::Refused| {
                let fault = refused.0.into_iter().next();
                let at = fault.as_ref().and_then(|fault| fault.at).map_or(1, |(line, _)| line);
                let line = rule_lines.get(at - 1).copied().unwrap_or_default();
                WrongLine { line, problem: fault.map(|fault| fault.message).unwrap_or_default() }
            };
            script.rules = Some(loaded.map_err(wrong)?);
        }
        Ok(script)
    }
}

/// The words of one line: the first one, those in order, options (`name=value`), and what
/// stands behind `--`.
struct Words<'a> {
    verb: &'a str,
    placed: Vec<&'a str>,
    options: HashMap<&'a str, &'a str>,
    rest: Vec<String>,
}

impl<'a> Words<'a> {
    fn new(words: &[&'a str]) -> Result<Words<'a>, String> {
        let mut parts = words.splitn(2, |word| *word == "--");
        let line = parts.next().unwrap_or_default();
        let rest = parts.next().unwrap_or_default().iter().map(|&word| word.to_owned()).collect();
        let [verb, words @ ..] = line else { return Err("the line names no step".into()) };
        let (mut placed, mut options) = (Vec::new(), HashMap::new());
        for word in words {
            match word.split_once('=') {
                // A path may hold the sign.
                Some((name, value)) if !name.contains('/') || name.starts_with("label.") => {
                    if options.insert(name, value).is_some() {
                        return Err(format!("`{name}` stands there twice"));
                    }
                }
                _ => placed.push(*word),
            }
        }
        placed.reverse();
        Ok(Words { verb, placed, options, rest })
    }

    fn action(mut self) -> Result<StepAction, String> {
        let action = match self.verb {
            "wait" => StepAction::Wait(self.duration()?),
            "connected" => StepAction::Connected,
            "disconnected" => StepAction::Disconnected,
            "start" => StepAction::Start(StartStep {
                container: self.next("a container")?,
                image: self.next("an image")?,
                pid: self.option("pid")?,
                labels: self.labels(),
                pod: self.pod()?,
                runtime: self.option("runtime")?,
            }),
            "stop" => StepAction::Stop { container: self.next("a container")? },
            "remove" => StepAction::Remove { container: self.next("a container")? },
            "exec" => StepAction::File(self.file(FileAction::Executed)?),
            "load" => StepAction::File(self.file(FileAction::Loaded)?),
            "script" => StepAction::File(self.file(FileAction::Interpreted)?),
            "write" => StepAction::File(self.file(FileAction::Written)?),
            "delete" => StepAction::Deleted {
                container: self.next("a container")?,
                path: self.path()?,
                by: self.option("by")?,
            },
            "session" => StepAction::Session {
                container: self.next("a container")?,
                pid: self.number("a pid")?,
                entry: self.named("entry", Entry::ALL, Entry::name)?.unwrap_or(Entry::RuntimeExec),
                tty: self.option("tty")?,
                requester: self.option("requester")?,
                argv: std::mem::take(&mut self.rest),
            },
            "run" => StepAction::Ran {
                container: self.next("a container")?,
                session: self.number("the pid of the session's first process")?,
                pid: self.number("a pid")?,
                argv: std::mem::take(&mut self.rest),
            },
            "end" => StepAction::Ended {
                container: self.next("a container")?,
                session: self.number("the pid of the session's first process")?,
                pid: self.number("a pid")?,
                code: self.option("code")?.unwrap_or(0),
            },
            "reverse-shell" => StepAction::ReverseShell {
                container: self.next("a container")?,
                pid: self.number("a pid")?,
                exe: self.next("a program")?,
            },
            "lost" => StepAction::Lost {
                failure: self.failure()?,
                container: self.placed.pop().map(Into::into),
            },
            "over" => StepAction::Over {
                failure: self.failure()?,
                container: self.placed.pop().map(Into::into),
            },
            "respond" => {
                let action = self.response()?;
                let container = self.next("a container")?;
                let pid = self.options.remove("pid");
                let pid = pid.map(|pid| pid.parse().map_err(|_| format!("pid={pid} is no number")));
                let pid: Option<u32> = pid.transpose()?;
                if pid.is_some() != (action == Action::KillProcess) {
                    return Err("pid= goes with kill-process, and is needed there".to_owned());
                }
                StepAction::Respond { action, container, pid }
            }
            "expect" => StepAction::Expect(self.expectation()?),
            verb => return Err(format!("`{verb}` is no step (docs/replay.md lists them)")),
        };
        match (self.placed.last(), self.options.keys().next(), self.rest.first()) {
            (Some(word), _, _) => Err(format!("`{word}` is too much")),
            (_, Some(name), _) => Err(format!("`{}` has no option `{name}`", self.verb)),
            (_, _, Some(_)) => Err(format!("`{}` takes no arguments behind `--`", self.verb)),
            (None, None, None) => Ok(action),
        }
    }

    fn word(&mut self, what: &str) -> Result<&'a str, String> {
        self.placed.pop().ok_or_else(|| format!("{what} is missing"))
    }

    fn next(&mut self, what: &str) -> Result<String, String> {
        self.word(what).map(Into::into)
    }

    fn number<T: FromStr>(&mut self, what: &str) -> Result<T, String> {
        let word = self.word(what)?;
        word.parse().map_err(|_| format!("`{word}` is not {what}"))
    }

    fn path(&mut self) -> Result<RootfsPath, String> {
        path_of(self.word("a path")?)
    }

    fn duration(&mut self) -> Result<SignedDuration, String> {
        let word = self.word("a duration")?;
        let duration = config::parse_duration(word)?;
        duration.try_into().map_err(|_| format!("`{word}` is too long"))
    }

    fn option<T: FromStr>(&mut self, name: &str) -> Result<Option<T>, String> {
        let Some(value) = self.options.remove(name) else { return Ok(None) };
        value.parse().map(Some).map_err(|_| format!("{name}={value} cannot be read"))
    }

    /// An option whose value is the name of one of `all`.
    fn named<T: Copy>(
        &mut self,
        option: &str,
        all: &[T],
        name: impl Fn(T) -> &'static str,
    ) -> Result<Option<T>, String> {
        let Some(value) = self.options.remove(option) else { return Ok(None) };
        one_of(value, all, name).map(Some)
    }

    fn pod(&mut self) -> Result<Option<(String, String)>, String> {
        let Some(pod) = self.options.remove("pod") else { return Ok(None) };
        let (namespace, name) =
            pod.split_once('/').ok_or_else(|| format!("pod={pod} is not NAMESPACE/NAME"))?;
        Ok(Some((namespace.to_owned(), name.to_owned())))
    }

    fn labels(&mut self) -> BTreeMap<String, String> {
        let labels: Vec<&str> =
            self.options.keys().copied().filter(|name| name.starts_with("label.")).collect();
        let of = |name: &str| (name["label.".len()..].to_owned(), self.options[name].to_owned());
        let taken = labels.iter().map(|name| of(name)).collect();
        self.options.retain(|name, _| !labels.contains(name));
        taken
    }

    fn failure(&mut self) -> Result<Failure, String> {
        one_of(self.word("the name of a loss")?, &Failure::ALL, Failure::name)
    }

    /// The action of a response. Only rules deny, and run hooks.
    fn responded(&mut self) -> Result<&'static str, String> {
        let of_rules = [Answer::Deny, Answer::Hook].map(Answer::name);
        let last = self.placed.last();
        if let Some(action) = of_rules.into_iter().find(|action| last == Some(action)) {
            self.placed.pop();
            return Ok(action);
        }
        self.response().map(Action::name)
    }

    fn response(&mut self) -> Result<Action, String> {
        let all =
            [Action::Evidence, Action::KillProcess, Action::Kill, Action::Pause, Action::Resume];
        one_of(self.word("a response")?, &all, Action::name)
    }

    fn file(&mut self, action: FileAction) -> Result<FileStep, String> {
        let (container, path) = (self.next("a container")?, self.path()?);
        let (format, mode) = match action {
            FileAction::Executed | FileAction::Loaded => (Format::Elf, 0o755),
            FileAction::Interpreted => (Format::Script, 0o644),
            FileAction::Written => (Format::Data, 0o644),
        };
        let mode = match self.options.remove("mode") {
            Some(bits) => u32::from_str_radix(bits, 8)
                .map_err(|_| format!("mode={bits} is no octal number"))?,
            None => mode,
        };
        Ok(FileStep {
            container,
            action,
            path,
            content: self.next("a word for its content")?,
            format: self.named("format", &FORMATS, Format::name)?.unwrap_or(format),
            mode,
            filesystem: self
                .named("on", &FILESYSTEMS, Filesystem::name)?
                .unwrap_or(Filesystem::Overlay),
            times: self.option("times")?.unwrap_or(1),
            by: self.option("by")?,
            writer: self.option("writer")?,
            user: self.option("user")?,
            argv: Some(std::mem::take(&mut self.rest)).filter(|argv| !argv.is_empty()),
            pid: self.option("pid")?,
            session: self.option("session")?,
        })
    }

    fn expectation(&mut self) -> Result<Expectation, String> {
        Ok(match self.word("what is expected")? {
            "nothing" => Expectation::Nothing,
            "complete" => Expectation::Complete(true),
            "incomplete" => Expectation::Complete(false),
            "response" => Expectation::Response {
                action: self.responded()?,
                container: self.next("a container")?,
                succeeded: self.option("succeeded")?.unwrap_or(true),
            },
            "no" => Expectation::NoFinding(self.pattern()?),
            kind => {
                self.placed.push(kind);
                Expectation::Finding(self.pattern()?)
            }
        })
    }

    fn pattern(&mut self) -> Result<Pattern, String> {
        Ok(Pattern {
            kind: one_of(self.word("a kind of finding")?, Kind::ALL, Kind::name)?,
            container: self.placed.pop().map(Into::into),
            path: self.placed.pop().map(path_of).transpose()?,
            severity: self.named("severity", Severity::ALL, Severity::name)?,
            count: self.option("count")?,
            verdict: self.named("verdict", Disposition::ALL, Disposition::name)?,
            rule: self.option("rule")?,
        })
    }
}

const FORMATS: [Format; 4] = [Format::Elf, Format::ElfObject, Format::Script, Format::Data];
const FILESYSTEMS: [Filesystem; 5] = [
    Filesystem::Overlay,
    Filesystem::Tmpfs,
    Filesystem::Volume,
    Filesystem::Anonymous,
    Filesystem::Container,
];

fn path_of(word: &str) -> Result<RootfsPath, String> {
    RootfsPath::new(word).map_err(|err| format!("{word}: {err}"))
}

fn one_of<T: Copy>(word: &str, all: &[T], name: impl Fn(T) -> &'static str) -> Result<T, String> {
    all.iter().copied().find(|&one| name(one) == word).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|&one| name(one)).collect();
        format!("`{word}` is none of {}", names.join(", "))
    })
}
