//! The quickstart, on a file and on servers.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::database::Engine;
use integration_tests::kafka::Kafka;
use integration_tests::process::{Process, Signal, was_ended_by};
use integration_tests::servers;
use outbox_sqlite::sqlx::sqlite::SqliteConnectOptions;
use outbox_sqlite::sqlx::{self, ConnectOptions, Connection};
use rdkafka::consumer::{BaseConsumer, Consumer};

use super::{PATIENCE, number, run, succeeds};
use crate::scenario::no_run_alone;

const TOPIC: &str = "outbox.quickstart";
const PARTITIONS: i32 = 3;

/// It checks what arrived itself, and says this only if all is well.
async fn tells_that_all_arrived(quickstart: &Process) -> Result<()> {
    quickstart
        .line_with("every committed message arrived, in the order of its key", PATIENCE)
        .await?;
    succeeds(quickstart).await?;
    let lines = quickstart.lines();
    let arrived = |order: &str| lines.iter().any(|line| line.contains(&format!("{order} (part")));
    ensure!(arrived("order-1") && arrived("order-2"), "{lines:?}");
    ensure!(!arrived("order-3"), "order-3 was rolled back: {lines:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_quickstart_needs_no_server_and_tells_that_all_arrived() -> Result<()> {
    let _turn = no_run_alone().await;
    let folder = tempfile::tempdir()?;
    let quickstart = run("quickstart", folder.path(), &[]).await?;
    quickstart.line_with("found: nothing", PATIENCE).await?;
    tells_that_all_arrived(&quickstart).await?;
    ensure!(count(folder.path(), WAITING).await? == 0, "messages are left in the file");
    Ok(())
}

const WAITING: &str = "SELECT COUNT(*) FROM outbox";
const OWNED: &str = "SELECT COUNT(*) FROM outbox_lane WHERE owner IS NOT NULL";

/// What is counted in the quickstart's file.
async fn count(folder: &Path, sql: &'static str) -> Result<i64> {
    let options = SqliteConnectOptions::new().filename(folder.join("quickstart.db"));
    let mut connection = options.connect().await?;
    let count = sqlx::query_scalar(sql).fetch_one(&mut connection).await?;
    connection.close().await?;
    Ok(count)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quickstart_killed_half_way_loses_nothing_when_it_is_started_again() -> Result<()> {
    const TRIES: usize = 5;
    let _turn = no_run_alone().await;
    let folder = tempfile::tempdir()?;
    let (mut left, mut owned) = (0, 0);
    // A kill that comes when all is delivered shows nothing.
    for _ in 0..TRIES {
        let killed = run("quickstart", folder.path(), &[]).await?;
        killed.line_with("order-1: placed, reserved (Commit)", PATIENCE).await?;
        while !killed.has_ended()?
            && (count(folder.path(), OWNED).await? == 0
                || count(folder.path(), WAITING).await? == 0)
        {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if killed.signal(Signal::SIGKILL).is_err() {
            continue; // It has ended.
        }
        let status = killed.end(PATIENCE).await?;
        ensure!(was_ended_by(status, Signal::SIGKILL), "{status}: {:?}", killed.lines());
        left = count(folder.path(), WAITING).await?;
        owned = count(folder.path(), OWNED).await?;
        if left > 0 && owned > 0 {
            break;
        }
    }
    ensure!(left > 0 && owned > 0, "no kill in {TRIES} left messages and a lane behind");

    let quickstart = run("quickstart", folder.path(), &[]).await?;
    quickstart.line_with(&format!("found: {left} messages that an earlier run"), PATIENCE).await?;
    quickstart.line_with("dispatcher: waiting for the lane of another run", PATIENCE).await?;
    tells_that_all_arrived(&quickstart).await?;
    ensure!(count(folder.path(), WAITING).await? == 0, "messages are left in the file");
    Ok(())
}

/// Makes the topic that the quickstart asks its user to make, unless another test has.
async fn topic(kafka: &Kafka) -> Result<()> {
    let made = crate::kafka::create_topic(kafka, TOPIC, PARTITIONS, -1).await;
    let client = kafka.client();
    let led = tokio::task::spawn_blocking(move || {
        let (consumer, start): (BaseConsumer, _) = (client.create()?, Instant::now());
        while start.elapsed() < PATIENCE {
            let metadata = consumer.fetch_metadata(Some(TOPIC), Duration::from_secs(10))?;
            let partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
            if partitions.filter(|partition| partition.leader() >= 0).count() > 0 {
                return anyhow::Ok(true);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(false)
    });
    if led.await?? { Ok(()) } else { made.context("the topic has no leader") }
}

async fn on_servers(engine: Engine) -> Result<()> {
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let _turn = no_run_alone().await;
    let (url, folder) = (database.create_database().await?, tempfile::tempdir()?);
    topic(kafka).await?;
    let variables = [("DATABASE_URL", url.as_str()), ("KAFKA_BOOTSTRAP", kafka.bootstrap())];
    let quickstart = run("quickstart", folder.path(), &variables).await?;
    tells_that_all_arrived(&quickstart).await?;
    ensure!(number(&url, "SELECT COUNT(*) FROM quickstart_outbox").await? == 0);
    Ok(())
}

mod the_quickstart_runs_on_servers_of_the_users_own {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn mariadb() -> Result<()> {
        on_servers(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn mysql() -> Result<()> {
        on_servers(Engine::MySql).await
    }
}
