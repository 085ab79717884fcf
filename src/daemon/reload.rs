//! Reads the settings again at SIGHUP, and the policy files then, when they change, and when a
//! client asks for it. Applies what can change while driftd runs.
//!
//! Sends the new policy to the pipeline and the new limits to the history. Settings that need a
//! restart are only named in the log.

use std::time::Duration;

use anyhow::Context as _;
use crossbeam_channel::{Sender, TrySendError};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::rules::{Changes, Rules, warn_of_denials};
use crate::api::PolicyReload;
use crate::config::{self, Config};
use crate::history::Keep;
use crate::pipeline::ApiRequest;
use crate::policy::{Policy, Refused};
use crate::sys::process;

/// SIGHUP, from `systemctl reload` or from a terminal that is closed. Both cause a reload.
pub(super) fn hangups() -> anyhow::Result<Signal> {
    let hangups = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    process::take_hangups().context("cannot listen for SIGHUP")?;
    Ok(hangups)
}

/// The settings and the rules in force, and the receivers of those that may change.
pub(super) struct Reloading {
    pub(super) config: Config,
    pub(super) rules: Rules,
    pub(super) keep: Box<dyn Fn(Keep) + Send>,
    pub(super) requests: Sender<ApiRequest>,
    /// Clients that ask for the policy files to be read.
    pub(super) policy_reloads: mpsc::Receiver<PolicyReload>,
}

/// Reads what has changed until the daemon ends. A file with an error changes nothing.
pub(super) async fn reload(
    mut hangups: Signal,
    reread: impl Fn() -> anyhow::Result<Config>,
    mut now: Reloading,
) {
    let mut changes = Changes::of(&now.config.policy);
    loop {
        tokio::select! {
            signal = hangups.recv() => {
                if signal.is_none() {
                    return;
                }
                let _ = sd_notify::notify(&[NotifyState::Reloading]);
                let status = match reread() {
                    Err(err) => {
                        tracing::error!("the settings were not read again, the old ones stay: {err:#}");
                        "the last reload failed: the old settings stay (see the log)".to_owned()
                    }
                    Ok(new) => now.apply(&new).await,
                };
                let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
            }
            () = changes.next() => (),
            client = now.policy_reloads.recv() => {
                let Some(client) = client else { return };
                let read = now.read_rules().await;
                let _ = client.send(read);
                continue;
            }
        }
        // The directory may be another one, or have come. It is watched before it is read, so
        // that no change is missed.
        changes = Changes::of(&now.config.policy);
        let _ = now.read_rules().await;
    }
}

impl Reloading {
    /// Reads the policy files, and puts their rules in force.
    async fn read_rules(&mut self) -> Result<(), Refused> {
        if self.load_rules().await {
            self.send_policy().await;
        }
        let Some(refused) = self.rules.refused.clone() else { return Ok(()) };
        self.send(ApiRequest::PolicyRefused(refused.to_string())).await;
        Err(refused)
    }

    /// Reads the policy files. True if other rules are to be in force.
    async fn load_rules(&mut self) -> bool {
        let from = self.config.policy.clone();
        let mut rules = std::mem::take(&mut self.rules);
        // The files may lie on a slow disk; a worker of the runtime must not wait for it.
        let read = tokio::task::spawn_blocking(move || {
            let is_new = rules.read_again(&from);
            (rules, is_new)
        });
        let Ok((rules, is_new)) = read.await else { return false };
        self.rules = rules;
        if is_new {
            let loaded = self.rules.loaded.as_ref();
            tracing::info!(
                rules = loaded.map_or(0, |loaded| loaded.rules.rules().len()),
                version = loaded.and_then(|loaded| loaded.version.as_deref()).unwrap_or_default(),
                digest = loaded.and_then(|loaded| loaded.digest.as_deref()).unwrap_or_default(),
                "the policy files were read again"
            );
        }
        is_new
    }

    /// Applies what can be applied. Returns the text for systemd's status.
    async fn apply(&mut self, new: &Config) -> String {
        let config::Reloaded { config, applied, at_restart } = self.config.reloaded(new);
        // Made of what is in force now, because only a part of the new file is.
        self.config = config;
        self.load_rules().await;
        let refused = self.rules.refused.is_some();
        if !self.send_policy().await {
            return "driftd is stopping".to_owned();
        }
        (self.keep)(keep_of(&self.config));
        let names = |names: &[String]| match names {
            [] => "nothing".to_owned(),
            names => names.join(", "),
        };
        let mut status = format!("the settings were read again; changed: {}", names(&applied));
        if refused {
            status += "; the policy files are refused, the rules before stay (driftd status)";
        }
        if at_restart.is_empty() {
            tracing::info!("{status}");
        } else {
            status +=
                &format!("; changed in the file, in force after a restart: {}", names(&at_restart));
            tracing::warn!("{status}");
        }
        status
    }

    /// False if driftd is stopping.
    async fn send_policy(&mut self) -> bool {
        let policy = Policy::of(&self.config, self.rules.loaded.as_ref());
        let refused = self.rules.refused.as_ref().map(Refused::to_string);
        warn_of_denials(&self.config, &policy);
        let policy = Box::new(Policy { refused, ..policy });
        self.send(ApiRequest::SetPolicy(policy)).await
    }

    /// The pipeline may be waiting for a disk; a worker of the runtime must not.
    async fn send(&mut self, request: ApiRequest) -> bool {
        let mut waiting = Some(request);
        while let Some(request) = waiting.take() {
            match self.requests.try_send(request) {
                Ok(()) => (),
                Err(TrySendError::Full(request)) => {
                    waiting = Some(request);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(TrySendError::Disconnected(_)) => return false,
            }
        }
        true
    }
}

pub(super) fn keep_of(config: &Config) -> Keep {
    Keep { retention: config.history.retention, max_bytes: config.history.max_bytes }
}
