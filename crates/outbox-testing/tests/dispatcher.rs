//! A dispatcher on the fakes.

use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::broker::{
    Broker, BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind,
};
use outbox_core::delivery::Receipt;
use outbox_core::observe::{Event, Observer};
use outbox_core::retry::RetryPolicy;
use outbox_core::store::StoreErrorKind;
use outbox_core::{DeadLetters, Dispatcher, Message, MessageId, Wake};
use outbox_testing::{Fault, FaultyStore, MemoryBroker, MemoryStore, StoreFault, StoreMethod};

fn message(key: usize, number: usize) -> Message {
    let message = Message::builder("orders").key(key.to_string()).payload(number.to_string());
    message.build().expect("a valid message")
}

/// Commits `count` messages over `keys` keys and returns their ids in commit order.
async fn add(store: &MemoryStore, keys: usize, count: usize) -> Vec<MessageId> {
    let mut ids = Vec::new();
    for number in 0..count {
        let mut tx = store.begin();
        let message = message(number % keys, number);
        ids.push(store.outbox().add(&mut tx, message).await.expect("an added message"));
        tx.commit();
    }
    ids
}

#[tokio::test(start_paused = true)]
async fn everything_committed_is_published_once_and_in_order() {
    for store in [MemoryStore::new(), MemoryStore::new().in_commit_order()] {
        let broker = MemoryBroker::new();
        let ids = add(&store, 20, 1_000).await;
        let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build().unwrap();
        let summary = dispatcher.run_until_empty().await.unwrap();
        assert_eq!(summary.delivered, 1_000);
        broker.assert_order_per_key(&ids);
        broker.assert_no_repetition();
        store.assert_pending::<&str>([]);
    }
}

#[tokio::test(start_paused = true)]
async fn faults_of_broker_and_store_lose_nothing_and_keep_the_order() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let faulty = FaultyStore::new(store.clone());
    let ids = add(&store, 10, 300).await;
    broker.set_latency(Duration::from_millis(20));
    broker.fail_next(5, Fault::Doubt);
    broker.fail_next(5, PublishErrorKind::Failed);
    broker.fail_next(2, Fault::NoAnswer);
    faulty.fail_next(StoreMethod::Claim, 2, StoreErrorKind::Unavailable);
    faulty.fail_next(StoreMethod::Settle, 2, StoreFault::Doubt(StoreErrorKind::Unavailable));
    faulty.fail_next(StoreMethod::Settle, 1, StoreFault::HangAfter);
    faulty.fail_next(StoreMethod::KeepLeases, 1, StoreErrorKind::Conflict);
    let dispatcher = Dispatcher::builder(faulty, broker.clone()).build().unwrap();
    dispatcher.run_until_empty().await.unwrap();
    broker.assert_order_per_key(&ids);
    store.assert_pending::<&str>([]);
}

#[tokio::test(start_paused = true)]
async fn an_outage_ends_and_everything_arrives() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let outage = broker.outage();
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(dispatcher.run(async { _ = stopped.await }));
    let ids = add(&store, 5, 50).await;
    tokio::time::sleep(Duration::from_secs(3_600)).await;
    broker.assert_published::<&str>([]);
    drop(outage);
    broker.wait_for(50).await;
    broker.assert_order_per_key(&ids);
    _ = stop.send(());
    running.await.unwrap().unwrap();
}

/// Whether all of the outage's messages were read before it was noticed, or some lie above.
#[tokio::test(start_paused = true)]
async fn while_the_broker_is_down_the_store_is_read_now_and_then_only() {
    for messages in [1, 51] {
        let (store, broker) = (FaultyStore::new(MemoryStore::new()), MemoryBroker::new());
        add(store.inner(), 5, 50).await;
        let builder = Dispatcher::builder(store.clone(), broker.clone());
        let dispatcher = builder.grace(Duration::from_millis(5)).build().unwrap();
        let running = tokio::spawn(dispatcher.run(std::future::pending()));
        broker.wait_for(50).await;
        let outage = broker.outage();
        add(store.inner(), 5, messages).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        let before = store.calls(StoreMethod::Claim);
        tokio::time::sleep(Duration::from_secs(600)).await;
        let claims = store.calls(StoreMethod::Claim) - before;
        assert!((600..=2_700).contains(&claims), "{claims} in 600 s");
        drop(outage);
        running.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn a_late_commit_of_a_key_is_published_before_newer_ones() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build().unwrap();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    let mut ids = Vec::new();
    for round in 0..50 {
        let mut late = store.begin();
        ids.push(store.outbox().add(&mut late, message(1, round)).await.unwrap());
        ids.extend(add(&store, 1, 3).await); // Another key, positions above the late one.
        tokio::time::sleep(Duration::from_millis(300)).await;
        late.commit();
        let mut newer = store.begin();
        ids.push(store.outbox().add(&mut newer, message(1, round)).await.unwrap());
        newer.commit();
    }
    broker.wait_for(ids.len()).await;
    broker.assert_order_per_key(&ids);
    broker.assert_no_repetition();
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_window_within_a_key_sends_that_many_at_once_and_keeps_the_order() {
    let mut took = Vec::new();
    for window in [1, 16] {
        let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
        let ids = add(&store, 1, 320).await;
        broker.set_latency(Duration::from_millis(20));
        let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).in_key_window(window);
        let began = tokio::time::Instant::now();
        dispatcher.build().unwrap().run_until_empty().await.unwrap();
        took.push(began.elapsed());
        broker.assert_order_per_key(&ids);
        broker.assert_no_repetition();
    }
    // 320 round trips of 20 ms against 20 of them.
    assert!(took[0] > Duration::from_millis(6_400), "{took:?}");
    assert!(took[1] < took[0] / 10, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_window_within_a_key_loses_nothing_when_some_of_it_fails() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    add(&store, 3, 300).await;
    broker.set_latency(Duration::from_millis(20));
    broker.fail_next(5, Fault::Doubt);
    broker.fail_next(5, PublishErrorKind::Failed);
    broker.fail_next(5, PublishErrorKind::NotSent);
    broker.fail_next(2, Fault::NoAnswer);
    // A batch ends in the middle of a key's window.
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone());
    let dispatcher = dispatcher.rows_in_flight(5).in_key_window(8);
    dispatcher.build().unwrap().run_until_empty().await.unwrap();
    store.assert_pending::<&str>([]);
}

#[tokio::test(start_paused = true)]
async fn messages_of_different_keys_are_sent_together() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    add(&store, 1_000, 1_000).await;
    broker.set_latency(Duration::from_millis(100));
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build().unwrap();
    let began = tokio::time::Instant::now();
    dispatcher.run_until_empty().await.unwrap();
    // One by one it would be 100 s.
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_wake_after_the_commit_publishes_at_once() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let wake = Wake::default();
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).wake(wake.clone());
    let running = tokio::spawn(dispatcher.build().unwrap().run(std::future::pending()));
    for round in 1..=10 {
        // Long enough for the longest interval between pages.
        tokio::time::sleep(Duration::from_secs(30)).await;
        add(&store, 1, 1).await;
        let committed = tokio::time::Instant::now();
        wake.wake();
        broker.wait_for(round).await;
        assert!(committed.elapsed() < Duration::from_millis(5), "{:?}", committed.elapsed());
    }
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn an_idle_dispatcher_asks_the_store_at_most_five_times_a_second() {
    let store = std::sync::Arc::new(FaultyStore::new(MemoryStore::new()));
    let dispatcher = Dispatcher::builder(std::sync::Arc::clone(&store), MemoryBroker::new());
    let running = tokio::spawn(dispatcher.build().unwrap().run(std::future::pending()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    let methods = [StoreMethod::KeepLeases, StoreMethod::Claim, StoreMethod::Backlog];
    let asked = || methods.iter().map(|method| store.calls(*method)).sum::<u64>();
    let before = asked();
    tokio::time::sleep(Duration::from_secs(600)).await;
    let calls = asked() - before;
    assert!((600..=5 * 600).contains(&calls), "{calls} calls in 600 s");
    running.abort();
}

struct Panicking;

impl Observer for Panicking {
    fn observe(&self, _: &Event) {
        // As a panic, without the noise of its backtrace.
        std::panic::resume_unwind(Box::new("an observer's own trouble"));
    }
}

#[tokio::test(start_paused = true)]
async fn an_operators_retry_is_noticed_soon_beside_many_keys_that_wait() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let held = add(&store, 1, 1).await[0];
    broker.fail_when(move |d| d.message.id() == held, PublishErrorKind::Rejected);
    broker.fail_when(|_| true, PublishErrorKind::Failed);
    add(&store, 20_000, 20_000).await;
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone())
        .retry(RetryPolicy::exponential(Duration::from_secs(3_600), Duration::from_secs(3_600)));
    let running = tokio::spawn(dispatcher.build().unwrap().run(std::future::pending()));
    tokio::time::sleep(Duration::from_secs(60)).await;
    broker.heal();
    assert_eq!(store.retry(&[held]).await.unwrap(), 1);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let published: Vec<_> = broker.published().iter().map(|record| record.message_id).collect();
    assert_eq!(published.first(), Some(&held));
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn an_observer_that_panics_stops_nothing() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    add(&store, 3, 30).await;
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).observer(Panicking);
    dispatcher.build().unwrap().run_until_empty().await.unwrap();
    store.assert_pending::<&str>([]);
}

/// Answers nothing until it is closed, and everything then.
#[derive(Debug, Default)]
struct AnswersWhenClosed(Mutex<Vec<(usize, Outcomes)>>);

#[async_trait]
impl Broker for AnswersWhenClosed {
    fn profile(&self) -> BrokerProfile {
        BrokerProfile::new(1_000_000, Duration::from_secs(20))
    }

    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
        self.0.lock().expect("no panic").push((batch.len(), outcomes.clone()));
        std::future::pending().await
    }

    async fn check(&self) -> Result<(), PublishError> {
        Ok(())
    }

    async fn close(&self, _: Duration) {
        for (count, outcomes) in self.0.lock().expect("no panic").iter() {
            (0..*count).for_each(|index| outcomes.delivered(index, Receipt::default()));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn answers_that_the_broker_gives_while_it_is_closed_count() {
    let store = MemoryStore::new();
    add(&store, 20, 100).await;
    let dispatcher = Dispatcher::builder(store.clone(), AnswersWhenClosed::default())
        .drain_limit(Duration::from_secs(1))
        .build()
        .unwrap();
    let summary = dispatcher.run(tokio::time::sleep(Duration::from_secs(5))).await.unwrap();
    assert!(summary.delivered >= 20, "{summary:?}");
    assert_eq!(store.pending().len(), 100 - summary.delivered as usize);
}
