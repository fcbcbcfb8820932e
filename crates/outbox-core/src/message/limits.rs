//! What a message may be, checked at `add`.

use std::sync::Arc;

use super::{Message, MessageError, MessageErrorKind};

/// Limits that every message must keep when it is added, so that the caller's transaction fails
/// and not the relay at night.
///
/// They must not be wider than the broker's: see [`crate::broker::BrokerProfile`].
#[derive(Debug, Clone)]
#[must_use]
pub struct Limits {
    max_message_bytes: usize,
    max_key_bytes: usize,
    max_headers: usize,
    max_header_bytes: usize,
    topics: Option<Arc<[String]>>,
}

impl Default for Limits {
    /// 1,000,000 bytes a message (librdkafka's default `message.max.bytes`), keys of 1,024 bytes
    /// (the column's width), 64 headers, 16,384 bytes of headers, any topic.
    fn default() -> Self {
        Self {
            max_message_bytes: 1_000_000,
            max_key_bytes: 1_024,
            max_headers: 64,
            max_header_bytes: 16_384,
            topics: None,
        }
    }
}

impl Limits {
    /// Sets the largest [`Message::size`] in bytes. Stores refuse payloads above 15 MiB whatever
    /// is set here.
    pub fn max_message_bytes(mut self, bytes: usize) -> Self {
        self.max_message_bytes = bytes;
        self
    }

    /// Sets the longest key in bytes; the SQL stores hold at most 1,024.
    pub fn max_key_bytes(mut self, bytes: usize) -> Self {
        self.max_key_bytes = bytes.min(1_024);
        self
    }

    /// Sets the largest number of headers and the largest sum of their names and values in bytes. The
    /// SQL stores hold 65,536 bytes of JSON, which the default always fits.
    pub fn max_headers(mut self, count: usize, bytes: usize) -> Self {
        self.max_headers = count;
        self.max_header_bytes = bytes;
        self
    }

    /// Allows only these topics: a typo then fails the caller's transaction.
    pub fn topics<T: Into<String>>(mut self, topics: impl IntoIterator<Item = T>) -> Self {
        self.topics = Some(topics.into_iter().map(Into::into).collect());
        self
    }

    /// Checks one message.
    ///
    /// # Errors
    ///
    /// [`MessageErrorKind::Key`], [`MessageErrorKind::Header`], [`MessageErrorKind::TooLarge`] or
    /// [`MessageErrorKind::TopicNotAllowed`].
    pub fn check(&self, message: &Message) -> Result<(), MessageError> {
        let headers = message.headers();
        let broken = if message.key().is_some_and(|key| key.len() > self.max_key_bytes) {
            MessageErrorKind::Key
        } else if headers.len() > self.max_headers || headers.size() > self.max_header_bytes {
            MessageErrorKind::Header
        } else if message.size() > self.max_message_bytes {
            MessageErrorKind::TooLarge
        } else if self.topics.as_ref().is_some_and(|t| !t.iter().any(|t| t == message.topic())) {
            MessageErrorKind::TopicNotAllowed
        } else {
            return Ok(());
        };
        Err(broken.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind_of(limits: &Limits, message: &Message) -> Option<MessageErrorKind> {
        limits.check(message).err().map(|error| error.kind())
    }

    #[test]
    fn each_limit_is_checked() {
        let message = Message::builder("t").key("k").payload("p").header("h", "v").build().unwrap();
        assert_eq!(kind_of(&Limits::default(), &message), None);
        let cases = [
            (Limits::default().max_message_bytes(10), MessageErrorKind::TooLarge),
            (Limits::default().max_key_bytes(0), MessageErrorKind::Key),
            (Limits::default().max_headers(0, 100), MessageErrorKind::Header),
            (Limits::default().max_headers(9, 1), MessageErrorKind::Header),
            (Limits::default().topics(["other"]), MessageErrorKind::TopicNotAllowed),
        ];
        for (limits, kind) in cases {
            assert_eq!(kind_of(&limits, &message), Some(kind));
        }
    }
}
