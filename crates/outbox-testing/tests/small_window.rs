//! A relay with a small window: it gains a lane while a backlog stands, and publishes large messages.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::broker::{Broker, BrokerProfile, Outcomes, Outgoing, PublishError};
use outbox_core::store::{KeepLeases, Release, TakeOver};
use outbox_core::{Dispatcher, Lane, Lease, Message, Store, WorkerId};
use outbox_testing::{Fault, FaultyStore, MemoryBroker, MemoryStore, StoreFault, StoreMethod};
use tokio::time::{Instant, sleep};

const LANES: NonZeroU16 = NonZeroU16::new(2).expect("2 is not 0");
const WINDOW: usize = 500;
const CLAIM_TAKES: Duration = Duration::from_millis(5);
const PUBLISH_TAKES: Duration = Duration::from_millis(2);
/// As Kafka's by default.
const UNDECIDED: Duration = Duration::from_secs(20);
/// A key that gets no answer, in the lane of key 0.
const SILENT: usize = 1_000_000;

fn message(key: usize) -> Message {
    Message::builder("orders").key(key.to_string()).payload("p").build().unwrap()
}

/// Commits messages of these keys, a transaction each. As many others are rolled back: so many ids
/// that nobody ever saw are swept as coarse spans, which show nearly all rows of a lane that is
/// gained at once, and each of them bars the lane until it is read.
async fn commit_with_gaps(store: &MemoryStore, keys: impl Iterator<Item = usize>) {
    for key in keys {
        let mut tx = store.begin();
        store.outbox().add(&mut tx, message(key)).await.unwrap();
        tx.commit();
        let mut rolled_back = store.begin();
        store.outbox().add(&mut rolled_back, message(key)).await.unwrap();
    }
}

async fn take(store: &MemoryStore, worker: WorkerId, lane: Lane) -> Lease {
    let keep = KeepLeases::new(worker, Duration::from_secs(3_600));
    let free = store.keep_leases(keep).await.unwrap().lanes;
    let record = free.iter().find(|record| record.lane == lane).unwrap();
    store.keep_leases(keep.take(&[TakeOver::of(record)])).await.unwrap();
    Lease::new(lane, record.epoch + 1)
}

/// From when another worker leaves its lane with its half of a backlog of so many keys, until that
/// and messages of these keys, added at that moment, are published, except for the silent one.
async fn time_to_catch_up(backlog: usize, more: impl Iterator<Item = usize>) -> Duration {
    let broker = MemoryBroker::new().with_profile(BrokerProfile::new(1_000_000, UNDECIDED));
    let silent = message(SILENT);
    broker.fail_when(move |row| row.message.key() == silent.key(), Fault::Silence);
    let store = MemoryStore::with_lanes(LANES);
    let slow = FaultyStore::new(store.clone());
    slow.fail_next(StoreMethod::Claim, usize::MAX, StoreFault::Delay(CLAIM_TAKES));
    broker.set_latency(PUBLISH_TAKES);
    let (other, own) = (WorkerId::from_bytes([8; 16]), store.lane_of(&message(0)));
    let lease = take(&store, other, Lane(1 - own.0)).await;
    commit_with_gaps(&store, 0..backlog).await;

    let dispatcher = Dispatcher::builder(slow, broker.clone()).rows_in_flight(WINDOW);
    let running = tokio::spawn(dispatcher.build().unwrap().run(std::future::pending()));
    // Just before it keeps its leases again.
    sleep(Duration::from_millis(900)).await;
    let more: Vec<usize> = more.collect();
    let answered = backlog + more.iter().filter(|key| **key != SILENT).count();
    commit_with_gaps(&store, more.into_iter()).await;
    assert_eq!(store.lane_of(&message(SILENT)), own);
    store.release(Release::new(other, &[lease]).leaving()).await.unwrap();
    let left = Instant::now();
    broker.wait_for(answered).await;
    running.abort();
    left.elapsed()
}

/// It learns of the free lane within a second, and takes a message for slow after another one.
const SOON: Duration = Duration::from_secs(4);

#[tokio::test(start_paused = true)]
async fn rows_that_wait_for_smaller_ones_leave_those_room_in_a_small_window() {
    let took = time_to_catch_up(12_000, std::iter::empty()).await;
    assert!(took < SOON, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn they_do_while_a_key_waits_for_its_content() {
    // More than are kept with their content.
    let took = time_to_catch_up(10_000, std::iter::repeat_n(0, 200)).await;
    assert!(took < SOON, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn they_do_while_a_message_gets_no_answer() {
    let took = time_to_catch_up(8_000, std::iter::once(SILENT)).await;
    assert!(took < SOON, "{took:?}");
}

/// Notes what each publish holds.
#[derive(Debug)]
struct Weighing {
    broker: MemoryBroker,
    publishes: Arc<Mutex<Vec<usize>>>,
}

#[async_trait]
impl Broker for Weighing {
    fn profile(&self) -> BrokerProfile {
        self.broker.profile()
    }

    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
        let bytes = batch.iter().map(|outgoing| outgoing.delivery.message.size()).sum();
        self.publishes.lock().unwrap().push(bytes);
        self.broker.publish(batch, outcomes).await;
    }

    async fn check(&self) -> Result<(), PublishError> {
        self.broker.check().await
    }

    async fn close(&self, within: Duration) {
        self.broker.close(within).await;
    }
}

/// Answered messages are in memory until the last one of their publish is answered, though they are
/// not counted as in flight any more.
#[tokio::test(start_paused = true)]
async fn one_publish_takes_an_eighth_of_the_bytes_in_flight_at_most() {
    const PAYLOAD: usize = 50_000;
    const BYTES: usize = 40 * PAYLOAD;
    let (store, broker) = (MemoryStore::with_lanes(LANES), MemoryBroker::new());
    let publishes = Arc::default();
    let weighing = Weighing { broker: broker.clone(), publishes: Arc::clone(&publishes) };
    let mut tx = store.begin();
    for key in 0..200 {
        let large = Message::builder("orders").key(key.to_string()).payload([7; PAYLOAD]);
        store.outbox().add(&mut tx, large.build().unwrap()).await.unwrap();
    }
    tx.commit();
    let dispatcher = Dispatcher::builder(store, weighing).bytes_in_flight(BYTES).build().unwrap();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    broker.wait_for(200).await;
    running.abort();
    let heaviest = *publishes.lock().unwrap().iter().max().unwrap();
    // What is beyond an eighth is the last message.
    assert!(heaviest <= BYTES / 8 + PAYLOAD + 1_000, "{heaviest}");
    assert!(heaviest > BYTES / 10, "{heaviest}");
}

#[tokio::test(start_paused = true)]
async fn a_window_of_one_byte_sends_one_message_after_the_other() {
    let (store, broker) = (MemoryStore::with_lanes(LANES), MemoryBroker::new());
    commit_with_gaps(&store, 0..20).await;
    let dispatcher = Dispatcher::builder(store, broker).bytes_in_flight(1).build().unwrap();
    let run = tokio::time::timeout(Duration::from_secs(600), dispatcher.run_until_empty());
    assert_eq!(run.await.unwrap().unwrap().delivered, 20);
}

/// Messages that became visible behind later ones are read by position, beyond the window at that.
#[tokio::test(start_paused = true)]
async fn content_stays_within_the_window_and_a_quarter_while_the_broker_stands_still() {
    const PAYLOAD: usize = 20_000;
    const BYTES: usize = 50 * PAYLOAD;
    let (store, broker) = (MemoryStore::with_lanes(LANES), MemoryBroker::new());
    broker.set_latency(Duration::from_secs(3_600));
    let mut late = Vec::new();
    for key in 0..500 {
        let mut tx = store.begin();
        let large = Message::builder("orders").key(key.to_string()).payload([7; PAYLOAD]);
        store.outbox().add(&mut tx, large.build().unwrap()).await.unwrap();
        late.push(tx);
    }
    commit_with_gaps(&store, 0..50).await;
    let dispatcher = Dispatcher::builder(store, broker).bytes_in_flight(BYTES).build().unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    sleep(Duration::from_secs(1)).await;
    late.into_iter().for_each(|tx| tx.commit());
    let mut most = 0;
    for _ in 0..100 {
        sleep(Duration::from_millis(50)).await;
        most = most.max(handle.status().content_bytes);
    }
    running.abort();
    assert!(most <= BYTES + BYTES / 4 + 4 * PAYLOAD, "{most}");
    assert!(most > BYTES / 2, "{most}");
}

/// All of a key wait for a message that became visible late; then for each other.
#[tokio::test(start_paused = true)]
async fn what_waited_for_a_late_message_keeps_no_more_content_than_the_buffer_of_its_key() {
    const PAYLOAD: usize = 10_000;
    let (store, broker) = (MemoryStore::with_lanes(LANES), MemoryBroker::new());
    broker.set_latency(Duration::from_secs(3_600));
    let large = || Message::builder("orders").key("hot").payload([7; PAYLOAD]).build().unwrap();
    let mut late = store.begin();
    store.outbox().add(&mut late, large()).await.unwrap();
    commit_with_gaps(&store, 0..10).await;
    let dispatcher = Dispatcher::builder(store.clone(), broker).build().unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    sleep(Duration::from_secs(1)).await;
    let mut tx = store.begin();
    for _ in 0..300 {
        store.outbox().add(&mut tx, large()).await.unwrap();
    }
    late.commit();
    tx.commit();
    sleep(Duration::from_secs(1)).await;
    let (held, known) = (handle.status().content_bytes, handle.status().known);
    running.abort();
    assert!(known > 300, "{known}");
    assert!(held < 70 * PAYLOAD, "{held}");
}
