//! The sink into which a broker answers.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;

use super::{PublishError, PublishErrorKind};
use crate::delivery::{Failure, Receipt};

/// The answer for one message.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The broker acknowledged the message.
    Delivered(Receipt),
    /// It did not.
    Failed(PublishErrorKind, Failure),
}

/// Where a broker answers for the messages of one batch, each index at most once.
///
/// Cheap to clone, so that callbacks can own one. Answers may come from any thread and count as
/// soon as they are given. A second answer for an index is ignored.
#[derive(Clone)]
pub struct Outcomes(Arc<Shared>);

struct Shared {
    answers: Mutex<Answers>,
    arrived: Arc<Notify>,
}

struct Answers {
    answered: Vec<bool>,
    open: usize,
    fresh: Vec<(usize, Outcome)>,
}

impl Outcomes {
    /// A sink for `count` messages that rings `arrived` when answers can be taken.
    pub fn new(count: usize, arrived: Arc<Notify>) -> Self {
        let answers = Answers { answered: vec![false; count], open: count, fresh: Vec::new() };
        Self(Arc::new(Shared { answers: Mutex::new(answers), arrived }))
    }

    /// The broker acknowledged the message at `index`.
    pub fn delivered(&self, index: usize, receipt: Receipt) {
        self.answer(index, Outcome::Delivered(receipt));
    }

    /// The message at `index` was not acknowledged.
    #[expect(clippy::needless_pass_by_value, reason = "an error is given away, not lent")]
    pub fn failed(&self, index: usize, error: PublishError) {
        self.answer(index, Outcome::Failed(error.kind(), error.to_failure()));
    }

    /// How many messages have no answer yet.
    pub fn unanswered(&self) -> usize {
        self.lock().open
    }

    /// Takes the answers that came since the last call.
    pub fn take(&self) -> Vec<(usize, Outcome)> {
        std::mem::take(&mut self.lock().fresh)
    }

    fn answer(&self, index: usize, outcome: Outcome) {
        let mut answers = self.lock();
        match answers.answered.get_mut(index) {
            Some(answered) if !*answered => *answered = true,
            _ => return,
        }
        answers.open -= 1;
        answers.fresh.push((index, outcome));
        if answers.fresh.len() == 1 {
            drop(answers);
            self.0.arrived.notify_one();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Answers> {
        self.0.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcomes").field("unanswered", &self.unanswered()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_index_is_answered_at_most_once() {
        let outcomes = Outcomes::new(2, Arc::default());
        outcomes.delivered(1, Receipt::default());
        outcomes.failed(1, PublishErrorKind::Failed.into());
        outcomes.delivered(7, Receipt::default());
        assert_eq!(outcomes.take(), [(1, Outcome::Delivered(Receipt::default()))]);
        assert_eq!(outcomes.unanswered(), 1);
        assert!(outcomes.take().is_empty());
    }
}
