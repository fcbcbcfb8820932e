//! Where fetched servers stay between runs: outside the work tree, shared by all its clones.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;

use super::account::Account;

/// A folder of finished things, each made once and never changed.
#[derive(Debug, Clone)]
pub(super) struct Cache(PathBuf);

impl Cache {
    /// `OUTBOX_TEST_CACHE`, else the user's cache folder, else one in `/var/tmp`.
    ///
    /// The last is for root, whose home folder is closed to the account its servers run as.
    pub(super) fn open() -> Result<Self> {
        let folder = match env::var_os("OUTBOX_TEST_CACHE") {
            Some(folder) => PathBuf::from(folder),
            None => user_cache()
                .filter(|folder| !Account::unprivileged().is_another() || is_open_to_all(folder))
                .unwrap_or_else(|| PathBuf::from("/var/tmp/outbox-tests")),
        };
        open_folder(&folder)?;
        let owner = fs::metadata(&folder)?.uid();
        ensure!(
            owner == Uid::effective().as_raw(),
            "{} belongs to another user (uid {owner}); set OUTBOX_TEST_CACHE to a folder of yours",
            folder.display()
        );
        ensure!(
            !Account::unprivileged().is_another() || is_open_to_all(&folder),
            "the servers run as nobody and cannot reach {}; set OUTBOX_TEST_CACHE to another folder",
            folder.display()
        );
        Ok(Self(folder))
    }

    /// The folder `name`, made by `make` if no process has made it before.
    ///
    /// A second process waits for the first. What a failed or killed attempt left is thrown away,
    /// as the folder gets its name only when it is complete.
    pub(super) fn once(
        &self,
        name: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let complete = self.0.join(name);
        let lock = File::create(self.0.join(format!("{name}.lock")))?;
        lock.lock().with_context(|| format!("could not lock {name}"))?;
        if !complete.exists() {
            let started = self.0.join(format!("{name}.new"));
            if started.exists() {
                fs::remove_dir_all(&started)?;
            }
            open_folder(&started)?;
            make(&started)?;
            fs::rename(&started, &complete)?;
        }
        Ok(complete)
    }

    /// A path for something that lives as long as a run.
    pub(super) fn run(&self) -> Result<PathBuf> {
        let runs = self.0.join("run");
        open_folder(&runs)?;
        Ok(runs)
    }
}

/// Makes the folder with its parents, passable for the servers' account whatever the umask is.
pub(super) fn open_folder(folder: &Path) -> Result<()> {
    let missing: Vec<&Path> = folder.ancestors().take_while(|part| !part.exists()).collect();
    fs::create_dir_all(folder)
        .with_context(|| format!("could not create the folder {}", folder.display()))?;
    for part in missing {
        fs::set_permissions(part, fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn user_cache() -> Option<PathBuf> {
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    cache.filter(|folder| folder.is_absolute()).map(|folder| folder.join("outbox-tests"))
}

/// Whether everyone may pass every folder on the way that exists already.
fn is_open_to_all(folder: &Path) -> bool {
    folder.ancestors().filter_map(|part| fs::metadata(part).ok()).all(|it| it.mode() & 0o001 != 0)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let folder = env::temp_dir().join(format!("outbox-cache-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn a_thing_is_made_once_by_many() {
        let folder = scratch("once");
        let cache = Cache(folder.clone());
        let made = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    cache
                        .once("thing", |_| {
                            made.fetch_add(1, Ordering::SeqCst);
                            Ok(())
                        })
                        .unwrap()
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn what_a_failed_attempt_left_is_not_taken_for_complete() {
        let folder = scratch("failed");
        let cache = Cache(folder.clone());
        cache
            .once("thing", |path| {
                fs::write(path.join("half"), "")?;
                anyhow::bail!("no space")
            })
            .unwrap_err();
        let complete = cache.once("thing", |path| Ok(fs::write(path.join("whole"), "")?)).unwrap();
        assert!(complete.join("whole").exists() && !complete.join("half").exists());
        fs::remove_dir_all(folder).unwrap();
    }
}
