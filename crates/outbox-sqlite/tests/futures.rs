//! Every future that a user awaits can be spawned. That this compiles is the test.

use std::time::Duration;

use outbox_core::{Message, MessageId};
use outbox_sqlite::sqlx::{Sqlite, SqliteConnection, Transaction};
use outbox_sqlite::{SqliteInbox, SqliteOutbox, SqliteSchema, SqliteStore, SqliteWriter};

fn send<T: Send>(_: T) {}

fn in_a_transaction(
    (outbox, inbox): (&SqliteOutbox, &SqliteInbox),
    transaction: &mut Transaction<'static, Sqlite>,
    message: Message,
) {
    let id = MessageId::generate();
    send(outbox.add(transaction, message.clone()));
    send(outbox.add_all(transaction, vec![message]));
    send(inbox.accept(transaction, id));
}

fn on_a_connection(
    (schema, writer, inbox): (&SqliteSchema, &SqliteWriter, &SqliteInbox),
    connection: &mut SqliteConnection,
) {
    send(schema.migrate(connection));
    send(schema.check(connection));
    send(writer.pending(connection));
    send(inbox.purge(connection, Duration::ZERO, 1));
}

#[test]
fn every_future_a_user_awaits_is_send() {
    send(SqliteStore::connect("sqlite:shop.db", &SqliteSchema::new()));
    // They need a database to be called.
    let _ = (in_a_transaction, on_a_connection);
}
