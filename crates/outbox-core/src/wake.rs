//! How writers tell a dispatcher in the same process that there may be work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::sync::Notify;

/// A coalescing signal from an [`Outbox`](crate::Outbox) to one dispatcher. Clones are the same one:
/// of two dispatchers that listen to it, either takes what was meant for the other.
#[derive(Debug, Clone, Default)]
pub struct Wake(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    pending: AtomicU8,
    rung: Notify,
}

/// How certain it is that a committed message waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// A message was added and will be committed presently.
    Soon,
    /// A commit has happened.
    Now,
}

impl Wake {
    /// A message was added but not committed yet: poll more often for a while.
    pub fn nudge(&self) {
        self.ring(Urgency::Soon);
    }

    /// A commit has happened: claim at once.
    pub fn wake(&self) {
        self.ring(Urgency::Now);
    }

    /// Waits for the next signal; several are merged into the most urgent one. Cancel-safe.
    pub async fn rung(&self) -> Urgency {
        loop {
            match self.0.pending.swap(0, Ordering::AcqRel) {
                0 => self.0.rung.notified().await,
                1 => return Urgency::Soon,
                _ => return Urgency::Now,
            }
        }
    }

    fn ring(&self, urgency: Urgency) {
        let level = match urgency {
            Urgency::Soon => 1,
            Urgency::Now => 2,
        };
        if self.0.pending.fetch_max(level, Ordering::AcqRel) < level {
            self.0.rung.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn signals_merge_into_the_most_urgent_one() {
        let wake = Wake::default();
        wake.nudge();
        wake.wake();
        wake.nudge();
        assert_eq!(wake.rung().await, Urgency::Now);
        let quiet = tokio::time::timeout(std::time::Duration::from_millis(5), wake.rung()).await;
        assert!(quiet.is_err());
    }
}
