//! A MySQL or MariaDB server, shared or a test's own.

use std::{fmt, ops::Deref, process::Output, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use sqlx::{AssertSqlSafe, Connection, MySqlConnection};

use crate::{
    names,
    native::{self, Server},
    tls::Identity,
};

/// The account of servers that this crate starts. It may do anything.
pub(crate) const USER: &str = "outbox";
pub(crate) const PASSWORD: &str = "outbox";
/// An account without a password, on servers of loopback that only one test uses.
pub(crate) const OPEN_USER: &str = "open";

/// How long a server may take to say what it is.
const ANSWERS: Duration = Duration::from_secs(5);

/// Which of the two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Engine {
    /// MariaDB, 10.11 unless the environment gives another.
    MariaDb,
    /// MySQL, 9.x unless the environment gives another.
    MySql,
}

impl Engine {
    /// Both, for tests of what must hold on either.
    pub const ALL: [Self; 2] = [Self::MariaDb, Self::MySql];

    /// In lower case, as in the names of variables and in lists.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MariaDb => "mariadb",
            Self::MySql => "mysql",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A server that answers.
///
/// It holds no connection, so that it may be shared by tests with runtimes of their own.
#[derive(Debug)]
pub struct Database {
    engine: Engine,
    /// Up to and without the name of a database.
    base: String,
    version: String,
}

impl Database {
    /// Waits until the server at this URL answers.
    ///
    /// # Errors
    ///
    /// When it does not within `patience`.
    pub(crate) async fn at(engine: Engine, url: &str, patience: Duration) -> Result<Self> {
        let base = base(url)?.to_owned();
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            // One that takes connections and says nothing is none.
            let asked = tokio::time::timeout(ANSWERS, version(url)).await;
            match asked.unwrap_or_else(|_| Err(anyhow!("it takes connections and says nothing"))) {
                Ok(version) => return Ok(Self { engine, base, version }),
                Err(error) if tokio::time::Instant::now() > deadline => {
                    // Without the URL: it holds a password.
                    return Err(error).with_context(|| format!("{engine} does not answer"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    /// Starts a server of the caller's own, which may be stopped, killed and paused.
    ///
    /// It is always a native one, whatever rung the shared servers are on: a test that kills a
    /// server needs its process.
    ///
    /// # Errors
    ///
    /// When it cannot be fetched or started; the message says what to install.
    pub async fn private(engine: Engine, options: Options) -> Result<PrivateDatabase> {
        let server =
            tokio::task::spawn_blocking(move || native::sql::server(engine, &options)).await??;
        server.start().await?;
        let url = format!("mysql://{USER}:{PASSWORD}@127.0.0.1:{}", server.port());
        let database = Self::at(engine, &url, Duration::from_secs(5)).await?;
        Ok(PrivateDatabase { database, server })
    }

    /// Which server it is.
    #[must_use]
    pub fn engine(&self) -> Engine {
        self.engine
    }

    /// Its own answer to `SELECT VERSION()`.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// `host:port`, for a proxy in front of it.
    #[must_use]
    pub fn address(&self) -> &str {
        self.base.rsplit_once('@').map_or_else(|| &self.base["mysql://".len()..], |(_, host)| host)
    }

    /// The server's URL, with no database chosen.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}/", self.base)
    }

    /// Makes an empty database that no other test has, and gives its URL.
    ///
    /// # Errors
    ///
    /// When the server refuses.
    pub async fn create_database(&self) -> Result<String> {
        let name = names::unique("outbox").replace('-', "_");
        let mut connection = MySqlConnection::connect(&self.url()).await?;
        sqlx::query(AssertSqlSafe(format!("CREATE DATABASE {name}")))
            .execute(&mut connection)
            .await?;
        connection.close().await?;
        Ok(format!("{}/{name}", self.base))
    }

    /// Runs statements by the engine's own command-line client, as a person would, in the database
    /// at this URL of the server's.
    ///
    /// # Errors
    ///
    /// When the client cannot be fetched or run. What it could not do is in its output.
    pub async fn client(&self, url: &str, statements: &str) -> Result<Output> {
        let (account, path) = url
            .strip_prefix("mysql://")
            .and_then(|rest| rest.rsplit_once('@'))
            .context("a URL with an account")?;
        let (user, password) = account.split_once(':').unwrap_or((account, ""));
        let (address, name) = path.split_once('/').context("a URL with a database")?;
        let (host, port) = address.split_once(':').unwrap_or((address, "3306"));
        let arguments = [
            "--protocol=tcp".to_owned(),
            format!("--host={host}"),
            format!("--port={port}"),
            format!("--user={user}"),
            format!("--password={password}"),
            format!("--database={name}"),
            format!("--execute={statements}"),
        ];
        let engine = self.engine;
        let run = move || Ok(native::client::client(engine)?.args(arguments).output()?);
        tokio::task::spawn_blocking(run).await?
    }
}

/// A server that only one test uses; killed when dropped.
#[derive(Debug)]
pub struct PrivateDatabase {
    database: Database,
    server: Server,
}

impl PrivateDatabase {
    /// Its process, to be stopped, killed, paused and started again.
    #[must_use]
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The URL of one of its databases, for a connection that a proxy can read.
    ///
    /// Its account has no password: over an open wire, MySQL takes one only from clients with an
    /// RSA implementation.
    #[must_use]
    pub fn unencrypted(&self, url: &str) -> String {
        let path = url.strip_prefix(&self.database.base).unwrap_or(url);
        format!("mysql://{OPEN_USER}@{}{path}?ssl-mode=DISABLED", self.address())
    }
}

impl Deref for PrivateDatabase {
    type Target = Database;

    fn deref(&self) -> &Database {
        &self.database
    }
}

/// How a private server is set up.
#[derive(Debug, Clone)]
pub struct Options {
    arguments: Vec<String>,
    identity: Option<Identity>,
}

impl Options {
    /// Commits are not flushed to disk: for tests, where only processes crash, never machines.
    #[must_use]
    pub fn fast() -> Self {
        let bare = Self { arguments: vec![], identity: None };
        bare.with("--innodb-buffer-pool-size=64M").with("--sync-binlog=0").with(
            // Each second, instead of at each commit.
            "--innodb-flush-log-at-trx-commit=2",
        )
    }

    /// As in production, where a commit survives the machine; with a buffer pool of 1 GiB, for
    /// measurements.
    #[must_use]
    pub fn durable() -> Self {
        Self { arguments: vec![], identity: None }
            .with("--innodb-buffer-pool-size=1G")
            .with("--sync-binlog=1")
            .with("--innodb-flush-log-at-trx-commit=1")
    }

    /// Adds an option of the server's command line; a later one overrides an earlier.
    #[must_use]
    pub fn with(mut self, option: &str) -> Self {
        self.arguments.push(option.to_owned());
        self
    }

    /// Encrypts connections as this server; without it MySQL makes certificates up that nobody
    /// signed, and MariaDB encrypts nothing.
    #[must_use]
    pub fn with_identity(mut self, identity: Identity) -> Self {
        self.identity = Some(identity);
        self
    }

    pub(crate) fn arguments(&self) -> impl Iterator<Item = String> + '_ {
        self.arguments.iter().cloned()
    }

    pub(crate) fn identity(&self) -> Option<&Identity> {
        self.identity.as_ref()
    }
}

async fn version(url: &str) -> Result<String> {
    let mut connection = MySqlConnection::connect(url).await?;
    let version = sqlx::query_scalar("SELECT VERSION()").fetch_one(&mut connection).await?;
    connection.close().await?;
    Ok(version)
}

/// The URL without its path.
fn base(url: &str) -> Result<&str> {
    let Some(rest) = url.strip_prefix("mysql://") else {
        bail!("the URL of a database begins with mysql://");
    };
    if rest.contains('?') {
        bail!("parameters in a database URL are not kept for the databases that tests create");
    }
    let end = rest.find('/').unwrap_or(rest.len());
    Ok(&url[..url.len() - rest.len() + end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_taken_apart_at_its_path() {
        assert_eq!(base("mysql://u:p@h:1/test").unwrap(), "mysql://u:p@h:1");
        assert_eq!(base("mysql://h:1").unwrap(), "mysql://h:1");
        base("postgres://h").unwrap_err();
        base("mysql://h/?ssl-mode=DISABLED").unwrap_err();
    }

    #[test]
    fn the_address_leaves_the_password_out() {
        for (url, address) in [("mysql://u:p@h:1/x", "h:1"), ("mysql://h:1", "h:1")] {
            let base = base(url).unwrap().to_owned();
            let database = Database { engine: Engine::MySql, base, version: String::new() };
            assert_eq!(database.address(), address);
        }
    }
}
