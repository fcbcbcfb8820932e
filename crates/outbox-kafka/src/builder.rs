//! The settings of a broker.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use outbox_core::broker::BrokerProfile;
use rdkafka::ClientConfig;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use tokio::sync::Mutex;

use crate::broker::KafkaBroker;
use crate::error::{KafkaBuildError, KafkaBuildErrorKind};
use crate::exposure::is_exposed;
use crate::partitions::Partitions;
use crate::producer::Slot;
use crate::properties;
use crate::secrets::{self, Secrets};
use crate::security::Security;
use crate::timing::Timing;

/// How long librdkafka may try to deliver one message. With what else can pass until a message is
/// decided this makes 20 s, well below the default lease.
pub(crate) const DEFAULT_MESSAGE_TIMEOUT: Duration = Duration::from_secs(15);
/// The largest message; librdkafka's own default, and below the default limit of a topic.
const DEFAULT_MAX_MESSAGE_BYTES: usize = 1_000_000;
/// How long a message waits for others: not at all, since a dispatcher hands over whole batches.
/// librdkafka rounds anything below a millisecond up to one.
const DEFAULT_LINGER: Duration = Duration::ZERO;
/// The same for a large publish, unless more was asked for: while so many messages are handed over,
/// requests would stay small.
const BULK_LINGER: Duration = Duration::from_millis(10);
/// How long a topic may be unknown before messages for it fail, at most half the message timeout.
/// librdkafka's 30 s would outlast it: a misspelt topic would look like an outage.
const TOPIC_PROPAGATION: Duration = Duration::from_secs(2);
/// The least room for messages in librdkafka's queue: a dispatcher's window, unless it was told of
/// another.
pub(crate) const MIN_QUEUE_MESSAGES: u64 = 20_000;
/// The least room in kilobytes, likewise.
pub(crate) const MIN_QUEUE_KBYTES: u64 = 65_536;

/// Builds a [`KafkaBroker`]; made by [`KafkaBroker::builder`].
///
/// `Debug` prints the values of harmless properties only.
#[derive(Clone)]
#[must_use = "a builder does nothing until `build` is called"]
pub struct KafkaBuilder {
    bootstrap: String,
    client_id: String,
    message_timeout: Duration,
    max_message_bytes: usize,
    linger: Duration,
    compression: Compression,
    partitioner: Partitioner,
    security: Security,
    properties: Vec<(String, String)>,
}

impl KafkaBuilder {
    pub(crate) fn new(bootstrap: String) -> Self {
        Self {
            bootstrap,
            client_id: "outbox".to_owned(),
            message_timeout: DEFAULT_MESSAGE_TIMEOUT,
            max_message_bytes: DEFAULT_MAX_MESSAGE_BYTES,
            linger: DEFAULT_LINGER,
            compression: Compression::None,
            partitioner: Partitioner::Murmur2,
            security: Security::plaintext(),
            properties: Vec::new(),
        }
    }

    /// Sets how the connection is protected. Default: not at all.
    pub fn security(mut self, security: Security) -> Self {
        self.security = security;
        self
    }

    /// Sets how long librdkafka may try to deliver one message, from 100 ms to 5 min. Default:
    /// 15 s. Past it the message may or may not be in the log and is sent again. The longest
    /// undecided time, and with it the least lease of a dispatcher, grows with it.
    pub fn message_timeout(mut self, timeout: Duration) -> Self {
        self.message_timeout = timeout;
        self
    }

    /// Sets the largest message in bytes, 1,000 to 100,000,000. Default: 1,000,000. Give it the
    /// smallest `max.message.bytes` among your topics; batches are kept below it, too.
    pub fn max_message_bytes(mut self, bytes: usize) -> Self {
        self.max_message_bytes = bytes;
        self
    }

    /// Sets how long a message waits for others of its partition. Default: not at all. In a publish
    /// of a thousand messages and more, which only a backlog makes, it is 10 ms at least.
    pub fn linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }

    /// Sets how batches are compressed. Default: not at all.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.compression = compression;
        self
    }

    /// Sets the name under which the broker logs and limits this client. Default: `outbox`.
    pub fn client_id(mut self, id: impl Into<String>) -> Self {
        self.client_id = id.into();
        self
    }

    /// Sets how keys map to partitions. Default: [`Partitioner::Murmur2`], as Java clients do.
    /// With the others, messages with a key are sent to a partition even while it does not answer.
    ///
    /// All producers of a topic must agree, relays included, or messages of one key land in
    /// several partitions and lose their order. Changing it moves keys.
    pub fn partitioner(mut self, partitioner: Partitioner) -> Self {
        self.partitioner = partitioner;
        self
    }

    /// Sets any other property of librdkafka. [`KafkaBuilder::build`] refuses those that would
    /// break a promise of the outbox, those that have a method here, and those that
    /// [`security`](Self::security) decides, if it was called with more than plaintext.
    pub fn property(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.properties.push((key.into(), value.into()));
        self
    }

    /// Checks everything and creates the producer. No connection is awaited: see
    /// [`Broker::check`](outbox_core::Broker::check). That nothing is encrypted on the way to
    /// another machine is reported once, as a warning in the log.
    ///
    /// # Errors
    ///
    /// [`KafkaBuildErrorKind::Refused`], [`KafkaBuildErrorKind::Reserved`],
    /// [`KafkaBuildErrorKind::Invalid`] or [`KafkaBuildErrorKind::Client`]. The error names the
    /// property, never its value.
    pub fn build(self) -> Result<KafkaBroker, KafkaBuildError> {
        self.check()?;
        let timing = Timing::new(self.message_timeout);
        let together = self.config(timing)?;
        let protocol = together.get("security.protocol").unwrap_or("plaintext");
        if is_exposed(protocol, &self.bootstrap) {
            tracing::warn!("the connection to the broker is not encrypted and leaves this machine");
        }
        // A suspect gets one try and one verdict. Without retries there is nothing to duplicate or
        // reorder, so this producer needs no producer id, for which it would wait half a second.
        let mut alone = together.clone();
        alone
            .remove("message.send.max.retries")
            .set("client.id", format!("{}-alone", self.client_id))
            .set("enable.idempotence", "false")
            .set("retries", "0")
            .set("message.timeout.ms", millis(timing.alone()))
            .set("linger.ms", "0")
            .set("batch.num.messages", "1");
        let mut bulk = together.clone();
        bulk.set("client.id", format!("{}-bulk", self.client_id))
            .set("linger.ms", linger_millis(self.linger.max(BULK_LINGER)));
        let secrets = Secrets::of(self.all_properties());
        let partitions = Arc::new(Partitions::new(self.partitioner, timing.message));
        let slot = |config| Slot::new(config, &partitions);
        let (together, bulk, alone) = (slot(together), slot(bulk), slot(alone));
        for slot in [&together, &bulk] {
            slot.start().map_err(|error| build_error(error, &secrets))?;
        }
        Ok(KafkaBroker {
            profile: BrokerProfile::new(self.max_message_bytes, timing.undecided()),
            timing,
            together,
            bulk,
            alone,
            partitions,
            turn: Mutex::default(),
            turn_alone: Mutex::default(),
            topic: OnceLock::new(),
        })
    }

    fn check(&self) -> Result<(), KafkaBuildError> {
        let invalid = |key: &str, reason: &str| {
            Err(KafkaBuildError::of_key(KafkaBuildErrorKind::Invalid, key, reason))
        };
        if self.bootstrap.split(',').all(|server| server.trim().is_empty()) {
            return invalid("bootstrap.servers", "no server is named");
        }
        let (least, most) = (Duration::from_millis(100), Duration::from_secs(300));
        if !(least..=most).contains(&self.message_timeout) {
            return invalid("message.timeout.ms", "not between 100 ms and 5 min");
        }
        if !(1_000..=100_000_000).contains(&self.max_message_bytes) {
            return invalid("message.max.bytes", "not between 1,000 and 100,000,000");
        }
        if self.linger >= self.message_timeout {
            return invalid("linger.ms", "not below the message timeout");
        }
        Ok(())
    }

    fn config(&self, timing: Timing) -> Result<ClientConfig, KafkaBuildError> {
        let mut config = ClientConfig::new();
        let propagation = TOPIC_PROPAGATION.min(timing.message / 2);
        config.set("topic.metadata.propagation.max.ms", millis(propagation));
        for (key, value) in &self.properties {
            if self.security.decides(key) {
                let kind = KafkaBuildErrorKind::Reserved;
                return Err(KafkaBuildError::of_key(kind, key, "`security` decides it"));
            }
            if properties::check(key, value)? {
                config.set(key, value);
            }
        }
        for (key, value) in self.security.properties() {
            // A protocol that was set as a property stays: security was not asked for.
            if config.get(key).is_none() {
                config.set(key, value);
            }
        }
        config
            .set("bootstrap.servers", &self.bootstrap)
            .set("client.id", &self.client_id)
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("allow.auto.create.topics", "false")
            .set("partitioner", self.partitioner.property())
            .set("message.timeout.ms", millis(timing.message))
            .set("message.max.bytes", self.max_message_bytes.to_string())
            .set("linger.ms", linger_millis(self.linger))
            .set("compression.type", self.compression.property())
            .set("reconnect.backoff.ms", millis(timing.reconnect.min(Duration::from_millis(100))))
            .set("reconnect.backoff.max.ms", millis(timing.reconnect));
        // The log level of librdkafka is no filter of ours: what is printed is for the
        // subscriber to say. Debug lines exist only if the property `debug` asks for them.
        config.set_log_level(if config.get("debug").is_some() {
            RDKafkaLogLevel::Debug
        } else {
            RDKafkaLogLevel::Info
        });
        Ok(config)
    }

    fn all_properties(&self) -> impl Iterator<Item = (&str, &str)> {
        let own = self.properties.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        self.security.properties().chain(own)
    }
}

/// Milliseconds with their fractions, which `linger.ms` takes.
fn linger_millis(linger: Duration) -> String {
    (linger.as_secs_f64() * 1e3).to_string()
}

impl fmt::Debug for KafkaBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let properties: Vec<_> = self
            .all_properties()
            .map(|(key, value)| (key, secrets::printable(key, value)))
            .collect();
        f.debug_struct("KafkaBuilder")
            .field("bootstrap", &self.bootstrap)
            .field("client_id", &self.client_id)
            .field("message_timeout", &self.message_timeout)
            .field("max_message_bytes", &self.max_message_bytes)
            .field("linger", &self.linger)
            .field("compression", &self.compression)
            .field("partitioner", &self.partitioner)
            .field("properties", &properties)
            .finish()
    }
}

fn millis(duration: Duration) -> String {
    duration.as_millis().to_string()
}

/// rdkafka's own error prints the value of the property.
fn build_error(error: KafkaError, secrets: &Secrets) -> KafkaBuildError {
    match error {
        KafkaError::ClientConfig(_, reason, key, value) => {
            let reason = if value.is_empty() { reason } else { reason.replace(&value, "..") };
            KafkaBuildError::of_key(KafkaBuildErrorKind::Invalid, key, &*secrets.scrub(&reason))
        }
        KafkaError::ClientCreation(reason) => KafkaBuildError::client(&*secrets.scrub(&reason)),
        other => KafkaBuildError::client(
            other.rdkafka_error_code().unwrap_or(rdkafka::error::RDKafkaErrorCode::Fail),
        ),
    }
}

/// How batches are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// gzip: small, and slow.
    Gzip,
    /// Snappy.
    Snappy,
    /// LZ4: the one to choose when the network or the broker's disk is the limit.
    Lz4,
    /// Zstandard.
    #[cfg(feature = "zstd")]
    #[cfg_attr(docsrs, doc(cfg(feature = "zstd")))]
    Zstd,
}

impl Compression {
    fn property(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Snappy => "snappy",
            Self::Lz4 => "lz4",
            #[cfg(feature = "zstd")]
            Self::Zstd => "zstd",
        }
    }
}

/// How keys map to partitions. Messages without a key go to any partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Partitioner {
    /// Murmur2, as the Java client does.
    #[default]
    Murmur2,
    /// CRC32, as librdkafka does unless told otherwise. An empty key counts as none: messages of
    /// an empty key have no order.
    Crc32,
    /// FNV-1a, as Sarama does.
    Fnv1a,
}

impl Partitioner {
    fn property(self) -> &'static str {
        match self {
            Self::Murmur2 => "murmur2_random",
            Self::Crc32 => "consistent_random",
            Self::Fnv1a => "fnv1a_random",
        }
    }
}
