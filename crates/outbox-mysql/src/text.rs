//! Statements as text: one packet, many statements, values inlined.
//!
//! The relay speaks the text protocol, because its lists differ from call to call: every new
//! prepared text costs a round trip and, without TCP_NODELAY in sqlx, up to 40 ms. Only integers
//! and hexadecimal literals are ever inlined; they mean the same under every SQL mode.

use std::fmt::{self, Display, Write as _};

use futures_util::TryStreamExt;
use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::mysql::MySqlRow;
use sqlx::{AssertSqlSafe, Either, MySqlConnection, Row};

use crate::error::store_error;

/// The longest `IN` list: longer ones become temporary tables on MariaDB
/// (`in_predicate_conversion_threshold`).
pub(crate) const LIST: usize = 900;

/// What one statement of a packet answered.
#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) rows: Vec<MySqlRow>,
    /// Rows that were matched: sqlx sets `CLIENT_FOUND_ROWS`.
    pub(crate) affected: u64,
}

/// Runs statements, separated by semicolons, in one packet. The first error ends the packet and
/// leaves a transaction open that the packet began: the caller must close the connection then.
pub(crate) async fn run(
    connection: &mut MySqlConnection,
    packet: String,
) -> Result<Vec<Answer>, StoreError> {
    let mut answers: Vec<Answer> = Vec::new();
    let affected = each(connection, packet, |statement, row| {
        answers.resize_with(statement + 1, Answer::default);
        answers[statement].rows.push(row);
        Ok(())
    });
    let affected = affected.await?;
    answers.resize_with(affected.len(), Answer::default);
    for (answer, affected) in answers.iter_mut().zip(affected) {
        answer.affected = affected;
    }
    Ok(answers)
}

/// The same, with what becomes of each row, given the number of its statement. A page's rows are
/// megabytes: kept until the last one is there, they have left the processor's caches when they are
/// read. Gives how many rows each statement affected.
pub(crate) async fn each(
    connection: &mut MySqlConnection,
    packet: String,
    mut on_row: impl FnMut(usize, MySqlRow) -> Result<(), StoreError> + Send,
) -> Result<Vec<u64>, StoreError> {
    // Table names are checked by `Tables`, everything else is a number or a hexadecimal literal.
    let mut replies = sqlx::raw_sql(AssertSqlSafe(packet)).fetch_many(connection);
    let mut affected = Vec::new();
    while let Some(reply) = replies.try_next().await.map_err(store_error)? {
        match reply {
            Either::Right(row) => on_row(affected.len(), row)?,
            Either::Left(done) => affected.push(done.rows_affected()),
        }
    }
    Ok(affected)
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

const PIECE: usize = 16;
const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// Bytes as a literal that no SQL mode and no character set changes.
#[derive(Clone, Copy)]
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // By pieces: formatting byte by byte shows in the profile of a drain.
        f.write_str("x'")?;
        for piece in self.0.chunks(PIECE) {
            let mut digits = [0; 2 * PIECE];
            for (pair, byte) in digits.chunks_exact_mut(2).zip(piece) {
                pair[0] = DIGITS[usize::from(byte >> 4)];
                pair[1] = DIGITS[usize::from(byte & 15)];
            }
            f.write_str(std::str::from_utf8(&digits[..2 * piece.len()]).map_err(|_| fmt::Error)?)?;
        }
        f.write_char('\'')
    }
}

/// A row of the text protocol: every value is its bytes, or null.
pub(crate) trait Columns {
    /// The bytes of a column, by ordinal.
    fn bytes(&self, column: usize) -> Result<Option<&[u8]>, StoreError>;
}

impl Columns for MySqlRow {
    fn bytes(&self, column: usize) -> Result<Option<&[u8]>, StoreError> {
        // Unchecked: whatever the type of the column, its value is text.
        self.try_get_unchecked(column).map_err(store_error)
    }
}

/// The bytes of a column.
pub(crate) fn bytes(row: &impl Columns, column: usize) -> Result<Option<&[u8]>, StoreError> {
    row.bytes(column)
}

/// A whole number; null is 0.
pub(crate) fn number(row: &impl Columns, column: usize) -> Result<u64, StoreError> {
    Ok(signed(row, column)?.unwrap_or(0).try_into().unwrap_or(0))
}

/// A whole number that may be negative or null.
pub(crate) fn signed(row: &impl Columns, column: usize) -> Result<Option<i128>, StoreError> {
    let Some(text) = bytes(row, column)? else { return Ok(None) };
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    let mut value = 0i128;
    for digit in digits {
        if !digit.is_ascii_digit() || digits.len() > 20 {
            return Err(StoreErrorKind::Other.into());
        }
        value = value * 10 + i128::from(digit - b'0');
    }
    Ok(Some(if negative { -value } else { value }))
}

/// A number that fits `T`.
pub(crate) fn fit<T: TryFrom<u64>>(row: &impl Columns, column: usize) -> Result<T, StoreError> {
    T::try_from(number(row, column)?).map_err(|_| StoreErrorKind::Other.into())
}

/// Exactly 16 bytes: a worker or a message id.
pub(crate) fn id(row: &impl Columns, column: usize) -> Result<[u8; 16], StoreError> {
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
