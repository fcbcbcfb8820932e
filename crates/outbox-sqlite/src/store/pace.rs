//! How many rows one write of the relay takes along, and the pause after it.
//!
//! SQLite has one writer at a time, and a writer that finds another one busy sleeps and asks again.
//! So the relay writes in short transactions, whatever the disk and the size of the rows, and
//! leaves at least as much time free between them as they take.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// A write that takes longer is followed by smaller ones.
const LONG: Duration = Duration::from_millis(4);

/// A write that takes less time is followed by larger ones.
const SHORT: Duration = Duration::from_millis(2);

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

    /// A write of `rows` rows kept other writers out for so long.
    pub(super) fn wrote(&self, rows: usize, took: Duration) {
        self.with(|state| {
            state.rows = next(state.rows, rows, took);
            state.free_until = Instant::now() + took;
        });
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The rows of the next write, after one of `wrote` rows where `allowed` could have been taken.
fn next(allowed: usize, wrote: usize, took: Duration) -> usize {
    if took > LONG {
        (allowed / 2).max(1)
    } else if took < SHORT && wrote >= allowed {
        (allowed * 2).min(MOST_ROWS)
    } else {
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_grow_while_they_are_short_and_shrink_when_they_are_long() {
        let millis = Duration::from_millis;
        assert_eq!(next(64, 64, millis(1)), 128);
        assert_eq!(next(64, 10, millis(1)), 64, "a small write says nothing about larger ones");
        assert_eq!(next(64, 64, millis(3)), 64);
        assert_eq!(next(64, 64, millis(9)), 32);
        assert_eq!(next(1, 1, millis(9)), 1);
        assert_eq!(next(MOST_ROWS, MOST_ROWS, millis(0)), MOST_ROWS);
    }
}
