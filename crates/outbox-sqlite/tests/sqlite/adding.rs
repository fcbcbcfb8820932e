//! Messages enter with the caller's transaction, and never without one.

use outbox_core::message::Limits;
use outbox_core::store::StoreErrorKind;
use outbox_core::{AddError, AddErrorKind, MessageId};
use outbox_sqlite::{SqlValue, SqliteInsert};

use super::*;

fn refused(added: Result<MessageId, AddError>) -> Option<AddErrorKind> {
    added.err().map(|error| error.kind())
}

#[tokio::test]
async fn add_without_a_transaction_is_refused() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    for _ in 0..2 {
        let added = lab.outbox.add(&mut connection, message("k")).await;
        assert_eq!(refused(added), Some(AddErrorKind::NoTransaction));
    }
    run(&mut connection, "BEGIN; COMMIT").await?;
    let added = lab.outbox.add(&mut connection, message("k")).await;
    assert_eq!(refused(added), Some(AddErrorKind::NoTransaction));
    assert_eq!(lab.pending().await?, []);
    Ok(())
}

#[tokio::test]
async fn add_after_sqlite_rolled_back_is_refused() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    run(&mut connection, "CREATE TABLE t (id INTEGER PRIMARY KEY); INSERT INTO t VALUES (1)")
        .await?;
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
    lab.outbox.add(&mut tx, message("lost")).await?;
    run(&mut tx, "INSERT OR ROLLBACK INTO t VALUES (1)").await.expect_err("the id is taken");
    // sqlx still believes in its transaction.
    let added = lab.outbox.add(&mut tx, message("ghost")).await;
    assert_eq!(refused(added), Some(AddErrorKind::NoTransaction));
    drop(tx);
    assert_eq!(lab.pending().await?, []);
    Ok(())
}

#[tokio::test]
async fn add_is_accepted_in_every_kind_of_transaction() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    for begin in ["BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "SAVEPOINT mine"] {
        run(&mut connection, begin).await?;
        lab.outbox.add(&mut connection, message(begin)).await?;
        run(&mut connection, "COMMIT").await?;
    }
    let mut tx = connection.begin().await?;
    let mut savepoint = tx.begin().await?;
    lab.outbox.add(&mut savepoint, message("savepoint")).await?;
    savepoint.commit().await?;
    let mut lost = tx.begin().await?;
    lab.outbox.add(&mut lost, message("lost")).await?;
    lost.rollback().await?;
    tx.commit().await?;
    let keys: Vec<_> =
        lab.pending().await?.iter().map(|m| m.key().expect("it has a key").to_vec()).collect();
    let expected = ["BEGIN", "BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "SAVEPOINT mine", "savepoint"];
    assert_eq!(keys, expected.map(|key| key.as_bytes().to_vec()));
    Ok(())
}

#[tokio::test]
async fn asking_for_a_transaction_changes_no_setting() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    for level in [0, 2, 3] {
        run(&mut connection, format!("PRAGMA synchronous = {level}")).await?;
        let added = lab.outbox.add(&mut connection, message("k")).await;
        assert_eq!(refused(added), Some(AddErrorKind::NoTransaction));
        let mut tx = connection.begin().await?;
        lab.outbox.add(&mut tx, message("k")).await?;
        tx.commit().await?;
        assert_eq!(number(&mut connection, "PRAGMA main.synchronous").await?, level);
    }
    Ok(())
}

#[tokio::test]
async fn a_rolled_back_message_is_never_claimed() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    let mut tx = connection.begin().await?;
    lab.outbox.add(&mut tx, message("k")).await?;
    assert_eq!(lab.writer.pending(&mut tx).await?.len(), 1);
    assert_eq!(lab.page().await?.rows.len(), 0);
    tx.rollback().await?;
    assert_eq!(lab.page().await?.rows.len(), 0);
    Ok(())
}

#[tokio::test]
async fn many_messages_are_added_in_order_all_or_none() -> Result<()> {
    let lab = Lab::new().await?;
    let messages: Vec<_> = (0..300).map(|n| message(&n.to_string())).collect();
    lab.add(messages.clone()).await?;
    assert_eq!(lab.pending().await?, messages);

    // The last one is refused by a CHECK; the caller goes on and commits nevertheless.
    let limits = Limits::default().max_message_bytes(100 * MEGABYTE);
    let outbox = lab.outbox.clone().with_limits(limits);
    let large = Message::builder("orders").payload(vec![0; 15 * MEGABYTE + 1]).build()?;
    let mut connection = lab.connect().await?;
    let mut tx = connection.begin().await?;
    let added = outbox.add_all(&mut tx, messages.into_iter().chain([large])).await;
    let kind = added.err().map(|error| error.kind());
    assert_eq!(kind, Some(AddErrorKind::Store(StoreErrorKind::Invalid)));
    tx.commit().await?;
    assert_eq!(lab.pending().await?.len(), 300);
    Ok(())
}

#[tokio::test]
async fn a_writer_that_finds_another_one_busy_is_told() -> Result<()> {
    let lab = Lab::new().await?;
    let mut writing = lab.connect().await?;
    run(&mut writing, "BEGIN IMMEDIATE").await?;
    let options = lab.options.clone().busy_timeout(std::time::Duration::from_millis(10));
    let mut other = options.connect().await?;
    let mut tx = other.begin().await?;
    let added = lab.outbox.add(&mut tx, message("k")).await;
    assert_eq!(refused(added), Some(AddErrorKind::Store(StoreErrorKind::Conflict)));
    Ok(())
}

#[tokio::test]
async fn ids_are_never_given_out_again() -> Result<()> {
    let lab = Lab::new().await?;
    lab.add(vec![message("a"), message("b")]).await?;
    let before = lab.page().await?.covered;
    let mut connection = lab.connect().await?;
    run(&mut connection, "DELETE FROM outbox").await?;
    lab.add(vec![message("c")]).await?;
    assert_eq!(lab.page().await?.covered, before.next());
    Ok(())
}

#[tokio::test]
async fn keys_that_differ_in_case_or_trailing_space_are_distinct() -> Result<()> {
    let lab = Lab::new().await?;
    let keys = ["key", "Key", "key ", "ke\u{301}y", "key\0"];
    lab.add(keys.iter().map(|key| message(key)).collect()).await?;
    let mut connection = lab.connect().await?;
    let distinct = "SELECT COUNT(DISTINCT message_key) FROM outbox";
    assert_eq!(number(&mut connection, distinct).await?, 5);
    let claimed = deliveries(lab.page().await?);
    let claimed: Vec<_> = claimed.iter().map(|d| d.message.key().expect("it has a key")).collect();
    assert_eq!(claimed, keys.map(str::as_bytes));
    Ok(())
}

#[tokio::test]
async fn what_does_not_fit_is_refused() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    let good = [
        ("message_id", "randomblob(16)"),
        ("topic", "'t'"),
        ("message_key", "'k'"),
        ("partition_no", "NULL"),
        ("headers", "NULL"),
        ("payload", "NULL"),
    ];
    let bad = [
        ("message_id", "randomblob(15)"),
        ("message_id", "'0123456789abcdef'"),
        ("topic", "''"),
        ("topic", "x'74'"),
        ("topic", "replace(hex(zeroblob(125)), '0', 't')"),
        ("message_key", "zeroblob(1025)"),
        ("message_key", "replace(hex(zeroblob(513)), '0', 'k')"),
        ("partition_no", "-1"),
        ("partition_no", "'one'"),
        ("headers", "zeroblob(65537)"),
        ("payload", "zeroblob(15728641)"),
    ];
    for (column, value) in bad {
        let values = good.map(|(name, good)| if name == column { value } else { good }).join(", ");
        let columns = good.map(|(name, _)| name).join(", ");
        let insert = format!("INSERT INTO outbox ({columns}) VALUES ({values})");
        run(&mut connection, insert).await.expect_err(&format!("{column} = {value}"));
    }
    assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox").await?, 0);
    Ok(())
}

#[tokio::test]
async fn plain_sql_is_claimed_whatever_its_types() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    run(
        &mut connection,
        "INSERT INTO outbox (message_id, topic, message_key, payload) \
         VALUES (randomblob(16), 'orders', 'k', '{}'), (randomblob(16), 'orders', 42, 7);\
         INSERT INTO outbox (message_id, topic, headers, payload) \
         VALUES (randomblob(16), 'orders', '{\"tenant\": \"7\"}', x'00ff')",
    )
    .await?;
    let claimed = deliveries(lab.page().await?);
    let keys: Vec<_> = claimed.iter().map(|d| d.message.key()).collect();
    let payloads: Vec<_> = claimed.iter().map(|d| d.message.payload()).collect();
    assert_eq!(keys, [Some(&b"k"[..]), Some(b"42"), None]);
    assert_eq!(payloads, [Some(&b"{}"[..]), Some(b"7"), Some(b"\x00\xff")]);
    assert_eq!(claimed[2].message.headers().get("tenant"), Some(&b"7"[..]));
    Ok(())
}

#[tokio::test]
async fn the_statement_and_its_values_serve_any_driver() -> Result<()> {
    let lab = Lab::new().await?;
    let message = Message::builder("t").key("k").payload("p").header("h", "v").build()?;
    let insert = SqliteInsert::new(&lab.schema, std::slice::from_ref(&message));
    execute(&insert, &mut lab.connect().await?).await?;
    assert_eq!(lab.pending().await?, [message]);
    Ok(())
}

async fn execute(
    insert: &SqliteInsert,
    connection: &mut SqliteConnection,
) -> Result<(), sqlx::Error> {
    let mut query = sqlx::query(AssertSqlSafe(insert.sql().to_owned()));
    for value in insert.values() {
        query = match value {
            SqlValue::Null => query.bind(None::<i64>),
            SqlValue::Int(value) => query.bind(*value),
            SqlValue::Text(value) => query.bind(value.clone()),
            SqlValue::Bytes(value) => query.bind(value.clone()),
        };
    }
    query.execute(connection).await.map(|_| ())
}

#[tokio::test]
async fn a_statement_takes_at_most_5_461_messages() -> Result<()> {
    let lab = Lab::new().await?;
    let mut connection = lab.connect().await?;
    let messages = vec![message("k"); 5_462];
    let most = SqliteInsert::new(&lab.schema, &messages[1..]);
    execute(&most, &mut connection).await?;
    let more = SqliteInsert::new(&lab.schema, &messages);
    execute(&more, &mut connection).await.expect_err("too many values");
    assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox").await?, 5_461);
    Ok(())
}
