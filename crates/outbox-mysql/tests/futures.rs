//! Every future that a user awaits can be spawned. That this compiles is the test.

use std::time::Duration;

use outbox_core::{Message, MessageId};
use outbox_mysql::sqlx::{MySql, MySqlConnection, Transaction};
use outbox_mysql::{MySqlInbox, MySqlOutbox, MySqlSchema, MySqlStore, MySqlWriter};

fn send<T: Send>(_: T) {}

fn in_a_transaction(
    (outbox, inbox): (&MySqlOutbox, &MySqlInbox),
    transaction: &mut Transaction<'static, MySql>,
    message: Message,
) {
    let id = MessageId::generate();
    send(outbox.add(transaction, message.clone()));
    send(outbox.add_all(transaction, vec![message]));
    send(inbox.accept(transaction, id));
}

fn on_a_connection(
    (schema, writer, inbox): (&MySqlSchema, &MySqlWriter, &MySqlInbox),
    connection: &mut MySqlConnection,
) {
    send(schema.migrate(connection));
    send(schema.check(connection));
    send(schema.change_lanes(connection, 32));
    send(writer.pending(connection));
    send(inbox.purge(connection, Duration::ZERO, 1));
}

#[test]
fn every_future_a_user_awaits_is_send() {
    send(MySqlStore::connect("mysql://localhost/shop", &MySqlSchema::new()));
    // They need a server to be called.
    let _ = (in_a_transaction, on_a_connection);
}
