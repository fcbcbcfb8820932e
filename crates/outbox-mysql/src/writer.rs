//! Adds messages inside the application's transaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use async_trait::async_trait;
use outbox_core::store::{StoreError, StoreErrorKind};
use outbox_core::{Message, Outbox, Writer};
use sqlx::mysql::MySqlArguments;
use sqlx::{Arguments, AssertSqlSafe, MySqlConnection, SqlSafeStr, SqlStr};

use crate::error::store_error;
use crate::headers;
use crate::insert::{guarded_insert_sql, insert_sql};
use crate::schema::MySqlSchema;
use crate::store::{LastTopic, read_message};
use crate::tables::Tables;
use crate::text::{self, run};

/// The outbox of an application on MySQL or MariaDB.
///
/// ```no_run
/// use outbox_core::Message;
/// use outbox_mysql::{MySqlOutbox, MySqlSchema, MySqlWriter};
///
/// # async fn place(pool: sqlx::MySqlPool) -> Result<(), Box<dyn std::error::Error>> {
/// let outbox = MySqlOutbox::new(MySqlWriter::new(&MySqlSchema::new()));
/// let mut tx = pool.begin().await?;
/// sqlx::query("INSERT INTO orders (id) VALUES (7)").execute(&mut *tx).await?;
/// outbox.add(&mut tx, Message::builder("orders").key("7").payload("{}").build()?).await?;
/// tx.commit().await?;
/// # Ok(()) }
/// ```
pub type MySqlOutbox = Outbox<MySqlWriter>;

/// Rows of one statement. Few sizes, because every new text is prepared at the cost of a round
/// trip, and takes a place in the connection's cache of statements.
const SIZES: [usize; 5] = [256, 64, 16, 4, 1];

/// A statement stays below the smallest `max_allowed_packet` that the relay accepts (1 MiB), unless one
/// message alone is larger.
const STATEMENT_BYTES: usize = 900 << 10;

/// Asks the server whether a transaction is open: without one RELEASE fails, because SAVEPOINT
/// made nothing. What sqlx counts itself is wrong after a deadlock and after DDL.
const CHECK: &str = "SAVEPOINT outbox_add; RELEASE SAVEPOINT outbox_add";

/// Fails unless a transaction is open; with a savepoint, if that is wanted, in the same packet.
///
/// Every statement must have answered. Where a call was dropped while sqlx prepared its statement,
/// or a ping was, answers on that connection are out of step for good: the first one is that of
/// something earlier, and would pass for a transaction that is not there.
pub(crate) async fn require_transaction(
    connection: &mut MySqlConnection,
    savepoint: bool,
) -> Result<(), StoreError> {
    let (packet, statements) = match savepoint {
        false => (CHECK.to_owned(), 2),
        true => (format!("{CHECK}; SAVEPOINT outbox_add"), 3),
    };
    if run(connection, packet).await?.len() == statements {
        return Ok(());
    }
    Err(out_of_step())
}

fn out_of_step() -> StoreError {
    StoreError::new(StoreErrorKind::Unavailable, "answers of the connection are out of step")
}

/// Inserts messages through the application's own connection.
///
/// Every call asks the server whether a transaction is open. On MariaDB the INSERT itself does, if
/// one is enough; otherwise that costs one round trip. The first call of a writer finds out which
/// of the two it is, so keep the writer; clones share what it knows. Values are bound, so that no
/// payload appears in a statement's text, which sqlx logs. The savepoint name `outbox_add` is
/// taken.
///
/// sqlx for MySQL is not safe to cancel: a call that is dropped, ours or yours, can leave its
/// connection out of step with the server. Close such a connection. If it is used nevertheless,
/// nothing is added outside of a transaction, and an answer that cannot be that of `add` is an
/// error.
#[derive(Debug, Clone)]
pub struct MySqlWriter {
    tables: Tables,
    inserts: Arc<[Insert]>,
    /// A server was met that does not know `@@in_transaction`. A hint, which is safe to be wrong:
    /// such a server refuses the guarded statement.
    asks: Arc<AtomicBool>,
}

/// The statements that add so many rows.
#[derive(Debug)]
struct Insert {
    rows: usize,
    plain: SqlStr,
    guarded: SqlStr,
}

impl MySqlWriter {
    /// A writer to the outbox of `schema`. Does no I/O.
    pub fn new(schema: &MySqlSchema) -> Self {
        let tables = schema.tables().clone();
        // Table names are checked by `Tables`; all else is constant.
        let inserts = SIZES.map(|rows| Insert {
            rows,
            plain: AssertSqlSafe(insert_sql(&tables, rows)).into_sql_str(),
            guarded: AssertSqlSafe(guarded_insert_sql(&tables, rows)).into_sql_str(),
        });
        Self { inserts: Arc::new(inserts), tables, asks: Arc::default() }
    }

    /// All messages that wait as this connection sees them, the rows of its open transaction
    /// included. For tests: it reads the whole table.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Invalid`] when a row holds no valid message; otherwise any
    /// [`StoreErrorKind`].
    pub async fn pending(
        &self,
        connection: &mut MySqlConnection,
    ) -> Result<Vec<Message>, StoreError> {
        let sql = format!(
            "SELECT message_id, topic, message_key, partition_no, headers, payload \
             FROM {} ORDER BY id",
            self.tables.outbox
        );
        let answers = run(connection, sql).await?;
        let invalid = |why| StoreError::new(StoreErrorKind::Invalid, why);
        let rows = answers.iter().flat_map(|answer| &answer.rows);
        let mut topics = LastTopic::default();
        rows.map(|row| read_message(row, 0, &mut topics).map_err(invalid)).collect()
    }

    async fn insert(
        &self,
        connection: &mut MySqlConnection,
        chunks: &[&[Message]],
        guarded: bool,
    ) -> Result<(), StoreError> {
        for chunk in chunks {
            let Some(insert) = self.inserts.iter().find(|insert| insert.rows == chunk.len()) else {
                return Err(StoreErrorKind::Other.into());
            };
            let sql = if guarded { &insert.guarded } else { &insert.plain };
            let values = bind(chunk)?;
            let done = sqlx::query_with(sql.clone(), values)
                .execute(&mut *connection)
                .await
                .map_err(store_error)?;
            if done.rows_affected() != chunk.len() as u64 {
                return Err(out_of_step());
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Writer for MySqlWriter {
    type Transaction = MySqlConnection;

    async fn write(
        &self,
        transaction: &mut MySqlConnection,
        messages: &[Message],
    ) -> Result<(), StoreError> {
        if messages.iter().any(has_empty) {
            require_empty_values(transaction).await?;
        }
        let chunks = chunks(messages);
        if chunks.len() == 1 && !self.asks.load(Relaxed) {
            match self.insert(transaction, &chunks, true).await {
                Err(error) if error.kind() == StoreErrorKind::Unsupported => {
                    self.asks.store(true, Relaxed);
                }
                done => return done,
            }
        }
        if chunks.len() <= 1 {
            require_transaction(transaction, false).await?;
            return self.insert(transaction, &chunks, false).await;
        }
        // Several statements: a savepoint keeps them all or none, even if the caller goes on
        // after an error.
        require_transaction(transaction, true).await?;
        let inserted = self.insert(transaction, &chunks, false).await;
        let end = match inserted {
            Ok(()) => "RELEASE SAVEPOINT outbox_add",
            Err(_) => "ROLLBACK TO SAVEPOINT outbox_add",
        };
        let ended = run(transaction, end.to_owned()).await;
        inserted.and(ended.map(|_| ()))
    }
}

/// Whether a key or a payload is empty, which is not the same as none.
fn has_empty(message: &Message) -> bool {
    [message.key(), message.payload()].into_iter().flatten().any(<[u8]>::is_empty)
}

/// Fails where the session makes null of what is empty: MariaDB can be told to. An empty payload would
/// become a tombstone, and a message with an empty key would lose its order.
async fn require_empty_values(connection: &mut MySqlConnection) -> Result<(), StoreError> {
    let packet = "SELECT @@sql_mode LIKE '%EMPTY_STRING_IS_NULL%'".to_owned();
    let answers = run(connection, packet).await?;
    let row = answers.first().and_then(|answer| answer.rows.first());
    match row.map(|row| text::number(row, 0)).transpose()? {
        Some(0) => Ok(()),
        _ => Err(StoreError::new(
            StoreErrorKind::Unsupported,
            "sql_mode EMPTY_STRING_IS_NULL bears no empty key or payload",
        )),
    }
}

/// Splits messages into statements of the prepared sizes and of bounded bytes, in their order.
fn chunks(mut messages: &[Message]) -> Vec<&[Message]> {
    let mut chunks = Vec::new();
    while !messages.is_empty() {
        let fits = |rows: &usize| {
            *rows == 1
                || (*rows <= messages.len()
                    && messages[..*rows].iter().map(Message::size).sum::<usize>()
                        <= STATEMENT_BYTES)
        };
        let rows = SIZES.into_iter().find(fits).unwrap_or(1);
        let (chunk, rest) = messages.split_at(rows);
        chunks.push(chunk);
        messages = rest;
    }
    chunks
}

fn bind(messages: &[Message]) -> Result<MySqlArguments, StoreError> {
    let mut values = MySqlArguments::default();
    for message in messages {
        add(&mut values, &message.id().as_bytes()[..])?;
        add(&mut values, message.topic())?;
        add(&mut values, message.key())?;
        add(&mut values, message.partition())?;
        add(&mut values, headers::encode(message.headers()))?;
        add(&mut values, message.payload())?;
    }
    Ok(values)
}

fn add<'q, T>(values: &mut MySqlArguments, value: T) -> Result<(), StoreError>
where
    T: sqlx::Encode<'q, sqlx::MySql> + sqlx::Type<sqlx::MySql>,
{
    values.add(value).map_err(|error| StoreError::new(StoreErrorKind::Invalid, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(count: usize, bytes: usize) -> Vec<Message> {
        let message = |_| Message::builder("t").payload(vec![0; bytes]).build().unwrap();
        (0..count).map(message).collect()
    }

    fn sizes(messages: &[Message]) -> Vec<usize> {
        let chunks = chunks(messages);
        assert_eq!(chunks.concat().len(), messages.len());
        chunks.iter().map(|chunk| chunk.len()).collect()
    }

    #[test]
    fn messages_are_added_by_few_statements_of_few_sizes() {
        assert_eq!(sizes(&messages(1, 10)), [1]);
        assert_eq!(sizes(&messages(100, 10)), [64, 16, 16, 4]);
        assert_eq!(sizes(&messages(300, 10)), [256, 16, 16, 4, 4, 4]);
    }

    #[test]
    fn a_statement_does_not_outgrow_a_packet() {
        assert_eq!(sizes(&messages(16, 200_000)), [4, 4, 4, 4]);
        assert_eq!(sizes(&messages(2, 5 << 20)), [1, 1]);
    }
}
