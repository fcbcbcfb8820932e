//! The relay's sessions, whatever the server's defaults are.

use integration_tests::database::{Options, PrivateDatabase};
use integration_tests::servers::Backend;
use outbox_core::delivery::{Failure, Settlement};
use outbox_core::store::{Failed, Settle, StoreErrorKind};

use outbox_core::Dispatcher;
use outbox_testing::MemoryBroker;
use sqlx::Row as _;

use super::grants::url_of;
use super::traffic::until_empty;
use super::*;

async fn private(engine: Engine, options: Options) -> Result<Option<PrivateDatabase>> {
    if Backend::Database(engine).is_left_out() {
        return Ok(None);
    }
    Ok(Some(Database::private(engine, options).await?))
}

/// With these defaults a session would hold locks, keep rows from its peers and lose its work.
async fn hostile_defaults_of_the_server_do_not_reach_the_relay(engine: Engine) -> Result<()> {
    let options = Options::fast()
        .with("--autocommit=0")
        .with("--completion-type=CHAIN")
        .with("--transaction-isolation=SERIALIZABLE")
        .with("--innodb-lock-wait-timeout=500")
        .with("--lock-wait-timeout=500");
    let Some(server) = private(engine, options).await? else { return Ok(()) };
    let lab = Lab::at(&server, MySqlSchema::new().with_lanes(4)?).await?;
    let row = lab.delivery("a").await?;
    let (_, lease) = lab.take(row.lane).await?;
    // For the connections to come: here `BEGIN` would begin a block.
    if engine == Engine::MariaDb {
        run(&mut lab.connect().await?, "SET GLOBAL sql_mode = 'ORACLE'").await?;
    }
    let failure = Failure::new("failed", "why");
    let rows = [Failed::new(id_of(&row), lease, row.state, 1, Settlement::Held, failure)];
    assert_eq!(lab.store.settle(Settle::new(&[], &rows)).await?.refused, []);
    // Committed, and nothing is open: another session sees it and can lock it.
    let mut other = lab.connect().await?;
    let held = "SELECT CAST(COUNT(*) AS SIGNED) FROM outbox WHERE held_at IS NOT NULL FOR UPDATE";
    assert_eq!(number(&mut other, held).await?, 1);
    run(&mut other, "ROLLBACK").await?;
    let open = "SELECT COUNT(*) FROM information_schema.innodb_trx \
                WHERE trx_mysql_thread_id <> CONNECTION_ID()";
    assert_eq!(number(&mut other, open).await?, 0);
    Ok(())
}

/// A replica, or a primary that was demoted, may show old rows.
async fn a_server_that_becomes_read_only_is_unavailable_until_it_is_not(
    engine: Engine,
) -> Result<()> {
    let Some(server) = private(engine, Options::fast()).await? else { return Ok(()) };
    let lab = Lab::at(&server, MySqlSchema::new().with_lanes(4)?).await?;
    let mut operator = lab.connect().await?;
    run(&mut operator, "SET GLOBAL read_only = 1").await?;
    let fresh = MySqlStore::from_options(lab.url.parse()?, &lab.schema);
    let refused = fresh.open().await.map_err(|error| error.kind());
    assert_eq!(refused.expect_err("it is read-only"), StoreErrorKind::Unavailable);
    run(&mut operator, "SET GLOBAL read_only = 0").await?;
    fresh.open().await?;
    Ok(())
}

/// What a crash may do: without a binary log InnoDB shows rows before they are on the disk, and those of
/// the last moment are gone afterwards. Their ids are given to others, though a relay has passed them.
async fn ids_used_again_after_a_restart_of_the_server_are_delivered_in_order(
    engine: Engine,
) -> Result<()> {
    let Some(server) = private(engine, Options::fast()).await? else { return Ok(()) };
    let lab = Lab::at(&server, MySqlSchema::new().with_lanes(4)?).await?;
    let broker = MemoryBroker::new();
    let dispatcher = Dispatcher::builder(lab.store.clone(), broker.clone()).lease(TTL).build()?;
    let running = tokio::spawn(dispatcher.run(std::future::pending()));
    lab.delivers(50, &broker).await?;
    until_empty(&lab).await?;
    let identity = async || -> Result<u64> {
        let store = MySqlStore::connect(&lab.url, &lab.schema).await?;
        Ok(store.claim(Claim::new(1)).await?.server)
    };
    let before = identity().await?;
    // The clock has gone on, the start has not.
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(identity().await?, before);

    server.server().kill()?;
    server.server().start().await?;
    assert_ne!(identity().await?, before);
    run(&mut lab.connect().await?, "ALTER TABLE outbox AUTO_INCREMENT = 1").await?;
    lab.delivers(60, &broker).await?;
    running.abort();
    Ok(())
}

async fn several_writing_nodes_are_warned_about(engine: Engine) -> Result<()> {
    let options = Options::fast().with("--auto-increment-increment=2");
    let Some(server) = private(engine, options).await? else { return Ok(()) };
    let lab = Lab::at(&server, MySqlSchema::new()).await?;
    let warnings = lab.store.open().await?.warnings;
    assert!(warnings.iter().any(|w| w.contains("auto_increment_increment")), "{warnings:?}");
    Ok(())
}

/// Bytes of the binary log.
async fn logged(connection: &mut MySqlConnection) -> Result<u64> {
    let mut bytes = 0;
    for row in sqlx::raw_sql("SHOW BINARY LOGS").fetch_all(connection).await? {
        bytes += row.try_get_unchecked::<u64, _>(1)?;
    }
    Ok(bytes)
}

/// What a relay of this user at `url` adds to the log for each of some messages of 10,000 bytes.
async fn logged_by_message(lab: &Lab, url: &str) -> Result<u64> {
    const MESSAGES: u64 = 50;
    let mut writer = lab.connect().await?;
    let mut tx = writer.begin().await?;
    let message = |_| Message::builder("t").payload(vec![b'p'; 10_000]).build().expect("valid");
    lab.outbox.add_all(&mut tx, (0..MESSAGES).map(message)).await?;
    tx.commit().await?;
    let before = logged(&mut writer).await?;
    let store = MySqlStore::connect(url, &lab.schema).await?;
    let broker = MemoryBroker::new();
    Dispatcher::builder(store, broker.clone()).build()?.run_until_empty().await?;
    assert_eq!(broker.published().len(), 50);
    Ok((logged(&mut writer).await? - before) / MESSAGES)
}

async fn where_the_relay_may_the_binary_log_keeps_only_what_tells_a_deleted_row_apart(
    engine: Engine,
) -> Result<()> {
    let options = Options::fast().with("--log-bin=binlog").with("--server-id=1");
    let Some(server) = private(engine, options).await? else { return Ok(()) };
    let lab = Lab::at(&server, MySqlSchema::new()).await?;
    let mut root = lab.connect().await?;
    run(
        &mut root,
        "CREATE USER 'plain'@'%'; GRANT SELECT, INSERT, UPDATE, DELETE ON *.* TO 'plain'@'%'",
    )
    .await?;
    let whole = logged_by_message(&lab, &url_of(&lab, "plain")?).await?;
    assert!(whole > 10_000, "{whole} bytes by a user that may not");
    let privilege = match engine {
        Engine::MariaDb => "BINLOG ADMIN",
        Engine::MySql => "SESSION_VARIABLES_ADMIN",
    };
    run(&mut root, format!("GRANT {privilege} ON *.* TO 'plain'@'%'")).await?;
    let keys = logged_by_message(&lab, &url_of(&lab, "plain")?).await?;
    assert!(keys < 1_000, "{keys} bytes by a user that may");
    Ok(())
}

/// As on Windows. MySQL's data folder would have to be made so.
#[tokio::test]
async fn lanes_change_where_a_server_keeps_the_names_of_tables_in_lower_case() -> Result<()> {
    let options = Options::fast().with("--lower-case-table-names=1");
    let Some(server) = private(Engine::MariaDb, options).await? else { return Ok(()) };
    let lab = Lab::at(&server, MySqlSchema::new().with_prefix("Shop_")?).await?;
    lab.schema.change_lanes(&mut lab.connect().await?, 8).await?;
    lab.add((0..50).map(|n| message(&n.to_string())).collect()).await?;
    Ok(())
}

on_each! {
    hostile_defaults_of_the_server_do_not_reach_the_relay
    a_server_that_becomes_read_only_is_unavailable_until_it_is_not
    ids_used_again_after_a_restart_of_the_server_are_delivered_in_order
    several_writing_nodes_are_warned_about
    where_the_relay_may_the_binary_log_keeps_only_what_tells_a_deleted_row_apart
}
