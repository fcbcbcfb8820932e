//! The application: transactions of one business row and one message.

use std::{
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use outbox_core::{Message, MessageId, Wake};
use outbox_mysql::{MySqlOutbox, MySqlWriter};
use sqlx::{Connection, MySqlConnection};
use tokio::task::JoinSet;

use crate::{
    site::{Site, run},
    stats::percentile,
};

/// How a relay in the same process learns of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waking {
    /// It polls.
    None,
    /// `add` nudges it.
    Nudge,
    /// The application calls `wake` after its commit.
    Wake,
}

impl Waking {
    pub(crate) const ALL: [Self; 3] = [Self::None, Self::Nudge, Self::Wake];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "no wake",
            Self::Nudge => "nudge by add",
            Self::Wake => "wake()",
        }
    }
}

/// What the writers do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Transactions a second; as many as there can be without.
    pub(crate) rate: Option<f64>,
    pub(crate) time: Duration,
    pub(crate) writers: usize,
    pub(crate) waking: Waking,
}

/// When each message was committed and when it was acknowledged.
#[derive(Debug)]
pub(crate) struct Ledger {
    began: Instant,
    entries: Vec<Entry>,
    acknowledged: AtomicUsize,
}

#[derive(Debug, Default)]
struct Entry {
    /// Nanoseconds since the beginning; 0 is not yet.
    committed: AtomicU64,
    acknowledged: AtomicU64,
}

impl Ledger {
    pub(crate) fn new(capacity: usize) -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            entries: (0..capacity).map(|_| Entry::default()).collect(),
            acknowledged: AtomicUsize::new(0),
        })
    }

    fn since(&self, at: Instant) -> u64 {
        (at.saturating_duration_since(self.began).as_nanos() as u64).max(1)
    }

    pub(crate) fn committed(&self, index: usize, at: Instant) {
        if let Some(entry) = self.entries.get(index) {
            entry.committed.store(self.since(at), Release);
        }
    }

    pub(crate) fn acknowledged(&self, index: usize, at: Instant) {
        if let Some(entry) = self.entries.get(index) {
            entry.acknowledged.store(self.since(at), Release);
            self.acknowledged.fetch_add(1, Release);
        }
    }

    /// Waits until so many are acknowledged.
    pub(crate) async fn all_acknowledged(&self, count: usize) -> Result<()> {
        let patience = Instant::now() + Duration::from_secs(120);
        while self.acknowledged.load(Acquire) < count {
            let late = || format!("of {count}, {}", self.acknowledged.load(Acquire));
            anyhow::ensure!(Instant::now() < patience, "acknowledged in 120 s: {}", late());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Milliseconds from commit to acknowledgement, of messages committed after `from`.
    pub(crate) fn latencies(&self, from: Duration) -> Vec<f64> {
        let from = from.as_nanos() as u64;
        let both = self.entries.iter().filter_map(|entry| {
            let (committed, acknowledged) =
                (entry.committed.load(Acquire), entry.acknowledged.load(Acquire));
            let counts = committed > from && acknowledged > 0;
            // A relay may be quicker than the answer to the COMMIT.
            counts.then(|| acknowledged.saturating_sub(committed) as f64 / 1e6)
        });
        both.collect()
    }
}

/// p50, p95, p99 and p99.9.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
}

impl Latency {
    pub(crate) fn of(millis: &[f64]) -> Self {
        Self {
            p50: percentile(millis, 0.5),
            p95: percentile(millis, 0.95),
            p99: percentile(millis, 0.99),
            p999: percentile(millis, 0.999),
        }
    }
}

/// The id of the message with this index, and back.
pub(crate) fn id_of(index: usize) -> MessageId {
    let mut bytes = [0x70; 16];
    bytes[8..].copy_from_slice(&(index as u64).to_be_bytes());
    MessageId::from_bytes(bytes)
}

pub(crate) fn index_of(id: MessageId) -> usize {
    let mut index = [0; 8];
    index.copy_from_slice(&id.as_bytes()[8..]);
    u64::from_be_bytes(index) as usize
}

/// Makes the business table, empty, and empties the outbox.
pub(crate) async fn prepare(site: &Site) -> Result<()> {
    let mut connection = site.connect().await?;
    run(&mut connection, "DROP TABLE IF EXISTS orders").await?;
    let orders = "CREATE TABLE orders (id BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY, \
                  customer INT NOT NULL, body VARBINARY(255) NOT NULL)";
    run(&mut connection, orders).await?;
    run(&mut connection, "TRUNCATE TABLE outbox").await?;
    site.rest().await
}

/// One business row, bound.
pub(crate) async fn insert_order(connection: &mut MySqlConnection, index: usize) -> Result<()> {
    sqlx::query("INSERT INTO orders (customer, body) VALUES (?, ?)")
        .bind(index as u32)
        .bind(&[b'o'; 200][..])
        .execute(connection)
        .await?;
    Ok(())
}

pub(crate) fn message(topic: &str, index: usize, payload: &[u8]) -> Result<Message> {
    let key = format!("key-{}", index % 10_000);
    Ok(Message::builder(topic).id(id_of(index)).key(key).payload(payload.to_vec()).build()?)
}

/// Writes as the load says. Gives how many transactions were committed, in how long.
pub(crate) async fn write(
    site: &Site,
    topic: &str,
    wake: &Wake,
    load: Load,
    ledger: &Arc<Ledger>,
) -> Result<(usize, Duration)> {
    let outbox = MySqlOutbox::new(MySqlWriter::new(&site.schema));
    let outbox = if load.waking == Waking::None { outbox } else { outbox.with_wake(wake.clone()) };
    let next = Arc::new(AtomicUsize::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let mut connections = vec![];
    for _ in 0..load.writers {
        connections.push(MySqlConnection::connect(&site.url).await?);
    }
    let began = Instant::now();
    let mut writing = JoinSet::new();
    for mut connection in connections {
        let (next, over, ledger) = (Arc::clone(&next), Arc::clone(&over), Arc::clone(ledger));
        let (outbox, topic) = (outbox.clone(), topic.to_owned());
        writing.spawn(async move {
            let payload = [b'p'; 1024];
            let mut count = 0_usize;
            while !over.load(Relaxed) {
                let index = next.fetch_add(1, Relaxed);
                let due = load
                    .rate
                    .map_or(began, |rate| began + Duration::from_secs_f64(index as f64 / rate));
                if due > began + load.time || Instant::now() > began + load.time {
                    over.store(true, Relaxed);
                    break;
                }
                tokio::time::sleep_until(due.into()).await;
                let mut tx = connection.begin().await?;
                insert_order(&mut tx, index).await?;
                outbox.add(&mut tx, message(&topic, index, &payload)?).await?;
                tx.commit().await?;
                ledger.committed(index, Instant::now());
                if load.waking == Waking::Wake {
                    outbox.wake();
                }
                count += 1;
            }
            anyhow::Ok(count)
        });
    }
    let mut written = 0;
    while let Some(done) = writing.join_next().await {
        written += done?.context("a writer")?;
    }
    Ok((written, began.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_tells_its_index() {
        assert_eq!(index_of(id_of(123_456)), 123_456);
    }

    #[test]
    fn only_what_was_committed_after_the_start_and_acknowledged_counts() {
        let ledger = Ledger::new(3);
        let at = |millis| ledger.began + Duration::from_millis(millis);
        for (index, committed, acknowledged) in [(0, 1, 50), (1, 20, 23)] {
            ledger.committed(index, at(committed));
            ledger.acknowledged(index, at(acknowledged));
        }
        ledger.committed(2, at(30));
        assert_eq!(ledger.latencies(Duration::from_millis(10)), [3.0]);
    }
}
