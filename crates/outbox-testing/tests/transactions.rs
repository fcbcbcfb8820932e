//! The application's side of the memory store.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outbox_core::{AddErrorKind, Message};
use outbox_testing::MemoryStore;

fn message(key: &str) -> Message {
    Message::builder("orders").key(key).payload("p").build().expect("a valid message")
}

#[tokio::test]
async fn a_message_is_pending_once_its_transaction_commits() {
    let store = MemoryStore::new();
    let mut tx = store.begin();
    store.outbox().add(&mut tx, message("a")).await.unwrap();
    tx.assert_added([("orders", "a")]);
    store.assert_pending::<&str>([]);
    tx.commit();
    store.assert_pending([("orders", "a")]);
}

#[tokio::test]
async fn a_transaction_that_is_dropped_or_rolled_back_leaves_nothing() {
    let store = MemoryStore::new();
    let mut tx = store.begin();
    store.outbox().add(&mut tx, message("a")).await.unwrap();
    drop(tx);
    let mut tx = store.begin();
    store.outbox().add(&mut tx, message("b")).await.unwrap();
    tx.rollback();
    store.assert_pending::<&str>([]);
}

#[tokio::test]
async fn adding_without_an_open_transaction_is_refused() {
    let store = MemoryStore::new();
    let mut connection = store.connection();
    let error = store.outbox().add(&mut connection, message("a")).await.unwrap_err();
    assert_eq!(error.kind(), AddErrorKind::NoTransaction);

    let mut tx = connection.begin();
    store.outbox().add(&mut tx, message("a")).await.unwrap();
    tx.commit();
    let error = store.outbox().add(&mut connection, message("b")).await.unwrap_err();
    assert_eq!(error.kind(), AddErrorKind::NoTransaction);
    store.assert_pending([("orders", "a")]);
}

#[tokio::test]
async fn a_savepoint_takes_its_messages_and_hooks_along() {
    let store = MemoryStore::new();
    let (outbox, kept, undone) = (store.outbox(), Flag::new(), Flag::new());

    let mut tx = store.begin();
    outbox.add(&mut tx, message("before")).await.unwrap();
    let mut savepoint = tx.begin();
    outbox.add(&mut savepoint, message("undone")).await.unwrap();
    savepoint.on_commit(undone.raise());
    savepoint.rollback();
    let mut savepoint = tx.begin();
    outbox.add(&mut savepoint, message("kept")).await.unwrap();
    savepoint.on_commit(kept.raise());
    savepoint.commit();
    assert!(!kept.is_raised(), "a savepoint is no commit");
    outbox.add(&mut tx, message("after")).await.unwrap();
    tx.commit();

    assert!(kept.is_raised());
    assert!(!undone.is_raised());
    store.assert_pending([("orders", "before"), ("orders", "kept"), ("orders", "after")]);
}

#[tokio::test]
async fn a_rollback_takes_committed_savepoints_along() {
    let (store, hook) = (MemoryStore::new(), Flag::new());
    let mut tx = store.begin();
    let mut savepoint = tx.begin();
    store.outbox().add(&mut savepoint, message("a")).await.unwrap();
    savepoint.on_commit(hook.raise());
    savepoint.commit();
    tx.rollback();
    store.assert_pending::<&str>([]);
    assert!(!hook.is_raised());
}

#[tokio::test]
async fn hooks_see_the_committed_messages() {
    let store = MemoryStore::new();
    let mut tx = store.begin();
    store.outbox().add(&mut tx, message("a")).await.unwrap();
    let observer = store.clone();
    tx.on_commit(move || observer.assert_pending([("orders", "a")]));
    tx.commit();
}

#[tokio::test]
async fn two_transactions_do_not_wait_for_each_other() {
    let store = MemoryStore::new();
    let (mut first, mut second) = (store.begin(), store.begin());
    store.outbox().add(&mut first, message("first")).await.unwrap();
    store.outbox().add(&mut second, message("second")).await.unwrap();
    second.commit();
    store.assert_pending([("orders", "second")]);
    first.commit();
    store.assert_pending([("orders", "first"), ("orders", "second")]);
}

#[derive(Clone)]
struct Flag(Arc<AtomicBool>);

impl Flag {
    fn new() -> Self {
        Self(Arc::default())
    }

    fn raise(&self) -> impl FnOnce() + Send + 'static {
        let flag = Arc::clone(&self.0);
        move || flag.store(true, Ordering::SeqCst)
    }

    fn is_raised(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
