//! The parts of a run: servers, the proxies on the ways to them, writers and relays.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    net::ToSocketAddrs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use anyhow::{Context, Result};
use integration_tests::{
    Server,
    database::{Database, Engine, Options as Settings, PrivateDatabase},
    kafka::{KafkaCluster, Nodes},
    names,
    process::Process,
    proxy::Proxy,
};
use outbox_core::MessageId;
use outbox_mysql::MySqlSchema;
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};
use tokio::sync::Mutex;

use crate::{
    bug,
    entry::{BESIDE, Entry, ORDERED},
    fault::{Cast, Hold, Link, Part},
    options::Options,
    program::Program,
    topic,
    writer::variable,
};

/// Accounts that a read-only database refuses. Without passwords, so that a proxy can read what
/// travels: over an open wire, MySQL takes one only from clients with an RSA implementation.
pub(crate) const WRITER: &str = "chaos_writer";
pub(crate) const RELAY: &str = "chaos_relay";

/// Everything that takes part.
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) cast: Cast,
    pub(crate) database: PrivateDatabase,
    pub(crate) cluster: KafkaCluster,
    pub(crate) ordered: String,
    pub(crate) beside: String,
    /// When the topic beside was last created, in microseconds of the machine's clock.
    pub(crate) beside_created: AtomicU64,
    /// What only one fault at a time may have.
    pub(crate) holds: BTreeMap<Hold, Mutex<()>>,
    url: String,
    links: HashMap<Link, Proxy>,
    pub(crate) writers: Vec<Program>,
    pub(crate) relays: Vec<Program>,
}

impl Stage {
    /// Starts the servers. The histories of the writers will go to the folder.
    pub(crate) async fn set(options: &Options, folder: &Path) -> Result<Self> {
        let Options { engine, cast, rate, seed, .. } = *options;
        let (database, cluster) = tokio::try_join!(
            Database::private(engine, settings(engine)),
            KafkaCluster::behind_proxies(Nodes::Three, seed),
        )?;
        let url = set_up(&database).await?;
        let address = database.address().to_socket_addrs()?.next().context("an address")?;
        let mut links = HashMap::new();
        links.insert(Link::Writers, Proxy::start(address, seed).await?);
        for relay in 0..cast.relays {
            let seed = seed.wrapping_add(relay as u64 + 1);
            links.insert(Link::Relay(relay), Proxy::start(address, seed).await?);
        }
        let (ordered, beside) = (names::unique("ordered"), names::unique("beside"));
        for topic in [&ordered, &beside] {
            topic::create(&cluster, topic).await?;
        }
        let mut stage = Self {
            cast,
            database,
            cluster,
            ordered,
            beside,
            beside_created: AtomicU64::new(0),
            holds: holds(cast),
            url,
            links,
            writers: vec![],
            relays: vec![],
        };
        let rate = rate / cast.writers as f64;
        let program = env::current_exe()?;
        for number in 0..cast.writers {
            stage.writers.push(stage.writer(&program, number, rate, folder));
        }
        for number in 0..cast.relays {
            stage.relays.push(stage.relay(&program, number, options));
        }
        Ok(stage)
    }

    fn writer(&self, program: &Path, number: usize, rate: f64, folder: &Path) -> Program {
        let (program, folder) = (program.to_owned(), folder.to_owned());
        let variables = [
            (variable::DATABASE, self.url_of(WRITER, Link::Writers)),
            (variable::ORDERED, self.ordered.clone()),
            (variable::BESIDE, self.beside.clone()),
            (variable::RATE, rate.to_string()),
        ];
        Program::new(Part::Writer(number).to_string(), move |start| {
            let history = history(&folder, number, start).display().to_string();
            let history = [(variable::HISTORY, history)];
            Process::spawn(&program, ["writer"], variables.clone().into_iter().chain(history))
        })
    }

    fn relay(&self, program: &Path, number: usize, options: &Options) -> Program {
        let program = program.to_owned();
        let variables = [
            ("DATABASE_URL", self.url_of(RELAY, Link::Relay(number))),
            ("KAFKA_BOOTSTRAP", self.cluster.bootstrap().to_owned()),
            ("RELAY_ROWS_IN_FLIGHT", options.window.to_string()),
        ];
        let bug = options.bug.clone().map(|bug| (bug::VARIABLE, bug));
        Program::new(Part::Relay(number).to_string(), move |_| {
            Process::spawn(&program, ["relay"], variables.clone().into_iter().chain(bug.clone()))
        })
    }

    /// The database by an account and a way, unencrypted.
    fn url_of(&self, user: &str, link: Link) -> String {
        let (_, name) = self.url.rsplit_once('/').unwrap_or_default();
        format!("mysql://{user}@{}/{name}?ssl-mode=DISABLED", self.link(link).address())
    }

    pub(crate) fn link(&self, link: Link) -> &Proxy {
        match link {
            Link::Broker(node) => &self.cluster.proxies()[node],
            link => &self.links[&link],
        }
    }

    /// The server that is this part.
    pub(crate) fn server(&self, part: Part) -> Option<&Server> {
        match part {
            Part::Database => Some(self.database.server()),
            Part::Broker(node) => self.cluster.nodes().get(node),
            Part::Writer(_) | Part::Relay(_) => None,
        }
    }

    /// The writer or relay that is this part.
    pub(crate) fn program(&self, part: Part) -> Option<&Program> {
        match part {
            Part::Writer(number) => self.writers.get(number),
            Part::Relay(number) => self.relays.get(number),
            Part::Database | Part::Broker(_) => None,
        }
    }

    pub(crate) fn programs(&self) -> impl Iterator<Item = &Program> {
        self.writers.iter().chain(&self.relays)
    }

    /// A connection past the proxies that may do anything.
    pub(crate) async fn admin(&self) -> Result<MySqlConnection> {
        Ok(MySqlConnection::connect(&self.url).await?)
    }

    /// The number that a query gives.
    pub(crate) async fn number(&self, sql: &str) -> Result<usize> {
        let mut connection = self.admin().await?;
        let number: i64 =
            sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&mut connection).await?;
        Ok(number.try_into()?)
    }

    /// The business table: exactly what was committed.
    pub(crate) async fn ledger(&self) -> Result<HashMap<MessageId, Entry>> {
        let rows: Vec<(Vec<u8>, u32, u64)> =
            sqlx::query_as("SELECT message_id, aggregate, sequence FROM ledger")
                .fetch_all(&mut self.admin().await?)
                .await?;
        let entry = |(id, aggregate, sequence): (Vec<u8>, u32, u64)| {
            let id = <[u8; 16]>::try_from(id).ok().context("an id of another length")?;
            Ok((MessageId::from_bytes(id), Entry { aggregate, sequence }))
        };
        rows.into_iter().map(entry).collect()
    }

    /// A client of Kafka that goes past the proxies.
    pub(crate) fn inner_client(&self) -> rdkafka::ClientConfig {
        topic::inner_client(&self.cluster)
    }

    pub(crate) fn beside_was_created(&self, micros: u64) {
        self.beside_created.store(micros, Ordering::Relaxed);
    }
}

/// The file of one start of a writer.
pub(crate) fn history(folder: &Path, writer: usize, start: usize) -> PathBuf {
    folder.join(format!("writer-{writer}-{start}.history"))
}

fn settings(engine: Engine) -> Settings {
    let settings = Settings::fast().with("--innodb-buffer-pool-size=256M");
    match engine {
        Engine::MariaDb => settings,
        // Nobody replicates, and millions of messages need not be written twice.
        Engine::MySql => settings.with("--skip-log-bin").with("--performance-schema=OFF"),
    }
}

/// Makes database, tables and accounts, and gives the administrator's URL.
async fn set_up(database: &Database) -> Result<String> {
    let url = database.create_database().await?;
    let (_, name) = url.rsplit_once('/').context("a database")?;
    let mut connection = MySqlConnection::connect(&url).await?;
    MySqlSchema::new().migrate(&mut connection).await.context("migrate")?;
    let rows: Vec<_> = (0..ORDERED + BESIDE).map(|id| format!("({id}, 0)")).collect();
    let mut statements = format!(
        "CREATE TABLE aggregate (id INT UNSIGNED PRIMARY KEY, version BIGINT UNSIGNED NOT NULL); \
         CREATE TABLE ledger (message_id BINARY(16) PRIMARY KEY, \
           aggregate INT UNSIGNED NOT NULL, sequence BIGINT UNSIGNED NOT NULL); \
         INSERT INTO aggregate VALUES {}; ",
        rows.join(", ")
    );
    for user in [WRITER, RELAY] {
        statements += &format!("CREATE USER '{user}'@'%' IDENTIFIED BY ''; ");
        statements += &format!("GRANT ALL ON {name}.* TO '{user}'@'%'; ");
    }
    sqlx::raw_sql(AssertSqlSafe(statements)).execute(&mut connection).await?;
    Ok(url)
}

fn holds(cast: Cast) -> BTreeMap<Hold, Mutex<()>> {
    let writers = (0..cast.writers).map(Part::Writer);
    let parts = writers.chain((0..cast.relays).map(Part::Relay)).chain([Part::Database]);
    let relays = (0..cast.relays).map(Link::Relay);
    let links = relays.chain((0..cast.brokers).map(Link::Broker)).chain([Link::Writers]);
    let all = parts.map(Hold::Process).chain(links.map(Hold::Link));
    all.chain([Hold::Brokers, Hold::Topic]).map(|hold| (hold, Mutex::default())).collect()
}
