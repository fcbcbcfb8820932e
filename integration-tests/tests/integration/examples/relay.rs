//! The relay in a process of its own.

use anyhow::{Result, ensure};
use integration_tests::{names, servers};
use outbox_core::{Message, MessageId};
use outbox_mysql::sqlx::{Connection, MySqlConnection};
use outbox_mysql::{MySqlOutbox, MySqlSchema, MySqlWriter};

use super::http::{Answer, get, get_until};
use super::{address, ends, number, run, stop, until};
use crate::kafka::{published, read_all};
use crate::scenario::no_run_alone;

const MESSAGES: usize = 200;

/// Adds messages in a transaction, as an application does that knows nothing of the relay.
async fn add(url: &str, topic: &str, count: usize) -> Result<Vec<MessageId>> {
    let mut connection = MySqlConnection::connect(url).await?;
    let outbox = MySqlOutbox::new(MySqlWriter::new(&MySqlSchema::new()));
    let message =
        |n: usize| Message::builder(topic).key((n % 7).to_string()).payload(n.to_string()).build();
    let messages = (0..count).map(message).collect::<Result<Vec<_>, _>>()?;
    let mut tx = connection.begin().await?;
    let ids = outbox.add_all(&mut tx, messages).await?;
    tx.commit().await?;
    connection.close().await?;
    Ok(ids)
}

/// The value of a figure, by its name and labels as Prometheus writes them.
fn figure(metrics: &Answer, name: &str) -> Option<f64> {
    let lines = metrics.body.lines();
    let mut values = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    values.next()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_delivers_shows_figures_and_ends_in_order() -> Result<()> {
    let Some(database) = servers::mysql().await else { return Ok(()) };
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let _turn = no_run_alone().await;
    let (url, folder) = (database.create_database().await?, tempfile::tempdir()?);
    let topic = kafka.create_topic("relayed", 3).await?;
    let mut connection = MySqlConnection::connect(&url).await?;
    MySqlSchema::new().migrate(&mut connection).await?;
    connection.close().await?;

    let variables = [
        ("DATABASE_URL", url.as_str()),
        ("KAFKA_BOOTSTRAP", kafka.bootstrap()),
        ("OUTBOX_HTTP", "127.0.0.1:0"),
        ("OUTBOX_TOPICS", &topic),
    ];
    let relay = run("relay", folder.path(), &variables).await?;
    let at = address(&relay).await?;
    let mut added = add(&url, &topic, MESSAGES).await?;
    until(&url, "SELECT COUNT(*) FROM outbox", 0).await?;
    let health = get_until(&at, "/health", |answer| answer.code == 200).await?;
    ensure!(health.json()?["lanes"] == 16, "{health:?}");
    let metrics = get(&at, "/metrics").await?;
    let delivered = format!("outbox_published_total{{topic=\"{topic}\"}}");
    ensure!(figure(&metrics, &delivered) >= Some(MESSAGES as f64), "{metrics:?}");
    ensure!(metrics.body.contains("outbox_delivery_latency_seconds_bucket"), "{metrics:?}");

    // What cannot be delivered grows old, and that is to be seen.
    const AGE: &str = "outbox_oldest_pending_age_seconds";
    get_until(&at, "/metrics", |metrics| figure(metrics, AGE) == Some(0.0)).await?;
    add(&url, &names::unique("missing"), 1).await?;
    get_until(&at, "/metrics", |metrics| figure(metrics, AGE) > Some(1.0)).await?;

    stop(&relay).await?;
    let given_back = number(&url, "SELECT COUNT(*) FROM outbox_lane WHERE owner IS NULL").await?;
    ensure!(given_back == 16, "{given_back} lanes were given back: {:?}", relay.lines());

    let records = read_all(kafka.client(), &topic, |record| published(record)).await?;
    let mut arrived: Vec<_> = records.iter().map(|record| record.message_id).collect();
    arrived.sort();
    arrived.dedup();
    added.sort();
    ensure!(arrived == added, "{} of {} arrived", arrived.len(), added.len());
    Ok(())
}

#[tokio::test]
async fn a_relay_that_is_told_too_little_ends_and_names_every_variable() -> Result<()> {
    let ended = ends("relay", &[], &[("OUTBOX_LEASE_SECONDS", "soon")]).await?;
    ensure!(ended.code == Some(2), "{ended:?}");
    for line in [
        "relay: DATABASE_URL is not set",
        "relay: KAFKA_BOOTSTRAP is not set",
        "relay: OUTBOX_LEASE_SECONDS is not a number of seconds",
    ] {
        ensure!(ended.errors.contains(line), "{line} is not in {ended:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_relay_without_tables_ends_and_says_so() -> Result<()> {
    let Some(database) = servers::mysql().await else { return Ok(()) };
    let url = database.create_database().await?;
    let variables = [
        ("DATABASE_URL", url.as_str()),
        // Nobody needs to answer: the tables are looked at first.
        ("KAFKA_BOOTSTRAP", "127.0.0.1:1"),
        ("OUTBOX_HTTP", "127.0.0.1:0"),
        ("RUST_LOG", "off"),
    ];
    let ended = ends("relay", &[], &variables).await?;
    let said = ended.errors.starts_with("relay: the store cannot be used");
    ensure!(ended.code == Some(1) && said, "{ended:?}");
    Ok(())
}
