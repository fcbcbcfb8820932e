//! What every [`Broker`] promises.

pub mod answering;
pub mod recording;
mod verdicts;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::broker::{Outcome, Outcomes, Outgoing};
use outbox_core::{Broker, Delivery, Lane, Message, Position};
use tokio::time::Instant;

use self::verdicts::{assert_delivered, in_time};
use crate::Published;

/// A broker under test. Each case sets up one of its own.
#[async_trait]
pub trait BrokerFixture: Sized + Send + Sync + 'static {
    /// A broker and what is needed to look at it.
    async fn set_up() -> Self;

    /// The broker.
    fn broker(&self) -> Arc<dyn Broker>;

    /// The name of an existing, empty topic that no other case uses.
    async fn create_topic(&self) -> String;

    /// A topic that does not exist and is not created by publishing to it; `None` if the broker
    /// has no such thing.
    fn unknown_topic(&self) -> Option<String>;

    /// Everything that is in a topic, each partition in order; called when nothing is in flight.
    async fn published_to(&self, topic: &str) -> Vec<Published>;
}

/// Emits one test for every promise of [`Broker`], given a [`BrokerFixture`].
#[macro_export]
macro_rules! broker_conformance {
    ($fixture:ty) => {
        $crate::__conformance! { $fixture, broker::answering {
            the_check_passes,
            each_message_is_answered_and_has_arrived,
            an_empty_batch_is_harmless,
            an_overdue_message_is_never_sent,
            an_unknown_topic_counts_no_attempt,
            a_message_that_is_too_large_is_rejected_alone,
            a_message_of_the_largest_size_is_taken,
            publishes_at_the_same_time_are_answered_apart,
            a_dropped_publish_keeps_its_answers,
            a_publish_ends_within_the_undecided_time,
        } }
        $crate::__conformance! { $fixture, broker::recording {
            a_message_arrives_byte_for_byte,
            a_message_carries_its_id,
            a_retried_dead_letter_is_marked,
            a_tombstone_is_no_empty_payload,
            a_missing_key_is_no_empty_key,
            a_message_arrives_in_the_partition_that_it_names,
            messages_of_a_key_arrive_in_order,
        } }
    };
}

/// Messages as they are handed to a broker, with plenty of time.
fn outgoing(messages: impl IntoIterator<Item = Message>) -> Vec<Outgoing> {
    let not_after = Instant::now() + Duration::from_secs(3_600);
    let deliveries = messages.into_iter().zip(1..).map(|(message, position)| {
        Outgoing::new(Delivery::new(Position(position), Lane(0), message), not_after)
    });
    deliveries.collect()
}

/// Publishes a batch and returns the answers by index.
async fn publish(broker: &dyn Broker, batch: &[Outgoing]) -> Vec<Option<Outcome>> {
    let outcomes = Outcomes::new(batch.len(), Arc::default());
    in_time("publish", broker.profile().undecided, broker.publish(batch.to_vec(), &outcomes)).await;
    by_index(batch.len(), &outcomes)
}

/// Publishes messages that must all be delivered.
async fn deliver(broker: &dyn Broker, messages: impl IntoIterator<Item = Message>) {
    deliver_batch(broker, &outgoing(messages)).await;
}

async fn deliver_batch(broker: &dyn Broker, batch: &[Outgoing]) {
    let answers = publish(broker, batch).await;
    for index in 0..answers.len() {
        assert_delivered(&answers, index, "nothing is wrong with it");
    }
}

fn by_index(count: usize, outcomes: &Outcomes) -> Vec<Option<Outcome>> {
    let mut answers = vec![None; count];
    for (index, outcome) in outcomes.take() {
        answers[index] = Some(outcome);
    }
    answers
}

fn message(topic: &str, key: &str, payload: &str) -> Message {
    let message = Message::builder(topic).key(key).payload(payload);
    message.build().unwrap_or_else(|error| panic!("{error}"))
}
