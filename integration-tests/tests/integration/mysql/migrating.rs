//! Migrations that meet tables of others, or that stopped half way.

use outbox_core::Dispatcher;
use outbox_core::store::{StoreError, StoreErrorKind};
use outbox_testing::MemoryBroker;

use super::*;

fn kind<T>(result: Result<T, StoreError>) -> Option<StoreErrorKind> {
    result.err().map(|error| error.kind())
}

/// Adds messages of many keys, and has each of them delivered; gives the number of lanes.
async fn deliver(lab: &Lab, schema: &MySqlSchema) -> Result<u16> {
    let outbox = MySqlOutbox::new(MySqlWriter::new(schema));
    let mut connection = lab.connect().await?;
    let mut tx = connection.begin().await?;
    outbox.add_all(&mut tx, (0..100).map(|n| message(&n.to_string()))).await?;
    tx.commit().await?;
    let store = MySqlStore::connect(&lab.url, schema).await?;
    let broker = MemoryBroker::new();
    let dispatcher = Dispatcher::builder(store.clone(), broker.clone()).build()?;
    let delivered = tokio::time::timeout(Duration::from_secs(60), dispatcher.run_until_empty());
    delivered.await.context("messages were left")??;
    assert_eq!(broker.published().len(), 100);
    Ok(store.open().await?.lanes.get())
}

/// The first statements of the whole DDL.
fn first(schema: &MySqlSchema, statements: usize) -> String {
    schema.sql().split_inclusive(";\n").take(statements).collect()
}

on_both! {
    async fn a_table_of_others_is_an_error_until_it_has_another_name(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        let ours = ["", "_lane", "_worker", "_held", "_dead", "_delivered", "_inbox", "_meta"];
        for (n, table) in ours.into_iter().enumerate() {
            let schema = MySqlSchema::new().with_prefix(&format!("t{n}_"))?;
            let table = format!("t{n}_outbox{table}");
            run(&mut connection, format!("CREATE TABLE {table} (state INT NOT NULL)")).await?;
            for _ in 0..2 {
                let migrated = schema.migrate(&mut connection).await;
                assert_eq!(kind(migrated), Some(StoreErrorKind::Schema), "{table}");
            }
            let checked = schema.check(&mut connection).await;
            assert_eq!(kind(checked), Some(StoreErrorKind::Schema), "{table}");
            run(&mut connection, format!("INSERT INTO {table} (state) VALUES (1)")).await?;
            run(&mut connection, format!("RENAME TABLE {table} TO {table}_theirs")).await?;
            schema.migrate(&mut connection).await.with_context(|| table.clone())?;
            assert_eq!(deliver(&lab, &schema).await?, 16, "{table}");
        }
        Ok(())
    }

    async fn a_migration_that_stopped_anywhere_is_ended_with_its_number_of_lanes(
        lab: Lab
    ) -> Result<()> {
        let mut connection = lab.connect().await?;
        let statements = lab.schema.sql().matches(";\n").count();
        assert!(statements > 10, "{statements}");
        for done in 1..=statements {
            let begun = MySqlSchema::new().with_prefix(&format!("t{done}_"))?;
            run(&mut connection, first(&begun, done)).await?;
            let ended = begun.with_lanes(4)?;
            ended.migrate(&mut connection).await.with_context(|| done.to_string())?;
            // The first statement makes the table that notes the number, the second notes it.
            let expected = if done == 1 { 4 } else { 16 };
            assert_eq!(deliver(&lab, &ended).await?, expected, "after {done} statements");
        }
        Ok(())
    }

    async fn tables_that_are_not_all_there_are_told_and_not_mixed_with_another_number_of_lanes(
        lab: Lab
    ) -> Result<()> {
        let mut connection = lab.connect().await?;
        let statements = lab.schema.sql().matches(";\n").count();
        for done in [2, statements - 1] {
            let begun = MySqlSchema::new().with_prefix(&format!("t{done}_"))?;
            run(&mut connection, first(&begun, done)).await?;
            let other = begun.clone().with_lanes(4)?;
            run(&mut connection, other.sql()).await.expect_err("another number of lanes");
            let error = MySqlStore::connect(&lab.url, &other).await.expect_err("it has not ended");
            assert_eq!(error.kind(), StoreErrorKind::Schema, "after {done} statements");
            if done > 2 {
                let cause = std::error::Error::source(&error).context("no cause")?.to_string();
                assert_eq!(cause, "a migration has not ended: run it again");
            }
            run(&mut connection, begun.sql()).await?;
            assert_eq!(deliver(&lab, &other).await?, 16, "after {done} statements");
            // And once it has ended, the text of any number changes nothing.
            run(&mut connection, other.sql()).await?;
            assert_eq!(deliver(&lab, &other).await?, 16, "after {done} statements");
        }
        Ok(())
    }

    async fn a_session_of_any_settings_can_migrate(lab: Lab) -> Result<()> {
        let mut settings =
            vec!["sql_safe_updates = 1", "autocommit = 0", "sql_mode = ''", "sql_mode = 'ANSI'"];
        if lab.engine == Engine::MariaDb {
            settings.push("sql_mode = 'ORACLE'");
        }
        for (n, setting) in settings.into_iter().enumerate() {
            let schema = MySqlSchema::new().with_prefix(&format!("t{n}_"))?;
            let mut connection = lab.connect().await?;
            run(&mut connection, format!("SET SESSION {setting}")).await?;
            schema.migrate(&mut connection).await.context(setting)?;
            assert_eq!(deliver(&lab, &schema).await?, 16, "{setting}");
        }
        Ok(())
    }

    async fn without_a_database_the_error_names_the_schema(lab: Lab) -> Result<()> {
        let (server, _) = lab.url.rsplit_once('/').context("a URL with a database")?;
        let connected = MySqlStore::connect(server, &lab.schema).await;
        assert_eq!(kind(connected), Some(StoreErrorKind::Schema));
        let mut connection = MySqlConnection::connect(server).await?;
        for _ in 0..2 {
            let migrated = lab.schema.migrate(&mut connection).await;
            assert_eq!(kind(migrated), Some(StoreErrorKind::Schema));
            let changed = lab.schema.change_lanes(&mut connection, 7).await;
            assert_eq!(kind(changed), Some(StoreErrorKind::Schema));
        }
        Ok(())
    }
}
