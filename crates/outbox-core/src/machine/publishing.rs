//! Sending: which rows may go now, and what the answers mean for them.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use super::ahead::AHEAD;
use super::keys::{Key, KeyId, Place};
use super::topics::{SLOW, TopicId};
use super::{Action, Machine, Phase, Stage, Time};
use crate::broker::{Outcome, PublishErrorKind};
use crate::delivery::{Delivery, Failure, Lane, Lease, Position, Receipt, RowId, Settlement};
use crate::observe::Event;
use crate::retry::{OnDeath, RetryPolicy};
use crate::seeded::seeded;
use crate::store::{Delivered, Failed};

/// Messages of one publish at most.
const BATCH_ROWS: usize = 4_000;
/// The part of the bytes in flight that one publish may take: a broker may keep all of it until its
/// last message is answered, and what was answered is not counted any more.
const BATCH_SHARE: usize = 8;
/// A publish that the window would cut short waits for more room, so long after the last one.
const GATHER: Duration = Duration::from_millis(50);
/// Messages that were certainly not sent are offered again on this schedule: as long as their
/// partition does not answer there may be many of them.
const NOT_SENT: RetryPolicy =
    RetryPolicy::exponential(Duration::from_millis(100), Duration::from_secs(10));
/// While the broker cannot be used, its circuit makes everything wait.
const UNAVAILABLE_WAIT: Duration = Duration::from_millis(100);
/// Messages whose outcome is unknown are sent again on this schedule; nothing is counted.
pub(super) const AMBIGUOUS: RetryPolicy =
    RetryPolicy::exponential(Duration::from_secs(1), Duration::from_secs(60));

/// Messages that were handed to the broker together.
#[derive(Debug, Clone)]
pub(super) struct Batch {
    entries: Vec<Option<Entry>>,
    open: usize,
    sent: Time,
}

#[derive(Debug, Clone)]
struct Entry {
    position: Position,
    key: KeyId,
    topic: TopicId,
    lane: Lane,
    bytes: usize,
}

impl Batch {
    pub(super) fn has_lane(&self, lane: Lane) -> bool {
        self.entries.iter().flatten().any(|entry| entry.lane == lane)
    }

    /// Whether what has no answer has waited for long.
    pub(super) fn is_slow(&self, now: Time) -> bool {
        now.saturating_sub(self.sent) >= SLOW
    }

    /// The keys of its messages without an answer.
    pub(super) fn keys(&self) -> impl Iterator<Item = KeyId> {
        self.entries.iter().flatten().map(|entry| entry.key)
    }
}

impl Machine {
    /// Puts a key where its head belongs. Called whenever anything about it changed.
    pub(super) fn place(&mut self, id: KeyId, now: Time) {
        let Some(key) = self.keys.get_mut(&id) else { return };
        let before = std::mem::replace(&mut key.place, Place::Nowhere);
        let Some(head) = key.queue.front() else {
            if key.outstanding == 0 {
                self.keys.remove(&id);
            }
            return;
        };
        // Only messages of one batch overlap within a key: their order is the batch's.
        if key.outstanding > 0 {
            return;
        }
        let Some(row) = self.rows.get_mut(&head) else { return };
        if matches!(row.phase, Phase::Writing | Phase::Unclear) {
            return;
        }
        if row.parked_until.is_some_and(|until| until <= now) {
            row.parked_until = None;
        }
        if row.held || row.parked_until.is_some() {
            let wait = row.parked_until.filter(|_| !row.held);
            return self.block(id, head, wait);
        }
        self.watched.remove(&head);
        key.blocked = false;
        if row.unreadable.is_some() {
            return self.condemn_unreadable(head);
        }
        let ready = row.content.is_some();
        match (ready, before) {
            (true, Place::Ready) | (false, Place::Thirsty) => key.place = before,
            (true, _) => {
                key.place = Place::Ready;
                self.ready.push_back((id, key.topic));
                self.topics.get_mut(key.topic).ready += 1;
            }
            (false, _) => {
                key.place = Place::Thirsty;
                self.thirsty.push_back(id);
            }
        }
    }

    /// The head of this key is parked until then, or held: nothing behind it may go.
    fn block(&mut self, id: KeyId, head: Position, until: Option<Time>) {
        match until {
            // Its timer reads it again.
            Some(_) => self.watched.remove(&head),
            None => self.watched.insert(head),
        };
        let Some(key) = self.keys.get_mut(&id) else { return };
        if until.is_some() && key.timer != until {
            key.timer = until;
            self.parked.extend(until.map(|until| Reverse((until, id))));
        }
        if !std::mem::replace(&mut key.blocked, true) {
            self.strip(id, 0);
        }
    }

    /// Lets keys of a topic try again, as many as it may send now: more would only be put back,
    /// key by key, each time an answer makes room for one.
    pub(super) fn unstall(&mut self, topic: TopicId, now: Time) {
        let bytes_share = self.bytes_share();
        let closed = self.topics.get(topic).is_closed();
        let mut rounds = if closed { 1 } else { self.topics.get(topic).room() };
        while rounds > 0 && self.topics.get(topic).allows(bytes_share, now) {
            let Some(id) = self.topics.get_mut(topic).next_stalled() else { return };
            if self.keys.get(&id).is_some_and(|key| key.place == Place::Stalled) {
                self.place(id, now);
                rounds -= 1;
            }
            if closed && !self.ready.is_empty() {
                return;
            }
        }
    }

    pub(super) fn next_publish(&mut self, now: Time) -> Option<Action> {
        if self.stage != Stage::Running {
            return None;
        }
        let room = self.settings.rows_in_flight.saturating_sub(self.in_flight());
        let room = if seeded!("unbounded-in-flight") { BATCH_ROWS } else { room };
        if self.is_gathering(now) {
            return None;
        }
        let limit = self.circuit.allows(room.min(BATCH_ROWS), now);
        let at_most = limit.min(self.ready.len());
        let (mut entries, mut deliveries) =
            (Vec::with_capacity(at_most), Vec::with_capacity(at_most));
        while limit > 0 && entries.is_empty() {
            if self.ready.is_empty() {
                return None;
            }
            self.choose(limit, &mut entries, &mut deliveries, now);
            if entries.is_empty() {
                // Stale entries were counted as what their topic may send.
                self.topics.ids().for_each(|topic| self.unstall(topic, now));
            }
        }
        if entries.is_empty() {
            return None;
        }
        let random = self.chance();
        self.circuit.sent(entries.len(), now, random);
        self.published_at = now;
        let number = self.next_batch;
        self.next_batch += 1;
        self.offered += entries.len();
        let open = entries.len();
        self.batches.insert(number, Batch { entries, open, sent: now });
        Some(Action::Publish(number, deliveries))
    }

    /// Whether the window would cut a publish short that is worth waiting for: large batches cost
    /// the client and the broker a fraction of what small ones do.
    pub(super) fn is_gathering(&self, now: Time) -> bool {
        let window = self.settings.rows_in_flight;
        let worth_while = (window / 5 * 2).min(BATCH_ROWS).min(self.ready.len());
        window.saturating_sub(self.in_flight()) < worth_while && now < self.gather_until()
    }

    pub(super) fn gather_until(&self) -> Time {
        self.published_at + GATHER
    }

    /// Takes up to `limit` messages whose turn it is, and no more bytes than one publish may hold
    /// but for the last message.
    fn choose(
        &mut self,
        limit: usize,
        entries: &mut Vec<Option<Entry>>,
        deliveries: &mut Vec<(Box<Delivery>, Time)>,
        now: Time,
    ) {
        let bytes_share = self.bytes_share();
        let room = self.settings.bytes_in_flight / BATCH_SHARE;
        let mut bytes = 0;
        let mut looked_at = 0;
        while entries.len() < limit && bytes <= room {
            if looked_at == 0 {
                self.look_at_keys(self.ready.iter().map(|(id, _)| *id));
                looked_at = AHEAD;
            }
            looked_at -= 1;
            let Some((id, topic)) = self.ready.pop_front() else { break };
            self.topics.get_mut(topic).ready -= 1;
            let Some(key) = self.keys.get_mut(&id) else { continue };
            if key.place != Place::Ready {
                continue;
            }
            key.place = Place::Nowhere;
            let lane = key.lane;
            let Some(not_after) = self.send_until(lane, now) else {
                self.set_place(id, Place::Stalled);
                self.stalled_by_lane.push(id);
                if self.leases.get(lane).is_none_or(|held| held.draining.is_some()) {
                    self.strip(id, 0);
                }
                continue;
            };
            if !self.topics.get(topic).allows(bytes_share, now) {
                self.set_place(id, Place::Stalled);
                self.topics.get_mut(topic).stall(id);
                if self.topics.get(topic).is_closed() {
                    self.strip(id, 0);
                }
                continue;
            }
            let gate = if seeded!("no-gate") { usize::MAX } else { self.settings.in_key_window };
            while entries.len() < limit && bytes <= room && self.keys[&id].outstanding < gate {
                let Some((entry, delivery)) = self.offer_head(id, now) else { break };
                bytes += entry.bytes;
                entries.push(Some(entry));
                deliveries.push((delivery, not_after));
            }
            self.place(id, now);
        }
    }

    /// No topic may take the whole window, in bytes as in rows.
    fn bytes_share(&self) -> usize {
        (self.settings.bytes_in_flight / 2).max(1)
    }

    fn set_place(&mut self, id: KeyId, place: Place) {
        if let Some(key) = self.keys.get_mut(&id) {
            key.place = place;
        }
    }

    /// Until when messages of a lane may be sent; `None` when it is too late already.
    fn send_until(&self, lane: Lane, now: Time) -> Option<Time> {
        let held = self.leases.get(lane)?;
        let reserve = self.settings.undecided + self.settings.margin;
        let reserve = if seeded!("publish-past-the-deadline") { Time::ZERO } else { reserve };
        let not_after = held.until.saturating_sub(reserve);
        (held.draining.is_none() && now < not_after).then_some(not_after)
    }

    /// Takes the head of a key's queue to the broker, if it is loaded and nothing holds it.
    fn offer_head(&mut self, id: KeyId, now: Time) -> Option<(Entry, Box<Delivery>)> {
        let key = self.keys.get_mut(&id)?;
        let position = key.queue.front()?;
        let row = self.rows.get_mut(&position)?;
        let free = row.phase == Phase::Queued
            && !row.held
            && row.parked_until.is_none()
            && row.unreadable.is_none();
        let delivery = if free { row.content.take()? } else { return None };
        row.phase = Phase::Offered;
        key.queue.pop_front();
        key.outstanding += 1;
        self.topics.get_mut(row.topic).sent(row.bytes());
        let entry =
            Entry { position, key: id, topic: row.topic, lane: row.lane, bytes: row.bytes() };
        if seeded!("settled-before-the-answer") {
            let delivered = Delivered::new(RowId::new(position, row.id), Receipt::default());
            self.unsettled.acknowledged(delivered, row.lane, now);
        }
        Some((entry, delivery))
    }

    // ---- answers -------------------------------------------------------------------------------

    pub(super) fn all_answered(&mut self, batch: u64, answers: Vec<(usize, Outcome)>, now: Time) {
        let mut answers = answers.into_iter();
        while !answers.as_slice().is_empty() {
            if let Some(batch) = self.batches.get(&batch) {
                let entries = || {
                    let ahead = answers.as_slice().iter().take(AHEAD);
                    ahead.filter_map(|(index, _)| batch.entries.get(*index)?.as_ref())
                };
                self.look_at_rows(entries().map(|entry| entry.position));
                self.look_at_keys(entries().map(|entry| entry.key));
            }
            for (index, outcome) in answers.by_ref().take(AHEAD) {
                self.answered(batch, index, outcome, now);
            }
        }
    }

    fn answered(&mut self, batch: u64, index: usize, outcome: Outcome, now: Time) {
        let Some(open) = self.batches.get_mut(&batch) else { return };
        let index = index + usize::from(seeded!("answers-shifted"));
        let Some(entry) = open.entries.get_mut(index).and_then(Option::take) else { return };
        open.open -= 1;
        let sent = open.sent;
        if open.open == 0 {
            self.batches.remove(&batch);
        }
        self.offered -= 1;
        self.loaded_rows -= 1;
        self.loaded_bytes -= entry.bytes;
        self.topics.answered(entry.topic, batch, entry.bytes);
        if let Some(key) = self.keys.get_mut(&entry.key) {
            key.outstanding -= 1;
        }
        match outcome {
            Outcome::Delivered(receipt) => self.acknowledged(&entry, receipt, now),
            Outcome::Failed(PublishErrorKind::Unknown, _) if seeded!("timeout-is-delivered") => {
                self.acknowledged(&entry, Receipt::default(), now);
            }
            Outcome::Failed(kind, failure) => self.failed(&entry, kind, failure, sent, now),
        }
        self.place(entry.key, now);
    }

    /// Whatever the broker did not answer may have been published.
    pub(super) fn publish_ended(&mut self, batch: u64, now: Time) {
        let count = self.batches.get(&batch).map_or(0, |batch| batch.entries.len());
        let count = if seeded!("no-watchdog") { 0 } else { count };
        for index in 0..count {
            let failure = Failure::new(PublishErrorKind::Unknown.class(), "no answer");
            let unknown = Outcome::Failed(PublishErrorKind::Unknown, failure);
            self.answered(batch, index, unknown, now);
        }
    }

    fn acknowledged(&mut self, entry: &Entry, receipt: Receipt, now: Time) {
        if !seeded!("circuit-stays-open")
            && let Some(since) = self.circuit.acknowledged(now)
        {
            self.tell(Event::CircuitClosed { after: now.saturating_sub(since) });
            self.pace.hurry(now);
        }
        let name = Arc::clone(&self.topics.get(entry.topic).name);
        let closed_at = self.topics.get(entry.topic).closed_since();
        if self.topics.acknowledged(entry.topic) {
            let after = now.saturating_sub(closed_at.unwrap_or(now));
            self.tell(Event::TopicOpened { topic: Arc::clone(&name), after });
        }
        self.last_progress = now;
        self.given_up = 0;
        let Some(row) = self.rows.get_mut(&entry.position) else { return };
        row.phase = Phase::Acknowledged;
        let id = row.id;
        let latency = now.saturating_sub(row.added_at);
        self.tell(Event::Published { topic: name, id, latency, receipt });
        let delivered = Delivered::new(RowId::new(entry.position, id), receipt);
        self.unsettled.acknowledged(delivered, entry.lane, now);
    }

    /// A message was refused for itself or for its topic.
    fn refused(&mut self, now: Time) {
        self.circuit.inconclusive(now);
        // Not before a worker that is in trouble gives its lanes up: a message may be in doubt for as
        // long, again and again.
        let long = self.settings.undecided.max(self.settings.lease * 2 / 3);
        self.well_for(long, now);
    }

    /// Closes the circuit if checks pass and no message was in trouble for so long.
    pub(super) fn well_for(&mut self, long: Duration, now: Time) {
        if !seeded!("circuit-stays-open")
            && let Some(since) = self.circuit.well_for(long, now)
        {
            self.tell(Event::CircuitClosed { after: now.saturating_sub(since) });
        }
    }

    fn failed(
        &mut self,
        entry: &Entry,
        kind: PublishErrorKind,
        failure: Failure,
        sent: Time,
        now: Time,
    ) {
        let random = self.chance();
        let undecided = self.settings.undecided;
        let name = Arc::clone(&self.topics.get(entry.topic).name);
        match kind {
            PublishErrorKind::Unavailable | PublishErrorKind::Unknown => {
                self.topics.get_mut(entry.topic).inconclusive();
                if kind == PublishErrorKind::Unknown {
                    self.topics.get_mut(entry.topic).timed_out(now, undecided);
                }
                // At the end of a run it is we who leave messages without an answer.
                let closing = matches!(self.stage, Stage::Closing(_));
                if !closing && self.circuit.troubled(sent, now, random) {
                    self.tell(Event::CircuitOpened);
                    self.check_at = now;
                }
            }
            // The next one may not be sent either: as long as a partition does not answer, many are not.
            PublishErrorKind::NotSent => {
                self.circuit.inconclusive(now + UNAVAILABLE_WAIT);
                self.circuit.spared();
                self.topics.get_mut(entry.topic).inconclusive();
            }
            PublishErrorKind::Destination => {
                self.refused(now);
                if self.topics.get_mut(entry.topic).close(now, random) {
                    self.tell(Event::TopicClosed { topic: Arc::clone(&name) });
                }
            }
            _ => {
                self.refused(now);
                self.topics.get_mut(entry.topic).inconclusive();
            }
        }
        let Some(row) = self.rows.get(&entry.position) else { return };
        let (id, read) = (row.id, row.as_read());
        self.tell(Event::PublishFailed { topic: name, id, kind });
        // If the lane was lost meanwhile, its next owner has read the row already.
        let epoch = self.leases.get(entry.lane).map(|held| held.epoch);
        let Some(epoch) = epoch else { return self.drop_row(entry.position, now) };
        self.return_row(entry, epoch);
        let counts = match kind {
            PublishErrorKind::Unknown => seeded!("timeout-counts"),
            PublishErrorKind::Unavailable => seeded!("outage-counts"),
            _ => kind.counts(),
        };
        if counts {
            let attempts = read.attempts.saturating_add(1);
            let settlement = self.judge(entry.topic, kind, attempts, random);
            let lease = Lease::new(entry.lane, epoch);
            let row = RowId::new(entry.position, id);
            return self
                .write_failure(Failed::new(row, lease, read, attempts, settlement, failure));
        }
        let Some(row) = self.rows.get_mut(&entry.position) else { return };
        row.parked_until = match kind {
            PublishErrorKind::Unknown => {
                row.unknown = row.unknown.saturating_add(1);
                Some(now + AMBIGUOUS.wait(row.unknown.into(), random))
            }
            PublishErrorKind::NotSent => {
                row.not_sent = row.not_sent.saturating_add(1);
                Some(now + NOT_SENT.wait(row.not_sent.into(), random))
            }
            // Its topic makes it wait.
            PublishErrorKind::Destination => row.parked_until,
            _ => Some(now + UNAVAILABLE_WAIT),
        };
    }

    /// Puts a row back into the queue of its key, without its content.
    fn return_row(&mut self, entry: &Entry, epoch: u64) {
        let Some(row) = self.rows.get_mut(&entry.position) else { return };
        row.phase = Phase::Queued;
        row.epoch = epoch;
        let (topic, lane) = (row.topic, row.lane);
        let key = self.keys.entry(entry.key).or_insert_with(|| Key::new(topic, lane));
        key.queue.insert(entry.position);
    }

    /// What becomes of a message after a failure that counts.
    fn judge(
        &self,
        topic: TopicId,
        kind: PublishErrorKind,
        attempts: u32,
        random: f64,
    ) -> Settlement {
        let retry = self.topics.retry(topic);
        let delay = match kind {
            PublishErrorKind::Rejected => None,
            _ => retry.delay(attempts, random),
        };
        match (delay, self.topics.get(topic).policy.on_death) {
            (Some(delay), _) => Settlement::Retry(delay),
            (None, OnDeath::Hold) => Settlement::Held,
            (None, OnDeath::Skip) => Settlement::Dead,
        }
    }

    /// A row that cannot be read dies like a message that the broker rejected.
    fn condemn_unreadable(&mut self, position: Position) {
        let Some(row) = self.rows.get(&position) else { return };
        let Some(failure) = row.unreadable.clone() else { return };
        let attempts = row.attempts.saturating_add(1);
        let settlement = self.judge(row.topic, PublishErrorKind::Rejected, attempts, 0.0);
        let lease = Lease::new(row.lane, row.epoch);
        let id = RowId::new(position, row.id);
        self.write_failure(Failed::new(id, lease, row.as_read(), attempts, settlement, *failure));
    }

    fn write_failure(&mut self, failed: Failed) {
        if let Some(row) = self.rows.get_mut(&failed.id.position) {
            row.phase = Phase::Writing;
        }
        self.unsettled.failed(failed);
    }
}
