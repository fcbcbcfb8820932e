//! The dispatcher's side of a store: leases, claims, settlements.

use std::fmt;
use std::num::NonZeroU16;
use std::time::Duration;

use async_trait::async_trait;

use crate::delivery::{
    Delivery, Failure, Lane, Lease, Position, Receipt, RowId, RowState, Settlement, Span, WorkerId,
};

/// Where committed messages wait, as the dispatcher sees it.
///
/// Every method may be cancelled at any await point without harm: nothing that was not confirmed
/// is assumed, and everything is safe to repeat. A call that outlives its deadline is dropped, so
/// an implementation must not return the connection of an unfinished call to a pool.
///
/// # Implementing it
///
/// - A position is handed out once: not again after its row is gone, nor after a restart.
/// - If the engine has one writer at a time, hand positions out within the transaction and say
///   [`StoreProfile::in_commit_order()`]; one lane is enough then. Otherwise rows become visible out
///   of order, and the sweep is what finds them.
/// - [`LeaseTable`](crate::LeaseTable) has the rules of leasing and encodes itself. Check a lease in
///   the transaction that writes what it allows.
/// - Requests borrow what they hold, so that a closure for
///   [`spawn_blocking`](tokio::task::spawn_blocking) cannot own them. Where an engine blocks, begin
///   and commit there, and do the reading and writing between them in place.
/// - What a newer dispatcher may ask for is unknown to an older store: requests and
///   [`Settlement`] are non-exhaustive. Of what it does not know, a store loses nothing: it treats an
///   unknown settlement as [`Settlement::Held`].
///
/// The conformance suite in `outbox-testing` has a test for each line of the contracts below, and
/// the example `custom_store` is a whole store in one file.
#[async_trait]
pub trait Store: fmt::Debug + Send + Sync + 'static {
    /// Checks schema and settings and tells what the dispatcher must know. Repeatable.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::Schema`] when the schema is missing, older or newer than supported;
    /// [`StoreErrorKind::Unsupported`] when the server lacks something that order or safety need.
    async fn open(&self) -> Result<StoreProfile, StoreError>;

    /// Registers the worker, renews the leases it holds, takes the lanes it asks for, and tells
    /// how all lanes and workers stand.
    ///
    /// # Contract
    ///
    /// - A lease is renewed only if this worker owns the lane under that epoch.
    /// - A take-over succeeds only if the lane's epoch and stamp are still the observed ones and
    ///   the lane is free or expired by the store's clock; it raises the epoch by one.
    /// - Expiry is judged by the store's clock alone. A lease that ends later than its own time
    ///   from now is expired as well: the clock was set back, and its owner may be dead.
    /// - A worker that was not seen for ten of its leases, or is to be seen so much later, is
    ///   forgotten; lanes are never deleted.
    ///
    /// # Errors
    ///
    /// Any [`StoreErrorKind`]; what was changed before the error may stand.
    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError>;

    /// Reads rows. Takes no lock and changes nothing.
    ///
    /// # Contract
    ///
    /// - Rows appear if and only if their transaction committed.
    /// - The page holds the rows of the wanted lanes above `after`, ascending, and the bare
    ///   positions of all other rows up to [`ClaimReply::covered`].
    /// - The sweep's snapshot is not older than the page's: whatever was committed when the page
    ///   was read is seen by the sweep.
    /// - The claim never filters on waits or holds; it returns them.
    /// - A row that cannot be read is [`Claimed::Unreadable`], never an error.
    /// - Content is returned within the byte budget; a row that does not fit is
    ///   [`Claimed::Unread`], except that a row alone in `fetch` is always returned whole. What
    ///   fits is the store's choice: it may give every row an even share of the budget.
    /// - A row that is fetched and stands on the page as well is in the reply once or twice.
    ///
    /// # Errors
    ///
    /// Any [`StoreErrorKind`]; nothing changed.
    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError>;

    /// Records what became of deliveries.
    ///
    /// # Contract
    ///
    /// - Delivered rows go away (or into the archive) if position and message id both match,
    ///   without a fence; a missing row is not an error. Repeating is harmless.
    /// - A failed row changes only under its lease's epoch, at `attempts` and `revision` as read;
    ///   otherwise it is listed in [`Settled::refused`] and stays as it is. So is the repetition
    ///   of a write that raised the attempts.
    /// - A dead row leaves the outbox in the step in which its full copy enters the dead letters.
    ///
    /// # Errors
    ///
    /// Any [`StoreErrorKind`]; what was asked may or may not have happened.
    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError>;

    /// Gives leases back, so that others take them at once. Leases not held are ignored; epochs
    /// stay. The worker's registration goes when `leaving` is set.
    ///
    /// # Errors
    ///
    /// Any [`StoreErrorKind`]; the leases then expire by themselves.
    async fn release(&self, request: Release<'_>) -> Result<(), StoreError>;

    /// Deletes delivered copies from the archive that are older than asked, at most `limit` of
    /// them, and tells how many. Never touches an undelivered row.
    ///
    /// # Errors
    ///
    /// Any [`StoreErrorKind`].
    async fn purge(&self, request: Purge) -> Result<u64, StoreError>;

    /// Counts what waits, cheaply on a large table.
    ///
    /// # Errors
    ///
    /// Any [`StoreErrorKind`].
    async fn backlog(&self) -> Result<Backlog, StoreError>;
}

#[async_trait]
impl<S: Store + ?Sized> Store for std::sync::Arc<S> {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        S::open(self).await
    }

    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        S::keep_leases(self, request).await
    }

    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        S::claim(self, request).await
    }

    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError> {
        S::settle(self, request).await
    }

    async fn release(&self, request: Release<'_>) -> Result<(), StoreError> {
        S::release(self, request).await
    }

    async fn purge(&self, request: Purge) -> Result<u64, StoreError> {
        S::purge(self, request).await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        S::backlog(self).await
    }
}

/// What [`Store::open`] tells.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreProfile {
    /// How many lanes there are; lanes are numbered from 0.
    pub lanes: NonZeroU16,
    /// Whether positions become visible in ascending order, as in a store with one writer at a
    /// time. There are no late rows then, and the dispatcher asks for no sweep.
    pub in_commit_order: bool,
    /// What was found unsafe, in words, for the log and the status: conditions under which order
    /// per key does not hold, clocks that differ, a database that can be damaged.
    pub warnings: Vec<String>,
}

impl StoreProfile {
    /// A store with this many lanes whose rows may become visible out of order.
    pub fn new(lanes: NonZeroU16) -> Self {
        Self { lanes, in_commit_order: false, warnings: Vec::new() }
    }

    /// States that positions become visible in ascending order.
    #[must_use]
    pub fn in_commit_order(mut self) -> Self {
        self.in_commit_order = true;
        self
    }

    /// Adds a warning.
    #[must_use]
    pub fn with_warning(mut self, warning: impl Into<String>) -> Self {
        self.warnings.push(warning.into());
        self
    }
}

/// A request to keep leases.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct KeepLeases<'a> {
    /// Who asks.
    pub worker: WorkerId,
    /// Whether this worker makes progress; lanes go to healthy workers.
    pub healthy: bool,
    /// How long a lease lasts from now on.
    pub ttl: Duration,
    /// The leases to renew.
    pub renew: &'a [Lease],
    /// The lanes to take.
    pub take: &'a [TakeOver],
}

impl<'a> KeepLeases<'a> {
    /// A registration that renews and takes nothing.
    pub fn new(worker: WorkerId, ttl: Duration) -> Self {
        Self { worker, healthy: true, ttl, renew: &[], take: &[] }
    }

    /// Sets whether this worker makes progress.
    #[must_use]
    pub fn healthy(mut self, healthy: bool) -> Self {
        self.healthy = healthy;
        self
    }

    /// Sets the leases to renew.
    #[must_use]
    pub fn renew(mut self, leases: &'a [Lease]) -> Self {
        self.renew = leases;
        self
    }

    /// Sets the lanes to take.
    #[must_use]
    pub fn take(mut self, lanes: &'a [TakeOver]) -> Self {
        self.take = lanes;
        self
    }
}

/// A lane to take, as it was last observed: compare and set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct TakeOver {
    /// The lane.
    pub lane: Lane,
    /// Its epoch as observed.
    pub epoch: u64,
    /// Its [`LaneRecord::stamp`] as observed.
    pub stamp: u64,
}

impl TakeOver {
    /// Takes the lane if it still stands as in `record`.
    pub fn of(record: &LaneRecord) -> Self {
        Self { lane: record.lane, epoch: record.epoch, stamp: record.stamp }
    }
}

/// How all lanes and workers stand after a keep.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Standing {
    /// Every lane.
    pub lanes: Vec<LaneRecord>,
    /// Every registered worker, the asking one included.
    pub workers: Vec<WorkerRecord>,
    /// Which server answered. When it changes, positions and everything read before are void.
    pub server: u64,
}

impl Standing {
    /// The standing of these lanes and workers on `server`.
    pub fn new(lanes: Vec<LaneRecord>, workers: Vec<WorkerRecord>, server: u64) -> Self {
        Self { lanes, workers, server }
    }
}

/// How one lane stands.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaneRecord {
    /// The lane.
    pub lane: Lane,
    /// Its epoch.
    pub epoch: u64,
    /// Its owner; `None` once released.
    pub owner: Option<WorkerId>,
    /// When the lease expires, in microseconds of the store's clock: compared for equality only.
    pub stamp: u64,
    /// Whether the lease has expired by the store's clock.
    pub expired: bool,
    /// How long its owner's lease lasts.
    pub ttl: Duration,
}

impl LaneRecord {
    /// A lane that nobody owns, at `epoch`.
    pub fn free(lane: Lane, epoch: u64) -> Self {
        Self { lane, epoch, owner: None, stamp: 0, expired: true, ttl: Duration::ZERO }
    }

    /// A lane owned by `owner` until `stamp`.
    #[must_use]
    pub fn owned(mut self, owner: WorkerId, stamp: u64, expired: bool, ttl: Duration) -> Self {
        self.owner = Some(owner);
        self.stamp = stamp;
        self.expired = expired;
        self.ttl = ttl;
        self
    }

    /// Sets the stamp.
    #[must_use]
    pub fn with_stamp(mut self, stamp: u64) -> Self {
        self.stamp = stamp;
        self
    }
}

/// One registered worker.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct WorkerRecord {
    /// The worker.
    pub worker: WorkerId,
    /// Whether it said that it makes progress.
    pub healthy: bool,
    /// How long ago it was seen, by the store's clock.
    pub seen: Duration,
}

impl WorkerRecord {
    /// A worker that was seen this long ago.
    pub fn new(worker: WorkerId, healthy: bool, seen: Duration) -> Self {
        Self { worker, healthy, seen }
    }
}

/// A request to read rows: any combination of its parts.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Claim<'a> {
    /// The next page of rows.
    pub page: Option<Page<'a>>,
    /// Spans whose rows are listed, whatever their lane; read at the page's snapshot or later.
    pub sweep: &'a [Span],
    /// The newest row above this position is wanted, whatever its lane.
    pub newest: Option<Position>,
    /// Positions in which to look for rows, those of transactions that are still open included; read
    /// after the sweep. A store that cannot see these answers with the committed ones.
    pub open: &'a [Span],
    /// Rows to read whole by position.
    pub fetch: &'a [Position],
    /// Rows of which only the state is wanted.
    pub watch: &'a [Position],
    /// Rows of the wanted lanes of which only the place is wanted: the slow full sweep.
    pub scan: Option<Page<'a>>,
    /// The byte budget of the contents in the reply.
    pub bytes: usize,
}

impl<'a> Claim<'a> {
    /// A claim that reads nothing yet, with this byte budget.
    pub fn new(bytes: usize) -> Self {
        Self { bytes, ..Self::default() }
    }

    /// Asks for a page.
    #[must_use]
    pub fn page(mut self, page: Page<'a>) -> Self {
        self.page = Some(page);
        self
    }

    /// Asks for a sweep.
    #[must_use]
    pub fn sweep(mut self, spans: &'a [Span]) -> Self {
        self.sweep = spans;
        self
    }

    /// Asks for the newest row above this position.
    #[must_use]
    pub fn newest(mut self, above: Option<Position>) -> Self {
        self.newest = above;
        self
    }

    /// Asks for a look at rows that are not committed yet.
    #[must_use]
    pub fn open(mut self, spans: &'a [Span]) -> Self {
        self.open = spans;
        self
    }

    /// Asks for rows by position.
    #[must_use]
    pub fn fetch(mut self, positions: &'a [Position]) -> Self {
        self.fetch = positions;
        self
    }

    /// Asks for the state of rows by position.
    #[must_use]
    pub fn watch(mut self, positions: &'a [Position]) -> Self {
        self.watch = positions;
        self
    }

    /// Asks for the places of the next rows.
    #[must_use]
    pub fn scan(mut self, page: Page<'a>) -> Self {
        self.scan = Some(page);
        self
    }
}

/// The next rows above a position.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Page<'a> {
    /// The lanes whose rows are wanted.
    pub lanes: &'a [Lane],
    /// Rows above this position.
    pub after: Position,
    /// Rows up to this position.
    pub through: Position,
    /// At most this many rows, those of other lanes included. A page that is bounded by `through`
    /// may leave other lanes' rows out, and count only its own.
    pub rows: usize,
}

impl<'a> Page<'a> {
    /// The first `rows` rows of `lanes` above `after`.
    pub fn new(lanes: &'a [Lane], after: Position, rows: usize) -> Self {
        Self { lanes, after, through: Position(u64::MAX), rows }
    }

    /// Ends the page at `through`. The positions of other lanes' rows are not needed then.
    #[must_use]
    pub fn through(mut self, through: Position) -> Self {
        self.through = through;
        self
    }
}

/// What a claim read.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ClaimReply {
    /// Rows of the page's wanted lanes and of `fetch`; pages ascending.
    pub rows: Vec<Claimed>,
    /// Rows of other lanes that the page passed; a page that is bounded by
    /// [`Page::through`] need not tell them.
    pub passed: Vec<Position>,
    /// Every row up to here that the page's snapshot showed is in `rows` or `passed`, or was left
    /// out of a bounded page because it is of another lane. It is the last row that the page read,
    /// or `after` without any; never beyond the bound.
    pub covered: Position,
    /// Whether the page ended for lack of rows, or at its bound, and not because it was full: its
    /// lanes have no further rows up to the bound.
    pub end: bool,
    /// Rows that exist in the sweep's spans.
    pub swept: Vec<Swept>,
    /// The greatest position of all rows above the one in [`Claim::newest`], of whatever lane, if
    /// it was asked for and there is one. A store may leave it out: what lies between the rows of a
    /// backlog is swept for longer then.
    pub newest: Option<Position>,
    /// Rows that exist in the `open` spans, committed or not.
    pub open: Vec<Position>,
    /// The state of the watched rows that exist.
    pub watched: Vec<Watched>,
    /// The scanned rows, ascending; fewer than asked for means that there are no more up to the
    /// bound.
    pub scanned: Vec<Swept>,
    /// Which server answered, as in [`Standing::server`].
    pub server: u64,
}

/// A row that a claim read; made by `into()` from a [`Delivery`], a [`Swept`] or an [`Unreadable`].
///
/// Boxed, since a message is handed on some ten times before it is at the broker.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Claimed {
    /// A message.
    Delivery(Box<Delivery>),
    /// A row whose content did not fit the byte budget; it is asked for again by position.
    Unread(Swept),
    /// A row that does not hold a valid message.
    Unreadable(Box<Unreadable>),
}

impl From<Delivery> for Claimed {
    fn from(delivery: Delivery) -> Self {
        Self::Delivery(Box::new(delivery))
    }
}

impl From<Swept> for Claimed {
    fn from(row: Swept) -> Self {
        Self::Unread(row)
    }
}

impl From<Unreadable> for Claimed {
    fn from(row: Unreadable) -> Self {
        Self::Unreadable(Box::new(row))
    }
}

impl Claimed {
    /// Where the row stands.
    pub fn position(&self) -> Position {
        match self {
            Self::Delivery(delivery) => delivery.position,
            Self::Unread(row) => row.position,
            Self::Unreadable(row) => row.id.position,
        }
    }
}

/// A row of which only place and size are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Swept {
    /// Where the row stands.
    pub position: Position,
    /// Its lane.
    pub lane: Lane,
    /// Bytes of its content.
    pub bytes: usize,
}

impl Swept {
    /// A row at `position` in `lane` with `bytes` of content.
    pub fn new(position: Position, lane: Lane, bytes: usize) -> Self {
        Self { position, lane, bytes }
    }
}

/// A row that does not hold a valid message: written around the API, or by a newer version.
///
/// Its topic's policy decides about it, as about a message that the broker rejected.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Unreadable {
    /// Which row.
    pub id: RowId,
    /// Its lane.
    pub lane: Lane,
    /// Its topic as far as it can be read.
    pub topic: String,
    /// Its key as far as it can be read.
    pub key: Option<Vec<u8>>,
    /// What was recorded about it.
    pub state: RowState,
    /// How long ago it was added.
    pub age: Duration,
    /// What is wrong with it.
    pub failure: Failure,
}

impl Unreadable {
    /// The row `id` in `lane`, unreadable because of `failure`.
    pub fn new(id: RowId, lane: Lane, failure: Failure) -> Self {
        Self {
            id,
            lane,
            topic: String::new(),
            key: None,
            state: RowState::default(),
            age: Duration::ZERO,
            failure,
        }
    }

    /// Sets topic and key as far as they can be read.
    #[must_use]
    pub fn with_destination(mut self, topic: impl Into<String>, key: Option<Vec<u8>>) -> Self {
        self.topic = topic.into();
        self.key = key;
        self
    }

    /// Sets what was recorded about the row and how long ago it was added.
    #[must_use]
    pub fn with_state(mut self, state: RowState, age: Duration) -> Self {
        self.state = state;
        self.age = age;
        self
    }
}

/// The state of a watched row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Watched {
    /// Which row.
    pub id: RowId,
    /// What is recorded about it.
    pub state: RowState,
}

impl Watched {
    /// The state of row `id`.
    pub fn new(id: RowId, state: RowState) -> Self {
        Self { id, state }
    }
}

/// What became of deliveries.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Settle<'a> {
    /// Rows whose message the broker acknowledged.
    pub delivered: &'a [Delivered],
    /// Rows that failed.
    pub failed: &'a [Failed],
    /// Whether delivered rows are kept in the archive instead of being deleted.
    pub archive: bool,
    /// Whether it was sent before, and how that ended is not known: rows may be gone or changed.
    pub repeated: bool,
}

impl<'a> Settle<'a> {
    /// Settles these rows; delivered ones are deleted.
    pub fn new(delivered: &'a [Delivered], failed: &'a [Failed]) -> Self {
        Self { delivered, failed, archive: false, repeated: false }
    }

    /// Keeps delivered rows in the archive.
    #[must_use]
    pub fn archive(mut self, archive: bool) -> Self {
        self.archive = archive;
        self
    }

    /// Tells that it was sent before.
    #[must_use]
    pub fn repeated(mut self, repeated: bool) -> Self {
        self.repeated = repeated;
        self
    }
}

/// A row whose message the broker acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Delivered {
    /// Which row.
    pub id: RowId,
    /// Where the message went.
    pub receipt: Receipt,
}

impl Delivered {
    /// The row `id` was delivered.
    pub fn new(id: RowId, receipt: Receipt) -> Self {
        Self { id, receipt }
    }
}

/// A row that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Failed {
    /// Which row.
    pub id: RowId,
    /// The lease under which the decision was made.
    pub lease: Lease,
    /// Attempts and revision of the row as it was read: the row changes only if it still has them.
    pub read: RowState,
    /// The attempts to record, absolute and above those read: a repetition of the write then finds
    /// the row changed, and is refused.
    pub attempts: u32,
    /// What becomes of the row.
    pub settlement: Settlement,
    /// Why.
    pub failure: Failure,
}

impl Failed {
    /// The row `id`, read as `read` under `lease`, now has `attempts` and this settlement.
    pub fn new(
        id: RowId,
        lease: Lease,
        read: RowState,
        attempts: u32,
        settlement: Settlement,
        failure: Failure,
    ) -> Self {
        Self { id, lease, read, attempts, settlement, failure }
    }
}

/// The answer to a settle.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Settled {
    /// Failed rows that were not changed: the lease is gone, an operator was faster, or this very
    /// write had already happened. The dispatcher reads them again.
    pub refused: Vec<Position>,
}

impl Settled {
    /// These failed rows were not changed.
    pub fn refusing(refused: Vec<Position>) -> Self {
        Self { refused }
    }
}

/// A request to give leases back.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Release<'a> {
    /// Who gives them back.
    pub worker: WorkerId,
    /// The leases.
    pub leases: &'a [Lease],
    /// Whether the worker stops for good.
    pub leaving: bool,
}

impl<'a> Release<'a> {
    /// `worker` gives `leases` back and goes on.
    pub fn new(worker: WorkerId, leases: &'a [Lease]) -> Self {
        Self { worker, leases, leaving: false }
    }

    /// States that the worker stops for good.
    #[must_use]
    pub fn leaving(mut self) -> Self {
        self.leaving = true;
        self
    }
}

/// A request to purge the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Purge {
    /// Delivered copies older than this go, by the store's clock.
    pub older_than: Duration,
    /// At most this many in one call.
    pub limit: u32,
}

impl Purge {
    /// Deletes at most `limit` copies older than `older_than`.
    pub fn new(older_than: Duration, limit: u32) -> Self {
        Self { older_than, limit }
    }
}

/// What waits in a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Backlog {
    /// Rows in the outbox, held ones included; at most 10,000 are counted.
    pub pending: u64,
    /// Whether `pending` is exact; otherwise there are at least that many.
    pub pending_is_exact: bool,
    /// Age of the oldest row whose key is not held.
    pub oldest_age: Option<Duration>,
    /// Held messages. A store may stop counting at a limit of its own: those on SQL stop at 100,000.
    pub held: u64,
    /// Dead letters, counted likewise.
    pub dead: u64,
}

impl Backlog {
    /// How many rows a store counts before it says "at least".
    pub const EXACT_LIMIT: u64 = 10_000;

    /// A backlog of `pending` rows, counted up to [`Self::EXACT_LIMIT`].
    pub fn new(pending: u64, oldest_age: Option<Duration>, held: u64, dead: u64) -> Self {
        let pending_is_exact = pending <= Self::EXACT_LIMIT;
        let pending = pending.min(Self::EXACT_LIMIT);
        Self { pending, pending_is_exact, oldest_age, held, dead }
    }
}

/// A store that could not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct StoreError {
    kind: StoreErrorKind,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl StoreError {
    /// An error of this kind caused by `source`.
    pub fn new(
        kind: StoreErrorKind,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, source: Some(source.into()) }
    }

    /// What kind of error it is.
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }
}

impl From<StoreErrorKind> for StoreError {
    fn from(kind: StoreErrorKind) -> Self {
        Self { kind, source: None }
    }
}

/// What kind of error a store met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum StoreErrorKind {
    /// The store cannot be reached, is read-only or did not answer in time: back off.
    #[error("store is unavailable")]
    Unavailable,
    /// Another transaction was in the way (deadlock, lock wait): try again now.
    #[error("store reported a conflict")]
    Conflict,
    /// The schema is missing, or older or newer than this version supports.
    #[error("store schema is missing or not supported")]
    Schema,
    /// The server lacks something or is set in a way that safety or order cannot bear.
    #[error("store is not supported")]
    Unsupported,
    /// There is no open transaction to add to.
    #[error("no transaction is open")]
    NoTransaction,
    /// The data is refused: too large, or not allowed by a constraint.
    #[error("store refused the data")]
    Invalid,
    /// The account may not do this.
    #[error("store denied access")]
    Denied,
    /// Anything else.
    #[error("store failed")]
    Other,
}
