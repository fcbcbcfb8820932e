//! A subscriber is code of the application, and librdkafka's polling thread calls it.

use std::sync::Arc;
use std::time::Duration;

use outbox_core::broker::{Broker, Outcomes, Outgoing};
use outbox_core::{Delivery, Lane, Message, Position};
use outbox_kafka::KafkaBroker;
use outbox_kafka::rdkafka::mocking::MockCluster;
use outbox_kafka::rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Panics at everything that this crate says on the polling thread.
struct Panics;

impl Subscriber for Panics {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("outbox_kafka")
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {
        if std::thread::current().name() == Some("outbox-kafka") {
            panic!("a subscriber that panics");
        }
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_in_a_callback_hangs_nothing() {
    std::panic::set_hook(Box::new(|_| {}));
    tracing::subscriber::set_global_default(Panics).unwrap();
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("orders", 1, 1).unwrap();
    let broker = KafkaBroker::builder(cluster.bootstrap_servers())
        .message_timeout(Duration::from_secs(60))
        .property("debug", "msg")
        .build()
        .unwrap();
    let publish = async |expect_delivered| {
        let message = Message::builder("orders").key("k").payload("p").build().unwrap();
        let delivery = Delivery::new(Position::START, Lane(0), message);
        let not_after = tokio::time::Instant::now() + Duration::from_secs(60);
        let outcomes = Outcomes::new(1, Arc::default());
        let started = std::time::Instant::now();
        broker.publish(vec![Outgoing::new(delivery, not_after)], &outcomes).await;
        assert!(started.elapsed() < Duration::from_secs(30), "the publish hung");
        assert_eq!(outcomes.unanswered(), 0, "the panic took the answer with it");
        let text = format!("{:?}", outcomes.take());
        assert_eq!(text.contains("Delivered"), expect_delivered, "{text}");
    };
    // Log lines panic all the time; answers arrive all the same.
    publish(true).await;
    // An error without a class is logged in the delivery callback itself.
    let unlisted = RDKafkaRespErr::try_from(93).unwrap();
    cluster.request_errors(RDKafkaApiKey::Produce, &[unlisted]);
    publish(false).await;
    publish(true).await;
}
