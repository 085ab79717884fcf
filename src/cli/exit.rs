//! The exit codes. Scripts and pipelines rely on the numbers.
//!
//! A published interface: a number never changes its meaning.

use std::process::ExitCode;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Answered, and nothing is wrong.
    Clean,
    /// Answered, and there is drift, or the view is incomplete.
    Drift,
    /// Could not answer.
    Failed,
    /// The command line or the settings are wrong.
    Usage,
}

impl Exit {
    pub fn code(self) -> u8 {
        match self {
            Exit::Clean => 0,
            Exit::Drift => 1,
            Exit::Failed => 2,
            // EX_USAGE of sysexits.h.
            Exit::Usage => 64,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}
