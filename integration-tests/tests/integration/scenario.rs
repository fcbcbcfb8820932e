//! An application, its outbox and a topic, for runs of the whole path: what was committed against
//! what appeared.
//!
//! Writers lock an aggregate, add messages about it, and enter each in a ledger, in one
//! transaction. The ledger is therefore what was committed, whatever a writer was told when its
//! connection broke.

pub(crate) mod history;
mod relays;
mod writers;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::{database::Database, kafka::Kafka};
use outbox_core::{Message, MessageId};
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use outbox_mysql::{MySqlOutbox, MySqlSchema, MySqlWriter};
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use self::history::{Appearance, Entry, judge};
pub(crate) use self::history::{Report, Verdict};
pub(crate) use self::relays::{ROWS_IN_FLIGHT, Relay, Worker, broker, broker_with, store};
pub(crate) use self::writers::{Load, Writers};

/// The lease of all relays here: the shortest that the message timeout allows, so that the lanes
/// of a killed one do not wait long.
pub(crate) const LEASE: Duration = Duration::from_secs(6);

/// How long to wait for what must come: a killed relay's lanes wait for its lease and are then
/// shared out, all on a machine that is busy with other tests.
pub(crate) const PATIENCE: Duration = Duration::from_secs(90);

const PARTITIONS: i32 = 6;

/// A database with aggregates, a ledger and an outbox, and a topic.
pub(crate) struct World<'a> {
    pub(crate) url: String,
    pub(crate) kafka: &'a Kafka,
    pub(crate) topic: String,
    _turn: Turn,
}

/// Runs that use all processors have them for themselves. Those that mostly wait overlap.
static TURN: RwLock<()> = RwLock::const_new(());

enum Turn {
    Alone(#[expect(dead_code, reason = "a guard")] RwLockWriteGuard<'static, ()>),
    Shared(#[expect(dead_code, reason = "a guard")] RwLockReadGuard<'static, ()>),
}

/// Keeps runs that use all processors away from one that mostly waits and has no world.
pub(crate) async fn no_run_alone() -> impl Sized {
    TURN.read().await
}

impl<'a> World<'a> {
    /// For a run that mostly waits.
    pub(crate) async fn new(database: &Database, kafka: &'a Kafka) -> Result<Self> {
        Self::on_topic(database, kafka, kafka.create_topic("world", PARTITIONS).await?).await
    }

    /// For a run that mostly waits, on a topic of its own.
    pub(crate) async fn on_topic(
        database: &Database,
        kafka: &'a Kafka,
        topic: String,
    ) -> Result<Self> {
        Self::made(database, kafka, topic, Turn::Shared(TURN.read().await)).await
    }

    /// For a run that uses all processors: waits until no other one runs.
    pub(crate) async fn alone(database: &Database, kafka: &'a Kafka) -> Result<Self> {
        let topic = kafka.create_topic("world", PARTITIONS).await?;
        Self::made(database, kafka, topic, Turn::Alone(TURN.write().await)).await
    }

    async fn made(
        database: &Database,
        kafka: &'a Kafka,
        topic: String,
        turn: Turn,
    ) -> Result<Self> {
        let url = database.create_database().await?;
        let mut connection = MySqlConnection::connect(&url).await?;
        MySqlSchema::new().migrate(&mut connection).await.context("migrate")?;
        let rows: Vec<_> = (0..writers::AGGREGATES).map(|id| format!("({id}, 0)")).collect();
        let tables = format!(
            "CREATE TABLE aggregate (id INT UNSIGNED PRIMARY KEY, version BIGINT UNSIGNED NOT NULL); \
             CREATE TABLE ledger (message_id BINARY(16) PRIMARY KEY, \
               aggregate INT UNSIGNED NOT NULL, sequence BIGINT UNSIGNED NOT NULL); \
             INSERT INTO aggregate VALUES {}",
            rows.join(", ")
        );
        sqlx::raw_sql(AssertSqlSafe(tables)).execute(&mut connection).await?;
        Ok(Self { url, kafka, topic, _turn: turn })
    }

    pub(crate) fn outbox(&self) -> MySqlOutbox {
        MySqlOutbox::new(MySqlWriter::new(&MySqlSchema::new()))
    }

    /// Adds messages in a transaction of their own. The ledger knows nothing of them.
    pub(crate) async fn add(&self, messages: Vec<Message>) -> Result<()> {
        let mut connection = self.connect().await?;
        let mut tx = connection.begin().await?;
        self.outbox().add_all(&mut tx, messages).await?;
        Ok(tx.commit().await?)
    }

    /// A connection of the application.
    pub(crate) async fn connect(&self) -> Result<MySqlConnection> {
        Ok(MySqlConnection::connect(&self.url).await?)
    }

    /// The number that a query gives, on a connection of its own: servers come and go here.
    pub(crate) async fn number(&self, sql: &str) -> Result<i64> {
        let sql = AssertSqlSafe(sql.to_owned());
        Ok(sqlx::query_scalar(sql).fetch_one(&mut self.connect().await?).await?)
    }

    /// How long it took until no message was left. An error once there were no fewer for long.
    pub(crate) async fn until_empty(&self) -> Result<Duration> {
        let start = Instant::now();
        let (mut least, mut since) = (i64::MAX, start);
        loop {
            let left = self.number("SELECT COUNT(*) FROM outbox").await?;
            if left == 0 {
                return Ok(start.elapsed());
            }
            if left < least {
                (least, since) = (left, Instant::now());
            }
            ensure!(since.elapsed() < PATIENCE, "{left} messages are left for {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Compares the topic with the ledger.
    pub(crate) async fn report(&self) -> Result<Report> {
        let records = crate::kafka::read(self.kafka, &self.topic).await?;
        let appearances =
            records.iter().map(Appearance::of).collect::<Result<Vec<_>>>().context("a record")?;
        let ledger: Vec<(Vec<u8>, u32, u64)> =
            sqlx::query_as("SELECT message_id, aggregate, sequence FROM ledger")
                .fetch_all(&mut self.connect().await?)
                .await?;
        let committed = ledger.into_iter().map(|(id, aggregate, sequence)| {
            let id = id.try_into().map_err(|_| anyhow::anyhow!("an id of another length"))?;
            Ok((MessageId::from_bytes(id), Entry { aggregate, sequence }))
        });
        let committed = committed.collect::<Result<HashMap<_, _>>>()?;
        Ok(Report {
            committed: committed.len(),
            records: appearances.len(),
            verdict: judge(&committed, &appearances),
        })
    }
}

/// Waits until `reached` says so, and how long that took.
pub(crate) async fn until(
    what: &str,
    patience: Duration,
    mut reached: impl FnMut() -> bool,
) -> Result<Duration> {
    let start = Instant::now();
    while !reached() {
        ensure!(start.elapsed() < patience, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(start.elapsed())
}
