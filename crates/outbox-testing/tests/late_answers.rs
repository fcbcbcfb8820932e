//! Answers of the store that come, and decisions that arrive, when they do not hold any more.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use outbox_core::broker::PublishErrorKind;
use outbox_core::retry::{OnDeath, RetryPolicy, TopicPolicy};
use outbox_core::store::StoreErrorKind;
use outbox_core::{Dispatcher, Message};
use outbox_testing::{FaultyStore, MemoryBroker, MemoryStore, StoreFault, StoreMethod};
use tokio::time::sleep;

const LEASE: Duration = Duration::from_secs(6);

fn message(payload: &str) -> Message {
    Message::builder("orders").key("k").payload(payload).build().unwrap()
}

fn once(then: OnDeath) -> TopicPolicy {
    TopicPolicy::new().retry(RetryPolicy::default().max_attempts(1)).on_death(then)
}

#[tokio::test(start_paused = true)]
async fn a_row_that_was_read_before_it_was_held_is_held() {
    for written_after in (1..40).map(|step| Duration::from_millis(50 * step)) {
        let (memory, broker) = (MemoryStore::new(), MemoryBroker::new());
        let store = FaultyStore::new(memory.clone());
        let offered = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&offered);
        broker.fail_when(
            move |delivery| {
                let bad = delivery.message.payload() == Some(b"bad");
                count.fetch_add(usize::from(bad), Ordering::Relaxed);
                bad
            },
            PublishErrorKind::Rejected,
        );
        let dispatcher = Dispatcher::builder(store.clone(), broker.clone());
        let dispatcher = dispatcher.topic("orders", once(OnDeath::Hold)).build().unwrap();
        let running = tokio::spawn(dispatcher.run(std::future::pending()));
        sleep(Duration::from_secs(1)).await;
        // A smaller id of the same key, by a writer that does not wait for the other one.
        let mut late = memory.begin();
        memory.outbox().add(&mut late, message("late")).await.unwrap();
        let mut tx = memory.begin();
        memory.outbox().add(&mut tx, message("bad")).await.unwrap();
        store.fail_next(StoreMethod::Settle, 1, StoreFault::Delay(written_after));
        tx.commit();
        while offered.load(Ordering::Relaxed) == 0 {
            sleep(Duration::from_millis(1)).await;
        }
        late.commit();
        store.fail_next(
            StoreMethod::Claim,
            20,
            StoreFault::DelayAnswer(Duration::from_millis(400)),
        );
        sleep(Duration::from_secs(60)).await;
        assert_eq!(broker.published().len(), 1, "the late one, {written_after:?}");
        assert_eq!(memory.held().len(), 1);
        assert_eq!(offered.load(Ordering::Relaxed), 1, "it was held after {written_after:?}");
        running.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn what_failed_under_a_lease_that_ran_out_is_not_recorded_once_it_is_regained() {
    let (memory, broker) = (MemoryStore::new(), MemoryBroker::new());
    let store = FaultyStore::new(memory.clone());
    broker.fail_next(1, PublishErrorKind::Rejected);
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).lease(LEASE);
    let dispatcher = dispatcher.topic("orders", once(OnDeath::Skip)).build().unwrap();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    sleep(Duration::from_secs(1)).await;
    store.fail_next(StoreMethod::Settle, 1, StoreErrorKind::Unavailable);
    let mut tx = memory.begin();
    memory.outbox().add(&mut tx, message("p")).await.unwrap();
    tx.commit();
    while store.calls(StoreMethod::Settle) == 0 {
        sleep(Duration::from_millis(1)).await;
    }
    // It was refused, and the database goes away before that can be recorded.
    let outage = store.outage();
    sleep(LEASE * 3).await;
    assert_eq!((memory.pending().len(), broker.published().len()), (1, 0));
    drop(outage);
    sleep(LEASE * 3).await;
    assert_eq!((memory.pending().len(), broker.published().len()), (0, 1));
    assert!(memory.dead().is_empty(), "it was delivered");
    running.abort();
}
