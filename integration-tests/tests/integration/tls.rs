//! Servers that ask for encryption or for a password, and what is said of connections without.
//!
//! Kafka over TLS needs a librdkafka with OpenSSL: `cargo xtask kafka-tls`.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use integration_tests::{
    database::{Database, Engine, Options},
    kafka::{Guard, KafkaCluster},
    servers::{self, Backend},
    tls::Authority,
};
use outbox_core::broker::PublishErrorKind;
use outbox_core::store::StoreErrorKind;
use outbox_core::{Broker, Store};
use outbox_kafka::Security;
use outbox_mysql::sqlx::{self, Connection, MySqlConnection};

use crate::scenario::{Load, Worker, World, Writers, broker_with, store};

const MESSAGES: usize = 1_000;

/// What writers add arrives, each message once but for what a busy machine excuses.
async fn everything_arrives(
    by: &str,
    world: &World<'_>,
    workers: Vec<Worker>,
    load: &Load,
) -> Result<()> {
    let writers = Writers::start(world, &world.outbox(), load);
    writers.grant(MESSAGES);
    writers.end().await?;
    world.until_empty().await?;
    let excused = workers.iter().map(|worker| worker.excused(0)).sum();
    for mut worker in workers {
        worker.stop().await?;
    }
    let report = world.report().await?;
    println!("{by}: {report}");
    ensure!(report.committed > MESSAGES / 2, "{report}");
    report.check(excused)
}

/// Everything that was logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How often opening the store at this URL twice says that others may read along.
async fn warnings(url: &str) -> Result<usize> {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let store = store(url)?;
    store.open().await?;
    store.open().await?;
    Ok(log.text().matches("the connection to the database is not encrypted").count())
}

async fn the_database_speaks_tls(engine: Engine) -> Result<()> {
    let Some(kafka) = servers::kafka().await else { return Ok(()) };
    if Backend::Database(engine).is_left_out() {
        return Ok(());
    }
    let authority = Authority::new()?;
    let options = Options::fast().with_identity(authority.identity()?);
    let database = Database::private(engine, options).await?;
    let world = World::new(&database, kafka).await?;
    let pem = |authority: &Authority| -> Result<tempfile::NamedTempFile> {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(authority.pem().as_bytes())?;
        Ok(file)
    };
    let (own, foreign) = (pem(&authority)?, pem(&Authority::new()?)?);
    let bare = world.url.clone();
    let verified = |mode: &str, trusted: &tempfile::NamedTempFile| {
        format!("{bare}?ssl-mode={mode}&ssl-ca={}", trusted.path().display())
    };

    // An address that leads to this machine and is none of loopback: as far as anybody can tell
    // by it, what is sent leaves the machine.
    let open = database.unencrypted(&bare);
    let elsewhere = |url: &str| url.replace("127.0.0.1", "0.0.0.0");
    ensure!(warnings(&elsewhere(&open)).await? == 1, "told once");
    ensure!(warnings(&open).await? == 0, "of a connection that stays on this machine");
    ensure!(warnings(&elsewhere(&verified("VERIFY_CA", &own))).await? == 0, "of an encrypted one");

    // From here on the server takes nothing else, so that whatever works is encrypted.
    let mut operator = world.connect().await?;
    sqlx::raw_sql("SET GLOBAL require_secure_transport = ON").execute(&mut operator).await?;
    ensure!(MySqlConnection::connect(&open).await.is_err(), "a connection in the clear");
    let refusal = async |url: &str| -> Result<Option<StoreErrorKind>> {
        Ok(store(url)?.open().await.err().map(|error| error.kind()))
    };
    let in_the_clear = refusal(&open).await?;
    ensure!(in_the_clear == Some(StoreErrorKind::Denied), "{in_the_clear:?}");
    let by_another = refusal(&verified("VERIFY_CA", &foreign)).await?;
    ensure!(by_another == Some(StoreErrorKind::Unavailable), "{by_another:?}");

    let workers = [verified("VERIFY_CA", &own), format!("{bare}?ssl-mode=REQUIRED")];
    let workers = workers.map(|url| Worker::between(&url, kafka.bootstrap()));
    let workers = workers.into_iter().collect::<Result<Vec<_>>>()?;
    let load = Load { through: Some(verified("VERIFY_IDENTITY", &own)), ..Load::default() };
    everything_arrives(&format!("{engine} over TLS"), &world, workers, &load).await
}

mod a_database_that_speaks_tls_is_verified_and_one_in_the_clear_is_reported_once {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mariadb() -> Result<()> {
        the_database_speaks_tls(Engine::MariaDb).await
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn mysql() -> Result<()> {
        the_database_speaks_tls(Engine::MySql).await
    }
}

/// Only who comes as `security` says is let in by the guard.
async fn kafka_is_guarded(
    by: &str,
    guard: Guard,
    security: Security,
    others: impl IntoIterator<Item = Security>,
) -> Result<()> {
    let Some(database) = servers::mysql().await else { return Ok(()) };
    if Backend::Kafka.is_left_out() {
        return Ok(());
    }
    let cluster = KafkaCluster::guarded(guard).await?;
    let guarded = cluster.guarded_bootstrap();
    let world = World::new(database, &cluster).await?;
    for other in others {
        let refused = broker_with(&guarded, other)?.check().await.map_err(|error| error.kind());
        ensure!(refused == Err(PublishErrorKind::Unavailable), "{refused:?}");
    }
    let broker = broker_with(&guarded, security)?;
    broker.check().await.context("who may come in")?;
    let worker = Worker::run(store(&world.url)?, broker, |builder| builder)?;
    everything_arrives(by, &world, vec![worker], &Load::default()).await
}

const PASSWORD: &str = "only-this-test-knows";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn kafka_lets_in_who_has_the_password_and_nobody_else() -> Result<()> {
    let with = |password: &str| Security::plaintext().sasl_plain("relay", password);
    let others = [Security::plaintext(), with("another")];
    let guard = Guard::default().sasl_plain("relay", PASSWORD);
    kafka_is_guarded("Kafka with SASL PLAIN", guard, with(PASSWORD), others).await
}

#[cfg(feature = "kafka-tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn kafka_that_speaks_tls_is_verified() -> Result<()> {
    let authority = Authority::new()?;
    let trusting = |authority: &Authority| Security::tls().trust_pem(authority.pem());
    let others = [Security::plaintext(), Security::tls(), trusting(&Authority::new()?)];
    let guard = Guard::default().tls(authority.identity()?);
    kafka_is_guarded("Kafka over TLS", guard, trusting(&authority), others).await
}

#[cfg(feature = "kafka-tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn kafka_that_speaks_tls_lets_in_who_has_the_password() -> Result<()> {
    let authority = Authority::new()?;
    let with =
        |password: &str| Security::tls().trust_pem(authority.pem()).sasl_plain("relay", password);
    let guard = Guard::default().tls(authority.identity()?).sasl_plain("relay", PASSWORD);
    let by = "Kafka with SASL PLAIN over TLS";
    kafka_is_guarded(by, guard, with(PASSWORD), [with("another")]).await
}
