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

use anyhow::{Context, Result, bail, ensure};
use futures_util::TryStreamExt;
use outbox_core::message::header;
use rdkafka::{
    ClientContext,
    message::{DeliveryResult, Header, OwnedHeaders},
    producer::{BaseRecord, Producer, ProducerContext, ThreadedProducer},
};
use sqlx::{AssertSqlSafe, MySqlConnection, Row, mysql::MySqlRow};
use tokio::{
    runtime::Runtime,
    sync::{Notify, mpsc},
    task::{JoinHandle, JoinSet},
};
use uuid::{Uuid, fmt::Hyphenated};

use crate::{
    relay,
    site::{Site, first, run},
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
        let page = page(&mut connection, &Share::all(rows), after).await?;
        after = page.last().map(id).transpose()?.context("rows are missing")?;
        count += page.len();
    }
    Ok(began.elapsed())
}

/// What one of several relays drains: rows of some lanes, or all.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    /// A condition on the lane.
    lanes: &'static str,
    rows: usize,
}

impl Share {
    pub(crate) fn all(rows: usize) -> Self {
        Self { lanes: "TRUE", rows }
    }

    /// The outbox, which has so many rows, among 1, 2 or 4.
    pub(crate) async fn among(site: &Site, number: usize, rows: usize) -> Result<Vec<Self>> {
        let conditions = match number {
            1 => return Ok(vec![Self::all(rows)]),
            2 => &["lane < 8", "lane >= 8"][..],
            4 => &["lane < 4", "lane BETWEEN 4 AND 7", "lane BETWEEN 8 AND 11", "lane > 11"],
            number => bail!("no shares for {number}"),
        };
        let mut connection = site.connect().await?;
        let mut shares = vec![];
        for condition in conditions {
            let count = format!("SELECT COUNT(*) FROM outbox WHERE {condition}");
            let rows = first(&mut connection, &count).await?.parse()?;
            shares.push(Self { lanes: condition, rows });
        }
        ensure!(shares.iter().map(|share| share.rows).sum::<usize>() == rows, "rows are missing");
        Ok(shares)
    }
}

async fn page(
    connection: &mut MySqlConnection,
    share: &Share,
    after: u64,
) -> Result<Vec<MySqlRow>> {
    let query = format!(
        "SELECT id, message_key, payload FROM outbox WHERE id > ? AND {} ORDER BY id LIMIT ?",
        share.lanes
    );
    let rows = sqlx::query(AssertSqlSafe(query)).bind(after).bind(PAGE as u64).fetch(connection);
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
        let page = page(&mut connection, &Share::all(messages), after).await?;
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

/// Reads, produces and deletes, all at once; each share by connections, a producer and threads of
/// its own, so many of its connections to delete. Gives the time from the first read to the last
/// delete, and what `count` says then, while all threads live.
pub(crate) async fn overlapped<T>(
    site: &Site,
    bootstrap: &str,
    topic: &str,
    shares: &[Share],
    deleters: usize,
    stages: Stages,
    count: impl AsyncFnOnce() -> Result<T>,
) -> Result<(Duration, T)> {
    let mut lines = vec![];
    for share in shares {
        lines.push(Line::open(site, bootstrap, topic, share, deleters, stages.keys_only).await?);
    }
    let began = Instant::now();
    let running: Vec<_> = lines.into_iter().map(|line| line.start(topic, stages)).collect();
    let mut ended = vec![];
    for line in running {
        ended.push(line.end().await?);
    }
    let took = began.elapsed();
    let counted = count().await?;
    for (producer, runtime) in ended {
        drop(producer);
        runtime.shutdown_background();
    }
    Ok((took, counted))
}

/// The three stages of one share.
struct Line {
    share: Share,
    acked: Arc<Acked>,
    producer: ThreadedProducer<Collect>,
    reader: MySqlConnection,
    deleting: Vec<MySqlConnection>,
    runtime: Runtime,
}

/// A line that is under way.
struct Running {
    read: JoinHandle<Result<()>>,
    sent: JoinHandle<Result<ThreadedProducer<Collect>>>,
    deletes: Vec<JoinHandle<Result<()>>>,
    runtime: Runtime,
}

impl Line {
    async fn open(
        site: &Site,
        bootstrap: &str,
        topic: &str,
        share: &Share,
        deleters: usize,
        keys_only: bool,
    ) -> Result<Self> {
        let acked = Arc::new(Acked::default());
        let producer = producer(bootstrap, &acked)?;
        producer.client().fetch_metadata(Some(topic), Duration::from_secs(10))?;
        let reader = site.connect().await?;
        let mut deleting = vec![];
        for _ in 0..deleters {
            let mut connection = site.connect().await?;
            if keys_only {
                run(&mut connection, "SET SESSION binlog_row_image = MINIMAL").await?;
            }
            deleting.push(connection);
        }
        // The same threads as our relay has.
        let runtime = relay::runtime()?;
        Ok(Self { share: share.clone(), acked, producer, reader, deleting, runtime })
    }

    fn start(self, topic: &str, stages: Stages) -> Running {
        let Self { share, acked, producer, reader, deleting, runtime } = self;
        let (pages, mut arriving) = mpsc::channel::<Vec<MySqlRow>>(2);
        let rows = share.rows;
        let read = runtime.spawn(read_share(reader, share, pages));
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
        let delete = |connection| {
            let (acked, deleted) = (Arc::clone(&acked), Arc::clone(&deleted));
            runtime.spawn(delete_acked(connection, acked, deleted, rows, stages.ranges))
        };
        let deletes = deleting.into_iter().map(delete).collect();
        Running { read, sent, deletes, runtime }
    }
}

impl Running {
    /// Waits for the last delete. Gives what still has threads.
    async fn end(self) -> Result<(ThreadedProducer<Collect>, Runtime)> {
        self.read.await??;
        // It lives until its last answer came.
        let producer = self.sent.await??;
        for delete in self.deletes {
            delete.await??;
        }
        Ok((producer, self.runtime))
    }
}

async fn read_share(
    mut reader: MySqlConnection,
    share: Share,
    pages: mpsc::Sender<Vec<MySqlRow>>,
) -> Result<()> {
    let (mut after, mut count) = (0, 0);
    while count < share.rows {
        let page = page(&mut reader, &share, after).await?;
        after = page.last().map(id).transpose()?.context("rows are missing")?;
        count += page.len();
        pages.send(page).await?;
    }
    Ok(())
}

/// Deletes what is acknowledged, beside others, until all of them have deleted so many rows.
async fn delete_acked(
    mut connection: MySqlConnection,
    acked: Arc<Acked>,
    deleted: Arc<AtomicUsize>,
    rows: usize,
    ranges: bool,
) -> Result<()> {
    while deleted.load(Ordering::Acquire) < rows {
        let full = || acked.ids.lock().unwrap_or_else(PoisonError::into_inner).len() >= LIST;
        if !full() {
            let _ = tokio::time::timeout(LINGER, acked.arrived.notified()).await;
        }
        let mut list: Vec<u64> = {
            let mut ids = acked.ids.lock().unwrap_or_else(PoisonError::into_inner);
            if ranges {
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
        let text = if ranges { range_text(&list) } else { delete_text(&list) };
        run(&mut connection, &text).await?;
    }
    Ok(())
}
