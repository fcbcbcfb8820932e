//! What librdkafka calls back: delivery reports, errors and log lines.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use outbox_core::delivery::Receipt;
use rdkafka::ClientContext;
use rdkafka::bindings::RD_KAFKA_OFFSET_INVALID;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::ProducerContext;

use crate::batch::Ticket;
use crate::partitions::Partitions;
use crate::secrets::Secrets;
use crate::verdict::{self, Verdict};

/// Runs on the polling thread. Nothing here may panic through: a panic would end the polling and
/// with it every answer, in silence.
pub(crate) struct Context {
    secrets: Secrets,
    partitions: Arc<Partitions>,
    acknowledged: AtomicBool,
    outdated: AtomicBool,
    /// The errors that were told lately, and when.
    told: Mutex<Vec<(RDKafkaErrorCode, Instant)>>,
}

/// How long the same error is not worth another warning: in an outage librdkafka reports one with
/// every attempt to connect, dozens of times a second.
const TOLD_FOR: Duration = Duration::from_secs(30);

/// The offset of a message that no broker acknowledged. librdkafka reports it as delivered when a later
/// one of its partition was: what came before, it concludes, must have arrived. But a broker without a
/// state of this producer (it was just elected, or the topic is new) takes any sequence number, and may
/// have refused what came before.
const NEVER_ANSWERED: i64 = RD_KAFKA_OFFSET_INVALID as i64;

impl Context {
    pub(crate) fn new(secrets: Secrets, partitions: Arc<Partitions>) -> Self {
        let acknowledged = AtomicBool::new(false);
        let outdated = AtomicBool::new(false);
        Self { secrets, partitions, acknowledged, outdated, told: Mutex::default() }
    }

    /// Whether a broker refused the epoch of this producer. librdkafka raises it with each refusal of a
    /// message, and after 32,768 times begins anew with 0 under the same id: the broker takes nothing
    /// then, or takes new messages for repetitions of old ones.
    pub(crate) fn is_outdated(&self) -> bool {
        self.outdated.load(Ordering::Relaxed)
    }

    /// Whether the broker acknowledged anything to this producer.
    pub(crate) fn has_acknowledged(&self) -> bool {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Whether an error with this code is worth a warning.
    fn is_news(&self, code: RDKafkaErrorCode, now: Instant) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|(_, at)| now.saturating_duration_since(*at) < TOLD_FOR);
        let is_news = told.iter().all(|(known, _)| *known != code);
        if is_news {
            told.push((code, now));
        }
        is_news
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        shielded(|| {
            let line = self.secrets.scrub(line);
            match level {
                RDKafkaLogLevel::Emerg
                | RDKafkaLogLevel::Alert
                | RDKafkaLogLevel::Critical
                | RDKafkaLogLevel::Error => tracing::error!(facility, "{line}"),
                RDKafkaLogLevel::Warning => tracing::warn!(facility, "{line}"),
                RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => {
                    tracing::info!(facility, "{line}");
                }
                RDKafkaLogLevel::Debug => tracing::debug!(facility, "{line}"),
            }
        });
    }

    fn stats_raw(&self, statistics: &[u8]) {
        shielded(|| {
            tracing::debug!(statistics = %String::from_utf8_lossy(statistics), "kafka statistics");
        });
    }

    fn error(&self, error: KafkaError, reason: &str) {
        let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
        shielded(|| {
            let reason = self.secrets.scrub(reason);
            if self.is_news(code, Instant::now()) {
                tracing::warn!(?code, "kafka client: {reason}");
            } else {
                tracing::debug!(?code, "kafka client: {reason}");
            }
        });
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Ticket>;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: Box<Ticket>) {
        match result {
            // librdkafka says so of what was refused as well, when the broker took something later.
            Ok(message) if message.offset() == NEVER_ANSWERED => {
                ticket.report(Err((RDKafkaErrorCode::NoOffset, message)));
            }
            Ok(message) => {
                self.acknowledged.store(true, Ordering::Relaxed);
                shielded(|| self.partitions.answered(message.topic(), message.partition()));
                ticket.report(Ok(receipt(message.partition(), message.offset())));
            }
            Err((error, message)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                let (topic, partition) = (message.topic(), message.partition());
                if code == RDKafkaErrorCode::MessageTimedOut {
                    shielded(|| self.partitions.timed_out(topic, partition, Instant::now()));
                }
                if code == RDKafkaErrorCode::InvalidProducerEpoch {
                    self.outdated.store(true, Ordering::Relaxed);
                }
                ticket.report(Err((code, message)));
                if verdict::of_report(code) == Verdict::Suspect {
                    // It was refused, and by the leader: the partition has one.
                    shielded(|| {
                        self.partitions.answered(topic, partition);
                        if self.is_news(code, Instant::now()) {
                            tracing::warn!(
                                ?code,
                                topic,
                                "kafka refused a request; its messages are sent again one by one, \
                                 which is slow"
                            );
                        }
                    });
                }
            }
        }
    }
}

/// A message whose retry the broker recognised as a repetition is acknowledged without an offset. (Were
/// several recognised at once, librdkafka counts on from there: those offsets are wrong.)
fn receipt(partition: i32, offset: i64) -> Receipt {
    Receipt::new((partition >= 0).then_some(partition), (offset >= 0).then_some(offset))
}

/// Runs `call`; a panic in it goes no further. Its text went to the panic hook.
pub(crate) fn shielded(call: impl FnOnce()) {
    _ = catch_unwind(AssertUnwindSafe(call));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::builder::Partitioner;

    #[test]
    fn an_error_is_worth_a_warning_once_in_a_while() {
        let partitions = Partitions::new(Partitioner::Murmur2, Duration::from_secs(15));
        let context = Context::new(Secrets::default(), Arc::new(partitions));
        let now = Instant::now();
        let (down, auth) = (RDKafkaErrorCode::AllBrokersDown, RDKafkaErrorCode::Authentication);
        assert!(context.is_news(down, now));
        assert!(!context.is_news(down, now + TOLD_FOR / 2));
        assert!(context.is_news(auth, now + TOLD_FOR / 2), "it is another one");
        assert!(context.is_news(down, now + TOLD_FOR));
    }
}
