//! What the machine decides by.

use std::collections::HashMap;
use std::time::Duration;

use crate::delivery::WorkerId;
use crate::retry::{Retention, RetryPolicy, TopicPolicy};

/// Everything the machine decides by. Built and checked by the dispatcher's builder.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Settings {
    /// Who this worker is.
    pub worker: WorkerId,
    /// How long a lease lasts.
    pub lease: Duration,
    /// How often leases are kept.
    pub keep_every: Duration,
    /// The longest time a call to the store may take.
    pub statement_deadline: Duration,
    /// What is left between the last possible outcome and the lease's end.
    pub margin: Duration,
    /// The longest time a publish can stay undecided.
    pub undecided: Duration,
    /// For how long an id that was never seen is swept.
    pub grace: Duration,
    /// Rows published and not yet confirmed settled.
    pub rows_in_flight: usize,
    /// Bytes of content held in memory.
    pub bytes_in_flight: usize,
    /// Rows of one page.
    pub page_rows: usize,
    /// Rows of a key that are kept with content while the first one is outstanding.
    pub key_buffer: usize,
    /// Messages of one key that may be outstanding.
    pub in_key_window: usize,
    /// Rows known at most, most of them as ids only.
    pub known_rows: usize,
    /// Rows of one settle.
    pub settle_rows: usize,
    /// How long an acknowledged row waits for others to be settled with.
    pub settle_linger: Duration,
    /// Settles at the same time.
    pub settles: usize,
    /// The shortest interval between pages.
    pub poll_shortest: Duration,
    /// The interval between pages under full load.
    pub poll_busiest: Duration,
    /// The interval between pages when nothing comes.
    pub poll_longest: Duration,
    /// When failed messages are tried again.
    pub retry: RetryPolicy,
    /// Policies by topic.
    pub topics: HashMap<String, TopicPolicy>,
    /// What becomes of delivered rows.
    pub retention: Retention,
    /// How often heads of parked and held keys are read again.
    pub watch_every: Duration,
    /// How often the net that looks for rows no rule foresaw takes a step.
    pub scan_every: Duration,
    /// How often the backlog is counted.
    pub count_every: Duration,
    /// How long a shutdown waits for outcomes.
    pub drain_limit: Duration,
    /// Stop once everything that can be delivered is delivered.
    pub until_empty: bool,
    /// Seed of the jitter.
    pub seed: u64,
}

impl Default for Settings {
    /// The documented defaults: see `DispatcherBuilder`.
    fn default() -> Self {
        Self {
            worker: WorkerId::generate(),
            lease: Duration::from_secs(45),
            keep_every: Duration::from_secs(5),
            statement_deadline: Duration::from_secs(5),
            margin: Duration::from_secs(2),
            undecided: Duration::from_secs(20),
            grace: Duration::from_secs(10),
            rows_in_flight: 20_000,
            bytes_in_flight: 64 << 20,
            page_rows: 4_000,
            key_buffer: 64,
            in_key_window: 1,
            known_rows: 1_000_000,
            settle_rows: 900,
            settle_linger: Duration::from_millis(20),
            settles: 2,
            poll_shortest: Duration::from_millis(1),
            poll_busiest: Duration::from_millis(50),
            poll_longest: Duration::from_millis(300),
            retry: RetryPolicy::default(),
            topics: HashMap::new(),
            retention: Retention::Delete,
            watch_every: Duration::from_secs(2),
            scan_every: Duration::from_secs(5),
            count_every: Duration::from_secs(15),
            drain_limit: Duration::from_secs(25),
            until_empty: false,
            seed: 0,
        }
    }
}

impl Settings {
    /// Sets the lease and everything that follows from it: it is kept nine times, a statement may
    /// take a ninth of it, the margin is a twentieth.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = lease;
        self.keep_every = lease / 9;
        self.statement_deadline = lease / 9;
        self.margin = lease / 20;
        self
    }

    /// The shortest lease under which a worker can publish without gaps: an outcome may take
    /// `undecided`, and two keeps and a statement may pass before a renewal counts.
    pub fn shortest_lease(&self) -> Duration {
        let ours = self.margin + self.keep_every * 2 + self.statement_deadline;
        self.undecided.saturating_add(ours)
    }
}
