//! A row of the outbox as it is read.

use std::time::Duration;

use outbox_core::Message;
use outbox_core::delivery::{Delivery, Failure, Lane, Position, RowId, RowState};
use outbox_core::message::MessageId;
use outbox_core::store::{Claimed, StoreError, Swept, Unreadable};
use sqlx::sqlite::SqliteRow;

use crate::headers;
use crate::text::{NOW, bytes, fit, id, number, signed};

/// The only lane: one writer at a time leaves nothing to share among several relays.
pub(super) const LANE: Lane = Lane(0);

/// The class of the failure of a row that holds no valid message.
const UNREADABLE: &str = "unreadable";

/// Bytes of the content of a row `o`. `octet_length` reads no content.
pub(super) const SIZE: &str = "COALESCE(octet_length(o.payload), 0) \
     + COALESCE(octet_length(o.headers), 0) + COALESCE(octet_length(o.message_key), 0)";

/// A position as SQLite counts: rows above its largest number do not exist.
pub(super) fn at(position: Position) -> i64 {
    i64::try_from(position.0).unwrap_or(i64::MAX)
}

/// The recorded state of a row `o`: attempts, revision, held, wait, retried.
///
/// The wait is what remains by SQLite's clock, in microseconds.
pub(super) fn state() -> String {
    format!(
        "o.attempts, o.revision, o.held_at IS NOT NULL, \
         MAX(0, COALESCE(o.available_at, 0) - {NOW}), o.retried"
    )
}

/// A count that was written around the API may be any number, and must not fail the whole answer.
pub(super) fn count(row: &SqliteRow, column: usize) -> Result<u32, StoreError> {
    Ok(u32::try_from(number(row, column)?).unwrap_or(u32::MAX))
}

pub(super) fn read_state(row: &SqliteRow, first: usize) -> Result<RowState, StoreError> {
    Ok(RowState::new(count(row, first)?, count(row, first + 1)?)
        .with_held(number(row, first + 2)? == 1)
        .with_wait(Duration::from_micros(number(row, first + 3)?))
        .with_retried(number(row, first + 4)? == 1))
}

/// The columns of a whole row `o`, in the order that [`read`] expects; the content only when
/// `fits` holds.
pub(super) fn columns(fits: &str) -> String {
    let state = state();
    format!(
        "o.id, {fits}, {SIZE}, o.message_id, o.topic, o.message_key, o.partition_no, \
         IIF({fits}, o.headers, NULL), IIF({fits}, o.payload, NULL), {NOW} - o.created_at, {state}"
    )
}

/// A place: id and size, as the first and second column.
pub(super) fn read_swept(row: &SqliteRow) -> Result<Swept, StoreError> {
    Ok(Swept::new(Position(number(row, 0)?), LANE, fit(row, 1)?))
}

/// A whole row.
pub(super) fn read(row: &SqliteRow) -> Result<Claimed, StoreError> {
    let position = Position(number(row, 0)?);
    if number(row, 1)? == 0 {
        return Ok(Swept::new(position, LANE, fit(row, 2)?).into());
    }
    let age = Duration::from_micros(number(row, 9)?);
    let state = read_state(row, 10)?;
    let why = match read_message(row, 3) {
        Ok(message) => {
            let delivery = Delivery::new(position, LANE, message);
            return Ok(delivery.with_state(state).with_age(age).into());
        }
        Err(why) => why,
    };
    let message_id = MessageId::from_bytes(id(row, 3)?);
    let topic = String::from_utf8_lossy(bytes(row, 4)?.unwrap_or_default());
    let key = bytes(row, 5)?.map(<[u8]>::to_vec);
    let id = RowId::new(position, message_id);
    let unreadable = Unreadable::new(id, LANE, Failure::new(UNREADABLE, why));
    Ok(unreadable.with_destination(topic, key).with_state(state, age).into())
}

/// The message in the six columns from `first` on: message id, topic, key, partition, headers,
/// payload. Otherwise, what is wrong with it.
pub(crate) fn read_message(row: &SqliteRow, first: usize) -> Result<Message, &'static str> {
    let column = |offset| bytes(row, first + offset).map_err(|_| "column is missing");
    let message_id = id(row, first).map_err(|_| "message id is not 16 bytes")?;
    let topic = column(1)?.and_then(|topic| std::str::from_utf8(topic).ok());
    let mut message =
        Message::builder(topic.ok_or("topic is not text")?).id(MessageId::from_bytes(message_id));
    if let Some(key) = column(2)? {
        message = message.key(key);
    }
    if let Some(partition) = signed(row, first + 3).map_err(|_| "partition is not a number")? {
        message =
            message.partition(i32::try_from(partition).map_err(|_| "partition is too large")?);
    }
    if let Some(stored) = column(4)? {
        for (name, value) in headers::decode(stored).ok_or("headers are malformed")? {
            message = match value {
                Some(value) => message.header(name, value),
                None => message.null_header(name),
            };
        }
    }
    message = match column(5)? {
        Some(payload) => message.payload(payload),
        None => message.tombstone(),
    };
    message.build().map_err(|error| {
        use outbox_core::message::MessageErrorKind as K;
        match error.kind() {
            K::Topic => "topic name is invalid",
            K::Header => "header name is invalid or reserved",
            K::Partition => "partition is negative",
            _ => "message is invalid",
        }
    })
}
