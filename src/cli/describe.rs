//! Texts about processes, files and pods, for people.
//!
//! Everything that a container may have chosen is made safe for a terminal here.

use std::fmt::Write as _;

use super::output::safe;
use crate::model::{Finding, Pod, Process};

/// What a finding is about: a file, or the command that was run.
pub(super) fn subject(finding: &Finding) -> String {
    match (&finding.file, &finding.process) {
        (Some(file), _) => format!("{}{}", file.path, files_of(finding)),
        (None, Some(process)) => format!("{}{}", command_line(process), files_of(finding)),
        (None, None) => safe(finding.detail.as_deref().unwrap_or_default()),
    }
}

/// How many files an aggregated finding stands for.
fn files_of(finding: &Finding) -> String {
    finding.files.map(|files| format!(" ({})", number(files, "file"))).unwrap_or_default()
}

/// `1 file`, `2 files`.
pub(super) fn number(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

pub(super) fn command_line(process: &Process) -> String {
    match (&process.argv, &process.exe) {
        (Some(argv), _) if !argv.is_empty() => quoted(argv),
        (_, Some(exe)) => safe(exe),
        (_, None) => format!("pid {}", process.identity.pid),
    }
}

/// Arguments, quoted so that the end of each can be seen.
pub(super) fn quoted(argv: &[String]) -> String {
    let quote = |argument: &String| {
        let argument = safe(argument);
        let plain =
            |character: char| character.is_alphanumeric() || "%+,-./:=@_".contains(character);
        if !argument.is_empty() && argument.chars().all(plain) {
            argument
        } else {
            format!("'{}'", argument.replace('\'', "'\\''"))
        }
    };
    argv.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// Text that can be pasted into a shell as one word.
pub(super) fn shell_word(text: &str) -> String {
    quoted(&[text.to_owned()])
}

/// An executable with its arguments.
pub(super) fn program(exe: Option<&str>, argv: Option<&[String]>) -> String {
    match (exe.map(safe), argv.filter(|argv| !argv.is_empty())) {
        (Some(exe), Some(argv)) => format!("{exe}: {}", quoted(argv)),
        (Some(exe), None) => exe,
        // The executable cannot be read, as for the host's first process in a namespace.
        (None, Some(argv)) => quoted(argv),
        (None, None) => {
            "a program that could not be read (it was gone, or is the kernel's)".to_owned()
        }
    }
}

/// A pod as `kubectl` names it; empty for none.
pub(super) fn pod(pod: Option<&Pod>) -> String {
    match pod {
        None => String::new(),
        Some(Pod { namespace, name, container, .. }) => {
            let mut text = format!("{}/{}", safe(namespace), safe(name));
            if let Some(container) = container {
                text.push('/');
                text.push_str(&safe(container));
            }
            text
        }
    }
}

/// Lines of `LABEL  value`, as `driftd show` prints them. The lines that continue a value
/// have an empty label.
pub(super) struct Lines(pub(super) String);

impl Lines {
    pub(super) fn add(&mut self, label: &str, value: &str) {
        writeln!(self.0, "{label:<11} {value}").expect("writing to a String cannot fail");
    }

    pub(super) fn add_process(&mut self, process: &Process) {
        let mut identity = format!("pid {}", process.identity.pid);
        if let Some(uid) = process.uid {
            write!(identity, ", uid {uid}").expect("writing to a String cannot fail");
        }
        if let Some(tty) = &process.tty {
            write!(identity, ", terminal {}", safe(tty)).expect("writing to a String cannot fail");
        }
        self.add("Process", &identity);
        self.add("", &program(process.exe.as_deref(), process.argv.as_deref()));
        for ancestor in &process.ancestors {
            let program = program(ancestor.exe.as_deref(), ancestor.argv.as_deref());
            self.add("  child of", &format!("pid {}, {program}", ancestor.identity.pid));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_pasted_into_a_shell_is_one_word_there() {
        assert_eq!(shell_word("k8s.io/4f"), "k8s.io/4f");
        assert_eq!(shell_word("a;reboot"), "'a;reboot'");
        assert_eq!(shell_word("a'b"), r"'a'\''b'");
        assert_eq!(shell_word("$(x)"), "'$(x)'");
    }
}
