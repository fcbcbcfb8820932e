//! What a store deletes by age, and what it counts.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::time::{Duration, Instant};

use outbox_core::delivery::Settlement;
use outbox_core::store::Purge;

use super::stage::{message, spread};
use super::{Stage, StoreFixture};

const MOMENT: Duration = Duration::from_millis(50);

/// Purging deletes archived copies, at most as many as asked, and tells how many.
pub async fn purging_deletes_at_most_the_limit<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    archive(&stage, 5).await;
    stage.fixture.pass(MOMENT).await;
    let purge = async || stage.purge(Purge::new(Duration::ZERO, 2)).await;
    assert_eq!([purge().await, purge().await, purge().await, purge().await], [2, 2, 1, 0]);
}

/// Purging leaves copies that are younger than asked.
pub async fn purging_leaves_younger_copies<F: StoreFixture>() {
    let age = Duration::from_secs(2);
    let stage = Stage::<F>::set().await;
    archive(&stage, 2).await;
    stage.fixture.pass(age).await;
    let began = Instant::now();
    archive(&stage, 3).await;
    // Younger by what the store took for them at most, older by most of the time that passed.
    let older = |began: Instant| Purge::new(began.elapsed() + age * 9 / 10, 100);
    assert_eq!(stage.purge(older(began)).await, 2);
    assert_eq!(purge_everything(&stage).await, 3);
    // What counts is when it was delivered, not when it was added.
    let old = stage.add(message("orders", "a")).await;
    stage.fixture.pass(age).await;
    let began = Instant::now();
    stage.deliver(&[&stage.delivery(old).await], true).await;
    assert_eq!(stage.purge(older(began)).await, 0);
}

/// When the store's clock is set back, copies of what is now its future are not old.
pub async fn purging_leaves_copies_from_the_clocks_future<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    archive(&stage, 2).await;
    if stage.fixture.set_clock_back(Duration::from_secs(3_600)).await {
        assert_eq!(stage.purge(Purge::new(MOMENT, 100)).await, 0);
    }
}

/// Purging never touches a row that was not delivered, nor a dead letter.
pub async fn purging_never_touches_what_was_not_delivered<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add(message("orders", "pending")).await;
    stage.kill(message("orders", "held"), Settlement::Held).await;
    stage.kill(message("orders", "dead"), Settlement::Dead).await;
    assert_eq!(purge_everything(&stage).await, 0);
    let backlog = stage.backlog().await;
    assert_eq!((backlog.pending, backlog.held, backlog.dead), (2, 1, 1));
}

/// The backlog of an empty store is empty, and exact.
pub async fn the_backlog_of_an_empty_store_is_empty<F: StoreFixture>() {
    let backlog = Stage::<F>::set().await.backlog().await;
    assert_eq!((backlog.pending, backlog.held, backlog.dead), (0, 0, 0));
    assert!(backlog.pending_is_exact);
    assert_eq!(backlog.oldest_age, None);
}

/// The backlog counts committed rows, held ones included, and dead letters apart.
pub async fn the_backlog_counts_what_waits<F: StoreFixture>() {
    let stage = Stage::<F>::set().await;
    stage.add_all(spread(4)).await;
    stage.kill(message("orders", "held"), Settlement::Held).await;
    stage.kill(message("orders", "dead"), Settlement::Dead).await;
    let backlog = stage.backlog().await;
    assert_eq!((backlog.pending, backlog.held, backlog.dead), (5, 1, 1));
    assert!(backlog.pending_is_exact);
}

/// The oldest age leaves out held rows and those that wait behind them; it counts again what
/// flows.
pub async fn the_oldest_age_leaves_held_keys_out<F: StoreFixture>() {
    let time = Duration::from_millis(600);
    let stage = Stage::<F>::set().await;
    let held = stage.kill(message("orders", "held"), Settlement::Held).await;
    stage.add(message("orders", "held")).await;
    assert_eq!(stage.backlog().await.oldest_age, None);
    stage.fixture.pass(time).await;
    stage.add(message("other-topic", "held")).await;
    let age = stage.backlog().await.oldest_age.unwrap();
    // However slow this is: the held row was and stays older by that time.
    let held = stage.delivery(held.message.id()).await.age;
    assert!(age + time <= held, "{age:?}, and the held row {held:?}");
}

/// Deletes everything from the archive and tells how much that was.
pub(super) async fn purge_everything<F: StoreFixture>(stage: &Stage<F>) -> u64 {
    stage.fixture.pass(MOMENT).await;
    stage.purge(Purge::new(Duration::ZERO, 1_000)).await
}

async fn archive<F: StoreFixture>(stage: &Stage<F>, count: usize) {
    for id in stage.add_all(spread(count)).await {
        let row = stage.delivery(id).await;
        stage.deliver(&[&row], true).await;
    }
}
