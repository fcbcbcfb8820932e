//! The application: many connections that change aggregates and add messages about them.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use outbox_core::{Message, MessageId};
use outbox_mysql::MySqlOutbox;
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use rand::Rng;
use tokio::sync::Semaphore;
use tokio::task::{AbortHandle, JoinSet};

use super::World;
use super::history::Entry;

pub(super) const AGGREGATES: u32 = 1_000;
/// A quarter of the transactions is about these few, so that keys are long and contended.
const HOT_AGGREGATES: u32 = 10;
const ROLLED_BACK: f64 = 0.05;

/// How writers write.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) writers: usize,
    /// How many messages a transaction adds.
    pub(crate) messages: RangeInclusive<u32>,
    /// Whether the database may go away: a writer then connects again and goes on. Otherwise any
    /// error of a transaction is one of the test.
    pub(crate) survives: bool,
    /// Another way to the world's database.
    pub(crate) through: Option<String>,
}

impl Default for Load {
    fn default() -> Self {
        Self { writers: 8, messages: 1..=3, survives: false, through: None }
    }
}

/// What writers did, as far as they know.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    /// Messages of transactions that were rolled back.
    pub(crate) rolled_back: usize,
    /// Transactions whose end is not known.
    pub(crate) broken: usize,
    /// The longest transaction.
    pub(crate) longest: Duration,
}

/// Running writers. Each transaction takes permits for the messages that it adds.
pub(crate) struct Writers {
    permits: Arc<Semaphore>,
    tasks: JoinSet<Result<Tally>>,
    pacer: Option<AbortHandle>,
    /// Permits that may be left over: a writer waits for that many and one more.
    rest: usize,
}

impl Writers {
    /// Starts writers that write nothing yet.
    pub(crate) fn start(world: &World<'_>, outbox: &MySqlOutbox, load: &Load) -> Self {
        let permits = Arc::new(Semaphore::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..load.writers {
            let writer = Writer {
                url: load.through.clone().unwrap_or_else(|| world.url.clone()),
                topic: world.topic.clone(),
                outbox: outbox.clone(),
                load: load.clone(),
            };
            let permits = Arc::clone(&permits);
            tasks.spawn(async move {
                let done = writer.write(&permits).await;
                if done.is_err() {
                    // The others end as well, and with them whoever waits for the permits.
                    permits.close();
                }
                done
            });
        }
        Self { permits, tasks, pacer: None, rest: *load.messages.end() as usize - 1 }
    }

    /// Lets so many more messages be written.
    pub(crate) fn grant(&self, messages: usize) {
        self.permits.add_permits(messages);
    }

    /// How many messages may still be written.
    pub(crate) fn left(&self) -> usize {
        self.permits.available_permits()
    }

    /// Waits until at most so many messages are left to write.
    pub(crate) async fn until_left(&self, left: usize) {
        while !self.permits.is_closed() && self.left() > left.max(self.rest) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Lets messages be written at a steady rate from now on. What cannot be written is not made
    /// up for.
    pub(crate) fn pace(&mut self, per_second: usize) {
        const TICK: Duration = Duration::from_millis(20);
        let permits = Arc::clone(&self.permits);
        let tick = (per_second / 50).max(1);
        let pacer = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(TICK);
            loop {
                ticks.tick().await;
                if permits.available_permits() < per_second {
                    permits.add_permits(tick);
                }
            }
        });
        self.pacer = Some(pacer.abort_handle());
    }

    /// Ends them once they have written what they may.
    pub(crate) async fn end(mut self) -> Result<Tally> {
        if let Some(pacer) = self.pacer.take() {
            pacer.abort();
        }
        self.until_left(0).await;
        self.permits.close();
        let mut all = Tally::default();
        while let Some(ended) = self.tasks.join_next().await {
            let one = ended??;
            all.rolled_back += one.rolled_back;
            all.broken += one.broken;
            all.longest = all.longest.max(one.longest);
        }
        Ok(all)
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        if let Some(pacer) = &self.pacer {
            pacer.abort();
        }
    }
}

struct Writer {
    url: String,
    topic: String,
    outbox: MySqlOutbox,
    load: Load,
}

impl Writer {
    async fn write(&self, permits: &Semaphore) -> Result<Tally> {
        let mut connection = MySqlConnection::connect(&self.url).await?;
        let mut tally = Tally::default();
        loop {
            let plan = self.draw();
            let Ok(permit) = permits.acquire_many(plan.messages).await else { return Ok(tally) };
            permit.forget();
            let start = Instant::now();
            let done = self.transact(&mut connection, plan).await;
            tally.longest = tally.longest.max(start.elapsed());
            match done {
                Ok(()) if plan.commit => self.outbox.wake(),
                Ok(()) => tally.rolled_back += plan.messages as usize,
                Err(_) if self.load.survives => {
                    tally.broken += 1;
                    connection = self.reconnect().await;
                }
                Err(error) => return Err(error).context("a transaction of a writer"),
            }
        }
    }

    fn draw(&self) -> Plan {
        let mut random = rand::rng();
        let aggregates = if random.random_bool(0.25) { HOT_AGGREGATES } else { AGGREGATES };
        Plan {
            aggregate: random.random_range(0..aggregates),
            messages: random.random_range(self.load.messages.clone()),
            commit: !random.random_bool(ROLLED_BACK),
        }
    }

    /// The lock of the aggregate makes the order of the sequence numbers that of the commits.
    async fn transact(&self, connection: &mut MySqlConnection, plan: Plan) -> Result<()> {
        let Plan { aggregate, messages, commit } = plan;
        let mut tx = connection.begin().await?;
        let locked =
            sqlx::query("UPDATE aggregate SET version = LAST_INSERT_ID(version + ?) WHERE id = ?")
                .bind(messages)
                .bind(aggregate)
                .execute(&mut *tx)
                .await?;
        let last = locked.last_insert_id();
        let entries: Vec<_> = (last + 1 - u64::from(messages)..=last)
            .map(|sequence| Entry { aggregate, sequence })
            .collect();
        let messages = entries.iter().map(|entry| {
            Message::builder(self.topic.as_str())
                .key(aggregate.to_string())
                .payload(entry.payload())
                .build()
        });
        let messages = messages.collect::<Result<Vec<_>, _>>()?;
        let ids = self.outbox.add_all(&mut tx, messages).await?;
        enter(&mut tx, &ids, &entries).await?;
        if commit {
            tx.commit().await?;
        } else {
            tx.rollback().await?;
        }
        Ok(())
    }

    /// The database comes back or the test ends.
    async fn reconnect(&self) -> MySqlConnection {
        loop {
            if let Ok(connection) = MySqlConnection::connect(&self.url).await {
                return connection;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// What a transaction does.
#[derive(Debug, Clone, Copy)]
struct Plan {
    aggregate: u32,
    messages: u32,
    commit: bool,
}

async fn enter(
    connection: &mut MySqlConnection,
    ids: &[MessageId],
    entries: &[Entry],
) -> Result<()> {
    let places = vec!["(?, ?, ?)"; ids.len()].join(", ");
    let sql = AssertSqlSafe(format!("INSERT INTO ledger VALUES {places}"));
    let mut insert = sqlx::query(sql);
    for (id, entry) in ids.iter().zip(entries) {
        insert = insert.bind(id.as_bytes().to_vec()).bind(entry.aggregate).bind(entry.sequence);
    }
    insert.execute(connection).await?;
    Ok(())
}
