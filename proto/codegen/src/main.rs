//! Writes `proto/src/gen/` from `proto/proto/`, or with `--check` says whether it is up to date.
//!
//! `cargo run --manifest-path proto/codegen/Cargo.toml [-- --check]`. Needs no protoc: protox reads the files.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use prost::Message;

/// The contracts, relative to `proto/proto/`.
const FILES: [&str; 2] = ["expertmesh/v1/mesh.proto", "expertmesh/v1/control.proto"];
/// What is generated: the code of the package, and the descriptors that the reflection service shows.
const OUTPUTS: [&str; 2] = ["expertmesh.v1.rs", "descriptor.bin"];

fn generate(protos: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    let descriptors = protox::compile(FILES, [protos])?;
    fs::create_dir_all(out)?;
    fs::write(out.join(OUTPUTS[1]), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().out_dir(out).compile_fds(descriptors)?;
    Ok(())
}

fn run(check: bool) -> Result<bool, Box<dyn Error>> {
    let proto = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let kept = proto.join("src/gen");
    if !check {
        generate(&proto.join("proto"), &kept)?;
        return Ok(true);
    }
    let fresh = std::env::temp_dir().join(format!("mesh-proto-codegen-{}", std::process::id()));
    generate(&proto.join("proto"), &fresh)?;
    let mut same = true;
    for name in OUTPUTS {
        let equal = fs::read(fresh.join(name))? == fs::read(kept.join(name)).unwrap_or_default();
        if !equal {
            eprintln!("proto/src/gen/{name} is out of date: run `cargo run --manifest-path proto/codegen/Cargo.toml`");
        }
        same &= equal;
    }
    fs::remove_dir_all(&fresh)?;
    Ok(same)
}

fn main() -> ExitCode {
    match run(std::env::args().any(|a| a == "--check")) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mesh-proto-codegen: {error}");
            ExitCode::FAILURE
        }
    }
}
