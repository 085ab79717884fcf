# Builds and tests a Rust program with a build script and a procedural macro.
# Attack: critical exec.new /root/app/target/debug/app

export HOME=/root

prepare() {
    mkdir -p /root/app/src /root/app/named/src /root/app/.cargo
    cd /root/app
    cat >.cargo/config.toml <<'END'
[source.crates-io]
replace-with = "debian"
[source.debian]
directory = "/usr/share/cargo/registry"
END
    cat >Cargo.toml <<'END'
[package]
name = "app"
version = "0.1.0"
edition = "2021"
[dependencies]
libc = "0.2"
named = { path = "named" }
[workspace]
members = ["named"]
END
    cat >build.rs <<'END'
fn main() {
    let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").unwrap());
    std::fs::write(out.join("built.rs"), "pub const BUILT: &str = \"built\";").unwrap();
    println!("cargo:rerun-if-changed=src");
}
END
    cat >named/Cargo.toml <<'END'
[package]
name = "named"
version = "0.1.0"
edition = "2021"
[lib]
proc-macro = true
END
    cat >named/src/lib.rs <<'END'
use proc_macro::TokenStream;

#[proc_macro_derive(Named)]
pub fn named(item: TokenStream) -> TokenStream {
    let name = item.into_iter().nth(1).unwrap().to_string();
    format!("impl {name} {{ pub fn name() -> &'static str {{ \"{name}\" }} }}").parse().unwrap()
}
END
}

round() {
    cd /root/app
    number=$((${number:-0} + 1))
    cat >src/main.rs <<END
include!(concat!(env!("OUT_DIR"), "/built.rs"));

#[derive(named::Named)]
struct Program;

fn main() {
    println!("{} {BUILT} $number, process {}", Program::name(), unsafe { libc::getpid() });
}

#[cfg(test)]
mod tests {
    #[test]
    fn is_named() {
        assert_eq!(super::Program::name(), "Program");
    }
}
END
    cargo build --offline
    cargo test --offline
    cargo run --offline
}

attack() {
    cp /.control/payload /root/app/target/debug/app.new
    mv /root/app/target/debug/app.new /root/app/target/debug/app
    /root/app/target/debug/app
}
