//! Plain SQL, as any language can send it. The driver below stands for yours.

use anyhow::Result;
use outbox_mysql::sqlx::{self, Connection, MySqlConnection};

/// An id, a topic, a key and a payload are enough. Never write `lane`: the database computes it.
///
/// The id must be unique, as a UUID is: consumers drop a message whose id they have seen. A key of
/// NULL means "no order", a payload of NULL is a tombstone.
const ADD: &str = "INSERT INTO orm_outbox (message_id, topic, message_key, payload) \
                   VALUES (UNHEX(REPLACE(UUID(), '-', '')), 'orders', ?, 'placed')";

pub async fn place_orders(connection: &mut MySqlConnection) -> Result<()> {
    let mut tx = connection.begin().await?;
    place(&mut tx, "plain-1").await?;
    tx.commit().await?;
    let mut tx = connection.begin().await?;
    place(&mut tx, "plain-rolled-back").await?;
    tx.rollback().await?;
    Ok(())
}

async fn place(tx: &mut MySqlConnection, order: &str) -> Result<()> {
    let insert = sqlx::query("INSERT INTO orm_orders (id, state) VALUES (?, 'placed')");
    insert.bind(order).execute(&mut *tx).await?;
    sqlx::query(ADD).bind(order).execute(&mut *tx).await?;
    Ok(())
}
