//! Connections of one purpose, and the guard that no half-used one is ever used again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use outbox_core::store::{StoreError, StoreErrorKind};
use sqlx::SqliteConnection;
use sqlx::sqlite::SqliteConnectOptions;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::session;
use crate::text::{self, Answer};

/// Connections for one kind of work, opened when they are needed.
///
/// Each kind of work has a line of its own, so that one that waits for a writer does not keep the
/// others from reading.
pub(super) struct Line {
    options: SqliteConnectOptions,
    permits: Semaphore,
    idle: Mutex<Vec<SqliteConnection>>,
}

impl Line {
    pub(super) fn new(options: SqliteConnectOptions, connections: usize) -> Self {
        Self { options, permits: Semaphore::new(connections), idle: Mutex::default() }
    }

    /// Starts a unit of work.
    pub(super) async fn begin(&self) -> Result<Unit<'_>, StoreError> {
        let closed = |_| StoreError::from(StoreErrorKind::Unavailable);
        let permit = self.permits.acquire().await.map_err(closed)?;
        let idle = self.idle().pop();
        let connection = match idle {
            Some(connection) => connection,
            None => session::open(&self.options).await?,
        };
        Ok(Unit { line: self, connection: Some(connection), _permit: permit })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<SqliteConnection>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One unit of work on one connection.
///
/// Unless it was finished (an error, a dropped future), its connection is closed, which rolls back
/// what a packet left open. What broke one connection may have broken the idle ones beside it, so
/// they go as well.
pub(super) struct Unit<'a> {
    line: &'a Line,
    connection: Option<SqliteConnection>,
    _permit: SemaphorePermit<'a>,
}

impl Unit<'_> {
    /// Runs statements in one packet.
    pub(super) async fn run(&mut self, packet: String) -> Result<Vec<Answer>, StoreError> {
        text::run(self.connection()?, packet).await
    }

    /// The connection, for what is not one packet.
    pub(super) fn connection(&mut self) -> Result<&mut SqliteConnection, StoreError> {
        self.connection.as_mut().ok_or_else(|| StoreErrorKind::Other.into())
    }

    /// Ends the unit: everything was answered, so the connection may be used again.
    pub(super) fn finish(mut self) {
        if let Some(connection) = self.connection.take() {
            self.line.idle().push(connection);
        }
    }
}

impl Drop for Unit<'_> {
    fn drop(&mut self) {
        if self.connection.is_some() {
            self.line.idle().clear();
        }
    }
}
