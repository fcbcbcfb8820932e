//! The service that takes orders and bills them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::kafka::Kafka;
use integration_tests::process::Process;
use integration_tests::servers;
use outbox_testing::Published;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::{Offset, TopicPartitionList};

use super::http::{get, get_until, post};
use super::{PATIENCE, address, number, run, stop, until};
use crate::kafka::{published, read_all};
use crate::scenario::no_run_alone;

const ORDER: &str = r#"{"customer": "Ada", "cents": 950}"#;
const PARTITIONS: i32 = 3;
const CLIENTS: usize = 4;

/// Every order is billed once, and once more the other way if it was cancelled.
const WRONG: &str = "SELECT COUNT(*) FROM shop_order AS o LEFT JOIN \
      (SELECT order_id, COUNT(*) AS invoices, SUM(cents) AS owed FROM shop_invoice \
       GROUP BY order_id) AS i ON i.order_id = o.id \
    WHERE i.order_id IS NULL OR i.invoices <> 1 + o.cancelled \
      OR i.owed <> IF(o.cancelled, 0, o.cents)";
const ORDERS: &str = "SELECT COUNT(*) FROM shop_order";
const INVOICES: &str = "SELECT COUNT(*) FROM shop_invoice";
const CHANGES: &str = "SELECT COUNT(*) + COUNT(NULLIF(cancelled, 0)) FROM shop_order";

struct Service {
    process: Process,
    address: String,
    _folder: tempfile::TempDir,
}

impl Service {
    async fn start(database: &str, kafka: &str, topic: &str) -> Result<Self> {
        let variables = [
            ("DATABASE_URL", database),
            ("KAFKA_BOOTSTRAP", kafka),
            ("ORDERS_TOPIC", topic),
            ("ORDERS_HTTP", "127.0.0.1:0"),
        ];
        let folder = tempfile::tempdir()?;
        let process = run("orders", folder.path(), &variables).await?;
        let address = address(&process).await?;
        get_until(&address, "/health", |answer| answer.code == 200).await?;
        Ok(Self { process, address, _folder: folder })
    }

    /// Places an order and gives its id.
    async fn place(&self) -> Result<u64> {
        place(&self.address).await
    }
}

async fn place(address: &str) -> Result<u64> {
    let answer = post(address, "/orders", ORDER).await?;
    ensure!(answer.code == 201, "{answer:?}");
    answer.json()?["id"].as_u64().context("an id")
}

/// Lets clients place orders until the service no longer answers, and gives the ids that they were
/// told.
fn clients(address: &str) -> Vec<tokio::task::JoinHandle<Vec<u64>>> {
    let client = |_| {
        let address = address.to_owned();
        tokio::spawn(async move {
            let mut placed = vec![];
            while let Ok(id) = place(&address).await {
                placed.push(id);
            }
            placed
        })
    };
    (0..CLIENTS).map(client).collect()
}

/// Writes every record again, as a producer does that repeats what it was not sure of.
async fn repeat(kafka: &Kafka, topic: &str, records: &[Published]) -> Result<()> {
    let producer: FutureProducer = kafka.client().create()?;
    for record in records {
        let mut headers = OwnedHeaders::new();
        for (key, value) in &record.headers {
            headers = headers.insert(Header { key, value: value.as_ref() });
        }
        let again = FutureRecord::to(topic)
            .key(record.key.as_deref().context("a key")?)
            .payload(record.payload.as_deref().context("a payload")?)
            .headers(headers);
        producer.send(again, PATIENCE).await.map_err(|(error, _)| error)?;
    }
    Ok(())
}

/// Waits until the billing has gone past every record.
async fn until_all_is_read(kafka: &Kafka, topic: &str) -> Result<()> {
    const TIMEOUT: Duration = Duration::from_secs(10);
    let (mut client, topic) = (kafka.client(), topic.to_owned());
    client.set("group.id", format!("{topic}.billing"));
    tokio::task::spawn_blocking(move || {
        let (consumer, start): (BaseConsumer, _) = (client.create()?, Instant::now());
        loop {
            let mut partitions = TopicPartitionList::new();
            partitions.add_partition_range(&topic, 0, PARTITIONS - 1);
            let committed = consumer.committed_offsets(partitions, TIMEOUT)?;
            let mut behind = 0;
            for partition in 0..PARTITIONS {
                let (_, end) = consumer.fetch_watermarks(&topic, partition, TIMEOUT)?;
                let offset = committed.find_partition(&topic, partition).map(|p| p.offset());
                behind += match offset {
                    Some(Offset::Offset(offset)) => end - offset,
                    _ => end,
                };
            }
            if behind == 0 {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "{behind} records are not read");
            std::thread::sleep(Duration::from_millis(200));
        }
    })
    .await?
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_order_is_billed_once_across_a_restart_and_repeated_records() -> Result<()> {
    const BEFORE: i64 = 40;
    let Some(database) = servers::mysql().await else { return Ok(()) };
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let _turn = no_run_alone().await;
    let url = database.create_database().await?;
    let topic = kafka.create_topic("orders", PARTITIONS).await?;

    // Stopped while orders are being placed.
    let service = Service::start(&url, kafka.bootstrap(), &topic).await?;
    let clients = clients(&service.address);
    let start = Instant::now();
    while number(&url, ORDERS).await? < BEFORE {
        ensure!(start.elapsed() < PATIENCE, "no orders are placed");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop(&service.process).await?;
    let mut promised = vec![];
    for client in clients {
        promised.extend(client.await?);
    }

    let service = Service::start(&url, kafka.bootstrap(), &topic).await?;
    for id in &promised {
        let answer = get(&service.address, &format!("/orders/{id}")).await?;
        ensure!(answer.code == 200, "order {id}: {answer:?}");
    }
    for id in promised.iter().step_by(3) {
        let path = format!("/orders/{id}/cancel");
        ensure!(post(&service.address, &path, "").await?.code == 204);
        ensure!(post(&service.address, &path, "").await?.code == 409, "cancelled twice");
    }
    service.place().await?;
    until(&url, INVOICES, number(&url, CHANGES).await?).await?;

    let records = read_all(kafka.client(), &topic, |record| published(record)).await?;
    repeat(kafka, &topic, &records).await?;
    until_all_is_read(kafka, &topic).await?;
    stop(&service.process).await?;

    ensure!(number(&url, WRONG).await? == 0, "orders are not billed, or more than once");
    ensure!(number(&url, INVOICES).await? == number(&url, CHANGES).await?);
    ensure!(number(&url, "SELECT COUNT(*) FROM shop_outbox").await? == 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_are_taken_while_kafka_is_down_and_billed_when_it_is_back() -> Result<()> {
    let Some(database) = servers::mariadb().await else { return Ok(()) };
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let _turn = no_run_alone().await;
    let url = database.create_database().await?;
    let topic = kafka.create_topic("orders", PARTITIONS).await?;

    let service = Service::start(&url, "127.0.0.1:1", &topic).await?;
    service.place().await?;
    let told = |answer: &super::http::Answer| answer.body.contains("broker down");
    let health = get_until(&service.address, "/health", told).await?;
    ensure!(health.code == 200 && health.json()?["delivers"] == false, "{health:?}");
    service.place().await?;
    stop(&service.process).await?;
    ensure!(number(&url, "SELECT COUNT(*) FROM shop_outbox").await? == 2);

    let service = Service::start(&url, kafka.bootstrap(), &topic).await?;
    until(&url, INVOICES, 2).await?;
    ensure!(number(&url, WRONG).await? == 0);
    stop(&service.process).await
}
