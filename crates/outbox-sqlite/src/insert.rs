//! The statement that adds messages, and its values.

use outbox_core::Message;

use crate::headers;
use crate::schema::SqliteSchema;
use crate::tables::Tables;

/// The statement that adds messages as data, for those who cannot hand a sqlx connection to
/// [`SqliteOutbox`](crate::SqliteOutbox): rusqlite, diesel, another version of sqlx.
///
/// Run [`sql`](Self::sql) with [`values`](Self::values) inside your transaction. Nothing here can
/// tell whether there is one: outside of it, the message is published at once. Nor are the limits
/// of an `Outbox` checked; call [`Limits::check`](outbox_core::message::Limits::check) yourself.
///
/// ```
/// use outbox_core::Message;
/// use outbox_sqlite::{SqliteInsert, SqliteSchema};
///
/// # fn main() -> Result<(), outbox_core::message::MessageError> {
/// let message = Message::builder("orders").key("7").payload("{}").build()?;
/// let insert = SqliteInsert::new(&SqliteSchema::new(), &[message]);
/// assert!(insert.sql().starts_with("INSERT INTO outbox (message_id,"));
/// assert_eq!(insert.values().len(), 6);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct SqliteInsert {
    sql: String,
    values: Vec<SqlValue>,
}

/// A value to bind. There will be no other kinds.
#[derive(Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum SqlValue {
    /// NULL.
    Null,
    /// A whole number.
    Int(i64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
}

/// Shows sizes, never content.
impl std::fmt::Debug for SqlValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Null => f.write_str("Null"),
            Self::Int(value) => write!(f, "Int({value})"),
            Self::Text(text) => write!(f, "Text({text:?})"),
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}

impl SqliteInsert {
    /// The statement that adds these messages in their order. There must be at least one, and no
    /// more than 5,461: SQLite binds at most 32,766 values to a statement, and one before 3.32 only
    /// 999, which are those of 166 messages.
    pub fn new(schema: &SqliteSchema, messages: &[Message]) -> Self {
        let sql = insert_sql(schema.tables(), messages.len());
        Self { sql, values: messages.iter().flat_map(values_of).collect() }
    }

    /// The statement, with one `?` for every value.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// The values, in the order of the statement.
    pub fn values(&self) -> &[SqlValue] {
        &self.values
    }
}

/// The database sets all other columns.
pub(crate) fn insert_sql(tables: &Tables, rows: usize) -> String {
    format!(
        "INSERT INTO {} (message_id, topic, message_key, partition_no, headers, payload) VALUES {}",
        tables.outbox,
        vec!["(?, ?, ?, ?, ?, ?)"; rows].join(", "),
    )
}

fn values_of(message: &Message) -> [SqlValue; 6] {
    let bytes = |bytes: Option<&[u8]>| {
        bytes.map_or(SqlValue::Null, |bytes| SqlValue::Bytes(bytes.to_vec()))
    };
    [
        SqlValue::Bytes(message.id().as_bytes().to_vec()),
        SqlValue::Text(message.topic().to_owned()),
        bytes(message.key()),
        message.partition().map_or(SqlValue::Null, |partition| SqlValue::Int(partition.into())),
        headers::encode(message.headers()).map_or(SqlValue::Null, SqlValue::Bytes),
        bytes(message.payload()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_its_mark() {
        let message = Message::builder("t").tombstone().partition(3).build().unwrap();
        let insert = SqliteInsert::new(&SqliteSchema::new(), &[message.clone(), message.clone()]);
        assert_eq!(insert.sql().matches('?').count(), insert.values().len());
        let expected = [
            SqlValue::Bytes(message.id().as_bytes().to_vec()),
            SqlValue::Text("t".to_owned()),
            SqlValue::Null,
            SqlValue::Int(3),
            SqlValue::Null,
            SqlValue::Null,
        ];
        assert_eq!(insert.values()[..6], expected);
    }

    #[test]
    fn debug_shows_no_content() {
        let message = Message::builder("t").key("secret").payload("secret").build().unwrap();
        let insert = SqliteInsert::new(&SqliteSchema::new(), &[message]);
        assert!(!format!("{insert:?}").contains("115"));
    }
}
