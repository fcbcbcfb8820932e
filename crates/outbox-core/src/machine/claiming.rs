//! Reading: which rows to ask for, and what the answers mean.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::ahead::AHEAD;
use super::keys::{Key, KeyId, Place};
use super::publishing::Batch;
use super::{Action, ClaimOrder, Claiming, Machine, PageOrder, Phase, Row, Stage, Time};
use crate::delivery::{Delivery, Lane, Position, RowState};
use crate::observe::{Event, Step};
use crate::seeded::seeded;
use crate::store::{ClaimReply, Claimed, StoreErrorKind, Swept, Unreadable, Watched};

/// Rows fetched by position in one claim: as many as a page brings.
const FETCH_ROWS: usize = 4_000;
/// So often claims are halved that take too long.
const MOST_HALVINGS: u32 = 10;
/// Rows watched in one claim.
const WATCH_ROWS: usize = 500;
/// Rows of a page while the broker is down.
const PROBE_ROWS: usize = 100;
/// Rows of one step of the slow full sweep.
const SCAN_ROWS: usize = 1_000;
/// However full the window is, rows that bar others or head their key may be read up to this in one
/// claim, and up to a reserve in all: so many rows, and this share of the window's bytes.
const RESERVE_ROWS: usize = 64;
const RESERVE_BYTES: usize = 1 << 20;
const RESERVE_ROWS_IN_ALL: usize = 1_024;
const RESERVE_SHARE: usize = 8;
/// Content asked for in one claim at most, by each of its parts, and the share of the window.
const CLAIM_BYTES: usize = 16 << 20;
const CLAIM_SHARE: usize = 4;

/// Rows of a lane that is held, apart from those in the queues of their keys.
#[derive(Debug, Clone, Default)]
pub(super) struct LaneRows {
    /// Rows that were seen but not read, with their sizes. While there is one, no row above it
    /// is published.
    unread: BTreeMap<Position, usize>,
    /// Rows that were read and wait for those.
    barred: BTreeSet<Position>,
}

impl LaneRows {
    pub(super) fn unread_count(&self) -> usize {
        self.unread.len()
    }
}

/// Lanes that were gained while others were held already: their rows up to where the pages had
/// come are read by pages of their own.
#[derive(Debug, Clone)]
pub(super) struct CatchUp {
    pub(super) lanes: Vec<Lane>,
    after: Position,
    through: Position,
}

impl Machine {
    // ---- asking --------------------------------------------------------------------------------

    /// Whether a page may be read: there is room for its rows, and somebody to send them to.
    pub(super) fn may_page(&self, now: Time) -> bool {
        self.stage == Stage::Running
            && (!self.circuit.is_open() || self.needs_probe(now))
            && self.checked
            && self.leases.iter().any(|(_, held)| held.draining.is_none() && held.until > now)
            && (!self.is_full() || self.is_catching_up())
            && self.page_rows() > 0
    }

    /// While the broker is down no pages are read, unless there is nothing at hand to probe it with.
    /// Keys whose probes were in vain do not count: what they are for may be all that is down.
    fn needs_probe(&self, now: Time) -> bool {
        self.ready.is_empty() && self.circuit.allows(1, now) > 0
    }

    fn is_catching_up(&self) -> bool {
        self.catch_up.is_some() || !self.fresh_lanes.is_empty()
    }

    fn is_full(&self) -> bool {
        self.rows.len() >= self.settings.known_rows
    }

    /// How many rows may hold their content: those in flight, and as many that wait for them.
    fn loaded_limit(&self) -> usize {
        self.settings.rows_in_flight.saturating_mul(2)
    }

    /// How many rows the next page may have; zero unless it is worth while.
    fn page_rows(&self) -> usize {
        match self.page_room() {
            (room, true) => room,
            // Whatever is loaded waits for rows that were not read yet.
            (room, false) if self.is_waiting_for_rows() => room.max(1),
            _ => 0,
        }
    }

    /// How many rows of a page there is room for, and whether that is worth while.
    fn page_room(&self) -> (usize, bool) {
        let rows = self.loaded_limit().saturating_sub(self.loaded_rows);
        let bytes = self.settings.bytes_in_flight.saturating_sub(self.loaded_bytes);
        let room = self.full_page().min(rows).min(self.rows_of(bytes.min(CLAIM_BYTES)));
        (room, room >= self.worth_while() && bytes >= self.typical_bytes)
    }

    fn full_page(&self) -> usize {
        let by_window = self.settings.page_rows.min(self.settings.rows_in_flight);
        let by_bytes = self.rows_of(self.settings.bytes_in_flight / CLAIM_SHARE);
        (by_window.min(by_bytes) >> self.smaller).max(1)
    }

    /// How many rows are worth a claim.
    fn worth_while(&self) -> usize {
        self.full_page().div_ceil(4)
    }

    /// How many rows have so many bytes, most of them larger than usual.
    fn rows_of(&self, bytes: usize) -> usize {
        (bytes / (4 * self.typical_bytes)).max(1)
    }

    /// Whether nothing that is loaded is on its way, nor about to be.
    fn nothing_moves(&self) -> bool {
        let waits_for_its_lease = |id: &KeyId| {
            let lane = self.keys.get(id).and_then(|key| self.leases.get(key.lane));
            lane.is_some_and(|held| held.draining.is_none())
        };
        self.offered == 0
            && self.ready.is_empty()
            && !self.stalled_by_lane.iter().any(waits_for_its_lease)
    }

    /// Whether whatever is loaded waits for rows that were not read yet.
    fn is_waiting_for_rows(&self) -> bool {
        self.thirsty.is_empty() && self.nothing_moves()
    }

    pub(super) fn next_claim(&mut self, now: Time) -> Option<Action> {
        let working =
            matches!(self.stage, Stage::Running | Stage::Draining(_)) && self.leases.len() > 0;
        if self.claiming.is_some() || !working {
            return None;
        }
        if self.claim_failing.is_some() && !self.pace.is_due(now) {
            return None;
        }
        self.topics.age(self.next_batch, now);
        let mut order = ClaimOrder { lanes: self.open_lanes(), ..ClaimOrder::default() };
        let draining = self.stage != Stage::Running;
        if !draining {
            let reads_late_rows = self.add_fetch(&mut order, now);
            self.add_page(&mut order, now);
            self.add_newest(&mut order, now);
            let late = reads_late_rows && !seeded!("late-rows-without-a-sweep");
            if late || order.page.is_some() {
                self.add_sweep(&mut order, now);
            }
        }
        self.add_watch(&mut order, now);
        if !draining {
            self.add_scan(&mut order, now);
        }
        let asks = order.page.is_some()
            || order.scan.is_some()
            || order.newest.is_some()
            || !(order.fetch.is_empty() && order.watch.is_empty() && order.open.is_empty());
        if !asks {
            return None;
        }
        self.claims += 1;
        let order = Arc::new(order);
        let epochs = self.leases.iter().map(|(lane, held)| (lane, held.epoch)).collect();
        self.claiming = Some(Claiming {
            number: self.claims,
            order: Arc::clone(&order),
            epochs,
            sent: now,
            void: false,
        });
        Some(Action::Claim(order))
    }

    fn open_lanes(&self) -> Vec<Lane> {
        self.leases
            .iter()
            .filter(|(_, held)| held.draining.is_none())
            .map(|(lane, _)| lane)
            .collect()
    }

    /// How many rows may be read by position, and how much content.
    fn fetch_room(&self) -> (usize, usize) {
        if seeded!("reserve-without-end") {
            return (RESERVE_ROWS, RESERVE_BYTES);
        }
        let within = |limit: usize, reserve: usize, in_all: usize, loaded: usize| {
            let reserve = limit.saturating_add(in_all).saturating_sub(loaded).min(reserve);
            limit.saturating_sub(loaded).max(reserve)
        };
        let (limit, window) = (self.loaded_limit(), self.settings.bytes_in_flight);
        let rows = within(limit, RESERVE_ROWS, RESERVE_ROWS_IN_ALL, self.loaded_rows);
        let bytes = within(window, RESERVE_BYTES, window / RESERVE_SHARE, self.loaded_bytes);
        let bytes = bytes.min(CLAIM_BYTES).min(window / CLAIM_SHARE);
        ((rows.min(FETCH_ROWS) >> self.smaller).max(rows.min(1)), bytes >> self.smaller)
    }

    /// Rows by position: first those that bar their lane, then heads whose content is not here.
    /// Tells whether there are some of the first kind.
    fn add_fetch(&mut self, order: &mut ClaimOrder, now: Time) -> bool {
        let (rows, bytes) = self.fetch_room();
        order.bytes = bytes;
        // A message is never too large to be read, only to be read now, or with others: a store may
        // grant each of them the same share.
        let one = rows.min(bytes) > 0 || self.nothing_moves();
        let mut largest = 0;
        let mut take = |position: Position, size: usize, fetch: &mut Vec<Position>| {
            let all = size.max(largest) * (fetch.len() + 1);
            let fits = if fetch.is_empty() { one } else { fetch.len() < rows && all <= bytes };
            if fits {
                largest = size.max(largest);
                fetch.push(position);
            }
            fits
        };
        for lane in &order.lanes {
            let Some(lane_rows) = self.lanes.get(lane) else { continue };
            for (position, size) in &lane_rows.unread {
                if !take(*position, *size, &mut order.fetch) {
                    break;
                }
            }
        }
        let reads_late_rows = !order.fetch.is_empty();
        let probing = self.circuit.is_open();
        // Of all that wait a little, rather than much of a few: so what is read lies side by side,
        // and they are sent side by side.
        let share = rows / self.thirsty.len().max(1);
        let ahead = share.clamp(1, self.settings.key_buffer);
        while let Some(id) = self.thirsty.pop_front() {
            let Some(key) = self.keys.get_mut(&id) else { continue };
            if key.place != Place::Thirsty {
                continue;
            }
            let loaded = |position: Position| {
                self.rows.get(&position).is_some_and(|row| row.content.is_some())
            };
            if key.queue.front().is_some_and(loaded) {
                self.place(id, now);
                continue;
            }
            let topic = self.topics.get(key.topic);
            if topic.is_closed() && !topic.allows(usize::MAX, now) {
                key.place = Place::Stalled;
                self.topics.get_mut(key.topic).stall(id);
                continue;
            }
            // What is read now another worker would have to read again.
            if self.leases.get(key.lane).is_none_or(|held| held.draining.is_some()) {
                key.place = Place::Stalled;
                self.stalled_by_lane.push(id);
                continue;
            }
            // While the broker is down, one message is enough to probe with.
            if probing && !(order.fetch.is_empty() && self.ready.is_empty()) {
                self.thirsty.push_front(id);
                break;
            }
            let ahead = if probing || topic.is_congested() { 1 } else { ahead };
            let mut some = false;
            for position in key.queue.iter().take(ahead) {
                let Some(row) = self.rows.get(&position) else { continue };
                if row.content.is_some() || row.unreadable.is_some() {
                    continue;
                }
                if !take(position, row.bytes(), &mut order.fetch) {
                    break;
                }
                some = true;
            }
            if some {
                key.place = Place::Reading;
            } else {
                self.thirsty.push_front(id);
                break;
            }
        }
        reads_late_rows
    }

    /// A claim is complete downwards: what was never seen below its rows is read with it, and not
    /// before them. Late rows need that as much as those of a page: what showed them, one of the
    /// statements of a sweep or a scan, may have been read after another one that should have shown
    /// a smaller id of the same transaction.
    fn add_sweep(&self, order: &mut ClaimOrder, now: Time) {
        let late = seeded!("publish-before-sweep") && !self.claims.is_multiple_of(16);
        if !late && !seeded!("high-water-mark") {
            order.sweep = self.horizon.unswept(&order.open, now);
        }
    }

    fn add_page(&mut self, order: &mut ClaimOrder, now: Time) {
        let full = self.is_full();
        if full && !self.full {
            self.tell(Event::Full { rows: self.rows.len() });
        }
        self.full = full;
        if !self.page_room().1 {
            self.make_room(now);
        }
        if !self.pace.is_due(now) || !self.may_page(now) {
            return;
        }
        // Rows that are known as ids only are read before the page goes on: behind a row of its key that
        // has no content yet, none is kept, and what the page brings would be read again. Without room
        // for a page, a fetch of one row is enough to go on with.
        let enough = match self.page_room() {
            (_, false) => 1,
            (_, true) if self.is_catching_up() || self.pace.is_overdue(now) => usize::MAX,
            (_, true) => self.worth_while(),
        };
        if order.fetch.len() >= enough {
            return;
        }
        self.start_catch_up();
        let probing = self.circuit.is_open();
        let rows = if probing { self.page_rows().min(PROBE_ROWS) } else { self.page_rows() };
        let main = PageOrder {
            lanes: order.lanes.clone(),
            after: self.horizon.position(),
            through: Position(u64::MAX),
            rows,
            catch_up: false,
        };
        self.turn = !self.turn;
        order.page = Some(match &self.catch_up {
            // Rows that wait for the catch-up must not crowd it out.
            Some(catch_up) if self.turn || full || self.is_waiting_for_rows() => PageOrder {
                lanes: catch_up.lanes.clone(),
                after: catch_up.after,
                through: catch_up.through,
                rows,
                catch_up: true,
            },
            _ => main,
        });
        order.bytes = order.bytes.max(4 * rows * self.typical_bytes);
        order.open = self.horizon.aged(now);
    }

    /// A page that comes to the end tells the newest position by itself. Before that, while none
    /// may be read, and beside a fetch, it is asked for: a backlog is to be known to be old once it is passed.
    fn add_newest(&mut self, order: &mut ClaimOrder, now: Time) {
        let told = match &order.page {
            Some(_) => self.caught_up,
            None => self.may_page(now) && order.fetch.is_empty(),
        };
        if !told && !self.profile.in_commit_order && self.horizon.know_at() <= now {
            order.newest = Some(self.horizon.position());
            self.horizon.asked(now, self.settings.grace);
        }
    }

    /// Lanes gained since the last claim start to catch up: no page that is out leaves them out
    /// any more, so whatever lies above the position will come with the pages.
    fn start_catch_up(&mut self) {
        if self.fresh_lanes.is_empty() {
            return;
        }
        let mut lanes = std::mem::take(&mut self.fresh_lanes);
        if let Some(running) = self.catch_up.take() {
            lanes.extend(running.lanes);
        }
        let through = self.horizon.position();
        if through > Position::START {
            self.catch_up = Some(CatchUp { lanes, after: Position::START, through });
        }
    }

    /// Rows that cannot be sent soon give their content up when others need the window: those of a
    /// topic that cannot send, those behind one that has waited for its answer for long and, when
    /// nothing else moves, those that wait for smaller ones to be read.
    fn make_room(&mut self, now: Time) {
        for topic in self.topics.ids() {
            if !self.topics.get(topic).is_congested() {
                continue;
            }
            for id in self.topics.get_mut(topic).newly_stalled() {
                self.strip(id, 0);
            }
        }
        let old = self.batches.values().take_while(|batch| batch.is_slow(now));
        for id in old.flat_map(Batch::keys).collect::<Vec<_>>() {
            self.strip(id, 0);
        }
        if self.ready.is_empty() && self.batches.values().all(|batch| batch.is_slow(now)) {
            let barred: Vec<Position> =
                self.lanes.values().flat_map(|lane| &lane.barred).copied().collect();
            barred.into_iter().for_each(|position| self.unload(position));
        }
    }

    fn add_watch(&mut self, order: &mut ClaimOrder, now: Time) {
        let some = self.recheck.len().min(WATCH_ROWS);
        order.watch = self.recheck.drain(..some).collect();
        if self.watch_at > now || seeded!("heads-are-not-read-again") {
            return;
        }
        self.watch_at = now + self.settings.watch_every;
        let room = WATCH_ROWS - order.watch.len();
        let start = self.watch_after.next();
        let above = self.watched.range(start..);
        let below = self.watched.range(..start);
        let heads: Vec<Position> = above.chain(below).take(room).copied().collect();
        if let Some(last) = heads.last() {
            self.watch_after = *last;
        }
        order.watch.extend(heads);
    }

    /// Whether there is anything to scan, and somewhere to send it to.
    pub(super) fn may_scan(&self) -> bool {
        self.horizon.position() > Position::START && !self.circuit.is_open()
    }

    /// A net for what no rule foresaw: a row that is visible, ours, and known to nobody.
    fn add_scan(&mut self, order: &mut ClaimOrder, now: Time) {
        if self.scan_at > now || !self.may_scan() {
            return;
        }
        self.scan_at = now + self.settings.scan_every;
        order.scan = Some(PageOrder {
            lanes: order.lanes.clone(),
            after: self.scan_after,
            through: self.horizon.position(),
            rows: SCAN_ROWS,
            catch_up: false,
        });
    }

    // ---- understanding -------------------------------------------------------------------------

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
                // What took too long may have been too much.
                if now.saturating_sub(claim.sent) > self.settings.statement_deadline / 2 {
                    self.smaller = (self.smaller + 1).min(MOST_HALVINGS);
                }
                let wait = self.settings.poll_longest.mul_f64(1.0 + self.chance());
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
        let complete = self.swept_rows(&claim, &reply);
        self.scanned_rows(&claim, &reply, now);
        if !complete && !seeded!("a-shown-row-is-no-row") {
            self.requeue_reading(&claim.order.fetch, now);
            return self.end_of_claim(claim.number);
        }
        self.page_and_fetched(&claim, reply, now);
        self.end_of_claim(claim.number);
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
                    row.phase = Phase::Queued;
                    if row.revision != new.revision {
                        // An operator wants it tried again, and may have mended it.
                        (row.unknown, row.not_sent) = (0, 0);
                        row.unreadable = None;
                    }
                    set_state(row, new, now);
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
        !self.horizon.close(&claim.order.open, open, claim.sent)
    }

    fn scanned_rows(&mut self, claim: &Claiming, reply: &ClaimReply, now: Time) {
        let Some(scan) = &claim.order.scan else { return };
        // At most one per cent of the relay's time.
        let took = now.saturating_sub(claim.sent);
        self.scan_at = self.scan_at.max(now + took * 100);
        self.scan_after = match reply.scanned.last() {
            Some(last) if reply.scanned.len() >= scan.rows => last.position,
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
                self.note_unread(row);
                self.horizon.see(row.position);
            }
        }
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
                let reached = if end { catch_up.through } else { covered };
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
                self.look_at_keys(keys);
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
                self.refill(*position, answer, now);
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
    fn refill(&mut self, position: Position, answer: Option<Claimed>, now: Time) {
        let Some(row) = self.rows.get_mut(&position) else { return };
        if row.phase != Phase::Queued || row.content.is_some() {
            return;
        }
        match answer {
            Some(Claimed::Delivery(delivery)) if delivery.message.id() == row.id => {
                set_state(row, delivery.state, now);
                self.load(position, delivery);
            }
            Some(Claimed::Unread(unread)) => row.set_bytes(unread.bytes),
            Some(Claimed::Unreadable(unreadable)) if unreadable.id.message == row.id => {
                set_state(row, unreadable.state, now);
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
        let mut row = Row {
            lane,
            epoch: self.leases.get(lane).map_or(0, |held| held.epoch),
            key,
            topic,
            id,
            attempts: 0,
            revision: 0,
            held: false,
            bytes: 0,
            phase: Phase::Barred,
            content: None,
            unreadable: None,
            parked_until: None,
            unknown: 0,
            not_sent: 0,
            changed_at_claim: 0,
            added_at: now.saturating_sub(delivery.age),
        };
        row.set_bytes(delivery.message.size());
        set_state(&mut row, delivery.state, now);
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
        let mut row = Row {
            lane: unreadable.lane,
            epoch: self.leases.get(unreadable.lane).map_or(0, |held| held.epoch),
            key,
            topic,
            id: unreadable.id.message,
            attempts: 0,
            revision: 0,
            held: false,
            bytes: 0,
            phase: Phase::Barred,
            content: None,
            unreadable: Some(Box::new(unreadable.failure)),
            parked_until: None,
            unknown: 0,
            not_sent: 0,
            changed_at_claim: 0,
            added_at: now.saturating_sub(unreadable.age),
        };
        set_state(&mut row, unreadable.state, now);
        let position = unreadable.id.position;
        self.rows.insert(position, Box::new(row));
        self.queue_or_bar(position, unreadable.lane, now);
    }

    /// Beyond a small buffer, rows behind an outstanding, parked or held one of their key are kept
    /// as ids only, so that they do not fill the window.
    fn keeps_content(&self, id: KeyId, topic: super::TopicId, now: Time) -> bool {
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
    fn unload(&mut self, position: Position) {
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

/// Takes over what the store records about a row.
pub(super) fn set_state(row: &mut Row, state: RowState, now: Time) {
    (row.attempts, row.revision) = (state.attempts, state.revision);
    row.held = state.held && !seeded!("hold-forgotten");
    row.parked_until = (!state.wait.is_zero()).then(|| now + state.wait);
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
