//! A message takes effect once, with the transaction that accepts it.

use std::time::Duration;

use outbox_core::MessageId;
use outbox_core::store::StoreErrorKind;
use outbox_sqlite::SqliteInbox;

use super::storing::writers_get_in;
use super::*;

#[tokio::test]
async fn a_message_is_accepted_once() -> Result<()> {
    let lab = Lab::new().await?;
    let inbox = SqliteInbox::new(&lab.schema, "billing")?;
    let (mut connection, id) = (lab.connect().await?, MessageId::generate());
    let mut answers = Vec::new();
    for _ in 0..3 {
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        answers.push(inbox.accept(&mut tx, id).await?);
        answers.push(inbox.accept(&mut tx, id).await?);
        tx.commit().await?;
    }
    assert_eq!(answers, [true, false, false, false, false, false]);
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    assert!(inbox.accept(&mut tx, MessageId::generate()).await?, "another message is another one");
    Ok(())
}

#[tokio::test]
async fn after_a_rollback_the_message_is_new_again() -> Result<()> {
    let lab = Lab::new().await?;
    let inbox = SqliteInbox::new(&lab.schema, "billing")?;
    let (mut connection, id) = (lab.connect().await?, MessageId::generate());
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    assert!(inbox.accept(&mut tx, id).await?);
    tx.rollback().await?;
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    let mut savepoint = tx.begin().await?;
    assert!(inbox.accept(&mut savepoint, id).await?);
    savepoint.rollback().await?;
    assert!(inbox.accept(&mut tx, id).await?);
    Ok(())
}

#[tokio::test]
async fn consumers_accept_apart_from_each_other() -> Result<()> {
    let lab = Lab::new().await?;
    let (mut connection, id) = (lab.connect().await?, MessageId::generate());
    for consumer in ["billing", "shipping"] {
        let inbox = SqliteInbox::new(&lab.schema, consumer)?;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        assert!(inbox.accept(&mut tx, id).await?, "{consumer}");
        tx.commit().await?;
    }
    Ok(())
}

#[tokio::test]
async fn accepting_without_an_open_transaction_is_refused() -> Result<()> {
    let lab = Lab::new().await?;
    let inbox = SqliteInbox::new(&lab.schema, "billing")?;
    let (mut connection, id) = (lab.connect().await?, MessageId::generate());
    let error = inbox.accept(&mut connection, id).await.expect_err("no transaction is open");
    assert_eq!(error.kind(), StoreErrorKind::NoTransaction);
    assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox_inbox").await?, 0);
    Ok(())
}

/// SQLite does not let a reader write once somebody else has, however long it would wait.
#[tokio::test]
async fn a_transaction_that_has_read_before_another_wrote_accepts_nothing() -> Result<()> {
    let lab = Lab::new().await?;
    let inbox = SqliteInbox::new(&lab.schema, "billing")?;
    let (mut connection, id) = (lab.connect().await?, MessageId::generate());
    let mut tx = connection.begin().await?;
    sqlx::query("SELECT * FROM outbox_inbox").execute(&mut *tx).await?;
    lab.add(vec![message("a")]).await?;
    let error = inbox.accept(&mut tx, id).await.expect_err("another one wrote");
    assert_eq!(error.kind(), StoreErrorKind::Conflict);
    tx.rollback().await?;
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    assert!(inbox.accept(&mut tx, id).await?);
    Ok(())
}

/// Eight consumers of one name get every message at once: each takes effect once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_consumers_at_once_one_accepts() -> Result<()> {
    let lab = Lab::new().await?;
    let inbox = SqliteInbox::new(&lab.schema, "billing")?;
    let ids: Vec<_> = (0..20).map(|_| MessageId::generate()).collect();
    let mut consumers = Vec::new();
    for _ in 0..8 {
        let (inbox, ids) = (inbox.clone(), ids.clone());
        let options = lab.options.clone().busy_timeout(Duration::from_secs(60));
        let mut connection = options.connect().await?;
        consumers.push(tokio::spawn(async move {
            let mut accepted = 0;
            for id in ids {
                let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
                accepted += usize::from(inbox.accept(&mut tx, id).await?);
                tx.commit().await?;
            }
            anyhow::Ok(accepted)
        }));
    }
    let mut accepted = 0;
    for consumer in consumers {
        accepted += consumer.await??;
    }
    assert_eq!(accepted, ids.len());
    Ok(())
}

#[tokio::test]
async fn old_records_are_purged_and_young_ones_stay() -> Result<()> {
    let lab = Lab::new().await?;
    let inbox = SqliteInbox::new(&lab.schema, "billing")?;
    let mut connection = lab.connect().await?;
    let ids: Vec<_> = (0..5).map(|_| MessageId::generate()).collect();
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    for id in &ids {
        inbox.accept(&mut tx, *id).await?;
    }
    tx.commit().await?;
    let old = "UPDATE outbox_inbox SET accepted_at = accepted_at - 3600000000 \
               WHERE message_id IN (SELECT message_id FROM outbox_inbox LIMIT 3)";
    run(&mut connection, old).await?;
    let half_an_hour = Duration::from_secs(1800);
    assert_eq!(inbox.purge(&mut connection, half_an_hour, 2).await?, 2);
    assert_eq!(inbox.purge(&mut connection, half_an_hour, 2).await?, 1);
    assert_eq!(inbox.purge(&mut connection, half_an_hour, 2).await?, 0);
    assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox_inbox").await?, 2);
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    let mut again = 0;
    for id in &ids {
        again += usize::from(inbox.accept(&mut tx, *id).await?);
    }
    assert_eq!(again, 3, "what was purged is new again");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_get_in_while_many_old_records_are_purged() -> Result<()> {
    const RECORDS: u32 = 60_000;
    let lab = Lab::new().await?;
    let inbox = SqliteInbox::new(&lab.schema, "billing")?;
    let mut connection = lab.connect().await?;
    let many = format!(
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {RECORDS}) \
         INSERT INTO outbox_inbox SELECT 'billing', randomblob(16), i FROM n"
    );
    run(&mut connection, many).await?;
    let half_an_hour = Duration::from_secs(1800);
    assert_eq!(inbox.purge(&mut connection, half_an_hour, 700).await?, 700, "the limit");
    let purge = tokio::spawn(async move {
        let purged = inbox.purge(&mut connection, half_an_hour, u32::MAX).await?;
        Ok::<_, anyhow::Error>((
            purged,
            number(&mut connection, "SELECT COUNT(*) FROM outbox_inbox").await?,
        ))
    });
    writers_get_in(&lab, || purge.is_finished()).await?;
    assert_eq!(purge.await??, (u64::from(RECORDS) - 700, 0));
    Ok(())
}
