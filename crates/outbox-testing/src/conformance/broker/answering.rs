//! Every message gets one answer, and the answer is true.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use outbox_core::Message;
use outbox_core::broker::{Outcome, Outcomes, PublishErrorKind};
use tokio::time::Instant;

use super::{BrokerFixture, by_index, deliver, message, outgoing, publish};

/// A usable broker passes its check.
pub async fn the_check_passes<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    fixture.broker().check().await.unwrap();
}

/// Each index is answered, and what is answered as delivered has arrived, once, where the receipt
/// says.
pub async fn each_message_is_answered_and_has_arrived<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let batch: Vec<Message> =
        (0..50).map(|n| message(&topic, &n.to_string(), &n.to_string())).collect();
    let answers = publish(&*broker, &outgoing(batch.clone())).await;
    let published = fixture.published_to(&topic).await;
    assert_eq!(published.len(), batch.len());
    for (index, (message, answer)) in batch.iter().zip(&answers).enumerate() {
        let Some(Outcome::Delivered(receipt)) = answer else {
            panic!("message {index}: {answer:?}");
        };
        let record = published.iter().find(|record| record.message_id == message.id());
        let record = record.unwrap_or_else(|| panic!("message {index} did not arrive"));
        assert_eq!(record.payload.as_deref(), message.payload());
        assert!(receipt.partition.is_none_or(|partition| partition == record.partition));
        assert!(receipt.offset.is_none_or(|offset| offset == record.offset));
    }
}

/// An empty batch is no error.
pub async fn an_empty_batch_is_harmless<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    assert!(publish(&*fixture.broker(), &[]).await.is_empty());
}

/// A message whose time is over is never sent and answered `NotSent`; its neighbours are sent.
pub async fn an_overdue_message_is_never_sent<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let mut batch = outgoing(["a", "b", "c"].map(|key| message(&topic, key, "p")));
    batch[1].not_after = Instant::now();
    let answers = publish(&*broker, &batch).await;
    assert!(matches!(answers[0], Some(Outcome::Delivered(_))), "{:?}", answers[0]);
    assert_eq!(kind(&answers[1]), Some(PublishErrorKind::NotSent));
    assert!(matches!(answers[2], Some(Outcome::Delivered(_))), "{:?}", answers[2]);
    let keys = fixture.published_to(&topic).await.into_iter().map(|record| record.key.unwrap());
    let keys: BTreeSet<_> = keys.collect();
    assert_eq!(keys, BTreeSet::from([b"a".to_vec(), b"c".to_vec()]));
}

/// An unknown topic is answered by a kind that counts no attempt, and does not trouble others.
///
/// Passes at once if every topic exists.
pub async fn an_unknown_topic_counts_no_attempt<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let Some(unknown) = fixture.unknown_topic() else { return };
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let batch = outgoing([message(&unknown, "a", "p"), message(&topic, "b", "p")]);
    let answers = publish(&*broker, &batch).await;
    assert!(matches!(answers[1], Some(Outcome::Delivered(_))), "{:?}", answers[1]);
    let kind = kind(&answers[0]);
    assert!(kind.is_none_or(|kind| !kind.counts()), "{kind:?} counts an attempt");
    deliver(&*broker, [message(&topic, "c", "p")]).await;
}

/// A message above the broker's own limit is refused for good, and alone: others pass.
pub async fn a_message_that_is_too_large_is_rejected_alone<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let large = "x".repeat(broker.profile().max_message_bytes + 1);
    let batch =
        [message(&topic, "a", "p"), message(&topic, "b", &large), message(&topic, "c", "p")];
    let answers = publish(&*broker, &outgoing(batch)).await;
    assert!(matches!(answers[0], Some(Outcome::Delivered(_))), "{:?}", answers[0]);
    assert_eq!(kind(&answers[1]), Some(PublishErrorKind::Rejected));
    assert!(matches!(answers[2], Some(Outcome::Delivered(_))), "{:?}", answers[2]);
}

/// A publish that is dropped half way keeps the answers that it gave: each of them is true.
pub async fn a_dropped_publish_keeps_its_answers<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let messages: Vec<Message> = (0..200).map(|n| message(&topic, &n.to_string(), "p")).collect();
    let batch = outgoing(messages.clone());
    let outcomes = Outcomes::new(batch.len(), Arc::default());
    let within = Duration::from_millis(3);
    _ = tokio::time::timeout(within, broker.publish(&batch, &outcomes)).await;
    let given = by_index(batch.len(), &outcomes);
    broker.close(Duration::from_secs(10)).await;
    let later = by_index(batch.len(), &outcomes);
    let published = fixture.published_to(&topic).await;
    for (index, message) in messages.iter().enumerate() {
        let answers = [&given[index], &later[index]];
        let delivered = answers.iter().any(|a| matches!(a, Some(Outcome::Delivered(_))));
        let arrived = published.iter().any(|record| record.message_id == message.id());
        assert!(arrived || !delivered, "message {index} is called delivered and did not arrive");
        let unsent = answers.iter().any(|a| kind(a) == Some(PublishErrorKind::NotSent));
        assert!(!(arrived && unsent), "message {index} is called not sent and arrived");
    }
}

/// Nothing stays undecided longer than the broker states.
pub async fn a_publish_ends_within_the_undecided_time<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let unknown = fixture.unknown_topic().unwrap_or_else(|| topic.clone());
    let batch = outgoing([message(&unknown, "a", "p"), message(&topic, "b", "p")]);
    let within = broker.profile().undecided + Duration::from_millis(500); // for a busy machine
    let ended = tokio::time::timeout(within, publish(&*broker, &batch)).await;
    assert!(ended.is_ok(), "the publish has not ended after {within:?}");
}

fn kind(answer: &Option<Outcome>) -> Option<PublishErrorKind> {
    match answer {
        Some(Outcome::Failed(kind, _)) => Some(*kind),
        _ => None,
    }
}
