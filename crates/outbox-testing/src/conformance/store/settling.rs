//! Acknowledged rows go by identity, without a fence; failed ones change only under their lease.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::collections::BTreeSet;
use std::time::Duration;

use outbox_core::delivery::{Receipt, RowId, RowState, Settlement, Span};
use outbox_core::store::{Claimed, Delivered, Failed, KeepLeases, Page, Purge, Release, Settle};
use outbox_core::{Delivery, Lane, Lease, MessageId, Position, WorkerId};

use super::stage::{
    LONG, POLLS, delivery, everything, failed, id_of, message, patiently, spread, turns,
};
use super::{Stage, StoreFixture};
use crate::drop_after;

const WAIT: Duration = Duration::from_secs(500);

/// A delivered row goes away, and no other one. No lease is needed.
pub async fn a_delivered_row_goes_away<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(4)).await;
    let (second, third) = (stage.delivery(ids[1]).await, stage.delivery(ids[2]).await);
    stage.deliver(&[&second, &third], false).await;
    assert_eq!(stage.messages().await, [ids[0], ids[3]]);
}

/// Settling a delivered row again is no error and changes nothing.
pub async fn settling_a_delivered_row_again_is_harmless<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(2)).await;
    let first = stage.delivery(ids[0]).await;
    stage.deliver(&[&first], true).await;
    stage.deliver(&[&first], true).await;
    stage.deliver(&[&first], false).await;
    assert_eq!(stage.messages().await, [ids[1]]);
    assert_eq!(archived(&stage).await, 1);
}

/// A position that was handed out again after a fail-over belongs to another message: the
/// acknowledgement of the former one does not delete it.
pub async fn a_reused_position_is_not_deleted<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let id = stage.add(message("orders", "a")).await;
    let position = stage.delivery(id).await.position;
    let former = RowId::new(position, MessageId::generate());
    let delivered = [Delivered::new(former, Receipt::default())];
    stage.settle(Settle::new(&delivered, &[])).await;
    assert_eq!(stage.messages().await, [id]);
}

/// A failed attempt of a message that is not in the row any more changes nothing.
pub async fn a_failure_of_another_message_is_refused<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (row, lease) = leased(&stage).await;
    for how in [Settlement::Retry(WAIT), Settlement::Held, Settlement::Dead] {
        let mut failed = failed(&row, lease, 1, how);
        failed.id.message = MessageId::generate();
        assert_eq!(stage.fail(&[failed]).await.refused, [row.position]);
    }
    assert_unchanged(&stage, &row).await;
}

/// A delivered row is kept in the archive if that is asked for.
pub async fn a_delivered_row_is_archived_when_asked<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(2)).await;
    let (kept, deleted) = (stage.delivery(ids[0]).await, stage.delivery(ids[1]).await);
    stage.deliver(&[&kept], true).await;
    stage.deliver(&[&deleted], false).await;
    assert!(stage.messages().await.is_empty());
    assert_eq!(archived(&stage).await, 1);
}

/// A retry records the attempts and the wait; the row keeps its place.
pub async fn a_retry_records_attempts_and_wait<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (row, lease) = leased(&stage).await;
    let settled = stage.fail(&[failed(&row, lease, 1, Settlement::Retry(WAIT))]).await;
    assert_eq!(settled.refused, []);
    let now = stage.delivery(row.message.id()).await;
    assert_eq!((now.position, now.state.attempts, now.state.held), (row.position, 1, false));
    assert!(now.state.wait <= WAIT && now.state.wait > WAIT / 2, "{:?}", now.state);
}

/// A row that failed is as old as before: its age is that of the message.
pub async fn a_failure_leaves_the_age_of_a_row<F: StoreFixture>() {
    const TIME: Duration = Duration::from_millis(300);
    let stage = Stage::<F>::set().await;
    let (row, lease) = leased(&stage).await;
    stage.fixture.pass(TIME).await;
    stage.fail(&[failed(&row, lease, 1, Settlement::Retry(WAIT))]).await;
    let now = stage.delivery(row.message.id()).await;
    assert!(now.age >= TIME, "{:?}", now.age);
}

/// A held row stays in its place, marked.
pub async fn a_held_row_stays_in_its_place<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (row, lease) = leased(&stage).await;
    let settled = stage.fail(&[failed(&row, lease, 1, Settlement::Held)]).await;
    assert_eq!(settled.refused, []);
    let now = stage.delivery(row.message.id()).await;
    assert_eq!((now.position, now.state.attempts, now.state.held), (row.position, 1, true));
    let backlog = stage.backlog().await;
    assert_eq!((backlog.pending, backlog.held, backlog.dead), (1, 1, 0));
}

/// A hold outlasts the lease under which it was recorded: the next owner of the lane finds it.
pub async fn a_hold_outlasts_a_take_over<F: StoreFixture>() {
    let short = Duration::from_millis(200);
    let stage = Stage::<F>::set().await;
    let row = added(&stage).await;
    let lease = lease_of(&row, &stage.take(WorkerId::generate(), short).await);
    let held = failed(&row, lease, 3, Settlement::Held);
    assert_eq!(stage.fail(std::slice::from_ref(&held)).await.refused, []);
    stage.fixture.pass(short * 2).await;
    let next = lease_of(&row, &stage.take(WorkerId::generate(), LONG).await);
    assert!(next.epoch > lease.epoch, "the lane was not taken over");
    let found = stage.delivery(row.message.id()).await;
    assert_eq!((found.position, found.state.held, found.state.attempts), (row.position, true, 3));
    assert_eq!(stage.fail(&[held]).await.refused, [row.position], "its first owner is too late");
}

/// A dead row leaves the outbox and enters the dead letters.
pub async fn a_dead_row_moves_to_the_dead_letters<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (row, lease) = leased(&stage).await;
    let settled = stage.fail(&[failed(&row, lease, 1, Settlement::Dead)]).await;
    assert_eq!(settled.refused, []);
    assert!(stage.find(row.message.id()).await.is_none());
    let backlog = stage.backlog().await;
    assert_eq!((backlog.pending, backlog.held, backlog.dead), (0, 0, 1));
}

/// After a take-over the former owner's failures change nothing; its acknowledgements still count.
pub async fn a_stale_epoch_changes_nothing<F: StoreFixture>() {
    let short = Duration::from_millis(200);
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(2)).await;
    let (row, acknowledged) = (stage.delivery(ids[0]).await, stage.delivery(ids[1]).await);
    let stale = lease_of(&row, &stage.take(WorkerId::generate(), short).await);
    stage.fixture.pass(short * 2).await;
    let current = lease_of(&row, &stage.take(WorkerId::generate(), LONG).await);
    for how in [Settlement::Retry(WAIT), Settlement::Held, Settlement::Dead] {
        let settled = stage.fail(&[failed(&row, stale, 1, how.clone())]).await;
        assert_eq!(settled.refused, [row.position], "{how:?} under a stale epoch");
    }
    assert_unchanged(&stage, &row).await;
    stage.deliver(&[&acknowledged], false).await;
    assert!(stage.find(acknowledged.message.id()).await.is_none());
    assert_eq!(stage.fail(&[failed(&row, current, 1, Settlement::Held)]).await.refused, []);
}

/// A failure that is recorded while the lane is taken over is recorded before that, or refused:
/// the next owner reads what stays.
pub async fn a_failure_beside_a_take_over_changes_nothing_after_it<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    for number in 0..10 {
        let row = added(&stage).await;
        let (owner, next) = (WorkerId::generate(), WorkerId::generate());
        let leases = stage.take(owner, LONG).await;
        let held = [failed(&row, lease_of(&row, &leases), 1, Settlement::Held)];
        let take_over = async {
            turns(number).await;
            stage.release(owner, &leases).await;
            let taken = stage.take(next, LONG).await;
            lease_of(&row, &taken);
            (taken, stage.delivery(row.message.id()).await.state)
        };
        let (settled, (taken, read)) = tokio::join!(stage.fail(&held), take_over);
        let now = stage.delivery(row.message.id()).await.state;
        assert_eq!(now, read, "its former owner changed the row after the next one had read it");
        assert_eq!(settled.refused.is_empty(), now.held, "{settled:?} of {now:?}");
        stage.release(next, &taken).await;
    }
}

/// A lease that was given back is no lease any more.
pub async fn a_released_lease_is_refused<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let row = added(&stage).await;
    let worker = WorkerId::generate();
    let leases = stage.take(worker, LONG).await;
    stage.release(worker, &leases).await;
    let failed = failed(&row, lease_of(&row, &leases), 1, Settlement::Retry(WAIT));
    assert_eq!(stage.fail(&[failed]).await.refused, [row.position]);
    assert_unchanged(&stage, &row).await;
}

/// A lease that has expired is still good for a failure while nobody has taken the lane over.
pub async fn an_expired_lease_that_nobody_took_still_counts<F: StoreFixture>() {
    let short = Duration::from_millis(200);
    let stage = Stage::<F>::set().await;
    let row = added(&stage).await;
    let lease = lease_of(&row, &stage.take(WorkerId::generate(), short).await);
    stage.fixture.pass(short * 2).await;
    assert_eq!(stage.fail(&[failed(&row, lease, 1, Settlement::Retry(WAIT))]).await.refused, []);
}

/// The lease of another lane does not allow to change a row. Passes at once with one lane.
pub async fn the_lease_of_another_lane_is_refused<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let row = added(&stage).await;
    let leases = stage.take(WorkerId::generate(), LONG).await;
    let Some(other) = leases.iter().find(|lease| lease.lane != row.lane) else { return };
    let failed = failed(&row, *other, 1, Settlement::Retry(WAIT));
    assert_eq!(stage.fail(&[failed]).await.refused, [row.position]);
    assert_unchanged(&stage, &row).await;
}

/// A row that changed since it was read is refused; so is the second of two equal writes, which
/// makes repeating harmless.
pub async fn a_row_that_changed_since_it_was_read_is_refused<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (row, lease) = leased(&stage).await;
    let write = [failed(&row, lease, 1, Settlement::Retry(WAIT))];
    assert_eq!(stage.fail(&write).await.refused, []);
    assert_eq!(stage.fail(&write).await.refused, [row.position]);
    let dead = failed(&row, lease, 1, Settlement::Dead);
    assert_eq!(stage.fail(&[dead]).await.refused, [row.position]);
    let mut foreign = failed(&row, lease, 2, Settlement::Held);
    foreign.read = RowState::new(1, row.state.revision + 1);
    assert_eq!(stage.fail(&[foreign]).await.refused, [row.position]);
    let now = stage.delivery(row.message.id()).await;
    assert_eq!((now.state.attempts, now.state.held), (1, false));
}

/// A failed row that is gone is refused and no error.
pub async fn a_failed_row_that_is_gone_is_refused<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let (row, lease) = leased(&stage).await;
    stage.deliver(&[&row], false).await;
    for how in [Settlement::Retry(WAIT), Settlement::Held, Settlement::Dead] {
        let settled = stage.fail(&[failed(&row, lease, 1, how)]).await;
        assert_eq!(settled.refused, [row.position]);
    }
    assert_eq!(stage.backlog().await.dead, 0);
}

/// One settle holds rows of every kind; a refused one does not keep the others from settling.
pub async fn one_settle_holds_rows_of_every_kind<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(5)).await;
    let mut rows = Vec::new();
    for id in &ids {
        rows.push(stage.delivery(*id).await);
    }
    let leases = stage.take(WorkerId::generate(), LONG).await;
    let fail = |index: usize, how| failed(&rows[index], lease_of(&rows[index], &leases), 1, how);
    let mut refused = fail(4, Settlement::Dead);
    refused.lease.epoch -= 1;
    let failed = [
        refused,
        fail(1, Settlement::Retry(WAIT)),
        fail(2, Settlement::Held),
        fail(3, Settlement::Dead),
    ];
    let delivered = [Delivered::new(id_of(&rows[0]), Receipt::default())];
    let settled = stage.settle(Settle::new(&delivered, &failed)).await;
    assert_eq!(settled.refused, [rows[4].position]);
    assert_eq!(stage.messages().await, [ids[1], ids[2], ids[4]]);
    let backlog = stage.backlog().await;
    assert_eq!((backlog.held, backlog.dead), (1, 1));
}

/// A row that cannot be read is settled as any other: its topic's policy decided about it.
///
/// Passes at once if the store cannot hold such a row.
pub async fn an_unreadable_row_can_be_settled<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(4)).await;
    let mut rows = Vec::new();
    for id in &ids {
        rows.push(stage.delivery(*id).await);
    }
    for id in &ids {
        if !stage.fixture.garble(*id).await {
            return;
        }
    }
    let leases = stage.take(WorkerId::generate(), LONG).await;
    let how = [Settlement::Retry(WAIT), Settlement::Held, Settlement::Dead];
    let failed = rows.iter().zip(how);
    let failed: Vec<_> =
        failed.map(|(row, how)| first_failure(row, lease_of(row, &leases), how)).collect();
    assert_eq!(stage.fail(&failed).await.refused, []);
    stage.deliver(&[&rows[3]], true).await;
    let left = stage.all().await.rows;
    let [Claimed::Unreadable(waiting), Claimed::Unreadable(held)] = &left[..] else {
        panic!("two unreadable rows expected: {left:?}");
    };
    assert_eq!((waiting.id, held.id), (id_of(&rows[0]), id_of(&rows[1])));
    assert_eq!((waiting.state.attempts, held.state.attempts, held.state.held), (1, 1, true));
    assert!(waiting.state.wait > WAIT / 2);
    let backlog = stage.backlog().await;
    assert_eq!((backlog.pending, backlog.held, backlog.dead), (2, 1, 1));
    assert_eq!(archived(&stage).await, 1);
}

/// Requests that are as large as those of a dispatcher are done whole.
pub async fn large_requests_are_done_whole<F: StoreFixture>() {
    const ROWS: usize = 2_000;
    let stage = Stage::<F>::set().await;
    let mut ids = stage.add_all(spread(ROWS - 500)).await;
    ids.extend(stage.add_all(spread(500)).await);
    let rows = large_pages(&stage).await;
    let read: Vec<_> = rows.iter().map(|row| row.message.id()).collect();
    assert_eq!(read, ids, "by pages of 4,000");

    let all: BTreeSet<_> = rows.iter().map(|row| row.position).collect();
    let positions: Vec<_> = all.iter().copied().collect();
    let spans: Vec<_> = positions.chunks(5).map(|five| Span::new(five[1], five[3])).collect();
    let page = Page::new(&stage.lanes, Position::START, 1_000);
    let request = everything().fetch(&positions).watch(&positions[..500]).sweep(&spans).scan(page);
    let reply = stage.claim(request).await;
    let fetched: BTreeSet<_> = reply.rows.iter().map(Claimed::position).collect();
    assert!(fetched == all, "a fetch of {ROWS} gave {}", fetched.len());
    assert_eq!(reply.watched.len(), 500);
    assert_eq!(reply.swept.len(), spans.len() * 3);
    assert_eq!(reply.scanned.len(), 1_000);

    let leases = stage.take(WorkerId::generate(), LONG).await;
    let kinds = [Settlement::Retry(WAIT), Settlement::Held, Settlement::Dead];
    let (delivered, rest) = rows.split_at(900);
    let failed = rest.iter().take(300).zip(kinds.iter().cycle());
    let failed: Vec<_> =
        failed.map(|(row, how)| first_failure(row, lease_of(row, &leases), how.clone())).collect();
    let receipt = Receipt::default();
    let delivered: Vec<_> =
        delivered.iter().map(|row| Delivered::new(id_of(row), receipt)).collect();
    let settled = stage.settle(Settle::new(&delivered, &failed).archive(true)).await;
    assert_eq!(settled.refused, []);
    let left = large_pages(&stage).await;
    let states: Vec<_> = left.iter().map(|row| (row.state.attempts, row.state.held)).collect();
    let count = |state| states.iter().filter(|found| **found == state).count();
    assert_eq!((count((1, false)), count((1, true)), count((0, false))), (100, 100, 800));
    assert_eq!(stage.backlog().await.dead, 100);
    assert_eq!(archived(&stage).await, 900);
}

/// Settling nothing is no error.
pub async fn settling_nothing_is_harmless<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    assert_eq!(stage.fail(&[]).await.refused, []);
}

/// A call that is dropped half way, at any await point, is in nobody's way afterwards: neither a
/// lock nor a connection stays behind.
pub async fn a_dropped_call_is_in_nobodys_way<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    let ids = stage.add_all(spread(20)).await;
    let worker = WorkerId::generate();
    let leases = stage.take(worker, LONG).await;
    let store = &stage.store;
    for (index, id) in ids.iter().enumerate() {
        let within = Duration::from_micros(150 * index as u64);
        let row = stage.delivery(*id).await;
        let delivered = [Delivered::new(id_of(&row), Receipt::default())];
        let failed = [failed(&row, lease_of(&row, &leases), 1, Settlement::Retry(WAIT))];
        let renew = KeepLeases::new(worker, LONG).renew(&leases);
        _ = tokio::time::timeout(within, store.keep_leases(renew)).await;
        _ = tokio::time::timeout(within, store.settle(Settle::new(&[], &failed))).await;
        _ = tokio::time::timeout(within, store.settle(Settle::new(&delivered, &[]))).await;
        _ = tokio::time::timeout(within, store.backlog()).await;
        stage.add(message("orders", "after")).await;
        stage.deliver(&[&row], false).await;
    }
    assert_eq!(stage.messages().await.len(), ids.len());
    assert_eq!(stage.take(worker, LONG).await, leases);
}

/// A settle that is dropped at any await point leaves a message in one place, and repeating it ends
/// well: it is never deleted before its copy is there, nor copied twice.
pub async fn a_dropped_settle_leaves_a_message_in_one_place<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    for polls in 1..POLLS {
        let (row, lease) = leased(&stage).await;
        let dead = [failed(&row, lease, 1, Settlement::Dead)];
        let settle = Settle::new(&[], &dead);
        let ended =
            drop_after(polls, stage.store.settle(settle)).await.is_some_and(|done| done.is_ok());
        stage.settle(settle).await;
        let backlog = stage.backlog().await;
        assert_eq!((backlog.pending, backlog.dead), (0, polls as u64), "after {polls} polls");
        give_all_back(&stage, lease).await;
        if ended {
            break;
        }
    }
    for polls in 1..POLLS {
        let row = added(&stage).await;
        let delivered = [Delivered::new(id_of(&row), Receipt::default())];
        let settle = Settle::new(&delivered, &[]).archive(true);
        let ended =
            drop_after(polls, stage.store.settle(settle)).await.is_some_and(|done| done.is_ok());
        stage.settle(settle).await;
        assert_eq!(stage.messages().await, [], "after {polls} polls");
        assert_eq!(archived(&stage).await, 1, "copies after {polls} polls");
        if ended {
            break;
        }
    }
}

/// A release or a purge that is dropped at any await point is repeated as if it had not been.
pub async fn a_dropped_release_or_purge_can_be_repeated<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    for polls in 1..POLLS {
        let (owner, next) = (WorkerId::generate(), WorkerId::generate());
        let leases = stage.take(owner, LONG).await;
        let release = Release::new(owner, &leases).leaving();
        let ended =
            drop_after(polls, stage.store.release(release)).await.is_some_and(|done| done.is_ok());
        patiently(async || stage.store.release(release).await).await;
        let taken = stage.take(next, LONG).await;
        let following = leases.iter().map(|lease| Lease::new(lease.lane, lease.epoch + 1));
        assert_eq!(taken, following.collect::<Vec<_>>(), "after {polls} polls");
        stage.release(next, &taken).await;
        if ended {
            break;
        }
    }
    let pending = added(&stage).await.message.id();
    for polls in 1..POLLS {
        let row = added(&stage).await;
        stage.deliver(&[&row], true).await;
        stage.fixture.pass(Duration::from_millis(50)).await;
        let purge = stage.store.purge(Purge::new(Duration::ZERO, 100));
        let ended = drop_after(polls, purge).await.is_some_and(|done| done.is_ok());
        archived(&stage).await;
        assert_eq!(archived(&stage).await, 0, "copies after {polls} polls and a purge");
        assert_eq!(stage.messages().await, [pending]);
        if ended {
            break;
        }
    }
}

/// All rows, by pages that are as large as those of a dispatcher, or smaller if the store likes.
async fn large_pages<F: StoreFixture>(stage: &Stage<F>) -> Vec<Delivery> {
    let (mut rows, mut after) = (Vec::new(), Position::START);
    loop {
        let page = stage.page(after, 4_000).await;
        rows.extend(page.rows.into_iter().map(delivery));
        if page.end {
            return rows;
        }
        assert!(page.covered > after, "a page leads nowhere");
        after = page.covered;
    }
}

/// Gives back the lanes of whoever has this lease.
async fn give_all_back<F: StoreFixture>(stage: &Stage<F>, lease: Lease) {
    let lanes = stage.standing(WorkerId::generate()).await.lanes;
    let owner = lanes.iter().find(|lane| lane.lane == lease.lane).and_then(|lane| lane.owner);
    let leases: Vec<_> = lanes.iter().map(|lane| Lease::new(lane.lane, lane.epoch)).collect();
    stage.release(owner.unwrap(), &leases).await;
}

fn first_failure(row: &Delivery, lease: Lease, how: Settlement) -> Failed {
    failed(row, lease, 1, how)
}

async fn added<F: StoreFixture>(stage: &Stage<F>) -> Delivery {
    let id = stage.add(message("orders", "a")).await;
    stage.delivery(id).await
}

/// A row and the lease under which a worker has its lane.
async fn leased<F: StoreFixture>(stage: &Stage<F>) -> (Delivery, Lease) {
    let row = added(stage).await;
    let lease = stage.lease_for(&row).await;
    (row, lease)
}

fn lease_of(row: &Delivery, leases: &[Lease]) -> Lease {
    let of = |lane: Lane| leases.iter().find(|lease| lease.lane == lane);
    *of(row.lane).unwrap()
}

async fn assert_unchanged<F: StoreFixture>(stage: &Stage<F>, row: &Delivery) {
    let now = stage.delivery(row.message.id()).await;
    assert_eq!((now.position, now.state), (row.position, row.state));
}

/// How many copies are in the archive; they are purged.
async fn archived<F: StoreFixture>(stage: &Stage<F>) -> u64 {
    super::purging::purge_everything(stage).await
}
