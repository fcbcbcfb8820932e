//! The fault scripts of the store wrapper.

use std::time::Duration;

use futures_util::FutureExt;
use outbox_core::delivery::{Receipt, RowId, Span};
use outbox_core::store::{Claim, Delivered, Settle, StoreErrorKind};
use outbox_core::{Message, Position, Store};
use outbox_testing::{FaultyStore, MemoryStore, StoreFault, StoreMethod};
use tokio::time::Instant;

/// A store with one message at position 1, and the settlement of it.
async fn one_message() -> (FaultyStore<MemoryStore>, [Delivered; 1]) {
    let memory = MemoryStore::new();
    let mut tx = memory.begin();
    let message = Message::builder("t").payload("p").build().expect("a valid message");
    let id = memory.outbox().add(&mut tx, message).await.expect("an added message");
    tx.commit();
    let row = RowId::new(Position(1), id);
    (FaultyStore::new(memory), [Delivered::new(row, Receipt::default())])
}

#[tokio::test]
async fn a_refused_call_has_no_effect_and_a_doubtful_one_has() {
    let (store, delivered) = one_message().await;
    store.fail_next(StoreMethod::Settle, 1, StoreErrorKind::Unavailable);
    store.fail_next(StoreMethod::Settle, 1, StoreFault::Doubt(StoreErrorKind::Conflict));
    let settle = Settle::new(&delivered, &[]);
    assert_eq!(store.settle(settle).await.unwrap_err().kind(), StoreErrorKind::Unavailable);
    assert_eq!(store.inner().pending().len(), 1);
    assert_eq!(store.settle(settle).await.unwrap_err().kind(), StoreErrorKind::Conflict);
    assert_eq!(store.inner().pending().len(), 0);
    store.settle(settle).await.unwrap();
    assert_eq!((store.calls(StoreMethod::Settle), store.calls(StoreMethod::Claim)), (3, 0));
}

#[tokio::test]
async fn a_hanging_call_never_ends_with_or_without_effect() {
    let (store, delivered) = one_message().await;
    store.fail_next(StoreMethod::Settle, 1, StoreFault::Hang);
    store.fail_next(StoreMethod::Settle, 1, StoreFault::HangAfter);
    assert!(store.settle(Settle::new(&delivered, &[])).now_or_never().is_none());
    assert_eq!(store.inner().pending().len(), 1);
    assert!(store.settle(Settle::new(&delivered, &[])).now_or_never().is_none());
    assert_eq!(store.inner().pending().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_delayed_answer_tells_what_was_true_before() {
    const TIME: Duration = Duration::from_secs(3);
    let everywhere = [Span::new(Position::START, Position(u64::MAX))];
    for (fault, seen) in [(StoreFault::DelayAnswer(TIME), 1), (StoreFault::Delay(TIME), 0)] {
        let (store, delivered) = one_message().await;
        store.fail_next(StoreMethod::Claim, 1, fault);
        let start = Instant::now();
        let (reply, settled) = futures_util::future::join(
            store.claim(Claim::new(0).sweep(&everywhere)),
            store.settle(Settle::new(&delivered, &[])),
        )
        .await;
        settled.unwrap();
        assert_eq!((reply.unwrap().swept.len(), start.elapsed()), (seen, TIME), "{fault:?}");
    }
}

#[tokio::test]
async fn an_outage_ends_when_it_is_dropped() {
    let (store, _) = one_message().await;
    let outage = store.outage();
    assert_eq!(store.open().await.unwrap_err().kind(), StoreErrorKind::Unavailable);
    assert_eq!(store.backlog().await.unwrap_err().kind(), StoreErrorKind::Unavailable);
    drop(outage);
    store.open().await.unwrap();
}
