//! A writer that commits an early id late.
//!
//! `OUTBOX_LATE_REPETITIONS` says how many keys are tried side by side; 20 without it.

use std::env;

use anyhow::ensure;
use outbox_core::MessageId;
use outbox_mysql::sqlx::Row;
use tokio::task::JoinSet;

use super::traffic::{Relays, Writers};
use super::*;

/// How long the early id stays uncommitted: longer than the grace, in which ids never seen are
/// swept anyway.
const HELD: Duration = Duration::from_secs(11);

/// So many at once, each with two connections.
const SIDE_BY_SIDE: usize = 100;

fn repetitions() -> usize {
    let given = env::var("OUTBOX_LATE_REPETITIONS").ok();
    given.map_or(20, |text| text.parse().expect("OUTBOX_LATE_REPETITIONS is a number"))
}

/// Keys commit one after the other, so that none waits for a processor that another has.
const BETWEEN: Duration = Duration::from_millis(20);

/// The database's clock in microseconds, at that very statement.
const CLOCK: &str = "SELECT CAST(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', SYSDATE(6)) AS SIGNED)";

/// One key: the early id, and the one that is added as soon as the lock is free. Answers how long
/// after the first commit the second one came, by the database's clock.
///
/// The second writer sends all that it does as one packet, so that the server goes on with it as
/// soon as it has the lock; answers and requests would take longer than the commit.
async fn race(
    url: String,
    outbox: MySqlOutbox,
    key: String,
    early_for: Duration,
) -> Result<Duration> {
    let lock = format!("SELECT version FROM late WHERE id = '{key}' FOR UPDATE");
    let mut first = MySqlConnection::connect(&url).await?;
    let mut second = MySqlConnection::connect(&url).await?;
    run(&mut first, format!("BEGIN; {lock}")).await?;
    outbox.add(&mut first, Message::builder("late").key(&*key).payload("1").build()?).await?;
    let id = MessageId::generate().to_string().replace('-', "");
    let packet = format!(
        "BEGIN; {lock}; INSERT INTO outbox (message_id, topic, message_key, payload) \
         VALUES (x'{id}', 'late', '{key}', '2'); COMMIT; {CLOCK}"
    );
    let late = tokio::spawn(async move { clock(&mut second, packet).await });
    tokio::time::sleep(early_for).await;
    let committed = clock(&mut first, format!("COMMIT; {CLOCK}")).await?;
    let after = late.await?? - committed;
    // Either clock may be read after the other's commit.
    Ok(Duration::from_micros(after.max(0).try_into()?))
}

/// Runs a packet that ends with the clock.
async fn clock(connection: &mut MySqlConnection, packet: String) -> Result<i64> {
    let rows = sqlx::raw_sql(AssertSqlSafe(packet)).fetch_all(connection).await?;
    Ok(rows.last().context("the clock")?.try_get(0)?)
}

on_both! {
    async fn an_early_id_that_commits_late_appears_before_its_successor(lab: Lab) -> Result<()> {
        let repetitions = repetitions();
        let mut connection = lab.connect().await?;
        let rows: Vec<_> = (0..repetitions).map(|n| format!("('{n}', 0)")).collect();
        run(&mut connection, format!(
            "CREATE TABLE late (id VARCHAR(20) PRIMARY KEY, version INT NOT NULL); \
             INSERT INTO late VALUES {}", rows.join(", ")
        )).await?;
        let relays = Relays::start(&lab, 2)?;
        // Thousands of other ids pass meanwhile.
        let writers = Writers::start(&lab, 4).await?;
        let mut gaps = Vec::new();
        for keys in (0..repetitions).collect::<Vec<_>>().chunks(SIDE_BY_SIDE) {
            let mut races = JoinSet::new();
            for key in keys {
                let early_for = HELD + BETWEEN * u32::try_from(key % SIDE_BY_SIDE)?;
                races.spawn(race(lab.url.clone(), lab.outbox.clone(), key.to_string(), early_for));
            }
            for gap in races.join_all().await {
                gaps.push(gap?);
            }
        }
        let written = writers.stop().await?;
        super::traffic::until_empty(&lab).await?;
        let late = relays.broker.published_to("late");
        for key in 0..repetitions {
            let key = key.to_string();
            let of_key = late.iter().filter(|record| record.key.as_deref() == Some(key.as_bytes()));
            let all: Vec<_> = of_key.map(|record| record.payload.as_deref()).collect();
            // First appearances: repetitions are allowed, inversions are not.
            let in_order = all.first() == Some(&Some(b"1")) && all.contains(&Some(b"2"));
            ensure!(in_order, "key {key}: {all:?}");
        }
        gaps.sort_unstable();
        let others = written.messages.len();
        let at = |share: usize| gaps[(gaps.len() - 1) * share / 100];
        let soon = gaps.iter().filter(|gap| **gap <= Duration::from_millis(1)).count();
        println!(
            "{}: {repetitions} keys, 0 inversions; the second commit came {:?} (median; 90 %: {:?}, \
             all: {:?}) after the first, {soon} times within 1 ms; {others} other messages passed",
            lab.engine, at(50), at(90), at(100),
        );
        ensure!(others > 1_000, "only {others} other ids passed");
        relays.stop().await?;
        Ok(())
    }
}
