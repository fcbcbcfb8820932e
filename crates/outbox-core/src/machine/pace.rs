//! When to read the next page.

use std::time::Duration;

use super::Time;
use crate::wake::Urgency;

/// Adaptive polling: at once while pages come back full, seldom when nothing comes, and in between
/// the more seldom the more comes, so that batches grow as load rises and a busy relay leaves the
/// machine to the writers.
#[derive(Debug, Clone)]
pub(super) struct Pace {
    shortest: Duration,
    busiest: Duration,
    longest: Duration,
    wait: Duration,
    last: Time,
    next: Time,
    /// A commit was announced while a claim was out: read again when it is back.
    again: bool,
}

/// At this many rows a second the interval has grown to `busiest`: with the square of the load,
/// since the first hundreds a second cost a machine little, whatever the size of their batches.
const BUSY_ROWS_PER_SECOND: f64 = 4_000.0;
/// Commits that are announced one after the other are read together.
const COMMITS: Duration = Duration::from_millis(1);
/// After a nudge the commit is expected within this time.
const NUDGED: Duration = Duration::from_millis(1);

impl Pace {
    pub(super) fn new(shortest: Duration, busiest: Duration, longest: Duration) -> Self {
        Self {
            shortest,
            busiest,
            longest,
            wait: shortest,
            last: Time::ZERO,
            next: Time::ZERO,
            again: false,
        }
    }

    pub(super) fn next(&self) -> Time {
        self.next
    }

    pub(super) fn is_due(&self, now: Time) -> bool {
        self.next <= now
    }

    /// A page with `rows` rows came back; `more` if it ended at a limit.
    pub(super) fn page(&mut self, rows: usize, more: bool, now: Time, random: f64) {
        let since = now.saturating_sub(self.last).max(self.shortest);
        self.last = now;
        if more || self.again {
            self.next = if more { now } else { now + COMMITS };
            self.again = false;
            self.wait = self.shortest;
            return;
        }
        self.wait = if rows == 0 {
            self.wait.mul_f64(1.5).clamp(self.shortest, self.longest)
        } else {
            let rate = rows as f64 / since.as_secs_f64();
            let load = (rate / BUSY_ROWS_PER_SECOND).min(1.0);
            self.busiest.mul_f64(load * load).max(self.shortest)
        };
        self.next = now + self.wait.mul_f64(0.9 + 0.1 * random);
    }

    /// A claim failed: read again no sooner than after `wait`.
    pub(super) fn back_off(&mut self, wait: Duration, now: Time) {
        self.last = now;
        self.next = now + wait;
    }

    /// A writer in this process added (`Soon`) or committed (`Now`) something.
    pub(super) fn rung(&mut self, urgency: Urgency, claiming: bool, now: Time) {
        match urgency {
            Urgency::Now => {
                self.again = claiming;
                self.next = self.next.min(now.max(self.last + COMMITS));
            }
            Urgency::Soon => {
                self.wait = self.shortest;
                self.next = self.next.min(now + NUDGED);
            }
        }
    }

    /// Rows may have appeared that no page has shown yet.
    pub(super) fn hurry(&mut self, now: Time) {
        self.next = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace() -> Pace {
        let millis = Duration::from_millis;
        Pace::new(millis(1), millis(50), millis(250))
    }

    #[test]
    fn empty_pages_lengthen_the_interval_up_to_the_longest() {
        let (mut pace, mut now) = (pace(), Duration::from_secs(1));
        for _ in 0..30 {
            pace.page(0, false, now, 1.0);
            now = pace.next();
        }
        assert_eq!(pace.wait, Duration::from_millis(250));
    }

    #[test]
    fn the_interval_grows_with_the_load_and_a_full_page_is_followed_at_once() {
        let mut pace = pace();
        let now = Duration::from_secs(1);
        pace.page(1, false, now, 1.0);
        pace.page(10, false, now + Duration::from_millis(10), 1.0);
        assert_eq!(pace.wait, Duration::from_micros(3_125), "1,000 rows a second");
        pace.page(1_000, false, now + Duration::from_millis(20), 1.0);
        assert_eq!(pace.wait, Duration::from_millis(50));
        pace.page(1_000, true, now + Duration::from_millis(40), 1.0);
        assert!(pace.is_due(now + Duration::from_millis(40)));
    }

    #[test]
    fn a_commit_is_read_at_once_even_if_a_claim_is_out() {
        let mut pace = pace();
        let now = Duration::from_secs(1);
        for _ in 0..30 {
            pace.page(0, false, now, 1.0);
        }
        pace.rung(Urgency::Soon, false, now);
        assert_eq!(pace.next(), now + NUDGED);
        pace.rung(Urgency::Now, true, now);
        pace.page(0, false, now, 1.0);
        assert_eq!(pace.next(), now + COMMITS);
        pace.rung(Urgency::Now, false, now + Duration::from_secs(1));
        assert!(pace.is_due(now + Duration::from_secs(1)));
    }
}
