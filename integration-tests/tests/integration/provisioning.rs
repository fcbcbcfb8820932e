//! Each backend answers, on whatever rung it was found; and what is made to be hurt can be.

use std::time::Duration;

use anyhow::{Context, Result};
use integration_tests::{
    database::{Database, Engine, Options},
    kafka::{Kafka, KafkaCluster, Nodes},
    servers,
};
use rdkafka::{
    ClientConfig, Message,
    consumer::{Consumer, StreamConsumer},
    producer::{FutureProducer, FutureRecord},
};
use sqlx::{Connection, MySqlConnection};

#[tokio::test]
async fn mariadb_answers_in_a_database_of_ones_own() -> Result<()> {
    let Some(database) = servers::mariadb().await else { return Ok(()) };
    assert!(database.version().contains("MariaDB"), "{}", database.version());
    own_database(database).await
}

#[tokio::test]
async fn mysql_answers_in_a_database_of_ones_own() -> Result<()> {
    let Some(database) = servers::mysql().await else { return Ok(()) };
    assert!(!database.version().contains("MariaDB"), "{}", database.version());
    own_database(database).await
}

async fn own_database(database: &Database) -> Result<()> {
    let url = database.create_database().await?;
    let mut connection = MySqlConnection::connect(&url).await?;
    sqlx::query("CREATE TABLE t (id INT PRIMARY KEY)").execute(&mut connection).await?;
    let tables: Vec<String> = sqlx::query_scalar("SHOW TABLES").fetch_all(&mut connection).await?;
    assert_eq!(tables, ["t"]);
    Ok(connection.close().await?)
}

#[tokio::test]
async fn kafka_gives_back_what_it_was_given() -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    let topic = kafka.create_topic("provisioning", 3).await?;
    produce(kafka, &topic, "key", "payload").await?;
    assert_eq!(consume_one(kafka, &topic).await?, "payload");
    Ok(())
}

#[tokio::test]
async fn a_private_database_keeps_its_data_and_its_port_over_a_kill() -> Result<()> {
    for engine in Engine::ALL {
        if servers::database_of(engine).await.is_none() {
            continue;
        }
        let database = Database::private(engine, Options::durable()).await?;
        let url = database.create_database().await?;
        let mut connection = MySqlConnection::connect(&url).await?;
        sqlx::query("CREATE TABLE t (id INT PRIMARY KEY)").execute(&mut connection).await?;
        sqlx::query("INSERT INTO t VALUES (7)").execute(&mut connection).await?;
        let durable: (u32, u32) =
            sqlx::query_as("SELECT @@innodb_flush_log_at_trx_commit, @@sync_binlog")
                .fetch_one(&mut connection)
                .await?;
        assert_eq!(durable, (1, 1));

        database.server().kill()?;
        assert_eq!(database.server().pid(), None);
        sqlx::query("SELECT 1").execute(&mut connection).await.unwrap_err();
        database.server().start().await?;

        let mut connection = MySqlConnection::connect(&url).await?;
        let kept: i32 = sqlx::query_scalar("SELECT id FROM t").fetch_one(&mut connection).await?;
        assert_eq!(kept, 7);

        database.server().pause()?;
        let answer = sqlx::query("SELECT 1").execute(&mut connection);
        tokio::time::timeout(Duration::from_millis(300), answer).await.unwrap_err();
        database.server().resume()?;
        database.server().stop().await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_private_cluster_delivers_while_one_of_its_three_nodes_is_dead() -> Result<()> {
    if servers::kafka().await.is_none() {
        return Ok(());
    }
    let cluster = KafkaCluster::private(Nodes::Three).await?;
    let topic = cluster.create_topic("three", 6).await?;
    produce(&cluster, &topic, "key", "before").await?;
    cluster.nodes()[0].kill()?;
    produce(&cluster, &topic, "key", "without the first").await?;
    cluster.nodes()[0].start().await?;
    cluster.nodes()[1].stop().await?;
    produce(&cluster, &topic, "key", "without the second").await?;
    Ok(())
}

async fn produce(kafka: &Kafka, topic: &str, key: &str, payload: &str) -> Result<()> {
    let mut client: ClientConfig = kafka.client();
    client.set("enable.idempotence", "true").set("message.timeout.ms", "60000");
    let producer: FutureProducer = client.create()?;
    let record = FutureRecord::to(topic).key(key).payload(payload);
    producer.send(record, Duration::ZERO).await.map_err(|(error, _)| error)?;
    Ok(())
}

async fn consume_one(kafka: &Kafka, topic: &str) -> Result<String> {
    let consumer: StreamConsumer =
        kafka.client().set("group.id", topic).set("auto.offset.reset", "earliest").create()?;
    consumer.subscribe(&[topic])?;
    let message = tokio::time::timeout(Duration::from_secs(30), consumer.recv()).await??;
    Ok(message.payload_view::<str>().context("a payload")??.to_owned())
}
