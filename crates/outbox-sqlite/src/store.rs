//! The store of the dispatcher.

mod backlog;
mod claim;
mod dead_letters;
mod keep_leases;
mod line;
mod pace;
mod purge;
mod release;
mod row;
mod session;
mod settle;

use std::fmt;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use outbox_core::Store;
use outbox_core::store::{
    Backlog, Claim, ClaimReply, KeepLeases, Purge, Release, Settle, Settled, Standing, StoreError,
    StoreErrorKind, StoreProfile,
};
use sqlx::sqlite::SqliteConnectOptions;

use self::line::Line;
use self::pace::Pace;
pub(crate) use self::row::read_message;
use crate::schema::SqliteSchema;
use crate::tables::Tables;
use crate::text::{self, Answer, NOW};

/// A dispatcher has one claim under way; that of one that was dropped may still be closing.
const CLAIM_CONNECTIONS: usize = 2;

/// An outbox in SQLite as the dispatcher and the operator see it.
///
/// It uses connections of its own, never the application's pool: at most five of them, opened when
/// they are needed. Its writes are short transactions with pauses between them, and claims keep no
/// writer out. Cloning shares the connections.
#[derive(Clone)]
pub struct SqliteStore(Arc<Inner>);

struct Inner {
    schema: SqliteSchema,
    pace: Pace,
    keeping: Line,
    claiming: Line,
    settling: Line,
    rest: Line,
}

impl SqliteStore {
    /// A store in the file at `url`, such as `sqlite:shop.db`, opened: the schema and the mode of
    /// the database are checked. The file must exist.
    ///
    /// # Errors
    ///
    /// As [`Store::open`]; [`StoreErrorKind::Unsupported`] when `url` is malformed, or does not
    /// begin with `sqlite:`.
    pub async fn connect(url: &str, schema: &SqliteSchema) -> Result<Self, StoreError> {
        // sqlx takes any text: what is no URL of SQLite would be the name of a file.
        if !url.starts_with("sqlite:") {
            return Err(StoreError::new(StoreErrorKind::Unsupported, "URL is not one of SQLite"));
        }
        let options = url.parse().map_err(crate::error::store_error)?;
        let store = Self::from_options(options, schema);
        store.open().await?;
        Ok(store)
    }

    /// A store that connects with `options` when it is first used. Busy timeout and `synchronous`
    /// are the relay's own; the file is opened for writing, and none is created, whatever the
    /// options say.
    pub fn from_options(options: SqliteConnectOptions, schema: &SqliteSchema) -> Self {
        let options = session::options(options);
        Self(Arc::new(Inner {
            schema: schema.clone(),
            pace: Pace::new(),
            keeping: Line::new(options.clone(), 1),
            claiming: Line::new(options.clone(), CLAIM_CONNECTIONS),
            settling: Line::new(options.clone(), 1),
            rest: Line::new(options, 1),
        }))
    }

    fn tables(&self) -> &Tables {
        self.0.schema.tables()
    }

    /// Runs statements about so many rows in one short transaction, after the pause that the last
    /// one earned. Returns the answers of the statements.
    async fn write(&self, rows: usize, statements: &str) -> Result<Vec<Answer>, StoreError> {
        let mut unit = self.0.settling.begin().await?;
        self.0.pace.pause().await;
        let clock = format!("SELECT {NOW};");
        let packet = format!("BEGIN IMMEDIATE;{clock}{statements}{clock}COMMIT");
        let sent = Instant::now();
        let mut answers = unit.run(packet).await?;
        let took = sent.elapsed();
        unit.finish();
        // BEGIN, clock, statements, clock, COMMIT.
        answers.pop();
        let time = |answer: Option<Answer>| {
            let row = answer.as_ref().and_then(|answer| answer.rows.first());
            row.map_or(Ok(0), |row| text::number(row, 0))
        };
        let end = time(answers.pop())?;
        let mut answers = answers.into_iter().skip(1);
        let start = time(answers.next())?;
        let answers: Vec<Answer> = answers.collect();
        let changed = answers.iter().map(|answer| answer.affected).max().unwrap_or(0);
        let changed = usize::try_from(changed).unwrap_or(usize::MAX);
        self.0.pace.wrote(rows, changed, open_for(start, end, took));
        Ok(answers)
    }
}

/// How long a write kept others out: from its first statement to its last by the wall clock, in
/// microseconds, but no longer than the whole call took, should that clock have been set meanwhile.
fn open_for(start: u64, end: u64, took: Duration) -> Duration {
    Duration::from_micros(end.saturating_sub(start)).min(took)
}

/// Shows nothing: connect options may hold the key of an encrypted database.
impl fmt::Debug for SqliteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteStore").finish_non_exhaustive()
    }
}

#[async_trait]
impl Store for SqliteStore {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        let mut unit = self.0.rest.begin().await?;
        self.0.schema.check(unit.connection()?).await?;
        let version = session::version(unit.connection()?).await?;
        unit.finish();
        // One writer at a time gives ids out and commits before the next one does.
        let profile = StoreProfile::new(NonZeroU16::MIN).in_commit_order();
        Ok(session::warning(&version).into_iter().fold(profile, StoreProfile::with_warning))
    }

    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        let mut unit = self.0.keeping.begin().await?;
        let answers = unit.run(keep_leases::packet(self.tables(), &request)).await?;
        let standing = keep_leases::read(answers)?;
        unit.finish();
        Ok(standing)
    }

    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        let mut unit = self.0.claiming.begin().await?;
        let plan = claim::Plan::new(self.tables(), &request);
        let answers = unit.run(plan.packet).await?;
        let reply = claim::read(&request, &plan.parts, answers)?;
        unit.finish();
        Ok(reply)
    }

    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError> {
        let mut delivered = request.delivered;
        while !delivered.is_empty() {
            let (rows, rest) = delivered.split_at(self.0.pace.rows().min(delivered.len()));
            let statements = settle::delivered(self.tables(), rows, request.archive);
            self.write(rows.len(), &statements).await?;
            delivered = rest;
        }
        let mut refused = Vec::new();
        for row in request.failed {
            let answers = self.write(1, &settle::failed(self.tables(), row)).await?;
            if answers.first().is_none_or(|answer| answer.affected == 0) {
                refused.push(row.id.position);
            }
        }
        Ok(Settled::refusing(refused))
    }

    async fn release(&self, request: Release<'_>) -> Result<(), StoreError> {
        let statements = release::packet(self.tables(), &request);
        if statements.is_empty() {
            return Ok(());
        }
        let mut unit = self.0.keeping.begin().await?;
        unit.run(format!("BEGIN IMMEDIATE;{statements}COMMIT")).await?;
        unit.finish();
        Ok(())
    }

    async fn purge(&self, request: Purge) -> Result<u64, StoreError> {
        let limit = usize::try_from(request.limit).unwrap_or(usize::MAX);
        let mut purged = 0;
        while purged < limit {
            let rows = self.0.pace.rows().min(limit - purged);
            let sql = purge::sql(self.tables(), request.older_than, rows);
            let answers = self.write(rows, &sql).await?;
            let gone = answers.first().map_or(0, |answer| answer.affected);
            purged += usize::try_from(gone).unwrap_or(usize::MAX);
            if gone < rows as u64 {
                break;
            }
        }
        Ok(purged as u64)
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
    fn a_clock_that_is_set_makes_no_long_write() {
        let millis = Duration::from_millis;
        assert_eq!(open_for(1_000, 3_000, millis(900)), millis(2), "it waited for another writer");
        assert_eq!(open_for(1_000, 3_600_000_000, millis(9)), millis(9), "an hour ahead");
        assert_eq!(open_for(3_000, 1_000, millis(9)), Duration::ZERO, "back");
    }
}
