//! Debian packages, fetched with what they depend on and unpacked into a folder of their own.
//!
//! apt resolves against a private, empty package database, so neither the machine's packages nor
//! its libc are read or changed, and a package of another Debian release runs by the loader that
//! was unpacked beside it.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use super::{
    cache::{Cache, open_folder},
    tool,
};
use crate::report;

/// A package of one Debian suite.
#[derive(Debug, Clone, Copy)]
pub(super) struct Package {
    pub(super) suite: &'static str,
    pub(super) name: &'static str,
}

/// How the packages begin that are in the closure, but that a server runs without.
const UNUSED: [&str; 8] =
    ["perl", "libperl", "debconf", "dpkg_", "tar_", "base-files_", "gawk_", "libdb5"];

impl Package {
    /// The folder with the package and all it needs, from the cache or fetched now.
    pub(super) fn unpacked(self, cache: &Cache) -> Result<PathBuf> {
        ensure!(
            cfg!(all(target_os = "linux", target_arch = "x86_64")),
            "native database servers are for Linux on x86_64; elsewhere use Docker or give a URL"
        );
        cache.once(&format!("{}-{}", self.name, self.suite), |root| {
            report::line(&format!("fetching {} from Debian {}", self.name, self.suite));
            let packages = root.join("packages");
            self.download(&packages)?;
            unpack_all(&packages, root)?;
            Ok(fs::remove_dir_all(packages)?)
        })
    }

    fn download(self, into: &Path) -> Result<()> {
        let lists = into.join("state/lists/partial");
        let archives = into.join("cache/archives/partial");
        for folder in [lists.as_path(), &archives, &into.join("sources")] {
            open_folder(folder)?;
        }
        fs::write(into.join("state/status"), "")?;
        fs::write(
            into.join("sources/debian.sources"),
            format!(
                "Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n\
                 Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
                mirror_of_this_machine()?,
                self.suite
            ),
        )?;
        let apt = |arguments: &[&str]| {
            let mut apt = Command::new("apt-get");
            apt.arg("-qq");
            for option in private_options(into) {
                apt.arg("-o").arg(option);
            }
            tool::run(apt.args(arguments)).context("is this a Debian machine with a mirror?")
        };
        apt(&["update"])?;
        apt(&["install", "-y", "--download-only", self.name])?;
        Ok(())
    }
}

fn private_options(folder: &Path) -> Vec<String> {
    let folder = folder.display();
    vec![
        format!("Dir::State={folder}/state"),
        format!("Dir::State::status={folder}/state/status"),
        format!("Dir::Cache={folder}/cache"),
        format!("Dir::Etc::SourceParts={folder}/sources"),
        "Dir::Etc::SourceList=/dev/null".into(),
        "Dir::Etc::Preferences=/dev/null".into(),
        "Dir::Etc::PreferencesParts=/dev/null".into(),
        "APT::Install-Recommends=false".into(),
        "APT::Sandbox::User=root".into(),
        "Debug::NoLocking=1".into(),
        // A mirror may lag behind, or the clock be ahead; signatures are checked all the same.
        "Acquire::Check-Valid-Until=false".into(),
        "Acquire::Check-Date=false".into(),
        "Acquire::Languages=none".into(),
        "Acquire::Retries=3".into(),
    ]
}

/// Unpacks all archives over a merged `/usr`, as every package now expects it.
fn unpack_all(packages: &Path, root: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        open_folder(&root.join("usr").join(name))?;
        symlink(Path::new("usr").join(name), root.join(name))?;
    }
    for entry in fs::read_dir(packages.join("cache/archives"))? {
        let archive = entry?.path();
        let name = archive.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".deb") && !UNUSED.iter().any(|unused| name.starts_with(unused)) {
            unpack(&archive, root).with_context(|| format!("could not unpack {name}"))?;
        }
    }
    Ok(())
}

fn unpack(archive: &Path, root: &Path) -> Result<()> {
    let mut contents = Command::new("dpkg-deb")
        .arg("--fsys-tarfile")
        .arg(archive)
        .stdout(Stdio::piped())
        .spawn()
        .context("dpkg-deb")?;
    let pipe = contents.stdout.take().context("the pipe from dpkg-deb")?;
    let unpacked = Command::new("tar")
        .args(["-x", "--keep-directory-symlink", "--no-same-owner", "-C"])
        .arg(root)
        .args(["doc", "man", "locale"].map(|part| format!("--exclude=./usr/share/{part}")))
        .stdin(pipe)
        .status()
        .context("tar")?;
    let read = contents.wait()?;
    ensure!(read.success() && unpacked.success(), "dpkg-deb: {read}, tar: {unpacked}");
    Ok(())
}

/// The mirror that apt of this machine uses.
fn mirror_of_this_machine() -> Result<String> {
    ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"]
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .find_map(|sources| mirror(&sources))
        .context("no Debian mirror in apt's sources of this machine; use Docker or give a URL")
}

/// The first mirror in apt's sources, of either format.
fn mirror(sources: &str) -> Option<String> {
    sources.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        match words.next()? {
            "URIs:" => words.next(),
            "deb" => words.find(|word| word.contains(":/")),
            _ => None,
        }
        .map(str::to_owned)
    })
}

#[cfg(test)]
mod tests {
    use super::mirror;

    #[test]
    fn the_mirror_is_read_from_both_formats_of_sources() {
        let deb822 = "Types: deb\n# http://old.example/debian\nURIs: http://one.example/debian\n";
        assert_eq!(mirror(deb822).as_deref(), Some("http://one.example/debian"));
        let one_line =
            "# deb http://no.example x\ndeb [arch=amd64] http://two.example/debian x main";
        assert_eq!(mirror(one_line).as_deref(), Some("http://two.example/debian"));
        assert_eq!(mirror("deb-src http://three.example/debian x main"), None);
    }
}
