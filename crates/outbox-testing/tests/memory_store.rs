//! What is true of the memory store beyond what every store promises.

use std::num::NonZeroU16;
use std::time::Duration;

use outbox_core::delivery::{Receipt, RowId, Span};
use outbox_core::store::{Claim, Delivered, KeepLeases, Page, Settle, TakeOver};
use outbox_core::{Lane, Message, Position, Store, WorkerId};
use outbox_testing::MemoryStore;

fn message(key: &str) -> Message {
    Message::builder("orders").key(key).payload("p").build().expect("a valid message")
}

async fn add(store: &MemoryStore, key: &str) -> RowId {
    let mut tx = store.begin();
    let id = store.outbox().add(&mut tx, message(key)).await.expect("an added message");
    tx.commit();
    let positions = positions(store).await;
    RowId::new(*positions.last().expect("a position"), id)
}

async fn positions(store: &MemoryStore) -> Vec<Position> {
    let everywhere = [Span::new(Position::START, Position(u64::MAX))];
    let reply = store.claim(Claim::new(0).sweep(&everywhere)).await.expect("an answer");
    reply.swept.iter().map(|row| row.position).collect()
}

#[tokio::test]
async fn positions_are_handed_out_when_messages_are_added_and_rollbacks_leave_holes() {
    let store = MemoryStore::new();
    let (mut first, mut second, mut third) = (store.begin(), store.begin(), store.begin());
    store.outbox().add(&mut first, message("1")).await.unwrap();
    store.outbox().add(&mut second, message("2")).await.unwrap();
    store.outbox().add(&mut third, message("3")).await.unwrap();
    third.commit();
    assert_eq!(positions(&store).await, [Position(3)]);
    first.commit();
    second.rollback();
    assert_eq!(positions(&store).await, [Position(1), Position(3)]);
}

#[tokio::test]
async fn in_commit_order_positions_become_visible_ascending() {
    let store = MemoryStore::new().in_commit_order();
    assert!(store.open().await.unwrap().in_commit_order);
    let (mut first, mut second) = (store.begin(), store.begin());
    store.outbox().add(&mut first, message("1")).await.unwrap();
    store.outbox().add(&mut second, message("2")).await.unwrap();
    second.commit();
    first.commit();
    store.assert_pending([("orders", "2"), ("orders", "1")]);
}

#[tokio::test]
async fn after_a_fail_over_positions_are_reused_and_another_server_answers() {
    let store = MemoryStore::new();
    let former = add(&store, "former").await;
    let delivered = [Delivered::new(former, Receipt::default())];
    store.settle(Settle::new(&delivered, &[])).await.unwrap();
    let before = store.claim(Claim::new(0)).await.unwrap().server;
    store.fail_over(Position(1));
    assert_ne!(store.claim(Claim::new(0)).await.unwrap().server, before);
    let reused = add(&store, "new").await;
    assert_eq!(reused.position, former.position);
    store.settle(Settle::new(&delivered, &[])).await.unwrap();
    store.assert_pending([("orders", "new")]);
}

#[tokio::test]
async fn a_fail_over_never_hands_out_a_position_that_a_row_has() {
    let store = MemoryStore::new();
    let first = add(&store, "a").await;
    store.fail_over(Position(1));
    assert!(add(&store, "b").await.position > first.position);
}

#[tokio::test(start_paused = true)]
async fn leases_expire_when_the_paused_clock_is_advanced() {
    const LEASE: Duration = Duration::from_secs(45);
    let store = MemoryStore::with_lanes(NonZeroU16::MIN);
    let (owner, other) = (WorkerId::generate(), WorkerId::generate());
    let take = async |worker| {
        let observed = store.keep_leases(KeepLeases::new(worker, LEASE)).await.unwrap();
        let wanted = [TakeOver::of(&observed.lanes[0])];
        let request = KeepLeases::new(worker, LEASE).take(&wanted);
        store.keep_leases(request).await.unwrap().lanes[0].owner
    };
    assert_eq!(take(owner).await, Some(owner));
    tokio::time::advance(LEASE).await;
    assert_eq!(take(other).await, Some(owner), "a lease lasts for its whole time");
    tokio::time::advance(Duration::from_millis(1)).await;
    assert_eq!(take(other).await, Some(other));
}

#[tokio::test]
async fn with_one_lane_every_key_is_in_it() {
    let store = MemoryStore::with_lanes(NonZeroU16::MIN);
    for key in ["a", "b", "c"] {
        assert_eq!(store.lane_of(&message(key)), Lane(0));
    }
}

#[tokio::test]
async fn a_large_store_is_read_page_by_page_and_counted_up_to_a_limit() {
    let store = MemoryStore::new();
    let mut tx = store.begin();
    let many = (0..20_000).map(|n| message(&n.to_string()));
    store.outbox().add_all(&mut tx, many).await.unwrap();
    tx.commit();
    let lanes: Vec<Lane> = (0..16).map(Lane).collect();
    let page = Page::new(&lanes, Position(5_000), 100);
    let reply = store.claim(Claim::new(usize::MAX).page(page)).await.unwrap();
    assert_eq!((reply.rows.len(), reply.covered, reply.end), (100, Position(5_100), false));
    let backlog = store.backlog().await.unwrap();
    assert_eq!((backlog.pending, backlog.pending_is_exact), (10_000, false));
}
