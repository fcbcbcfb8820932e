//! The gate of each (topic, key): a queue of rows of which only the first may be sent.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, DefaultHasher, Hash, Hasher};

use super::Time;
use super::topics::TopicId;
use crate::delivery::{Lane, Position};
use crate::message::MessageId;
use crate::seeded::seeded;

/// Hash maps of numbers that iterate in the same order in every run: a simulated seed must replay.
pub(super) type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// Hashes a number by one multiplication; the maps are asked some thirty times for each message.
/// The numbers are positions, lanes, and hashes of keys, none of which an outsider chooses.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u16(&mut self, number: u16) {
        self.write_u64(u64::from(number));
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        // Both halves of the product, since the map uses the low bits and the high ones.
        let product = u128::from(self.0 ^ number ^ 0x2545_f491_4f6c_dd1d)
            * u128::from(0x9e37_79b9_7f4a_7c15_u64);
        self.0 = (product >> 64) as u64 ^ product as u64;
    }
}

/// A (topic, key), as a hash. Two keys that collide share a gate: slower, never out of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct KeyId(u64);

impl KeyId {
    /// The gate of `key`; a message without a key has one of its own.
    pub(super) fn new(topic: TopicId, key: Option<&[u8]>, id: MessageId) -> Self {
        let mut hasher = DefaultHasher::new();
        topic.hash(&mut hasher);
        match key {
            Some(key) => key.hash(&mut hasher),
            None => id.hash(&mut hasher),
        }
        Self(hasher.finish())
    }
}

#[derive(Debug, Clone)]
pub(super) struct Key {
    pub(super) topic: TopicId,
    pub(super) lane: Lane,
    /// Rows that wait, ascending. Outstanding ones are not in it.
    pub(super) queue: VecDeque<Position>,
    /// How many rows are at the broker.
    pub(super) outstanding: usize,
    /// Where the key is listed.
    pub(super) place: Place,
    /// The wait that is in the timer already.
    pub(super) timer: Option<Time>,
    /// Its head is parked or held, and the rows behind gave their content up.
    pub(super) blocked: bool,
}

/// Which list a key is in; an entry of any other list is stale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In none: its head is outstanding, parked, held or being written.
    Nowhere,
    /// Its head can be sent.
    Ready,
    /// Its head must be read first.
    Thirsty,
    /// Its head is being read.
    Reading,
    /// Its topic or its lane does not let it send.
    Stalled,
}

impl Key {
    pub(super) fn new(topic: TopicId, lane: Lane) -> Self {
        Self {
            topic,
            lane,
            queue: VecDeque::new(),
            outstanding: 0,
            place: Place::Nowhere,
            timer: None,
            blocked: false,
        }
    }

    /// Inserts a row in its place.
    pub(super) fn insert(&mut self, position: Position) {
        match self.queue.back() {
            Some(last) if *last > position && !seeded!("failed-rows-go-last") => {
                if let Err(index) = self.queue.binary_search(&position) {
                    self.queue.insert(index, position);
                }
            }
            Some(last) if *last == position => {}
            _ => self.queue.push_back(position),
        }
    }

    pub(super) fn remove(&mut self, position: Position) {
        if let Ok(index) = self.queue.binary_search(&position) {
            self.queue.remove(index);
        }
    }
}
