//! Connections that break at any moment, also between a request and its answer.

use std::net::ToSocketAddrs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::{
    database::{Database, Engine, Options},
    kafka::{KafkaCluster, Nodes},
    proxy::Proxy,
    servers::Backend,
};

use super::no_attempt_is_counted;
use crate::scenario::{Load, PATIENCE, Worker, World, Writers, broker, store, until};

/// Messages a second.
const LOAD: usize = 300;
const TIME: Duration = Duration::from_secs(10);
const EVERY: Duration = Duration::from_millis(250);

/// What is cut, in turn: requests whose answer never comes, requests that never arrive, and
/// whatever is connected.
const CUTS: [fn(&Proxy, &Proxy); 6] = [
    |database, _| database.cut_reply_of(b"DELETE o FROM outbox o FORCE"),
    |database, _| database.cut_reply_of(b"COMMIT"),
    |database, _| database.cut_before(b"DELETE o FROM outbox o FORCE"),
    |database, _| database.cut_reply_of(b"INSERT INTO outbox"),
    |database, _| database.cut(),
    |_, kafka| kafka.cut(),
];

async fn connections_are_cut(engine: Engine) -> Result<()> {
    if Backend::Database(engine).is_left_out() || Backend::Kafka.is_left_out() {
        return Ok(());
    }
    let database = Database::private(engine, Options::fast()).await?;
    let address = database.address().to_socket_addrs()?.next().context("an address")?;
    let proxy = Proxy::start(address, 1).await?;
    let cluster = KafkaCluster::behind_proxies(Nodes::One, 2).await?;
    let world = World::new(&database, &cluster).await?;
    let broken = proxy.url(&database.unencrypted(&world.url));
    let mut worker = Worker::run(store(&broken)?, broker(cluster.bootstrap())?, |builder| builder)?;
    let load = Load { survives: true, through: Some(broken), ..Load::default() };
    let mut writers = Writers::start(&world, &world.outbox(), &load);
    writers.pace(LOAD);
    until("it delivers", PATIENCE, || worker.delivered() > 100).await?;

    let start = Instant::now();
    let mut cuts = 0;
    while start.elapsed() < TIME {
        CUTS[cuts % CUTS.len()](&proxy, &cluster.proxies()[0]);
        cuts += 1;
        tokio::time::sleep(EVERY).await;
    }
    let happened = proxy.happened();
    proxy.heal();
    let before = worker.delivered();
    until("it delivers again", PATIENCE, || worker.delivered() > before).await?;
    let tally = writers.end().await?;
    world.until_empty().await?;
    no_attempt_is_counted(&world).await?;
    let excused = worker.excused(0);
    let summary = worker.stop().await?;

    let report = world.report().await?;
    println!(
        "{engine}, {cuts} cuts ({happened} in a request), {} transactions broken: {report} of at \
         most {excused}",
        tally.broken,
    );
    ensure!(happened >= CUTS.len() && tally.broken > 0, "too little was cut");
    ensure!((summary.retried, summary.held, summary.dead) == (0, 0, 0), "{summary:?}");
    report.check(excused)
}

mod cut_connections_lose_nothing_and_repeat_only_what_the_broker_left_open {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        connections_are_cut(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        connections_are_cut(Engine::MySql).await
    }
}
