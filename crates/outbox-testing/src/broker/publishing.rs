//! The dispatcher's side.

use std::time::Duration;

use async_trait::async_trait;
use outbox_core::Broker;
use outbox_core::broker::{BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind};
use outbox_core::delivery::Receipt;

use super::MemoryBroker;
use super::faults::{Fault, Plight};

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
        let mut handed_over = HandedOver::default();
        for (index, outgoing) in batch.iter().enumerate() {
            match self.hand_one_over(outgoing) {
                Ok(receipt) => handed_over.acknowledged.push((index, receipt)),
                Err(Trouble::Refused(kind)) => outcomes.failed(index, kind.into()),
                Err(Trouble::Undecided) => handed_over.undecided.push(index),
                Err(Trouble::Unanswered) => {}
                Err(Trouble::Hanging) => handed_over.hangs = true,
            }
        }
        self.0.arrived.notify_waiters();
        handed_over
    }

    fn hand_one_over(&self, outgoing: &Outgoing) -> Result<Receipt, Trouble> {
        if outgoing.is_overdue() {
            return Err(Trouble::Refused(PublishErrorKind::NotSent));
        }
        let plight = self.lock().plights.last().copied();
        match plight {
            Some(Plight::Refusing) => {
                return Err(Trouble::Refused(PublishErrorKind::Unavailable));
            }
            Some(Plight::Silent) => return Err(Trouble::Undecided),
            None => {}
        }
        let trouble = match self.fault_for(&outgoing.delivery) {
            Some(Fault::Refuse(kind)) => return Err(Trouble::Refused(kind)),
            Some(Fault::Silence) => return Err(Trouble::Undecided),
            Some(Fault::Doubt) => Some(Trouble::Refused(PublishErrorKind::Unknown)),
            Some(Fault::NoAnswer) => Some(Trouble::Unanswered),
            Some(Fault::Hang) => Some(Trouble::Hanging),
            None => None,
        };
        let receipt = self.lock().record(&outgoing.delivery);
        trouble.map_or(Ok(receipt), Err)
    }
}

enum Trouble {
    Refused(PublishErrorKind),
    Undecided,
    Unanswered,
    Hanging,
}
