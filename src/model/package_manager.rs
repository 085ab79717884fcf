//! Package managers, as they are known by their name and arguments.
//!
//! Whether such a program is the image's own is for the caller to decide.

use super::programs;

/// How a package manager runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackageManager<'a> {
    /// The executed file itself.
    Program,
    /// A script or a module of an interpreter; the script's path, if there is one.
    Script(Option<&'a str>),
}

/// Whether a program with these arguments changes what is installed, by its name alone.
pub fn package_manager<'a>(exe: &str, argv: &'a [String]) -> Option<PackageManager<'a>> {
    let name = file_name(exe);
    let arguments = argv.get(1..).unwrap_or_default();
    if let Some(verbs) = programs::installs_with(name.as_bytes()) {
        return has_verb(arguments, verbs).then_some(PackageManager::Program);
    }
    if !programs::runs_installers(name.as_bytes()) {
        return None;
    }
    // `python3 -m pip install`, `python3 /usr/bin/pip install`, `node .../npm-cli.js install`.
    let (tool, script, rest) = match (module(arguments), arguments) {
        (Some((module, rest)), _) => (module, None, rest),
        (None, all) => {
            let at = all.iter().position(|argument| !argument.starts_with('-'))?;
            (file_name(&all[at]), Some(all[at].as_str()), &all[at + 1..])
        }
    };
    let tool = tool.trim_end_matches(".js").trim_end_matches("-cli");
    let tool = programs::without_version(tool.as_bytes());
    let verbs = programs::script_installs_with(tool)?;
    has_verb(rest, verbs).then_some(PackageManager::Script(script))
}

/// Whether a program of this name can be a package manager, with the right arguments.
pub fn may_be_package_manager(exe: &str) -> bool {
    programs::may_install(file_name(exe).as_bytes())
}

/// The module that Python runs, and its arguments: `-m pip`, `-Im ensurepip`,
/// `-W ignore -m pip`.
fn module(arguments: &[String]) -> Option<(&str, &[String])> {
    match arguments {
        [option, _value, rest @ ..] if option == "-W" || option == "-X" => module(rest),
        [flag, module, rest @ ..] if is_short(flag) && flag.ends_with('m') => Some((module, rest)),
        // After `-c` and code, all the rest are arguments of that code.
        [flag, rest @ ..] if flag.starts_with('-') && !(is_short(flag) && flag.contains('c')) => {
            module(rest)
        }
        _ => None,
    }
}

fn is_short(flag: &str) -> bool {
    flag.strip_prefix('-').is_some_and(|letters| !letters.starts_with('-'))
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

/// Whether there are no `verbs`, or one of them is among the first two words that are not
/// options. An option may have a value, so the first word need not be the verb.
fn has_verb(arguments: &[String], verbs: &[&str]) -> bool {
    let words = arguments.iter().filter(|argument| !argument.starts_with('-')).take(2);
    verbs.is_empty() || words.into_iter().any(|word| verbs.contains(&word.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(exe: &str, command: &str, expected: Option<PackageManager<'_>>) {
        let argv: Vec<String> = command.split(' ').map(ToOwned::to_owned).collect();
        assert_eq!(package_manager(exe, &argv), expected, "{command}");
    }

    #[test]
    fn a_package_manager_is_known_by_its_name_and_an_interpreter_by_what_it_runs() {
        use PackageManager::{Program, Script};
        check("/usr/bin/dpkg", "dpkg -i x.deb", Some(Program));
        check("/sbin/apk", "apk add socat", Some(Program));
        check("/usr/bin/cargo", "cargo install x", Some(Program));
        check("/usr/bin/cargo", "cargo run", None);
        check("/usr/bin/python3.11", "python3 -m pip install x", Some(Script(None)));
        // w19: these fill an environment, and bring `*.pth`.
        check("/usr/bin/python3.9", "/venv/bin/python -Im ensurepip --upgrade", Some(Script(None)));
        check("/usr/bin/python3", "python3 -u -W ignore -m pip install x", Some(Script(None)));
        check("/usr/bin/python3", "python3 -m http.server -m pip install", None);
        check("/usr/bin/python3", "python3 -c code -m pip install", None);
        check("/usr/bin/python3", "python3 server.py -m pip install", None);
        let poetry = Some(Script(Some("/opt/venv/bin/poetry")));
        check("/usr/bin/python3.11", "/opt/venv/bin/python /opt/venv/bin/poetry install", poetry);
        let pip = Some(Script(Some("/usr/bin/pip3")));
        check("/usr/bin/python3.11", "/usr/bin/python3 /usr/bin/pip3 install x", pip);
        check("/usr/bin/python3.11", "python3 /usr/bin/pip3 list", None);
        check("/usr/bin/python3.11", "python3 server.py", None);
        let npm = Some(Script(Some("/usr/lib/npm/bin/npm-cli.js")));
        check("/usr/bin/node", "node /usr/lib/npm/bin/npm-cli.js --silent install y", npm);
        check("/usr/bin/node", "node /usr/lib/npm/bin/npm-cli.js start", None);
        check("/bin/sh", "sh -c dpkg", None);
    }
}
