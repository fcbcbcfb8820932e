//! The MySQL writer and store on real servers, on both of them.

mod adding;
mod cancelled;
mod claiming;
mod client;
mod conformance;
mod cost;
mod faults;
mod grants;
mod inbox;
mod lanes;
mod late;
mod leasing;
mod migrating;
mod neighbour;
mod plans;
mod refusing;
mod secrets;
mod sessions;
mod settling;
mod traffic;

use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::{
    database::{Database, Engine},
    servers,
};
use outbox_core::delivery::{Lane, Lease, Position, RowId, WorkerId};
use outbox_core::store::{Claim, ClaimReply, Claimed, KeepLeases, Page, TakeOver};
use outbox_core::{Delivery, Message, Store};
use outbox_mysql::sqlx::{self, AssertSqlSafe, Connection, MySqlConnection};
use outbox_mysql::{MySqlOutbox, MySqlSchema, MySqlStore, MySqlWriter};
use outbox_testing::MemoryBroker;

/// Makes a test of every function, on MariaDB and on MySQL.
macro_rules! on_both {
    ($($(#[$attribute:meta])* async fn $name:ident($lab:ident: Lab) -> Result<()> $body:block)*) => {
        $($(#[$attribute])* mod $name {
            use super::*;

            async fn on($lab: Lab) -> Result<()> $body

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn mariadb() -> Result<()> {
                match Lab::new(Engine::MariaDb).await? {
                    Some(lab) => on(lab).await,
                    None => Ok(()),
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn mysql() -> Result<()> {
                match Lab::new(Engine::MySql).await? {
                    Some(lab) => on(lab).await,
                    None => Ok(()),
                }
            }
        })*
    };
}
use on_both;

/// Makes two tests of every function, for what needs more than a lab.
macro_rules! on_each {
    ($($name:ident)*) => {
        $(mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn mariadb() -> Result<()> {
                super::$name(Engine::MariaDb).await
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn mysql() -> Result<()> {
                super::$name(Engine::MySql).await
            }
        })*
    };
}
use on_each;

const TTL: Duration = Duration::from_secs(6);
const MEGABYTE: usize = 1 << 20;

/// A database of the test's own with the outbox in it.
pub(crate) struct Lab {
    pub(crate) engine: Engine,
    pub(crate) url: String,
    pub(crate) schema: MySqlSchema,
    pub(crate) outbox: MySqlOutbox,
    pub(crate) writer: MySqlWriter,
    pub(crate) store: MySqlStore,
}

impl Lab {
    /// `None` when the server was left out.
    pub(crate) async fn new(engine: Engine) -> Result<Option<Self>> {
        Self::with_schema(engine, MySqlSchema::new().with_lanes(4)?).await
    }

    pub(crate) async fn with_schema(engine: Engine, schema: MySqlSchema) -> Result<Option<Self>> {
        match servers::database_of(engine).await {
            Some(server) => Ok(Some(Self::at(server, schema).await?)),
            None => Ok(None),
        }
    }

    /// In a new database of this server.
    pub(crate) async fn at(server: &Database, schema: MySqlSchema) -> Result<Self> {
        let url = server.create_database().await?;
        let mut connection = MySqlConnection::connect(&url).await?;
        schema.migrate(&mut connection).await.context("migrate")?;
        let store = MySqlStore::connect(&url, &schema).await.context("connect")?;
        let writer = MySqlWriter::new(&schema);
        let outbox = MySqlOutbox::new(writer.clone());
        Ok(Self { engine: server.engine(), url, schema, outbox, writer, store })
    }

    /// A connection of the application.
    pub(crate) async fn connect(&self) -> Result<MySqlConnection> {
        Ok(MySqlConnection::connect(&self.url).await?)
    }

    /// Adds messages in a transaction of their own.
    pub(crate) async fn add(&self, messages: Vec<Message>) -> Result<()> {
        let mut connection = self.connect().await?;
        let mut tx = connection.begin().await?;
        self.outbox.add_all(&mut tx, messages).await?;
        Ok(tx.commit().await?)
    }

    /// Adds so many messages of one key, which a relay delivers to this broker, in order.
    pub(crate) async fn delivers(&self, count: usize, broker: &MemoryBroker) -> Result<()> {
        let before = broker.published().len();
        let messages: Vec<_> = (0..count).map(|_| message("7")).collect();
        let ids: Vec<_> = messages.iter().map(Message::id).collect();
        self.add(messages).await?;
        broker.wait_for(before + count).await;
        broker.assert_order_per_key(&ids);
        Ok(())
    }

    /// Adds one message with this key and claims it.
    pub(crate) async fn delivery(&self, key: &str) -> Result<Delivery> {
        let message = message(key);
        let id = message.id();
        self.add(vec![message]).await?;
        let all = deliveries(self.page().await?);
        all.into_iter().find(|d| d.message.id() == id).context("added message is not claimed")
    }

    /// All rows of all lanes.
    pub(crate) async fn page(&self) -> Result<ClaimReply> {
        let lanes = lanes(4);
        let page = Page::new(&lanes, Position::START, 1000);
        Ok(self.store.claim(Claim::new(1000 * MEGABYTE).page(page)).await?)
    }

    pub(crate) async fn pending(&self) -> Result<Vec<Message>> {
        Ok(self.writer.pending(&mut self.connect().await?).await?)
    }

    /// A worker that took all lanes, for a minute.
    pub(crate) async fn take_all(&self) -> Result<(WorkerId, Vec<Lease>)> {
        let worker = WorkerId::generate();
        let request = KeepLeases::new(worker, TTL * 10);
        let standing = self.store.keep_leases(request).await?;
        let take: Vec<_> = standing.lanes.iter().map(TakeOver::of).collect();
        let standing = self.store.keep_leases(request.take(&take)).await?;
        let leases = standing.lanes.iter().map(|lane| Lease::new(lane.lane, lane.epoch));
        Ok((worker, leases.collect()))
    }

    /// A worker that took this lane.
    pub(crate) async fn take(&self, lane: Lane) -> Result<(WorkerId, Lease)> {
        let worker = WorkerId::generate();
        let request = KeepLeases::new(worker, TTL);
        let standing = self.store.keep_leases(request).await?;
        let take = [TakeOver::of(&standing.lanes[usize::from(lane.0)])];
        let standing = self.store.keep_leases(request.take(&take)).await?;
        let record = &standing.lanes[usize::from(lane.0)];
        anyhow::ensure!(record.owner == Some(worker), "lane was not taken");
        Ok((worker, Lease::new(lane, record.epoch)))
    }
}

pub(crate) fn lanes(count: u16) -> Vec<Lane> {
    (0..count).map(Lane).collect()
}

pub(crate) fn message(key: &str) -> Message {
    Message::builder("orders").key(key).payload("payload").build().expect("valid")
}

pub(crate) fn id_of(delivery: &Delivery) -> RowId {
    RowId::new(delivery.position, delivery.message.id())
}

pub(crate) fn deliveries(reply: ClaimReply) -> Vec<Delivery> {
    let rows = reply.rows.into_iter();
    rows.filter_map(|row| if let Claimed::Delivery(d) = row { Some(*d) } else { None }).collect()
}

pub(crate) async fn run(connection: &mut MySqlConnection, sql: impl Into<String>) -> Result<()> {
    let sql: String = sql.into();
    sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(connection).await.context(sql)?;
    Ok(())
}

pub(crate) async fn number(connection: &mut MySqlConnection, sql: &str) -> Result<i64> {
    let sql = AssertSqlSafe(sql.to_owned());
    Ok(sqlx::query_scalar(sql).fetch_one(connection).await?)
}

/// Drops a ping before it is answered: sqlx forgets that the answer is still to come.
async fn lose_step(connection: &mut MySqlConnection) {
    while outbox_testing::drop_after(1, connection.ping()).await.is_some() {}
}
