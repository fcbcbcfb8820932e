//! Apache Kafka in KRaft mode, each node broker and controller at once.

use std::{
    fmt::Display,
    fs, iter,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use rand::RngCore;

use super::{
    account::Account,
    cache::{Cache, open_folder},
    folder::RunFolder,
    maven, ports,
    server::{Recipe, Server},
    tool,
};

/// Where a node listens.
#[derive(Debug, Clone, Copy)]
struct Ports {
    /// For clients.
    clients: u16,
    /// For the other brokers, so that trouble put between clients and a broker stays there.
    brokers: u16,
    controller: u16,
}

/// A node, and the port on which the other brokers reach it: a client that begins there is led
/// past the port that is advertised to others.
pub(crate) struct Node {
    pub(crate) server: Server,
    pub(crate) inner_port: u16,
}

/// The nodes of a new cluster, set up but not started.
///
/// `advertise` turns the port that a node listens on into the one that clients are told to dial.
/// The settings are added to those of each node.
pub(crate) fn nodes(
    count: usize,
    settings: &[(&str, impl Display)],
    mut advertise: impl FnMut(u16) -> Result<u16>,
) -> Result<Vec<Node>> {
    tool::require("java", "openjdk-17-jre-headless")?;
    let cache = Cache::open()?;
    let jars = maven::kafka_jars(&cache)?;
    let template = template(&cache, &jars)?;
    let cluster = id();
    let ports: Vec<Ports> = iter::repeat_with(|| {
        Ok(Ports { clients: ports::free()?, brokers: ports::free()?, controller: ports::free()? })
    })
    .take(count)
    .collect::<Result<_>>()?;
    (1..=count)
        .map(|node| {
            let own = ports[node - 1];
            let folder = RunFolder::new(&cache, "kafka")?;
            let data = folder.path().join("data");
            let properties = folder.path().join("server.properties");
            let advertised = advertise(own.clients)?;
            let mut configuration = configuration(node, &ports, advertised, &data);
            for (name, value) in settings {
                configuration += &format!("{name}={value}\n");
            }
            fs::write(&properties, configuration)?;
            copy_template(&template, &data, node, &cluster)?;
            let mut arguments = java_arguments(&jars);
            arguments.extend(["kafka.Kafka".into(), properties.display().to_string()]);
            let server = Server::new(Recipe {
                name: format!("kafka node {node}"),
                port: own.clients,
                program: "java".into(),
                arguments,
                ready: "Kafka Server started",
                folder,
            });
            Ok(Node { server, inner_port: own.brokers })
        })
        .collect()
}

fn java_arguments(jars: &Path) -> Vec<String> {
    vec![
        "-Xms128m".into(),
        "-Xmx512m".into(),
        "-XX:+UseSerialGC".into(),
        format!("-Dlog4j2.configurationFile={}", jars.join(maven::LOG4J).display()),
        "-cp".into(),
        format!("{}/*", jars.display()),
    ]
}

fn configuration(node: usize, ports: &[Ports], advertised: u16, data: &Path) -> String {
    let own = ports[node - 1];
    let voters: Vec<String> = ports
        .iter()
        .enumerate()
        .map(|(index, ports)| format!("{}@127.0.0.1:{}", index + 1, ports.controller))
        .collect();
    let replicas = ports.len();
    let in_sync = if replicas < 3 { 1 } else { 2 };
    format!(
        "process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
listeners=CLIENTS://127.0.0.1:{clients},BROKERS://127.0.0.1:{brokers},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=CLIENTS://127.0.0.1:{advertised},BROKERS://127.0.0.1:{brokers}
listener.security.protocol.map=CLIENTS:PLAINTEXT,BROKERS:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=BROKERS
log.dirs={data}
auto.create.topics.enable=false
unclean.leader.election.enable=false
default.replication.factor={replicas}
min.insync.replicas={in_sync}
offsets.topic.replication.factor={replicas}
offsets.topic.num.partitions=4
transaction.state.log.replication.factor={replicas}
transaction.state.log.min.isr={in_sync}
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor={replicas}
share.coordinator.state.topic.min.isr={in_sync}
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=6000
num.network.threads=2
num.io.threads=4
",
        voters = voters.join(","),
        clients = own.clients,
        brokers = own.brokers,
        controller = own.controller,
        data = data.display(),
    )
}

/// A formatted data folder. Formatting takes a second of Java, so it is done once; a node is told
/// from another, and a cluster from another, by one file in it.
fn template(cache: &Cache, jars: &Path) -> Result<PathBuf> {
    let name = jars.file_name().unwrap_or_default().to_string_lossy();
    cache.once(&format!("{name}-data"), |folder| {
        let data = folder.join("data");
        let ports = Ports { clients: 9092, brokers: 9093, controller: 9094 };
        let properties = folder.join("server.properties");
        fs::write(&properties, configuration(1, &[ports], ports.clients, &data))?;
        let mut format = Command::new("java");
        format
            .args(java_arguments(jars))
            .args(["kafka.tools.StorageTool", "format", "--cluster-id", &id(), "--config"])
            .arg(&properties);
        tool::run(&mut format)?;
        Ok(())
    })
}

const META: &str = "meta.properties";

fn copy_template(template: &Path, data: &Path, node: usize, cluster: &str) -> Result<()> {
    open_folder(data)?;
    for entry in fs::read_dir(template.join("data"))? {
        let entry = entry?;
        let to = data.join(entry.file_name());
        fs::copy(entry.path(), &to).with_context(|| format!("{}", entry.path().display()))?;
        Account::unprivileged().own(&to)?;
    }
    let meta = format!("version=1\ncluster.id={cluster}\nnode.id={node}\ndirectory.id={}\n", id());
    fs::write(data.join(META), meta)?;
    Account::unprivileged().own(data)
}

/// Sixteen random bytes in the alphabet of base64 for URLs, as Kafka writes its ids.
fn id() -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut bytes = [0; 18];
    rand::rng().fill_bytes(&mut bytes[..16]);
    let digits: String = bytes
        .chunks(3)
        .flat_map(|three| {
            let bits = three.iter().fold(0_usize, |bits, byte| bits << 8 | usize::from(*byte));
            [18, 12, 6, 0].map(|shift| char::from(ALPHABET[bits >> shift & 63]))
        })
        .collect();
    // 128 bits are 22 digits; Kafka's own ids never begin with a dash, which looks like an option.
    format!("A{}", &digits[1..22])
}
