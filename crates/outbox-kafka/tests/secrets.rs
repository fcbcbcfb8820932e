//! Passwords of brokers are never shown: not by `Debug`, not by an error, not in the log, which
//! librdkafka fills from threads of its own. So this program has a subscriber for all threads.

use std::error::Error;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use outbox_core::broker::{Broker, Outcomes, Outgoing};
use outbox_core::{Delivery, Lane, Message, Position};
use outbox_kafka::rdkafka::mocking::MockCluster;
use outbox_kafka::{KafkaBroker, KafkaBuilder, Security};

const USER: &str = "canary-user-30c4";
const PASSWORD: &str = "canary-password-81f2";
const CONTENT: [&str; 3] = ["canary-key-5f1c", "canary-payload-77ab", "canary-header-e09d"];

/// Properties of librdkafka that hold secrets.
const SECRET: &[&str] = &[
    "sasl.password",
    "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.config",
    "ssl.key.password",
    "ssl.key.pem",
    "ssl.keystore.password",
];

/// Everything that was shown to anybody.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Vec<u8>>>);

impl Shown {
    fn show(&self, what: impl std::fmt::Debug) {
        writeln!(self.clone(), "{what:?} {what:#?}").expect("it is in memory");
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    #[track_caller]
    fn assert_clean(&self) {
        let text = self.text();
        for canary in CONTENT.into_iter().chain([USER, PASSWORD]) {
            let numbers = format!("{:?}", canary.as_bytes());
            let numbers = numbers.trim_matches(['[', ']']);
            let line = text.lines().find(|line| line.contains(canary) || line.contains(numbers));
            assert_eq!(line, None, "{canary} was shown");
        }
    }
}

impl Write for Shown {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

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

fn chatty(bootstrap: &str) -> KafkaBuilder {
    KafkaBroker::builder(bootstrap)
        .message_timeout(Duration::from_secs(2))
        .property("debug", "all")
        .property("statistics.interval.ms", "100")
}

/// Publishes one message of canaries, whatever comes of it.
async fn publish(broker: &KafkaBroker, payload: &str) -> String {
    let [key, _, header] = CONTENT;
    let builder = Message::builder("orders").key(key).payload(payload).header("auth", header);
    let delivery = Delivery::new(Position::START, Lane(0), builder.build().expect("valid"));
    let not_after = tokio::time::Instant::now() + Duration::from_secs(60);
    let outcomes = Outcomes::new(1, Arc::default());
    broker.publish(vec![Outgoing::new(delivery, not_after)], &outcomes).await;
    format!("{:?}", outcomes.take())
}

/// A port where nobody listens.
fn closed() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address").to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_in_every_kind_of_trouble_shows_no_password_and_no_content() {
    let shown = Shown::default();
    let writer = shown.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::level_filters::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::set_global_default(subscriber).expect("the first of this program");

    let cluster = MockCluster::new(1).expect("a cluster");
    cluster.create_topic("orders", 1, 1).expect("a topic");
    // Nobody is there; a cluster that knows no SASL; the same, and it works.
    let sasl = || Security::plaintext().sasl_plain(USER, PASSWORD);
    let places = [
        chatty(&closed()).security(sasl()),
        chatty(&cluster.bootstrap_servers()).security(sasl()),
        chatty(&cluster.bootstrap_servers())
            .property("client.rack", PASSWORD)
            .message_timeout(Duration::from_secs(60)),
    ];
    let mut outcomes = Vec::new();
    for builder in places {
        shown.show(&builder);
        let broker = builder.build().expect("it connects later");
        shown.show(&broker);
        if let Err(error) = broker.check().await {
            writeln!(shown.clone(), "{}", text_of(&error)).expect("it is in memory");
        }
        let outcome = publish(&broker, CONTENT[1]).await;
        shown.show(&outcome);
        outcomes.push(outcome);
        broker.close(Duration::from_secs(5)).await;
    }
    assert!(outcomes[0].contains("Failed") && outcomes[2].contains("Delivered"), "{outcomes:?}");
    // One that is refused before it is sent.
    let small = chatty(&cluster.bootstrap_servers()).max_message_bytes(1_000);
    let refused =
        publish(&small.build().expect("it connects later"), &CONTENT[1].repeat(100)).await;
    assert!(refused.contains("Rejected"), "{refused}");
    shown.show(&refused);
    // The debug lines and the statistics come from other threads.
    let start = Instant::now();
    let text = loop {
        let text = shown.text();
        let words = ["kafka statistics", "SaslHandshake", "Connect to"];
        if words.iter().all(|word| text.contains(word)) {
            break text;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "what was exercised: {text}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(text.contains("[redacted]"), "{text}");
    shown.assert_clean();
}

#[test]
fn properties_that_hold_secrets_are_shown_by_name_only() {
    for key in SECRET {
        let builder = KafkaBroker::builder("localhost:1").property(*key, PASSWORD);
        let text = format!("{builder:?} {builder:#?}");
        assert!(text.contains(key) && !text.contains(PASSWORD), "{text}");
        // Some need a feature of librdkafka: refused or taken, nothing shows the value.
        match builder.property("sasl.mechanism", "PLAIN").build() {
            Ok(broker) => assert!(!format!("{broker:?}").contains(PASSWORD)),
            Err(error) => assert!(!text_of(&error).contains(PASSWORD), "{}", text_of(&error)),
        }
    }
}

#[cfg(feature = "ssl")]
#[test]
fn the_password_of_a_private_key_is_not_shown() {
    let security = Security::tls()
        .trust_pem("no certificate")
        .client_pem("no certificate", PASSWORD)
        .client_key_password(PASSWORD)
        .scram_sha_512(USER, PASSWORD);
    let builder = KafkaBroker::builder("localhost:1").security(security.clone());
    let text = format!("{security:?} {builder:?}");
    assert!(!text.contains(PASSWORD) && !text.contains(USER), "{text}");
    let error = builder.build().expect_err("it is no certificate");
    assert!(!text_of(&error).contains(PASSWORD), "{}", text_of(&error));
}
