//! Every future is dropped at every point at which it waits: the pool, the tables and the
//! transaction stay intact.

use std::future::Future;
use std::time::Duration;

use outbox_core::dead_letters::DeadLetterQuery;
use outbox_core::delivery::{Failure, Lease, Receipt, Settlement, WorkerId};
use outbox_core::store::{
    Delivered, Failed, KeepLeases, Purge, Release, Settle, StoreError, TakeOver,
};
use outbox_core::{DeadLetters, MessageId};
use outbox_sqlite::SqliteInbox;
use outbox_sqlite::sqlx::SqlitePool;
use outbox_sqlite::sqlx::sqlite::SqlitePoolOptions;
use outbox_testing::drop_after;

use super::*;

/// Long for what waits for nothing. What hangs has lost a connection or a permit.
const SOON: Duration = Duration::from_secs(60);

async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(SOON, future).await.expect("a connection or a permit was lost")
}

/// A pool of one connection: whoever leaks it stops everybody.
async fn pool(lab: &Lab) -> Result<SqlitePool> {
    let options = lab.options.clone().busy_timeout(Duration::from_secs(30));
    Ok(SqlitePoolOptions::new().max_connections(1).connect_with(options).await?)
}

/// Fails if the pool lacks a connection, or one has a transaction open.
async fn is_intact(pool: &SqlitePool) -> Result<()> {
    let mut connection = soon(pool.acquire()).await?;
    run(&mut connection, "BEGIN IMMEDIATE").await?;
    run(&mut connection, "ROLLBACK").await?;
    assert_eq!(pool.size(), 1);
    Ok(())
}

/// Four held messages, each of a key of its own.
async fn hold_four(lab: &Lab) -> Result<Vec<MessageId>> {
    lab.add(["a", "b", "c", "d"].map(message).to_vec()).await?;
    let request = KeepLeases::new(WorkerId::generate(), Duration::from_secs(60));
    let standing = lab.store.keep_leases(request).await?;
    let take: Vec<TakeOver> = standing.lanes.iter().map(TakeOver::of).collect();
    let standing = lab.store.keep_leases(request.take(&take)).await?;
    let lease = Lease::new(standing.lanes[0].lane, standing.lanes[0].epoch);
    let rows = deliveries(lab.page().await?);
    let held = |row: &Delivery| {
        let failure = Failure::new("rejected", "why");
        Failed::new(id_of(row), lease, row.state, 1, Settlement::Held, failure)
    };
    let failed: Vec<Failed> = rows.iter().map(held).collect();
    assert_eq!(lab.store.settle(Settle::new(&[], &failed)).await?.refused, []);
    Ok(rows.iter().map(|row| row.message.id()).collect())
}

#[tokio::test]
async fn an_add_dropped_anywhere_leaves_a_transaction_that_rolls_back() -> Result<()> {
    let lab = Lab::new().await?;
    let pool = pool(&lab).await?;
    let mut dropped = 0;
    // One message is one statement; three hundred are six and a savepoint.
    for count in [1, 300] {
        for polls in 1.. {
            let mut tx = soon(pool.begin_with("BEGIN IMMEDIATE")).await?;
            let messages = (0..count).map(|n| message(&n.to_string()));
            let added = drop_after(polls, lab.outbox.add_all(&mut tx, messages)).await;
            drop(tx);
            is_intact(&pool).await?;
            assert_eq!(lab.pending().await?, []);
            if let Some(added) = added {
                assert_eq!(added?.len(), count);
                break;
            }
            dropped += 1;
        }
    }
    println!("dropped at {dropped} points");
    assert!(dropped > 0, "it never waited");
    Ok(())
}

#[tokio::test]
async fn an_add_dropped_anywhere_leaves_a_transaction_that_can_go_on() -> Result<()> {
    let lab = Lab::new().await?;
    let pool = pool(&lab).await?;
    for polls in 1.. {
        let mut tx = soon(pool.begin_with("BEGIN IMMEDIATE")).await?;
        let first = drop_after(polls, lab.outbox.add(&mut tx, message("first"))).await;
        let second = soon(lab.outbox.add(&mut tx, message("second"))).await?;
        tx.commit().await?;
        let pending: Vec<MessageId> = lab.pending().await?.iter().map(Message::id).collect();
        assert_eq!(pending.last(), Some(&second));
        assert!(pending.len() <= 2, "{pending:?}");
        run(&mut *pool.acquire().await?, "DELETE FROM outbox").await?;
        if let Some(first) = first {
            assert_eq!(pending, [first?, second]);
            return Ok(());
        }
    }
    Ok(())
}

#[tokio::test]
async fn an_accept_dropped_anywhere_leaves_the_message_new_or_accepted() -> Result<()> {
    let lab = Lab::new().await?;
    let pool = pool(&lab).await?;
    let inbox = SqliteInbox::new(&lab.schema, "billing")?;
    for commits in [false, true] {
        for polls in 1.. {
            let id = MessageId::generate();
            let mut tx = soon(pool.begin_with("BEGIN IMMEDIATE")).await?;
            let accepted = drop_after(polls, inbox.accept(&mut tx, id)).await;
            if commits {
                tx.commit().await?
            } else {
                drop(tx)
            }
            is_intact(&pool).await?;
            let mut connection = lab.connect().await?;
            let recorded = number(&mut connection, "SELECT COUNT(*) FROM outbox_inbox").await?;
            let mut tx = soon(pool.begin_with("BEGIN IMMEDIATE")).await?;
            assert_eq!(inbox.accept(&mut tx, id).await?, recorded == 0);
            tx.rollback().await?;
            assert!(recorded == 0 || commits, "it was rolled back");
            run(&mut connection, "DELETE FROM outbox_inbox").await?;
            if let Some(accepted) = accepted {
                assert!(accepted?);
                assert_eq!(recorded, i64::from(commits));
                break;
            }
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_purge_dropped_anywhere_takes_a_batch_or_nothing() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    for polls in 1.. {
        lab.add((0..5).map(|n| message(&n.to_string())).collect()).await?;
        let rows = deliveries(soon(lab.page()).await?);
        let rows: Vec<_> =
            rows.iter().map(|row| Delivered::new(id_of(row), Receipt::default())).collect();
        soon(lab.store.settle(Settle::new(&rows, &[]).archive(true))).await?;
        lab.add(vec![message("waits")]).await?;
        run(&mut connection, "UPDATE outbox_delivered SET delivered_at = delivered_at - 1000000")
            .await?;
        let purge = Purge::new(Duration::ZERO, 100);
        let purged = drop_after(polls, lab.store.purge(purge)).await;
        let left = number(&mut connection, "SELECT COUNT(*) FROM outbox_delivered").await?;
        assert!([0, 5].contains(&left), "{left} of 5 are left");
        soon(lab.store.purge(purge)).await?;
        assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox_delivered").await?, 0);
        assert_eq!(lab.pending().await?.len(), 1, "what waits is never purged");
        run(&mut connection, "DELETE FROM outbox").await?;
        if let Some(purged) = purged {
            assert_eq!(purged?, 5);
            return Ok(());
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_look_at_the_backlog_or_the_dead_dropped_anywhere_loses_no_connection() -> Result<()> {
    let lab = Lab::new().await?;
    let ids = soon(hold_four(&lab)).await?;
    let mut done = false;
    for polls in 1.. {
        if done {
            break;
        }
        let query = DeadLetterQuery::new();
        let ends = [
            drop_after(polls, lab.store.backlog()).await.is_some(),
            drop_after(polls, DeadLetters::list(&lab.store, &query)).await.is_some(),
            drop_after(polls, DeadLetters::get(&lab.store, ids[0])).await.is_some(),
        ];
        done = ends.iter().all(|ended| *ended);
        assert_eq!(soon(lab.store.backlog()).await?.held, 4);
        assert_eq!(soon(DeadLetters::list(&lab.store, &query)).await?.len(), 4);
    }
    Ok(())
}

/// A verb of the operator, and where each message may be after it: in the outbox, among the dead.
#[derive(Debug, Clone, Copy)]
enum Verb {
    Retry,
    Skip,
    Discard,
}

impl Verb {
    async fn apply(self, store: &SqliteStore, ids: &[MessageId]) -> Result<u64, StoreError> {
        match self {
            Self::Retry => DeadLetters::retry(store, ids).await,
            Self::Skip => DeadLetters::skip(store, ids).await,
            Self::Discard => DeadLetters::discard(store, ids).await,
        }
    }
}

#[tokio::test]
async fn an_operators_verb_dropped_anywhere_has_changed_each_message_wholly_or_not_at_all()
-> Result<()> {
    for verb in [Verb::Retry, Verb::Skip, Verb::Discard] {
        let lab = Lab::new().await?;
        let mut connection = lab.connect().await?;
        slow_copies_down(&mut connection).await?;
        for polls in 1.. {
            let ids = soon(hold_four(&lab)).await?;
            let changed = drop_after(polls, verb.apply(&lab.store, &ids)).await;
            let held = "SELECT COUNT(*) FROM outbox WHERE held_at IS NOT NULL";
            let released = "SELECT COUNT(*) FROM outbox WHERE held_at IS NULL AND revision > 0";
            writers_may_write(&mut connection).await?;
            let held = number(&mut connection, held).await?;
            let released = number(&mut connection, released).await?;
            let dead = number(&mut connection, "SELECT COUNT(*) FROM outbox_dead").await?;
            match verb {
                Verb::Retry => assert_eq!((held + released, dead), (4, 0)),
                Verb::Skip => assert_eq!((held + dead, released), (4, 0)),
                Verb::Discard => assert_eq!((released, dead), (0, 0)),
            }
            soon(verb.apply(&lab.store, &ids)).await?;
            let left = DeadLetterQuery::new().place(outbox_core::dead_letters::Place::Held);
            assert_eq!(DeadLetters::list(&lab.store, &left).await?.len(), 0, "{verb:?}");
            run(&mut connection, "DELETE FROM outbox; DELETE FROM outbox_dead").await?;
            if let Some(changed) = changed {
                assert_eq!(changed?, 4);
                break;
            }
        }
    }
    Ok(())
}

/// The places of a message: waiting, archived or dead.
const EVERYWHERE: &str = "SELECT (SELECT COUNT(*) FROM outbox) \
     + (SELECT COUNT(*) FROM outbox_delivered) + (SELECT COUNT(*) FROM outbox_dead)";

/// Makes copies to the archive and to the dead letters take a while, so that some drop comes between
/// a copy and the deletion of its row. Otherwise a packet is over before anybody can drop it.
async fn slow_copies_down(connection: &mut SqliteConnection) -> Result<()> {
    let slow = "CREATE VIEW slow AS WITH RECURSIVE n (i) AS (\
           SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) SELECT i FROM n;\
         CREATE TRIGGER slow_archive AFTER INSERT ON outbox_delivered \
           BEGIN SELECT COUNT(*) FROM slow; END;\
         CREATE TRIGGER slow_death AFTER INSERT ON outbox_dead \
           BEGIN SELECT COUNT(*) FROM slow; END";
    Ok(run(connection, slow).await?)
}

/// Waits until what was dropped is at work no more; fails if it keeps writers out for good.
async fn writers_may_write(connection: &mut SqliteConnection) -> Result<()> {
    Ok(soon(run(connection, "BEGIN IMMEDIATE; ROLLBACK")).await?)
}

#[tokio::test]
async fn a_relays_calls_dropped_anywhere_can_be_repeated_and_keep_nobody_out() -> Result<()> {
    let lab = Lab::new().await?;
    let (store, mut connection) = (&lab.store, lab.connect().await?);
    slow_copies_down(&mut connection).await?;
    let me = KeepLeases::new(WorkerId::generate(), Duration::from_secs(60));
    for polls in 1.. {
        lab.add(["a", "b", "c", "d"].map(message).to_vec()).await?;
        let mut ended = vec![drop_after(polls, store.keep_leases(me)).await.is_some()];
        writers_may_write(&mut connection).await?;
        let standing = soon(store.keep_leases(me)).await?;
        let take: Vec<TakeOver> = standing.lanes.iter().map(TakeOver::of).collect();
        let free = standing.lanes[0].epoch;
        ended.push(drop_after(polls, store.keep_leases(me.take(&take))).await.is_some());
        writers_may_write(&mut connection).await?;
        let lane = soon(store.keep_leases(me.take(&take))).await?.lanes[0].clone();
        assert_eq!((lane.owner, lane.epoch), (Some(me.worker), free + 1), "taken once");
        let lease = Lease::new(lane.lane, lane.epoch);

        let claim = Claim::new(MEGABYTE).page(Page::new(&[Lane(0)], Position::START, 100));
        ended.push(drop_after(polls, store.claim(claim)).await.is_some());
        writers_may_write(&mut connection).await?;
        let rows = deliveries(soon(store.claim(claim)).await?);
        assert_eq!(rows.len(), 4, "a claim changes nothing");

        let delivered: Vec<_> =
            rows[..2].iter().map(|row| Delivered::new(id_of(row), Receipt::default())).collect();
        let failed = |row: &Delivery, settlement| {
            Failed::new(id_of(row), lease, row.state, 1, settlement, Failure::new("no", "why"))
        };
        let failed = [failed(&rows[2], Settlement::Held), failed(&rows[3], Settlement::Dead)];
        let settle = Settle::new(&delivered, &failed).archive(true);
        ended.push(drop_after(polls, store.settle(settle)).await.is_some());
        writers_may_write(&mut connection).await?;
        assert_eq!(number(&mut connection, EVERYWHERE).await?, 4, "each in one place");
        soon(store.settle(settle)).await?;
        assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox_delivered").await?, 2);
        assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox_dead").await?, 1);
        assert_eq!(soon(store.backlog()).await?.held, 1);

        let release = Release::new(me.worker, std::slice::from_ref(&lease));
        ended.push(drop_after(polls, store.release(release)).await.is_some());
        writers_may_write(&mut connection).await?;
        soon(store.release(release)).await?;
        assert_eq!(soon(store.keep_leases(me)).await?.lanes[0].owner, None);
        let empty = "DELETE FROM outbox; DELETE FROM outbox_delivered; DELETE FROM outbox_dead";
        run(&mut connection, empty).await?;
        if !ended.contains(&false) {
            assert!(polls > 1, "nothing ever waited");
            break;
        }
    }
    Ok(())
}
