//! A shop on SQLite for tests to kill. `writer` changes aggregates in the file at `DATABASE` and
//! adds messages for `TOPIC`; `relay` publishes them to the Kafka at `KAFKA_BOOTSTRAP`, with at
//! most `RELAY_ROWS_IN_FLIGHT` rows in flight.
//!
//! The writer keeps a record of every message in a table of its own, in the transaction of the
//! message: what is in there was committed, whatever happened to the process.

use std::{env, time::Duration};

use anyhow::{Context, Result, bail};
use outbox_core::{
    Dispatcher, Message, Outbox,
    observe::{Event, Observer},
};
use outbox_kafka::KafkaBroker;
use outbox_sqlite::{
    SqliteSchema, SqliteStore, SqliteWriter,
    sqlx::{
        self, ConnectOptions, Connection,
        sqlite::{SqliteConnectOptions, SqliteConnection},
    },
};
use rand::Rng;
use tokio::signal::unix::{SignalKind, signal};

/// As short as the message timeout allows, so that a killed relay's lane does not wait long.
const LEASE: Duration = Duration::from_secs(6);
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Between two transactions, so that the backlog of a killed relay stays small.
const PAUSE: Duration = Duration::from_millis(5);
const ROLLED_BACK: f64 = 0.1;

#[tokio::main]
async fn main() -> Result<()> {
    let options = SqliteConnectOptions::new()
        .filename(variable("DATABASE")?)
        .busy_timeout(Duration::from_secs(30));
    match env::args().nth(1).as_deref() {
        Some("writer") => write(options).await,
        Some("relay") => relay(options).await,
        _ => bail!("say writer or relay"),
    }
}

async fn write(options: SqliteConnectOptions) -> Result<()> {
    let mut connection = options.connect().await?;
    let outbox = Outbox::new(SqliteWriter::new(&SqliteSchema::new()));
    let topic = variable("TOPIC")?;
    println!("writing");
    loop {
        transact(&mut connection, &outbox, &topic).await?;
        tokio::time::sleep(PAUSE).await;
    }
}

/// One or two messages of one aggregate, numbered in the order of their commits.
async fn transact(
    connection: &mut SqliteConnection,
    outbox: &Outbox<SqliteWriter>,
    topic: &str,
) -> Result<()> {
    let (messages, commit) = {
        let mut random = rand::rng();
        (random.random_range(1..=2), !random.random_bool(ROLLED_BACK))
    };
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    let (aggregate, last): (i64, i64) = sqlx::query_as(
        "UPDATE aggregate SET version = version + ? \
         WHERE id = (SELECT id FROM aggregate ORDER BY random() LIMIT 1) RETURNING id, version",
    )
    .bind(messages)
    .fetch_one(&mut *tx)
    .await?;
    for sequence in last - messages + 1..=last {
        let message = Message::builder(topic)
            .key(aggregate.to_string())
            .payload(format!("{aggregate}:{sequence}"))
            .build()?;
        let id = outbox.add(&mut tx, message).await?;
        sqlx::query("INSERT INTO history (message_id, aggregate, sequence) VALUES (?, ?, ?)")
            .bind(id.as_bytes().to_vec())
            .bind(aggregate)
            .bind(sequence)
            .execute(&mut *tx)
            .await?;
    }
    if commit {
        tx.commit().await?
    } else {
        tx.rollback().await?
    }
    Ok(())
}

struct Printer;

impl Observer for Printer {
    fn observe(&self, event: &Event) {
        match event {
            Event::LanesGained { .. } => println!("gained its lane"),
            Event::LanesLost { .. } => println!("lost its lane"),
            Event::StoreFailed { step, kind } => println!("store failed: {step:?}: {kind}"),
            Event::PublishFailed { kind, .. } => println!("publish failed: {kind}"),
            _ => {}
        }
    }
}

async fn relay(options: SqliteConnectOptions) -> Result<()> {
    let store = SqliteStore::from_options(options, &SqliteSchema::new());
    let broker = KafkaBroker::builder(variable("KAFKA_BOOTSTRAP")?)
        .message_timeout(MESSAGE_TIMEOUT)
        .build()?;
    let dispatcher = Dispatcher::builder(store, broker)
        .lease(LEASE)
        .rows_in_flight(variable("RELAY_ROWS_IN_FLIGHT")?.parse()?)
        .observer(Printer)
        .build()?;
    let mut terminated = signal(SignalKind::terminate())?;
    let asked = async move {
        terminated.recv().await;
    };
    println!("stopped: {:?}", dispatcher.run(asked).await?);
    Ok(())
}

fn variable(name: &str) -> Result<String> {
    env::var(name).with_context(|| name.to_owned())
}
