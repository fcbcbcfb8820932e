//! The rung in the middle: containers, if a daemon answers and has the image.

use std::{env, time::Duration};

use anyhow::{Context, Result, bail};
use testcontainers::{
    ContainerAsync, ContainerRequest, GenericImage, ImageExt,
    core::{IntoContainerPort, client::docker_client_instance},
    runners::AsyncRunner,
};
use tokio::time::timeout;

use crate::{
    database::{Database, Engine, PASSWORD},
    kafka::Kafka,
    native::ports,
    watchdog,
};

/// A daemon that takes longer to say hello is taken for none: the ladder has another rung.
const HELLO: Duration = Duration::from_secs(3);
/// From created to answering; a pull comes on top.
const PATIENCE: Duration = Duration::from_secs(60);

/// A database server in a container, or why there is none.
pub(crate) async fn database(engine: Engine) -> Result<Database> {
    let image = Image::of(engine.name())?;
    let port = ports::free()?;
    let fast = ["--innodb-flush-log-at-trx-commit=2", "--sync-binlog=0", "--max-connections=1000"];
    // The official images and their likes: a first argument with a dash is one of the server's.
    let request = GenericImage::from(&image)
        .with_mapped_port(port, 3306.tcp())
        .with_env_var(format!("{}_ROOT_PASSWORD", engine.name().to_uppercase()), PASSWORD)
        .with_cmd(fast);
    start(image, request).await?;
    Database::at(engine, &format!("mysql://root:{PASSWORD}@127.0.0.1:{port}"), PATIENCE).await
}

/// One node of Kafka in a container, or why there is none.
pub(crate) async fn kafka() -> Result<Kafka> {
    let image = Image::of("kafka")?;
    // Clients dial what the broker advertises, so the port must be known before it starts.
    let port = ports::free()?;
    let advertised = format!("PLAINTEXT://127.0.0.1:{port}");
    let settings = [
        ("KAFKA_NODE_ID", "1"),
        ("KAFKA_PROCESS_ROLES", "broker,controller"),
        ("KAFKA_LISTENERS", "PLAINTEXT://:9092,CONTROLLER://:9093"),
        ("KAFKA_ADVERTISED_LISTENERS", &advertised),
        ("KAFKA_LISTENER_SECURITY_PROTOCOL_MAP", "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT"),
        ("KAFKA_CONTROLLER_LISTENER_NAMES", "CONTROLLER"),
        ("KAFKA_CONTROLLER_QUORUM_VOTERS", "1@localhost:9093"),
        ("KAFKA_AUTO_CREATE_TOPICS_ENABLE", "false"),
        ("KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR", "1"),
        ("KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1"),
        ("KAFKA_TRANSACTION_STATE_LOG_MIN_ISR", "1"),
        ("KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS", "0"),
    ];
    let mut request = GenericImage::from(&image).with_mapped_port(port, 9092.tcp());
    for (name, value) in settings {
        request = request.with_env_var(name, value);
    }
    start(image, request).await?;
    Kafka::at(&format!("127.0.0.1:{port}"), 1, PATIENCE).await
}

/// Starts the container for as long as this process lives.
async fn start(image: Image, request: ContainerRequest<GenericImage>) -> Result<()> {
    // In a runtime of its own: the connections to the daemon must not die with the runtime of the
    // test that happened to come first.
    let container = tokio::task::spawn_blocking(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            image.is_at_hand().await?;
            anyhow::Ok(request.start().await?)
        })
    })
    .await??;
    // Never dropped: the watchdog removes it, also after a kill.
    let container: &ContainerAsync<_> = Box::leak(Box::new(container));
    watchdog::guard_container(container.id())
}

/// The name of an image.
struct Image {
    name: String,
    tag: String,
}

impl Image {
    /// The official one, unless the environment names another.
    fn of(backend: &str) -> Result<Self> {
        let variable = format!("OUTBOX_TEST_{}_IMAGE", backend.to_uppercase());
        let image = env::var(variable).ok().filter(|image| !image.is_empty());
        let image = match (&image, backend) {
            (Some(image), _) => image,
            (None, "mariadb") => "mariadb:10.11",
            (None, "mysql") => "mysql:9",
            (None, "kafka") => "apache/kafka:4.1.0",
            (None, _) => bail!("no image is known for {backend}"),
        };
        Self::parse(image).with_context(|| format!("{image} has no tag"))
    }

    fn parse(image: &str) -> Option<Self> {
        let (name, tag) = image.rsplit_once(':')?;
        // A colon before the last slash is a registry's port.
        (!tag.contains('/')).then(|| Self { name: name.into(), tag: tag.into() })
    }

    /// Checks what could hang otherwise: a daemon that is not there, a pull that nobody asked for.
    async fn is_at_hand(&self) -> Result<()> {
        let docker = timeout(HELLO, docker_client_instance()).await.context(SILENT)??;
        timeout(HELLO, docker.ping()).await.context(SILENT)?.context("no daemon")?;
        let image = format!("{}:{}", self.name, self.tag);
        let local = timeout(HELLO, docker.inspect_image(&image)).await.context(SILENT)?;
        if local.is_err() && env::var("OUTBOX_TEST_PULL").as_deref() != Ok("1") {
            bail!("the daemon has no image {image}, and OUTBOX_TEST_PULL=1 is not set");
        }
        Ok(())
    }
}

const SILENT: &str = "the daemon is silent";

impl From<&Image> for GenericImage {
    fn from(image: &Image) -> Self {
        Self::new(&image.name, &image.tag)
    }
}

#[cfg(test)]
mod tests {
    use super::Image;

    #[test]
    fn an_image_is_split_at_its_tag() {
        let image = Image::parse("host:5000/apache/kafka:4.1.0").unwrap();
        assert_eq!((&*image.name, &*image.tag), ("host:5000/apache/kafka", "4.1.0"));
        assert!(Image::parse("host:5000/kafka").is_none());
    }
}
