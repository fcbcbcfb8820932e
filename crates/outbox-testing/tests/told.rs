//! What operators are told by events, figures and status when something fails, and after it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use outbox_core::broker::{BrokerProfile, PublishErrorKind};
use outbox_core::metrics::MetricsObserver;
use outbox_core::observe::{Event, Observer};
use outbox_core::status::Health;
use outbox_core::store::StoreErrorKind;
use outbox_core::{Dispatcher, DispatcherBuilder, Message, Store};
use outbox_testing::{Fault, FaultyStore, MemoryBroker, MemoryStore, StoreFault, StoreMethod};
use tokio::sync::oneshot;
use tokio::time::sleep;

const MINUTE: Duration = Duration::from_secs(60);

async fn commit(store: &MemoryStore, key: &str) {
    let mut tx = store.begin();
    let message = Message::builder("orders").key(key).payload("p").build().unwrap();
    store.outbox().add(&mut tx, message).await.unwrap();
    tx.commit();
}

fn builder(store: impl Store, broker: &MemoryBroker) -> DispatcherBuilder {
    Dispatcher::builder(store, broker.clone())
}

/// All events, in order.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<Event>>>);

impl Observer for Events {
    fn observe(&self, event: &Event) {
        self.0.lock().unwrap().push(event.clone());
    }
}

impl Events {
    fn count(&self, is_so: impl Fn(&Event) -> bool) -> usize {
        self.0.lock().unwrap().iter().filter(|event| is_so(event)).count()
    }
}

/// The last value of a gauge that was exported since the last look.
fn gauge(snapshotter: &Snapshotter, name: &str) -> Option<f64> {
    let all = snapshotter.snapshot().into_vec();
    let found = all.into_iter().find(|(key, ..)| key.key().name() == name);
    found.and_then(|(.., value)| match value {
        DebugValue::Gauge(value) => Some(value.into_inner()),
        _ => None,
    })
}

#[tokio::test(start_paused = true)]
async fn a_count_that_fails_leaves_no_old_figures() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let store = FaultyStore::new(MemoryStore::new());
    let dispatcher = builder(store.clone(), &MemoryBroker::new())
        .observer(MetricsObserver::new(["orders"]))
        .build()
        .unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    sleep(MINUTE).await;
    assert_eq!(gauge(&snapshotter, "outbox_oldest_pending_age_seconds"), Some(0.0));
    assert!(handle.status().backlog.is_some());
    store.fail_next(StoreMethod::Backlog, 20, StoreErrorKind::Unavailable);
    sleep(MINUTE / 2).await;
    assert!(handle.status().backlog.is_some(), "it was counted again in time");
    store.fail_next(StoreMethod::Backlog, usize::MAX, StoreErrorKind::Unavailable);
    sleep(MINUTE).await;
    let age = gauge(&snapshotter, "outbox_oldest_pending_age_seconds");
    assert!(age.is_some_and(f64::is_nan), "{age:?}");
    assert_eq!(handle.status().backlog, None);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_lost_its_lanes_tells_nothing_of_them() {
    let (store, broker) = (FaultyStore::new(MemoryStore::new()), MemoryBroker::new());
    broker.remove_topic("orders");
    let dispatcher = builder(store.clone(), &broker).build().unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    commit(store.inner(), "7").await;
    sleep(MINUTE).await;
    let status = handle.status();
    assert!(status.backlog.is_some() && status.closed_topics.len() == 1, "{status:?}");
    let _outage = store.outage();
    sleep(MINUTE * 2).await;
    let status = handle.status();
    assert!(status.lanes == 0 && status.backlog.is_none(), "{status:?}");
    assert!(status.closed_topics.is_empty(), "{status:?}");
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_doubt_that_ended_in_a_refusal_leaves_no_broker_down() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let dispatcher = builder(store.clone(), &broker).build().unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    sleep(MINUTE).await;
    broker.fail_next(1, PublishErrorKind::Unknown);
    broker.fail_next(1, PublishErrorKind::Rejected);
    commit(&store, "7").await;
    sleep(MINUTE).await;
    assert_eq!(handle.status().health, Health::Idle);
    assert_eq!(handle.status().held_keys, 1);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn latency_counts_from_the_add_however_long_before_the_start_that_was() {
    let (store, broker, events) = (MemoryStore::new(), MemoryBroker::new(), Events::default());
    commit(&store, "7").await;
    sleep(MINUTE * 60).await;
    let dispatcher = builder(store, &broker).observer(events.clone()).build().unwrap();
    dispatcher.run_until_empty().await.unwrap();
    let late = |event: &Event| matches!(event, Event::Published { latency, .. } if *latency >= MINUTE * 60);
    assert_eq!(events.count(late), 1);
}

#[tokio::test(start_paused = true)]
async fn a_worker_whose_claims_fail_never_calls_the_broker_down() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let sick = FaultyStore::new(store.clone());
    let dispatcher = builder(sick.clone(), &broker).build().unwrap();
    let handle = dispatcher.handle();
    let well = builder(store, &broker).build().unwrap();
    let running = [
        tokio::spawn(dispatcher.run(std::future::pending())),
        tokio::spawn(well.run(std::future::pending())),
    ];
    sleep(MINUTE).await;
    sick.fail_next(StoreMethod::Claim, usize::MAX, StoreErrorKind::Denied);
    for _ in 0..600 {
        sleep(Duration::from_secs(1)).await;
        let health = handle.status().health;
        assert!(!matches!(health, Health::BrokerDown { .. }), "{health:?}");
    }
    running.iter().for_each(|running| running.abort());
}

#[tokio::test(start_paused = true)]
async fn the_circuit_is_open_from_a_start_in_an_outage_on_and_closed_after_any_end() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _guard = metrics::set_default_local_recorder(&recorder);
    let circuit = || gauge(&snapshotter, "outbox_circuit_open");
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let outage = broker.outage();
    let metrics = MetricsObserver::new(["orders"]);
    let dispatcher = builder(store.clone(), &broker).observer(metrics).build().unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    sleep(MINUTE).await;
    assert_eq!(circuit(), Some(1.0));
    assert!(matches!(handle.status().health, Health::BrokerDown { .. }));
    drop(outage);
    sleep(MINUTE).await;
    assert_eq!(circuit(), Some(0.0));
    let _outage = broker.outage();
    commit(&store, "7").await;
    sleep(MINUTE).await;
    // Not by the gauge: a look at one sets it to 0.
    assert!(matches!(handle.status().health, Health::BrokerDown { .. }));
    running.abort();
    _ = running.await;
    assert_eq!(circuit(), Some(0.0), "nobody sends any more");
}

#[tokio::test(start_paused = true)]
async fn an_orderly_stop_with_a_slow_broker_is_no_outage() {
    let (store, broker, events) = (MemoryStore::new(), MemoryBroker::new(), Events::default());
    broker.set_latency(Duration::from_secs(20));
    let builder = builder(store.clone(), &broker).observer(events.clone());
    let dispatcher = builder.drain_limit(Duration::from_secs(1)).build().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(dispatcher.run(async { _ = stopped.await }));
    commit(&store, "7").await;
    sleep(Duration::from_secs(1)).await;
    _ = stop.send(());
    running.await.unwrap().unwrap();
    assert_eq!(events.count(|event| matches!(event, Event::CircuitOpened)), 0);
    assert!(matches!(events.0.lock().unwrap().last(), Some(Event::Stopped)));
}

#[tokio::test(start_paused = true)]
async fn a_hold_and_a_retry_are_told_though_the_answer_of_their_settle_was_lost() {
    for kind in [PublishErrorKind::Rejected, PublishErrorKind::Failed] {
        let (store, broker) = (FaultyStore::new(MemoryStore::new()), MemoryBroker::new());
        broker.fail_next(1, kind);
        let lost = StoreFault::Doubt(StoreErrorKind::Unavailable);
        store.fail_next(StoreMethod::Settle, 1, lost);
        commit(store.inner(), "7").await;
        let dispatcher = builder(store, &broker).build().unwrap();
        let summary = dispatcher.run_until_empty().await.unwrap();
        let expected = if kind == PublishErrorKind::Rejected { (1, 0) } else { (0, 1) };
        assert_eq!((summary.held, summary.retried), expected, "{kind:?}");
    }
}

/// A store whose claims fail is asked a few times a second, and asked soon again.
mod failing_claims {
    use outbox_core::Wake;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_failed_claim_is_repeated_soon_however_seldom_pages_are_read() {
        let (store, broker) = (FaultyStore::new(MemoryStore::new()), MemoryBroker::new());
        store.fail_next(StoreMethod::Claim, 1, StoreErrorKind::Conflict);
        commit(store.inner(), "7").await;
        let builder = builder(store, &broker).poll(Duration::from_millis(1), MINUTE);
        let began = Instant::now();
        builder.build().unwrap().run_until_empty().await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn commits_that_are_announced_cause_no_claims_while_claims_fail() {
        let (store, broker) = (FaultyStore::new(MemoryStore::new()), MemoryBroker::new());
        let wake = Wake::default();
        let dispatcher = builder(store.clone(), &broker).wake(wake.clone()).build().unwrap();
        let running = tokio::spawn(dispatcher.run(std::future::pending()));
        sleep(MINUTE).await;
        store.fail_next(StoreMethod::Claim, usize::MAX, StoreErrorKind::Unavailable);
        let before = store.calls(StoreMethod::Claim);
        for _ in 0..10_000 {
            wake.wake();
            sleep(Duration::from_millis(1)).await;
        }
        let claims = store.calls(StoreMethod::Claim) - before;
        assert!(claims < 60, "{claims} in 10 s");
        running.abort();
    }
}

/// How a broker is down.
#[derive(Debug, Clone, Copy)]
enum Down {
    /// It answers nothing and no check.
    Whole,
    /// It refuses all messages, and answers checks.
    Refusing,
    /// It leaves all messages without an answer, and answers checks.
    Silent,
}

/// Workers that hand their lanes to each other in an outage that all share read everything anew after
/// it, and one of them has all lanes then. One of them notices it later, and its end sooner.
#[tokio::test(start_paused = true)]
async fn an_outage_that_all_workers_share_moves_no_lanes() {
    const SKEW: Duration = Duration::from_millis(3_500);
    for down in [Down::Whole, Down::Refusing, Down::Silent] {
        let profile = BrokerProfile::new(1_000_000, MINUTE / 3);
        let one = MemoryBroker::new().with_profile(profile);
        let rest = MemoryBroker::new().with_profile(profile);
        let (store, events) = (MemoryStore::new(), Events::default());
        let mut running = Vec::new();
        for broker in [&rest, &rest, &one, &rest] {
            let dispatcher = builder(store.clone(), broker).observer(events.clone());
            running.push(tokio::spawn(dispatcher.build().unwrap().run(std::future::pending())));
            sleep(Duration::from_secs(3)).await;
        }
        running.push(tokio::spawn({
            let store = store.clone();
            async move {
                loop {
                    for key in 0..50 {
                        commit(&store, &key.to_string()).await;
                    }
                    sleep(Duration::from_secs(1)).await;
                }
            }
        }));
        let fail = |broker: &MemoryBroker| match down {
            Down::Whole => Some(broker.outage()),
            Down::Refusing => {
                broker.fail_when(|_| true, PublishErrorKind::Unavailable);
                None
            }
            Down::Silent => {
                broker.fail_when(|_| true, Fault::Silence);
                None
            }
        };
        sleep(MINUTE).await;
        let moved = || events.count(|event| matches!(event, Event::LanesReleased { .. }));
        let before = moved();
        let outage = fail(&rest);
        sleep(SKEW).await;
        let outage_of_one = fail(&one);
        sleep(MINUTE * 5).await;
        assert_eq!(moved() - before, 0, "{down:?}");
        drop(outage_of_one);
        one.heal();
        sleep(SKEW).await;
        drop(outage);
        rest.heal();
        sleep(MINUTE).await;
        // After a silence who still waits for the end of it leaves its lanes to who does not.
        assert!(moved() == before || matches!(down, Down::Silent), "{down:?}");
        let committed = running.pop();
        committed.iter().for_each(|committing| committing.abort());
        sleep(MINUTE).await;
        assert_eq!(store.pending().len(), 0, "{down:?}");
        running.iter().for_each(|running| running.abort());
    }
}

/// The check of a broker that takes long.
mod slow_checks {
    use outbox_core::broker::{Broker, Outcomes, Outgoing, PublishError};

    use super::*;

    #[derive(Debug)]
    struct SlowChecks(MemoryBroker);

    #[async_trait]
    impl Broker for SlowChecks {
        fn profile(&self) -> BrokerProfile {
            self.0.profile()
        }

        async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
            self.0.publish(batch, outcomes).await;
        }

        async fn check(&self) -> Result<(), PublishError> {
            sleep(Duration::from_secs(10)).await;
            Ok(())
        }

        async fn close(&self, within: Duration) {
            self.0.close(within).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_check_from_before_a_worker_gave_its_lanes_up_brings_none_back() {
        let profile = BrokerProfile::new(1_000_000, Duration::from_secs(20));
        let (store, events) = (MemoryStore::new(), Events::default());
        let (well, sick) = (MemoryBroker::new(), MemoryBroker::new().with_profile(profile));
        sick.fail_when(|_| true, Fault::Silence);
        let sick = Dispatcher::builder(store.clone(), SlowChecks(sick));
        let sick = sick.observer(events.clone()).build().unwrap();
        let running = [
            tokio::spawn(sick.run(std::future::pending())),
            tokio::spawn(
                builder(store.clone(), &well).build().unwrap().run(std::future::pending()),
            ),
        ];
        for number in 0..3_600 {
            commit(&store, &number.to_string()).await;
            sleep(Duration::from_secs(1)).await;
        }
        running.iter().for_each(|running| running.abort());
        let gained = events.count(|event| matches!(event, Event::LanesGained { .. }));
        assert!(gained <= 20, "{gained} times in an hour");
    }
}
