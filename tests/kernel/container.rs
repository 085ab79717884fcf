//! An overlay with a small image, mounted for a test, and a process that has it as its root.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use driftd::model::{Blake3Hash, ContainerId, FileTime};

use crate::common::{changed, mount_overlay, require_root, run, wait_for};
use crate::executable;

/// What the image is made of.
pub(crate) const BUSYBOX: &str = "/bin/busybox";

/// An overlay with a small image, and a process that has it as its root.
pub(crate) struct Container {
    pub(crate) dir: tempfile::TempDir,
    init: Option<Child>,
    /// The process in it, which may be a descendant of `init`.
    pub(crate) pid: u32,
    pub(crate) id: ContainerId,
    mounts: Vec<PathBuf>,
    /// The newest change in the image at the time of its recording.
    pub(crate) recorded: FileTime,
}

pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

impl Container {
    pub(crate) fn start() -> Container {
        Container::with(&[], "", false)
    }

    /// `launch` comes before the command that starts the container's init.
    pub(crate) fn with(launch: &[&str], mount_options: &str, upper_on_tmpfs: bool) -> Container {
        Container::of_image(|_| (), launch, mount_options, upper_on_tmpfs)
    }

    /// `change` modifies the image after its recording and before its container exists.
    pub(crate) fn of_image(
        change: impl Fn(&Path),
        launch: &[&str],
        mount_options: &str,
        upper_on_tmpfs: bool,
    ) -> Container {
        Container::reading(Stdio::null(), change, launch, mount_options, upper_on_tmpfs)
    }

    /// `input` is the standard input of init.
    pub(crate) fn reading(
        input: Stdio,
        change: impl Fn(&Path),
        launch: &[&str],
        mount_options: &str,
        upper_on_tmpfs: bool,
    ) -> Container {
        require_root();
        assert!(Path::new(BUSYBOX).exists(), "{BUSYBOX} is missing (try: make setup)");
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let lower = at("lower");
        for name in ["bin", "tmp", "etc", "mnt", "opt/tool"] {
            fs::create_dir_all(lower.join(name)).unwrap();
        }
        fs::copy(BUSYBOX, lower.join("bin/busybox")).unwrap();
        for applet in ["sh", "sleep", "cat", "mv", "rm", "chmod", "touch", "cp", "mkdir"] {
            symlink("busybox", lower.join("bin").join(applet)).unwrap();
        }
        fs::copy(BUSYBOX, lower.join("bin/true")).unwrap();
        fs::copy(BUSYBOX, lower.join("opt/tool/true")).unwrap();
        fs::write(lower.join("opt/tool/readme"), "read me").unwrap();
        fs::write(lower.join("etc/config"), "setting").unwrap();
        // File times are as coarse as the kernel's clock tick. A real image is older
        // than its containers by more than that.
        std::thread::sleep(Duration::from_millis(30));
        let recorded = newest_change(&lower);
        change(&lower);
        std::thread::sleep(Duration::from_millis(30));
        let id = ContainerId::new("test", dir.path().file_name().unwrap().to_str().unwrap());
        let own = at("own");
        fs::create_dir(&own).unwrap();
        let mut mounts = Vec::new();
        if upper_on_tmpfs {
            run(&[
                OsStr::new("mount"),
                "-t".as_ref(),
                "tmpfs".as_ref(),
                "none".as_ref(),
                own.as_ref(),
            ]);
            mounts.push(own);
        }
        for name in ["own/upper", "own/work", "merged"] {
            fs::create_dir(at(name)).unwrap();
        }
        let merged = at("merged");
        mount_overlay(&lower, &at("own"), &merged, mount_options);
        mounts.insert(0, merged.clone());
        let mut container = Container { dir, init: None, pid: 0, id, mounts, recorded };
        let mut words: Vec<&OsStr> = launch.iter().map(OsStr::new).collect();
        words.extend([OsStr::new("chroot"), merged.as_os_str()]);
        words.extend(["/bin/sleep", "3600"].map(OsStr::new));
        let init = Command::new(words[0]).args(&words[1..]).stdin(input).spawn().unwrap();
        let child = init.id();
        container.init = Some(init);
        container.pid = wait_for("the container's init", || {
            descendants(child).into_iter().find(|pid| {
                fs::read(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|line| line == b"/bin/sleep\x003600\0")
            })
        });
        container
    }

    pub(crate) fn merged(&self) -> PathBuf {
        self.dir.path().join("merged")
    }

    /// The image's only layer.
    pub(crate) fn lower(&self) -> PathBuf {
        self.dir.path().join("lower")
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.dir.path().join("own/upper")
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("chroot");
        command.arg(self.merged()).args(words).stdin(Stdio::null());
        command
    }

    #[track_caller]
    pub(crate) fn shell(&self, script: &str) {
        let output = self.command(&["/bin/sh", "-c", script]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{script}` failed: {stderr}");
    }

    /// Adds a program to the container's own layer: busybox with its path appended,
    /// so that the image does not hold the same content.
    pub(crate) fn drop_program(&self, path: &str) -> Blake3Hash {
        let target = self.merged().join(path.trim_start_matches('/'));
        let mut content = fs::read(BUSYBOX).unwrap();
        content.extend(path.bytes());
        executable::write(&target, &content).unwrap();
        Blake3Hash(*blake3::hash(&content).as_bytes())
    }

    pub(crate) fn kill_init(&mut self) {
        if let Some(mut init) = self.init.take() {
            if self.pid != 0 {
                kill(self.pid);
            }
            let _ = init.kill();
            let _ = init.wait();
        }
    }

    /// Unmounts everything, and fails if a mount stays busy for a second. A process
    /// that closes a file removes it from its table a moment before it releases the
    /// mount. Runtimes try longer (containerd: 50 times in 2.5 s).
    pub(crate) fn unmount(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(1);
        for mount in self.mounts.drain(..) {
            let unmount = || rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::empty());
            while let Err(err) = unmount() {
                let may_pass = err == rustix::io::Errno::BUSY && Instant::now() < deadline;
                assert!(may_pass, "cannot unmount {}: {err}", mount.display());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.kill_init();
        for mount in &self.mounts {
            let status = Command::new("umount").arg("-l").arg(mount).status();
            if !status.is_ok_and(|status| status.success()) {
                eprintln!("{} is left mounted", mount.display());
            }
        }
    }
}

/// The newest ctime in a directory.
pub(crate) fn newest_change(directory: &Path) -> FileTime {
    let mut newest = changed(directory);
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let is_directory = fs::symlink_metadata(&path).unwrap().is_dir();
        newest = newest.max(if is_directory { newest_change(&path) } else { changed(&path) });
    }
    newest
}

/// Changes a file in place: its length and its inode stay the same.
pub(crate) fn flip_a_byte(path: &Path) {
    use std::os::unix::fs::FileExt as _;
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let at = file.metadata().unwrap().len() - 1;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
}

pub(crate) fn descendants(pid: u32) -> Vec<u32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(pid) = all.get(next).copied() {
        next += 1;
        let children =
            fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        all.extend(children.split_ascii_whitespace().map(|pid| pid.parse::<u32>().unwrap()));
    }
    all
}

/// A process with its children, which must not outlive the test.
pub(crate) struct Family(pub(crate) Child);

impl Drop for Family {
    fn drop(&mut self) {
        for pid in descendants(self.0.id()) {
            kill(pid);
        }
        let _ = self.0.wait();
    }
}

pub(crate) fn hash_of(path: impl AsRef<Path>) -> Blake3Hash {
    Blake3Hash(*blake3::hash(&fs::read(path).unwrap()).as_bytes())
}

/// A container with its own mount namespace, and a pid namespace that identifies its
/// processes.
pub(crate) fn container_with_mounts() -> Container {
    Container::with(&["unshare", "--mount", "--pid", "--fork"], "", false)
}

impl Container {
    /// A command in the container's namespaces that still has the host's root.
    pub(crate) fn beside(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--pid", "--target", &self.pid.to_string()]).args(words);
        command.stdin(Stdio::null());
        command
    }

    /// Runs a script in the container's namespaces and root.
    #[track_caller]
    pub(crate) fn inside(&self, script: &str) {
        let merged = self.merged();
        let words = ["chroot", merged.to_str().unwrap(), "/bin/sh", "-c", script];
        let output = self.beside(&words).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`{script}` failed: {stderr}");
    }

    /// Mounts a tmpfs where only the container sees it.
    #[track_caller]
    pub(crate) fn mount_tmpfs(&self, at: &str) {
        let point = self.merged().join(at.trim_start_matches('/'));
        let words = ["mount", "-t", "tmpfs", "none", point.to_str().unwrap()];
        let output = self.beside(&words).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
