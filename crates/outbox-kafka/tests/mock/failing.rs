//! What becomes of messages when the broker refuses, breaks or goes away.

use std::time::{Duration, Instant};

use outbox_core::Message;
use outbox_core::broker::{Broker, Outcome, Outcomes, PublishErrorKind};
use outbox_kafka::KafkaBroker;
use outbox_kafka::rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use crate::cluster::{
    Cluster, Record, TOPIC, kind, kinds, message, outgoing, publish, sink, sorted,
};

fn error(code: i32) -> RDKafkaRespErr {
    RDKafkaRespErr::try_from(code).expect("code")
}

/// The next requests to produce are answered with these codes.
fn inject(cluster: &Cluster, codes: &[i32]) {
    let errors: Vec<_> = codes.iter().map(|&code| error(code)).collect();
    cluster.mock.request_errors(RDKafkaApiKey::Produce, &errors);
}

const UNKNOWN_TOPIC_OR_PARTITION: i32 = 3;
const NOT_LEADER_FOR_PARTITION: i32 = 6;
const NOT_ENOUGH_REPLICAS: i32 = 19;
const MESSAGE_SIZE_TOO_LARGE: i32 = 10;
const MESSAGE_BATCH_TOO_LARGE: i32 = 18;
const INVALID_RECORD: i32 = 87;
const OUT_OF_ORDER_SEQUENCE_NUMBER: i32 = 45;
const INVALID_PRODUCER_EPOCH: i32 = 47;

/// A linger after which a busy machine has handed all messages of a publish over as well.
const ONE_REQUEST: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread")]
async fn each_class_of_refusal_is_told_apart() {
    use PublishErrorKind::{Destination, Unavailable, Unknown};
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    publish(&broker, [message("k", "warm")]).await;
    for (code, expected) in [
        (17, Some(Destination)), // the name of the topic is illegal
        (44, Some(Destination)), // a policy of the topic
        (43, Some(Destination)), // a format without headers
        (32, Some(Destination)), // our clock is off
        (31, Some(Unavailable)), // the cluster is forbidden
        (89, Some(Unavailable)), // the quota is used up
        (-1, Some(Unknown)),
        (93, Some(Unknown)), // nothing a produce request is answered with
        (19, None),          // not enough replicas: librdkafka repeats it
        (6, None),           // not the leader: librdkafka repeats it
        // The topic is forbidden. The last one: librdkafka remembers it for a while.
        (29, Some(Destination)),
    ] {
        inject(&cluster, &[code]);
        let outcomes = publish(&broker, [message("k", &code.to_string())]).await;
        assert_eq!(kinds(&outcomes), [expected], "code {code}: {outcomes:?}");
    }
}

/// A broker that has no state of a producer takes any first sequence number (Apache Kafka up to 4.4, and
/// the simulated one). librdkafka takes what it acknowledges for proof that all before it arrived as
/// well, and reports messages as delivered that were refused.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_message_is_not_delivered_because_a_later_one_of_its_partition_was() {
    let mut doubted = 0;
    for code in [UNKNOWN_TOPIC_OR_PARTITION, NOT_LEADER_FOR_PARTITION, NOT_ENOUGH_REPLICAS] {
        let cluster = Cluster::new(1);
        let broker = cluster.builder().property("batch.num.messages", "1").build().unwrap();
        publish(&broker, [message("warm", "warm")]).await;
        cluster.mock.broker_round_trip_time(1, Duration::from_millis(500)).unwrap();
        inject(&cluster, &[code]);
        let batch = ["a", "b", "c"];
        let outcomes = publish(&broker, batch.map(|name| message(name, name))).await;
        cluster.mock.broker_round_trip_time(1, Duration::ZERO).unwrap();
        let log = cluster.payloads();
        for (name, outcome) in batch.iter().zip(kinds(&outcomes)) {
            match outcome {
                None => assert!(log.iter().any(|there| there == name), "{code}: {name} in {log:?}"),
                Some(kind) => assert_eq!(kind, PublishErrorKind::Unknown, "{code}: {name}"),
            }
            doubted += usize::from(outcome.is_some());
        }
        assert_eq!(kinds(&publish(&broker, [message("a", "a")]).await), [None], "code {code}");
        assert!(cluster.payloads().iter().any(|there| there == "a"), "code {code}");
    }
    assert!(doubted > 0, "requests did not overlap");
}

/// As librdkafka does: of a topic that is gone it reports, for all that was queued, that the
/// partition is unknown.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_goes_away_under_traffic_costs_no_message_an_attempt() {
    let cluster = Cluster::new(1);
    let broker = cluster.builder().message_timeout(Duration::from_secs(6)).build().unwrap();
    publish(&broker, [message("k", "warm")]).await;
    // For two seconds librdkafka takes a topic that it has just met for one that is being made.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    cluster.mock.topic_error(TOPIC, error(UNKNOWN_TOPIC_OR_PARTITION)).unwrap();
    inject(&cluster, &[UNKNOWN_TOPIC_OR_PARTITION; 20]);
    let mut seen = Vec::new();
    for n in 0..3 {
        let outcomes = publish(&broker, [message("k", &n.to_string())]).await;
        seen.push(kind(&outcomes[0]).expect("it is not delivered"));
    }
    assert!(seen.iter().all(|kind| !kind.counts()), "{seen:?}");
    assert_eq!(seen.last(), Some(&PublishErrorKind::Destination), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verdict_on_a_batch_does_not_condemn_its_bystanders() {
    for code in [MESSAGE_SIZE_TOO_LARGE, MESSAGE_BATCH_TOO_LARGE, INVALID_RECORD] {
        let cluster = Cluster::new(1);
        let broker = cluster.builder().linger(ONE_REQUEST).build().unwrap();
        publish(&broker, [message("warm", "warm")]).await;
        inject(&cluster, &[code]);
        let batch: Vec<_> = (0..20).map(|n| message(&n.to_string(), &n.to_string())).collect();
        let outcomes = publish(&broker, batch).await;
        assert_eq!(kinds(&outcomes), [None; 20], "code {code}");
        let expected: Vec<_> = (0..20).map(|n| n.to_string()).collect();
        assert_eq!(cluster.payloads()[1..], expected, "code {code}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_message_that_is_refused_alone_is_rejected() {
    let cluster = Cluster::new(1);
    let broker = cluster.builder().linger(ONE_REQUEST).build().unwrap();
    publish(&broker, [message("warm", "warm")]).await;
    // The batch is refused, then the first suspect alone; the others pass.
    inject(&cluster, &[INVALID_RECORD, INVALID_RECORD]);
    let batch = [message("a", "a"), message("b", "b"), message("c", "c")];
    let outcomes = publish(&broker, batch).await;
    assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::Rejected), None, None]);
    assert_eq!(cluster.payloads(), ["warm", "b", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspect_is_sent_again_as_it_was() {
    let cluster = Cluster::new(3);
    let broker = cluster.builder().linger(ONE_REQUEST).build().unwrap();
    let binary: Vec<u8> = (0..=255).collect();
    let full = Message::builder(TOPIC).key(binary.clone()).payload(binary.clone()).partition(2);
    let full = full.header("binary", binary).null_header("null").header("empty", "");
    let to = |partition| Message::builder(TOPIC).partition(partition);
    let batch = [full, to(2).tombstone(), to(2).payload(""), to(2).key("").tombstone()];
    let batch = batch.map(|message| message.build().unwrap());
    let sent = async |when: &str| {
        publish(&broker, batch.clone()).await.iter().for_each(|outcome| {
            assert_eq!(kind(outcome), None, "{when}");
        });
    };
    sent("at once").await;
    inject(&cluster, &[INVALID_RECORD]);
    sent("again").await;
    let mut log = cluster.log();
    log.retain(|record| record.partition == 2);
    let (at_once, again) = log.split_at(batch.len());
    let content = |records: &[Record]| -> Vec<_> {
        records.iter().map(|r| (r.key.clone(), r.payload.clone(), r.headers.clone())).collect()
    };
    assert_eq!(content(again), content(at_once));
    assert_eq!(content(again).len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_suspect_that_became_overdue_is_not_sent_again() {
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    publish(&broker, [message("warm", "warm")]).await;
    inject(&cluster, &[INVALID_RECORD, INVALID_RECORD]);
    cluster.mock.broker_round_trip_time(1, Duration::from_millis(2_500)).unwrap();
    let mut late = outgoing(message("k", "late"));
    late.not_after = tokio::time::Instant::now() + Duration::from_secs(2);
    let outcomes = crate::cluster::publish_all(&broker, vec![late]).await;
    assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::NotSent)]);
    cluster.mock.broker_round_trip_time(1, Duration::ZERO).unwrap();
    // It was sent once: of two refusals one is left, after which this one is sent again alone.
    assert_eq!(kinds(&publish(&broker, [message("k", "next")]).await), [None]);
    assert_eq!(kinds(&publish(&broker, [message("k", "last")]).await), [None]);
    assert_eq!(cluster.payloads(), ["warm", "next", "last"]);
}

/// A busy machine is late now and then, a defect each time: one of three must be in time.
async fn in_time(lateness: impl AsyncFn() -> Duration) {
    let mut late = Vec::new();
    while late.len() < 3 {
        match lateness().await {
            Duration::ZERO => return,
            by => late.push(by),
        }
    }
    panic!("each time too late, by {late:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_leaves_messages_unknown_in_time_and_ends_by_itself() {
    in_time(async || {
        let cluster = Cluster::new(2);
        let broker = cluster.builder().message_timeout(Duration::from_secs(3)).build().unwrap();
        while kinds(&publish(&broker, [message("warm", "warm")]).await) != [None] {}
        assert!(broker.check().await.is_ok());

        cluster.mock.broker_down(1).unwrap();
        let started = Instant::now();
        let outcomes = publish(&broker, (0..50).map(|n| message(&n.to_string(), "down"))).await;
        let late = started.elapsed().saturating_sub(broker.profile().undecided);
        assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::Unknown); 50]);
        let unavailable = broker.check().await.unwrap_err();
        assert_eq!(unavailable.kind(), PublishErrorKind::Unavailable);

        cluster.mock.broker_up(1).unwrap();
        let started = Instant::now();
        while kind(&publish(&broker, [message("k", "up")]).await[0]).is_some() {
            assert!(started.elapsed() < Duration::from_secs(30), "no recovery");
        }
        assert!(broker.check().await.is_ok());
        late
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_is_unknown_in_time() {
    in_time(async || {
        let cluster = Cluster::new(1);
        let broker = cluster.builder().message_timeout(Duration::from_millis(500)).build().unwrap();
        while kinds(&publish(&broker, [message("warm", "warm")]).await) != [None] {}
        cluster.mock.broker_round_trip_time(1, Duration::from_secs(60)).unwrap();
        let started = Instant::now();
        let outcomes = publish(&broker, [message("k", "lost")]).await;
        let late = started.elapsed().saturating_sub(broker.profile().undecided);
        assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::Unknown)]);
        late
    })
    .await;
}

/// A cluster and a broker whose queue of 20,000 messages empties so slowly that even a busy machine
/// fills it: by 100 every 20 ms.
async fn slow() -> (Cluster, KafkaBroker) {
    let cluster = Cluster::new(1);
    let broker = cluster
        .builder()
        .property("queue.buffering.max.messages", "20000")
        .property("batch.num.messages", "100")
        .property("max.in.flight", "1")
        .build()
        .expect("the settings are valid");
    publish(&broker, [message("warm", "warm")]).await;
    let slow = cluster.mock.broker_round_trip_time(1, Duration::from_millis(20));
    slow.expect("broker 1 exists");
    (cluster, broker)
}

/// So many that the queue is full long before all are handed over.
const COUNT: usize = 60_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_keeps_the_order_of_every_key() {
    let (cluster, broker) = slow().await;
    let batch = |numbers: std::ops::Range<usize>| -> Vec<_> {
        numbers.map(|n| outgoing(message("k", &n.to_string()))).collect()
    };
    let (first, second) = (batch(0..COUNT), batch(COUNT..COUNT + 2_000));
    let (a, b) = (sink(first.len()), sink(second.len()));
    // Both at once: the second waits for room behind the first.
    tokio::join!(
        broker.publish(first, &a),
        broker.publish(second, &b),
        no_longer_slow(&cluster, &a)
    );
    let answers = kinds(&[sorted(&a), sorted(&b)].concat());
    let sent = (0..).zip(&answers).filter(|(_, kind)| kind.is_none()).map(|(n, _)| n);
    let expected: Vec<_> = sent.map(|n: usize| n.to_string()).collect();
    assert!(expected.len() > 20_000, "it was not handed over as room came: {}", expected.len());
    assert!(expected.len() < answers.len(), "the queue was never full");
    assert!(cluster.payloads()[1..] == expected, "the order is not kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_stays_full_sends_none_of_the_rest() {
    let (cluster, broker) = slow().await;
    let batch = (0..COUNT).map(|n| outgoing(message("k", &n.to_string()))).collect();
    let answers = sink(COUNT);
    tokio::join!(broker.publish(batch, &answers), no_longer_slow(&cluster, &answers));
    let answers = kinds(&sorted(&answers));
    // There is room again all the time, and nothing may use it to overtake.
    let handed_over = answers.iter().position(|kind| kind.is_some()).expect("too few messages");
    assert!(handed_over >= 20_000, "{handed_over}");
    let not_sent = |kind: &Option<_>| *kind == Some(PublishErrorKind::NotSent);
    assert!(answers[handed_over..].iter().all(not_sent), "some of the rest was sent");
    let expected: Vec<_> = (0..handed_over).map(|n| n.to_string()).collect();
    assert!(cluster.payloads()[1..] == expected, "what was sent is not what is there");
}

/// Makes the cluster quick once the rest of these was given up: only then so many have an answer.
async fn no_longer_slow(cluster: &Cluster, answers: &Outcomes) {
    while answers.unanswered() > 40_000 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    cluster.mock.broker_round_trip_time(1, Duration::ZERO).expect("broker 1 exists");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fatal_error_replaces_the_producer() {
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    publish(&broker, [message("k", "before")]).await;
    inject(&cluster, &[OUT_OF_ORDER_SEQUENCE_NUMBER]);
    let outcomes = publish(&broker, [message("k", "ambiguous")]).await;
    assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::Unknown)]);

    let started = Instant::now();
    loop {
        let outcome = publish(&broker, [message("k", "after")]).await.remove(0);
        match kind(&outcome) {
            None => break,
            Some(PublishErrorKind::Unavailable | PublishErrorKind::Unknown) => {}
            Some(other) => panic!("{other:?}"),
        }
        assert!(started.elapsed() < Duration::from_secs(10), "the producer is not replaced");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(cluster.payloads(), ["before", "after"]);
}

/// librdkafka's epoch of a producer begins anew after 32,768 refused messages.
#[tokio::test(flavor = "multi_thread")]
async fn a_producer_whose_epoch_is_refused_is_replaced() {
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    publish(&broker, [message("k", "before")]).await;
    inject(&cluster, &[INVALID_PRODUCER_EPOCH]);
    let outcomes = publish(&broker, [message("k", "ambiguous")]).await;
    assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::Unknown)]);
    let started = Instant::now();
    while kind(&publish(&broker, [message("k", "probe")]).await[0])
        != Some(PublishErrorKind::Unavailable)
    {
        assert!(started.elapsed() < Duration::from_secs(5), "the producer is not replaced");
    }
    while kind(&publish(&broker, [message("k", "after")]).await[0]).is_some() {
        assert!(started.elapsed() < Duration::from_secs(10), "no new producer");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn close_ends_within_its_limit_while_the_broker_is_down() {
    let cluster = Cluster::new(1);
    let broker = cluster.builder().message_timeout(Duration::from_secs(60)).build().unwrap();
    publish(&broker, [message("warm", "warm")]).await;
    cluster.mock.broker_down(1).unwrap();
    let batch: Vec<_> = (0..5_000).map(|n| outgoing(message("k", &n.to_string()))).collect();
    let outcomes = sink(batch.len());
    let started = Instant::now();
    tokio::join!(broker.publish(batch.clone(), &outcomes), async {
        broker.close(Duration::from_millis(300)).await;
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    });
    assert!(started.elapsed() < Duration::from_secs(20), "leftovers stay unanswered");
    assert_eq!(kinds(&sorted(&outcomes)), vec![Some(PublishErrorKind::Unknown); 5_000]);
    let outcomes = publish(&broker, [message("k", "too late")]).await;
    assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::NotSent)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn close_flushes_what_is_under_way() {
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    publish(&broker, [message("warm", "warm")]).await;
    cluster.mock.broker_round_trip_time(1, Duration::from_millis(500)).unwrap();
    let batch: Vec<_> = (0..1_000).map(|n| outgoing(message("k", &n.to_string()))).collect();
    let outcomes = sink(batch.len());
    let publish = broker.publish(batch.clone(), &outcomes);
    assert!(tokio::time::timeout(Duration::ZERO, publish).await.is_err(), "it was not dropped");
    broker.close(Duration::from_secs(10)).await;
    assert_eq!(kinds(&sorted(&outcomes)), vec![None; 1_000]);
    cluster.mock.broker_round_trip_time(1, Duration::ZERO).unwrap();
    assert_eq!(cluster.payloads().len(), 1_001);
}

/// Why a purge from the queue is unknown and not "not sent": librdkafka puts a message back into
/// the queue when its answer is lost, and the broker may have written it.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_was_purged_from_the_queue_may_be_in_the_log() {
    let cluster = Cluster::new(1);
    let broker = cluster.builder().message_timeout(Duration::from_secs(60)).build().unwrap();
    publish(&broker, [message("warm", "warm")]).await;
    cluster.mock.broker_round_trip_time(1, Duration::from_secs(4)).unwrap();
    let batch = [outgoing(message("k", "written"))];
    let outcomes = sink(1);
    tokio::join!(broker.publish(batch.into(), &outcomes), async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.mock.broker_down(1).unwrap();
        tokio::time::sleep(Duration::from_secs(2)).await;
        broker.close(Duration::ZERO).await;
    });
    let [Outcome::Failed(kind, failure)] = &sorted(&outcomes)[..] else { panic!("delivered") };
    assert!(failure.to_string().contains("PurgeQueue"), "{failure}");
    assert_eq!(*kind, PublishErrorKind::Unknown);
    cluster.mock.broker_round_trip_time(1, Duration::ZERO).unwrap();
    cluster.mock.broker_up(1).unwrap();
    assert_eq!(cluster.payloads(), ["warm", "written"]);
}

/// With `in_key_window` above 1 a publish may hold several messages of a key.
#[tokio::test(flavor = "multi_thread")]
async fn behind_a_message_that_was_not_sent_none_of_its_key_is() {
    let cluster = Cluster::new(1);
    let broker = cluster.builder().max_message_bytes(1_000).build().unwrap();
    let large = message("k", &"p".repeat(2_000));
    let outcomes = publish(&broker, [large, message("k", "later"), message("l", "other")]).await;
    let (rejected, not_sent) = (PublishErrorKind::Rejected, PublishErrorKind::NotSent);
    assert_eq!(kinds(&outcomes), [Some(rejected), Some(not_sent), None]);
    let mut overdue = outgoing(message("k", "overdue"));
    overdue.not_after = tokio::time::Instant::now();
    let batch = vec![overdue, outgoing(message("k", "later")), outgoing(message("l", "other"))];
    let outcomes = crate::cluster::publish_all(&broker, batch).await;
    assert_eq!(kinds(&outcomes), [Some(not_sent), Some(not_sent), None]);
    assert_eq!(cluster.payloads(), ["other", "other"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_topic_is_a_destination_that_is_missing() {
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    cluster.mock.topic_error(TOPIC, error(3)).unwrap();
    let outcomes = publish(&broker, [message("k", "p")]).await;
    assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::Destination)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_misspelt_topic_does_not_come_into_being() {
    let cluster = Cluster::new(1);
    let broker = cluster.broker();
    let misspelt = Message::builder("oredrs").key("k").payload("p").build().unwrap();
    let outcomes = publish(&broker, [misspelt, message("k", "p")]).await;
    assert_eq!(kinds(&outcomes), [Some(PublishErrorKind::Destination), None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_tell_the_code_and_nothing_of_the_message() {
    let cluster = Cluster::new(1);
    let broker = cluster.builder().max_message_bytes(1_000).build().unwrap();
    let secret = "s3cret-".repeat(300);
    let outcomes = publish(&broker, [message("s3cret-key", &secret)]).await;
    let text = format!("{outcomes:?}");
    assert!(text.contains("MessageSizeTooLarge"), "{text}");
    assert!(!text.contains("s3cret"), "{text}");
}
