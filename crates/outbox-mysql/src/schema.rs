//! The tables: as text, created, checked.

mod ddl;
mod lanes;

use std::fmt::Write as _;
use std::num::NonZeroU16;

use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::MySqlConnection;

use crate::tables::{Names, Tables};
use crate::text::{self, run};

/// The only version so far. A later release also supports the one before its own.
const VERSION: u32 = 1;

/// How long a migration waits for another one, in seconds.
const LOCK_SECONDS: u32 = 60;

/// The tables of an outbox: their names, their number of lanes, and their DDL.
///
/// The schema has its own version in `outbox_meta` and never touches the tables of a migration
/// tool. Either hand [`sql`](Self::sql) to your migration tool or call [`migrate`](Self::migrate).
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct MySqlSchema {
    tables: Tables,
    lanes: NonZeroU16,
}

impl MySqlSchema {
    /// How many lanes a new outbox has: as many workers can share the load.
    pub const DEFAULT_LANES: NonZeroU16 = NonZeroU16::new(16).expect("16 is not 0");
    /// The largest number of lanes.
    pub const MAX_LANES: u16 = 1024;

    /// The tables `outbox`, `outbox_lane` and so on, with 16 lanes.
    pub fn new() -> Self {
        Self { tables: Tables::new(), lanes: Self::DEFAULT_LANES }
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

    /// Sets the number of lanes of a new outbox. It lives only in the tables afterwards: writer
    /// and store read it there, or never need it, and [`change_lanes`](Self::change_lanes) changes
    /// it.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Invalid`] unless it is 1 to 1,024.
    pub fn with_lanes(mut self, lanes: u16) -> Result<Self, StoreError> {
        self.lanes = lane_count(lanes)?;
        Ok(self)
    }

    /// The whole DDL, for any migration tool that runs several statements of one file.
    pub fn sql(&self) -> String {
        ddl::version_1(&self.tables, self.lanes)
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
            _ => Err(other_version(version)),
        }
    }

    /// Creates the tables, or brings older ones to the newest version. Safe to run again, and from
    /// several processes at once: they wait for each other. Existing lanes stay as they are, those
    /// of a migration that stopped half way as well. Close a connection on which this was dropped:
    /// its session may hold the lock that they wait for.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Conflict`] when another migration holds the lock for a minute;
    /// [`StoreErrorKind::Schema`] when a table of one of these names is not ours: it is left as it
    /// is, and once it has another name this can be run again; otherwise any [`StoreErrorKind`].
    pub async fn migrate(&self, connection: &mut MySqlConnection) -> Result<(), StoreError> {
        self.lock(connection).await?;
        let migrated = async {
            let (version, lanes) = self.version(connection).await?;
            let ddl = Self { lanes, ..self.clone() }.sql_from(version)?;
            if !ddl.is_empty() {
                // Statements commit by themselves unless autocommit is off.
                run(connection, format!("{ddl}COMMIT")).await?;
            }
            self.check(connection).await
        };
        let migrated = migrated.await;
        self.unlock(connection).await?;
        migrated
    }

    /// Checks that the tables are there in a supported version.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Schema`] when they are missing, incomplete, older or newer than supported,
    /// or not ours, or when a change of the number of lanes was interrupted.
    pub async fn check(&self, connection: &mut MySqlConnection) -> Result<(), StoreError> {
        self.read_lanes(connection).await.map(|_| ())
    }

    pub(crate) fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Checks the tables and tells how many lanes there are.
    pub(crate) async fn read_lanes(
        &self,
        connection: &mut MySqlConnection,
    ) -> Result<NonZeroU16, StoreError> {
        let Names { meta, lane, .. } = &*self.tables;
        let mut packet =
            format!("SELECT schema_version, lanes FROM {meta};SELECT COUNT(*) FROM {lane}");
        for (table, columns) in ddl::columns(&self.tables) {
            _ = write!(packet, ";SELECT {columns} FROM {table} LIMIT 0");
        }
        let mut answers = run(connection, packet).await?.into_iter();
        let meta = text::take(&mut answers)?;
        let rows = text::take(&mut answers)?;
        let (Some(meta), Some(rows)) = (meta.rows.first(), rows.rows.first()) else {
            return Err(schema_error("the tables have no version"));
        };
        match text::fit(meta, 0)? {
            VERSION => {}
            0 => return Err(schema_error("a migration has not ended: run it again")),
            version => return Err(other_version(version)),
        }
        let Some(lanes) = NonZeroU16::new(text::fit(meta, 1)?) else {
            let why = "a change of the number of lanes was interrupted: run change_lanes again";
            return Err(schema_error(why));
        };
        let rows = text::number(rows, 0)?;
        if rows < lanes.get().into() {
            return Err(schema_error(format!("there are {rows} rows for {lanes} lanes")));
        }
        Ok(lanes)
    }

    /// The version that is there, and the number of lanes. The version is 0 without tables, and
    /// until all of them are there: the outbox table may have the number of lanes already.
    async fn version(
        &self,
        connection: &mut MySqlConnection,
    ) -> Result<(u32, NonZeroU16), StoreError> {
        let packet = format!("SELECT schema_version, lanes FROM {}", self.tables.meta);
        let answers = match run(connection, packet).await {
            Err(error) if error.kind() == StoreErrorKind::Schema => return Ok((0, self.lanes)),
            answers => answers?,
        };
        let Some(row) = answers.first().and_then(|answer| answer.rows.first()) else {
            return Ok((0, self.lanes));
        };
        let lanes = NonZeroU16::new(text::fit(row, 1)?);
        Ok((text::fit(row, 0)?, lanes.unwrap_or(self.lanes)))
    }

    /// One migration at a time in this database and under this prefix. The name is hashed because
    /// MySQL allows 64 characters. Where no database is selected, the statements to come say so.
    fn lock_name(&self) -> String {
        let prefix = text::Hex(self.tables.prefix.as_bytes());
        let database = "COALESCE(DATABASE(), '')";
        format!("CONCAT('outbox_schema_', CRC32(CONCAT({database}, '.', {prefix})))")
    }

    async fn lock(&self, connection: &mut MySqlConnection) -> Result<(), StoreError> {
        let packet = format!("SELECT GET_LOCK({}, {LOCK_SECONDS})", self.lock_name());
        let answers = run(connection, packet).await?;
        let row = answers.first().and_then(|answer| answer.rows.first());
        match row.map(|row| text::number(row, 0)).transpose()? {
            Some(1) => Ok(()),
            _ => Err(StoreErrorKind::Conflict.into()),
        }
    }

    async fn unlock(&self, connection: &mut MySqlConnection) -> Result<(), StoreError> {
        run(connection, format!("SELECT RELEASE_LOCK({})", self.lock_name())).await.map(|_| ())
    }
}

impl Default for MySqlSchema {
    fn default() -> Self {
        Self::new()
    }
}

fn schema_error(why: impl Into<String>) -> StoreError {
    StoreError::new(StoreErrorKind::Schema, why.into())
}

fn other_version(version: u32) -> StoreError {
    schema_error(format!("the tables are of version {version}, not {VERSION}"))
}

fn lane_count(lanes: u16) -> Result<NonZeroU16, StoreError> {
    NonZeroU16::new(lanes).filter(|lanes| lanes.get() <= MySqlSchema::MAX_LANES).ok_or_else(|| {
        StoreError::new(StoreErrorKind::Invalid, "number of lanes is not 1 to 1,024")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_printed_migration_is_the_default_schema() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../migrations/mysql/0001_outbox.sql");
        let Ok(printed) = std::fs::read_to_string(path) else {
            assert!(
                !std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../migrations").exists()
            );
            return; // The published package does not hold the workspace's files.
        };
        assert_eq!(printed, MySqlSchema::new().sql(), "write the new text to {path}");
    }

    #[test]
    fn the_prefix_and_the_lanes_are_only_in_the_ddl() {
        let schema = MySqlSchema::new().with_prefix("shop_").unwrap().with_lanes(4).unwrap();
        let sql = schema.sql();
        assert!(sql.contains("CREATE TABLE IF NOT EXISTS shop_outbox ("));
        assert!(sql.contains("MOD 4"));
        assert!(sql.contains("VALUES (0), (1), (2), (3);"));
        for lanes in [0, 1025] {
            let error = MySqlSchema::new().with_lanes(lanes).unwrap_err();
            assert_eq!(error.kind(), StoreErrorKind::Invalid);
            let why = std::error::Error::source(&error).map(ToString::to_string);
            assert_eq!(why.as_deref(), Some("number of lanes is not 1 to 1,024"));
        }
    }

    #[test]
    fn a_newer_schema_is_refused() {
        assert_eq!(MySqlSchema::new().sql_from(VERSION).unwrap(), "");
        let error = MySqlSchema::new().sql_from(VERSION + 1).unwrap_err();
        assert_eq!(error.kind(), StoreErrorKind::Schema);
    }
}
