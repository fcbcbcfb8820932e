//! What arrived.

use outbox_core::message::header;
use outbox_core::{Delivery, MessageId};

/// A message as it arrived at a broker.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Published {
    /// The topic.
    pub topic: String,
    /// The partition.
    pub partition: i32,
    /// The offset in the partition.
    pub offset: i64,
    /// The message id, as header [`header::ID`] carries it.
    pub message_id: MessageId,
    /// The key.
    pub key: Option<Vec<u8>>,
    /// The payload; `None` is a tombstone.
    pub payload: Option<Vec<u8>>,
    /// All headers in order, [`header::ID`] included.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Published {
    /// A record that was read back from a broker.
    ///
    /// # Panics
    ///
    /// When no header [`header::ID`] holds a message id: such a record is not from an outbox.
    pub fn new(
        topic: impl Into<String>,
        (partition, offset): (i32, i64),
        key: Option<Vec<u8>>,
        payload: Option<Vec<u8>>,
        headers: Vec<(String, Option<Vec<u8>>)>,
    ) -> Self {
        let id = headers.iter().find(|(name, _)| name == header::ID);
        let id =
            id.and_then(|(_, value)| std::str::from_utf8(value.as_deref()?).ok()?.parse().ok());
        let Some(message_id) = id else {
            let names: Vec<_> = headers.iter().map(|(name, _)| name).collect();
            panic!(
                "no header `{}` holds a message id, as text: the broker adds it to each message, \
                 and it is read back with the other headers; there are {names:?}",
                header::ID
            );
        };
        Self { topic: topic.into(), partition, offset, message_id, key, payload, headers }
    }

    /// `delivery` as it arrives: its id first, then the mark of a retried dead letter, then its
    /// own headers.
    pub(super) fn of(delivery: &Delivery, partition: i32, offset: i64) -> Self {
        let message = &delivery.message;
        let text = |text: &str| Some(text.as_bytes().to_vec());
        let mut headers = vec![(header::ID.to_owned(), text(&message.id().to_string()))];
        if delivery.state.retried {
            headers.push((header::RETRIED.to_owned(), text("true")));
        }
        let own = message.headers().iter();
        headers.extend(own.map(|(name, value)| (name.to_owned(), value.map(<[u8]>::to_vec))));
        Self {
            topic: message.topic().to_owned(),
            partition,
            offset,
            message_id: message.id(),
            key: message.key().map(<[u8]>::to_vec),
            payload: message.payload().map(<[u8]>::to_vec),
            headers,
        }
    }

    /// The value of the first header of this name; `None` when absent or null.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        let named = self.headers.iter().find(|(other, _)| other == name);
        named.and_then(|(_, value)| value.as_deref())
    }
}
