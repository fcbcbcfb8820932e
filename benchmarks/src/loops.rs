//! How relays are usually written.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use rdkafka::producer::{FutureProducer, FutureRecord, future_producer::DeliveryFuture};
use sqlx::{AssertSqlSafe, MySqlConnection, Row, mysql::MySqlRow};
use tokio::task::JoinSet;

use crate::site::{Site, run};

/// Rows that a loop takes at once.
const TAKEN: usize = 100;
/// Rows of a batch that is locked; more lock longer and are hardly faster.
const BATCH: usize = 500;

fn producer(bootstrap: &str) -> Result<FutureProducer> {
    let mut config = rdkafka::ClientConfig::new();
    config
        .set("bootstrap.servers", bootstrap)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        // The best case for whoever waits for each message.
        .set("linger.ms", "0");
    Ok(config.create()?)
}

fn send(producer: &FutureProducer, topic: &str, row: &MySqlRow) -> Result<DeliveryFuture> {
    let (key, payload): (&[u8], &[u8]) = (row.try_get_unchecked(1)?, row.try_get_unchecked(2)?);
    let record = FutureRecord::to(topic).key(key).payload(payload);
    producer.send_result(record).map_err(|(error, _)| error.into())
}

/// The classic loop: lock rows by an update, read them, publish one, wait, update its row, and so
/// on. On a table as it has, with a state and its indexes. Gives the time.
pub(crate) async fn classic(
    site: &Site,
    bootstrap: &str,
    topic: &str,
    rows: usize,
) -> Result<Duration> {
    let mut connection = site.connect().await?;
    run(
        &mut connection,
        &format!(
            "DROP TABLE IF EXISTS classic; \
             CREATE TABLE classic (id BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY, \
               message_key VARBINARY(255), payload BLOB, state TINYINT NOT NULL DEFAULT 0, \
               locked_by INT NULL, locked_at DATETIME(6) NULL, processed_at DATETIME(6) NULL, \
               attempts INT NOT NULL DEFAULT 0, KEY (state, id), KEY (locked_by)); \
             INSERT INTO classic (message_key, payload) \
             SELECT message_key, payload FROM outbox ORDER BY id LIMIT {rows}"
        ),
    )
    .await?;
    site.rest().await?;
    let producer = producer(bootstrap)?;
    let began = Instant::now();
    let mut done = 0;
    while done < rows {
        run(
            &mut connection,
            &format!(
                "UPDATE classic SET locked_by = 1, locked_at = NOW(6) \
                 WHERE state = 0 AND locked_by IS NULL ORDER BY id LIMIT {TAKEN}"
            ),
        )
        .await?;
        let query = "SELECT id, message_key, payload FROM classic WHERE locked_by = 1 ORDER BY id";
        let taken = sqlx::query(query).fetch_all(&mut connection).await?;
        for row in &taken {
            send(&producer, topic, row)?.await?.map_err(|(error, _)| error)?;
            let id: u64 = row.try_get_unchecked(0)?;
            let update = "UPDATE classic SET state = 1, locked_by = NULL, locked_at = NULL, \
                          processed_at = NOW(6), attempts = attempts + 1 WHERE id = ?";
            sqlx::query(update).bind(id).execute(&mut connection).await?;
        }
        done += taken.len();
    }
    Ok(began.elapsed())
}

/// The batched loop: lock a batch with SKIP LOCKED, publish it at once, delete it, commit; so many
/// of these loops in parallel. No order per key. Gives the time.
pub(crate) async fn skip_locked(
    site: &Site,
    bootstrap: &str,
    topic: &str,
    rows: usize,
    parallel: usize,
) -> Result<Duration> {
    let producer = producer(bootstrap)?;
    let done = Arc::new(AtomicUsize::new(0));
    let mut connections = vec![];
    for _ in 0..parallel {
        connections.push(site.connect().await?);
    }
    let began = Instant::now();
    let mut loops = JoinSet::new();
    for mut connection in connections {
        let (producer, done, topic) = (producer.clone(), Arc::clone(&done), topic.to_owned());
        loops.spawn(async move {
            while done.load(Relaxed) < rows {
                match batch(&mut connection, &producer, &topic).await {
                    Ok(count) => {
                        done.fetch_add(count, Relaxed);
                    }
                    // They deadlock with each other; whoever lost begins again.
                    Err(error) if is_deadlock(&error) => run(&mut connection, "ROLLBACK").await?,
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        });
    }
    while let Some(ended) = loops.join_next().await {
        ended??;
    }
    Ok(began.elapsed())
}

async fn batch(
    connection: &mut MySqlConnection,
    producer: &FutureProducer,
    topic: &str,
) -> Result<usize> {
    run(connection, "BEGIN").await?;
    let query = format!(
        "SELECT id, message_key, payload FROM outbox ORDER BY id LIMIT {BATCH} \
         FOR UPDATE SKIP LOCKED"
    );
    let rows = sqlx::query(AssertSqlSafe(query)).fetch_all(&mut *connection).await?;
    if rows.is_empty() {
        run(connection, "COMMIT").await?;
        tokio::time::sleep(Duration::from_millis(1)).await;
        return Ok(0);
    }
    let sent: Vec<DeliveryFuture> =
        rows.iter().map(|row| send(producer, topic, row)).collect::<Result<_>>()?;
    for delivery in sent {
        delivery.await?.map_err(|(error, _)| anyhow!(error))?;
    }
    let ids: Vec<String> = rows
        .iter()
        .map(|row| anyhow::Ok(row.try_get_unchecked::<u64, _>(0)?.to_string()))
        .collect::<Result<_>>()?;
    run(connection, &format!("DELETE FROM outbox WHERE id IN ({})", ids.join(","))).await?;
    run(connection, "COMMIT").await?;
    Ok(rows.len())
}

fn is_deadlock(error: &anyhow::Error) -> bool {
    let error = error.chain().find_map(|cause| cause.downcast_ref::<sqlx::Error>());
    let database = error.and_then(sqlx::Error::as_database_error);
    database
        .and_then(|error| error.try_downcast_ref())
        .is_some_and(|error: &sqlx::mysql::MySqlDatabaseError| error.number() == 1213)
}
