//! The dispatcher's settings, their defaults, and the checks that need no I/O.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Dispatcher, initial_status};
use crate::broker::Broker;
use crate::machine::Settings;
use crate::observe::Observer;
use crate::retry::{Retention, RetryPolicy, TopicPolicy};
use crate::store::Store;
use crate::wake::Wake;

/// The longest that a dispatcher may be told to wait for anything. Stores count on it: what is
/// longer than a year does not fit every database's clock.
const LONGEST: Duration = Duration::from_secs(365 * 24 * 3_600);
/// The shortest lease, however quick the broker is: it is kept nine times, and a statement has to
/// fit in between.
const SHORTEST_LEASE: Duration = Duration::from_secs(1);

/// Configures a [`Dispatcher`]. Every default can stay as it is. No time but
/// the retention may be longer than 365 days.
///
/// | setting | default | what it bounds |
/// |---|---|---|
/// | lease | 45 s | how long a dead worker's lanes wait; kept every lease / 9 |
/// | rows in flight | 20,000 | duplicates per fault: published and not yet settled |
/// | bytes in flight | 64 MiB | memory for contents, the broker's client included; a quarter more at times |
/// | messages of one key in flight | 1 | order under failures; more gives order up when one fails |
/// | interval between pages | 1 ms to 300 ms | latency against idle cost |
/// | grace | 10 s | how long an id that was never seen is swept |
/// | retry | 1 s to 5 min, attempts unlimited | |
/// | on death | hold | |
/// | retention | delete | |
/// | drain limit | 25 s | how long a shutdown takes at most, and a few statements more |
#[must_use = "a builder does nothing until `build` is called"]
pub struct DispatcherBuilder {
    store: Arc<dyn Store>,
    broker: Arc<dyn Broker>,
    settings: Settings,
    observers: Vec<Box<dyn Observer>>,
    wake: Wake,
}

impl DispatcherBuilder {
    pub(super) fn new(store: Arc<dyn Store>, broker: Arc<dyn Broker>) -> Self {
        let settings = Settings::default();
        Self { store, broker, settings, observers: Vec::new(), wake: Wake::default() }
    }

    /// Sets how long a lease lasts: how long the lanes of a worker that died wait for another. It
    /// must leave room for the broker's longest undecided time, which `build` checks.
    pub fn lease(mut self, lease: Duration) -> Self {
        self.settings = self.settings.with_lease(lease);
        self
    }

    /// Sets how many rows may be published and not yet confirmed settled: the bound of duplicates
    /// per fault.
    ///
    /// What goes to a partition without a leader stays in flight for the broker's undecided time.
    /// In a window with too little room for that, everything else waits as well: allow several
    /// times what one partition gets in that time. A client of a broker may have a bound of its own:
    /// librdkafka's queue takes 100,000 messages (`queue.buffering.max.messages`).
    pub fn rows_in_flight(mut self, rows: usize) -> Self {
        self.settings.rows_in_flight = rows;
        self
    }

    /// Sets how many bytes of content are held in memory, 64 MiB by default: of messages that were
    /// sent and not answered, and of those that are to be sent next. Up to a quarter more is held at
    /// times, of messages that others wait for above all, and a few messages beyond, however large.
    /// One publish takes an eighth of them, or one message.
    pub fn bytes_in_flight(mut self, bytes: usize) -> Self {
        self.settings.bytes_in_flight = bytes;
        self
    }

    /// Lets several messages of one (topic, key) be outstanding. If one of them fails, later ones
    /// may already have passed it: order per key then holds only without failures.
    pub fn in_key_window(mut self, messages: usize) -> Self {
        self.settings.in_key_window = messages;
        self
    }

    /// Sets the shortest and the longest interval between pages (1 ms and 300 ms). It is the shortest
    /// while few messages come, grows with their number to 50 ms, so that a busy database is left to
    /// its writers, and is the longest when none come.
    pub fn poll(mut self, shortest: Duration, longest: Duration) -> Self {
        self.settings.poll_shortest = shortest;
        self.settings.poll_longest = longest;
        self
    }

    /// Sets for how long an id that was never seen is swept by every claim. Longer than the time
    /// between the start and the commit of an insert statement; transactions that stay open
    /// longer are seen anyway.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.settings.grace = grace;
        self
    }

    /// Sets when failed messages are tried again.
    pub fn retry(mut self, retry: RetryPolicy) -> Self {
        self.settings.retry = retry;
        self
    }

    /// Sets a policy for one topic.
    pub fn topic(mut self, name: impl Into<String>, policy: TopicPolicy) -> Self {
        self.settings.topics.insert(name.into(), policy);
        self
    }

    /// Sets what becomes of delivered messages.
    pub fn retention(mut self, retention: Retention) -> Self {
        self.settings.retention = retention;
        self
    }

    /// Sets how long a shutdown waits for outcomes.
    pub fn drain_limit(mut self, limit: Duration) -> Self {
        self.settings.drain_limit = limit;
        self
    }

    /// Listens to writers of the same process: pass the same [`Wake`] to
    /// [`Outbox::with_wake`](crate::Outbox::with_wake).
    pub fn wake(mut self, wake: Wake) -> Self {
        self.wake = wake;
        self
    }

    /// Adds an observer of what happens.
    pub fn observer(mut self, observer: impl Observer) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Checks everything that needs no I/O and builds the dispatcher.
    ///
    /// # Errors
    ///
    /// [`BuildErrorKind`] names the setting that cannot be.
    pub fn build(mut self) -> Result<Dispatcher, BuildError> {
        self.settings.undecided = self.broker.profile().undecided;
        check(&self.settings)?;
        Ok(Dispatcher {
            store: self.store,
            broker: self.broker,
            settings: self.settings,
            observers: self.observers.into(),
            wake: self.wake,
            status: Arc::new(Mutex::new(initial_status())),
        })
    }
}

fn check(settings: &Settings) -> Result<(), BuildError> {
    let topics = settings.topics.values();
    let mut retries = topics.filter_map(|policy| policy.retry).chain([settings.retry]);
    let kind = if let Some(setting) = too_long(settings) {
        BuildErrorKind::TooLong { setting }
    } else if settings.lease < settings.shortest_lease().max(SHORTEST_LEASE) {
        BuildErrorKind::Lease { shortest: shortest_lease(settings) }
    } else if settings.rows_in_flight == 0
        || settings.bytes_in_flight == 0
        || settings.in_key_window == 0
    {
        BuildErrorKind::Window
    } else if settings.poll_shortest.is_zero() || settings.poll_shortest > settings.poll_longest {
        BuildErrorKind::Poll
    } else if settings.grace.is_zero() {
        BuildErrorKind::Grace
    } else if !retries.all(|retry| retry.is_valid()) {
        BuildErrorKind::Retry
    } else if settings.retention == Retention::Keep(Duration::ZERO) {
        BuildErrorKind::Retention
    } else {
        return Ok(());
    };
    Err(BuildError { kind })
}

/// The setting that is longer than anything may be.
fn too_long(settings: &Settings) -> Option<&'static str> {
    let retries = settings.topics.values().filter_map(|policy| policy.retry);
    let cap = retries.chain([settings.retry]).map(|retry| retry.cap()).max();
    let all = [
        ("lease", settings.lease),
        ("poll", settings.poll_longest),
        ("grace", settings.grace),
        ("drain_limit", settings.drain_limit),
        ("retry", cap.unwrap_or_default()),
    ];
    all.into_iter().find(|(_, time)| *time > LONGEST).map(|(setting, _)| setting)
}

/// The shortest lease that would pass, rounded up to a second.
fn shortest_lease(settings: &Settings) -> Duration {
    // keep, statement and margin are parts of the lease: solve lease >= undecided + share * lease.
    let share = 3.0 / 9.0 + 1.0 / 20.0;
    let seconds = (settings.undecided.as_secs_f64() / (1.0 - share)).ceil();
    Duration::from_secs(seconds as u64).max(SHORTEST_LEASE)
}

impl fmt::Debug for DispatcherBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DispatcherBuilder")
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Settings that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{kind}")]
pub struct BuildError {
    kind: BuildErrorKind,
}

impl BuildError {
    /// Which setting cannot be.
    pub fn kind(&self) -> BuildErrorKind {
        self.kind
    }
}

/// Which setting cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildErrorKind {
    /// The lease leaves no time to publish in: the broker may take too long to decide.
    #[error(
        "lease is too short for the broker's longest undecided time: it must be at least \
         {shortest:?}"
    )]
    Lease {
        /// The shortest lease that would do.
        shortest: Duration,
    },
    /// A time that is longer than a year.
    #[error("`{setting}` must be at most 365 days")]
    TooLong {
        /// The method of the builder that set it.
        setting: &'static str,
    },
    /// A grace of zero: an id whose insert is under way would not be looked for again.
    #[error("grace must be above zero")]
    Grace,
    /// A window of zero rows, bytes or messages.
    #[error("windows must not be zero")]
    Window,
    /// The shortest interval between pages is zero, or longer than the longest.
    #[error("poll intervals must be above zero, the shortest first")]
    Poll,
    /// A retry policy that starts at zero, above its cap, or with no attempt at all.
    #[error("retry waits must be above zero and below their cap, with at least one attempt")]
    Retry,
    /// A retention of zero: say `Retention::Delete`.
    #[error("retention must be above zero")]
    Retention,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(change: impl FnOnce(&mut Settings)) -> Option<BuildErrorKind> {
        let mut settings = Settings::default();
        change(&mut settings);
        check(&settings).err().map(|error| error.kind())
    }

    #[test]
    fn the_defaults_are_valid_and_every_contradiction_is_refused() {
        assert_eq!(kind(|_| ()), None);
        let slow = kind(|s| s.undecided = Duration::from_secs(40));
        assert!(matches!(slow, Some(BuildErrorKind::Lease { .. })));
        assert_eq!(kind(|s| s.rows_in_flight = 0), Some(BuildErrorKind::Window));
        assert_eq!(kind(|s| s.poll_shortest = Duration::ZERO), Some(BuildErrorKind::Poll));
        let never = RetryPolicy::default().max_attempts(0);
        assert_eq!(kind(|s| s.retry = never), Some(BuildErrorKind::Retry));
        let zero = Retention::Keep(Duration::ZERO);
        assert_eq!(kind(|s| s.retention = zero), Some(BuildErrorKind::Retention));
    }

    #[test]
    fn a_time_of_zero_is_refused_where_it_could_not_be_kept() {
        let zero = Duration::ZERO;
        let lease = |s: &mut Settings| *s = s.clone().with_lease(zero);
        assert!(matches!(kind(lease), Some(BuildErrorKind::Lease { .. })));
        let quick = kind(|s| {
            s.undecided = zero;
            *s = s.clone().with_lease(zero);
        });
        assert_eq!(quick, Some(BuildErrorKind::Lease { shortest: SHORTEST_LEASE }));
        assert_eq!(kind(|s| s.poll_longest = zero), Some(BuildErrorKind::Poll));
        assert_eq!(kind(|s| s.grace = zero), Some(BuildErrorKind::Grace));
        for (first, cap) in [(zero, zero), (zero, LONGEST), (LONGEST, zero)] {
            let retry = RetryPolicy::exponential(first, cap);
            assert_eq!(kind(|s| s.retry = retry), Some(BuildErrorKind::Retry));
            let topic = TopicPolicy::new().retry(retry);
            let of_topic = kind(|s| s.topics.extend([("t".to_owned(), topic)]));
            assert_eq!(of_topic, Some(BuildErrorKind::Retry));
        }
        assert_eq!(kind(|s| s.drain_limit = zero), None, "a shutdown that waits for nothing");
    }

    #[test]
    fn a_time_beyond_every_clock_is_refused_by_the_name_of_its_setting() {
        for time in [Duration::MAX, LONGEST + Duration::from_nanos(1)] {
            let retry = RetryPolicy::exponential(Duration::from_secs(1), time);
            let topic = TopicPolicy::new().retry(retry);
            let too_long = [
                ("lease", kind(|s| *s = s.clone().with_lease(time))),
                ("poll", kind(|s| (s.poll_shortest, s.poll_longest) = (time, time))),
                ("poll", kind(|s| s.poll_longest = time)),
                ("grace", kind(|s| s.grace = time)),
                ("drain_limit", kind(|s| s.drain_limit = time)),
                ("retry", kind(|s| s.retry = retry)),
                ("retry", kind(|s| s.topics.extend([("t".to_owned(), topic)]))),
            ];
            for (setting, kind) in too_long {
                assert_eq!(kind, Some(BuildErrorKind::TooLong { setting }), "{time:?}");
            }
            let shortest = kind(|s| s.undecided = Duration::MAX);
            assert!(matches!(shortest, Some(BuildErrorKind::Lease { .. })));
            assert_eq!(kind(|s| s.retention = Retention::Keep(time)), None, "for ever");
        }
        let longest = kind(|s| {
            *s = s.clone().with_lease(LONGEST);
            (s.poll_longest, s.grace, s.drain_limit) = (LONGEST, LONGEST, LONGEST);
            s.retry = RetryPolicy::exponential(LONGEST, LONGEST);
        });
        assert_eq!(longest, None);
    }

    #[test]
    fn the_lease_that_the_error_names_would_do() {
        for undecided in [2, 20, 33, 300] {
            let undecided = Duration::from_secs(undecided);
            let settings = Settings { undecided, ..Settings::default() };
            let settings = settings.clone().with_lease(shortest_lease(&settings));
            assert_eq!(check(&settings), Ok(()));
        }
    }
}
