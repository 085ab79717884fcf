//! File capabilities, written as `getcap` writes them.
//!
//! Decodes the raw `security.capability` xattr (linux/capability.h). Whether a capability is
//! drift is decided by `detect`.

use std::fmt::Write as _;

/// As `linux/capability.h` numbers them.
const NAMES: &[&str] = &[
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
];

const IS_EFFECTIVE: u32 = 1;
const REVISION: u32 = 0xff00_0000;

/// The raw `security.capability` xattr in words, e.g. `cap_net_raw,cap_setuid=ep`. A value
/// that cannot be decoded is shown in hexadecimal.
pub fn capability_in_words(raw: &[u8]) -> String {
    read(raw).unwrap_or_else(|| {
        raw.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    })
}

fn read(raw: &[u8]) -> Option<String> {
    let (words, []) = raw.as_chunks::<4>() else { return None };
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    let magic = *words.first()?;
    let (permitted, inheritable, root) = match (magic & REVISION, &words[1..]) {
        (0x0100_0000, [permitted, inheritable]) => {
            (u64::from(*permitted), u64::from(*inheritable), 0)
        }
        (0x0200_0000, [low, low_inheritable, high, high_inheritable]) => {
            (wide(*low, *high), wide(*low_inheritable, *high_inheritable), 0)
        }
        (0x0300_0000, [low, low_inheritable, high, high_inheritable, root]) => {
            (wide(*low, *high), wide(*low_inheritable, *high_inheritable), *root)
        }
        _ => return None,
    };
    let is_effective = magic & IS_EFFECTIVE != 0;
    let mut parts = Vec::new();
    for (is_inheritable, is_permitted) in [(false, true), (true, true), (true, false)] {
        let has = |set: u64, number: usize| set >> number & 1 != 0;
        let is_alike = |number: &usize| {
            has(inheritable, *number) == is_inheritable && has(permitted, *number) == is_permitted
        };
        let names: Vec<String> = (0..64).filter(is_alike).map(name).collect();
        if names.is_empty() {
            continue;
        }
        let flags = [(is_effective, 'e'), (is_inheritable, 'i'), (is_permitted, 'p')];
        let flags: String =
            flags.iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).collect();
        parts.push(format!("{}={flags}", names.join(",")));
    }
    if parts.is_empty() {
        parts.push("=".to_owned());
    }
    if root != 0 {
        parts.push(format!("[rootid={root}]"));
    }
    Some(parts.join(" "))
}

fn wide(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn name(number: usize) -> String {
    NAMES.get(number).map_or_else(|| number.to_string(), |name| format!("cap_{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w11_a_file_capability_is_shown_in_words() {
        let check = |words: &[u32], expected| {
            let raw: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            assert_eq!(capability_in_words(&raw), expected);
        };
        check(&[0x0200_0001, 1 << 10, 0, 0, 0], "cap_net_bind_service=ep");
        check(&[0x0200_0001, 1 << 13 | 1 << 7, 0, 0, 0], "cap_setuid,cap_net_raw=ep");
        check(&[0x0200_0000, 1, 1 << 1, 1 << 7, 0], "cap_chown,cap_bpf=p cap_dac_override=i");
        check(&[0x0300_0001, 3, 1, 0, 0, 1000], "cap_dac_override=ep cap_chown=eip [rootid=1000]");
        check(&[0x0100_0000, 1 << 21, 0], "cap_sys_admin=p");
        check(&[0x0200_0001, 0, 0, 1 << 31, 0], "63=ep");
        check(&[0x0200_0000, 0, 0, 0, 0], "=");
        // A filesystem that was written elsewhere can hold values that the kernel refuses.
        check(&[0x0200_0000, 1], "0000000201000000");
        check(&[0x0900_0000, 1, 0, 0, 0], "0000000901000000000000000000000000000000");
        assert_eq!(capability_in_words(&[]), "");
        assert_eq!(capability_in_words(&[1, 2, 3]), "010203");
    }
}
