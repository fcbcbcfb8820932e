//! A broker in memory that records what arrives and fails as a test asks.

mod faults;
mod published;
mod publishing;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outbox_core::broker::BrokerProfile;
use outbox_core::delivery::Receipt;
use outbox_core::{Delivery, MessageId};
use tokio::sync::Notify;

pub use self::faults::{Fault, Outage};
use self::faults::{Plight, Rule};
pub use self::published::Published;
use crate::Expected;
use crate::expected::{Found, assert_messages};

/// A broker in memory: it keeps what arrives, in order, and fails as a test asks.
///
/// Clones are the same broker. A topic exists unless [`remove_topic`](Self::remove_topic) took it
/// away. Time is tokio's.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use outbox_core::broker::PublishErrorKind;
/// use outbox_testing::MemoryBroker;
///
/// let broker = MemoryBroker::new();
/// broker.fail_next(2, PublishErrorKind::Failed);                   // two messages, then all is well
/// broker.fail_when(|delivery| delivery.message.topic() == "audit", PublishErrorKind::Rejected);
/// let outage = broker.outage();                                    // nothing passes
/// drop(outage);                                                    // until now
/// # }
/// ```
#[derive(Clone, Default)]
pub struct MemoryBroker(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Apart from the state: what a test wrote may look at the broker.
    rules: Mutex<Vec<Rule>>,
    arrived: Notify,
}

struct State {
    profile: BrokerProfile,
    partitions: NonZeroU16,
    latency: Duration,
    published: Vec<Published>,
    offsets: BTreeMap<(String, i32), i64>,
    removed: BTreeSet<String>,
    plights: Vec<Plight>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            profile: BrokerProfile::new(1_000_000, Duration::from_secs(2)),
            partitions: NonZeroU16::new(3).unwrap_or(NonZeroU16::MIN),
            latency: Duration::ZERO,
            published: Vec::new(),
            offsets: BTreeMap::new(),
            removed: BTreeSet::new(),
            plights: Vec::new(),
        }
    }
}

impl MemoryBroker {
    /// A broker without messages or faults. It takes 1,000,000 bytes a message, leaves a publish
    /// undecided for at most 2 s, and every topic has three partitions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets what the broker states about itself.
    #[must_use]
    pub fn with_profile(self, profile: BrokerProfile) -> Self {
        self.lock().profile = profile;
        self
    }

    /// Sets how many partitions every topic has, 3 by default. A message that names another one
    /// fails, as on Kafka.
    #[must_use]
    pub fn with_partitions(self, partitions: NonZeroU16) -> Self {
        self.lock().partitions = partitions;
        self
    }

    /// Lets acknowledgements come this much later than the messages arrive, from now on. A
    /// publish that is dropped in between has published and does not know it.
    pub fn set_latency(&self, latency: Duration) {
        self.lock().latency = latency;
    }

    /// Everything that arrived, in order.
    pub fn published(&self) -> Vec<Published> {
        self.lock().published.clone()
    }

    /// What arrived in one topic, in order.
    pub fn published_to(&self, topic: &str) -> Vec<Published> {
        let state = self.lock();
        state.published.iter().filter(|record| record.topic == topic).cloned().collect()
    }

    /// Waits until at least `count` messages have arrived and returns all of them.
    ///
    /// # Panics
    ///
    /// When they have not after a minute of tokio's clock; the text shows what has.
    pub async fn wait_for(&self, count: usize) -> Vec<Published> {
        const PATIENCE: Duration = Duration::from_secs(60);
        let enough = async {
            loop {
                let mut arrived = std::pin::pin!(self.0.arrived.notified());
                arrived.as_mut().enable();
                let published = self.published();
                if published.len() >= count {
                    return published;
                }
                arrived.await;
            }
        };
        match tokio::time::timeout(PATIENCE, enough).await {
            Ok(published) => published,
            Err(_) => {
                let found = self.published();
                let shown: Vec<_> = found.iter().map(Found::from).map(|r| r.to_string()).collect();
                panic!(
                    "{} of {count} messages arrived within a minute\n    {}",
                    found.len(),
                    shown.join("\n    "),
                )
            }
        }
    }

    /// Asserts that exactly these messages arrived, in this order over all topics.
    ///
    /// # Panics
    ///
    /// When they did not; the text shows what arrived instead.
    #[track_caller]
    pub fn assert_published<E: Into<Expected>>(&self, expected: impl IntoIterator<Item = E>) {
        assert_messages("published", &self.published(), expected);
    }

    /// Asserts what an outbox promises about these messages, named in the order in which they
    /// were committed: each arrived at least once, and the first appearances of each topic and
    /// key follow that order. Further appearances are allowed; other messages are not looked at.
    ///
    /// # Panics
    ///
    /// When a message is missing or two are out of order; the text names them.
    #[track_caller]
    pub fn assert_order_per_key(&self, committed: &[MessageId]) {
        let published = self.published();
        let first = |id: MessageId| published.iter().position(|record| record.message_id == id);
        let mut newest = BTreeMap::new();
        for id in committed {
            let Some(at) = first(*id) else { panic!("message {id} was never published") };
            let Published { topic, key: Some(key), .. } = &published[at] else { continue };
            let before = newest.insert((topic, key), at).unwrap_or(at);
            assert!(
                before <= at,
                "out of order in {topic}, key \"{}\": {} was committed before {id} and appeared \
                 after it",
                key.escape_ascii(),
                published[before].message_id,
            );
        }
    }

    /// Asserts that no message arrived more than once, as is promised when nothing failed.
    ///
    /// # Panics
    ///
    /// When one did; the text names it.
    #[track_caller]
    pub fn assert_no_repetition(&self) {
        let mut seen = BTreeMap::new();
        for (index, record) in self.published().iter().enumerate() {
            let (id, topic) = (record.message_id, &record.topic);
            if let Some(first) = seen.insert(id, index) {
                panic!("message {id} in {topic} was published as number {first} and {index}");
            }
        }
    }

    /// Takes a topic away: publishing to it is answered
    /// [`Destination`](outbox_core::broker::PublishErrorKind::Destination).
    pub fn remove_topic(&self, topic: impl Into<String>) {
        self.lock().removed.insert(topic.into());
    }

    /// Creates a topic that was taken away.
    pub fn create_topic(&self, topic: &str) {
        self.lock().removed.remove(topic);
    }

    /// Lets this fault happen to the next `count` messages that are handed over. A
    /// [`PublishErrorKind`](outbox_core::broker::PublishErrorKind) stands for [`Fault::Refuse`].
    pub fn fail_next(&self, count: usize, fault: impl Into<Fault>) {
        self.rules().push(Rule::next(count, fault.into()));
    }

    /// Lets this fault happen to every message for which `predicate` holds, until
    /// [`heal`](Self::heal). Of several scripts that apply, the oldest one counts. The predicate may
    /// look at the broker, which it sees as it was before the batch, but not change its scripts.
    pub fn fail_when(
        &self,
        predicate: impl FnMut(&Delivery) -> bool + Send + 'static,
        fault: impl Into<Fault>,
    ) {
        self.rules().push(Rule::when(predicate, fault.into()));
    }

    /// Drops all scripts of [`fail_next`](Self::fail_next) and [`fail_when`](Self::fail_when).
    pub fn heal(&self) {
        self.rules().clear();
    }

    /// Refuses everything, checks included, with
    /// [`Unavailable`](outbox_core::broker::PublishErrorKind::Unavailable) until the answer is
    /// dropped.
    #[must_use = "the outage ends when this is dropped"]
    pub fn outage(&self) -> Outage {
        Outage::begin(self, Plight::Refusing)
    }

    /// Swallows everything until the answer is dropped, as an unreachable broker does: what is
    /// published is answered [`Unknown`](outbox_core::broker::PublishErrorKind::Unknown) after the
    /// undecided time, though nothing arrives.
    #[must_use = "the outage ends when this is dropped"]
    pub fn silence(&self) -> Outage {
        Outage::begin(self, Plight::Silent)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rules(&self) -> MutexGuard<'_, Vec<Rule>> {
        self.0.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fault that a script holds for this message.
    fn scripted(&self, delivery: &Delivery) -> Option<Fault> {
        let mut rules = self.rules();
        let fault = rules.iter_mut().find_map(|rule| rule.apply(delivery));
        rules.retain(|rule| !rule.is_spent());
        fault
    }
}

impl State {
    fn record(&mut self, delivery: &Delivery) -> Receipt {
        let partition = self.partition_of(delivery);
        let topic = delivery.message.topic().to_owned();
        let next = self.offsets.entry((topic, partition)).or_default();
        let record = Published::of(delivery, partition, *next);
        *next += 1;
        let receipt = Receipt::new(Some(record.partition), Some(record.offset));
        self.published.push(record);
        receipt
    }

    fn partition_of(&self, delivery: &Delivery) -> i32 {
        let message = &delivery.message;
        message.partition().unwrap_or_else(|| {
            let (id, mut hasher) = (message.id(), DefaultHasher::new());
            message.key().unwrap_or(id.as_bytes()).hash(&mut hasher);
            (hasher.finish() % u64::from(self.partitions.get())) as i32
        })
    }
}

impl fmt::Debug for MemoryBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("MemoryBroker")
            .field("published", &state.published.len())
            .field("profile", &state.profile)
            .finish_non_exhaustive()
    }
}
