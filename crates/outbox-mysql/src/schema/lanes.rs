//! The operator's change of the number of lanes.
//!
//! The lanes stand in the table's DEFAULT and CHECK, which cannot be changed in one transaction
//! with the rows. So nobody has a lane meanwhile, and whatever stops half way is done again from
//! the start. Writers need not know: the DEFAULT gives every new row its lane, before and after.

use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::MySqlConnection;

use super::{MySqlSchema, VERSION, ddl};
use crate::tables::Tables;
use crate::text::{self, Hex, List, run};

/// Who owns all lanes during the change. Dispatchers take random ids, and never this one.
const OWNER: Hex<'static> = Hex(b"change-of-lanes!");

/// No dispatcher takes a lane before this: an interrupted change must be run again.
const FOREVER: &str = "'9999-12-31 00:00:00'";

/// An ALTER waits for open transactions for a second only: statements of the application queue
/// behind it meanwhile. And all rows may be changed.
const SETTINGS: &str = "SET @outbox_wait = @@SESSION.lock_wait_timeout, \
       @outbox_safe = @@SESSION.sql_safe_updates; \
     SET SESSION lock_wait_timeout = 1, sql_safe_updates = 0";
const FORMER_SETTINGS: &str =
    "SET SESSION lock_wait_timeout = @outbox_wait, sql_safe_updates = @outbox_safe";

/// In MariaDB's mode `ORACLE` a `BEGIN` would open a block.
const START: &str = "START TRANSACTION";

/// For how long an ALTER, or the move of the rows, is tried again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two tries, so that the application gets on.
const PAUSE: Duration = Duration::from_millis(200);

impl MySqlSchema {
    /// Changes the number of lanes of an existing outbox.
    ///
    /// All leases are taken away first, and what their owners may still be publishing is waited
    /// for: at most one lease. Then all pending rows are moved in one transaction, held ones in
    /// their places, and the lanes are free for all dispatchers. Running ones take their share
    /// without a restart; one that is started meanwhile ends with
    /// [`StoreErrorKind::Schema`].
    ///
    /// The application may go on adding. It waits while the new CHECK is put in place, which copies
    /// the outbox table: run this when little is pending. A change that was interrupted leaves all
    /// dispatchers without lanes until it is run again; it can be run again at any point. Nothing
    /// changes if there are `lanes` lanes already.
    ///
    /// `connection` must not be inside a transaction, and its account needs the right to alter the
    /// outbox table. Close it if this was dropped: its session keeps the lock of migrations, and
    /// settings of this.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Invalid`] unless `lanes` is 1 to 1,024; [`StoreErrorKind::Conflict`] when
    /// a migration or another change holds the lock, or when the table was in use without a pause
    /// for a minute; otherwise any [`StoreErrorKind`].
    pub async fn change_lanes(
        &self,
        connection: &mut MySqlConnection,
        lanes: u16,
    ) -> Result<(), StoreError> {
        let lanes = super::lane_count(lanes)?;
        self.lock(connection).await?;
        run(connection, SETTINGS.to_owned()).await?;
        let changed = self.change_locked(connection, lanes).await;
        // An error inside a packet leaves its transaction open, and it locks all lanes.
        let restored = run(connection, format!("ROLLBACK; {FORMER_SETTINGS}")).await;
        let unlocked = self.unlock(connection).await;
        changed.and(restored.map(|_| ())).and(unlocked)
    }

    async fn change_locked(
        &self,
        connection: &mut MySqlConnection,
        lanes: NonZeroU16,
    ) -> Result<(), StoreError> {
        if !self.is_interrupted(connection).await? && self.read_lanes(connection).await? == lanes {
            return Ok(());
        }
        let t = self.tables();
        let mut answers = run(connection, take_all(t)).await?.into_iter().skip(1);
        let undecided = text::take(&mut answers)?;
        let undecided = undecided.rows.first().map(|row| text::number(row, 0)).transpose()?;
        tokio::time::sleep(Duration::from_micros(undecided.unwrap_or(0))).await;

        let old_check = self.has_check(connection).await?;
        patiently(connection, &loosen(t, lanes, old_check), &[]).await?;
        // A row that was written around the DEFAULT between the two is found by the CHECK.
        let strays = [StoreErrorKind::Invalid];
        let tighten = format!("{};{}", move_all(t, lanes), tighten(t, lanes));
        patiently(connection, &tighten, &strays).await?;
        run(connection, free_all(t, lanes)).await?;
        self.check(connection).await
    }

    /// Whether a change of the number of lanes has begun and not ended.
    async fn is_interrupted(&self, connection: &mut MySqlConnection) -> Result<bool, StoreError> {
        let meta = &self.tables().meta;
        let packet = format!("SELECT lanes IS NULL AND schema_version = {VERSION} FROM {meta}");
        let answers = run(connection, packet).await?;
        let row = answers.first().and_then(|answer| answer.rows.first());
        Ok(row.map(|row| text::number(row, 0)).transpose()? == Some(1))
    }

    /// Whether MySQL has the CHECK. MariaDB hides it from whoever has rights on single tables only.
    async fn has_check(&self, connection: &mut MySqlConnection) -> Result<bool, StoreError> {
        let packet = format!(
            "SELECT COUNT(*) FROM information_schema.TABLE_CONSTRAINTS \
             WHERE CONSTRAINT_SCHEMA = DATABASE() AND LOWER(TABLE_NAME) = LOWER({table}) \
               AND CONSTRAINT_NAME = {check}",
            // As text: there are servers that keep the names of tables in lower case.
            table = format_args!("_utf8mb4 {}", Hex(self.tables().outbox.as_bytes())),
            check = Hex(ddl::lane_check(self.tables()).as_bytes()),
        );
        let answers = run(connection, packet).await?;
        let row = answers.first().and_then(|answer| answer.rows.first());
        Ok(row.map(|row| text::number(row, 0)).transpose()? == Some(1))
    }
}

/// Raises every epoch, and tells how long former owners may still be publishing. A change that is
/// run again finds this time in `ttl`.
fn take_all(tables: &Tables) -> String {
    let left = format!(
        "IF(owner IS NULL, 0, IF(owner = {OWNER}, ttl, \
           LEAST(ttl, GREATEST(0, TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), expires_at)))))"
    );
    format!(
        "{START};\
         SELECT MAX({left}) FROM {lane} FOR UPDATE;\
         UPDATE {lane} SET ttl = {left}, epoch = epoch + 1, expires_at = {FOREVER}, \
           owner = {OWNER};\
         UPDATE {meta} SET lanes = NULL;\
         COMMIT",
        lane = tables.lane,
        meta = tables.meta,
    )
}

/// Gives new rows their new lanes. Once it has passed, every transaction that knew the former
/// DEFAULT has ended.
fn loosen(tables: &Tables, lanes: NonZeroU16, old_check: bool) -> String {
    // Each server passes over the other one's words.
    let check = ddl::lane_check(tables);
    let mysql = if old_check { format!("/*!80016 DROP CHECK {check}, */ ") } else { String::new() };
    format!(
        "ALTER TABLE {} /*M! DROP CONSTRAINT IF EXISTS {check}, */ {mysql}\
           ALTER COLUMN lane SET DEFAULT ({})",
        tables.outbox,
        ddl::lane_of(lanes),
    )
}

/// At READ COMMITTED, so that it locks the rows that it moves and no gap that is inserted into.
fn move_all(tables: &Tables, lanes: NonZeroU16) -> String {
    let rows: Vec<String> =
        (0..lanes.get()).map(|lane| format!("({lane}, {OWNER}, {FOREVER})")).collect();
    format!(
        "SET TRANSACTION ISOLATION LEVEL READ COMMITTED;\
         {START};\
         UPDATE {outbox} SET lane = {lane_of} WHERE lane <> {lane_of};\
         INSERT IGNORE INTO {lane} (lane, owner, expires_at) VALUES {rows};\
         COMMIT",
        outbox = tables.outbox,
        lane = tables.lane,
        lane_of = ddl::lane_of(lanes),
        rows = List(&rows),
    )
}

fn tighten(tables: &Tables, lanes: NonZeroU16) -> String {
    format!(
        "ALTER TABLE {} ADD CONSTRAINT {} CHECK (lane = {})",
        tables.outbox,
        ddl::lane_check(tables),
        ddl::lane_of(lanes),
    )
}

/// Lanes that are no more keep their rows, and with them their epochs.
fn free_all(tables: &Tables, lanes: NonZeroU16) -> String {
    format!(
        "{START};\
         UPDATE {lane} SET owner = NULL, expires_at = UTC_TIMESTAMP(6), ttl = 0;\
         UPDATE {meta} SET lanes = {lanes};\
         COMMIT",
        lane = tables.lane,
        meta = tables.meta,
    )
}

/// Runs a packet again while others are in the way, or while it fails in one of these ways.
async fn patiently(
    connection: &mut MySqlConnection,
    packet: &str,
    passing: &[StoreErrorKind],
) -> Result<(), StoreError> {
    let start = Instant::now();
    loop {
        match run(connection, packet.to_owned()).await {
            Ok(_) => return Ok(()),
            Err(error)
                if start.elapsed() < PATIENCE
                    && (error.kind() == StoreErrorKind::Conflict
                        || passing.contains(&error.kind())) => {}
            Err(error) => return Err(error),
        }
        // An error inside a packet leaves its transaction open.
        run(connection, "ROLLBACK".to_owned()).await?;
        tokio::time::sleep(PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_former_check_is_dropped_only_where_it_is() {
        let lanes = NonZeroU16::new(7).unwrap();
        let tables = Tables::with_prefix("shop_").unwrap();
        let there = loosen(&tables, lanes, true);
        assert!(there.contains("/*!80016 DROP CHECK shop_outbox_lane_is_of_key, */"));
        let gone = loosen(&tables, lanes, false);
        assert!(!gone.contains("DROP CHECK"));
        for text in [there, gone] {
            let drop = "/*M! DROP CONSTRAINT IF EXISTS shop_outbox_lane_is_of_key, */";
            assert!(text.contains(drop), "{text}");
        }
    }
}
