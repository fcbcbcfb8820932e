//! Very many rows behind one held key.
//!
//! `OUTBOX_E2E_BACKLOG` says how many; 20,000 without it.

use std::env;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use integration_tests::{database::Engine, kafka::Kafka, servers};
use outbox_core::Message;
use outbox_mysql::sqlx::Connection;
use rdkafka::Message as _;

use crate::scenario::{Relay, World};

/// Rows of one statement.
const PAGE: usize = 500;
/// How large a row behind the held one is. Kept in memory, they would be many megabytes.
const PAYLOAD: usize = 1_000;
/// What the relay may keep of each row: its id and where it belongs.
const KEPT: u64 = 300;
const SLACK: u64 = 8 << 20;

/// Rows that the relay may hold with their content: few, so that memory tells them from the backlog.
const WINDOW: usize = 1_000;

const PROBES: u32 = 100;
const EVERY: Duration = Duration::from_millis(40);
/// What other tests beside this one may add to a latency.
const NOISE: Duration = Duration::from_millis(20);

fn backlog() -> usize {
    let given = env::var("OUTBOX_E2E_BACKLOG").ok();
    given.map_or(20_000, |text| text.parse().expect("OUTBOX_E2E_BACKLOG is a number"))
}

fn micros_now() -> Result<i64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros().try_into()?)
}

/// Adds messages of two keys in turn, each with the time in it, and waits for all of them.
async fn latency(world: &World<'_>, round: &str) -> Result<Duration> {
    let mut connection = world.connect().await?;
    let outbox = world.outbox();
    let mut ticks = tokio::time::interval(EVERY);
    for probe in 0..PROBES {
        ticks.tick().await;
        let key = format!("{round}-{}", probe % 2);
        let mut tx = connection.begin().await?;
        let message = Message::builder(world.topic.as_str()).key(key);
        outbox.add(&mut tx, message.payload(micros_now()?.to_string()).build()?).await?;
        tx.commit().await?;
    }
    let start = tokio::time::Instant::now();
    loop {
        let mut all = latencies(world.kafka, &world.topic, round).await?;
        if all.len() == PROBES as usize {
            all.sort_unstable();
            return Ok(all[all.len() / 2]);
        }
        ensure!(start.elapsed() < crate::scenario::PATIENCE, "{} of {PROBES} came", all.len());
    }
}

/// From the time in a record to the time at which it was published.
async fn latencies(kafka: &Kafka, topic: &str, round: &str) -> Result<Vec<Duration>> {
    let records = crate::kafka::read_all(kafka.client(), topic, |record| {
        let key = record.key().unwrap_or_default().to_owned();
        (key, record.payload().map(<[u8]>::to_vec), record.timestamp().to_millis())
    })
    .await?;
    let own = records.into_iter().filter(|(key, ..)| key.starts_with(round.as_bytes()));
    own.map(|(_, payload, published)| {
        let added: i64 = String::from_utf8(payload.context("a payload")?)?.parse()?;
        let published = published.context("a timestamp")? * 1_000;
        Ok(Duration::from_micros((published - added).try_into().unwrap_or_default()))
    })
    .collect()
}

async fn many_rows_wait_behind_a_held_key(engine: Engine) -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    let topic = kafka.create_topic_with("held", 3, &[("max.message.bytes", "2000")]).await?;
    let world = World::on_topic(database, kafka, topic).await?;
    let relay = Relay::start_with(&world, WINDOW)?;
    relay.gains().await?;
    latency(&world, "warm").await?;
    let before = (latency(&world, "before").await?, relay.process.resident()?);

    let row =
        |size: usize| Message::builder(world.topic.as_str()).key("held").payload(vec![b'x'; size]);
    world.add(vec![row(5_000).build()?]).await?;
    let mut left = backlog();
    while left > 0 {
        let rows = left.min(PAGE);
        world.add((0..rows).map(|_| row(PAYLOAD).build()).collect::<Result<_, _>>()?).await?;
        left -= rows;
    }
    // The first of these comes once all rows before it have been read.
    latency(&world, "read").await?;
    let after = (latency(&world, "after").await?, relay.process.resident()?);
    let mut later = (latency(&world, "later").await?, relay.process.resident()?);
    // Noise of the machine comes and goes; what the backlog costs stays.
    let limit = before.0 * 2 + NOISE;
    for round in 0..5 {
        if after.0.min(later.0) <= limit {
            break;
        }
        later.0 = latency(&world, &format!("again-{round}")).await?;
    }
    let waiting = world.number("SELECT COUNT(*) FROM outbox").await?;
    let attempts = "SELECT CAST(SUM(attempts) AS SIGNED) FROM outbox";
    let attempts = world.number(attempts).await?;
    relay.stop().await?;

    let megabytes = |(_, bytes): (Duration, u64)| bytes >> 20;
    println!(
        "{engine}, {} rows behind a held key: median latency of two others {:.1?}, then {:.1?} and {:.1?}; \
         memory {} MiB, then {} and {}",
        backlog(),
        before.0,
        after.0,
        later.0,
        megabytes(before),
        megabytes(after),
        megabytes(later),
    );
    ensure!(waiting == 1 + backlog() as i64, "{waiting} rows wait");
    ensure!(attempts == 1, "{attempts} attempts");
    ensure!(after.0.min(later.0) <= limit, "{:?} and {:?} after {:?}", after.0, later.0, before.0);
    let allowed = backlog() as u64 * KEPT + SLACK;
    ensure!(after.1 <= before.1 + allowed, "{} bytes, then {}", before.1, after.1);
    ensure!(later.1 <= after.1 + SLACK, "{} bytes, then {}", after.1, later.1);
    Ok(())
}

mod rows_behind_a_held_key_delay_no_other_key_and_fill_no_memory {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        many_rows_wait_behind_a_held_key(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        many_rows_wait_behind_a_held_key(Engine::MySql).await
    }
}
