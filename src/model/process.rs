//! Processes. A process is a pid *and* its start time; a pid alone is reused.

use serde::{Deserialize, Serialize};

use super::RootfsPath;
use super::path::bytes_of_printable;

/// Names one process for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// In the host's pid namespace.
    pub pid: u32,
    /// Clock ticks after boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

/// What was known of a process when it was looked at. Text is what [`super::printable`]
/// makes of it, and [`super::text`] in JSON; everything here is chosen by the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    #[serde(flatten)]
    pub identity: ProcessIdentity,
    /// The executable's path; `None` when the process was gone too soon.
    #[serde(flatten, with = "super::text::exe")]
    pub exe: Option<String>,
    /// `None` when the process was gone too soon.
    #[serde(flatten, with = "super::text::argv")]
    pub argv: Option<Vec<String>>,
    pub uid: Option<u32>,
    /// The controlling terminal, e.g. `pts/0`.
    pub tty: Option<String>,
    /// Its root directory in the container, where that is not the container's own
    /// (chroot).
    #[serde(flatten, with = "super::text::root")]
    pub root: Option<String>,
    /// Parents, nearest first, up to and including the first one outside the
    /// container.
    pub ancestors: Vec<Ancestor>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ancestor {
    #[serde(flatten)]
    pub identity: ProcessIdentity,
    #[serde(flatten, with = "super::text::exe")]
    pub exe: Option<String>,
    #[serde(flatten, with = "super::text::argv")]
    pub argv: Option<Vec<String>>,
}

/// Whether a process with this name may be a container runtime on its way into a
/// container. A hint for what to keep of it: any process can take the name.
pub fn may_be_runtime(comm: &[u8]) -> bool {
    // crun and youki keep their own name until they become the container's program.
    comm.starts_with(b"runc:[") || comm == b"crun" || comm.starts_with(b"youki")
}

impl Process {
    /// Its root directory, where that is not the container's own.
    pub fn own_root(&self) -> Option<RootfsPath> {
        let root = self.root.as_deref()?;
        RootfsPath::new(bytes_of_printable(root)).ok().filter(|root| !root.relative().is_empty())
    }

    /// Whether `identity` is this process or one of its ancestors.
    pub fn descends_from(&self, identity: ProcessIdentity) -> bool {
        self.identity == identity
            || self.ancestors.iter().any(|ancestor| ancestor.identity == identity)
    }
}

/// What a program that installs others is run as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackageManager<'a> {
    /// The executed file itself.
    Program,
    /// A script or a module that an interpreter of this name runs.
    Script(Option<&'a str>),
}

/// Whether a program that is run like this changes what is installed. By its name
/// alone: whether it is the image's is another question.
pub fn package_manager<'a>(exe: &str, argv: &'a [String]) -> Option<PackageManager<'a>> {
    let name = file_name(exe);
    let arguments = argv.get(1..).unwrap_or_default();
    if PROGRAMS.contains(&name) {
        return Some(PackageManager::Program);
    }
    if let Some((_, verbs)) = WITH_VERBS.iter().find(|(tool, _)| *tool == name) {
        return says(arguments, verbs).then_some(PackageManager::Program);
    }
    if !INTERPRETERS.contains(&without_version(name)) {
        return None;
    }
    // `python3 -m pip install`, `python3 /usr/bin/pip install`, `node .../npm-cli.js install`.
    let (tool, script, rest) = match (module(arguments), arguments) {
        (Some((module, rest)), _) => (module, None, rest),
        (None, all) => {
            let at = all.iter().position(|argument| !argument.starts_with('-'))?;
            (file_name(&all[at]), Some(all[at].as_str()), &all[at + 1..])
        }
    };
    let tool = tool.trim_end_matches(".js").trim_end_matches("-cli");
    let tool = without_version(tool);
    let is_one = SCRIPTS.contains(&tool)
        || SCRIPTS_WITH_VERBS.iter().any(|(known, verbs)| *known == tool && says(rest, verbs));
    is_one.then_some(PackageManager::Script(script))
}

/// The module that Python is asked to run, and its arguments: `-m pip`, `-Im ensurepip`,
/// `-W ignore -m pip`.
fn module(arguments: &[String]) -> Option<(&str, &[String])> {
    match arguments {
        [option, _value, rest @ ..] if option == "-W" || option == "-X" => module(rest),
        [flag, module, rest @ ..] if is_short(flag) && flag.ends_with('m') => Some((module, rest)),
        // Behind `-c` and code, all are arguments of that.
        [flag, rest @ ..] if flag.starts_with('-') && !(is_short(flag) && flag.contains('c')) => {
            module(rest)
        }
        _ => None,
    }
}

fn is_short(flag: &str) -> bool {
    flag.strip_prefix('-').is_some_and(|letters| !letters.starts_with('-'))
}

/// Programs that make programs.
pub fn is_linker(exe: &str) -> bool {
    const LINKERS: &[&str] = &[
        "collect2", "gold", "ld", "ld.bfd", "ld.gold", "ld.lld", "ld.mold", "lld", "mold",
        "rust-lld", "tcc",
    ];
    let name = exe.rsplit('/').next().unwrap_or_default();
    // x86_64-linux-gnu-ld.bfd
    let name = name.rsplit_once("-gnu-").map_or(name, |(_, name)| name);
    // Go's, and `go` itself, which copies what that has linked.
    LINKERS.contains(&name)
        || name == "link" && exe.contains("/pkg/tool/")
        || name == "go" && exe.ends_with("/bin/go")
}

/// Whether a program of this name can be one of them, with the right arguments.
pub fn may_be_package_manager(exe: &str) -> bool {
    let name = file_name(exe);
    PROGRAMS.contains(&name)
        || WITH_VERBS.iter().any(|(tool, _)| *tool == name)
        || INTERPRETERS.contains(&without_version(name))
}

/// `python3.11` is a `python`.
fn without_version(name: &str) -> &str {
    name.trim_end_matches(|last: char| last.is_ascii_digit() || last == '.')
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

/// Whether the first words that are no options hold one of `verbs`. An option may
/// have a value, so the first word need not be the verb.
fn says(arguments: &[String], verbs: &[&str]) -> bool {
    let words = arguments.iter().filter(|argument| !argument.starts_with('-')).take(2);
    words.into_iter().any(|word| verbs.contains(&word.as_str()))
}

const PROGRAMS: &[&str] = &[
    "apt",
    "apt-get",
    "aptitude",
    "apk",
    "dnf",
    "dnf5",
    "dpkg",
    "dpkg-deb",
    "emerge",
    "microdnf",
    "opkg",
    "pacman",
    "rpm",
    "tdnf",
    "xbps-install",
    "yum",
    "zypper",
];

/// Programs that do other things too, such as running an application.
const WITH_VERBS: &[(&str, &[&str])] = &[
    ("cargo", &["install", "uninstall"]),
    ("conda", &["create", "install", "remove", "update", "upgrade"]),
    ("go", &["install"]),
    ("mamba", &["create", "install", "remove", "update", "upgrade"]),
    ("micromamba", &["create", "install", "remove", "update", "upgrade"]),
    ("nix-env", &["install", "upgrade", "uninstall"]),
    ("uv", &["add", "pip", "remove", "sync", "tool", "venv"]),
];

const INTERPRETERS: &[&str] =
    &["node", "nodejs", "perl", "php", "platform-python", "python", "ruby"];

const SCRIPTS: &[&str] = &["dnf", "ensurepip", "virtualenv", "yum"];

const SCRIPTS_WITH_VERBS: &[(&str, &[&str])] = &[
    ("composer", &["install", "remove", "require", "update"]),
    ("conda", &["create", "install", "remove", "update", "upgrade"]),
    ("gem", &["install", "uninstall", "update"]),
    ("npm", &["add", "ci", "i", "in", "install", "remove", "uninstall", "update"]),
    ("pdm", &["add", "install", "remove", "sync", "update"]),
    ("pip", &["install", "uninstall"]),
    ("pipenv", &["install", "sync", "uninstall", "update"]),
    ("pipx", &["inject", "install", "reinstall", "uninstall", "upgrade"]),
    ("pnpm", &["add", "i", "install", "remove", "update"]),
    ("poetry", &["add", "install", "remove", "sync", "update"]),
    ("yarn", &["add", "global", "install", "remove", "upgrade"]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(exe: &str, command: &str, expected: Option<PackageManager<'_>>) {
        let argv: Vec<String> = command.split(' ').map(ToOwned::to_owned).collect();
        assert_eq!(package_manager(exe, &argv), expected, "{command}");
    }

    #[test]
    fn a_package_manager_is_known_by_its_name_and_an_interpreter_by_what_it_runs() {
        use PackageManager::{Program, Script};
        check("/usr/bin/dpkg", "dpkg -i x.deb", Some(Program));
        check("/sbin/apk", "apk add socat", Some(Program));
        check("/usr/bin/cargo", "cargo install x", Some(Program));
        check("/usr/bin/cargo", "cargo run", None);
        check("/usr/bin/python3.11", "python3 -m pip install x", Some(Script(None)));
        // w19: an environment is filled by them, and they bring `*.pth`.
        check("/usr/bin/python3.9", "/venv/bin/python -Im ensurepip --upgrade", Some(Script(None)));
        check("/usr/bin/python3", "python3 -u -W ignore -m pip install x", Some(Script(None)));
        check("/usr/bin/python3", "python3 -m http.server -m pip install", None);
        check("/usr/bin/python3", "python3 -c code -m pip install", None);
        check("/usr/bin/python3", "python3 server.py -m pip install", None);
        let poetry = Some(Script(Some("/opt/venv/bin/poetry")));
        check("/usr/bin/python3.11", "/opt/venv/bin/python /opt/venv/bin/poetry install", poetry);
        let pip = Some(Script(Some("/usr/bin/pip3")));
        check("/usr/bin/python3.11", "/usr/bin/python3 /usr/bin/pip3 install x", pip);
        check("/usr/bin/python3.11", "python3 /usr/bin/pip3 list", None);
        check("/usr/bin/python3.11", "python3 server.py", None);
        let npm = Some(Script(Some("/usr/lib/npm/bin/npm-cli.js")));
        check("/usr/bin/node", "node /usr/lib/npm/bin/npm-cli.js --silent install y", npm);
        check("/usr/bin/node", "node /usr/lib/npm/bin/npm-cli.js start", None);
        check("/bin/sh", "sh -c dpkg", None);
    }
}
