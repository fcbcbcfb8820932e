//! The promises of the README in the same words, on the fakes; the one about neighbours needs a real
//! database, and its test is with those.
//!
//! The simulation checks the same under thousands of fault schedules, and `integration-tests` on
//! real servers; this is where to read what a promise means.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use outbox_core::broker::PublishErrorKind;
use outbox_core::retry::{OnDeath, Retention, RetryPolicy, TopicPolicy};
use outbox_core::{DeadLetters, Dispatcher, Message, MessageId};
use outbox_testing::{Fault, FaultyStore, MemoryBroker, MemoryStore};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const LONG: Duration = Duration::from_secs(600);

fn message(topic: &str, key: &str) -> Message {
    Message::builder(topic).key(key).payload("p").build().expect("a valid message")
}

async fn commit(store: &MemoryStore, topic: &str, key: &str) -> MessageId {
    let mut tx = store.begin();
    let id = store.outbox().add(&mut tx, message(topic, key)).await.expect("an added message");
    tx.commit();
    id
}

/// A dispatcher that runs until it is told to stop.
struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Running {
    fn start(dispatcher: Dispatcher) -> Self {
        let (stop, stopped) = oneshot::channel();
        let run = dispatcher.run(async { _ = stopped.await });
        Self { stop, task: tokio::spawn(async { _ = run.await.expect("a clean end") }) }
    }

    async fn stop(self) {
        _ = self.stop.send(());
        self.task.await.expect("no panic");
    }

    /// As SIGKILL would: nothing is drained or given back.
    async fn crash(self) {
        self.task.abort();
        _ = self.task.await;
    }
}

fn dispatcher(store: &MemoryStore, broker: &MemoryBroker) -> Dispatcher {
    Dispatcher::builder(store.clone(), broker.clone()).build().expect("valid settings")
}

fn published_keys(broker: &MemoryBroker) -> Vec<String> {
    let key = |key: Option<Vec<u8>>| String::from_utf8(key.unwrap_or_default()).expect("text");
    broker.published().into_iter().map(|published| key(published.key)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_committed_message_leaves_the_outbox_only_after_the_broker_acknowledged_that_message() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    commit(&store, "orders", "7").await;
    let silence = broker.silence();
    let running = Running::start(dispatcher(&store, &broker));
    tokio::time::sleep(LONG).await;
    store.assert_pending([("orders", "7")]);
    drop(silence);
    broker.wait_for(1).await;
    running.stop().await;
    store.assert_pending::<&str>([]);
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_decision_keeps_a_message_in_full() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let policy = TopicPolicy::new().on_death(OnDeath::Skip);
    broker.fail_when(|d| d.message.topic() == "audit", PublishErrorKind::Rejected);
    let mut tx = store.begin();
    let message = Message::builder("audit").key("7").payload("kept").header("h", "v");
    let id = store.outbox().add(&mut tx, message.build().unwrap()).await.unwrap();
    tx.commit();
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).topic("audit", policy);
    dispatcher.build().unwrap().run_until_empty().await.unwrap();
    store.assert_pending::<&str>([]);
    let dead = store.get(id).await.unwrap().expect("a dead letter").message.expect("readable");
    assert_eq!(
        (dead.topic(), dead.key(), dead.payload()),
        ("audit", Some(&b"7"[..]), Some(&b"kept"[..]))
    );
    assert!(dead.headers().iter().any(|header| header == ("h", Some(&b"v"[..]))));
}

#[tokio::test(start_paused = true)]
async fn nothing_undelivered_is_ever_deleted_by_age() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let retention = Retention::Keep(Duration::from_secs(60));
    let outage = broker.outage();
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).retention(retention);
    let running = Running::start(dispatcher.build().unwrap());
    commit(&store, "orders", "7").await;
    tokio::time::sleep(2 * LONG).await;
    store.assert_pending([("orders", "7")]);
    drop(outage);
    broker.wait_for(1).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert_eq!(store.archived().len(), 1, "delivered, and younger than asked");
    tokio::time::sleep(LONG).await;
    assert!(store.archived().is_empty(), "delivered, and older than asked");
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn only_committed_messages_are_published() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let running = Running::start(dispatcher(&store, &broker));
    let mut open = store.begin();
    store.outbox().add(&mut open, message("orders", "open")).await.unwrap();
    let mut undone = store.begin();
    store.outbox().add(&mut undone, message("orders", "undone")).await.unwrap();
    undone.rollback();
    commit(&store, "orders", "committed").await;
    tokio::time::sleep(LONG).await;
    broker.assert_published([("orders", "committed")]);
    open.commit();
    broker.wait_for(2).await;
    broker.assert_published([("orders", "committed"), ("orders", "open")]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn without_faults_each_message_appears_exactly_once() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.set_latency(Duration::from_millis(7));
    // Three workers that come and go in order.
    let mut workers = vec![Running::start(dispatcher(&store, &broker))];
    for round in 0..300 {
        commit(&store, "orders", &(round % 13).to_string()).await;
        if round % 50 == 10 {
            workers.push(Running::start(dispatcher(&store, &broker)));
        }
        if round % 50 == 40 {
            workers.remove(0).stop().await;
        }
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    assert_eq!(broker.wait_for(300).await.len(), 300);
    broker.assert_no_repetition();
    for worker in workers {
        worker.stop().await;
    }
    store.assert_pending::<&str>([]);
}

#[tokio::test(start_paused = true)]
async fn with_faults_extra_appearances_are_bounded_by_what_was_in_flight() {
    const IN_FLIGHT: usize = 20;
    const CRASHES: usize = 10;
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.set_latency(Duration::from_millis(50));
    let mut ids = Vec::new();
    for number in 0..2_000 {
        ids.push(commit(&store, "orders", &(number % 200).to_string()).await);
    }
    for _ in 0..CRASHES {
        let dispatcher = Dispatcher::builder(store.clone(), broker.clone());
        let running = Running::start(dispatcher.rows_in_flight(IN_FLIGHT).build().unwrap());
        let target = broker.published().len() + 60;
        broker.wait_for(target.min(2_000)).await;
        running.crash().await;
    }
    dispatcher(&store, &broker).run_until_empty().await.unwrap();
    store.assert_pending::<&str>([]);
    broker.assert_order_per_key(&ids);
    let extra = broker.published().len() - ids.len();
    assert!(extra > 0, "the crashes came at moments without consequence");
    assert!(extra <= IN_FLIGHT * CRASHES, "{extra} extra appearances");
}

#[tokio::test(start_paused = true)]
async fn first_appearances_follow_commit_order_whatever_happens_to_clocks_leases_and_processes() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.set_latency(Duration::from_millis(50));
    let faulty = Arc::new(FaultyStore::new(store.clone()));
    let start = || {
        let dispatcher = Dispatcher::builder(Arc::clone(&faulty), broker.clone());
        Running::start(dispatcher.build().expect("valid settings"))
    };
    let (mut ids, mut workers) = (Vec::new(), vec![start(), start()]);
    for round in 0..400 {
        ids.push(commit(&store, "orders", &(round % 7).to_string()).await);
        match round % 100 {
            20 => store.set_clock_back(Duration::from_secs(3_600)),
            40 => {
                // Leases expire while their owners live.
                let _outage = faulty.outage();
                tokio::time::sleep(Duration::from_secs(60)).await;
            }
            60 => {
                workers.remove(0).crash().await;
                workers.push(start());
            }
            80 => broker.fail_next(3, Fault::Doubt),
            _ => {}
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // The lanes of those that crashed wait for a lease by the store's clock, wherever it was set to.
    tokio::time::sleep(Duration::from_secs(4 * 3_600 + 600)).await;
    store.assert_pending::<&str>([]);
    broker.assert_order_per_key(&ids);
    for worker in workers {
        worker.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_message_never_lets_a_later_one_of_its_key_pass() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let mut ids = Vec::new();
    for number in 0..60 {
        ids.push(commit(&store, "orders", &(number % 3).to_string()).await);
    }
    for fault in [Fault::Doubt, PublishErrorKind::Failed.into(), PublishErrorKind::NotSent.into()] {
        broker.fail_next(7, fault);
    }
    dispatcher(&store, &broker).run_until_empty().await.unwrap();
    broker.assert_order_per_key(&ids);
}

#[tokio::test(start_paused = true)]
async fn a_later_message_passes_a_failed_one_only_where_the_topics_policy_says_skip() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let policy = |on_death| {
        let twice = RetryPolicy::default().max_attempts(2);
        TopicPolicy::new().retry(twice).on_death(on_death)
    };
    for topic in ["held", "skipped"] {
        let bad = commit(&store, topic, "7").await;
        broker.fail_when(move |d| d.message.id() == bad, PublishErrorKind::Failed);
        commit(&store, topic, "7").await;
    }
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone())
        .topic("held", policy(OnDeath::Hold))
        .topic("skipped", policy(OnDeath::Skip));
    dispatcher.build().unwrap().run_until_empty().await.unwrap();
    broker.assert_published([("skipped", "7")]);
    store.assert_pending([("held", "7"), ("held", "7")]);
    assert_eq!((store.held().len(), store.dead().len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn a_held_key_is_still_held_and_a_parked_one_still_parked_after_every_relay_was_killed() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let first = commit(&store, "orders", "held").await;
    let parked = commit(&store, "orders", "parked").await;
    commit(&store, "orders", "held").await;
    broker.fail_when(move |d| d.message.id() == first, PublishErrorKind::Rejected);
    broker.fail_when(move |d| d.message.id() == parked, PublishErrorKind::Failed);
    // Half of it to all of it: more than one pause, and less than all of them.
    let late = RetryPolicy::exponential(3 * LONG, 3 * LONG);
    let build = || Dispatcher::builder(store.clone(), broker.clone()).retry(late).build().unwrap();
    let running = Running::start(build());
    tokio::time::sleep(Duration::from_secs(60)).await;
    running.crash().await;
    broker.heal();
    let running = Running::start(build());
    tokio::time::sleep(LONG).await;
    broker.assert_published::<&str>([]);
    assert_eq!(store.retry(&[first]).await.unwrap(), 1, "the operator's retry opens the gate");
    broker.wait_for(2).await;
    assert_eq!(published_keys(&broker), ["held", "held"]);
    tokio::time::sleep(2 * LONG).await;
    assert_eq!(published_keys(&broker), ["held", "held", "parked"]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn one_bad_message_holds_back_its_own_key_and_no_other() {
    let one_lane = MemoryStore::with_lanes(NonZeroU16::MIN);
    let broker = MemoryBroker::new();
    broker.fail_when(|d| d.message.key() == Some(b"bad"), PublishErrorKind::Rejected);
    let running = Running::start(dispatcher(&one_lane, &broker));
    for _ in 0..50 {
        commit(&one_lane, "orders", "bad").await;
        commit(&one_lane, "orders", "good").await;
    }
    assert_eq!(broker.wait_for(50).await.len(), 50);
    assert!(published_keys(&broker).iter().all(|key| key == "good"));
    running.stop().await;
    assert_eq!(one_lane.pending().len(), 50);
}

#[tokio::test(start_paused = true)]
async fn one_bad_topic_holds_back_its_own_traffic_and_is_resumed_by_itself() {
    let (store, broker) = (MemoryStore::with_lanes(NonZeroU16::MIN), MemoryBroker::new());
    broker.remove_topic("missing");
    let running = Running::start(dispatcher(&store, &broker));
    for number in 0..50 {
        commit(&store, "missing", &number.to_string()).await;
        commit(&store, "orders", &number.to_string()).await;
    }
    broker.wait_for(50).await;
    assert_eq!(broker.published_to("orders").len(), 50);
    tokio::time::sleep(LONG).await;
    broker.create_topic("missing");
    broker.wait_for(100).await;
    running.stop().await;
    broker.assert_no_repetition();
}

#[tokio::test(start_paused = true)]
async fn a_broker_outage_consumes_no_attempts_and_sends_nothing_to_the_dead_letters() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let outage = broker.outage();
    // One counted attempt would be the last.
    let once = RetryPolicy::default().max_attempts(1);
    let policy = TopicPolicy::new().retry(once).on_death(OnDeath::Skip);
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).topic("orders", policy);
    let running = Running::start(dispatcher.build().unwrap());
    for number in 0..100 {
        commit(&store, "orders", &number.to_string()).await;
    }
    tokio::time::sleep(2 * LONG).await;
    assert_eq!((store.pending().len(), store.dead().len()), (100, 0));
    drop(outage);
    broker.wait_for(100).await;
    broker.assert_no_repetition();
    running.stop().await;
    assert!(store.dead().is_empty());
}
