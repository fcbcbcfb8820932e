//! Every message gets one answer, and the answer is true.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use outbox_core::Message;
use outbox_core::broker::{Outcome, Outcomes, PublishErrorKind};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::verdicts::{assert_delivered, assert_failed, in_time, in_words, list};
use super::{BrokerFixture, by_index, deliver, message, outgoing, publish};

/// A usable broker passes its check.
pub async fn the_check_passes<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let broker = fixture.broker();
    if let Err(error) = in_time("check", broker.profile().undecided, broker.check()).await {
        let source = std::error::Error::source(&error);
        panic!("check must pass while publishing can work, and fails: {error} ({source:?})");
    }
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
    for (index, message) in batch.iter().enumerate() {
        assert_delivered(&answers, index, "nothing is wrong with it");
        let Some(Outcome::Delivered(receipt)) = &answers[index] else { unreachable!() };
        let mut records = published.iter().filter(|record| record.message_id == message.id());
        let Some(record) = records.next() else {
            panic!("message {index} is answered as delivered and did not arrive");
        };
        assert!(records.next().is_none(), "message {index} arrived more than once");
        assert_eq!(record.payload.as_deref(), message.payload(), "payload of message {index}");
        let (partition, offset) = (record.partition, record.offset);
        assert!(
            receipt.partition.is_none_or(|told| told == partition)
                && receipt.offset.is_none_or(|told| told == offset),
            "message {index} arrived at offset {offset} of partition {partition}, and its receipt \
             tells another place: {receipt:?}. `None` for what the broker does not tell"
        );
    }
    assert_eq!(published.len(), batch.len(), "more arrived than was sent: {}", list(&published));
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
    let why = "for is_overdue() is true for it, as must be asked for each message right before it \
               is handed over";
    assert_failed(&answers, 1, PublishErrorKind::NotSent, why);
    for neighbour in [0, 2] {
        assert_delivered(&answers, neighbour, "for its own time is not over");
    }
    let published = fixture.published_to(&topic).await;
    let keys: BTreeSet<_> = published.iter().filter_map(|record| record.key.as_deref()).collect();
    assert_eq!(
        keys,
        BTreeSet::from([&b"a"[..], b"c"]),
        "message 1, of key b, is answered NotSent and must not arrive; there are {}",
        list(&published)
    );
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
    // Unanswered is as good as `Unknown`.
    let no_attempt = match &answers[0] {
        Some(Outcome::Failed(kind, _)) => !kind.counts(),
        answer => answer.is_none(),
    };
    assert!(
        no_attempt,
        "message 0, for the unknown topic {unknown:?}, must be answered by a kind that counts no \
         attempt, such as Destination: it is not the message's fault; it is {}. If publishing to a \
         topic creates it, `unknown_topic` of the fixture is None",
        in_words(&answers[0])
    );
    assert_delivered(&answers, 1, "for its own topic exists");
    deliver(&*broker, [message(&topic, "c", "p")]).await;
}

/// A message above the broker's own limit is refused for good, and alone: others pass.
///
/// Passes at once for a broker without a limit.
pub async fn a_message_that_is_too_large_is_rejected_alone<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let limit = broker.profile().max_message_bytes;
    if limit == usize::MAX {
        return;
    }
    let large = "x".repeat(limit + 1);
    let batch =
        [message(&topic, "a", "p"), message(&topic, "b", &large), message(&topic, "c", "p")];
    let answers = publish(&*broker, &outgoing(batch)).await;
    let why = format!(
        "for its size() is above the {limit} bytes of the broker's profile, which nobody checks \
         but the broker"
    );
    assert_failed(&answers, 1, PublishErrorKind::Rejected, &why);
    for neighbour in [0, 2] {
        assert_delivered(&answers, neighbour, "for it is small: Rejected is for one message alone");
    }
}

/// A message as large as the broker says it takes is taken, whatever of it is large; one byte more is
/// refused.
///
/// Passes at once for a broker without a limit.
pub async fn a_message_of_the_largest_size_is_taken<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let limit = broker.profile().max_message_bytes;
    if limit == usize::MAX {
        return;
    }
    let of_size = |key: &str, bytes: usize| {
        let payload = bytes - message(&topic, key, "").size();
        message(&topic, key, &"x".repeat(payload))
    };
    let batch = outgoing([of_size("a", limit), of_size("b", limit + 1)]);
    let answers = publish(&*broker, &batch).await;
    let why = format!("for its size() is the {limit} bytes of the broker's profile, and no more");
    assert_delivered(&answers, 0, &why);
    let why = "for its size(), not that of its payload alone, is above the profile's limit";
    assert_failed(&answers, 1, PublishErrorKind::Rejected, why);
}

/// Publishes at the same time are answered apart: each by its own indices.
pub async fn publishes_at_the_same_time_are_answered_apart<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let mut batches = [0, 1, 2].map(|n: usize| {
        let keys = (0..9).map(|key| message(&topic, &format!("{n}-{key}"), "p"));
        outgoing(keys.take(5 + 2 * n))
    });
    for (overdue, batch) in batches.iter_mut().enumerate() {
        batch[overdue].not_after = Instant::now();
    }
    let [one, two, three] = &batches;
    let answers =
        tokio::join!(publish(&*broker, one), publish(&*broker, two), publish(&*broker, three));
    let published = fixture.published_to(&topic).await;
    for (overdue, (batch, answers)) in
        batches.iter().zip([answers.0, answers.1, answers.2]).enumerate()
    {
        for (index, outgoing) in batch.iter().enumerate() {
            let id = outgoing.delivery.message.id();
            let arrived = published.iter().filter(|record| record.message_id == id).count();
            if index == overdue {
                assert_failed(&answers, index, PublishErrorKind::NotSent, "its time is over");
            } else {
                assert_delivered(&answers, index, "nothing is wrong with it");
            }
            let expected = usize::from(index != overdue);
            assert_eq!(arrived, expected, "arrivals of message {index} of publish {overdue}");
        }
    }
}

/// A publish that is dropped half way keeps the answers that it gave: each of them is true.
pub async fn a_dropped_publish_keeps_its_answers<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let messages: Vec<Message> = (0..200).map(|n| message(&topic, &n.to_string(), "p")).collect();
    let batch = outgoing(messages.clone());
    let arrived = Arc::new(Notify::new());
    let outcomes = Outcomes::new(batch.len(), Arc::clone(&arrived));
    // Dropped at the first answer: then others are under way.
    let until_answered = async {
        let mut answer = pin!(arrived.notified());
        let mut publish = pin!(broker.publish(batch.clone(), &outcomes));
        poll_fn(|cx| match answer.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(()),
            Poll::Pending => publish.as_mut().poll(cx),
        })
        .await;
    };
    in_time("publish", broker.profile().undecided, until_answered).await;
    let given = by_index(batch.len(), &outcomes);
    deliver(&*broker, [message(&topic, "after", "p")]).await;
    let flush = Duration::from_secs(10);
    in_time("close", flush, broker.close(flush)).await;
    let later = by_index(batch.len(), &outcomes);
    let published = fixture.published_to(&topic).await;
    for (index, message) in messages.iter().enumerate() {
        let answers = [&given[index], &later[index]];
        let delivered = answers.iter().any(|a| matches!(a, Some(Outcome::Delivered(_))));
        let arrived = published.iter().any(|record| record.message_id == message.id());
        assert!(
            arrived || !delivered,
            "message {index} is called delivered and did not arrive: answer when the server has \
             acknowledged it, not when it is handed over"
        );
        let unsent = answers.iter().any(|a| kind(a) == Some(PublishErrorKind::NotSent));
        assert!(
            !(arrived && unsent),
            "message {index} is called not sent and arrived: in doubt it is Unknown"
        );
    }
}

/// Nothing stays undecided longer than the broker states.
pub async fn a_publish_ends_within_the_undecided_time<F: BrokerFixture>() {
    let fixture = F::set_up().await;
    let (broker, topic) = (fixture.broker(), fixture.create_topic().await);
    let unknown = fixture.unknown_topic().unwrap_or_else(|| topic.clone());
    let batch = outgoing([message(&unknown, "a", "p"), message(&topic, "b", "p")]);
    publish(&*broker, &batch).await; // Fails by itself when the time is over.
}

fn kind(answer: &Option<Outcome>) -> Option<PublishErrorKind> {
    match answer {
        Some(Outcome::Failed(kind, _)) => Some(*kind),
        _ => None,
    }
}
