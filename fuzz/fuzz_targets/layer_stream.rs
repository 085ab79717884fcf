//! A layer's blob, as a registry could serve it. The first byte selects whether the rest
//! is compressed first, so that the fuzzer also reaches the archive within.
#![no_main]

use std::io::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use driftd::baseline::stream::{Limits, read};
use driftd::baseline::{ImageBaseline, layer};
use driftd::model::{DiffId, LayerId};
use libfuzzer_sys::fuzz_target;

const LIMITS: Limits = Limits { bytes: 1 << 20, entries: 1000 };

/// The layers below, with a symlink and a whiteout.
fn below() -> &'static ImageBaseline {
    static BELOW: OnceLock<ImageBaseline> = OnceLock::new();
    BELOW.get_or_init(|| {
        ImageBaseline::from_text(&["/a/b 644 data x\n/c 777 symlink a\n/d 2775 dir", "- /a/b"])
    })
}

/// Gives each marked block the right checksum: without it hardly any input would pass the
/// first header.
fn seal(archive: &mut [u8]) {
    for block in archive.chunks_exact_mut(512) {
        if block[148] != b'*' {
            continue;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((how, data)) = data.split_first() else { return };
    let mut archive = data.to_vec();
    if how & 4 != 0 {
        seal(&mut archive);
    }
    let blob = match how & 3 {
        1 => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&archive).expect("memory takes everything");
            gzip.finish().expect("memory takes everything")
        }
        2 => zstd::encode_all(&archive[..], 1).expect("memory takes everything"),
        _ => archive,
    };
    let below = if how & 8 != 0 { Some(below()) } else { None };
    let Ok(stream) = read(&blob[..], &LIMITS, None, &AtomicBool::new(false)) else { return };
    assert_eq!(stream.blob_bytes, blob.len() as u64);
    let id = LayerId::Diff(DiffId([0; 32]));
    if let Ok(entries) = stream.settle(below) {
        layer::write(id, entries, Vec::new()).expect("settled entries are a tree");
    }
});
