//! What the cases share: an application, a worker, and short ways to ask a store.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use outbox_core::dead_letters::{DeadLetter, DeadLetterQuery};
use outbox_core::delivery::{Failure, Receipt, RowId, Settlement};
use outbox_core::store::{
    Backlog, Claim, ClaimReply, Claimed, Delivered, Failed, KeepLeases, Page, Purge, Release,
    Settle, Settled, Standing, StoreError, StoreErrorKind, TakeOver,
};
use outbox_core::{
    DeadLetters, Delivery, Lane, Lease, Message, MessageId, Outbox, Position, Store, WorkerId,
};

use super::StoreFixture;

/// Long enough that no lease of this length expires during a case.
pub(super) const LONG: Duration = Duration::from_secs(600);

/// No call takes so many polls.
pub(super) const POLLS: usize = 300;

/// More than everything that a case adds.
pub(super) const MANY: usize = 1_000;
const PLENTY: usize = 16 * 1024 * 1024;

pub(super) struct Stage<F: StoreFixture> {
    pub(super) fixture: F,
    pub(super) store: Arc<dyn Store>,
    outbox: Outbox<F::Writer>,
    pub(super) lanes: Vec<Lane>,
    pub(super) in_commit_order: bool,
}

impl<F: StoreFixture> Stage<F> {
    pub(super) async fn set() -> Self {
        let fixture = F::set_up().await;
        let store = fixture.store();
        let profile = store.open().await.unwrap();
        Self {
            outbox: Outbox::new(fixture.writer()),
            lanes: (0..profile.lanes.get()).map(Lane).collect(),
            in_commit_order: profile.in_commit_order,
            fixture,
            store,
        }
    }

    // The application ------------------------------------------------------------------------

    /// Adds a message in a transaction of its own and returns its id.
    pub(super) async fn add(&self, message: Message) -> MessageId {
        self.add_all([message]).await[0]
    }

    /// Adds messages by one statement in a transaction of their own.
    pub(super) async fn add_all<M>(&self, messages: M) -> Vec<MessageId>
    where
        M: IntoIterator<Item = Message> + Send,
    {
        let mut transaction = self.fixture.begin().await;
        let ids = self.outbox.add_all(&mut transaction, messages).await.unwrap();
        self.fixture.commit(transaction).await;
        ids
    }

    pub(super) async fn add_in(&self, transaction: &mut F::Transaction, message: Message) {
        self.outbox.add(transaction, message).await.unwrap();
    }

    pub(super) fn outbox(&self) -> &Outbox<F::Writer> {
        &self.outbox
    }

    // Reading --------------------------------------------------------------------------------

    pub(super) async fn claim(&self, request: Claim<'_>) -> ClaimReply {
        patiently(async || self.store.claim(request).await).await
    }

    /// Every committed row.
    pub(super) async fn all(&self) -> ClaimReply {
        self.page(Position::START, MANY).await
    }

    /// A page of all lanes.
    pub(super) async fn page(&self, after: Position, rows: usize) -> ClaimReply {
        self.claim(everything().page(Page::new(&self.lanes, after, rows))).await
    }

    /// A row of a page, fetched if it was beyond the page's budget.
    pub(super) async fn whole(&self, row: Claimed) -> Delivery {
        let row = match row {
            Claimed::Unread(row) => {
                let fetched = self.claim(everything().fetch(&[row.position])).await;
                fetched.rows.into_iter().next().unwrap()
            }
            row => row,
        };
        delivery(row)
    }

    /// Every committed message by position.
    pub(super) async fn messages(&self) -> Vec<MessageId> {
        let rows = self.all().await.rows.into_iter();
        rows.map(|row| delivery(row).message.id()).collect()
    }

    pub(super) async fn find(&self, id: MessageId) -> Option<Delivery> {
        let rows = self.all().await.rows.into_iter().map(delivery);
        rows.into_iter().find(|row| row.message.id() == id)
    }

    pub(super) async fn delivery(&self, id: MessageId) -> Delivery {
        match self.find(id).await {
            Some(delivery) => delivery,
            None => panic!("message {id} is not in the outbox"),
        }
    }

    // Leasing --------------------------------------------------------------------------------

    pub(super) async fn keep(&self, request: KeepLeases<'_>) -> Standing {
        patiently(async || self.store.keep_leases(request).await).await
    }

    /// How all lanes and workers stand, as `worker` sees it.
    pub(super) async fn standing(&self, worker: WorkerId) -> Standing {
        self.keep(KeepLeases::new(worker, LONG)).await
    }

    /// Tries to take all lanes as they stand, and returns the leases of those that `worker` has.
    pub(super) async fn take(&self, worker: WorkerId, ttl: Duration) -> Vec<Lease> {
        let observed = self.standing(worker).await;
        let wanted: Vec<TakeOver> = observed.lanes.iter().map(TakeOver::of).collect();
        let standing = self.keep(KeepLeases::new(worker, ttl).take(&wanted)).await;
        let own = standing.lanes.iter().filter(|record| record.owner == Some(worker));
        own.map(|record| Lease::new(record.lane, record.epoch)).collect()
    }

    /// The lease under which a new worker holds the lane of this row.
    pub(super) async fn lease_for(&self, delivery: &Delivery) -> Lease {
        let worker = WorkerId::generate();
        let leases = self.take(worker, LONG).await;
        *leases.iter().find(|lease| lease.lane == delivery.lane).unwrap()
    }

    pub(super) async fn release(&self, worker: WorkerId, leases: &[Lease]) {
        patiently(async || self.store.release(Release::new(worker, leases)).await).await;
    }

    // Settling -------------------------------------------------------------------------------

    pub(super) async fn deliver(&self, rows: &[&Delivery], archive: bool) {
        let receipt = Receipt::new(Some(0), Some(7));
        let rows: Vec<_> = rows.iter().map(|row| Delivered::new(id_of(row), receipt)).collect();
        self.settle(Settle::new(&rows, &[]).archive(archive)).await;
    }

    pub(super) async fn fail(&self, failed: &[Failed]) -> Settled {
        self.settle(Settle::new(&[], failed)).await
    }

    pub(super) async fn settle(&self, request: Settle<'_>) -> Settled {
        patiently(async || self.store.settle(request).await).await
    }

    pub(super) async fn purge(&self, request: Purge) -> u64 {
        patiently(async || self.store.purge(request).await).await
    }

    pub(super) async fn backlog(&self) -> Backlog {
        patiently(async || self.store.backlog().await).await
    }

    /// Adds a message and lets it die by this settlement after three attempts.
    pub(super) async fn kill(&self, message: Message, settlement: Settlement) -> Delivery {
        let id = self.add(message).await;
        let row = self.delivery(id).await;
        let worker = WorkerId::generate();
        let leases = self.take(worker, LONG).await;
        let lease = leases.iter().find(|lease| lease.lane == row.lane).unwrap();
        let settled = self.fail(&[failed(&row, *lease, 3, settlement)]).await;
        assert_eq!(settled.refused, []);
        self.release(worker, &leases).await;
        row
    }
}

/// The operator's side of a store, asked again while other transactions are in the way.
pub(super) struct Letters(pub(super) Arc<dyn DeadLetters>);

impl Letters {
    pub(super) async fn list(&self, query: &DeadLetterQuery) -> Vec<DeadLetter> {
        patiently(async || self.0.list(query).await).await
    }

    pub(super) async fn get(&self, id: MessageId) -> Option<DeadLetter> {
        patiently(async || self.0.get(id).await).await
    }

    pub(super) async fn retry(&self, ids: &[MessageId]) -> u64 {
        patiently(async || self.0.retry(ids).await).await
    }

    pub(super) async fn skip(&self, ids: &[MessageId]) -> u64 {
        patiently(async || self.0.skip(ids).await).await
    }

    pub(super) async fn discard(&self, ids: &[MessageId]) -> u64 {
        patiently(async || self.0.discard(ids).await).await
    }
}

/// What a call answers, repeated while other transactions are in its way.
pub(super) async fn patiently<T>(call: impl AsyncFn() -> Result<T, StoreError>) -> T {
    const TRIES: usize = 100;
    for _ in 0..TRIES {
        match call().await {
            Err(error) if error.kind() == StoreErrorKind::Conflict => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            answer => return answer.unwrap(),
        }
    }
    panic!("nothing but conflicts in {TRIES} tries");
}

/// Lets others go on: this many turns, or from some on as many milliseconds.
pub(super) async fn turns(turns: u64) {
    const FEW: u64 = 6;
    match turns.checked_sub(FEW) {
        Some(millis @ 1..) => tokio::time::sleep(Duration::from_millis(millis)).await,
        _ => {
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
        }
    }
}

/// A claim that reads nothing yet, with room for everything that a case adds.
pub(super) fn everything<'a>() -> Claim<'a> {
    Claim::new(PLENTY)
}

pub(super) fn message(topic: &str, key: &str) -> Message {
    Message::builder(topic).key(key).payload("payload").build().unwrap()
}

/// Messages with different keys, enough to fall into several lanes of a store that has them.
pub(super) fn spread(count: usize) -> Vec<Message> {
    (0..count).map(|number| message("orders", &number.to_string())).collect()
}

pub(super) fn id_of(delivery: &Delivery) -> RowId {
    RowId::new(delivery.position, delivery.message.id())
}

pub(super) fn failed(row: &Delivery, lease: Lease, attempts: u32, how: Settlement) -> Failed {
    let failure = Failure::new("failed", "the broker said no");
    Failed::new(id_of(row), lease, row.state, attempts, how, failure)
}

pub(super) fn delivery(row: Claimed) -> Delivery {
    match row {
        Claimed::Delivery(delivery) => *delivery,
        other => panic!("not a delivery: {other:?}"),
    }
}
