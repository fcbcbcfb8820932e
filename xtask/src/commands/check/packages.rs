//! The published crates as their users get them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use super::Outcome;
use crate::cargo::{PUBLISHED, cargo, run, target, workspace};

/// Packs the published crates and builds them from their packages, as their users will.
///
/// Not by cargo's own verification: it keeps what it has unpacked and built of a package by the
/// package's version alone, and so builds the next package against the sources of an earlier run.
pub(super) fn check() -> Result<Outcome> {
    let packages = target().join("package");
    let unpacked = packages.join("unpacked");
    if packages.exists() {
        fs::remove_dir_all(&packages).with_context(|| format!("{}", packages.display()))?;
    }
    let mut package = cargo(&["package", "--locked", "--allow-dirty", "--no-verify"]);
    for name in PUBLISHED {
        package.args(["--package", name]);
    }
    run(&mut package)?;

    let mut manifest = String::from("[workspace]\nresolver = \"3\"\nmembers = [\"*\"]\n\n");
    manifest += "[patch.crates-io]\n";
    for name in PUBLISHED {
        let folder = unpacked.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("{}", folder.display()))?;
        // Touched: every file of a package has the same old date, and no change would be seen.
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--gzip", "--touch", "--strip-components=1", "--file"]);
        run(tar.arg(package_of(name, &packages)?).arg("--directory").arg(&folder))?;
        manifest += &format!("{name} = {{ path = \"{name}\" }}\n");
    }
    let manifest_path = unpacked.join("Cargo.toml");
    fs::write(&manifest_path, manifest).with_context(|| format!("{}", manifest_path.display()))?;
    let lock = (workspace().join("Cargo.lock"), unpacked.join("Cargo.lock"));
    fs::copy(&lock.0, &lock.1).with_context(|| format!("{}", lock.1.display()))?;
    let mut build = cargo(&["build", "--workspace", "--manifest-path"]);
    run(build.arg(&manifest_path).env("CARGO_TARGET_DIR", target()))?;
    Ok(Outcome::Passed)
}

/// The file that cargo made of the crate.
fn package_of(name: &str, packages: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(packages).with_context(|| format!("{}", packages.display()))? {
        let path = entry?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let version = file.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
        if version.is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit())) && path.is_file() {
            return Ok(path);
        }
    }
    bail!("cargo made no package of {name}")
}
