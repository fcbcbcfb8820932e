//! The relay's sessions, whatever the server's defaults are.

use integration_tests::database::{Options, PrivateDatabase};
use integration_tests::servers::Backend;
use outbox_core::delivery::{Failure, Settlement};
use outbox_core::store::{Failed, Settle, StoreErrorKind};

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
        .with("--innodb-lock-wait-timeout=500");
    let Some(server) = private(engine, options).await? else { return Ok(()) };
    let lab = Lab::at(&server, MySqlSchema::new().with_lanes(4)?).await?;
    let row = lab.delivery("a").await?;
    let (_, lease) = lab.take(row.lane).await?;
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

async fn several_writing_nodes_are_warned_about(engine: Engine) -> Result<()> {
    let options = Options::fast().with("--auto-increment-increment=2");
    let Some(server) = private(engine, options).await? else { return Ok(()) };
    let lab = Lab::at(&server, MySqlSchema::new()).await?;
    let warnings = lab.store.open().await?.warnings;
    assert!(warnings.iter().any(|w| w.contains("auto_increment_increment")), "{warnings:?}");
    Ok(())
}

on_each! {
    hostile_defaults_of_the_server_do_not_reach_the_relay
    a_server_that_becomes_read_only_is_unavailable_until_it_is_not
    several_writing_nodes_are_warned_about
}
