//! The fakes keep every promise of the real things.

use std::sync::Arc;
use std::time::Duration;

use outbox_core::{Broker, DeadLetters, Message, MessageId, Outbox, Store, async_trait};
use outbox_testing::conformance::broker::BrokerFixture;
use outbox_testing::conformance::store::{DeadLettersFixture, StoreFixture};
use outbox_testing::{
    MemoryBroker, MemoryConnection, MemoryStore, MemoryTransaction, MemoryWriter, Published,
};

struct InMemory(MemoryStore);

#[async_trait]
impl StoreFixture for InMemory {
    type Writer = MemoryWriter;
    type Transaction = MemoryTransaction<'static>;
    type Connection = Box<MemoryConnection>;

    async fn set_up() -> Self {
        tokio::time::pause();
        Self(MemoryStore::new())
    }

    fn writer(&self) -> MemoryWriter {
        MemoryWriter::new()
    }

    fn store(&self) -> Arc<dyn Store> {
        Arc::new(self.0.clone())
    }

    fn sees_open_rows(&self) -> bool {
        true
    }

    async fn begin(&self) -> MemoryTransaction<'static> {
        self.0.begin()
    }

    async fn commit(&self, transaction: MemoryTransaction<'static>) {
        transaction.commit();
    }

    async fn roll_back(&self, transaction: MemoryTransaction<'static>) {
        transaction.rollback();
    }

    async fn add_in_savepoint(
        &self,
        transaction: &mut MemoryTransaction<'static>,
        message: Message,
        release: bool,
    ) -> bool {
        let mut savepoint = transaction.begin();
        Outbox::new(self.writer()).add(&mut savepoint, message).await.expect("an add");
        match release {
            true => savepoint.commit(),
            false => savepoint.rollback(),
        }
        true
    }

    async fn connect(&self) -> Option<Box<MemoryConnection>> {
        Some(Box::new(self.0.connection()))
    }

    async fn garble(&self, message: MessageId) -> bool {
        self.0.garble(message)
    }

    async fn pass(&self, time: Duration) {
        tokio::time::advance(time + Duration::from_millis(1)).await;
    }

    async fn set_clock_back(&self, time: Duration) -> bool {
        self.0.set_clock_back(time);
        true
    }
}

impl DeadLettersFixture for InMemory {
    fn dead_letters(&self) -> Arc<dyn DeadLetters> {
        Arc::new(self.0.clone())
    }
}

outbox_testing::store_conformance!(InMemory);
outbox_testing::dead_letters_conformance!(InMemory);

struct Fake(MemoryBroker);

#[async_trait]
impl BrokerFixture for Fake {
    async fn set_up() -> Self {
        tokio::time::pause();
        let broker = MemoryBroker::new();
        broker.remove_topic("unknown");
        broker.set_latency(Duration::from_millis(5));
        Self(broker)
    }

    fn broker(&self) -> Arc<dyn Broker> {
        Arc::new(self.0.clone())
    }

    async fn create_topic(&self) -> String {
        format!("topic-{}", MessageId::generate())
    }

    fn unknown_topic(&self) -> Option<String> {
        Some("unknown".to_owned())
    }

    async fn published_to(&self, topic: &str) -> Vec<Published> {
        self.0.published_to(topic)
    }
}

outbox_testing::broker_conformance!(Fake);
