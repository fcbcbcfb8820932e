//! What a dispatcher tells while it works.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::broker::PublishErrorKind;
use crate::delivery::{Lane, Receipt};
use crate::message::MessageId;
use crate::store::{Backlog, StoreErrorKind};

/// Receives the events of a dispatcher, in order.
///
/// Called synchronously from the dispatcher's task: it must not block. A panic is caught and
/// logged.
pub trait Observer: Send + Sync + 'static {
    /// Something happened.
    fn observe(&self, event: &Event);
}

impl<O: Observer + ?Sized> Observer for Arc<O> {
    fn observe(&self, event: &Event) {
        O::observe(self, event);
    }
}

/// Something a dispatcher did or found.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// Rows were read.
    Claimed {
        /// How many.
        rows: usize,
    },
    /// The broker acknowledged a message.
    Published {
        /// Its topic.
        topic: Arc<str>,
        /// Its id.
        id: MessageId,
        /// From `add` (by the store's clock) to the acknowledgement.
        latency: Duration,
        /// Where it went.
        receipt: Receipt,
    },
    /// The broker did not acknowledge a message.
    PublishFailed {
        /// Its topic.
        topic: Arc<str>,
        /// Its id.
        id: MessageId,
        /// What that means.
        kind: PublishErrorKind,
    },
    /// Delivered rows left the outbox.
    Settled {
        /// How many.
        rows: usize,
    },
    /// A message failed and will be tried again; the attempt counts.
    RetryScheduled {
        /// Its topic.
        topic: Arc<str>,
        /// Its id.
        id: MessageId,
        /// How many attempts were counted.
        attempts: u32,
        /// The wait.
        after: Duration,
    },
    /// A message died and is held; its key waits for an operator.
    Held {
        /// Its topic.
        topic: Arc<str>,
        /// Its id.
        id: MessageId,
    },
    /// A message died and moved to the dead letters. Not told where the answer of that was lost: the
    /// message is as gone then as one that was delivered.
    Dead {
        /// Its topic.
        topic: Arc<str>,
        /// Its id.
        id: MessageId,
    },
    /// Lanes became ours.
    LanesGained {
        /// Which.
        lanes: Vec<Lane>,
    },
    /// Lanes went away without being handed over: the lease ran out or was taken.
    LanesLost {
        /// Which.
        lanes: Vec<Lane>,
    },
    /// Lanes were given back.
    LanesReleased {
        /// Which.
        lanes: Vec<Lane>,
    },
    /// The broker is unavailable: single messages probe, or a worker without lanes failed its check.
    CircuitOpened,
    /// The broker acknowledged a message again, or answered the check of a worker without lanes; or it
    /// answers checks, and no message was in trouble for long, or none is left that could be.
    CircuitClosed {
        /// How long the circuit was open.
        after: Duration,
    },
    /// A topic is unknown or forbidden; its messages wait and single ones probe.
    TopicClosed {
        /// The topic.
        topic: Arc<str>,
    },
    /// A message of a closed topic was acknowledged.
    TopicOpened {
        /// The topic.
        topic: Arc<str>,
        /// How long it was closed.
        after: Duration,
    },
    /// A call to the store failed; it is repeated.
    StoreFailed {
        /// Which step failed.
        step: Step,
        /// How.
        kind: StoreErrorKind,
    },
    /// Another server answers, or the same one after it was started again, or its table has other rows
    /// than before: everything read before is void, lanes are read from the start.
    ServerChanged,
    /// So many rows are known that no further pages are read until some are gone. Keys behind the
    /// last page wait for held or failing ones: the one case where a key delays others.
    Full {
        /// How many rows are known.
        rows: usize,
    },
    /// What waits was counted.
    BacklogSampled {
        /// The counts.
        backlog: Backlog,
    },
    /// What waits could not be counted for long: what was told last says nothing any more.
    BacklogUnknown,
    /// Archived copies were purged.
    Purged {
        /// How many.
        rows: u64,
    },
    /// A step took this long.
    Timed {
        /// Which step.
        step: Step,
        /// How long.
        took: Duration,
    },
    /// In flight, content and lanes after a round of work.
    Sampled {
        /// Published and not yet confirmed settled.
        in_flight: usize,
        /// Content held in memory, in bytes.
        content_bytes: usize,
        /// Lanes held.
        lanes: usize,
    },
    /// The run has ended, or was dropped. The last event.
    Stopped,
}

/// A step of the lifecycle that takes time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// Opening the store.
    Open,
    /// Keeping leases.
    Keep,
    /// Reading rows.
    Claim,
    /// Publishing a batch.
    Publish,
    /// Settling rows.
    Settle,
    /// Giving leases back.
    Release,
    /// Purging the archive.
    Purge,
    /// Counting the backlog.
    Backlog,
}

impl Step {
    /// The word for this step in texts and metrics.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Keep => "keep",
            Self::Claim => "claim",
            Self::Publish => "publish",
            Self::Settle => "settle",
            Self::Release => "release",
            Self::Purge => "purge",
            Self::Backlog => "backlog",
        }
    }
}

/// As the label `step` of the metrics: `claim`.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Observer for Counter {
        fn observe(&self, _: &Event) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn an_observer_that_is_shared_is_told() {
        let counter = Arc::new(Counter::default());
        let shared: Arc<dyn Observer> = counter.clone();
        let told: [Box<dyn Observer>; 2] = [Box::new(shared), Box::new(Arc::clone(&counter))];
        for observer in told {
            observer.observe(&Event::Stopped);
        }
        assert_eq!(counter.0.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn a_step_reads_as_its_word() {
        assert_eq!(Step::Backlog.to_string(), "backlog");
    }
}
