//! The steps that need a tool besides cargo, which is installed into the target folder.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

use super::Outcome;
use crate::cargo::{PUBLISHED, cargo, run, target, workspace};

/// A subcommand of cargo, at the version the checks were written for.
pub(in crate::commands) struct Tool {
    pub(in crate::commands) name: &'static str,
    pub(in crate::commands) version: &'static str,
}

const DENY: Tool = Tool { name: "cargo-deny", version: "0.20.2" };
const HACK: Tool = Tool { name: "cargo-hack", version: "0.6.46" };

/// `deny.toml`, without what needs the network.
pub(super) fn deny() -> Result<Outcome> {
    run(DENY.command()?.args(["--locked", "check", "licenses", "bans", "sources"]))?;
    Ok(Outcome::Passed)
}

/// Known vulnerabilities. The database is a git repository, which not every machine can reach.
pub(super) fn advisories() -> Result<Outcome> {
    let output = DENY.command()?.args(["--locked", "check", "advisories"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    eprint!("{said}");
    if output.status.success() {
        Ok(Outcome::Passed)
    } else if said.contains("failed to fetch advisory database") {
        Ok(Outcome::NotChecked("the advisory database could not be fetched".into()))
    } else {
        bail!("cargo-deny ended with {}", output.status)
    }
}

/// Compiles the published crates with each feature alone: features only add.
///
/// Not here: all of them together, which is what clippy and the documentation compile, and
/// `ssl-vendored`, which differs from `ssl` by minutes of building another OpenSSL and by no line
/// of ours.
pub(super) fn each_feature() -> Result<Outcome> {
    let mut hack = HACK.command()?;
    hack.args(["hack", "check", "--each-feature", "--exclude-all-features", "--locked"]);
    hack.args(["--exclude-features", "ssl-vendored"]);
    for name in PUBLISHED {
        hack.args(["--package", name]);
    }
    run(&mut hack)?;
    Ok(Outcome::Passed)
}

impl Tool {
    /// The tool, installed first if it is missing.
    pub(in crate::commands) fn command(&self) -> Result<Command> {
        let mut command = Command::new(self.installed()?);
        command.current_dir(workspace());
        Ok(command)
    }

    fn installed(&self) -> Result<PathBuf> {
        let Self { name, version } = self;
        let root = target().join("tools").join(format!("{name}-{version}"));
        let binary = root.join("bin").join(name);
        if !binary.exists() {
            eprintln!("installing {name} {version} below the target folder: minutes, once");
            // Quick to build matters more than quick to run.
            let mut install = cargo(&["install", "--locked", "--debug", name]);
            install
                .args(["--version", version, "--root"])
                .arg(&root)
                .arg("--target-dir")
                .arg(target().join("tools/build"))
                .env("CARGO_PROFILE_DEV_DEBUG", "0");
            run(&mut install).with_context(|| format!("could not install {name}"))?;
        }
        Ok(binary)
    }
}
