//! The consumer's half: each message takes effect once.

use std::collections::BTreeMap;
use std::time::Duration;

use outbox_core::message::MessageId;
use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::{AssertSqlSafe, MySqlConnection, SqlSafeStr, SqlStr};

use crate::error::store_error;
use crate::schema::MySqlSchema;
use crate::tables::Tables;
use crate::text::{self, Hex, LIST, List, run};
use crate::writer::require_transaction;

/// Records that a purge reads at once.
const STEP: u64 = 10_000;

/// Records which messages a consumer has accepted, in the transaction of their effects.
///
/// A message may be delivered more than once, always under the same id (`outbox-id` in Kafka).
/// A consumer that records the id together with what the message causes makes that happen once:
///
/// ```no_run
/// # use outbox_core::MessageId;
/// # use outbox_mysql::{MySqlInbox, sqlx};
/// # async fn consume(inbox: &MySqlInbox, pool: &sqlx::MySqlPool, id: MessageId)
/// # -> Result<(), Box<dyn std::error::Error>> {
/// let mut tx = pool.begin().await?;
/// if inbox.accept(&mut tx, id).await? {
///     sqlx::query("UPDATE account SET balance = balance + 1").execute(&mut *tx).await?;
/// }
/// tx.commit().await?; // Acknowledge the message to the broker after this, never before.
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct MySqlInbox {
    consumer: String,
    accept: SqlStr,
    tables: Tables,
}

impl MySqlInbox {
    /// The longest name of a consumer in bytes.
    pub const MAX_CONSUMER_BYTES: usize = 255;

    /// The inbox of `consumer` in the tables of `schema`. Consumers that do different things with
    /// the same messages have different names; those that share the work, the same. Does no I/O.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Invalid`] when the name is empty or longer than
    /// [`MAX_CONSUMER_BYTES`](Self::MAX_CONSUMER_BYTES).
    pub fn new(schema: &MySqlSchema, consumer: impl Into<String>) -> Result<Self, StoreError> {
        let consumer = consumer.into();
        if !(1..=Self::MAX_CONSUMER_BYTES).contains(&consumer.len()) {
            let why = "name of the consumer is empty or longer than 255 bytes";
            return Err(StoreError::new(StoreErrorKind::Invalid, why));
        }
        let inbox = &schema.tables().inbox;
        // The table's name is checked by `Tables`; all else is constant.
        // IGNORE makes a record that is there already no error, and no row.
        let accept = AssertSqlSafe(format!(
            "INSERT IGNORE INTO {inbox} (consumer, message_id, accepted_at) \
             VALUES (?, ?, UTC_TIMESTAMP(6))"
        ));
        Ok(Self { consumer, accept: accept.into_sql_str(), tables: schema.tables().clone() })
    }

    /// Records that this consumer accepts the message, and tells whether it is the first time.
    ///
    /// # Contract
    ///
    /// - `true` for the first transaction that commits, `false` for every later one.
    /// - The record commits and rolls back with the caller's transaction: after a rollback the
    ///   message is new again.
    /// - Of several transactions at once one gets `true`; the others wait for its end, or fail, and
    ///   never get `true` as well.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::NoTransaction`] when no transaction is open, which the server is
    /// asked: nothing was recorded then. [`StoreErrorKind::Conflict`] when another transaction is
    /// in the way. After an error, or where this was dropped before it answered, the caller must roll
    /// back: the message may be recorded.
    pub async fn accept(
        &self,
        transaction: &mut MySqlConnection,
        id: MessageId,
    ) -> Result<bool, StoreError> {
        require_transaction(transaction, false).await?;
        let done = sqlx::query(self.accept.clone())
            .bind(self.consumer.as_bytes())
            .bind(&id.as_bytes()[..])
            .execute(transaction)
            .await
            .map_err(store_error)?;
        Ok(done.rows_affected() == 1)
    }

    /// Deletes records of all consumers that are older than asked, at most `limit` of them, and
    /// tells how many. Run it now and then, outside of a transaction, until it answers less than
    /// `limit`.
    ///
    /// Whatever is purged is new again, so keep records for longer than a message can come back:
    /// the longest time that a relay may be down, or that a message may be held or dead before it
    /// is retried, plus as long as the broker retains what is then published.
    ///
    /// # Errors
    ///
    /// Any [`StoreErrorKind`].
    pub async fn purge(
        &self,
        connection: &mut MySqlConnection,
        older_than: Duration,
        limit: u32,
    ) -> Result<u64, StoreError> {
        // Longer than what a DATETIME can go back is as long as that.
        const MILLENNIUM: Duration = Duration::from_secs(1_000 * 365 * 24 * 3_600);
        let age = u64::try_from(older_than.min(MILLENNIUM).as_micros()).unwrap_or(u64::MAX);
        let (limit, mut purged) = (u64::from(limit), 0);
        loop {
            let before = purged;
            let step = (limit - purged).min(STEP);
            let answers = run(connection, oldest(&self.tables, age, step)).await?;
            let mut old: BTreeMap<Vec<u8>, Vec<[u8; 16]>> = BTreeMap::new();
            let mut found = 0;
            for row in answers.iter().flat_map(|answer| &answer.rows) {
                let consumer = text::bytes(row, 0)?.unwrap_or_default().to_vec();
                old.entry(consumer).or_default().push(text::id(row, 1)?);
                found += 1;
            }
            for (consumer, ids) in old {
                for ids in ids.chunks(LIST) {
                    let delete = delete(&self.tables, &consumer, ids, age);
                    let answers = run(connection, delete).await?;
                    purged += answers.first().map_or(0, |answer| answer.affected);
                }
            }
            // What somebody else purged meanwhile is not counted, and is not the end; but where all of it
            // was, they go on, and an old snapshot would show it for ever.
            if found < step || purged == before || purged >= limit {
                return Ok(purged);
            }
        }
    }
}

/// Reads which records are old, without a lock: a DELETE that looked for them itself would lock
/// what consumers are about to accept, and where a server takes the table for empty all of it.
fn oldest(tables: &Tables, age: u64, limit: u64) -> String {
    let inbox = &tables.inbox;
    format!(
        "SELECT consumer, message_id FROM (\
           SELECT consumer, message_id, accepted_at FROM {inbox} FORCE INDEX ({inbox}_accepted) \
           ORDER BY accepted_at LIMIT {limit}) oldest \
         WHERE accepted_at < UTC_TIMESTAMP(6) - INTERVAL {age} MICROSECOND"
    )
}

/// Only what is still old: what somebody else purged meanwhile may have been accepted anew.
fn delete(tables: &Tables, consumer: &[u8], ids: &[[u8; 16]], age: u64) -> String {
    format!(
        "DELETE i FROM {} i FORCE INDEX (PRIMARY) \
         WHERE i.consumer = {} AND i.message_id IN ({}) \
           AND i.accepted_at < UTC_TIMESTAMP(6) - INTERVAL {age} MICROSECOND",
        tables.inbox,
        Hex(consumer),
        List(ids.iter().map(|id| Hex(id))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_has_a_name() {
        for (name, valid) in [("", false), ("a", true), (&*"x".repeat(256), false)] {
            assert_eq!(MySqlInbox::new(&MySqlSchema::new(), name).is_ok(), valid, "{name}");
        }
        let error = MySqlInbox::new(&MySqlSchema::new(), "").unwrap_err();
        let why = std::error::Error::source(&error).map(ToString::to_string);
        assert!(why.is_some_and(|why| why.contains("longer than 255 bytes")));
    }
}
