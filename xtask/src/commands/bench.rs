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

/// The part that counts allocations, in a build that does.
const ALLOCATIONS: &str = "allocations";
const ENGINES: [&str; 2] = ["mariadb", "mysql"];

fn bench(arguments: &[String]) -> Result<()> {
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let folder =
        if quick { target().join("benchmarks") } else { workspace().join("docs/benchmarks") };
    let is_part = |word: &&String| !word.starts_with('-') && !ENGINES.contains(&word.as_str());
    let (parts, others): (Vec<&String>, Vec<&String>) = arguments.iter().partition(is_part);
    let (counted, timed): (Vec<_>, Vec<_>) = parts.iter().partition(|part| **part == ALLOCATIONS);
    let all = parts.is_empty();
    let measure = |features: &[&str], words: &[&String]| {
        let mut command = cargo(&["run", "--release", "--package", "benchmarks"]);
        command.args(features).arg("--").arg("--into").arg(&folder);
        run(command.args(words).args(&others))
    };
    if all || !timed.is_empty() {
        measure(&[], &timed)?;
    }
    // Another build and other servers: in a quick run only if it is named.
    if (all && !quick) || !counted.is_empty() {
        measure(&["--features", ALLOCATIONS], &[&ALLOCATIONS.to_owned()])?;
    }
    Ok(())
}
