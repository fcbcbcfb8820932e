//! What can be built, and what is printed of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::error::Error;
use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outbox_core::broker::Broker;
use outbox_kafka::{
    Compression, KafkaBroker, KafkaBuildError, KafkaBuildErrorKind, Partitioner, Security,
};

use crate::cluster::{Cluster, kinds, message, publish};

const CANARY: &str = "canary-7f3a9b";

/// All that an error says about itself.
fn text_of(error: &KafkaBuildError) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(" {error} {error:?}");
        source = error.source();
    }
    text
}

#[test]
fn settings_out_of_range_are_invalid() {
    let builder = || KafkaBroker::builder("localhost:1");
    let cases = [
        (KafkaBroker::builder(" , "), "bootstrap.servers"),
        (builder().message_timeout(Duration::ZERO), "message.timeout.ms"),
        (builder().message_timeout(Duration::from_secs(3_600)), "message.timeout.ms"),
        (builder().message_timeout(Duration::MAX), "message.timeout.ms"),
        (builder().max_message_bytes(10), "message.max.bytes"),
        (builder().max_message_bytes(usize::MAX), "message.max.bytes"),
        (builder().linger(Duration::from_secs(15)), "linger.ms"),
        (builder().linger(Duration::MAX), "linger.ms"),
        (builder().property("no.such.property", "1"), "no.such.property"),
        (builder().property("socket.timeout.ms", CANARY), "socket.timeout.ms"),
        (builder().property("max.in.flight", CANARY), "max.in.flight"),
    ];
    for (builder, key) in cases {
        let error = builder.build().unwrap_err();
        assert_eq!((error.kind(), error.key()), (KafkaBuildErrorKind::Invalid, Some(key)));
        assert!(!text_of(&error).contains(CANARY), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_linger_and_the_longest_time_to_close_are_taken_as_they_are() {
    let cluster = Cluster::new(1);
    let broker = cluster.builder().linger(Duration::ZERO).build().unwrap();
    assert_eq!(kinds(&publish(&broker, [message("k", "p")]).await), [None]);
    broker.close(Duration::MAX).await;
}

#[test]
fn a_property_that_would_break_a_promise_is_refused_by_name_and_reason() {
    let error = KafkaBroker::builder("localhost:1").property("acks", "1").build().unwrap_err();
    assert_eq!(error.kind(), KafkaBuildErrorKind::Refused);
    assert_eq!(error.to_string(), "property would break a promise of the outbox: `acks`");
    assert_eq!(error.source().unwrap().to_string(), "an acknowledged message could be lost");
}

#[test]
fn a_property_that_security_decides_is_reserved() {
    let sasl = Security::plaintext().sasl_plain("user", CANARY);
    let set = |security: &Security, key: &str, value: &str| {
        let builder = KafkaBroker::builder("localhost:1").security(security.clone());
        builder.property(key, value).build().map_err(|error| error.kind())
    };
    for key in ["sasl.mechanism", "sasl.mechanisms", "sasl.password", "security.protocol"] {
        let kind = set(&sasl, key, "SCRAM-SHA-512").unwrap_err();
        assert_eq!(kind, KafkaBuildErrorKind::Reserved, "{key}");
    }
    set(&sasl, "client.rack", "a").unwrap();
    set(&Security::plaintext(), "security.protocol", "plaintext").unwrap();
}

#[cfg(feature = "ssl")]
#[test]
fn no_property_adds_to_the_authorities_that_security_trusts() {
    for key in ["ssl.ca.location", "ssl.ca.pem"] {
        let builder = KafkaBroker::builder("localhost:1").security(Security::tls());
        let error = builder.property(key, "/etc/private-ca.pem").build().unwrap_err();
        assert_eq!((error.kind(), error.key()), (KafkaBuildErrorKind::Reserved, Some(key)));
    }
}

#[test]
fn no_secret_is_printed_by_builder_broker_or_error() {
    let security = Security::plaintext().sasl_plain(CANARY, CANARY);
    assert!(!format!("{security:?}").contains(CANARY));
    let builder =
        KafkaBroker::builder("localhost:1").security(security).property("client.rack", CANARY);
    assert!(!format!("{builder:?}").contains(CANARY), "{builder:?}");
    let broker = builder.clone().build().unwrap();
    let text = format!("{broker:?}");
    assert!(!text.contains(CANARY), "{text}");
    assert!(text.contains("sasl.password") && text.contains("murmur2_random"), "{text}");

    for key in [
        "no.such.property",
        "security.protocol",
        "sasl.mechanism",
        "debug",
        "socket.keepalive.enable",
        "ssl.key.pem",
        "sasl.oauthbearer.config",
        "transactional.id",
        "enable.idempotence",
        "acks",
        "batch.size",
        "retries",
        "partitioner",
    ] {
        let Err(error) = builder.clone().property(key, CANARY).build() else { continue };
        assert!(!text_of(&error).contains(CANARY), "{key}: {}", text_of(&error));
    }
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_connection_in_the_clear_to_another_machine_is_reported_once_when_the_broker_is_built() {
    let reports = |bootstrap: &str| {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        tracing::subscriber::with_default(subscriber, || {
            KafkaBroker::builder(bootstrap).build().unwrap();
        });
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        text.matches("the connection to the broker is not encrypted").count()
    };
    // It leads to this machine, but is no address of loopback.
    assert_eq!(reports("0.0.0.0:1"), 1);
    assert_eq!(reports("localhost:1,127.0.0.1:1"), 0);
}

#[test]
fn the_profile_tells_what_was_set() {
    let broker = KafkaBroker::builder("localhost:1").build().unwrap();
    assert_eq!(broker.profile().max_message_bytes, 1_000_000);
    assert_eq!(broker.profile().undecided, Duration::from_secs(20));
    let broker = KafkaBroker::builder("localhost:1")
        .max_message_bytes(2_000)
        .message_timeout(Duration::from_secs(1))
        .build()
        .unwrap();
    assert_eq!(broker.profile().max_message_bytes, 2_000);
    assert!(broker.profile().undecided > Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_compression_and_partitioner_delivers() {
    let cluster = Cluster::new(3);
    for compression in [Compression::None, Compression::Gzip, Compression::Snappy, Compression::Lz4]
    {
        let broker = cluster.builder().compression(compression).build().unwrap();
        assert_eq!(kinds(&publish(&broker, [message("k", "p")]).await), [None]);
    }
    for partitioner in [Partitioner::Murmur2, Partitioner::Crc32, Partitioner::Fnv1a] {
        let broker = cluster.builder().partitioner(partitioner).build().unwrap();
        let messages = (0..10).map(|_| message("k", "p"));
        assert_eq!(kinds(&publish(&broker, messages).await), [None; 10]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_without_a_broker_says_unavailable() {
    let broker = KafkaBroker::builder("127.0.0.1:1")
        .message_timeout(Duration::from_millis(300))
        .build()
        .unwrap();
    let error = broker.check().await.unwrap_err();
    assert_eq!(error.kind(), outbox_core::broker::PublishErrorKind::Unavailable);
}
