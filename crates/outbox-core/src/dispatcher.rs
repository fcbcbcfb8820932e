//! The dispatcher: a thin tokio shell that performs what the machine decides.

mod builder;
mod shell;

use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub use self::builder::{BuildError, BuildErrorKind, DispatcherBuilder};
use self::shell::Shell;
use crate::broker::{Broker, PublishError, PublishErrorKind};
use crate::delivery::WorkerId;
use crate::machine::Settings;
use crate::observe::Observer;
use crate::status::{Health, Status};
use crate::store::{Store, StoreError, StoreErrorKind};
use crate::wake::Wake;

/// Publishes every committed message of a store to a broker, at least once, in order per key.
///
/// Any number of dispatchers may run on one store, in one process or in many: they share the lanes
/// among themselves. Configured by [`Dispatcher::builder`].
pub struct Dispatcher {
    store: Arc<dyn Store>,
    broker: Arc<dyn Broker>,
    settings: Settings,
    observers: Arc<[Box<dyn Observer>]>,
    wake: Wake,
    status: Arc<Mutex<Status>>,
}

impl Dispatcher {
    /// Configures a dispatcher. To keep a handle on the store or the broker, pass an [`Arc`]. A store
    /// may serve several dispatchers; a broker is for one, whose [`run`](Self::run) closes it.
    pub fn builder(store: impl Store, broker: impl Broker) -> DispatcherBuilder {
        DispatcherBuilder::new(Arc::new(store), Arc::new(broker))
    }

    /// A handle that tells how this dispatcher is doing, before, while and after it runs.
    pub fn handle(&self) -> DispatcherHandle {
        DispatcherHandle { status: Arc::clone(&self.status) }
    }

    /// Checks the store's schema and the broker's reachability, and changes nothing.
    ///
    /// # Errors
    ///
    /// [`RunErrorKind::Store`] or [`RunErrorKind::Broker`].
    pub async fn check(&self) -> Result<(), RunError> {
        self.store.open().await?;
        self.broker.check().await?;
        Ok(())
    }

    /// Runs until `shutdown` resolves, then drains within the drain limit, closes the broker and gives
    /// its lanes back.
    ///
    /// It opens the store first and claims nothing before that succeeded. While store or broker
    /// are down it waits and retries. Dropping the future is a crash: nothing is lost, and other
    /// workers take its lanes over after the lease.
    ///
    /// # Errors
    ///
    /// [`RunErrorKind::Store`] when the store does not open: the schema is missing, access is denied, or
    /// the server is set in a way that is not supported.
    #[expect(clippy::manual_async_fn, reason = "the signature promises a future that is Send")]
    pub fn run(
        self,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> impl Future<Output = Result<Summary, RunError>> + Send + 'static {
        async move { self.shell(false).run(shutdown).await }
    }

    /// Runs until nothing is left that can be delivered, for tests and jobs: messages that wait
    /// for a retry are waited for; held messages and what waits behind them stay. Lanes owned by
    /// other live workers are left to them. The broker stays open, so this may be called again. It does
    /// not end while more rows wait for held keys than a worker knows at a time (a million), while store
    /// or broker are down, nor while a message waits for a topic that is missing or forbidden: put a
    /// timeout around it.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run).
    pub async fn run_until_empty(&self) -> Result<Summary, RunError> {
        self.shell(true).run(std::future::pending()).await
    }

    fn shell(&self, until_empty: bool) -> Shell {
        let mut settings = self.settings.clone();
        settings.worker = WorkerId::generate();
        settings.seed = rand::random();
        settings.until_empty = until_empty;
        Shell {
            store: Arc::clone(&self.store),
            broker: Arc::clone(&self.broker),
            settings,
            observers: Arc::clone(&self.observers),
            wake: self.wake.clone(),
            status: Arc::clone(&self.status),
        }
    }
}

impl fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dispatcher")
            .field("store", &self.store)
            .field("broker", &self.broker)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// Tells how a dispatcher is doing. Clones are the same handle.
#[derive(Debug, Clone)]
pub struct DispatcherHandle {
    status: Arc<Mutex<Status>>,
}

impl DispatcherHandle {
    /// How it is doing, as of at most some tens of milliseconds ago while it works. Cheap.
    pub fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What a run did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Summary {
    /// Messages acknowledged by the broker.
    pub delivered: u64,
    /// Attempts that failed and were counted.
    pub retried: u64,
    /// Messages that died and are held.
    pub held: u64,
    /// Messages that moved to the dead letters, as far as that was answered.
    pub dead: u64,
}

/// A dispatcher that cannot run.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct RunError {
    kind: RunErrorKind,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl RunError {
    /// Why it cannot run.
    pub fn kind(&self) -> RunErrorKind {
        self.kind
    }
}

impl From<StoreError> for RunError {
    fn from(error: StoreError) -> Self {
        Self { kind: RunErrorKind::Store(error.kind()), source: Box::new(error) }
    }
}

impl From<PublishError> for RunError {
    fn from(error: PublishError) -> Self {
        Self { kind: RunErrorKind::Broker(error.kind()), source: Box::new(error) }
    }
}

/// Why a dispatcher cannot run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum RunErrorKind {
    /// The store cannot be used.
    #[error("the store cannot be used")]
    Store(StoreErrorKind),
    /// The broker cannot be used.
    #[error("the broker cannot be used")]
    Broker(PublishErrorKind),
}

fn initial_status() -> Status {
    Status {
        health: Health::Starting,
        lanes: 0,
        in_flight: 0,
        content_bytes: 0,
        known: 0,
        held_keys: 0,
        closed_topics: Vec::new(),
        backlog: None,
        last_delivery: None::<Duration>,
        detail: None,
        warnings: Vec::new(),
    }
}
