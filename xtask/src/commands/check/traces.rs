//! No committed file tells on which machine it was written.
//!
//! A package mirror's host or a path of somebody's home makes a build work in one place only. What
//! to look for is read from this machine, so that no list of hosts is itself committed.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail, ensure};

use super::Outcome;
use crate::cargo::workspace;

/// Where packages come from is public knowledge for these.
const PUBLIC: [&str; 6] =
    ["crates.io", "static.crates.io", "index.crates.io", "github.com", "docs.rs", "example.com"];

pub(super) fn check() -> Result<Outcome> {
    let root = workspace();
    let listed = Command::new("git")
        .current_dir(&root)
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .output()?;
    ensure!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let traces = traces(&root);
    let mut found = 0;
    for name in String::from_utf8_lossy(&listed.stdout).split_terminator('\0') {
        // Not UTF-8: no text. Absent: deleted, and not yet committed.
        let Ok(text) = fs::read_to_string(root.join(name)) else { continue };
        for (line, text) in text.lines().enumerate() {
            for trace in traces.iter().filter(|trace| is_in(text, trace)) {
                eprintln!("{name}:{}: names {trace}, which is of this machine", line + 1);
                found += 1;
            }
        }
    }
    if found > 0 {
        bail!("{found} lines name something of this machine");
    }
    Ok(Outcome::Passed)
}

/// What would tell this machine.
fn traces(root: &Path) -> BTreeSet<String> {
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    let mut sources = vec![
        cargo_home.join("config.toml"),
        cargo_home.join("config"),
        home.join(".m2/settings.xml"),
        PathBuf::from("/etc/apt/sources.list"),
    ];
    let apt = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    sources.extend(apt.map(|entry| entry.path()));
    let texts = sources.iter().filter_map(|file| fs::read_to_string(file).ok());
    let hosts = texts.flat_map(|text| hosts(&text)).filter(|host| !PUBLIC.contains(&&**host));

    let target = env::var("CARGO_TARGET_DIR").map(PathBuf::from).ok();
    let paths = [Some(root.to_owned()), Some(home), target].into_iter().flatten();
    // `/` and the like are everywhere.
    let paths = paths.filter(|path| path.is_absolute() && path.components().count() > 1);
    hosts.chain(paths.map(|path| path.display().to_string())).collect()
}

/// The hosts of all URLs in a text.
fn hosts(text: &str) -> Vec<String> {
    text.split("://")
        .skip(1)
        .map(|rest| {
            let authority = rest.split(|it: char| it.is_whitespace() || "/\"'<>".contains(it));
            let authority = authority.take(1).collect::<String>();
            let host = authority.rsplit('@').take(1).collect::<String>();
            host.split(':').take(1).collect()
        })
        .filter(|host: &String| host.contains('.'))
        .collect()
}

/// Whether the text has the trace, as a whole and not within a longer name.
fn is_in(text: &str, trace: &str) -> bool {
    let is_part = |it: char| it.is_alphanumeric() || "_-.".contains(it);
    text.match_indices(trace).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + trace.len()..].chars().next();
        !before.is_some_and(is_part) && !after.is_some_and(|it| it.is_alphanumeric() || it == '_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_from_urls_of_any_file() {
        let text = "URIs: http://one.test/debian\n<url>https://u:p@two.test:8443</url> file:///x";
        assert_eq!(hosts(text), ["one.test", "two.test"]);
    }

    #[test]
    fn a_trace_is_found_as_a_whole_only() {
        assert!(is_in("see /home/me/x", "/home/me"));
        assert!(!is_in("see /home/merry", "/home/me"));
        assert!(!is_in("see /srv/home/me", "/home/me"));
    }
}
