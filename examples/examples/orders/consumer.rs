//! The other side: billing. Each message takes effect once, however often Kafka delivers it.
//!
//! It could be another service on another database. What matters is that the inbox is in the
//! database of the effects, so that both are committed in one transaction.

use std::time::Duration;

use anyhow::{Context, Result};
use outbox_core::MessageId;
use outbox_core::message::header;
use outbox_kafka::rdkafka::ClientConfig;
use outbox_kafka::rdkafka::consumer::{Consumer, StreamConsumer};
use outbox_kafka::rdkafka::message::{BorrowedMessage, Headers, Message};
use outbox_mysql::MySqlInbox;
use outbox_mysql::sqlx::{self, MySqlConnection, MySqlPool};
use tokio::time::{interval, sleep};

use crate::event::Event;
use crate::part::Stopped;

/// Nothing here refuses a second invoice for one order: that there is none is the inbox's doing.
pub const TABLE: &str = "CREATE TABLE IF NOT EXISTS shop_invoice (
    id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    order_id BIGINT UNSIGNED NOT NULL,
    cents BIGINT NOT NULL
)";

const PAUSE: Duration = Duration::from_secs(1);

/// For longer than a message can come back: from Kafka, which keeps records for 7 days by default, and
/// from the outbox, when a relay was down for long or an operator retries what was held or dead.
const REMEMBERED: Duration = Duration::from_secs(90 * 24 * 3600);
const PURGE_EVERY: Duration = Duration::from_secs(3600);
const PURGE_ROWS: u32 = 1_000;

pub struct Billing {
    pool: MySqlPool,
    inbox: MySqlInbox,
    records: StreamConsumer,
}

impl Billing {
    pub fn new(pool: MySqlPool, inbox: MySqlInbox, kafka: &str, topic: &str) -> Result<Self> {
        let records: StreamConsumer = ClientConfig::new()
            .set("bootstrap.servers", kafka)
            .set("group.id", format!("{topic}.billing"))
            // A consumer that comes later bills what was ordered before.
            .set("auto.offset.reset", "earliest")
            // Kafka is told only what `run` has stored: what took effect.
            .set("enable.auto.offset.store", "false")
            .create()?;
        records.subscribe(&[topic])?;
        Ok(Self { pool, inbox, records })
    }

    pub async fn run(self, mut stopped: Stopped) -> Result<()> {
        let mut purge = interval(PURGE_EVERY);
        loop {
            let record = tokio::select! {
                () = &mut stopped => break,
                _ = purge.tick() => {
                    self.purge().await;
                    continue;
                }
                record = self.records.recv() => record,
            };
            match record {
                Ok(record) => {
                    if !self.take(&record, &mut stopped).await {
                        break;
                    }
                }
                // librdkafka goes on by itself; a topic that is missing is told here.
                Err(error) => tracing::warn!(%error, "billing cannot read"),
            }
        }
        // Leaves the group, and tells Kafka what was stored. It waits for an answer.
        tokio::task::spawn_blocking(move || drop(self.records)).await?;
        Ok(())
    }

    /// Bills a record, and tries until it has: going past it would lose it. Tells whether to go on.
    async fn take(&self, record: &BorrowedMessage<'_>, stopped: &mut Stopped) -> bool {
        match read(record) {
            Ok((id, event)) => {
                while let Err(error) = self.bill(id, &event).await {
                    tracing::warn!(error = &*error, %id, "billing tries again");
                    tokio::select! {
                        () = &mut *stopped => return false,
                        () = sleep(PAUSE) => {}
                    }
                }
            }
            // It would never be understood, and those behind it would wait for ever.
            Err(error) => tracing::error!(error = &*error, "a record was left out"),
        }
        // After the commit, never before. Should this be lost, the record comes again, and the
        // inbox knows it.
        if let Err(error) = self.records.store_offset_from_message(record) {
            tracing::warn!(%error, "the partition is another consumer's by now");
        }
        true
    }

    async fn bill(&self, id: MessageId, event: &Event) -> Result<()> {
        let mut tx = self.pool.begin().await?;
        if self.inbox.accept(&mut tx, id).await? {
            match *event {
                Event::Placed { order, cents } => invoice(&mut tx, order, cents).await?,
                Event::Cancelled { order, cents } => invoice(&mut tx, order, -cents).await?,
            }
        }
        Ok(tx.commit().await?)
    }

    async fn purge(&self) {
        let purged = async {
            let mut connection = self.pool.acquire().await?;
            loop {
                let purged = self.inbox.purge(&mut connection, REMEMBERED, PURGE_ROWS).await?;
                if purged < u64::from(PURGE_ROWS) {
                    return anyhow::Ok(());
                }
            }
        };
        if let Err(error) = purged.await {
            tracing::warn!(error = &*error, "the inbox is purged another time");
        }
    }
}

async fn invoice(tx: &mut MySqlConnection, order: u64, cents: i64) -> sqlx::Result<()> {
    let sql = "INSERT INTO shop_invoice (order_id, cents) VALUES (?, ?)";
    sqlx::query(sql).bind(order).bind(cents).execute(tx).await.map(|_| ())
}

/// The id is the same whenever the message comes.
fn read(record: &BorrowedMessage<'_>) -> Result<(MessageId, Event)> {
    let mut headers = record.headers().into_iter().flat_map(Headers::iter);
    let id = headers.find(|found| found.key == header::ID).and_then(|found| found.value);
    let id = std::str::from_utf8(id.context("no id")?)?.parse()?;
    Ok((id, serde_json::from_slice(record.payload().context("no payload")?)?))
}
