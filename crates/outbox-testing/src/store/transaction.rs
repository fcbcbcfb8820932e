//! The application's side: connections, transactions, savepoints.

use std::fmt;
use std::ops::{Deref, DerefMut};

use async_trait::async_trait;
use outbox_core::store::{StoreError, StoreErrorKind};
use outbox_core::{Message, Position, Writer};

use super::MemoryStore;
use crate::Expected;
use crate::expected::assert_messages;

/// The largest payload in bytes, as in the SQL stores.
const PAYLOAD: usize = 15 << 20;

/// Inserts into the [`MemoryStore`] whose connection it is handed.
#[derive(Debug, Clone, Default)]
pub struct MemoryWriter(());

impl MemoryWriter {
    /// A writer; [`MemoryStore::outbox`] makes one for you.
    pub fn new() -> Self {
        Self(())
    }
}

#[async_trait]
impl Writer for MemoryWriter {
    type Transaction = MemoryConnection;

    async fn write(
        &self,
        transaction: &mut MemoryConnection,
        messages: &[Message],
    ) -> Result<(), StoreError> {
        transaction.insert(messages)
    }
}

/// A connection to a [`MemoryStore`]: what an open [`MemoryTransaction`] derefs to, as in sqlx.
pub struct MemoryConnection {
    store: MemoryStore,
    /// How much there was when each transaction or savepoint began; empty outside a transaction.
    levels: Vec<Mark>,
    added: Vec<Message>,
    positions: Vec<Position>,
    hooks: Vec<Hook>,
}

type Hook = Box<dyn FnOnce() + Send>;

#[derive(Clone, Copy)]
struct Mark {
    messages: usize,
    hooks: usize,
}

impl MemoryConnection {
    pub(super) fn new(store: MemoryStore) -> Self {
        Self {
            store,
            levels: Vec::new(),
            added: Vec::new(),
            positions: Vec::new(),
            hooks: Vec::new(),
        }
    }

    /// Begins a transaction; inside one, a savepoint.
    pub fn begin(&mut self) -> MemoryTransaction<'_> {
        let level = self.enter();
        MemoryTransaction { connection: Held::Borrowed(self), level }
    }

    /// The messages added in the open transaction so far, which nobody else sees yet.
    pub fn added(&self) -> &[Message] {
        &self.added
    }

    /// Runs `hook` after the outermost transaction has committed, and never if it, or the
    /// savepoint that is open now, is rolled back. A fake repository applies its changes here, so
    /// that they commit with the messages. Outside a transaction it runs at once.
    pub fn on_commit(&mut self, hook: impl FnOnce() + Send + 'static) {
        if self.levels.is_empty() {
            hook();
        } else {
            self.hooks.push(Box::new(hook));
        }
    }

    /// Asserts that exactly these messages were added in the open transaction, in this order.
    ///
    /// # Panics
    ///
    /// When they were not; the text shows what was added instead.
    #[track_caller]
    pub fn assert_added<E: Into<Expected>>(&self, expected: impl IntoIterator<Item = E>) {
        assert_messages("added in the transaction", &self.added, expected);
    }

    fn insert(&mut self, messages: &[Message]) -> Result<(), StoreError> {
        if self.levels.is_empty() {
            return Err(StoreErrorKind::NoTransaction.into());
        }
        if messages.iter().any(|message| message.payload().map_or(0, <[u8]>::len) > PAYLOAD) {
            return Err(StoreErrorKind::Invalid.into());
        }
        let now = self.store.now();
        let mut state = self.store.lock();
        self.positions.extend(messages.iter().map(|message| state.add(message.clone(), now)));
        self.added.extend_from_slice(messages);
        Ok(())
    }

    fn enter(&mut self) -> usize {
        self.levels.push(Mark { messages: self.added.len(), hooks: self.hooks.len() });
        self.levels.len() - 1
    }

    /// Ends this level and all below it, keeping what they did.
    fn commit(&mut self, level: usize) {
        self.levels.truncate(level);
        if level > 0 {
            return;
        }
        self.store.lock().commit(&self.positions);
        self.positions.clear();
        self.added.clear();
        for hook in self.hooks.drain(..) {
            hook();
        }
    }

    /// Ends this level and all below it, undoing what they did.
    fn rollback(&mut self, level: usize) {
        let Some(mark) = self.levels.get(level).copied() else { return };
        self.levels.truncate(level);
        self.store.lock().rollback(&self.positions[mark.messages..]);
        self.positions.truncate(mark.messages);
        self.added.truncate(mark.messages);
        self.hooks.truncate(mark.hooks);
    }
}

impl Drop for MemoryConnection {
    fn drop(&mut self) {
        self.rollback(0);
    }
}

impl fmt::Debug for MemoryConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryConnection")
            .field("in_transaction", &!self.levels.is_empty())
            .field("added", &self.added)
            .finish_non_exhaustive()
    }
}

/// An open transaction, or a savepoint inside one. Dropping it rolls it back.
#[derive(Debug)]
#[must_use = "a transaction that is dropped is rolled back"]
pub struct MemoryTransaction<'c> {
    connection: Held<'c>,
    level: usize,
}

#[derive(Debug)]
enum Held<'c> {
    Owned(Box<MemoryConnection>),
    Borrowed(&'c mut MemoryConnection),
}

impl MemoryTransaction<'static> {
    pub(super) fn owning(mut connection: MemoryConnection) -> Self {
        let level = connection.enter();
        Self { connection: Held::Owned(Box::new(connection)), level }
    }
}

impl MemoryTransaction<'_> {
    /// Commits: the messages become visible to dispatchers and the hooks run. A savepoint only
    /// hands both on to the transaction around it.
    pub fn commit(mut self) {
        let level = self.level;
        self.connection_mut().commit(level);
    }

    /// Rolls back: the messages are gone and leave a hole in the positions.
    pub fn rollback(self) {
        drop(self);
    }

    fn connection_mut(&mut self) -> &mut MemoryConnection {
        match &mut self.connection {
            Held::Owned(connection) => connection,
            Held::Borrowed(connection) => connection,
        }
    }
}

impl Deref for MemoryTransaction<'_> {
    type Target = MemoryConnection;

    fn deref(&self) -> &MemoryConnection {
        match &self.connection {
            Held::Owned(connection) => connection,
            Held::Borrowed(connection) => connection,
        }
    }
}

impl DerefMut for MemoryTransaction<'_> {
    fn deref_mut(&mut self) -> &mut MemoryConnection {
        self.connection_mut()
    }
}

impl Drop for MemoryTransaction<'_> {
    fn drop(&mut self) {
        let level = self.level; // Gone after a commit: nothing is left to roll back then.
        self.connection_mut().rollback(level);
    }
}
