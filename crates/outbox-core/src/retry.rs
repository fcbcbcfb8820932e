//! What becomes of a message that failed: pure functions over values.

use std::time::Duration;

/// When a failed message is tried again, and when it dies.
///
/// Exponential back-off with jitter and a cap: the wait before attempt n + 1 is uniform
/// between half a step and a whole step, where the step doubles with every attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct RetryPolicy {
    first: Duration,
    cap: Duration,
    max_attempts: Option<u32>,
}

impl Default for RetryPolicy {
    /// 1 s doubling up to 5 minutes, attempts unlimited: with `hold` a message that is given up
    /// stops its key, so giving up is the user's decision.
    fn default() -> Self {
        Self::exponential(Duration::from_secs(1), Duration::from_secs(300))
    }
}

impl RetryPolicy {
    /// Waits that start at `first` and double up to `cap`; attempts unlimited.
    pub const fn exponential(first: Duration, cap: Duration) -> Self {
        Self { first, cap, max_attempts: None }
    }

    /// Lets a message die after this many counted attempts. Only failures that are the message's
    /// own count: an outage, however long, counts none.
    pub const fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts);
        self
    }

    /// The wait after `attempts` failed ones; `None` when the message dies. `random` is uniform
    /// in 0..1.
    pub fn delay(&self, attempts: u32, random: f64) -> Option<Duration> {
        if self.max_attempts.is_some_and(|max| attempts >= max) {
            return None;
        }
        Some(self.wait(attempts, random))
    }

    /// The wait after `attempts` failed ones, whatever the maximum.
    pub(crate) fn wait(&self, attempts: u32, random: f64) -> Duration {
        let doublings = attempts.saturating_sub(1).min(31);
        let step = self.first.saturating_mul(1 << doublings).min(self.cap);
        // Half of it, so that no cap is too long to be multiplied.
        let half = step / 2;
        half + half.mul_f64(random.clamp(0.0, 1.0))
    }

    /// The longest wait.
    pub(crate) fn cap(&self) -> Duration {
        self.cap
    }

    pub(crate) fn is_valid(&self) -> bool {
        !self.first.is_zero() && self.first <= self.cap && self.max_attempts != Some(0)
    }
}

/// What happens to a message that dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnDeath {
    /// It stays in its place, marked held; its key waits until an operator retries, skips or
    /// discards it. Order is kept.
    #[default]
    Hold,
    /// It moves to the dead letters and its key goes on: later messages pass it.
    Skip,
}

/// How messages of a topic are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use]
pub struct TopicPolicy {
    pub(crate) retry: Option<RetryPolicy>,
    pub(crate) on_death: OnDeath,
}

impl TopicPolicy {
    /// The dispatcher's retry policy, and `hold`.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a retry policy of the topic's own.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.retry = Some(retry);
        self
    }

    /// Sets what happens to a message that dies.
    pub fn on_death(mut self, on_death: OnDeath) -> Self {
        self.on_death = on_death;
        self
    }
}

/// What becomes of messages once they were delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Retention {
    /// They are deleted at once.
    #[default]
    Delete,
    /// They are kept in the archive this long, then purged in small batches.
    Keep(Duration),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_jitter_stays_in_the_upper_half() {
        let policy = RetryPolicy::exponential(Duration::from_secs(1), Duration::from_secs(10));
        let at = |attempts, random| policy.delay(attempts, random).unwrap().as_secs_f64();
        assert_eq!(at(1, 0.0), 0.5);
        assert_eq!(at(1, 1.0), 1.0);
        assert_eq!(at(3, 1.0), 4.0);
        assert_eq!(at(200, 1.0), 10.0);
    }

    #[test]
    fn no_wait_is_too_long_to_be_computed() {
        let policy = RetryPolicy::exponential(Duration::MAX, Duration::MAX);
        let wait = policy.delay(u32::MAX, 1.0).unwrap();
        assert!(wait > Duration::MAX / 2);
        assert!(policy.delay(1, f64::INFINITY).unwrap() > Duration::MAX / 2);
    }

    #[test]
    fn a_message_dies_when_its_attempts_are_used_up_even_if_the_limit_was_lowered() {
        let policy = RetryPolicy::default().max_attempts(3);
        assert!(policy.delay(2, 0.5).is_some());
        assert_eq!(policy.delay(3, 0.5), None);
        assert_eq!(policy.delay(7, 0.5), None);
    }
}
