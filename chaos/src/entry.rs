//! What a message says about itself: whose it is, and its place among that one's messages.

use std::str;

/// The aggregates whose messages go to the ordered topic.
pub(crate) const ORDERED: u32 = 1_000;
/// The aggregates after those, whose messages go to the topic that is deleted now and then.
pub(crate) const BESIDE: u32 = 50;

/// One message of an aggregate: its place in the order in which the aggregate's messages were
/// committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    pub(crate) aggregate: u32,
    pub(crate) sequence: u64,
}

impl Entry {
    /// Whether it belongs to the ordered topic.
    pub(crate) fn is_ordered(self) -> bool {
        self.aggregate < ORDERED
    }

    pub(crate) fn key(self) -> String {
        self.aggregate.to_string()
    }

    /// The entry in words, and as much padding as it decides: up to 400 bytes.
    pub(crate) fn payload(self) -> String {
        let Self { aggregate, sequence } = self;
        let padding = (u64::from(aggregate) * 11 + sequence * 37) % 400;
        format!("{aggregate}:{sequence}:{}", "x".repeat(padding as usize))
    }

    /// The entry with this payload and this key; `None` when there is none.
    pub(crate) fn of(key: &[u8], payload: &[u8]) -> Option<Self> {
        let mut words = str::from_utf8(payload).ok()?.split(':');
        let aggregate = words.next()?.parse().ok()?;
        let sequence = words.next()?.parse().ok()?;
        let entry = Self { aggregate, sequence };
        let is_whole = entry.payload().as_bytes() == payload && entry.key().as_bytes() == key;
        is_whole.then_some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_says_where_its_message_belongs() {
        let entry = Entry { aggregate: 7, sequence: 42 };
        assert_eq!(Entry::of(b"7", entry.payload().as_bytes()), Some(entry));
    }

    #[test]
    fn what_is_cut_or_of_another_key_is_no_entry() {
        let payload = Entry { aggregate: 7, sequence: 42 }.payload();
        assert_eq!(Entry::of(b"8", payload.as_bytes()), None);
        assert_eq!(Entry::of(b"7", &payload.as_bytes()[..payload.len() - 1]), None);
        assert_eq!(Entry::of(b"7", b"7"), None);
    }
}
