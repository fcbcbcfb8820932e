//! A worker whose process is stopped, as by a long pause of its machine.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::{database::Engine, process::Signal, servers};
use outbox_mysql::sqlx::{self, AssertSqlSafe};

use crate::scenario::{LEASE, Load, PATIENCE, Relay, World, Writers};

/// Messages a second.
const LOAD: usize = 300;

/// How the lanes of a worker stand, in microseconds of the database's clock.
struct Standing {
    lanes: i64,
    last_keep: Option<i64>,
    now: i64,
}

async fn standing(world: &World<'_>, worker: &[u8]) -> Result<Standing> {
    let micros = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', ";
    let sql = format!(
        "SELECT COUNT(*), CAST(MAX({micros} expires_at) - ttl) AS SIGNED), \
         {micros} UTC_TIMESTAMP(6)) FROM outbox_lane WHERE owner = ?"
    );
    let (lanes, last_keep, now) = sqlx::query_as(AssertSqlSafe(sql))
        .bind(worker)
        .fetch_one(&mut world.connect().await?)
        .await?;
    Ok(Standing { lanes, last_keep, now })
}

/// Connections that did nothing for two seconds and have a transaction open: whatever it locked,
/// others wait for.
async fn idle_transactions(world: &World<'_>) -> Result<i64> {
    let sql = "SELECT COUNT(*) FROM information_schema.innodb_trx t \
               JOIN information_schema.processlist p ON p.id = t.trx_mysql_thread_id \
               WHERE p.db = DATABASE() AND p.command = 'Sleep' AND p.time >= 2";
    let start = Instant::now();
    loop {
        match world.number(sql).await {
            // MySQL fails to show statements with bytes that are no text, while one runs.
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            counted => return counted,
        }
    }
}

/// How often a worker is stopped at most. Under a load of other tests a single measurement may be
/// late for reasons of its own; all of them are late only if lanes move late.
const STOPS: usize = 3;

async fn a_worker_is_stopped(engine: Engine) -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    let world = World::new(database, kafka).await?;
    let stopped = Relay::start(&world)?;
    stopped.gains().await?;
    let mut connection = world.connect().await?;
    let worker: Vec<u8> =
        sqlx::query_scalar("SELECT owner FROM outbox_lane WHERE owner IS NOT NULL LIMIT 1")
            .fetch_one(&mut connection)
            .await?;
    let other = Relay::start(&world)?;
    let mut writers = Writers::start(&world, &world.outbox(), &Load::default());
    writers.pace(LOAD);

    let limit = LEASE + Duration::from_secs(2);
    let mut moves = vec![];
    while moves.len() < STOPS && !moves.iter().any(|took| *took < limit) {
        let start = Instant::now();
        while standing(&world, &worker).await?.lanes < 8 || other.lanes() < 8 {
            ensure!(start.elapsed() < PATIENCE, "the lanes are not shared");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        stopped.process.signal(Signal::SIGSTOP)?;
        // Before the server ends its connections, after a lease.
        tokio::time::sleep(LEASE / 2).await;
        let idle = idle_transactions(&world).await?;
        ensure!(idle == 0, "{idle} transactions are held open");
        moves.push(until_moved(&world, &worker).await?);
        // A while longer, so that the other one has published on the lanes.
        tokio::time::sleep(Duration::from_secs(1)).await;
        stopped.process.signal(Signal::SIGCONT)?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let tally = writers.end().await?;
    world.until_empty().await?;
    other.stop().await?;
    stopped.stop().await?;
    let excused = other.excused(0) + stopped.excused(moves.len());
    let report = world.report().await?;
    println!(
        "{engine}, a worker stopped: its lanes moved {moves:.1?} after its last keep; longest \
         transaction of a writer {:.1?}; {report} of at most {excused}",
        tally.longest,
    );
    ensure!(moves.iter().any(|took| *took < limit), "moved {moves:?} after the last keep");
    // What waits for a stopped worker waits until the server ends its connection.
    ensure!(
        tally.longest < LEASE - Duration::from_secs(2),
        "a transaction took {:?}",
        tally.longest
    );
    report.check(excused)
}

/// How long after its last keep a worker had no lanes any more.
async fn until_moved(world: &World<'_>, worker: &[u8]) -> Result<Duration> {
    let start = Instant::now();
    let mut last_keep: Option<i64> = None;
    loop {
        let standing = standing(world, worker).await?;
        if standing.lanes == 0 {
            let took: i64 =
                standing.now - last_keep.context("it had no lanes when it was stopped")?;
            return Ok(Duration::from_micros(took.try_into()?));
        }
        last_keep = last_keep.max(standing.last_keep);
        ensure!(start.elapsed() < PATIENCE, "the lanes stay with a stopped worker");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

mod the_lanes_of_a_stopped_worker_move_after_its_lease_and_nobody_waits_on_it {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        a_worker_is_stopped(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        a_worker_is_stopped(Engine::MySql).await
    }
}
