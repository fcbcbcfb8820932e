//! A broker of your own, from the public API alone: every message is one POST to a webhook.
//!
//! `cargo run --example custom_broker` starts a small receiver in this process, adds messages to a
//! store in memory, and lets a dispatcher deliver them to it.
//! `cargo test -p examples --example custom_broker` runs the conformance suite against the same
//! broker and receiver: one test for each line of the contract of [`Broker`], passed or failed by
//! name.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use base64::Engine;
use base64::prelude::BASE64_STANDARD as BASE64;
use futures_util::{StreamExt, stream};
use outbox_core::broker::{BrokerProfile, Outcomes, Outgoing, PublishError, PublishErrorKind};
use outbox_core::delivery::Receipt;
use outbox_core::message::header;
use outbox_core::{Broker, Delivery, Dispatcher, Message, async_trait};
use outbox_testing::{MemoryStore, Published};
use reqwest::StatusCode;
use tokio::net::TcpListener;
use tokio::time::Instant;

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How many requests are under way at a time.
const CONCURRENT: usize = 16;

/// What receivers take; the default of `Limits`, so that `add` refuses more than that.
const MAX_MESSAGE_BYTES: usize = 1_000_000;

// HTTP's own headers hold neither every byte nor null. A key is base64 here, and so is the value of
// each of the message's headers, which become lines of one name: `name =<base64>`, or `name` alone
// for null. Lines of one name keep their order.
const KEY: &str = "outbox-key";
const HEADER: &str = "outbox-header";
const TOMBSTONE: &str = "outbox-tombstone";

#[tokio::main]
async fn main() -> Result<()> {
    let receiver = Receiver::start(&["orders", "invoices"]).await?;
    let broker = Webhook::new(receiver.url(), TIMEOUT)?;
    let store = MemoryStore::new();

    let mut tx = store.begin();
    for event in ["placed", "paid", "shipped"] {
        let message = Message::builder("orders").key("order-1").payload(event).build()?;
        store.outbox().add(&mut tx, message).await?;
    }
    let message = Message::builder("invoices").key("order-1").payload("12.50").build()?;
    store.outbox().add(&mut tx, message).await?;
    tx.commit();

    let summary = Dispatcher::builder(store, broker).build()?.run_until_empty().await?;
    println!("delivered: {}", summary.delivered);
    for topic in ["orders", "invoices"] {
        for record in receiver.received(topic) {
            let text = |bytes: Option<Vec<u8>>| String::from_utf8(bytes.unwrap_or_default());
            let (key, payload) = (text(record.key)?, text(record.payload)?);
            println!("received: {topic}, {key}: {payload} ({})", record.message_id);
        }
    }
    let events: Vec<_> = receiver.received("orders").into_iter().map(|it| it.payload).collect();
    let expected = ["placed", "paid", "shipped"].map(|event| Some(event.as_bytes().to_vec()));
    ensure!(events == expected, "not received in order: {events:?}");
    Ok(())
}

// The broker ----------------------------------------------------------------------------------

/// Sends each message as `POST {base}/{topic}` with its payload as the body.
#[derive(Debug)]
struct Webhook {
    client: reqwest::Client,
    base: String,
    timeout: Duration,
}

impl Webhook {
    fn new(base: String, timeout: Duration) -> reqwest::Result<Self> {
        let client = reqwest::Client::builder()
            .timeout(timeout)
            // A POST that follows a redirect becomes a GET without its body, and looks delivered.
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()?;
        Ok(Self { client, base, timeout })
    }
}

#[async_trait]
impl Broker for Webhook {
    fn profile(&self) -> BrokerProfile {
        // The last request of a publish begins before one timeout is over, and takes another one.
        BrokerProfile::new(MAX_MESSAGE_BYTES, self.timeout * 2)
    }

    async fn publish(&self, batch: Vec<Outgoing>, outcomes: &Outcomes) {
        let until = Instant::now() + self.timeout;
        let queues = stream::iter(queues(batch));
        queues.for_each_concurrent(CONCURRENT, |queue| self.send(queue, until, outcomes)).await;
    }

    async fn check(&self) -> Result<(), PublishError> {
        let status = match self.client.head(&self.base).send().await {
            Ok(response) => response.status(),
            Err(error) => {
                let error = error.without_url();
                return Err(PublishError::new(PublishErrorKind::Unavailable, error));
            }
        };
        // Any other answer, 404 above all, shows that somebody is there.
        if status.is_server_error() { Err(PublishErrorKind::Unavailable.into()) } else { Ok(()) }
    }

    /// Nothing is queued here: a publish ends when its last request has been answered.
    async fn close(&self, _within: Duration) {}
}

impl Webhook {
    /// Sends messages one after the other. Behind one that failed none is sent, or it would pass.
    async fn send(&self, queue: Vec<(usize, Outgoing)>, until: Instant, outcomes: &Outcomes) {
        let mut passable = true;
        for (index, outgoing) in queue {
            let too_late = outgoing.is_overdue() || Instant::now() >= until;
            let sent = if passable && !too_late {
                self.post(&outgoing.delivery).await
            } else {
                Err(PublishErrorKind::NotSent.into())
            };
            passable = sent.is_ok();
            match sent {
                Ok(()) => outcomes.delivered(index, Receipt::default()),
                Err(error) => outcomes.failed(index, error),
            }
        }
    }

    async fn post(&self, delivery: &Delivery) -> Result<(), PublishError> {
        let message = &delivery.message;
        if message.size() > MAX_MESSAGE_BYTES {
            return Err(PublishErrorKind::Rejected.into());
        }
        let url = format!("{}/{}", self.base, message.topic());
        let mut request = self.client.post(url).header(header::ID, message.id().to_string());
        if delivery.state.retried {
            request = request.header(header::RETRIED, "true");
        }
        if let Some(key) = message.key() {
            request = request.header(KEY, BASE64.encode(key));
        }
        for (name, value) in message.headers().iter() {
            let value = value.map_or_else(String::new, |v| format!(" ={}", BASE64.encode(v)));
            request = request.header(HEADER, format!("{name}{value}"));
        }
        request = match message.payload() {
            Some(payload) => request.body(payload.to_vec()),
            None => request.header(TOMBSTONE, "true"),
        };
        match request.send().await {
            Ok(response) => verdict(response.status()),
            Err(error) => Err(unanswered(error)),
        }
    }
}

/// The messages of one topic and key, in their order; a message without a key has none.
fn queues(batch: Vec<Outgoing>) -> Vec<Vec<(usize, Outgoing)>> {
    let (mut queues, mut keyed) = (Vec::new(), BTreeMap::<_, Vec<_>>::new());
    for (index, outgoing) in batch.into_iter().enumerate() {
        let message = &outgoing.delivery.message;
        match message.key().map(|key| (message.topic().to_owned(), key.to_vec())) {
            Some(queue) => keyed.entry(queue).or_default().push((index, outgoing)),
            None => queues.push(vec![(index, outgoing)]),
        }
    }
    queues.extend(keyed.into_values());
    queues
}

/// What an answer means for the message. Whether an attempt is counted, and who waits, follows from
/// the kind: an outage of the receiver must not use up the attempts of the messages behind it.
fn verdict(status: StatusCode) -> Result<(), PublishError> {
    let kind = match status.as_u16() {
        200..=299 => return Ok(()),
        // It looked at this message, alone in its request, and will never want it.
        400 | 413 | 415 | 422 => PublishErrorKind::Rejected,
        // Whatever goes to this URL ends like that: moved, forbidden, not there.
        300..=399 | 401 | 403 | 404 | 405 | 410 => PublishErrorKind::Destination,
        // It asks everybody to wait.
        429 | 503 => PublishErrorKind::Unavailable,
        // A proxy lost sight of it, or the receiver is in trouble: it may have been received.
        408 | 500..=599 => PublishErrorKind::Unknown,
        _ => PublishErrorKind::Failed,
    };
    Err(PublishError::new(kind, format!("the receiver answered {status}")))
}

/// Without an answer the message may have been received, unless there was not even a connection.
fn unanswered(error: reqwest::Error) -> PublishError {
    let kind = match error.is_connect() {
        true => PublishErrorKind::Unavailable,
        false => PublishErrorKind::Unknown,
    };
    PublishError::new(kind, error.without_url()) // A URL may hold a secret, and this is stored.
}

// The receiver --------------------------------------------------------------------------------

/// Takes messages for the topics that it knows. A real one drops those whose id it has seen: after
/// a fault a message comes again.
struct Receiver {
    address: SocketAddr,
    topics: Topics,
}

type Topics = Arc<Mutex<BTreeMap<String, Vec<Published>>>>;

impl Receiver {
    async fn start(topics: &[&str]) -> Result<Self> {
        let topics = topics.iter().map(|&topic| (topic.to_owned(), Vec::new())).collect();
        let topics: Topics = Arc::new(Mutex::new(topics));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr().context("the address of the receiver")?;
        let router = Router::new()
            .route("/{topic}", axum::routing::post(receive))
            .with_state(Arc::clone(&topics));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, topics })
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn received(&self, topic: &str) -> Vec<Published> {
        let topics = self.topics.lock().unwrap_or_else(PoisonError::into_inner);
        topics.get(topic).cloned().unwrap_or_default()
    }
}

async fn receive(
    State(topics): State<Topics>,
    Path(topic): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> StatusCode {
    let Some(mut record) = decode(&topic, &headers, &body) else { return StatusCode::BAD_REQUEST };
    let mut topics = topics.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(received) = topics.get_mut(&topic) else { return StatusCode::NOT_FOUND };
    record.offset = received.len() as i64;
    received.push(record);
    StatusCode::NO_CONTENT
}

fn decode(topic: &str, headers: &HeaderMap, body: &Bytes) -> Option<Published> {
    let mut all = Vec::new();
    for name in [header::ID, header::RETRIED] {
        if let Some(value) = headers.get(name) {
            all.push((name.to_owned(), Some(value.as_bytes().to_vec())));
        }
    }
    for line in headers.get_all(HEADER) {
        let line = line.to_str().ok()?;
        all.push(match line.split_once(" =") {
            Some((name, value)) => (name.to_owned(), Some(BASE64.decode(value).ok()?)),
            None => (line.to_owned(), None),
        });
    }
    let key = match headers.get(KEY) {
        Some(key) => Some(BASE64.decode(key).ok()?),
        None => None,
    };
    let payload = (!headers.contains_key(TOMBSTONE)).then(|| body.to_vec());
    Some(Published::new(topic, (0, 0), key, payload, all))
}

// The proof -----------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use outbox_core::broker::Outcome;
    use outbox_core::{Lane, MessageId, Position};
    use outbox_testing::conformance::broker::BrokerFixture;

    use super::*;

    struct OnLoopback {
        receiver: Receiver,
        broker: Arc<Webhook>,
    }

    #[async_trait]
    impl BrokerFixture for OnLoopback {
        async fn set_up() -> Self {
            let receiver = Receiver::start(&[]).await.expect("a receiver");
            let broker = Webhook::new(receiver.url(), TIMEOUT).expect("a client");
            Self { receiver, broker: Arc::new(broker) }
        }

        fn broker(&self) -> Arc<dyn Broker> {
            Arc::clone(&self.broker) as _
        }

        async fn create_topic(&self) -> String {
            let topic = format!("topic-{}", MessageId::generate());
            let topics = &self.receiver.topics;
            topics.lock().expect("no panic").insert(topic.clone(), Vec::new());
            topic
        }

        fn unknown_topic(&self) -> Option<String> {
            Some("unknown".to_owned())
        }

        async fn published_to(&self, topic: &str) -> Vec<Published> {
            self.receiver.received(topic)
        }
    }

    outbox_testing::broker_conformance!(OnLoopback);

    // What the suite cannot know: the ways in which HTTP fails.

    #[test]
    fn each_status_has_its_kind() {
        for (status, kind) in [
            (204, None),
            (413, Some(PublishErrorKind::Rejected)),
            (301, Some(PublishErrorKind::Destination)),
            (404, Some(PublishErrorKind::Destination)),
            (504, Some(PublishErrorKind::Unknown)),
            (503, Some(PublishErrorKind::Unavailable)),
            (500, Some(PublishErrorKind::Unknown)),
            (418, Some(PublishErrorKind::Failed)),
        ] {
            let code = StatusCode::from_u16(status).expect("a status");
            assert_eq!(verdict(code).err().map(|error| error.kind()), kind, "for status {status}");
        }
    }

    #[tokio::test]
    async fn a_receiver_that_is_not_there_is_unavailable() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        drop(listener);
        let broker = Webhook::new(url, TIMEOUT).expect("a client");
        assert_eq!(publish(&broker, ["a"]).await, [Some(PublishErrorKind::Unavailable)]);
        assert!(broker.check().await.is_err());
    }

    #[tokio::test]
    async fn without_an_answer_the_outcome_is_unknown_and_the_next_of_the_key_is_not_sent() {
        // Connections are made, by the kernel, and nobody ever answers.
        let silent = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let url = format!("http://{}", silent.local_addr().expect("an address"));
        let broker = Webhook::new(url, Duration::from_millis(300)).expect("a client");
        let (unknown, not_sent) = (PublishErrorKind::Unknown, PublishErrorKind::NotSent);
        let answers = publish(&broker, ["a", "b", "a"]).await;
        assert_eq!(answers, [Some(unknown), Some(unknown), Some(not_sent)]);
    }

    /// Publishes messages with these keys and tells how each failed.
    async fn publish<const N: usize>(
        broker: &Webhook,
        keys: [&str; N],
    ) -> [Option<PublishErrorKind>; N] {
        let batch = keys.map(|key| {
            let message = Message::builder("orders").key(key).payload("p").build();
            let delivery = Delivery::new(Position(1), Lane(0), message.expect("a message"));
            Outgoing::new(delivery, Instant::now() + Duration::from_secs(3_600))
        });
        let outcomes = Outcomes::new(N, Arc::default());
        broker.publish(batch.into(), &outcomes).await;
        let mut kinds = [None; N];
        for (index, outcome) in outcomes.take() {
            if let Outcome::Failed(kind, _) = outcome {
                kinds[index] = Some(kind);
            }
        }
        kinds
    }
}
