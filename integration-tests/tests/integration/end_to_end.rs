//! From the application's transaction through MySQL or MariaDB, the dispatcher and Kafka: what
//! was committed against what appeared.
//!
//! `OUTBOX_E2E_MESSAGES` says how many messages are written at least; 100,000 without it.

use std::env;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use integration_tests::{database::Engine, servers};
use outbox_core::Wake;
use rand::Rng;

use crate::scenario::{Load, Relay, Verdict, Worker, World, Writers};

const KILLS: usize = 6;
/// Bounds the duplicates of a kill; far below what is written between two of them.
const ROWS_IN_FLIGHT: usize = 500;

fn messages() -> usize {
    let given = env::var("OUTBOX_E2E_MESSAGES").ok();
    given.map_or(100_000, |text| text.parse().expect("OUTBOX_E2E_MESSAGES is a number"))
}

/// `None` when a server was left out.
async fn world(engine: Engine) -> Result<Option<World<'static>>> {
    let Some(database) = servers::database_of(engine).await else { return Ok(None) };
    let Some(kafka) = servers::kafka().await else { return Ok(None) };
    World::alone(database, kafka).await.map(Some)
}

fn load() -> Load {
    Load { messages: 1..=12, ..Load::default() }
}

async fn without_a_fault(engine: Engine) -> Result<()> {
    let Some(world) = world(engine).await? else { return Ok(()) };
    let wake = Wake::default();
    let mut worker = Worker::patient(&world, |builder| builder.wake(wake.clone()))?;

    let start = Instant::now();
    let writers = Writers::start(&world, &world.outbox().with_wake(wake), &load());
    writers.grant(messages());
    let tally = writers.end().await?;
    let wrote = start.elapsed();
    world.until_empty().await.with_context(|| format!("{:?}", worker.handle.status()))?;
    let took = start.elapsed();
    let summary = worker.stop().await?;

    let report = world.report().await?;
    println!(
        "{engine}, no fault: {report}; {} rolled back; written in {wrote:.1?}, empty after \
         {took:.1?}",
        tally.rolled_back,
    );
    ensure!(tally.rolled_back > 0, "nothing was rolled back");
    ensure!(report.verdict == Verdict::default(), "{report}");
    ensure!(summary.delivered == report.committed as u64, "{summary:?}");
    Ok(())
}

async fn with_kills(engine: Engine) -> Result<()> {
    let Some(world) = world(engine).await? else { return Ok(()) };
    let start = Instant::now();
    let survivor = Relay::start_with(&world, ROWS_IN_FLIGHT)?;
    let mut victims = vec![Relay::start_with(&world, ROWS_IN_FLIGHT)?];
    let writers = Writers::start(&world, &world.outbox(), &load());
    let burst = messages() / (KILLS + 1);
    let mut unwritten_at_kills = 0;
    for _ in 0..KILLS {
        // Killed while it has lanes and the writers write: it has rows in flight then.
        let victim = victims.last().context("a victim")?;
        victim.gains().await?;
        writers.grant(burst);
        let moment = rand::rng().random_range(0.1..0.6);
        writers.until_left((burst as f64 * (1.0 - moment)) as usize).await;
        victim.kill().await?;
        unwritten_at_kills += writers.left();
        victims.push(Relay::start_with(&world, ROWS_IN_FLIGHT)?);
    }
    writers.grant(burst);
    let tally = writers.end().await?;
    let wrote = start.elapsed();
    let relays: Vec<_> = victims.iter().chain([&survivor]).collect();
    if let Err(error) = world.until_empty().await {
        let lines: Vec<_> = relays.iter().map(|relay| relay.process.lines()).collect();
        anyhow::bail!("{error:#}; the relays printed {lines:?}");
    }
    let took = start.elapsed();
    for relay in &relays[KILLS..] {
        relay.stop().await?;
    }

    let report = world.report().await?;
    let excused = relays.iter().enumerate().map(|(n, relay)| relay.excused((n < KILLS).into()));
    let excused: usize = excused.sum();
    println!(
        "{engine}, {KILLS} kills: {report} of at most {excused}; {} rolled back; written in \
         {wrote:.1?}, empty after {took:.1?}",
        tally.rolled_back,
    );
    ensure!(unwritten_at_kills > 0, "no kill came while messages were being written");
    report.check(excused)
}

mod without_any_fault_every_message_appears_exactly_once {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        without_a_fault(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        without_a_fault(Engine::MySql).await
    }
}

mod killed_relays_lose_nothing_and_keep_first_appearances_in_order {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        with_kills(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        with_kills(Engine::MySql).await
    }
}
