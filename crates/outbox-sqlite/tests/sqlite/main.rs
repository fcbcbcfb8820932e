//! The SQLite writer and store on a file in a folder of each test's own.

mod adding;
mod broken;
mod cancellation;
mod conformance;
mod inbox;
mod opening;
mod properties;
mod storing;

use anyhow::Result;
use outbox_core::Message;
use outbox_core::delivery::{Lane, Position, RowId};
use outbox_core::store::{Claim, ClaimReply, Claimed, Page};
use outbox_core::{Delivery, Store};
use outbox_sqlite::sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use outbox_sqlite::sqlx::{self, AssertSqlSafe, ConnectOptions, Connection};
use outbox_sqlite::{SqliteOutbox, SqliteSchema, SqliteStore, SqliteWriter};
use tempfile::TempDir;

const MEGABYTE: usize = 1 << 20;

/// A database with the outbox in it.
pub(crate) struct Lab {
    pub(crate) options: SqliteConnectOptions,
    pub(crate) schema: SqliteSchema,
    pub(crate) outbox: SqliteOutbox,
    pub(crate) writer: SqliteWriter,
    pub(crate) store: SqliteStore,
    _folder: TempDir,
}

impl Lab {
    pub(crate) async fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let options = SqliteConnectOptions::new().filename(folder.path().join("shop.db"));
        let schema = SqliteSchema::new();
        let mut connection = options.clone().create_if_missing(true).connect().await?;
        schema.migrate(&mut connection).await?;
        connection.close().await?;
        let writer = SqliteWriter::new(&schema);
        Ok(Self {
            store: SqliteStore::from_options(options.clone(), &schema),
            outbox: SqliteOutbox::new(writer.clone()),
            options,
            schema,
            writer,
            _folder: folder,
        })
    }

    /// A connection of the application.
    pub(crate) async fn connect(&self) -> Result<SqliteConnection> {
        Ok(self.options.connect().await?)
    }

    /// Adds messages in a transaction of their own.
    pub(crate) async fn add(&self, messages: Vec<Message>) -> Result<()> {
        let mut connection = self.connect().await?;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        self.outbox.add_all(&mut tx, messages).await?;
        Ok(tx.commit().await?)
    }

    pub(crate) async fn pending(&self) -> Result<Vec<Message>> {
        Ok(self.writer.pending(&mut self.connect().await?).await?)
    }

    /// All rows.
    pub(crate) async fn page(&self) -> Result<ClaimReply> {
        let page = Page::new(&[Lane(0)], Position::START, 10_000);
        Ok(self.store.claim(Claim::new(1000 * MEGABYTE).page(page)).await?)
    }
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

pub(crate) async fn run(
    connection: &mut SqliteConnection,
    sql: impl Into<String>,
) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(sql.into())).execute(connection).await.map(|_| ())
}

pub(crate) async fn number(connection: &mut SqliteConnection, sql: &'static str) -> Result<i64> {
    Ok(sqlx::query_scalar(sql).fetch_one(connection).await?)
}
