//! How many rows one write of the relay takes along, and the pause after it.
//!
//! SQLite has one writer at a time, and a writer that finds another one busy sleeps and asks again.
//! So the relay writes in short transactions, whatever the disk and the size of the rows, and
//! leaves as much time free between them as they take.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A write that takes longer is followed by smaller ones.
const LONG: Duration = Duration::from_millis(4);

/// A write that takes less time is followed by larger ones.
const SHORT: Duration = Duration::from_millis(2);

/// The longest pause: a process that was stopped in the middle of a write has not written for long.
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

const FIRST_ROWS: usize = 64;
const MOST_ROWS: usize = 512;

pub(super) struct Pace(Mutex<State>);

struct State {
    rows: usize,
    free_until: Instant,
}

impl Pace {
    pub(super) fn new() -> Self {
        Self(Mutex::new(State { rows: FIRST_ROWS, free_until: Instant::now() }))
    }

    /// How many rows the next write takes along.
    pub(super) fn rows(&self) -> usize {
        self.with(|state| state.rows)
    }

    /// Waits until the pause after the last write is over.
    pub(super) async fn pause(&self) {
        let until = self.with(|state| state.free_until);
        tokio::time::sleep_until(until).await;
    }

    /// A write of `asked` rows, which changed `changed` of them, kept other writers out for so long.
    pub(super) fn wrote(&self, asked: usize, changed: usize, took: Duration) {
        self.with(|state| {
            state.rows = next(state.rows, asked, changed, took);
            state.free_until = Instant::now() + took.min(LONGEST_PAUSE);
        });
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The rows of the next write, after one of `asked` rows where `allowed` could have been taken. Rows
/// that are gone already cost nothing, and say nothing about others.
fn next(allowed: usize, asked: usize, changed: usize, took: Duration) -> usize {
    if took > LONG {
        let fit = asked.min(allowed) as f64 * LONG.as_secs_f64() / took.as_secs_f64();
        (fit as usize).max(1)
    } else if took < SHORT && changed >= allowed {
        (allowed * 2).min(MOST_ROWS)
    } else {
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_as_long_as_the_write_but_never_long() {
        let millis = Duration::from_millis;
        // The last one was stopped for an hour.
        for (took, pause) in [(0, 0), (8, 8), (3_600_000, 100)] {
            let pace = Pace::new();
            pace.wrote(64, 64, millis(took));
            let start = Instant::now();
            pace.pause().await;
            assert_eq!(start.elapsed(), millis(pause), "{took} ms");
        }
    }

    #[test]
    fn writes_grow_while_they_are_short_and_shrink_when_they_are_long() {
        let millis = Duration::from_millis;
        assert_eq!(next(64, 64, 64, millis(1)), 128);
        assert_eq!(next(64, 10, 10, millis(1)), 64, "a small write says nothing about larger ones");
        assert_eq!(next(64, 64, 0, millis(1)), 64, "nor does one of rows that are gone");
        assert_eq!(next(64, 64, 64, millis(3)), 64);
        assert_eq!(next(64, 64, 64, millis(8)), 32);
        assert_eq!(next(512, 60, 60, millis(400)), 1, "the next one takes no longer than allowed");
        assert_eq!(next(1, 1, 1, millis(9)), 1);
        assert_eq!(next(MOST_ROWS, MOST_ROWS, MOST_ROWS, millis(0)), MOST_ROWS);
    }
}
