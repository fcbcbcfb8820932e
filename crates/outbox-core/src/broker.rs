//! The broker's side: publishing a batch into a sink of answers.

mod outcomes;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

pub use self::outcomes::{Outcome, Outcomes};
use crate::delivery::{Delivery, Failure};

/// Where messages are published.
///
/// # Implementing it
///
/// - Whoever is in doubt answers [`PublishErrorKind::Unknown`]: nothing is counted, and the message
///   is sent again under its id. A wrong [`PublishErrorKind::NotSent`] repeats a message unseen, a
///   wrong [`PublishErrorKind::Failed`] in an outage uses up the attempts of all that wait. The table
///   of [`PublishErrorKind`] says which one is right.
/// - Publishes overlap: the next one begins while earlier ones are under way. They need no order
///   among each other: the messages of a key that are under way are all in one batch. A publish
///   that takes longer than [`BrokerProfile::undecided`] is dropped.
/// - Two headers are the broker's to add: the id ([`header::ID`](crate::message::header::ID)), and
///   the mark of a retried dead letter ([`header::RETRIED`](crate::message::header::RETRIED), when
///   [`RowState::retried`](crate::delivery::RowState::retried) is set). Null and empty are
///   different, in keys, payloads and header values. Who has no partitions ignores
///   [`Message::partition`](crate::Message::partition).
/// - [`BrokerProfile::undecided`] counts from the begin of a publish. A broker that sends a batch
///   bit by bit stops handing over in time, and answers the rest [`PublishErrorKind::NotSent`].
/// - Where a part of the broker can fail alone, as a partition can, what is for it is best answered
///   [`PublishErrorKind::NotSent`] once that is known, but for a message that probes. Messages that
///   wait for an answer fill the dispatcher's window, and a topic may use half of it.
/// - A batch holds several messages of a key only if the dispatcher was told to pipeline within
///   keys. Behind one that failed, none of its key should be sent.
///
/// The conformance suite in `outbox-testing` runs against your broker and its server, in one test
/// for each thing that it must get right, and the example `custom_broker` is a whole broker in one
/// file. How the server's errors become kinds is yours to test: a suite cannot make it fail.
#[async_trait]
pub trait Broker: fmt::Debug + Send + Sync + 'static {
    /// What the dispatcher must know. Cheap, no I/O.
    fn profile(&self) -> BrokerProfile;

    /// Publishes a batch and answers each index into `outcomes` as soon as it is known.
    ///
    /// # Contract
    ///
    /// - Each index is answered at most once; what is not answered when the future ends or is
    ///   dropped is [`PublishErrorKind::Unknown`].
    /// - Answers count as they are given, even if the call is then cancelled.
    /// - A delivery is delivered only when the broker acknowledged that message.
    /// - Right before a message is handed over, [`Outgoing::is_overdue`] is checked; an overdue
    ///   one is answered [`PublishErrorKind::NotSent`].
    /// - The first message of a key in the batch is handed over before the next one of it.
    /// - Nothing stays undecided longer than [`BrokerProfile::undecided`].
    /// - [`PublishErrorKind::Rejected`] is answered only for a message that was refused alone.
    /// - Content is dropped once the broker needs it no more: the dispatcher counts a message's
    ///   content until its answer, and lets other content take its place then.
    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes);

    /// A cheap round trip that tells whether publishing can work at all.
    ///
    /// Asked before a worker takes lanes, and about once a second while publishes are in trouble and
    /// none is acknowledged: each time that it passes, up to a hundred messages are tried. Where it
    /// passes in an outage, that is what the outage costs.
    ///
    /// # Errors
    ///
    /// A [`PublishError`], normally of kind [`PublishErrorKind::Unavailable`].
    async fn check(&self) -> Result<(), PublishError>;

    /// Flushes for at most `within`, then drops what is queued or in flight. Called once, at the end of
    /// [`Dispatcher::run`](crate::Dispatcher::run), after the last publish and before lanes are given
    /// back. Not called by a run that ends before its store has opened: it publishes nothing.
    async fn close(&self, within: Duration);
}

#[async_trait]
impl<B: Broker + ?Sized> Broker for std::sync::Arc<B> {
    fn profile(&self) -> BrokerProfile {
        B::profile(self)
    }

    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
        B::publish(self, batch, outcomes).await;
    }

    async fn check(&self) -> Result<(), PublishError> {
        B::check(self).await
    }

    async fn close(&self, within: Duration) {
        B::close(self, within).await;
    }
}

/// What a broker states about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct BrokerProfile {
    /// The largest message in bytes, as [`crate::message::Message::size`] counts. The broker
    /// itself rejects what is larger; the dispatcher does not look. A broker without a limit says
    /// what it will bear: 1,000,000 bytes is the default of [`Limits`](crate::message::Limits), and
    /// stores keep nothing above 15 MiB.
    pub max_message_bytes: usize,
    /// The longest time from the begin of a publish until its last message is answered, with
    /// everything that the broker tries on its own. The lease must be longer, as
    /// [`DispatcherBuilder::build`](crate::DispatcherBuilder::build) checks.
    pub undecided: Duration,
}

impl BrokerProfile {
    /// A broker that decides within `undecided` and takes messages of `max_message_bytes`.
    pub fn new(max_message_bytes: usize, undecided: Duration) -> Self {
        Self { max_message_bytes, undecided }
    }
}

/// A delivery on its way out, with the instant after which it may not be sent any more.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Outgoing {
    /// The delivery.
    pub delivery: Box<Delivery>,
    /// The lease's end, less the longest undecided time and a margin.
    pub not_after: Instant,
}

impl Outgoing {
    /// `delivery` may be sent until `not_after`.
    pub fn new(delivery: impl Into<Box<Delivery>>, not_after: Instant) -> Self {
        Self { delivery: delivery.into(), not_after }
    }

    /// Whether it is too late to send this message under its lease.
    pub fn is_overdue(&self) -> bool {
        Instant::now() >= self.not_after
    }
}

/// A message that was not acknowledged.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct PublishError {
    kind: PublishErrorKind,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl PublishError {
    /// An error of this kind caused by `source`. The source's text is stored with the row and
    /// logged, sanitised and cut: it must not quote payloads, keys or secrets.
    pub fn new(
        kind: PublishErrorKind,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, source: Some(source.into()) }
    }

    /// What it means for the message.
    pub fn kind(&self) -> PublishErrorKind {
        self.kind
    }

    /// The failure as it is stored.
    pub(crate) fn to_failure(&self) -> Failure {
        let text = self.source.as_ref().map(ToString::to_string).unwrap_or_default();
        Failure::new(self.kind.class(), &text)
    }
}

impl From<PublishErrorKind> for PublishError {
    fn from(kind: PublishErrorKind) -> Self {
        Self { kind, source: None }
    }
}

/// What a failed publish means.
///
/// Every kind but [`Unknown`](Self::Unknown) says that the message did not arrive: the server refused
/// it, or never had it.
///
/// | what happened, for example | kind |
/// |---|---|
/// | this message is too large, or malformed for the server, and was alone in its request | [`Rejected`](Self::Rejected) |
/// | an error about this message that may be another one next time | [`Failed`](Self::Failed) |
/// | the topic does not exist, or this user may not write to it | [`Destination`](Self::Destination) |
/// | connection refused, wrong password, the server is read-only, full or starting | [`Unavailable`](Self::Unavailable) |
/// | overdue, no time left in this publish, behind a message of its key that failed | [`NotSent`](Self::NotSent) |
/// | a timeout, a connection lost after it was used, an error that nobody knows | [`Unknown`](Self::Unknown) |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
#[non_exhaustive]
pub enum PublishErrorKind {
    /// This message can never pass. Counted; it dies.
    #[error("message was rejected for good")]
    Rejected,
    /// This message may pass later. Counted; its key waits.
    #[error("message failed")]
    Failed,
    /// The topic is unknown or forbidden. Not counted; its topic waits and is probed.
    #[error("destination is unknown or forbidden")]
    Destination,
    /// The broker as a whole cannot be used. Not counted; everything waits.
    #[error("broker is unavailable")]
    Unavailable,
    /// Certainly not in the log, and nobody's fault. Not counted; offered again, from 100 ms to 10 s
    /// later the more often it happens.
    #[error("message was not sent")]
    NotSent,
    /// May have been published, as after every timeout. Not counted as an attempt; the key waits
    /// and the message is sent again under the same id.
    #[error("outcome is unknown")]
    Unknown,
}

impl PublishErrorKind {
    /// The word for this kind in stored failures and metrics.
    pub fn class(self) -> &'static str {
        match self {
            Self::Rejected => "rejected",
            Self::Failed => "failed",
            Self::Destination => "destination",
            Self::Unavailable => "unavailable",
            Self::NotSent => "not_sent",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the attempt counts towards the maximum.
    pub fn counts(self) -> bool {
        matches!(self, Self::Rejected | Self::Failed)
    }
}
