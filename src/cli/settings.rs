//! The options that say where the settings come from, and that override some of them.
//!
//! `run` and `doctor` share them. The settings themselves are checked in `config`.

use std::io;
use std::path::{Path, PathBuf};

use crate::config::Config;

/// Where the settings come from, and what overrides them.
#[derive(Debug, clap::Args)]
pub(super) struct Settings {
    /// The settings [default: /etc/driftd/driftd.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A socket of containerd, instead of those in the settings (may be repeated)
    #[arg(long, value_name = "SOCKET")]
    containerd: Vec<PathBuf>,
    /// Where baselines and the history are kept
    #[arg(long, value_name = "DIRECTORY")]
    state_dir: Option<PathBuf>,
}

impl Settings {
    pub(super) fn load(&self, socket: Option<&Path>) -> anyhow::Result<Config> {
        let mut config = Config::load(self.config.as_deref())?;
        if let Some(state_dir) = &self.state_dir {
            config.state_dir = std::path::absolute(state_dir)?;
        }
        if let Some(socket) = socket {
            config.socket = std::path::absolute(socket)?;
        }
        if !self.containerd.is_empty() {
            config.containerd.sockets =
                self.containerd.iter().map(std::path::absolute).collect::<io::Result<_>>()?;
        }
        Ok(config)
    }
}
