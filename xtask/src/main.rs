//! `cargo xtask <name>`.
fn main() {}
