//! `cargo xtask fix`: what a machine can put right, it does.

use anyhow::Result;

use super::Command;
use crate::cargo::{cargo, run};

pub(super) const COMMAND: Command = Command {
    name: "fix",
    usage: "fix",
    about: "format, and apply clippy's suggestions",
    run: fix,
};

fn fix(_: &[String]) -> Result<()> {
    run(&mut cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--all-features",
        "--fix",
        "--allow-dirty",
        "--allow-staged",
    ]))?;
    run(&mut cargo(&["fmt", "--all"]))
}
