//! A broker that answers nothing for a while, and then again: what was read on meanwhile is known as
//! ids only, and is read again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::broker::{Broker, BrokerProfile, Outcomes, Outgoing, PublishError};
use outbox_core::store::{
    Backlog, Claim, ClaimReply, KeepLeases, Purge, Release, Settle, Settled, Standing, StoreError,
    StoreProfile,
};
use outbox_core::{Dispatcher, Message, Position, Store};
use outbox_testing::{MemoryBroker, MemoryStore};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

const LANES: NonZeroU16 = NonZeroU16::new(2).expect("2 is not 0");
const KEYS: usize = 10_000;
const BACKLOG: usize = 100_000;
/// As Kafka's by default, so that nothing times out.
const UNDECIDED: Duration = Duration::from_secs(20);
const SILENCE: Duration = Duration::from_secs(15);
/// What a claim takes, and what a publish takes: otherwise all goes at once.
const CLAIM_TAKES: Duration = Duration::from_millis(5);
const PUBLISH_TAKES: Duration = Duration::from_millis(5);

/// What was read.
#[derive(Debug, Default)]
struct Read {
    /// Rows with content.
    rows: usize,
    /// What each claim read by position.
    by_position: Vec<Vec<Position>>,
}

/// Notes what is read.
#[derive(Debug)]
struct Noting {
    store: MemoryStore,
    read: Arc<Mutex<Read>>,
}

#[async_trait]
impl Store for Noting {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        self.store.open().await
    }

    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        self.store.keep_leases(request).await
    }

    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        sleep(CLAIM_TAKES).await;
        let by_position = request.fetch.to_vec();
        let reply = self.store.claim(request).await?;
        let mut read = self.read.lock().unwrap();
        read.rows += reply.rows.len();
        if !by_position.is_empty() {
            read.by_position.push(by_position);
        }
        Ok(reply)
    }

    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError> {
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

/// Answers nothing until it is back, and then everything.
#[derive(Debug)]
struct Halting {
    broker: MemoryBroker,
    is_back: watch::Receiver<bool>,
}

#[async_trait]
impl Broker for Halting {
    fn profile(&self) -> BrokerProfile {
        self.broker.profile()
    }

    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
        self.is_back.clone().wait_for(|is_back| *is_back).await.unwrap();
        self.broker.publish(batch, outcomes).await;
    }

    async fn check(&self) -> Result<(), PublishError> {
        self.broker.check().await
    }

    async fn close(&self, within: Duration) {
        self.broker.close(within).await;
    }
}

async fn add(store: &MemoryStore, count: usize) {
    let mut tx = store.begin();
    for number in 0..count {
        let message = Message::builder("orders").key((number % KEYS).to_string()).payload("p");
        store.outbox().add(&mut tx, message.build().unwrap()).await.unwrap();
    }
    tx.commit();
}

/// What is read from the end of a silence on, at which as many messages are added as were read on
/// during it, and how long all of them take.
async fn after_a_silence() -> (Read, Duration) {
    let broker = MemoryBroker::new().with_profile(BrokerProfile::new(1_000_000, UNDECIDED));
    broker.set_latency(PUBLISH_TAKES);
    let store = MemoryStore::with_lanes(LANES);
    let read = Arc::new(Mutex::new(Read::default()));
    let noting = Noting { store: store.clone(), read: Arc::clone(&read) };
    let (back, is_back) = watch::channel(false);
    let halting = Halting { broker: broker.clone(), is_back };
    let dispatcher = Dispatcher::builder(noting, halting).build().unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    add(&store, BACKLOG).await;
    sleep(SILENCE).await;
    assert_eq!(handle.status().known, BACKLOG);
    *read.lock().unwrap() = Read::default();
    add(&store, BACKLOG).await;
    back.send_replace(true);
    let over = Instant::now();
    broker.wait_for(2 * BACKLOG).await;
    running.abort();
    (std::mem::take(&mut read.lock().unwrap()), over.elapsed())
}

#[tokio::test(start_paused = true)]
async fn what_is_known_is_sent_before_more_is_read() {
    let (read, took) = after_a_silence().await;
    // Each message once; some of those that are added are read while the last ones are sent.
    assert!(read.rows < 2 * BACKLOG + BACKLOG / 10, "{}", read.rows);
    assert!(took < Duration::from_secs(1), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_read_again_lies_side_by_side() {
    let (read, _) = after_a_silence().await;
    let rows: usize = read.by_position.iter().map(Vec::len).sum();
    let width = |rows: &Vec<Position>| {
        let (first, last) = (rows.iter().min().unwrap(), rows.iter().max().unwrap());
        (last.0 - first.0 + 1) as usize
    };
    let widths: usize = read.by_position.iter().map(width).sum();
    assert!(rows > BACKLOG / 2, "{rows}");
    assert!(widths < 4 * rows, "{widths} of {rows}");
}
