//! A store in memory that behaves as the real ones do.

mod dead_letters;
mod dispatching;
mod state;
mod transaction;

use std::fmt;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use outbox_core::{Lane, Message, MessageId, Outbox, Position};
use tokio::time::Instant;

use self::state::State;
pub use self::transaction::{MemoryConnection, MemoryTransaction, MemoryWriter};
use crate::Expected;
use crate::expected::assert_messages;

/// An [`Outbox`] whose messages go into a [`MemoryStore`].
pub type MemoryOutbox = Outbox<MemoryWriter>;

/// A store in memory, with real transactions and everything that a dispatcher asks of a store.
///
/// Clones are the same store. It behaves as MySQL does where that matters to a test: a message
/// gets its position when it is *added* and becomes visible when its transaction commits, so that
/// positions become visible out of order, and a transaction that is rolled back leaves a hole.
/// Leases and waits follow tokio's clock: under a paused clock they expire when the test says so.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use outbox_core::Message;
/// use outbox_testing::MemoryStore;
///
/// let store = MemoryStore::new();
/// let outbox = store.outbox();
///
/// let mut tx = store.begin();
/// outbox.add(&mut tx, Message::builder("orders").key("7").payload("placed").build()?).await?;
/// store.assert_pending::<&str>([]);
/// tx.commit();
/// store.assert_pending([("orders", "7")]);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct MemoryStore(Arc<Shared>);

/// What a new store's clock shows: a year, so that it can be set back.
const BEGINNING: Duration = Duration::from_secs(365 * 24 * 3_600);

struct Shared {
    origin: Instant,
    /// By how many microseconds the clock was set back.
    set_back: AtomicU64,
    state: Mutex<State>,
}

impl MemoryStore {
    /// How many lanes a store has unless [`with_lanes`](Self::with_lanes) says otherwise: as many
    /// as the SQL stores have by default.
    pub const DEFAULT_LANES: NonZeroU16 = NonZeroU16::new(16).unwrap();

    /// An empty store with [`DEFAULT_LANES`](Self::DEFAULT_LANES).
    pub fn new() -> Self {
        Self::with_lanes(Self::DEFAULT_LANES)
    }

    /// An empty store with this many lanes. With one lane every key is in the same lane.
    pub fn with_lanes(lanes: NonZeroU16) -> Self {
        Self(Arc::new(Shared {
            origin: Instant::now(),
            set_back: AtomicU64::new(0),
            state: Mutex::new(State::new(lanes)),
        }))
    }

    /// Hands positions out at commit instead, so that they become visible in ascending order, as
    /// in a store that has one writer at a time.
    #[must_use]
    pub fn in_commit_order(self) -> Self {
        self.lock().keep_commit_order();
        self
    }

    /// An outbox that adds to this store.
    pub fn outbox(&self) -> MemoryOutbox {
        Outbox::new(MemoryWriter::new())
    }

    /// Begins a transaction on a connection of its own.
    pub fn begin(&self) -> MemoryTransaction<'static> {
        MemoryTransaction::owning(self.connection())
    }

    /// A connection without an open transaction: adding to it is refused.
    pub fn connection(&self) -> MemoryConnection {
        MemoryConnection::new(self.clone())
    }

    /// The committed messages that were not settled yet, held ones included, by position.
    pub fn pending(&self) -> Vec<Message> {
        self.lock().pending()
    }

    /// The held messages, by position.
    pub fn held(&self) -> Vec<Message> {
        self.lock().held()
    }

    /// The messages in the dead letters, in the order in which they went there.
    pub fn dead(&self) -> Vec<Message> {
        self.lock().dead()
    }

    /// The messages in the archive of delivered ones, in the order in which they were settled.
    pub fn archived(&self) -> Vec<Message> {
        self.lock().archived()
    }

    /// The lane of a message: that of its key, or of its id when it has no key. Equal to the lane
    /// that the SQL stores compute.
    pub fn lane_of(&self, message: &Message) -> Lane {
        self.lock().lane_of(message)
    }

    /// Asserts that exactly these messages wait, in the order of their positions.
    ///
    /// # Panics
    ///
    /// When they do not; the text shows what waits instead.
    #[track_caller]
    pub fn assert_pending<E: Into<Expected>>(&self, expected: impl IntoIterator<Item = E>) {
        assert_messages("pending in the store", &self.pending(), expected);
    }

    /// Makes the committed row of a message unreadable, as if it had been written around the API.
    /// Tells whether there is such a row.
    pub fn garble(&self, id: MessageId) -> bool {
        self.lock().garble(id)
    }

    /// Sets the store's clock back, as that of a server is when it was wrong. To set it forward,
    /// advance tokio's: to a store, that is the same as time that passes.
    pub fn set_clock_back(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.0.set_back.fetch_add(micros, Relaxed);
    }

    /// Lets another server answer from now on, as after a fail-over, and hands out positions from
    /// `next` again, though never one that a row has.
    ///
    /// # Panics
    ///
    /// When a transaction with messages is open: a fail-over would end it, and committing to a
    /// fake cannot fail.
    pub fn fail_over(&self, next: Position) {
        self.lock().fail_over(next);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The store's clock.
    fn now(&self) -> Duration {
        let passed = Instant::now().saturating_duration_since(self.0.origin);
        let set_back = Duration::from_micros(self.0.set_back.load(Relaxed));
        (BEGINNING + passed).saturating_sub(set_back)
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        f.debug_struct("MemoryStore")
            .field("profile", &state.profile())
            .field("pending", &state.backlog(Duration::ZERO).pending)
            .finish_non_exhaustive()
    }
}
