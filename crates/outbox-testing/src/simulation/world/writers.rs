//! Writers: transactions that add messages, under the lock of their key.

use std::time::Duration;

use outbox_core::{Lane, Message, MessageId};
use rand::Rng;

use super::{LARGE, TOPICS, World};
use crate::simulation::database::Visibility;

impl World {
    /// A writer begins a transaction: it locks the row of its aggregate, adds, and commits or
    /// rolls back some time later.
    pub(super) fn write(&mut self, number: usize) {
        let key = self.random.random_range(0..self.plan.keys);
        let ordered = self.random.random_ratio(9, 10);
        if !ordered {
            return self.write_locked(number, None);
        }
        let lock = format!("key-{key}");
        if self.locks.insert(lock.clone()) {
            self.write_locked(number, Some(lock));
        } else {
            self.waiting.entry(lock).or_default().push(number);
        }
    }

    fn write_locked(&mut self, number: usize, lock: Option<String>) {
        let count = self.random.random_range(1..=4);
        let mut rows = Vec::new();
        if self.random.random_ratio(1, 20) {
            let skipped = self.random.random_range(1..=1_000);
            self.database.skip_ids(skipped);
        }
        for _ in 0..count {
            let topic = self.topic();
            let message = self.message(topic, lock.as_deref());
            let group = lock.as_ref().map(|lock| format!("{topic}/{lock}"));
            let lane = self.lane(lock.as_deref(), message.id());
            let id = self.database.insert(message.clone(), lane, self.now);
            rows.push((id, message.id(), group));
            self.note(|| format!("tx {number} adds row {id} {} {lock:?}", message.id()));
        }
        // In commit order there is one writer at a time, and nothing is open.
        let (written, done) = if self.plan.in_commit_order {
            (Duration::ZERO, Duration::ZERO)
        } else {
            let slow = self.random.random_ratio(1, 15);
            let grace = self.plan.settings.grace.as_millis() as u64;
            let longest = if self.plan.slow_inserts { grace / 4 * 3 } else { 50 };
            let written = self.millis(0, longest);
            (written, written + if slow { self.millis(2_000, 9_000) } else { self.millis(0, 40) })
        };
        let ids: Vec<u64> = rows.iter().map(|(id, ..)| *id).collect();
        let written_now = move |world: &mut Self| {
            for id in &ids {
                if let Some(row) = world.database.rows.get_mut(id) {
                    row.visibility = Visibility::Open;
                }
            }
        };
        if written.is_zero() {
            written_now(self)
        } else {
            self.after(written, written_now)
        }
        let commits = self.random.random_ratio(9, 10);
        let end = move |world: &mut Self| world.end(number, rows, lock, commits);
        if done.is_zero() { end(self) } else { self.after(done, end) }
    }

    fn end(
        &mut self,
        number: usize,
        rows: Vec<(u64, MessageId, Option<String>)>,
        lock: Option<String>,
        commits: bool,
    ) {
        self.note(|| format!("tx {number} {}", if commits { "commits" } else { "rolls back" }));
        for (id, message, group) in rows {
            if commits {
                if let Some(row) = self.database.rows.get_mut(&id) {
                    row.visibility = Visibility::Committed;
                }
                self.log.commit(message, group);
            } else {
                self.database.rows.remove(&id);
            }
        }
        self.writers_left -= 1;
        let Some(lock) = lock else { return };
        // The next writer of the key gets the lock at once: within a millisecond, as in real life.
        match self.waiting.get_mut(&lock).and_then(Vec::pop) {
            Some(next) => self.write_locked(next, Some(lock)),
            None => {
                self.locks.remove(&lock);
            }
        }
    }

    fn topic(&mut self) -> &'static str {
        match self.random.random_range(0..10) {
            0 => TOPICS[1],
            1 => TOPICS[2],
            _ => TOPICS[0],
        }
    }

    fn message(&mut self, topic: &str, key: Option<&str>) -> Message {
        self.made += 1;
        let mut bytes = [0; 16];
        bytes[8..].copy_from_slice(&self.made.to_be_bytes());
        let id = MessageId::from_bytes(bytes);
        let size = if self.random.random_ratio(self.plan.large, 20) { LARGE } else { 10 };
        let builder = Message::builder(topic).id(id).payload(vec![0; size]);
        let builder = match key {
            Some(key) => builder.key(key),
            None => builder,
        };
        if self.random.random_ratio(self.plan.poison.min(1_000), 1_000) {
            // How often it fails; the largest are rejected for good until an operator mends them.
            let times = *[1, 2, 5, u32::MAX].get(self.random.random_range(0..4)).unwrap_or(&1);
            self.rejected.insert(id, times);
        }
        builder.build().expect("the message is valid")
    }

    fn lane(&self, key: Option<&str>, id: MessageId) -> Lane {
        let bytes = key.map_or(&id.as_bytes()[..], str::as_bytes);
        let hash = bytes.iter().fold(7_u32, |hash, byte| hash.wrapping_mul(31) + u32::from(*byte));
        Lane((hash % u32::from(self.plan.lanes)) as u16)
    }
}
