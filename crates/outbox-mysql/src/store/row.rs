//! A row of the outbox as it is read.

use std::sync::Arc;
use std::time::Duration;

use outbox_core::Message;
use outbox_core::delivery::{Delivery, Failure, Lane, Position, RowId, RowState};
use outbox_core::message::MessageId;
use outbox_core::store::{Claimed, StoreError, StoreErrorKind, Swept, Unreadable};

use crate::headers;
use crate::text::{Columns, bytes, fit, id, number, signed};

/// The class of the failure of a row that holds no valid message.
const UNREADABLE: &str = "unreadable";

/// Bytes of the content of a row; `alias` is the table's.
pub(super) fn size(alias: &str) -> String {
    format!(
        "COALESCE(OCTET_LENGTH({alias}.payload), 0) + COALESCE(OCTET_LENGTH({alias}.headers), 0) \
         + COALESCE(OCTET_LENGTH({alias}.message_key), 0)"
    )
}

/// The recorded state of a row in one column: null as long as nothing was ever recorded, otherwise
/// attempts, revision, held, wait and retried, with commas between them.
///
/// One column, because each costs both sides something for every message, and nearly all are new.
/// Of a row that is passed all columns are null, and so is every part of the condition: nothing more is
/// worked out for it.
/// The wait is what remains by the database's clock, in microseconds.
pub(super) fn state(alias: &str) -> String {
    format!(
        "IF({alias}.attempts > 0 OR {alias}.revision > 0 OR {alias}.held_at IS NOT NULL \
           OR {alias}.available_at IS NOT NULL OR {alias}.retried <> 0, \
         CONCAT_WS(',', {alias}.attempts, {alias}.revision, {alias}.held_at IS NOT NULL, \
           IF({alias}.available_at IS NULL, 0, \
             GREATEST(0, TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), {alias}.available_at))), \
           {alias}.retried <> 0), NULL)"
    )
}

pub(super) fn read_state(row: &impl Columns, column: usize) -> Result<RowState, StoreError> {
    let Some(recorded) = bytes(row, column)? else { return Ok(RowState::new(0, 0)) };
    parse_state(recorded).ok_or_else(|| StoreErrorKind::Other.into())
}

fn parse_state(recorded: &[u8]) -> Option<RowState> {
    let mut numbers = std::str::from_utf8(recorded).ok()?.split(',').map(str::parse::<u64>);
    let mut next = || numbers.next()?.ok();
    let state = RowState::new(next()?.try_into().ok()?, next()?.try_into().ok()?)
        .with_held(next()? == 1)
        .with_wait(Duration::from_micros(next()?))
        .with_retried(next()? == 1);
    numbers.next().is_none().then_some(state)
}

/// The columns of a whole row after its id, in the order that [`read`] expects; content only when
/// it is within `limit` bytes.
pub(super) fn columns(alias: &str, limit: Option<usize>) -> String {
    let size = size(alias);
    // The size is worked out once for each row. What is sent of one that does not fit, because
    // neither of its two contents alone is too large, is not read.
    let content = |column: &str| match limit {
        Some(limit) => {
            format!("IF(OCTET_LENGTH({alias}.{column}) > {limit}, NULL, {alias}.{column})")
        }
        None => format!("{alias}.{column}"),
    };
    let too_large = match limit {
        Some(limit) => format!("IF({size} > {limit}, {size}, NULL)"),
        None => "NULL".to_owned(),
    };
    format!(
        "{alias}.lane, {too_large}, {alias}.message_id, {alias}.topic, \
         {alias}.message_key, {alias}.partition_no, {headers}, {payload}, \
         TIMESTAMPDIFF(MICROSECOND, {alias}.created_at, UTC_TIMESTAMP(6)), {state}",
        headers = content("headers"),
        payload = content("payload"),
        state = state(alias),
    )
}

/// A place: id, lane and size, as the first, second and third column.
pub(super) fn read_swept(row: &impl Columns) -> Result<Swept, StoreError> {
    Ok(Swept::new(Position(number(row, 0)?), Lane(fit(row, 1)?), fit(row, 2)?))
}

/// The topic of the row that was read last: messages of one answer share the name, which is in the
/// processor's caches then.
#[derive(Debug, Default)]
pub(crate) struct LastTopic(Option<Arc<str>>);

impl LastTopic {
    fn named(&mut self, name: &str) -> Arc<str> {
        match &self.0 {
            Some(last) if **last == *name => Arc::clone(last),
            _ => Arc::clone(self.0.insert(name.into())),
        }
    }
}

/// A whole row: its id, then [`columns`].
pub(super) fn read(row: &impl Columns, topics: &mut LastTopic) -> Result<Claimed, StoreError> {
    let position = Position(number(row, 0)?);
    let lane = Lane(fit(row, 1)?);
    if bytes(row, 2)?.is_some() {
        return Ok(Swept::new(position, lane, fit(row, 2)?).into());
    }
    let age = Duration::from_micros(number(row, 9)?);
    let state = read_state(row, 10)?;
    let why = match read_message(row, 3, topics) {
        Ok(message) => {
            let delivery = Delivery::new(position, lane, message);
            return Ok(delivery.with_state(state).with_age(age).into());
        }
        Err(why) => why,
    };
    let message_id = MessageId::from_bytes(id(row, 3)?);
    let topic = String::from_utf8_lossy(bytes(row, 4)?.unwrap_or_default());
    let key = bytes(row, 5)?.map(<[u8]>::to_vec);
    let id = RowId::new(position, message_id);
    let unreadable = Unreadable::new(id, lane, Failure::new(UNREADABLE, why));
    Ok(unreadable.with_destination(topic, key).with_state(state, age).into())
}

/// The message in the six columns from `first` on: message id, topic, key, partition, headers,
/// payload. Otherwise, what is wrong with it.
pub(crate) fn read_message(
    row: &impl Columns,
    first: usize,
    topics: &mut LastTopic,
) -> Result<Message, &'static str> {
    let column = |offset| bytes(row, first + offset).map_err(|_| "column is missing");
    let message_id = id(row, first).map_err(|_| "message id is not 16 bytes")?;
    let topic = column(1)?.and_then(|topic| std::str::from_utf8(topic).ok());
    let topic = topics.named(topic.ok_or("topic is not text")?);
    let mut message = Message::builder(topic).id(MessageId::from_bytes(message_id));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recorded_state_is_five_numbers() {
        let state = RowState::new(3, 2).with_held(true).with_wait(Duration::from_micros(70));
        assert_eq!(parse_state(b"3,2,1,70,0"), Some(state));
        assert_eq!(parse_state(b"0,0,0,0,1"), Some(RowState::new(0, 0).with_retried(true)));
        for bad in [&b"3,2,1,70"[..], b"3,2,1,70,0,0", b"3,2,1,-70,0", b""] {
            assert_eq!(parse_state(bad), None);
        }
    }
}
