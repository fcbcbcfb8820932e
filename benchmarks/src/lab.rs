//! The servers of a run, and how much is measured.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use integration_tests::{
    database::{Database, Engine, Options, PrivateDatabase},
    kafka::{KafkaCluster, Nodes},
};
use outbox_core::message::header;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use tokio::sync::OnceCell;

use crate::{cpu::Cpu, site::Topic};

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// Enough to see that everything works, and roughly where the figures are.
    Quick,
    /// What is written down.
    Full,
}

/// Servers of this run's own, started when a part needs them.
#[derive(Debug)]
pub(crate) struct Lab {
    size: Size,
    engines: Vec<Engine>,
    began: Instant,
    mariadb: OnceCell<PrivateDatabase>,
    mysql: OnceCell<PrivateDatabase>,
    kafka: OnceCell<KafkaCluster>,
    proxied: OnceCell<KafkaCluster>,
}

impl Lab {
    pub(crate) fn new(size: Size, engines: Vec<Engine>) -> Self {
        Self {
            size,
            engines,
            began: Instant::now(),
            mariadb: OnceCell::new(),
            mysql: OnceCell::new(),
            kafka: OnceCell::new(),
            proxied: OnceCell::new(),
        }
    }

    /// One of two amounts, by the size of this run.
    pub(crate) fn pick<T>(&self, quick: T, full: T) -> T {
        match self.size {
            Size::Quick => quick,
            Size::Full => full,
        }
    }

    /// The databases that are measured.
    pub(crate) fn engines(&self) -> Vec<Engine> {
        self.engines.clone()
    }

    /// One line of progress, with the time since the start.
    pub(crate) fn progress(&self, line: impl AsRef<str>) {
        eprintln!("[{:>4} s] {}", self.began.elapsed().as_secs(), line.as_ref());
    }

    pub(crate) async fn database(&self, engine: Engine) -> Result<&PrivateDatabase> {
        let cell = match engine {
            Engine::MariaDb => &self.mariadb,
            Engine::MySql => &self.mysql,
        };
        cell.get_or_try_init(|| async {
            self.progress(format!("starting {engine}"));
            Database::private(engine, options(engine)).await
        })
        .await
    }

    pub(crate) async fn kafka(&self) -> Result<&KafkaCluster> {
        self.kafka
            .get_or_try_init(|| async {
                self.progress("starting kafka");
                warmed(KafkaCluster::private(Nodes::One).await?, self.warm_up()).await
            })
            .await
    }

    /// Another Kafka, whose clients dial a proxy that can be slow.
    pub(crate) async fn proxied_kafka(&self) -> Result<&KafkaCluster> {
        self.proxied
            .get_or_try_init(|| async {
                self.progress("starting kafka behind a proxy");
                let cluster = KafkaCluster::behind_proxies(Nodes::One, 0).await?;
                let warm_up = self.pick(Duration::from_secs(2), self.warm_up());
                warmed(cluster, warm_up).await
            })
            .await
    }

    fn warm_up(&self) -> Duration {
        self.pick(Duration::from_secs(5), Duration::from_secs(40))
    }

    /// What this server, Kafka and this process have used so far.
    pub(crate) async fn cpu(&self, engine: Engine) -> Result<Cpu> {
        let database = self.database(engine).await?.server().pid().context("no database runs")?;
        let kafka = self.kafka().await?.nodes().first().and_then(|node| node.pid());
        Cpu::now(database, kafka.context("no Kafka runs")?)
    }

    /// When, on what and how the figures of a page were measured.
    pub(crate) fn conditions(&self, command: &str) -> String {
        let servers: Vec<String> = [&self.mariadb, &self.mysql]
            .into_iter()
            .filter_map(OnceCell::get)
            .map(|database| {
                // Debian's version tells what it is built from; the name may not.
                format!("{} {}", database.engine(), database.version())
            })
            .collect();
        format!(
            "{date}, {cores} cores shared by database, Kafka and relay ({model}), {memory} GiB of \
             memory. {servers}; Apache Kafka, one node. Everything on one machine by loopback, \
             without TLS. Database: a flush at every commit of log and binary log (ROW, full \
             images), buffer pool 3 GiB, redo log 1 GiB, 5,000 pages flushed a second. Command: `{command}`.",
            date = chrono::Utc::now().format("%Y-%m-%d"),
            cores = std::thread::available_parallelism().map_or(0, usize::from),
            model = model(),
            memory = memory() >> 30,
            servers = servers.join(", "),
        )
    }
}

/// A JVM runs at full speed only once it has worked for a while, on large requests as on small ones,
/// on messages with headers as on those without.
async fn warmed(kafka: KafkaCluster, time: Duration) -> Result<KafkaCluster> {
    let topic = Topic::new(&kafka, 8).await?;
    let producer: FutureProducer = kafka.client().set("enable.idempotence", "true").create()?;
    let payload = [b'w'; 1024];
    let began = Instant::now();
    let mut index = 0_u64;
    while began.elapsed() < time {
        let mut sent = vec![];
        let size = if began.elapsed() < time / 2 { 5_000 } else { 100 };
        for _ in 0..size {
            index += 1;
            let key = index.to_string();
            let mut record = FutureRecord::to(&topic.name).key(&key).payload(&payload[..]);
            if index.is_multiple_of(2) {
                let id =
                    Header { key: header::ID, value: Some("0123456789abcdef0123456789abcdef") };
                record = record.headers(OwnedHeaders::new().insert(id));
            }
            sent.push(producer.send_result(record).map_err(|(error, _)| error)?);
        }
        for delivery in sent {
            delivery.await?.map_err(|(error, _)| error)?;
        }
    }
    topic.delete().await?;
    Ok(kafka)
}

/// As in production: what is committed survives the machine, and replicas can follow.
fn options(engine: Engine) -> Options {
    let options = Options::durable()
        .with("--innodb-buffer-pool-size=3G")
        // As for a disk of today; the default of 200 pages a second is for one that turns.
        .with("--innodb-io-capacity=5000")
        .with("--innodb-io-capacity-max=10000")
        .with("--server-id=1")
        .with("--log-bin=binlog")
        .with("--binlog-format=ROW");
    match engine {
        Engine::MariaDb => options.with("--innodb-log-file-size=1G"),
        Engine::MySql => options.with("--innodb-redo-log-capacity=1G"),
    }
}

fn model() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

fn memory() -> u64 {
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = total.and_then(|total| total.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.map_or(0, |kib| kib * 1024)
}

/// As a rate of so many in that time.
pub(crate) fn per_second(count: usize, time: Duration) -> f64 {
    count as f64 / time.as_secs_f64()
}
