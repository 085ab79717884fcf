//! The laws of the source: plain words, short files and functions, a header in each
//! file, and no circle between the files of a room. CONTRIBUTING.md gives the reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use syn::spanned::Spanned as _;
use syn::visit::{self, Visit};

/// Lines of a file without its tests.
const MAX_FILE: usize = 800;
const MAX_FUNCTION: usize = 80;
/// Fields of a struct.
const MAX_FIELDS: usize = 15;
/// A longer function or struct begins its documentation or a comment with this, and
/// gives the reason.
const LONG: &str = "Long: ";

/// Words that have a plainer one: ARCHITECTURE.md's glossary has it.
const BANNED: &[(&str, &str)] = &[
    ("anybody", "any process, any client"),
    ("everybody", "every process, every client"),
    ("he", "it, or the user"),
    ("him", "it, or the user"),
    ("himself", "itself"),
    ("his", "its, or the user's"),
    ("nobody", "no process, no client, nothing"),
    ("somebody", "a process, a user, a client"),
    ("sweep", "scan"),
    ("sweeping", "scanning"),
    ("sweeps", "scans"),
    ("swept", "scanned"),
    ("tell", "report, show, return"),
    ("telling", "reporting, showing"),
    ("tells", "reports, shows, returns"),
    ("told", "reported, shown"),
    ("whoever", "the process, the user, the client"),
    ("whom", "the process, the user, the client"),
    ("whomever", "the process, the user, the client"),
];

/// Names that are published, and stay.
const PUBLISHED: &[&str] = &["left_to_sweeps", "sweep_interval"];

/// What is read for its words; below `src` and `tests` also for its shape.
const TEXTS: &[&str] = &[
    ".ci",
    "benches",
    "contrib",
    "docs",
    "findings",
    "fuzz/fuzz_targets",
    "proto",
    "scripts",
    "src",
    "systemd",
    "tests",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "Cargo.toml",
    "Makefile",
    "README.md",
    "SECURITY.md",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file at or below `start`, by its path from the root of the repository.
fn files_below(start: &str) -> Vec<PathBuf> {
    let mut waiting = vec![root().join(start)];
    let mut files = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).unwrap();
            waiting.extend(entries.map(|entry| entry.unwrap().path()));
        } else {
            files.push(path.strip_prefix(root()).unwrap().to_path_buf());
        }
    }
    files.sort();
    assert!(!files.is_empty(), "nothing is at {start}");
    files
}

fn is_rust(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "rs")
}

/// Whether a file holds only tests.
fn is_of_tests(file: &Path) -> bool {
    file.iter().any(|part| part == "tests" || part == "tests.rs")
}

/// The words of a line, also those of `snake_case` and `CamelCase`, in lower case.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut previous = ' ';
    for character in line.chars() {
        let begins = character.is_ascii_uppercase() && !previous.is_ascii_uppercase();
        if begins || !character.is_ascii_alphabetic() {
            words.push(String::new());
        }
        if character.is_ascii_alphabetic() {
            words.last_mut().unwrap().push(character.to_ascii_lowercase());
        }
        previous = character;
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn words_are_the_glossarys() {
    let mut wrong = Vec::new();
    for file in TEXTS.iter().flat_map(|start| files_below(start)) {
        // Test data may hold any bytes, and this file holds the list.
        if file == Path::new(file!()) {
            continue;
        }
        let Ok(text) = fs::read_to_string(root().join(&file)) else { continue };
        for (number, line) in text.lines().enumerate() {
            let line = PUBLISHED.iter().fold(line.to_owned(), |line, name| line.replace(name, ""));
            for word in words(&line) {
                if let Some((_, better)) = BANNED.iter().find(|(banned, _)| *banned == word) {
                    let at = file.display();
                    wrong.push(format!("{at}:{}: {word} (better: {better})", number + 1));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} words:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(
        words("fn try_it(HeTold: u8) // He's"),
        ["fn", "try", "it", "he", "told", "u", "he", "s"]
    );
}

#[test]
fn sentences_begin_with_their_subject() {
    let mut wrong = Vec::new();
    for file in TEXTS.iter().flat_map(|start| files_below(start)) {
        let Ok(text) = fs::read_to_string(root().join(&file)) else { continue };
        for (number, line) in text.lines().enumerate() {
            let bare = line.trim_start_matches(['/', '!', '#', '-', '*', ' ', '|']);
            if file != Path::new(file!()) && (bare.starts_with("Of ") || line.contains(". Of ")) {
                wrong.push(format!("{}:{}: {}", file.display(), number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} sentences begin with \"Of\":\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn a_file_begins_with_what_it_owns() {
    let missing: Vec<String> = files_below("src")
        .into_iter()
        .filter(|file| is_rust(file) && !is_of_tests(file))
        .filter(|file| !fs::read_to_string(root().join(file)).unwrap().starts_with("//!"))
        .map(|file| file.display().to_string())
        .collect();
    assert!(missing.is_empty(), "these files have no header: {missing:#?}");
}

/// Attributes that say that an item is there for tests alone.
fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Ident>().is_ok_and(|name| name == "test")
    })
}

/// What is longer than it may be, without a reason.
struct Lengths<'a> {
    file: &'a Path,
    lines: Vec<&'a str>,
    too_long: Vec<String>,
}

impl Lengths<'_> {
    /// Looks for a reason above an item and in its first lines.
    fn has_reason(&self, first: usize, last: usize) -> bool {
        let above = self.lines[..first - 1]
            .iter()
            .rev()
            .take_while(|line| line.trim_start().starts_with(['/', '#']));
        let inside = self.lines[first - 1..last].iter().take(3);
        above.chain(inside).any(|line| {
            line.trim_start().strip_prefix("//").is_some_and(|line| line.contains(LONG))
        })
    }

    fn check(&mut self, what: &str, name: &syn::Ident, item: proc_macro2::Span, limit: usize) {
        let (first, last) = (item.start().line, item.end().line);
        if last + 1 - first > limit && !self.has_reason(first, last) {
            let (at, lines) = (self.file.display(), last + 1 - first);
            self.too_long.push(format!("{at}:{first}: {what} {name} has {lines} lines"));
        }
    }
}

impl<'ast> Visit<'ast> for Lengths<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.check(
            "function",
            &item.sig.ident,
            item.sig.span().join(item.block.span()).unwrap(),
            MAX_FUNCTION,
        );
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.check(
            "function",
            &item.sig.ident,
            item.sig.span().join(item.block.span()).unwrap(),
            MAX_FUNCTION,
        );
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_item_struct(&mut self, item: &'ast syn::ItemStruct) {
        let (first, last) = (item.struct_token.span.start().line, item.span().end().line);
        if item.fields.len() > MAX_FIELDS && !self.has_reason(first, last) {
            let (at, fields) = (self.file.display(), item.fields.len());
            self.too_long.push(format!("{at}:{first}: struct {} has {fields} fields", item.ident));
        }
    }
}

#[test]
fn files_functions_and_structs_are_short_or_say_why_not() {
    let mut too_long = Vec::new();
    for file in files_below("src").iter().filter(|file| is_rust(file) && !is_of_tests(file)) {
        let text = fs::read_to_string(root().join(file)).unwrap();
        let parsed = syn::parse_file(&text).unwrap();
        let tests: usize = parsed
            .items
            .iter()
            .filter_map(|item| match item {
                syn::Item::Mod(module) if is_test(&module.attrs) => Some(module.span()),
                _ => None,
            })
            .map(|span| span.end().line + 1 - span.start().line)
            .sum();
        let mut lengths = Lengths { file, lines: text.lines().collect(), too_long: Vec::new() };
        let lines = lengths.lines.len() - tests;
        if lines > MAX_FILE {
            lengths.too_long.push(format!("{}: {lines} lines", file.display()));
        }
        lengths.visit_file(&parsed);
        too_long.append(&mut lengths.too_long);
    }
    assert!(
        too_long.is_empty(),
        "split these, or begin a comment with {LONG:?} and give the reason:\n{}",
        too_long.join("\n")
    );
}

/// The modules that one file names, as paths from the root of the crate.
struct Names {
    module: Vec<String>,
    paths: BTreeSet<Vec<String>>,
}

impl Names {
    /// Takes a path as it is written in this file.
    fn take(&mut self, written: &[String]) {
        let mut path = self.module.clone();
        let mut rest = written;
        match rest.first().map(String::as_str) {
            Some("crate") => {
                path.clear();
                rest = &rest[1..];
            }
            Some("self") => rest = &rest[1..],
            Some("super") => {
                while rest.first().is_some_and(|part| part == "super") {
                    path.pop();
                    rest = &rest[1..];
                }
            }
            _ => (),
        }
        path.extend_from_slice(rest);
        self.paths.insert(path);
    }

    fn take_tree(&mut self, before: &[String], tree: &syn::UseTree) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.take_tree(&with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.take(&with(&name.ident)),
            syn::UseTree::Rename(name) => self.take(&with(&name.ident)),
            syn::UseTree::Glob(_) => self.take(before),
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.take_tree(before, tree);
                }
            }
        }
    }
}

impl<'ast> Visit<'ast> for Names {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        // What a parent publishes of its children is not what it works with.
        if matches!(item.vis, syn::Visibility::Inherited) {
            self.take_tree(&[], &item.tree);
        }
    }

    /// Where an item can be seen is no use of that place.
    fn visit_vis_restricted(&mut self, _: &'ast syn::VisRestricted) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let parts: Vec<String> = path.segments.iter().map(|part| part.ident.to_string()).collect();
        if parts.len() > 1 {
            self.take(&parts);
        }
        visit::visit_path(self, path);
    }
}

/// `src/watch/core/mod.rs` and `src/watch/core.rs` are `watch::core`.
fn module_of(file: &Path) -> Vec<String> {
    let inside = file.strip_prefix("src").unwrap().with_extension("");
    let mut module: Vec<String> =
        inside.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    module
}

/// For each module the others whose items it uses.
fn uses() -> BTreeMap<Vec<String>, BTreeSet<Vec<String>>> {
    let files: Vec<PathBuf> =
        files_below("src").into_iter().filter(|file| is_rust(file) && !is_of_tests(file)).collect();
    let modules: BTreeSet<Vec<String>> = files.iter().map(|file| module_of(file)).collect();
    let uses = files.iter().map(|file| {
        let text = fs::read_to_string(root().join(file)).unwrap();
        let module = module_of(file);
        let mut names = Names { module: module.clone(), paths: BTreeSet::new() };
        names.visit_file(&syn::parse_file(&text).unwrap());
        let used = names.paths.into_iter().filter_map(|mut path| {
            while !path.is_empty() && !modules.contains(&path) {
                path.pop();
            }
            (!path.is_empty() && path != module).then_some(path)
        });
        let used = used.collect();
        (module, used)
    });
    uses.collect()
}

/// What can be reached from a module.
fn reach<'a>(
    from: &'a Vec<String>,
    uses: &'a BTreeMap<Vec<String>, BTreeSet<Vec<String>>>,
) -> BTreeSet<&'a Vec<String>> {
    let (mut reached, mut waiting) = (BTreeSet::new(), vec![from]);
    while let Some(module) = waiting.pop() {
        for used in uses.get(module).into_iter().flatten() {
            if reached.insert(used) {
                waiting.push(used);
            }
        }
    }
    reached
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    let uses = uses();
    let circles: BTreeSet<Vec<String>> = uses
        .keys()
        .filter_map(|module| {
            let back = |other: &&Vec<String>| reach(other, &uses).contains(module);
            let reached = reach(module, &uses);
            reached.contains(module).then(|| {
                let mut circle: Vec<String> =
                    reached.into_iter().filter(back).map(|module| module.join("::")).collect();
                circle.sort();
                circle
            })
        })
        .collect();
    assert!(circles.is_empty(), "{} circles: {circles:#?}", circles.len());
}
