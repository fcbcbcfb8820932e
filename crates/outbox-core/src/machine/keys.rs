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

/// Hashes the block of a number by one multiplication, and keeps its place within the block: the maps
/// are asked some thirty times for each message, and neighbouring positions, which come, are asked
/// for and go together, share what the processor fetches from memory. The numbers are positions,
/// lanes, and hashes of keys, none of which an outsider chooses.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Mix(u64);

impl Mix {
    /// As many places as a map compares at once.
    const BLOCK: u64 = 16;
}

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
        let (block, place) = (number / Self::BLOCK, number % Self::BLOCK);
        // Both halves of the product, since the map uses the low bits and the high ones.
        let product = u128::from(self.0 ^ block ^ 0x2545_f491_4f6c_dd1d)
            * u128::from(0x9e37_79b9_7f4a_7c15_u64);
        let mixed = (product >> 64) as u64 ^ product as u64;
        // Its low bits are the place in the map, and by its highest ones it tells entries apart.
        self.0 = (mixed / Self::BLOCK * Self::BLOCK + place) ^ (place << 58);
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
    pub(super) queue: Queue,
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
            queue: Queue::default(),
            outstanding: 0,
            place: Place::Nowhere,
            timer: None,
            blocked: false,
        }
    }
}

/// Positions, ascending. Most queues have a single one, which needs no memory of its own.
#[derive(Debug, Clone, Default)]
pub(super) struct Queue {
    head: Option<Position>,
    behind: VecDeque<Position>,
}

impl Queue {
    pub(super) fn front(&self) -> Option<Position> {
        self.head
    }

    pub(super) fn back(&self) -> Option<Position> {
        self.behind.back().copied().or(self.head)
    }

    pub(super) fn len(&self) -> usize {
        usize::from(self.head.is_some()) + self.behind.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Position> {
        self.head.into_iter().chain(self.behind.iter().copied())
    }

    pub(super) fn pop_front(&mut self) {
        self.head = self.behind.pop_front();
    }

    /// Inserts a row in its place.
    pub(super) fn insert(&mut self, position: Position) {
        let (Some(head), Some(last)) = (self.head, self.back()) else {
            self.head = Some(position);
            return;
        };
        if position > last || (position < last && seeded!("failed-rows-go-last")) {
            self.behind.push_back(position);
        } else if position < head {
            self.behind.push_front(head);
            self.head = Some(position);
        } else if position != head
            && let Err(index) = self.behind.binary_search(&position)
        {
            self.behind.insert(index, position);
        }
    }

    pub(super) fn remove(&mut self, position: Position) {
        if self.head == Some(position) {
            self.pop_front();
        } else if let Ok(index) = self.behind.binary_search(&position) {
            self.behind.remove(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_holds_each_position_once_in_order() {
        // Every order in which five rows can come, each of them twice.
        for order in 0..5_usize.pow(5) {
            let mut queue = Queue::default();
            let mut expected = std::collections::BTreeSet::new();
            for place in 0..5 {
                let position = Position((order / 5_usize.pow(place) % 5) as u64 + 1);
                queue.insert(position);
                queue.insert(position);
                expected.insert(position);
            }
            assert!(queue.iter().eq(expected.iter().copied()), "{queue:?}");
            assert_eq!(queue.len(), expected.len());
            assert_eq!(queue.front(), expected.first().copied());
            assert_eq!(queue.back(), expected.last().copied());
            for position in (1..=5).map(Position) {
                let mut rest = queue.clone();
                rest.remove(position);
                assert!(rest.iter().eq(expected.iter().copied().filter(|p| *p != position)));
            }
            while let Some(first) = expected.pop_first() {
                assert_eq!(queue.front(), Some(first));
                queue.pop_front();
            }
            assert!(queue.is_empty());
        }
    }

    #[test]
    fn neighbours_lie_side_by_side_and_far_ones_anywhere() {
        let hash = |position: u64| {
            let mut hasher = Mix::default();
            Position(position).hash(&mut hasher);
            hasher.finish()
        };
        let mut blocks = std::collections::HashSet::new();
        for block in 0..1_000 {
            let first = hash(block * 16);
            for place in 0..16 {
                assert_eq!(hash(block * 16 + place) & 0xffff, (first & 0xffff) + place);
            }
            blocks.insert(first & 0xffff);
        }
        // By chance alone some 100 of 1,000 blocks share one of 4,096 places.
        assert!(blocks.len() > 850, "{}", blocks.len());
    }
}
