//! The settings: what an administrator may write in `/etc/driftd/driftd.toml`.
//!
//! Owns the defaults and the checks of single settings. Reads the file and nothing else:
//! each room applies its own settings.

mod hooks;
mod policy;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::hooks::Hook;
pub use self::policy::{ContainerMode, Enforce, OnDoubt, PolicyFiles};
use crate::model::{Filesystem, Kind, PathGlobs};

/// The settings. Every field has a default that works on a stock containerd
/// node, so an empty file is a good file. An unknown field is an error, so that a
/// misspelt safety setting is not ignored in silence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where baselines and the history are kept.
    pub state_dir: PathBuf,
    /// The Unix socket on which driftd serves its API.
    pub socket: PathBuf,
    pub containerd: Containerd,
    pub baseline: Baseline,
    pub watch: Watch,
    pub history: History,
    pub respond: Respond,
    pub policy: PolicyFiles,
    pub evidence: Evidence,
    /// Programs that rules may run, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub hooks: BTreeMap<String, Hook>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Containerd {
    /// Sockets on which containerd serves its gRPC API. driftd waits for those that do not
    /// exist yet.
    pub sockets: Vec<PathBuf>,
    /// containerd namespaces that are not watched.
    pub exclude_namespaces: BTreeSet<String>,
    /// Docker's socket: a container of Docker's that is to stay stopped gets the restart policy
    /// `no` before it is killed.
    pub docker_socket: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Baseline {
    /// Threads that hash layers; 0 means one per processor.
    pub threads: usize,
    /// Whether the blobs of recorded layers are read in the background, to prove
    /// that a layer's directory has the content that the image's digests stand for.
    pub verify: bool,
    /// The time within which every layer directory that a container uses is compared
    /// with its baseline again; 0s: never.
    #[serde(with = "duration")]
    pub recheck_period: Duration,
    /// How many bytes a second that comparison may read.
    #[serde(with = "bytes")]
    pub recheck_rate: u64,
    /// Archives that unpack to more bytes than this are refused, as decompression bombs.
    #[serde(with = "bytes")]
    pub max_layer_bytes: u64,
    /// Archives with more entries than this are refused, because the list of the entries is
    /// in memory while an archive is read.
    pub max_layer_entries: u64,
    /// How long a baseline is kept after the last image and the last container
    /// that needed it.
    #[serde(with = "duration")]
    pub retention: Duration,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Watch {
    /// How long a written file must be left alone before it is judged. A file
    /// that is executed is judged at once.
    #[serde(with = "duration")]
    pub settle: Duration,
    /// How often a container's upperdir is scanned. It is scanned less often if
    /// the scans of all containers together would take more than 2 % of a processor.
    #[serde(with = "duration")]
    pub sweep_interval: Duration,
    /// Files larger than this are reported without a hash.
    #[serde(with = "bytes")]
    pub max_hash_bytes: u64,
    /// Paths of files that other programs run or obey later, whatever their content: a
    /// new or changed one is `file.persistence`. The container's own entry point
    /// need not be named.
    pub persistence: PathGlobs,
    pub gate: Gate,
    /// Whether the number of changes that wait in the kernel is limited
    /// (`fs.fanotify.max_queued_events`). Changes that are dropped then are counted, and found
    /// by a scan. Executions are never dropped.
    pub bounded_queue: bool,
    /// Whether programs on other filesystems than the container's root are watched:
    /// tmpfs, volumes, directories of the host.
    pub volumes: bool,
    /// How long driftd waits before it reports a command that a runtime executes without a
    /// terminal. If the command repeats at a regular interval, it is a probe. It is
    /// reported at once if it does what the image does not, or if a response to it is
    /// set. 0: nothing is learned, and everything is reported at once.
    #[serde(with = "duration")]
    pub probe_patience: Duration,
    /// Environment variables in which an admission webhook passes the user that requested
    /// a session.
    pub requester_variables: Vec<String>,
    /// How a container is marked before its entry point runs.
    pub arm: Arm,
    /// The programs of the container runtimes, for `arm = "strict"`. driftd waits for those
    /// that do not exist yet.
    pub runtimes: Vec<PathBuf>,
}

/// How the kernel notifies driftd of programs that are about to run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Gate {
    /// The kernel asks before every execution.
    #[default]
    Ask,
    /// The kernel asks about a file until driftd has found it to be the image's, and again
    /// when the file is about to be changed. Like `Ask` on kernels that fail the self-test.
    Free,
    /// The kernel never waits: it reports executions afterwards. A short-lived process may
    /// have ended by then, and is not identified.
    Notify,
}

impl Gate {
    pub fn name(self) -> &'static str {
        match self {
            Gate::Ask => "ask",
            Gate::Free => "free",
            Gate::Notify => "notify",
        }
    }
}

impl Watch {
    /// Whether code on such a filesystem is watched.
    pub fn looks_at(&self, filesystem: Filesystem) -> bool {
        match filesystem {
            Filesystem::Overlay | Filesystem::Anonymous | Filesystem::Container => true,
            Filesystem::Tmpfs | Filesystem::Volume => self.volumes,
        }
    }
}

/// The usual paths of runtimes.
const RUNTIMES: [&str; 11] = [
    "/usr/bin/runc",
    "/usr/sbin/runc",
    "/usr/local/bin/runc",
    "/usr/local/sbin/runc",
    "/var/lib/rancher/k3s/data/current/bin/runc",
    "/var/lib/rancher/rke2/bin/runc",
    "/snap/microk8s/current/bin/runc",
    "/usr/bin/crun",
    "/usr/local/bin/crun",
    "/usr/bin/youki",
    "/usr/local/bin/youki",
];

/// How containers are armed before they start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arm {
    /// containerd's event comes early enough, nearly always.
    Events,
    /// The runtime is held until the marks are in place, for half a second at most.
    Strict,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct History {
    /// How long findings are kept after they were last seen.
    #[serde(with = "duration")]
    pub retention: Duration,
    /// How many bytes the history may take. When it is full, the container that takes the
    /// most loses its least severe and oldest findings first; responses stay.
    #[serde(with = "bytes")]
    pub max_bytes: u64,
}

/// The least size of the history, in bytes. In a smaller one, the records of one minute would
/// be dropped in the next.
const MIN_HISTORY: u64 = 1 << 20;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Respond {
    /// Kinds of finding for which driftd kills the container by itself. Empty:
    /// driftd only reports.
    pub kill_on: BTreeSet<Kind>,
    /// containerd's restart monitor, and Docker, leave stopped what a rule kills.
    pub stop_restarts: bool,
    /// In how many containers (or pods) one rule may answer within `within`. Then its answers
    /// are stopped, until a user resumes them.
    pub max_containers_of_rule: u32,
    /// How often one container (or pod), the containers of one image, and all together may be
    /// killed or paused by rules within `within`.
    pub max_of_container: u32,
    pub max_of_image: u32,
    pub max_of_node: u32,
    /// The time to which these limits apply.
    #[serde(with = "duration")]
    pub within: Duration,
}

impl Default for Respond {
    fn default() -> Respond {
        Respond {
            kill_on: BTreeSet::new(),
            stop_restarts: false,
            max_containers_of_rule: 3,
            max_of_container: 3,
            max_of_image: 6,
            max_of_node: 12,
            within: Duration::from_secs(600),
        }
    }
}

/// What is kept of a container before an answer destroys it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Evidence {
    /// The directory of the cases. Empty: `evidence` in the state directory.
    pub directory: PathBuf,
    /// How many bytes of one file are kept.
    #[serde(with = "bytes")]
    pub max_file_bytes: u64,
    /// How many bytes one case may take.
    #[serde(with = "bytes")]
    pub max_case_bytes: u64,
    /// How many bytes all cases may take. When this is reached, nothing more is taken: no case
    /// makes room for another one.
    #[serde(with = "bytes")]
    pub max_bytes: u64,
    /// How long a case is kept after it was added to last; 0s: until it is removed.
    #[serde(with = "duration")]
    pub retention: Duration,
    /// How long an answer waits for evidence that comes before it.
    #[serde(with = "duration")]
    pub deadline: Duration,
    /// Whether a container is frozen while its evidence is taken.
    pub pause: bool,
}

impl Default for Evidence {
    fn default() -> Evidence {
        Evidence {
            directory: PathBuf::new(),
            max_file_bytes: 64 << 20,
            max_case_bytes: 512 << 20,
            max_bytes: 4 << 30,
            retention: Duration::from_secs(30 * 24 * 60 * 60),
            deadline: Duration::from_secs(10),
            pause: false,
        }
    }
}

/// The least that one case may take: the texts about one process and one file.
const MIN_CASE: u64 = 1 << 20;

impl Evidence {
    fn check(&self) -> Result<(), String> {
        if !self.directory.as_os_str().is_empty() && !self.directory.is_absolute() {
            return Err(format!(
                "evidence.directory = {:?} is not an absolute path",
                self.directory
            ));
        }
        if self.max_case_bytes < MIN_CASE {
            return Err(format!("evidence.max_case_bytes is below {MIN_CASE}"));
        }
        if self.max_bytes < self.max_case_bytes {
            return Err(
                "evidence.max_bytes is below evidence.max_case_bytes: no case would fit".into()
            );
        }
        if self.deadline < Duration::from_secs(1) {
            return Err("evidence.deadline is below 1s".into());
        }
        Ok(())
    }
}

impl Default for Config {
    fn default() -> Config {
        Config {
            state_dir: "/var/lib/driftd".into(),
            socket: DEFAULT_SOCKET.into(),
            containerd: Containerd::default(),
            baseline: Baseline::default(),
            watch: Watch::default(),
            history: History {
                retention: Duration::from_secs(30 * 24 * 60 * 60),
                max_bytes: 1 << 30,
            },
            respond: Respond::default(),
            policy: PolicyFiles { hooks: Some(BTreeSet::new()), ..PolicyFiles::default() },
            evidence: Evidence::default(),
            hooks: BTreeMap::new(),
        }
    }
}

impl Default for Containerd {
    fn default() -> Containerd {
        Containerd {
            sockets: vec!["/run/containerd/containerd.sock".into()],
            exclude_namespaces: BTreeSet::new(),
            docker_socket: "/run/docker.sock".into(),
        }
    }
}

impl Default for Baseline {
    fn default() -> Baseline {
        Baseline {
            threads: 0,
            verify: true,
            recheck_period: Duration::ZERO,
            recheck_rate: 20 << 20,
            max_layer_bytes: 64 << 30,
            max_layer_entries: 2_000_000,
            retention: Duration::from_secs(24 * 60 * 60),
        }
    }
}

impl Default for History {
    fn default() -> History {
        Config::default().history
    }
}

impl Default for Watch {
    fn default() -> Watch {
        Watch {
            settle: Duration::from_secs(1),
            sweep_interval: Duration::from_secs(30),
            max_hash_bytes: 1 << 30,
            persistence: persistence(),
            gate: Gate::Ask,
            bounded_queue: false,
            arm: Arm::Events,
            runtimes: RUNTIMES.map(PathBuf::from).into(),
            volumes: true,
            probe_patience: Duration::from_secs(30),
            requester_variables: vec!["SPO_EXEC_REQUEST_UID".to_owned()],
        }
    }
}

/// The files by which an intruder can have code run later, or can log in again.
///
/// Left out: files that entry points write regularly (configuration, host keys), and files
/// that are generated from others (`ld.so.cache`). A supervisor keeps its own state beside the
/// scripts that it runs, so there the scripts are named one by one.
const PERSISTENCE: &[&str] = &[
    // Loaded into every program, and the directories that are searched for libraries.
    "/etc/ld.so.preload",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d/**",
    "/etc/ld-musl-*.path",
    // Loaded into every Python program: lines of code, modules in each form that can be
    // imported, the archive that is first on the path, and the file that sets the path.
    "**/{site,dist}-packages/*.pth",
    "**/{site-packages,dist-packages,lib-dynload}/{site,user}customize.{py,pyc,so,*.so}",
    "**/{site-packages,dist-packages,lib-dynload}/{site,user}customize/__init__.*",
    // Never a directory alone before a `/`: many links have such names, and lead to nothing.
    "**/{lib/python*,lib64/python*,etc/python*}/{site,user}customize.{py,pyc,so,*.so}",
    "**/{lib/python*,lib64/python*,etc/python*}/{site,user}customize/__init__.*",
    "**/{lib/python,lib64/python}{[0-9][0-9],[0-9][0-9][0-9]}.zip",
    "/usr/{bin,local,local/bin}/pyvenv.cfg",
    // Run at set times.
    "/etc/crontab",
    "/etc/anacrontab",
    "/etc/cron.*/**",
    "/etc/crontabs/**",
    "/etc/periodic/**",
    "/var/spool/cron/**",
    // Named, because it may be a link.
    "/var/spool/cron/crontabs/**",
    "/var/spool/at/**",
    // Run by every login or shell.
    "/etc/environment",
    "/etc/environment.d/**",
    "/etc/profile",
    "/etc/profile.d/**",
    "/etc/bash.bashrc",
    "/etc/bash.bash_logout",
    "/etc/bashrc",
    "/etc/bash/**",
    "/etc/csh.{cshrc,login,logout}",
    "/etc/fish/**",
    "/etc/zsh/**",
    "/etc/{zshenv,zprofile,zshrc,zlogin}",
    "/etc/update-motd.d/**",
    "/root/.{profile,bash_profile,bash_login,bash_logout,bashrc,zshrc,zprofile,zshenv}",
    "/home/*/.{profile,bash_profile,bash_login,bash_logout,bashrc,zshrc,zprofile,zshenv}",
    "/{root,home/*}/.{zlogin,zlogout,kshrc,mkshrc,cshrc,tcshrc,login,logout,pam_environment}",
    "/{root,home/*}/.config/{autostart,environment.d,systemd/user,fish/conf.d}/**",
    "/{root,home/*}/.config/fish/config.fish",
    // Users that may log in, and their rights.
    "**/.ssh/authorized_keys",
    "**/.ssh/authorized_keys2",
    "**/.ssh/rc",
    "/etc/ssh/sshd_config",
    "/etc/ssh/sshd_config.d/**",
    "/etc/ssh/sshrc",
    "/etc/passwd",
    "/etc/shadow",
    "/etc/group",
    "/etc/gshadow",
    "/etc/doas.conf",
    "/etc/doas.d/**",
    "/etc/sudoers",
    "/etc/sudoers.d/**",
    "/etc/pam.d/**",
    "/etc/security/pam_env.conf",
    // Run at start.
    "/etc/inittab",
    "/etc/rc.local",
    "/etc/local.d/**",
    "/etc/init.d/**",
    "/etc/rc*.d/**",
    "/etc/runlevels/**",
    "/etc/systemd/system/**",
    "/etc/systemd/user/**",
    "/lib/systemd/system/**",
    "/usr/lib/systemd/system/**",
    "/usr/local/lib/systemd/system/**",
    "/etc/udev/rules.d/**",
    // Run by supervisors and entry points of images.
    "/etc/supervisord.conf",
    "/usr/{etc,local/etc}/supervisord.conf",
    "/etc/supervisord.d/**",
    "/etc/supervisor/**",
    "/etc/supervisor.d/**",
    "/etc/{service,sv}/*/{run,finish,check}",
    "/etc/{service,sv}/*/log/run",
    "/{service,var/service}/*/{run,finish,check,log/run}",
    "/etc/runit/**",
    "/etc/s6/**",
    "/etc/s6-overlay/**",
    "/etc/{services,cont-init,cont-finish}.d/**",
    "/etc/my_init.d/**",
    "/etc/dinit.d/**",
    "/{docker-entrypoint,container-entrypoint}*.d/**",
    "/{entrypoint.d,etc/entrypoint.d}/**",
];

fn persistence() -> PathGlobs {
    let patterns = PERSISTENCE.iter().map(|pattern| (*pattern).to_owned()).collect();
    PathGlobs::new(patterns).expect("a test parses the file that has the same patterns")
}

pub const DEFAULT_SOCKET: &str = "/run/driftd/driftd.sock";
pub const DEFAULT_FILE: &str = "/etc/driftd/driftd.toml";

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the settings {}", file.display())]
    Unreadable { file: PathBuf, source: std::io::Error },
    #[error("the settings {} are wrong: {}", file.display(), message)]
    Invalid { file: PathBuf, message: String },
}

impl Config {
    /// Where cases of evidence are kept.
    pub fn evidence_directory(&self) -> PathBuf {
        let directory = &self.evidence.directory;
        if directory.as_os_str().is_empty() {
            self.state_dir.join("evidence")
        } else {
            directory.clone()
        }
    }

    /// Reads the settings. Without a file named by the operator, the default
    /// file may be missing: then the defaults apply.
    pub fn load(file: Option<&Path>) -> Result<Config, Error> {
        let (file, required) = match file {
            Some(file) => (file, true),
            None => (Path::new(DEFAULT_FILE), false),
        };
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(err) if !required && err.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Config::default());
            }
            Err(source) => return Err(Error::Unreadable { file: file.into(), source }),
        };
        Config::parse(&text).map_err(|message| Error::Invalid { file: file.into(), message })
    }

    /// Parses and checks settings. The error names what is wrong, and where.
    pub fn parse(text: &str) -> Result<Config, String> {
        let mut config: Config = toml::from_str(text).map_err(|err| err.to_string())?;
        hooks::check(&config.hooks)?;
        config.policy.hooks = Some(config.hooks.keys().cloned().collect());
        if config.containerd.sockets.is_empty() {
            return Err("containerd.sockets is empty: name at least one socket".into());
        }
        for (name, path) in [
            ("state_dir", &config.state_dir),
            ("socket", &config.socket),
            ("policy.dir", &config.policy.dir),
            ("policy.profile_dir", &config.policy.profile_dir),
        ]
        .into_iter()
        .chain(config.containerd.sockets.iter().map(|socket| ("containerd.sockets", socket)))
        {
            if !path.is_absolute() {
                return Err(format!("{name} = {path:?} is not an absolute path"));
            }
        }
        if let Some(runtime) = config.watch.runtimes.iter().find(|path| !path.is_absolute()) {
            return Err(format!("watch.runtimes: {runtime:?} is not an absolute path"));
        }
        if config.watch.arm == Arm::Strict && config.watch.runtimes.is_empty() {
            return Err("watch.runtimes is empty: arm = \"strict\" marks those programs".into());
        }
        if config.watch.sweep_interval < Duration::from_secs(1) {
            return Err("watch.sweep_interval is below 1s".into());
        }
        let respond = &config.respond;
        for (name, value) in [
            ("max_containers_of_rule", respond.max_containers_of_rule),
            ("max_of_container", respond.max_of_container),
            ("max_of_image", respond.max_of_image),
            ("max_of_node", respond.max_of_node),
        ] {
            if value == 0 {
                return Err(format!(
                    "respond.{name} is 0: no rule could answer (policy.enforce = \"off\" does that)"
                ));
            }
        }
        let deadline = config.policy.deny_deadline;
        // The guardian ends a gate that makes no progress within three seconds.
        if !(Duration::from_millis(10)..=Duration::from_secs(2)).contains(&deadline) {
            return Err("policy.deny_deadline is not between 10ms and 2s".into());
        }
        if respond.within < Duration::from_secs(1) {
            return Err("respond.within is below 1s".into());
        }
        config.evidence.check()?;
        if config.history.max_bytes < MIN_HISTORY {
            return Err(format!("history.max_bytes is below {MIN_HISTORY}"));
        }
        let Baseline { recheck_period, recheck_rate, max_layer_bytes, max_layer_entries, .. } =
            config.baseline;
        if !recheck_period.is_zero() && recheck_period < Duration::from_secs(10) {
            return Err("baseline.recheck_period is below 10s (0s turns it off)".into());
        }
        for (name, value) in [
            ("recheck_rate", recheck_rate),
            ("max_layer_bytes", max_layer_bytes),
            ("max_layer_entries", max_layer_entries),
        ] {
            if value == 0 {
                return Err(format!("baseline.{name} is 0: no layer could be read"));
            }
        }
        Ok(config)
    }
}

/// Settings that take effect while driftd runs. All others are read at its start.
const LIVE: [&str; 20] = [
    "history.max_bytes",
    "history.retention",
    "policy.container_modes",
    "policy.container_profiles",
    "policy.deny_deadline",
    "policy.dir",
    "policy.enforce",
    "policy.on_timeout",
    "policy.on_unknown",
    "policy.profile_dir",
    "policy.profiles",
    "policy.public_key",
    "respond.kill_on",
    "respond.max_containers_of_rule",
    "respond.max_of_container",
    "respond.max_of_image",
    "respond.max_of_node",
    "respond.stop_restarts",
    "respond.within",
    "watch.probe_patience",
];

fn is_live(name: &str) -> bool {
    name.starts_with("hooks.") || LIVE.contains(&name)
}

/// The result of reading the settings again.
#[derive(Debug, Clone, PartialEq)]
pub struct Reloaded {
    /// The settings that are in force from now on.
    pub config: Config,
    /// The names of the settings that have changed and are in force.
    pub applied: Vec<String>,
    /// The names of the settings that have changed and need a restart.
    pub at_restart: Vec<String>,
}

impl Config {
    /// Applies the part of `new` that can change while driftd runs with these settings.
    pub fn reloaded(&self, new: &Config) -> Reloaded {
        let mut config = self.clone();
        config.history = new.history.clone();
        config.respond = new.respond.clone();
        config.policy = new.policy.clone();
        config.hooks = new.hooks.clone();
        config.watch.probe_patience = new.watch.probe_patience;
        let changed = changed_between(self, new);
        let (applied, at_restart) = changed.into_iter().partition(|name| is_live(name));
        Reloaded { config, applied, at_restart }
    }
}

/// The names of the settings whose values differ, `table.name`.
fn changed_between(old: &Config, new: &Config) -> Vec<String> {
    use serde_json::Value;
    // As JSON, because TOML has no numbers beyond 2⁶³.
    let gone = old.hooks.keys().filter(|name| !new.hooks.contains_key(*name));
    let mut names: Vec<String> = gone.map(|name| format!("hooks.{name}")).collect();
    let empty = Value::Object(serde_json::Map::new());
    let [old, new] = [old, new].map(|config| serde_json::to_value(config).unwrap_or_default());
    let (Value::Object(old), Value::Object(new)) = (old, new) else { return Vec::new() };
    for (name, value) in &new {
        let known = old.get(name).or((name == "hooks").then_some(&empty));
        match (value, known) {
            (Value::Object(new), Some(Value::Object(old))) => {
                let changed = new.iter().filter(|(name, value)| old.get(*name) != Some(value));
                names.extend(changed.map(|(inner, _)| format!("{name}.{inner}")));
            }
            (value, known) if known != Some(value) => names.push(name.clone()),
            _ => (),
        }
    }
    names
}

/// Numbers of bytes as people write them: `1073741824`, `512M`, `1G`, `1 GiB`.
mod bytes {
    use std::fmt;

    use serde::{Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(*bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = u64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes such as 1073741824, \"512M\" or \"1G\"")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<u64, E> {
                u64::try_from(number)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(number), &self))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<u64, E> {
                Ok(number)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
                super::parse_bytes(text)
                    .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Reads `512M` or `1 GiB`. All units are powers of 1024, with and without an `i`.
fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let shift = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    text[..digits].parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Durations as people write them: `500ms`, `30s`, `30d`.
mod duration {
    use std::time::Duration;

    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(
        duration: &Duration,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let signed =
            jiff::SignedDuration::try_from(*duration).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(&format!("{signed:#}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        super::parse_duration(&text).map_err(D::Error::custom)
    }
}

/// Reads a duration such as `500ms`, `1h 30m` or `30d` (a day is 24 hours).
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let explain = |err: &dyn std::fmt::Display| {
        format!("`{}` is no duration such as 500ms, 30s, 12h or 30d: {err}", text.escape_debug())
    };
    let span: jiff::Span = text.parse().map_err(|err| explain(&err))?;
    let signed =
        span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|err| explain(&err))?;
    Duration::try_from(signed).map_err(|err| explain(&err))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIPPED: &str = include_str!("../systemd/driftd.toml");

    #[test]
    fn the_shipped_file_is_the_default() {
        assert_eq!(Config::parse(SHIPPED).unwrap(), Config::default());
    }

    #[test]
    fn w19_r22_places_of_persistence_are_known_by_what_reads_them() {
        let places = Config::default().watch.persistence;
        let check = |paths: &[&str], expected: bool| {
            for path in paths {
                let path = crate::model::RootfsPath::new(path).unwrap();
                assert_eq!(places.matches(&path), expected, "{path}");
            }
        };
        // Read by Python, whichever it is and in whatever form it imports a module.
        check(
            &[
                "/usr/lib/python3/dist-packages/x.pth",
                "/usr/local/lib/python3.13/site-packages/__editable__.app-1.0.pth",
                "/opt/venv/lib/python3.9/site-packages/sitecustomize.py",
                "/opt/conda/lib/python3.12/sitecustomize.py",
                "/root/.pyenv/versions/3.12.1/lib/python3.12/sitecustomize/__init__.py",
                "/etc/python3.11/sitecustomize.py",
                "/app/.local/lib/python3.11/site-packages/usercustomize.py",
                "/usr/lib/python3.11/usercustomize.pyc",
                "/usr/lib/python3.11/lib-dynload/sitecustomize.cpython-311-x86_64-linux-gnu.so",
                "/usr/lib/python3/dist-packages/sitecustomize.so",
                "/usr/lib/python3/dist-packages/sitecustomize/__init__.py",
                "/usr/lib/python311.zip",
                "/usr/local/lib/python39.zip",
                "/usr/local/bin/pyvenv.cfg",
                "/usr/local/pyvenv.cfg",
            ],
            true,
        );
        check(
            &[
                "/usr/lib/python3/dist-packages/six.py",
                "/usr/lib/python3.11/__pycache__/sitecustomize.cpython-311.pyc",
                "/srv/sitecustomize.py",
                "/srv/x.pth",
                "/opt/venv/pyvenv.cfg",
                "/srv/python-tutorial.zip",
                "/srv/models/site-packages.pth",
            ],
            false,
        );
        // Links within a virtual environment lead to none of them; links to their directories do.
        let leads = |path: &str| places.leads_to(&crate::model::RootfsPath::new(path).unwrap());
        for link in ["/opt/venv/bin/python3", "/opt/venv/lib64", "/usr/bin/python", "/srv/lib"] {
            assert!(!leads(link), "{link}");
        }
        for link in ["/usr/lib/python3.11", "/opt/venv/lib/python3.9/site-packages", "/root/.ssh"] {
            assert!(leads(link), "{link}");
        }
        // Read by the dynamic linker, logins, supervisors and entry points.
        check(
            &[
                "/etc/environment",
                "/etc/ld.so.conf.d/x.conf",
                "/home/app/.pam_environment",
                "/root/.config/systemd/user/x.service",
                "/root/.config/fish/config.fish",
                "/etc/supervisor.d/x.ini",
                "/usr/local/etc/supervisord.conf",
                "/service/x/run",
                "/var/service/x/log/run",
                "/etc/s6-overlay/s6-rc.d/x/run",
                "/docker-entrypoint-initdb.d/x.sql",
                "/container-entrypoint-initdb.d/x.sh",
                "/etc/entrypoint.d/x.sh",
            ],
            true,
        );
        check(&["/etc/ld.so.cache", "/service/x/supervise/status", "/root/.config/x"], false);
    }

    #[test]
    fn u18_bytes_are_read_as_people_write_them() {
        for (text, bytes) in [("2097152", 2 << 20), ("\"512M\"", 512 << 20), ("\"1 GiB\"", 1 << 30)]
        {
            let config = Config::parse(&format!("[history]\nmax_bytes = {text}\n")).unwrap();
            assert_eq!(config.history.max_bytes, bytes, "{text}");
        }
        for text in ["\"1X\"", "-1", "\"\"", "\"99999999999T\"", "true"] {
            let err = Config::parse(&format!("[history]\nmax_bytes = {text}\n")).unwrap_err();
            assert!(format!("{err:?}").contains("512M"), "{text}: {err:?}");
        }
    }

    #[test]
    fn the_shipped_file_names_every_setting() {
        let every = toml::to_string(&Config::default()).unwrap();
        for line in every.lines().filter(|line| line.contains(" = ")) {
            let setting = line.split(" = ").next().unwrap();
            assert!(SHIPPED.contains(&format!("{setting} = ")), "driftd.toml lacks {setting}");
        }
    }

    #[test]
    fn an_empty_file_is_a_good_file() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
        assert_eq!(Config::parse("[watch]\nsettle = \"2s\"").unwrap().watch.settle.as_secs(), 2);
    }

    #[test]
    fn x18_a_reload_applies_what_can_change_and_names_what_cannot() {
        let old = Config::default();
        let new = Config::parse(
            "socket = \"/run/other.sock\"\n[watch]\nsettle = \"2s\"\nprobe_patience = \"5s\"\n\
             [history]\nmax_bytes = 2000000\nretention = \"1d\"\n\
             [policy]\ndir = \"/etc/other\"\nenforce = \"on\"\nprofiles = [\"apt\"]\ncontainer_profiles = [\"pip\"]\n\
             deny_deadline = \"500ms\"\non_timeout = \"deny\"\non_unknown = \"deny\"\n\
             container_modes = [\"report\"]\n\
             profile_dir = \"/etc/baselines\"\npublic_key = \"RW\"\n\
             [respond]\nkill_on = [\"exec.new\"]\nstop_restarts = true\nwithin = \"1h\"\n\
             max_containers_of_rule = 1\nmax_of_container = 1\nmax_of_image = 1\nmax_of_node = 1",
        )
        .unwrap();
        let reloaded = old.reloaded(&new);
        assert_eq!(reloaded.applied, LIVE, "every setting that can change was changed");
        assert_eq!(reloaded.at_restart, ["socket", "watch.settle"]);
        // The next reload does not report again what was applied, but it does report the rest.
        let again = reloaded.config.reloaded(&new);
        assert!(again.applied.is_empty(), "{again:?}");
        assert_eq!(again.at_restart, reloaded.at_restart);
        assert_eq!(again.config.socket, old.socket);
        assert_eq!(again.config.respond, new.respond);
        assert_eq!(again.config.policy, new.policy);
    }

    #[test]
    fn a_misspelt_setting_is_refused_by_name() {
        let err = Config::parse("[respond]\nkil_on = []").unwrap_err();
        assert!(err.contains("kil_on") && err.contains("kill_on"), "{err}");
    }

    #[test]
    fn hooks_have_defaults_and_each_fault_names_the_hook() {
        let of = |text: &str| Config::parse(&format!("[hooks.page]\n{text}"));
        let config = of("program = \"/usr/local/bin/page\"").unwrap();
        let hook = &config.hooks["page"];
        assert_eq!((hook.timeout.as_secs(), hook.wait.as_secs()), (30, 60));
        assert!(hook.counts && !hook.retry && hook.user.is_none() && hook.arguments.is_empty());
        assert_eq!(config.policy.hooks, Some(BTreeSet::from(["page".to_owned()])));
        for (text, expected) in [
            ("", "missing field `program`"),
            ("program = \"bin/page\"", "hooks.page.program = \"bin/page\" is not an absolute path"),
            ("program = \"/p\"\ntimeout = \"0s\"", "hooks.page.timeout is not between"),
            ("program = \"/p\"\nwait = \"2h\"", "hooks.page.wait is not between"),
            ("program = \"/p\"\narguments = [\"a\\u0000\"]", "hooks.page: an argument has a NUL"),
            ("program = \"/p\"\nuser = \"\"", "`user` is empty"),
            ("program = \"/p\"\ncount = false", "unknown field `count`"),
        ] {
            let err = of(text).unwrap_err();
            assert!(err.contains(expected), "{text}: {err}");
        }
        let err = Config::parse("[hooks.\"a b\"]\nprogram = \"/p\"").unwrap_err();
        assert!(err.contains("the name `a b`"), "{err}");
    }

    #[test]
    fn changed_hooks_are_in_force_at_once() {
        let of = |text: &str| Config::parse(text).unwrap();
        let page = of("[hooks.page]\nprogram = \"/p\"");
        let other = of("[hooks.other]\nprogram = \"/p\"");
        let reloaded = page.reloaded(&other);
        assert_eq!(reloaded.applied, ["hooks.page", "hooks.other"]);
        assert_eq!(reloaded.config.hooks, other.hooks);
        assert_eq!(Config::default().reloaded(&page).applied, ["hooks.page"]);
        assert_eq!(page.reloaded(&Config::default()).applied, ["hooks.page"]);
    }

    #[test]
    fn a_kind_that_does_not_exist_is_refused_by_name() {
        let err = Config::parse("[respond]\nkill_on = [\"exec.nwe\"]").unwrap_err();
        assert!(err.contains("exec.nwe"), "{err}");
    }

    #[test]
    fn durations_are_read_as_people_write_them() {
        assert_eq!(parse_duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(parse_duration("30d").unwrap(), Duration::from_secs(30 * 86400));
        for text in ["soon", "-1s"] {
            let err = parse_duration(text).unwrap_err();
            assert!(err.starts_with(&format!("`{text}` is no duration such as 500ms")), "{err}");
        }
    }
}
