//! Hooks: programs that rules may run, as the table `[hooks.NAME]` describes them.
//!
//! Owns the defaults and the checks of the text. Whether the program is there, and whose it is,
//! the room `hooks` checks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The longest name of a hook, and the most arguments of one.
const MAX_NAME: usize = 64;
const MAX_ARGUMENTS: usize = 64;
/// The limits of its times.
const MAX_TIME: Duration = Duration::from_secs(3600);
const MIN_TIME: Duration = Duration::from_millis(100);

/// A program that rules may run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Its absolute path. It belongs to root, and no other user may write to it.
    pub program: PathBuf,
    #[serde(default)]
    pub arguments: Vec<String>,
    /// How long it may run. Then it is killed.
    #[serde(default = "timeout", with = "super::duration")]
    pub timeout: Duration,
    /// How long a request waits for a runner (`driftd hooks`) at most.
    #[serde(default = "wait", with = "super::duration")]
    pub wait: Duration,
    /// The user that it runs as. Without one, it is the user of the runner.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// It may end a container: it counts for the limits of rules as a kill does, and runs once
    /// for each run of a container. Otherwise it runs once for each finding.
    #[serde(default = "yes")]
    pub counts: bool,
    /// It may run again where it is not known what it has done.
    #[serde(default)]
    pub retry: bool,
}

fn timeout() -> Duration {
    Duration::from_secs(30)
}

fn wait() -> Duration {
    Duration::from_secs(60)
}

fn yes() -> bool {
    true
}

/// What is wrong with the text of hooks. The error names the hook and the setting.
pub(super) fn check(hooks: &BTreeMap<String, Hook>) -> Result<(), String> {
    for (name, hook) in hooks {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(is_plain) {
            return Err(format!(
                "hooks: the name `{}` has not 1 to {MAX_NAME} letters, digits, `_` or `-`",
                name.escape_debug()
            ));
        }
        if !hook.program.is_absolute() {
            let program = &hook.program;
            return Err(format!("hooks.{name}.program = {program:?} is not an absolute path"));
        }
        for (key, value) in [("timeout", hook.timeout), ("wait", hook.wait)] {
            if !(MIN_TIME..=MAX_TIME).contains(&value) {
                return Err(format!("hooks.{name}.{key} is not between 100ms and 1h"));
            }
        }
        if hook.arguments.len() > MAX_ARGUMENTS {
            return Err(format!("hooks.{name}.arguments are more than {MAX_ARGUMENTS}"));
        }
        let mut texts = hook.arguments.iter().chain(&hook.user);
        if texts.any(|text| text.contains('\0')) || hook.user.as_deref() == Some("") {
            return Err(format!("hooks.{name}: an argument has a NUL byte, or `user` is empty"));
        }
    }
    Ok(())
}
