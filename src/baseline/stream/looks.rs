//! Names what a blob holds that is no archive, for the message to the user. Pure.

/// Names the kind of file that the first bytes of a blob show.
pub(super) fn looks_like(head: &[u8]) -> &'static str {
    const EROFS: &[u8] = &[0xe2, 0xe1, 0xf5, 0xe0];
    match head {
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => "an xz archive, which containerd does not unpack",
        [b'B', b'Z', b'h', ..] => "a bzip2 archive, which containerd does not unpack",
        [0x04, 0x22, 0x4d, 0x18, ..] => "an lz4 archive, which containerd does not unpack",
        [b'P', b'K', 3 | 5, ..] => "a zip archive",
        [b'h', b's', b'q', b's', ..] => "a SquashFS image",
        [b'{' | b'[', ..] => "a JSON document",
        [0x7f, b'E', b'L', b'F', ..] => "an ELF program",
        _ if head.get(1024..1028) == Some(EROFS) => "an EROFS image",
        // No known type of file, and all bytes are about as frequent.
        _ if head.len() >= 4096 && is_noise(&head[..4096]) => "encrypted data",
        _ => "no kind of file known here (its first header has a wrong checksum)",
    }
}

/// Whether all values of a byte are about as frequent.
fn is_noise(bytes: &[u8]) -> bool {
    let mut counts = [0_usize; 256];
    for byte in bytes {
        counts[usize::from(*byte)] += 1;
    }
    let expected = bytes.len() / 256;
    counts.iter().all(|count| *count <= 4 * expected)
        && counts.iter().filter(|count| **count == 0).count() < 8
}
