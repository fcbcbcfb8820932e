//! Messages per second through the broker, beside a bare rdkafka producer in the same run, all
//! against librdkafka's simulated cluster: `cargo run --release --example throughput`.
//!
//! The bare producer runs twice: as it is, and with the header `outbox-id`, which is the price of
//! telling repetitions apart and not of the broker.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outbox_core::broker::{Broker, Outcomes, Outgoing};
use outbox_core::{Delivery, Lane, Message, Position};
use outbox_kafka::KafkaBroker;
use outbox_kafka::rdkafka::message::{Header, OwnedHeaders};
use outbox_kafka::rdkafka::mocking::MockCluster;
use outbox_kafka::rdkafka::producer::{
    BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer,
};
use outbox_kafka::rdkafka::{ClientConfig, ClientContext};

const MESSAGES: usize = 200_000;
const BATCH: usize = 1_000;
const CONCURRENT: usize = 20;
const PAYLOAD: usize = 1_024;
const ROUNDS: usize = 5;

struct Counts(AtomicUsize);

impl ClientContext for Counts {}

impl ProducerContext for Counts {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, _: usize) {
        assert!(result.is_ok());
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let cluster = MockCluster::new(1)?;
    cluster.create_topic("orders", 8, 1)?;
    let messages: Vec<Message> = (0..MESSAGES)
        .map(|n| Message::builder("orders").key(n.to_string()).payload(vec![b'x'; PAYLOAD]).build())
        .collect::<Result<_, _>>()?;
    let broker = KafkaBroker::builder(cluster.bootstrap_servers()).build()?;
    let bare: ThreadedProducer<Counts> = ClientConfig::new()
        .set("bootstrap.servers", cluster.bootstrap_servers())
        .set("enable.idempotence", "true")
        .set("partitioner", "murmur2_random")
        .set("linger.ms", "1")
        .set("queue.buffering.max.messages", "1000000")
        .create_with_context(Counts(AtomicUsize::new(0)))?;
    broker.check().await?;
    let mut ratios = [Vec::new(), Vec::new()];
    // The first round warms up and is not counted.
    for round in 0..=ROUNDS {
        let plain = through_bare_producer(&bare, &messages, false);
        let headed = through_bare_producer(&bare, &messages, true);
        let ours = through_broker(&broker, &messages).await;
        if round > 0 {
            let rate = |seconds: f64| MESSAGES as f64 / seconds;
            let [a, b, c] = [plain, headed, ours].map(rate);
            println!("bare {a:>9.0}/s, bare with outbox-id {b:>9.0}/s, broker {c:>9.0}/s");
            ratios[0].push(plain / ours);
            ratios[1].push(headed / ours);
        }
    }
    let [plain, headed] = ratios.map(|mut ratios| {
        ratios.sort_by(f64::total_cmp);
        ratios[ROUNDS / 2]
    });
    println!("broker to bare, medians: {plain:.2}, with outbox-id {headed:.2}");
    Ok(())
}

fn through_bare_producer(
    producer: &ThreadedProducer<Counts>,
    messages: &[Message],
    with_id: bool,
) -> f64 {
    producer.client().context().0.store(0, Ordering::Relaxed);
    let started = Instant::now();
    for (index, message) in messages.iter().enumerate() {
        // The same window as the broker has.
        while index - producer.client().context().0.load(Ordering::Relaxed) >= BATCH * CONCURRENT {
            std::thread::sleep(Duration::from_micros(50));
        }
        let mut record = BaseRecord::with_opaque_to(message.topic(), index);
        record.key = message.key();
        record.payload = message.payload();
        if with_id {
            let value = message.id().to_string();
            let header = Header { key: "outbox-id", value: Some(&value) };
            record.headers = Some(OwnedHeaders::new_with_capacity(1).insert(header));
        }
        assert!(producer.send(record).is_ok());
    }
    while producer.client().context().0.load(Ordering::Relaxed) < messages.len() {
        std::thread::sleep(Duration::from_micros(50));
    }
    started.elapsed().as_secs_f64()
}

async fn through_broker(broker: &KafkaBroker, messages: &[Message]) -> f64 {
    let not_after = tokio::time::Instant::now() + Duration::from_secs(600);
    let outgoing = |message: &Message| {
        Outgoing::new(Delivery::new(Position::START, Lane(0), message.clone()), not_after)
    };
    let batches: Vec<Vec<Outgoing>> =
        messages.chunks(BATCH).map(|chunk| chunk.iter().map(outgoing).collect()).collect();
    let batches = Mutex::new(batches.into_iter());
    let next = || batches.lock().expect("nobody panicked").next();
    let started = Instant::now();
    let worker = async || {
        while let Some(batch) = next() {
            let count = batch.len();
            let outcomes = Outcomes::new(count, Arc::default());
            broker.publish(batch, &outcomes).await;
            assert!(outcomes.take().len() == count);
        }
    };
    futures_util::future::join_all((0..CONCURRENT).map(|_| worker())).await;
    started.elapsed().as_secs_f64()
}
