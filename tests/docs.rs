//! The documents, as far as a test can check them: links have a target, driftd accepts
//! the commands, and every loss, setting and named function is documented as it is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser as _;
use driftd::cli::Cli;
use driftd::health::Failure;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// Every document, by its path from the root of the tree.
fn documents() -> Vec<(PathBuf, String)> {
    let directories = ["", "docs", "docs/adr", "findings"].map(|name| root().join(name));
    let entries = directories.iter().flat_map(|directory| fs::read_dir(directory).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path());
    let documents =
        paths.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    documents.map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// The fragment of a link to a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

fn anchors(document: &str) -> BTreeSet<String> {
    let headings = document.lines().filter(|line| line.starts_with('#'));
    headings.map(|line| anchor(line.trim_start_matches('#'))).collect()
}

#[test]
fn every_link_has_a_target() {
    let mut dead = Vec::new();
    for (path, text) in documents() {
        for rest in text.split("](").skip(1) {
            let link = rest.split(')').next().unwrap();
            if link.contains("://") || link.contains(' ') {
                continue;
            }
            let (file, fragment) = link.split_once('#').unwrap_or((link, ""));
            let target =
                if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            let is_there = target.exists()
                && (fragment.is_empty()
                    || anchors(&fs::read_to_string(&target).unwrap()).contains(fragment));
            if !is_there {
                dead.push(format!("{}: {link}", path.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(dead.is_empty(), "{dead:#?}");
}

/// The words of a command as a shell splits them, without redirections and comments.
fn words(command: &str) -> Vec<String> {
    let (mut words, mut quote) = (vec![String::new()], None);
    for c in command.chars() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None, '#' | '>' | '|') => break,
            (None, ' ') => words.push(String::new()),
            (Some(_) | None, _) => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn every_command_in_the_documents_is_valid() {
    let mut count = 0;
    for (path, text) in documents() {
        for line in text.lines() {
            let Some(line) = line.trim_start().strip_prefix("$ ") else { continue };
            let line = line.strip_prefix("sudo ").unwrap_or(line);
            if line.split(' ').next() != Some("driftd") {
                continue;
            }
            count += 1;
            let parsed = Cli::try_parse_from(words(line));
            assert!(parsed.is_ok(), "{}: {line}\n{}", path.display(), parsed.unwrap_err());
        }
    }
    assert!(count > 30, "only {count} commands were found");
}

#[test]
fn every_loss_has_a_line_with_advice_for_operators() {
    let operating = read("docs/operating.md");
    let first_cells: String =
        operating.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()).collect();
    let names = Failure::ALL.map(Failure::name);
    let missing: Vec<_> =
        names.into_iter().filter(|name| !first_cells.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_setting_is_documented() {
    fn keys(prefix: &str, table: &toml::Table, into: &mut Vec<String>) {
        for (key, value) in table {
            let name = format!("{prefix}{key}");
            match value {
                toml::Value::Table(table) => keys(&format!("{name}."), table, into),
                _ => into.push(name),
            }
        }
    }
    let mut all = Vec::new();
    keys("", &read("systemd/driftd.toml").parse().unwrap(), &mut all);
    assert!(all.len() > 20, "{all:?}");
    let settings = read("docs/settings.md");
    all.retain(|name| !settings.contains(&format!("| `{name}` |")));
    assert!(all.is_empty(), "{all:?}");
}

/// The cells of a table's rows below a heading.
fn rows<'a>(document: &'a str, heading: &str) -> Vec<Vec<&'a str>> {
    let (_, section) = document.split_once(heading).unwrap();
    let lines = section.lines().take_while(|line| !line.starts_with("## "));
    let rows = lines.filter(|line| line.starts_with("| ")).skip(1);
    rows.map(|row| row.trim_matches('|').split(" | ").map(str::trim).collect()).collect()
}

/// The texts in backticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn the_lives_of_an_event_and_of_an_image_name_existing_functions() {
    let architecture = read("ARCHITECTURE.md");
    for heading in ["## The life of an event", "## The life of an image"] {
        let rows = rows(&architecture, heading);
        assert!(rows.len() > 7, "{rows:?}");
        for row in rows {
            let files: String = quoted(row[1]).into_iter().map(read).collect();
            for function in quoted(row[2]) {
                let is_there = ["(", "<"].map(|end| files.contains(&format!("fn {function}{end}")));
                assert!(is_there.contains(&true), "{function} is not in {}", row[1]);
            }
        }
    }
}

#[test]
fn the_glossary_is_short_and_in_order() {
    let architecture = read("ARCHITECTURE.md");
    let words: Vec<&str> =
        rows(&architecture, "## Glossary").into_iter().map(|row| row[0]).collect();
    assert!(words.is_sorted() && words.len() <= 40, "{words:?}");
}

#[test]
fn the_readme_has_at_most_200_lines() {
    let lines = read("README.md").lines().count();
    assert!(lines <= 200, "{lines} lines");
}

#[test]
fn the_worked_example_of_a_new_kind_names_files_and_functions_that_exist() {
    let contributing = read("CONTRIBUTING.md");
    let rows = rows(&contributing, "## Add a finding kind");
    assert!(rows.len() > 7, "{rows:?}");
    // The second table has a header of its own.
    for row in rows.into_iter().filter(|row| row[0] != "step") {
        let paths = quoted(row[1]);
        assert!(!paths.is_empty(), "{row:?}");
        let files: String = paths.into_iter().map(read).collect();
        for name in quoted(row[2]) {
            let forms = [
                format!("fn {name}("),
                format!("fn {name}<"),
                format!("macro_rules! {name} "),
                format!("const {name}:"),
            ];
            assert!(forms.iter().any(|form| files.contains(form)), "{name} is not in {}", row[1]);
        }
    }
}
