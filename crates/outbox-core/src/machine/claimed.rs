//! What the answer to a claim means: rows enter, change, and are forgotten.
//!
//! An answer counts only for lanes that are still held under the epoch it was asked with, and not at
//! all once another server was met. Nothing is published from here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::ahead::AHEAD;
use super::claiming::{PART_WIDTH, width};
use super::keys::{Key, KeyId, Place};
use super::{Claiming, Machine, PageOrder, Phase, Row, Time, TopicId};
use crate::delivery::{Delivery, Lane, Position, RowId, RowState};
use crate::observe::{Event, Step};
use crate::seeded::seeded;
use crate::store::{ClaimReply, Claimed, StoreErrorKind, Swept, Unreadable, Watched};

/// After a failed claim nothing is read for about as long as without new rows, but for no longer.
const BACK_OFF: Duration = Duration::from_secs(1);
/// So often claims and settles are halved that take too long.
pub(super) const MOST_HALVINGS: u32 = 10;
/// A scan or a catch-up that takes too long passes so much less next time, and twice as much each time
/// that it is quick; so many ids at least.
const SHRINKS: u64 = 16;
const NARROWEST: u64 = 1_000;
/// Scans take one part in so many of the relay's time.
const SCAN_SHARE: u32 = 100;

impl Machine {
    pub(super) fn claimed(&mut self, result: Result<ClaimReply, StoreErrorKind>, now: Time) {
        let Some(claim) = self.claiming.take() else { return };
        if self.is_idle() {
            // Whatever this claim brings was not waited for: quiet is not being stuck.
            self.last_progress = now;
        }
        let reply = match result {
            Ok(reply) => reply,
            Err(kind) => {
                self.claim_failing.get_or_insert(now);
                self.requeue_reading(&claim.order.fetch, now);
                self.recheck.extend(&claim.order.watch);
                if let Some(first) = claim.order.sweep.first().filter(|_| claim.order.is_part()) {
                    self.sweep_after = Some(first.first.previous());
                }
                // What took too long may have been too much.
                let took = now.saturating_sub(claim.sent);
                if took > self.settings.statement_deadline / 2 {
                    self.smaller = (self.smaller + 1).min(MOST_HALVINGS);
                    let less = |page: &PageOrder| {
                        let width = page.through.0.saturating_sub(page.after.0);
                        (width / SHRINKS).max(NARROWEST)
                    };
                    if let Some(scan) = &claim.order.scan {
                        self.scan_width = less(scan);
                        self.scan_at = self.scan_at.max(now + took * SCAN_SHARE);
                    }
                    if claim.order.is_part() {
                        self.part_width = (self.part_width / SHRINKS).max(NARROWEST);
                    } else if width(&claim.order.sweep) > PART_WIDTH {
                        (self.sweep_after, self.part_width) = (Some(Position::START), PART_WIDTH);
                    }
                    if let (Some(page), Some(catch_up)) = (&claim.order.page, &mut self.catch_up)
                        && page.catch_up
                    {
                        catch_up.width = less(page);
                    }
                }
                let wait = self.settings.poll_longest.min(BACK_OFF).mul_f64(1.0 + self.chance());
                self.pace.back_off(wait, now);
                self.end_of_claim(claim.number);
                return self.store_failed(Step::Claim, kind);
            }
        };
        self.claim_failing = None;
        self.smaller = self.smaller.saturating_sub(1);
        let another = self.server.is_some_and(|server| server != reply.server);
        if another {
            self.meet_server(reply.server, now);
        }
        // Asked before the change of servers, the new one may answer: with what comes after rows
        // that are forgotten, and will be read again.
        if another || claim.void {
            self.requeue_reading(&claim.order.fetch, now);
            return self.end_of_claim(claim.number);
        }
        if let Some(newest) = reply.newest {
            self.horizon.know(newest, now, self.settings.grace);
        }
        self.watched_rows(&claim, &reply.watched, now);
        if claim.order.is_part() && self.was_quick(&claim, now) {
            self.part_width = self.part_width.saturating_mul(2);
        }
        let complete = self.swept_rows(&claim, &reply);
        let used_again = self.scanned_rows(&claim, &reply, now);
        if used_again {
            self.start_over(now);
        }
        if used_again || !complete && !seeded!("a-shown-row-is-no-row") {
            // Nothing is known of what comes after it.
            self.caught_up = false;
            self.requeue_reading(&claim.order.fetch, now);
            return self.end_of_claim(claim.number);
        }
        self.page_and_fetched(&claim, reply, now);
        self.end_of_claim(claim.number);
    }

    /// Whether the claim left time for twice as much.
    fn was_quick(&self, claim: &Claiming, now: Time) -> bool {
        now.saturating_sub(claim.sent) < self.settings.statement_deadline / 4
    }

    /// Settled rows stay known until every read sent before their settlement was confirmed has
    /// ended: its answer may still bring them in.
    fn end_of_claim(&mut self, number: u64) {
        while self.fading.front().is_some_and(|fading| fading.claim <= number) {
            if let Some(fading) = self.fading.pop_front() {
                self.forget(&fading.rows);
            }
        }
    }

    /// Whether rows of this lane in an answer to `claim` count: the lane must still be held under
    /// the epoch the read was sent with.
    fn counts(&self, claim: &Claiming, lane: Lane) -> bool {
        let held = self.leases.get(lane);
        held.is_some_and(|held| claim.epochs.get(&lane) == Some(&held.epoch))
            && self.lanes.contains_key(&lane)
    }

    fn knows(&self, lane: Lane, position: Position) -> bool {
        self.rows.contains_key(&position)
            || self.lanes.get(&lane).is_some_and(|rows| rows.unread.contains_key(&position))
    }

    fn note_unread(&mut self, row: &Swept) {
        if let Some(lane) = self.lanes.get_mut(&row.lane) {
            lane.unread.insert(row.position, row.bytes);
        }
    }

    fn watched_rows(&mut self, claim: &Claiming, found: &[Watched], now: Time) {
        let found: BTreeMap<Position, &Watched> =
            found.iter().map(|watched| (watched.id.position, watched)).collect();
        for position in &claim.order.watch {
            let Some(row) = self.rows.get_mut(position) else { continue };
            let settled = matches!(row.phase, Phase::Queued | Phase::Unclear);
            if !settled || row.changed_at_claim >= claim.number {
                continue;
            }
            let id = row.key;
            match found.get(position) {
                Some(watched) if watched.id.message == row.id => {
                    let new = watched.state;
                    let same = (row.attempts, row.revision, row.held)
                        == (new.attempts, new.revision, new.held);
                    if same && row.phase == Phase::Queued {
                        continue;
                    }
                    let unclear = row.phase == Phase::Unclear;
                    row.phase = Phase::Queued;
                    if row.revision != new.revision {
                        // An operator wants it tried again, and may have mended it.
                        (row.unknown, row.not_sent) = (0, 0);
                        row.unreadable = None;
                    }
                    let longest = self.topics.retry(row.topic).cap();
                    // Written by a settle whose answer was lost: nobody was told of it.
                    let (topic, message) = (Arc::clone(&self.topics.get(row.topic).name), row.id);
                    let told = if !unclear {
                        None
                    } else if new.held && !row.held {
                        Some(Event::Held { topic, id: message })
                    } else if new.attempts > row.attempts {
                        let (attempts, after) = (new.attempts, new.wait);
                        Some(Event::RetryScheduled { topic, id: message, attempts, after })
                    } else {
                        None
                    };
                    set_state(row, new, longest, now);
                    self.events.extend(told);
                    self.place(id, now);
                }
                _ => self.drop_row(*position, now),
            }
        }
    }

    /// Tells whether the claim is complete downwards: whether all that it showed was swept.
    fn swept_rows(&mut self, claim: &Claiming, reply: &ClaimReply) -> bool {
        for row in &reply.swept {
            self.horizon.see(row.position);
            if self.counts(claim, row.lane) && !self.knows(row.lane, row.position) {
                self.note_unread(row);
            }
        }
        let open = if seeded!("open-rows-are-no-holes") { &[][..] } else { &reply.open };
        !self.horizon.close(&claim.order.open, &claim.order.sweep, open, claim.sent)
    }

    /// Takes in what the scan found. Whether ids are used again: a row stands where none can come any
    /// more. With a backlog such a row is only delivered: to read all once more would take long.
    fn scanned_rows(&mut self, claim: &Claiming, reply: &ClaimReply, now: Time) -> bool {
        let Some(scan) = &claim.order.scan else { return false };
        self.scan_at = self.scan_at.max(now + now.saturating_sub(claim.sent) * SCAN_SHARE);
        let cut = scan.through.0.saturating_sub(scan.after.0) == self.scan_width;
        if self.was_quick(claim, now) {
            self.scan_width = self.scan_width.saturating_mul(2);
        }
        self.scan_after = match reply.scanned.last() {
            Some(last) if reply.scanned.len() >= scan.rows => last.position,
            _ if cut => scan.through,
            _ => Position::START,
        };
        for row in &reply.scanned {
            let below = row.position <= self.horizon.position();
            let behind = self.catch_up.as_ref().is_some_and(|catch_up| {
                catch_up.lanes.contains(&row.lane) && row.position > catch_up.after
            });
            let fresh = self.fresh_lanes.contains(&row.lane);
            let wanted = below && !behind && !fresh && scan.lanes.contains(&row.lane);
            if wanted && self.counts(claim, row.lane) && !self.knows(row.lane, row.position) {
                if self.caught_up && !self.horizon.is_hole(row.position) {
                    return true;
                }
                self.note_unread(row);
                self.horizon.see(row.position);
            }
        }
        false
    }

    fn page_and_fetched(&mut self, claim: &Claiming, reply: ClaimReply, now: Time) {
        let order = &claim.order;
        let (fetched_rows, page_rows) = if order.fetch.is_empty() {
            (Vec::new(), reply.rows)
        } else {
            let fetched: BTreeSet<Position> = order.fetch.iter().copied().collect();
            reply.rows.into_iter().partition(|row| fetched.contains(&row.position()))
        };

        // The page: first what it saw, so that its rows meet the barriers of this very claim.
        if let Some(page) = &order.page {
            let stale = !page.catch_up && page.after != self.horizon.position();
            let quick = self.was_quick(claim, now);
            if let Some(catch_up) = self.catch_up.as_mut().filter(|_| page.catch_up && quick) {
                catch_up.width = catch_up.width.saturating_mul(2);
            }
            if !stale {
                let count = page_rows.len();
                self.take_in_page(page, &page_rows, &reply.passed, reply.covered, reply.end, now);
                self.admit_page(claim, page, page_rows, now);
                self.caught_up = reply.end && !page.catch_up && self.catch_up.is_none();
                let random = self.chance();
                let more = !reply.end && count + reply.passed.len() > 0;
                self.pace.page(count, more || self.catch_up.is_some(), claim.sent, now, random);
            }
        }
        self.take_in_fetched(claim, fetched_rows, now);
        for lane in order.lanes.clone() {
            self.lift(lane, now);
        }
    }

    fn take_in_page(
        &mut self,
        page: &PageOrder,
        rows: &[Claimed],
        passed: &[Position],
        covered: Position,
        end: bool,
        now: Time,
    ) {
        if !rows.is_empty() {
            let bytes: usize = rows.iter().map(content_bytes).sum();
            let mean = bytes / rows.len();
            // Follows larger rows at once and smaller ones slowly.
            self.typical_bytes = mean.max(self.typical_bytes * 7 / 8).max(64);
            self.tell(Event::Claimed { rows: rows.len() });
        }
        if page.catch_up {
            if let Some(catch_up) = &mut self.catch_up {
                let reached = if end { page.through } else { covered };
                catch_up.after = catch_up.after.max(reached);
                if catch_up.after >= catch_up.through {
                    self.catch_up = None;
                }
            }
        } else {
            let read = rows.iter().map(Claimed::position);
            let mut seen: Vec<Position> = read.chain(passed.iter().copied()).collect();
            seen.retain(|position| *position <= covered);
            seen.sort_unstable();
            if self.profile.in_commit_order {
                // Nothing appears late: what a page did not show does not exist.
                return self.horizon.jump(covered);
            }
            self.horizon.pass(&seen, now, self.settings.grace);
            if end {
                self.horizon.know(covered, now, self.settings.grace);
            }
        }
    }

    fn admit_page(&mut self, claim: &Claiming, page: &PageOrder, rows: Vec<Claimed>, now: Time) {
        let mut rows = rows.into_iter();
        let mut looked_at = 0;
        loop {
            if looked_at == 0 {
                self.look_at_rows(rows.as_slice().iter().map(Claimed::position));
                let keys = rows.as_slice().iter().take(AHEAD).filter_map(|row| self.key_of(row));
                self.look_at_queues(keys);
                looked_at = AHEAD;
            }
            looked_at -= 1;
            let Some(row) = rows.next() else { return };
            let lane = lane_of(&row);
            let wanted = page.lanes.contains(&lane) && self.counts(claim, lane);
            if !wanted || self.knows(lane, row.position()) {
                continue;
            }
            self.admit(row, now);
        }
    }

    fn take_in_fetched(&mut self, claim: &Claiming, rows: Vec<Claimed>, now: Time) {
        let mut found: BTreeMap<Position, Claimed> =
            rows.into_iter().map(|row| (row.position(), row)).collect();
        for position in &claim.order.fetch {
            let answer = found.remove(position);
            if self.rows.contains_key(position) {
                self.refill(claim, *position, answer, now);
            } else {
                self.read_unread(claim, *position, answer, now);
            }
        }
        self.requeue_reading(&claim.order.fetch, now);
    }

    /// A row that barred its lane was read, or is gone.
    fn read_unread(
        &mut self,
        claim: &Claiming,
        position: Position,
        answer: Option<Claimed>,
        now: Time,
    ) {
        let lane = self
            .lanes
            .iter()
            .find(|(_, rows)| rows.unread.contains_key(&position))
            .map(|(lane, _)| *lane);
        let Some(lane) = lane else { return };
        if !self.counts(claim, lane) {
            return;
        }
        if let Some(rows) = self.lanes.get_mut(&lane) {
            match &answer {
                Some(Claimed::Unread(row)) => {
                    rows.unread.insert(position, row.bytes);
                    return;
                }
                _ => rows.unread.remove(&position),
            };
        }
        if let Some(row) = answer {
            self.admit(row, now);
        }
    }

    /// A row that was known without its content was read again, or is gone.
    fn refill(&mut self, claim: &Claiming, position: Position, answer: Option<Claimed>, now: Time) {
        let Some(row) = self.rows.get_mut(&position) else { return };
        if row.phase != Phase::Queued || row.content.is_some() {
            return;
        }
        // It may have been read before that.
        if row.changed_at_claim >= claim.number {
            return;
        }
        let longest = self.topics.retry(row.topic).cap();
        match answer {
            Some(Claimed::Delivery(delivery)) if delivery.message.id() == row.id => {
                refresh(row, delivery.state, longest, now);
                self.load(position, delivery);
            }
            Some(Claimed::Unread(unread)) => row.set_bytes(unread.bytes),
            Some(Claimed::Unreadable(unreadable)) if unreadable.id.message == row.id => {
                refresh(row, unreadable.state, longest, now);
                row.unreadable = Some(Box::new(unreadable.failure));
            }
            _ => self.drop_row(position, now),
        }
    }

    fn requeue_reading(&mut self, positions: &[Position], now: Time) {
        for position in positions {
            let Some(row) = self.rows.get(position) else { continue };
            let id = row.key;
            // Rows of the page may have listed the key as thirsty again.
            let reads = |key: &Key| matches!(key.place, Place::Reading | Place::Thirsty);
            if self.keys.get(&id).is_some_and(reads) {
                self.place(id, now);
            }
        }
        // Rows that went away took their keys with them, or left others at the head.
    }

    // ---- rows ----------------------------------------------------------------------------------

    /// Takes a row in that nobody knew.
    fn admit(&mut self, claimed: Claimed, now: Time) {
        match claimed {
            Claimed::Delivery(delivery) => self.admit_delivery(delivery, now),
            Claimed::Unreadable(unreadable) => self.admit_unreadable(*unreadable, now),
            Claimed::Unread(row) => self.note_unread(&row),
        }
    }

    fn admit_delivery(&mut self, delivery: Box<Delivery>, now: Time) {
        let topic = self.topics.id(delivery.message.topic());
        let id = delivery.message.id();
        let key = KeyId::new(topic, delivery.message.key(), id);
        let (position, lane) = (delivery.position, delivery.lane);
        let epoch = self.leases.get(lane).map_or(0, |held| held.epoch);
        let mut row = Row::new(lane, epoch, key, topic, id, now.saturating_sub(delivery.age));
        row.set_bytes(delivery.message.size());
        let longest = self.topics.retry(topic).cap();
        set_state(&mut row, delivery.state, longest, now);
        let blocked = row.held || row.parked_until.is_some();
        if !blocked && self.keeps_content(key, topic, now) {
            self.loaded_rows += 1;
            self.loaded_bytes += row.bytes();
            row.content = Some(delivery);
        }
        self.rows.insert(position, Box::new(row));
        self.queue_or_bar(position, lane, now);
    }

    /// The gate of a row that may be taken in, as far as its topic is known.
    fn key_of(&self, row: &Claimed) -> Option<KeyId> {
        let Claimed::Delivery(delivery) = row else { return None };
        let message = &delivery.message;
        let topic = self.topics.known(message.topic())?;
        Some(KeyId::new(topic, message.key(), message.id()))
    }

    fn admit_unreadable(&mut self, unreadable: Unreadable, now: Time) {
        let topic = self.topics.id(&unreadable.topic);
        let key = KeyId::new(topic, unreadable.key.as_deref(), unreadable.id.message);
        let RowId { position, message: id } = unreadable.id;
        let lane = unreadable.lane;
        let epoch = self.leases.get(lane).map_or(0, |held| held.epoch);
        let mut row = Row::new(lane, epoch, key, topic, id, now.saturating_sub(unreadable.age));
        row.unreadable = Some(Box::new(unreadable.failure));
        let longest = self.topics.retry(topic).cap();
        set_state(&mut row, unreadable.state, longest, now);
        self.rows.insert(position, Box::new(row));
        self.queue_or_bar(position, lane, now);
    }

    /// Beyond a small buffer, rows behind an outstanding, parked or held one of their key are kept
    /// as ids only, so that they do not fill the window.
    fn keeps_content(&self, id: KeyId, topic: TopicId, now: Time) -> bool {
        if self.topics.get(topic).is_closed() {
            return false;
        }
        let Some(key) = self.keys.get(&id) else { return true };
        let Some(head) = key.queue.front().and_then(|head| self.rows.get(&head)) else {
            return true;
        };
        let blocked = head.held
            || head.phase == Phase::Writing
            || head.parked_until.is_some_and(|until| until > now);
        // The content of a queue is loaded from its head on, without gaps.
        let gap = key.queue.back().and_then(|tail| self.rows.get(&tail));
        let gap = gap.is_some_and(|tail| tail.content.is_none());
        !blocked && !gap && key.queue.len() < self.settings.key_buffer
    }

    /// The smallest position of the lane that must be read before anything above it is published.
    fn barrier(&self, lane: Lane) -> Position {
        let unread = self.lanes.get(&lane).and_then(|rows| rows.unread.keys().next().copied());
        let catching_up = self
            .catch_up
            .as_ref()
            .filter(|catch_up| catch_up.lanes.contains(&lane))
            .map(|catch_up| catch_up.after.next());
        let fresh = self.fresh_lanes.contains(&lane).then_some(Position::START);
        [unread, catching_up, fresh].into_iter().flatten().min().unwrap_or(Position(u64::MAX))
    }

    fn queue_or_bar(&mut self, position: Position, lane: Lane, now: Time) {
        let has_barrier = self.catch_up.is_some()
            || !self.fresh_lanes.is_empty()
            || self.lanes.get(&lane).is_some_and(|rows| !rows.unread.is_empty());
        let passes = seeded!("unread-rows-bar-nothing");
        if has_barrier && !passes && position >= self.barrier(lane) {
            if let Some(rows) = self.lanes.get_mut(&lane) {
                rows.barred.insert(position);
            }
        } else {
            self.enqueue(position, now);
        }
    }

    /// Lets rows pass whose lane is read completely below them.
    fn lift(&mut self, lane: Lane, now: Time) {
        if self.lanes.get(&lane).is_none_or(|rows| rows.barred.is_empty()) {
            return;
        }
        let barrier = self.barrier(lane);
        let Some(rows) = self.lanes.get_mut(&lane) else { return };
        let rest = rows.barred.split_off(&barrier);
        let passing = std::mem::replace(&mut rows.barred, rest);
        for position in passing {
            self.enqueue(position, now);
        }
    }

    fn enqueue(&mut self, position: Position, now: Time) {
        let Some(row) = self.rows.get_mut(&position) else { return };
        row.phase = Phase::Queued;
        let (id, topic, lane) = (row.key, row.topic, row.lane);
        let cannot_send = self.topics.get(topic).is_congested();
        let key = self.keys.entry(id).or_insert_with(|| Key::new(topic, lane));
        // Another one than before, if the number of lanes was changed.
        key.lane = lane;
        key.queue.insert(position);
        // What was barred has its content, however many of its key there were.
        let waits = key.blocked || key.place == Place::Stalled && cannot_send;
        if waits || key.queue.len() > self.settings.key_buffer {
            self.unload(position);
        }
        self.place(id, now);
    }

    pub(super) fn load(&mut self, position: Position, delivery: Box<Delivery>) {
        if let Some(row) = self.rows.get_mut(&position)
            && row.content.is_none()
        {
            row.set_bytes(delivery.message.size());
            self.loaded_rows += 1;
            self.loaded_bytes += row.bytes();
            row.content = Some(delivery);
        }
    }

    /// Gives up the content of a key's rows beyond the first `keep`.
    pub(super) fn strip(&mut self, id: KeyId, keep: usize) {
        let Some(key) = self.keys.get(&id) else { return };
        let rows: Vec<Position> = key.queue.iter().skip(keep).collect();
        rows.into_iter().for_each(|position| self.unload(position));
    }

    /// Gives up the content of a row.
    pub(super) fn unload(&mut self, position: Position) {
        if let Some(row) = self.rows.get_mut(&position)
            && row.content.take().is_some()
        {
            self.loaded_rows -= 1;
            self.loaded_bytes -= row.bytes();
        }
    }

    /// Forgets a row: it was settled by somebody, or its lane is not ours any more.
    pub(super) fn drop_row(&mut self, position: Position, now: Time) {
        let Some(row) = self.rows.remove(&position) else { return };
        if row.content.is_some() {
            self.loaded_rows -= 1;
            self.loaded_bytes -= row.bytes();
        }
        self.watched.remove(&position);
        if row.phase == Phase::Barred
            && let Some(lane) = self.lanes.get_mut(&row.lane)
        {
            lane.barred.remove(&position);
        }
        if let Some(key) = self.keys.get_mut(&row.key) {
            key.queue.remove(position);
            self.place(row.key, now);
        }
    }
}

/// Takes over what the store records about a row. No wait is longer than the policy's `longest`: one
/// that is was written before the store's clock was set back.
fn set_state(row: &mut Row, state: RowState, longest: Duration, now: Time) {
    (row.attempts, row.revision) = (state.attempts, state.revision);
    row.held = state.held && !seeded!("hold-forgotten");
    row.parked_until = (!state.wait.is_zero()).then(|| now + state.wait.min(longest));
}

/// The same of a row that is known. If nothing was recorded since, it waits as it does, by a clock
/// that nobody sets.
fn refresh(row: &mut Row, state: RowState, longest: Duration, now: Time) {
    let known = (row.attempts, row.revision) == (state.attempts, state.revision);
    let parked_until = row.parked_until;
    set_state(row, state, longest, now);
    if known {
        row.parked_until = parked_until;
    }
}

fn lane_of(row: &Claimed) -> Lane {
    match row {
        Claimed::Delivery(delivery) => delivery.lane,
        Claimed::Unread(row) => row.lane,
        Claimed::Unreadable(row) => row.lane,
    }
}

fn content_bytes(row: &Claimed) -> usize {
    match row {
        Claimed::Delivery(delivery) => delivery.message.size(),
        Claimed::Unread(row) => row.bytes,
        Claimed::Unreadable(_) => 0,
    }
}
