//! The servers that all tests of a process share.
//!
//! Each is looked for on the rungs of one ladder, from above, when the first test asks for it:
//!
//! 1. **given**: `OUTBOX_TEST_MARIADB_URL`, `OUTBOX_TEST_MYSQL_URL`,
//!    `OUTBOX_TEST_KAFKA_BOOTSTRAP`. What is given is used; if it does not answer, tests fail.
//! 2. **docker**: when a daemon answers and has the image, or `OUTBOX_TEST_PULL=1` allows pulling
//!    it. `OUTBOX_TEST_{MARIADB,MYSQL,KAFKA}_IMAGE` name other images.
//! 3. **native**: servers that this crate fetches and starts on loopback.
//!
//! The rung is printed. A backend that no rung has fails the tests that need it. One may be left
//! out only in so many words, `OUTBOX_TEST_WITHOUT=mysql,kafka`, and that is the last line of the
//! run.

use std::{env, fmt::Display, future::Future, sync::LazyLock, time::Duration};

use anyhow::Result;
use tokio::sync::OnceCell;

use crate::{
    database::{Database, Engine, Options},
    docker,
    kafka::{Kafka, KafkaCluster, Nodes},
    report, watchdog,
};

/// The shared MariaDB; `None` only if it was left out by `OUTBOX_TEST_WITHOUT`.
///
/// ```no_run
/// # async fn a_test() -> anyhow::Result<()> {
/// let Some(database) = integration_tests::servers::mariadb().await else { return Ok(()) };
/// let url = database.create_database().await?;
/// # Ok(()) }
/// ```
///
/// # Panics
///
/// When it cannot be had. The message says what was tried, and what to install.
pub async fn mariadb() -> Option<&'static Database> {
    static SHARED: Shared<Database> = Shared::new();
    SHARED.get(Backend::Database(Engine::MariaDb), || database(Engine::MariaDb)).await
}

/// The shared MySQL; `None` only if it was left out by `OUTBOX_TEST_WITHOUT`.
///
/// # Panics
///
/// As [`mariadb`].
pub async fn mysql() -> Option<&'static Database> {
    static SHARED: Shared<Database> = Shared::new();
    SHARED.get(Backend::Database(Engine::MySql), || database(Engine::MySql)).await
}

/// The shared database server of that kind.
///
/// # Panics
///
/// As [`mariadb`].
pub async fn database_of(engine: Engine) -> Option<&'static Database> {
    match engine {
        Engine::MariaDb => mariadb().await,
        Engine::MySql => mysql().await,
    }
}

/// The shared Kafka; `None` only if it was left out by `OUTBOX_TEST_WITHOUT`.
///
/// # Panics
///
/// As [`mariadb`].
pub async fn kafka() -> Option<&'static Kafka> {
    static SHARED: Shared<Kafka> = Shared::new();
    SHARED.get(Backend::Kafka, find_kafka).await
}

/// What the ladder finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// MySQL or MariaDB.
    Database(Engine),
    /// Apache Kafka.
    Kafka,
}

impl Backend {
    /// All that there are.
    pub const ALL: [Self; 3] =
        [Self::Database(Engine::MariaDb), Self::Database(Engine::MySql), Self::Kafka];

    /// In lower case, as in `OUTBOX_TEST_WITHOUT`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Database(engine) => engine.name(),
            Self::Kafka => "kafka",
        }
    }

    /// The variable that gives one.
    #[must_use]
    pub fn variable(self) -> String {
        let name = self.name().to_uppercase();
        match self {
            Self::Database(_) => format!("OUTBOX_TEST_{name}_URL"),
            Self::Kafka => format!("OUTBOX_TEST_{name}_BOOTSTRAP"),
        }
    }

    /// Whether the backend was left out of this run: for tests that start servers of their own.
    ///
    /// # Panics
    ///
    /// When `OUTBOX_TEST_WITHOUT` names no backend.
    #[must_use]
    pub fn is_left_out(self) -> bool {
        static LEFT_OUT: LazyLock<Vec<Backend>> = LazyLock::new(left_out);
        LEFT_OUT.contains(&self)
    }
}

const WITHOUT: &str = "OUTBOX_TEST_WITHOUT";

/// Reads the variable, and says what it leaves out, now and at the end of the run.
fn left_out() -> Vec<Backend> {
    let backends = parse(&env::var(WITHOUT).unwrap_or_default());
    for backend in &backends {
        let line = format!("{}: LEFT OUT by {WITHOUT}", backend.name());
        report::line(&line);
        watchdog::note_at_end(&line).unwrap_or_else(|error| panic!("{error:#}"));
    }
    backends
}

fn parse(list: &str) -> Vec<Backend> {
    list.split([',', ' '])
        .filter(|word| !word.is_empty())
        .map(|word| {
            let named = Backend::ALL.into_iter().find(|backend| backend.name() == word);
            named.unwrap_or_else(|| panic!("{WITHOUT}: there is no backend {word:?}"))
        })
        .collect()
}

/// One backend of the process: looked for once, and the outcome kept, be it a failure.
struct Shared<T: 'static>(OnceCell<Result<&'static T, String>>);

impl<T> Shared<T> {
    const fn new() -> Self {
        Self(OnceCell::const_new())
    }

    async fn get<F>(&self, backend: Backend, find: impl FnOnce() -> F) -> Option<&'static T>
    where
        F: Future<Output = Result<&'static T>>,
    {
        if backend.is_left_out() {
            return None;
        }
        let found =
            self.0.get_or_init(|| async { find().await.map_err(|error| failure(backend, &error)) });
        match found.await {
            Ok(server) => Some(server),
            Err(failure) => panic!("{failure}"),
        }
    }
}

fn failure(backend: Backend, error: &anyhow::Error) -> String {
    let name = backend.name();
    format!(
        "{name} cannot be had: {error:#}\n\
         Give one by {}, start Docker with its image, or install what is missing.\n\
         To run the tests without it: {WITHOUT}={name}",
        backend.variable()
    )
}

/// How long a server that is not ours may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

async fn database(engine: Engine) -> Result<&'static Database> {
    let name = engine.name();
    let variable = Backend::Database(engine).variable();
    if let Some(url) = given(&variable) {
        let database = Database::at(engine, &url, PATIENCE).await?;
        announce(name, format!("given by {variable}"), database.version());
        return Ok(Box::leak(Box::new(database)));
    }
    match docker::database(engine).await {
        Ok(database) => {
            announce(name, "docker", database.version());
            return Ok(Box::leak(Box::new(database)));
        }
        Err(why) => report::line(&format!("{name}: not by docker: {why:#}")),
    }
    // Never dropped: it ends with the process, by the watchdog.
    let database = Box::leak(Box::new(Database::private(engine, Options::fast()).await?));
    announce(name, "native", database.version());
    Ok(database)
}

async fn find_kafka() -> Result<&'static Kafka> {
    let variable = Backend::Kafka.variable();
    if let Some(bootstrap) = given(&variable) {
        let kafka = Kafka::at(&bootstrap, 1, PATIENCE).await?;
        announce("kafka", format!("given by {variable}"), kafka.bootstrap());
        return Ok(Box::leak(Box::new(kafka)));
    }
    match docker::kafka().await {
        Ok(kafka) => {
            announce("kafka", "docker", kafka.bootstrap());
            return Ok(Box::leak(Box::new(kafka)));
        }
        Err(why) => report::line(&format!("kafka: not by docker: {why:#}")),
    }
    let kafka = Box::leak(Box::new(KafkaCluster::private(Nodes::One).await?));
    announce("kafka", "native", kafka.bootstrap());
    Ok(kafka)
}

fn given(variable: &str) -> Option<String> {
    env::var(variable).ok().filter(|value| !value.is_empty())
}

fn announce(name: &str, rung: impl Display, what: &str) {
    report::line(&format!("{name}: {rung}: {what}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backends_are_left_out_by_a_list() {
        assert_eq!(parse("mysql, kafka"), [Backend::Database(Engine::MySql), Backend::Kafka]);
        assert_eq!(parse(""), []);
    }

    #[test]
    #[should_panic(expected = "there is no backend \"postgres\"")]
    fn what_is_no_backend_cannot_be_left_out() {
        parse("postgres");
    }
}
