//! The file: found or refused, opened, migrated.

use std::time::Duration;

use outbox_core::delivery::WorkerId;
use outbox_core::store::{KeepLeases, StoreErrorKind};

use super::*;

#[tokio::test]
async fn a_missing_file_is_not_created() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("missing.db");
    let url = format!("sqlite:{}?mode=rwc", file.display());
    let error = SqliteStore::connect(&url, &SqliteSchema::new()).await.expect_err("no file");
    assert_eq!(error.kind(), StoreErrorKind::Unavailable);
    assert!(!file.exists());
    Ok(())
}

#[tokio::test]
async fn a_url_of_another_database_is_not_supported() -> Result<()> {
    use StoreErrorKind as K;
    let folder = tempfile::tempdir()?;
    let missing = folder.path().join("missing.db");
    let schema = SqliteSchema::new();
    for (url, kind) in [
        ("mysql://user:password@127.0.0.1:1/shop".to_owned(), K::Unsupported),
        ("file:shop.db".to_owned(), K::Unsupported),
        ("SQLite:shop.db".to_owned(), K::Unsupported),
        ("sqlite".to_owned(), K::Unsupported),
        (String::new(), K::Unsupported),
        (missing.display().to_string(), K::Unsupported),
        (format!("sqlite:{}", missing.display()), K::Unavailable),
        (format!("sqlite://{}", missing.display()), K::Unavailable),
    ] {
        let error = SqliteStore::connect(&url, &schema).await.expect_err("no such database");
        assert_eq!(error.kind(), kind, "{url}");
    }
    Ok(())
}

#[tokio::test]
async fn a_store_can_write_whatever_its_url_says() -> Result<()> {
    let lab = Lab::new().await?;
    lab.add(vec![message("a")]).await?;
    let file = lab.options.get_filename().display();
    for options in ["mode=ro", "immutable=true", "mode=ro&immutable=true"] {
        let store = SqliteStore::connect(&format!("sqlite:{file}?{options}"), &lab.schema).await?;
        let page = Page::new(&[Lane(0)], Position::START, 10);
        assert_eq!(store.claim(Claim::new(MEGABYTE).page(page)).await?.rows.len(), 1, "{options}");
        let keep = KeepLeases::new(WorkerId::generate(), Duration::from_secs(60));
        store.keep_leases(keep).await.expect(options);
    }
    Ok(())
}

#[tokio::test]
async fn a_database_without_tables_or_without_wal_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let options = SqliteConnectOptions::new().filename(folder.path().join("shop.db"));
    let schema = SqliteSchema::new();
    let store = SqliteStore::from_options(options.clone(), &schema);
    let mut connection = options.create_if_missing(true).connect().await?;
    run(&mut connection, schema.sql()).await?;
    let error = store.open().await.expect_err("a rollback journal");
    assert_eq!(error.kind(), StoreErrorKind::Unsupported);
    schema.migrate(&mut connection).await?;
    store.open().await?;
    run(&mut connection, "DROP TABLE outbox_dead").await?;
    let error = store.open().await.expect_err("a table is missing");
    assert_eq!(error.kind(), StoreErrorKind::Schema);
    schema.migrate(&mut connection).await.expect_err("the version says that it is there");
    run(&mut connection, "UPDATE outbox_meta SET schema_version = 2").await?;
    let error = schema.migrate(&mut connection).await.expect_err("a newer version");
    assert_eq!(error.kind(), StoreErrorKind::Schema);
    Ok(())
}

#[tokio::test]
async fn migrating_is_repeatable_and_can_be_done_by_several_at_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let options = SqliteConnectOptions::new()
        .filename(folder.path().join("shop.db"))
        .create_if_missing(true)
        .busy_timeout(Duration::from_secs(60));
    options.connect().await?.close().await?;
    let mut migrations = Vec::new();
    for _ in 0..4 {
        let mut connection = options.connect().await?;
        migrations.push(tokio::spawn(async move {
            let schema = SqliteSchema::new().with_prefix("shop_").expect("a good prefix");
            schema.migrate(&mut connection).await?;
            schema.migrate(&mut connection).await
        }));
    }
    for migration in migrations {
        migration.await??;
    }
    Ok(())
}

/// SQLite itself does not wait here, whatever the busy timeout.
#[tokio::test]
async fn a_migration_waits_for_a_writer_before_it_switches_to_wal() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let options = SqliteConnectOptions::new().filename(folder.path().join("shop.db"));
    let mut writer = options.clone().create_if_missing(true).connect().await?;
    run(&mut writer, "CREATE TABLE orders (id INTEGER PRIMARY KEY)").await?;
    let schema = SqliteSchema::new();
    let mut migrating = options.clone().busy_timeout(Duration::from_secs(5)).connect().await?;
    let mut impatient = options.clone().busy_timeout(Duration::from_millis(50)).connect().await?;
    for (begin, does) in [("BEGIN; SELECT * FROM orders", "reads"), ("BEGIN IMMEDIATE", "writes")] {
        run(&mut writer, begin).await?;
        let error = schema.migrate(&mut impatient).await.expect_err(does);
        assert_eq!(error.kind(), StoreErrorKind::Conflict, "another one {does}");
        run(&mut writer, "COMMIT").await?;
    }
    run(&mut writer, "BEGIN IMMEDIATE; INSERT INTO orders VALUES (7)").await?;
    let write = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        run(&mut writer, "COMMIT").await
    };
    let (migrated, written) = tokio::join!(schema.migrate(&mut migrating), write);
    written?;
    migrated?;
    SqliteStore::from_options(options, &schema).open().await?;
    Ok(())
}

/// Shells run the text statement by statement and go on after an error.
#[tokio::test]
async fn a_text_of_which_one_statement_failed_can_be_run_again() -> Result<()> {
    let schema = SqliteSchema::new();
    let text = schema.sql();
    let statements: Vec<&str> = text.split_inclusive(";\n").collect();
    for failed in 0..statements.len() {
        let folder = tempfile::tempdir()?;
        let options = SqliteConnectOptions::new().filename(folder.path().join("shop.db"));
        let mut connection = options.clone().create_if_missing(true).connect().await?;
        for (n, statement) in statements.iter().enumerate() {
            if n != failed {
                _ = run(&mut connection, *statement).await;
            }
        }
        schema.migrate(&mut connection).await.expect(statements[failed]);
        SqliteStore::from_options(options, &schema).open().await.expect(statements[failed]);
    }
    Ok(())
}

#[tokio::test]
async fn beside_a_table_of_somebody_else_no_version_is_noted() -> Result<()> {
    let schema = SqliteSchema::new();
    let names = ["outbox", "outbox_lane", "outbox_worker", "outbox_dead", "outbox_delivered"];
    for theirs in names.into_iter().chain(["outbox_inbox", "outbox_meta"]) {
        let folder = tempfile::tempdir()?;
        let options = SqliteConnectOptions::new().filename(folder.path().join("shop.db"));
        let mut connection = options.clone().create_if_missing(true).connect().await?;
        // Such as go-outbox's.
        run(&mut connection, format!("CREATE TABLE {theirs} (id TEXT, data BLOB, state INTEGER)"))
            .await?;
        let mut refused = 0;
        for statement in schema.sql().split_inclusive(";\n") {
            refused += usize::from(run(&mut connection, statement).await.is_err());
        }
        assert!(refused > 0, "{theirs}");
        let error = schema.migrate(&mut connection).await.expect_err(theirs);
        assert_eq!(error.kind(), StoreErrorKind::Schema, "{theirs}: {error:?}");
        let store = SqliteStore::from_options(options, &schema);
        assert_eq!(store.open().await.expect_err(theirs).kind(), StoreErrorKind::Schema);
        run(&mut connection, format!("ALTER TABLE {theirs} RENAME TO theirs")).await?;
        schema.migrate(&mut connection).await.expect(theirs);
        store.open().await.expect(theirs);
    }
    Ok(())
}

/// SQLite comes with the lock file: an old one, which may damage the database, is noticed here.
#[tokio::test]
async fn the_sqlite_that_is_built_here_needs_no_warning() -> Result<()> {
    assert_eq!(Lab::new().await?.store.open().await?.warnings, [""; 0]);
    Ok(())
}
