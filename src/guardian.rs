//! (stub)

use crate::cli::exit::Exit;

pub fn run() -> anyhow::Result<Exit> {
    anyhow::bail!("the guardian is not there yet")
}
