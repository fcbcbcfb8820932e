//! Bad input: a clear error, and nothing lost.

use outbox_core::message::{Limits, MessageErrorKind};
use outbox_core::store::StoreErrorKind;
use outbox_core::{AddErrorKind, Dispatcher, RunErrorKind};
use outbox_testing::MemoryBroker;

use super::*;

fn kind<T>(result: Result<T, outbox_core::store::StoreError>) -> Option<StoreErrorKind> {
    result.err().map(|error| error.kind())
}

on_both! {
    async fn a_message_that_breaks_a_limit_leaves_the_transaction_as_it_was(lab: Lab) -> Result<()> {
        use MessageErrorKind as K;
        let outbox = lab.outbox.clone().with_limits(
            Limits::default().max_message_bytes(1_000).max_headers(1, 100).topics(["orders"]),
        );
        let large = || Message::builder("orders").key("k").payload(vec![0; 1_000]);
        let bad = [
            (Message::builder("typo").payload("p").build()?, K::TopicNotAllowed),
            (large().build()?, K::TooLarge),
            (Message::builder("orders").payload("p").header("a", "1").header("b", "2").build()?, K::Header),
        ];
        let mut connection = lab.connect().await?;
        let mut tx = connection.begin().await?;
        outbox.add(&mut tx, message("before")).await?;
        for (bad, expected) in bad {
            let error = outbox.add_all(&mut tx, [message("with"), bad]).await.expect_err("a limit");
            assert_eq!(error.kind(), AddErrorKind::Message(expected));
        }
        outbox.add(&mut tx, message("after")).await?;
        tx.commit().await?;
        let pending = lab.pending().await?;
        let keys: Vec<_> = pending.iter().map(Message::key).collect();
        assert_eq!(keys, [Some(&b"before"[..]), Some(&b"after"[..])]);
        Ok(())
    }

    async fn another_schema_version_stops_a_dispatcher_before_it_claims(lab: Lab) -> Result<()> {
        lab.add(vec![message("k")]).await?;
        let mut connection = lab.connect().await?;
        for (change, undo) in [
            ("UPDATE outbox_meta SET schema_version = 2", "UPDATE outbox_meta SET schema_version = 1"),
            ("UPDATE outbox_meta SET schema_version = 0", "UPDATE outbox_meta SET schema_version = 1"),
            ("DELETE FROM outbox_meta", "INSERT INTO outbox_meta (schema_version, lanes) VALUES (1, 4)"),
            ("RENAME TABLE outbox_held TO away", "RENAME TABLE away TO outbox_held"),
            ("ALTER TABLE outbox RENAME COLUMN revision TO r", "ALTER TABLE outbox RENAME COLUMN r TO revision"),
            ("DELETE FROM outbox_lane WHERE lane = 2", "INSERT INTO outbox_lane (lane) VALUES (2)"),
        ] {
            run(&mut connection, change).await?;
            assert_eq!(kind(lab.schema.check(&mut connection).await), Some(StoreErrorKind::Schema), "{change}");
            let connected = MySqlStore::connect(&lab.url, &lab.schema).await;
            assert_eq!(kind(connected), Some(StoreErrorKind::Schema), "{change}");
            let broker = MemoryBroker::new();
            let dispatcher = Dispatcher::builder(lab.store.clone(), broker.clone()).build()?;
            let ended = dispatcher.run(std::future::pending()).await.expect_err("the schema");
            assert_eq!(ended.kind(), RunErrorKind::Store(StoreErrorKind::Schema), "{change}");
            assert!(broker.published().is_empty());
            run(&mut connection, undo).await?;
        }
        lab.schema.check(&mut connection).await?;
        assert_eq!(lab.pending().await?.len(), 1);
        Ok(())
    }

    async fn without_tables_the_error_names_the_schema(lab: Lab) -> Result<()> {
        let elsewhere = MySqlSchema::new().with_prefix("none_")?;
        let mut connection = lab.connect().await?;
        assert_eq!(kind(elsewhere.check(&mut connection).await), Some(StoreErrorKind::Schema));
        let outbox = MySqlOutbox::new(MySqlWriter::new(&elsewhere));
        let mut tx = connection.begin().await?;
        let error = outbox.add(&mut tx, message("k")).await.expect_err("no table");
        assert_eq!(error.kind(), AddErrorKind::Store(StoreErrorKind::Schema));
        Ok(())
    }

    async fn a_newer_schema_is_not_migrated_back(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        run(&mut connection, "UPDATE outbox_meta SET schema_version = 7").await?;
        assert_eq!(kind(lab.schema.migrate(&mut connection).await), Some(StoreErrorKind::Schema));
        assert_eq!(number(&mut connection, "SELECT CAST(schema_version AS SIGNED) FROM outbox_meta").await?, 7);
        Ok(())
    }

    async fn a_wrong_password_is_denied_and_not_retried_for_ever(lab: Lab) -> Result<()> {
        let url = lab.url.replacen("outbox:outbox@", "outbox:wrong@", 1);
        if url == lab.url {
            return Ok(()); // A given server with an account of another name.
        }
        let store = MySqlStore::from_options(url.parse()?, &lab.schema);
        assert_eq!(kind(store.open().await), Some(StoreErrorKind::Denied));
        let dispatcher = Dispatcher::builder(store, MemoryBroker::new()).build()?;
        let ended = dispatcher.run(std::future::pending()).await.expect_err("the password");
        assert_eq!(ended.kind(), RunErrorKind::Store(StoreErrorKind::Denied));
        Ok(())
    }
}
