//! Several messages of one key at the broker: what holds without failures, and what a failure may
//! do to the order.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use outbox_core::broker::PublishErrorKind;
use outbox_core::{Dispatcher, Message, MessageId};
use outbox_testing::{Fault, MemoryBroker, MemoryStore};

const WINDOW: usize = 4;

/// So many messages of one key, in one transaction: they are claimed by one page.
async fn commit(store: &MemoryStore, messages: usize) -> Vec<MessageId> {
    let mut tx = store.begin();
    let mut ids = Vec::new();
    for _ in 0..messages {
        let message = Message::builder("orders").key("7").payload("p").build().unwrap();
        ids.push(store.outbox().add(&mut tx, message).await.unwrap());
    }
    tx.commit();
    ids
}

async fn run(store: &MemoryStore, broker: &MemoryBroker, window: usize) {
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).in_key_window(window);
    dispatcher.build().unwrap().run_until_empty().await.unwrap();
}

/// Which of the messages were published, by their places among those that were committed.
fn published(broker: &MemoryBroker, ids: &[MessageId]) -> Vec<usize> {
    let place = |id| ids.iter().position(|committed| *committed == id).expect("a committed one");
    broker.published().into_iter().map(|record| place(record.message_id)).collect()
}

/// Lets this happen to a message the first time it is sent.
fn fail_once(broker: &MemoryBroker, id: MessageId, fault: impl Into<Fault>) {
    let mut again = false;
    broker.fail_when(
        move |delivery| delivery.message.id() == id && !std::mem::replace(&mut again, true),
        fault,
    );
}

#[tokio::test(start_paused = true)]
async fn without_failures_a_window_within_a_key_keeps_order_and_saves_round_trips() {
    let took = async |window| {
        let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
        broker.set_latency(Duration::from_millis(100));
        let ids = commit(&store, 40).await;
        let began = tokio::time::Instant::now();
        run(&store, &broker, window).await;
        assert_eq!(published(&broker, &ids), (0..40).collect::<Vec<_>>());
        began.elapsed()
    };
    let (gate, window) = (took(1).await, took(WINDOW).await);
    assert!(gate >= Duration::from_secs(4), "one by one: {gate:?}");
    assert!(window < gate / 2, "{window:?} instead of {gate:?}");
}

#[tokio::test(start_paused = true)]
async fn a_failed_message_is_passed_by_those_that_were_sent_with_it_and_by_no_other() {
    for fault in [PublishErrorKind::Failed, PublishErrorKind::NotSent, PublishErrorKind::Unknown] {
        let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
        let ids = commit(&store, 12).await;
        fail_once(&broker, ids[1], fault);
        run(&store, &broker, WINDOW).await;
        store.assert_pending::<&str>([]);
        let expected = [0, 2, 3, 1, 4, 5, 6, 7, 8, 9, 10, 11];
        assert_eq!(published(&broker, &ids), expected, "{fault:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_in_doubt_appears_again_after_those_that_were_sent_with_it() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let ids = commit(&store, 12).await;
    fail_once(&broker, ids[1], Fault::Doubt);
    run(&store, &broker, WINDOW).await;
    let expected = [0, 1, 2, 3, 1, 4, 5, 6, 7, 8, 9, 10, 11];
    assert_eq!(published(&broker, &ids), expected);
    broker.assert_order_per_key(&ids);
}

#[tokio::test(start_paused = true)]
async fn a_held_message_stops_its_key_behind_those_that_were_sent_with_it() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let ids = commit(&store, 12).await;
    fail_once(&broker, ids[1], PublishErrorKind::Rejected);
    run(&store, &broker, WINDOW).await;
    assert_eq!(published(&broker, &ids), [0, 2, 3]);
    assert_eq!((store.held().len(), store.pending().len()), (1, 9));
}
