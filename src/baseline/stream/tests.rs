//! Archives written byte by byte, and the layers that they become.

use std::io::{self, Write as _};

use proptest::prelude::*;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::baseline::layer::{self, LayerBaseline, compare_paths};
use crate::model::{ChainId, FileType, LayerId};

const LIMITS: Limits = Limits { bytes: 1 << 30, entries: 10_000 };

/// An archive, written byte by byte: no writer would make most of these.
#[derive(Clone, Default)]
struct Made(Vec<u8>);

/// A header with octal numbers, whose checksum is right.
fn header(flag: u8, name: &[u8], link: &[u8], mode: u32, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    block[..name.len()].copy_from_slice(name);
    let mut number = |at: usize, digits: usize, value: u64| {
        block[at..at + digits].copy_from_slice(format!("{value:0digits$o}").as_bytes());
    };
    number(100, 7, mode.into());
    number(108, 7, 0);
    number(116, 7, 0);
    number(124, 11, size);
    number(136, 11, 0);
    number(329, 7, 0);
    number(337, 7, 0);
    block[156] = flag;
    block[157..157 + link.len()].copy_from_slice(link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    sealed(block)
}

fn sealed(mut block: [u8; 512]) -> [u8; 512] {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
    block[148..154].copy_from_slice(format!("{sum:06o}").as_bytes());
    block[154] = 0;
    block
}

impl Made {
    fn raw(mut self, block: [u8; 512], data: &[u8]) -> Made {
        self.0.extend(block);
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, mode: u32, content: &str) -> Made {
        self.entry(b'0', name.as_bytes(), b"", mode, content.as_bytes())
    }

    fn dir(self, name: &str, mode: u32) -> Made {
        self.entry(b'5', name.as_bytes(), b"", mode, b"")
    }

    fn symlink(self, name: &str, target: &str) -> Made {
        self.entry(b'2', name.as_bytes(), target.as_bytes(), 0o777, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Made {
        self.entry(b'1', name.as_bytes(), target.as_bytes(), 0o644, b"")
    }

    fn whiteout(self, name: &str) -> Made {
        self.file(name, 0, "")
    }

    fn entry(self, flag: u8, name: &[u8], link: &[u8], mode: u32, content: &[u8]) -> Made {
        self.raw(header(flag, name, link, mode, content.len() as u64), content)
    }

    /// An extended header for the next entry, or (`g`) for all.
    fn pax(self, flag: u8, records: &[(&str, &[u8])]) -> Made {
        let mut data = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut length = body + 1;
            while length != body + length.to_string().len() {
                length += 1;
            }
            data.extend(format!("{length} {key}=").as_bytes());
            data.extend(*value);
            data.push(b'\n');
        }
        self.entry(flag, b"pax", b"", 0, &data)
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

fn made() -> Made {
    Made::default()
}

fn read_all(blob: &[u8]) -> Result<Stream, Error> {
    read(blob, &LIMITS, None, &AtomicBool::new(false))
}

fn entries_on(blob: &[u8], below: Option<&ImageBaseline>) -> Result<Vec<LayerEntry>, Error> {
    let mut entries = read_all(blob)?.settle(below)?;
    entries.sort_by(|a, b| compare_paths(a.path().as_bytes(), b.path().as_bytes()));
    // Whatever comes out can be written.
    let id = LayerId::Diff(DiffId([0; 32]));
    layer::write(id, entries.clone(), Vec::new()).unwrap();
    Ok(entries)
}

/// One line for each entry; the root only if it is something special.
fn shown(entries: &[LayerEntry]) -> Vec<String> {
    let lines = entries.iter().map(|entry| {
        let (mark, file) = match entry {
            LayerEntry::Whiteout(path) => return format!("- {path}"),
            LayerEntry::File(file) => ("", file),
            LayerEntry::OpaqueDirectory(file) => ("opaque ", file),
        };
        let mut line = format!("{mark}{} {:o}", file.path, file.mode);
        if (file.uid, file.gid) != (0, 0) {
            line += &format!(" {}:{}", file.uid, file.gid);
        }
        line += match file.file_type {
            FileType::Regular => " file",
            FileType::Directory => " dir",
            FileType::Symlink => " symlink",
            FileType::CharDevice => " char",
            FileType::BlockDevice => " block",
            FileType::Fifo => " fifo",
            FileType::Socket => " socket",
        };
        if let Some(hash) = file.blake3 {
            let words = ["", "one", "two", "three", "#!/bin/sh"];
            let known = words.iter().find(|word| crate::baseline::blake3_of(word) == hash);
            line += &format!(" {} {}", file.format.name(), known.unwrap_or(&"?"));
            assert_eq!(file.size, known.map_or(file.size, |word| word.len() as u64));
        }
        if let Some(target) = &file.link_target {
            assert_eq!(file.size, target.len() as u64);
            line += &format!(" -> {}", crate::model::printable(target));
        }
        if let Some(device) = file.device {
            line += &format!(" {},{}", device.major, device.minor);
        }
        if let Some(capability) = &file.capability {
            line += &format!(" cap={}", crate::model::printable(capability));
        }
        line
    });
    lines.filter(|line| line != "/ 755 dir").collect()
}

#[track_caller]
fn check(made: Made, expected: &[&str]) {
    assert_eq!(shown(&entries_on(&made.end(), None).unwrap()), expected);
}

#[track_caller]
fn check_refused(made: Made, expected: &str) {
    let error = entries_on(&made.end(), None).unwrap_err();
    assert_eq!(error.to_string(), expected);
}

#[track_caller]
fn check_on(below: &[&str], made: Made, expected: &[&str]) {
    let image = ImageBaseline::from_text(below);
    assert_eq!(shown(&entries_on(&made.end(), Some(&image)).unwrap()), expected);
}

const NOT_UNPACKED: &str = "containerd would not unpack the archive, or not always alike: ";

#[test]
fn every_type_of_file_is_read() {
    let mut device = header(b'3', b"dev/null", b"", 0o666, 0);
    device[329..336].copy_from_slice(b"0000001");
    device[337..344].copy_from_slice(b"0000003");
    let mut disk = device;
    disk[156] = b'4';
    disk[4..9].copy_from_slice(b"disk\0");
    check(
        made()
            .dir("./", 0o700)
            .dir("./bin/", 0o1755)
            .file("./bin/sh", 0o4755, "#!/bin/sh")
            .file("empty", 0o600, "")
            .symlink("./bin/bash", "sh")
            .dir("dev", 0o755)
            .raw(sealed(device), b"")
            .raw(sealed(disk), b"")
            .entry(b'6', b"dev/pipe", b"", 0o600, b""),
        &[
            "/bin 1755 dir",
            "/bin/bash 777 symlink -> sh",
            "/bin/sh 4755 file script #!/bin/sh",
            "/dev 755 dir",
            "/dev/disk 666 block 1,3",
            "/dev/null 666 char 1,3",
            "/dev/pipe 600 fifo",
            "/empty 600 file empty ",
        ],
    );
}

#[test]
fn an_archive_may_be_empty_or_just_end() {
    assert_eq!(shown(&entries_on(b"", None).unwrap()), Vec::<String>::new());
    check(made(), &[]);
    let mut blob = made().file("a", 0o644, "one").0;
    assert_eq!(shown(&entries_on(&blob, None).unwrap()), ["/a 644 file data one"]);
    blob.extend([0; 512]);
    assert_eq!(shown(&entries_on(&blob, None).unwrap()), ["/a 644 file data one"]);
    // Not even the last block is filled up.
    blob.truncate(512 + 3);
    assert_eq!(shown(&entries_on(&blob, None).unwrap()), ["/a 644 file data one"]);
}

#[test]
fn names_are_cleaned_as_go_does_it() {
    check(
        made()
            .file("/absolute", 0o644, "one")
            .file("a/../b//./c", 0o644, "two")
            .file("../../up", 0o644, "three")
            .file("..", 0o644, "one")
            .file("dir/", 0o644, "one"),
        &[
            "/absolute 644 file data one",
            "/b 755 dir",
            "/b/c 644 file data two",
            "/dir 644 file data one",
            "/up 644 file data three",
        ],
    );
}

#[test]
fn names_need_not_be_text() {
    check(
        made().entry(b'0', b"\xff\x1b", b"", 0o644, b"one").entry(b'2', b"l", b"\xfe", 0, b""),
        &["/l 777 symlink -> \\xfe", "/\\xff\\u{1b} 644 file data one"],
    );
}

#[test]
fn long_names_come_in_three_ways() {
    let long = format!("{}/file", "d".repeat(200));
    let expected =
        [&format!("/{} 755 dir", "d".repeat(200)), &*format!("/{long} 644 file data one")];
    check(made().pax(b'x', &[("path", long.as_bytes())]).file("short", 0o644, "one"), &expected);
    check(
        made().entry(b'L', b"", b"", 0, format!("{long}\0junk").as_bytes()).file("s", 0o644, "one"),
        &expected,
    );
    let mut split = header(b'0', b"file", b"", 0o644, 3);
    split[345..345 + 150].copy_from_slice(&[b'e'; 150]);
    check(
        made().raw(sealed(split), b"one"),
        &[
            &format!("/{} 755 dir", "e".repeat(150)),
            &format!("/{}/file 644 file data one", "e".repeat(150)),
        ],
    );
    check(
        made()
            .entry(b'K', b"", b"", 0, "t".repeat(300).as_bytes())
            .pax(b'x', &[("path", b"l1"), ("linkpath", b"overruled")])
            .symlink("short", "short"),
        &[&format!("/l1 777 symlink -> {}", "t".repeat(300))],
    );
}

#[test]
fn a_path_of_4096_bytes_is_the_longest() {
    let path = |length: usize| -> String {
        let mut path = "/".to_owned() + &"0123456789abcde/".repeat(length / 16 + 1);
        path.truncate(length);
        path
    };
    let archive =
        |length| made().pax(b'x', &[("path", path(length).as_bytes())]).file("s", 0o644, "one");
    let entries = entries_on(&archive(4096 - 1).end(), None).unwrap();
    assert!(shown(&entries).iter().any(|line| line.starts_with(&path(4095))));
    let error = entries_on(&archive(4096 + 2).end(), None).unwrap_err().to_string();
    assert!(error.ends_with("is longer than 4096 bytes"), "{error}");
    check_refused(
        made().pax(b'x', &[("path", "n".repeat(256).as_bytes())]).file("s", 0o644, "one"),
        &format!("{NOT_UNPACKED}{}… has a name of more than 255 bytes", "n".repeat(200)),
    );
}

#[test]
fn owners_may_be_large() {
    let mut binary = header(b'0', b"binary", b"", 0o644, 3);
    binary[108..116].copy_from_slice(&[0x80, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff]);
    let mut unchanged = header(b'0', b"unchanged", b"", 0o644, 3);
    unchanged[108..116].copy_from_slice(&[0xff; 8]);
    check(
        made()
            .raw(sealed(binary), b"one")
            .raw(sealed(unchanged), b"one")
            .pax(b'x', &[("uid", b"3000000000"), ("gid", b"100000")])
            .file("pax", 0o644, "one"),
        &[
            "/binary 644 2147483647:0 file data one",
            "/pax 644 3000000000:100000 file data one",
            "/unchanged 644 file data one",
        ],
    );
}

#[test]
fn capabilities_keep_every_byte() {
    const KEY: &str = "SCHILY.xattr.security.capability";
    let raw = b"\x01\0\0\x02\0\n=\0 \xff\0\0\0\0\0\0\0\0\0\0";
    let mut namespaced = raw.to_vec();
    namespaced[3] = 3;
    namespaced.extend([0; 4]);
    let mut foreign = namespaced.clone();
    foreign[20] = 9;
    let known =
        "cap=\\u{1}\\u{0}\\u{0}\\u{2}\\u{0}\\n=\\u{0} \\xff".to_owned() + &"\\u{0}".repeat(10);
    let expected = |path: &str| format!("{path} 755 file data one {known}");
    check(
        made()
            .pax(b'x', &[(KEY, raw), ("SCHILY.xattr.user.other", b"x")])
            .file("a", 0o755, "one")
            .pax(b'x', &[("LIBARCHIVE.xattr.security.capability", b"eA==")])
            .file("b", 0o755, "one")
            .pax(b'x', &[(KEY, &namespaced)])
            .file("c", 0o755, "one")
            .file("d", 0o755, "one"),
        &[&expected("/a"), "/b 755 file data one", &expected("/c"), "/d 755 file data one"],
    );
    let entries =
        entries_on(&made().pax(b'x', &[(KEY, &foreign)]).file("a", 0o755, "one").end(), None);
    let entries = entries.unwrap();
    let LayerEntry::File(file) = &entries[1] else { panic!("{entries:?}") };
    assert_eq!(file.capability.as_deref(), Some(&foreign[..]), "another namespace's");
    check_refused(
        made().pax(b'x', &[(KEY, b"\0\0\0\x01of long ago")]).file("a", 0o755, "one"),
        &format!("{NOT_UNPACKED}a has a security.capability that no kernel takes"),
    );
}

#[test]
fn the_last_entry_of_a_path_wins() {
    check(made().file("a", 0o644, "one").file("./a", 0o755, "two"), &["/a 755 file data two"]);
    check(made().file("a/b", 0o644, "one").file("a", 0o644, "two"), &["/a 644 file data two"]);
    check(
        made().file("a", 0o644, "one").dir("a", 0o700).file("a/b", 0o644, "two"),
        &["/a 700 dir", "/a/b 644 file data two"],
    );
    check(
        made().dir("a", 0o755).file("a/b", 0o644, "one").dir("a", 0o700),
        &["/a 700 dir", "/a/b 644 file data one"],
    );
    check(
        made().dir("a", 0o755).file("a/b", 0o644, "one").symlink("a", "b").dir("a", 0o711),
        &["/a 711 dir"],
    );
}

#[test]
fn what_is_in_no_directory_is_refused() {
    check_refused(
        made().file("a", 0o644, "one").file("a/b/c", 0o644, "two"),
        &format!("{NOT_UNPACKED}/a is no directory, but another entry is in it"),
    );
}

#[test]
fn a_whiteout_yields_to_what_follows_it_and_to_nothing_before() {
    check(made().whiteout("d/.wh.a"), &["/d 755 dir", "- /d/a"]);
    check(made().whiteout(".wh.a").file("a", 0o644, "one"), &["/a 644 file data one"]);
    check(made().whiteout(".wh.a").dir("a", 0o700), &["/a 700 dir"]);
    check(made().file("a", 0o644, "one").whiteout(".wh.a"), &["- /a"]);
    check(made().file("a/b", 0o644, "one").whiteout(".wh.a"), &["- /a"]);
    check(made().dir(".wh.a", 0o755), &["- /a"]);
    check(
        made().whiteout(".wh.a").file("a/b", 0o644, "one"),
        &["opaque /a 755 dir", "/a/b 644 file data one"],
    );
}

#[test]
fn an_opaque_mark_may_come_before_or_after_what_it_keeps() {
    let expected = ["opaque /d 750 dir", "/d/a 644 file data one"];
    let opaque = "d/.wh..wh..opq";
    check(made().dir("d", 0o750).whiteout(opaque).file("d/a", 0o644, "one"), &expected);
    check(made().dir("d", 0o750).file("d/a", 0o644, "one").whiteout(opaque), &expected);
    check(made().whiteout(opaque).file("d/a", 0o644, "one").dir("d", 0o750), &expected);
    check(made().whiteout(opaque).file("d", 0o644, "one").dir("d", 0o750), &["/d 750 dir"]);
    check(made().whiteout(".wh..wh..opq"), &["opaque / 755 dir"]);
}

#[test]
fn other_names_of_aufs_are_whiteouts_of_odd_names() {
    check(
        made().dir(".wh..wh.plnk", 0o755).whiteout(".wh..wh.aufs"),
        &["- /.wh.aufs", "- /.wh.plnk"],
    );
    check(made().file(".wh.d/a", 0o644, "one"), &["/.wh.d 755 dir", "/.wh.d/a 644 file data one"]);
    for name in [".wh.", "a/.wh..", ".wh..."] {
        check_refused(
            made().whiteout(name),
            &format!("{NOT_UNPACKED}{name} is a whiteout of no name"),
        );
    }
}

#[test]
fn a_device_of_no_number_is_a_whiteout() {
    check(made().entry(b'3', b"a", b"", 0o644, b""), &["- /a"]);
    check(made().entry(b'4', b"a", b"", 0o644, b""), &["/a 644 block 0,0"]);
    // Twelve bits are left of a major number.
    let mut cut = header(b'3', b"a", b"", 0o644, 0);
    cut[329..336].copy_from_slice(b"0010000");
    check(made().raw(sealed(cut), b""), &["- /a"]);
}

#[test]
fn hard_links_share_a_file_whichever_comes_first() {
    let expected = ["/a 644 file data one", "/b 644 file data one"];
    check(made().file("a", 0o644, "one").hard_link("b", "a"), &expected);
    check(made().hard_link("b", "/a").file("a", 0o644, "one"), &expected);
    check(
        made().hard_link("c", "b").hard_link("b", "./x/../a").file("a", 0o644, "one"),
        &["/a 644 file data one", "/b 644 file data one", "/c 644 file data one"],
    );
    // A link keeps what the name was when it was made.
    check(
        made().file("a", 0o644, "one").hard_link("b", "a").file("a", 0o600, "two"),
        &["/a 600 file data two", "/b 644 file data one"],
    );
    // The owner and the mode are the file's, and the last one to say so wins.
    let mut owned = header(b'1', b"b", b"a", 0o4711, 0);
    owned[108..115].copy_from_slice(b"0000007");
    check(
        made()
            .pax(b'x', &[("SCHILY.xattr.security.capability", b"\0\0\0\x02lost capability.")])
            .file("a", 0o644, "one")
            .raw(sealed(owned), b""),
        &["/a 4711 7:0 file data one", "/b 4711 7:0 file data one"],
    );
    check(
        made().symlink("l", "t").hard_link("m", "l"),
        &["/l 777 symlink -> t", "/m 777 symlink -> t"],
    );
    check(made().whiteout(".wh.a").hard_link("b", "a"), &["- /a", "- /b"]);
}

#[test]
fn hard_links_to_nothing_are_refused() {
    let missing = |path| format!("{NOT_UNPACKED}{path} is a hard link to a file that is not there");
    check_refused(made().hard_link("a", "b"), &missing("/a"));
    check_refused(made().file("a", 0o644, "one").hard_link("a", "a"), &missing("/a"));
    let circle = entries_on(&made().hard_link("a", "b").hard_link("b", "a").end(), None);
    assert!(
        circle.unwrap_err().to_string().ends_with("is a hard link to a file that is not there")
    );
    check_refused(
        made().dir("d", 0o755).hard_link("a", "d"),
        &format!("{NOT_UNPACKED}a is a hard link to a directory"),
    );
}

#[test]
fn a_hard_link_may_lead_to_a_layer_below() {
    check_on(
        &["/usr/bin/ls 755 data one cap=raw"],
        made().hard_link("ls", "usr/bin/ls"),
        &["/ls 644 file data one"],
    );
    let image = ImageBaseline::from_text(&["/a 755 data one", "- /a"]);
    let error = entries_on(&made().hard_link("b", "a").end(), Some(&image)).unwrap_err();
    assert!(error.to_string().contains("not there"), "{error}");
}

#[test]
fn directories_without_an_entry_are_like_those_below() {
    check_on(
        &["/d 700 dir\n/d/e 1777 dir\n/link 777 symlink d"],
        made().file("d/e/f/a", 0o644, "one").file("link/b", 0o644, "two"),
        &[
            "/d 700 dir",
            "/d/e 1777 dir",
            "/d/e/f 755 dir",
            "/d/e/f/a 644 file data one",
            "/link 700 dir",
            "/link/b 644 file data two",
        ],
    );
    // The topmost layer that has something there decides.
    check_on(
        &["/d 700 dir", "/d 711 dir", "/other 644 data x"],
        made().file("d/a", 0o644, "one"),
        &["/d 711 dir", "/d/a 644 file data one"],
    );
    check_on(
        &["/d 700 dir", "- /d"],
        made().file("d/a", 0o644, "one"),
        &["/d 755 dir", "/d/a 644 file data one"],
    );
    // What was implied and is named later counts as named.
    check_on(
        &["/d 700 dir"],
        made().file("d/a", 0o644, "one").dir("d", 0o751),
        &["/d 751 dir", "/d/a 644 file data one"],
    );
}

#[test]
fn a_directory_made_in_a_setgid_directory_has_its_group() {
    let mut shared = header(b'5', b"d", b"", 0o2775, 0);
    shared[116..123].copy_from_slice(b"0000144");
    check(
        made().raw(sealed(shared), b"").file("d/e/f/a", 0o644, "one"),
        &[
            "/d 2775 0:100 dir",
            "/d/e 755 0:100 dir",
            "/d/e/f 755 dir",
            "/d/e/f/a 644 file data one",
        ],
    );
}

#[test]
fn symlinks_of_the_same_layer_are_followed_and_bounded_by_the_root() {
    check(
        made()
            .dir("usr", 0o755)
            .symlink("bin", "usr/bin")
            .file("bin/sh", 0o755, "#!/bin/sh")
            .symlink("abs", "/usr/../../usr")
            .file("abs/a", 0o644, "one")
            .symlink("usr/up", "../../../../x")
            .file("usr/up/b", 0o644, "two")
            .hard_link("c", "abs/a"),
        &[
            "/abs 777 symlink -> /usr/../../usr",
            "/bin 777 symlink -> usr/bin",
            "/c 644 file data one",
            "/usr 755 dir",
            "/usr/a 644 file data one",
            "/usr/bin 755 dir",
            "/usr/bin/sh 755 file script #!/bin/sh",
            "/usr/up 777 symlink -> ../../../../x",
            "/x 755 dir",
            "/x/b 644 file data two",
        ],
    );
    // The name itself is not followed.
    check(made().symlink("a", "b").file("a", 0o644, "one"), &["/a 644 file data one"]);
}

#[test]
fn symlinks_that_unpackers_follow_differently_are_refused() {
    check_refused(
        made().symlink("a", "b").symlink("b", "a").file("a/x", 0o644, "one"),
        &format!("{NOT_UNPACKED}/a leads through too many symlinks, or too long ones")
            .replace(", or too long ones", ""),
    );
    check_refused(
        made()
            .symlink("a", "b")
            .file("a/x", 0o644, "one")
            .symlink("a", "c")
            .file("a/y", 0o644, "one"),
        &format!(
            "{NOT_UNPACKED}a/ led elsewhere earlier in the archive; containerd's versions differ in where it leads"
        ),
    );
    check_refused(
        made().file("a/x", 0o644, "one").symlink("a", "c").file("a/y", 0o644, "one"),
        &format!(
            "{NOT_UNPACKED}/a leads through a symlink that has replaced a directory; containerd's versions differ in where it leads"
        ),
    );
}

#[test]
fn a_lowest_layer_that_removes_what_it_unpacked_is_refused() {
    let archive = made().file("d/e/a", 0o644, "one").whiteout("d/.wh..wh..opq").end();
    let error = entries_on(&archive, None).unwrap_err().to_string();
    assert!(
        error.contains("d/.wh..wh..opq marks a directory of the lowest layer opaque"),
        "{error}"
    );
    let image = ImageBaseline::from_text(&["/x 644 data x"]);
    assert_eq!(
        shown(&entries_on(&archive, Some(&image)).unwrap()),
        ["opaque /d 755 dir", "/d/e 755 dir", "/d/e/a 644 file data one"]
    );
}

#[test]
fn global_headers_are_no_entries_but_clear_their_place() {
    check(
        made()
            .pax(b'g', &[("comment", b"x"), ("path", b"a"), ("uid", b"7")])
            .file("b", 0o644, "one"),
        &["/b 644 file data one"],
    );
    check(
        made().file("pax", 0o644, "one").pax(b'g', &[("comment", b"x")]).file("b", 0o644, "one"),
        &["/b 644 file data one"],
    );
    // It also takes away what was said of the next entry.
    check(
        made()
            .pax(b'x', &[("path", b"long")])
            .pax(b'g', &[("comment", b"x")])
            .file("b", 0o644, "one"),
        &["/b 644 file data one"],
    );
}

#[test]
fn a_size_in_an_extended_header_is_the_size() {
    let inner = made().file("hidden", 0o4755, "two").0;
    let small = header(b'0', b"a", b"", 0o644, 0);
    let expected = entries_on(&made().entry(b'0', b"a", b"", 0o644, &inner).end(), None).unwrap();
    let size = inner.len().to_string();
    let blob = made().pax(b'x', &[("size", size.as_bytes())]).raw(small, &inner).end();
    assert_eq!(entries_on(&blob, None).unwrap(), expected);
}

#[test]
fn a_directory_has_no_content_whatever_it_says() {
    let mut block = header(b'5', b"d", b"", 0o755, 512);
    block[148..156].fill(b' ');
    check(
        made().raw(sealed(block), b"").file("a", 0o644, "one"),
        &["/a 644 file data one", "/d 755 dir"],
    );
}

#[test]
fn old_archives_mark_directories_by_a_slash() {
    check(
        made().entry(0, b"d/", b"", 0o755, b"").entry(0, b"a", b"", 0o644, b"one"),
        &["/a 644 file data one", "/d 755 dir"],
    );
}

/// 3 bytes at 1024 and 3 at 4096, in a file of 5000 bytes.
fn sparse_content() -> Vec<u8> {
    let mut content = vec![0; 5000];
    content[1024..1027].copy_from_slice(b"one");
    content[4096..4099].copy_from_slice(b"two");
    content
}

#[track_caller]
fn check_sparse(made: Made) {
    let entries = entries_on(&made.file("after", 0o644, "one").end(), None).unwrap();
    assert_eq!(shown(&entries), ["/after 644 file data one", "/s 644 file data ?"]);
    let LayerEntry::File(file) = &entries[2] else { panic!("{entries:?}") };
    assert_eq!(file.size, 5000);
    assert_eq!(file.blake3.unwrap().0, *blake3::hash(&sparse_content()).as_bytes());
}

#[test]
fn sparse_files_of_every_kind_are_filled_up() {
    let mut gnu = header(b'S', b"s", b"", 0o644, 6);
    gnu[257..265].copy_from_slice(b"ustar  \0");
    let mut map = |at: usize, value: u64| {
        gnu[at..at + 12].copy_from_slice(format!("{value:011o}\0").as_bytes());
    };
    map(386, 1024);
    map(398, 3);
    map(483, 5000);
    gnu[482] = 1;
    let mut more = [0; 512];
    more[..12].copy_from_slice(b"00000010000\0");
    more[12..24].copy_from_slice(b"00000000003\0");
    let mut archive = made();
    archive.0.extend(sealed(gnu));
    archive.0.extend(more);
    archive.0.extend(b"onetwo");
    archive.0.resize(archive.0.len().next_multiple_of(512), 0);
    check_sparse(archive);

    check_sparse(
        made()
            .pax(
                b'x',
                &[
                    ("GNU.sparse.size", b"5000"),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.offset", b"1024"),
                    ("GNU.sparse.numbytes", b"3"),
                    ("GNU.sparse.offset", b"4096"),
                    ("GNU.sparse.numbytes", b"3"),
                ],
            )
            .file("s", 0o644, "onetwo"),
    );
    check_sparse(
        made()
            .pax(
                b'x',
                &[
                    ("GNU.sparse.name", b"s"),
                    ("GNU.sparse.size", b"5000"),
                    ("GNU.sparse.numblocks", b"2"),
                    ("GNU.sparse.map", b"1024,3,4096,3"),
                ],
            )
            .file("GNUSparseFile.1/s", 0o644, "onetwo"),
    );
    let mut data = b"2\n1024\n3\n4096\n3\n".to_vec();
    data.resize(512, 0);
    data.extend(b"onetwo");
    check_sparse(
        made()
            .pax(
                b'x',
                &[
                    ("GNU.sparse.major", b"1"),
                    ("GNU.sparse.minor", b"0"),
                    ("GNU.sparse.name", b"s"),
                    ("GNU.sparse.realsize", b"5000"),
                ],
            )
            .entry(b'0', b"GNUSparseFile.1/s", b"", 0o644, &data),
    );
}

#[test]
fn holes_count_as_content() {
    let huge = made()
        .pax(
            b'x',
            &[
                ("GNU.sparse.size", b"9000000000000000000"),
                ("GNU.sparse.numblocks", b"1"),
                ("GNU.sparse.map", b"0,3"),
            ],
        )
        .file("s", 0o644, "one");
    check_refused(
        huge,
        "the layer is larger than 1073741824 bytes uncompressed (the setting `baseline.max_layer_bytes`)",
    );
}

#[test]
fn what_go_refuses_is_refused() {
    let bad = |archive: Made, why: &str| {
        let error = entries_on(&archive.end(), None).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    bad(made().entry(b'x', b"p", b"", 0, b"12 path=a\0b\n"), "(PAX) is not well-formed");
    bad(made().entry(b'x', b"p", b"", 0, b"99 path=a\n"), "(PAX) is not well-formed");
    bad(made().entry(b'x', b"p", b"", 0, b"9 path=a "), "(PAX) is not well-formed");
    bad(made().pax(b'x', &[("uid", b"x")]).file("a", 0, ""), "a number in its extended header");
    bad(made().pax(b'x', &[("mtime", b"1.x")]).file("a", 0, ""), "a number in its extended header");
    bad(made().pax(b'x', &[("size", b"-1")]).file("a", 0, ""), "its size is negative");
    bad(
        made()
            .pax(b'x', &[("GNU.sparse.numblocks", b"1"), ("GNU.sparse.map", b"0,4")])
            .file("a", 0, "one"),
        "its map of holes is not valid",
    );
    let mut blob = made().file("a", 0o644, "one").0;
    blob.extend([0; 512]);
    blob.extend(header(b'0', b"b", b"", 0, 0));
    bad(Made(blob), "a block of zeros is followed by something else");
    bad(made().file("a", 0, "").raw([1; 512], b""), "its checksum does not match");
    bad(made().entry(b'7', b"a", b"", 0, b""), "is of a type that containerd does not unpack");
    bad(made().entry(b'x', b"p", b"", 0, &[b'a'; (1 << 20) + 1]), "larger than 1048576 bytes");
    bad(
        made()
            .pax(
                b'x',
                &[
                    ("GNU.sparse.major", b"0"),
                    ("GNU.sparse.minor", b"1"),
                    ("GNU.sparse.name", b"a\0b"),
                    ("GNU.sparse.numblocks", b"1"),
                    ("GNU.sparse.map", b"0,3"),
                ],
            )
            .file("a", 0, "one"),
        "has a NUL byte in its name or target",
    );
}

#[test]
fn limits_are_named() {
    let blob = made().file("a", 0o644, "one").file("b/c", 0o644, "two").end();
    let limited = |bytes, entries| {
        let limits = Limits { bytes, entries };
        read(&blob[..], &limits, None, &AtomicBool::new(false))
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    assert_eq!(limited(blob.len() as u64, 3), Ok(()));
    assert_eq!(
        limited(blob.len() as u64 - 1, 3).unwrap_err(),
        format!(
            "the layer is larger than {} bytes uncompressed (the setting `baseline.max_layer_bytes`)",
            blob.len() - 1
        )
    );
    assert_eq!(
        limited(1 << 20, 2).unwrap_err(),
        "the layer has more than 2 entries (the setting `baseline.max_layer_entries`)"
    );
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn unzstd_frame(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

fn skippable(data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [&[0x50, 0x2a, 0x4d, 0x18], &length.to_le_bytes()[..], data].concat()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Noise does not compress: there is something to cut off.
fn large() -> Vec<u8> {
    let mut noise = vec![0; 700_000];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    made().entry(b'0', b"noise", b"", 0o644, &noise).file("b", 0o644, "one").end()
}

#[test]
fn every_compression_gives_the_same_layer_and_digests() {
    let mut plain = large();
    let expected = entries_on(&plain, None).unwrap();
    // What comes after the archive's end is hashed too.
    plain.extend(b"trailing");
    let (front, back) = plain.split_at(300_001);
    let blobs = [
        plain.clone(),
        gzip(&plain),
        [gzip(front), gzip(b""), gzip(back)].concat(),
        unzstd_frame(&plain),
        [unzstd_frame(front), skippable(b"table of contents"), unzstd_frame(back), skippable(b"x")]
            .concat(),
        [skippable(b"first"), unzstd_frame(&plain)].concat(),
    ];
    for blob in blobs {
        let stream = read_all(&blob).unwrap();
        assert_eq!(stream.diff_id, DiffId(sha256(&plain)));
        assert_eq!(stream.blob_sha256, sha256(&blob));
        assert_eq!((stream.blob_bytes, stream.bytes), (blob.len() as u64, plain.len() as u64));
        assert_eq!(entries_on(&blob, None).unwrap(), expected);
    }
}

#[test]
fn a_blob_cut_short_is_refused_wherever_it_was_cut() {
    let plain = large();
    for (blob, truncated) in [
        (plain.clone(), "the archive in the blob is truncated at byte"),
        (gzip(&plain), "the blob is truncated at byte"),
        (unzstd_frame(&plain), "the blob is truncated at byte"),
    ] {
        for sixteenth in 1..16 {
            let cut = &blob[..blob.len() * sixteenth / 16];
            let error = read_all(cut).map(|_| ()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{truncated} {}", cut.len())), "{error}");
        }
        // The very end of a plain archive may be missing; only its digest shows that.
        let cut = &blob[..blob.len() - 3];
        if blob != plain {
            let error = read_all(cut).map(|_| ()).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{truncated} {}", cut.len())), "{error}");
        }
    }
}

#[test]
fn a_damaged_blob_is_refused() {
    let mut blob = gzip(&large());
    blob.extend(b"no member of any kind");
    let error = read_all(&blob).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("the blob is not gzip all through"), "{error}");
    let mut blob = unzstd_frame(&large());
    blob.extend(b"no frame of any kind");
    let error = read_all(&blob).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("the blob is not zstd all through"), "{error}");
}

#[test]
fn a_bomb_ends_at_the_limit() {
    let bomb = gzip(&vec![0; 64 << 20]);
    assert!(bomb.len() < 1 << 20);
    let limits = Limits { bytes: 1 << 20, entries: 10 };
    let noisy = [header(b'0', b"a", b"", 0o644, 1 << 32).to_vec(), vec![0; 64 << 20]].concat();
    for blob in [bomb, gzip(&noisy), zstd::encode_all(&noisy[..], 1).unwrap()] {
        let error =
            read(&blob[..], &limits, None, &AtomicBool::new(false)).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Bytes(_)), "{error}");
    }
    // Frames without content make a large blob of nothing.
    let nothing = skippable(&vec![0; 4 << 20]);
    let error = read(&nothing[..], &limits, None, &AtomicBool::new(false)).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Bytes(_)), "{error}");
}

#[test]
fn a_window_larger_than_the_limit_is_refused() {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(MAX_WINDOW + 1).unwrap();
    encoder.long_distance_matching(true).unwrap();
    encoder.write_all(&large()).unwrap();
    let blob = encoder.finish().unwrap();
    let error = read_all(&blob).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("requires too much memory"), "{error}");
}

#[test]
fn what_is_no_archive_is_named() {
    let mut noise = vec![0; 8192];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    for (blob, expected) in [
        (b"\xfd7zXZ\0\0".to_vec(), "an xz archive, which containerd does not unpack"),
        (b"{\"schemaVersion\":2}".to_vec(), "a JSON document"),
        (noise, "encrypted data"),
        (b"hello".to_vec(), "no kind of file known here (its first header has a wrong checksum)"),
    ] {
        assert_eq!(
            read_all(&blob).map(|_| ()).unwrap_err().to_string(),
            format!("the blob is not a layer's archive: it looks like {expected}")
        );
    }
}

#[test]
fn a_blob_that_cannot_be_read_is_refused_with_the_byte() {
    struct Broken(usize);
    impl Read for Broken {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.0 == 0 {
                return Err(io::Error::other("the disk is gone"));
            }
            let length = self.0.min(buffer.len());
            buffer[..length].fill(0);
            self.0 -= length;
            Ok(length)
        }
    }
    let error =
        read(Broken(100_000), &LIMITS, None, &AtomicBool::new(false)).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::Read { at: 100_000, .. }), "{error:?}");
    let stopped =
        read(io::repeat(0), &LIMITS, None, &AtomicBool::new(true)).map(|_| ()).unwrap_err();
    assert!(matches!(stopped, Error::Stopped), "{stopped:?}");
}

#[test]
fn what_was_read_is_counted() {
    let progress = Progress::default();
    let blob = made().file("a", 0o644, "one").file("b", 0o644, "three").end();
    read(&blob[..], &LIMITS, Some(&progress), &AtomicBool::new(false)).unwrap();
    assert_eq!(progress.files_done.load(Ordering::Relaxed), 2);
    assert_eq!(progress.bytes_done.load(Ordering::Relaxed), 8);
}

#[derive(Clone, Debug)]
enum Step {
    File(String, u32, String),
    Dir(String, u32),
    Symlink(String, String),
    HardLink(String, String),
    Whiteout(String),
    Opaque(String),
}

fn any_step() -> impl Strategy<Value = Step> {
    let name = || {
        let part = prop::sample::select(vec!["a", "b", "c", "..", ".", ""]);
        prop::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"))
    };
    let word = prop::sample::select(vec!["", "one", "two"]).prop_map(str::to_owned);
    prop_oneof![
        4 => (name(), any::<u32>(), word).prop_map(|(name, mode, word)| Step::File(name, mode & 0o7777, word)),
        2 => (name(), any::<u32>()).prop_map(|(name, mode)| Step::Dir(name, mode & 0o7777)),
        1 => (name(), name()).prop_map(|(name, target)| Step::Symlink(name, target)),
        1 => (name(), name()).prop_map(|(name, target)| Step::HardLink(name, target)),
        1 => name().prop_map(Step::Whiteout),
        1 => name().prop_map(Step::Opaque),
    ]
}

fn archive_of(steps: &[Step]) -> Vec<u8> {
    let beside = |name: &str, prefix: &str| match name.rsplit_once('/') {
        Some((directory, base)) => format!("{directory}/{prefix}{base}"),
        None => format!("{prefix}{name}"),
    };
    let archive = steps.iter().fold(made(), |made, step| match step {
        Step::File(name, mode, content) => made.file(name, *mode, content),
        Step::Dir(name, mode) => made.dir(name, *mode),
        Step::Symlink(name, target) => made.symlink(name, target),
        Step::HardLink(name, target) => made.hard_link(name, target),
        Step::Whiteout(name) => made.whiteout(&beside(name, ".wh.")),
        Step::Opaque(name) => made.whiteout(&format!("{name}/.wh..wh..opq")),
    });
    archive.end()
}

proptest! {
    /// Whatever is not refused is a layer that can be written.
    #[test]
    fn any_sequence_of_entries_is_a_tree_or_refused(
        steps in prop::collection::vec(any_step(), 0..12),
    ) {
        let image = ImageBaseline::from_text(&["/a/b 644 data x\n/c 777 symlink a", "- /a/b\n/b/c 755 elf y"]);
        for below in [None, Some(&image)] {
            // Writing checks that it is a tree.
            match entries_on(&archive_of(&steps), below) {
                Ok(_) | Err(Error::Entry { .. }) => (),
                Err(error) => prop_assert!(false, "{error}"),
            }
        }
    }

    #[test]
    fn no_bytes_make_the_reader_panic(
        steps in prop::collection::vec(any_step(), 1..6),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..20),
        compression in 0..3,
    ) {
        let mut blob = archive_of(&steps);
        for (at, byte, reseal) in changes {
            let at = at.index(blob.len());
            blob[at] = byte;
            // Else hardly anything but checksums would be tested.
            let block = at / 512 * 512;
            if reseal && let Some(header) = blob[block..].first_chunk_mut() {
                *header = sealed(*header);
            }
        }
        let blob = match compression {
            0 => blob,
            1 => gzip(&blob),
            _ => unzstd_frame(&blob),
        };
        let limits = Limits { bytes: 1 << 20, entries: 100 };
        if let Ok(stream) = read(&blob[..], &limits, None, &AtomicBool::new(false)) {
            let _ = stream.settle(None);
        }
    }
}

#[test]
fn what_is_settled_on_a_layer_is_written_and_read_back() {
    let entries = entries_on(&made().file("a", 0o644, "one").end(), None).unwrap();
    let id = LayerId::Chain(ChainId([1; 32]));
    let bytes = layer::write(id, entries, Vec::new()).unwrap();
    assert_eq!(LayerBaseline::from_bytes(bytes).unwrap().len(), 2);
}
