//! What the threads share of sessions. It carries what is known of files, and with that
//! of processes, and the core.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::calls::Calls;
use super::terminals::Terminals;
use crate::watch::files::shared::Files;

/// What is known of sessions, for all containers.
pub(crate) struct Sessions {
    pub(crate) files: Arc<Files>,
    pub(crate) terminals: Terminals,
    calls: Mutex<Calls>,
}

impl Deref for Sessions {
    type Target = Files;

    fn deref(&self) -> &Files {
        &self.files
    }
}

impl Sessions {
    pub(crate) fn new(files: Arc<Files>) -> Sessions {
        Sessions { files, terminals: Terminals::new(), calls: Mutex::default() }
    }

    /// What runtimes were called for lately.
    pub(crate) fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
