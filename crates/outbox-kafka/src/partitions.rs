//! Partitions that do not answer: what is for them waits outside of the client.
//!
//! A message to a partition without a leader is undecided for the whole message timeout, and so
//! many of them would fill the window of a dispatcher, which knows no partitions. Once one timed
//! out, a single message at a time probes its partition, and all others are not sent.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outbox_core::Message;
use uuid::Uuid;

use crate::builder::Partitioner;

/// How long the number of a topic's partitions is believed, and no question for it repeated.
const COUNTED_FOR: Duration = Duration::from_secs(30);

/// Which partitions answer, as the delivery reports tell.
#[derive(Debug)]
pub(crate) struct Partitions {
    partitioner: Partitioner,
    /// How long a probe may stay without an answer.
    patience: Duration,
    /// Whether there are silent ones; else nothing here costs anything.
    any: AtomicBool,
    topics: Mutex<HashMap<String, Topic>>,
}

/// A topic with silent partitions.
#[derive(Debug, Default)]
struct Topic {
    /// How many partitions it has, once that is known.
    count: Option<i32>,
    asked: Option<Instant>,
    silent: HashMap<i32, Silent>,
    /// When a message without a key may be a probe: of the whole topic one at a time, since it could
    /// have gone elsewhere.
    next_keyless: Option<Instant>,
}

/// When a partition that does not answer may be probed.
#[derive(Debug, Clone, Copy)]
struct Silent {
    /// By a message that belongs there.
    next: Instant,
    /// By one that may go anywhere: not right after one timed out, which would be sent there again.
    next_keyless: Instant,
}

/// Where a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Route {
    /// Where it asks for, or where its key belongs.
    Own,
    /// To this partition: it has no key, and could be drawn to a silent one.
    To(i32),
    /// Nowhere: its partition does not answer.
    Nowhere,
}

impl Partitions {
    pub(crate) fn new(partitioner: Partitioner, patience: Duration) -> Self {
        Self { partitioner, patience, any: AtomicBool::new(false), topics: Mutex::default() }
    }

    /// The leader of the partition answered: by an acknowledgement, or by a refusal.
    pub(crate) fn answered(&self, topic: &str, partition: i32) {
        if !self.any.load(Ordering::Relaxed) {
            return;
        }
        let mut topics = self.lock();
        let Some(found) = topics.get_mut(topic) else { return };
        if found.silent.remove(&partition).is_none() {
            return;
        }
        // Others may be back as well.
        found.next_keyless = None;
        self.tidy(&mut topics, topic);
        drop(topics);
        tracing::info!(topic, partition, "the partition answers again");
    }

    /// A message timed out there; another one may probe.
    pub(crate) fn timed_out(&self, topic: &str, partition: i32, now: Instant) {
        if partition < 0 {
            return;
        }
        let mut topics = self.lock();
        let found = topics.entry(topic.to_owned()).or_default();
        let silent = Silent { next: now, next_keyless: now + self.patience };
        let news = found.silent.insert(partition, silent).is_none();
        self.any.store(true, Ordering::Relaxed);
        drop(topics);
        if news {
            tracing::warn!(topic, partition, "the partition does not answer; messages to it wait");
        }
    }

    /// A topic whose partitions must be counted, for who asks first.
    pub(crate) fn uncounted(&self, now: Instant) -> Option<String> {
        if !self.any.load(Ordering::Relaxed) {
            return None;
        }
        let is_due = |asked| now.saturating_duration_since(asked) >= COUNTED_FOR;
        let mut topics = self.lock();
        let (name, topic) = topics.iter_mut().find(|(_, topic)| topic.asked.is_none_or(is_due))?;
        topic.asked = Some(now);
        Some(name.clone())
    }

    /// A topic has so many partitions. Created anew it may have fewer than were silent.
    pub(crate) fn counted(&self, topic: &str, count: usize) {
        let mut topics = self.lock();
        let Some(found) = topics.get_mut(topic) else { return };
        found.count = i32::try_from(count).ok().filter(|count| *count > 0);
        if let Some(count) = found.count {
            found.silent.retain(|partition, _| *partition < count);
        }
        self.tidy(&mut topics, topic);
    }

    /// Forgets a topic without silent partitions.
    fn tidy(&self, topics: &mut HashMap<String, Topic>, topic: &str) {
        if topics.get(topic).is_some_and(|topic| topic.silent.is_empty()) {
            topics.remove(topic);
        }
        self.any.store(!topics.is_empty(), Ordering::Relaxed);
    }

    /// Where this message goes. A message that goes to a silent partition is its probe.
    pub(crate) fn route(&self, message: &Message, now: Instant) -> Route {
        if !self.any.load(Ordering::Relaxed) {
            return Route::Own;
        }
        let mut topics = self.lock();
        let Some(topic) = topics.get_mut(message.topic()) else { return Route::Own };
        let Some(partition) = self.partition(message, topic.count) else {
            return match (message.key(), topic.count) {
                (None, Some(count)) => topic.anywhere(count, message, self.patience, now),
                _ => Route::Own,
            };
        };
        let Some(silent) = topic.silent.get_mut(&partition) else { return Route::Own };
        if silent.next <= now {
            silent.next = now + self.patience;
            return Route::Own;
        }
        Route::Nowhere
    }

    /// A message was not sent that had this route: if it was a probe, another one may be it.
    pub(crate) fn not_sent(&self, message: &Message, route: Route, now: Instant) {
        if !self.any.load(Ordering::Relaxed) {
            return;
        }
        let mut topics = self.lock();
        let Some(topic) = topics.get_mut(message.topic()) else { return };
        let (partition, is_keyless) = match route {
            Route::Own => (self.partition(message, topic.count), false),
            Route::To(partition) => (Some(partition), true),
            Route::Nowhere => return,
        };
        let Some(silent) = partition.and_then(|partition| topic.silent.get_mut(&partition)) else {
            return;
        };
        silent.next = now;
        if is_keyless {
            silent.next_keyless = now;
            topic.next_keyless = None;
        }
    }

    /// The partition that a message belongs to, as far as that is known here.
    fn partition(&self, message: &Message, count: Option<i32>) -> Option<i32> {
        message.partition().or_else(|| match self.partitioner {
            Partitioner::Murmur2 => Some(murmur2_partition(message.key()?, count?)),
            Partitioner::Crc32 | Partitioner::Fnv1a => None,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Topic>> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Topic {
    /// Where a message goes that may go to any partition: to one that answers, but for a probe now and
    /// then. Where no message belongs to a silent partition, nothing else would ever be sent to it.
    fn anywhere(
        &mut self,
        count: i32,
        message: &Message,
        patience: Duration,
        now: Instant,
    ) -> Route {
        let answering: Vec<i32> = (0..count).filter(|p| !self.silent.contains_key(p)).collect();
        if answering.is_empty() {
            return Route::Own;
        }
        if self.next_keyless.is_none_or(|next| next <= now) {
            let due =
                self.silent.iter_mut().filter(|(_, s)| s.next <= now && s.next_keyless <= now);
            if let Some((partition, silent)) = due.min_by_key(|(_, silent)| silent.next_keyless) {
                // Twice: its timeout is told a while after it.
                let next = now + patience * 2;
                *silent = Silent { next: now + patience, next_keyless: next };
                self.next_keyless = Some(next);
                return Route::To(*partition);
            }
        }
        let draw = Uuid::from(message.id()).as_u128() as usize;
        Route::To(answering[draw % answering.len()])
    }
}

/// The partition of a key as Java clients compute it.
fn murmur2_partition(key: &[u8], count: i32) -> i32 {
    (murmur2(key) & 0x7fff_ffff).cast_signed() % count
}

/// MurmurHash2 with Kafka's seed.
fn murmur2(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let (words, rest) = key.as_chunks::<4>();
    let mut hash = 0x9747_b28c ^ u32::try_from(key.len()).unwrap_or(u32::MAX);
    for word in words {
        let mut k = u32::from_le_bytes(*word).wrapping_mul(M);
        k = (k ^ k >> 24).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ k;
    }
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ hash >> 13).wrapping_mul(M);
    hash ^ hash >> 15
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(15);

    fn to(partition: i32) -> Message {
        Message::builder("t").key("k").partition(partition).payload("p").build().unwrap()
    }

    fn keyed(key: &str) -> Message {
        Message::builder("t").key(key).payload("p").build().unwrap()
    }

    fn partitions() -> Partitions {
        Partitions::new(Partitioner::Murmur2, PATIENCE)
    }

    /// The values of the tests of Kafka's own `Utils.murmur2`.
    #[test]
    fn murmur2_is_that_of_kafka() {
        let values = [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ];
        for (key, hash) in values {
            assert_eq!(murmur2(key.as_bytes()).cast_signed(), hash, "{key}");
        }
    }

    #[test]
    fn after_a_timeout_one_message_at_a_time_probes_the_partition_and_others_pass() {
        let (partitions, now) = (partitions(), Instant::now());
        assert_eq!(partitions.route(&to(1), now), Route::Own);
        partitions.timed_out("t", 1, now);
        assert_eq!(partitions.route(&to(1), now), Route::Own, "the probe");
        assert_eq!(partitions.route(&to(1), now), Route::Nowhere);
        assert_eq!(partitions.route(&to(2), now), Route::Own);
        assert_eq!(partitions.route(&to(1), now + PATIENCE), Route::Own, "the next probe");
        partitions.timed_out("t", 1, now);
        assert_eq!(partitions.route(&to(1), now), Route::Own, "the probe timed out");
        partitions.answered("t", 1);
        assert_eq!(partitions.route(&to(1), now), Route::Own);
        assert_eq!(partitions.route(&to(1), now), Route::Own);
    }

    #[test]
    fn a_probe_that_was_not_sent_is_given_back() {
        let (partitions, now) = (partitions(), Instant::now());
        partitions.timed_out("t", 1, now);
        let route = partitions.route(&to(1), now);
        assert_eq!((route, partitions.route(&to(1), now)), (Route::Own, Route::Nowhere));
        partitions.not_sent(&to(1), Route::Nowhere, now);
        assert_eq!(partitions.route(&to(1), now), Route::Nowhere, "that one was no probe");
        partitions.not_sent(&to(1), route, now);
        assert_eq!(partitions.route(&to(1), now), Route::Own);
        partitions.counted("t", 2);
        let (keyless, later) =
            (Message::builder("t").payload("p").build().unwrap(), now + PATIENCE);
        assert_eq!(partitions.route(&keyless, later), Route::To(1));
        assert_eq!(partitions.route(&keyless, later), Route::To(0));
        partitions.not_sent(&keyless, Route::To(1), later);
        assert_eq!(partitions.route(&keyless, later), Route::To(1));
    }

    #[test]
    fn a_key_belongs_to_its_partition_once_the_partitions_are_counted() {
        let (partitions, now) = (partitions(), Instant::now());
        let silent = murmur2_partition(b"21", 6);
        partitions.timed_out("t", silent, now);
        partitions.route(&to(silent), now);
        assert_eq!(partitions.route(&keyed("21"), now), Route::Own, "nobody counted them");
        assert_eq!(partitions.uncounted(now).as_deref(), Some("t"));
        assert_eq!(partitions.uncounted(now), None, "somebody asks already");
        partitions.counted("t", 6);
        assert_eq!(partitions.route(&keyed("21"), now), Route::Nowhere);
        let mut others = ["abc", "a-little-bit-long-string"].into_iter();
        assert!(others.all(|key| partitions.route(&keyed(key), now) == Route::Own));
        assert!(partitions.uncounted(now + COUNTED_FOR).is_some(), "they may have become more");
    }

    #[test]
    fn a_partition_that_is_no_more_is_forgotten() {
        let (partitions, now) = (partitions(), Instant::now());
        partitions.timed_out("t", 3, now);
        partitions.counted("t", 4);
        assert!(partitions.uncounted(now).is_some());
        partitions.counted("t", 3);
        assert_eq!(partitions.uncounted(now + COUNTED_FOR), None, "nothing is silent");
        assert!(!partitions.any.load(Ordering::Relaxed));
    }

    #[test]
    fn messages_without_a_key_avoid_silent_partitions_but_for_one_at_a_time_that_probes() {
        let (partitions, start) = (partitions(), Instant::now());
        let route = |now| {
            let message = Message::builder("t").payload("p").build().unwrap();
            partitions.route(&message, now)
        };
        partitions.timed_out("t", 0, start);
        partitions.timed_out("t", 1, start);
        partitions.counted("t", 3);
        assert!((0..20).all(|_| route(start) == Route::To(2)), "what timed out goes elsewhere");
        let mut probes = Vec::new();
        for times in [1, 3, 5] {
            let now = start + PATIENCE * times;
            probes.push(route(now));
            assert!((0..20).all(|_| route(now) == Route::To(2)), "one probes at a time");
            assert!((0..20).all(|_| route(now + PATIENCE) == Route::To(2)), "or it is told late");
        }
        probes[..2].sort_by_key(|probe| *probe == Route::To(1));
        assert_eq!(probes[..2], [Route::To(0), Route::To(1)]);
        let later = start + PATIENCE * 8;
        partitions.answered("t", 0);
        assert_eq!(route(later), Route::To(1), "the other one may be back as well");
        partitions.timed_out("t", 0, later);
        partitions.timed_out("t", 2, later);
        assert_eq!(route(later + PATIENCE * 9), Route::Own, "none answers");
        partitions.answered("t", 0);
        assert!((0..20).all(|_| route(later) == Route::To(0)));
    }
}
