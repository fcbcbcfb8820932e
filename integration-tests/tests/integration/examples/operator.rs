//! What an operator does with messages that died, from a terminal.

use anyhow::{Context, Result, ensure};
use integration_tests::database::Engine;
use integration_tests::servers;
use outbox_core::broker::PublishErrorKind;
use outbox_core::retry::{OnDeath, TopicPolicy};
use outbox_core::{Dispatcher, Message, MessageId};
use outbox_mysql::sqlx::{Connection, MySqlConnection};
use outbox_mysql::{MySqlOutbox, MySqlSchema, MySqlStore, MySqlWriter};
use outbox_testing::MemoryBroker;

use super::{Ended, ends};

/// A message that is held, then one that waits behind it, and one among the dead letters.
async fn add(url: &str, schema: &MySqlSchema) -> Result<[MessageId; 3]> {
    let mut connection = MySqlConnection::connect(url).await?;
    schema.migrate(&mut connection).await?;
    let outbox = MySqlOutbox::new(MySqlWriter::new(schema));
    let message = |topic: &str, payload: &str| {
        Message::builder(topic).key("7").header("source", "shop").payload(payload).build()
    };
    let messages =
        [message("orders", "poison")?, message("orders", "behind")?, message("audit", "poison")?];
    let mut tx = connection.begin().await?;
    let ids = outbox.add_all(&mut tx, messages).await?;
    tx.commit().await?;
    connection.close().await?;
    ids.try_into().ok().context("three ids")
}

async fn messages_that_died_are_seen_and_acted_on(engine: Engine) -> Result<()> {
    let Some(server) = servers::database_of(engine).await else { return Ok(()) };
    let url = server.create_database().await?;
    let schema = MySqlSchema::new().with_prefix("shop_")?;
    let [held, behind, dead] = add(&url, &schema).await?;
    let broker = MemoryBroker::new();
    broker.fail_when(|d| d.message.payload() == Some(b"poison"), PublishErrorKind::Rejected);
    let store = MySqlStore::connect(&url, &schema).await?;
    let dispatcher = Dispatcher::builder(store, broker.clone())
        .topic("audit", TopicPolicy::new().on_death(OnDeath::Skip))
        .build()?;
    dispatcher.run_until_empty().await?;

    let variables = [("DATABASE_URL", url.as_str()), ("OUTBOX_TABLE_PREFIX", "shop_")];
    let call = async |words: &[&str], code| -> Result<Ended> {
        let ended = ends("operator", words, &variables).await?;
        ensure!(ended.code == Some(code), "{words:?}: {ended:?}");
        Ok(ended)
    };
    let [held, behind, dead] = [held, behind, dead].map(|id| id.to_string());

    let listed = call(&["list"], 0).await?.output;
    let lines: Vec<&str> = listed.lines().collect();
    ensure!(lines.len() == 2, "{listed}");
    ensure!(
        lines[0].starts_with(&format!("held {held} topic=orders key=7 attempts=1")),
        "{listed}"
    );
    ensure!(lines[1].starts_with(&format!("dead {dead} topic=audit key=7 attempts=1")), "{listed}");
    ensure!(call(&["list", "dead"], 0).await?.output.lines().count() == 1);
    let shown = call(&["show", &held], 0).await?.output;
    ensure!(shown.contains("source: shop\n") && shown.ends_with("\npoison\n"), "{shown}");
    call(&["show", &behind], 1).await?;
    call(&["retry", "7"], 2).await?;

    // What waits is no business of an operator's.
    ensure!(call(&["discard", &behind, &dead], 1).await?.output == "changed: 1 of 2\n");
    ensure!(call(&["skip", &held], 0).await?.output == "changed: 1 of 1\n");
    dispatcher.run_until_empty().await?;
    broker.heal();
    ensure!(call(&["retry", &held], 0).await?.output == "changed: 1 of 1\n");
    dispatcher.run_until_empty().await?;
    ensure!(call(&["list"], 0).await?.output.is_empty());
    let published: Vec<_> =
        broker.published().into_iter().map(|record| record.message_id).collect();
    let published: Vec<String> = published.iter().map(ToString::to_string).collect();
    ensure!(published == [behind, held], "{published:?}");
    Ok(())
}

#[tokio::test]
async fn messages_that_died_are_seen_and_acted_on_on_mariadb() -> Result<()> {
    messages_that_died_are_seen_and_acted_on(Engine::MariaDb).await
}

#[tokio::test]
async fn messages_that_died_are_seen_and_acted_on_on_mysql() -> Result<()> {
    messages_that_died_are_seen_and_acted_on(Engine::MySql).await
}
