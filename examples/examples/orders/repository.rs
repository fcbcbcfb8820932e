//! Orders in MySQL. Each change is one transaction: the row, and the message that tells of it.
//!
//! The functions at the end take the transaction from their caller. A repository that took a
//! connection of its own from a pool could not share one with the outbox.

use outbox_core::AddError;
use outbox_core::message::MessageError;
use outbox_mysql::MySqlOutbox;
use outbox_mysql::sqlx::{self, MySqlConnection, MySqlPool};
use serde::{Deserialize, Serialize};

use crate::event::Event;

pub const TABLE: &str = "CREATE TABLE IF NOT EXISTS shop_order (
    id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
    customer VARCHAR(100) NOT NULL,
    cents BIGINT NOT NULL,
    cancelled BOOLEAN NOT NULL DEFAULT FALSE
)";

/// As wide as the column.
const MAX_CUSTOMER: usize = 100;

#[derive(Deserialize)]
pub struct NewOrder {
    pub customer: String,
    pub cents: u32,
}

#[derive(Serialize)]
pub struct Order {
    pub id: u64,
    pub customer: String,
    pub cents: i64,
    pub cancelled: bool,
}

#[derive(Clone)]
pub struct Orders {
    pool: MySqlPool,
    outbox: MySqlOutbox,
    topic: String,
}

impl Orders {
    pub fn new(pool: MySqlPool, outbox: MySqlOutbox, topic: &str) -> Self {
        Self { pool, outbox, topic: topic.to_owned() }
    }

    pub async fn place(&self, order: NewOrder) -> Result<u64, OrderError> {
        if !(1..=MAX_CUSTOMER).contains(&order.customer.chars().count()) {
            return Err(OrderError::Customer);
        }
        let mut tx = self.pool.begin().await?;
        let id = insert(&mut tx, &order).await?;
        let event = Event::Placed { order: id, cents: order.cents.into() };
        self.outbox.add(&mut tx, event.message(&self.topic)?).await?;
        tx.commit().await?; // Both, or neither.
        self.outbox.wake();
        Ok(id)
    }

    pub async fn cancel(&self, id: u64) -> Result<(), OrderError> {
        let mut tx = self.pool.begin().await?;
        // The row is locked before the message is added, and until the commit. So the messages of
        // one order are in the order of its transactions, whichever instance they ran on.
        let order = lock(&mut tx, id).await?.ok_or(OrderError::Unknown)?;
        if order.cancelled {
            return Err(OrderError::Cancelled);
        }
        set_cancelled(&mut tx, id).await?;
        let event = Event::Cancelled { order: id, cents: order.cents };
        self.outbox.add(&mut tx, event.message(&self.topic)?).await?;
        tx.commit().await?;
        self.outbox.wake();
        Ok(())
    }

    pub async fn find(&self, id: u64) -> Result<Order, OrderError> {
        let row =
            sqlx::query_as("SELECT id, customer, cents, cancelled FROM shop_order WHERE id = ?")
                .bind(id)
                .fetch_optional(&self.pool)
                .await?;
        row.map(order).ok_or(OrderError::Unknown)
    }
}

async fn insert(tx: &mut MySqlConnection, order: &NewOrder) -> sqlx::Result<u64> {
    let done = sqlx::query("INSERT INTO shop_order (customer, cents) VALUES (?, ?)")
        .bind(&order.customer)
        .bind(order.cents)
        .execute(tx)
        .await?;
    Ok(done.last_insert_id())
}

async fn lock(tx: &mut MySqlConnection, id: u64) -> sqlx::Result<Option<Order>> {
    let sql = "SELECT id, customer, cents, cancelled FROM shop_order WHERE id = ? FOR UPDATE";
    Ok(sqlx::query_as(sql).bind(id).fetch_optional(tx).await?.map(order))
}

async fn set_cancelled(tx: &mut MySqlConnection, id: u64) -> sqlx::Result<()> {
    let sql = "UPDATE shop_order SET cancelled = TRUE WHERE id = ?";
    sqlx::query(sql).bind(id).execute(tx).await.map(|_| ())
}

fn order((id, customer, cents, cancelled): (u64, String, i64, bool)) -> Order {
    Order { id, customer, cents, cancelled }
}

/// An order that was not changed, nor anything said of it.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    #[error("the customer's name is not 1 to 100 characters long")]
    Customer,
    #[error("there is no such order")]
    Unknown,
    #[error("the order is cancelled already")]
    Cancelled,
    #[error("the database failed")]
    Database(#[from] sqlx::Error),
    #[error("the event is no valid message")]
    Message(#[from] MessageError),
    #[error("the message was not added")]
    Add(#[from] AddError),
    #[error("the change was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
}
