//! `cargo xtask api`: what each published crate offers, as text, so that a change of it shows in the
//! diff. `cargo xtask check` compares.

use std::{fs, path::PathBuf, process::Command as Program};

use anyhow::{Context, Result, bail, ensure};

use super::{
    Command,
    check::{Outcome, tools::Tool},
};
use crate::cargo::{PUBLISHED, cargo, run, target, workspace};

pub(super) const COMMAND: Command = Command {
    name: "api",
    usage: "api",
    about: "writes the public API of each published crate to docs/api",
    run: write,
};

/// Reads what rustdoc writes as JSON.
const LISTER: Tool = Tool { name: "cargo-public-api", version: "0.52.0" };

/// The version of that JSON that it reads. It changes with the toolchain.
const FORMAT: u32 = 57;

/// The listings, or why there are none.
enum Listings {
    /// The file of each crate, and what belongs into it.
    Made(Vec<(PathBuf, String)>),
    /// The toolchain writes another format than the tool reads.
    OtherFormat(u32),
}

fn write(_: &[String]) -> Result<()> {
    let listings = match list()? {
        Listings::Made(listings) => listings,
        Listings::OtherFormat(found) => bail!("{}", other_format(found)),
    };
    for (file, listing) in listings {
        fs::create_dir_all(file.parent().context("a folder")?)?;
        fs::write(&file, listing)?;
    }
    Ok(())
}

/// Fails if a listing is not the one that is committed.
pub(super) fn check() -> Result<Outcome> {
    let listings = match list()? {
        Listings::Made(listings) => listings,
        Listings::OtherFormat(found) => return Ok(Outcome::NotChecked(other_format(found))),
    };
    let mut changed = vec![];
    for (file, listing) in listings {
        let committed = fs::read_to_string(&file).unwrap_or_default();
        if committed != listing {
            for line in difference(&committed, &listing) {
                eprintln!("{line}");
            }
            let name = file.file_name().unwrap_or_default();
            changed.push(name.to_string_lossy().into_owned());
        }
    }
    let changed = changed.join(", ");
    ensure!(changed.is_empty(), "{changed}: see the diff of `cargo xtask api`, and commit it");
    Ok(Outcome::Passed)
}

fn list() -> Result<Listings> {
    document()?;
    let mut listings = vec![];
    for name in PUBLISHED {
        let json = target().join("doc").join(format!("{}.json", name.replace('-', "_")));
        let text = fs::read_to_string(&json).with_context(|| format!("no {}", json.display()))?;
        let format = format_of(&text).context("rustdoc's JSON does not tell its format")?;
        if format != FORMAT {
            return Ok(Listings::OtherFormat(format));
        }
        // Without what every type has, such as `impl<T> Into<T> for T` and `impl Send`.
        let mut list = LISTER.command()?;
        list.arg("--rustdoc-json").arg(&json).args(["-ss", "--color=never"]);
        let output = list.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{} could not list {name}: {said}", LISTER.name);
        let listing = String::from_utf8(output.stdout)?;
        ensure!(!listing.trim().is_empty(), "{} lists nothing of {name}", LISTER.name);
        listings.push((workspace().join("docs/api").join(format!("{name}.txt")), listing));
    }
    Ok(Listings::Made(listings))
}

/// Has rustdoc write JSON, with all features on. That is for nightly toolchains only, unless a
/// variable says otherwise, and only rustdoc is to hear it: dependencies that look at the variable
/// would be built twice.
fn document() -> Result<()> {
    let wrapper = target().join("tools/rustdoc-json");
    fs::create_dir_all(wrapper.parent().context("a folder")?)?;
    fs::write(&wrapper, "#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec rustdoc \"$@\"\n")?;
    run(Program::new("chmod").arg("+x").arg(&wrapper))?;
    // The command of the documentation's check, so that nothing is compiled for this.
    let mut doc = cargo(&["doc", "--workspace", "--no-deps", "--all-features", "--locked"]);
    doc.env("RUSTDOC", wrapper);
    doc.env("RUSTDOCFLAGS", "-Z unstable-options --output-format json --cap-lints allow");
    run(&mut doc)
}

fn format_of(json: &str) -> Option<u32> {
    let (_, rest) = json.rsplit_once("\"format_version\":")?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn other_format(found: u32) -> String {
    let Tool { name, version } = LISTER;
    format!("this toolchain's rustdoc writes format {found}, {name} {version} reads {FORMAT}")
}

/// The lines that are gone and those that are new.
fn difference<'a>(old: &'a str, new: &'a str) -> impl Iterator<Item = String> + use<'a> {
    let gone = old.lines().filter(|line| !new.lines().any(|other| other == *line));
    let come = new.lines().filter(|line| !old.lines().any(|other| other == *line));
    gone.map(|line| format!("- {line}")).chain(come.map(|line| format!("+ {line}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_found_wherever_it_stands() {
        assert_eq!(format_of(r#"{"format_version":57,"index":{}}"#), Some(57));
        assert_eq!(format_of(r#"{"index":{},"format_version":57}"#), Some(57));
        assert_eq!(format_of(r#"{"index":{}}"#), None);
    }

    #[test]
    fn the_difference_names_what_is_gone_and_what_is_new() {
        let difference: Vec<_> = difference("a\nb\n", "b\nc\n").collect();
        assert_eq!(difference, ["- a", "+ c"]);
    }
}
