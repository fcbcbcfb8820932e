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
    /// How long to wait after an empty page: it grows with each.
    quiet: Duration,
    /// Rows a second, as of late.
    rate: f64,
    last: Time,
    next: Time,
    /// After a failed claim: whoever announces commits must not cause as many failing claims.
    not_before: Time,
    /// A commit was announced while a claim was out: read again when it is back.
    again: bool,
}

/// At this many rows a second the interval has grown to `busiest`: with the square of the load,
/// since the first hundreds a second cost a machine little, whatever the size of their batches.
const BUSY_ROWS_PER_SECOND: f64 = 4_000.0;
/// However much else there is to read, a page is read this often.
const OVERDUE: Duration = Duration::from_secs(1);
/// The rate is that of about this time: a page alone, which four writers chanced to commit into,
/// would look like full load, and the chance of a few pages would still make intervals of a fifth
/// more than what the load asks for.
const OF_LATE: Duration = Duration::from_secs(1);
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
            quiet: shortest,
            rate: 0.0,
            last: Time::ZERO,
            next: Time::ZERO,
            not_before: Time::ZERO,
            again: false,
        }
    }

    pub(super) fn next(&self) -> Time {
        self.next
    }

    pub(super) fn is_due(&self, now: Time) -> bool {
        self.next <= now
    }

    /// Whether no page was read for long, because something else had to be read.
    pub(super) fn is_overdue(&self, now: Time) -> bool {
        now.saturating_sub(self.last) >= OVERDUE
    }

    /// A page that was asked for at `sent` came back with `rows` rows; `more` if it ended at a limit.
    pub(super) fn page(&mut self, rows: usize, more: bool, sent: Time, now: Time, random: f64) {
        let since = now.saturating_sub(self.last).max(self.shortest);
        self.last = now;
        self.not_before = now;
        let weight = since.as_secs_f64() / (since + OF_LATE).as_secs_f64();
        self.rate += (rows as f64 / since.as_secs_f64() - self.rate) * weight;
        if more || self.again {
            self.next = if more { now } else { now + COMMITS };
            self.again = false;
            self.quiet = self.shortest;
            return;
        }
        let wait = if rows == 0 {
            // Not from the interval under load: where the database halts for a moment, so do the
            // writers, and what they commit after it would wait for several times as long.
            self.quiet = self.quiet.mul_f64(1.5).min(self.longest);
            self.quiet
        } else {
            self.quiet = self.shortest;
            let load = (self.rate / BUSY_ROWS_PER_SECOND).min(1.0);
            self.busiest.mul_f64(load * load).clamp(self.shortest, self.longest)
        };
        // From page to page. A server that takes long is left alone for half of the interval.
        self.next = (sent + wait.mul_f64(0.9 + 0.1 * random)).max(now + wait / 2);
    }

    /// A claim failed: read again no sooner than after `wait`.
    pub(super) fn back_off(&mut self, wait: Duration, now: Time) {
        self.last = now;
        self.next = now + wait;
        self.not_before = self.next;
    }

    /// A writer in this process added (`Soon`) or committed (`Now`) something.
    pub(super) fn rung(&mut self, urgency: Urgency, claiming: bool, now: Time) {
        match urgency {
            Urgency::Now => {
                self.again = claiming;
                self.next = self.next.min(now.max(self.last + COMMITS));
            }
            Urgency::Soon => {
                self.quiet = self.shortest;
                self.next = self.next.min(now + NUDGED);
            }
        }
        self.next = self.next.max(self.not_before);
    }

    /// Rows may have appeared that no page has shown yet.
    pub(super) fn hurry(&mut self, now: Time) {
        self.next = now;
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn pace() -> Pace {
        let millis = Duration::from_millis;
        Pace::new(millis(1), millis(50), millis(300))
    }

    #[test]
    fn empty_pages_lengthen_the_interval_up_to_the_longest() {
        let (mut pace, mut now) = (pace(), Duration::from_secs(1));
        for _ in 0..30 {
            pace.page(0, false, now, now, 1.0);
            now = pace.next();
        }
        pace.page(0, false, now, now, 1.0);
        assert_eq!(pace.next(), now + Duration::from_millis(300));
    }

    #[test]
    fn what_comes_after_a_halt_waits_half_of_its_time_or_as_usual() {
        let mut pace = pace();
        let (_, usual) = waits(&mut pace, 2_500.0, 1);
        let halted = pace.last;
        while pace.next() < halted + Duration::from_millis(300) {
            let now = pace.next();
            pace.page(0, false, now, now, 1.0);
            let wait = pace.next() - now;
            assert!(wait <= usual.max((now - halted) / 2), "{wait:?} after {:?}", now - halted);
        }
    }

    /// Pages with rows at this rate, for eight seconds; gives the shortest and the longest wait of
    /// the last one.
    fn waits(pace: &mut Pace, rows_per_second: f64, burst: usize) -> (Duration, Duration) {
        let (start, mut now, mut taken) = (pace.last, pace.last, 0);
        let (mut least, mut most) = (Duration::MAX, Duration::ZERO);
        while now < start + Duration::from_secs(8) {
            now = now.max(pace.next()) + Duration::from_micros(500);
            let came = ((now - start).as_secs_f64() * rows_per_second) as usize / burst * burst;
            pace.page(came - taken, false, now, now, 1.0);
            taken = came;
            if now > start + Duration::from_secs(7) {
                let wait = pace.next() - now;
                (least, most) = (least.min(wait), most.max(wait));
            }
        }
        (least, most)
    }

    #[test]
    fn the_interval_grows_with_the_square_of_the_load() {
        let millis = Duration::from_millis;
        let (least, most) = waits(&mut pace(), 1_000.0, 1);
        assert!(millis(3) <= least && most <= millis(4), "{least:?} to {most:?}");
        let (least, most) = waits(&mut pace(), 2_500.0, 1);
        assert!(millis(18) <= least && most <= millis(22), "{least:?} to {most:?}");
        assert_eq!(waits(&mut pace(), 10_000.0, 1).0, millis(50));
    }

    #[test]
    fn a_few_rows_at_once_are_no_load() {
        let (_, most) = waits(&mut pace(), 1_000.0, 8);
        assert!(most <= Duration::from_millis(6), "{most:?}");
    }

    #[test]
    fn the_interval_hardly_follows_the_chance_of_arrivals() {
        let (mut pace, mut now) = (pace(), Duration::ZERO);
        let mut random = SmallRng::seed_from_u64(1);
        let (mut least, mut most) = (Duration::MAX, Duration::ZERO);
        while now < Duration::from_secs(8) {
            let since = pace.next() + Duration::from_micros(500) - now;
            now += since;
            // 2,500 a second, each at any time.
            let rows = (0..since.as_micros()).filter(|_| random.random_bool(0.0025)).count();
            pace.page(rows, false, now, now, 1.0);
            if now > Duration::from_secs(4) {
                let wait = pace.next() - now;
                (least, most) = (least.min(wait), most.max(wait));
            }
        }
        assert!(most <= least.mul_f64(1.25), "{least:?} to {most:?}");
    }

    #[test]
    fn the_interval_is_from_page_to_page_and_half_of_it_is_left_to_a_slow_server() {
        let millis = Duration::from_millis;
        let mut pace = pace();
        waits(&mut pace, 10_000.0, 1);
        let sent = pace.next();
        pace.page(500, false, sent, sent + millis(10), 1.0);
        assert_eq!(pace.next(), sent + millis(50));
        pace.page(500, false, sent, sent + millis(200), 1.0);
        assert_eq!(pace.next(), sent + millis(225));
    }

    #[test]
    fn a_full_page_is_followed_at_once() {
        let mut pace = pace();
        let now = Duration::from_secs(1);
        pace.page(1_000, true, now, now, 1.0);
        assert!(pace.is_due(now));
    }

    #[test]
    fn a_commit_is_read_at_once_even_if_a_claim_is_out() {
        let mut pace = pace();
        let now = Duration::from_secs(1);
        for _ in 0..30 {
            pace.page(0, false, now, now, 1.0);
        }
        pace.rung(Urgency::Soon, false, now);
        assert_eq!(pace.next(), now + NUDGED);
        pace.rung(Urgency::Now, true, now);
        pace.page(0, false, now, now, 1.0);
        assert_eq!(pace.next(), now + COMMITS);
        pace.rung(Urgency::Now, false, now + Duration::from_secs(1));
        assert!(pace.is_due(now + Duration::from_secs(1)));
    }
}
