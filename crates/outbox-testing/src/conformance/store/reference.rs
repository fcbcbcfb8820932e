//! Under any steps a store does what [`MemoryStore`] does.
//!
//! The other cases each show one promise; this one looks for what is between them: a settle after a
//! verb, a verb under a stale lease, a message that dies twice.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use outbox_core::dead_letters::{DeadLetterQuery, Place};
use outbox_core::delivery::{Receipt, RowId, RowState, Settlement};
use outbox_core::store::{Delivered, Failed, KeepLeases, Page, Release, Settle, TakeOver};
use outbox_core::{DeadLetters, Delivery, Lane, Lease, MessageId, Position, Store, WorkerId};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::DeadLettersFixture;
use super::stage::{LONG, MANY, Stage, delivery, everything, failed, message};
use crate::MemoryStore;

/// As many steps as a real server does within a second or two.
const STEPS: usize = 150;

/// What is done to both stores. Messages are meant by their number, gone ones included.
#[derive(Debug, Clone)]
enum Step {
    Add {
        key: u8,
    },
    /// Settled as delivered, perhaps under the id of another message.
    Deliver {
        which: usize,
        wrong_id: bool,
        archive: bool,
    },
    /// Settled as failed, perhaps under an old epoch, or after an old reading.
    Fail {
        which: usize,
        how: Settlement,
        old_epoch: bool,
        old_reading: bool,
    },
    Retry {
        which: usize,
    },
    Skip {
        which: usize,
    },
    Discard {
        which: usize,
    },
    /// A worker wants all lanes, which may belong to another one that has given them back or has
    /// not. All: a store is free to say which lane a key is in.
    Take {
        worker: u8,
        released: bool,
    },
}

impl Step {
    fn random(random: &mut SmallRng) -> Self {
        let which = random.random_range(0..8);
        let rarely = |random: &mut SmallRng| random.random_ratio(1, 7);
        match random.random_range(0..16) {
            0..3 => Self::Add { key: random.random_range(0..4) },
            3..5 => {
                let (wrong_id, archive) = (rarely(random), random.random());
                Self::Deliver { which, wrong_id, archive }
            }
            5..10 => {
                let how = match random.random_range(0..3) {
                    0 => Settlement::Retry(Duration::ZERO),
                    1 => Settlement::Held,
                    _ => Settlement::Dead,
                };
                let (old_epoch, old_reading) = (rarely(random), rarely(random));
                Self::Fail { which, how, old_epoch, old_reading }
            }
            10..12 => Self::Retry { which },
            12 => Self::Skip { which },
            13 => Self::Discard { which },
            _ => Self::Take { worker: random.random_range(1..4), released: random.random() },
        }
    }
}

/// What can be seen of a store. Positions and times are its own.
#[derive(Debug, PartialEq)]
struct Seen {
    /// Message, attempts, held, retried: in the order of the outbox.
    rows: Vec<(MessageId, u32, bool, bool)>,
    /// Message, place, attempts, why: in the order of a listing.
    dead: Vec<(MessageId, Place, u32, String)>,
    lanes: Vec<(u64, Option<WorkerId>)>,
}

/// A store, and where its messages were last seen.
struct Side {
    store: Arc<dyn Store>,
    operator: Arc<dyn DeadLetters>,
    lanes: Vec<Lane>,
    /// The newest first.
    known: Vec<Delivery>,
}

impl Side {
    async fn standing(&self) -> Vec<(u64, Option<WorkerId>)> {
        let stranger = KeepLeases::new(WorkerId::from_bytes([9; 16]), LONG);
        let standing = self.store.keep_leases(stranger).await.unwrap();
        standing.lanes.iter().map(|lane| (lane.epoch, lane.owner)).collect()
    }

    fn row(&self, id: MessageId) -> &Delivery {
        self.known.iter().find(|row| row.message.id() == id).unwrap()
    }

    async fn look(&mut self) -> Seen {
        let page = everything().page(Page::new(&self.lanes, Position::START, MANY));
        let rows = self.store.claim(page).await.unwrap().rows;
        let rows: Vec<Delivery> = rows.into_iter().map(delivery).collect();
        let state = |row: &Delivery| {
            (row.message.id(), row.state.attempts, row.state.held, row.state.retried)
        };
        let seen = rows.iter().map(state).collect();
        self.known.splice(0..0, rows);
        let died = self.operator.list(&DeadLetterQuery::new().limit(1_000)).await.unwrap();
        Seen {
            rows: seen,
            dead: died.into_iter().map(|d| (d.id, d.cursor.place, d.attempts, d.failure)).collect(),
            lanes: self.standing().await,
        }
    }

    /// Does the step; the answer tells how many messages it changed, or refused.
    async fn step(&self, step: &Step, ids: &[MessageId]) -> u64 {
        let nth = |which: &usize| ids[ids.len() - 1 - which % ids.len()];
        match step {
            Step::Add { .. } => 0,
            Step::Deliver { which, wrong_id, archive } => {
                let message = if *wrong_id { MessageId::generate() } else { nth(which) };
                let id = RowId::new(self.row(nth(which)).position, message);
                let rows = [Delivered::new(id, Receipt::default())];
                self.store.settle(Settle::new(&rows, &[]).archive(*archive)).await.unwrap();
                0
            }
            Step::Fail { which, how, old_epoch, old_reading } => {
                let row = self.row(nth(which));
                let (epoch, _) = self.standing().await[usize::from(row.lane.0)];
                let lease = Lease::new(row.lane, epoch.saturating_sub(u64::from(*old_epoch)));
                let attempts = row.state.attempts + 1;
                let mut rows: [Failed; 1] = [failed(row, lease, attempts, how.clone())];
                if *old_reading {
                    rows[0].read = RowState::new(attempts, row.state.revision);
                }
                self.store.settle(Settle::new(&[], &rows)).await.unwrap().refused.len() as u64
            }
            Step::Retry { which } => self.operator.retry(&[nth(which)]).await.unwrap(),
            Step::Skip { which } => self.operator.skip(&[nth(which)]).await.unwrap(),
            Step::Discard { which } => self.operator.discard(&[nth(which)]).await.unwrap(),
            Step::Take { worker, released } => {
                let lanes = self.standing().await;
                if let Some(owner) = lanes[0].1.filter(|_| *released) {
                    let leases = self.lanes.iter().zip(&lanes);
                    let leases: Vec<_> =
                        leases.map(|(lane, (epoch, _))| Lease::new(*lane, *epoch)).collect();
                    self.store.release(Release::new(owner, &leases)).await.unwrap();
                }
                let request = KeepLeases::new(WorkerId::from_bytes([*worker; 16]), LONG);
                let standing = self.store.keep_leases(request).await.unwrap();
                let take: Vec<_> = standing.lanes.iter().map(TakeOver::of).collect();
                let standing = self.store.keep_leases(request.take(&take)).await.unwrap();
                standing.lanes.iter().map(|lane| lane.epoch).sum()
            }
        }
    }
}

/// After every one of many random steps, which follow from a constant, the store shows what the
/// store in memory shows.
pub async fn any_steps_leave_what_they_leave_in_memory<F: DeadLettersFixture>() {
    let stage = Stage::<F>::set().await;
    let lanes = NonZeroU16::new(stage.lanes.len() as u16).unwrap();
    let memory = MemoryStore::with_lanes(lanes);
    let side = |store: Arc<dyn Store>, operator: Arc<dyn DeadLetters>| Side {
        store,
        operator,
        lanes: stage.lanes.clone(),
        known: Vec::new(),
    };
    let mut tested = side(Arc::clone(&stage.store), stage.fixture.dead_letters());
    let mut reference = side(Arc::new(memory.clone()), Arc::new(memory.clone()));
    let mut random = SmallRng::seed_from_u64(1);
    let mut ids: Vec<MessageId> = Vec::new();
    let mut done = Vec::new();
    for number in 0..STEPS {
        let step = if number == 0 { Step::Add { key: 0 } } else { Step::random(&mut random) };
        if let Step::Add { key } = step {
            let message = message("orders", &key.to_string());
            ids.push(message.id());
            let mut transaction = memory.begin();
            memory.outbox().add(&mut transaction, message.clone()).await.unwrap();
            transaction.commit();
            stage.add(message).await;
        }
        done.push(step.clone());
        let (answer, expected) =
            (tested.step(&step, &ids).await, reference.step(&step, &ids).await);
        assert_eq!(answer, expected, "the answer to the last of {done:#?}");
        let (seen, expected) = (tested.look().await, reference.look().await);
        assert_eq!(seen, expected, "left: the store, right: in memory; after {done:#?}");
    }
}
