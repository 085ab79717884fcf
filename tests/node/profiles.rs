//! The shipped profiles on a real node: what each exception is for is accepted, and an attack in
//! the same place is reported at its full severity. All profiles are switched on at once, so
//! that an attack must get past each of them.
//!
//! A small program stands in for the runtimes and package managers that cannot be had here; dpkg
//! and busybox are the real ones.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::aggregation::{INSTALL, installer_layers, package};
use crate::image::Layer;
use crate::node::{Container, Node, bench, summaries, wait_for};
use crate::{programs, test_alone};

pub(crate) fn tests() -> Vec<Trial> {
    const SETTINGS: &str = "[policy]\ndir = \"{node}/policy.d\"\nprofile_dir = \"{node}/baselines\"\n\
        profiles = [\"apk\", \"apt\", \"busybox-install\", \"ci-runner\", \"dotnet\", \
        \"jvm-native-libraries\", \"nix\", \"npm\", \"pip\", \"pyinstaller\", \"shared-volume\"]";
    vec![test_alone(
        "each_exception_of_the_profiles_accepts_its_work_and_no_attack_beside_it",
        SETTINGS,
        profiles,
    )]
}

/// The shipped profiles.
const SHIPPED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/baselines");

/// Puts the profiles below the node's directory. Those of a working copy may belong to a user
/// that is not trusted.
pub(crate) fn lay_profiles(node: &Node) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = node.path("baselines");
    std::fs::create_dir_all(&directory)?;
    for entry in std::fs::read_dir(SHIPPED)? {
        let entry = entry?;
        let file = directory.join(entry.file_name());
        std::fs::write(&file, std::fs::read(entry.path())?)?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644))?;
    }
    Ok(())
}

/// Does one thing after the other: copies a file, maps a file as the dynamic linker maps a
/// library, or runs the rest as a command.
const WORKER: &str = r#"
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static int copy(const char *from, const char *to)
{
    char bytes[65536];
    int in = open(from, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0755);
    ssize_t size;
    if (in < 0 || out < 0)
        return 1;
    while ((size = read(in, bytes, sizeof bytes)) > 0)
        if (write(out, bytes, size) != size)
            return 1;
    close(in);
    close(out);
    return 0;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "write")) {
            if (copy(argv[i + 1], argv[i + 2]))
                return 1;
            /* None of the real ones ends within a millisecond. */
            usleep(300000);
            i += 2;
        } else if (!strcmp(argv[i], "map")) {
            int fd = open(argv[++i], O_RDONLY);
            if (fd < 0 || mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0) == MAP_FAILED)
                return 2;
            usleep(400000);
        } else if (!strcmp(argv[i], "run")) {
            int status;
            if (!fork()) {
                execv(argv[i + 1], argv + i + 1);
                _exit(127);
            }
            wait(&status);
            return status ? 5 : 0;
        }
    }
    return 0;
}
"#;

const IMAGE: &str = "registry.test/profiles:1";
const NIX: &str = "/nix/store/0abc-nix-2.24/bin/nix";
const NPM: &str = "/usr/lib/node_modules/npm/bin/npm-cli.js";

fn image(node: &Node) -> anyhow::Result<()> {
    let worker = programs::compile(bench()?.scratch.path(), "worker", WORKER)?;
    let mut layer = Layer::new();
    let homes = ["/root", "/home/runner/bin", "/home/runner/_work/_temp", "/usr/lib/python3.11"];
    let nix = ["/nix/store/0abc-nix-2.24/bin", "/nix/store/1def-hello"];
    let npm = ["/usr/lib/node_modules/npm/bin", "/srv/node_modules/esbuild"];
    let mut made = Vec::new();
    for directory in homes.iter().chain(&nix).chain(&npm).chain(&["/sbin", "/var/lib"]) {
        for end in directory.match_indices('/').map(|(at, _)| at).skip(1).chain([directory.len()]) {
            let parent = &directory[..end];
            if !made.contains(&parent) {
                made.push(parent);
                layer = layer.directory(parent, 0o755);
            }
        }
    }
    for path in [
        "/usr/bin/java",
        "/usr/bin/app",
        "/usr/bin/python3.11",
        "/usr/bin/node",
        "/sbin/apk",
        "/home/runner/bin/Runner.Worker",
        "/usr/sbin/useradd",
        NIX,
    ] {
        // No two files of an image are equal by accident.
        let own = [worker.as_slice(), path.as_bytes()].concat();
        layer = layer.file(path, 0o755, &own);
    }
    layer = layer.file(NPM, 0o755, b"#!/usr/bin/node\n");
    let mut layers = installer_layers()?;
    layers.push(layer);
    node.import_layers(IMAGE, layers)?;
    Ok(())
}

struct Case {
    profile: &'static str,
    /// What the profile is for. `/.control/{a,b,c,d}` are programs.
    work: &'static str,
    attack: &'static str,
    reported: &'static [&'static str],
}

const CASES: &[Case] = &[
    Case {
        profile: "busybox-install",
        work: "/bin/busybox --install /sbin; /sbin/uptime; /sbin/cal",
        attack: "cp /.control/a /sbin/evil; /sbin/evil; cp /bin/busybox /tmp/nc; /tmp/nc -h || true",
        reported: &["critical exec.new /sbin/evil", "high exec.relocated /tmp/nc"],
    },
    Case {
        profile: "jvm-native-libraries",
        work: "/usr/bin/java write /.control/a /tmp/libnetty_epoll.so map /tmp/libnetty_epoll.so
               mkdir -p /root/.cache/JNA/temp
               /usr/bin/java write /.control/b /root/.cache/JNA/temp/jna1.tmp \
                   map /root/.cache/JNA/temp/jna1.tmp",
        attack: "cp /.control/c /tmp/libevil.so; /usr/bin/java map /tmp/libevil.so
                 /usr/bin/java write /.control/d /tmp/libprogram.so run /tmp/libprogram.so",
        reported: &["high library.loaded /tmp/libevil.so", "critical exec.new /tmp/libprogram.so"],
    },
    Case {
        profile: "dotnet",
        work: "mkdir -p /root/.net/app/x
               /usr/bin/app write /.control/a /root/.net/app/x/libSystem.so \
                   map /root/.net/app/x/libSystem.so",
        attack: "cp /.control/b /root/.net/app/x/libevil.so
                 /usr/bin/app map /root/.net/app/x/libevil.so",
        reported: &["high library.loaded /root/.net/app/x/libevil.so"],
    },
    Case {
        profile: "pyinstaller",
        work: "mkdir /tmp/_MEIx9Q2ab
               /usr/bin/app write /.control/a /tmp/_MEIx9Q2ab/libz.so map /tmp/_MEIx9Q2ab/libz.so",
        attack: "cp /.control/b /tmp/_MEIx9Q2ab/libevil.so
                 /usr/bin/app map /tmp/_MEIx9Q2ab/libevil.so
                 cp /.control/c /tmp/_MEIx9Q2ab/evil; /tmp/_MEIx9Q2ab/evil",
        reported: &["high library.loaded", "critical exec.new /tmp/_MEIx9Q2ab/evil"],
    },
    Case {
        profile: "pip",
        work: "/usr/bin/python3.11 -m pip install write /.control/a /usr/lib/python3.11/fast.so
               sleep 3; /usr/bin/python3.11 -c x map /usr/lib/python3.11/fast.so",
        attack: "cp /.control/b /usr/lib/python3.11/evil.so
                 /usr/bin/python3.11 -c x map /usr/lib/python3.11/evil.so
                 cp /.control/c /usr/local/bin/evil; /usr/local/bin/evil",
        reported: &[
            "high library.loaded /usr/lib/python3.11/evil.so",
            "critical exec.new /usr/local/bin/evil",
        ],
    },
    Case {
        profile: "npm",
        work: "/usr/bin/node /usr/lib/node_modules/npm/bin/npm-cli.js install \
                   write /.control/a /srv/node_modules/esbuild/esbuild
               sleep 3; /srv/node_modules/esbuild/esbuild",
        attack: "cp /.control/b /srv/node_modules/esbuild/evil; /srv/node_modules/esbuild/evil",
        reported: &["critical exec.new /srv/node_modules/esbuild/evil"],
    },
    Case {
        profile: "apk",
        work: "/sbin/apk add write /.control/a /usr/bin/jq; sleep 3; /usr/bin/jq",
        attack: "cp /.control/b /usr/bin/evil; /usr/bin/evil",
        reported: &["critical exec.new /usr/bin/evil"],
    },
    Case {
        profile: "ci-runner",
        work: "echo 'sleep 0.3' >/home/runner/_work/_temp/step.sh
               /home/runner/bin/Runner.Worker run /bin/sh -e /home/runner/_work/_temp/step.sh
               mkdir -p /root/workspace/job@tmp/durable-1a2b3c4d; echo 'sleep 0.3' >/root/script
               /usr/bin/java write /root/script /root/workspace/job@tmp/durable-1a2b3c4d/script.sh
               sh /root/workspace/job@tmp/durable-1a2b3c4d/script.sh",
        attack: "echo 'sleep 0.31' >/home/runner/_work/_temp/evil.sh
                 sh /home/runner/_work/_temp/evil.sh
                 cp /.control/a /home/runner/_work/_temp/evil
                 /home/runner/bin/Runner.Worker run /home/runner/_work/_temp/evil",
        reported: &[
            "medium exec.interpreted /home/runner/_work/_temp/evil.sh",
            "critical exec.new /home/runner/_work/_temp/evil",
        ],
    },
    Case {
        profile: "nix",
        work: "/nix/store/0abc-nix-2.24/bin/nix write /.control/a /nix/store/1def-hello/hello
               /nix/store/1def-hello/hello",
        attack: "cp /.control/b /nix/store/1def-hello/evil; /nix/store/1def-hello/evil",
        reported: &["critical exec.new /nix/store/1def-hello/evil"],
    },
];

fn profiles(node: &Node) -> anyhow::Result<()> {
    // Nothing was in force without them.
    ensure!(!node.status()?["policy"]["refused"].is_null());
    lay_profiles(node)?;
    let reload = node.driftd(&["policy", "reload"])?;
    ensure!(reload.status.success(), "{}", String::from_utf8_lossy(&reload.stderr));
    image(node)?;
    let mut failures: Vec<String> = Vec::new();
    let mut check = |name: &str, result: anyhow::Result<()>| {
        if let Err(err) = result {
            failures.push(format!("{name}: {err:#}"));
        }
    };
    let only = std::env::var("DRIFTD_PROFILE").ok();
    for case in CASES.iter().filter(|case| only.as_deref().is_none_or(|one| one == case.profile)) {
        let played = node.container_of(IMAGE).and_then(|container| play(case, &container));
        check(case.profile, played);
    }
    check("apt", apt(node));
    check("shared-volume", shared_volume(node));
    // No exception is there that accepts nothing.
    let rules = node.answer(&["policy", "ls"])?;
    for rule in &rules {
        if rule["hits"].as_u64() == Some(0) {
            failures.push(format!("{} has accepted nothing", rule["id"]));
        }
    }
    ensure!(rules.len() > CASES.len(), "{rules:#?}");
    let status = node.status()?;
    ensure!(status["policy"]["profiles"].as_array().is_some_and(|all| all.len() == 11), "{status}");
    ensure!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

fn lay(container: &Container<'_>) -> anyhow::Result<()> {
    ["a", "b", "c", "d"].iter().try_for_each(|name| container.lay_payload(name))
}

fn play(case: &Case, container: &Container<'_>) -> anyhow::Result<()> {
    lay(container)?;
    container.sh(case.work)?;
    accepted(container, case.profile)?;
    attack(container, case.attack, case.reported)
}

/// Waits until each exception of a profile has accepted something in the container, and nothing
/// that is worth a page was reported.
fn accepted(container: &Container<'_>, profile: &str) -> anyhow::Result<()> {
    let text = std::fs::read_to_string(Path::new(SHIPPED).join(format!("{profile}.toml")))?;
    let ids: Vec<&str> =
        text.lines().filter_map(|line| line.split_once("= \"")?.1.strip_suffix('"')).collect();
    let prefix = format!("{profile}.");
    let mut ids: Vec<&str> = ids.into_iter().filter(|id| id.starts_with(&prefix)).collect();
    // A container of its own shows each of these.
    ids.retain(|id| *id != "shared-volume.argo");
    let all = || container.node.answer(&["findings", "--accepted", "--container", &container.id]);
    wait_for("what the profile accepts", || {
        let mut hits: BTreeMap<String, u64> = BTreeMap::new();
        for one in all()? {
            let rule = one["verdict"]["rule"].as_str().context("no rule")?.to_owned();
            *hits.entry(rule).or_default() += one["count"].as_u64().unwrap_or_default();
        }
        Ok(ids.iter().all(|id| hits.contains_key(*id)).then_some(()))
    })
    .with_context(|| {
        let reported = container.findings().unwrap_or_default();
        let accepted = all().unwrap_or_default();
        let explained = reported.iter().filter_map(|one| {
            let output = container.node.driftd(&["policy", "explain", one["id"].as_str()?]).ok()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let own = text.lines().filter(|line| line.starts_with(&prefix));
            Some(own.collect::<Vec<_>>().join("\n"))
        });
        let explained: Vec<String> = explained.collect();
        format!(
            "{ids:?}\naccepted: {:#?}\nreported: {:#?}\n{}\n{:#?}",
            summaries(&accepted),
            summaries(&reported),
            explained.join("\n"),
            reported.first()
        )
    })?;
    // What was written is judged when it has settled.
    container.diff()?;
    let mut reported = container.findings()?;
    reported.retain(|one: &Value| {
        one["severity"].as_str().is_some_and(|one| !["info", "low"].contains(&one))
    });
    ensure!(reported.is_empty(), "reported: {:#?}", summaries(&reported));
    Ok(())
}

fn attack(container: &Container<'_>, script: &str, expected: &[&str]) -> anyhow::Result<()> {
    container.sh(script)?;
    wait_for("the attack", || {
        let lines = summaries(&container.findings()?);
        let is_there = |one: &&str| lines.iter().any(|line| line.starts_with(*one));
        Ok(expected.iter().all(is_there).then_some(()))
    })
    .with_context(|| {
        format!("{expected:#?}\n{:#?}", container.findings().map(|all| summaries(&all)))
    })
}

/// dpkg itself, with a package of its own.
fn apt(node: &Node) -> anyhow::Result<()> {
    let container = node.container_of(IMAGE)?;
    lay(&container)?;
    let program = bench()?.payload.marked(&format!("{} nmap", container.id));
    container.lay("nmap.deb", &package(&container, &[("/usr/bin/nmap", program)])?)?;
    container.lay("passwd", b"root:x:0:0::/:/bin/sh\nmemcache:x:1:1::/:/bin/false\n")?;
    container.sh(&format!("{INSTALL}\nsleep 3; /usr/bin/nmap"))?;
    accepted(&container, "apt")?;
    attack(
        &container,
        "cp /.control/a /usr/bin/evil; /usr/bin/evil; cp /.control/b /usr/bin/nmap; /usr/bin/nmap
         echo 'evil:x:0:0::/:/bin/sh' >>/etc/passwd",
        &[
            "critical exec.new /usr/bin/evil",
            "critical exec.new /usr/bin/nmap",
            "high file.persistence /etc/passwd",
        ],
    )
}

fn shared_volume(node: &Node) -> anyhow::Result<()> {
    for (directory, program) in [("/tekton/bin", "entrypoint"), ("/var/run/argo", "argoexec")] {
        let volume = node.path(&format!("volume-{}", node.next_id()));
        std::fs::create_dir(&volume)?;
        let mount = format!("type=bind,src={},dst={directory},options=rbind:rw", volume.display());
        let container = node.container_with(&["--mount", &mount])?;
        lay(&container)?;
        container.sh(&format!("cp /.control/a {directory}/{program}; {directory}/{program}"))?;
        let rule = format!("shared-volume.{}", directory.rsplit('/').nth(1).unwrap_or_default());
        let rule = if program == "argoexec" { "shared-volume.argo".to_owned() } else { rule };
        wait_for(&rule, || {
            let all = node.answer(&["findings", "--accepted", "--container", &container.id])?;
            Ok(all.iter().any(|one| one["verdict"]["rule"] == rule.as_str()).then_some(()))
        })
        .with_context(|| format!("{:#?}", container.findings().map(|all| summaries(&all))))?;
        attack(
            &container,
            &format!("cp /.control/b {directory}/evil; {directory}/evil"),
            &[&format!("medium exec.volume {directory}/evil")],
        )?;
    }
    Ok(())
}
