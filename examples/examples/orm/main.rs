//! The outbox beside an ORM: what to do when there is no sqlx connection to add through.
//!
//! `DATABASE_URL=mysql://user:password@host/database cargo run --example orm` runs on MySQL or
//! MariaDB, in tables of its own (`orm_*`). An order is changed and a message added in one
//! transaction, once through each of
//!
//! - `with_sea_orm.rs`: the statement and its values as data, run by sea-orm,
//! - `with_diesel.rs`: the same, run by diesel-async,
//! - `plain_sql.rs`: an INSERT that any language can send,
//!
//! and once more in a transaction that is rolled back. Then a dispatcher publishes what was
//! committed.

mod plain_sql;
mod with_diesel;
mod with_sea_orm;

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use outbox_core::Message;
use outbox_core::message::Limits;
use outbox_core::{Dispatcher, Store};
use outbox_mysql::sqlx::{self, Connection, MySqlConnection};
use outbox_mysql::{MySqlInsert, MySqlSchema, MySqlStore};
use outbox_testing::MemoryBroker;

#[tokio::main]
async fn main() -> Result<()> {
    let url = std::env::var("DATABASE_URL").context("set DATABASE_URL to a MySQL or MariaDB")?;
    let schema = MySqlSchema::new().with_prefix("orm_")?;
    let mut connection = MySqlConnection::connect(&url).await?;
    schema.migrate(&mut connection).await?;
    sqlx::query("CREATE TABLE IF NOT EXISTS orm_orders (id VARCHAR(64) PRIMARY KEY, state TEXT)")
        .execute(&mut connection)
        .await?;
    for table in ["DELETE FROM orm_orders", "DELETE FROM orm_outbox"] {
        sqlx::query(table).execute(&mut connection).await?; // Of an earlier run.
    }

    with_sea_orm::place_orders(&url, &schema).await.context("with sea-orm")?;
    with_diesel::place_orders(&url, &schema).await.context("with diesel")?;
    plain_sql::place_orders(&mut connection).await.context("with plain SQL")?;

    let (store, broker) = (MySqlStore::connect(&url, &schema).await?, MemoryBroker::new());
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build()?;
    let summary = dispatcher.run_until_empty().await?;
    println!("delivered: {}", summary.delivered);
    let mut published = BTreeMap::new();
    for record in broker.published() {
        let key = String::from_utf8(record.key.unwrap_or_default())?;
        println!("published: {key}: {}", String::from_utf8(record.payload.unwrap_or_default())?);
        *published.entry(key).or_insert(0) += 1;
    }

    let orders = sqlx::query_scalar("SELECT id FROM orm_orders ORDER BY id");
    let orders: Vec<String> = orders.fetch_all(&mut connection).await?;
    println!("orders: {}", orders.join(", "));
    ensure!(orders == ["diesel-1", "plain-1", "sea-1"], "an order is missing, or too many");
    ensure!(published.keys().eq(&orders), "published for other orders: {published:?}");
    ensure!(published.values().all(|count| *count == 1), "published twice: {published:?}");
    ensure!(store.backlog().await?.pending == 0, "something was not delivered");
    Ok(())
}

/// The message about an order, ready to be inserted. An `Outbox` would check the limits and stamp
/// the trace context; here that is up to you.
fn order_placed(schema: &MySqlSchema, order: &str) -> Result<MySqlInsert> {
    let message = Message::builder("orders").key(order).payload("placed").build()?;
    Limits::default().check(&message)?;
    Ok(MySqlInsert::new(schema, &[message]))
}
