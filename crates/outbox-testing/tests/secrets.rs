//! What an application writes into a message stays there: no error, no `Debug`, no event and no
//! line of a log shows it.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics_util::debugging::DebuggingRecorder;
use outbox_core::broker::PublishErrorKind;
use outbox_core::delivery::{Delivery, Failure, Position};
use outbox_core::message::Limits;
use outbox_core::metrics::MetricsObserver;
use outbox_core::observe::{Event, Observer};
use outbox_core::retry::{OnDeath, RetryPolicy, TopicPolicy};
use outbox_core::store::StoreErrorKind;
use outbox_core::{Dispatcher, Lane, Message};
use outbox_testing::{Fault, FaultyStore, MemoryBroker, MemoryStore, StoreFault, StoreMethod};

/// One for each place that may hold a secret.
const CANARIES: [&str; 3] = ["canary-key-5f1c", "canary-payload-77ab", "canary-header-e09d"];

fn message(topic: &str) -> Message {
    let [key, payload, header] = CANARIES;
    Message::builder(topic)
        .key(key)
        .payload(payload)
        .header("auth", header)
        .build()
        .expect("nothing of it can fail")
}

/// Everything that was shown to anybody.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Vec<u8>>>);

impl Shown {
    fn show(&self, what: impl std::fmt::Debug) {
        writeln!(self.clone(), "{what:?} {what:#?}").expect("nothing of it can fail");
    }

    fn error(&self, error: &dyn std::error::Error) {
        let mut next = Some(error);
        while let Some(error) = next {
            writeln!(self.clone(), "{error} {error:?}").expect("nothing of it can fail");
            next = error.source();
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("nothing of it can fail")).into_owned()
    }
}

impl Write for Shown {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nothing of it can fail").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Observer for Shown {
    fn observe(&self, event: &Event) {
        self.show(event);
    }
}

#[track_caller]
fn assert_clean(shown: &Shown) {
    let text = shown.text();
    for canary in CANARIES {
        // Neither as text nor as the numbers of its bytes.
        let bytes = format!("{:?}", canary.as_bytes());
        let bytes = bytes.trim_matches(['[', ']']);
        let line = text.lines().find(|line| line.contains(canary) || line.contains(bytes));
        assert_eq!(line, None, "{canary} was shown");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dispatcher_in_every_kind_of_trouble_shows_no_content() {
    let shown = Shown::default();
    let writer = shown.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::level_filters::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .finish();
    let _log = tracing::subscriber::set_default(subscriber);
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _export = metrics::set_default_local_recorder(&recorder);

    let (store, broker) = (MemoryStore::new(), MemoryBroker::new());
    broker.remove_topic("late");
    for topic in ["orders", "skipping", "late", "orders", "skipping", "garbled"] {
        let mut tx = store.begin();
        let id = store.outbox().add(&mut tx, message(topic)).await.unwrap();
        tx.commit();
        if topic == "garbled" {
            assert!(store.garble(id));
        }
    }
    let skipping = |delivery: &Delivery| delivery.message.topic() == "skipping";
    broker.fail_when(skipping, PublishErrorKind::Rejected);
    for kind in [
        PublishErrorKind::Unavailable,
        PublishErrorKind::Failed,
        PublishErrorKind::NotSent,
        PublishErrorKind::Unknown,
        PublishErrorKind::Rejected,
    ] {
        broker.fail_next(1, kind);
    }
    broker.fail_next(1, Fault::Doubt);
    broker.fail_next(1, Fault::NoAnswer);
    broker.fail_next(1, Fault::Hang);
    let faulty = FaultyStore::new(store.clone());
    for method in [StoreMethod::KeepLeases, StoreMethod::Claim, StoreMethod::Settle] {
        faulty.fail_next(method, 1, StoreErrorKind::Denied);
        faulty.fail_next(method, 1, StoreFault::Doubt(StoreErrorKind::Unavailable));
        faulty.fail_next(method, 1, StoreFault::HangAfter);
    }
    let retry = RetryPolicy::exponential(Duration::from_millis(100), Duration::from_secs(1));
    let builder = Dispatcher::builder(faulty, broker.clone())
        .retry(retry.max_attempts(2))
        .topic("skipping", TopicPolicy::new().on_death(OnDeath::Skip))
        .observer(shown.clone())
        .observer(MetricsObserver::new(["orders"]));
    shown.show(&builder);
    let dispatcher = builder.build().unwrap();
    let handle = dispatcher.handle();
    let end = tokio::time::sleep(Duration::from_secs(600));
    let summary = dispatcher.run(end).await.unwrap();
    shown.show((&summary, handle.status(), &store, &broker));
    for (key, _, _, value) in snapshotter.snapshot().into_vec() {
        shown.show((key.key(), value));
    }

    let text = shown.text();
    for word in [
        "message is held",
        "message is dead",
        "store failed",
        "PublishFailed",
        "outbox_publish_failures_total",
        "outbox_held_messages",
    ] {
        assert!(text.contains(word), "{word:?} was not exercised");
    }
    assert_clean(&shown);
}

#[tokio::test]
async fn refused_and_shown_messages_hide_their_content() {
    let shown = Shown::default();
    let message = message("orders");
    shown.show((&message, &message.headers()));
    shown.show(Delivery::new(Position(1), Lane(0), message.clone()));
    shown.show(Failure::new("rejected", "why"));
    let [key, payload, header] = CANARIES;
    shown.show(Message::builder("t").key(key).payload(payload).header("auth", header));
    for limits in [
        Limits::default().max_key_bytes(1),
        Limits::default().max_message_bytes(1),
        Limits::default().max_headers(0, 0),
        Limits::default().topics(["other"]),
    ] {
        shown.error(&limits.check(&message).unwrap_err());
        let store = MemoryStore::new();
        let mut tx = store.begin();
        let outbox = store.outbox().with_limits(limits);
        shown.error(&outbox.add(&mut tx, message.clone()).await.unwrap_err());
    }
    shown.error(&Message::builder("bad topic").payload(payload).build().unwrap_err());
    shown.error(&Message::builder("t").header("bad name", header).payload("").build().unwrap_err());
    shown.error(&Message::builder("t").payload(payload).partition(-1).build().unwrap_err());
    let mut bytes = message.encode();
    bytes.truncate(bytes.len() - 1);
    shown.error(&Message::decode(&bytes).unwrap_err());
    shown.error(&message.payload_json::<u8>().unwrap_err());
    assert!(shown.text().len() > 500, "things were shown");
    assert_clean(&shown);
}
