//! Files that a test executes.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes a program, by a process of its own. If this process wrote it, a child that another
/// thread forks at that moment would hold it open for writing until the child's execve, and
/// the kernel would refuse to execute it (ETXTBSY).
pub(crate) fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut install = Command::new("install")
        .args(["--mode=755", "--", "/dev/stdin"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()?;
    let written = install.stdin.take().map_or(Ok(()), |mut input| input.write_all(content));
    let status = install.wait()?;
    written?;
    if status.success() { Ok(()) } else { Err(io::Error::other(format!("install: {status}"))) }
}
