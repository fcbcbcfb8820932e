//! `cargo xtask bench [--quick] [part ...]`: figures for `docs/benchmarks`, beside their limits.

use anyhow::Result;

use super::Command;
use crate::cargo::{cargo, run, target, workspace};

pub(super) const COMMAND: Command = Command {
    name: "bench",
    usage: "bench [--quick] [part ...]",
    about: "measures into docs/benchmarks; quick figures stay in the target folder",
    run: bench,
};

fn bench(arguments: &[String]) -> Result<()> {
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let folder =
        if quick { target().join("benchmarks") } else { workspace().join("docs/benchmarks") };
    let mut command = cargo(&["run", "--release", "--package", "benchmarks", "--", "--into"]);
    run(command.arg(folder).args(arguments))
}
