//! The folder a server runs in.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Result;

use super::{
    account::Account,
    cache::{Cache, open_folder},
};
use crate::{names, watchdog};

/// Data, configuration and log of one server; removed with its value or with this process.
#[derive(Debug)]
pub(super) struct RunFolder(PathBuf);

impl RunFolder {
    pub(super) fn new(cache: &Cache, name: &str) -> Result<Self> {
        let folder = cache.run()?.join(names::unique(name));
        watchdog::guard_folder(&folder)?;
        open_folder(&folder)?;
        Account::unprivileged().own(&folder)?;
        Ok(Self(folder))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunFolder {
    fn drop(&mut self) {
        // The watchdog tries again.
        let _ = fs::remove_dir_all(&self.0);
    }
}
