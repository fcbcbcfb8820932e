//! The relay beside the application: it makes no transaction fail, and none wait.
//!
//! `OUTBOX_NEIGHBOUR_SECONDS` says how long they run side by side; 5 without it.

use std::env;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::ensure;
use integration_tests::database::{Options, PrivateDatabase};
use integration_tests::names;
use integration_tests::servers::Backend;
use outbox_mysql::sqlx::migrate::Migrator;

use super::traffic::{PATIENCE, Relays, Writers};
use super::*;

const WRITERS: usize = 16;

/// What the relay may add to the longest wait of a writer while the table is altered.
const ALTERED: Duration = Duration::from_secs(1);

fn time() -> Duration {
    let given = env::var("OUTBOX_NEIGHBOUR_SECONDS").ok();
    let seconds =
        given.map_or(5, |text| text.parse().expect("OUTBOX_NEIGHBOUR_SECONDS is a number"));
    Duration::from_secs(seconds)
}

/// A server that nobody else uses: what it counts is of the application and the relay.
async fn lab(engine: Engine) -> Result<Option<(Lab, PrivateDatabase)>> {
    if Backend::Database(engine).is_left_out() {
        return Ok(None);
    }
    let server = Database::private(engine, Options::fast()).await?;
    Ok(Some((Lab::at(&server, MySqlSchema::new()).await?, server)))
}

async fn deadlocks(lab: &Lab, connection: &mut MySqlConnection) -> Result<u64> {
    match lab.engine {
        Engine::MariaDb => status(connection, "Innodb_deadlocks").await,
        Engine::MySql => {
            let sql = "SELECT CAST(COUNT AS SIGNED) FROM information_schema.innodb_metrics \
                       WHERE NAME = 'lock_deadlocks' AND STATUS = 'enabled'";
            Ok(number(connection, sql).await?.try_into()?)
        }
    }
}

async fn status(connection: &mut MySqlConnection, name: &str) -> Result<u64> {
    let sql = AssertSqlSafe(format!("SHOW GLOBAL STATUS LIKE '{name}'"));
    let (_, value): (String, String) = sqlx::query_as(sql).fetch_one(connection).await?;
    Ok(value.parse()?)
}

/// What a writer runs first: on MariaDB it then fails instead of waiting for a lock. MySQL cannot be
/// told so; there the waits are looked for.
fn without_patience(engine: Engine) -> &'static str {
    match engine {
        Engine::MariaDb => "SET innodb_lock_wait_timeout = 0",
        Engine::MySql => "DO 0",
    }
}

/// What locks writers were seen waiting for, and in how many looks.
///
/// A writer's transaction is one that has locked `aggregate`, as each does first. The thread of a
/// lock does not say whose it is: it is who made its record, and a split of a page by one session
/// remakes the records of others. `innodb_trx` would say it, but MySQL fails to show that table
/// while any session runs a statement with bytes that are no text.
async fn waits(lab: &Lab) -> Result<(Vec<String>, usize)> {
    let sql = match lab.engine {
        Engine::MariaDb => "SELECT '' LIMIT 0",
        Engine::MySql => {
            "SELECT CONCAT_WS(' ', r.LOCK_TYPE, r.LOCK_MODE, r.OBJECT_NAME, r.INDEX_NAME, \
               r.LOCK_DATA, 'held as', b.LOCK_MODE) \
             FROM performance_schema.data_lock_waits w \
             JOIN performance_schema.data_locks a \
               ON a.ENGINE_TRANSACTION_ID = w.REQUESTING_ENGINE_TRANSACTION_ID \
               AND a.OBJECT_NAME = 'aggregate' AND a.LOCK_TYPE = 'TABLE' \
             JOIN performance_schema.data_locks r \
               ON r.ENGINE_LOCK_ID = w.REQUESTING_ENGINE_LOCK_ID \
             JOIN performance_schema.data_locks b \
               ON b.ENGINE_LOCK_ID = w.BLOCKING_ENGINE_LOCK_ID"
        }
    };
    let mut connection = lab.connect().await?;
    let (start, mut seen, mut looks) = (Instant::now(), Vec::new(), 0);
    while start.elapsed() < time() {
        let found: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut connection).await?;
        seen.extend(found);
        looks += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok((seen, looks))
}

async fn writers_neither_deadlock_nor_wait_beside_two_dispatchers(engine: Engine) -> Result<()> {
    let Some((lab, _server)) = lab(engine).await? else { return Ok(()) };
    let mut connection = lab.connect().await?;
    let isolation = "SELECT @@GLOBAL.transaction_isolation";
    let isolation = match engine {
        Engine::MariaDb => "SELECT @@GLOBAL.tx_isolation",
        Engine::MySql => isolation,
    };
    let isolation: String = sqlx::query_scalar(isolation).fetch_one(&mut connection).await?;
    assert_eq!(isolation, "REPEATABLE-READ");
    let relays = Relays::start(&lab, 2)?;
    let writers = Writers::start_with(&lab, WRITERS, without_patience(engine)).await?;
    relays.progress(100).await;

    let before = status(&mut connection, "Innodb_row_lock_waits").await?;
    let (seen, looks) = waits(&lab).await?;
    let all = status(&mut connection, "Innodb_row_lock_waits").await? - before;
    let written = writers.stop().await.context("a writer failed")?;
    ensure!(looks > 20 && seen.is_empty(), "waits of writers in {looks} looks: {seen:?}");
    println!(
        "{engine}: {} transactions of {WRITERS} writers without a wait, the longest {:?}; {looks} \
         looks; {all} waits were counted on the server, those of the dispatchers",
        written.messages.len(),
        written.longest,
    );
    ensure!(deadlocks(&lab, &mut connection).await? == 0, "there were deadlocks");
    written.judge(&lab, relays).await
}

/// The longest transaction while the table gains columns.
async fn altered(lab: &Lab, writers: Writers, name: &str) -> Result<Duration> {
    let mut operator = lab.connect().await?;
    run(&mut operator, format!("SET lock_wait_timeout = {}", PATIENCE.as_secs())).await?;
    for column in 0..5 {
        run(&mut operator, format!("ALTER TABLE outbox ADD COLUMN {name}{column} INT NULL"))
            .await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let written = writers.stop().await?;
    Ok(written.longest)
}

async fn a_column_is_added_under_load_and_the_relay_makes_nobody_wait(
    engine: Engine,
) -> Result<()> {
    let Some((lab, _server)) = lab(engine).await? else { return Ok(()) };
    let alone = altered(&lab, Writers::start(&lab, WRITERS / 4).await?, "a").await?;
    let relays = Relays::start(&lab, 2)?;
    let mut beside = Duration::MAX;
    // The machine halts a writer now and then; what the relay costs comes each time.
    for name in ["b", "c", "d", "e"] {
        run(&mut lab.connect().await?, "DROP TABLE aggregate").await?;
        let writers = Writers::start(&lab, WRITERS / 4).await?;
        relays.progress(50).await;
        beside = beside.min(altered(&lab, writers, name).await?);
        if beside < alone + ALTERED {
            break;
        }
    }
    println!("{engine}: longest transaction without the relay {alone:?}, beside it {beside:?}");
    ensure!(beside < alone + ALTERED, "{beside:?}, and {alone:?} without the relay");
    super::traffic::until_empty(&lab).await?;
    relays.stop().await?;
    Ok(())
}

/// A folder with one migration of the application's.
fn migrations() -> Result<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(names::unique("migrations"));
    std::fs::create_dir_all(&folder)?;
    std::fs::write(folder.join("1_orders.sql"), "CREATE TABLE orders (id INT PRIMARY KEY);")?;
    Ok(folder)
}

async fn the_applications_migrations_run_before_and_after_ours(engine: Engine) -> Result<()> {
    let Some(server) = servers::database_of(engine).await else { return Ok(()) };
    let folder = migrations()?;
    let schema = MySqlSchema::new();
    for ours_first in [true, false] {
        let url = server.create_database().await?;
        let mut connection = MySqlConnection::connect(&url).await?;
        let migrator = Migrator::new(folder.as_path()).await?;
        if ours_first {
            schema.migrate(&mut connection).await?;
        }
        migrator.run(&mut connection).await?;
        schema.migrate(&mut connection).await?;
        // Again, as at the next start of the application, and one further migration.
        std::fs::write(folder.join("2_more.sql"), "ALTER TABLE orders ADD COLUMN n INT;")?;
        Migrator::new(folder.as_path()).await?.run(&mut connection).await?;
        schema.migrate(&mut connection).await?;
        schema.check(&mut connection).await?;
        std::fs::remove_file(folder.join("2_more.sql"))?;
        let theirs = "SELECT COUNT(*) FROM _sqlx_migrations";
        assert_eq!(number(&mut connection, theirs).await?, 2);
    }
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

on_each! {
    writers_neither_deadlock_nor_wait_beside_two_dispatchers
    a_column_is_added_under_load_and_the_relay_makes_nobody_wait
    the_applications_migrations_run_before_and_after_ours
}
