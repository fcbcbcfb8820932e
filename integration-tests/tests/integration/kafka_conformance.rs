//! Every promise of a broker, kept by Apache Kafka.

use std::sync::Arc;
use std::time::Duration;

use integration_tests::{kafka::Kafka, names, servers};
use outbox_core::{Broker, async_trait};
use outbox_kafka::KafkaBroker;
use outbox_testing::Published;
use outbox_testing::conformance::broker::BrokerFixture;

use crate::kafka::read;

struct OnKafka {
    kafka: &'static Kafka,
    broker: Arc<KafkaBroker>,
}

#[async_trait]
impl BrokerFixture for OnKafka {
    async fn set_up() -> Self {
        let kafka = servers::kafka().await.expect("kafka was left out");
        let broker = KafkaBroker::builder(kafka.bootstrap())
            .message_timeout(Duration::from_secs(10))
            .build()
            .expect("broker");
        Self { kafka, broker: Arc::new(broker) }
    }

    fn broker(&self) -> Arc<dyn Broker> {
        Arc::clone(&self.broker) as _
    }

    async fn create_topic(&self) -> String {
        self.kafka.create_topic("conformance", 3).await.expect("topic")
    }

    fn unknown_topic(&self) -> Option<String> {
        Some(names::unique("unknown"))
    }

    async fn published_to(&self, topic: &str) -> Vec<Published> {
        read(self.kafka, topic).await.expect("topic can be read")
    }
}

outbox_testing::broker_conformance!(OnKafka);
