//! Every public future is dropped at every point at which it waits; nothing is lost or broken.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::time::Duration;

use outbox_core::broker::{Outcome, Outcomes, Outgoing};
use outbox_core::delivery::{Delivery, Position, Receipt, RowId};
use outbox_core::store::{
    Claim, Claimed, Delivered, KeepLeases, Page, Purge, Release, Settle, TakeOver,
};
use outbox_core::{Broker, Dispatcher, Lane, Lease, Message, MessageId, Store, WorkerId};
use outbox_testing::{FaultyStore, MemoryBroker, MemoryStore, StoreFault, StoreMethod, drop_after};

fn message(number: usize) -> Message {
    let key = (number % 3).to_string();
    Message::builder("orders")
        .key(key)
        .payload(number.to_string())
        .build()
        .expect("nothing of it can fail")
}

async fn add(store: &MemoryStore, count: usize) -> Vec<MessageId> {
    let mut ids = Vec::new();
    for number in 0..count {
        let mut tx = store.begin();
        ids.push(
            store.outbox().add(&mut tx, message(number)).await.expect("nothing of it can fail"),
        );
        tx.commit();
    }
    ids
}

const WAIT: Duration = Duration::from_millis(3);
const BEFORE: StoreFault = StoreFault::Delay(WAIT);
const AFTER: StoreFault = StoreFault::DelayAnswer(WAIT);

/// A store whose calls wait, before they happen or after.
fn slow(store: &MemoryStore, faults: [StoreFault; 2]) -> FaultyStore<MemoryStore> {
    let slow = FaultyStore::new(store.clone());
    let methods = [
        StoreMethod::Open,
        StoreMethod::KeepLeases,
        StoreMethod::Claim,
        StoreMethod::Settle,
        StoreMethod::Release,
        StoreMethod::Purge,
        StoreMethod::Backlog,
    ];
    for method in methods {
        for _ in 0..20 {
            faults.iter().for_each(|fault| slow.fail_next(method, 1, *fault));
        }
    }
    slow
}

#[tokio::test(start_paused = true)]
async fn a_dispatcher_dropped_anywhere_loses_nothing_and_keeps_the_order() {
    drop_a_dispatcher_anywhere().await;
}

/// What a dispatcher must not do before it knows better, these do: dropped there, they lose.
#[cfg(outbox_seeded_bug)]
#[test]
fn dispatchers_that_take_things_for_granted_lose_messages_when_they_are_dropped() {
    for bug in ["settled-before-the-answer", "no-gate"] {
        outbox_core::seeded::choose(Some(bug));
        let found = std::panic::catch_unwind(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_time().start_paused(true).build().unwrap();
            runtime.block_on(drop_a_dispatcher_anywhere());
        });
        outbox_core::seeded::choose(None);
        assert!(found.is_err(), "{bug} was not found");
    }
}

async fn drop_a_dispatcher_anywhere() {
    let mut dropped = 0;
    for polls in 1.. {
        let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
        broker.set_latency(Duration::from_millis(5));
        let ids = add(&store, 9).await;
        let first =
            Dispatcher::builder(slow(&store, [BEFORE, AFTER]), broker.clone()).build().unwrap();
        let ended = drop_after(polls, first.run_until_empty()).await;
        // What was handed to the broker may still arrive, and the leases run out.
        tokio::time::sleep(Duration::from_secs(60)).await;
        let second = Dispatcher::builder(store.clone(), broker.clone()).build().unwrap();
        second.run_until_empty().await.unwrap();
        broker.assert_order_per_key(&ids);
        store.assert_pending::<&str>([]);
        let repeated = broker.published().len() - ids.len();
        assert!(repeated <= 9, "dropped after {polls} polls: {repeated} repeated");
        if let Some(summary) = ended {
            assert_eq!((summary.unwrap().delivered, repeated), (9, 0));
            break;
        }
        dropped += 1;
    }
    assert!(dropped >= 10, "it waits at {dropped} points only: is anything slow?");
}

#[tokio::test(start_paused = true)]
async fn an_add_dropped_anywhere_leaves_a_transaction_that_can_go_on() {
    for polls in 1..10 {
        let store = MemoryStore::new();
        let outbox = store.outbox();
        let mut tx = store.begin();
        let first = drop_after(polls, outbox.add(&mut tx, message(1))).await;
        let second = outbox.add(&mut tx, message(2)).await.unwrap();
        tx.commit();
        let pending: Vec<MessageId> = store.pending().iter().map(Message::id).collect();
        assert!(pending.contains(&second));
        match first {
            Some(first) => assert_eq!(pending, [first.unwrap(), second]),
            None => assert!(pending.len() <= 2, "{pending:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn calls_to_a_store_that_are_dropped_anywhere_can_be_repeated() {
    let me = WorkerId::from_bytes([1; 16]);
    let ttl = Duration::from_secs(6);
    for (polls, fault) in [(1, BEFORE), (1, AFTER), (2, BEFORE), (2, AFTER)] {
        let memory = MemoryStore::new();
        let ids = add(&memory, 4).await;
        let store = slow(&memory, [fault, fault]);
        drop_after(polls, store.open()).await;
        store.open().await.unwrap();
        drop_after(polls, store.keep_leases(KeepLeases::new(me, ttl))).await;
        let standing = store.keep_leases(KeepLeases::new(me, ttl)).await.unwrap();
        let take: Vec<TakeOver> = standing.lanes.iter().map(TakeOver::of).collect();
        drop_after(polls, store.keep_leases(KeepLeases::new(me, ttl).take(&take))).await;
        let standing = store.keep_leases(KeepLeases::new(me, ttl).take(&take)).await.unwrap();
        assert!(standing.lanes.iter().all(|lane| lane.owner == Some(me)), "taken once or twice");
        let leases: Vec<Lease> =
            standing.lanes.iter().map(|lane| Lease::new(lane.lane, lane.epoch)).collect();
        assert!(leases.iter().all(|lease| lease.epoch == 1), "never by two epochs");

        let lanes: Vec<Lane> = leases.iter().map(|lease| lease.lane).collect();
        let claim = || Claim::new(1 << 20).page(Page::new(&lanes, Position::START, 10));
        drop_after(polls, store.claim(claim())).await;
        let rows = store.claim(claim()).await.unwrap().rows;
        assert_eq!(rows.len(), ids.len(), "a claim changes nothing");

        drop_after(polls, store.backlog()).await;
        assert_eq!(store.backlog().await.unwrap().pending, 4);

        let delivered: Vec<Delivered> = rows.iter().map(settled).collect();
        drop_after(polls, store.settle(Settle::new(&delivered[..2], &[]))).await;
        store.settle(Settle::new(&delivered[..2], &[])).await.unwrap();
        let pending: Vec<MessageId> = memory.pending().iter().map(Message::id).collect();
        assert_eq!(pending, ids[2..], "the two are gone, the others are not");
        drop_after(polls, store.purge(Purge::new(Duration::ZERO, 10))).await;
        store.purge(Purge::new(Duration::ZERO, 10)).await.unwrap();
        assert_eq!(memory.pending().len(), 2, "what waits is never purged");

        drop_after(polls, store.release(Release::new(me, &leases).leaving())).await;
        store.release(Release::new(me, &leases).leaving()).await.unwrap();
        let other = WorkerId::from_bytes([2; 16]);
        let standing = store.keep_leases(KeepLeases::new(other, ttl)).await.unwrap();
        assert!(standing.lanes.iter().all(|lane| lane.owner.is_none()));
    }
}

fn settled(row: &Claimed) -> Delivered {
    let Claimed::Delivery(row) = row else { panic!("the row can be read: {row:?}") };
    Delivered::new(RowId::new(row.position, row.message.id()), Receipt::default())
}

#[tokio::test(start_paused = true)]
async fn answers_that_a_publish_gave_before_it_was_dropped_are_kept_and_true() {
    let mut partly = 0;
    for polls in 1..5 {
        let broker = MemoryBroker::new();
        broker.set_latency(Duration::from_millis(5));
        broker.fail_when(
            |delivery| delivery.message.payload() == Some(b"2"),
            outbox_testing::Fault::Hang,
        );
        let not_after = tokio::time::Instant::now() + Duration::from_secs(60);
        let batch: Vec<Outgoing> = (0..4)
            .map(|n| Delivery::new(Position(n), Lane(0), message(n as usize)))
            .map(|delivery| Outgoing::new(delivery, not_after))
            .collect();
        let outcomes = Outcomes::new(batch.len(), Arc::default());
        let publish = drop_after(polls, broker.publish(batch.clone(), &outcomes));
        // It hangs on one message: whoever waits longer drops it by a deadline.
        _ = tokio::time::timeout(Duration::from_secs(1), publish).await;
        let answered = outcomes.take();
        let there: Vec<MessageId> = broker.published().iter().map(|p| p.message_id).collect();
        for (index, outcome) in &answered {
            assert!(matches!(outcome, Outcome::Delivered(_)), "{outcome:?}");
            assert!(there.contains(&batch[*index].delivery.message.id()), "answered, not there");
        }
        partly += usize::from(!answered.is_empty());
    }
    assert!(partly > 0, "no publish was dropped with answers");
}
