//! Facts and their judgements, line by line against one image.

use std::sync::Arc;

use super::*;
use crate::baseline::blake3_of;
use crate::model::{
    Ancestor, Content, CouldChange, EntryPoint, FileState, FileType, Format, PathGlobs, Process,
    ProcessIdentity, RootfsPath, Sha256Hash, Unhashed,
};

const IMAGE: &str = "
/bin 755 dir
/tmp 1777 dir
/bin/busybox 755 elf busybox
/bin/sh 777 symlink busybox
/bin/ls 755 elf ls
/lib/m.ko 644 elf_object mod
/bin/su 4755 elf su
/usr/bin 755 dir
/usr/bin/curl 755 elf curl
/usr/sbin 755 dir
/usr/sbin/auditctl 755 elf auditctl
/usr/lib/python3/a.py 644 data a
/opt/tool/run 755 script run
/etc/app.conf 644 data conf
/docker-entrypoint.sh 755 script entry
/etc/passwd 644 data users
/etc/skel 755 dir
/etc/skel/.bashrc 644 data skel
/etc/cron.d 755 dir
/etc/cron.weekly 777 symlink cron.d
/app 755 dir
/app/main.py 644 data main
/usr/local/bin/python3 777 symlink python3.11
/usr/local/bin/python3.11 755 elf python
";

fn state(mode: u32, format: &str, content: &str) -> FileState {
    let format = match format {
        "elf" => Format::Elf,
        "object" => Format::ElfObject,
        "module" => Format::KernelModule,
        "script" => Format::Script,
        "data" | "unread" => Format::Data,
        other => panic!("bad format {other}"),
    };
    let content_of = match content {
        "-" => Content::Unhashed(Unhashed::NotAProgram),
        content => {
            Content::Hashed { blake3: blake3_of(content), sha256: Some(Sha256Hash([0; 32])) }
        }
    };
    FileState {
        file_type: FileType::Regular,
        format,
        mode,
        uid: 0,
        gid: 0,
        size: content.len() as u64,
        capability: None,
        content: content_of,
        deleted: false,
        could_change: CouldChange::No,
    }
}

fn process() -> Arc<Process> {
    Arc::new(Process {
        identity: ProcessIdentity { pid: 1, start_time: 1 },
        exe: None,
        argv: None,
        uid: None,
        tty: None,
        root: None,
        ancestors: Vec::new(),
    })
}

fn fact(line: &str) -> FileFact {
    let words: Vec<&str> = line.split_whitespace().collect();
    let path = || RootfsPath::new(words[1]).unwrap();
    let state = || FileState {
        could_change: match words.get(5) {
            Some(&"written-to") => CouldChange::HadWriter,
            _ => CouldChange::No,
        },
        ..state(u32::from_str_radix(words[2], 8).unwrap(), words[3], words[4])
    };
    match words[0] {
        "exec" | "tmpfs" | "volume" | "memory" | "foreign" | "running" => FileFact::Executed {
            path: path(),
            filesystem: match words[0] {
                "tmpfs" => Filesystem::Tmpfs,
                "volume" => Filesystem::Volume,
                "memory" => Filesystem::Anonymous,
                "foreign" => Filesystem::Container,
                _ => Filesystem::Overlay,
            },
            running: words[0] == "running",
            denied: false,
            times: 1,
            state: FileState { deleted: words[0] == "running", ..state() },
            lower: None,
            process: process(),
            invoked_as: None,
            layer_file: None,
            writer: None,
        },
        "load" | "load-volume" | "load-shared" => FileFact::Loaded {
            path: path(),
            filesystem: match words[0] {
                "load-volume" => Filesystem::Volume,
                _ => Filesystem::Overlay,
            },
            state: match words[3] {
                "gone" => FileState {
                    format: Format::Unknown,
                    content: Content::Unhashed(Unhashed::Gone),
                    deleted: true,
                    ..self::state(0, "data", "-")
                },
                _ => state(),
            },
            lower: None,
            process: process(),
            by_linker: false,
            is_shared: words[0] == "load-shared",
            writer: None,
            denied: false,
        },
        "interpret" | "interpret-volume" => FileFact::Interpreted {
            script: Script::File {
                path: path(),
                filesystem: match words[0] {
                    "interpret-volume" => Filesystem::Volume,
                    _ => Filesystem::Overlay,
                },
                state: state(),
                lower: None,
            },
            process: process(),
            writer: None,
            denied: false,
        },
        "write" => FileFact::Present {
            path: path(),
            state: state(),
            lower: None,
            writer: None,
            changed: None,
        },
        "link" | "mount" => FileFact::Present {
            path: path(),
            state: FileState {
                file_type: match words[0] {
                    "link" => FileType::Symlink,
                    _ => FileType::Directory,
                },
                content: match words[0] {
                    "link" => Content::Hashed {
                        blake3: blake3_of(words[2]),
                        sha256: Some(Sha256Hash([0; 32])),
                    },
                    _ => Content::Unhashed(Unhashed::NotRegular),
                },
                ..self::state(0o777, "data", "-")
            },
            lower: None,
            writer: None,
            changed: None,
        },
        "remove" => FileFact::Absent { path: path(), writer: None },
        other => panic!("bad verb {other}"),
    }
}

/// The one place that knows how to call `assess`; the tests below are data.
#[track_caller]
fn check(event: &str, expected: &str) {
    let image = ImageBaseline::from_text(&[IMAGE]);
    let globs =
        ["/etc/passwd", "/etc/cron.*/**", "**/.ssh/authorized_keys", "/home/*/.{profile,bashrc}"];
    let globs = PathGlobs::new(globs.map(str::to_owned).into()).unwrap();
    let entry_point = [RootfsPath::new("/docker-entrypoint.sh").unwrap()];
    let (event, as_well) = match event.split_once(" as ") {
        Some((event, as_well)) => (event, Some(as_well)),
        None => (event, None),
    };
    let reached_as = as_well.map(|path| RootfsPath::new(path).unwrap());
    let sensitive = Sensitive {
        persistence: &globs,
        entry_point: &entry_point,
        reached_as: reached_as.as_ref(),
    };
    let assessment = assess(&image, sensitive, &fact(event));
    let found: Vec<String> = assessment
        .judgements
        .iter()
        .map(|judgement| {
            let from = judgement
                .expected
                .as_ref()
                .map_or(String::new(), |known| format!(" from {}", known.entry.path));
            format!("{} {}{from}", judgement.kind, judgement.severity)
        })
        .collect();
    assert_eq!(format!("{:?}: {}", assessment.change, found.join(", ")), expected, "{event}");
}

#[test]
fn a_program_the_image_lacks() {
    check("write /tmp/x 755 elf evil", "Added: file.added low");
    check("write /tmp/x 644 elf evil", "Added: file.added low");
    check("exec /tmp/x 755 elf evil", "Added: exec.new critical");
    check("exec /tmp/s 755 script evil", "Added: exec.script high");
    check("exec /tmp/s 755 data evil", "Added: exec.script high");
}

#[test]
fn a_program_of_the_image_with_other_content() {
    check("write /usr/bin/curl 755 elf evil", "Modified: file.modified medium from /usr/bin/curl");
    check("exec /usr/bin/curl 755 elf evil", "Modified: exec.modified critical from /usr/bin/curl");
    // What it held when it was executed is not known.
    check(
        "exec /usr/bin/curl 755 elf curl written-to",
        "Modified: exec.modified critical from /usr/bin/curl",
    );
    check(
        "exec /opt/tool/run 755 script run written-to",
        "Modified: exec.script high from /opt/tool/run",
    );
    check("exec /tmp/ls 755 elf ls written-to", "Relocated: exec.relocated high from /bin/ls");
    check("load /bin/ls 755 elf ls written-to", "Modified: library.loaded high from /bin/ls");
    check(
        "exec /docker-entrypoint.sh 755 script evil",
        "Modified: exec.script high from /docker-entrypoint.sh",
    );
    check("write /usr/bin/curl 644 data text", "Modified: file.modified medium from /usr/bin/curl");
    // Its path is that of curl: the content of ls does not make it harmless.
    check("exec /usr/bin/curl 755 elf ls", "Modified: exec.modified critical from /usr/bin/curl");
}

#[test]
fn content_of_the_image_at_a_new_path() {
    check("write /bin/.cache-ls 755 elf ls", "Relocated: file.relocated info from /bin/ls");
    check("exec /bin/.cache-ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
    check("exec /tmp/ls 755 elf ls", "Relocated: exec.relocated high from /bin/ls");
    check("exec /bin/nc 755 elf busybox", "Relocated: exec.relocated high from /bin/busybox");
    check("exec /opt/curl 755 elf busybox", "Relocated: exec.relocated high from /bin/busybox");
}

#[test]
fn the_same_content_at_its_own_path_is_silent() {
    check("write /bin/ls 700 elf ls", "Metadata: ");
    check("exec /bin/ls 755 elf ls", "Metadata: ");
    check("exec /opt/tool/run 755 script run", "Metadata: ");
}

#[test]
fn data_is_no_drift() {
    check("write /etc/app.conf 644 data other", "Modified: ");
    check("write /var/lib/x.csv 755 data odd", "Added: ");
    check("write /tmp/note.sh 644 script text", "Added: ");
}

#[test]
fn rights_that_the_image_does_not_give() {
    check("write /bin/ls 4755 elf ls", "Metadata: file.privileged high from /bin/ls");
    check("write /bin/su 4755 elf su", "Metadata: ");
    check("write /bin/su 6755 elf su", "Metadata: file.privileged high from /bin/su");
    check("write /tmp/x 4755 elf evil", "Added: file.added low, file.privileged high");
    check("write /tmp/d 2644 data text", "Added: ");
}

#[test]
fn a34_a_file_that_programs_obey_is_reported_whatever_it_holds() {
    check("write /etc/cron.d/a 644 data evil", "Added: file.persistence high");
    check("write /root/.ssh/authorized_keys 600 data evil", "Added: file.persistence high");
    check("write /etc/passwd 644 data evil", "Modified: file.persistence high from /etc/passwd");
    check("write /etc/passwd 600 data users", "Metadata: ");
    check(
        "write /etc/cron.daily/x 4755 elf evil",
        "Added: file.added low, file.persistence high, file.privileged high",
    );
    check("write /etc/cron.d/a 644 unread -", "Added: ");
}

#[test]
fn x15_a_link_around_a_watched_directory_is_reported_and_so_are_the_files_behind_it() {
    check("link /etc/cron.d /tmp/cr", "Added: file.persistence high");
    check("link /root/.ssh /tmp/keys", "Added: file.persistence high");
    check("mount /etc/cron.d", "Added: file.persistence high");
    check("link /tmp/x /tmp/cr", "Added: ");
    check("mount /tmp/x", "Added: ");
    // The image has this link.
    check("link /etc/cron.weekly cron.d", "Modified: ");
    check("write /tmp/cr/a 644 data evil as /etc/cron.d/a", "Added: file.persistence high");
    check("write /tmp/cr/a 644 data evil as /srv/a", "Added: ");
    // A link that leads to another link.
    check("link /tmp/cr /tmp/cr2 as /etc/cron.d", "Added: file.persistence high");
}

#[test]
fn a35_the_entry_point_is_watched() {
    check(
        "write /docker-entrypoint.sh 755 script evil",
        "Modified: file.modified medium from /docker-entrypoint.sh, \
         file.persistence high from /docker-entrypoint.sh",
    );
    check("write /docker-entrypoint.sh 755 script entry", "Metadata: ");
}

#[test]
fn what_starts_a_container_is_found_in_its_image() {
    let check = |arguments: &[&str], expected: &[&str]| {
        let image = ImageBaseline::from_text(&[IMAGE]);
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let started = EntryPoint {
            arguments: words(arguments),
            search: words(&["/usr/local/bin", "/usr/bin", "/bin"]),
            directory: "/app".into(),
        };
        let found: Vec<String> =
            entry_point(&image, &started).iter().map(ToString::to_string).collect();
        assert_eq!(found, expected, "{arguments:?}");
    };
    check(&["/docker-entrypoint.sh", "curl"], &["/docker-entrypoint.sh"]);
    check(&["sh", "-c", "ls"], &["/bin/busybox", "/bin/sh"]);
    check(
        &["python3", "-u", "main.py", "/etc/app.conf"],
        &["/app/main.py", "/usr/local/bin/python3", "/usr/local/bin/python3.11"],
    );
    check(&["/bin/ls", "/etc/app.conf", "/opt/tool/run"], &["/bin/ls", "/opt/tool/run"]);
    check(&["../bin/ls"], &["/bin/ls"]);
    check(&["missing"], &[]);
    check(&[], &[]);
}

#[test]
fn what_is_gone() {
    check("remove /bin/ls", "Removed: file.removed low from /bin/ls");
    check("remove /usr/sbin/auditctl", "Removed: file.removed medium from /usr/sbin/auditctl");
    check("remove /bin/sh", "Removed: file.removed medium from /bin/sh");
    check("remove /opt", "Removed: file.removed low from /opt");
    check("remove /etc/app.conf", "Removed: ");
    check("remove /usr/lib/python3", "Removed: ");
    check("remove /tmp/never-was", "Removed: ");
}

#[test]
fn programs_from_elsewhere_are_named_by_where() {
    check("memory /memfd:a 777 elf evil", "Added: exec.fileless critical");
    check("memory /memfd:a 777 elf ls", "Relocated: exec.fileless critical from /bin/ls");
    check("tmpfs /dev/shm/x 755 elf evil", "Added: exec.tmpfs high");
    check("tmpfs /dev/shm/x 755 elf ls", "Relocated: exec.relocated high from /bin/ls");
    check("volume /data/x 755 elf evil", "Added: exec.volume medium");
    check("volume /data/ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
    // The file of the image below the volume is hidden and does not count.
    check("volume /usr/bin/curl 755 elf evil", "Added: exec.volume medium");
    check("volume /data/x 4755 elf evil", "Added: exec.volume medium, file.privileged high");
}

#[test]
fn x13_a_program_of_another_container_is_none_of_the_image() {
    check("foreign /usr/bin/nmap 755 elf nmap", "Added: exec.new critical");
    check("foreign /opt/run 755 script other", "Added: exec.script high");
    // The image has such a program too, but it is another container's file.
    check("foreign /bin/ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
    check("foreign /tmp/ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
}

#[test]
fn a15_a_running_program_without_a_file_is_judged_by_its_content() {
    check("running /tmp/x 755 elf evil", "Added: exec.deleted high");
    check("running /usr/bin/curl 755 elf evil", "Modified: exec.deleted high from /usr/bin/curl");
    check("running /usr/bin/curl 755 elf curl", "Metadata: ");
}

#[test]
fn code_that_is_not_executed_is_judged_all_the_same() {
    check("load /tmp/evil.so 644 elf evil", "Added: library.loaded high");
    check("load /bin/ls 644 elf evil", "Modified: library.loaded high from /bin/ls");
    check("load /bin/ls 644 elf ls", "Metadata: ");
    check("load /tmp/ls.so 644 elf ls", "Relocated: library.loaded medium from /bin/ls");
    check("interpret /tmp/i.sh 644 data evil", "Added: exec.interpreted medium");
    check("interpret /opt/tool/run 755 script run", "Metadata: ");
    check("load-volume /data/evil.so 644 elf evil", "Added: library.loaded medium");
    check("interpret-volume /scripts/run 644 data evil", "Added: exec.interpreted low");
}

/// `PID EXE` of the process that loads, of its parent, and of the writer.
#[track_caller]
fn check_extracted(path: &str, loads: &str, parent: &str, wrote: &str, expected: bool) {
    let identity = |text: &str| ProcessIdentity {
        pid: text.split_once(' ').unwrap().0.parse().unwrap(),
        start_time: 1,
    };
    let exe = |text: &str| Some(text.split_once(' ').unwrap().1.to_owned());
    let process = |text: &str| Process {
        identity: identity(text),
        exe: exe(text),
        ..(*self::process()).clone()
    };
    let parent = Ancestor {
        identity: identity(parent),
        exe: exe(parent),
        argv: None,
        is_proven_inside: false,
    };
    let loads = Process { ancestors: vec![parent], ..process(loads) };
    let image = ImageBaseline::from_text(&[IMAGE]);
    let path = RootfsPath::new(path).unwrap();
    let found = is_extracted_by_itself(&image, &path, &loads, &process(wrote));
    assert_eq!(found, expected, "{path}");
}

#[test]
fn b25_what_a_program_of_the_image_unpacks_for_itself_is_no_alarm() {
    let lib = "/tmp/libnetty_transport_native_epoll_x86_64123.so";
    let (init, app) = ("1 /bin/busybox", "7 /usr/bin/curl");
    check_extracted(lib, app, init, app, true);
    check_extracted("/tmp/deeper/lib.so", app, init, app, true);
    // A worker loads a library that its parent has unpacked.
    check_extracted(lib, "8 /usr/bin/curl", app, app, true);
    check_extracted("/usr/lib/lib.so", app, init, app, false);
    check_extracted("/usr/lib/new/lib.so", app, init, app, false);
    check_extracted("/lib.so", app, init, app, false);
    check_extracted("/app/lib.so", app, init, app, false);
    // A directory that the program has made for them.
    check_extracted("/root/.cache/JNA/temp/jna123.tmp", app, init, app, true);
    check_extracted("/root/.cache/JNA/temp/a.so", app, init, "9 /bin/busybox", false);
    check_extracted(lib, "8 /usr/bin/curl", init, app, false);
    // The same process, but another program has written it: a shell, and exec.
    check_extracted(lib, app, init, "7 /bin/busybox", false);
    // bash's `enable -f`
    check_extracted(lib, "7 /bin/busybox", init, "7 /bin/busybox", false);
    check_extracted(lib, "7 /tmp/x", init, "7 /tmp/x", false);
}

#[test]
fn r23_bits_that_grant_nothing_are_not_reported_and_a_program_that_gains_is() {
    check("write /srv/a.txt 6755 data text", "Added: ");
    check("write /srv/a.sh 6755 script text", "Added: file.added low");
    check("write /srv/a.o 6755 object text", "Added: ");
    check("write /opt/lib.so 6644 elf lib", "Added: file.added low");
    check("write /etc/app.conf 6644 data conf", "Metadata: ");
    check("write /srv/a 6755 elf evil", "Added: file.added low, file.privileged high");
    check("write /bin/ls 2755 elf ls", "Metadata: file.privileged high from /bin/ls");
    check("exec /tmp/s 4755 script evil", "Added: exec.script high");
}

#[test]
fn w18_a_kernel_module_is_a_new_program_and_a_compilers_object_is_data() {
    check("write /tmp/x.ko 644 module evil", "Added: file.added low");
    check("write /tmp/x 644 module evil", "Added: file.added low");
    check("write /tmp/x.o 644 object code", "Added: ");
    // Its bits grant nothing.
    check("write /tmp/x.ko 4755 module evil", "Added: file.added low");
    // Copied, or written anew: the image's own are known by their content alone.
    check("write /tmp/x.ko 644 module mod", "Relocated: file.relocated info from /lib/m.ko");
    check("write /lib/m.ko 644 module mod", "Metadata: ");
    check("write /lib/m.ko 644 module evil", "Modified: file.modified medium from /lib/m.ko");
}

#[test]
fn w03_r15_code_that_a_program_generates_is_no_library_and_an_elf_file_stays_one() {
    check("load /tmp/jit-7.dump 600 data code", "Added: library.loaded info");
    check("load /tmp/#12345 600 data code", "Added: library.loaded info");
    check("load-shared /tmp/ffiAbCdEf 0 gone -", "Added: library.loaded info");
    check("load-volume /data/code 600 data code", "Added: library.loaded info");
    check("load-shared /tmp/evil.so 600 elf evil", "Added: library.loaded high");
    // The dynamic linker maps privately.
    check("load /tmp/evil.so 0 gone -", "Added: library.loaded high");
    check("load /bin/ls 644 data code", "Modified: library.loaded high from /bin/ls");
    check("load-shared /bin/ls 0 gone -", "Modified: library.loaded high from /bin/ls");
}

#[test]
fn w09_r31_content_of_the_image_on_a_tmpfs_is_judged_as_on_a_volume() {
    check("tmpfs /run/ls 755 elf ls", "Relocated: exec.relocated medium from /bin/ls");
    check(
        "tmpfs /run/s6/run 755 script run",
        "Relocated: exec.relocated medium from /opt/tool/run",
    );
    check("tmpfs /run/curl 755 elf ls", "Relocated: exec.relocated high from /bin/ls");
    check("tmpfs /run/ls 755 elf evil", "Added: exec.tmpfs high");
}

#[test]
fn w10_copies_in_a_new_home_or_under_their_own_names_are_no_disguise() {
    check("write /home/a/.bashrc 644 data skel", "Added: file.persistence info");
    check("write /home/a/.bashrc 644 data evil", "Added: file.persistence high");
    // Not what a new home begins with.
    check("write /home/a/.profile 644 data skel", "Added: file.persistence high");
    check("write /etc/cron.d/a 644 data skel", "Added: file.persistence high");
    check(
        "exec /venv/python 755 elf python",
        "Relocated: exec.relocated medium from /usr/local/bin/python3.11",
    );
    check("exec /opt/bb/sh 755 elf busybox", "Relocated: exec.relocated medium from /bin/busybox");
    check("exec /opt/bb/nc 755 elf busybox", "Relocated: exec.relocated high from /bin/busybox");
    check("exec /opt/bb/ls 755 elf busybox", "Relocated: exec.relocated high from /bin/busybox");
    check("exec /opt/python3 755 elf ls", "Relocated: exec.relocated high from /bin/ls");
}

#[test]
fn w16_a_removed_directory_is_as_bad_as_the_worst_in_it() {
    check("remove /usr/sbin", "Removed: file.removed medium from /usr/sbin");
    check("remove /bin", "Removed: file.removed medium from /bin");
    check("remove /usr/bin", "Removed: file.removed low from /usr/bin");
    check("write /bin 777 data nothing", "Added: file.removed medium from /bin");
}

#[test]
fn what_takes_the_place_of_a_directory_removes_what_was_below() {
    check("write /usr/bin 777 data nothing", "Added: file.removed low from /usr/bin");
    check("write /tmp 777 data nothing", "Added: ");
}

#[test]
fn a_symlink_that_became_a_copy_is_relocated() {
    check("exec /bin/sh 755 elf busybox", "Relocated: exec.relocated medium from /bin/busybox");
    check("exec /bin/sh 755 elf evil", "Modified: exec.modified critical from /bin/sh");
}
