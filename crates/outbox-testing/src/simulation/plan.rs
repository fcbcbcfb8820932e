//! What a run is made of: sizes, limits and faults, all drawn from the seed.

use std::time::Duration;

use outbox_core::machine::Settings;
use outbox_core::retry::{OnDeath, RetryPolicy, TopicPolicy};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

/// Whether faults happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// No fault at all: every message must appear exactly once.
    Calm,
    /// Faults for a while, then none: everything must be delivered in bounded time.
    Stormy,
}

/// What a run is made of.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Plan {
    /// Whether faults happen.
    pub mode: Mode,
    /// Lanes of the store.
    pub lanes: u16,
    /// Workers that share them.
    pub workers: usize,
    /// Transactions that writers begin.
    pub transactions: usize,
    /// Keys they write to.
    pub keys: usize,
    /// The time over which they begin, and over which faults happen.
    pub storm: Duration,
    /// Of a thousand calls to the store, how many lose their request, lose their answer or are slow.
    pub store_faults: u32,
    /// Of a thousand messages, how many are lost, or acknowledged in vain.
    pub broker_faults: u32,
    /// Crashes of workers.
    pub crashes: usize,
    /// Times at which a worker stands still.
    pub pauses: usize,
    /// Outages of the broker.
    pub outages: usize,
    /// Whether one of several workers loses the broker for good.
    pub cut_off: bool,
    /// Times at which the store cannot be reached.
    pub store_outages: usize,
    /// Steps of the store's clock.
    pub clock_steps: usize,
    /// Changes of the server behind the store.
    pub server_changes: usize,
    /// Workers that are shut down and started again.
    pub restarts: usize,
    /// Of a thousand messages, how many the broker rejects, or fails a few times.
    pub poison: u32,
    /// Whether a topic is unknown at first.
    pub unknown_topic: bool,
    /// Whether many reads take long, so that everything else overlaps with them.
    pub slow_reads: bool,
    /// Whether many acknowledgements take long.
    pub slow_answers: bool,
    /// Whether inserts take most of the grace time, and the store's clock steps often meanwhile.
    pub slow_inserts: bool,
    /// How many of twenty messages are large.
    pub large: u32,
    /// Whether ids become visible in order.
    pub in_commit_order: bool,
    /// The machine's settings.
    pub settings: Settings,
}

impl Plan {
    /// The plan that follows from a seed: a random subset of fault kinds each time.
    pub fn of(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed ^ 0x5eed);
        let random = &mut random;
        let mode = if random.random_ratio(1, 5) { Mode::Calm } else { Mode::Stormy };
        let stormy = mode == Mode::Stormy;
        let some = |max: usize, random: &mut SmallRng| {
            if stormy && random.random_bool(0.5) { random.random_range(1..=max) } else { 0 }
        };
        let crashes = some(4, random);
        let pauses = some(3, random);
        let outages = some(2, random);
        let store_outages = some(2, random);
        let clock_steps = some(2, random);
        let server_changes = some(2, random) * usize::from(random.random_ratio(1, 3));
        let store_faults = some(60, random) as u32;
        let broker_faults = some(60, random) as u32;
        let poison = [0, 0, 20, 100].choose(random).copied().unwrap_or(0);
        let unknown_topic = stormy && random.random_ratio(1, 6);
        let workers = *[1, 1, 2, 2, 3].choose(random).unwrap_or(&1);
        let cut_off = stormy && workers > 1 && random.random_ratio(1, 6);
        // Workers that come and go are no fault.
        let restarts = if random.random_ratio(1, 2) { random.random_range(1..=8) } else { 0 };
        let plan = Self {
            mode,
            lanes: random.random_range(1..=6),
            workers,
            transactions: random.random_range(10..=80),
            keys: random.random_range(1..=8),
            storm: Duration::from_secs(random.random_range(2..=20)),
            store_faults,
            broker_faults,
            crashes,
            pauses,
            outages,
            cut_off,
            store_outages,
            clock_steps,
            server_changes,
            restarts,
            poison,
            unknown_topic,
            slow_reads: random.random_ratio(1, 5),
            slow_answers: random.random_ratio(1, 3),
            slow_inserts: false,
            // By draws of their own, so that all other seeds stay what they were.
            large: if SmallRng::seed_from_u64(seed ^ 0x1a26).random_ratio(1, 10) { 12 } else { 1 },
            in_commit_order: random.random_ratio(1, 10),
            settings: settings(random, seed),
        };
        let slow_inserts = SmallRng::seed_from_u64(seed ^ 0x510).random_ratio(1, 20);
        let plan = if slow_inserts { plan.with_slow_inserts() } else { plan };
        let hand_overs = SmallRng::seed_from_u64(seed ^ 0x4a0d).random_ratio(1, 10);
        if hand_overs { plan.with_hand_overs() } else { plan }
    }

    /// Workers come and go all the time, so that lanes are handed over, and hand-overs called off.
    fn with_hand_overs(mut self) -> Self {
        (self.workers, self.restarts, self.slow_answers) = (2, 16, true);
        (self.lanes, self.keys, self.transactions) = (2, 8, 80);
        self.storm = Duration::from_secs(10);
        self
    }

    fn with_slow_inserts(mut self) -> Self {
        (self.slow_inserts, self.in_commit_order) = (true, false);
        if self.mode == Mode::Stormy {
            (self.clock_steps, self.storm) = (20, Duration::from_secs(20));
        }
        self
    }
}

fn settings(random: &mut SmallRng, seed: u64) -> Settings {
    let mut settings = Settings::default().with_lease(Duration::from_secs(6));
    settings.undecided = Duration::from_secs(2);
    settings.grace = Duration::from_millis(random.random_range(200..=3_000));
    settings.rows_in_flight = *[2, 5, 20, 100].choose(random).unwrap_or(&20);
    settings.bytes_in_flight = *[2_000, 20_000, 1_000_000].choose(random).unwrap_or(&20_000);
    settings.page_rows = *[1, 2, 5, 50].choose(random).unwrap_or(&5);
    settings.key_buffer = *[1, 2, 64].choose(random).unwrap_or(&2);
    settings.in_key_window = *[1, 1, 1, 1, 3].choose(random).unwrap_or(&1);
    settings.known_rows = *[30, 100, 10_000].choose(random).unwrap_or(&100);
    settings.settle_rows = *[1, 3, 100].choose(random).unwrap_or(&3);
    settings.settles = random.random_range(1..=3);
    settings.settle_linger = Duration::from_millis(random.random_range(0..=30));
    settings.scan_every = Duration::from_millis(*[500, 5_000].choose(random).unwrap_or(&500));
    settings.watch_every = Duration::from_millis(500);
    settings.retry = RetryPolicy::exponential(Duration::from_millis(200), Duration::from_secs(2));
    if random.random_bool(0.5) {
        settings.retry = settings.retry.max_attempts(random.random_range(1..=4));
    }
    settings.drain_limit = Duration::from_secs(random.random_range(1..=5));
    let skip = TopicPolicy::new().on_death(OnDeath::Skip);
    settings.topics.insert("skipping".into(), skip);
    settings.seed = seed;
    settings
}
