//! What the application writes: a [`Message`], built once and never changed afterwards.

mod codec;
mod headers;
mod id;
mod limits;

use std::fmt;
use std::sync::Arc;

pub use self::headers::{Headers, header};
pub use self::id::{MessageId, ParseMessageIdError};
pub use self::limits::Limits;

/// A message for one topic, with an optional key, a payload or a tombstone, and headers.
///
/// First appearances of one `(topic, key)` on the broker follow commit order if every writer of the key
/// locks as [`Outbox`](crate::Outbox) says; messages without a key have no order. Cloning copies the
/// bytes. `Debug` prints sizes, never the key or the payload.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    id: MessageId,
    topic: Arc<str>,
    key: Option<Vec<u8>>,
    payload: Option<Vec<u8>>,
    headers: Headers,
    partition: Option<i32>,
}

impl Message {
    /// Starts a message for `topic`. Mistakes are reported by [`MessageBuilder::build`].
    ///
    /// Messages that are made from clones of one `Arc<str>` share the name of their topic.
    pub fn builder(topic: impl Into<Arc<str>>) -> MessageBuilder {
        MessageBuilder {
            id: None,
            topic: topic.into(),
            key: None,
            payload: Payload::Missing,
            headers: Vec::new(),
            partition: None,
        }
    }

    /// The id that every appearance of this message carries, as header [`header::ID`].
    pub fn id(&self) -> MessageId {
        self.id
    }

    /// The topic this message goes to.
    pub fn topic(&self) -> &str {
        &self.topic
    }

    /// The key, compared byte for byte. `None` and `Some(b"")` are different: an empty key is a
    /// key like any other, a missing one means "no order".
    pub fn key(&self) -> Option<&[u8]> {
        self.key.as_deref()
    }

    /// The payload; `None` is a tombstone.
    pub fn payload(&self) -> Option<&[u8]> {
        self.payload.as_deref()
    }

    /// The headers, in the order in which they were added.
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    pub(crate) fn headers_mut(&mut self) -> &mut Headers {
        &mut self.headers
    }

    /// The explicit partition, if one was asked for.
    pub fn partition(&self) -> Option<i32> {
        self.partition
    }

    /// The bytes that count against [`Limits::max_message_bytes`]: key, payload, header names and
    /// values, and an allowance for the framing of the record and its headers.
    pub fn size(&self) -> usize {
        // Kafka's framing of a batch and of a record, `outbox-id` and `outbox-retried`.
        const RECORD_OVERHEAD: usize = 160;
        // The lengths of a header's name and value, as variable-length integers.
        const HEADER_OVERHEAD: usize = 6;
        RECORD_OVERHEAD
            + self.key.as_ref().map_or(0, Vec::len)
            + self.payload.as_ref().map_or(0, Vec::len)
            + self.headers.size()
            + HEADER_OVERHEAD * self.headers.len()
    }

    /// Deserialises the payload from JSON.
    ///
    /// # Errors
    ///
    /// [`MessageErrorKind::Json`] when the payload is a tombstone or does not fit `T`.
    #[cfg(feature = "json")]
    pub fn payload_json<'a, T: serde::Deserialize<'a>>(&'a self) -> Result<T, MessageError> {
        serde_json::from_slice(self.payload().unwrap_or_default())
            .map_err(|error| MessageError::with_source(MessageErrorKind::Json, error))
    }
}

impl fmt::Debug for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("id", &self.id)
            .field("topic", &self.topic)
            .field("key_bytes", &self.key.as_ref().map(Vec::len))
            .field("payload_bytes", &self.payload.as_ref().map(Vec::len))
            .field("headers", &self.headers)
            .field("partition", &self.partition)
            .finish()
    }
}

/// Builds a [`Message`]; made by [`Message::builder`].
#[must_use = "a builder does nothing until `build` is called"]
pub struct MessageBuilder {
    id: Option<MessageId>,
    topic: Arc<str>,
    key: Option<Vec<u8>>,
    payload: Payload,
    headers: Vec<(String, Option<Vec<u8>>)>,
    partition: Option<i32>,
}

enum Payload {
    Missing,
    Tombstone,
    Bytes(Vec<u8>),
    #[cfg(feature = "json")]
    Failed(serde_json::Error),
}

impl MessageBuilder {
    /// Sets the key: messages of one topic and key keep their order.
    pub fn key(mut self, key: impl Into<Vec<u8>>) -> Self {
        self.key = Some(key.into());
        self
    }

    /// Removes the key: the message has no order. This is the default.
    pub fn no_key(mut self) -> Self {
        self.key = None;
        self
    }

    /// Sets the payload to these bytes.
    ///
    /// How large it may be is checked when the message is added: the whole message by
    /// [`Limits::max_message_bytes`], 1,000,000 bytes by default, and the payload by the store, which
    /// refuses more than 15 MiB.
    pub fn payload(mut self, payload: impl Into<Vec<u8>>) -> Self {
        self.payload = Payload::Bytes(payload.into());
        self
    }

    /// Sets the payload to `value` as JSON, and `content-type` unless it is set already.
    #[cfg(feature = "json")]
    pub fn json<T: serde::Serialize + ?Sized>(mut self, value: &T) -> Self {
        self.payload = match serde_json::to_vec(value) {
            Ok(bytes) => Payload::Bytes(bytes),
            Err(error) => Payload::Failed(error),
        };
        if !self.headers.iter().any(|(name, _)| name == header::CONTENT_TYPE) {
            self = self.header(header::CONTENT_TYPE, "application/json");
        }
        self
    }

    /// Makes this a tombstone: a message whose payload is null.
    pub fn tombstone(mut self) -> Self {
        self.payload = Payload::Tombstone;
        self
    }

    /// Appends a header. A name may appear several times; the order is kept.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.headers.push((name.into(), Some(value.into())));
        self
    }

    /// Appends a header whose value is null.
    pub fn null_header(mut self, name: impl Into<String>) -> Self {
        self.headers.push((name.into(), None));
        self
    }

    /// Asks for a partition. It must be a function of the key, or order per key is lost.
    pub fn partition(mut self, partition: i32) -> Self {
        self.partition = Some(partition);
        self
    }

    /// Sets the id instead of generating a UUIDv7. Whoever sets an id answers for its uniqueness.
    pub fn id(mut self, id: MessageId) -> Self {
        self.id = Some(id);
        self
    }

    /// Checks everything and builds the message.
    ///
    /// # Errors
    ///
    /// The first mistake found: [`MessageErrorKind::Topic`], [`MessageErrorKind::Payload`] when
    /// neither a payload nor a tombstone was given, [`MessageErrorKind::Header`],
    /// [`MessageErrorKind::Partition`] or [`MessageErrorKind::Json`].
    pub fn build(self) -> Result<Message, MessageError> {
        check_topic(&self.topic)?;
        let payload = match self.payload {
            Payload::Missing => return Err(MessageErrorKind::Payload.into()),
            Payload::Tombstone => None,
            Payload::Bytes(bytes) => Some(bytes),
            #[cfg(feature = "json")]
            Payload::Failed(error) => {
                return Err(MessageError::with_source(MessageErrorKind::Json, error));
            }
        };
        if self.partition.is_some_and(|partition| partition < 0) {
            return Err(MessageErrorKind::Partition.into());
        }
        let mut headers = Headers::default();
        for (name, value) in self.headers {
            headers.append(name, value)?;
        }
        Ok(Message {
            id: self.id.unwrap_or_else(MessageId::generate),
            topic: self.topic,
            key: self.key,
            payload,
            headers,
            partition: self.partition,
        })
    }
}

impl fmt::Debug for MessageBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MessageBuilder").field("topic", &self.topic).finish_non_exhaustive()
    }
}

/// Kafka's own rule, checked when the message is built so that the caller's transaction fails and
/// not the relay at night: librdkafka enqueues any name without complaint.
fn check_topic(topic: &str) -> Result<(), MessageError> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let valid = (1..=249).contains(&topic.len())
        && topic.bytes().all(legal)
        && !matches!(topic, "." | "..");
    if valid { Ok(()) } else { Err(MessageErrorKind::Topic.into()) }
}

/// A message that cannot be built, decoded or added.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct MessageError {
    kind: MessageErrorKind,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl MessageError {
    /// An error of this kind, caused by `source`.
    pub fn with_source(
        kind: MessageErrorKind,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, source: Some(source.into()) }
    }

    /// What is wrong with the message.
    pub fn kind(&self) -> MessageErrorKind {
        self.kind
    }
}

impl From<MessageErrorKind> for MessageError {
    fn from(kind: MessageErrorKind) -> Self {
        Self { kind, source: None }
    }
}

/// What is wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum MessageErrorKind {
    /// The topic is not 1 to 249 characters of `A-Z a-z 0-9 . _ -`, or is `.` or `..`.
    #[error("topic name is not 1 to 249 characters of A-Z a-z 0-9 . _ -")]
    Topic,
    /// The key is longer than [`Limits::max_key_bytes`].
    #[error("key is too long")]
    Key,
    /// Neither a payload nor a tombstone was given.
    #[error("message has neither a payload nor a tombstone")]
    Payload,
    /// A header name is not 1 to 128 visible ASCII characters, begins with `outbox-`, or there are
    /// too many headers or too many bytes of them.
    #[error("header name is invalid or reserved, or there are too many headers")]
    Header,
    /// The partition is negative.
    #[error("partition is negative")]
    Partition,
    /// The message is larger than [`Limits::max_message_bytes`].
    #[error("message is too large")]
    TooLarge,
    /// The payload could not be written or read as JSON.
    #[error("payload is not valid JSON for this type")]
    Json,
    /// The bytes are not a message.
    #[error("bytes do not decode to a message")]
    Malformed,
    /// The topic is not in the allow-list of the outbox.
    #[error("topic is not allowed by the limits of this outbox")]
    TopicNotAllowed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_without_payload_or_tombstone_is_refused() {
        let error = Message::builder("orders").key("1").build().unwrap_err();
        assert_eq!(error.kind(), MessageErrorKind::Payload);
        assert!(Message::builder("orders").tombstone().build().unwrap().payload().is_none());
    }

    #[test]
    fn topic_names_follow_kafkas_rule() {
        for bad in ["", ".", "..", "a b", "x/y", "é", &"x".repeat(250)] {
            let error = Message::builder(bad).payload("").build().unwrap_err();
            assert_eq!(error.kind(), MessageErrorKind::Topic, "{bad}");
        }
        for good in ["a", "orders.placed", "A_b-9.", &"x".repeat(249)] {
            Message::builder(good).payload("").build().unwrap();
        }
    }

    #[test]
    fn reserved_and_malformed_headers_are_refused() {
        for bad in ["outbox-id", "outbox-x", "", "a b", "a\n", &"x".repeat(129)] {
            let error = Message::builder("t").payload("").header(bad, "v").build().unwrap_err();
            assert_eq!(error.kind(), MessageErrorKind::Header, "{bad:?}");
        }
    }

    #[test]
    fn headers_repeat_in_order_and_may_be_null() {
        let message = Message::builder("t")
            .payload("")
            .header("a", "1")
            .null_header("b")
            .header("a", "2")
            .build()
            .unwrap();
        let all: Vec<_> = message.headers().iter().collect();
        assert_eq!(all, [("a", Some(&b"1"[..])), ("b", None), ("a", Some(&b"2"[..]))]);
    }

    #[test]
    fn debug_shows_sizes_and_no_content() {
        let message = Message::builder("t")
            .key("secret-key")
            .payload("secret-payload")
            .header("h", "secret-value")
            .build()
            .unwrap();
        assert!(!format!("{message:?}").contains("secret"));
    }

    #[test]
    fn an_explicit_partition_is_not_negative() {
        let error = Message::builder("t").payload("").partition(-1).build().unwrap_err();
        assert_eq!(error.kind(), MessageErrorKind::Partition);
    }

    #[cfg(feature = "json")]
    #[test]
    fn json_sets_the_content_type_and_reads_back() {
        let message = Message::builder("t").json(&[1, 2, 3]).build().unwrap();
        assert_eq!(message.headers().get(header::CONTENT_TYPE), Some(&b"application/json"[..]));
        assert_eq!(message.payload_json::<Vec<u8>>().unwrap(), [1, 2, 3]);
    }
}
