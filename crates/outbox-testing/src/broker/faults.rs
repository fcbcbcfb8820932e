//! What can go wrong with a [`MemoryBroker`].

use std::fmt;

use outbox_core::Delivery;
use outbox_core::broker::PublishErrorKind;

use super::MemoryBroker;

/// What happens to a message instead of being published and acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// It does not arrive, and this is the answer.
    Refuse(PublishErrorKind),
    /// It does not arrive, and the answer is [`PublishErrorKind::Unknown`] after the undecided
    /// time, as from a partition without a leader.
    Silence,
    /// It arrives, and the answer is [`PublishErrorKind::Unknown`].
    Doubt,
    /// It arrives, and the publish ends without an answer for it.
    NoAnswer,
    /// It arrives, and the publish never ends: it must be dropped.
    Hang,
}

impl From<PublishErrorKind> for Fault {
    fn from(kind: PublishErrorKind) -> Self {
        Self::Refuse(kind)
    }
}

/// A script: which messages, and what happens to them.
pub(super) struct Rule {
    applies: Box<dyn FnMut(&Delivery) -> bool + Send>,
    left: Option<usize>,
    fault: Fault,
}

impl Rule {
    pub(super) fn next(count: usize, fault: Fault) -> Self {
        Self { applies: Box::new(|_| true), left: Some(count), fault }
    }

    pub(super) fn when(
        predicate: impl FnMut(&Delivery) -> bool + Send + 'static,
        fault: Fault,
    ) -> Self {
        Self { applies: Box::new(predicate), left: None, fault }
    }

    pub(super) fn apply(&mut self, delivery: &Delivery) -> Option<Fault> {
        if self.is_spent() || !(self.applies)(delivery) {
            return None;
        }
        self.left = self.left.map(|left| left - 1);
        Some(self.fault)
    }

    pub(super) fn is_spent(&self) -> bool {
        self.left == Some(0)
    }
}

/// How a broker is down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plight {
    Refusing,
    Silent,
}

/// An outage of a [`MemoryBroker`]: it ends when this is dropped.
pub struct Outage {
    broker: MemoryBroker,
    plight: Plight,
}

impl Outage {
    pub(super) fn begin(broker: &MemoryBroker, plight: Plight) -> Self {
        broker.lock().plights.push(plight);
        Self { broker: broker.clone(), plight }
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        let plights = &mut self.broker.lock().plights;
        if let Some(index) = plights.iter().position(|plight| *plight == self.plight) {
            plights.remove(index);
        }
    }
}

impl fmt::Debug for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outage").field("plight", &self.plight).finish_non_exhaustive()
    }
}
