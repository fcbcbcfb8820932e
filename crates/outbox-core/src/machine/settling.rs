//! Recording what became of rows, and when a settled row may be forgotten.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::ahead::AHEAD;
use super::{Action, Machine, Map, Phase, Settings, SettleOrder, Stage, Time};
use crate::delivery::{Lane, Position, Settlement};
use crate::observe::{Event, Step};
use crate::retry::Retention;
use crate::seeded::seeded;
use crate::store::{Delivered, Failed, Settled, StoreErrorKind};

/// Rows whose settlement is not confirmed.
#[derive(Debug, Clone, Default)]
pub(super) struct Unsettled {
    /// Delivered rows that no settle has taken.
    delivered: Vec<Waiting>,
    /// So many delivered rows were taken so far.
    taken: usize,
    failed: VecDeque<Failed>,
    /// When the oldest of `delivered` was acknowledged.
    since: Option<Time>,
    out: Map<u64, Out>,
    /// Settles that failed, or whose answer was lost: repeated as they were.
    again: VecDeque<(u64, Out)>,
    again_at: Time,
    failures: u32,
    failing: Option<Time>,
    lanes: Map<Lane, usize>,
    rows: usize,
    next: u64,
}

#[derive(Debug, Clone)]
struct Waiting {
    row: Delivered,
    lane: Lane,
    /// So many were taken before it was acknowledged.
    after: usize,
}

/// So many rows with consecutive ids are a run: a store may delete them as a range, which costs a
/// database less than their ids.
const RUN: usize = 16;

#[derive(Debug, Clone)]
struct Out {
    order: Arc<SettleOrder>,
    lanes: Vec<Lane>,
}

/// Settled rows that a claim which is still out may bring in again.
#[derive(Debug, Clone)]
pub(super) struct Fading {
    pub(super) claim: u64,
    pub(super) rows: Vec<Position>,
}

impl Unsettled {
    pub(super) fn acknowledged(&mut self, delivered: Delivered, lane: Lane, now: Time) {
        self.since.get_or_insert(now);
        self.delivered.push(Waiting { row: delivered, lane, after: self.taken });
        *self.lanes.entry(lane).or_default() += 1;
        self.rows += 1;
    }

    pub(super) fn failed(&mut self, failed: Failed) {
        *self.lanes.entry(failed.lease.lane).or_default() += 1;
        self.failed.push_back(failed);
    }

    /// Delivered rows whose settlement is not confirmed.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    pub(super) fn has_lane(&self, lane: Lane) -> bool {
        self.lanes.contains_key(&lane)
    }

    /// Since when settles have failed.
    pub(super) fn failing(&self) -> Option<Time> {
        self.failing
    }

    /// When the next settle is due, if another may be out.
    pub(super) fn due(&self, settings: &Settings) -> Option<Time> {
        if self.out.len() >= settings.settles {
            return None;
        }
        if !self.again.is_empty() {
            return Some(self.again_at);
        }
        if self.failing.is_some() && !self.out.is_empty() {
            return None;
        }
        // A small window must not wait for more than it can hold.
        let enough = settings.settle_rows.min(settings.rows_in_flight.div_ceil(4));
        if !self.failed.is_empty() || self.delivered.len() >= enough {
            return Some(Time::ZERO);
        }
        self.since.map(|since| since + settings.settle_linger)
    }

    fn take(&mut self, settings: &Settings) -> Out {
        let count = self.delivered.len().min(settings.settle_rows);
        let mut chosen = self.choose(count, settings.rows_in_flight).into_iter();
        let mut lanes = Vec::with_capacity(count);
        let mut delivered = Vec::with_capacity(count);
        self.delivered.retain(|waiting| {
            let is_chosen = chosen.next() == Some(true);
            if is_chosen {
                delivered.push(waiting.row);
                lanes.push(waiting.lane);
            }
            !is_chosen
        });
        self.taken += count;
        if self.delivered.is_empty() {
            self.since = None;
        }
        let failed: Vec<Failed> =
            self.failed.drain(..self.failed.len().min(settings.settle_rows.div_ceil(4))).collect();
        lanes.extend(failed.iter().map(|failed| failed.lease.lane));
        let archive = settings.retention != Retention::Delete;
        Out { order: Arc::new(SettleOrder { delivered, failed, archive }), lanes }
    }

    /// Which of the delivered rows, in the order of their ids, the next settle takes: rows of runs
    /// first, and of others the lowest. Requests to the broker are answered in no order, so a row may
    /// have to wait for its neighbours, but not for ever: so many others overtake it at most.
    fn choose(&mut self, count: usize, patience: usize) -> Vec<bool> {
        self.delivered.sort_by_key(|waiting| waiting.row.id.position);
        let mut chosen = vec![false; self.delivered.len()];
        let mut room = count;
        let mut choose = |chosen: &mut bool| {
            let choose = room > 0 && !*chosen;
            room -= usize::from(choose);
            *chosen |= choose;
        };
        let overdue = |waiting: &Waiting| self.taken - waiting.after >= patience;
        let waiting = chosen.iter_mut().zip(&self.delivered);
        waiting.filter(|(_, waiting)| overdue(waiting)).for_each(|(chosen, _)| choose(chosen));
        let position = |waiting: &Waiting| waiting.row.id.position.0;
        let mut at = 0;
        for run in self.delivered.chunk_by(|row, next| position(next) - position(row) == 1) {
            let next = at + run.len();
            if run.len() >= RUN {
                chosen[at..next].iter_mut().for_each(&mut choose);
            }
            at = next;
        }
        chosen.iter_mut().for_each(choose);
        chosen
    }

    fn confirm(&mut self, out: &Out) {
        self.rows -= out.order.delivered.len();
        for lane in &out.lanes {
            if let Some(count) = self.lanes.get_mut(lane) {
                *count -= 1;
                if *count == 0 {
                    self.lanes.remove(lane);
                }
            }
        }
    }
}

impl Machine {
    pub(super) fn next_settle(&mut self, now: Time) -> Option<Action> {
        if matches!(self.stage, Stage::Releasing | Stage::Stopping | Stage::Stopped) {
            return None;
        }
        let due = self.unsettled.due(&self.settings)?;
        // A lane that is being handed over waits for nothing.
        let hurry = self.stage != Stage::Running
            || self.leases.iter().any(|(_, held)| held.draining.is_some());
        if due > now && !(hurry && self.unsettled.again.is_empty()) {
            return None;
        }
        let (number, out) = match self.unsettled.again.pop_front() {
            Some(again) => again,
            None => {
                self.unsettled.next += 1;
                (self.unsettled.next, self.unsettled.take(&self.settings))
            }
        };
        let order = Arc::clone(&out.order);
        self.unsettled.out.insert(number, out);
        Some(Action::Settle(number, order))
    }

    pub(super) fn settled(
        &mut self,
        number: u64,
        result: Result<Settled, StoreErrorKind>,
        now: Time,
    ) {
        let Some(out) = self.unsettled.out.remove(&number) else { return };
        let settled = match result {
            Ok(settled) => settled,
            Err(_) if seeded!("unclear-settle-is-done") => Settled::default(),
            Err(kind) => {
                // It may have happened: the rows stay known until it was repeated.
                let wait = match kind {
                    StoreErrorKind::Conflict => Duration::from_millis(5),
                    _ => Duration::from_millis(100),
                };
                let factor = 1 << self.unsettled.failures.min(5);
                self.unsettled.failures += 1;
                self.unsettled.again_at = now + (wait * factor).mul_f64(0.5 + 0.5 * self.chance());
                if kind != StoreErrorKind::Conflict || self.unsettled.failures > 5 {
                    self.unsettled.failing.get_or_insert(now);
                }
                self.unsettled.again.push_back((number, out));
                return self.store_failed(Step::Settle, kind);
            }
        };
        self.unsettled.failing = None;
        self.unsettled.failures = 0;
        self.unsettled.confirm(&out);
        let rows: Vec<Position> =
            out.order.delivered.iter().map(|delivered| delivered.id.position).collect();
        if !rows.is_empty() {
            self.tell(Event::Settled { rows: rows.len() });
        }
        self.forget_settled(rows);
        for failed in &out.order.failed {
            self.failure_recorded(failed, &settled, now);
        }
    }

    /// Rows of a confirmed settlement are forgotten once no read that was sent before can bring
    /// them in again.
    fn forget_settled(&mut self, rows: Vec<Position>) {
        match &self.claiming {
            Some(claim) if !seeded!("forget-on-settle") => {
                self.fading.push_back(Fading { claim: claim.number, rows });
            }
            _ => self.forget(&rows),
        }
    }

    pub(super) fn forget(&mut self, rows: &[Position]) {
        for rows in rows.chunks(AHEAD) {
            self.look_at_rows(rows.iter().copied());
            for position in rows {
                self.rows.remove(position);
            }
        }
    }

    fn failure_recorded(&mut self, failed: &Failed, settled: &Settled, now: Time) {
        let position = failed.id.position;
        let claims = self.claims;
        let Some(row) = self.rows.get_mut(&position) else { return };
        if row.phase != Phase::Writing || row.id != failed.id.message {
            return;
        }
        if settled.refused.contains(&position) {
            row.phase = Phase::Unclear;
            self.recheck.push(position);
            return;
        }
        row.phase = Phase::Queued;
        row.state.attempts = failed.attempts;
        row.changed_at_claim = claims;
        let (key, id, topic) = (row.key, row.id, Arc::clone(&self.topics.get(row.topic).name));
        match failed.settlement {
            Settlement::Retry(after) => {
                row.parked_until = Some(now + after);
                let attempts = failed.attempts;
                self.tell(Event::RetryScheduled { topic, id, attempts, after });
            }
            Settlement::Held => {
                row.state.held = true;
                self.tell(Event::Held { topic, id });
            }
            Settlement::Dead => {
                self.tell(Event::Dead { topic, id });
                self.fade_row(position, now);
                return;
            }
        }
        self.place(key, now);
    }

    /// A row that left the outbox though it was not delivered: as with delivered rows, a claim
    /// that is out may still bring it in.
    fn fade_row(&mut self, position: Position, now: Time) {
        let Some(row) = self.rows.get_mut(&position) else { return };
        row.phase = Phase::Acknowledged;
        let id = row.key;
        if let Some(key) = self.keys.get_mut(&id) {
            key.queue.remove(position);
        }
        self.watched.remove(&position);
        self.forget_settled(vec![position]);
        self.place(id, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delivery::{Receipt, RowId};
    use crate::message::MessageId;

    fn acknowledge(unsettled: &mut Unsettled, positions: impl IntoIterator<Item = u64>) {
        for position in positions {
            let id = RowId::new(Position(position), MessageId::from_bytes([0; 16]));
            let delivered = Delivered::new(id, Receipt::default());
            unsettled.acknowledged(delivered, Lane(0), Duration::ZERO);
        }
    }

    fn take(unsettled: &mut Unsettled) -> Vec<u64> {
        let out = unsettled.take(&Settings::default());
        out.order.delivered.iter().map(|row| row.id.position.0).collect()
    }

    #[test]
    fn a_settle_takes_neighbours() {
        let mut unsettled = Unsettled::default();
        // Two requests were answered, each with every second row.
        acknowledge(&mut unsettled, (0..1_000).map(|n| 2 * n));
        acknowledge(&mut unsettled, (0..1_000).map(|n| 2 * n + 1));
        assert_eq!(take(&mut unsettled), (0..900).collect::<Vec<_>>());
        assert_eq!(take(&mut unsettled), (900..1_800).collect::<Vec<_>>());
        acknowledge(&mut unsettled, [7]);
        assert_eq!(take(&mut unsettled), [7].into_iter().chain(1_800..2_000).collect::<Vec<_>>());
    }

    #[test]
    fn rows_without_their_neighbours_let_runs_go_first() {
        let mut unsettled = Unsettled::default();
        let alone = |from: u64| (from..from + 1_000).map(|n| 2 * n);
        acknowledge(&mut unsettled, alone(0));
        acknowledge(&mut unsettled, 5_000..5_950);
        acknowledge(&mut unsettled, alone(5_000));
        assert_eq!(take(&mut unsettled), (5_000..5_900).collect::<Vec<_>>());
        // What is left of the run, and then the others from the lowest on.
        let expected = alone(0).take(850).chain(5_900..5_950).collect::<Vec<_>>();
        assert_eq!(take(&mut unsettled), expected);
        // The neighbours arrive.
        acknowledge(&mut unsettled, alone(5_000).map(|n| n + 1));
        assert_eq!(take(&mut unsettled), (10_000..10_900).collect::<Vec<_>>());
    }

    #[test]
    fn no_row_waits_for_ever_for_others_to_be_settled() {
        let mut unsettled = Unsettled::default();
        let settings = Settings::default();
        acknowledge(&mut unsettled, [1_000_000]);
        let mut overtaken = 0;
        loop {
            acknowledge(&mut unsettled, overtaken..overtaken + settings.settle_rows as u64);
            let settled = take(&mut unsettled);
            assert_eq!(settled.len(), settings.settle_rows);
            if settled.contains(&1_000_000) {
                break;
            }
            overtaken += settled.len() as u64;
            assert!(overtaken < 21_000, "it is still not settled");
        }
        assert!(overtaken > 19_000, "it went after {overtaken} others");
    }
}
