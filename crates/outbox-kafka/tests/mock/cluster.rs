//! A simulated cluster, and what its log holds.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outbox_core::broker::{Broker, Outcome, Outcomes, Outgoing, PublishErrorKind};
use outbox_core::{Delivery, Lane, Message, Position};
use outbox_kafka::rdkafka::consumer::{BaseConsumer, Consumer};
use outbox_kafka::rdkafka::error::KafkaError;
use outbox_kafka::rdkafka::message::{Headers, Message as _};
use outbox_kafka::rdkafka::mocking::MockCluster;
use outbox_kafka::rdkafka::producer::DefaultProducerContext;
use outbox_kafka::rdkafka::{ClientConfig, Offset, TopicPartitionList};
use outbox_kafka::{KafkaBroker, KafkaBuilder};

pub(crate) type Bytes = Option<Vec<u8>>;

/// A simulated cluster with one topic, `orders`, of `partitions` partitions, which its first broker
/// leads.
pub(crate) struct Cluster {
    pub(crate) mock: MockCluster<'static, DefaultProducerContext>,
    partitions: i32,
}

pub(crate) const TOPIC: &str = "orders";

impl Cluster {
    pub(crate) fn new(partitions: i32) -> Self {
        Self::of(1, partitions)
    }

    pub(crate) fn of(brokers: i32, partitions: i32) -> Self {
        let mock = MockCluster::new(brokers).expect("mock cluster");
        mock.create_topic(TOPIC, partitions, 1).expect("topic");
        for partition in 0..partitions {
            mock.partition_leader(TOPIC, partition, Some(1)).expect("leader");
        }
        Self { mock, partitions }
    }

    /// Patient: no message is late only because the machine is busy.
    pub(crate) fn builder(&self) -> KafkaBuilder {
        KafkaBroker::builder(self.mock.bootstrap_servers()).message_timeout(Duration::from_secs(60))
    }

    pub(crate) fn broker(&self) -> KafkaBroker {
        self.builder().build().expect("broker")
    }

    /// Everything in the log, partition by partition.
    pub(crate) fn log(&self) -> Vec<Record> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.mock.bootstrap_servers())
            .set("group.id", "test")
            .set("enable.partition.eof", "true")
            .create()
            .expect("consumer");
        let mut assignment = TopicPartitionList::new();
        for partition in 0..self.partitions {
            assignment.add_partition_offset(TOPIC, partition, Offset::Beginning).expect("offset");
        }
        consumer.assign(&assignment).expect("assignment");
        let mut records = Vec::new();
        let mut ended = HashSet::new();
        let deadline = Instant::now() + Duration::from_secs(20);
        while ended.len() < self.partitions as usize {
            assert!(Instant::now() < deadline, "the log cannot be read to its end");
            match consumer.poll(Duration::from_millis(100)) {
                Some(Ok(message)) => records.push(Record {
                    partition: message.partition(),
                    offset: message.offset(),
                    key: message.key().map(<[u8]>::to_vec),
                    payload: message.payload().map(<[u8]>::to_vec),
                    headers: message
                        .headers()
                        .into_iter()
                        .flat_map(Headers::iter)
                        .map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec)))
                        .collect(),
                }),
                Some(Err(KafkaError::PartitionEOF(partition))) => _ = ended.insert(partition),
                Some(Err(_)) | None => {}
            }
        }
        records.sort_by_key(|record| (record.partition, record.offset));
        records
    }

    /// The payloads in the log as text.
    pub(crate) fn payloads(&self) -> Vec<String> {
        let text = |record: Record| String::from_utf8(record.payload.unwrap_or_default());
        self.log().into_iter().map(|record| text(record).expect("text")).collect()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) key: Bytes,
    pub(crate) payload: Bytes,
    pub(crate) headers: Vec<(String, Bytes)>,
}

pub(crate) fn message(key: &str, payload: &str) -> Message {
    Message::builder(TOPIC).key(key).payload(payload).build().expect("message")
}

/// May be sent for a long time to come.
pub(crate) fn outgoing(message: Message) -> Outgoing {
    let delivery = Delivery::new(Position::START, Lane(0), message);
    Outgoing::new(delivery, tokio::time::Instant::now() + Duration::from_secs(600))
}

pub(crate) fn sink(count: usize) -> Outcomes {
    Outcomes::new(count, Arc::default())
}

/// Publishes and returns the answers in the order of the messages; panics if one is missing.
pub(crate) async fn publish(
    broker: &KafkaBroker,
    messages: impl IntoIterator<Item = Message>,
) -> Vec<Outcome> {
    publish_all(broker, messages.into_iter().map(outgoing).collect()).await
}

pub(crate) async fn publish_all(broker: &KafkaBroker, batch: Vec<Outgoing>) -> Vec<Outcome> {
    let outcomes = sink(batch.len());
    broker.publish(batch, &outcomes).await;
    assert_eq!(outcomes.unanswered(), 0, "a publish ended with messages unanswered");
    sorted(&outcomes)
}

pub(crate) fn sorted(outcomes: &Outcomes) -> Vec<Outcome> {
    let mut answers = outcomes.take();
    answers.sort_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, outcome)| outcome).collect()
}

/// The kind of a failure; `None` when the message was delivered.
pub(crate) fn kind(outcome: &Outcome) -> Option<PublishErrorKind> {
    match outcome {
        Outcome::Failed(kind, _) => Some(*kind),
        _ => None,
    }
}

pub(crate) fn kinds(outcomes: &[Outcome]) -> Vec<Option<PublishErrorKind>> {
    outcomes.iter().map(kind).collect()
}
