//! What an interpreter was started on, by its name and its arguments.
//!
//! This is best effort: a program can read any file as a script without naming it. The file
//! holds how the usual interpreters parse their command line. A command line that is not
//! understood is no script. Everything is decided by value and nothing is read: `interpreters`
//! reads the arguments, and `libraries` asks [`may_interpret`]. The names of programs are in
//! `model::programs`.

use crate::model::programs;

pub(crate) use crate::model::programs::Language;

/// What an interpreter runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Runs {
    /// The file of this name, as the name was given to the program.
    File(Vec<u8>),
    /// The text on its standard input.
    Input,
    /// Text among its arguments, a module by its name, or nothing of its own.
    Inline,
}

/// A dynamic linker, which runs the program that it is given.
pub(crate) fn is_linker(path: &[u8]) -> bool {
    programs::is_dynamic_linker(file_name(path))
}

/// The program that a dynamic linker was given, and that program's arguments, which begin
/// with its name.
fn behind_linker(arguments: &[Vec<u8>]) -> Option<(&[u8], &[Vec<u8>])> {
    const WITH_VALUE: &[&[u8]] = &[
        b"--argv0",
        b"--audit",
        b"--glibc-hwcaps-mask",
        b"--glibc-hwcaps-prepend",
        b"--inhibit-rpath",
        b"--library-path",
        b"--preload",
    ];
    let mut at = 1;
    while let Some(argument) = arguments.get(at) {
        match argument.as_slice() {
            option if WITH_VALUE.contains(&option) => at += 2,
            [b'-', ..] => at += 1,
            program => return Some((program, &arguments[at..])),
        }
    }
    None
}

fn file_name(path: &[u8]) -> &[u8] {
    path.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
}

/// Whether a program of this name may be an interpreter, so that it is worth
/// reading its arguments.
pub(crate) fn may_interpret(program: &[u8]) -> bool {
    let name = file_name(program);
    programs::is_multicall(name) || programs::language(name).is_some() || is_linker(name)
}

/// Which interpreter this is: by its file's own name, or by the name that it was started
/// with if the file is a multi-call program. Also returns its arguments behind its name.
pub(crate) fn interpreter<'a>(
    program: &[u8],
    arguments: &'a [Vec<u8>],
) -> Option<(Language, &'a [Vec<u8>])> {
    let name = file_name(program);
    if is_linker(name) {
        let (program, arguments) = behind_linker(arguments)?;
        return if is_linker(program) { None } else { interpreter(program, arguments) };
    }
    let (first, rest) = arguments.split_first()?;
    // A login shell's name begins with a dash.
    let started_as = file_name(first.strip_prefix(b"-").unwrap_or(first));
    if programs::is_multicall(name) && programs::is_multicalls_own_name(started_as) {
        let (applet, rest) = rest.split_first()?;
        return Some((programs::language(file_name(applet))?, rest));
    }
    // Links to a multi-call program have its content and a name of their own.
    let language = programs::language(if programs::is_multicall(name) { started_as } else { name });
    Some((language?, rest))
}

/// What it runs; `arguments` begin behind the interpreter's own name.
pub(crate) fn runs(language: Language, arguments: &[Vec<u8>]) -> Runs {
    match language {
        Language::Shell => shell(arguments),
        Language::Python => python(arguments),
        Language::Perl => perl(arguments),
        Language::Ruby => ruby(arguments),
        Language::Node => node(arguments),
        Language::Php => php(arguments),
        Language::Lua => lua(arguments),
        Language::Tcl => tcl(arguments),
        Language::Awk => awk(arguments),
    }
}

/// The script is the first operand; without one, or for `-`, the standard input.
fn operand(argument: Option<&Vec<u8>>) -> Runs {
    match argument {
        None => Runs::Input,
        Some(name) if name == b"-" => Runs::Input,
        Some(name) => Runs::File(name.clone()),
    }
}

fn shell(arguments: &[Vec<u8>]) -> Runs {
    let mut rest = arguments.iter();
    let mut reads_input = false;
    while let Some(argument) = rest.next() {
        match argument.as_slice() {
            b"--" | b"-" => return if reads_input { Runs::Input } else { operand(rest.next()) },
            b"--rcfile" | b"--init-file" => {
                rest.next();
            }
            [b'-', b'-', ..] => (),
            [b'-' | b'+', cluster @ ..] if !cluster.is_empty() => {
                if argument[0] == b'-' && cluster.contains(&b'c') {
                    return Runs::Inline;
                }
                reads_input |= argument[0] == b'-' && cluster.contains(&b's');
                // Each names an option of the shell in an argument of its own.
                for _ in cluster.iter().filter(|option| matches!(option, b'o' | b'O')) {
                    rest.next();
                }
            }
            _ if reads_input => return Runs::Input,
            _ => return Runs::File(argument.clone()),
        }
    }
    Runs::Input
}

/// Parses options like getopt(3): a cluster of letters behind one dash, where a letter of
/// `with_value` takes the rest of the argument or else the next one, and a letter of
/// `with_attached` only the rest. `inline` letters mean that the value is the program's text.
/// Stops behind the options.
fn clusters<'a>(
    arguments: &'a [Vec<u8>],
    with_value: &[u8],
    with_attached: &[u8],
    inline: &[u8],
) -> Result<std::slice::Iter<'a, Vec<u8>>, Runs> {
    let mut rest = arguments.iter();
    loop {
        let here = rest.clone();
        let Some(argument) = rest.next() else { return Ok(here) };
        match argument.as_slice() {
            b"--" => return Ok(rest),
            [b'-', b'-', ..] => (),
            [b'-', cluster @ ..] if !cluster.is_empty() => {
                for (index, option) in cluster.iter().enumerate() {
                    if inline.contains(option) {
                        return Err(Runs::Inline);
                    }
                    if with_attached.contains(option) {
                        break;
                    }
                    if with_value.contains(option) {
                        if index + 1 == cluster.len() {
                            rest.next();
                        }
                        break;
                    }
                }
            }
            _ => return Ok(here),
        }
    }
}

fn python(arguments: &[Vec<u8>]) -> Runs {
    // The only long option whose value stands by itself.
    let skip = arguments.iter().position(|argument| argument == b"--check-hash-based-pycs");
    if let Some(skip) = skip {
        let mut others = arguments.to_vec();
        others.drain(skip..(skip + 2).min(others.len()));
        return python(&others);
    }
    match clusters(arguments, b"WXQ", b"", b"cm") {
        Ok(mut rest) => operand(rest.next()),
        Err(runs) => runs,
    }
}

fn perl(arguments: &[Vec<u8>]) -> Runs {
    match clusters(arguments, b"I", b"MmiFx0lCDdV", b"eE") {
        Ok(mut rest) => operand(rest.next()),
        Err(runs) => runs,
    }
}

fn ruby(arguments: &[Vec<u8>]) -> Runs {
    match clusters(arguments, b"IrCE", b"FxKTW0i", b"e") {
        Ok(mut rest) => operand(rest.next()),
        Err(runs) => runs,
    }
}

fn node(arguments: &[Vec<u8>]) -> Runs {
    const WITH_VALUE: &[&[u8]] = &[
        b"-r",
        b"--require",
        b"--import",
        b"--loader",
        b"--experimental-loader",
        b"-C",
        b"--conditions",
        b"--env-file",
        b"--icu-data-dir",
        b"--input-type",
        b"--title",
        b"--redirect-warnings",
        b"--openssl-config",
    ];
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_slice() {
            b"--" | b"inspect" => return operand(rest.next()),
            b"-e" | b"--eval" | b"-p" | b"--print" | b"-pe" | b"-i" | b"--interactive" | b"-v"
            | b"--version" => return Runs::Inline,
            option if option.starts_with(b"--eval=") || option.starts_with(b"--print=") => {
                return Runs::Inline;
            }
            option if WITH_VALUE.contains(&option) => {
                rest.next();
            }
            [b'-', _, ..] => (),
            _ => return operand(Some(argument)),
        }
    }
    Runs::Input
}

fn php(arguments: &[Vec<u8>]) -> Runs {
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_slice() {
            b"--" => return operand(rest.next()),
            b"-f" | b"-F" | b"--file" | b"--process-file" => return operand(rest.next()),
            [b'-', b'f' | b'F', name @ ..] => return Runs::File(name.to_vec()),
            // Text, or only a request for information about PHP itself.
            [b'-', b'r' | b'R' | b'B' | b'E' | b'a' | b'i' | b'm' | b'v' | b'h', ..]
            | b"--run"
            | b"--process-code"
            | b"--interactive"
            | b"--version"
            | b"--info"
            | b"--modules" => return Runs::Inline,
            b"-c" | b"-d" | b"-z" | b"-t" | b"-S" | b"--php-ini" | b"--define" | b"--docroot"
            | b"--server" => {
                rest.next();
            }
            [b'-', _, ..] => (),
            _ => return operand(Some(argument)),
        }
    }
    // The built-in server reads no program.
    let is_server = arguments.iter().any(|argument| argument.starts_with(b"-S"));
    if is_server { Runs::Inline } else { Runs::Input }
}

fn lua(arguments: &[Vec<u8>]) -> Runs {
    let mut rest = arguments.iter();
    let mut has_text = false;
    while let Some(argument) = rest.next() {
        match argument.as_slice() {
            b"--" => return operand(rest.next()),
            b"-e" => {
                has_text = true;
                rest.next();
            }
            [b'-', b'e', ..] => has_text = true,
            b"-l" | b"-j" => {
                rest.next();
            }
            // Prints its version; a prompt follows only where there is a terminal.
            b"-v" => has_text = true,
            [b'-', _, ..] => (),
            _ => return operand(Some(argument)),
        }
    }
    if has_text { Runs::Inline } else { Runs::Input }
}

fn tcl(arguments: &[Vec<u8>]) -> Runs {
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_slice() {
            b"--" => return operand(rest.next()),
            b"-c" => return Runs::Inline,
            b"-f" | b"-b" => return operand(rest.next()),
            b"-encoding" => {
                rest.next();
            }
            [b'-', _, ..] => (),
            _ => return operand(Some(argument)),
        }
    }
    Runs::Input
}

fn awk(arguments: &[Vec<u8>]) -> Runs {
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_slice() {
            b"-f" | b"-E" | b"--file" | b"--exec" => return operand(rest.next()),
            [b'-', b'f' | b'E', name @ ..] => return Runs::File(name.to_vec()),
            b"-v" | b"-F" | b"--assign" | b"--field-separator" | b"-i" | b"--include" | b"-l"
            | b"--load" => {
                rest.next();
            }
            argument => {
                if let Some(name) = argument.strip_prefix(b"--file=") {
                    return Runs::File(name.to_vec());
                }
                if !argument.starts_with(b"-") || argument == b"--" {
                    break;
                }
            }
        }
    }
    Runs::Inline
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `PROGRAM: ARGV…` and `file NAME`, `input`, `inline` or `none`.
    #[track_caller]
    fn check(line: &str, expected: &str) {
        let (program, arguments) = line.split_once(": ").unwrap();
        let arguments: Vec<Vec<u8>> =
            arguments.split(' ').map(|argument| argument.as_bytes().to_vec()).collect();
        let result = match interpreter(program.as_bytes(), &arguments)
            .map(|(language, rest)| runs(language, rest))
        {
            None => "none".to_owned(),
            Some(Runs::Inline) => "inline".to_owned(),
            Some(Runs::Input) => "input".to_owned(),
            Some(Runs::File(name)) => format!("file {}", String::from_utf8(name).unwrap()),
        };
        assert_eq!(result, expected, "{line}");
    }

    #[test]
    fn a09_a_shell_runs_its_first_operand() {
        check("/bin/dash: sh /tmp/i.sh", "file /tmp/i.sh");
        check("/bin/dash: sh -e -x ./i.sh -c", "file ./i.sh");
        check("/bin/bash: bash -eu -o pipefail i.sh", "file i.sh");
        check("/bin/bash: bash -euo pipefail i.sh", "file i.sh");
        check("/bin/bash: bash +o histexpand -O extglob i.sh", "file i.sh");
        check("/bin/bash: bash --norc --rcfile /x --posix i.sh", "file i.sh");
        check("/bin/bash: bash -- -c", "file -c");
        check("/bin/bash: -bash i.sh", "file i.sh");
        check("/usr/bin/zsh: zsh -f i.sh", "file i.sh");
        check("/usr/bin/ksh93: ksh i.sh", "file i.sh");
    }

    #[test]
    fn a_command_among_the_arguments_is_no_script() {
        check("/bin/dash: sh -c exec\\ 9>x", "inline");
        check("/bin/dash: sh -ec x y", "inline");
        check("/bin/bash: bash -lc x", "inline");
        check("/bin/bash: bash -o pipefail -c x", "inline");
        check("/usr/bin/python3.11: python3 -c x y.py", "inline");
        check("/usr/bin/python3.11: python3 -Bm http.server", "inline");
        check("/usr/bin/perl: perl -ne print file", "inline");
        check("/usr/bin/ruby3.1: ruby -rset -e x", "inline");
        check("/usr/bin/node: node --eval x", "inline");
        check("/usr/bin/php8.2: php -r x", "inline");
        check("/usr/bin/lua5.4: lua -e x", "inline");
        check("/usr/bin/mawk: awk -F : {print} /etc/passwd", "inline");
    }

    #[test]
    fn a08_without_an_operand_the_input_is_the_script() {
        check("/bin/dash: sh", "input");
        check("/bin/dash: sh -s -- argument", "input");
        check("/bin/bash: bash -s argument", "input");
        check("/bin/bash: bash -i", "input");
        check("/bin/dash: sh -", "input");
        check("/usr/bin/python3: python3 -", "input");
        check("/usr/bin/python3: python3 -u", "input");
        check("/usr/bin/perl: perl -w", "input");
        check("/usr/bin/node: node -", "input");
        check("/usr/bin/php: php", "input");
        check("/usr/bin/tclsh8.6: tclsh", "input");
    }

    #[test]
    fn a_multi_call_program_is_known_by_the_name_it_was_started_with() {
        check("/bin/busybox: busybox sh /tmp/i.sh", "file /tmp/i.sh");
        check("/bin/busybox: /bin/busybox ash -c x", "inline");
        check("/bin/busybox: sh /tmp/i.sh", "file /tmp/i.sh");
        check("/bin/busybox: /bin/sh /tmp/i.sh", "file /tmp/i.sh");
        check("/bin/busybox: awk -f /tmp/x.awk", "file /tmp/x.awk");
        check("/bin/busybox: cat /tmp/i.sh", "none");
        check("/bin/busybox: busybox", "none");
        check("/bin/busybox: busyboxx sh /tmp/i.sh", "file /tmp/i.sh");
        check("/bin/busybox: busybox.anything ash -c x", "inline");
        // Another name in its arguments does not make a program another one.
        check("/bin/cat: sh /tmp/i.sh", "none");
        check("/bin/dash: cat /tmp/i.sh", "file /tmp/i.sh");
    }

    #[test]
    fn x08_a_dynamic_linker_runs_the_interpreter_that_it_is_given() {
        check("/lib64/ld-linux-x86-64.so.2: ld.so /bin/dash /tmp/i.sh", "file /tmp/i.sh");
        check("/lib/ld-musl-x86_64.so.1: x --library-path /l /bin/busybox sh i.sh", "file i.sh");
        check("/lib/ld-musl-x86_64.so.1: x --argv0 sh /usr/bin/python3 i.py", "file i.py");
        check("/lib64/ld-linux-x86-64.so.2: x --preload /x.so /bin/ls", "none");
        check("/lib64/ld-linux-x86-64.so.2: x", "none");
        check("/lib64/ld-linux-x86-64.so.2: x /lib64/ld-linux-x86-64.so.2 /bin/sh i", "none");
    }

    #[test]
    fn options_with_values_do_not_hide_the_script() {
        check("/usr/bin/python3.11: python3 -W ignore -X dev -B x.py", "file x.py");
        check("/usr/bin/python3.11: python3 -Wignore -uB x.py -c", "file x.py");
        check("/usr/bin/python3.11: python --check-hash-based-pycs always x.py", "file x.py");
        check("/usr/bin/perl5.36.0: perl -w -I lib -Mstrict x.pl", "file x.pl");
        check("/usr/bin/perl: perl -Ilib x.pl", "file x.pl");
        check("/usr/bin/ruby3.1: ruby -I lib -r set x.rb", "file x.rb");
        check("/usr/bin/node: node -r ts-node/register --inspect x.js -e", "file x.js");
        check("/usr/bin/node: node --max-old-space-size=99 x.js", "file x.js");
        check("/usr/bin/php8.2: php -d a=b -f x.php", "file x.php");
        check("/usr/bin/php8.2: php -d a=b x.php", "file x.php");
        check("/usr/bin/php8.2: php -S 0.0.0.0:80", "inline");
        check("/usr/bin/php8.2: php -S 0.0.0.0:80 router.php", "file router.php");
        check("/usr/bin/lua5.4: lua -l m x.lua", "file x.lua");
        check("/usr/bin/lua5.4: lua -e x x.lua", "file x.lua");
        check("/usr/bin/expect: expect -f x.exp", "file x.exp");
        check("/usr/bin/gawk: gawk -v a=b --file=x.awk", "file x.awk");
        check("/usr/bin/gawk: gawk -F: -fx.awk", "file x.awk");
    }

    #[test]
    fn other_programs_interpret_nothing() {
        check("/usr/sbin/php-fpm8.2: php-fpm -c x", "none");
        check("/usr/bin/ssh: ssh host", "none");
        check("/usr/bin/pythonx: pythonx x", "none");
        assert!(may_interpret(b"/usr/bin/python3.11"));
        assert!(may_interpret(b"/bin/busybox"));
        assert!(!may_interpret(b"/usr/bin/ls"));
        assert!(!may_interpret(b""));
        assert!(!may_interpret(b"/usr/bin/7"));
    }

    proptest::proptest! {
        #[test]
        fn any_arguments_are_understood_or_not(program: Vec<u8>, arguments: Vec<Vec<u8>>) {
            for name in [b"bash".as_slice(), b"python3", b"perl", b"ruby", b"node", b"php", b"lua",
                b"expect", b"awk", b"busybox", &program]
            {
                if let Some((language, rest)) = interpreter(name, &arguments) {
                    let _ = runs(language, rest);
                }
            }
        }
    }
}
