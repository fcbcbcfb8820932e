//! Every promise of a broker, kept on the simulated cluster.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use outbox_core::{Broker, async_trait};
use outbox_kafka::KafkaBroker;
use outbox_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use outbox_kafka::rdkafka::error::KafkaError;
use outbox_kafka::rdkafka::message::Headers;
use outbox_kafka::rdkafka::mocking::MockCluster;
use outbox_kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};
use outbox_testing::Published;
use outbox_testing::conformance::broker::BrokerFixture;

const PARTITIONS: i32 = 4;

struct OnMock {
    bootstrap: String,
    broker: Arc<KafkaBroker>,
    create: mpsc::Sender<Create>,
}

/// The topic to create, and where to tell that it exists.
type Create = (String, mpsc::Sender<()>);

#[async_trait]
impl BrokerFixture for OnMock {
    async fn set_up() -> Self {
        let (tell, told) = mpsc::channel();
        let (create, creations) = mpsc::channel::<Create>();
        // A cluster stays on the thread that made it, and ends with the fixture.
        std::thread::spawn(move || {
            let cluster = MockCluster::new(1).expect("mock cluster");
            tell.send(cluster.bootstrap_servers()).expect("the test waits");
            for (topic, created) in creations {
                cluster.create_topic(&topic, PARTITIONS, 1).expect("topic");
                created.send(()).expect("the test waits");
            }
        });
        let bootstrap = told.recv().expect("a cluster");
        let broker = KafkaBroker::builder(&bootstrap).build().expect("broker");
        Self { bootstrap, broker: Arc::new(broker), create }
    }

    fn broker(&self) -> Arc<dyn Broker> {
        Arc::clone(&self.broker) as _
    }

    async fn create_topic(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let topic = format!("topic-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let (tell, told) = mpsc::channel();
        self.create.send((topic.clone(), tell)).expect("the cluster runs");
        told.recv().expect("a topic");
        topic
    }

    fn unknown_topic(&self) -> Option<String> {
        Some("unknown".to_owned())
    }

    async fn published_to(&self, topic: &str) -> Vec<Published> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &self.bootstrap)
            .set("group.id", "test")
            .set("enable.partition.eof", "true")
            .create()
            .expect("consumer");
        let mut assignment = TopicPartitionList::new();
        for partition in 0..PARTITIONS {
            assignment.add_partition_offset(topic, partition, Offset::Beginning).expect("offset");
        }
        consumer.assign(&assignment).expect("assignment");
        let (mut records, mut ended) = (Vec::new(), HashSet::new());
        let deadline = Instant::now() + Duration::from_secs(20);
        while ended.len() < PARTITIONS as usize {
            assert!(Instant::now() < deadline, "{topic} cannot be read to its end");
            match consumer.poll(Duration::from_millis(100)) {
                Some(Ok(record)) => records.push(published(&record)),
                Some(Err(KafkaError::PartitionEOF(partition))) => _ = ended.insert(partition),
                Some(Err(_)) | None => {}
            }
        }
        records.sort_by_key(|record| (record.partition, record.offset));
        records
    }
}

fn published(record: &impl outbox_kafka::rdkafka::Message) -> Published {
    let headers = record.headers().into_iter().flat_map(Headers::iter);
    Published::new(
        record.topic(),
        (record.partition(), record.offset()),
        record.key().map(<[u8]>::to_vec),
        record.payload().map(<[u8]>::to_vec),
        headers.map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec))).collect(),
    )
}

outbox_testing::broker_conformance!(OnMock);
