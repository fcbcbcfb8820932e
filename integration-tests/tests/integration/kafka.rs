//! The broker against Apache Kafka: what a simulated cluster does not do as the real one does.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::{
    kafka::{Kafka, KafkaCluster, Nodes},
    names,
    servers::{self, Backend},
};
use outbox_core::broker::{Broker, Outcome, Outcomes, Outgoing, PublishErrorKind};
use outbox_core::{Delivery, Lane, Message, Position};
use outbox_kafka::{KafkaBroker, KafkaBuilder};
use outbox_testing::Published;
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::{BorrowedMessage, Headers},
};

/// Long enough for a leader to move.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(15);

fn builder(kafka: &Kafka) -> KafkaBuilder {
    KafkaBroker::builder(kafka.bootstrap()).message_timeout(MESSAGE_TIMEOUT)
}

/// So patient that on a busy machine, too, suspects are sent again alone in time.
fn patient(kafka: &Kafka) -> KafkaBuilder {
    KafkaBroker::builder(kafka.bootstrap()).message_timeout(4 * MESSAGE_TIMEOUT)
}

fn message(topic: &str, key: &str, payload: impl Into<Vec<u8>>) -> Message {
    Message::builder(topic).key(key).payload(payload).build().expect("message")
}

/// Publishes and gives the kind of each failure; `None` for what was delivered.
async fn publish(
    broker: &KafkaBroker,
    messages: impl IntoIterator<Item = Message>,
) -> Vec<Option<PublishErrorKind>> {
    let not_after = tokio::time::Instant::now() + Duration::from_secs(600);
    let batch: Vec<_> = messages
        .into_iter()
        .map(|message| Delivery::new(Position::START, Lane(0), message))
        .map(|delivery| Outgoing::new(delivery, not_after))
        .collect();
    let outcomes = Outcomes::new(batch.len(), Arc::default());
    broker.publish(batch.clone(), &outcomes).await;
    assert_eq!(outcomes.unanswered(), 0);
    let mut answers = outcomes.take();
    answers.sort_by_key(|(index, _)| *index);
    let kind = |outcome| match outcome {
        Outcome::Failed(kind, _) => Some(kind),
        _ => None,
    };
    answers.into_iter().map(|(_, outcome)| kind(outcome)).collect()
}

/// Publishes one message until it is delivered.
async fn publish_until_delivered(broker: &KafkaBroker, message: &Message) -> Duration {
    let started = Instant::now();
    while publish(broker, [message.clone()]).await != [None] {
        assert!(started.elapsed() < Duration::from_secs(60), "never delivered");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    started.elapsed()
}

/// Everything in a topic, partition by partition.
pub(crate) async fn read(kafka: &Kafka, topic: &str) -> Result<Vec<Published>> {
    let mut records = read_all(kafka.client(), topic, |record| published(record)).await?;
    records.sort_by_key(|record| (record.partition, record.offset));
    Ok(records)
}

/// What `take` takes of each record of a topic, read with a client that knows its cluster.
pub(crate) async fn read_all<T: Send + 'static>(
    mut client: ClientConfig,
    topic: &str,
    take: impl Fn(&BorrowedMessage<'_>) -> T + Send + 'static,
) -> Result<Vec<T>> {
    client.set("group.id", "reader").set("enable.partition.eof", "true");
    let topic = topic.to_owned();
    tokio::task::spawn_blocking(move || {
        let consumer: BaseConsumer = client.create()?;
        let metadata = consumer.fetch_metadata(Some(&topic), Duration::from_secs(10))?;
        let partitions = metadata.topics()[0].partitions();
        let mut assignment = TopicPartitionList::new();
        for partition in partitions {
            assignment.add_partition_offset(&topic, partition.id(), Offset::Beginning)?;
        }
        consumer.assign(&assignment)?;
        let (mut records, mut ended) = (Vec::new(), HashSet::new());
        let deadline = Instant::now() + Duration::from_secs(30);
        while ended.len() < partitions.len() {
            anyhow::ensure!(Instant::now() < deadline, "{topic} cannot be read to its end");
            match consumer.poll(Duration::from_millis(100)) {
                Some(Ok(record)) => records.push(take(&record)),
                Some(Err(KafkaError::PartitionEOF(partition))) => _ = ended.insert(partition),
                // A connection broke: it goes on by itself.
                Some(Err(_)) | None => {}
            }
        }
        Ok(records)
    })
    .await?
}

pub(crate) fn published(record: &impl rdkafka::Message) -> Published {
    let headers = record.headers().into_iter().flat_map(Headers::iter);
    Published::new(
        record.topic(),
        (record.partition(), record.offset()),
        record.key().map(<[u8]>::to_vec),
        record.payload().map(<[u8]>::to_vec),
        headers.map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec))).collect(),
    )
}

/// The keys in a topic, sorted; a message that appears twice is there twice.
async fn keys(kafka: &Kafka, topic: &str) -> Result<Vec<String>> {
    let records = read(kafka, topic).await?;
    let mut keys: Vec<_> = records
        .into_iter()
        .map(|record| String::from_utf8(record.key.unwrap_or_default()))
        .collect::<Result<_, _>>()?;
    keys.sort();
    Ok(keys)
}

pub(crate) async fn create_topic(
    kafka: &Kafka,
    name: &str,
    partitions: i32,
    replicas: i32,
) -> Result<()> {
    let admin: AdminClient<DefaultClientContext> = kafka.client().create()?;
    let topic = NewTopic::new(name, partitions, TopicReplication::Fixed(replicas));
    for outcome in admin.create_topics([&topic], &AdminOptions::new()).await? {
        outcome.map_err(|(topic, code)| anyhow::anyhow!("{topic}: {code}"))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_topic_waits_until_it_exists_and_troubles_no_other() -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let known = kafka.create_topic("known", 1).await?;
    let unknown = names::unique("later");
    let broker = builder(kafka).build()?;
    let batch = [message(&unknown, "k", "p"), message(&known, "k", "p")];
    let started = Instant::now();
    let answers = publish(&broker, batch).await;
    assert_eq!(answers, [Some(PublishErrorKind::Destination), None]);
    assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());

    create_topic(kafka, &unknown, 1, 1).await?;
    let waited = publish_until_delivered(&broker, &message(&unknown, "k", "p")).await;
    println!("a topic that was created was published to after {waited:?}");
    assert_eq!(keys(kafka, &unknown).await?, ["k"]);
    Ok(())
}

/// How many partitions a client that asks now is told of.
async fn partitions(kafka: &Kafka, topic: &str) -> Result<usize> {
    let (client, topic) = (kafka.client(), topic.to_owned());
    let count = move || -> Result<usize> {
        let consumer: BaseConsumer = client.create()?;
        let metadata = consumer.fetch_metadata(Some(&topic), Duration::from_secs(10))?;
        Ok(metadata.topics()[0].partitions().len())
    };
    tokio::task::spawn_blocking(count).await?
}

/// librdkafka asks for the number of partitions every five minutes.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_for_a_partition_that_was_just_added_costs_no_attempt() -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let topic = kafka.create_topic("grows", 3).await?;
    let broker = builder(kafka).build()?;
    let to = |partition| {
        Message::builder(topic.as_str()).key("k").payload("p").partition(partition).build().unwrap()
    };
    publish_until_delivered(&broker, &to(2)).await;
    assert_eq!(publish(&broker, [to(4)]).await, [Some(PublishErrorKind::Failed)], "it has three");
    let admin: AdminClient<DefaultClientContext> = kafka.client().create()?;
    let more = [NewPartitions::new(&topic, 5)];
    let added = admin.create_partitions(&more, &AdminOptions::new()).await?;
    added.into_iter().collect::<Result<Vec<_>, _>>().map_err(|(_, code)| code)?;
    let started = Instant::now();
    while partitions(kafka, &topic).await? < 5 {
        ensure!(started.elapsed() < Duration::from_secs(20), "nobody knows of the new ones");
    }
    loop {
        match publish(&broker, [to(4)]).await[0] {
            None => return Ok(()),
            Some(kind) => assert!(!kind.counts(), "{kind:?}"),
        }
        assert!(started.elapsed() < Duration::from_secs(20), "it is not met");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_topics_own_limit_rejects_the_large_message_and_no_bystander() -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let topic = kafka.create_topic_with("small", 1, &[("max.message.bytes", "2000")]).await?;
    let broker = patient(kafka).linger(Duration::from_millis(500)).build()?;
    publish_until_delivered(&broker, &message(&topic, "warm", "p")).await;
    let mut batch: Vec<_> = ('a'..='j').map(|c| message(&topic, &c.to_string(), "p")).collect();
    batch.insert(5, message(&topic, "large", "x".repeat(5_000)));
    let answers = publish(&broker, batch).await;
    let mut expected = vec![None; 11];
    expected[5] = Some(PublishErrorKind::Rejected);
    assert_eq!(answers, expected);
    let expected: Vec<_> = ('a'..='j').map(String::from).chain(["warm".to_owned()]).collect();
    assert_eq!(keys(kafka, &topic).await?, expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compacted_topic_rejects_the_message_without_a_key_and_no_bystander() -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let topic = kafka.create_topic_with("compact", 1, &[("cleanup.policy", "compact")]).await?;
    let broker = patient(kafka).linger(Duration::from_millis(500)).build()?;
    publish_until_delivered(&broker, &message(&topic, "warm", "p")).await;
    let keyless = Message::builder(topic.as_str()).payload("p").build()?;
    let mut pending = vec![message(&topic, "a", "p"), keyless, message(&topic, "b", "p")];
    // Bystanders are certainly not in the log, so they are offered again and pass.
    let answers = publish(&broker, pending.clone()).await;
    assert_eq!(answers[1], Some(PublishErrorKind::Rejected));
    for index in [2, 0] {
        match answers[index] {
            None => drop(pending.remove(index)),
            Some(kind) => assert_eq!(kind, PublishErrorKind::NotSent),
        }
    }
    pending.retain(|message| message.key().is_some());
    assert!(publish(&broker, pending).await.iter().all(Option::is_none));
    assert_eq!(keys(kafka, &topic).await?, ["a", "b", "warm"]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_of_900_kilobytes_is_delivered() -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let topic = kafka.create_topic("large", 1).await?;
    let payload: Vec<u8> = (0..900_000_u32).map(|n| (n % 251) as u8).collect();
    let broker = builder(kafka).build()?;
    let batch = [message(&topic, "large", payload.clone()), message(&topic, "small", "p")];
    assert_eq!(publish(&broker, batch).await, [None, None]);
    let records = read(kafka, &topic).await?;
    assert!(records[0].payload.as_deref() == Some(&payload), "the payload has changed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_largest_message_fits_a_topic_with_default_limits() -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let topic = kafka.create_topic("largest", 1).await?;
    let broker = builder(kafka).build()?;
    let room = broker.profile().max_message_bytes - message(&topic, "k", "").size();
    assert_eq!(publish(&broker, [message(&topic, "k", "x".repeat(room))]).await, [None]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_kafka_is_published_to_again_by_itself() -> Result<()> {
    if Backend::Kafka.is_left_out() {
        return Ok(());
    }
    let cluster = KafkaCluster::private(Nodes::One).await?;
    let topic = cluster.create_topic("restart", 3).await?;
    let broker = KafkaBroker::builder(cluster.bootstrap())
        .message_timeout(Duration::from_secs(2))
        .build()?;
    publish_until_delivered(&broker, &message(&topic, "before", "p")).await;

    cluster.nodes()[0].stop().await?;
    let started = Instant::now();
    let answers = publish(&broker, (0..30).map(|n| message(&topic, &n.to_string(), "p"))).await;
    assert_eq!(answers, [Some(PublishErrorKind::Unknown); 30]);
    // The simulated cluster shows that it is in time; this machine runs three servers beside.
    let limit = broker.profile().undecided + Duration::from_secs(10);
    assert!(started.elapsed() <= limit, "{:?}", started.elapsed());
    let error = broker.check().await.unwrap_err();
    assert_eq!(error.kind(), PublishErrorKind::Unavailable);

    cluster.nodes()[0].start().await?;
    let waited = publish_until_delivered(&broker, &message(&topic, "after", "p")).await;
    println!("published {waited:?} after the broker was ready again");
    broker.check().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_node_of_three_delays_messages_and_fails_none() -> Result<()> {
    if Backend::Kafka.is_left_out() {
        return Ok(());
    }
    let cluster = KafkaCluster::private(Nodes::Three).await?;
    let topic = cluster.create_topic("three", 6).await?;
    let broker = builder(&cluster).message_timeout(Duration::from_secs(40)).build()?;
    publish_until_delivered(&broker, &message(&topic, "warm", "p")).await;
    cluster.nodes()[0].kill()?;
    let answers = publish(&broker, (0..600).map(|n| message(&topic, &n.to_string(), "p"))).await;
    assert_eq!(answers, vec![None; 600]);
    // No fault of the client's: librdkafka repeats with sequence numbers, so none appears twice.
    let mut expected: Vec<_> = (0..600).map(|n| n.to_string()).collect();
    expected.push("warm".to_owned());
    expected.sort();
    assert_eq!(keys(&cluster, &topic).await?, expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_without_a_leader_holds_up_no_other() -> Result<()> {
    if Backend::Kafka.is_left_out() {
        return Ok(());
    }
    let cluster = KafkaCluster::private(Nodes::Three).await?;
    let topic = names::unique("leaderless");
    create_topic(&cluster, &topic, 3, 1).await?;
    let broker = builder(&cluster).message_timeout(Duration::from_secs(5)).build()?;
    let to = |partition| {
        Message::builder(topic.as_str()).key("k").payload("p").partition(partition).build().unwrap()
    };
    for partition in 0..3 {
        publish_until_delivered(&broker, &to(partition)).await;
    }
    let (client, name) = (cluster.client(), topic.clone());
    let leader = tokio::task::spawn_blocking(move || -> Result<i32> {
        let consumer: BaseConsumer = client.create()?;
        let metadata = consumer.fetch_metadata(Some(&name), Duration::from_secs(10))?;
        Ok(metadata.topics()[0].partitions().iter().find(|p| p.id() == 0).context("p0")?.leader())
    })
    .await??;
    cluster.nodes()[usize::try_from(leader)? - 1].kill()?;

    // Its own messages are unknown: not "unavailable", which would stop everything.
    let stuck = async { publish(&broker, [to(0)]).await };
    let flowing = async {
        let mut rounds = 0;
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(4) {
            assert_eq!(publish(&broker, [to(1), to(2)]).await, [None, None]);
            rounds += 1;
        }
        rounds
    };
    let (stuck, rounds) = tokio::join!(stuck, flowing);
    assert_eq!(stuck, [Some(PublishErrorKind::Unknown)]);
    println!("{rounds} rounds to the other partitions meanwhile");
    // One or two, if they waited for the other partition; hundreds on a machine that has time.
    assert!(rounds > 3, "{rounds}");
    broker.check().await?;
    Ok(())
}
