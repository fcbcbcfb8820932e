//! From the application's transaction through MySQL or MariaDB, the dispatcher and Kafka: what
//! was committed against what appeared.
//!
//! `OUTBOX_E2E_MESSAGES` says how many messages are written at least; 10,000 without it.

pub(crate) mod history;

use std::env;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::{
    database::Engine,
    kafka::Kafka,
    process::{Process, Signal, was_ended_by},
    servers,
};
use outbox_core::{Dispatcher, Message, Wake};
use outbox_kafka::KafkaBroker;
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use outbox_mysql::{MySqlOutbox, MySqlSchema};
use rand::Rng;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;

use self::history::{Appearance, Entry, Verdict, Written, judge};
use crate::mysql::{Lab, number};

const WRITERS: usize = 8;
const AGGREGATES: u32 = 1_000;
/// A quarter of the transactions is about these few, so that keys are long and contended.
const HOT_AGGREGATES: u32 = 10;
const ROLLED_BACK: f64 = 0.05;
const PARTITIONS: i32 = 6;

const KILLS: usize = 6;
/// The bound of duplicates per kill; far below what is written between two kills.
const ROWS_IN_FLIGHT: usize = 100;
/// A killed relay's lanes wait for its lease of 6 s, and are then shared out.
const PATIENCE: Duration = Duration::from_secs(60);

fn messages() -> usize {
    let given = env::var("OUTBOX_E2E_MESSAGES").ok();
    given.map_or(10_000, |text| text.parse().expect("OUTBOX_E2E_MESSAGES is a number"))
}

/// A database with aggregates and an outbox, and a topic.
struct World {
    lab: Lab,
    kafka: &'static Kafka,
    topic: String,
}

impl World {
    /// `None` when a server was left out.
    async fn new(engine: Engine) -> Result<Option<Self>> {
        let Some(lab) = Lab::with_schema(engine, MySqlSchema::new()).await? else {
            return Ok(None);
        };
        let Some(kafka) = servers::kafka().await else { return Ok(None) };
        let mut connection = lab.connect().await?;
        let rows: Vec<_> = (0..AGGREGATES).map(|id| format!("({id}, 0)")).collect();
        let sql = format!(
            "CREATE TABLE aggregate (id INT PRIMARY KEY, version BIGINT NOT NULL); \
             INSERT INTO aggregate VALUES {}",
            rows.join(", ")
        );
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await?;
        let topic = kafka.create_topic("end-to-end", PARTITIONS).await?;
        Ok(Some(Self { lab, kafka, topic }))
    }

    /// Starts writers; each transaction takes permits for the messages that it writes. They end
    /// when the permits are closed.
    fn write(&self, outbox: &MySqlOutbox, permits: &Arc<Semaphore>) -> JoinSet<Result<Written>> {
        let mut writers = JoinSet::new();
        for _ in 0..WRITERS {
            let (outbox, permits) = (outbox.clone(), Arc::clone(permits));
            let (url, topic) = (self.lab.url.clone(), self.topic.clone());
            writers.spawn(async move {
                let mut connection = MySqlConnection::connect(&url).await?;
                let mut written = Written::default();
                loop {
                    let plan = Plan::draw();
                    let Ok(permit) = permits.acquire_many(plan.messages).await else { break };
                    permit.forget();
                    let done = transact(&mut connection, &outbox, &topic, plan, &mut written).await;
                    if done.is_err() {
                        // The others end as well, and with them whoever waits for the permits.
                        permits.close();
                    }
                    done.context("a transaction of a writer")?;
                }
                Ok(written)
            });
        }
        writers
    }

    async fn until_empty(&self) -> Result<()> {
        let mut connection = self.lab.connect().await?;
        let start = Instant::now();
        loop {
            let left = number(&mut connection, "SELECT COUNT(*) FROM outbox").await?;
            if left == 0 {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "{left} messages are left after {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn verdict(&self, written: &Written) -> Result<(usize, Verdict)> {
        let records = crate::kafka::read(self.kafka, &self.topic).await?;
        let appearances =
            records.iter().map(Appearance::of).collect::<Result<Vec<_>>>().context("a record")?;
        Ok((records.len(), judge(written, &appearances)))
    }

    fn relay(&self) -> Result<Process> {
        let rows = ROWS_IN_FLIGHT.to_string();
        let variables = [
            ("DATABASE_URL", self.lab.url.as_str()),
            ("KAFKA_BOOTSTRAP", self.kafka.bootstrap()),
            ("RELAY_ROWS_IN_FLIGHT", &rows),
        ];
        Process::spawn(env!("CARGO_BIN_EXE_relay"), [""; 0], variables)
    }
}

/// What a transaction does.
#[derive(Clone, Copy)]
struct Plan {
    aggregate: u32,
    messages: u32,
    commit: bool,
}

impl Plan {
    fn draw() -> Self {
        let mut random = rand::rng();
        let aggregates = if random.random_bool(0.25) { HOT_AGGREGATES } else { AGGREGATES };
        Self {
            aggregate: random.random_range(0..aggregates),
            messages: if random.random_bool(0.1) { 3 } else { 1 },
            commit: !random.random_bool(ROLLED_BACK),
        }
    }
}

/// Locks the aggregate, then adds, then ends the transaction: the lock makes the order of the
/// sequence numbers that of the commits.
async fn transact(
    connection: &mut MySqlConnection,
    outbox: &MySqlOutbox,
    topic: &str,
    plan: Plan,
    written: &mut Written,
) -> Result<()> {
    let aggregate = plan.aggregate;
    let mut tx = connection.begin().await?;
    let version: i64 = sqlx::query_scalar("SELECT version FROM aggregate WHERE id = ? FOR UPDATE")
        .bind(aggregate)
        .fetch_one(&mut *tx)
        .await?;
    sqlx::query("UPDATE aggregate SET version = version + ? WHERE id = ?")
        .bind(plan.messages)
        .bind(aggregate)
        .execute(&mut *tx)
        .await?;
    let first = u64::try_from(version)? + 1;
    let entries: Vec<_> = (first..first + u64::from(plan.messages))
        .map(|sequence| Entry { aggregate, sequence })
        .collect();
    let messages = entries.iter().map(|entry| {
        Message::builder(topic).key(aggregate.to_string()).payload(entry.payload()).build()
    });
    let messages = messages.collect::<Result<Vec<_>, _>>()?;
    let ids = outbox.add_all(&mut tx, messages).await?;
    if plan.commit {
        tx.commit().await?;
        outbox.wake();
        written.committed.extend(ids.into_iter().zip(entries));
    } else {
        tx.rollback().await?;
        written.rolled_back.extend(ids);
    }
    Ok(())
}

async fn all(writers: JoinSet<Result<Written>>) -> Result<Written> {
    let mut written = Written::default();
    for one in writers.join_all().await {
        written.merge(one?);
    }
    Ok(written)
}

async fn without_a_fault(engine: Engine) -> Result<()> {
    let Some(world) = World::new(engine).await? else { return Ok(()) };
    let broker = KafkaBroker::builder(world.kafka.bootstrap()).build()?;
    let wake = Wake::default();
    let dispatcher =
        Dispatcher::builder(world.lab.store.clone(), broker).wake(wake.clone()).build()?;
    let handle = dispatcher.handle();
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(dispatcher.run(async move {
        let _ = stopped.await;
    }));

    let start = Instant::now();
    let permits = Arc::new(Semaphore::new(0));
    let writers = world.write(&world.lab.outbox.clone().with_wake(wake), &permits);
    grant(&permits, messages()).await;
    permits.close();
    let written = all(writers).await?;
    let wrote = start.elapsed();
    world.until_empty().await.with_context(|| format!("{:?}", handle.status()))?;
    let took = start.elapsed();
    drop(stop);
    let summary = running.await??;

    let (records, verdict) = world.verdict(&written).await?;
    println!(
        "{engine}, no fault: {} committed, {} rolled back, {records} records; written in {wrote:?}, \
         empty after {took:?}; {verdict}",
        written.committed.len(),
        written.rolled_back.len(),
    );
    ensure!(!written.rolled_back.is_empty(), "nothing was rolled back");
    ensure!(verdict == Verdict::default(), "{verdict}");
    ensure!(summary.delivered == written.committed.len() as u64, "{summary:?}");
    Ok(())
}

/// Lets so many messages be written, and gives back when their writing has begun.
async fn grant(permits: &Semaphore, messages: usize) {
    permits.add_permits(messages);
    // A writer may want three; two are left over then.
    until_only(permits, 2).await;
}

async fn until_only(permits: &Semaphore, left: usize) {
    while !permits.is_closed() && permits.available_permits() > left {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn with_kills(engine: Engine) -> Result<()> {
    let Some(world) = World::new(engine).await? else { return Ok(()) };
    let start = Instant::now();
    let survivor = world.relay()?;
    let mut victim = world.relay()?;
    let permits = Arc::new(Semaphore::new(0));
    let writers = world.write(&world.lab.outbox, &permits);
    let burst = messages() / (KILLS + 1);
    let mut unwritten_at_kills = 0;
    for _ in 0..KILLS {
        // Killed while it has lanes and the writers write: it has rows in flight then.
        victim.line_with("gained", PATIENCE).await?;
        permits.add_permits(burst);
        let moment = rand::rng().random_range(0.1..0.6);
        let rest = (burst as f64 * (1.0 - moment)) as usize;
        until_only(&permits, rest).await;
        victim.signal(Signal::SIGKILL)?;
        unwritten_at_kills += permits.available_permits();
        let status = victim.end(PATIENCE).await?;
        ensure!(was_ended_by(status, Signal::SIGKILL), "{status}");
        victim = world.relay()?;
    }
    grant(&permits, burst).await;
    permits.close();
    let written = all(writers).await?;
    let wrote = start.elapsed();
    let emptied = world.until_empty().await;
    for (name, relay) in [("survivor", &survivor), ("last victim", &victim)] {
        emptied.as_ref().map_err(|error| {
            anyhow::anyhow!("{error:#}; the {name} printed {:?}", relay.lines())
        })?;
    }
    let took = start.elapsed();
    for relay in [&survivor, &victim] {
        relay.signal(Signal::SIGTERM)?;
        let status = relay.end(PATIENCE).await?;
        ensure!(status.success(), "a relay ended by {status}: {:?}", relay.lines());
    }

    let (records, verdict) = world.verdict(&written).await?;
    println!(
        "{engine}, {KILLS} kills: {} committed, {} rolled back, {records} records; written in \
         {wrote:?}, empty after {took:?}; {verdict}",
        written.committed.len(),
        written.rolled_back.len(),
    );
    ensure!(unwritten_at_kills > 0, "no kill came while messages were being written");
    let bound = ROWS_IN_FLIGHT * KILLS;
    ensure!(verdict.duplicates <= bound, "{verdict}, of which {bound} are excused");
    let others = Verdict { duplicates: 0, ..verdict };
    ensure!(others == Verdict::default(), "{others}");
    Ok(())
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
