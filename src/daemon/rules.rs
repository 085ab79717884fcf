//! Keeps the rules in force: reads the policy files at the start, when one of them changes, and
//! when a client or a signal asks for it.
//!
//! A set with a fault is refused whole. The rules before stay in force, and the pipeline is
//! informed, for `driftd status`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

use crate::config::{Config, Gate, PolicyFiles};
use crate::model::Answer;
use crate::policy::{self, Fault, Loaded, Owners, Policy, Refused, Rule};

/// How long files must be left alone before they are read: an editor writes more than once.
const SETTLE: Duration = Duration::from_millis(300);

/// The policy files in force.
#[derive(Debug, Default)]
pub(super) struct Rules {
    pub(super) loaded: Option<Loaded>,
    /// Why the files as they are now were refused.
    pub(super) refused: Option<Refused>,
}

impl Rules {
    /// Reads the files for the first time. With a fault in them, no rule is in force: all is
    /// reported.
    pub(super) fn new(from: &PolicyFiles) -> Rules {
        match policy::read(from, Owners::Own) {
            Ok(loaded) => Rules { loaded: Some(loaded), refused: None },
            Err(refused) => {
                tracing::error!("the policy files are refused, no rule is in force:\n{refused}");
                Rules { loaded: None, refused: Some(refused) }
            }
        }
    }

    /// Reads the files again. True if other rules are in force now.
    pub(super) fn read_again(&mut self, from: &PolicyFiles) -> bool {
        let read = policy::read(from, Owners::Own).and_then(|loaded| {
            // Rules that vanish are more likely an accident than a wish.
            let is_gone = !loaded.has_directory && self.has_files();
            if is_gone { Err(gone(&from.dir)) } else { Ok(loaded) }
        });
        match read {
            Ok(loaded) => {
                let state = |loaded: &Loaded| (loaded.digest.clone(), loaded.signed.clone());
                let is_new = self.loaded.as_ref().map(state) != Some(state(&loaded))
                    || self.refused.is_some();
                (self.loaded, self.refused) = (Some(loaded), None);
                is_new
            }
            Err(refused) => {
                if self.refused.as_ref() != Some(&refused) {
                    tracing::error!(
                        "the policy files are refused, the rules before stay:\n{refused}"
                    );
                }
                self.refused = Some(refused);
                false
            }
        }
    }

    fn has_files(&self) -> bool {
        self.loaded.as_ref().is_some_and(Loaded::has_files)
    }
}

/// Warns of rules that deny where no program waits for an answer.
pub(super) fn warn_of_denials(config: &Config, policy: &Policy) {
    let denies = |rule: &Rule| rule.answers.contains(&Answer::Deny);
    if config.watch.gate == Gate::Notify && policy.rules.rules().iter().any(denies) {
        tracing::warn!(
            "watch.gate is \"notify\": no program waits for an answer, so rules deny nothing and \
             kill what they would deny"
        );
    }
}

fn gone(directory: &Path) -> Refused {
    let message = "the directory is gone (an empty one means that there are no rules)".to_owned();
    Refused(vec![Fault { file: directory.into(), at: None, message }])
}

/// Waits for changes of the policy files.
pub(super) struct Changes {
    events: mpsc::Receiver<()>,
    /// Ends the watch when it is dropped. `None` if the kernel refuses it.
    _watcher: Option<RecommendedWatcher>,
}

impl Changes {
    pub(super) fn of(from: &PolicyFiles) -> Changes {
        let (sender, events) = mpsc::channel(1);
        let has_profiles = !from.profiles.is_empty() || !from.container_profiles.is_empty();
        let profiles = has_profiles.then(|| from.profile_dir.clone());
        let directories: Vec<PathBuf> = profiles.into_iter().chain([from.dir.clone()]).collect();
        let own = directories.clone();
        let watched = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // One that waits stands for all others. What lies beside the directory is no change.
            let concerns = |event: &notify::Event| {
                let is_own = |path: &PathBuf| own.iter().any(|own| path.starts_with(own));
                event.need_rescan() || event.paths.iter().any(is_own)
            };
            let is_read = |event: &notify::Event| event.kind.is_access();
            if event.is_ok_and(|event| concerns(&event) && !is_read(&event)) {
                let _ = sender.try_send(());
            }
        });
        let watched = watched.and_then(|mut watcher| {
            for directory in &directories {
                // The directory may come later, or be replaced.
                let parent = directory.parent().into_iter();
                for path in parent.chain([directory.as_path()]).filter(|path| path.is_dir()) {
                    watcher.watch(path, RecursiveMode::NonRecursive)?;
                }
            }
            Ok(watcher)
        });
        if let Err(err) = &watched {
            tracing::warn!(
                "changes of {} are not noticed ({err}): driftd policy reload reads the files",
                from.dir.display()
            );
        }
        Changes { events, _watcher: watched.ok() }
    }

    /// Returns when the files have changed and are left alone.
    pub(super) async fn next(&mut self) {
        if self.events.recv().await.is_none() {
            // Nothing is watched.
            std::future::pending::<()>().await;
        }
        while let Ok(Some(())) = tokio::time::timeout(SETTLE, self.events.recv()).await {}
    }
}
