//! What holds for any message that is added, and any row that plain SQL can write.

use std::cell::{Cell, RefCell};

use outbox_core::MessageId;
use outbox_core::message::Limits;
use outbox_core::store::StoreErrorKind;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::{FileFailurePersistence, TestRunner};
use tokio::runtime::Runtime;

use super::*;

/// Each input is a few statements. Those that failed once are kept beside this file.
fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct("tests/sqlite/properties.regressions.txt");
    ProptestConfig {
        cases: 128,
        failure_persistence: Some(Box::new(file)),
        ..ProptestConfig::default()
    }
}

prop_compose! {
    fn any_message()(
        topic in "[a-zA-Z0-9._-]{3,40}",
        id: [u8; 16],
        key in option::of(vec(any::<u8>(), 0..40)),
        payload in option::of(vec(any::<u8>(), 0..200)),
        partition in option::of(0..=i32::MAX),
        headers in vec(("[!-~]{1,20}", option::of(vec(any::<u8>(), 0..40))), 0..6),
    ) -> Message {
        let mut message = Message::builder(topic).id(MessageId::from_bytes(id));
        message = match payload {
            Some(payload) => message.payload(payload),
            None => message.tombstone(),
        };
        if let Some(key) = key {
            message = message.key(key);
        }
        if let Some(partition) = partition {
            message = message.partition(partition);
        }
        for (name, value) in headers.into_iter().filter(|(name, _)| !name.starts_with("outbox-")) {
            message = match value {
                Some(value) => message.header(name, value),
                None => message.null_header(name),
            };
        }
        message.build().expect("nothing of it is forbidden")
    }
}

/// A value of any type that SQLite has.
#[derive(Debug, Clone)]
enum Value {
    Null,
    Int(i64),
    Real(f64),
    Text(String),
    Blob(Vec<u8>),
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        prop_oneof![-2_i64..5, any::<i64>()].prop_map(Value::Int),
        any::<f64>().prop_map(Value::Real),
        prop_oneof!["[a-z.]{0,9}", any::<String>()].prop_map(Value::Text),
        vec(any::<u8>(), 0..20).prop_map(Value::Blob),
    ]
}

/// The six columns that plain SQL writes: mostly as they should be.
fn any_row() -> impl Strategy<Value = [Value; 6]> {
    let id = prop_oneof![
        4 => any::<[u8; 16]>().prop_map(|id| Value::Blob(id.to_vec())),
        1 => any_value(),
    ];
    let topic = prop_oneof![
        4 => "[a-z]{1,9}".prop_map(Value::Text),
        1 => any_value(),
    ];
    let headers = prop_oneof![
        Just(Value::Null),
        Just(Value::Text(r#"{"tenant": "7"}"#.to_owned())),
        Just(Value::Text(r#"[["a", null], ["outbox-id", "x"]]"#.to_owned())),
        any_value(),
    ];
    let partition = prop_oneof![3 => Just(Value::Null), 1 => any_value()];
    (id, topic, any_value(), partition, headers, any_value()).prop_map(
        |(id, topic, key, partition, headers, payload)| {
            [id, topic, key, partition, headers, payload]
        },
    )
}

async fn insert(connection: &mut SqliteConnection, row: [Value; 6]) -> Result<(), sqlx::Error> {
    let mut query = sqlx::query(
        "INSERT INTO outbox (message_id, topic, message_key, partition_no, headers, payload) \
         VALUES (?, ?, ?, ?, ?, ?)",
    );
    for value in row {
        query = match value {
            Value::Null => query.bind(None::<i64>),
            Value::Int(value) => query.bind(value),
            Value::Real(value) => query.bind(value),
            Value::Text(value) => query.bind(value),
            Value::Blob(value) => query.bind(value),
        };
    }
    query.execute(connection).await.map(|_| ())
}

/// A lab and a connection that does not wait for the disk.
fn bench() -> (Runtime, Lab, RefCell<SqliteConnection>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (lab, connection) = runtime.block_on(async {
        let lab = Lab::new().await.expect("a lab");
        let mut connection = lab.connect().await.expect("a connection");
        run(&mut connection, "PRAGMA synchronous = OFF").await.expect("a setting");
        (lab, connection)
    });
    (runtime, lab, RefCell::new(connection))
}

#[test]
fn any_message_comes_back_from_its_row() {
    let (runtime, lab, connection) = bench();
    let checked = TestRunner::new(config()).run(&vec(any_message(), 1..6), |messages| {
        let mut connection = connection.borrow_mut();
        let claimed = runtime.block_on(async {
            run(&mut connection, "DELETE FROM outbox").await?;
            let mut tx = connection.begin().await?;
            let outbox = lab.outbox.clone().with_limits(Limits::default().max_headers(10, 10_000));
            outbox.add_all(&mut tx, messages.clone()).await?;
            tx.commit().await?;
            anyhow::Ok(deliveries(lab.page().await?))
        });
        let claimed = claimed.map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        let claimed: Vec<Message> = claimed.into_iter().map(|row| row.message).collect();
        prop_assert_eq!(claimed, messages);
        Ok(())
    });
    checked.expect("the property holds");
}

#[test]
fn whatever_plain_sql_can_write_is_claimed_and_what_is_no_message_is_a_value() {
    let (runtime, lab, connection) = bench();
    // How many rows were claimed as a message, and how many as unreadable.
    let seen = Cell::new((0, 0));
    let checked = TestRunner::new(config()).run(&vec(any_row(), 1..8), |rows| {
        let mut connection = connection.borrow_mut();
        let (accepted, reply) = runtime
            .block_on(async {
                run(&mut connection, "DELETE FROM outbox").await?;
                let mut accepted = 0;
                for row in rows {
                    accepted += usize::from(insert(&mut connection, row).await.is_ok());
                }
                anyhow::Ok((accepted, lab.page().await?))
            })
            .map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
        prop_assert_eq!(reply.rows.len(), accepted);
        let (mut good, mut bad) = seen.get();
        for row in reply.rows {
            match row {
                Claimed::Delivery(_) => good += 1,
                Claimed::Unreadable(_) => bad += 1,
                other => return Err(TestCaseError::fail(format!("{other:?}"))),
            }
        }
        seen.set((good, bad));
        Ok(())
    });
    checked.expect("the property holds");
    let (good, bad) = seen.get();
    assert!(good > 20 && bad > 20, "{good} messages, {bad} unreadable: too few to say anything");
}

#[test]
fn a_prefix_is_a_plain_word_or_refused() {
    let prefix = prop_oneof!["[A-Za-z_][A-Za-z0-9_]{0,40}", "\\PC{0,6}", any::<String>()];
    let checked = TestRunner::new(config()).run(&prefix, |prefix| {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let expected = (1..=32).contains(&prefix.len())
            && prefix.chars().all(word)
            && !prefix.starts_with(|c: char| c.is_ascii_digit());
        match SqliteSchema::new().with_prefix(&prefix) {
            Ok(schema) => {
                prop_assert!(expected, "{:?}", prefix);
                let table = format!("CREATE TABLE IF NOT EXISTS {prefix}outbox (");
                prop_assert!(schema.sql().contains(&table));
            }
            Err(error) => {
                prop_assert!(!expected, "{:?}", prefix);
                prop_assert_eq!(error.kind(), StoreErrorKind::Invalid);
            }
        }
        Ok(())
    });
    checked.expect("the property holds");
}
