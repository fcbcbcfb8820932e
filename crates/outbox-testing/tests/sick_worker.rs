//! A worker whose broker answers checks and nothing else, as a Kafka does whose advertised addresses
//! cannot be reached from where the worker runs, beside one that is well.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use outbox_core::broker::{BrokerProfile, PublishErrorKind};
use outbox_core::retry::{OnDeath, TopicPolicy};
use outbox_core::{Dispatcher, Message};
use outbox_testing::{Fault, MemoryBroker, MemoryStore};
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// As Kafka's by default.
const UNDECIDED: Duration = Duration::from_secs(20);
const MESSAGES: usize = 3_600;
/// The longest that a message may take, on average, in seconds.
const LONGEST: usize = 3;

fn broker() -> MemoryBroker {
    MemoryBroker::new().with_profile(BrokerProfile::new(1_000_000, UNDECIDED))
}

fn relay(store: &MemoryStore, broker: &MemoryBroker) -> JoinHandle<()> {
    let skip = TopicPolicy::new().on_death(OnDeath::Skip);
    let builder = Dispatcher::builder(store.clone(), broker.clone()).topic("orders", skip);
    let dispatcher = builder.build().unwrap();
    tokio::spawn(async move { drop(dispatcher.run(std::future::pending()).await) })
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_delivers_nothing_leaves_the_lanes_to_one_that_does() {
    leaves(&broker(), &broker()).await;
}

#[tokio::test(start_paused = true)]
async fn so_does_one_whose_client_refuses_messages_by_itself() {
    let (well, sick) = (broker(), broker());
    for broker in [&well, &sick] {
        let is_odd = |key: Option<&[u8]>| key.and_then(<[u8]>::last).is_some_and(|n| n % 2 == 1);
        broker.fail_when(move |d| is_odd(d.message.key()), PublishErrorKind::Rejected);
    }
    leaves(&well, &sick).await;
}

async fn leaves(well: &MemoryBroker, sick: &MemoryBroker) {
    let store = MemoryStore::new();
    sick.fail_when(|_| true, Fault::Silence);
    let running = [relay(&store, well), relay(&store, sick)];
    sleep(Duration::from_secs(60)).await;
    let mut waiting = 0;
    for number in 0..MESSAGES {
        let mut tx = store.begin();
        let message = Message::builder("orders").key(number.to_string()).payload("p");
        store.outbox().add(&mut tx, message.build().unwrap()).await.unwrap();
        tx.commit();
        sleep(Duration::from_secs(1)).await;
        waiting += store.pending().len();
    }
    running.iter().for_each(JoinHandle::abort);
    // One a second: as many wait, on average, as seconds pass until one has left.
    assert!(waiting < LONGEST * MESSAGES, "{} s", waiting as f64 / MESSAGES as f64);
}
