//! Probes that a container's specification declares, and how a command becomes known as a
//! probe.

use serde::{Deserialize, Serialize};

/// Why a command is known to be a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProbeSource {
    /// The image's or the container's health check (Docker, nerdctl).
    Healthcheck,
    /// A hook of the pod's specification.
    LifecycleHook,
    /// The same arguments were run at a steady rhythm.
    Learned,
}

impl ProbeSource {
    pub const ALL: &'static [ProbeSource] =
        &[ProbeSource::Healthcheck, ProbeSource::LifecycleHook, ProbeSource::Learned];

    /// The same word as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            ProbeSource::Healthcheck => "healthcheck",
            ProbeSource::LifecycleHook => "lifecycle_hook",
            ProbeSource::Learned => "learned",
        }
    }
}

/// A command that a container's specification declares as its probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeclaredProbe {
    pub argv: Vec<String>,
    pub source: ProbeSource,
}
