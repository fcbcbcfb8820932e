//! Which lanes are ours, which to take and which to hand over.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Time;
use crate::delivery::{Lane, Lease, WorkerId};
use crate::seeded::seeded;
use crate::store::{LaneRecord, Standing, TakeOver, WorkerRecord};

/// What a worker is for one part in so many of a lease, in trouble or not, it goes on to be.
const STEADY: u32 = 9;

/// What another worker said of itself longer ago than one part in so many of a lease may have been its
/// last words.
const CURRENT: u32 = 6;

#[derive(Debug, Clone)]
pub(super) struct Leases {
    me: WorkerId,
    ttl: Duration,
    held: BTreeMap<Lane, HeldLane>,
    /// Lanes that the store says are ours though we did not get that answer: renewed first, used
    /// only once a renewal was answered.
    adopted: Vec<Lease>,
    observed: BTreeMap<Lane, Observed>,
    /// Since when we make no progress.
    sick: Option<Time>,
    /// Since when other workers say that they make progress, those that said so just now.
    well: BTreeMap<WorkerId, Time>,
    standing: Standing,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct HeldLane {
    pub(super) epoch: u64,
    /// Our own deadline: a monotonic instant taken before the request, plus the lease.
    pub(super) until: Time,
    /// Since when the lane is being handed over: nothing more is sent on it.
    pub(super) draining: Option<Time>,
}

/// How a lane that is not ours stood, and since when it has stood like that on our own clock.
#[derive(Debug, Clone, Copy)]
struct Observed {
    epoch: u64,
    stamp: u64,
    since: Time,
    /// Whether its owner renewed it since we know of that owner: until then it may be dead.
    renewed: bool,
}

/// What a keep changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    pub(super) gained: Vec<Lane>,
    pub(super) lost: Vec<Lane>,
}

impl Leases {
    pub(super) fn new(me: WorkerId, ttl: Duration) -> Self {
        Self {
            me,
            ttl,
            held: BTreeMap::new(),
            adopted: Vec::new(),
            observed: BTreeMap::new(),
            sick: None,
            well: BTreeMap::new(),
            standing: Standing::default(),
        }
    }

    pub(super) fn get(&self, lane: Lane) -> Option<&HeldLane> {
        self.held.get(&lane)
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Lane, &HeldLane)> {
        self.held.iter().map(|(lane, held)| (*lane, held))
    }

    pub(super) fn all(&self) -> Vec<Lease> {
        self.iter().map(|(lane, held)| Lease::new(lane, held.epoch)).collect()
    }

    pub(super) fn remove(&mut self, lane: Lane) {
        self.held.remove(&lane);
    }

    /// The leases to renew.
    pub(super) fn renewals(&self) -> Vec<Lease> {
        self.all().into_iter().chain(self.adopted.iter().copied()).collect()
    }

    /// Whether every lane is ours and no other worker is registered: nothing to watch then.
    pub(super) fn alone(&self) -> bool {
        !self.standing.lanes.is_empty()
            && self.held.len() == self.standing.lanes.len()
            && self.standing.workers.len() <= 1
    }

    /// The lanes to take now, given how all stood at the last keep.
    pub(super) fn take_overs(&self, now: Time, healthy: bool) -> Vec<TakeOver> {
        if !healthy || self.standing.lanes.is_empty() {
            return Vec::new();
        }
        let lanes = self.standing.lanes.len();
        let share = self.share();
        let kept = self.iter().filter(|(_, held)| held.draining.is_none()).count();
        let room = share.saturating_sub(kept + self.adopted.len());
        // Different workers start at different lanes, so that they seldom collide.
        let start = usize::from(self.me.as_bytes()[15]) % lanes;
        let (tail, head) = self.standing.lanes.split_at(start);
        let wanted = head.iter().chain(tail).filter(|record| self.is_free(record, now));
        let neglected = |record: &&LaneRecord| self.unchanged_for(record, now) > self.ttl;
        let (old, fresh): (Vec<_>, Vec<_>) = wanted.partition(neglected);
        // A lane that stood free for a whole lease is taken by anybody.
        let extra = if room == 0 { old.len().min(1) } else { room };
        old.into_iter().chain(fresh).take(extra).map(TakeOver::of).collect()
    }

    /// Free lanes are taken at once; others need expiry on the store's clock *and* no change for
    /// the row's own lease on our clock, so that a step of the store's clock takes nothing.
    fn is_free(&self, record: &LaneRecord, now: Time) -> bool {
        match record.owner {
            None => true,
            Some(owner) if owner == self.me => false,
            Some(_) => record.expired && self.unchanged_for(record, now) >= record.ttl,
        }
    }

    fn unchanged_for(&self, record: &LaneRecord, now: Time) -> Duration {
        match self.observed.get(&record.lane) {
            Some(o) if o.epoch == record.epoch && o.stamp == record.stamp => {
                now.saturating_sub(o.since)
            }
            _ => Duration::ZERO,
        }
    }

    /// Takes in the answer to a keep that was sent at `sent` with these renewals and take-overs.
    pub(super) fn apply(
        &mut self,
        standing: Standing,
        renewed: &[Lease],
        taken: &[TakeOver],
        sent: Time,
        now: Time,
    ) -> Changes {
        let mut changes = Changes::default();
        let sent = if seeded!("deadline-after-the-reply") { now } else { sent };
        self.adopted.clear();
        for record in &standing.lanes {
            let lane = record.lane;
            let lease = Lease::new(lane, record.epoch);
            let ours = record.owner == Some(self.me);
            let confirmed = renewed.contains(&lease)
                || taken.iter().any(|t| t.lane == lane && t.epoch + 1 == record.epoch);
            match self.held.get_mut(&lane) {
                Some(held) if ours && held.epoch == record.epoch => {
                    // Not a guard: a lease that this keep did not renew is still held.
                    held.until = if confirmed { sent + self.ttl } else { held.until };
                }
                Some(_) => {
                    self.held.remove(&lane);
                    changes.lost.push(lane);
                    if ours {
                        self.adopted.push(lease);
                    }
                }
                None if ours && confirmed => {
                    let until = sent + self.ttl;
                    self.held.insert(lane, HeldLane { epoch: record.epoch, until, draining: None });
                    changes.gained.push(lane);
                }
                None if ours => self.adopted.push(lease),
                None => {}
            }
            let (alive, same) = match self.observed.get(&lane) {
                Some(o) if o.epoch == record.epoch => (true, o.stamp == record.stamp),
                _ => (false, false),
            };
            if !same {
                let Lease { epoch, .. } = lease;
                let seen = Observed { epoch, stamp: record.stamp, since: now, renewed: alive };
                self.observed.insert(lane, seen);
            }
        }
        // The number of lanes was changed.
        let listed: BTreeSet<Lane> = standing.lanes.iter().map(|record| record.lane).collect();
        let gone = self.held.extract_if(.., |lane, _| !listed.contains(lane));
        changes.lost.extend(gone.map(|(lane, _)| lane));
        self.standing = standing;
        let current = |worker: &&WorkerRecord| worker.seen < self.ttl / CURRENT;
        let peers =
            self.standing.workers.iter().filter(|worker| self.is_peer(worker)).filter(current);
        let since = |worker: WorkerId| self.well.get(&worker).copied().unwrap_or(now);
        self.well = peers.map(|peer| (peer.worker, since(peer.worker))).collect();
        changes
    }

    /// Lanes whose lease has run out on our own clock.
    pub(super) fn expire(&mut self, now: Time) -> Vec<Lane> {
        let gone: Vec<Lane> =
            self.iter().filter(|(_, held)| held.until <= now).map(|(lane, _)| lane).collect();
        for lane in &gone {
            self.held.remove(lane);
        }
        gone
    }

    /// How many lanes we take at most: all that are ours to have, but not what another live worker
    /// is short of. That worker may be dead without anybody knowing yet, and what was handed over
    /// for it would come back to us at once, for as long as its lease runs.
    fn share(&self) -> usize {
        let (lanes, workers) = (self.standing.lanes.len(), self.live_healthy(true));
        let floor = lanes / workers;
        if self.somebody_is_below(floor) { floor } else { lanes.div_ceil(workers) }
    }

    /// Begins to hand lanes over: all of them when we make no progress and another worker does, each
    /// for some time, else those above our share, and one above the floor while a healthy worker is
    /// below it and has no free lane to take.
    pub(super) fn hand_over(&mut self, now: Time, healthy: bool) {
        self.sick = if healthy { None } else { self.sick.or(Some(now)) };
        let is_sick = self.sick.is_some_and(|since| self.is_steady(since, now));
        let gives_up = is_sick && self.steady_peers(now) > 0;
        let lanes = self.standing.lanes.len();
        let others = self.live_healthy(false);
        if others == 0 || lanes == 0 {
            return;
        }
        let keep = if gives_up {
            0
        } else {
            let free = self.standing.lanes.iter().any(|record| record.owner.is_none());
            let draining = self.held.values().any(|held| held.draining.is_some());
            if free || draining { lanes.div_ceil(others + 1) } else { self.share() }
        };
        let mut kept: Vec<Lane> =
            self.iter().filter(|(_, held)| held.draining.is_none()).map(|(lane, _)| lane).collect();
        // Towards the floor one lane at a time, so that workers do not give away too many at once.
        let excess = kept.len().saturating_sub(keep);
        let excess = if kept.len() <= lanes.div_ceil(others + 1) { excess.min(1) } else { excess };
        let excess = if gives_up { kept.len() } else { excess };
        for lane in kept.split_off(kept.len() - excess) {
            if let Some(held) = self.held.get_mut(&lane) {
                held.draining = Some(now);
            }
        }
    }

    /// Takes back lanes that were to be handed over, when nobody is left to take them. Pages have
    /// passed their rows meanwhile.
    pub(super) fn keep_on(&mut self) -> Vec<Lane> {
        if self.live_healthy(false) > 0 {
            return Vec::new();
        }
        let draining = self.held.iter_mut().filter(|(_, held)| held.draining.is_some());
        draining
            .map(|(lane, held)| {
                held.draining = None;
                *lane
            })
            .collect()
    }

    /// In an outage one worker notices its begin last, and one its end first. They are in the same
    /// trouble as all others, and must not get the lanes of all.
    fn is_steady(&self, since: Time, now: Time) -> bool {
        now.saturating_sub(since) >= self.ttl / STEADY
    }

    fn steady_peers(&self, now: Time) -> usize {
        self.well.values().filter(|since| self.is_steady(**since, now)).count()
    }

    /// Whether somebody else could do our work.
    pub(super) fn has_peer(&self) -> bool {
        self.live_healthy(false) > 0
    }

    fn somebody_is_below(&self, floor: usize) -> bool {
        self.standing
            .workers
            .iter()
            .any(|worker| self.is_peer(worker) && self.lanes_of(worker.worker) < floor)
    }

    /// Live healthy workers; `with_me` counts us whatever the store says.
    fn live_healthy(&self, with_me: bool) -> usize {
        let others = self.standing.workers.iter().filter(|worker| self.is_peer(worker));
        others.count() + usize::from(with_me)
    }

    /// Whether it is another worker that lives and can do its work, with lanes or without.
    fn is_peer(&self, worker: &WorkerRecord) -> bool {
        let visible = !seeded!("idle-workers-are-invisible") || self.lanes_of(worker.worker) > 0;
        visible && worker.worker != self.me && worker.healthy && worker.seen < self.ttl
    }

    fn lanes_of(&self, worker: WorkerId) -> usize {
        self.standing.lanes.iter().filter(|lane| lane.owner == Some(worker)).count()
    }

    /// Whose expired or live lanes we are waiting for, and for how long they stood unchanged.
    pub(super) fn waiting_for(&self, now: Time) -> Option<(WorkerId, Duration)> {
        // Three keeps missed: it may still come back, but who watches wants to know.
        let live = |owner: WorkerId| {
            self.standing.workers.iter().any(|w| w.worker == owner && w.seen < self.ttl / 3)
        };
        self.standing.lanes.iter().find_map(|record| match record.owner {
            Some(owner) if owner != self.me && !live(owner) => {
                Some((owner, record.ttl.saturating_sub(self.unchanged_for(record, now))))
            }
            _ => None,
        })
    }

    /// Whether every lane is ours or owned by a worker that was seen to live.
    pub(super) fn all_served(&self) -> bool {
        !self.standing.lanes.is_empty()
            && self.standing.lanes.iter().all(|record| match record.owner {
                Some(owner) if owner == self.me => self.held.contains_key(&record.lane),
                Some(_) => {
                    !record.expired && self.observed.get(&record.lane).is_some_and(|o| o.renewed)
                }
                None => false,
            })
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use crate::lease_table::LeaseTable;
    use crate::store::{KeepLeases, Release};

    const TTL: Duration = Duration::from_secs(6);

    struct Worker {
        leases: Leases,
        hand_overs: usize,
    }

    impl Worker {
        fn new(id: u8) -> Self {
            let me = WorkerId::from_bytes([id; 16]);
            Self { leases: Leases::new(me, TTL), hand_overs: 0 }
        }

        fn keep(&mut self, table: &mut LeaseTable, now: Time, healthy: bool) {
            for _ in 0..2 {
                let renew = self.leases.renewals();
                let take = self.leases.take_overs(now, healthy);
                let request = KeepLeases::new(self.leases.me, TTL);
                let standing = table.keep(&request.healthy(healthy).renew(&renew).take(&take), now);
                self.leases.apply(standing, &renew, &take, now, now);
                self.leases.hand_over(now, healthy);
                let draining = self.leases.iter().filter(|(_, held)| held.draining.is_some());
                let release: Vec<Lease> =
                    draining.map(|(lane, held)| Lease::new(lane, held.epoch)).collect();
                self.hand_overs += release.len();
                table.release(&Release::new(self.leases.me, &release), now);
                for lease in release {
                    self.leases.remove(lease.lane);
                }
            }
        }
    }

    fn run(table: &mut LeaseTable, workers: &mut [Worker], from: u64, seconds: u64) {
        for second in from..from + seconds {
            for worker in workers.iter_mut() {
                worker.keep(table, Duration::from_secs(second), true);
            }
        }
    }

    #[test]
    fn lanes_are_shared_fairly_among_any_number_of_workers_and_then_stand_still() {
        for count in [1_u8, 2, 3, 5, 16, 17] {
            let mut table = LeaseTable::new(NonZeroU16::new(16).unwrap());
            let mut workers: Vec<Worker> = (1..=count).map(Worker::new).collect();
            run(&mut table, &mut workers, 0, 30);
            let owned: Vec<usize> = workers.iter().map(|worker| worker.leases.len()).collect();
            assert_eq!(owned.iter().sum::<usize>(), 16, "{owned:?}");
            let spread = owned.iter().max().unwrap() - owned.iter().min().unwrap();
            assert!(spread <= 1, "{count} workers: {owned:?}");
            let before: usize = workers.iter().map(|worker| worker.hand_overs).sum();
            run(&mut table, &mut workers, 30, 60);
            let after: usize = workers.iter().map(|worker| worker.hand_overs).sum();
            assert_eq!(before, after, "hand-overs go on with {count} workers");
        }
    }

    #[test]
    fn lanes_offered_to_a_worker_that_died_do_not_go_to_and_fro() {
        for (count, dies_at) in [(3_u8, 1), (3, 2), (3, 30), (5, 1), (5, 3), (16, 2), (17, 2)] {
            let mut table = LeaseTable::new(NonZeroU16::new(16).unwrap());
            let mut workers: Vec<Worker> = (1..count).map(Worker::new).collect();
            run(&mut table, &mut workers, 0, 30);
            workers.push(Worker::new(count));
            run(&mut table, &mut workers, 30, dies_at);
            workers.pop();
            let before: usize = workers.iter().map(|worker| worker.hand_overs).sum();
            run(&mut table, &mut workers, 30 + dies_at, 15);
            let moved = workers.iter().map(|worker| worker.hand_overs).sum::<usize>() - before;
            assert!(moved <= 16, "{count} workers, dead after {dies_at} s: {moved} hand-overs");
            let owned: usize = workers.iter().map(|worker| worker.leases.len()).sum();
            assert_eq!(owned, 16, "{count} workers, dead after {dies_at} s");
        }
    }

    #[test]
    fn a_lane_that_is_not_there_any_more_is_lost() {
        let mut worker = Worker::new(1);
        worker.keep(&mut LeaseTable::new(NonZeroU16::new(4).unwrap()), Time::ZERO, true);
        let (mut standing, now) = (worker.leases.standing.clone(), Duration::from_secs(1));
        standing.lanes.retain(|record| record.lane.0 < 3);
        let changes = worker.leases.apply(standing, &[], &[], now, now);
        assert_eq!(changes, Changes { gained: vec![], lost: vec![Lane(3)] });
        assert!(worker.leases.get(Lane(3)).is_none() && worker.leases.len() == 3);
    }

    #[test]
    fn the_lanes_of_a_dead_worker_move_after_its_lease() {
        let mut table = LeaseTable::new(NonZeroU16::new(4).unwrap());
        let mut workers = vec![Worker::new(1), Worker::new(2)];
        run(&mut table, &mut workers, 0, 10);
        workers.remove(0);
        run(&mut table, &mut workers, 10, 6);
        assert_eq!(workers[0].leases.len(), 2);
        run(&mut table, &mut workers, 16, 3);
        assert_eq!(workers[0].leases.len(), 4);
    }

    #[test]
    fn a_step_of_the_stores_clock_takes_no_lane_from_a_live_worker() {
        let mut table = LeaseTable::new(NonZeroU16::MIN);
        let (mut owner, mut other) = (Worker::new(1), Worker::new(2));
        owner.keep(&mut table, Duration::from_secs(1), true);
        other.keep(&mut table, Duration::from_secs(1), true);
        // The store's clock jumps by an hour; on the other's own clock one second passes.
        let standing =
            table.keep(&KeepLeases::new(other.leases.me, TTL), Duration::from_secs(3600));
        assert!(standing.lanes[0].expired);
        other.leases.apply(standing, &[], &[], Duration::from_secs(2), Duration::from_secs(2));
        assert!(other.leases.take_overs(Duration::from_secs(2), true).is_empty());
        assert!(!other.leases.take_overs(Duration::from_secs(8), true).is_empty());
    }

    #[test]
    fn a_worker_without_progress_hands_everything_to_a_healthy_one_and_to_nobody_else() {
        let mut table = LeaseTable::new(NonZeroU16::new(4).unwrap());
        let mut sick = Worker::new(1);
        sick.keep(&mut table, Duration::from_secs(1), true);
        sick.keep(&mut table, Duration::from_secs(2), false);
        assert_eq!(sick.leases.len(), 4, "alone it keeps them");
        let mut well = Worker::new(2);
        for second in 3..6 {
            well.keep(&mut table, Duration::from_secs(second), true);
            sick.keep(&mut table, Duration::from_secs(second), false);
        }
        assert_eq!((sick.leases.len(), well.leases.len()), (0, 4));
    }

    #[test]
    fn who_notices_an_outage_last_or_its_end_first_gets_no_lanes_for_that() {
        let mut table = LeaseTable::new(NonZeroU16::new(16).unwrap());
        let mut workers: Vec<Worker> = (1..=4).map(Worker::new).collect();
        run(&mut table, &mut workers, 0, 30);
        let before: usize = workers.iter().map(|worker| worker.hand_overs).sum();
        let mut keep = |first: bool, rest: bool, from: u64, to: u64| {
            for tenth in from..to {
                for (number, worker) in workers.iter_mut().enumerate() {
                    let healthy = if number == 0 { first } else { rest };
                    worker.keep(&mut table, Duration::from_millis(tenth * 100), healthy);
                }
            }
            workers.iter().map(|worker| worker.hand_overs).sum::<usize>() - before
        };
        assert_eq!(keep(true, false, 300, 306), 0, "one has not noticed it yet");
        assert_eq!(keep(false, false, 306, 500), 0, "nobody is better off");
        assert_eq!(keep(true, false, 500, 506), 0, "one is, for less than a ninth of a lease");
        assert_eq!(keep(true, true, 506, 600), 0);
        assert_eq!(keep(true, false, 600, 606), 0, "the others have not been without for long");
        assert_eq!(keep(true, false, 606, 608), 12);
    }

    #[test]
    fn who_died_and_said_last_that_it_was_well_gets_no_lanes() {
        let mut table = LeaseTable::new(NonZeroU16::new(16).unwrap());
        let mut workers: Vec<Worker> = (1..=4).map(Worker::new).collect();
        run(&mut table, &mut workers, 0, 30);
        workers.pop();
        for tenth in 310..350 {
            for worker in &mut workers {
                worker.keep(&mut table, Duration::from_millis(tenth * 100), false);
            }
        }
        let owned: usize = workers.iter().map(|worker| worker.leases.len()).sum();
        assert_eq!(owned, 12, "the others keep theirs");
    }

    #[test]
    fn a_lane_taken_by_a_lost_answer_is_used_only_after_a_renewal() {
        let mut table = LeaseTable::new(NonZeroU16::MIN);
        let mut worker = Worker::new(1);
        let now = Duration::from_secs(1);
        let standing = table.keep(&KeepLeases::new(worker.leases.me, TTL), now);
        let take = [TakeOver::of(&standing.lanes[0])];
        let standing = table.keep(&KeepLeases::new(worker.leases.me, TTL).take(&take), now);
        worker.leases.apply(standing, &[], &[], now, now);
        assert_eq!(worker.leases.len(), 0);
        worker.keep(&mut table, Duration::from_secs(2), true);
        assert_eq!(worker.leases.len(), 1);
    }
}
