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

use std::{env, fmt::Display, future::Future, time::Duration};

use anyhow::{Result, ensure};
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
    SHARED.get("mariadb", || database(Engine::MariaDb)).await
}

/// The shared MySQL; `None` only if it was left out by `OUTBOX_TEST_WITHOUT`.
///
/// # Panics
///
/// As [`mariadb`].
pub async fn mysql() -> Option<&'static Database> {
    static SHARED: Shared<Database> = Shared::new();
    SHARED.get("mysql", || database(Engine::MySql)).await
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
    SHARED.get("kafka", find_kafka).await
}

/// One backend of the process: looked for once, and the outcome kept, be it a failure.
struct Shared<T: 'static>(OnceCell<Option<Result<&'static T, String>>>);

impl<T> Shared<T> {
    const fn new() -> Self {
        Self(OnceCell::const_new())
    }

    async fn get<F>(&self, name: &str, find: impl FnOnce() -> F) -> Option<&'static T>
    where
        F: Future<Output = Result<&'static T>>,
    {
        let found = self.0.get_or_init(|| async {
            match is_left_out(name) {
                Ok(false) => Some(find().await.map_err(|error| failure(name, &error))),
                Ok(true) => None,
                Err(error) => Some(Err(format!("{error:#}"))),
            }
        });
        match found.await {
            Some(Ok(server)) => Some(server),
            Some(Err(failure)) => panic!("{failure}"),
            None => None,
        }
    }
}

fn failure(name: &str, error: &anyhow::Error) -> String {
    format!(
        "{name} cannot be had: {error:#}\n\
         Give one by its variable, start Docker with its image, or install what is missing.\n\
         To run the tests without it: OUTBOX_TEST_WITHOUT={name}"
    )
}

const WITHOUT: &str = "OUTBOX_TEST_WITHOUT";
const BACKENDS: [&str; 3] = ["mariadb", "mysql", "kafka"];

fn is_left_out(name: &str) -> Result<bool> {
    let without = env::var(WITHOUT).unwrap_or_default();
    let left_out: Vec<&str> = words(&without).collect();
    for word in &left_out {
        ensure!(BACKENDS.contains(word), "{WITHOUT}: {word:?} is none of {BACKENDS:?}");
    }
    if !left_out.contains(&name) {
        return Ok(false);
    }
    report::line(&format!("{name}: LEFT OUT by {WITHOUT}"));
    watchdog::note_at_end(&format!("not everything was tested: {WITHOUT} left out {name}"))?;
    Ok(true)
}

fn words(list: &str) -> impl Iterator<Item = &str> {
    list.split([',', ' ']).filter(|word| !word.is_empty())
}

/// How long a server that is not ours may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

async fn database(engine: Engine) -> Result<&'static Database> {
    let name = engine.name();
    let variable = format!("OUTBOX_TEST_{}_URL", name.to_uppercase());
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
    const VARIABLE: &str = "OUTBOX_TEST_KAFKA_BOOTSTRAP";
    if let Some(bootstrap) = given(VARIABLE) {
        let kafka = Kafka::at(&bootstrap, 1, PATIENCE).await?;
        announce("kafka", format!("given by {VARIABLE}"), kafka.bootstrap());
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
    use super::words;

    #[test]
    fn backends_are_left_out_by_a_list() {
        assert_eq!(words("mysql, kafka").collect::<Vec<_>>(), ["mysql", "kafka"]);
        assert_eq!(words("").count(), 0);
    }
}
