//! Messages enter with the caller's transaction, and never without one.

use outbox_core::store::StoreErrorKind;
use outbox_core::{AddError, AddErrorKind};

use super::*;

fn refused(added: Result<outbox_core::MessageId, AddError>) -> Option<AddErrorKind> {
    added.err().map(|error| error.kind())
}

on_both! {
    async fn add_without_a_transaction_is_refused(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        let added = lab.outbox.add(&mut connection, message("k")).await;
        assert_eq!(refused(added), Some(AddErrorKind::NoTransaction));
        assert_eq!(lab.pending().await?, []);
        Ok(())
    }

    async fn no_sql_mode_lets_an_add_without_a_transaction_pass(lab: Lab) -> Result<()> {
        let mut modes = vec!["", "TRADITIONAL", "ANSI", "NO_UNSIGNED_SUBTRACTION",
            "NO_BACKSLASH_ESCAPES", "HIGH_NOT_PRECEDENCE", "PIPES_AS_CONCAT,REAL_AS_FLOAT"];
        if lab.engine == Engine::MariaDb {
            modes.extend(["ORACLE", "MSSQL", "SIMULTANEOUS_ASSIGNMENT"]);
        }
        for mode in modes {
            let mut connection = lab.connect().await?;
            run(&mut connection, format!("SET sql_mode = '{mode}'")).await?;
            let outbox = MySqlOutbox::new(MySqlWriter::new(&lab.schema));
            // One row, several of one statement, several statements.
            for count in [1, 4, 20] {
                let messages: Vec<_> = (0..count).map(|n| message(&n.to_string())).collect();
                let added = outbox.add_all(&mut connection, messages.clone()).await;
                let kind = added.err().map(|error| error.kind());
                assert_eq!(kind, Some(AddErrorKind::NoTransaction), "{count} under {mode}");
                assert_eq!(lab.pending().await?, [], "{count} under {mode}");
                // By the same prepared statement. BEGIN is another thing to Oracle.
                let mut tx = connection.begin_with("START TRANSACTION").await?;
                outbox.add_all(&mut tx, messages.clone()).await?;
                tx.commit().await?;
                assert_eq!(lab.pending().await?, messages, "{count} under {mode}");
                run(&mut connection, "DELETE FROM outbox").await?;
            }
        }
        Ok(())
    }

    async fn one_message_is_one_statement_where_the_server_can(lab: Lab) -> Result<()> {
        async fn statements(connection: &mut MySqlConnection) -> Result<i64> {
            let sql = "SHOW SESSION STATUS LIKE 'Questions'";
            let row: (String, String) = sqlx::query_as(sql).fetch_one(connection).await?;
            Ok(row.1.parse()?)
        }
        let mut connection = lab.connect().await?;
        let mut tx = connection.begin().await?;
        lab.outbox.add(&mut tx, message("prepares")).await?;
        let before = statements(&mut tx).await?;
        lab.outbox.add(&mut tx, message("k")).await?;
        let after = statements(&mut tx).await?;
        let expected = match lab.engine {
            Engine::MariaDb => 1,
            // A savepoint, its release, and the INSERT.
            Engine::MySql => 3,
        };
        assert_eq!(after - before - 1, expected);
        Ok(())
    }

    async fn an_answer_to_something_else_is_no_confirmation(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        run(&mut connection, "BEGIN").await?;
        lab.outbox.add(&mut connection, message("prepares")).await?;
        lose_step(&mut connection).await;
        let added = lab.outbox.add(&mut connection, message("k")).await;
        assert_eq!(refused(added), Some(AddErrorKind::Store(StoreErrorKind::Unavailable)));
        Ok(())
    }

    async fn add_after_a_deadlock_is_refused(lab: Lab) -> Result<()> {
        let mut one = lab.connect().await?;
        let mut two = lab.connect().await?;
        run(&mut one, "CREATE TABLE t (id INT PRIMARY KEY); INSERT INTO t VALUES (1), (2)").await?;
        let mut tx = one.begin().await?;
        run(&mut tx, "DELETE FROM t WHERE id = 1").await?;
        // The victim is the lighter transaction: the other one gets some weight.
        run(&mut two, "BEGIN; CREATE TEMPORARY TABLE w (id INT); INSERT INTO w VALUES (1), (2)")
            .await?;
        run(&mut two, "DELETE FROM t WHERE id = 2; INSERT INTO t VALUES (3), (4), (5), (6)")
            .await?;
        let blocked = tokio::spawn(async move {
            let done = run(&mut two, "DELETE FROM t WHERE id = 1; COMMIT").await;
            (two, done)
        });
        tokio::time::sleep(Duration::from_millis(300)).await;
        let deadlock = run(&mut tx, "DELETE FROM t WHERE id = 2").await;
        assert!(deadlock.is_err_and(|error| format!("{error:#}").contains("1213")));
        // sqlx still believes in its transaction.
        let added = lab.outbox.add(&mut tx, message("ghost")).await;
        assert_eq!(refused(added), Some(AddErrorKind::NoTransaction));
        tx.rollback().await?;
        blocked.await?.1?;
        assert_eq!(lab.pending().await?, []);
        Ok(())
    }

    async fn add_after_an_implicit_commit_is_refused(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        let mut tx = connection.begin().await?;
        run(&mut tx, "CREATE TABLE t (id INT)").await?;
        let added = lab.outbox.add(&mut tx, message("ghost")).await;
        assert_eq!(refused(added), Some(AddErrorKind::NoTransaction));
        tx.rollback().await?;
        assert_eq!(lab.pending().await?, []);
        Ok(())
    }

    async fn add_is_accepted_in_every_kind_of_transaction(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        run(&mut connection, "BEGIN").await?;
        lab.outbox.add(&mut connection, message("raw")).await?;
        run(&mut connection, "COMMIT; SET autocommit = 0; SELECT 1 FROM outbox").await?;
        lab.outbox.add(&mut connection, message("autocommit")).await?;
        run(&mut connection, "COMMIT; SET autocommit = 1").await?;
        run(&mut connection, "XA START 'a'").await?;
        lab.outbox.add(&mut connection, message("xa")).await?;
        run(&mut connection, "XA END 'a'; XA COMMIT 'a' ONE PHASE").await?;
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
        assert_eq!(keys, [&b"raw"[..], b"autocommit", b"xa", b"savepoint"]);
        Ok(())
    }

    async fn add_sees_a_transaction_that_autocommit_off_has_not_begun_yet(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        run(&mut connection, "SET autocommit = 0").await?;
        lab.outbox.add(&mut connection, message("k")).await?;
        assert_eq!(lab.pending().await?, []);
        run(&mut connection, "COMMIT").await?;
        assert_eq!(lab.pending().await?.len(), 1);
        Ok(())
    }

    async fn a_rolled_back_message_is_never_claimed(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        let mut tx = connection.begin().await?;
        lab.outbox.add(&mut tx, message("k")).await?;
        assert_eq!(lab.writer.pending(&mut tx).await?.len(), 1);
        assert_eq!(lab.page().await?.rows.len(), 0);
        tx.rollback().await?;
        assert_eq!(lab.page().await?.rows.len(), 0);
        Ok(())
    }

    async fn many_messages_are_added_in_order_all_or_none(lab: Lab) -> Result<()> {
        let messages: Vec<_> = (0..300).map(|n| message(&n.to_string())).collect();
        lab.add(messages.clone()).await?;
        assert_eq!(lab.pending().await?, messages);

        // The last one is refused by a CHECK; the caller goes on and commits nevertheless.
        let outbox = lab.outbox.clone().with_limits(
            outbox_core::message::Limits::default().max_message_bytes(100 * MEGABYTE),
        );
        let large = vec![0; 15 * MEGABYTE + 1];
        let large = Message::builder("orders").payload(large).build()?;
        let mut connection = lab.connect().await?;
        let mut tx = connection.begin().await?;
        let added = outbox.add_all(&mut tx, messages.into_iter().chain([large])).await;
        let kind = added.err().map(|error| error.kind());
        assert_eq!(kind, Some(AddErrorKind::Store(StoreErrorKind::Invalid)));
        tx.commit().await?;
        assert_eq!(lab.pending().await?.len(), 300);
        Ok(())
    }

    async fn everything_comes_back_byte_for_byte(lab: Lab) -> Result<()> {
        let all_bytes: Vec<u8> = (0..=255).collect();
        let large: Vec<u8> = (0..900_000u32).map(|n| ((n * 31) >> 3) as u8).collect();
        let messages = vec![
            Message::builder("t").payload(all_bytes.clone()).key(all_bytes.clone()).build()?,
            Message::builder("t").payload("").key("").build()?,
            Message::builder("t").tombstone().build()?,
            Message::builder("t").payload(large).partition(3).build()?,
            Message::builder("t")
                .payload("'; DROP TABLE outbox; --\\")
                .key("\\'\"")
                .header("a", "1")
                .null_header("b")
                .header("a", all_bytes)
                .header("é".replace('é', "utf8"), "é")
                .build()?,
            Message::builder(&*"x".repeat(249)).payload("p").key(vec![0xff; 1024]).build()?,
        ];
        for mode in ["DEFAULT", "''", "'NO_BACKSLASH_ESCAPES,ANSI_QUOTES'"] {
            let mut connection = lab.connect().await?;
            run(&mut connection, format!("SET sql_mode = {mode}; DELETE FROM outbox")).await?;
            let mut tx = connection.begin().await?;
            lab.outbox.add_all(&mut tx, messages.clone()).await?;
            tx.commit().await?;
            let claimed: Vec<_> =
                deliveries(lab.page().await?).into_iter().map(|d| d.message).collect();
            assert_eq!(claimed, messages, "{mode}");
            assert_eq!(lab.pending().await?, messages, "{mode}");
        }
        if lab.engine == Engine::MariaDb {
            // It would make null of what is empty.
            let mut connection = lab.connect().await?;
            run(&mut connection, "SET sql_mode = 'EMPTY_STRING_IS_NULL'; DELETE FROM outbox").await?;
            let mut tx = connection.begin().await?;
            let error = lab.outbox.add_all(&mut tx, messages).await.expect_err("it cannot");
            assert_eq!(error.kind(), AddErrorKind::Store(StoreErrorKind::Unsupported));
            tx.commit().await?;
            assert_eq!(lab.pending().await?, []);
        }
        Ok(())
    }

    async fn keys_that_differ_in_case_or_trailing_space_are_distinct(lab: Lab) -> Result<()> {
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

    async fn a_wrong_lane_is_refused(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        let insert = "INSERT INTO outbox (message_id, topic, message_key, payload, lane) \
                      SELECT x'00112233445566778899aabbccddeeff', 't', 'k', 'p', \
                      (CRC32('k') + 1) MOD 4";
        let error = run(&mut connection, insert).await.expect_err("the lane is wrong");
        let number = match lab.engine { Engine::MariaDb => "4025", Engine::MySql => "3819" };
        assert!(format!("{error:#}").contains(number), "{error:#}");
        Ok(())
    }

    async fn what_does_not_fit_is_refused_and_never_cut(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        run(&mut connection, "SET sql_mode = ''").await?;
        for (column, bytes) in [("message_key", 1025), ("message_key", 5000), ("topic", 250),
            ("topic", 300), ("headers", 65537), ("payload", 15 * MEGABYTE + 1)]
        {
            let mut columns = [("topic", "'t'".to_owned()), ("message_key", "'k'".to_owned()),
                ("headers", "NULL".to_owned()), ("payload", "NULL".to_owned())];
            for (name, value) in &mut columns {
                if *name == column {
                    *value = format!("REPEAT('x', {bytes})");
                }
            }
            let values: Vec<_> = columns.iter().map(|(_, value)| value.as_str()).collect();
            let insert = format!(
                "INSERT INTO outbox (message_id, topic, message_key, headers, payload) \
                 VALUES (x'00112233445566778899aabbccddeeff', {})",
                values.join(", ")
            );
            run(&mut connection, insert).await.expect_err(column);
        }
        for (id, partition) in [
            ("'01890a5d-ac96-774b-bcce-b302099a8057'", "NULL"),
            ("x'00112233445566778899aabbccddee'", "NULL"),
            ("x'00112233445566778899aabbccddeeff00'", "NULL"),
            ("NULL, NULL), ('t', NULL", "NULL"),
            ("x'00112233445566778899aabbccddeeff'", "-1"),
        ] {
            let insert = format!(
                "INSERT INTO outbox (topic, message_id, partition_no) VALUES ('t', {id}, {partition})"
            );
            run(&mut connection, insert).await.expect_err(id);
        }
        run(&mut connection, "INSERT INTO outbox (topic) VALUES ('t')").await.expect_err("no id");
        assert_eq!(number(&mut connection, "SELECT COUNT(*) FROM outbox").await?, 0);
        Ok(())
    }

    async fn the_largest_headers_come_back_byte_for_byte(lab: Lab) -> Result<()> {
        let header = |name: &str, value: &[u8], count: usize| {
            let mut message = Message::builder("orders").key("k").payload("p");
            let value: Vec<u8> = value.iter().copied().cycle().take(16_384 / count - 1).collect();
            for _ in 0..count {
                message = message.header(name, value.clone());
            }
            message.build().expect("valid")
        };
        let values: [&[u8]; 4] = [b"\0", b"\"", b"\xff", "é\n".as_bytes()];
        let messages = values.iter().flat_map(|v| [1, 64].map(|n| header("h", v, n)));
        let messages: Vec<_> = messages.collect();
        lab.add(messages.clone()).await?;
        assert_eq!(lab.pending().await?, messages);
        let claimed = deliveries(lab.page().await?);
        let claimed: Vec<_> = claimed.into_iter().map(|delivery| delivery.message).collect();
        assert_eq!(claimed, messages);
        Ok(())
    }

    async fn plain_sql_is_claimed(lab: Lab) -> Result<()> {
        let mut connection = lab.connect().await?;
        run(&mut connection, "INSERT INTO outbox (message_id, topic, message_key, payload) \
             VALUES (x'00112233445566778899aabbccddeeff', 'orders', 'k', '{}')").await?;
        run(&mut connection, "INSERT INTO outbox (message_id, topic, headers, payload) \
             VALUES (x'00112233445566778899aabbccddee00', 'orders', '{\"tenant\": \"7\"}', '1')")
            .await?;
        let claimed = deliveries(lab.page().await?);
        assert_eq!(claimed[0].message.key(), Some(&b"k"[..]));
        assert_eq!(claimed[0].message.payload(), Some(&b"{}"[..]));
        assert_eq!(claimed[1].message.headers().get("tenant"), Some(&b"7"[..]));
        assert!(claimed[0].age < Duration::from_secs(5));
        Ok(())
    }

    async fn the_statement_and_its_values_serve_any_driver(lab: Lab) -> Result<()> {
        let message = Message::builder("t").key("k").payload("p").header("h", "v").build()?;
        let insert = outbox_mysql::MySqlInsert::new(&lab.schema, std::slice::from_ref(&message));
        let mut query = sqlx::query(AssertSqlSafe(insert.sql().to_owned()));
        for value in insert.values() {
            use outbox_mysql::SqlValue;
            query = match value {
                SqlValue::Null => query.bind(None::<i64>),
                SqlValue::Int(value) => query.bind(*value),
                SqlValue::Text(value) => query.bind(value.clone()),
                SqlValue::Bytes(value) => query.bind(value.clone()),
            };
        }
        query.execute(&mut lab.connect().await?).await?;
        assert_eq!(lab.pending().await?, [message]);
        Ok(())
    }
}

/// What a writer learned of one server does no harm on the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_writer_is_safe_on_both_servers() -> Result<()> {
    let (Some(mariadb), Some(mysql)) =
        (Lab::new(Engine::MariaDb).await?, Lab::new(Engine::MySql).await?)
    else {
        return Ok(());
    };
    let outbox = MySqlOutbox::new(MySqlWriter::new(&mariadb.schema));
    for lab in [&mariadb, &mysql, &mariadb] {
        let mut connection = lab.connect().await?;
        let added = outbox.add(&mut connection, message("ghost")).await;
        assert_eq!(refused(added), Some(AddErrorKind::NoTransaction));
        let mut tx = connection.begin().await?;
        outbox.add(&mut tx, message("k")).await?;
        tx.rollback().await?;
        assert_eq!(lab.pending().await?, []);
    }
    Ok(())
}
