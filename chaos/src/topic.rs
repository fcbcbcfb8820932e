//! Topics, made and deleted whatever the brokers suffer.

use std::{
    future::Future,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use integration_tests::kafka::KafkaCluster;
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    types::RDKafkaErrorCode,
};

pub(crate) const PARTITIONS: i32 = 6;

/// How long brokers that suffer may take.
const PATIENCE: Duration = Duration::from_secs(120);
const PAUSE: Duration = Duration::from_millis(200);

/// A client that goes past the proxies.
pub(crate) fn inner_client(cluster: &KafkaCluster) -> ClientConfig {
    let mut client = cluster.client();
    client.set("bootstrap.servers", cluster.inner_bootstrap());
    client
}

/// Creates the topic, with a copy on each of three brokers. The moment after that, in microseconds
/// of the machine's clock.
pub(crate) async fn create(cluster: &KafkaCluster, name: &str) -> Result<u64> {
    let admin = admin(cluster)?;
    // -1 is for the cluster's `default.replication.factor`.
    let topic = NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(-1));
    insist(name, || async {
        let created = admin.create_topics([&topic], &options()).await?;
        // There already: an answer was lost, as `delete` waits until the topic is gone.
        let there = RDKafkaErrorCode::TopicAlreadyExists;
        Ok(created.into_iter().all(|it| it.map_or_else(|(_, code)| code == there, |_| true)))
    })
    .await?;
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_micros().try_into()?)
}

/// Deletes the topic, and waits until no broker knows it.
pub(crate) async fn delete(cluster: &KafkaCluster, name: &str) -> Result<()> {
    let admin = admin(cluster)?;
    insist(name, || async {
        let deleted = admin.delete_topics(&[name], &options()).await?;
        let unknown = RDKafkaErrorCode::UnknownTopicOrPartition;
        // Gone when it is unknown: the second time, if all goes well.
        Ok(deleted.into_iter().all(|it| it.is_err_and(|(_, code)| code == unknown)))
    })
    .await
}

fn admin(cluster: &KafkaCluster) -> Result<AdminClient<DefaultClientContext>> {
    Ok(inner_client(cluster).create()?)
}

fn options() -> AdminOptions {
    AdminOptions::new().operation_timeout(Some(Duration::from_secs(10)))
}

/// Tries until it is done.
async fn insist<F: Future<Output = Result<bool>>>(
    name: &str,
    attempt: impl Fn() -> F,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(true) => return Ok(()),
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| name.to_owned());
            }
            Ok(false) if Instant::now() > deadline => bail!("{name}: not within {PATIENCE:?}"),
            _ => tokio::time::sleep(PAUSE).await,
        }
    }
}
