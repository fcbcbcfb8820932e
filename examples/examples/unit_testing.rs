//! Teaches three ways to test code that adds messages, from the smallest to the largest. None needs
//! a server.
//!
//! 1. A pure function decides what to say, and returns messages.
//! 2. A service that is generic over its storage runs on the in-memory fakes of outbox-testing.
//! 3. SQL runs on its database: the test reads back in its own transaction what was added there,
//!    and rolls back.
//!
//! `cargo run --example unit_testing` runs the tests of each way and says what they made sure of;
//! `cargo test --example unit_testing` runs the same functions as tests.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use outbox_core::message::MessageError;
use outbox_core::{Message, Outbox, Writer};
use outbox_sqlite::sqlx::{self, AssertSqlSafe, Connection, SqliteConnection};
use outbox_sqlite::{SqliteSchema, SqliteWriter};
use outbox_testing::{Expected, MemoryConnection, MemoryStore, assert_messages};

// ---- The code under test, as it stands in an application. ----------------------------------

struct Order {
    id: i64,
    cents: i64,
    paid: bool,
}

/// What the world is told of a new order. It decides, and does nothing.
fn events_of(order: &Order) -> Result<Vec<Message>, MessageError> {
    let event = |topic: &str| Message::builder(topic).key(order.id.to_string()).json(&order.cents);
    let mut events = vec![event("orders.placed").build()?];
    if order.paid {
        events.push(event("orders.paid").build()?);
    }
    Ok(events)
}

/// Where orders are kept, by whatever `T` is a transaction there.
trait Repository<T: ?Sized> {
    async fn save(&self, tx: &mut T, order: &Order) -> Result<()>;
}

/// The service: an order and what is told of it, in the caller's transaction. Any database will do.
struct Shop<R, W> {
    orders: R,
    outbox: Outbox<W>,
}

impl<W: Writer, R: Repository<W::Transaction>> Shop<R, W> {
    async fn place(&self, tx: &mut W::Transaction, order: &Order) -> Result<()> {
        ensure!(order.cents > 0, "an order over nothing");
        self.orders.save(tx, order).await?;
        self.outbox.add_all(tx, events_of(order)?).await?;
        Ok(())
    }
}

struct SqlOrders;

impl Repository<SqliteConnection> for SqlOrders {
    async fn save(&self, tx: &mut SqliteConnection, order: &Order) -> Result<()> {
        sqlx::query("INSERT INTO orders (id, cents) VALUES (?, ?)")
            .bind(order.id)
            .bind(order.cents)
            .execute(tx)
            .await?;
        Ok(())
    }
}

// ---- 1. A pure function returns messages: compare them. ------------------------------------

// In your own tests this is `#[test]`, and below `#[tokio::test]`.
#[cfg_attr(test, test)]
fn a_paid_order_is_placed_and_then_paid() -> Result<()> {
    let events = events_of(&Order { id: 7, cents: 950, paid: true })?;
    assert_messages(
        "for a paid order",
        &events,
        [
            Expected::topic("orders.placed").key("7").payload("950"),
            Expected::topic("orders.paid").key("7").payload("950"),
        ],
    );
    Ok(())
}

// ---- 2. Generic code runs on the fakes. ----------------------------------------------------

/// A fake applies its changes when the transaction commits, so that they go with the messages.
#[derive(Clone, Default)]
struct FakeOrders(Arc<Mutex<Vec<i64>>>);

impl FakeOrders {
    fn saved(&self) -> Vec<i64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Repository<MemoryConnection> for FakeOrders {
    async fn save(&self, tx: &mut MemoryConnection, order: &Order) -> Result<()> {
        let (saved, id) = (Arc::clone(&self.0), order.id);
        tx.on_commit(move || saved.lock().unwrap_or_else(PoisonError::into_inner).push(id));
        Ok(())
    }
}

#[cfg_attr(test, tokio::test)]
async fn an_order_and_its_message_are_kept_or_dropped_together() -> Result<()> {
    let (store, orders) = (MemoryStore::new(), FakeOrders::default());
    let shop = Shop { orders: orders.clone(), outbox: store.outbox() };

    let mut tx = store.begin();
    shop.place(&mut tx, &Order { id: 7, cents: 950, paid: false }).await?;
    tx.assert_added([("orders.placed", "7")]);
    tx.rollback();
    store.assert_pending::<&str>([]);
    assert!(orders.saved().is_empty());

    let mut tx = store.begin();
    shop.place(&mut tx, &Order { id: 8, cents: 950, paid: false }).await?;
    tx.commit();
    store.assert_pending([("orders.placed", "8")]);
    assert_eq!(orders.saved(), [8]);
    Ok(())
}

#[cfg_attr(test, tokio::test)]
async fn a_refused_order_says_nothing() -> Result<()> {
    let store = MemoryStore::new();
    let shop = Shop { orders: FakeOrders::default(), outbox: store.outbox() };
    let mut tx = store.begin();
    assert!(shop.place(&mut tx, &Order { id: 7, cents: 0, paid: false }).await.is_err());
    tx.assert_added::<&str>([]);
    Ok(())
}

// ---- 3. SQL runs on its database. ----------------------------------------------------------

/// A fake cannot run your statements. With MySQL this is a transaction on a test server, and
/// `MySqlWriter` in the place of `SqliteWriter`.
#[cfg_attr(test, tokio::test)]
async fn the_statements_store_the_order_and_add_its_message() -> Result<()> {
    let schema = SqliteSchema::new();
    let mut connection = SqliteConnection::connect("sqlite::memory:").await?;
    sqlx::raw_sql(AssertSqlSafe(schema.sql())).execute(&mut connection).await?;
    sqlx::raw_sql("CREATE TABLE orders (id INTEGER PRIMARY KEY, cents INTEGER NOT NULL)")
        .execute(&mut connection)
        .await?;
    let writer = SqliteWriter::new(&schema);
    let shop = Shop { orders: SqlOrders, outbox: Outbox::new(writer.clone()) };

    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    shop.place(&mut tx, &Order { id: 7, cents: 950, paid: false }).await?;
    let cents: i64 =
        sqlx::query_scalar("SELECT cents FROM orders WHERE id = 7").fetch_one(&mut *tx).await?;
    assert_eq!(cents, 950);
    assert_messages(
        "as the transaction sees them",
        &writer.pending(&mut tx).await?,
        [Expected::topic("orders.placed").key("7").payload("950")],
    );
    // Nothing stays behind, so tests may share a database.
    tx.rollback().await?;
    assert!(writer.pending(&mut connection).await?.is_empty());
    Ok(())
}

// ---- The same, told by `cargo run`. --------------------------------------------------------

#[cfg(not(test))]
#[tokio::main]
async fn main() -> Result<()> {
    println!("Three ways to test code that adds messages, without a server.");

    println!("\n1. A pure function decides, and returns messages: nothing needs a fake.");
    a_paid_order_is_placed_and_then_paid()?;
    println!("   checked: a paid order is placed and then paid, under its own key");

    println!("\n2. A service that is generic over its storage runs on the in-memory fakes.");
    an_order_and_its_message_are_kept_or_dropped_together().await?;
    println!("   checked: an order and its message are kept or dropped together");
    a_refused_order_says_nothing().await?;
    println!("   checked: a refused order says nothing");

    println!("\n3. SQL runs on its database; the test reads back in its own transaction.");
    the_statements_store_the_order_and_add_its_message().await?;
    println!("   checked: the statements store the order and add its message");
    println!("   checked: after the rollback nothing is left");

    println!("\nevery check passed");
    Ok(())
}
