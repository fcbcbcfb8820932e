//! The consumer's half: each message takes effect once.

use std::time::Duration;

use outbox_core::message::MessageId;
use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr, SqliteConnection};
use tokio::time::Instant;

use crate::error::store_error;
use crate::schema::SqliteSchema;
use crate::text::NOW;
use crate::writer::require_transaction;

/// Records that one write of a purge deletes.
const STEP: u32 = 256;

/// The longest pause between two of them.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Records which messages a consumer has accepted, in the transaction of their effects.
///
/// A message may be delivered more than once, always under the same id (`outbox-id` in Kafka).
/// A consumer that records the id together with what the message causes makes that happen once:
///
/// ```no_run
/// # use outbox_core::MessageId;
/// # use outbox_sqlite::{SqliteInbox, sqlx};
/// # async fn consume(inbox: &SqliteInbox, pool: &sqlx::SqlitePool, id: MessageId)
/// # -> Result<(), Box<dyn std::error::Error>> {
/// let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
/// if inbox.accept(&mut tx, id).await? {
///     sqlx::query("UPDATE account SET balance = balance + 1").execute(&mut *tx).await?;
/// }
/// tx.commit().await?; // Acknowledge the message to the broker after this, never before.
/// # Ok(()) }
/// ```
///
/// Close the connection after a `commit` that failed, and where [`accept`](Self::accept) finds no
/// transaction while one of sqlx is open: see
/// [what SQLite rolls back by itself](crate#what-sqlite-rolls-back-by-itself).
#[derive(Debug, Clone)]
pub struct SqliteInbox {
    consumer: String,
    accept: SqlStr,
    purge: SqlStr,
}

impl SqliteInbox {
    /// The longest name of a consumer in bytes.
    pub const MAX_CONSUMER_BYTES: usize = 255;

    /// The inbox of `consumer` in the tables of `schema`. Consumers that do different things with
    /// the same messages have different names; those that share the work, the same. Does no I/O.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Invalid`] when the name is empty or longer than
    /// [`MAX_CONSUMER_BYTES`](Self::MAX_CONSUMER_BYTES).
    pub fn new(schema: &SqliteSchema, consumer: impl Into<String>) -> Result<Self, StoreError> {
        let consumer = consumer.into();
        if !(1..=Self::MAX_CONSUMER_BYTES).contains(&consumer.len()) {
            let why = "name of the consumer is empty or longer than 255 bytes";
            return Err(StoreError::new(StoreErrorKind::Invalid, why));
        }
        let inbox = &schema.tables().inbox;
        // The table's name is checked by `Tables`; all else is constant.
        let accept = AssertSqlSafe(format!(
            "INSERT INTO {inbox} (consumer, message_id, accepted_at) VALUES (?, ?, {NOW}) \
             ON CONFLICT DO NOTHING"
        ));
        let purge = AssertSqlSafe(format!(
            "DELETE FROM {inbox} WHERE (consumer, message_id) IN (\
               SELECT consumer, message_id FROM {inbox} INDEXED BY {inbox}_accepted \
               WHERE accepted_at < {NOW} - ? ORDER BY accepted_at LIMIT ?)"
        ));
        Ok(Self { consumer, accept: accept.into_sql_str(), purge: purge.into_sql_str() })
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
    /// [`StoreErrorKind::NoTransaction`] when no transaction is open, which SQLite is asked:
    /// nothing was recorded then. [`StoreErrorKind::Conflict`] when another connection writes, for
    /// longer than the busy timeout, and at once when the transaction began as a reader (`BEGIN`)
    /// and another one wrote after it had read. After an error, or where this was dropped before it
    /// answered, the caller must roll back: the message may be recorded.
    pub async fn accept(
        &self,
        transaction: &mut SqliteConnection,
        id: MessageId,
    ) -> Result<bool, StoreError> {
        require_transaction(transaction).await?;
        let done = sqlx::query(self.accept.clone())
            .bind(self.consumer.clone())
            .bind(id.as_bytes().to_vec())
            .execute(transaction)
            .await
            .map_err(store_error)?;
        Ok(done.rows_affected() == 1)
    }

    /// Deletes records of all consumers that are older than asked, at most `limit` of them, and
    /// tells how many. Run it now and then, outside of a transaction, until it answers less than
    /// `limit`. It writes in small steps, with pauses that let others write.
    ///
    /// Whatever is purged is new again, so keep records for longer than a message can come back:
    /// the longest time that a relay may be down, or that a message may be held or dead before it
    /// is retried, plus as long as the broker retains what is then published.
    ///
    /// # Errors
    ///
    /// Any [`StoreErrorKind`]; what was deleted before stays so.
    pub async fn purge(
        &self,
        connection: &mut SqliteConnection,
        older_than: Duration,
        limit: u32,
    ) -> Result<u64, StoreError> {
        let age = i64::try_from(older_than.as_micros()).unwrap_or(i64::MAX);
        let mut left = limit;
        loop {
            let (step, sent) = (left.min(STEP), Instant::now());
            let done = sqlx::query(self.purge.clone())
                .bind(age)
                .bind(step)
                .execute(&mut *connection)
                .await
                .map_err(store_error)?;
            let gone = u32::try_from(done.rows_affected()).unwrap_or(u32::MAX);
            left = left.saturating_sub(gone);
            if gone < step || left == 0 {
                return Ok(u64::from(limit - left));
            }
            tokio::time::sleep(sent.elapsed().min(LONGEST_PAUSE)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_has_a_name() {
        for (name, valid) in [("", false), ("a", true), (&*"x".repeat(256), false)] {
            assert_eq!(SqliteInbox::new(&SqliteSchema::new(), name).is_ok(), valid, "{name}");
        }
        let error = SqliteInbox::new(&SqliteSchema::new(), "").unwrap_err();
        let why = std::error::Error::source(&error).map(ToString::to_string);
        assert!(why.is_some_and(|why| why.contains("longer than 255 bytes")));
    }
}
