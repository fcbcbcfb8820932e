//! Adds messages in transactions, publishes them to Kafka, and reads them back.
//!
//! `cargo run --example quickstart` needs Rust and a C toolchain, nothing else: the store is a
//! SQLite file in the current folder, `quickstart.db`, and librdkafka's own mock cluster answers
//! the real Kafka client. Kill it half-way and start it again: it finds what was committed and not
//! delivered, waits until the lease of the killed run is over, and delivers it. With `DATABASE_URL`
//! and `KAFKA_BOOTSTRAP` set, the same program runs on your MySQL or MariaDB and your Kafka.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use outbox_core::observe::{Event, Observer};
use outbox_core::status::Health;
use outbox_core::{
    Dispatcher, DispatcherHandle, Message, MessageId, Outbox, RunError, Store, Summary, Wake,
    Writer,
};
use outbox_kafka::KafkaBroker;
use outbox_kafka::rdkafka::config::ClientConfig;
use outbox_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use outbox_kafka::rdkafka::message::{Headers, Message as _};
use outbox_kafka::rdkafka::mocking::MockCluster;
use outbox_kafka::rdkafka::{Offset, TopicPartitionList};
use outbox_mysql::sqlx::{ConnectOptions, Connection, MySqlConnection};
use outbox_mysql::{MySqlSchema, MySqlStore, MySqlWriter};
use outbox_sqlite::sqlx::sqlite::SqliteConnectOptions;
use outbox_sqlite::{SqliteSchema, SqliteStore, SqliteWriter};
use tokio::sync::oneshot;
use tokio::time::sleep;

const FILE: &str = "quickstart.db";
const TOPIC: &str = "outbox.quickstart";
const TIMEOUT: Duration = Duration::from_secs(10);

/// Short, so that you need not wait long after a kill; the defaults are 45 s and 15 s. A lease must
/// outlast what a publish may take, which `build()` checks.
const LEASE: Duration = Duration::from_secs(8);
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(3);

/// Between two transactions, so that there is a half-way at which to kill this program.
const PAUSE: Duration = Duration::from_millis(500);

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

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Commit,
    Rollback,
}

#[tokio::main]
async fn main() -> Result<()> {
    match (std::env::var("DATABASE_URL"), std::env::var("KAFKA_BOOTSTRAP")) {
        (Ok(database), Ok(kafka)) => on_servers(&database, &kafka).await,
        (Err(_), Err(_)) => on_a_file().await,
        _ => bail!("set both DATABASE_URL and KAFKA_BOOTSTRAP, or neither"),
    }
}

async fn on_a_file() -> Result<()> {
    println!("store: {FILE}; broker: librdkafka's mock cluster, in this process");
    let cluster = MockCluster::new(1)?;
    cluster.create_topic(TOPIC, 3, 1)?;
    let options = SqliteConnectOptions::new().filename(FILE).create_if_missing(true);
    let mut connection = options.connect().await?;
    let schema = SqliteSchema::new();
    schema.migrate(&mut connection).await?;
    let writer = SqliteWriter::new(&schema);
    let mut messages = found(writer.pending(&mut connection).await?);

    let store = SqliteStore::from_options(options, &schema);
    let mut relay = Relay::start(store, &cluster.bootstrap_servers())?;
    // Slow enough that something is under way whenever you kill this program.
    cluster.broker_round_trip_time(1, PAUSE)?;
    let outbox = Outbox::new(writer).with_wake(relay.wake.clone());
    for (order, events, end) in TRANSACTIONS {
        // SQLite has one writer at a time: say from the beginning that this is one.
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        messages.extend(change_order(&outbox, &mut tx, order, events, end).await?);
        match end {
            End::Commit => tx.commit().await?,
            End::Rollback => tx.rollback().await?,
        }
        outbox.wake();
        sleep(PAUSE).await;
        relay.say();
    }
    relay.finish(&messages).await
}

async fn on_servers(database: &str, kafka: &str) -> Result<()> {
    println!("store: DATABASE_URL, in tables of its own (quickstart_outbox*); broker: {kafka}");
    let mut connection = MySqlConnection::connect(database).await?;
    let schema = MySqlSchema::new().with_prefix("quickstart_")?;
    schema.migrate(&mut connection).await?;
    let writer = MySqlWriter::new(&schema);
    let mut messages = found(writer.pending(&mut connection).await?);

    let mut relay = Relay::start(MySqlStore::connect(database, &schema).await?, kafka)?;
    let outbox = Outbox::new(writer).with_wake(relay.wake.clone());
    for (order, events, end) in TRANSACTIONS {
        let mut tx = connection.begin().await?;
        messages.extend(change_order(&outbox, &mut tx, order, events, end).await?);
        match end {
            End::Commit => tx.commit().await?,
            End::Rollback => tx.rollback().await?,
        }
        outbox.wake();
        sleep(PAUSE).await;
        relay.say();
    }
    connection.close().await?;
    relay.finish(&messages).await
}

struct Added {
    id: MessageId,
    order: String,
    event: String,
    end: End,
}

/// What an earlier run committed and did not deliver, oldest first.
fn found(pending: Vec<Message>) -> Vec<Added> {
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into();
    let found: Vec<_> = pending
        .iter()
        .map(|m| Added {
            id: m.id(),
            order: text(m.key()),
            event: text(m.payload()),
            end: End::Commit,
        })
        .collect();
    match found.len() {
        0 => println!("found: nothing; the outbox is empty\n"),
        n => println!("found: {n} messages that an earlier run committed and did not deliver\n"),
    }
    found
}

/// What an application does: it changes its own tables and adds messages in one transaction.
async fn change_order<W: Writer>(
    outbox: &Outbox<W>,
    tx: &mut W::Transaction,
    order: &str,
    events: &[&str],
    end: End,
) -> Result<Vec<Added>> {
    // Lock and change the order's row here, through `tx`, before anything is added.
    let mut added = Vec::new();
    for &event in events {
        let message = Message::builder(TOPIC).key(order).payload(event).build()?;
        let id = outbox.add(tx, message).await?;
        added.push(Added { id, order: order.to_owned(), event: event.to_owned(), end });
    }
    println!("{order}: {} ({end:?})", events.join(", "));
    Ok(added)
}

/// A dispatcher that runs beside the application; in a process of its own it would do the same.
struct Relay<S> {
    store: S,
    reader: Reader,
    wake: Wake,
    handle: DispatcherHandle,
    said: Option<String>,
    stop: oneshot::Sender<()>,
    running: tokio::task::JoinHandle<Result<Summary, RunError>>,
}

impl<S: Store + Clone> Relay<S> {
    fn start(store: S, kafka: &str) -> Result<Self> {
        let reader = tokio::task::block_in_place(|| Reader::at_the_end(kafka))?;
        let broker = KafkaBroker::builder(kafka).message_timeout(MESSAGE_TIMEOUT).build()?;
        let wake = Wake::default();
        let dispatcher = Dispatcher::builder(store.clone(), broker)
            .lease(LEASE)
            .wake(wake.clone())
            .observer(Printer)
            .build()?;
        let handle = dispatcher.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(dispatcher.run(async move {
            _ = stopped.await;
        }));
        Ok(Self { store, reader, wake, handle, said: None, stop, running })
    }

    /// Says what the dispatcher waits for: after a kill, the lane of the run that was killed.
    fn say(&mut self) {
        let status = self.handle.status();
        let waits = match status.health {
            Health::Standby => Some(status.detail.unwrap_or_else(|| {
                format!("waiting for the lane of another run, for up to {LEASE:?} if it is dead")
            })),
            Health::BrokerDown { .. } => Some("waiting for the broker's answer".to_owned()),
            _ => None,
        };
        if let Some(waits) = waits.as_ref().filter(|_| waits != self.said) {
            println!("dispatcher: {waits}");
        }
        self.said = waits;
    }

    /// Waits until the outbox is empty, stops the dispatcher, and compares.
    async fn finish(mut self, messages: &[Added]) -> Result<()> {
        let start = Instant::now();
        while self.store.backlog().await?.pending > 0 {
            self.say();
            ensure!(start.elapsed() < 10 * LEASE, "not delivered: {:?}", self.handle.status());
            ensure!(!self.running.is_finished(), "the dispatcher ended");
            sleep(Duration::from_millis(200)).await;
        }
        _ = self.stop.send(());
        let summary = self.running.await??;
        println!("dispatcher: {} delivered\n", summary.delivered);
        let arrived = tokio::task::block_in_place(|| self.reader.read_new())?;
        report(messages, &arrived)
    }
}

struct Printer;

impl Observer for Printer {
    fn observe(&self, event: &Event) {
        if let Event::Published { latency, .. } = event {
            println!("  delivered {latency:.0?} after it was added");
        }
    }
}

fn report(messages: &[Added], arrived: &[Arrived]) -> Result<()> {
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
    for message in messages.iter().filter(|message| message.end == End::Rollback) {
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
        let committed = messages.iter().filter(|m| m.order == order && m.end == End::Commit);
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
