//! One process, held by its directory in `/proc`, so that a pid that is used again cannot
//! mix two processes. What has a file of its own here adds to [`Handle`]: descriptors,
//! connections, mappings, control groups, namespaces.

use std::fmt;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use procfs::process::Process;

use super::error::into_io;
use super::stat::{Stat, stat_of};
use super::status::{field, parse_uid};
use crate::model::{Exit, Login, ProcessIdentity};
use crate::sys::{errand, file};

/// How much is read of what a process chooses.
pub const MAX_ARGUMENTS: usize = 128;
pub const MAX_ARGUMENT_BYTES: usize = 4 * 1024;
const MAX_CMDLINE_BYTES: u64 = 64 * 1024;
const MAX_ENVIRONMENT_BYTES: u64 = 256 * 1024;
const MAX_VALUE_BYTES: usize = 512;
/// A network namespace can have any number of connections, and a process any number of
/// mappings.
pub(super) const MAX_TABLE_BYTES: u64 = 8 << 20;

pub struct Handle {
    pub(super) process: Process,
    /// As read when the handle was made.
    stat: Stat,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Handle({})", self.process.pid)
    }
}

impl Handle {
    pub fn open(pid: u32) -> io::Result<Handle> {
        let pid = i32::try_from(pid).map_err(|_| io::ErrorKind::NotFound)?;
        if pid == 0 {
            return Err(io::ErrorKind::NotFound.into());
        }
        let process = Process::new(pid).map_err(into_io)?;
        let stat = stat_of(&process)?;
        Ok(Handle { process, stat })
    }

    /// Opens a process only if its pid still is this process.
    pub fn open_exactly(identity: ProcessIdentity) -> io::Result<Handle> {
        let handle = Handle::open(identity.pid)?;
        if handle.stat.identity == identity {
            Ok(handle)
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    }

    pub fn identity(&self) -> ProcessIdentity {
        self.stat.identity
    }

    /// As it was when the handle was made.
    pub fn first_stat(&self) -> &Stat {
        &self.stat
    }

    /// As it is now.
    pub fn stat(&self) -> io::Result<Stat> {
        stat_of(&self.process)
    }

    /// Whether the process has ended by now.
    pub fn has_ended(&self) -> bool {
        self.stat().map_or(true, |stat| stat.has_ended())
    }

    /// Opens a file below `/proc/PID`; follows a link of the kernel.
    pub(in crate::sys) fn open_file(&self, name: &str) -> io::Result<std::fs::File> {
        self.process.open_relative(name).map_err(into_io)
    }

    pub(super) fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.process.open_relative(name).map_err(into_io)?;
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The executable's path, including the kernel's ` (deleted)`.
    pub fn exe(&self) -> io::Result<Vec<u8>> {
        let path = self.process.exe().map_err(into_io)?;
        Ok(path.into_os_string().into_vec())
    }

    /// The executable's device and inode.
    pub fn exe_identity(&self) -> io::Result<(u64, u64)> {
        let stat = file::stat_path(format!("/proc/{}/exe", self.process.pid))?;
        Ok((stat.device, stat.inode))
    }

    /// Reads a file whose opening already takes locks of the process's memory.
    pub(super) fn read_memory(&self, name: &'static str, limit: u64) -> io::Result<Vec<u8>> {
        self.patiently(move |pid| {
            let mut bytes = Vec::new();
            std::fs::File::open(format!("/proc/{pid}/{name}"))?
                .take(limit)
                .read_to_end(&mut bytes)?;
            Ok(bytes)
        })
        .and_then(|bytes| self.if_still_there(bytes))
    }

    /// Returns `found` if the process still exists: until then the pid was its own.
    pub(super) fn if_still_there<T>(&self, found: T) -> io::Result<T> {
        self.stat().map(|_| found)
    }

    /// Does work that takes locks of the process's memory; an error if they are held for
    /// long.
    pub(super) fn patiently<T: Send + 'static>(
        &self,
        work: impl FnOnce(i32) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let pid = self.process.pid;
        let group = || self.read("cgroup", 64 * 1024).unwrap_or_default();
        errand::run(self.identity(), group, move || work(pid))?
    }

    /// Each argument; `None` for a process that has ended or has none.
    pub fn arguments(&self) -> io::Result<Option<Vec<Vec<u8>>>> {
        // Opening this file takes no lock, and the open file belongs to this process.
        let file = self.process.open_relative("cmdline").map_err(into_io)?;
        let cmdline = self.patiently(move |_| {
            let mut bytes = Vec::new();
            file.take(MAX_CMDLINE_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        })?;
        Ok(split_arguments(&cmdline))
    }

    /// The text of `/proc/PID/cmdline`, at most `limit` bytes of it.
    pub fn command_line(&self, limit: u64) -> io::Result<Vec<u8>> {
        self.read_memory("cmdline", limit)
    }

    /// The environment with which its program began, at most `limit` bytes of it.
    pub fn environment(&self, limit: u64) -> io::Result<Vec<u8>> {
        self.read_memory("environ", limit)
    }

    /// The text of `/proc/PID/maps`, at most `limit` bytes of it.
    pub fn maps(&self, limit: u64) -> io::Result<Vec<u8>> {
        self.read_memory("maps", limit)
    }

    /// The text of `/proc/PID/status`.
    pub fn status(&self) -> io::Result<Vec<u8>> {
        self.read("status", 64 * 1024)
    }

    /// The effective user ID.
    pub fn uid(&self) -> io::Result<u32> {
        let status = self.read("status", 16 * 1024)?;
        parse_uid(&status).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The login that it descends from: the user and the audit session. `None` if it
    /// descends from no login, or the kernel keeps no audit of logins.
    pub fn login(&self) -> Option<Login> {
        let number = |name| -> Option<u32> {
            let text = self.read(name, 32).ok()?;
            let number = str::from_utf8(&text).ok()?.trim_end().parse().ok()?;
            // -1 if it was never set.
            Some(number).filter(|number| *number != u32::MAX)
        };
        Some(Login { uid: number("loginuid")?, audit_session: number("sessionid") })
    }

    /// The value of the first of these variables in the environment with which it began.
    pub fn variable(&self, names: &[String]) -> Option<Vec<u8>> {
        let environment = self.read_memory("environ", MAX_ENVIRONMENT_BYTES).ok()?;
        names.iter().find_map(|name| {
            let mut variables = environment.split(|&byte| byte == 0);
            let value =
                variables.find_map(|one| one.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
            Some(value[..value.len().min(MAX_VALUE_BYTES)].to_vec())
        })
    }

    /// How it ended, as long as its parent has not waited for it (proc_pid_stat(5), field
    /// 52).
    pub fn exit(&self) -> Option<Exit> {
        let text = self.read("stat", 2048).ok()?;
        let fields = &text[text.iter().rposition(|&byte| byte == b')')? + 1..];
        let fields: Vec<&str> = str::from_utf8(fields).ok()?.split_ascii_whitespace().collect();
        // After the name comes field 3.
        let is_over = matches!(*fields.first()?, "Z" | "X" | "x");
        is_over.then(|| fields.get(52 - 3)?.parse().ok()).flatten().map(Exit::from_wait_status)
    }

    /// Its working directory, as driftd's root sees it.
    pub fn working_directory(&self) -> io::Result<PathBuf> {
        self.process.cwd().map_err(into_io)
    }

    /// Its pid in its own pid namespace (proc_pid_status(5), `NSpid`).
    pub fn own_number(&self) -> Option<u32> {
        let status = self.read("status", 16 * 1024).ok()?;
        field(&status, "NSpid:")?.split_ascii_whitespace().next_back()?.parse().ok()
    }

    pub fn is_first_in_pid_namespace(&self) -> bool {
        self.own_number() == Some(1)
    }

    /// Whether its root directory is the host's: it is on its way into a container, or its
    /// runtime runs it there, and it executes the host's programs.
    pub fn has_host_root(&self) -> bool {
        let identity = |path: &Path| file::stat_path(path).map(|at| (at.device, at.inode));
        identity(&self.root_path())
            .is_ok_and(|root| identity(Path::new("/")).is_ok_and(|host| host == root))
    }

    /// Opens its program, with or without a name, as O_PATH. `door::reopen` opens it for
    /// reading.
    pub fn open_exe(&self) -> io::Result<OwnedFd> {
        self.open_link("exe")
    }

    /// Opens its root directory as O_PATH, for look-ups. Keep it only for a moment: it keeps
    /// a container's mount busy.
    pub fn open_root(&self) -> io::Result<OwnedFd> {
        self.open_link("root")
    }

    /// Opens its working directory, where its relative paths begin, as O_PATH.
    pub fn open_working_directory(&self) -> io::Result<OwnedFd> {
        self.open_link("cwd")
    }

    /// Where its relative paths begin, as driftd's root sees it.
    pub fn cwd(&self) -> io::Result<Vec<u8>> {
        Ok(self.process.cwd().map_err(into_io)?.into_os_string().into_vec())
    }

    /// Follows one link of the kernel below `/proc/PID`, and opens its target as O_PATH.
    pub(super) fn open_link(&self, name: &str) -> io::Result<OwnedFd> {
        let path = format!("/proc/{}/{name}", self.process.pid);
        let fd = file::open_link(&path)?;
        // The pid belongs to this process as long as its directory answers.
        self.stat()?;
        Ok(fd)
    }

    /// Its root directory, as the root of its mount namespace sees it: `/` unless it has
    /// called chroot.
    pub fn root(&self) -> io::Result<Vec<u8>> {
        Ok(self.process.root().map_err(into_io)?.into_os_string().into_vec())
    }

    /// The path of driftd's that leads to its program's file, whatever the name means now.
    pub fn exe_path(&self) -> PathBuf {
        format!("/proc/{}/exe", self.process.pid).into()
    }

    pub fn mountinfo(&self) -> io::Result<Vec<u8>> {
        self.read("mountinfo", 16 << 20)
    }

    /// The path of driftd's that leads to its root directory.
    pub fn root_path(&self) -> PathBuf {
        format!("/proc/{}/root", self.process.pid).into()
    }
}

/// Each argument in the text of `/proc/PID/cmdline`, bounded.
pub fn split_arguments(cmdline: &[u8]) -> Option<Vec<Vec<u8>>> {
    if cmdline.is_empty() {
        return None;
    }
    let cmdline = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
    let arguments = cmdline
        .split(|&byte| byte == 0)
        .take(MAX_ARGUMENTS)
        .map(|argument| argument[..argument.len().min(MAX_ARGUMENT_BYTES)].to_vec());
    Some(arguments.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_bounded_and_need_not_be_text() {
        assert_eq!(split_arguments(b""), None);
        let expected = vec![b"sh".to_vec(), b"\xff".to_vec(), b"".to_vec()];
        assert_eq!(split_arguments(b"sh\0\xff\0\0"), Some(expected));
        let many = split_arguments(&b"a\0".repeat(1000)).unwrap();
        assert_eq!(many.len(), MAX_ARGUMENTS);
        assert_eq!(split_arguments(&[b'a'; 9000]).unwrap()[0].len(), MAX_ARGUMENT_BYTES);
    }

    #[test]
    fn a_process_that_is_gone_is_an_error_and_no_surprise() {
        let mut child = std::process::Command::new("/bin/true").spawn().unwrap();
        let handle = Handle::open(child.id()).unwrap();
        child.wait().unwrap();
        assert_eq!(handle.exe().ok(), None);
        assert_eq!(handle.stat().ok(), None);
        assert!(Handle::open_exactly(handle.identity()).ok().is_none());
        assert!(Handle::open(0).ok().is_none());
    }
}
