//! Transactions that SQLite rolled back by itself: what sqlx makes of their connections, and the
//! advice against it.

use outbox_sqlite::sqlx::sqlite::{SqlitePool, SqlitePoolOptions};

use super::*;

/// SQLite ends the transaction, and sqlx does not notice.
async fn break_transaction(pool: &SqlitePool) -> Result<()> {
    let rule = "CREATE TABLE IF NOT EXISTS orders (id INTEGER); \
                CREATE TRIGGER IF NOT EXISTS rule BEFORE INSERT ON orders \
                BEGIN SELECT RAISE(ROLLBACK, 'no'); END";
    run(&mut *pool.acquire().await?, rule).await?;
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    run(&mut tx, "INSERT INTO orders VALUES (7)").await.expect_err("the trigger");
    drop(tx);
    Ok(())
}

/// Why the advice is given. Should this fail, sqlx has been repaired: take it out of the README.
#[tokio::test]
async fn a_plain_pool_may_say_that_it_committed_what_it_did_not() -> Result<()> {
    let lab = Lab::new().await?;
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(lab.options.clone());
    let pool = pool.await?;
    break_transaction(&pool).await?;
    let error = pool.begin_with("BEGIN IMMEDIATE").await.map(|_| ()).expect_err("a savepoint");
    assert!(matches!(error, sqlx::Error::InvalidSavePointStatement), "{error}");
    // What is now taken for a savepoint begins a transaction, which no rollback ends.
    let mut tx = pool.begin().await?;
    lab.outbox.add(&mut tx, message("rolled back")).await?;
    tx.rollback().await?;
    let mut tx = pool.begin().await?;
    lab.outbox.add(&mut tx, message("lost")).await?;
    tx.commit().await.expect("it says so");
    assert_eq!(lab.pending().await?, []);
    pool.close().await;
    assert_eq!(lab.pending().await?, []);
    Ok(())
}

#[tokio::test]
async fn a_pool_that_refuses_open_transactions_goes_on_after_one_was_broken() -> Result<()> {
    let lab = Lab::new().await?;
    // As in the README.
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .before_acquire(|connection, _| Box::pin(async { Ok(!connection.is_in_transaction()) }))
        .connect_with(lab.options.clone())
        .await?;
    break_transaction(&pool).await?;
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    lab.outbox.add(&mut tx, message("rolled back")).await?;
    tx.rollback().await?;
    let mut tx = pool.begin().await?;
    lab.outbox.add(&mut tx, message("added")).await?;
    tx.commit().await?;
    assert_eq!(lab.pending().await?.len(), 1);
    // Whatever ended as it should keeps its connection.
    run(&mut *pool.acquire().await?, "CREATE TEMP TABLE mine (id INTEGER)").await?;
    pool.begin().await?.commit().await?;
    pool.begin_with("BEGIN IMMEDIATE").await?.rollback().await?;
    drop(pool.begin_with("BEGIN IMMEDIATE").await?);
    run(&mut *pool.acquire().await?, "INSERT INTO mine VALUES (1)").await?;
    Ok(())
}

/// The same for who holds a connection: it is closed by hand.
#[tokio::test]
async fn a_connection_whose_transaction_was_broken_can_be_closed() -> Result<()> {
    let lab = Lab::new().await?;
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(lab.options.clone());
    let pool = pool.await?;
    break_transaction(&pool).await?;
    let mut connection = pool.acquire().await?;
    assert!(connection.is_in_transaction());
    connection.close_on_drop();
    drop(connection);
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    lab.outbox.add(&mut tx, message("added")).await?;
    tx.commit().await?;
    assert_eq!(lab.pending().await?.len(), 1);
    Ok(())
}
