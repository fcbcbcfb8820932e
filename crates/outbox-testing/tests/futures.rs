//! Every future that a user awaits can be spawned.

use std::future::pending;

use outbox_core::broker::Outcomes;
use outbox_core::dead_letters::DeadLetterQuery;
use outbox_core::{Broker, DeadLetters, Dispatcher, Message, MessageId, Store, Wake};
use outbox_testing::{FaultyStore, MemoryBroker, MemoryStore};

fn send<T: Send>(_: T) {}

#[test]
fn every_future_a_user_awaits_is_send() {
    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    let (outbox, mut tx) = (store.outbox(), store.begin());
    let message = Message::builder("orders").payload("p").build().unwrap();
    send(outbox.add(&mut tx, message.clone()));
    send(outbox.add_all(&mut tx, vec![message]));
    send(Wake::default().rung());

    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build().unwrap();
    send(dispatcher.check());
    send(dispatcher.run_until_empty());
    send(dispatcher.run(pending()));

    let ids = [MessageId::generate()];
    send(store.open());
    send(FaultyStore::new(store.clone()).open());
    send(DeadLetters::list(&store, &DeadLetterQuery::new()));
    send(DeadLetters::get(&store, ids[0]));
    send(DeadLetters::retry(&store, &ids));
    send(DeadLetters::skip(&store, &ids));
    send(DeadLetters::discard(&store, &ids));
    send(broker.publish(vec![], &Outcomes::new(0, Default::default())));
    send(broker.check());
    send(broker.wait_for(0));
}
