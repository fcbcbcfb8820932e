//! What crosses the boundary between dispatcher, store and broker.

use std::fmt;
use std::time::Duration;

use crate::message::{Message, MessageId};

/// Where a row stands in its outbox table: its id, in the order in which ids were handed out.
///
/// Ids become visible out of order (they are handed out at insert and visible at commit), may
/// have holes, and are never an identity across a fail-over: that is the message id's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Position(pub u64);

impl Position {
    /// Before every row.
    pub const START: Self = Self(0);

    /// The position after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The position before this one; [`Position::START`] stays.
    #[must_use]
    pub const fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An inclusive range of positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    /// The first position.
    pub first: Position,
    /// The last position, not below `first`.
    pub last: Position,
}

impl Span {
    /// The span from `first` to `last`, both included.
    pub const fn new(first: Position, last: Position) -> Self {
        Self { first, last }
    }

    /// Whether `position` lies in the span.
    pub fn contains(&self, position: Position) -> bool {
        self.first <= position && position <= self.last
    }
}

/// A hash bucket of keys; the unit of ownership. The database computes it from the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lane(pub u16);

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The right to a lane: the lane and the epoch under which it was taken. Epochs only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lease {
    /// The lane.
    pub lane: Lane,
    /// The fence: writes that carry an older epoch change nothing.
    pub epoch: u64,
}

impl Lease {
    /// The lease of `lane` under `epoch`.
    pub const fn new(lane: Lane, epoch: u64) -> Self {
        Self { lane, epoch }
    }
}

/// The identity of one running dispatcher: random at every start, never configured.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId([u8; 16]);

impl WorkerId {
    /// A fresh random id.
    pub fn generate() -> Self {
        Self(*uuid::Uuid::now_v7().as_bytes())
    }

    /// The id with these 16 bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The 16 bytes of the id.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_bytes(self.0).fmt(f)
    }
}

impl fmt::Debug for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WorkerId({self})")
    }
}

/// A claimed message: the message, where its row stands, and what happened to it so far.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Delivery {
    /// Where the row stands.
    pub position: Position,
    /// The lane of the row.
    pub lane: Lane,
    /// The message.
    pub message: Message,
    /// What was recorded about the row.
    pub state: RowState,
    /// How long ago the row was added, by the store's clock.
    pub age: Duration,
}

impl Delivery {
    /// A delivery that never failed.
    pub fn new(position: Position, lane: Lane, message: Message) -> Self {
        Self { position, lane, message, state: RowState::default(), age: Duration::ZERO }
    }

    /// Sets what was recorded about the row.
    #[must_use]
    pub fn with_state(mut self, state: RowState) -> Self {
        self.state = state;
        self
    }

    /// Sets how long ago the row was added.
    #[must_use]
    pub fn with_age(mut self, age: Duration) -> Self {
        self.age = age;
        self
    }
}

/// What a row records of its failures; all zero until the first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct RowState {
    /// How many attempts were counted.
    pub attempts: u32,
    /// Raised by every operator verb, so that a decision made on an older reading changes nothing.
    pub revision: u32,
    /// Whether the row is held: it and its key wait for an operator.
    pub held: bool,
    /// How long the row still waits before its next attempt, by the store's clock.
    pub wait: Duration,
    /// Whether an operator retried this message out of its place.
    pub retried: bool,
}

impl RowState {
    /// The state after `attempts` attempts, at `revision`.
    pub fn new(attempts: u32, revision: u32) -> Self {
        Self { attempts, revision, ..Self::default() }
    }

    /// Sets whether the row is held.
    #[must_use]
    pub fn with_held(mut self, held: bool) -> Self {
        self.held = held;
        self
    }

    /// Sets how long the row still waits.
    #[must_use]
    pub fn with_wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Sets whether an operator retried the message out of its place.
    #[must_use]
    pub fn with_retried(mut self, retried: bool) -> Self {
        self.retried = retried;
        self
    }
}

/// Where a message went: partition and offset, as far as the broker tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Receipt {
    /// The partition.
    pub partition: Option<i32>,
    /// The offset in the partition.
    pub offset: Option<i64>,
}

impl Receipt {
    /// A receipt for `partition` and `offset`.
    pub fn new(partition: Option<i32>, offset: Option<i64>) -> Self {
        Self { partition, offset }
    }
}

/// Why an attempt failed, fit to be stored and shown: class, code, and at most 256 sanitised bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    class: &'static str,
    text: String,
}

impl Failure {
    /// The longest text in bytes.
    pub const MAX_BYTES: usize = 256;

    /// A failure of this class with a text that is sanitised and cut: control characters become
    /// spaces, so that nothing poisons a log or a terminal.
    pub fn new(class: &'static str, text: &str) -> Self {
        let mut clean = String::new();
        for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
            if clean.len() + c.len_utf8() > Self::MAX_BYTES.saturating_sub(class.len() + 2) {
                break;
            }
            clean.push(c);
        }
        Self { class, text: clean }
    }

    /// The class of the error, such as `rejected`.
    pub fn class(&self) -> &'static str {
        self.class
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class, self.text)
    }
}

/// What becomes of a delivery that was not delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Settlement {
    /// The row waits this long and is tried again; the attempt counts.
    Retry(Duration),
    /// The row stays in its place, marked held; its key waits for an operator.
    Held,
    /// The row moves to the dead letters; its key goes on.
    Dead,
}

/// The identity of a row: the message id guards against ids that were reused after a fail-over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowId {
    /// Where the row stands.
    pub position: Position,
    /// The message it must hold.
    pub message: MessageId,
}

impl RowId {
    /// The row at `position` if it holds `message`.
    pub const fn new(position: Position, message: MessageId) -> Self {
        Self { position, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_clean_line_of_at_most_256_bytes() {
        let failure = Failure::new("rejected", &"\u{1b}[31mé\n".repeat(200));
        let text = failure.to_string();
        assert!(text.len() <= Failure::MAX_BYTES, "{}", text.len());
        assert!(text.chars().all(|c| !c.is_control()));
        assert!(text.starts_with("rejected: "));
    }
}
