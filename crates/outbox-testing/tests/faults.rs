//! The fault scripts of the memory broker.

use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use outbox_core::broker::{Outcome, Outcomes, Outgoing, PublishErrorKind};
use outbox_core::{Broker, Delivery, Lane, Message, Position};
use outbox_testing::{Expected, Fault, MemoryBroker};
use tokio::time::Instant;

fn outgoing(topic: &str, key: &str) -> Outgoing {
    let message = Message::builder(topic).key(key).payload("p").build().expect("a valid message");
    let delivery = Delivery::new(Position(1), Lane(0), message);
    Outgoing::new(delivery, Instant::now() + Duration::from_secs(3600))
}

/// `None` for a delivered message.
async fn publish(broker: &MemoryBroker, batch: &[Outgoing]) -> Vec<Option<PublishErrorKind>> {
    let outcomes = Outcomes::new(batch.len(), Arc::default());
    broker.publish(batch.to_vec(), &outcomes).await;
    let mut answers = outcomes.take();
    answers.sort_by_key(|(index, _)| *index);
    answers.into_iter().map(|(_, outcome)| kind(&outcome)).collect()
}

fn kind(outcome: &Outcome) -> Option<PublishErrorKind> {
    match outcome {
        Outcome::Failed(kind, _) => Some(*kind),
        _ => None,
    }
}

#[tokio::test]
async fn the_next_messages_fail_and_then_all_is_well() {
    let broker = MemoryBroker::new();
    broker.fail_next(2, PublishErrorKind::Failed);
    let batch = [outgoing("t", "a"), outgoing("t", "b"), outgoing("t", "c")];
    let failed = Some(PublishErrorKind::Failed);
    assert_eq!(publish(&broker, &batch).await, [failed, failed, None]);
    broker.assert_published([("t", "c")]);
}

#[tokio::test]
async fn a_message_for_a_partition_that_its_topic_does_not_have_fails() {
    let broker = MemoryBroker::new();
    let to = |partition| {
        let message = Message::builder("t").key("k").partition(partition).payload("p").build();
        let delivery = Delivery::new(Position(1), Lane(0), message.expect("a valid message"));
        Outgoing::new(delivery, Instant::now() + Duration::from_secs(3600))
    };
    let failed = Some(PublishErrorKind::Failed);
    assert_eq!(publish(&broker, &[to(2), to(3)]).await, [None, failed]);
    assert_eq!(broker.published().len(), 1);
}

#[tokio::test]
async fn a_predicate_chooses_messages_until_the_broker_is_healed() {
    let broker = MemoryBroker::new();
    broker.fail_when(|d| d.message.topic() == "audit", PublishErrorKind::Rejected);
    let batch = [outgoing("audit", "a"), outgoing("orders", "b")];
    assert_eq!(publish(&broker, &batch).await, [Some(PublishErrorKind::Rejected), None]);
    broker.heal();
    assert_eq!(publish(&broker, &batch).await, [None, None]);
}

#[tokio::test]
async fn an_outage_refuses_everything_until_it_is_dropped() {
    let broker = MemoryBroker::new();
    let outage = broker.outage();
    assert_eq!(broker.check().await.unwrap_err().kind(), PublishErrorKind::Unavailable);
    let batch = [outgoing("t", "a")];
    assert_eq!(publish(&broker, &batch).await, [Some(PublishErrorKind::Unavailable)]);
    drop(outage);
    broker.check().await.unwrap();
    assert_eq!(publish(&broker, &batch).await, [None]);
}

#[tokio::test(start_paused = true)]
async fn silence_is_unknown_after_the_undecided_time() {
    let broker = MemoryBroker::new();
    let silence = broker.silence();
    let start = Instant::now();
    let batch = [outgoing("t", "a")];
    assert_eq!(publish(&broker, &batch).await, [Some(PublishErrorKind::Unknown)]);
    assert_eq!(start.elapsed(), broker.profile().undecided);
    broker.assert_published::<&str>([]);
    drop(silence);
    broker.check().await.unwrap();
}

#[tokio::test]
async fn a_lost_answer_is_published_all_the_same() {
    let broker = MemoryBroker::new();
    broker.fail_next(1, Fault::Doubt);
    assert_eq!(publish(&broker, &[outgoing("t", "a")]).await, [Some(PublishErrorKind::Unknown)]);
    broker.fail_next(1, Fault::NoAnswer);
    assert!(publish(&broker, &[outgoing("t", "b")]).await.is_empty());
    broker.assert_published([("t", "a"), ("t", "b")]);
}

#[tokio::test(start_paused = true)]
async fn silence_keeps_a_message_from_arriving_and_is_in_doubt_only_when_the_time_is_up() {
    let broker = MemoryBroker::new();
    broker.fail_when(|d| d.message.key() == Some(b"a"), Fault::Silence);
    let began = Instant::now();
    let batch = [outgoing("t", "a"), outgoing("t", "b")];
    assert_eq!(publish(&broker, &batch).await, [Some(PublishErrorKind::Unknown), None]);
    assert_eq!(began.elapsed(), broker.profile().undecided);
    broker.assert_published([("t", "b")]);
}

#[tokio::test]
async fn a_hanging_publish_has_given_the_other_answers() {
    let broker = MemoryBroker::new();
    broker.fail_when(|d| d.message.key() == Some(b"a"), Fault::Hang);
    let outcomes = Outcomes::new(2, Arc::default());
    let batch = [outgoing("t", "a"), outgoing("t", "b")];
    assert!(broker.publish(batch.to_vec(), &outcomes).now_or_never().is_none());
    let answered: Vec<usize> = outcomes.take().into_iter().map(|(index, _)| index).collect();
    assert_eq!(answered, [1]);
}

#[tokio::test(start_paused = true)]
async fn acknowledgements_come_after_the_latency() {
    let broker = MemoryBroker::new();
    broker.set_latency(Duration::from_millis(300));
    let outcomes = Outcomes::new(1, Arc::default());
    let batch = [outgoing("t", "a")];
    let publish = broker.publish(batch.to_vec(), &outcomes);
    let early = tokio::time::timeout(Duration::from_millis(200), publish).await;
    assert!(early.is_err());
    broker.assert_published([("t", "a")]);
    assert_eq!(outcomes.unanswered(), 1);
}

#[tokio::test]
async fn a_removed_topic_is_an_unknown_destination_until_it_is_created() {
    let broker = MemoryBroker::new();
    broker.remove_topic("t");
    let batch = [outgoing("t", "a")];
    assert_eq!(publish(&broker, &batch).await, [Some(PublishErrorKind::Destination)]);
    broker.create_topic("t");
    assert_eq!(publish(&broker, &batch).await, [None]);
}

#[tokio::test(start_paused = true)]
async fn waiting_ends_when_enough_has_arrived() {
    let broker = MemoryBroker::new();
    let waiting = tokio::spawn({
        let broker = broker.clone();
        async move { broker.wait_for(2).await }
    });
    publish(&broker, &[outgoing("t", "a")]).await;
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    publish(&broker, &[outgoing("t", "b")]).await;
    assert_eq!(waiting.await.unwrap().len(), 2);
}

#[tokio::test(start_paused = true)]
#[should_panic(expected = "0 of 1 messages arrived within a minute")]
async fn waiting_in_vain_ends_with_what_arrived() {
    MemoryBroker::new().wait_for(1).await;
}

#[tokio::test]
async fn an_assertion_shows_what_was_there_instead() {
    let broker = MemoryBroker::new();
    publish(&broker, &[outgoing("t", "a"), outgoing("t", "b")]).await;
    let expected = || [Expected::topic("t").key("a"), Expected::topic("u").no_key()];
    let panic = std::panic::catch_unwind(|| broker.assert_published(expected())).unwrap_err();
    let text = panic.downcast_ref::<String>().unwrap();
    assert!(text.starts_with("2 messages published, 2 expected\n    0: t key \"a\""), "{text}");
    assert!(text.contains("  ! 1: t key \"b\" payload \"p\""), "{text}");
    assert!(text.contains("expected u key none"), "{text}");
}

#[tokio::test]
async fn order_is_judged_by_first_appearances_of_a_key() {
    let broker = MemoryBroker::new();
    let (a, b, other) = (outgoing("t", "k"), outgoing("t", "k"), outgoing("t", "l"));
    publish(&broker, &[other.clone(), a.clone(), b.clone(), a.clone()]).await;
    let id = |outgoing: &Outgoing| outgoing.delivery.message.id();
    broker.assert_order_per_key(&[id(&a), id(&b), id(&other)]);
    let wrong = [id(&b), id(&a)];
    let panic = std::panic::catch_unwind(|| broker.assert_order_per_key(&wrong)).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().starts_with("out of order in t, key \"k\""));
    let panic = std::panic::catch_unwind(|| broker.assert_no_repetition()).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().contains("published as number 1 and 3"));
}
