//! The programs that the tests drop, and the image they drop them into.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};

use crate::image::{self, Digests, Layer};
use crate::node::Control;

pub(crate) const WORKBENCH: &str = "registry.test/workbench:1";

/// The image of a pod's sandbox: one layer with one program that sleeps.
pub(crate) const PAUSE: &str = "registry.test/pause:1";

/// Sleeps `argv[1]` milliseconds (1 if absent) and prints nothing. With a second argument it
/// also leaves a Unix socket at that path.
const PAYLOAD: &str = r#"
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc > 2) {
        struct sockaddr_un address = { .sun_family = AF_UNIX };
        strncpy(address.sun_path, argv[2], sizeof address.sun_path - 1);
        int fd = socket(AF_UNIX, SOCK_STREAM, 0);
        if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address))
            return 1;
    }
    long milliseconds = argc > 1 ? strtol(argv[1], NULL, 10) : 1;
    usleep(milliseconds * 1000);
    return 0;
}
"#;

/// A static program, compiled once. Every use appends its own trailing bytes, so
/// that no two files are equal by accident.
#[derive(Debug)]
pub(crate) struct Payload {
    bytes: Vec<u8>,
    /// Runs programs that have no name, in several ways.
    loader: Vec<u8>,
    /// Serves a filesystem.
    fuse: Vec<u8>,
}

const LOADER: &str = include_str!("../data/loader.c");

/// The path in the image of the program that serves a filesystem (`fuse.rs`).
pub(crate) const FUSE_SERVER: &str = "/usr/bin/fuse-server";
pub(crate) const FUSE: &str = include_str!("fuse.c");

impl Payload {
    pub(crate) fn compile(scratch: &Path) -> anyhow::Result<Payload> {
        let bytes = compile(scratch, "payload", PAYLOAD)?;
        let loader = compile(scratch, "loader", LOADER)?;
        Ok(Payload { bytes, loader, fuse: compile(scratch, "fuse-server", FUSE)? })
    }

    /// The program that serves a filesystem, to be run on the host.
    pub(crate) fn fuse_server(&self) -> &[u8] {
        &self.fuse
    }

    /// This program, made different from every other by `mark`.
    pub(crate) fn marked(&self, mark: &str) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.extend_from_slice(mark.as_bytes());
        bytes
    }
}

/// Compiles a static program.
pub(crate) fn compile(scratch: &Path, name: &str, text: &str) -> anyhow::Result<Vec<u8>> {
    let source = scratch.join(format!("{name}.c"));
    let program = scratch.join(name);
    fs::write(&source, text)?;
    let output = Command::new("gcc")
        .args(["-static", "-Os", "-s", "-o"])
        .arg(&program)
        .arg(&source)
        .output()
        .context("cannot run gcc (run: make setup)")?;
    ensure!(
        output.status.success(),
        "gcc -static failed (is libc6-dev installed? run: make setup)\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(fs::read(program)?)
}

/// The applets that the image has as links to busybox.
const APPLETS: &[&str] = &[
    "cat", "chmod", "chown", "cp", "dd", "echo", "env", "gzip", "ln", "mkdir", "mkfifo", "mv",
    "printf", "rm", "sed", "seq", "sh", "sleep", "sync", "true",
];

/// Programs that only have to exist, each with content of its own.
const IMAGE_PROGRAMS: &[&str] = &[
    "/usr/bin/app",
    "/usr/bin/auditctl",
    "/usr/bin/curl",
    "/usr/bin/python3",
    "/usr/bin/wget",
    "/usr/sbin/nginx",
    "/usr/sbin/tcpdump",
    "/app/server",
];

/// Programs of this machine that go into the image with their libraries.
const HOST_PROGRAMS: &[&str] = &["bash", "ls", "touch", "find", "setcap"];

/// A program of the image that is small enough to be copied 20,000 times.
pub(crate) const TINY: &str = "/usr/bin/tiny";

/// A static program that ends at once, of some 130 bytes.
pub(crate) fn tiny_program() -> Vec<u8> {
    // mov eax, 60 (exit); xor edi, edi; syscall
    let code = [0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
    let (base, headers) = (0x40_0000_u64, 64 + 56_u64);
    let size = headers + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, x86-64, version; entry, program headers, no section headers.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [base + headers, 64, 0] {
        elf.extend(value.to_le_bytes());
    }
    // Flags; sizes: header, program header (one of them), section header (none).
    elf.extend([0; 4]);
    for value in [64_u16, 56, 1, 64, 0, 0] {
        elf.extend(value.to_le_bytes());
    }
    // PT_LOAD, readable and executable.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for value in [0, base, base, size, size, 0x1000] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Writes the image the scenarios happen in: three layers, with hard links,
/// symlinks, a whiteout and an opaque directory, and with real programs.
pub(crate) fn write_workbench(file: &Path, payload: &Payload) -> anyhow::Result<Digests> {
    Ok(image::write(file, WORKBENCH, workbench(payload)?)?)
}

pub(crate) fn workbench(payload: &Payload) -> anyhow::Result<Vec<Layer>> {
    let mut base = Layer::new()
        .directory("/bin", 0o755)
        .directory("/dev", 0o755)
        .directory("/etc", 0o755)
        .directory("/proc", 0o555)
        .directory("/run", 0o755)
        .directory("/sys", 0o555)
        .directory("/tmp", 0o1777)
        .directory("/usr", 0o755)
        .directory("/usr/bin", 0o755)
        .directory("/usr/sbin", 0o755)
        .directory("/usr/local", 0o755)
        .directory("/usr/local/bin", 0o755)
        .directory("/usr/lib", 0o755)
        .directory("/usr/lib/python3", 0o755)
        .directory("/var", 0o755)
        .directory("/var/log", 0o755)
        .directory("/.control", 0o755)
        .file(
            "/etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/app:/bin/sh\n",
        )
        .file("/etc/group", 0o644, b"root:x:0:\napp:x:1000:\n")
        .file("/etc/app.conf", 0o644, b"listen = 80\n")
        // Hidden by the layers above.
        .file("/usr/bin/left-behind", 0o755, &payload.marked("left behind"))
        .directory("/opt", 0o755)
        .directory("/opt/old", 0o755)
        .file("/opt/old/tool", 0o755, &payload.marked("old tool"));
    let busybox = fs::read(find("busybox")?)?;
    base = base.file("/bin/busybox", 0o755, &busybox);
    for applet in APPLETS {
        base = base.hard_link(format!("/bin/{applet}"), "/bin/busybox");
    }

    base = base.file(TINY, 0o755, &tiny_program());

    // At the paths that the scenarios use, wherever the host has them.
    let programs = with_programs(Layer::new(), HOST_PROGRAMS, |name| match name {
        "bash" | "ls" => format!("/bin/{name}"),
        "setcap" => format!("/usr/sbin/{name}"),
        _ => format!("/usr/bin/{name}"),
    })?;

    let mut application = Layer::new()
        .whiteout("/usr/bin/left-behind")
        .directory("/opt/old", 0o755)
        .opaque("/opt/old")
        .file("/opt/old/tool-2", 0o755, &payload.marked("tool 2"))
        .directory("/app", 0o755)
        .directory("/etc/nginx", 0o755)
        .directory("/etc/nginx/conf.d", 0o755)
        .directory("/var/log/nginx", 0o755)
        .file("/var/log/nginx/access.log", 0o644, b"")
        .file("/etc/nginx/default.conf.template", 0o644, b"server { listen ${PORT}; }\n")
        .directory("/docker-entrypoint.d", 0o755)
        .file("/docker-entrypoint.sh", 0o755, format!("#!/bin/sh\n{}\n", Control::INIT).as_bytes())
        .file("/docker-entrypoint.d/10-x.sh", 0o644, b"#!/bin/sh\necho configured\n")
        .file("/usr/bin/loader", 0o755, &payload.loader)
        .file(FUSE_SERVER, 0o755, &payload.fuse)
        .symlink("/usr/bin/editor", "/usr/bin/app");
    for path in IMAGE_PROGRAMS {
        application = application.file(path, 0o755, &payload.marked(path));
    }

    Ok(vec![base, programs, application])
}

pub(crate) fn write_pause(file: &Path, payload: &Payload) -> anyhow::Result<Digests> {
    let sleeper = payload.marked("pause");
    Ok(image::Image::new(PAUSE)
        .layer(Layer::new().file("/pause", 0o755, &sleeper), image::Packing::Gzip)
        .command(&["/pause", "4000000"])
        .write(file)?)
}

/// Packages that every machine of the distribution has.
const PACKAGES: &[&str] = &["base-files", "bash", "coreutils", "dpkg", "libc-bin", "perl-base"];

/// The files of some packages of this machine, as a layer.
pub(crate) fn machine_files() -> anyhow::Result<Layer> {
    files_of_packages(PACKAGES)
}

/// Python and pip as this machine has them, as a layer.
pub(crate) fn python() -> anyhow::Result<Layer> {
    let program = fs::canonicalize("/usr/bin/python3").context("no python3 (run: make setup)")?;
    let name = program.file_name().and_then(|name| name.to_str()).context("an odd name")?;
    let packages = [
        "python3-minimal",
        "python3-pip-whl",
        &format!("{name}-minimal"),
        &format!("lib{name}-minimal"),
        &format!("lib{name}-stdlib"),
    ];
    with_libraries(files_of_packages(&packages)?, &program)
}

/// A program of this machine with its libraries, as a layer.
pub(crate) fn program(name: &str) -> anyhow::Result<Layer> {
    with_programs(Layer::new(), &[name], |name| format!("/usr/bin/{name}"))
}

/// Adds programs of this machine, each at its path in the image, and their libraries.
pub(crate) fn with_programs(
    mut layer: Layer,
    names: &[&str],
    path_of: impl Fn(&str) -> String,
) -> anyhow::Result<Layer> {
    let mut libraries = BTreeSet::new();
    for name in names {
        let program = find(name)?;
        libraries.extend(libraries_of(&program)?);
        layer = layer.file(path_of(name), 0o755, &fs::read(&program)?);
    }
    for library in libraries {
        layer = layer.host_file(&library)?;
    }
    Ok(layer)
}

fn with_libraries(mut layer: Layer, program: &Path) -> anyhow::Result<Layer> {
    for library in libraries_of(program)? {
        layer = layer.host_file(&library)?;
    }
    Ok(layer)
}

fn files_of_packages(packages: &[&str]) -> anyhow::Result<Layer> {
    let output = Command::new("dpkg").arg("--listfiles").args(packages).output()?;
    ensure!(
        output.status.success(),
        "dpkg does not know what it has installed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut names: Vec<&str> = str::from_utf8(&output.stdout)?
        .lines()
        .filter_map(|line| line.strip_prefix('/'))
        .filter(|name| Path::new("/").join(name).symlink_metadata().is_ok())
        // Files that administrators change are left out.
        .filter(|name| !name.is_empty() && !name.starts_with("etc"))
        .collect();
    names.sort_unstable();
    names.dedup();
    let names = names.join("\0");
    Layer::new().packed_by_tar(Path::new("/"), names.as_bytes(), &["--format=posix"])
}

/// The libraries and the loader of a dynamic program, as `ldd` lists them.
pub(crate) fn libraries_of(program: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect())
}

/// A program of this machine.
pub(crate) fn find(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
        .with_context(|| format!("{name} is not installed (run: make setup)"))
}
