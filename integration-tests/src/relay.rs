//! A relay in a process of its own, for tests to kill.

use std::{env, time::Duration};

use anyhow::{Context, Result};
use outbox_core::{
    Dispatcher,
    observe::{Event, Observer},
};
use outbox_kafka::KafkaBroker;
use outbox_mysql::{MySqlSchema, MySqlStore, sqlx::mysql::MySqlConnectOptions};
use tokio::signal::unix::{SignalKind, signal};

/// As short as the message timeout allows, so that a killed relay's lanes do not wait long.
const LEASE: Duration = Duration::from_secs(6);
const MESSAGE_TIMEOUT: Duration = Duration::from_millis(1_500);

struct Printer;

impl Observer for Printer {
    fn observe(&self, event: &Event) {
        match event {
            Event::LanesGained { lanes } => println!("gained {} lanes", lanes.len()),
            Event::LanesLost { lanes } => println!("lost {} lanes", lanes.len()),
            Event::LanesReleased { lanes } => println!("released {} lanes", lanes.len()),
            Event::StoreFailed { step, kind } => println!("store failed: {step:?}: {kind}"),
            Event::PublishFailed { kind, .. } => println!("publish failed: {kind}"),
            Event::CircuitOpened => println!("circuit opened"),
            _ => {}
        }
    }
}

/// Relays from the MySQL or MariaDB at `DATABASE_URL` to the Kafka at `KAFKA_BOOTSTRAP`, until
/// SIGTERM, with at most `RELAY_ROWS_IN_FLIGHT` rows in flight.
///
/// Prints a line when it gains, loses or gives back lanes, for each message that was not
/// acknowledged, and one at its end.
///
/// # Errors
///
/// When a variable is missing or wrong, and when the store cannot be used.
pub async fn run() -> Result<()> {
    let mut terminated = signal(SignalKind::terminate())?;
    let options: MySqlConnectOptions = variable("DATABASE_URL")?.parse()?;
    let store = MySqlStore::with_idle_timeout(options, &MySqlSchema::new(), LEASE);
    let broker = KafkaBroker::builder(variable("KAFKA_BOOTSTRAP")?)
        .message_timeout(MESSAGE_TIMEOUT)
        .build()?;
    let dispatcher = Dispatcher::builder(store, broker)
        .lease(LEASE)
        .rows_in_flight(variable("RELAY_ROWS_IN_FLIGHT")?.parse()?)
        .observer(Printer)
        .build()?;
    let asked = async move {
        terminated.recv().await;
    };
    println!("stopped: {:?}", dispatcher.run(asked).await?);
    Ok(())
}

fn variable(name: &str) -> Result<String> {
    env::var(name).with_context(|| name.to_owned())
}
