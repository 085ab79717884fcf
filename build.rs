//! Compiles the API's proto, with its descriptor set for gRPC reflection.

use std::path::PathBuf;

use prost::Message as _;
use prost_types::FileDescriptorSet;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let descriptors = out.join("driftd.v1.bin");
    tonic_prost_build::configure()
        .file_descriptor_set_path(&descriptors)
        .compile_protos(&["proto/driftd/v1/driftd.proto"], &["proto"])?;
    // Where each line stands in the proto is most of the set, and the daemon keeps it in memory.
    let mut set = FileDescriptorSet::decode(std::fs::read(&descriptors)?.as_slice())?;
    set.file.iter_mut().for_each(|file| file.source_code_info = None);
    std::fs::write(&descriptors, set.encode_to_vec())?;
    Ok(())
}
