//! Apache Kafka, shared or a test's own.

mod acl;
mod guard;

use std::{
    net::SocketAddr,
    ops::Deref,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, Consumer},
};

use crate::{
    names,
    native::{self, Server, kafka::Node},
    proxy::Proxy,
};

pub use acl::AUTHORIZER;
pub use guard::Guard;

/// A cluster that answers.
///
/// It holds no client, so that it may be shared by tests with runtimes of their own.
#[derive(Debug)]
pub struct Kafka {
    bootstrap: String,
}

impl Kafka {
    /// Waits until that many brokers answer.
    pub(crate) async fn at(bootstrap: &str, brokers: usize, patience: Duration) -> Result<Self> {
        let kafka = Self { bootstrap: bootstrap.to_owned() };
        let deadline = Instant::now() + patience;
        loop {
            match kafka.brokers().await {
                Ok(seen) if seen >= brokers => return Ok(kafka),
                Ok(seen) if Instant::now() > deadline => {
                    bail!("only {seen} of {brokers} Kafka brokers answer")
                }
                Err(error) if Instant::now() > deadline => {
                    return Err(error).context("no Kafka broker answers");
                }
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Addresses for a client's `bootstrap.servers`.
    #[must_use]
    pub fn bootstrap(&self) -> &str {
        &self.bootstrap
    }

    /// A client configuration with the addresses set, and without librdkafka's log lines about
    /// brokers that a test stopped on purpose.
    #[must_use]
    pub fn client(&self) -> ClientConfig {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", &self.bootstrap).set_log_level(RDKafkaLogLevel::Critical);
        client
    }

    /// How many brokers the cluster knows of.
    ///
    /// # Errors
    ///
    /// When no broker answers.
    pub async fn brokers(&self) -> Result<usize> {
        let client = self.client();
        tokio::task::spawn_blocking(move || {
            let consumer: BaseConsumer = client.create()?;
            Ok(consumer.fetch_metadata(None, METADATA)?.brokers().len())
        })
        .await?
    }

    /// Makes a topic `<prefix>-<random>` with the cluster's default replication, and gives its
    /// name once all its partitions have leaders.
    ///
    /// # Errors
    ///
    /// When the cluster refuses or does not answer.
    pub async fn create_topic(&self, prefix: &str, partitions: i32) -> Result<String> {
        self.create_topic_with(prefix, partitions, &[]).await
    }

    /// The same, with settings of the topic, such as `("max.message.bytes", "2000")`.
    ///
    /// # Errors
    ///
    /// When the cluster refuses or does not answer.
    pub async fn create_topic_with(
        &self,
        prefix: &str,
        partitions: i32,
        settings: &[(&str, &str)],
    ) -> Result<String> {
        let name = names::unique(prefix);
        // -1 is for the cluster's `default.replication.factor`.
        let mut topic = NewTopic::new(&name, partitions, TopicReplication::Fixed(-1));
        for (key, value) in settings {
            topic = topic.set(key, value);
        }
        let admin: AdminClient<DefaultClientContext> = self.client().create()?;
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        for outcome in admin.create_topics([&topic], &options).await? {
            outcome.map_err(|(topic, code)| anyhow!("could not create {topic}: {code}"))?;
        }
        self.leaders(&name, partitions.try_into()?).await?;
        Ok(name)
    }

    /// The partitions of a topic that a node leads.
    ///
    /// # Errors
    ///
    /// When no broker answers.
    pub async fn led_by(&self, topic: &str, node: i32) -> Result<Vec<i32>> {
        let (client, topic) = (self.client(), topic.to_owned());
        tokio::task::spawn_blocking(move || {
            let consumer: BaseConsumer = client.create()?;
            let metadata = consumer.fetch_metadata(Some(&topic), METADATA)?;
            let partitions = metadata.topics().iter().flat_map(|topic| topic.partitions());
            Ok(partitions.filter(|one| one.leader() == node).map(|one| one.id()).collect())
        })
        .await?
    }

    async fn leaders(&self, topic: &str, partitions: usize) -> Result<()> {
        let (client, topic) = (self.client(), topic.to_owned());
        tokio::task::spawn_blocking(move || {
            let consumer: BaseConsumer = client.create()?;
            let deadline = Instant::now() + PATIENCE;
            while Instant::now() < deadline {
                let metadata = consumer.fetch_metadata(Some(&topic), METADATA)?;
                let led = metadata.topics().iter().flat_map(|topic| topic.partitions());
                if led.filter(|partition| partition.leader() >= 0).count() == partitions {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            bail!("{topic} has partitions without a leader after {PATIENCE:?}")
        })
        .await?
    }
}

const METADATA: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(30);

/// How many nodes a private cluster has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nodes {
    /// One broker; a topic has one replica.
    One,
    /// Three brokers; a topic has three replicas, of which two must be in sync.
    Three,
}

impl Nodes {
    fn count(self) -> usize {
        match self {
            Self::One => 1,
            Self::Three => 3,
        }
    }
}

/// A cluster that only one test uses; killed when dropped.
#[derive(Debug)]
pub struct KafkaCluster {
    kafka: Kafka,
    nodes: Vec<Server>,
    inner_ports: Vec<u16>,
    proxies: Vec<Proxy>,
}

impl KafkaCluster {
    /// Starts a cluster of the caller's own, whose nodes may be stopped, killed and paused.
    ///
    /// # Errors
    ///
    /// When it cannot be fetched or started; the message says what to install.
    pub async fn private(nodes: Nodes) -> Result<Self> {
        Self::private_with(nodes, &[]).await
    }

    /// The same, with settings of the nodes, such as an authorizer.
    ///
    /// # Errors
    ///
    /// As [`private`](Self::private).
    pub async fn private_with(
        nodes: Nodes,
        settings: &'static [(&'static str, &'static str)],
    ) -> Result<Self> {
        let set_up = move || native::kafka::nodes(nodes.count(), settings, Ok);
        let nodes = tokio::task::spawn_blocking(set_up).await??;
        Self::started(nodes, vec![], Side::Clients).await
    }

    /// The same, with a [`Proxy`] between the clients and each node: what the nodes say to each
    /// other does not pass it.
    ///
    /// # Errors
    ///
    /// As [`private`](Self::private).
    pub async fn behind_proxies(nodes: Nodes, seed: u64) -> Result<Self> {
        let mut proxies = vec![];
        for node in 0..nodes.count() {
            // Where to is known only once the node has its port.
            let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
            proxies.push(Proxy::start(nowhere, seed.wrapping_add(node as u64)).await?);
        }
        let advertised: Vec<u16> = proxies.iter().map(|proxy| proxy.address().port()).collect();
        let nodes = tokio::task::spawn_blocking(move || {
            let mut advertised = advertised.into_iter();
            let advertise = |_| advertised.next().context("a proxy a node");
            native::kafka::nodes(nodes.count(), &[("", ""); 0], advertise)
        })
        .await??;
        for (proxy, node) in proxies.iter().zip(&nodes) {
            proxy.dial(SocketAddr::from(([127, 0, 0, 1], node.server.port())));
        }
        Self::started(nodes, proxies, Side::Clients).await
    }

    /// Starts one node that lets in only who passes the guard, at
    /// [`guarded_bootstrap`](Self::guarded_bootstrap). The handle itself takes the way of the
    /// nodes, which stays open: it creates topics and reads them.
    ///
    /// # Errors
    ///
    /// As [`private`](Self::private).
    pub async fn guarded(guard: Guard) -> Result<Self> {
        let set_up = move || native::kafka::nodes(1, &guard.settings(), Ok);
        let nodes = tokio::task::spawn_blocking(set_up).await??;
        Self::started(nodes, vec![], Side::Nodes).await
    }

    async fn started(nodes: Vec<Node>, proxies: Vec<Proxy>, side: Side) -> Result<Self> {
        let (nodes, inner_ports): (Vec<_>, Vec<_>) =
            nodes.into_iter().map(|node| (node.server, node.inner_port)).unzip();
        // Together: none is ready before a majority runs.
        for node in &nodes {
            node.launch()?;
        }
        for node in &nodes {
            node.ready().await?;
        }
        let ports: Vec<u16> = match side {
            Side::Nodes => inner_ports.clone(),
            Side::Clients if proxies.is_empty() => nodes.iter().map(Server::port).collect(),
            Side::Clients => proxies.iter().map(|proxy| proxy.address().port()).collect(),
        };
        let kafka = Kafka::at(&addresses(&ports), nodes.len(), PATIENCE).await?;
        Ok(Self { kafka, nodes, inner_ports, proxies })
    }

    /// The nodes' processes, to be stopped, killed, paused and started again.
    #[must_use]
    pub fn nodes(&self) -> &[Server] {
        &self.nodes
    }

    /// The proxies before the nodes, in their order; empty without.
    #[must_use]
    pub fn proxies(&self) -> &[Proxy] {
        &self.proxies
    }

    /// The addresses before which a [`Guard`] stands.
    #[must_use]
    pub fn guarded_bootstrap(&self) -> String {
        let ports: Vec<_> = self.nodes.iter().map(Server::port).collect();
        addresses(&ports)
    }

    /// Addresses that lead a client past the proxies, to the nodes themselves.
    #[must_use]
    pub fn inner_bootstrap(&self) -> String {
        addresses(&self.inner_ports)
    }
}

/// On which side of its nodes a cluster's own handle stands.
#[derive(Debug, Clone, Copy)]
enum Side {
    Clients,
    Nodes,
}

fn addresses(ports: &[u16]) -> String {
    let all: Vec<_> = ports.iter().map(|port| format!("127.0.0.1:{port}")).collect();
    all.join(",")
}

impl Deref for KafkaCluster {
    type Target = Kafka;

    fn deref(&self) -> &Kafka {
        &self.kafka
    }
}
