//! Adds messages in transactions, publishes them to Kafka, and reads them back.
//!
//! `cargo run --example quickstart` needs Rust and a C toolchain, nothing else: the store is in
//! memory, and librdkafka's own mock cluster answers the real Kafka client. With `DATABASE_URL`
//! and `KAFKA_BOOTSTRAP` set, the same program runs on your MySQL or MariaDB and your Kafka.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use outbox_core::{Dispatcher, Message, MessageId, Outbox, Store, Writer};
use outbox_kafka::KafkaBroker;
use outbox_kafka::rdkafka::config::ClientConfig;
use outbox_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use outbox_kafka::rdkafka::message::{Headers, Message as _};
use outbox_kafka::rdkafka::mocking::MockCluster;
use outbox_kafka::rdkafka::{Offset, TopicPartitionList};
use outbox_mysql::sqlx::{Connection, MySqlConnection};
use outbox_mysql::{MySqlOutbox, MySqlSchema, MySqlStore, MySqlWriter};
use outbox_testing::MemoryStore;

const TOPIC: &str = "outbox.quickstart";
const TIMEOUT: Duration = Duration::from_secs(10);

/// What happens in the shop: each line is one transaction on one order.
const TRANSACTIONS: [(&str, &[&str], End); 7] = [
    ("order-1", &["placed", "reserved"], End::Commit),
    ("order-2", &["placed"], End::Commit),
    ("order-3", &["placed", "reserved"], End::Rollback),
    ("order-1", &["paid"], End::Commit),
    ("order-2", &["paid"], End::Rollback),
    ("order-2", &["cancelled"], End::Commit),
    ("order-1", &["shipped"], End::Commit),
];

#[derive(Clone, Copy, PartialEq)]
enum End {
    Commit,
    Rollback,
}

#[tokio::main]
async fn main() -> Result<()> {
    match (std::env::var("DATABASE_URL"), std::env::var("KAFKA_BOOTSTRAP")) {
        (Ok(database), Ok(kafka)) => on_servers(&database, &kafka).await,
        (Err(_), Err(_)) => in_process().await,
        _ => bail!("set both DATABASE_URL and KAFKA_BOOTSTRAP, or neither"),
    }
}

async fn in_process() -> Result<()> {
    println!("store: in memory; broker: librdkafka's mock cluster, in this process\n");
    let cluster = MockCluster::new(1)?;
    cluster.create_topic(TOPIC, 3, 1)?;
    let store = MemoryStore::new();
    let outbox = store.outbox();

    let mut added = Vec::new();
    for (order, events, end) in TRANSACTIONS {
        let mut tx = store.begin();
        added.extend(change_order(&outbox, &mut tx, order, events, end).await?);
        match end {
            End::Commit => tx.commit(),
            End::Rollback => tx.rollback(),
        }
    }
    publish_and_read_back(store, &cluster.bootstrap_servers(), &added).await
}

async fn on_servers(database: &str, kafka: &str) -> Result<()> {
    println!("store: DATABASE_URL, in tables of its own (quickstart_outbox*); broker: {kafka}\n");
    let schema = MySqlSchema::new().with_prefix("quickstart_")?;
    let mut connection = MySqlConnection::connect(database).await?;
    schema.migrate(&mut connection).await?;
    let outbox: MySqlOutbox = Outbox::new(MySqlWriter::new(&schema));

    let mut added = Vec::new();
    for (order, events, end) in TRANSACTIONS {
        let mut tx = connection.begin().await?;
        added.extend(change_order(&outbox, &mut tx, order, events, end).await?);
        match end {
            End::Commit => tx.commit().await?,
            End::Rollback => tx.rollback().await?,
        }
    }
    connection.close().await?;
    publish_and_read_back(MySqlStore::connect(database, &schema).await?, kafka, &added).await
}

struct Added {
    id: MessageId,
    order: &'static str,
    event: &'static str,
    end: End,
}

/// What an application does: it changes its own tables and adds messages in one transaction.
async fn change_order<W: Writer>(
    outbox: &Outbox<W>,
    tx: &mut W::Transaction,
    order: &'static str,
    events: &[&'static str],
    end: End,
) -> Result<Vec<Added>> {
    // Lock and change the order's row here, through `tx`, before anything is added.
    let mut added = Vec::new();
    for &event in events {
        let message = Message::builder(TOPIC).key(order).payload(event).build()?;
        added.push(Added { id: outbox.add(tx, message).await?, order, event, end });
    }
    Ok(added)
}

/// What a relay does, in `run_until_empty`; a service calls `run(shutdown)` instead.
async fn publish_and_read_back(store: impl Store, kafka: &str, added: &[Added]) -> Result<()> {
    let mut reader = tokio::task::block_in_place(|| Reader::at_the_end(kafka))?;

    // The defaults fit together: a lease of 45 s outlasts the 20 s that a publish may take.
    let broker = KafkaBroker::builder(kafka).build()?;
    let dispatcher = Dispatcher::builder(store, broker).build()?;
    dispatcher.check().await?;
    let started = Instant::now();
    let summary = dispatcher.run_until_empty().await?;
    println!("dispatcher: {} delivered in {:.1?}\n", summary.delivered, started.elapsed());

    let arrived = tokio::task::block_in_place(|| reader.read_new())?;
    report(added, &arrived)
}

fn report(added: &[Added], arrived: &[Arrived]) -> Result<()> {
    println!("arrived, per key in order:");
    let mut by_key = BTreeMap::<_, Vec<_>>::new();
    for message in arrived {
        by_key.entry(&message.key).or_default().push(message);
    }
    for (key, messages) in &by_key {
        let events: Vec<_> = messages.iter().map(|message| message.payload.as_str()).collect();
        println!("  {key} (partition {}): {}", messages[0].partition, events.join(", "));
    }
    println!("rolled back:");
    for message in added.iter().filter(|message| message.end == End::Rollback) {
        let ghost = arrived.iter().any(|other| other.id == message.id.to_string());
        ensure!(!ghost, "{} of {} was rolled back, and arrived", message.event, message.order);
        println!("  {} {}: did not arrive", message.order, message.event);
    }

    // Delivery is at least once: after a fault a message may appear again, under the same id.
    let mut first = Vec::new();
    for message in arrived {
        if !first.contains(&&message.id) {
            first.push(&message.id);
        }
    }
    println!("\nrepeated: {}", arrived.len() - first.len());
    for order in ["order-1", "order-2", "order-3"] {
        let committed = added.iter().filter(|m| m.order == order && m.end == End::Commit);
        let places = committed.map(|m| first.iter().position(|id| **id == m.id.to_string()));
        let places: Option<Vec<_>> = places.collect();
        let places =
            places.with_context(|| format!("a committed message of {order} is missing"))?;
        ensure!(places.is_sorted(), "the messages of {order} are out of order");
    }
    println!("every committed message arrived, in the order of its key");
    Ok(())
}

struct Arrived {
    id: String,
    key: String,
    payload: String,
    partition: i32,
}

/// Reads what is written to the topic after it was made.
struct Reader {
    consumer: BaseConsumer,
    next: BTreeMap<i32, i64>,
}

impl Reader {
    fn at_the_end(kafka: &str) -> Result<Self> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", kafka).set("group.id", "quickstart");
        config.set("enable.auto.commit", "false").set("allow.auto.create.topics", "false");
        let consumer: BaseConsumer = config.create()?;
        let metadata = consumer.fetch_metadata(Some(TOPIC), TIMEOUT)?;
        let topic = metadata.topics().iter().find(|topic| topic.name() == TOPIC);
        let partitions = topic.map(|topic| topic.partitions()).unwrap_or_default();
        ensure!(
            !partitions.is_empty(),
            "create the topic first: kafka-topics.sh --bootstrap-server {kafka} --create \
             --topic {TOPIC} --partitions 3"
        );
        let (mut next, mut assignment) = (BTreeMap::new(), TopicPartitionList::new());
        for partition in partitions.iter().map(|partition| partition.id()) {
            let (_, end) = consumer.fetch_watermarks(TOPIC, partition, TIMEOUT)?;
            assignment.add_partition_offset(TOPIC, partition, Offset::Offset(end))?;
            next.insert(partition, end);
        }
        consumer.assign(&assignment)?;
        Ok(Self { consumer, next })
    }

    /// Reads up to where each partition ends now.
    fn read_new(&mut self) -> Result<Vec<Arrived>> {
        let mut ends = BTreeMap::new();
        for &partition in self.next.keys() {
            ends.insert(partition, self.consumer.fetch_watermarks(TOPIC, partition, TIMEOUT)?.1);
        }
        let mut arrived = Vec::new();
        while self.next.iter().any(|(partition, next)| *next < ends[partition]) {
            let record = self.consumer.poll(TIMEOUT).context("nothing more to read")??;
            self.next.insert(record.partition(), record.offset() + 1);
            let id = record.headers().and_then(|headers| {
                headers.iter().find(|header| header.key == "outbox-id").and_then(|id| id.value)
            });
            let text = |bytes: Option<&[u8]>| {
                String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
            };
            arrived.push(Arrived {
                id: text(id),
                key: text(record.key()),
                payload: text(record.payload()),
                partition: record.partition(),
            });
        }
        Ok(arrived)
    }
}
