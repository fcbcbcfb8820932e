//! The operator's side of a store: held and dead messages.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;

use crate::delivery::Position;
use crate::message::{Message, MessageId};
use crate::store::StoreError;

/// What an operator does with messages that died: those held in their place, and those moved to
/// the dead letters under the policy `skip`.
///
/// Verbs take message ids, ignore ids that are neither held nor dead, and tell how many messages
/// they changed, so that repeating one is harmless. An id that was added more than once may be held
/// or dead more than once: a verb then changes all of these messages, and counts each.
#[async_trait]
pub trait DeadLetters: std::fmt::Debug + Send + Sync {
    /// Lists messages, oldest first.
    ///
    /// # Errors
    ///
    /// Any [`crate::store::StoreErrorKind`].
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>, StoreError>;

    /// The message with this id; the newest one if it died more than once.
    ///
    /// # Errors
    ///
    /// Any [`crate::store::StoreErrorKind`].
    async fn get(&self, id: MessageId) -> Result<Option<DeadLetter>, StoreError>;

    /// Offers messages again, with no attempts counted. A held one keeps its place and its order;
    /// a dead one goes last and may appear after newer messages of its key. Of several dead ones
    /// with one id the oldest goes first.
    ///
    /// # Errors
    ///
    /// Any [`crate::store::StoreErrorKind`]; nothing changed for the message at which it failed.
    async fn retry(&self, ids: &[MessageId]) -> Result<u64, StoreError>;

    /// Moves held messages to the dead letters, so that their keys go on.
    ///
    /// # Errors
    ///
    /// Any [`crate::store::StoreErrorKind`]; nothing changed for the message at which it failed.
    async fn skip(&self, ids: &[MessageId]) -> Result<u64, StoreError>;

    /// Deletes held or dead messages for good.
    ///
    /// # Errors
    ///
    /// Any [`crate::store::StoreErrorKind`]; nothing changed for the message at which it failed.
    async fn discard(&self, ids: &[MessageId]) -> Result<u64, StoreError>;
}

/// Which messages to list.
#[derive(Debug, Clone)]
#[must_use]
#[non_exhaustive]
pub struct DeadLetterQuery {
    /// Held or dead ones, or both.
    pub place: Option<Place>,
    /// Only this topic.
    pub topic: Option<String>,
    /// Only messages that died at least this long ago.
    pub older_than: Option<Duration>,
    /// Only messages after this one of an earlier answer.
    pub after: Option<Cursor>,
    /// At most this many.
    pub limit: u32,
}

impl DeadLetterQuery {
    /// The first 100 held and dead messages.
    pub fn new() -> Self {
        Self { place: None, topic: None, older_than: None, after: None, limit: 100 }
    }

    /// Only held or only dead messages.
    pub fn place(mut self, place: Place) -> Self {
        self.place = Some(place);
        self
    }

    /// Only messages of this topic.
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// Only messages that died at least this long ago.
    pub fn older_than(mut self, age: Duration) -> Self {
        self.older_than = Some(age);
        self
    }

    /// Only messages after this one of an earlier answer.
    pub fn after(mut self, cursor: Cursor) -> Self {
        self.after = Some(cursor);
        self
    }

    /// At most this many messages.
    pub fn limit(mut self, limit: u32) -> Self {
        self.limit = limit;
        self
    }
}

impl Default for DeadLetterQuery {
    fn default() -> Self {
        Self::new()
    }
}

/// Where a dead message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// In the outbox, blocking its key.
    Held,
    /// In the dead letters.
    Dead,
}

/// `held` or `dead`.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Held => "held",
            Self::Dead => "dead",
        })
    }
}

/// Where a listing stopped: pass [`DeadLetter::cursor`] of the last message to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cursor {
    /// Held messages come first.
    pub place: Place,
    /// The row in that place.
    pub row: u64,
}

/// A message that died.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The message; `None` when the row does not hold a valid one.
    pub message: Option<Message>,
    /// Its id.
    pub id: MessageId,
    /// Where it is.
    pub cursor: Cursor,
    /// Where it stood in the outbox when it died.
    pub position: Position,
    /// How many attempts were counted.
    pub attempts: u32,
    /// Why it died: class, code and text, at most 256 bytes.
    pub failure: String,
    /// How long ago it died, by the store's clock.
    pub age: Duration,
}

impl DeadLetter {
    /// The message `id` that died `age` ago.
    pub fn new(id: MessageId, message: Option<Message>, cursor: Cursor, age: Duration) -> Self {
        Self {
            message,
            id,
            cursor,
            position: Position::START,
            attempts: 0,
            failure: String::new(),
            age,
        }
    }

    /// Sets where it stood, how many attempts were counted and why it died.
    #[must_use]
    pub fn with_history(mut self, position: Position, attempts: u32, failure: String) -> Self {
        self.position = position;
        self.attempts = attempts;
        self.failure = failure;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_reads_as_its_word() {
        assert_eq!([Place::Held, Place::Dead].map(|place| place.to_string()), ["held", "dead"]);
    }
}
