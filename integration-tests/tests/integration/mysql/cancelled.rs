//! Every future is dropped at every point at which it waits: the pool, the tables and the
//! transaction stay intact.
//!
//! Except where sqlx prepares a statement, the first time on a connection: dropped there, it loses
//! step with the server. What is left to promise then is that nothing is added by mistake.

use std::future::Future;

use outbox_core::dead_letters::{DeadLetterQuery, Place};
use outbox_core::delivery::{Failure, Receipt, Settlement};
use outbox_core::store::{Delivered, Failed, Purge, Release, Settle, StoreError};
use outbox_core::{AddErrorKind, DeadLetters, MessageId};
use outbox_mysql::MySqlInbox;
use outbox_mysql::sqlx::MySqlPool;
use outbox_mysql::sqlx::mysql::MySqlPoolOptions;
use outbox_testing::drop_after;

use super::*;

/// Long for what waits for nothing. What hangs has lost a connection or a permit.
const SOON: Duration = Duration::from_secs(60);

async fn soon<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(SOON, future).await.expect("a connection or a permit was lost")
}

/// A pool of one connection: whoever leaks it stops everybody.
async fn pool(lab: &Lab) -> Result<MySqlPool> {
    Ok(MySqlPoolOptions::new().max_connections(1).connect(&lab.url).await?)
}

/// Fails if the pool lacks a connection, or one has a transaction open: the server is asked.
async fn is_intact(lab: &Lab, pool: &MySqlPool) -> Result<()> {
    let mut connection = soon(pool.acquire()).await?;
    let added = soon(lab.outbox.add(&mut connection, message("ghost"))).await;
    let kind = added.expect_err("a transaction is open").kind();
    assert_eq!(kind, AddErrorKind::NoTransaction);
    assert_eq!(pool.size(), 1);
    Ok(())
}

/// Adds so many messages and rolls back: all statements are prepared after this.
async fn prepare(lab: &Lab, pool: &MySqlPool, count: usize) -> Result<()> {
    let mut tx = soon(pool.begin()).await?;
    lab.outbox.add_all(&mut tx, (0..count).map(|n| message(&n.to_string()))).await?;
    Ok(soon(tx.rollback()).await?)
}

/// Four held messages, each of a key of its own.
async fn hold_four(lab: &Lab, leases: &[Lease]) -> Result<Vec<MessageId>> {
    lab.add(["a", "b", "c", "d"].map(message).to_vec()).await?;
    let rows = deliveries(lab.page().await?);
    let held = |row: &Delivery| {
        let failure = Failure::new("rejected", "why");
        let lease = leases[usize::from(row.lane.0)];
        Failed::new(id_of(row), lease, row.state, 1, Settlement::Held, failure)
    };
    let failed: Vec<Failed> = rows.iter().map(held).collect();
    assert_eq!(lab.store.settle(Settle::new(&[], &failed)).await?.refused, []);
    Ok(rows.iter().map(|row| row.message.id()).collect())
}

/// A verb of the operator.
#[derive(Debug, Clone, Copy)]
enum Verb {
    Retry,
    Skip,
    Discard,
}

impl Verb {
    async fn apply(self, store: &MySqlStore, ids: &[MessageId]) -> Result<u64, StoreError> {
        match self {
            Self::Retry => DeadLetters::retry(store, ids).await,
            Self::Skip => DeadLetters::skip(store, ids).await,
            Self::Discard => DeadLetters::discard(store, ids).await,
        }
    }
}

/// Held rows that are not listed as held, and listed ones that are not held.
const UNEQUAL: &str = "SELECT COUNT(*) FROM (\
       SELECT o.id FROM outbox o LEFT JOIN outbox_held h ON h.outbox_id = o.id \
         WHERE (o.held_at IS NULL) <> (h.outbox_id IS NULL) \
       UNION ALL SELECT h.outbox_id FROM outbox_held h LEFT JOIN outbox o ON o.id = h.outbox_id \
         WHERE o.id IS NULL) unequal";

on_both! {
    async fn an_add_dropped_anywhere_leaves_a_transaction_that_rolls_back(lab: Lab) -> Result<()> {
        let pool = pool(&lab).await?;
        let mut dropped = 0;
        // One message is one statement; forty are four and a savepoint.
        for count in [1, 40] {
            for polls in 1.. {
                prepare(&lab, &pool, count).await?;
                let mut tx = soon(pool.begin()).await?;
                let messages = (0..count).map(|n| message(&n.to_string()));
                let added = drop_after(polls, lab.outbox.add_all(&mut tx, messages)).await;
                drop(tx);
                is_intact(&lab, &pool).await?;
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

    async fn a_first_add_dropped_anywhere_leaves_no_ghost_and_no_false_answer(
        lab: Lab
    ) -> Result<()> {
        // Not the minute of `soon`: a connection that is out of step may hang, and each may.
        let short = Duration::from_secs(3);
        let mut refusals = Vec::new();
        for polls in 1.. {
            let pool = pool(&lab).await?;
            let mut tx = soon(pool.begin()).await?;
            let added = drop_after(polls, lab.outbox.add(&mut tx, message("dropped"))).await;
            drop(tx);
            if let Ok(Ok(mut connection)) = tokio::time::timeout(short, pool.acquire()).await {
                let later = lab.outbox.add(&mut connection, message("ghost"));
                match tokio::time::timeout(short, later).await {
                    Ok(Ok(id)) => panic!("{id} was added outside of a transaction"),
                    Ok(Err(error)) => refusals.push(error.kind()),
                    Err(_) => {}
                }
            }
            assert_eq!(lab.pending().await?, [], "dropped after {polls} polls");
            let later = async {
                let mut tx = pool.begin().await?;
                let id = lab.outbox.add(&mut tx, message("later")).await?;
                tx.commit().await?;
                anyhow::Ok(id)
            };
            let later = tokio::time::timeout(short, later).await;
            let pending: Vec<MessageId> = lab.pending().await?.iter().map(Message::id).collect();
            match later {
                Ok(Ok(id)) => assert_eq!(pending, [id], "it was said to be committed"),
                _ => assert_eq!(pending, [], "it was never said to be committed"),
            }
            run(&mut lab.connect().await?, "DELETE FROM outbox").await?;
            if added.is_some() {
                break;
            }
        }
        println!("refused: {refusals:?}");
        assert_eq!(refusals.last(), Some(&AddErrorKind::NoTransaction), "the last was not dropped");
        Ok(())
    }

    async fn an_add_dropped_anywhere_leaves_a_transaction_that_can_go_on(lab: Lab) -> Result<()> {
        let pool = pool(&lab).await?;
        for polls in 1.. {
            prepare(&lab, &pool, 1).await?;
            let mut tx = soon(pool.begin()).await?;
            let first = drop_after(polls, lab.outbox.add(&mut tx, message("first"))).await;
            let second = soon(lab.outbox.add(&mut tx, message("second"))).await?;
            soon(tx.commit()).await?;
            let pending: Vec<MessageId> = lab.pending().await?.iter().map(Message::id).collect();
            assert_eq!(pending.last(), Some(&second));
            assert!(pending.len() <= 2, "{pending:?}");
            run(&mut *soon(pool.acquire()).await?, "DELETE FROM outbox").await?;
            if let Some(first) = first {
                assert_eq!(pending, [first?, second]);
                return Ok(());
            }
        }
        Ok(())
    }

    async fn an_accept_dropped_anywhere_leaves_the_message_new_or_accepted(lab: Lab) -> Result<()> {
        let pool = pool(&lab).await?;
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        let mut connection = lab.connect().await?;
        for commits in [false, true] {
            for polls in 1.. {
                let id = MessageId::generate();
                let mut tx = soon(pool.begin()).await?;
                inbox.accept(&mut tx, id).await?;
                soon(tx.rollback()).await?;
                let mut tx = soon(pool.begin()).await?;
                let accepted = drop_after(polls, inbox.accept(&mut tx, id)).await;
                if commits { soon(tx.commit()).await? } else { drop(tx) }
                is_intact(&lab, &pool).await?;
                let recorded = number(&mut connection, "SELECT COUNT(*) FROM outbox_inbox").await?;
                assert!(recorded == 0 || commits, "it was rolled back");
                let mut tx = soon(pool.begin()).await?;
                assert_eq!(inbox.accept(&mut tx, id).await?, recorded == 0);
                soon(tx.rollback()).await?;
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

    async fn a_relays_calls_dropped_anywhere_can_be_repeated(lab: Lab) -> Result<()> {
        let (store, mut connection) = (&lab.store, lab.connect().await?);
        let me = KeepLeases::new(WorkerId::generate(), TTL);
        for polls in 1.. {
            lab.add(["a", "b", "c", "d"].map(message).to_vec()).await?;
            let mut ended = vec![drop_after(polls, store.keep_leases(me)).await.is_some()];
            let standing = soon(store.keep_leases(me)).await?;
            let take: Vec<TakeOver> = standing.lanes.iter().map(TakeOver::of).collect();
            ended.push(drop_after(polls, store.keep_leases(me.take(&take))).await.is_some());
            let lanes = soon(store.keep_leases(me.take(&take))).await?.lanes;
            for (lane, free) in lanes.iter().zip(&standing.lanes) {
                let taken = (Some(me.worker), free.epoch + 1);
                assert_eq!((lane.owner, lane.epoch), taken, "taken once");
            }
            let leases: Vec<_> = lanes.iter().map(|it| Lease::new(it.lane, it.epoch)).collect();

            let all: Vec<Lane> = lanes.iter().map(|it| it.lane).collect();
            let claim = Claim::new(MEGABYTE).page(Page::new(&all, Position::START, 100));
            ended.push(drop_after(polls, store.claim(claim)).await.is_some());
            let rows = deliveries(soon(store.claim(claim)).await?);
            assert_eq!(rows.len(), 4, "a claim changes nothing");

            let delivered: Vec<_> = rows[..2]
                .iter()
                .map(|row| Delivered::new(id_of(row), Receipt::default()))
                .collect();
            let failed = |row: &Delivery, settlement| {
                let (lease, why) = (leases[usize::from(row.lane.0)], Failure::new("no", "why"));
                Failed::new(id_of(row), lease, row.state, 1, settlement, why)
            };
            let failed = [failed(&rows[2], Settlement::Held), failed(&rows[3], Settlement::Dead)];
            let settle = Settle::new(&delivered, &failed).archive(true);
            ended.push(drop_after(polls, store.settle(settle)).await.is_some());
            // One statement, one snapshot: what was dropped may still be at work.
            let everywhere = "SELECT (SELECT COUNT(*) FROM outbox) \
                 + (SELECT COUNT(*) FROM outbox_delivered) + (SELECT COUNT(*) FROM outbox_dead)";
            assert_eq!(number(&mut connection, everywhere).await?, 4, "each in one place");
            assert_eq!(number(&mut connection, UNEQUAL).await?, 0);
            soon(store.settle(settle)).await?;
            let archived = "SELECT COUNT(*) FROM outbox_delivered";
            assert_eq!(number(&mut connection, archived).await?, 2);
            assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox_dead").await?, 1);
            assert_eq!(soon(store.backlog()).await?.held, 1);

            let release = Release::new(me.worker, &leases);
            ended.push(drop_after(polls, store.release(release)).await.is_some());
            soon(store.release(release)).await?;
            let left = soon(store.keep_leases(me)).await?.lanes;
            assert!(left.iter().all(|lane| lane.owner.is_none()), "{left:?}");
            let empty = "DELETE FROM outbox; DELETE FROM outbox_held; \
                         DELETE FROM outbox_delivered; DELETE FROM outbox_dead";
            run(&mut connection, empty).await?;
            if !ended.contains(&false) {
                assert!(polls > 1, "nothing ever waited");
                return Ok(());
            }
        }
        Ok(())
    }

    async fn a_call_dropped_while_it_waits_for_a_lock_is_in_nobodys_way(lab: Lab) -> Result<()> {
        let ids = soon(hold_four(&lab, &lab.take_all().await?.1)).await?;
        let mut other = lab.connect().await?;
        run(&mut other, "BEGIN; SELECT id FROM outbox FOR UPDATE").await?;
        let retry = DeadLetters::retry(&lab.store, &ids);
        let waited = tokio::time::timeout(Duration::from_millis(500), retry).await;
        assert!(waited.is_err(), "it was not dropped: {waited:?}");
        // On the connection of what was dropped this would get the answer to that: a lock wait.
        assert_eq!(soon(lab.store.backlog()).await?.held, 4);
        run(&mut other, "ROLLBACK").await?;
        soon(DeadLetters::retry(&lab.store, &ids)).await?;
        assert_eq!(soon(lab.store.backlog()).await?.held, 0);
        Ok(())
    }

    async fn a_purge_dropped_anywhere_takes_a_batch_or_nothing(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        let archived = "SELECT COUNT(*) FROM outbox_delivered";
        for polls in 1.. {
            lab.add((0..5).map(|n| message(&n.to_string())).collect()).await?;
            let rows = deliveries(soon(lab.page()).await?);
            let rows: Vec<_> =
                rows.iter().map(|row| Delivered::new(id_of(row), Receipt::default())).collect();
            soon(lab.store.settle(Settle::new(&rows, &[]).archive(true))).await?;
            lab.add(vec![message("waits")]).await?;
            run(
                &mut connection,
                "UPDATE outbox_delivered SET delivered_at = delivered_at - INTERVAL 1 SECOND",
            )
            .await?;
            let purge = Purge::new(Duration::ZERO, 100);
            let purged = drop_after(polls, lab.store.purge(purge)).await;
            let left = number(&mut connection, archived).await?;
            assert!([0, 5].contains(&left), "{left} of 5 are left");
            soon(lab.store.purge(purge)).await?;
            assert_eq!(number(&mut connection, archived).await?, 0);
            assert_eq!(lab.pending().await?.len(), 1, "what waits is never purged");
            run(&mut connection, "DELETE FROM outbox").await?;
            if let Some(purged) = purged {
                assert_eq!(purged?, 5);
                return Ok(());
            }
        }
        Ok(())
    }

    async fn a_look_dropped_anywhere_loses_no_connection(lab: Lab) -> Result<()> {
        let ids = soon(hold_four(&lab, &lab.take_all().await?.1)).await?;
        let query = DeadLetterQuery::new();
        for polls in 1.. {
            let ended = [
                drop_after(polls, lab.store.open()).await.is_some(),
                drop_after(polls, lab.store.backlog()).await.is_some(),
                drop_after(polls, DeadLetters::list(&lab.store, &query)).await.is_some(),
                drop_after(polls, DeadLetters::get(&lab.store, ids[0])).await.is_some(),
            ];
            assert_eq!(soon(lab.store.backlog()).await?.held, 4);
            assert_eq!(soon(DeadLetters::list(&lab.store, &query)).await?.len(), 4);
            if ended == [true; 4] {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn an_operators_verb_dropped_anywhere_changes_each_message_wholly_or_not_at_all(
        lab: Lab
    ) -> Result<()> {
        let leases = lab.take_all().await?.1;
        let mut connection = lab.connect().await?;
        for verb in [Verb::Retry, Verb::Skip, Verb::Discard] {
            for polls in 1.. {
                let ids = soon(hold_four(&lab, &leases)).await?;
                let changed = drop_after(polls, verb.apply(&lab.store, &ids)).await;
                // One statement, one snapshot: what was dropped may still be at work.
                let everywhere = "SELECT (SELECT COUNT(*) FROM outbox) \
                                  + (SELECT COUNT(*) FROM outbox_dead)";
                let everywhere = number(&mut connection, everywhere).await?;
                assert_eq!(number(&mut connection, UNEQUAL).await?, 0);
                match verb {
                    Verb::Retry | Verb::Skip => assert_eq!(everywhere, 4, "{verb:?}"),
                    Verb::Discard => assert!(everywhere <= 4),
                }
                soon(verb.apply(&lab.store, &ids)).await?;
                let held = DeadLetterQuery::new().place(Place::Held);
                assert_eq!(DeadLetters::list(&lab.store, &held).await?.len(), 0, "{verb:?}");
                let dead = number(&mut connection, "SELECT COUNT(*) FROM outbox_dead").await?;
                assert_eq!(dead, if matches!(verb, Verb::Skip) { 4 } else { 0 });
                run(&mut connection, "DELETE FROM outbox; DELETE FROM outbox_dead").await?;
                if let Some(changed) = changed {
                    assert_eq!(changed?, 4);
                    break;
                }
            }
        }
        Ok(())
    }
}
