//! An outbox on one of the servers, and a backlog in it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration_tests::{database::Engine, kafka::Kafka};
use outbox_mysql::{MySqlSchema, MySqlStore};
use rdkafka::{
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection, Row};

use crate::lab::Lab;

/// What the waiting messages look like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backlog {
    pub(crate) rows: usize,
    pub(crate) payload: usize,
    pub(crate) keys: usize,
    /// Of a hundred messages, so many are of one key.
    pub(crate) hot: usize,
}

impl Backlog {
    /// The usual one: 1 KiB each, spread over 10,000 keys.
    pub(crate) fn of(rows: usize) -> Self {
        Self { rows, payload: 1024, keys: 10_000, hot: 0 }
    }
}

/// The relay's user.
const RELAY: &str = "bench_relay";
/// Rows of one seeding statement, at most as many as there are `numbers`.
const CHUNK: usize = 10_000;
/// And bytes.
const CHUNK_BYTES: usize = 32 << 20;

/// A database with an outbox of its own.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) engine: Engine,
    pub(crate) url: String,
    /// The same for the relay's user, who has the usual grants.
    pub(crate) relay_url: String,
    pub(crate) schema: MySqlSchema,
}

impl Site {
    pub(crate) async fn new(lab: &Lab, engine: Engine) -> Result<Self> {
        Self::with_lanes(lab, engine, MySqlSchema::DEFAULT_LANES.get()).await
    }

    pub(crate) async fn with_lanes(lab: &Lab, engine: Engine, lanes: u16) -> Result<Self> {
        let server = lab.database(engine).await?;
        // Open wire on both servers: MySQL has certificates from the start, MariaDB has none.
        let url = server.unencrypted(&server.create_database().await?);
        let (_, place) = url.split_once('@').context("a URL has a user")?;
        let relay_url = format!("mysql://{RELAY}@{place}");
        let schema = MySqlSchema::new().with_lanes(lanes)?;
        let site = Self { engine, url, relay_url, schema };
        let mut connection = site.connect().await?;
        site.schema.migrate(&mut connection).await?;
        let user = format!(
            "CREATE USER IF NOT EXISTS '{RELAY}'@'%'; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON *.* TO '{RELAY}'@'%'"
        );
        run(&mut connection, &user).await?;
        site.let_relay_log_keys_only(false).await?;
        let digits = "SELECT 0 d UNION SELECT 1 UNION SELECT 2 UNION SELECT 3 UNION SELECT 4 \
                      UNION SELECT 5 UNION SELECT 6 UNION SELECT 7 UNION SELECT 8 UNION SELECT 9";
        let numbers = format!(
            "CREATE TABLE numbers (n INT PRIMARY KEY) \
             SELECT a.d + 10 * b.d + 100 * c.d + 1000 * e.d n \
             FROM ({digits}) a, ({digits}) b, ({digits}) c, ({digits}) e"
        );
        run(&mut connection, &numbers).await?;
        Ok(site)
    }

    /// A connection as an application has one, at READ COMMITTED.
    pub(crate) async fn connect(&self) -> Result<MySqlConnection> {
        let mut connection = MySqlConnection::connect(&self.url).await?;
        run(&mut connection, "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED").await?;
        Ok(connection)
    }

    pub(crate) fn store(&self) -> Result<MySqlStore> {
        Ok(MySqlStore::from_options(self.relay_url.parse()?, &self.schema))
    }

    /// Whether the relay's user may have the binary log keep only the key of what it deletes.
    pub(crate) async fn let_relay_log_keys_only(&self, may: bool) -> Result<()> {
        let privilege = match self.engine {
            Engine::MariaDb => "BINLOG ADMIN",
            Engine::MySql => "SESSION_VARIABLES_ADMIN",
        };
        let (verb, preposition) = if may { ("GRANT", "TO") } else { ("REVOKE", "FROM") };
        let statement = format!("{verb} {privilege} ON *.* {preposition} '{RELAY}'@'%'");
        run(&mut self.connect().await?, &statement).await
    }

    /// Empties the outbox and fills it again, then waits until the server is at rest: what one
    /// run leaves behind must not slow the next.
    pub(crate) async fn fill(&self, topic: &str, backlog: Backlog) -> Result<()> {
        let mut connection = self.connect().await?;
        run(&mut connection, "TRUNCATE TABLE outbox").await?;
        self.append(topic, backlog, 0).await?;
        self.rest().await
    }

    /// Adds rows behind the id `after`, without gaps.
    pub(crate) async fn append(&self, topic: &str, backlog: Backlog, after: usize) -> Result<()> {
        let Backlog { rows, payload, keys, hot } = backlog;
        let mut connection = self.connect().await?;
        // Nobody replicates it, and the disk has room for better.
        run(&mut connection, "SET SESSION sql_log_bin = 0").await?;
        let chunk = CHUNK.min(CHUNK_BYTES / payload.max(1)).max(1);
        for first in (after..after + rows).step_by(chunk) {
            let count = chunk.min(after + rows - first);
            let statement = format!(
                "INSERT INTO outbox (id, message_id, topic, message_key, payload) \
                 SELECT i + 1, UNHEX(CONCAT(LPAD(HEX(i), 12, '0'), '70008000', \
                     LPAD(HEX(i), 12, '0'))), '{topic}', \
                   IF(i MOD 100 < {hot}, 'hot', CONCAT('key-', (i * 7919) MOD {keys})), \
                   RPAD(CONCAT('{{\"order\":', i, ',\"text\":\"'), {payload}, \
                     'the quick brown fox jumps over the lazy dog ') \
                 FROM (SELECT n + {first} i FROM numbers WHERE n < {count}) s"
            );
            run(&mut connection, &statement).await?;
        }
        Ok(())
    }

    /// Waits until purge and flushing are done, and drops the binary log.
    pub(crate) async fn rest(&self) -> Result<()> {
        let mut connection = self.connect().await?;
        // A file of the log can go once it is not the current one.
        run(&mut connection, "FLUSH BINARY LOGS").await?;
        let newest: String = match self.engine {
            Engine::MariaDb => first(&mut connection, "SHOW MASTER STATUS").await?,
            Engine::MySql => first(&mut connection, "SHOW BINARY LOG STATUS").await?,
        };
        run(&mut connection, &format!("PURGE BINARY LOGS TO '{newest}'")).await?;
        let percent: String = first(&mut connection, "SELECT @@innodb_max_dirty_pages_pct").await?;
        run(&mut connection, "SET GLOBAL innodb_max_dirty_pages_pct = 0").await?;
        let began = Instant::now();
        loop {
            let history = "SELECT COUNT FROM information_schema.INNODB_METRICS \
                           WHERE NAME = 'trx_rseg_history_len'";
            let history: i64 = first(&mut connection, history).await?.parse()?;
            let dirty = status(&mut connection, "Innodb_buffer_pool_pages_dirty").await?;
            if (history < 500 && dirty < 500) || began.elapsed() > Duration::from_secs(60) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        run(&mut connection, &format!("SET GLOBAL innodb_max_dirty_pages_pct = {percent}")).await
    }

    /// How many rows are left.
    pub(crate) async fn left(&self) -> Result<usize> {
        let mut connection = self.connect().await?;
        Ok(first(&mut connection, "SELECT COUNT(*) FROM outbox").await?.parse()?)
    }

    /// Nothing may be left: a figure for messages that were not delivered would be a lie.
    pub(crate) async fn must_be_empty(&self) -> Result<()> {
        let left = self.left().await?;
        ensure!(left == 0, "{left} rows were not settled");
        Ok(())
    }
}

/// Runs statements as text.
pub(crate) async fn run(connection: &mut MySqlConnection, statements: &str) -> Result<()> {
    let done = sqlx::raw_sql(AssertSqlSafe(statements)).execute(connection).await;
    done.with_context(|| statements.chars().take(100).collect::<String>())?;
    Ok(())
}

/// The first column of the first row, as text.
pub(crate) async fn first(connection: &mut MySqlConnection, query: &str) -> Result<String> {
    let row = sqlx::raw_sql(AssertSqlSafe(query)).fetch_one(connection).await?;
    let bytes: &[u8] = row.try_get_unchecked(0)?;
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// One of the server's counters.
pub(crate) async fn status(connection: &mut MySqlConnection, name: &str) -> Result<u64> {
    let query = format!("SHOW GLOBAL STATUS LIKE '{name}'");
    let row = sqlx::raw_sql(AssertSqlSafe(query)).fetch_one(connection).await?;
    let bytes: &[u8] = row.try_get_unchecked(1)?;
    Ok(std::str::from_utf8(bytes)?.parse()?)
}

/// A topic for one run, deleted with its log when it is given up.
#[derive(Debug)]
pub(crate) struct Topic<'a> {
    pub(crate) name: String,
    kafka: &'a Kafka,
}

impl<'a> Topic<'a> {
    pub(crate) async fn new(kafka: &'a Kafka, partitions: i32) -> Result<Self> {
        let settings = [("file.delete.delay.ms", "0"), ("max.message.bytes", "1048588")];
        let name = kafka.create_topic_with("bench", partitions, &settings).await?;
        Ok(Self { name, kafka })
    }

    /// Deletes it, so that its pages are not written to disk while the next run is measured.
    pub(crate) async fn delete(self) -> Result<()> {
        let admin: AdminClient<DefaultClientContext> = self.kafka.client().create()?;
        admin.delete_topics(&[&self.name], &AdminOptions::new()).await?;
        Ok(())
    }
}
