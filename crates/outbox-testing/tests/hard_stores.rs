//! Stores that are neither down nor well: one behind a slow line, one that passes what it has deleted
//! slowly, one that sweeps or settles slowly, and one that refuses to record failures.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use async_trait::async_trait;
use outbox_core::broker::PublishErrorKind;
use outbox_core::store::{
    Backlog, Claim, ClaimReply, Claimed, KeepLeases, Page, Purge, Release, Settle, Settled,
    Standing, StoreError, StoreErrorKind, StoreProfile,
};
use outbox_core::{Dispatcher, Message, Position, Store};
use outbox_testing::{Fault, MemoryBroker, MemoryStore};
use tokio::time::{sleep, timeout};

#[derive(Debug)]
struct Hard {
    store: MemoryStore,
    bytes_per_second: u32,
    /// How quickly it passes ids of rows that were deleted, where it is told how far to read.
    ids_per_second: u32,
    /// How quickly it looks for late rows.
    swept_per_second: u32,
    /// How quickly it settles rows.
    settled_per_second: u32,
    records_failures: bool,
}

impl Hard {
    fn new(store: MemoryStore) -> Self {
        Self {
            store,
            bytes_per_second: u32::MAX,
            ids_per_second: u32::MAX,
            swept_per_second: u32::MAX,
            settled_per_second: u32::MAX,
            records_failures: true,
        }
    }
}

#[async_trait]
impl Store for Hard {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        self.store.open().await
    }

    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        self.store.keep_leases(request).await
    }

    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        let reply = self.store.claim(request).await?;
        let size = |row: &Claimed| match row {
            Claimed::Delivery(delivery) => delivery.message.size(),
            _ => 0,
        };
        let bytes: usize = reply.rows.iter().map(size).sum();
        sleep(Duration::from_secs(bytes as u64) / self.bytes_per_second).await;
        let bounded = |page: &&Page<'_>| page.through < Position(u64::MAX);
        let pages = [request.page.as_ref().filter(bounded), request.scan.as_ref()];
        let ids: u64 = pages.into_iter().flatten().map(|page| page.through.0 - page.after.0).sum();
        sleep(Duration::from_secs(ids) / self.ids_per_second).await;
        let spans = request.sweep.iter().chain(request.open);
        let swept: u64 = spans.map(|span| span.last.0 - span.first.0 + 1).sum();
        sleep(Duration::from_secs(swept) / self.swept_per_second).await;
        Ok(reply)
    }

    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError> {
        if !self.records_failures && !request.failed.is_empty() {
            return Err(StoreErrorKind::Denied.into());
        }
        let rows = request.delivered.len() + request.failed.len();
        sleep(Duration::from_secs(rows as u64) / self.settled_per_second).await;
        self.store.settle(request).await
    }

    async fn release(&self, request: Release<'_>) -> Result<(), StoreError> {
        self.store.release(request).await
    }

    async fn purge(&self, request: Purge) -> Result<u64, StoreError> {
        self.store.purge(request).await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        self.store.backlog().await
    }
}

async fn commit(store: &MemoryStore, messages: impl Iterator<Item = (String, String)>) {
    let mut tx = store.begin();
    for (key, payload) in messages {
        let message = Message::builder("orders").key(key).payload(payload).build().unwrap();
        store.outbox().add(&mut tx, message).await.unwrap();
    }
    tx.commit();
}

#[tokio::test(start_paused = true)]
async fn claims_that_take_too_long_become_smaller_until_they_do_not() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    commit(&store, (0..4_000).map(|key| (key.to_string(), "x".repeat(4_000)))).await;
    // By default a statement may take 5 s, in which some 1,200 of them come.
    let slow = Hard { bytes_per_second: 1_000_000, ..Hard::new(store) };
    let dispatcher = Dispatcher::builder(slow, broker).build().unwrap();
    let run = timeout(Duration::from_secs(300), dispatcher.run_until_empty());
    assert_eq!(run.await.expect("it ends").unwrap().delivered, 4_000);
}

/// A store that takes 50 s to pass what was delivered before: an old snapshot keeps it there.
async fn with_dead_rows(broker: &MemoryBroker) -> (MemoryStore, impl Fn() -> Hard) {
    let store = MemoryStore::new();
    commit(&store, (0..20_000).map(|key| (key.to_string(), "p".to_owned()))).await;
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build().unwrap();
    dispatcher.run_until_empty().await.unwrap();
    let hard = {
        let store = store.clone();
        move || Hard { ids_per_second: 400, ..Hard::new(store.clone()) }
    };
    (store, hard)
}

#[tokio::test(start_paused = true)]
async fn deleted_rows_that_are_passed_slowly_do_not_stop_the_relay_that_scans() {
    let broker = MemoryBroker::new();
    let (store, hard) = with_dead_rows(&broker).await;
    let dispatcher = Dispatcher::builder(hard(), broker.clone()).build().unwrap();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    for second in 0..600 {
        commit(&store, std::iter::once((second.to_string(), "p".to_owned()))).await;
        sleep(Duration::from_secs(1)).await;
        assert!(store.pending().len() <= 8, "{} after {second} s", store.pending().len());
    }
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn deleted_rows_that_are_passed_slowly_do_not_stop_lanes_that_catch_up() {
    let broker = MemoryBroker::new();
    let (store, hard) = with_dead_rows(&broker).await;
    let start = || {
        let dispatcher = Dispatcher::builder(hard(), broker.clone()).build().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let running = tokio::spawn(dispatcher.run(async { _ = stopped.await }));
        (stop, running)
    };
    let (first, second) = (start(), start());
    sleep(Duration::from_secs(20)).await;
    // Both have lanes and have read something; then one of them gets the lanes of the other one, while
    // one of its messages waits for an answer that does not come.
    commit(&store, (0..100).map(|key| (key.to_string(), "p".to_owned()))).await;
    sleep(Duration::from_secs(20)).await;
    assert_eq!(store.pending().len(), 0);
    broker.fail_when(|d| d.message.key() == Some(b"silent"), Fault::Silence);
    commit(&store, std::iter::once(("silent".to_owned(), "p".to_owned()))).await;
    sleep(Duration::from_secs(1)).await;
    _ = first.0.send(());
    first.1.await.unwrap().unwrap();
    for second in 0..180 {
        commit(&store, (0..10).map(|key| (key.to_string(), "p".to_owned()))).await;
        sleep(Duration::from_secs(1)).await;
        // Half of them are for lanes that it had.
        let waiting = store.pending().len();
        assert!(waiting <= 5 * (second + 1) + 100, "{waiting} after {second} s");
        if second > 150 {
            assert!(waiting <= 120, "{waiting} after {second} s");
        }
    }
    second.1.abort();
}

#[tokio::test(start_paused = true)]
async fn a_long_transaction_with_many_messages_does_not_stop_others() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let hard = Hard { swept_per_second: 50_000, ..Hard::new(store.clone()) };
    let dispatcher = Dispatcher::builder(hard, broker).build().unwrap();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    let mut long = store.begin();
    for turn in 0..6_000 {
        let message = Message::builder("orders").key("long").payload("p").build().unwrap();
        store.outbox().add(&mut long, message).await.unwrap();
        commit(&store, std::iter::once((turn.to_string(), "p".to_owned()))).await;
        sleep(Duration::from_millis(10)).await;
        let waiting = store.pending().len();
        assert!(waiting <= 100, "more than those of a second: {waiting} after turn {turn}");
    }
    long.commit();
    sleep(Duration::from_secs(10)).await;
    assert_eq!(store.pending().len(), 0);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn late_rows_that_are_too_many_for_one_sweep_are_delivered() {
    const ROWS: usize = 250_000;
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    // By default a statement may take 5 s, and to sweep all of them takes 6.25 s.
    let hard = Hard { swept_per_second: 40_000, ..Hard::new(store.clone()) };
    let dispatcher = Dispatcher::builder(hard, broker).build().unwrap();
    let mut large = store.begin();
    for key in 0..ROWS {
        let message = Message::builder("orders").key(key.to_string()).payload("p").build().unwrap();
        store.outbox().add(&mut large, message).await.unwrap();
    }
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    commit(&store, std::iter::once(("above".to_owned(), "p".to_owned()))).await;
    sleep(Duration::from_secs(2)).await;
    assert_eq!(store.pending().len(), 0, "it was passed");
    large.commit();
    sleep(Duration::from_secs(120)).await;
    assert_eq!(store.pending().len(), 0);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn settles_that_take_too_long_become_smaller_until_they_do_not() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.fail_when(|d| d.message.key() == Some(b"7"), PublishErrorKind::Rejected);
    commit(&store, (0..4_000).map(|key| (key.to_string(), "p".to_owned()))).await;
    // By default a statement may take 5 s: some hundred of them are settled in that.
    let slow = Hard { settled_per_second: 20, ..Hard::new(store.clone()) };
    let dispatcher = Dispatcher::builder(slow, broker.clone()).build().unwrap();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    sleep(Duration::from_secs(600)).await;
    assert_eq!(store.pending().len(), 1, "the one that fails");
    broker.assert_no_repetition();
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_the_store_refuses_to_record_holds_back_its_own_key_and_no_other() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.fail_when(|d| d.message.key() == Some(b"bad"), PublishErrorKind::Rejected);
    let denying = Hard { records_failures: false, ..Hard::new(store.clone()) };
    let dispatcher = Dispatcher::builder(denying, broker.clone()).rows_in_flight(20).build();
    let running = tokio::spawn(dispatcher.unwrap().run(std::future::pending()));
    commit(&store, std::iter::once(("bad".to_owned(), "p".to_owned()))).await;
    for round in 0..100 {
        commit(&store, (0..10).map(|key| (key.to_string(), "p".to_owned()))).await;
        sleep(Duration::from_secs(1)).await;
        assert_eq!(store.pending().len(), 1, "after {round} s");
    }
    assert_eq!(broker.published().len(), 1_000);
    running.abort();
}
