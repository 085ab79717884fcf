//! Files that a trial executes.

use std::io::{self, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

/// Writes a program, in a process of its own. Were it written here, what another
/// thread starts at that moment would hold it open for writing until its own execve,
/// and the kernel would refuse to execute it (ETXTBSY).
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
