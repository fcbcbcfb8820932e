//! Teaches how a service uses the outbox: an order and the message about it are committed in one
//! transaction, a dispatcher inside the service publishes the message, and a consumer bills each
//! order once, however often Kafka delivers.
//!
//! ```text
//! kafka-topics.sh --bootstrap-server localhost:9092 --create --topic shop.orders --partitions 3
//! DATABASE_URL=mysql://user:password@localhost/shop KAFKA_BOOTSTRAP=localhost:9092 \
//!     cargo run --example orders
//! curl -i localhost:3000/orders -H 'content-type: application/json' \
//!     -d '{"customer": "Ada", "cents": 950}'
//! curl localhost:3000/orders/1
//! curl -X POST localhost:3000/orders/1/cancel
//! curl -i localhost:3000/health
//! ```
//!
//! Its tables begin with `shop_`, and it makes them itself. `ORDERS_TOPIC` and `ORDERS_HTTP` set
//! another topic and another address. Read on in this order:
//!
//! - `repository.rs`: the transaction. Handlers know neither SQL nor the outbox.
//! - `event.rs`: what is said about orders, for both sides.
//! - `consumer.rs`: the other side, with an inbox that makes effects happen once.
//! - `http.rs`: the handlers, and health that follows from the relay's status.
//! - here: how it starts and, below, how it stops. What adds messages stops before what publishes
//!   them, so that as little as possible waits for the next start. Whatever waits is not lost.

mod consumer;
mod event;
mod http;
mod part;
mod repository;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use outbox_core::{Dispatcher, Wake};
use outbox_kafka::KafkaBroker;
use outbox_mysql::sqlx::{self, MySqlPool};
use outbox_mysql::{MySqlInbox, MySqlOutbox, MySqlSchema, MySqlStore, MySqlWriter};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tracing_subscriber::EnvFilter;

use crate::consumer::Billing;
use crate::part::Part;
use crate::repository::Orders;

/// With the 5 s that HTTP may take this stays below the 30 s that Kubernetes gives by default.
const DRAIN_LIMIT: Duration = Duration::from_secs(15);

#[tokio::main]
async fn main() -> Result<()> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    let (database, kafka) = (variable("DATABASE_URL")?, variable("KAFKA_BOOTSTRAP")?);
    let topic = variable("ORDERS_TOPIC").unwrap_or_else(|_| "shop.orders".to_owned());
    let address = variable("ORDERS_HTTP").unwrap_or_else(|_| "127.0.0.1:3000".to_owned());

    let pool = MySqlPool::connect(&database).await.context("the database")?;
    let schema = MySqlSchema::new().with_prefix("shop_")?;
    schema.migrate(&mut *pool.acquire().await?).await?;
    for table in [repository::TABLE, consumer::TABLE] {
        sqlx::raw_sql(table).execute(&pool).await?;
    }

    // Shared by the two sides in this process: what is in its lanes is published at the commit, not at
    // the next poll.
    let wake = Wake::default();
    let outbox = MySqlOutbox::new(MySqlWriter::new(&schema)).with_wake(wake.clone());
    let orders = Orders::new(pool.clone(), outbox, &topic);
    let store = MySqlStore::from_options(database.parse()?, &schema);
    let broker = KafkaBroker::builder(&kafka).build()?;
    let dispatcher =
        Dispatcher::builder(store, broker).wake(wake).drain_limit(DRAIN_LIMIT).build()?;
    let router = http::router(orders, dispatcher.handle());
    let billing = Billing::new(pool, MySqlInbox::new(&schema, "billing")?, &kafka, &topic)?;
    let listener = TcpListener::bind(&address).await.context(address)?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    println!("orders: listening on http://{}", listener.local_addr()?);

    let ended = Arc::new(Notify::new());
    let relay = Part::start(&ended, async move |stopped| {
        let summary = dispatcher.run(stopped).await?;
        println!("orders: the relay has stopped, {} delivered", summary.delivered);
        Ok(())
    });
    let billing = Part::start(&ended, async move |stopped| billing.run(stopped).await);
    let http =
        Part::start(&ended, async move |stopped| http::serve(listener, router, stopped).await);

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        // One part that fails ends the service, or it would take orders that nobody publishes.
        () = ended.notified() => {}
    }
    println!("orders: stopping");
    // Requests add messages, and billing does not: it may wait for the database beside the relay.
    let http = http.stop().await;
    let (billing, relay) = tokio::join!(billing.stop(), relay.stop());
    [http, billing, relay].into_iter().collect()
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("{name} must be set"))
}
