//! The checking consumer.
//!
//! It lives in the supervisor and reads past the proxies, because it is what measures: nothing that
//! befalls the parts may keep it from seeing when a message came. It reads every offset once.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use outbox_core::{MessageId, message::header};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    message::Headers,
};

use crate::{check::Appearance, entry::Entry};

/// How long it may take to read to the end of a topic, and to ask where the end is.
const PATIENCE: Duration = Duration::from_secs(180);
const METADATA: Duration = Duration::from_secs(10);

/// Reads a topic while it is written to.
#[derive(Debug)]
pub(crate) struct Consumer {
    reading: JoinHandle<Result<Vec<Appearance>>>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    read: AtomicUsize,
    /// Set at the end: the offsets, by partition, that it must reach.
    ends: OnceLock<Vec<i64>>,
}

impl Consumer {
    /// Begins to read; times are told since `began`.
    pub(crate) fn start(
        client: ClientConfig,
        topic: String,
        partitions: i32,
        began: Instant,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let told = Arc::clone(&shared);
        let reading = thread::spawn(move || read(&client, &topic, partitions, began, &told));
        Self { reading, shared }
    }

    /// How many records it has read.
    pub(crate) fn read(&self) -> usize {
        self.shared.read.load(Ordering::Relaxed)
    }

    /// Reads on to these ends, by partition, and gives all.
    pub(crate) async fn end(self, ends: Vec<i64>) -> Result<Vec<Appearance>> {
        let _ = self.shared.ends.set(ends);
        tokio::task::spawn_blocking(move || {
            self.reading.join().map_err(|_| anyhow!("the consumer panicked"))?
        })
        .await?
    }
}

fn read(
    client: &ClientConfig,
    topic: &str,
    partitions: i32,
    began: Instant,
    shared: &Shared,
) -> Result<Vec<Appearance>> {
    let consumer = consumer(client)?;
    let mut assignment = TopicPartitionList::new();
    for partition in 0..partitions {
        assignment.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&assignment)?;
    let mut next = vec![0; partitions.try_into()?];
    let mut appearances = vec![];
    let mut told = None;
    loop {
        if let Some(ends) = shared.ends.get() {
            if next.iter().zip(ends).all(|(next, end)| next >= end) {
                return Ok(appearances);
            }
            let since: &mut Instant = told.get_or_insert_with(Instant::now);
            ensure!(since.elapsed() < PATIENCE, "{topic} was read to {next:?} only, not {ends:?}");
        }
        // Brokers come and go: an error is none of the records.
        let Some(Ok(record)) = consumer.poll(Duration::from_millis(100)) else { continue };
        let next = &mut next[usize::try_from(record.partition())?];
        // After an election a partition may be read from its beginning again.
        if record.offset() < *next {
            continue;
        }
        let (partition, offset) = (record.partition(), record.offset());
        ensure!(offset == *next, "{topic}/{partition} has nothing from {next} to {offset}");
        *next += 1;
        appearances.push(appearance(&record, began.elapsed()));
        shared.read.fetch_add(1, Ordering::Relaxed);
    }
}

/// Where the partitions of a topic end now.
pub(crate) async fn ends(client: ClientConfig, topic: String, partitions: i32) -> Result<Vec<i64>> {
    tokio::task::spawn_blocking(move || {
        let consumer = consumer(&client)?;
        let deadline = Instant::now() + PATIENCE;
        let end = |partition| loop {
            match consumer.fetch_watermarks(&topic, partition, METADATA) {
                Ok((_, high)) => return Ok(high),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("the end of {topic}/{partition}"));
                }
                // Leaders are elected, perhaps.
                Err(_) => thread::sleep(Duration::from_millis(200)),
            }
        };
        (0..partitions).map(end).collect()
    })
    .await?
}

fn consumer(client: &ClientConfig) -> Result<BaseConsumer> {
    let mut client = client.clone();
    client.set("group.id", "checker").set("auto.offset.reset", "earliest");
    client.set("enable.auto.commit", "false");
    Ok(client.create()?)
}

fn appearance(record: &impl Message, at: Duration) -> Appearance {
    let headers = record.headers().into_iter().flat_map(Headers::iter);
    let id = headers.filter(|it| it.key == header::ID).find_map(|it| it.value).and_then(parse);
    let entry = Entry::of(record.key().unwrap_or_default(), record.payload().unwrap_or_default());
    // No message has this id: without one, the record is a ghost.
    let id = id.unwrap_or(MessageId::from_bytes([0; 16]));
    Appearance { id, partition: record.partition(), entry, at }
}

fn parse(id: &[u8]) -> Option<MessageId> {
    std::str::from_utf8(id).ok()?.parse().ok()
}
