//! What holds for any settings.

use std::error::Error;
use std::time::Duration;

use outbox_kafka::KafkaBroker;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

const PASSWORD: &str = "canary-password-81f2";

/// Properties of librdkafka that hold secrets.
const SECRET: &[&str] =
    &["sasl.password", "sasl.oauthbearer.config", "ssl.key.password", "ssl.key.pem"];

/// Properties whose values are printed, because they are needed to find a mistake.
const PRINTED: &[&str] = &[
    "acks",
    "batch.num.messages",
    "batch.size",
    "client.id",
    "compression.type",
    "enable.idempotence",
    "linger.ms",
    "message.max.bytes",
    "message.timeout.ms",
    "partitioner",
    "queue.buffering.max.kbytes",
    "queue.buffering.max.messages",
    "sasl.mechanism",
    "security.protocol",
];

/// All that an error says about itself.
fn text_of(error: &dyn Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(" {error} {error:?}");
        source = error.source();
    }
    text
}

/// Names that librdkafka knows, ours among them, and any others.
fn any_key() -> impl Strategy<Value = String> {
    let known = prop::sample::select(vec![
        "acks",
        "api.version.request",
        "batch.num.messages",
        "batch.size",
        "broker.address.family",
        "builtin.features",
        "client.dns.lookup",
        "client.id",
        "client.rack",
        "compression.level",
        "compression.type",
        "connections.max.idle.ms",
        "debug",
        "delivery.report.only.error",
        "enable.idempotence",
        "enable.random.seed",
        "linger.ms",
        "log_level",
        "max.in.flight",
        "message.max.bytes",
        "message.timeout.ms",
        "metadata.max.age.ms",
        "partitioner",
        "queue.buffering.max.kbytes",
        "queue.buffering.max.messages",
        "receive.message.max.bytes",
        "retries",
        "retry.backoff.ms",
        "sasl.mechanism",
        "sasl.username",
        "security.protocol",
        "socket.keepalive.enable",
        "socket.timeout.ms",
        "sticky.partitioning.linger.ms",
        "topic.metadata.refresh.interval.ms",
        "transactional.id",
    ]);
    prop_oneof![
        6 => known.prop_map(str::to_owned),
        2 => prop::sample::select(SECRET).prop_map(str::to_owned),
        1 => "[a-z]{1,9}(\\.[a-z]{1,9}){0,3}",
        1 => any::<String>(),
    ]
}

fn any_value() -> impl Strategy<Value = String> {
    prop_oneof![
        Just(PASSWORD.to_owned()),
        "-?[0-9]{1,11}",
        "true|false|all|none|PLAIN|ssl|sasl_plaintext|plaintext|any|fifo",
        any::<String>(),
    ]
}

fn config() -> ProptestConfig {
    let file = FileFailurePersistence::Direct("tests/properties.regressions.txt");
    ProptestConfig {
        // Each makes a client with threads of its own.
        cases: 64,
        failure_persistence: Some(Box::new(file)),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_setting_is_taken_or_refused_by_name_and_without_its_value(
        pairs in prop::collection::vec((any_key(), any_value()), 1..4),
        bootstrap in prop_oneof![Just("127.0.0.1:1".to_owned()), any::<String>()],
        client_id: String,
        millis: u64,
        bytes: usize,
        reasonable: bool,
    ) {
        let mut builder = KafkaBroker::builder(bootstrap).client_id(client_id);
        if !reasonable {
            builder = builder
                .message_timeout(Duration::from_millis(millis))
                .linger(Duration::from_millis(millis / 2))
                .max_message_bytes(bytes);
        }
        for (key, value) in &pairs {
            builder = builder.property(key, value);
        }
        let secret = |text: &str| text.contains(PASSWORD);
        let shows = pairs.iter().any(|(key, value)| secret(value) && PRINTED.contains(&key.as_str()));
        let names_it = pairs.iter().any(|(key, _)| secret(key));
        let text = format!("{builder:?}");
        prop_assert!(shows || names_it || !secret(&text), "{}", text);
        let (text, may_show) = match builder.build() {
            Ok(broker) => (format!("{broker:?}"), shows),
            Err(error) => (text_of(&error), names_it),
        };
        prop_assert!(may_show || !secret(&text), "{}", text);
    }
}
