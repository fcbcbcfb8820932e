//! The rung in the middle: containers, if a daemon answers and has the image.

use std::{collections::HashMap, env, mem, time::Duration};

use anyhow::{Context, Error, Result, anyhow, bail};
use testcontainers::{
    ContainerAsync, ContainerRequest, GenericImage, ImageExt,
    bollard::models::HostConfig,
    core::{IntoContainerPort, client::docker_client_instance},
    runners::AsyncRunner,
};
use tokio::time::timeout;

use crate::{
    database::{Database, Engine, PASSWORD},
    kafka::Kafka,
    names,
    native::{ports, tool},
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
    let url = format!("mysql://root:{PASSWORD}@127.0.0.1:{port}");
    started(image, request, async move { Database::at(engine, &url, PATIENCE).await }).await
}

/// One node of Kafka in a container, or why there is none.
pub(crate) async fn kafka() -> Result<Kafka> {
    let image = Image::of("kafka")?;
    // Clients dial what the broker advertises, so the port must be known before it starts. Inside
    // it is the same, as the broker dials itself there too.
    let port = ports::free()?;
    let listeners = format!("PLAINTEXT://:{port},CONTROLLER://:9093");
    let advertised = format!("PLAINTEXT://127.0.0.1:{port}");
    let settings = [
        ("KAFKA_NODE_ID", "1"),
        ("KAFKA_PROCESS_ROLES", "broker,controller"),
        ("KAFKA_LISTENERS", &listeners),
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
    let mut request = GenericImage::from(&image).with_mapped_port(port, port.tcp());
    for (name, value) in settings {
        request = request.with_env_var(name, value);
    }
    let bootstrap = format!("127.0.0.1:{port}");
    started(image, request, async move { Kafka::at(&bootstrap, 1, PATIENCE).await }).await
}

/// Starts a container for as long as this process lives, and waits until it is ready.
async fn started<T: Send + 'static>(
    image: Image,
    request: ContainerRequest<GenericImage>,
    ready: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    // In a runtime of its own: the connections to the daemon must not die with the runtime of the
    // test that happened to come first.
    tokio::task::spawn_blocking(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            image.is_at_hand().await?;
            // Named and guarded before there is one: a kill between the two would leave it behind.
            let name = names::unique("outbox-tests");
            watchdog::guard_container(&name)?;
            let request = request.with_container_name(name).with_host_config_modifier(on_loopback);
            let container = request.start().await?;
            let ready = tokio::select! {
                ready = ready => ready,
                ended = end(&container) => Err(ended),
            };
            match ready {
                Ok(ready) => {
                    // Never dropped: the watchdog removes it, also after a kill.
                    mem::forget(container);
                    Ok(ready)
                }
                Err(error) => {
                    let log = log(&container).await.unwrap_or_default();
                    bail!("{error:#}; its log:\n{log}")
                }
            }
        })
    })
    .await?
}

/// Publishes ports on loopback only: everybody knows the password of the server behind it.
fn on_loopback(host: &mut HostConfig) {
    let ports = host.port_bindings.iter_mut().flat_map(HashMap::values_mut);
    for binding in ports.flatten().flatten() {
        binding.host_ip = Some("127.0.0.1".into());
    }
}

/// Returns when the container has ended, or nothing can be known of it.
async fn end(container: &ContainerAsync<GenericImage>) -> Error {
    loop {
        match container.is_running().await {
            Ok(true) => tokio::time::sleep(Duration::from_millis(100)).await,
            Ok(false) => return anyhow!("the container ended"),
            Err(error) => return error.into(),
        }
    }
}

/// The last lines that the server wrote.
async fn log(container: &ContainerAsync<GenericImage>) -> Result<String> {
    let mut log = container.stdout_to_vec().await?;
    log.extend(container.stderr_to_vec().await?);
    Ok(tool::tail(&String::from_utf8_lossy(&log)))
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
