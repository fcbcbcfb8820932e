//! The tables: as text, created, checked.

mod ddl;

use std::time::Duration;

use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::{Connection, SqliteConnection};
use tokio::time::Instant;

use crate::error::store_error;
use crate::tables::Tables;
use crate::text::{self, run};

/// The only version so far. A later release also supports the one before its own.
const VERSION: u32 = 1;

/// How soon the switch to WAL is tried again.
const AGAIN: Duration = Duration::from_millis(10);

/// The tables of an outbox: their names and their DDL.
///
/// The schema has its own version in `outbox_meta` and never touches the tables of a migration
/// tool. Either hand [`sql`](Self::sql) to your migration tool or call [`migrate`](Self::migrate).
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct SqliteSchema {
    tables: Tables,
}

impl SqliteSchema {
    /// The tables `outbox`, `outbox_lane` and so on.
    pub fn new() -> Self {
        Self { tables: Tables::new() }
    }

    /// Sets a prefix of all table names: `shop_` makes `shop_outbox`.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Invalid`] unless it is a letter or `_`, then at most 31 letters, digits
    /// or `_`.
    pub fn with_prefix(mut self, prefix: &str) -> Result<Self, StoreError> {
        self.tables = Tables::with_prefix(prefix)?;
        Ok(self)
    }

    /// The whole DDL, for any migration tool that runs several statements of one file. It does not
    /// switch the database to WAL, which no transaction can do: run `PRAGMA journal_mode = WAL`
    /// once as well, or open your connections with it. Where a tool goes on after an error, the
    /// version of the tables is noted only once all of them are there.
    pub fn sql(&self) -> String {
        ddl::version_1(&self.tables)
    }

    /// The DDL that leads from `version` to the newest one; 0 is an empty database.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Schema`] when `version` is newer than this crate.
    pub fn sql_from(&self, version: u32) -> Result<String, StoreError> {
        match version {
            0 => Ok(self.sql()),
            VERSION => Ok(String::new()),
            _ => Err(StoreErrorKind::Schema.into()),
        }
    }

    /// Switches the database to WAL, and creates the tables or brings older ones to the newest
    /// version, in one transaction. Safe to run again, and from several processes at once. The
    /// connection must not be in a transaction.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Conflict`] when another connection writes, or keeps the database from the
    /// switch to WAL by reading, for longer than the busy timeout of this one;
    /// [`StoreErrorKind::Unsupported`] when the database cannot be switched to WAL;
    /// [`StoreErrorKind::Schema`] when a table of one of these names is not ours: once it has
    /// another name this can be run again; otherwise any [`StoreErrorKind`].
    pub async fn migrate(&self, connection: &mut SqliteConnection) -> Result<(), StoreError> {
        switch_to_wal(connection).await?;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(store_error)?;
        let version = self.version(&mut tx).await?;
        let ddl = self.sql_from(version)?;
        if !ddl.is_empty() {
            run(&mut tx, ddl).await?;
        }
        self.check(&mut tx).await?;
        tx.commit().await.map_err(store_error)
    }

    /// Checks that the tables are there in a supported version.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Schema`] when they are missing, older or newer than supported, or not
    /// ours.
    pub async fn check(&self, connection: &mut SqliteConnection) -> Result<(), StoreError> {
        let lane = ddl::lane_row(&self.tables);
        let ours = ddl::ours(&self.tables).join(";");
        let meta = &self.tables.meta;
        let packet = format!("SELECT schema_version, server FROM {meta};{lane};{ours}");
        let mut answers = run(connection, packet).await?.into_iter();
        let meta = text::take(&mut answers)?;
        let lanes = text::take(&mut answers)?;
        match meta.rows.first() {
            Some(meta) if text::fit::<u32>(meta, 0)? == VERSION && lanes.rows.len() == 1 => Ok(()),
            _ => Err(StoreErrorKind::Schema.into()),
        }
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The version that is there; 0 without tables.
    async fn version(&self, connection: &mut SqliteConnection) -> Result<u32, StoreError> {
        let packet = format!("SELECT schema_version FROM {}", self.tables.meta);
        let answers = match run(connection, packet).await {
            Err(error) if error.kind() == StoreErrorKind::Schema => return Ok(0),
            answers => answers?,
        };
        match answers.first().and_then(|answer| answer.rows.first()) {
            Some(row) => text::fit(row, 0),
            None => Ok(0),
        }
    }
}

/// For the switch SQLite does not wait for another writer, so this does, within the busy timeout of
/// the connection.
async fn switch_to_wal(connection: &mut SqliteConnection) -> Result<(), StoreError> {
    let answers = run(connection, "PRAGMA busy_timeout".to_owned()).await?;
    let timeout = answers.first().and_then(|answer| answer.rows.first());
    let timeout = timeout.map_or(Ok(0), |row| text::number(row, 0))?;
    let until = Instant::now() + Duration::from_millis(timeout);
    let answers = loop {
        match run(connection, "PRAGMA journal_mode = WAL".to_owned()).await {
            Err(error) if error.kind() == StoreErrorKind::Conflict && Instant::now() < until => {
                tokio::time::sleep(AGAIN).await;
            }
            answers => break answers?,
        }
    };
    let mode = answers.first().and_then(|answer| answer.rows.first());
    match mode.map(|row| text::bytes(row, 0)).transpose()?.flatten() {
        Some(b"wal") => Ok(()),
        _ => Err(StoreError::new(StoreErrorKind::Unsupported, "journal mode is not WAL")),
    }
}

impl Default for SqliteSchema {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_migration_is_the_default_schema() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../migrations/sqlite/0001_outbox.sql");
        let Ok(printed) = std::fs::read_to_string(path) else {
            assert!(
                !std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations").exists()
            );
            return; // The published package does not hold the workspace's files.
        };
        assert_eq!(printed, SqliteSchema::new().sql(), "write the new text to {path}");
    }

    #[test]
    fn the_prefix_is_in_every_name() {
        let sql = SqliteSchema::new().with_prefix("shop_").unwrap().sql();
        for words in ["CREATE TABLE IF NOT EXISTS ", "CREATE INDEX IF NOT EXISTS "] {
            for name in sql.split(words).skip(1) {
                assert!(name.starts_with("shop_outbox"), "{name}");
            }
        }
    }

    #[test]
    fn a_newer_schema_is_refused() {
        assert_eq!(SqliteSchema::new().sql_from(VERSION).unwrap(), "");
        let error = SqliteSchema::new().sql_from(VERSION + 1).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Schema);
    }
}
