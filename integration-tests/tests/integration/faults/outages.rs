//! Kafka or the database is gone for a while, under load.
//!
//! `OUTBOX_E2E_OUTAGE` says for how many seconds; 15 without it.

use std::env;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::{
    database::{Database, Engine, Options},
    kafka::{KafkaCluster, Nodes},
    servers::{self, Backend},
};
use outbox_core::observe::Event;

use super::no_attempt_is_counted;
use crate::scenario::{Load, PATIENCE, Worker, World, Writers, until};

/// Messages a second.
const LOAD: usize = 300;

/// How long delivery may take to resume once a server answers again. A probe waits up to 5 s, and
/// one that was under way when it came back may first have to time out.
const RESUMES: Duration = Duration::from_secs(15);

fn outage() -> Duration {
    let given = env::var("OUTBOX_E2E_OUTAGE").ok();
    let seconds = given.map_or(15, |text| text.parse().expect("OUTBOX_E2E_OUTAGE is a number"));
    Duration::from_secs(seconds)
}

/// How long after `moment` a message was first acknowledged.
async fn resumes(worker: &Worker, moment: Instant) -> Result<Duration> {
    let since = || {
        worker.collect(|time, event| match event {
            Event::Published { .. } => time.checked_duration_since(moment),
            _ => None,
        })
    };
    until("a message is delivered", PATIENCE, || !since().is_empty()).await?;
    since().into_iter().min().context("a delivery")
}

#[derive(Debug, Clone, Copy)]
enum Stop {
    /// SIGKILL: connections are refused.
    Kill,
    /// SIGSTOP: connections stay open and nothing is answered.
    Pause,
}

async fn kafka_is_gone(engine: Engine, stop: Stop) -> Result<()> {
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    if Backend::Kafka.is_left_out() {
        return Ok(());
    }
    let cluster = KafkaCluster::private(Nodes::One).await?;
    let world = World::new(database, &cluster).await?;
    let mut worker = Worker::start(&world)?;
    let mut writers = Writers::start(&world, &world.outbox(), &Load::default());
    writers.pace(LOAD);
    resumes(&worker, Instant::now()).await?;

    let node = &cluster.nodes()[0];
    match stop {
        Stop::Kill => node.kill()?,
        Stop::Pause => node.pause()?,
    }
    let stopped = Instant::now();
    while stopped.elapsed() < outage() {
        no_attempt_is_counted(&world).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let waiting = world.number("SELECT COUNT(*) FROM outbox").await?;
    match stop {
        Stop::Kill => node.start().await?,
        Stop::Pause => node.resume()?,
    }
    let back = Instant::now();
    let resumed = resumes(&worker, back).await?;
    no_attempt_is_counted(&world).await?;
    writers.end().await?;
    let emptied = world.until_empty().await?;
    no_attempt_is_counted(&world).await?;
    let excused = worker.excused(0);
    let summary = worker.stop().await?;

    let report = world.report().await?;
    println!(
        "{engine}, Kafka gone ({stop:?}) for {:.1?}: {waiting} waited; resumed after {resumed:.1?}, \
         empty {emptied:.1?} after the last was written; {report} of at most {excused}",
        back - stopped
    );
    ensure!(waiting > 0, "nothing was written meanwhile");
    ensure!(resumed < RESUMES, "resumed only after {resumed:?}");
    ensure!((summary.retried, summary.held, summary.dead) == (0, 0, 0), "{summary:?}");
    report.check(excused)
}

async fn database_is_gone(engine: Engine) -> Result<()> {
    if Backend::Database(engine).is_left_out() {
        return Ok(());
    }
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let database = Database::private(engine, Options::fast()).await?;
    let world = World::new(&database, kafka).await?;
    let mut worker = Worker::start(&world)?;
    let load = Load { survives: true, ..Load::default() };
    let mut writers = Writers::start(&world, &world.outbox(), &load);
    writers.pace(LOAD);
    resumes(&worker, Instant::now()).await?;

    database.server().kill()?;
    let stopped = Instant::now();
    tokio::time::sleep(outage()).await;
    database.server().start().await?;
    let back = Instant::now();
    let resumed = resumes(&worker, back).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    no_attempt_is_counted(&world).await?;
    let tally = writers.end().await?;
    let emptied = world.until_empty().await?;
    no_attempt_is_counted(&world).await?;
    let excused = worker.excused(1);
    let summary = worker.stop().await?;

    let report = world.report().await?;
    println!(
        "{engine} gone for {:.1?}: {} transactions broken; resumed after {resumed:.1?}, empty \
         {emptied:.1?} after the last was written; {report} of at most {excused}",
        back - stopped,
        tally.broken,
    );
    ensure!(tally.broken > 0, "no transaction was under way");
    ensure!(resumed < RESUMES, "resumed only after {resumed:?}");
    ensure!((summary.retried, summary.held, summary.dead) == (0, 0, 0), "{summary:?}");
    report.check(excused)
}

mod while_kafka_is_gone_no_attempt_is_counted_and_delivery_resumes_by_itself {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        kafka_is_gone(Engine::MariaDb, Stop::Kill).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        kafka_is_gone(Engine::MySql, Stop::Pause).await
    }
}

mod while_the_database_is_gone_nothing_is_lost_and_delivery_resumes_by_itself {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        database_is_gone(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        database_is_gone(Engine::MySql).await
    }
}
