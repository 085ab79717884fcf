//! Walks of directories that the tests make, also while they change.
//! Needs root: device nodes, `trusted.` attributes and overlay mounts.

use std::ffi::OsStr;
use std::fs;
use std::io::IoSliceMut;
use std::num::NonZeroU64;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, XattrFlags, fadvise, makedev, mknodat, setxattr};
use rustix::io::Errno;

use super::batch::BATCH;
use super::files::{BUFFER, RWF_DONTCACHE};
use super::reading::lock;
use super::*;
use crate::baseline::layer::{self, Device, FileEntry, compare_paths};
use crate::baseline::urgency::hashing_pool;
use crate::baseline::{ImageBaseline, LayerBaseline, blake3_of};
use crate::model::{Blake3Hash, ChainId, DiffId, FileType, Format, LayerId, RootfsPath};

fn walked(directory: &Path) -> Result<Vec<LayerEntry>, Error> {
    let pool = hashing_pool(2, &Arc::default()).unwrap();
    let mut entries = walk(&pool, directory, None, &AtomicBool::new(false))?.entries;
    entries.sort_by(|a, b| compare_paths(a.path().as_bytes(), b.path().as_bytes()));
    Ok(entries)
}

fn write(path: &Path, mode: u32, content: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn node(path: &Path, file_type: rustix::fs::FileType, major: u32, minor: u32) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    mknodat(CWD, path, file_type, Mode::from_raw_mode(0o600), makedev(major, minor))
        .expect("this test must run as root, with CAP_MKNOD");
}

fn whiteout(path: &Path) {
    node(path, rustix::fs::FileType::CharacterDevice, 0, 0);
}

fn attribute(path: &Path, name: &str, value: &[u8]) {
    setxattr(path, name, value, XattrFlags::empty())
        .expect("this test must run as root, on a file system with trusted attributes");
}

fn path(text: impl AsRef<[u8]>) -> RootfsPath {
    RootfsPath::new(text).unwrap()
}

fn directory(at: &str) -> FileEntry {
    FileEntry::directory(path(at), 0o755)
}

fn regular(at: impl AsRef<[u8]>, mode: u32, format: Format, content: &str) -> FileEntry {
    FileEntry {
        path: path(at),
        file_type: FileType::Regular,
        format,
        mode,
        size: content.len() as u64,
        blake3: Some(blake3_of(content)),
        ..directory("/")
    }
}

/// `cap_net_raw` permitted and effective, as setcap(8) writes it.
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn everything_in_a_layer_becomes_an_entry() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    fs::set_permissions(scratch.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let long = "x".repeat(BUFFER * 2 + 1);
    let elf = "\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0…";
    write(&at("bin/ping"), 0o4755, elf);
    attribute(&at("bin/ping"), "security.capability", &NET_RAW);
    fs::hard_link(at("bin/ping"), at("bin/ping6")).unwrap();
    write(&at("bin/run"), 0o755, "#!/bin/sh\n");
    write(&at("data/long"), 0o600, &long);
    write(&at("data/empty"), 0o644, "");
    fs::write(scratch.path().join(OsStr::from_bytes(b"data/\xff\n")), "odd").unwrap();
    symlink("/etc/passwd", at("data/link")).unwrap();
    symlink("..", at("data/up")).unwrap();
    node(&at("dev/fifo"), rustix::fs::FileType::Fifo, 0, 0);
    node(&at("dev/null"), rustix::fs::FileType::CharacterDevice, 1, 3);
    node(&at("dev/sda"), rustix::fs::FileType::BlockDevice, 8, 300);
    drop(UnixListener::bind(at("dev/socket")).unwrap());
    whiteout(&at("gone"));
    write(&at("opaque/new"), 0o644, "new");
    attribute(&at("opaque"), "trusted.overlay.opaque", b"y");
    write(&at("xwhiteouts/gone"), 0o644, "");
    attribute(&at("xwhiteouts"), "trusted.overlay.opaque", b"x");
    attribute(&at("xwhiteouts/gone"), "trusted.overlay.whiteout", b"");

    let ping = |name| FileEntry {
        capability: Some(NET_RAW.into()),
        ..regular(name, 0o4755, Format::Elf, elf)
    };
    let link = |name, target: &str| FileEntry {
        file_type: FileType::Symlink,
        mode: 0o777,
        size: target.len() as u64,
        link_target: Some(target.as_bytes().into()),
        ..directory(name)
    };
    let special = |name, file_type, mode, device: Option<(u32, u32)>| FileEntry {
        file_type,
        mode,
        device: device.map(|(major, minor)| Device { major, minor }),
        ..directory(name)
    };
    let found = walked(scratch.path()).unwrap();
    // What umask left of the socket's mode is not the point.
    let socket = fs::metadata(at("dev/socket")).unwrap().permissions().mode() & 0o7777;
    let mode = fs::metadata(scratch.path().join(OsStr::from_bytes(b"data/\xff\n")));
    let odd = mode.unwrap().permissions().mode() & 0o7777;
    assert_eq!(
        found,
        [
            LayerEntry::File(directory("/")),
            LayerEntry::File(directory("/bin")),
            LayerEntry::File(ping("/bin/ping")),
            LayerEntry::File(ping("/bin/ping6")),
            LayerEntry::File(regular("/bin/run", 0o755, Format::Script, "#!/bin/sh\n")),
            LayerEntry::File(directory("/data")),
            LayerEntry::File(regular("/data/empty", 0o644, Format::Empty, "")),
            LayerEntry::File(link("/data/link", "/etc/passwd")),
            LayerEntry::File(regular("/data/long", 0o600, Format::Data, &long)),
            LayerEntry::File(link("/data/up", "..")),
            LayerEntry::File(regular(b"/data/\xff\n", odd, Format::Data, "odd")),
            LayerEntry::File(directory("/dev")),
            LayerEntry::File(special("/dev/fifo", FileType::Fifo, 0o600, None)),
            LayerEntry::File(special("/dev/null", FileType::CharDevice, 0o600, Some((1, 3)))),
            LayerEntry::File(special("/dev/sda", FileType::BlockDevice, 0o600, Some((8, 300)))),
            LayerEntry::File(special("/dev/socket", FileType::Socket, socket, None)),
            LayerEntry::Whiteout(path("/gone")),
            LayerEntry::OpaqueDirectory(directory("/opaque")),
            LayerEntry::File(regular("/opaque/new", 0o644, Format::Data, "new")),
            LayerEntry::File(directory("/xwhiteouts")),
            LayerEntry::Whiteout(path("/xwhiteouts/gone")),
        ]
    );
}

/// Unmounts when a test ends, also by a panic.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn an_image_is_what_the_kernel_shows_of_its_layers() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    write(&at("0/kept/a"), 0o644, "a");
    write(&at("0/kept/covered"), 0o644, "lower");
    write(&at("0/removed/deep/b"), 0o644, "b");
    write(&at("0/removed-not"), 0o644, "c");
    write(&at("0/opaque/old"), 0o644, "old");
    write(&at("0/opaque/sub/old"), 0o644, "old");
    write(&at("0/replaced/c"), 0o644, "c");
    write(&at("0/file"), 0o644, "file");
    write(&at("0/back/old"), 0o644, "old");
    write(&at("1/kept/covered"), 0o755, "upper");
    whiteout(&at("1/removed"));
    write(&at("1/opaque/sub/new"), 0o644, "new");
    attribute(&at("1/opaque"), "trusted.overlay.opaque", b"y");
    write(&at("1/replaced"), 0o644, "a file now");
    fs::remove_file(at("1/replaced")).unwrap();
    symlink("kept", at("1/replaced")).unwrap();
    write(&at("1/file/now-a-directory"), 0o644, "x");
    whiteout(&at("1/back"));
    fs::create_dir_all(at("2/back")).unwrap();
    write(&at("2/back/new"), 0o644, "new");
    write(&at("2/opaque/newest"), 0o644, "newest");
    whiteout(&at("2/never-was"));
    whiteout(&at("2/kept/a"));
    fs::create_dir(at("merged")).unwrap();
    fs::create_dir(at("3")).unwrap();

    let layers: Vec<_> = (0..3_u8)
        .map(|number| {
            let id = LayerId::Diff(DiffId([number; 32]));
            let entries = walked(&at(&number.to_string())).unwrap();
            let bytes = layer::write(id, entries, Vec::new()).unwrap();
            (id, Arc::new(LayerBaseline::from_bytes(bytes).unwrap()))
        })
        .collect();
    let image = ImageBaseline::new(ChainId([0; 32]), layers);

    let base = scratch.path().display();
    let status = Command::new("mount")
        .args(["-t", "overlay", "overlay", "-o"])
        .arg(format!("lowerdir={base}/2:{base}/1:{base}/0"))
        .arg(at("merged"))
        .status()
        .unwrap();
    assert!(status.success(), "this test must run as root, on a kernel with overlayfs");
    let mount = Mount(at("merged"));
    let shown: Vec<FileEntry> = walked(&mount.0)
        .unwrap()
        .into_iter()
        .filter_map(|entry| match entry {
            LayerEntry::File(file) | LayerEntry::OpaqueDirectory(file) => Some(file),
            LayerEntry::Whiteout(_) => None,
        })
        .collect();
    assert_eq!(image.files().map(|known| known.entry).collect::<Vec<_>>(), shown);
    assert_eq!(shown.len(), 13);
}

#[test]
fn a_layer_that_is_gone_is_named_with_the_next_step() {
    let scratch = tempfile::tempdir().unwrap();
    let err = walked(&scratch.path().join("none")).unwrap_err();
    assert!(matches!(err, Error::Directory { source: Errno::NOENT, .. }), "{err:?}");
    assert!(err.to_string().contains("pull the image again"), "{err}");
}

#[test]
fn a_layer_whose_content_is_elsewhere_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    write(&scratch.path().join("a/b"), 0o644, "b");
    attribute(&scratch.path().join("a"), "trusted.overlay.redirect", b"/c");
    let err = walked(scratch.path()).unwrap_err();
    assert!(
        matches!(err, Error::Unsupported { attribute: "trusted.overlay.redirect", .. }),
        "{err:?}"
    );
}

#[test]
fn a_walk_that_is_stopped_delivers_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    write(&scratch.path().join("a"), 0o644, "a");
    let pool = hashing_pool(1, &Arc::default()).unwrap();
    let result = walk(&pool, scratch.path(), None, &AtomicBool::new(true));
    assert!(matches!(result, Err(Error::Stopped)), "{result:?}");
}

/// Even with very little memory, every entry is delivered.
#[test]
fn a_walk_needs_little_memory() {
    let scratch = tempfile::tempdir().unwrap();
    for number in 0..300_usize {
        let name = format!("d{}/e{}/{}-{number}", number % 3, number % 5, "n".repeat(number % 40));
        write(&scratch.path().join(name), 0o644, &number.to_string());
        write(&scratch.path().join(format!("d{}-/{number}", number % 3)), 0o644, "x");
    }
    for number in 0..20 {
        let link = scratch.path().join(format!("d1/link-{number}"));
        fs::hard_link(scratch.path().join(format!("d0-/{}", number % 5 * 3)), link).unwrap();
    }
    let pool = hashing_pool(2, &Arc::default()).unwrap();
    let all = walk(&pool, scratch.path(), None, &AtomicBool::new(false)).unwrap().entries;
    let sorted = |entries: &[LayerEntry]| {
        let order = |a: &LayerEntry, b: &LayerEntry| {
            compare_paths(a.path().as_bytes(), b.path().as_bytes()).is_lt()
        };
        entries.is_sorted_by(order)
    };
    assert!(sorted(&all), "{all:?}");
    // 600 files, their 15 + 3 + 3 directories, the links, and the root.
    assert_eq!(all.len(), 600 + 21 + 20 + 1);
    for (waiting, names, all_names, links) in
        [(0, 0, 0, 0), (1, 100, 10, 1), (1000, 500, 700, 2), (1 << 20, 1, 1 << 20, 100)]
    {
        let bounds = Bounds { waiting, names, all_names, links, ..BOUNDS };
        let mut found = Vec::new();
        let nothing = AtomicBool::new(false);
        walk_within::<Error>(
            bounds,
            &pool,
            scratch.path(),
            &Reading::default(),
            None,
            &nothing,
            &mut |entry| {
                found.push(entry);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(found, all);
    }
}

#[test]
fn the_receiver_of_entries_can_end_the_walk() {
    #[derive(Debug)]
    enum EndReason {
        Enough,
        Walk(Error),
    }
    impl From<Error> for EndReason {
        fn from(err: Error) -> EndReason {
            EndReason::Walk(err)
        }
    }
    let scratch = tempfile::tempdir().unwrap();
    for number in 0..200 {
        write(&scratch.path().join(number.to_string()), 0o644, "x");
    }
    let pool = hashing_pool(2, &Arc::default()).unwrap();
    let mut left = 100;
    let never = AtomicBool::new(false);
    let result = walk_to(&pool, scratch.path(), &Reading::default(), None, &never, &mut |_| {
        left -= 1;
        if left == 0 { Err(EndReason::Enough) } else { Ok(()) }
    });
    match result {
        Err(EndReason::Enough) => assert_eq!(left, 0),
        Err(EndReason::Walk(err)) => panic!("{err}"),
        Ok(_) => panic!("the walk went on"),
    }
}

/// The newest ctime below a directory, itself included.
fn newest_below(directory: &Path) -> FileTime {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::symlink_metadata(directory).unwrap();
    let own = FileTime {
        seconds: metadata.ctime(),
        nanoseconds: u32::try_from(metadata.ctime_nsec()).unwrap(),
    };
    if !metadata.is_dir() {
        return own;
    }
    let below = fs::read_dir(directory).unwrap().map(|entry| newest_below(&entry.unwrap().path()));
    below.fold(own, FileTime::max)
}

/// Until the kernel's clock for files has moved on, twice.
fn let_a_tick_pass() {
    std::thread::sleep(Duration::from_millis(25));
}

#[test]
fn the_newest_change_is_found_at_any_depth() {
    let scratch = tempfile::tempdir().unwrap();
    for name in ["a/b/file", "c/file", "d/e/f/file"] {
        write(&scratch.path().join(name), 0o644, "x");
    }
    symlink("x", scratch.path().join("link")).unwrap();
    for name in ["a/b/file", "a/b", "d/e/f", ".", "c/file"] {
        let_a_tick_pass();
        let changed = scratch.path().join(name);
        let mode = fs::metadata(&changed).unwrap().permissions();
        fs::set_permissions(&changed, mode).unwrap();
        let_a_tick_pass();
        let pool = hashing_pool(1, &Arc::default()).unwrap();
        let walked = walk(&pool, scratch.path(), None, &AtomicBool::new(false)).unwrap();
        assert_eq!(walked.newest_change, newest_below(&changed).max(newest_below(scratch.path())));
    }
}

/// Otherwise a file that was changed after it was read would count as unchanged, because
/// another one, read later, was changed still later.
#[test]
fn what_is_changed_during_a_walk_counts_as_changed_later() {
    let scratch = tempfile::tempdir().unwrap();
    for number in 0..BATCH * 3 {
        write(&scratch.path().join(format!("{number:04}")), 0o644, "x");
    }
    let last = scratch.path().join(format!("{:04}", BATCH * 3 - 1));
    let_a_tick_pass();
    let pool = hashing_pool(1, &Arc::default()).unwrap();
    // One batch at a time: the last file is read long after the first was passed on.
    let bounds = Bounds { waiting: 0, ..BOUNDS };
    let mut touched = false;
    let mut touch = |_| {
        if !std::mem::replace(&mut touched, true) {
            fs::set_permissions(&last, fs::Permissions::from_mode(0o600)).unwrap();
        }
        Ok::<(), Error>(())
    };
    let everything = Reading::default();
    let never = AtomicBool::new(false);
    let newest = walk_within(bounds, &pool, scratch.path(), &everything, None, &never, &mut touch);
    let newest = newest.unwrap();
    assert!(newest < newest_below(&last), "{newest:?}");
    assert!(newest >= newest_below(&scratch.path().join("0000")), "{newest:?}");
}

fn layer_of(entries: Vec<LayerEntry>) -> LayerBaseline {
    let id = LayerId::Diff(DiffId([1; 32]));
    LayerBaseline::from_bytes(layer::write(id, entries, Vec::new()).unwrap()).unwrap()
}

/// Changes a file on the disk so that it looks as it did: same size, same
/// mtime. Only the ctime shows the change.
fn tamper(path: &Path) {
    let before = fs::metadata(path).unwrap().modified().unwrap();
    let mut content = fs::read(path).unwrap();
    content[0] ^= 1;
    fs::write(path, content).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_modified(before).unwrap();
}

#[test]
fn a_recheck_finds_what_was_changed_and_reads_nothing_else() {
    let scratch = tempfile::tempdir().unwrap();
    for number in 0..40 {
        let name = format!("d{}/{number}", number % 4);
        write(&scratch.path().join(name), 0o755, &format!("#!content of {number}"));
    }
    let_a_tick_pass();
    let pool = hashing_pool(2, &Arc::default()).unwrap();
    let never = AtomicBool::new(false);
    let first = walk(&pool, scratch.path(), None, &never).unwrap();
    let known = layer_of(first.entries.clone());
    let since = Some(first.newest_change);

    let read = |since| {
        let rate = Rate::new(NonZeroU64::new(1 << 40).unwrap());
        let before = *lock(&rate.free_at);
        let again =
            recheck(&pool, scratch.path(), &known, since, Some(&rate), None, &never).unwrap();
        let after = *lock(&rate.free_at);
        (again, after != before)
    };
    let (again, has_read) = read(since);
    assert_eq!(again.entries, first.entries);
    assert_eq!(again.newest_change, first.newest_change);
    assert!(!has_read, "files that have not changed were read again");
    assert!(read(None).1, "without a time everything is read");

    tamper(&scratch.path().join("d1/5"));
    let (again, _) = read(since);
    let changed: Vec<&LayerEntry> =
        again.entries.iter().filter(|entry| !first.entries.contains(entry)).collect();
    assert_eq!(changed.len(), 1, "{changed:?}");
    assert_eq!(changed[0].path(), &path("/d1/5"));
    assert!(again.newest_change > first.newest_change);
}

/// The files' own ctimes do not show it: each is the old one.
#[test]
fn a_recheck_notices_directories_that_changed_places() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    write(&at("x/one/deep/file"), 0o755, "one");
    write(&at("x/two/deep/file"), 0o755, "two");
    let_a_tick_pass();
    let pool = hashing_pool(1, &Arc::default()).unwrap();
    let never = AtomicBool::new(false);
    let first = walk(&pool, scratch.path(), None, &never).unwrap();
    let known = layer_of(first.entries.clone());
    fs::rename(at("x/one"), at("x/tmp")).unwrap();
    fs::rename(at("x/two"), at("x/one")).unwrap();
    fs::rename(at("x/tmp"), at("x/two")).unwrap();
    let since = Some(first.newest_change);
    let again = recheck(&pool, scratch.path(), &known, since, None, None, &never).unwrap();
    let content = |name: &str| {
        again.entries.iter().find_map(|entry| match entry {
            LayerEntry::File(file) if file.path == path(name) => file.blake3,
            _ => None,
        })
    };
    assert_eq!(content("/x/one/deep/file"), Some(blake3_of("two")));
    assert_eq!(content("/x/two/deep/file"), Some(blake3_of("one")));
}

#[test]
fn a_rate_is_kept_and_given_up_when_stopped() {
    let scratch = tempfile::tempdir().unwrap();
    for number in 0..8 {
        write(&scratch.path().join(number.to_string()), 0o644, &"x".repeat(BUFFER));
    }
    let pool = hashing_pool(2, &Arc::default()).unwrap();
    let rechecked = |per_second: u64, stop: &AtomicBool| {
        let rate = Rate::new(NonZeroU64::new(per_second).unwrap());
        let known = layer_of(vec![LayerEntry::File(directory("/"))]);
        let start = Instant::now();
        recheck(&pool, scratch.path(), &known, None, Some(&rate), None, stop)
            .map(|_| start.elapsed())
    };
    // The first of eight reads need not wait: seven tenths of a second.
    let took = rechecked(10 * BUFFER as u64, &AtomicBool::new(false)).unwrap();
    assert!(took >= Duration::from_millis(690), "{took:?}");

    let stop = AtomicBool::new(false);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let walker = scope.spawn(|| rechecked(1, &stop));
        std::thread::sleep(Duration::from_millis(100));
        stop.store(true, Ordering::Relaxed);
        let result = walker.join().unwrap();
        assert!(matches!(result, Err(Error::Stopped)), "{result:?}");
    });
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

/// Which part of a file is in the page cache, in bytes.
fn cached(path: &Path) -> u64 {
    let output = Command::new("fincore").args(["-nb", "-o", "RES"]).arg(path).output();
    let output = output.expect("fincore is in util-linux, which scripts/setup installs");
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// Reads a file that is wholly in the page cache, and a file that is not in it at all.
#[track_caller]
fn check_page_cache(dontcache: bool) {
    // Not below /tmp, which may be a tmpfs: that is nothing but a page cache.
    let scratch = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let (warm, cold) = (scratch.path().join("warm"), scratch.path().join("cold"));
    let content = "some text ".repeat(400_000);
    for path in [&warm, &cold] {
        write(path, 0o644, &content);
        fs::File::open(path).unwrap().sync_all().unwrap();
    }
    let file = fs::File::open(&cold).unwrap();
    let mut one = [0; 1];
    let alone = rustix::io::preadv2(&file, &mut [IoSliceMut::new(&mut one)], 0, RWF_DONTCACHE);
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    let whole = content.len() as u64;
    assert_eq!(cached(&cold), 0, "the file system keeps what is advised away");
    assert!(cached(&warm) >= whole, "{}", cached(&warm));
    if dontcache && alone == Err(Errno::OPNOTSUPP) {
        eprintln!("not tried: this kernel or file system has no RWF_DONTCACHE");
        return;
    }
    let bounds = Bounds { dontcache, ..BOUNDS };
    let pool = hashing_pool(2, &Arc::default()).unwrap();
    let mut hashes = Vec::new();
    let mut found = |entry| {
        if let LayerEntry::File(FileEntry { blake3: Some(blake3), .. }) = entry {
            hashes.push(blake3);
        }
        Ok::<(), Error>(())
    };
    let (everything, never) = (Reading::default(), AtomicBool::new(false));
    walk_within(bounds, &pool, scratch.path(), &everything, None, &never, &mut found).unwrap();
    assert_eq!(hashes, [blake3_of(&content); 2]);
    assert!(cached(&cold) < whole / 10, "{} of {whole} bytes stayed", cached(&cold));
    assert!(cached(&warm) >= whole, "only {} of {whole} bytes stayed", cached(&warm));
}

#[test]
fn what_is_in_the_page_cache_stays_and_nothing_else_comes() {
    check_page_cache(true);
}

#[test]
fn the_page_cache_is_left_as_it_was_where_reads_cannot_pass_it_by() {
    check_page_cache(false);
}

#[test]
fn a_path_may_be_as_long_as_the_kernel_allows_and_no_longer() {
    let scratch = tempfile::tempdir().unwrap();
    // 16 × (1 + 255) bytes: exactly 4096, with the slash that a layer's path begins with.
    let mut current = rustix::fs::open(scratch.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
    let name = "n".repeat(255);
    for _ in 0..15 {
        rustix::fs::mkdirat(&current, &name, Mode::from_raw_mode(0o755)).unwrap();
        current = rustix::fs::openat(&current, &name, OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    let make = |name: &str| {
        let flags = OFlags::CREATE | OFlags::WRONLY;
        rustix::fs::openat(&current, name, flags, Mode::from_raw_mode(0o644)).unwrap();
    };
    make(&name[1..]);
    assert_eq!(walked(scratch.path()).unwrap().last().unwrap().path().as_bytes().len(), 4095);
    rustix::fs::mkdirat(&current, &name, Mode::from_raw_mode(0o755)).unwrap();
    current = rustix::fs::openat(&current, &name, OFlags::DIRECTORY, Mode::empty()).unwrap();
    let flags = OFlags::CREATE | OFlags::WRONLY;
    rustix::fs::openat(&current, "x", flags, Mode::from_raw_mode(0o644)).unwrap();
    let err = walked(scratch.path()).unwrap_err();
    assert!(matches!(&err, Error::Name { name, .. } if name == "x"), "{err:?}");
}

#[test]
fn pipes_sockets_and_devices_are_never_opened() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    node(&at("fifo"), rustix::fs::FileType::Fifo, 0, 0);
    drop(UnixListener::bind(at("socket")).unwrap());
    // Opening a device can have effects: a tape rewinds, a watchdog is armed.
    node(&at("watchdog"), rustix::fs::FileType::CharacterDevice, 10, 130);
    let start = Instant::now();
    assert_eq!(walked(scratch.path()).unwrap().len(), 4);
    assert!(start.elapsed() < Duration::from_secs(5));
}

/// Holes are read as zeros. That takes time, and ends when it is stopped.
#[test]
fn a_large_hole_is_read_and_can_be_stopped() {
    let scratch = tempfile::tempdir().unwrap();
    let hole = fs::File::create(scratch.path().join("hole")).unwrap();
    hole.set_len(3 << 20).unwrap();
    let found = walked(scratch.path()).unwrap();
    let zeros = blake3::hash(&vec![0; 3 << 20]);
    let LayerEntry::File(file) = &found[1] else { panic!("{found:?}") };
    assert_eq!(file.blake3, Some(Blake3Hash(*zeros.as_bytes())));

    hole.set_len(1 << 42).unwrap();
    let pool = hashing_pool(1, &Arc::default()).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let walker = scope.spawn(|| walk(&pool, scratch.path(), None, &stop));
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        stop.store(true, Ordering::Relaxed);
        let result = walker.join().unwrap();
        assert!(matches!(result, Err(Error::Stopped)), "{result:?}");
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    });
}

#[test]
fn a_layer_removed_under_the_walk_is_noticed() {
    check_noticed(|directory, _| {
        let _ = fs::remove_dir_all(directory.join("d"));
        let _ = fs::create_dir(directory.join("d"));
        let _ = fs::write(directory.join("d/250"), "x");
    });
}

#[test]
fn progress_counts_files_and_bytes() {
    let scratch = tempfile::tempdir().unwrap();
    for number in 0..50 {
        write(&scratch.path().join(format!("d{}/{number}", number % 7)), 0o644, "12345");
    }
    let pool = hashing_pool(2, &Arc::default()).unwrap();
    let progress = Progress::default();
    walk(&pool, scratch.path(), Some(&progress), &AtomicBool::new(false)).unwrap();
    assert_eq!(progress.files_done.load(Ordering::Relaxed), 50);
    assert_eq!(progress.bytes_done.load(Ordering::Relaxed), 250);
}

/// Walks while `disturb` is at work, until a walk has failed.
#[track_caller]
fn check_noticed(disturb: impl Fn(&Path, u32) + Send + Sync) {
    let scratch = tempfile::tempdir().unwrap();
    for number in 0..500 {
        write(&scratch.path().join(format!("d/{number}")), 0o644, &"x".repeat(10_000));
    }
    let over = AtomicBool::new(false);
    let err = std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0.. {
                if over.load(Ordering::Relaxed) {
                    break;
                }
                disturb(scratch.path(), turn);
            }
        });
        let deadline = Instant::now() + Duration::from_secs(30);
        let err = loop {
            match walked(scratch.path()) {
                Err(err) => break Some(err),
                Ok(_) if Instant::now() > deadline => break None,
                Ok(_) => (),
            }
        };
        over.store(true, Ordering::Relaxed);
        err
    });
    assert!(matches!(err, Some(Error::Changed { .. })), "{err:?}");
}

#[test]
fn a_file_that_changes_is_noticed() {
    check_noticed(|directory, _| {
        let file = fs::OpenOptions::new().append(true).open(directory.join("d/250"));
        std::io::Write::write_all(&mut file.unwrap(), b"more").unwrap();
    });
}

#[test]
fn names_that_come_and_go_are_noticed() {
    check_noticed(|directory, turn| {
        let name = directory.join("d").join(format!("new-{turn}"));
        fs::write(&name, "new").unwrap();
        fs::remove_file(name).unwrap();
    });
}
