//! (stub)

use crate::cli::exit::Exit;
use crate::config::Config;

#[expect(clippy::needless_pass_by_value, reason = "stub")]
pub fn run(config: Config) -> anyhow::Result<Exit> {
    anyhow::bail!("the daemon is not there yet ({})", config.state_dir.display())
}
