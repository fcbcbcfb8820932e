//! A polling thread that never comes back must not hold a publish for ever.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use outbox_core::broker::{Broker, Outcomes, Outgoing, PublishErrorKind};
use outbox_core::{Delivery, Lane, Message, Position};
use outbox_kafka::KafkaBroker;
use outbox_kafka::rdkafka::consumer::{BaseConsumer, Consumer as _};
use outbox_kafka::rdkafka::error::KafkaError;
use outbox_kafka::rdkafka::message::Message as _;
use outbox_kafka::rdkafka::mocking::MockCluster;
use outbox_kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// How many polling threads are to be stuck: there are two, for small and for large publishes.
static STUCK: AtomicUsize = AtomicUsize::new(0);
const BOTH: usize = 2;

/// Blocks so many polling threads for ever as `STUCK` says, when they say something.
struct Blocks(Mutex<()>, Condvar);

impl Subscriber for Blocks {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {
        let polling = std::thread::current().name() == Some("outbox-kafka");
        let less = |left: usize| left.checked_sub(1);
        if polling && STUCK.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
            let mut guard = self.0.lock().expect("nobody panics with it");
            loop {
                guard = self.1.wait(guard).expect("nobody panics with it");
            }
        }
    }
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// One test, since there is one subscriber.
#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_polling_thread() {
    tracing::subscriber::set_global_default(Blocks(Mutex::new(()), Condvar::new())).unwrap();
    // A busy machine is late now and then, a defect each time.
    let mut late = Vec::new();
    loop {
        match ends_as_unknown_and_is_replaced().await {
            Duration::ZERO => break,
            by => late.push(by),
        }
        assert!(late.len() < 3, "each time too late, by {late:?}");
    }
    sends_nothing_once_it_was_closed().await;
}

async fn both_are_stuck() {
    let started = Instant::now();
    while STUCK.load(Ordering::SeqCst) > 0 {
        assert!(started.elapsed() < Duration::from_secs(20), "a polling thread says nothing");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// How long after its limit a publish ended, which nothing but that limit can end.
async fn ends_as_unknown_and_is_replaced() -> Duration {
    let cluster = MockCluster::new(1).expect("mock cluster");
    cluster.create_topic("orders", 1, 1).expect("topic");
    let broker = KafkaBroker::builder(cluster.bootstrap_servers())
        .message_timeout(Duration::from_secs(3))
        .build()
        .expect("broker");
    let publish = async || {
        let message = Message::builder("orders").key("k").payload("p").build().expect("valid");
        let delivery = Delivery::new(Position::START, Lane(0), message);
        let not_after = tokio::time::Instant::now() + Duration::from_secs(60);
        let outcomes = Outcomes::new(1, Arc::default());
        broker.publish(vec![Outgoing::new(delivery, not_after)], &outcomes).await;
        outcomes.take().remove(0).1
    };
    let delivered = |outcome| matches!(outcome, outbox_core::broker::Outcome::Delivered(_));
    assert!(delivered(publish().await));

    STUCK.store(BOTH, Ordering::SeqCst);
    cluster.broker_down(1).expect("broker 1");
    both_are_stuck().await;
    let started = Instant::now();
    let outcome = publish().await;
    let late = started.elapsed().saturating_sub(broker.profile().undecided);
    let unknown = PublishErrorKind::Unknown;
    assert!(
        matches!(outcome, outbox_core::broker::Outcome::Failed(kind, _) if kind == unknown),
        "{outcome:?}"
    );

    cluster.broker_up(1).expect("broker 1");
    let started = Instant::now();
    while !delivered(publish().await) {
        assert!(started.elapsed() < Duration::from_secs(10), "the producer is not replaced");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    late
}

async fn sends_nothing_once_it_was_closed() {
    let cluster = MockCluster::new(1).expect("mock cluster");
    cluster.create_topic("orders", 1, 1).expect("topic");
    let builder = KafkaBroker::builder(cluster.bootstrap_servers());
    let broker = builder.message_timeout(Duration::from_secs(30)).build().expect("broker");
    let publish = async |payload: &str| {
        let message = Message::builder("orders").key("k").payload(payload).build().expect("valid");
        let delivery = Delivery::new(Position::START, Lane(0), message);
        let not_after = tokio::time::Instant::now() + Duration::from_secs(60);
        let outcomes = Outcomes::new(1, Arc::default());
        broker.publish(vec![Outgoing::new(delivery, not_after)], &outcomes).await;
    };
    publish("before").await;
    STUCK.store(BOTH, Ordering::SeqCst);
    cluster.broker_down(1).expect("broker 1");
    both_are_stuck().await;
    // Nobody waits for the answer any more.
    let given_up = tokio::time::timeout(Duration::from_millis(100), publish("late")).await;
    assert!(given_up.is_err(), "a broker that is down does not answer");
    broker.close(Duration::ZERO).await;
    cluster.broker_up(1).expect("broker 1");
    tokio::time::sleep(Duration::from_secs(3)).await;

    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", cluster.bootstrap_servers())
        .set("group.id", "test")
        .set("enable.partition.eof", "true")
        .create()
        .expect("consumer");
    let mut assignment = TopicPartitionList::new();
    assignment.add_partition_offset("orders", 0, Offset::Beginning).expect("offset");
    consumer.assign(&assignment).expect("assignment");
    let mut log = Vec::new();
    loop {
        match consumer.poll(Duration::from_secs(10)).expect("the log has an end") {
            Ok(message) => {
                let payload = message.payload().unwrap_or_default();
                log.push(String::from_utf8_lossy(payload).into_owned());
            }
            Err(KafkaError::PartitionEOF(_)) => break,
            Err(_) => {}
        }
    }
    assert_eq!(log, ["before"]);
}
