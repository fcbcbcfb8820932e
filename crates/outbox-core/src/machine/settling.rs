//! Recording what became of rows, and when a settled row may be forgotten.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::ahead::AHEAD;
use super::claimed::MOST_HALVINGS;
use super::{Action, Machine, Map, Phase, Settings, SettleOrder, Stage, Time};
use crate::delivery::{Lane, Position, Settlement};
use crate::observe::{Event, Step};
use crate::retry::Retention;
use crate::seeded::seeded;
use crate::store::{Delivered, Failed, Settled, StoreErrorKind};

/// Rows whose settlement is not confirmed.
#[derive(Debug, Clone, Default)]
pub(super) struct Unsettled {
    /// Delivered rows that were not chosen yet.
    waiting: Vec<Waiting>,
    /// Delivered rows that the next settles take, in this order.
    chosen: VecDeque<(Delivered, Lane)>,
    /// So many delivered rows were chosen so far.
    turn: u64,
    failed: VecDeque<Failed>,
    /// When the oldest delivered row that no settle has taken was acknowledged, or before.
    since: Option<Time>,
    out: Map<u64, Out>,
    /// Settles that failed, or whose answer was lost: repeated with the same rows.
    again: VecDeque<(u64, Out)>,
    again_at: Time,
    /// Failures that the store refuses to record: they are tried again now and then, and delivered rows
    /// do not wait for them.
    refused: VecDeque<(u64, Out)>,
    refused_at: Time,
    failures: u32,
    failing: Option<Time>,
    /// So often settles are halved that take too long.
    fewer: u32,
    lanes: Map<Lane, usize>,
    rows: usize,
    next: u64,
}

#[derive(Debug, Clone)]
struct Waiting {
    row: Delivered,
    lane: Lane,
    /// The turn when it was acknowledged.
    since: u64,
}

/// How long after a refusal it is tried again.
const REFUSED_WAIT: Duration = Duration::from_secs(5);

/// How soon a row is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// It waited for long, or its lane is waited for.
    Urgent,
    /// Its neighbours are there.
    Run,
    Alone,
}

/// So many rows with consecutive ids are a run. A store may delete them as a range, which costs a
/// database the less for each the longer it is.
const RUN: usize = 16;

/// The share of the waiting rows that is chosen at once: more would tear runs apart that are about to
/// be whole, and with less the choice costs more than it saves where a million rows wait.
const CHOICE: usize = 8;

#[derive(Debug, Clone)]
struct Out {
    order: Arc<SettleOrder>,
    lanes: Vec<Lane>,
    /// When it went to the store last.
    sent: Time,
}

impl Out {
    fn rows(&self) -> usize {
        self.order.delivered.len() + self.order.failed.len()
    }

    /// Takes half of the rows out.
    fn split(&mut self) -> Self {
        let order = Arc::make_mut(&mut self.order);
        let delivered = order.delivered.split_off(order.delivered.len() / 2);
        let failed = order.failed.split_off(order.failed.len().div_ceil(2));
        let failed_lanes = self.lanes.split_off(order.delivered.len() + delivered.len());
        let mut lanes = self.lanes.split_off(order.delivered.len());
        let (kept, gone) = failed_lanes.split_at(order.failed.len());
        self.lanes.extend_from_slice(kept);
        lanes.extend_from_slice(gone);
        let order = SettleOrder { delivered, failed, ..*order };
        Self { order: Arc::new(order), lanes, sent: self.sent }
    }

    /// Takes these failures out. Gives their lanes.
    fn abandon(&mut self, is_lost: impl Fn(&Failed) -> bool) -> Vec<Lane> {
        let order = Arc::make_mut(&mut self.order);
        let gone = order.failed.extract_if(.., |failed| is_lost(failed));
        let gone = gone.map(|failed| failed.lease.lane).collect();
        self.lanes.truncate(order.delivered.len());
        self.lanes.extend(order.failed.iter().map(|failed| failed.lease.lane));
        gone
    }
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
        self.waiting.push(Waiting { row: delivered, lane, since: self.turn });
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
        if !self.failed.is_empty() || self.chosen.len() + self.waiting.len() >= enough {
            return Some(Time::ZERO);
        }
        let refused = (!self.refused.is_empty()).then_some(self.refused_at);
        let delivered = self.since.map(|since| since + settings.settle_linger);
        refused.into_iter().chain(delivered).min()
    }

    /// Whether there is anything that no settle took before.
    fn has_new(&self) -> bool {
        !(self.failed.is_empty() && self.chosen.is_empty() && self.waiting.is_empty())
    }

    /// The store refuses this settle, and would again: from now on its failures go by themselves.
    fn part(&mut self, out: &mut Out, now: Time) {
        let order = Arc::make_mut(&mut out.order);
        let failed = std::mem::take(&mut order.failed);
        let lanes = out.lanes.split_off(order.delivered.len());
        let order = SettleOrder { delivered: Vec::new(), failed, ..order.clone() };
        self.next += 1;
        self.refused.push_back((self.next, Out { order: Arc::new(order), lanes, sent: out.sent }));
        self.refused_at = now + REFUSED_WAIT;
    }

    fn take(&mut self, settings: &Settings, is_leaving: impl Fn(Lane) -> bool) -> Out {
        if self.chosen.is_empty() {
            self.choose(settings, is_leaving);
        }
        let most = |rows: usize| (rows >> self.fewer).max(1);
        let count = self.chosen.len().min(most(settings.settle_rows));
        let failures = self.failed.len().min(most(settings.settle_rows.div_ceil(4)));
        let (delivered, mut lanes): (Vec<_>, Vec<_>) = self.chosen.drain(..count).unzip();
        if self.chosen.is_empty() && self.waiting.is_empty() {
            self.since = None;
        }
        let failed: Vec<Failed> = self.failed.drain(..failures).collect();
        lanes.extend(failed.iter().map(|failed| failed.lease.lane));
        let archive = settings.retention != Retention::Delete;
        let order = SettleOrder { delivered, failed, archive, repeated: false };
        Out { order: Arc::new(order), lanes, sent: Time::ZERO }
    }

    /// Chooses what the next settles take, in the order of ids: what is urgent, then runs, then the
    /// lowest. Requests to the broker are answered in no order, so that a row may have to wait for
    /// its neighbours, but not for ever: it is urgent once a window of others was chosen before it.
    fn choose(&mut self, settings: &Settings, is_leaving: impl Fn(Lane) -> bool) {
        let position = |waiting: &Waiting| waiting.row.id.position.0;
        self.waiting.sort_by_key(position);
        // Few lanes are, mostly none: it is not asked for each row.
        let lanes = self.lanes.keys().copied();
        let leaving: BTreeSet<Lane> = lanes.filter(|lane| is_leaving(*lane)).collect();
        let is_late = |since: u64| self.turn - since >= settings.rows_in_flight as u64;
        let mut classes = Vec::with_capacity(self.waiting.len());
        for run in self.waiting.chunk_by(|row, next| position(next) - position(row) == 1) {
            let usual = if run.len() >= RUN { Class::Run } else { Class::Alone };
            classes.extend(run.iter().map(|row| {
                match is_late(row.since) || leaving.contains(&row.lane) {
                    true => Class::Urgent,
                    false => usual,
                }
            }));
        }
        let share = (classes.len() / CHOICE).max(1).next_multiple_of(settings.settle_rows);
        let mut room = share.min(classes.len());
        self.turn += room as u64;
        let mut chosen = vec![false; classes.len()];
        for class in [Class::Urgent, Class::Run, Class::Alone] {
            let rows = chosen.iter_mut().zip(&classes).filter(|(_, of)| **of == class);
            for (chosen, _) in rows.take(room) {
                *chosen = true;
                room -= 1;
            }
        }
        let mut chosen = chosen.into_iter();
        self.waiting.retain(|waiting| {
            let chosen = chosen.next() == Some(true);
            if chosen {
                self.chosen.push_back((waiting.row, waiting.lane));
            }
            !chosen
        });
    }

    /// These lanes were lost: failures that were not recorded yet are not written any more. Should the
    /// same lease come back, its rows have been read again, and may be under way.
    pub(super) fn abandon(&mut self, lost: &[Lane]) {
        let is_lost = |failed: &Failed| lost.contains(&failed.lease.lane);
        let mut gone: Vec<Lane> = Vec::new();
        self.failed.retain(|failed| {
            gone.extend(is_lost(failed).then_some(failed.lease.lane));
            !is_lost(failed)
        });
        let waiting = self.again.iter_mut().chain(&mut self.refused).map(|(_, out)| out);
        for out in waiting.chain(self.out.values_mut()) {
            if out.order.failed.iter().any(is_lost) {
                gone.extend(out.abandon(is_lost));
            }
        }
        self.again.retain(|(_, out)| !out.lanes.is_empty());
        self.refused.retain(|(_, out)| !out.lanes.is_empty());
        gone.into_iter().for_each(|lane| self.leave(lane));
    }

    fn leave(&mut self, lane: Lane) {
        if let Some(count) = self.lanes.get_mut(&lane) {
            *count -= 1;
            if *count == 0 {
                self.lanes.remove(&lane);
            }
        }
    }

    fn confirm(&mut self, out: &Out) {
        self.rows -= out.order.delivered.len();
        out.lanes.iter().for_each(|lane| self.leave(*lane));
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
        let refused = self.unsettled.refused_at <= now && self.unsettled.again.is_empty();
        let refused = if refused { self.unsettled.refused.pop_front() } else { None };
        let (number, mut out) = match self.unsettled.again.pop_front().or(refused) {
            Some(again) => again,
            None if !self.unsettled.has_new() => return None,
            None => {
                self.unsettled.next += 1;
                // A lane that is being handed over, or was lost, waits for nothing.
                let is_leaving =
                    |lane| self.leases.get(lane).is_none_or(|held| held.draining.is_some());
                (self.unsettled.next, self.unsettled.take(&self.settings, is_leaving))
            }
        };
        let order = Arc::clone(&out.order);
        out.sent = now;
        self.unsettled.out.insert(number, out);
        Some(Action::Settle(number, order))
    }

    pub(super) fn settled(
        &mut self,
        number: u64,
        result: Result<Settled, StoreErrorKind>,
        now: Time,
    ) {
        let Some(mut out) = self.unsettled.out.remove(&number) else { return };
        let settled = match result {
            Ok(settled) => settled,
            Err(_) if seeded!("unclear-settle-is-done") => Settled::default(),
            // All of it was given up in the meantime.
            Err(kind) if out.lanes.is_empty() => return self.store_failed(Step::Settle, kind),
            Err(kind) => {
                // It may have happened: the rows stay known until it was repeated.
                Arc::make_mut(&mut out.order).repeated = true;
                let passes = matches!(kind, StoreErrorKind::Conflict | StoreErrorKind::Unavailable);
                if !passes && !out.order.failed.is_empty() {
                    self.unsettled.part(&mut out, now);
                    if out.order.delivered.is_empty() {
                        return self.store_failed(Step::Settle, kind);
                    }
                }
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
                // What took too long may have been too much.
                let took = now.saturating_sub(out.sent);
                if took > self.settings.statement_deadline / 2 && out.rows() > 1 {
                    self.unsettled.fewer = (self.unsettled.fewer + 1).min(MOST_HALVINGS);
                    self.unsettled.next += 1;
                    self.unsettled.again.push_back((self.unsettled.next, out.split()));
                }
                self.unsettled.again.push_back((number, out));
                return self.store_failed(Step::Settle, kind);
            }
        };
        self.unsettled.failing = None;
        self.unsettled.failures = 0;
        if now.saturating_sub(out.sent) < self.settings.statement_deadline / 4 {
            self.unsettled.fewer = self.unsettled.fewer.saturating_sub(1);
        }
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
        row.attempts = failed.attempts;
        row.changed_at_claim = claims;
        let (key, id, topic) = (row.key, row.id, Arc::clone(&self.topics.get(row.topic).name));
        match failed.settlement {
            Settlement::Retry(after) => {
                row.parked_until = Some(now + after);
                let attempts = failed.attempts;
                self.tell(Event::RetryScheduled { topic, id, attempts, after });
            }
            Settlement::Held => {
                row.held = true;
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

    const IN_LANE_1: u64 = 1_000_000;

    fn acknowledge(unsettled: &mut Unsettled, positions: impl IntoIterator<Item = u64>) {
        for position in positions {
            let id = RowId::new(Position(position), MessageId::from_bytes([0; 16]));
            let delivered = Delivered::new(id, Receipt::default());
            let lane = Lane(u16::from(position == IN_LANE_1));
            unsettled.acknowledged(delivered, lane, Duration::ZERO);
        }
    }

    fn take(unsettled: &mut Unsettled) -> Vec<u64> {
        let out = unsettled.take(&Settings::default(), |_| false);
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
            if settled.contains(&1_000_000) {
                break;
            }
            overtaken += settled.len() as u64;
            assert!(overtaken < 21_000, "it is still not settled");
        }
        assert!(overtaken > 19_000, "it went after {overtaken} others");
    }

    #[test]
    fn a_row_whose_lane_is_handed_over_waits_for_no_neighbours() {
        let mut unsettled = Unsettled::default();
        acknowledge(&mut unsettled, 0..2_000);
        acknowledge(&mut unsettled, [IN_LANE_1]);
        let out = unsettled.take(&Settings::default(), |lane| lane == Lane(1));
        assert_eq!(out.order.delivered.len(), 900);
        assert_eq!(out.order.delivered[899].id.position, Position(IN_LANE_1));
    }

    #[test]
    fn every_row_is_settled_once() {
        let mut unsettled = Unsettled::default();
        let mut settled = Vec::new();
        for block in 0..40 {
            // Partition by partition, as a broker answers, and a part of it a block later.
            for partition in 0..7 {
                let block = if partition == 6 { block + 1 } else { block };
                acknowledge(&mut unsettled, (0..300).map(|n| block * 2_100 + n * 7 + partition));
            }
            settled.extend(take(&mut unsettled));
            settled.extend(take(&mut unsettled));
        }
        loop {
            match take(&mut unsettled) {
                rows if rows.is_empty() => break,
                rows => settled.extend(rows),
            }
        }
        assert_eq!(unsettled.since, None);
        assert_eq!(settled.len(), 40 * 2_100);
        settled.sort_unstable();
        settled.dedup();
        assert_eq!(settled.len(), 40 * 2_100);
    }
}
