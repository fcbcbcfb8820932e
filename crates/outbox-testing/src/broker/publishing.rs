//! The dispatcher's side.

use std::time::Duration;

use async_trait::async_trait;
use outbox_core::Broker;
use outbox_core::broker::{BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind};
use outbox_core::delivery::Receipt;

use super::faults::{Fault, Plight};
use super::{MemoryBroker, State};

#[async_trait]
impl Broker for MemoryBroker {
    fn profile(&self) -> BrokerProfile {
        self.lock().profile
    }

    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
        let handed_over = self.hand_over(&batch, outcomes);
        drop(batch);
        let latency = self.lock().latency;
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        for (index, receipt) in handed_over.acknowledged {
            outcomes.delivered(index, receipt);
        }
        if handed_over.hangs {
            std::future::pending::<()>().await;
        }
        if !handed_over.undecided.is_empty() {
            tokio::time::sleep(self.profile().undecided.saturating_sub(latency)).await;
        }
        for index in handed_over.undecided {
            outcomes.failed(index, PublishErrorKind::Unknown.into());
        }
    }

    async fn check(&self) -> Result<(), PublishError> {
        let (plight, undecided) = {
            let state = self.lock();
            (state.plights.last().copied(), state.profile.undecided)
        };
        match plight {
            None => return Ok(()),
            Some(Plight::Refusing) => {}
            Some(Plight::Silent) => tokio::time::sleep(undecided).await,
        }
        Err(PublishErrorKind::Unavailable.into())
    }

    async fn close(&self, _within: Duration) {}
}

/// What became of a batch when it was handed over.
#[derive(Default)]
struct HandedOver {
    acknowledged: Vec<(usize, Receipt)>,
    undecided: Vec<usize>,
    hangs: bool,
}

impl MemoryBroker {
    fn hand_over(&self, batch: &[Outgoing], outcomes: &Outcomes) -> HandedOver {
        // What a test wrote may look at the broker, and sees it as it was before the batch.
        let verdicts: Vec<_> = batch.iter().map(|outgoing| self.judge(outgoing)).collect();
        let mut handed_over = HandedOver::default();
        let mut state = self.lock();
        for ((index, outgoing), verdict) in batch.iter().enumerate().zip(verdicts) {
            match state.hand_over(outgoing, verdict) {
                Ok(receipt) => handed_over.acknowledged.push((index, receipt)),
                Err(Trouble::Refused(kind)) => outcomes.failed(index, kind.into()),
                Err(Trouble::Undecided) => handed_over.undecided.push(index),
                Err(Trouble::Unanswered) => {}
                Err(Trouble::Hanging) => handed_over.hangs = true,
            }
        }
        drop(state);
        self.0.arrived.notify_waiters();
        handed_over
    }

    /// The fault that a script holds for a message, unless the broker would not take it anyway.
    fn judge(&self, outgoing: &Outgoing) -> Option<Fault> {
        let refused = self.lock().refuses(outgoing).is_some();
        if refused { None } else { self.scripted(&outgoing.delivery) }
    }
}

impl State {
    fn hand_over(
        &mut self,
        outgoing: &Outgoing,
        scripted: Option<Fault>,
    ) -> Result<Receipt, Trouble> {
        if let Some(trouble) = self.refuses(outgoing) {
            return Err(trouble);
        }
        let trouble = match scripted {
            Some(Fault::Refuse(kind)) => return Err(Trouble::Refused(kind)),
            Some(Fault::Silence) => return Err(Trouble::Undecided),
            Some(Fault::Doubt) => Some(Trouble::Refused(PublishErrorKind::Unknown)),
            Some(Fault::NoAnswer) => Some(Trouble::Unanswered),
            Some(Fault::Hang) => Some(Trouble::Hanging),
            None => None,
        };
        let receipt = self.record(&outgoing.delivery);
        trouble.map_or(Ok(receipt), Err)
    }

    /// Why the broker as it is takes no such message.
    fn refuses(&self, outgoing: &Outgoing) -> Option<Trouble> {
        let message = &outgoing.delivery.message;
        let partition = message.partition().map(i64::from);
        let kind = if outgoing.is_overdue() {
            PublishErrorKind::NotSent
        } else if let Some(plight) = self.plights.last() {
            match plight {
                Plight::Refusing => PublishErrorKind::Unavailable,
                Plight::Silent => return Some(Trouble::Undecided),
            }
        } else if self.removed.contains(message.topic()) {
            PublishErrorKind::Destination
        } else if message.size() > self.profile.max_message_bytes {
            PublishErrorKind::Rejected
        } else if partition.is_some_and(|partition| partition >= i64::from(self.partitions.get())) {
            PublishErrorKind::Failed
        } else {
            return None;
        };
        Some(Trouble::Refused(kind))
    }
}

enum Trouble {
    Refused(PublishErrorKind),
    Undecided,
    Unanswered,
    Hanging,
}
