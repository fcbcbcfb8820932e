//! Messages and topics that Kafka refuses, beside others that it takes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::{
    database::Engine,
    kafka::{AUTHORIZER, Kafka, KafkaCluster, Nodes},
    names,
    servers::{self, Backend},
};
use outbox_core::broker::{
    Broker, BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind,
};
use outbox_core::observe::Event;
use outbox_core::retry::{OnDeath, RetryPolicy, TopicPolicy};
use outbox_core::{DeadLetters, Message, async_trait};
use outbox_kafka::KafkaBroker;
use outbox_mysql::sqlx;

use crate::scenario::{PATIENCE, ROWS_IN_FLIGHT, Relay, Worker, World, broker, store, until};

/// More than the topic takes.
const LARGE: usize = 5_000;

async fn topic_of_small_messages(kafka: &Kafka) -> Result<String> {
    kafka.create_topic_with("small", 3, &[("max.message.bytes", "2000")]).await
}

fn message(topic: &str, key: &str, payload: impl Into<Vec<u8>>) -> Result<Message> {
    Ok(Message::builder(topic).key(key).payload(payload).build()?)
}

/// `key:payload` of all records of a key, in order.
async fn arrived(kafka: &Kafka, topic: &str, key: &str) -> Result<Vec<String>> {
    let records = crate::kafka::read(kafka, topic).await?;
    let own = records.into_iter().filter(|record| record.key.as_deref() == Some(key.as_bytes()));
    Ok(own.map(|r| String::from_utf8_lossy(&r.payload.unwrap_or_default()).into()).collect())
}

async fn until_left(world: &World<'_>, rows: i64) -> Result<()> {
    let start = std::time::Instant::now();
    loop {
        let left = world.number("SELECT COUNT(*) FROM outbox").await?;
        if left == rows {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{left} rows are left instead of {rows}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Kafka, but messages with the key `flaky` fail.
#[derive(Debug)]
struct Flaky(KafkaBroker);

#[async_trait]
impl Broker for Flaky {
    fn profile(&self) -> BrokerProfile {
        self.0.profile()
    }

    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
        let is_flaky = |one: &Outgoing| one.delivery.message.key() == Some(b"flaky");
        if batch.iter().any(is_flaky) {
            for (index, one) in batch.iter().enumerate() {
                let kind = if is_flaky(one) {
                    PublishErrorKind::Failed
                } else {
                    PublishErrorKind::NotSent
                };
                outcomes.failed(index, kind.into());
            }
        } else {
            self.0.publish(batch, outcomes).await;
        }
    }

    async fn check(&self) -> Result<(), PublishError> {
        self.0.check().await
    }

    async fn close(&self, within: Duration) {
        self.0.close(within).await;
    }
}

async fn every_relay_is_killed(engine: Engine) -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    let world = World::on_topic(database, kafka, topic_of_small_messages(kafka).await?).await?;
    let topic = &world.topic;
    // Longer than all that follows, so that the first attempt is the only one.
    let patient = RetryPolicy::exponential(Duration::from_secs(300), Duration::from_secs(300));
    let first = Worker::run(store(&world.url)?, Flaky(broker(kafka.bootstrap())?), |builder| {
        builder.rows_in_flight(ROWS_IN_FLIGHT).retry(patient)
    })?;
    let large = message(topic, "large", vec![b'x'; LARGE])?;
    let id = large.id();
    let mut added = vec![large, message(topic, "flaky", "1")?];
    for key in ["large", "flaky", "other"] {
        added.push(message(topic, key, "2")?);
    }
    world.add(added).await?;
    until("one is held and one is parked", PATIENCE, || {
        first.count(|event| matches!(event, Event::Held { .. })) == 1
            && first.count(|event| matches!(event, Event::RetryScheduled { .. })) == 1
    })
    .await?;
    until_left(&world, 4).await?;
    let rows = standing(&world).await?;
    let waiting = rows.iter().map(|(_, attempts, held, parked)| (*attempts, *held, *parked));
    let expected = [(1, true, false), (1, false, true), (0, false, false), (0, false, false)];
    ensure!(waiting.collect::<Vec<_>>() == expected, "{rows:?}");

    first.crash().await;
    let mut relay = Relay::start(&world)?;
    for round in ["3", "4"] {
        relay.gains().await?;
        // Once these have arrived, the rows before them have been read by the new relay.
        let others = (0..20).map(|key| message(topic, &format!("other-{key}"), round));
        world.add(others.collect::<Result<_>>()?).await?;
        until_left(&world, 4).await?;
        let now = standing(&world).await?;
        ensure!(now == rows, "{now:?} instead of {rows:?}");
        relay.kill().await?;
        relay = Relay::start(&world)?;
    }

    // The operator gives the large one up, and its key goes on.
    ensure!(store(&world.url)?.skip(&[id]).await? == 1, "the held message is not known");
    until_left(&world, 2).await?;
    ensure!(arrived(kafka, topic, "large").await? == ["2"]);
    ensure!(arrived(kafka, topic, "flaky").await?.is_empty());
    ensure!(world.number("SELECT COUNT(*) FROM outbox_dead").await? == 1);
    relay.stop().await
}

mod a_held_key_stays_held_and_a_parked_one_parked_after_every_relay_was_killed {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        every_relay_is_killed(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        every_relay_is_killed(Engine::MySql).await
    }
}

/// How a row waits: its id, its attempts, whether it is held, whether it waits for a retry.
type Row = (u64, u32, bool, bool);

async fn standing(world: &World<'_>) -> Result<Vec<Row>> {
    let sql = "SELECT id, attempts, held_at IS NOT NULL AS held, \
               COALESCE(available_at > UTC_TIMESTAMP(6), FALSE) AS parked FROM outbox ORDER BY id";
    Ok(sqlx::query_as(sql).fetch_all(&mut world.connect().await?).await?)
}

async fn one_is_too_large(engine: Engine) -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    let world = World::on_topic(database, kafka, topic_of_small_messages(kafka).await?).await?;
    let topic = &world.topic;
    let mut worker = Worker::patient(&world, |builder| {
        builder.topic(topic, TopicPolicy::new().on_death(OnDeath::Skip))
    })?;
    let mut added = vec![message(topic, "large", "1")?];
    added.push(message(topic, "large", vec![b'x'; LARGE])?);
    added.push(message(topic, "large", "3")?);
    let others = (0..200).map(|n| message(topic, &format!("other-{}", n % 20), n.to_string()));
    added.extend(others.collect::<Result<Vec<_>>>()?);
    world.add(added).await?;
    world.until_empty().await?;
    let summary = worker.stop().await?;
    ensure!((summary.delivered, summary.dead, summary.held) == (202, 1, 0), "{summary:?}");
    ensure!(arrived(kafka, topic, "large").await? == ["1", "3"]);
    let dead = "SELECT CAST(OCTET_LENGTH(payload) AS SIGNED) FROM outbox_dead";
    ensure!(world.number(dead).await? == LARGE as i64);
    for key in 0..20 {
        let arrived = arrived(kafka, topic, &format!("other-{key}")).await?;
        let expected: Vec<_> = (0..10).map(|n| (key + 20 * n).to_string()).collect();
        ensure!(arrived == expected, "{arrived:?}");
    }
    Ok(())
}

mod under_the_policy_skip_a_message_that_is_too_large_dies_and_its_key_goes_on {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        one_is_too_large(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        one_is_too_large(Engine::MySql).await
    }
}

/// Messages to a topic that cannot be written wait without an attempt; those to another flow.
async fn a_topic_waits(
    world: &World<'_>,
    closed: &str,
    worker: &Worker,
    open: impl AsyncFnOnce() -> Result<()>,
) -> Result<()> {
    let all = |topic: &str| -> Result<Vec<_>> {
        (0..100).map(|n| message(topic, &format!("key-{}", n % 10), n.to_string())).collect()
    };
    world.add(all(closed)?).await?;
    let is_closed = || worker.handle.status().closed_topics.iter().any(|topic| **topic == *closed);
    until("the topic is known to be closed", PATIENCE, is_closed).await?;
    for round in 1..=3 {
        world.add(all(&world.topic)?).await?;
        until_left(world, 100).await?;
        ensure!(worker.delivered() == 100 * round, "{} delivered", worker.delivered());
    }
    super::no_attempt_is_counted(world).await?;
    ensure!(worker.count(|event| matches!(event, Event::CircuitOpened)) == 0);

    open().await?;
    world.until_empty().await?;
    let opened = worker.collect(|_, event| match event {
        Event::TopicOpened { topic, after } if **topic == *closed => Some(*after),
        _ => None,
    });
    println!("{closed} was closed for {:.1?}", opened.first().context("it was never opened")?);
    for key in 0..10 {
        let arrived = arrived(world.kafka, closed, &format!("key-{key}")).await?;
        let expected: Vec<_> = (0..10).map(|n| (key + 10 * n).to_string()).collect();
        ensure!(arrived == expected, "{arrived:?}");
    }
    Ok(())
}

async fn one_topic_is_unknown(engine: Engine) -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    let world = World::new(database, kafka).await?;
    let worker = Worker::patient(&world, |builder| builder)?;
    let unknown = names::unique("later");
    let create = async || crate::kafka::create_topic(kafka, &unknown, 3, 1).await;
    a_topic_waits(&world, &unknown, &worker, create).await
}

mod messages_to_an_unknown_topic_wait_for_it_and_others_do_not_notice {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        one_topic_is_unknown(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        one_topic_is_unknown(Engine::MySql).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn messages_to_a_forbidden_topic_wait_until_it_is_allowed_and_others_do_not_notice()
-> Result<()> {
    let Some(database) = servers::mariadb().await else { return Ok(()) };
    if Backend::Kafka.is_left_out() {
        return Ok(());
    }
    let cluster = KafkaCluster::private_with(Nodes::One, AUTHORIZER).await?;
    let forbidden = cluster.create_topic("forbidden", 3).await?;
    cluster.forbid_writing(&forbidden).await?;
    let world = World::new(database, &cluster).await?;
    let worker = Worker::patient(&world, |builder| builder)?;
    let allow = async || cluster.allow_writing(&forbidden).await;
    a_topic_waits(&world, &forbidden, &worker, allow).await
}
