//! What holds for any row that is read, and for the statements of any claim and any settle.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use outbox_core::Message;
use outbox_core::delivery::{
    Failure, Lane, Lease, Position, Receipt, RowId, RowState, Settlement, Span,
};
use outbox_core::message::MessageId;
use outbox_core::store::{Claim, Claimed, Delivered, Failed, Page, Settle, StoreError};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use super::claim::{Part, Plan};
use super::row::LastTopic;
use super::{row, settle};
use crate::headers;
use crate::insert::{MySqlInsert, SqlValue};
use crate::properties::{any_message, config};
use crate::schema::MySqlSchema;
use crate::tables::Tables;
use crate::text::Columns;

/// A row as the text protocol brings it.
#[derive(Debug)]
struct Raw(Vec<Option<Vec<u8>>>);

impl Columns for Raw {
    fn bytes(&self, column: usize) -> Result<Option<&[u8]>, StoreError> {
        let value = self.0.get(column).ok_or(outbox_core::store::StoreErrorKind::Other)?;
        Ok(value.as_deref())
    }
}

fn text(number: &impl ToString) -> Option<Vec<u8>> {
    Some(number.to_string().into_bytes())
}

/// A message as its row is selected: what the insert binds, as text.
fn stored(message: &Message) -> Vec<Option<Vec<u8>>> {
    let insert = MySqlInsert::new(&MySqlSchema::new(), std::slice::from_ref(message));
    let column = |value: &SqlValue| match value {
        SqlValue::Null => None,
        SqlValue::Int(number) => text(number),
        SqlValue::Text(value) => text(value),
        SqlValue::Bytes(bytes) => Some(bytes.clone()),
    };
    insert.values().iter().map(column).collect()
}

/// A whole row: its place, no size, the content, age and state.
fn whole(content: Vec<Option<Vec<u8>>>, state: Option<&str>) -> Raw {
    let place = [text(&7), text(&3), None];
    let end = [text(&1_000), state.map(|state| state.as_bytes().to_vec())];
    Raw(place.into_iter().chain(content).chain(end).collect())
}

fn any_column() -> impl Strategy<Value = Option<Vec<u8>>> {
    option::of(prop_oneof![
        vec(any::<u8>(), 0..40),
        "-?[0-9]{0,24}".prop_map(String::into_bytes),
        "[a-z.]{0,9}".prop_map(String::into_bytes),
        "[0-9]{1,3}(,[0-9]{1,21}){0,6}".prop_map(String::into_bytes),
        Just(br#"[["a","1"],["outbox-id","x"]]"#.to_vec()),
        Just(br#"{"tenant": "7"}"#.to_vec()),
    ])
}

/// Spans in order and without overlap, narrow and wide.
fn any_spans() -> impl Strategy<Value = Vec<Span>> {
    let width = prop_oneof![1_u64..4, 30_u64..36, 1_000_u64..100_000];
    vec((1_u64..200_000, width), 0..150).prop_map(|steps| {
        let mut at = 0;
        let mut spans = Vec::new();
        for (gap, width) in steps {
            let first = at + gap;
            at = first + width;
            spans.push(Span::new(Position(first), Position(at - 1)));
        }
        spans
    })
}

/// The ids that a condition on the primary key lets through: listed ones, and ranges.
fn ids_of(condition: &str) -> Vec<(u64, u64)> {
    let number = |text: &str| text.parse().expect("a number");
    let arm = |arm: &str| {
        let arm = arm.trim_start_matches("o.");
        if let Some(list) = arm.strip_prefix("id IN (") {
            let list = list.strip_suffix(')').expect("its end");
            return list.split(',').map(|id| (number(id), number(id))).collect();
        }
        let range = arm.strip_prefix("id BETWEEN ").and_then(|range| range.split_once(" AND "));
        let (first, last) = range.expect("a range");
        vec![(number(first), number(last))]
    };
    condition.split(" OR ").flat_map(arm).collect()
}

/// Neighbouring ids as one range.
fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if before.1 + 1 == first => before.1 = last,
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// Whether a condition on `message_id` lets the row with this id and message through.
fn lets_through(condition: &str, id: u64, message: &str) -> bool {
    if condition.starts_with("IN (") {
        return condition.contains(&format!("x'{message}'"));
    }
    let literal = condition.strip_prefix("= SUBSTR(x'").expect("a literal");
    let (literal, place) = literal.split_once("', 1 + 16 * (o.id MOD ").expect("a place");
    let places: u64 = place.strip_suffix("), 16)").expect("its end").parse().expect("a number");
    assert_eq!(literal.len() as u64, 32 * places);
    let first = 32 * usize::try_from(id % places).expect("a place");
    literal[first..first + 32] == *message
}

/// The message of no row.
const STRANGER: MessageId = MessageId::from_bytes([0xff; 16]);

fn digits(message: MessageId) -> String {
    message.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Rows in the order of their ids, with runs of neighbours, near to each other and far apart.
fn any_delivered() -> impl Strategy<Value = Vec<Delivered>> {
    let gap = prop_oneof![4 => 1_u64..4, 1 => 180_u64..280, 1 => 1_u64..100_000];
    let runs = vec((gap, 1_u64..40), 0..60);
    (runs, any::<u64>(), any::<u32>()).prop_map(|(runs, seed, first)| {
        let mut positions = Vec::new();
        let mut at = u64::from(first);
        for (gap, length) in runs {
            positions.extend(at + gap..at + gap + length);
            at += gap + length;
        }
        let row = |at: u64| {
            let message = u128::from(seed) << 64 | u128::from(at);
            let id = RowId::new(Position(at), MessageId::from_bytes(message.to_be_bytes()));
            Delivered::new(id, Receipt::new(Some(-1), Some(i64::MIN)))
        };
        positions.into_iter().map(row).collect()
    })
}

fn any_settlement() -> impl Strategy<Value = Settlement> {
    prop_oneof![
        any::<u64>().prop_map(|millis| Settlement::Retry(Duration::from_millis(millis))),
        Just(Settlement::Held),
        Just(Settlement::Dead),
    ]
}

fn any_failed() -> impl Strategy<Value = Failed> {
    let row = (any::<u64>(), any::<[u8; 16]>(), any::<u16>(), any::<u64>());
    (row, any_settlement(), any::<String>()).prop_map(|((at, id, lane, epoch), settlement, why)| {
        let id = RowId::new(Position(at), MessageId::from_bytes(id));
        let lease = Lease::new(Lane(lane), epoch);
        let failure = Failure::new("failed", &why);
        Failed::new(id, lease, RowState::new(3, 4), 4, settlement, failure)
    })
}

proptest! {
    // Statements with thousands of ids are long: fewer inputs than elsewhere.
    #![proptest_config(ProptestConfig { cases: 48, ..config() })]

    #[test]
    fn a_message_comes_back_from_its_row(message in any_message()) {
        let claimed = row::read(&whole(stored(&message), None), &mut LastTopic::default()).expect("a row");
        let Claimed::Delivery(delivery) = claimed else {
            return Err(TestCaseError::fail(format!("{claimed:?}")));
        };
        prop_assert_eq!((delivery.position, delivery.lane), (Position(7), Lane(3)));
        prop_assert_eq!(delivery.state, RowState::new(0, 0));
        prop_assert_eq!(delivery.message, message);
    }

    #[test]
    fn a_row_of_any_content_is_a_value_and_never_an_error(
        id: [u8; 16],
        content in prop::array::uniform5(any_column()),
        recorded in option::of((any::<u32>(), any::<u32>(), 0_u8..2, any::<u64>(), 0_u8..2)),
    ) {
        let content: Vec<_> = [Some(id.to_vec())].into_iter().chain(content).collect();
        let recorded = recorded.map(|(attempts, revision, held, wait, retried)| {
            format!("{attempts},{revision},{held},{wait},{retried}")
        });
        let (topic, key) = (content[1].clone(), content[2].clone());
        match row::read(&whole(content, recorded.as_deref()), &mut LastTopic::default()).expect("a value") {
            Claimed::Delivery(delivery) => {
                prop_assert_eq!(delivery.message.id(), MessageId::from_bytes(id));
                prop_assert_eq!(Some(delivery.message.topic().as_bytes()), topic.as_deref());
                prop_assert_eq!(delivery.message.key(), key.as_deref());
            }
            Claimed::Unreadable(row) => {
                prop_assert_eq!(row.id.message, MessageId::from_bytes(id));
                prop_assert_eq!(row.key, key, "its key waits for it");
            }
            other => return Err(TestCaseError::fail(format!("{other:?}"))),
        }
    }

    #[test]
    fn no_answer_of_a_server_makes_reading_a_row_panic(
        columns in vec(any_column(), 0..14),
        first in 0_usize..3,
    ) {
        let raw = Raw(columns);
        _ = row::read(&raw, &mut LastTopic::default());
        _ = row::read_swept(&raw);
        _ = row::read_state(&raw, first);
        _ = row::read_message(&raw, first, &mut LastTopic::default());
    }

    #[test]
    fn a_sweep_asks_for_its_spans_and_nothing_else(spans in any_spans()) {
        let claim = Claim::new(1_000).sweep(&spans);
        let plan = Plan::new(&Tables::new(), 4, &claim);
        let mut asked = Vec::new();
        if !spans.is_empty() {
            for statement in plan.packet.split(';') {
                let (_, condition) = statement.split_once(" WHERE ").expect("a condition");
                asked.extend(ids_of(condition));
                prop_assert!(condition.matches(',').count() < 1_000);
            }
            prop_assert!(plan.parts.iter().all(|part| *part == Part::Sweep));
        }
        let wanted = spans.iter().map(|span| (span.first.0, span.last.0)).collect();
        prop_assert_eq!(merged(asked), merged(wanted));
    }

    #[test]
    fn a_claim_has_one_statement_for_each_of_its_parts(
        spans in any_spans(),
        ids in btree_set(1_u64.., 0..1_200),
        lanes in btree_set(0_u16..16, 0..16),
        parts: [bool; 7],
        bytes: usize,
        rows in 0_usize..2_000,
        after: u64,
        through in prop_oneof![Just(u64::MAX), any::<u64>()],
    ) {
        let ids: Vec<Position> = ids.into_iter().map(Position).collect();
        let lanes: Vec<Lane> = lanes.into_iter().map(Lane).collect();
        let page = Page::new(&lanes, Position(after), rows).through(Position(through));
        let mut claim = Claim::new(bytes);
        let [paged, swept, open, fetched, watched, scanned, newest] = parts;
        claim = if paged { claim.page(page) } else { claim };
        claim = if swept { claim.sweep(&spans) } else { claim };
        claim = if open { claim.open(&spans) } else { claim };
        claim = if fetched { claim.fetch(&ids) } else { claim };
        claim = if watched { claim.watch(&ids) } else { claim };
        claim = if scanned { claim.scan(page) } else { claim };
        claim = claim.newest(newest.then_some(Position(after)));
        let plan = Plan::new(&Tables::new(), 16, &claim);
        prop_assert_eq!(plan.packet.split(';').count(), plan.parts.len());
        let mut fetching = BTreeSet::new();
        for (statement, part) in plan.packet.split(';').zip(&plan.parts) {
            let writes = !statement.starts_with("SELECT ");
            prop_assert_eq!(writes, *part == Part::Set, "{}", statement);
            if *part == Part::Fetch {
                let (_, list) = statement.split_once("o.id IN (").expect("a list");
                let list = list.strip_suffix(')').expect("its end");
                let list: Vec<u64> = list.split(',').map(|id| id.parse().expect("an id")).collect();
                prop_assert!(list.len() < 1_000);
                fetching.extend(list);
            }
        }
        let expected = ids.iter().filter(|_| fetched).map(|id| id.0).collect();
        prop_assert_eq!(fetching, expected);
        // The sweep's snapshot is never older than the page's, nor the open look's than the sweep's.
        let order: Vec<u8> = plan.parts.iter().map(|part| *part as u8).collect();
        let same = |pair: &[u8]| pair[0] <= pair[1] || *pair == [Part::Open as u8, Part::Set as u8];
        prop_assert!(order.windows(2).all(same), "{:?}", plan.parts);
    }

    #[test]
    fn a_settle_deletes_exactly_what_was_acknowledged(
        rows in any_delivered(),
        archive: bool,
        repeated: bool,
    ) {
        let request = Settle::new(&rows, &[]).archive(archive).repeated(repeated);
        let message = |row: &Delivered| (row.id.position.0, digits(row.id.message));
        let messages: BTreeMap<u64, String> = rows.iter().map(message).collect();
        let mut deleted = BTreeSet::new();
        for packet in settle::packets(&Tables::new(), &request) {
            prop_assert!(packet.decisive.is_empty());
            prop_assert!(!(repeated && packet.text.contains("BETWEEN")));
            let statements: Vec<_> = packet.text.split(';').collect();
            let delete = "DELETE o FROM outbox o FORCE INDEX (PRIMARY) WHERE (";
            let deletes: Vec<_> =
                statements.iter().filter_map(|text| text.strip_prefix(delete)).collect();
            prop_assert_eq!(deletes.len(), 1);
            prop_assert_eq!(statements.len(), if archive { 4 } else { 1 });
            let (ids, held) = deletes[0].split_once(") AND o.message_id ").expect("both");
            let named = ids_of(ids);
            prop_assert!(named.len() < 1_000);
            for (_, last) in named.iter().filter(|(first, last)| first < last) {
                // What a range meets behind its end is ours.
                prop_assert!(named.contains(&(last + 1, last + 1)), "{last} ends a run: {ids}");
            }
            for id in named.into_iter().flat_map(|(first, last)| first..=last) {
                prop_assert!(lets_through(held, id, &messages[&id]), "{}: {}", id, held);
                prop_assert!(!lets_through(held, id, &digits(STRANGER)), "{}: {}", id, held);
                deleted.insert(id);
            }
        }
        prop_assert!(deleted.iter().eq(messages.keys()), "{:?}", deleted);
    }

    #[test]
    fn every_failed_row_has_a_decisive_statement_of_its_own(
        rows in vec(any_failed(), 0..220),
    ) {
        let mut decided = Vec::new();
        for packet in settle::packets(&Tables::new(), &Settle::new(&[], &rows)) {
            let statements: Vec<_> = packet.text.split(';').collect();
            prop_assert_eq!((statements[0], statements[statements.len() - 1]), ("BEGIN", "COMMIT"));
            let mut locks = Vec::new();
            for (number, position) in packet.decisive {
                let statement = statements[number];
                // A row's lane, and whether it is locked alone.
                let row = rows.iter().find(|row| row.id.position == position);
                locks.extend(row.map(|row| (row.lease.lane, row.settlement != Settlement::Dead)));
                let fence = format!("o.id = {position} AND o.message_id = x'");
                prop_assert!(statement.contains(&fence), "{}: {}", position, statement);
                prop_assert!(statement.contains("f.epoch = "), "{}", statement);
                decided.push(position);
            }
            prop_assert!(locks.is_sorted(), "a lane is locked too late");
        }
        let mut expected: Vec<_> = rows.iter().map(|row| row.id.position).collect();
        expected.sort_unstable();
        decided.sort_unstable();
        prop_assert_eq!(decided, expected);
    }

    #[test]
    fn headers_of_any_row_are_read_or_the_row_is_unreadable(stored_headers in vec(any::<u8>(), 0..60)) {
        let message = Message::builder("t").payload("p").build().expect("valid");
        let mut content = stored(&message);
        content[4] = Some(stored_headers.clone());
        let claimed = row::read(&whole(content, None), &mut LastTopic::default()).expect("a value");
        if headers::decode(&stored_headers).is_none() {
            prop_assert!(matches!(claimed, Claimed::Unreadable(_)), "{:?}", claimed);
        }
    }
}
