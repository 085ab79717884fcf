//! What rules are made of: the text of policy files, and what is wrong with it. Values.

use std::fmt;
use std::path::PathBuf;

use crate::model::printable;

/// Faults that are reported at once.
const MAX_FAULTS: usize = 20;

/// One policy file as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyFile {
    /// Without the directory. The whole path, if it is a profile.
    pub name: String,
    pub text: String,
    /// The name of the profile.
    pub profile: Option<String>,
    /// The profile is for containers that ask for it by a label.
    pub by_label: bool,
}

impl PolicyFile {
    /// A file that is no profile.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> PolicyFile {
        PolicyFile { name: name.into(), text: text.into(), profile: None, by_label: false }
    }
}

/// What is wrong with a policy file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub file: PathBuf,
    /// Line and column, both from 1.
    pub at: Option<(usize, usize)>,
    pub message: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&printable(self.file.as_os_str().as_encoded_bytes()))?;
        if let Some((line, column)) = self.at {
            write!(f, ":{line}:{column}")?;
        }
        write!(f, ": {}", printable(self.message.as_bytes()))
    }
}

/// Why a set of rules is refused: all faults that were found, one at least.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", lines(.0))]
pub struct Refused(pub Vec<Fault>);

fn lines(faults: &[Fault]) -> String {
    let mut lines: Vec<String> = faults.iter().take(MAX_FAULTS).map(Fault::to_string).collect();
    if faults.len() > MAX_FAULTS {
        lines.push(format!("and {} more faults", faults.len() - MAX_FAULTS));
    }
    lines.join("\n")
}
