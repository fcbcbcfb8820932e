//! The stages of a relay alone, and overlapped with nothing in between: no order per key, no
//! retry, no lease, no bookkeeping. What they reach is the limit of any relay.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use futures_util::TryStreamExt;
use outbox_core::message::header;
use rdkafka::{
    ClientContext,
    message::{DeliveryResult, Header, OwnedHeaders},
    producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer},
};
use sqlx::{MySqlConnection, Row, mysql::MySqlRow};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
};
use uuid::{Uuid, fmt::Hyphenated};

use crate::{
    relay,
    site::{Site, run},
};

/// Rows of a page; 5,000 read no faster.
const PAGE: usize = 4_000;
/// The longest list of a delete: MariaDB makes a temporary table of longer ones.
const LIST: usize = 900;
/// So many neighbours are deleted by a range.
const RUN: usize = 8;
/// Messages at the producer; more do not make it faster.
const WINDOW: usize = 20_000;
/// How long a deleter waits for a full list.
const LINGER: Duration = Duration::from_millis(20);

/// Reads all rows by pages. Gives the time.
pub(crate) async fn read(site: &Site, rows: usize) -> Result<Duration> {
    let mut connection = site.connect().await?;
    let began = Instant::now();
    let (mut after, mut count) = (0, 0);
    while count < rows {
        let page = page(&mut connection, after).await?;
        after = page.last().map(id).transpose()?.context("rows are missing")?;
        count += page.len();
    }
    Ok(began.elapsed())
}

async fn page(connection: &mut MySqlConnection, after: u64) -> Result<Vec<MySqlRow>> {
    let query = "SELECT id, message_key, payload FROM outbox WHERE id > ? ORDER BY id LIMIT ?";
    let rows = sqlx::query(query).bind(after).bind(PAGE as u64).fetch(connection);
    Ok(rows.try_collect().await?)
}

fn id(row: &MySqlRow) -> Result<u64> {
    Ok(row.try_get_unchecked(0)?)
}

/// Deletes the rows with the ids 1 to `rows`, over so many connections. Gives the time.
pub(crate) async fn delete(site: &Site, rows: usize, connections: usize) -> Result<Duration> {
    let ids: Vec<u64> = (1..=rows as u64).collect();
    let lists: Arc<Mutex<VecDeque<Vec<u64>>>> =
        Arc::new(Mutex::new(ids.chunks(LIST).map(<[u64]>::to_vec).collect()));
    let mut tasks = JoinSet::new();
    let mut opened = vec![];
    for _ in 0..connections {
        opened.push(site.connect().await?);
    }
    let began = Instant::now();
    for mut connection in opened {
        let lists = Arc::clone(&lists);
        tasks.spawn(async move {
            loop {
                let list = lists.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(list) = list else { return anyhow::Ok(()) };
                run(&mut connection, &delete_text(&list)).await?;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(began.elapsed())
}

/// What the three stages do as our relay does it, or without it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stages {
    /// Each record has the id of its message in a header.
    pub(crate) ids: bool,
    /// The binary log keeps only the key of a deleted row.
    pub(crate) keys_only: bool,
    /// Runs of ids are deleted by ranges, the lowest ids first.
    pub(crate) ranges: bool,
}

fn delete_text(ids: &[u64]) -> String {
    let list: Vec<String> = ids.iter().map(u64::to_string).collect();
    format!("DELETE FROM outbox WHERE id IN ({})", list.join(","))
}

/// Runs as ranges but for the last of each, all else as a list, as our store does.
fn range_text(ids: &[u64]) -> String {
    let (mut arms, mut alone) = (vec![], vec![]);
    for run in ids.chunk_by(|id, next| id + 1 == *next) {
        match run {
            [first, .., before, last] if run.len() >= RUN => {
                arms.push(format!("id BETWEEN {first} AND {before}"));
                alone.push(last.to_string());
            }
            _ => alone.extend(run.iter().map(u64::to_string)),
        }
    }
    arms.push(format!("id IN ({})", alone.join(",")));
    format!("DELETE FROM outbox WHERE {}", arms.join(" OR "))
}

/// What was acknowledged and not deleted yet.
#[derive(Debug, Default)]
struct Acked {
    ids: Mutex<VecDeque<u64>>,
    count: AtomicUsize,
    failed: AtomicUsize,
    arrived: Notify,
}

/// Collects the ids of acknowledged messages.
pub(crate) struct Collect(Arc<Acked>);

impl ClientContext for Collect {}

impl ProducerContext for Collect {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, id: usize) {
        if result.is_err() {
            self.0.failed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut ids = self.0.ids.lock().unwrap_or_else(PoisonError::into_inner);
        ids.push_back(id as u64);
        let full = ids.len().is_multiple_of(LIST);
        drop(ids);
        self.0.count.fetch_add(1, Ordering::Release);
        if full {
            self.0.arrived.notify_one();
        }
    }
}

/// The client as our broker sets it up.
fn producer(bootstrap: &str, acked: &Arc<Acked>) -> Result<ThreadedProducer<Collect>> {
    let mut config = rdkafka::ClientConfig::new();
    config
        .set("bootstrap.servers", bootstrap)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        .set("linger.ms", "1");
    Ok(config.create_with_context(Collect(Arc::clone(acked)))?)
}

/// Hands one message over once there is room.
fn send(
    producer: &ThreadedProducer<Collect>,
    acked: &Acked,
    topic: &str,
    sent: usize,
    row: &MySqlRow,
    ids: bool,
) -> Result<()> {
    while sent.saturating_sub(acked.count.load(Ordering::Acquire)) >= WINDOW {
        ensure!(acked.failed.load(Ordering::Relaxed) == 0, "Kafka refused messages");
        thread::sleep(Duration::from_micros(50));
    }
    let mut record = BaseRecord::with_opaque_to(topic, id(row)? as usize);
    let (key, payload): (&[u8], &[u8]) = (row.try_get_unchecked(1)?, row.try_get_unchecked(2)?);
    record.key = Some(key);
    record.payload = Some(payload);
    if ids {
        let mut text = [0; Hyphenated::LENGTH];
        let value = Some(Uuid::from_u128(sent as u128).hyphenated().encode_lower(&mut text));
        let header = Header { key: header::ID, value: value.map(|value| &*value) };
        record.headers = Some(OwnedHeaders::new_with_capacity(1).insert(header));
    }
    producer.send(record).map_err(|(error, _)| error)?;
    Ok(())
}

/// Produces so many messages from memory: rows of the outbox, over and over. Gives the time.
pub(crate) async fn produce(
    site: &Site,
    bootstrap: &str,
    topic: &str,
    messages: usize,
) -> Result<Duration> {
    let mut connection = site.connect().await?;
    let (mut rows, mut after) = (vec![], 0);
    while rows.len() < messages.min(40_000) {
        let page = page(&mut connection, after).await?;
        after = page.last().map(id).transpose()?.context("rows are missing")?;
        rows.extend(page);
    }
    let acked = Arc::new(Acked::default());
    let producer = producer(bootstrap, &acked)?;
    let topic = topic.to_owned();
    // The first connection and the first metadata are no part of a rate.
    producer.client().fetch_metadata(Some(&topic), Duration::from_secs(10))?;
    tokio::task::spawn_blocking(move || {
        let began = Instant::now();
        for sent in 0..messages {
            send(&producer, &acked, &topic, sent, &rows[sent % rows.len()], true)?;
        }
        while acked.count.load(Ordering::Acquire) < messages {
            ensure!(acked.failed.load(Ordering::Relaxed) == 0, "Kafka refused messages");
            thread::sleep(Duration::from_micros(50));
        }
        Ok(began.elapsed())
    })
    .await?
}

/// Reads, produces and deletes, all at once, over so many connections that delete. Gives the time
/// from the first read to the last delete, and what `count` says then, while all threads live.
pub(crate) async fn overlapped<T>(
    site: &Site,
    bootstrap: &str,
    topic: &str,
    rows: usize,
    deleters: usize,
    stages: Stages,
    count: impl AsyncFnOnce() -> Result<T>,
) -> Result<(Duration, T)> {
    let acked = Arc::new(Acked::default());
    let producer = producer(bootstrap, &acked)?;
    producer.client().fetch_metadata(Some(topic), Duration::from_secs(10))?;
    let mut reader = site.connect().await?;
    let mut deleting = vec![];
    for _ in 0..deleters {
        let mut connection = site.connect().await?;
        if stages.keys_only {
            run(&mut connection, "SET SESSION binlog_row_image = MINIMAL").await?;
        }
        deleting.push(connection);
    }
    // The same threads as our relay has.
    let runtime = relay::runtime()?;
    let began = Instant::now();
    let (pages, mut arriving) = mpsc::channel::<Vec<MySqlRow>>(2);
    let read = runtime.spawn(async move {
        let (mut after, mut count) = (0, 0);
        while count < rows {
            let page = page(&mut reader, after).await?;
            after = page.last().map(id).transpose()?.context("rows are missing")?;
            count += page.len();
            pages.send(page).await?;
        }
        anyhow::Ok(())
    });
    let sent = {
        let (acked, topic) = (Arc::clone(&acked), topic.to_owned());
        runtime.spawn_blocking(move || {
            let mut sent = 0;
            while let Some(page) = arriving.blocking_recv() {
                for row in &page {
                    send(&producer, &acked, &topic, sent, row, stages.ids)?;
                    sent += 1;
                }
            }
            anyhow::Ok(producer)
        })
    };
    let deleted = Arc::new(AtomicUsize::new(0));
    let mut deletes = vec![];
    for mut connection in deleting {
        let (acked, deleted) = (Arc::clone(&acked), Arc::clone(&deleted));
        deletes.push(runtime.spawn(async move {
            while deleted.load(Ordering::Acquire) < rows {
                let full =
                    || acked.ids.lock().unwrap_or_else(PoisonError::into_inner).len() >= LIST;
                if !full() {
                    let _ = tokio::time::timeout(LINGER, acked.arrived.notified()).await;
                }
                let mut list: Vec<u64> = {
                    let mut ids = acked.ids.lock().unwrap_or_else(PoisonError::into_inner);
                    if stages.ranges {
                        ids.make_contiguous().sort_unstable();
                    }
                    let count = ids.len().min(LIST);
                    ids.drain(..count).collect()
                };
                if list.is_empty() {
                    continue;
                }
                list.sort_unstable();
                deleted.fetch_add(list.len(), Ordering::Release);
                let text = if stages.ranges { range_text(&list) } else { delete_text(&list) };
                run(&mut connection, &text).await?;
            }
            anyhow::Ok(())
        }));
    }
    read.await??;
    // It lives until its last answer came.
    let producer = sent.await??;
    for delete in deletes {
        delete.await??;
    }
    let took = began.elapsed();
    let counted = count().await?;
    drop(producer);
    runtime.shutdown_background();
    Ok((took, counted))
}
