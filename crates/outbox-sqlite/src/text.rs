//! Statements as text: one packet, many statements, values inlined.
//!
//! A packet goes to the thread of its connection as a whole, so that a transaction within it waits
//! for no task of the application. Only integers and hexadecimal literals are ever inlined.

use std::fmt::{self, Display, Write as _};

use futures_util::TryStreamExt;
use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::sqlite::SqliteRow;
use sqlx::{AssertSqlSafe, Either, Row, SqliteConnection};

use crate::error::store_error;

/// Microseconds since 1970 in UTC, by SQLite's clock, which knows milliseconds. Written so that
/// every version of SQLite understands it: as a default it runs in other programs as well.
pub(crate) const NOW: &str =
    "CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000";

/// The longest `IN` list.
pub(crate) const LIST: usize = 900;

/// What one statement of a packet answered.
#[derive(Default)]
pub(crate) struct Answer {
    pub(crate) rows: Vec<SqliteRow>,
    /// Rows that were changed; meaningless unless the statement changes rows.
    pub(crate) affected: u64,
}

/// Runs statements, separated by semicolons, as one packet. The first error ends the packet and
/// leaves a transaction open that the packet began, and so does dropping the future: the caller
/// must close the connection then.
pub(crate) async fn run(
    connection: &mut SqliteConnection,
    packet: String,
) -> Result<Vec<Answer>, StoreError> {
    // Names are checked by `Tables`, everything else is a number or a hexadecimal literal.
    let mut replies = sqlx::raw_sql(AssertSqlSafe(packet)).fetch_many(connection);
    let mut answers = Vec::new();
    let mut rows = Vec::new();
    while let Some(reply) = replies.try_next().await.map_err(store_error)? {
        match reply {
            Either::Right(row) => rows.push(row),
            Either::Left(done) => {
                let rows = std::mem::take(&mut rows);
                answers.push(Answer { rows, affected: done.rows_affected() });
            }
        }
    }
    Ok(answers)
}

/// The next answer of a packet whose statements are known.
pub(crate) fn take(answers: &mut impl Iterator<Item = Answer>) -> Result<Answer, StoreError> {
    answers.next().ok_or_else(|| StoreErrorKind::Other.into())
}

/// Values with commas between them.
pub(crate) struct List<I>(pub(crate) I);

impl<I: IntoIterator<Item = T> + Clone, T: Display> Display for List<I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, value) in self.0.clone().into_iter().enumerate() {
            if index > 0 {
                f.write_char(',')?;
            }
            value.fmt(f)?;
        }
        Ok(())
    }
}

/// Bytes as a literal.
#[derive(Clone, Copy)]
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("x'")?;
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        f.write_char('\'')
    }
}

/// The bytes of a column, by ordinal and whatever its type: text is its UTF-8.
pub(crate) fn bytes(row: &SqliteRow, column: usize) -> Result<Option<&[u8]>, StoreError> {
    row.try_get_unchecked(column).map_err(store_error)
}

/// A whole number that may be negative or null.
pub(crate) fn signed(row: &SqliteRow, column: usize) -> Result<Option<i64>, StoreError> {
    row.try_get_unchecked(column).map_err(store_error)
}

/// A whole number; null is 0, and so is what is below it.
pub(crate) fn number(row: &SqliteRow, column: usize) -> Result<u64, StoreError> {
    Ok(signed(row, column)?.unwrap_or(0).try_into().unwrap_or(0))
}

/// A number that fits `T`.
pub(crate) fn fit<T: TryFrom<u64>>(row: &SqliteRow, column: usize) -> Result<T, StoreError> {
    T::try_from(number(row, column)?).map_err(|_| StoreErrorKind::Other.into())
}

/// Exactly 16 bytes: a worker or a message id.
pub(crate) fn id(row: &SqliteRow, column: usize) -> Result<[u8; 16], StoreError> {
    bytes(row, column)?.and_then(|b| b.try_into().ok()).ok_or_else(|| StoreErrorKind::Other.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_numbers_and_hexadecimal() {
        assert_eq!(List([1, 2, 3]).to_string(), "1,2,3");
        assert_eq!(List([Hex(b"\x00'"), Hex(b"")]).to_string(), "x'0027',x''");
    }
}
