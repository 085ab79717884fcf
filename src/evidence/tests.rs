//! Cases by value: what is kept of hostile files, that every change of a case is found, and what a
//! crash leaves.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::draft::{Cut, Draft, Limits};
use super::entry::{Entry, Why};
use super::files::Files;
use super::manifest::{Counts, MANIFEST, Manifest, SUMS};
use super::store::Store;
use super::{copy, export, verify};
use crate::config;
use crate::health::Health;
use crate::history::History;
use crate::model::{
    CaseId, Container, ContainerId, EntryPoint, FileType, ImageReference, OverlayDirs, RootfsPath,
};
use crate::respond::{Action, Order, ResponseRequest, Task, Until};
use crate::sys::file;

const MIB: u64 = 1 << 20;

fn container(upper: &Path) -> Container {
    Container {
        id: ContainerId::new("default", "web"),
        endpoint: "/run/containerd/containerd.sock".into(),
        runtime: "io.containerd.runc.v2".into(),
        created_at: None,
        labels: Default::default(),
        pod: None,
        image: ImageReference::default(),
        snapshotter: "overlayfs".into(),
        snapshot_key: "web".into(),
        layers: Vec::new(),
        rootfs: Some(OverlayDirs { upperdir: upper.into(), lowerdirs: Vec::new() }),
        task: None,
        no_baseline: None,
        id_map: None,
        entry_point: EntryPoint::default(),
        probes: Vec::new(),
    }
}

fn task(upper: &Path, number: u8) -> Task {
    let order = Order {
        case: CaseId([number; 16]),
        container: Box::new(container(upper)),
        workload: "container default/web".into(),
        kind: None,
        process: None,
        path: None,
        by_rule: true,
        environment: false,
        until: Until::default(),
    };
    let request = ResponseRequest {
        ticket: 1,
        container: ContainerId::new("default", "web"),
        pod: None,
        image: None,
        incarnation: None,
        process: None,
        action: Action::Evidence,
        reason: "a test".into(),
        requested_by: "rule r".into(),
        requested_at: Timestamp::UNIX_EPOCH,
        finding: None,
        no_restart: false,
        hook: None,
        evidence: None,
    };
    let specification = Ok(br#"{"process":{"env":["TOKEN=hunter2"]}}"#.to_vec());
    Task { request, order, specification, is_frozen: false }
}

fn limits(room: u64) -> Limits {
    Limits { room, until: Until::default(), is_stopping: Arc::new(AtomicBool::new(false)) }
}

/// A store in a directory of its own.
struct Bench {
    directory: tempfile::TempDir,
    settings: config::Evidence,
}

impl Bench {
    fn new() -> Bench {
        let settings = config::Evidence {
            max_file_bytes: MIB,
            max_case_bytes: 16 * MIB,
            max_bytes: 100 * MIB,
            ..config::Evidence::default()
        };
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("upper")).unwrap();
        Bench { directory, settings }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn store(&self) -> Store {
        Store::open(self.path("store"), &self.settings, "node", &Health::default())
    }

    /// Takes evidence as the keeper does.
    fn take(&self, store: &Store, number: u8) -> (Manifest, Vec<Entry>) {
        let history = History::open(&self.path("history")).unwrap();
        let task = task(&self.path("upper"), number);
        let mut begun = store.begin(&task, &limits(0)).unwrap();
        let known = begun.before.as_ref();
        let known = known.map(|known| super::take::earlier(begun.draft.directory(), known));
        let outcome = super::take::take(
            &mut begun.draft,
            &task,
            &history.reader(),
            begun.number,
            self.settings.max_file_bytes,
            known.unwrap_or_default(),
        );
        store.end(begun, outcome.counts, outcome.cut).unwrap();
        let directory = store.path(CaseId([number; 16]));
        let manifest = super::reading::read_manifest(&directory).unwrap();
        (manifest.clone(), super::take::earlier(&directory, &manifest))
    }

    /// Takes one file of the layer.
    fn file(&self, path: &[u8], room: u64) -> (Entry, Result<(), Cut>, Draft) {
        let directory = self.path("draft");
        let _ = fs::remove_dir_all(&directory);
        let mut draft = Draft::begin(directory, limits(room), None).unwrap();
        let container = container(&self.path("upper"));
        let mut files = Files::of(&container, None, self.settings.max_file_bytes, Vec::new());
        let mut entry = Entry::new(RootfsPath::new(path).unwrap(), Why::Finding);
        let ended = files.take(&mut draft, &mut entry);
        (entry, ended, draft)
    }

    fn object(&self, entry: &Entry) -> Vec<u8> {
        fs::read(self.path("draft/objects").join(entry.object.unwrap().hex())).unwrap()
    }
}

fn problems(directory: &Path) -> Vec<String> {
    verify(directory).unwrap().problems
}

#[test]
fn every_kind_of_change_of_a_case_is_found() {
    let bench = Bench::new();
    let store = bench.store();
    fs::write(bench.path("upper/x"), "x").unwrap();
    bench.take(&store, 1);
    let case = store.path(CaseId([1; 16]));
    let whole = verify(&case).unwrap();
    assert_eq!((whole.problems, whole.case), (Vec::<String>::new(), Some(CaseId([1; 16]))));
    assert!(whole.digest.is_some() && whole.files > 5, "{}", whole.files);

    let copy = |name: &str| {
        let to = bench.path(name);
        let made = std::process::Command::new("cp").arg("-a").arg(&case).arg(&to).status();
        assert!(made.unwrap().success());
        to
    };
    let request = "takes/0001/request.json";
    let check = |name: &str, change: &dyn Fn(&Path), expected: &str| {
        let case = copy(name);
        change(&case);
        let found = problems(&case);
        assert!(found.iter().any(|one| one.contains(expected)), "{name}: {found:?}");
        fs::remove_dir_all(case).unwrap();
    };
    let edit = |path: PathBuf, from: &str, to: &str| {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{text}");
        fs::write(path, text.replacen(from, to, 1)).unwrap();
    };
    let flip = |case: &Path| {
        let file = File::options().read(true).write(true).open(case.join(request)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 7).unwrap();
        file.write_all_at(&[byte[0] ^ 1], 7).unwrap();
    };
    check("flipped", &flip, "takes/0001/request.json was changed");
    check(
        "removed",
        &|case| fs::remove_file(case.join(request)).unwrap(),
        "request.json is missing",
    );
    check("added", &|case| fs::write(case.join("takes/x"), "x").unwrap(), "takes/x was added");
    check("hidden", &|case| fs::write(case.join(".x"), "x").unwrap(), ".x was added");
    let to_link = |case: &Path| {
        fs::remove_file(case.join(request)).unwrap();
        symlink("/etc/passwd", case.join(request)).unwrap();
    };
    check("link", &to_link, "it is no regular file");
    let longer = |case: &Path| {
        File::options().append(true).open(case.join(request)).unwrap().write_all(b"x").unwrap();
    };
    check("longer", &longer, "has another size");
    check(
        "reason",
        &|case| edit(case.join(MANIFEST), "a test", "a rest"),
        "manifest.json was changed",
    );
    check("schema", &|case| edit(case.join(MANIFEST), "driftd.", "drift."), "another schema");
    check("no manifest", &|case| fs::remove_file(case.join(MANIFEST)).unwrap(), "manifest.json");
    check(
        "no sums",
        &|case| fs::remove_file(case.join(SUMS)).unwrap(),
        "SHA256SUMS cannot be read",
    );
    check("sums", &|case| edit(case.join(SUMS), "  takes", "  rakes"), "rakes/0001");
    check("cut sums", &|case| edit(case.join(SUMS), "\n", ""), "SHA256SUMS");
    let line_off = |case: &Path| {
        let text = fs::read_to_string(case.join(SUMS)).unwrap();
        let rest: Vec<&str> = text.lines().filter(|line| !line.ends_with(request)).collect();
        fs::write(case.join(SUMS), rest.join("\n") + "\n").unwrap();
    };
    check("line off", &line_off, "SHA256SUMS does not name takes/0001/request.json");
    // A change of all at once is consistent, and has another digest.
    let all = copy("all");
    let mut manifest = super::reading::read_manifest(&all).unwrap();
    manifest.takes[0].reason = "another".into();
    super::draft::describe_case(&all, &manifest).unwrap();
    let verified = verify(&all).unwrap();
    assert_eq!(verified.problems, [""; 0]);
    assert_ne!(verified.digest, whole.digest);
    // sha256sum reads it, too.
    let checked = std::process::Command::new("sha256sum")
        .args(["--check", "--strict", "--quiet", SUMS])
        .current_dir(&case)
        .status();
    assert!(checked.unwrap().success());
}

#[test]
fn a_case_is_private_and_has_no_value_of_a_variable() {
    let bench = Bench::new();
    let store = bench.store();
    let (manifest, _) = bench.take(&store, 1);
    let case = store.path(CaseId([1; 16]));
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(bench.path("store")), mode(case.clone())), (0o700, 0o700));
    for file in manifest.files.iter().map(|file| file.name.as_str()).chain([MANIFEST, SUMS]) {
        assert_eq!(mode(case.join(file)), 0o600, "{file}");
        let text = fs::read(case.join(file)).unwrap();
        assert!(!text.windows(7).any(|part| part == b"hunter2"), "{file}");
    }
    let text = fs::read_to_string(case.join("takes/0001/container.json")).unwrap();
    assert!(text.contains("TOKEN=(7 bytes)"), "{text}");
}

#[test]
fn a_sparse_giant_is_read_where_it_has_data_and_is_marked_as_cut() {
    let bench = Bench::new();
    let file = File::create(bench.path("upper/giant")).unwrap();
    file.set_len(10 << 30).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(b"end", (10 << 30) - 3).unwrap();
    let begun = Instant::now();
    let (entry, ended, _draft) = bench.file(b"/giant", 16 * MIB);
    assert_eq!(ended, Ok(()));
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert!(entry.stored <= MIB && !entry.unstable, "{entry:?}");
    let extents = entry.extents.clone().unwrap();
    assert!(extents.len() == 2 && extents[1].0 > 9 << 30, "{extents:?}");
    assert!(entry.cut.as_deref().is_some_and(|cut| cut.contains("max_file_bytes")), "{entry:?}");
    let object = bench.object(&entry);
    assert_eq!(object.len() as u64, entry.stored);
    assert!(object.starts_with(b"begin") && object.ends_with(b"end"));
    assert_eq!(entry.found.unwrap().size, 10 << 30);
}

#[test]
fn a_small_file_is_kept_as_it_is_with_its_holes() {
    let bench = Bench::new();
    let file = File::create(bench.path("upper/small")).unwrap();
    file.set_len(MIB).unwrap();
    file.write_all_at(b"middle", MIB / 2).unwrap();
    let (entry, ended, _draft) = bench.file(b"/small", 16 * MIB);
    assert_eq!((ended, entry.cut.as_ref(), entry.extents.as_ref()), (Ok(()), None, None));
    assert_eq!(bench.object(&entry), fs::read(bench.path("upper/small")).unwrap());
    let object = bench.path("draft/objects").join(entry.object.unwrap().hex());
    use std::os::unix::fs::MetadataExt as _;
    assert!(fs::metadata(object).unwrap().blocks() * 512 < MIB / 2, "its holes take no room");
    let (entry, ..) = bench.file(b"/none", 16 * MIB);
    assert_eq!((entry.not_taken.as_deref(), entry.found), (Some("it is gone"), None));
}

#[test]
fn what_is_no_regular_file_is_listed_and_never_opened() {
    let bench = Bench::new();
    let fifo = bench.path("upper/fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    symlink("/etc/passwd", bench.path("upper/link")).unwrap();
    symlink("/etc", bench.path("upper/dir")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(bench.path("upper/socket")).unwrap();
    let check = |path: &[u8], expected: FileType, target: Option<&str>| {
        let (entry, ended, _draft) = bench.file(path, 16 * MIB);
        let found = entry.found.unwrap();
        assert_eq!((ended, found.file_type, found.target.as_deref()), (Ok(()), expected, target));
        assert_eq!((entry.object, entry.stored), (None, 0));
    };
    check(b"/fifo", FileType::Fifo, None);
    check(b"/link", FileType::Symlink, Some("/etc/passwd"));
    check(b"/socket", FileType::Socket, None);
    // Nothing is reached through a link.
    let (entry, ..) = bench.file(b"/dir/passwd", 16 * MIB);
    assert_eq!((entry.found, entry.object), (None, None));
}

#[test]
fn a_name_of_any_bytes_chooses_no_name_in_a_case() {
    let bench = Bench::new();
    let store = bench.store();
    let name = b"\xff\n  ..;\x1b[2J".as_slice();
    fs::write(bench.path("upper").join(std::ffi::OsStr::from_bytes(name)), "payload").unwrap();
    let (entry, ended, _draft) = bench.file(&[b"/", name].concat(), 16 * MIB);
    assert_eq!((ended, bench.object(&entry)), (Ok(()), b"payload".to_vec()));
    let text = serde_json::to_string(&entry).unwrap();
    assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry);
    let (manifest, _) = bench.take(&store, 1);
    assert!(manifest.files.iter().all(|file| super::sums::is_name(&file.name)));
    assert_eq!(problems(&store.path(CaseId([1; 16]))), [""; 0]);
}

#[test]
fn a_limit_cuts_a_file_and_the_next_ones_are_named() {
    let bench = Bench::new();
    fs::write(bench.path("upper/long"), vec![7; 3 << 20]).unwrap();
    // A limit for one file.
    let (entry, ended, _draft) = bench.file(b"/long", 16 * MIB);
    assert_eq!((ended, entry.stored, entry.extents.clone()), (Ok(()), MIB, Some(vec![(0, MIB)])));
    assert!(entry.cut.is_some());
    // A limit for all: what was read until then is kept.
    let (entry, ended, _draft) = bench.file(b"/long", MIB);
    let Err(Cut(why)) = ended else { panic!("not cut") };
    assert!(why.contains("evidence.max_case_bytes"), "{why}");
    assert_eq!(entry.cut.as_deref(), Some(&why[..]));
    assert!(entry.stored > 0 && entry.stored < MIB, "{}", entry.stored);
    assert_eq!(bench.object(&entry).len() as u64, entry.stored);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_marked() {
    let bench = Bench::new();
    let path = bench.path("upper/log");
    fs::write(&path, vec![1; 4096]).unwrap();
    let held = File::open(&path).unwrap();
    let before = file::stat(&held).unwrap();
    let copy_now = |change: &dyn Fn()| {
        let directory = bench.path("draft");
        let _ = fs::remove_dir_all(&directory);
        let mut draft = Draft::begin(directory, limits(16 * MIB), None).unwrap();
        let mut entry = Entry::new(RootfsPath::root(), Why::Finding);
        change();
        use std::os::fd::AsFd as _;
        copy::copy(&mut draft, held.as_fd(), &before, MIB, &mut entry).unwrap();
        entry
    };
    assert!(!copy_now(&|| ()).unstable);
    let grown = copy_now(&|| {
        File::options().append(true).open(&path).unwrap().write_all(b"more").unwrap();
    });
    assert!(grown.unstable && grown.stored == 4096, "{grown:?}");
    let cut = copy_now(&|| File::options().write(true).open(&path).unwrap().set_len(10).unwrap());
    assert!(cut.unstable && cut.stored == 10, "{cut:?}");
}

#[test]
fn the_same_content_is_kept_once_and_a_later_take_adds_only_what_is_new() {
    let bench = Bench::new();
    let store = bench.store();
    for name in ["a", "b"] {
        fs::write(bench.path("upper").join(name), "same").unwrap();
    }
    let (first, _) = bench.take(&store, 1);
    let (second, _) = bench.take(&store, 1);
    assert_eq!((first.takes.len(), second.takes.len()), (1, 2));
    let of_first: Vec<&str> = first.files.iter().map(|file| file.name.as_str()).collect();
    let new: Vec<&str> = second
        .files
        .iter()
        .map(|file| file.name.as_str())
        .filter(|name| !of_first.contains(name))
        .collect();
    assert!(!new.is_empty() && new.iter().all(|name| name.starts_with("takes/0002/")), "{new:?}");
    assert_eq!(problems(&store.path(CaseId([1; 16]))), [""; 0]);
    assert_eq!(store.list().len(), 1);
}

#[test]
fn a_case_is_whole_or_marked_as_cut_after_a_crash_at_any_point() {
    let bench = Bench::new();
    let store = bench.store();
    let id = CaseId([2; 16]);
    // In the middle of the first take.
    let begin = |store: &Store| {
        let mut begun = store.begin(&task(&bench.path("upper"), 2), &limits(0)).unwrap();
        let mut lines = begun.draft.lines("takes/0001/findings.jsonl").unwrap();
        lines.add(&mut begun.draft, &"whole").unwrap();
        lines.end(&mut begun.draft).unwrap();
        begun.draft.put("takes/0001/half", b"x").unwrap();
        let (_, mut part) = begun.draft.object().unwrap();
        part.write_all(b"half of an object").unwrap();
        begun
    };
    drop(begin(&store));
    let lines = bench.path("store").join(format!(".draft-{id}/takes/0001/findings.jsonl"));
    File::options().append(true).open(lines).unwrap().write_all(b"\"ha").unwrap();
    let store = bench.store();
    let case = store.path(id);
    assert_eq!(problems(&case), [""; 0]);
    let listed = store.find("0202").unwrap();
    let cut = listed.manifest.unwrap().cut();
    assert_eq!(cut, ["driftd ended while it was taken"]);
    assert_eq!(fs::read_to_string(case.join("takes/0001/findings.jsonl")).unwrap(), "\"whole\"\n");
    assert!(!case.join("objects/part").exists());

    // In the middle of an addition: the case is as it was.
    let before = verify(&case).unwrap().digest;
    let mut begun = store.begin(&task(&bench.path("upper"), 2), &limits(0)).unwrap();
    begun.draft.put("takes/0002/half", b"x").unwrap();
    drop(begun);
    // And between the two renames.
    let replaced = bench.path("store").join(format!(".old-{id}"));
    fs::rename(&case, &replaced).unwrap();
    let store = bench.store();
    assert_eq!(verify(&case).unwrap().digest, before);
    assert!(!replaced.exists() && store.list().len() == 1);
    // After both: what was replaced goes.
    fs::create_dir(&replaced).unwrap();
    fs::create_dir(bench.path("store").join(format!(".removed-{}", CaseId([9; 16])))).unwrap();
    let store = bench.store();
    let left = fs::read_dir(bench.path("store")).unwrap().count();
    assert_eq!((left, store.usage().cases), (1, 1));
    // A draft without a request is none.
    fs::create_dir(bench.path("store").join(format!(".draft-{}", CaseId([9; 16])))).unwrap();
    assert_eq!(bench.store().list().len(), 1);
}

#[test]
fn a_full_store_refuses_and_keeps_what_it_has() {
    let mut bench = Bench::new();
    bench.settings.max_case_bytes = 2 * MIB;
    bench.settings.max_bytes = 4 * MIB;
    let store = bench.store();
    let noise = vec![7; 100 << 10];
    let mut kept = 0;
    let why = loop {
        let begun = store.begin(&task(&bench.path("upper"), kept), &limits(0));
        let mut begun = match begun {
            Ok(begun) => begun,
            Err(why) => break why,
        };
        let full = (0..).find_map(|number| {
            begun.draft.put(&format!("takes/0001/noise-{number}"), &noise).err()
        });
        assert!(full.unwrap().0.contains("evidence.max_case_bytes"));
        store.end(begun, Counts::default(), Vec::new()).unwrap();
        kept += 1;
        assert!(kept < 10);
    };
    assert!(why.contains("share") || why.contains("full"), "{why}");
    assert_eq!(store.list().len(), usize::from(kept), "none was removed for another");
    assert!(store.usage().bytes <= store.usage().max_bytes);
    assert!(store.remove(CaseId([0; 16])).unwrap() > MIB);
    store.begin(&task(&bench.path("upper"), 77), &limits(0)).map(drop).unwrap();
}

#[test]
fn an_old_case_is_removed_and_no_other() {
    let bench = Bench::new();
    let store = bench.store();
    bench.take(&store, 1);
    store.expire(Timestamp::now());
    assert_eq!(store.list().len(), 1);
    store.expire(Timestamp::now() + jiff::SignedDuration::from_hours(24 * 31));
    assert_eq!(store.list().len(), 0);
    assert!(store.find("0101").is_err() && !store.path(CaseId([1; 16])).exists());
}

#[test]
fn a_damaged_case_is_listed_and_not_added_to() {
    let bench = Bench::new();
    let store = bench.store();
    bench.take(&store, 1);
    fs::write(store.path(CaseId([1; 16])).join(MANIFEST), "{}").unwrap();
    let store = bench.store();
    assert!(store.list()[0].manifest.as_ref().is_err_and(|why| why.contains("manifest.json")));
    assert!(store.begin(&task(&bench.path("upper"), 1), &limits(0)).is_err());
    bench.take(&store, 2);
}

#[test]
fn an_export_unpacks_to_a_case_that_verifies_and_its_statement_names_all_digests() {
    let bench = Bench::new();
    let store = bench.store();
    fs::write(bench.path("upper/x"), "x").unwrap();
    bench.take(&store, 1);
    let id = CaseId([1; 16]);
    let mut archive = Vec::new();
    export(&store.path(id), &mut |part| {
        archive.extend(part);
        true
    })
    .unwrap();
    let unpacked = bench.path("unpacked");
    let plain = zstd::decode_all(&archive[..]).unwrap();
    tar::Archive::new(&plain[..]).unpack(&unpacked).unwrap();
    let case = unpacked.join(id.to_string());
    let verified = verify(&case).unwrap();
    assert_eq!((verified.problems.len(), verified.case), (0, Some(id)));
    let text = fs::read(unpacked.join(format!("{id}.intoto.json"))).unwrap();
    let statement: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(statement["_type"], "https://in-toto.io/Statement/v1");
    let subjects = statement["subject"].as_array().unwrap();
    assert_eq!(subjects.len(), super::reading::files_below(&case).unwrap().len());
    for subject in subjects {
        let path = unpacked.join(subject["name"].as_str().unwrap());
        let (digest, _) = super::reading::hash_file(&path).unwrap();
        assert_eq!(subject["digest"]["sha256"], digest.hex().as_str(), "{subject}");
    }
    // A client that goes away ends it.
    assert!(export(&store.path(id), &mut |_| false).is_err());
}

#[test]
fn a_deadline_ends_a_take_and_leaves_a_whole_case() {
    let bench = Bench::new();
    let store = bench.store();
    let history = History::open(&bench.path("history")).unwrap();
    let task = task(&bench.path("upper"), 1);
    let now = limits(0);
    let mut begun = store.begin(&task, &now).unwrap();
    now.until.shorten(Instant::now());
    let outcome = super::take::take(&mut begun.draft, &task, &history.reader(), 1, MIB, Vec::new());
    assert!(outcome.cut.iter().any(|why| why.contains("evidence.deadline")), "{outcome:?}");
    store.end(begun, outcome.counts, outcome.cut).unwrap();
    assert_eq!(problems(&store.path(CaseId([1; 16]))), [""; 0]);
}
