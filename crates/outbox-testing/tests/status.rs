//! What a dispatcher says of itself, on the fakes.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outbox_core::broker::PublishErrorKind;
use outbox_core::observe::{Event, Observer, Step};
use outbox_core::status::Health;
use outbox_core::{Dispatcher, DispatcherHandle, Message};
use outbox_testing::{FaultyStore, MemoryBroker, MemoryStore};
use tokio::sync::oneshot;

/// Counts how often a store did not open.
#[derive(Clone, Default)]
struct NotOpened(Arc<AtomicUsize>);

impl Observer for NotOpened {
    fn observe(&self, event: &Event) {
        if let Event::StoreFailed { step: Step::Open, .. } = event {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Whether the circuit is open, as observers are told.
#[derive(Clone, Default)]
struct Circuit(Arc<AtomicBool>);

impl Observer for Circuit {
    fn observe(&self, event: &Event) {
        match event {
            Event::CircuitOpened => self.0.store(true, Ordering::Relaxed),
            Event::CircuitClosed { .. } => self.0.store(false, Ordering::Relaxed),
            _ => {}
        }
    }
}

async fn commit(store: &MemoryStore, key: &str) {
    let mut tx = store.begin();
    let message = Message::builder("orders").key(key).payload("p").build().expect("valid");
    store.outbox().add(&mut tx, message).await.expect("an added message");
    tx.commit();
}

fn dispatcher(store: &MemoryStore, broker: &MemoryBroker) -> Dispatcher {
    Dispatcher::builder(store.clone(), broker.clone()).build().expect("valid settings")
}

/// Waits, at most ten minutes, until the handle says so.
async fn until(handle: &DispatcherHandle, what: &str, is_so: impl Fn(Health) -> bool) {
    for _ in 0..6_000 {
        if is_so(handle.status().health) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("not {what}: {:#?}", handle.status());
}

#[tokio::test(start_paused = true)]
async fn it_is_starting_then_idle_then_working_then_stopped() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let dispatcher = dispatcher(&store, &broker);
    let handle = dispatcher.handle();
    assert_eq!(handle.status().health, Health::Starting);
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(dispatcher.run(async { _ = stopped.await }));
    until(&handle, "idle", |health| health == Health::Idle).await;
    assert!(handle.status().health.is_ready());
    broker.set_latency(Duration::from_secs(1));
    commit(&store, "7").await;
    until(&handle, "working", |health| health == Health::Working).await;
    assert_eq!(handle.status().in_flight, 1);
    broker.wait_for(1).await;
    until(&handle, "idle", |health| health == Health::Idle).await;
    assert!(handle.status().last_delivery.is_some());
    _ = stop.send(());
    running.await.unwrap().unwrap();
    assert_eq!(handle.status().health, Health::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_worker_whose_lanes_all_belong_to_others_stands_by_and_takes_over_when_they_go() {
    let (store, broker) = (MemoryStore::with_lanes(1.try_into().unwrap()), MemoryBroker::new());
    let first = tokio::spawn(dispatcher(&store, &broker).run(std::future::pending()));
    tokio::time::sleep(Duration::from_secs(10)).await;
    let second = dispatcher(&store, &broker);
    let handle = second.handle();
    let second = tokio::spawn(second.run(std::future::pending()));
    until(&handle, "standby", |health| health == Health::Standby).await;
    first.abort();
    tokio::time::sleep(Duration::from_secs(46)).await;
    let detail = handle.status().detail;
    assert!(detail.is_none_or(|detail| detail.starts_with("waiting for the lanes of")));
    until(&handle, "idle", |health| health == Health::Idle).await;
    assert_eq!(handle.status().lanes, 1);
    second.abort();
}

#[tokio::test(start_paused = true)]
async fn it_says_for_whose_lanes_it_waits() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let crashed = tokio::spawn(dispatcher(&store, &broker).run(std::future::pending()));
    tokio::time::sleep(Duration::from_secs(10)).await;
    crashed.abort();
    tokio::time::sleep(Duration::from_secs(60)).await;
    let dispatcher = dispatcher(&store, &broker);
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    tokio::time::sleep(Duration::from_secs(20)).await;
    let detail = handle.status().detail.expect("a reason for waiting");
    assert!(detail.starts_with("waiting for the lanes of "), "{detail}");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(handle.status().detail, None);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_the_broker_and_one_of_the_store_are_told_apart() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let faulty = Arc::new(FaultyStore::new(store.clone()));
    let builder = Dispatcher::builder(Arc::clone(&faulty), broker.clone());
    let dispatcher = builder.build().unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    until(&handle, "idle", |health| health == Health::Idle).await;

    let outage = broker.outage();
    commit(&store, "7").await;
    until(&handle, "broker down", |h| matches!(h, Health::BrokerDown { .. })).await;
    assert!(!handle.status().health.is_ready());
    drop(outage);
    until(&handle, "idle", |health| health == Health::Idle).await;

    let outage = faulty.outage();
    until(&handle, "store down", |h| matches!(h, Health::StoreDown { .. })).await;
    drop(outage);
    until(&handle, "idle", |health| health == Health::Idle).await;
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_worker_without_lanes_tells_that_the_broker_is_back() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let (faulty, circuit) = (Arc::new(FaultyStore::new(store.clone())), Circuit::default());
    let builder = Dispatcher::builder(Arc::clone(&faulty), broker.clone());
    let dispatcher = builder.observer(circuit.clone()).build().unwrap();
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    commit(&store, "first").await;
    broker.wait_for(1).await;
    let broker_outage = broker.outage();
    commit(&store, "second").await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(circuit.0.load(Ordering::Relaxed));

    let store_outage = faulty.outage();
    tokio::time::sleep(Duration::from_secs(120)).await;
    drop(broker_outage);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(!circuit.0.load(Ordering::Relaxed));
    let status = handle.status();
    assert_eq!(status.lanes, 0);
    assert!(status.last_delivery > Some(Duration::from_secs(120)), "{status:?}");
    drop(store_outage);
    broker.wait_for(2).await;
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn messages_that_are_not_delivered_for_a_lease_make_it_stuck() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.fail_when(|_| true, PublishErrorKind::Failed);
    let dispatcher = dispatcher(&store, &broker);
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    commit(&store, "7").await;
    until(&handle, "stuck", |health| matches!(health, Health::Stuck { .. })).await;
    broker.heal();
    until(&handle, "idle", |health| health == Health::Idle).await;
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn one_message_for_a_missing_topic_makes_a_quiet_worker_stuck_and_names_the_topic() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.remove_topic("orders");
    let dispatcher = dispatcher(&store, &broker);
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    commit(&store, "7").await;
    until(&handle, "stuck", |health| matches!(health, Health::Stuck { .. })).await;
    assert_eq!(handle.status().closed_topics, ["orders".into()]);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_message_after_a_long_quiet_is_work_and_does_not_make_it_stuck() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let dispatcher = dispatcher(&store, &broker);
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    until(&handle, "idle", |health| health == Health::Idle).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    broker.set_latency(Duration::from_secs(1));
    commit(&store, "7").await;
    until(&handle, "at work", |health| health != Health::Idle).await;
    assert_eq!(handle.status().health, Health::Working);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn one_message_that_is_refused_after_doubt_is_no_outage_of_the_broker() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let dispatcher = dispatcher(&store, &broker);
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    until(&handle, "idle", |health| health == Health::Idle).await;
    broker.fail_next(1, PublishErrorKind::Unknown);
    broker.fail_next(1_000, PublishErrorKind::Failed);
    commit(&store, "7").await;
    until(&handle, "broker down", |health| matches!(health, Health::BrokerDown { .. })).await;
    until(&handle, "well", |health| !matches!(health, Health::BrokerDown { .. })).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!matches!(handle.status().health, Health::BrokerDown { .. }));
    running.abort();
}

/// What observers were told last.
#[derive(Clone, Default)]
struct Sampled(Arc<Mutex<Option<(usize, usize, usize)>>>);

impl Observer for Sampled {
    fn observe(&self, event: &Event) {
        if let Event::Sampled { in_flight, content_bytes, lanes } = event {
            *self.0.lock().expect("no panic") = Some((*in_flight, *content_bytes, *lanes));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_that_has_ended_or_was_dropped_has_stopped_and_holds_nothing() {
    for is_dropped in [false, true] {
        let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
        broker.set_latency(Duration::from_secs(20));
        let sampled = Sampled::default();
        let builder = Dispatcher::builder(store.clone(), broker).observer(sampled.clone());
        let dispatcher = builder.drain_limit(Duration::from_secs(1)).build().unwrap();
        let handle = dispatcher.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(dispatcher.run(async { _ = stopped.await }));
        commit(&store, "7").await;
        until(&handle, "working", |health| health == Health::Working).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(
            sampled.0.lock().unwrap().is_some_and(|(offered, _, lanes)| offered == 1 && lanes > 0)
        );
        if is_dropped {
            running.abort();
            assert!(running.await.unwrap_err().is_cancelled());
        } else {
            _ = stop.send(());
            running.await.unwrap().unwrap();
        }
        let status = handle.status();
        assert_eq!(status.health, Health::Stopped);
        assert_eq!((status.lanes, status.in_flight, status.known, status.backlog), (0, 0, 0, None));
        assert_eq!(*sampled.0.lock().unwrap(), Some((0, 0, 0)), "dropped: {is_dropped}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_open_is_down_for_as_long_and_told_to_observers() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let faulty = Arc::new(FaultyStore::new(store));
    let not_opened = NotOpened::default();
    let builder = Dispatcher::builder(Arc::clone(&faulty), broker);
    let dispatcher = builder.observer(not_opened.clone()).build().unwrap();
    let handle = dispatcher.handle();
    let outage = faulty.outage();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    let for_a_minute = |health| match health {
        Health::StoreDown { since } => since >= Duration::from_secs(60),
        _ => false,
    };
    until(&handle, "down for a minute", for_a_minute).await;
    assert!(not_opened.0.load(Ordering::Relaxed) > 5);
    drop(outage);
    until(&handle, "idle", |health| health == Health::Idle).await;
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn held_keys_and_closed_topics_are_named() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.fail_when(|d| d.message.key() == Some(b"bad"), PublishErrorKind::Rejected);
    let dispatcher = dispatcher(&store, &broker);
    let handle = dispatcher.handle();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    commit(&store, "bad").await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(handle.status().held_keys, 1);
    broker.remove_topic("orders");
    commit(&store, "good").await;
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(handle.status().closed_topics, ["orders".into()]);
    running.abort();
}
