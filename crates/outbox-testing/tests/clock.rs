//! The store's clock is set back by a day.

use std::time::Duration;

use outbox_core::broker::PublishErrorKind;
use outbox_core::retry::RetryPolicy;
use outbox_core::{Dispatcher, Message, MessageId};
use outbox_testing::{Fault, MemoryBroker, MemoryStore};
use tokio::task::JoinHandle;

const DAY: Duration = Duration::from_secs(24 * 3_600);
const LEASE: Duration = Duration::from_secs(45);
/// More than any wait of the policy.
const SOON: Duration = Duration::from_secs(30);

async fn commit(store: &MemoryStore) -> MessageId {
    let mut tx = store.begin();
    let message = Message::builder("orders").key("7").payload("p").build().expect("valid");
    let id = store.outbox().add(&mut tx, message).await.expect("an added message");
    tx.commit();
    id
}

fn start(store: &MemoryStore, broker: &MemoryBroker) -> JoinHandle<()> {
    let retry = RetryPolicy::exponential(Duration::from_secs(5), Duration::from_secs(10));
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).lease(LEASE).retry(retry);
    let run = dispatcher.build().expect("valid settings").run(std::future::pending());
    tokio::spawn(async { _ = run.await })
}

/// A message that failed once and waits, and who tried it.
async fn waiting(store: &MemoryStore, broker: &MemoryBroker) -> JoinHandle<()> {
    broker.fail_next(1, Fault::Refuse(PublishErrorKind::Failed));
    let relay = start(store, broker);
    commit(store).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    store.assert_pending([("orders", "7")]);
    relay
}

#[tokio::test(start_paused = true)]
async fn the_lanes_of_a_dead_worker_move_after_a_lease() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let dead = start(&store, &broker);
    commit(&store).await;
    broker.wait_for(1).await;
    dead.abort();
    store.set_clock_back(DAY);
    commit(&store).await;
    let _relay = start(&store, &broker);
    let moved = tokio::time::timeout(LEASE * 2, broker.wait_for(2));
    moved.await.expect("they wait until the clock has come so far again");
}

#[tokio::test(start_paused = true)]
async fn a_message_that_waits_is_tried_again_as_soon_as_ever() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let _relay = waiting(&store, &broker).await;
    store.set_clock_back(DAY);
    tokio::time::timeout(SOON, broker.wait_for(1)).await.expect("it waits a day");
}

#[tokio::test(start_paused = true)]
async fn a_message_that_waits_is_tried_by_another_worker_after_the_longest_wait() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    waiting(&store, &broker).await.abort();
    store.set_clock_back(DAY);
    let _relay = start(&store, &broker);
    let tried = tokio::time::timeout(LEASE * 2 + SOON, broker.wait_for(1));
    tried.await.expect("it waits a day");
}
