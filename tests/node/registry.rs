//! A registry on this machine's loopback interface, which the tests share.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use anyhow::ensure;

use crate::node::{bench, lock, spawn_daemon, tail, talk, wait_for};
use crate::programs::find;

struct Registry {
    server: Child,
    /// Where it listens, and how the names of its images begin.
    address: String,
}

static REGISTRY: Mutex<Option<Registry>> = Mutex::new(None);

/// Puts an image from its file into the registry, with every manifest it has, and
/// hands back the name to pull it by.
pub(crate) fn publish(file: &Path, name: &str) -> anyhow::Result<String> {
    let name = format!("{}/{name}", address()?);
    let output = Command::new(find("skopeo")?)
        .args(["--insecure-policy", "copy", "--quiet", "--preserve-digests"])
        .args(["--dest-tls-verify=false", "--dest-no-creds"])
        .arg(format!("oci-archive:{}", file.display()))
        .arg(format!("docker://{name}"))
        .stdin(Stdio::null())
        .output()?;
    ensure!(output.status.success(), "skopeo could not publish {name}\n{}", talk(&output));
    Ok(name)
}

/// The registry's address; the first caller starts it.
fn address() -> anyhow::Result<String> {
    let mut registry = lock(&REGISTRY);
    if let Some(registry) = &*registry {
        return Ok(registry.address.clone());
    }
    let directory = bench()?.scratch.path().join("registry");
    fs::create_dir_all(&directory)?;
    // If another process takes the port in between, the registry ends, and the test fails.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let address = format!("127.0.0.1:{port}");
    let settings = directory.join("config.yml");
    fs::write(
        &settings,
        format!(
            "version: 0.1\nlog:\n  level: warn\n\
             storage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: {address}\n",
            directory.join("data").display()
        ),
    )?;
    let mut command = Command::new(find("docker-registry")?);
    command.arg("serve").arg(&settings);
    let mut server = spawn_daemon(&mut command, &directory.join("log"))?;
    let answers = wait_for("the registry to answer", || {
        if let Some(status) = server.try_wait()? {
            anyhow::bail!("docker-registry ended: {status}\n{}", tail(&directory.join("log")));
        }
        Ok(TcpStream::connect(&address).is_ok().then_some(()))
    });
    *registry = Some(Registry { server, address: address.clone() });
    answers?;
    Ok(address)
}

/// Ends the registry, if one was started.
pub(crate) fn stop() {
    if let Some(mut registry) = lock(&REGISTRY).take() {
        let _ = registry.server.kill();
        let _ = registry.server.wait();
    }
}
