//! The statement that adds messages, and its values.

use outbox_core::Message;

use crate::headers;
use crate::schema::MySqlSchema;
use crate::tables::Tables;

/// The statement that adds messages as data, for those who cannot hand a sqlx connection to
/// [`MySqlOutbox`](crate::MySqlOutbox): sea-orm, diesel, another version of sqlx.
///
/// Run [`sql`](Self::sql) with [`values`](Self::values) inside your transaction. Nothing here can
/// tell whether there is one: outside of it, the message is published at once. Nor are the limits
/// of an `Outbox` checked; call [`Limits::check`](outbox_core::message::Limits::check) yourself.
///
/// ```
/// use outbox_core::Message;
/// use outbox_mysql::{MySqlInsert, MySqlSchema};
///
/// # fn main() -> Result<(), outbox_core::message::MessageError> {
/// let message = Message::builder("orders").key("7").payload("{}").build()?;
/// let insert = MySqlInsert::new(&MySqlSchema::new(), &[message]);
/// assert!(insert.sql().starts_with("INSERT INTO outbox (message_id,"));
/// assert_eq!(insert.values().len(), 6);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[must_use]
pub struct MySqlInsert {
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
    /// ASCII text.
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

impl MySqlInsert {
    /// The statement that adds these messages in their order. There must be at least one, and no
    /// more than 10,922: both servers take at most 65,535 values for a prepared statement.
    pub fn new(schema: &MySqlSchema, messages: &[Message]) -> Self {
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

/// The database sets all other columns, the lane above all.
pub(crate) fn insert_sql(tables: &Tables, rows: usize) -> String {
    format!(
        "INSERT INTO {} (message_id, topic, message_key, partition_no, headers, payload) VALUES {}",
        tables.outbox,
        vec!["(?, ?, ?, ?, ?, ?)"; rows].join(", "),
    )
}

/// The same statement, which fails outside of a transaction: the revision of the first row, 0 within
/// one, is out of range there (1690), under every SQL mode. With autocommit off the INSERT begins
/// one itself. Only MariaDB knows the variable.
///
/// Not `INSERT .. SELECT .. WHERE`, which locks the counter of ids until the statement's end.
pub(crate) fn guarded_insert_sql(tables: &Tables, rows: usize) -> String {
    format!(
        "INSERT INTO {} (message_id, topic, message_key, partition_no, headers, payload, revision) \
         VALUES (?, ?, ?, ?, ?, ?, (1 - @@in_transaction) * 2 * ~0){}",
        tables.outbox,
        ", (?, ?, ?, ?, ?, ?, 0)".repeat(rows.saturating_sub(1)),
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
    fn every_value_has_its_mark_and_the_lane_is_left_to_the_database() {
        let message = Message::builder("t").tombstone().partition(3).build().unwrap();
        let insert = MySqlInsert::new(&MySqlSchema::new(), &[message.clone(), message.clone()]);
        assert_eq!(insert.sql().matches('?').count(), insert.values().len());
        assert!(!insert.sql().contains("lane"));
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
        let insert = MySqlInsert::new(&MySqlSchema::new(), &[message]);
        assert!(!format!("{insert:?}").contains("115"));
    }
}
