//! What the threads share about sessions: the terminals and the runtime invocations.
//!
//! `Sessions` carries `Files`, and with it the processes and the core.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::invocations::Invocations;
use super::terminals::Terminals;
use crate::watch::files::shared::Files;

/// What is known about sessions, for all containers.
pub(crate) struct Sessions {
    pub(crate) files: Arc<Files>,
    pub(crate) terminals: Terminals,
    invocations: Mutex<Invocations>,
}

impl Deref for Sessions {
    type Target = Files;

    fn deref(&self) -> &Files {
        &self.files
    }
}

impl Sessions {
    pub(crate) fn new(files: Arc<Files>) -> Sessions {
        Sessions { files, terminals: Terminals::new(), invocations: Mutex::default() }
    }

    /// The latest runtime invocations.
    pub(crate) fn invocations(&self) -> MutexGuard<'_, Invocations> {
        self.invocations.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
