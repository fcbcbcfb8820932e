//! A message takes effect once, with the transaction that accepts it.

use outbox_core::MessageId;
use outbox_core::store::StoreErrorKind;
use outbox_mysql::MySqlInbox;

use super::*;

on_both! {
    async fn a_message_is_accepted_once(lab: Lab) -> Result<()> {
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        let (mut connection, id) = (lab.connect().await?, MessageId::generate());
        let mut answers = Vec::new();
        for _ in 0..3 {
            let mut tx = connection.begin().await?;
            answers.push(inbox.accept(&mut tx, id).await?);
            answers.push(inbox.accept(&mut tx, id).await?);
            tx.commit().await?;
        }
        assert_eq!(answers, [true, false, false, false, false, false]);
        let mut tx = connection.begin().await?;
        assert!(inbox.accept(&mut tx, MessageId::generate()).await?, "another message");
        Ok(())
    }

    async fn after_a_rollback_the_message_is_new_again(lab: Lab) -> Result<()> {
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        let (mut connection, id) = (lab.connect().await?, MessageId::generate());
        let mut tx = connection.begin().await?;
        assert!(inbox.accept(&mut tx, id).await?);
        tx.rollback().await?;
        let mut tx = connection.begin().await?;
        let mut savepoint = tx.begin().await?;
        assert!(inbox.accept(&mut savepoint, id).await?);
        savepoint.rollback().await?;
        assert!(inbox.accept(&mut tx, id).await?);
        Ok(())
    }

    async fn consumers_accept_apart_from_each_other(lab: Lab) -> Result<()> {
        let (mut connection, id) = (lab.connect().await?, MessageId::generate());
        for consumer in ["billing", "Billing", "billing ", "shipping"] {
            let inbox = MySqlInbox::new(&lab.schema, consumer)?;
            let mut tx = connection.begin().await?;
            assert!(inbox.accept(&mut tx, id).await?, "{consumer:?}");
            tx.commit().await?;
        }
        Ok(())
    }

    async fn an_answer_to_something_else_is_not_taken_for_a_repetition(lab: Lab) -> Result<()> {
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        let mut connection = lab.connect().await?;
        run(&mut connection, "BEGIN").await?;
        inbox.accept(&mut connection, MessageId::generate()).await?;
        lose_step(&mut connection).await;
        let error = inbox.accept(&mut connection, MessageId::generate()).await.expect_err("a ping");
        assert_eq!(error.kind(), StoreErrorKind::Unavailable);
        Ok(())
    }

    async fn accepting_without_an_open_transaction_is_refused(lab: Lab) -> Result<()> {
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        let (mut connection, id) = (lab.connect().await?, MessageId::generate());
        let error = inbox.accept(&mut connection, id).await.expect_err("no transaction is open");
        assert_eq!(error.kind(), StoreErrorKind::NoTransaction);
        assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox_inbox").await?, 0);
        Ok(())
    }

    async fn a_second_consumer_waits_for_the_end_of_the_first(lab: Lab) -> Result<()> {
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        for (commit, accepted) in [(true, false), (false, true)] {
            let (id, mut first) = (MessageId::generate(), lab.connect().await?);
            let mut tx = first.begin().await?;
            assert!(inbox.accept(&mut tx, id).await?);
            let (other, mut second) = (inbox.clone(), lab.connect().await?);
            let waiting = tokio::spawn(async move {
                let mut tx = second.begin().await?;
                let accepted = other.accept(&mut tx, id).await?;
                tx.commit().await?;
                anyhow::Ok(accepted)
            });
            // The first one ends once the second one stands before its record, or later.
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert!(!waiting.is_finished(), "both have an answer before the first one ended");
            if commit { tx.commit().await? } else { tx.rollback().await? }
            assert_eq!(waiting.await??, accepted, "after a first one with commit: {commit}");
        }
        Ok(())
    }

    async fn old_records_are_purged_and_young_ones_stay(lab: Lab) -> Result<()> {
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        let mut connection = lab.connect().await?;
        let ids: Vec<_> = (0..5).map(|_| MessageId::generate()).collect();
        let mut tx = connection.begin().await?;
        for id in &ids {
            inbox.accept(&mut tx, *id).await?;
        }
        tx.commit().await?;
        run(&mut connection, "UPDATE outbox_inbox SET accepted_at = accepted_at - INTERVAL 1 HOUR \
             ORDER BY message_id LIMIT 3").await?;
        let age = Duration::from_secs(1_800);
        for purged in [2, 1, 0] {
            assert_eq!(inbox.purge(&mut connection, age, 2).await?, purged);
        }
        assert_eq!(inbox.purge(&mut connection, Duration::MAX, 2).await?, 0);
        let mut tx = connection.begin().await?;
        let mut again = 0;
        for id in &ids {
            again += usize::from(inbox.accept(&mut tx, *id).await?);
        }
        assert_eq!(again, 3, "what was purged is new again");
        Ok(())
    }

    async fn a_purge_waits_for_no_consumer_and_keeps_nobody_waiting(lab: Lab) -> Result<()> {
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        let mut old = lab.connect().await?;
        let mut tx = old.begin().await?;
        for _ in 0..10 {
            inbox.accept(&mut tx, MessageId::generate()).await?;
        }
        tx.commit().await?;
        run(&mut old, "UPDATE outbox_inbox SET accepted_at = accepted_at - INTERVAL 1 HOUR").await?;
        // A consumer is at work; another one accepts while records are purged.
        let (mut one, mut two) = (lab.connect().await?, lab.connect().await?);
        let mut tx = one.begin().await?;
        assert!(inbox.accept(&mut tx, MessageId::generate()).await?);
        let mut purging = lab.connect().await?;
        // Of an application that protects itself from statements without a key.
        run(&mut purging, "SET sql_safe_updates = 1").await?;
        let purge = inbox.purge(&mut purging, Duration::from_secs(1_800), 1_000);
        let purged = tokio::time::timeout(Duration::from_secs(30), purge).await.context("it waits")?;
        assert_eq!(purged?, 10);
        let mut other = two.begin().await?;
        let accept = inbox.accept(&mut other, MessageId::generate());
        assert!(tokio::time::timeout(Duration::from_secs(30), accept).await.context("it waits")??);
        Ok(())
    }

    async fn a_purge_ends_though_an_old_snapshot_shows_what_is_gone(lab: Lab) -> Result<()> {
        let inbox = MySqlInbox::new(&lab.schema, "billing")?;
        let (mut old, mut other) = (lab.connect().await?, lab.connect().await?);
        let mut tx = other.begin().await?;
        for _ in 0..10 {
            inbox.accept(&mut tx, MessageId::generate()).await?;
        }
        tx.commit().await?;
        run(&mut old, "SET autocommit = 0; SELECT COUNT(*) FROM outbox_inbox").await?;
        assert_eq!(inbox.purge(&mut other, Duration::ZERO, 10).await?, 10);
        let purge = inbox.purge(&mut old, Duration::ZERO, 10);
        let purged = tokio::time::timeout(Duration::from_secs(30), purge).await;
        assert_eq!(purged.context("it goes on")??, 0);
        Ok(())
    }

    async fn purges_side_by_side_do_not_fail(lab: Lab) -> Result<()> {
        let mut root = lab.connect().await?;
        let (mut purged, rounds) = (0, 5);
        for _ in 0..rounds {
            run(&mut root, "INSERT INTO outbox_inbox (consumer, message_id, accepted_at) \
                 WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 900) \
                 SELECT IF(i MOD 2, 'mail', 'post'), UNHEX(REPLACE(UUID(), '-', '')), \
                   UTC_TIMESTAMP(6) - INTERVAL i + 3600 SECOND FROM n").await?;
            let mut tasks = tokio::task::JoinSet::new();
            for _ in 0..3 {
                let inbox = MySqlInbox::new(&lab.schema, "mail")?;
                let mut connection = lab.connect().await?;
                tasks.spawn(async move {
                    let mut purged = 0;
                    loop {
                        let some = inbox.purge(&mut connection, Duration::from_secs(60), 100).await?;
                        purged += some;
                        if some == 0 {
                            return anyhow::Ok(purged);
                        }
                    }
                });
            }
            while let Some(done) = tasks.join_next().await {
                purged += done??;
            }
        }
        let left = number(&mut root, "SELECT COUNT(*) FROM outbox_inbox").await?;
        assert_eq!((purged, left), (rounds * 900, 0));
        Ok(())
    }
}
