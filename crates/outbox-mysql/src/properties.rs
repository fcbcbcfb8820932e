//! What holds for any input: headers, names, and the statement that adds messages.

use std::collections::HashSet;

use outbox_core::message::{Headers, MessageId};
use outbox_core::{Message, store::StoreErrorKind};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

use crate::headers;
use crate::insert::{MySqlInsert, SqlValue};
use crate::schema::MySqlSchema;
use crate::tables::Tables;
use crate::text::{Hex, List};

/// The longest name of a table, an index or a constraint on either server.
const NAME: usize = 64;

/// Inputs that failed once are kept beside this file and tried first.
pub(crate) fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct("src/properties.regressions.txt");
    ProptestConfig { failure_persistence: Some(Box::new(file)), ..ProptestConfig::default() }
}

prop_compose! {
    /// Pairs that an application may put on a message.
    pub(crate) fn any_headers()(
        pairs in vec(("[!-~]{1,20}", option::of(vec(any::<u8>(), 0..40))), 0..6),
    ) -> Vec<(String, Option<Vec<u8>>)> {
        pairs.into_iter().filter(|(name, _)| !name.starts_with("outbox-")).collect()
    }
}

prop_compose! {
    pub(crate) fn any_message()(
        topic in "[a-zA-Z0-9._-]{3,40}",
        id: [u8; 16],
        key in option::of(vec(any::<u8>(), 0..40)),
        payload in option::of(vec(any::<u8>(), 0..200)),
        partition in option::of(0..=i32::MAX),
        headers in any_headers(),
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
        for (name, value) in headers {
            message = match value {
                Some(value) => message.header(name, value),
                None => message.null_header(name),
            };
        }
        message.build().expect("nothing of it is forbidden")
    }
}

/// JSON that somebody may have written in plain SQL, near to what is valid and far from it.
fn any_json() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::{Map, Value, json};
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(|number| json!(number)),
        "[A-Za-z0-9+/=]{0,8}".prop_map(Value::String),
        any::<String>().prop_map(Value::String),
        "[A-Za-z0-9+/=]{0,8}".prop_map(|text| json!({ "b64": text })),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let name = prop_oneof![Just("b64".to_owned()), "[a-z]{1,3}"];
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::Array),
            vec((name, inner), 0..4).prop_map(|pairs| Value::Object(Map::from_iter(pairs))),
        ]
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn headers_come_back_from_what_is_stored(pairs in any_headers()) {
        let mut headers = Headers::default();
        for (name, value) in &pairs {
            headers.append(name.clone(), value.clone()).expect("the name is valid");
        }
        match headers::encode(&headers) {
            None => prop_assert!(pairs.is_empty()),
            Some(stored) => {
                prop_assert!(std::str::from_utf8(&stored).is_ok());
                prop_assert_eq!(headers::decode(&stored), Some(pairs));
            }
        }
    }

    #[test]
    fn no_bytes_make_reading_headers_panic(
        bytes in vec(any::<u8>(), 0..100),
        json in any_json(),
        cut in any::<prop::sample::Index>(),
    ) {
        _ = headers::decode(&bytes);
        let mut text = json.to_string().into_bytes();
        _ = headers::decode(&text);
        text.truncate(cut.index(text.len()));
        _ = headers::decode(&text);
    }

    #[test]
    fn headers_that_are_read_can_be_stored_and_read_again(json in any_json()) {
        let Some(pairs) = headers::decode(json.to_string().as_bytes()) else { return Ok(()) };
        let mut headers = Headers::default();
        for (name, value) in &pairs {
            // A name that Kafka refuses makes the row unreadable, see `row`.
            if headers.append(name.clone(), value.clone()).is_err() {
                return Ok(());
            }
        }
        let stored = headers::encode(&headers).unwrap_or_else(|| b"null".to_vec());
        prop_assert_eq!(headers::decode(&stored), Some(pairs));
    }

    #[test]
    fn a_prefix_is_a_plain_word_or_refused(
        prefix in prop_oneof!["[A-Za-z_][A-Za-z0-9_]{0,40}", "\\PC{0,6}", any::<String>()],
    ) {
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let expected = (1..=32).contains(&prefix.len())
            && prefix.chars().all(word)
            && !prefix.starts_with(|c: char| c.is_ascii_digit());
        match Tables::with_prefix(&prefix) {
            Ok(tables) => {
                prop_assert!(expected, "{:?}", prefix);
                prop_assert_eq!(&tables.prefix, &prefix);
            }
            Err(error) => {
                prop_assert!(!expected, "{:?}", prefix);
                prop_assert_eq!(error.kind(), StoreErrorKind::Invalid);
            }
        }
    }

    #[test]
    fn every_name_in_the_ddl_carries_the_prefix_and_fits(
        prefix in "[A-Za-z_][A-Za-z0-9_]{0,31}",
        lanes in 1..=MySqlSchema::MAX_LANES,
    ) {
        let schema = MySqlSchema::new().with_prefix(&prefix).expect("a plain word");
        let sql = schema.with_lanes(lanes).expect("in range").sql();
        let code = sql.lines().map(|line| line.split("--").next().unwrap_or_default());
        let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let words = code.flat_map(|line| line.split(move |c| !word(c)));
        let mut tables = HashSet::new();
        // `outbox_id` is a column.
        for word in words.filter(|word| word.contains("outbox") && *word != "outbox_id") {
            prop_assert!(word.len() <= NAME, "{} is too long", word);
            prop_assert!(word.starts_with(&prefix), "{} lacks the prefix {}", word, prefix);
            tables.insert(word);
        }
        prop_assert!(tables.len() >= 8, "{:?}", tables);
    }

    #[test]
    fn an_insert_has_a_mark_for_every_value_and_no_content_in_its_text(
        messages in vec(any_message(), 1..5),
    ) {
        let insert = MySqlInsert::new(&MySqlSchema::new(), &messages);
        let values = insert.values();
        prop_assert_eq!(values.len(), 6 * messages.len());
        let (head, marks) = insert.sql().split_once(" VALUES ").expect("an insert");
        prop_assert!(!head.contains('?'));
        prop_assert_eq!(marks, vec!["(?, ?, ?, ?, ?, ?)"; messages.len()].join(", "));
        for (message, values) in messages.iter().zip(values.chunks(6)) {
            prop_assert_eq!(&values[0], &SqlValue::Bytes(message.id().as_bytes().to_vec()));
            prop_assert_eq!(&values[1], &SqlValue::Text(message.topic().to_owned()));
        }
    }

    #[test]
    fn lists_and_literals_are_digits_and_commas_only(
        numbers in vec(any::<u64>(), 1..50),
        bytes in vec(any::<u8>(), 0..70),
    ) {
        let list = List(&numbers).to_string();
        let parsed: Result<Vec<u64>, _> = list.split(',').map(str::parse).collect();
        prop_assert_eq!(parsed.as_ref(), Ok(&numbers));
        let literal = Hex(&bytes).to_string();
        let digits = literal.strip_prefix("x'").and_then(|rest| rest.strip_suffix('\''));
        let digits = digits.expect("a literal");
        let pairs = digits.as_bytes().chunks(2);
        let back: Vec<u8> = pairs
            .map(|pair| {
                let pair = std::str::from_utf8(pair).expect("ASCII");
                u8::from_str_radix(pair, 16).expect("hexadecimal")
            })
            .collect();
        prop_assert_eq!(back, bytes);
    }
}
