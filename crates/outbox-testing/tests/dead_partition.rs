//! A partition that never answers, as one without a leader, beside what still answers.
//!
//! The machine knows topics and keys, no partitions. A message to the dead one waits at the broker
//! for the whole undecided time, so a window bears it if it has room for all that goes there
//! meanwhile: twice over, since a topic may use half of the window. A broker that knows its
//! partitions, as outbox-kafka does, does not send what is for a dead one, which needs no room.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::num::NonZeroU16;
use std::time::Duration;

use outbox_core::broker::{BrokerProfile, PublishErrorKind};
use outbox_core::{Dispatcher, Message};
use outbox_testing::{Fault, MemoryBroker, MemoryStore};
use tokio::task::JoinHandle;
use tokio::time::Instant;

const PARTITIONS: usize = 6;
/// As Kafka's by default.
const UNDECIDED: Duration = Duration::from_secs(20);
/// Messages of a second, to all partitions in turn.
const RATE: usize = 60;
const SECONDS: usize = 200;

async fn commit(store: &MemoryStore, topic: &str, keys: impl Iterator<Item = usize>) {
    let mut tx = store.begin();
    for key in keys {
        let partition = (key % PARTITIONS) as i32;
        let message = Message::builder(topic).key(key.to_string()).partition(partition);
        store.outbox().add(&mut tx, message.payload("p").build().unwrap()).await.unwrap();
    }
    tx.commit();
}

/// Seconds until a message that gets no answer is taken for slow, and what is behind it leaves its
/// room to others.
const UNTIL_SLOW: usize = 2;

/// What a run is made of.
struct Load {
    keys: usize,
    window: usize,
    /// Whether half as much goes to a topic whose partitions are all well.
    other_topic: bool,
}

/// A broker of which one partition of `orders` never answers, or whatever else this fault does.
fn dead_partition(fault: Fault) -> (MemoryStore, MemoryBroker) {
    let profile = BrokerProfile::new(1_000_000, UNDECIDED);
    let broker = MemoryBroker::new().with_partitions(NonZeroU16::MAX).with_profile(profile);
    let is_dead = |message: &Message| message.topic() == "orders" && message.partition() == Some(0);
    broker.fail_when(move |delivery| is_dead(&delivery.message), fault);
    (MemoryStore::new(), broker)
}

fn relay(store: &MemoryStore, broker: &MemoryBroker, window: usize) -> JoinHandle<()> {
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).rows_in_flight(window);
    let dispatcher = dispatcher.build().unwrap();
    tokio::spawn(async move { drop(dispatcher.run(std::future::pending()).await) })
}

/// How many seconds of their load the live partitions, and the other topic, were behind at most.
async fn behind(load: Load, fault: Fault) -> (usize, usize) {
    let (store, broker) = dead_partition(fault);
    let running = relay(&store, &broker, load.window);
    // Until it has its lanes.
    commit(&store, "first", [1].into_iter()).await;
    broker.wait_for(1).await;
    let live = RATE * (PARTITIONS - 1) / PARTITIONS;
    let (mut partitions, mut topic) = (0, 0);
    for second in 1..=SECONDS {
        let keys = |count: usize| (0..count).map(move |n| (second * RATE + n) % load.keys);
        commit(&store, "orders", keys(RATE)).await;
        if load.other_topic {
            commit(&store, "well", keys(RATE / 2)).await;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        let missing = second * live - broker.published_to("orders").len();
        partitions = partitions.max(missing.div_ceil(live));
        if load.other_topic {
            let missing = second * (RATE / 2) - broker.published_to("well").len();
            topic = topic.max(missing.div_ceil(RATE / 2));
        }
    }
    running.abort();
    (partitions, topic)
}

#[tokio::test(start_paused = true)]
async fn of_few_keys_a_dead_partition_holds_up_no_other_one_however_small_the_window() {
    // One message of each key: ten of the fifty that the topic may have at the broker.
    let load = Load { keys: 60, window: 100, other_topic: false };
    assert!(behind(load, Fault::Silence).await.0 <= UNTIL_SLOW);
}

#[tokio::test(start_paused = true)]
async fn of_many_keys_a_dead_partition_holds_up_no_other_one_in_a_window_with_room_for_it() {
    let load = Load { keys: 6_000, window: 10_000, other_topic: false };
    assert_eq!(behind(load, Fault::Silence).await.0, 0);
}

#[tokio::test(start_paused = true)]
async fn of_many_keys_what_is_not_sent_to_a_dead_partition_holds_up_no_other_one() {
    let load = Load { keys: 6_000, window: 100, other_topic: false };
    let fault = Fault::Refuse(PublishErrorKind::NotSent);
    assert!(behind(load, fault).await.0 <= UNTIL_SLOW);
}

#[tokio::test(start_paused = true)]
async fn a_dead_partition_that_fills_its_topics_half_of_the_window_holds_up_no_other_topic() {
    let load = Load { keys: 6_000, window: 100, other_topic: true };
    let (partitions, topic) = behind(load, Fault::Silence).await;
    assert!(partitions > UNTIL_SLOW, "the window had room for it: the test shows nothing");
    assert!(topic <= UNTIL_SLOW, "{topic}");
}

/// Whatever comes for the partitions that answer, while nothing else but the dead one has anything.
async fn nothing_that_comes_later_waits(
    store: MemoryStore,
    broker: MemoryBroker,
    dead_keys: usize,
) {
    let running = relay(&store, &broker, 10_000);
    commit(&store, "orders", (0..dead_keys).map(|key| key * PARTITIONS)).await;
    tokio::time::sleep(Duration::from_secs(300)).await;
    for key in 1..PARTITIONS {
        commit(&store, "orders", [key].into_iter()).await;
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert_eq!(broker.published_to("orders").len(), key, "ten seconds after it was added");
        // So that the dead one is alone again.
        tokio::time::sleep(Duration::from_secs(300)).await;
    }
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_dead_partition_alone_at_the_broker_stops_nothing_that_comes_later() {
    // With forty keys one of them waits to be sent again at any time.
    for dead_keys in [2, 40] {
        let (store, broker) = dead_partition(Fault::Silence);
        nothing_that_comes_later_waits(store, broker, dead_keys).await;
    }
}

#[tokio::test(start_paused = true)]
async fn of_many_keys_nor_does_one_that_is_probed_by_one_message_at_a_time() {
    let broker = MemoryBroker::new()
        .with_partitions(NonZeroU16::MAX)
        .with_profile(BrokerProfile::new(1_000_000, UNDECIDED));
    let is_dead = |message: &Message| message.partition() == Some(0);
    let probed = std::sync::Mutex::new(None::<Instant>);
    let probes = move |message: &Message| {
        let mut probed = probed.lock().unwrap();
        let free = probed.is_none_or(|at| at.elapsed() >= UNDECIDED);
        if is_dead(message) && free {
            *probed = Some(Instant::now());
            return true;
        }
        false
    };
    broker.fail_when(move |delivery| probes(&delivery.message), Fault::Silence);
    broker.fail_when(move |delivery| is_dead(&delivery.message), PublishErrorKind::NotSent);
    nothing_that_comes_later_waits(MemoryStore::new(), broker, 5_000).await;
}

/// It reads on, beyond all that it may hold with content, as long as the partition is not known to be
/// all that there is.
#[tokio::test(start_paused = true)]
async fn a_long_backlog_of_a_dead_partition_holds_up_no_other_topic_behind_it() {
    let (store, broker) = dead_partition(Fault::Silence);
    commit(&store, "orders", (0..300_000).map(|key| key % 20_000 * PARTITIONS)).await;
    commit(&store, "invoices", 0..100).await;
    let running = relay(&store, &broker, 20_000);
    tokio::time::sleep(Duration::from_secs(10)).await;
    running.abort();
    assert_eq!(broker.published_to("invoices").len(), 100);
}
