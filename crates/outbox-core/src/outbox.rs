//! Where the application adds messages.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;

use crate::message::{Headers, Limits, Message, MessageError, MessageId};
use crate::store::{StoreError, StoreErrorKind};
use crate::trace::TraceContext;
use crate::wake::Wake;

/// Inserts messages through the caller's transaction. For implementors; callers use [`Outbox`].
#[async_trait]
pub trait Writer: fmt::Debug + Send + Sync + 'static {
    /// What the caller's transaction looks like: for sqlx, the connection it derefs to.
    type Transaction: ?Sized + Send;

    /// Inserts the messages.
    ///
    /// # Contract
    ///
    /// - The messages are visible to a dispatcher if and only if the caller commits.
    /// - It never begins, commits or rolls back the caller's transaction.
    /// - All messages are inserted or none, in the order of the slice.
    ///
    /// # Errors
    ///
    /// [`StoreErrorKind::NoTransaction`] when no transaction is open, by the server's word;
    /// nothing was inserted then.
    async fn write(
        &self,
        transaction: &mut Self::Transaction,
        messages: &[Message],
    ) -> Result<(), StoreError>;
}

/// Adds messages inside the caller's own transaction: both commit, or neither does.
///
/// For order per key, every writer of a key must take the same exclusive lock (the row of the
/// aggregate) *before* it adds, and keep it until it commits.
pub struct Outbox<W> {
    writer: Arc<W>,
    limits: Limits,
    stamps: Arc<[Stamp]>,
    wake: Wake,
}

type Stamp = Arc<dyn Fn(&mut Headers) -> Result<(), MessageError> + Send + Sync>;

impl<W: Writer> Outbox<W> {
    /// An outbox that inserts through `writer`, with the default [`Limits`].
    pub fn new(writer: W) -> Self {
        Self {
            writer: Arc::new(writer),
            limits: Limits::default(),
            stamps: Arc::new([]),
            wake: Wake::default(),
        }
    }

    /// Sets the limits that every message must keep.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Runs `stamp` on the headers of every message when it is added, before the limits are
    /// checked: tenant, correlation id. Stamps run in the order in which they were set.
    #[must_use]
    pub fn with_stamp(
        mut self,
        stamp: impl Fn(&mut Headers) -> Result<(), MessageError> + Send + Sync + 'static,
    ) -> Self {
        let added: Stamp = Arc::new(stamp);
        self.stamps = self.stamps.iter().cloned().chain([added]).collect();
        self
    }

    /// Stamps the caller's trace context (`traceparent`, `tracestate`, `baggage`) on every message
    /// that does not carry one. `current` is asked at every `add`. A context that breaks the limits of
    /// headers fails the `add`: leave `baggage` and `tracestate` out that come from outside unchecked.
    #[must_use]
    pub fn with_trace_context(
        self,
        current: impl Fn() -> Option<TraceContext> + Send + Sync + 'static,
    ) -> Self {
        self.with_stamp(move |headers| match current() {
            Some(context) => context.stamp(headers),
            None => Ok(()),
        })
    }

    /// Shares a [`Wake`] with a dispatcher in the same process; either may be built first.
    #[must_use]
    pub fn with_wake(mut self, wake: Wake) -> Self {
        self.wake = wake;
        self
    }

    /// Adds a message and returns its id. It is published after the caller commits, and never
    /// if the caller rolls back.
    ///
    /// # Errors
    ///
    /// [`AddErrorKind::Message`] when the message breaks a limit of [`Limits`], such as its size;
    /// [`AddErrorKind::NoTransaction`] when no transaction is open, which the server is asked;
    /// [`AddErrorKind::Store`] otherwise, also for a payload above 15 MiB.
    /// After a store error, or if this future was dropped, the caller must roll back.
    pub async fn add(
        &self,
        transaction: &mut W::Transaction,
        message: Message,
    ) -> Result<MessageId, AddError> {
        Ok(self.add_all(transaction, [message]).await?[0])
    }

    /// Adds messages by few statements and returns their ids. All are added or none.
    ///
    /// # Errors
    ///
    /// As [`add`](Self::add).
    pub async fn add_all(
        &self,
        transaction: &mut W::Transaction,
        messages: impl IntoIterator<Item = Message> + Send,
    ) -> Result<Vec<MessageId>, AddError> {
        let mut messages: Vec<Message> = messages.into_iter().collect();
        for message in &mut messages {
            for stamp in self.stamps.iter() {
                stamp(message.headers_mut())?;
            }
            self.limits.check(message)?;
        }
        if !messages.is_empty() {
            self.writer.write(transaction, &messages).await?;
            self.wake.nudge();
        }
        Ok(messages.iter().map(Message::id).collect())
    }

    /// Tells an attached dispatcher, after a commit, that there is work: it reads at once. What is in
    /// lanes of other workers comes with their next page (within 300 ms, unless set otherwise).
    /// Forgetting it costs milliseconds, never a message.
    pub fn wake(&self) {
        self.wake.wake();
    }
}

impl<W> Clone for Outbox<W> {
    fn clone(&self) -> Self {
        Self {
            writer: Arc::clone(&self.writer),
            limits: self.limits.clone(),
            stamps: Arc::clone(&self.stamps),
            wake: self.wake.clone(),
        }
    }
}

impl<W: fmt::Debug> fmt::Debug for Outbox<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox")
            .field("writer", &self.writer)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// A message that was not added.
#[derive(Debug, thiserror::Error)]
#[error("{kind}")]
pub struct AddError {
    kind: AddErrorKind,
    source: Box<dyn std::error::Error + Send + Sync>,
}

impl AddError {
    /// Why it was not added.
    pub fn kind(&self) -> AddErrorKind {
        self.kind
    }
}

impl From<MessageError> for AddError {
    fn from(error: MessageError) -> Self {
        Self { kind: AddErrorKind::Message(error.kind()), source: Box::new(error) }
    }
}

impl From<StoreError> for AddError {
    fn from(error: StoreError) -> Self {
        let kind = match error.kind() {
            StoreErrorKind::NoTransaction => AddErrorKind::NoTransaction,
            kind => AddErrorKind::Store(kind),
        };
        Self { kind, source: Box::new(error) }
    }
}

/// Why a message was not added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum AddErrorKind {
    /// The message breaks a limit of the outbox.
    #[error("message cannot be added")]
    Message(crate::message::MessageErrorKind),
    /// No transaction is open on the server: begin one, and after an error begin a new one.
    #[error("no transaction is open, or an error has ended it: a message is added inside one")]
    NoTransaction,
    /// The store failed; roll back.
    #[error("message was not added")]
    Store(StoreErrorKind),
}
