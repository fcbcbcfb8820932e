//! A store of your own, from the public API alone: the outbox in redb, an embedded key-value store.
//!
//! `cargo run --example custom_store` changes a table of its own and adds messages in one
//! transaction of redb, rolls another one back, and lets a dispatcher publish what was committed.
//! `cargo test -p examples --example custom_store` runs the conformance suites against it: one test
//! for each line of the contracts of [`Store`], [`Writer`] and [`DeadLetters`], passed or failed by
//! name.
//!
//! redb has one writer at a time. Positions therefore become visible in the order of the commits,
//! one lane is enough, and nothing has to be swept; a store with concurrent writers has more to do.

use std::collections::HashSet;
use std::num::NonZeroU16;
use std::ops::Bound::{Excluded, Included};
use std::ops::RangeBounds;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use outbox_core::dead_letters::{Cursor, DeadLetter, DeadLetterQuery, Place};
use outbox_core::delivery::{Failure, RowId, RowState, Settlement};
use outbox_core::store::{
    Backlog, Claim, ClaimReply, Claimed, Failed, KeepLeases, Page, Purge, Release, Settle, Settled,
    Standing, StoreError, StoreErrorKind, StoreProfile, Swept, Unreadable, Watched,
};
use outbox_core::{
    DeadLetters, Delivery, Dispatcher, Lane, LeaseTable, Message, MessageId, Outbox, Position,
    Store, Writer, async_trait,
};
use outbox_testing::MemoryBroker;
use redb::{
    Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table, TableDefinition,
    WriteTransaction,
};

/// What waits, by position.
const OUTBOX: TableDefinition<u64, Stored> = TableDefinition::new("outbox");

/// The positions that are held: nobody should have to read the outbox to find them.
const HELD: TableDefinition<u64, ()> = TableDefinition::new("outbox_held");

/// The dead letters, in the order in which they died.
const DEAD: TableDefinition<u64, Stored> = TableDefinition::new("outbox_dead");

/// The archive, by the time of delivery and the position.
const DELIVERED: TableDefinition<(u64, u64), &[u8]> = TableDefinition::new("outbox_delivered");

/// The last position given out: without it, that of a deleted row would be given out again.
const LAST: TableDefinition<(), u64> = TableDefinition::new("outbox_last");

const LEASES: TableDefinition<(), &[u8]> = TableDefinition::new("outbox_leases");
const LANE: Lane = Lane(0);

/// An application's own table.
const ORDERS: TableDefinition<&str, &str> = TableDefinition::new("orders");

#[tokio::main]
async fn main() -> Result<()> {
    let file = std::env::temp_dir().join(format!("custom_store-{}.redb", std::process::id()));
    let store = RedbStore::create(&file)?;
    let (outbox, broker) = (Outbox::new(RedbWriter), MemoryBroker::new());
    for (state, commit) in [("placed", true), ("cancelled", false), ("paid", true)] {
        let mut tx = store.begin().await?;
        tx.open_table(ORDERS)?.insert("order-1", state)?;
        let message = Message::builder("orders").key("order-1").payload(state).build()?;
        outbox.add(&mut tx, message).await?;
        if commit {
            RedbStore::commit(tx).await?;
        } else {
            tx.abort()?;
        }
    }
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build()?;
    println!("delivered: {}", dispatcher.run_until_empty().await?.delivered);
    let payloads = broker.published().into_iter().map(|it| it.payload.unwrap_or_default());
    let payloads = payloads.map(String::from_utf8).collect::<Result<Vec<_>, _>>()?;
    println!("published, in order: {}", payloads.join(", "));
    ensure!(payloads == ["placed", "paid"], "what was rolled back is a ghost, or one is lost");
    std::fs::remove_file(file)?;
    Ok(())
}

// The application's side ------------------------------------------------------------------------

/// Adds messages through the redb transaction that it is handed.
#[derive(Debug, Clone, Copy)]
struct RedbWriter;

#[async_trait]
impl Writer for RedbWriter {
    type Transaction = WriteTransaction;

    async fn write(&self, tx: &mut WriteTransaction, batch: &[Message]) -> Result<(), StoreError> {
        let add = || -> Result<(), redb::Error> {
            let mut tables = Tables::open(tx)?;
            let mut rows = batch.iter().map(|it| Row::new(*it.id().as_bytes(), it.encode()));
            rows.try_for_each(|row| tables.add(row))
        };
        add().map_err(failed)
    }
}

// The dispatcher's side -------------------------------------------------------------------------

#[derive(Debug, Clone)]
struct RedbStore(Arc<Database>);

impl RedbStore {
    fn create(file: &Path) -> Result<Self, StoreError> {
        Self::new(Database::create(file).map_err(failed)?)
    }

    fn new(database: Database) -> Result<Self, StoreError> {
        let create_tables = || -> Result<(), redb::Error> {
            let tx = database.begin_write()?;
            Tables::open(&tx)?;
            Ok(tx.commit()?)
        };
        create_tables().map_err(failed)?;
        Ok(Self(Arc::new(database)))
    }

    /// Begins a transaction when the one before has ended. Waiting for that blocks its thread.
    async fn begin(&self) -> Result<WriteTransaction, StoreError> {
        let database = Arc::clone(&self.0);
        blocking(move || Ok(database.begin_write()?)).await
    }

    async fn commit(tx: WriteTransaction) -> Result<(), StoreError> {
        blocking(move || Ok(tx.commit()?)).await
    }

    /// Changes tables in one transaction. Dropped before the commit, it changes nothing.
    async fn change<T: Send>(
        &self,
        change: impl FnOnce(&mut Tables<'_>) -> Result<T, redb::Error> + Send,
    ) -> Result<T, StoreError> {
        let tx = self.begin().await?;
        let done = Tables::open(&tx).and_then(|mut tables| change(&mut tables)).map_err(failed)?;
        Self::commit(tx).await?;
        Ok(done)
    }
}

#[async_trait]
impl Store for RedbStore {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        self.change(|tables| tables.leases()).await?; // Fails if they are of another version.
        Ok(StoreProfile::new(NonZeroU16::MIN).in_commit_order())
    }

    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        self.change(|tables| tables.lease(|leases| leases.keep(&request, now()))).await
    }

    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        self.read(&request).map_err(failed) // Reading waits for nobody.
    }

    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError> {
        self.change(|tables| {
            let now = micros(now());
            for delivered in request.delivered {
                if let Some(row) = tables.take(delivered.id)?
                    && request.archive
                {
                    tables.delivered.insert((now, row.position), &*row.content)?;
                }
            }
            // The fence, in the transaction that writes: no lane is taken over in between.
            let leases = tables.leases()?;
            let mut refused = Vec::new();
            for failed in request.failed {
                if !tables.fail(failed, &leases, now)? {
                    refused.push(failed.id.position);
                }
            }
            Ok(Settled::refusing(refused))
        })
        .await
    }

    async fn release(&self, request: Release<'_>) -> Result<(), StoreError> {
        self.change(|tables| tables.lease(|leases| leases.release(&request, now()))).await
    }

    async fn purge(&self, request: Purge) -> Result<u64, StoreError> {
        let until = (micros(now().saturating_sub(request.older_than)), 0);
        self.change(|tables| {
            let old = tables.delivered.range((0, 0)..until)?.take(request.limit as usize);
            let old = old.map(|copy| copy.map(|(key, _)| key.value()));
            let old = old.collect::<Result<Vec<_>, _>>()?;
            for key in &old {
                tables.delivered.remove(key)?;
            }
            Ok(old.len() as u64)
        })
        .await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        self.count().map_err(failed)
    }
}

impl RedbStore {
    /// All parts read one snapshot, so that the sweep is not older than the page.
    fn read(&self, request: &Claim<'_>) -> Result<ClaimReply, redb::Error> {
        let (outbox, now) = (self.0.begin_read()?.open_table(OUTBOX)?, micros(now()));
        let (mut reply, mut budget) = (ClaimReply::default(), request.bytes);
        for position in request.fetch {
            let mut unlimited = usize::MAX; // For a row alone: it is read whole.
            let budget = if request.fetch.len() == 1 { &mut unlimited } else { &mut budget };
            let row = rows(&outbox, position.0..=position.0, 1)?;
            reply.rows.extend(row.iter().map(|row| row.claimed(budget, now)));
        }
        let above = |page: &Page<'_>| (Excluded(page.after.0), Included(page.through.0));
        if let Some(page) = &request.page {
            // One more than asked for tells whether there are more.
            let mut next = rows(&outbox, above(page), page.rows.saturating_add(1))?;
            reply.end = next.len() <= page.rows;
            next.truncate(page.rows);
            reply.covered = next.last().map_or(page.after, |row| Position(row.position));
            if page.lanes.contains(&LANE) {
                reply.rows.extend(next.iter().map(|row| row.claimed(&mut budget, now)));
            } else {
                reply.passed.extend(next.iter().map(|row| Position(row.position)));
            }
        }
        for span in request.sweep {
            let swept = rows(&outbox, span.first.0..=span.last.0, usize::MAX)?;
            reply.swept.extend(swept.iter().map(Row::swept));
        }
        for position in request.watch {
            let row = rows(&outbox, position.0..=position.0, 1)?;
            reply.watched.extend(row.iter().map(|row| Watched::new(row.id(), row.state(now))));
        }
        if let Some(page) = request.scan.as_ref().filter(|page| page.lanes.contains(&LANE)) {
            reply.scanned = rows(&outbox, above(page), page.rows)?.iter().map(Row::swept).collect();
        }
        Ok(reply)
    }

    fn count(&self) -> Result<Backlog, redb::Error> {
        let tx = self.0.begin_read()?;
        let (outbox, held) = (tx.open_table(OUTBOX)?, tx.open_table(HELD)?);
        let keys = held_rows(&outbox, &held)?;
        let keys: HashSet<_> = keys.iter().filter_map(Row::order).collect();
        let mut oldest = None;
        for row in outbox.iter()? {
            let row = Row::of(row?.1.value());
            if row.died_at.is_none() && row.order().is_none_or(|key| !keys.contains(&key)) {
                oldest = Some(since(row.added_at, micros(now())));
                break;
            }
        }
        Ok(Backlog::new(outbox.len()?, oldest, held.len()?, tx.open_table(DEAD)?.len()?))
    }
}

// The operator's side ---------------------------------------------------------------------------

#[async_trait]
impl DeadLetters for RedbStore {
    async fn list(&self, query: &DeadLetterQuery) -> Result<Vec<DeadLetter>, StoreError> {
        let topic = |it: &DeadLetter| it.message.as_ref().map(|message| message.topic().to_owned());
        let mut letters = self.letters()?;
        letters.retain(|it| query.place.is_none_or(|place| it.cursor.place == place));
        letters.retain(|it| query.topic.is_none() || topic(it) == query.topic);
        letters.retain(|it| query.older_than.is_none_or(|age| it.age >= age));
        letters.retain(|it| query.after.is_none_or(|cursor| it.cursor > cursor));
        letters.truncate(query.limit as usize);
        Ok(letters)
    }

    async fn get(&self, id: MessageId) -> Result<Option<DeadLetter>, StoreError> {
        Ok(self.letters()?.into_iter().filter(|it| it.id == id).min_by_key(|it| it.age))
    }

    async fn retry(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        self.operate(ids, |tables, cursor, row| {
            let again = Row::new(row.id, row.content);
            if cursor.place == Place::Dead {
                tables.dead.remove(cursor.row)?;
                tables.add(Row { retried: true, ..again })?;
            } else {
                let Row { position, added_at, retried, .. } = row;
                let revision = row.revision + 1; // What was decided before this is refused.
                tables.held.remove(position)?;
                tables.put(&Row { position, added_at, retried, revision, ..again })?;
            }
            Ok(true)
        })
        .await
    }

    async fn skip(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        self.operate(ids, |tables, cursor, row| match cursor.place {
            Place::Held => tables.bury(row).map(|()| true),
            Place::Dead => Ok(false),
        })
        .await
    }

    async fn discard(&self, ids: &[MessageId]) -> Result<u64, StoreError> {
        self.operate(ids, |tables, cursor, row| match cursor.place {
            Place::Held => Ok(tables.take(row.id())?.is_some()),
            Place::Dead => Ok(tables.dead.remove(cursor.row)?.is_some()),
        })
        .await
    }
}

impl RedbStore {
    fn letters(&self) -> Result<Vec<DeadLetter>, StoreError> {
        let read = || -> Result<_, redb::Error> {
            let tx = self.0.begin_read()?;
            let (outbox, held) = (tx.open_table(OUTBOX)?, tx.open_table(HELD)?);
            let died = died(&outbox, &held, &tx.open_table(DEAD)?)?.into_iter();
            Ok(died.map(|(cursor, row)| row.letter(cursor, micros(now()))).collect())
        };
        read().map_err(failed)
    }

    /// Does this to every message of these ids that died, and counts those that it changed.
    async fn operate(
        &self,
        ids: &[MessageId],
        verb: fn(&mut Tables<'_>, Cursor, Row) -> Result<bool, redb::Error>,
    ) -> Result<u64, StoreError> {
        self.change(|tables| {
            let mut changed = 0;
            for (cursor, row) in died(&tables.outbox, &tables.held, &tables.dead)? {
                let wanted = ids.contains(&row.id().message);
                changed += u64::from(wanted && verb(tables, cursor, row)?);
            }
            Ok(changed)
        })
        .await
    }
}

// The tables ------------------------------------------------------------------------------------

/// All tables, within a transaction.
struct Tables<'t> {
    outbox: Table<'t, u64, Stored>,
    held: Table<'t, u64, ()>,
    dead: Table<'t, u64, Stored>,
    delivered: Table<'t, (u64, u64), &'static [u8]>,
    last: Table<'t, (), u64>,
    leases: Table<'t, (), &'static [u8]>,
}

impl<'t> Tables<'t> {
    /// Opens the tables, and creates those that are missing.
    fn open(tx: &'t WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self {
            outbox: tx.open_table(OUTBOX)?,
            held: tx.open_table(HELD)?,
            dead: tx.open_table(DEAD)?,
            delivered: tx.open_table(DELIVERED)?,
            last: tx.open_table(LAST)?,
            leases: tx.open_table(LEASES)?,
        })
    }

    /// Puts a row behind all others.
    fn add(&mut self, row: Row) -> Result<(), redb::Error> {
        let position = self.last.get(())?.map_or(0, |last| last.value()) + 1;
        self.last.insert((), position)?;
        self.put(&Row { position, ..row })
    }

    fn put(&mut self, row: &Row) -> Result<(), redb::Error> {
        self.outbox.insert(row.position, row.stored())?;
        Ok(())
    }

    /// The row, if it holds this message.
    fn find(&self, id: RowId) -> Result<Option<Row>, redb::Error> {
        let row = self.outbox.get(id.position.0)?.map(|row| Row::of(row.value()));
        Ok(row.filter(|row| row.id() == id))
    }

    /// Takes the row out of the outbox, if it holds this message.
    fn take(&mut self, id: RowId) -> Result<Option<Row>, redb::Error> {
        let Some(row) = self.find(id)? else { return Ok(None) };
        self.outbox.remove(row.position)?;
        self.held.remove(row.position)?;
        Ok(Some(row))
    }

    /// Records a failure, if the lease is current and the row is as it was read.
    fn fail(&mut self, it: &Failed, leases: &LeaseTable, now: u64) -> Result<bool, redb::Error> {
        let Some(mut row) = self.find(it.id)? else { return Ok(false) };
        let as_read = (row.attempts, row.revision) == (it.read.attempts, it.read.revision);
        if !as_read || it.lease.lane != LANE || !leases.is_current(&it.lease) {
            return Ok(false);
        }
        (row.attempts, row.failure) = (it.attempts, it.failure.to_string());
        match it.settlement {
            Settlement::Retry(wait) => row.available_at = now + micros(wait),
            Settlement::Dead => {
                row.died_at = Some(now);
                self.bury(row)?;
                return Ok(true);
            }
            // Held, and what only a newer dispatcher knows: an operator will see it.
            _ => {
                row.died_at = Some(now);
                self.held.insert(row.position, ())?;
            }
        }
        self.put(&row)?;
        Ok(true)
    }

    /// Moves a row that died to the dead letters.
    fn bury(&mut self, row: Row) -> Result<(), redb::Error> {
        self.take(row.id())?;
        let number = self.dead.last()?.map_or(0, |(number, _)| number.value()) + 1;
        self.dead.insert(number, row.stored())?;
        Ok(())
    }

    /// Who has the lane. The rules are the core's; a store only keeps an encoded table.
    fn leases(&self) -> Result<LeaseTable, redb::Error> {
        match self.leases.get(())? {
            None => Ok(LeaseTable::new(NonZeroU16::MIN)),
            Some(bytes) => LeaseTable::decode(bytes.value())
                .ok_or_else(|| redb::Error::Corrupted("leases of another version".to_owned())),
        }
    }

    fn lease<T>(&mut self, change: impl FnOnce(&mut LeaseTable) -> T) -> Result<T, redb::Error> {
        let mut leases = self.leases()?;
        let done = change(&mut leases);
        self.leases.insert((), &*leases.encode())?;
        Ok(done)
    }
}

/// At most `limit` rows of a range.
fn rows(
    table: &impl ReadableTable<u64, Stored>,
    range: impl RangeBounds<u64>,
    limit: usize,
) -> Result<Vec<Row>, redb::Error> {
    let rows = table.range::<u64>(range)?.take(limit);
    Ok(rows.map(|row| Ok(Row::of(row?.1.value()))).collect::<Result<_, redb::StorageError>>()?)
}

fn held_rows(
    outbox: &impl ReadableTable<u64, Stored>,
    held: &impl ReadableTable<u64, ()>,
) -> Result<Vec<Row>, redb::Error> {
    let mut all = Vec::new();
    for position in held.iter()? {
        let position = position?.0.value();
        all.extend(rows(outbox, position..=position, 1)?);
    }
    Ok(all)
}

/// Held rows and then dead ones, each oldest first.
fn died(
    outbox: &impl ReadableTable<u64, Stored>,
    held: &impl ReadableTable<u64, ()>,
    dead: &impl ReadableTable<u64, Stored>,
) -> Result<Vec<(Cursor, Row)>, redb::Error> {
    let held = held_rows(outbox, held)?.into_iter();
    let mut all: Vec<_> =
        held.map(|row| (Cursor { place: Place::Held, row: row.position }, row)).collect();
    for dead in dead.iter()? {
        let (number, row) = dead?;
        let cursor = Cursor { place: Place::Dead, row: number.value() };
        all.push((cursor, Row::of(row.value())));
    }
    Ok(all)
}

/// A [`Row`], field by field.
type Stored = ([u8; 16], u64, u64, u32, u32, u64, Option<u64>, bool, &'static str, &'static [u8]);

/// A message in the outbox or among the dead letters, and what became of it so far.
#[derive(Default)]
struct Row {
    id: [u8; 16],
    position: u64,
    added_at: u64,
    attempts: u32,
    revision: u32,
    available_at: u64,
    died_at: Option<u64>,
    retried: bool,
    failure: String,
    content: Vec<u8>,
}

impl Row {
    fn new(id: [u8; 16], content: Vec<u8>) -> Self {
        Self { id, content, added_at: micros(now()), ..Self::default() }
    }

    #[rustfmt::skip]
    fn of(stored: <Stored as redb::Value>::SelfType<'_>) -> Self {
        let (id, position, added_at, attempts, revision, available_at, died_at, retried, failure,
            content) = stored;
        let (failure, content) = (failure.to_owned(), content.to_vec());
        Self {
            id, position, added_at, attempts, revision, available_at, died_at, retried, failure,
            content,
        }
    }

    #[rustfmt::skip]
    fn stored(&self) -> <Stored as redb::Value>::SelfType<'_> {
        (self.id, self.position, self.added_at, self.attempts, self.revision, self.available_at,
            self.died_at, self.retried, &self.failure, &self.content)
    }

    fn id(&self) -> RowId {
        RowId::new(Position(self.position), MessageId::from_bytes(self.id))
    }

    /// The unit of order; what has no key, or cannot be read, has none.
    fn order(&self) -> Option<(String, Vec<u8>)> {
        let message = Message::decode(&self.content).ok()?;
        Some((message.topic().to_owned(), message.key()?.to_vec()))
    }

    fn state(&self, now: u64) -> RowState {
        RowState::new(self.attempts, self.revision)
            .with_held(self.died_at.is_some())
            .with_wait(since(now, self.available_at))
            .with_retried(self.retried)
    }

    fn swept(&self) -> Swept {
        Swept::new(Position(self.position), LANE, self.content.len())
    }

    /// The row as a claim tells it: a row that cannot be read is a value, too.
    fn claimed(&self, budget: &mut usize, now: u64) -> Claimed {
        let Some(rest) = budget.checked_sub(self.content.len()) else {
            return self.swept().into();
        };
        *budget = rest;
        let (state, age) = (self.state(now), since(self.added_at, now));
        match Message::decode(&self.content) {
            Ok(message) => {
                let delivery = Delivery::new(Position(self.position), LANE, message);
                delivery.with_state(state).with_age(age).into()
            }
            Err(error) => {
                let failure = Failure::new("unreadable", &error.to_string());
                let row = Unreadable::new(self.id(), LANE, failure);
                row.with_state(state, age).into()
            }
        }
    }

    fn letter(self, cursor: Cursor, now: u64) -> DeadLetter {
        let (id, message) = (self.id().message, Message::decode(&self.content).ok());
        let age = since(self.died_at.unwrap_or(now), now);
        let letter = DeadLetter::new(id, message, cursor, age);
        letter.with_history(Position(self.position), self.attempts, self.failure)
    }
}

/// The store's clock. It may step: who takes a lane over waits on a clock of its own as well.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

/// The time from `then` to `now`; zero if that is the other way round.
fn since(then: u64, now: u64) -> Duration {
    Duration::from_micros(now.saturating_sub(then))
}

fn failed(error: impl Into<redb::Error>) -> StoreError {
    let error = error.into();
    let kind = match error {
        redb::Error::Io(_) | redb::Error::PreviousIo => StoreErrorKind::Unavailable,
        redb::Error::Corrupted(_) | redb::Error::TableTypeMismatch { .. } => StoreErrorKind::Schema,
        _ => StoreErrorKind::Other,
    };
    StoreError::new(kind, error)
}

/// Does what blocks its thread where that is no harm.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, redb::Error> + Send + 'static,
) -> Result<T, StoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| StoreError::new(StoreErrorKind::Other, error))?.map_err(failed)
}

// The proof -------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use outbox_testing::conformance::store::{DeadLettersFixture, StoreFixture};
    use redb::backends::InMemoryBackend;

    use super::*;

    #[async_trait]
    impl StoreFixture for RedbStore {
        type Writer = RedbWriter;
        type Transaction = Box<WriteTransaction>;
        type Connection = Box<WriteTransaction>;

        async fn set_up() -> Self {
            let database = Database::builder().create_with_backend(InMemoryBackend::new());
            Self::new(database.expect("a database")).expect("tables")
        }

        fn writer(&self) -> RedbWriter {
            RedbWriter
        }

        fn store(&self) -> Arc<dyn Store> {
            Arc::new(self.clone())
        }

        fn sees_open_rows(&self) -> bool {
            false
        }

        async fn begin(&self) -> Box<WriteTransaction> {
            Box::new(RedbStore::begin(self).await.expect("a transaction"))
        }

        async fn commit(&self, transaction: Box<WriteTransaction>) {
            RedbStore::commit(*transaction).await.expect("a commit");
        }

        async fn roll_back(&self, transaction: Box<WriteTransaction>) {
            transaction.abort().expect("a rollback");
        }

        /// A [`WriteTransaction`] has none that would not cost a copy of the table.
        async fn add_in_savepoint(
            &self,
            _: &mut Box<WriteTransaction>,
            _: Message,
            _: bool,
        ) -> bool {
            false
        }

        /// In redb, to have a [`WriteTransaction`] is to be in one.
        async fn connect(&self) -> Option<Box<WriteTransaction>> {
            None
        }

        async fn garble(&self, message: MessageId) -> bool {
            let garbled = self.change(|tables| {
                let mut all = rows(&tables.outbox, .., usize::MAX)?.into_iter();
                let Some(row) = all.find(|row| row.id().message == message) else {
                    return Ok(false);
                };
                tables.put(&Row { content: b"garbled".to_vec(), ..row })?;
                Ok(true)
            });
            garbled.await.expect("a change")
        }

        async fn pass(&self, time: Duration) {
            tokio::time::sleep(time + Duration::from_millis(5)).await;
        }

        /// The clock is that of the machine, and the leases are written in the core's own way.
        async fn set_clock_back(&self, _: Duration) -> bool {
            false
        }
    }

    impl DeadLettersFixture for RedbStore {
        fn dead_letters(&self) -> Arc<dyn DeadLetters> {
            Arc::new(self.clone())
        }
    }

    outbox_testing::store_conformance!(RedbStore);
    outbox_testing::dead_letters_conformance!(RedbStore);
}
