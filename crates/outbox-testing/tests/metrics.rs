//! The figures that a dispatcher exports while it works.

use std::collections::BTreeMap;
use std::time::Duration;

use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use outbox_core::broker::PublishErrorKind;
use outbox_core::metrics::MetricsObserver;
use outbox_core::retry::{OnDeath, TopicPolicy};
use outbox_core::{Dispatcher, Message};
use outbox_testing::{FaultyStore, MemoryBroker, MemoryStore};

async fn commit(store: &MemoryStore, topic: &str, key: &str) {
    let mut tx = store.begin();
    let message = Message::builder(topic).key(key).payload("p").build().expect("valid");
    store.outbox().add(&mut tx, message).await.expect("an added message");
    tx.commit();
}

#[derive(Default)]
struct Figures(BTreeMap<String, f64>);

impl Figures {
    /// Reads what was exported: gauges as they are, counters and the sizes of histograms added up.
    fn read(&mut self, snapshotter: &Snapshotter) {
        for (key, _, _, value) in snapshotter.snapshot().into_vec() {
            let labels = key.key().labels().map(|l| format!("{}={}", l.key(), l.value()));
            let name = [key.key().name().to_owned()].into_iter().chain(labels);
            let entry = self.0.entry(name.collect::<Vec<_>>().join(" ")).or_default();
            match value {
                DebugValue::Gauge(value) => *entry = value.into_inner(),
                DebugValue::Counter(count) => *entry += count as f64,
                DebugValue::Histogram(values) => *entry += values.len() as f64,
            }
        }
    }

    #[track_caller]
    fn assert(&self, name: &str, is_so: impl Fn(f64) -> bool) {
        let value = self.0.get(name).copied();
        assert!(value.is_some_and(is_so), "{name}: {value:?} in {:#?}", self.0);
    }
}

#[tokio::test(start_paused = true)]
async fn every_metric_is_exported_by_a_dispatcher_at_work() {
    let recorder = DebuggingRecorder::new();
    let (snapshotter, mut figures) = (recorder.snapshotter(), Figures::default());
    let _guard = metrics::set_default_local_recorder(&recorder);

    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let faulty = std::sync::Arc::new(FaultyStore::new(store.clone()));
    broker.fail_when(|d| d.message.key() == Some(b"bad"), PublishErrorKind::Rejected);
    let skip = TopicPolicy::new().on_death(OnDeath::Skip);
    let dispatcher = Dispatcher::builder(std::sync::Arc::clone(&faulty), broker.clone())
        .topic("skipped", skip)
        .observer(MetricsObserver::new(["orders"]))
        .build()
        .unwrap();
    let running = tokio::spawn(dispatcher.run(std::future::pending()));

    commit(&store, "orders", "good").await;
    commit(&store, "orders", "bad").await;
    commit(&store, "skipped", "bad").await;
    commit(&store, "unnamed", "good").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    figures.read(&snapshotter);
    figures.assert("outbox_held_messages", |n| n == 1.0);
    figures.assert("outbox_dead_messages", |n| n == 1.0);
    figures.assert("outbox_published_total topic=orders", |n| n == 1.0);
    figures.assert("outbox_published_total topic=other", |n| n == 1.0);
    figures.assert("outbox_publish_failures_total topic=orders kind=rejected", |n| n >= 1.0);
    figures.assert("outbox_delivery_latency_seconds topic=orders", |n| n == 1.0);
    for step in ["claim", "publish", "settle"] {
        figures.assert(&format!("outbox_{step}_seconds"), |n| n >= 1.0);
    }
    figures.assert("outbox_lanes", |n| n == 16.0);
    figures.assert("outbox_in_flight", |n| n == 0.0);

    let outage = broker.outage();
    commit(&store, "orders", "good").await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    figures.read(&snapshotter);
    figures.assert("outbox_circuit_open", |n| n == 1.0);
    figures.assert("outbox_pending", |n| n == 2.0);
    // The held one is left out.
    figures.assert("outbox_oldest_pending_age_seconds", |n| n > 30.0 && n < 61.0);

    drop(outage);
    broker.wait_for(3).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    figures.read(&snapshotter);
    figures.assert("outbox_circuit_open", |n| n == 0.0);
    figures.assert("outbox_oldest_pending_age_seconds", |n| n == 0.0);

    let outage = faulty.outage();
    tokio::time::sleep(Duration::from_secs(120)).await;
    figures.read(&snapshotter);
    figures.assert("outbox_leases_lost_total", |n| n == 16.0);
    figures.assert("outbox_store_failures_total step=keep kind=unavailable", |n| n >= 1.0);
    // What a worker without lanes last counted is no news.
    figures.assert("outbox_oldest_pending_age_seconds", f64::is_nan);
    drop(outage);
    tokio::time::sleep(Duration::from_secs(60)).await;
    figures.read(&snapshotter);
    figures.assert("outbox_oldest_pending_age_seconds", |n| n == 0.0);
    running.abort();
}
