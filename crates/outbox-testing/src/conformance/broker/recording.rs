//! What arrives is what was added, in the order of its key.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::collections::BTreeMap;

use outbox_core::Message;
use outbox_core::delivery::RowState;
use outbox_core::message::header;

use super::verdicts::{assert_arrived, list, only};
use super::{BrokerFixture, deliver, deliver_batch, message, outgoing};
use crate::Published;

/// Key, payload and headers arrive byte for byte, headers in their order, repeated and null ones
/// included.
pub async fn a_message_arrives_byte_for_byte<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let topic = fixture.create_topic().await;
    let bytes: Vec<u8> = (0..=255).collect();
    let message = Message::builder(&*topic)
        .key(bytes.clone())
        .payload(bytes.clone())
        .header("repeated", "1")
        .null_header("null")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .header("repeated", bytes)
        .header("empty", "");
    let message = message.build().unwrap();
    deliver(&*fixture.broker(), [message.clone()]).await;
    let record = only(fixture.published_to(&topic).await);
    assert_arrived("the key", message.key(), record.key.as_deref());
    assert_arrived("the payload", message.payload(), record.payload.as_deref());
    let own = record.headers.iter().filter(|(name, _)| !name.starts_with(header::RESERVED_PREFIX));
    let (names, values): (Vec<_>, Vec<_>) = own.cloned().unzip();
    let added: Vec<_> = message.headers().iter().map(|(name, _)| name).collect();
    assert_eq!(
        added, names,
        "names of headers added and arrived, in order, repeated ones included"
    );
    for ((name, added), arrived) in message.headers().iter().zip(&values) {
        assert_arrived(&format!("the header {name:?}"), added, arrived.as_deref());
    }
}

/// Every appearance carries the message id as a header, as text.
pub async fn a_message_carries_its_id<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let topic = fixture.create_topic().await;
    let message = message(&topic, "k", "p");
    deliver(&*fixture.broker(), [message.clone()]).await;
    deliver(&*fixture.broker(), [message.clone()]).await;
    let records = fixture.published_to(&topic).await;
    assert_eq!(records.len(), 2, "published twice; there are {}", list(&records));
    for record in records {
        let id = message.id().to_string();
        assert_arrived("the message's id", Some(id.as_bytes()), record.header(header::ID));
        let mark = record.header(header::RETRIED);
        assert_eq!(mark, None, "only RowState::retried brings {}", header::RETRIED);
    }
}

/// A dead letter that was retried out of its place is marked as such.
pub async fn a_retried_dead_letter_is_marked<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let topic = fixture.create_topic().await;
    let mut batch = outgoing([message(&topic, "k", "p")]);
    batch[0].delivery.state = RowState::default().with_retried(true);
    deliver_batch(&*fixture.broker(), &batch).await;
    let record = only(fixture.published_to(&topic).await);
    assert_eq!(
        record.header(header::RETRIED),
        Some(&b"true"[..]),
        "a message with RowState::retried must carry the header {}, true",
        header::RETRIED
    );
}

/// A tombstone arrives as null, and an empty payload as empty.
pub async fn a_tombstone_is_no_empty_payload<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (tombstone, empty) = (fixture.create_topic().await, fixture.create_topic().await);
    let messages = [
        Message::builder(&*tombstone).key("k").tombstone().build().unwrap(),
        Message::builder(&*empty).key("k").payload("").build().unwrap(),
    ];
    deliver(&*fixture.broker(), messages).await;
    for (what, topic, added) in [
        ("the payload of a tombstone", tombstone, None),
        ("an empty payload", empty, Some(&b""[..])),
    ] {
        let record = only(fixture.published_to(&topic).await);
        assert_arrived(what, added, record.payload.as_deref());
    }
}

/// A message without a key arrives without one, and an empty key as empty.
pub async fn a_missing_key_is_no_empty_key<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (missing, empty) = (fixture.create_topic().await, fixture.create_topic().await);
    let messages = [
        Message::builder(&*missing).no_key().payload("p").build().unwrap(),
        Message::builder(&*empty).key("").payload("p").build().unwrap(),
    ];
    deliver(&*fixture.broker(), messages).await;
    for (what, topic, added) in
        [("a missing key", missing, None), ("an empty key", empty, Some(&b""[..]))]
    {
        let record = only(fixture.published_to(&topic).await);
        assert_arrived(what, added, record.key.as_deref());
    }
}

/// Messages that name a partition arrive there, whatever their keys. Passes by itself for a broker
/// without partitions.
pub async fn a_message_arrives_in_the_partition_that_it_names<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let topic = fixture.create_topic().await;
    let messages = (0..20).map(|key| {
        let message = Message::builder(&*topic).key(key.to_string()).payload("p").partition(0);
        message.build().unwrap()
    });
    deliver(&*fixture.broker(), messages).await;
    let records = fixture.published_to(&topic).await;
    assert_eq!(records.len(), 20, "twenty messages were published");
    let together = records.iter().all(|record| record.partition == records[0].partition);
    assert!(together, "all of them name partition 0: {}", list(&records));
}

/// Messages of one key are in one partition, in the order of the batch and of the publishes.
pub async fn messages_of_a_key_arrive_in_order<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let numbered = |n: usize| message(&topic, ["a", "b", "c"][n % 3], &format!("{n:03}"));
    deliver(&*broker, (0..60).map(numbered)).await;
    deliver(&*broker, (60..90).map(numbered)).await;
    let mut keys: BTreeMap<_, Vec<Published>> = BTreeMap::new();
    for record in fixture.published_to(&topic).await {
        keys.entry(record.key.clone()).or_default().push(record);
    }
    assert_eq!(keys.len(), 3, "messages of three keys were published");
    for records in keys.values() {
        let found = list(records);
        assert_eq!(records.len(), 30, "each key has thirty messages; one has {found}");
        let together = records.iter().all(|record| record.partition == records[0].partition);
        assert!(together, "all messages of a key belong in one partition: {found}");
        let by_offset = records.is_sorted_by_key(|record| record.offset);
        assert!(by_offset, "`published_to` must list each partition by offset: {found}");
        let in_order = records.is_sorted_by_key(|record| record.payload.clone());
        assert!(in_order, "messages of a key must arrive in the order of the batch: {found}");
    }
}
