//! Lanes that come and go: leases are kept, rows of lanes are forgotten, lanes are handed back.
//!
//! Which lanes are wanted `leasing.rs` decides. A lane is not handed back while a message of it may
//! still be at the broker, and one that is gained is read from the start.

use std::collections::BTreeSet;
use std::time::Duration;

use super::claiming::LaneRows;
use super::horizon::Horizon;
use super::{Action, KeepOrder, Machine, Phase, Stage, Time};
use crate::delivery::{Lane, Lease, Position};
use crate::observe::{Event, Step};
use crate::seeded::seeded;
use crate::store::{Standing, StoreErrorKind};

impl Machine {
    pub(super) fn next_keep(&mut self, now: Time) -> Option<Action> {
        let leaving = !matches!(
            self.stage,
            Stage::Running | Stage::Draining(_) | Stage::Closing(_) | Stage::Settling(_)
        );
        if self.keeping.is_some() || self.releasing || leaving || self.keep_at > now {
            return None;
        }
        let healthy = self.is_healthy(now);
        let take = self.leases.take_overs(now, healthy);
        let order = KeepOrder { healthy, renew: self.leases.renewals(), take };
        self.keeping = Some((order.clone(), now));
        Some(Action::Keep(order))
    }

    pub(super) fn kept(&mut self, result: Result<Standing, StoreErrorKind>, now: Time) {
        let Some((order, sent)) = self.keeping.take() else { return };
        let standing = match result {
            Ok(standing) => standing,
            Err(kind) => {
                self.keep_failing.get_or_insert(now);
                self.keep_at = now + self.settings.keep_every.min(Duration::from_secs(1));
                return self.store_failed(Step::Keep, kind);
            }
        };
        self.keep_failing = None;
        self.meet_server(standing.server, now);
        let changes = self.leases.apply(standing, &order.renew, &order.take, sent, now);
        self.lose(changes.lost, now);
        self.gain(changes.gained, now);
        if self.stage == Stage::Running {
            let healthy = self.is_healthy(now);
            self.leases.hand_over(now, healthy);
            let kept = self.leases.keep_on();
            if !seeded!("no-catch-up-after-a-hand-over") {
                self.fresh_lanes.extend(kept);
            }
        }
        for key in std::mem::take(&mut self.stalled_by_lane) {
            self.place(key, now);
        }
        if !self.checked && !self.leases.has_peer() {
            self.check_at = self.check_at.min(now);
        }
        let more = !self.leases.take_overs(now, self.is_healthy(now)).is_empty()
            || self.leases.renewals().len() > self.leases.len();
        let every = self.settings.keep_every;
        self.keep_at = if more {
            now + Duration::from_millis(1)
        } else if self.leases.alone() {
            now + every
        } else {
            now + every.min(Duration::from_secs(1))
        };
    }

    /// Another server has other ids and other transactions: everything read before is void.
    pub(super) fn meet_server(&mut self, server: u64, now: Time) {
        let known = self.server.replace(server);
        if known.is_some_and(|known| known != server) {
            self.start_over(now);
        }
    }

    /// Forgets what was read, but for rows at the broker and those that were acknowledged, and reads all
    /// anew.
    pub(super) fn start_over(&mut self, now: Time) {
        self.tell(Event::ServerChanged);
        if let Some(claim) = &mut self.claiming {
            claim.void = true;
        }
        self.horizon = Horizon::default();
        self.catch_up = None;
        self.fresh_lanes.clear();
        self.scan_after = Position::START;
        self.sweep_after = None;
        self.caught_up = false;
        let lanes: Vec<Lane> = self.leases.iter().map(|(lane, _)| lane).collect();
        self.forget_lanes(&lanes, now);
        self.lanes.extend(lanes.into_iter().map(|lane| (lane, LaneRows::default())));
        self.pace.hurry(now);
    }

    pub(super) fn gain(&mut self, gained: Vec<Lane>, now: Time) {
        if gained.is_empty() {
            return;
        }
        if self.lanes.is_empty() && self.claiming.is_none() {
            // No page was read for anybody: everything is read from the start.
            self.horizon = Horizon::default();
            self.catch_up = None;
            self.fresh_lanes.clear();
        } else {
            self.fresh_lanes.extend(gained.iter().filter(|_| !seeded!("no-catch-up")));
        }
        for lane in &gained {
            self.lanes.insert(*lane, LaneRows::default());
        }
        self.caught_up = false;
        self.pace.hurry(now);
        self.last_progress = now;
        self.tell(Event::LanesGained { lanes: gained });
    }

    pub(super) fn lose(&mut self, lost: Vec<Lane>, now: Time) {
        if lost.is_empty() {
            return;
        }
        self.forget_lanes(&lost, now);
        for lane in &lost {
            self.lanes.remove(lane);
        }
        self.unsettled.abandon(&lost);
        self.tell(Event::LanesLost { lanes: lost });
    }

    /// Forgets the rows of lanes, except those at the broker and those that were acknowledged: their
    /// answers and their settlements still count. All lanes at once: there may be a thousand, and a
    /// million rows.
    pub(super) fn forget_lanes(&mut self, lanes: &[Lane], now: Time) {
        let lanes: BTreeSet<Lane> = lanes.iter().copied().collect();
        self.fresh_lanes.retain(|fresh| !lanes.contains(fresh));
        if let Some(catch_up) = &mut self.catch_up {
            catch_up.lanes.retain(|other| !lanes.contains(other));
            if catch_up.lanes.is_empty() {
                self.catch_up = None;
            }
        }
        let mut gone: Vec<Position> = self
            .rows
            .iter()
            .filter(|(_, row)| {
                lanes.contains(&row.lane)
                    && !matches!(row.phase, Phase::Offered | Phase::Acknowledged)
            })
            .map(|(position, _)| *position)
            .collect();
        gone.sort_unstable();
        for position in gone {
            self.drop_row(position, now);
        }
        for lane in lanes {
            if let Some(rows) = self.lanes.get_mut(&lane) {
                *rows = LaneRows::default();
            }
        }
    }

    pub(super) fn next_release(&mut self, now: Time) -> Option<Action> {
        if self.keeping.is_some() || self.releasing {
            return None;
        }
        let patience = self.settings.lease / 3;
        let mut leases = Vec::new();
        for (lane, held) in self.leases.iter() {
            let Some(since) = held.draining else { continue };
            let waited = now.saturating_sub(since) >= patience;
            let busy = self.batches.values().any(|batch| batch.has_lane(lane));
            let idle = !busy && (waited || !self.unsettled.has_lane(lane));
            if idle || seeded!("hand-over-without-draining") {
                leases.push(Lease::new(lane, held.epoch));
            }
        }
        if leases.is_empty() {
            return None;
        }
        let lanes: Vec<Lane> = leases.iter().map(|lease| lease.lane).collect();
        lanes.iter().for_each(|lane| self.leases.remove(*lane));
        self.forget_lanes(&lanes, now);
        for lane in &lanes {
            self.lanes.remove(lane);
        }
        self.tell(Event::LanesReleased { lanes });
        if self.leases.len() == 0 && !self.is_healthy(now) {
            self.given_up = self.given_up.saturating_add(1);
        }
        self.releasing = true;
        Some(Action::Release(leases, false))
    }

    pub(super) fn released(&mut self, result: Result<(), StoreErrorKind>) {
        self.releasing = false;
        if self.stage == Stage::Releasing {
            self.stage = Stage::Stopping;
            let lanes: Vec<Lane> = self.leases.iter().map(|(lane, _)| lane).collect();
            if !lanes.is_empty() {
                self.tell(Event::LanesReleased { lanes });
            }
        }
        if let Err(kind) = result {
            // They expire by themselves.
            self.store_failed(Step::Release, kind);
        }
    }
}
