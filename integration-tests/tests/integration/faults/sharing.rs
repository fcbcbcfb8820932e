//! How the lanes are shared out among workers that come, go and die.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::{
    database::Engine,
    kafka::{KafkaCluster, Nodes},
    servers::{self, Backend},
};
use outbox_core::observe::Event;

use crate::scenario::{LEASE, Load, PATIENCE, Worker, World, Writers, until};

const LANES: usize = 16;

fn lanes(workers: &[Worker]) -> Vec<usize> {
    workers.iter().map(Worker::lanes).collect()
}

/// Whether nobody has two lanes more than another.
fn is_fair(lanes: &[usize]) -> bool {
    let (least, most) = (lanes.iter().min(), lanes.iter().max());
    most.zip(least).is_some_and(|(most, least)| most - least <= 1)
}

/// How often a lane came to one of these workers, or went.
fn moves(workers: &[Worker]) -> usize {
    let moved = |worker: &Worker| {
        let lanes = worker.collect(|_, event| match event {
            Event::LanesGained { lanes }
            | Event::LanesLost { lanes }
            | Event::LanesReleased { lanes } => Some(lanes.len()),
            _ => None,
        });
        lanes.into_iter().sum::<usize>()
    };
    workers.iter().map(moved).sum()
}

/// How long it takes until every lane has an owner, and until each worker has its share.
async fn share_out(workers: &[Worker]) -> Result<(Duration, Duration)> {
    let start = Instant::now();
    let is_owned = || lanes(workers).iter().sum::<usize>() == LANES;
    let owned = until("every lane has an owner", 2 * LEASE, is_owned).await;
    let owned = owned.with_context(|| format!("{:?}", lanes(workers)))?;
    let fair = until("lanes are shared", PATIENCE, || is_owned() && is_fair(&lanes(workers))).await;
    fair.with_context(|| format!("{:?}", lanes(workers)))?;
    Ok((owned, start.elapsed()))
}

/// So many workers run in turn: first more and more, then fewer.
struct Turns {
    joining: &'static [usize],
    dying: &'static [usize],
}

async fn workers_come_and_go(engine: Engine, turns: Turns) -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    let world = World::new(database, kafka).await?;
    let mut writers = Writers::start(&world, &world.outbox(), &Load::default());
    writers.pace(100);
    let mut workers = vec![];
    let (mut took, mut later, mut excused) = (vec![], 0, 0);
    for &count in turns.joining {
        while workers.len() < count {
            workers.push(Worker::start(&world)?);
        }
        took.push((count, share_out(&workers).await?));
    }
    for &count in turns.dying {
        for worker in workers.split_off(count) {
            excused += worker.excused(1);
            worker.crash().await;
        }
        took.push((count, share_out(&workers).await?));
        // From now on lanes stand still, but for what had been offered to the dead.
        let before = moves(&workers);
        tokio::time::sleep(LEASE / 2).await;
        let moved = moves(&workers) - before;
        ensure!(is_fair(&lanes(&workers)), "{:?}, a while later", lanes(&workers));
        ensure!(moved <= LANES / 2, "{moved} moves among {count} workers that have their share");
        later += moved;
    }
    writers.end().await?;
    world.until_empty().await?;
    excused += workers.iter().map(|worker| worker.excused(0)).sum::<usize>();
    let report = world.report().await?;
    println!(
        "{engine}, workers, and the time until all lanes have owners and are shared: {took:.1?}; {later} \
         moves afterwards; {report} of at most {excused}"
    );
    report.check(excused)
}

mod lanes_are_shared_fairly_within_two_leases_and_stand_still {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        let turns = Turns { joining: &[1, 2, 3, 5, 16, 17], dying: &[16, 5, 2, 1] };
        workers_come_and_go(Engine::MySql, turns).await
    }

    /// Fewer turns, since each takes a lease or two and the rules are the same.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        let turns = Turns { joining: &[1, 3, 17], dying: &[16, 2] };
        workers_come_and_go(Engine::MariaDb, turns).await
    }
}

/// How long a shutdown may take to wait for outcomes, and some statements more.
const DRAIN: Duration = Duration::from_secs(5);
const SLACK: Duration = Duration::from_secs(5);

async fn a_worker_is_shut_down(engine: Engine) -> Result<()> {
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    if Backend::Kafka.is_left_out() {
        return Ok(());
    }
    let cluster = KafkaCluster::private(Nodes::One).await?;
    let world = World::new(database, &cluster).await?;
    let start = || Worker::start_with(&world, |builder| builder.drain_limit(DRAIN));
    let mut writers = Writers::start(&world, &world.outbox(), &Load::default());
    writers.pace(300);

    let mut excused = 0;
    let mut line = String::new();
    let mut worker = start()?;
    for down in [false, true] {
        until("it delivers", PATIENCE, || worker.delivered() > 100).await?;
        if down {
            cluster.nodes()[0].pause()?;
            // Under load, so that messages are at the broker.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let asked = Instant::now();
        worker.stop().await?;
        let ended = asked.elapsed();
        let held = world.number("SELECT COUNT(*) FROM outbox_lane WHERE owner IS NOT NULL").await?;
        ensure!(ended < DRAIN + SLACK, "the shutdown took {ended:?}");
        ensure!(held == 0, "{held} lanes are still held");
        excused += worker.excused(1);

        if down {
            cluster.nodes()[0].resume()?;
        }
        let began = Instant::now();
        worker = start()?;
        until("the next has all lanes", PATIENCE, || worker.lanes() == LANES).await?;
        let next = began.elapsed();
        line += &format!(
            ", Kafka {}: ended after {ended:.1?}, the next had all lanes after {next:.1?}",
            if down { "down" } else { "up" }
        );
    }
    writers.end().await?;
    world.until_empty().await?;
    excused += worker.excused(0);
    worker.stop().await?;
    let report = world.report().await?;
    println!("{engine}, shutdown under load{line}; {report} of at most {excused}");
    report.check(excused)
}

mod a_shutdown_under_load_ends_in_time_with_kafka_up_or_down_and_leaves_no_lane {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        a_worker_is_shut_down(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        a_worker_is_shut_down(Engine::MySql).await
    }
}
