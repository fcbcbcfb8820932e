//! Adds messages inside the application's transaction.

use std::sync::Arc;

use async_trait::async_trait;
use outbox_core::store::{StoreError, StoreErrorKind};
use outbox_core::{Message, Outbox, Writer};
use sqlx::mysql::MySqlArguments;
use sqlx::{Arguments, AssertSqlSafe, MySqlConnection, SqlSafeStr, SqlStr};

use crate::error::store_error;
use crate::headers;
use crate::insert::insert_sql;
use crate::schema::MySqlSchema;
use crate::store::read_message;
use crate::tables::Tables;
use crate::text::run;

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

/// A statement stays well below the smallest `max_allowed_packet` in use (16 MiB), unless one
/// message alone is larger.
const STATEMENT_BYTES: usize = 4 << 20;

/// Asks the server whether a transaction is open: without one RELEASE fails, because SAVEPOINT
/// made nothing. What sqlx counts itself is wrong after a deadlock and after DDL.
const CHECK: &str = "SAVEPOINT outbox_add; RELEASE SAVEPOINT outbox_add";

/// Fails unless a transaction is open; with a savepoint, if that is wanted, in the same packet.
///
/// Every statement must have answered. Where a call was dropped while sqlx prepared its statement,
/// answers on that connection are out of step for good: the first one is that of something earlier,
/// and would pass for a transaction that is not there.
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
    Err(StoreError::new(StoreErrorKind::Unavailable, "answers of the connection are out of step"))
}

/// Inserts messages through the application's own connection.
///
/// Every call asks the server whether a transaction is open, which costs one round trip; values
/// are bound, so that no payload appears in a statement's text, which sqlx logs. The savepoint
/// name `outbox_add` is taken.
///
/// sqlx for MySQL is not safe to cancel: a call that is dropped, ours or yours, can leave its
/// connection out of step with the server. Close such a connection. If it is used nevertheless,
/// adding to it is refused.
#[derive(Debug, Clone)]
pub struct MySqlWriter {
    tables: Tables,
    inserts: Arc<[(usize, SqlStr)]>,
}

impl MySqlWriter {
    /// A writer to the outbox of `schema`. Does no I/O.
    pub fn new(schema: &MySqlSchema) -> Self {
        let tables = schema.tables().clone();
        // Table names are checked by `Tables`; all else is constant.
        let text = |rows| AssertSqlSafe(insert_sql(&tables, rows)).into_sql_str();
        let inserts = SIZES.map(|rows| (rows, text(rows)));
        Self { inserts: Arc::new(inserts), tables }
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
        rows.map(|row| read_message(row, 0).map_err(invalid)).collect()
    }

    async fn insert(
        &self,
        connection: &mut MySqlConnection,
        chunks: &[&[Message]],
    ) -> Result<(), StoreError> {
        for chunk in chunks {
            let Some((_, sql)) = self.inserts.iter().find(|(rows, _)| *rows == chunk.len()) else {
                return Err(StoreErrorKind::Other.into());
            };
            let values = bind(chunk)?;
            sqlx::query_with(sql.clone(), values)
                .execute(&mut *connection)
                .await
                .map_err(store_error)?;
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
        let chunks = chunks(messages);
        if chunks.len() <= 1 {
            require_transaction(transaction, false).await?;
            return self.insert(transaction, &chunks).await;
        }
        // Several statements: a savepoint keeps them all or none, even if the caller goes on
        // after an error.
        require_transaction(transaction, true).await?;
        let inserted = self.insert(transaction, &chunks).await;
        let end = match inserted {
            Ok(()) => "RELEASE SAVEPOINT outbox_add",
            Err(_) => "ROLLBACK TO SAVEPOINT outbox_add",
        };
        let ended = run(transaction, end.to_owned()).await;
        inserted.and(ended.map(|_| ()))
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
        assert_eq!(sizes(&messages(16, 900_000)), [4, 4, 4, 4]);
        assert_eq!(sizes(&messages(2, 5 << 20)), [1, 1]);
    }
}
