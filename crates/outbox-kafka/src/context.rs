//! What librdkafka calls back: delivery reports, errors and log lines.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use outbox_core::delivery::Receipt;
use rdkafka::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{DeliveryResult, Message};
use rdkafka::producer::ProducerContext;

use crate::batch::Ticket;
use crate::partitions::Partitions;
use crate::secrets::Secrets;

/// Runs on the polling thread. Nothing here may panic through: a panic would end the polling and
/// with it every answer, in silence.
pub(crate) struct Context {
    secrets: Secrets,
    partitions: Arc<Partitions>,
    acknowledged: AtomicBool,
    last_error: Mutex<Option<String>>,
}

impl Context {
    pub(crate) fn new(secrets: Secrets, partitions: Arc<Partitions>) -> Self {
        let acknowledged = AtomicBool::new(false);
        Self { secrets, partitions, acknowledged, last_error: Mutex::default() }
    }

    /// Whether the broker acknowledged anything to this producer.
    pub(crate) fn has_acknowledged(&self) -> bool {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// rdkafka calls `error` twice for each event; this is true for the first of the two.
    fn is_first_call(&self, reason: &str) -> bool {
        let mut last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        let first = last.as_deref() != Some(reason);
        *last = first.then(|| reason.to_owned());
        first
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
            if self.is_first_call(reason) {
                tracing::warn!(?code, "kafka client: {}", self.secrets.scrub(reason));
            }
        });
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Ticket>;

    fn delivery(&self, result: &DeliveryResult<'_>, ticket: Box<Ticket>) {
        match result {
            Ok(message) => {
                self.acknowledged.store(true, Ordering::Relaxed);
                shielded(|| self.partitions.acknowledged(message.topic(), message.partition()));
                ticket.report(Ok(receipt(message.partition(), message.offset())));
            }
            Err((error, message)) => {
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Unknown);
                if code == RDKafkaErrorCode::MessageTimedOut {
                    let (topic, partition) = (message.topic(), message.partition());
                    shielded(|| self.partitions.timed_out(topic, partition, Instant::now()));
                }
                ticket.report(Err(code));
            }
        }
    }
}

/// A message whose retry the broker recognised as a repetition is acknowledged without an offset.
fn receipt(partition: i32, offset: i64) -> Receipt {
    Receipt::new((partition >= 0).then_some(partition), (offset >= 0).then_some(offset))
}

/// Runs `call`; a panic in it goes no further. Its text went to the panic hook.
pub(crate) fn shielded(call: impl FnOnce()) {
    _ = catch_unwind(AssertUnwindSafe(call));
}
