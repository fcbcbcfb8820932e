//! The answers of one batch: who waits for them, and the ticket that each message carries.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use outbox_core::broker::{Outcomes, PublishError, PublishErrorKind};
use outbox_core::delivery::Receipt;
use rdkafka::error::RDKafkaErrorCode;
use rdkafka::message::{BorrowedMessage, OwnedMessage};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::verdict::{self, Verdict};

/// A batch on its way, shared by the publish that waits for it and the tickets of its messages.
#[derive(Debug)]
pub(crate) struct Batch {
    outcomes: Outcomes,
    alone: bool,
    open: AtomicUsize,
    suspects: Mutex<Vec<Suspect>>,
    changed: Notify,
}

/// A message that was refused together with others, as librdkafka gave it back: nobody else has kept
/// its content.
pub(crate) struct Suspect {
    pub(crate) index: usize,
    pub(crate) message: OwnedMessage,
    pub(crate) not_after: Instant,
}

/// Without the content, which the message's own `Debug` would show.
impl fmt::Debug for Suspect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Suspect").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Batch {
    /// A batch whose messages share requests: a verdict about one may be due to another.
    pub(crate) fn together(outcomes: &Outcomes) -> Arc<Self> {
        Self::new(outcomes, false)
    }

    /// A message that has a request for itself: a verdict is about this message.
    pub(crate) fn alone(outcomes: &Outcomes) -> Arc<Self> {
        Self::new(outcomes, true)
    }

    fn new(outcomes: &Outcomes, alone: bool) -> Arc<Self> {
        Arc::new(Self {
            outcomes: outcomes.clone(),
            alone,
            open: AtomicUsize::new(0),
            suspects: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// The ticket of the message at `index`. The batch stays open until it is gone.
    pub(crate) fn ticket(self: &Arc<Self>, index: usize, not_after: Instant) -> Box<Ticket> {
        self.open.fetch_add(1, Ordering::Relaxed);
        Box::new(Ticket { batch: Arc::clone(self), index, not_after })
    }

    /// Whether every ticket came back.
    pub(crate) fn is_settled(&self) -> bool {
        self.open.load(Ordering::Acquire) == 0
    }

    /// Waits until the last ticket or a suspect came back.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Takes the suspects, in the order of the batch.
    pub(crate) fn take_suspects(&self) -> Vec<Suspect> {
        let mut suspects =
            std::mem::take(&mut *self.suspects.lock().unwrap_or_else(PoisonError::into_inner));
        suspects.sort_unstable_by_key(|suspect| suspect.index);
        suspects
    }

    fn answer(&self, ticket: &Ticket, report: Report<'_>) {
        let index = ticket.index;
        let (code, message) = match report {
            Ok(receipt) => return self.outcomes.delivered(index, receipt),
            Err(refusal) => refusal,
        };
        let kind = match verdict::of_report(code) {
            Verdict::Known(kind) => kind,
            Verdict::Suspect if self.alone => PublishErrorKind::Rejected,
            Verdict::Suspect => {
                let suspect =
                    Suspect { index, message: message.detach(), not_after: ticket.not_after };
                self.suspects.lock().unwrap_or_else(PoisonError::into_inner).push(suspect);
                return self.changed.notify_one();
            }
            Verdict::Unlisted => {
                tracing::warn!(?code, "kafka answered with an error that has no class");
                PublishErrorKind::Unknown
            }
        };
        self.outcomes.failed(index, PublishError::new(kind, code));
    }
}

/// What librdkafka reports of a message: a receipt, or why it failed.
pub(crate) type Report<'a> = Result<Receipt, (RDKafkaErrorCode, &'a BorrowedMessage<'a>)>;

/// Travels with a message through librdkafka and answers for it, even when nobody waits any more.
#[derive(Debug)]
pub(crate) struct Ticket {
    batch: Arc<Batch>,
    index: usize,
    not_after: Instant,
}

impl Ticket {
    /// Answers for the message. A panic in the answer must not unwind into librdkafka.
    pub(crate) fn report(&self, report: Report<'_>) {
        let answer = || self.batch.answer(self, report);
        if catch_unwind(AssertUnwindSafe(answer)).is_err() {
            let unknown =
                || self.batch.outcomes.failed(self.index, PublishErrorKind::Unknown.into());
            _ = catch_unwind(AssertUnwindSafe(unknown));
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.batch.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.batch.changed.notify_one();
        }
    }
}
