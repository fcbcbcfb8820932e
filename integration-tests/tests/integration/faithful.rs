//! What was added arrives byte for byte, through the database and Kafka.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};
use integration_tests::{database::Engine, servers};
use outbox_core::message::MessageBuilder;
use outbox_core::{Message, MessageId};
use outbox_testing::Published;

use crate::scenario::{Worker, World};

/// One message of each kind.
fn all_kinds(topic: &str) -> Result<Vec<Message>> {
    let message = || Message::builder(topic);
    let every_byte: Vec<u8> = (0..=255).collect();
    let large: Vec<u8> = (0..900_000_u32).map(|n| (n % 251) as u8).collect();
    let mut kinds: Vec<MessageBuilder> = vec![
        message().key("key").payload("payload"),
        message().no_key().payload("no key"),
        message().key("").payload("an empty key"),
        message().key("tombstone").tombstone(),
        message().key("empty").payload(""),
        message().key("large").payload(large),
        message().key(every_byte.clone()).payload(every_byte.clone()),
        message().key("headers").payload("p").header("a", "1").header("b", "2").header("a", "3"),
        message().key("headers").payload("p").header("empty", "").null_header("null"),
        message().key("headers").payload("p").header("binary", every_byte),
        message().key("headers").payload("p").header("quote\"", "\\ \u{1f980} \0"),
    ];
    // A collation would take these for one key.
    for key in ["case", "CASE", "case ", "ca\u{301}se", "c\u{e1}se", "case\0"] {
        kinds.push(message().key(key).payload(key));
    }
    for partition in 0..4 {
        kinds.push(message().no_key().partition(partition).payload("p"));
        kinds.push(message().key(vec![0xff, partition as u8]).partition(partition).payload("p"));
    }
    let built = kinds.into_iter().map(MessageBuilder::build);
    built.collect::<Result<_, _>>().context("a message")
}

fn check(message: &Message, record: &Published) -> Result<()> {
    let id = message.id();
    ensure!(record.key.as_deref() == message.key(), "{id}: key {:?}", record.key);
    ensure!(record.payload.as_deref() == message.payload(), "{id}: payload has changed");
    ensure!(message.partition().is_none_or(|one| one == record.partition), "{id}: partition");
    let sent = message.headers().iter();
    let sent: Vec<_> = sent.map(|(name, value)| (name, value.map(<[u8]>::to_vec))).collect();
    let own = record.headers.iter().filter(|(name, _)| !name.starts_with("outbox-"));
    let own: Vec<_> = own.map(|(name, value)| (name.as_str(), value.clone())).collect();
    ensure!(own == sent, "{id}: headers {own:?} instead of {sent:?}");
    Ok(())
}

async fn everything_arrives_as_it_was_added(engine: Engine) -> Result<()> {
    let Some(database) = servers::database_of(engine).await else { return Ok(()) };
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let topic = kafka.create_topic("faithful", 4).await?;
    let world = World::on_topic(database, kafka, topic).await?;
    let added = all_kinds(&world.topic)?;
    // One by one and together: two statements.
    let (single, together) = added.split_at(added.len() / 2);
    for message in single {
        world.add(vec![message.clone()]).await?;
    }
    world.add(together.to_vec()).await?;
    let mut worker = Worker::patient(&world, |builder| builder)?;
    world.until_empty().await?;
    worker.stop().await?;

    let records = crate::kafka::read(kafka, &world.topic).await?;
    ensure!(records.len() == added.len(), "{} of {} arrived", records.len(), added.len());
    let records: HashMap<MessageId, Published> =
        records.into_iter().map(|record| (record.message_id, record)).collect();
    for message in &added {
        check(message, records.get(&message.id()).context("one is missing")?)?;
    }
    Ok(())
}

mod keys_payloads_headers_and_partitions_arrive_byte_for_byte {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn mariadb() -> Result<()> {
        everything_arrives_as_it_was_added(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn mysql() -> Result<()> {
        everything_arrives_as_it_was_added(Engine::MySql).await
    }
}
