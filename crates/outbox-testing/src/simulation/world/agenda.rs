//! What is going to happen, the next first.

use std::cmp::Ordering;

use outbox_core::machine::Time;

use super::World;

pub(super) struct Entry {
    pub(super) at: Time,
    /// Of what is due at once, the earlier planned comes first.
    pub(super) order: u64,
    pub(super) happen: Box<dyn FnOnce(&mut World)>,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}
