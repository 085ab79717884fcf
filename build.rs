//! Compiles the API's proto, with its descriptor set for gRPC reflection.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("driftd.v1.bin"))
        .compile_protos(&["proto/driftd/v1/driftd.proto"], &["proto"])?;
    Ok(())
}
