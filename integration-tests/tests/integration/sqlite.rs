//! Writers and relay on one SQLite file, each a process, killed together at random moments. This
//! process holds the broker, librdkafka's mock cluster, and reads what arrived.

use std::collections::HashMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::process::{Process, Signal, was_ended_by};
use outbox_core::MessageId;
use outbox_sqlite::SqliteSchema;
use outbox_sqlite::sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use outbox_sqlite::sqlx::{self, ConnectOptions, Connection};
use rand::Rng;
use rdkafka::ClientConfig;
use rdkafka::mocking::MockCluster;

use crate::kafka::{published, read_all};
use crate::scenario::history::{Appearance, Entry, Report, judge};

const TOPIC: &str = "shop";
const KILLS: usize = 10;
/// The bound of duplicates per kill.
const ROWS_IN_FLIGHT: usize = 100;
/// A killed relay's lane waits for its lease of 6 s.
const PATIENCE: Duration = Duration::from_secs(60);

struct Shop<'a> {
    database: &'a Path,
    kafka: String,
}

impl Shop<'_> {
    fn run(&self, role: &str) -> Result<Process> {
        let rows = ROWS_IN_FLIGHT.to_string();
        let database = self.database.to_str().context("the folder's name is text")?;
        let variables = [
            ("DATABASE", database),
            ("TOPIC", TOPIC),
            ("KAFKA_BOOTSTRAP", &self.kafka),
            ("RELAY_ROWS_IN_FLIGHT", &rows),
        ];
        Process::spawn(env!("CARGO_BIN_EXE_sqlite_shop"), [role], variables)
    }
}

async fn count(connection: &mut SqliteConnection, sql: &'static str) -> Result<i64> {
    Ok(sqlx::query_scalar(sql).fetch_one(connection).await?)
}

async fn was_killed(process: &Process) -> Result<()> {
    let status = process.end(PATIENCE).await?;
    ensure!(was_ended_by(status, Signal::SIGKILL), "{status}: {:?}", process.lines());
    Ok(())
}

/// What the writers' own table says was committed.
async fn committed(connection: &mut SqliteConnection) -> Result<HashMap<MessageId, Entry>> {
    let rows: Vec<(Vec<u8>, u32, i64)> =
        sqlx::query_as("SELECT message_id, aggregate, sequence FROM history")
            .fetch_all(connection)
            .await?;
    let mut committed = HashMap::new();
    for (id, aggregate, sequence) in rows {
        let id: [u8; 16] = id.try_into().ok().context("16 bytes")?;
        let entry = Entry { aggregate, sequence: u64::try_from(sequence)? };
        committed.insert(MessageId::from_bytes(id), entry);
    }
    Ok(committed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_and_relay_killed_ten_times_lose_nothing_and_keep_the_order_of_keys() -> Result<()>
{
    let folder = tempfile::tempdir()?;
    let database = folder.path().join("shop.db");
    let options = SqliteConnectOptions::new()
        .filename(&database)
        .create_if_missing(true)
        .busy_timeout(PATIENCE);
    let mut connection = options.connect().await?;
    SqliteSchema::new().migrate(&mut connection).await?;
    let tables = "CREATE TABLE aggregate (id INTEGER PRIMARY KEY, version INTEGER NOT NULL);\
                  CREATE TABLE history (message_id BLOB, aggregate INTEGER, sequence INTEGER);\
                  WITH RECURSIVE n (id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n WHERE id < 50)\
                  INSERT INTO aggregate SELECT id, 0 FROM n";
    sqlx::raw_sql(tables).execute(&mut connection).await?;
    let cluster = MockCluster::new(1)?;
    cluster.create_topic(TOPIC, 3, 1)?;
    let shop = Shop { database: &database, kafka: cluster.bootstrap_servers() };

    let start = Instant::now();
    let (mut writer, mut relay) = (shop.run("writer")?, shop.run("relay")?);
    let mut waiting_at_kills = 0;
    for _ in 0..KILLS {
        // Killed while both are at work: the writers from here on, the relay from its lane on.
        writer.line_with("writing", PATIENCE).await?;
        relay.line_with("gained", PATIENCE).await?;
        let moment = Duration::from_millis(rand::rng().random_range(0..600));
        tokio::time::sleep(moment).await;
        for process in [&writer, &relay] {
            process.signal(Signal::SIGKILL)?;
        }
        was_killed(&writer).await?;
        was_killed(&relay).await?;
        waiting_at_kills += count(&mut connection, "SELECT COUNT(*) FROM outbox").await?;
        (writer, relay) = (shop.run("writer")?, shop.run("relay")?);
    }
    relay.line_with("gained", PATIENCE).await?;
    writer.signal(Signal::SIGKILL)?;
    was_killed(&writer).await?;
    let last_start = Instant::now();
    loop {
        let left = count(&mut connection, "SELECT COUNT(*) FROM outbox").await?;
        if left == 0 {
            break;
        }
        let lines = relay.lines();
        ensure!(last_start.elapsed() < PATIENCE, "{left} messages are left: {lines:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    relay.signal(Signal::SIGTERM)?;
    let status = relay.end(PATIENCE).await?;
    ensure!(status.success(), "the relay ended by {status}: {:?}", relay.lines());

    let committed = committed(&mut connection).await?;
    connection.close().await?;
    let mut client = ClientConfig::new();
    client.set("bootstrap.servers", &shop.kafka);
    let records = read_all(client, TOPIC, |record| published(record)).await?;
    let appearances = records.iter().map(Appearance::of).collect::<Result<Vec<_>>>()?;
    let verdict = judge(&committed, &appearances);
    let report = Report { committed: committed.len(), records: records.len(), verdict };
    println!(
        "SQLite, {KILLS} kills in {:?}, {waiting_at_kills} waiting at kills: {report}",
        start.elapsed(),
    );
    ensure!(waiting_at_kills > 0, "nothing was under way when the processes were killed");
    report.check(ROWS_IN_FLIGHT * KILLS)
}
