//! Adds messages inside the application's transaction.

use std::sync::Arc;

use async_trait::async_trait;
use outbox_core::store::{StoreError, StoreErrorKind};
use outbox_core::{Message, Outbox, Writer};
use sqlx::sqlite::SqliteArguments;
use sqlx::{Arguments, AssertSqlSafe, SqlSafeStr, SqlStr, SqliteConnection};

use crate::error::store_error;
use crate::headers;
use crate::insert::insert_sql;
use crate::schema::SqliteSchema;
use crate::store::read_message;
use crate::tables::Tables;
use crate::text::run;

/// The outbox of an application on SQLite.
///
/// ```no_run
/// use outbox_core::Message;
/// use outbox_sqlite::{SqliteOutbox, SqliteSchema, SqliteWriter};
///
/// # async fn place(pool: sqlx::SqlitePool) -> Result<(), Box<dyn std::error::Error>> {
/// let outbox = SqliteOutbox::new(SqliteWriter::new(&SqliteSchema::new()));
/// let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
/// sqlx::query("INSERT INTO orders (id) VALUES (7)").execute(&mut *tx).await?;
/// outbox.add(&mut tx, Message::builder("orders").key("7").payload("{}").build()?).await?;
/// tx.commit().await?;
/// # Ok(()) }
/// ```
pub type SqliteOutbox = Outbox<SqliteWriter>;

/// Rows of one statement. Few sizes, because every text takes a place in the connection's cache of
/// statements.
const SIZES: [usize; 5] = [256, 64, 16, 4, 1];

/// Inserts messages through the application's own connection.
///
/// Every call asks SQLite whether a transaction is open; values are bound, so that no payload
/// appears in a statement's text, which sqlx logs. The savepoint name `outbox_add` is taken.
///
/// Where a transaction of sqlx is open and `add` finds
/// [none](outbox_core::AddErrorKind::NoTransaction), SQLite has rolled it back by itself: see
/// [what to do then](crate#what-sqlite-rolls-back-by-itself).
#[derive(Debug, Clone)]
pub struct SqliteWriter {
    tables: Tables,
    inserts: Arc<[(usize, SqlStr)]>,
}

impl SqliteWriter {
    /// A writer to the outbox of `schema`. Does no I/O.
    pub fn new(schema: &SqliteSchema) -> Self {
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
        connection: &mut SqliteConnection,
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
        connection: &mut SqliteConnection,
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
impl Writer for SqliteWriter {
    type Transaction = SqliteConnection;

    async fn write(
        &self,
        transaction: &mut SqliteConnection,
        messages: &[Message],
    ) -> Result<(), StoreError> {
        require_transaction(transaction).await?;
        let chunks = chunks(messages);
        if chunks.len() <= 1 {
            return self.insert(transaction, &chunks).await;
        }
        // Several statements: a savepoint keeps them all or none, even if the caller goes on
        // after an error.
        run(transaction, "SAVEPOINT outbox_add".to_owned()).await?;
        let inserted = self.insert(transaction, &chunks).await;
        let end = match inserted {
            Ok(()) => "RELEASE outbox_add",
            Err(_) => "ROLLBACK TO outbox_add; RELEASE outbox_add",
        };
        let ended = run(transaction, end.to_owned()).await;
        inserted.and(ended.map(|_| ()))
    }
}

/// Asks SQLite whether a transaction is open. What sqlx counts itself is wrong after a statement
/// for which SQLite rolled the whole transaction back: disk full, `ON CONFLICT ROLLBACK`.
///
/// No SQL function tells it, and every statement that could begin or end a transaction is out,
/// because this future may be dropped. SQLite refuses to change this setting within a transaction,
/// and outside of one it does nothing for the temporary database.
pub(crate) async fn require_transaction(
    connection: &mut SqliteConnection,
) -> Result<(), StoreError> {
    const SQLITE_ERROR: &str = "1";
    let asked = sqlx::raw_sql("PRAGMA temp.synchronous = NORMAL").execute(connection).await;
    match asked {
        Ok(_) => Err(StoreErrorKind::NoTransaction.into()),
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(SQLITE_ERROR) => {
            Ok(())
        }
        Err(error) => Err(store_error(error)),
    }
}

/// Splits messages into statements of the prepared sizes, in their order.
fn chunks(mut messages: &[Message]) -> Vec<&[Message]> {
    let mut chunks = Vec::new();
    while !messages.is_empty() {
        let rows = SIZES.into_iter().find(|rows| *rows <= messages.len()).unwrap_or(1);
        let (chunk, rest) = messages.split_at(rows);
        chunks.push(chunk);
        messages = rest;
    }
    chunks
}

fn bind(messages: &[Message]) -> Result<SqliteArguments, StoreError> {
    let mut values = SqliteArguments::default();
    for message in messages {
        add(&mut values, message.id().as_bytes().to_vec())?;
        add(&mut values, message.topic().to_owned())?;
        add(&mut values, message.key().map(<[u8]>::to_vec))?;
        add(&mut values, message.partition())?;
        add(&mut values, headers::encode(message.headers()))?;
        add(&mut values, message.payload().map(<[u8]>::to_vec))?;
    }
    Ok(values)
}

fn add<'q, T>(values: &mut SqliteArguments, value: T) -> Result<(), StoreError>
where
    T: sqlx::Encode<'q, sqlx::Sqlite> + sqlx::Type<sqlx::Sqlite>,
{
    values.add(value).map_err(|error| StoreError::new(StoreErrorKind::Invalid, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_added_by_few_statements_of_few_sizes() {
        let sizes = |count| {
            let message = |_| Message::builder("t").payload("p").build().unwrap();
            let messages: Vec<_> = (0..count).map(message).collect();
            let chunks = chunks(&messages);
            assert_eq!(chunks.concat().len(), messages.len());
            chunks.iter().map(|chunk| chunk.len()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(1), [1]);
        assert_eq!(sizes(100), [64, 16, 16, 4]);
        assert_eq!(sizes(300), [256, 16, 16, 4, 4, 4]);
    }
}
