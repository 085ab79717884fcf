//! Indexes, manifests and configs, as a registry or an archive could hold them.
#![no_main]

use driftd::baseline::oci::{Document, candidates, diff_ids, document, host};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(Document::Index(entries)) = document(data) {
        let _ = candidates(entries, host());
    }
    let _ = diff_ids(data);
});
