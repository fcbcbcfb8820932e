//! `chaos writer`: an application of one connection, until SIGTERM.
//!
//! It locks an aggregate's row, adds messages about it and enters each in the ledger, in one
//! transaction, and keeps a history of what it knows of each. Errors end the transaction and the
//! connection; it then connects again.

use std::{
    env,
    path::Path,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result};
use outbox_core::{Message, MessageId};
use outbox_mysql::{MySqlOutbox, MySqlSchema, MySqlWriter};
use rand::Rng;
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    entry::{BESIDE, Entry, ORDERED},
    history::{History, Outcome},
};

/// A server or a network that says nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// What could not be written for longer than this is not made up for.
const ARREARS: Duration = Duration::from_secs(2);
const ROLLED_BACK: f64 = 0.05;
/// A tenth of the transactions is about these few aggregates, so that keys are long and contended.
const HOT: u32 = 20;

/// The variables that a writer is told what to do by.
pub(crate) mod variable {
    pub(crate) const DATABASE: &str = "DATABASE_URL";
    pub(crate) const ORDERED: &str = "CHAOS_ORDERED_TOPIC";
    pub(crate) const BESIDE: &str = "CHAOS_TOPIC_BESIDE";
    pub(crate) const HISTORY: &str = "CHAOS_HISTORY";
    pub(crate) const RATE: &str = "CHAOS_RATE";
}

pub(crate) async fn run() -> Result<()> {
    let asked = asked_to_end()?;
    let mut writer = Writer {
        url: told(variable::DATABASE)?,
        ordered: told(variable::ORDERED)?,
        beside: told(variable::BESIDE)?,
        history: History::create(Path::new(&told::<String>(variable::HISTORY)?))?,
        outbox: MySqlOutbox::new(MySqlWriter::new(&MySqlSchema::new())),
    };
    let rate: f64 = told(variable::RATE)?;
    let mut connection = None;
    let mut next = Instant::now();
    while !asked.load(Ordering::Relaxed) {
        let Some(open) = &mut connection else {
            connection = connect(&writer.url).await;
            continue;
        };
        let plan = Plan::draw();
        if !writer.transact(open, plan).await? {
            connection = None;
        }
        next += Duration::from_secs_f64(f64::from(plan.messages) / rate);
        next = next.max(Instant::now().checked_sub(ARREARS).unwrap_or(next));
        sleep_until(next).await;
    }
    Ok(())
}

fn told<T: FromStr>(name: &str) -> Result<T> {
    let value = env::var(name).with_context(|| name.to_owned())?;
    value.parse().ok().with_context(|| format!("{name}: {value:?}"))
}

/// Set by SIGTERM: a transaction that has begun comes to its end.
fn asked_to_end() -> Result<Arc<AtomicBool>> {
    let asked = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&asked);
    let mut terminated = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        terminated.recv().await;
        told.store(true, Ordering::Relaxed);
    });
    Ok(asked)
}

async fn connect(url: &str) -> Option<MySqlConnection> {
    let connected = async {
        let mut connection = MySqlConnection::connect(url).await?;
        // A writer that was stopped in its transaction keeps others from its aggregate only.
        let set = sqlx::raw_sql("SET SESSION innodb_lock_wait_timeout = 3");
        set.execute(&mut connection).await?;
        Ok::<_, sqlx::Error>(connection)
    };
    if let Ok(Ok(connection)) = timeout(PATIENCE, connected).await {
        return Some(connection);
    }
    sleep(Duration::from_millis(50)).await;
    None
}

/// What a transaction does.
#[derive(Debug, Clone, Copy)]
struct Plan {
    aggregate: u32,
    messages: u32,
    commit: bool,
}

impl Plan {
    fn draw() -> Self {
        let mut random = rand::rng();
        let aggregate = match random.random_range(0..100) {
            0..5 => random.random_range(ORDERED..ORDERED + BESIDE),
            5..15 => random.random_range(0..HOT),
            _ => random.random_range(0..ORDERED),
        };
        let messages = match random.random_range(0..10) {
            0..5 => random.random_range(1..=3),
            5..9 => random.random_range(4..=20),
            _ => random.random_range(21..=60),
        };
        Self { aggregate, messages, commit: !random.random_bool(ROLLED_BACK) }
    }
}

struct Writer {
    url: String,
    ordered: String,
    beside: String,
    history: History,
    outbox: MySqlOutbox,
}

impl Writer {
    /// Whether the connection is still good. An error is one of the history.
    async fn transact(&mut self, connection: &mut MySqlConnection, plan: Plan) -> Result<bool> {
        let began = SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros().try_into()?;
        let ids: Vec<_> = (0..plan.messages).map(|_| MessageId::generate()).collect();
        // Until it is in the history, no message was added.
        let begun = timeout(PATIENCE, connection.begin()).await;
        let Ok(Ok(mut tx)) = begun else { return Ok(false) };
        let locked = timeout(PATIENCE, lock(&mut tx, plan)).await;
        let Ok(Ok(last)) = locked else { return Ok(false) };
        let sequence = last + 1 - u64::from(plan.messages);
        let first = Entry { aggregate: plan.aggregate, sequence };
        let number = self.history.tries(began, first, &ids)?;
        let added = timeout(PATIENCE, self.add(&mut tx, first, &ids)).await;
        if !matches!(added, Ok(Ok(()))) {
            self.history.ended(number, Outcome::Failed)?;
            return Ok(false);
        }
        if !plan.commit {
            self.history.ended(number, Outcome::Failed)?;
            return Ok(matches!(timeout(PATIENCE, tx.rollback()).await, Ok(Ok(()))));
        }
        let committed = matches!(timeout(PATIENCE, tx.commit()).await, Ok(Ok(())));
        // An error does not tell that nothing was committed: its reply may have been another's.
        let outcome = if committed { Outcome::Ok } else { Outcome::Unknown };
        self.history.ended(number, outcome)?;
        Ok(committed)
    }

    async fn add(
        &self,
        tx: &mut sqlx::Transaction<'_, sqlx::MySql>,
        first: Entry,
        ids: &[MessageId],
    ) -> Result<()> {
        let topic = if first.is_ordered() { &self.ordered } else { &self.beside };
        let entries: Vec<_> = (first.sequence..)
            .zip(ids)
            .map(|(sequence, id)| (*id, Entry { sequence, ..first }))
            .collect();
        let messages = entries.iter().map(|(id, entry)| {
            Message::builder(topic.as_str())
                .id(*id)
                .key(entry.key())
                .payload(entry.payload())
                .build()
        });
        self.outbox.add_all(tx, messages.collect::<Result<Vec<_>, _>>()?).await?;
        let places = vec!["(?, ?, ?)"; entries.len()].join(", ");
        let sql = AssertSqlSafe(format!("INSERT INTO ledger VALUES {places}"));
        let mut enter = sqlx::query(sql);
        for (id, Entry { aggregate, sequence }) in entries {
            enter = enter.bind(id.as_bytes().to_vec()).bind(aggregate).bind(sequence);
        }
        enter.execute(&mut **tx).await?;
        Ok(())
    }
}

/// The lock of the aggregate makes the order of the sequence numbers that of the commits. The last
/// of the transaction's own.
async fn lock(tx: &mut sqlx::Transaction<'_, sqlx::MySql>, plan: Plan) -> Result<u64, sqlx::Error> {
    let locked =
        sqlx::query("UPDATE aggregate SET version = LAST_INSERT_ID(version + ?) WHERE id = ?");
    let locked = locked.bind(plan.messages).bind(plan.aggregate).execute(&mut **tx).await?;
    Ok(locked.last_insert_id())
}
