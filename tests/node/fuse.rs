//! A filesystem that a process of a container serves, and that makes processes from outside
//! wait (`fuse.c`, which the image has as [`SERVER`]). Nothing is left behind: when a [`Fuse`]
//! is dropped, its connection is aborted. That ends the server, and each process that waits
//! for it goes on with an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::node::{Container, Node, wait_within};
use crate::programs::FUSE_SERVER as SERVER;

/// Options of `ctr run` for a container that may mount such a filesystem.
pub(crate) const MAY_MOUNT: &[&str] = &["--cap-add", "CAP_SYS_ADMIN", "--device", "/dev/fuse"];

/// Which processes the server answers.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "each bench needs some of them")]
pub(crate) enum Answers {
    All,
    /// Processes of the server's pid namespace. All others wait for ever.
    Own,
    None,
}

impl Answers {
    fn mode(self) -> &'static str {
        match self {
            Answers::All => "all",
            Answers::Own => "own",
            Answers::None => "mute",
        }
    }

    #[allow(dead_code, reason = "some benches never change it")]
    fn signal(self) -> &'static str {
        match self {
            Answers::All => "ALRM",
            Answers::Own => "USR1",
            Answers::None => "USR2",
        }
    }
}

/// A running server. It ends when this is dropped.
pub(crate) struct Fuse<'a> {
    container: &'a Container<'a>,
    at: String,
    /// The directory in which the kernel lets the connection be aborted.
    connection: PathBuf,
    _control: ControlFilesystem,
    log: String,
}

impl<'a> Fuse<'a> {
    /// Mounts at `at` a directory with `files`, each a name and the file of the container
    /// whose content it has.
    pub(crate) fn mount(
        container: &'a Container<'a>,
        at: &str,
        answers: Answers,
        files: &[(&str, &str)],
    ) -> anyhow::Result<Fuse<'a>> {
        ensure!(
            Path::new("/dev/fuse").exists(),
            "this machine has no /dev/fuse (is the kernel's module there? try: modprobe fuse)"
        );
        let control = ControlFilesystem::mount(container.node)?;
        let log = format!("asked-{}", container.node.next_id());
        let files: Vec<String> =
            files.iter().map(|(name, source)| format!("{name}={source}")).collect();
        let (mode, files) = (answers.mode(), files.join(" "));
        container.sh(&format!(
            "mkdir -p {at}\n\
             {SERVER} {mode} {at} /.control/{log} {files} >/.control/{log}.says 2>&1 </dev/null &\n\
             echo $! >/.control/{log}.pid"
        ))?;
        let init = container.init()?;
        let found = wait_within(Duration::from_secs(10), "the filesystem to be mounted", || {
            connection_of(init, at)
        });
        let number = found.with_context(|| {
            let says = container.laid(&format!("{log}.says"));
            format!("{SERVER} says: {}", fs::read_to_string(says).unwrap_or_default())
        })?;
        let connection = control.directory.join(number);
        ensure!(connection.join("abort").exists(), "{} is missing", connection.display());
        Ok(Fuse { container, at: at.to_owned(), connection, _control: control, log })
    }

    /// Changes which processes are answered.
    #[allow(dead_code, reason = "some benches never change it")]
    pub(crate) fn answer(&self, answers: Answers) -> anyhow::Result<()> {
        let (signal, log) = (answers.signal(), &self.log);
        self.container.sh(&format!("kill -{signal} $(cat /.control/{log}.pid)")).map(drop)
    }

    /// Requests that were left unanswered so far, by name.
    pub(crate) fn unanswered(&self) -> Vec<String> {
        let log = fs::read_to_string(self.container.laid(&self.log)).unwrap_or_default();
        log.lines().filter_map(|line| Some(line.split(' ').next()?.to_owned())).collect()
    }

    /// Ends the connection: waiting processes go on with an error, and the server ends.
    pub(crate) fn abort(&self) {
        let _ = fs::write(self.connection.join("abort"), "1");
    }
}

impl Drop for Fuse<'_> {
    fn drop(&mut self) {
        self.abort();
        let _ = self.container.try_sh(&format!("/bin/busybox umount -l {}", self.at));
    }
}

/// Shell commands that run a program `x` and a script `s` of a filesystem at `/mnt`, in several
/// ways, again and again.
#[allow(dead_code, reason = "some benches never attack with it")]
pub(crate) fn run_from_mnt(seconds: u64) -> String {
    format!(
        "ln -s /mnt /tmp/l\n\
         for i in $(seq {seconds}); do\n\
         for way in '/mnt/x sleep 60' '/mnt/s' 'sh /tmp/l/s' 'sh /dev/fd/9 9</mnt/s'; do\n\
         ( eval \"$way\" ) </dev/null >/dev/null 2>&1 &\n\
         done\n\
         sleep 1; done"
    )
}

/// The number of the connection of the filesystem at `at`, if it is mounted already.
fn connection_of(init: i32, at: &str) -> anyhow::Result<Option<String>> {
    let mounts = fs::read_to_string(format!("/proc/{init}/mountinfo"))?;
    let line = mounts
        .lines()
        .rev()
        .find(|line| line.split(' ').nth(4) == Some(at) && line.contains(" - fuse "));
    let device = line.and_then(|line| line.split(' ').nth(2));
    // Such a filesystem has no device: only a minor number.
    Ok(device.and_then(|device| device.strip_prefix("0:")).map(ToOwned::to_owned))
}

/// The kernel's list of connections, mounted for one test.
struct ControlFilesystem {
    directory: PathBuf,
}

impl ControlFilesystem {
    fn mount(node: &Node) -> anyhow::Result<ControlFilesystem> {
        let directory = node.path(&format!("fusectl-{}", node.next_id()));
        fs::create_dir(&directory)?;
        mount(c"fusectl", &directory, c"fusectl", MountFlags::empty(), None).context(
            "this kernel has no fusectl (is the module fuse loaded? try: modprobe fuse)",
        )?;
        Ok(ControlFilesystem { directory })
    }
}

impl Drop for ControlFilesystem {
    fn drop(&mut self) {
        let _ = unmount(&self.directory, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.directory);
    }
}
