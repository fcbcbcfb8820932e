//! Every promise of a store, on SQLite.

use std::sync::Arc;
use std::time::Duration;

use outbox_core::{DeadLetters, Message, MessageId, Outbox, Store, async_trait};
use outbox_sqlite::SqliteWriter;
use outbox_sqlite::sqlx::pool::PoolConnection;
use outbox_sqlite::sqlx::sqlite::{SqlitePool, SqlitePoolOptions};
use outbox_sqlite::sqlx::{self, Acquire, Sqlite, Transaction};
use outbox_testing::conformance::store::{DeadLettersFixture, StoreFixture};

use super::Lab;

struct OnFile {
    lab: Lab,
    pool: SqlitePool,
}

#[async_trait]
impl StoreFixture for OnFile {
    type Writer = SqliteWriter;
    type Transaction = Transaction<'static, Sqlite>;
    type Connection = PoolConnection<Sqlite>;

    async fn set_up() -> Self {
        let lab = Lab::new().await.expect("a database");
        let pool = SqlitePoolOptions::new().connect_lazy_with(lab.options.clone());
        Self { lab, pool }
    }

    fn writer(&self) -> SqliteWriter {
        self.lab.writer.clone()
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.lab.store.clone())
    }

    fn sees_open_rows(&self) -> bool {
        false
    }

    async fn begin(&self) -> Transaction<'static, Sqlite> {
        self.pool.begin_with("BEGIN IMMEDIATE").await.expect("a transaction")
    }

    async fn commit(&self, transaction: Transaction<'static, Sqlite>) {
        transaction.commit().await.expect("a commit");
    }

    async fn roll_back(&self, transaction: Transaction<'static, Sqlite>) {
        transaction.rollback().await.expect("a rollback");
    }

    async fn add_in_savepoint(
        &self,
        transaction: &mut Transaction<'static, Sqlite>,
        message: Message,
        release: bool,
    ) -> bool {
        let mut savepoint = transaction.begin().await.expect("a savepoint");
        Outbox::new(self.writer()).add(&mut savepoint, message).await.expect("an add");
        let ended = if release { savepoint.commit().await } else { savepoint.rollback().await };
        ended.expect("the end of a savepoint");
        true
    }

    async fn connect(&self) -> Option<PoolConnection<Sqlite>> {
        Some(self.pool.acquire().await.expect("a connection"))
    }

    async fn garble(&self, message: MessageId) -> bool {
        let garbled = sqlx::query("UPDATE outbox SET headers = x'ff' WHERE message_id = ?")
            .bind(message.as_bytes().to_vec())
            .execute(&self.pool)
            .await;
        garbled.expect("an update").rows_affected() == 1
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time + Duration::from_millis(20)).await;
    }

    async fn set_clock_back(&self, time: Duration) -> bool {
        let by = time.as_micros();
        let later = sqlx::AssertSqlSafe(format!(
            "UPDATE outbox SET created_at = created_at + {by}, \
               available_at = available_at + {by}, held_at = held_at + {by};\
             UPDATE outbox_lane SET expires_at = expires_at + {by};\
             UPDATE outbox_worker SET seen_at = seen_at + {by};\
             UPDATE outbox_dead SET created_at = created_at + {by}, died_at = died_at + {by};\
             UPDATE outbox_delivered \
               SET created_at = created_at + {by}, delivered_at = delivered_at + {by}"
        ));
        sqlx::raw_sql(later).execute(&self.pool).await.expect("updates");
        true
    }
}

impl DeadLettersFixture for OnFile {
    fn dead_letters(&self) -> Arc<dyn DeadLetters> {
        Arc::new(self.lab.store.clone())
    }
}

outbox_testing::store_conformance!(OnFile);
outbox_testing::dead_letters_conformance!(OnFile);
