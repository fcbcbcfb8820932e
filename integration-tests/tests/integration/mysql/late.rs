//! A writer that commits an early id late.
//!
//! `OUTBOX_LATE_REPETITIONS` says how many keys are tried side by side; 20 without it.

use std::env;
use std::time::Instant;

use anyhow::ensure;
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

/// One key: the early id, and the one that is added as soon as the lock is free. Answers how long
/// after the first commit the second one came.
async fn race(lab_url: String, outbox: MySqlOutbox, key: String) -> Result<Duration> {
    let lock = "SELECT version FROM late WHERE id = ? FOR UPDATE";
    let mut first = MySqlConnection::connect(&lab_url).await?;
    let mut second = MySqlConnection::connect(&lab_url).await?;
    let mut early = first.begin().await?;
    sqlx::query(lock).bind(&key).fetch_one(&mut *early).await?;
    outbox.add(&mut early, Message::builder("late").key(&*key).payload("1").build()?).await?;
    let late = tokio::spawn({
        let (outbox, key) = (outbox.clone(), key.clone());
        async move {
            let mut late = second.begin().await?;
            sqlx::query(lock).bind(&key).fetch_one(&mut *late).await?;
            let message = Message::builder("late").key(&*key).payload("2").build()?;
            outbox.add(&mut late, message).await?;
            late.commit().await?;
            anyhow::Ok(Instant::now())
        }
    });
    tokio::time::sleep(HELD).await;
    early.commit().await?;
    let committed = Instant::now();
    Ok(late.await??.saturating_duration_since(committed))
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
                races.spawn(race(lab.url.clone(), lab.outbox.clone(), key.to_string()));
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
        println!(
            "{}: {repetitions} keys, 0 inversions; the second commit came {:?} (median) after the \
             first; {others} other messages passed",
            lab.engine, gaps[gaps.len() / 2],
        );
        ensure!(others > 1_000, "only {others} other ids passed");
        relays.stop().await?;
        Ok(())
    }
}
