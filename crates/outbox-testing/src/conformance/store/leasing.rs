//! A lane belongs to one worker, until the lease is given back or expires by the store's clock.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::time::{Duration, Instant};

use outbox_core::store::{KeepLeases, LaneRecord, Release, TakeOver};
use outbox_core::{Lane, Lease, WorkerId};

use super::stage::LONG;
use super::{Stage, StoreFixture};

const SHORT: Duration = Duration::from_millis(400);
const LONGER_THAN_SHORT: Duration = Duration::from_millis(600);

/// Opening is repeatable and always tells the same.
pub async fn opening_is_repeatable<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    assert_eq!(stage.store.open().await.unwrap(), stage.store.open().await.unwrap());
}

/// A free lane is taken under the next epoch.
pub async fn a_free_lane_is_taken_under_the_next_epoch<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let worker = WorkerId::generate();
    let free = stage.standing(worker).await.lanes;
    assert_eq!(free.iter().map(|record| record.lane).collect::<Vec<_>>(), stage.lanes);
    assert!(free.iter().all(|record| record.owner.is_none()), "{free:?}");
    let leases = stage.take(worker, LONG).await;
    let next = free.iter().map(|record| Lease::new(record.lane, record.epoch + 1));
    assert_eq!(leases, next.collect::<Vec<_>>());
    let taken = first_lane(&stage, worker).await;
    assert_eq!((taken.owner, taken.expired, taken.ttl), (Some(worker), false, LONG));
}

/// Only the lanes that were asked for are taken.
pub async fn only_the_wanted_lanes_are_taken<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let worker = WorkerId::generate();
    let free = stage.standing(worker).await.lanes;
    let wanted = [TakeOver::of(&free[0])];
    let standing = stage.keep(KeepLeases::new(worker, LONG).take(&wanted)).await;
    let owned = standing.lanes.iter().filter(|record| record.owner.is_some());
    assert_eq!(owned.map(|record| record.lane).collect::<Vec<_>>(), [Lane(0)]);
}

/// A lane under a lease that has not expired is not taken.
pub async fn a_leased_lane_is_not_taken<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let leases = stage.take(owner, LONG).await;
    assert_eq!(stage.take(other, LONG).await, []);
    let record = first_lane(&stage, other).await;
    assert_eq!((record.owner, record.epoch), (Some(owner), leases[0].epoch));
}

/// A lane whose lease has expired by the store's clock is taken under the next epoch.
pub async fn an_expired_lane_is_taken_under_the_next_epoch<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let lost = stage.take(owner, SHORT).await;
    stage.fixture.pass(LONGER_THAN_SHORT).await;
    assert!(first_lane(&stage, other).await.expired);
    let taken = stage.take(other, LONG).await;
    let next = lost.iter().map(|lease| Lease::new(lease.lane, lease.epoch + 1));
    assert_eq!(taken, next.collect::<Vec<_>>());
}

/// A lease that is renewed lasts its time from then on, under the same epoch and another stamp.
pub async fn a_renewed_lease_does_not_expire<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let leases = stage.take(owner, SHORT).await;
    let before = first_lane(&stage, owner).await;
    stage.keep(KeepLeases::new(owner, LONG).renew(&leases)).await;
    stage.fixture.pass(LONGER_THAN_SHORT).await;
    assert_eq!(stage.take(other, LONG).await, []);
    let after = first_lane(&stage, other).await;
    assert_eq!((after.owner, after.epoch, after.ttl), (Some(owner), before.epoch, LONG));
    assert_ne!(after.stamp, before.stamp);
}

/// When the store's clock is set back, a lease that is renewed lasts its time from then on, and no
/// other one lasts until the clock has come so far again.
pub async fn no_lease_lasts_longer_for_a_clock_that_is_set_back<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let leases = stage.take(owner, SHORT).await;
    if !stage.fixture.set_clock_back(LONG * 100).await {
        return;
    }
    let gone = stage.standing(other).await;
    assert!(gone.lanes.iter().all(|lane| lane.expired), "a dead worker keeps its lanes");
    let knows_owner = gone.workers.iter().any(|worker| worker.worker == owner);
    assert!(!knows_owner, "a dead worker is not forgotten");
    let began = Instant::now();
    stage.keep(KeepLeases::new(owner, SHORT).renew(&leases)).await;
    assert!(!first_lane(&stage, other).await.expired || began.elapsed() >= SHORT);
    stage.fixture.pass(LONGER_THAN_SHORT).await;
    let taken = stage.take(other, LONG).await;
    let next: Vec<_> = leases.iter().map(|lease| Lease::new(lease.lane, lease.epoch + 1)).collect();
    assert_eq!(taken, next);
    stage.fixture.set_clock_back(LONG * 100).await;
    let taken = stage.take(owner, LONG).await;
    let next = next.iter().map(|lease| Lease::new(lease.lane, lease.epoch + 1));
    assert_eq!(taken, next.collect::<Vec<_>>());
    stage.fixture.set_clock_back(LONG * 3).await;
    let workers = stage.standing(other).await.workers;
    let seen = workers.iter().find(|worker| worker.worker == owner).map(|owner| owner.seen);
    assert!(seen.is_some_and(|seen| seen > LONG * 2), "a dead worker lives: {seen:?}");
}

/// A lease that has expired and was not taken over is renewed.
pub async fn an_expired_lease_that_nobody_took_is_renewed<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let owner = WorkerId::generate();
    let leases = stage.take(owner, SHORT).await;
    stage.fixture.pass(LONGER_THAN_SHORT).await;
    stage.keep(KeepLeases::new(owner, LONG).renew(&leases)).await;
    let record = first_lane(&stage, owner).await;
    assert_eq!((record.owner, record.expired), (Some(owner), false));
    assert_eq!(record.epoch, leases[0].epoch);
}

/// Only the owner renews a lease, and only under its epoch.
pub async fn only_the_owner_renews_and_only_under_its_epoch<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let leases = stage.take(owner, LONG).await;
    let before = first_lane(&stage, owner).await;
    stage.keep(KeepLeases::new(other, LONG * 2).renew(&leases)).await;
    assert_eq!(first_lane(&stage, other).await, before, "renewed by somebody else");
    let stale = leases.iter().map(|lease| Lease::new(lease.lane, lease.epoch - 1));
    let stale: Vec<Lease> = stale.collect();
    stage.keep(KeepLeases::new(owner, LONG * 2).renew(&stale)).await;
    assert_eq!(first_lane(&stage, owner).await, before, "renewed under a stale epoch");
}

/// A lane is taken only as it was observed: a renewal in between wins, even if it expired again.
pub async fn a_take_over_needs_the_observed_stamp<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let leases = stage.take(owner, SHORT).await;
    let observed = stage.standing(other).await.lanes;
    stage.fixture.pass(LONGER_THAN_SHORT).await;
    stage.keep(KeepLeases::new(owner, SHORT).renew(&leases)).await;
    stage.fixture.pass(LONGER_THAN_SHORT).await;
    let wanted: Vec<TakeOver> = observed.iter().map(TakeOver::of).collect();
    let standing = stage.keep(KeepLeases::new(other, LONG).take(&wanted)).await;
    assert!(standing.lanes.iter().all(|record| record.owner == Some(owner)), "{standing:?}");
}

/// Of two workers that observed the same free lanes, one gets each lane.
pub async fn one_of_two_takers_gets_a_lane<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (first, second) = (WorkerId::generate(), WorkerId::generate());
    let observed = stage.standing(first).await.lanes;
    let wanted: Vec<TakeOver> = observed.iter().map(TakeOver::of).collect();
    stage.keep(KeepLeases::new(first, LONG).take(&wanted)).await;
    let standing = stage.keep(KeepLeases::new(second, LONG).take(&wanted)).await;
    assert!(standing.lanes.iter().all(|record| record.owner == Some(first)), "{standing:?}");
    assert!(standing.lanes.iter().zip(&observed).all(|(now, then)| now.epoch == then.epoch + 1));
}

/// Two workers take the same free lanes at the same time: each lane goes to one of them, under the
/// next epoch, and neither is told that it has what the other one has.
pub async fn of_two_takers_at_the_same_time_one_gets_a_lane<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let workers = [WorkerId::generate(), WorkerId::generate()];
    for _ in 0..5 {
        let observed = stage.standing(workers[0]).await.lanes;
        let wanted: Vec<TakeOver> = observed.iter().map(TakeOver::of).collect();
        let take = |worker| stage.keep(KeepLeases::new(worker, LONG).take(&wanted));
        let (one, other) = tokio::join!(take(workers[0]), take(workers[1]));
        let now = stage.standing(workers[0]).await.lanes;
        for (lane, (now, before)) in now.iter().zip(&observed).enumerate() {
            let told = [&one.lanes[lane], &other.lanes[lane]];
            let thinks = |index: usize| told[index].owner == Some(workers[index]);
            assert!(!(thinks(0) && thinks(1)), "both were told that they have it: {told:?}");
            assert_eq!(now.epoch, before.epoch + 1, "taken twice: {now:?}");
            let owner = workers.iter().position(|worker| now.owner == Some(*worker));
            assert!(owner.is_some_and(thinks), "its owner was not told: {now:?}, {told:?}");
        }
        for worker in workers {
            let own = now.iter().filter(|lane| lane.owner == Some(worker));
            let leases: Vec<_> = own.map(|lane| Lease::new(lane.lane, lane.epoch)).collect();
            stage.release(worker, &leases).await;
        }
    }
}

/// A released lane is taken at once by anybody; the release itself leaves the epoch alone.
pub async fn a_released_lane_is_taken_at_once<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let leases = stage.take(owner, LONG).await;
    stage.store.release(Release::new(owner, &leases).leaving()).await.unwrap();
    let record = first_lane(&stage, other).await;
    assert_eq!((record.owner, record.epoch), (None, leases[0].epoch));
    let workers = stage.standing(other).await.workers;
    assert!(!workers.iter().any(|record| record.worker == owner), "it left");
    let taken = stage.take(other, LONG).await;
    assert_eq!(taken.len(), stage.lanes.len());
    assert_eq!(taken[0].epoch, leases[0].epoch + 1);
}

/// Releasing leases that are not held changes nothing.
pub async fn releasing_what_is_not_held_changes_nothing<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let leases = stage.take(owner, LONG).await;
    stage.release(other, &leases).await;
    let stale = leases.iter().map(|lease| Lease::new(lease.lane, lease.epoch - 1));
    stage.release(owner, &stale.collect::<Vec<_>>()).await;
    let standing = stage.standing(other).await;
    assert!(standing.lanes.iter().all(|record| record.owner == Some(owner)), "{standing:?}");
    assert!(standing.workers.iter().any(|record| record.worker == owner), "it did not leave");
}

/// Every registered worker is told, with its health and how long ago it was seen.
pub async fn registered_workers_are_told<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (ill, well) = (WorkerId::generate(), WorkerId::generate());
    stage.keep(KeepLeases::new(ill, LONG).healthy(false)).await;
    stage.fixture.pass(SHORT).await;
    let began = Instant::now();
    let workers = stage.standing(well).await.workers;
    let find = |worker| workers.iter().find(|record| record.worker == worker).unwrap();
    assert!(!find(ill).healthy && find(well).healthy);
    assert!(find(ill).seen >= SHORT, "{:?}", find(ill));
    assert!(find(well).seen < SHORT || began.elapsed() >= SHORT, "{:?}", find(well));
    assert_eq!(workers.len(), 2);
}

/// A worker that leaves, or was not seen for ten of its leases, is forgotten; its lanes are not.
pub async fn absent_workers_are_forgotten_and_lanes_are_not<F: StoreFixture>() {
    const TENTH: Duration = Duration::from_millis(100);
    let stage = Stage::<F>::set().await;
    let (gone, leaving, last) = (WorkerId::generate(), WorkerId::generate(), WorkerId::generate());
    stage.keep(KeepLeases::new(gone, TENTH)).await;
    let taken = stage.take(gone, TENTH).await;
    stage.standing(leaving).await;
    stage.store.release(Release::new(leaving, &[]).leaving()).await.unwrap();
    let began = Instant::now();
    stage.keep(KeepLeases::new(gone, TENTH)).await;
    stage.fixture.pass(TENTH * 3).await;
    let workers = stage.standing(last).await.workers;
    let knows = workers.iter().any(|record| record.worker == gone);
    assert!(knows || began.elapsed() > TENTH * 6, "forgotten too early");
    stage.fixture.pass(TENTH * 8).await;
    let standing = stage.standing(last).await;
    let workers: Vec<_> = standing.workers.iter().map(|record| record.worker).collect();
    assert_eq!(workers, [last]);
    assert_eq!(standing.lanes.len(), stage.lanes.len());
    assert_eq!(standing.lanes[0].epoch, taken[0].epoch);
}

async fn first_lane<F: StoreFixture>(stage: &Stage<F>, worker: WorkerId) -> LaneRecord {
    stage.standing(worker).await.lanes[0].clone()
}
