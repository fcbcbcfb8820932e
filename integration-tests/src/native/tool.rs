//! Programs of the machine that provisioning calls.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;

use crate::report;

/// Runs the command to its end; its output becomes part of the error when it fails.
pub(super) fn run(command: &mut Command) -> Result<Output> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("could not run {program}; is it installed?"))?;
    ensure!(
        output.status.success(),
        "{program} failed ({}):\n{}{}",
        output.status,
        tail(&String::from_utf8_lossy(&output.stdout)),
        tail(&String::from_utf8_lossy(&output.stderr)),
    );
    Ok(output)
}

/// The last lines of a log, enough to see why.
pub(crate) fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].iter().map(|line| format!("    {line}\n")).collect()
}

/// Makes sure that the program exists: root installs the package that has it, others are told to.
pub(super) fn require(program: &str, package: &str) -> Result<()> {
    if exists(program) {
        return Ok(());
    }
    if !Uid::effective().is_root() || !exists("apt-get") {
        bail!("`{program}` is missing: install it (on Debian: apt-get install {package})");
    }
    report::line(&format!("`{program}` is missing: installing the Debian package {package}"));
    let apt = |arguments: &[&str]| {
        let mut apt = Command::new("apt-get");
        run(apt.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq").args(arguments))
    };
    apt(&["update"])?;
    apt(&["install", "-y", "--no-install-recommends", package])?;
    ensure!(exists(program), "the package {package} has no `{program}`");
    Ok(())
}

fn exists(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
