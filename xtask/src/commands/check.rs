//! `cargo xtask check`: all that CI runs besides the tests. Read-only.

mod named_tests;
mod packages;
pub(super) mod tools;
mod traces;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{Command, api};
use crate::cargo::{cargo, run};

pub(super) const COMMAND: Command = Command {
    name: "check",
    usage: "check",
    about: "all that CI runs besides the tests; changes nothing",
    run: check,
};

/// How a step ended.
pub(super) enum Outcome {
    Passed,
    /// Neither passed nor failed, as a machine without the way to something cannot tell.
    NotChecked(String),
}

type Step = (&'static str, fn() -> Result<Outcome>);

/// The quick ones first.
const STEPS: &[Step] = &[
    ("fmt", || cargo_passes(&["fmt", "--all", "--check"])),
    ("traces", traces::check),
    ("tests named in docs", named_tests::check),
    ("clippy", clippy),
    ("doc", doc),
    ("public API", api::check),
    ("licences, bans, sources", tools::deny),
    ("advisories", tools::advisories),
    ("each feature", tools::each_feature),
    ("package", packages::check),
];

fn check(_: &[String]) -> Result<()> {
    let mut closing = vec![];
    let mut failed = vec![];
    // All of them, so that one run tells all there is to put right.
    for (name, step) in STEPS {
        eprintln!("\n==> {name}");
        let began = Instant::now();
        let said = match step() {
            Ok(Outcome::Passed) => "ok".to_owned(),
            Ok(Outcome::NotChecked(why)) => format!("NOT CHECKED: {why}"),
            Err(error) => {
                failed.push(*name);
                format!("FAILED: {error:#}")
            }
        };
        let seconds = Duration::from_secs(began.elapsed().as_secs());
        closing.push(format!("check: {name} ({seconds:?}): {said}"));
    }
    eprintln!();
    for line in closing {
        println!("{line}");
    }
    if failed.is_empty() {
        println!("check result: ok");
        return Ok(());
    }
    println!("check result: FAILED: {}", failed.join(", "));
    bail!("{} of {} steps failed", failed.len(), STEPS.len())
}

fn cargo_passes(arguments: &[&str]) -> Result<Outcome> {
    run(&mut cargo(arguments))?;
    Ok(Outcome::Passed)
}

const EVERYTHING: [&str; 4] = ["--workspace", "--all-targets", "--all-features", "--locked"];

fn clippy() -> Result<Outcome> {
    run(cargo(&["clippy"]).args(EVERYTHING).args(["--", "-D", "warnings"]))?;
    Ok(Outcome::Passed)
}

fn doc() -> Result<Outcome> {
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--all-features", "--locked"]);
    run(doc.env("RUSTDOCFLAGS", "-D warnings"))?;
    Ok(Outcome::Passed)
}
