//! The account servers run as.

use std::{
    os::unix::{fs::chown, process::CommandExt},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result};
use nix::unistd::Uid;

/// Root's servers run as `nobody`, everyone else's as themselves.
///
/// The database servers refuse to start as root, and nothing that a test does needs it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Account {
    uid_and_gid: Option<u32>,
}

const NOBODY: u32 = 65534;

impl Account {
    pub(super) fn unprivileged() -> Self {
        Self { uid_and_gid: Uid::effective().is_root().then_some(NOBODY) }
    }

    /// Whether the account differs from the one this process runs as.
    pub(super) fn is_another(self) -> bool {
        self.uid_and_gid.is_some()
    }

    /// Makes the command run as this account. Supplementary groups are dropped by `std`.
    pub(super) fn run(self, command: &mut Command) -> &mut Command {
        match self.uid_and_gid {
            Some(id) => command.uid(id).gid(id),
            None => command,
        }
    }

    /// Hands the path over to this account.
    pub(super) fn own(self, path: &Path) -> Result<()> {
        match self.uid_and_gid {
            Some(id) => chown(path, Some(id), Some(id))
                .with_context(|| format!("could not hand over {}", path.display())),
            None => Ok(()),
        }
    }
}
