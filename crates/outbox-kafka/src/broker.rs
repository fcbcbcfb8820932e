//! The broker: hand over, wait for the answers, send suspects again alone.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use outbox_core::Message;
use outbox_core::broker::{
    Broker, BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::Metadata;
use rdkafka::producer::{BaseProducer, Producer as _};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

use crate::batch::{Batch, Suspect, Ticket};
use crate::builder::KafkaBuilder;
use crate::context::Context;
use crate::partitions::{Partitions, Route};
use crate::producer::Slot;
use crate::timing::Timing;
use crate::{record, verdict};

/// The longest wait of [`Broker::check`].
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a hand-over sleeps when librdkafka's queue is full.
const FULL_QUEUE_PAUSE: Duration = Duration::from_millis(1);

/// From so many messages on, a publish goes through the producer that waits longer for full
/// requests: such a backlog gains more from them than it loses by the wait.
const BULK: usize = 1_000;

/// Publishes to Apache Kafka; built by [`KafkaBroker::builder`].
///
/// `Debug` prints the values of harmless properties only.
pub struct KafkaBroker {
    pub(crate) profile: BrokerProfile,
    pub(crate) timing: Timing,
    pub(crate) together: Slot,
    /// The same for large publishes. No key is at two producers at once: beside the messages of one
    /// publish none of their keys is outstanding.
    pub(crate) bulk: Slot,
    /// One message a request: only its verdict condemns a message.
    pub(crate) alone: Slot,
    pub(crate) partitions: Arc<Partitions>,
    /// Whose turn it is to hand over: a batch that waits for room is not overtaken.
    pub(crate) turn: Mutex<()>,
    /// Whose turn it is to send a suspect.
    pub(crate) turn_alone: Mutex<()>,
    /// A topic that was published to, for cheap checks.
    pub(crate) topic: OnceLock<String>,
}

impl KafkaBroker {
    /// Starts a broker for these servers: `host:port`, several separated by commas.
    pub fn builder(bootstrap: impl Into<String>) -> KafkaBuilder {
        KafkaBuilder::new(bootstrap.into())
    }

    /// The producer for a publish of so many messages.
    fn slot(&self, messages: usize) -> &Slot {
        if messages < BULK { &self.together } else { &self.bulk }
    }

    /// Has the partitions of a topic counted, if there is one with a partition that does not answer.
    /// Nothing waits for that.
    fn count_partitions(&self) {
        let Some(topic) = self.partitions.uncounted(std::time::Instant::now()) else { return };
        let Ok(producer) = self.together.producer() else { return };
        let timeout = CHECK_TIMEOUT.min(self.timing.message);
        let partitions = Arc::clone(&self.partitions);
        tokio::task::spawn_blocking(move || {
            let fetched = producer.client().fetch_metadata(Some(&topic), timeout);
            if let Some(found) = fetched.iter().flat_map(Metadata::topics).next() {
                partitions.counted(&topic, found.partitions().len());
            }
        });
    }

    /// Hands over the messages of a batch in order, without a pause unless the queue is full. What
    /// librdkafka has taken it holds in a copy of its own: ours is dropped. Gives those for partitions
    /// that it does not know.
    async fn hand_over(
        &self,
        messages: Vec<Outgoing>,
        batch: &Arc<Batch>,
        outcomes: &Outcomes,
    ) -> Vec<Stranger> {
        let (count, give_up) = (messages.len(), Instant::now() + self.timing.queue);
        let mut strangers = Vec::new();
        let fail_from = |first: usize, kind, code| {
            (first..count).for_each(|index| fail(outcomes, index, kind, code));
        };
        let Ok(_turn) = timeout_at(give_up, self.turn.lock()).await else {
            fail_from(0, PublishErrorKind::NotSent, RDKafkaErrorCode::QueueFull);
            return strangers;
        };
        let producer = match self.slot(count).producer() {
            Ok(producer) => producer,
            Err(refusal) => {
                fail_from(0, refusal.kind, refusal.code);
                return strangers;
            }
        };
        let (mut stopped, now) = (Stopped::default(), std::time::Instant::now());
        for (index, outgoing) in messages.into_iter().enumerate() {
            let message = &outgoing.delivery.message;
            if let Some(code) = stopped.behind(message) {
                fail(outcomes, index, PublishErrorKind::NotSent, code);
                continue;
            }
            let route = self.partitions.route(message, now);
            let partition = match route {
                Route::Own => message.partition(),
                Route::To(partition) => Some(partition),
                Route::Nowhere => {
                    let code = RDKafkaErrorCode::LeaderNotAvailable;
                    stopped.at(message, code);
                    fail(outcomes, index, PublishErrorKind::NotSent, code);
                    continue;
                }
            };
            while let Err(code) = self.send(&producer, &outgoing, partition, index, batch) {
                let kind = match (code, route) {
                    // The topic was made anew with fewer: the message did not ask for that one.
                    (RDKafkaErrorCode::UnknownPartition, Route::To(_)) => PublishErrorKind::NotSent,
                    _ => verdict::of_refusal(code),
                };
                match code {
                    RDKafkaErrorCode::QueueFull if Instant::now() < give_up => {
                        sleep(FULL_QUEUE_PAUSE).await;
                    }
                    // None of the rest may overtake this one, or it would fail as well.
                    RDKafkaErrorCode::QueueFull | RDKafkaErrorCode::Fatal => {
                        self.partitions.not_sent(message, route, now);
                        fail_from(index, kind, code);
                        return strangers;
                    }
                    _ => {
                        // What the client does not know, another probe would not find either.
                        if code != RDKafkaErrorCode::UnknownPartition {
                            self.partitions.not_sent(message, route, now);
                        }
                        stopped.at(message, code);
                        match (code, partition) {
                            (RDKafkaErrorCode::UnknownPartition, Some(partition))
                                if kind == PublishErrorKind::Failed =>
                            {
                                let ticket = batch.ticket(index, outgoing.not_after);
                                let topic = message.topic().to_owned();
                                strangers.push(Stranger { topic, partition, index, ticket });
                            }
                            _ => fail(outcomes, index, kind, code),
                        }
                        break;
                    }
                }
            }
        }
        strangers
    }

    /// Answers for messages to partitions that this client does not know. It may only not have heard of
    /// them: it asks every five minutes. Then the message is not at fault, and has been asked for now.
    fn ask_about(&self, strangers: Vec<Stranger>, slot: &Slot, outcomes: &Outcomes) {
        if strangers.is_empty() {
            return;
        }
        let code = RDKafkaErrorCode::UnknownPartition;
        let Ok(producer) = slot.producer() else {
            let indexes = strangers.iter().map(|stranger| stranger.index);
            return indexes.for_each(|i| fail(outcomes, i, PublishErrorKind::NotSent, code));
        };
        let end = Instant::now() + CHECK_TIMEOUT.min(self.timing.message);
        let outcomes = outcomes.clone();
        tokio::task::spawn_blocking(move || {
            let mut counts = HashMap::new();
            for Stranger { topic, partition, index, ticket } in strangers {
                let count = *counts.entry(topic).or_insert_with_key(|topic| {
                    let left = end.saturating_duration_since(Instant::now());
                    let fetched = producer.client().fetch_metadata(Some(topic), left);
                    let found = fetched.iter().flat_map(Metadata::topics).next();
                    found.map_or(0, |topic| topic.partitions().len())
                });
                let has_it = usize::try_from(partition).is_ok_and(|partition| partition < count);
                let is_known = count > 0 && !has_it;
                let kind =
                    if is_known { PublishErrorKind::Failed } else { PublishErrorKind::NotSent };
                fail(&outcomes, index, kind, code);
                drop(ticket);
            }
        });
    }

    /// Hands one message over, unless it is too late or too large for that.
    fn send(
        &self,
        producer: &BaseProducer<Context>,
        outgoing: &Outgoing,
        partition: Option<i32>,
        index: usize,
        batch: &Arc<Batch>,
    ) -> Result<(), RDKafkaErrorCode> {
        if outgoing.is_overdue() {
            return Err(RDKafkaErrorCode::Outdated);
        }
        if outgoing.delivery.message.size() > self.profile.max_message_bytes {
            return Err(RDKafkaErrorCode::MessageSizeTooLarge);
        }
        let ticket = batch.ticket(index, outgoing.not_after);
        producer.send(record::of(outgoing, partition, ticket)).map_err(|(error, _)| code_of(&error))
    }

    /// Sends suspects again, each in a request of its own, one after the other. They were refused,
    /// so they are certainly not in the log: what there is no time for is not sent.
    async fn isolate(&self, suspects: Vec<Suspect>, outcomes: &Outcomes, end: Instant) {
        let now = Instant::now();
        let start_by = end.min(now + self.timing.isolation) - self.timing.alone();
        let mut suspects = suspects.into_iter();
        let turn = timeout_at(start_by, self.turn_alone.lock()).await;
        while turn.is_ok() && Instant::now() < start_by {
            let Some(suspect) = suspects.next() else { return };
            self.send_alone(&suspect, outcomes).await;
        }
        for suspect in suspects {
            let code = RDKafkaErrorCode::TimedOutQueue;
            fail(outcomes, suspect.index, PublishErrorKind::NotSent, code);
        }
    }

    async fn send_alone(&self, suspect: &Suspect, outcomes: &Outcomes) {
        let index = suspect.index;
        let producer = match self.alone.producer() {
            Ok(producer) => producer,
            Err(refusal) => return fail(outcomes, index, refusal.kind, refusal.code),
        };
        let batch = Batch::alone(outcomes);
        let sent = if Instant::now() >= suspect.not_after {
            Err(RDKafkaErrorCode::Outdated)
        } else {
            let record = record::again(&suspect.message, batch.ticket(index, suspect.not_after));
            producer.send(record).map_err(|(error, _)| code_of(&error))
        };
        if let Err(code) = sent {
            return fail(outcomes, index, verdict::of_refusal(code), code);
        }
        drop(producer);
        let end = Instant::now() + self.timing.alone() + self.timing.reconnect;
        while !batch.is_settled() {
            if timeout_at(end, batch.changed()).await.is_err() {
                self.alone.retire_if_dead();
                return fail_timed_out(outcomes, index);
            }
        }
    }
}

/// A message for a partition that librdkafka does not know.
struct Stranger {
    topic: String,
    partition: i32,
    index: usize,
    ticket: Box<Ticket>,
}

/// Keys of which a message of this publish was not sent, and why: none behind it may be.
#[derive(Default)]
struct Stopped(HashMap<(String, Vec<u8>), RDKafkaErrorCode>);

impl Stopped {
    fn at(&mut self, message: &Message, why: RDKafkaErrorCode) {
        if let Some(key) = message.key() {
            self.0.insert((message.topic().to_owned(), key.to_owned()), why);
        }
    }

    /// Why the one before this one was not sent.
    fn behind(&self, message: &Message) -> Option<RDKafkaErrorCode> {
        if self.0.is_empty() {
            return None;
        }
        self.0.get(&(message.topic().to_owned(), message.key()?.to_owned())).copied()
    }
}

/// Why librdkafka did not take a message.
fn code_of(error: &KafkaError) -> RDKafkaErrorCode {
    error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::InvalidTopic)
}

#[async_trait]
impl Broker for KafkaBroker {
    fn profile(&self) -> BrokerProfile {
        self.profile
    }

    async fn publish(&self, messages: Vec<Outgoing>, outcomes: &Outcomes) {
        let end = Instant::now() + self.timing.undecided() - self.timing.slack;
        let count = messages.len();
        if let Some(first) = messages.first() {
            self.topic.get_or_init(|| first.delivery.message.topic().to_owned());
        }
        self.count_partitions();
        let batch = Batch::together(outcomes);
        let strangers = self.hand_over(messages, &batch, outcomes).await;
        self.ask_about(strangers, self.slot(count), outcomes);
        loop {
            let settled = batch.is_settled();
            let suspects = batch.take_suspects();
            if !suspects.is_empty() {
                self.isolate(suspects, outcomes, end).await;
            } else if settled {
                return;
            } else if timeout_at(end, batch.changed()).await.is_err() {
                self.slot(count).retire_if_dead();
                (0..count).for_each(|index| fail_timed_out(outcomes, index));
                return;
            }
        }
    }

    async fn check(&self) -> Result<(), PublishError> {
        let unavailable = |code| PublishError::new(PublishErrorKind::Unavailable, code);
        let producer = self.together.producer().map_err(|refusal| unavailable(refusal.code))?;
        let topic = self.topic.get().cloned();
        let timeout = CHECK_TIMEOUT.min(self.timing.message);
        let fetch = move || {
            let fetched = producer.client().fetch_metadata(topic.as_deref(), timeout);
            fetched.map(drop).map_err(|error| error.rdkafka_error_code())
        };
        let code = match tokio::task::spawn_blocking(fetch).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(code)) => code,
            Err(_) => None,
        };
        Err(unavailable(code.unwrap_or(RDKafkaErrorCode::Fail)))
    }

    async fn close(&self, within: Duration) {
        tokio::join!(
            self.together.close(within),
            self.bulk.close(within),
            self.alone.close(within)
        );
    }
}

impl fmt::Debug for KafkaBroker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaBroker")
            .field("profile", &self.profile)
            .field("properties", &self.together)
            .finish_non_exhaustive()
    }
}

/// The code is all that is told about an error: texts of the broker may quote data.
fn fail(outcomes: &Outcomes, index: usize, kind: PublishErrorKind, code: RDKafkaErrorCode) {
    outcomes.failed(index, PublishError::new(kind, code));
}

fn fail_timed_out(outcomes: &Outcomes, index: usize) {
    fail(outcomes, index, PublishErrorKind::Unknown, RDKafkaErrorCode::OperationTimedOut);
}
