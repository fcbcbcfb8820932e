//! Every promise of a store and of its dead letters, kept by MariaDB and by MySQL.

use std::marker::PhantomData;
use std::sync::Arc;

use outbox_core::{DeadLetters, Message, MessageId, Outbox, async_trait};
use outbox_mysql::sqlx::MySql;
use outbox_mysql::sqlx::mysql::{MySqlPool, MySqlPoolOptions};
use outbox_mysql::sqlx::pool::PoolConnection;
use outbox_testing::conformance::store::{DeadLettersFixture, StoreFixture};

use super::*;

/// A database of the case's own, and the application's pool to it.
struct On<E> {
    lab: Lab,
    pool: MySqlPool,
    engine: PhantomData<fn() -> E>,
}

trait Server: 'static {
    const ENGINE: Engine;
}

struct MariaDbServer;

impl Server for MariaDbServer {
    const ENGINE: Engine = Engine::MariaDb;
}

struct MySqlServer;

impl Server for MySqlServer {
    const ENGINE: Engine = Engine::MySql;
}

#[async_trait]
impl<E: Server> StoreFixture for On<E> {
    type Writer = MySqlWriter;
    type Transaction = sqlx::Transaction<'static, MySql>;
    type Connection = PoolConnection<MySql>;

    async fn set_up() -> Self {
        let lab = Lab::new(E::ENGINE).await.expect("lab").expect("server was left out");
        let pool = MySqlPoolOptions::new().max_connections(3).connect(&lab.url);
        Self { pool: pool.await.expect("pool"), lab, engine: PhantomData }
    }

    fn writer(&self) -> MySqlWriter {
        self.lab.writer.clone()
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.lab.store.clone())
    }

    fn sees_open_rows(&self) -> bool {
        true
    }

    async fn begin(&self) -> sqlx::Transaction<'static, MySql> {
        self.pool.begin().await.expect("begin")
    }

    async fn commit(&self, transaction: sqlx::Transaction<'static, MySql>) {
        transaction.commit().await.expect("commit");
    }

    async fn roll_back(&self, transaction: sqlx::Transaction<'static, MySql>) {
        transaction.rollback().await.expect("rollback");
    }

    async fn add_in_savepoint(
        &self,
        transaction: &mut sqlx::Transaction<'static, MySql>,
        message: Message,
        release: bool,
    ) -> bool {
        let mut savepoint = transaction.begin().await.expect("a savepoint");
        Outbox::new(self.writer()).add(&mut savepoint, message).await.expect("an add");
        let ended = if release { savepoint.commit().await } else { savepoint.rollback().await };
        ended.expect("the end of a savepoint");
        true
    }

    async fn connect(&self) -> Option<PoolConnection<MySql>> {
        Some(self.pool.acquire().await.expect("connection"))
    }

    async fn garble(&self, message: MessageId) -> bool {
        let garbled = sqlx::query("UPDATE outbox SET headers = '{' WHERE message_id = ?")
            .bind(&message.as_bytes()[..])
            .execute(&self.pool);
        garbled.await.expect("garbled").rows_affected() == 1
    }

    async fn pass(&self, time: Duration) {
        tokio::time::sleep(time + Duration::from_millis(20)).await;
    }

    async fn set_clock_back(&self, time: Duration) -> bool {
        let by = format!("INTERVAL {} MICROSECOND", time.as_micros());
        let later = AssertSqlSafe(format!(
            "UPDATE outbox SET created_at = created_at + {by}, \
               available_at = available_at + {by}, held_at = held_at + {by};\
             UPDATE outbox_lane SET expires_at = expires_at + {by};\
             UPDATE outbox_worker SET seen_at = seen_at + {by};\
             UPDATE outbox_held SET held_at = held_at + {by};\
             UPDATE outbox_dead SET created_at = created_at + {by}, died_at = died_at + {by};\
             UPDATE outbox_delivered \
               SET created_at = created_at + {by}, delivered_at = delivered_at + {by}"
        ));
        sqlx::raw_sql(later).execute(&self.pool).await.expect("updates");
        true
    }
}

impl<E: Server> DeadLettersFixture for On<E> {
    fn dead_letters(&self) -> Arc<dyn DeadLetters> {
        Arc::new(self.lab.store.clone())
    }
}

mod mariadb {
    use super::*;

    outbox_testing::store_conformance!(On<MariaDbServer>);
    outbox_testing::dead_letters_conformance!(On<MariaDbServer>);
}

mod mysql {
    use super::*;

    outbox_testing::store_conformance!(On<MySqlServer>);
    outbox_testing::dead_letters_conformance!(On<MySqlServer>);
}
