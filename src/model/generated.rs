//! Which names are generated: those of temporary files, of numbered steps, of directories
//! that are unpacked anew at each start. Pure.
//!
//! A name only decides which findings are aggregated and which exceptions are proposed, never a
//! severity.

use super::RootfsPath;

/// Directories for files that are needed for a moment.
const TEMPORARY: &[&[u8]] = &[b"/tmp/", b"/var/tmp/"];

/// A path with a `*` for each part that looks generated; `None` if no part does. A file
/// in a directory for temporary files leaves only the directory: one program makes up names in
/// more than one way.
pub fn pattern(path: &RootfsPath) -> Option<Vec<u8>> {
    let pattern = by_parts(path)?;
    let directory = TEMPORARY.iter().find(|directory| pattern.starts_with(directory));
    let is_made_up = |rest: &[u8]| {
        let mut names = rest.split(|&byte| byte == b'/');
        names.all(|name| name.contains(&b'*'))
    };
    match directory {
        Some(directory) if is_made_up(&pattern[directory.len()..]) => {
            Some([directory, &b"*"[..]].concat())
        }
        _ => Some(pattern),
    }
}

fn by_parts(path: &RootfsPath) -> Option<Vec<u8>> {
    let mut pattern = Vec::new();
    let mut is_generated = false;
    let mut names = path.relative().split(|&byte| byte == b'/').peekable();
    while let Some(name) = names.next() {
        pattern.push(b'/');
        if add_temporary(name, &mut pattern) {
            // A directory that was made for one run: its files were too.
            if names.peek().is_some() {
                pattern.extend(b"/*");
            }
            return Some(pattern);
        }
        is_generated |= add(name, &mut pattern);
    }
    is_generated.then_some(pattern)
}

/// Adds the name of a temporary file or directory, if it looks like one.
fn add_temporary(name: &[u8], pattern: &mut Vec<u8>) -> bool {
    // mktemp and similar programs: a prefix, then anything.
    for prefix in [b"tmp.".as_slice(), b"_MEI", b"ansible-tmp-"] {
        if name.len() >= prefix.len() + 5 && name.starts_with(prefix) {
            pattern.extend([prefix, b"*"].concat());
            return true;
        }
    }
    let stem = name.split(|&byte| byte == b'.').next().unwrap_or(name);
    // A directory of autoconf's, a script of Jenkins': a word that is not set apart.
    for (prefix, lengths) in [(b"conf".as_slice(), 6..=6), (b"jenkins", 8..=20)] {
        if let Some(rest) = stem.strip_prefix(prefix)
            && lengths.contains(&rest.len())
            && looks_random(rest)
        {
            pattern.extend([prefix, b"*", &name[stem.len()..]].concat());
            return true;
        }
    }
    // Python's: a prefix, by default `tmp`, and eight characters, perhaps with a suffix.
    let Some(at) = stem.len().checked_sub(8) else { return false };
    if stem[..at].ends_with(b"tmp") {
        pattern.extend([&stem[..at], b"*", &name[stem.len()..]].concat());
        return true;
    }
    false
}

/// Whether these may be mktemp's characters, and are no word.
fn looks_random(part: &[u8]) -> bool {
    part.iter().all(u8::is_ascii_alphanumeric) && !part.iter().all(u8::is_ascii_lowercase)
}

/// Adds one name of a path. True if a part of it looks generated.
fn add(name: &[u8], pattern: &mut Vec<u8>) -> bool {
    // The rest is the version of a library, or of the program that loads it.
    let cut = |mark: &[u8]| name.windows(mark.len()).position(|part| part == mark);
    let stem = cut(b".cpython-").or_else(|| cut(b".so")).map_or(name, |at| &name[..at]);
    let mut is_generated = false;
    let mut rest = stem;
    while let Some(&first) = rest.first() {
        let is_part = first.is_ascii_alphanumeric();
        let length = rest
            .iter()
            .position(|byte| byte.is_ascii_alphanumeric() != is_part)
            .unwrap_or(rest.len());
        let (part, after) = rest.split_at(length);
        // Adjacent generated parts become one `*`: their number may be random.
        let goes_on = pattern.ends_with(b"*-") || pattern.ends_with(b"*_");
        let is_more = goes_on && part.iter().all(u8::is_ascii_hexdigit);
        let is_numbered = part.len() >= 3 || !pattern.ends_with(b".");
        if is_part && (is_more || is_numbered && looks_generated(part)) {
            is_generated = true;
            if goes_on {
                pattern.pop();
            } else {
                pattern.push(b'*');
            }
        } else {
            pattern.extend(part);
        }
        rest = after;
    }
    pattern.extend(&name[stem.len()..]);
    is_generated
}

/// Whether letters and digits look like a number or random characters, and not like a word.
fn looks_generated(part: &[u8]) -> bool {
    let digits = part.iter().filter(|byte| byte.is_ascii_digit()).count();
    if digits == part.len() {
        return true;
    }
    if part.len() < 5 {
        return false;
    }
    let ends_in_digits = part[part.len() - digits..].iter().all(u8::is_ascii_digit);
    if digits > 0 {
        // `worker12`, `python3` and `libssl3` are words with a number; a number of many
        // digits (a pid, a time) is generated.
        let letters = &part[..part.len() - digits];
        return !ends_in_digits
            || digits >= 5
            || is_hexadecimal(part)
            || looks_generated_of_letters(letters);
    }
    looks_generated_of_letters(part)
}

fn looks_generated_of_letters(part: &[u8]) -> bool {
    let changes = part
        .windows(2)
        .filter(|pair| pair[0].is_ascii_lowercase() && pair[1].is_ascii_uppercase())
        .count();
    let capitals = part.iter().filter(|byte| byte.is_ascii_uppercase()).count();
    // Capitals that begin no word: another capital follows, or nothing.
    let alone = part.iter().zip(part.iter().skip(1).map(Some).chain([None]));
    let alone = alone
        .filter(|(one, next)| one.is_ascii_uppercase() && next.is_none_or(u8::is_ascii_uppercase))
        .count();
    // `fooBarBaz` has as many capitals as words.
    let is_mixed = changes > 0 && (capitals > changes + 1 || alone > 1);
    is_mixed || longest_without_vowel(part) >= 6
}

fn is_hexadecimal(part: &[u8]) -> bool {
    part.len() >= 8 && part.iter().all(u8::is_ascii_hexdigit)
}

fn longest_without_vowel(part: &[u8]) -> usize {
    let is_vowel = |byte: &u8| b"aeiouy".contains(&byte.to_ascii_lowercase());
    part.split(is_vowel).map(<[u8]>::len).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(path: &str, expected: Option<&str>) {
        let found = pattern(&RootfsPath::new(path).unwrap());
        let found = found.map(|pattern| String::from_utf8(pattern).unwrap());
        assert_eq!(found.as_deref(), expected, "{path}");
    }

    #[test]
    fn w06_generated_names_are_recognised() {
        check("/tmp/tmp.kdPeaKxyzA", Some("/tmp/*"));
        check("/srv/tmp.abcdef", Some("/srv/tmp.*"));
        check("/tmp/tmpab_defgh.sh", Some("/tmp/*"));
        check("/srv/tmpab_defgh.sh", Some("/srv/tmp*.sh"));
        check("/srv/_MEIx9Q2ab/libfoo.so", Some("/srv/_MEI*/*"));
        check("/var/tmp/_MEIx9Q2ab/libfoo.so", Some("/var/tmp/*"));
        check("/tmp/tmp.abcdef/evil", Some("/tmp/*"));
        check("/tmp/12345/evil.sh", Some("/tmp/*/evil.sh"));
        check("/src/confH8xKQd/subs.awk", Some("/src/conf*/*"));
        check("/home/runner/_work/_temp/17.sh", Some("/home/runner/_work/_temp/*.sh"));
        check("/w/_temp/0b7e2c1a-94d3-4b1f-8a55-6f0e1d2c3b4a.sh", Some("/w/_temp/*.sh"));
        check("/j/w@tmp/durable-1a2b3c4d/script.sh", Some("/j/w@tmp/durable-*/script.sh"));
        check(
            "/root/.ansible/tmp/ansible-tmp-1700000000.1-2-3/AnsiballZ_ping.py",
            Some("/root/.ansible/tmp/ansible-tmp-*/*"),
        );
        check("/tmp/airflowtmpk2_lw0ab/tmpx1_2y3zq", Some("/tmp/*"));
        check("/w/airflowtmpk2_lw0ab/tmpx1_2y3zq", Some("/w/airflowtmp*/*"));
        check("/tmp/jenkinszeWGbCfjjkm6.sh", Some("/tmp/*"));
        check("/tmp/jenkinsBoxbOlIsDbO7.sh", Some("/tmp/*"));
        check("/tmp/jenkinsKasxantDPdya.sh", Some("/tmp/*"));
        check("/w/jenkinsKasxantDPdya.sh", Some("/w/jenkins*.sh"));
        check("/tmp/jenkinsClavDJozucfI.sh", Some("/tmp/*"));
        check("/tmp/jenkinsMVefgAipyP87.sh", Some("/tmp/*"));
        check("/tmp/kqzvbnmx", Some("/tmp/*"));
        check("/tmp/aQx7Zk", Some("/tmp/*"));
    }

    #[test]
    fn w06_words_are_kept_apart() {
        for word in [
            "/tmp/x",
            "/tmp/evil.sh",
            "/tmp/nc",
            "/tmp/x12",
            "/tmp/worker12",
            "/usr/lib/python3.11/x",
            "/usr/lib/libcuda.so.550.54",
            "/usr/lib/libssl.so",
            "/opt/venv/lib/fast.cpython-311-x86_64-linux-gnu.so",
            "/opt/myScript",
            "/opt/fooBarBaz",
            "/opt/ThreadSafeA",
            "/opt/AnsiballZ_ping.py",
            "/usr/bin/systemd",
            "/tmp/payload",
            "/tmp/linpeas.sh",
            "/tmp/jenkins-agent.sh",
            "/tmp/jenkinsbackup.sh",
            "/src/conference/x.sh",
            "/src/confidence/x.sh",
        ] {
            check(word, None);
        }
    }
}
