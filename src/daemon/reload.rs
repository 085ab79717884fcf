//! Reads the settings again at SIGHUP, and applies those that can change while driftd runs.
//!
//! Sends the new policy to the pipeline and the new limits to the history. Settings that need a
//! restart are only named in the log.

use std::time::Duration;

use anyhow::Context as _;
use crossbeam_channel::{Sender, TrySendError};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{self, Config};
use crate::history::Keep;
use crate::pipeline::ApiRequest;
use crate::policy::Policy;
use crate::sys::process;

/// SIGHUP, from `systemctl reload` or from a terminal that is closed. Both cause a reload.
pub(super) fn hangups() -> anyhow::Result<Signal> {
    let hangups = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    process::take_hangups().context("cannot listen for SIGHUP")?;
    Ok(hangups)
}

/// The settings in force, and the receivers of those that may change.
pub(super) struct Reloading {
    pub(super) config: Config,
    pub(super) keep: Box<dyn Fn(Keep) + Send>,
    pub(super) requests: Sender<ApiRequest>,
}

/// Reads the settings again at each SIGHUP. A file with an error changes nothing.
pub(super) async fn reload_at_hangups(
    mut hangups: Signal,
    reread: impl Fn() -> anyhow::Result<Config>,
    mut now: Reloading,
) {
    while hangups.recv().await.is_some() {
        let _ = sd_notify::notify(&[NotifyState::Reloading]);
        let status = match reread() {
            Err(err) => {
                tracing::error!("the settings were not read again, the old ones stay: {err:#}");
                "the last reload failed: the old settings stay (see the log)".to_owned()
            }
            Ok(new) => apply(&mut now, &new).await,
        };
        let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
    }
}

/// Applies what can be applied. Returns the text for systemd's status.
async fn apply(now: &mut Reloading, new: &Config) -> String {
    let config::Reloaded { config, applied, at_restart } = now.config.reloaded(new);
    // Made of what is in force now, because only a part of the new file is.
    let mut policy = Some(Box::new(Policy::of(&config)));
    // The pipeline may be waiting for a disk; a worker of the runtime must not.
    while let Some(changed) = policy.take() {
        match now.requests.try_send(ApiRequest::SetPolicy(changed)) {
            Ok(()) => (),
            Err(TrySendError::Full(ApiRequest::SetPolicy(changed))) => {
                policy = Some(changed);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(_) => return "driftd is stopping".to_owned(),
        }
    }
    (now.keep)(keep_of(&config));
    now.config = config;
    let names = |names: &[String]| match names {
        [] => "nothing".to_owned(),
        names => names.join(", "),
    };
    let mut status = format!("the settings were read again; changed: {}", names(&applied));
    if at_restart.is_empty() {
        tracing::info!("{status}");
    } else {
        status +=
            &format!("; changed in the file, in force after a restart: {}", names(&at_restart));
        tracing::warn!("{status}");
    }
    status
}

pub(super) fn keep_of(config: &Config) -> Keep {
    Keep { retention: config.history.retention, max_bytes: config.history.max_bytes }
}
