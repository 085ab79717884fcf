//! Fields of `/proc/PID/status` and `/proc/PID/fdinfo`.
//!
//! Pure: text in, values out.

/// The value of the line that begins with `name`.
pub(super) fn field<'a>(info: &'a [u8], name: &str) -> Option<&'a str> {
    let mut lines = info.split(|&byte| byte == b'\n');
    let value = lines.find_map(|line| line.strip_prefix(name.as_bytes()))?;
    Some(str::from_utf8(value).ok()?.trim())
}

pub(super) fn parse_uid(status: &[u8]) -> Option<u32> {
    // The process's name, which comes first, cannot forge a line: the kernel escapes it.
    let line = status.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"Uid:"))?;
    // Real, effective, saved, filesystem.
    str::from_utf8(line).ok()?.split_ascii_whitespace().nth(1)?.parse().ok()
}
