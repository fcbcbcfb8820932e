//! A partition that never answers, as one without a leader, beside what still answers.
//!
//! The machine knows topics and keys, no partitions. A message to the dead one waits at the broker
//! for the whole undecided time, so a window bears it if it has room for what goes there meanwhile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use outbox_core::broker::BrokerProfile;
use outbox_core::{Dispatcher, Message};
use outbox_testing::{Fault, MemoryBroker, MemoryStore};

const PARTITIONS: usize = 6;
/// As Kafka's by default.
const UNDECIDED: Duration = Duration::from_secs(20);
/// Messages of a second, to all partitions in turn.
const RATE: usize = 60;
const SECONDS: usize = 300;

async fn commit(store: &MemoryStore, topic: &str, keys: impl Iterator<Item = usize>) {
    let mut tx = store.begin();
    for key in keys {
        let partition = (key % PARTITIONS) as i32;
        let message = Message::builder(topic).key(key.to_string()).partition(partition);
        store.outbox().add(&mut tx, message.payload("p").build().unwrap()).await.unwrap();
    }
    tx.commit();
}

/// What a run is made of.
struct Load {
    keys: usize,
    window: usize,
}

/// How many seconds of their load the live partitions were behind at most.
async fn behind(load: Load) -> usize {
    let profile = BrokerProfile::new(1_000_000, UNDECIDED);
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new().with_profile(profile));
    let is_dead = |message: &Message| message.topic() == "orders" && message.partition() == Some(0);
    broker.fail_when(move |delivery| is_dead(&delivery.message), Fault::Silence);
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).rows_in_flight(load.window);
    let running = tokio::spawn(dispatcher.build().unwrap().run(std::future::pending()));
    // Until it has its lanes.
    commit(&store, "first", [1].into_iter()).await;
    broker.wait_for(1).await;
    let live = RATE * (PARTITIONS - 1) / PARTITIONS;
    let mut furthest = 0;
    for second in 1..=SECONDS {
        let keys = |count: usize| (0..count).map(move |n| (second * RATE + n) % load.keys);
        commit(&store, "orders", keys(RATE)).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let missing = second * live - broker.published_to("orders").len();
        furthest = furthest.max(missing.div_ceil(live));
    }
    running.abort();
    furthest
}

#[tokio::test(start_paused = true)]
async fn of_many_keys_a_dead_partition_holds_up_no_other_one_in_a_window_with_room_for_it() {
    let load = Load { keys: 6_000, window: 10_000 };
    assert_eq!(behind(load).await, 0);
}
