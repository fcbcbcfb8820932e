//! Connections of one purpose, and the guard that no half-used one is ever used again.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::MySqlConnection;
use sqlx::mysql::MySqlRow;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::session::{Session, Settings};
use crate::text::{self, Answer};

/// Connections for one kind of work, opened when they are needed.
///
/// Each kind of work has a line of its own, so that a hung settle does not delay the keeping of
/// leases.
pub(super) struct Line {
    settings: Settings,
    /// The server to which any line opened a connection last. Where an address has moved to another
    /// server, connections to the one before stay open: one that only reads would never notice.
    server: Arc<AtomicU64>,
    permits: Semaphore,
    idle: Mutex<Vec<Session>>,
}

impl Line {
    pub(super) fn new(settings: Settings, server: &Arc<AtomicU64>, connections: usize) -> Self {
        let permits = Semaphore::new(connections);
        Self { settings, server: Arc::clone(server), permits, idle: Mutex::default() }
    }

    /// Starts a unit of work.
    pub(super) async fn begin(&self) -> Result<Unit<'_>, StoreError> {
        let closed = |_| StoreError::from(StoreErrorKind::Unavailable);
        let permit = self.permits.acquire().await.map_err(closed)?;
        let session = match self.pop() {
            Some(session) => session,
            None => {
                let session = Session::open(&self.settings).await?;
                self.server.store(session.server, Relaxed);
                session
            }
        };
        let server = session.server;
        Ok(Unit { line: self, session: Some(session), server, _permit: permit })
    }

    fn pop(&self) -> Option<Session> {
        let (mut idle, server) = (self.idle(), self.server.load(Relaxed));
        idle.retain(|session| session.server == server && !session.is_stale(&self.settings));
        idle.pop()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Session>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One unit of work on one connection.
///
/// Unless it was finished (an error, a dropped future), its connection is closed: sqlx is not
/// cancel-safe, and an error inside a packet leaves its transaction open. What broke one
/// connection may have broken the idle ones beside it, so they go as well.
pub(super) struct Unit<'a> {
    line: &'a Line,
    session: Option<Session>,
    /// Which server answers.
    pub(super) server: u64,
    _permit: SemaphorePermit<'a>,
}

impl Unit<'_> {
    /// Runs statements in one packet.
    pub(super) async fn run(&mut self, packet: String) -> Result<Vec<Answer>, StoreError> {
        text::run(self.connection()?, packet).await
    }

    /// Runs statements in one packet, and hands on each row with the number of its statement.
    /// Gives the number of statements.
    pub(super) async fn each(
        &mut self,
        packet: String,
        on_row: impl FnMut(usize, MySqlRow) -> Result<(), StoreError> + Send,
    ) -> Result<usize, StoreError> {
        Ok(text::each(self.connection()?, packet, on_row).await?.len())
    }

    /// The connection, for what is not one packet.
    pub(super) fn connection(&mut self) -> Result<&mut MySqlConnection, StoreError> {
        match &mut self.session {
            Some(session) => Ok(&mut session.connection),
            None => Err(StoreErrorKind::Other.into()),
        }
    }

    /// What is unsafe about this server.
    pub(super) fn warnings(&self) -> Vec<String> {
        self.session.as_ref().map(|session| session.warnings.clone()).unwrap_or_default()
    }

    /// Whether others on the way may read along.
    pub(super) fn is_exposed(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.exposed)
    }

    /// Ends the unit: everything was answered, so the connection may be used again.
    pub(super) fn finish(mut self) {
        if let Some(mut session) = self.session.take() {
            session.touch();
            self.line.idle().push(session);
        }
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        if self.session.is_some() {
            self.line.idle().clear();
        }
    }
}
