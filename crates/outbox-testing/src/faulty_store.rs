//! A store around another one that fails as a test asks.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::Store;
use outbox_core::store::{
    Backlog, Claim, ClaimReply, KeepLeases, Purge, Release, Settle, Settled, Standing, StoreError,
    StoreErrorKind, StoreProfile,
};

/// A [`Store`] around any other one, whose calls fail, hang or come late as a test asks.
///
/// Clones share their script. The application's side is not touched: add to the store inside.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// use outbox_core::store::{Settle, StoreErrorKind};
/// use outbox_core::Store;
/// use outbox_testing::{FaultyStore, MemoryStore, StoreFault, StoreMethod};
///
/// let memory = MemoryStore::new();
/// let store = FaultyStore::new(memory.clone());
/// store.fail_next(StoreMethod::Settle, 1, StoreFault::Doubt(StoreErrorKind::Unavailable));
/// assert!(store.settle(Settle::new(&[], &[])).await.is_err()); // though it has happened
/// assert!(store.settle(Settle::new(&[], &[])).await.is_ok());
/// # }
/// ```
#[derive(Clone)]
pub struct FaultyStore<S> {
    inner: S,
    script: Arc<Mutex<Script>>,
}

#[derive(Default)]
struct Script {
    rules: Vec<Rule>,
    outages: usize,
    calls: BTreeMap<StoreMethod, u64>,
}

struct Rule {
    method: StoreMethod,
    left: usize,
    fault: StoreFault,
}

/// A method of [`Store`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "each is named like its method")]
pub enum StoreMethod {
    Open,
    KeepLeases,
    Claim,
    Settle,
    Release,
    Purge,
    Backlog,
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreFault {
    /// Nothing happens, and the call fails.
    Refuse(StoreErrorKind),
    /// It happens, and the call fails all the same: the answer was lost.
    Doubt(StoreErrorKind),
    /// Nothing happens, and the call never ends: it must be dropped.
    Hang,
    /// It happens, and the call never ends.
    HangAfter,
    /// It happens after this time.
    Delay(Duration),
    /// It happens at once, and the answer comes after this time: what it tells is old by then.
    DelayAnswer(Duration),
}

impl From<StoreErrorKind> for StoreFault {
    fn from(kind: StoreErrorKind) -> Self {
        Self::Refuse(kind)
    }
}

impl<S> FaultyStore<S> {
    /// A store that does what `inner` does until it is told to fail.
    pub fn new(inner: S) -> Self {
        Self { inner, script: Arc::default() }
    }

    /// The store inside.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// Lets this fault happen to the next `count` calls of `method`. Scripts for one method
    /// follow each other. A [`StoreErrorKind`] stands for [`StoreFault::Refuse`].
    pub fn fail_next(&self, method: StoreMethod, count: usize, fault: impl Into<StoreFault>) {
        self.lock().rules.push(Rule { method, left: count, fault: fault.into() });
    }

    /// Refuses everything with [`StoreErrorKind::Unavailable`] until the answer is dropped.
    #[must_use = "the outage ends when this is dropped"]
    pub fn outage(&self) -> StoreOutage {
        self.lock().outages += 1;
        StoreOutage(Arc::clone(&self.script))
    }

    /// Drops all scripts.
    pub fn heal(&self) {
        self.lock().rules.clear();
    }

    /// How often `method` was called, failed calls included.
    pub fn calls(&self, method: StoreMethod) -> u64 {
        self.lock().calls.get(&method).copied().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, Script> {
        lock(&self.script)
    }

    async fn call<T: Send>(
        &self,
        method: StoreMethod,
        call: impl Future<Output = Result<T, StoreError>> + Send,
    ) -> Result<T, StoreError> {
        let fault = self.lock().next(method);
        match fault {
            None => call.await,
            Some(StoreFault::Refuse(kind)) => Err(kind.into()),
            Some(StoreFault::Doubt(kind)) => {
                call.await?;
                Err(kind.into())
            }
            Some(StoreFault::Hang) => std::future::pending().await,
            Some(StoreFault::HangAfter) => {
                call.await?;
                std::future::pending().await
            }
            Some(StoreFault::Delay(time)) => {
                tokio::time::sleep(time).await;
                call.await
            }
            Some(StoreFault::DelayAnswer(time)) => {
                let answer = call.await;
                tokio::time::sleep(time).await;
                answer
            }
        }
    }
}

impl Script {
    fn next(&mut self, method: StoreMethod) -> Option<StoreFault> {
        *self.calls.entry(method).or_default() += 1;
        if self.outages > 0 {
            return Some(StoreErrorKind::Unavailable.into());
        }
        let rule = self.rules.iter_mut().find(|rule| rule.method == method && rule.left > 0)?;
        rule.left -= 1;
        Some(rule.fault)
    }
}

#[async_trait]
impl<S: Store> Store for FaultyStore<S> {
    async fn open(&self) -> Result<StoreProfile, StoreError> {
        self.call(StoreMethod::Open, self.inner.open()).await
    }

    async fn keep_leases(&self, request: KeepLeases<'_>) -> Result<Standing, StoreError> {
        self.call(StoreMethod::KeepLeases, self.inner.keep_leases(request)).await
    }

    async fn claim(&self, request: Claim<'_>) -> Result<ClaimReply, StoreError> {
        self.call(StoreMethod::Claim, self.inner.claim(request)).await
    }

    async fn settle(&self, request: Settle<'_>) -> Result<Settled, StoreError> {
        self.call(StoreMethod::Settle, self.inner.settle(request)).await
    }

    async fn release(&self, request: Release<'_>) -> Result<(), StoreError> {
        self.call(StoreMethod::Release, self.inner.release(request)).await
    }

    async fn purge(&self, request: Purge) -> Result<u64, StoreError> {
        self.call(StoreMethod::Purge, self.inner.purge(request)).await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        self.call(StoreMethod::Backlog, self.inner.backlog()).await
    }
}

impl<S: fmt::Debug> fmt::Debug for FaultyStore<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").field("inner", &self.inner).finish_non_exhaustive()
    }
}

/// An outage of a [`FaultyStore`]: it ends when this is dropped.
pub struct StoreOutage(Arc<Mutex<Script>>);

impl Drop for StoreOutage {
    fn drop(&mut self) {
        lock(&self.0).outages -= 1;
    }
}

impl fmt::Debug for StoreOutage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StoreOutage").finish_non_exhaustive()
    }
}

fn lock(script: &Mutex<Script>) -> MutexGuard<'_, Script> {
    script.lock().unwrap_or_else(PoisonError::into_inner)
}
