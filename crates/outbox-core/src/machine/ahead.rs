//! Looking at what is about to be used, for several messages side by side.
//!
//! With twenty thousand messages under way hardly anything that is known of one is in the processor's
//! caches, and each message would wait for memory some ten times, one after the other. Here nothing
//! waits for anything of another message, so that the processor fetches what several of them need
//! at once. Nothing depends on it.

use std::hint::black_box;

use super::Machine;
use super::keys::{KeyId, Queue};
use crate::delivery::Position;

/// So many messages are looked at together.
pub(super) const AHEAD: usize = 16;

impl Machine {
    /// Keys, and the rows at their heads. At most [`AHEAD`] are looked at.
    pub(super) fn look_at_keys(&self, ids: impl Iterator<Item = KeyId>) {
        self.look_at_rows(self.queues(ids).into_iter().flatten().filter_map(Queue::front));
    }

    /// Keys, and the rows at both ends of their queues. At most [`AHEAD`] are looked at.
    pub(super) fn look_at_queues(&self, ids: impl Iterator<Item = KeyId>) {
        let queues = self.queues(ids);
        self.look_at_rows(queues.into_iter().flatten().filter_map(Queue::front));
        self.look_at_rows(queues.into_iter().flatten().filter_map(Queue::back));
    }

    fn queues(&self, ids: impl Iterator<Item = KeyId>) -> [Option<&Queue>; AHEAD] {
        let mut keys = [None; AHEAD];
        keys.iter_mut().zip(ids).for_each(|(key, id)| *key = self.keys.get(&id));
        keys.map(|key| key.map(|key| &key.queue))
    }

    /// Rows, and what they have of their contents. At most [`AHEAD`] are looked at.
    pub(super) fn look_at_rows(&self, positions: impl Iterator<Item = Position>) {
        let mut rows = [None; AHEAD];
        rows.iter_mut().zip(positions).for_each(|(row, at)| *row = self.rows.get(&at));
        let contents = rows.map(|row| row.and_then(|row| row.content.as_deref()));
        black_box(contents.map(|content| content.map(|delivery| delivery.lane)));
    }
}
