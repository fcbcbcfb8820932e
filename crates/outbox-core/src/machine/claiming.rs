//! Reading: which rows to ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::keys::{KeyId, Place};
use super::publishing::Batch;
use super::{Action, ClaimOrder, Claiming, Machine, PageOrder, Phase, Stage, Time};
use crate::delivery::{Lane, Position, Span};
use crate::observe::Event;
use crate::seeded::seeded;

/// Rows fetched by position in one claim: as many as a page brings.
const FETCH_ROWS: usize = 4_000;
/// Rows watched in one claim.
const WATCH_ROWS: usize = 500;
/// Rows of a page while the broker is down.
const PROBE_ROWS: usize = 100;
/// Rows of one step of the slow full sweep.
const SCAN_ROWS: usize = 1_000;
/// A sweep of more ids than this that takes too long is done in parts, at first of so many.
pub(super) const PART_WIDTH: u64 = 200_000;
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
    pub(super) unread: BTreeMap<Position, usize>,
    /// Rows that were read and wait for those.
    pub(super) barred: BTreeSet<Position>,
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
    pub(super) after: Position,
    pub(super) through: Position,
    /// How many ids a page may pass.
    pub(super) width: u64,
}

impl Machine {
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
        let part = if draining { Vec::new() } else { self.next_part(now) };
        if !part.is_empty() {
            order.sweep = part;
        } else if !draining {
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
            || order.is_part()
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
                // Of a row that is being written, the state that is read now may be of before.
                let written = row.phase != Phase::Queued;
                if written || row.content.is_some() || row.unreadable.is_some() {
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

    /// What to sweep by itself, in parts, where a claim with all of it took too long: what the parts
    /// show need not be swept any more. They end with the highest hole; then all is tried again.
    fn next_part(&mut self, now: Time) -> Vec<Span> {
        let Some(after) = self.sweep_after.filter(|_| self.pace.is_due(now)) else {
            return Vec::new();
        };
        let part = cut(&self.horizon.unswept(&[], now), after, self.part_width);
        self.sweep_after = part.last().map(|span| span.last);
        part
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
        let crowded = !self.page_room().1 && self.is_waiting_for_rows();
        order.page = Some(match &self.catch_up {
            // Rows that wait for the catch-up must not crowd it out.
            Some(catch_up) if self.turn || full || crowded => PageOrder {
                lanes: catch_up.lanes.clone(),
                after: catch_up.after,
                // However few rows are asked for, rows that were deleted and that the store has not
                // removed yet are passed without end.
                through: catch_up.through.min(plus(catch_up.after, catch_up.width)),
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
            let (after, width) = (Position::START, u64::MAX);
            self.catch_up = Some(CatchUp { lanes, after, through, width });
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
            through: self.horizon.position().min(plus(self.scan_after, self.scan_width)),
            rows: SCAN_ROWS,
            catch_up: false,
        });
    }
}

/// The first so many ids after this one that are in these spans.
fn cut(spans: &[Span], after: Position, width: u64) -> Vec<Span> {
    let mut left = width;
    let mut part = Vec::new();
    for span in spans.iter().filter(|span| span.last > after) {
        if left == 0 {
            break;
        }
        let first = span.first.max(after.next());
        let last = span.last.min(plus(first, left - 1));
        left -= last.0 - first.0 + 1;
        part.push(Span::new(first, last));
    }
    part
}

/// How many ids are in these spans.
pub(super) fn width(spans: &[Span]) -> u64 {
    let widths = spans.iter().map(|span| (span.last.0 - span.first.0).saturating_add(1));
    widths.fold(0, u64::saturating_add)
}

fn plus(position: Position, width: u64) -> Position {
    Position(position.0.saturating_add(width))
}
