//! A pool has no transaction: what is added through it would be published at once.

use outbox_core::Message;
use outbox_mysql::MySqlOutbox;
use outbox_mysql::sqlx::MySqlPool;

async fn add(outbox: MySqlOutbox, mut pool: MySqlPool, message: Message) {
    let _ = outbox.add(&mut pool, message).await;
}

fn main() {}
