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
}
