//! The built program, the API and the history together. A thread takes the pipeline's
//! place: it replies to requests from a fixed script.

mod answers;
mod archives;
mod baselines;
mod command_line;
mod containers;
mod evidence;
#[path = "../node/executable.rs"]
mod executable;
mod exports;
mod findings;
mod follow;
mod history_file;
mod node;
mod policy;
mod program;
mod reports;
mod samples;
mod sessions;
mod socket;
mod top;
