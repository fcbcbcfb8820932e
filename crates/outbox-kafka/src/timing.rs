//! How long a publish can stay undecided, and of what that time is made.

use std::time::Duration;

/// librdkafka looks for expired messages once a second.
const TIMEOUT_SCAN: Duration = Duration::from_secs(1);

/// The parts of the longest undecided time, all derived from the message timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timing {
    /// Waiting for room in librdkafka's queue, before anything is handed over.
    pub(crate) queue: Duration,
    /// From hand-over until librdkafka gives a message up.
    pub(crate) message: Duration,
    /// The longest pause between two connection attempts. It delays the report of a timeout.
    pub(crate) reconnect: Duration,
    /// Sending suspects again, one by one.
    pub(crate) isolation: Duration,
    /// What our own wake-up may be late.
    pub(crate) slack: Duration,
}

impl Timing {
    pub(crate) fn new(message: Duration) -> Self {
        let share = |divisor, least, most| {
            (message / divisor).clamp(Duration::from_millis(least), Duration::from_millis(most))
        };
        Self {
            queue: share(30, 20, 500),
            message,
            reconnect: share(30, 50, 500),
            isolation: share(6, 500, 10_000),
            slack: share(30, 50, 500),
        }
    }

    /// The longest time a publish can stay undecided: waiting for room, the message timeout, the
    /// report of it (one scan and one reconnect), the isolation of suspects, our slack.
    pub(crate) fn undecided(self) -> Duration {
        self.queue + self.message + TIMEOUT_SCAN + self.reconnect + self.isolation + self.slack
    }

    /// The message timeout of a suspect that is sent alone: half of the isolation, so that a
    /// suspect that was begun in the first half is decided within it.
    pub(crate) fn alone(self) -> Duration {
        self.isolation / 2
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_timeout_is_undecided_for_twenty_seconds() {
        let timing = Timing::new(crate::builder::DEFAULT_MESSAGE_TIMEOUT);
        assert_eq!(timing.undecided(), Duration::from_secs(20));
    }

    #[test]
    fn undecided_exceeds_the_message_timeout_by_a_scan_and_two_reconnects_at_least() {
        for millis in [100, 600, 1_000, 15_000, 300_000] {
            let timing = Timing::new(Duration::from_millis(millis));
            let least = timing.message + TIMEOUT_SCAN + 2 * timing.reconnect;
            assert!(timing.undecided() > least, "{timing:?}");
            assert!(timing.reconnect <= Duration::from_millis(500), "{timing:?}");
        }
        assert!(Timing::new(Duration::from_millis(300)).undecided() < Duration::from_secs(2));
    }
}
