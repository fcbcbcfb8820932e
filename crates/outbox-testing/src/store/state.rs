//! The tables of a [`MemoryStore`](super::MemoryStore) as plain data; `now` is the store's clock.

mod reading;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::num::NonZeroU16;
use std::time::Duration;

use outbox_core::dead_letters::{Cursor, Place};
use outbox_core::delivery::{RowId, Settlement};
use outbox_core::store::{
    Backlog, Failed, KeepLeases, Purge, Release, Settle, Settled, Standing, StoreProfile,
};
use outbox_core::{Lane, LeaseTable, Message, MessageId, Position};

pub(super) struct State {
    lanes: NonZeroU16,
    in_commit_order: bool,
    server: u64,
    last: Position,
    /// Committed rows.
    rows: BTreeMap<Position, Row>,
    /// Rows of transactions that are still open.
    open: BTreeMap<Position, Row>,
    held: BTreeSet<Position>,
    dead: BTreeMap<u64, DeadRow>,
    last_dead: u64,
    archive: Vec<Archived>,
    leases: LeaseTable,
}

struct Row {
    lane: Lane,
    message: Message,
    garbled: bool,
    added_at: Duration,
    attempts: u32,
    revision: u32,
    available_at: Duration,
    /// When and why the row was marked held.
    died: Option<Death>,
    retried: bool,
}

#[derive(Clone)]
pub(super) struct Death {
    pub(super) at: Duration,
    pub(super) failure: String,
}

#[derive(Clone)]
pub(super) struct DeadRow {
    pub(super) message: Message,
    pub(super) garbled: bool,
    pub(super) position: Position,
    pub(super) attempts: u32,
    pub(super) death: Death,
}

struct Archived {
    message: Message,
    at: Duration,
}

impl State {
    pub(super) fn new(lanes: NonZeroU16) -> Self {
        Self {
            lanes,
            in_commit_order: false,
            server: 1,
            last: Position::START,
            rows: BTreeMap::new(),
            open: BTreeMap::new(),
            held: BTreeSet::new(),
            dead: BTreeMap::new(),
            last_dead: 0,
            archive: Vec::new(),
            leases: LeaseTable::new(lanes),
        }
    }

    pub(super) fn profile(&self) -> StoreProfile {
        let profile = StoreProfile::new(self.lanes);
        if self.in_commit_order { profile.in_commit_order() } else { profile }
    }

    pub(super) fn keep_commit_order(&mut self) {
        self.in_commit_order = true;
    }

    pub(super) fn lane_of(&self, message: &Message) -> Lane {
        let id = message.id();
        let hashed = message.key().unwrap_or(id.as_bytes());
        Lane((crc32(hashed) % u32::from(self.lanes.get())) as u16)
    }

    // The application's side -----------------------------------------------------------------

    pub(super) fn add(&mut self, message: Message, now: Duration) -> Position {
        let position = self.next_position();
        let row = Row::new(self.lane_of(&message), message, now);
        self.open.insert(position, row);
        position
    }

    pub(super) fn commit(&mut self, positions: &[Position]) {
        for position in positions {
            if let Some(row) = self.open.remove(position) {
                let committed = if self.in_commit_order { self.next_position() } else { *position };
                self.rows.insert(committed, row);
            }
        }
    }

    pub(super) fn rollback(&mut self, positions: &[Position]) {
        for position in positions {
            self.open.remove(position);
        }
    }

    pub(super) fn fail_over(&mut self, next: Position) {
        assert!(self.open.is_empty(), "a transaction with messages is open during a fail-over");
        let highest = self.rows.keys().next_back().copied().unwrap_or_default();
        self.last = next.previous().max(highest);
        self.server += 1;
    }

    fn next_position(&mut self) -> Position {
        self.last = self.last.next();
        self.last
    }

    // The dispatcher's side ------------------------------------------------------------------

    pub(super) fn keep_leases(&mut self, request: &KeepLeases<'_>, now: Duration) -> Standing {
        let mut standing = self.leases.keep(request, now);
        standing.server = self.server;
        standing
    }

    pub(super) fn release(&mut self, request: &Release<'_>, now: Duration) {
        self.leases.release(request, now);
    }

    pub(super) fn settle(&mut self, request: &Settle<'_>, now: Duration) -> Settled {
        for delivered in request.delivered {
            if let Some(row) = self.take(delivered.id)
                && request.archive
            {
                self.archive.push(Archived { message: row.message, at: now });
            }
        }
        let failed = request.failed.iter();
        let refused = failed.filter(|failed| !self.settle_failed(failed, now));
        Settled::refusing(refused.map(|failed| failed.id.position).collect())
    }

    /// Whether the row was as it was read, and was changed.
    fn settle_failed(&mut self, failed: &Failed, now: Duration) -> bool {
        let Failed { id, lease, read, .. } = failed;
        let Some(row) = self.rows.get_mut(&id.position) else { return false };
        let as_read = row.message.id() == id.message
            && row.attempts == read.attempts
            && row.revision == read.revision;
        if !as_read || row.lane != lease.lane || !self.leases.is_current(lease) {
            return false;
        }
        row.attempts = failed.attempts;
        let death = Death { at: now, failure: failed.failure.to_string() };
        match &failed.settlement {
            Settlement::Retry(wait) => row.available_at = now.saturating_add(*wait),
            Settlement::Dead => {
                row.died = Some(death);
                self.bury(id.position);
            }
            // `Settlement::Held`, and what a newer core may have: it is held.
            _ => {
                row.died = Some(death);
                self.held.insert(id.position);
            }
        }
        true
    }

    pub(super) fn purge(&mut self, request: Purge, now: Duration) -> u64 {
        let old = |copy: &&Archived| now.saturating_sub(copy.at) > request.older_than;
        let count = self.archive.iter().take(request.limit as usize).take_while(old).count();
        self.archive.drain(..count);
        count as u64
    }

    pub(super) fn backlog(&self, now: Duration) -> Backlog {
        let held_keys: HashSet<_> = self.held.iter().filter_map(|at| self.key_at(*at)).collect();
        let flows = |(position, row): &(&Position, &Row)| {
            !self.held.contains(position) && !row.key().is_some_and(|key| held_keys.contains(&key))
        };
        // Positions are handed out as time goes on, so that the first row is the oldest.
        let oldest = self.rows.iter().find(flows);
        let oldest_age = oldest.map(|(_, row)| now.saturating_sub(row.added_at));
        Backlog::new(
            self.rows.len() as u64,
            oldest_age,
            self.held.len() as u64,
            self.dead.len() as u64,
        )
    }

    fn key_at(&self, position: Position) -> Option<(&str, &[u8])> {
        self.rows.get(&position).and_then(Row::key)
    }

    /// Takes the row out of the outbox if it holds this message.
    fn take(&mut self, id: RowId) -> Option<Row> {
        if self.rows.get(&id.position)?.message.id() != id.message {
            return None;
        }
        self.held.remove(&id.position);
        self.rows.remove(&id.position)
    }

    // The operator's side --------------------------------------------------------------------

    /// All held and dead messages in the order of their cursors.
    pub(super) fn died(&self) -> impl Iterator<Item = (Cursor, DeadRow)> {
        let held = self.held.iter().filter_map(|position| {
            let row = self.rows.get(position)?.as_dead(*position)?;
            Some((Cursor { place: Place::Held, row: position.0 }, row))
        });
        let dead = self
            .dead
            .iter()
            .map(|(number, row)| (Cursor { place: Place::Dead, row: *number }, row.clone()));
        held.chain(dead)
    }

    /// Moves a row that died to the dead letters.
    pub(super) fn bury(&mut self, position: Position) {
        self.held.remove(&position);
        if let Some(row) = self.rows.remove(&position)
            && let Some(dead) = row.as_dead(position)
        {
            self.last_dead += 1;
            self.dead.insert(self.last_dead, dead);
        }
    }

    /// Offers a held row again, in its place.
    pub(super) fn unhold(&mut self, position: Position) {
        self.held.remove(&position);
        if let Some(row) = self.rows.get_mut(&position) {
            row.died = None;
            row.attempts = 0;
            row.available_at = Duration::ZERO;
            row.revision += 1;
        }
    }

    /// Offers a dead message again, after everything that was added before.
    pub(super) fn revive(&mut self, number: u64, now: Duration) {
        if let Some(dead) = self.dead.remove(&number) {
            let position = self.next_position();
            let mut row = Row::new(self.lane_of(&dead.message), dead.message, now);
            row.garbled = dead.garbled;
            row.retried = true;
            self.rows.insert(position, row);
        }
    }

    pub(super) fn discard(&mut self, cursor: Cursor) {
        match cursor.place {
            Place::Held => {
                self.held.remove(&Position(cursor.row));
                self.rows.remove(&Position(cursor.row));
            }
            Place::Dead => {
                self.dead.remove(&cursor.row);
            }
        }
    }

    // Looks ----------------------------------------------------------------------------------

    pub(super) fn pending(&self) -> Vec<Message> {
        self.rows.values().map(|row| row.message.clone()).collect()
    }

    pub(super) fn held(&self) -> Vec<Message> {
        let rows = self.held.iter().filter_map(|position| self.rows.get(position));
        rows.map(|row| row.message.clone()).collect()
    }

    pub(super) fn dead(&self) -> Vec<Message> {
        self.dead.values().map(|dead| dead.message.clone()).collect()
    }

    pub(super) fn archived(&self) -> Vec<Message> {
        self.archive.iter().map(|copy| copy.message.clone()).collect()
    }

    pub(super) fn garble(&mut self, id: MessageId) -> bool {
        let row = self.rows.values_mut().find(|row| row.message.id() == id);
        row.map(|row| row.garbled = true).is_some()
    }
}

impl Row {
    fn new(lane: Lane, message: Message, now: Duration) -> Self {
        Self {
            lane,
            message,
            garbled: false,
            added_at: now,
            attempts: 0,
            revision: 0,
            available_at: Duration::ZERO,
            died: None,
            retried: false,
        }
    }

    fn as_dead(&self, position: Position) -> Option<DeadRow> {
        Some(DeadRow {
            message: self.message.clone(),
            garbled: self.garbled,
            position,
            attempts: self.attempts,
            death: self.died.clone()?,
        })
    }

    /// The unit of order, if the message has one.
    fn key(&self) -> Option<(&str, &[u8])> {
        self.message.key().map(|key| (self.message.topic(), key))
    }
}

/// CRC-32 as in zlib and as MySQL's `CRC32()`.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32_is_that_of_mysql() {
        assert_eq!(crc32(b"MySQL"), 3_259_397_556); // The example in MySQL's manual.
        assert_eq!(crc32(b""), 0);
    }
}
