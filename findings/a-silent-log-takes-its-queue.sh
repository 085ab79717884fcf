#!/bin/sh
# Question: how much memory does tracing-appender's non-blocking writer take before the first
#   line is logged?
# Natural guess: next to nothing. Its queue has room for 128,000 lines, and is empty.
# What happens: 4 MB of private memory at once. The bounded channel below it takes the room for
#   all its slots when it is made, 32 bytes each, and writes a number into each of them, so the
#   kernel has to provide every page. A daemon that wants to be small sets
#   `buffered_lines_limit`.
# Needs: cargo and its registry, Linux (/proc/self/status). No root.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/src"
cat > "$dir/Cargo.toml" <<'EOF'
[package]
name = "silent"
version = "0.0.0"
edition = "2021"

[dependencies]
tracing-appender = "=0.2.5"
EOF
cat > "$dir/src/main.rs" <<'EOF'
use tracing_appender::non_blocking::NonBlockingBuilder;

fn private_kib() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn main() {
    let before = private_kib();
    let small = NonBlockingBuilder::default().buffered_lines_limit(1024).finish(std::io::sink());
    let between = private_kib();
    let usual = tracing_appender::non_blocking(std::io::sink());
    let after = private_kib();
    let (small_kib, usual_kib) = (between - before, after - between);
    println!("1,024 lines: {small_kib} KiB; as it comes: {usual_kib} KiB");
    drop((small, usual));
    let is_so = small_kib < 1024 && (3500..5500).contains(&usual_kib);
    std::process::exit(if is_so { 0 } else { 1 });
}
EOF
CARGO_TARGET_DIR=$dir/target cargo build --quiet --manifest-path "$dir/Cargo.toml"
echo "tracing-appender 0.2.5, $(rustc --version)"
"$dir/target/debug/silent"
