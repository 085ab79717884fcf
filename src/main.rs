//! The program: runs the command line and turns its result into an exit code.
//!
//! Everything else is in the library, so that tests can use it.

use std::process::ExitCode;

use driftd::cli::exit::Exit;
use driftd::cli::{self, Cli};

fn main() -> ExitCode {
    let cli = match Cli::from_command_line() {
        Ok(cli) => cli,
        Err(exit) => return exit.into(),
    };
    match cli.run() {
        Ok(exit) => exit.into(),
        // The reader of the output has ended, as in `driftd findings | head`.
        Err(err) if cli::is_broken_pipe(&err) => Exit::Clean.into(),
        Err(err) => {
            driftd::journal::report_failure(&err);
            cli::exit_of(&err).into()
        }
    }
}
