//! The settings of the policy: where its files are, and how far its answers go.
//!
//! Owns the values alone. `policy` reads the files, and decides.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::duration;

/// The rules that decide what happens to findings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PolicyFiles {
    /// The directory of the policy files, `*.toml`. It need not exist.
    pub dir: PathBuf,
    /// Whether the answers of rules are carried out.
    pub enforce: Enforce,
    /// The names of the profiles that are switched on: reviewed exceptions, which come after
    /// the policy files.
    pub profiles: Vec<String>,
    /// The names of the profiles that a container may switch on for itself, by a label.
    pub container_profiles: Vec<String>,
    /// The directory of the profiles.
    pub profile_dir: PathBuf,
    /// How long an execution waits for a decision at most, where a rule may deny it.
    #[serde(with = "duration")]
    pub deny_deadline: Duration,
    /// What happens to it then.
    pub on_timeout: OnDoubt,
    /// What happens to it while the container's baseline is not known.
    pub on_unknown: OnDoubt,
    /// What containers may set for themselves by the label `driftd.io/mode`.
    pub container_modes: Vec<ContainerMode>,
    /// minisign's public key. If it is given, the policy files need a signature by it.
    pub public_key: String,
    /// The names of the hooks of the settings: a rule that names another one is refused. `None`
    /// where the settings are not known.
    #[serde(skip)]
    pub hooks: Option<BTreeSet<String>>,
}

/// Whether the answers of rules are carried out. `respond.kill_on` does not depend on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Enforce {
    Off,
    /// They are recorded with the finding, and not carried out.
    #[default]
    DryRun,
    On,
}

impl Enforce {
    pub fn name(self) -> &'static str {
        match self {
            Enforce::Off => "off",
            Enforce::DryRun => "dry-run",
            Enforce::On => "on",
        }
    }
}

/// What happens to an execution about which nothing can be decided.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnDoubt {
    #[default]
    Allow,
    Deny,
}

/// What a container sets for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContainerMode {
    /// Answers are recorded, and not carried out.
    Report,
    /// Answers are carried out, where a rule does not say otherwise.
    Enforce,
}

impl ContainerMode {
    pub fn name(self) -> &'static str {
        match self {
            ContainerMode::Report => "report",
            ContainerMode::Enforce => "enforce",
        }
    }
}

impl Default for PolicyFiles {
    fn default() -> PolicyFiles {
        PolicyFiles {
            dir: "/etc/driftd/policy.d".into(),
            enforce: Enforce::DryRun,
            profiles: Vec::new(),
            container_profiles: Vec::new(),
            profile_dir: "/usr/share/driftd/baselines".into(),
            deny_deadline: Duration::from_secs(1),
            on_timeout: OnDoubt::Allow,
            on_unknown: OnDoubt::Allow,
            container_modes: Vec::new(),
            public_key: String::new(),
            hooks: None,
        }
    }
}

impl PolicyFiles {
    /// The policy files of one directory, with no profiles and without a signature.
    pub fn of(dir: &Path) -> PolicyFiles {
        PolicyFiles { dir: dir.into(), ..PolicyFiles::default() }
    }
}
