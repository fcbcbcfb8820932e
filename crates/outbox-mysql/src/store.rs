//! The store of the dispatcher.

mod backlog;
mod claim;
mod dead_letters;
mod exposure;
mod keep_leases;
mod line;
#[cfg(test)]
mod properties;
mod purge;
mod release;
mod row;
mod session;
mod settle;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::Store;
use outbox_core::store::{
    Backlog, Claim, ClaimReply, KeepLeases, Purge, Release, Settle, Settled, Standing, StoreError,
    StoreErrorKind, StoreProfile,
};
use sqlx::mysql::MySqlConnectOptions;

use self::claim::Reading;
use self::line::Line;
pub(crate) use self::row::{LastTopic, read_message};
use self::session::Settings;
use crate::schema::MySqlSchema;
use crate::tables::Tables;

/// How long a connection may take to be opened and set up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the server keeps a connection that is silent: about one lease, so that a relay that
/// was stopped holds nothing for longer.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A dispatcher has one claim under way; that of one that was dropped may still be closing.
const CLAIM_CONNECTIONS: usize = 2;

/// A dispatcher has two settles under way, which come close to the most deletes that a server gives;
/// connections of those that were dropped may still be closing.
const SETTLE_CONNECTIONS: usize = 4;

/// An outbox in MySQL or MariaDB as the dispatcher and the operator see it.
///
/// It uses connections of its own, never the application's pool: they run at READ COMMITTED with
/// short timeouts, at most eight of them, opened when they are needed. Cloning shares them. A
/// connection that is not encrypted, to anything but loopback or a socket, is reported once, as a
/// warning in the log.
#[derive(Clone)]
pub struct MySqlStore(Arc<Inner>);

struct Inner {
    schema: MySqlSchema,
    /// How many lanes there are; 0 until the store is opened.
    lanes: AtomicU16,
    /// Whether it was reported that others may read along.
    exposure_told: AtomicBool,
    keeping: Line,
    claiming: Line,
    settling: Line,
    rest: Line,
}

impl MySqlStore {
    /// A store at `url`, opened: schema and server are checked. It fails while the database is down: a
    /// relay that shall wait for it uses [`from_options`](Self::from_options), and leaves the opening to
    /// [`Dispatcher::run`](outbox_core::Dispatcher::run).
    ///
    /// # Errors
    ///
    /// As [`Store::open`]; [`StoreErrorKind::Unsupported`] when `url` is malformed, or begins
    /// neither with `mysql:` nor with `mariadb:`.
    pub async fn connect(url: &str, schema: &MySqlSchema) -> Result<Self, StoreError> {
        if !is_ours(url) {
            return Err(StoreError::new(StoreErrorKind::Unsupported, "URL is not one of MySQL"));
        }
        let options = url.parse().map_err(crate::error::store_error)?;
        let store = Self::from_options(options, schema);
        store.open().await?;
        Ok(store)
    }

    /// A store that connects with `options` when it is first used.
    pub fn from_options(options: MySqlConnectOptions, schema: &MySqlSchema) -> Self {
        Self::with_idle_timeout(options, schema, IDLE_TIMEOUT)
    }

    /// Like [`from_options`](Self::from_options), with another time after which the server closes
    /// a silent connection, in whole seconds. Use about one lease; the default is 60 s.
    pub fn with_idle_timeout(
        options: MySqlConnectOptions,
        schema: &MySqlSchema,
        idle_timeout: Duration,
    ) -> Self {
        let settings = Settings { options, connect_timeout: CONNECT_TIMEOUT, idle_timeout };
        let server = Arc::default();
        let line = |connections| Line::new(settings.clone(), &server, connections);
        Self(Arc::new(Inner {
            schema: schema.clone(),
            lanes: AtomicU16::new(0),
            exposure_told: AtomicBool::new(false),
            keeping: line(1),
            claiming: line(CLAIM_CONNECTIONS),
            settling: line(SETTLE_CONNECTIONS),
            rest: line(1),
        }))
    }

    fn tables(&self) -> &Tables {
        self.0.schema.tables()
    }
}

/// sqlx takes any scheme: it would look for MySQL where another server is.
fn is_ours(url: &str) -> bool {
    let scheme = url.trim_start().split_once(':').map_or("", |(scheme, _)| scheme);
    ["mysql", "mariadb"].iter().any(|ours| scheme.eq_ignore_ascii_case(ours))
}

/// Shows nothing: connect options hold the password.
impl fmt::Debug for MySqlStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MySqlStore").finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for MySqlStore {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        let mut unit = self.0.rest.begin().await?;
        let warnings = unit.warnings();
        if unit.is_exposed() && !self.0.exposure_told.swap(true, Relaxed) {
            tracing::warn!(
                "the connection to the database is not encrypted and leaves this machine"
            );
        }
        let lanes = self.0.schema.read_lanes(unit.connection()?).await?;
        unit.finish();
        self.0.lanes.store(lanes.get(), Relaxed);
        let profile = StoreProfile::new(lanes);
        Ok(warnings.into_iter().fold(profile, StoreProfile::with_warning))
    }

    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        let mut unit = self.0.keeping.begin().await?;
        let answers = unit.run(keep_leases::packet(self.tables(), &request)).await?;
        let standing = keep_leases::read(answers, unit.server)?;
        unit.finish();
        // Their number may have been changed since the store was opened.
        self.0.lanes.store(u16::try_from(standing.lanes.len()).unwrap_or(0), Relaxed);
        Ok(standing)
    }

    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        let mut unit = self.0.claiming.begin().await?;
        let plan = claim::Plan::new(self.tables(), self.0.lanes.load(Relaxed), &request);
        let mut reading = Reading::new(&request, plan.parts, unit.server);
        let answers = unit.each(plan.packet, |part, row| reading.row(part, &row)).await?;
        let reply = reading.end(answers)?;
        unit.finish();
        Ok(reply)
    }

    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError> {
        let mut refused = Vec::new();
        for packet in settle::packets(self.tables(), &request) {
            let mut unit = self.0.settling.begin().await?;
            let answers = unit.run(packet.text).await?;
            refused.extend(settle::refused(&packet.decisive, &answers));
            unit.finish();
        }
        Ok(Settled::refusing(refused))
    }

    async fn release(&self, request: Release<'_>) -> Result<(), StoreError> {
        let packet = release::packet(self.tables(), &request);
        if packet.is_empty() {
            return Ok(());
        }
        let mut unit = self.0.keeping.begin().await?;
        unit.run(packet).await?;
        unit.finish();
        Ok(())
    }

    async fn purge(&self, request: Purge) -> Result<u64, StoreError> {
        let mut unit = self.0.rest.begin().await?;
        let old = purge::read(&unit.run(purge::oldest(self.tables(), request)).await?)?;
        let answers = match old.is_empty() {
            true => Vec::new(),
            false => unit.run(purge::delete(self.tables(), request, &old)).await?,
        };
        unit.finish();
        Ok(answers.iter().map(|answer| answer.affected).sum())
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        let mut unit = self.0.rest.begin().await?;
        let answers = unit.run(backlog::packet(self.tables())).await?;
        let backlog = backlog::read(&answers)?;
        unit.finish();
        Ok(backlog)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_password() {
        let options = "mysql://user:secret@host/shop".parse().unwrap();
        let store = MySqlStore::from_options(options, &MySqlSchema::new());
        assert!(!format!("{store:?}").contains("secret"));
    }

    #[tokio::test]
    async fn a_url_of_another_database_is_not_supported() {
        use StoreErrorKind as K;
        for (url, kind) in [
            ("postgres://user@127.0.0.1:1/shop", K::Unsupported),
            ("sqlite:shop.db", K::Unsupported),
            ("mysqlx://127.0.0.1:1/shop", K::Unsupported),
            ("127.0.0.1:1/shop", K::Unsupported),
            ("mysql", K::Unsupported),
            ("", K::Unsupported),
            ("mysql://127.0.0.1:no-port/shop", K::Unsupported),
            // Nobody listens there.
            ("mysql://user@127.0.0.1:1/shop", K::Unavailable),
            ("MariaDB://user@127.0.0.1:1/shop", K::Unavailable),
        ] {
            let error = MySqlStore::connect(url, &MySqlSchema::new()).await.unwrap_err();
            assert_eq!(error.kind(), kind, "{url}");
        }
    }
}
